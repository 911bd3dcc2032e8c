"""The experiments of `compare when`, and docs/theory.md's statements about exact rounds for data that are no Gaussian."""

import math

import pytest
import torch

from nano_adrpo import compare, errors, when
from nano_adrpo.when import bandit, exact, ring

BETA0 = 1.6
REFERENCE = exact.quantiles(exact.density(exact.GRID), 120)


def tanh(x):
    return (2 * x).tanh()


def law(weights):
    return exact.quantiles(weights, 120)


def test_quantiles_of_the_reference_are_those_of_its_distribution_function():
    # The mixture's own distribution function, by the error function: at the quantiles it gives their levels back.
    normal = torch.distributions.Normal(torch.tensor([-1.0, 1.2]).double(), torch.tensor([0.6, 0.5]).double())
    levels = normal.cdf(REFERENCE[:, None]) @ torch.tensor([0.7, 0.3]).double()
    assert torch.allclose(levels, (torch.arange(120).double() + 0.5) / 120, atol=1e-4)


def test_a_reward_without_differences_leaves_the_reference():
    end = exact.exact_round(REFERENCE, REFERENCE, torch.zeros_like, BETA0, math.inf, True)
    assert exact.distance(end, REFERENCE) < 0.01


@pytest.mark.parametrize("reward, clip", [(tanh, math.inf), (tanh, 0.5), (lambda x: (2 * x).sin(), math.inf)])
def test_rounds_end_at_the_forward_kls_law_and_not_at_the_reverse_kls(reward, clip):
    # T1. Both laws solve their own equation on a grid; nothing of the flow is in them.
    end = exact.rounds(6, REFERENCE, reward, BETA0, clip * BETA0, True)[-1]
    forward = exact.fixed_point(reward, BETA0, clip * BETA0, lambda p, A: p / (BETA0 - A))
    reverse = exact.fixed_point(reward, BETA0, clip * BETA0, lambda p, A: p * (A / BETA0).exp())
    assert exact.distance(end, law(forward)) < 0.009 < 0.018 < exact.distance(end, law(reverse))


def test_the_first_round():
    # A fixed β lands on p_ref·(1 + A/β); ADRPO does not land on p_ref·exp(R/β0), whose mean reward is 0.200.
    p, R = exact.density(exact.GRID), tanh(exact.GRID)
    p = p / p.sum()
    fixed, adaptive = (exact.exact_round(REFERENCE, REFERENCE, tanh, BETA0, math.inf, kind) for kind in (False, True))
    assert exact.distance(fixed, law(p * (1 + (R - p @ R) / BETA0))) < 0.003
    tilted = p * (R / BETA0).exp()
    assert (tilted @ R / tilted.sum()).item() == pytest.approx(0.200, abs=0.002)
    assert tanh(adaptive).mean().item() == pytest.approx(0.158, abs=0.004)


@pytest.mark.parametrize("adaptive, stable, unstable", [(True, 0.8, 1.25), (False, 0.4, 0.6)])
def test_rounds_come_to_rest_inside_the_bound_only(adaptive, stable, unstable):
    # T2: the bounds on clip / β0 are 1 for ADRPO and 1/2 for a fixed β.
    moves = []
    for factor in (stable, unstable):
        laws = exact.rounds(10, REFERENCE, tanh, 0.3, factor * 0.3, adaptive, steps=30)
        moves.append(max(exact.distance(a, b) for a, b in zip(laws[-4:-1], laws[-3:])))
    assert moves[0] < 0.03 and moves[1] > 0.06 and moves[1] > 3 * moves[0]


@pytest.mark.parametrize("factor", [0.3, 0.7, 0.95])
def test_a_clip_bounds_the_tilt(factor):
    # T3: best and worst differ at most by (1 + k)/(1 − k), and the reward reaches the clip on both sides here.
    tilt = exact.fixed_point(tanh, 0.05, factor * 0.05, lambda p, A: p / (0.05 - A)) / exact.density(exact.GRID)
    assert (tilt.max() / tilt.min()).item() == pytest.approx((1 + factor) / (1 - factor), rel=1e-6)


