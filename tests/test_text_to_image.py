"""SD3 as one object: the direction of time, prompts, folders."""

import json
import shutil

import pytest
import torch

from nano_adrpo.demo import digits
from nano_adrpo.rewards import ClipScore
from nano_adrpo.text_to_image import PromptTokenizer, TextToImage

BASE = digits.HERE / "base"


@pytest.fixture(scope="module")
def model():
    return TextToImage.from_pretrained(BASE)


@torch.no_grad()
def test_time_is_turned_round(model):
    condition, x = model.encode(["a handwritten two"]), torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network = model.transformer(x, torch.tensor([0.75]), condition.context, condition.pooled)  # noise − data at σ = 0.75
    assert torch.equal(model.velocity(x, 0.25, condition), -network)
    assert torch.equal(model.velocity(x, torch.tensor([0.25]), condition), -network)
    assert torch.equal(model.velocity(x, torch.tensor(0.25, dtype=torch.float64), condition), -network)


@torch.no_grad()
def test_the_velocity_points_from_noise_to_data(model):
    # From pure noise the mean of u = x1 − x0 given x0 is E[x1] − x0: the base model is trained, so this holds roughly.
    x0 = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    v = model.velocity(x0, 0.0, model.encode(["a handwritten three"])[[0] * 64])
    images, labels, _ = digits.load()
    expected = images[labels == 3].mean(dim=0) - x0
    assert (v - expected).square().mean() < 0.1 * expected.square().mean()


def test_tokens_are_begin_words_end_padding(model):
    tokenizer = model.tokenizers[0]
    words = tokenizer.tokenizer.get_vocab()
    begin, end = words["<|startoftext|>"], words["<|endoftext|>"]
    assert tokenizer(["A BOLD three", ""], 6).tolist() == [
        [begin, words["a"], words["bold"], words["three"], end, end],
        [begin, end, end, end, end, end],
    ]
    assert tokenizer(["a xyz"], 4).tolist() == [[begin, words["a"], words["<|unknown|>"], end]]
    with pytest.warns(UserWarning, match="has 5 tokens and is cut to 4"):
        assert tokenizer(["a bold three"], 4).tolist() == [[begin, words["a"], words["bold"], end]]


def test_conditions_are_picked_by_row(model):
    condition = model.encode(["a handwritten one", "a handwritten two"])
    assert condition.context.shape == (2, 8, 64) and condition.pooled.shape == (2, 32)
    picked = condition[torch.tensor([1, 1, 0])]
    assert torch.equal(picked.context[1], condition.context[1]) and torch.equal(picked.pooled[2], condition.pooled[0])


@torch.no_grad()
def test_folders_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = TextToImage.from_pretrained(tmp_path)
    condition = again.encode(digits.PROMPTS[:3])
    assert torch.equal(condition.context, model.encode(digits.PROMPTS[:3]).context)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.velocity(x, 0.5, condition), model.velocity(x, 0.5, condition))
    half = TextToImage.from_pretrained(tmp_path, torch.bfloat16)
    assert half.velocity(x, 0.5, half.encode(digits.PROMPTS[:3])).dtype == torch.float32  # x's
    assert {p.device.type for p in TextToImage.from_pretrained(tmp_path, device="meta").transformer.parameters()} == {"meta"}


def test_two_encoders_stand_side_by_side(tmp_path):
    shutil.copytree(BASE, tmp_path / "two")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(BASE / part, tmp_path / "two" / f"{part}_2")
    with pytest.raises(ValueError, match="the text encoders give width 128 and pooled width 64"):
        TextToImage.from_pretrained(tmp_path / "two")
    one = TextToImage.from_pretrained(BASE)
    both = TextToImage(one.transformer, one.encoders * 2, one.tokenizers * 2)
    both.transformer.config.joint_attention_dim = 150
    condition, single = both.encode(["a handwritten one"]), one.encode(["a handwritten one"])
    assert condition.context.shape == (1, 8, 150) and condition.pooled.shape == (1, 64)
    assert (
        torch.equal(condition.context[..., 64:128], single.context[..., :64]) and condition.context[..., 128:].abs().max() == 0
    )


@pytest.mark.parametrize(
    "break_it, message",
    [
        (
            lambda f: shutil.rmtree(f / "transformer"),
            "no transformer/ in it; expected a folder in diffusers' SD3 pipeline layout",
        ),
        (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder: no such folder; it encodes the prompts"),
        (lambda f: (f / "vae").mkdir(), "vae: not supported"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (lambda f: (f / "tokenizer" / "tokenizer_config.json").write_text("{}"), "tokenizer_config.json: 'pad_token' is None"),
        (lambda f: (f / "transformer" / "config.json").write_text("{"), "config.json: not valid JSON"),
    ],
)
def test_a_broken_folder_is_named(tmp_path, break_it, message):
    shutil.copytree(BASE, tmp_path / "model")
    break_it(tmp_path / "model")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TextToImage.from_pretrained(tmp_path / "model")


# ------------------------------------------------------------------------------------------------------------------- reward


def test_clip_score_is_a_hundred_times_the_cosine():
    reward = ClipScore(digits.HERE / "clip")
    images, labels, _ = digits.load()
    prompts = digits.captions(images[:5], labels[:5])
    image, text = reward.embed_images(images[:5]).double(), reward.embed_prompts(prompts).double()
    expected = [100 * (a @ b / (a.norm() * b.norm())).item() for a, b in zip(image, text)]
    assert reward(images[:5], prompts).tolist() == pytest.approx(expected, rel=1e-5)
    assert reward(images[:5], prompts)[[3]].tolist() == pytest.approx(reward(images[3:4], prompts[3:4]).tolist(), rel=1e-5)


def test_images_are_clamped_resized_and_cropped():
    reward = ClipScore(digits.HERE / "clip")
    images, _, _ = digits.load()
    assert torch.equal(reward.embed_images(images[:4] * 50), reward.embed_images((images[:4] * 50).clamp(-1, 1)))
    big = images[:4].repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)  # 32 × 32 blocks of the same image
    wide = torch.cat([torch.ones(4, 1, 32, 8), big, torch.ones(4, 1, 32, 8)], dim=3)  # 32 × 48: the centre is the image
    small = torch.nn.functional.cosine_similarity(reward.embed_images(wide), reward.embed_images(images[:4]))
    assert small.min() > 0.9


def test_a_reward_folder_without_its_preprocessor_is_named(tmp_path):
    shutil.copytree(digits.HERE / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5]}))
    with pytest.raises(ValueError, match="preprocessor_config.json: keys 'image_mean' and 'image_std' are missing"):
        ClipScore(tmp_path / "clip")
    assert PromptTokenizer(tmp_path / "clip").pad == 1
