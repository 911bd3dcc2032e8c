"""FLUX against diffusers: the transformer both ways, prompt embeddings, images, folders, adapters (extra `parity`)."""

import json

import make_golden
import pytest
import tiny
import tiny_flux
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from nano_adrpo import lora
from nano_adrpo.models.flux import Flux
from nano_adrpo.text_to_image import TextToImage

PROMPTS = ["A photo of the one Ring!", "the sign says: it's 12 o'clock, and then some more words", ""]
SIZES = [(6, 10), (8, 8), (12, 4)]


def theirs(style, seed=0):
    return tiny.fill(FluxTransformer2DModel(**tiny_flux.STYLES[style]), seed, std=0.05)


def pipeline(folder, style, prefixed=False):
    """A tiny FLUX with random weights, saved by diffusers. prefixed: its CLIP's keys as in the public release."""
    tiny.clip_tokenizer(folder / "words", "<|endoftext|>")
    tiny.t5_tokenizer(folder / "words_2")
    scheduler = {key: value for key, value in tiny_flux.DEV.items() if key != "_class_name"}
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**(scheduler if style != "flux-schnell" else {"shift": 1.0})),
        vae=tiny.fill(AutoencoderKL(**tiny_flux.VAE), seed=3, std=0.08),
        text_encoder=tiny.fill(CLIPTextModel(CLIPTextConfig(**tiny_flux.CLIP)), seed=1),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "words"),
        text_encoder_2=tiny.fill(T5EncoderModel(T5Config(**tiny.SD3_T5)), seed=2, std=0.05),
        tokenizer_2=T5Tokenizer.from_pretrained(folder / "words_2"),
        transformer=theirs(style, seed=4),
    )
    pipe.save_pretrained(folder / "flux")
    if prefixed:
        state = {f"text_model.{name.removeprefix('text_model.')}": x for name, x in pipe.text_encoder.state_dict().items()}
        save_file(state, folder / "flux" / "text_encoder" / "model.safetensors", {"format": "pt"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["flux-dev", "flux-schnell"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return pipeline(folder, request.param, prefixed=request.param == "flux-dev"), folder / "flux"


@pytest.mark.parametrize("style", tiny_flux.STYLES)
def test_transformers_agree(tmp_path, style):
    model = theirs(style)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="1MB")
    ours = Flux.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again, info = FluxTransformer2DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for size in SIZES:
        inputs = tiny_flux.inputs(*size)
        with torch.no_grad():
            output = ours(*inputs)
            for each in (model, again):
                assert (output - make_golden.flux(each, *inputs)).abs().max() < 1e-5
    ours(*inputs).square().mean().backward()
    make_golden.flux(model, *inputs).square().mean().backward()
    expected = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_transformers_agree_in_bfloat16(tmp_path):
    theirs("flux-dev").save_pretrained(tmp_path)
    model = FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    latents, sigma, context, pooled = tiny_flux.inputs()
    # diffusers rounds time and guidance to bfloat16 before it multiplies them by 1000, and then again; ours does not. These
    # products bfloat16 has exactly.
    sigma, guidance = torch.tensor([0.0, 0.25, 1.0]), 4.0
    inputs = latents.bfloat16(), sigma.bfloat16(), context.bfloat16(), pooled.bfloat16()
    expected = make_golden.flux(model, *inputs, guidance).float()
    ours = Flux.from_pretrained(tmp_path, torch.bfloat16)
    ours.guidance = guidance
    output = ours(inputs[0], sigma, *inputs[2:]).float()
    assert (output - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("style", ["flux-dev", "flux-schnell"])
def test_the_single_file_means_the_same_to_both(tmp_path, style):
    single = tiny_flux.to_bfl(theirs(style).state_dict())
    save_file(single, tmp_path / "flux1.safetensors")
    ours = Flux.from_pretrained(tmp_path / "flux1.safetensors").state_dict()
    assert ours.keys() == theirs(style).state_dict().keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs(style).state_dict().items())


def test_full_size_names_and_shapes(tmp_path):
    from models.test_flux import full_size

    for guided in (True, False):
        with torch.device("meta"):
            model = FluxTransformer2DModel(guidance_embeds=guided)
            single = {name: torch.empty(shape) for name, shape in full_size(guided).items()}
            converted = convert_flux_transformer_checkpoint_to_diffusers(single)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == shapes
        tiny.headers_only(tmp_path / "diffusion_pytorch_model.safetensors", shapes, "BF16")
        tiny.write_json(tmp_path / "config.json", {"_class_name": "FluxTransformer2DModel", **dict(model.config)})
        ours = Flux.from_pretrained(tmp_path, device="meta").state_dict()
        assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == shapes


@pytest.mark.filterwarnings("ignore:the prompt")
@torch.no_grad()
def test_prompt_embeddings_agree(both):
    pipe, folder = both
    prompts = [*PROMPTS, *tiny.AWKWARD[:6]]
    condition = TextToImage.from_pretrained(folder).encode(prompts)
    context, pooled, _ = pipe.encode_prompt(prompts, None)
    assert condition.context.shape == context.shape == (len(prompts), 512, 224) and condition.mask is None
    assert (condition.context - context).abs().max() < 1e-4 and (condition.pooled - pooled).abs().max() < 1e-4
    shorter = TextToImage.from_pretrained(folder, t5_tokens=40).encode(PROMPTS)
    assert (shorter.context - pipe.encode_prompt(PROMPTS, None, max_sequence_length=40)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["folder", "single file"])
@torch.no_grad()
def test_the_same_noise_becomes_the_same_image(both, tmp_path, form):
    pipe, folder = both
    path = folder
    if form == "single file":
        save_file(tiny_flux.to_bfl(pipe.transformer.state_dict()), path := tmp_path / "flux1.safetensors")
    model = TextToImage.from_pretrained(path, base=folder)
    shape = model.latent_shape_at((96, 64))
    x0 = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    options = dict(height=96, width=64, num_inference_steps=8, output_type="pt")
    packed = pipe._pack_latents(x0, *x0.shape)
    expected = pipe(PROMPTS[0], latents=packed, **options).images
    _, image = model.draw(x0, model.encode(PROMPTS[:1]), model.times(8, shape=shape))
    image = (image / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.1 and image.shape == expected.shape == (1, 3, 96, 64)
    assert (image - expected).abs().max() < 1e-3
    if form == "folder":  # guidance by two passes, and another scale for the network to be told
        model.transformer.guidance = 2.0
        expected = pipe(
            PROMPTS[0], negative_prompt="blurry", true_cfg_scale=3.0, guidance_scale=2.0, latents=packed, **options
        ).images
        negative = model.encode(["blurry"], negative=True)
        _, image = model.draw(x0, model.encode(PROMPTS[:1]), model.times(8, shape=shape), negative, guidance=3.0)
        assert ((image / 2 + 0.5).clamp(0, 1) - expected).abs().max() < 1e-3


@pytest.mark.filterwarnings("error::FutureWarning")
@torch.no_grad()
def test_what_we_save_opens_there(both, tmp_path):
    pipe, folder = both
    TextToImage.from_pretrained(folder).save_pretrained(tmp_path)
    again = FluxPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        expected, found = getattr(pipe, part).state_dict(), getattr(again, part).state_dict()
        assert expected.keys() == found.keys() and all(torch.equal(found[name], x) for name, x in expected.items())
    for key in ("use_dynamic_shifting", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
        assert again.scheduler.config[key] == pipe.scheduler.config[key]
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"] and index["_class_name"] == "FluxPipeline"
    _, info = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_adapters_go_both_ways(tmp_path):
    model, ours = theirs("flux-dev"), []
    model.save_pretrained(tmp_path / "base")
    inputs = tiny_flux.inputs()
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=list(lora.MMDIT_TARGETS)))
    model.save_lora_adapter(tmp_path / "theirs")
    ours = lora.load(Flux.from_pretrained(tmp_path / "base"), tmp_path / "theirs")
    lora.save(ours, tmp_path / "ours")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "base")
    again.load_lora_adapter(tmp_path / "ours", prefix="base_model.model", weight_name="adapter_model.safetensors")
    with torch.no_grad():
        expected, base = make_golden.flux(model, *inputs), Flux.from_pretrained(tmp_path / "base")(*inputs)
        assert (ours(*inputs) - expected).abs().max() < 1e-5 < 1e-2 < (base - expected).abs().max()
        assert (make_golden.flux(again, *inputs) - expected).abs().max() < 1e-5
    # Both blocks' projections of both streams have adapters, the single blocks' own too.
    names = {name for name, layer in ours.named_modules() if type(layer) is lora.Adapted}
    assert "single_transformer_blocks.1.attn.to_q" in names and len(names) == 2 * 8 + 2 * 3
