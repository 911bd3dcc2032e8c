"""Rewrites a PyTorch file as safetensors, for weights that are public only as a pickle.

    python -m nano_adrpo.files.convert FILE.pt OUT.safetensors

This is the one place that reads a pickle: by torch's weights-only loader, which builds tensors and refuses all else.
"""

import re
import warnings
from pathlib import Path

import torch

from nano_adrpo.errors import InputError, MissingFile, Parser, run_command
from nano_adrpo.files.safetensors import DTYPES, save


def convert(file, out):
    """Writes the tensors of a PyTorch file (.pt, .pth, .bin, .ckpt) to `out`, a new safetensors file. A state dict under
    "state_dict", "model" or "module" is unwrapped; entries that are no tensors are skipped and listed.

    Raises MissingFile, or InputError where the file has more than tensors, none, or is damaged, or `out` exists.
    """
    if not Path(file).is_file():
        raise MissingFile(f"{file}: no such file")
    if Path(out).exists() or not Path(out).parent.is_dir():
        raise InputError(f"{out}: {'exists, and is not overwritten' if Path(out).exists() else 'its folder does not exist'}")
    print(f"{file} is a pickle: reading it with torch.load(…, weights_only=True), which builds tensors and runs no code")
    try:
        with warnings.catch_warnings(action="ignore"):  # about formats that are refused below
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001, whatever the bytes provoke; the loader's own text is a page long
        if type(error).__name__ == "UnpicklingError" or "TorchScript" in str(error):
            found = re.search(r"unsupported (.*?)( whose| was|\n|$)", str(error), re.IGNORECASE)
            raise InputError(f"{file}: contains more than tensors{f' ({found[1]})' if found else ''}; not read") from None
        raise InputError(f"{file}: not a whole PyTorch file ({type(error).__name__})") from None
    while isinstance(state, dict):
        inside = next((key for key in ("state_dict", "model", "module") if isinstance(state.get(key), dict)), None)
        if inside is None:
            break
        print(f"reading '{inside}'" + "".join(f"; left out beside it: {key}" for key in state if key != inside))
        state = state[inside]
    if not isinstance(state, dict) or not any(
        isinstance(value, torch.Tensor) for key, value in state.items() if isinstance(key, str)
    ):
        raise InputError(f"{file}: holds a {type(state).__name__} without named tensors; expected a dict of them")
    tensors, storages = {}, set()
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or not isinstance(key, str):
            print(f"left out: {key} ({type(value).__name__})")
        elif value.layout != torch.strided or value.dtype not in DTYPES.values() or value.is_meta:
            kind = f"{value.layout}, {value.dtype}, on {value.device}"
            raise InputError(f"{file}: key '{key}' is {kind}; a safetensors file cannot hold it")
        else:  # two names may share memory here, but not in a safetensors file
            shared = value.untyped_storage().data_ptr() in storages
            storages.add(value.untyped_storage().data_ptr())
            tensors[key] = value.detach().clone() if shared else value
    save(out, tensors)
    print(f"{out}: tensors: {len(tensors)}, bytes: {Path(out).stat().st_size:,}")


def main():
    parser = Parser("Rewrites a pickled PyTorch file as safetensors.")
    parser.add_argument("file", metavar="FILE", help="a .pt, .pth, .bin or .ckpt file")
    parser.add_argument("out", metavar="OUT.safetensors", help="a new file")
    args = parser.parse_args()
    convert(args.file, args.out)


if __name__ == "__main__":
    run_command(main)
