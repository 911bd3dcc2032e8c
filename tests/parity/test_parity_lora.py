"""Adapters to and from peft, transformers and diffusers: the same outputs, the same number of parameters (extra `parity`)."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import train_grpo
from nano_adrpo import demo, lora
from nano_adrpo.models.decoder import Decoder
from nano_adrpo.models.mmdit import Config, MMDiT

KINDS = ["sd3-medium", "sd3.5-medium", "qwen3"]
QWEN3 = Qwen3Config(
    vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip
IDS = torch.tensor([[1, 5, 9, 2, 7, 3], [4, 4, 8, 6, 0, 11]])
TARGETS = {kind: lora.DECODER_TARGETS if kind == "qwen3" else lora.MMDIT_TARGETS for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def models(tmp_path, kind):
    """Calls that open one base model, as theirs and as ours."""
    theirs = Qwen3ForCausalLM(QWEN3) if kind == "qwen3" else SD3Transformer2DModel(**tiny.MMDIT_STYLES[kind])
    tiny.fill(theirs).save_pretrained(tmp_path / "base")
    ours = Decoder if kind == "qwen3" else MMDiT
    return (
        lambda **options: type(theirs).from_pretrained(tmp_path / "base", **options),
        lambda **options: ours.from_pretrained(tmp_path / "base", **options),
    )


@torch.no_grad()
def output(model):
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(inner, Decoder):
        return model(IDS)
    if isinstance(inner, Qwen3ForCausalLM):
        return model(input_ids=IDS).logits
    latents, sigma, context, pooled = tiny.mmdit_inputs()
    latents, context, pooled = (x.to(inner.proj_out.weight.dtype) for x in (latents, context, pooled))
    if isinstance(inner, MMDiT):
        return model(latents, sigma, context, pooled)
    return model(latents, context, pooled, 1000 * sigma).sample


def agree(a, b):
    """Whether float32's rounding alone parts them: ours rounds W·x + s·B·A·x once, PEFT three times."""
    return (a - b).abs().max() < 1e-5 * max(1, b.abs().max())


def adapted(model, targets, rank=4, alpha=6.0):
    """Ours, with adapters of which no matrix is zero."""
    generator = torch.Generator().manual_seed(0)
    lora.add(model, targets, rank, alpha, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def theirs_adapted(model, **options):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **options)).eval()


@pytest.mark.parametrize("rank, alpha", [(4, 4), (3, 6)])
def test_pefts_adapter_opens_here(tmp_path, kind, models, rank, alpha):
    theirs = theirs_adapted(models[0](), r=rank, lora_alpha=alpha, lora_dropout=0.1, target_modules=list(TARGETS[kind]))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = models[1]()
    lora.load(ours, tmp_path / "adapter")
    expected, base = output(theirs), output(models[1]())
    assert agree(output(ours), expected) and 0.1 < (expected - base).abs().max()
    trained, _ = theirs.get_nb_trainable_parameters()
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == trained
    merged = theirs.merge_and_unload()
    lora.merge(ours)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, merged.state_dict()[name], rtol=1e-6, atol=1e-6)


