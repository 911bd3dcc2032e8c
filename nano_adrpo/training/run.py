"""A run's folder, log and messages."""

import contextlib
import datetime
import itertools
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch

from nano_adrpo import files, lora
from nano_adrpo.errors import InputError
from nano_adrpo.training import options


def refuse_used(out):
    """Refuses a folder with files in it, before long work: no run writes over another."""
    if out and Path(out).is_dir() and any(Path(out).iterdir()):
        raise InputError(f"--out {out}: the folder is not empty; expected a new or empty one")


def claim(out, default, config):
    """Creates the run's folder with its config.json, and prints that; -> its Path.

    out       the folder, new or empty; None takes the first of default, default-2, default-3, … that is new

    If two runs claim one folder at the same time, one gets it and the other raises InputError.
    """
    refuse_used(out)
    for number in itertools.count(1):
        folder = Path(out or (default if number == 1 else f"{default}-{number}"))
        try:
            folder.mkdir(parents=True, exist_ok=bool(out))
            (folder / "config.json").touch(exist_ok=False)  # the run that creates this file owns the folder
            break
        except FileExistsError:
            if out:
                why = "another run has it" if folder.is_dir() else "cannot write there (File exists)"
                raise InputError(f"--out {out}: {why}; expected a new or empty folder") from None
        except OSError as error:
            raise InputError(f"--out {folder}: cannot write there ({error.strerror})") from None
    files.write_json(folder / "config.json", config)
    print(f"{folder}: {json.dumps(config)}", flush=True)
    return folder


def make_folder(path, out):
    """Creates the folder `path` of the option --out `out` where it is missing; refuses one that cannot be written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe = Path(path) / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from None


def new_folder(out):
    """Creates the new or empty folder of --out; -> its Path."""
    refuse_used(out)
    make_folder(out, out)
    return Path(out)


@contextlib.contextmanager
def at_round(round, saved):
    """Names the round and the last checkpoint where something fails inside: an InputError stays one line, any other error, such
    as one in a reward of the user's, keeps its traceback."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"round {round}: {error}; last good checkpoint: {saved}") from None
    except Exception as error:
        error.add_note(f"In round {round}; last good checkpoint: {saved}")
        raise


def save_checkpoint(network, save_model, args, out, ema, round):
    """Writes what is trained, as its moving average: adapter/ in PEFT's format, or model/ by `save_model(folder)`; with
    --keep-checkpoints also below round-N/. -> words that name it"""
    for folder in [out, *([out / f"round-{round}"] if args.keep_checkpoints else [])]:
        with ema.applied():
            if options.adapted(args):
                lora.save(network, folder / "adapter")
            else:
                save_model(folder / "model")
    return f"{out / ('adapter' if options.adapted(args) else 'model')} (round {round})"


