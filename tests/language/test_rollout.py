"""A rollout: which prompts the policy reads, and what of its text is the completion."""

from types import SimpleNamespace

import pytest
import torch

from nano_adrpo.language.rollout import roll_out, score_all
from nano_adrpo.rewards.answers import exact_answer
from nano_adrpo.rewards.text import Problem


class Letters:
    """A codec whose tokens are characters."""

    eos, ended = [0], None

    def encode(self, prompts, longest, device):
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + [*map(ord, prompt)] for prompt in prompts])
        return ids, (ids > 0).long()

    def clips(self, prompts):
        return None

    def decode(self, ids, mask, cut=True):
        return ["".join(chr(index) for index in row[keep.bool()]) for row, keep in zip(ids, mask)]


def model(completion):
    def generate(ids, mask, max_new_tokens, eos, ended, generator, clips, temperature):
        new = torch.tensor([[*map(ord, completion)]] * len(ids))
        return torch.cat([ids, new], dim=1), torch.ones_like(new)

    return SimpleNamespace(generate=generate, model=SimpleNamespace(embed_tokens=SimpleNamespace(weight=torch.zeros(1))))


@pytest.mark.parametrize("completion, right", [("5 is 42", 0), ("5</think>42", 1), ("42</think>", 0)])
def test_a_thought_that_the_prompt_opens_is_part_of_the_text(completion, right):
    # As the templates of some thinking models end. Such a completion that was cut off has no answer.
    problems = [Problem("2+40<think>\n"), Problem("a question"), Problem("b", few_shot="<think></think>\n\n")]
    rollout = roll_out(model(completion), Letters(), problems, 20, 100, temperature=1.0)
    assert rollout.texts == ["<think>" + completion, completion, completion]
    assert exact_answer(rollout.texts[0], 42) == right
    assert Letters().decode(rollout.ids, rollout.seen)[2] == "<think></think>\n\nb" + completion


def test_a_stop_text_in_the_prompt_hides_no_thought():
    class Stopping(Letters):
        def decode(self, ids, mask, cut=True):
            return [text.partition("k>")[0] if cut else text for text in super().decode(ids, mask)]

    rollout = roll_out(model("ok>42"), Stopping(), [Problem("2+40<think>\n")], 20, 100, temperature=1.0)
    assert rollout.texts == ["<think>o"]


@pytest.mark.parametrize("padded", [False, True])
def test_rows_without_padding_on_the_left_need_no_mask(padded):
    prompts, masks = ["ab", "a" if padded else "cd"], []
    drawn = roll_out(model("xy"), Letters(), [Problem(prompt) for prompt in prompts], 20, 100, temperature=1.0)
    scorer = SimpleNamespace(token_logprobs=lambda ids, mask, *_: masks.append(mask) or ids[:, -2:].float())
    assert score_all(scorer, drawn, 1).tolist() == [[ord("x"), ord("y")]] * 2
    assert [mask if mask is None else mask.tolist() for mask in masks] == (
        [[[1] * 4], [[0, 1, 1, 1]]] if padded else [None] * 2
    )
