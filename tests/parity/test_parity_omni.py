"""Qwen2.5-Omni's thinker against transformers, on tiny random models. Needs the extra `parity`."""

import functools
import json

import pytest
import tiny_omni
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from nano_adrpo import lora
from nano_adrpo.models import omni
from nano_adrpo.models.omni import Omni, log_mel, tokens_of

# 0.03 s; three frames; exactly one chunk, exactly three; across borders, odd lengths
SECONDS = (0.03, 321 / 16000, 2.0, 6.0, 4.8001, 2.005, 7.313)
RELEASE = tiny_omni.config()["thinker_config"]
TALKER = dict(
    vocab_size=64, embedding_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]},
    **{f"tts_{kind}_token_id": 1 for kind in ("text_start", "text_end", "text_pad", "codec_start", "codec_end", "codec_pad")},
)  # fmt: skip
TALKER["tts_codec_mask_token_id"] = 1
DIT = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ff_mult=1, emb_dim=16, head_dim=16, num_embeds=64, enc_dim=8,
    enc_emb_dim=8, enc_channels=[8, 8, 8, 8, 24], enc_attention_channels=4, enc_res2net_scale=2, enc_se_channels=4, mel_dim=16,
)  # fmt: skip
BIGVGAN = dict(
    mel_dim=16, upsample_initial_channel=16, resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 1, 1]], upsample_rates=[2],
    upsample_kernel_sizes=[4],
)  # fmt: skip


def theirs(path, **options):
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(path, **options).eval()


def filled(model):
    """No weight is left at the 0 or 1 that would hide it."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = "norm" in name or "ln_" in name
        torch.nn.init.normal_(parameter, 0.5 if norm else 0.0, 0.3 if parameter.ndim == 1 else 0.15)
    return model.eval()


def features(clips, seconds=10):
    """The arguments that theirs takes for these clips, filled with zeros up to so many seconds."""
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=seconds)
    made = extractor([clip.numpy() for clip in clips], sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    return {"input_features": made.input_features, "feature_attention_mask": made.attention_mask}


@functools.cache
def batch():
    """Prompts with two clips, one, none, and one of 0.03 s: ids and mask [4, T], padded on the left; the clips; and all of it
    as the arguments that theirs takes."""
    clips = [tiny_omni.clip(seconds, seed) for seed, seconds in enumerate((2.4001, 2.0, 1.37, 0.03))]
    counts = [tokens_of(len(clip)) for clip in clips]
    ids, mask = tiny_omni.padded(*(tiny_omni.prompt(*some) for some in (counts[:2], counts[2:3], (), counts[3:])))
    return ids, mask, clips, {"input_ids": ids, "attention_mask": mask, **features(clips)}


@torch.no_grad()
def check(model, ours, atol=1e-4):
    """Logits, log-probabilities and greedy answers."""
    ids, mask, clips, given = batch()
    expected, seen = model(**given).logits, mask.bool()
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(ids, mask, clips)[seen], expected[seen], atol=atol, rtol=0)
    exact = (expected[:, :-1] / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    for start in (1, 5, ids.shape[1] - 6):
        logp = ours.token_logprobs(ids, mask, start, temperature=0.7, clips=clips)
        both = seen[:, start:] & seen[:, start - 1 : -1]
        torch.testing.assert_close(logp[both], exact[:, start - 1 :][both], atol=atol, rtol=0)
    answers = model.generate(**given, max_new_tokens=12, do_sample=False, eos_token_id=None)
    torch.testing.assert_close(ours.generate(ids, mask, 12, temperature=0, clips=clips)[0], answers)
    return answers


@pytest.fixture
def folder(tmp_path):
    return tiny_omni.folder(tmp_path / "model")


def test_log_mel():
    clips = [tiny_omni.clip(seconds, seed) for seed, seconds in enumerate(SECONDS)]
    clips += [torch.zeros(5000), 1e-6 * clips[2], torch.sin(torch.arange(8000) / 3), torch.cat([clips[3], torch.zeros(9999)])]
    clips[3][-200:] = 1.0  # the loudest samples are the last: frames behind the clip see them too
    made = features(clips)
    for clip, expected, frames in zip(clips, made["input_features"], made["feature_attention_mask"].sum(1).tolist()):
        got = log_mel(clip)
        assert got.shape == (128, frames)
        torch.testing.assert_close(got, expected[:, :frames], atol=1e-5, rtol=0)


def test_log_mel_of_clips_up_to_the_longest():
    clips = [tiny_omni.clip(seconds) for seconds in (0.03, 4_799_900 / 16000)]  # few zeros are left: the end is mirrored
    for clip, expected in zip(clips, features(clips, 300)["input_features"]):
        clip_mel = log_mel(clip)
        torch.testing.assert_close(clip_mel, expected[:, : clip_mel.shape[1]], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_audio_tower(folder, dtype, monkeypatch):
    monkeypatch.setattr(omni, "BATCH", 5)
    model, ours = theirs(folder, dtype=dtype).model, Omni.from_pretrained(folder, dtype)
    clips = [tiny_omni.clip(seconds, seed) for seed, seconds in enumerate(SECONDS)]  # 15 chunks
    mels = [log_mel(clip) for clip in clips]
    frames = torch.tensor([mel.shape[1] for mel in mels])
    expected = model.audio_tower(torch.cat(mels, dim=1), feature_lens=frames).last_hidden_state
    got = ours.embed_clips(clips)
    assert [len(tokens) for tokens in got] == [tokens_of(len(clip)) for clip in clips] and got[0].dtype == dtype
    assert expected.float().std() > 0.3
    if dtype == torch.float32:
        torch.testing.assert_close(torch.cat(got), expected, atol=1e-5, rtol=0)
    exact = torch.cat(Omni.from_pretrained(folder, torch.float32).embed_clips(clips))
    assert (torch.cat(got) - exact).abs().mean() < 1.3 * (expected - exact).abs().mean() + 1e-6


def test_the_whole_thinker_and_what_we_save(tmp_path, folder):
    model, ours = theirs(folder), Omni.from_pretrained(folder)
    answers = check(model, ours)
    ours.save_pretrained(tmp_path / "ours")
    again, report = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert all(key.startswith("model.visual.") for key in report.pop("missing_keys")) and not any(report.values()), report
    assert torch.equal(check(again.eval(), ours), answers)
    assert again.config.audio_token_id == tiny_omni.AUDIO and again.generation_config.eos_token_id == tiny_omni.END


def test_positions_are_plain(folder):
    """TMRoPE's three axes are the number of tokens before, each audio token being one."""
    ids, mask, _, given = batch()
    frames = given["feature_attention_mask"].sum(1)
    positions, deltas = theirs(folder).model.get_rope_index(ids, None, None, mask, False, frames, None)
    assert (positions == mask.cumsum(1) - 1)[:, mask.bool()].all() and positions.shape == (3, *ids.shape) and not deltas.any()


