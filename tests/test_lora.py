"""Low-rank adapters: y = W·x + b + (alpha / rank)·B·A·x by hand, off is the base bit for bit, merging, files, bad input."""

import copy
import json
import math

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from nano_adrpo import files, lora
from nano_adrpo.models import clip, decoder, mmdit

KINDS = ["mmdit", "decoder"]
TARGETS = {"mmdit": lora.MMDIT_TARGETS, "decoder": lora.DECODER_TARGETS}
IDS = torch.tensor([[1, 5, 9, 2, 7, 3], [4, 4, 8, 6, 0, 11]])


def base(kind="mmdit", device="cpu"):
    if kind == "mmdit":
        return tiny.fill(mmdit.MMDiT(mmdit.Config(**tiny.MMDIT_STYLES["sd3.5-medium"]))).to(device)
    config = decoder.Config("qwen3", 24, 32, 48, 3, 4, 64, num_key_value_heads=2, head_dim=8)
    return tiny.fill(decoder.Decoder(config)).to(device)


def output(model):
    parameter = next(model.parameters())
    if isinstance(model, decoder.Decoder):
        return model(IDS.to(parameter.device))
    latents, sigma, context, pooled = (x.to(parameter.device) for x in tiny.mmdit_inputs())
    return model(*(x if x is sigma else x.to(parameter.dtype) for x in (latents, sigma, context, pooled)))


def adapt(model, kind="mmdit", rank=4, alpha=6.0, moved=True):
    """Adapters whose B is not zero."""
    lora.add(model, TARGETS[kind], rank, alpha, torch.Generator().manual_seed(0))
    if moved:
        move(model)
    return model


