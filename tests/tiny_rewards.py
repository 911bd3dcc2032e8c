"""A tiny folder for every reward of images, in its public layout: random weights, a few words, images of 12 or 15 pixels."""

import math
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file

from nano_adrpo.models import blip, clip

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SIDES = dict.fromkeys(("clip_score", "pick_score", "aesthetic"), 12) | dict.fromkeys(
    ("blip_score", "blip_itm", "image_reward"), 15
)
HEAD = {0: (24, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}  # dropout, without weights, stands between


def folder(name, path):
    """Writes the folder of the reward `name`. -> path"""
    Path(path).mkdir(parents=True, exist_ok=True)
    (clip_folder if SIDES[name] == 12 else blip_folder)(Path(path), name)
    return path


def clip_folder(path, name):
    text = clip.TextConfig(**tiny.CLIP_TEXT | dict(vocab_size=525, eos_token_id=2))
    vision = clip.VisionConfig(**tiny.CLIP_VISION)
    model = tiny.fill(clip.CLIP(clip.Config(text, vision, projection_dim=24)))
    model.logit_scale.data.fill_(math.log(50))
    model.save_pretrained(path)
    tiny.clip_tokenizer(path, "<|endoftext|>")
    sizes = dict(do_resize=True, size={"shortest_edge": 12}, do_center_crop=True, crop_size={"height": 12, "width": 12})
    preprocessor(path, "CLIPImageProcessor", sizes)
    if name == "aesthetic":
        generator, tensors = torch.Generator().manual_seed(1), {}
        for layer, (dim_in, dim) in HEAD.items():
            tensors[f"layers.{layer}.weight"] = torch.randn(dim, dim_in, generator=generator) / dim_in**0.5
            tensors[f"layers.{layer}.bias"] = torch.randn(dim, generator=generator)
        save_file(tensors, path / "aesthetic.safetensors")


def blip_folder(path, name):
    text = blip.TextConfig(**tiny.BLIP_TEXT)
    if name == "image_reward":
        model = tiny.blip_fill(blip.ImageReward(blip.Config(text, blip.VisionConfig(**tiny.IMAGE_REWARD_VISION))), 1)
    else:
        model = tiny.blip_fill(blip.BLIP(blip.Config(text, blip.VisionConfig(**tiny.BLIP_VISION), 10)))
        preprocessor(path, "BlipImageProcessor", dict(do_resize=True, size={"height": 15, "width": 15}))
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(tiny.WORD_PIECES) + "\n", encoding="utf-8")


def preprocessor(path, kind, sizes):
    values = dict(image_processor_type=kind, do_normalize=True, image_mean=MEAN, image_std=STD, resample=3, do_rescale=True)
    tiny.write_json(path / "preprocessor_config.json", values | dict(rescale_factor=1 / 255) | sizes)
