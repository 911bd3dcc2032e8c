"""train_grpo.py end to end on the shipped base model: learning, determinism, the gradient of Eq. 7, options, bad input."""

import copy
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import train_grpo
from nano_adrpo import compare, lora, rewards_text, runtime, weights
from nano_adrpo.demo import arithmetic
from nano_adrpo.models.decoder import Config, Decoder, RewardModel

ROOT = Path(train_grpo.__file__).parent
BASE = arithmetic.HERE / "arithmetic_base"
SMALL = "--rounds 3 --prompts-per-round 4 --group-size 4 --eval-every 2 --eval-samples 1".split()


def train(out, *options):
    return train_grpo.main([*SMALL, "--out", str(out), *map(str, options)])


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def start(*options):
    """A Run that has not run, and the 16 problems of its first round's size."""
    run = train_grpo.Run(train_grpo.parse([*SMALL, *map(str, options)]))
    return run, [problem for problem in run.problems[:4] for _ in range(4)]


def jsonl(file, *pairs):
    """A file of GSM8K's format with these questions and answers."""
    file.write_text("".join(json.dumps({"question": q, "answer": f"so it is\n#### {a}"}) + "\n" for q, a in pairs))
    return file


def edited(path, **files):
    """A copy of the base model's folder in which keys of these JSON files are changed; a change to None leaves the key out."""
    shutil.copytree(BASE, path)
    for name, changes in files.items():
        values = {**json.loads((path / f"{name}.json").read_text()), **changes}
        weights.write_json(path / f"{name}.json", {key: value for key, value in values.items() if value is not None})
    return path


# -------------------------------------------------------------------------------------------------------------------- runs


def test_three_rounds_write_everything(tmp_path):
    values = train(tmp_path / "run")
    written = {"config.json", "metrics.jsonl", "samples.txt", "model", "curves.png"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == written
    rows = lines(tmp_path / "run")
    assert [row["round"] for row in rows] == [0, 1, 2, 3] and [("eval" in row) for row in rows] == [True, False, True, True]
    assert rows[0]["eval"]["kl_k1"] == rows[0]["eval"]["kl_k3"] == 0 < rows[3]["eval"]["kl_k3"] and rows[3]["eval"] == values
    assert 0.2 < rows[0]["eval"]["pass@1"] < 0.4 and rows[0]["eval"]["reward"] == rows[0]["eval"]["pass@1"]
    assert all(1 < row["length"] <= arithmetic.LONGEST and row["clip_fraction"] == 0 for row in rows[1:])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["beta0"] == 0.04 and (config["a_min"], config["a_max"]) == (-0.04, 0.04) and config["micro_batch"] == 16
    samples = (tmp_path / "run" / "samples.txt").read_text()
    assert [samples.count(f"=== round {step}\n") for step in range(4)] == [1, 0, 1, 1] and samples.count("+") >= 24
    tuned, base = (Decoder.from_pretrained(path).state_dict() for path in (tmp_path / "run" / "model", BASE))
    assert tuned.keys() == base.keys() and not all(torch.equal(tuned[name], base[name]) for name in base)
    assert {p.name for p in (tmp_path / "run" / "model").iterdir()} == {p.name for p in BASE.iterdir()}


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(tmp_path / name, "--seed", seed, "--minibatches", 2)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert lines(tmp_path / "a") != lines(tmp_path / "c")


@pytest.mark.parametrize("average", ["sequences", "tokens"])
def test_the_split_into_micro_batches_changes_nothing(tmp_path, average):
    options = ["--average", average, "--inner-epochs", 2, "--minibatches", 2, "--lr", 3e-3, "--beta0", 0.5]
    for name, size in (("whole", 8), ("split", 2)):
        train(tmp_path / name, *options, "--micro-batch", size)
    (_, whole, *_), (_, split, *_) = (lines(tmp_path / name) for name in ("whole", "split"))
    # The same completions, and after four steps of the first round still the same loss, gradient and clipped tokens.
    assert all(split[name] == whole[name] for name in ("reward", "length"))
    assert split == pytest.approx(whole, rel=1e-3, abs=1e-5) and whole["clip_fraction"] > 0
    tuned = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "split")]
    base = load_file(BASE / "model.safetensors")
    apart, moved = (sum((a[name] - b[name]).square().sum() for name in base).sqrt() for a, b in (tuned, (tuned[0], base)))
    assert apart < 0.02 * moved


