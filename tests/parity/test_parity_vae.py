"""Our autoencoder against diffusers', both ways and in both layouts (extra `parity`)."""

import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file

from nano_adrpo.models.vae import Autoencoder, Config

FULL = tiny.VAE | dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024)


def build(sizes, seed=0):
    return tiny.fill(AutoencoderKL(**{k: v for k, v in tiny.vae_config(sizes).items() if k != "_class_name"}), seed, std=0.1)


@torch.no_grad()
def encode(model, images):
    """As diffusers' SD3 pipelines do it."""
    scale, shift = model.config.scaling_factor, model.config.shift_factor or 0
    return (model.encode(images).latent_dist.mean - shift) * scale


@torch.no_grad()
def decode(model, latents):
    return model.decode(latents / model.config.scaling_factor + (model.config.shift_factor or 0)).sample


@torch.no_grad()
def errors(ours, theirs, device="cpu", size=(16, 24), latent_size=(3, 5)):
    images, latents = tiny.images(*size).to(device), tiny.vae_latents(ours.config.latent_channels, *latent_size).to(device)
    expected = encode(theirs, images), decode(theirs, latents)
    assert all(values.std() > 0.1 for values in expected)
    return [(a - b).abs().max().item() for a, b in zip((ours.encode(images), ours.decode(latents)), expected)]


@pytest.mark.parametrize("style", tiny.VAE_STYLES)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_folders_agree(tmp_path, style, sharded, device):
    model = build(tiny.VAE_STYLES[style], seed=len(style))
    model.save_pretrained(tmp_path, max_shard_size="100kB" if sharded else "10GB")
    ours = Autoencoder.from_pretrained(tmp_path, device=device)
    bound = 1e-5 if device == "cpu" else 1e-4
    for size, latent_size in (((16, 24), (3, 5)), ((24, 8), (1, 1)), ((32, 32), (8, 2))):
        assert max(errors(ours, model.to(device), device, size, latent_size)) < bound


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("widths, layers", [((32, 64), 1), ((64,), 2), ((32, 64, 96, 96), 2)])
def test_stabilitys_layout_agrees(tmp_path, widths, layers, linear):
    tensors = tiny.ldm_vae(widths, layers, seed=len(widths), linear=linear)
    save_file({f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "sd3.safetensors")
    ours = Autoencoder.from_pretrained(tmp_path / "sd3.safetensors")
    model = build(tiny.VAE | dict(block_out_channels=widths, layers_per_block=layers))
    model.load_state_dict(convert_ldm_vae_checkpoint(dict(tensors), model.config))
    assert max(errors(ours, model)) < 1e-5
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_agrees(tmp_path, dtype, bound):
    build(tiny.VAE).to(dtype).save_pretrained(tmp_path)
    ours, model = Autoencoder.from_pretrained(tmp_path), AutoencoderKL.from_pretrained(tmp_path, torch_dtype=dtype)
    images, latents = tiny.images().to(dtype), tiny.vae_latents().to(dtype)
    with torch.no_grad():
        pairs = (ours.encode(images), encode(model, images)), (ours.decode(latents), decode(model, latents))
    for output, expected in pairs:
        assert output.dtype == dtype
        assert (output.float() - expected.float()).norm() / expected.float().norm() < bound


@pytest.mark.parametrize("style", tiny.VAE_STYLES)
def test_what_we_save_loads_there(tmp_path, style):
    model = tiny.fill(Autoencoder(Config(**tiny.VAE_STYLES[style])), seed=3, std=0.1)
    model.save_pretrained(tmp_path)
    again, info = AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert max(errors(model, again)) < 1e-5


def test_what_we_save_over_shards_loads_there(tmp_path):
    build(tiny.VAE, seed=1).save_pretrained(tmp_path, max_shard_size="100kB")
    model = tiny.fill(Autoencoder(Config(**tiny.VAE)), seed=3, std=0.1)
    model.save_pretrained(tmp_path)
    assert max(errors(model, AutoencoderKL.from_pretrained(tmp_path))) < 1e-5
    assert max(errors(Autoencoder.from_pretrained(tmp_path), AutoencoderKL.from_pretrained(tmp_path))) < 1e-5


def test_gradients_agree(tmp_path):
    model = build(tiny.VAE)
    model.save_pretrained(tmp_path)
    ours = Autoencoder.from_pretrained(tmp_path)
    images, latents = tiny.images(), tiny.vae_latents()
    (ours.encode(images).square().mean() + ours.decode(latents).square().mean()).backward()
    mean = (model.encode(images).latent_dist.mean - 0.0609) * 1.5305
    (mean.square().mean() + model.decode(latents / 1.5305 + 0.0609).sample.square().mean()).backward()
    expected = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5), name


def test_full_size_names_and_shapes_in_both_layouts(tmp_path):
    with torch.device("meta"):
        model = AutoencoderKL(**{k: v for k, v in tiny.vae_config(FULL).items() if k != "_class_name"})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tiny.headers_only(tmp_path / "diffusion_pytorch_model.safetensors", shapes)
    tiny.write_json(tmp_path / "config.json", {"_class_name": "AutoencoderKL", **dict(model.config)})
    tiny.headers_only(tmp_path / "sd3.safetensors", tiny.ldm_vae_shapes())
    for path in (tmp_path, tmp_path / "sd3.safetensors"):
        ours = Autoencoder.from_pretrained(path, device="meta")
        assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == shapes
        assert sum(p.numel() for p in ours.parameters()) == 83_819_683
        assert ours.config == Config(**FULL) and ours.factor == 8
    with torch.device("meta"):
        single = {name: torch.empty(shape) for name, shape in tiny.ldm_vae_shapes().items()}
    converted = convert_ldm_vae_checkpoint(single, model.config)
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == shapes
