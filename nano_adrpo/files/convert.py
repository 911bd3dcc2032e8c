"""Rewrites PyTorch files as safetensors, for weights that are public only as a pickle.

    python -m nano_adrpo.files.convert FILE.pt OUT.safetensors
    python -m nano_adrpo.files.convert FOLDER OUT                    # a model folder with .bin files, sharded or not

This is the one place that reads a pickle: by torch's weights-only loader, which builds tensors and refuses all else.
"""

import contextlib
import re
import warnings
import zipfile
from pathlib import Path

import torch

from nano_adrpo.errors import InputError, MissingFile, Parser, run_command, shown
from nano_adrpo.files import copy_small, new_folder, read_index, write_json
from nano_adrpo.files.safetensors import DTYPES, save

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # names below which a training script keeps a state dict
# What torch's wrappers add to the names of layers: compile, FSDP and checkpointing where they wrap, data parallelism in front.
WRAPPED, PARALLEL = r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "module."
# A few bytes of a pickle can stand for a tensor of any size. A file's tensors may take so many times its own bytes: tied
# weights lie in it once and are written under each of their names.
TIMES, SMALL = 4, 2**20
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # what trainers leave beside a model


def convert(file, out):
    """Writes the tensors of a PyTorch file (.pt, .pth, .bin, .ckpt) to `out`, a new safetensors file. A state dict below one of
    WRAPPERS is unwrapped, names lose what torch's wrappers added, and entries that are no tensors are skipped and listed.

    Raises MissingFile, or InputError where the file has more than tensors, none, or is damaged, or `out` exists.
    """
    if not Path(file).is_file():
        raise MissingFile(f"{file}: no such file")
    if Path(out).exists() or not Path(out).parent.is_dir():
        raise InputError(f"{out}: {'exists, and is not overwritten' if Path(out).exists() else 'its folder does not exist'}")
    return rewrite(file, out, out)


def rewrite(file, out, name):
    """Does what `convert` does; `name` is what messages call `out`."""
    print(f"{file} is a pickle: reading it with torch.load(…, weights_only=True), which builds tensors and runs no code")
    tensors = tensors_of(unwrapped(read_pickle(file), file), file)
    save(out, tensors)
    print(f"{name}: tensors: {len(tensors)}, bytes: {Path(out).stat().st_size:,}")
    return list(tensors)


def convert_folder(folder, out):
    """Writes a model folder whose weights are .bin files, with an index or a single one, to `out`, a new or empty folder: each
    as a safetensors file, the index, and the small files beside them, such as config.json.

    Raises MissingFile where a file is missing, InputError as `convert` does."""
    folder = Path(folder)
    indexes = sorted(file for file in folder.glob("*.json") if INDEX.fullmatch(file.name))
    listed = {name for index in indexes for name in read_index(index).values()} - set(NO_WEIGHTS)
    shards = {folder / name for name in listed} | {file for file in folder.glob("*.bin") if file.name not in NO_WEIGHTS}
    if not shards:
        raise MissingFile(f"{folder}: no .bin file in this folder")
    for file in sorted(shards):
        if not file.is_file():
            raise MissingFile(f"{file}: no such file; an index lists it")
    names = {file: public(file.stem) + ".safetensors" for file in sorted(shards)}
    if len(set(names.values())) < len(names):
        raise InputError(f"{folder}: two .bin files would have one name as safetensors; expected one model's")
    with new_folder(out) as new:
        homes = {}  # file: its keys
        for file, name in names.items():
            homes[name] = rewrite(file, new / name, Path(out) / name)
        copy_small(folder, new)
        for index in indexes:  # the last files, so that a folder with them is whole
            stem, variant = INDEX.fullmatch(index.name).groups("")
            shards = {name: keys for name, keys in homes.items() if name.startswith(f"{public(stem)}{variant}-")}
            inside = {key: name for name, keys in shards.items() for key in keys}
            write_json(new / f"{public(stem)}.safetensors.index{variant}.json", {"metadata": {}, "weight_map": inside})


INDEX = re.compile(r"(.+)\.bin\.index(\.\w+)?\.json")  # of a variant: pytorch_model.bin.index.fp16.json


