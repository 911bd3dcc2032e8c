"""SD3 as one object: the direction of time, prompts, folders."""

import json
import shutil

import pytest
import tiny
import tiny_sd3
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo import ode
from nano_adrpo.demo import digits
from nano_adrpo.models.vae import Autoencoder
from nano_adrpo.prompts import PromptEncoder
from nano_adrpo.text_to_image import TextToImage

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
    tokenizer = model.prompt_encoder.tokenizers[0]
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
    one = PromptEncoder.from_pretrained(BASE)
    both = PromptEncoder(one.clips * 2, one.tokenizers * 2, width=150)
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
        (lambda f: (f / "vae").mkdir(), "vae/config.json: no such file"),
        (
            lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
            "'FluxPipeline'; expected 'StableDiff",
        ),
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


# ---------------------------------------------------------------------------------------------------------- SD3 with its VAE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sd3.folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def sd3(folder):
    return TextToImage.from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "sd3")


def states(model):
    """Every tensor of every part."""
    encoder = model.prompt_encoder
    parts = {"transformer": model.transformer, "vae": model.vae, "text_encoder": encoder.clips[0]}
    parts |= {"text_encoder_2": encoder.clips[1]} | ({"text_encoder_3": encoder.t5} if encoder.t5 else {})
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


def agree(a, b, prompts=("the one", "")):
    """The same tensors, the same conditions."""
    x, y = states(a), states(b)
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert torch.equal(a.encode(prompts).context, b.encode(prompts).context)


def test_resolutions(sd3):
    assert sd3.factor == 8 and sd3.shift == 3.0
    assert sd3.latent_shape == (16, 8, 8)  # the configuration's sample_size, in latents
    assert sd3.latent_shape_at(96) == (16, 12, 12) and sd3.latent_shape_at((32, 192)) == (16, 4, 24)
    for resolution, side in ((100, 100), ((64, 72), 72), (208, 208), (0, 0), ((-16, 16), -16)):
        with pytest.raises(ValueError, match=f"resolution {side}: expected a multiple of 16 .*, at most 192"):
            sd3.latent_shape_at(resolution)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shift": None}, "key 'shift' is None; expected a positive number"),
        ({"shift": "3"}, "key 'shift' is '3'; expected a positive number"),
        ({"num_train_timesteps": 0}, "key 'num_train_timesteps' is 0; expected a positive number"),
        ({"use_dynamic_shifting": True}, "key 'use_dynamic_shifting' is True; expected False, as in SD3's scheduler"),
        ({"use_karras_sigmas": True}, "key 'use_karras_sigmas' is True; expected False"),
        ({"shift_terminal": 0.1}, "key 'shift_terminal' is 0.1; expected None"),
        ({"_class_name": "DDIMScheduler"}, "key '_class_name' is 'DDIMScheduler'; expected 'FlowMatchEulerDiscreteScheduler'"),
    ],
)
def test_a_scheduler_that_is_not_sd3s_is_refused(copy, change, message):
    file = copy / "scheduler" / "scheduler_config.json"
    tiny.write_json(file, json.loads(file.read_text()) | change)
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
    assert model.shift == 1.0 and model.times(2).tolist() == pytest.approx([0, 0.998, 1])  # 1 − 1/500


def test_guidance_needs_a_negative_condition(sd3):
    x0, condition = torch.zeros(1, *sd3.latent_shape_at(16)), sd3.encode(["the one"])
    with pytest.raises(ValueError, match="guidance is 4.0 without a negative condition; expected one"):
        sd3.sample(x0, condition, sd3.times(1), guidance=4.0)


@torch.no_grad()
def test_images_come_through_the_autoencoder(sd3, folder):
    vae = Autoencoder.from_pretrained(folder / "vae")
    latents = torch.randn(2, *sd3.latent_shape_at((32, 48)), generator=torch.Generator().manual_seed(0))
    images = sd3.decode(latents)
    assert images.shape == (2, 3, 32, 48) and torch.allclose(images, vae.decode(latents), atol=1e-4)
    assert torch.allclose(sd3.decode(latents, tile=3), vae.decode(latents, tile=3), atol=1e-4)
    half = TextToImage.from_pretrained(folder, torch.bfloat16, encoders=False)
    assert half.decode(latents).dtype == torch.float32  # the latents'
    assert half.decode(latents.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_guidance_and_sampling_run_end_to_end(sd3):
    x0 = torch.randn(2, *sd3.latent_shape_at(32), generator=torch.Generator().manual_seed(0))
    condition = sd3.encode(["the one", "a cat", "blurry"])

    def velocity(rows):
        return lambda x, t: sd3.velocity(x, t, condition[rows])

    times = ode.sd3_time_grid(3, sd3.shift)
    guided = ode.sample(ode.guide(velocity([0, 1]), velocity([2, 2]), 4.0), x0, times)
    by_hand = x0
    for t, t_next in zip(times, times[1:]):
        good, bad = velocity([0, 1])(by_hand, t), velocity([2, 2])(by_hand, t)
        by_hand = by_hand + (t_next - t) * (4 * good - 3 * bad)
    assert torch.allclose(guided, by_hand, atol=1e-4) and sd3.decode(guided).isfinite().all()


@pytest.mark.parametrize("t5", [True, False])
def test_sd3_folders_round_trip(tmp_path, t5):
    model = TextToImage.from_pretrained(tiny_sd3.folder(tmp_path / "sd3", t5))
    model.save_pretrained(tmp_path / "out")
    agree(TextToImage.from_pretrained(tmp_path / "out"), model)
    old, new = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("sd3", "out"))
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
    assert model.shift == 3.0 and model.latent_shape == (16, 24, 24)  # 128 latents in the releases, or what the table holds
    bare = tiny_sd3.single_file(tmp_path / "sd3_medium.safetensors", folder, ["transformer", "vae"])
    agree(TextToImage.from_pretrained(bare, base=folder), sd3)
    alone = TextToImage.from_pretrained(bare, encoders=False)
    assert alone.prompt_encoder is None and alone.shift == 3.0
    with pytest.raises(ValueError, match="opened without its text encoders; expected encoded prompts"):
        alone.encode(["the one"])
    model.save_pretrained(tmp_path / "out")  # and out in the other layout
    agree(TextToImage.from_pretrained(tmp_path / "out"), sd3)


