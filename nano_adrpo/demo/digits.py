"""Coloured digits, the flow demo's task: the data, the captions, and a judge that the reward does not see.

A scene is one or two real handwritten digits (8 × 8, from the UCI test set; attribution: DIGITS.md beside this file), each in
one of four colours, on a white canvas of 16 × 16. The two differ in digit and in colour, and stand side by side or one above
the other. Captions belong to three of the categories of the paper's Figure 2:

  colouring   "a red seven"
  binding     "a green seven and a red zero"          the places are free
  position    "a green seven left of a red zero", "a green seven above a red zero"

  clip/    a tiny CLIP, trained on true captions. It is the reward, and its text tower encodes the base model's prompts.
  base/    an SD3-shaped pixel-space model (MMDiT, CLIP text encoder). A third of the captions that it was last trained on name
           the colours the wrong way round, so it draws the right digits in the right places, but often in each other's colours
  judge/   a digit classifier that no reward sees, trained on other images than both of the above

CLIP and base see two thirds of the images, the judge the other third. digits_recipe.py trains all three and writes the prompts:
prompts.jsonl for training, and held_out.jsonl, whose prompts all name a digit in a colour (HELD_OUT) that no training prompt
names. Some of these (UNNAMED) the base model never saw named in a caption either.
"""

import functools
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from nano_adrpo import metrics
from nano_adrpo.demo import HERE
from nano_adrpo.errors import InputError
from nano_adrpo.files import safetensors

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = ["red", "green", "blue", "purple"]
RGB = torch.tensor([[0.88, 0.08, 0.08], [0.08, 0.62, 0.12], [0.10, 0.25, 0.92], [0.62, 0.12, 0.78]])
RELATIONS = ["", "left of", "above", "and"]  # "": one digit; "and": the places are free
ONE, LEFT, ABOVE, AND = range(4)
CATEGORIES = ["colouring", "position", "position", "binding"]  # by relation
HELD_OUT = {(number, number % 4) for number in range(10)}  # (digit, colour): one colour of each digit
UNNAMED = {(number, number) for number in range(4)}
NONE = -1  # in place of the second digit and its colour, where there is one digit


class Scene(NamedTuple):
    """What a caption says: a digit 0 … 9 in a colour 0 … 3, its relation to a second one, and that one's digit and colour."""

    digit: int
    colour: int
    relation: int = ONE
    digit2: int = NONE
    colour2: int = NONE

    @property
    def pairs(self):
        """The digits with their colours, a set."""
        return {(self.digit, self.colour), (self.digit2, self.colour2)} - {(NONE, NONE)}


def caption(scene, coloured=True):
    """The words of a Scene; coloured=False leaves the colours out."""
    things = [(scene.digit, scene.colour), (scene.digit2, scene.colour2)][: 1 if scene.relation == ONE else 2]
    nouns = [f"a {COLOURS[colour]} {NUMBERS[digit]}" if coloured else f"a {NUMBERS[digit]}" for digit, colour in things]
    return f" {RELATIONS[scene.relation]} ".join(nouns)


THING = rf"a ({'|'.join(COLOURS)}) ({'|'.join(NUMBERS)})"
CAPTION = re.compile(rf"{THING}(?: ({'|'.join(RELATIONS[1:])}) {THING})?")


def meaning(prompt):
    """The Scene that a caption describes."""
    match = CAPTION.fullmatch(prompt)
    if not match:
        raise InputError(
            f"the demo's judge was given the prompt {prompt!r}; expected a caption such as 'a red one above a blue two'"
        )
    colour, digit, relation, colour2, digit2 = match.groups()
    first = NUMBERS.index(digit), COLOURS.index(colour)
    if relation is None:
        return Scene(*first)
    return Scene(*first, RELATIONS.index(relation), NUMBERS.index(digit2), COLOURS.index(colour2))


def load():
    """Grey images [1797, 1, 8, 8] in [−1, 1], where 1 is ink; their labels [1797]; which of them are the judge's [1797] (every
    third)."""
    checkpoint = safetensors.Checkpoint(HERE / "digits.safetensors")
    images = checkpoint.read("images")[:, None].float() / 8 - 1
    return images, checkpoint.read("labels").long(), torch.arange(len(images)) % 3 == 2


def tints(images, prompts):
    """A reward, N images [N, 3, H, W] in [−1, 1] and their prompts -> [N]: minus the mean distance of the pixels' colours from
    the nearest tint between white and one of the four inks, of which clean drawings are made. It knows neither digits nor
    prompts, and the judge does not use it."""
    lack = (1 - (images + 1) / 2).movedim(1, -1)[..., None, :]  # [N, H, W, 1, 3], of each ink: 0 is white
    inks = 1 - RGB  # [4, 3]
    depth = ((lack * inks).sum(dim=-1) / inks.square().sum(dim=-1)).clamp(0, 1)  # [N, H, W, 4], of the nearest tint
    return -(lack - depth[..., None] * inks).norm(dim=-1).amin(dim=-1).mean(dim=(1, 2))


# ------------------------------------------------------------------------------------------------------------------- judge


