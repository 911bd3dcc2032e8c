"""ADRPO for flow matching (Eq. 6) and its baselines: the whole loop in one file.

    python train_flow.py                                             # the digits demo, on the CPU
    python train_flow.py --method fixed-beta --out runs/fixed        # a baseline: the same loss, other coefficients
    python train_flow.py --model SD3_FOLDER --reward clip_score:CLIP_FOLDER --prompts prompts.txt --resolution 512 \\
        --ode-steps 28 --shift 3 --guidance 5 --lora-rank 32 --micro-batch 8 --rollout-batch 16 --gradient-checkpointing \\
        --device cuda --dtype bfloat16 --out runs/sd3                # SD3, adapters only

One round: draw prompts, roll out a group of images for each by integrating the policy's ODE, reward them, turn rewards into
advantages, take a few gradient steps on fresh times and noises, log. The reference is a frozen copy of the policy at the start
or, with --lora-rank, the policy with its adapters off. Written to --out: config.json, metrics.jsonl, model/ (diffusers' layout)
or adapter/ (PEFT's) and, with matplotlib, before_after.png and curves.png.
"""

import argparse
import contextlib
import copy
import json
import math

import torch

from nano_adrpo import adrpo, evaluate, lora, metrics, ode, plots, prompts, rewards, runtime, weights
from nano_adrpo.demo import digits
from nano_adrpo.runtime import positive
from nano_adrpo.text_to_image import TextToImage

METHODS = ("adrpo", "fixed-beta", "orw-cfm-w2", "raft", "dpo")


def parse(argv=None):
    parser = runtime.Parser(__doc__.split("\n")[0])
    add = parser.add_argument_group("algorithm").add_argument
    add("--method", choices=METHODS, default="adrpo", help="coefficients of the loss, see nano_adrpo/adrpo.py")
    add("--beta0", type=positive(float), default=1.0, help="β0 of adrpo; β of fixed-beta (in units of the reward), orw-cfm-w2")
    add("--a-min", type=float, default=-8.0, help="A_min, the advantage's lower bound, in units of the reward; the paper: −β0")
    add("--a-max", type=float, default=8.0, help="A_max, its upper bound; the paper: β0")
    add("--tau", type=positive(float), default=0.1, help="τ of orw-cfm-w2's exp(τ·R), per unit of the reward")
    add("--beta-dpo", type=positive(float), default=50.0, help="β of dpo, per squared velocity per element")
    add("--time-density", choices=("uniform", "noise"), default="uniform", help="of t in the loss: 1, or 2(1 − t)")
    add = parser.add_argument_group("rollouts").add_argument
    add("--prompts-per-round", type=positive(int), default=16, help="prompts drawn a round")
    add("--group-size", type=positive(int), default=8, help="samples per prompt, at least 2")
    add("--ode-steps", type=positive(int), default=10, help="integration steps from noise to image")
    add("--ode-method", choices=tuple(ode.EVALUATIONS), default="euler", help="integrator")
    add("--shift", type=positive(float), help="time-grid shift; default the model's own: 3 in SD3, 1 in pixel space")
    add("--guidance", type=positive(float), default=1.0, help="classifier-free guidance scale of rollouts; 1 is none")
    add("--negative-prompt", default="", help="what guidance leads away from")
    add("--resolution", type=positive(int), help="side of the images in pixels; default the model's own")
    add("--rollout-batch", type=positive(int), help="samples at a time in rollouts and their rewards; default all")
    add = parser.add_argument_group("optimisation").add_argument
    add("--rounds", type=positive(int), default=80, help="rounds of rollouts")
    add("--inner-steps", type=positive(int), default=4, help="gradient steps a round")
    add("--lr", type=positive(float), default=1e-4, help="Adam's learning rate")
    add("--clip-grad", type=positive(float), default=1.0, help="largest norm of the gradient")
    add("--micro-batch", type=positive(int), help="samples (dpo: pairs) per forward pass; must divide a round's; default all")
    add("--gradient-checkpointing", action="store_true", help="keep block inputs only and recompute the rest: less memory")
    add("--lora-rank", type=positive(int, zero=True), default=0, help="rank of adapters to train; 0 trains all weights")
    add("--lora-alpha", type=positive(float), help="the adapters' strength is alpha / rank; default the rank")
    add("--lora-targets", nargs="+", help="names of layers to adapt; default the attention's: " + " ".join(lora.MMDIT_TARGETS))
    add(
        "--ema",
        type=decay,
        default=0.0,
        help="decay of a moving average of what is trained, which is evaluated and saved; 0: none",
    )
    add("--compile", action="store_true", help="torch.compile the transformer")
    add = parser.add_argument_group("inputs").add_argument
    add(
        "--model",
        default=str(digits.HERE / "base"),
        help="folder in diffusers' SD3 pipeline layout, or Stability's single file",
    )
    add("--base", help="such a folder for the parts that --model lacks, as a single file its tokenizers")
    add(
        "--t5",
        choices=("load", "stream", "zeros"),
        default="load",
        help="SD3's T5: at once, layer by layer from disk, without it",
    )
    add("--reward", nargs="+", default=[str(digits.HERE / "clip")], help="NAME:FOLDER[@WEIGHT] …, see nano_adrpo/rewards.py")
    add("--prompts", help="one prompt a line, or JSON lines with \"prompt\"; default: the demo's 40, with the demo's judge")
    add("--embeddings", help="where embeddings of --prompts are kept for the next run; default PROMPTS.embeddings.safetensors")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/flow", help="new or empty folder for the run's files")
    add("--seed", type=runtime.seed, default=0, help="of prompts, noises and times")
    add("--device", type=runtime.device, default="cpu", help="torch device")
    add("--dtype", choices=tuple(runtime.DTYPES), default="float32", help="of forward passes; what is trained stays float32")
    add("--eval-every", type=positive(int), default=20, help="rounds between evaluations, with a checkpoint each")
    add("--eval-samples", type=positive(int), default=8, help="samples per prompt in an evaluation, at least 2")
    add("--keep-checkpoints", action="store_true", help="keep every checkpoint, as round-N/, and not the last alone")
    args = parser.parse_args(argv)
    for option in ("group_size", "eval_samples"):
        if getattr(args, option) < 2:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)}: expected at least 2, to compare samples")
    units, what = (1, "pairs") if args.method == "dpo" else (args.group_size, "samples")
    if args.micro_batch and args.prompts_per_round * units % args.micro_batch:
        count = args.prompts_per_round * units
        raise ValueError(f"--micro-batch {args.micro_batch} does not divide the {count} {what} of a round")
    with runtime.about("--a-min and --a-max"):
        adrpo.clamp_advantages(torch.zeros(1), args.beta0, (args.a_min, args.a_max))  # refuses an empty range
    if not args.lora_rank and (args.lora_alpha or args.lora_targets):
        raise ValueError("--lora-alpha and --lora-targets: expected only with --lora-rank")
    if args.lora_rank:
        args.lora_alpha = args.lora_alpha or args.lora_rank
        args.lora_targets = args.lora_targets or list(lora.MMDIT_TARGETS)
    if args.embeddings and not args.prompts:
        raise ValueError("--embeddings: expected only with --prompts")
    if args.prompts:
        args.embeddings = args.embeddings or f"{args.prompts}.embeddings.safetensors"
    return args


