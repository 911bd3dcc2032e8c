"""Rewards of text: is the final number right, is it stated as asked, and what does a reward model say.

On the command line they are `exact`, `format`, reward_model:FOLDER in RM-Gemma-2B's layout, or a function of your own,
FILE.py:FUNCTION, for example in mine.py

    def short(prompts, completions):
        '''0 for no text, −1 for a hundred characters.'''
        return [-len(completion) / 100 for completion in completions]

with which `--reward exact mine.py:short@0.1` takes a tenth of a point for every hundred characters.
"""

import contextlib
from fractions import Fraction
from typing import NamedTuple

import torch

from nano_adrpo import files
from nano_adrpo.errors import InputError, about
from nano_adrpo.language import chat
from nano_adrpo.models.decoder import RewardModel
from nano_adrpo.rewards import Rewards, named
from nano_adrpo.rewards.answers import exact_answer, number, states_answer


class Problem(NamedTuple):
    question: str
    answer: Fraction

    def __str__(self):
        return self.question


def read_problems(file, instruction=""):
    """The problems in a file of GSM8K's format: JSON lines with `question` and `answer`, a text whose number follows "####".
    `instruction` is put behind every question. Raises InputError naming file and line."""
    problems = []
    for line, values in files.read_json_lines(file):
        for key in ("question", "answer"):
            if not isinstance(values.get(key), str) or not values[key].strip():
                raise InputError(f"{file}, line {line}: expected an object with a text under '{key}'")
        _, marker, stated = values["answer"].rpartition("####")
        answer = number(stated) if marker else None
        if answer is None:
            raise InputError(f"{file}, line {line}: 'answer' has no number after '####'")
        problems.append(Problem(values["question"] + instruction, answer))
    if not problems:
        raise InputError(f"{file}: no problems; expected a JSON object on every line")
    return problems


def exact(completions, problems):
    return [exact_answer(text, problem.answer) for text, problem in zip(completions, problems)]


def stated(completions, problems):
    return [states_answer(text) for text in completions]


PLAIN = {"exact": exact, "format": stated}  # rewards that need no model


def parse(specs, device=None, batch=16, autocast=contextlib.nullcontext):
    """The rewards of completions that a command line names: called with N completions and their N problems. A reward model
    reads `batch` of them at a time, on `device` and inside `autocast()`. Raises InputError naming the one that is wrong."""

    def own(function):
        return lambda completions, problems: function([problem.question for problem in problems], completions)

    models = {"reward_model": lambda folder: RewardModelScore(folder, device, batch, autocast)}
    return Rewards(named(specs, models, PLAIN, own))


class RewardModelScore:
    """A reward model's numbers. It reads question and completion as one conversation where its folder has a chat template, else
    one behind the other, by its own tokenizer. It stays on `device`, in float32."""

    def __init__(self, path, device=None, batch=16, autocast=contextlib.nullcontext):
        self.model = RewardModel.from_pretrained(path, torch.float32, device).requires_grad_(False)
        with about(f"--reward {path}"):
            self.tokenizer, self.template = chat.tokenizer_of(self.model), chat.template_of(self.model)
        self.device, self.batch, self.autocast = device, batch, autocast

    @torch.no_grad()
    def __call__(self, completions, problems):
        texts = [self.conversation(problem.question, text) for text, problem in zip(completions, problems)]
        longest = self.model.config.max_position_embeddings
        ids, mask = chat.encode_prompts(self.tokenizer, texts, longest, special=not self.template, device=self.device)
        with self.autocast():
            return torch.cat([self.model(*rows) for rows in zip(ids.split(self.batch), mask.split(self.batch))])

    def conversation(self, question, completion):
        if not self.template:
            return question + completion
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": completion}]
        return self.template(turns, add_generation_prompt=False)
