"""What decides on a GPU, counted on the CPU: operations per token and layer or per block, and waits for the device, beside
transformers and diffusers on the same model. Sizes are small; the counts do not depend on them."""

import torch

from bench.language import WIDE, both
from bench.measure import operations, peak
from nano_adrpo.models import mmdit
from nano_adrpo.models.decoder import Config, Decoder


def slope(count, low, high):
    """What one more of what `count` is told adds to its numbers, from two runs."""
    return [(b - a) / (high - low) for a, b in zip(count(low), count(high))]


def decoding(dtype, steps=None):
    """{side: (operations per token and layer, operations per token besides, waits per token)} of 8 sampled rows."""
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids, found = torch.arange(8).repeat(8, 1), {}
    for side in ("ours", "theirs"):

        def per_token(layers):
            ours, theirs = (model.to(dtype) for model in both(layers, "cpu", **small))

            def count(new):
                if side == "ours":
                    return operations(lambda: ours.generate(ids, None, new, eos=[70 % 64], temperature=1.0, steps=steps))
                settings = {"do_sample": True, "top_k": 0, "min_new_tokens": new, "pad_token_id": 0}
                return operations(lambda: theirs.generate(input_ids=ids, max_new_tokens=new, eos_token_id=6, **settings))

            return slope(count, 16, 32)

        (few, waits), (many, _) = per_token(1), per_token(3)
        layer = (many - few) / 2
        found[side] = layer, few - layer, waits
    return found


def blocks(dtype):
    """{side: operations of one block of MMDiT, forward}."""
    from diffusers import SD3Transformer2DModel

    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "sample_size": 8, "joint_attention_dim": 32}
    sizes |= {"caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8, "qk_norm": "rms_norm"}
    x, context, pooled = torch.randn(2, 16, 8, 8), torch.randn(2, 5, 32), torch.randn(2, 16)
    x, context, pooled, sigma = x.to(dtype), context.to(dtype), pooled.to(dtype), torch.rand(2)

    @torch.no_grad()
    def ours(layers):
        model = mmdit.MMDiT(mmdit.Config(num_layers=layers, **sizes)).to(dtype)
        return operations(lambda: model(x, sigma, context, pooled))

    @torch.no_grad()
    def theirs(layers):
        model = SD3Transformer2DModel(num_layers=layers, **sizes).to(dtype)
        return operations(lambda: model(x, context, pooled, 1000 * sigma))

    return {"ours": slope(ours, 2, 4)[0], "theirs": slope(theirs, 2, 4)[0]}


def scores(frozen, rows=4, tokens=512):
    """{side: MiB that log-probabilities and their gradient hold beyond weights and .grad}, for one layer of Qwen2.5-0.5B."""
    with torch.device("meta"):
        model, ids = Decoder(Config("qwen2", **WIDE, num_hidden_layers=1)), torch.zeros(rows, tokens + 1, dtype=torch.long)
    model.model.embed_tokens.requires_grad_(not frozen)
    gradients = sum(weight.numel() * 4 for weight in model.parameters() if weight.requires_grad)

    def held(score):
        model.zero_grad()
        return (peak(lambda: score().mean().backward()) - gradients) / 2**20

    ours = held(lambda: model.token_logprobs(ids))
    plain = held(lambda: model(ids)[:, :-1].float().log_softmax(dim=-1).gather(-1, ids[:, 1:, None]))
    return {"ours": ours, "theirs": plain}


def rows():
    """[what, ours, theirs] of all of it."""
    for frozen in (True, False):
        found = scores(frozen)
        what = f"token_logprobs, 4 × 512 tokens of 151,936, head {'frozen' if frozen else 'trained'}, from shapes"
        yield [f"{what}: MiB beyond weights and gradients, beside log_softmax + gather", found["ours"], found["theirs"]]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for steps in (None, "fixed"):
            found, how = decoding(dtype, steps), f", {steps} steps" if steps else ""
            for i, what in enumerate(("operations per token and layer", "operations per token besides", "waits per token")):
                yield [f"generate{how}, {name}: {what}", found["ours"][i], found["theirs"][i]]
        found = blocks(dtype)
        yield [f"MMDiT, {name}: operations of a block", found["ours"], found["theirs"]]
