"""Folders with images of any other system: which file belongs to which prompt.

A file that `--images` names lists them, in any format of prompt files (text_to_image/prompts.py), with "file", the name within
the folder, and "prompt", the prompt's text or, as a text, its number, counted from 0. Without it the names tell:
PROMPT_SAMPLE.png, both numbers, or else the order of the names, in which 2 comes before 10, with equally many images for each
prompt. If there are several seeds, their images are in seed0/, seed1/, …
"""

import re
import shlex
from pathlib import Path

import torch

from nano_adrpo.errors import InputError, MissingFile, shown
from nano_adrpo.files.png import read_png
from nano_adrpo.text_to_image.prompts import read_rows

ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP", ".bmp": "BMP", ".gif": "GIF", ".tif": "TIFF"}


def is_images(path):
    """Whether a path is a folder of images, not a model (whose folder may show some, as SD3's does)."""
    path = Path(path)
    return path.is_dir() and not (path / "transformer").is_dir() and any(map(images_in, (path, path / "seed0")))


def images_in(folder):
    """The image files in a folder, in the order of their names, in which numbers count as numbers. A JPEG beside the PNG that
    was made of it is passed over."""
    found = [file for file in folder.iterdir() if file.suffix.lower() in ENDINGS] if folder.is_dir() else []
    found = [file for file in found if file.suffix.lower() == ".png" or file.with_suffix(".png") not in found]
    return sorted(found, key=in_order)


def in_order(file):
    """A key to sort file names by: texts and numbers in turn."""
    parts = re.split("([0-9]+)", file.name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], file.name


def seeds(path, wanted):
    """How many of the wanted seeds a folder of images has: without seed0/ one."""
    return wanted if (Path(path) / "seed0").is_dir() else 1


def files_of(path, seed, prompts, table=None):
    """-> of each of the P prompts the list of its images, [Path]. table: the file of --images, or None. Raises MissingFile or
    InputError where a prompt has none or a file cannot be meant."""
    folder = Path(path) / f"seed{seed}" if (Path(path) / "seed0").is_dir() else Path(path)
    found, images = [[] for _ in prompts], images_in(folder)
    if table:
        for number, row in enumerate(read_rows(table), 1):
            file = folder / str(row.get("file", ""))
            if not file.is_file():
                raise MissingFile(f'{table}, row {number}: {file}: no such file; expected "file" and "prompt" in every row')
            found[number_of(row["prompt"], prompts, f"{table}, row {number}")].append(file)
    else:
        numbered = [re.fullmatch("([0-9]+)_[0-9]+", file.stem) for file in images]
        each, rest = divmod(len(images), len(prompts))
        if rest and not all(numbered):
            expected = "names as PROMPT_SAMPLE.png (0007_03.png), or --images FILE"
            raise InputError(f"{folder}: {len(images)} images, which {len(prompts)} prompts do not divide; expected {expected}")
        for index, (file, match) in enumerate(zip(images, numbered)):
            found[by_number(match[1], prompts, file) if all(numbered) else index // each].append(file)
        if not all(numbered):
            print(
                f"{folder}: {each} images a prompt in the order of names; {shown(images[0].name)} is of {prompts[0]!r}",
                flush=True,
            )
    refuse_others(file for files in found for file in files)
    if [] in found:
        some = f"some of each of the {len(prompts)} prompts"
        raise MissingFile(f"{folder}: no image of prompt {found.index([])}; expected {some}")
    return found


def refuse_others(files):
    """Raises InputError for the first file that is no PNG, with the line that converts it."""
    for file in files:
        if (kind := ENDINGS.get(file.suffix.lower(), "PNG")) != "PNG":
            convert = f"mogrify -format png {shlex.quote(str(file.parent))}/*{file.suffix}"
            raise InputError(f"{file}: a {kind} file, which is not read; expected PNG, as `{convert}` (ImageMagick) makes it")


def real_images(folder):
    """The files of --reference-images: at least two PNG images, of any sizes and names."""
    found = images_in(Path(folder))
    if len(found) < 2:
        raise MissingFile(f"--reference-images {folder}: {len(found)} images in it; expected a folder of at least two")
    refuse_others(found)
    return found


@torch.no_grad()
def embeddings(files, reward, device):
    """[M, P], see Rewards.embed_images. One image at a time: their sizes may differ."""
    with reward.on(device):
        return torch.cat([reward.embed_images(read_png(file)[None]) for file in files])


def number_of(prompt, prompts, where):
    """The number of a prompt that is given as its text or as this number."""
    return prompts.index(prompt) if prompt in prompts else by_number(prompt, prompts, where)


def by_number(prompt, prompts, where):
    """The number of a prompt, of its digits."""
    if re.fullmatch("[0-9]{1,9}", prompt) and int(prompt) < len(prompts):
        return int(prompt)
    raise InputError(f"{where}: no prompt {prompt[:60]!r}; expected one of --prompts, or a number from 0 to {len(prompts) - 1}")


def read_images(paths):
    """-> [N, C, H, W], grey ones in colour where some are; InputError names the first image of another size."""
    images = [read_png(path) for path in paths]
    channels = max(map(len, images))
    images = [image.expand(channels, -1, -1) for image in images]
    for path, image in zip(paths, images):
        if image.shape != images[0].shape:
            raise InputError(f"{path}: is {list(image.shape)}; expected {list(images[0].shape)}, as the first of the folder")
    return torch.stack(images)
