"""Rewards of images against transformers' models, processors (on Pillow) and tokenizers, from strings and pictures to scores,
on folders that transformers writes (extra `parity`)."""

import math
import shutil

import numpy as np
import pytest
import tiny
import tiny_rewards
import torch
from PIL import Image
from safetensors.torch import save_file
from test_parity_blip import WIDTHS, image_reward_file, image_reward_parts
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from nano_adrpo.rewards import images as rewards

PROMPTS = ["the one and the ring", "A cat in Paris, two dogs!", "", "the one and the ring"]
SIZES = [(64, 64), (97, 131), (200, 77), (64, 333)]
SIDE = 64


def pictures(height, width):
    """Four smooth pictures with some noise, uint8 [H, W, 3], as Pillow's and as [4, 3, H, W] in [−1, 1]."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:height, :width]
    pixels = []
    for _ in range(4):
        waves = [127.5 + 120 * np.sin(x * rng.uniform(0.02, 0.3) + y * rng.uniform(0.02, 0.3)) for _ in range(3)]
        pixels.append((np.stack(waves, axis=-1) + rng.normal(0, 8, (height, width, 3))).clip(0, 255).astype(np.uint8))
    images = torch.stack([torch.from_numpy(one).permute(2, 0, 1) / 127.5 - 1 for one in pixels])
    return [Image.fromarray(one) for one in pixels], images


def agree(ours, theirs, resized):
    """Within 0.2 % of the scores' size, pair by pair: a level of 8 bits is now and then rounded otherwise than by Pillow. Where
    nothing is resized, nothing is rounded."""
    assert ours.shape == theirs.shape == (4,) and theirs.std() > 1e-3
    assert (ours - theirs).abs().max() < (0.002 if resized else 1e-5) * theirs.abs().mean()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """-> folder with everything of CLIP, transformers' model, processor and tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    text = tiny.CLIP_TEXT | dict(vocab_size=525, eos_token_id=2, max_position_embeddings=40)
    vision = tiny.CLIP_VISION | dict(image_size=SIDE, patch_size=16)
    model = tiny.fill(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)))
    model.logit_scale.data.fill_(math.log(95))
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(folder)
    tiny.clip_tokenizer(folder, "<|endoftext|>")
    generator, head = torch.Generator().manual_seed(1), torch.nn.Sequential()
    for layer, (dim_in, dim) in tiny_rewards.HEAD.items():
        linear = torch.nn.Linear(dim_in, dim)
        linear.weight.data = torch.randn(dim, dim_in, generator=generator) / math.sqrt(dim_in)
        head.add_module(str(layer), linear)
    save_file({f"layers.{name}": tensor for name, tensor in head.state_dict().items()}, folder / "aesthetic.safetensors")
    return folder, model, processor, CLIPTokenizer.from_pretrained(folder), head


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("files", ["vocab.json and merges.txt", "tokenizer.json"])
@torch.no_grad()
def test_clip_scores_agree(clip, tmp_path, size, files):
    source, model, processor, tokenizer, head = clip
    folder = shutil.copytree(source, tmp_path / "clip")
    if files == "tokenizer.json":  # as the L/14 folder has it, beside the other two
        tokenizer.save_pretrained(folder)
        assert (folder / "tokenizer.json").is_file()
    (pillow, images), resized = pictures(*size), min(size) != SIDE  # else at most cropped
    text = tokenizer(PROMPTS, padding=True, truncation=True, max_length=40, return_tensors="pt")
    pixels = processor(pillow, return_tensors="pt").pixel_values
    output = model(**text, pixel_values=pixels)
    agree(rewards.ClipScore(folder)(images, PROMPTS), 100 * (output.text_embeds * output.image_embeds).sum(dim=1), resized)
    # PickScore as its model card has it: both embeddings normalised, the logits of one prompt and its images.
    image, words = (
        model.get_image_features(pixel_values=pixels).pooler_output,
        model.get_text_features(**text).pooler_output,
    )
    image, words = (x / torch.norm(x, dim=-1, keepdim=True) for x in (image, words))
    expected = torch.stack([(model.logit_scale.exp() * (words[i : i + 1] @ image.T)[0])[i] for i in range(4)])
    agree(rewards.PickScore(folder)(images, PROMPTS), expected, resized)
    assert torch.allclose(expected, output.logits_per_image.diag(), atol=1e-4)
    agree(rewards.Aesthetic(folder)(images, PROMPTS), head(image)[:, 0], resized)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("files", ["vocab.txt", "tokenizer.json"])