def decay(text):
    """An argparse type: a number from 0 up to and without 1."""
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number in [0, 1)")
    return value


def coefficients(args, rewards):
    """The table of nano_adrpo/adrpo.py: rewards [N] -> (weight, beta) of `flow_loss`, each [N]."""
    clip = (args.a_min, args.a_max)
    if args.method == "raft":
        weight, beta = adrpo.best_of_group(rewards, args.group_size), 0.0
    elif args.method == "orw-cfm-w2":
        weight, beta = adrpo.reward_weights(rewards, args.tau, args.group_size), args.beta0
    else:
        advantages = adrpo.group_advantages(rewards, args.group_size)
        weight = adrpo.clamp_advantages(advantages, args.beta0, clip)
        beta = adrpo.adaptive_beta(advantages, args.beta0, clip) if args.method == "adrpo" else args.beta0
    return weight, torch.as_tensor(beta, device=weight.device).expand_as(weight)


class Run:
    """The models, prompts and noises, and the three phases that use them: rollout, update, evaluation."""

    def __init__(self, args):
        self.args = args
        self.prompts = prompts.read_prompts(args.prompts) if args.prompts else digits.PROMPTS
        self.judge = None if args.prompts else digits.Judge.from_pretrained(digits.HERE / "judge")
        self.reward = rewards.parse(args.reward)
        texts, condition = [*self.prompts, args.negative_prompt], None  # the last row is what guidance leads away from
        dtype = runtime.DTYPES[args.dtype]
        # From the headers: what is missing or does not fit is told before the prompts are encoded.
        plan = TextToImage.from_pretrained(args.model, dtype, "meta", args.base, encoders=False)
        with runtime.about("--resolution"):
            self.shape = plan.latent_shape_at(args.resolution) if args.resolution else plan.latent_shape
        if args.prompts:  # the text encoders go before the rest comes, and stay on disk where the embeddings are there already
            condition = prompts.cached(args.embeddings, texts, args.model, dtype, args.device, args.base, args.t5)
        dtype = dtype if args.lora_rank else torch.float32  # weights that are trained are float32
        self.policy = TextToImage.from_pretrained(args.model, dtype, args.device, args.base, encoders=condition is None)
        self.condition = condition or self.policy.encode(texts)
        self.times = self.policy.times(args.ode_steps, args.shift)
        self.generator = torch.Generator().manual_seed(args.seed)  # on the CPU: every device draws the same numbers
        transformer, self.reference = self.policy.transformer, copy.copy(self.policy)
        if args.lora_rank:
            with runtime.about("--lora-targets"):
                lora.add(transformer, args.lora_targets, args.lora_rank, args.lora_alpha, self.generator)
        else:
            self.reference.transformer = copy.deepcopy(transformer).requires_grad_(False)
        transformer.gradient_checkpointing = args.gradient_checkpointing
        if args.compile:
            transformer.compile()
        self.trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        self.average = runtime.MovingAverage(self.trained, args.ema)
        self.optimizer = torch.optim.Adam(self.trained, lr=args.lr)
        self.phases = runtime.Phases(args.device)

    def noise(self, count, generator):
        return torch.randn(count, *self.shape, generator=generator).to(self.args.device)

    def autocast(self):
        dtype = runtime.DTYPES[self.args.dtype]
        return torch.autocast(torch.device(self.args.device).type, dtype, enabled=dtype != torch.float32)

    def velocity(self, model, x, t, rows):
        with self.autocast():
            return model.velocity(x, t, self.condition[rows])

    @torch.no_grad()
    def reference_velocity(self, x, t, rows):
        """v_ref, of the policy at the start: a frozen copy, or the policy with its adapters off."""
        with lora.disabled(self.policy.transformer) if self.args.lora_rank else contextlib.nullcontext():
            return self.velocity(self.reference, x, t, rows)

    @torch.no_grad()
    def roll_out(self, rows, x0):
        """Prompt rows [N] and noise x0 [N, C, H, W] -> the policy's latents x1; its images and {name: rewards [N]}, on the CPU."""
        x1, images, scores = [], [], []
        parts = torch.arange(len(rows)).split(self.args.rollout_batch or len(rows))
        with self.phases("rollout"), self.autocast():
            for part in parts:
                condition, negative = self.condition[rows[part]], self.condition[torch.full_like(part, -1)]
                x1.append(
                    self.policy.sample(x0[part], condition, self.times, negative, self.args.guidance, self.args.ode_method)
                )
        with self.phases("reward"), self.reward.on(self.args.device):  # at other times they are on the CPU
            for part, latents in zip(parts, x1):
                images.append(self.policy.decode(latents))
                scores.append(self.reward(images[-1], [self.prompts[row] for row in rows[part]]))
                images[-1] = images[-1].cpu()
        return torch.cat(x1), torch.cat(images), {name: torch.cat([score[name] for score in scores]) for name in scores[0]}

    def update(self, rows, x1, rewards):
        """`inner_steps` gradient steps on one round's samples. -> what to log of it."""
        args, device = self.args, x1.device
        if args.method == "dpo":  # a row per pair, the better sample first; both share t and x0
            units = torch.stack(adrpo.best_and_worst(rewards, args.group_size), dim=1)  # [prompts, 2]
        else:
            units = torch.arange(len(rows), device=device)[:, None]  # [N, 1]
            weight, beta = coefficients(args, rewards)
        for _ in range(args.inner_steps):
            t = torch.rand(len(units), generator=self.generator)
            t = (1 - (1 - t).sqrt() if args.time_density == "noise" else t).to(device)
            # x0 is drawn afresh: with the rollout's own, u ≈ v_ref all along the path, and nothing is learnt.
            x0 = self.noise(len(units), self.generator)
            self.optimizer.zero_grad()
            total = 0.0
            for part in torch.arange(len(units), device=device).split(args.micro_batch or len(units)):
                i = units[part].flatten()
                part_t, part_x0 = (draw[part].repeat_interleave(units.shape[1], dim=0) for draw in (t, x0))
                x_t, u = adrpo.interpolate(part_x0, x1[i], part_t)
                v = self.velocity(self.policy, x_t, part_t, rows[i.cpu()])
                v_ref = self.reference_velocity(x_t, part_t, rows[i.cpu()])
                if args.method == "dpo":
                    loss = adrpo.flow_dpo_loss(v, u, v_ref, slice(0, None, 2), slice(1, None, 2), args.beta_dpo)
                else:
                    loss = adrpo.flow_loss(v, u, v_ref, weight[i], beta[i])  # Eq. 6
                loss = loss * len(part) / len(units)
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(self.trained, args.clip_grad).item()
            if not (math.isfinite(total) and math.isfinite(norm)):
                raise FloatingPointError(f"loss {total}, gradient norm {norm}")
            self.optimizer.step()
            self.average.update()
        values = {"loss": total, "grad_norm": norm}
        if args.method != "dpo":
            values |= {"beta_min": beta.min().item(), "beta_mean": beta.mean().item(), "beta_max": beta.max().item()}
        return values

    @torch.no_grad()
    def evaluate(self):
        """-> metrics over every prompt, with the same noises each time and whatever the seed; the images, on the CPU."""
        args, rows = self.args, torch.arange(len(self.prompts)).repeat_interleave(self.args.eval_samples)
        x0, t, noise = (draw.to(args.device) for draw in evaluate.draws(len(rows), self.shape))
        with self.average.applied():
            x1, images, scores = self.roll_out(rows, x0)
            x_t, _ = adrpo.interpolate(noise, x1, t)
            parts = torch.arange(len(rows)).split(args.rollout_batch or len(rows))
            v = torch.cat([self.velocity(self.policy, x_t[part], t[part], rows[part]) for part in parts])
        v_ref = torch.cat([self.reference_velocity(x_t[part], t[part], rows[part]) for part in parts])
        with self.reward.on(args.device):
            embeddings = [self.reward.embed_images(images[part]) for part in parts]
        embeddings = None if embeddings[0] is None else torch.cat(embeddings)
        values = metrics.of_images(images, scores, embeddings, args.eval_samples) | {"w2": metrics.w2_divergence(v, v_ref)}
        if self.judge:
            values |= self.judge.evaluate(images, [self.prompts[row] for row in rows])
        return values, images

    def save(self, folder):
        """Writes what is trained. -> where"""
        with self.average.applied():
            if self.args.lora_rank:
                lora.save(self.policy.transformer, folder / "adapter")
                return folder / "adapter"
            self.policy.save_pretrained(folder / "model")
            return folder / "model"


