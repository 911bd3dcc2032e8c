"""Sana against diffusers: its transformer and DC-AE; the whole against SanaPipeline (extra `parity`)."""

import inspect

import pytest
import tiny
import tiny_sana
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from nano_adrpo import lora
from nano_adrpo.models.dc_ae import DeepAutoencoder
from nano_adrpo.models.sana import Sana
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.text_to_image.sana import INSTRUCTION, SANA

CONV = dict(upsample_block_type="interpolate", downsample_block_type="Conv")


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (8, 3)])
@pytest.mark.parametrize(
    "changes", [{}, {"num_cross_attention_heads": 2, "mlp_ratio": 3, "out_channels": 6}], ids=["", "other"]
)
@torch.no_grad()
def test_transformer(tmp_path, size, changes):
    sizes = tiny_sana.TRANSFORMER | changes
    theirs = tiny.fill(SanaTransformer2DModel(qk_norm="rms_norm_across_heads", **sizes))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Sana.from_pretrained(tmp_path / "theirs")
    latents, sigma, context, mask = tiny_sana.inputs(*size)
    for seen in (mask, None):
        expected = theirs(latents, context, 1000 * sigma, encoder_attention_mask=seen).sample
        assert expected.std() > 0.3
        torch.testing.assert_close(ours(latents, sigma, context, seen), expected, atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again, report = SanaTransformer2DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert all(again.config[key] == value for key, value in theirs.config.items() if not key.startswith("_"))


@torch.no_grad()
def test_transformer_in_bfloat16(tmp_path):
    """Both round; neither is far from float32, and they are no farther from each other."""
    theirs = tiny.fill(SanaTransformer2DModel(qk_norm="rms_norm_across_heads", **tiny_sana.TRANSFORMER))
    theirs.save_pretrained(tmp_path)
    latents, sigma, context, mask = tiny_sana.inputs()
    exact = Sana.from_pretrained(tmp_path)(latents, sigma, context, mask)
    half = Sana.from_pretrained(tmp_path, torch.bfloat16)(latents.bfloat16(), sigma, context.bfloat16(), mask)
    theirs = theirs.bfloat16()(latents.bfloat16(), context.bfloat16(), 1000 * sigma, encoder_attention_mask=mask).sample
    for one, other in ((half, exact), (theirs, exact), (half, theirs)):
        assert (one.float() - other.float()).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("size", [(24, 32), (4, 8), (64, 20)])
@torch.no_grad()
def test_autoencoder(tmp_path, size):
    theirs = tiny.fill(AutoencoderDC(**CONV, **tiny_sana.VAE))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, images = DeepAutoencoder.from_pretrained(tmp_path / "theirs"), tiny.images(*size)
    latents = 0.41407 * theirs.encode(images).latent
    torch.testing.assert_close(ours.encode(images), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents / 0.41407).sample, atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again, report = AutoencoderDC.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()) and torch.equal(again.encode(images).latent, theirs.encode(images).latent)


