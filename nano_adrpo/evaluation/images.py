"""The evaluation of a text-to-image model, one piece of code for the training script and for the evaluate command.

It draws `samples` images of every prompt from noises that depend on the seed alone, and measures them: the rewards, how much
the images of one prompt differ (CLIP's embeddings, pixels), how far the model is from the reference (W2), and a
judge's metrics. Sample n belongs to prompt n // samples: those of one prompt are contiguous.
"""

import torch

from nano_adrpo import metrics
from nano_adrpo.adrpo import interpolate


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
    samples=8, seed=0, batch=None, device="cpu", normalize=True,
):  # fmt: skip
    """Draws images of P prompts and measures them.

    model, condition       a TextToImage, and the Condition of the prompts [P]
    reward, judge          see `score`
    v_ref                  the reference's velocity, a function (x_t, t, rows) -> like x_t, where `rows` is a LongTensor of rows
                           of `prompts`; None: W2 is left out
    shape                  [C, H, W] of the latents
    times, negative, guidance, method   how to draw, see TextToImage.draw
    samples, seed          images per prompt, at least 2; which noises
    batch                  images at a time; None: all

    -> {metric: number}, images [P·samples, C, H, W] on the CPU, and which of them are right (see `score`)
    """
    rows = torch.arange(len(prompts)).repeat_interleave(samples)
    x0, t, eps = (x.to(device) for x in noise(len(rows), shape, seed))
    x1, images = model.draw(x0, condition[rows], times, negative, guidance, method, batch)
    divergence = None
    if v_ref:
        divergence = w2(lambda x_t, t, rows: model.velocity(x_t, t, condition[rows]), v_ref, x1, t, eps, rows, batch)
    texts = [prompts[row] for row in rows]
    values, right = score(images, texts, samples, reward, judge, device, batch, normalize, divergence)
    return values, images, right


@torch.no_grad()
def w2(v, v_ref, x1, t, noise, rows, batch=None):
    """E|v − v_ref|² on the way from `noise` to the samples x1, both [N, C, H, W], at the times t [N] (metrics.w2_divergence).

    v, v_ref   functions (x_t, t, rows) -> velocity like x_t, called with `batch` samples at a time
    rows       LongTensor [N], the prompts of the samples
    """
    x_t, _ = interpolate(noise, x1, t)
    batches = torch.arange(len(rows)).split(batch or len(rows))
    both = (torch.cat([velocity(x_t[i], t[i], rows[i]) for i in batches]) for velocity in (v, v_ref))
    return metrics.w2_divergence(*both)


@torch.no_grad()
def score(images, prompts, samples, reward, judge, device, batch=None, normalize=True, w2=None):
    """Measures N images [N, C, H, W] in [−1, 1] of N prompts, in float32 even inside autocast.

    reward      rewards.Rewards
    judge       a function (images, prompts) -> {metric: a number, or [N] of which the mean is taken}; or None
    batch       images at a time for the rewards; None: all
    normalize   see metrics.clip_diversity
    w2          the divergence, where it was measured

    -> {metric: number}: the rewards, clip_diversity, pixel_diversity, w2, the judge's; and the judge's first metric where it is
       one of [N], as booleans (which images are right), else None
    """
    with torch.autocast(torch.device(device).type, enabled=False):
        with reward.on(device):
            rewards = reward(images, prompts, batch)
            embeddings = reward.embed_images(images, batch)
        values = {name: numbers.mean().item() for name, numbers in rewards.items()}
        if embeddings is not None:
            values["clip_diversity"] = metrics.clip_diversity(embeddings, samples, normalize)
        values["pixel_diversity"] = metrics.group_diversity(images.flatten(1) / images[0].numel() ** 0.5, samples)
        if w2 is not None:
            values["w2"] = w2
        judged = judge(images, prompts) if judge else {}
    per_sample = {name for name, value in judged.items() if torch.is_tensor(value) and value.shape == (len(images),)}
    values |= {name: value.float().mean().item() if name in per_sample else float(value) for name, value in judged.items()}
    first = next(iter(judged), None)
    return values, judged[first].bool().cpu() if first in per_sample else None
