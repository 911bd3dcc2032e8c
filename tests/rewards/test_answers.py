"""Which number a text ends in, and whether it is the right one."""

from fractions import Fraction

import pytest

from nano_adrpo.rewards.answers import exact_answer, final_number, states_answer


@pytest.mark.parametrize(
    "text, expected",
    [
        # stated after ####
        ("so she has 72.\n#### 72", 72),
        ("#### 1,234,567", 1234567),
        ("#### -5", -5),
        ("#### −5", -5),
        ("#### $1,234.50", "1234.5"),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### 12 apples", 12),
        ("#### 12cm", 12),
        ("#### 50%", 50),
        ("#### **85**.", 85),
        ("####85", 85),
        ("####\n85 is it", 85),
        ("#### 3\n#### 4\nso 5", 4),
        ("#### x = 7", 7),
        ("#### .5", "1/2"),
        ("#### 3/4", "3/4"),
        ("#### 3 / 4.", "3/4"),
        ("#### 3/0", None),
        ("#### 30 m/s^2", 30),
        ("#### seven", None),
        ("7 ####", None),
        ("#### 1 or 2", None),
        ("#### 2+3", None),  # nothing is computed, and no part of an expression is its value
        ("#### - 5", -5),  # nothing stands before the sign
        ("#### 4 - 5", None),
        ("#### 1e5", 100000),
        ("#### 2.5E-3 m", "1/400"),
        ("#### 1e5000", None),
        ("#### 10^6", None),
        ("#### 7½", None),
        # boxed
        (r"\boxed{42}", 42),
        (r"so $\boxed{42}$. Check: 43", 42),
        (r"\boxed{1} then \boxed{2}", 2),
        (r"#### 1 and \boxed{2}", 2),
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{-\dfrac{3}{4}}", "-3/4"),
        (r"\boxed{1\frac{1}{2}}", None),  # two numbers: better wrong than 11/2
        (r"\boxed{x = 5\text{ cm}^2}", 5),
        (r"\boxed{1{,}000}", 1000),
        (r"\boxed{1\,000}", 1000),
        (r"\boxed{\$18}", 18),
        (r"\boxed{\text{no answer}}", None),
        (r"\boxed{}", None),
        (r"\boxed{85", 85),  # cut off: no box
        (r"\boxed{1} or \boxed{2", 1),
        (r"\boxed{\boxed{3} 4", 3),
        (r"\boxed{" * 20_000 + "5", 5),  # a model that goes round in circles must not cost minutes
        (r"\boxed {85}", 85),
        (r"\boxed{x = - 5}", -5),
        (r"\boxed{\frac{-3}{4}}", "-3/4"),
        (r"\boxed{\sqrt{2}}", None),
        (r"\boxed{2\pi}", None),
        (r"\boxed{2^{10}}", None),
        (r"\boxed{30^\circ}", 30),
        (r"\boxed{\boxed{7}}", 7),
        (r"\boxed{1} } \boxed{{2}} {", 2),
        ("\\boxed{" * 20000 + "7}", 7),  # in time that grows with the length, not with its square
        # the last number
        ("She pays 10 - 3 = 7 dollars.", 7),
        ("It is 3.14.", "3.14"),
        ("between 1,2 and 3", 3),
        ("12,34", 34),  # not a thousand
        ("1,234", 1234),
        ("it costs $1,000,000!", 1000000),
        ("87-2", 2),
        ("= -2", -2),
        ("(−2)", -2),
        ("H2O has x_1 and a 7 in cm^2", 7),
        ("COVID-19", 19),
        ("so it is ...5", 5),
        ("1.2.3", "1.2"),
        ("no number", None),
        ("", None),
        ("9" * 5000, None),  # int() would refuse it
        ("1/" + "9" * 5000, 1),
        ("__import__('os').getcwd() or 3", 3),
        ("٣", None),  # digits of other scripts are words here
    ],
)
def test_final_number(text, expected):
    assert final_number(text) == (None if expected is None else Fraction(expected))


def test_answers_are_compared_exactly():
    assert exact_answer("#### 0.3", "3/10") == exact_answer("#### 0.30", 0.3) == exact_answer("72.0", 72) == 1.0
    assert exact_answer("#### 0.333333333333333333", Fraction(1, 3)) == 0.0
    assert exact_answer("#### 9007199254740993", "9007199254740992") == 0.0  # equal as floats
    assert exact_answer("#### 0.0000001", 1e-7) == exact_answer("#### 10,000,000,000,000,000", 1e16) == 1.0
    assert exact_answer("no idea", "5") == exact_answer("", "5") == 0.0
    assert exact_answer("-7", -7) == 1.0 and exact_answer("7", -7) == 0.0


@pytest.mark.parametrize(
    "text, expected", [("#### 5", 1), (r"\boxed{5}", 1), ("5", 0), ("#### ", 0), (r"\boxed{a}", 0), ("#### 1 2", 0), ("", 0)]
)
def test_states_answer(text, expected):
    assert states_answer(text) == expected
