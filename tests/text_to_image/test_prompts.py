"""Files of prompts, and embeddings that are kept on disk."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_sd3
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo.errors import InputError, MissingFile, NotWritten
from nano_adrpo.models.mmdit import MMDiT
from nano_adrpo.text_to_image.prompts import cached, read_prompts, read_rows
from nano_adrpo.text_to_image.sd3 import PromptEncoder

PROMPTS = ["the one", "a cat", "the one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sd3.folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "sd3")


def same(a, b):
    return torch.equal(a.context, b.context) and torch.equal(a.pooled, b.pooled)


def no_encoder(monkeypatch):
    monkeypatch.setattr(PromptEncoder, "from_pretrained", lambda *_, **options: pytest.fail("an encoder was loaded"))


FORMATS = {
    # (name, content): the prompts. Only a newline ends a line; a byte order mark is no letter; "#" opens no comment.
    ("p.txt", "\ufeffa\u2028b\x85c\r\n\n # d \n"): ["a\u2028b\x85c", "# d"],
    ("p", "[cat:dog:0.5]\n{red|blue} roses"): ["[cat:dog:0.5]", "{red|blue} roses"],
    ("p.TXT", "a prompt, of words"): ["a prompt, of words"],
    ("p.jsonl", '{"prompt": "a\u2028b"}\n\n{"prompt": " #d", "id": 1}'): ["a\u2028b", " #d"],
    ("p.NDJSON", '{"prompt": "a"}\r\n{"prompt": "b"}\r\n'): ["a", "b"],
    ("p.json", '\ufeff["a", {"prompt": "b", "category": "c"}]'): ["a", "b"],
    ("p.csv", '\ufeffid,Prompt\r\n1,"a, ""b"""\r\n\r\n2,"c\nd"\r\n'): ['a, "b"', "c\nd"],
    ("p.tsv", "Prompt\tCategory\na, b\tc\n#d\te\n"): ["a, b", "#d"],
    ("quoted.tsv", 'Prompt\tCategory\n"a ""b"""\tc\n'): ['a "b"'],
    ("plain.tsv", 'Prompt\tCategory\n"G I F" painted\tc\n"d"\te\n'): ['"G I F" painted', '"d"'],  # as in PartiPrompts.tsv
}


def test_a_files_ending_tells_its_format(tmp_path):
    for (name, content), prompts in FORMATS.items():
        (tmp_path / name).write_bytes(content.encode())
        assert [prompt.text for prompt in read_prompts(tmp_path / name)] == prompts, name


