"""Answers that are expressions, such as x/2 or [0, ∞), judged by the library math-verify (the extra `math`).

The library asks sympy whether two expressions are equal, which may take for ever or all memory: 9^(9^(9^9)) is enough. So it
runs in a process of its own, which is this file as a script. It gets one question a line, and dies of one that takes too long.
"""

import contextlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys

SECONDS, BYTES, LONGEST = 5, 4 * 2**30, 10_000  # for one question: of computing, of memory; characters of an answer


class Expressions:
    """Compares the expressions in two texts. Raises InputError where the library is not installed."""

    def __init__(self):
        self.process = None  # starts with the first question, and again after one that it died of
        if importlib.util.find_spec("math_verify") is None:
            self.missing("is not installed")

    def missing(self, what):
        from nano_adrpo.errors import InputError  # here, since the process below imports nothing of this package

        raise InputError(f"--reward math: the library math-verify {what}; expected it to (pip install 'nano_adrpo[math]')")

    def equal(self, said, right):
        r"""Whether `said` has an expression that equals the one in `right`; both are texts with TeX in \boxed{…} or between
        dollar signs. False where that takes longer than SECONDS, or more memory than BYTES."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-P", __file__, str(SECONDS)]  # -P: the files beside this one are no modules to it
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, bufsize=0, **pipes)
            if not self.process.stdout.read(1):
                self.missing("does not start")
        self.process.stdin.write(json.dumps([said[-LONGEST:], right]).encode() + b"\n")
        given = self.process.stdout.read(1)
        if not given:
            self.process.communicate()  # waits for its end
        return given == b"1"

    def __del__(self):
        if getattr(self, "process", None) is not None:
            self.process.kill()
            self.process.communicate()


def serve(seconds):
    """Writes a byte when it is ready, then for each line with [said, right] 1 or 0."""
    from math_verify import LatexExtractionConfig, parse, verify

    def equal(said, right):
        said, right = (parse(text, tex, parsing_timeout=None) for text in (said, right))
        return verify(right, said, timeout_seconds=None)

    tex = [LatexExtractionConfig(boxed_match_priority=0)]
    equal("$x$", "$x$")  # the first question builds its tables
    with contextlib.suppress(ValueError, OSError):  # some systems have no such limit
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    os.write(1, b"0")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process, even within one long multiplication
        os.write(1, b"1" if equal(*json.loads(line)) else b"0")
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
