"""What a training script needs around its loop: options, errors, the run folder, progress."""

import argparse
import contextlib
import json
import math
import resource
import sys
import time
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parser(argparse.ArgumentParser):
    """Options are refused unless spelt in full, and a refusal is one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def run(main):
    """Calls a script's main(); what it refuses becomes one line `error: …` and exit status 2."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")


@contextlib.contextmanager
def about(subject):
    """What is refused inside is refused with the name of an option or a file in front."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{subject}: {error}") from None


@contextlib.contextmanager
def at_round(step, saved):
    """A number that is not finite inside stops the run: with the round, and the checkpoint to go back to."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"round {step}: {error}; last good checkpoint: {saved}") from None


def positive(kind, zero=False):
    """An argparse type: a finite int or float above zero, or zero where that is allowed."""

    def parse(text):
        value = kind(text)
        if not (value > 0 or zero and value == 0) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a positive number{' or 0' * zero}")
        return value

    parse.__name__ = kind.__name__  # argparse's messages name it
    return parse


def seed(text):
    """An argparse type: what a torch.Generator can be seeded with."""
    if not -(2**63) <= (value := int(text)) < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 64 bits")
    return value


def device(name):
    """An argparse type: a torch device that this machine has."""
    try:
        torch.zeros(1, device=name).item()  # fails on "meta", too, which holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"device {name!r} is not available ({str(error).splitlines()[0]})") from None
    return name


def refuse_used_folder(path):
    """A folder with files in it is refused, so that no run writes over another: before long work, and with nothing created."""
    if Path(path).is_dir() and any(Path(path).iterdir()):
        raise ValueError(f"--out {path}: the folder is not empty; expected a new or empty one")


def open_run_folder(path):
    """Creates an empty folder for a run's files."""
    refuse_used_folder(path)
    make_folder(path, path)
    return Path(path)


def make_folder(path, out):
    """Creates the folder of --out `out` where it is missing; one that cannot be written to is refused, before long work."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe = Path(path) / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write there ({error.strerror})") from None


class Phases:
    """Seconds of each phase of a round and the most memory it held: on a GPU what its tensors took, else the process's peak
    so far. For the console only: clock readings in a file would make two runs of one seed differ."""

    def __init__(self, device):
        self.cuda, self.spent = torch.device(device).type == "cuda", {}

    @contextlib.contextmanager
    def __call__(self, name):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        seconds, memory = self.spent.get(name, (0.0, 0))
        self.spent[name] = seconds + time.monotonic() - start, max(memory, self.peak())

    def peak(self):
        """Bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def take(self):
        """-> one line about every phase since the last call."""
        line = "  ".join(f"{name} {seconds:.2f} s {memory / 2**30:.1f} GiB" for name, (seconds, memory) in self.spent.items())
        self.spent = {}
        return line


class MovingAverage:
    """The exponential moving average of parameters, in their own dtype: after each step, average = decay·average +
    (1 − decay)·parameter. Decay 0 keeps none, and costs nothing."""

    def __init__(self, parameters, decay):
        self.decay, self.parameters = decay, [p for p in parameters if p.requires_grad] if decay else []
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self):
        for average, parameter in zip(self.average, self.parameters):
            average.lerp_(parameter, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self):
        """Inside, the model has the average for its weights."""
        current = [p.data for p in self.parameters]
        try:
            for parameter, average in zip(self.parameters, self.average):
                parameter.data = average
            yield
        finally:
            for parameter, data in zip(self.parameters, current):
                parameter.data = data


class Log:
    """metrics.jsonl, one JSON object a line, and a line on the console with rate and time left.

    The file holds no clock readings, so that two runs of one seed write the same bytes.
    """

    def __init__(self, file, steps):
        self.file, self.steps, self.start = Path(file), steps, time.monotonic()

    def write(self, step, values, speed=""):
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"round": step, **values}) + "\n")
        numbers = "  ".join(f"{name} {value:.3g}" for name, value in values.items() if not isinstance(value, dict))
        seconds = time.monotonic() - self.start
        left = seconds / step * (self.steps - step) if step else math.nan
        print(f"round {step}/{self.steps}  {numbers}  {speed}  {step / seconds:.2f} rounds/s  {left:.0f} s left", flush=True)
