"""PNG files against Pillow's, both ways; a model's pixels against transformers' processors on Pillow. Needs the extra
`parity`."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from nano_adrpo.files import png
from nano_adrpo.rewards.images import preprocess

MODES = {"L": 1, "RGB": 3, "RGBA": 4, "LA": 2}


def picture(height, width, channels, seed=0):
    """Smooth waves with some noise, uint8 [H, W, C]: Pillow chooses every row filter on it."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:height, :width]
    waves = [127.5 + 120 * np.sin(x * rng.uniform(0.02, 0.3) + y * rng.uniform(0.02, 0.3)) for _ in range(channels)]
    return (np.stack(waves, axis=-1) + rng.normal(0, 8, (height, width, channels))).clip(0, 255).astype(np.uint8)


def tensor(pixels):
    """uint8 [H, W, C] -> [C, H, W] in [−1, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (37, 53), (64, 5), (1, 40)])
def test_pillows_files_are_read(tmp_path, mode, size):
    pixels = picture(*size, MODES[mode])
    Image.fromarray(pixels.squeeze(-1) if mode == "L" else pixels).save(tmp_path / "x.png")
    assert torch.equal(png.read_png(tmp_path / "x.png"), tensor(pixels[..., : 1 if mode[0] == "L" else 3]))


def test_pillows_palettes_are_read(tmp_path):
    indexed = Image.fromarray(picture(37, 53, 3)).quantize(100)
    indexed.save(tmp_path / "x.png")
    assert torch.equal(png.read_png(tmp_path / "x.png"), tensor(np.asarray(indexed.convert("RGB"))))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_our_files_are_read_by_pillow(tmp_path, mode):
    pixels = picture(37, 53, MODES[mode])
    png.write_png(tmp_path / "x.png", tensor(pixels))
    with Image.open(tmp_path / "x.png") as opened:
        assert opened.mode == mode and np.array_equal(np.asarray(opened).reshape(pixels.shape), pixels)


# Differences in units of one of 256 levels, measured: mean 0.003 and largest 1.0, where a number halfway is rounded otherwise.
# Both of Pillow 13's orders of rows and columns are among the sizes.
SIZES = [
    (64, 64),
    (51, 77),
    (200, 131),
    (333, 500),
    (65, 64),
    (40, 40),
    (17, 23),
    (64, 301),
    (2, 3),
    (1, 1),
    (1, 9),
    (300, 70),
    (300, 1),
]


def black_and_white(height, width, channels, seed):
    """The sharpest picture there is, on which bicubic overshoots everywhere."""
    return (np.random.default_rng(seed).integers(0, 2, (height, width, channels)) * 255).astype(np.uint8)


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("family", ["clip", "blip"])
@pytest.mark.parametrize("draw", [picture, black_and_white])
def test_a_models_pixels_are_the_processors(draw, family, height, width, channels):
    if family == "clip":
        processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    else:
        processor = BlipImageProcessorPil(size={"height": 64, "width": 64})
    pixels = [draw(height, width, channels, seed) for seed in range(2)]
    pillow = [Image.fromarray(one.squeeze(-1) if channels == 1 else one) for one in pixels]
    theirs = processor(pillow, return_tensors="pt").pixel_values
    batch = torch.stack([tensor(one) for one in pixels])
    ours = preprocess(batch, 64, processor.image_mean, processor.image_std, crop=family == "clip")
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    levels = (ours - theirs).abs() * torch.tensor(processor.image_std)[:, None, None] * 255
    same = (height, width) == (64, 64)
    assert levels.mean() < (1e-4 if same else 0.02) and levels.max() < (1e-3 if same else 2.1)
