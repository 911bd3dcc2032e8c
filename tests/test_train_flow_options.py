"""train_flow.py: every option has an effect, rewards are those asked for, bad input is one line."""

import shutil
import subprocess
import sys

import flow_runs
import pytest
import scripts
import tiny_rewards
import torch
from flow_runs import ROOT, SMALL
from safetensors.torch import load_file, save_file
from scripts import lines, written

import train_flow
from nano_adrpo import demo
from nano_adrpo.errors import InputError
from nano_adrpo.models import mmdit
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.training import options as shared

few = flow_runs.few

# ----------------------------------------------------------------------------------------------------------------- options

# Option: (its value, other options of both runs). With the option, what the run writes must differ from the run without.
EFFECTS = {
    "--method": ("raft", ()),
    "--beta0": (30, ()),
    "--a-min": (-0.1, ()),
    "--a-max": (0.1, ()),
    "--beta-unit": ("deviation", ()),
    "--tau": (3, ("--method", "orw-cfm-w2")),
    "--beta-dpo": (5, ("--method", "dpo")),
    "--time-density": ("noise", ()),
    "--prompts-per-round": (4, ()),
    "--group-size": (4, ()),
    "--ode-steps": (3, ()),
    "--ode-method": ("heun", ()),
    "--shift": (3, ()),
    "--guidance": (3, ()),
    "--negative-prompt": ("a red one", ("--guidance", 3)),
    "--resolution": (12, ()),
    "--rounds": (2, ()),
    "--lr": (1e-2, ()),
    "--lr-schedule": ("constant", ("--rounds", 2)),
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
    "--judge": (demo.FLOW["judge"], ("--rounds", 0)),
    "--seed": (1, ()),
    "--dtype": ("bfloat16", ()),
    "--eval-every": (1, ("--rounds", 2, "--eval-every", 2)),
    "--no-eval-first": (None, ()),
    "--keep-checkpoints": (None, ()),
    "--eval-samples": (3, ()),
    "--eval-prompts": (1, ()),
}
# Options that change how, not what, is computed, or where from or to: each has a test of its own, here or in test_train_sd3.py.
ELSEWHERE = {
    "--rollout-batch", "--micro-batch", "--gradient-checkpointing", "--compile", "--model", "--base", "--t5", "--prompts",
    "--held-out", "--lower-case", "--embeddings", "--config", "--out", "--device", "--adapter",
    "--fsdp",  # in test_distributed.py
    "--resume", "--checkpoint-every", "--keep-every", "--patience-nonfinite",  # in test_resume.py
}  # fmt: skip


@pytest.mark.parametrize("option", EFFECTS)
def test_every_option_does_something(few, option):
    value, others = EFFECTS[option]
    without, with_it = few("without", *others), few("with", *others, option, *([] if value is None else [value]))
    if option in ("--ema", "--dtype", "--judge"):  # what is evaluated is the average, too
        assert lines(without)[-1]["eval"] != lines(with_it)[-1]["eval"]
    assert written(without) != written(with_it)


def test_every_option_is_listed_above(monkeypatch):
    names, parse = set(), shared.parse

    def spy(parser, argv):
        names.update(action.option_strings[0] for action in parser._actions)
        return parse(parser, argv)

    monkeypatch.setattr(train_flow.options, "parse", spy)
    train_flow.parse([])
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
            a, b = (row | row.get("eval", {}) | {"eval": 0, "eval_error": 0} for row in (a, b))
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_a_run_goes_on_from_an_adapter_and_has_it_for_its_reference(few):
    first = few("first", "--lora-rank", 2, "--lr", 0.05)
    out = few("second", "--adapter", first / "adapter", "--rounds", 2, "--eval-every", 1, "--lr", 0.05)
    before, after = lines(first)[-1]["eval"], lines(out)[0]["eval"]
    assert before.pop("w2") > 0 == after.pop("w2") < lines(out)[-1]["eval"]["w2"] and before == after
    files = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, out)]
    moved = {name for name in files[0] if not torch.equal(files[0][name], files[1][name])}
    unused = {name for name in files[0] if "transformer_blocks.2.attn.add_q_proj" in name}  # of the last block no text is read
    assert files[0].keys() == files[1].keys() == moved | unused


