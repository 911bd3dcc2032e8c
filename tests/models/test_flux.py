"""FLUX's transformer: golden outputs of diffusers, both public layouts, full-size shapes."""

import json
import math
import os
from pathlib import Path

import pytest
import tiny
import tiny_flux
import torch
from safetensors.torch import save_file

from nano_adrpo.models import flux
from nano_adrpo.models.flux import Config, Flux

GOLDEN = json.loads((Path(tiny.__file__).parent / "golden.json").read_text())


def build(style="flux-dev", **change):
    return tiny.fill(Flux(Config(**tiny_flux.STYLES[style] | change)), std=0.05)


def picked(output):
    return output[:, ::3, ::2, ::3].flatten().tolist()


@torch.no_grad()
@pytest.mark.parametrize("style", tiny_flux.STYLES)
def test_outputs_are_diffusers(style):
    assert picked(build(style)(*tiny_flux.inputs())) == pytest.approx(GOLDEN[style], abs=tiny.PROCESSORS)


@torch.no_grad()
@pytest.mark.parametrize("style, prefix", [("flux-dev", ""), ("flux-dev", "model.diffusion_model."), ("flux-schnell", "")])
def test_the_single_file_gives_the_same_outputs(tmp_path, style, prefix):
    tensors = {prefix + name: tensor for name, tensor in tiny_flux.to_bfl(build(style).state_dict()).items()}
    if prefix:  # other models lie beside it
        tensors |= {"vae.decoder.conv_in.bias": torch.ones(3), "text_encoders.clip_l.logit_scale": torch.ones(())}
    save_file(tensors, tmp_path / "flux1.safetensors")
    model = Flux.from_pretrained(tmp_path / "flux1.safetensors")
    assert model.config == build(style).config
    assert picked(model(*tiny_flux.inputs())) == pytest.approx(GOLDEN[style], abs=tiny.PROCESSORS)
    model.save_pretrained(tmp_path / "out")  # and out in the other layout
    assert torch.equal(Flux.from_pretrained(tmp_path / "out")(*tiny_flux.inputs()), model(*tiny_flux.inputs()))


def test_patches_are_packed_by_channel_row_and_column():
    latents = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    packed = flux.pack(latents)
    assert packed.shape == (1, 6, 8) and packed[0, 1].tolist() == [2, 3, 8, 9, 26, 27, 32, 33]  # columns 2, 3 of rows 0, 1
    assert torch.equal(flux.unpack(packed, 4, 6), latents)


def test_pairs_are_turned_by_their_place():
    cos, sin = flux.rotations((2, 4, 4), 3, 2, 2, "cpu")
    assert cos.shape == (7, 5) and (cos[:3] == 1).all() and (sin[:3] == 0).all()  # text stands at 0
    assert sin[6].tolist() == pytest.approx([0, math.sin(1), math.sin(0.01), math.sin(1), math.sin(0.01)])  # row 1, column 1
    x = torch.tensor([3.0, 4.0]).expand(1, 1, 1, 2)
    quarter = (torch.tensor([[0.0]]), torch.tensor([[1.0]]))
    assert flux.rotate(x, quarter).flatten().tolist() == [-4, 3]
    assert flux.rotate(x.bfloat16(), quarter).dtype == torch.bfloat16


@torch.no_grad()
def test_guidance_is_told_to_dev_alone():
    for style, told in (("flux-dev", True), ("flux-schnell", False)):
        model = build(style)
        before, model.guidance = model(*tiny_flux.inputs()), 1.0
        assert told == ((model(*tiny_flux.inputs()) - before).abs().max().item() > 1e-3)
    assert Flux(Config(**tiny_flux.FLUX)).guidance == 3.5


@torch.no_grad()
def test_islands_of_float32_in_bfloat16():
    half, inputs = build().bfloat16(), tiny_flux.inputs()
    latents, sigma, context, pooled = inputs
    output = half(latents.bfloat16(), sigma, context.bfloat16(), pooled.bfloat16())
    expected = build()(*inputs)
    assert output.dtype == torch.bfloat16 and (output.float() - expected).norm() / expected.norm() < 0.02
    times = []
    half.time_text_embed.timestep_embedder.register_forward_pre_hook(lambda _, x: times.append(x[0]))
    half(latents.bfloat16(), torch.full((3,), 0.904531), context.bfloat16(), pooled.bfloat16())
    assert times[0][0, 0].item() == pytest.approx(math.cos(904.531), abs=4e-3)  # not of 908, which bfloat16 would make of it


def test_gradient_checkpointing_changes_no_bit():
    plain, frugal = build(), build()
    frugal.gradient_checkpointing = True
    for model in (plain, frugal):
        model(*tiny_flux.inputs()).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), frugal.parameters()))


