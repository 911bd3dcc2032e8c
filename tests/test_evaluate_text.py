"""evaluate --problems: the training script's numbers, errors, KL, going on, refusals."""

import json
import math

import pytest
import torch

import train_grpo
from nano_adrpo import errors, evaluate, lora
from nano_adrpo.demo import GRPO, HERE
from nano_adrpo.evaluation import plots
from nano_adrpo.models.decoder import Decoder

BASE, OTHER = HERE / "arithmetic_base", HERE / "arithmetic_deceptive"


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Options for an evaluation of six problems without pictures, which takes a second."""
    monkeypatch.setattr(plots, "pyplot", lambda file: None)
    lines = open(GRPO["held_out"]).read().splitlines(keepends=True)[:6]
    (tmp_path / "problems.jsonl").write_text("".join(lines))
    return ["--problems", tmp_path / "problems.jsonl", "--max-new-tokens", 22, "--out", tmp_path / "out"]


def run(*options):
    return evaluate.main([str(option) for option in options])


def test_the_numbers_are_the_training_scripts(tmp_path, few):
    adapters = Decoder.from_pretrained(BASE)
    lora.add(adapters, lora.DECODER_TARGETS, 2, 2, torch.Generator().manual_seed(0))
    for name, parameter in adapters.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    lora.save(adapters, tmp_path / "adapter")
    table = run("--models", f"base={BASE}", f"tuned={BASE}+{tmp_path / 'adapter'}", *few)
    files = ["--problems", few[1], "--held-out", few[1], "--rounds", 0, "--out", tmp_path / "run"]
    values = train_grpo.main([str(option) for option in files])
    stored = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    for metric, value in values.items():
        assert table["base"][metric] == pytest.approx((value, stored["eval_error"][metric]), rel=1e-4), metric
    assert table["base"]["kl_k1"] == table["base"]["kl_k3"] == (0, 0)
    assert table["tuned"]["kl_k3"][0] > 0 and table["tuned"]["length"] != table["base"]["length"]
    out = tmp_path / "out"
    line = "6 problems × 8 completions, mean ± standard error over training runs (over problems)."
    assert (out / "table.md").read_text().startswith(line)
    written = [json.loads(line) for line in (out / "completions" / "base.0.jsonl").read_text().splitlines()]
    answers = {row["question"]: row["answer"] for row in map(json.loads, open(few[1]))}
    right = [row["completion"].endswith("####" + answers[row["question"]].removeprefix("#### ")) for row in written]
    assert len(right) == 48 and sum(right) / 48 == pytest.approx(table["base"]["pass@1"][0])


def test_an_evaluation_goes_on_and_runs_of_one_name_give_the_error(tmp_path, few, monkeypatch):
    models = ["--models", f"base={BASE}", f"x={BASE}", f"x={OTHER}"]
    first = run(*models[:2], *few)
    measured, measure = [], evaluate.TextEvaluation.measure
    monkeypatch.setattr(
        evaluate.TextEvaluation, "measure", lambda self, entry, seed: measured.append(entry) or measure(self, entry, seed)
    )
    table = run(*models, *few)
    assert [(entry.name, entry.run) for entry in measured] == [("x", 0), ("x", 1)] and table["base"] == first["base"]
    a, b = (json.loads((tmp_path / "out" / "scores" / f"x.{i}.seed0.json").read_text())["entropy"] for i in (0, 1))
    assert table["x"]["entropy"] == pytest.approx(((a + b) / 2, abs(a - b) / 2))
    with pytest.raises(ValueError, match="holds an evaluation with another --temperature"):
        run(*models, *few, "--temperature", 0.5)


def test_no_kl_where_tokens_are_not_the_policys_or_not_the_references(tmp_path, few):
    for i, options in enumerate((["--temperature", 0], ["--top-k", 2], ["--top-p", 0.5])):
        values = run("--models", f"base={BASE}", *few[:-1], tmp_path / f"{i}", *options)["base"]
        assert not {"kl_k1", "kl_k3"} & values.keys() and {"pass@1", "entropy", "length"} <= values.keys()
    model = Decoder.from_pretrained(OTHER)
    tokenizer = json.loads(model.files["tokenizer.json"])
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["c"], vocabulary["t"] = vocabulary["t"], vocabulary["c"]
    model.files["tokenizer.json"] = json.dumps(tokenizer).encode()
    model.save_pretrained(tmp_path / "others")
    table = run("--models", f"base={BASE}", f"others={tmp_path / 'others'}", *few)
    assert "kl_k1" in table["base"] and "kl_k1" not in table["others"] and table["others"]["entropy"][0] > 0


def test_every_option_counts(tmp_path, few):
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions):\n    return [-len(text) for text in completions]\n"
        "def judge(questions, completions):\n    return {'asked': len(set(questions))}\n"
    )
    plain = run("--models", f"base={BASE}", *few)["base"]
    for name, value in (
        ("temperature", 0.5), ("top-k", 1), ("top-p", 0.5), ("max-new-tokens", 5), ("samples", 2), ("instruction", "+"),
        ("dtype", "bfloat16"), ("rewards", f"{tmp_path / 'mine.py'}:short"), ("batch", 5),
    ):  # fmt: skip
        assert run("--models", f"base={BASE}", *few[:-1], tmp_path / name, f"--{name}", value)["base"] != plain, name
    judged = run("--models", f"base={BASE}", *few[:-1], tmp_path / "judge", "--judge", f"{tmp_path / 'mine.py'}:judge")["base"]
    assert judged["asked"][0] == 6 and math.isnan(judged["asked"][1])


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, few, capsys, monkeypatch):
    monkeypatch.setattr(evaluate.TextEvaluation, "measure", lambda *args: pytest.fail("work has begun"))
    for options, message in (
        (["--steps", 4], "--steps: expected only without --problems"),
        (["--prompts", "p.txt"], "--prompts: expected only without --problems"),
        (["--top-p", 2], "--top-p 2.0: expected at most 1"),
        (["--max-new-tokens", 60], "--max-new-tokens 60 behind a prompt of 6 exceeds the model's 64 positions"),
        (["--max-prompt-tokens", 3], "--max-prompt-tokens 3: prompt 0 has 6 tokens; expected 1 … 3"),
        (["--models", f"base={HERE / 'base'}"], "no such file"),
        (["--models", f"base={BASE}+{HERE / 'base'}"], "adapter_config.json: no such file"),
        (["--rewards", "nothing"], "reward 'nothing': no such reward or folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            errors.run_command(lambda options=options: run("--models", f"base={BASE}", *few, *options))
        assert stop.value.code == 2 and message in (line := capsys.readouterr().err) and line.count("\n") == 1, line
    with pytest.raises(errors.InputError, match="--temperature: expected only with --problems"):
        run("--models", f"base={HERE / 'base'}", "--temperature", 0.5)
    assert not (tmp_path / "out").exists()
