"""Tables over settings and runs, in Markdown and JSON.

A row is a dict of one setting, such as a method at one strength:
  setting, lr   its name and its learning rate (None: there is one for all)
  final         {metric: (mean, standard error)} at the last step of training, see `summary`
  runs          how many training runs it has; final's error is over these, or of one run over its noises
  noise         {metric: standard error over the noises}, where there are several runs and several noises
  path          [{metric: mean}], the means at each evaluated step
"""

import math

from nano_adrpo.files.config import Number, fits
from nano_adrpo.metrics import mean_and_standard_error


def row(setting, lr, steps):
    """steps: of each evaluated step of training, in order, the runs: a list of [{metric: number} for each noise]. -> a row

    The metric "round" is the training step of a point; it is not reported.
    """
    path = [summary(runs) for runs in steps]
    final = {metric: value for metric, value in path[-1].items() if metric != "round"}
    means = [{metric: mean for metric, (mean, _) in point.items()} for point in path]
    noise = over_noises(steps[-1]) if len(steps[-1]) > 1 else {}
    return {"setting": setting, "lr": lr, "final": final, "runs": len(steps[-1]), "noise": noise, "path": means}


def over_noises(runs):
    """Like `summary`, of the other error: {metric: standard error over the noises, each with its mean over the training runs},
    which share them. Empty where there is one noise, or where the runs have not equally many."""
    if len({len(run) for run in runs}) > 1 or len(runs[0]) < 2:
        return {}
    turned = [list(noise) for noise in zip(*runs)]  # [[{metric: number} for each training run] for each noise]
    return {metric: error for metric, (_, error) in summary(turned).items()}


def summary(runs):
    """[[{metric: number} for each noise] for each training run] -> {metric: (mean, standard error)}.

    The error is over the training runs, each with its mean over noises, or where there is one run over the noises."""
    values = {}
    for metric in runs[0][0]:
        means = [mean_and_standard_error([noise[metric] for noise in run])[0] for run in runs]
        values[metric] = mean_and_standard_error(means if len(runs) > 1 else [noise[metric] for noise in runs[0]])
    return values


def is_number(value):
    """Whether a value of a file is a number, NaN among them, which stands for one that is not known."""
    return fits(value, Number) or value != value


def as_json(rows):
    """The rows with null for an error that is not a number, which JSON does not have."""

    def value(mean, error):
        return mean, None if math.isnan(error) else error

    return [row | {"final": {metric: value(*row["final"][metric]) for metric in row["final"]}} for row in rows]


def table(rows, start=None, columns=None):
    """Markdown, a line per row. A standard error over training runs stands behind ±; one within a run, over its noises or
    problems, in brackets.

    start     the name of an extra first line, the values before training; None: none
    columns   {metric: its heading}; None: all metrics, under their names
    """
    metrics, rates = dict.fromkeys(metric for row in rows for metric in row["final"]), rows[0]["lr"] is not None
    columns = columns or {metric: metric for metric in metrics}
    metrics = [metric for metric in columns if metric in metrics]
    names = ["setting", *(["lr"] if rates else []), *(columns[metric] for metric in metrics)]
    lines = []
    if start:
        values = [rows[0]["path"][0].get(metric, math.nan) for metric in metrics]
        lines.append([start, *(["–"] if rates else []), *(cell(value) for value in values)])
    for row in rows:
        cells = [cell(*numbers(row, metric)) for metric in metrics]
        lines.append([row["setting"], *([f"{row['lr']:g}"] if rates else []), *cells])
    return markdown(names, lines)


def markdown(names, lines):
    """A table of texts: the names of its columns, and its lines."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in [names, ["---"] * len(names), *lines]]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def numbers(row, metric):
    """-> a metric's mean, its standard error over training runs, and the one within a run; NaN where one is not known."""
    mean, error = row["final"].get(metric, (math.nan, math.nan))
    return (mean, error, row["noise"].get(metric, math.nan)) if row["runs"] > 1 else (mean, math.nan, error)


def cell(mean, error=math.nan, within=math.nan):
    """A number and its errors, those that are known."""
    if math.isnan(mean):
        return "–"
    return f"{mean:.3g}" + ("" if math.isnan(error) else f" ± {error:.1g}") + ("" if math.isnan(within) else f" ({within:.1g})")
