"""A run's folder, log and messages."""

import contextlib
import datetime
import itertools
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from nano_adrpo import files, lora
from nano_adrpo.errors import InputError, NotFinite, writing
from nano_adrpo.training import checkpoint, distributed, options, sharding
from nano_adrpo.training.life import full, refuse_used


def claim(out, default, config, life):
    """Creates the run's folder with its config.json, and prints that; -> its Path. A run that goes on has its folder already.
    Of several ranks the first does it.

    out       the folder, new or empty; None takes the first of default, default-2, default-3, … that is new

    If two runs claim one folder at the same time, one gets it and the other raises InputError.
    """
    folder = Path(distributed.first(lambda: str(create(out, default, config, life))))
    life.catch_signals()
    return folder


def create(out, default, config, life):
    refuse_used(out, resume=True)  # what came there since the start
    for number in itertools.count(1):
        folder = life.folder or Path(out or (default if number == 1 else f"{default}-{number}"))
        try:
            folder.mkdir(parents=True, exist_ok=bool(out))
            break
        except FileExistsError:
            if out:
                raise InputError(f"--out {out}: cannot write there (File exists); expected a new or empty folder") from None
        except OSError as error:
            raise InputError(f"--out {folder}: cannot write there ({error.strerror})") from None
    if not life.folder:
        life.lock(folder)
        if (folder / "config.json").exists():  # another run came and went since `refuse_used` looked
            raise InputError(f"--out {out}: another run has it; expected a new or empty folder")
    files.write_json(folder / "config.json", config)
    print(f"{folder}: {json.dumps(config)}", flush=True)
    return folder


def make_folder(path, out):
    """Creates the folder `path` of the option --out `out` where it is missing; refuses one that cannot be written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from None


def new_folder(out):
    """Creates the new or empty folder of --out, of a command that is one process; -> its Path."""
    if distributed.size() > 1:
        raise InputError(f"WORLD_SIZE is {distributed.size()}: expected one process, started without torchrun")
    refuse_used(out)
    make_folder(out, out)
    return Path(out)


@contextlib.contextmanager
def at_round(args, out, round, phases):
    """Names the round and the last checkpoint where something fails inside: an InputError stays one line, and a GPU that is
    full becomes one; any other error, such as one in a reward of the user's, keeps its traceback."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"round {round}: {error}; last checkpoint: {checkpoint.last(out)}") from None
    except torch.OutOfMemoryError as error:
        batch = "--rollout-batch" if hasattr(args, "rollout_batch") else "--eval-batch"
        lower = f"less is needed with a smaller --micro-batch or {batch}, or with --gradient-checkpointing"
        where = f"round {round}, {phases.phase}"
        raise InputError(f"{where}: {full(error)}; {lower}; last checkpoint: {checkpoint.last(out)}") from None
    except Exception as error:
        error.add_note(f"In round {round}; last checkpoint: {checkpoint.last(out)}")
        raise


@contextlib.contextmanager
def skipping(args, memory):
    """A round with a reward, a loss or a gradient that is not finite ends where that shows, before the step. It is warned of
    and logged as skipped; --patience-nonfinite such rounds in a row raise NotFinite, which names the prompts.

    -> a dict, what the round logs; and a list for its prompts: while it is empty nothing is skipped
    """
    values, prompts = {}, []
    try:
        yield values, prompts
    except NotFinite as error:
        if not prompts:
            raise
        distributed.tell(error)
        memory["skipped"] += 1
        names = ", ".join(repr(prompt[:60]) for prompt in prompts[:3]) + ", …" * (len(prompts) > 3)
        if memory["skipped"] >= args.patience_nonfinite:
            rounds = f"{memory['skipped']} of --patience-nonfinite {args.patience_nonfinite} such rounds in a row"
            raise NotFinite(f"{error}; prompts {names}; {rounds}") from None
        print(f"warning: a round without a step: {error}; prompts {names}", flush=True)
        values["skipped"] = 1
    else:
        memory["skipped"] = 0 if prompts else memory["skipped"]


def save_model(network, save, args, out, ema, round):
    """Writes what was trained in `round` rounds, as its moving average, for whoever opens it: adapter/ in PEFT's format, or
    model/ by `save(folder)`; with --keep-checkpoints also below round-N/. Round 0 has trained nothing."""
    if round == 0:
        return
    with ema.applied(), sharding.whole_on_first(network):
        for folder in [out, *([out / f"round-{round}"] if args.keep_checkpoints else [])] if distributed.rank() == 0 else []:
            if options.adapted(args):
                lora.save(network, folder / "adapter")
            else:
                save(folder / "model")


