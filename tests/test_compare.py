"""compare: means and errors over seeds, two stages, the best rate, going on, the scripts' options, a run that fails."""

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
    """Of an invented run: better with the seed, best at the learning rate 3e-4, DPO at 1e-4."""
    best = 1e-4 if options["method"] == "dpo" else 3e-4
    reward = 10.0 * (options["lr"] == best) + options["seed"] + (options["method"] == "raft")
    first = {"reward": 0.0, "joint": 0.0, "clip_diversity": 0.75, "pixel_diversity": 0.5, "w2": 0.0}
    last = {"reward": reward, "joint": reward / 100, "clip_diversity": 0.5, "pixel_diversity": 0.25, "w2": 0.125}
    return [{"round": 0, "eval": first}, {"round": 1, "beta_mean": 0.5}] + [
        {"round": 2, "beta_mean": 1.0 + options["seed"], "eval": last}
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
    settings = {"ADRPO β0=1": {"method": "adrpo", "beta0": 1}, "DPO β=5": {"method": "dpo", "beta-dpo": 5}}
    settings["RAFT"] = {"method": "raft"}
    monkeypatch.setattr(compare.COMPARISONS["flow"], "settings", settings)
    monkeypatch.setattr(compare.COMPARISONS["flow"], "rates", (1e-4, 3e-4))
    return ran


def test_every_setting_has_every_rate_with_seed_0_and_the_best_one_with_the_other_seeds(tmp_path, invented, capsys):
    options = ["flow", "--out", str(tmp_path), "--seeds", "3", "--rounds", "2", "--workers", "1"]
    compare.main(options)
    printed = capsys.readouterr().out
    assert "6 runs, 0 of them finished before" in printed and "9 runs, 3 of them finished before" in printed
    best = {"adrpo": 3e-4, "dpo": 1e-4, "raft": 3e-4}
    ran = [(o["method"], o["lr"], o["seed"]) for o in invented]
    assert ran[:6] == [(method, lr, 0) for method in best for lr in (1e-4, 3e-4)]
    assert ran[6:] == [(method, lr, seed) for seed in (1, 2) for method, lr in best.items()]
    assert all(o["rounds"] == 2 and o.items() > compare.COMPARISONS["flow"].common.items() for o in invented)

    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["rounds"], results["seeds"]) == (2, 3)
    assert [(row["setting"], row["lr"]) for row in results["rows"]] == [("ADRPO β0=1", 3e-4), ("DPO β=5", 1e-4), ("RAFT", 3e-4)]
    assert [(row["lr"], row["final"]["reward"][0]) for row in results["every_rate"]] == [
        (1e-4, 0), (3e-4, 10), (1e-4, 10), (3e-4, 0), (1e-4, 1), (3e-4, 11)
    ]  # fmt: skip
    row = results["rows"][0]
    assert row["final"]["reward"] == pytest.approx([11, 3**-0.5]) and "round" not in row["final"]
    assert [(point["round"], point["reward"]) for point in row["path"]] == [(0, 0), (2, 11)]

    chosen, every = ([line.split(" | ") for line in text.strip().splitlines()] for text in tables_of(tmp_path / "table.md"))
    heading = "| setting | lr | reward | joint | CLIP diversity | pixel diversity | W2 | mean β |"
    assert chosen[0] == every[0] == heading.split(" | ")
    ours = ["11 ± 0.6", "0.11 ± 0.006", "0.5 ± 0", "0.25 ± 0", "0.125 ± 0"]
    assert (
        chosen[2:]
        == [
            ["| base model", "–", "0", "0", "0.75", "0.5", "0", "– |"],
            ["| ADRPO β0=1", "0.0003", *ours, "1.25 ± 0.3 |"],  # of .75, 1.25, 1.75
            ["| DPO β=5", "0.0001", *ours, "– |"],
            ["| RAFT", "0.0003", "12 ± 0.6", "0.12 ± 0.006", *ours[2:], "1.25 ± 0.3 |"],
        ]
    )
    assert len(every) == 2 + 1 + 6 and every[4] == ["| ADRPO β0=1", "0.0003", "10", "0.1", "0.5", "0.25", "0.125", "0.75 |"]
    pictures = {"reward_clip_diversity.png", "reward_pixel_diversity.png", "reward_w2.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "results.json", "table.md", "config.json", ".lock"} | pictures

    for removed, again in ((1, 1), (8, 1)):  # of the first stage, of the second
        shutil.rmtree(compare.folder(tmp_path, ran_options := invented[removed]))
        before = len(invented)
        compare.main(options)
        assert invented[before:] == [ran_options] * again
        assert json.loads((tmp_path / "results.json").read_text()) == results


def tables_of(file):
    """The texts of a table.md: of every setting at its best rate, and of every rate."""
    text = file.read_text()
    assert text.startswith(
        "2 rounds, 3 seeds, mean ± standard error.\n\nEvery setting at its best learning rate, by joint with seed 0:"
    )
    return text.split(":\n\n", 1)[1].split("\nEvery learning rate, seed 0:\n\n")


def test_of_one_rate_there_is_nothing_to_choose_and_one_table(tmp_path, invented, monkeypatch):
    monkeypatch.setattr(compare.COMPARISONS["flow"], "rates", (None,))
    monkeypatch.setattr(compare.COMPARISONS["flow"], "columns", None)
    invented_metrics = metrics_of
    monkeypatch.setitem(globals(), "metrics_of", lambda options: invented_metrics({"lr": 3e-4, **options}))
    compare.main(["flow", "--out", str(tmp_path), "--seeds", "2", "--rounds", "2", "--workers", "1"])
    assert [(o["method"], o["seed"]) for o in invented] == [(m, seed) for seed in (0, 1) for m in ("adrpo", "dpo", "raft")]
    assert all("lr" not in o for o in invented)
    text = (tmp_path / "table.md").read_text()
    heading = "| setting | reward | joint | clip_diversity | pixel_diversity | w2 | mean_beta |"
    assert text.startswith(f"2 rounds, 2 seeds, mean ± standard error.\n\n{heading}")
    assert text.count("setting") == 1 and "every_rate" not in json.loads((tmp_path / "results.json").read_text())


@pytest.mark.parametrize("what", ["grpo", "deceptive", "audio"])
def test_language_models_have_reward_and_entropy_over_the_rounds(tmp_path, monkeypatch, capsys, what):
    """Invented runs of five rounds with reward = seed + round and entropy = β0 in each."""

    def train(script, out, options):
        metrics = dict.fromkeys((comparison.judge, *comparison.across, *comparison.up), 0.5)
        rows = [{"round": n, "reward": options["seed"] + n, "entropy": options["beta0"]} for n in range(1, 6)]
        rows = [{"round": 0, "eval": metrics}, *rows[:-1], rows[-1] | {"eval": metrics}]
        (folder := compare.folder(out, options)).mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    comparison = compare.COMPARISONS[what]
    monkeypatch.setattr(compare, "train", train)
    compare.main([what, "--out", str(tmp_path), "--seeds", "2", "--rounds", "5", "--workers", "1"])
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "table.md").read_text()
    lines = written.partition("mean over each fifth of the rounds:")[2].strip().splitlines()
    assert len(lines) == 2 + 2 * len(comparison.settings) and written in capsys.readouterr().out
    for index, (name, options) in enumerate(comparison.settings.items()):
        assert lines[2 + index] == f"| reward | {name} | 1.5 ± 0.5 | 2.5 ± 0.5 | 3.5 ± 0.5 | 4.5 ± 0.5 | 5.5 ± 0.5 |"
        entropy = f"{options['beta0']:.3g} ± 0"
        assert lines[2 + len(comparison.settings) + index] == f"| entropy | {name} | {' | '.join([entropy] * 5)} |"


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
    compare.claim(tmp_path / "flow", "flow"), compare.claim(tmp_path / "grpo", "grpo")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.md").touch()
    with Life() as life:
        life.lock(tmp_path / "flow", ".lock")
        for out, message in (
            (tmp_path / "file", "cannot write there"), (tmp_path / "flow", "another run has it"),
            (tmp_path / "grpo", "holds something else; expected a new or empty folder, or one of compare flow"),
            (tmp_path / "mine", "the folder is not empty; expected a new or empty one"),
        ):  # fmt: skip
            line = refused(capsys, lambda: compare.main(["flow", "--out", str(out)]))
            assert f"--out {out}: {message}" in line and not invented


