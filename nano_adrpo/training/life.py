"""What a run holds while it lives and gives back when it ends, in whatever way: the lock of its folder, handlers of signals."""

import contextlib
import fcntl
import functools
import os
import re
import signal
import threading
from pathlib import Path

import torch

from nano_adrpo.errors import InputError
from nano_adrpo.training import distributed


def refuse_used(out, resume=False):
    """Refuses a folder with files in it, before long work: no run writes over another. With resume, a run's own folder is
    right, and so is what a run leaves that was killed while it claimed the folder."""
    found = list(Path(out).iterdir()) if out and Path(out).is_dir() else []
    if resume:
        own = any(path.name == "config.json" for path in found)
        claimed = [path for path in found if path.suffix == ".tmp" or path.name == "metrics.jsonl" and not path.stat().st_size]
        found = [] if own else [path for path in found if path not in claimed]
    if found:
        raise InputError(f"--out {out}: the folder is not empty; expected {'a run or ' * resume}a new or empty one")


class Life(contextlib.ExitStack):
    """One run's. The system takes the lock back where the process is killed.

    folder    that of a run that goes on (checkpoint.begin), None for a new one
    signal    SIGINT or SIGTERM, once one of them has come: the run ends after its round (checkpoint.save_if_due); else None
    """

    folder = signal = None

    def lock(self, folder, name="metrics.jsonl"):
        """Holds the folder for this process alone. Raises InputError where another process holds it.

        name   a file in it that is never renamed, such as a run's log; it is created where it is missing
        """
        file = self.enter_context(open(folder / name, "a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {folder}: another run has it; expected a folder that no other run writes to") from None
        except OSError:  # a file system that has no locks
            pass

    def catch_signals(self):
        """From now on SIGINT and SIGTERM let the round end. A second one ends the process at once."""

        def stop(number, frame):
            self.signal = number
            restore()
            os.write(2, b"the run stops after this round; a second signal ends it at once\n")

        def restore():
            for each, handler in before.items():
                signal.signal(each, handler)

        if threading.current_thread() is threading.main_thread():  # in another one Python allows no handlers
            before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
            self.callback(restore)


def alive(main):
    """main(argv, life) -> main(argv=None), which gives it a Life of its own, among the ranks that torchrun started. A GPU that
    is full, where models are loaded or pictures drawn, becomes one line (in a round, see run.at_round)."""

    @functools.wraps(main)
    def call(argv=None):
        with Life() as life, distributed.together():
            try:
                return main(argv, life)
            except torch.OutOfMemoryError as error:
                lower = "less is needed with --dtype bfloat16, with --lora-rank, or on another --device"
                raise InputError(f"outside of the rounds: {full(error)}; {lower}") from None

    return call


def full(error):
    """A torch.OutOfMemoryError in words."""
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    return "out of GPU memory" + (f", {asked[1]} more were asked for" if asked else "")
