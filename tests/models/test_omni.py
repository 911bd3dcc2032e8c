"""Qwen2.5-Omni's thinker: clips in every call of a decoder, files, adapters, bad input. For transformers see tests/parity/."""

import itertools
import json
import math

import pytest
import tiny_omni
import torch
from models.test_decoder import hollow
from safetensors.torch import load_file, save_file
from tiny_omni import AUDIO, IDS, clip, padded, prompt

from nano_adrpo import lora
from nano_adrpo.models import omni
from nano_adrpo.models.decoder import Decoder
from nano_adrpo.models.omni import Omni, log_mel, tokens_of


@pytest.fixture
def path(tmp_path):
    return tiny_omni.folder(tmp_path / "model")


@pytest.fixture
def model(path):
    return Omni.from_pretrained(path)


def heard():
    """ids and mask [3, T] of prompts with a clip, none, and two clips; the clips."""
    clips = [clip(0.9), clip(0.03, 1), clip(2.3, 2)]
    counts = [tokens_of(len(each)) for each in clips]
    return *padded(prompt(counts[0]), prompt(), prompt(*counts[1:])), clips


# --------------------------------------------------------------------------------------------------------------- front end


def test_a_token_stands_for_640_samples():
    assert [tokens_of(n) for n in (321, 480, 16000, 32000, 480_000, 4_800_000)] == [1, 1, 25, 50, 750, 7500]
    for n in (321, 959, 961, 16001):
        assert tokens_of(n) == (log_mel(torch.rand(n)).shape[1] + 1) // 4


def test_a_tone_is_in_its_band():
    """Slaney's scale: 200 / 3 Hz are a mel up to 1000 Hz; above 27 mels are a factor of 6.4. There are 130 edges up to 8000."""
    top = 15 + 27 * math.log(8) / math.log(6.4)
    for hertz, mel in ((500, 7.5), (1000, 15), (6400, 42)):
        tone = torch.sin(2 * math.pi * hertz / 16000 * torch.arange(16000))
        assert abs(log_mel(tone)[:, 50].argmax() + 1 - mel / top * 129) <= 1


def test_a_silent_clip_is_a_clip(model):
    assert torch.equal(log_mel(torch.zeros(4000)), torch.full((128, 25), -1.5))  # log10 of 1e-10, plus 4, over 4
    ids = torch.tensor([prompt(tokens_of(4000))])
    assert model(ids, None, [torch.zeros(4000)]).isfinite().all()


# ----------------------------------------------------------------------------------------------------------- clips in calls


@torch.no_grad()
def test_tokens_of_clips_take_the_placeholders_places(model):
    """Each row on its own, from embeddings put together by hand."""
    ids, mask, clips = heard()
    logits, tokens = model(ids, mask, clips), model.embed_clips(clips)
    for row, some in enumerate(([tokens[0]], [], tokens[1:])):
        own = ids[row][mask[row].bool()][None]
        embeddings = model.model.embed_tokens(own)
        embeddings[own == AUDIO] = torch.cat([*some, torch.zeros(0, 64)])
        expected = model.head(model.model(own, embeddings=embeddings))[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], expected, atol=1e-4, rtol=0)
    assert torch.equal(model(ids, mask, tokens), logits)
    torch.testing.assert_close(model(ids, mask, [tokens[0].double(), clips[1], tokens[2]]), logits, atol=1e-4, rtol=0)
    assert (model(ids, mask, [clips[0], clips[1], clip(2.3, 3)]) - logits)[2].abs().max() > 0.1
    text = ids[1:2][mask[1:2].bool()][None]
    assert torch.equal(model(text), Decoder.forward(model, text)) and torch.equal(model(text, None, []), model(text))
    side_by_side = torch.tensor([[5, *[AUDIO] * 24, 6]])  # two clips of 22 and 2 tokens, with nothing between
    assert model(side_by_side, None, [clip(0.9), clip(0.07)]).isfinite().all()


@torch.no_grad()
def test_scores_and_samples_hear_the_clips(model):
    ids, mask, clips = heard()
    out, completion = model.generate(ids, mask, 5, temperature=0, clips=clips)
    seen, start = torch.cat([mask, completion], dim=1), ids.shape[1]
    logits = model(out, seen, clips)[:, start - 1 : -1]
    assert torch.equal(out[:, start:], logits.argmax(-1))
    exact = logits.log_softmax(-1).gather(-1, out[:, start:, None])[..., 0]
    logp, entropy = model.token_logprobs(out, seen, start, entropy=True, clips=clips)
    torch.testing.assert_close(logp, exact, atol=1e-4, rtol=0)
    assert (entropy > 0).all()


