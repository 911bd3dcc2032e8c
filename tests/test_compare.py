"""compare: means and errors over seeds, the best learning rate, going on, options that the scripts have, a run that fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripts import refused

import train_flow
import train_grpo
from nano_adrpo import compare, errors
from nano_adrpo.training.life import Life

SMALL = {"prompts-per-round": 2, "group-size": 2, "eval-samples": 2, "ode-steps": 2}


def metrics_of(options):
    """Of an invented run: better with the seed, best at the learning rate 3e-4."""
    reward = 10.0 * (options["lr"] == 3e-4) + options["seed"] + (options["method"] == "raft")
    first = {"reward": 0.0, "joint": 0.0, "pixel_diversity": 0.5, "w2": 0.0}
    return [{"round": 0, "eval": first}, {"round": 1, "loss": 1.0}] + [
        {"round": 2, "eval": {"reward": reward, "joint": reward / 100, "pixel_diversity": 0.25, "w2": 0.1}}
    ]  # fmt: skip


@pytest.fixture
def invented(monkeypatch):
    """Runs that take no time. -> the options of those that ran"""
    ran = []

    def train(script, out, options):
        ran.append(options)
        folder = compare.folder(out, options)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics_of(options)))

    monkeypatch.setattr(compare, "train", train)
    settings = {"ADRPO β0=1": {"method": "adrpo", "beta0": 1}, "RAFT": {"method": "raft"}}
    monkeypatch.setattr(compare.COMPARISONS["flow"], "settings", settings)
    monkeypatch.setattr(compare.COMPARISONS["flow"], "rates", (1e-4, 3e-4))
    return ran


def test_every_setting_has_every_rate_and_seed_and_the_best_rate_is_chosen(tmp_path, invented, capsys):
    options = ["flow", "--out", str(tmp_path), "--seeds", "2", "--rounds", "2", "--workers", "1"]
    compare.main(options)
    assert len(invented) == 8 and "8 runs, 0 of them finished before" in capsys.readouterr().out
    assert {(o["method"], o["lr"], o["seed"], o["rounds"], o["eval-every"]) for o in invented} == {
        (method, lr, seed, 2, 10) for method in ("adrpo", "raft") for lr in (1e-4, 3e-4) for seed in (0, 1)
    }
    results = json.loads((tmp_path / "results.json").read_text())
    row = results["rows"][1]
    assert (row["setting"], row["lr"], results["rounds"], results["seeds"]) == ("ADRPO β0=1", 3e-4, 2, 2)
    assert row["final"]["reward"] == pytest.approx([10.5, 0.5]) and "round" not in row["final"]
    assert [(point["round"], point["reward"]) for point in row["path"]] == [(0, 0), (2, 10.5)]
    best, every = (tmp_path / "table.md").read_text().split("Every learning rate:")
    assert "Every setting at its best learning rate, by joint" in best and "2 rounds, 2 seeds" in best
    lines = best.strip().splitlines()[-3:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| base model", "–"],
        ["| ADRPO β0=1", "0.0003"],
        ["| RAFT", "0.0003"],
    ]
    assert len(every.strip().splitlines()) == 2 + 1 + 4
    pictures = {"reward_pixel_diversity.png", "reward_w2.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "results.json", "table.md", ".lock"} | pictures

    shutil.rmtree(compare.folder(tmp_path, invented.pop(3)))
    invented.clear()
    compare.main(options)
    assert len(invented) == 1 and "8 runs, 7 of them finished before" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_a_run_is_the_training_script_in_a_process_of_its_own_which_ends_with_the_comparison_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # --out counts from there
    (tmp_path / "mine.py").write_text(WAITS.format(str(tmp_path)))
    options = {"method": "raft", "seed": 1, "rounds": 1, **SMALL, "eval-prompts": 1, "reward": f"{tmp_path}/mine.py:mine"}
    out = tmp_path.relative_to(tmp_path) / "out"
    if (comparison := os.fork()) == 0:
        compare.train("train_flow", out, options)
    until(lambda: (tmp_path / "waits").exists())  # in round 1, behind the two calls of the first evaluation
    child = int((tmp_path / "waits").read_text())
    os.kill(comparison, signal.SIGKILL)
    os.waitpid(comparison, 0)
    until(lambda: not runs(child))
    compare.train("train_flow", out, options)
    folder = (
        tmp_path / "out" / "runs" / "method=raft_seed=1_rounds=1_prompts-per-round=2_group-size=2_eval-samples=2_ode-steps=2"
        "_eval-prompts=1_reward=mine.py.mine"
    )
    config = json.loads((folder / "config.json").read_text())
    assert all(config[name.replace("-", "_")] in (value, [value]) for name, value in options.items())
    assert [evaluation["round"] for evaluation in compare.read(tmp_path / "out", options)] == [0, 1]
    assert (tmp_path / "calls").stat().st_size == 3 + 3  # round 1 alone was done again, with its evaluation
    assert [path.name for path in folder.parent.iterdir()] == [folder.name] and not (folder / "checkpoints").exists()


def until(true):
    """Waits for it, at most a minute."""
    for _ in range(1200):
        if true():
            return
        time.sleep(0.05)
    raise TimeoutError


def runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


WAITS = """import os, pathlib, time

def mine(images, prompts):
    here = pathlib.Path({!r})
    with open(here / "calls", "a") as file:
        file.write(".")
    if os.path.getsize(here / "calls") == 3:
        (here / "new").write_text(str(os.getpid()))
        (here / "new").rename(here / "waits")
        time.sleep(600)
    return images.mean(dim=(1, 2, 3))
