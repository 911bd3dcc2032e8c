"""Runs of train_flow.py that the tests of its loop and of its options share."""

from pathlib import Path

import pytest

import train_flow
from nano_adrpo import demo

ROOT = Path(train_flow.__file__).parent
SMALL = (
    "--rounds 3 --prompts-per-round 4 --group-size 4 --inner-steps 2 --ode-steps 4 --eval-every 2 --eval-samples 2 "
    "--eval-prompts 4 --beta-unit reward"
).split()
TINY = (
    "--rounds 1 --prompts-per-round 2 --group-size 2 --inner-steps 2 --ode-steps 2 --eval-samples 2 --beta-unit reward"
).split()
NEEDS = {"gardo-gate": ["--reward", *demo.FLOW["reward"], demo.FLOW["auxiliary"]]}  # options without which a method is refused


def train(out, *options):
    return train_flow.main([*SMALL, "--out", str(out), *map(str, options)])


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A run on two prompts, without pictures, which takes a moment; -> a function of its folder's name and more options."""
    monkeypatch.setattr(train_flow.plots, "pyplot", lambda file: None)
    (tmp_path / "two.txt").write_text("a green two\na blue nine\n")

    def run(name, *options):
        train_flow.main([*TINY, "--prompts", str(tmp_path / "two.txt"), "--out", str(tmp_path / name), *map(str, options)])
        return tmp_path / name

    return run