@pytest.mark.parametrize("shard", [None, "60KB"])
def test_a_thinker_alone_written_by_transformers(tmp_path, shard):
    text = {key: value for key, value in RELEASE["text_config"].items() if key != "tie_word_embeddings"}
    model = filled(Qwen2_5OmniThinkerForConditionalGeneration(Qwen2_5OmniThinkerConfig(**RELEASE | {"text_config": text})))
    model.save_pretrained(tmp_path, **{"max_shard_size": shard} if shard else {})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "qwen2_5_omni_thinker" and "mrope_section" in written["text_config"]["rope_parameters"]
    assert written["text_config"]["tie_word_embeddings"] and not written["tie_word_embeddings"]  # the head is its own
    assert len(list(tmp_path.glob("model-*"))) == (12 if shard else 0)
    check(model, Omni.from_pretrained(tmp_path))


def test_a_tied_thinker(tmp_path):
    config = Qwen2_5OmniThinkerConfig(**RELEASE | {"tie_word_embeddings": True})
    model = filled(Qwen2_5OmniThinkerForConditionalGeneration(config))
    model.tie_weights()
    model.save_pretrained(tmp_path)
    ours = Omni.from_pretrained(tmp_path)
    assert not hasattr(ours, "lm_head")
    check(model, ours)
    ours.save_pretrained(tmp_path / "ours")
    check(theirs(tmp_path / "ours"), ours)


def test_the_full_model_written_by_transformers(tmp_path):
    """All of it in shards, of which those without the thinker's audio and text need not be there."""
    parts = {"thinker_config": RELEASE, "talker_config": TALKER}
    parts["token2wav_config"] = {"dit_config": DIT, "bigvgan_config": BIGVGAN}
    model = filled(Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig(**parts)))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    homes = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {key.partition(".")[0] for key in homes} == {"thinker", "talker", "token2wav"}
    used = {file for key, file in homes.items() if key.startswith(("thinker.a", "thinker.m", "thinker.l"))}
    unused = set(homes.values()) - used
    assert len(unused) >= 3
    for file in unused:
        (tmp_path / file).unlink()
    check(model.thinker, Omni.from_pretrained(tmp_path))


