"""The SD3 transformer: golden outputs of diffusers, both public layouts, full-size shapes."""

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo.models.mmdit import Config, MMDiT

GOLDEN = json.loads((Path(tiny.__file__).parent / "golden.json").read_text())


def build(style="sd3-medium"):
    return tiny.fill(MMDiT(Config(**tiny.MMDIT_STYLES[style])))


def picked(output):
    return output[:, ::3, ::4, ::5].flatten().tolist()


@pytest.fixture
def folder(tmp_path):
    build("sd3.5-medium").save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


@pytest.mark.parametrize("style", tiny.MMDIT_STYLES)
def test_outputs_are_diffusers(style):
    assert picked(build(style)(*tiny.mmdit_inputs())) == pytest.approx(GOLDEN[style], abs=tiny.PROCESSORS)


@pytest.mark.parametrize("style", tiny.MMDIT_STYLES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_stabilitys_single_file_gives_the_same_outputs(tmp_path, style, prefix):
    sizes = tiny.MMDIT_STYLES[style]
    tensors = tiny.to_stability(build(style).state_dict(), sizes["num_layers"], sizes.get("dual_attention_layers", ()))
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    if prefix:  # other models lie beside it
        tensors |= {"first_stage_model.decoder.conv_in.bias": torch.ones(3), "text_encoders.clip_l.logit_scale": torch.ones(())}
    save_file(tensors, tmp_path / "sd3.safetensors")
    model = MMDiT.from_pretrained(tmp_path / "sd3.safetensors")
    assert picked(model(*tiny.mmdit_inputs())) == pytest.approx(GOLDEN[style], abs=tiny.PROCESSORS)
    model.save_pretrained(tmp_path / "out")  # and out in the other layout
    assert torch.equal(MMDiT.from_pretrained(tmp_path / "out")(*tiny.mmdit_inputs()), model(*tiny.mmdit_inputs()))


def test_shards_are_one_model(folder, tmp_path):
    one = MMDiT.from_pretrained(folder)
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    tiny.shards(folder, tensors, "diffusion_pytorch_model")
    assert torch.equal(MMDiT.from_pretrained(folder)(*tiny.mmdit_inputs()), one(*tiny.mmdit_inputs()))


def test_dtypes(folder, tmp_path):
    whole = MMDiT.from_pretrained(folder)
    expected = whole(*tiny.mmdit_inputs())
    assert {p.dtype for p in MMDiT.from_pretrained(folder, torch.bfloat16).state_dict().values()} == {torch.bfloat16}
    MMDiT.from_pretrained(folder, torch.bfloat16).save_pretrained(tmp_path / "bf16")
    half = MMDiT.from_pretrained(tmp_path / "bf16")  # None keeps the file's
    assert half.proj_out.weight.dtype == torch.bfloat16
    latents, sigma, context, pooled = tiny.mmdit_inputs()
    output = half(latents.bfloat16(), sigma, context.bfloat16(), pooled.bfloat16())
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() / expected.norm() < 0.05
    mixed = load_file(tmp_path / "bf16" / "diffusion_pytorch_model.safetensors")
    mixed["pos_embed.pos_embed"] = mixed["pos_embed.pos_embed"].half()
    save_file(mixed, tmp_path / "bf16" / "diffusion_pytorch_model.safetensors")
    assert {p.dtype for p in MMDiT.from_pretrained(tmp_path / "bf16").parameters()} == {torch.float32}  # holds both


def test_the_position_table_is_cropped_at_its_centre():
    model = build()
    torch.nn.init.zeros_(model.pos_embed.proj.weight)
    torch.nn.init.zeros_(model.pos_embed.proj.bias)
    table = model.pos_embed.pos_embed.reshape(10, 10, 128)
    cropped = model.pos_embed(torch.zeros(1, 4, 8, 12)).reshape(4, 6, 128)
    assert torch.equal(cropped, table[3:7, 2:8])


def test_patches_and_samples_do_not_mix_up():
    model = build()
    latents, sigma, context, pooled = tiny.mmdit_inputs()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model(latents[order], sigma[order], context[order], pooled[order])
    assert torch.allclose(shuffled, model(latents, sigma, context, pooled)[order], atol=1e-5)
    with torch.no_grad():  # a bias of the output layer lands on its own pixel of every patch: (row, column, channel) order
        for parameter in model.proj_out.parameters():
            parameter.zero_()
        model.proj_out.bias.copy_(torch.arange(16.0))
    output = model(latents, sigma, context, pooled)
    assert output[0, 1].reshape(4, 2, 6, 2)[2, :, 4].tolist() == [[1.0, 5.0], [9.0, 13.0]]


def full_size(layers, dual=0, qk_norm=False, dim=1536, table=192 * 192):
    """Stability's published key names and shapes: SD3-medium (24 layers, 1536 wide), SD3.5-medium, SD3.5-large (38, 2432)."""
    shapes = {
        "pos_embed": (1, table, dim), "x_embedder.proj.weight": (dim, 16, 2, 2), "x_embedder.proj.bias": (dim,),
        "t_embedder.mlp.0.weight": (dim, 256), "t_embedder.mlp.0.bias": (dim,),
        "t_embedder.mlp.2.weight": (dim, dim), "t_embedder.mlp.2.bias": (dim,),
        "y_embedder.mlp.0.weight": (dim, 2048), "y_embedder.mlp.0.bias": (dim,),
        "y_embedder.mlp.2.weight": (dim, dim), "y_embedder.mlp.2.bias": (dim,),
        "context_embedder.weight": (dim, 4096), "context_embedder.bias": (dim,),
        "final_layer.linear.weight": (64, dim), "final_layer.linear.bias": (64,),
        "final_layer.adaLN_modulation.1.weight": (2 * dim, dim), "final_layer.adaLN_modulation.1.bias": (2 * dim,),
    }  # fmt: skip
    for i in range(layers):
        for stream in ("x_block", "context_block"):
            block, last = f"joint_blocks.{i}.{stream}", stream == "context_block" and i == layers - 1
            vectors = 2 if last else 9 if stream == "x_block" and i < dual else 6
            linear = {"attn.qkv": (3 * dim, dim), "adaLN_modulation.1": (vectors * dim, dim)}
            if not last:
                linear |= {"attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
            if stream == "x_block" and i < dual:
                linear |= {"attn2.qkv": (3 * dim, dim), "attn2.proj": (dim, dim)}
            for name, shape in linear.items():
                shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
            if qk_norm:
                shapes |= {f"{block}.{name}.weight": (64,) for name in ("attn.ln_q", "attn.ln_k")}
                if stream == "x_block" and i < dual:
                    shapes |= {f"{block}.{name}.weight": (64,) for name in ("attn2.ln_q", "attn2.ln_k")}
    return shapes


@pytest.mark.parametrize(
    "sizes, parameters",
    [
        (dict(layers=24), 2_028_328_000),
        (dict(layers=24, dual=13, qk_norm=True, table=384 * 384), 2_243_171_520),
        (dict(layers=38, qk_norm=True, dim=2432), 8_056_627_520),
    ],
    ids=tiny.MMDIT_STYLES,
)
def test_full_size_on_meta(tmp_path, sizes, parameters):
    file = tmp_path / "sd3.safetensors"
    shapes = full_size(**sizes)
    tiny.headers_only(file, {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()})
    model = MMDiT.from_pretrained(file, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.device.type for p in model.state_dict().values()} == {"meta"}
    assert os.stat(file).st_blocks * 512 < 1e6  # the file holds headers only, so nothing can have been read


@pytest.mark.parametrize("style", tiny.MMDIT_STYLES)
def test_gradient_checkpointing_changes_no_bit(style):
    plain, frugal = build(style), build(style)
    frugal.gradient_checkpointing = True
    for model in (plain, frugal):
        output = model(*tiny.mmdit_inputs())
        output.square().mean().backward()
    assert torch.equal(output, plain(*tiny.mmdit_inputs()))
    for expected, parameter in zip(plain.parameters(), frugal.parameters()):
        assert (parameter.grad is None) == (expected.grad is None)  # the last block's context queries reach nothing
        assert parameter.grad is None or torch.equal(parameter.grad, expected.grad)
    with torch.no_grad():
        assert torch.equal(frugal(*tiny.mmdit_inputs()), output)


@pytest.mark.parametrize("height, width", [(7, 8), (8, 9), (22, 8), (8, 22)])
def test_a_size_that_does_not_fit_is_refused(height, width):
    with pytest.raises(ValueError, match=f"latents are {height} × {width}; expected multiples of 2, at most 20"):
        build()(*tiny.mmdit_inputs(height, width))
