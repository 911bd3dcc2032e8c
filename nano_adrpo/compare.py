"""Every method against every other, on equal terms: the same learning rates, seeds, rounds and evaluation for each.

    python -m nano_adrpo.compare flow          # the digits demo: all flow methods, on held-out prompts
    python -m nano_adrpo.compare steps         # the same, with many gradient steps on few images, and controls
    python -m nano_adrpo.compare grpo          # the arithmetic demo: GRPO and ADRPO-GRPO, and the clip of the paper's Table 3
    python -m nano_adrpo.compare deceptive     # arithmetic in which a guess pays a little: who escapes?
    python -m nano_adrpo.compare epochs        # arithmetic with many passes over few completions, and controls
    python -m nano_adrpo.compare epochs-deceptive                    # the same on the deceptive task
    python -m nano_adrpo.compare audio         # the audio demo: GRPO and the clips of the paper's Table 3
    python -m nano_adrpo.compare when          # when does an adaptive β help? Small experiments with controls, see when/

There are two stages. In the first every setting runs with seed 0 at every learning rate, the same ones for all; in the second
it runs with the other seeds at the rate of the best final accuracy, on the evaluation's prompts. Seed 0 has been chosen by what
it is then judged by, which flatters every setting a little, and all in the same way. A comparison of one rate has nothing to
choose.

A comparison that was interrupted goes on where it stopped, within its runs too. Each run is one of the training scripts, in a
process of its own, which ends with the comparison, and in a folder of its own. Written to --out: table.md (mean ± standard
error over seeds; mean_beta is the mean coefficient of the divergence, see `read`), results.json (every evaluated round, mean
over seeds), the trade-off pictures, reward against diversity and against divergence, and of language models progress.png,
reward and entropy over the rounds as in the paper's Figure 4.
"""

import itertools
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from nano_adrpo import demo, files, when
from nano_adrpo.errors import InputError, Parser, run_command
from nano_adrpo.evaluation import plots, progress, tables
from nano_adrpo.files.config import Index, fits, section
from nano_adrpo.training.checkpoint import sweep
from nano_adrpo.training.life import Life
from nano_adrpo.training.options import positive
from nano_adrpo.training.run import new_folder


@dataclass
class Comparison:
    script: str
    settings: dict  # name, whose first word is the method -> options of the script
    rounds: int
    seeds: int
    judge: str  # the metric by which a setting's learning rate is chosen
    across: tuple  # metrics on the pictures' horizontal axis, a picture each
    up: tuple  # on the vertical axis, a panel each
    rates: tuple = (None,)  # learning rates that every setting is run with; None is the script's own
    common: dict = field(default_factory=dict)
    columns: dict = None  # of table.md: {metric: its heading}; None: all metrics


def clipped(method, beta0, clip):
    """A setting of the flow whose advantages are clamped to ±clip, all in deviations of the reward within a group."""
    return {"method": method, "beta0": beta0, "a-min": -clip, "a-max": clip}


