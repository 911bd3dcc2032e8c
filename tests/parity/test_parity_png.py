"""Every kind of PNG as Pillow reads it, written here byte by byte and by Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image
from png_files import SAMPLES, chunk, encoded

from nano_adrpo.files.png import read_png

KINDS = [(0, depth) for depth in (1, 2, 4, 8, 16)] + [(3, depth) for depth in (1, 2, 4, 8)]
KINDS += [(colour, depth) for colour in (2, 4, 6) for depth in (8, 16)]


def levels(image):
    """[C, H, W] in [−1, 1] -> [H, W, C] of 0 … 255."""
    return ((image.permute(1, 2, 0).double() + 1) * 127.5).numpy()


def pillows(file, grey):
    with Image.open(file) as image:
        if image.mode.startswith("I"):  # grey of 16 bits
            return np.asarray(image).astype(float)[..., None] / 257
        return np.asarray(image.convert("L" if grey else "RGB"), dtype=float).reshape(image.height, image.width, -1)


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize("colour, depth", KINDS)
def test_every_kind_and_size(tmp_path, colour, depth, interlaced):
    rng, file = np.random.default_rng(depth), tmp_path / "x.png"
    palette = chunk(b"PLTE", rng.bytes(3 * 2**depth)) + chunk(b"tRNS", b"\0\x80") if colour == 3 else b""
    for height, width in ((1, 1), (1, 9), (9, 1), (3, 5), (8, 8), (13, 19)):
        numbers = rng.integers(0, 2**depth, (height, width, SAMPLES[colour]))
        file.write_bytes(encoded(numbers, colour, depth, interlaced, palette))
        ours, theirs = levels(read_png(file)), pillows(file, colour in (0, 4))
        # Of colours of 16 bits Pillow reads the upper 8.
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < (1.001 if depth == 16 and colour else 1e-4)
        if depth == 16:
            exact = numbers[..., : 1 if colour in (0, 4) else 3]
            assert np.abs(ours * 257 - exact).max() < 0.01


@pytest.mark.parametrize("mode, options", [
    ("1", {}), ("L", {}), ("LA", {}), ("RGB", {}), ("RGBA", {}), ("I;16", {}),
    *(("P", {"bits": bits}) for bits in (1, 2, 4, 8)), ("P", {"bits": 4, "transparency": 1}),
])  # fmt: skip
def test_what_pillow_writes(tmp_path, mode, options):
    pixels = torch.rand(3, 33, 41, generator=torch.Generator().manual_seed(0)).mul(256).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.quantize(2 ** options["bits"])
    elif mode == "I;16":
        image = Image.fromarray((pixels[..., 0].astype(np.uint16) << 8) + pixels[..., 1])
    else:
        image = image.convert(mode)
    image.save(tmp_path / "x.png", **options)
    ours, theirs = levels(read_png(tmp_path / "x.png")), pillows(tmp_path / "x.png", mode in ("1", "L", "LA"))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-4
