"""lora.py: files in PEFT's and diffusers' format, and refusals."""

import json

import pytest
import tiny
import torch
from lora_models import FILE, KINDS, TARGETS, adapt, base, output, trainable
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nano_adrpo import files, lora
from nano_adrpo.models import mmdit

# ------------------------------------------------------------------------------------------------------------------- files


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
