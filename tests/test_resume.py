"""--resume: a run that was stopped or killed, or that failed, goes on and leaves the bytes of one that was not."""

import contextlib
import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scripts
import torch
from flow_runs import ROOT
from grpo_runs import jsonl
from scripts import lines

import train_flow
import train_grpo
from nano_adrpo.evaluation import plots
from nano_adrpo.files import safetensors, values
from nano_adrpo.training import checkpoint
from nano_adrpo.training.life import Life

RUN = "--rounds 4 --eval-every 2 --checkpoint-every 1 --keep-every 1 --prompts-per-round 2 --group-size 2"
FLOW = f"{RUN} --prompts two.txt --inner-steps 2 --ode-steps 1 --eval-samples 2"
GRPO = f"{RUN} --problems p.jsonl --held-out p.jsonl --reward mine.py:mine --max-new-tokens 4 --eval-samples 1"
CASES = {
    "flow": (train_flow, f"{FLOW} --ema 0.5"),
    "flow, adapters": (train_flow, f"{FLOW} --lora-rank 2 --ema 0.5 --lr 0.01 --micro-batch 2"),
    "grpo": (train_grpo, f"{GRPO} --ema 0.5 --inner-epochs 2 --minibatches 2 --micro-batch 1 --lr-schedule constant"),
    "grpo, adapters": (train_grpo, f"{GRPO} --lora-rank 2 --lr 0.01"),
}
BOTH = ("flow, adapters", "grpo")
REWARD = """import os, shutil
calls = []

def mine(prompts, completions):
    calls.append(1)
    {}
    return [float(sum(map(ord, text))) for text in completions]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder in which runs start: two prompts, two problems, a reward."""
    home = tmp_path_factory.mktemp("home")
    (home / "two.txt").write_text("a green two\na blue nine\n")
    jsonl(home / "p.jsonl", ("17+48=", 65), ("29+34=", 63))
    return home


@pytest.fixture(autouse=True)
def quick(home, monkeypatch):
    """No pictures: what they show is in the checkpoints."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(plots, "pyplot", lambda file: None)
    (home / "mine.py").write_text(REWARD.format(""))


@pytest.fixture(scope="module")
def whole(home):
    """-> a function of the case: the folder of a run that nothing stopped, with all its checkpoints, and its seconds."""
    runs = {}

    def of(case):
        if case not in runs:
            begun = time.monotonic()
            start(case, home / case)
            runs[case] = home / case, time.monotonic() - begun
        return runs[case]

    return of


@pytest.fixture
def stopped(whole, tmp_path):
    """-> a function of the case and a round: a copy of the whole run as it was after that round."""

    def of(case, round):
        source, out = whole(case)[0], tmp_path / "cut"
        shutil.copytree(source, out)
        for number, folder in checkpoint.steps(out).items():
            if number > round:
                shutil.rmtree(folder)
        return out

    return of


def start(case, out, *options):
    script, words = CASES[case]
    return script.main([*words.split(), "--out", str(out), *map(str, options)])


def resume(case, out, *options):
    return CASES[case][0].main(["--resume", "--out", str(out), *map(str, options)])


def left(out):
    """{relative path: bytes} of all that a run wrote."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def differing(run, whole):
    a, b = left(run), left(whole)
    return {name for name in {*a, *b} if a.get(name) != b.get(name)}


def in_a_child(call):
    """Starts `call` in a forked process, whose exit status is 0 where it returns and 99 where it fails; -> its number."""
    if child := os.fork():
        return child
    status = 99
    with contextlib.suppress(Exception), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        try:
            call()
            status = 0
        except SystemExit as end:
            status = end.code
    os._exit(status)


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ------------------------------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize("case, steps", list(zip(CASES, (2, 2, 4, 1))))  # gradient steps of a round
def test_a_stopped_run_ends_like_one_that_was_not(tmp_path, whole, monkeypatch, capsys, case, steps):
    script, calls = CASES[case][0], itertools.count(1)
    step, stops = script.optimizer_step, {steps + 1: signal.SIGTERM, 2 * steps + 1: signal.SIGINT}  # in rounds 2 and 3

    def signalled(*args):
        if number := stops.get(next(calls)):
            os.kill(os.getpid(), number)
        return step(*args)

    whole(case)
    monkeypatch.setattr(script, "optimizer_step", signalled)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for call, code, name, done in ((start, 143, "SIGTERM", 2), (resume, 130, "SIGINT", 3)):
        with pytest.raises(SystemExit) as stop:
            call(case, tmp_path / "cut")
        assert stop.value.code == code and {number: signal.getsignal(number) for number in before} == before
        *_, last = capsys.readouterr().out.splitlines()
        assert re.fullmatch(rf"{name} after round {done}; to go on: .* --resume --out {tmp_path / 'cut'}", last)
        assert lines(tmp_path / "cut")[-1]["round"] == done == max(checkpoint.steps(tmp_path / "cut"))
    resume(case, tmp_path / "cut")
    assert not differing(tmp_path / "cut", whole(case)[0])
    table = capsys.readouterr().out.partition("round 4/4")[2].partition("\n")[2].partition("\n")[2]
    resume(case, tmp_path / "cut")
    printed = capsys.readouterr().out
    assert f"the run is finished after round 4, from {tmp_path / 'cut' / 'checkpoints' / 'step-4'}" in printed
    assert printed.endswith(table) and "reward " in table and not differing(tmp_path / "cut", whole(case)[0])