def test_a_single_file_without_a_part_says_which(folder, tmp_path):
    bare = tiny_sd3.single_file(tmp_path / "sd3_medium.safetensors", folder, ["transformer", "vae"])
    with pytest.raises(FileNotFoundError, match=f"{bare}: no text_encoder in this file; it encodes the prompts .*base=FOLDER"):
        TextToImage.from_pretrained(bare)
    file = tiny_sd3.single_file(tmp_path / "no_vae.safetensors", folder, [*tiny_sd3.PREFIXES][:1])
    with pytest.raises(FileNotFoundError, match=f"{file}: no vae in this file; it turns latents into images"):
        TextToImage.from_pretrained(file)
    whole = tiny_sd3.single_file(tmp_path / "whole.safetensors", folder)
    with pytest.raises(FileNotFoundError, match=f"{whole}: no tokenizer in this file; it splits the prompts for text_encoder"):
        TextToImage.from_pretrained(whole)
    save_file({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match="flux.safetensors: this is a FLUX checkpoint"):
        TextToImage.from_pretrained(tmp_path / "flux.safetensors", base=folder)
    save_file({}, tmp_path / "empty.safetensors")  # whose transformer is not the base's
    with pytest.raises(
        ValueError, match="empty.safetensors: key 'x_embedder.proj.weight' is missing; expected Stability's SD3"
    ):
        TextToImage.from_pretrained(tmp_path / "empty.safetensors", base=folder)


def test_a_trained_transformer_alone_is_completed_by_its_base(sd3, folder, tmp_path):
    tuned = TextToImage.from_pretrained(folder, encoders=False)
    tuned.vae = None
    with torch.no_grad():
        tuned.transformer.proj_out.bias.add_(1)
    tuned.save_pretrained(tmp_path / "tuned")
    assert {file.name for file in (tmp_path / "tuned").iterdir()} == {"transformer", "scheduler", "model_index.json"}
    model = TextToImage.from_pretrained(tmp_path / "tuned", base=folder)
    assert torch.equal(model.transformer.proj_out.bias, sd3.transformer.proj_out.bias + 1)
    assert torch.equal(model.encode(["the one"]).context, sd3.encode(["the one"]).context) and model.vae and model.shift == 3.0
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'tuned' / 'vae'}: no such folder; it turns latents into images"):
        TextToImage.from_pretrained(tmp_path / "tuned")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; expected one in diffusers' SD3 pipeline layout"):
        TextToImage.from_pretrained(tmp_path / "tuned", base=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder; expected a folder"):
        TextToImage.from_pretrained(tmp_path / "nowhere", base=folder)


@pytest.mark.parametrize("part", ["vae", "text_encoder_2", "text_encoder_3", "tokenizer_2"])
def test_a_missing_part_is_named(copy, part, tmp_path):
    shutil.rmtree(copy / part)
    with pytest.raises(FileNotFoundError, match=f"{copy / part}: no such folder; it ") as error:
        TextToImage.from_pretrained(copy)
    assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{copy / part}: no such folder, nor in {tmp_path / 'empty'}; it "):
        TextToImage.from_pretrained(copy, base=tmp_path / "empty")


def test_an_autoencoder_of_other_latents_is_refused(copy):
    config = json.loads((copy / "transformer" / "config.json").read_text())
    model = TextToImage.from_pretrained(copy, encoders=False).transformer
    tensors = load_file(copy / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors["pos_embed.proj.weight"] = tensors["pos_embed.proj.weight"][:, :4].contiguous()
    save_file(tensors, copy / "transformer" / "diffusion_pytorch_model.safetensors")
    tiny.write_json(copy / "transformer" / "config.json", config | {"in_channels": 4})
    with pytest.raises(ValueError, match="vae: the autoencoder's latents have 16 channels; the transformer expects 4"):
        TextToImage.from_pretrained(copy, encoders=False)
    assert model.config.in_channels == 16


def test_everything_opens_on_meta(folder):
    model = TextToImage.from_pretrained(folder, device="meta")
    assert {tensor.device.type for tensor in states(model).values()} == {"meta"}
