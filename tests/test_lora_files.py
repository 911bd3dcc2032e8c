"""lora.py: files in PEFT's and diffusers' format, and refusals."""

import json
import sys
import time

import pytest
import tiny
import torch
from lora_models import FILE, KINDS, TARGETS, adapt, base, output, trainable
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nano_adrpo import files, lora
from nano_adrpo.errors import run_command
from nano_adrpo.files import safetensors
from nano_adrpo.models import decoder, mmdit

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
        (".*nope", 2, 2, "MMDiT has no linear layer whose name matches '.*nope'"),
        ("(", 2, 2, "lora.add: '(' is not a regular expression"),
        ([3], 2, 2, "lora.add: key 'target_modules' is [3]; expected a list, each a text or a text"),
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


def own(folder, prefix="transformer."):
    """The matrices under diffusers' keys."""
    return {f"{prefix}{name.removeprefix(lora.PREFIX)}": tensor for name, tensor in load_file(folder / FILE).items()}


def scale(model):
    (scale,) = {layer.scale for layer in lora.adapted(model).values()}
    return scale


@pytest.mark.parametrize("prefix", ["transformer.", ""])  # a pipeline's, a model's
@pytest.mark.parametrize("name", ["pytorch_lora_weights", "a style"])
def test_diffusers_own_file(folder, tmp_path, prefix, name):
    file, expected = tmp_path / f"{name}.safetensors", output(adapt(base(), alpha=8.0))
    header = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(TARGETS["mmdit"])}
    header |= {"use_rslora": True, "rank_pattern": {}}
    save_file(own(folder, prefix), file, {"lora_adapter_metadata": json.dumps({prefix + k: v for k, v in header.items()})})
    for path in (file, tmp_path):
        assert scale(lora.load(base(), path)) == 4
    save_file(own(folder, prefix), file)  # without a header alpha is the rank
    assert scale(lora.load(base(), file)) == 1
    older = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
    save_file({safetensors.rename(key, older): tensor for key, tensor in own(folder, prefix).items()}, file)
    model = lora.load(base(), file)
    for layer in lora.adapted(model).values():
        layer.scale = 2
    assert torch.equal(output(model), expected)
    assert scale(lora.load(base(), folder / FILE)) == 1.5  # PEFT's file, by its path


def test_adapters_of_text_encoders_are_left_out_and_this_is_said(folder, tmp_path, capsys):
    file, beside = tmp_path / "x.safetensors", {"text_encoder_2.q_proj.lora_A.weight": torch.ones(4, 2)}
    save_file(own(folder) | beside | {"text_encoder.q_proj.lora_A.weight": torch.ones(4, 2)}, file)
    lora.load(base(device="meta"), file)
    assert len(lora.adapted(lora.load(base(), file))) == 31
    said = "the transformer's adapters are used, those of text_encoder, text_encoder_2 are not"
    assert capsys.readouterr().out == f"{file}: {said}\n"
    save_file(beside, file)
    refused(base(), file, f"{file}: holds adapters of text_encoder_2 alone; expected a transformer's")


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            ["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"],
            "of kohya's layout; expected PEFT's or diffusers' keys",
        ),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"], "of kohya's layout"),
        (["transformer.a.lora_A.weight", "transformer.a.dora_scale"], "'transformer.a.dora_scale' is of a DoRA adapter"),
        (["a.lokr_w1"], "'a.lokr_w1' is of a LyCORIS adapter"),
        (["double_blocks.0.processor.qkv_lora1.down.weight"], "of x-flux's layout"),
        (["diffusion_model.joint_blocks.0.x.lora_A.weight"], "of ComfyUI's layout"),
        (["unet.a.lora_A.weight", "unet.a.lora_B.weight"], "holds adapters of unet alone; expected a transformer's"),
        (["base_model.model.a.lora_A.weight", "other"], "key 'other' is not part of an adapter of one model"),
        (
            ["base_model.model.proj_out.weight"],
            "no matrix of a linear layer's adapter; embeddings' adapters and layers that were",
        ),
        (["base_model.model.e.lora_embedding_A"], "key 'base_model.model.e.lora_embedding_A' is no matrix of a linear layer's"),
    ],
)
def test_other_layouts_are_named(tmp_path, keys, message):
    save_file({key: torch.ones(4, 4) for key in keys}, tmp_path / "x.safetensors")
    refused(base(), tmp_path / "x.safetensors", message)


