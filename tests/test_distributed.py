"""torchrun: a run on several ranks is the run of one process with the same global batch; what it writes, it writes once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from flow_runs import ROOT
from grpo_runs import jsonl
from safetensors.torch import load_file
from scripts import lines, refused

import train_flow
import train_grpo
from nano_adrpo import demo
from nano_adrpo.evaluation import plots
from nano_adrpo.training import checkpoint, distributed

BOTH = " --group-size 2 --rounds 3 --eval-every 3 --no-eval-first"
FLOW = (
    "flow",
    "--prompts prompts.txt --reward rewards.py:dark --beta-unit reward --inner-steps 2 --ode-steps 1 --eval-samples 2" + BOTH,
)
GRPO = (
    "grpo",
    ("--problems problems.jsonl --held-out held_out.jsonl --reward rewards.py:long --max-new-tokens 4 --eval-samples 1" + BOTH),
)
ADAPTERS = "--lora-rank 2 --lr 0.002 --ema 0.5"
# (script, its options), options, those of the ranks' run alone. A round has as many prompts as ranks, two samples of each.
CASES = {
    "flow": (FLOW, "--ema 0.5", ""),
    "flow, FSDP": (FLOW, "--ema 0.5", "--fsdp --micro-batch RANKS"),  # two micro-batches of one sample each
    "flow, off-line DPO, FSDP": (FLOW, "--method dpo-offline --lr 0.0002", "--fsdp --micro-batch RANKS"),
    "flow, adapters": (FLOW, ADAPTERS, "--micro-batch RANKS"),
    "flow, adapters, FSDP": (FLOW, ADAPTERS, "--fsdp"),
    "grpo": (GRPO, "--average tokens", "--micro-batch RANKS"),
    "grpo, FSDP": (GRPO, "--inner-epochs 2 --minibatches 2 --ema 0.5", "--fsdp"),
    "grpo, adapters": (GRPO, f"{ADAPTERS} --inner-epochs 2 --minibatches 2", ""),
    "grpo, adapters, FSDP": (GRPO, ADAPTERS, "--fsdp --micro-batch RANKS"),
}
REDUCED = ("flow, FSDP", "flow, adapters", "grpo, FSDP", "grpo, adapters, FSDP")
REWARDS = """
import os

# Whole numbers: rounding that differs does not show in advantages.
def dark(images, prompts):
    return (images < 0).float().sum(dim=(1, 2, 3))

def long(prompts, completions):
    return [float(sum(map(ord, text))) for text in completions]

calls = []

def broken(prompts, completions):
    calls.append(1)
    bad = os.environ.get("RANK") == "1" and len(calls) == 2
    return [float("nan")] * len(completions) if bad else long(prompts, completions)
