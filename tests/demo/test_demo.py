"""The embedded default: paths that exist, functions that enter as a user's own do."""

import sys
from pathlib import Path

import pytest
import torch

from nano_adrpo import demo
from nano_adrpo.demo import arithmetic_recipe, digits, digits_recipe
from nano_adrpo.errors import InputError
from nano_adrpo.rewards import function, images, text


def test_the_paths_are_absolute_and_there():
    for paths in (demo.FLOW, demo.GRPO, demo.DECEPTIVE):
        for name, value in paths.items():
            for path in [] if name == "max_new_tokens" else value if isinstance(value, list) else [value]:
                path = Path(path.removesuffix(":judge").removesuffix(":deceptive").removesuffix(":tints@0"))
                assert path.is_absolute() and path.exists(), path


def test_the_judges_and_rewards_enter_by_the_users_door():
    prompts = ["a red seven", "a blue one above a green nine", "a green nine and a blue one"]
    drawn = digits_recipe.Painter(torch.Generator().manual_seed(0)).paint([digits.meaning(prompt) for prompt in prompts[:2]])
    drawn = drawn[[0, 1, 1]]
    judged, expected = function(demo.FLOW["judge"])(drawn, prompts), digits.judge(drawn, prompts)
    names = ["joint", "digits", "colours", "binding", "place", "frechet", "out_of_range"]
    assert [name for name in judged if "/" not in name] == names
    assert judged["joint"].tolist() == [True] * 3 and judged["frechet"] == expected["frechet"]
    assert images.parse(demo.FLOW["reward"])(drawn, prompts)["reward"].shape == (3,)
    judged = function(demo.GRPO["judge"])(["47+38=", "1+2="], ["c####85", "g####9"])
    assert judged.pop("style_entropy") == 0 and sum(judged.values()) == 1
    assert judged["right/columns"] == judged["wrong/guessed"] == 0.5
    problem = text.read_problems(demo.GRPO["held_out"])[0]
    rewards = text.parse(demo.DECEPTIVE["reward"])(["g####1", f"c####{problem.answer}"], [problem, problem])
    assert rewards["reward"].tolist() == [torch.tensor(0.3).item(), 1.0]


@pytest.mark.parametrize("recipe", [arithmetic_recipe, digits_recipe])
def test_a_recipe_reads_its_options_first_and_writes_into_a_folder_of_its_own(tmp_path, monkeypatch, capsys, recipe):
    monkeypatch.chdir(tmp_path)
    for words, code in ((["--help"], 0), (["--bogus"], 2), (["x"], 2)):
        monkeypatch.setattr(sys, "argv", ["recipe", *words])
        with pytest.raises(SystemExit) as stop:
            recipe.main()
        assert stop.value.code == code
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    monkeypatch.setattr(sys, "argv", ["recipe", "--out", "used"])
    with pytest.raises(InputError, match="the folder is not empty"):
        recipe.main()
    assert {path.name for path in tmp_path.rglob("*")} == {"used", "thesis.txt"}
    assert "(default: runs/" in " ".join(capsys.readouterr().out.split())
