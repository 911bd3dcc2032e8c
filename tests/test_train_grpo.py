"""train_grpo.py end to end on the demo's model: gradients of Eqs. 7 and 3, learning, determinism, every option, bad input."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import scripts
import torch
from safetensors.torch import load_file
from scripts import lines, written
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import train_grpo
from nano_adrpo import demo, lora
from nano_adrpo.files import safetensors
from nano_adrpo.models import decoder
from nano_adrpo.models.decoder import Config, Decoder, RewardModel
from nano_adrpo.training import options as shared

ROOT = Path(train_grpo.__file__).parent
BASE = Path(demo.GRPO["model"])
SMALL = "--rounds 3 --prompts-per-round 4 --group-size 4 --eval-every 2 --eval-samples 1".split()


def train(out, *options):
    return train_grpo.main([*SMALL, "--out", str(out), *map(str, options)])


def jsonl(file, *pairs):
    """A file of GSM8K's format with these questions and answers."""
    file.write_text("".join(json.dumps({"question": q, "answer": f"so it is\n#### {a}"}) + "\n" for q, a in pairs))
    return file


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A run of one round on a few problems, without pictures; -> a function of its folder's name and more options."""
    monkeypatch.setattr(train_grpo.plots, "pyplot", lambda file: None)
    train_file = jsonl(tmp_path / "train.jsonl", ("17+48=", 65), ("29+34=", 63), ("57+36=", 93), ("88+13=", 101))
    held_out = jsonl(tmp_path / "test.jsonl", ("38+45=", 83), ("19+19=", 38), ("66+27=", 93), ("75+18=", 93))
    files = ["--problems", train_file, "--held-out", held_out]
    sizes = "--rounds 1 --prompts-per-round 2 --group-size 4 --eval-samples 2 --lr 3e-3".split()

    def run(name, *options):
        train_grpo.main([*sizes, *map(str, files), "--out", str(tmp_path / name), *map(str, options)])
        return tmp_path / name

    return run


