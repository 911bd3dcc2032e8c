"""What a vision model sees of images: sizes, crops, normalisation, and what is refused."""

import pytest
import torch

from nano_adrpo.rewards.images import preprocess

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_of_the_right_size_are_only_normalised(crop, dtype):
    batch = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    expected = ((batch.float().clamp(-1, 1) + 1) / 2 - mean) / std
    before = batch.clone()
    assert torch.equal(preprocess(batch, 7, MEAN, STD, crop), expected) and expected.dtype == torch.float32
    assert torch.equal(preprocess(batch, 7, mean, std, crop), expected) and torch.equal(batch, before)
    grey = preprocess(batch[:, :1], 7, MEAN, STD, crop)
    assert torch.equal(grey, preprocess(batch[:, :1].expand(-1, 3, -1, -1), 7, MEAN, STD, crop))


def test_the_longer_side_is_cropped_in_its_middle():
    # Columns 0 … 8 of a 4-pixel-high image: (9 − 4) // 2 = 2, so columns 2 … 5 stay; the same for rows.
    ramp = torch.arange(9.0).expand(1, 1, 4, 9) / 8 * 2 - 1
    wide = preprocess(ramp, 4, [0.0], [1 / 8])
    assert torch.equal(wide, torch.tensor([2.0, 3, 4, 5]).expand(1, 1, 4, 4))
    assert torch.equal(preprocess(ramp.mT, 4, [0.0], [1 / 8]), wide.mT)


def test_resizing_keeps_a_constant_and_a_linear_ramp_and_clamps():
    for level in (0, 1, 99, 191, 255):
        same = preprocess(torch.full((1, 1, 5, 9), level / 127.5 - 1), 8, [0.0], [1 / 255])
        assert torch.allclose(same, torch.tensor(float(level)), atol=1e-4)
    # Far from its ends a ramp x stays a ramp under a symmetric kernel: 64 -> 16 columns sample it at 4 x + 1.5, in 8 bits (half
    # a level, of which a column has 255 / 63). The order of the passes and a lone column make no difference.
    ramp = torch.arange(64.0).expand(1, 1, 64, 64) / 63 * 2 - 1
    expected = 4 * torch.arange(3.0, 13) + 1.5
    for wide in (ramp, ramp[:, :, :1], ramp.repeat(1, 1, 9, 1)):
        for small in (preprocess(x, 16, [0.0], [1 / 63], crop=False)[0, 0] for x in (wide, wide.mT.contiguous().mT)):
            assert (small[:, 3:13] - expected).abs().max() < 0.5 / (255 / 63) + 1e-4
        small = preprocess(wide.mT.contiguous(), 16, [0.0], [1 / 63], crop=False)[0, 0]
        assert (small.T[:, 3:13] - expected).abs().max() < 0.5 / (255 / 63) + 1e-4
    # A step from −1 to 1 overshoots under bicubic; 8 bits have no room for it.
    step = torch.cat([torch.full((1, 1, 8, 4), -1.0), torch.full((1, 1, 8, 4), 1.0)], dim=3)
    big = preprocess(step, 32, [0.0], [1.0])
    assert big.min() == 0 and big.max() == 1
    # Nor has it between the passes, rows first: of a white quarter, the columns that overshoot along the rows (0.5 to 2 pixels
    # from the edge, which is at 16) come out as those far from the edge, whose value is white itself.
    quarter = torch.full((1, 1, 8, 8), -1.0)
    quarter[..., 4:, 4:] = 1
    big = preprocess(quarter, 32, [0.0], [1.0])[0, 0]
    assert 0 < big[17, 31] < 1 and torch.allclose(big[:, 18:], big[:, 31:].expand(-1, 14), atol=1e-6)


def test_images_that_do_not_fit_the_model_are_refused():
    for shape in ((2, 4, 8, 8), (3, 8, 8), (1, 2, 8, 8), (1, 3, 0, 8)):
        with pytest.raises(ValueError, match=r"images have shape .*; expected \[N, 1 or 3, height, width\]"):
            preprocess(torch.zeros(shape), 8, MEAN, STD)
    with pytest.raises(ValueError, match=r"images are torch.uint8; expected floats in \[−1, 1\]"):
        preprocess(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 8, MEAN, STD)
