"""CLIP: golden outputs of transformers, masks, full-size shapes."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo.models import clip

GOLDEN = json.loads((Path(tiny.__file__).parent / "golden.json").read_text())


def build(style="openai"):
    extra = tiny.CLIP_STYLES[style]
    text, vision = (
        clip.TextConfig(**tiny.CLIP_TEXT, **extra),
        clip.VisionConfig(**tiny.CLIP_VISION, hidden_act=extra["hidden_act"]),
    )
    return tiny.fill(clip.CLIP(clip.Config(text, vision, 24)))


def text_only(model):
    text = clip.CLIPText(model.config.text_config)
    text.text_model, text.text_projection = model.text_model, model.text_projection
    return text


@pytest.mark.parametrize("style", tiny.CLIP_STYLES)
def test_outputs_are_transformers(style):
    model, (ids, pixels) = build(style), tiny.clip_inputs()
    golden = GOLDEN[f"clip-{style}"]
    assert model.encode_text(ids)[:, ::5].flatten().tolist() == pytest.approx(golden["text"], abs=1e-5)
    assert model.encode_image(pixels)[:, ::5].flatten().tolist() == pytest.approx(golden["image"], abs=1e-5)
    hidden, pooled = text_only(model)(ids)
    assert hidden[:, ::4, ::8].flatten().tolist() == pytest.approx(golden["hidden"], abs=1e-5)
    assert torch.equal(pooled, model.encode_text(ids))


def test_padding_is_invisible_behind_a_mask():
    # Left padding is seen by later tokens unless masked: what stands there must not matter, nor be NaN.
    model, (ids, _) = build("laion"), tiny.clip_inputs()
    mask = torch.ones(3, 9)
    mask[1, :2] = 0
    other = ids.clone()
    other[1, :2] = 5
    assert torch.allclose(model.encode_text(ids, mask), model.encode_text(other, mask.bool()), atol=1e-6)
    assert not torch.allclose(model.encode_text(ids), model.encode_text(other), atol=1e-3)


def test_pooling_is_at_the_first_end_of_text():
    model, (ids, _) = build("laion"), tiny.clip_inputs()
    later = ids.clone()
    later[0, 6:] = 90  # padded with the end token itself, as SD3's first tokenizer does
    assert torch.allclose(model.encode_text(ids), model.encode_text(later), atol=1e-6)


def test_folders_round_trip(tmp_path):
    model, (ids, pixels) = build(), tiny.clip_inputs()
    model.save_pretrained(tmp_path / "clip")
    again = clip.CLIP.from_pretrained(tmp_path / "clip")
    assert torch.equal(again.encode_text(ids), model.encode_text(ids)) and torch.equal(
        again.encode_image(pixels), model.encode_image(pixels)
    )
    text_only(model).save_pretrained(tmp_path / "text")
    assert torch.equal(clip.CLIPText.from_pretrained(tmp_path / "text")(ids)[0], text_only(model)(ids)[0])
    assert clip.CLIP.from_pretrained(tmp_path / "clip", torch.float16).logit_scale.dtype == torch.float16


def test_the_position_ids_of_older_files_are_passed_over(tmp_path):
    build().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {f"{t}_model.embeddings.position_ids": torch.arange(16)[None] for t in ("text", "vision")},
        tmp_path / "model.safetensors",
    )
    ids, _ = tiny.clip_inputs()
    assert torch.equal(clip.CLIP.from_pretrained(tmp_path).encode_text(ids), build().encode_text(ids))


def single(model, prefix="", projected=True):
    """The tensors of Stability's single-file encoders: transformers' names behind a prefix; CLIP-L's without projection."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if projected or "projection" not in name}
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("together", [False, True])
def test_sd3s_single_files(tmp_path, together):
    sizes = dict(vocab_size=99, num_hidden_layers=3, max_position_embeddings=16, eos_token_id=2, intermediate_size=48)
    small = clip.CLIPText(clip.TextConfig(**sizes, hidden_size=64, num_attention_heads=1, projection_dim=64))
    large = dict(hidden_size=128, num_attention_heads=2, projection_dim=40, hidden_act="gelu")
    small, large = tiny.fill(small), tiny.fill(clip.CLIPText(clip.TextConfig(**sizes, **large)), seed=1)
    with torch.no_grad():
        small.text_projection.weight.copy_(torch.eye(64))
    ids, _ = tiny.clip_inputs()
    prefixes = [f"text_encoders.clip_{name}.transformer." if together else "" for name in "lg"]
    parts = [single(small, prefixes[0], projected=False), single(large, prefixes[1])]
    parts[0][prefixes[0] + "text_model.embeddings.position_ids"] = torch.arange(16)[None]
    parts[1][f"{prefixes[1].removesuffix('transformer.')}logit_scale"] = torch.ones(())
    files = [tmp_path / "clip_l.safetensors", tmp_path / "clip_g.safetensors"]
    if together:
        files = [tmp_path / "sd3.safetensors"] * 2
        parts = [parts[0] | parts[1] | {"first_stage_model.decoder.conv_in.bias": torch.ones(3)}] * 2
    for model, file, tensors, prefix in zip((small, large), files, parts, prefixes):
        save_file(tensors, file)
        ours = clip.CLIPText.from_pretrained(file, prefix=prefix)
        assert ours.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(ours(ids), model(ids)))
        half = clip.CLIPText.from_pretrained(file, torch.bfloat16, prefix=prefix)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        meta = clip.CLIPText.from_pretrained(file, device="meta", prefix=prefix)
        assert {p.device.type for p in meta.parameters()} == {"meta"}
        ours.save_pretrained(tmp_path / "folder")
        assert torch.equal(clip.CLIPText.from_pretrained(tmp_path / "folder")(ids)[1], model(ids)[1])
    # In SD3 CLIP-L's pooled output is not projected, even where the file has the matrix (diffusers and ComfyUI agree).
    if together:
        save_file(parts[0] | {prefixes[0] + "text_projection.weight": torch.ones(64, 64)}, files[0])
        assert torch.equal(clip.CLIPText.from_pretrained(files[0], prefix=prefixes[0])(ids)[1], small(ids)[1])


