"""Rewards of images: their formulas, images of any size, sums of them as the command line names them, bad input."""

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
from torch import nn

from nano_adrpo import rewards
from nano_adrpo.demo import digits
from nano_adrpo.prompt_tokenizer import PromptTokenizer
from nano_adrpo.rewards import ClipScore, Rewards, parse

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
    text = {"the one": ["the</w>", "one</w>"], "a cat in paris": "a</w> c a t</w> i n</w> p a r i s</w>".split(), "": []}
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
    reward = ClipScore(digits.HERE / "clip")
    images, labels, _ = digits.load()
    prompts = digits.captions(images[:5], labels[:5])
    image, text = reward.embed_images(images[:5]), reward.embed_prompts(prompts)
    expected = [100 * cosine for cosine in cosines(image, text)]
    assert reward(images[:5], prompts).tolist() == pytest.approx(expected, rel=1e-5)


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
    reward = ClipScore(digits.HERE / "clip")
    images, _, _ = digits.load()
    big = images[:4].repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)  # 32 × 32 blocks of the same image
    wide = torch.cat([torch.ones(4, 1, 32, 8), big, torch.ones(4, 1, 32, 8)], dim=3)  # 32 × 48: the centre is the image
    assert F.cosine_similarity(reward.embed_images(wide), reward.embed_images(images[:4])).min() > 0.9


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


# ------------------------------------------------------------------------------------------------- sums, and the user's own


def own(path, text):
    (path / "mine.py").write_text(text)
    return f"{path / 'mine.py'}"


BRIGHT = "def bright(images, prompts):\n    return [(image.mean() + 1) / 2 for image in images]\n"


def test_a_weighted_sum_keeps_its_parts(models, folders, tmp_path):
    file, images = own(tmp_path, BRIGHT), pictures("clip_score")
    specs = [f"pick_score:{folders['pick_score']}@-0.5", f"{file}:bright@2e1", f"blip_itm:{folders['blip_itm']}"]
    scores = parse(specs)(images, PROMPTS)
    assert list(scores) == ["reward", "pick_score", "bright", "blip_itm"]
    assert scores["bright"].tolist() == pytest.approx([(image.mean().item() + 1) / 2 for image in images])
    for name in ("pick_score", "blip_itm"):
        assert torch.equal(scores[name], models[name](images, PROMPTS))
    expected = -0.5 * scores["pick_score"] + 20 * scores["bright"] + scores["blip_itm"]
    assert torch.allclose(scores["reward"], expected, atol=1e-5)
    alone = parse([f"{file}:bright@3"])(images, PROMPTS)  # one reward alone has no parts
    assert list(alone) == ["reward"] and torch.allclose(alone["reward"], 3 * scores["bright"])


@pytest.mark.parametrize("name", NAMES)
def test_every_name_opens_its_reward(models, folders, name):
    reward = parse([f"{name}:{folders[name]}"])
    assert torch.equal(reward(pictures(name), PROMPTS)["reward"], models[name](pictures(name), PROMPTS))
    embeddings = reward.embed_images(pictures(name))  # the diversity's, of whichever CLIP there is
    assert (embeddings is None) == (tiny_rewards.SIDES[name] == 15)
    assert embeddings is None or torch.equal(embeddings, models["clip_score"].embed_images(pictures(name)))


def test_a_bare_folder_is_clip_score(models, folders, tmp_path):
    for folder in (folders["clip_score"], shutil.copytree(folders["clip_score"], tmp_path / "odd@name:x@y")):
        for spec, weight in ((str(folder), 1), (f"{folder}@0.25", 0.25), (f"clip_score:{folder}@4", 4)):
            scores = parse([spec])(pictures("clip_score"), PROMPTS)
            expected = weight * models["clip_score"](pictures("clip_score"), PROMPTS)
            assert list(scores) == ["reward"] and torch.allclose(scores["reward"], expected)


def test_the_docstrings_example_runs(tmp_path):
    example = re.search(r"mine\.py\n\n((?:    .*\n)+)", rewards.__doc__)[1]
    file = own(tmp_path, "".join(line[4:] for line in example.splitlines(keepends=True)))
    images = torch.stack([torch.full((3, 5, 9), value) for value in (-1.0, 0.0, 1.0)])
    assert "`--reward mine.py:bright`" in rewards.__doc__
    assert parse([f"{file}:bright"])(images, ["a", "b", "c"])["reward"].tolist() == [0, 0.5, 1]


class Movable(nn.Module):
    def __init__(self):
        super().__init__()
        self.places = []

    def _apply(self, move, recurse=True):
        self.places.append(move(torch.empty(0)).device.type)
        return self

    def forward(self, images, prompts):
        return torch.zeros(len(prompts))


