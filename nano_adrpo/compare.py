"""Every method against every other, on equal terms: the same learning rates, seeds, rounds and evaluation for each.

    python -m nano_adrpo.compare flow --out runs/compare_flow        # the digits demo; about an hour on two cores
    python -m nano_adrpo.compare flow --out runs/compare_flow        # again: goes on where it stopped

Each run is `train_flow.py` in a process of its own, in a folder of its own; a finished run is not repeated. Written to --out:
table.md (mean ± standard error over seeds), results.json (the evaluations of every run) and the paper's two trade-off pictures,
reward against diversity and reward against W2 divergence.
"""
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nano_adrpo import plots, runtime, weights
from nano_adrpo.metrics import mean_and_standard_error

# Name of the setting -> options of train_flow.py. The strengths of each method span weak to strong regularisation.
FLOW = {
    **{f"ADRPO β0={b:g}": {"method": "adrpo", "beta0": b} for b in (1, 2, 5)},
    **{f"ADRPO β0={b:g}, clip ±β0": {"method": "adrpo", "beta0": b, "a-min": -b, "a-max": b} for b in (1, 5)},
    **{f"fixed β={b:g}": {"method": "fixed-beta", "beta0": b} for b in (1, 2, 5)},
    **{f"ORW-CFM-W2 τ={t:g}, β={b:g}": {"method": "orw-cfm-w2", "tau": t, "beta0": b} for t, b in ((0.1, 0.3), (0.3, 0.3), (0.3, 1))},
    **{f"DPO β={b:g}": {"method": "dpo", "beta-dpo": b} for b in (20, 50, 200)},
    "RAFT": {"method": "raft"},
}
LEARNING_RATES = (1e-4, 3e-4, 1e-3)


def main(argv=None):
    parser = runtime.Parser(__doc__.split("\n")[0])
    parser.add_argument("what", choices=("flow",), help="which half of the paper")
    parser.add_argument("--out", default="runs/compare_flow", help="folder for the runs and the results; an earlier one goes on")
    parser.add_argument("--seeds", type=runtime.positive(int), default=3, help="seeds per setting, from 0")
    parser.add_argument("--rounds", type=runtime.positive(int), default=40, help="rounds per run")
    parser.add_argument("--workers", type=runtime.positive(int), default=os.cpu_count(), help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    out = Path(args.out)
    jobs = {
        (name, lr, seed): {**options, "lr": lr, "seed": seed, "rounds": args.rounds, "eval-every": 10}
        for seed in range(args.seeds)  # outermost: an interrupted comparison has every setting at fewer seeds
        for (name, options), lr in itertools.product(FLOW.items(), LEARNING_RATES)
    }
    results = run_all(jobs, out, args.workers)
    rows = summarise(results, args.seeds)
    weights.write_json(out / "results.json", {"rounds": args.rounds, "seeds": args.seeds, "rows": rows})
    (out / "table.md").write_text(table(rows, args), encoding="utf-8")
    pictures(rows, out)
    print((out / "table.md").read_text(encoding="utf-8"))


def run_all(jobs, out, workers):
    """{job: options} -> {job: [evaluations]}, each a metrics dict with its round."""
    start, done = time.monotonic(), []
    missing = [job for job in jobs if read(out, jobs[job]) is None]
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them finished before", flush=True)

    def work(job):
        run(out, jobs[job])
        done.append(job)
        left = (time.monotonic() - start) / len(done) * (len(missing) - len(done))
        name, lr, seed = job
        print(f"{len(done)}/{len(missing)}  {name}, lr {lr:g}, seed {seed}  {left / 60:.0f} min left", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, missing))
    return {job: read(out, options) for job, options in jobs.items()}


def folder(out, options):
    return out / "runs" / "_".join(f"{name}{value:g}" if name != "method" else value for name, value in options.items())


def run(out, options):
    """One training run in its own process. It works in a folder that is renamed when it is whole."""
    final = folder(out, options)
    working = final.with_name(f"{final.name}.{os.getpid()}.part")
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "train_flow", "--out", str(working), *words]
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
        final = {metric: mean_and_standard_error([run[-1][metric] for run in runs]) for metric in runs[0][-1] if metric != "round"}
        rows.append({"setting": name, "lr": lr, "final": final, "path": path})
    return rows


def best_rates(rows):
    """Of each setting the row of the learning rate with the best joint accuracy, which no method saw."""
    settings = dict.fromkeys(row["setting"] for row in rows)
    return [max((row for row in rows if row["setting"] == name), key=lambda row: row["final"]["joint"][0]) for name in settings]


def table(rows, args):
    metrics = list(rows[0]["final"])
    lines = [
        f"{args.rounds} rounds, {args.seeds} seeds, mean ± standard error. First every setting at its best learning rate (by joint",
        "accuracy, which no method sees), then every run.",
        "",
    ]
    for chosen in (best_rates(rows), rows):
        lines += ["| setting | lr | " + " | ".join(metrics) + " |", "| --- " * (len(metrics) + 2) + "|"]
        lines.append("| base | – | " + " | ".join(f"{rows[0]['path'][0][metric]:.3g}" for metric in metrics) + " |")
        for row in chosen:
            cells = [f"{mean:.3g} ± {error:.1g}" for mean, error in row["final"].values()]
            lines.append(f"| {row['setting']} | {row['lr']:g} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def pictures(rows, out):
    """Mean trajectories, every setting at its best learning rate: reward (and joint accuracy) against diversity and W2."""
    chosen = best_rates(rows)
    methods = list(dict.fromkeys(row["setting"].split()[0] for row in chosen))
    for metric in ("pixel_diversity", "w2"):
        file = out / f"reward_{metric}.png"
        if not (plt := plots.pyplot(file)):
            continue
        figure, axes = plt.subplots(1, 2, figsize=(12, 5))
        for row in chosen:
            method = row["setting"].split()[0]
            first = row is next(r for r in chosen if r["setting"].split()[0] == method)
            for axis, y in zip(axes, ("reward", "joint")):
                plots.trajectory(axis, row["path"], metric, y, f"C{methods.index(method)}", method if first else None)
        axes[0].legend()
        plots.save(plt, figure, file)


if __name__ == "__main__":
    runtime.run(main)
