"""evaluate_mmau: the paper's Tables 2 and 3 from predictions, models and run folders; the commands of docs/audio.md."""

import json
import math
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import scripts
import tiny_omni
import torch
from tokenizers import Tokenizer

import train_grpo
from nano_adrpo import demo, evaluate_mmau, lora, sample
from nano_adrpo.errors import InputError
from nano_adrpo.evaluation import mmau
from nano_adrpo.files import wav
from nano_adrpo.models.omni import Omni
from nano_adrpo.training.options import saved

ROOT = Path(evaluate_mmau.__file__).parents[1]
TASKS = ("sound", "music", "speech")


def run(*options):
    return evaluate_mmau.main([str(option) for option in options])


@pytest.fixture
def questions(tmp_path):
    """Twelve questions, four a task."""
    rows = [
        {"id": f"q{i}", "audio_id": f"./audio/q{i}.wav", "question": "Which?", "choices": ["high", "low"], "answer": "high",
         "task": TASKS[i % 3], "difficulty": ("easy", "hard")[i % 2], "sub-category": "Pitch"} for i in range(12)
    ]  # fmt: skip
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    return tmp_path / "questions.json"


def answers(file, right, wrong=(), key="model_output", **more):
    """A file of predictions: right and wrong ones of these questions' numbers, none of the others."""
    said = [{"id": f"q{i}", key: "high" if i in right else "low", **more} for i in (*right, *wrong)]
    file.write_text(json.dumps(said))
    return file


def official(file):
    """What the official script counts in a file: {task: [right, rows]} and the total, of rows with "model_output"."""
    counts = {}
    for row in json.loads(file.read_text()):
        if "model_output" in row:
            for name in (row["task"], "total"):
                counts.setdefault(name, [0, 0])
                counts[name][0] += row["model_output"].lower().split() == row["answer"].lower().split()
                counts[name][1] += 1
    return counts


def row_of(table, name):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_table_2_of_any_systems(tmp_path, questions, capsys):
    a = answers(tmp_path / "a.json", (0, 1, 2, 3, 4, 5, 6), (7, 8, 9, 10, 11))
    b = answers(tmp_path / "b.json", (0, 1, 2), (3,), key="model_prediction")  # eight unanswered
    out = tmp_path / "out"
    run("--systems", f"Gemini={a}", f"GPT-4o={b}", "--questions", questions, "--out", out)
    text = (out / "table.md").read_text()
    assert text.rstrip() in capsys.readouterr().out and "## Table 3" not in text
    table = text.split("## Table 2")[1].split("## Diff")[0]
    low, high = (100 * bound for bound in mmau.interval(7, 12))
    assert row_of(table, "Gemini")[3:] == [f"58.33 [{low:.1f}, {high:.1f}]", "12 of 12", "58.33"]
    assert [cell.split()[0] for cell in row_of(table, "Gemini")[:3]] == ["75.00", "50.00", "50.00"]
    assert [cell.split()[0] for cell in row_of(table, "GPT-4o")[:4]] == ["25.00"] * 4
    assert row_of(table, "GPT-4o")[4:] == ["4 of 12", "75.00"]
    assert row_of(table, "*the paper's ADRPO*")[0].startswith("81.98 [") and "+0.9 standard errors" in table
    assert row_of(text, "GPT-4o | Gemini")[1].startswith("-33.33 [") and row_of(text, "GPT-4o | Gemini")[3:] == ["0", "4"]
    by_difficulty = text.split("## By difficulty")[1]
    assert [cell.split()[0] for cell in row_of(by_difficulty, "easy")] == ["6", "66.67", "33.33"]
    assert row_of(by_difficulty, "Pitch")[0] == "12"
    # The same numbers for the official script, in its own denominators.
    assert official(out / "predictions" / "Gemini.0.json")["total"] == [7, 12]
    counted = official(out / "predictions" / "GPT-4o.0.json")
    assert counted == {"sound": [1, 2], "music": [1, 1], "speech": [1, 1], "total": [3, 4]}
    stored = json.loads((out / "results.json").read_text())
    assert stored["systems"][1]["runs"] == [{
        "answered": 4, "total": [3, 12], "task": {"sound": [1, 4], "music": [1, 4], "speech": [1, 4]},
        "difficulty": {"easy": [2, 6], "hard": [1, 6]}, "sub-category": {"Pitch": [3, 12]},
    }]  # fmt: skip


