"""The options that both training scripts share, and the types of all commands' options.

`parse` reads `--config FILE`, a run's config.json: its options come first and those of the command line win.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from nano_adrpo.errors import InputError, Parser
from nano_adrpo.files import read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def positive(kind, zero=False):
    """An argparse type: a finite int or float above zero, or zero where that is allowed."""

    def parse(text):
        value = kind(text)
        if kind is int and value >= 2**31:
            raise argparse.ArgumentTypeError(f"{text} is not below 2^31")
        if not (value > 0 or zero and value == 0) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a positive number{' or 0' if zero else ''}")
        return value

    parse.__name__ = kind.__name__  # argparse's messages name it
    return parse


def finite(text):
    """An argparse type: a number, negative ones too."""
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def fraction(text):
    """An argparse type: a number from 0 up to and without 1."""
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number in [0, 1)")
    return value


def seed(text):
    """An argparse type: what a torch.Generator can be seeded with."""
    if not -(2**63) <= (value := int(text)) < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 64 bits")
    return value


def device(name):
    """An argparse type: a torch device that this machine has."""
    try:
        torch.zeros(1, device=name).item()  # fails on "meta", too, which holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"device {name!r} is not available ({str(error).splitlines()[0]})") from None
    return name


def flag(add, name, default, text):
    """Adds --name and --no-name."""
    add(name, action=argparse.BooleanOptionalAction, default=default, help=text)


def optimisation(parser, targets, **defaults):
    """The options of the gradient steps. targets: the layers that adapters go on by default. -> the group's `add`"""
    add = parser.add_argument_group("optimisation").add_argument
    add("--rounds", type=positive(int, zero=True), help="rounds of rollouts; 0 evaluates and ends")
    add("--lr", type=positive(float), help="AdamW's learning rate")
    add("--lr-schedule", choices=("constant", "linear", "cosine"), help="how the learning rate falls over the rounds")
    add("--lr-hold", type=fraction, default=0.0, help="share of the rounds before it begins to fall")
    add("--lr-end", type=positive(float, zero=True), default=0.0, help="share of --lr that it falls to")
    add("--warmup", type=positive(int, zero=True), default=0, help="rounds in which it rises in a straight line to --lr")
    add("--weight-decay", type=positive(float, zero=True), default=0.0, help="AdamW's, per unit of learning rate")
    add("--clip-grad", type=positive(float), default=1.0, help="largest norm of the gradient")
    add("--micro-batch", type=positive(int), help="samples per forward pass; must divide a gradient step's; default all")
    flag(add, "--gradient-checkpointing", False, "keep block inputs only and recompute the rest: less memory")
    add("--lora-rank", type=positive(int, zero=True), default=0, help="rank of adapters to train; 0 trains all weights")
    add("--lora-alpha", type=positive(float), help="the adapters' strength is alpha / rank; default the rank")
    add("--lora-targets", nargs="+", help="names of layers to adapt, or all-linear; default " + " ".join(targets))
    add("--adapter", help="PEFT's or diffusers' adapter to train on; the reference is the model with it as it is at the start")
    add("--ema", type=fraction, default=0.0, help="decay of a moving average of what is trained, evaluated and saved; 0: none")
    parser.set_defaults(**defaults)
    return add


def run(parser, **defaults):
    """The options of the run as a whole. -> the group's `add`"""
    add = parser.add_argument_group("run").add_argument
    add("--config", metavar="FILE", help="a run's config.json: its options, where the command line does not give others")
    add("--out", help="new or empty folder for the run's files; default a new one in runs/")
    add("--resume", action="store_true", help="go on with the run in --out, with its options; starts it where --out is empty")
    add("--checkpoint-every", type=positive(int), help="rounds between checkpoints; default one at each evaluation")
    add("--keep-every", type=positive(int), help="rounds of whose checkpoints each stays; default only the last two stay")
    patience = "rounds in a row with a loss, gradient or reward that is not finite, which take no step, until the run ends"
    add("--patience-nonfinite", type=positive(int), default=3, help=patience)
    flag(add, "--fsdp", False, "of several processes each keeps a part of the weights; else each keeps all")
    add("--seed", type=seed, default=0, help="of everything that is drawn")
    add("--device", type=device, default="cpu", help="torch device")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of forward passes; what is trained stays float32")
    add("--eval-every", type=positive(int), help="rounds between evaluations; the model or adapter is saved at each")
    flag(add, "--eval-first", True, "evaluate before the first round, too")
    flag(add, "--keep-checkpoints", False, "keep the model or adapter of every evaluation, in round-N/, too")
    parser.set_defaults(**defaults)
    return add


