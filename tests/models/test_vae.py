"""SD3's autoencoder: its equations written out anew in float64, both public layouts, full-size shapes, tiles."""

import json
import os

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo.models.vae import Autoencoder, Config, tiles

STEM = "diffusion_pytorch_model"


def build(style="two-stages"):
    return tiny.fill(Autoencoder(Config(**tiny.VAE_STYLES[style])), std=0.1)


@pytest.fixture
def folder(tmp_path):
    build().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


# --------------------------------------------------------------------------- the model once more, from the tensors by name

DIFFUSERS = dict(
    down="encoder.down_blocks.{}", up="decoder.up_blocks.{}", block="resnets", first="mid_block.resnets.0",
    second="mid_block.resnets.1", shortcut="conv_shortcut", smaller="downsamplers.0.conv", larger="upsamplers.0.conv",
    attention="mid_block.attentions.0", norm="group_norm", q="to_q", k="to_k", v="to_v", out="to_out.0", last="conv_norm_out",
)  # fmt: skip
STABILITY = dict(
    down="encoder.down.{}", up="decoder.up.{}", block="block", first="mid.block_1", second="mid.block_2",
    shortcut="nin_shortcut", smaller="downsample.conv", larger="upsample.conv", attention="mid.attn_1", norm="norm",
    q="q", k="k", v="v", out="proj_out", last="norm_out",
)  # fmt: skip


