"""training/step.py: the moving average against its closed form, the schedule, clipping, the reference."""

import argparse

import pytest
import torch

from nano_adrpo import lora
from nano_adrpo.errors import NotFinite
from nano_adrpo.training.step import MovingAverage, learning_rate, optimizer_step, reference_of, set_learning_rate


def test_the_moving_average_is_the_geometric_sum():
    model = torch.nn.Linear(1, 1, bias=False)
    values, decay = [3.0, -1.0, 5.0, 2.0], 0.75
    model.weight.data.fill_(values[0])
    ema = MovingAverage(model.parameters(), decay)
    for value in values[1:]:
        model.weight.data.fill_(value)
        ema.update()
    expected = decay**3 * 3.0 + 0.25 * (decay**2 * -1.0 + decay * 5.0 + 2.0)
    with ema.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 2.0


def test_the_moving_average_leaves_the_weights_after_an_error_and_passes_over_frozen_ones():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    ema = MovingAverage(model.parameters(), 0.5)
    assert [p.shape for p in ema.average] == [(2, 2)]
    before = model.weight.detach().clone()
    model.weight.data += 1
    ema.update()
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        assert torch.allclose(model.weight, before + 0.5)
        raise RuntimeError("inside")
    assert torch.equal(model.weight, before + 1)


def test_no_decay_keeps_no_average():
    model = torch.nn.Linear(2, 2)
    ema = MovingAverage(model.parameters(), 0)
    model.weight.data += 1
    ema.update()
    weight = model.weight.detach().clone()
    with ema.applied():
        assert torch.equal(model.weight, weight)
    assert ema.average == []


def options(**changes):
    values = {"lr": 2.0, "rounds": 10, "lr_schedule": "constant", "lr_hold": 0.0, "lr_end": 0.0, "warmup": 0, "clip_grad": 1.0}
    return argparse.Namespace(**values | changes)


def test_the_learning_rate_rises_holds_and_falls():
    def rates(**changes):
        return [learning_rate(options(**changes), round) for round in range(1, 11)]

    assert rates() == [2.0] * 10
    assert rates(warmup=4) == pytest.approx([0.5, 1.0, 1.5] + [2.0] * 7)
    assert rates(lr_schedule="linear") == pytest.approx([2.0 * (10 - k) / 10 for k in range(10)])
    assert rates(lr_schedule="linear", lr_hold=0.5) == pytest.approx([2.0] * 6 + [1.6, 1.2, 0.8, 0.4])
    assert rates(lr_schedule="linear", lr_hold=0.5, lr_end=0.5)[-1] == pytest.approx(2 * (1 - 0.5 * 0.8))
    cosine = rates(lr_schedule="cosine", lr_end=0.1)
    assert cosine[0] == 2.0 and cosine[5] == pytest.approx(2 * (0.1 + 0.9 / 2))  # half-way down after half the rounds
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    assert set_learning_rate(optimizer, options(warmup=4), 1) == optimizer.param_groups[0]["lr"] == 0.5


def test_a_step_clips_the_gradient_zeroes_it_and_updates_the_average():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer, ema = torch.optim.SGD([weight], 1.0), MovingAverage([weight], 0.5)
    weight.grad = torch.tensor([3.0, 4.0])
    assert optimizer_step(optimizer, 0.1, options(clip_grad=0.5), ema) == (0.1, pytest.approx(5))
    assert torch.allclose(weight, torch.tensor([-0.3, -0.4])) and weight.grad is None  # a step of length 0.5
    assert torch.allclose(ema.average[0], torch.tensor([-0.15, -0.2]))
    for loss, grad in ((float("nan"), [1.0, 0.0]), (0.1, [float("inf"), 0.0])):
        weight.grad = torch.tensor(grad)
        with pytest.raises(NotFinite, match=r"loss .*, gradient norm"):
            optimizer_step(optimizer, loss, options(), ema)
        assert torch.allclose(weight, torch.tensor([-0.3, -0.4]))


@pytest.mark.parametrize("adapters", [None, "new", "trained"])
def test_the_reference_is_the_network_at_the_start_without_gradient(adapters):
    network, x = torch.nn.Sequential(torch.nn.Linear(3, 3)), torch.ones(1, 3)
    plain = network(x)
    if adapters:
        lora.add(network, ["0"], 2, 2)
    if adapters == "trained":
        torch.nn.init.ones_(network[0].lora_B.weight)
    start = network(x).detach()
    assert torch.equal(start, plain) == (adapters != "trained")
    reference = reference_of(network, bool(adapters))
    before = network(x)  # its backward pass comes after the reference, as in the scripts
    with torch.no_grad(), reference() as frozen:
        assert torch.equal(frozen(x), start)
    before.sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 1
    with reference() as frozen:
        y = frozen(x)
    assert torch.equal(y, start) and not y.requires_grad
    assert not torch.equal(network(x), start) and network(x).requires_grad
    assert (frozen is network) == bool(adapters)  # adapters: no second copy
