"""ADRPO for flow matching (Eq. 6) and its baselines: the whole loop in one file.

    python train_flow.py                                             # the digits demo, on the CPU
    python train_flow.py --method fixed-beta                         # a baseline: the same loss, other coefficients
    python train_flow.py --config docs/sd3.json --model SD3_FOLDER --reward clip_score:CLIP_FOLDER --prompts prompts.txt
    torchrun --nproc-per-node 4 train_flow.py …                      # the same run on four GPUs: docs/many_gpus.md

One round: draw prompts, roll out a group of images for each by integrating the policy's ODE, reward them, turn rewards into
advantages and coefficients, take a few gradient steps on fresh times and noises, log. The reference is a frozen copy of the
policy at the start or, with --lora-rank, the policy with its adapters off (with --adapter: as they were at the start). Written
to --out: config.json, metrics.jsonl, model/ (diffusers' layout) or adapter/ (PEFT's) and, with matplotlib, before_after.png,
evolution.png and curves.png.
"""

from contextlib import nullcontext
from pathlib import Path

import torch

from nano_adrpo import adrpo, demo, lora, ode, rivals
from nano_adrpo.errors import InputError, Parser, about, run_command
from nano_adrpo.evaluation import plots
from nano_adrpo.evaluation.images import Evaluation, evaluate, evenly
from nano_adrpo.rewards import function, images, weighted
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.text_to_image.prompts import cached, read_prompts
from nano_adrpo.training import checkpoint, options, run
from nano_adrpo.training.distributed import divided, each, first_before_others, gather, mine, once
from nano_adrpo.training.life import alive
from nano_adrpo.training.options import finite, flag, positive
from nano_adrpo.training.sharding import shard, whole
from nano_adrpo.training.step import (
    MovingAverage,
    autocast,
    optimizer_step,
    reference_of,
    set_learning_rate,
    trained,
    weight_dtype,
)  # fmt: skip

# A method is (weight, beta) of `flow_loss`, each a number or one for each sample, made of rewards R and advantages A [N] and of
# rewards of weight 0, [N] each. A new method is a new line. (DPO compares pairs and has a loss of its own.)
METHODS = {
    # Eq. 6: A and β0 − A, of the clamped A
    "adrpo": lambda R, A, others, args: adrpo.adaptive_coefficients(A, args.beta0, (args.a_min, args.a_max)),
    "fixed-beta": lambda R, A, others, args: (clamped(A, args), args.beta0),
    "gardo-gate": lambda R, A, others, args: (clamped(A, args), rivals.uncertainty_gate(R, others, args.beta0)),
    # Controls: ADRPO's β of the group before, so that A's place in β does nothing, and β0 + clamp(A)
    "shuffled": lambda R, A, others, args: (clamped(A, args), (args.beta0 - clamped(A, args)).roll(args.group_size)),
    "anti": lambda R, A, others, args: (clamped(A, args), args.beta0 + clamped(A, args)),
    "orw-cfm-w2": lambda R, A, others, args: (adrpo.reward_weights(R, args.tau, args.group_size), args.beta0),
    "raft": lambda R, A, others, args: (adrpo.best_of_group(R, args.group_size), 0.0),
    "dpo": lambda R, A, others, args: (0.0, 0.0),  # not used
    "dpo-offline": lambda R, A, others, args: (0.0, 0.0),  # not used; its pairs come from the reference
}
CLAMPED = "adrpo", "fixed-beta", "gardo-gate", "shuffled", "anti"  # the methods in which clamp(A) stands
DPO = "dpo", "dpo-offline"  # those that compare pairs


