"""Answers that are expressions, such as x/2 or [0, ∞), judged by the library math-verify (the extra `math`).

The library asks sympy whether two expressions are equal, which may take for ever or all memory: 9^(9^(9^9)) is enough. So it
runs in a process of its own (files/apart.py).
"""

import importlib.util

from nano_adrpo.errors import InputError
from nano_adrpo.files.apart import Apart, Ended

SECONDS, BYTES, LONGEST = 5, 4 * 2**30, 10_000  # for one question: of computing, of memory; characters of an answer


class Expressions:
    """Compares the expressions in two texts. Raises InputError where the library is not installed."""

    def __init__(self):
        self.process = Apart(__file__, "comparer", SECONDS, BYTES)  # starts with the first question, and after one it died of
        if importlib.util.find_spec("math_verify") is None:
            self.missing("is not installed")

    def missing(self, what):
        raise InputError(f"--reward math: the library math-verify {what}; expected it to (pip install 'nano_adrpo[math]')")

    def equal(self, said, right):
        r"""Whether `said` has an expression that equals the one in `right`; both are texts with TeX in \boxed{…} or between
        dollar signs. False where that takes longer than SECONDS, or more memory than BYTES."""
        try:
            self.process.start()
        except Ended:
            self.missing("does not start")
        try:
            return self.process.ask([said[-LONGEST:], right])
        except Ended:
            return False


def comparer():
    """-> a function of [said, right]."""
    from math_verify import LatexExtractionConfig, parse, verify

    def equal(question):
        right, said = (parse(text, tex, parsing_timeout=None) for text in question[::-1])
        return verify(right, said, timeout_seconds=None)

    tex = [LatexExtractionConfig(boxed_match_priority=0)]
    equal(["$x$", "$x$"])  # the first question builds its tables
    return equal
