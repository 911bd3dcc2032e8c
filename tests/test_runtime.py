"""runtime.py: the moving average against its closed form, phases of a round."""

import re

import pytest
import torch

from nano_adrpo import runtime


def test_the_moving_average_is_the_geometric_sum():
    model = torch.nn.Linear(1, 1, bias=False)
    values, decay = [3.0, -1.0, 5.0, 2.0], 0.75
    model.weight.data.fill_(values[0])
    average = runtime.MovingAverage(model.parameters(), decay)
    for value in values[1:]:
        model.weight.data.fill_(value)
        average.update()
    expected = decay**3 * 3.0 + 0.25 * (decay**2 * -1.0 + decay * 5.0 + 2.0)
    with average.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 2.0


def test_the_moving_average_leaves_the_weights_after_an_error_and_passes_over_frozen_ones():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    average = runtime.MovingAverage(model.parameters(), 0.5)
    assert [p.shape for p in average.average] == [(2, 2)]
    before = model.weight.detach().clone()
    model.weight.data += 1
    average.update()
    with pytest.raises(RuntimeError, match="inside"), average.applied():
        assert torch.allclose(model.weight, before + 0.5)
        raise RuntimeError("inside")
    assert torch.equal(model.weight, before + 1)


def test_no_decay_keeps_no_average():
    model = torch.nn.Linear(2, 2)
    average = runtime.MovingAverage(model.parameters(), 0)
    model.weight.data += 1
    average.update()
    weight = model.weight.detach().clone()
    with average.applied():
        assert torch.equal(model.weight, weight)
    assert average.average == []


def test_phases_add_up_and_start_anew():
    phases = runtime.Phases("cpu")
    for name in ("rollout", "update", "rollout"):
        with phases(name):
            torch.ones(10).sum()
    line = phases.take()
    assert re.fullmatch(r"rollout \d+\.\d\d s \d+\.\d GiB  update \d+\.\d\d s \d+\.\d GiB", line)
    assert float(line.split()[3]) > 0.05  # the process itself
    assert phases.take() == ""


@pytest.mark.cuda
def test_phases_tell_the_most_memory_of_each():
    phases = runtime.Phases("cuda")
    for name, size in (("large", 2**28), ("small", 2**20)):
        with phases(name):
            torch.empty(size, device="cuda").fill_(1)
    large, small = (float(word) for word in phases.take().split()[3::5])
    assert large > 0.9 > small
