"""Rewards of images, by name. Each is called with images [N, C, H, W] in [−1, 1], of any size, and N prompts, and gives [N],
float32; higher is better.

| name | what it is | FOLDER |
| --- | --- | --- |
| clip_score | 100 · cosine of CLIP's embeddings of image and prompt (Hessel et al. 2021, 2104.08718) | clip-vit-large-patch14 |
| pick_score | CLIP's temperature · cosine, trained on people's choices (Kirstain et al. 2023, 2305.01569) | PickScore_v1 |
| aesthetic | LAION's improved predictor: an MLP on CLIP's image embedding, whatever the prompt | clip-vit-large-patch14 |
| blip_score | cosine of BLIP's embeddings of image and prompt (Li et al. 2022, 2201.12086) | blip-itm-base-coco |
| blip_itm | the probability, by BLIP's cross-attention, that the prompt describes the image | blip-itm-base-coco |
| image_reward | a score of people's preferences on BLIP (Xu et al. 2023, 2304.05977) | ImageReward |

A folder is what the public release is: transformers' layout with the tokenizer's files and preprocessor_config.json; for
aesthetic with aesthetic.safetensors in it, and for image_reward ImageReward.safetensors, med_config.json and bert-base-uncased's
vocab.txt or tokenizer.json. The two that are released as pickles are converted once:

    python -m nano_adrpo.weights convert sac+logos+ava1-l14-linearMSE.pth clip-vit-large-patch14/aesthetic.safetensors
    python -m nano_adrpo.weights convert ImageReward.pt ImageReward/ImageReward.safetensors

On the command line a reward is NAME:FOLDER, several are added up, and @ gives a weight: `--reward clip_score:FOLDER
pick_score:FOLDER@0.5`. A reward of your own is a function in a file, FILE.py:FUNCTION, for example in mine.py

    def bright(images, prompts):
        '''The mean of all pixels: 0 for black, 1 for white.'''
        return (images.mean(dim=(1, 2, 3)) + 1) / 2

which `--reward mine.py:bright` calls.
"""

import contextlib
import functools
import math
import runpy
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nano_adrpo import weights
from nano_adrpo.images import preprocess
from nano_adrpo.models import blip
from nano_adrpo.models.clip import CLIP
from nano_adrpo.prompts import PromptTokenizer

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # OpenAI's, of its own images


class ImageModel(nn.Module):
    """A frozen model that looks at pixels of one size and normalisation."""

    def __init__(self, model, size, mean, std, crop):
        super().__init__()
        self.model, self.size, self.crop = model.requires_grad_(False), size, crop
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @property
    def device(self):
        return self.mean.device

    def pixels(self, images):
        """[N, C, H, W] in [−1, 1] -> what the model expects, in its dtype and on its device."""
        pixels = preprocess(images.to(self.device), self.size, self.mean, self.std, self.crop)
        return pixels.to(next(self.model.parameters()).dtype)


class ClipScore(ImageModel):
    """100 · cosine of CLIP's image and text embeddings (the paper's ClipScore). A transformers CLIPModel folder with its
    tokenizer and preprocessor_config.json."""

    def __init__(self, path, dtype=torch.float32, device=None):
        model = CLIP.from_pretrained(path, dtype, device)
        vision = model.config.vision_config
        super().__init__(
            model, vision.image_size, *normalisation(path, vision.num_channels, vision.image_size, crop=True), crop=True
        )
        self.tokenizer = PromptTokenizer(path)
        self.to(device)

    @torch.no_grad()
    def forward(self, images, prompts):
        return 100 * self.cosine(images, prompts)

    def cosine(self, images, prompts):
        text = F.normalize(self.embed_prompts(prompts), dim=1)
        return (F.normalize(self.embed_images(images), dim=1) * text).sum(dim=1)

    @torch.no_grad()
    def embed_images(self, images):
        """[N, C, H, W] -> [N, P], projected, not normalised, float32."""
        return self.model.encode_image(self.pixels(images)).float()

    @torch.no_grad()
    def embed_prompts(self, prompts):
        """N strings -> [N, P], projected, not normalised, float32; each distinct prompt is encoded once."""
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        ids = self.tokenizer(distinct, self.model.config.text_config.max_position_embeddings)
        return self.model.encode_text(ids.to(self.device)).float()[[distinct[prompt] for prompt in prompts]]


class PickScore(ClipScore):
    """exp(logit_scale) · cosine: CLIP's own logit, which in PickScore_v1 is about 20 (the paper reports 19 to 23)."""

    @torch.no_grad()
    def forward(self, images, prompts):
        return self.model.logit_scale.float().exp() * self.cosine(images, prompts)


