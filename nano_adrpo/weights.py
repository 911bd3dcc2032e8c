"""Model files: safetensors (one file, or shards with an index) and the JSON beside them.

Every model is loaded the same way: build it on the meta device from its config, stream the file's tensors through the
layout's key map, check each name and shape against the model, assign. Nothing is unpickled, nothing from a checkpoint is
run, and every file is written whole or not at all. Weights that are public only as a pickle become a safetensors file with

    python -m nano_adrpo.weights convert FILE OUT.safetensors

the one place that reads a pickle, by torch's weights-only loader, which builds tensors and refuses all else.
"""

import dataclasses
import functools
import json
import math
import os
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Checkpoint:
    """The tensors of a `.safetensors` file, or of a model folder: `STEM.safetensors` or the shards that
    `STEM.safetensors.index.json` lists, and where a folder has neither, the fp16 variant of one of them. Opening reads the
    headers only; `read` reads one tensor.

    Raises FileNotFoundError where a file is missing, ValueError where one is damaged or where index and shards disagree.
    """

    def __init__(self, path, stem="model"):
        self.path = Path(path)
        files, index = _files(self.path, stem)
        self.files = {file: _open(file) for file in files}
        keys = {file: set(opened.keys()) for file, opened in self.files.items()}
        self.home = {key: file for file, opened in self.files.items() for key in opened.keys()}
        if index:
            listed = {key: self.path / shard for key, shard in read_json(index)["weight_map"].items()}
            for key in sorted(listed.keys() | self.home.keys()):
                if key not in listed:
                    raise ValueError(f"{index}: key '{key}' is in a shard but not listed")
                if key not in keys[listed[key]]:
                    raise ValueError(f"{index}: key '{key}' is listed but not in {listed[key].name}")
            self.home = {key: listed[key] for key in self.home}  # of a key in two shards the listed one counts
        headers = {key: self.files[file].get_slice(key) for key, file in self.home.items()}
        self.shapes = {key: tuple(header.get_shape()) for key, header in headers.items()}
        self.dtypes = {key: DTYPES.get(header.get_dtype()) for key, header in headers.items()}
        if None in self.dtypes.values():
            key = next(key for key, dtype in self.dtypes.items() if dtype is None)
            raise ValueError(
                f"{self.home[key]}: key '{key}' has dtype {headers[key].get_dtype()}; expected one of {', '.join(DTYPES)}"
            )

    def read(self, key, device=None):
        """The tensor under `key`, as stored; on the meta device nothing is read."""
        if torch.device(device or "cpu").type == "meta":
            return torch.empty(self.shapes[key], dtype=self.dtypes[key], device="meta")
        return self.files[self.home[key]].get_tensor(key).to(device or "cpu")


def _files(path, stem):
    """-> the files with tensors, and the index that lists them or None."""
    if path.is_file():
        return [path], None
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a model folder or a .safetensors file")
    for variant in ("", ".fp16"):
        whole, index = path / f"{stem}{variant}.safetensors", path / f"{stem}.safetensors.index{variant}.json"
        if whole.is_file():
            return [whole], None
        if not index.is_file():
            continue
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
            raise ValueError(f"{index}: expected a 'weight_map' from keys to shard files")
        shards = [path / shard for shard in sorted(set(weight_map.values()))]
        for shard in shards:
            if not shard.is_file():
                raise FileNotFoundError(f"{shard}: no such file; {index.name} lists it")
        return shards, index
    raise FileNotFoundError(
        f"{path}: no {stem}.safetensors and no {stem}.safetensors.index.json in this folder (a pickled .bin is not read: "
        "`python -m nano_adrpo.weights convert` makes it one)"
    )