@torch.no_grad()
def test_equal_prompts_share_their_computation_only_with_equal_clips(model, monkeypatch):
    one, other = clip(0.5), torch.sin(torch.arange(8000) / 9)
    ids, sizes, forward = torch.tensor([prompt(tokens_of(8000), words=b"")] * 6), [], model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda ids, *more: sizes.append(len(ids)) or forward(ids, *more))
    clips = [one, one, other, other, other, one.clone()]
    out, _ = model.generate(ids, None, 4, temperature=0, clips=clips)
    assert sizes[0] == 3
    for row, each in enumerate(clips):
        assert torch.equal(model.generate(ids[:1], None, 4, temperature=0, clips=[each])[0][0], out[row])
    assert not torch.equal(out[0], out[2])


@torch.no_grad()
def test_placeholders_that_the_model_says_are_words(model):
    """A completion may have the audio's or an image's id; it is scored as it was sampled."""
    ids, mask, clips = heard()
    said = torch.tensor([[9, AUDIO, 7], [AUDIO, AUDIO, 7], [9, IDS["<|IMAGE|>"], AUDIO]])
    out, seen, start = torch.cat([ids, said], dim=1), torch.cat([mask, torch.ones_like(said)], dim=1), ids.shape[1]
    cache = omni.decoder.sampling.Cache(model.config, 3, start + 3, model.lm_head.weight)
    hidden = [model.model(ids, mask, cache, model.embed(ids, clips))[:, -1:]]
    hidden += [model.model(said[:, i : i + 1], seen[:, : start + i + 1], cache) for i in range(2)]  # as `generate` does
    expected = model.head(torch.cat(hidden, dim=1)).log_softmax(-1).gather(-1, said[..., None])[..., 0]
    torch.testing.assert_close(model.token_logprobs(out, seen, start, clips=clips), expected, atol=1e-4, rtol=0)
    text, seen = torch.cat([ids[1:2], said[1:2]], dim=1), seen[1:2]
    torch.testing.assert_close(model.token_logprobs(text, seen, start), expected[1:2], atol=1e-4, rtol=0)


def test_a_clip_is_computed_once_and_in_batches(model, monkeypatch):
    one, other, batches, encode = clip(5), clip(0.3, 1), [], omni.AudioTower.encode
    monkeypatch.setattr(omni.AudioTower, "encode", lambda self, x, n: batches.append(len(x)) or encode(self, x, n))
    first = model.embed_clips([one, other, one, one])
    assert batches == [4] and all(torch.equal(first[0], first[i]) for i in (2, 3))
    monkeypatch.setattr(omni, "BATCH", 3)
    again = model.embed_clips([one, other])
    assert batches == [4, 3, 1] and not first[0].requires_grad
    torch.testing.assert_close(again, first[:2])
    alone = model.embed_clips([other])[0]
    torch.testing.assert_close(alone, first[1])
    assert model.audio_tower([]) == [] == model.embed_clips([])


# ------------------------------------------------------------------------------------------------------ training, adapters


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_text_model_alone_is_trained(model, checkpointing):
    ids, mask, clips = heard()
    model.model.gradient_checkpointing = checkpointing
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in model.state_dict() if name.startswith("audio_tower.")}
    model.token_logprobs(ids, mask, clips=clips).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == frozen and all(parameter.grad.isfinite().all() for parameter in model.model.parameters())
    grads = model.model.embed_tokens.weight.grad
    assert (grads[AUDIO] == 0).all() and grads[IDS["<|im_start|>"]].abs().sum() > 0  # a placeholder's own embedding is not used


