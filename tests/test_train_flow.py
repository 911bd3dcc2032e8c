"""train_flow.py end to end on the shipped base model: learning, determinism, methods, bad input."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_rewards
import torch
from safetensors.torch import load_file, save_file

import train_flow
from nano_adrpo import adrpo, compare, runtime
from nano_adrpo.demo import digits
from nano_adrpo.text_to_image import TextToImage

ROOT = Path(train_flow.__file__).parent
SMALL = "--rounds 3 --prompts-per-round 4 --group-size 4 --inner-steps 2 --ode-steps 4 --eval-every 2 --eval-samples 2".split()


def train(out, *options):
    return train_flow.main([*SMALL, "--out", str(out), *map(str, options)])


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_three_rounds_write_everything(tmp_path):
    values = train(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "model",
        "before_after.png",
        "curves.png",
    }
    rows = lines(tmp_path / "run")
    assert [row["round"] for row in rows] == [0, 1, 2, 3] and [("eval" in row) for row in rows] == [True, False, True, True]
    assert rows[0]["eval"]["w2"] == 0 < rows[3]["eval"]["w2"] and rows[3]["eval"] == values
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["beta0"] == 1.0 and config["group_size"] == 4
    tuned, base = (
        TextToImage.from_pretrained(path).transformer.state_dict()
        for path in (tmp_path / "run" / "model", digits.HERE / "base")
    )
    assert tuned.keys() == base.keys() and not all(torch.equal(tuned[name], base[name]) for name in base)


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(tmp_path / name, "--seed", seed)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert lines(tmp_path / "a") != lines(tmp_path / "c")


@pytest.mark.parametrize("method", train_flow.METHODS)
def test_the_split_into_micro_batches_changes_nothing(tmp_path, method):
    whole = train(tmp_path / "whole", "--method", method)
    split = train(tmp_path / "split", "--method", method, "--micro-batch", 2)
    assert split["reward"] == pytest.approx(whole["reward"], abs=0.02) and split["w2"] == pytest.approx(whole["w2"], rel=0.02)
    losses = [[row["loss"] for row in lines(tmp_path / name)[1:]] for name in ("whole", "split")]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)


def test_the_first_gradient_is_the_losses_own(tmp_path, monkeypatch):
    # Re-draws the first inner step of the first round outside the script and differentiates Eq. 6, written out here.
    args = train_flow.parse(
        [
            *SMALL,
            "--out",
            str(tmp_path),
            "--beta0",
            "2",
            "--a-min",
            "-5",
            "--a-max",
            "3",
            "--inner-steps",
            "1",
            "--clip-grad",
            "1e9",
        ]
    )
    run, again = train_flow.Run(args), train_flow.Run(args)
    gradient = {}
    monkeypatch.setattr(
        run.optimizer,
        "step",
        lambda: gradient.update(
            {n: p.grad.clone() for n, p in run.policy.transformer.named_parameters() if p.grad is not None}
        ),
    )
    rows = torch.arange(4).repeat_interleave(4)
    x1, _, scores = run.roll_out(rows, run.noise(16, run.generator))
    rewards = scores["reward"]
    run.update(rows, x1, rewards)

    g = torch.Generator().manual_seed(args.seed)
    x1_again, _, _ = again.roll_out(rows, torch.randn(16, 1, 8, 8, generator=g))
    assert torch.equal(x1, x1_again)
    t, x0 = torch.rand(16, generator=g), torch.randn(16, 1, 8, 8, generator=g)
    advantage = (rewards.reshape(4, 4) - rewards.reshape(4, 4).mean(dim=1, keepdim=True)).flatten().clamp(-5, 3)
    x_t = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * x1
    v = again.policy.velocity(x_t, t, again.condition[rows])
    v_ref = again.reference.velocity(x_t, t, again.condition[rows])
    errors = [((v - target) ** 2).mean(dim=(1, 2, 3)) for target in (x1 - x0, v_ref.detach())]
    (advantage * errors[0] + (2 - advantage) * errors[1]).mean().backward()
    for name, parameter in again.policy.transformer.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradient[name], parameter.grad, rtol=1e-3, atol=1e-6), name
    assert all(p.grad is None for p in run.reference.transformer.parameters())


def test_coefficients_are_the_table():
    rewards, clip = torch.tensor([0.0, 2.0, 10.0, 4.0]), ["--a-min", "-2", "--a-max", "2"]

    def coefficients(method, *options):
        args = train_flow.parse([*SMALL, "--group-size", "4", "--method", method, "--beta0", "3", *options])
        return [c.tolist() for c in train_flow.coefficients(args, rewards)]

    assert coefficients("adrpo", *clip) == [[-2, -2, 2, 0], [5, 5, 1, 3]]
    assert coefficients("fixed-beta", *clip) == [[-2, -2, 2, 0], [3, 3, 3, 3]]
    assert coefficients("raft") == [[0, 0, 1, 0], [0, 0, 0, 0]]
    weight, beta = coefficients("orw-cfm-w2", "--tau", "0.5")
    assert weight == pytest.approx(adrpo.reward_weights(rewards, 0.5, 4).tolist()) and beta == [3, 3, 3, 3]


def test_other_options_run(tmp_path):
    (tmp_path / "prompts.txt").write_text("a bold handwritten two\n\n a thin handwritten nine \n")
    options = "--guidance 2 --ode-method heun --shift 3 --time-density noise --dtype bfloat16".split()
    values = train(tmp_path / "run", "--prompts", tmp_path / "prompts.txt", *options)
    assert set(values) == {"reward", "clip_diversity", "pixel_diversity", "w2"}  # no judge for prompts that are not the demo's


def test_without_matplotlib_a_run_says_what_it_left_out(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
    train(tmp_path / "run", "--rounds", 1)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl", "model"}
    printed = capsys.readouterr().out
    assert all(
        f"{tmp_path / 'run' / name}: left out, matplotlib is not installed" in printed
        for name in ("before_after.png", "curves.png")
    )


TINY = "--prompts-per-round 2 --group-size 2 --inner-steps 1 --ode-steps 2 --eval-every 3".split()


@pytest.fixture
def few(tmp_path):
    """Two prompts: the demo's 40, and its judge, take longer."""
    (tmp_path / "prompts.txt").write_text("a bold handwritten two\na thin handwritten nine\n")
    return [*TINY, "--prompts", tmp_path / "prompts.txt"]


