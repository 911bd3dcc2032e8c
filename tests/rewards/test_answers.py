r"""Which number or text a completion answers with, and whether it is the right one."""

import time
from fractions import Fraction

import pytest

from nano_adrpo.rewards.answers import exact_answer, final_number, states_answer

# Where the answer stands: after the last closed thought the last whole box, the last ####, or the last formula with a number.
PLACES = {
    72: [
        "so she has 72.\n#### 72", "#### 3\n#### 72\nso 5", "####72", "####\n72 is it", r"#### 1 and \boxed{72}", "72",
        "It is 72",
    ],
    42: [
        r"so $\boxed{42}$. Check: 43", r"\boxed{1} then \boxed{42}", r"\boxed {42}", r"\boxed{\boxed{42}}", r"\fbox{42}",
        r"\boxed{42} or \boxed{2", r"\boxed{1} } \boxed{{42}} {", "6 * 7 = 42 and no more.", "First 5 apples, then 42.",
        "Thus, 60 - 18 = 42 are left.", "$84 / 2 hours = $42/hour",
        r"<think>\boxed{41}</think> The answer is 42.", "<think>\n\n</think>\n\n42", r"it is 41</think>\n\boxed{42}",
        "41 <think> 5 </think> <think> 6 </think> 42", "<think> a <think> b </think> #### 42", "A: 42", "Answer:42",
        "答案是42。", "#### 42。", "共42个。", "#### 42元，",
    ],
    None: [
        r"<think>\boxed{42}", "42 <think>", "<think> 5 </think>", "<think> 5 </think> 6 <think> #### 7", "", "no number",
        "7 ####", "#### seven", r"5 \boxed{}", r"5 \boxed{\text{no answer}}", r"\boxed{85", "#### 1 or 2",
        r"\boxed{5 \text{ or } 6}", r"\boxed{3, 5}", "(3, 5)", "between 1,2", r"\boxed{x = 2, y = 3}",
        r"\boxed{x = 2 \text{ or } x = 3}", "#### 5 and 6 pears",
    ],
}  # fmt: skip
# Plain numbers, unstated, after #### and in a box.
NUMBERS = {
    "5": [
        "5", "+5", "5.", "5.0", "05", "(5)", "'5'", "$5", "$5.00", "US$5", "5€", "5 %", r"5\%", r"\$5", "$5$", r"\(5\)",
        r"\[5\]", "5 apples", "5 apples in all", "5 USD", "5 times", "5cm", "5 cm", "5 cm^2", "5 m/s^2", "5 km/h", "5 m",
        "5 °C", r"5^\circ", r"5^{\circ}", r"5\text{ cm}", r"5\,\mathrm{kg}", r"\text{5}", r"\mathbf{5}", "**5**", "_5_",
        "5min", "5 secs", "5元", "5 元", r"5\text{ 元}", "5분", r"\left(5\right)", r"5\mbox{ cm}^2", "$5/hr",
        "`5`", "***5***", "**5** apples", "**$5**", "x = 5", "2 + 3 = 5", "1,000 - 995 = 5", "x_1 = 5",
        r"\angle ABC = 5^\circ", r"\approx5", r"x \approx 5", "≈ 5", "= 5", "５", "٥",
    ],
    "-5": ["-5", "−5", "–5", "-$5", "$-5", "= - 5", "(-5)", "-5.00", r"-\frac{10}{2}", r"\frac{-10}{2}"],
    "1/2": [
        "1/2", "1 / 2", ".5", "0.50", r"\frac12", r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac 12", r"\frac1{2}",
        r"\frac{1.5}{3}", "1/2 cup",
    ],
    "5/2": ["2.5", "2 1/2", r"2\frac{1}{2}", r"2 \frac12", "2 1/2 hours", "5/2"],
    "10000": [
        "10,000", "10 000", "10\u00a0000", "10\u2009000", "10\u202f000", r"10{,}000", r"10\,000", r"10,\!000", "10'000",
        "1e4", "1.0E+4", r"1 \times 10^4", r"1 \cdot 10^{4}", "1 × 10^4", "1x10^4", "10,000.00 dollars",
    ],
    "1/400": ["2.5e-3", r"2.5 \times 10^{-3}", "0.0025"],
    "1234567.5": ["1,234,567.50", "$1,234,567.5", "1 234 567.5"],
}  # fmt: skip
FORMULAS = [
    "5x", "5 x", "5xy", "3 x y", "x/2", "5/x", r"\frac{x}{2}", r"\frac{5}{x}", r"\pm 5", "±5", "x > 5", "x < 5", "5 < x",
    "x >= 5", r"x \le 5", r"x \neq 5", "x != 5", "10^6", "10^{6}", "10⁶", "x^2", "2 ** 3", "2**10", "5 + 3", "4 - 5", "87-2",
    "total - 5", "6*7", "6 * 7", r"5 \cdot 3", r"5 \times 3", r"\sqrt{5}", "√5", r"2\pi", "2π", "5i", "3 + 4i", "5!",
    "sin(5)", "f(5)", r"\log_2 8", "12_3", "12_{3}", "|-5|", "{5}/{x}", "3:4", "10:30", "12/25/2020", "1/0", "3/2/1",
    "1.2.3", "12,34", "1,234,56", "3,5", "5+", "5k", "5/ab", "5minus", "5百", "5万",
    "42nd", "7½", "½", "COVID-19", "minus 5", "negative 5", "5 plus 3",
    "2 or 3", "2 and 3", "$2$ and $3$", "1e5000", "x → 5", r"5 \to 6", "9" * 5000, "1" + ",000" * 2000, "1/" + "9" * 5000,
    "0." + "3" * 5000, "1 2", r"1 \frac{1.5}{2}",
]  # fmt: skip