# (β0, clip). Theory knows where ADRPO ends if the clip is at most ±β0, not with a wide one (docs/theory.md). The last is the
# demo's.
CLIPS = {
    **{f"{b:g}, clip ±β0": (b, b) for b in (0.1, 0.3)},
    "0.03, clip ±8β0": (0.03, 0.24),
    "0.03, clip ±4": (0.03, 4),
}
FLOW = {  # the strengths of each method span weak to strong regularisation
    **{f"ADRPO β0={name}": clipped("adrpo", *values) for name, values in CLIPS.items()},
    **{f"fixed β={name}": clipped("fixed-beta", *values) for name, values in CLIPS.items()},
    "fixed β=0, clip ±4": clipped("fixed-beta", 0, 4),  # advantage weighting without divergence
    # τ per deviation of the reward; β has no unit, as it stands beside weights of mean 1. The last is the authors' τ and β, but
    # their weights exp(τR) are not normalised and their τ is per unit of their reward.
    **{f"ORW-CFM-W2 τ={t:g}, β={b:g}": {"method": "orw-cfm-w2", "tau": t, "beta0": b} for t, b in ((3, 0.3), (0.5, 1))},
    "DPO β=50": {"method": "dpo", "beta-dpo": 50},
    "DPO-offline β=50": {"method": "dpo-offline", "beta-dpo": 50},
    "RAFT": {"method": "raft"},
    # A tenth of the samples has β0, so that the mean of β is 0.03.
    "GARDO gate β0=0.3, clip ±4": {
        **clipped("gardo-gate", 0.3, 4), "reward": [*demo.FLOW["reward"], demo.FLOW["auxiliary"]],
    },
}  # fmt: skip
STEPS = {  # β0 − A of other samples, and β0 + A, tell what A does in β
    "ADRPO β0=0.3": clipped("adrpo", 0.3, 0.3),
    "fixed β=0.3": clipped("fixed-beta", 0.3, 0.3),
    "shuffled β0=0.3": clipped("shuffled", 0.3, 0.3),
    "anti β0=0.3": clipped("anti", 0.3, 0.3),
    "ORW-CFM-W2 τ=1, β=0.3": {"method": "orw-cfm-w2", "tau": 1, "beta0": 0.3},
}
GRPO = {  # ADRPO puts up to 2·β0 on a losing sample, so GRPO is run at β0 and at 2·β0
    **{f"GRPO β={b:g}": {"method": "grpo", "beta0": b} for b in (0.04, 0.08, 0.2, 0.4)},
    **{f"ADRPO β0={b:g}": {"method": "adrpo", "beta0": b} for b in (0.04, 0.2)},
    **{
        f"ADRPO β0=0.04, clip {k:g}×β0": {"method": "adrpo", "beta0": 0.04, "a-min": -0.04 * k, "a-max": 0.04 * k}
        for k in (0.5, 2)
    },
}
BY_ACCURACY = {f"FG-ExPO-like β0={b:g}": {"method": "accuracy-beta", "beta0": b} for b in (0.04, 0.2)}
GUESSES = {
    **{f"GRPO β={b:g}": {"method": "grpo", "beta0": b} for b in (0.04, 0.2, 0.4)},
    **{f"ADRPO β0={b:g}": {"method": "adrpo", "beta0": b} for b in (0.04, 0.2)},
}
EPOCHS = {  # passes over a round's completions, and the same controls
    f"{name}={b:g}, {epochs} epochs": {"method": method, "beta0": b, "inner-epochs": epochs}
    for epochs in (4, 16)
    for name, method, strengths in (
        ("GRPO β", "grpo", (0.04, 0.08, 0.2, 0.4)), ("ADRPO β0", "adrpo", (0.04, 0.2)),
        ("shuffled β0", "shuffled", (0.2,)), ("anti β0", "anti", (0.2,)),
    )
    for b in strengths
}  # fmt: skip
FEW = {"prompts-per-round": 4, "group-size": 8, "eval-samples": 2}
GUESSING = {"reward": demo.DECEPTIVE["reward"][0], "model": demo.DECEPTIVE["model"]}
AUDIO = {  # the paper's Table 3
    "GRPO β=0.04": {"method": "grpo", "beta0": 0.04},
    **{
        f"ADRPO β0=0.04, clip {k:g}×β0": {"method": "adrpo", "beta0": 0.04, "a-min": -0.04 * k, "a-max": 0.04 * k}
        for k in (0.5, 1, 2)
    },
}
EVALUATED = {"eval-every": 1, "eval-prompts": 32, "eval-samples": 4}
COLUMNS = {
    "reward": "reward", "joint": "joint", "clip_diversity": "CLIP diversity", "pixel_diversity": "pixel diversity", "w2": "W2",
    "frechet": "Fréchet", "mean_beta": "mean β",
}  # fmt: skip
COMPARISONS = {
    "flow": Comparison(
        "train_flow", FLOW, 12, 3, "joint", ("clip_diversity", "pixel_diversity", "w2"), ("reward", "joint"),
        rates=(2e-4, 6e-4, 2e-3), common=EVALUATED, columns=COLUMNS,
    ),
    "steps": Comparison(
        "train_flow", STEPS, 6, 3, "joint", ("clip_diversity", "pixel_diversity", "w2"), ("reward", "joint"),
        rates=(6e-4, 2e-3), common={"prompts-per-round": 4, "inner-steps": 64, **EVALUATED}, columns=COLUMNS,
    ),
    "grpo": Comparison(
        "train_grpo", GRPO | BY_ACCURACY, 110, 3, "pass@1", ("entropy", "style_entropy", "kl_k1"), ("reward",)
    ),
    "deceptive": Comparison(
        "train_grpo", GUESSES, 150, 5, "pass@1", ("entropy", "kl_k1"), ("reward", "pass@1"),
        common={**GUESSING, "eval-every": 30},
    ),
    "epochs": Comparison(
        "train_grpo", EPOCHS, 12, 3, "pass@1", ("style_entropy", "kl_k1"), ("reward",), common={**FEW, "eval-every": 3},
    ),
    "epochs-deceptive": Comparison(
        "train_grpo", EPOCHS, 12, 3, "pass@1", ("entropy", "kl_k1"), ("reward", "pass@1"),
        common={**FEW, **GUESSING, "eval-every": 3},
    ),
    "audio": Comparison(
        "train_grpo", AUDIO, 40, 3, "pass@1", ("entropy", "way_entropy", "kl_k1"), ("reward", "pass@1"),
        common={"demo": "audio"},
    ),
}  # fmt: skip


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=(*COMPARISONS, "when"), help="which comparison")
    add("--out", help="folder for runs and results, where an earlier one goes on; default runs/compare_WHAT")
    add("--seeds", type=positive(int), help="seeds per setting, from 0; default the comparison's own")
    add("--rounds", type=positive(int), help="rounds per run; default the comparison's own")
    add("--workers", type=positive(int), default=os.cpu_count(), help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    out = Path(args.out or f"runs/compare_{args.what}")
    if args.what == "when":
        if args.seeds or args.rounds or args.workers != os.cpu_count():
            raise InputError("--seeds, --rounds and --workers: expected only with comparisons of training runs")
        return when.compare(new_folder(out))
    comparison = COMPARISONS[args.what]
    claim(out, args.what)
    seeds, rounds = args.seeds or comparison.seeds, args.rounds or comparison.rounds

    def options(name, lr, seed):
        rate = {"lr": lr} if lr else {}
        return {**comparison.settings[name], **rate, "seed": seed, "rounds": rounds, **comparison.common}

    def run(pairs, seeds):
        """Runs settings, by name, at learning rates with seeds. -> their rows, of the means over the seeds"""
        # The seeds are outermost: an interrupted comparison has every setting at fewer seeds.
        jobs = {(name, lr, seed): options(name, lr, seed) for seed in seeds for name, lr in pairs}
        results = train_all(comparison.script, jobs, out, args.workers)
        return [row_of(name, lr, [results[name, lr, seed] for seed in seeds]) for name, lr in pairs]

    with Life() as life:
        life.lock(out, ".lock")
        sweep(out)
        every = run([*itertools.product(comparison.settings, comparison.rates)], range(1))
        rows = run([(row["setting"], row["lr"]) for row in best_rates(every, comparison.judge)], range(seeds))
    results = {"rounds": rounds, "seeds": seeds, "rows": tables.as_json(rows)}
    text = f"{rounds} rounds, {seeds} seeds, mean ± standard error.\n\n"
    if len(every) > len(rows):
        results["every_rate"] = tables.as_json(every)
        text += f"Every setting at its best learning rate, by {comparison.judge} with seed 0:\n\n"
    text += tables.table(rows, "base model", comparison.columns)
    if len(every) > len(rows):
        text += f"\nEvery learning rate, seed 0:\n\n{tables.table(every, 'base model', comparison.columns)}"
    if comparison.script == "train_grpo":  # the paper's Figure 4
        pairs = [(row["setting"], row["lr"]) for row in rows]
        runs = {pair[0]: [folder(out, options(*pair, seed)) / "metrics.jsonl" for seed in range(seeds)] for pair in pairs}
        text += f"\nWhile training, mean over each fifth of the rounds:\n\n{progress.table(runs)}"
        progress.picture(out / "progress.png", runs)
    files.write_json(out / "results.json", results)
    files.write_bytes(out / "table.md", text.encode())
    for x in comparison.across:
        plots.pictures(rows, x, comparison.up, out / f"reward_{x}.png")
    print(text)


def claim(out, what):
    """Makes the folder of a comparison, or refuses one that is another's."""
    mark, kind = out / "config.json", {"compare": what}
    if not mark.is_file():
        new_folder(out)
        files.write_json(mark, kind)
    if files.read_json(mark) != kind:
        raise InputError(f"--out {out}: holds something else; expected a new or empty folder, or one of compare {what}")


def row_of(name, lr, runs):
    """The evaluations of a setting's runs at one learning rate -> its row: at every evaluated round the mean over the runs."""
    return tables.row(name, lr, [[[evaluation] for evaluation in evaluations] for evaluations in zip(*runs)])


def train_all(script, jobs, out, workers):
    """{job: options} -> {job: [evaluations]}, each a metrics dict with its round."""
    start, done = time.monotonic(), []
    missing = [job for job in jobs if read(out, jobs[job]) is None]
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them finished before", flush=True)

    def work(job):
        train(script, out, jobs[job])
        done.append(job)
        left = (time.monotonic() - start) / len(done) * (len(missing) - len(done)) / 60
        name, lr, seed = job
        rate = f"lr {lr:g}, " if lr else ""
        print(f"{len(done)}/{len(missing)}  {name}, {rate}seed {seed}  {left:.0f} min left", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, missing))
    return {job: read(out, options) for job, options in jobs.items()}