def _open(file):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def load(model, checkpoint, dtype=None, device=None, convert=lambda key, read: {key: read()}, keys=None, key_of=str):
    """Fills `model`, built on the meta device, from `checkpoint`, and returns it.

    convert   (key in the file, function that reads its tensor) -> {name in the model: tensor}; {} drops the key
    keys      the keys to read, None for all
    key_of    name in the model -> the file's key for it, which a message about a missing one names
    dtype     None keeps the file's dtype; where a file mixes several, all become the narrowest that holds each. A float8 file
              needs one: nothing computes in float8
    device    None is the CPU; "meta" checks names and shapes against the headers and reads no tensor

    Raises ValueError naming the file and the key for an unknown, missing or misshapen tensor, or one of another kind of number.
    """
    expected = model.state_dict()
    keys = list(checkpoint.home if keys is None else keys)
    if dtype is None:
        stored = {checkpoint.dtypes[key]: key for key in keys if checkpoint.dtypes[key].is_floating_point}
        for float8 in (kind for kind in stored if kind.itemsize == 1):
            key = stored[float8]
            raise ValueError(f"{checkpoint.home[key]}: key '{key}' is stored as {float8}; expected a dtype to compute in")
        dtype = functools.reduce(torch.promote_types, stored or [torch.float32])
    tensors = {}
    for key in keys:
        where = f"{checkpoint.home[key]}: key '{key}'"
        for name, tensor in convert(key, lambda: checkpoint.read(key, device)).items():
            if name not in expected:
                raise ValueError(f"{where} is not part of {type(model).__name__}")
            if tensor.shape != expected[name].shape:
                raise ValueError(f"{where} has shape {list(tensor.shape)}; expected {list(expected[name].shape)}")
            if tensor.is_floating_point() != expected[name].is_floating_point():
                raise ValueError(f"{where} is stored as {tensor.dtype}; expected numbers like {expected[name].dtype}")
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if missing := [name for name in expected if name not in tensors]:
        raise ValueError(
            f"{checkpoint.path}: key '{key_of(missing[0])}' is missing ({len(missing)} of {len(expected)} keys are)"
        )
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def save(file, tensors, label=("format", "pt")):
    """Writes {name: tensor} as one safetensors file, whole or not at all. label: a name and a text for the file's header; one,
    because safetensors writes several in an order of chance."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _replace(file, lambda temporary: save_file(tensors, temporary, metadata=dict([label])))


def save_model(folder, model, config, stem="model"):
    """Writes a model folder: config.json and STEM.safetensors. Raises ValueError for a model that has adapters (lora.py)."""
    if any(".lora_A." in name for name in model.state_dict()):
        raise ValueError(f"{folder}: the model has adapters; save them with lora.save, or lora.merge them before it is saved")
    Path(folder).mkdir(parents=True, exist_ok=True)
    save(Path(folder) / f"{stem}.safetensors", model.state_dict())
    # Of shards that lie here from before: diffusers would go on reading those.
    (Path(folder) / f"{stem}.safetensors.index.json").unlink(missing_ok=True)
    write_json(Path(folder) / "config.json", config)


def write_json(file, value):
    """Writes `value` as JSON, whole or not at all."""
    _replace(file, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_bytes(file, content):
    """Writes `content`, whole or not at all."""
    _replace(file, lambda temporary: temporary.write_bytes(content))


def _replace(file, write):
    # A new name, flushed to the disk, then renamed over the old file: at every instant one whole version exists.
    file = Path(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")  # another run may write the same file, such as embeddings
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives a new file; safetensors would make it private
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(file):
    """The object in a JSON file. Raises FileNotFoundError, or ValueError where it is no JSON object."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return value


def section(values, key, where):
    """The JSON object below `key` of a config.json's values; an absent one and null are an empty one."""
    if not isinstance(inside := values.get(key), (dict, type(None))):
        raise ValueError(f"{where}: key '{key}' is {inside!r}; expected a JSON object")
    return inside or {}