@pytest.mark.parametrize("average", ["sequences", "tokens"])
@pytest.mark.parametrize("method", ["adrpo", "grpo"])
def test_the_first_gradient_is_that_of_the_paper(method, average):
    # Eq. 7, or Eq. 3, token by token, at ratio 1: there the gradient of the clipped term is that of −A·log π. The reference is
    # moved away from the policy, so that the KL has a gradient too, and the temperature is not 1.
    run, problems = start("--method", method, "--average", average, "--beta0", 0.6, "--a-min", -0.3, "--a-max", 0.5,
                          "--temperature", 1.4, "--clip-grad", 1e9, "--micro-batch", 4, "--minibatches", 1)  # fmt: skip
    with torch.no_grad():
        for parameter in run.reference.parameters():
            parameter *= 1.1
    rollout = run.roll_out(problems, run.generator, temperature=1.4)
    policy, gradient = copy.deepcopy(run.policy), {}
    run.optimizer.register_step_pre_hook(
        lambda *_: gradient.update({name: parameter.grad.clone() for name, parameter in run.policy.named_parameters()})
    )
    logged = run.update(rollout)

    rewards = [float(text.endswith(f"####{p.answer}")) for text, p in zip(rollout.texts, problems)]
    assert rollout.rewards.tolist() == rewards and 0 < sum(rewards) < 16
    logits, ref_logits = (model(rollout.ids, rollout.seen).div(1.4).log_softmax(-1) for model in (policy, run.reference))
    losses, betas, entropies, kls, spread = [], [], [], [], []  # spread: does the completion's group have any?
    for i in range(16):
        group = rewards[i // 4 * 4 : i // 4 * 4 + 4]
        A = (rewards[i] - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        betas.append(0.6 - min(max(A, -0.3), 0.5) if method == "adrpo" else 0.6)
        spread.append(len(set(group)) > 1)
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
    assert all(parameter.grad is None for parameter in run.reference.parameters())
    expected = {
        "clip_fraction": 0, "beta_min": min(betas), "beta_mean": statistics.mean(betas), "beta_max": max(betas),
        "beta_at_bounds": statistics.mean(spread) if method == "adrpo" else 0, "zero_spread": 1 - statistics.mean(spread),
        "entropy": statistics.mean(entropies), "kl_k1": statistics.mean(kls),
        "kl_k3": statistics.mean([torch.tensor(-kl).exp().item() - 1 + kl for kl in kls]),
        "grad_norm": sum(p.grad.square().sum() for p in policy.parameters()).sqrt().item(),
    }  # fmt: skip
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_ratio_is_clipped_only_after_a_step():
    def updated(clip_eps, *options):
        run, problems = start("--clip-eps", clip_eps, "--lr", 3e-3, *options)
        logged = run.update(run.roll_out(problems, run.generator))
        return logged["clip_fraction"], torch.cat([parameter.detach().flatten() for parameter in run.policy.parameters()])

    (never, tight), (_, loose) = updated(1e-6), updated(1e6)
    assert never == 0 and torch.equal(tight, loose)  # one step a round: the ratio is 1
    for options in (["--inner-epochs", 2], ["--minibatches", 2]):
        (often, tight), (never, loose) = updated(1e-6, *options), updated(1e6, *options)
        assert 0 < often < 1 and never == 0 and not torch.equal(tight, loose)


def test_twenty_five_rounds_of_the_main_job_learn(tmp_path):
    values = train_grpo.main(["--out", str(tmp_path / "run"), "--rounds", "25", "--eval-every", "25", "--eval-samples", "2"])
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


# ----------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "grpo", "--kl", "k2", "--average", "tokens"],
        ["--reward", "deceptive", "--model", arithmetic.HERE / "arithmetic_deceptive", "--format-reward", 0.5],
        ["--dtype", "bfloat16", "--lr-end", 0.1, "--kl", "k1"],
        ["--eval-temperature", 0, "--eval-top-k", 5, "--eval-top-p", 0.9, "--temperature", 0.7],
    ],
)
def test_options_run(tmp_path, options):
    values = train(tmp_path / "run", "--rounds", 1, "--inner-epochs", 2, *options)
    assert all(abs(value) < 100 for value in values.values())


