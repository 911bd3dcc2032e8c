"""ADRPO-GRPO (Eq. 7) and GRPO (Eq. 3): the whole loop in one file.

    python train_grpo.py                                             # the arithmetic demo, on the CPU
    python train_grpo.py --method grpo --out runs/grpo               # the baseline: the same loss, β0 instead of β0 − A
    python train_grpo.py --lora-rank 8 --lora-alpha 16 --lr 5e-3 --out runs/lora   # low-rank adapters on a frozen model
    python train_grpo.py --model QWEN_FOLDER --problems train.jsonl --held-out test.jsonl --max-new-tokens 512 --lr 1e-6 \\
        --device cuda --dtype bfloat16 --micro-batch 8 --gradient-checkpointing --out runs/qwen

One round: draw problems, sample a group of completions for each, reward them, turn rewards into advantages, score the tokens
under the policy that sampled them and under the reference, take clipped policy-gradient steps, log. The reference is a frozen
copy of the policy at the start or, with --lora-rank, the policy with its adapters off. Written to --out: config.json,
metrics.jsonl, samples.txt, model/ (transformers' layout) or adapter/ (PEFT's) and, with matplotlib, curves.png.
"""

import contextlib
import copy
import json
import time
from typing import NamedTuple

import torch

from nano_adrpo import adrpo, chat, lora, metrics, plots, rewards_text, runtime, weights
from nano_adrpo.demo import arithmetic
from nano_adrpo.models.decoder import Decoder
from nano_adrpo.runtime import positive