def move(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class Names(nn.Module):
    """Layers whose names are almost a target's."""

    def __init__(self):
        super().__init__()
        self.to_q, self.xto_q, self.to_q_norm = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(3, 5)
        self.inner = nn.ModuleDict({"to_q": nn.Linear(5, 2, bias=False), "out": nn.ModuleList([nn.Linear(2, 2)])})
        self.conv = nn.ModuleDict({"to_q": nn.Conv2d(3, 3, 1)})


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


# ------------------------------------------------------------------------------------------------------------------- files

FILE = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    lora.save(adapt(base()), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip(tmp_path, kind):
    model = adapt(base(kind), kind)
    lora.save(model, tmp_path / "one" / "two")  # folders are made
    again = base(kind)
    lora.load(again, tmp_path / "one" / "two")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert trainable(again) == trainable(model)
    assert torch.equal(output(again), output(model))
    lora.save(again, tmp_path / "three")
    for file in (FILE, "adapter_config.json"):
        assert (tmp_path / "three" / file).read_bytes() == (tmp_path / "one" / "two" / file).read_bytes()
    config = json.loads((tmp_path / "three" / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": list(TARGETS[kind]), "bias": "none"}
    assert {key: config[key] for key in expected} == expected
    keys = {f"base_model.model.{name}" for name in trainable(model)}
    assert load_file(tmp_path / "three" / FILE).keys() == keys
    with safe_open(tmp_path / "three" / FILE, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])  # what diffusers reads in place of the config
    assert header["base_model.model.r"] == 4 and header["base_model.model.lora_alpha"] == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_and_bases(folder, dtype):
    save_file({name: tensor.to(dtype) for name, tensor in load_file(folder / FILE).items()}, folder / FILE)
    model = base().bfloat16()
    lora.load(model, folder)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    expected = output(adapt(base()))
    assert (output(model).float() - expected).norm() / expected.norm() < 0.03


def test_full_size_on_meta(tmp_path):
    # SD3-medium: 24 blocks, 1536 wide. Eight projections a block, seven in the last, each 32·(1536 + 1536) numbers.
    sizes = dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)
    with torch.device("meta"):
        model, again = (mmdit.MMDiT(mmdit.Config(**sizes)) for _ in range(2))
    lora.add(model, lora.MMDIT_TARGETS, 32, 32, torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == (24 * 8 - 1) * 32 * 2 * 1536 == 18_776_064
    tiny.headers_only(tmp_path / FILE, {lora.PREFIX + name: model.get_parameter(name).shape for name in trainable(model)})
    targets = list(lora.MMDIT_TARGETS)
    tiny.write_json(
        tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 32, "lora_alpha": 8, "target_modules": targets}
    )
    lora.load(again, tmp_path)
    assert trainable(again) == trainable(model) and {p.device.type for p in again.parameters()} == {"meta"}


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "targets, rank, alpha, message",
    [
        (["nope"], 2, 2, "MMDiT has no linear layer whose name ends in one of ['nope']"),
        (["to_q", "o_q"], 2, 2, "MMDiT has no linear layer whose name ends in 'o_q'"),
        (["norm_q"], 2, 2, "ends in one of ['norm_q']"),  # a norm is no linear layer
        ([], 2, 2, "ends in one of []"),
        ("to_q", 2, 2, "lora.add: key 'target_modules' is 'to_q'; expected a list, each a text"),
        (["to_q"], 0, 2, "lora.add: key 'r' is 0; expected a positive int"),
        (["to_q"], 2.5, 2, "lora.add: key 'r' is 2.5; expected a positive int"),
        (["to_q"], 2, 0, "lora.add: key 'lora_alpha' is 0; expected a positive float"),
        (["to_q"], 2, float("nan"), "lora.add: key 'lora_alpha' is nan; expected a positive float"),
    ],
)
def test_bad_calls_are_refused(targets, rank, alpha, message):
    model = base()
    with pytest.raises(ValueError) as error:
        lora.add(model, targets, rank, alpha)
    assert (
        message in str(error.value)
        and "\n" not in str(error.value)
        and not lora.named(model, lora.Adapted)
        and len(trainable(model)) > 50
    )


def test_models_with_and_without_adapters_are_told_apart(folder):
    model = adapt(base())
    for call in (lambda: lora.add(model, ["ff.net.2"], 2, 2), lambda: lora.load(model, folder)):
        with pytest.raises(ValueError, match="this MMDiT has adapters already; merge them"):
            call()
    for call in (lora.merge, lambda model: lora.save(model, folder), lambda model: lora.disabled(model).__enter__()):
        with pytest.raises(ValueError, match="this MMDiT has no adapters"):
            call(base())
    with pytest.raises(ValueError, match="'lm_head' can have no adapter: Decoder.token_logprobs reads its weight"):
        lora.add(base("decoder"), ["q_proj", "lm_head"], 2, 2)


def refused(model, folder, message):
    before = model.state_dict()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        lora.load(model, folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert model.state_dict().keys() == before.keys() and trainable(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_adapter_of_another_model_is_refused(folder, device):
    wide = tiny.MMDIT | dict(
        num_attention_heads=3, caption_projection_dim=192, qk_norm="rms_norm", dual_attention_layers=(0, 1)
    )
    wide = mmdit.MMDiT(mmdit.Config(**wide)).to(device)
    name = "base_model.model.transformer_blocks.0.attn.add_k_proj.lora_A.weight"
    refused(wide, folder, rf"{folder / FILE}: key '{name}' has shape \[4, 128\]; expected \[4, 192\]")
    plain = mmdit.MMDiT(mmdit.Config(**tiny.MMDIT)).to(device)  # without the second attention
    refused(plain, folder, r"key 'base_model.model.transformer_blocks.0.attn2.to_k.lora_A.weight' is not part of MMDiT")
    deep = mmdit.MMDiT(mmdit.Config(**tiny.MMDIT_STYLES["sd3.5-medium"] | dict(num_layers=4))).to(device)
    refused(deep, folder, r"key 'base_model.model.transformer_blocks.2.attn.to_add_out.lora_A.weight' is missing \(16 of 78")
    refused(base("decoder"), folder, "adapter_config.json: Decoder has no linear layer whose name ends in one of")


def test_an_adapter_on_the_head_is_refused_with_its_file(tmp_path):
    lora.save(adapt(base("decoder"), "decoder"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    files.write_json(tmp_path / "adapter_config.json", config | {"target_modules": ["q_proj", "lm_head"]})
    refused(base("decoder"), tmp_path, "adapter_config.json: 'lm_head' can have no adapter")


def test_damaged_and_missing_files_are_refused(folder):
    tensors, config = load_file(folder / FILE), (folder / "adapter_config.json").read_text()
    key = "base_model.model.transformer_blocks.1.attn.to_q.lora_B.weight"
    save_file(tensors | {key: torch.zeros(128, 5)}, folder / FILE)
    refused(base(), folder, rf"{folder / FILE}: key '{key}' has shape \[128, 5\]; expected \[128, 4\]")
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, folder / FILE)
    refused(base(), folder, f"key '{key}' is missing \\(1 of 62 keys are\\)")
    (folder / FILE).write_bytes(b"no")
    refused(base(), folder, f"{folder / FILE}: not a whole safetensors file")
    (folder / FILE).unlink()
    refused(base(), folder, "no adapter_model.safetensors")
    save_file(tensors, folder / FILE)
    (folder / "adapter_config.json").write_text(config[:20])
    refused(base(), folder, "adapter_config.json: not valid JSON")
    (folder / "adapter_config.json").unlink()
    refused(base(), folder, "adapter_config.json: no such file")


def test_diffusers_own_file(folder, tmp_path):
    ours = {name.removeprefix(lora.PREFIX): tensor for name, tensor in load_file(folder / FILE).items()}
    file, header = tmp_path / "pytorch_lora_weights.safetensors", {"r": 4, "lora_alpha": 8, "target_modules": ["to_q"]}

    def write(tensors, **header):
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(header)} if header else None)

    write({f"transformer.{name}": tensor for name, tensor in ours.items()})  # without a header alpha is the rank
    loaded = lora.load(base(), tmp_path)
    assert next(iter(lora.adapted(loaded).values())).scale == 1
    assert torch.equal(
        loaded.transformer_blocks[1].attn.to_q.lora_B.weight, ours["transformer_blocks.1.attn.to_q.lora_B.weight"]
    )
    write(ours, **header)
    refused(base(), tmp_path, f"{file}: key 'peft_type' is missing; expected 'LORA'")
    write(ours, peft_type="LORA", use_dora=True, **header)
    refused(base(), tmp_path, f"{file}: key 'use_dora' is True; expected None or False")
    write(
        {f"transformer.{name}": tensor for name, tensor in ours.items()} | {"text_encoder.x.lora_A.weight": torch.zeros(4, 2)}
    )
    refused(base(), tmp_path, f"{file}: key 'text_encoder.x.lora_A.weight' is not part of MMDiT")
    save_file(ours, file, {"lora_adapter_metadata": "{"})
    refused(base(), tmp_path, f"{file}: 'lora_adapter_metadata' in its header")
    write({"x": torch.zeros(1)})
    refused(base(), tmp_path, f"{file}: key 'r' is 0; expected a positive int")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LOHA"}, "key 'peft_type' is 'LOHA'; expected 'LORA'"),
        *(({key: True}, f"key '{key}' is True; expected None or False") for key in ("use_dora", "use_rslora", "lora_bias")),
        ({"fan_in_fan_out": True}, "key 'fan_in_fan_out' is True"),
        ({"bias": "lora_only"}, "key 'bias' is 'lora_only'"),
        ({"modules_to_save": ["proj_out"]}, r"key 'modules_to_save' is \['proj_out'\]"),
        ({"rank_pattern": {"to_q": 8}}, "key 'rank_pattern' is {'to_q': 8}"),
        ({"alpha_pattern": {"to_q": 8}}, "key 'alpha_pattern' is"),
        ({"layers_to_transform": 0}, "key 'layers_to_transform' is 0"),
        ({"init_lora_weights": "pissa"}, "key 'init_lora_weights' is 'pissa'; expected True or False or 'gaussian'"),
        ({"target_modules": r".*\.to_q"}, r"key 'target_modules' is '.\*.*; expected a list, each a text"),
        ({"r": None}, "key 'r' is None; expected a positive int"),
        ({"lora_alpha": -1}, "key 'lora_alpha' is -1; expected a positive float"),
        ({"r": 5}, r"has shape \[4, 128\]; expected \[5, 128\]"),
    ],
)
def test_configs_that_do_not_fit_are_refused(folder, change, message):
    config = json.loads((folder / "adapter_config.json").read_text())
    files.write_json(folder / "adapter_config.json", config | change)
    refused(base(), folder, message)


def test_what_does_not_change_the_computation_is_passed_over(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    neutral = {"use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "layers_to_transform": None}
    neutral |= {"lora_dropout": 0.1, "init_lora_weights": "gaussian", "megatron_core": "megatron.core", "inference_mode": True}
    neutral |= {"target_modules": [*lora.MMDIT_TARGETS, "of_another_model"]}  # PEFT's own rule: one that is found is enough
    files.write_json(folder / "adapter_config.json", config | neutral)
    model = base()
    lora.load(model, folder)
    assert torch.equal(output(model), output(adapt(base())))
