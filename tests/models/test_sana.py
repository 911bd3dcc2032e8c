"""Sana's transformer: golden outputs of diffusers, what it is invariant to, full-size shapes."""

import json
import os
from pathlib import Path

import pytest
import tiny
import tiny_sana
import torch

from nano_adrpo.models import sana
from nano_adrpo.models.sana import Config, Sana, linear_attention

GOLDEN = json.loads((Path(tiny.__file__).parent / "golden.json").read_text())


def build():
    return tiny.fill(Sana(Config(**tiny_sana.TRANSFORMER)))


def test_outputs_are_diffusers(tmp_path):
    model = build()
    picked = model(*tiny_sana.inputs())[:, ::3, ::2, ::3].flatten().tolist()
    assert picked == pytest.approx(GOLDEN["sana"], abs=tiny.PROCESSORS)
    model.save_pretrained(tmp_path)
    again = Sana.from_pretrained(tmp_path)
    assert torch.equal(again(*tiny_sana.inputs()), model(*tiny_sana.inputs())) and again.config == model.config
    assert {p.dtype for p in Sana.from_pretrained(tmp_path, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_linear_attention_is_attention_with_relu_in_the_place_of_the_softmax():
    q, k, v = torch.randn(3, 2, 5, 9, 4, generator=torch.Generator().manual_seed(0)) + 1
    scores = q.relu() @ k.relu().mT  # [2, 5, 9, 9]
    torch.testing.assert_close(linear_attention(q, k, v), scores @ v / scores.sum(dim=-1, keepdim=True), atol=1e-5, rtol=1e-5)
    q[0, 0, 3] = -1.0  # a query that sees no key
    assert linear_attention(q, k, v)[0, 0, 3].tolist() == [0.0] * 4


def test_linear_attention_is_float32_in_bfloat16_too():
    # 4,096 tokens of one value: in bfloat16 the running sums of keys would stop growing at 256.
    q, k, v = (torch.full((1, 1, 4096, 2), value, dtype=torch.bfloat16) for value in (1.0, 1.0, 3.0))
    v[:, :, ::2] = -1.0
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = linear_attention(q, k, v)
        assert out.dtype == torch.float32 and (out - 1).abs().max() < 1e-6


@torch.no_grad()
def test_bfloat16_and_autocast():
    model, (latents, sigma, context, mask) = build(), tiny_sana.inputs()
    expected = model(latents, sigma, context, mask)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(latents, sigma, context, mask)
    half = model.bfloat16()(latents.bfloat16(), sigma, context.bfloat16(), mask)
    assert half.dtype == torch.bfloat16
    for output in (mixed, half):
        assert (output.float() - expected).norm() / expected.norm() < 0.06


@torch.no_grad()
def test_what_is_masked_is_not_seen():
    model, (latents, sigma, context, mask) = build(), tiny_sana.inputs()
    expected = model(latents, sigma, context, mask)
    for kind in (mask.bool(), mask.float()):
        assert torch.equal(model(latents, sigma, context, kind), expected)
    noise = torch.where(mask[..., None].bool(), context, 100.0)
    torch.testing.assert_close(model(latents, sigma, noise, mask), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(latents[1:2], sigma[1:2], context[1:2, :3]), expected[1:2], atol=1e-4, rtol=0)
    assert (model(latents, sigma, context) - expected)[1].abs().max() > 0.01


@torch.no_grad()
def test_samples_do_not_mix_and_only_neighbours_tell_places():
    model, (latents, sigma, context, mask) = build(), tiny_sana.inputs()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model(latents[order], sigma[order], context[order], mask[order])
    assert torch.allclose(shuffled, model(latents, sigma, context, mask)[order], atol=1e-4)
    for block in model.transformer_blocks:  # without the outer eight of its nine weights a convolution sees one pixel
        block.ff.conv_depth.weight *= torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])
    pixels = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    moved = model(latents.flatten(2)[:, :, pixels].unflatten(2, (5, 7)), sigma, context, mask)
    expected = model(latents, sigma, context, mask).flatten(2)[:, :, pixels].unflatten(2, (5, 7))
    assert torch.allclose(moved, expected, atol=1e-4)


def test_gradient_checkpointing_changes_no_bit():
    plain, frugal = build(), build()
    frugal.gradient_checkpointing = True
    for model in (plain, frugal):
        output = model(*tiny_sana.inputs())
        output.square().mean().backward()
    assert torch.equal(output, plain(*tiny_sana.inputs()))
    for expected, parameter in zip(plain.parameters(), frugal.parameters()):
        assert torch.equal(parameter.grad, expected.grad)


def full_size(layers, dim=2240):
    """Key names and shapes of the public folder."""
    time = "time_embed.emb.timestep_embedder"
    shapes = {
        "patch_embed.proj.weight": (dim, 32, 1, 1), "patch_embed.proj.bias": (dim,),
        f"{time}.linear_1.weight": (dim, 256), f"{time}.linear_1.bias": (dim,),
        f"{time}.linear_2.weight": (dim, dim), f"{time}.linear_2.bias": (dim,),
        "time_embed.linear.weight": (6 * dim, dim), "time_embed.linear.bias": (6 * dim,),
        "caption_projection.linear_1.weight": (dim, 2304), "caption_projection.linear_1.bias": (dim,),
        "caption_projection.linear_2.weight": (dim, dim), "caption_projection.linear_2.bias": (dim,),
        "caption_norm.weight": (dim,), "scale_shift_table": (2, dim),
        "proj_out.weight": (32, dim), "proj_out.bias": (32,),
    }  # fmt: skip
    for i in range(layers):
        block = f"transformer_blocks.{i}"
        shapes[f"{block}.scale_shift_table"] = (6, dim)
        for attention in ("attn1", "attn2"):
            shapes |= {f"{block}.{attention}.{name}.weight": (dim, dim) for name in ("to_q", "to_k", "to_v", "to_out.0")}
            shapes |= {f"{block}.{attention}.{name}.weight": (dim,) for name in ("norm_q", "norm_k")}
            biased = ("to_out.0",) if attention == "attn1" else ("to_q", "to_k", "to_v", "to_out.0")
            shapes |= {f"{block}.{attention}.{name}.bias": (dim,) for name in biased}
        shapes |= {f"{block}.ff.conv_inverted.weight": (11200, dim, 1, 1), f"{block}.ff.conv_inverted.bias": (11200,)}
        shapes |= {f"{block}.ff.conv_depth.weight": (11200, 1, 3, 3), f"{block}.ff.conv_depth.bias": (11200,)}
        shapes[f"{block}.ff.conv_point.weight"] = (dim, 5600, 1, 1)
    return shapes


@pytest.mark.parametrize("layers, parameters, tensors", [(20, 1_604_641_952, 476), (60, 4_721_825_952, 1396)])
def test_full_size_on_meta(tmp_path, layers, parameters, tensors):
    file, shapes = tmp_path / f"{sana.STEM}.safetensors", full_size(layers)
    tiny.headers_only(file, shapes, "BF16")
    tiny.write_json(tmp_path / "config.json", dict(_class_name=sana.CLASS, num_layers=layers, qk_norm="rms_norm_across_heads"))
    model = Sana.from_pretrained(tmp_path, device="meta")
    assert len(shapes) == tensors and sum(p.numel() for p in model.parameters()) == parameters
    assert os.stat(file).st_blocks * 512 < 1e6  # the file holds headers only, so nothing can have been read