def test_what_a_killed_comparison_left_half_written_goes(tmp_path, invented):
    compare.claim(tmp_path, "flow")
    (tmp_path / ".table.md.abc.tmp").mkdir(parents=True)
    compare.main(["flow", "--out", str(tmp_path), "--seeds", "1", "--rounds", "2"])
    assert not list(tmp_path.glob(".*.tmp"))


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
        args = script.parse(compare.words(options))
        assert all(getattr(args, key.replace("-", "_")) in (value, [value]) for key, value in options.items())


def test_in_the_flow_a_fixed_beta_has_the_clips_of_adrpo_inside_theory_and_outside():
    clips = {"adrpo": set(), "fixed-beta": set()}
    for options in compare.COMPARISONS["flow"].settings.values():
        if options["method"] in clips:
            clips[options["method"]].add((options["beta0"], options["a-min"], options["a-max"]))
    both = {(0.1, -0.1, 0.1), (0.3, -0.3, 0.3), (0.03, -0.24, 0.24), (0.03, -4, 4)}
    assert clips == {"adrpo": both, "fixed-beta": both | {(0, -4, 4)}}
    settings, default = compare.COMPARISONS["flow"].settings, train_flow.parse([])
    assert {"method": "adrpo", "beta0": default.beta0, "a-min": default.a_min, "a-max": default.a_max} in settings.values()
    assert default.lr in compare.COMPARISONS["flow"].rates and default.beta_unit == "deviation"
    assert {"DPO β=50", "DPO-offline β=50", "ORW-CFM-W2 τ=0.5, β=1", "RAFT"} < settings.keys()


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
        (['{"round": 2, "beta_mean": null}'], f"{file}, line 1: expected a round and, of an evaluation, numbers"),
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