def test_diffusers_headers_and_folders_that_do_not_fit(folder, tmp_path):
    file, header = tmp_path / "x.safetensors", {"r": 4, "lora_alpha": 8, "target_modules": ["to_q"]}

    def write(**header):
        header = {f"transformer.{key}": value for key, value in header.items()}
        save_file(own(folder), file, {"lora_adapter_metadata": json.dumps(header)})

    write(**header)
    refused(base(), tmp_path, f"{file}: key 'peft_type' is missing; expected 'LORA'")
    write(peft_type="LORA", use_dora=True, **header)
    refused(base(), tmp_path, f"{file}: key 'use_dora' is True; expected None or False")
    save_file(own(folder), file, {"lora_adapter_metadata": "{"})
    refused(base(), tmp_path, f"{file}: 'lora_adapter_metadata' in its header")
    save_file(own(folder), tmp_path / "y.safetensors")
    refused(base(), tmp_path, f"{tmp_path}: holds 2 safetensors files; expected one adapter, or the path of one")
    refused(base(), tmp_path / "none", "none: no such file or folder; expected an adapter's")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LOHA"}, "key 'peft_type' is 'LOHA'; expected 'LORA'"),
        *(({key: True}, f"key '{key}' is True; expected None or False") for key in ("use_dora", "lora_bias")),
        ({"fan_in_fan_out": True}, "key 'fan_in_fan_out' is True"),
        ({"bias": "lora_only"}, "key 'bias' is 'lora_only'"),
        ({"modules_to_save": ["proj_out"]}, r"key 'modules_to_save' is \['proj_out'\]"),
        ({"rank_pattern": {"to_q": 8}}, r"to_q.lora_A.weight' has shape \[4, 128\]; expected \[8, 128\]"),
        ({"rank_pattern": {"to_q": "8"}}, "key 'rank_pattern' is '8' for 'to_q'; expected a positive int"),
        ({"rank_pattern": {"to_q(": 8}}, r"adapter_config.json: 'to_q\(' is not a regular expression"),
        ({"alpha_pattern": {"to_q": -8}}, "key 'alpha_pattern' is -8 for 'to_q'; expected a positive float"),
        ({"use_rslora": 1}, "key 'use_rslora' is 1; expected true or false"),
        (
            {"layers_to_transform": -1},
            "key 'layers_to_transform' is -1; expected a list, each an int from 0 up or an int from 0",
        ),
        ({"layers_to_transform": [2], "layers_pattern": "transformer_blocks"}, "blocks.0.attn.*' is not part of MMDiT"),
        ({"layers_to_transform": [2]}, "has no linear layer whose name ends in one of .*'add_q_proj'. and 3 more"),
        ({"target_modules": "all-linear", "layers_to_transform": 1}, "expected only with a list of target_modules"),
        ({"target_modules": "all-linear"}, r"lora_A.weight' is missing"),
        ({"target_modules": r".*\.to_q"}, "add_k_proj.lora_A.weight' is not part of MMDiT"),
        ({"exclude_modules": ["to_q"]}, "to_q.lora_A.weight' is not part of MMDiT"),
        ({"init_lora_weights": "pissa"}, "key 'init_lora_weights' is 'pissa'; expected True or False or 'gaussian'"),
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


# ----------------------------------------------------------------------------------------------------------------- merging


def merge(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lora", "merge", *map(str, arguments)])
    run_command(lora.main)


def test_merged_files_are_the_merged_model_and_its_companions(tmp_path, monkeypatch, capsys):
    model, folder, out = base("decoder").bfloat16(), tmp_path / "base", tmp_path / "new" / "out"
    model.files = {"tokenizer.json": b"{}", "merges.txt": b"a b"}
    model.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"the same weights, not merged")
    lora.save(adapt(model, "decoder"), tmp_path / "adapter")
    merge(monkeypatch, folder, tmp_path / "adapter", out)
    assert capsys.readouterr().out == f"{out}: 12 layers of {folder} merged with {tmp_path}/adapter/adapter_config.json\n"
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", *model.files}
    for name in ("config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    expected, merged = lora.merge(model).state_dict(), load_file(out / "model.safetensors")
    torch.testing.assert_close(merged, dict(expected), rtol=0, atol=0)
    assert not torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"],
        load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"],
    )