@pytest.mark.parametrize("name", tiny_rewards.SIDES)
def test_every_reward_is_what_the_run_logs(tmp_path, few, name):
    # The rollout's images are drawn again outside the script: the logged mean is half the reward's own.
    from nano_adrpo.rewards import images as rewards

    folder = tiny_rewards.folder(name, tmp_path / name)
    row = lines(few("run", "--reward", f"{name}:{folder}@0.5", "--no-eval-first"))[0]
    model, g = TextToImage.from_pretrained(demo.FLOW["model"], torch.float32), torch.Generator().manual_seed(0)
    texts = ["a green two", "a blue nine"]
    prompts = [texts[i] for i in torch.randint(2, (2,), generator=g).tolist() for _ in range(2)]
    x1 = model.sample(torch.randn(4, 3, 16, 16, generator=g), model.encode(prompts), torch.tensor([0.0, 0.5, 1.0]))
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
        (["--method", "dpo-offline", "--micro-batch", 3], "--micro-batch 3 does not divide the 4 pairs of a round"),
        (["--a-min", 2, "--a-max", 1], "--a-min and --a-max: the advantage's range is [2.0, 1.0]; expected A_min ≤ A_max"),
        (["--a-max", "inf"], "argument --a-max: inf is not a finite number"),
        (["--device", "tpu9"], "argument --device: device 'tpu9' is not available"),
        (["--model", "no-such-folder"], "no-such-folder: no such file or folder"),
        (
            ["--reward", "no-such-folder"],
            "reward 'no-such-folder': no such reward or folder; expected one of clip_score:FOLDER",
        ),
        (["--prompts", "no-such-file"], "no-such-file: no such file"),
        (["--held-out", "x.txt"], "--held-out: expected only with --prompts"),
        (["--judge", "no-such-file.py:f"], "no-such-file.py: no such file"),
        (["--embeddings", "x.safetensors"], "--embeddings: expected only with --prompts"),
        (["--adapter", "none"], "--adapter: none: no such file or folder; expected an adapter's"),
        (["--adapter", "a", "--lora-rank", 2], "--lora-rank and --adapter: expected one of them"),
        (["--lora-alpha", 2], "--lora-alpha and --lora-targets: expected only with --lora-rank"),
        (["--tau", 2], "--tau: expected only with --method orw-cfm-w2"),  # from here on: options that cannot act
        (["--tau=1", "--method", "dpo"], "--tau: expected only with --method orw-cfm-w2"),
        (["--beta-dpo", 9, "--method", "raft"], "--beta-dpo: expected only with --method dpo or dpo-offline"),
        (["--beta0", 1, "--method", "raft"], "--beta0: expected only with --method adrpo, fixed-beta, gardo-gate"),
        (["--beta0", 1, "--method", "dpo"], "--beta0: expected only with"),
        (["--beta0", 1, "--method", "dpo-offline"], "--beta0: expected only with"),
        (["--a-min", -1, "--method", "orw-cfm-w2"], "--a-min: expected only with --method adrpo, fixed-beta, gardo-gate"),
        (["--a-max", 1, "--method", "dpo"], "--a-max: expected only with --method adrpo, fixed-beta, gardo-gate"),
        (["--method", "shuffled", "--prompts-per-round", 1], "--method shuffled: expected --prompts-per-round of at least 2"),
        (["--method", "gardo-gate"], "--method gardo-gate: expected a --reward of weight 0, such as FILE.py:FUNCTION@0"),
        (["--negative-prompt", "x"], "--negative-prompt: expected only with --guidance above 1"),
        (["--negative-prompt", "x", "--guidance", 1], "--negative-prompt: expected only with --guidance above 1"),
        (["--t5", "stream"], "--t5: expected only with --prompts"),
        (["--t5", "zeros", "--prompts", demo.FLOW["prompts"], "--embeddings", "/dev/null/x"], "--t5 zeros: "),
        (["--lr-schedule", "constant", "--lr-hold", 0.5], "--lr-hold: expected only with --lr-schedule linear or cosine"),
        (["--lr-schedule", "constant", "--lr-end", 0.5], "--lr-end: expected only with --lr-schedule linear or cosine"),
        (["--rounds", 0, "--no-eval-first"], "--no-eval-first: expected only with --rounds above 0"),
        (["--rounds", 0, "--keep-checkpoints"], "--keep-checkpoints: expected only with --rounds above 0"),
        (["--reward", f"{demo.FLOW['reward'][0]}@0"], "every weight is 0; expected another one"),
        (["--lora-rank", 2, "--lora-targets", "to_x"], "no linear layer whose name ends in"),
    ):
        assert message in refused(capsys, "--out", tmp_path / "run", *options), options
        assert not (tmp_path / "run").exists()