def parse_config(cls, values, where):
    """A config dataclass from a config.json's values. A field without default must be there, a number must be a number and a
    text a text; keys that the dataclass does not have are another program's business and are passed over."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: key '{name}' is missing")
        value = values.get(name)
        if name in values and field.type in (int, float):
            if isinstance(value, bool) or not isinstance(value, (int, field.type)) or not 0 < value < math.inf:
                raise ValueError(f"{where}: key '{name}' is {value!r}; expected a positive {field.type.__name__}")
        if name in values and field.type is str and not isinstance(value, str):
            raise ValueError(f"{where}: key '{name}' is {value!r}; expected a text")
    try:
        return cls(**{name: values[name] for name in fields if name in values})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def size(shapes, path, layout, prefix, name, axis, rank=2):
    """The length of one axis of a tensor, where a single file's sizes stand in no config.json: shapes {name: shape}. Raises
    ValueError naming file and key, prefix + name, for a tensor that `layout` has and the file has not, or of another rank."""
    if len(shapes.get(name, ())) != rank or 0 in shapes[name]:
        found = f"has shape {list(shapes[name])}" if name in shapes else "is missing"
        raise ValueError(f"{path}: key '{prefix}{name}' {found}; expected {layout}")
    return shapes[name][axis]


def convert(file, out):
    """Writes the tensors of a PyTorch file (.pt, .pth, .bin, .ckpt) to `out`, a new safetensors file. A state dict under
    "state_dict", "model" or "module" is unwrapped; what is no tensor is left out, and said.

    Raises FileNotFoundError, or ValueError where the file has more than tensors, none, or is damaged, or `out` exists.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if Path(out).exists() or not Path(out).parent.is_dir():
        raise ValueError(f"{out}: {'exists, and is not overwritten' if Path(out).exists() else 'its folder does not exist'}")
    print(f"{file} is a pickle: reading it with torch.load(…, weights_only=True), which builds tensors and runs no code")
    try:
        with warnings.catch_warnings(action="ignore"):  # about formats that are refused below
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes provoke; the loader's own text is a page and advises to trust the file
        if type(error).__name__ == "UnpicklingError" or "TorchScript" in str(error):
            found = re.search(r"unsupported (.*?)( whose| was|\n|$)", str(error), re.IGNORECASE)
            raise ValueError(f"{file}: contains more than tensors{f' ({found[1]})' if found else ''}; not read") from None
        raise ValueError(f"{file}: not a whole PyTorch file ({type(error).__name__})") from None
    while isinstance(state, dict):
        inside = next((key for key in ("state_dict", "model", "module") if isinstance(state.get(key), dict)), None)
        if inside is None:
            break
        print(f"reading '{inside}'" + "".join(f"; left out beside it: {key}" for key in state if key != inside))
        state = state[inside]
    if not isinstance(state, dict) or not any(
        isinstance(value, torch.Tensor) for key, value in state.items() if isinstance(key, str)
    ):
        raise ValueError(f"{file}: holds a {type(state).__name__} without named tensors; expected a dict of them")
    tensors, storages = {}, set()
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or not isinstance(key, str):
            print(f"left out: {key} ({type(value).__name__})")
        elif value.layout != torch.strided or value.dtype not in DTYPES.values() or value.is_meta:
            kind = f"{value.layout}, {value.dtype}, on {value.device}"
            raise ValueError(f"{file}: key '{key}' is {kind}; a safetensors file cannot hold it")
        else:  # two names may share memory here, but not in a safetensors file
            shared = value.untyped_storage().data_ptr() in storages
            storages.add(value.untyped_storage().data_ptr())
            tensors[key] = value.detach().clone() if shared else value
    save(out, tensors)
    print(f"{out}: tensors: {len(tensors)}, bytes: {Path(out).stat().st_size:,}")


def main():
    from nano_adrpo import runtime

    parser = runtime.Parser("Rewrites a pickled PyTorch file as safetensors.")
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("file", metavar="FILE", help="a .pt, .pth, .bin or .ckpt file")
    parser.add_argument("out", metavar="OUT.safetensors", help="a new file")
    args = parser.parse_args()
    runtime.run(lambda: convert(args.file, args.out))


if __name__ == "__main__":
    main()
