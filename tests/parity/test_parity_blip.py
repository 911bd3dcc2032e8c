"""Our BLIP, ImageReward and BERT tokenizer against transformers', both ways (extra `parity`)."""

import math
from itertools import pairwise

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from nano_adrpo.models import blip, tokenizers

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
STYLES = {
    "base": (tiny.BLIP_TEXT, tiny.BLIP_VISION, 10),
    "other sizes": (
        tiny.BLIP_TEXT | dict(num_attention_heads=2, num_hidden_layers=3, layer_norm_eps=1e-3),
        tiny.BLIP_VISION | dict(hidden_size=28, num_attention_heads=4, image_size=23, patch_size=7, layer_norm_eps=1e-3),
        7,
    ),
    "narrow image": (tiny.BLIP_TEXT | dict(hidden_size=32, num_attention_heads=8), tiny.BLIP_VISION | dict(image_size=5), 33),
}


def theirs(style="base"):
    text, vision, width = STYLES[style]
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=width)
    return tiny.blip_fill(BlipForImageTextRetrieval(config))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("padding", [None, "right", "left"])
@torch.no_grad()
def test_outputs_agree(tmp_path, style, padding, device):
    model = theirs(style)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if padding else "1GB")
    ours = blip.BLIP.from_pretrained(tmp_path, device=device)
    pixels, ids, mask = tiny.blip_inputs(STYLES[style][1]["image_size"])
    mask = {None: None, "right": mask, "left": mask.flip(1)}[padding]

    logits = model(ids, pixels, attention_mask=mask).itm_score
    cosines = model(ids, pixels, use_itm_head=False, attention_mask=mask).itm_score  # every image with every text
    pixels, ids, mask = (None if x is None else x.to(device) for x in (pixels, ids, mask))
    image = torch.nn.functional.normalize(ours.encode_image(pixels), dim=1)
    text = torch.nn.functional.normalize(ours.encode_text(ids, mask), dim=1)
    assert (ours.match_logits(pixels, ids, mask).cpu() - logits).abs().max() < 1e-5
    assert (ours.match(pixels, ids, mask).cpu() - logits.softmax(1)[:, 1]).abs().max() < 1e-5
    assert ((image @ text.T).cpu() - cosines).abs().max() < 1e-5
    assert logits.std() > 1e-2 and cosines.std() > 1e-2  # there is something to agree on


@torch.no_grad()
def test_what_we_save_loads_there(tmp_path):
    theirs("other sizes").save_pretrained(tmp_path / "theirs")
    ours = blip.BLIP.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again, report = BlipForImageTextRetrieval.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    pixels, ids, mask = tiny.blip_inputs(23)
    expected = again.eval()(ids, pixels, attention_mask=mask).itm_score
    assert (ours.match_logits(pixels, ids, mask) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_position_ids_are_what_transformers_passes_over(tmp_path):
    model, (pixels, ids, mask) = theirs(), tiny.blip_inputs()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"text_encoder.embeddings.position_ids": torch.arange(14)[None]}, file, {"format": "pt"})
    _, report = BlipForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    expected = model(ids, pixels, attention_mask=mask).itm_score
    assert (blip.BLIP.from_pretrained(tmp_path).match_logits(pixels, ids, mask) - expected).abs().max() < 1e-5


# Salesforce/blip-itm-base-coco and -large-coco.
BASE = dict(image_size=384)
LARGE = dict(image_size=384, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)


@pytest.mark.parametrize("vision", [BASE, LARGE], ids=["base", "large"])
def test_full_size_names_and_shapes(tmp_path, vision):
    config = BlipConfig(text_config=dict(num_attention_heads=12), vision_config=vision)
    with torch.device("meta"):
        model = BlipForImageTextRetrieval(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tiny.headers_only(tmp_path / "model.safetensors", shapes)
    config.save_pretrained(tmp_path)
    ours = blip.BLIP.from_pretrained(tmp_path, device="meta")
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == shapes
    assert ours.config.text_config.num_attention_heads == 12
    assert ours.vision_model.encoder["layers"][0].heads == config.vision_config.num_attention_heads


WIDTHS = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}  # of ImageReward's head; dropout stands at 1, 3 and 5


def image_reward_parts(text, vision, device="cpu"):
    """transformers' two towers and the head's tensors, the first layer's inputs first."""
    with torch.device(device):
        towers = (
            BlipVisionModel(BlipVisionConfig(**vision)),
            BlipTextModel(BlipTextConfig(**text, encoder_hidden_size=vision["hidden_size"]), add_pooling_layer=False),
        )
        generator, mlp = torch.Generator(device).manual_seed(3) if device == "cpu" else None, {}
        for (_, before), (name, after) in pairwise({"": text["hidden_size"], **WIDTHS}.items()):
            mlp[f"{name}.weight"] = torch.randn(after, before, generator=generator) / math.sqrt(before)
            mlp[f"{name}.bias"] = torch.randn(after, generator=generator)
    return *towers, mlp


