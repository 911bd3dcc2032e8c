"""training/run.py: the run folder, phases, what an error names."""

import argparse
import contextlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nano_adrpo.errors import InputError, NotFinite
from nano_adrpo.training import run
from nano_adrpo.training.life import Life, refuse_used


def test_a_folder_is_claimed_by_one_run(tmp_path):
    def claim(seed):
        try:
            return run.claim(tmp_path / "run", "unused", {"seed": seed}, lives[seed])
        except InputError as error:
            return str(error)

    lives = [Life() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(claim, range(8)))
    (winner,) = [seed for seed, result in enumerate(results) if result == tmp_path / "run"]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"seed": winner}
    refusals = [result for result in results if isinstance(result, str)]
    assert len(refusals) == 7 and all(result.startswith(f"--out {tmp_path / 'run'}: ") for result in refusals)
    lives[winner].close()  # it ended; the folder stays its own
    with pytest.raises(InputError, match="another run has it"):
        run.claim(tmp_path / "run", "unused", {}, Life())


def test_of_two_processes_one_gets_the_folder(tmp_path):
    for pair in range(12):
        (start, starts), (end, ends) = os.pipe(), os.pipe()
        for seed in range(2):
            if os.fork() == 0:
                try:
                    os.read(start, 1)  # both begin at once
                    run.claim(tmp_path / str(pair), "unused", {"seed": seed}, life := Life())
                    os.read(end, 1)  # and the one that has it lives until the other is through
                    os._exit(life is None)
                except InputError as error:
                    os._exit(2 if "another run has it" in str(error) else 3)
        os.write(starts, b"xx")
        _, first = os.wait()
        os.write(ends, b"x")
        _, other = os.wait()
        assert (os.waitstatus_to_exitcode(first), os.waitstatus_to_exitcode(other)) == (2, 0), pair
        for descriptor in (start, starts, end, ends):
            os.close(descriptor)


def test_the_default_folder_is_the_next_new_one(tmp_path):
    folders = [run.claim(None, tmp_path / "flow", {}, Life()) for _ in range(3)]
    assert [folder.name for folder in folders] == ["flow", "flow-2", "flow-3"]


def test_a_folder_that_is_not_empty_or_not_writable_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    for path, message in (("run", "the folder is not empty"), ("run/notes", ""), ("run/notes/deeper", "cannot write there")):
        with pytest.raises(InputError, match=f"--out {tmp_path / path}: .*{message}"):
            run.claim(tmp_path / path, "unused", {}, Life())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes"] and (tmp_path / "run" / "notes").read_text() == "mine"
    assert run.claim(tmp_path / "new", "unused", {}, Life()) == tmp_path / "new"


def test_only_what_a_run_left_is_taken_up(tmp_path):
    for left, resume, refused in (
        ({"config.json": "{}"}, False, "expected a new or empty one"),
        ({"config.json": "{}", "notes": "mine"}, True, None),
        ({"metrics.jsonl": "", ".config.json.17.tmp": "{"}, True, None),  # killed while it claimed the folder
        ({"metrics.jsonl": "mine"}, True, "expected a run or a new or empty one"),
        ({"notes": "mine"}, True, "expected a run or a new or empty one"),
    ):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        for name, content in left.items():
            (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=refused) if refused else contextlib.nullcontext():
            refuse_used(tmp_path, resume)


def test_torchrun_is_refused_by_commands_that_are_one_process(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE is 2: expected one process"):
        run.new_folder(tmp_path)


def test_an_error_in_a_round_names_it(tmp_path):
    phases, args = run.Phases("cpu"), argparse.Namespace(rollout_batch=None)
    phases.begin("update")
    with pytest.raises(NotFinite, match="^round 3: loss nan; last checkpoint: none yet$"):
        with run.at_round(args, tmp_path, 3, phases):
            raise NotFinite("loss nan")
    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)
    last = tmp_path / "checkpoints" / "step-2"
    with pytest.raises(ValueError, match="^a bug") as bug, run.at_round(args, tmp_path, 3, phases):
        raise ValueError("a bug")
    assert bug.value.__notes__ == [f"In round 3; last checkpoint: {last}"]
    for options, batch in ((args, "--rollout-batch"), (argparse.Namespace(), "--eval-batch")):
        with pytest.raises(InputError) as full, run.at_round(options, tmp_path, 3, phases):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB"
            )
        assert str(full.value) == (
            "round 3, update: out of GPU memory, 2.50 GiB more were asked for; less is needed with a smaller --micro-batch or "
            f"{batch}, or with --gradient-checkpointing; last checkpoint: {last}"
        )