def main(argv=None):
    args = parse(argv)
    runtime.refuse_used_folder(args.out)
    run = Run(args)
    out = runtime.open_run_folder(args.out)
    config = {name: value for name, value in vars(args).items() if name != "out"}
    weights.write_json(out / "config.json", config)
    print(json.dumps(config))

    log, saved = runtime.Log(out / "metrics.jsonl", args.rounds), "none yet"
    with runtime.at_round(0, saved):
        first, before = run.evaluate()
    log.write(0, {"eval": first})
    for step in range(1, args.rounds + 1):
        with runtime.at_round(step, saved):
            rows = torch.randint(len(run.prompts), (args.prompts_per_round,), generator=run.generator)
            rows = rows.repeat_interleave(args.group_size)  # [N], the samples of one prompt contiguous
            x1, _, scores = run.roll_out(rows, run.noise(len(rows), run.generator))  # x1 ~ p_θ of this round
            reward = scores["reward"].to(args.device)
            spread = reward.reshape(-1, args.group_size).std(dim=1).mean().item()
            if step == 1:
                print(f"β0 = {args.beta0:g}; the reward's standard deviation within a group is {spread:.3g} (A has its unit)")
            values = {name: score.mean().item() for name, score in scores.items()} | {"reward_std": spread}
            with run.phases("update"):
                values |= run.update(rows, x1, reward)
            spent = run.phases.take()
            if step % args.eval_every == 0 or step == args.rounds:
                values["eval"], after = run.evaluate()
                saved = f"{run.save(out)} (round {step})"
                if args.keep_checkpoints:
                    run.save(out / f"round-{step}")
                run.phases.take()
        log.write(step, values, spent)

    last = values["eval"]
    print("\n".join(f"{name:16s} {first[name]:8.4f} -> {last[name]:8.4f}" for name in first))
    picture(run, out / "before_after.png", before=(first, before), after=(last, after))
    plots.curves(out / "curves.png", out / "metrics.jsonl", "pixel_diversity")
    return last


def picture(run, file, **panels):
    """The samples of ten prompts, evenly spread, from one evaluation a panel."""
    size = run.args.eval_samples
    shown = torch.linspace(0, len(run.prompts) - 1, min(10, len(run.prompts))).long()
    rows = (shown[:, None] * size + torch.arange(size)).flatten()
    title = "{}: " + ", ".join(f"{name} {{{name}:.3g}}" for name in ("reward", "joint") if name != "joint" or run.judge)
    grids = {title.format(name, **values): images[rows] for name, (values, images) in panels.items()}
    plots.grids(file, grids, [run.prompts[row] for row in shown])


if __name__ == "__main__":
    runtime.run(main)
