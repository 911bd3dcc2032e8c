"""Integrators and time grids: observed orders, exact cases, the law of the samples."""

import math

import pytest
import torch

from nano_adrpo import ode

ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4}


@pytest.mark.parametrize("method", ORDERS)
def test_observed_order(method):
    # dx/dt = x·cos t, x(0) = 1: x(1) = exp(sin 1). Halving the step divides the error by 2^order.
    def error(steps):
        x0 = torch.ones(1, dtype=torch.float64)
        x1 = ode.sample(lambda x, t: x * torch.cos(t), x0, ode.time_grid(steps, dtype=torch.float64), method)
        return abs(x1.item() - math.exp(math.sin(1)))

    assert math.log2(error(32) / error(64)) == pytest.approx(ORDERS[method], abs=0.1)


@pytest.mark.parametrize("method", ORDERS)
def test_evaluations_per_step(method):
    calls = []
    ode.sample(lambda x, t: calls.append(float(t)) or x, torch.ones(1), ode.time_grid(5), method)
    assert len(calls) == 5 * ode.EVALUATIONS[method] and min(calls) == 0 and max(calls) <= 1


@pytest.mark.parametrize("method", ORDERS)
def test_a_constant_velocity_is_exact_on_any_grid(method):
    x0 = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    states = ode.sample(
        lambda x, t: torch.full_like(x, 3.0), x0, ode.time_grid(7, shift=3.0, dtype=torch.float64), method, trajectory=True
    )
    assert states.shape == (8, 1, 2) and torch.equal(states[0], x0)
    assert torch.allclose(states[-1], x0 + 3)


def test_time_grid_by_hand():
    assert ode.time_grid(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    # σ = 1, 2/3, 1/3, 0 under 3σ/(1 + 2σ): 1, 6/7, 3/5, 0
    assert ode.time_grid(3, shift=3.0, dtype=torch.float64).tolist() == pytest.approx([0, 1 / 7, 2 / 5, 1])


def test_sd3s_time_grid_by_hand():
    # Shift 3: the smallest σ is 0.003/1.002; 1, (1 + it)/2, it under 3σ/(1 + 2σ) once more; then 0.
    smallest = 0.003 / 1.002
    sigma = [1, *(3 * s / (1 + 2 * s) for s in ((1 + smallest) / 2, smallest)), 0]
    grid = ode.sd3_time_grid(3, shift=3.0, dtype=torch.float64)
    assert grid.tolist() == pytest.approx([1 - s for s in sigma], abs=1e-15)
    assert 1 - grid[-2].item() == pytest.approx(0.008929, abs=1e-6)  # where diffusers' 28 steps at shift 3 end, too
    assert ode.sd3_time_grid(1).tolist() == [0, 1]
    assert ode.sd3_time_grid(3, shift=1.0).tolist() == pytest.approx([0, 0.4995, 0.999, 1])


@pytest.mark.parametrize("grid", [ode.time_grid, ode.sd3_time_grid])
def test_grids_refuse_what_makes_no_sense(grid):
    for steps in (0, -2):
        with pytest.raises(ValueError, match=f"steps is {steps}; expected at least 1"):
            grid(steps)
    with pytest.raises(ValueError, match="shift is 0; expected a positive number"):
        grid(3, 0)


@pytest.mark.parametrize("steps", [1, 2, 10, 28, 1000])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
def test_time_grid_increases_from_zero_to_one(steps, shift):
    times = ode.time_grid(steps, shift)
    assert times.shape == (steps + 1,) and times[0] == 0 and times[-1] == 1 and (times.diff() > 0).all()


@pytest.mark.parametrize("arguments", [(0,), (-1,), (4, 0.0), (4, -1.0), (4, float("nan"))])
def test_a_bad_grid_is_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        ode.time_grid(*arguments)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="'rk45'; expected one of euler, heun, midpoint, rk4"):
        ode.sample(lambda x, t: x, torch.ones(1), ode.time_grid(1), "rk45")


def test_guidance_by_hand_and_at_its_neutral_scale():
    conditional, unconditional = (lambda x, t: x + 2), (lambda x, t: x)
    assert ode.guide(conditional, unconditional, 4.0)(torch.tensor([1.0]), 0.0).item() == 1 + 4 * 2
    assert ode.guide(conditional, unconditional, 0.0)(torch.tensor([1.0]), 0.0).item() == 1
    assert ode.guide(conditional, unconditional, 1) is conditional


def test_euler_on_the_exact_gaussian_velocity_reaches_the_right_law():
    # Data N(m, s²): the exact flow maps x0 to m + s·x0. Euler's error falls linearly with the step.
    m, s = 1.5, 0.6

    def velocity(x, t):
        d = (1 - t) ** 2 + s**2 * t**2
        return m + (s**2 * t - (1 - t)) / d * (x - t * m)

    x0 = torch.linspace(-3, 3, 13, dtype=torch.float64)
    errors = [
        (ode.sample(velocity, x0, ode.time_grid(steps, dtype=torch.float64)) - (m + s * x0)).abs().max().item()
        for steps in (50, 100, 200)
    ]
    assert (
        errors[2] < 0.03
        and errors[0] / errors[1] == pytest.approx(2, abs=0.1)
        and errors[1] / errors[2] == pytest.approx(2, abs=0.05)
    )
