"""ADRPO for flow matching (Eq. 6) and its baselines: the whole loop in one file.

    python train_flow.py                                             # the digits demo, on the CPU
    python train_flow.py --method fixed-beta --out runs/fixed        # a baseline: the same loss, other coefficients
    python train_flow.py --model FOLDER --reward CLIP_FOLDER --prompts FILE --device cuda --dtype bfloat16 --out runs/mine

One round: draw prompts, roll out a group of images for each by integrating the policy's ODE, reward them, turn rewards into
advantages, take a few gradient steps on fresh times and noises, log. The reference is a frozen copy of the policy at the start.
Written to --out: config.json, metrics.jsonl, model/ (the tuned model, in the layout it came in) and, with matplotlib,
before_after.png and curves.png.
"""

import copy
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from nano_adrpo import adrpo, metrics, ode, plots, runtime, weights
from nano_adrpo.demo import digits
from nano_adrpo.rewards import ClipScore
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
    add("--shift", type=positive(float), default=1.0, help="time-grid shift; SD3 uses 3 at 1024 px")
    add("--guidance", type=positive(float), default=1.0, help="classifier-free guidance scale; 1 is none")
    add = parser.add_argument_group("optimisation").add_argument
    add("--rounds", type=positive(int), default=80, help="rounds of rollouts")
    add("--inner-steps", type=positive(int), default=4, help="gradient steps a round")
    add("--lr", type=positive(float), default=1e-4, help="Adam's learning rate")
    add("--clip-grad", type=positive(float), default=1.0, help="largest norm of the gradient")
    add("--micro-batch", type=positive(int), help="samples (dpo: pairs) per forward pass; must divide a round's; default all")
    add = parser.add_argument_group("inputs").add_argument
    add("--model", default=str(digits.HERE / "base"), help="folder in diffusers' SD3 pipeline layout")
    add("--reward", default=str(digits.HERE / "clip"), help="CLIP folder whose ClipScore is the reward, 0 … 100")
    add("--prompts", help="text file, one prompt a line; default: the demo's 40 prompts, with the demo's judge")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/flow", help="new or empty folder for the run's files")
    add("--seed", type=int, default=0, help="of prompts, noises and times")
    add("--device", type=runtime.device, default="cpu", help="torch device")
    add("--dtype", choices=tuple(runtime.DTYPES), default="float32", help="of forward passes; weights stay float32")
    add("--eval-every", type=positive(int), default=20, help="rounds between evaluations, with a checkpoint each")
    add("--eval-samples", type=positive(int), default=8, help="samples per prompt in an evaluation, at least 2")
    args = parser.parse_args(argv)
    for option in ("group_size", "eval_samples"):
        if getattr(args, option) < 2:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)}: expected at least 2, to compare samples")
    units, what = (1, "pairs") if args.method == "dpo" else (args.group_size, "samples")
    if args.micro_batch and args.prompts_per_round * units % args.micro_batch:
        count = args.prompts_per_round * units
        raise ValueError(f"--micro-batch {args.micro_batch} does not divide the {count} {what} of a round")
    adrpo.clamp_advantages(torch.zeros(1), args.beta0, (args.a_min, args.a_max))  # refuses an empty range
    return args


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
        self.prompts = read_prompts(args.prompts) if args.prompts else digits.PROMPTS
        self.judge = None if args.prompts else digits.Judge.from_pretrained(digits.HERE / "judge")
        self.policy = TextToImage.from_pretrained(args.model, torch.float32, args.device)
        self.reference = copy.copy(self.policy)
        self.reference.transformer = copy.deepcopy(self.policy.transformer).requires_grad_(False)
        self.reward = ClipScore(args.reward, args.device)
        self.optimizer = torch.optim.Adam(self.policy.transformer.parameters(), lr=args.lr)
        self.times = ode.time_grid(args.ode_steps, args.shift, device=args.device)
        self.generator = torch.Generator().manual_seed(args.seed)  # on the CPU: every device draws the same numbers
        self.condition = self.policy.encode([*self.prompts, ""])  # the last row is the empty prompt, for guidance

    def noise(self, count, generator):
        return torch.randn(count, *self.policy.latent_shape, generator=generator).to(self.args.device)

    def velocity(self, model, x, t, rows):
        dtype = runtime.DTYPES[self.args.dtype]
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return model.velocity(x, t, self.condition[rows])

    @torch.no_grad()
    def roll_out(self, rows, x0):
        """Prompt rows [N] and noise x0 [N, C, H, W] -> the policy's latents x1, images, rewards [N]."""
        empty = torch.full_like(rows, -1)
        velocity = ode.guide(
            lambda x, t: self.velocity(self.policy, x, t, rows),
            lambda x, t: self.velocity(self.policy, x, t, empty),
            self.args.guidance,
        )
        x1 = ode.sample(velocity, x0, self.times, self.args.ode_method)
        images = self.policy.decode(x1)
        rewards = self.reward(images, [self.prompts[row] for row in rows])
        if not rewards.isfinite().all():
            prompt = self.prompts[rows[(~rewards.isfinite()).nonzero()[0, 0]]]
            raise FloatingPointError(f"a reward of the prompt {prompt!r} is not finite")
        return x1, images, rewards

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
                with torch.no_grad():
                    v_ref = self.velocity(self.reference, x_t, part_t, rows[i.cpu()])
                if args.method == "dpo":
                    loss = adrpo.flow_dpo_loss(v, u, v_ref, slice(0, None, 2), slice(1, None, 2), args.beta_dpo)
                else:
                    loss = adrpo.flow_loss(v, u, v_ref, weight[i], beta[i])  # Eq. 6
                loss = loss * len(part) / len(units)
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(self.policy.transformer.parameters(), args.clip_grad).item()
            if not (math.isfinite(total) and math.isfinite(norm)):
                raise FloatingPointError(f"loss {total}, gradient norm {norm}")
            self.optimizer.step()
        values = {"loss": total, "grad_norm": norm}
        if args.method != "dpo":
            values |= {"beta_min": beta.min().item(), "beta_mean": beta.mean().item(), "beta_max": beta.max().item()}
        return values

    @torch.no_grad()
    def evaluate(self):
        """-> metrics over every prompt, with the same noises each time and whatever the seed; the images, on the CPU."""
        generator, size = torch.Generator().manual_seed(1_000_003), self.args.eval_samples
        rows = torch.arange(len(self.prompts)).repeat_interleave(size)
        x1, images, rewards = self.roll_out(rows, self.noise(len(rows), generator))
        t = torch.rand(len(rows), generator=generator).to(x1.device)
        x_t, _ = adrpo.interpolate(self.noise(len(rows), generator), x1, t)
        v, v_ref = (self.velocity(model, x_t, t, rows) for model in (self.policy, self.reference))
        values = {
            "reward": rewards.mean().item(),
            "clip_diversity": metrics.group_diversity(F.normalize(self.reward.embed_images(images)), size),
            "pixel_diversity": metrics.group_diversity(images.flatten(1) / images[0].numel() ** 0.5, size),
            "w2": metrics.w2_divergence(v, v_ref),
        }
        if self.judge:
            values |= self.judge.evaluate(images.cpu(), [self.prompts[row] for row in rows])
        return values, images.cpu()


def main(argv=None):
    args = parse(argv)
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
            x1, _, rewards = run.roll_out(rows, run.noise(len(rows), run.generator))  # x1 ~ p_θ of this round
            spread = rewards.reshape(-1, args.group_size).std(dim=1).mean().item()
            if step == 1:
                print(f"β0 = {args.beta0:g}; the reward's standard deviation within a group is {spread:.3g} (A has its unit)")
            values = {"reward": rewards.mean().item(), "reward_std": spread, **run.update(rows, x1, rewards)}
            if step % args.eval_every == 0 or step == args.rounds:
                values["eval"], after = run.evaluate()
                run.policy.save_pretrained(out / "model")
                saved = f"{out / 'model'} (round {step})"
        log.write(step, values)

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


def read_prompts(file):
    """One prompt a line; empty lines are passed over."""
    prompts = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{file}: no prompts in it; expected one a line")
    return prompts


if __name__ == "__main__":
    runtime.run(main)