def test_rounds_that_are_not_finite_are_skipped_and_counted(capsys):
    args, memory, seen = argparse.Namespace(patience_nonfinite=3), {"skipped": 0}, []
    for fails in (True, True, False, True, True):
        with run.skipping(args, memory) as (values, involved):
            involved += ["a green two", "a blue nine"]
            if fails:
                raise NotFinite("loss nan")
        seen.append((memory["skipped"], values))
    assert seen == [(1, {"skipped": 1}), (2, {"skipped": 1}), (0, {}), (1, {"skipped": 1}), (2, {"skipped": 1})]
    line = "warning: a round without a step: loss nan; prompts 'a green two', 'a blue nine'"
    assert capsys.readouterr().out.splitlines() == [line] * 4
    with pytest.raises(NotFinite, match="loss nan; prompts 'a', 'b', 'c', …; 3 of --patience-nonfinite 3 such rounds in a row"):
        with run.skipping(args, memory) as (values, involved):
            involved += "abcd"
            raise NotFinite("loss nan")
    with pytest.raises(NotFinite, match="^logits$"), run.skipping(args, {"skipped": 0}):  # nothing was drawn: round 0
        raise NotFinite("logits")


def test_phases_add_up_and_start_anew():
    phases = run.Phases("cpu")
    for name in ("rollout", "update", "rollout"):
        phases.begin(name)
        torch.ones(10).sum()
    line = phases.take()
    assert re.fullmatch(r"rollout \d+\.\d\d s \d+\.\d GiB  update \d+\.\d\d s \d+\.\d GiB", line)
    assert float(line.split()[3]) > 0.05  # the process itself
    assert phases.take() == ""


@pytest.mark.cuda
def test_phases_tell_the_most_memory_of_each():
    phases = run.Phases("cuda")
    for name, size in (("large", 2**28), ("small", 2**20)):
        phases.begin(name)
        torch.empty(size, device="cuda").fill_(1)
    large, small = (float(word) for word in phases.take().split()[3::5])
    assert large > 0.9 > small


def test_the_log_tells_the_time_left_and_keeps_it_out_of_the_file(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 106.0])  # made; after the first evaluation; after rounds 1 and 2
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    log = run.Log(tmp_path / "metrics.jsonl", 4000)
    log.write(0, {"eval": {"reward": 1.0, "w2": 0.5}, "eval_error": {"reward": 0.25}}, "evaluation 100.00 s")
    log.write(1, {"reward": 2.0}, "update 0.10 s")
    log.write(2, {"reward": 3.0})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"round": 0, "eval": {"reward": 1.0, "w2": 0.5}, "eval_error": {"reward": 0.25}},
        {"round": 1, "reward": 2.0},
        {"round": 2, "reward": 3.0},
    ]
    assert capsys.readouterr().out.splitlines() == [
        "round 0/4000  evaluation 100.00 s",
        "  eval  reward 1 ± 0.25  w2 0.5",
        "round 1/4000  reward 2  update 0.10 s  2 s/round  2:13:18 left",
        "round 2/4000  reward 3  3 s/round  3:19:54 left",
    ]


def test_the_time_left_of_a_run_that_goes_on_counts_its_own_rounds(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 5.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    run.Log(tmp_path / "metrics.jsonl", 12).write(10, {})
    assert capsys.readouterr().out == "round 10/12  5 s/round  0:00:10 left\n"


def test_the_closing_table_has_errors_where_they_are_known(capsys):
    first, last = ({"reward": 0.5, "w2": 0.0}, {"reward": 0.125}), ({"reward": 0.75, "w2": 0.25}, {"reward": 0.0625})
    run.print_table({"training": (first, last), "held out": (last, last)})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        "training held out".split(),
        "reward 0.5000 ± 0.12 -> 0.7500 ± 0.062 0.7500 ± 0.062".split(),
        "w2 0.0000 -> 0.2500 0.2500".split(),
    ]