def test_models_come_back_to_the_cpu_whatever_happens():
    movable = Movable()
    reward = Rewards({"movable": (movable, 1.0), "function": (lambda images, prompts: [0.0] * len(prompts), 1.0)})
    with reward.on("meta") as there:
        assert there is reward and movable.places == ["meta"]
    with pytest.raises(KeyError), reward.on("meta"):
        raise KeyError
    assert movable.places == ["meta", "cpu"] * 2


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_scores_on_cuda(models, folders, name):
    reward = parse([f"{name}:{folders[name]}"])
    with pytest.raises(KeyError), reward.on("cuda"):
        assert {parameter.device.type for parameter in reward.parameters()} == {"cuda"}
        for images in (pictures(name), pictures(name).cuda()):
            scores = reward(images, PROMPTS)["reward"]
            assert scores.device.type == "cpu"
            assert torch.allclose(scores, models[name](pictures(name), PROMPTS), rtol=1e-3, atol=1e-3)
        raise KeyError
    assert {tensor.device.type for tensor in (*reward.parameters(), *reward.buffers())} == {"cpu"}


# -------------------------------------------------------------------------------------------------------------- bad input


EXPECTED = "expected one of clip_score:FOLDER, .*, image_reward:FOLDER, FILE.py:FUNCTION, a clip_score folder"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("clip_scor:FOLDER", f"reward 'clip_scor:.*': no such reward or folder; {EXPECTED}"),
        ("no-such-folder", f"reward 'no-such-folder': no such reward or folder; {EXPECTED}"),
        ("clip_score", f"reward 'clip_score': no such reward or folder; {EXPECTED}"),
        ("clip_score:", f"reward 'clip_score:': no such reward or folder; {EXPECTED}"),
        ("clip_score:nowhere", "nowhere/config.json: no such file"),
        ("image_reward:nowhere", "nowhere: no such file or folder"),
        ("clip_score:FOLDER@half", "FOLDER@half/config.json: no such file"),
        ("clip_score:FOLDER@inf", "reward '.*@inf': the weight is inf; expected a finite number"),
        ("clip_score:FOLDER@nan", "reward '.*@nan': the weight is nan; expected a finite number"),
        ("nowhere.py:bright", "nowhere.py: no such file; expected one with the reward function 'bright'"),
        ("FILE:dark", "mine.py: no function 'dark' in it"),
        ("FILE:", "mine.py: no function '' in it"),
        ("FILE:number", "mine.py: no function 'number' in it"),
    ],
)
def test_a_wrong_reward_is_named(folders, tmp_path, spec, message):
    file = own(tmp_path, BRIGHT + "number = 3\n")
    spec = spec.replace("FOLDER", str(folders["clip_score"])).replace("FILE", file)
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("FOLDER@", f"{folders['clip_score']}@")) as error:
        parse([spec])
    assert "\n" not in str(error.value)


def test_a_name_stands_for_one_reward(folders, tmp_path):
    clip, file = folders["clip_score"], own(tmp_path, BRIGHT + "reward = clip_score = bright\n")
    for second in (f"clip_score:{clip}@2", f"{file}:clip_score"):
        with pytest.raises(ValueError, match=f"reward '{second}': clip_score is named twice"):
            parse([str(clip), second])
    with pytest.raises(ValueError, match=f"reward '{file}:reward': reward is what the sum is called"):
        parse([str(clip), f"{file}:reward"])
    parse([f"{file}:reward"])


MISSING = {  # a reward, a file that it needs, what is said without it
    "vocab.json": ("clip_score", "tokenizer.json: no such file, nor CLIP's vocab.json and merges.txt"),
    "merges.txt": ("pick_score", "merges.txt: no such file; vocab.json needs it"),
    "tokenizer_config.json": ("clip_score", "tokenizer_config.json: no such file"),
    "preprocessor_config.json": ("pick_score", "preprocessor_config.json: no such file"),
    "model.safetensors": ("clip_score", "no model.safetensors"),
    "aesthetic.safetensors": ("aesthetic", "aesthetic.safetensors: no such file; it is the converted predictor"),
    "vocab.txt": ("blip_score", "no tokenizer.json and no vocab.txt in this folder"),
    "config.json": ("blip_itm", "config.json: no such file"),
    "ImageReward.safetensors": ("image_reward", "no ImageReward.safetensors"),
    "med_config.json": ("image_reward", "med_config.json: no such file"),
}


