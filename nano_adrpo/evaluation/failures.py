"""Failure cases: the images that a reward likes least. A model that is trained on one reward can lose in the eyes of another
one, and the mean of a table does not show how."""

import json
import math

import torch

from nano_adrpo import files
from nano_adrpo.files.png import write_png


def write_worst(folder, images, prompts, reward, count, device, batch=None):
    """Writes of each term of the reward SCORE.png, the `count` images with the least of it in rows from the left, the worst
    first, and SCORE.jsonl, a line for each of them in the same order: score, prompt, the prompt's number and the sample's.

    images    of each prompt its images, [samples, C, H, W] in [−1, 1]
    prompts   as many texts
    reward    rewards.Rewards; batch: images at a time, None: all
    """
    places = [(row, sample) for row, some in enumerate(images) for sample in range(len(some))]
    images = torch.cat(list(images))
    with reward.on(device):
        scores = reward(images, [prompts[row] for row, _ in places], batch)
    folder.mkdir(parents=True, exist_ok=True)
    for name in reward.terms:
        numbers = scores.get(name, scores["reward"])  # the only term has no number of its own
        worst = numbers.argsort(stable=True)[:count].tolist()
        write_png(folder / f"{name}.png", tiled(images[worst]))
        lines = [
            {"score": numbers[i].item(), "prompt": prompts[places[i][0]], "row": places[i][0], "sample": places[i][1]}
            for i in worst
        ]
        files.write_bytes(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def tiled(images):
    """[N, C, H, W] -> one image of about as many columns as rows, [C, rows·H, columns·W], white where there is none."""
    columns = math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    cells = images.new_ones(rows * columns, *images.shape[1:])
    cells[: len(images)] = images
    return cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