def test_a_pipeline_is_merged_in_its_transformer_and_copied_elsewhere(tmp_path, monkeypatch):
    folder, out, model = tmp_path / "base", tmp_path / "out", base()
    model.save_pretrained(folder / "transformer")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))  # a variant becomes the plain one
    (folder / "vae").mkdir(), (folder / ".cache").mkdir()
    for name in ("model_index.json", "vae/weights.safetensors", ".cache/x", "sd3_medium.safetensors"):
        (folder / name).write_text(name)
    lora.save(adapt(model), tmp_path / "adapter")
    merge(monkeypatch, folder, tmp_path / "adapter", out)
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == {
        "model_index.json", "vae/weights.safetensors", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    again = mmdit.MMDiT.from_pretrained(out / "transformer")
    torch.testing.assert_close(again.state_dict(), lora.merge(model).state_dict(), rtol=0, atol=0)


def test_one_shard_with_an_index_stays_one_and_what_transformers_opens_comes_along(tmp_path, monkeypatch):
    folder, out, model = tmp_path / "base", tmp_path / "out", base("decoder")
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    listed = dict.fromkeys(load_file(folder / "model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors")
    files.write_json(folder / "model.safetensors.index.json", {"weight_map": listed})
    (folder / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tool_use.jinja", "additional_chat_templates/notes", "spk_dict.pt", "other.pt"):
        (folder / name).write_text(name)
    lora.save(adapt(model, "decoder"), tmp_path / "adapter")
    merge(monkeypatch, folder, tmp_path / "adapter", out)
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == {
        "config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json",
        "additional_chat_templates/tool_use.jinja", "spk_dict.pt",
    }  # fmt: skip
    again = decoder.Decoder.from_pretrained(out)
    torch.testing.assert_close(again.state_dict(), lora.merge(model).state_dict(), rtol=0, atol=0)


def test_what_is_not_merged(folder, tmp_path, monkeypatch, capsys):
    base().save_pretrained(tmp_path / "base")
    base("decoder").save_pretrained(tmp_path / "decoder")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").touch()
    wide = load_file(tmp_path / "base" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "float8").mkdir()
    save_file(
        {k: t.to(torch.float8_e4m3fn) for k, t in wide.items()}, tmp_path / "float8" / "diffusion_pytorch_model.safetensors"
    )
    for arguments, message in (
        ((tmp_path / "base", folder, tmp_path / "used"), "used: exists; expected a new or empty folder"),
        ((tmp_path / "base", folder, tmp_path / "base"), "base: exists; expected a new or empty folder"),
        ((tmp_path / "none", folder, tmp_path / "out"), "none: no such folder; expected a model folder"),
        ((tmp_path / "base", tmp_path / "none", tmp_path / "out"), "none: no such file or folder; expected an adapter's"),
        ((tmp_path / "decoder", folder, tmp_path / "out"), f"lora_A.weight' is not part of {tmp_path / 'decoder'}"),
        ((tmp_path / "float8", folder, tmp_path / "out"), "is stored as torch.float8_e4m3fn; expected a wider dtype to merge"),
        (("only",), "the following arguments are required"),
    ):
        with pytest.raises(SystemExit) as status:
            merge(monkeypatch, *arguments)
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1 and status.value.code == 2, said
    assert not (tmp_path / "out").exists()


def test_a_regular_expression_without_end_is_refused_in_time(tmp_path):
    lora.save(adapt(base()), tmp_path)
    config = tmp_path / "adapter_config.json"
    values, start = json.loads(config.read_text()), time.process_time()
    for change in (
        {"target_modules": "(.+)+!"}, {"exclude_modules": "(.|.)+!"}, {"rank_pattern": {"(.+)+!": 4}},
        {"alpha_pattern": {"(.*.*)*!": 4}}, {"target_modules": "(" * 3000},
        {"layers_to_transform": [0], "layers_pattern": "(.+)+!"},
    ):  # fmt: skip
        config.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match="is not a regular expression that can be used") as error:
            lora.load(base(), tmp_path)
        assert str(error.value).isprintable()
    assert time.process_time() - start < 5


def test_a_merge_that_fails_leaves_nothing(tmp_path, monkeypatch):
    base("decoder").save_pretrained(tmp_path / "model")
    lora.save(adapt(base("decoder"), "decoder"), tmp_path / "adapter")
    monkeypatch.setattr(lora, "merged", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora.merge_files(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter"}
