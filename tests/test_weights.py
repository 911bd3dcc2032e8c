"""Model files: what is damaged is named, what is written is whole."""

import dataclasses
import json

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
        FileNotFoundError, match=r"no model.safetensors and no model.safetensors.index.json .*\.bin files are not read"
    ):
        weights.Checkpoint(tmp_path)


def test_the_fp16_variant_is_found(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert set(weights.Checkpoint(folder).home) == {"weight", "bias"}


def test_an_index_and_its_shards_must_agree(tmp_path):
    tiny.shards(tmp_path, {"weight": torch.zeros(2, 3), "bias": torch.ones(2)}, "model", count=2)
    assert weights.load(linear(), weights.Checkpoint(tmp_path)).bias.tolist() == [1, 1]
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    tiny.write_json(index, {"weight_map": content["weight_map"] | {"gone": "model-00001-of-00002.safetensors"}})
    with pytest.raises(ValueError, match=f"{index}: key 'gone' is listed but in no shard"):
        weights.Checkpoint(tmp_path)
    tiny.write_json(index, content)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="model-00002-of-00002.safetensors: no such file; model.safetensors.index.json lists it"
    ):
        weights.Checkpoint(tmp_path)
    tiny.write_json(index, {"weight_map": {}})
    with pytest.raises(ValueError, match="expected a 'weight_map'"):
        weights.Checkpoint(tmp_path)


def test_a_config_is_checked(tmp_path):
    @dataclasses.dataclass
    class Config:
        width: int
        eps: float = 1e-5

    assert weights.parse_config(Config, {"width": 4, "eps": 1, "other": None}, "f") == Config(4, 1)
    for values, message in (({}, "f: key 'width' is missing"), ({"width": -1}, "f: key 'width' is -1; expected a positive int"),
                            ({"width": 2.5}, "f: key 'width' is 2.5"), ({"width": True}, "f: key 'width' is True"),
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
