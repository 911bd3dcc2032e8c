"""SD3's own: what its encoders make of prompts, where the parts of a release are found, its scheduler."""

import json
import shutil
import warnings

import pytest
import tiny
import tiny_sd3
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo.demo import digits
from nano_adrpo.models.clip import CLIPText
from nano_adrpo.models.t5 import T5Encoder
from nano_adrpo.models.tokenizers import PromptTokenizer
from nano_adrpo.text_to_image import Condition, TextToImage
from nano_adrpo.text_to_image.sd3 import PromptEncoder

BASE = digits.HERE / "base"
PROMPTS = ["the one", "a photo of 12 Rings!", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sd3.folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def sd3(folder):
    return TextToImage.from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "sd3")


def same(a, b):
    return torch.equal(a.context, b.context) and torch.equal(a.pooled, b.pooled)


def states(model):
    """Every tensor of every part."""
    encoder = model.prompt_encoder
    parts = {"transformer": model.transformer, "vae": model.vae, "text_encoder": encoder.clips[0]}
    parts |= {"text_encoder_2": encoder.clips[1]} | ({"text_encoder_3": encoder.t5} if encoder.t5 else {})
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


def agree(a, b):
    """The same tensors, the same conditions."""
    x, y = states(a), states(b)
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert same(a.encode(["the one", ""]), b.encode(["the one", ""]))


# ----------------------------------------------------------------------------------------------------------------- encoding


@torch.no_grad()
def test_the_encoders_stand_where_sd3_wants_them(folder):
    condition = PromptEncoder.from_pretrained(folder).encode(PROMPTS)
    assert condition.context.shape == (3, 77 + 256, 224) and condition.pooled.shape == (3, 192)
    small, large = (CLIPText.from_pretrained(folder / f"text_encoder{suffix}") for suffix in ("", "_2"))
    ids = [PromptTokenizer(folder / f"tokenizer{suffix}") for suffix in ("", "_2", "_3")]
    (hidden, pooled), (hidden_2, pooled_2) = small(ids[0](PROMPTS, 77)), large(ids[1](PROMPTS, 77))
    t5 = T5Encoder.from_pretrained(folder / "text_encoder_3")(ids[2](PROMPTS, 256))
    expected = torch.zeros(3, 333, 224)
    expected[:, :77, :64], expected[:, :77, 64:192], expected[:, 77:] = hidden, hidden_2, t5
    assert torch.equal(condition.context, expected)
    assert torch.equal(condition.pooled, torch.cat([pooled, pooled_2], dim=1))
    assert t5[2, 1:].abs().min() > 0  # padding is encoded, not masked