PATTERNS = [
    {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    {
        "target_modules": ["q_proj", "k_proj", "v_proj"], "use_rslora": True,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.k_proj": 5, "proj": 7},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 16, "[qv]_proj": 3},
    },
    {"target_modules": r".*layers\.[02]\..*\.(q_proj|down_proj)"},
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear", "exclude_modules": ["down_proj", "layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.1\..*o_proj"},
    {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
]  # fmt: skip


@pytest.mark.parametrize("options", PATTERNS)
def test_an_adapter_of_any_pattern_opens_here_and_goes_back(tmp_path, options):
    def saved(path):
        tiny.fill(Qwen3ForCausalLM(QWEN3)).save_pretrained(path)
        return path

    base = saved(tmp_path / "base")
    theirs = theirs_adapted(Qwen3ForCausalLM.from_pretrained(base), r=4, lora_alpha=6, **options)
    theirs.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    literal = tmp_path / "literal"  # peft writes out what "all-linear" is; people write the word
    shutil.copytree(tmp_path / "adapter", literal)
    (literal / "adapter_config.json").write_text(json.dumps(config | {"target_modules": options["target_modules"]}))
    theirs = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()  # sorts patterns
    expected, plain = output(theirs), output(Decoder.from_pretrained(base))
    for folder in (tmp_path / "adapter", literal):
        ours = lora.load(Decoder.from_pretrained(base), folder)
        assert agree(output(ours), expected) and 0.1 < (expected - plain).abs().max()
    lora.save(ours, tmp_path / "again")
    again = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(base), tmp_path / "again").eval()
    assert agree(output(again), expected)
    lora.merge_files(base, literal, tmp_path / "merged")
    model, report = Qwen3ForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()) and agree(output(model), expected)


def test_merging_files_is_pefts_merging(tmp_path, kind, models):
    theirs = theirs_adapted(models[0](), r=3, lora_alpha=6, target_modules=list(TARGETS[kind]))
    theirs.save_pretrained(tmp_path / "adapter")
    models[0]().save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    lora.merge_files(tmp_path / "sharded", tmp_path / "adapter", tmp_path / "out")
    merged, out = theirs.merge_and_unload(), type(models[0]()).from_pretrained(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name, tensor in out.state_dict().items():
        torch.testing.assert_close(tensor, merged.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_ranks_of_diffusers_own_file_without_a_header(tmp_path):
    # Its ranks differ, and the strength is 1 everywhere. A text encoder's adapter lies beside.
    tiny.fill(SD3Transformer2DModel(**tiny.MMDIT_STYLES["sd3.5-medium"])).save_pretrained(tmp_path / "base")
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    ranks = {"to_k": 5, "transformer_blocks.0.attn.to_q": 2}
    theirs.add_adapter(
        LoraConfig(
            r=3, lora_alpha=3, init_lora_weights=False, target_modules=["to_q", "to_k"], rank_pattern=ranks, alpha_pattern=ranks
        )
    )
    beside = {"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)}
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(theirs), text_encoder_lora_layers=beside
    )
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "a style.safetensors")
    ours = lora.load(MMDiT.from_pretrained(tmp_path / "base"), tmp_path / "a style.safetensors")
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "base")
    again.load_lora_adapter(tmp_path, weight_name="a style.safetensors")
    assert agree(output(ours), output(theirs)) and agree(output(again), output(theirs))


