"""Questions about sounds: their prompts, the embeddings on disk, rollouts."""

import pytest
import tiny_omni
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo.errors import InputError
from nano_adrpo.files.wav import write_wav
from nano_adrpo.language import rollout
from nano_adrpo.language.audio import AudioCodec
from nano_adrpo.models.omni import Omni
from nano_adrpo.rewards.text import Problem


@pytest.fixture
def folder(tmp_path):
    return tiny_omni.folder(tmp_path / "omni")


@pytest.fixture
def omni(folder):
    return Omni.from_pretrained(folder, torch.float32)


@pytest.fixture
def sounds(tmp_path):
    """Three sounds, the last of them like the first, of 12 and 5 tokens."""
    for name, seconds, seed in (("a", 0.5, 1), ("b", 0.2, 2), ("c", 0.5, 1)):
        write_wav(tmp_path / f"{name}.wav", tiny_omni.clip(seconds, seed))
    return [str(tmp_path / f"{name}.wav") for name in "abc"]


def texts(codec, ids, mask):
    return [codec.tokenizer.decode(row[keep.bool()].tolist(), skip_special_tokens=False) for row, keep in zip(ids, mask)]


USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + USER
HEARD = "<|audio_bos|>{}<|audio_eos|>"


def test_the_sound_stands_before_the_question_token_by_token(tmp_path, omni, sounds):
    prompts = [("What?", sounds[0]), ("Who is it?", sounds[1]), ("Why?", None)]
    expected = [HEARD.format("<|AUDIO|>" * count) + question for count, question in ((12, "What?"), (5, "Who is it?"))]
    (tmp_path / "own.jinja").write_text("Q: {{ messages[-1].content }}\nA:")
    for options, form in (
        ({}, PROMPT.format),
        ({"system": "Hear."}, ("<|im_start|>system\nHear.<|im_end|>\n" + USER).format),
        ({"template": "none"}, str),
        ({"template": tmp_path / "own.jinja"}, "Q: {}\nA:".format),
    ):
        codec = AudioCodec(omni, **options)
        ids, mask = codec.encode(prompts, 500)
        assert texts(codec, ids, mask) == [form(text) for text in [*expected, "Why?"]]
        assert ids.shape == mask.shape and (mask[:, 1:] >= mask[:, :-1]).all() and mask[:, -1].all()  # padded on the left
        assert [len(clip) for (clip,) in codec.clips(prompts)[:2]] == [12, 5] and codec.clips(prompts)[2] == []


def test_a_folder_without_a_template_has_the_releases(folder, sounds):
    own = AudioCodec(Omni.from_pretrained(folder)).encode([("What?", sounds[0])], 500)
    (folder / "chat_template.json").unlink()
    for options in ({}, {"system": "Hear."}):
        bare = AudioCodec(Omni.from_pretrained(folder), **options)
        ids, mask = bare.encode([("What?", sounds[0])], 500)
        assert torch.equal(ids, own[0]) == (not options) and "\nYou are" not in texts(bare, ids, mask)[0].partition("user")[2]


def test_what_has_no_place_for_a_sound_is_refused(tmp_path, folder, omni, sounds):
    codec = AudioCodec(omni)
    for prompt, message in (
        (
            ("is it <|AUDIO|>?", sounds[0]),
            r"the prompt of the question 'is it <\|AUDIO\|>\?' has 2 times <\|AUDIO\|>; expected 1",
        ),
        (("is it <|AUDIO|>?", None), r"has 1 times <\|AUDIO\|>; expected 0"),
        (("What?", str(tmp_path / "no.wav")), "no.wav: no such file"),
    ):
        with pytest.raises(InputError, match=message):
            codec.encode([prompt], 500)
    (tmp_path / "deaf.jinja").write_text("What is it?")
    with pytest.raises(InputError, match="has 0 times .* expected 1, by the chat template"):
        AudioCodec(omni, template=tmp_path / "deaf.jinja").encode([("What?", sounds[0])], 500)
    with pytest.raises(InputError, match=r"prompt 0 has 76 tokens; expected 1 … 75"):
        codec.encode([("What?", sounds[0])], 75)
    write_wav(tmp_path / "short.wav", torch.zeros(320))
    with pytest.raises(InputError, match="short.wav: a clip has 320 samples.*expected more than 0.02 s"):
        codec.encode([("What?", str(tmp_path / "short.wav"))], 500)
    omni.config.audio_token_index = 5
    with pytest.raises(InputError, match=r"tokenizer.json: token '<\|AUDIO\|>' has id 259; expected 5, config.json's"):
        AudioCodec(omni)


# -------------------------------------------------------------------------------------------------------------- embeddings


def count_calls(monkeypatch):
    calls, embed = [], Omni.embed_clips

    def counted(model, waveforms):
        calls.append(len(waveforms))
        return embed(model, waveforms)

    monkeypatch.setattr(Omni, "embed_clips", counted)
    return calls


