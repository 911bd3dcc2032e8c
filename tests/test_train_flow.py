"""train_flow.py end to end on the demo's model: the gradient of Eq. 6, learning, determinism, every option, bad input."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import scripts
import tiny_rewards
import torch
from safetensors.torch import load_file, save_file
from scripts import lines, written

import train_flow
from nano_adrpo import demo
from nano_adrpo.errors import InputError
from nano_adrpo.models import mmdit
from nano_adrpo.rewards.images import ClipScore
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.training import options as shared

ROOT = Path(train_flow.__file__).parent
SMALL = "--rounds 3 --prompts-per-round 4 --group-size 4 --inner-steps 2 --ode-steps 4 --eval-every 2 --eval-samples 2".split()
TINY = "--rounds 1 --prompts-per-round 2 --group-size 2 --inner-steps 2 --ode-steps 2 --eval-samples 2".split()


def train(out, *options):
    return train_flow.main([*SMALL, "--out", str(out), *map(str, options)])


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A run on two prompts, without pictures, which takes a moment; -> a function of its folder's name and more options."""
    monkeypatch.setattr(train_flow.plots, "pyplot", lambda file: None)
    (tmp_path / "two.txt").write_text("a bold handwritten two\na thin handwritten nine\n")

    def run(name, *options):
        train_flow.main([*TINY, "--prompts", str(tmp_path / "two.txt"), "--out", str(tmp_path / name), *map(str, options)])
        return tmp_path / name

    return run


# -------------------------------------------------------------------------------------------------------------------- runs


def test_three_rounds_write_everything(tmp_path):
    values = train(tmp_path / "run")
    names = {"config.json", "metrics.jsonl", "model", "before_after.png", "curves.png"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names
    rows = lines(tmp_path / "run")
    assert [row["round"] for row in rows] == [0, 1, 2, 3] and [("eval" in row) for row in rows] == [True, False, True, True]
    assert rows[0]["eval"]["w2"] == 0 < rows[3]["eval"]["w2"] and rows[3]["eval"] == values
    tuned, base = (
        TextToImage.from_pretrained(path).transformer.state_dict() for path in (tmp_path / "run" / "model", demo.FLOW["model"])
    )
    assert tuned.keys() == base.keys() and not all(torch.equal(tuned[name], base[name]) for name in base)


def test_the_same_seed_writes_the_same_bytes_and_a_config_repeats_a_run(tmp_path, few):
    few("a", "--seed", 5, "--ema", 0.5)
    train_flow.main(["--config", str(tmp_path / "a" / "config.json"), "--out", str(tmp_path / "b")])
    assert written(tmp_path / "a") == written(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


def test_the_first_gradient_is_that_of_the_paper(tmp_path, monkeypatch):
    # Draws the first step of the first round again outside the script and differentiates Eq. 6, written out here.
    gradient, step = {}, train_flow.optimizer_step

    def watched(optimizer, loss, args, ema):
        gradient["all"] = torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])
        gradient["loss"] = loss
        return step(optimizer, loss, args, ema)

    monkeypatch.setattr(train_flow, "optimizer_step", watched)
    options = "--rounds 1 --inner-steps 1 --beta0 2 --a-min -5 --a-max 3 --no-eval-first --micro-batch 4".split()
    train(tmp_path / "run", *options)

    model, g = TextToImage.from_pretrained(demo.FLOW["model"]), torch.Generator().manual_seed(0)
    texts = Path(demo.FLOW["prompts"]).read_text().splitlines()
    drawn = torch.randint(len(texts), (4,), generator=g).tolist()
    prompts = [texts[row] for row in drawn for _ in range(4)]
    condition = model.encode(prompts)
    x1 = torch.randn(16, 1, 8, 8, generator=g)
    for k in range(4):  # Euler's method, as the script's four steps
        x1 = x1 + 0.25 * model.velocity(x1, k / 4, condition).detach()
    rewards = ClipScore(demo.FLOW["reward"][0])(x1, prompts)
    A = (rewards.reshape(4, 4) - rewards.reshape(4, 4).mean(dim=1, keepdim=True)).flatten().clamp(-5, 3)
    t, x0 = torch.rand(16, generator=g), torch.randn(16, 1, 8, 8, generator=g)
    x_t = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * x1
    v = model.velocity(x_t, t, condition)
    to_sample, to_reference = (((v - target) ** 2).mean(dim=(1, 2, 3)) for target in (x1 - x0, v.detach()))
    loss = (A * to_sample + (2 - A) * to_reference).mean()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.transformer.parameters()])
    assert gradient["loss"] == pytest.approx(loss.item(), rel=1e-3)
    torch.testing.assert_close(gradient["all"], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("method", train_flow.METHODS)
def test_the_split_into_micro_batches_changes_no_gradient(few, monkeypatch, method):
    gradients, step = {}, train_flow.optimizer_step

    def watched(optimizer, loss, args, ema):
        grads = torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])
        gradients.setdefault(args.micro_batch, grads.clone())
        return step(optimizer, loss, args, ema)

    monkeypatch.setattr(train_flow, "optimizer_step", watched)
    for size in (None, 1):
        options = ["--micro-batch", size] if size else []
        few(str(size), "--group-size", 4, "--inner-steps", 1, "--no-eval-first", "--method", method, *options)
    whole, split = gradients[None], gradients[1]
    assert whole.abs().max() > 0 and (whole - split).norm() < 1e-4 * whole.norm()


