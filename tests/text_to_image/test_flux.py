"""FLUX's own: its time grid, what its encoders make of prompts, its release in both layouts; and the scripts with it."""

import json
import math
import shutil
import warnings

import pytest
import scripts
import tiny
import tiny_flux
import tiny_rewards
import tiny_sd3
import torch

import train_flow
from nano_adrpo import evaluate, lora, ode, sample
from nano_adrpo.models.clip import CLIPText
from nano_adrpo.models.flux import Config
from nano_adrpo.models.t5 import T5Encoder
from nano_adrpo.models.tokenizers import PromptTokenizer
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.text_to_image.flux import PromptEncoder, Scheduler
from nano_adrpo.text_to_image.prompts import cached

PROMPTS = ["the one", "a photo of 12 Rings!", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flux.folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def flux(folder):
    return TextToImage.from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "flux")


def change(file, **values):
    tiny.write_json(file, json.loads(file.read_text()) | values)


def same(a, b):
    return a.tensors().keys() == b.tensors().keys() and all(map(torch.equal, a.tensors().values(), b.tensors().values()))


def agree(a, b):
    for x, y in ((a.transformer, b.transformer), (a.vae, b.vae), (a.prompt_encoder.clip, b.prompt_encoder.clip)):
        x, y = x.state_dict(), y.state_dict()
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert same(a.encode(["the one", ""]), b.encode(["the one", ""])) and a.vae.config == b.vae.config


# --------------------------------------------------------------------------------------------------------------------- time


def test_the_grid_of_dev_depends_on_the_image(flux):
    for pixels, shift in ((256, math.exp(0.5)), (512, 1.8776), (768, 2.33186), (1024, 3.15819), (1280, math.exp(1.54))):
        times = flux.times(4, shape=flux.latent_shape_at(pixels))
        assert torch.allclose(times, ode.time_grid(4, shift), atol=1e-5)
    assert flux.latent_shape == (16, 128, 128) and torch.equal(flux.times(4), flux.times(4, shape=(16, 128, 128)))
    assert (1 - flux.times(4)).tolist() == pytest.approx([1, 0.904531, 0.759511, 0.512844, 0], abs=1e-6)
    assert torch.equal(flux.times(4, shape=(16, 64, 256)), flux.times(4))  # as many tokens
    assert torch.equal(flux.times(4, 2.0, (16, 8, 8)), ode.time_grid(4, 2.0))


def test_schnell_has_a_plain_grid(copy):
    # A single file has no scheduler: its weights tell which it is.
    for guided, shift in ((True, math.exp(1.15)), (False, 1.0)):
        scheduler = Scheduler.of(Config(**tiny_flux.FLUX | {"guidance_embeds": guided}))
        assert torch.allclose(scheduler.times(4, None, (16, 128, 128), "cpu"), ode.time_grid(4, shift))
    tiny.write_json(copy / "scheduler" / "scheduler_config.json", {"shift": 1.0, "use_dynamic_shifting": False})
    assert torch.equal(TextToImage.from_pretrained(copy, device="meta", encoders=False).sampler.times(4, None, None, "cpu"),
                       ode.time_grid(4))  # fmt: skip


def test_resolutions(flux):
    assert flux.factor == 8 and flux.latent_shape_at(48) == (16, 6, 6) and flux.latent_shape_at((4096, 16)) == (16, 512, 2)
    for resolution in (40, (64, 72), 0, -16):
        with pytest.raises(ValueError, match="expected a multiple of 16 .*, above 0"):
            flux.latent_shape_at(resolution)


# ----------------------------------------------------------------------------------------------------------------- encoding


