"""The evaluation of images: its random numbers, what it measures by hand, batches, the judge's verdicts, precision."""

import math

import numpy as np
import pytest
import torch

from nano_adrpo.evaluation import images
from nano_adrpo.rewards import Rewards


def bright(samples, prompts):
    return samples.mean(dim=(1, 2, 3))


def length(samples, prompts):
    return [len(prompt) for prompt in prompts]


class Model:
    """Draws x0 plus the prompt's number as images and latents; its velocity is the prompt's number."""

    def draw(self, x0, condition, times, negative, guidance, method, batch):
        self.drawn = times, negative, guidance, method, batch
        x1 = x0 + condition[:, None, None, None]
        return x1, x1

    def velocity(self, x, t, condition):
        return condition[:, None, None, None].expand_as(x)


def evaluate(judge=None, v_ref=None, reward=None, **options):
    model, condition = Model(), torch.tensor([1.0, 3.0])
    reward = reward or Rewards({"bright": (bright, 1.0)})
    defaults = {"shape": (1, 2, 2), "times": torch.linspace(0, 1, 3), "samples": 4}
    return images.evaluate(model, condition, ["a", "abc"], reward, judge, v_ref, **(defaults | options)), model


def test_the_noises_depend_on_the_seed_alone():
    x0, t, noise = images.noise(3, (1, 2, 2), seed=5)
    generator = torch.Generator().manual_seed(1_000_008)
    assert torch.equal(x0, torch.randn(3, 1, 2, 2, generator=generator)) and torch.equal(t, torch.rand(3, generator=generator))
    assert torch.equal(noise, torch.randn(3, 1, 2, 2, generator=generator))
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(images.noise(3, (1, 2, 2)), images.noise(3, (1, 2, 2))))
    assert not torch.equal(images.noise(3, (1, 2, 2))[0], x0)


def test_samples_of_a_prompt_are_contiguous_and_measured_with_it():
    reward = Rewards({"bright": (bright, 1.0), "length": (length, 10.0)})
    (values, errors, drawn, right, rows), model = evaluate(
        reward=reward, v_ref=lambda x, t, rows: 0 * x, negative="none", guidance=2.0, method="heun", seed=1
    )
    x0 = images.noise(8, (1, 2, 2), 1)[0]
    expected = x0 + torch.tensor([1.0] * 4 + [3.0] * 4)[:, None, None, None]
    assert torch.equal(drawn, expected) and right is None and rows.tolist() == [0, 1]
    assert list(values) == ["reward", "bright", "length", "pixel_diversity", "reward_std", "w2"]
    assert values["length"] == 2 and values["bright"] == pytest.approx(expected.mean().item())
    assert values["reward"] == pytest.approx(expected.mean().item() + 20)
    means = [group.mean().item() for group in (drawn[:4], drawn[4:])]
    assert errors["bright"] == pytest.approx(abs(means[0] - means[1]) / 2, rel=1e-5) and errors.keys() == {
        "reward",
        "bright",
        "length",
    }
    deviation = sum(group.mean(dim=(1, 2, 3)).std() for group in (drawn[:4], drawn[4:])) / 2
    assert values["reward_std"] == pytest.approx(deviation.item(), rel=1e-4)
    assert values["w2"] == 5  # the mean of 1² and 3²
    pairs = [(a - b).square().mean().sqrt() for g in (drawn[:4], drawn[4:]) for i, a in enumerate(g) for b in g[:i]]
    assert values["pixel_diversity"] == pytest.approx(sum(pairs).item() / 12, rel=1e-5)
    assert model.drawn[1:] == ("none", 2.0, "heun", None)


def test_w2_is_measured_on_the_way_from_noise_to_the_samples():
    """Velocities x_t and 0: by hand E|x_t|², where x_t = (1 − t)·noise + t·x1 with the rows that were asked for."""
    x1, noise, t = torch.full((3, 1, 1, 1), 5.0), torch.full((3, 1, 1, 1), 1.0), torch.tensor([0.0, 0.25, 1.0])
    rows, seen = torch.tensor([7, 8, 9]), []
    for batch in (None, 1, 2):
        value = images.w2(lambda x, t, rows: seen.append(rows) or x, lambda x, t, rows: 0 * x, x1, t, noise, rows, batch)
        assert value.tolist() == [1, 2**2, 5**2]
    assert torch.equal(torch.cat(seen), rows.repeat(3)) and len(seen) == 1 + 3 + 2


def test_batches_change_nothing():
    (whole, _, drawn, *_), _ = evaluate(v_ref=lambda x, t, rows: x)
    (batched, _, again, *_), model = evaluate(v_ref=lambda x, t, rows: x, batch=3)
    assert torch.equal(drawn, again) and batched == pytest.approx(whole) and model.drawn[-1] == 3


