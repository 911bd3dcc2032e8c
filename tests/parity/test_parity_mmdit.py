"""Our SD3 transformer against diffusers', both ways (extra `parity`)."""

import json
from pathlib import Path

import make_golden
import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from nano_adrpo.models.mmdit import Config, MMDiT


def theirs(style, seed=0):
    return tiny.fill(SD3Transformer2DModel(**tiny.MMDIT_STYLES[style]), seed)


@torch.no_grad()
def outputs(model, size=(8, 12)):
    latents, sigma, context, pooled = tiny.mmdit_inputs(*size)
    if isinstance(model, MMDiT):
        return model(latents, sigma, context, pooled)
    return model(latents, context, pooled, 1000 * sigma).sample


def test_the_golden_numbers_are_what_the_libraries_compute_today():
    stored = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
    for name, values in make_golden.golden().items():
        for part in values if isinstance(values, dict) else [None]:
            now, then = (values[part], stored[name][part]) if part else (values, stored[name])
            assert now == pytest.approx(then, abs=tiny.PROCESSORS), (name, part)


@pytest.mark.parametrize("style", tiny.MMDIT_STYLES)
@pytest.mark.parametrize("size", [(8, 8), (4, 20), (18, 6)])
@pytest.mark.parametrize("sharded", [False, True])
def test_outputs_agree(tmp_path, style, size, sharded):
    model = theirs(style, seed=size[0])
    model.save_pretrained(tmp_path, max_shard_size="1MB" if sharded else "10GB")
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if not sharded else len(list(tmp_path.glob("*-of-*.safetensors"))))
    assert (outputs(MMDiT.from_pretrained(tmp_path), size) - outputs(model, size)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        dict(num_layers=1, dual_attention_layers=(0,), qk_norm="rms_norm"),
        dict(attention_head_dim=24, num_attention_heads=3, caption_projection_dim=72, dual_attention_layers=(2, 99)),
        dict(patch_size=1, sample_size=7, in_channels=3, out_channels=8, pos_embed_max_size=20),
        dict(in_channels=4, out_channels=None),
    ],
    ids=["one block", "heads of 24", "patches of 1", "as many channels out as in"],
)
def test_other_sizes_agree(tmp_path, change):
    model = tiny.fill(SD3Transformer2DModel(**{**tiny.MMDIT, "in_channels": 4, **change}))
    model.save_pretrained(tmp_path / "theirs")
    ours = MMDiT.from_pretrained(tmp_path / "theirs")
    latents, sigma, context, pooled = tiny.mmdit_inputs()
    latents = latents[:, : model.config.in_channels]
    ours.save_pretrained(tmp_path / "ours")
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        output = ours(latents, sigma, context, pooled)
        for each in (model, again):
            assert (output - each(latents, context, pooled, 1000 * sigma).sample).abs().max() < 1e-5


def test_outputs_agree_in_bfloat16(tmp_path):
    theirs("sd3.5-medium").save_pretrained(tmp_path)
    latents, sigma, context, pooled = (x.bfloat16() for x in tiny.mmdit_inputs())
    with torch.no_grad():
        expected = SD3Transformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)(
            latents, context, pooled, 1000 * sigma.float()
        ).sample
        output = MMDiT.from_pretrained(tmp_path, torch.bfloat16)(latents, sigma.float(), context, pooled)
    assert (output.float() - expected.float()).norm() / expected.float().norm() < 0.01


def test_gradients_agree(tmp_path):
    model = theirs("sd3.5-medium")
    model.save_pretrained(tmp_path)
    ours = MMDiT.from_pretrained(tmp_path)
    latents, sigma, context, pooled = tiny.mmdit_inputs()
    ours(latents, sigma, context, pooled).square().mean().backward()
    model(latents, context, pooled, 1000 * sigma).sample.square().mean().backward()
    expected = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:  # the last block's context queries reach nothing
            assert expected[name].grad is None or expected[name].grad.abs().max() == 0, name
        else:
            assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5), name


def test_what_we_save_loads_there(tmp_path):
    model = tiny.fill(MMDiT(Config(**tiny.MMDIT_STYLES["sd3.5-medium"])), seed=3)
    model.save_pretrained(tmp_path)
    again, info = SD3Transformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (outputs(model) - outputs(again)).abs().max() < 1e-5


@pytest.mark.parametrize("style", tiny.MMDIT_STYLES)
def test_stabilitys_layout_means_the_same_to_both(tmp_path, style):
    sizes = tiny.MMDIT_STYLES[style]
    single = tiny.to_stability(theirs(style).state_dict(), sizes["num_layers"], sizes.get("dual_attention_layers", ()))
    save_file(single, tmp_path / "sd3.safetensors")
    ours = MMDiT.from_pretrained(tmp_path / "sd3.safetensors").state_dict()
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(single))
    assert ours.keys() == converted.keys() and all(torch.equal(ours[name], converted[name]) for name in ours)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192),
        dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384, qk_norm="rms_norm",
             dual_attention_layers=tuple(range(13))),
        dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"),
    ],
    ids=tiny.MMDIT_STYLES,
)  # fmt: skip
def test_full_size_names_and_shapes(tmp_path, sizes):
    with torch.device("meta"):
        model = SD3Transformer2DModel(**sizes)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tiny.headers_only(tmp_path / "diffusion_pytorch_model.safetensors", shapes)
    tiny.write_json(tmp_path / "config.json", {"_class_name": "SD3Transformer2DModel", **dict(model.config)})
    ours = MMDiT.from_pretrained(tmp_path, device="meta")
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == shapes
