"""Rewards of text: is the final number right, is it stated as asked, and what does a reward model say.

Answers are numbers and compared exactly, as fractions: "1,234.50", "$1234.5" and "2469/2" are one number, and 0.3 is three
tenths. Nothing is evaluated: an answer that is an expression is read for its numbers, not computed.

On the command line they are named as rewards of images are (nano_adrpo/rewards.py): exact, format, deceptive (the demo's),
reward_model:FOLDER in RM-Gemma-2B's layout, or FILE.py:FUNCTION, for example in mine.py

    def short(prompts, completions):
        '''0 for no text, −1 for a hundred characters.'''
        return [-len(completion) / 100 for completion in completions]

with which `--reward exact mine.py:short@0.1` takes a tenth of a point for every hundred characters.
"""

import contextlib
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch

from nano_adrpo import chat, rewards, runtime
from nano_adrpo.demo import arithmetic
from nano_adrpo.models.decoder import RewardModel

# A sign counts where no operand stands before it (the 2 of "87-2" is positive) and digits in a word, a name or an exponent are
# not numbers (H2O, x_1, cm^2). Longer ones than this are not answers, and Python refuses to read them.
NUMBER = re.compile(
    r"(?<![\w.^])(?<!\^\{)(?P<sign>(?<![)\]}%])[-−–])?[$€£¥]?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d{1,100})(?:\.\d{1,100})?|\.\d{1,100})(?!\d)"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\d))?(?![eE][-+]?\d)"
    r"(?:\s?/\s?(?P<divisor>\d{1,100})(?!\.?\d))?",
    re.ASCII,
)
# What makes a stated answer more than the number in it: roots, powers of numbers (not of units), ½ behind a whole number.
EXPRESSION = re.compile(r"\\sqrt|\\pi\b|[√π¼-¾⅐-⅞]|\d\s*\^\s*\{?\s*[-−–]?\d")


class Problem(NamedTuple):
    question: str
    answer: Fraction

    def __str__(self):
        return self.question


def parse(specs, device=None, batch=16, autocast=contextlib.nullcontext):
    """The rewards of completions that a command line names, see above: called with N completions and their N problems. A
    reward model reads `batch` of them at a time, on `device` and inside `autocast()`. Raises ValueError naming the one that is
    wrong."""

    def own(reward):
        return lambda completions, problems: reward([problem.question for problem in problems], completions)

    models = {"reward_model": lambda folder: RewardModelScore(folder, device, batch, autocast)}
    return rewards.Rewards(rewards.named(specs, models, PLAIN, own))


def read_problems(file, instruction=""):
    """The problems in a file of GSM8K's format: JSON lines with `question` and `answer`, a text whose number follows "####".
    `instruction` is put behind every question. Raises ValueError naming file and line."""
    problems = []
    for index, line in enumerate(Path(file).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            json.dumps(values, ensure_ascii=False).encode()  # half a character, as in "\ud83d", is no text
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {index}: not valid JSON ({error})") from None
        for key in ("question", "answer"):
            if not isinstance(values, dict) or not isinstance(values.get(key), str) or not values[key].strip():
                raise ValueError(f"{file}, line {index}: expected an object with a text under '{key}'")
        answer = number(values["answer"].rpartition("####")[2]) if "####" in values["answer"] else None
        if answer is None:
            raise ValueError(f"{file}, line {index}: 'answer' has no number after '####'")
        problems.append(Problem(values["question"] + instruction, answer))
    if not problems:
        raise ValueError(f"{file}: no problems; expected a JSON object on every line")
    return problems


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


def exact(completions, problems):
    return [exact_answer(text, problem.answer) for text, problem in zip(completions, problems)]


PLAIN = {
    "exact": exact,
    "format": lambda completions, problems: [states_answer(text) for text in completions],
    "deceptive": lambda *pairs: [arithmetic.deceptive_reward(text, right) for text, right in zip(pairs[0], exact(*pairs))],
}


class RewardModelScore:
    """A reward model's numbers. It reads question and completion as one conversation where its folder has a chat template, else
    one behind the other, by its own tokenizer. It stays on `device`, in float32."""

    def __init__(self, path, device=None, batch=16, autocast=contextlib.nullcontext):
        self.model = RewardModel.from_pretrained(path, torch.float32, device).requires_grad_(False)
        with runtime.about(f"--reward {path}"):
            self.tokenizer, self.template = chat.tokenizer_of(self.model), chat.template_of(self.model)
        self.device, self.batch, self.autocast = device, batch, autocast

    @torch.no_grad()
    def __call__(self, completions, problems):
        texts = [problem.question + text for text, problem in zip(completions, problems)]
        if self.template:
            roles = ("user", "assistant")
            pairs = [zip(roles, (problem.question, text)) for text, problem in zip(completions, problems)]
            turns = [[{"role": role, "content": content} for role, content in pair] for pair in pairs]
            texts = [self.template(messages, add_generation_prompt=False) for messages in turns]
        longest = self.model.config.max_position_embeddings
        ids, mask = chat.encode_prompts(self.tokenizer, texts, longest, special=not self.template, device=self.device)
        with self.autocast():
            return torch.cat([self.model(*part) for part in zip(ids.split(self.batch), mask.split(self.batch))])


def final_number(text):
    """The number that a text ends in: that in its last \\boxed{…}, or else after its last "####", or else its last number. None
    where there is none; a box or a "####" with no number, or with several, is an answer too, and not a number."""
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
        stop = start  # a box that never ends leaves those that it stands in without an end, too
    if "####" in text:
        return (text.rpartition("####")[2].strip().splitlines() or [""])[0]
    return None


def number(text):
    """The one number of a text, or after its last "=", as a Fraction; None where there is none or more than one, or more is
    made of it than a number."""
    text = re.sub(r"^\s*([-−–])\s+", r"\1", plain(text).rpartition("=")[2])  # a sign that stands apart: nothing is before it
    numbers = list(NUMBER.finditer(text))
    return value(numbers[0]) if len(numbers) == 1 and not EXPRESSION.search(text) else None


def plain(text):
    """Without the TeX that numbers come in, such as \\frac{1}{2}, 1{,}000, 1\\,000, \\$5 and 5\\text{ cm}."""
    text = re.sub(r"(?<=\d)\s*(?=\\[dt]?frac)", " ", text)  # of one and a half, 1\frac{1}{2}, nobody shall read eleven halves
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
