"""Answers that are numbers: which number does a text end in, and is it the right one.

Numbers are compared exactly, as fractions: "1,234.50", "$1234.5" and "2469/2" are one number, and 0.3 is three tenths. Nothing
is evaluated: an answer that is an expression is read for its numbers, not computed.
"""

import re
from fractions import Fraction

# A sign counts only where no operand stands before it: the 2 of "87-2" is positive. Digits in a word, a name or an exponent
# (H2O, x_1, cm^2) are no numbers. Nor are more than 100 digits, which no answer has.
NUMBER = re.compile(
    r"(?<![\w.^])(?<!\^\{)(?P<sign>(?<![)\]}%])[-−–])?[$€£¥]?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d{1,100})(?:\.\d{1,100})?|\.\d{1,100})(?!\d)"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\d))?(?![eE][-+]?\d)"
    r"(?:\s?/\s?(?P<divisor>\d{1,100})(?!\.?\d))?",
    re.ASCII,
)
# A stated answer with one of these is an expression, not a number: roots, powers of numbers (not of units), fractions like ½.
EXPRESSION = re.compile(r"\\sqrt|\\pi\b|[√π¼-¾⅐-⅞]|\d\s*\^\s*\{?\s*[-−–]?\d")


def exact_answer(completion, answer):
    """1.0 where the completion's final number equals `answer` (a number, or a text with one), else 0.0.

    >>> exact_answer("6 × 7 is forty-two, so \\\\boxed{42}.", 42), exact_answer("#### 1,000 dollars", "1000.0")
    (1.0, 1.0)
    """
    final = final_number(completion)
    return float(final is not None and final == number(str(answer)))


def states_answer(completion):
    """The format reward: 1.0 where the completion states a number in \\boxed{…} or after "####", else 0.0."""
    stated = stated_answer(completion)
    return float(stated is not None and number(stated) is not None)


def final_number(text):
    """The number that a text ends in, a Fraction: the one in its last \\boxed{…}, or else after its last "####", or else its
    last number. None where there is none. A box or a "####" without a number, or with several, gives None: it is the answer,
    and the text before it does not count."""
    stated = stated_answer(text)
    if stated is not None:
        return number(stated)
    numbers = list(NUMBER.finditer(plain(text)))
    return value(numbers[-1]) if numbers else None


def stated_answer(text):
    """What the last whole \\boxed{…} holds, or else the rest of the line after the last "####", or else None."""
    stop = len(text)
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for end in range(start, stop):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
        stop = start  # where a box never ends, the boxes around it do not end either
    if "####" in text:
        return (text.rpartition("####")[2].strip().splitlines() or [""])[0]
    return None


def number(text):
    """The only number of a text, or of what follows its last "=", a Fraction. None where it has no number or several, or is
    an expression."""
    text = re.sub(r"^\s*([-−–])\s+", r"\1", plain(text).rpartition("=")[2])  # joins a sign to its number: "- 5" is −5
    numbers = list(NUMBER.finditer(text))
    return value(numbers[0]) if len(numbers) == 1 and not EXPRESSION.search(text) else None


def plain(text):
    """A text without the TeX around its numbers, such as \\frac{1}{2}, 1{,}000, 1\\,000, \\$5 and 5\\text{ cm}."""
    text = re.sub(r"(?<=\d)\s*(?=\\[dt]?frac)", " ", text)  # keeps one and a half, 1\frac{1}{2}, from becoming 11/2
    text = re.sub(r"\\[dt]?frac\s*\{\s*([-−–]?\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1/\2", text)
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "").replace("\\$", "$")
    return re.sub(r"\\(?:text|mathrm)\s*\{|\.{2,}", " ", text)


def value(match):
    """The Fraction that a match of NUMBER stands for; None for a division by zero."""
    divisor = int(match["divisor"] or 1)
    if divisor == 0:
        return None
    whole = Fraction(match["digits"].replace(",", "") + (match["exponent"] or "")) / divisor
    return -whole if match["sign"] else whole
