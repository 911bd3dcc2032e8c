"""Tokens per second of rollouts: `Decoder.generate` against transformers' generate on the same weights (extra `parity`).

    python bench/rollouts.py --threads 1

The demo's base model samples its own problems at temperature 1, at most 22 new tokens. Both libraries take turns in a process,
so that what else the machine does falls on both. Only tokens of completions count, each up to and including its end: those that
fill up rows that have ended do not.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from nano_adrpo.demo import GRPO
from nano_adrpo.language import chat
from nano_adrpo.models.decoder import Decoder
from nano_adrpo.rewards.text import read_problems

EXAMPLE = "12+39=c2+9=11,1+3+1=5####51"
SHAPES = {  # problems, samples of each, what stands before every problem
    "the demo's round: 8 prompts × 16": (8, 16, ""),
    "one prompt × 16": (1, 16, ""),
    "8 prompts × 16, a worked example before each": (8, 16, EXAMPLE),
    "an evaluation: 256 prompts × 8": (256, 8, ""),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="of each library per shape, after one that does not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()

    ours = Decoder.from_pretrained(GRPO["model"], device=args.device)
    theirs = AutoModelForCausalLM.from_pretrained(GRPO["model"]).to(args.device)
    tokenizer, limit, eos = chat.tokenizer_of(ours), GRPO["max_new_tokens"], chat.stop_ids(ours)

    def generate(ids, mask, samples):
        ids, mask = ids.repeat_interleave(samples, dim=0), mask.repeat_interleave(samples, dim=0)
        generator = torch.Generator(args.device).manual_seed(len(speeds[0]))
        return ours.generate(ids, mask, limit, eos=eos, generator=generator)[0]

    def transformers_generate(ids, mask, samples):
        return theirs.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=limit, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=samples, eos_token_id=eos, pad_token_id=theirs.generation_config.pad_token_id,
        )  # fmt: skip

    questions = [problem.question for problem in read_problems(GRPO["held_out"])]
    print("| rollouts | nano_adrpo | transformers | ratio |\n| --- | ---: | ---: | ---: |")
    for name, (problems, samples, before) in SHAPES.items():
        texts = [before + question for question in questions[:problems]]
        ids, mask = chat.encode_prompts(tokenizer, texts, 64, device=args.device)
        speeds = [], []
        for _ in range(args.repeats + 1):
            for speed, run in zip(speeds, (generate, transformers_generate)):
                start = time.perf_counter()
                completions = run(ids, mask, samples)[:, ids.shape[1] :]
                if args.device != "cpu":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                ends = torch.isin(completions, torch.tensor(eos, device=args.device)).long()
                tokens = (ends.cumsum(dim=1) - ends == 0).sum().item()  # up to and including the first end
                speed.append(tokens / seconds)
        ours_speed, theirs_speed = (statistics.median(speed[1:]) for speed in speeds)
        print(f"| {name} | {ours_speed:,.0f} | {theirs_speed:,.0f} | {ours_speed / theirs_speed:.2f} |", flush=True)


if __name__ == "__main__":
    main()
