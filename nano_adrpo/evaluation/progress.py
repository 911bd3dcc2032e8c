"""Reward and entropy while models are trained, as the paper's Figure 4: a table and a picture of several settings, over seeds.

They are those of each round's rollouts, from the runs' metrics.jsonl. From Python, for runs of one's own:

    from nano_adrpo.evaluation import progress

    runs = {name: [f"runs/{name}-{seed}/metrics.jsonl" for seed in (0, 1, 2)] for name in ("grpo", "adrpo")}
    print(progress.table(runs))
    progress.picture("figure4.png", runs)
"""

import itertools

import torch

from nano_adrpo.evaluation import plots, tables
from nano_adrpo.metrics import mean_and_standard_error

METRICS = ("reward", "entropy")
PARTS = 5  # of the rounds, a column each


def series(runs, metric):
    """The metrics.jsonl of one setting's seeds -> the rounds [T] that all of them log, a list, and the metric there [seeds, T].
    A round that was skipped logs none."""
    found = [{row["round"]: row[metric] for row in plots.read(run) if metric in row} for run in runs]
    rounds = sorted(set.intersection(*map(set, found)))
    return rounds, torch.tensor([[values[round] for round in rounds] for values in found], dtype=torch.float64)


def table(runs, metrics=METRICS):
    """Markdown, of each metric a line per setting: its mean over each fifth of the rounds, ± the standard error over seeds.

    runs   {setting: the metrics.jsonl of its seeds}
    """
    lines = []
    for metric in metrics:
        for name, files in runs.items():
            parts = series(files, metric)[1].tensor_split(PARTS, dim=1)
            cells = [mean_and_standard_error(part.mean(dim=1).tolist()) for part in parts]
            lines.append([plots.NAMES.get(metric, metric), name, *(tables.cell(*cell) for cell in cells)])
    return tables.markdown(["rollouts", "setting", *(f"{100 * (i + 1) // PARTS} % of the rounds" for i in range(PARTS))], lines)


def picture(file, runs, metrics=METRICS):
    """A panel for each metric, over the rounds: of each setting the mean over seeds, in a band of its standard error."""
    if not (plt := plots.pyplot(file)):
        return
    figure, axes = plt.subplots(1, len(metrics), figsize=(6 * len(metrics), 4.5), squeeze=False, layout="constrained")
    for axis, metric in zip(axes[0], metrics):
        for (name, files), color in zip(runs.items(), colors(plt, runs)):
            rounds, values = series(files, metric)
            if not rounds:  # none that all seeds log
                continue
            mean, error = map(torch.tensor, zip(*map(mean_and_standard_error, values.T.tolist())))
            axis.plot(rounds, mean.numpy(), color=color, linewidth=1.2, label=name)
            axis.fill_between(rounds, (mean - error).numpy(), (mean + error).numpy(), color=color, alpha=0.2, linewidth=0)
        axis.set(xlabel="round", ylabel=plots.label(metric))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(runs), 4), fontsize=8)
    plots.save(plt, figure, file)


def colors(plt, names):
    """Of settings whose first word is their method: shades of one colour a method, darker from setting to setting."""
    groups = {}
    for name in names:
        groups.setdefault(name.split()[0], []).append(name)
    shades = {}
    for (_, alike), tones in zip(groups.items(), itertools.cycle(("Blues", "Oranges", "Greens", "Purples", "Greys"))):
        for index, name in enumerate(reversed(alike)):
            shades[name] = plt.get_cmap(tones)(0.9 - 0.5 * index / max(1, len(alike) - 1))
    return [shades[name] for name in names]
