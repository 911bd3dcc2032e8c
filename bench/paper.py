"""FLOPs and peak bytes of full-size models, computed from shapes on meta: python -m bench.paper

Writes bench/results/paper.md, which docs quote. Weights are bfloat16, adapters of rank 32 and their gradients float32; blocks
are checkpointed; attention is counted as a fused kernel's, which keeps no scores. The formula: a multiply-add for each weight
and token that reads it, and 4·S²·D FLOPs of attention in each layer of width D over S tokens; a training step is four such
passes: the reference's, the policy's, the policy's again for backward, and the gradient of what it read.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from bench.measure import flops, peak
from bench.sd3_memory import SD3, Attention
from nano_adrpo import adrpo, lora
from nano_adrpo.models import mmdit
from nano_adrpo.models.decoder import Config, Decoder

LARGE = mmdit.Config(  # SD3.5-large
    sample_size=128, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192,
    qk_norm="rms_norm",
)  # fmt: skip
QWEN = Config(  # Qwen2.5-7B
    "qwen2", 152064, 3584, 18944, 28, 28, 32768, num_key_value_heads=4, rope_theta=1e6,
)  # fmt: skip
IMAGES, TEXT = 333, (4, 1024)  # a prompt's tokens in SD3; sequences and tokens of a language model's micro-batch
HEAD = "GFLOP of one forward pass | formula | GFLOP of one training step | formula | GB, weights | GB above, training step"


def fused(run):
    """What `run` gives while attention keeps what a fused kernel keeps."""
    kept, F.scaled_dot_product_attention = F.scaled_dot_product_attention, lambda q, k, v, *_, **__: Attention.apply(q, k, v)
    try:
        return run()
    finally:
        F.scaled_dot_product_attention = kept


def adapted(model, targets):
    model = model.to(torch.bfloat16)
    read = {name: p for name, p in model.named_parameters() if p.dim() > 1 and "embed_tokens" not in name}
    lora.add(model, targets, 32, 32)
    return model, read


def flow(config, resolution):
    """-> the numbers of one row: ADRPO-FM, one image."""
    with torch.device("meta"):
        model, read = adapted(mmdit.MMDiT(config), lora.MMDIT_TARGETS)
    model.gradient_checkpointing, side = True, resolution // 8
    half = {"device": "meta", "dtype": torch.bfloat16}
    inputs = [torch.empty(1, 16, side, side, **half), torch.empty(1, device="meta"), torch.empty(1, IMAGES, 4096, **half)]
    inputs += [torch.empty(1, 2048, **half)]

    def step():
        with torch.no_grad(), lora.disabled(model):
            v_ref = model(*inputs)
        one = torch.ones(1, device="meta")
        adrpo.flow_loss(model(*inputs), inputs[0], v_ref, one, one).backward()

    image, tokens, formula = side**2 // 4, side**2 // 4 + IMAGES, 0
    for name, weight in read.items():  # what modulates reads one vector, not tokens
        one = ".linear." in name and "norm" in name or name.startswith(("time_text", "norm_out"))
        context = ".add_" in name or "to_add_out" in name or "ff_context" in name or name.startswith("context")
        formula += 2 * weight.numel() * (1 if one else IMAGES if context else image)
    formula += config.num_layers * 4 * tokens**2 * config.dim
    return model, lambda: torch.no_grad()(model)(*inputs), step, formula


def text(config):
    """-> the numbers of one row: ADRPO-GRPO, a micro-batch."""
    with torch.device("meta"):
        model, read = adapted(Decoder(config), lora.DECODER_TARGETS)
    model.model.gradient_checkpointing = True
    ids = torch.empty(TEXT, dtype=torch.long, device="meta")

    def step():
        with torch.no_grad(), lora.disabled(model):
            ref = model.token_logprobs(ids)
        logp = model.token_logprobs(ids)
        ones = torch.ones(len(ids), device="meta")
        adrpo.policy_loss(logp, logp.detach(), ref, torch.ones_like(ref), ones, 0.04).backward()

    rows, length = TEXT
    formula = 2 * rows * length * sum(weight.numel() for weight in read.values())
    formula += config.num_hidden_layers * rows * 4 * length**2 * config.num_attention_heads * config.head_dim
    return model, lambda: torch.no_grad()(model.token_logprobs)(ids), step, formula


def row(name, model, forward, step, formula):
    held = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    computed = [flops(forward), flops(step)]
    for parameter in model.parameters():
        parameter.grad = None
    beyond = fused(lambda: peak(step, "meta"))
    numbers = [computed[0] / 1e9, formula / 1e9, computed[1] / 1e9, 4 * formula / 1e9, held / 1e9, beyond / 1e9]
    return f"| {name} | " + " | ".join(f"{number:,.1f}" if number < 100 else f"{number:,.0f}" for number in numbers) + " |"


def main():
    rows = {
        "SD3-medium, one image of 512 px": flow(SD3, 512),
        "SD3-medium, one image of 1024 px": flow(SD3, 1024),
        "SD3.5-large, one image of 1024 px": flow(LARGE, 1024),
        f"Qwen2.5-7B, {TEXT[0]} sequences of {TEXT[1]:,} tokens": text(QWEN),
    }
    lines = [f"| computed, not measured | {HEAD} |", "| --- |" + " ---: |" * 6]
    lines += [row(name, *numbers) for name, numbers in rows.items()]
    words = (
        "**Computed from shapes on meta, not measured.** `python -m bench.paper`: bfloat16, adapters of rank 32, checkpoints."
    )
    (Path(__file__).parent / "results" / "paper.md").write_text("\n".join([words, "", *lines]) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
