"""Small decoders of every family, with weights from a formula, for the tests of the decoder and of its scores."""

import pytest
import torch

from nano_adrpo import files
from nano_adrpo.files import safetensors
from nano_adrpo.models import decoder
from nano_adrpo.models.decoder import Decoder

SIZES = {
    "vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "head_dim": 6, "rms_norm_eps": 1e-5, "attention_bias": True},
    "llama": {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": LLAMA3},
    "gemma": {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8, "hidden_act": "gelu"},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 1.5},
}  # fmt: skip


def fill(model):
    """Weights from a formula, the same everywhere, that look random: the digits of a large sine, in [−0.8, 0.8)."""
    for index, (_, tensor) in enumerate(sorted(model.state_dict().items())):
        sines = (torch.arange(tensor.numel(), dtype=torch.float64) + 1000 * index).sin() * 43758.5453
        tensor.copy_((sines - sines.floor() - 0.5).view(tensor.shape) * 1.6)
    return model.eval()


def folder(path, family="qwen3", model=Decoder, **changes):
    """A model folder of that family on disk; a change to None leaves the key out."""
    path.mkdir(exist_ok=True)
    values = {**SIZES, **FAMILIES[family], **changes}
    files.write_json(path / "config.json", {key: value for key, value in values.items() if value is not None})
    filled = fill(model(decoder.read_config(path)))
    safetensors.save(path / "model.safetensors", filled.state_dict())
    return path


@pytest.fixture
def model(tmp_path):
    return Decoder.from_pretrained(folder(tmp_path / "model"))


IDS = torch.tensor([[1, 5, 2, 12, 7, 7, 0, 3], [4, 4, 9, 11, 8, 6, 10, 2]])
