r"""--reward math says what math-verify says, in bounded time, whatever the completion."""

import sys

import math_verify
import pytest

from nano_adrpo.rewards import expressions
from nano_adrpo.rewards.text import Problem, parse

# TeX between dollar signs or in a box, the right answer, and whether they are equal
PAIRS = [
    (r"\boxed{\frac{x}{2}}", "0.5x", True), (r"\boxed{(x+1)^2}", "x^2+2x+1", True), (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True),
    (r"so it is $[0, \infty)$", r"[0,\infty)", True), (r"\boxed{\{1, 2\}}", r"\{2,1\}", True), (r"\boxed{x=5}", "5", True),
    (r"\boxed{x/2}", "x", False), (r"\boxed{5x}", "5", False), (r"\boxed{x>5}", "5", False), (r"\boxed{2^{10}}", "1024", True),
    ("no answer", "x", False), (r"<think>\boxed{x/2}", "x/2", False), (r"\boxed{", "x", False),
]  # fmt: skip


def test_math_agrees_with_the_library():
    reward = parse(["math"])
    problems = [Problem("?", answer) for _, answer, _ in PAIRS]
    given = reward([said for said, _, _ in PAIRS], problems)["reward"].tolist()
    assert given == [expected for _, _, expected in PAIRS]
    for said, answer, expected in PAIRS:
        if "<think>" not in said:
            assert math_verify.verify(math_verify.parse(f"${answer}$"), math_verify.parse(said)) == expected, said


def test_a_hostile_answer_is_wrong_and_ends_in_time(monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 1)
    said = [r"\boxed{9^{9^{9^9}}}", "$" * 10**6, r"\boxed{" + "(" * 10**6 + "}", r"\boxed{x/2}"]
    assert parse(["math"])(said, [Problem("?", "0.5x")] * 4)["reward"].tolist() == [0, 0, 0, 1]


def test_a_library_that_does_not_start_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="--reward math: the library math-verify does not start"):
        parse(["math"])([r"\boxed{x}"], [Problem("?", "y")])
