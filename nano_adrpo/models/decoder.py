"""A decoder language model, of the families Qwen2 (and 2.5), Qwen3, Llama, Gemma and Gemma 2.

  * pre-norm blocks of causal self-attention and gated MLP (Shazeer 2020, arXiv 2002.05202), RMS norm throughout
  * rotary positions (rope.py); grouped queries share keys and values (Ainslie et al. 2023, arXiv 2305.13245)
  * the head is a matrix of its own or, tied, the token embeddings once more
  * Qwen2: biases on queries, keys and values. Qwen3: RMS norm on each head's queries and keys. Gemma: norms scale by 1 + w,
    embeddings are multiplied by √width, the MLP's gate is a tanh GELU. Gemma 2 (2024, arXiv 2408.00118): also norms behind
    attention and MLP, and c · tanh(x / c) of attention scores and logits, so that they stay within ±c

`Decoder` gives logits, samples (language/sampling.py) and scores tokens; `RewardModel` gives one number per sequence;
`TextEncoder` the hidden states. Module names are transformers' (Qwen2ForCausalLM and the like, GemmaForSequenceClassification,
Gemma2Model), so its folders load key by key.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nano_adrpo import files
from nano_adrpo.errors import InputError
from nano_adrpo.files import config as configs
from nano_adrpo.files import safetensors
from nano_adrpo.language import sampling
from nano_adrpo.models import rope
from nano_adrpo.models.rope import rotate
from nano_adrpo.models.token_scores import TokenScores
from nano_adrpo.models.tokenizers import companions

ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}


@dataclasses.dataclass
class Config:
    """Sizes, under the names of transformers' config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / heads
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or rope_type and its numbers, see rope.py
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    query_pre_attn_scalar: float | None = None  # attention scores are divided by its root; None: head_dim's
    attn_logit_softcapping: float | None = None  # c of the attention scores
    final_logit_softcapping: float | None = None  # c of the logits
    sliding_window: int | None = None  # tokens that every other layer of Gemma 2 sees: longer texts are refused
    bos_token_id: Any = None  # these three are kept for the files; language/chat.py reads the second
    eos_token_id: Any = None
    pad_token_id: Any = None

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(f"num_key_value_heads {self.num_key_value_heads} does not divide {self.num_attention_heads} heads")
        if self.head_dim % 2 or not self.head_dim:
            raise InputError(f"head_dim is {self.head_dim}; expected an even number, since rotary positions turn pairs")

    @property
    def positions(self):
        """How many tokens a text may have."""
        return min(rope.reach(self), self.sliding_window or math.inf)

    @property
    def is_gemma(self):
        return self.model_type in ("gemma", "gemma2")


class Transformer(nn.Module):
    """ids -> hidden states. `gradient_checkpointing` = True recomputes each block in backward and keeps only its input."""

    def __init__(self, config):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, config.hidden_size)

    def forward(self, ids, mask=None, cache=None, embeddings=None):
        """ids [B, T], mask [B, S] -> [B, T, D]. With a cache, ids are the newest T of S = cache.columns(T) tokens.
        embeddings [B, T, D], where they are given, take the place of the ids' own."""
        past, count = cache.length if cache else 0, ids.shape[1]
        length = cache.columns(count) if cache else count
        if mask is not None and mask.shape != (len(ids), length):
            raise InputError(f"mask is {list(mask.shape)}; expected {[len(ids), length]}")
        if length > (self.config.sliding_window or length):
            window = self.config.sliding_window
            raise InputError(f"the texts have {length} tokens; expected at most {window}, which all layers of Gemma 2 see")
        key, fixed = torch.arange(length, device=ids.device), bool(cache and cache.fixed)
        query = past + key[:count]  # [T]
        if mask is None:
            whole = self.config.attn_logit_softcapping is None and not fixed and (not past or count == 1)
            attends, positions = (None if whole else key <= query[:, None]), query[None]
        else:
            # A padding token still sees itself: a row that sees nothing would be NaN.
            attends = (key <= query[:, None]) & mask.bool()[:, None, None] | (key == query[:, None])  # [B, 1, T, S]
            positions = (mask.long().cumsum(1) - 1).clamp(min=0).index_select(1, query)  # padding does not count
        turns = rope.rotations(self.config, positions)
        x = self.embed_tokens(ids) if embeddings is None else embeddings
        if self.config.is_gemma:
            x = x * torch.tensor(math.sqrt(self.config.hidden_size), dtype=x.dtype)  # rounded to x's dtype, as it was trained
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, turns, attends, use_reentrant=False)
            else:
                x = layer(x, turns, attends, cache)
        if cache:
            cache.length += count
        return self.norm(x)