def test_the_command_that_a_stopped_script_prints_goes_on(tmp_path, capsys):
    out = tmp_path / "my run"
    command = [sys.executable, str(ROOT / "train_grpo.py"), *CASES["grpo"][1].split(), "--rounds", "500", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as process:
        for line in process.stdout:
            if line.startswith("round 1/"):
                process.send_signal(signal.SIGINT)
                break
        printed, errors = process.communicate()
    *_, last = printed.splitlines()
    assert process.returncode == 130 and last.startswith("SIGINT after round ") and "a second signal" in errors
    python, script, *options = shlex.split(last.partition("to go on: ")[2])
    assert (python, script) == (sys.executable, str(ROOT / "train_grpo.py"))
    done = max(checkpoint.steps(out))
    assert "has 500; expected as many" in scripts.refused(
        capsys, lambda: train_grpo.main([*options, "--rounds", str(done + 1)])
    )


# ------------------------------------------------------------------------------------------------------------------- kills

EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}


def kill_at(number):
    """The process dies, as by kill -9, before its file operation of this number; an audit hook sees each that Python makes."""
    left, fsync = itertools.count(1), os.fsync

    def hook(event, args):
        written = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (event in EVENTS or written) and next(left) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda descriptor: (hook("os.chmod", ()), fsync(descriptor))  # it has no event of its own
    sys.addaudithook(hook)


@pytest.mark.parametrize("case", BOTH)
def test_a_kill_at_any_file_operation_of_a_checkpoint_loses_nothing(tmp_path, whole, stopped, case):
    # A run is killed while it writes step-3 and removes step-1. Where kills leave equal bytes, older checkpoints apart, a run
    # goes on alike: one resume is enough.
    before = stopped(case, 2)
    state = safetensors.Checkpoint(whole(case)[0] / "checkpoints" / "step-3" / checkpoint.STATE)
    memory = json.loads((state.path.parent / checkpoint.MEMORY).read_text())
    memory = values.join(memory, state.read)
    tensors = {name: state.read(name) for name in state.shapes if not name.startswith("memory.")}
    for name, size in memory["logs"].items():
        os.truncate(before / name, size)
    kinds = {}
    for number in itertools.count(1):
        out = tmp_path / f"killed-{number}"
        shutil.copytree(before, out)
        child = in_a_child(lambda: (kill_at(number), checkpoint.save(out, memory, tensors)))
        if (status := status_of(child)) == 0:
            break
        assert status == -signal.SIGKILL
        checkpoint.sweep(out)
        read = ((name, content) for name, content in left(out).items() if not re.search(r"/step-[01]/", name))
        kinds.setdefault((checkpoint.newest_whole(out).name, *sorted(read)), out)
    assert number > 20 and {kind[0] for kind in kinds} == {"step-2", "step-3"}
    for out in kinds.values():
        resume(case, out)
        removed = {path.parent.name for path in map(Path, differing(out, whole(case)[0]))}
        assert removed <= {"step-0", "step-1"}  # here no --keep-every


def killed_at_random(out, whole, case, seed):
    child = in_a_child(lambda: start(case, out, "--resume"))
    time.sleep(random.Random(seed).uniform(0, whole(case)[1]))
    os.kill(child, signal.SIGKILL)
    status_of(child)
    start(case, out, "--resume")  # goes on, or starts where there is nothing yet
    assert not differing(out, whole(case)[0])


@pytest.mark.parametrize("case", BOTH)
def test_a_killed_run_goes_on(tmp_path, whole, case):
    whole(case)
    killed_at_random(tmp_path / "killed", whole, case, case)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_any_instant_goes_on(tmp_path, whole, case, seed):
    whole(case)
    killed_at_random(tmp_path / "killed", whole, case, seed)


# ------------------------------------------------------------------------------------------------------------------ options


