"""Model files in safetensors: one file, or shards with an index.

Every model is loaded the same way. `load` builds it on the meta device, where tensors have a shape and no memory, compares its
names and shapes with the headers of the file, and only then reads the tensors. A layout that is not the model's own is a
function from a name in the model to the key in the file. Nothing is unpickled and nothing from a checkpoint is run.
"""

import contextlib
import functools
import itertools
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from nano_adrpo.errors import InputError, MissingFile
from nano_adrpo.files import read_index, replace, write_json

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
# The ends of keys beside float8 weights, as ComfyUI writes them: scales of weights, and what needs not be read.
SCALES, MARKS = ("scale_weight", "weight_scale"), ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")
BITSANDBYTES = r".*\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*|SCB|weight_format)"


def load(build, checkpoint, dtype=None, device=None, key_of=str, ignore=""):
    """Builds a model, fills it from `checkpoint` and sets it to eval mode; -> the model.

    build     () -> the model; it is called on the meta device
    key_of    name of a tensor in the model -> its key in the file. Several names with one key are blocks of that tensor along
              its first axis, in the order of the model's names: a query-key-value layer in one. A linear layer may be
              stored as a 1 × 1 convolution
    ignore    a regular expression: keys that match it are not read
    dtype     None keeps the file's; where a file mixes several, all become the narrowest that holds each. A float8 file needs
              one, since nothing computes in float8. A float8 weight with a scale becomes weight · scale
    device    None is the CPU; "meta" makes the same checks and reads no tensor. Then model.stored(name, rows) reads one, or a
              slice of its rows

    Raises InputError naming file and key for a tensor that is missing, unknown, misshapen or of another kind of number.
    """
    with torch.device("meta"), bounded(checkpoint):
        model = build()
    state, names = model.state_dict(), {}  # names: {key in the file: what the model calls the blocks of that tensor}
    for name in state:
        names.setdefault(key_of(name), []).append(name)
    expected = {
        key: torch.cat([state[n] for n in names[key]]) if len(names[key]) > 1 else state[names[key][0]] for key in names
    }
    for key, tensor in expected.items():
        if tensor.dim() == 2 and checkpoint.shapes.get(key) == (*tensor.shape, 1, 1):
            expected[key] = tensor[..., None, None]
    keys = [key for key in checkpoint.shapes if not re.fullmatch(ignore, key)]
    check(checkpoint, keys, expected, type(model).__name__)
    dtype = dtype or checkpoint.common_dtype(keys)

    def stored(name, rows=None):  # a tensor of the model, or a slice of its rows
        alike = names[key_of(name)]
        if rows or len(alike) > 1:
            before = sum(len(state[other]) for other in alike[: alike.index(name)])
            start, end, _ = (rows or slice(None)).indices(len(state[name]))
            rows = slice(before + start, before + end)
        tensor = checkpoint.read(key_of(name), rows=rows)
        tensor = tensor[..., 0, 0] if tensor.dim() > state[name].dim() else tensor
        return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)  # not the mapped file

    tensors = {}
    for key in keys:
        tensor, rows = checkpoint.read(key, device), [len(state[name]) for name in names[key] if state[name].dim()]
        blocks = [block.clone() for block in tensor.split(rows)] if len(rows) > 1 else [tensor]
        for name, block in zip(names[key], blocks):
            block = block[..., 0, 0] if block.dim() > state[name].dim() else block
            tensors[name] = block.to(dtype) if block.is_floating_point() else block
    model.load_state_dict(tensors, strict=True, assign=True)
    if torch.device(device or "cpu").type == "meta":
        model.stored = stored
    return model.eval()


BLOCKS = 4  # most tensors of a model that a file keeps in one: queries, keys, values and the first layer of FLUX's MLP