@torch.no_grad()
def test_a_release_without_t5_has_zeros_there(folder, copy):
    whole = PromptEncoder.from_pretrained(folder).encode(PROMPTS)
    zeros = PromptEncoder.from_pretrained(folder, t5="zeros").encode(PROMPTS)
    assert torch.equal(zeros.context[:, :77], whole.context[:, :77]) and zeros.context.shape == whole.context.shape
    assert zeros.context[:, 77:].abs().max() == 0 and whole.context[:, 77:].abs().max() > 0
    index = json.loads((copy / "model_index.json").read_text())
    tiny.write_json(copy / "model_index.json", index | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    assert same(PromptEncoder.from_pretrained(copy).encode(PROMPTS), zeros)  # as diffusers, whatever lies in the folder
    shutil.rmtree(copy / "text_encoder_3")
    cut = Condition(zeros.context[:, : 77 + 9], zeros.pooled)
    assert same(PromptEncoder.from_pretrained(copy, t5_tokens=9).encode(PROMPTS), cut)
    # Without the entry the model has no third encoder at all, and no tokens of one.
    tiny.write_json(copy / "model_index.json", {key: value for key, value in index.items() if not key.endswith("_3")})
    assert PromptEncoder.from_pretrained(copy).encode(PROMPTS).context.shape == (3, 77, 224)


@torch.no_grad()
def test_streaming_t5_changes_no_bit(folder):
    whole = PromptEncoder.from_pretrained(folder)
    assert same(PromptEncoder.from_pretrained(folder, t5="stream").encode(PROMPTS), whole.encode(PROMPTS))


def test_prompts_are_encoded_once_each_and_in_batches(folder):
    encoder = PromptEncoder.from_pretrained(folder)
    seen, plain = [], encoder._encode
    encoder._encode = lambda prompts, negative: seen.append(prompts) or plain(prompts, negative)
    condition = encoder.encode(["b", "a", "b", "c", "a"], batch=2)
    assert seen == [["b", "a"], ["c"]]
    alone = encoder.encode(["a"])
    for row in (1, 4):
        assert torch.allclose(condition.context[row], alone.context[0], atol=1e-5)
    assert torch.equal(condition.context[0], condition.context[2])
    for bad in ("a photo", [], [1]):
        with pytest.raises(ValueError, match="expected a list of strings"):
            encoder.encode(bad)


def test_a_prompt_of_300_tokens_is_reported_once(folder):
    encoder = PromptEncoder.from_pretrained(folder)
    long = "the " * 298
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        condition = encoder.encode([long, "the one"])
        encoder.encode(["the one", long])
    assert len(caught) == 1 and "has 300 tokens and is cut to 77" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        longer = PromptEncoder.from_pretrained(folder).encode(["the " * 300, "the one"])
    assert same(condition, longer)  # both keep 75 words in CLIP and 255 in T5


def test_clips_see_as_many_tokens_as_their_tokenizer_says(copy):
    for suffix in ("", "_2"):
        file = copy / f"tokenizer{suffix}" / "tokenizer_config.json"
        tiny.write_json(file, json.loads(file.read_text()) | {"model_max_length": 5.0})  # a JSON number
    encoder = PromptEncoder.from_pretrained(copy, t5="zeros", t5_tokens=3)
    with pytest.warns(UserWarning, match="has 6 tokens and is cut to 5"):
        assert encoder.encode(["the one the one"]).context.shape == (1, 5 + 3, 224)


@torch.no_grad()
def test_a_single_file_has_the_same_encoders(folder, tmp_path):
    expected = PromptEncoder.from_pretrained(folder).encode(PROMPTS)
    file = tiny_sd3.single_file(tmp_path / "sd3_medium_incl_clips_t5xxlfp16.safetensors", folder)
    only_tokenizers = tmp_path / "base"
    for suffix in ("", "_2", "_3"):
        shutil.copytree(folder / f"tokenizer{suffix}", only_tokenizers / f"tokenizer{suffix}")
    assert same(PromptEncoder.from_pretrained(file, base=only_tokenizers).encode(PROMPTS), expected)
    clips = tiny_sd3.single_file(tmp_path / "incl_clips.safetensors", folder, [*tiny_sd3.PREFIXES][:4])
    assert same(PromptEncoder.from_pretrained(clips, base=folder).encode(PROMPTS), expected)  # T5 from base
    zeros = PromptEncoder.from_pretrained(clips, base=only_tokenizers, t5="zeros").encode(PROMPTS)
    assert zeros.context.shape == (3, 333, 224) and zeros.context[:, 77:].abs().max() == 0
    with pytest.raises(
        FileNotFoundError, match=f"{clips}: no text_encoder_3 in this file, nor in {only_tokenizers}; it encodes"
    ):
        PromptEncoder.from_pretrained(clips, base=only_tokenizers)
    # A base that does without T5 takes none from a file that has it.
    tiny.write_json(only_tokenizers / "model_index.json", {"text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    with_t5, without = (PromptEncoder.from_pretrained(path, base=only_tokenizers) for path in (file, clips))
    assert same(with_t5.encode(PROMPTS), expected) and same(without.encode(PROMPTS), zeros)


def test_one_clip_is_enough_and_two_stand_side_by_side(tmp_path):
    shutil.copytree(BASE, tmp_path / "two")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(BASE / part, tmp_path / "two" / f"{part}_2")
    with pytest.raises(ValueError, match="the text encoders give width 128 and pooled width 64"):
        PromptEncoder.from_pretrained(tmp_path / "two")
    one = PromptEncoder.from_pretrained(BASE)
    both = PromptEncoder(one.clips * 2, one.tokenizers * 2, width=150)
    condition, single = both.encode(["a red one"]), one.encode(["a red one"])
    assert condition.context.shape == (1, 11, 150) and condition.pooled.shape == (1, 64)
    assert torch.equal(condition.context[..., 64:128], single.context[..., :64])
    assert condition.context[..., 128:].abs().max() == 0


def test_encoders_that_do_not_fit_are_refused(copy):
    with pytest.raises(ValueError, match="t5 is 'none', of 256 tokens; expected 'load', 'stream' or 'zeros'"):
        PromptEncoder.from_pretrained(copy, t5="none")
    with pytest.raises(ValueError, match="t5 is 'load', of 513 tokens"):
        PromptEncoder.from_pretrained(copy, t5_tokens=513)
    shutil.rmtree(copy / "tokenizer_3")
    shutil.copytree(copy / "tokenizer", copy / "tokenizer_3")  # of 525 tokens, where T5 has 300
    with pytest.raises(ValueError, match=f"{copy / 'tokenizer_3'}: gives a token the id 524; expected less than .* 300 tokens"):
        PromptEncoder.from_pretrained(copy).encode(PROMPTS)


# ------------------------------------------------------------------------------------------------------------------ release


@pytest.mark.parametrize("t5", [True, False])
def test_folders_round_trip(tmp_path, t5):
    model = TextToImage.from_pretrained(tiny_sd3.folder(tmp_path / "sd3", t5))
    model.save_pretrained(tmp_path / "out")
    agree(TextToImage.from_pretrained(tmp_path / "out"), model)
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        old, new = (json.loads((tmp_path / name / file).read_text()) for name in ("sd3", "out"))
        assert new == old
    for part in ("tokenizer", "tokenizer_2"):
        assert (tmp_path / "out" / part / "merges.txt").read_bytes() == (tmp_path / "sd3" / part / "merges.txt").read_bytes()


def test_a_streamed_t5_is_not_copied(sd3, folder, tmp_path):
    TextToImage.from_pretrained(folder, t5="stream").save_pretrained(tmp_path)
    assert not (tmp_path / "text_encoder_3").exists()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'text_encoder_3'}: no such folder; it encodes the prompts"):
        TextToImage.from_pretrained(tmp_path)
    agree(TextToImage.from_pretrained(tmp_path, base=folder), sd3)


@torch.no_grad()
def test_stabilitys_single_file(sd3, folder, tmp_path):
    file = tiny_sd3.single_file(tmp_path / "sd3_medium_incl_clips_t5xxlfp16.safetensors", folder)
    model = TextToImage.from_pretrained(file, base=folder)
    agree(model, sd3)
    assert model.scheduler.shift == 3.0 and model.latent_shape == (
        16,
        24,
        24,
    )  # 128 latents in the releases, or what the table holds
    bare = tiny_sd3.single_file(tmp_path / "sd3_medium.safetensors", folder, ["transformer", "vae"])
    agree(TextToImage.from_pretrained(bare, base=folder), sd3)
    alone = TextToImage.from_pretrained(bare, encoders=False)
    assert alone.prompt_encoder is None and alone.scheduler.shift == 3.0
    model.save_pretrained(tmp_path / "out")  # and out in the other layout
    agree(TextToImage.from_pretrained(tmp_path / "out"), sd3)


def test_a_trained_transformer_alone_is_completed_by_its_base(sd3, folder, tmp_path):
    tuned = TextToImage.from_pretrained(folder, encoders=False)
    tuned.vae = None
    with torch.no_grad():
        tuned.transformer.proj_out.bias.add_(1)
    tuned.save_pretrained(tmp_path / "tuned")
    assert {file.name for file in (tmp_path / "tuned").iterdir()} == {"transformer", "scheduler", "model_index.json"}
    model = TextToImage.from_pretrained(tmp_path / "tuned", base=folder)
    assert torch.equal(model.transformer.proj_out.bias, sd3.transformer.proj_out.bias + 1)
    assert same(model.encode(["the one"]), sd3.encode(["the one"])) and model.vae and model.scheduler.shift == 3.0
    for path, base, message in (
        (tmp_path / "tuned", None, f"{tmp_path / 'tuned' / 'vae'}: no such folder; it turns latents into images"),
        (tmp_path / "tuned", tmp_path / "nowhere", "nowhere: no such folder; expected one in diffusers' pipeline layout"),
        (tmp_path / "nowhere", folder, "nowhere: no such file or folder; expected a folder"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            TextToImage.from_pretrained(path, base=base)


def test_everything_opens_on_meta(folder):
    model = TextToImage.from_pretrained(folder, device="meta")
    assert {tensor.device.type for tensor in states(model).values()} == {"meta"}


def test_a_missing_part_is_named_with_what_it_is_for(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for part, what in (
        ("vae", "it turns latents into images"),
        ("tokenizer_2", "it splits the prompts for text_encoder_2"),
        ("text_encoder", r"it encodes the prompts \(CLIP-L\)"),
        ("text_encoder_3", r"it encodes the prompts \(T5; t5='zeros' does without\)"),
    ):
        copy = shutil.copytree(folder, tmp_path / part)
        shutil.rmtree(copy / part)
        for base, nor in ((None, ""), (tmp_path / "empty", f", nor in {tmp_path / 'empty'}")):
            with pytest.raises(FileNotFoundError, match=f"{copy / part}: no such folder{nor}; {what}") as error:
                TextToImage.from_pretrained(copy, base=base)
            assert "\n" not in str(error.value)
        (copy / part).mkdir()  # as a download that was refused leaves it
        with pytest.raises(FileNotFoundError, match=f"{copy / part}"):
            TextToImage.from_pretrained(copy)


def test_a_single_file_without_a_part_says_which(folder, tmp_path):
    for parts, message in (
        (["transformer", "vae"], "no text_encoder in this file; it encodes the prompts .*base=FOLDER"),
        (["transformer"], "no vae in this file; it turns latents into images"),
        ([*tiny_sd3.PREFIXES], "no tokenizer in this file; it splits the prompts for text_encoder"),
    ):
        file = tiny_sd3.single_file(tmp_path / f"{len(parts)}.safetensors", folder, parts)
        with pytest.raises(FileNotFoundError, match=f"{file}: {message}"):
            TextToImage.from_pretrained(file)
    for name, tensors, message in (
        ("flux", {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "expected 'FluxPipeline'"),
        ("empty", {}, "empty.safetensors: "),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")  # whose transformer is not the base's
        with pytest.raises(ValueError, match=message):
            TextToImage.from_pretrained(tmp_path / f"{name}.safetensors", base=folder)


def test_a_broken_folder_is_named(tmp_path):
    other = '{"_class_name": "PixArtSigmaPipeline"}'
    for number, (break_it, message) in enumerate(
        (
            (lambda f: shutil.rmtree(f / "transformer"), "no transformer/ in it; expected a folder in diffusers' pipeline"),
            (lambda f: (f / "vae").mkdir(), "vae/config.json: no such file"),
            (
                lambda f: (f / "model_index.json").write_text(other),
                "'PixArtSigmaPipeline'; expected 'StableDiffusion3Pipeline'",
            ),
            (lambda f: (f / "transformer" / "config.json").write_text("{"), "config.json: not valid JSON"),
        )
    ):
        folder = shutil.copytree(BASE, tmp_path / str(number))
        break_it(folder)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            TextToImage.from_pretrained(folder)


def test_an_autoencoder_of_other_latents_is_refused(copy):
    config = json.loads((copy / "transformer" / "config.json").read_text())
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["pos_embed.proj.weight"] = tensors["pos_embed.proj.weight"][:, :4].contiguous()
    save_file(tensors, file)
    tiny.write_json(copy / "transformer" / "config.json", config | {"in_channels": 4})
    with pytest.raises(ValueError, match="vae: the autoencoder's latents have 16 channels; the transformer expects 4"):
        TextToImage.from_pretrained(copy, encoders=False)


# ---------------------------------------------------------------------------------------------------------------- scheduler


def test_a_scheduler_that_is_not_sd3s_is_refused(copy):
    file = copy / "scheduler" / "scheduler_config.json"
    values = json.loads(file.read_text())
    for change, message in (
        ({"shift": None}, "key 'shift' is None; expected a positive float"),
        ({"shift": "3"}, "key 'shift' is '3'; expected a positive float"),
        ({"num_train_timesteps": 0}, "key 'num_train_timesteps' is 0; expected a positive int"),
        ({"use_dynamic_shifting": True}, "key 'use_dynamic_shifting' is True; expected False"),
        ({"use_karras_sigmas": True}, "key 'use_karras_sigmas' is True; expected False"),
        ({"shift_terminal": 0.1}, "key 'shift_terminal' is 0.1; expected None"),
        ({"_class_name": "DDIMScheduler"}, "key '_class_name' is 'DDIMScheduler'; expected 'FlowMatchEulerDiscreteScheduler'"),
    ):
        tiny.write_json(file, values | change)
        with pytest.raises(ValueError, match=f"{file}: {message}"):
            TextToImage.from_pretrained(copy, device="meta")


@torch.no_grad()
def test_the_network_is_told_of_time_in_the_schedulers_steps(copy, sd3):
    file = copy / "scheduler" / "scheduler_config.json"
    tiny.write_json(file, {"num_train_timesteps": 500})
    model, condition = TextToImage.from_pretrained(copy, encoders=False), sd3.encode(["the one"])
    x = torch.randn(1, *sd3.latent_shape_at(16), generator=torch.Generator().manual_seed(0))
    network = sd3.transformer(x, torch.tensor([0.125]), condition.context, condition.pooled)  # half of 1 − t
    assert torch.equal(model.velocity(x, 0.75, condition), -network)
    assert model.scheduler.shift == 1.0 and model.times(2).tolist() == pytest.approx([0, 0.998, 1])  # 1 − 1/500
