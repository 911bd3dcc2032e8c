"""Rewards of images, by name. Each takes images [N, C, H, W] in [−1, 1], of any size, and N prompts, and gives [N], float32;
higher is better.

| name | what it is | FOLDER |
| --- | --- | --- |
| clip_score | 100 · cosine of CLIP's embeddings of image and prompt (Hessel et al. 2021, 2104.08718) | clip-vit-large-patch14 |
| pick_score | CLIP's temperature · cosine, trained on people's choices (Kirstain et al. 2023, 2305.01569) | PickScore_v1 |
| aesthetic | LAION's improved predictor: an MLP on CLIP's image embedding, whatever the prompt | clip-vit-large-patch14 |
| blip_score | cosine of BLIP's embeddings of image and prompt (Li et al. 2022, 2201.12086) | blip-itm-base-coco |
| blip_itm | the probability, by BLIP's cross-attention, that the prompt describes the image | blip-itm-base-coco |
| image_reward | a score of people's preferences on BLIP (Xu et al. 2023, 2304.05977) | ImageReward |

A folder is the public release: transformers' layout with the files of tokenizer and processor. For aesthetic it
also holds aesthetic.safetensors; for image_reward it holds ImageReward.safetensors, med_config.json and bert-base-uncased's
vocab.txt or tokenizer.json. Two of the releases are pickles and are converted once:

    python -m nano_adrpo.files.convert sac+logos+ava1-l14-linearMSE.pth clip-vit-large-patch14/aesthetic.safetensors
    python -m nano_adrpo.files.convert ImageReward.pt ImageReward/ImageReward.safetensors

`--reward clip_score:FOLDER pick_score:FOLDER@0.5` adds up two of them. A reward of your own is a function in a file, for
example in mine.py

    def bright(images, prompts):
        '''The mean of all pixels: 0 for black, 1 for white.'''
        return (images.mean(dim=(1, 2, 3)) + 1) / 2

which `--reward mine.py:bright` calls.
"""

import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nano_adrpo import files
from nano_adrpo.errors import InputError, MissingFile
from nano_adrpo.files import config, safetensors
from nano_adrpo.models import blip
from nano_adrpo.models.clip import CLIP
from nano_adrpo.models.tokenizers import BertTokenizer, PromptTokenizer
from nano_adrpo.rewards import Rewards, named

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
        file = Path(path) / "aesthetic.safetensors"
        if not file.is_file():
            raise MissingFile(f"{file}: no such file; it is the converted predictor (see nano_adrpo/rewards/images.py)")
        self.head = safetensors.load(self.build_head, safetensors.Checkpoint(file), torch.float32, device).requires_grad_(False)

    def build_head(self):
        width = self.model.config.projection_dim
        layers = [nn.Linear(width, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity(), nn.Linear(128, 64)]
        layers += [nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1)]  # the release has dropout where Identity stands
        return nn.ModuleDict({"layers": nn.Sequential(*layers)})

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
        self.tokenizer, self.itm = BertTokenizer(path), itm
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
        self.tokenizer = BertTokenizer(path)
        self.to(device)

    @torch.no_grad()
    def forward(self, images, prompts):
        return self.model(self.pixels(images), *(x.to(self.device) for x in self.tokenizer(prompts)))


def normalisation(path, channels, side, crop):
    """-> mean and deviation per channel from preprocessor_config.json or, as transformers 5 writes it, from a section of
    processor_config.json. Raises InputError where it asks for other pixels than those of ImageModel: bicubic, of `side`,
    normalised."""
    where, newer = Path(path) / "preprocessor_config.json", Path(path) / "processor_config.json"
    if not where.is_file() and newer.is_file():
        where, values = newer, config.section(files.read_json(newer), "image_processor", newer)
    else:
        values = files.read_json(where)
    if not {"image_mean", "image_std"} <= values.keys():
        raise InputError(f"{where}: keys 'image_mean' and 'image_std' are missing; expected a number per channel each")
    for key, least, kind in (("image_mean", -math.inf, "numbers"), ("image_std", 0, "positive numbers")):
        given = values[key] if isinstance(values[key], list) else []
        if len(given) != channels or not all(config.fits(x, config.Number) and x > least for x in given):
            raise InputError(f"{where}: key '{key}' is {values[key]!r}; expected {channels} {kind}, one a channel")
    steps = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": crop, "resample": 3}  # 3: bicubic
    config.only(values, {key: (value, None) for key, value in steps.items()}, where)
    for key in ("size", "crop_size") if crop else ("size",):
        size = values.get(key) or side
        if any(not config.among(each, [side]) for each in (size.values() if isinstance(size, dict) else [size])):
            raise InputError(f"{where}: key '{key}' is {size!r}; expected {side}, the model's image_size")
    return [[float(x) for x in values[key]] for key in ("image_mean", "image_std")]


def preprocess(images, size, mean, std, crop=True):
    """Images [N, C, H, W] in [−1, 1] of any size -> a vision model's pixels [N, len(mean), size, size], float32.

    Bicubic with antialiasing; with `crop` the shorter side becomes `size` and the centre stays (CLIP), without it the image
    is squeezed to size × size (BLIP). Then (x − mean) / std per channel, x in [0, 1]. Grey images get as many channels as
    `mean` has. Agrees with transformers' processors on Pillow, rounding included. Raises InputError for another shape and for
    integers, which would be 0 … 255.
    """
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=images.device).reshape(-1, 1, 1) for v in (mean, std))
    if images.ndim != 4 or images.shape[1] not in (1, len(mean)) or 0 in images.shape[2:]:
        raise InputError(f"images have shape {list(images.shape)}; expected [N, 1 or {len(mean)}, height, width]")
    if not images.is_floating_point():
        raise InputError(f"images are {images.dtype}; expected floats in [−1, 1]")
    images, (h, w) = images.float().clamp(-1, 1), images.shape[-2:]
    height, width = (int(size * side / min(h, w)) if crop else size for side in (h, w))  # rounded down, as there
    # Pillow's way, which the models were trained and are judged with: along the rows, then along the columns (or, since Pillow
    # 13, columns first where they shrink by more than twice as much), and after either in 8 bits, which cuts off overshoots.
    columns_first = h > height and h - height > 2 * (w - width) and w > 1  # a lone column torch resizes wrongly
    for shape in ((height, w) if columns_first else (h, width), (height, width)):
        if images.shape[-2:] != shape:
            images = F.interpolate(images, shape, mode="bicubic", antialias=True)
            images = ((images.clamp(-1, 1) + 1) * 127.5 + 0.5).floor() / 127.5 - 1
    top, left = (height - size) // 2, (width - size) // 2
    images = images[..., top : top + size, left : left + size]
    return ((images + 1) / 2 - mean) / std


NAMES = {
    "clip_score": ClipScore,
    "pick_score": PickScore,
    "aesthetic": Aesthetic,
    "blip_score": BlipScore,
    "blip_itm": functools.partial(BlipScore, itm=True),
    "image_reward": ImageReward,
}


def parse(specs, dtype=torch.float32):
    """The rewards of images that a command line names. Raises InputError naming the one that is wrong."""
    return Rewards(named(specs, {name: functools.partial(kind, dtype=dtype) for name, kind in NAMES.items()}))
