"""SANA in small, with random weights: its parts, and the folder that diffusers' SanaPipeline has."""

import json
from pathlib import Path

import tiny
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from nano_adrpo.models.dc_ae import Config as DeepConfig
from nano_adrpo.models.dc_ae import DeepAutoencoder
from nano_adrpo.models.decoder import Config as GemmaConfig
from nano_adrpo.models.decoder import TextEncoder
from nano_adrpo.models.sana import Config, Sana
from nano_adrpo.text_to_image.sana import INSTRUCTION

TRANSFORMER = dict(
    sample_size=4, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=6,
    cross_attention_head_dim=12, num_cross_attention_heads=4, cross_attention_dim=48, caption_channels=20,
)  # fmt: skip
TYPES = ("ResBlock", "EfficientViTBlock", "EfficientViTBlock")
VAE = dict(
    latent_channels=4, attention_head_dim=8, encoder_block_types=TYPES, decoder_block_types=TYPES,
    encoder_block_out_channels=(8, 16, 16), decoder_block_out_channels=(8, 16, 16), encoder_layers_per_block=(1, 1, 2),
    decoder_layers_per_block=(1, 2, 1), encoder_qkv_multiscales=((), (5,), (5,)), decoder_qkv_multiscales=((), (5,), ()),
    scaling_factor=0.41407,
)  # fmt: skip
GEMMA2 = dict(
    vocab_size=50, hidden_size=20, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, query_pre_attn_scalar=12, attn_logit_softcapping=2.0, final_logit_softcapping=1.5, max_position_embeddings=512,
    sliding_window=400,
)  # fmt: skip


def inputs(height=5, width=7):
    """latents, sigma, context and mask of four samples."""
    generator = torch.Generator().manual_seed(7)
    latents, context = (torch.randn(4, *shape, generator=generator) for shape in ((4, height, width), (6, 20)))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    return latents, torch.tensor([0.0, 0.3, 0.875, 1.0]), context, mask


def ids():
    return torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(7))


WORDS, LONG = 500, dict(max_position_embeddings=4096, sliding_window=4096)  # the pipeline's Gemma sees the whole instruction
DPM = dict(
    _class_name="DPMSolverMultistepScheduler", num_train_timesteps=1000, prediction_type="flow_prediction", flow_shift=3.0,
    use_flow_sigmas=True, solver_order=2, algorithm_type="dpmsolver++",
)  # fmt: skip


def gemma_tokenizer(folder):
    """tokenizer.json and tokenizer_config.json as Gemma's: byte pairs, blanks as ▁ before words, bytes for what is unknown,
    <bos> in front and nothing behind. Trained on the instruction."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    letters = [*map(chr, range(33, 127)), "▁"]
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=specials, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([line for line in INSTRUCTION.split("\n") for _ in range(3)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = values["added_tokens"][:4]  # the bytes are words like others
    tiny.write_json(Path(folder) / "tokenizer.json", values)
    config = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), specials)) | dict(tokenizer_class="GemmaTokenizer")
    config |= dict(padding_side="left", add_bos_token=True, add_eos_token=False, model_max_length=10**30)
    tiny.write_json(Path(folder) / "tokenizer_config.json", config)


def folder(path, scheduler=DPM):
    """transformer/, vae/, text_encoder/, tokenizer/, scheduler/ and model_index.json."""
    path = Path(path)
    tiny.fill(Sana(Config(**TRANSFORMER)), std=0.1).save_pretrained(path / "transformer")
    tiny.fill(DeepAutoencoder(DeepConfig(**VAE)), std=0.1).save_pretrained(path / "vae")
    sizes = GEMMA2 | LONG | dict(vocab_size=WORDS, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh")
    tiny.fill(TextEncoder(GemmaConfig("gemma2", **sizes))).save_pretrained(path / "text_encoder")
    gemma_tokenizer(path / "tokenizer")
    (path / "scheduler").mkdir()
    tiny.write_json(path / "scheduler" / "scheduler_config.json", scheduler)
    index = dict(_class_name="SanaPipeline", scheduler=["diffusers", scheduler["_class_name"]])
    index |= dict(transformer=["diffusers", "SanaTransformer2DModel"], vae=["diffusers", "AutoencoderDC"])
    index |= dict(text_encoder=["transformers", "Gemma2Model"], tokenizer=["transformers", "GemmaTokenizerFast"])
    tiny.write_json(path / "model_index.json", index)
    return path
