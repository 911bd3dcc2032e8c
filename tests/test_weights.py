"""Model files: what is damaged is named, what is written is whole."""

import dataclasses
import json
import pickle
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nano_adrpo import weights


def linear():
    with torch.device("meta"):
        return nn.Linear(3, 2)


@pytest.fixture
def folder(tmp_path):
    save_file({"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}, tmp_path / "model.safetensors")
    return tmp_path


def test_load_assigns_what_the_file_holds(folder):
    model = weights.load(linear(), weights.Checkpoint(folder))
    assert model.weight.tolist() == [[0, 1, 2], [3, 4, 5]] and model.weight.requires_grad and not model.training


@pytest.mark.parametrize("keep", [0, 4, 20, -3])
def test_a_truncated_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{file}: not a whole safetensors file") as error:
        weights.Checkpoint(folder)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such: no such file or folder"):
        weights.Checkpoint(tmp_path / "no-such")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        FileNotFoundError,
        match=r"no model.safetensors and no model.safetensors.index.json .*pickled .bin is not read: .*weights convert",
    ):
        weights.Checkpoint(tmp_path)


def test_the_fp16_variant_is_found(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert set(weights.Checkpoint(folder).home) == {"weight", "bias"}


def test_the_sharded_fp16_variant_is_found_where_there_is_no_other(tmp_path):
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate("abc")}
    tiny.shards(tmp_path, tensors, "model", count=2)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "model.safetensors.index.fp16.json")
    assert set(weights.Checkpoint(tmp_path).home) == set("abc")
    save_file({"whole": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(weights.Checkpoint(tmp_path).home) == {"whole"}


def test_an_index_and_its_shards_must_agree(tmp_path):
    tiny.shards(tmp_path, {"weight": torch.zeros(2, 3), "bias": torch.ones(2)}, "model", count=2)
    assert weights.load(linear(), weights.Checkpoint(tmp_path)).bias.tolist() == [1, 1]
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    tiny.write_json(index, {"weight_map": content["weight_map"] | {"gone": "model-00001-of-00002.safetensors"}})
    with pytest.raises(ValueError, match=f"{index}: key 'gone' is listed but not in model-00001-of-00002.safetensors"):
        weights.Checkpoint(tmp_path)
    tiny.write_json(index, content)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="model-00002-of-00002.safetensors: no such file; model.safetensors.index.json lists it"
    ):
        weights.Checkpoint(tmp_path)
    for bad in ({}, ["bias"], {"weight": 1, "bias": None}):
        tiny.write_json(index, {"weight_map": bad})
        with pytest.raises(ValueError, match="expected a 'weight_map'"):
            weights.Checkpoint(tmp_path)


def test_of_a_key_in_two_shards_the_listed_one_counts(tmp_path):
    tiny.shards(tmp_path, {"bias": torch.ones(2), "weight": torch.zeros(2, 3)}, "model", count=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    save_file(load_file(shard) | {"bias": torch.zeros(2)}, shard)
    assert weights.load(linear(), weights.Checkpoint(tmp_path)).bias.tolist() == [1, 1]


@pytest.mark.parametrize("device", [None, "meta"])
def test_other_kinds_of_numbers_are_refused(folder, device):
    file, plain = folder / "model.safetensors", load_file(folder / "model.safetensors")
    for dtype in (torch.int8, torch.int64, torch.bool):
        save_file(plain | {"bias": torch.ones(2).to(dtype)}, file)
        with pytest.raises(ValueError, match=f"{file}: key 'bias' is stored as {dtype}; expected numbers like torch.float32"):
            weights.load(linear(), weights.Checkpoint(folder), device=device)
    save_file(plain | {"bias": torch.ones(2).to(torch.float8_e5m2)}, file)
    with pytest.raises(ValueError, match=f"{file}: key 'bias' is stored as torch.float8_e5m2; expected a dtype to compute in"):
        weights.load(linear(), weights.Checkpoint(folder), device=device)
    model = weights.load(linear(), weights.Checkpoint(folder), torch.bfloat16, device)
    assert model.bias.dtype == torch.bfloat16 and (device or model.bias.tolist() == [1, 1])


def test_a_config_is_checked(tmp_path):
    @dataclasses.dataclass
    class Config:
        width: int
        eps: float = 1e-5
        act: str = "gelu"

    assert weights.parse_config(Config, {"width": 4, "eps": 1, "other": None}, "f") == Config(4, 1)
    for values, message in (({}, "f: key 'width' is missing"), ({"width": -1}, "f: key 'width' is -1; expected a positive int"),
                            ({"width": 2.5}, "f: key 'width' is 2.5"), ({"width": True}, "f: key 'width' is True"),
                            ({"width": 4, "eps": float("nan")}, "f: key 'eps' is nan; expected a positive float"),
                            ({"width": 4, "act": []}, r"f: key 'act' is \[\]; expected a text"),
                            ({"width": 4, "eps": "x"}, "f: key 'eps' is 'x'; expected a positive float")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            weights.parse_config(Config, values, "f")
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        weights.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: expected a JSON object"):
        weights.read_json(tmp_path / "config.json")


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    file = folder / "model.safetensors"
    before = file.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        weights.save(file, {"weight": torch.zeros(1)})
    assert file.read_bytes() == before and [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_files_are_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").touch()
    weights.save(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_views_and_transposes_are_saved_as_they_look(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    weights.save(tmp_path / "x.safetensors", {"a": whole.T, "b": whole[1]})
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["a"], whole.T) and torch.equal(loaded["b"], whole[1])


def run_convert(monkeypatch, file, out):
    monkeypatch.setattr(sys, "argv", ["weights", "convert", str(file), str(out)])
    weights.main()


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
    assert weights.Checkpoint(out).shapes["turned"] == (4, 3)


def test_convert_unwraps_a_state_dict(tmp_path, capsys):
    inner = {"weight": torch.ones(2), "model": torch.zeros(1)}  # a tensor of that name is a tensor
    for i, state in enumerate(
        ({"state_dict": inner}, {"model": inner, "epoch": 3}, {"state_dict": {"module": inner}, "lr": {}})
    ):
        torch.save(state, tmp_path / f"{i}.pt")
        weights.convert(tmp_path / f"{i}.pt", tmp_path / f"{i}.safetensors")
        assert {key: tensor.tolist() for key, tensor in load_file(tmp_path / f"{i}.safetensors").items()} == {
            "weight": [1, 1],
            "model": [0],
        }
    said = capsys.readouterr().out
    assert "reading 'model'; left out beside it: epoch\n" in said and "reading 'state_dict'; left out beside it: lr\n" in said


def test_convert_overwrites_nothing(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "x.pt", tmp_path / "x.safetensors"
    torch.save({"a": torch.ones(1)}, file)
    out.write_bytes(b"mine")
    with pytest.raises(SystemExit):
        run_convert(monkeypatch, file, out)
    assert capsys.readouterr().err == f"error: {out}: exists, and is not overwritten\n" and out.read_bytes() == b"mine"
    with pytest.raises(ValueError, match="y.safetensors: its folder does not exist"):
        weights.convert(file, tmp_path / "no-such" / "y.safetensors")
    with pytest.raises(FileNotFoundError, match="y.pt: no such file"):
        weights.convert(tmp_path / "y.pt", tmp_path / "y.safetensors")


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
        content = {"a": torch.ones(1), "b": linear if kind == "function" else Touch(harm)}
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
            weights.convert(file, out)
    torch.save({"a": torch.ones(9999)}, file)
    for content in (b"", b"no pickle at all", file.read_bytes()[:2000], file.read_bytes()[:-30]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file}: (not a whole PyTorch file|contains more than tensors)") as error:
            weights.convert(file, out)
        assert "\n" not in str(error.value)
    assert not out.exists()
