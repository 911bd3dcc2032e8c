"""Damaged files, a few hundred of each kind that is read: each ends in one line or in a result, in bounded time and memory;
nothing of them is run, and nothing outside their folder is read. `-m slow` tries ten times as many.
"""

import json
import random
import resource
import struct
import sys
import time
import warnings
import zlib

import lora_models
import mutations
import pytest
import tiny
import torch
from models.test_refusals import FOLDERS, build
from safetensors.torch import load_file, save_file
from torch import nn

from nano_adrpo import lora
from nano_adrpo.errors import InputError
from nano_adrpo.evaluation.entries import Results, entries
from nano_adrpo.files import apart, convert, png, safetensors, wav
from nano_adrpo.models import tokenizer_check, tokenizers
from nano_adrpo.rewards import images as image_rewards
from nano_adrpo.rewards import text
from nano_adrpo.text_to_image import flux, prompts, scheduler
from nano_adrpo.text_to_image.condition import Condition

SECONDS, MEMORY = 5, 2**30  # of one file, of all

watched = []  # the folder that nothing may read from, while a test runs


def hear(event, args):
    if watched and event == "open" and str(args[0]).startswith(watched[0]):
        watched.append(args[0])
    if watched and event in ("os.system", "os.exec", "pty.spawn"):
        watched.append(event)


sys.addaudithook(hear)


@pytest.fixture
def place(tmp_path):
    """A folder, and one beside it, outside, which damaged files try to name."""
    for name in ("place", "outside"):
        (tmp_path / name).mkdir()
    for name in ("outside", "passwd"):
        save_file({"secret": torch.ones(1)}, tmp_path / "outside" / name)
    watched[:] = [str(tmp_path / "outside")]
    yield tmp_path / "place"
    found, watched[:] = watched[1:], []
    assert not found


def attempts(count, damage, read, seed=0):
    """Damages and reads; -> how many times there was a result."""
    whole, most = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + MEMORY
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        damage(rng)
        start = time.process_time()
        try:
            with warnings.catch_warnings(action="ignore"):
                read()
            whole += 1
        except InputError as error:
            line = str(error)
            assert line.isprintable() and len(line) < 1100, repr(line)
        except BaseException as error:
            error.add_note(f"attempt {number}")
            raise
        assert time.process_time() - start < SECONDS, number
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < most
    return whole


many = pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])


def damaged(folder, change=mutations.of_bytes, *more):
    """-> a function that damages one of the folder's files, all others being whole."""
    whole = {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}

    def damage(rng):
        for file, content in whole.items():
            file.write_bytes(content)
        file = rng.choice(list(whole))
        of_json = file.suffix == ".json" and change is mutations.of_bytes
        file.write_bytes((mutations.of_text if of_json else change)(whole[file], rng, *more))

    return damage


@many
def test_tensors_and_shards(place, count):
    tensors = {"weight": torch.ones(2, 3), "bias": torch.ones(2), "norm": torch.ones(4, dtype=torch.bfloat16)}
    (place / "one").mkdir(), (place / "shards").mkdir()
    save_file(tensors, place / "one" / "model.safetensors")
    tiny.shards(place / "shards", tensors, "model", count=2)
    for name in ("one", "shards"):

        def read(folder=place / name):
            file = safetensors.Checkpoint(folder)
            assert "secret" not in {key: file.read(key) for key in file.shapes}

        assert 0 < attempts(count, damaged(place / name), read) < count


@many
def test_configs_of_models(place, count):
    folders = {kind: place / kind for kind in FOLDERS}
    models = {kind: build(kind) for kind in FOLDERS}
    for kind, folder in folders.items():
        models[kind].save_pretrained(folder)
    wholes = {kind: next(folder.glob("*config.json")) for kind, folder in folders.items()}
    contents = {kind: file.read_bytes() for kind, file in wholes.items()}
    chosen = []

    def damage(rng):
        chosen[:] = [kind := rng.choice(FOLDERS)]
        wholes[kind].write_bytes(mutations.of_text(contents[kind], rng))

    def read():
        type(models[chosen[0]]).from_pretrained(folders[chosen[0]], device="meta")

    assert 0 < attempts(count, damage, read) < count


