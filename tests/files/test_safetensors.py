"""Model files: what is read, what is refused before a tensor is read, and what is written."""

import json
import math

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nano_adrpo.files import safetensors
from nano_adrpo.files.safetensors import Checkpoint

PLAIN = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


def linear():
    return nn.Linear(3, 2)


class Fused(nn.Module):
    """Two layers whose file has one tensor for both, and other names."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(3, 2), nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(()))


@pytest.fixture
def folder(tmp_path):
    save_file(PLAIN, tmp_path / "model.safetensors")
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------- loading


def test_load_assigns_what_the_file_holds(folder):
    model = safetensors.load(linear, Checkpoint(folder))
    assert model.weight.tolist() == [[0, 1, 2], [3, 4, 5]] and model.weight.requires_grad and not model.training
    meta = safetensors.load(linear, Checkpoint(folder), device="meta")
    assert meta.weight.is_meta and meta.weight.shape == (2, 3)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_another_layout(tmp_path, prefix):
    stored = {"qk.weight": torch.arange(12.0).reshape(4, 3, 1, 1), "qk.bias": torch.arange(4.0), "s": torch.tensor(7.0)}
    stored = {prefix + key: tensor for key, tensor in stored.items()} | ({"vae.x": torch.ones(1)} if prefix else {})
    save_file(stored | {f"{prefix}old.position": torch.ones(1).double()}, tmp_path / "x.safetensors")

    def key_of(name):
        return safetensors.rename(name, {"q.": "both.", "k.": "both.", "both": "qk", "scale": "s"})

    file = Checkpoint(tmp_path / "x.safetensors", prefix="model.")
    model = safetensors.load(Fused, file, key_of=key_of, ignore=r"old\..*")
    assert model.q.weight.tolist() == [[0, 1, 2], [3, 4, 5]] and model.k.weight.tolist() == [[6, 7, 8], [9, 10, 11]]
    assert model.k.bias.tolist() == [2, 3] and model.scale == 7
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # what is ignored does not widen it


REFUSED = [
    ({"bias": None}, "{folder}: key 'bias' is missing (1 of 2 keys are)"),
    ({"more": torch.ones(2)}, "{file}: key 'more' is not part of Linear"),
    ({"bias": torch.ones(3)}, "{file}: key 'bias' has shape [3]; expected [2]"),
    ({"bias": torch.ones(())}, "{file}: key 'bias' has shape []; expected [2]"),
    ({"bias": torch.ones(2, 1, 1)}, "{file}: key 'bias' has shape [2, 1, 1]; expected [2]"),
    ({"bias": torch.ones(2).to(torch.int8)}, "{file}: key 'bias' is stored as torch.int8; expected numbers like torch.float32"),
    ({"bias": torch.ones(2).bool()}, "{file}: key 'bias' is stored as torch.bool; expected numbers like torch.float32"),
    (
        {"bias": torch.ones(2).to(torch.float8_e5m2)},
        "{file}: key 'bias' is stored as torch.float8_e5m2; expected a dtype to compute in (--dtype)",
    ),
]


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("change, message", REFUSED)
def test_tensors_that_do_not_fit_are_named_before_any_is_read(folder, monkeypatch, change, message, device):
    file = folder / "model.safetensors"
    save_file({key: tensor for key, tensor in (PLAIN | change).items() if tensor is not None}, file)
    monkeypatch.setattr(safetensors.Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError) as error:
        safetensors.load(linear, Checkpoint(folder), device=device)
    assert str(error.value) == message.format(folder=folder, file=file)


def test_dtypes(folder):
    file = folder / "model.safetensors"
    for stored, given, expected in (
        ((torch.bfloat16, torch.bfloat16), None, torch.bfloat16),
        ((torch.bfloat16, torch.float16), None, torch.float32),  # the narrowest that holds both
        ((torch.float32, torch.bfloat16), torch.float16, torch.float16),
        ((torch.float8_e5m2, torch.float8_e5m2), torch.bfloat16, torch.bfloat16),
    ):
        save_file({key: tensor.to(dtype) for (key, tensor), dtype in zip(PLAIN.items(), stored)}, file)
        for device in (None, "meta"):
            model = safetensors.load(linear, Checkpoint(folder), given, device)
            assert {p.dtype for p in model.parameters()} == {expected} and (device or model.bias.tolist() == [1, 1])


def test_float8_weights_times_their_scales(tmp_path):
    file = tmp_path / "x.safetensors"
    half = {"weight": PLAIN["weight"].to(torch.float8_e4m3fn), "bias": PLAIN["bias"].half()}
    beside = {"scale_input": torch.ones(()), "comfy_quant": torch.zeros(9, dtype=torch.uint8), "scaled_fp8": half["weight"][:0]}
    for name, scale, expected in (
        ("scale_weight", torch.tensor(3.0), [[0, 3, 6], [9, 12, 15]]),
        ("weight_scale", torch.tensor([3.0]).bfloat16(), [[0, 3, 6], [9, 12, 15]]),
        ("weight_scale", torch.tensor([[1.0], [2.0]]), [[0, 1, 2], [6, 8, 10]]),
    ):
        stored = {f"to_q.{key}": tensor for key, tensor in (half | {name: scale} | beside).items()}
        save_file({f"model.{key}": tensor for key, tensor in stored.items()} | {"other.x": torch.ones(1)}, file)
        for device in (None, "meta"):
            model = safetensors.load(
                lambda: nn.ModuleDict({"to_q": linear()}), Checkpoint(file, prefix="model."), torch.bfloat16, device
            )
            assert model["to_q"].weight.dtype == torch.bfloat16 and (device or model["to_q"].weight.tolist() == expected)
        with pytest.raises(
            ValueError, match=r"model.to_q.weight' is stored as torch.float8_e4m3fn; expected a dtype .*--dtype"
        ):
            safetensors.load(lambda: nn.ModuleDict({"to_q": linear()}), Checkpoint(file, prefix="model."))
    save_file(half | {"weight_scale": torch.ones(3)}, file)  # of what does not begin as it
    with pytest.raises(ValueError, match="key 'weight_scale' is not part of Linear"):
        safetensors.load(linear, Checkpoint(file), torch.bfloat16)
    save_file({f"to_q.{key}": tensor for key, tensor in (half | {"weight_scale": torch.ones(3)}).items()}, file)
    with pytest.raises(ValueError, match=r"weight_scale' has shape \[3\]; expected one number, or one for each row"):
        Checkpoint(file)


@pytest.mark.parametrize("key", ["weight.absmax", "weight.quant_state.bitsandbytes__nf4", "SCB"])
def test_weights_that_bitsandbytes_quantised_are_refused(folder, key):
    file = folder / "model.safetensors"
    save_file(PLAIN | {f"layer.{key}": torch.ones(2)}, file)
    with pytest.raises(ValueError) as error:
        Checkpoint(folder)
    assert str(error.value) == f"{file}: key 'layer.{key}': weights quantised by bitsandbytes are not read; expected plain ones"


# ------------------------------------------------------------------------------------------------------------------ files


def test_sizes_of_a_file_without_config(folder):
    save_file(PLAIN | {f"layers.{i}.x": torch.ones(1) for i in (0, 11)}, folder / "model.safetensors")
    file = Checkpoint(folder)
    assert file.measure("a linear layer", {"weight": ("out", "in"), "bias": (None,)}) == {"out": 2, "in": 3}
    assert file.count("layers.") == 12 and file.count("blocks.") == 1 and file.heads(128) == 2
    for call, message in (
        (lambda: file.measure("a norm", {"weight": ("width",)}), "key 'weight' has shape [2, 3]; expected a norm"),
        (lambda: file.measure("a norm", {"gamma": ("width",)}), "key 'gamma' is missing; expected a norm"),
        (lambda: file.heads(96), "the width 96 does not divide into heads of 64, as in the public checkpoints"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(str(folder)) and str(error.value).endswith(message)


def test_damaged_and_missing_files_are_named(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for keep in (0, 4, 20, -3):
        file.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=f"^{file}: not a whole safetensors file") as error:
            Checkpoint(folder)
        assert "\n" not in str(error.value)
    header = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ValueError, match=f"^{file}: (key 'x' has dtype F8_E8M0; expected one of F64, F32, |not a whole)"):
        Checkpoint(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no-such: no such file or folder"):
        Checkpoint(folder / "no-such")
    message = r"no model.safetensors and no model.safetensors.index.json .*pickled .bin is not read: .*nano_adrpo.files.convert"
    with pytest.raises(FileNotFoundError, match=message):
        Checkpoint(folder)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_variant_is_read_where_there_is_no_other(tmp_path, variant):
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate("abc")}
    tiny.shards(tmp_path, tensors, "model", count=2)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / f"model.safetensors.index.{variant}.json")
    assert set(Checkpoint(tmp_path).home) == set("abc")
    save_file({"half": torch.ones(1)}, tmp_path / f"model.{variant}.safetensors")
    assert set(Checkpoint(tmp_path).home) == {"half"}
    save_file({"whole": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(Checkpoint(tmp_path).home) == {"whole"}


def test_an_index_and_its_shards_must_agree(tmp_path):
    tiny.shards(tmp_path, PLAIN, "model", count=2)
    assert safetensors.load(linear, Checkpoint(tmp_path)).bias.tolist() == [1, 1]
    index, first, second = tmp_path / "model.safetensors.index.json", *sorted(tmp_path.glob("model-*"))
    listed = json.loads(index.read_text())["weight_map"]
    save_file(load_file(second) | {"bias": torch.zeros(2)}, second)  # a key in two shards: the listed one counts
    assert safetensors.load(linear, Checkpoint(tmp_path)).bias.tolist() == [1, 1]
    save_file(load_file(second) | {"more": torch.zeros(2)}, second)
    # What only one of them has is a matter of what the model needs, such as a tied head, or rotary frequencies of older files.
    tiny.write_json(index, {"weight_map": listed | {"gone": first.name}})
    assert Checkpoint(tmp_path).shapes == {"weight": (2, 3), "bias": (2,), "more": (2,)}
    assert safetensors.load(linear, Checkpoint(tmp_path), ignore="more").bias.tolist() == [1, 1]
    with pytest.raises(ValueError, match=f"{second}: key 'more' is not part of Linear"):
        safetensors.load(linear, Checkpoint(tmp_path))
    tiny.write_json(index, {"weight_map": listed | {"bias": second.name, "more": first.name}})
    save_file({"weight": PLAIN["weight"]}, first)
    save_file({"more": torch.zeros(2)}, second)
    with pytest.raises(ValueError, match=f"{tmp_path}: key 'bias' is missing"):
        safetensors.load(linear, Checkpoint(tmp_path), ignore="more")
    bad = [(each, "expected a 'weight_map' from keys to shard files") for each in ({}, ["bias"], {"weight": 1, "bias": None})]
    for weight_map, message in bad:
        tiny.write_json(index, {"weight_map": weight_map})
        with pytest.raises(ValueError) as error:
            Checkpoint(tmp_path)
        assert str(error.value) == f"{index}: {message}"
    tiny.write_json(index, {"weight_map": listed})
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"{second}: no such file; model.safetensors.index.json lists it"):
        Checkpoint(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- writing


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    file = folder / "model.safetensors"
    before = file.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        safetensors.save(file, {"weight": torch.zeros(1)})
    assert file.read_bytes() == before and [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_what_is_saved(tmp_path):
    (tmp_path / "other").touch()
    whole = torch.arange(12.0).reshape(3, 4)
    safetensors.save(tmp_path / "x.safetensors", {"a": whole.T, "b": whole[1]})  # views and transposes, as they look
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["a"], whole.T) and torch.equal(loaded["b"], whole[1])
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_saved_model_replaces_the_shards_that_lay_there(tmp_path):
    tiny.shards(tmp_path, PLAIN, "model", count=2)
    model = linear()
    safetensors.save_model(tmp_path, model, {"x": math.pi})
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(safetensors.load(linear, Checkpoint(tmp_path)).weight, model.weight)
    assert json.loads((tmp_path / "config.json").read_text()) == {"x": math.pi}
