"""ADRPO-FM in the plane: the whole method on one page, on a problem whose answer is known.

    python examples/gaussian.py                  # a table, after about 18 seconds on one core
    python examples/gaussian.py gaussian.png     # and a picture (needs matplotlib)

A flow model draws noise x0 at t = 0 and moves it along dx/dt = v(x, t) to data x1 at t = 1. The reference model draws from five
islands in the plane, and every island pays a reward. ADRPO raises the reward and holds the model near the reference (Eq. 6):

    loss = mean[ A·|v − u|² + (β0 − A)·|v − v_ref|² ]        A = R − mean of R,  u = x1 − x0

Theory says to which law the rounds converge (docs/theory.md): p_ref / (β0 − A), normalised. The last lines
of the table compare what training reached with this law, which is computed from samples of the reference alone.
"""

import math
import sys

import torch
from torch import nn

from nano_adrpo import adrpo, ode

ANGLES = torch.arange(5) * 2 * math.pi / 5
CENTRES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # [5, 2], of the islands, Gaussians of standard deviation WIDTH
WIDTH = 0.4
SHARES = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2])  # how often the reference draws each island
REWARDS = torch.tensor([1.0, 0.5, 0.0, 0.0, 0.5])  # what each island pays: the best one is rare
BETA0 = 0.8  # larger than any |A| here, so that the clamp of A to ±β0 never acts
SAMPLES, ROUNDS, STEPS = 1024, 40, 32  # samples a round, rounds, gradient steps a round


def island(x):
    """The nearest island of every point: [N, 2] -> [N]."""
    return torch.cdist(x, CENTRES).argmin(dim=1)


def reward(x):
    return REWARDS[island(x)]


def v_ref(x, t):
    """The reference's velocity E[x1 − x0 | x_t = x], exact: x [N, 2], t [N] or one number -> [N, 2]."""
    t = t.expand(len(x))[:, None]  # [N, 1]
    variance = (1 - t) ** 2 + (WIDTH * t) ** 2  # of x_t on its way to one island
    offset = x[:, None] - t[:, :, None] * CENTRES  # [N, 5, 2]
    chance = (SHARES.log() - offset.square().sum(dim=2) / (2 * variance)).softmax(dim=1)  # [N, 5], that x goes to this island
    velocity = CENTRES + ((WIDTH**2 * t - (1 - t)) / variance)[:, :, None] * offset  # [N, 5, 2], if it does
    return (chance[:, :, None] * velocity).sum(dim=1)


def draw(velocity, count):
    """Samples of a flow model: noise [count, 2], moved from t = 0 to t = 1."""
    with torch.no_grad():
        return ode.sample(velocity, torch.randn(count, 2), ode.time_grid(10), "heun")


def train():
    """-> samples of the policy after 0, 1, 4 and all rounds, {round: [20000, 2]}."""
    network = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    nn.init.zeros_(network[-1].weight)  # the correction starts at zero:
    nn.init.zeros_(network[-1].bias)  # before the first round the policy is the reference

    def v(x, t):
        return v_ref(x, t) + network(torch.cat([x, t.expand(len(x))[:, None]], dim=1))

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, ROUNDS * STEPS)
    pictures = {0: draw(v, 20000)}
    for round in range(1, ROUNDS + 1):
        x1 = draw(v, SAMPLES)  # roll out: one prompt, one group
        advantages = adrpo.group_advantages(reward(x1), group_size=SAMPLES)  # R − mean of R
        A, beta = adrpo.adaptive_coefficients(advantages, BETA0)  # A and β0 − A
        for _ in range(STEPS):
            x0, t = torch.randn_like(x1), torch.rand(SAMPLES)  # fresh noise and time
            x_t, u = adrpo.interpolate(x0, x1, t)  # a point on the way from x0 to x1
            loss = adrpo.flow_loss(v(x_t, t), u, v_ref(x_t, t), weight=A, beta=beta)  # Eq. 6
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if round in (1, 4, ROUNDS):
            pictures[round] = draw(v, 20000)
    return pictures


def law_at_rest(R):
    """Weights [N] that turn the reference's samples, of rewards R [N], into samples of p_ref / (β0 − A); their sum is 1.

    A = R − E[R] needs the mean under the law itself, so the mean and the weights are computed in turn until they agree.
    """
    weights = torch.full_like(R, 1 / len(R))
    for _ in range(100):
        _, beta = adrpo.adaptive_coefficients(R - (weights * R).sum(), BETA0)
        weights = 1 / beta / (1 / beta).sum()
    return weights


def main(picture=None):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    laws = {f"round {round}" if round else "reference": (x, torch.full((len(x),), 1 / len(x))) for round, x in train().items()}
    x = draw(v_ref, 100_000)
    laws["p_ref / (β0 − A)"] = x, law_at_rest(reward(x))  # where ADRPO ends
    laws["p_ref · exp(R / β0)"] = x, (reward(x) / BETA0).softmax(dim=0)  # the optimum of KL regularisation, to compare
    table = {}  # name -> mean reward, shares of the islands
    print(f"{'':20}mean reward   shares of the islands, which pay", *REWARDS.tolist())
    for name, (x, weights) in laws.items():
        table[name] = (weights * reward(x)).sum().item(), torch.zeros(5).index_add(0, island(x), weights).tolist()
        print(f"{name:20}{table[name][0]:11.3f}   ", *(f"{share:.3f}" for share in table[name][1]))
    if picture:
        paint(picture, laws, table)
    return table


def paint(file, laws, table):
    """1,000 samples of every law but the last, in the colour of their reward, with the share of each island."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(laws) - 1, figsize=(15, 3.6), layout="constrained")
    for axis, (name, (x, weights)) in zip(axes, laws.items()):
        x, (mean, shares) = x[torch.multinomial(weights, 1000, replacement=True)], table[name]
        dots = axis.scatter(*x.T, c=reward(x), s=3)
        axis.set(title=f"{name}\nmean reward {mean:.2f}", xticks=[], yticks=[], xlim=(-4.6, 4.6), ylim=(-4.6, 4.6))
        for (a, b), share in zip(CENTRES.tolist(), shares):
            axis.text(1.95 * a, 1.95 * b, f"{share:.0%}", ha="center", va="center")
    figure.colorbar(dots, label="reward")
    figure.savefig(file, dpi=60)


if __name__ == "__main__":
    main(*sys.argv[1:2])