def test_the_rest_of_a_row_is_kept(tmp_path):
    rows = [{"prompt": "a", "category": "c"}, {"prompt": "b", "category": "d"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.csv").write_text("Category,prompt\nc,a\nd,b\n")
    assert read_rows(tmp_path / "p.json") == read_rows(tmp_path / "p.csv") == rows
    assert read_prompts(tmp_path / "p.csv") == [("a", "c"), ("b", "d")]
    drawbench = '"Prompts","Category"\n"A red, wet car.","Colors"\n"A pear.","Gary Marcus et al. "\n'  # its sheet's columns
    (tmp_path / "drawbench.csv").write_text(drawbench)
    assert read_prompts(tmp_path / "drawbench.csv") == [("A red, wet car.", "Colors"), ("A pear.", "Gary Marcus et al.")]
    (tmp_path / "p.txt").write_text("a\n")
    assert read_rows(tmp_path / "p.txt") == [{"prompt": "a"}]
    (tmp_path / "q.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    assert read_rows(tmp_path / "q.jsonl", ("prompt", "question"))[0]["prompt"] == "1+1="


BAD = (
    ("p.txt", b" \n\n", "p.txt: no prompts in it; expected at least one"),
    ("p.txt", b"\xff", "p.txt: not a text file in UTF-8"),
    ("p.txt", b'\n{"prompt": "a"}\n', "p.txt, line 2: this is JSON; expected the ending .json, or .jsonl for an object a line"),
    ("p", b'[\n  "a",\n  "b"\n]', "p, line 1: this is JSON"),
    ("p.txt", b'["a", "b"]', "p.txt, line 1: this is JSON"),
    ("p.txt", b"Prompt\na\n", "p.txt, line 1: this is the first line of a table; expected the ending .csv or .tsv"),
    ("p.txt", b"id\tprompt\n1\ta\n", "p.txt, line 1: this is the first line of a table"),
    ("p.yaml", b"- a\n- b\n", "p.yaml: the ending '.yaml' is no known format of prompts; expected a prompt a line in .txt, or"),
    ("p.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}', 'p.jsonl, line 3: expected an object with a text "prompt"'),
    ("p.jsonl", b'{"prompt": 3}', 'p.jsonl, line 1: expected an object with a text "prompt"'),
    ("p.jsonl", b'{"prompt": "\\ud83d"}', "p.jsonl, line 1: not valid JSON"),  # half a character
    ("p.JSONL", b"a cat\n", "p.JSONL, line 1: not valid JSON"),
    ("p.ndjson", b'["a"]', "p.ndjson, line 1: expected a JSON object"),
    ("p.json", b'{"prompt": "a"}\n{"prompt": "b"}', r"p.json: not valid JSON \(Extra data: line 2 column 1"),
    ("p.json", b'{"prompt": "a"}', "p.json: expected a JSON list"),
    ("p.json", b'["a", ["b"]]', 'p.json, item 2: expected an object with a text "prompt"'),
    ("p.json", b'["a", " "]', 'p.json, item 2: expected an object with a text "prompt"'),
    ("p.json", b"[]", "p.json: no prompts in it"),
    ("p.csv", b"", "p.csv: no prompts in it"),
    ("p.csv", b"id;prompt\n1;a\n", r"p.csv, line 1: the columns are \['id;prompt'\]; expected one that is called 'prompt'"),
    ("p.csv", b"prompt,prompt\na,b\n", "p.csv, line 1: the columns are"),
    ("p.csv", b"prompt\na\na cat, asleep\n", "p.csv, line 3: 2 cells; expected 1, one for each column"),
    ("p.tsv", b"id\tprompt\n1\n", "p.tsv, line 2: 1 cells; expected 2"),
    ("p.csv", b"id,prompt\n1,\n", 'p.csv, line 2: expected an object with a text "prompt"'),
    ("p.csv", b'prompt\n"a\nb\n', "p.csv, line 3: not a table \\(unexpected end of data"),
)


def test_a_bad_file_of_prompts_is_named_with_its_line(tmp_path):
    for name, content, message in BAD:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            read_prompts(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(MissingFile, match="absent: no such file"):
        read_prompts(tmp_path / "absent")


def test_embeddings_are_the_encoders_and_the_negative_prompts_stand_apart(folder, tmp_path, monkeypatch):
    expected = PromptEncoder.from_pretrained(folder, torch.bfloat16, t5="zeros").encode([*PROMPTS, "blurry"])
    file = tmp_path / "new" / "prompts.safetensors"
    for kept in (None, file):
        condition, negative = cached(kept, PROMPTS, "blurry", folder, torch.bfloat16, t5="zeros")
        assert same(condition, expected[:3]) and same(negative, expected[3:])
        assert (len(condition), len(negative)) == (3, 1)
    no_encoder(monkeypatch)
    condition, negative = cached(file, PROMPTS, "blurry", folder, torch.bfloat16, t5="zeros")
    assert same(condition, expected[:3]) and same(negative, expected[3:]) and condition.context.dtype == torch.bfloat16
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_transformer_stays_on_disk(folder, monkeypatch):
    opened, plain = [], MMDiT.from_pretrained
    monkeypatch.setattr(
        MMDiT, "from_pretrained", lambda path, dtype=None, device=None: opened.append(device) or plain(path, dtype, device)
    )
    cached(None, PROMPTS, "", folder)
    assert set(opened) == {"meta"}


def test_the_file_is_written_again_when_anything_differs(copy, tmp_path):
    file = tmp_path / "prompts.safetensors"

    def stamp(prompts=PROMPTS, negative_prompt="", **options):
        cached(file, prompts, negative_prompt, copy, **options)
        return os.stat(file).st_mtime_ns

    first = stamp()
    assert stamp() == first
    changes = ({"prompts": PROMPTS[:2]}, {"prompts": ["a"] * 3}, {"negative_prompt": "a"}, {"dtype": torch.float16})
    for options in (*changes, {"t5": "zeros"}, {"t5_tokens": 9}):
        before = stamp()
        assert stamp(**options) != before, options
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
    assert cached(file, PROMPTS, "", copy)[0].context.shape == (3, 77 + 256, 224)
    tiny.write_json(copy / "model_index.json", {key: value for key, value in index.items() if not key.endswith("_3")})
    assert cached(file, PROMPTS, "", copy)[0].context.shape == (3, 77, 224)


def test_the_cache_knows_a_single_file_of_any_name(folder, tmp_path):
    file, single = tmp_path / "prompts.safetensors", tiny_sd3.single_file(tmp_path / "sd3.sft", folder)
    before, _ = cached(file, PROMPTS, "", single, base=folder)
    tensors = load_file(single)
    tensors["text_encoders.clip_g.transformer.text_projection.weight"] *= 2
    save_file(tensors, single)
    assert torch.equal(cached(file, PROMPTS, "", single, base=folder)[0].pooled[:, 64:], 2 * before.pooled[:, 64:])


def test_a_pointer_in_the_place_of_weights_is_named(copy, tmp_path):
    file = copy / "text_encoder_3" / "model.safetensors"  # as git leaves it without its large files
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9524621440\n")
    with pytest.raises(ValueError, match=f"{file}: not a whole safetensors file"):
        cached(tmp_path / "prompts.safetensors", PROMPTS, "", copy)


def test_what_cannot_be_kept_is_told_before_an_encoder_is_loaded(folder, tmp_path, monkeypatch):
    no_encoder(monkeypatch)
    (tmp_path / "prompts.txt").write_text("a photo\n")
    for place in (tmp_path / "prompts.txt", Path("/proc"), Path("/proc/new")):
        with pytest.raises(NotWritten, match=f"^{place}: cannot be written"):
            cached(place / "x.safetensors", PROMPTS, "", folder)
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    for name in ("model.safetensors", "prompts.txt"):  # is no cache, and is not written over
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ValueError, match=f"{tmp_path / name}: not a "):
            cached(tmp_path / name, PROMPTS, "", folder)
        assert (tmp_path / name).read_bytes() == before