def folder(out, options):
    """The run's folder, named by its options: a run of other options is another run."""

    def short(value):
        if isinstance(value, list):
            return "+".join(map(short, value))
        return f"{value:g}" if isinstance(value, float | int) else Path(value).name

    return out / "runs" / "_".join(f"{name}={short(value)}" for name, value in options.items()).replace(":", ".")


def words(options):
    """Options as they stand on a command line, of which one may have a list of values."""
    pairs = [(name, value if isinstance(value, list) else [value]) for name, value in options.items()]
    return [word for name, values in pairs for word in (f"--{name}", *map(str, values))]


def train(script, out, options):
    """One training run in its own process. It works in a folder that is renamed when it is whole; one that was interrupted goes
    on there."""
    final = folder(out, options)
    working = final.with_name(f"{final.name}.part")
    command = [script, "--resume", "--out", str(working.absolute()), *words(options)]
    place = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "cwd": Path(__file__).parents[1]}  # where the script is found
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WORKER, *command], **pipes, **place) as process:
        lines = process.stderr.read().strip().splitlines()
    if process.returncode:
        raise InputError(f"{' '.join(command)}: exit status {process.returncode}: {lines[-1] if lines else 'no message'}")
    working.rename(final)
    shutil.rmtree(final / "checkpoints")  # a run that is finished needs them no more