def test_options_that_change_the_run_are_refused(home, stopped, capsys):
    out = stopped("grpo", 2)
    before, config = left(out), out / "config.json"
    (home / "other.jsonl").write_text((home / "p.jsonl").read_text().replace("17+48", "18+48"))
    for options, message in (
        (["--lr", 0.5], f"--lr 0.5: the run in {out} has 0.0008; expected no option that changes the run"),
        (["--no-eval-first"], "--eval-first False: the run in"),
        (["--reward", "format"], "--reward ['format']: the run in"),
        (["--lr-schedule", "linear"], "--lr-schedule linear: the run in"),
        (["--rounds", 3], f"--rounds 3: the run in {out} has 4; expected as many or more"),
        (["--problems", "other.jsonl"], f"--problems other.jsonl: not what the run in {out} began with"),
        (["--adapter", home], f"--adapter {home}: not what the run in {out} began with"),
    ):
        assert message in scripts.refused(capsys, lambda: resume("grpo", out, *options)), options
        assert left(out) == before
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 1'))  # by hand: the checkpoint knows better
    assert "--seed 1: the run in" in scripts.refused(capsys, lambda: resume("grpo", out))
    assert "--resume: expected with --out" in scripts.refused(capsys, lambda: train_grpo.main(["--resume"]))


def test_options_that_do_not_change_it_may_be_given_and_rounds_may_grow(home, whole, stopped, tmp_path, capsys):
    out = tmp_path / "run"
    start("grpo", out, "--rounds", 2)
    (home / "moved.jsonl").write_text((home / "p.jsonl").read_text())
    resume("grpo", out, "--rounds", 4, "--micro-batch", 1, "--problems", "moved.jsonl")
    again = ("config.json", *(f"checkpoints/step-{n}/{name}.json" for n in range(5) for name in ("state", "manifest")))
    assert differing(out, whole("grpo")[0]) == set(again)  # they tell --rounds and --problems
    config = json.loads((out / "config.json").read_text())
    assert (config["rounds"], config["problems"]) == (4, "moved.jsonl")
    out = stopped("flow", 4)
    line = scripts.refused(capsys, lambda: resume("flow", out, "--rounds", 5))
    assert f"--rounds 5: the run in {out} has 4, and --lr-schedule cosine needs it" in line


