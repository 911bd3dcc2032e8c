"""Every method against every other, on equal terms: the same learning rates, seeds, rounds and evaluation for each.

    python -m nano_adrpo.compare flow          # the digits demo: all flow methods; about an hour on two cores
    python -m nano_adrpo.compare grpo          # the arithmetic demo: GRPO and ADRPO-GRPO, and the clip of the paper's Table 3
    python -m nano_adrpo.compare deceptive     # arithmetic in which a guess pays a little: who escapes?

A comparison that was interrupted goes on where it stopped. Each run is one of the training scripts, in a process and a folder
of its own. Written to --out: table.md (mean ± standard error over seeds), results.json (every evaluated round, mean over seeds)
and the trade-off pictures, reward against diversity and against divergence.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from nano_adrpo import plots, runtime, weights
from nano_adrpo.demo import arithmetic
from nano_adrpo.metrics import mean_and_standard_error


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


FLOW = {  # the strengths of each method span weak to strong regularisation
    **{f"ADRPO β0={b:g}": {"method": "adrpo", "beta0": b} for b in (1, 2, 5)},
    **{f"ADRPO β0={b:g}, clip ±β0": {"method": "adrpo", "beta0": b, "a-min": -b, "a-max": b} for b in (1, 5)},
    **{f"fixed β={b:g}": {"method": "fixed-beta", "beta0": b} for b in (1, 2, 5)},
    **{
        f"ORW-CFM-W2 τ={t:g}, β={b:g}": {"method": "orw-cfm-w2", "tau": t, "beta0": b}
        for t, b in ((0.1, 0.3), (0.3, 0.3), (0.3, 1))
    },
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
DECEPTIVE = {
    **{f"GRPO β={b:g}": {"method": "grpo", "beta0": b} for b in (0.04, 0.2, 0.4)},
    **{f"ADRPO β0={b:g}": {"method": "adrpo", "beta0": b} for b in (0.04, 0.2)},
}
COMPARISONS = {
    "flow": Comparison(
        "train_flow", FLOW, 40, 3, "joint", ("pixel_diversity", "w2"), ("reward", "joint"),
        rates=(1e-4, 3e-4, 1e-3), common={"eval-every": 10},
    ),
    "grpo": Comparison("train_grpo", GRPO, 110, 3, "pass@1", ("entropy", "style_entropy", "kl_k1"), ("reward",)),
    "deceptive": Comparison(
        "train_grpo", DECEPTIVE, 150, 5, "pass@1", ("entropy", "kl_k1"), ("reward", "pass@1"),
        common={"reward": "deceptive", "model": str(arithmetic.HERE / "arithmetic_deceptive"), "eval-every": 30},
    ),
}  # fmt: skip


def main(argv=None):
    parser = runtime.Parser(__doc__.split("\n")[0])
    parser.add_argument("what", choices=tuple(COMPARISONS), help="which comparison")
    parser.add_argument("--out", help="folder for runs and results, where an earlier one goes on; default runs/compare_WHAT")
    parser.add_argument("--seeds", type=runtime.positive(int), help="seeds per setting, from 0; default the comparison's own")
    parser.add_argument("--rounds", type=runtime.positive(int), help="rounds per run; default the comparison's own")
    parser.add_argument("--workers", type=runtime.positive(int), default=os.cpu_count(), help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    comparison = COMPARISONS[args.what]
    out, seeds, rounds = (
        Path(args.out or f"runs/compare_{args.what}"),
        args.seeds or comparison.seeds,
        args.rounds or comparison.rounds,
    )
    jobs = {
        (name, lr, seed): {**options, **({"lr": lr} if lr else {}), "seed": seed, "rounds": rounds, **comparison.common}
        for seed in range(seeds)  # outermost: an interrupted comparison has every setting at fewer seeds
        for (name, options), lr in itertools.product(comparison.settings.items(), comparison.rates)
    }
    rows = summarise(run_all(comparison.script, jobs, out, args.workers), seeds)
    chosen = best_rates(rows, comparison.judge)
    weights.write_json(out / "results.json", {"rounds": rounds, "seeds": seeds, "rows": as_json(rows)})
    text = f"{rounds} rounds, {seeds} seeds, mean ± standard error.\n\n"
    if len(chosen) < len(rows):
        text += f"Every setting at its best learning rate, by {comparison.judge}:\n\n{table(chosen)}\nEvery learning rate:\n\n"
    (out / "table.md").write_text(text + table(rows), encoding="utf-8")
    for x in comparison.across:
        pictures(chosen, x, comparison.up, out / f"reward_{x}.png")
    print((out / "table.md").read_text(encoding="utf-8"))


def run_all(script, jobs, out, workers):
    """{job: options} -> {job: [evaluations]}, each a metrics dict with its round."""
    start, done = time.monotonic(), []
    missing = [job for job in jobs if read(out, jobs[job]) is None]
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them finished before", flush=True)

    def work(job):
        run(script, out, jobs[job])
        done.append(job)
        left = (time.monotonic() - start) / len(done) * (len(missing) - len(done))
        name, lr, seed = job
        print(
            f"{len(done)}/{len(missing)}  {name}, {f'lr {lr:g}, ' if lr else ''}seed {seed}  {left / 60:.0f} min left",
            flush=True,
        )

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, missing))
    return {job: read(out, options) for job, options in jobs.items()}


def folder(out, options):
    """The run's folder, named by its options: a run of other options is another run."""
    values = (f"{value:g}" if isinstance(value, float | int) else Path(value).name for value in options.values())
    return out / "runs" / "_".join(f"{name}={value}" for name, value in zip(options, values))