@pytest.mark.parametrize("targets", [lora.DECODER_TARGETS, ["all-linear"]])
def test_adapters_leave_the_tower_alone(model, tmp_path, targets):
    ids, mask, clips = heard()
    before = model(ids, mask, clips)
    lora.add(model, targets, 2, 2, torch.Generator().manual_seed(0))
    layers = {name.rpartition(".lora_")[0] for name in model.state_dict() if ".lora_" in name}
    assert len(layers) == 2 * (4 if len(targets) == 4 else 7) and all(name.startswith("model.layers.") for name in layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.3 * torch.ones_like(parameter) * ("lora_B" in name)
    after = model(ids, mask, clips)
    lora.save(model, tmp_path / "adapter")
    with lora.disabled(model):
        assert torch.equal(model(ids, mask, clips), before)
    assert (after - before).abs().max() > 0.1
    again = lora.load(Omni.from_pretrained(tmp_path / "model"), tmp_path / "adapter")
    torch.testing.assert_close(again(ids, mask, clips), after)
    torch.testing.assert_close(lora.merge(again)(ids, mask, clips), after, atol=1e-4, rtol=0)


def test_a_merge_of_files_keeps_the_rest_of_a_release(tmp_path, path):
    model = lora.add(Omni.from_pretrained(path), lora.DECODER_TARGETS, 2, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B.weight += 1
    lora.save(model, tmp_path / "adapter")
    others = ("thinker.visual.q_proj.weight", "talker.model.layers.0.self_attn.q_proj.weight")
    others = {name: torch.rand(64, 64) for name in others}
    save_file(load_file(path / "model.safetensors") | others, path / "model.safetensors")
    lora.merge_files(path, tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == {"thinker.model.layers.0.self_attn.q_proj.weight"}
    (ids, mask, clips), merged = heard(), Omni.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids, mask, clips), model(ids, mask, clips), atol=1e-4, rtol=0)


def test_an_adapter_of_the_tower_is_refused(model, tmp_path):
    lora.save(lora.add(model, lora.DECODER_TARGETS, 2, 2), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors, tower = load_file(file), "base_model.model.audio_tower.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {tower: torch.zeros(2, 32)}, file)
    with pytest.raises(ValueError, match="audio_tower.layers.0.self_attn.q_proj.lora_A.weight' is not part of Omni"):
        lora.load(Omni.from_pretrained(tiny_omni.folder(tmp_path / "model")), tmp_path)


# ------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("text, count", [(tiny_omni.TEXT_7B, 8_255_263_744), (tiny_omni.TEXT_3B, None)])
def test_full_size_on_meta(tmp_path, text, count):
    """The release's shards: those that only hold the talker and the eyes need not be there."""
    audio = tiny_omni.AUDIO_7B | {"output_dim": text["hidden_size"]}
    shapes = tiny_omni.shapes(text, audio)
    (tmp_path / "config.json").write_text(json.dumps(tiny_omni.config(text, audio, mrope=(16, 24, 24))))
    homes = {name: f"model-0000{1 + (i > 400)}-of-00003.safetensors" for i, name in enumerate(shapes)}
    for file in set(homes.values()):
        inside = {name: shapes[name] for name in shapes if homes[name] == file}
        hollow(tmp_path / file, inside | {f"thinker.visual.{file}.weight": (2, 2)})
    others = ("thinker.visual.merger.ln_q.weight", "talker.codec_head.weight", "token2wav.code2wav_dit_model.norm.weight")
    homes |= dict.fromkeys(others, "model-00003-of-00003.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    model = Omni.from_pretrained(tmp_path, device="meta")
    assert {f"thinker.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    if count:
        assert sum(parameter.numel() for parameter in model.parameters()) == count and len(shapes) == 489 + 338 + 1
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors: no such file"):
        Omni.from_pretrained(tmp_path, device="meta")


def test_a_folder_round_trips_under_the_releases_names(tmp_path, path):
    tensors = load_file(path / "model.safetensors")
    model = Omni.from_pretrained(path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    written, again = load_file(tmp_path / "out/model.safetensors"), Omni.from_pretrained(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in written.items()} == {name: tensor.shape for name, tensor in tensors.items()}
    assert all(torch.equal(written[name], tensors[name].bfloat16()) for name in tensors)
    assert again.config == model.config and again.files == model.files
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in path.iterdir()}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (path, tmp_path / "out"))
    assert after["model_type"] == "qwen2_5_omni" and not after["enable_audio_output"]
    assert after["thinker_config"].items() >= before["thinker_config"].items()


def test_the_models_type_chooses_its_class(tmp_path, path):
    from decoder_models import folder

    assert type(omni.open_language_model(path, torch.bfloat16)) is Omni
    assert type(omni.open_language_model(folder(tmp_path / "text"))) is Decoder
    with pytest.raises(ValueError, match="config.json: key 'model_type' is 'qwen2_5_omni'; expected 'qwen2' or"):
        Decoder.from_pretrained(path)
    with pytest.raises(ValueError, match="config.json: key 'model_type' is 'qwen3'; expected 'qwen2_5_omni' or"):
        Omni.from_pretrained(tmp_path / "text")


def test_configs_of_all_forms_are_one(tmp_path, path):
    """Release and thinker alone, both names of the rotary settings and of the ids."""
    original, release = omni.read_config(path), json.loads((path / "config.json").read_text())
    thinker = release["thinker_config"]
    text = {key: value for key, value in thinker["text_config"].items() if key not in ("rope_theta", "rope_scaling")}
    section = {"mrope_section": [2, 3, 3]}
    ropes = [
        {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", **section}},
        {"rope_scaling": {"type": "default", "rope_type": "default", **section}},  # 1e6 is what the family has
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **section}},
        {"rope_theta": 1e6},
    ]
    ids = {f"{kind}_token_id": thinker[f"{kind}_token_index"] for kind in ("audio", "image", "video")}
    renamed = {key: value for key, value in thinker.items() if not key.endswith("_token_index")} | ids
    for rope, values, whole in itertools.product(ropes, (thinker, renamed), (True, False)):
        values = values | {"text_config": text | rope}
        written = release | {"thinker_config": values} if whole else values
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert omni.read_config(tmp_path) == original
    assert (original.rope_theta, original.rope_scaling, original.model_type, original.eos_token_id) == (1e6, None, "qwen2", 258)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_omni"}')
    default = omni.read_config(tmp_path)
    assert (default.vocab_size, default.positions, default.head_dim, default.audio_token_index) == (152064, 32768, 128, 151646)
    assert default.audio_config == omni.AudioConfig(**tiny_omni.AUDIO_7B) and default.rope_theta == 1e6


@pytest.mark.parametrize("ties", [None, False, True])
def test_the_head_is_its_own_unless_the_thinker_ties_it(tmp_path, path, ties):
    values, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    values["thinker_config"]["text_config"]["tie_word_embeddings"] = True  # transformers' default, whatever the file has
    values["thinker_config"] |= {} if ties is None else {"tie_word_embeddings": ties}
    (path / "config.json").write_text(json.dumps(values))
    ids, mask, clips = heard()
    if ties:
        with pytest.raises(ValueError, match="key 'thinker.lm_head.weight' differs from 'model.embed_tokens.weight'"):
            Omni.from_pretrained(path)
    else:
        assert torch.equal(Omni.from_pretrained(path).lm_head.weight, tensors["thinker.lm_head.weight"])
    head = tensors.pop("thinker.lm_head.weight")
    save_file(tensors, path / "model.safetensors")
    if ties is False:
        with pytest.raises(ValueError, match="key 'thinker.lm_head.weight' is missing"):
            Omni.from_pretrained(path)
    else:
        model = Omni.from_pretrained(path)
        model.save_pretrained(tmp_path / "out")
        again = Omni.from_pretrained(tmp_path / "out")
        assert head.shape == (272, 64) and torch.equal(model(ids, mask, clips), again(ids, mask, clips))


# --------------------------------------------------------------------------------------------------------------- bad input

PLACES = {  # what ids hold, the clips' seconds, and what is said
    "more placeholders than clips": ([prompt(22), prompt(22)], [0.9], "row 1 of ids has 22 placeholders .* only 1 clips"),
    "no clips": ([prompt(22)], None, "row 0 of ids has 22 placeholders for audio in a row, but there are only 0 clips"),
    "more clips": ([prompt(22), prompt()], [0.9, 0.9], "2 clips, more than the 1 runs of placeholders"),
    "clips and no placeholders": ([prompt()], [0.9], "1 clips, more than the 0 runs"),
    "too many placeholders": ([prompt(23)], [0.9], "row 0 of ids has 23 placeholders .* the next clip has 22 tokens"),
    "too few placeholders": ([prompt(22), prompt(21)], [0.9, 0.9], "row 1 of ids has 21 placeholders .* has 22 tokens"),
    "the right number in the wrong order": ([prompt(22, 25)], [1.0, 0.9], "row 0 of ids has 22 placeholders .* has 25"),
    "an image": ([prompt(22) + [IDS["<|IMAGE|>"]]], [0.9], "ids have the placeholder of images, 262; expected audio and text"),
    "a video": ([prompt() + [IDS["<|VIDEO|>"]]], None, "ids have the placeholder of videos, 263; expected audio and text"),
}
CLIPS = {  # a clip, and what is said
    "empty": (torch.zeros(0), "a clip has 0 samples, 0 s; expected more than 0.02 s and at most 300 s"),
    "too short": (torch.zeros(320), "a clip has 320 samples, 0.02 s; expected more than 0.02 s and at most 300 s"),
    "too long": (torch.zeros(4_800_001), "a clip has 4800001 samples, 300 s; expected"),
    "integers": (torch.zeros(16000, dtype=torch.int16), "a clip is torch.int16 .16000.; expected a float32 tensor .n."),
    "doubles": (torch.zeros(16000).double(), "a clip is torch.float64 .16000.; expected a float32"),
    "an array": (torch.zeros(16000).numpy(), "a clip is ndarray; expected a float32 tensor"),
    "two channels": (torch.zeros(2, 16000), "a clip is torch.float32 .2, 16000.; expected a waveform .n., or its tokens"),
    "no tokens": (torch.zeros(0, 64), "a clip is torch.float32 .0, 64.; expected a waveform"),
    "not finite": (torch.full((16000,), math.nan), "a clip has samples that are not finite"),
}


@pytest.mark.parametrize("case", PLACES)
def test_clips_that_do_not_fit_are_refused(model, case):
    rows, seconds, message = PLACES[case]
    (ids, mask), clips = padded(*rows), None if seconds is None else [clip(each) for each in seconds]
    for call in (
        lambda: model(ids, mask, clips),
        lambda: model.generate(ids, mask, 3, clips=clips),
        lambda: model.token_logprobs(ids, mask, clips=clips),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", CLIPS)
def test_bad_clips_are_refused(model, case):
    wrong, message = CLIPS[case]
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([prompt(22, 25)]), None, [clip(0.9), wrong])


def test_a_text_model_takes_no_clips(tmp_path):
    from decoder_models import IDS, folder

    text = Decoder.from_pretrained(folder(tmp_path / "text"))
    for call in (text, lambda ids, **more: text.generate(ids, None, 3, **more), text.token_logprobs):
        with pytest.raises(ValueError, match="clips were given; a qwen3 reads text only"):
            call(IDS, clips=[clip(1)])
        assert call(IDS, clips=[]) is not None


CONFIGS = [  # a change of a section, and what is said
    (
        "thinker",
        {"model_type": "qwen3_omni_moe_thinker"},
        "'model_type' is 'qwen3_omni_moe_thinker'; expected 'qwen2_5_omni_th",
    ),
    ("thinker", {"text_config": []}, r"key 'text_config' is \[\]; expected a JSON object"),
    ("thinker", {"audio_token_index": 272}, "audio_token_index is 272; expected below vocab_size, 272"),
    ("thinker", {"audio_token_index": "x"}, "key 'audio_token_index' is 'x'; expected an int from 0 up"),
    ("text", {"model_type": "qwen3_omni_text"}, "key 'model_type' is 'qwen3_omni_text'; expected 'qwen2_5_omni_text'"),
    ("text", {"hidden_act": "gelu"}, "key 'hidden_act' is 'gelu'; expected 'silu' or"),
    ("text", {"rope_scaling": {"rope_type": "longrope"}}, "key 'rope_type' is 'longrope'; expected 'default' or"),
    (
        "text",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
        "key 'sliding_window' is 64; expected",
    ),
    ("audio", {"model_type": "whisper"}, "key 'model_type' is 'whisper'; expected 'qwen2_5_omni_audio_encoder'"),
    ("audio", {"activation_function": "relu"}, "key 'activation_function' is 'relu'; expected 'gelu'"),
    ("audio", {"num_mel_bins": 80}, "key 'num_mel_bins' is 80; expected 128"),
    ("audio", {"scale_embedding": True}, "key 'scale_embedding' is True; expected False"),
    ("audio", {"encoder_attention_heads": 5}, "d_model is 32; expected an even multiple of 5 heads"),
    ("audio", {"output_dim": 32}, "output_dim of the audio is 32; expected the text's hidden_size, 64"),
    ("audio", {"encoder_layers": 3}, "key 'thinker.audio_tower.layers.2.* is missing"),
    ("audio", {"encoder_ffn_dim": 47}, r"thinker.audio_tower.layers.0.fc1.bias' has shape \[48\]; expected \[47\]"),
]


@pytest.mark.parametrize("section, changes, message", CONFIGS)
def test_configs_that_are_refused(path, section, changes, message):
    values = json.loads((path / "config.json").read_text())
    thinker = values["thinker_config"]
    (thinker if section == "thinker" else thinker[f"{section}_config"]).update(changes)
    (path / "config.json").write_text(json.dumps(values))
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=message) as caught:
            Omni.from_pretrained(path, device=device)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
