"""Low-rank adapters: y = W·x + b + (alpha / rank)·B·A·x by hand, off is the base bit for bit, merging, files, bad input."""

import copy
import math

import pytest
import tiny
import torch
from lora_models import FILE, IDS, KINDS, TARGETS, Names, adapt, base, move, output, trainable
from safetensors.torch import load_file
from torch import nn

from nano_adrpo import lora
from nano_adrpo.models import clip, decoder

# ------------------------------------------------------------------------------------------------------------- computation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_are_the_closed_form(dtype):
    generator = torch.Generator().manual_seed(3)
    model = nn.ModuleDict({"to_q": nn.Linear(5, 3)}).to(dtype)
    lora.add(model, ["to_q"], 2, 3.0, generator)
    layer = move(model)["to_q"]
    x, slope = (torch.randn(4, 7, size, generator=generator, dtype=dtype) for size in (5, 3))
    x.requires_grad_()
    y = layer(x)
    (y * slope).sum().backward()
    A, B, W = (matrix.detach().to(dtype) for matrix in (layer.lora_A.weight, layer.lora_B.weight, layer.weight))
    torch.testing.assert_close(y, x @ W.T + layer.bias + 3 / 2 * x @ (B @ A).T)
    flat_x, flat_slope = x.detach().flatten(0, 1), slope.flatten(0, 1)
    # y = Wx + s·BAx: ∂/∂B = s·Σ g(Ax)ᵀ, ∂/∂A = s·Σ (Bᵀg)xᵀ, ∂/∂x = (W + s·BA)ᵀg
    torch.testing.assert_close(layer.lora_B.weight.grad.to(dtype), 1.5 * flat_slope.T @ (flat_x @ A.T))
    torch.testing.assert_close(layer.lora_A.weight.grad.to(dtype), 1.5 * (flat_slope @ B).T @ flat_x)
    torch.testing.assert_close(x.grad, slope @ (W + 1.5 * B @ A))
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_at_the_start_on_is_off_and_always_off_is_the_base(kind, dtype):
    expected, model = output(base(kind).to(dtype)), base(kind).to(dtype)
    names = list(model.state_dict())
    adapt(model, kind, moved=False)
    assert torch.equal(output(model), expected)
    on = output(move(model))
    assert (on - expected).abs().max() > 0.1 and on.dtype == dtype
    with lora.disabled(model) as reference:
        assert reference is model and torch.equal(output(model), expected)
        with lora.disabled(model):
            assert torch.equal(output(model), expected)
        assert torch.equal(output(model), expected)  # the inner context did not switch them on
    assert torch.equal(output(model), on)
    with pytest.raises(KeyError), lora.disabled(model):
        raise KeyError
    assert torch.equal(output(model), on)
    state = model.state_dict()
    assert [name for name in state if ".lora_" not in name] == names
    original = base(kind).to(dtype).state_dict()
    assert all(torch.equal(state[name], original[name]) for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trainable_and_they_are_float32(kind):
    model = adapt(base(kind).bfloat16(), kind, rank=3)
    assert trainable(model) == {name for name in model.state_dict() if ".lora_" in name}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output(model).float().square().mean().backward()
    optimizer.step()
    unused = {  # of the last block the text stream's output is not read, so nor are its queries
        f"transformer_blocks.2.attn.add_q_proj.{part}.weight" for part in lora.MATRICES
    }
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trainable(model) - unused
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_is_uniform_and_its_generators():
    model = nn.ModuleDict({"a": nn.Linear(400, 10), "b": nn.Linear(400, 10)})
    lora.add(model, ["a", "b"], 50, 1, torch.Generator().manual_seed(5))
    for layer in model.values():
        A = layer.lora_A.weight * math.sqrt(400)
        # U(−1, 1): 20,000 draws, whose mean square 1/3 has a standard error of 0.0021
        assert A.abs().max() <= 1 and A.square().mean().item() == pytest.approx(1 / 3, abs=0.011)
        assert layer.lora_B.weight.abs().max() == 0 and layer.lora_B.weight.shape == (10, 50)
    assert not torch.equal(model["a"].lora_A.weight, model["b"].lora_A.weight)
    one, same, other = (base() for _ in range(3))
    for model, seed in ((one, 0), (same, 0), (other, 1)):
        lora.add(model, lora.MMDIT_TARGETS, 2, 2, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(one.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert not any(torch.equal(one.get_parameter(n), other.get_parameter(n)) for n in trainable(one) if "lora_A" in n)


def test_targets_are_whole_parts_of_a_name():
    def adapted(*targets):
        model = Names()
        lora.add(model, targets, 1, 1)
        return sorted(lora.adapted(model))

    assert adapted("to_q") == ["inner.to_q", "to_q"]
    assert adapted("inner.to_q", "out.0") == ["inner.out.0", "inner.to_q"]
    names = sorted(lora.adapted(adapt(base())))
    streams = [f"transformer_blocks.{i}.attn.{name}" for i in range(3) for name in lora.MMDIT_TARGETS]
    streams.remove("transformer_blocks.2.attn.to_add_out")  # the last block has none
    second = [f"transformer_blocks.{i}.attn2.{name}" for i in range(2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    assert names == sorted(streams + second)
    assert len(lora.adapted(adapt(base("decoder"), "decoder"))) == 12
    text = clip.CLIPText(clip.TextConfig(**tiny.CLIP_TEXT))
    lora.add(text, ["q_proj", "v_proj"], 2, 2)
    parts = [f"text_model.encoder.layers.{i}.self_attn.{part}" for i in range(3) for part in ("q_proj", "v_proj")]
    assert sorted(lora.adapted(text)) == parts


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_computes_like_float32(kind):
    exact, half = adapt(base(kind), kind), adapt(base(kind).bfloat16(), kind)
    autocast = copy.deepcopy(exact)
    expected = output(exact)
    expected.square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = {"autocast": output(autocast)}
    outputs["half"] = output(half)
    gradient = torch.cat([p.grad.flatten() for p in exact.parameters() if p.requires_grad])
    for name, model in (("autocast", autocast), ("half", half)):
        assert (outputs[name].float() - expected).norm() / expected.norm() < 0.03, name
        outputs[name].float().square().mean().backward()
        assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        rounded = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        assert (rounded - gradient).norm() / gradient.norm() < 0.05, name
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # a base in bfloat16 may run under autocast too
        assert (output(half).float() - expected).norm() / expected.norm() < 0.03


def test_gradient_checkpointing_changes_no_gradient():
    plain, again = (adapt(base("decoder"), "decoder") for _ in range(2))
    again.model.gradient_checkpointing = True
    for model in (plain, again):
        output(model).square().mean().backward()
    for name in trainable(plain):
        assert torch.equal(plain.get_parameter(name).grad, again.get_parameter(name).grad), name


@pytest.mark.slow  # torch.compile calls a C++ compiler
def test_a_compiled_model_switches_too(tmp_path):
    model = adapt(base("decoder"), "decoder")
    on = output(model)
    with torch.no_grad(), lora.disabled(model):
        off = output(model)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), on)
    with torch.no_grad(), lora.disabled(compiled):
        torch.testing.assert_close(compiled(IDS), off)
    torch.testing.assert_close(compiled(IDS), on)
    for name, saved in (("plain", model), ("compiled", compiled)):
        lora.save(saved, tmp_path / name)
    assert load_file(tmp_path / "plain" / FILE).keys() == load_file(tmp_path / "compiled" / FILE).keys()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_on_cuda(kind, dtype):
    cpu, cuda = adapt(base(kind), kind), adapt(base(kind, "cuda").to(dtype), kind)  # a CPU generator draws the same A
    torch.testing.assert_close(cuda.state_dict(), cpu.state_dict(), check_device=False, check_dtype=False, rtol=1e-2, atol=1e-2)
    assert all(torch.equal(cuda.get_parameter(name).cpu(), cpu.get_parameter(name)) for name in trainable(cpu))
    expected, on = output(cpu), output(cuda)
    assert on.dtype == dtype and (on.float().cpu() - expected).norm() / expected.norm() < (
        0.03 if dtype.itemsize == 2 else 1e-3
    )
    with lora.disabled(cuda):
        assert torch.equal(output(cuda), output(base(kind, "cuda").to(dtype)))
    lora.add(model := base(kind, "cuda"), TARGETS[kind], 2, 2, torch.Generator("cuda").manual_seed(0))
    assert {p.device.type for p in model.parameters()} == {"cuda"}


# ----------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_is_adapters_on(kind):
    model, names = adapt(base(kind), kind), list(base(kind).state_dict())
    on = output(model)
    lora.merge(model)
    assert (output(model) - on).abs().max() / on.abs().max() < 1e-6
    assert list(model.state_dict()) == names and {type(m) for m in model.modules()} == {type(m) for m in base(kind).modules()}
    assert trainable(model) == set()
    with pytest.raises(ValueError, match="has no adapters"):
        lora.merge(model)
    adapt(model, kind)  # new ones may be put on


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merging_in_bfloat16_rounds_each_weight_once(kind):
    model = adapt(base(kind).bfloat16(), kind)
    on, layers = output(model).float(), copy.deepcopy(lora.adapted(model))
    lora.merge(model)
    for name, layer in layers.items():
        exact = layer.weight.double() + 1.5 * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
        merged = model.get_submodule(name).weight
        assert merged.dtype == torch.bfloat16 and ((merged - exact).abs() <= exact.abs() / 256).all()
    assert (output(model).float() - on).norm() / on.norm() < 0.03


def test_a_copy_is_its_own():
    model = adapt(base())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = output(model)
        assert torch.equal(output(twin), before)
        with lora.disabled(twin):
            assert torch.equal(output(model), before) and not torch.equal(output(twin), before)
        lora.merge(twin)
        move(model, seed=2)
        assert not torch.equal(output(model), before) and torch.allclose(output(twin), before, atol=1e-4)
    assert trainable(model) and lora.adapted(model)


def test_a_model_with_adapters_is_not_saved_as_a_plain_one(tmp_path):
    model = adapt(base("decoder"), "decoder")
    with pytest.raises(ValueError, match="the model has adapters; save them with lora.save, or lora.merge them") as error:
        model.save_pretrained(tmp_path / "model")
    assert "\n" not in str(error.value) and not (tmp_path / "model").exists()
    lora.merge(model)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(output(decoder.Decoder.from_pretrained(tmp_path / "model")), output(model))
