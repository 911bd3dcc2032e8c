"""ADRPO-GRPO (Eq. 7) and GRPO (Eq. 3): the whole loop in one file.

    python train_grpo.py                                             # the arithmetic demo, on the CPU
    python train_grpo.py --method grpo                               # the baseline: the same loss, β0 instead of β0 − A
    python train_grpo.py --lora-rank 8 --lora-alpha 16 --lr 5e-3     # low-rank adapters on a frozen model
    python train_grpo.py --config docs/gsm8k.json --model QWEN_FOLDER --problems train.jsonl --held-out test.jsonl
    torchrun --nproc-per-node 4 train_grpo.py …                      # the same run on four GPUs: docs/many_gpus.md
    python train_grpo.py --demo audio                                # questions about sounds, on the CPU
    python train_grpo.py --task audio --model QWEN_OMNI_FOLDER --problems train_qa.json --held-out val_qa.json \
        --audio-folder WAVS                                          # questions about sounds, AVQA's or your own

One round: draw problems, sample a group of completions for each, reward them, turn rewards into advantages and β, take clipped
policy-gradient steps, log. The reference is a frozen copy of the policy at the start or, with --lora-rank, the policy with its
adapters off (with --adapter: as they were at the start). Written to --out: config.json, metrics.jsonl, samples.txt, model/
(transformers' layout) or adapter/ (PEFT's) and, with matplotlib, curves.png.
"""

import functools

import torch

from nano_adrpo import adrpo, demo, files, lora, metrics, rivals
from nano_adrpo.demo import sounds
from nano_adrpo.errors import InputError, Parser, about, run_command, writing
from nano_adrpo.evaluation import plots
from nano_adrpo.evaluation.text import evaluate, reward_means
from nano_adrpo.language.audio import AudioCodec
from nano_adrpo.language.chat import TextCodec
from nano_adrpo.language.elsewhere import open_engine
from nano_adrpo.language.rollout import roll_out, score, score_all
from nano_adrpo.language.sampling import uniform
from nano_adrpo.models.omni import open_language_model
from nano_adrpo.rewards import choices, function, text
from nano_adrpo.rewards.questions import read_questions
from nano_adrpo.training import checkpoint, options, run
from nano_adrpo.training.distributed import divided, each, gather, mine, once, total
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

# A method is its β: a number, or one for each completion, from the rewards R and the normalised advantages A [N]. A new method
# is a new line.
METHODS = {
    "adrpo": lambda R, A, args: args.beta0 - A.clamp(*advantage_range(args)),  # Eq. 7: β0 − clamp(A)
    "grpo": lambda R, A, args: args.beta0,  # Eq. 3
    "accuracy-beta": lambda R, A, args: rivals.accuracy_beta(R, args.beta0),
    # Controls: ADRPO's β of the group before, so that A's place in β does nothing, and β0 + clamp(A)
    "shuffled": lambda R, A, args: args.beta0 - A.clamp(*advantage_range(args)).roll(args.group_size),
    "anti": lambda R, A, args: args.beta0 + A.clamp(*advantage_range(args)),
}
CLAMPED = "adrpo", "shuffled", "anti"  # the methods in which clamp(A) stands