@alive
def main(argv, life):
    args = parse(argv)
    memory = opened(checkpoint.begin(args, life, flat=True, unit=1.0, evaluations={}))
    prompts, held_out, reward, judge = open_task(args)
    texts, categories = zip(*prompts, *held_out)
    generator = torch.Generator().manual_seed(args.seed)  # on the CPU: every device draws the same numbers
    policy, condition, negative, reference = open_policy(args, texts, generator)
    shape = latent_shape(args, policy)
    sampling = {"times": policy.times(args.ode_steps, args.shift, shape), "negative": negative} | integration(args)
    optimizer = torch.optim.AdamW(trained(policy.transformer), args.lr, weight_decay=args.weight_decay)
    ema = MovingAverage(trained(policy.transformer), args.ema)
    out = run.claim(args.out, "runs/flow", options.saved(args), life)
    state = policy.transformer, optimizer, ema, {"draws": generator}
    checkpoint.restore(out, memory, *state)
    log, phases = run.Log(out / "metrics.jsonl", args.rounds), run.Phases(args.device)
    dpo, share = (True, 2) if args.method in DPO else (False, 1)  # DPO: the two samples of a pair share t and x0

    def noise(count):
        return torch.randn(count, *shape, generator=generator).to(args.device)

    def reference_velocity(x, t, rows, condition=condition):
        with reference() as frozen, autocast(args):  # the policy's transformer at the start, without gradient
            return policy.velocity(x, t, condition[rows], frozen)

    for round in run.rounds(args, memory["round"]):  # from 0, which only evaluates
        with run.at_round(args, out, round, phases), run.skipping(args, memory) as (values, involved):
            if round > 0:
                # 1. Roll out: a group of images for each prompt, contiguous. N = prompts · group size.
                phases.begin("rollout")
                drawn = torch.randint(len(prompts), (args.prompts_per_round,), generator=generator)
                drawn = drawn.repeat_interleave(args.group_size)  # [N], rows of `prompts` and `condition`
                asked, told = [texts[row] for row in drawn.tolist()], condition[drawn].to(args.device)
                involved += asked[:: args.group_size]
                with drawn_from(args, policy, reference) as network, whole(network), autocast(args):
                    x1, pixels = policy.draw(mine(noise(len(asked))), mine(told), **sampling, transformer=network)

                # 2. Reward: R [N], and the terms of this weighted sum, on the CPU, as the pixels are; models go to --device.
                phases.begin("reward")
                with reward.on(args.device):
                    rewards = reward(pixels, mine(asked), sampling["batch"])
                x1, rewards = gather((x1, rewards))  # of all processes, where there are several
                R = rewards["reward"].to(args.device) / memory["unit"]  # in --beta-unit, as β0 and the clip are

                # 3. Advantages A [N] within the groups. The method's line above turns them into weight and beta [N].
                A = adrpo.group_advantages(R, args.group_size)
                weight, beta = (torch.zeros_like(A) + c for c in METHODS[args.method](R, A, reward.unweighted(rewards), args))
                x1, told = best_and_worst(args, R, x1, told) if dpo else (x1, told)

                # 4. Gradient steps on these samples. v alone has a gradient.
                phases.begin("update")
                set_learning_rate(optimizer, args, round)
                for _ in range(args.inner_steps):
                    count, losses = len(x1) // share, []
                    t = draw_times(args, count, generator).to(args.device).repeat_interleave(share)
                    x0 = noise(count).repeat_interleave(share, dim=0)  # fresh noise, not the rollout's (docs/questions.md)
                    for i in mine(torch.arange(len(x1), device=args.device)).split(share * each(args.micro_batch or count)):
                        x_t, u = adrpo.interpolate(x0[i], x1[i], t[i])
                        with autocast(args):
                            v = policy.velocity(x_t, t[i], told[i])
                        v_ref = reference_velocity(x_t, t[i], i, told)
                        if dpo:
                            loss = adrpo.flow_dpo_loss(v, u, v_ref, BEST, WORST, args.beta_dpo, count)
                        else:
                            loss = adrpo.flow_loss(v, u, v_ref, weight[i], beta[i], count)  # Eq. 6
                        loss.backward()
                        losses.append(loss.detach().double())
                    loss, norm = optimizer_step(optimizer, sum(losses), args, ema)

                # 5. Log.
                values |= describe(args, rewards, weight, beta) | {"loss": loss, "grad_norm": norm}
                memory["flat"] = run.still_flat(memory["flat"], values["zero_spread"], round, args.rounds)

        # 6. Evaluate the moving average on training and on held-out prompts, from the same noises in every run; save it.
        if run.evaluation_is_due(args, round):
            phases.begin("evaluation")
            with run.at_round(args, out, round, phases), ema.applied(), whole(policy.transformer), autocast(args):
                found = {
                    name: evaluate(policy, condition, texts, reward, judge, reference_velocity, rows=rows,
                                   categories=categories, shape=shape, **sampling, **evaluation(args))
                    for name, rows in to_evaluate(args, prompts, held_out).items()
                }  # fmt: skip
                values |= remember(memory["evaluations"], round, found)
                if len(memory["evaluations"]) == 1:
                    memory["unit"], values["beta0"] = run.scale(args, found)
                run.save_model(policy.transformer, policy.save_pretrained, args, out, ema, round)
        log.write(round, values, phases.take())
        checkpoint.save_if_due(args, life, out, round, memory, *state)

    return report(out, texts, memory["evaluations"], "held-out prompts" if held_out else "training prompts")


