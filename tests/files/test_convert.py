"""The convert command: tensors of a pickle as safetensors; nothing of a pickle is run."""

import pickle
import sys

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
