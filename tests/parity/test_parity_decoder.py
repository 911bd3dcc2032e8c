"""The decoder against transformers, on tiny random models of every family. Needs the extra `parity`."""

import dataclasses
import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nano_adrpo.language.sampling import probabilities
from nano_adrpo.models.decoder import Decoder, RewardModel, TextEncoder, read_config

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
# Texts of `batch` have 150 tokens, of which 64, or 100, are the trained length.
SHORT, YARN = {**SIZES, "max_position_embeddings": 100}, {"rope_type": "yarn", "factor": 4.0}
ROPES = {
    "linear": LlamaConfig(**SHORT, rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "dynamic": Qwen2Config(**SHORT, rope_theta=5000.0, rope_scaling={"rope_type": "dynamic", "factor": 3.0}),
    "yarn": Qwen3Config(**SIZES, head_dim=24, rope_scaling={**YARN, "original_max_position_embeddings": 64}),
    "yarn-trained-is-max": Qwen2Config(**SHORT, rope_theta=1e6, rope_scaling={**YARN, "factor": 2.0}),
    "yarn-mscale": LlamaConfig(
        **SIZES, rope_scaling={**YARN, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.2}
    ),
    "yarn-all": LlamaConfig(
        **SIZES,
        rope_scaling={
            **YARN, "original_max_position_embeddings": 64, "attention_factor": 0.8, "beta_fast": 20.0, "beta_slow": 2.0,
            "truncate": False,
        },
    ),
}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-untied": Qwen2Config(**SIZES, rope_theta=1e6, rms_norm_eps=1e-5),
    "qwen3": Qwen3Config(**SIZES, head_dim=24, rope_theta=1e6),
    "qwen3-tied-biased": Qwen3Config(**SIZES, head_dim=16, attention_bias=True, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES, rope_theta=500000.0, rope_scaling=LLAMA3, eos_token_id=[2, 3]),
    "llama-2": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, attention_bias=True),
    "gemma": GemmaConfig(**{**SIZES, "num_key_value_heads": 1}, head_dim=32),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=24, query_pre_attn_scalar=30, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma2-uncapped": Gemma2Config(
        **SIZES, head_dim=32, query_pre_attn_scalar=20, attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    **{f"rope-{name}": config for name, config in ROPES.items()},
}


def theirs(path, config, auto=AutoModelForCausalLM, **options):
    """A random model of transformers', also saved to `path`; no weight is left at the 0 or 1 that would hide it."""
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 0.5 if "norm" in name else 0.0, 0.3 if parameter.ndim == 1 else 0.15)
    model.save_pretrained(path, **options)
    return model


def batch():
    """ids and a mask with padding on the left, none, and on the right."""
    ids = torch.randint(0, 97, (3, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :40], mask[2, 90:] = 0, 0
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_logits(tmp_path, name):
    model, (ids, mask) = theirs(tmp_path, CONFIGS[name]), batch()
    ours = Decoder.from_pretrained(tmp_path)
    expected, got, seen = model(ids, attention_mask=mask).logits, ours(ids, mask), mask.bool()
    assert expected.std() > 0.3
    torch.testing.assert_close(got[seen], expected[seen], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(ids), model(ids).logits, atol=1e-4, rtol=0)

    logp = ours.token_logprobs(ids, mask, start=100, temperature=0.7)
    exact = (expected[:, :-1] / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None])[:, 99:, 0]
    torch.testing.assert_close(logp[seen[:, 100:]], exact[seen[:, 100:]], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_save_is_what_they_load(tmp_path, name):
    theirs(tmp_path, CONFIGS[name])
    ours, (ids, mask) = Decoder.from_pretrained(tmp_path, dtype=torch.float16), batch()
    ours.save_pretrained(tmp_path / "ours")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float16 and {key.rpartition(".")[0] for key in model.state_dict()} >= {"model.norm"}
    written, config = AutoConfig.from_pretrained(tmp_path / "ours"), CONFIGS[name]
    for key in ("rope_parameters", "eos_token_id", "pad_token_id", "tie_word_embeddings", "num_key_value_heads", "hidden_act"):
        assert getattr(written, key) == getattr(config, key, "gelu_pytorch_tanh")  # Gemma 2 has a hidden_activation only
    got = Decoder.from_pretrained(tmp_path / "ours", dtype=torch.float32)(ids, mask)
    torch.testing.assert_close(got[1], model.float()(ids, attention_mask=mask).logits[1], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "gemma", "gemma2", "rope-dynamic", "rope-yarn"])
def test_greedy_generation(tmp_path, name):
    model, (ids, mask) = theirs(tmp_path, CONFIGS[name]), batch()
    ids, mask = ids[:2, 20:60], mask[:2, 20:60]
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    ours = Decoder.from_pretrained(tmp_path)
    free = model.generate(ids, **options, eos_token_id=None)
    torch.testing.assert_close(ours.generate(ids, mask, 24, temperature=0)[0], free)
    eos = free[:, 50].tolist()  # each row's eleventh token; the rows end there or before
    out, completion = ours.generate(ids, mask, 24, temperature=0, eos=eos)
    expected = model.generate(ids, **options, eos_token_id=eos, pad_token_id=eos[0])
    torch.testing.assert_close(out, expected)
    assert completion.sum(1).max() == out.shape[1] - 40 <= 11


