"""The convert command: tensors of a pickle as safetensors; nothing of a pickle is run."""

import json
import pickle
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nano_adrpo.errors import run_command
from nano_adrpo.files import convert
from nano_adrpo.files.safetensors import Checkpoint


def run_convert(monkeypatch, file, out):
    monkeypatch.setattr(sys, "argv", ["convert", str(file), str(out)])
    run_command(convert.main)


@pytest.mark.parametrize("old_format", [False, True])
def test_convert_rewrites_a_pickle(tmp_path, monkeypatch, capsys, old_format):
    file, out = tmp_path / "x.pt", tmp_path / "x.safetensors"
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a": nn.Parameter(whole), "row": whole[1], "turned": whole.T, "half": torch.ones(2).bfloat16(), "same": whole}
    torch.save(state | {"step": 7, "name": "x"}, file, _use_new_zipfile_serialization=not old_format)
    run_convert(monkeypatch, file, out)
    loaded = load_file(out)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], value) for key, value in state.items())
    assert loaded["half"].dtype == torch.bfloat16
    assert capsys.readouterr().out.splitlines() == [
        f"{file} is a pickle: reading it with torch.load(…, weights_only=True), which builds tensors and runs no code",
        "left out: step (int)",
        "left out: name (str)",
        f"{out}: tensors: 5, bytes: {out.stat().st_size:,}",
    ]
    assert Checkpoint(out).shapes["turned"] == (4, 3)


def test_convert_unwraps_a_state_dict(tmp_path, capsys):
    inner = {"weight": torch.ones(2), "model": torch.zeros(1)}  # a tensor of that name is a tensor
    for i, state in enumerate(
        ({"state_dict": inner}, {"model": inner, "epoch": 3}, {"state_dict": {"module": inner}, "lr": {}})
    ):
        torch.save(state, tmp_path / f"{i}.pt")
        convert.convert(tmp_path / f"{i}.pt", tmp_path / f"{i}.safetensors")
        assert {key: tensor.tolist() for key, tensor in load_file(tmp_path / f"{i}.safetensors").items()} == {
            "weight": [1, 1],
            "model": [0],
        }
    said = capsys.readouterr().out
    assert "reading 'model'; left out beside it: epoch\n" in said and "reading 'state_dict'; left out beside it: lr\n" in said


@pytest.mark.parametrize(
    "name", ["_orig_mod.{}", "module.{}", "module._orig_mod.{}", "module.module.{}", "_fsdp_wrapped_module.{}"]
)
def test_names_lose_what_torchs_wrappers_added(tmp_path, capsys, name):
    keys = ("model.layers.0.weight", "module_list.weight", "model.module.weight")
    state = {name.format(key): torch.tensor([float(i)]) for i, key in enumerate(keys)}
    torch.save({"model_state_dict": state | {"step": 3}, "optimizer": {}}, tmp_path / "x.pt")
    convert.convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors") == {key: torch.tensor([float(i)]) for i, key in enumerate(keys)}
    assert f"added: {name.format(keys[0])} is {keys[0]}\n" in capsys.readouterr().out


def test_a_prefix_of_some_keys_belongs_to_the_model(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.zeros(1), "layer._orig_mod.c": torch.ones(1)}, tmp_path / "x.pt")
    convert.convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == {"module.a", "b", "layer.c"}
    torch.save({"_orig_mod.a": torch.ones(1), "a": torch.zeros(1)}, tmp_path / "y.pt")
    with pytest.raises(ValueError, match="y.pt: two keys have one name"):
        convert.convert(tmp_path / "y.pt", tmp_path / "y.safetensors")


def bins(folder, **shards):
    """A model folder of .bin files as transformers wrote them, and what lay beside."""
    folder.mkdir()
    names = [f"pytorch_model-{i + 1:05d}-of-{len(shards):05d}.bin" for i in range(len(shards))]
    weight_map = {}
    for name, tensors in zip(names if len(names) > 1 else ["pytorch_model.bin"], shards.values()):
        torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    if len(names) > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("config.json", "tokenizer.model", "merges.txt", "training_args.bin", "tf_model.h5", ".hidden", "modeling.py"):
        (folder / name).write_text("{}")
    return folder


def test_a_folder_of_shards_becomes_one_with_an_index(tmp_path, monkeypatch):
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}, {"c": torch.full((1,), 7.0)}
    folder, out = bins(tmp_path / "in", one=tensors[0], two=tensors[1]), tmp_path / "new" / "out"
    run_convert(monkeypatch, folder, out)
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    small = {"config.json", "tokenizer.model", "merges.txt"}
    assert {file.name for file in out.iterdir()} == {*shards, "model.safetensors.index.json", *small}
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"] == dict(
        zip("abc", [shards[0]] * 2 + shards[1:])
    )
    file = Checkpoint(out)
    assert all(torch.equal(file.read(key), value) for some in tensors for key, value in some.items())
    convert.convert_folder(bins(tmp_path / "single", one=tensors[0]), tmp_path / "one")
    assert {file.name for file in (tmp_path / "one").iterdir()} == {"model.safetensors", *small}