@torch.no_grad()
def test_t5_gives_the_context_and_clip_the_pooled_vector(folder, flux):
    condition = flux.encode(PROMPTS)
    assert condition.context.shape == (3, 512, 224) and condition.pooled.shape == (3, 64) and condition.mask is None
    clip, t5 = (
        CLIPText.from_pretrained(folder / "text_encoder", projected=False),
        T5Encoder.from_pretrained(folder / "text_encoder_2"),
    )
    ids, ids_2 = PromptTokenizer(folder / "tokenizer")(PROMPTS, 77), PromptTokenizer(folder / "tokenizer_2")(PROMPTS, 512)
    assert torch.equal(condition.context, t5(ids_2)) and torch.equal(condition.pooled, clip.text_model(ids)[1])
    assert condition.context[2, 1:].abs().min() > 0  # padding is encoded, not masked
    assert same(flux.encode(PROMPTS, negative=True), condition)
    streamed = TextToImage.from_pretrained(folder, t5="stream", t5_tokens=40).encode(PROMPTS)
    assert torch.equal(streamed.context, t5(ids_2[:, :40])) and torch.equal(streamed.pooled, condition.pooled)


def test_a_prompt_is_long_when_t5_cuts_it(folder):
    encoder = PromptEncoder.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["the " * 300])
    with pytest.warns(UserWarning, match="is cut to 512"):
        encoder.encode(["the " * 600])


def test_embeddings_are_kept_with_the_negative_apart(folder, tmp_path, monkeypatch):
    expected = PromptEncoder.from_pretrained(folder).encode([*PROMPTS, "blurry"])
    first = cached(tmp_path / "kept.safetensors", PROMPTS, "blurry", folder)
    monkeypatch.setattr(PromptEncoder, "from_pretrained", lambda *_, **options: pytest.fail("an encoder was loaded"))
    for condition, negative in (first, cached(tmp_path / "kept.safetensors", PROMPTS, "blurry", folder)):
        assert same(condition, expected[:3]) and same(negative, expected[3:])


def test_encoders_that_do_not_fit_are_refused(copy):
    for options in ({"t5": "zeros"}, {"t5": "none"}, {"t5_tokens": 513}):
        with pytest.raises(ValueError, match="expected 'load' or 'stream' of 1 … 512 tokens: FLUX sees T5's alone"):
            PromptEncoder.from_pretrained(copy, **options)
    for part, message in (
        ("text_encoder_2", r"text_encoder_2: no such folder; it encodes the prompts \(T5\)"),
        ("tokenizer_2", "tokenizer_2: no such folder; it splits the prompts for text_encoder_2"),
        ("text_encoder", r"text_encoder: no such folder; it encodes the prompts \(CLIP-L\)"),
        ("vae", "vae: no such folder; it turns latents into images"),
        ("transformer", "no transformer/ in it"),
    ):
        hidden = (copy / part).rename(copy / "hidden")
        with pytest.raises(FileNotFoundError, match=message):
            TextToImage.from_pretrained(copy)
        hidden.rename(copy / part)


# ------------------------------------------------------------------------------------------------------------------ release


@torch.no_grad()
def test_both_layouts_round_trip(folder, flux, tmp_path):
    flux.save_pretrained(tmp_path / "out")
    agree(TextToImage.from_pretrained(tmp_path / "out"), flux)
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text()) == json.loads((folder / file).read_text())
    file = tiny_flux.single_file(tmp_path / "flux1-dev.safetensors", folder)
    agree(TextToImage.from_pretrained(file, base=folder), flux)
    bundle = tiny_flux.single_file(tmp_path / "bundle.safetensors", folder, [*tiny_flux.PREFIXES])
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / part, tmp_path / "words" / part)
    model = TextToImage.from_pretrained(bundle, base=tmp_path / "words")
    agree(model, flux)
    assert {p.device.type for p in TextToImage.from_pretrained(folder, device="meta").transformer.parameters()} == {"meta"}


def test_a_transformer_alone_is_known_by_its_config(folder, flux, tmp_path):
    shutil.copytree(folder / "transformer", tmp_path / "tuned" / "transformer")
    agree(TextToImage.from_pretrained(tmp_path / "tuned", base=folder), flux)


