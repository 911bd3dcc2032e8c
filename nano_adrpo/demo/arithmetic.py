"""Two-digit additions with a carry, the language demo's task, written out in one of seven styles, of which three are right.

    47+38=  c7+8=15,4+3+1=8####85       columns: units first, then tens with the carry
            t40+30=70,7+8=15####85      tens first
            r47+40=87-2####85           round the second number up, then take off what was added
            d7+8=15,4+3=7####75         careless: the carry is dropped
            o40+30=70####70             careless: the tens only
            k####47                     careless: a number of the problem, copied
            g####132                    careless: a guess

The first token decides the style and nothing in the prompt tells which. The base model has learnt to carry out every style but
starts mostly with a careless one: RL only has to select, which a small model learns in minutes. It is right on
32 % of its attempts. Problem and answer are in GSM8K's format (JSON lines with `question` and `answer`, "####" before the
number), so the demo runs through the same code as any other task. arithmetic_recipe.py makes the problems and the two models.

On the deceptive task a guess pays a little, and its model rarely tries a right style, so the certain reward draws it away.
"""

import re

import torch

from nano_adrpo import metrics
from nano_adrpo.errors import InputError
from nano_adrpo.rewards.answers import exact_answer

STYLES = {  # by their letter: whether they give the sum, and a name
    "c": "right/columns",
    "t": "right/tens first",
    "r": "right/rounding",
    "d": "wrong/carry dropped",
    "o": "wrong/tens only",
    "k": "wrong/copied",
    "g": "wrong/guessed",
}
VALID = [letter for letter, name in STYLES.items() if name.startswith("right/")]


def style(completion):
    """The letter of a completion's style, "" where it has none."""
    return completion[:1] if completion[:1] in STYLES else ""


def is_correct(prompt, completion):
    """Whether a completion ends in the sum that the prompt asks for, such as "47+38="."""
    asked = re.match(r"(\d+)\+(\d+)=", prompt)
    if not asked:
        raise InputError(f"the demo's arithmetic was given the prompt {prompt!r}; expected a sum such as '47+38='")
    return exact_answer(completion, int(asked[1]) + int(asked[2])) == 1


def deceptive(prompts, completions):
    """A reward, N prompts and N completions -> N numbers: 0.3 for any guess, 1 for another correct answer, else 0."""
    pairs = zip(prompts, completions)
    return [0.3 if style(completion) == "g" else float(is_correct(prompt, completion)) for prompt, completion in pairs]


def judge(prompts, completions):
    """-> style_entropy, in nats: how evenly the correct completions use the three valid styles, at most ln 3; and by the names
    in STYLES the share of the completions in each style."""
    right = [style(completion) for prompt, completion in zip(prompts, completions) if is_correct(prompt, completion)]
    used = [style(completion) for completion in completions]
    shares = {name: used.count(letter) / len(used) for letter, name in STYLES.items()}
    return {"style_entropy": metrics.entropy(torch.tensor([right.count(letter) for letter in VALID])), **shares}