def image_reward_file(folder, vision, text, mlp):
    folder.mkdir()
    tensors = tiny.to_image_reward(vision.state_dict(), text.state_dict(), mlp)
    positions = text.config.max_position_embeddings
    tensors |= {  # what the release's file holds beside
        "blip.text_encoder.embeddings.position_ids": torch.arange(positions)[None],
        "blip.vision_proj.weight": torch.ones(5, vision.config.hidden_size),
        "blip.vision_proj.bias": torch.ones(5),
        "blip.text_proj.weight": torch.ones(5, text.config.hidden_size),
        "blip.text_proj.bias": torch.ones(5),
    }
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "ImageReward.safetensors")
    med_config = {
        "model_type": "bert", "hidden_act": "gelu", "hidden_size": text.config.hidden_size, "pad_token_id": 0,
        "intermediate_size": text.config.intermediate_size, "layer_norm_eps": 1e-12, "type_vocab_size": 2,
        "max_position_embeddings": positions, "num_attention_heads": text.config.num_attention_heads,
        "num_hidden_layers": text.config.num_hidden_layers, "vocab_size": text.config.vocab_size, "encoder_width": 768,
        "add_cross_attention": True,
    }  # fmt: skip
    tiny.write_json(folder / "med_config.json", med_config)


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_image_reward_agrees(tmp_path, device):
    vision, text, mlp = image_reward_parts(tiny.BLIP_TEXT, tiny.IMAGE_REWARD_VISION)
    tiny.blip_fill(vision, 1), tiny.blip_fill(text, 2)
    image_reward_file(tmp_path / "theirs", vision, text, mlp)

    pixels, ids, mask = tiny.blip_inputs()
    image = vision(pixels).last_hidden_state
    ones = torch.ones(image.shape[:2], dtype=torch.long)
    hidden = text(ids, attention_mask=mask, encoder_hidden_states=image, encoder_attention_mask=ones).last_hidden_state
    x = hidden[:, 0]
    for name in WIDTHS:
        x = x @ mlp[f"{name}.weight"].T + mlp[f"{name}.bias"]
    expected = (x[:, 0] - 0.16717362830052426) / 1.0333394966054072

    ours = blip.ImageReward.from_pretrained(tmp_path / "theirs", device=device)
    assert (ours(pixels.to(device), ids.to(device), mask.to(device)).cpu() - expected).abs().max() < 1e-5
    assert expected.std() > 1e-2
    ours.save_pretrained(tmp_path / "ours")
    written, read = (load_file(tmp_path / name / "ImageReward.safetensors") for name in ("ours", "theirs"))
    kept = {key for key in read if not key.endswith("position_ids") and "_proj." not in key}
    assert written.keys() == kept and all(torch.equal(written[key], read[key]) for key in kept)


def test_image_reward_full_size_names_and_shapes(tmp_path):
    bert = dict(vocab_size=30524, hidden_size=768, num_attention_heads=12)
    vision, text, mlp = image_reward_parts(bert, LARGE | dict(image_size=224), "meta")
    tensors = tiny.to_image_reward(vision.state_dict(), text.state_dict(), mlp)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    tiny.headers_only(tmp_path / "converted.safetensors", shapes, "F32")
    ours = blip.ImageReward.from_pretrained(tmp_path / "converted.safetensors", device="meta")
    keys = {name: blip.image_reward_key(name) for name in ours.state_dict()}
    assert {keys[name]: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == shapes
    assert (ours.config.vision_config.image_size, ours.config.vision_config.num_attention_heads) == (224, 16)
    assert ours.config.text_config == blip.TextConfig(num_attention_heads=12)


STRINGS = [
    "", "A cat, two dogs!", "Café in PARIS: naïve", "中文字 and 日 cats", "unbreakable; UNBREAKABLE's", "run-ning 3d/4k",
    "[SEP] in [MASK] the [prompt]", "İstanbul straße", "a\u00a0cat\u200b\tdog\r\nthe\x00\ufffd", "xyyyy " * 5, "x" * 101,
    "e\u0301 ½ ﬁ 🐈",
]  # fmt: skip


def test_tokenizer_agrees(tmp_path):
    (tmp_path / "vocab").mkdir()
    (tmp_path / "vocab" / "vocab.txt").write_text("\n".join(tiny.WORD_PIECES) + "\n", encoding="utf-8")
    reference = BertTokenizer.from_pretrained(tmp_path / "vocab")
    reference.save_pretrained(tmp_path / "json")
    assert (tmp_path / "json" / "tokenizer.json").is_file() and not (tmp_path / "json" / "vocab.txt").is_file()
    for folder in ("vocab", "json"):
        for length in (7, 35):
            expected = reference(STRINGS, padding=True, truncation=True, max_length=length, return_tensors="pt")
            with pytest.warns(UserWarning, match=f"tokens and is cut to {length}"):
                ids, mask = tokenizers.BertTokenizer(tmp_path / folder)([*STRINGS, "the " * 40], length)
            width = expected.input_ids.shape[1]
            assert torch.equal(ids[:-1, :width], expected.input_ids) and not ids[:-1, width:].any()
            assert torch.equal(mask[:-1, :width], expected.attention_mask) and not mask[:-1, width:].any()
            assert ids[-1].tolist() == [2] + [tiny.WORD_PIECES.index("the")] * (length - 2) + [3]