class Reference:
    def __init__(self, tensors, names, groups=32):
        self.t, self.names, self.groups = {name: tensor.double() for name, tensor in tensors.items()}, names, groups

    def conv(self, x, name, pad=(1, 1, 1, 1), stride=1):
        weight, bias = self.t[f"{name}.weight"], self.t[f"{name}.bias"]
        left, right, top, bottom = pad
        padded = x.new_zeros(*x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right)
        padded[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x
        windows = padded.unfold(2, 3, stride).unfold(3, 3, stride)  # [B, C, h, w, 3, 3]
        return torch.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]

    def pointwise(self, x, name):
        weight = self.t[f"{name}.weight"]
        return torch.einsum("bchw,oc->bohw", x, weight.reshape(weight.shape[:2])) + self.t[f"{name}.bias"][:, None, None]

    def normed(self, x, name):
        grouped = x.reshape(len(x), self.groups, -1)
        mean, var = grouped.mean(-1, keepdim=True), grouped.var(-1, keepdim=True, correction=0)
        scaled = ((grouped - mean) / (var + 1e-6).sqrt()).reshape(x.shape)
        return scaled * self.t[f"{name}.weight"][:, None, None] + self.t[f"{name}.bias"][:, None, None]

    def activated(self, x, name):
        x = self.normed(x, name)
        return x * torch.sigmoid(x)

    def block(self, x, name):
        y = self.conv(self.activated(x, f"{name}.norm1"), f"{name}.conv1")
        y = self.conv(self.activated(y, f"{name}.norm2"), f"{name}.conv2")
        shortcut = f"{name}.{self.names['shortcut']}"
        return y + (self.pointwise(x, shortcut) if f"{shortcut}.weight" in self.t else x)

    def middle(self, x, side):
        names, attention = self.names, f"{side}.{self.names['attention']}"
        x = self.block(x, f"{side}.{names['first']}")
        if f"{attention}.{names['q']}.weight" in self.t:
            y = self.normed(x, f"{attention}.{names['norm']}")
            q, k, v = (self.pointwise(y, f"{attention}.{names[part]}").flatten(2) for part in "qkv")  # [B, C, T]
            scores = torch.einsum("bcs,bct->bst", q, k) / q.shape[1] ** 0.5
            y = torch.einsum("bst,bct->bcs", scores.softmax(-1), v).reshape(x.shape)
            x = x + self.pointwise(y, f"{attention}.{names['out']}")
        return self.block(x, f"{side}.{names['second']}")

    def blocks(self, x, stage):
        j = 0
        while f"{stage}.{self.names['block']}.{j}.conv1.weight" in self.t:
            x, j = self.block(x, f"{stage}.{self.names['block']}.{j}"), j + 1
        return x

    def encode(self, images, stages, scale=1.5305, shift=0.0609):
        x = self.conv(images.double(), "encoder.conv_in")
        for i in range(stages):
            stage = self.names["down"].format(i)
            x = self.blocks(x, stage)
            if i < stages - 1:
                x = self.conv(x, f"{stage}.{self.names['smaller']}", pad=(0, 1, 0, 1), stride=2)
        x = self.activated(self.middle(x, "encoder"), f"encoder.{self.names['last']}")
        moments = self.conv(x, "encoder.conv_out")
        return (moments[:, : moments.shape[1] // 2] - shift) * scale

    def decode(self, latents, stages, scale=1.5305, shift=0.0609):
        x = self.middle(self.conv(latents.double() / scale + shift, "decoder.conv_in"), "decoder")
        for i in range(stages):
            stage = self.names["up"].format(i if self.names is DIFFUSERS else stages - 1 - i)
            x = self.blocks(x, stage)
            if i < stages - 1:
                x = self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{stage}.{self.names['larger']}")
        return self.conv(self.activated(x, f"decoder.{self.names['last']}"), "decoder.conv_out")


@pytest.mark.parametrize("style", tiny.VAE_STYLES)
@torch.no_grad()
def test_encode_and_decode_are_the_equations(style):
    model, sizes = build(style).double(), tiny.VAE_STYLES[style]
    stages, shift = len(sizes["block_out_channels"]), sizes["shift_factor"] or 0
    reference = Reference(model.state_dict(), DIFFUSERS, sizes.get("norm_num_groups", 32))
    for size, latent_size in (((8, 8), (1, 1)), ((16, 24), (3, 5))):
        images, latents = tiny.images(*size).double(), tiny.vae_latents(sizes["latent_channels"], *latent_size).double()
        encoded, decoded = model.encode(images), model.decode(latents)
        assert encoded.shape == (2, sizes["latent_channels"], size[0] // model.factor, size[1] // model.factor)
        assert decoded.shape == (2, 3, latent_size[0] * model.factor, latent_size[1] * model.factor)
        assert torch.allclose(encoded, reference.encode(images, stages, shift=shift), atol=1e-9)
        assert torch.allclose(decoded, reference.decode(latents, stages, shift=shift), atol=1e-9)
    assert encoded.std() > 0.1 and decoded.std() > 0.1


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("widths, layers", [((32, 64), 1), ((32, 64, 64), 2)])
@torch.no_grad()
def test_stabilitys_single_file(tmp_path, prefix, linear, widths, layers):
    tensors = tiny.ldm_vae(widths, layers, linear=linear)
    stored = {prefix + name: tensor for name, tensor in tensors.items()}
    if prefix:  # other models lie beside it
        stored |= {
            "model.diffusion_model.x_embedder.proj.bias": torch.ones(3),
            "text_encoders.clip_l.logit_scale": torch.ones(()),
        }
    save_file(stored, tmp_path / "sd3.safetensors")
    model = Autoencoder.from_pretrained(tmp_path / "sd3.safetensors")
    reference, images, latents = Reference(tensors, STABILITY), tiny.images(), tiny.vae_latents()
    assert torch.allclose(model.encode(images).double(), reference.encode(images, len(widths)), atol=1e-4)
    assert torch.allclose(model.decode(latents).double(), reference.decode(latents, len(widths)), atol=1e-4)
    model.save_pretrained(tmp_path / "out")  # and out in the other layout
    again = Autoencoder.from_pretrained(tmp_path / "out")
    assert again.config == model.config and torch.equal(again.decode(latents), model.decode(latents))


def test_scale_and_shift_are_undone_by_decode():
    model = build("one-stage")
    model.encoder, model.decoder = torch.nn.Module(), torch.nn.Identity()
    model.encoder.forward = lambda x: torch.cat([x, x + 100], dim=1)
    assert model.encode(torch.zeros(1, 3, 1, 1))[0, 0].item() == pytest.approx(-0.0609 * 1.5305)
    assert model.encode(torch.ones(1, 3, 1, 1))[0, 0].item() == pytest.approx((1 - 0.0609) * 1.5305)
    images = tiny.images()
    assert torch.allclose(model.decode(model.encode(images)), images, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------------- files


def test_shards_and_the_fp16_variant_are_the_same_model(folder):
    tensors = load_file(folder / f"{STEM}.safetensors")
    expected = Autoencoder.from_pretrained(folder).decode(tiny.vae_latents())
    (folder / f"{STEM}.safetensors").rename(folder / f"{STEM}.fp16.safetensors")
    assert torch.equal(Autoencoder.from_pretrained(folder).decode(tiny.vae_latents()), expected)
    (folder / f"{STEM}.fp16.safetensors").unlink()
    tiny.shards(folder, tensors, STEM)
    assert torch.equal(Autoencoder.from_pretrained(folder).decode(tiny.vae_latents()), expected)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@torch.no_grad()
def test_dtypes(folder, tmp_path, dtype, bound):
    whole = Autoencoder.from_pretrained(folder)
    Autoencoder.from_pretrained(folder, dtype).save_pretrained(tmp_path / "half")
    half = Autoencoder.from_pretrained(tmp_path / "half")  # None keeps the file's
    assert {p.dtype for p in half.parameters()} == {dtype}
    assert {p.dtype for p in Autoencoder.from_pretrained(tmp_path / "half", torch.float32).parameters()} == {torch.float32}
    images, latents = tiny.images(), tiny.vae_latents()
    for output, expected in (
        (half.encode(images.to(dtype)), whole.encode(images)),
        (half.decode(latents.to(dtype)), whole.decode(latents)),
        (half.decode(latents.to(dtype), tile=3), whole.decode(latents, tile=3)),
    ):
        assert output.dtype == dtype
        assert (output.float() - expected).norm() / expected.norm() < bound


def test_group_norm_does_not_overflow_in_half_precision():
    x = 1000 + 300 * torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0))  # 1000² is over float16's 65504
    normalise = build().encoder.down_blocks[0].resnets[0].norm1
    expected = normalise(x.half().float())
    assert torch.allclose(normalise.half()(x.half()).float(), expected, atol=0.01) and expected.std() > 0.5


def test_full_size_on_meta(tmp_path):
    file = tmp_path / "sd3_medium.safetensors"
    shapes = {f"first_stage_model.{name}": shape for name, shape in tiny.ldm_vae_shapes().items()}
    tiny.headers_only(file, shapes | {"model.diffusion_model.pos_embed": (1, 36864, 1536)})
    model = Autoencoder.from_pretrained(file, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 83_819_683
    assert {p.device.type for p in model.state_dict().values()} == {"meta"}
    assert model.factor == 8 and model.config.block_out_channels == (128, 256, 512, 512)
    assert os.stat(file).st_blocks * 512 < 1e6  # the file holds headers only, so nothing can have been read
    folder = tmp_path / "vae"  # the same through config.json and diffusers' names
    folder.mkdir()
    tiny.write_json(folder / "config.json", tiny.vae_config(dict(vars(model.config))))
    tiny.headers_only(folder / f"{STEM}.safetensors", {name: tuple(t.shape) for name, t in model.state_dict().items()})
    again = Autoencoder.from_pretrained(folder, device="meta")
    assert again.config == model.config and sum(p.numel() for p in again.parameters()) == 83_819_683


def test_the_saved_config_says_everything_diffusers_asks(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config == tiny.vae_config(tiny.VAE) | dict(
        block_out_channels=[32, 64], in_channels=3, out_channels=3, norm_num_groups=32, mid_block_add_attention=True,
        sample_size=32, latents_mean=None, latents_std=None,
    )  # fmt: skip
    tiny.write_json(folder / "config.json", config | {"sample_size": 1024, "force_upcast": True, "_diffusers_version": "0.29"})
    Autoencoder.from_pretrained(folder).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["sample_size"] == 1024


# -------------------------------------------------------------------------------------------------------------------- tiles


def test_tiles_by_hand():
    (first, second) = tiles(5, 4, 1)
    assert first[:2] == (slice(0, 4), slice(0, 4)) and second[:2] == (slice(1, 5), slice(1, 5))
    assert first[2].tolist() == [1, 0.75, 0.5, 0.25] and second[2].tolist() == [0.25, 0.5, 0.75, 1]
    first, second = tiles(7, 4, 2)  # an overlap of one latent pixel, two image pixels
    assert first[:2] == (slice(0, 4), slice(0, 8)) and second[:2] == (slice(3, 7), slice(6, 14))
    assert first[2].tolist() == [1] * 6 + [0.75, 0.25] and second[2].tolist() == [0.25, 0.75] + [1] * 6


@pytest.mark.parametrize("factor", [1, 8])
def test_tiles_cover_every_pixel_with_weights_that_sum_to_one(factor):
    for length in range(1, 40):
        for tile in range(1, 45):
            parts, total = tiles(length, tile, factor), torch.zeros(factor * length, dtype=torch.float64)
            for latent, pixels, weights in parts:
                assert latent.stop - latent.start == min(tile, length) and weights.min() > 0
                assert (pixels.start, pixels.stop) == (factor * latent.start, factor * latent.stop)
                total[pixels] += weights
            assert torch.allclose(total, torch.ones_like(total), atol=1e-12)
            assert parts[0][0].start == 0 and parts[-1][0].stop == length
            overlaps = [before[0].stop - after[0].start for before, after in zip(parts, parts[1:])]
            assert all(overlap >= round(tile / 4 - 1e-9) for overlap in overlaps)
            assert tile < length or len(parts) == 1


class Seen(torch.nn.Module):
    """A decoder that treats every pixel alone, so that tiles change nothing, and remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, latents):
        self.sizes.append(tuple(latents.shape[-2:]))
        return latents[:, :3].tanh().repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize(
    "size, tile, count", [((13, 7), 5, 6), ((30, 31), 8, 25), ((4, 50), 16, 4), ((9, 9), 9, 1), ((3, 4), 1, 12)]
)
def test_each_tile_lands_in_its_place_and_memory_is_a_tiles(size, tile, count):
    model, latents = build(), tiny.vae_latents(16, *size)
    model.decoder = Seen()
    assert torch.allclose(model.decode(latents, tile=tile), model.decode(latents), atol=1e-6)
    assert len(model.decoder.sizes) == count + 1
    assert set(model.decoder.sizes[:-1]) == {(min(tile, size[0]), min(tile, size[1]))}


@torch.no_grad()
def test_a_tile_as_large_as_the_image_changes_nothing():
    model, latents = build("four-stages"), tiny.vae_latents(16, 3, 5)
    for tile in (5, 6, 64):
        assert torch.equal(model.decode(latents, tile=tile), model.decode(latents))


@torch.no_grad()
def test_only_the_seams_differ_where_the_decoder_sees_few_pixels():
    """Without norm and attention a decoder of one stage reaches as many pixels as it has 3 × 3 convolutions: where a tile's
    end is farther away than that, and no other tile mixes in, the image is the plain one."""
    model = build("one-stage")
    for module in list(model.decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    model.decoder.mid_block.attentions = torch.nn.Sequential()
    latents = 0.1 * tiny.vae_latents(16, 40, 100)
    plain, tiled = model.decode(latents), model.decode(latents, tile=40)
    assert [(latent.start, latent.stop) for latent, _, _ in tiles(100, 40, 1)] == [(0, 40), (30, 70), (60, 100)]
    reach = 1 + 2 * 2 + 3 * 2 + 1  # conv_in, two blocks in the middle, three above, conv_out
    right = torch.ones(100, dtype=torch.bool)
    for start, stop in ((30, 40), (60, 70)):  # the overlaps
        right[stop - reach : start + reach] = False
    difference = (tiled - plain).abs().amax((0, 1, 2))
    assert right.sum() == 72 and difference[right].max() < 1e-5 * plain.abs().max()
    assert 0 < difference[~right].max() < plain.abs().max()


@torch.no_grad()
def test_tiles_of_a_whole_decoder_are_near_the_plain_image():
    """Group norm and attention see one tile alone, yet of a texture without trend each tile tells about the same."""
    model, latents = build("two-stages"), tiny.vae_latents(16, 40, 56)
    plain = model.decode(latents)
    errors = [(model.decode(latents, tile=tile) - plain).norm() / plain.norm() for tile in (8, 16, 32)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.2


def test_gradients_flow_through_tiles():
    model, latents = build(), tiny.vae_latents(16, 6, 7).requires_grad_()
    model.decode(latents, tile=4).square().mean().backward()
    assert latents.grad.abs().amin((0, 1)).min() > 0
    assert model.decoder.conv_in.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("size", [(15, 16), (16, 9)])
def test_sizes_that_do_not_divide_are_refused(size):
    with pytest.raises(ValueError, match=f"^images are {size[0]} × {size[1]}; expected multiples of 2$"):
        build().encode(tiny.images(*size))


@pytest.mark.parametrize("tile", [0, -3])
def test_a_tile_without_pixels_is_refused(tile):
    with pytest.raises(ValueError, match=f"^tile is {tile}; expected at least 1 latent pixel$"):
        build().decode(tiny.vae_latents(), tile=tile)