class Judge(nn.Module):
    """A digit classifier: grey images [N, 1, 8, 8] -> logits [N, 10]."""

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
    """Judges N generated images [N, 3, 16, 16] by their prompts, captions of this file. -> by name:

    joint          [N] booleans: all of it is right
    digits         the digits that were asked for, wherever they stand
    colours        the colours that were asked for, whichever digit has them
    binding        each digit has its colour
    place          one or two digits as asked and, where the prompt says so, the first left of or above the second
    joint/unnamed  share of `joint` over the prompts with a digit in a colour that no caption of the base model's named
    frechet        squared Fréchet distance of the digits to real ones of the judge's, in the classifier's features
    out_of_range   share of pixels beyond [−1, 1] by more than 0.1

    Raises InputError for images of another shape and for a prompt that is no caption.
    """
    if images.shape[1:] != (3, 16, 16):
        raise InputError(f"the demo's judge was given images {list(images.shape[1:])}; expected its own, [3, 16, 16]")
    scenes = [meaning(prompt) for prompt in prompts]
    found, digits = read(images)
    wanted = torch.tensor(scenes)  # [N, 5], the fields of Scene
    relation = wanted[:, 2]
    in_order = (found[:, 2] == relation) & (found[:, 0] == wanted[:, 0])
    place = torch.where(relation == AND, found[:, 2] != ONE, torch.where(relation == ONE, found[:, 2] == ONE, in_order))
    binding = same(found[:, [0, 3]] * 10 + found[:, [1, 4]], wanted[:, [0, 3]] * 10 + wanted[:, [1, 4]])
    unnamed = torch.tensor([bool(scene.pairs & UNNAMED) for scene in scenes])
    real, _, judges = load()
    network = classifier()
    values = {
        "joint": binding & place,
        "digits": same(found[:, [0, 3]], wanted[:, [0, 3]]),
        "colours": same(found[:, [1, 4]], wanted[:, [1, 4]]),
        "binding": binding,
        "place": place,
        "frechet": metrics.frechet_distance(network.features(digits), network.features(real[judges])),
        "out_of_range": (images.abs() > 1.1).float().mean().item(),
    }
    if unnamed.any():
        values["joint/unnamed"] = values["joint"][unnamed].float().mean().item()
    return values


def same(found, wanted):
    """Whether rows [N, 2] hold the same two numbers, in any order: [N]."""
    return (found.sort(dim=1).values == wanted.sort(dim=1).values).all(dim=1)


def read(images):
    """What images [N, 3, 16, 16] show: the fields of Scene [N, 5], with the relation ONE, LEFT or ABOVE, and the digits that
    stand there as grey images [M, 1, 8, 8].

    The relation is told by where the ink lies: a single digit fills the middle of the canvas, a pair two sides of it.
    """
    ink = darkness(images)
    whole, middle = ink.sum(dim=(1, 2)).clamp(min=1e-6), slice(4, 12)
    beside = (ink[:, middle, :4].sum(dim=(1, 2)) + ink[:, middle, 12:].sum(dim=(1, 2))) / whole
    over = (ink[:, :4, middle].sum(dim=(1, 2)) + ink[:, 12:, middle].sum(dim=(1, 2))) / whole
    relation = torch.where(beside > over, LEFT, ABOVE)
    relation[torch.maximum(beside, over) < 0.2] = ONE
    found, digits = torch.full((len(images), 5), NONE), []
    found[:, 2] = relation
    for index, boxes in enumerate(BOXES):
        rows = (relation == index).nonzero()[:, 0]
        for (top, left), column in zip(boxes, (0, 3)):
            cut = images[rows, :, top : top + 8, left : left + 8]
            digits.append(darkness(cut)[:, None] * 2 - 1)
            found[rows, column] = classifier()(digits[-1]).argmax(dim=1)
            found[rows, column + 1] = colour_of(cut)
    return found, torch.cat(digits)


BOXES = [[(4, 4)], [(4, 0), (4, 8)], [(0, 4), (8, 4)]]  # by relation, the top left corners of the digits


def darkness(images):
    """The ink of each pixel, from 0 (white) to 1: [N, 3, H, W] in [−1, 1] -> [N, H, W]."""
    return ((1 - images.amin(dim=1)) / 2 / 0.9).clamp(0, 1)


def colour_of(images):
    """The colour 0 … 3 that is nearest to the mean hue of the ink of images [N, 3, H, W]: [N]."""
    mean = chroma(images).mean(dim=(2, 3))  # [N, 2]; white and grey are 0
    return F.cosine_similarity(mean[:, None], chroma(RGB[:, :, None, None] * 2 - 1)[:, :, 0, 0], dim=2).argmax(dim=1)


def chroma(images):
    """Where each pixel lies in the plane of hues, 0 for grey: [N, 3, H, W] in [−1, 1] -> [N, 2, H, W]."""
    red, green, blue = ((images.clamp(-1, 1) + 1) / 2).unbind(dim=1)
    return torch.stack([red - (green + blue) / 2, 3**0.5 / 2 * (green - blue)], dim=1)