def test_coefficients_are_the_table():
    rewards = torch.tensor([0.0, 2.0, 10.0, 4.0])
    A = torch.tensor([-4.0, -2.0, 6.0, 0.0])
    args = train_flow.parse([*SMALL, "--beta0", "3", "--a-min", "-2", "--a-max", "2", "--tau", "0.5"])
    numbers = {
        name: [torch.as_tensor(c).expand(4).tolist() for c in coefficients(rewards, A, args)]
        for name, coefficients in train_flow.METHODS.items()
    }
    assert numbers["adrpo"] == [[-2, -2, 2, 0], [5, 5, 1, 3]]
    assert numbers["fixed-beta"] == [[-2, -2, 2, 0], [3, 3, 3, 3]]
    assert numbers["raft"] == [[0, 0, 1, 0], [0, 0, 0, 0]]
    e = [torch.tensor(x / 2).exp().item() for x in (0, 2, 10, 4)]
    assert numbers["orw-cfm-w2"] == [pytest.approx([4 * x / sum(e) for x in e]), [3, 3, 3, 3]]


def test_dpo_compares_the_best_with_the_worst_of_each_group(few, monkeypatch):
    seen, loss = [], train_flow.adrpo.flow_dpo_loss
    monkeypatch.setattr(train_flow.adrpo, "flow_dpo_loss", lambda *args: seen.append(args) or loss(*args))
    kept, best_and_worst = [], train_flow.best_and_worst
    monkeypatch.setattr(train_flow, "best_and_worst", lambda *args: kept.append((args, best_and_worst(*args))) or kept[-1][1])
    few("run", "--method", "dpo", "--prompts-per-round", 4, "--group-size", 4, "--inner-steps", 1, "--no-eval-first")
    ((_, R, x1, rows), (pairs, prompts)), ((v, u, _, winner, loser, beta, count),) = kept[0], seen
    for group in range(4):
        rewards = R[4 * group : 4 * group + 4].tolist()
        for place, chosen in ((0, max(rewards)), (1, min(rewards))):
            assert torch.equal(pairs[2 * group + place], x1[4 * group + rewards.index(chosen)])
            assert prompts[2 * group + place] == rows[4 * group]
    assert (beta, count, len(v)) == (50, 4, 8)
    torch.testing.assert_close(pairs[winner] - u[winner], pairs[loser] - u[loser])  # x0 = x1 − u, shared by a pair


def test_rounds_zero_evaluates_only(few):
    out = few("run", "--rounds", 0)
    assert [row["round"] for row in lines(out)] == [0] and not (out / "model").exists()
    assert lines(out)[0]["eval"] == lines(few("trained"))[0]["eval"]