"""
# The demos' weights, by name.
PARTS = f"{demo.FLOW['model']}/transformer/diffusion_pytorch_model", f"{demo.GRPO['model']}/model"
BASE = {name: tensor for part in PARTS for name, tensor in load_file(f"{part}.safetensors").items()}
LIMIT = 1e-6  # relative, of each tensor


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with three prompts and three problems, which two and four ranks do not share out evenly."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "prompts.txt").write_text("a green two\na blue nine\na red one\n")
    jsonl(folder / "problems.jsonl", ("17+48=", 65), ("29+34=", 63), ("57+3=", 60))
    jsonl(folder / "held_out.jsonl", ("38+45=", 83), ("9+19=", 28), ("6+7=", 13))
    (folder / "rewards.py").write_text(REWARDS)
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def torchrun(ranks, *words, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *words]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, timeout=900)


def words(case, ranks, out):
    (script, common), options, of_ranks = CASES[case]
    of_ranks = of_ranks.replace("RANKS", str(ranks))
    return script, [*f"{common} {options} {of_ranks} --prompts-per-round {ranks}".split(), "--out", str(out)]


def alone(case, ranks, out):
    """One process with the same global batch. Its forward passes have as many rows as a rank's: matrix products of other shapes
    round otherwise, and after three rounds this alone is up to 7e-6."""
    script, options = words(case, ranks, out)
    rows = 1 if {"--minibatches", "--micro-batch"} & {*options} else 2
    options = [option for option in options if option != "--fsdp"] + ["--micro-batch", str(rows)]
    options += ["--rollout-batch", "2"] if script == "flow" else []
    {"flow": train_flow, "grpo": train_grpo}[script].main(options)


def on_ranks(ranks, place, cases):
    """Runs the cases in one start of torchrun -> {case: its folder}."""
    outs = {case: place / f"{ranks}-{number}" for number, case in enumerate(cases)}
    runs = [words(case, ranks, out) for case, out in outs.items()]
    broken = [word.replace(":long", ":broken") for word in words("grpo", ranks, place / f"broken-{ranks}")[1]]
    (place / "cases.json").write_text(json.dumps([*runs, ["grpo", broken]]))
    done = torchrun(ranks, ROOT / "tests" / "ranks.py", "cases.json")
    assert done.returncode == 0, "\n".join([line for line in done.stderr.splitlines() if line.startswith("[rank")][-20:])
    return outs, done


def state(out):
    return load_file(checkpoint.newest_whole(out) / checkpoint.STATE)


def compare(ours, theirs):
    """Checks that two runs are equal up to rounding: every tensor in length relative to its own. Of adapters this is the weight
    that they change; they themselves begin at zero, as all rounding does."""
    a, b = state(ours), state(theirs)
    assert a.keys() == b.keys()
    for name in a:
        if name.startswith("generator."):
            assert torch.equal(a[name], b[name])
        elif name.startswith(("parameter.", "average.")):
            apart, size = (a[name] - b[name]).norm(), b[name].norm()
            if ".lora_" in name:
                assert apart <= 10 * LIMIT * size, name
                if name.endswith(".lora_B.weight"):
                    A = name.replace(".lora_B.", ".lora_A.")
                    base = BASE[name.partition(".")[2].replace(".lora_B.", ".")]
                    apart, size = (a[name] @ a[A] - b[name] @ b[A]).norm(), (base + b[name] @ b[A]).norm()
            assert ".lora_A." in name or apart <= LIMIT * size, (name, apart / size)
    for row, other in zip(lines(ours), lines(theirs), strict=True):
        flat = ({"": row} | {k: v for k, v in row.items() if isinstance(v, dict)} for row in (row, other))
        for mine, its in zip(*(each.values() for each in flat)):
            numbers = {name: value for name, value in mine.items() if not isinstance(value, dict)}
            assert numbers == pytest.approx({name: its[name] for name in numbers}, rel=1e-4, abs=1e-5)
    for file in ours.rglob("*model.safetensors"):
        a, b = load_file(file), load_file(theirs / file.relative_to(ours))
        assert a.keys() == b.keys() and all((a[name] - b[name]).norm() <= 10 * LIMIT * b[name].norm() for name in a)
    files = [sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) for out in (ours, theirs)]
    assert files[0] == files[1]


def check(ranks, place, monkeypatch, cases):
    monkeypatch.setattr(plots, "pyplot", lambda file: None)
    outs, done = on_ranks(ranks, place, cases)
    assert done.stdout.count("round 3/3") == len(cases) + 1
    # A reward that is not finite on one rank alone: the round takes no step on any.
    assert [row.get("skipped") for row in lines(place / f"broken-{ranks}")] == [None, 1, None]
    assert "a round without a step: a reward of the prompt" in done.stdout
    for case, out in outs.items():
        one = out.with_name(f"one-{out.name}")
        alone(case, ranks, one)
        compare(out, one)
        if case.startswith("grpo"):
            assert (out / "samples.txt").read_text() == (one / "samples.txt").read_text()


def test_two_ranks_are_one_process(place, monkeypatch):
    check(2, place, monkeypatch, REDUCED)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_one_process(place, monkeypatch, ranks):
    check(ranks, place, monkeypatch, CASES)


# ------------------------------------------------------------------------------------------------- checkpoints and failures

RUN = f"{GRPO[1]} --prompts-per-round 2 --lr-schedule constant --ema 0.5 --checkpoint-every 1"


def test_what_ranks_do_not_divide_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for script, options, message in (
        (train_flow, "--prompts-per-round 6", "--prompts-per-round 6: expected a multiple of the 4 processes"),
        (train_flow, "--prompts-per-round 4 --micro-batch 2", "--micro-batch 2: expected a multiple of the 4"),
        (train_flow, "--rollout-batch 6", "--rollout-batch 6: expected a multiple of the 4"),
        (train_grpo, "--prompts-per-round 4 --group-size 2 --minibatches 4", "completions in each: 2: expected a multiple of"),
    ):
        assert message in refused(capsys, lambda: script.parse(options.split())), options
    monkeypatch.setenv("WORLD_SIZE", "1")
    for script in (train_flow, train_grpo):
        assert "--fsdp: expected several processes" in refused(capsys, lambda: script.parse(["--fsdp"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "expected a folder" in refused(capsys, lambda: train_flow.parse(["--fsdp", "--model", __file__]))


def test_rows_are_shared_out_and_none_is_missing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for count in (1, 3, 8, 9):
        seen = []
        for rank in range(4):
            monkeypatch.setenv("RANK", str(rank))
            assert distributed.mine(list(range(count))) == distributed.mine(torch.arange(count)).tolist()
            seen.append(distributed.mine(list(range(count))))
        assert len({len(some) for some in seen}) == 1 and sum(seen, [])[:count] == list(range(count))


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["--no-fsdp", "--fsdp"])
def test_a_checkpoint_of_four_ranks_goes_on_with_four_two_and_one(place, monkeypatch, fsdp):
    monkeypatch.setattr(plots, "pyplot", lambda file: None)
    script, run = ROOT / "train_grpo.py", RUN.replace("--prompts-per-round 2", "--prompts-per-round 4").split()
    start = place / f"start{fsdp}"
    done = torchrun(4, script, *run, fsdp, "--rounds", 2, "--out", start)
    assert done.returncode == 0, done.stderr[-2000:]
    outs = {}
    for name in ("four", "again", "two", "one"):
        outs[name] = shutil.copytree(start, place / f"{name}{fsdp}")
        if name == "one":
            train_grpo.main(["--resume", "--no-fsdp", "--rounds", "4", "--out", str(outs[name])])
        else:
            ranks = {"four": 4, "again": 4, "two": 2}[name]
            done = torchrun(ranks, script, "--resume", "--rounds", 4, "--out", outs[name])
            assert done.returncode == 0, done.stderr[-2000:]
    assert (outs["four"] / "metrics.jsonl").read_bytes() == (outs["again"] / "metrics.jsonl").read_bytes()
    a, b = state(outs["four"]), state(outs["again"])
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for name in ("two", "one"):
        compare(outs[name], outs["four"])


DEATH = """
import os, pathlib, signal