class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        dim, inner = config.hidden_size, config.intermediate_size
        self.act = ACTIVATIONS[config.hidden_act]
        self.input_layernorm, self.self_attn = RMSNorm(config, dim), Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config, dim)
        self.mlp = nn.ModuleDict({name: nn.Linear(dim, inner, bias=False) for name in ("gate_proj", "up_proj")})
        self.mlp["down_proj"] = nn.Linear(inner, dim, bias=False)
        self.four_norms = config.model_type == "gemma2"
        if self.four_norms:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = RMSNorm(config, dim), RMSNorm(config, dim)

    def forward(self, x, turns, attends, cache=None):
        attended = self.self_attn(self.input_layernorm(x), turns, attends, cache)
        if self.four_norms:  # where Gemma 2's post_attention_layernorm is what its name says
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self.feed(self.pre_feedforward_layernorm(x)))
        x = x + attended
        return x + self.feed(self.post_attention_layernorm(x))

    def feed(self, x):
        return self.mlp["down_proj"](self.act(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x))


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.index, self.size = index, config.head_dim
        self.scale, self.cap = (config.query_pre_attn_scalar or self.size) ** -0.5, config.attn_logit_softcapping
        dim, inner, shared = config.hidden_size, config.num_attention_heads * self.size, config.num_key_value_heads * self.size
        qwen2, bias = config.model_type == "qwen2", config.attention_bias  # Qwen2 has no such option
        self.q_proj = nn.Linear(dim, inner, bias=qwen2 or bias)
        self.k_proj, self.v_proj = (nn.Linear(dim, shared, bias=qwen2 or bias) for _ in range(2))
        self.o_proj = nn.Linear(inner, dim, bias=bias and not qwen2)
        qk_norm = config.model_type == "qwen3"
        self.q_norm, self.k_norm = (RMSNorm(config, self.size) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x, turns, attends, cache=None):
        """x [B, T, D] -> [B, T, D]; attends: boolean, broadcastable to [B, heads, T, S], None for all tokens so far."""
        q, k, v = (project(x).unflatten(-1, (-1, self.size)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))  # [B, heads, T, d]
        q, k = rotate(q, turns), rotate(k, turns)
        if cache:
            k, v = cache.append(self.index, k, v)  # [B, heads, S, d]
        if x.shape[1] == 1:  # one new token: the queries that share a key take the place of a sequence, and no key is copied
            q = q.reshape(len(x), k.shape[1], -1, self.size)
        elif attends is not None:  # CUDA's memory-saving kernel for masks wants a key head for every query head
            k, v = (shared.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for shared in (k, v))
        few, causal = k.shape[1] < q.shape[1], attends is None and x.shape[1] > 1
        if self.cap is None:
            out = F.scaled_dot_product_attention(q, k, v, attends, is_causal=causal, scale=self.scale, enable_gqa=few)
        else:  # torch's kernels have no cap
            scores = soft_cap((q @ k.mT).float() * self.scale, self.cap)  # [B, heads, T, S]
            out = scores.masked_fill(~attends, -math.inf).softmax(dim=-1).to(v.dtype) @ v
        return self.o_proj(out.reshape(len(x), -1, x.shape[1], self.size).transpose(1, 2).flatten(2))


def soft_cap(x, cap):
    """Presses x into ±cap; None leaves it."""
    return x if cap is None else cap * torch.tanh(x / cap)


class RMSNorm(nn.Module):
    """x / rms(x) · (offset + weight). The sum of squares would overflow in half precision: torch's kernel computes in float32
    and rounds once, at the end."""

    def __init__(self, config, dim):
        super().__init__()
        self.eps, self.offset = config.rms_norm_eps, 1.0 if config.is_gemma else 0.0
        self.weight = nn.Parameter(torch.full((dim,), 1 - self.offset))

    def forward(self, x):
        weight = self.weight.float() + self.offset if self.offset else self.weight
        return F.rms_norm(x.to(weight.dtype), x.shape[-1:], weight, self.eps).to(x.dtype)  # one dtype, else no fused kernel