@torch.no_grad()
def test_blip_scores_agree(tmp_path, size, files):
    text, vision = tiny.BLIP_TEXT | dict(max_position_embeddings=40), tiny.BLIP_VISION | dict(image_size=SIDE, patch_size=16)
    model = BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=10))
    tiny.blip_fill(model).save_pretrained(tmp_path)
    processor = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(tmp_path)
    tokenizer = bert(tmp_path, files)
    (pillow, images), resized = pictures(*size), size != (SIDE, SIDE)
    inputs = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    given = inputs.input_ids, processor(pillow, return_tensors="pt").pixel_values
    cosines = model(*given, use_itm_head=False, attention_mask=inputs.attention_mask).itm_score
    agree(rewards.BlipScore(tmp_path)(images, PROMPTS), cosines.diag(), resized)
    logits = model(*given, attention_mask=inputs.attention_mask).itm_score
    agree(rewards.BlipScore(tmp_path, itm=True)(images, PROMPTS), logits.softmax(dim=1)[:, 1], resized)


def bert(folder, files):
    """A BertTokenizer whose files, of either kind, are in the folder."""
    (folder / "vocab.txt").write_text("\n".join(tiny.WORD_PIECES) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(folder)
    if files == "tokenizer.json":
        tokenizer.save_pretrained(folder)
        assert (folder / "tokenizer.json").is_file()
        (folder / "vocab.txt").unlink()
    return tokenizer


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_image_reward_agrees(tmp_path, size):
    sizes = tiny.BLIP_TEXT | dict(max_position_embeddings=40), tiny.IMAGE_REWARD_VISION | dict(image_size=SIDE, patch_size=16)
    vision, text, mlp = image_reward_parts(*sizes)
    tiny.blip_fill(vision, 1), tiny.blip_fill(text, 2)
    image_reward_file(tmp_path / "folder", vision, text, mlp)
    tokenizer = bert(tmp_path / "folder", "vocab.txt")
    (pillow, images), resized = pictures(*size), min(size) != SIDE  # else at most cropped
    # The package resizes, crops and normalises as CLIP does, and pads every prompt to 35 tokens.
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    patches = vision(processor(pillow, return_tensors="pt").pixel_values).last_hidden_state
    inputs = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    x = text(
        inputs.input_ids, inputs.attention_mask, encoder_hidden_states=patches,
        encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long),
    ).last_hidden_state[:, 0]  # fmt: skip
    for name in WIDTHS:
        x = x @ mlp[f"{name}.weight"].T + mlp[f"{name}.bias"]
    expected = (x[:, 0] - 0.16717362830052426) / 1.0333394966054072
    agree(rewards.ImageReward(tmp_path / "folder")(images, PROMPTS), expected, resized)


# The towers of openai/clip-vit-large-patch14 and of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which PickScore_v1 is tuned from.
L14 = dict(
    text_config=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768),
    vision_config=dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    ),
    projection_dim=768,
)
H14 = dict(
    text_config=dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        hidden_act="gelu",
        eos_token_id=2,
    ),
    vision_config=dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14, hidden_act="gelu"
    ),
    projection_dim=1024,
)


@pytest.mark.parametrize(
    "name, config, count",
    [("clip_score", L14, 427_616_513), ("aesthetic", L14, 427_616_513), ("pick_score", H14, 986_109_441)],
)
def test_public_folders_of_full_size_open(tmp_path, name, config, count):
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**config))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert sum(map(math.prod, shapes.values())) == count
    stored = {f"{tower}_model.embeddings.position_ids": (1, n) for tower, n in (("text", 77), ("vision", 257))}  # of old files
    tiny.headers_only(tmp_path / "model.safetensors", shapes | stored, "F32")
    model.config.save_pretrained(tmp_path)
    tiny.clip_tokenizer(tmp_path, "<|endoftext|>")
    CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)  # tokenizer.json beside vocab.json and merges.txt
    old = dict(crop_size=224, do_center_crop=True, do_normalize=True, do_resize=True, resample=3, size=224)
    old |= dict(feature_extractor_type="CLIPFeatureExtractor", image_mean=tiny_rewards.MEAN, image_std=tiny_rewards.STD)
    tiny.write_json(tmp_path / "preprocessor_config.json", old)
    head = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    head = {f"layers.{i}.{k}": (b, a) if k == "weight" else (b,) for i, (a, b) in head.items() for k in ("weight", "bias")}
    tiny.headers_only(tmp_path / "aesthetic.safetensors", head, "F32")
    assert (tmp_path / "vocab.json").is_file() and (tmp_path / "tokenizer.json").is_file()
    reward = rewards.NAMES[name](tmp_path, device="meta")
    assert {key: tuple(tensor.shape) for key, tensor in reward.model.state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in reward.model.parameters()) == count
    images = torch.zeros(2, 3, 512, 512, device="meta")
    assert reward(images, ["the one", "a cat"]).shape == (2,)
