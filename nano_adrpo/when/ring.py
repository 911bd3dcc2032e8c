"""Many steps on one rollout: which methods blow up? Small networks in the plane, a hundred at once.

The reference has eight modes on a ring: one pays 1 and is rare, the one across pays 0.3 and is common (a trap), the others pay
nothing. A round draws 64 samples and takes 4, 16 or 64 Adam steps on them. Every network of a stack has a seed of its own; the
stack shares nothing but the time at which it runs.
"""

import math

import torch
import torch.nn.functional as F

from nano_adrpo import adrpo, ode

MODES, RADIUS, WIDTH = 8, 3.0, 0.3
SHARES = torch.tensor([0.1, *[0.5 / 6] * 3, 0.4, *[0.5 / 6] * 3])
PAYS = torch.tensor([1.0, 0, 0, 0, 0.3, 0, 0, 0])
SIZES = (5, 48, 48, 48, 2)  # of the velocity's network: place and time -> velocity
SAMPLES, ROUNDS, BLOWN = 64, 8, 3.0  # a run whose W2 passes the last number has blown up
METHODS = ("ADRPO", "fixed β", "shuffled", "anti", "ORW-CFM-W2")


def centres():
    angles = 2 * math.pi * torch.arange(MODES) / MODES
    return RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)


def draw_reference(count, generator):
    modes = torch.multinomial(SHARES, count, replacement=True, generator=generator)
    return centres()[modes] + WIDTH * torch.randn(count, 2, generator=generator)


def reward(x):
    """[..., 2] -> [...]: what a mode pays, at its centre; less within its width, nothing far off."""
    near = (-torch.cdist(x, centres().expand(*x.shape[:-2], -1, -1)).square() / (2 * (2 * WIDTH) ** 2)).exp()
    return near @ PAYS


def velocity(weights, x, t):
    """B networks at once: x [B, N, 2], t a number or [B, N] -> [B, N, 2]. weights: [(W [B, in, out], b [B, 1, out])]."""
    t = torch.as_tensor(t).expand(x.shape[:-1])
    h = torch.cat([x, torch.stack([t, (2 * math.pi * t).sin(), (2 * math.pi * t).cos()], dim=-1)], dim=-1)
    for i, (W, b) in enumerate(weights):
        h = torch.baddbmm(b, F.silu(h) if i else h, W)
    return h


def pretrain(steps=4000, batch=512):
    """The reference network, by flow matching on its law: [(W [1, in, out], b [1, 1, out])]."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        (torch.randn(1, m, n, generator=generator) / m**0.5, torch.zeros(1, 1, n)) for m, n in zip(SIZES[:-1], SIZES[1:])
    ]
    parameters = [p.requires_grad_() for pair in weights for p in pair]
    optimizer = torch.optim.Adam(parameters, 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x1, x0 = draw_reference(batch, generator), torch.randn(batch, 2, generator=generator)
        x_t, u = adrpo.interpolate(x0, x1, t := torch.rand(batch, generator=generator))
        (velocity(weights, x_t[None], t[None]) - u).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return [(W.detach(), b.detach()) for W, b in weights]


def coefficients(method, R, beta0, clip, generator):
    """(weight, beta) [B, N] of `flow_loss`. R [B, N] in deviations of the reward, clip a multiple of β0."""
    A = (R - R.mean(dim=1, keepdim=True)).clamp(-clip * beta0, clip * beta0)
    if method == "ADRPO":
        return A, beta0 - A
    if method == "fixed β":
        return A, torch.full_like(A, beta0)
    if method == "shuffled":  # ADRPO's coefficients, of other samples
        order = torch.rand(A.shape, generator=generator).argsort(dim=1)
        return A, beta0 - A.gather(1, order)
    if method == "anti":
        return A, beta0 + A
    return R.shape[1] * R.softmax(dim=1), torch.full_like(A, beta0)  # τ = 1


def train(reference, method, beta0, clip, inner_steps, lr, seeds):
    """-> of each seed the final reward, the entropy over modes in nats, and W2 = E|v − v_ref|², [seeds] each."""
    generator = torch.Generator().manual_seed(0)
    weights = [tuple(p.expand(seeds, -1, -1).clone().requires_grad_() for p in pair) for pair in reference]
    frozen = [tuple(p.expand(seeds, -1, -1) for p in pair) for pair in reference]
    optimizer = torch.optim.Adam([p for pair in weights for p in pair], lr)
    times, unit = ode.time_grid(20), None

    def noise(count):
        return torch.randn(seeds, count, 2, generator=generator)

    @torch.no_grad()
    def roll_out(count):
        return ode.sample(lambda x, t: velocity(weights, x, t), noise(count), times)

    for _ in range(ROUNDS):
        x1 = roll_out(SAMPLES)
        R = reward(x1)
        unit = R.std(dim=1).mean() if unit is None else unit
        weight, beta = coefficients(method, R / unit, beta0, clip, generator)
        for _ in range(inner_steps):
            t, x0 = torch.rand(seeds, SAMPLES, generator=generator), noise(SAMPLES)
            x_t, u = adrpo.interpolate(x0.flatten(0, 1), x1.flatten(0, 1), t.flatten())
            x_t = x_t.unflatten(0, (seeds, -1))
            v, v_ref = velocity(weights, x_t, t), velocity(frozen, x_t, t)
            loss = adrpo.flow_loss(
                v.flatten(0, 1), u, v_ref.flatten(0, 1), weight.flatten(), beta.flatten(), SAMPLES
            )  # a sum over the stack: each network has a mean over its own samples
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return measure(weights, frozen, roll_out(512), noise(512), generator)


@torch.no_grad()
def measure(weights, frozen, x1, x0, generator):
    t = torch.rand(x1.shape[:2], generator=generator)
    x_t = (1 - t[..., None]) * x0 + t[..., None] * x1
    w2 = (velocity(weights, x_t, t) - velocity(frozen, x_t, t)).square().mean(dim=(1, 2))
    modes = F.one_hot(torch.cdist(x1, centres().expand(len(x1), -1, -1)).argmin(dim=-1), MODES).double().mean(dim=1)
    return reward(x1).mean(dim=1), torch.special.entr(modes).sum(dim=1), torch.nan_to_num(w2, nan=math.inf)