def test_the_demos_questions_are_the_default(tmp_path, capsys):
    rows = [json.loads(line) for line in Path(demo.AUDIO["held_out"]).read_text("utf-8").splitlines()]
    (tmp_path / "all.json").write_text(json.dumps([{"id": row["id"], "model_output": row["answer"]} for row in rows]))
    run("--systems", f"all={tmp_path / 'all.json'}", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.startswith(f"{len(rows)} questions of held_out.jsonl (72 sound, 72 music, 72 speech)")
    assert row_of(text, "all")[3].startswith("100.00 [98.")


def test_several_runs_of_a_system_give_the_standard_error(tmp_path, questions):
    files = [answers(tmp_path / f"{i}.json", range(i), range(i, 12)) for i in (3, 6, 9)]
    systems = [*(f"ours={file}" for file in files), f"other={files[0]}"]
    run("--systems", *systems, "--questions", questions, "--out", tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert row_of(text, "ours")[3:] == [f"50.00 ± {100 * 0.25 / 3**0.5:.2f}", "12 of 12", "50.00"]
    assert row_of(text, "other | ours")[1].startswith("-25.00 [")


def test_words_on_the_console_about_letters_and_versions(tmp_path, questions, capsys):
    rows = json.loads(questions.read_text())
    rows[0] |= {"choices": ["(A) high", "(B) low"], "answer": "(A) high"}
    questions.write_text(json.dumps(rows))
    file = answers(tmp_path / "a.json", (0, 1), choices=["high", "low"], answer="low")
    run("--systems", f"a={file}", "--questions", questions, "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert 'questions.json: "(A) ", "(B) ", … removed from choices and answers, in 1 questions' in out
    assert "a.json: 2 rows with another right answer than in" in out
    assert json.loads((tmp_path / "out" / "predictions" / "a.0.json").read_text())[0]["choices"] == ["high", "low"]


# -------------------------------------------------------------------------------------------------------------- models

CLIPS = {f"q{i}": tiny_omni.clip(0.2 + 0.1 * (i % 3), seed=i) for i in range(12)}


@pytest.fixture
def sounds(tmp_path, questions):
    """The questions' WAV files, a tiny Qwen2.5-Omni and an adapter of it."""
    (tmp_path / "audio").mkdir()
    for name, clip in CLIPS.items():
        wav.write_wav(tmp_path / "audio" / f"{name}.wav", clip)
    tiny_omni.folder(tmp_path / "omni")
    model = Omni.from_pretrained(tmp_path / "omni")
    lora.add(model, lora.DECODER_TARGETS, 2, 2, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    lora.save(model, tmp_path / "adapter")
    return ["--questions", questions, "--max-new-tokens", 6]


def completions(out, name):
    return [row["completion"] for row in json.loads((out / "predictions" / f"{name}.0.json").read_text())]


def test_a_model_is_asked_in_the_published_words_and_answers_greedily(tmp_path, sounds):
    run("--systems", f"omni={tmp_path / 'omni'}", *sounds, "--batch", 5, "--out", tmp_path / "out")
    model = Omni.from_pretrained(tmp_path / "omni")
    tokenizer, expected = Tokenizer.from_str(json.dumps(tiny_omni.tokenizer())), []
    for name in CLIPS:
        clip = wav.read_wav(tmp_path / "audio" / f"{name}.wav")
        text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|audio_bos|>"
        text += "<|AUDIO|>" * ((math.ceil(len(clip) / 160) + 1) // 4) + "<|audio_eos|>"
        text += "Which? Please choose the answer from the following options: ['high', 'low']. Output the final answer in "
        text += "<answer> </answer>.<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer.encode(text).ids])
        full, mask = model.generate(ids, torch.ones_like(ids), 6, temperature=0, eos=[tiny_omni.END], clips=[clip])
        expected.append(tokenizer.decode(full[0, ids.shape[1] :][mask[0].bool()].tolist()))
    assert completions(tmp_path / "out", "omni") == expected and len(set(expected)) > 1


def test_an_adapter_and_every_option_of_the_answers_count(tmp_path, sounds, monkeypatch):
    model, out, seen, roll_out = tmp_path / "omni", tmp_path / "out", [], evaluate_mmau.roll_out

    def watched(model, codec, problems, new, longest, **sampling):
        heard = {Path(problem.audio).parent for problem in problems}
        seen.append([problems[0].question[-54:], heard, len(problems), codec.system, codec.stop, codec.template.where,
                     model.lm_head.weight.dtype, new, longest, sampling])  # fmt: skip
        return roll_out(model, codec, problems, new, longest, **sampling)

    monkeypatch.setattr(evaluate_mmau, "roll_out", watched)
    run("--systems", f"omni={model}", f"tuned={model}+{tmp_path / 'adapter'}", *sounds, "--batch", 12, "--out", out)
    assert completions(out, "tuned") != completions(out, "omni")
    assert len(list(tmp_path.glob("questions.json.embeddings/*.safetensors"))) == 12
    plain, other = tmp_path / "plain.jinja", tmp_path / "other"
    plain.write_text("{{ messages[0].content }}{{ messages[1].content }}")
    other.mkdir()
    (tmp_path / "audio").rename(other / "audio2")
    (other / "audio").symlink_to(other / "audio2")
    options = ["--prompt-form", "think", "--audio-folder", other, "--batch", 7, "--system", "Sing.", "--stop", "x", "yz"]
    options += ["--chat-template", plain, "--dtype", "bfloat16", "--max-new-tokens", 3, "--max-prompt-tokens", 999]
    run("--systems", f"omni={model}", *sounds, *options, "--embeddings", tmp_path / "kept", "--out", tmp_path / "all")
    greedy = {"temperature": 0}
    default = ["'low']. Output the final answer in <answer> </answer>.", {tmp_path / "audio"}, 12, None, [],
               "chat_template.json", torch.float32, 6, 8192, greedy]  # fmt: skip
    given = [["hink> </think> and final answer in <answer> </answer>.", {other / "audio"}, count, "Sing.", ["x", "yz"],
              str(plain), torch.bfloat16, 3, 999, greedy] for count in (7, 5)]  # fmt: skip
    assert seen == [default, default, *given] and len(list((tmp_path / "kept").iterdir())) == 12


def test_models_that_do_not_fit_are_refused_before_any_work(tmp_path, sounds, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_mmau, "answers", lambda *args: pytest.fail("work has begun"))
    model, (_, file, *_) = f"omni={tmp_path / 'omni'}", sounds

    def message(*options):
        return scripts.refused(capsys, lambda: run(*sounds, "--out", tmp_path / "out", *options))

    assert "no such file" in message("--systems", f"a={tmp_path / 'audio'}")
    assert "adapter_config.json: no such file" in message("--systems", f"a={tmp_path / 'omni'}+{tmp_path / 'audio'}")
    assert "omni: prompt 0 has 172 tokens" in message("--systems", model, "--max-prompt-tokens", 165)
    assert "the model has 4096 positions" in message("--systems", model, "--max-new-tokens", 4000)
    (tmp_path / "audio" / "q3.wav").write_bytes(b"ID3 and so on")
    assert re.search(r"questions.json: question 'q3': .*q3.wav: an MP3 file; .*ffmpeg", message("--systems", model))
    (tmp_path / "audio" / "q3.wav").unlink()
    assert re.search(r"questions.json: question 'q3': .*q3.wav: no such file", message("--systems", model))
    rows = json.loads(file.read_text())
    del rows[1]["audio_id"]
    file.write_text(json.dumps(rows))
    assert "question 'q1': key 'audio_id': expected the path of an audio file" in message("--systems", model)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def folder(tmp_path):
    """A function that makes the folder of a training run with adapters: its name and what its config.json has."""

    def make(name, **config):
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / name / "adapter").mkdir(parents=True)
        words = "--task audio --problems a --held-out b --prompt-form think --lora-rank 2 --rounds 2 --model".split()
        known = saved(train_grpo.parse([*words, str(tmp_path / "base")]))
        assert config.keys() <= known.keys() and set(evaluate_mmau.ASKED) <= known.keys()
        (tmp_path / name / "config.json").write_text(json.dumps(known | config))
        (tmp_path / name / "metrics.jsonl").write_text('{"round": 0}\n{"round": 1}\n{"round": 2}\n')
        return tmp_path / name

    return make


@pytest.fixture
def said(monkeypatch, tmp_path):
    """Replaces the models: what each says is what stands here under its adapter's run, or its own name. -> that dict, and who
    was asked."""
    texts, asked = {}, []

    def answers(args, entry, problems):
        name = Path(entry.adapter).parent.name if entry.adapter else Path(entry.model).name
        asked.append(name)
        return ["<think>…</think><answer>high</answer>" if i in texts[name] else "<answer>low</answer>" for i in range(12)]

    monkeypatch.setattr(evaluate_mmau, "answers", answers)
    monkeypatch.setattr(evaluate_mmau, "open_model", lambda *args: None)
    monkeypatch.setattr(evaluate_mmau, "as_problems", lambda *args: None)
    return texts, asked


def test_table_3_from_run_folders(tmp_path, questions, folder, said):
    texts, asked = said
    runs = [
        folder("half", a_min=-0.02, a_max=0.02), folder("double", a_min=-0.08, a_max=0.08, seed=5),
        folder("one-0"), folder("one-1", seed=1, a_min=-0.04, device="cuda", eval_every=7), folder("grpo", method="grpo"),
        folder("skew", a_min=-0.04, a_max=0.01),
    ]  # fmt: skip
    texts |= {"base": range(3), "half": range(6), "double": range(9), "one-0": range(12), "one-1": range(6), "grpo": range(4),
              "skew": range(5)}  # fmt: skip
    options = ["--systems", f"base={tmp_path / 'base'}", "--runs", *runs, "--questions", questions, "--out", tmp_path / "out"]
    run(*options)
    assert sorted(asked) == sorted(texts)
    text = (tmp_path / "out" / "table.md").read_text()
    table_2, table_3 = text.split("## Table 2")[1].split("## Differences")[0].split("## Table 3")
    rows = [line.split("|")[1].strip() for line in table_3.splitlines() if line.startswith("| ")][2:]
    ours = ["ADRPO 0.5×β0 [−0.02, 0.02]", "ADRPO 1×β0 [−0.04, 0.04]", "ADRPO 2×β0 [−0.08, 0.08]", "GRPO β=0.04"]
    assert rows[:3] == ours[:3] and rows[5:] == [f"*the paper's {name}*" for name in ours]
    assert set(rows[3:5]) == {"GRPO β=0.04", "ADRPO [−0.04, 0.01]"}
    assert row_of(table_3, ours[0])[0] == "1" and row_of(table_3, ours[0])[-1].startswith("50.00 [")
    assert row_of(table_3, ours[1])[0] == "2" and row_of(table_3, ours[1])[-1] == "75.00 ± 25.00"
    assert row_of(table_3, "*the paper's ADRPO 2×β0 [−0.08, 0.08]*")[1].startswith("84.08 [")
    assert all(f"| {name} |" in table_2 for name in ("base", ours[1], ours[3])) and ours[0] not in table_2
    written = json.loads((tmp_path / "out" / "predictions" / f"{ours[1]}.1.json").read_text())
    assert written[0]["model_output"] == "high" and written[0]["completion"] == "<think>…</think><answer>high</answer>"
    asked.clear()
    texts["one-2"] = range(3)
    run(*options, "--runs", *runs, folder("one-2", seed=2))  # what has answered is not asked again
    assert asked == ["one-2"]
    with pytest.raises(InputError, match="holds an evaluation with another --max-new-tokens"):
        run(*options, "--max-new-tokens", 9)


def test_runs_that_are_no_rows_of_one_table_are_refused(tmp_path, questions, folder, said, capsys):
    one, asked = folder("one"), ["--questions", questions, "--out", tmp_path / "out"]
    bare = folder("bare")
    (bare / "adapter").rmdir()
    for runs, message in (
        ([one, folder("lr", lr=1e-4, seed=1)], "one setting with other --lr; expected other seeds alone"),
        ([one, folder("same")], "one setting with equal --seed 0"),
        ([one, folder("form", prompt_form="answer", beta0=1)], "was trained with --prompt-form 'answer'; expected that here"),
        ([folder("system", system="Sing.")], "was trained with --system 'Sing.'; expected that here, not None"),
        ([folder("flow", method="raft")], "config.json is no run of train_grpo.py's"),
        ([folder("seedless", seed=None)], "config.json is no run of train_grpo.py's"),
        ([bare], "neither adapter/ nor model/ in it"),
        ([folder("running", rounds=3)], "metrics.jsonl: ends with round 2; expected a finished run, of 3"),
        ([folder("gone", model="gone")], "its model 'gone' is not there, seen from the current folder"),
    ):
        assert message in scripts.refused(capsys, lambda runs=runs: run("--runs", *runs, *asked))
    file = answers(tmp_path / "a.json", (0,))
    options = ["--systems", f"ADRPO 1×β0 [−0.04, 0.04]={file}", "--runs", one, *asked]
    assert "is that of --runs; expected another" in scripts.refused(capsys, lambda: run(*options))
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, questions, capsys):
    file = answers(tmp_path / "a.json", (0,))
    asked = ["--questions", questions, "--out", tmp_path / "out"]
    for options, message in (
        ([], "--systems and --runs: expected one of them, or both"),
        (["--systems", "a"], "--systems 'a': expected NAME=MODEL"),
        (["--systems", "a=nowhere.json"], "nowhere.json: no such file or folder"),
        (["--systems", f"a={questions}"], "questions.json: no predictions; expected a text under 'model_output'"),
        (["--systems", f"a={file}", "--questions", tmp_path / "x.json"], "x.json: no such file"),
        (["--runs", tmp_path], "config.json: no such file"),
    ):
        assert message in scripts.refused(capsys, lambda options=options: run(*asked, *options))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    assert "not empty" in scripts.refused(capsys, lambda: run(*asked, "--systems", f"a={file}"))


# ---------------------------------------------------------------------------------------------------------- docs/audio.md

PAGE = (ROOT / "docs" / "audio.md").read_text("utf-8")
SHELL = "\n".join(line[4:] for line in PAGE.splitlines() if line.startswith("    ")).replace("\\\n", " ")


def test_the_commands_of_the_docs_have_these_options(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_omni"}')
    scripts_of = {"train_grpo.py": train_grpo, "nano_adrpo.evaluate_mmau": evaluate_mmau, "nano_adrpo.sample": sample}
    shell, found = SHELL.replace("docs/", f"{ROOT}/docs/").replace("$OMNI", str(tmp_path)), []
    for line in shell.splitlines():
        words = shlex.split(line.strip().replace("$clip", "0.02").replace("$seed", "1"))
        if words[:1] == [".venv/bin/python"]:
            script, words = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
            words = ["cpu" if word == "cuda" else word for word in words]  # which this machine may lack
            found.append((script, scripts_of[script].parse([*words, "--device", "cpu"])))
    assert [script for script, _ in found].count("train_grpo.py") == 5 and len(found) == 9
    trained = [args for script, args in found if script == "train_grpo.py"]
    settings = json.loads((ROOT / "docs" / "audio.json").read_text("utf-8")) | {"device": "cpu"}
    assert {name: getattr(trained[0], name) for name in settings} == settings
    assert [args.method for args in trained] == ["adrpo", "adrpo", "grpo", "adrpo", "grpo"]
    assert (trained[1].a_min, trained[1].a_max, trained[1].seed) == (-0.02, 0.02, 1)
    assert all(
        (args.task, args.lora_rank, args.prompt_form, args.beta0) == ("audio", 32, "think", 0.04) for args in trained[:3]
    )


def test_the_docs_make_avqas_problems_and_convert_what_is_no_wav(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    rows = [{"id": i, "video_name": f"-v{i}", "question_relation": ("Both", "View")[i % 2]} for i in range(1000)]
    Path("train_qa.json").write_text(json.dumps(rows))
    Path("avqa_videos").mkdir()
    for row in rows[:700]:
        Path("avqa_videos", f"{row['video_name']}.mp4").touch()
    Path("test-mini-audios").mkdir()
    Path("test-mini-audios", "a.wav").write_bytes(b"RIFF....WAVE")
    Path("test-mini-audios", "b.wav").write_bytes(b"ID3")
    Path("ffmpeg").write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\n')
    Path("ffmpeg").chmod(0o755)
    loops = [SHELL[match.start() : SHELL.index("done", match.start()) + 4] for match in re.finditer("mkdir ", SHELL)]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run("\n".join(loops), shell=True, check=True, env=path)
    exec(lines, {})
    kept = {
        name: [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()] for name in ("held_out", "train")
    }
    assert [len(some) for some in kept.values()] == [256, 350 - 256]
    assert {row["id"] for some in kept.values() for row in some} == set(range(0, 700, 2))
    assert "-i avqa_videos/-v0.mp4" in Path("avqa", "-v0.wav").read_text()
    assert Path("test-mini-audios", "a.wav").read_bytes() == b"RIFF....WAVE" and Path("mp3", "b.wav").read_bytes() == b"ID3"
    assert "-i mp3/b.wav" in Path("test-mini-audios", "b.wav").read_text() and not Path("mp3", "a.wav").exists()