def test_a_damaged_model_is_refused(capsys, tmp_path):
    shutil.copytree(demo.FLOW["model"], tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors, options = load_file(file), ("--model", tmp_path / "model", "--out", tmp_path / "run")
    save_file(tensors | {"proj_out.bias": torch.zeros(5)}, file)
    assert f"{file}: key 'proj_out.bias' has shape [5]; expected [48]" in refused(capsys, *options)
    file.write_bytes(file.read_bytes()[:1000])
    assert f"{file}: not a whole safetensors file" in refused(capsys, *options)
    assert not (tmp_path / "run").exists()


REWARD = """calls = []

def third(images, prompts):
    calls.append(1)
    return [0.0] * (len(prompts) - 1) + [0.0 if len(calls) < 3 else {}]
"""


def test_what_fails_in_a_round_names_it_and_the_last_checkpoint(capsys, tmp_path, few, monkeypatch):
    def last(run, round):
        return tmp_path / run / "checkpoints" / f"step-{round}"

    mine = tmp_path / "mine.py"
    options = ["--reward", f"{mine}:third", "--rounds", 3, "--eval-every", 1]  # calls: evaluation, round 1, its evaluation
    mine.write_text(REWARD.format("float('nan')"))
    line = scripts.refused(capsys, lambda: few("a", *options))
    assert "round 1: a reward of the prompt 'a " in line and f"is not finite (third); last checkpoint: {last('a', 0)}" in line
    mine.write_text(REWARD.format("'high'"))
    assert "third gave list; expected [4] numbers, one a sample" in scripts.refused(capsys, lambda: few("b", *options))
    mine.write_text(REWARD.format("calls[3]"))  # a bug in the user's code: the traceback stays, and a note says where
    with pytest.raises(IndexError) as bug:
        few("c", *options)
    assert bug.value.__notes__ == [f"In round 1; last checkpoint: {last('c', 0)}"]
    assert bug.traceback[-1].path == mine
    loss = train_flow.adrpo.flow_loss
    monkeypatch.setattr(train_flow.adrpo, "flow_loss", lambda *args: loss(*args) * (float("nan") if saved() else 1))

    def saved():
        return (tmp_path / "d" / "model").exists()

    line = scripts.refused(capsys, lambda: few("d", "--rounds", 3, "--eval-every", 1, "--patience-nonfinite", 1))
    assert "round 2: loss nan" in line and f"last checkpoint: {last('d', 1)}" in line
    TextToImage.from_pretrained(tmp_path / "d" / "model", base=demo.FLOW["model"])


def test_a_value_error_of_the_code_keeps_its_traceback(few, monkeypatch):
    monkeypatch.setattr(train_flow, "draw_times", lambda *args: (_ for _ in ()).throw(ValueError("too many values to unpack")))
    with pytest.raises(ValueError, match="too many values") as bug:
        few("run")
    assert not isinstance(bug.value, InputError)


def test_the_script_runs_as_a_script(tmp_path):
    command = [sys.executable, str(ROOT / "train_flow.py")]
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path).stdout
    assert all(option in help_text for option in ("--beta0", "--a-min", "--guidance", "(default: 0.0006)"))
    bad = subprocess.run([*command, "--beta0", "-1"], capture_output=True, text=True, cwd=tmp_path)
    assert (bad.returncode, bad.stderr) == (2, "error: argument --beta0: -1 is not a positive number or 0\n")
    assert not list(tmp_path.iterdir())