def parse(argv=None):
    parser = runtime.Parser(__doc__.split("\n")[0])
    add = parser.add_argument_group("algorithm").add_argument
    add("--method", choices=("adrpo", "grpo"), default="adrpo", help="coefficient of the KL: β0 − A, or β0")
    add("--beta0", type=positive(float), default=0.04, help="baseline strength β0 (adrpo), or the strength β (grpo)")
    add("--a-min", type=float, help="A_min, the lower bound of A within β0 − A, in deviations; default −β0")
    add("--a-max", type=float, help="A_max, its upper bound; default β0")
    add("--clip-eps", type=positive(float), default=0.2, help="ε of the ratio's clip [1 − ε, 1 + ε]")
    add("--kl", choices=("k1", "k2", "k3"), default="k3", help="estimator of the KL; k1 has no gradient")
    add("--average", choices=("sequences", "tokens"), default="sequences", help="what the loss is a mean over")
    add = parser.add_argument_group("rollouts").add_argument
    add("--prompts-per-round", type=positive(int), default=8, help="problems drawn a round")
    add("--group-size", type=positive(int), default=16, help="completions per problem, at least 2")
    add("--max-new-tokens", type=positive(int), default=arithmetic.LONGEST, help="tokens of a completion, its end included")
    add("--max-prompt-tokens", type=positive(int), default=512, help="a longer prompt is refused")
    add("--temperature", type=positive(float), default=1.0, help="of sampling, and of the scores that the loss uses")
    add = parser.add_argument_group("optimisation").add_argument
    add("--rounds", type=positive(int), default=110, help="rounds of rollouts")
    add("--inner-epochs", type=positive(int), default=1, help="μ, passes over a round's completions")
    add("--minibatches", type=positive(int), default=1, help="gradient steps per pass; must divide a round's completions")
    add("--micro-batch", type=positive(int), help="completions per forward pass; must divide a minibatch; default all of it")
    add("--lr", type=positive(float), default=8e-4, help="AdamW's learning rate for the first half of the rounds")
    add("--lr-end", type=positive(float, zero=True), default=0.0, help="its share at the end; a straight fall from half-way")
    add("--clip-grad", type=positive(float), default=1.0, help="largest norm of the gradient")
    add("--gradient-checkpointing", action="store_true", help="keep block inputs only and recompute the rest: less memory")
    add("--lora-rank", type=positive(int, zero=True), default=0, help="rank of adapters to train; 0 trains all weights")
    add("--lora-alpha", type=positive(float), help="the adapters' strength is alpha / rank; default the rank")
    add("--lora-targets", nargs="+", help="names of layers to adapt; default " + " ".join(lora.DECODER_TARGETS))
    add = parser.add_argument_group("inputs").add_argument
    add("--model", default=str(arithmetic.HERE / "arithmetic_base"), help="Qwen2, Qwen2.5, Qwen3, Llama or Gemma folder")
    add("--problems", help='JSON lines of GSM8K\'s format ("question", "answer" with "#### number"); default the demo\'s')
    add("--held-out", help="the same, for evaluation; needed with --problems")
    add("--instruction", default="", help="text put behind every question")
    add("--reward", nargs="+", default=["exact"], help="NAME[:FOLDER][@WEIGHT] …, see nano_adrpo/rewards_text.py")
    add("--format-reward", type=positive(float, zero=True), default=0.0, help="for an answer in \\boxed{} or after ####")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/grpo", help="new or empty folder for the run's files")
    add("--seed", type=runtime.seed, default=0, help="of adapters, problems, samples and minibatches")
    add("--device", type=runtime.device, default="cpu", help="torch device")
    add("--dtype", choices=tuple(runtime.DTYPES), default="float32", help="of forward passes; what is trained stays float32")
    add("--eval-every", type=positive(int), default=22, help="rounds between evaluations, with a checkpoint each")
    add("--eval-samples", type=positive(int), default=8, help="completions per held-out problem in an evaluation")
    add("--eval-batch", type=positive(int), default=1024, help="completions sampled at a time in an evaluation")
    add("--eval-temperature", type=positive(float, zero=True), default=1.0, help="in an evaluation; 0 is greedy")
    add("--eval-top-k", type=positive(int, zero=True), default=0, help="likeliest tokens kept in an evaluation; 0 keeps all")
    add("--eval-top-p", type=positive(float), default=1.0, help="probability kept in an evaluation; 1 keeps all")
    args = parser.parse_args(argv)
    size = args.prompts_per_round * args.group_size
    if args.group_size < 2:
        raise ValueError("--group-size 1: expected at least 2, since an advantage compares completions of one problem")
    if size % args.minibatches:
        raise ValueError(f"--minibatches {args.minibatches} does not divide the {size} completions of a round")
    args.micro_batch = args.micro_batch or size // args.minibatches
    if size // args.minibatches % args.micro_batch:
        raise ValueError(
            f"--micro-batch {args.micro_batch} does not divide the {size // args.minibatches} completions of a minibatch"
        )
    if bool(args.problems) != bool(args.held_out):
        raise ValueError("--problems and --held-out: expected both or neither")
    if args.eval_top_p > 1:
        raise ValueError(f"--eval-top-p {args.eval_top_p}: expected at most 1")
    if not args.lora_rank and (args.lora_alpha or args.lora_targets):
        raise ValueError("--lora-alpha and --lora-targets: expected only with --lora-rank")
    if args.lora_rank:
        args.lora_alpha = args.lora_alpha or args.lora_rank
        args.lora_targets = args.lora_targets or list(lora.DECODER_TARGETS)
    args.a_min = -args.beta0 if args.a_min is None else args.a_min
    args.a_max = args.beta0 if args.a_max is None else args.a_max
    with runtime.about("--a-min and --a-max"):
        adrpo.clamp_advantages(torch.zeros(1), args.beta0, (args.a_min, args.a_max))  # refuses an empty range
    return args


class Rollout(NamedTuple):
    """N completions, those of a group contiguous."""

    ids: torch.Tensor  # [N, T], prompts padded on the left, then their completions
    seen: torch.Tensor  # [N, T], 1 at tokens, 0 at padding on either side
    mask: torch.Tensor  # [N, C], the last C columns of `seen`: 1 at the completion's tokens, its end included
    texts: list
    correct: torch.Tensor  # [N], 1 where the final number is right
    rewards: torch.Tensor  # [N]
    parts: dict  # what they are the weighted sum of, {reward_NAME: [N]}; empty where it is one