def test_the_judges_first_metric_says_which_images_are_right():
    def judge(drawn, prompts):
        assert prompts == ["a"] * 4 + ["abc"] * 4
        return {"good": drawn.mean(dim=(1, 2, 3)) > 2, "level": torch.arange(8), "number": 0.5}

    (values, _, drawn, right, _), _ = evaluate(judge)
    assert torch.equal(right, drawn.mean(dim=(1, 2, 3)) > 2) and right.any() and not right.all()
    assert values["good"] == right.float().mean().item() and values["level"] == 3.5 and values["number"] == 0.5
    assert list(values) == ["reward", "pixel_diversity", "reward_std", "good", "level", "number"]
    (values, _, _, right, _), _ = evaluate(lambda drawn, prompts: {"number": 1, "good": torch.ones(8)})
    assert right is None and values["number"] == values["good"] == 1
    for alike in ([True] * 6 + [False] * 2, np.array([1.0] * 6 + [0.0] * 2)):  # as rewards may be
        (values, errors, _, right, _), _ = evaluate(lambda drawn, prompts: {"good": alike, "one": np.float32(0.5)})
        assert values["good"] == 0.75 and values["one"] == 0.5 and right.tolist() == [True] * 6 + [False] * 2


def test_some_of_the_prompts_and_their_categories():
    (values, _, drawn, _, rows), _ = evaluate(rows=[1], categories=["short", "long"])
    assert torch.equal(drawn, images.noise(4, (1, 2, 2))[0] + 3) and rows.tolist() == [1]
    assert values["reward/long"] == values["reward"] and "reward/short" not in values
    found, _ = evaluate(lambda drawn, prompts: {"good": torch.arange(8) > 2}, categories=["short", ""])
    assert found.values["good/short"] == 1 / 4 and [name for name in found.values if "/" in name] == ["good/short"]
    assert found.summary == "5 of 8 right"
    second = found.some([1])
    assert torch.equal(second.images, found.images[4:]) and second.right.all() and second.rows.tolist() == [1]
    assert second.summary == "4 of 4 right" and evaluate()[0].some([0]).summary.startswith("reward ")


def test_evenly_spaced_rows():
    assert images.evenly(3, 10) == [0, 1, 2] and images.evenly(1, 10) == [0]
    assert images.evenly(40, 10) == [0, 4, 8, 13, 17, 21, 26, 30, 34, 39]


class Clip(torch.nn.Module):
    moves = ()

    def forward(self, samples, prompts):
        return torch.zeros(len(prompts))

    def embed_images(self, samples):
        return torch.tensor([[1.0, 0.0], [0.0, 3.0]])[: len(samples)]

    def to(self, device):
        self.moves = [*self.moves, device]
        return self


def test_embeddings_give_a_diversity_and_the_reward_is_moved():
    """Two embeddings at a right angle, of lengths 1 and 3: normalised their distance is √2, else √10."""
    reward = Rewards({"clip": (clip := Clip(), 1.0)})
    for normalize, distance in ((True, 2**0.5), (False, 10**0.5)):
        values, _, _ = images.score(torch.zeros(2, 1, 2, 2), ["a", "a"], 2, reward, None, "cpu", normalize=normalize)
        assert values["clip_diversity"] == pytest.approx(distance)
    assert clip.moves == ["cpu"] * 4


def test_scores_are_in_float32_inside_autocast():
    def product(samples, prompts):
        return (samples[:, 0] @ samples[:, 0]).mean(dim=(1, 2)).float()

    drawn = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    reward, judge = Rewards({"product": (product, 1.0)}), lambda drawn, prompts: {"judged": product(drawn, prompts)}
    outside, _, _ = images.score(drawn, ["a", "a"], 2, reward, judge, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert product(drawn, None).mean().item() != outside["reward"]
        inside, _, _ = images.score(drawn, ["a", "a"], 2, reward, judge, "cpu")
    assert inside == outside and math.isfinite(inside["judged"])


def test_one_sample_a_prompt_has_no_diversity():
    values, _, _ = images.score(torch.zeros(2, 1, 2, 2), ["a", "b"], 1, Rewards({"bright": (bright, 1.0)}), None, "cpu")
    assert values["reward"] == 0 and math.isnan(values["pixel_diversity"])


def test_one_image_alone_has_no_frechet_distance():
    reward = Rewards({"clip": (Clip(), 1.0)})
    values, _, _ = images.score(torch.zeros(1, 1, 2, 2), ["a"], 1, reward, None, "cpu", real=torch.eye(2))
    assert "clip_frechet" not in values