def edited(path, **changes):
    """A copy of the demo's model in which keys of these JSON files are changed; a change to None leaves the key out."""
    shutil.copytree(BASE, path)
    for name, values in changes.items():
        values = {**json.loads((path / f"{name}.json").read_text()), **values}
        (path / f"{name}.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return path


def watch(monkeypatch):
    """Lets a run record {"policy": …, "rollouts": [Rollout], "gradients": [{name: tensor}], before clipping}."""
    seen = {"rollouts": [], "gradients": [], "policy": None}
    roll_out, step, open_policy = train_grpo.roll_out, train_grpo.optimizer_step, train_grpo.open_policy

    def opened(*args):
        policy, *others = open_policy(*args)
        seen["policy"] = policy
        return policy, *others

    def rolled(*args, **kwargs):
        seen["rollouts"].append(roll_out(*args, **kwargs))
        return seen["rollouts"][-1]

    def stepped(*args):
        parameters = seen["policy"].named_parameters()
        seen["gradients"].append({name: p.grad.clone() for name, p in parameters if p.grad is not None})
        return step(*args)

    monkeypatch.setattr(train_grpo, "open_policy", opened)
    monkeypatch.setattr(train_grpo, "roll_out", rolled)
    monkeypatch.setattr(train_grpo, "optimizer_step", stepped)
    return seen


# -------------------------------------------------------------------------------------------------------------------- runs


def test_three_rounds_write_everything(tmp_path):
    values = train(tmp_path / "run")
    names = {"config.json", "metrics.jsonl", "samples.txt", "model", "curves.png"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names
    rows = lines(tmp_path / "run")
    assert [row["round"] for row in rows] == [0, 1, 2, 3] and [("eval" in row) for row in rows] == [True, False, True, True]
    assert rows[0]["eval"]["kl_k1"] == rows[0]["eval"]["kl_k3"] == 0 < rows[3]["eval"]["kl_k3"] and rows[3]["eval"] == values
    assert 0.2 < rows[0]["eval"]["pass@1"] < 0.4 and rows[0]["eval"]["reward"] == rows[0]["eval"]["pass@1"]
    assert all(1 < row["length"] <= demo.GRPO["max_new_tokens"] and row["clip_fraction"] == 0 for row in rows[1:])
    samples = (tmp_path / "run" / "samples.txt").read_text()
    assert [samples.count(f"=== round {number}\n") for number in range(4)] == [1, 0, 1, 1] and samples.count("+") >= 24
    tuned, base = (Decoder.from_pretrained(path).state_dict() for path in (tmp_path / "run" / "model", BASE))
    assert tuned.keys() == base.keys() and not all(torch.equal(tuned[name], base[name]) for name in base)
    assert {p.name for p in (tmp_path / "run" / "model").iterdir()} == {p.name for p in BASE.iterdir()}


def test_the_same_seed_writes_the_same_bytes_and_a_config_repeats_a_run(few, tmp_path):
    few("a", "--seed", 5, "--minibatches", 2, "--ema", 0.5)
    train_grpo.main(["--config", str(tmp_path / "a" / "config.json"), "--out", str(tmp_path / "b")])
    assert written(tmp_path / "a") == written(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


@pytest.mark.parametrize("average", ["sequences", "tokens"])
@pytest.mark.parametrize("method", ["adrpo", "grpo"])
def test_the_first_gradient_is_that_of_the_paper(tmp_path, monkeypatch, method, average):
    # Eq. 7, or Eq. 3, token by token, at ratio 1: there the gradient of the clipped term is that of −A·log π. The reference is
    # moved away from the policy, so that the KL has a gradient too, and the temperature is not 1.
    reference_of = train_grpo.reference_of

    def moved(network, adapters):
        reference = reference_of(network, adapters)
        with reference() as frozen:
            for parameter in frozen.parameters():
                parameter *= 1.1
        return reference

    monkeypatch.setattr(train_grpo, "reference_of", moved)
    seen = watch(monkeypatch)
    train(tmp_path / "run", "--method", method, "--average", average, "--beta0", 0.6, "--a-min", -0.3, "--a-max", 0.5,
          "--temperature", 1.4, "--micro-batch", 4, "--rounds", 1, "--no-eval-first", "--eval-temperature", 0)  # fmt: skip
    (rollout,), (gradient,) = seen["rollouts"], seen["gradients"]
    logged = lines(tmp_path / "run")[0]

    policy, reference = Decoder.from_pretrained(BASE), Decoder.from_pretrained(BASE)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter *= 1.1
    asked = train_grpo.text.read_problems(demo.GRPO["problems"])
    drawn = torch.randint(len(asked), (4,), generator=torch.Generator().manual_seed(0)).tolist()
    answers = [asked[row].answer for row in drawn for _ in range(4)]
    rewards = [float(text.endswith(f"####{answer}")) for text, answer in zip(rollout.texts, answers)]
    assert logged["reward"] == pytest.approx(statistics.mean(rewards)) and 0 < sum(rewards) < 16
    logits, ref_logits = (model(rollout.ids, rollout.seen).div(1.4).log_softmax(-1) for model in (policy, reference))
    losses, betas, entropies, kls, varied = [], [], [], [], []  # varied: do the rewards of the completion's group differ?
    for i in range(16):
        group = rewards[i // 4 * 4 : i // 4 * 4 + 4]
        A = (rewards[i] - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        betas.append(0.6 - min(max(A, -0.3), 0.5) if method == "adrpo" else 0.6)
        varied.append(len(set(group)) > 1)
        losses.append([])
        for t in range(rollout.ids.shape[1] - rollout.mask.shape[1], rollout.ids.shape[1]):
            if rollout.seen[i, t]:
                now, ref = logits[i, t - 1, rollout.ids[i, t]], ref_logits[i, t - 1, rollout.ids[i, t]].detach()
                losses[-1].append(-A * now + betas[-1] * ((ref - now).exp() - 1 - (ref - now)))
                kls.append((now - ref).item())
                entropies.append(-(logits[i, t - 1].exp() * logits[i, t - 1]).sum().item())
    if average == "sequences":
        loss = sum(sum(row) / len(row) for row in losses) / 16
    else:
        loss = sum(map(sum, losses)) / sum(map(len, losses))
    loss.backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda text: f"{name}: {text}")
    expected = {
        "clip_fraction": 0, "beta_min": min(betas), "beta_mean": statistics.mean(betas), "beta_max": max(betas),
        "beta_at_bounds": statistics.mean(varied) if method == "adrpo" else 0, "zero_spread": 1 - statistics.mean(varied),
        "entropy": statistics.mean(entropies), "kl_k1": statistics.mean(kls),
        "kl_k3": statistics.mean([torch.tensor(-kl).exp().item() - 1 + kl for kl in kls]),
        "reward_std": statistics.mean([statistics.stdev(rewards[i : i + 4]) for i in range(0, 16, 4)]),
        "grad_norm": sum(p.grad.square().sum() for p in policy.parameters()).sqrt().item(),
    }  # fmt: skip
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("average", ["sequences", "tokens"])
def test_the_split_into_micro_batches_changes_no_gradient(few, monkeypatch, average):
    gradients, rows = [], []
    for name, size in (("whole", 4), ("split", 1)):
        seen = watch(monkeypatch)
        out = few(name, "--average", average, "--inner-epochs", 2, "--minibatches", 2, "--beta0", 0.5, "--micro-batch", size)
        gradients.append([torch.cat([g.flatten() for g in each.values()]) for each in seen["gradients"]])
        rows.append(lines(out)[1])
        monkeypatch.undo()
    assert len(gradients[0]) == 4 and rows[0]["clip_fraction"] > 0
    for whole, split in zip(*gradients):
        assert (whole - split).norm() < 1e-3 * whole.norm()
    assert all(rows[1][name] == pytest.approx(rows[0][name], rel=1e-3, abs=1e-5) for name in ("loss", "grad_norm", "entropy"))


def test_the_policy_is_not_run_twice_on_the_same_weights(few, monkeypatch):
    calls, scores = [], Decoder.token_logprobs
    monkeypatch.setattr(Decoder, "token_logprobs", lambda *args, **kwargs: calls.append(1) or scores(*args, **kwargs))
    few("once", "--no-eval-first")
    assert len(calls) == 2 + 2  # the reference and the update; then the evaluation's two
    calls.clear()
    few("twice", "--no-eval-first", "--inner-epochs", 2)
    assert len(calls) == 2 + 2 + 2  # the sampling policy's log-probabilities are needed for the second step


def test_the_ratio_is_clipped_only_after_a_step(few):
    def weights(name, *options):
        out = few(name, *options)
        return lines(out)[1]["clip_fraction"], load_file(out / "model" / "model.safetensors")["model.norm.weight"]

    (never, tight), (_, loose) = weights("a", "--clip-eps", 1e-6), weights("b", "--clip-eps", 1e6)
    assert never == 0 and torch.equal(tight, loose)  # one step a round: the ratio is 1
    for i, options in enumerate((["--inner-epochs", 2], ["--minibatches", 2])):
        (often, tight), (never, loose) = (weights(f"{eps}-{i}", "--clip-eps", eps, *options) for eps in (1e-6, 1e6))
        assert 0 < often < 1 and never == 0 and not torch.equal(tight, loose)


def test_no_kl_is_the_policy_gradient_alone(few, monkeypatch):
    seen = watch(monkeypatch)
    few("none", "--method", "grpo", "--beta0", 0, "--no-eval-first")
    monkeypatch.setattr(train_grpo.adrpo, "kl_divergence", lambda logp, ref_logp, kl: 0 * logp)
    few("by-hand", "--method", "grpo", "--beta0", 1, "--no-eval-first")
    first, second = seen["gradients"]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rounds_zero_evaluates_only(few):
    out = few("run", "--rounds", 0)
    assert [row["round"] for row in lines(out)] == [0] and not (out / "model").exists()
    assert lines(out)[0]["eval"] == lines(few("trained"))[0]["eval"]


def test_what_is_evaluated_and_saved_is_the_moving_average(few):
    out = few("run", "--ema", 0.5, "--rounds", 2)
    again = few("again", "--model", out / "model", "--rounds", 0)
    names = ("reward", "entropy", "length")
    saved, evaluated = ({name: lines(o)[-1]["eval"][name] for name in names} for o in (again, out))
    assert saved == evaluated
    assert lines(few("raw", "--rounds", 2))[2]["eval"]["entropy"] != evaluated["entropy"]


def test_an_evaluation_scores_at_the_temperature_it_sampled_at(few, monkeypatch):
    # The entropy and the KL are those of the distribution that the completions were drawn from, computed here from the logits.
    from nano_adrpo.evaluation import text

    rollouts, roll_out = [], text.roll_out
    monkeypatch.setattr(text, "roll_out", lambda *args, **kwargs: rollouts.append(roll_out(*args, **kwargs)) or rollouts[-1])
    for temperature, divisor in ((0.5, 0.5), (0, 1.4)):  # greedy: at the temperature of training
        out = few(f"at-{temperature}", "--rounds", 0, "--eval-temperature", temperature, "--temperature", 1.4)
        rollout = rollouts.pop()
        logp = Decoder.from_pretrained(BASE)(rollout.ids, rollout.seen).div(divisor).log_softmax(-1)
        entropies = -(logp.exp() * logp).sum(-1)[:, -rollout.mask.shape[1] - 1 : -1]
        expected = entropies[rollout.mask.bool()].mean().item()
        assert lines(out)[0]["eval"]["entropy"] == pytest.approx(expected, rel=1e-4)


def test_all_equal_rewards_are_warned_of_once(tmp_path, few, capsys):
    (tmp_path / "flat.py").write_text("def flat(prompts, completions):\n    return [1.0] * len(prompts)\n")
    out = few("run", "--rounds", 12, "--eval-every", 12, "--reward", f"{tmp_path / 'flat.py'}:flat")
    assert capsys.readouterr().out.count("warning: in 10 rounds no group's rewards differed") == 1
    assert all(row["zero_spread"] == 1 and row["beta_min"] == row["beta_max"] == pytest.approx(0.04) for row in lines(out)[1:])
    few("mixed", "--rounds", 2)
    assert "warning" not in capsys.readouterr().out


def test_the_scale_of_beta0_and_the_phases_are_printed(few, capsys):
    few("run")
    printed = capsys.readouterr().out
    assert "β0 = 0.04 in deviations of the reward within a group, as A is; that deviation is " in printed
    first, second = (next(line for line in printed.splitlines() if line.startswith(f"round {n}/1")) for n in (0, 1))
    assert "evaluation " in first and "rollout" not in first  # the first evaluation is booked to round 0
    assert all(f"{phase} " in second for phase in ("rollout", "reward", "update", "evaluation"))


def test_twenty_five_rounds_of_the_main_job_learn(tmp_path):
    values = train_grpo.main(["--out", str(tmp_path / "run"), "--rounds", "25", "--eval-every", "25", "--eval-samples", "1"])
    assert lines(tmp_path / "run")[0]["eval"]["pass@1"] < 0.4 and values["pass@1"] > 0.65


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_main_job_learns(tmp_path, seed):
    values = train_grpo.main(["--out", str(tmp_path / "run"), "--seed", str(seed)])
    assert lines(tmp_path / "run")[0]["eval"]["pass@1"] < 0.4 and values["pass@1"] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_main_job_learns_with_adapters_too(tmp_path, seed):
    options = ["--lora-rank", "8", "--lora-alpha", "16", "--lr", "5e-3", "--seed", str(seed)]
    assert train_grpo.main(["--out", str(tmp_path / "run"), *options])["pass@1"] >= 0.93


@pytest.mark.cuda
@pytest.mark.parametrize(
    "options",
    [[], ["--dtype", "bfloat16", "--gradient-checkpointing", "--micro-batch", 4], ["--dtype", "bfloat16", "--lora-rank", 8]],
)
def test_a_run_on_cuda(tmp_path, options):
    cpu, cuda = (train(tmp_path / device, "--device", device, "--eval-samples", 8, *options) for device in ("cpu", "cuda"))
    # Generators differ between devices. 2,048 attempts of each: a difference of 0.09 is six standard errors.
    assert cuda["pass@1"] == pytest.approx(cpu["pass@1"], abs=0.09) and cuda.keys() == cpu.keys()


# ---------------------------------------------------------------------------------------------------------------- adapters


def test_adapters_train_in_float32_on_a_base_that_stays(few, monkeypatch):
    for dtype in ("float32", "bfloat16"):
        seen = watch(monkeypatch)
        out = few(dtype, "--lora-rank", 8, "--dtype", dtype, "--gradient-checkpointing", "--micro-batch", 2)
        base = Decoder.from_pretrained(BASE, getattr(torch, dtype)).state_dict()
        after = seen["policy"].state_dict()
        assert base.keys() == {name for name in after if ".lora_" not in name}
        assert all(torch.equal(after[name], base[name]) and after[name].dtype == base[name].dtype for name in base)
        # At the first step B is 0, so A's gradient is too.
        (gradient,) = seen["gradients"]
        assert {name for name, g in gradient.items() if g.abs().max() > 0} == {n for n in after if ".lora_B" in n}
        assert {g.dtype for g in gradient.values()} == {torch.float32} and not (out / "model").exists()
        assert {name.split(".")[-3] for name in gradient} == set(lora.DECODER_TARGETS)
        policy = lora.load(Decoder.from_pretrained(BASE, getattr(torch, dtype)), out / "adapter")
        assert all(torch.equal(tensor, after[name]) for name, tensor in policy.state_dict().items())
        monkeypatch.undo()


# ----------------------------------------------------------------------------------------------------------------- options

# Option: (its value, other options of both runs). With the option, what the run writes must differ from the run without.
EFFECTS = {
    "--method": ("grpo", ()),
    "--beta0": (0.5, ()),
    "--a-min": (-0.01, ("--rounds", 2)),
    "--a-max": (0.01, ("--rounds", 2)),
    "--clip-eps": (1e-3, ("--inner-epochs", 2)),
    "--kl": ("k2", ("--rounds", 2)),
    "--average": ("tokens", ()),
    "--prompts-per-round": (3, ()),
    "--group-size": (3, ()),
    "--max-new-tokens": (8, ()),
    "--temperature": (0.5, ()),
    "--rounds": (2, ()),
    "--lr": (1e-2, ()),
    "--lr-schedule": ("cosine", ("--rounds", 3)),
    "--lr-hold": (0.0, ("--rounds", 3)),
    "--lr-end": (0.5, ("--rounds", 3)),
    "--warmup": (2, ()),
    "--weight-decay": (0.5, ()),
    "--clip-grad": (1e-3, ("--rounds", 2)),
    "--lora-rank": (2, ()),
    "--lora-alpha": (8, ("--lora-rank", 2)),
    "--lora-targets": ("q_proj", ("--lora-rank", 2)),
    "--ema": (0.9, ()),
    "--inner-epochs": (2, ()),
    "--minibatches": (2, ()),
    "--instruction": ("1", ()),
    "--reward": ("format", ()),
    "--format-reward": (0.5, ()),
    "--judge": (demo.GRPO["judge"], ()),
    "--seed": (1, ()),
    "--dtype": ("bfloat16", ()),
    "--eval-every": (1, ("--rounds", 2, "--eval-every", 2)),
    "--no-eval-first": (None, ()),
    "--keep-checkpoints": (None, ()),
    "--eval-samples": (3, ()),
    "--eval-temperature": (0.1, ()),
    "--eval-top-k": (1, ()),
    "--eval-top-p": (0.2, ()),
}
# Options that change how, not what, is computed, or where from or to: each has a test of its own in this file.
ELSEWHERE = {
    "--micro-batch", "--gradient-checkpointing", "--model", "--problems", "--held-out", "--max-prompt-tokens", "--eval-batch",
    "--config", "--out", "--device",
}  # fmt: skip


@pytest.mark.parametrize("option", EFFECTS)
def test_every_option_does_something(few, option):
    value, others = EFFECTS[option]
    without, with_it = few("without", *others), few("with", *others, option, *([] if value is None else [value]))
    if option.startswith("--eval-t") or option in ("--ema", "--judge"):
        assert lines(without)[-1]["eval"] != lines(with_it)[-1]["eval"]
    assert written(without) != written(with_it)


def test_every_option_is_listed_above(monkeypatch):
    names, parse = set(), shared.parse

    def spy(parser, argv):
        names.update(action.option_strings[0] for action in parser._actions)
        return parse(parser, argv)

    monkeypatch.setattr(train_grpo.options, "parse", spy)
    train_grpo.parse([])
    assert names - {"-h"} == {name.replace("--no-", "--") for name in EFFECTS} | ELSEWHERE


def test_batches_and_memory_savers_are_used_and_change_nothing(few, monkeypatch):
    counts, checkpoint, generate = {"checkpoint": 0, "generate": []}, decoder.checkpoint, Decoder.generate

    def counted(*args, **kwargs):
        counts["checkpoint"] += 1
        return checkpoint(*args, **kwargs)

    def generated(model, ids, *args, **kwargs):
        counts["generate"].append(len(ids))
        return generate(model, ids, *args, **kwargs)

    monkeypatch.setattr(decoder, "checkpoint", counted)
    monkeypatch.setattr(Decoder, "generate", generated)
    plain, saver = lines(few("plain")), lines(few("saver", "--gradient-checkpointing"))
    assert plain == saver and counts["checkpoint"] == 3  # one gradient step through three blocks
    assert counts["generate"] == 2 * [8, 8, 8]  # the evaluation of 4 problems × 2, the round, the evaluation
    counts["generate"].clear()
    few("batched", "--eval-batch", 3)
    assert counts["generate"] == [3, 3, 2, 8, 3, 3, 2]


def test_rewards_are_those_asked_for(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def both(prompts, completions):\n    return [len(p) + 100 * len(c) for p, c in zip(prompts, completions)]\n"
    )
    policy, codec, _ = train_grpo.open_policy(train_grpo.parse([]), None)
    texts = ["g####62", "c7+8=15,4+1+1=6####65", "r17+48=65", "o40+10=50", "k####"]
    problems = [train_grpo.text.Problem("17+48=", 65)] * 5

    def rewards(*options):
        _, _, reward, _ = train_grpo.open_task(train_grpo.parse(list(map(str, options))), policy, codec)
        scores = reward(texts, problems)
        return scores.pop("reward").tolist(), {name: term.tolist() for name, term in scores.items()}

    right, guess, stated = [0, 1, 1, 0, 0], pytest.approx([0.3, 1, 1, 0, 0]), [1, 1, 0, 0, 0]
    deceptive = demo.DECEPTIVE["reward"][0]
    assert rewards() == (right, {})
    assert rewards("--format-reward", 0.5) == ([0.5, 1.5, 1, 0, 0], {"exact": right, "format": stated})
    assert rewards("--reward", "exact@2", "format@-0.5") == ([-0.5, 1.5, 2, 0, 0], {"exact": right, "format": stated})
    assert rewards("--reward", deceptive) == (guess, {})
    sums = pytest.approx([2.3, 3, 1, 0, 0])
    assert rewards("--reward", deceptive, "--format-reward", 2) == (sums, {"deceptive": guess, "format": stated})
    own = [6 + 100 * len(text) for text in texts]
    assert rewards("--reward", f"{tmp_path / 'mine.py'}:both") == (own, {})


def reward_folder(path, *tokens, **files):
    """A tiny RewardModel with the demo's tokenizer, or with one that has other tokens before those."""
    from nano_adrpo.demo.arithmetic_recipe import TOKENS

    model = RewardModel(Config("gemma", 24 + len(tokens), 16, 24, 2, 2, 64))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    vocabulary = {token: index for index, token in enumerate([*tokens, *TOKENS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("####|<[^>]*>|user|model|."), "isolated")
    model.files = {"tokenizer.json": tokenizer.to_str().encode(), **files}
    model.save_pretrained(path)
    return path, vocabulary


def test_a_reward_model_reads_prompt_and_completion(tmp_path, few, monkeypatch):
    folder, vocabulary = reward_folder(tmp_path / "rm")
    seen = watch(monkeypatch)
    out = few("run", "--reward", f"reward_model:{folder}", "--micro-batch", 4)
    (rollout,), model = seen["rollouts"], RewardModel.from_pretrained(folder)
    drawn = torch.randint(4, (2,), generator=torch.Generator().manual_seed(0)).tolist()
    questions = [("17+48=", "29+34=", "57+36=", "88+13=")[row] for row in drawn for _ in range(4)]
    expected = []
    for question, text in zip(questions, rollout.texts):
        characters = (question + text).replace("####", "#")
        row = [vocabulary["####" if char == "#" else char] for char in characters]
        expected.append(model(torch.tensor([row])).item())
    assert lines(out)[1]["reward"] == pytest.approx(statistics.mean(expected), abs=1e-4)


def test_a_reward_model_may_have_another_tokenizer_and_a_chat_template(tmp_path):
    # As RM-Gemma-2B has, whose policy may be a Qwen.
    marks = ["<bos>", "<start_of_turn>", "<end_of_turn>", "user", "model", "\n"]
    template = b"{{ '<start_of_turn>' }} System role not supported"
    folder, vocabulary = reward_folder(tmp_path / "rm", *marks, **{"chat_template.jinja": template})
    reward = train_grpo.text.parse([str(folder)])(["c7+8"], [train_grpo.text.Problem("17+48=", 65)])["reward"]
    words = ["<bos>", "<start_of_turn>", "user", "\n", *"17+48=", "<end_of_turn>", "\n",
             "<start_of_turn>", "model", "\n", *"c7+8", "<end_of_turn>", "\n"]  # fmt: skip
    expected = RewardModel.from_pretrained(folder)(torch.tensor([[vocabulary[word] for word in words]]))
    assert reward.item() == pytest.approx(expected.item(), abs=1e-4)


def test_problems_by_path_through_a_chat_template(tmp_path):
    # A model of random weights, whose tokenizer has ChatML's letters and marks as well.
    from nano_adrpo.demo.arithmetic_recipe import TOKENS

    tokens = [*TOKENS, *"?useain\n"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex("####|."), "isolated"), decoders.Fuse()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    model = Decoder(Config("qwen3", tokenizer.get_vocab_size(), 16, 24, 2, 2, 128, eos_token_id=1))
    model.files = {"tokenizer.json": tokenizer.to_str().encode(), "chat_template.jinja": b"{{ '<|im_start|>' }}"}
    model.save_pretrained(tmp_path / "model")
    train_file = jsonl(tmp_path / "train.jsonl", ("12+34=", 46), ("1+2+3=", 6), ("100-1=", 99))
    held_out = jsonl(tmp_path / "test.jsonl", ("7+7=", 14))
    options = ["--model", tmp_path / "model", "--problems", train_file, "--held-out", held_out, "--instruction", "?"]
    values = train(tmp_path / "run", *options, "--rounds", 1, "--eval-samples", 8)
    assert set(values) == {"reward", "pass@1", "pass@8", "entropy", "kl_k1", "kl_k3", "length"}  # no styles: not the demo's
    args = train_grpo.parse(list(map(str, options)))
    policy, codec, _ = train_grpo.open_policy(args, None)
    problems, held, *_ = train_grpo.open_task(args, policy, codec)
    ids, seen = codec.encode([problem.question for problem in held + problems], 100)
    questions = ("7+7=", "12+34=", "1+2+3=", "100-1=")
    texts = [tokenizer.decode(row[keep.bool()].tolist(), skip_special_tokens=False) for row, keep in zip(ids, seen)]
    assert texts == [f"<|im_start|>user\n{question}?<|im_end|>\n<|im_start|>assistant\n" for question in questions]


# --------------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *argv):
    return scripts.refused(capsys, lambda: train_grpo.main([*SMALL, *map(str, argv)]))


def test_bad_options_are_refused(capsys, tmp_path):
    for options, message in (
        (["--bogus", 1], "unrecognized arguments: --bogus"),
        (["--round", 1], "unrecognized arguments: --round"),  # no abbreviations
        (["--kl", "k4"], "argument --kl: invalid choice: 'k4'"),
        (["--beta0", 0], "--beta0 0: expected a positive number with --method adrpo; the other methods take 0"),
        (["--beta0", -0.04], "argument --beta0: -0.04 is not a positive number"),
        (["--temperature", 0], "argument --temperature: 0 is not a positive number"),
        (["--eval-top-p", 1.5], "--eval-top-p 1.5: expected at most 1"),
        (["--group-size", 1], "--group-size 1: expected at least 2"),
        (["--minibatches", 3], "--minibatches 3 does not divide the 16 completions of a round"),
        (["--micro-batch", 5], "--micro-batch 5 does not divide the 16 completions of a minibatch"),
        (["--a-min", 2, "--a-max", 1], "--a-min and --a-max: the advantage's range is [2.0, 1.0]; expected A_min ≤ A_max"),
        (["--lora-targets", "q_proj"], "--lora-alpha and --lora-targets: expected only with --lora-rank"),
        (["--lora-rank", 8, "--lora-targets", "q"], "--lora-targets: Decoder has no linear layer whose name ends in"),
        (["--device", "meta"], "argument --device: device 'meta' is not available"),
        (["--held-out", "p.jsonl"], "--problems and --held-out: expected both or neither"),
        (["--problems", "no-such-file", "--held-out", "no-such-file"], "no-such-file"),
        (["--model", "no-such-folder"], "no-such-folder"),
        (["--reward", "no-such-folder"], "reward 'no-such-folder': no such reward or folder; expected one of exact, format"),
        (["--reward", "reward_model:nowhere"], "nowhere"),
        (["--reward", "format", "--format-reward", 1], "reward 'format@1.0': format is named twice"),
        (["--reward", "nowhere.py:f"], "nowhere.py: no such file; expected one with the function 'f'"),
        (["--reward", BASE], "'architectures' is ['Qwen3ForCausalLM']; expected"),
        (["--max-prompt-tokens", 5], "arithmetic_data/train.jsonl, --max-prompt-tokens 5: prompt 0 has 6 tokens"),
        (["--max-new-tokens", 59], "--max-new-tokens 59 behind a prompt of 6 exceeds the model's 64 positions"),
    ):
        assert message in refused(capsys, "--out", tmp_path / "run", *options), options
        assert not (tmp_path / "run").exists()


LARGER = json.loads((BASE / "tokenizer.json").read_text())["model"]
LARGER["vocab"]["x"] = 24


def test_a_model_folder_that_does_not_fit_is_refused(capsys, tmp_path):
    for number, (changes, message) in enumerate((
        (dict.fromkeys(("config", "generation_config"), {"eos_token_id": None}), "nor config.json has an 'eos_token_id'"),
        ({"generation_config": {"eos_token_id": [1, 24]}}, "'eos_token_id' is [1, 24]; the model's ids are below 24"),
        ({"tokenizer": {"model": LARGER}}, "tokenizer.json has the id 24; the model's are below 24"),
        ({"tokenizer": {"model": None}}, "tokenizer.json: not a tokenizer"),
        ({"tokenizer_config": {"chat_template": "{{ messages }}"}}, "chat template of the model's folder is not implemented"),
    )):  # fmt: skip
        folder = edited(tmp_path / f"model{number}", **changes)
        line = refused(capsys, "--model", folder, "--out", tmp_path / "run")
        assert message in line and str(folder) in line and not (tmp_path / "run").exists()


def test_a_damaged_model_is_refused(capsys, tmp_path):
    folder, options = edited(tmp_path / "model"), ("--model", tmp_path / "model", "--out", tmp_path / "run")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    safetensors.save(file, tensors | {"model.norm.weight": torch.zeros(5)})
    assert f"{file}: key 'model.norm.weight' has shape [5]; expected [64]" in refused(capsys, *options)
    safetensors.save(file, tensors)
    (folder / "tokenizer.json").unlink()
    assert f"--model {folder}: the model's folder has no tokenizer.json" in refused(capsys, *options)
    assert not (tmp_path / "run").exists()


REWARD = """calls = []

def third(prompts, completions):
    calls.append(1)
    return [0.0] * (len(prompts) - 1) + [0.0 if len(calls) < 4 else {}]
"""


def test_what_fails_in_a_round_names_it_and_the_last_checkpoint(capsys, tmp_path, few, monkeypatch):
    mine = tmp_path / "mine.py"
    options = ["--reward", f"{mine}:third", "--rounds", 3, "--eval-every", 1]  # calls: evaluation, round 1, its evaluation
    mine.write_text(REWARD.format("float('nan')"))
    line = scripts.refused(capsys, lambda: few("a", *options))
    assert "round 2: a reward of the prompt '" in line and "is not finite (third)" in line
    assert f"last good checkpoint: {tmp_path / 'a' / 'model'} (round 1)" in line
    mine.write_text(REWARD.format("calls[9]"))  # a bug in the user's code: the traceback stays, and a note says where
    with pytest.raises(IndexError) as bug:
        few("b", *options)
    assert bug.value.__notes__ == [f"In round 2; last good checkpoint: {tmp_path / 'b' / 'model'} (round 1)"]
    loss = train_grpo.adrpo.policy_loss

    def poisoned(*args):
        return loss(*args) * (float("nan") if (tmp_path / "c" / "model").exists() else 1)

    monkeypatch.setattr(train_grpo.adrpo, "policy_loss", poisoned)
    line = scripts.refused(capsys, lambda: few("c", "--rounds", 3, "--eval-every", 1))
    assert "round 2: loss nan" in line and f"last good checkpoint: {tmp_path / 'c' / 'model'} (round 1)" in line
    saved = Decoder.from_pretrained(tmp_path / "c" / "model").state_dict()
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_the_script_runs_as_a_script(tmp_path):
    command = [sys.executable, str(ROOT / "train_grpo.py")]
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path).stdout
    assert all(option in help_text for option in ("--beta0", "--a-min", "--inner-epochs", "(default: 0.0008)"))
    bad = subprocess.run([*command, "--beta0", "-1"], capture_output=True, text=True, cwd=tmp_path)
    assert (bad.returncode, bad.stderr) == (2, "error: argument --beta0: -1 is not a positive number or 0\n")
