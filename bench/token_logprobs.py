"""Peak memory of log-probabilities, forward and backward: `Decoder.token_logprobs` against log_softmax + gather on all logits.

    python bench/token_logprobs.py
    python bench/token_logprobs.py --device cuda --dtype bfloat16

The model has Qwen2.5's vocabulary of 151,936 tokens, the 0.5B model's width and one layer: the memory in question is the
logits'. Each way runs in a process of its own. On the CPU the peak is the process's most resident memory, on CUDA the most that
torch allocated; the model's own weights and gradients, which both ways need, are part of it and printed beside it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from nano_adrpo.models.decoder import Config, Decoder

WAYS = ("plain", "chunked")


def measure(args):
    """One way in this process -> {"before": GiB of weights, gradients and (CPU) Python, "peak": GiB, "seconds", "loss"}."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = Config("qwen2", 151936, 896, 4864, 1, 14, 32768, num_key_value_heads=2, tie_word_embeddings=True)
    with torch.device(args.device):
        model = Decoder(config).to(getattr(torch, args.dtype))
        ids = torch.randint(config.vocab_size, (args.batch, args.length))
    model.model.embed_tokens.weight.data *= 0.02
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before, start = peak(args.device), time.perf_counter()
    if args.way == "plain":
        logp = model(ids)[:, :-1].float().log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    else:
        logp = model.token_logprobs(ids)
    logp.mean().backward()
    loss = logp.mean().item()
    return {"before": before, "peak": peak(args.device), "seconds": time.perf_counter() - start, "loss": loss}


def peak(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=513, help="tokens per row, of which all but the first are scored")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the model; log-probabilities are float32 in both ways")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--way", choices=WAYS, help="run one way here and print its numbers; default: both, each in its own process"
    )
    args = parser.parse_args()
    if args.way:
        return print(json.dumps(measure(args)))
    print("| way | weights and gradients, GiB | peak, GiB | above them, GiB | seconds | mean log-probability |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    peaks = []
    for way in WAYS:
        run = subprocess.run([sys.executable, *sys.argv, "--way", way], check=False, capture_output=True, text=True)
        if run.returncode:
            sys.exit(
                f"error: {way}: {run.stderr.strip().splitlines()[-1] if run.stderr else f'killed by signal {-run.returncode}'}"
            )
        got = json.loads(run.stdout)
        peaks.append(got)
        memory = f"{got['before']:.2f} | {got['peak']:.2f} | {got['peak'] - got['before']:.2f}"
        numbers = f"{memory} | {got['seconds']:.1f} | {got['loss']:.6f}"
        print(f"| {way} | {numbers} |", flush=True)
    plain, chunked = peaks
    above = [numbers["peak"] - numbers["before"] for numbers in peaks]
    print(
        f"\nchunked / plain: {chunked['peak'] / plain['peak']:.3f} in all, "
        f"{above[1] / above[0]:.3f} above weights and gradients"
    )


if __name__ == "__main__":
    main()
