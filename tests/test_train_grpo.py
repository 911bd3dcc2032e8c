"""train_grpo.py end to end on the demo's model: gradients of Eqs. 7 and 3, learning, determinism, every option, bad input."""

import statistics

import grpo_runs
import pytest
import torch
from grpo_runs import BASE, train, watch
from safetensors.torch import load_file
from scripts import lines, written

import train_grpo
from nano_adrpo import demo, lora
from nano_adrpo.errors import InputError
from nano_adrpo.models.decoder import Decoder

few = grpo_runs.few

# -------------------------------------------------------------------------------------------------------------------- runs


def test_three_rounds_write_everything(tmp_path):
    values = train(tmp_path / "run")
    names = {"config.json", "metrics.jsonl", "samples.txt", "checkpoints", "model", "curves.png", "shares.png"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names
    rows = lines(tmp_path / "run")
    assert [row["round"] for row in rows] == [0, 1, 2, 3] and [("eval" in row) for row in rows] == [True, False, True, True]
    assert rows[0]["eval"]["kl_k1"] == rows[0]["eval"]["kl_k3"] == 0 < rows[3]["eval"]["kl_k3"] and rows[3]["eval"] == values
    assert 0.2 < rows[0]["eval"]["pass@1"] < 0.4 and rows[0]["eval"]["reward"] == rows[0]["eval"]["pass@1"]
    assert all(1 < row["length"] <= demo.GRPO["max_new_tokens"] and row["clip_fraction"] == 0 for row in rows[1:])
    known = {"reward", "pass@1", "entropy", "kl_k1", "kl_k3", "length"}  # not of the judge's metrics
    assert all(
        row["eval_error"].keys() == known == {name for name in row["eval"] if name != "style_entropy" and "/" not in name}
        for row in (rows[0], rows[3])
    )
    assert rows[0]["eval_error"]["pass@1"] == pytest.approx(
        (rows[0]["eval"]["pass@1"] * (1 - rows[0]["eval"]["pass@1"]) / 255) ** 0.5
    )
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
    clip = ["--a-min", -0.3, "--a-max", 0.5] if method == "adrpo" else []
    train(tmp_path / "run", "--method", method, "--average", average, "--beta0", 0.6, *clip,
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

    assert weights("one step", "--kl", "k3")[0] == 0  # the ratio is 1
    with pytest.raises(InputError, match="--clip-eps: expected only with --inner-epochs or --minibatches above 1"):
        few("idle", "--clip-eps", 1e-6)
    for i, options in enumerate((["--inner-epochs", 2], ["--minibatches", 2])):
        (often, tight), (never, loose) = (weights(f"{eps}-{i}", "--clip-eps", eps, *options) for eps in (1e-6, 1e6))
        assert 0 < often < 1 and never == 0 and not torch.equal(tight, loose)


def test_no_kl_is_the_policy_gradient_alone(few, monkeypatch):
    seen = watch(monkeypatch)
    out, same = (few(method, "--method", method, "--beta0", 0, "--no-eval-first") for method in ("grpo", "adrpo"))
    weights = "model/model.safetensors"
    assert written(out)[weights] == written(same)[weights]  # β0 = 0 clamps A to 0: the adaptive coefficient is 0, too
    monkeypatch.setattr(train_grpo.adrpo, "kl_divergence", lambda logp, ref_logp, kl: 0 * logp)
    few("by-hand", "--method", "grpo", "--beta0", 1, "--no-eval-first")
    first, _, second = seen["gradients"]
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
        tokens = rollout.mask.sum(dim=1).reshape(-1, 2)  # of two completions each
        assert lines(out)[0]["eval"]["length"] == tokens.float().mean().item()
        assert lines(out)[0]["eval_error"]["length"] == pytest.approx(tokens.float().mean(dim=1).std().item() / 2)


def test_what_is_not_drawn_from_the_policy_gives_no_kl(few):
    for i, options in enumerate((["--eval-temperature", 0], ["--eval-top-k", 2], ["--eval-top-p", 0.9])):
        values = lines(few(f"run-{i}", "--rounds", 0, *options))[0]["eval"]
        assert not {"kl_k1", "kl_k3"} & values.keys() and values["entropy"] > 0


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