def long(prompts, completions):
    fallen = pathlib.Path("fallen")
    if os.environ.get("RANK") == "1" and pathlib.Path("die/checkpoints/step-1").exists() and not fallen.exists():
        fallen.touch()
        {}
    return [float(sum(map(ord, text))) for text in completions]
"""


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_torchrun_restarts_the_run(place):
    script, run = ROOT / "train_grpo.py", RUN.replace("rewards.py", "death.py").split()
    (place / "death.py").write_text(DEATH.format("pass"))
    assert torchrun(2, script, *run, "--out", place / "whole").returncode == 0
    (place / "fallen").unlink(missing_ok=True)
    (place / "death.py").write_text(DEATH.format("raise RuntimeError('the reward fell')"))
    done = torchrun(2, script, *run, "--out", "die")
    assert done.returncode != 0 and time.time() - (place / "fallen").stat().st_mtime < 60
    assert "RuntimeError: the reward fell" in done.stderr and "last checkpoint: die/checkpoints/step-1" in done.stderr
    shutil.rmtree("die")
    (place / "fallen").unlink()
    (place / "death.py").write_text(DEATH.format("os.kill(os.getpid(), signal.SIGKILL)"))
    done = torchrun(2, "--max-restarts", 1, script, *run, "--resume", "--out", "die")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (place / "die" / "metrics.jsonl").read_bytes() == (place / "whole" / "metrics.jsonl").read_bytes()
    a, b = state(place / "die"), state(place / "whole")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_sigterm_to_torchrun_ends_in_a_checkpoint(place):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "train_grpo.py"),
    ]
    command += [*RUN.replace("--rounds 3", "--rounds 500").split(), "--checkpoint-every", "500", "--out", "term"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith("round 2/"):
                process.send_signal(signal.SIGTERM)
                break
        printed, _ = process.communicate(timeout=120)
    *_, last = printed.splitlines()
    done = lines(place / "term")[-1]["round"]
    assert re.fullmatch(rf"SIGTERM after round {done}; to go on: torchrun --nproc-per-node 2 .* --resume --out term", last)
    assert checkpoint.last(place / "term").name == f"step-{done}" and checkpoint.newest_whole(place / "term")
