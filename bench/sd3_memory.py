"""What fine-tuning SD3-medium with adapters takes: memory by phase, on paper from shapes or measured on a GPU.

    python -m bench.sd3_memory --paper                        # no GPU needed
    python -m bench.sd3_memory --resolution 512               # random weights of full size, on CUDA
    python -m bench.sd3_memory --resolution 1024 --micro-batch 4

bfloat16 weights, rank-32 adapters, float32 Adam, gradient checkpointing per block, the autoencoder one image at a time, CLIP
L/14 in float32 on the GPU only while it scores, prompt embeddings made before. 1 GB is 10⁹ bytes.
"""

import argparse
import sys
import time

import torch
import torch.nn.functional as F

from nano_adrpo import adrpo, lora
from nano_adrpo.models import mmdit, vae

SD3 = mmdit.Config(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
    num_attention_heads=24,
    joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192,
)  # fmt: skip
VAE = vae.Config(latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
CLIP_L14 = 427_616_513  # parameters of openai/clip-vit-large-patch14
TOKENS = 333  # 77 of CLIP and 256 of T5


class Attention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: queries, keys, values and the output, and no [T, T] scores."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def transformer(device):
    with torch.device("meta"):
        model = mmdit.MMDiT(SD3).to(torch.bfloat16)
    if device != "meta":
        model = model.to_empty(device=device)
        for tensor in (*model.parameters(), *model.buffers()):
            torch.nn.init.normal_(tensor, std=0.02)
    lora.add(model, lora.MMDIT_TARGETS, rank=32, alpha=32)
    model.gradient_checkpointing = True
    return model


def inputs(batch, resolution, device):
    side = resolution // 8
    options = {"device": device, "dtype": torch.bfloat16}
    latents, context = torch.empty(batch, 16, side, side, **options), torch.empty(batch, TOKENS, 4096, **options)
    pooled = torch.empty(batch, 2048, **options)
    return [latents.normal_(), torch.full((batch,), 0.5, device=device), context.normal_(), pooled.normal_()]


def kept(run, weights):
    """Bytes that autograd keeps of one forward pass, each storage once, the weights aside."""
    own, sizes = {p.untyped_storage()._cdata for p in weights}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage, storage.nbytes()  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return sum(size for _, size in sizes.values())


def paper(resolution, micro_batch, rollout_batch):
    """-> {what: bytes}."""
    model, fused = transformer("meta"), F.scaled_dot_product_attention
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) - 4 * trained
    F.scaled_dot_product_attention = lambda q, k, v, **_: Attention.apply(q, k, v)
    try:
        at = inputs(1, resolution, "meta")
        checkpointed = kept(lambda: model(*at), model.parameters())
        model.gradient_checkpointing = False
        every = kept(lambda: model(*at), model.parameters())
    finally:
        F.scaled_dot_product_attention = fused
    block = (every - checkpointed) / SD3.num_layers  # what one block keeps while it is computed again
    with torch.device("meta"):
        decoder = vae.Autoencoder(VAE).to(torch.bfloat16)
    # Decoding is widest in the last stage: 256 channels come in at full size; input, norm, activation, convolution, sum live.
    decode = 5 * 256 * resolution**2 * 2
    return {
        "transformer, bfloat16": base,
        "adapters, gradients, Adam's moments, float32": 16 * trained,
        "autoencoder, bfloat16": 2 * sum(p.numel() for p in decoder.parameters()),
        "rollout: activations of a block": rollout_batch * block,
        "decoding one image": decode,
        "scoring: CLIP L/14, float32": 4 * CLIP_L14,
        "update: block inputs kept": micro_batch * checkpointed,
        "update: one block computed again, and its gradients": 2 * micro_batch * block,
    }


def budget(parts):
    """-> bytes of the largest phase."""
    held = sum(list(parts.values())[:3])
    rollout, decode, score, inputs_kept, block = list(parts.values())[3:]
    return held + max(rollout, decode + score, inputs_kept + block)


def measure(resolution, micro_batch, rollout_batch):
    """Peak memory and seconds of each phase, after one round that does not count. Random weights: only shapes matter."""
    model = transformer("cuda")
    with torch.device("meta"):
        decoder = vae.Autoencoder(VAE).to(torch.bfloat16)
    decoder = decoder.to_empty(device="cuda")
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-6)

    def rollout():
        with torch.no_grad():
            for _ in range(2):  # guidance
                model(*inputs(rollout_batch, resolution, "cuda"))

    def decode():
        with torch.no_grad():
            decoder.decode(inputs(1, resolution, "cuda")[0])

    def update():
        at, u = inputs(micro_batch, resolution, "cuda"), inputs(micro_batch, resolution, "cuda")[0]
        with torch.no_grad(), lora.disabled(model):
            v_ref = -model(*at)
        ones = torch.ones(micro_batch, device="cuda")
        adrpo.flow_loss(-model(*at), u, v_ref, ones, ones).backward()
        optimizer.step()
        optimizer.zero_grad()

    rows = {}
    for name, phase in (("one step of a rollout, guided", rollout), ("decoding one image", decode), ("one update", update)):
        phase()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        phase()
        torch.cuda.synchronize()
        rows[name] = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--paper", action="store_true", help="compute the budget of 512 and 1024 px from shapes; no GPU")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--rollout-batch", type=int, default=16)
    args = parser.parse_args()
    if args.paper:
        columns = [paper(512, args.micro_batch, args.rollout_batch), paper(1024, args.micro_batch, args.rollout_batch)]
        print("| GB | 512 px | 1024 px |\n| --- | ---: | ---: |")
        for name in columns[0]:
            print(f"| {name} | " + " | ".join(f"{column[name] / 1e9:.2f}" for column in columns) + " |")
        print(
            "| **largest phase, with what is always held** | "
            + " | ".join(f"**{budget(c) / 1e9:.1f}**" for c in columns)
            + " |"
        )
        return
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU here; --paper computes the budget from shapes")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args}\n\n"
        "| phase | seconds | peak GB |\n| --- | ---: | ---: |"
    )
    for name, (seconds, peak) in measure(args.resolution, args.micro_batch, args.rollout_batch).items():
        print(f"| {name} | {seconds:.3f} | {peak / 1e9:.1f} |")


if __name__ == "__main__":
    main()