@pytest.mark.parametrize("saved_by, alpha", [("model", 6), ("pipeline", 6), ("older pipeline", 3)])
def test_diffusers_own_file_opens_here(tmp_path, saved_by, alpha):
    tiny.fill(SD3Transformer2DModel(**tiny.MMDIT_STYLES["sd3.5-medium"])).save_pretrained(tmp_path / "base")
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    theirs.add_adapter(LoraConfig(r=3, lora_alpha=alpha, init_lora_weights=False, target_modules=["to_q", "to_out.0"]))
    if saved_by == "model":
        theirs.save_lora_adapter(tmp_path / "adapter")
    else:
        header = _collate_lora_metadata({"transformer": theirs}) if saved_by == "pipeline" else {}
        matrices = get_peft_model_state_dict(theirs)
        StableDiffusion3Pipeline.save_lora_weights(tmp_path / "adapter", transformer_lora_layers=matrices, **header)
    base = MMDiT.from_pretrained(tmp_path / "base")
    ours = lora.load(MMDiT.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    expected = output(theirs)
    assert agree(output(ours), expected) and 0.1 < (expected - output(base)).abs().max()
    lora.save(ours, tmp_path / "again")
    torch.testing.assert_close(output(lora.load(base, tmp_path / "again")), output(ours), rtol=0, atol=0)


def test_our_adapter_opens_in_peft(tmp_path, kind, models):
    ours = adapted(models[1](), TARGETS[kind])
    lora.save(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(models[0](), tmp_path / "adapter").eval()
    expected = output(ours)
    assert agree(output(theirs), expected)
    with theirs.disable_adapter(), lora.disabled(ours):
        assert agree(output(theirs), output(ours)) and 0.1 < (output(ours) - expected).abs().max()


def test_our_adapter_opens_in_diffusers_and_transformers_themselves(tmp_path, kind, models):
    ours, theirs = adapted(models[1](), TARGETS[kind]), models[0]()
    lora.save(ours, tmp_path / "adapter")
    if kind == "qwen3":
        theirs.load_adapter(str(tmp_path / "adapter"))
    else:
        theirs.load_lora_adapter(tmp_path / "adapter", prefix="base_model.model", weight_name="adapter_model.safetensors")
    assert agree(output(theirs), output(ours))  # alpha is not the rank, so it has been read


def test_bfloat16_bases_agree(tmp_path, kind, models):
    # peft multiplies in float32, ours in bfloat16, as autocast would: the difference is bfloat16's.
    ours = adapted(models[1](dtype=torch.bfloat16), TARGETS[kind])
    lora.save(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(models[0](torch_dtype=torch.bfloat16), tmp_path / "adapter").eval()
    expected, exact = output(theirs), output(adapted(models[1](dtype=torch.float32), TARGETS[kind]))
    difference, rounding = ((output(ours).float() - x.float()).norm() / exact.norm() for x in (expected, exact))
    assert difference < 0.05 and rounding < 0.05


def test_gradients_agree(tmp_path, kind, models):
    theirs = theirs_adapted(models[0](), r=3, lora_alpha=6, target_modules=list(TARGETS[kind]))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = models[1]()
    lora.load(ours, tmp_path / "adapter")
    call = output.__wrapped__  # with gradients
    for model in (theirs, ours):
        call(model).square().mean().backward()
    expected = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[f"base_model.model.{name}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [lora.MMDIT_TARGETS, ["attn.to_q", "ff.net.2"], ["proj_out", "linear", "net.0.proj"]])
def test_full_size_adapters_are_of_the_same_names_and_shapes(targets):
    # SD3-medium. Ends of names, names in full, and names with layers of several kinds.
    sizes = dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)
    with torch.device("meta"):
        theirs = get_peft_model(SD3Transformer2DModel(**sizes), LoraConfig(r=32, target_modules=list(targets)))
        ours = MMDiT(Config(**sizes))
    lora.add(ours, targets, 32, 32)
    expected = {name.replace(".default", ""): p.shape for name, p in theirs.named_parameters() if p.requires_grad}
    assert {f"base_model.model.{name}": p.shape for name, p in ours.named_parameters() if p.requires_grad} == expected
    if targets is lora.MMDIT_TARGETS:
        assert sum(map(torch.Size.numel, expected.values())) == 18_776_064


def test_what_train_grpo_writes_opens_in_peft(tmp_path):
    base = Path(demo.__file__).parent / "arithmetic_base"
    options = "--rounds 1 --prompts-per-round 4 --group-size 4 --lr 1e-2 --no-eval-first --eval-samples 1"
    train_grpo.main([*options.split(), "--lora-rank", "4", "--lora-alpha", "16", "--out", str(tmp_path / "run")])
    (adapter,) = (file.parent for file in tmp_path.rglob("adapter_config.json"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ours = lora.load(Decoder.from_pretrained(base), adapter)
    with torch.no_grad():
        assert (theirs(input_ids=IDS).logits - ours(IDS)).abs().max() < 1e-4
        with lora.disabled(ours), theirs.disable_adapter():
            expected = ours(IDS)
            assert (theirs(input_ids=IDS).logits - expected).abs().max() < 1e-4
        assert (ours(IDS) - expected).abs().max() > 1e-2