def test_embeddings_are_computed_once_and_kept(tmp_path, omni, sounds, monkeypatch):
    calls, prompts = count_calls(monkeypatch), [("?", path) for path in (sounds[0], sounds[0], sounds[1], sounds[2])]
    (expected,) = Omni.from_pretrained(tmp_path / "omni", torch.float32).embed_clips([tiny_omni.clip(0.5, 1)])
    calls.clear()
    for folder, times in ((tmp_path / "kept", 2), (tmp_path / "kept", 0), (None, 3)):  # the third sound has the first's bytes
        codec = AudioCodec(omni, template="none", embeddings=folder)
        for _ in range(2):
            (a,), (again,), (b,), (c,) = codec.clips(prompts)
            assert a is again and torch.equal(a, c) and a.dtype == torch.bfloat16 and len(b) == 5
            assert (a.float() - expected).abs().max() < 0.02 * expected.abs().max()  # 16 bits of the file, 8 of bfloat16
        assert len(calls) == times
        calls.clear()
    assert len(list((tmp_path / "kept").iterdir())) == 2
    write_wav(sounds[1], tiny_omni.clip(0.2, 3))  # another sound, or another tower, has an embedding of its own
    AudioCodec(omni, template="none", embeddings=tmp_path / "kept").clips(prompts)
    assert calls == [1] and len(list((tmp_path / "kept").iterdir())) == 3
    omni.audio_tower.proj.bias.data[0] += 1
    (moved,), *_ = AudioCodec(omni, template="none", embeddings=tmp_path / "kept").clips(prompts)
    assert len(calls) == 3 and (moved - a)[:, 0].float().mean() == pytest.approx(1, abs=0.02)
    omni.audio_tower.config.n_window = 50  # as many weights, other numbers
    AudioCodec(omni, template="none", embeddings=tmp_path / "kept").clips(prompts)
    assert len(calls) == 5
    omni.audio_tower.config.n_window = 100
    with torch.autocast("cpu", torch.bfloat16):  # the tower's own dtype
        (same,), *_ = AudioCodec(omni, template="none").clips(prompts)
    assert torch.equal(same, moved)


def flipped(file):
    tensors = load_file(file)
    tensors["embedding"].view(torch.uint8)[1, 1] ^= 1
    save_file(tensors, file)


def test_a_damaged_embedding_is_found_and_computed_again(tmp_path, omni, sounds):
    folder, prompts = tmp_path / "kept", [("?", sounds[0])]
    ((expected,),) = AudioCodec(omni, template="none", embeddings=folder).clips(prompts)
    (file,) = folder.iterdir()
    AudioCodec(omni, template="none", embeddings=tmp_path / "other").clips([("?", sounds[1])])
    (another,) = (tmp_path / "other").iterdir()
    whole = file.read_bytes()
    for damage in (
        flipped,
        lambda file: file.write_bytes(whole[:-1]),
        lambda file: file.write_bytes(b""),
        lambda file: save_file({"embedding": expected}, file),
        lambda file: save_file({**load_file(file), "embedding": expected[:-1].clone()}, file),
        lambda file: file.write_bytes(another.read_bytes()),  # whole, but another sound's
    ):
        damage(file)
        with pytest.warns(UserWarning, match=f"{file}: the embedding of a sound is damaged; it is computed again"):
            ((found,),) = AudioCodec(omni, template="none", embeddings=folder).clips(prompts)
        assert torch.equal(found, expected) and file.read_bytes() == whole


# ---------------------------------------------------------------------------------------------------------------- rollouts


def test_a_rollout_hears_and_is_scored_with_what_it_heard(omni, sounds):
    codec, asked = AudioCodec(omni, template="none"), [("What?", sounds[0])] * 2 + [("What?", sounds[1])] * 2
    problems = [Problem(question, "a", audio=path) for question, path in asked]
    rolled = rollout.roll_out(omni, codec, problems, 6, 500, torch.Generator().manual_seed(0), temperature=0)
    assert rolled.texts[0] == rolled.texts[1] and rolled.texts[2] == rolled.texts[3] and len(rolled.clips) == 4
    logp = rollout.score_all(omni, rolled, 3, 0.7)
    ids, mask = codec.encode(asked, 500)
    waveforms = [codec.clips([prompt])[0][0] for prompt in asked]
    start = ids.shape[1]
    assert torch.equal(rolled.ids[:, :start], ids) and torch.equal(rolled.seen[:, :start], mask)
    with torch.no_grad():  # the definition: the softmax of the logits of the model that hears
        logits = omni(rolled.ids, rolled.seen, clips=waveforms)[:, start - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(-1, rolled.ids[:, start:, None])[..., 0]
    kept = rolled.mask.bool()
    assert (logp - expected)[kept].abs().max() < 1e-4
    rows = torch.tensor([3, 0])
    assert (rollout.score(omni, rolled, rows, 0.7)[:, 0] - expected[rows, 0]).abs().max() < 1e-4
    with torch.no_grad():
        swapped = omni(rolled.ids[:2], rolled.seen[:2], clips=[waveforms[0] * 2] * 2)[:, start - 1 : -1] / 0.7
    assert (swapped.log_softmax(-1) - logits[:2].log_softmax(-1)).abs().max() > 0.1  # what is heard matters