def test_rewards_are_those_asked_for():
    texts = ["g####62", "c7+8=15,4+1+1=6####65", "r17+48=65", "o40+10=50", "k####"]

    def rewards(*options):
        run, _ = start(*options)
        scores = run.reward(texts, [rewards_text.Problem("17+48=", 65)] * 5)
        return scores.pop("reward").tolist(), {name: part.tolist() for name, part in scores.items()}

    right, guess, stated = [0, 1, 1, 0, 0], pytest.approx([0.3, 1, 1, 0, 0]), [1, 1, 0, 0, 0]
    assert rewards() == (right, {})
    assert rewards("--format-reward", 0.5) == ([0.5, 1.5, 1, 0, 0], {"exact": right, "format": stated})
    assert rewards("--reward", "exact@2", "format@-0.5") == ([-0.5, 1.5, 2, 0, 0], {"exact": right, "format": stated})
    assert rewards("--reward", "deceptive") == (guess, {})
    sums = pytest.approx([2.3, 3, 1, 0, 0])
    assert rewards("--reward", "deceptive", "--format-reward", 2) == (sums, {"deceptive": guess, "format": stated})


def test_a_reward_of_the_users_own_sees_prompts_and_completions(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def both(prompts, completions):\n    return [len(p) + 100 * len(c) for p, c in zip(prompts, completions)]\n"
    )
    run, problems = start("--reward", f"{file}:both", "--instruction", "=")
    expected = [len(p.question) + 100 * len(text) for p, text in zip(problems, "abcd" * 4)]
    assert run.reward(list("abcd" * 4), problems)["reward"].tolist() == expected
    assert problems[0].question.endswith("==")  # the prompt is what the policy is asked


def test_the_rewards_example_in_the_docstring_runs(tmp_path):
    lines = rewards_text.__doc__.splitlines()
    start_at = next(i for i, line in enumerate(lines) if line.startswith("    def short"))
    (tmp_path / "mine.py").write_text("".join(f"{line[4:]}\n" for line in lines[start_at : start_at + 3]))
    score = rewards_text.parse(["exact", f"{tmp_path / 'mine.py'}:short@0.1"])
    scores = score(["65", "6" * 100], [rewards_text.Problem("1+1=", 65)] * 2)
    assert {name: values.tolist() for name, values in scores.items()} == {
        "reward": pytest.approx([1 - 0.002, -0.1]), "exact": [1, 0], "short": pytest.approx([-0.02, -1]),
    }  # fmt: skip


def test_a_sum_of_rewards_is_logged_with_its_parts(tmp_path):
    (tmp_path / "mine.py").write_text("def short(prompts, completions):\n    return [-len(text) for text in completions]\n")
    folder = reward_folder(tmp_path / "rm")
    options = ["--reward", "exact@2", f"{tmp_path / 'mine.py'}:short@0.1", f"reward_model:{folder}@-1", "--rounds", 1]
    values = train(tmp_path / "run", *options)
    for row in (lines(tmp_path / "run")[1], values):
        parts = 2 * row["reward_exact"] + 0.1 * row["reward_short"] - row["reward_reward_model"]
        assert row["reward"] == pytest.approx(parts, abs=1e-5)
        assert row["reward_exact"] == row.get("accuracy", row.get("pass@1")) and row["reward_short"] < -1


def test_gradient_checkpointing_changes_nothing(tmp_path):
    for name, options in (("plain", []), ("checkpointed", ["--gradient-checkpointing"])):
        train(tmp_path / name, "--rounds", 2, *options)
    assert lines(tmp_path / "plain") == lines(tmp_path / "checkpointed")


