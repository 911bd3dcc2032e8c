"""Text to image as one object: the direction of time, guidance, batches, decoding."""

import copy
import itertools

import pytest
import tiny_sd3
import torch

from nano_adrpo import ode
from nano_adrpo.demo import digits
from nano_adrpo.demo.digits_recipe import Painter
from nano_adrpo.models.vae import Autoencoder
from nano_adrpo.text_to_image import TextToImage

BASE = digits.HERE / "base"
PROMPTS = ["a red seven left of a blue zero", "a green two", ""]


@pytest.fixture(scope="module")
def model():
    return TextToImage.from_pretrained(BASE, torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sd3.folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def sd3(folder):
    return TextToImage.from_pretrained(folder)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_time_is_turned_round(model):
    condition, x = model.encode(["a green two"]), noise(1, 3, 16, 16)
    network = model.transformer(x, torch.tensor([0.75]), condition.context, condition.pooled)  # noise − data at σ = 0.75
    assert torch.equal(model.velocity(x, 0.25, condition), -network)
    assert torch.equal(model.velocity(x, torch.tensor([0.25]), condition), -network)
    assert torch.equal(model.velocity(x, torch.tensor(0.25, dtype=torch.float64), condition), -network)


@torch.no_grad()
def test_the_velocity_points_from_noise_to_data(model):
    # From pure noise the mean of u = x1 − x0 given x0 is E[x1] − x0: the base model is trained, so this holds roughly.
    x0 = noise(64, 3, 16, 16)
    v = model.velocity(x0, 0.0, model.encode(["a blue three"])[[0] * 64])
    scenes = [digits.Scene(3, colour) for colour in [2] * 6 + [0, 1, 3]]  # a third of the captions name another colour
    expected = Painter(torch.Generator().manual_seed(0)).paint(scenes * 100).mean(dim=0) - x0
    assert (v - expected).square().mean() < 0.1 * expected.square().mean()


@torch.no_grad()
def test_another_network_may_be_asked(model):
    condition, x = model.encode(["a green two"]), noise(1, 3, 16, 16)
    other = copy.deepcopy(model.transformer)
    other.proj_out.bias.add_(1)
    change = model.velocity(x, 0.5, condition, other) - model.velocity(x, 0.5, condition)
    assert torch.allclose(change, -torch.ones_like(x), atol=1e-5)


def test_conditions_are_picked_by_row(model):
    condition = model.encode(["a red one", "a green two"])
    assert condition.context.shape == (2, 11, 64) and condition.pooled.shape == (2, 32) and len(condition) == 2
    picked = condition[torch.tensor([1, 1, 0])]
    assert torch.equal(picked.context[1], condition.context[1]) and torch.equal(picked.pooled[2], condition.pooled[0])
    assert len(picked) == 3 and picked.to(torch.bfloat16).pooled.dtype == torch.bfloat16


@torch.no_grad()
def test_folders_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = TextToImage.from_pretrained(tmp_path)
    condition, x = again.encode(PROMPTS), noise(3, 3, 16, 16)
    assert torch.equal(condition.context, model.encode(PROMPTS).context)
    assert torch.equal(again.velocity(x, 0.5, condition), model.velocity(x, 0.5, condition))
    half = TextToImage.from_pretrained(tmp_path, torch.bfloat16)
    assert half.velocity(x, 0.5, half.encode(PROMPTS)).dtype == torch.float32  # x's


def test_resolutions(sd3):
    assert sd3.factor == 8 and sd3.scheduler.shift == 3.0
    assert sd3.latent_shape == (16, 8, 8)  # the configuration's sample_size, in latents
    assert sd3.latent_shape_at(96) == (16, 12, 12) and sd3.latent_shape_at((32, 192)) == (16, 4, 24)
    for resolution, side in ((100, 100), ((64, 72), 72), (208, 208), (0, 0), ((-16, 16), -16)):
        with pytest.raises(ValueError, match=f"resolution {side}: expected a multiple of 16 .*, at most 192"):
            sd3.latent_shape_at(resolution)


def test_time_grids(model, sd3):
    assert torch.equal(sd3.times(5), ode.sd3_time_grid(5, 3.0)) and torch.equal(sd3.times(5, 2.0), ode.sd3_time_grid(5, 2.0))
    assert torch.equal(model.times(5), ode.time_grid(5)) and torch.equal(model.times(5, 2.0), ode.time_grid(5, 2.0))


@torch.no_grad()
def test_guidance_leads_away_from_the_negative_prompt(sd3):
    x0, times = noise(2, *sd3.latent_shape_at(32)), sd3.times(3)
    good, bad = sd3.encode(["the one", "a cat"]), sd3.encode(["blurry"])
    by_hand = x0
    for t, t_next in itertools.pairwise(times):
        v, away = sd3.velocity(by_hand, t, good), sd3.velocity(by_hand, t, bad[[0, 0]])
        by_hand = by_hand + (t_next - t) * (4 * v - 3 * away)
    for negative in (bad, bad[[0, 0]]):  # one for all, or one each
        assert torch.allclose(sd3.sample(x0, good, times, negative, 4.0), by_hand, atol=1e-4)
    for none in (0, 0.5, 1):  # diffusers guides where the scale is above 1
        assert torch.equal(sd3.sample(x0, good, times, bad, none), sd3.sample(x0, good, times))
    with pytest.raises(ValueError, match="guidance is 4.0 without a negative condition; expected one"):
        sd3.sample(x0, good, times, guidance=4.0)


@torch.no_grad()
def test_samples_are_drawn_and_decoded_in_batches(sd3):
    x0, times = noise(3, *sd3.latent_shape_at(32)), sd3.times(1)
    condition, negative = sd3.encode(["the one", "a cat"])[[0, 1, 1]], sd3.encode(["", "a", "b"])
    for away in (negative, negative[:1]):
        latents = sd3.sample(x0, condition, times, away, 3.0, "heun")
        x1, images = sd3.draw(x0, condition, times, away, 3.0, "heun", batch=2, tile=3)
        assert torch.allclose(x1, latents, atol=1e-4) and x1.shape == x0.shape
        assert torch.allclose(images, sd3.decode(latents, tile=3), atol=1e-3) and images.shape == (3, 3, 32, 32)
    x1, images = sd3.draw(x0, condition, times, away, 3.0, "heun")  # all at once, and whole images
    assert torch.equal(x1, latents) and torch.equal(images, sd3.decode(latents))


@torch.no_grad()
def test_images_come_through_the_autoencoder(sd3, folder):
    vae, latents = Autoencoder.from_pretrained(folder / "vae"), noise(2, *sd3.latent_shape_at((32, 48)))
    images = sd3.decode(latents)
    assert images.shape == (2, 3, 32, 48) and torch.allclose(images, vae.decode(latents), atol=1e-4)
    assert torch.allclose(sd3.decode(latents, tile=3), vae.decode(latents, tile=3), atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # is for the transformer
        assert torch.equal(sd3.decode(latents), images)
    half = TextToImage.from_pretrained(folder, torch.bfloat16, encoders=False)
    assert half.decode(latents).dtype == torch.float32  # the latents'
    assert half.decode(latents.bfloat16()).dtype == torch.bfloat16


def test_a_model_without_encoders_says_so(folder):
    with pytest.raises(ValueError, match="opened without its text encoders; expected encoded prompts"):
        TextToImage.from_pretrained(folder, device="meta", encoders=False).encode(["the one"])
