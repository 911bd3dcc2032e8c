"""SD3 as a whole against diffusers' StableDiffusion3Pipeline: tokens, prompt embeddings, images, folders (extra `parity`)."""

import json
import shutil

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from nano_adrpo import ode
from nano_adrpo.models.clip import CLIPText
from nano_adrpo.models.tokenizers import PromptTokenizer
from nano_adrpo.text_to_image import TextToImage

PROMPTS = ["A photo of the one Ring!", "the sign says: it's 12 o'clock, and then some more words", ""]
NEGATIVE = "blurry, ugly"


def pipeline(folder, t5=True, scheduler=(), words=77):
    """A tiny SD3 with random weights, saved by diffusers; the CLIP tokenizers as vocab.json and merges.txt."""
    for suffix, pad in (("", "<|endoftext|>"), ("_2", "!")):
        tiny.clip_tokenizer(folder / f"plain{suffix}", pad)
        config = json.loads((folder / f"plain{suffix}" / "tokenizer_config.json").read_text())
        tiny.write_json(folder / f"plain{suffix}" / "tokenizer_config.json", config | {"model_max_length": words})
    tiny.t5_tokenizer(folder / "plain_3")
    parts = {
        name: tiny.fill(CLIPTextModelWithProjection(CLIPTextConfig(**sizes)), seed=1) for name, sizes in tiny.SD3_CLIPS.items()
    }
    parts |= {f"tokenizer{suffix}": CLIPTokenizer.from_pretrained(folder / f"plain{suffix}") for suffix in ("", "_2")}
    parts["text_encoder_3"] = tiny.fill(T5EncoderModel(T5Config(**tiny.SD3_T5)), seed=2, std=0.05) if t5 else None
    parts["tokenizer_3"] = T5Tokenizer.from_pretrained(folder / "plain_3") if t5 else None
    parts["vae"] = tiny.fill(AutoencoderKL(**tiny.SD3_VAE), seed=3, std=0.08)
    parts["transformer"] = tiny.fill(SD3Transformer2DModel(**tiny.SD3), seed=4, std=0.05)
    pipe = StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **dict(scheduler)}), **parts)
    pipe.save_pretrained(folder / "sd3")
    for suffix in ("", "_2"):
        assert (folder / "sd3" / f"tokenizer{suffix}" / "tokenizer.json").is_file()
        shutil.copytree(folder / "sd3" / f"tokenizer{suffix}", folder / f"saved{suffix}")
        shutil.rmtree(folder / "sd3" / f"tokenizer{suffix}")
        shutil.copytree(folder / f"plain{suffix}", folder / "sd3" / f"tokenizer{suffix}")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=[True, False], ids=["T5", "no-T5"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    return pipeline(folder, request.param), folder


@pytest.mark.filterwarnings("ignore:the prompt")
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("form", ["vocab", "old-vocab", "tokenizer.json"])
def test_clip_tokens_agree(tmp_path, pad, form):
    tiny.clip_tokenizer(tmp_path / "plain", pad)
    folder = tmp_path / "plain"
    if form == "old-vocab":  # from before transformers listed the special tokens in tokenizer_config.json
        config = json.loads((folder / "tokenizer_config.json").read_text())
        tiny.write_json(
            folder / "tokenizer_config.json",
            {k: v for k, v in config.items() if k not in ("added_tokens_decoder", "pad_token")},
        )
    theirs = CLIPTokenizer.from_pretrained(folder)
    if form == "tokenizer.json":
        theirs.save_pretrained(tmp_path / "saved")
        folder = tmp_path / "saved"
        assert not (folder / "vocab.json").exists()
    ours = PromptTokenizer(folder)
    for text in tiny.AWKWARD:
        expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours([text], 77).tolist() == [expected], text
    ours.save_pretrained(tmp_path / "again")
    again = CLIPTokenizer.from_pretrained(tmp_path / "again")
    assert again.pad_token == pad and again(tiny.AWKWARD).input_ids == theirs(tiny.AWKWARD).input_ids


@pytest.mark.parametrize("form", ["defaults", "added", "old-added", "additional"])
def test_folders_with_fewer_and_more_tokens_agree(tmp_path, form):
    tiny.clip_tokenizer(tmp_path, "!")
    (tmp_path / "special_tokens_map.json").unlink()
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    decoder = config.pop("added_tokens_decoder")
    mine = dict(content="<mine>", lstrip=False, normalized=True, rstrip=True, single_word=False, special=False)
    two = {"526": mine | {"content": "the ring"}, "525": mine}
    config = {
        "defaults": {},
        "added": config | {"added_tokens_decoder": two | decoder},
        "old-added": config,
        "additional": config | {"additional_special_tokens": ["<mine>", "the</w>"]},
    }[form]
    tiny.write_json(file, config)
    if form == "old-added":
        tiny.write_json(tmp_path / "added_tokens.json", {"the ring": 526, "<mine>": 525})
    ours, theirs = PromptTokenizer(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    for text in (*tiny.AWKWARD[:-3], "the one <mine>  the ring!", "<MINE>a<mine>the</w> the Ring"):
        expected = theirs(text, padding="max_length", max_length=200).input_ids
        assert ours([text], 200).tolist() == [expected], text


@pytest.mark.filterwarnings("ignore:the prompt")
def test_t5_tokens_agree(tmp_path):
    tiny.t5_tokenizer(tmp_path)
    ours = PromptTokenizer(tmp_path)
    for theirs in (T5Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        for length in (20, 256):
            expected = theirs(tiny.AWKWARD, padding="max_length", max_length=length, truncation=True).input_ids
            assert ours(tiny.AWKWARD, length).tolist() == expected


@pytest.mark.filterwarnings("ignore:the prompt")
@torch.no_grad()
def test_prompt_embeddings_agree(both):
    pipe, folder = both
    prompts = [*PROMPTS, *tiny.AWKWARD]
    condition = TextToImage.from_pretrained(folder / "sd3").encode(prompts)
    context, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    assert condition.context.shape == context.shape == (len(prompts), 77 + 256, 224)
    assert (condition.context - context).abs().max() < 1e-4 and (condition.pooled - pooled).abs().max() < 1e-4
    shorter = TextToImage.from_pretrained(folder / "sd3", t5_tokens=40).encode(PROMPTS).context
    context = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=40)[0]
    assert (shorter - context).abs().max() < 1e-4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@torch.no_grad()
def test_the_same_noise_becomes_the_same_image(both, device):
    pipe, folder = both
    model = TextToImage.from_pretrained(folder / "sd3", device=device)
    x0 = torch.randn(1, *model.latent_shape_at((96, 64)), generator=torch.Generator().manual_seed(0))
    expected = pipe(
        PROMPTS[0], negative_prompt=NEGATIVE, height=96, width=64, num_inference_steps=28, guidance_scale=7.0, latents=x0,
        output_type="pt",
    ).images  # fmt: skip
    _, image = model.draw(x0.to(device), model.encode(PROMPTS[:1]), model.times(28), model.encode([NEGATIVE]), guidance=7.0)
    image = (image / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.1 and image.shape == expected.shape == (1, 3, 96, 64)
    assert (image - expected).abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore:the prompt")
@torch.no_grad()
def test_another_scheduler_and_shorter_prompts(tmp_path):
    pipe = pipeline(tmp_path, scheduler=dict(shift=2.0, num_train_timesteps=400), words=9)
    model = TextToImage.from_pretrained(tmp_path / "sd3")
    context = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)[0]
    condition = model.encode(PROMPTS)
    assert condition.context.shape == context.shape == (3, 9 + 256, 224) and (condition.context - context).abs().max() < 1e-4
    x0 = torch.randn(1, *model.latent_shape_at(32), generator=torch.Generator().manual_seed(0))
    options = dict(height=32, width=32, num_inference_steps=5, guidance_scale=1.0, latents=x0, output_type="pt")
    image = model.decode(model.sample(x0, condition[[1]], model.times(5)))
    assert ((image / 2 + 0.5).clamp(0, 1) - pipe(PROMPTS[1], **options).images).abs().max() < 1e-4


@torch.no_grad()
def test_what_we_save_opens_there(both, tmp_path):
    pipe, folder = both
    model = TextToImage.from_pretrained(folder / "sd3")
    model.save_pretrained(tmp_path)
    # Without T5 diffusers asks for this, of the folder that it wrote itself too.
    without = {} if pipe.text_encoder_3 else dict(text_encoder_3=None, tokenizer_3=None)
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path, **without)
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.config.shift == 3.0 and (again.text_encoder_3 is None) == (pipe.text_encoder_3 is None)
    assert again.tokenizer.pad_token == "<|endoftext|>" and again.tokenizer_2.pad_token == "!"
    x0 = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    options = dict(negative_prompt=NEGATIVE, height=32, width=32, num_inference_steps=2, latents=x0, output_type="pt")
    expected, image = (each(PROMPTS[0], **options).images for each in (pipe, again))
    assert (image - expected).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 5, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_time_grid_is_diffusers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    assert (1 - ode.sd3_time_grid(steps, shift) - scheduler.sigmas).abs().max() < 1e-6


def test_full_size_text_encoders(tmp_path):
    """SD3's two CLIP text encoders, from their public configuration: 123,650,304 and 694,659,840 parameters."""
    small = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, projection_dim=768)
    large = dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280)
    for sizes, act, count in ((small, "quick_gelu", 123_650_304), (large, "gelu", 694_659_840)):
        config = CLIPTextConfig(**sizes, hidden_act=act, eos_token_id=2)
        with torch.device("meta"):
            theirs = CLIPTextModelWithProjection(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
        assert sum(parameter.numel() for parameter in theirs.parameters()) == count
        config.save_pretrained(tmp_path)
        tiny.headers_only(tmp_path / "model.safetensors", shapes)
        ours = CLIPText.from_pretrained(tmp_path, device="meta")
        assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == shapes
        # The single file: CLIP-L's has no projection.
        public = {name: shape for name, shape in shapes.items() if act == "gelu" or "projection" not in name}
        tiny.headers_only(tmp_path / "clip.safetensors", public)
        single = CLIPText.from_pretrained(tmp_path / "clip.safetensors", device="meta")
        assert {name: tuple(tensor.shape) for name, tensor in single.state_dict().items()} == shapes
        assert single.config == ours.config