# A training script that ends with the process that started it, however that ends: its standard input is then closed.
WORKER = """
import os, runpy, sys, threading
threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def read(out, options):
    """A finished run's evaluations, or None. The last one has "mean_beta", too: of all samples of all rounds the mean of the
    coefficient of the divergence, which the clamp of A moves away from β0. DPO has none.

    Raises InputError for a run that is there and has not all of its rounds."""
    file, found, betas = folder(out, options) / "metrics.jsonl", [], []
    if not file.parent.exists():
        return None
    for number, line in files.read_json_lines(file):
        values = section(line, "eval", where := f"{file}, line {number}")
        betas += [line["beta_mean"]] if "beta_mean" in line and not options["method"].startswith("dpo") else []
        if not fits(line.get("round"), Index) or not all(map(tables.is_number, [*values.values(), *betas[-1:]])):
            raise InputError(f"{where}: expected a round and, of an evaluation, numbers")
        found += [{"round": line["round"], **values}] if values else []
    if not found or found[-1]["round"] != options["rounds"]:
        rounds = f"expected the evaluation of round {options['rounds']}"
        raise InputError(f"{file}: is not that of a whole run; {rounds}. Without its folder the comparison runs it again")
    found[-1] |= {"mean_beta": sum(betas) / len(betas)} if betas else {}
    return found


def best_rates(rows, judge):
    """Of each setting the row of the learning rate with the best final `judge`."""
    settings = dict.fromkeys(row["setting"] for row in rows)
    return [max((row for row in rows if row["setting"] == name), key=lambda row: row["final"][judge][0]) for name in settings]


if __name__ == "__main__":
    run_command(main)