@torch.no_grad()
def test_one_type_of_blocks_in_one_word(tmp_path):
    sizes = tiny_sana.VAE | dict(encoder_block_types="ResBlock", decoder_block_types="EfficientViTBlock")
    theirs = tiny.fill(AutoencoderDC(**CONV, **sizes))
    theirs.save_pretrained(tmp_path)
    ours, latents = DeepAutoencoder.from_pretrained(tmp_path), tiny.vae_latents(4)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents / 0.41407).sample, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A tiny pipeline with random weights that diffusers made and saved, and the folder."""
    folder = tmp_path_factory.mktemp("sana")
    tiny_sana.gemma_tokenizer(folder / "tokenizer")
    gemma = Gemma2Config(**tiny_sana.GEMMA2 | tiny_sana.LONG | {"vocab_size": tiny_sana.WORDS})
    pipe = SanaPipeline(
        tokenizer=GemmaTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=tiny.fill(Gemma2Model(gemma)),
        vae=tiny.fill(AutoencoderDC(**CONV, **tiny_sana.VAE), std=0.1),
        transformer=tiny.fill(SanaTransformer2DModel(qk_norm="rms_norm_across_heads", **tiny_sana.TRANSFORMER), std=0.1),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
        ),
    )
    pipe.save_pretrained(folder / "sana")  # as the release is; below it samples by Euler steps
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder / "sana"


def draw(pipe, x0, **options):
    height, width = (4 * side for side in x0.shape[-2:])
    options |= dict(height=height, width=width, latents=x0, output_type="pt", use_resolution_binning=False)
    return pipe(**options).images


def test_the_instruction_is_diffusers():
    default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert "\n".join(default) == INSTRUCTION


@pytest.mark.filterwarnings("ignore:the prompt")
@torch.no_grad()
def test_prompts_are_encoded_the_same(both):
    pipe, folder = both
    model, prompts = TextToImage.from_pretrained(folder), ["  A photo of the one Ring! ", "é 漢 <eos> x", "", "long " * 400]
    for instruction in (INSTRUCTION.split("\n"), None):
        context, mask, negative, negative_mask = pipe.encode_prompt(
            prompts, True, negative_prompt="Blurry, ugly", complex_human_instruction=instruction
        )
        model.prompt_encoder.instruction = INSTRUCTION if instruction else ""
        for ours, theirs, theirs_mask in (
            (model.encode(prompts), context, mask),
            (model.encode(["Blurry, ugly"], negative=True), negative[:1], negative_mask[:1]),
        ):
            assert torch.equal(ours.mask, theirs_mask) and ours.context.shape == theirs.shape
            seen = ours.mask.bool()
            assert (ours.context[seen] - theirs[seen]).abs().max() < 1e-4


@pytest.mark.parametrize("guidance", [4.5, 1.0])
@torch.no_grad()
def test_the_same_noise_becomes_the_same_image(both, guidance):
    pipe, folder = both
    model, prompt, negative = TextToImage.from_pretrained(folder), "A photo of TWO dogs", "Blurry"
    x0 = torch.randn(1, *model.latent_shape_at((96, 64)), generator=torch.Generator().manual_seed(0))
    options = dict(prompt=prompt, negative_prompt=negative, num_inference_steps=20, guidance_scale=guidance)
    expected = draw(pipe, x0, **options)
    conditions = model.encode([prompt]), model.times(20), model.encode([negative], negative=True)
    image = (model.draw(x0, *conditions, guidance=guidance)[1] / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.1 and image.shape == expected.shape == (1, 3, 96, 64)
    assert (image - expected).abs().max() < 1e-3


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_diffusers(both):
    pipe, folder = both
    half = SanaPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    half.scheduler = pipe.scheduler
    half.set_progress_bar_config(disable=True)
    x0 = torch.randn(1, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    options = dict(prompt="a cat", num_inference_steps=8, guidance_scale=4.5)
    exact, theirs = draw(pipe, x0, **options), draw(half, x0, **options).float()
    model = TextToImage.from_pretrained(folder, torch.bfloat16)
    conditions = model.encode(["a cat"]), model.times(8), model.encode([""], negative=True)
    ours = (model.draw(x0, *conditions, guidance=4.5)[1] / 2 + 0.5).clamp(0, 1)
    distance, expected = ((image - exact).abs().mean() for image in (ours, theirs))
    assert ours.dtype == torch.float32 and distance < max(2 * expected, 0.01)


@torch.no_grad()
def test_what_we_save_opens_there(both, tmp_path):
    pipe, folder = both
    TextToImage.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    again = SanaPipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is FlowMatchEulerDiscreteScheduler and again.scheduler.config.shift == 3.0
    for name in ("transformer", "vae", "text_encoder"):
        theirs, ours = (each.components[name].state_dict() for each in (pipe, again))
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    x0, options = torch.randn(1, 4, 8, 8), dict(prompt="A cat", negative_prompt="ugly", num_inference_steps=2)
    assert torch.equal(draw(pipe, x0, **options), draw(again, x0, **options))


# ---------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("saved_by", ["model", "pipeline", "peft"])
@torch.no_grad()
def test_their_adapters_open_here_and_ours_there(both, tmp_path, saved_by):
    _, folder = both
    theirs = SanaTransformer2DModel.from_pretrained(folder / "transformer")
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=[*SANA.targets])
    if saved_by == "peft":
        theirs = get_peft_model(theirs, config).eval()
        theirs.save_pretrained(tmp_path / "theirs")
    else:
        theirs.add_adapter(config)
        if saved_by == "model":
            theirs.save_lora_adapter(tmp_path / "theirs")
        else:
            header, matrices = _collate_lora_metadata({"transformer": theirs}), get_peft_model_state_dict(theirs)
            SanaPipeline.save_lora_weights(tmp_path / "theirs", transformer_lora_layers=matrices, **header)
    latents, sigma, context, mask = tiny_sana.inputs()
    expected = theirs(latents, context, 1000 * sigma, encoder_attention_mask=mask)[0]
    ours = Sana.from_pretrained(folder / "transformer")
    base = ours(latents, sigma, context, mask)
    lora.load(ours, tmp_path / "theirs")
    assert (ours(latents, sigma, context, mask) - expected).abs().max() < 1e-5 < 0.1 < (base - expected).abs().max()

    lora.save(ours, tmp_path / "ours")
    peft = PeftModel.from_pretrained(SanaTransformer2DModel.from_pretrained(folder / "transformer"), tmp_path / "ours").eval()
    plain = SanaTransformer2DModel.from_pretrained(folder / "transformer")
    plain.load_lora_adapter(tmp_path / "ours", prefix="base_model.model", weight_name="adapter_model.safetensors")
    for model in (peft, plain):
        output = model(latents, context, 1000 * sigma, encoder_attention_mask=mask)[0]
        assert (output - expected).abs().max() < 1e-5