class Phases:
    """Seconds of each phase of a round and the most memory it held: on a GPU what its tensors took, else the process's peak
    so far. For the console only: clock readings in a file would make two runs of one seed differ."""

    def __init__(self, device):
        self.cuda, self.spent, self.phase = torch.device(device).type == "cuda", {}, None

    def begin(self, phase):
        """Ends the phase that is running and begins another; None: no other."""
        if self.cuda:
            torch.cuda.synchronize()
        if self.phase:
            seconds, memory = self.spent.get(self.phase, (0.0, 0))
            self.spent[self.phase] = seconds + time.monotonic() - self.start, max(memory, self.peak())
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.phase, self.start = phase, time.monotonic()

    def peak(self):
        """Bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def take(self):
        """Ends the phase that is running. -> one line about every phase since the last call"""
        self.begin(None)
        line = "  ".join(f"{name} {seconds:.2f} s {memory / 2**30:.1f} GiB" for name, (seconds, memory) in self.spent.items())
        self.spent = {}
        return line


class Log:
    """metrics.jsonl, one JSON object a line, and lines on the console with the time of a round and the time that is left.

    The file holds no clock readings, so that two runs of one seed write the same bytes.
    """

    def __init__(self, file, rounds):
        self.file, self.rounds, self.done, self.start = Path(file), rounds, 0, time.monotonic()

    @distributed.once
    def write(self, round, values, spent=""):
        """values: {name: number} of the round; {NAME: {metric: number}} of an evaluation, with {NAME_error: {metric: standard
        error}} where errors are known. spent: words about time."""
        with writing(self.file), open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"round": round, **values}) + "\n")
        words = [f"{name} {value:.3g}" for name, value in values.items() if not isinstance(value, dict)]
        if round == 0:
            self.start = time.monotonic()  # the evaluation before the first round is none
        else:
            self.done += 1
            each = (time.monotonic() - self.start) / self.done
            spent += f"  {each:.2g} s/round  {datetime.timedelta(seconds=int(each * (self.rounds - round)))} left"
        print("  ".join([f"round {round}/{self.rounds}", *words, spent.strip()]), flush=True)
        for name, found in values.items():
            if isinstance(found, dict) and not name.endswith("_error"):
                errors = values.get(f"{name}_error", {})
                words = [f"{metric} {with_error(value, errors.get(metric), '.3g')}" for metric, value in found.items()]
                print("  ".join([f"  {name}", *words]), flush=True)


def rounds(args, done):
    """The rounds of a run behind those that are done: 0, which only evaluates and which --no-eval-first leaves out, then 1 …
    --rounds."""
    return range(max(done + 1, 0 if args.eval_first or args.rounds == 0 else 1), args.rounds + 1)


def evaluation_is_due(args, round):
    """Whether a round ends in an evaluation: round 0, every --eval-every rounds, and the last."""
    return round % args.eval_every == 0 or round == args.rounds


def scale(args, found):
    """Prints what β0 comes to. -> the unit of --beta-unit in units of the reward, and β0 in units of the reward

    found   the first evaluation, {name: Evaluation}: of the training prompts' it takes the reward's deviation within a group
    """
    deviation = found.get("eval_train", found["eval"]).values["reward_std"]
    if args.beta_unit == "reward":
        print(f"β0 = {args.beta0:g} in units of the reward, whose deviation within a group is {deviation:.3g}", flush=True)
        return 1.0, args.beta0
    if deviation == 0 and args.rounds > 0:
        raise InputError(
            "--beta-unit deviation: no two rewards of a group differ in the first evaluation; expected some, or reward"
        )
    beta0 = args.beta0 * deviation
    print(f"β0 = {args.beta0:g} deviations of the reward within a group = {beta0:.3g} in units of the reward", flush=True)
    return deviation, beta0


def note_scale(beta0, deviation):
    """Prints once what β0 is to be compared with where A is divided by the deviation of its own group."""
    print(f"β0 = {beta0:g} in deviations of the reward within a group, as A is; that deviation is {deviation:.3g}", flush=True)


def still_flat(flat, zero_spread, round, rounds):
    """Whether every group of every round so far had equal rewards; -> bool, with a warning in the tenth round."""
    flat = flat and zero_spread == 1
    if flat and round == min(10, rounds):
        print(
            f"warning: in {round} rounds no group's rewards differed; only the divergence acts. Is the reward right?",
            flush=True,
        )
    return flat


def print_table(columns):
    """The closing table. columns: {title: (the first evaluation, the last one)}, each ({metric: number}, {metric: its standard
    error, where it is known})."""
    print(" " * 18 + "   ".join(f"{title:40s}" for title in columns).rstrip())
    for metric in dict.fromkeys(metric for _, (last, _) in columns.values() for metric in last):
        cells = []
        for first, last in columns.values():
            shown = [
                with_error(values[metric], errors.get(metric)) if metric in values else "" for values, errors in (first, last)
            ]
            cells.append(shown[1] if first == last else f"{shown[0]:18s} -> {shown[1]}")
        print(f"{metric:18s}" + "   ".join(f"{cell:40s}" for cell in cells).rstrip())


def with_error(value, error=None, digits="8.4f"):
    """A number and its standard error, where it is known."""
    return f"{value:{digits}}" + ("" if error is None else f" ± {error:.2g}")
