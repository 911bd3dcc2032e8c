"""The paper's Tables 2 and 3: who answers how many of MMAU's questions about sounds right.

    python -m nano_adrpo.evaluate_mmau --systems base=OMNI adrpo=OMNI+runs/adrpo/adapter gemini=gemini.json \\
        --questions mmau-test-mini.json --device cuda --dtype bfloat16 --batch 16 --out runs/table2
    python -m nano_adrpo.evaluate_mmau --systems base=OMNI --runs runs/grpo runs/adrpo runs/adrpo-half runs/adrpo-double \\
        --questions mmau-test-mini.json --device cuda --dtype bfloat16 --batch 16 --out runs/table3
    python -m nano_adrpo.evaluate_mmau --systems base=nano_adrpo/demo/sounds_base --runs runs/audio-0 runs/audio-1

A system is NAME=MODEL or NAME=MODEL+ADAPTER, which answers here, greedily, or NAME=FILE.json with what any other system said: a
JSON list, or JSON lines, of objects with "id" and "model_output" or "model_prediction". A name given again is another training
run. A run is a folder of train_grpo.py; the runs of one method, β0 and range of the advantage are one row of Table 3, the mean
over their seeds. Without --questions they are those of the audio demo.

Written to --out: table.md, results.json, and predictions/ in the form that MMAU's own evaluation.py reads. An evaluation that
was interrupted goes on: a model that has answered is not asked again, so one that changed on disk needs another --out.
"""

from pathlib import Path

from nano_adrpo import demo, files, lora
from nano_adrpo.demo import sounds
from nano_adrpo.errors import InputError, Parser, about, run_command
from nano_adrpo.evaluation import mmau, mmau_tables
from nano_adrpo.evaluation.entries import Entry, Results, entries
from nano_adrpo.files import wav
from nano_adrpo.language.audio import AudioCodec
from nano_adrpo.language.rollout import roll_out
from nano_adrpo.models.omni import Omni
from nano_adrpo.rewards import choices
from nano_adrpo.rewards.text import Problem
from nano_adrpo.training import options
from nano_adrpo.training.options import DTYPES, positive
from nano_adrpo.training.run import new_folder

ASKED = ("prompt_form", "system", "chat_template", "thinking", "stop")  # in which a run and this command must be alike
# In which runs of one row may differ, as in how they are evaluated; the range of the advantage is part of the row's name.
FREE = {
    "seed", "device", "micro_batch", "fsdp", "embeddings", "resume", "checkpoint_every", "keep_checkpoints", "a_min", "a_max",
}  # fmt: skip


