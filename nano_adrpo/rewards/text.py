r"""Rewards of text: is the answer right, is it stated as asked, and what does a reward model say.

| name | what it is |
| --- | --- |
| exact | 1 for the right answer, else 0: numbers as exact fractions, other answers as text (answers.py) |
| math | the same, and 1 for an expression that equals the right one, by the library math-verify (expressions.py) |
| format | 1 where an answer is stated in \boxed{} or after "####" |
| choice | 1 where the text in <answer> … </answer>, or all that is said, is the right choice (choices.py) |
| answer_format | 1 where all of it is <answer> … </answer>, with <think> … </think> before where the prompt asks for it |
| reward_model:FOLDER | a reward model's number; a folder in RM-Gemma-2B's layout |

A function of your own is FILE.py:FUNCTION, for example in mine.py

    def short(prompts, completions, rows):
        '''−1 for the characters that the problem allows, a key of its JSON object, and 0 for none.'''
        return [-len(completion) / row["characters"] for completion, row in zip(completions, rows)]

with which `--reward exact mine.py:short@0.1` takes up to a tenth of a point. A function of two arguments gets no rows.
"""

import contextlib
import inspect
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch

from nano_adrpo import files
from nano_adrpo.errors import InputError, about
from nano_adrpo.language import chat
from nano_adrpo.models.decoder import RewardModel
from nano_adrpo.rewards import Rewards, named, weighted
from nano_adrpo.rewards import choices as of_choices
from nano_adrpo.rewards.answers import after_thought, exact_answer, gold, stated_answer, states_answer
from nano_adrpo.rewards.expressions import Expressions

NEED_ANSWERS = ("exact", "math")


class Problem(NamedTuple):
    question: str
    answer: Fraction | str | None = None  # None: it has none
    row: dict = {}  # its JSON object
    few_shot: str = ""  # text before the question
    choices: tuple = ()  # the texts that the answer is one of; none: an open question
    audio: str | None = None  # path of the sound that the question is about
    thinks: bool = False  # whether the question asks for a <think> before the <answer>

    @property
    def prompt(self):
        """What the policy reads: a text, or a text and the path of a sound. All others, such as rewards, read the question."""
        text = self.few_shot + self.question
        return text if self.audio is None else (text, self.audio)

    def __str__(self):
        return self.question


def read_problems(file, instruction="", few_shot="", needed_by=None):
    """The problems in a file of JSON lines with a text `question` or `prompt` and maybe an `answer`: a number, or a text, of
    which "#### 42" or \\boxed{42} counts where it has that. In a .txt file every line is a prompt, unless it starts as JSON.

    instruction   put behind every question
    few_shot      put before every question in its prompt
    needed_by     name of a reward that needs an answer

    Raises InputError naming file and line.
    """
    if Path(file).suffix.lower() == ".txt" and files.read_text(file).lstrip()[:1] not in ("{", "["):
        lines = enumerate(files.read_text(file).split("\n"), 1)
        rows = [(number, {"prompt": line.strip()}) for number, line in lines if line.strip()]
    else:
        rows = files.read_json_lines(file)
    problems = []
    for line, row in rows:
        question, answer = row.get("question", row.get("prompt")), row.get("answer")
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"{file}, line {line}: expected an object with a text under 'question' or 'prompt'")
        answer = gold(str(answer)) if isinstance(answer, str | int | float) else None
        answer = None if answer == "" else answer
        if needed_by and answer is None:
            raise InputError(f"{file}, line {line}: expected a text or number under 'answer'; the reward {needed_by} needs it")
        problems.append(Problem(question + instruction, answer, row, few_shot))
    if not problems:
        raise InputError(f"{file}: no problems; expected a JSON object on every line")
    return problems


def needs_answers(specs):
    """The first of the rewards on a command line that needs an answer, or None."""
    return next((name for name, _ in map(weighted, specs) if name in NEED_ANSWERS), None)