@pytest.mark.parametrize("file", MISSING)
def test_a_missing_file_is_named(folders, tmp_path, file):
    name, message = MISSING[file]
    shutil.copytree(folders[name], tmp_path / "folder")
    (tmp_path / "folder" / file).unlink()
    with pytest.raises(FileNotFoundError, match=message) as error:
        parse([f"{name}:{tmp_path / 'folder'}"])
    assert str(tmp_path / "folder") in str(error.value) and "\n" not in str(error.value)


def test_bad_files_are_named(folders, tmp_path):
    clip = shutil.copytree(digits.HERE / "clip", tmp_path / "clip")
    (clip / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5]}))
    with pytest.raises(ValueError, match="preprocessor_config.json: keys 'image_mean' and 'image_std' are missing"):
        ClipScore(clip)
    assert PromptTokenizer(clip).pad == 1
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
    aesthetic = shutil.copytree(folders["aesthetic"], tmp_path / "aesthetic")
    file = aesthetic / "aesthetic.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"layers.0.weight": torch.zeros(1024, 768)}, file)  # of a ViT-L/14
    with pytest.raises(ValueError, match=r"key 'layers.0.weight' has shape \[1024, 768\]; expected \[1024, 24\]"):
        parse([f"aesthetic:{aesthetic}"])
    save_file({name: tensor for name, tensor in tensors.items() if name != "layers.7.bias"}, file)
    with pytest.raises(ValueError, match=f"{file}: key 'layers.7.bias' is missing"):
        parse([f"aesthetic:{aesthetic}"])
    with pytest.raises(ValueError, match="'model_type' is 'clip'; expected 'blip'"):
        parse([f"blip_score:{folders['clip_score']}"])


@pytest.mark.parametrize(
    "body, message",
    [
        ("return [1.0]", r"f gave rewards of shape \[1\]; expected \[4\], one a sample"),
        ("return images.mean()", r"f gave rewards of shape \[\]; expected \[4\]"),
        ("return images.mean(dim=(2, 3))", r"f gave rewards of shape \[4, 3\]; expected \[4\]"),
        ("return None", r"f gave NoneType; expected \[4\] numbers"),
        ("return prompts", r"f gave list; expected \[4\] numbers"),
        ("return [[1], [1, 2], [1], [1]]", r"f gave list; expected \[4\] numbers"),
        ("return [10**400] * 4", r"f gave list; expected \[4\] numbers"),
        ("return 1 / 0", "mine.py, line 2: ZeroDivisionError: division by zero"),
        ("raise RuntimeError('first\\nsecond')", "mine.py, line 2: RuntimeError: first$"),
        ("return images @ prompts", "mine.py, line 2: TypeError: "),
        ("return images.reshape(7)", "mine.py, line 2: RuntimeError: shape"),
    ],
)
def test_a_wrong_answer_of_a_function_is_one_line(tmp_path, body, message):
    file = own(tmp_path, f"def f(images, prompts):\n    {body}\n")
    with pytest.raises(ValueError, match=message) as error:
        parse([f"{file}:f"])(pictures("clip_score"), PROMPTS)
    assert "\n" not in str(error.value)


def test_numbers_of_any_kind_are_read(tmp_path):
    for numbers in ("np.arange(4.0)[::-1]", "(3, 2, 1, 0)", "range(3, -1, -1)", "[np.float32(x) for x in (3, 2, 1, 0)]"):
        file = own(tmp_path, f"import numpy as np\ndef f(images, prompts):\n    return {numbers}\n")
        assert parse([f"{file}:f"])(pictures("clip_score"), PROMPTS)["reward"].tolist() == [3, 2, 1, 0]


def test_samples_without_a_prompt_each_are_refused(folders):
    with pytest.raises(ValueError, match="1 samples and 4 prompts; expected a prompt for each sample"):
        parse([str(folders["clip_score"])])(pictures("clip_score")[:1], PROMPTS)


@pytest.mark.parametrize(
    "text, message", [("def f(:\n", "mine.py, as a whole: SyntaxError: "), ("\nx = y\n", "mine.py, line 2: Name")]
)
def test_a_file_that_does_not_run_is_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse([f"{own(tmp_path, text)}:f"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_names_reward_and_prompt(folders, tmp_path, value):
    file = own(tmp_path, f"def odd(images, prompts):\n    return [0, float('{value}'), 0, float('nan')]\n")
    reward = parse([str(folders["clip_score"]), f"{file}:odd"])
    with pytest.raises(FloatingPointError, match=r"a reward of the prompt 'a cat in paris' is not finite \(odd\)"):
        reward(pictures("clip_score"), PROMPTS)