def test_the_rings_networks_do_not_mix():
    # Two of a stack, and each of them alone, give the same velocity.
    generator = torch.Generator().manual_seed(0)
    weights = [
        (torch.randn(2, m, n, generator=generator), torch.randn(2, 1, n, generator=generator))
        for m, n in zip(ring.SIZES[:-1], ring.SIZES[1:])
    ]
    x, t = torch.randn(2, 7, 2, generator=generator), torch.rand(2, 7, generator=generator)
    both = ring.velocity(weights, x, t)
    for i in range(2):
        alone = ring.velocity([(W[i : i + 1], b[i : i + 1]) for W, b in weights], x[i : i + 1], t[i : i + 1])
        assert torch.allclose(both[i : i + 1], alone, atol=1e-5)


def test_the_rings_coefficients():
    R = torch.tensor([[0.0, 1.0, 5.0, 2.0]])  # mean 2: A = −2, −1, 3, 0, clamped to ±1
    expected = {
        "ADRPO": ([-1.0, -1, 1, 0], [2.0, 2, 0, 1]),
        "fixed β": ([-1.0, -1, 1, 0], [1.0, 1, 1, 1]),
        "anti": ([-1.0, -1, 1, 0], [0.0, 0, 2, 1]),
    }
    for method, numbers in expected.items():
        for found, values in zip(ring.coefficients(method, R, 1.0, 1, None), numbers):
            assert torch.equal(found, torch.tensor([values]))
    weight, beta = ring.coefficients("shuffled", R, 1.0, 1, torch.Generator().manual_seed(0))
    assert weight.tolist() == [[-1, -1, 1, 0]] and sorted(beta[0].tolist()) == [0, 1, 2, 2]
    weight, _ = ring.coefficients("ORW-CFM-W2", R, 1.0, 1, None)
    assert torch.allclose(weight, 4 * R.exp() / R.exp().sum())


def test_a_bandit_with_a_strong_anchor_of_the_reverse_kl_stays_and_with_beta_0_it_leaves():
    # π_ref·exp(Ā/β) at β = 8 is nearly π_ref, whose right answers have 0.9 %. Without a KL the guess's own pull decides.
    assert bandit.escapes("GRPO", 8.0, "k2", seeds=8, steps=100) == 0
    assert bandit.escapes("anti", 0.04, "k3", seeds=8) == 1


def test_compare_when_writes_its_table_and_picture(tmp_path, monkeypatch, capsys):
    for name, value in {
        "FACTORS": {True: (0.8,), False: (0.4,)}, "STEPS": (1,), "RATES": (1e-3,), "STRENGTHS": (1.0,), "SEEDS": 2,
        "BETAS": (0.04,), "KINDS": ("k3", "k2"), "CONTESTANTS": ("GRPO",),
    }.items():  # fmt: skip
        monkeypatch.setattr(when, name, value)
    pretrain, escapes, rounds = ring.pretrain, bandit.escapes, exact.rounds
    monkeypatch.setattr(ring, "pretrain", lambda: pretrain(steps=5))
    monkeypatch.setattr(bandit, "escapes", lambda *args: escapes(*args, seeds=4, steps=3))
    monkeypatch.setattr(ring, "ROUNDS", 1)
    monkeypatch.setattr(exact, "rounds", lambda count, *args: rounds(3, *args, steps=4))
    compare.main(["when", "--out", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| ADRPO | ±0.8·β0 |" in table and "| k3 | GRPO | 0.00 |" in table and "| ORW-CFM-W2 | 0%" in table
    assert (tmp_path / "when.png").stat().st_size > 10_000 and (tmp_path / "results.json").is_file()


def test_options_that_cannot_act_are_refused():
    with pytest.raises(errors.InputError, match="--seeds"):
        compare.main(["when", "--seeds", "2"])
