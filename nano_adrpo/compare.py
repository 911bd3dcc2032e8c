"""Every method against every other, on equal terms: the same learning rates, seeds, rounds and evaluation for each.

    python -m nano_adrpo.compare flow          # the digits demo: all flow methods, on held-out prompts
    python -m nano_adrpo.compare grpo          # the arithmetic demo: GRPO and ADRPO-GRPO, and the clip of the paper's Table 3
    python -m nano_adrpo.compare deceptive     # arithmetic in which a guess pays a little: who escapes?
    python -m nano_adrpo.compare audio         # the audio demo: GRPO and the clips of the paper's Table 3
    python -m nano_adrpo.compare when          # when does an adaptive β help? Small experiments with controls, see when/

A comparison that was interrupted goes on where it stopped, within its runs too. Each run is one of the training scripts, in a
process of its own, which ends with the comparison, and in a folder of its own. Written to --out: table.md (mean ± standard
error over seeds), results.json (every evaluated round, mean over seeds) and the trade-off pictures, reward against diversity
and against divergence.
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

from nano_adrpo import files, when
from nano_adrpo.demo import DECEPTIVE
from nano_adrpo.errors import InputError, Parser, run_command
from nano_adrpo.evaluation import plots, tables
from nano_adrpo.files.config import Index, fits, section
from nano_adrpo.training.life import Life
from nano_adrpo.training.options import positive
from nano_adrpo.training.run import make_folder, new_folder


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


FLOW = {  # the strengths of each method span weak to strong regularisation, in deviations of the reward within a group
    **{f"ADRPO β0={b:g}": {"method": "adrpo", "beta0": b} for b in (0.03, 0.1, 0.3)},
    **{f"ADRPO β0={b:g}, clip ±β0": {"method": "adrpo", "beta0": b, "a-min": -b, "a-max": b} for b in (0.1, 0.3)},
    **{f"fixed β={b:g}": {"method": "fixed-beta", "beta0": b} for b in (0.03, 0.1, 0.3)},
    **{f"fixed β={b:g}, clip ±β0": {"method": "fixed-beta", "beta0": b, "a-min": -b, "a-max": b} for b in (0.1, 0.3)},
    **{f"ORW-CFM-W2 τ={t:g}, β={b:g}": {"method": "orw-cfm-w2", "tau": t, "beta0": b} for t, b in ((1, 0.3), (3, 0.3), (3, 1))},
    **{f"DPO β={b:g}": {"method": "dpo", "beta-dpo": b} for b in (20, 50, 200)},
    "RAFT": {"method": "raft"},
}
GRPO = {  # ADRPO puts up to 2·β0 on a losing sample, so GRPO is run at β0 and at 2·β0
    **{f"GRPO β={b:g}": {"method": "grpo", "beta0": b} for b in (0.04, 0.08, 0.2, 0.4)},
    **{f"ADRPO β0={b:g}": {"method": "adrpo", "beta0": b} for b in (0.04, 0.2)},
    **{
        f"ADRPO β0=0.04, clip {k:g}×β0": {"method": "adrpo", "beta0": 0.04, "a-min": -0.04 * k, "a-max": 0.04 * k}
        for k in (0.5, 2)
    },
}
GUESSES = {
    **{f"GRPO β={b:g}": {"method": "grpo", "beta0": b} for b in (0.04, 0.2, 0.4)},
    **{f"ADRPO β0={b:g}": {"method": "adrpo", "beta0": b} for b in (0.04, 0.2)},
}
AUDIO = {  # the paper's Table 3
    "GRPO β=0.04": {"method": "grpo", "beta0": 0.04},
    **{
        f"ADRPO β0=0.04, clip {k:g}×β0": {"method": "adrpo", "beta0": 0.04, "a-min": -0.04 * k, "a-max": 0.04 * k}
        for k in (0.5, 1, 2)
    },
}
COMPARISONS = {
    "flow": Comparison(
        "train_flow", FLOW, 40, 3, "joint", ("pixel_diversity", "w2"), ("reward", "joint"),
        rates=(1e-4, 3e-4, 1e-3), common={"eval-every": 10},
    ),
    "grpo": Comparison("train_grpo", GRPO, 110, 3, "pass@1", ("entropy", "style_entropy", "kl_k1"), ("reward",)),
    "deceptive": Comparison(
        "train_grpo", GUESSES, 150, 5, "pass@1", ("entropy", "kl_k1"), ("reward", "pass@1"),
        common={"reward": DECEPTIVE["reward"][0], "model": DECEPTIVE["model"], "eval-every": 30},
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
    make_folder(out, out)
    seeds, rounds = args.seeds or comparison.seeds, args.rounds or comparison.rounds
    jobs = {
        (name, lr, seed): {**options, **({"lr": lr} if lr else {}), "seed": seed, "rounds": rounds, **comparison.common}
        for seed in range(seeds)  # outermost: an interrupted comparison has every setting at fewer seeds
        for (name, options), lr in itertools.product(comparison.settings.items(), comparison.rates)
    }
    with Life() as life:
        life.lock(out, ".lock")
        results = train_all(comparison.script, jobs, out, args.workers)
    rows = [row_of(results, name, lr, seeds) for name, lr in dict.fromkeys((name, lr) for name, lr, _ in jobs)]
    chosen = best_rates(rows, comparison.judge)
    files.write_json(out / "results.json", {"rounds": rounds, "seeds": seeds, "rows": tables.as_json(rows)})
    text, table = f"{rounds} rounds, {seeds} seeds, mean ± standard error.\n\n", tables.table(rows, "base model")
    if len(chosen) < len(rows):
        best = f"Every setting at its best learning rate, by {comparison.judge}:\n\n{tables.table(chosen, 'base model')}"
        text += f"{best}\nEvery learning rate:\n\n"
    files.write_bytes(out / "table.md", (text + table).encode())
    for x in comparison.across:
        plots.pictures(chosen, x, comparison.up, out / f"reward_{x}.png")
    print(text + table)


def row_of(results, name, lr, seeds):
    """A setting at one learning rate -> its row: at every evaluated round the mean over the seeds."""
    runs = [results[name, lr, seed] for seed in range(seeds)]
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
    values = (f"{value:g}" if isinstance(value, float | int) else Path(value).name for value in options.values())
    return out / "runs" / "_".join(f"{name}={value}" for name, value in zip(options, values)).replace(":", ".")


def train(script, out, options):
    """One training run in its own process. It works in a folder that is renamed when it is whole; one that was interrupted goes
    on there."""
    final = folder(out, options)
    working = final.with_name(f"{final.name}.part")
    words = [script, "--resume", "--out", str(working.absolute())]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    place = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "cwd": Path(__file__).parents[1]}  # where the script is found
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WORKER, *words], **pipes, **place) as process:
        lines = process.stderr.read().strip().splitlines()
    if process.returncode:
        raise InputError(f"{' '.join(words)}: exit status {process.returncode}: {lines[-1] if lines else 'no message'}")
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
    """A finished run's evaluations, or None. Raises InputError for one that is there and has not all of its rounds."""
    file, found = folder(out, options) / "metrics.jsonl", []
    if not file.parent.exists():
        return None
    for number, line in files.read_json_lines(file):
        values = section(line, "eval", where := f"{file}, line {number}")
        if not fits(line.get("round"), Index) or not all(map(tables.is_number, values.values())):
            raise InputError(f"{where}: expected a round and, of an evaluation, numbers")
        found += [{"round": line["round"], **values}] if values else []
    if not found or found[-1]["round"] != options["rounds"]:
        rounds = f"expected the evaluation of round {options['rounds']}"
        raise InputError(f"{file}: is not that of a whole run; {rounds}. Without its folder the comparison runs it again")
    return found


def best_rates(rows, judge):
    """Of each setting the row of the learning rate with the best final `judge`."""
    settings = dict.fromkeys(row["setting"] for row in rows)
    return [max((row for row in rows if row["setting"] == name), key=lambda row: row["final"][judge][0]) for name in settings]


if __name__ == "__main__":
    run_command(main)