class Pretrained(nn.Module):
    """A transformer with something on top, and the folder that both live in.

    task    how the name of its class in config.json ends
    files   {name: bytes} of the small files beside the weights, such as the tokenizer's; save_pretrained writes them again
    """

    prefix = ""  # of its tensors' names in a file

    def __init__(self, config):
        super().__init__()
        self.config, self.files = config, {}
        self.model = Transformer(config)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """Opens a transformers folder. dtype None is the file's; device None the CPU."""
        return load(cls, path, read_config(path), safetensors.Checkpoint(path), dtype, device)

    def save_pretrained(self, path):
        """Writes a folder that transformers and vLLM open: config.json, model.safetensors, and `files`."""
        named = self.model if self.task == "Model" else self  # as transformers names the tensors
        safetensors.save_model(path, named, self.described(), prefix=self.prefix)
        for name, content in self.files.items():
            (Path(path) / name).parent.mkdir(exist_ok=True)
            files.write_bytes(Path(path) / name, content)

    def described(self):
        """The values of its config.json."""
        config = {"architectures": [self.config.model_type.capitalize() + self.task], **dataclasses.asdict(self.config)}
        config = {key: value for key, value in config.items() if self.config.model_type == "gemma2" or key not in GEMMA2}
        if self.task == "ForSequenceClassification":
            config["id2label"], config["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}  # one output: a reward, not classes
        return config | {"torch_dtype": str(self.model.norm.weight.dtype).removeprefix("torch.")}


class Decoder(Pretrained):
    task = "ForCausalLM"
    generate = sampling.generate  # model.generate(ids, mask, max_new_tokens, …): see there

    def __init__(self, config):
        super().__init__(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def head(self, hidden):
        """[..., D] -> logits [..., V]"""
        tied = self.config.tie_word_embeddings
        logits = F.linear(hidden, self.model.embed_tokens.weight) if tied else self.lm_head(hidden)
        return soft_cap(logits, self.config.final_logit_softcapping)

    def embed(self, ids, clips=None, start=1):
        """What takes the place of the ids' own embeddings, or None: omni.Omni, which hears `clips`, has its own."""
        if clips:
            raise InputError(f"clips were given; a {self.config.model_type} reads text only")

    def forward(self, ids, mask=None, clips=None):
        """ids [B, T], mask [B, T] (1 at tokens, 0 at padding on either side; None: all tokens) -> logits [B, T, V]."""
        return self.head(self.model(ids, mask, embeddings=self.embed(ids, clips)))

    def token_logprobs(self, ids, mask=None, start=1, temperature=1.0, entropy=False, clips=None):
        """log π(token t | tokens before t) of the given tokens t = start … T−1, in nats, float32.

        ids [B, T], mask [B, T] as in forward -> [B, T − start]. π is the softmax of logits / temperature, the distribution
        that `generate` samples at top_k=0 and top_p=1. With entropy=True: (the same, π's entropy at each of these positions
        [B, T − start], for logging: without gradient). No [B, T, V] tensor exists, forward or backward: see TokenScores.
        """
        if not (1 <= start <= ids.shape[1] and temperature > 0):
            raise InputError(f"start is {start} and temperature {temperature}; expected 1 … {ids.shape[1]} and above 0")
        hidden = self.model(ids, mask, embeddings=self.embed(ids, clips, start))  # position t−1 tells token t
        hidden = hidden[:, start - 1 : -1]  # [B, T − start, D]
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        cap, tokens = self.config.final_logit_softcapping, ids[:, start:].flatten()
        scores = TokenScores.apply(hidden.flatten(0, 1), weight, tokens, temperature, cap, entropy)
        shape = len(ids), ids.shape[1] - start
        return tuple(score.view(shape) for score in scores) if entropy else scores[0].view(shape)


class RewardModel(Pretrained):
    """One number per sequence, read at its last token. The head is `score.weight`, as RM-Gemma-2B's."""

    task = "ForSequenceClassification"

    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, ids, mask=None):
        """ids [B, T], mask [B, T] (padding on either side; None: all tokens) -> [B], float32."""
        mask = torch.ones_like(ids) if mask is None else mask
        last = (mask.bool() * torch.arange(ids.shape[1], device=ids.device)).argmax(dim=1)
        hidden = self.model(ids, mask)[torch.arange(len(ids), device=ids.device), last]  # [B, D]
        return self.score(hidden)[:, 0].float()


class TextEncoder(Pretrained):
    """The hidden states behind the last norm, which Sana reads Gemma 2's of."""

    task = "Model"

    def forward(self, ids, mask=None):
        """ids [B, T], mask [B, T] (padding on either side; None: all tokens) -> [B, T, D]."""
        return self.model(ids, mask)


# ------------------------------------------------------------------------------------------------------------------- files

# What a family's config.json leaves out has these values, which are transformers' own.
QWEN = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768, "max_window_layers": 28,
}  # fmt: skip
GEMMA = {
    "vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GEMMA2 = {  # keys of no other family
    "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096,
}  # fmt: skip
DEFAULTS = {
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128},
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gemma": {
        **GEMMA, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "gemma2": {
        **GEMMA, **GEMMA2, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}  # fmt: skip

