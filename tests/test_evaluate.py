"""evaluate: the training script's numbers, standard errors by hand, checkpoints, others' images, going on, refusals."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import train_flow
from nano_adrpo import evaluate, images, prompts, runtime
from nano_adrpo.demo import digits

BASE = digits.HERE / "base"
TRAIN = "--rounds 2 --prompts-per-round 2 --group-size 2 --inner-steps 1 --ode-steps 4 --eval-every 1 --keep-checkpoints"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short trainings of the demo: all weights, and adapters."""
    folder = tmp_path_factory.mktemp("runs")
    train_flow.main([*TRAIN.split(), "--lr", "1e-3", "--out", str(folder / "full")])
    train_flow.main([*TRAIN.split(), "--lr", "1e-2", "--lora-rank", "2", "--eval-samples", "4", "--out", str(folder / "lora")])
    return folder


@pytest.fixture
def few(tmp_path):
    """Options for an evaluation of two prompts that takes a second."""
    (tmp_path / "prompts.txt").write_text("a bold handwritten two\na thin handwritten nine\n")
    return ["--prompts", tmp_path / "prompts.txt", "--steps", 2, "--samples", 2, "--seeds", 2, "--out", tmp_path / "out"]


def run(*options):
    return evaluate.main([str(option) for option in options])