@alive
def main(argv, life):
    args = parse(argv)
    memory = checkpoint.begin(args, life, flat=True, first=None, last=None)
    generator = torch.Generator().manual_seed(args.seed)  # for adapters, problems, minibatches; on the CPU, as tokens' is
    token_generator = torch.Generator().manual_seed(args.seed)
    policy, codec, reference = open_policy(args, generator)
    problems, held_out, reward, judge = open_task(args, policy, codec)
    rolled = open_engine(args.rollouts, args.group_size, problems) if args.rollouts else roll_out
    optimizer = torch.optim.AdamW(trained(policy), args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay)
    ema = MovingAverage(trained(policy), args.ema)
    out = run.claim(args.out, "runs/grpo", options.saved(args), life)
    state = policy, optimizer, ema, {"draws": generator, "tokens": token_generator}
    checkpoint.restore(out, memory, *state)
    log, phases = run.Log(out / "metrics.jsonl", args.rounds), run.Phases(args.device)

    for round in run.rounds(args, memory["round"]):  # from 0, which only evaluates
        with run.at_round(args, out, round, phases), run.skipping(args, memory) as (values, involved):
            if round > 0:
                # 1. Roll out: a group of completions for each problem, contiguous. N = problems · group size.
                phases.begin("rollout")
                drawn = torch.randint(len(problems), (args.prompts_per_round,), generator=generator).tolist()
                asked = [problems[row] for row in drawn for _ in range(args.group_size)]
                involved += [problems[row].question for row in drawn]
                u = uniform(len(asked), args.max_new_tokens, token_generator)  # a number for each token
                with whole(policy), autocast(args):
                    rollout = rolled(policy, codec, mine(asked), args.max_new_tokens, args.max_prompt_tokens, mine(u),
                                     temperature=args.temperature, steps=steps(args))  # fmt: skip

                # 2. Reward: R [N], and the terms of this weighted sum, on the CPU.
                phases.begin("reward")
                rewards = reward(rollout.texts, mine(asked))
                rollout, rewards = gather((rollout, rewards))  # of all processes, where there are several
                mask, rows = rollout.mask, mine(torch.arange(len(asked)))  # mask [N, C]: 1 at the completions' tokens
                R = rewards["reward"].to(args.device)

                # 3. Advantages A [N] within the groups, and β [N]: β0 − clamp(A), or what the method's line above says.
                A = adrpo.group_advantages(R, args.group_size, normalize=True)
                beta = torch.as_tensor(METHODS[args.method](R, A, args), device=A.device).expand_as(A)

                # 4. Gradient steps on these completions. logp alone has a gradient.
                phases.begin("update")
                set_learning_rate(optimizer, args, round)
                with reference() as frozen, autocast(args):  # the policy at the start
                    ref_logp = gather(score_all(frozen, rollout, micro_batch(args), args.temperature, rows=rows))
                # One step on the policy's own completions: logp is old_logp, too, without an extra forward pass.
                one_step = args.inner_epochs * args.minibatches == 1 and rollout.logp is None
                old_logp, entropy = torch.zeros_like(ref_logp), torch.zeros_like(ref_logp)
                if not one_step:
                    with autocast(args):
                        old_logp, entropy = gather(score_all(policy, rollout, micro_batch(args), args.temperature, True, rows))
                pi_old, clipped = old_logp if rollout.logp is None else rollout.logp, 0  # the engine's, where it says them
                for batch in minibatches(args, generator):
                    count, losses = len(batch) if args.average == "sequences" else mask[batch].sum(), []
                    for i in mine(batch).split(micro_batch(args)):
                        with autocast(args):
                            logp, entropy_i = score(policy, rollout, i, args.temperature, entropy=True)
                        if one_step:
                            old_logp[i], entropy[i] = logp.detach(), entropy_i
                        loss = adrpo.policy_loss(  # Eq. 7, and Eq. 3 where β = β0
                            logp, pi_old[i], ref_logp[i], mask[i], A[i], beta[i], args.clip_eps, args.kl, args.average, count
                        )
                        loss.backward()
                        losses.append(loss.detach().double())
                        clipped += metrics.clipped_tokens(logp, pi_old[i], mask[i], args.clip_eps)
                    loss, norm = optimizer_step(optimizer, sum(losses), args, ema)

                # 5. Log.
                old_logp, entropy = (total(x) if one_step else x for x in (old_logp, entropy))  # each process has its rows
                values |= describe(args, rollout, asked, rewards, A, beta, entropy, old_logp, ref_logp)
                values |= {"loss": loss, "grad_norm": norm}
                values["clip_fraction"] = total(clipped).item() / args.inner_epochs / int(mask.sum())
                memory["flat"] = run.still_flat(memory["flat"], values["zero_spread"], round, args.rounds)
                if round == 1:
                    run.note_scale(args.beta0, values["reward_std"])

        # 6. Evaluate the moving average on the held-out problems, with the same random numbers in every run, and save it.
        if run.evaluation_is_due(args, round):
            phases.begin("evaluation")
            with run.at_round(args, out, round, phases), ema.applied(), whole(policy):
                *found, texts = evaluate(policy, codec, held_out, reward, judge, reference, **evaluation(args))
                values["eval"], values["eval_error"] = memory["last"] = found
                memory["first"] = memory["first"] or found
                write_samples(out, round, held_out, texts[:: args.eval_samples])
                run.save_model(policy, policy.save_pretrained, args, out, ema, round)
        log.write(round, values, phases.take())
        checkpoint.save_if_due(args, life, out, round, memory, *state)

    return report(out, memory)


@once
def report(out, memory):
    """Prints the closing table and draws the curves; -> the metrics of the last evaluation."""
    run.print_table({"held-out problems": (memory["first"], memory["last"])})
    plots.curves(out / "curves.png", out / "metrics.jsonl", "entropy")
    plots.shares(out / "shares.png", out / "metrics.jsonl")
    return memory["last"][0]


