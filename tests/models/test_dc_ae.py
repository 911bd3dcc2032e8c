"""DC-AE: golden outputs of diffusers, tiles, full-size shapes."""

import json
from pathlib import Path

import pytest
import tiny
import tiny_sana
import torch

from nano_adrpo.models import dc_ae
from nano_adrpo.models.dc_ae import Config, DeepAutoencoder

GOLDEN = json.loads((Path(tiny.__file__).parent / "golden.json").read_text())["dc-ae"]


def build():
    return tiny.fill(DeepAutoencoder(Config(**tiny_sana.VAE)))


@torch.no_grad()
def test_both_directions_are_diffusers(tmp_path):
    model = build()
    assert model.factor == 4
    latents, images = model.encode(tiny.images(24, 32)), model.decode(tiny.vae_latents(4))
    assert latents.shape == (2, 4, 6, 8) and images.shape == (2, 3, 12, 20)
    assert latents[:, ::3, ::4, ::5].flatten().tolist() == pytest.approx(GOLDEN["latents"], abs=1e-4)
    assert images[:, ::2, ::5, ::7].flatten().tolist() == pytest.approx(GOLDEN["images"], abs=1e-4)
    model.save_pretrained(tmp_path)
    again = DeepAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(tiny.images(24, 32)), latents) and torch.equal(again.decode(tiny.vae_latents(4)), images)
    half = DeepAutoencoder.from_pretrained(tmp_path, torch.bfloat16)
    rounded = half.decode(tiny.vae_latents(4).bfloat16())
    assert rounded.dtype == torch.bfloat16 and (rounded.float() - images).norm() / images.norm() < 0.05


def test_both_spellings_of_releases_are_the_same_model(tmp_path):
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["downsample_block_type"] == "Conv"
    tiny.write_json(tmp_path / "config.json", config | {"downsample_block_type": "conv"})
    torch.testing.assert_close(DeepAutoencoder.from_pretrained(tmp_path).state_dict(), build().state_dict(), rtol=0, atol=0)


@torch.no_grad()
def test_the_thirds_of_the_projection_are_no_queries_keys_and_values():
    model = build()
    attention = model.encoder.down_blocks[2][0].attn  # 16 wide with heads of 8: of head 0 all three are in to_q and to_k
    x = torch.randn(1, 16, 5, 7, generator=torch.Generator().manual_seed(0))
    seen = []
    attention.to_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    attention(x)
    attention.to_v.weight.zero_()
    attention(x)
    assert torch.equal(seen[0][..., :8], seen[1][..., :8]) and not torch.equal(seen[0][..., 8:16], seen[1][..., 8:16])


@torch.no_grad()
def test_tiles(monkeypatch):
    model, latents = build(), tiny.vae_latents(4, 9, 11)
    whole = model.decode(latents)
    assert torch.equal(model.decode(latents, 11), whole)  # one tile
    assert model.decode(latents, 4).shape == whole.shape
    model.decoder = torch.nn.Upsample(scale_factor=4)  # of which no pixel sees another
    monkeypatch.setattr(model.config, "in_channels", 4)
    torch.testing.assert_close(model.decode(latents, 4), model.decode(latents))
    with pytest.raises(ValueError, match="tile is 0; expected at least 1 latent pixel"):
        model.decode(latents, 0)


def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="images are 24 × 30; expected multiples of 4"):
        build().encode(tiny.images(24, 30))


def full_size():
    """Key names and shapes of the public folder."""
    widths, shapes = (128, 256, 512, 512, 1024, 1024), {}

    def conv(name, dim_in, dim, kernel=3, bias=True):
        shapes[f"{name}.weight"] = (dim, dim_in, kernel, kernel)
        shapes.update({f"{name}.bias": (dim,)} if bias else {})

    def norm(name, dim):
        shapes.update({f"{name}.weight": (dim,), f"{name}.bias": (dim,)})

    def block(name, stage):
        dim = widths[stage]
        if stage < 3:
            conv(f"{name}.conv1", dim, dim)
            conv(f"{name}.conv2", dim, dim, bias=False)
            norm(f"{name}.norm", dim)
            return
        shapes.update({f"{name}.attn.to_{one}.weight": (dim, dim) for one in "qkv"})
        conv(f"{name}.attn.to_qkv_multiscale.0.proj_in", 1, 3 * dim, 5, bias=False)
        conv(f"{name}.attn.to_qkv_multiscale.0.proj_out", 32, 3 * dim, 1, bias=False)
        shapes[f"{name}.attn.to_out.weight"] = (dim, 2 * dim)
        norm(f"{name}.attn.norm_out", dim)
        conv(f"{name}.conv_out.conv_inverted", dim, 8 * dim, 1)
        conv(f"{name}.conv_out.conv_depth", 1, 8 * dim)
        conv(f"{name}.conv_out.conv_point", 4 * dim, dim, 1, bias=False)
        norm(f"{name}.conv_out.norm", dim)

    conv("encoder.conv_in", 3, 128)
    conv("encoder.conv_out", 1024, 32)
    conv("decoder.conv_in", 32, 1024)
    norm("decoder.norm_out", 128)
    conv("decoder.conv_out", 128, 3)
    for stage, layers in enumerate((2, 2, 2, 3, 3, 3)):
        for i in range(layers):
            block(f"encoder.down_blocks.{stage}.{i}", stage)
        for i in range(3):
            block(f"decoder.up_blocks.{stage}.{i + (stage < 5)}", stage)
        if stage < 5:
            conv(f"encoder.down_blocks.{stage}.{layers}.conv", widths[stage], widths[stage + 1])
            conv(f"decoder.up_blocks.{stage}.0.conv", widths[stage + 1], widths[stage])
    return shapes


def test_full_size_on_meta(tmp_path):
    shapes, kinds = full_size(), ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
    tiny.headers_only(tmp_path / f"{dc_ae.STEM}.safetensors", shapes, "F32")
    config = dict(_class_name=dc_ae.CLASS, upsample_block_type="interpolate", downsample_block_type="Conv")
    config |= dict(encoder_block_types=kinds, decoder_block_types=kinds, scaling_factor=0.41407)
    tiny.write_json(tmp_path / "config.json", config)
    model = DeepAutoencoder.from_pretrained(tmp_path, device="meta")
    assert model.factor == 32 and len(shapes) == 375
    assert sum(p.numel() for p in model.parameters()) == 312_250_275