"""


def test_what_a_run_left_is_checked(tmp_path):
    options = {"method": "raft", "rounds": 2}
    folder = compare.folder(tmp_path, options)
    assert compare.read(tmp_path, options) is None
    folder.mkdir(parents=True)
    for content, message in (
        (None, "metrics.jsonl: no such file"),
        ('{"round": 0, "eval": {"w2": 0}}\n{"round": 2, "ev', "metrics.jsonl, line 2: not valid JSON"),
        (
            '{"round": 0, "eval": {"w2": 0}}\n{"round": 1}\n',
            "metrics.jsonl: is not that of a whole run; expected the evaluation of",
        ),
        ('{"eval": {"w2": 0}}\n', "metrics.jsonl, line 1: expected a round and, of an evaluation, numbers"),
        ('{"round": 2, "eval": {"w2": "low"}}\n', "metrics.jsonl, line 1: expected a round and, of an evaluation, numbers"),
        ("", "metrics.jsonl: is not that of a whole run; expected the evaluation of round 2"),
    ):
        if content is not None:
            (folder / "metrics.jsonl").write_text(content)
        with pytest.raises(errors.InputError) as error:
            compare.read(tmp_path, options)
        assert str(error.value).startswith(str(folder)) and message in str(error.value)


def test_a_folder_that_cannot_be_written_to_or_has_a_comparison_is_refused_before_work(tmp_path, invented, capsys):
    (tmp_path / "file").touch()
    with Life() as life:
        life.lock(tmp_path, ".lock")
        for out, message in ((tmp_path / "file", "cannot write there"), (tmp_path, "another run has it")):
            line = refused(capsys, lambda: compare.main(["flow", "--out", str(out)]))
            assert f"--out {out}: {message}" in line and not invented


def test_a_failing_run_stops_the_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare.COMPARISONS["flow"], "settings", {"broken": {"method": "adrpo", "beta0": -1}})
    monkeypatch.setattr(compare.COMPARISONS["flow"], "rates", (None,))
    with pytest.raises(SystemExit) as stop:
        errors.run_command(lambda: compare.main(["flow", "--out", str(tmp_path), "--seeds", "1", "--rounds", "1"]))
    assert stop.value.code == 2
    assert "exit status 2: error: argument --beta0: -1 is not a positive number" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(compare.COMPARISONS))
def test_the_scripts_have_the_options_of_every_setting(name):
    comparison = compare.COMPARISONS[name]
    script = {"train_flow": train_flow, "train_grpo": train_grpo}[comparison.script]
    for options in comparison.settings.values():
        options = {**options, **comparison.common, "seed": 1, "rounds": 2, "lr": 1e-3}
        args = script.parse([word for key, value in options.items() for word in (f"--{key}", str(value))])
        assert all(getattr(args, key.replace("-", "_")) in (value, [value]) for key, value in options.items())


def test_in_the_flow_a_fixed_beta_has_the_clips_of_adrpo():
    clips = {"adrpo": set(), "fixed-beta": set()}
    for options in compare.COMPARISONS["flow"].settings.values():
        if options["method"] in clips:
            clips[options["method"]].add((options["beta0"], options.get("a-min"), options.get("a-max")))
    assert (
        clips["adrpo"]
        == clips["fixed-beta"]
        == {(0.03, None, None), (0.1, None, None), (0.3, None, None), (0.1, -0.1, 0.1), (0.3, -0.3, 0.3)}
    )


def test_a_run_that_is_not_whole_is_named(tmp_path):
    options = {"method": "raft", "seed": 0, "rounds": 2}
    file = compare.folder(tmp_path, options) / "metrics.jsonl"
    assert compare.read(tmp_path, options) is None
    file.parent.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"^{file}: no such file"):
        compare.read(tmp_path, options)
    whole = [json.dumps(row) for row in metrics_of({"lr": 1e-3, "seed": 0, "method": "raft"})]
    for lines, message in (
        (whole[:1], f"{file}: is not that of a whole run; expected the evaluation of round 2. Without its folder"),
        ([*whole[:2], whole[2][:20]], f"{file}, line 3: not valid JSON"),
        (['{"round": "2", "eval": {"reward": 1}}'], f"{file}, line 1: expected a round and, of an evaluation, numbers"),
        (['{"round": 2, "eval": {"reward": []}}'], f"{file}, line 1: expected a round and, of an evaluation, numbers"),
        (['{"round": 2, "eval": 3}'], f"{file}, line 1: key 'eval' is 3; expected a JSON object"),
    ):
        file.write_text("\n".join(lines))
        with pytest.raises(errors.InputError) as error:
            compare.read(tmp_path, options)
        assert str(error.value).startswith(message)


def test_an_out_that_cannot_be_written_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "train", lambda *_: pytest.fail("work has begun"))
    (tmp_path / "file").touch()
    with pytest.raises(errors.InputError, match="file/out: cannot write there"):
        compare.main(["flow", "--out", str(tmp_path / "file" / "out")])


def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / "endless.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    worker = subprocess.Popen([sys.executable, "-c", compare.WORKER, "endless"], **pipes)
    assert worker.stdout.readline() == "begun\n"
    worker.stdin.close()  # as the system does for a process that was killed
    with worker.stdout:
        assert worker.wait(timeout=30) == 1
