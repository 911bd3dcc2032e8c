"""A whole SD3 in small, with random weights: diffusers' folder, and Stability's single file of the same tensors."""

import json
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo.models.clip import CLIPText, TextConfig
from nano_adrpo.models.mmdit import Config, MMDiT
from nano_adrpo.models.vae import Autoencoder

PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
VAE = dict(widths=(32, 32, 64, 64), layers=2)


def t5_tensors(seed=5):
    """T5's encoder under its public names."""
    sizes = tiny.SD3_T5
    dim, inner, wide = sizes["d_model"], sizes["num_heads"] * sizes["d_kv"], sizes["d_ff"]
    shapes = {"shared.weight": (sizes["vocab_size"], dim), "encoder.final_layer_norm.weight": (dim,)}
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, sizes["num_heads"])
    for i in range(sizes["num_layers"]):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{name}.weight": (inner, dim) for name in "qkv"}
        shapes |= {f"{attention}.SelfAttention.o.weight": (dim, inner), f"{mlp}.DenseReluDense.wo.weight": (dim, wide)}
        shapes |= {f"{mlp}.DenseReluDense.{name}.weight": (wide, dim) for name in ("wi_0", "wi_1")}
        shapes |= {f"{part}.layer_norm.weight": (dim,) for part in (attention, mlp)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor + ("norm" in name) for name, tensor in tensors.items()}


def folder(path, t5=True):
    """transformer/, vae/, three text encoders with their tokenizers, scheduler/ and model_index.json."""
    path = Path(path)
    tiny.fill(MMDiT(Config(**tiny.SD3)), seed=4, std=0.05).save_pretrained(path / "transformer")
    save_file(tiny.ldm_vae(**VAE), path / "vae.safetensors")
    Autoencoder.from_pretrained(path / "vae.safetensors").save_pretrained(path / "vae")
    (path / "vae.safetensors").unlink()
    for name, sizes in tiny.SD3_CLIPS.items():
        clip = tiny.fill(CLIPText(TextConfig(**{key: value for key, value in sizes.items() if key != "bos_token_id"})), seed=1)
        if name == "text_encoder":  # SD3's CLIP-L is unprojected
            clip.text_projection.weight.data = torch.eye(sizes["projection_dim"])
        clip.save_pretrained(path / name)
    tiny.clip_tokenizer(path / "tokenizer", "<|endoftext|>")
    tiny.clip_tokenizer(path / "tokenizer_2", "!")
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    for suffix in ("", "_2"):
        index[f"text_encoder{suffix}"] = ["transformers", "CLIPTextModelWithProjection"]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    if t5:
        tiny.t5_tokenizer(path / "tokenizer_3")
        (path / "text_encoder_3").mkdir()
        save_file(t5_tensors(), path / "text_encoder_3" / "model.safetensors")
        tiny.write_json(path / "text_encoder_3" / "config.json", {"model_type": "t5", **tiny.SD3_T5})
        index |= {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    (path / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    tiny.write_json(path / "scheduler" / "scheduler_config.json", scheduler)
    tiny.write_json(path / "model_index.json", index)
    return path


def single_file(file, source, parts=("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")):
    """Stability's layout of the tensors of `folder`, with what else lies in the public files."""
    tensors = {}
    for part in parts:
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        own = tiny.ldm_vae(**VAE) if part == "vae" else load_file(source / part / f"{stem}.safetensors")
        if part == "transformer":
            own = tiny.to_stability(own, json.loads((source / part / "config.json").read_text())["num_layers"])
        if part == "text_encoder":
            del own["text_projection.weight"]
        if part.startswith("text"):
            tensors[PREFIXES[part].removesuffix("transformer.") + "logit_scale"] = torch.ones(())
        tensors |= {PREFIXES[part] + name: tensor for name, tensor in own.items()}
    save_file(tensors, file)
    return file
