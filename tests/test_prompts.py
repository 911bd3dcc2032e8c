"""Prompts of SD3: tokens, what the encoders' outputs become, folders and single files, the cache."""

import json
import os
import shutil
import warnings

import pytest
import tiny
import tiny_sd3
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo import prompts as module
from nano_adrpo.models.clip import CLIPText
from nano_adrpo.models.mmdit import MMDiT
from nano_adrpo.models.t5 import T5Encoder
from nano_adrpo.prompt_tokenizer import PromptTokenizer
from nano_adrpo.prompts import PromptEncoder, cached

PROMPTS = ["the one", "a photo of 12 Rings!", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sd3.folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sd3")
    return tmp_path / "sd3"


def same(a, b):
    return torch.equal(a.context, b.context) and torch.equal(a.pooled, b.pooled)


# ------------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("pad, exclamation, filler", [("<|endoftext|>", 256, 524), ("!", 0, 0)])
def test_clip_tokens_by_hand(tmp_path, pad, exclamation, filler):
    tiny.clip_tokenizer(tmp_path, pad)
    tokenizer = PromptTokenizer(tmp_path)
    # Letters a … z are ids 64 … 89, and 256 more at a word's end; "the" is 513, "one" 515; begin is 523, end 524.
    begin, end = 523, 524
    assert tokenizer(["The  ONE\n"], 77).tolist() == [[begin, 513, 515, end] + [filler] * 73]
    assert tokenizer(["b x!"], 7).tolist() == [[begin, 65 + 256, 87 + 256, exclamation, end, filler, filler]]
    assert tokenizer(["12 É"], 7).tolist() == [[begin, 272, 273, 127, 102 + 256, end, filler]]  # é is the bytes C3 A9
    assert tokenizer(["", "a"], 3).tolist() == [[begin, end, filler], [begin, 320, end]]


def test_t5_tokens_by_hand(tmp_path):
    tiny.t5_tokenizer(tmp_path)
    tokenizer = PromptTokenizer(tmp_path)  # <pad> 0, </s> 1, <unk> 2, ▁ 3, ▁the 4, ▁a 5, s 6, ing 7, a 8, b 9 …
    assert tokenizer(["the bing  a", ""], 8).tolist() == [[4, 3, 9, 7, 5, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    with pytest.warns(UserWarning, match="has 6 tokens and is cut to 4"):
        assert tokenizer(["the bing  a"], 4).tolist() == [[4, 3, 9, 1]]


def test_a_tokenizer_folder_is_written_as_it_was_read(tmp_path):
    tiny.clip_tokenizer(tmp_path / "a", "!")
    PromptTokenizer(tmp_path / "a").save_pretrained(tmp_path / "b")
    files = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()} and len(files) == 4


def test_a_prompt_of_300_tokens_is_reported_once(folder):
    encoder = PromptEncoder.from_pretrained(folder)
    long = "the " * 298
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        condition = encoder.encode([long, "the one"])
        encoder.encode(["the one", long])
    assert len(caught) == 1 and "has 300 tokens and is cut to 77" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        longer = PromptEncoder.from_pretrained(folder).encode(["the " * 300, "the one"])
    assert same(condition, longer)  # both keep 75 words in CLIP and 255 in T5


def test_only_a_newline_ends_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes("a\u2028b\x85c\r\n\n d \n".encode())
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\n{"prompt": "d"}', encoding="utf-8")
    assert module.read_prompts(tmp_path / "p.txt") == ["a\u2028b\x85c", "d"]
    assert module.read_prompts(tmp_path / "p.jsonl") == ["a\u2028b", "d"]


def test_half_a_character_is_refused(tmp_path):
    tiny.clip_tokenizer(tmp_path, "!")
    for bad in ("a photo \ud83d", None):  # as json.loads makes it of a surrogate without its other half
        with pytest.raises(ValueError, match=r"the prompt .* is not Unicode text"):
            PromptTokenizer(tmp_path)(["a photo", bad], 77)


def test_an_added_token_of_another_id_is_refused(tmp_path):
    tiny.clip_tokenizer(tmp_path, "!")
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["added_tokens_decoder"]["526"] = {"content": "<mine>", "special": False}
    tiny.write_json(file, config)
    with pytest.raises(ValueError, match="vocab.json: not a tokenizer .token '<mine>' has id 525; expected 526"):
        PromptTokenizer(tmp_path)


def test_clips_see_as_many_tokens_as_their_tokenizer_says(copy):
    for suffix in ("", "_2"):
        file = copy / f"tokenizer{suffix}" / "tokenizer_config.json"
        tiny.write_json(file, json.loads(file.read_text()) | {"model_max_length": 5.0})  # a JSON number
    encoder = PromptEncoder.from_pretrained(copy, t5="zeros", t5_tokens=3)
    with pytest.warns(UserWarning, match="has 6 tokens and is cut to 5"):
        assert encoder.encode(["the one the one"]).context.shape == (1, 5 + 3, 224)
    for bad in ("77", 0):
        tiny.write_json(file, json.loads(file.read_text()) | {"model_max_length": bad})
        with pytest.raises(ValueError, match=f"{file}: 'model_max_length' is {bad!r}; expected a positive number of tokens"):
            PromptEncoder.from_pretrained(copy)


def test_a_tokenizer_of_another_encoder_is_named(copy):
    shutil.rmtree(copy / "tokenizer_3")
    shutil.copytree(copy / "tokenizer", copy / "tokenizer_3")  # of 525 tokens, where T5 has 300
    with pytest.raises(ValueError, match=f"{copy / 'tokenizer_3'}: gives a token the id 524; expected less than .* 300 tokens"):
        PromptEncoder.from_pretrained(copy).encode(PROMPTS)


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda f: (f / "merges.txt").unlink(), "merges.txt: no such file; vocab.json needs it"),
        (lambda f: (f / "vocab.json").unlink(), "tokenizer.json: no such file, nor CLIP's vocab.json and merges.txt"),
        (lambda f: (f / "vocab.json").write_text('{"a": 0}'), r"vocab.json: not a tokenizer \("),
        (lambda f: (f / "vocab.json").write_text('{"a": "b"}'), r"vocab.json: not a tokenizer \("),
        (lambda f: (f / "vocab.json").write_text("["), "vocab.json: not valid JSON"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer.json: not a tokenizer \("),
        (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json: no such file"),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"padding_side": "left"}'),
            "tokenizer_config.json: 'padding_side' is 'left'; expected 'right'",
        ),
    ],
)
def test_a_broken_tokenizer_folder_is_named(tmp_path, break_it, message):
    tiny.clip_tokenizer(tmp_path, "!")
    break_it(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        PromptTokenizer(tmp_path)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------- encoding


@torch.no_grad()
def test_the_encoders_stand_where_sd3_wants_them(folder):
    condition = PromptEncoder.from_pretrained(folder).encode(PROMPTS)
    assert condition.context.shape == (3, 77 + 256, 224) and condition.pooled.shape == (3, 192)
    small, large = (CLIPText.from_pretrained(folder / f"text_encoder{suffix}") for suffix in ("", "_2"))
    ids = [PromptTokenizer(folder / f"tokenizer{suffix}") for suffix in ("", "_2", "_3")]
    (hidden, pooled), (hidden_2, pooled_2) = small(ids[0](PROMPTS, 77)), large(ids[1](PROMPTS, 77))
    t5 = T5Encoder.from_pretrained(folder / "text_encoder_3")(ids[2](PROMPTS, 256))
    expected = torch.zeros(3, 333, 224)
    expected[:, :77, :64], expected[:, :77, 64:192], expected[:, 77:] = hidden, hidden_2, t5
    assert torch.equal(condition.context, expected)
    assert torch.equal(condition.pooled, torch.cat([pooled, pooled_2], dim=1))
    assert t5[2, 1:].abs().min() > 0  # padding is encoded, not masked


@torch.no_grad()
def test_a_release_without_t5_has_zeros_there(folder, copy):
    whole = PromptEncoder.from_pretrained(folder).encode(PROMPTS)
    zeros = PromptEncoder.from_pretrained(folder, t5="zeros").encode(PROMPTS)
    assert torch.equal(zeros.context[:, :77], whole.context[:, :77]) and zeros.context.shape == whole.context.shape
    assert zeros.context[:, 77:].abs().max() == 0 and whole.context[:, 77:].abs().max() > 0
    index = json.loads((copy / "model_index.json").read_text())
    tiny.write_json(copy / "model_index.json", index | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    assert same(PromptEncoder.from_pretrained(copy).encode(PROMPTS), zeros)  # as diffusers, whatever lies in the folder
    shutil.rmtree(copy / "text_encoder_3")
    assert same(PromptEncoder.from_pretrained(copy, t5_tokens=9).encode(PROMPTS), zeros_cut(zeros, 9))
    # Without the entry the model has no third encoder at all, and no tokens of one.
    tiny.write_json(copy / "model_index.json", {key: value for key, value in index.items() if not key.endswith("_3")})
    assert PromptEncoder.from_pretrained(copy).encode(PROMPTS).context.shape == (3, 77, 224)


def zeros_cut(condition, tokens):
    return module.Condition(condition.context[:, : 77 + tokens], condition.pooled)


@torch.no_grad()
def test_streaming_t5_changes_no_bit(folder):
    whole = PromptEncoder.from_pretrained(folder)
    assert same(PromptEncoder.from_pretrained(folder, t5="stream").encode(PROMPTS), whole.encode(PROMPTS))


def test_the_transformer_stays_on_disk(folder, monkeypatch, tmp_path):
    opened, plain = [], MMDiT.from_pretrained
    monkeypatch.setattr(
        MMDiT, "from_pretrained", lambda path, dtype=None, device=None: opened.append(device) or plain(path, dtype, device)
    )
    PromptEncoder.from_pretrained(folder)
    cached(tmp_path / "prompts.safetensors", PROMPTS, folder)
    assert set(opened) == {"meta"}


def test_prompts_are_encoded_once_each_and_in_batches(folder):
    encoder = PromptEncoder.from_pretrained(folder)
    seen, plain = [], encoder._encode
    encoder._encode = lambda prompts: seen.append(prompts) or plain(prompts)
    condition = encoder.encode(["b", "a", "b", "c", "a"], batch=2)
    assert seen == [["b", "a"], ["c"]]
    alone = encoder.encode(["a"])
    for row in (1, 4):
        assert torch.allclose(condition.context[row], alone.context[0], atol=1e-5)
    assert torch.equal(condition.context[0], condition.context[2])
    for bad in ("a photo", [], [1]):
        with pytest.raises(ValueError, match="expected a list of strings"):
            encoder.encode(bad)


@torch.no_grad()
def test_a_single_file_has_the_same_encoders(folder, tmp_path):
    expected = PromptEncoder.from_pretrained(folder).encode(PROMPTS)
    file = tiny_sd3.single_file(tmp_path / "sd3_medium_incl_clips_t5xxlfp16.safetensors", folder)
    only_tokenizers = tmp_path / "base"
    for suffix in ("", "_2", "_3"):
        shutil.copytree(folder / f"tokenizer{suffix}", only_tokenizers / f"tokenizer{suffix}")
    assert same(PromptEncoder.from_pretrained(file, base=only_tokenizers).encode(PROMPTS), expected)
    clips = tiny_sd3.single_file(tmp_path / "incl_clips.safetensors", folder, [*tiny_sd3.PREFIXES][:4])
    assert same(PromptEncoder.from_pretrained(clips, base=folder).encode(PROMPTS), expected)  # T5 from base
    zeros = PromptEncoder.from_pretrained(clips, base=only_tokenizers, t5="zeros").encode(PROMPTS)
    assert zeros.context.shape == (3, 333, 224) and zeros.context[:, 77:].abs().max() == 0
    with pytest.raises(
        FileNotFoundError, match=f"{clips}: no text_encoder_3 in this file, nor in {only_tokenizers}; it encodes"
    ):
        PromptEncoder.from_pretrained(clips, base=only_tokenizers)
    # A base that does without T5 takes none from a file that has it.
    tiny.write_json(only_tokenizers / "model_index.json", {"text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    with_t5, without = (PromptEncoder.from_pretrained(path, base=only_tokenizers) for path in (file, clips))
    assert same(with_t5.encode(PROMPTS), expected) and same(without.encode(PROMPTS), zeros)


@pytest.mark.parametrize(
    "part", ["tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3"]
)
def test_a_missing_part_is_named_with_what_it_is_for(copy, part, tmp_path):
    shutil.rmtree(copy / part)
    what = (
        f"it splits the prompts for {part.replace('tokenizer', 'text_encoder')}"
        if "token" in part
        else "it encodes the prompts"
    )
    with pytest.raises(FileNotFoundError, match=f"{copy / part}: no such folder; {what}") as error:
        PromptEncoder.from_pretrained(copy)
    assert "\n" not in str(error.value)
    (copy / part).mkdir()  # as a download that was refused leaves it
    with pytest.raises(FileNotFoundError, match=f"{copy / part}"):
        PromptEncoder.from_pretrained(copy)


def test_encoders_that_do_not_fit_are_refused(copy):
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(copy / f"{part}_2")
        shutil.copytree(copy / part, copy / f"{part}_2")
    with pytest.raises(
        ValueError, match="the text encoders give width 128 and pooled width 128; .* at most 224 and exactly 192"
    ):
        PromptEncoder.from_pretrained(copy)
    with pytest.raises(ValueError, match="t5 is 'none', of 256 tokens; expected 'load', 'stream' or 'zeros'"):
        PromptEncoder.from_pretrained(copy, t5="none")
    with pytest.raises(ValueError, match="t5 is 'load', of 513 tokens"):
        PromptEncoder.from_pretrained(copy, t5_tokens=513)


# -------------------------------------------------------------------------------------------------------------------- cache


def test_cached_embeddings_equal_fresh_ones_and_load_no_encoder(folder, tmp_path, monkeypatch):
    texts = [*PROMPTS, "the one", "!"]
    fresh = PromptEncoder.from_pretrained(folder, torch.bfloat16).encode(texts)
    file = tmp_path / "new" / "prompts.safetensors"
    assert same(cached(file, texts, folder, torch.bfloat16), fresh) and file.is_file()
    assert len(load_file(file)["context"]) == 4  # distinct prompts
    monkeypatch.setattr(PromptEncoder, "from_pretrained", lambda *_: pytest.fail("an encoder was loaded"))
    again = cached(file, texts, folder, torch.bfloat16)
    assert same(again, fresh) and again.context.dtype == torch.bfloat16
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.filterwarnings("ignore:the prompt")
def test_the_cache_is_made_again_when_anything_differs(copy, tmp_path):
    file, texts = tmp_path / "prompts.safetensors", PROMPTS

    def stamp(texts=texts, *args, **options):
        cached(file, texts, copy, *args, **options)
        return os.stat(file).st_ino  # a file written again is another one

    first = stamp()
    assert stamp() == first
    changes = [
        dict(texts=texts[:2]), dict(texts=texts[::-1]), dict(dtype=torch.float16), dict(t5="zeros"), dict(t5_tokens=9),
    ]  # fmt: skip
    for options in changes:
        stamp()
        before = os.stat(file).st_mtime_ns
        stamp(**options)
        assert os.stat(file).st_mtime_ns != before, options
    stamp()
    before = load_file(file)
    tensors = load_file(copy / "text_encoder_2" / "model.safetensors")
    tensors["text_projection.weight"] = 2 * tensors["text_projection.weight"]
    save_file(tensors, copy / "text_encoder_2" / "model.safetensors")  # the same names, shapes and size
    stamp()
    assert torch.equal(load_file(file)["pooled"][:, 64:], 2 * before["pooled"][:, 64:])
    config = json.loads((copy / "tokenizer" / "tokenizer_config.json").read_text())
    tiny.write_json(copy / "tokenizer" / "tokenizer_config.json", config | {"pad_token": "!"})
    stamp()
    assert not torch.equal(load_file(file)["context"], before["context"])


def test_the_cache_knows_zeros_from_no_tokens_at_all(copy, tmp_path):
    file, index = tmp_path / "prompts.safetensors", json.loads((copy / "model_index.json").read_text())
    shutil.rmtree(copy / "text_encoder_3")
    tiny.write_json(copy / "model_index.json", index | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    assert cached(file, PROMPTS, copy).context.shape == (3, 77 + 256, 224)
    tiny.write_json(copy / "model_index.json", {key: value for key, value in index.items() if not key.endswith("_3")})
    assert cached(file, PROMPTS, copy).context.shape == (3, 77, 224)


def test_the_cache_knows_a_single_file_of_any_name(folder, tmp_path):
    file, single = tmp_path / "prompts.safetensors", tiny_sd3.single_file(tmp_path / "sd3.sft", folder)
    before = cached(file, PROMPTS, single, base=folder)
    tensors = load_file(single)
    tensors["text_encoders.clip_g.transformer.text_projection.weight"] *= 2
    save_file(tensors, single)
    assert torch.equal(cached(file, PROMPTS, single, base=folder).pooled[:, 64:], 2 * before.pooled[:, 64:])


def test_a_pointer_in_the_place_of_weights_is_named(copy, tmp_path):
    weights_file = copy / "text_encoder_3" / "model.safetensors"  # as git leaves it without its large files
    weights_file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9524621440\n")
    with pytest.raises(ValueError, match=f"{weights_file}: not a whole safetensors file"):
        cached(tmp_path / "prompts.safetensors", PROMPTS, copy)


def test_a_place_that_cannot_be_written_to_is_told_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a photo\n")
    monkeypatch.setattr(PromptEncoder, "from_pretrained", lambda *_: pytest.fail("an encoder was loaded"))
    with pytest.raises(OSError, match="prompts.txt"):
        cached(tmp_path / "prompts.txt" / "x.safetensors", PROMPTS, folder)


def test_a_file_that_is_no_cache_is_not_written_over(folder, tmp_path):
    for name, write in (
        ("model.safetensors", lambda file: save_file({"weight": torch.ones(1)}, file)),
        ("prompts.txt", lambda file: file.write_text("a photo\n")),
    ):
        write(tmp_path / name)
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ValueError, match=f"{tmp_path / name}: not a "):
            cached(tmp_path / name, PROMPTS, folder)
        assert (tmp_path / name).read_bytes() == before
