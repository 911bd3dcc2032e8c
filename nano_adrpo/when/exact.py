"""Exact rounds in one dimension: no network, no sampling noise, so that what is left is the method (docs/theory.md).

A law on the line is its quantiles at the levels (i + ½)/N. A round takes at every time and place the velocity that minimises
the loss on samples of the policy's law, and integrates its flow from the quantiles of N(0, 1). Such a flow keeps its points in
order, so quantiles become quantiles.
"""

import torch

from nano_adrpo import ode

WEIGHTS, MEANS, DEVIATIONS = torch.tensor([[0.7, 0.3], [-1.0, 1.2], [0.6, 0.5]], dtype=torch.float64)  # the reference
GRID = torch.linspace(-6, 6, 100_001, dtype=torch.float64)


def density(x):
    """That of the reference, a mixture of two Gaussians: [n] -> [n]."""
    return torch.distributions.Normal(MEANS, DEVIATIONS).log_prob(x[:, None]).exp() @ WEIGHTS


def levels(count):
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def quantiles(weights, count):
    """Quantiles [count] of the law that has these weights on GRID."""
    return GRID[torch.searchsorted(weights.cumsum(0) / weights.sum(), levels(count))]


def samples(quantiles, times=4):
    """More points of the same law, [N] -> [times · N]: its quantile function is a straight line between two quantiles."""
    count = len(quantiles)
    place = (levels(times * count) * count - 0.5).clamp(0, count - 1)
    below = place.long().clamp(max=count - 2)
    return torch.lerp(quantiles[below], quantiles[below + 1], place - below)


def posterior(x, t, x1):
    """P(x1 | x_t = x) among equally likely samples x1 [M], where x_t = (1 − t)·x0 + t·x1: x [N] -> [N, M]."""
    return (-(((x[:, None] - t * x1) / (1 - t)) ** 2) / 2).softmax(dim=1)


def exact_round(policy, reference, reward, beta0, clip, adaptive, steps=40):
    """One round on samples of the policy: quantiles [N] -> quantiles [N].

    policy, reference   quantiles [N]
    reward              a function, [M] -> [M]
    clip                of A, ±clip; inf is none
    adaptive            True: ADRPO, β0 − A. False: a fixed β0; there is no minimum where E[A | x_t] ≤ −β0
    """
    x1, ref = samples(policy), samples(reference)
    A = (reward(x1) - reward(x1).mean()).clamp(-clip, clip)

    def velocity(x, t):
        p = posterior(x, t, x1)  # [N, M]
        mean_A = p @ A  # E_π[A | x_t]
        mean_Au = (p @ (A * x1) - mean_A * x) / (1 - t)  # E_π[A·u | x_t], u = (x1 − x_t)/(1 − t)
        v_ref = (posterior(x, t, ref) @ ref - x) / (1 - t)
        if adaptive:
            return v_ref + (mean_Au - mean_A * v_ref) / beta0
        return (mean_Au + beta0 * v_ref) / (mean_A + beta0)

    noise = torch.special.ndtri(levels(len(policy)))
    return ode.sample(velocity, noise, ode.time_grid(steps, dtype=torch.float64), "midpoint")


def rounds(count, reference, *args, **options):
    """The policy after each of `count` exact rounds from the reference: [count + 1, N], the first is the reference."""
    laws = [reference]
    for _ in range(count):
        laws.append(exact_round(laws[-1], reference, *args, **options))
    return torch.stack(laws)


def fixed_point(reward, beta0, clip, tilt):
    """The law π ∝ tilt(p_ref, A) on GRID, A = clamp(R − E_π R), by iteration until it stands: weights [len(GRID)].

    tilt   such as `lambda p, A: p / (beta0 - A)`
    """
    p, R = density(GRID), reward(GRID)
    law = p / p.sum()
    for _ in range(300):
        new = tilt(p, (R - law @ R).clamp(-clip, clip))
        law = (law + new / new.sum()) / 2
    return law


def distance(a, b):
    """W1, the area between two quantile functions [N]."""
    return (a - b).abs().mean().item()