# Keys of config.json that change the computation, and the values at which they do not.
IMPLEMENTED = {
    "model_type": tuple(DEFAULTS), "attention_dropout": (0, None), "hidden_activation": (None, "gelu_pytorch_tanh"),
    "is_causal": (True, None), "mlp_bias": (False, None), "partial_rotary_factor": (1, None),
    "use_bidirectional_attention": (False, None),
}  # fmt: skip


def read_config(path):
    """The Config of a model folder. `architectures` is not asked: the tensors tell whether a head fits."""
    where = Path(path) / "config.json"
    return parse_config(Config, files.read_json(where), where)


def parse_config(cls, values, where):
    """The Config, or a class made from it, of the values in a config.json named `where`."""
    configs.only(values, IMPLEMENTED, where, ("model_type",))
    family = values["model_type"]
    values = {**DEFAULTS[family], **values}
    values |= rope.read_rope(values, where)
    if family in ("gemma", "gemma2") and values["hidden_act"] == "gelu":
        values["hidden_act"] = "gelu_pytorch_tanh"  # what the first Gemma files meant by gelu
    own = {key: value for key, value in values.items() if family == "gemma2" or key not in GEMMA2}
    config = configs.parse(cls, own, where)
    check_windows(values, config, where)
    rope.check(config, where)
    return config


def check_windows(values, config, where):
    """Raises InputError where a layer attends within a window that is shorter than a text can be: the layers that layer_types
    names or, in older files, those from max_window_layers on."""
    kinds, window, first = values.get("layer_types"), values.get("sliding_window", 4096), values.get("max_window_layers")
    count, known = config.num_hidden_layers, {"full_attention", "sliding_attention"}
    if kinds is not None and not (isinstance(kinds, list) and len(kinds) == count and all(kind in known for kind in kinds)):
        configs.only(values, {"layer_types": (["full_attention"] * count,)}, where)
    slides = "sliding_attention" in kinds if kinds else not (type(first) is int and first >= count)
    long = window is None or type(window) is int and window >= config.positions
    if slides and not long and values.get("use_sliding_window", kinds) not in (False, None):
        never = f"at least the model's {config.positions} positions, where it never acts, or 'use_sliding_window' false"
        raise InputError(f"{where}: key 'sliding_window' is {window!r}; expected {never}")


def load(cls, path, config, file, dtype, device):
    bare = not any(key.startswith("model.") for key in file.home)  # saved without a head, by a class such as Gemma2Model
    head, embeddings, elsewhere = "lm_head.weight", "embed_tokens.weight" if bare else "model.embed_tokens.weight", {}
    ignore = r".*rotary_emb\.inv_freq"  # older files carry the rotary frequencies, which the config tells
    if cls is TextEncoder:
        ignore += f"|{head}|score.weight"
    elif config.tie_word_embeddings and head in file.home and embeddings not in file.home:
        elsewhere[embeddings] = head
    elif config.tie_word_embeddings and head in file.home:
        ignore += f"|{head}"
        one, other = file.read(head, device), file.read(embeddings, device)
        if one.shape != other.shape or not (one.is_meta or torch.equal(one, other)):
            raise InputError(f"{file.where(head)} differs from '{embeddings}', to which it is tied")

    def key_of(name):
        name = name.removeprefix("model.") if bare else name
        return elsewhere.get(name, name)

    model = safetensors.load(lambda: cls(config), file, dtype, device, key_of, ignore)
    model.files = companions(path)
    return model
