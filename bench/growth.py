"""How time and memory grow: the slope of their logarithm over that of a size, beside what is expected."""

import torch

from bench.language import both
from bench.measure import clock, exponent, peak
from nano_adrpo.models import mmdit

SMALL = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


def curves(device):
    """(what, the size that grows, its values, what time and memory are expected to grow with, a function: size -> a run)."""
    model, _ = both(2, device, **SMALL)
    wide = {size: both(1, device, **SMALL | {"vocab_size": size})[0] for size in (16384, 65536)}

    def tokens(count):
        ids = torch.randint(2048, (1, count), device=device)
        return lambda: model.token_logprobs(ids).sum().backward()

    def vocabulary(size):
        ids = torch.randint(2048, (2, 513), device=device)
        return lambda: torch.no_grad()(wide[size].token_logprobs)(ids)

    def group(size):
        ids = torch.randint(2048, (1, 512), device=device).expand(size, -1)
        return lambda: model.generate(ids, None, 4)

    def side(size):
        sizes = {"num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 64}
        sizes |= {"caption_projection_dim": 128, "pooled_projection_dim": 64, "pos_embed_max_size": 64}
        network, x = mmdit.MMDiT(mmdit.Config(**sizes)).to(device), torch.randn(1, 16, size, size, device=device)
        context, pooled = torch.randn(1, 8, 64, device=device), torch.randn(1, 64, device=device)
        return lambda: torch.no_grad()(network)(x, torch.ones(1, device=device), context, pooled)

    yield "token_logprobs and gradient", "tokens", (256, 1024), "1 … 2", "1", tokens
    yield "token_logprobs", "vocabulary", (16384, 65536), "1", "0 … 1", vocabulary
    yield "generate, one prompt of 512", "group", (4, 16), "0 … 1", "0 … 1", group
    yield "MMDiT forward", "image side", (32, 96), "2 … 4", "2", side


def rows(device):
    """[what, size, values, exponent of time, expected, exponent of memory, expected]"""
    for what, name, sizes, expected_time, expected_memory, run_of in curves(device):
        seconds, bytes_held = [], []
        for size in sizes:
            run = run_of(size)
            run()
            seconds.append(min(clock(run, device)[0] for _ in range(3)))
            bytes_held.append(peak(run, device))
        grown = exponent(sizes, seconds), exponent(sizes, bytes_held)
        yield [what, name, list(sizes), grown[0], expected_time, grown[1], expected_memory]