def run(script, out, options):
    """One training run in its own process. It works in a folder that is renamed when it is whole."""
    final = folder(out, options)
    working = final.with_name(f"{final.name}.{os.getpid()}.part")
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", script, "--out", str(working.absolute()), *words]  # the script runs where it is found
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if finished.returncode:
        lines = finished.stderr.strip().splitlines()
        raise ValueError(f"{' '.join(command)}: exit status {finished.returncode}: {lines[-1] if lines else 'no message'}")
    working.rename(final)


def read(out, options):
    """A finished run's evaluations, or None."""
    file = folder(out, options) / "metrics.jsonl"
    if not file.is_file():
        return None
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{"round": line["round"], **line["eval"]} for line in lines if "eval" in line]


def summarise(results, seeds):
    """A row per setting and learning rate: means over the seeds at every evaluated round, errors at the last."""
    rows = []
    for name, lr in dict.fromkeys((name, lr) for name, lr, _ in results):
        runs = [results[name, lr, seed] for seed in range(seeds)]
        path = [
            {metric: mean_and_standard_error([point[metric] for point in points])[0] for metric in points[0]}
            for points in zip(*runs)
        ]
        final = {
            metric: mean_and_standard_error([run[-1][metric] for run in runs]) for metric in runs[0][-1] if metric != "round"
        }
        rows.append({"setting": name, "lr": lr, "final": final, "path": path})
    return rows


def as_json(rows):
    """The rows with null for an error that is not a number, which JSON does not have."""

    def value(mean, error):
        return mean, None if math.isnan(error) else error

    return [row | {"final": {metric: value(*row["final"][metric]) for metric in row["final"]}} for row in rows]


def best_rates(rows, judge):
    """Of each setting the row of the learning rate with the best final `judge`."""
    settings = dict.fromkeys(row["setting"] for row in rows)
    return [max((row for row in rows if row["setting"] == name), key=lambda row: row["final"][judge][0]) for name in settings]


def table(rows, start="base"):
    """Markdown: what all rows start from, under the name `start` (None: without), then a line per row."""
    metrics, rates = list(rows[0]["final"]), rows[0]["lr"] is not None
    lines = ["| setting | " + "lr | " * rates + " | ".join(metrics) + " |", "| --- " * (len(metrics) + 1 + rates) + "|"]
    if start:
        cells = [f"{rows[0]['path'][0][metric]:.3g}" for metric in metrics]
        lines.append(f"| {start} | " + "– | " * rates + " | ".join(cells) + " |")
    for row in rows:
        cells = [cell(*row["final"].get(metric, (math.nan, math.nan))) for metric in metrics]
        lines.append(f"| {row['setting']} | " + (f"{row['lr']:g} | " if rates else "") + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(mean, error):
    """A number and its error, where it has them."""
    return "–" if math.isnan(mean) else f"{mean:.3g}" if math.isnan(error) else f"{mean:.3g} ± {error:.1g}"


def pictures(rows, x, up, file):
    """The settings' mean trajectories, coloured by method and named by strength: a panel for each metric of `up` against x."""
    if not (plt := plots.pyplot(file)):
        return
    methods = list(dict.fromkeys(row["setting"].split()[0] for row in rows))
    figure, axes = plt.subplots(1, len(up), figsize=(6 * len(up), 5), squeeze=False)
    for axis, y in zip(axes[0], up):
        for row in rows:
            plots.trajectory(axis, row["path"], x, y, f"C{methods.index(row['setting'].split()[0])}")
            end = row["path"][-1][x], row["path"][-1][y]
            axis.annotate(row["setting"].split(maxsplit=1)[-1], end, (6, 3), textcoords="offset points", fontsize=6)
        if x in ("w2", "kl_k1") and max(row["path"][-1][x] for row in rows) > 0.1:  # they start at 0 and differ by magnitudes
            axis.set_xscale("symlog", linthresh=0.01)
        for index, method in enumerate(methods):
            axis.scatter([], [], color=f"C{index}", marker="*", s=120, label=method)
        axis.legend()
    plots.save(plt, figure, file)


if __name__ == "__main__":
    runtime.run(main)