@pytest.mark.parametrize("name", tiny_rewards.SIDES)
def test_every_reward_trains(tmp_path, few, name):
    folder = tiny_rewards.folder(name, tmp_path / name)
    values = train(tmp_path / "run", *few, "--reward", f"{name}:{folder}@0.5")
    rows = lines(tmp_path / "run")
    assert len(rows) == 4 and all(math.isfinite(value) for row in rows[1:3] for value in row.values())
    assert rows[1]["reward_std"] > 0 and values["w2"] > 0  # grey 8 × 8 images, of which the reward sees RGB of its own size
    assert ("clip_diversity" in values) == (tiny_rewards.SIDES[name] == 12)


def test_a_sum_of_rewards_is_logged_with_its_parts(tmp_path, few):
    (tmp_path / "mine.py").write_text("def bright(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    rewards = [digits.HERE / "clip", f"blip_itm:{tiny_rewards.folder('blip_itm', tmp_path / 'blip')}@-2"]
    values = train(tmp_path / "run", *few, "--reward", *rewards, f"{tmp_path / 'mine.py'}:bright@30", "--rollout-batch", 3)
    for row in (*lines(tmp_path / "run")[1:], values):
        total = row["clip_score"] - 2 * row["blip_itm"] + 30 * row["bright"]
        assert row["reward"] == pytest.approx(total, rel=1e-4) and 0 < row["blip_itm"] < 1 and -1 < row["bright"] < 1
    assert "clip_diversity" in values


THIRD = """calls = []

def third(images, prompts):
    calls.append(1)
    return [0.0] * (len(prompts) - 1) + [0.0 if len(calls) < 3 else {}]
"""


@pytest.mark.parametrize(
    "value, message",
    [
        ("float('nan')", "round 2: a reward of the prompt '(a bold handwritten two|a thin handwritten nine)' is not finite "
         r"\(third\); last good checkpoint: none yet"),
        ("calls[3]", "mine.py, line 5: IndexError: list index out of range"),
        ("'high'", r"third gave list; expected \[4\] numbers, one a sample"),
    ],
)  # fmt: skip
def test_a_reward_that_fails_stops_the_run(capsys, tmp_path, few, value, message):
    (tmp_path / "mine.py").write_text(THIRD.format(value))  # its first call is of the evaluation before round 1
    line = refused(capsys, *few, "--out", tmp_path / "run", "--reward", f"{tmp_path / 'mine.py'}:third")
    assert re.search(f"{message}$", line)


@pytest.mark.cuda
def test_the_same_rollout_on_cuda(tmp_path):
    cpu, cuda = (train(tmp_path / device, "--device", device) for device in ("cpu", "cuda"))
    assert cuda["reward"] == pytest.approx(cpu["reward"], abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_main_job_learns(tmp_path, seed):
    train_flow.main(["--out", str(tmp_path / "run"), "--seed", str(seed)])
    first, last = lines(tmp_path / "run")[0]["eval"], lines(tmp_path / "run")[-1]["eval"]
    assert last["reward"] > first["reward"] + 8 and last["joint"] > first["joint"] + 0.25


def test_ten_rounds_of_the_main_job_learn(tmp_path):
    train_flow.main(["--out", str(tmp_path / "run"), "--rounds", "10"])
    first, last = lines(tmp_path / "run")[0]["eval"], lines(tmp_path / "run")[-1]["eval"]
    assert last["reward"] > first["reward"] + 3 and last["joint"] > first["joint"] + 0.08


# ---------------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *argv):
    """The one line on stderr of a call that must end with status 2."""
    with pytest.raises(SystemExit) as stop:
        runtime.run(lambda: train_flow.main([*SMALL, *map(str, argv)]))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    "options, message",
    [
        (["--bogus", 1], "unrecognized arguments: --bogus"),
        (["--round", 1], "unrecognized arguments: --round"),  # no abbreviations
        (["--method", "ppo"], "argument --method: invalid choice: 'ppo'"),
        (["--beta0", 0], "argument --beta0: 0 is not a positive number"),
        (["--beta0", -1], "argument --beta0: -1 is not a positive number"),
        (["--beta0", "nan"], "argument --beta0: nan is not a positive number"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--group-size", 1], "--group-size 1: expected at least 2"),
        (["--eval-samples", 1], "--eval-samples 1: expected at least 2"),
        (["--micro-batch", 5], "--micro-batch 5 does not divide the 16 samples of a round"),
        (["--method", "dpo", "--micro-batch", 3], "--micro-batch 3 does not divide the 4 pairs of a round"),
        (["--a-min", 2, "--a-max", 1], "--a-min and --a-max: the advantage's range is [2.0, 1.0]; expected A_min ≤ A_max"),
        (["--device", "tpu9"], "argument --device: device 'tpu9' is not available"),
        (["--device", "meta"], "argument --device: device 'meta' is not available"),
        (["--model", "no-such-folder"], "no-such-folder: no such file or folder; expected a folder"),
        (
            ["--reward", "no-such-folder"],
            "reward 'no-such-folder': no such reward or folder; expected one of clip_score:FOLDER",
        ),
        (["--prompts", "no-such-file"], "no-such-file"),
    ],
)
def test_bad_options_are_refused(capsys, tmp_path, options, message):
    assert message in refused(capsys, "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_an_empty_prompt_file_is_refused(capsys, tmp_path):
    (tmp_path / "p.txt").write_text("\n  \n")
    assert f"{tmp_path / 'p.txt'}: no prompts in it; expected one a line" in refused(capsys, "--prompts", tmp_path / "p.txt")


def test_an_out_that_is_not_empty_or_not_writable_is_refused(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    assert f"--out {tmp_path / 'run'}: the folder is not empty" in refused(capsys, "--out", tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes"] and (tmp_path / "run" / "notes").read_text() == "mine"
    for out in (tmp_path / "run" / "notes", tmp_path / "run" / "notes" / "deeper"):
        assert f"--out {out}: cannot write there" in refused(capsys, "--out", out)
    assert (tmp_path / "run" / "notes").read_text() == "mine"


def test_a_damaged_model_is_refused(capsys, tmp_path):
    shutil.copytree(digits.HERE / "base", tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors, options = load_file(file), ("--model", tmp_path / "model", "--out", tmp_path / "run")
    save_file(tensors | {"proj_out.bias": torch.zeros(5)}, file)
    assert f"{file}: key 'proj_out.bias' has shape [5]; expected [4]" in refused(capsys, *options)
    save_file({name: tensor for name, tensor in tensors.items() if name != "proj_out.bias"}, file)
    assert "key 'proj_out.bias' is missing" in refused(capsys, *options)
    file.write_bytes(file.read_bytes()[:1000])
    assert f"{file}: not a whole safetensors file" in refused(capsys, *options)
    assert not (tmp_path / "run").exists()


def test_a_reward_or_loss_that_is_not_finite_stops_the_run(capsys, tmp_path, monkeypatch):
    update = train_flow.Run.update
    calls = []

    def poisoned(run, rows, x1, rewards):
        calls.append(1)
        if len(calls) == 3:
            x1 = x1 * float("nan")
        return update(run, rows, x1, rewards)

    monkeypatch.setattr(train_flow.Run, "update", poisoned)
    line = refused(capsys, "--out", tmp_path / "run")
    assert "round 3: loss nan" in line and f"last good checkpoint: {tmp_path / 'run' / 'model'} (round 2)" in line
    TextToImage.from_pretrained(tmp_path / "run" / "model")
    (tmp_path / "mine.py").write_text("def odd(images, prompts):\n    return [float('inf')] * len(prompts)\n")
    line = refused(capsys, "--out", tmp_path / "other", "--reward", f"{tmp_path / 'mine.py'}:odd")
    assert "round 0: a reward of the prompt" in line and "last good checkpoint: none yet" in line


def test_the_script_runs_as_a_script(tmp_path):
    command = [sys.executable, str(ROOT / "train_flow.py")]
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path).stdout
    assert all(option in help_text for option in ("--beta0", "--a-min", "--guidance", "(default: 0.0001)"))
    bad = subprocess.run([*command, "--beta0", "0"], capture_output=True, text=True, cwd=tmp_path)
    assert (bad.returncode, bad.stderr) == (2, "error: argument --beta0: 0 is not a positive number\n")


# --------------------------------------------------------------------------------------------------------------- comparison


def test_the_comparison_resumes_and_averages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        compare.COMPARISONS["flow"], "settings", {"ADRPO β0=1": {"method": "adrpo", "beta0": 1}, "RAFT": {"method": "raft"}}
    )
    monkeypatch.setattr(compare.COMPARISONS["flow"], "rates", (1e-4, 3e-4))
    monkeypatch.setattr(
        compare.COMPARISONS["flow"],
        "common",
        dict(zip(("prompts-per-round", "group-size", "eval-samples", "ode-steps"), (2, 2, 2, 2))),
    )
    monkeypatch.chdir(tmp_path.parent)  # --out counts from there
    options = ["flow", "--out", tmp_path.name, "--seeds", "2", "--rounds", "1", "--workers", "2"]
    compare.main(options)
    printed = capsys.readouterr().out
    assert "8 runs, 0 of them finished before" in printed and "Every setting at its best learning rate, by joint" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    small = "prompts-per-round=2_group-size=2_eval-samples=2_ode-steps=2"
    runs = [
        lines(tmp_path / "runs" / f"method=adrpo_beta0=1_lr=0.0003_seed={seed}_rounds=1_{small}")[-1]["eval"]["reward"]
        for seed in (0, 1)
    ]
    row = results["rows"][1]
    assert (row["setting"], row["lr"]) == ("ADRPO β0=1", 3e-4)
    assert row["final"]["reward"] == pytest.approx([sum(runs) / 2, abs(runs[0] - runs[1]) / 2])
    assert {p.name for p in tmp_path.iterdir()} == {
        "runs",
        "results.json",
        "table.md",
        "reward_pixel_diversity.png",
        "reward_w2.png",
    }
    shutil.rmtree(tmp_path / "runs" / f"method=raft_lr=0.0003_seed=1_rounds=1_{small}")
    compare.main(options)
    assert "8 runs, 7 of them finished before" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_a_failing_run_stops_the_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare.COMPARISONS["flow"], "settings", {"broken": {"method": "adrpo", "beta0": -1}})
    with pytest.raises(SystemExit) as stop:
        runtime.run(lambda: compare.main(["flow", "--out", str(tmp_path), "--seeds", "1", "--rounds", "1"]))
    assert (
        stop.value.code == 2
        and "exit status 2: error: argument --beta0: -1 is not a positive number" in capsys.readouterr().err
    )