class Phases:
    """Seconds of each phase of a round and the most memory it held: on a GPU what its tensors took, else the process's peak
    so far. For the console only: clock readings in a file would make two runs of one seed differ."""

    def __init__(self, device):
        self.cuda, self.spent, self.phase = torch.device(device).type == "cuda", {}, None

    def begin(self, phase):
        """Ends the phase that is running and begins another; None: no other."""
        if self.cuda:
            torch.cuda.synchronize()
        if self.phase:
            seconds, memory = self.spent.get(self.phase, (0.0, 0))
            self.spent[self.phase] = seconds + time.monotonic() - self.start, max(memory, self.peak())
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.phase, self.start = phase, time.monotonic()

    def peak(self):
        """Bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def take(self):
        """Ends the phase that is running. -> one line about every phase since the last call"""
        self.begin(None)
        line = "  ".join(f"{name} {seconds:.2f} s {memory / 2**30:.1f} GiB" for name, (seconds, memory) in self.spent.items())
        self.spent = {}
        return line


class Log:
    """metrics.jsonl, one JSON object a line, and lines on the console with the time of a round and the time that is left.

    The file holds no clock readings, so that two runs of one seed write the same bytes.
    """

    def __init__(self, file, rounds):
        self.file, self.rounds, self.done, self.start = Path(file), rounds, 0, time.monotonic()

    def write(self, round, values, spent=""):
        """values: {name: number} of the round; {NAME: {metric: number}} of an evaluation, with {NAME_error: {metric: standard
        error}} where errors are known. spent: words about time."""
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"round": round, **values}) + "\n")
        words = [f"{name} {value:.3g}" for name, value in values.items() if not isinstance(value, dict)]
        if round == 0:
            self.start = time.monotonic()  # the evaluation before the first round is none
        else:
            self.done += 1
            each = (time.monotonic() - self.start) / self.done
            spent += f"  {each:.2g} s/round  {datetime.timedelta(seconds=int(each * (self.rounds - round)))} left"
        print("  ".join([f"round {round}/{self.rounds}", *words, spent.strip()]), flush=True)
        for name, found in values.items():
            if isinstance(found, dict) and not name.endswith("_error"):
                errors = values.get(f"{name}_error", {})
                words = [f"{metric} {with_error(value, errors.get(metric), '.3g')}" for metric, value in found.items()]
                print("  ".join([f"  {name}", *words]), flush=True)


def rounds(args):
    """The rounds of a run: 0, which only evaluates and which --no-eval-first leaves out, then 1 … --rounds."""
    return range(0 if args.eval_first or args.rounds == 0 else 1, args.rounds + 1)


def evaluation_is_due(args, round):
    """Whether a round ends in an evaluation: round 0, every --eval-every rounds, and the last."""
    return round % args.eval_every == 0 or round == args.rounds


def scale(args, deviation):
    """Prints what β0 comes to. -> the unit of --beta-unit in units of the reward, and β0 in units of the reward

    deviation   the reward's deviation within a group, in units of the reward
    """
    if args.beta_unit == "reward":
        print(f"β0 = {args.beta0:g} in units of the reward, whose deviation within a group is {deviation:.3g}", flush=True)
        return 1.0, args.beta0
    if deviation == 0 and args.rounds > 0:
        raise InputError(
            "--beta-unit deviation: no two rewards of a group differ in the first evaluation; expected some, or reward"
        )
    beta0 = args.beta0 * deviation
    print(f"β0 = {args.beta0:g} deviations of the reward within a group = {beta0:.3g} in units of the reward", flush=True)
    return deviation, beta0


def note_scale(beta0, deviation):
    """Prints once what β0 is to be compared with where A is divided by the deviation of its own group."""
    print(f"β0 = {beta0:g} in deviations of the reward within a group, as A is; that deviation is {deviation:.3g}", flush=True)


def still_flat(flat, zero_spread, round, rounds):
    """Whether every group of every round so far had equal rewards; -> bool, with a warning in the tenth round."""
    flat = flat and zero_spread == 1
    if flat and round == min(10, rounds):
        print(
            f"warning: in {round} rounds no group's rewards differed; only the divergence acts. Is the reward right?",
            flush=True,
        )
    return flat


def print_table(columns):
    """The closing table. columns: {title: (the first evaluation, the last one)}, each ({metric: number}, {metric: its standard
    error, where it is known})."""
    print(" " * 18 + "   ".join(f"{title:40s}" for title in columns).rstrip())
    for metric in dict.fromkeys(metric for _, (last, _) in columns.values() for metric in last):
        cells = []
        for first, last in columns.values():
            shown = [
                with_error(values[metric], errors.get(metric)) if metric in values else "" for values, errors in (first, last)
            ]
            cells.append(shown[1] if first == last else f"{shown[0]:18s} -> {shown[1]}")
        print(f"{metric:18s}" + "   ".join(f"{cell:40s}" for cell in cells).rstrip())


def with_error(value, error=None, digits="8.4f"):
    """A number and its standard error, where it is known."""
    return f"{value:{digits}}" + ("" if error is None else f" ± {error:.2g}")
