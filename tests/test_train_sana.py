"""train_flow.py, sample and evaluate on a SANA in small."""

import json
import shlex
from pathlib import Path

import pytest
import scripts
import tiny_rewards
import tiny_sana
import tiny_sd3
import torch
from safetensors.torch import load_file

import train_flow
from nano_adrpo import evaluate, lora, sample
from nano_adrpo.files.png import read_png
from nano_adrpo.text_to_image import TextToImage

ROOT = Path(train_flow.__file__).parent
SMALL = (
    "--rounds 3 --prompts-per-round 2 --group-size 2 --inner-steps 1 --ode-steps 2 --guidance 3 --resolution 16 --eval-every 3 "
    "--eval-samples 2 --no-eval-first --beta-unit reward"
).split()


@pytest.fixture(scope="module")
def sana(tmp_path_factory):
    return tiny_sana.folder(tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_rewards.folder("clip_score", tmp_path_factory.mktemp("clip"))


@pytest.fixture
def train(tmp_path, sana, clip, monkeypatch):
    """Runs the script with a file of two prompts, without pictures; -> (folder of the run, its metrics)."""
    monkeypatch.setattr(train_flow.plots, "pyplot", lambda file: None)
    (tmp_path / "prompts.txt").write_text("a CAT\nthe one\n")

    def run(name, *options):
        argv = [*SMALL, "--model", sana, "--reward", f"clip_score:{clip}", "--prompts", tmp_path / "prompts.txt"]
        train_flow.main([*map(str, argv), "--out", str(tmp_path / name), *map(str, options)])
        return tmp_path / name, scripts.lines(tmp_path / name)

    return run


def test_three_rounds_of_adapters(train, sana, clip, tmp_path, monkeypatch):
    out, rows = train("run", "--lora-rank", 2, "--lr", 1e-2, "--dtype", "bfloat16", "--gradient-checkpointing")
    assert len(rows) == 3 and rows[-1]["eval"]["w2"] > 0
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["to_k", "to_out.0", "to_q", "to_v"]
    matrices = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(matrices) == 3 * 2 * 4 * 2  # blocks, attentions, layers, A and B
    tuned, base = (TextToImage.from_pretrained(sana) for _ in range(2))
    lora.load(tuned.transformer, out / "adapter")
    x0, condition = torch.randn(1, 4, 4, 4), base.encode(["a cat"])
    with torch.no_grad():
        assert (tuned.velocity(x0, 0.5, condition) - base.velocity(x0, 0.5, condition)).abs().max() > 1e-3

    argv = f"--model {sana} --adapter {out / 'adapter'} --prompts {tmp_path / 'prompts.txt'} --steps 2 --guidance 4.5 --count 2"
    sample.main([*argv.split(), "--resolution", "32", "--out", str(tmp_path / "pictures")])
    assert [read_png(file).shape for file in (tmp_path / "pictures").iterdir()] == [(3, 32, 32)] * 4
    monkeypatch.setattr(evaluate.plots, "pyplot", lambda file: None)
    argv = f"--models base={sana} tuned={sana}+{out / 'adapter'} --rewards clip_score:{clip} --steps 2 --samples 2 --seeds 1"
    argv += f" --prompts {tmp_path / 'prompts.txt'} --resolution 16 --guidance 4.5 --out {tmp_path / 'evaluation'}"
    table = evaluate.main(argv.split())
    assert table["base"]["w2"][0] == 0 < table["tuned"]["w2"][0]


def test_all_weights(train, sana):
    out, rows = train("run", "--lr", 1e-3)
    assert {path.name for path in (out / "model").iterdir()} == {"transformer", "vae", "scheduler", "model_index.json"}
    model = TextToImage.from_pretrained(out / "model", base=sana)
    assert model.encode(["a cat"]).context.shape == (1, 300, 20) and rows[-1]["eval"]["w2"] > 1e-6


def test_the_negative_prompt_and_lower_case_do_something(train):
    runs = (("plain", []), ("negative", ["--negative-prompt", "ugly"]), ("case", ["--no-lower-case"]))
    written = [scripts.written(train(name, "--eval-first", "--rounds", 1, *more)[0]) for name, more in runs]
    assert len({run["metrics.jsonl"] for run in written}) == 3


def test_lower_case_in_the_commands(sana, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.plots, "pyplot", lambda file: None)
    (tmp_path / "prompts.txt").write_text("CAT\n")
    pictures, scores = [], []
    for option in ("--lower-case", "--no-lower-case"):
        argv = f"{option} --prompts {tmp_path / 'prompts.txt'} --steps 1 --resolution 16"
        sample.main([*argv.split(), "--model", str(sana), "--out", str(tmp_path / f"{option}.png")])
        pictures.append((tmp_path / f"{option}.png").read_bytes())
        argv += f" --models base={sana} --rewards clip_score:{clip} --samples 2 --seeds 1 --out {tmp_path / option}"
        scores.append(evaluate.main(argv.split())["base"]["reward"][0])
    assert pictures[0] != pictures[1] and scores[0] != scores[1]


def test_models_of_two_families_in_one_evaluation(sana, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.plots, "pyplot", lambda file: None)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    sd3 = tiny_sd3.folder(tmp_path / "sd3", t5=False)
    argv = f"--models SD3={sd3} SANA={sana} --rewards clip_score:{clip} --steps 1 --samples 2 --seeds 1 --resolution 16"
    table = evaluate.main([*argv.split(), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "table1")])
    assert table["SD3"]["w2"][0] == 0 and "w2" not in table["SANA"]  # there is no distance between families
    assert "| SANA |" in (tmp_path / "table1" / "table.md").read_text()


def test_the_options_of_the_docs_command():
    text = (ROOT / "docs" / "sana.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = (line for line in text.splitlines() if "train_flow.py" in line)
    words = shlex.split(command.partition("train_flow.py")[2].replace("docs/", f"{ROOT}/docs/"))
    args = train_flow.parse([*words, "--device", "cpu"])
    assert (args.guidance, args.resolution, args.lora_rank, args.lower_case) == (4.5, 1024, 32, None)
