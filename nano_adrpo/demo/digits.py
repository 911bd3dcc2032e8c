"""Handwritten digits, the flow demo's task: the data, the captions, and a judge that the reward does not see.

The 1,797 real 8 × 8 digits of the UCI test set (attribution: DIGITS.md beside this file). Two attributes are measured from the
pixels: stroke (how much ink) and slant (how far the top leans to the right). Within each digit the lowest third is called thin
or upright, the highest third bold or slanted, and the middle third nothing. Captions read "a bold slanted handwritten three".

  clip/    a tiny CLIP, trained on full captions. It is the reward, and its text tower encodes the base model's prompts.
  base/    an SD3-shaped pixel-space model (MMDiT, CLIP text encoder), trained on captions with at most one attribute, so that
           prompts with two leave room for alignment to improve
  judge/   a digit classifier that no reward sees, trained on other images than both of the above

CLIP and base see two thirds of the images, the judge the other third. digits_recipe.py trains all three. The prompts of the
demo, prompts.txt, are the forty captions with two attributes.
"""

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from nano_adrpo import metrics
from nano_adrpo.demo import HERE
from nano_adrpo.errors import InputError
from nano_adrpo.files import safetensors

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
STROKES, SLANTS = ["thin", "", "bold"], ["upright", "", "slanted"]


def load():
    """images [1797, 1, 8, 8] in [−1, 1], labels [1797], and which rows belong to the judge [1797] (every third)."""
    checkpoint = safetensors.Checkpoint(HERE / "digits.safetensors")
    images = checkpoint.read("images")[:, None].float() / 8 - 1
    return images, checkpoint.read("labels").long(), torch.arange(len(images)) % 3 == 2


def ink_and_slant(images):
    """images [N, 1, 8, 8] in [−1, 1] -> ink [N], the mean darkness in 0 … 1, and slant [N], the shear of the ink's second
    moments: columns to the right per row upwards."""
    ink = (images[:, 0].clamp(-1, 1) + 1) / 2  # [N, 8, 8]
    amount = ink.sum(dim=(1, 2)).clamp(min=1e-6)[:, None, None]
    axis = torch.arange(8.0)
    x, y = axis[None, None, :].expand_as(ink), axis[None, :, None].expand_as(ink)
    dx = x - (ink * x).sum(dim=(1, 2), keepdim=True) / amount
    dy = y - (ink * y).sum(dim=(1, 2), keepdim=True) / amount
    return ink.mean(dim=(1, 2)), -(ink * dx * dy).sum(dim=(1, 2)) / (ink * dy * dy).sum(dim=(1, 2)).clamp(min=1e-6)


def attributes(images, labels):
    """The third, 0 (thin, upright), 1 or 2 (bold, slanted), of its digit's real images that each image's ink and slant
    fall in: two [N]."""
    real, real_labels, _ = load()
    found = []
    for measure, reference in zip(ink_and_slant(images), ink_and_slant(real)):
        bounds = torch.stack([reference[real_labels == n].quantile(torch.tensor([1 / 3, 2 / 3])) for n in range(10)])  # [10, 2]
        found.append((measure[:, None] >= bounds[labels]).sum(dim=1))
    return found


def caption(number, stroke, slant):
    return " ".join(word for word in ("a", STROKES[stroke], SLANTS[slant], "handwritten", NUMBERS[number]) if word)


def captions(images, labels):
    """Every image's full caption, a list of N strings."""
    return [caption(*row) for row in zip(labels, *attributes(images, labels))]


# -------------------------------------------------------------------------------------------------------------------- judge


class Judge(nn.Module):
    """A digit classifier: images [N, 1, 8, 8] -> logits [N, 10]."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.hidden, self.out = nn.Linear(32 * 16, 32), nn.Linear(32, 10)

    def features(self, images):
        """[N, 1, 8, 8] -> [N, 32]."""
        return F.relu(self.hidden(F.relu(self.conv2(F.relu(self.conv1(images)))).flatten(1)))

    def forward(self, images):
        return self.out(self.features(images))


@functools.cache
def classifier():
    """The trained Judge, read from disk once."""
    return safetensors.load(Judge, safetensors.Checkpoint(HERE / "judge"))


@torch.no_grad()
def judge(images, prompts):
    """Judges N generated images [N, 1, 8, 8] by their prompts, captions of this file. -> by name:

    joint, digit, stroke, slant   [N] booleans: is all of it right, is that attribute right
    frechet                       squared Fréchet distance to the real images with two attributes, in the classifier's features
    out_of_range                  share of pixels beyond [−1, 1] by more than 0.1

    Raises InputError for images of another shape and for a prompt that is no caption.
    """
    if images.shape[1:] != (1, 8, 8):
        raise InputError(f"the demo's judge was given images {list(images.shape[1:])}; expected its own, [1, 8, 8]")
    network = classifier()
    wanted = torch.tensor([meaning(prompt) for prompt in prompts])  # [N, 3]
    digit = network(images).argmax(dim=1) == wanted[:, 0]
    stroke, slant = (
        (found == third) | (third == 1)  # the middle third has no word, so nothing was asked for
        for found, third in zip(attributes(images, wanted[:, 0]), wanted[:, 1:].T)
    )
    real, labels, _ = load()
    both = torch.stack([third != 1 for third in attributes(real, labels)]).all(dim=0)
    return {
        "joint": digit & stroke & slant,
        "digit": digit,
        "stroke": stroke,
        "slant": slant,
        "frechet": metrics.frechet_distance(network.features(images), network.features(real[both])),
        "out_of_range": (images.abs() > 1.1).float().mean().item(),
    }


def meaning(prompt):
    """A caption -> its number, stroke and slant, the arguments of `caption`."""
    for found in itertools.product(range(10), range(3), range(3)):
        if caption(*found) == prompt:
            return found
    raise InputError(f"the demo's judge was given the prompt {prompt!r}; expected a caption such as {caption(0, 0, 0)!r}")