def full_size(guided=True, dim=3072):
    """The key names and shapes of flux1-dev.safetensors."""
    linear = {"img_in": (dim, 64), "txt_in": (dim, 4096), "final_layer.linear": (64, dim)}
    linear["final_layer.adaLN_modulation.1"] = (2 * dim, dim)
    for name, width in (("time_in", 256), ("vector_in", 768), *([("guidance_in", 256)] if guided else [])):
        linear |= {f"{name}.in_layer": (dim, width), f"{name}.out_layer": (dim, dim)}
    shapes = {}
    for i in range(19):
        for stream in ("img", "txt"):
            at = f"double_blocks.{i}.{stream}"
            linear |= {f"{at}_mod.lin": (6 * dim, dim), f"{at}_attn.qkv": (3 * dim, dim), f"{at}_attn.proj": (dim, dim)}
            linear |= {f"{at}_mlp.0": (4 * dim, dim), f"{at}_mlp.2": (dim, 4 * dim)}
            shapes |= {f"{at}_attn.norm.{name}_norm.scale": (128,) for name in ("query", "key")}
    for i in range(38):
        at = f"single_blocks.{i}"
        linear |= {f"{at}.modulation.lin": (3 * dim, dim), f"{at}.linear1": (7 * dim, dim), f"{at}.linear2": (dim, 5 * dim)}
        shapes |= {f"{at}.norm.{name}_norm.scale": (128,) for name in ("query", "key")}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("guided, tensors, parameters", [(True, 780, 11_901_408_320), (False, 776, 11_891_178_560)])
def test_full_size_on_meta(tmp_path, guided, tensors, parameters):
    file, shapes = tmp_path / "flux1.safetensors", full_size(guided)
    assert len(shapes) == tensors
    tiny.headers_only(file, shapes, "BF16")
    model = Flux.from_pretrained(file, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters and model.config.guidance_embeds == guided
    assert len(model.state_dict()) == (1160 if guided else 1156)
    assert os.stat(file).st_blocks * 512 < 1e6  # the file holds headers only, so nothing can have been read


@pytest.mark.parametrize("size", [(7, 8), (8, 9)])
def test_a_size_that_does_not_fit_is_refused(size):
    with pytest.raises(ValueError, match=f"latents are {size[0]} × {size[1]}; expected multiples of 2"):
        build()(*tiny_flux.inputs(*size))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(in_channels=384, out_channels=64), r"in_channels is 384, as of FLUX.1 Fill, and out_channels 64; expected one"),
        (dict(in_channels=128, out_channels=64), r"in_channels is 128, as of FLUX.1 Canny and Depth \(Control\)"),
        (dict(axes_dims_rope=(16, 56)), r"axes_dims_rope is \(16, 56\); expected 3 even numbers of sum"),
        (dict(axes_dims_rope=(15, 57, 56)), "axes_dims_rope is"),
        (dict(axes_dims_rope=(16, 56, 58)), "expected 3 even numbers of sum attention_head_dim, 128"),
        (dict(patch_size=2), "key 'patch_size' is 2; expected 1"),
        (
            dict(_class_name="SD3Transformer2DModel"),
            "key '_class_name' is 'SD3Transformer2DModel'; expected 'FluxTransformer2DM",
        ),
        (dict(num_layers=0), "key 'num_layers' is 0; expected a positive int"),
        (dict(num_single_layers=3), "key 'single_transformer_blocks.2.norm.linear.weight' is missing"),
    ],
)
def test_a_bad_config_is_named(tmp_path, change, message):
    build().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    tiny.write_json(file, json.loads(file.read_text()) | change)
    with pytest.raises(ValueError, match=message) as error:
        Flux.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_other_single_files_are_refused_by_name(tmp_path):
    tensors, file = tiny_flux.to_bfl(build().state_dict()), tmp_path / "flux1.safetensors"
    for change, message in (
        ({"img_in.weight": torch.zeros(128, 384)}, "in_channels is 384, as of FLUX.1 Fill"),
        ({"img_in.weight": torch.zeros(128, 128)}, r"as of FLUX.1 Canny and Depth \(Control\)"),
        ({"txt_in.weight": None}, "key 'txt_in.weight' is missing; expected Black Forest Labs' layout"),
        ({"single_blocks.0.linear2.weight": None}, "key 'single_blocks.0.linear2.weight' is missing"),
        ({"single_blocks.0.linear1.bias": torch.zeros(5)}, r"linear1.bias' has shape \[5\]; expected \[896\]"),
        ({"controlnet_x.weight": torch.zeros(1)}, "key 'controlnet_x.weight' is not part of Flux"),
    ):
        save_file({name: tensor for name, tensor in (tensors | change).items() if tensor is not None}, file)
        with pytest.raises(ValueError, match=f"{file}: .*{message}"):
            Flux.from_pretrained(file)