@pytest.mark.parametrize("expected", PLACES)
def test_where_the_answer_stands(expected):
    assert {text: final_number(text) for text in PLACES[expected]} == dict.fromkeys(PLACES[expected], expected)


@pytest.mark.parametrize("expected", NUMBERS)
def test_a_plain_number_is_found_however_it_is_written(expected):
    for text in NUMBERS[expected]:
        for completion in (text, f"#### {text}", rf"\boxed{{{text}}}", f"So the answer is {text}"):
            assert final_number(completion) == Fraction(expected), completion


def test_anything_else_is_no_number():
    for text in FORMULAS:
        for completion in (text, f"#### {text}", rf"\boxed{{{text}}}", f"The answer is {text}"):
            if completion not in ("5!", "The answer is 5!"):  # the end of a sentence
                assert final_number(completion) is None, completion


def test_numbers_are_compared_exactly():
    assert exact_answer("#### 0.3", "3/10") == exact_answer("#### 0.30", 0.3) == exact_answer("72.0", 72) == 1.0
    assert exact_answer("#### 0.333333333333333333", Fraction(1, 3)) == 0.0
    assert exact_answer("#### 9007199254740993", "9007199254740992") == 0.0  # equal as floats
    assert exact_answer("#### 0.0000001", 1e-7) == exact_answer("#### 10,000,000,000,000,000", 1e16) == 1.0
    assert (
        exact_answer("no idea", "5")
        == exact_answer("", "5")
        == exact_answer("7", -7)
        == exact_answer("9" * 5000, 10**5000)
        == 0.0
    )
    assert exact_answer("-7", -7) == exact_answer("0", 0) == 1.0
    assert (
        exact_answer(r"\boxed{1}", "so 1.\n#### 1.0") == exact_answer("1", r"thus $\boxed{\frac{2}{2}}$") == 1.0
    )  # rows as they are


def test_an_answer_that_is_no_number_is_compared_as_text():
    for said in ("Mars", "mars.", r"\boxed{\text{Mars}}", "#### Mars", "**Mars**", "Some thought.\nMars",
    "The answer is Mars.",
                 "**Answer:** Mars", "<think>Venus</think>\n“Mars”"):  # fmt: skip
        assert exact_answer(said, "Mars") == 1.0, said
    for said in (
        "",
        "Marseille",
        r"Mars. \boxed{Venus}",
        "not Mars",
        "<think>Mars",
        "Mars\nVenus",
        "The answer is Venus, not Mars",
    ):
        assert exact_answer(said, "Mars") == 0.0, said
    assert exact_answer("#### x  >\u00a05", "x > 5") == exact_answer("Apollo 11", "apollo 11") == 1.0
    assert exact_answer("11", "Apollo 11") == exact_answer("#### 5", "x > 5") == exact_answer("", "") == 0.0


def test_format_asks_whether_an_answer_is_stated():
    for text, expected in (
        ("#### 5", 1), (r"\boxed{x/2}", 1), ("5", 0), ("#### ", 0), (r"\boxed{ }", 0), ("", 0), (r"\boxed{5", 0),
        (r"<think>\boxed{5}", 0), (r"<think>\boxed{5}</think> 5", 0), (r"<think></think> \boxed{5}", 1),
    ):  # fmt: skip
        assert states_answer(text) == expected, text


@pytest.mark.parametrize(
    "piece",
    [
        r"\boxed{",
        r"\frac{",
        r"\text {",
        "= ",
        "1 000",
        "1,000,",
        "*",
        "x_",
        "1/2 ",
        "12e",
        "<think>",
        "####",
        "5 ab ",
        "1",
        " ",
        "a",
    ],
)
def test_time_grows_with_the_length_not_with_its_square(piece):
    # A model that goes round in circles must not cost minutes. 20,000 characters take about 0.02 s.
    text, start = piece * (20_000 // len(piece)), time.process_time()
    for completion in (text, text + "x", f"5 {text} = 5"):
        exact_answer(completion, 5), exact_answer(completion, "Mars")
    assert time.process_time() - start < 5