def open_policy(args, generator):
    """-> the policy, its codec, and the reference: `with reference() as frozen:` is the policy at the start."""
    policy = open_language_model(args.model, weight_dtype(args), "meta" if args.fsdp else args.device)
    with about(f"--model {args.model}"):
        chat = args.system, args.chat_template, args.thinking, args.stop
        codec = AudioCodec(policy, *chat, embeddings=embeddings(args)) if args.task == "audio" else TextCodec(policy, *chat)
    if args.chat_template and codec.template:  # what is saved has the template that it was trained with
        policy.files["chat_template.jinja"] = codec.template.text.encode()
    if args.adapter:
        with about("--adapter"):
            lora.load(policy, args.adapter, args.device)
    if args.lora_rank:
        with about("--lora-rank, --lora-alpha, --lora-targets"):
            targets = args.lora_targets or lora.DECODER_TARGETS
            lora.add(policy, targets, args.lora_rank, args.lora_alpha or args.lora_rank, generator, args.device)
    policy.model.gradient_checkpointing = args.gradient_checkpointing
    reference = reference_of(policy, options.adapted(args))
    shard(args, policy, reference)
    return policy, codec, reference


def open_task(args, policy, codec):
    """-> problems to train on, held-out problems, the reward, and the judge or None. Without --problems they are the demo's,
    with its judge. Raises InputError for a prompt that is too long."""
    own = demo.AUDIO if args.task == "audio" else demo.GRPO
    paths = args.problems or own["problems"], args.held_out or own["held_out"]
    if args.task == "audio" and not args.problems:
        paths = sounds.written()
    few_shot = files.read_text(args.few_shot) if args.few_shot else ""
    if args.task == "audio":
        read, options = read_questions, (args.prompt_form, args.audio_folder)
    else:
        read, options = text.read_problems, (text.needs_answers(args.reward),)
    problems, held_out = (read(file, args.instruction, few_shot, *options) for file in paths)
    for file, some in zip(paths, (problems, held_out)):
        with about(f"{file}, --max-prompt-tokens {args.max_prompt_tokens}"):
            ids, _ = codec.encode([problem.prompt for problem in some], args.max_prompt_tokens)
        longest, limit = ids.shape[1], policy.config.positions
        if longest + args.max_new_tokens > limit:
            behind = f"--max-new-tokens {args.max_new_tokens} behind a prompt of {longest}"
            raise InputError(f"{file}: {behind} exceeds the model's {limit} positions")
    terms = [*args.reward, *([f"format@{args.format_reward}"] if args.format_reward else [])]
    reward = text.parse(terms, args.device, micro_batch(args), functools.partial(autocast, args), args.system, args.thinking)
    judge = args.judge or (own["judge"] if args.problems is None else None)
    return problems, held_out, reward, text.own(function(judge)) if judge else None


def embeddings(args):
    """The folder that keeps the embeddings of sounds, or None: in memory."""
    folder = args.embeddings or (f"{args.problems}.embeddings" if args.problems else "none")
    return None if folder == "none" else folder


def advantage_range(args):
    """[A_min, A_max] of A within β0 − A: by default ±β0."""
    return -args.beta0 if args.a_min is None else args.a_min, args.beta0 if args.a_max is None else args.a_max