def test_a_default_folder_is_new_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_flow.plots, "pyplot", lambda file: None)
    (tmp_path / "two.txt").write_text("a bold handwritten two\na thin handwritten nine\n")
    for _ in range(3):
        train_flow.main([*TINY, "--prompts", "two.txt"])
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["flow", "flow-2", "flow-3"]
    assert written(tmp_path / "runs" / "flow") == written(tmp_path / "runs" / "flow-3")


def test_what_is_evaluated_and_saved_is_the_moving_average(tmp_path, few):
    # Adapters of the average, opened in a new model, give the run's last evaluation again.
    out = few("run", "--lora-rank", 2, "--lr", 0.05, "--ema", 0.5, "--rounds", 2)
    again = few("again", "--rounds", 0, "--model", merged(out / "adapter", tmp_path / "merged"))
    assert lines(again)[0]["eval"]["reward"] == pytest.approx(lines(out)[2]["eval"]["reward"], abs=1e-3)
    assert lines(few("raw", "--lora-rank", 2, "--lr", 0.05, "--rounds", 2))[2]["eval"]["reward"] != pytest.approx(
        lines(out)[2]["eval"]["reward"], abs=1e-2
    )


def merged(adapter, folder):
    from nano_adrpo import lora

    model = TextToImage.from_pretrained(demo.FLOW["model"])
    lora.merge(lora.load(model.transformer, adapter))
    model.save_pretrained(folder)
    return folder


def test_equal_rewards_are_warned_of(tmp_path, few, capsys):
    (tmp_path / "flat.py").write_text("def flat(images, prompts):\n    return [1.0] * len(prompts)\n")
    out = few("run", "--reward", f"{tmp_path / 'flat.py'}:flat", "--rounds", 2)
    printed = capsys.readouterr().out
    assert printed.count("warning: in 2 rounds no group's rewards differed") == 1
    assert all(row["zero_spread"] == 1 and row["beta_min"] == row["beta_max"] == 1 for row in lines(out)[1:])


def test_the_scale_of_beta0_and_the_phases_are_printed(few, capsys):
    out = few("run")
    printed = capsys.readouterr().out
    assert f"β0 = 1 in units of the reward, as A is; that deviation is {lines(out)[1]['reward_std']:.3g}" in printed
    first, second = (next(line for line in printed.splitlines() if line.startswith(f"round {n}/1")) for n in (0, 1))
    assert "evaluation " in first and "rollout" not in first  # the first evaluation is booked to round 0
    assert all(f"{phase} " in second for phase in ("rollout", "reward", "update", "evaluation"))


def test_without_matplotlib_a_run_says_what_it_left_out(few, monkeypatch, capsys):
    monkeypatch.undo()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
    out = few("run")
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl", "model"}
    printed = capsys.readouterr().out
    for name in ("before_after.png", "curves.png"):
        assert f"{out / name}: left out, matplotlib is not installed" in printed


def test_ten_rounds_of_the_main_job_learn(tmp_path):
    train_flow.main(["--out", str(tmp_path / "run"), "--rounds", "10", "--eval-samples", "4"])
    first, last = lines(tmp_path / "run")[0]["eval"], lines(tmp_path / "run")[-1]["eval"]
    assert last["reward"] > first["reward"] + 3 and last["joint"] > first["joint"] + 0.08


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_main_job_learns(tmp_path, seed):
    train_flow.main(["--out", str(tmp_path / "run"), "--seed", str(seed)])
    first, last = lines(tmp_path / "run")[0]["eval"], lines(tmp_path / "run")[-1]["eval"]
    assert last["reward"] > first["reward"] + 8 and last["joint"] > first["joint"] + 0.25


@pytest.mark.cuda
def test_the_same_rollout_on_cuda(tmp_path):
    cpu, cuda = (train(tmp_path / device, "--device", device) for device in ("cpu", "cuda"))
    assert cuda["reward"] == pytest.approx(cpu["reward"], abs=0.5)


# ----------------------------------------------------------------------------------------------------------------- options