def test_a_model_of_ours_from_scratch_opens_there(tmp_path):
    audio = omni.AudioConfig(**tiny_omni.AUDIO_SIZES)
    ids = {f"{kind}_token_index": tiny_omni.IDS[f"<|{kind.upper()}|>"] for kind in ("audio", "image", "video")}
    ours = Omni(omni.Config("qwen2", **tiny_omni.TEXT_SIZES, rope_theta=5e4, audio_config=audio, eos_token_id=258, **ids))
    filled(ours).save_pretrained(tmp_path)
    model = theirs(tmp_path)
    assert model.config.eos_token_id == 258 and sum(p.numel() for p in model.model.visual.parameters()) < 3e5
    check(model, ours)
    again = Omni.from_pretrained(tmp_path)
    assert again.config == ours.config
    check(model, again)


@torch.no_grad()
def test_bfloat16(folder):
    ids, mask, clips, given = batch()
    expected = theirs(folder, dtype=torch.bfloat16)(**given).logits
    exact, got = (Omni.from_pretrained(folder, dtype)(ids, mask, clips) for dtype in (torch.float32, torch.bfloat16))
    off, theirs_off = ((logits - exact)[mask.bool()].abs().mean() for logits in (got, expected))
    assert got.dtype == torch.bfloat16 and off < 1.2 * theirs_off < 0.05 * exact.std()


@pytest.mark.parametrize("text", [tiny_omni.TEXT_7B, tiny_omni.TEXT_3B])
def test_full_size_names_and_shapes(text):
    audio = tiny_omni.AUDIO_7B | {"output_dim": text["hidden_size"]}
    values = tiny_omni.config(text, audio, mrope=(16, 24, 24))["thinker_config"]
    with torch.device("meta"):
        model = Qwen2_5OmniThinkerForConditionalGeneration(Qwen2_5OmniThinkerConfig(**values))
    names = {"model.audio_tower.": "audio_tower.", "model.language_model.": "model.", "lm_head.": "lm_head."}
    got = {
        f"thinker.{own}{name.removeprefix(prefix)}": tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        for prefix, own in names.items()
        if name.startswith(prefix)
    }
    assert got == tiny_omni.shapes(text, audio)


@pytest.mark.parametrize("targets", [lora.DECODER_TARGETS, ["all-linear"]])
@torch.no_grad()
def test_our_adapter_opens_in_peft(tmp_path, folder, targets, recwarn):
    ours, (ids, mask, clips, given) = Omni.from_pretrained(folder), batch()
    plain = ours(ids, mask, clips)
    lora.add(ours, targets, 2, 3, torch.Generator().manual_seed(0))
    for name, parameter in ours.named_parameters():
        parameter += 0.3 * torch.randn(parameter.shape) * ("lora_B" in name)
    lora.save(ours, tmp_path / "adapter")
    recwarn.clear()
    model = PeftModel.from_pretrained(theirs(folder), tmp_path / "adapter")
    assert not [str(warning.message) for warning in recwarn if "adapter" in str(warning.message)]
    expected = model(**given).logits
    got, seen = ours(ids, mask, clips), mask.bool()
    torch.testing.assert_close(got[seen], expected[seen], atol=1e-4, rtol=0)
    assert (got - plain)[seen].abs().mean() > 0.1
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)
    assert count == sum(parameter.numel() for parameter in ours.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("targets", [r".*language_model.*\.(q_proj|down_proj)", ["q_proj", "o_proj"]])
@torch.no_grad()
def test_pefts_adapter_opens_here_and_is_merged(tmp_path, folder, targets):
    torch.manual_seed(0)
    ranks, exclude = {r"layers\.1\.self_attn\.q_proj": 4}, None if isinstance(targets, str) else ".*(audio_tower|visual).*"
    options = dict(r=2, lora_alpha=3, use_rslora=True, rank_pattern=ranks, alpha_pattern={"q_proj": 5}, exclude_modules=exclude)
    model = get_peft_model(theirs(folder), LoraConfig(init_lora_weights=False, target_modules=targets, **options)).eval()
    model.save_pretrained(tmp_path / "adapter")
    ours, (ids, mask, clips, given) = lora.load(Omni.from_pretrained(folder), tmp_path / "adapter"), batch()
    expected, seen = model(**given).logits, mask.bool()
    torch.testing.assert_close(ours(ids, mask, clips)[seen], expected[seen], atol=1e-4, rtol=0)
    lora.save(ours, tmp_path / "again")
    back = PeftModel.from_pretrained(theirs(folder), tmp_path / "again")
    torch.testing.assert_close(back(**given).logits[seen], expected[seen], atol=1e-4, rtol=0)
    for adapter in ("adapter", "again"):
        lora.merge_files(folder, tmp_path / adapter, tmp_path / f"merged-{adapter}")
        merged = Omni.from_pretrained(tmp_path / f"merged-{adapter}")
        torch.testing.assert_close(merged(ids, mask, clips)[seen], expected[seen], atol=1e-4, rtol=0)
