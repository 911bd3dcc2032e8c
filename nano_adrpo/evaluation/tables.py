"""Tables over settings and runs, in Markdown and JSON.

A row is a dict of one setting, such as a method at one strength:
  setting, lr   its name and its learning rate (None: there is one for all)
  final         {metric: (mean, standard error)} at the last step of training
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
    return {"setting": setting, "lr": lr, "final": final, "path": means}


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


def table(rows, start=None):
    """Markdown, a line per row. start: the name of an extra first line, the values before training; None: none."""
    metrics, rates = list(rows[0]["final"]), rows[0]["lr"] is not None
    names = ["setting", "lr", *metrics] if rates else ["setting", *metrics]
    lines = []
    if start:
        lines.append([start, *(["–"] if rates else []), *(f"{rows[0]['path'][0][metric]:.3g}" for metric in metrics)])
    for row in rows:
        cells = [cell(*row["final"].get(metric, (math.nan, math.nan))) for metric in metrics]
        lines.append([row["setting"], *([f"{row['lr']:g}"] if rates else []), *cells])
    return markdown(names, lines)


def markdown(names, lines):
    """A table of texts: the names of its columns, and its lines."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in [names, ["---"] * len(names), *lines]]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def cell(mean, error):
    """A number and its error, where it has them."""
    if math.isnan(mean):
        return "–"
    return f"{mean:.3g}" if math.isnan(error) else f"{mean:.3g} ± {error:.1g}"