def test_a_number_beside_the_encoder_does_not_widen_it(tmp_path):
    sizes = dict(vocab_size=99, num_hidden_layers=2, hidden_size=64, num_attention_heads=1, projection_dim=64)
    tensors = single(clip.CLIPText(clip.TextConfig(**sizes)).half(), projected=False)
    save_file(tensors | {"logit_scale": torch.ones(())}, tmp_path / "clip_l.safetensors")
    model = clip.CLIPText.from_pretrained(tmp_path / "clip_l.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_pixels_are_taken_in_the_models_dtype(tmp_path):
    build().save_pretrained(tmp_path)
    model, (_, pixels) = clip.CLIP.from_pretrained(tmp_path, torch.bfloat16), tiny.clip_inputs()
    assert torch.equal(model.encode_image(pixels), model.encode_image(pixels.bfloat16()))


# Parameters of the public checkpoints: openai/clip-vit-large-patch14, laion/CLIP-ViT-bigG-14, and SD3's two text encoders.
L14 = dict(
    text=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2, projection_dim=768),
    vision=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14),
)
BIG_G = dict(
    text=dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        projection_dim=1280,
    ),
    vision=dict(
        hidden_size=1664, intermediate_size=8192, num_hidden_layers=48, num_attention_heads=16, patch_size=14, hidden_act="gelu"
    ),
)


@pytest.mark.parametrize(
    "sizes, both, text", [(L14, 427_616_513, 123_650_304), (BIG_G, 2_539_567_105, 694_659_840)], ids=["L14", "bigG"]
)
def test_full_size_parameter_counts(sizes, both, text):
    with torch.device("meta"):
        model = clip.CLIP(
            clip.Config(clip.TextConfig(**sizes["text"]), clip.VisionConfig(**sizes["vision"]), sizes["text"]["projection_dim"])
        )
        tower = clip.CLIPText(clip.TextConfig(**sizes["text"]))
    assert sum(p.numel() for p in model.parameters()) == both
    assert sum(p.numel() for p in tower.parameters()) == text


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the prompt has 17 tokens; expected at most 16"):
        build().encode_text(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="pixels are 12 × 8; expected 12 × 12"):
        build().encode_image(torch.zeros(1, 3, 12, 8))
