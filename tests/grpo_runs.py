"""Runs of train_grpo.py that the tests of its loop and of its options share."""

import json
import shutil
from pathlib import Path

import pytest

import train_grpo
from nano_adrpo import demo

ROOT = Path(train_grpo.__file__).parent
BASE = Path(demo.GRPO["model"])
SMALL = "--rounds 3 --prompts-per-round 4 --group-size 4 --eval-every 2 --eval-samples 1".split()


def train(out, *options):
    return train_grpo.main([*SMALL, "--out", str(out), *map(str, options)])


def jsonl(file, *pairs):
    """A file of GSM8K's format with these questions and answers."""
    file.write_text("".join(json.dumps({"question": q, "answer": f"so it is\n#### {a}"}) + "\n" for q, a in pairs))
    return file


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A run of one round on a few problems, without pictures; -> a function of its folder's name and more options."""
    monkeypatch.setattr(train_grpo.plots, "pyplot", lambda file: None)
    train_file = jsonl(tmp_path / "train.jsonl", ("17+48=", 65), ("29+34=", 63), ("57+36=", 93), ("88+13=", 101))
    held_out = jsonl(tmp_path / "test.jsonl", ("38+45=", 83), ("19+19=", 38), ("66+27=", 93), ("75+18=", 93))
    files = ["--problems", train_file, "--held-out", held_out]
    sizes = "--rounds 1 --prompts-per-round 2 --group-size 4 --eval-samples 2 --lr 3e-3".split()

    def run(name, *options):
        train_grpo.main([*sizes, *map(str, files), "--out", str(tmp_path / name), *map(str, options)])
        return tmp_path / name

    return run


def edited(path, **changes):
    """A copy of the demo's model in which keys of these JSON files are changed; a change to None leaves the key out."""
    shutil.copytree(BASE, path)
    for name, values in changes.items():
        values = {**json.loads((path / f"{name}.json").read_text()), **values}
        (path / f"{name}.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return path


def watch(monkeypatch):
    """Lets a run record {"policy": …, "rollouts": [Rollout], "gradients": [{name: tensor}], before clipping}."""
    seen = {"rollouts": [], "gradients": [], "policy": None}
    roll_out, step, open_policy = train_grpo.roll_out, train_grpo.optimizer_step, train_grpo.open_policy

    def opened(*args):
        policy, *others = open_policy(*args)
        seen["policy"] = policy
        return policy, *others

    def rolled(*args, **kwargs):
        seen["rollouts"].append(roll_out(*args, **kwargs))
        return seen["rollouts"][-1]

    def stepped(*args):
        parameters = seen["policy"].named_parameters()
        seen["gradients"].append({name: p.grad.clone() for name, p in parameters if p.grad is not None})
        return step(*args)

    monkeypatch.setattr(train_grpo, "open_policy", opened)
    monkeypatch.setattr(train_grpo, "roll_out", rolled)
    monkeypatch.setattr(train_grpo, "optimizer_step", stepped)
    return seen
