"""Token ids of prompts by hand, and the folders that tokenizers live in."""

import json
import warnings

import pytest
import tiny

from nano_adrpo.demo import HERE
from nano_adrpo.models.tokenizers import BertTokenizer, PromptTokenizer


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


def test_the_demos_tokens_are_words():
    tokenizer = PromptTokenizer(HERE / "base" / "tokenizer")
    words = tokenizer.tokenizer.get_vocab()
    begin, end = words["<|startoftext|>"], words["<|endoftext|>"]
    assert tokenizer(["A RED three", ""], 6).tolist() == [
        [begin, words["a"], words["red"], words["three"], end, end],
        [begin, end, end, end, end, end],
    ]
    assert tokenizer(["a xyz"], 4).tolist() == [[begin, words["a"], words["<|unknown|>"], end]]


def test_a_tokenizer_folder_is_written_as_it_was_read(tmp_path):
    tiny.clip_tokenizer(tmp_path / "a", "!")
    PromptTokenizer(tmp_path / "a").save_pretrained(tmp_path / "b")
    files = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()} and len(files) == 4


def test_half_a_character_is_refused(tmp_path):
    tiny.clip_tokenizer(tmp_path, "!")
    for bad in ("a photo \ud83d", None):  # as json.loads makes it of a surrogate without its other half
        with pytest.raises(ValueError, match=r"the prompt .* is not Unicode text"):
            PromptTokenizer(tmp_path)(["a photo", bad], 77)


def test_a_broken_tokenizer_folder_is_named(tmp_path):
    added = {"526": {"content": "<mine>", "special": False}}
    for number, (name, content, message) in enumerate(
        (
            ("merges.txt", None, "merges.txt: no such file; vocab.json needs it"),
            ("vocab.json", None, "tokenizer.json: no such file, nor CLIP's vocab.json and merges.txt"),
            ("vocab.json", '{"a": 0}', r"vocab.json: not a tokenizer \("),
            ("vocab.json", '{"a": "b"}', r"vocab.json: not a tokenizer \("),
            ("vocab.json", "[", "vocab.json: not valid JSON"),
            ("tokenizer.json", "{}", r"tokenizer.json: not a tokenizer \("),
            ("tokenizer_config.json", None, "tokenizer_config.json: no such file"),
            (
                "tokenizer_config.json",
                {"padding_side": "left"},
                "tokenizer_config.json: .*padding_side.* 'left'; expected 'right'",
            ),
            (
                "tokenizer_config.json",
                {"model_max_length": "77"},
                "tokenizer_config.json: .*model_max_length.* '77'; expected a pos",
            ),
            (
                "tokenizer_config.json",
                {"model_max_length": 0},
                "tokenizer_config.json: .*model_max_length.* 0; expected a positive",
            ),
            ("tokenizer_config.json", {"added_tokens_decoder": added}, "token '<mine>' has id 525; expected 526"),
        )
    ):
        folder = tmp_path / str(number)
        tiny.clip_tokenizer(folder, "!")
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, dict):
            config = json.loads((folder / name).read_text())
            content = {
                **config,
                **content,
                "added_tokens_decoder": config["added_tokens_decoder"] | content.get("added_tokens_decoder", {}),
            }
            tiny.write_json(folder / name, content)
        else:
            (folder / name).write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            PromptTokenizer(folder)
        assert "\n" not in str(error.value)


def vocabulary(folder, pieces=tiny.WORD_PIECES):
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return folder


def test_bert_tokens_by_hand(tmp_path):
    tokenizer = BertTokenizer(vocabulary(tmp_path))
    # Lower case, no accents; Chinese one by one; words into their longest pieces; what has no pieces is [UNK].
    prompts = ["A CAT, in Café!", "中文 dogs", "unbreakable [SEP] zebra"]
    expected = ["[CLS] a cat , in cafe ! [SEP]", "[CLS] 中 文 dog ##s [SEP]", "[CLS] un ##break ##able [SEP] [UNK] [SEP]"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, mask = tokenizer(prompts)
    for row, tokens in enumerate(text.split() for text in expected):
        assert ids[row].tolist() == [tiny.WORD_PIECES.index(token) for token in tokens] + [0] * (8 - len(tokens))
        assert mask[row].tolist() == [1] * len(tokens) + [0] * (8 - len(tokens))
    with pytest.warns(UserWarning, match="the prompt 'the cat in the cat' has 7 tokens and is cut to 5"):
        ids, mask = tokenizer(["the cat in the cat", ""], 5)
    assert [[tiny.WORD_PIECES[i] for i in row] for row in ids] == [
        ["[CLS]", "the", "cat", "in", "[SEP]"],
        ["[CLS]", "[SEP]", "[PAD]", "[PAD]", "[PAD]"],
    ]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]


def test_tokenizer_json_comes_before_vocab_txt_and_its_padding_is_not_used(tmp_path):
    tokenizer = BertTokenizer(vocabulary(tmp_path)).tokenizer
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary(tmp_path, ["nothing"])
    ids, mask = BertTokenizer(tmp_path)(["the cat in paris"])
    assert [tiny.WORD_PIECES[i] for i in ids[0]] == ["[CLS]", "the", "cat", "in", "paris", "[SEP]"] and mask.all()


def test_a_broken_bert_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no tokenizer.json and no vocab.txt in this folder"):
        BertTokenizer(tmp_path)
    for name, content, message in (
        ("vocab.txt", b"[PAD]\n[UNK]\na\n", "vocab.txt: expected BERT's"),
        ("vocab.txt", b"[PAD]\n\xff\xfe\n", "vocab.txt: not a "),
        ("tokenizer.json", b"{}", r"tokenizer.json: not a tokenizer \("),
        ("tokenizer.json", b"{", r"tokenizer.json: not a tokenizer \("),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            BertTokenizer(tmp_path)
        assert "\n" not in str(error.value)


REPLACE = {"type": "Replace", "pattern": {"String": "q"}, "content": "q" * 10}
HARMFUL = {  # what the tokenizers package does with it: takes all memory, panics when it opens, encodes or decodes
    "normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 12},
    "normalizer ": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "pre_tokenizer": {"type": "FixedLength", "length": 0},
    "pre_tokenizer ": {
        "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False,
    },
    "decoder": {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9},
    "model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"},
}  # fmt: skip


@pytest.mark.parametrize("part", HARMFUL)
def test_a_harmful_tokenizer_is_one_line(tmp_path, capfd, part):
    tiny.t5_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    tiny.write_json(file, json.loads(file.read_text()) | {part.strip(): HARMFUL[part]})
    with pytest.raises(ValueError, match=f"^{file}: not a tokenizer ") as error:
        PromptTokenizer(tmp_path)
    assert str(error.value).isprintable() and capfd.readouterr().err == ""


def test_what_a_tokenizer_lacks_is_told_with_the_prompt(tmp_path, capfd):
    tiny.t5_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["unk_id"] = None
    tiny.write_json(file, values)
    tokenizer = PromptTokenizer(tmp_path)
    assert tokenizer(["the bing"], 5).shape == (1, 5)
    with pytest.raises(ValueError, match="^the prompt 'é ü': the tokenizer cannot encode it .Encountered an unknown token"):
        tokenizer(["the bing", "é ü"], 5)
    assert capfd.readouterr().err == ""
