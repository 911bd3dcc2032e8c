"""What the tests of evaluate share: small evaluations of images, and folders of images."""

import pytest
import torch

from nano_adrpo import evaluate
from nano_adrpo.demo import HERE
from nano_adrpo.evaluation import plots
from nano_adrpo.files.png import read_png, write_png

BASE = HERE / "base"


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Options for an evaluation of two prompts without pictures, which takes a second."""
    monkeypatch.setattr(plots, "pyplot", lambda file: None)
    (tmp_path / "prompts.txt").write_text("a green two\na blue nine\n")
    return ["--prompts", tmp_path / "prompts.txt", "--steps", 2, "--samples", 2, "--seeds", 2, "--out", tmp_path / "out"]


def run(*options):
    return evaluate.main([str(option) for option in options])


def write_images(folder, seed=0, count=2, size=8):
    folder.mkdir(parents=True)
    drawn = 2 * torch.rand(2 * count, 1, size, size, generator=torch.Generator().manual_seed(seed)) - 1
    files = [folder / f"{i // 2:04d}_{i % 2:02d}.png" for i in range(2 * count)]
    for file, image in zip(files, drawn):
        write_png(file, image)
    return torch.stack([read_png(file) for file in files])