# ------------------------------------------------------------------------------------------------------------------- faults


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(whole, stopped, capsys):
    out = stopped("grpo", 3)
    newest, older = (out / "checkpoints" / f"step-{number}" for number in (3, 2))
    state, manifest = (newest / name for name in ("state.safetensors", "manifest.json"))
    content = {file: file.read_bytes() for file in (state, manifest)}
    flipped = bytearray(content[state])
    flipped[len(flipped) // 2] ^= 1
    for file, damaged, why in (
        (state, bytes(flipped), "state.safetensors is not what manifest.json says"),
        (state, content[state][:-1], "state.safetensors is not what manifest.json says"),
        (state, None, "'state.safetensors' is missing"),
        (manifest, None, "manifest.json: no such file"),
        (manifest, b"[]", "manifest.json: expected a JSON object"),
        (manifest, b"{}", "state.safetensors is not what manifest.json says"),
        (manifest, b'{"../../p.jsonl": 1}', "is not what manifest.json says"),
    ):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert why in checkpoint.damage(newest), why
        assert checkpoint.newest_whole(out) == older
        assert f"warning: {newest} is damaged ({checkpoint.damage(newest)}) and is not used\n" in capsys.readouterr().out
        file.write_bytes(content[file])
    assert checkpoint.damage(newest) is None
    state.unlink()
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"round": 5, "rew')  # torn
    (out / "checkpoints" / ".step-4.tmp").mkdir()
    resume("grpo", out)
    assert f"goes on after round 2, from {older}" in capsys.readouterr().out
    assert not differing(out, whole("grpo")[0]) and not list(out.rglob(".*"))
    for folder in checkpoint.steps(out).values():
        (folder / "state.json").unlink()
    line = scripts.refused(capsys, lambda: resume("grpo", out))
    assert line == f"error: {out / 'checkpoints'}: no checkpoint in it is whole; expected one\n"


def test_a_log_that_lost_lines_is_refused(stopped, capsys):
    log = stopped("grpo", 4) / "metrics.jsonl"
    size = log.stat().st_size
    log.write_text("")
    line = scripts.refused(capsys, lambda: resume("grpo", log.parent))
    assert f"{log}: has 0 bytes; expected the {size} that the run wrote before its checkpoint" in line


def test_a_finished_run_without_checkpoints_is_not_begun_again(whole, tmp_path, capsys):
    folder = shutil.copytree(whole("grpo")[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "metrics.jsonl").read_bytes()
    line = scripts.refused(capsys, lambda: resume("grpo", folder))
    assert "the run is finished and has no checkpoint; expected one, or a new folder" in line
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_folder_has_one_run_at_a_time(stopped, capsys):
    out = stopped("grpo", 2)
    with Life() as life:
        life.lock(out)
        assert f"--out {out}: another run has it" in scripts.refused(capsys, lambda: resume("grpo", out))
        assert status_of(in_a_child(lambda: scripts.run_command(lambda: resume("grpo", out)))) == 2
    with pytest.raises(SystemExit):  # a run that fails gives it back
        resume("grpo", out, "--lr", "x")
    with Life() as life:
        life.lock(out)


def test_a_full_disk_or_a_vanished_folder_is_one_line_and_the_last_checkpoint_is_whole(home, whole, tmp_path, capsys):
    def limited():
        limit = (whole("grpo")[0] / "checkpoints" / "step-4" / "state.safetensors").stat().st_size - 1000  # step-0 is smaller
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # a file that grows beyond it fails as on a full disk
        sys.stderr = open(tmp_path / "errors", "w", buffering=1)
        scripts.run_command(lambda: start("grpo", tmp_path / "full"))

    whole("grpo")
    assert status_of(in_a_child(limited)) == 2
    (line,) = (tmp_path / "errors").read_text().splitlines()
    last = tmp_path / "full" / "checkpoints" / "step-0"
    assert re.fullmatch(rf"error: round 1: \S*step-1\S*: cannot be written \(.*too large.*\); last checkpoint: {last}", line)
    resume("grpo", tmp_path / "full")
    assert not differing(tmp_path / "full", whole("grpo")[0])
    gone = tmp_path / "gone"
    (home / "mine.py").write_text(REWARD.format(f"len(calls) == 3 and shutil.rmtree({str(gone)!r})"))
    line = scripts.refused(capsys, lambda: start("grpo", gone))
    assert re.fullmatch(rf"error: (.*: )?{gone}\S*: cannot be written \(No such file or directory\).*\n", line)


@pytest.mark.cuda
@pytest.mark.parametrize("case", BOTH)
def test_a_run_on_cuda_goes_on(tmp_path, case):
    start(case, tmp_path / "whole", "--device", "cuda")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for number in (3, 4):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{number}")
    resume(case, tmp_path / "cut")
    for a, b in zip(lines(tmp_path / "cut"), lines(tmp_path / "whole")):  # kernels of a GPU need not repeat themselves
        assert a["round"] == b["round"] and a.get("reward") == pytest.approx(b.get("reward"), rel=1e-3)


def test_a_round_that_is_not_finite_takes_no_step(home, stopped, tmp_path, capsys, monkeypatch):
    # Calls: the first evaluation, rounds 1 and 2, an evaluation, round 3, …
    out, reward = tmp_path / "run", home / "mine.py"
    reward.write_text(REWARD.format("if len(calls) == 3: return [1.0, 2.0, 3.0, float('nan')]"))
    start("grpo", out)
    rows, printed = lines(out), capsys.readouterr().out
    assert rows[2].keys() == {"round", "skipped", "eval", "eval_error"} and rows[2]["skipped"] == 1 and "loss" in rows[3]
    warning = r"warning: a round without a step: a reward of the prompt '\S+=' is not finite \(mine\); prompts '\S+=', '\S+='\n"
    assert re.search(warning, printed)
    states = [safetensors.Checkpoint(folder / checkpoint.STATE) for _, folder in sorted(checkpoint.steps(out).items())]
    names = [name for name in states[0].shapes if name.startswith(("parameter.", "average."))]
    moved = [any(not torch.equal(a.read(name), b.read(name)) for name in names) for a, b in itertools.pairwise(states)]
    assert moved == [True, False, True, True]

    out = tmp_path / "ends"
    reward.write_text(REWARD.format("if len(calls) > 2: return [float('inf')] * 4"))
    line = scripts.refused(capsys, lambda: start("grpo", out, "--patience-nonfinite", 2, "--eval-every", 4))
    assert "round 3: a reward of the prompt" in line and "2 of --patience-nonfinite 2 such rounds in a row" in line
    assert f"last checkpoint: {out / 'checkpoints' / 'step-2'}" in line
    reward.write_text(REWARD.format("if len(calls) == 1: return [float('inf')] * 4"))
    line = scripts.refused(capsys, lambda: resume("grpo", out))  # the count goes on, too
    assert "round 3: " in line and "2 of --patience-nonfinite 2 such rounds" in line
    reward.write_text(REWARD.format(""))  # mended
    resume("grpo", out)
    assert ["skipped" in row for row in lines(out)] == [False, False, True, False, False]

    out, calls, loss = stopped("flow", 2), itertools.count(1), train_flow.adrpo.flow_loss
    monkeypatch.setattr(train_flow.adrpo, "flow_loss", lambda *args: loss(*args) * (float("nan") if next(calls) == 2 else 1))
    resume("flow", out)  # the second step of round 3
    assert ["skipped" in row for row in lines(out)] == [False, False, False, True, False]
    assert "a round without a step: loss nan, gradient norm nan; prompts 'a " in capsys.readouterr().out