@many
def test_small_configs(place, count):
    tiny.write_json(place / "scheduler_config.json", {"_class_name": scheduler.CLASS, **vars(flux.Scheduler())})
    sizes = {"size": {"height": 12, "width": 12}, "crop_size": 12, "do_resize": True, "resample": 3}
    tiny.write_json(place / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **sizes})

    def read():
        flux.Scheduler.read(place / "scheduler_config.json").times(4, None, (16, 64, 64), "cpu")
        torch.tensor(image_rewards.normalisation(place, 3, 12, crop=True))

    assert 0 < attempts(count, damaged(place), read) < count


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = (nn.ModuleDict({"to_q": nn.Linear(3, 4), "to_k": nn.Linear(3, 4)}) for _ in range(3))
        self.transformer_blocks = nn.ModuleList(blocks)


@many
@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_adapters(place, layout, count):
    lora.save(lora_models.move(lora.add(Layers(), ["to_q", "to_k"], 2, 4.0)), place / "a")
    config, file = place / "a" / "adapter_config.json", place / "a" / lora_models.FILE
    values = json.loads(config.read_text())
    tiny.write_json(config, values | {"rank_pattern": {"to_k": 2}, "alpha_pattern": {r"blocks\.1\.to_q": 3.0}})
    if layout == "diffusers":
        config.unlink()
        tensors = {key.replace("base_model.model.", "transformer."): tensor for key, tensor in load_file(file).items()}
        header = json.dumps({f"transformer.{key}": value for key, value in values.items()})
        save_file(tensors, file, {"lora_adapter_metadata": header})
        file.rename(file.with_name("pytorch_lora_weights.safetensors"))
    patterns = [".*to_q", r"(.*\.)*x", "all-linear", "(?i)to_Q", {"(a|a)*b": 2}, {"to_q)(": 1}, [1] * 20_000]
    assert 0 < attempts(count, damaged(place / "a", mutations.of_bytes), lambda: lora.load(Layers(), place / "a")) < count
    if layout == "peft":
        content = config.read_bytes()
        damage = lambda rng: config.write_bytes(mutations.of_text(content, rng, patterns))
        attempts(count // 2, damage, lambda: lora.load(Layers(), place / "a"), 1)


class Kept(apart.Apart):
    """One process for all questions, which saves its start."""

    process = None

    def __exit__(self, *_):
        pass


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
PARTS = [
    REPLACE, {"type": "Sequence", "normalizers": [REPLACE] * 12}, {"type": "Sequence", "decoders": [REPLACE] * 12},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "FixedLength", "length": 0},
    {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False},
    {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}] * 40},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "z", "type_id": 0}}], "pair": [], "special_tokens": {}},
    {"type": "Strip", "content": "a", "start": 10**9, "stop": 0}, {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "z"},
    {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}, {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "z", "continuing_subword_prefix": "", "max_input_chars_per_word": 9},
]  # fmt: skip