def micro_batch(args):
    """Completions per forward pass of a process."""
    return each(args.micro_batch or args.prompts_per_round * args.group_size // args.minibatches)


def minibatches(args, generator):
    """Yields the rows of each gradient step of a round, in a new order in each pass over the completions."""
    for _ in range(args.inner_epochs):
        rows = torch.randperm(args.prompts_per_round * args.group_size, generator=generator)
        yield from rows.to(args.device).chunk(args.minibatches)


def steps(args):
    """How Decoder.generate takes its steps: see there."""
    return "compiled" if args.compile else None


def describe(args, rollout, asked, rewards, A, beta, entropy, logp, ref_logp):
    """What to log of a round, {name: number}. entropy, logp, ref_logp [N, C]: the policy's when it sampled, the reference's.
    engine_kl is how far the probabilities of the engine of --rollouts are from the policy's."""
    entropy, logp, ref_logp = (values[rollout.mask.bool()] for values in (entropy, logp, ref_logp))  # [tokens]
    engine = None if rollout.logp is None else rollout.logp[rollout.mask.bool()]
    groups = rewards["reward"].reshape(-1, args.group_size)
    low, high = advantage_range(args)
    at_bounds = ((A <= low) | (A >= high)) & (args.method in CLAMPED)
    right = text.right(rollout.texts, asked)
    return {
        **reward_means(rewards),
        "reward_std": groups.std(dim=1).mean().item(),
        "zero_spread": (groups == groups[:, :1]).all(dim=1).float().mean().item(),
        **({"accuracy": sum(right) / len(asked)} if right else {}),
        "length": rollout.mask.sum(dim=1).float().mean().item(),
        "entropy": entropy.mean().item(), **metrics.kl_from_reference(logp, ref_logp),
        **({} if engine is None else {"engine_kl": metrics.kl_from_reference(engine, logp)["kl_k3"]}),
        "beta_min": beta.min().item(), "beta_mean": beta.mean().item(), "beta_max": beta.max().item(),
        "beta_at_bounds": at_bounds.float().mean().item(),
    }  # fmt: skip


def evaluation(args):
    """The options of an evaluation, for evaluation.text.evaluate."""
    return {
        "samples": args.eval_samples, "max_new_tokens": args.max_new_tokens, "longest": args.max_prompt_tokens,
        "batch": each(args.eval_batch), "score_batch": micro_batch(args), "temperature": args.eval_temperature,
        "top_k": args.eval_top_k, "top_p": args.eval_top_p, "steps": steps(args),
        "score_temperature": args.eval_temperature or args.temperature, "autocast": functools.partial(autocast, args),
        "mine": mine, "gather": gather,
    }  # fmt: skip


@once
def write_samples(out, round, problems, texts):
    """Adds one completion of each of the first eight held-out problems to samples.txt."""
    samples = [f"{problem.question}\n{completion}\n" for problem, completion in zip(problems[:8], texts)]
    with writing(out / "samples.txt"), open(out / "samples.txt", "a", encoding="utf-8") as file:
        file.write(f"=== round {round}\n" + "\n".join(samples) + "\n")


def parse(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument_group("algorithm").add_argument
    add("--method", choices=tuple(METHODS), default="adrpo", help="coefficient of the KL: β0 − A, β0, see METHODS")
    add("--beta0", type=positive(float, zero=True), default=0.04, help="β0, or β (grpo); 0: no KL")
    add("--a-min", type=finite, help="A_min, the lower bound of A within β0 − A, in deviations; default −β0")
    add("--a-max", type=finite, help="A_max, its upper bound; default β0")
    add("--clip-eps", type=positive(float), default=0.2, help="ε of the ratio's clip [1 − ε, 1 + ε]")
    add(
        "--kl",
        choices=("k1", "k2", "k3"),
        default="k3",
        help="estimator of the KL, see nano_adrpo/adrpo.py; k1 does not regularise",
    )
    add("--average", choices=("sequences", "tokens"), default="sequences", help="what the loss is a mean over")
    add = parser.add_argument_group("rollouts").add_argument
    add("--prompts-per-round", type=positive(int), default=8, help="problems drawn a round")
    add("--group-size", type=positive(int), default=16, help="completions per problem, at least 2")
    add(
        "--max-new-tokens",
        type=positive(int),
        default=demo.GRPO["max_new_tokens"],
        help="tokens of a completion, its end included",
    )
    engine = "completions of another engine: FILE.jsonl or FILE.py:FUNCTION, see nano_adrpo/language/elsewhere.py"
    add("--rollouts", metavar="FILE", help=engine)
    add("--max-prompt-tokens", type=positive(int), default=512, help="a longer prompt is refused; a sound has 25 a second")
    add("--temperature", type=positive(float), default=1.0, help="of sampling, and of the scores that the loss uses")
    add = options.optimisation(parser, lora.DECODER_TARGETS, rounds=110, lr=8e-4, lr_schedule="linear", lr_hold=0.5)
    add("--inner-epochs", type=positive(int), default=1, help="μ, passes over a round's completions")
    add("--minibatches", type=positive(int), default=1, help="gradient steps per pass; must divide a round's completions")
    flag(add, "--compile", False, "torch.compile the steps of sampling, on a GPU as a CUDA graph")
    add = parser.add_argument_group("inputs").add_argument
    add(
        "--demo",
        choices=("arithmetic", "audio"),
        default="arithmetic",
        help="whose model, problems and options are the defaults",
    )
    add("--task", choices=("text", "audio"), default="text", help="what problems are: texts, or questions about sounds")
    add("--model", default=demo.GRPO["model"], help="Qwen2, Qwen2.5, Qwen3, Llama or Gemma folder; of audio Qwen2.5-Omni's")
    add(
        "--problems",
        help='JSON lines with "question" or "prompt" and, if rewards need it, "answer"; default the demo\'s; of audio see '
        "nano_adrpo/rewards/questions.py",
    )
    add("--held-out", help="the same, for evaluation; needed with --problems")
    add("--instruction", metavar="TEXT", default="", help="text put behind every question")
    options.chat(add)
    add("--few-shot", help="file of text put before every question; rewards and judges do not see it")
    add(
        "--reward",
        nargs="+",
        help="NAME[:FOLDER][@WEIGHT] …, see nano_adrpo/rewards/text.py; default exact, of audio choice answer_format",
    )
    add("--format-reward", type=positive(float, zero=True), default=0.0, help="for an answer in \\boxed{} or after ####")
    add("--judge", help="FILE.py:FUNCTION(prompts, completions, rows) -> {metric: number}; default the demo's or none")
    add = parser.add_argument_group("audio").add_argument
    add("--prompt-form", choices=tuple(choices.FORMS), help="how to answer, see nano_adrpo/rewards/choices.py; default answer")
    add("--audio-folder", help="where the sounds are; default beside the file that names them")
    add("--embeddings", help="folder that keeps the sounds' embeddings; default PROBLEMS.embeddings; none: the memory")
    add = options.run(parser, eval_every=22)
    add("--eval-samples", type=positive(int), default=8, help="completions per held-out problem in an evaluation")
    add("--eval-batch", type=positive(int), default=1024, help="completions sampled at a time in an evaluation")
    add("--eval-temperature", type=positive(float, zero=True), default=1.0, help="in an evaluation; 0 is greedy")
    add("--eval-top-k", type=positive(int, zero=True), default=0, help="likeliest tokens kept in an evaluation; 0 keeps all")
    add("--eval-top-p", type=positive(float), default=1.0, help="probability kept in an evaluation; 1 keeps all")
    args = options.parse(parser, argv)
    if args.demo == "audio":
        parser.set_defaults(**demo.AUDIO["options"])
        args = options.parse(parser, argv)
    refuse_idle(args, argv)
    if args.group_size < 2:
        raise InputError("--group-size 1: expected at least 2, since an advantage compares completions of one problem")
    options.divides("--minibatches", args.minibatches, args.prompts_per_round * args.group_size, "completions of a round")
    size = args.prompts_per_round * args.group_size // args.minibatches
    options.divides("--micro-batch", args.micro_batch or size, size, "completions of a minibatch")
    divided(args, "prompts_per_round", "micro_batch", **{f"--minibatches {args.minibatches}, completions in each:": size})
    if bool(args.problems) != bool(args.held_out):
        raise InputError("--problems and --held-out: expected both or neither")
    if args.method == "shuffled" and args.prompts_per_round == 1:
        raise InputError("--method shuffled: expected --prompts-per-round of at least 2: it takes β from another group")
    resolve_task(args)
    if args.eval_top_p > 1:
        raise InputError(f"--eval-top-p {args.eval_top_p}: expected at most 1")
    options.check_range(*advantage_range(args))
    return args


def resolve_task(args):
    """Fills in what is by default the task's, and refuses what acts on audio alone."""
    audio = args.task == "audio"
    args.reward = args.reward or (["choice", "answer_format"] if audio else ["exact"])
    if audio:
        args.prompt_form = args.prompt_form or "answer"
        if not args.problems and args.demo != "audio":
            raise InputError("--task audio: expected --problems and --held-out, or --demo audio")
    elif args.demo == "audio":
        raise InputError("--task text: expected audio with --demo audio")
    for option in () if audio else ("prompt_form", "audio_folder", "embeddings"):
        if getattr(args, option) is not None:
            raise InputError(f"--{option.replace('_', '-')}: expected only with --task audio")
    if not audio and "choice" in [text.weighted(spec)[0] for spec in args.reward]:
        raise InputError("--reward choice: expected only with --task audio, whose questions have choices")


def refuse_idle(args, argv):
    """Refuses options that have no effect beside the others."""
    regularised = args.beta0 > 0 or args.method in CLAMPED and advantage_range(args) != (0, 0)
    several = args.inner_epochs * args.minibatches > 1 or args.rollouts
    options.refuse_idle(
        argv,
        (args.method in CLAMPED, f"with --method {', '.join(CLAMPED)}", "--a-min", "--a-max"),
        (several, "with --inner-epochs or --minibatches above 1: in a single step the ratio is 1", "--clip-eps"),
        (regularised, "with a --beta0 above 0: there is no KL", "--kl"),
        (args.eval_temperature > 0, "with --eval-temperature above 0", "--eval-top-k", "--eval-top-p"),
        *options.idle_in_training(args),
    )


if __name__ == "__main__":
    run_command(main)
