r"""The answer of a completion: what does it state, and is that right.

What counts stands behind the last thought (<think> … </think>): the last \boxed{…}, or else the rest of the line after the last
"####", or else the formula of the text's last number. It is a number only if it is a plain one: sign, decimals, thousands
separators, a fraction, a mixed number, 1.2e3 or 1.2 × 10^3; in front of it may stand "x =" or "≈", behind it a unit or words.
Currency signs and the dressing of TeX and markdown are passed over. A formula such as 5x, x/2, ±5, x > 5 or 10^6 is no number:
nothing is evaluated. Numbers are compared exactly, as fractions; 50 % is 50.
"""

import re
from fractions import Fraction
from numbers import Rational

GOES_ON = "(?:分之|[十百千万萬亿億兆半多几幾点點만억천백십])"  # numerals behind digits
HAN = f"(?!{GOES_ON})[一-鿿가-힣]"  # that begins a unit
LETTER, DECIMAL = r"[^\W\d_]", r"(?:\d+(?:\.\d+)?|\.\d+)"
DRESSING = [  # (what, what it becomes), in this order
    (r"\\(?:text|math|mbox)\w*\s*\{|\\(?:left|right)(?![a-zA-Z])|\\[,;: ]|~|[^\S\n]", " "),  # fonts, spaces
    (r"(?<![\w)}\]*_`])[*_`]++(?=\S)|(?<=[^\s*_`])[*_`]++(?![\w({])", ""),  # emphasis: no operand stands beside it
    (r"(?<=\d)\s*(?=\\[dtc]?frac)", " "),  # one and a half, 1\frac12, is not 11/2
    (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r"\1\2/\3\4"),
    (r"\^\s*\{?\s*\\circ", "°"),
    (r"\\approx(?![a-z])|≈", "="),
    (r"[{}]|\\!|\\[()[\]]|(?:\bUS)?\\?[$€£¥₹]|\\(?=%)", ""),
    (r"(?:^|(?<==))\s*([-−–])\s+(?=[\d.])", r"\1"),  # no operand stands before this sign
    (r"(?<![\d.,])\d{1,3}([, '’])\d{3}(?:\1\d{3})*(?!\d|,\d)", lambda match: match[0].replace(match[1], "")),
]
DRESSING = [(re.compile(what), becomes) for what, becomes in DRESSING]
NUMBER = re.compile(
    rf"(?P<sign>[-−–+]?)(?:(?P<whole>\d+)\s+(?=\d+\s*/))?(?P<over>{DECIMAL})"
    rf"(?:\s*/\s*(?P<under>{DECIMAL})|(?:[eE]|\s*(?:\\times|\\cdot|[x×·*])\s*10\s*\^\s*)(?P<power>[-−–+]?\d{{1,3}}))?"
    rf"\s*(?:%|°\s?[CF]?)?"  # then a unit or a word, and what is no part of a formula; a letter right behind is one
    rf"(?:(?:[ckm]m|[km]g|m[lL]|ft|lbs?|oz|hrs?|(?:min|sec)s?(?!\w)|[ap]m|/(?:{LETTER}{{3}}|hr|kg|km|lb)|{HAN}"
    rf"|\s+(?:[mgshlL](?!\w)|{LETTER}{{2}}))(?:[^\d\\*^+=<>±]|\^-?\d)*)?"
)
# What stands between the formulas of a text: words that nothing ties to a number, and the ends of sentences.
TIED = r"(?!(?:minus|negative|plus|times)\b|(?<=\d )(?:and|or)\b)"
PROSE = re.compile(
    rf"(?!(?<=\d){GOES_ON})[、-鿿가-힣，：；！（）]+|(?<![\w\\/])(?:{TIED}{LETTER}{{2,}}+\w*+(?![-+/^(])|[aAI](?=\s))"
    rf"|(?<={LETTER}):|[.!?;](?=\s|$)|\n"
)


def exact_answer(completion, answer):
    r"""1.0 where the completion answers with `answer`, a number or a text, else 0.0. Where that states no number, texts are
    compared, without regard to case, dressing, kinds of space and punctuation around them.

    >>> exact_answer(r"6 × 7 is forty-two, so \boxed{42}.", 42), exact_answer("#### 1,000 dollars", "1000.0")
    (1.0, 1.0)
    >>> exact_answer("The answer is **Mars**.", "mars"), exact_answer(r"<think>\boxed{42}", 42)
    (1.0, 0.0)
    """
    right = gold(answer)
    if isinstance(right, Fraction):
        return float(final_number(completion) == right)
    said = final_text(completion)
    return float(said != "" and said == words(right))


def final_number(completion):
    """The number that a completion answers with, a Fraction; None where it answers with none, or with more than a number."""
    text = after_thought(completion)
    stated = stated_answer(text)
    if stated is not None:
        return number(undressed(stated))
    formulas = [each for each in PROSE.split(undressed(text)) if re.search(r"\d", each)]
    return number(formulas[-1]) if formulas else None


def final_text(completion):
    """What a completion answers with, as `words` gives it. Unstated, it is the last line, or what follows "answer is" there."""
    text = after_thought(completion)
    stated = stated_answer(text)
    if stated is None:
        stated = re.split(r"(?i)\banswer(?:\s+is\b|\s*:)", (text.strip().splitlines() or [""])[-1])[-1]
    return words(stated)


def states_answer(completion):
    r"""The format reward: 1.0 where the completion states an answer in \boxed{…} or after "####", else 0.0."""
    return float(bool((stated_answer(after_thought(completion)) or "").strip()))


def gold(answer):
    """The right answer from a number or a text, which may state it as completions do ("… #### 42"): a Fraction, else a text."""
    if isinstance(answer, Rational):
        return Fraction(answer)
    answer = str(answer)  # of a float too: 0.3 is three tenths
    stated = stated_answer(answer)
    stated = (answer if stated is None else stated).strip()
    value = number(undressed(stated))
    return stated if value is None else value


def after_thought(completion):
    """The text behind the last closed thought; "" where a thought is not closed."""
    text = completion.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def stated_answer(text):
    r"""What the last whole \boxed{…} holds, or else the rest of the line after the last "####", or else None."""
    stop = len(text)
    for start in reversed([match.end() for match in re.finditer(r"\\(?:f?boxed|fbox)\s*\{", text)]):
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
    """The Fraction that an undressed text such as "x = 1234.50 dollars" states; None where it is no plain number."""
    before, _, text = text.rpartition("=")
    match = NUMBER.fullmatch(text.strip(" \n\"'“”‘’()[]#:;,。，；：！").rstrip(". ")) if len(text) < 1000 else None
    if not match or re.search(rf"[<>≤≥≠!,;]|=[^=]*{LETTER}{{2}}", before.lstrip(" ,")):  # x > = 5; x = 2 or x = 5
        return None
    over, under, power = match["over"], match["under"] or "1", re.sub("[−–]", "-", match["power"] or "0")
    if not Fraction(under) or match["whole"] and "." in over + under:
        return None
    value = int(match["whole"] or 0) + Fraction(over) / Fraction(under) * Fraction(10) ** int(power)
    return -value if match["sign"] in set("-−–") else value


def undressed(text):
    """A text without the dressing that TeX and markdown put around numbers, and without thousands separators."""
    for what, becomes in DRESSING:
        text = what.sub(becomes, text)
    return text


def words(text):
    """A text for comparison: undressed, in lower case, with single spaces, without quotes and punctuation around it."""
    return " ".join(undressed(text).casefold().split()).strip(" .,;:!?\"'“”‘’()[]*_`")
