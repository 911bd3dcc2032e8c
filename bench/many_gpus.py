"""Many GPUs on paper: memory and bytes sent by model, and a discrete simulation of rounds on 8 to 1,024 of them.

    python -m bench.many_gpus                      # the tables of docs/many_gpus.md
    python -m bench.many_gpus --lengths FILE       # with completion lengths of a run of yours, a list of groups

results/lengths.json: tokens (SmolLM2's) of four models' answers to each of 256 problems of GSM8K's test set, which its authors
published beside it (example_model_solutions.jsonl). Few are long, which makes stragglers.

Assumed of a GPU (H100): 80 GB, 3.35 TB/s of memory, 990 TFLOP/s in bfloat16, of which updates reach 40 % and sampling, where it
is bound by arithmetic, 30 %. 8 GPUs a node; between nodes each GPU sends 50 GB/s. 1 GB is 10⁹ bytes.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch

from nano_adrpo import lora
from nano_adrpo.models import decoder, flux, mmdit, sana

MEMORY, BANDWIDTH, PEAK, UPDATE, SAMPLING, LINK = 80e9, 3.35e12, 990e12, 0.4, 0.3, 50e9
LATENCY = 20e-6  # seconds of a hop of a collective
SPARE = 12e9  # of each GPU: activations with checkpointing, the cache of keys and values, CUDA's own
AUDIO_TOWER = 640e6  # parameters, frozen: bfloat16
HERE = Path(__file__).parent

SD3 = {
    "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192,
}  # fmt: skip
SD35 = SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
QWEN = decoder.Config("qwen2", 152064, 3584, 18944, 28, 28, 32768, num_key_value_heads=4)
MODELS = {
    "SD3-2B": lambda: mmdit.MMDiT(mmdit.Config(**SD3)),
    "SD3.5-8B": lambda: mmdit.MMDiT(mmdit.Config(**SD35)),
    "FLUX-12B": lambda: flux.Flux(flux.Config(guidance_embeds=True)),
    "SANA-4.8B": lambda: sana.Sana(sana.Config(num_layers=60)),
    "Qwen2.5-7B": lambda: decoder.Decoder(QWEN),
    "Omni-7B": lambda: decoder.Decoder(QWEN),  # the thinker's text, beside the audio tower
}


def counted(build, rank=32):
    """-> parameters, and those of adapters of this rank on the attention's projections."""
    with torch.device("meta"):
        model = build()
    whole = sum(parameter.numel() for parameter in model.parameters())
    targets = {decoder.Decoder: lora.DECODER_TARGETS, sana.Sana: lora.MMDIT_TARGETS[:4]}
    lora.add(model, targets.get(type(model), lora.MMDIT_TARGETS), rank, rank)
    return whole, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def full_bytes(parameters, ranks):
    """Bytes on one of `ranks` GPUs that train all weights with --fsdp: float32 weight, gradient, Adam's two moments and the
    reference, 20 a parameter, in parts; and the whole in bfloat16 while a round is rolled out."""
    return 20 * parameters / ranks + 2 * parameters


def adapter_bytes(parameters, adapters, ranks=1):
    """Bytes with adapters: bfloat16 weights, 2 a parameter (with --fsdp whole in rollouts, and in parts beside that), and 16 a
    parameter of an adapter."""
    return 2 * parameters + 16 * adapters + (2 * parameters / ranks if ranks > 1 else 0)


def fewest(parameters):
    """The fewest GPUs, a power of two, on which all weights are trained; None: not even in parts of 1,024."""
    return next((n for n in (2**k for k in range(11)) if full_bytes(parameters, n) + SPARE < MEMORY), None)


def sent(ranks, parameters, width, mode):
    """Bytes that one rank sends in a gradient step of one micro-batch. Each collective sends (n − 1) / n of the tensor; an
    all-reduce twice that. width: bytes of a weight that is gathered; gradients are float32.

    replicated   the all-reduce of the gradients
    fsdp         the policy's weights before forward and before backward, the reference's before forward, the gradients' parts
    """
    share = (ranks - 1) / ranks
    return share * parameters * (2 * 4 if mode == "replicated" else 3 * width + 4)


def seconds(ranks, size):
    """Of sending `size` bytes from each rank around a ring between nodes."""
    return size / LINK + 2 * LATENCY * math.log2(ranks)


# ---------------------------------------------------------------------------------------------------------------- simulation


class Work:
    """Times of a 7B decoder on one GPU."""

    def __init__(self, parameters=7.6e9):
        self.token = 2 * parameters / BANDWIDTH  # the weights are read once for all rows that live
        self.row = 2 * parameters / (PEAK * SAMPLING)  # a row's arithmetic
        self.update = 10 * parameters / (PEAK * UPDATE)  # reference 2, policy 2, again for checkpointing 2, backward 4

    def rollout(self, lengths):
        """All rows of a rank at once; those that have ended leave the batch."""
        return self.token * max(lengths) + self.row * sum(lengths)

    def step(self, lengths, micro_batch, packed):
        """Micro-batches padded to their longest row; packed: rows of similar lengths together."""
        rows = sorted(lengths) if packed else lengths
        parts = [rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch)]
        return self.update * sum(max(part) * len(part) for part in parts)