def exact(completions, problems):
    """[0.0 or 1.0]: which completions are right; None where a problem has no answer."""
    if any(problem.answer is None for problem in problems):
        return None
    return [exact_answer(text, problem.answer) for text, problem in zip(completions, problems)]


def right(completions, problems):
    """[0.0 or 1.0]: which completions are right, as `choice` says of problems with choices and `exact` of others; None where a
    problem has no answer."""
    return (of_choices.choice if all(problem.choices for problem in problems) else exact)(completions, problems)


def math():
    """The reward of that name."""
    expressions = Expressions()

    def equal(completion, answer):
        text = after_thought(completion)
        stated = stated_answer(text)
        return expressions.equal(text if stated is None else f"\\boxed{{{stated}}}", f"\\boxed{{{answer}}}")

    def reward(completions, problems):
        pairs = zip(completions, problems, exact(completions, problems))
        return [right or float(equal(text, problem.answer)) for text, problem, right in pairs]

    return reward


def stated(completions, problems):
    return [states_answer(text) for text in completions]


def own(function):
    """A user's reward or judge, (prompts, completions) or (prompts, completions, rows), as a function (completions, problems).
    It takes rows if it has a parameter of that name or a third one without a default."""
    parameters = inspect.signature(function).parameters
    needed = [each for each in parameters.values() if each.default is each.empty and each.kind <= each.POSITIONAL_OR_KEYWORD]

    def call(completions, problems):
        questions, rows = [problem.question for problem in problems], [problem.row for problem in problems]
        if "rows" in parameters:
            return function(questions, completions, rows=rows)
        return function(questions, completions, *([rows] if len(needed) > 2 else []))

    return call


PLAIN = {  # rewards without a folder
    "exact": lambda: exact,
    "format": lambda: stated,
    "math": math,
    "choice": lambda: of_choices.choice,
    "answer_format": lambda: of_choices.answer_format,
}


def parse(specs, device=None, batch=16, autocast=contextlib.nullcontext, system=None, thinking=None):
    """The rewards of completions that a command line names: called with N completions and their N problems. A reward model
    reads `batch` of them at a time, on `device` and inside `autocast()`; system, thinking: see RewardModelScore. Raises
    InputError naming the one that is wrong."""
    models = {"reward_model": lambda folder: RewardModelScore(folder, device, batch, autocast, system, thinking)}
    return Rewards(named(specs, models, PLAIN, own))


class RewardModelScore:
    """A reward model's numbers. It reads system message, question and completion as one conversation where its folder has a
    chat template, which may read `thinking`, else question and completion one behind the other, by its own tokenizer. It stays
    on `device`, in float32."""

    def __init__(self, path, device=None, batch=16, autocast=contextlib.nullcontext, system=None, thinking=None):
        self.model = RewardModel.from_pretrained(path, torch.float32, device).requires_grad_(False)
        self.device, self.batch, self.autocast, self.system, self.path = device, batch, autocast, system, path
        with about(f"--reward {path}"):
            self.tokenizer, self.template = chat.tokenizer_of(self.model), chat.template_of(self.model, thinking=thinking)
            self.conversations(["?"], ["!"])  # a template that takes no system message says so now

    @torch.no_grad()
    def __call__(self, completions, problems):
        with about(f"--reward {self.path}"):
            texts = self.conversations([problem.question for problem in problems], completions)
            ids, mask = chat.encode_prompts(
                self.tokenizer, texts, self.model.config.positions, self.model.config.vocab_size,
                special=not self.template, device=self.device,
            )  # fmt: skip
        with self.autocast():
            return torch.cat([self.model(*rows) for rows in zip(ids.split(self.batch), mask.split(self.batch))])

    def conversations(self, questions, completions):
        if not self.template:
            return [question + completion for question, completion in zip(questions, completions)]
        turns = [chat.conversation(question, self.system, text) for question, text in zip(questions, completions)]
        return self.template(turns, add_generation_prompt=False)