@many
def test_tokenizers(place, monkeypatch, capfd, count):
    kept = Kept(tokenizer_check.__file__, "trier", 5, tokenizer_check.MEMORY // 4)
    monkeypatch.setattr(tokenizer_check, "Apart", lambda *_: kept)
    tiny.t5_tokenizer(place / "t5")
    tiny.clip_tokenizer(place / "clip", "!")
    capfd.readouterr()
    for name in ("t5", "clip"):
        whole = {file: file.read_bytes() for file in (place / name).iterdir()}

        def damage(rng, whole=whole):
            for file, content in whole.items():
                file.write_bytes(content)
            file = rng.choice(list(whole))
            of_json, parts = file.suffix == ".json", PARTS if file.name == "tokenizer.json" else ()
            if parts and rng.random() < 0.5:
                values = json.loads(whole[file])
                values[rng.choice(["normalizer", "pre_tokenizer", "post_processor", "decoder", "model"])] = rng.choice(PARTS)
                file.write_text(json.dumps(values))
            else:
                file.write_bytes((mutations.of_text if of_json else mutations.of_bytes)(whole[file], rng))

        def read(folder=place / name):
            tokenizer = tokenizers.PromptTokenizer(folder)
            tokenizer(["the ring é 漢", "a" * 40 + " 12!"], 16)
            tokenizers.decode_batch(tokenizer.tokenizer, [[0, 1, 2], [5]])

        assert 0 < attempts(count // 2, damage, read) < count
    kept.close()
    assert capfd.readouterr().err == ""  # no page of a panic


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@many
def test_pictures(place, count):
    file = place / "x.png"
    png.write_png(file, torch.rand(3, 5, 4) * 2 - 1)
    whole, expected = file.read_bytes(), png.read_png(file)

    def damage(rng):
        if rng.random() < 0.5:
            file.write_bytes(mutations.of_bytes(whole, rng))
            return
        sides = rng.choice([1, 4, 300, 16384, 2**31]), rng.choice([1, 5, 300, 16384, 2**31])
        header = struct.pack(">2I5B", *sides, rng.choice([1, 2, 8, 16]), rng.choice([0, 2, 3, 4, 6]), 0, 0, rng.choice([0, 1]))
        pixels = zlib.compress(bytes([rng.randrange(6)]) * rng.choice([1, 60, 10**6]))
        file.write_bytes(png.SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))

    def read():
        image = png.read_png(file)
        assert image.isfinite().all() and image.numel() <= 3 * 2**24
        if len(file.read_bytes()) == len(whole) and image.shape == expected.shape:
            assert torch.equal(image, expected)  # a checksum tells

    assert attempts(count, damage, read) < count


@many
def test_sounds(place, count):
    file = place / "x.wav"
    wav.write_wav(file, torch.rand(400) - 0.5)
    assert 0 < attempts(count, damaged(place), lambda: wav.read_wav(file)) < count


LISTS = {
    "p.txt": "a cat\na dog, red\n",
    "p.jsonl": '{"prompt": "a cat", "category": "x"}\n{"prompt": "a dog"}\n',
    "p.json": '["a cat", {"prompt": "a dog", "category": "y"}]',
    "p.csv": 'prompt,category\n"a cat",x\na dog,y\n',
    "q.jsonl": '{"question": "1+1=", "answer": "#### 2"}\n{"prompt": "2+9=", "answer": 11}\n',
}


@many
@pytest.mark.parametrize("name", LISTS)
def test_prompts_and_problems(place, name, count):
    file = place / name
    file.write_text(LISTS[name])
    read = text.read_problems if name.startswith("q") else prompts.read_prompts
    assert 0 < attempts(count // 4, damaged(place), lambda: read(file)) < count


@many
def test_the_cache_of_embeddings(place, count):
    file, wanted = place / "e.safetensors", torch.arange(32, dtype=torch.uint8)
    both = [Condition(torch.rand(rows, 3, 4), torch.rand(rows, 2)) for rows in (2, 1)]
    tensors = {prefix + name: x for prefix, some in zip(prompts.PREFIXES, both) for name, x in some.tensors().items()}
    safetensors.save(file, {**tensors, "fingerprint": prompts.sealed(wanted, tensors)})

    def read():
        found = prompts.read_conditions(file, wanted)
        for ours, theirs in zip(both, found or ()):
            assert torch.equal(ours.context, theirs.context) and torch.equal(ours.pooled, theirs.pooled) and theirs.mask is None

    read()
    assert 0 < attempts(count, damaged(place), read) < count
    safetensors.save(file, {**tensors, "fingerprint": wanted[:8].view(torch.float8_e4m3fn)})
    assert prompts.read_conditions(file, wanted) is None


@many
def test_scores(place, count):
    (place / "m").mkdir(), (place / "out").mkdir()
    results = Results(place / "out", entries([f"a={place / 'm'}"]))
    results.open({"steps": 3})
    values = {"reward": 1.0, "w2": 0.5, "errors": {"reward": 0.1}}
    results.rows(lambda entry: 2, lambda *_: dict(values))

    def read():
        results.open({"steps": 3})
        results.rows(lambda entry: 2, lambda *_: pytest.fail("measured again"))

    assert 0 < attempts(count, damaged(place / "out"), read) < count


@many
def test_pickles(place, capsys, count):
    (place / "in").mkdir()
    state = {"weight": torch.ones(2, 3), "step": 3, "row": torch.arange(4)}
    torch.save({"state_dict": state}, place / "in" / "a.pt")
    torch.save(state, place / "in" / "b.pt", _use_new_zipfile_serialization=False)
    out = place / "x.safetensors"

    def read():
        for name in ("a", "b"):
            out.unlink(missing_ok=True)
            convert.convert(place / "in" / f"{name}.pt", out)
            assert out.stat().st_size < 2**21

    assert 0 < attempts(count, damaged(place / "in"), read) < count
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))
