"""training/checkpoint.py: what is written and read again, which checkpoints stay, what a fingerprint sees."""

import argparse
from typing import NamedTuple

import pytest
import torch

from nano_adrpo.errors import InputError
from nano_adrpo.files import values
from nano_adrpo.training import checkpoint
from nano_adrpo.training.life import Life
from nano_adrpo.training.step import MovingAverage


def parts(seed):
    """A small network that has been trained a little, and what belongs to it. One of its weights never has a gradient."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1), torch.nn.Linear(1, 1))
    network[2].bias.requires_grad_(False)
    optimizer, ema = (
        torch.optim.AdamW([p for p in network.parameters() if p.requires_grad]),
        MovingAverage(network.parameters(), 0.5),
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        network[:2](torch.randn(4, 2, generator=generator)).sum().backward()
        optimizer.step()
        ema.update()
    optimizer.zero_grad()
    return network, optimizer, ema, {"draws": generator}


def memory(round):
    return {"round": round, "logs": {}}


def test_what_is_saved_comes_back_and_the_next_step_is_the_same(tmp_path):
    first, second = parts(0), parts(1)
    checkpoint.save(tmp_path, memory(3), checkpoint.tensors_of(*first))
    checkpoint.restore(tmp_path, memory(3), *second)
    names = checkpoint.tensors_of(*first).keys()
    assert {"parameter.0.weight", "average.1.bias", "optimizer.0.weight.exp_avg_sq", "generator.draws"} < names
    assert not {"parameter.2.bias", "optimizer.2.weight.step"} & names
    for network, optimizer, _, generators in (first, second):
        network(torch.randn(4, 2, generator=generators["draws"])).sum().backward()
        optimizer.step()
    ours, theirs = checkpoint.tensors_of(*first), checkpoint.tensors_of(*second)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_generators_of_another_kind_of_device_are_refused(tmp_path):
    state = checkpoint.tensors_of(*parts(0))
    state["generator.draws"] = state["generator.draws"][:16]  # a GPU's state has 16 bytes
    checkpoint.save(tmp_path, memory(3), state)
    with pytest.raises(InputError, match=f"--device cpu: the run in {tmp_path} draws on another kind of device"):
        checkpoint.restore(tmp_path, memory(3), *parts(0))


def test_another_network_is_refused(tmp_path):
    checkpoint.save(tmp_path, memory(3), checkpoint.tensors_of(*parts(0)))
    network, *others = parts(0)
    network[0] = torch.nn.Linear(5, 3)
    with pytest.raises(
        InputError, match=r"step-3/state.safetensors: key 'parameter.0.weight' has shape \[3, 2\]; expected \[3, 5\]"
    ):
        checkpoint.restore(tmp_path, memory(3), network, *others)


class Pair(NamedTuple):
    left: torch.Tensor
    right: object


def test_a_memory_of_numbers_and_tensors_comes_back():
    value = {"first": [1, 0.1, None, "x"], 7: {"pair": Pair(torch.arange(3), (True, torch.ones(2)))}}
    tensors = {}
    text = values.split(value, "memory", tensors)
    assert tensors.keys() == {"memory.7.pair.left", "memory.7.pair.right.1"}
    back = values.join(text, tensors.get)
    assert back["first"] == value["first"] and back["7"]["pair"]["right"][0] is True
    assert torch.equal(back["7"]["pair"]["left"], torch.arange(3)) and torch.equal(back["7"]["pair"]["right"][1], torch.ones(2))


@pytest.mark.parametrize(
    "options, kept",
    [({}, {6, 7}), ({"checkpoint_every": 2}, {6, 7}), ({"checkpoint_every": 5}, {5, 7}),
     ({"checkpoint_every": 1, "keep_every": 3}, {0, 3, 6, 7}), ({"rounds": 6}, {3, 6})],
)  # fmt: skip
def test_checkpoints_are_written_when_due_and_the_last_two_and_some_stay(tmp_path, options, kept):
    args = {"checkpoint_every": None, "eval_every": 3, "keep_every": None, "rounds": 7} | options
    for round in range(args["rounds"] + 1):
        checkpoint.save_if_due(argparse.Namespace(**args), Life(), tmp_path, round, memory(round), *parts(0))
    assert checkpoint.steps(tmp_path).keys() == kept and {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        f"step-{number}" for number in kept
    }


def test_a_fingerprint_sees_content_not_place(tmp_path):
    def folder(name, **contents):
        (tmp_path / name).mkdir()
        for file, content in contents.items():
            (tmp_path / name / f"{file}.safetensors").write_bytes(content)
        return checkpoint.fingerprint(tmp_path / name)

    large = bytes(17 * 2**20)
    marks = [
        folder("a", x=b"1", y=large),
        folder("b", x=b"2", y=large),
        folder("c", x=b"1", z=large),
        folder("d", x=b"1", y=large[1:]),
    ]
    marks.append(folder("e", x=b"1", y=large[:-1] + b"1"))
    assert len({*marks}) == 5 and folder("f", x=b"1", y=large) == marks[0]
    (tmp_path / "a" / "notes.md").write_text("mine")
    assert checkpoint.fingerprint(tmp_path / "a") == marks[0]
    (tmp_path / "g.safetensors").write_bytes(b"1")
    assert checkpoint.fingerprint(tmp_path / "g.safetensors") not in (None, *marks)
    assert checkpoint.fingerprint(tmp_path / "nowhere") is None