# Option: (its value, other options of both runs). With the option, what the run writes must differ from the run without.
EFFECTS = {
    "--method": ("raft", ()),
    "--beta0": (30, ()),
    "--a-min": (-0.1, ()),
    "--a-max": (0.1, ()),
    "--tau": (3, ("--method", "orw-cfm-w2")),
    "--beta-dpo": (5, ("--method", "dpo")),
    "--time-density": ("noise", ()),
    "--prompts-per-round": (4, ()),
    "--group-size": (4, ()),
    "--ode-steps": (3, ()),
    "--ode-method": ("heun", ()),
    "--shift": (3, ()),
    "--guidance": (3, ()),
    "--negative-prompt": ("a thin handwritten one", ("--guidance", 3)),
    "--resolution": (6, ()),
    "--rounds": (2, ()),
    "--lr": (1e-2, ()),
    "--lr-schedule": ("cosine", ("--rounds", 2)),
    "--lr-hold": (0.5, ("--rounds", 2, "--lr-schedule", "linear")),
    "--lr-end": (0.5, ("--rounds", 2, "--lr-schedule", "linear")),
    "--warmup": (2, ()),
    "--weight-decay": (0.5, ()),
    "--clip-grad": (1e-3, ()),
    "--lora-rank": (2, ()),
    "--lora-alpha": (8, ("--lora-rank", 2, "--lr", 1e-2)),
    "--lora-targets": ("to_q", ("--lora-rank", 2, "--lr", 1e-2)),
    "--ema": (0.9, ("--lr", 1e-2)),
    "--inner-steps": (3, ()),
    "--reward": (f"clip_score:{demo.FLOW['reward'][0]}@2", ()),
    "--judge": (demo.FLOW["judge"], ("--eval-first",)),
    "--seed": (1, ()),
    "--dtype": ("bfloat16", ()),
    "--eval-every": (1, ("--rounds", 2, "--eval-every", 2)),
    "--no-eval-first": (None, ()),
    "--keep-checkpoints": (None, ()),
    "--eval-samples": (3, ()),
}
# Options that change how, not what, is computed, or where from or to: each has a test of its own, here or in test_train_sd3.py.
ELSEWHERE = {
    "--rollout-batch", "--micro-batch", "--gradient-checkpointing", "--compile", "--model", "--base", "--t5", "--prompts",
    "--embeddings", "--config", "--out", "--device",
}  # fmt: skip


@pytest.mark.parametrize("option", EFFECTS)
def test_every_option_does_something(few, option):
    value, others = EFFECTS[option]
    if option == "--judge":
        value = str(value)
        others = ("--prompts", demo.FLOW["prompts"], "--rounds", 0)
    without, with_it = few("without", *others), few("with", *others, option, *([] if value is None else [value]))
    if option in ("--ema", "--dtype", "--judge"):  # what is evaluated is the average, too
        assert lines(without)[-1]["eval"] != lines(with_it)[-1]["eval"]
    assert written(without) != written(with_it)


def test_every_option_is_listed_above():
    with pytest.raises(SystemExit):
        train_flow.parse(["--help"])
    names = set()
    original = shared.parse

    def spy(parser, argv):
        names.update(action.option_strings[0] for action in parser._actions if action.option_strings)
        return original(parser, argv)

    train_flow.options.parse = spy
    try:
        train_flow.parse([])
    finally:
        train_flow.options.parse = original
    assert names - {"-h"} == {name.replace("--no-", "--") for name in EFFECTS} | ELSEWHERE