def public(stem):
    """What a file of weights is called as safetensors: transformers' has another name."""
    return re.sub("^pytorch_model", "model", stem)


def read_pickle(file):
    """What torch's weights-only loader makes of a file."""
    size = 0
    with contextlib.suppress(Exception):  # an older file is no archive, and a damaged one is refused below
        size = sum(inside.file_size for inside in zipfile.ZipFile(file).infolist())
    check_size(size, file)
    try:
        with warnings.catch_warnings(action="ignore"):  # about formats that are refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001, whatever the bytes provoke; the loader's own text is a page long
        if type(error).__name__ == "UnpicklingError" or "TorchScript" in str(error):
            found = re.search(r"unsupported (.*?)( whose| was|\n|$)", str(error), re.IGNORECASE)
            raise InputError(f"{file}: contains more than tensors{f' ({found[1]})' if found else ''}; not read") from None
        raise InputError(f"{file}: not a whole PyTorch file ({type(error).__name__})") from None


def check_size(size, file):
    """Refuses a file whose content would take `size` bytes, many times its own."""
    if size > (most := TIMES * Path(file).stat().st_size + SMALL):
        raise InputError(f"{file}: what it holds takes {size:,} bytes; expected at most {most:,} of a file of its size")


def unwrapped(state, file):
    """The dict of named tensors in what a file holds, under the names that the model itself gives them."""
    for _ in WRAPPERS:  # a dict may hold itself
        inside = next((key for key in WRAPPERS if isinstance(state, dict) and isinstance(state.get(key), dict)), None)
        if inside is None:
            break
        print(f"reading '{inside}'" + "".join(f"; left out beside it: {shown(key)}" for key in state if key != inside))
        state = state[inside]
    named = [key for key, value in state.items() if is_tensor(key, value)] if isinstance(state, dict) else []
    if not named:
        raise InputError(f"{file}: holds a {type(state).__name__} without named tensors; expected a dict of them")
    names = {key: re.sub(WRAPPED, "", key) for key in named}
    while all(name.startswith(PARALLEL) for name in names.values()):
        names = {key: name.removeprefix(PARALLEL) for key, name in names.items()}
    if len(set(names.values())) < len(names):
        raise InputError(f"{file}: two keys have one name without what torch's wrappers add; expected one model's keys")
    if changed := next((key for key in named if names[key] != key), None):
        print(f"names lose what torch's wrappers added: {shown(changed)} is {shown(names[changed])}")
    return {names.get(key, key): value for key, value in state.items()}


def is_tensor(key, value):
    return isinstance(key, str) and isinstance(value, torch.Tensor)


def tensors_of(state, file):
    """{name: tensor} as a safetensors file can hold it."""
    tensors, storages = {}, set()
    check_size(sum(x.numel() * x.element_size() for x in state.values() if isinstance(x, torch.Tensor)), file)
    for key, value in state.items():
        if not is_tensor(key, value):
            print(f"left out: {shown(key)} ({type(value).__name__})")
        elif key == "__metadata__" or any("\ud800" <= letter <= "\udfff" for letter in key):  # half a character is no text
            raise InputError(f"{file}: key {key!r}: a safetensors file cannot hold a tensor of this name")
        elif value.layout != torch.strided or value.dtype not in DTYPES.values() or value.is_meta:
            kind = f"{value.layout}, {value.dtype}, on {value.device}"
            raise InputError(f"{file}: key '{key}' is {kind}; a safetensors file cannot hold it")
        else:  # two names may share memory here, but not in a safetensors file
            shared = value.untyped_storage().data_ptr() in storages
            storages.add(value.untyped_storage().data_ptr())
            tensors[key] = value.detach().clone() if shared else value
    return tensors


def main():
    parser = Parser("Rewrites pickled PyTorch files as safetensors.")
    parser.add_argument("file", metavar="FILE", help="a .pt, .pth, .bin or .ckpt file, or a model folder with .bin files")
    parser.add_argument("out", metavar="OUT", help="a new .safetensors file, or a new folder")
    args = parser.parse_args()
    if Path(args.file).is_dir():
        convert_folder(args.file, args.out)
    else:
        convert(args.file, args.out)


if __name__ == "__main__":
    run_command(main)
