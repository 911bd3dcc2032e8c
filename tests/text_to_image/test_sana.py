"""SANA's own: what Gemma makes of prompts and of negative ones, the scheduler's file, what is saved."""

import json
import shutil
import warnings

import pytest
import tiny
import tiny_sana
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo import ode
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.text_to_image.prompts import cached
from nano_adrpo.text_to_image.sana import INSTRUCTION, PromptEncoder

PROMPTS = ["A Photo of a CAT", "two blue dogs, and a very small bird", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sana.folder(tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="module")
def sana(folder):
    return TextToImage.from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "sana")


def same(a, b):
    return torch.equal(a.context, b.context) and torch.equal(a.mask, b.mask)


# ----------------------------------------------------------------------------------------------------------------- prompts


@torch.no_grad()
def test_the_window_is_bos_and_what_follows_the_instruction(sana):
    encoder, condition = sana.prompt_encoder, sana.encode(PROMPTS)
    assert condition.context.shape == (3, 300, 20) and condition.mask.shape == (3, 300) and condition.pooled is None
    tokenizer = encoder.tokenizer.tokenizer
    begin = len(tokenizer.encode(INSTRUCTION).ids)
    for row, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(INSTRUCTION + prompt.lower()).ids
        hidden = encoder.gemma(torch.tensor([ids]))[0]  # alone, without padding
        kept = torch.cat([hidden[:1], hidden[begin - 1 :]])
        assert condition.mask[row].tolist() == [1] * len(kept) + [0] * (300 - len(kept))
        torch.testing.assert_close(condition.context[row, : len(kept)], kept, atol=1e-5, rtol=0)
        assert not condition.context[row, len(kept) :].any()
    # The blank at the instruction's end and the prompt's first letter are one token, which the window begins with.
    window = tokenizer.encode(INSTRUCTION + "cat").tokens[begin - 1 :]
    assert "".join(window) == "▁cat" and window[0] != "▁" == tokenizer.encode(INSTRUCTION).tokens[-1]


@torch.no_grad()
def test_a_negative_prompt_stands_without_the_instruction(sana):
    encoder, condition = sana.prompt_encoder, sana.encode(["", "blurry"], negative=True)
    ids = encoder.tokenizer.tokenizer.encode("blurry").ids
    assert condition.context.shape == (2, 300, 20) and condition.mask.sum(1).tolist() == [1, len(ids)]  # <bos> alone
    torch.testing.assert_close(condition.context[1, : len(ids)], encoder.gemma(torch.tensor([ids]))[0], atol=1e-5, rtol=0)
    assert not same(condition, sana.encode(["", "blurry"]))
    plain = TextToImage(sana.transformer, PromptEncoder(encoder.gemma, encoder.tokenizer, instruction=""))
    assert same(plain.encode(["", "blurry"]), condition)


def test_prompts_are_lower_cased_unless_it_is_switched_off(folder, sana):
    kept = TextToImage.from_pretrained(folder, lower=False)
    assert same(sana.encode(["  A CAT "]), sana.encode(["a cat"])) and same(kept.encode(["a cat "]), sana.encode(["a cat"]))
    for negative in (False, True):
        assert not same(kept.encode(["A CAT"], negative), sana.encode(["A CAT"], negative))


def test_batches_change_nothing(sana):
    together = sana.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = sana.encode([prompt])
        assert torch.equal(alone.mask[0], together.mask[row])
        torch.testing.assert_close(alone.context[0], together.context[row], atol=1e-5, rtol=0)
    for bad in ("a photo", [], [1]):
        with pytest.raises(ValueError, match="expected a list of strings"):
            sana.encode(bad)


def test_a_long_prompt_loses_its_end_and_is_reported_once(folder):
    model = TextToImage.from_pretrained(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for negative in (False, True):
            cut = model.encode(["x" * 400], negative)
            model.encode(["x" * 400, "a"], negative)
            assert cut.mask.all() and torch.equal(cut.context, model.encode(["x" * 500], negative).context)
    assert len(caught) == 2 and all("tokens and is cut to 300" in str(one.message) for one in caught)


def test_embeddings_are_kept_for_both_roles(folder, sana, tmp_path, monkeypatch):
    file = tmp_path / "prompts.safetensors"
    first = cached(file, PROMPTS, "Blurry", folder)
    assert same(first[0], sana.encode(PROMPTS)) and same(first[1], sana.encode(["Blurry"], negative=True))
    with monkeypatch.context() as patch:
        patch.setattr(PromptEncoder, "from_pretrained", lambda *_, **__: pytest.fail("an encoder was loaded"))
        again = cached(file, PROMPTS, "Blurry", folder, lower=True)  # which it is without being told
    assert same(again[0], first[0]) and same(again[1], first[1]) and again[0].mask.dtype == torch.int64
    assert not same(cached(file, PROMPTS, "Blurry", folder, lower=False)[0], first[0])


# --------------------------------------------------------------------------------------------------------- times and sizes


def test_times_are_euler_steps_on_sd3s_grid_with_the_files_shift(folder, copy):
    where = copy / "scheduler" / "scheduler_config.json"
    euler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 2.0}
    for values, shift in ((tiny_sana.DPM, 3.0), (tiny_sana.DPM | {"flow_shift": 1.5}, 1.5), (euler, 2.0)):
        tiny.write_json(where, values)
        model = TextToImage.from_pretrained(copy, encoders=False)
        assert torch.equal(model.times(5), ode.sd3_time_grid(5, shift)) and torch.equal(
            model.times(5, 4.0), ode.sd3_time_grid(5, 4.0)
        )
    shutil.rmtree(where.parent)
    assert torch.equal(TextToImage.from_pretrained(copy, encoders=False).times(5), ode.sd3_time_grid(5, 3.0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prediction_type": "epsilon"}, "key 'prediction_type' is 'epsilon'; expected 'flow_prediction'"),
        ({"prediction_type": None}, "key 'prediction_type' is missing; expected 'flow_prediction'"),
        ({"use_flow_sigmas": False}, "key 'use_flow_sigmas' is False; expected True"),
        ({"flow_shift": 0}, "key 'shift' is 0; expected a positive float"),
        ({"_class_name": "DDIMScheduler"}, "key '_class_name' is 'DDIMScheduler'; expected 'FlowMatchEulerDiscreteScheduler'"),
    ],
)
def test_another_sampler_is_refused(copy, change, message):
    where = copy / "scheduler" / "scheduler_config.json"
    tiny.write_json(where, {key: value for key, value in (tiny_sana.DPM | change).items() if value is not None})
    with pytest.raises(ValueError, match=f"{where}: {message}"):
        TextToImage.from_pretrained(copy, device="meta", encoders=False)