def test_a_variants_shards_keep_their_index_beside_the_plain_ones(tmp_path):
    plain, half = {"a": torch.ones(2), "b": torch.zeros(3)}, {"a": torch.ones(2).half(), "b": torch.zeros(3).half()}
    folder = bins(tmp_path / "in", one={"a": plain["a"]}, two={"b": plain["b"]})
    weight_map = {key: f"pytorch_model.fp16-0000{i}-of-00002.bin" for i, key in enumerate("ab", 1)}
    for key, name in weight_map.items():
        torch.save({key: half[key]}, folder / name)
    (folder / "pytorch_model.bin.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))
    convert.convert_folder(folder, tmp_path / "out")
    index = tmp_path / "out" / "model.safetensors.index.fp16.json"
    assert json.loads(index.read_text())["weight_map"] == {
        key: f"model.fp16-0000{i}-of-00002.safetensors" for i, key in enumerate("ab", 1)
    }
    assert Checkpoint(tmp_path / "out").read("a").dtype == torch.float32
    (index.parent / "model.safetensors.index.json").unlink()
    assert Checkpoint(tmp_path / "out").read("a").dtype == torch.float16


def test_folders_that_are_not_converted(tmp_path, monkeypatch, capsys):
    folder = bins(tmp_path / "in", one={"a": torch.ones(2)}, two={"b": torch.ones(2)})
    (tmp_path / "used").mkdir(), (tmp_path / "empty").mkdir()
    (tmp_path / "used" / "mine").touch()
    for source, out, message in (
        (folder, tmp_path / "used", "used: exists; expected a new or empty folder"),
        (tmp_path / "empty", tmp_path / "out", "empty: no .bin file in this folder"),
    ):
        with pytest.raises(SystemExit):
            run_convert(monkeypatch, source, out)
        assert message in capsys.readouterr().err
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002.bin: no such file; an index lists it"):
        convert.convert_folder(folder, tmp_path / "out")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="pytorch_model.bin.index.json: expected a 'weight_map'"):
        convert.convert_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_overwrites_nothing(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "x.pt", tmp_path / "x.safetensors"
    torch.save({"a": torch.ones(1)}, file)
    out.write_bytes(b"mine")
    with pytest.raises(SystemExit):
        run_convert(monkeypatch, file, out)
    assert capsys.readouterr().err == f"error: {out}: exists, and is not overwritten\n" and out.read_bytes() == b"mine"
    with pytest.raises(ValueError, match="y.safetensors: its folder does not exist"):
        convert.convert(file, tmp_path / "no-such" / "y.safetensors")
    with pytest.raises(FileNotFoundError, match="y.pt: no such file"):
        convert.convert(tmp_path / "y.pt", tmp_path / "y.safetensors")


class Touch:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):  # what unpickling would call
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("kind", ["zip", "old", "plain", "function"])
def test_convert_runs_nothing_from_a_file(tmp_path, monkeypatch, capsys, kind, recwarn):
    file, out, harm = tmp_path / "x.pt", tmp_path / "x.safetensors", tmp_path / "harm"
    if kind == "plain":
        file.write_bytes(pickle.dumps({"a": Touch(harm)}))
    else:
        content = {"a": torch.ones(1), "b": run_convert if kind == "function" else Touch(harm)}
        torch.save(content, file, _use_new_zipfile_serialization=kind != "old")
    with pytest.raises(SystemExit):
        run_convert(monkeypatch, file, out)
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file}: contains more than tensors") and said.count("\n") == 1 and not recwarn.list
    assert not harm.exists() and not out.exists()


def test_convert_names_a_file_without_tensors_or_damaged(tmp_path):
    file, out = tmp_path / "x.pt", tmp_path / "x.safetensors"
    sparse = "key 'a' is torch.sparse_coo, torch.float32, on cpu; a safetensors file cannot hold it"
    for content, message in ((torch.ones(1), "holds a Tensor without named tensors"), ([torch.ones(1)], "holds a list"),
                             ({}, "holds a dict without"), ({"a": 1}, "holds a dict without"), (3, "holds a int"),
                             ({0: torch.ones(1)}, "holds a dict without"), ({"a": torch.eye(2).to_sparse()}, sparse),
                             ({"a": torch.ones(1).to(torch.complex64)}, "key 'a' is torch.strided"),
                             ({"a": torch.ones(1, device="meta")}, "key 'a' is torch.strided, .*, on meta")):  # fmt: skip
        torch.save(content, file)
        with pytest.raises(ValueError, match=f"{file}: {message}"):
            convert.convert(file, out)
    torch.save({"a": torch.ones(9999)}, file)
    for content in (b"", b"no pickle at all", file.read_bytes()[:2000], file.read_bytes()[:-30]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file}: (not a whole PyTorch file|contains more than tensors)") as error:
            convert.convert(file, out)
        assert "\n" not in str(error.value)
    assert not out.exists()


def test_a_small_file_does_not_become_a_large_one(tmp_path):
    file, out = tmp_path / "x.pt", tmp_path / "x.safetensors"
    one = torch.ones(1)
    for state in ({"a": one.expand(2 * 10**8)}, {str(i): torch.ones(10**5)[None].expand(9, -1) for i in range(9)}):
        torch.save(state, file)
        with pytest.raises(ValueError, match="x.pt: what it holds takes .* bytes; expected at most .* of a file of its size"):
            convert.convert(file, out)
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for info in plain.infolist():
            content = plain.read(info) + bytes(10**8 if info.filename.endswith("data/0") else 0)
            packed.writestr(info.filename, content, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="y.pt: what it holds takes"):
        convert.convert(tmp_path / "y.pt", out)
    state = {"a": one}
    state["model"] = state  # a dict that holds itself
    torch.save(state, file)
    convert.convert(file, out)
    assert load_file(out) == {"a": one}


def test_names_that_a_safetensors_file_cannot_hold(tmp_path):
    for name in ("__metadata__", "a\ud800"):
        torch.save({name: torch.ones(1)}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="a safetensors file cannot hold a tensor of this name"):
            convert.convert(tmp_path / "x.pt", tmp_path / "x.safetensors")


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    folder = bins(tmp_path / "in", one={"a": torch.ones(2)}, two={"b": torch.ones(2)})
    (folder / "pytorch_model-00002-of-00002.bin").write_bytes(b"half")
    with pytest.raises(ValueError, match="00002-of-00002.bin: "):
        convert.convert_folder(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
