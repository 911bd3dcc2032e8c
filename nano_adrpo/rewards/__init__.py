"""Rewards by name, weighted sums of them, and a user's own.

A reward is a function of N samples (images, see images.py, or texts, see text.py) and their N prompts -> N numbers; higher is
better. One that is a model is an nn.Module, so that it can be moved to another device. A user's own gets copies.

On the command line a reward is NAME:FOLDER or FILE.py:FUNCTION, several are added up, and @ gives a weight: `--reward
clip_score:FOLDER mine.py:bright@0.5`.
"""

import contextlib
import copy
import functools
import math
import runpy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nano_adrpo.errors import InputError, MissingFile, NotFinite


class Rewards:
    """A weighted sum of rewards, its terms."""

    def __init__(self, terms):
        """terms: {name: (reward, its weight)}"""
        self.terms = terms

    def __call__(self, samples, prompts, batch=None):
        """N samples (images [N, C, H, W], or a list of texts) and N prompts -> {"reward": the weighted sum [N]} and, if there
        are several terms, each, unweighted, under its name; float32, on the CPU. `batch` samples at a time; None is all.

        Raises InputError for a reward that does not give N numbers, NotFinite for a number that is not finite. An exception
        inside a reward passes through."""
        if len(samples) != len(prompts):
            raise InputError(f"{len(samples)} samples and {len(prompts)} prompts; expected a prompt for each sample")
        scores = {name: [] for name in self.terms}
        for start in range(0, len(prompts), batch or len(prompts)):
            rows = slice(start, start + (batch or len(prompts)))
            for name, (reward, _) in self.terms.items():
                scores[name].append(checked(reward(samples[rows], prompts[rows]), prompts[rows], name))
        scores = {name: torch.cat(batches) for name, batches in scores.items()}
        reward = sum(weight * scores[name] for name, (_, weight) in self.terms.items())
        return {"reward": reward, **(scores if len(scores) > 1 else {})}

    def unweighted(self, scores):
        """Of what a call returned, the terms of weight 0, which only measure: a list of [N]."""
        return [scores[name] for name, (_, weight) in self.terms.items() if weight == 0]

    @property
    def embeds(self):
        """Whether `embed_images` gives some."""
        return any(hasattr(reward, "embed_images") for reward, _ in self.terms.values())

    def embed_images(self, images, batch=None):
        """The image embeddings [N, P] of the first reward that has `embed_images` (CLIP's), on the CPU; else None."""
        for reward, _ in self.terms.values():
            if hasattr(reward, "embed_images"):
                return torch.cat([reward.embed_images(some).cpu() for some in images.split(batch or len(images))])
        return None

    @contextlib.contextmanager
    def on(self, device):
        """Inside, the models are on `device`; afterwards they are on the CPU again, and the GPU's memory is free."""
        models = [reward for reward, _ in self.terms.values() if isinstance(reward, nn.Module)]
        try:
            for model in models:
                model.to(device)
            yield self
        finally:
            for model in models:
                model.to("cpu")


def checked(given, prompts, name):
    """What the reward `name` gave for N prompts -> [N], float32, on the CPU."""
    try:
        given = np.ascontiguousarray(given) if isinstance(given, np.ndarray) else given  # torch takes no [::-1]
        values = torch.as_tensor(given)
        real = not values.is_complex()
        values = values.detach().to("cpu", torch.float32) if real else values
    except (TypeError, ValueError, OverflowError, RuntimeError):
        kind = type(given).__name__
        raise InputError(f"{name} gave {kind}; expected [{len(prompts)}] numbers, one a sample") from None
    if not real:
        raise InputError(f"{name} gave complex numbers; expected [{len(prompts)}] real ones, one a sample")
    if values.shape != (len(prompts),):
        raise InputError(f"{name} gave rewards of shape {list(values.shape)}; expected [{len(prompts)}], one a sample")
    if not values.isfinite().all():
        prompt = str(prompts[int((~values.isfinite()).nonzero()[0])])
        raise NotFinite(f"a reward of the prompt {prompt[:60]!r} is not finite ({name})")
    return values


def named(specs, models, plain=None, own=lambda reward: reward):
    """What `--reward` lists -> {name: (reward, weight)}. Each is NAME:FOLDER, FILE.py:FUNCTION, FOLDER alone for the first of
    the models, or the NAME of a plain one; @WEIGHT may follow.

    models   {NAME: function of the folder that gives the reward}
    plain    {NAME: function without arguments that gives the reward}
    own      makes a reward of a user's function
    """
    terms, plain = {}, plain or {}
    for spec in specs:
        what, weight = weighted(spec)
        name, _, where = what.partition(":")
        if name in models and where:
            reward = models[name](where)
        elif what in plain:
            reward = plain[what]()
        elif what.rpartition(":")[0].endswith(".py"):
            name, reward = what.rpartition(":")[2], own(function(what))
        elif Path(what).is_dir():
            name = next(iter(models))
            reward = models[name](what)
        else:
            expected = [*plain, *(f"{name}:FOLDER" for name in models), "FILE.py:FUNCTION", f"a {next(iter(models))} folder"]
            raise InputError(f"reward {spec!r}: no such reward or folder; expected one of {', '.join(expected)}")
        if name in terms:
            raise InputError(f"reward {spec!r}: {name} is named twice")
        if name == "reward" and len(specs) > 1:
            raise InputError(f"reward {spec!r}: {name} is what the sum is called")
        terms[name] = reward, weight
    if not any(weight for _, weight in terms.values()):
        raise InputError(f"rewards {', '.join(specs)}: every weight is 0; expected another one, or the rewards are all alike")
    return terms


def weighted(spec):
    """WHAT@0.5 -> WHAT and 0.5; if no number follows the last @, all of it and 1."""
    what, at, behind = spec.rpartition("@")
    try:
        weight = float(behind if at else "")
    except ValueError:
        return spec, 1.0
    if not math.isfinite(weight):
        raise InputError(f"reward {spec!r}: the weight is {weight}; expected a finite number")
    return what, weight


def function(spec):
    """FILE.py:FUNCTION -> the function. It is called with copies, so that it cannot change what is trained on. Runs the file.
    An exception in it, or later in the function, passes through, see `its_own`."""
    file, _, name = spec.rpartition(":")
    if not file:
        raise InputError(f"{spec!r}: expected FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise MissingFile(f"{file}: no such file; expected one with the function {name!r}")
    open(file, "rb").close()  # one that cannot be read is no fault in it
    with its_own(file):
        found = runpy.run_path(file).get(name)
    if not callable(found):
        raise InputError(f"{file}: no function {name!r} in it")

    @functools.wraps(found)
    def call(*given, **by_name):
        with its_own(spec):
            return found(*copy.deepcopy(given), **copy.deepcopy(by_name))

    return call


@contextlib.contextmanager
def its_own(what):
    """What fails inside is the fault of a user's code and keeps its traceback: sys.exit(), which would end training as if all
    were well, and an OSError, which would look like one of ours, become a RuntimeError."""
    try:
        yield
    except SystemExit as end:
        raise RuntimeError(f"{what} called sys.exit({end.code!r})") from end
    except InputError:
        raise
    except OSError as error:
        raise RuntimeError(f"{what}: {error}") from error