def test_batches_and_memory_savers_are_used_and_change_nothing(few, monkeypatch):
    counts = {"velocity": 0, "checkpoint": 0}
    velocity, checkpoint = TextToImage.velocity, mmdit.checkpoint

    def counted(name, call):
        def wrapper(*args, **kwargs):
            counts[name] += 1
            return call(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(TextToImage, "velocity", counted("velocity", velocity))
    monkeypatch.setattr(mmdit, "checkpoint", counted("checkpoint", checkpoint))
    calls, rows = {}, {}
    options = {
        "plain": [],
        "micro": ["--micro-batch", 2],
        "rollout": ["--rollout-batch", 2],
        "saver": ["--gradient-checkpointing"],
    }
    for name, some in options.items():
        counts.update(velocity=0, checkpoint=0)
        rows[name] = lines(few(name, "--no-eval-first", *some))
        calls[name] = dict(counts)
    # 4 samples, 2 Euler steps, 2 inner steps of policy and reference; then an evaluation of 4: 2 steps and W2's two.
    assert [calls[name]["velocity"] for name in options] == [2 + 4 + 4, 2 + 8 + 4, 4 + 4 + 8, 2 + 4 + 4]
    assert [calls[name]["checkpoint"] for name in options] == [0, 0, 0, 2 * 3]  # two gradient steps through three blocks
    assert rows["plain"] == rows["saver"]
    for name in ("micro", "rollout"):
        for a, b in zip(rows["plain"], rows[name]):
            assert a | a.get("eval", {}) | {"eval": 0} == pytest.approx(b | b.get("eval", {}) | {"eval": 0}, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", tiny_rewards.SIDES)
def test_every_reward_is_what_the_run_logs(tmp_path, few, name):
    # The rollout's images are drawn again outside the script: the logged mean is half the reward's own.
    from nano_adrpo.rewards import images as rewards

    folder = tiny_rewards.folder(name, tmp_path / name)
    row = lines(few("run", "--reward", f"{name}:{folder}@0.5", "--no-eval-first"))[0]
    model, g = TextToImage.from_pretrained(demo.FLOW["model"]), torch.Generator().manual_seed(0)
    texts = ["a bold handwritten two", "a thin handwritten nine"]
    prompts = [texts[i] for i in torch.randint(2, (2,), generator=g).tolist() for _ in range(2)]
    x1 = model.sample(torch.randn(4, 1, 8, 8, generator=g), model.encode(prompts), torch.tensor([0.0, 0.5, 1.0]))
    scores = rewards.NAMES[name](folder)(x1, prompts)
    assert row["reward"] == pytest.approx(scores.mean().item() / 2, rel=1e-3, abs=1e-4)
    assert row["reward_std"] == pytest.approx(scores.reshape(2, 2).std(dim=1).mean().item() / 2, rel=1e-2, abs=1e-4)


def test_a_sum_of_rewards_is_logged_with_its_terms(tmp_path, few):
    (tmp_path / "mine.py").write_text("def bright(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    rewards = [*demo.FLOW["reward"], f"blip_itm:{tiny_rewards.folder('blip_itm', tmp_path / 'blip')}@-2"]
    rows = lines(few("run", "--reward", *rewards, f"{tmp_path / 'mine.py'}:bright@30", "--rollout-batch", 3))
    for row in (rows[1], rows[1]["eval"]):
        weighted = row["clip_score"] - 2 * row["blip_itm"] + 30 * row["bright"]
        assert row["reward"] == pytest.approx(weighted, rel=1e-4) and 0 < row["blip_itm"] < 1 and -1 < row["bright"] < 1
    assert "clip_diversity" in rows[1]["eval"]


# ---------------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *argv):
    return scripts.refused(capsys, lambda: train_flow.main([*SMALL, *map(str, argv)]))


def test_bad_options_are_refused(capsys, tmp_path):
    for options, message in (
        (["--bogus", 1], "unrecognized arguments: --bogus"),
        (["--round", 1], "unrecognized arguments: --round"),  # no abbreviations
        (["--method", "ppo"], "argument --method: invalid choice: 'ppo'"),
        (["--beta0", 0], "--beta0 0: expected a positive number with --method adrpo"),
        (["--beta0", "nan"], "argument --beta0: nan is not a positive number"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--ema", 1], "argument --ema: 1 is not a number in [0, 1)"),
        (["--group-size", 1], "--group-size 1: expected at least 2"),
        (["--eval-samples", 1], "--eval-samples 1: expected at least 2"),
        (["--micro-batch", 5], "--micro-batch 5 does not divide the 16 samples of a round"),
        (["--method", "dpo", "--micro-batch", 3], "--micro-batch 3 does not divide the 4 pairs of a round"),
        (["--a-min", 2, "--a-max", 1], "--a-min and --a-max: the advantage's range is [2.0, 1.0]; expected A_min ≤ A_max"),
        (["--a-max", "inf"], "argument --a-max: inf is not a finite number"),
        (["--device", "tpu9"], "argument --device: device 'tpu9' is not available"),
        (["--model", "no-such-folder"], "no-such-folder: no such file or folder"),
        (
            ["--reward", "no-such-folder"],
            "reward 'no-such-folder': no such reward or folder; expected one of clip_score:FOLDER",
        ),
        (["--prompts", "no-such-file"], "no-such-file: no such file"),
        (["--judge", "no-such-file.py:f"], "no-such-file.py: no such file"),
        (["--embeddings", "x.safetensors"], "--embeddings: expected only with --prompts"),
        (["--lora-alpha", 2], "--lora-alpha and --lora-targets: expected only with --lora-rank"),
        (["--lora-rank", 2, "--lora-targets", "to_x"], "no linear layer whose name ends in"),
    ):
        assert message in refused(capsys, "--out", tmp_path / "run", *options), options
        assert not (tmp_path / "run").exists()


def test_a_damaged_model_is_refused(capsys, tmp_path):
    shutil.copytree(demo.FLOW["model"], tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors, options = load_file(file), ("--model", tmp_path / "model", "--out", tmp_path / "run")
    save_file(tensors | {"proj_out.bias": torch.zeros(5)}, file)
    assert f"{file}: key 'proj_out.bias' has shape [5]; expected [4]" in refused(capsys, *options)
    file.write_bytes(file.read_bytes()[:1000])
    assert f"{file}: not a whole safetensors file" in refused(capsys, *options)
    assert not (tmp_path / "run").exists()


REWARD = """calls = []

def third(images, prompts):
    calls.append(1)
    return [0.0] * (len(prompts) - 1) + [0.0 if len(calls) < 3 else {}]
"""


def test_what_fails_in_a_round_names_it_and_the_last_checkpoint(capsys, tmp_path, few, monkeypatch):
    mine = tmp_path / "mine.py"
    options = ["--reward", f"{mine}:third", "--rounds", 3, "--eval-every", 1]  # calls: evaluation, round 1, its evaluation
    mine.write_text(REWARD.format("float('nan')"))
    line = scripts.refused(capsys, lambda: few("a", *options))
    assert "round 1: a reward of the prompt 'a " in line and "is not finite (third); last good checkpoint: none yet" in line
    mine.write_text(REWARD.format("'high'"))
    assert "third gave list; expected [4] numbers, one a sample" in scripts.refused(capsys, lambda: few("b", *options))
    mine.write_text(REWARD.format("calls[3]"))  # a bug in the user's code: the traceback stays, and a note says where
    with pytest.raises(IndexError) as bug:
        few("c", *options)
    assert bug.value.__notes__ == ["In round 1; last good checkpoint: none yet"]
    assert bug.traceback[-1].path == mine
    loss = train_flow.adrpo.flow_loss
    monkeypatch.setattr(train_flow.adrpo, "flow_loss", lambda *args: loss(*args) * (float("nan") if saved() else 1))

    def saved():
        return (tmp_path / "d" / "model").exists()

    line = scripts.refused(capsys, lambda: few("d", "--rounds", 3, "--eval-every", 1))
    assert "round 2: loss nan" in line and f"last good checkpoint: {tmp_path / 'd' / 'model'} (round 1)" in line
    TextToImage.from_pretrained(tmp_path / "d" / "model", base=demo.FLOW["model"])


def test_a_value_error_of_the_code_keeps_its_traceback(few, monkeypatch):
    monkeypatch.setattr(train_flow, "draw_times", lambda *args: (_ for _ in ()).throw(ValueError("too many values to unpack")))
    with pytest.raises(ValueError, match="too many values") as bug:
        few("run")
    assert not isinstance(bug.value, InputError)


def test_the_script_runs_as_a_script(tmp_path):
    command = [sys.executable, str(ROOT / "train_flow.py")]
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path).stdout
    assert all(option in help_text for option in ("--beta0", "--a-min", "--guidance", "(default: 0.0001)"))
    bad = subprocess.run([*command, "--beta0", "-1"], capture_output=True, text=True, cwd=tmp_path)
    assert (bad.returncode, bad.stderr) == (2, "error: argument --beta0: -1 is not a positive number or 0\n")
    assert not list(tmp_path.iterdir())