def opened(memory):
    """Makes Evaluations again of what a checkpoint has of them, by round, see `remember`. -> memory"""
    stored = memory["evaluations"].items()
    memory["evaluations"] = {int(round): {name: Evaluation(**it) for name, it in found.items()} for round, found in stored}
    return memory


def remember(evaluations, round, found):
    """Adds an evaluation, {name: Evaluation}, to those of earlier rounds, without images that `report` does not show: of "eval"
    it keeps ten prompts' and, once another one follows, one prompt's. -> what metrics.jsonl has of it"""
    if len(evaluations) > 1:
        last = evaluations[max(evaluations)]
        last["eval"] = last["eval"].some([len(last["eval"].rows) // 2])
    evaluations[round] = {name: evaluation._replace(images=None, right=None) for name, evaluation in found.items()}
    evaluations[round]["eval"] = found["eval"].some(evenly(len(found["eval"].rows), 10))
    values = {name: evaluation.values for name, evaluation in found.items()}
    return values | {f"{name}_error": evaluation.errors for name, evaluation in found.items()}


BEST, WORST = slice(0, None, 2), slice(1, None, 2)  # rows of a batch of pairs


def drawn_from(args, policy, reference):
    """-> `with … as network:`, the network of the rollouts: the policy's or, in off-line DPO, the reference's in all rounds."""
    return reference() if args.method == "dpo-offline" else nullcontext(policy.transformer)


def best_and_worst(args, R, x1, told):
    """DPO: keeps of each group the best and the worst sample, side by side. -> their x1 and conditions, [2 · groups]."""
    pairs = torch.stack(adrpo.best_and_worst(R, args.group_size), dim=1).flatten()
    return x1[pairs], told[pairs]


def open_task(args):
    """-> prompts to train on, held-out prompts, the reward, and the judge or None. Without --prompts they are the demo's, with
    its judge."""
    files = (args.prompts, args.held_out) if args.prompts else (demo.FLOW["prompts"], demo.FLOW["held_out"])
    prompts, held_out = (read_prompts(file) if file else [] for file in files)
    judge = args.judge or (demo.FLOW["judge"] if args.prompts is None else None)
    return prompts, held_out, images.parse(args.reward), function(judge) if judge else None


def integration(args):
    """The options of sampling, for TextToImage.draw."""
    return {"guidance": args.guidance, "method": args.ode_method, "batch": each(args.rollout_batch)}


def evaluation(args):
    """The options of an evaluation, for evaluation.images.evaluate."""
    return {"samples": args.eval_samples, "device": args.device, "mine": mine, "gather": gather}


def to_evaluate(args, prompts, held_out):
    """Which rows of [*prompts, *held_out] are evaluated, by name in metrics.jsonl: {"eval": held-out ones, "eval_train":
    training ones} or, where there are no held-out prompts, {"eval": training ones}."""
    train = evenly(len(prompts), args.eval_prompts)
    if not held_out:
        return {"eval": train}
    return {"eval": [len(prompts) + row for row in evenly(len(held_out), args.eval_prompts)], "eval_train": train}


def open_policy(args, prompts, generator):
    """-> the policy, the Condition of the prompts, that of the negative prompt, and the reference: in `with reference() as
    frozen:`, frozen is the policy's transformer at the start."""
    dtype = options.DTYPES[args.dtype]
    # Read the headers first: a part that is missing or does not fit is reported before the prompts are encoded.
    headers = TextToImage.from_pretrained(args.model, dtype, "meta", args.base, encoders=False)
    latent_shape(args, headers)
    add_adapter(args, headers, "meta")
    encoded = None
    if args.prompts:  # encode, then drop the text encoders; if the embeddings are on disk, they are not loaded at all
        file = args.embeddings or f"{args.prompts}.embeddings.safetensors"
        with first_before_others():
            encoded = cached(
                file, prompts, args.negative_prompt, args.model, dtype, args.device, args.base, args.t5, args.lower_case
            )
    policy = TextToImage.from_pretrained(
        args.model, weight_dtype(args), args.device, args.base, encoders=encoded is None, lower=args.lower_case, meta=args.fsdp
    )
    add_adapter(args, policy, args.device)
    if args.lora_rank:
        with about("--lora-rank, --lora-alpha, --lora-targets"):
            targets = args.lora_targets or policy.family.targets
            alpha = args.lora_alpha or args.lora_rank
            lora.add(policy.transformer, targets, args.lora_rank, alpha, generator, args.device)
    reference = reference_of(policy.transformer, options.adapted(args))
    shard(args, policy.transformer, reference)
    condition, negative = encoded or (policy.encode(prompts), policy.encode([args.negative_prompt], negative=True))
    policy.transformer.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        policy.transformer.compile()
    return policy, condition, negative, reference


def add_adapter(args, model, device):
    """Puts the adapters of --adapter on the transformer."""
    if args.adapter:
        with about("--adapter"):
            lora.load(model.transformer, args.adapter, device)


def latent_shape(args, model):
    """[C, H, W] of a sample's latents."""
    with about("--resolution"):
        return model.latent_shape_at(args.resolution) if args.resolution else model.latent_shape


def clamped(A, args):
    """A within [A_min, A_max]."""
    return A.clamp(args.a_min, args.a_max)


def draw_times(args, count, generator):
    """Times t [count] of the loss, of density 1 (Eq. 6's t ~ U(0, 1)) or 2(1 − t)."""
    t = torch.rand(count, generator=generator)
    return 1 - (1 - t).sqrt() if args.time_density == "noise" else t


def describe(args, rewards, weight, beta):
    """What to log of a round, {name: number}."""
    groups = rewards["reward"].reshape(-1, args.group_size)
    values = {name: value.mean().item() for name, value in rewards.items()}
    values["reward_std"] = groups.std(dim=1).mean().item()
    values["zero_spread"] = (groups == groups[:, :1]).all(dim=1).float().mean().item()
    values |= {"beta_min": beta.min().item(), "beta_mean": beta.mean().item(), "beta_max": beta.max().item()}
    return values | {"weight_mean": weight.mean().item()}  # the clamp moves both means


@once
def report(out, prompts, evaluations, kind):
    """Prints the closing table of all evaluations (see `remember`), and draws curves.png and, of "eval", whose prompts are of
    the kind named, with the judge's frames:

    before_after.png   samples of ten prompts in the first evaluation and in the last, from the same noises
    evolution.png      samples of one of these prompts in every evaluation, from the same noises

    -> the metrics of the last "eval"
    """
    first, last = min(evaluations), max(evaluations)
    columns = {kind: "eval", **({"training prompts": "eval_train"} if "eval_train" in evaluations[first] else {})}
    run.print_table({kind: [evaluations[round][name][:2] for round in (first, last)] for kind, name in columns.items()})
    evaluations = {round: found["eval"] for round, found in evaluations.items()}
    ends = {f"round {round}": evaluations[round] for round in dict.fromkeys([first, last])}
    plots.grids(
        out / "before_after.png",
        {f"{title}: {found.summary}": found.images for title, found in ends.items()},
        [prompts[row] for row in ends[f"round {first}"].rows],
        {f"{title}: {found.summary}": found.right for title, found in ends.items()},
        f"{kind}, the same noises",
    )
    strip = {round: found.some([len(found.rows) // 2]) for round, found in evaluations.items()}
    title = prompts[strip[first].rows[0]]
    plots.grids(
        out / "evolution.png",
        {title: torch.cat([found.images for found in strip.values()])},
        [f"round {round}" for round in strip],
        {title: None if strip[first].right is None else torch.cat([found.right for found in strip.values()])},
        f"of the {kind}, the same noises",
    )
    plots.curves(out / "curves.png", out / "metrics.jsonl", "pixel_diversity")
    return evaluations[last].values


def parse(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument_group("algorithm").add_argument
    add("--method", choices=tuple(METHODS), default="adrpo", help="coefficients of the loss, see adrpo.py and rivals.py")
    add(
        "--beta0",
        type=positive(float, zero=True),
        default=0.03,
        help=f"β0 of {', '.join(CLAMPED)}, in --beta-unit; β of orw-cfm-w2",
    )
    add("--a-min", type=finite, default=-4.0, help="A_min, the advantage's lower bound, in --beta-unit")
    add("--a-max", type=finite, default=4.0, help="A_max, its upper bound")
    unit = "the reward's deviation within a group in the first evaluation, or 1; what rewards are divided by"
    add("--beta-unit", choices=("deviation", "reward"), default="deviation", help=unit)
    add("--tau", type=positive(float), default=1.0, help="τ of orw-cfm-w2's exp(τ·R), per --beta-unit")
    add("--beta-dpo", type=positive(float), default=50.0, help="β of DPO, per squared velocity per element")
    add("--time-density", choices=("uniform", "noise"), default="uniform", help="of t in the loss: 1, or 2(1 − t)")
    add = parser.add_argument_group("rollouts").add_argument
    add("--prompts-per-round", type=positive(int), default=16, help="prompts drawn a round")
    add("--group-size", type=positive(int), default=8, help="samples per prompt, at least 2")
    add("--ode-steps", type=positive(int), default=8, help="integration steps from noise to image")
    add("--ode-method", choices=tuple(ode.EVALUATIONS), default="euler", help="integrator")
    add("--shift", type=positive(float), help="time-grid shift; default the model's own, as 3 in SD3 and 1 in pixel space")
    add("--guidance", type=positive(float, zero=True), default=1.0, help="guidance scale of rollouts; up to 1 is none")
    add("--negative-prompt", metavar="TEXT", default="", help="what guidance leads away from")
    add("--resolution", type=positive(int), help="side of the images in pixels; default the model's own")
    add("--rollout-batch", type=positive(int), help="samples at a time in rollouts and their rewards; default all")
    add = options.optimisation(parser, ["the attention's projections"], rounds=40, lr=6e-4, lr_schedule="cosine")
    add("--inner-steps", type=positive(int), default=4, help="gradient steps a round")
    flag(add, "--compile", False, "torch.compile the transformer")
    add = parser.add_argument_group("inputs").add_argument
    add("--model", default=demo.FLOW["model"], help="folder in diffusers' pipeline layout (SD3, FLUX) or a public single file")
    add("--base", help="such a folder for the parts that --model lacks (a single file lacks the tokenizers)")
    add(
        "--t5",
        choices=("load", "stream", "zeros"),
        default="load",
        help="SD3's and FLUX's T5: at once, layer by layer from disk, without it (SD3 alone)",
    )
    flag(add, "--lower-case", None, "lower-case the prompts; default as diffusers does it: only for SANA")
    add("--reward", nargs="+", default=demo.FLOW["reward"], help="NAME:FOLDER[@WEIGHT] …, see nano_adrpo/rewards/images.py")
    add("--prompts", help='.txt with a prompt a line, or JSON (lines), CSV, TSV with "prompt", "category"; default the demo\'s')
    add("--held-out", help="the same, for evaluation only; needs --prompts")
    add("--judge", help="FILE.py:FUNCTION(images, prompts) -> {metric: number or [N]}; without --prompts default the demo's")
    add("--embeddings", help="where embeddings of --prompts are kept for the next run; default PROMPTS.embeddings.safetensors")
    add = options.run(parser, eval_every=10)
    add("--eval-samples", type=positive(int), default=8, help="samples per prompt in an evaluation, at least 2")
    add("--eval-prompts", type=positive(int), default=64, help="most prompts, of each file, in an evaluation")
    args = options.parse(parser, argv)
    refuse_idle(args, argv)
    for option in ("group_size", "eval_samples"):
        if getattr(args, option) < 2:
            raise InputError(f"--{option.replace('_', '-')} {getattr(args, option)}: expected at least 2, to compare samples")
    divided(args, "prompts_per_round", "micro_batch", "rollout_batch")
    if args.fsdp and Path(args.model).is_file():
        raise InputError(f"--fsdp, --model {args.model}: expected a folder, of whose tensors each process reads its parts")
    if args.micro_batch:
        size, what = (1, "pairs") if args.method in DPO else (args.group_size, "samples")
        options.divides("--micro-batch", args.micro_batch, args.prompts_per_round * size, f"{what} of a round")
    options.check_range(args.a_min, args.a_max)
    if args.method == "adrpo" and args.beta0 == 0:
        raise InputError("--beta0 0: expected a positive number with --method adrpo; the other methods take 0")
    if args.method == "gardo-gate" and all(weight for _, weight in map(weighted, args.reward)):
        raise InputError("--method gardo-gate: expected a --reward of weight 0, such as FILE.py:FUNCTION@0, to compare with")
    if args.method == "shuffled" and args.prompts_per_round == 1:
        raise InputError("--method shuffled: expected --prompts-per-round of at least 2: it takes β from another group")
    for option in ("held_out", "embeddings"):
        if getattr(args, option) and not args.prompts:
            raise InputError(f"--{option.replace('_', '-')}: expected only with --prompts")
    if args.beta_unit == "deviation" and not args.eval_first:
        raise InputError("--no-eval-first: expected with --beta-unit reward; the first evaluation measures the deviation")
    return args


def refuse_idle(args, argv):
    """Refuses options that have no effect beside the others."""
    options.refuse_idle(
        argv,
        (args.method == "orw-cfm-w2", "with --method orw-cfm-w2", "--tau"),
        (args.method in DPO, "with --method dpo or dpo-offline", "--beta-dpo"),
        (args.method not in ("raft", *DPO), f"with --method {', '.join(CLAMPED)}, orw-cfm-w2", "--beta0"),
        (args.method in CLAMPED, f"with --method {', '.join(CLAMPED)}", "--a-min", "--a-max"),
        (args.guidance > 1, "with --guidance above 1", "--negative-prompt"),
        (args.prompts, "with --prompts: the demo's model has no T5", "--t5"),
        *options.idle_in_training(args),
    )


if __name__ == "__main__":
    run_command(main)
