"""Sampling a flow: explicit integrators of dx/dt = velocity(x, t) from noise at t = 0 to data at t = 1.

SD3 samples with Euler steps on a shifted grid; the other methods are the textbook's (Hairer, Nørsett & Wanner 1993,
chapter II.1). The error of a method of order p falls as h^p.
"""

import torch

EVALUATIONS = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4}  # velocity evaluations a step; the orders are 1, 2, 2, 4


def time_grid(steps, shift=1.0, dtype=torch.float32, device=None):
    """steps + 1 increasing times from 0 to 1.

    In σ = 1 − t the grid is uniform under SD3's map s·σ / (1 + (s − 1)·σ) (arXiv 2403.03206, Eq. 23): a shift s > 1 spends
    more steps near the noise, which larger images need; s = 1 is uniform in t.

    >>> time_grid(2, shift=3.0)
    tensor([0.0000, 0.2500, 1.0000])
    """
    check(steps, shift)
    return (1 - shifted(1 - torch.arange(steps + 1, dtype=torch.float64) / steps, shift)).to(device, dtype)


def sd3_time_grid(steps, shift=3.0, dtype=torch.float32, device=None, train_timesteps=1000):
    """steps + 1 increasing times from 0 to 1, as SD3's public samplers have them (Stability's sd3-ref, diffusers).

    They differ from `time_grid`. σ falls in `steps` − 1 equal parts, not to 0 but to the smallest of training, which is 1/1000
    (1/train_timesteps) under the map above; the map is then applied to every σ, to the smallest for the second time, and 0 is
    appended. So the last step is short (0.009 at a shift of 3), and the others are a little longer.

    >>> sd3_time_grid(2)
    tensor([0.0000, 0.9911, 1.0000])
    """
    check(steps, shift)
    sigma = shifted(torch.linspace(1, shifted(1 / train_timesteps, shift), steps, dtype=torch.float64), shift)
    return (1 - torch.cat([sigma, torch.zeros(1)])).to(device, dtype)


def shifted(sigma, shift):
    return shift * sigma / (1 + (shift - 1) * sigma)


def check(steps, shift):
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    if not shift > 0:
        raise ValueError(f"shift is {shift}; expected a positive number")


def sample(velocity, x0, times, method="euler", trajectory=False):
    """Integrates from x0 at times[0] to times[-1].

    velocity     (x like x0, t 0-dimensional) -> dx/dt like x0
    times        [S + 1], increasing (`time_grid`)
    method       "euler" | "heun" | "midpoint" | "rk4"
    trajectory   True: every state, [S + 1, *x0.shape]; False: the last one, shaped like x0
    """
    if method not in EVALUATIONS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(EVALUATIONS)}")
    x, states = x0, [x0]
    for t, t_next in zip(times[:-1], times[1:]):
        h = t_next - t
        k1 = velocity(x, t)
        if method == "euler":
            slope = k1
        elif method == "heun":  # the mean of the slopes at both ends
            slope = (k1 + velocity(x + h * k1, t_next)) / 2
        elif method == "midpoint":
            slope = velocity(x + h / 2 * k1, t + h / 2)
        else:  # rk4
            k2 = velocity(x + h / 2 * k1, t + h / 2)
            k3 = velocity(x + h / 2 * k2, t + h / 2)
            k4 = velocity(x + h * k3, t_next)
            slope = (k1 + 2 * k2 + 2 * k3 + k4) / 6
        x = x + h * slope
        if trajectory:
            states.append(x)
    return torch.stack(states) if trajectory else x


def guide(conditional, unconditional, scale):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): v_uncond + scale·(v_cond − v_uncond).

    Combines two velocities. With scale 1 only the conditional one is evaluated.
    """
    if scale == 1:
        return conditional

    def velocity(x, t):
        v = unconditional(x, t)
        return v + scale * (conditional(x, t) - v)

    return velocity