@torch.no_grad()
def test_dynamic_positions_grow_while_sampling(tmp_path):
    model, (ids, _) = theirs(tmp_path, CONFIGS["rope-dynamic"]), batch()
    prompt = ids[1:2, :92]  # 100 positions are the trained length
    expected = model.generate(
        prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, output_scores=True, return_dict_in_generate=True
    )
    ours = Decoder.from_pretrained(tmp_path)
    torch.testing.assert_close(ours.generate(prompt, None, 40, temperature=0)[0], expected.sequences)
    read = ours(expected.sequences)[0, -2]  # a text that is read at once has other angles for its first keys
    assert (read - expected.scores[-1][0]).abs().max() > 0.01


@torch.no_grad()
def test_top_k_and_top_p_keep_what_theirs_keep():
    logits = torch.randn(200, 97, generator=torch.Generator().manual_seed(2)) * 3
    for temperature, top_k, top_p in ((0.6, 0, 0.9), (1.0, 20, 1.0), (1.3, 7, 0.5), (1.0, 0, 0.05)):
        expected = TemperatureLogitsWarper(temperature)(None, logits)
        expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
        expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
        torch.testing.assert_close(probabilities(logits, temperature, top_k, top_p), expected.softmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma", "qwen2"])
def test_reward_model(tmp_path, name):
    config = type(CONFIGS[name])(**{**CONFIGS[name].to_dict(), "num_labels": 1, "pad_token_id": 0, "architectures": None})
    model, (ids, mask) = theirs(tmp_path, config, AutoModelForSequenceClassification), batch()
    ids = ids.clamp(min=1) * mask  # they find the end by the padding's id, so that no token may have it
    ours = RewardModel.from_pretrained(tmp_path)
    expected = model(ids, attention_mask=mask).logits[:, 0]
    assert expected.std() > 0.05
    torch.testing.assert_close(ours(ids, mask), expected, atol=1e-4, rtol=0)
    ours.save_pretrained(tmp_path / "ours")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert again.config.num_labels == 1
    torch.testing.assert_close(again(ids, attention_mask=mask).logits[:, 0], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_hidden_states_without_a_head(tmp_path):
    whole, (ids, mask) = theirs(tmp_path / "whole", CONFIGS["gemma2"]), batch()
    whole.model.save_pretrained(tmp_path / "bare")  # Gemma2Model, whose keys have no prefix
    expected, seen = whole.model(ids, attention_mask=mask).last_hidden_state, mask.bool()
    for name in ("whole", "bare"):
        ours = TextEncoder.from_pretrained(tmp_path / name)
        torch.testing.assert_close(ours(ids, mask)[seen], expected[seen], atol=1e-4, rtol=0)
    ours.save_pretrained(tmp_path / "ours")
    again, report = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()) and type(again) is type(whole.model)
    torch.testing.assert_close(again(ids, attention_mask=mask)[0][seen], expected[seen], atol=1e-4, rtol=0)
    torch.testing.assert_close(Decoder.from_pretrained(tmp_path / "bare")(ids), whole(ids).logits, atol=1e-4, rtol=0)
    half = TextEncoder.from_pretrained(tmp_path / "bare", torch.bfloat16)(ids, mask)[seen]
    assert (half - expected[seen]).norm() / expected[seen].norm() < 0.05


@torch.no_grad()
def test_shards_and_bfloat16(tmp_path):
    model, (ids, _) = theirs(tmp_path / "whole", CONFIGS["qwen3"]), batch()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    ours = Decoder.from_pretrained(tmp_path / "shards")
    assert ours.lm_head.weight.dtype == torch.bfloat16
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.float32)(ids).logits
    assert (ours(ids) - exact).abs().mean() < 0.02 * exact.std()
    widened = Decoder.from_pretrained(tmp_path / "shards", dtype=torch.float32)(ids)
    torch.testing.assert_close(widened, exact, atol=1e-4, rtol=0)


def test_configs_of_transformers_4(tmp_path):
    for name, config in CONFIGS.items():
        config.save_pretrained(tmp_path)
        new = read_config(tmp_path)
        values = json.loads((tmp_path / "config.json").read_text())
        rope = values.pop("rope_parameters")
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert read_config(tmp_path) == new, name
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


@pytest.mark.parametrize("cls", [Qwen2Config, Qwen3Config, LlamaConfig, GemmaConfig, Gemma2Config])
def test_defaults_of_every_family(tmp_path, cls):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": cls.model_type}))
    ours, theirs = read_config(tmp_path), cls()
    for key, value in dataclasses.asdict(ours).items():
        expected = getattr(theirs, key, None)
        if key == "rope_theta":
            expected = theirs.rope_parameters["rope_theta"]
        if key == "hidden_act":
            expected = expected or theirs.hidden_activation
        if key == "head_dim":
            expected = expected or theirs.hidden_size // theirs.num_attention_heads
        if key not in ("rope_scaling", "attention_bias"):
            assert value == expected, key