@contextlib.contextmanager
def bounded(checkpoint):
    """Inside, a model with more tensors than the file can fill, or with tensors beyond all memory, raises InputError: a config
    may ask for a billion layers, and to build these takes for ever."""
    left = itertools.count(BLOCKS * len(checkpoint.home) + 16, -1)

    def count(*_):
        if next(left) == 0:
            found = len(checkpoint.home)
            raise InputError(
                f"{checkpoint.path}: its config asks for more layers than it holds; expected those of its {found} tensors"
            )

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    except (RuntimeError, TypeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise InputError(f"{checkpoint.path}: its config asks for tensors of sizes beyond all memory") from None
    finally:
        hook.remove()


def check(checkpoint, keys, expected, owner):
    """Compares the headers of `keys` with `expected`, {key: tensor on the meta device}. `owner` is what the tensors are for.
    Raises InputError naming file and key for one that is unknown, misshapen, of another kind of number or missing."""
    for key in keys:
        if key not in expected:
            raise InputError(f"{checkpoint.where(key)} is not part of {owner}")
        shape, dtype, model = checkpoint.shapes[key], checkpoint.dtypes[key], expected[key]
        if shape != model.shape:
            raise InputError(f"{checkpoint.where(key)} has shape {list(shape)}; expected {list(model.shape)}")
        if dtype.is_floating_point != model.dtype.is_floating_point:
            raise InputError(f"{checkpoint.where(key)} is stored as {dtype}; expected numbers like {model.dtype}")
    if missing := [key for key in expected if key not in checkpoint.shapes]:
        raise InputError(f"{checkpoint.where(missing[0])} is missing ({len(missing)} of {len(expected)} keys are)")


class Checkpoint:
    """The tensors of a `.safetensors` file or of a model folder. Opening reads the headers only; `read` reads one tensor.

    path      a file; or a folder with STEM.safetensors or with the shards that STEM.safetensors.index.json lists, and where it
              has neither, the fp16 or bf16 variant of one of them
    prefix    what the keys of the wanted model begin with in a file that holds other models too. Those models are left out, and
              below, keys are without it. If no key begins with it, the file is taken as a whole
    only      a regular expression: keys, as the files spell them, that do not match it are left out. A shard that by the index
              has no others is not opened, and need not be there

    home      {key: its file}
    shapes    {key: shape}
    dtypes    {key: torch.dtype}

    Raises MissingFile for a file that is not there, InputError where one is damaged or quantised by bitsandbytes.
    """

    def __init__(self, path, stem="model", prefix="", only=".*"):
        self.path = Path(path)
        files, index = find(self.path, stem, only)
        self.files = {file: open_file(file) for file in files}
        stored = {file: {key: None for key in opened.keys() if re.fullmatch(only, key)} for file, opened in self.files.items()}
        home = {key: file for file, keys in stored.items() for key in keys}
        if index:  # of a key in two shards the listed one counts; where index and shards disagree otherwise, the shards do
            listed = {key: self.path / shard for key, shard in read_index(index).items()}
            home |= {key: file for key, file in listed.items() if key in stored.get(file, ())}
        self.prefix = prefix if any(key.startswith(prefix) for key in home) else ""
        self.home = {key.removeprefix(self.prefix): file for key, file in home.items() if key.startswith(self.prefix)}
        headers = {key: self.files[file].get_slice(self.prefix + key) for key, file in self.home.items()}
        self.shapes = {key: tuple(header.get_shape()) for key, header in headers.items()}
        for key, header in headers.items():
            if header.get_dtype() not in DTYPES:
                raise InputError(f"{self.where(key)} has dtype {header.get_dtype()}; expected one of {', '.join(DTYPES)}")
        self.dtypes = {key: DTYPES[header.get_dtype()] for key, header in headers.items()}
        self.scales = self.take_scales()

    def take_scales(self):
        """Takes what belongs to float8 weights off `shapes`; -> {weight: key of its scale, one number or one for each row}.
        Raises InputError for a scale of another shape and for weights that bitsandbytes quantised."""
        float8 = {key for key, dtype in self.dtypes.items() if dtype.is_floating_point and dtype.itemsize == 1}
        scales = {}
        for key, shape in list(self.shapes.items()):
            if re.fullmatch(BITSANDBYTES, key):
                raise InputError(f"{self.where(key)}: weights quantised by bitsandbytes are not read; expected plain ones")
            stem, _, end = key.rpartition(".")
            weight = f"{stem}.weight"
            if end in SCALES and weight in float8:
                if math.prod(shape) not in (1, self.shapes[weight][0]):
                    raise InputError(f"{self.where(key)} has shape {list(shape)}; expected one number, or one for each row")
                scales[weight] = key
                del self.shapes[key]
            elif end in MARKS and float8:
                del self.shapes[key]
        return scales

    def where(self, key):
        """The file and the key as the file spells it, for messages."""
        return f"{self.home.get(key, self.path)}: key '{self.prefix}{key}'"

    def read(self, key, device=None, rows=None):
        """The tensor under `key`, as stored, or float32 where it has a scale; on the meta device nothing is read. rows: a slice
        of them; None: all."""
        if torch.device(device or "cpu").type == "meta":
            return torch.empty(self.shapes[key], dtype=self.dtypes[key], device="meta")
        tensor = self.stored(key, rows).to(device or "cpu")
        if key not in self.scales:
            return tensor
        scale = self.stored(self.scales[key]).to(tensor.device, torch.float32)
        scale = scale[rows] if rows and scale.numel() > 1 else scale
        return tensor.float() * scale.view(-1, *[1] * (tensor.dim() - 1))

    def stored(self, key, rows=None):
        file = self.files[self.home[key]]
        return file.get_slice(self.prefix + key)[rows] if rows else file.get_tensor(self.prefix + key)

    def common_dtype(self, keys):
        """The narrowest dtype that holds the floating-point tensors of `keys`. Raises InputError for float8."""
        stored = {self.dtypes[key]: key for key in keys if self.dtypes[key].is_floating_point}
        for dtype, key in stored.items():
            if dtype.itemsize == 1:
                raise InputError(f"{self.where(key)} is stored as {dtype}; expected a dtype to compute in (--dtype)")
        return functools.reduce(torch.promote_types, stored or [torch.float32])

    def measure(self, layout, axes):
        """-> {name: length}, read off the shapes of a file that has no config.json.

        layout    what the file should be, for messages
        axes      {key: a name for each axis of its tensor, None where the length is not wanted}

        Raises InputError naming file and key for a tensor that is missing or has another number of axes.
        """
        sizes = {}
        for key, names in axes.items():
            shape = self.shapes.get(key, ())
            if len(shape) != len(names) or 0 in shape:
                found = f"has shape {list(shape)}" if key in self.shapes else "is missing"
                raise InputError(f"{self.where(key)} {found}; expected {layout}")
            sizes |= {name: length for name, length in zip(names, shape) if name}
        return sizes

    def count(self, stem):
        """The number of layers whose keys are `stem` and a number from 0 up; at least 1. No model has 10,000."""
        layers = (re.match(re.escape(stem) + r"(\d{1,4})\.", key) for key in self.shapes)
        return 1 + max((int(layer[1]) for layer in layers if layer), default=0)

    def heads(self, width, size=64):
        """How many heads of 64 numbers a layer of `width` has, where no config.json says how wide they are."""
        if width % size:
            raise InputError(
                f"{self.path}: the width {width} does not divide into heads of {size}, as in the public checkpoints"
            )
        return width // size


def find(path, stem, only=".*"):
    """-> the files with tensors, and the index that lists them or None."""
    if path.is_file():
        return [path], None
    if not path.exists():
        raise MissingFile(f"{path}: no such file or folder; expected a model folder or a .safetensors file")
    for variant in ("", ".fp16", ".bf16"):
        whole, index = path / f"{stem}{variant}.safetensors", path / f"{stem}.safetensors.index{variant}.json"
        if whole.is_file():
            return [whole], None
        if not index.is_file():
            continue
        weight_map = read_index(index)
        shards = [path / shard for shard in sorted({weight_map[key] for key in weight_map if re.fullmatch(only, key)})]
        for shard in shards:
            if not shard.is_file():
                raise MissingFile(f"{shard}: no such file; {index.name} lists it")
        return shards, index
    raise MissingFile(
        f"{path}: no {stem}.safetensors and no {stem}.safetensors.index.json in this folder (a pickled .bin is not read: "
        "`python -m nano_adrpo.files.convert` makes it one)"
    )


def open_file(file):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file ({error})") from None


def save(file, tensors, label=("format", "pt")):
    """Writes {name: tensor} as one safetensors file, whole or not at all.

    label     a name and a text that the file's header keeps. Only one pair: safetensors writes several in a random order, and
              the same tensors shall give the same bytes
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary):
        try:
            save_file(tensors, temporary, metadata=dict([label]))
        except SafetensorError as error:  # what a full disk is to that package
            raise OSError(str(error)) from None

    replace(file, write)


def save_model(folder, model, config, stem="model", prefix=""):
    """Writes a model folder: config.json and STEM.safetensors, whose keys begin with `prefix`. Raises InputError for a model
    that has adapters (lora.py)."""
    if any(".lora_A." in name for name in model.state_dict()):
        raise InputError(f"{folder}: the model has adapters; save them with lora.save, or lora.merge them before it is saved")
    Path(folder).mkdir(parents=True, exist_ok=True)
    save(Path(folder) / f"{stem}.safetensors", {prefix + name: tensor for name, tensor in model.state_dict().items()})
    # Shards of an earlier save may lie here. Without their index diffusers reads the new file.
    (Path(folder) / f"{stem}.safetensors.index.json").unlink(missing_ok=True)
    write_json(Path(folder) / "config.json", config)


def rename(name, table):
    """`name` with each key of `table` replaced by its value, in the table's order: a tensor's name in another layout."""
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name