class Run:
    """The models and problems, and the three phases that use them: rollout, update, evaluation."""

    def __init__(self, args):
        self.args, self.demo = args, args.problems is None
        data = arithmetic.HERE / "arithmetic_data"
        files = args.problems or data / "train.jsonl", args.held_out or data / "held_out.jsonl"
        self.problems, self.held_out = (rewards_text.read_problems(file, args.instruction) for file in files)
        specs = [*args.reward, *([f"format@{args.format_reward}"] if args.format_reward else [])]
        self.reward = rewards_text.parse(specs, args.device, args.micro_batch, self.autocast)
        dtype = runtime.DTYPES[args.dtype] if args.lora_rank else torch.float32  # weights that are trained are float32
        self.policy = Decoder.from_pretrained(args.model, dtype, args.device)
        with runtime.about(f"--model {args.model}"):
            self.tokenizer, self.eos = chat.tokenizer_of(self.policy), chat.stop_ids(self.policy)
            self.template = chat.template_of(self.policy)
        self.draws = torch.Generator().manual_seed(args.seed)  # of adapters, problems and minibatches
        if args.lora_rank:
            with runtime.about("--lora-targets"):
                lora.add(self.policy, args.lora_targets, args.lora_rank, args.lora_alpha, self.draws)
        else:
            self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.policy.model.gradient_checkpointing = args.gradient_checkpointing
        for file, problems in zip(files, (self.problems, self.held_out)):
            with runtime.about(f"{file}, --max-prompt-tokens {args.max_prompt_tokens}"):
                longest, limit = self.encode(problems)[0].shape[1], self.policy.config.max_position_embeddings
            if longest + args.max_new_tokens > limit:
                behind = f"--max-new-tokens {args.max_new_tokens} behind a prompt of {longest}"
                raise ValueError(f"{file}: {behind} exceeds the model's {limit} positions")
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
        half = args.rounds / 2
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1 - (1 - args.lr_end) * max(0.0, (step - half) / half)
        )
        self.generator = torch.Generator(args.device).manual_seed(args.seed)  # of tokens

    def encode(self, problems):
        """Problems -> ids and mask [N, T], padded on the left."""
        texts = [problem.question for problem in problems]
        if self.template:
            texts = [self.template([{"role": "user", "content": text}]) for text in texts]
        return chat.encode_prompts(
            self.tokenizer, texts, self.args.max_prompt_tokens, special=not self.template, device=self.args.device
        )

    def autocast(self):
        dtype = runtime.DTYPES[self.args.dtype]
        return torch.autocast(torch.device(self.args.device).type, dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def roll_out(self, problems, generator, **sampling):
        """One completion of each problem (those of a group contiguous: they share one prefill). -> Rollout"""
        ids, prompts = self.encode(problems)
        with self.autocast():
            full, mask = self.policy.generate(
                ids, prompts, self.args.max_new_tokens, eos=self.eos, generator=generator, **sampling
            )
        seen, texts = torch.cat([prompts, mask], dim=1), chat.decode(self.tokenizer, full[:, ids.shape[1] :], mask)
        correct = torch.tensor([rewards_text.exact_answer(text, p.answer) for text, p in zip(texts, problems)])
        scores = self.reward(texts, problems)
        rewards = scores.pop("reward").to(self.args.device)
        return Rollout(full, seen, mask, texts, correct, rewards, {f"reward_{name}": part for name, part in scores.items()})

    def score(self, model, rollout, rows, temperature=None, entropy=False):
        """log π(token) of the completions in `rows`, [n, C], at the temperature they were sampled at."""
        start, temperature = rollout.ids.shape[1] - rollout.mask.shape[1], temperature or self.args.temperature
        with self.autocast():
            return model.token_logprobs(rollout.ids[rows], rollout.seen[rows], start, temperature, entropy)

    def as_reference(self):
        """`with run.as_reference() as model:` is the policy at the start."""
        return lora.disabled(self.policy) if self.args.lora_rank else contextlib.nullcontext(self.reference)

    @torch.no_grad()
    def score_all(self, rollout, temperature=None):
        """-> the policy's log-probabilities, the reference's, the policy's entropies, each [N, C]."""
        parts = torch.arange(len(rollout.ids), device=rollout.ids.device).split(self.args.micro_batch)
        policy = [self.score(self.policy, rollout, rows, temperature, entropy=True) for rows in parts]
        with self.as_reference() as model:
            reference = [self.score(model, rollout, rows, temperature) for rows in parts]
        return torch.cat([logp for logp, _ in policy]), torch.cat(reference), torch.cat([entropy for _, entropy in policy])

    def update(self, rollout):
        """Clipped policy-gradient steps on one round's completions. -> what to log of it."""
        args, mask, rewards = self.args, rollout.mask, rollout.rewards
        advantages = adrpo.group_advantages(rewards, args.group_size, normalize=True)
        beta = torch.full_like(advantages, args.beta0)  # GRPO, Eq. 3
        if args.method == "adrpo":
            beta = adrpo.adaptive_beta(advantages, args.beta0, (args.a_min, args.a_max))  # ADRPO-GRPO, Eq. 7: all that differs
        old_logp, ref_logp, entropy = self.score_all(rollout)
        tokens, clipped = mask.bool(), 0
        for _ in range(args.inner_epochs):
            for batch in torch.randperm(len(mask), generator=self.draws).to(mask.device).chunk(args.minibatches):
                self.optimizer.zero_grad()
                total, loss_sum = (len(batch) if args.average == "sequences" else int(mask[batch].sum())), 0.0
                for rows in batch.split(args.micro_batch):
                    logp = self.score(self.policy, rollout, rows)
                    loss = adrpo.policy_loss(
                        logp, old_logp[rows], ref_logp[rows], mask[rows], advantages[rows], beta[rows],
                        args.clip_eps, args.kl, args.average, total,
                    )  # fmt: skip
                    loss.backward()
                    loss_sum += loss.item()
                    outside = ((logp.detach() - old_logp[rows]).exp() - 1).abs() > args.clip_eps
                    clipped += (outside & tokens[rows]).sum().item()
                norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), args.clip_grad).item()
                if not (abs(loss_sum) < float("inf") and norm < float("inf")):
                    raise FloatingPointError(f"loss {loss_sum}, gradient norm {norm}")
                self.optimizer.step()
        self.schedule.step()
        spread = rewards.reshape(-1, args.group_size)
        bounds = (advantages <= args.a_min) | (advantages >= args.a_max)
        return {
            "loss": loss_sum, "grad_norm": norm, "clip_fraction": clipped / (args.inner_epochs * tokens.sum().item()),
            "entropy": entropy[tokens].mean().item(), **metrics.kl_from_reference(old_logp[tokens], ref_logp[tokens]),
            "beta_min": beta.min().item(), "beta_mean": beta.mean().item(), "beta_max": beta.max().item(),
            "beta_at_bounds": bounds.float().mean().item() if args.method == "adrpo" else 0.0,
            "zero_spread": (spread == spread[:, :1]).all(dim=1).float().mean().item(),
        }  # fmt: skip

    @torch.no_grad()
    def evaluate(self):
        """-> metrics over the held-out problems, drawn with the same generator each time; some completions."""
        args, size = self.args, self.args.eval_samples
        problems = [problem for problem in self.held_out for _ in range(size)]
        generator = torch.Generator(args.device).manual_seed(1_000_003)
        sampling = {"temperature": args.eval_temperature, "top_k": args.eval_top_k, "top_p": args.eval_top_p}
        rollouts, scores = [], []
        for start in range(0, len(problems), args.eval_batch):
            rollouts.append(self.roll_out(problems[start : start + args.eval_batch], generator, **sampling))
            tokens = rollouts[-1].mask.bool()
            scores.append([score[tokens] for score in self.score_all(rollouts[-1], args.eval_temperature or args.temperature)])
        logp, ref_logp, entropy = map(torch.cat, zip(*scores))  # each [tokens of all completions]
        correct, texts = (
            torch.cat([rollout.correct for rollout in rollouts]),
            [t for rollout in rollouts for t in rollout.texts],
        )
        values = {
            **reward_means(rollouts),
            "pass@1": metrics.pass_at_k(correct.reshape(-1, size), 1),
        }
        if size >= 8:
            values["pass@8"] = metrics.pass_at_k(correct.reshape(-1, size), 8)
        values |= {"entropy": entropy.mean().item(), **metrics.kl_from_reference(logp, ref_logp), "length": len(entropy) / len(texts)}
        if self.demo:  # of the correct answers: how evenly they use the three valid styles, at most ln 3
            right = [arithmetic.style(text) for text, good in zip(texts, correct.tolist()) if good]
            values["style_entropy"] = metrics.entropy(torch.tensor([right.count(style) for style in arithmetic.VALID]))
        return values, [f"{p.question}\n{text}\n" for p, text in zip(problems[::size][:8], texts[::size][:8])]

    def save(self, out):
        """Writes what was trained. -> its folder"""
        if self.args.lora_rank:
            lora.save(self.policy, out / "adapter")
            return out / "adapter"
        self.policy.save_pretrained(out / "model")
        return out / "model"