class Aesthetic(ClipScore):
    """LAION's improved aesthetic predictor, about 1 … 10: a linear map in five layers (no activations in between) of the
    normalised image embedding. A CLIP ViT-L/14 folder with aesthetic.safetensors, the converted predictor, in it."""

    def __init__(self, path, dtype=torch.float32, device=None):
        super().__init__(path, dtype, device)
        width = self.model.config.projection_dim
        with torch.device("meta"):  # the release has dropout at 1, 3 and 5
            layers = [nn.Linear(width, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity(), nn.Linear(128, 64)]
            head = nn.ModuleDict({"layers": nn.Sequential(*layers, nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1))})
        file = Path(path) / "aesthetic.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; it is the converted predictor (see nano_adrpo/rewards.py)")
        self.head = weights.load(head, weights.Checkpoint(file), torch.float32, device).requires_grad_(False)

    @torch.no_grad()
    def forward(self, images, prompts):
        return self.head["layers"](F.normalize(self.embed_images(images), dim=1))[:, 0]


class BlipScore(ImageModel):
    """Cosine of BLIP's image and text embeddings, or (itm=True) the probability that image and text match. A transformers
    BlipForImageTextRetrieval folder with its tokenizer and preprocessor_config.json."""

    def __init__(self, path, dtype=torch.float32, device=None, itm=False):
        model = blip.BLIP.from_pretrained(path, dtype, device)
        side = model.config.vision_config.image_size
        super().__init__(model, side, *normalisation(path, 3, side, crop=False), crop=False)
        self.tokenizer, self.itm = blip.BertTokenizer(path), itm
        self.to(device)

    @torch.no_grad()
    def forward(self, images, prompts):
        text, pixels = [x.to(self.device) for x in self.tokenizer(prompts)], self.pixels(images)
        if self.itm:
            return self.model.match(pixels, *text)
        image, text = self.model.encode_image(pixels).float(), self.model.encode_text(*text).float()
        return F.cosine_similarity(image, text)


class ImageReward(ImageModel):
    """ImageReward v1.0, in deviations from the mean of its training set. A folder as the module's docstring has it."""

    def __init__(self, path, dtype=torch.float32, device=None):
        model = blip.ImageReward.from_pretrained(path, dtype, device)
        super().__init__(model, model.config.vision_config.image_size, CLIP_MEAN, CLIP_STD, crop=True)
        self.tokenizer = blip.BertTokenizer(path)
        self.to(device)

    @torch.no_grad()
    def forward(self, images, prompts):
        return self.model(self.pixels(images), *(x.to(self.device) for x in self.tokenizer(prompts)))


def normalisation(path, channels, side, crop):
    """-> mean and deviation per channel from preprocessor_config.json. ValueError where it asks for other pixels than those of
    ImageModel: bicubic, of `side`, normalised."""
    where = Path(path) / "preprocessor_config.json"
    values = weights.read_json(where)
    if not {"image_mean", "image_std"} <= values.keys():
        raise ValueError(f"{where}: keys 'image_mean' and 'image_std' are missing; expected a number per channel each")
    for key, least in (("image_mean", -math.inf), ("image_std", 0)):
        given = values[key] if isinstance(values[key], list) else []
        if len(given) != channels or not all(isinstance(x, int | float) and math.isfinite(x) and x > least for x in given):
            expected = f"{channels} {'positive ' if least == 0 else ''}numbers, one a channel"
            raise ValueError(f"{where}: key '{key}' is {values[key]!r}; expected {expected}")
    asked = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": crop, "resample": 3}  # 3: bicubic
    for key, value in asked.items():
        if values.get(key, value) not in (value, None):
            raise ValueError(f"{where}: key '{key}' is {values[key]!r}; expected {value}")
    for key in ("size", "crop_size") if crop else ("size",):
        size = values.get(key) or side
        if set(size.values() if isinstance(size, dict) else [size]) != {side}:
            raise ValueError(f"{where}: key '{key}' is {size!r}; expected {side}, the model's image_size")
    return values["image_mean"], values["image_std"]


NAMES = {
    "clip_score": ClipScore,
    "pick_score": PickScore,
    "aesthetic": Aesthetic,
    "blip_score": BlipScore,
    "blip_itm": functools.partial(BlipScore, itm=True),
    "image_reward": ImageReward,
}


