"""Our CLIP against transformers', both ways (extra `parity`)."""

import json

import pytest
import tiny
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

from nano_adrpo.models.clip import CLIP, CLIPText


def theirs(style):
    extra = tiny.CLIP_STYLES[style]
    return tiny.fill(
        CLIPModel(CLIPConfig(text_config=tiny.CLIP_TEXT | extra, vision_config=tiny.CLIP_VISION | extra, projection_dim=24))
    )


@pytest.mark.parametrize("style", tiny.CLIP_STYLES)
@pytest.mark.parametrize("padding", [None, "right", "left"])
@torch.no_grad()
def test_outputs_agree(tmp_path, style, padding):
    model, (ids, pixels) = theirs(style), tiny.clip_inputs()
    model.save_pretrained(tmp_path, max_shard_size="50KB" if padding else "1GB")
    ours = CLIP.from_pretrained(tmp_path)
    mask = None
    if padding:
        mask = torch.ones_like(ids)
        mask[1, slice(7, None) if padding == "right" else slice(0, 2)] = 0
    assert (ours.encode_text(ids, mask) - model.get_text_features(ids, mask).pooler_output).abs().max() < 1e-5
    assert (ours.encode_image(pixels) - model.get_image_features(pixels).pooler_output).abs().max() < 1e-5


@pytest.mark.parametrize("style", tiny.CLIP_STYLES)
@torch.no_grad()
def test_sd3s_text_encoder_agrees(tmp_path, style):
    model, (ids, _) = (
        tiny.fill(CLIPTextModelWithProjection(CLIPTextConfig(**tiny.CLIP_TEXT, **tiny.CLIP_STYLES[style]))),
        tiny.clip_inputs(),
    )
    model.save_pretrained(tmp_path)
    expected = model(ids, output_hidden_states=True)
    hidden, pooled = CLIPText.from_pretrained(tmp_path)(ids)
    assert (hidden - expected.hidden_states[-2]).abs().max() < 1e-5 and (pooled - expected.text_embeds).abs().max() < 1e-5


@torch.no_grad()
def test_what_we_save_loads_there(tmp_path):
    theirs("laion").save_pretrained(tmp_path / "theirs")
    ours, (ids, pixels) = CLIP.from_pretrained(tmp_path / "theirs"), tiny.clip_inputs()
    ours.save_pretrained(tmp_path / "ours")
    again = CLIPModel.from_pretrained(tmp_path / "ours").eval()
    assert (again.get_text_features(ids).pooler_output - ours.encode_text(ids)).abs().max() < 1e-5
    assert (again.get_image_features(pixels).pooler_output - ours.encode_image(pixels)).abs().max() < 1e-5


@torch.no_grad()
def test_the_dict_of_older_files_has_the_last_word(tmp_path):
    # `text_config_dict` and the defaults count, whatever `text_config` says: eos_token_id is 49407, and none is in the text.
    theirs("openai").save_pretrained(tmp_path)
    where = tmp_path / "config.json"
    config = json.loads(where.read_text())
    older = {f"{tower}_config_dict": sizes for tower, sizes in (("text", tiny.CLIP_TEXT), ("vision", tiny.CLIP_VISION))}
    where.write_text(json.dumps(config | older | {"text_config": config["text_config"] | {"layer_norm_eps": 0.1}}))
    model, ours, (ids, pixels) = CLIPModel.from_pretrained(tmp_path).eval(), CLIP.from_pretrained(tmp_path), tiny.clip_inputs()
    assert (ours.encode_text(ids) - model.get_text_features(ids).pooler_output).abs().max() < 1e-5
    assert (ours.encode_image(pixels) - model.get_image_features(pixels).pooler_output).abs().max() < 1e-5


L14 = (
    dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14),
    768,
)
BIG_G = (
    dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu"),
    dict(
        hidden_size=1664, intermediate_size=8192, num_hidden_layers=48, num_attention_heads=16, patch_size=14, hidden_act="gelu"
    ),
    1280,
)


@pytest.mark.parametrize("text, vision, projection", [L14, BIG_G], ids=["L14", "bigG"])
def test_full_size_names_and_shapes(tmp_path, text, vision, projection):
    config = CLIPConfig(text_config=text | {"projection_dim": projection}, vision_config=vision, projection_dim=projection)
    with torch.device("meta"):
        model = CLIPModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tiny.headers_only(tmp_path / "model.safetensors", shapes)
    config.save_pretrained(tmp_path)
    ours = CLIP.from_pretrained(tmp_path, device="meta")
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == shapes