def test_sizes(sana):
    assert sana.factor == 4 and sana.latent_shape == (4, 4, 4) and sana.latent_shape_at((64, 4)) == (4, 16, 1)
    with pytest.raises(ValueError, match="resolution 30: expected a multiple of 4 "):
        sana.latent_shape_at(30)


# ------------------------------------------------------------------------------------------------------------------ files


@torch.no_grad()
def test_what_is_saved_opens_again_with_the_same_images(sana, tmp_path):
    sana.save_pretrained(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index == {
        "_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"],
        "text_encoder": ["transformers", "Gemma2Model"], "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "vae": ["diffusers", "AutoencoderDC"], "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }  # fmt: skip
    again, x0 = TextToImage.from_pretrained(tmp_path / "out"), torch.randn(2, 4, 6, 4)
    images = []
    for model in (sana, again):
        condition, negative = model.encode(["a cat", ""]), model.encode(["ugly"], negative=True)
        images.append(model.draw(x0, condition, model.times(3), negative, guidance=4.5)[1])
    assert images[0].shape == (2, 3, 24, 16) and torch.equal(*images)
    assert not torch.equal(model.draw(x0, condition, model.times(3))[1], images[1])


def test_meta_reads_no_tensor(folder):
    model = TextToImage.from_pretrained(folder, torch.bfloat16, "meta")
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in (*model.transformer.parameters(), *model.vae.parameters()))


def test_parts_that_are_missing_or_do_not_fit(folder, copy, tmp_path):
    def refused(message, error=ValueError):
        with pytest.raises(error) as caught:
            TextToImage.from_pretrained(copy)
        assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)

    for part, what in (
        ("transformer", "no transformer/ in it; expected a folder"), ("vae", "no such folder; it turns latents into images"),
        ("text_encoder", "no such folder; it encodes the prompts (Gemma 2)"),
        ("tokenizer", "no such folder; it splits the prompts for text_encoder"),
    ):  # fmt: skip
        (copy / part).rename(tmp_path / "away")
        refused(what, FileNotFoundError)
        (tmp_path / "away").rename(copy / part)
    for part, change, message in (
        ("transformer", {"qk_norm": None}, "key 'qk_norm' is None"),
        ("transformer", {"caption_channels": 24}, "key 'caption_projection.linear_1.weight' has shape"),
        ("vae", {"_class_name": "AutoencoderKL"}, "key '_class_name' is 'AutoencoderKL'; expected 'AutoencoderDC'"),
        ("text_encoder", {"model_type": "t5"}, "key 'model_type' is 't5'"),
        ("text_encoder", {"vocab_size": 40}, "key 'embed_tokens.weight' has shape [500, 20]; expected [40, 20]"),
    ):
        where = copy / part / "config.json"
        values = where.read_text()
        tiny.write_json(where, json.loads(values) | change)
        refused(message)
        where.write_text(values)
    index = json.loads((copy / "model_index.json").read_text())
    tiny.write_json(copy / "model_index.json", index | {"_class_name": "SanaVideoPipeline"})
    refused("'_class_name' is 'SanaVideoPipeline'; expected 'StableDiffusion3Pipeline' or ")


def test_a_tokenizer_of_more_words_than_gemma_knows_is_named(copy):
    file = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"embed_tokens.weight": tensors["embed_tokens.weight"][:300].clone()}, file)
    where = copy / "text_encoder" / "config.json"
    tiny.write_json(where, json.loads(where.read_text()) | {"vocab_size": 300})
    with pytest.raises(ValueError, match=f"{copy / 'tokenizer'}: gives a token the id 4.*; expected less than its encoder"):
        TextToImage.from_pretrained(copy).encode(["a cat"])