def last(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["eval"]


def stored(out, name):
    return json.loads((out / "scores" / f"{name}.json").read_text())


@pytest.mark.parametrize("name, samples", [("full", 8), ("lora", 4)])
def test_seed_0_is_the_training_scripts_evaluation(tmp_path, runs, name, samples):
    tuned = runs / "full" / "model" if name == "full" else f"{BASE}+{runs / 'lora' / 'adapter'}"
    options = ["--steps", 4, "--seeds", 1, "--samples", samples, "--out", tmp_path / "out"]
    table = run("--models", f"base={BASE}", f"tuned={tuned}", *options)
    expected = last(runs / name)
    assert {metric: mean for metric, (mean, _) in table["tuned"].items()} == expected  # to the last bit
    assert table["base"]["w2"][0] == 0 < expected["w2"] and math.isnan(table["base"]["w2"][1])


def test_standard_errors_are_over_seeds_or_over_training_runs(tmp_path, runs, few):
    table = run(
        "--models", f"base={BASE}", f"tuned={runs / 'full' / 'model'}", f"tuned={runs / 'full' / 'round-1' / 'model'}", *few
    )
    out = tmp_path / "out"
    a, b = (stored(out, f"base.0.seed{seed}")["reward"] for seed in (0, 1))
    assert table["base"]["reward"] == pytest.approx(((a + b) / 2, abs(a - b) / 2))  # s/√2 of two numbers, s = |a − b|/√2
    a, b = (sum(stored(out, f"tuned.{i}.seed{seed}")["reward"] for seed in (0, 1)) / 2 for i in (0, 1))
    assert table["tuned"]["reward"] == pytest.approx(((a + b) / 2, abs(a - b) / 2))
    text = (out / "table.md").read_text()
    assert text.startswith("2 prompts × 2 images, 2 seeds") and f"| base | {table['base']['reward'][0]:.3g} ± " in text
    assert json.loads((out / "results.json").read_text())["rows"][1]["setting"] == "tuned"
    assert {path.name for path in out.glob("*.png")} == {
        "reward_clip_diversity.png", "reward_pixel_diversity.png", "reward_w2.png", "side_by_side.png",
    }  # fmt: skip


def test_steps_make_a_path_and_the_last_is_the_table(tmp_path, runs, few, monkeypatch):
    panels = {}
    monkeypatch.setattr(evaluate.plots, "grids", lambda file, given, texts: panels.update(given))
    models = [f"base={BASE}", *(f"tuned@{n}={runs / 'full' / f'round-{n}' / 'model'}" for n in (2, 1))]
    table = run("--models", *models, *few)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    means = [sum(stored(tmp_path / "out", f"tuned@{n}.0.seed{seed}")["reward"] for seed in (0, 1)) / 2 for n in (1, 2)]
    assert [point["reward"] for point in rows[1]["path"]] == pytest.approx(means) and len(rows) == 2
    assert table["tuned"]["reward"][0] == pytest.approx(means[1])
    assert torch.equal(panels["tuned"][0], images.read_png(tmp_path / "out" / "images" / "tuned@2" / "0000_00.png"))


def write_images(folder, seed=0, count=2, size=8):
    folder.mkdir(parents=True)
    drawn = 2 * torch.rand(2 * count, 1, size, size, generator=torch.Generator().manual_seed(seed)) - 1
    files = [folder / f"{i // 2:04d}_{i % 2:02d}.png" for i in range(2 * count)]
    for file, image in zip(files, drawn):
        images.write_png(file, image)
    return torch.stack([images.read_png(file) for file in files])


def test_the_demos_judge_looks_at_the_demos_images(tmp_path):
    write_images(tmp_path / "plain", count=40, size=16)
    with pytest.raises(ValueError, match=r"plain: images \[1, 16, 16\]; expected the demo's, \[1, 8, 8\], or --prompts"):
        run("--models", f"x={tmp_path / 'plain'}", "--samples", 2, "--out", tmp_path / "out")


def test_images_of_another_system_enter_the_table(tmp_path, few):
    for seed in (0, 1):
        write_images(tmp_path / "seeded" / f"seed{seed}", seed)
    drawn = write_images(tmp_path / "plain", 3)
    table = run("--models", f"base={BASE}", f"seeded={tmp_path / 'seeded'}", f"plain={tmp_path / 'plain'}", *few)
    from nano_adrpo.rewards import ClipScore

    texts = ["a bold handwritten two"] * 2 + ["a thin handwritten nine"] * 2
    assert table["plain"]["reward"][0] == pytest.approx(ClipScore(digits.HERE / "clip")(drawn, texts).mean().item(), rel=1e-5)
    assert "w2" not in table["plain"] and math.isnan(table["plain"]["reward"][1]) and table["seeded"]["reward"][1] > 0
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    results = (tmp_path / "out" / "results.json").read_text()
    assert json.loads(results)["rows"][2]["final"]["reward"] == [table["plain"]["reward"][0], None] and "NaN" not in results
    assert lines[-1].startswith("| plain |") and lines[-1].endswith("| – |") and "±" not in lines[-1]
    (tmp_path / "plain" / "0001_00.png").unlink()
    with pytest.raises(FileNotFoundError, match="0001_00.png: no such file"):
        run("--models", f"other={tmp_path / 'plain'}", *few[:-1], tmp_path / "second")


def test_a_models_folder_may_show_images(tmp_path, few):
    shutil.copytree(BASE, tmp_path / "base")
    images.write_png(tmp_path / "base" / "example.png", torch.zeros(3, 4, 4))  # as the public SD3 folder does
    a, b = (
        run("--models", f"base={folder}", *few[:-1], tmp_path / f"out{i}") for i, folder in enumerate((BASE, tmp_path / "base"))
    )
    assert a == b


def test_what_fails_late_is_refused_at_once(tmp_path, few, runs, monkeypatch):
    monkeypatch.setattr(evaluate.Evaluation, "draw", lambda *args: pytest.fail("work has begun"))
    write_images(tmp_path / "plain")
    write_images(tmp_path / "seeded" / "seed0")
    (tmp_path / "nothing").mkdir()
    config = json.loads((BASE / "transformer" / "config.json").read_text())
    shutil.copytree(BASE, tmp_path / "smaller")
    (tmp_path / "smaller" / "transformer" / "config.json").write_text(json.dumps(config | {"sample_size": 6}))
    for models, message in (
        ([f"x={tmp_path / 'nothing'}"], "nothing: no transformer/ in it"),
        ([f"x={BASE}+{tmp_path / 'nothing'}"], "nothing"),
        ([f"x={tmp_path / 'seeded'}"], r"seed1.0000_00.png: no such file; expected 2 images of every prompt"),
        ([f"x={BASE}", f"x={tmp_path / 'plain'}"], "plain: x is images and a model; expected one of them to a name"),
        ([f"x@1={tmp_path / 'plain'}", f"x@2={BASE}"], f"{BASE}: x is images and a model"),
        ([f"x={tmp_path / 'smaller'}"], r"smaller: latents \[1, 6, 6\]; expected \[1, 8, 8\], those of"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run("--models", f"base={BASE}", *models, *few)
    with pytest.raises(ValueError, match="--resolution: resolution 7: expected a multiple of 2"):
        run("--models", f"base={BASE}", *few, "--resolution", 7)
    assert not (tmp_path / "out").exists()


def test_images_of_several_sizes_are_refused(tmp_path, few):
    write_images(tmp_path / "plain")
    images.write_png(tmp_path / "plain" / "0001_01.png", torch.zeros(1, 9, 8))
    with pytest.raises(ValueError, match=r"0001_01.png: is \[1, 9, 8\]; expected \[1, 8, 8\]"):
        run("--models", f"plain={tmp_path / 'plain'}", *few)


def test_an_interrupted_evaluation_goes_on(tmp_path, few, runs, monkeypatch):
    models = ["--models", f"base={BASE}", f"tuned={runs / 'full' / 'model'}"]
    whole = run(*models, *few[:-1], tmp_path / "whole")
    drawn, draw = [], evaluate.Evaluation.draw

    def watched(self, entry, seed):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append((entry.name, seed))
        return draw(self, entry, seed)

    monkeypatch.setattr(evaluate.Evaluation, "draw", watched)
    with pytest.raises(KeyboardInterrupt):
        run(*models, *few)
    drawn.clear()
    assert run(*models, *few) == whole and drawn == [("tuned", 1)]
    drawn.clear()
    more = run(*models, f"again={BASE}", *few)  # another model joins; nothing else is computed
    assert drawn == [("again", 0), ("again", 1)] and more["again"] == whole["base"]


def test_another_evaluation_in_the_same_folder_is_refused(tmp_path, few, runs):
    run("--models", f"base={BASE}", *few)
    with pytest.raises(ValueError, match=r"holds an evaluation with another --steps \(2\)"):
        run("--models", f"base={BASE}", *few, "--steps", 3)
    with pytest.raises(ValueError, match=r"base.0.seed0.json: holds another model's scores than .*; expected another --out"):
        run("--models", f"base={runs / 'full' / 'model'}", *few)
    both = ["--models", f"base={BASE}", f"tuned={runs / 'full' / 'model'}"]
    run(*both, *few)
    with pytest.raises(ValueError, match=r"was measured from the base .*demo/base, not .*; expected another --out"):
        run(both[0], both[2], both[1], *few)  # the divergence from the base would be another's
    file = tmp_path / "out" / "scores" / "base.0.seed0.json"
    file.write_text(json.dumps({"reward": 1.0}))  # of another program
    with pytest.raises(ValueError, match="base.0.seed0.json: holds another model's scores"):
        run("--models", f"base={BASE}", *few)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="the folder is not empty"):
        run("--models", f"base={BASE}", *few, "--out", tmp_path / "used")


def test_batches_change_nothing(tmp_path, few):
    a = run("--models", f"base={BASE}", *few)
    b = run("--models", f"base={BASE}", *few[:-1], tmp_path / "batched", "--batch", 3)
    assert {m: v[0] for m, v in a["base"].items()} == pytest.approx({m: v[0] for m, v in b["base"].items()}, rel=1e-4)


def test_the_diversity_of_embeddings_as_they_are(tmp_path, few):
    a = run("--models", f"base={BASE}", *few)["base"]["clip_diversity"][0]
    b = run("--models", f"base={BASE}", *few[:-1], tmp_path / "b", "--clip-diversity", "projected")["base"]["clip_diversity"][0]
    assert a <= 2 and b != pytest.approx(a)


def test_a_reward_of_ones_own_alone(tmp_path, few):
    (tmp_path / "mine.py").write_text("def bright(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    table = run("--models", f"base={BASE}", *few, "--rewards", f"{tmp_path / 'mine.py'}:bright")
    assert set(table["base"]) == {"reward", "pixel_diversity", "w2"}


def test_without_matplotlib_it_says_what_it_left_out(tmp_path, few, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
    run("--models", f"base={BASE}", *few)
    assert "side_by_side.png: left out, matplotlib is not installed" in capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").is_file() and len(list((tmp_path / "out" / "images" / "base").iterdir())) == 4


@pytest.mark.parametrize(
    "models, message",
    [
        (["base"], "--models 'base': expected NAME=MODEL"),
        (["base=nowhere"], "nowhere: no such file or folder"),
        ([f"base={BASE}+nowhere"], "nowhere: no such file or folder"),
        (["a/b=x"], "--models 'a/b=x': expected NAME=MODEL"),
    ],
)
def test_bad_models_are_refused(tmp_path, few, capsys, models, message):
    with pytest.raises(SystemExit) as stop:
        runtime.run(lambda: run("--models", *models, *few))
    assert stop.value.code == 2 and message in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="--samples 1: expected at least 2"):
        evaluate.parse(["--models", "a=b", "--samples", "1"])


def test_the_categories_of_prompts():
    folder = Path(digits.HERE) / "compositional"
    sets = {file.stem: prompts.read_prompts(file) for file in folder.glob("*.txt")}
    assert sets.keys() == {"style", "text", "attributes", "colour", "counting", "position"}
    texts = [text for lines in sets.values() for text in lines]
    assert len(texts) == len(set(texts)) == 60 and {len(lines) for lines in sets.values()} == {10}


def test_the_pictures_are_those_of_the_shown_prompts(tmp_path, few):
    run("--models", f"base={BASE}", *few)
    evaluation = evaluate.Evaluation(evaluate.parse(["--models", f"base={BASE}", *map(str, few)]))
    drawn, _ = evaluation.draw(evaluation.entries[0], 0)
    for row in (0, 1):
        image = images.read_png(tmp_path / "out" / "images" / "base" / f"{row:04d}_01.png")
        assert (image - drawn[2 * row + 1].clamp(-1, 1)).abs().max() < 1 / 127
    assert evaluate.shown(40) == [0, 4, 8, 13, 17, 21, 26, 30, 34, 39]
    shutil.rmtree(tmp_path / "out")