def reward_means(rollouts):
    """What to log of the rewards: their mean and, where they are a weighted sum, that of each part."""
    values = [{"reward": rollout.rewards, **rollout.parts} for rollout in rollouts]
    return {name: torch.cat([value[name] for value in values]).mean().item() for name in values[0]}


def main(argv=None):
    args = parse(argv)
    runtime.refuse_used_folder(args.out)
    run = Run(args)
    out = runtime.open_run_folder(args.out)
    config = {name: value for name, value in vars(args).items() if name != "out"}
    weights.write_json(out / "config.json", config)
    print(json.dumps(config))

    log, saved, flat = runtime.Log(out / "metrics.jsonl", args.rounds), "none yet", True
    with runtime.at_round(0, saved):
        first, samples = run.evaluate()
    write_samples(out, 0, samples)
    log.write(0, {"eval": first})
    for step in range(1, args.rounds + 1):
        with runtime.at_round(step, saved):
            drawn = torch.randint(len(run.problems), (args.prompts_per_round,), generator=run.draws).tolist()
            problems = [run.problems[row] for row in drawn for _ in range(args.group_size)]  # a group's completions contiguous
            start = time.monotonic()
            rollout = run.roll_out(problems, run.generator, temperature=args.temperature)
            speed = f"{rollout.mask.sum().item() / (time.monotonic() - start):.0f} tokens/s"
            values = {**reward_means([rollout]), "accuracy": rollout.correct.mean().item(),
                      "length": rollout.mask.sum(dim=1).float().mean().item(), **run.update(rollout)}  # fmt: skip
            flat = flat and values["zero_spread"] == 1  # has every group of every round been without spread?
            if flat and step == min(10, args.rounds):
                print(
                    f"warning: in {step} rounds no group's rewards differed; only the KL acts. Is the reward right?", flush=True
                )
            if step % args.eval_every == 0 or step == args.rounds:
                values["eval"], samples = run.evaluate()
                saved = f"{run.save(out)} (round {step})"
                write_samples(out, step, samples)
        log.write(step, values, speed)

    last = values["eval"]
    print("\n".join(f"{name:16s} {first[name]:8.4f} -> {last[name]:8.4f}" for name in first))
    plots.curves(out / "curves.png", out / "metrics.jsonl", "entropy")
    return last


def write_samples(out, step, samples):
    with open(out / "samples.txt", "a", encoding="utf-8") as file:
        file.write(f"=== round {step}\n" + "\n".join(samples) + "\n")


if __name__ == "__main__":
    runtime.run(main)