def test_releases_of_other_models_are_refused(copy, tmp_path):
    index, scheduler, config = (
        copy / "model_index.json",
        copy / "scheduler" / "scheduler_config.json",
        copy / "transformer" / "config.json",
    )
    for file, values, message in (
        (scheduler, {"time_shift_type": "linear"}, "key 'time_shift_type' is 'linear'; expected 'exponential'"),
        (scheduler, {"base_shift": 0}, "key 'base_shift' is 0; expected a positive float"),
        (scheduler, {"use_karras_sigmas": True}, "key 'use_karras_sigmas' is True; expected False"),
        (config, {"in_channels": 384, "out_channels": 64}, "in_channels is 384, as of FLUX.1 Fill"),
        (
            index,
            {"_class_name": "FluxFillPipeline"},
            "'FluxFillPipeline'; expected 'StableDiffusion3Pipeline' or 'FluxPipeline'",
        ),
        (index, {"_class_name": "FluxControlPipeline"}, "'FluxControlPipeline'; expected"),
        (
            index,
            {"_class_name": "StableDiffusion3Pipeline"},
            "key '_class_name' is 'FluxTransformer2DModel'; expected 'SD3Trans",
        ),
    ):
        before = file.read_text()
        change(file, **values)
        with pytest.raises(ValueError, match=message) as error:
            TextToImage.from_pretrained(copy, device="meta")
        assert str(file.parent) in str(error.value) and "\n" not in str(error.value)
        file.write_text(before)


# ------------------------------------------------------------------------------------------------------------------ scripts


def test_the_scripts_train_sample_and_evaluate_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_flow.plots, "pyplot", lambda file: None)
    clip = tiny_rewards.folder("clip_score", tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("a cat\nthe one\n")
    common = ["--prompts", tmp_path / "prompts.txt", "--resolution", 16]

    def run(main, *options):
        return main([str(word) for word in (*options, *common)])

    small = "--rounds 3 --prompts-per-round 1 --group-size 2 --inner-steps 1 --ode-steps 1 --eval-samples 2 --eval-every 3"
    train = [*small.split(), "--lr", 1e-2, "--model", folder, "--reward", f"clip_score:{clip}"]
    run(train_flow.main, *train, "--lora-rank", 2, "--t5", "stream", "--out", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval"]["w2"] > 0 == rows[0]["eval"]["w2"] and len(rows) == 4
    model = lora.load(TextToImage.from_pretrained(folder, encoders=False).transformer, tmp_path / "run" / "adapter")
    assert {name for name, layer in model.named_modules() if type(layer) is lora.Adapted} > {
        "single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_add_out",
    }  # fmt: skip
    run(
        train_flow.main,
        *train,
        "--rounds",
        1,
        "--no-eval-first",
        "--beta-unit",
        "reward",
        "--gradient-checkpointing",
        "--out",
        tmp_path / "whole",
    )
    assert TextToImage.from_pretrained(tmp_path / "whole" / "model", device="meta", base=folder).prompt_encoder
    adapter = tmp_path / "run" / "adapter"
    run(sample.main, "--model", folder, "--adapter", adapter, "--steps", 1, "--out", tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    capsys.readouterr()
    assert "FLUX sees T5's alone" in scripts.refused(
        capsys, lambda: run(sample.main, "--model", folder, "--t5", "zeros", "--out", tmp_path / "no")
    )
    models = [f"base={folder}", f"tuned={folder}+{adapter}", f"sd3={tiny_sd3.folder(tmp_path / 'sd3')}"]  # two families
    final = run(
        evaluate.main,
        "--models",
        *models,
        "--rewards",
        f"clip_score:{clip}",
        "--steps",
        1,
        "--samples",
        2,
        "--seeds",
        1,
        "--out",
        tmp_path / "table",
    )
    assert final["tuned"]["w2"][0] > 0 == final["base"]["w2"][0] and "w2" not in final["sd3"]
