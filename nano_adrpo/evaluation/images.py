"""The evaluation of a text-to-image model, one piece of code for the training script and for the evaluate command.

It draws `samples` images of every prompt from noises that depend on the seed alone, and measures them: the rewards, how much
the images of one prompt differ (CLIP's embeddings, pixels), how far the model is from the reference (W2), and a
judge's metrics. Sample n belongs to prompt n // samples: those of one prompt are contiguous.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from nano_adrpo import metrics
from nano_adrpo.adrpo import interpolate, squared_error
from nano_adrpo.errors import shown


class Evaluation(NamedTuple):
    """What an evaluation found. N = prompts · samples."""

    values: dict  # {metric: number}, see `score`
    errors: dict  # {metric: its standard error over the prompts}
    images: torch.Tensor  # [N, C, H, W], on the CPU
    right: torch.Tensor | None  # [N] booleans, see `score`
    rows: torch.Tensor  # [prompts], which prompts

    def some(self, shown):
        """Of all its prompts those numbered in the list `shown`, with their images and the values as they are."""
        samples = len(self.images) // len(self.rows)
        which = [samples * row + sample for row in shown for sample in range(samples)]
        right = None if self.right is None else self.right[which]
        return self._replace(images=self.images[which], right=right, rows=self.rows[shown])

    @property
    def summary(self):
        """How many of its images are right or, without a judge, the mean reward."""
        if self.right is None:
            return f"reward {self.values['reward']:.3g}"
        return f"{int(self.right.sum())} of {len(self.right)} right"


def alone(rows, count=None):
    """What one process has of the rows: all."""
    return rows


def evenly(count, limit):
    """At most `limit` of `count` rows, evenly spaced, as a list."""
    return torch.linspace(0, count - 1, min(limit, count)).long().tolist()


def noise(count, shape, seed=0):
    """The random numbers of an evaluation, on the CPU, equal on every machine.

    -> x0 [N, C, H, W], the noise to draw from; t [N] and noise [N, C, H, W], the times and noises that W2 is measured at
    """
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    return (
        torch.randn(count, *shape, generator=generator),
        torch.rand(count, generator=generator),
        torch.randn(count, *shape, generator=generator),
    )


@torch.no_grad()
def evaluate(
    model, condition, prompts, reward, judge, v_ref, *, shape, times, negative=None, guidance=1.0, method="euler",
    rows=None, categories=None, samples=8, seed=0, batch=None, device="cpu", normalize=True, mine=alone, gather=alone,
    real=None,
):  # fmt: skip
    """Draws images of prompts and measures them. -> an Evaluation

    model, condition       a TextToImage, and the Condition of P prompts
    reward, judge          see `score`
    v_ref                  the reference's velocity, a function (x_t, t, rows) -> like x_t, where `rows` is a LongTensor of rows
                           of `prompts`; None: W2 is left out
    shape                  [C, H, W] of the latents
    times, negative, guidance, method   how to draw, see TextToImage.draw
    rows                   which of the prompts, a list; None: all
    categories             each of the P prompts' category, "" for none; None: no prompt has one
    samples, seed          images per prompt, at least 2; which noises
    batch                  images at a time; None: all
    mine, gather           how several processes share the work, see training/distributed.py
    real                   CLIP's embeddings [M, P] of real images, see `score`; None: there are none
    """
    chosen = torch.arange(len(prompts)) if rows is None else torch.tensor(rows)
    rows = chosen.repeat_interleave(samples)
    count, own = len(rows), mine(rows)
    x0, t, eps = (mine(x).to(device) for x in noise(count, shape, seed))
    x1, images = model.draw(x0, condition[own], times, negative, guidance, method, batch)
    divergence = None
    if v_ref:
        distances = w2(lambda x_t, t, rows: model.velocity(x_t, t, condition[rows]), v_ref, x1, t, eps, own, batch)
        divergence = gather(distances, count).mean().item()
    texts, kinds = ([some[row] for row in rows] if some else None for some in (prompts, categories))
    images = gather(images, count)
    values, errors, right = score(
        images, texts, samples, reward, judge, device, batch, normalize, divergence, kinds, mine, gather, real
    )
    return Evaluation(values, errors, images, right, chosen)


@torch.no_grad()
def w2(v, v_ref, x1, t, noise, rows, batch=None):
    """|v − v_ref|² [N] on the way from `noise` to the samples x1, both [N, C, H, W], at the times t [N]: squared velocity per
    element. Its mean is the tractable upper bound on the squared Wasserstein-2 distance between policy and reference
    (ORW-CFM-W2, arXiv 2502.06061), up to its Lipschitz factor.

    v, v_ref   functions (x_t, t, rows) -> velocity like x_t, called with `batch` samples at a time
    rows       LongTensor [N], the prompts of the samples
    """
    x_t, _ = interpolate(noise, x1, t)
    batches = torch.arange(len(rows)).split(batch or len(rows))
    both = (torch.cat([velocity(x_t[i], t[i], rows[i]) for i in batches]) for velocity in (v, v_ref))
    return squared_error(*both)


@torch.no_grad()
def score(
    images, prompts, samples, reward, judge, device, batch=None, normalize=True, w2=None, categories=None, mine=alone,
    gather=alone, real=None,
):  # fmt: skip
    """Measures N images [N, C, H, W] in [−1, 1] of N prompts, in float32 even inside autocast.

    reward      rewards.Rewards
    judge       a function (images, prompts) -> {metric: a number, or [N] of which the mean is taken}; or None
    batch       images at a time for the rewards; None: all
    normalize   see metrics.clip_diversity
    w2          the divergence, where it was measured
    categories  of each of the N prompts, "" for none; None: no prompt has one
    mine, gather   see `evaluate`: rewards are shared out
    real        CLIP's embeddings [M, P] of real images, by the first reward that embeds images; None: there are none

    -> {metric: number}, {metric: standard error over the prompts, where it is known}, and which images are right.

    Metrics: the reward and its terms, clip_diversity, clip_frechet (with `real`), pixel_diversity, reward_std (the reward's
    deviation within a prompt, mean over prompts), w2, the judge's, and METRIC/CATEGORY: the judge's first metric, or else the
    reward, over the prompts of each category. Right is the judge's first metric where it is one of [N], as booleans, else None.
    """
    with torch.autocast(torch.device(device).type, enabled=False):
        with reward.on(device):
            measured = gather(reward(mine(images), mine(prompts), batch), len(images))  # {metric: [N]}
            embeddings = reward.embed_images(mine(images), batch)
            embeddings = None if embeddings is None else gather(embeddings, len(images))
        groups = measured["reward"].split(samples)
        values = {}
        if embeddings is not None:
            values["clip_diversity"] = metrics.clip_diversity(embeddings, samples, normalize)
        if real is not None and len(images) > 1:
            values["clip_frechet"] = metrics.clip_frechet(embeddings, real, normalize)
        values["pixel_diversity"] = metrics.group_diversity(images.flatten(1) / images[0].numel() ** 0.5, samples)
        deviations = [group.std() for group in groups if len(group) > 1]
        if deviations:
            values["reward_std"] = torch.stack(deviations).mean().item()
        if w2 is not None:
            values["w2"] = w2
        judged = judge(images, prompts) if judge else {}
    judged = {name: torch.as_tensor(x) if isinstance(x, list | np.ndarray) else x for name, x in judged.items()}
    per_sample = {name: x.float().cpu() for name, x in judged.items() if torch.is_tensor(x) and x.shape == (len(images),)}
    measured |= per_sample
    counts, first = [len(group) for group in groups], next(iter(judged), None)
    means = {name: numbers.mean().item() for name, numbers in measured.items()}
    errors = {name: metrics.clustered_error(numbers, counts) for name, numbers in measured.items()}
    values = {name: mean for name, mean in means.items() if name not in judged} | values
    values |= {name: means[name] if name in per_sample else float(value) for name, value in judged.items()}
    main = first if first in per_sample else "reward"
    for category in filter(None, dict.fromkeys(categories or [])):
        inside = torch.tensor([category == other for other in categories])
        sizes = [count for count, some in zip(counts, inside.split(counts)) if some[0]]
        name, numbers = f"{main}/{shown(category, 80)}", measured[main][inside]
        values[name], errors[name] = numbers.mean().item(), metrics.clustered_error(numbers, sizes)
    known = {name: error for name, error in errors.items() if not math.isnan(error)}
    return values, known, per_sample[first].bool() if first in per_sample else None
