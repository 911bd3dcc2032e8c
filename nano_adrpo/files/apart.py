"""What cannot be stopped from inside, such as a template, a regular expression or a tokenizer by somebody else, is asked in a
process of its own, which the operating system ends when it takes too long or too much memory.

This file is both sides: `Apart` asks; run as a script it answers.
"""

import contextlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys


class Ended(Exception):
    """The process gives no answer. The message says why: what its function raised, or how it ended."""


class Apart:
    """Questions for the function that `make()` in the Python file `file` returns; they and its answers are what JSON can hold.

    seconds   of the processor's time, for each question
    memory    bytes of the process

    The file is run for itself: it may import this package's files that import no torch, so that it starts in a moment."""

    def __init__(self, file, make, seconds, memory=2**30):
        self.words, self.seconds, self.process = [file, make, str(seconds), str(memory)], seconds, None

    def start(self):
        """Starts the process, if there is none, and waits until it can be asked. Raises Ended."""
        if self.process is None:
            command = [sys.executable, "-P", __file__, *self.words]  # -P: the files beside this one are no modules to it
            place = {"env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **place)
            try:
                self.read()
            except Ended:
                self.close()
                raise

    def ask(self, question):
        """-> the answer. Raises Ended."""
        self.start()
        with contextlib.suppress(BrokenPipeError):  # then `read` tells how the process ended
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        return self.read()

    def read(self):
        if line := self.process.stdout.readline():
            answer, error = json.loads(line)
            if error is None:
                return answer
            raise Ended(error)
        code = self.close()
        raise Ended(f"it takes more than {self.seconds} s" if code == -signal.SIGPROF else f"exit status {code}")

    def close(self):
        """Ends the process; the next question starts another. -> its exit status"""
        process, self.process = self.process, None
        if process:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # ends one that waits
            with process.stdout:
                return process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if getattr(self, "process", None):
            self.process.kill()
            self.close()


def serve(file, make, seconds, memory):
    """Reads questions and writes [answer, None] or [None, error], one a line, each as JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what else is printed is no answer

    def tell(call, *args):
        try:
            found = [call(*args), None]
        except BaseException as error:  # noqa: B036, a panic of a library in Rust is no Exception
            found = [None, f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"]
        print(json.dumps(found), file=answers, flush=True)

    answer = None

    def start():
        nonlocal answer
        answer = runpy.run_path(file)[make]()
        with contextlib.suppress(ValueError, OSError):  # where the system allows less already, or has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    tell(start)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process, even within one long multiplication
        tell(lambda line: answer(json.loads(line)), line)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    serve(*sys.argv[1:3], float(sys.argv[3]), int(sys.argv[4]))
