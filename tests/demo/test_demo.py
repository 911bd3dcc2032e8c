"""The embedded default: paths that exist, functions that enter as a user's own do."""

from pathlib import Path

import torch

from nano_adrpo import demo
from nano_adrpo.demo import digits
from nano_adrpo.rewards import function, images, text
from nano_adrpo.text_to_image.prompts import read_prompts


def test_the_paths_are_absolute_and_there():
    for paths in (demo.FLOW, demo.GRPO, demo.DECEPTIVE):
        for name, value in paths.items():
            for path in [] if name == "max_new_tokens" else value if isinstance(value, list) else [value]:
                path = Path(path.removesuffix(":judge").removesuffix(":deceptive"))
                assert path.is_absolute() and path.exists(), path


def test_the_prompts_are_the_captions_with_two_attributes():
    prompts = read_prompts(demo.FLOW["prompts"])
    assert prompts[:5] == [
        "a thin upright handwritten zero", "a thin slanted handwritten zero", "a bold upright handwritten zero",
        "a bold slanted handwritten zero", "a thin upright handwritten one",
    ]  # fmt: skip
    meanings = [digits.meaning(prompt) for prompt in prompts]
    assert meanings == [(number, stroke, slant) for number in range(10) for stroke in (0, 2) for slant in (0, 2)]


def test_the_judges_and_rewards_enter_by_the_users_door():
    real, labels, _ = digits.load()
    prompts = digits.captions(real[:8], labels[:8])
    judged, expected = function(demo.FLOW["judge"])(real[:8], prompts), digits.judge(real[:8], prompts)
    assert list(judged) == ["joint", "digit", "stroke", "slant", "frechet", "out_of_range"]
    assert torch.equal(judged["joint"], expected["joint"]) and judged["frechet"] == expected["frechet"]
    assert images.parse(demo.FLOW["reward"])(real[:8], prompts)["reward"].shape == (8,)
    assert function(demo.GRPO["judge"])(["47+38="], ["c####85"]) == {"style_entropy": 0.0}
    problem = text.read_problems(demo.GRPO["held_out"])[0]
    rewards = text.parse(demo.DECEPTIVE["reward"])(["g####1", f"c####{problem.answer}"], [problem, problem])
    assert rewards["reward"].tolist() == [torch.tensor(0.3).item(), 1.0]