def simulate(groups, ranks, prompts, size, packed, adapters, rounds, seed=0):
    """Means over rounds -> {"rollout", "wait", "update", "rate"}: seconds of the slowest rank's rollout, of the average rank's
    waiting for it, of the update and its all-reduce; completions per second and GPU.

    groups    [[length]], completions of one prompt each, that a real run wrote
    prompts   a round, over all ranks; size: completions of each
    packed    the update's rows go to ranks by length, the longest first to the rank with the least; not packed: in any order
    """
    draw, work, total = random.Random(seed), Work(), {"rollout": 0, "wait": 0, "update": 0}
    for _ in range(rounds):
        drawn = [[draw.choice(group) for _ in range(size)] for group in draw.choices(groups, k=prompts)]
        mine = [sum(drawn[rank * prompts // ranks : (rank + 1) * prompts // ranks], []) for rank in range(ranks)]
        rollouts = [work.rollout(lengths) for lengths in mine]
        rows = sum(drawn, [])
        if packed:
            order, dealt = sorted(rows, reverse=True), [[] for _ in range(ranks)]
            for start in range(0, len(order), ranks):  # to and fro, so that every rank gets as many rows
                some = order[start : start + ranks]
                for rank, length in zip(range(ranks) if start // ranks % 2 == 0 else reversed(range(ranks)), some):
                    dealt[rank].append(length)
        else:
            draw.shuffle(rows)
            dealt = [rows[rank::ranks] for rank in range(ranks)]
        update = max(work.step(lengths, 8, packed) for lengths in dealt)
        total["rollout"] += max(rollouts)
        total["wait"] += max(rollouts) - sum(rollouts) / ranks
        total["update"] += update + seconds(ranks, sent(ranks, adapters, 4, "replicated"))
    means = {name: value / rounds for name, value in total.items()}
    return means | {"rate": prompts * size / (means["rollout"] + means["update"]) / ranks}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", default=HERE / "results" / "lengths.json", help="JSON: a list of groups of lengths")
    parser.add_argument("--longest", type=int, default=512, help="what --max-new-tokens cuts them at")
    args = parser.parse_args()
    print("| model | parameters | adapters | all weights, fewest GPUs of 80 GB | GB on each | adapters: GPUs, GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    sizes = {}
    for name, build in MODELS.items():
        whole, adapters = sizes[name] = counted(build)
        more = 2 * AUDIO_TOWER if name == "Omni-7B" else 0
        few = fewest(whole)
        with_adapters = adapter_bytes(whole, adapters) + more + SPARE
        gpus = f"{few} | {(full_bytes(whole, few) + more + SPARE) / 1e9:.0f}"
        gpus += f" | {1 if with_adapters < MEMORY else 2}, {with_adapters / 1e9:.0f}"
        print(f"| {name} | {whole / 1e9:.2f}e9 | {adapters / 1e6:.1f}e6 | {gpus} |")
    print("\n| model | replicated, adapters: GB sent a step | seconds | --fsdp, all weights: GB sent a step | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for name, (whole, adapters) in sizes.items():
        a, b = sent(64, adapters, 4, "replicated"), sent(64, whole, 2, "fsdp")
        print(f"| {name} | {a / 1e9:.2f} | {seconds(64, a):.3f} | {b / 1e9:.0f} | {seconds(64, b):.1f} |")
    groups = [[min(args.longest, length) for length in group] for group in json.loads(Path(args.lengths).read_text())]
    lengths = sorted(sum(groups, []))
    print(f"\nlengths: {len(lengths)}, mean {sum(lengths) / len(lengths):.0f}, median {lengths[len(lengths) // 2]}, "
          f"90 % {lengths[len(lengths) * 9 // 10]}, longest {lengths[-1]}")  # fmt: skip
    adapters = sizes["Qwen2.5-7B"][1]
    for title, of in (
        ("64 prompts × 16 for each 8 GPUs (weak scaling)", lambda ranks: (8 * ranks, 16, False)),
        ("the same, packed by length", lambda ranks: (8 * ranks, 16, True)),
        ("1,024 prompts × 16 in all (strong scaling), packed", lambda ranks: (1024, 16, True)),
        ("1,024 prompts × 64 in all (larger groups), packed", lambda ranks: (1024, 64, True)),
    ):
        print(f"\n{title}\n\n| GPUs | rollout s | of which waiting | update s | completions a second and GPU | of 8 GPUs' |")
        print("| --- | --- | --- | --- | --- | --- |")
        first = None
        for ranks in (8, 32, 128, 256, 512, 1024):
            prompts, size, packed = of(ranks)
            found = simulate(groups, ranks, prompts, size, packed, adapters, rounds=max(2, 32 // ranks))
            first = first or found["rate"]
            print(f"| {ranks} | {found['rollout']:.2f} | {found['wait'] / found['rollout']:.0%} | {found['update']:.2f} | "
                  f"{found['rate']:.2f} | {found['rate'] / first:.0%} |")  # fmt: skip


if __name__ == "__main__":
    main()