def chat(add):
    """Adds how questions become prompts and where completions end: the options of language.chat.TextCodec."""
    add("--system", metavar="TEXT", help="the system message; default what the chat template writes of itself")
    add(
        "--chat-template", metavar="FILE", help="of the model, instead of its folder's; none: a question is the prompt as it is"
    )
    add("--thinking", choices=("on", "off"), help="for templates that read enable_thinking; default as they have it")
    add("--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="texts that end a completion, too")


def parse(parser, argv):
    """Command line -> options, those of the run to --resume first, then those of --config. Raises InputError naming the file
    and the option."""
    argv = sys.argv[1:] if argv is None else argv
    first = Parser(add_help=False)
    first.add_argument("--config")
    first.add_argument("--out")
    first.add_argument("--resume", action="store_true")
    found = first.parse_known_args(argv)[0]
    if found.resume and not found.out:
        raise InputError("--resume: expected with --out, the folder of the run")
    argv = [*(words(parser, found.config, argv) if found.config else []), *argv]
    run = Path(found.out) / "config.json" if found.resume else None
    args = parser.parse_args([*(words(parser, run, argv) if run and run.is_file() else []), *argv])
    if args.lora_rank == 0 and (args.lora_alpha or args.lora_targets):
        raise InputError("--lora-alpha and --lora-targets: expected only with --lora-rank")
    if args.lora_rank and args.adapter:
        raise InputError("--lora-rank and --adapter: expected one of them, new adapters or those to train on")
    return args


def adapted(args):
    """Whether adapters are trained, not all weights."""
    return bool(args.lora_rank or args.adapter)


def words(parser, file, argv):
    """A config.json's options as words of a command line, without those that argv gives itself."""
    actions, found = {action.dest: action for action in parser._actions}, []
    given = {word.partition("=")[0].replace("--no-", "--") for word in argv if word.startswith("--")}
    for name, value in read_json(file).items():
        option = f"--{name.replace('_', '-')}"
        if name not in actions or name in ("config", "resume", "help"):
            raise InputError(f"{file}: key '{name}' is no option of this script")
        if option in given or value is None:
            continue
        check(actions[name], value, f"{file}: key '{name}'")
        if isinstance(value, bool):
            found.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, list) and name == "stop":
            found += [f"{option}={text}" for text in value]  # "---" is no option there
        elif isinstance(value, list):
            found += [option, *map(str, value)]
        else:
            found.append(f"{option}={value}")
    return found


def check(action, value, where):
    """Raises InputError, which begins with `where`, for a value of a config.json that an option cannot have."""
    switch, several = isinstance(action, argparse.BooleanOptionalAction), action.nargs == "+"
    expected = "true or false" if switch else "a number or a text" + ", or a list of them" * several
    for each in value if several and isinstance(value, list) else [value]:
        if isinstance(each, bool) != switch or isinstance(each, list | dict) or "\0" in str(each):
            raise InputError(f"{where} is {value!r}; expected {expected}")
        try:
            (action.type or str)(str(each))
        except (argparse.ArgumentTypeError, ValueError) as error:
            expected = error if isinstance(error, argparse.ArgumentTypeError) else "expected a number"
            raise InputError(f"{where} is {value!r}: {expected}") from None


def saved(args):
    """All options, given or default, as config.json stores them."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "config", "resume")}


def divides(option, size, whole, what):
    """Refuses a size that does not divide the whole."""
    if whole % size:
        raise InputError(f"{option} {size} does not divide the {whole} {what}")


def check_range(low, high):
    """Refuses an empty range of the advantage."""
    if not low <= high:
        raise InputError(f"--a-min and --a-max: the advantage's range is [{low}, {high}]; expected A_min ≤ A_max")


def refuse_idle(argv, *rules):
    """Refuses options on the command line (None: the process's own) that have no effect beside the others.

    rules   (whether they have one, what is expected, the options as they are spelt …)

    What --config brings is not asked: a file serves several methods."""
    given = {str(word).partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    for acts, expected, *names in rules:
        for name in names:
            if name in given and not acts:
                raise InputError(f"{name}: expected only {expected}")


def idle_in_training(args):
    """The rules, see `refuse_idle`, for the options that both training scripts have."""
    return (
        (args.lr_schedule != "constant", "with --lr-schedule linear or cosine", "--lr-hold", "--lr-end"),
        (args.rounds > 0 or args.eval_first, "with --rounds above 0", "--no-eval-first"),
        (args.rounds > 0, "with --rounds above 0", "--keep-checkpoints"),
    )
