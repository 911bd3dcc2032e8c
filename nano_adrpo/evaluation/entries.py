"""The models that the evaluate command compares, and its folder with what has been measured of them."""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

from nano_adrpo import files
from nano_adrpo.errors import InputError, MissingFile
from nano_adrpo.evaluation import tables
from nano_adrpo.files.config import section


class Entry(NamedTuple):
    """One model of --models, or system of --systems."""

    name: str
    step: int | None
    what: str  # as on the command line
    model: str
    adapter: str | None
    run: int  # counts the entries of one name and step

    @property
    def title(self):
        return self.name if self.step is None else f"{self.name}@{self.step}"


def entries(specs, option="--models"):
    """What such an option lists -> [Entry]."""
    found = []
    for spec in specs:
        match = re.fullmatch(r"([^=@/]+)(?:@(\d{1,9}))?=(.+)", spec)
        if not match:
            raise InputError(f"{option} {spec!r}: expected NAME=MODEL, NAME=MODEL+ADAPTER or NAME@STEP=…")
        files.plain_name(match[1], f"{option} {spec!r}")  # of what is written
        name, step, what = match[1], match[2] and int(match[2]), match[3]
        model, _, adapter = (what, "", "") if Path(what).exists() else what.rpartition("+")
        for path in filter(None, (model or what, adapter)):
            if not Path(path).exists():
                raise MissingFile(f"{option} {spec!r}: {path}: no such file or folder")
        run = sum((entry.name, entry.step) == (name, step) for entry in found)
        found.append(Entry(name, step, what, model, adapter or None, run))
    return found


class Results:
    """The folder of an evaluation: config.json has its options, scores/ what has been measured, a file a model and seed."""

    def __init__(self, out, entries, relative=True):
        """relative: whether what is measured of a model depends on the first one, the reference"""
        self.out, self.entries, self.reference = Path(out), entries, entries[0] if relative else None

    def open(self, options):
        """Writes config.json into the folder, which must exist. Where it has one, refuses other options than it holds."""
        config = self.out / "config.json"
        if config.is_file():
            for name, value in files.read_json(config).items():
                if value != options.get(name):
                    other = f"--{name.replace('_', '-')} ({textwrap.shorten(repr(value), 80)})"
                    raise InputError(f"--out {self.out}: holds an evaluation with another {other}")
        else:
            files.write_json(config, options)
        (self.out / "scores").mkdir(exist_ok=True)

    def measured(self, entry, seed, measure):
        """What `measure(entry, seed)` gives, a dict, from disk where it is there."""
        file = self.out / "scores" / f"{entry.title}.{entry.run}.seed{seed}.json"
        origin = self.reference and self.reference.what
        if file.is_file():
            values = files.read_json(file)
            if values.pop("model", None) != entry.what:
                raise InputError(f"{file}: holds another model's scores than {entry.what}; expected another --out, or name")
            if (reference := values.pop("reference", None)) != origin:
                raise InputError(f"{file}: was measured from the reference {reference}, not {origin}; expected another --out")
            return values
        values = measure(entry, seed)
        files.write_json(file, {"model": entry.what, "reference": origin, **values})
        return values

    def rows(self, seeds, measure):
        """Measures what has not been measured. -> a row (see tables.py) per name

        seeds     a function of an Entry: how many it has
        measure   see `measured`; where it gives "errors", too, {metric: standard error}, they are those of a single run
        """
        known = {}  # name -> its first numbers
        results = {}  # name -> step -> run -> [{metric: number} for each seed]
        for number, entry in enumerate(self.entries, 1):
            for seed in range(seeds(entry)):
                values = self.measured(entry, seed, measure)
                file = self.out / "scores" / f"{entry.title}.{entry.run}.seed{seed}.json"
                check(values, file, known.setdefault(entry.name, values))
                steps = results.setdefault(entry.name, {})
                steps.setdefault(entry.step or 0, {}).setdefault(entry.run, []).append(values)
                print(f"{number}/{len(self.entries)}  {entry.title} run {entry.run} seed {seed}", flush=True)
        return [self.row(name, [list(runs.values()) for _, runs in sorted(steps.items())]) for name, steps in results.items()]

    def row(self, name, steps):
        errors = [values.pop("errors", {}) for runs in steps for noises in runs for values in noises][-1]
        row = tables.row(name, None, steps)
        if len(steps[-1]) == len(steps[-1][0]) == 1:
            row["final"] = {metric: (mean, errors.get(metric, error)) for metric, (mean, error) in row["final"].items()}
        return row


def check(values, file, first):
    """Raises InputError naming the file for values of a model that are not {metric: number}, with `first`'s metrics."""
    for metric, value in [*values.items(), *section(values, "errors", file).items()]:
        if metric != "errors" and not tables.is_number(value):
            raise InputError(f"{file}: key {metric!r} is {value!r}; expected a number")
    if missing := [metric for metric in first if metric not in values] or [metric for metric in values if metric not in first]:
        raise InputError(f"{file}: key {missing[0]!r} is in some of this model's files alone; expected it in all, or in none")