def parse(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument_group("what").add_argument
    add("--systems", nargs="+", default=[], help="NAME=MODEL, MODEL+ADAPTER or FILE.json of predictions")
    add("--runs", nargs="+", default=[], metavar="FOLDER", help="of train_grpo.py: the rows of Table 3")
    add("--questions", metavar="FILE", help="in the form of mmau-test-mini.json; default the demo's held-out ones")
    add = parser.add_argument_group("answers").add_argument
    add("--audio-folder", help="where the sounds are; default beside the file that names them")
    add("--embeddings", help="folder that keeps the sounds' embeddings; default QUESTIONS.embeddings; none: the memory")
    form = "how to answer, see nano_adrpo/rewards/choices.py; default that of --runs, else the demo's or answer"
    add("--prompt-form", choices=tuple(choices.FORMS), help=form)
    options.chat(add)
    add("--max-new-tokens", type=positive(int), help="tokens of a completion, its end included; default 256, or the demo's")
    add("--max-prompt-tokens", type=positive(int), default=8192, help="a longer prompt is refused; 25 a second of audio")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/mmau", help="folder for the results, where an earlier evaluation goes on")
    add("--batch", type=positive(int), default=8, help="questions at a time")
    add("--device", type=options.device, default="cpu", help="torch device")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of weights and computation")
    args = parser.parse_args(argv)
    if not args.systems and not args.runs:
        raise InputError("--systems and --runs: expected one of them, or both")
    return args


class Run:
    """A folder of train_grpo.py, one of the training runs of a setting."""

    def __init__(self, folder):
        self.folder, self.config = Path(folder), files.read_json(Path(folder) / "config.json")
        method, self.seed = self.config.get("method"), self.config.get("seed")
        beta0, low, high = (self.config.get(name) for name in ("beta0", "a_min", "a_max"))
        numbers = beta0, low if low is not None else 0, high if high is not None else 0, self.seed
        if method not in ("adrpo", "grpo") or not all(type(number) in (int, float) for number in numbers):
            raise InputError(f"--runs {folder}: config.json is no run of train_grpo.py's; expected method, beta0 and seed")
        low, high = -beta0 if low is None else low, beta0 if high is None else high
        self.clip = high / beta0 if method == "adrpo" and beta0 and low == -high else None
        name = "ADRPO" if self.clip is None else f"ADRPO {self.clip:.3g}×β0"
        self.setting = f"GRPO β={beta0:g}" if method == "grpo" else f"{name} [{low + 0:g}, {high:g}]".replace("-", "−")

    def entry(self):
        """The Entry of what it ended with. Its number is the seed."""
        metrics = self.folder / "metrics.jsonl"
        done, rounds = [row.get("round") for _, row in files.read_json_lines(metrics)][-1:], self.config.get("rounds")
        if done != [rounds]:
            raise InputError(f"{metrics}: ends with round {done[0] if done else 'none'}; expected a finished run, of {rounds}")
        adapter, model = self.folder / "adapter", self.folder / "model"
        if adapter.is_dir():
            base = self.config.get("model")
            if not Path(str(base)).exists():
                raise InputError(f"--runs {self.folder}: its model {base!r} is not there, seen from the current folder")
            return Entry(self.setting, None, f"{base}+{adapter}", base, str(adapter), self.seed)
        if not model.is_dir():
            raise InputError(f"--runs {self.folder}: neither adapter/ nor model/ in it; expected a run with a checkpoint")
        return Entry(self.setting, None, str(model), str(model), None, self.seed)


def read_runs(args):
    """--runs -> {setting: [Run]}. Raises InputError where the runs of one setting differ in more than their seeds, or where
    training asked in another way than this evaluation."""
    found = {}
    for run in map(Run, args.runs):
        for name in ASKED:
            trained, here = run.config.get(name) or None, getattr(args, name) or None
            if trained != here:
                trained = f"--{name.replace('_', '-')} {trained!r}"
                raise InputError(f"--runs {run.folder}: was trained with {trained}; expected that here, not {here!r}")
        for other in found.setdefault(run.setting, []):
            names = (run.config.keys() | other.config.keys()) - FREE
            differ = sorted(name for name in names if run.config.get(name) != other.config.get(name) and name[:5] != "eval_")
            if differ or run.seed == other.seed:
                what = f"other --{differ[0].replace('_', '-')}" if differ else f"equal --seed {run.seed}"
                raise InputError(f"--runs {other.folder} and {run.folder}: one setting with {what}; expected other seeds alone")
        found[run.setting].append(run)
    return found


def open_questions(args):
    """-> [mmau.Question], with a word on the console where "(A) " was removed. Fills in the options whose default depends on
    whose questions they are."""
    usual = {"prompt_form": "answer", "max_new_tokens": 256} if args.questions else demo.AUDIO["options"]
    args.embeddings = args.embeddings or (f"{args.questions}.embeddings" if args.questions else "none")
    args.questions = args.questions or demo.AUDIO["held_out"]
    args.max_new_tokens = args.max_new_tokens or usual["max_new_tokens"]
    if not args.prompt_form:
        args.prompt_form = next((Run(folder).config.get("prompt_form") for folder in args.runs), None) or usual["prompt_form"]
    questions, lettered = mmau.read_questions(args.questions)
    if lettered:
        print(f'{args.questions}: "(A) ", "(B) ", … removed from choices and answers, in {lettered} questions', flush=True)
    return questions


def open_systems(args):
    """-> [Entry], and {title of a row: the clip of its runs in units of β0}"""
    systems, runs = entries(args.systems, "--systems"), read_runs(args)
    for entry in systems:
        if entry.name in runs:
            raise InputError(f"--systems {entry.what}: the name {entry.name!r} is that of --runs; expected another")
    clips = {setting: some[0].clip for setting, some in runs.items()}
    return systems + [run.entry() for some in runs.values() for run in some], clips


def is_file(entry):
    """Whether an entry is a file of predictions, not a model."""
    return Path(entry.model).is_file()


def as_problems(args, questions):
    """The questions as the models get them. Raises InputError for a sound that is not there or does not fit."""
    beside = sounds.written()[1] if args.questions == demo.AUDIO["held_out"] else args.questions
    problems = []
    for each in questions:
        with about(f"{args.questions}: question {each.id!r}"):
            sound = str(mmau.audio_file(each, args.audio_folder or Path(beside).parent))
            wav.samples(sound)
        text = choices.ask(each.question, each.choices, args.prompt_form)
        problems.append(Problem(text, each.answer, choices=tuple(each.choices), audio=sound))
    return problems


def open_model(args, entry, problems, device):
    """-> the model of an entry, and its codec. Raises InputError for what does not fit, too long prompts included."""
    with about(f"{entry.title}: {entry.what}"):
        model = Omni.from_pretrained(entry.model, DTYPES[args.dtype], device)
        folder = None if args.embeddings == "none" else args.embeddings
        codec = AudioCodec(model, args.system, args.chat_template, args.thinking, args.stop, embeddings=folder)
        if entry.adapter:
            lora.load(model, entry.adapter)
        ids, _ = codec.encode([problem.prompt for problem in problems], args.max_prompt_tokens)
        if (tokens := ids.shape[1] + args.max_new_tokens) > model.config.positions:
            raise InputError(f"a prompt and its answer have {tokens} tokens; the model has {model.config.positions} positions")
    return model.requires_grad_(False), codec


def answers(args, entry, problems):
    """The greedy completions of a model."""
    (model, codec), texts = open_model(args, entry, problems, args.device), []
    for start in range(0, len(problems), args.batch):
        some = problems[start : start + args.batch]
        texts += roll_out(model, codec, some, args.max_new_tokens, args.max_prompt_tokens, temperature=0).texts
        print(f"{entry.title} run {entry.run}: {len(texts)}/{len(problems)} questions", flush=True)
    return texts


def predictions(args, entry, questions):
    """What the file of an entry says to the questions, with a word on the console where it answers other ones."""
    with about(f"--systems {entry.title}"):
        said, others = mmau.read_predictions(entry.model, questions)
    if others:
        print(
            f"{entry.model}: {others} rows with another right answer than in {args.questions}; is it of the same version?",
            flush=True,
        )
    return said


def open_results(args, found, questions):
    """-> the Results of the entries in --out."""
    if not (Path(args.out) / "config.json").is_file():
        new_folder(args.out)
    results = Results(args.out, found, relative=False)
    free = ("systems", "runs", "audio_folder", "embeddings", "out", "batch", "device")  # may differ from call to call
    asked = {"questions": [question.row for question in questions]}
    results.open({name: value for name, value in vars(args).items() if name not in free} | asked)
    (results.out / "predictions").mkdir(exist_ok=True)
    return results


def main(argv=None):
    args = parse(argv)
    questions = open_questions(args)
    found, clips = open_systems(args)
    said = {entry: predictions(args, entry, questions) for entry in found if is_file(entry)}
    models = [entry for entry in found if entry not in said]
    problems = as_problems(args, questions) if models else []
    for entry in models:
        open_model(args, entry, problems, "meta")  # what does not fit is told before long work
    results = open_results(args, found, questions)

    rows = {}  # title of a row -> of each run what it said
    for entry in found:
        completions = None
        if entry in models:
            measured = results.measured(entry, 0, lambda entry, _: {"completions": answers(args, entry, problems)})
            said[entry] = completions = measured["completions"]
        rows.setdefault(entry.title, []).append(said[entry])
        file = results.out / "predictions" / f"{entry.title}.{entry.run}.json"
        files.write_json(file, mmau.with_predictions(questions, said[entry], completions))

    systems = []
    for title, runs in rows.items():
        right, answered = [mmau.verdicts(questions, run) for run in runs], [len(run) - run.count(None) for run in runs]
        systems.append(mmau_tables.System(title, right, answered, clips.get(title), title in clips))
    pairs = mmau_tables.differences(systems)
    text = mmau_tables.report(systems, pairs, questions, Path(args.questions).name)
    files.write_json(results.out / "results.json", {"systems": mmau_tables.as_json(systems, questions), "differences": pairs})
    files.write_bytes(results.out / "table.md", text.encode())
    print(text)
    return systems


if __name__ == "__main__":
    run_command(main)