def test_a_run_with_adapters(tmp_path):
    options = ["--lora-rank", 4, "--lora-alpha", 8, "--lora-targets", "q_proj", "v_proj", "mlp.down_proj", "--lr", 3e-3]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, *options, "--seed", seed)
    written = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert {path.parts[0] for path in written} == {"config.json", "metrics.jsonl", "samples.txt", "adapter", "curves.png"}
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in written)
    rows = lines(tmp_path / "a")
    assert rows[0]["eval"]["kl_k1"] == rows[0]["eval"]["kl_k3"] == rows[1]["kl_k1"] == rows[1]["kl_k3"] == 0
    assert rows[3]["kl_k3"] > 0 and rows[3]["eval"]["kl_k3"] > 0 and rows != lines(tmp_path / "c")
    policy = Decoder.from_pretrained(BASE)
    lora.load(policy, tmp_path / "a" / "adapter")
    config = json.loads((tmp_path / "a" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["q_proj", "v_proj", "mlp.down_proj"])
    # The file holds the policy of the last evaluation.
    run, problems = start(*options)
    rollout = run.roll_out(problems, run.generator)
    run.policy = policy
    logp, ref_logp, _ = run.score_all(rollout)
    assert not torch.equal(logp, ref_logp)
    base = Decoder.from_pretrained(BASE)
    with torch.no_grad():
        assert torch.equal(ref_logp, run.score(base, rollout, torch.arange(16)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_train_in_float32_on_a_base_that_stays(dtype):
    run, problems = start("--lora-rank", 8, "--dtype", dtype, "--gradient-checkpointing", "--micro-batch", 8)
    base = Decoder.from_pretrained(BASE, getattr(torch, dtype)).state_dict()
    before = {name: tensor.clone() for name, tensor in run.policy.state_dict().items()}
    assert not hasattr(run, "reference")  # no second copy
    logged = run.update(run.roll_out(problems, run.generator))
    assert logged["kl_k1"] == logged["kl_k3"] == 0 < logged["grad_norm"]
    after = run.policy.state_dict()
    assert base.keys() == {name for name in after if ".lora_" not in name}
    assert all(torch.equal(after[name], base[name]) and after[name].dtype == base[name].dtype for name in base)
    # At the first step B is 0, so A's gradient is too.
    assert {name for name in after if not torch.equal(after[name], before[name])} == {n for n in after if ".lora_B" in n}
    trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    assert {p.dtype for p in trained} == {torch.float32} and len(trained) == sum(".lora_" in name for name in after)
    assert {name.split(".")[-3] for name in after if ".lora_" in name} == set(lora.DECODER_TARGETS)


def reward_folder(path, *tokens, **files):
    """A tiny RewardModel with the demo's tokenizer, or with one that has other tokens before those."""
    model = RewardModel(Config("gemma", 24 + len(tokens), 16, 24, 2, 2, 64))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    vocabulary = {token: index for index, token in enumerate([*tokens, *arithmetic.TOKENS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("####|<[^>]*>|user|model|."), "isolated")
    model.files = {"tokenizer.json": tokenizer.to_str().encode(), **files}
    model.save_pretrained(path)
    return path


def test_a_reward_model_reads_prompt_and_completion(tmp_path):
    folder = reward_folder(tmp_path / "rm")
    train(tmp_path / "run", "--reward", folder, "--rounds", 1)
    run, problems = start("--reward", folder, "--micro-batch", 4)
    rollout, model = run.roll_out(problems, run.generator), RewardModel.from_pretrained(folder)
    assert len(set(map(len, rollout.texts))) > 1  # some rows are padded
    for problem, text, reward in zip(problems, rollout.texts, rollout.rewards.tolist()):
        characters = (problem.question + text).replace("####", "#")
        row = [arithmetic.TOKENS.index("####" if char == "#" else char) for char in characters]
        assert reward == pytest.approx(model(torch.tensor([row])).item(), abs=1e-4)


def test_a_reward_model_may_have_another_tokenizer_and_a_chat_template(tmp_path):
    # As RM-Gemma-2B has, whose policy may be a Qwen.
    marks = ["<bos>", "<start_of_turn>", "<end_of_turn>", "user", "model", "\n"]
    template = b"{{ '<start_of_turn>' }} System role not supported"
    folder = reward_folder(tmp_path / "rm", *marks, **{"chat_template.jinja": template})
    run, problems = start("--reward", folder)
    model, tokens = RewardModel.from_pretrained(folder), [*marks, *arithmetic.TOKENS]
    rewards = run.reward(["c7+8"], problems[:1])["reward"]
    words = ["<bos>", "<start_of_turn>", "user", "\n", *problems[0].question, "<end_of_turn>", "\n",
             "<start_of_turn>", "model", "\n", *"c7+8", "<end_of_turn>", "\n"]  # fmt: skip
    assert rewards.item() == pytest.approx(model(torch.tensor([[tokens.index(word) for word in words]])).item(), abs=1e-4)


def test_problems_by_path_through_a_chat_template(tmp_path):
    # A model of random weights, whose tokenizer has ChatML's letters and marks as well.
    tokens = [*arithmetic.TOKENS, *"?useain\n"]
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
    run, _ = start(*options)
    ids, seen = run.encode(run.held_out + run.problems)
    questions = ("7+7=", "12+34=", "1+2+3=", "100-1=")
    texts = [tokenizer.decode(row[keep.bool()].tolist(), skip_special_tokens=False) for row, keep in zip(ids, seen)]
    assert texts == [f"<|im_start|>user\n{question}?<|im_end|>\n<|im_start|>assistant\n" for question in questions]


def test_all_equal_rewards_are_warned_of_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rewards_text, "exact_answer", lambda text, answer: 1.0)
    train(tmp_path / "run", "--rounds", 12, "--prompts-per-round", 1, "--eval-every", 12)
    assert capsys.readouterr().out.count("warning: in 10 rounds no group's rewards differed") == 1
    rows = lines(tmp_path / "run")[1:]
    assert len(rows) == 12 and all(row["zero_spread"] == 1 for row in rows)
    assert all(row["beta_min"] == row["beta_max"] == pytest.approx(0.04) for row in rows)
    train(tmp_path / "short", "--rounds", 2)
    assert capsys.readouterr().out.count("warning: in 2 rounds") == 1
    monkeypatch.undo()
    train(tmp_path / "mixed", "--rounds", 2)
    assert "warning" not in capsys.readouterr().out


def test_comparisons_pass_options_that_the_script_has():
    for name in ("grpo", "deceptive"):
        for options in compare.COMPARISONS[name].settings.values():
            options = {**options, **compare.COMPARISONS[name].common}
            args = train_grpo.parse([word for key, value in options.items() for word in (f"--{key}", str(value))])
            assert all(getattr(args, key.replace("-", "_")) in (value, [value]) for key, value in options.items())


# --------------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *argv):
    """The one line on stderr of a call that must end with status 2."""
    with pytest.raises(SystemExit) as stop:
        runtime.run(lambda: train_grpo.main([*SMALL, *map(str, argv)]))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    "options, message",
    [
        (["--bogus", 1], "unrecognized arguments: --bogus"),
        (["--round", 1], "unrecognized arguments: --round"),  # no abbreviations
        (["--method", "ppo"], "argument --method: invalid choice: 'ppo'"),
        (["--kl", "k4"], "argument --kl: invalid choice: 'k4'"),
        (["--beta0", 0], "argument --beta0: 0 is not a positive number"),
        (["--beta0", -0.04], "argument --beta0: -0.04 is not a positive number"),
        (["--beta0", "inf"], "argument --beta0: inf is not a positive number"),
        (["--temperature", 0], "argument --temperature: 0 is not a positive number"),
        (["--lr-end", -1], "argument --lr-end: -1 is not a positive number or 0"),
        (["--eval-temperature", -1], "argument --eval-temperature: -1 is not a positive number or 0"),
        (["--eval-top-k", -1], "argument --eval-top-k: -1 is not a positive number or 0"),
        (["--eval-top-p", 1.5], "--eval-top-p 1.5: expected at most 1"),
        (["--format-reward", "nan"], "argument --format-reward: nan is not a positive number or 0"),
        (["--group-size", 1], "--group-size 1: expected at least 2"),
        (["--minibatches", 3], "--minibatches 3 does not divide the 16 completions of a round"),
        (["--micro-batch", 5], "--micro-batch 5 does not divide the 16 completions of a minibatch"),
        (["--minibatches", 2, "--micro-batch", 16], "--micro-batch 16 does not divide the 8 completions of a"),
        (["--a-min", 2, "--a-max", 1], "--a-min and --a-max: the advantage's range is [2.0, 1.0]; expected A_min ≤ A_max"),
        (["--lora-rank", -1], "argument --lora-rank: -1 is not a positive number or 0"),
        (["--lora-alpha", 8], "--lora-alpha and --lora-targets: expected only with --lora-rank"),
        (["--lora-targets", "q_proj"], "--lora-alpha and --lora-targets: expected only with --lora-rank"),
        (["--lora-rank", 8, "--lora-alpha", 0], "argument --lora-alpha: 0 is not a positive number"),
        (["--lora-rank", 8, "--lora-targets", "q"], "--lora-targets: Decoder has no linear layer whose name ends in 'q'"),
        (["--device", "tpu9"], "argument --device: device 'tpu9' is not available"),
        (["--device", "meta"], "argument --device: device 'meta' is not available"),
        (["--problems", "p.jsonl"], "--problems and --held-out: expected both or neither"),
        (["--held-out", "p.jsonl"], "--problems and --held-out: expected both or neither"),
        (["--problems", "no-such-file", "--held-out", "no-such-file"], "no-such-file"),
        (["--model", "no-such-folder"], "no-such-folder/config.json: no such file"),
        (
            ["--reward", "no-such-folder"],
            "reward 'no-such-folder': no such reward or folder; expected one of exact, format, dec",
        ),
        (["--reward", "reward_model:nowhere"], "nowhere/config.json: no such file"),
        (["--reward", "exact", "exact@2"], "reward 'exact@2': exact is named twice"),
        (["--reward", "format", "--format-reward", 1], "reward 'format@1.0': format is named twice"),
        (["--reward", "exact@nan"], "reward 'exact@nan': the weight is nan; expected a finite number"),
        (["--reward", "nowhere.py:f"], "nowhere.py: no such file; expected one with the reward function 'f'"),
        (["--reward", BASE], "'architectures' is ['Qwen3ForCausalLM']; expected ['Qwen3ForSequenceClassification']"),
        (["--max-prompt-tokens", 5], "arithmetic_data/train.jsonl, --max-prompt-tokens 5: prompt 0 has 6 tokens"),
        (["--max-new-tokens", 59], "--max-new-tokens 59 behind a prompt of 6 exceeds the model's 64 positions"),
    ],
)
def test_bad_options_are_refused(capsys, tmp_path, options, message):
    assert message in refused(capsys, "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("\n  \n", ": no problems"),
        ('{"question": "1+1=", "answer": "#### 2"}\n{"question": "1+\n', ", line 2: not valid JSON"),
        ('\n["1+1=", "#### 2"]\n', ", line 2: expected an object with a text under 'question'"),
        ('{"question": "\\ud83d", "answer": "#### 2"}\n', ", line 1: not valid JSON ('utf-8' codec can't encode"),
        ("[" * 100_000, ", line 1: not valid JSON ("),
        ('{"question": "1+1="}\n', ", line 1: expected an object with a text under 'answer'"),
        ('{"question": "1+1=", "answer": "2"}\n', ", line 1: 'answer' has no number after '####'"),
        (
            '{"question": "%s=", "answer": "#### 2"}\n' % ("1" * 81),
            ", --max-prompt-tokens 50: prompt 0 has 82 tokens; expected",
        ),
        ('{"question": "%s=", "answer": "#### 2"}\n' % ("1" * 42), ": --max-new-tokens 22 behind a prompt of 43 exceeds the"),
    ],
)
@pytest.mark.parametrize("option", ["--problems", "--held-out"])
def test_bad_problems_are_refused(capsys, tmp_path, option, content, message):
    bad, good = tmp_path / "bad.jsonl", jsonl(tmp_path / "good.jsonl", ("1+1=", 2))
    bad.write_text(content)
    options = {"--problems": good, "--held-out": good, option: bad, "--max-prompt-tokens": 50, "--out": tmp_path / "run"}
    assert f"{bad}{message}" in refused(capsys, *[word for pair in options.items() for word in pair])
    assert not (tmp_path / "run").exists()


LARGER = json.loads((BASE / "tokenizer.json").read_text())["model"]
LARGER["vocab"]["x"] = 24


@pytest.mark.parametrize(
    "files, message",
    [
        (dict.fromkeys(("config", "generation_config"), {"eos_token_id": None}), "nor config.json has an 'eos_token_id'"),
        ({"generation_config": {"eos_token_id": [1, 24]}}, "'eos_token_id' is [1, 24]; the model's ids are below 24"),
        ({"tokenizer": {"model": LARGER}}, "tokenizer.json has the id 24; the model's are below 24"),
        ({"tokenizer": {"model": None}}, "tokenizer.json: not a tokenizer"),
        ({"tokenizer_config": {"chat_template": "{{ messages }}"}}, "chat template of the model's folder is not implemented"),
        ({"config": {"model_type": "mistral"}}, "'model_type' is 'mistral'; expected one of qwen2, qwen3, llama"),
        ({"config": {"use_sliding_window": True, "max_window_layers": 0}}, "attention within a sliding window is not"),
        ({"config": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}, "'rope_scaling' has rope_type 'yarn'"),
    ],
)
def test_a_model_folder_that_does_not_fit_is_refused(capsys, tmp_path, files, message):
    folder = edited(tmp_path / "model", **files)
    line = refused(capsys, "--model", folder, "--out", tmp_path / "run")
    assert message in line and str(folder) in line and not (tmp_path / "run").exists()


def test_a_damaged_model_is_refused(capsys, tmp_path):
    folder, options = edited(tmp_path / "model"), ("--model", tmp_path / "model", "--out", tmp_path / "run")
    file = folder / "model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    weights.save(file, tensors | {"model.norm.weight": torch.zeros(5)})
    assert f"{file}: key 'model.norm.weight' has shape [5]; expected [64]" in refused(capsys, *options)
    file.write_bytes(whole[:1000])
    assert f"{file}: not a whole safetensors file" in refused(capsys, *options)
    file.unlink()
    assert f"{folder}: no model.safetensors" in refused(capsys, *options)
    file.write_bytes(whole)
    (folder / "tokenizer.json").unlink()
    assert f"--model {folder}: the model's folder has no tokenizer.json" in refused(capsys, *options)
    assert not (tmp_path / "run").exists()


def test_a_reward_model_without_its_tokenizer_is_refused(capsys, tmp_path):
    folder = reward_folder(tmp_path / "rm")
    (folder / "tokenizer.json").unlink()
    line = refused(capsys, "--reward", folder, "--out", tmp_path / "run")
    assert f"--reward {folder}: the model's folder has no tokenizer.json" in line
    assert not (tmp_path / "run").exists()


def test_an_out_that_is_not_empty_or_not_writable_is_refused(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    assert f"--out {tmp_path / 'run'}: the folder is not empty" in refused(capsys, "--out", tmp_path / "run")
    assert f"--out {tmp_path / 'run' / 'notes'}: cannot write there" in refused(capsys, "--out", tmp_path / "run" / "notes")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes"] and (tmp_path / "run" / "notes").read_text() == "mine"


def test_a_reward_or_loss_that_is_not_finite_stops_the_run(capsys, tmp_path, monkeypatch):
    update, calls = train_grpo.Run.update, []

    def poisoned(run, rollout):
        calls.append(1)
        return update(run, rollout._replace(rewards=rollout.rewards * float("nan")) if len(calls) == 3 else rollout)

    monkeypatch.setattr(train_grpo.Run, "update", poisoned)
    line = refused(capsys, "--out", tmp_path / "run")
    assert "round 3: loss nan" in line and f"last good checkpoint: {tmp_path / 'run' / 'model'} (round 2)" in line
    assert all(tensor.isfinite().all() for tensor in Decoder.from_pretrained(tmp_path / "run" / "model").state_dict().values())
    monkeypatch.undo()
    (tmp_path / "mine.py").write_text(  # called in the first evaluation and round, then in the second round
        "calls = []\n\ndef poisoned(prompts, completions):\n    calls.append(1)\n"
        "    return [0.0] * 4 + [float('inf' if len(calls) == 3 else 0)] * (len(prompts) - 4)\n"
    )
    line = refused(capsys, "--out", tmp_path / "other", "--reward", f"{tmp_path / 'mine.py'}:poisoned")
    assert "round 2: a reward of the prompt '" in line and "is not finite (poisoned); last good checkpoint: none yet" in line


def test_a_failing_reward_function_is_one_line(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def f(prompts, completions):\n    return {}[prompts[0][:0]]\n")
    line = refused(capsys, "--out", tmp_path / "run", "--reward", f"{tmp_path / 'mine.py'}:f")
    assert line == f"error: {tmp_path / 'mine.py'}, line 2: KeyError: ''\n"


def test_the_script_runs_as_a_script(tmp_path):
    command = [sys.executable, str(ROOT / "train_grpo.py")]
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path).stdout
    assert all(option in help_text for option in ("--beta0", "--a-min", "--inner-epochs", "(default: 0.0008)"))
    bad = subprocess.run([*command, "--beta0", "0"], capture_output=True, text=True, cwd=tmp_path)
    assert (bad.returncode, bad.stderr) == (2, "error: argument --beta0: 0 is not a positive number\n")