class Rewards(nn.Module):
    """A weighted sum of rewards."""

    def __init__(self, parts):
        """parts: {name: (reward, its weight)}"""
        super().__init__()
        self.rewards = {name: reward for name, (reward, _) in parts.items()}
        self.weights = {name: weight for name, (_, weight) in parts.items()}
        self.models = nn.ModuleList(reward for reward in self.rewards.values() if isinstance(reward, nn.Module))

    def forward(self, samples, prompts):
        """samples (images [N, C, H, W], or texts) and N prompts -> {"reward": the sum [N], and each part under its name where
        they are several}, float32, on the CPU.

        Raises ValueError for a reward that is not N numbers, FloatingPointError for a number that is not finite."""
        if len(samples) != len(prompts):
            raise ValueError(f"{len(samples)} samples and {len(prompts)} prompts; expected a prompt for each sample")
        scores = {}
        for name, reward in self.rewards.items():
            given = reward(samples, prompts)
            try:
                given = np.ascontiguousarray(given) if isinstance(given, np.ndarray) else given  # torch takes no [::-1]
                values = torch.as_tensor(given, dtype=torch.float32).detach().cpu()
            except (TypeError, ValueError, OverflowError, RuntimeError):
                kind = type(given).__name__
                raise ValueError(f"{name} gave {kind}; expected [{len(prompts)}] numbers, one a sample") from None
            if values.shape != (len(prompts),):
                raise ValueError(f"{name} gave rewards of shape {list(values.shape)}; expected [{len(prompts)}], one a sample")
            if not values.isfinite().all():
                prompt = str(prompts[int((~values.isfinite()).nonzero()[0])])
                raise FloatingPointError(f"a reward of the prompt {prompt!r} is not finite ({name})")
            scores[name] = values
        total = sum(self.weights[name] * values for name, values in scores.items())
        return {"reward": total, **(scores if len(scores) > 1 else {})}

    def embed_images(self, images):
        """CLIP's image embeddings [N, P] for the diversity, or None where no reward is CLIP's."""
        clip = next((model for model in self.models if isinstance(model, ClipScore)), None)
        return clip and clip.embed_images(images).cpu()

    @contextlib.contextmanager
    def on(self, device):
        """Inside, the models are on `device`, and afterwards on the CPU again: a GPU holds them only while they score."""
        try:
            yield self.to(device)
        finally:
            self.to("cpu")


def parse(specs, dtype=torch.float32):
    """The rewards of images that a command line names, see above. Raises ValueError naming the one that is wrong."""
    return Rewards(named(specs, {name: functools.partial(kind, dtype=dtype) for name, kind in NAMES.items()}))


def named(specs, models, plain=None, own=lambda reward: reward):
    """What `--reward` lists -> {name: (reward, weight)}. Each is NAME:FOLDER, FILE.py:FUNCTION, FOLDER alone for the first of
    the models, or the NAME of a plain one, with @WEIGHT behind it or not.

    models   {NAME: function of the folder that gives the reward}
    plain    {NAME: the reward}
    own      makes a reward of a user's function
    """
    parts, plain = {}, plain or {}
    for spec in specs:
        what, weight = weighted(spec)
        name, _, where = what.partition(":")
        if name in models and where:
            reward = models[name](where)
        elif what in plain:
            reward = plain[what]
        elif what.rpartition(":")[0].endswith(".py"):
            file, _, name = what.rpartition(":")
            reward = own(function(file, name))
        elif Path(what).is_dir():
            name = next(iter(models))
            reward = models[name](what)
        else:
            expected = [*plain, *(f"{name}:FOLDER" for name in models), "FILE.py:FUNCTION", f"a {next(iter(models))} folder"]
            raise ValueError(f"reward {spec!r}: no such reward or folder; expected one of {', '.join(expected)}")
        if name in parts or name == "reward" and len(specs) > 1:
            raise ValueError(f"reward {spec!r}: {name} is {'named twice' if name in parts else 'what the sum is called'}")
        parts[name] = reward, weight
    return parts


def weighted(spec):
    """WHAT@0.5 -> WHAT and 0.5; without a number behind the last @, all of it and 1."""
    what, at, behind = spec.rpartition("@")
    try:
        weight = float(behind if at else "")
    except ValueError:
        return spec, 1.0
    if not math.isfinite(weight):
        raise ValueError(f"reward {spec!r}: the weight is {weight}; expected a finite number")
    return what, weight


def function(file, name):
    """The function `name` of a Python file of the user's. Whatever it raises becomes a ValueError of one line."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file; expected one with the reward function {name!r}")

    @contextlib.contextmanager
    def reported(what):
        try:
            yield
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{file}, {f'line {lines[-1]}' if lines else what}: {message}") from error

    with reported("as a whole"):
        found = runpy.run_path(file).get(name)
    if not callable(found):
        raise ValueError(f"{file}: no function {name!r} in it")
    return lambda *args: reported(name)(found)(*args)
