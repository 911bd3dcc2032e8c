"""Rewards of images: their formulas, images of any size, the names of the command line, bad files."""

import json
import math
import re
import shutil

import pytest
import tiny
import tiny_rewards
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from nano_adrpo.demo import HERE
from nano_adrpo.demo.digits import meaning
from nano_adrpo.demo.digits_recipe import Painter
from nano_adrpo.rewards import images as rewards
from nano_adrpo.rewards.images import ClipScore, parse

NAMES = list(tiny_rewards.SIDES)
PROMPTS = ["the one", "a cat in paris", "the one", ""]  # the first twice


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tiny_rewards.folder(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture(scope="module")
def models(folders):
    return {name: rewards.NAMES[name](folders[name]) for name in NAMES}


def pictures(name, count=4):
    side = tiny_rewards.SIDES[name]
    return tiny.images(side, side, count)


def columns(values):
    return torch.tensor(values)[:, None, None]


def pixels(images):
    """What CLIP and BLIP see of images that have their size already."""
    return ((images + 1) / 2 - columns(tiny_rewards.MEAN)) / columns(tiny_rewards.STD)


def cosines(images, texts):
    return [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(images.double(), texts.double())]


# --------------------------------------------------------------------------------------------------------------- formulas


def clip_embeddings(reward, folder):
    words = json.loads((folder / "vocab.json").read_text())
    begin, end = words["<|startoftext|>"], words["<|endoftext|>"]
    text = {"the one": ["the</w>", "one</w>"], "": []}
    text["a cat in paris"] = ["a</w>", *"ca", "t</w>", "i", "n</w>", *"pari", "s</w>"]
    rows = [[begin, *(words[piece] for piece in text[prompt]), end] for prompt in PROMPTS]
    ids = torch.tensor([row + [end] * (16 - len(row)) for row in rows])
    return reward.model.encode_image(pixels(pictures("clip_score"))), reward.model.encode_text(ids)


@torch.no_grad()
def test_clip_score_and_pick_score_are_cosines(models, folders):
    image, text = clip_embeddings(models["clip_score"], folders["clip_score"])
    expected = [100 * cosine for cosine in cosines(image, text)]
    assert models["clip_score"](pictures("clip_score"), PROMPTS).tolist() == pytest.approx(expected, rel=1e-4)
    expected = [50 * cosine for cosine in cosines(image, text)]  # the folder's logit_scale is ln 50
    assert models["pick_score"](pictures("pick_score"), PROMPTS).tolist() == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(models["clip_score"].embed_images(pictures("clip_score")), image, atol=1e-5)


@torch.no_grad()
def test_aesthetic_is_one_linear_map_of_the_direction(models, folders):
    head, matrix, bias = load_file(folders["aesthetic"] / "aesthetic.safetensors"), torch.eye(24).double(), 0.0
    for layer in (0, 2, 4, 6, 7):
        weight, shift = (head[f"layers.{layer}.{kind}"].double() for kind in ("weight", "bias"))
        matrix, bias = weight @ matrix, weight @ bias + shift if layer else shift
    image, _ = clip_embeddings(models["aesthetic"], folders["aesthetic"])
    expected = [(matrix @ (x / x.norm()) + bias).item() for x in image.double()]
    assert models["aesthetic"](pictures("aesthetic"), PROMPTS).tolist() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(*(models["aesthetic"](pictures("aesthetic"), [prompt] * 4) for prompt in ("the one", "a cat")))


def blip_inputs():
    """The ids of each prompt [1, L]: a word is a word piece, or unknown."""
    pieces = {piece: index for index, piece in enumerate(tiny.WORD_PIECES)}
    for prompt in PROMPTS:
        yield torch.tensor([[pieces.get(word, pieces["[UNK]"]) for word in ("[CLS]", *prompt.split(), "[SEP]")]])


@torch.no_grad()
def test_blip_scores_are_a_cosine_and_a_probability(models):
    images, model = pixels(pictures("blip_score")), models["blip_score"].model
    text = torch.cat([model.encode_text(ids) for ids in blip_inputs()])
    expected = cosines(model.encode_image(images), text)
    assert models["blip_score"](pictures("blip_score"), PROMPTS).tolist() == pytest.approx(expected, rel=1e-4)
    logits = torch.cat([model.match_logits(image[None], ids) for image, ids in zip(images, blip_inputs())]).double()
    expected = [1 / (1 + math.exp(no - yes)) for no, yes in logits.tolist()]
    assert models["blip_itm"](pictures("blip_itm"), PROMPTS).tolist() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_image_reward_counts_deviations_from_the_mean(models):
    reward, values = models["image_reward"], []
    for image, ids in zip(pixels(pictures("image_reward")), blip_inputs()):
        x = reward.model.blip["text_encoder"](ids, None, reward.model.blip["visual_encoder"](image[None]))[0, 0].double()
        for layer in (0, 2, 4, 6, 7):
            x = reward.model.mlp["layers"][layer].weight.double() @ x + reward.model.mlp["layers"][layer].bias.double()
        values.append((x.item() - 0.16717362830052426) / 1.0333394966054072)
    assert reward(pictures("image_reward"), PROMPTS).tolist() == pytest.approx(values, rel=1e-4, abs=1e-5)


def test_the_demos_clip_scores_by_the_same_function():
    reward = ClipScore(HERE / "clip")
    prompts = ["a red one", "a blue two above a red nine", "a red nine and a blue two"]
    images = Painter(torch.Generator().manual_seed(0)).paint([meaning(prompt) for prompt in prompts[:2]])[[0, 1, 1]]
    image, text = reward.embed_images(images), reward.embed_prompts(prompts)
    expected = [100 * cosine for cosine in cosines(image, text)]
    assert reward(images, prompts).tolist() == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("name", NAMES)
def test_every_pair_is_scored_alone(models, name):
    images = pictures(name)
    together = models[name](images, PROMPTS)
    assert together.shape == (4,) and together.dtype == torch.float32 and together.std() > 0
    for i in range(4):
        assert torch.allclose(models[name](images[[i]], PROMPTS[i : i + 1]), together[[i]], rtol=1e-4, atol=1e-5)
    order = [2, 0, 3, 1]
    turned = models[name](images[order], [PROMPTS[i] for i in order])
    assert torch.allclose(turned, together[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_images_have_any_size_and_any_range(models, name):
    colours = torch.tensor([[191, 95, 255], [0, 128, 223], [127, 127, 127], [255, 0, 140]]) / 127.5 - 1  # 8 bits have them
    plain = [colours[..., None, None].expand(4, 3, *size) for size in ((12, 12), (15, 15), (7, 40), (64, 33))]
    first, *others = (models[name](images, PROMPTS) for images in plain)
    assert all(torch.allclose(other, first, rtol=1e-3, atol=1e-4) for other in others)  # resized, a colour stays a colour
    wild = pictures(name) * 9
    assert torch.equal(models[name](wild, PROMPTS), models[name](wild.clamp(-1, 1), PROMPTS))
    side = tiny_rewards.SIDES[name]
    wide = torch.cat([torch.ones(4, 3, side, side), pictures(name), -torch.ones(4, 3, side, side)], dim=3)
    same = torch.allclose(models[name](wide, PROMPTS), models[name](pictures(name), PROMPTS), rtol=1e-4)
    assert same == (not name.startswith("blip"))  # CLIP and ImageReward crop to the centre, BLIP squeezes


@pytest.mark.parametrize("name", NAMES)
def test_grey_images_are_grey_in_every_channel(models, name):
    grey = pictures(name)[:, :1]
    assert torch.equal(models[name](grey, PROMPTS), models[name](grey.expand(-1, 3, -1, -1), PROMPTS))


def test_crops_of_the_demos_digits():
    reward = ClipScore(HERE / "clip")
    scenes = [meaning(text) for text in ("a red one", "a blue two above a red nine", "a green six left of a purple four")]
    images = Painter(torch.Generator().manual_seed(0)).paint(scenes)
    big = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)  # 64 × 64 blocks of the same image
    wide = torch.cat([-torch.ones(3, 3, 64, 16), big, -torch.ones(3, 3, 64, 16)], dim=3)  # 64 × 96: the centre is the image
    assert F.cosine_similarity(reward.embed_images(wide), reward.embed_images(images)).min() > 0.9


def test_a_prompt_that_comes_again_is_encoded_once(folders, monkeypatch):
    reward, seen = ClipScore(folders["clip_score"]), []
    encode = reward.model.encode_text
    monkeypatch.setattr(reward.model, "encode_text", lambda ids: seen.append(len(ids)) or encode(ids))
    embeddings = reward.embed_prompts(["a", "the", "a", "a", "the"])
    assert seen == [2] and torch.equal(embeddings[[0, 0, 1]], embeddings[[2, 3, 4]])
    assert not torch.allclose(embeddings[0], embeddings[1])


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_and_meta(models, folders, name):
    half = rewards.NAMES[name](folders[name], dtype=torch.bfloat16)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    scores, full = (model(pictures(name), PROMPTS) for model in (half, models[name]))
    assert scores.dtype == torch.float32 and (scores - full).abs().max() < 0.05 * full.abs().max()
    meta = rewards.NAMES[name](folders[name], device="meta")
    assert {tensor.device.type for tensor in (*meta.parameters(), *meta.buffers())} == {"meta"}
    assert not any(parameter.requires_grad for parameter in models[name].parameters())


# ------------------------------------------------------------------------------------------------------- names and folders


@pytest.mark.parametrize("name", NAMES)
def test_every_name_opens_its_reward(models, folders, name):
    reward = parse([f"{name}:{folders[name]}"])
    assert torch.equal(reward(pictures(name), PROMPTS)["reward"], models[name](pictures(name), PROMPTS))
    embeddings = reward.embed_images(pictures(name), batch=3)  # the diversity's, of whichever CLIP there is
    assert (embeddings is None) == (tiny_rewards.SIDES[name] == 15)
    assert embeddings is None or torch.allclose(embeddings, models["clip_score"].embed_images(pictures(name)), atol=1e-5)


def test_a_bare_folder_is_clip_score(models, folders, tmp_path):
    for folder in (folders["clip_score"], shutil.copytree(folders["clip_score"], tmp_path / "odd@name:x@y")):
        for spec, weight in ((str(folder), 1), (f"{folder}@0.25", 0.25), (f"clip_score:{folder}@4", 4)):
            scores = parse([spec])(pictures("clip_score"), PROMPTS)
            expected = weight * models["clip_score"](pictures("clip_score"), PROMPTS)
            assert list(scores) == ["reward"] and torch.allclose(scores["reward"], expected)


def test_the_docstrings_example_runs(tmp_path):
    example = re.search(r"mine\.py\n\n((?:    .*\n)+)", rewards.__doc__)[1]
    (tmp_path / "mine.py").write_text("".join(line[4:] for line in example.splitlines(keepends=True)))
    images = torch.stack([torch.full((3, 5, 9), value) for value in (-1.0, 0.0, 1.0)])
    assert "`--reward mine.py:bright`" in rewards.__doc__
    assert parse([f"{tmp_path / 'mine.py'}:bright"])(images, ["a", "b", "c"])["reward"].tolist() == [0, 0.5, 1]


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_scores_on_cuda(models, folders, name):
    reward = parse([f"{name}:{folders[name]}"])
    (model, _), *_ = reward.terms.values()
    with pytest.raises(KeyError), reward.on("cuda"):
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
        for images in (pictures(name), pictures(name).cuda()):
            scores = reward(images, PROMPTS)["reward"]
            assert scores.device.type == "cpu"
            assert torch.allclose(scores, models[name](pictures(name), PROMPTS), rtol=1e-3, atol=1e-3)
        raise KeyError
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}


MISSING = {  # a reward, a file that it needs, what is said without it
    "vocab.json": ("clip_score", "tokenizer.json: no such file, nor CLIP's vocab.json and merges.txt"),
    "preprocessor_config.json": ("pick_score", "preprocessor_config.json: no such file"),
    "model.safetensors": ("clip_score", "no model.safetensors"),
    "aesthetic.safetensors": ("aesthetic", "aesthetic.safetensors: no such file; it is the converted predictor"),
    "vocab.txt": ("blip_score", "no tokenizer.json and no vocab.txt in this folder"),
    "config.json": ("blip_itm", "config.json: no such file"),
    "ImageReward.safetensors": ("image_reward", "no ImageReward.safetensors"),
    "med_config.json": ("image_reward", "med_config.json: no such file"),
}


def test_a_missing_file_is_named(folders, tmp_path):
    for file, (name, message) in MISSING.items():
        folder = shutil.copytree(folders[name], tmp_path / file)
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=message) as error:
            parse([f"{name}:{folder}"])
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_other_pixels_than_a_reward_knows_are_refused(folders, tmp_path):
    clip = shutil.copytree(HERE / "clip", tmp_path / "clip")
    (clip / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5]}))
    with pytest.raises(ValueError, match="preprocessor_config.json: keys 'image_mean' and 'image_std' are missing"):
        ClipScore(clip)
    for name, key, value, message in (
        ("clip_score", "image_mean", None, "is None; expected 3 numbers, one a channel"),
        ("clip_score", "image_mean", [0.5], "is .*; expected 3 numbers"),
        ("blip_score", "image_std", [1, 0, 1], "is .*; expected 3 positive numbers"),
        ("blip_score", "image_std", 0.5, "is 0.5; expected 3 positive numbers"),
        ("blip_score", "resample", 2, "is 2; expected 3"),
        ("pick_score", "do_center_crop", False, "is False; expected True"),
        ("clip_score", "size", {"shortest_edge": 20}, "is .*; expected 12, the model's image_size"),
        ("clip_score", "crop_size", 10, "is 10; expected 12"),
    ):
        other = shutil.copytree(folders[name], tmp_path / "other", dirs_exist_ok=True)
        file = other / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        with pytest.raises(ValueError, match=f"{file}: key '{key}' {message}") as error:
            parse([f"{name}:{other}"])
        assert "\n" not in str(error.value)


def test_a_processor_saved_by_transformers_5_is_read(folders, tmp_path):
    clip = shutil.copytree(folders["clip_score"], tmp_path / "clip")
    values = json.loads((clip / "preprocessor_config.json").read_text())
    (clip / "preprocessor_config.json").unlink()
    (clip / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor", "image_processor": values}))
    for name in ("mean", "std"):
        assert torch.equal(getattr(ClipScore(clip), name), getattr(ClipScore(folders["clip_score"]), name))
    (clip / "processor_config.json").write_text(json.dumps({"image_processor": values | {"resample": 2}}))
    with pytest.raises(ValueError, match="processor_config.json: key 'resample' is 2; expected 3"):
        ClipScore(clip)


def test_a_predictor_of_another_clip_is_refused(folders, tmp_path):
    aesthetic = shutil.copytree(folders["aesthetic"], tmp_path / "aesthetic")
    file = aesthetic / "aesthetic.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"layers.0.weight": torch.zeros(1024, 768)}, file)  # of a ViT-L/14
    with pytest.raises(ValueError, match=r"key 'layers.0.weight' has shape \[1024, 768\]; expected \[1024, 24\]"):
        parse([f"aesthetic:{aesthetic}"])
