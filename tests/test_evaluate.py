"""evaluate: the training script's numbers, checkpoints, others' images, going on, judges, refusals."""

import json
import math
import shutil
from pathlib import Path

import evaluate_runs
import pytest
import torch
from evaluate_runs import BASE, run, write_images

import train_flow
from nano_adrpo import errors, evaluate
from nano_adrpo.demo import FLOW, HERE
from nano_adrpo.evaluation import plots
from nano_adrpo.files.png import read_png
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.text_to_image.prompts import read_prompts
from nano_adrpo.training.life import Life

few = evaluate_runs.few
TRAIN = "--rounds 2 --prompts-per-round 2 --group-size 2 --inner-steps 1 --ode-steps 4 --eval-every 1 --eval-samples 2"
TRAIN += " --keep-checkpoints"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short trainings of the demo: all weights, and adapters."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("prompts", "held_out"):  # a few of the demo's own
            (folder / f"{name}.jsonl").write_text("\n".join(Path(FLOW[name]).read_text().splitlines()[::13]))
            patch.setitem(FLOW, name, str(folder / f"{name}.jsonl"))
        patch.setattr(plots, "pyplot", lambda file: None)
        train_flow.main([*TRAIN.split(), "--lr", "1e-3", "--out", str(folder / "full")])
        train_flow.main([*TRAIN.split(), "--lr", "1e-2", "--lora-rank", "2", "--out", str(folder / "lora")])
    return folder


def last(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["eval"]


def stored(out, name):
    return json.loads((out / "scores" / f"{name}.json").read_text())


def test_seed_0_is_the_training_scripts_evaluation(tmp_path, runs):
    options = ["--steps", 4, "--seeds", 1, "--samples", 2, "--out", tmp_path / "out"]
    options += ["--prompts", runs / "held_out.jsonl", "--judge", FLOW["judge"]]
    adapted = f"{BASE}+{runs / 'lora' / 'adapter'}"
    table = run("--models", f"base={BASE}", f"full={runs / 'full' / 'model'}", f"lora={adapted}", *options)
    for name in ("full", "lora"):
        assert {metric: mean for metric, (mean, _) in table[name].items()} == pytest.approx(last(runs / name), rel=1e-6)
        assert table["base"]["w2"][0] == 0 < table[name]["w2"][0] and math.isnan(table["base"]["w2"][1])


def test_standard_errors_are_over_seeds_or_over_training_runs(tmp_path, runs, few, monkeypatch):
    monkeypatch.undo()  # with pictures
    table = run(
        "--models", f"base={BASE}", f"tuned={runs / 'full' / 'model'}", f"tuned={runs / 'full' / 'round-1' / 'model'}", *few
    )
    out = tmp_path / "out"
    a, b = (stored(out, f"base.0.seed{seed}")["reward"] for seed in (0, 1))
    assert a != b and table["base"]["reward"] == pytest.approx(
        ((a + b) / 2, abs(a - b) / 2)
    )  # s/√2 of two numbers, s = |a − b|/√2
    a, b = (sum(stored(out, f"tuned.{i}.seed{seed}")["reward"] for seed in (0, 1)) / 2 for i in (0, 1))
    assert table["tuned"]["reward"] == pytest.approx(((a + b) / 2, abs(a - b) / 2))
    text = (out / "table.md").read_text()
    assert text.startswith("2 prompts × 2 images, 2 seeds, mean ± standard error over training runs (over noises).")
    lines = {line.split(" | ")[0]: line.split(" | ")[1] for line in text.splitlines()[3:]}
    (mean, error), noises = table["tuned"]["reward"], [
        sum(stored(out, f"tuned.{i}.seed{seed}")["reward"] for i in (0, 1)) / 2 for seed in (0, 1)
    ]  # fmt: skip
    assert lines["| tuned"] == f"{mean:.3g} ± {error:.1g} ({abs(noises[0] - noises[1]) / 2:.1g})"
    assert lines["| base"] == "{:.3g} ({:.1g})".format(*table["base"]["reward"])
    assert json.loads((out / "results.json").read_text())["rows"][1]["setting"] == "tuned"
    assert {path.name for path in out.glob("*.png")} == {
        "reward_clip_diversity.png", "reward_pixel_diversity.png", "reward_w2.png", "side_by_side.png",
    }  # fmt: skip


def test_steps_make_a_path_and_the_last_is_the_table(tmp_path, runs, few, monkeypatch):
    panels = {}
    monkeypatch.setattr(plots, "grids", lambda file, given, texts: panels.update(given))
    models = [f"base={BASE}", *(f"tuned@{n}={runs / 'full' / f'round-{n}' / 'model'}" for n in (2, 1))]
    table = run("--models", *models, *few)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    means = [sum(stored(tmp_path / "out", f"tuned@{n}.0.seed{seed}")["reward"] for seed in (0, 1)) / 2 for n in (1, 2)]
    assert [point["reward"] for point in rows[1]["path"]] == pytest.approx(means) and len(rows) == 2
    assert table["tuned"]["reward"][0] == pytest.approx(means[1])
    assert torch.equal(panels["tuned"][0], read_png(tmp_path / "out" / "images" / "tuned@2" / "0000_00.png"))


def test_the_worst_images_of_each_reward_are_kept(tmp_path, runs, few):
    (tmp_path / "mine.py").write_text("def dark(images, prompts):\n    return -images.clamp(-1, 1).mean(dim=(1, 2, 3))\n")
    rewards = ["--rewards", HERE / "clip", f"{tmp_path / 'mine.py'}:dark@0"]
    models = [f"base={BASE}", *(f"tuned@{n}={runs / 'full' / f'round-{n}' / 'model'}" for n in (1, 2))]
    run("--models", *models, *few, *rewards, "--samples", 4, "--worst", 3)
    failures = tmp_path / "out" / "failures"
    assert {path.name for path in failures.iterdir()} == {"base", "tuned@2"}  # the last step alone
    for entry in ("base", "tuned@2"):
        names = {f"{name}.{kind}" for name in ("clip_score", "dark") for kind in ("png", "jsonl")}
        assert {path.name for path in (failures / entry).iterdir()} == names
        images = torch.stack([read_png(tmp_path / "out" / "images" / entry / f"{row:04d}_{i:02d}.png")
                              for row in (0, 1) for i in range(4)])  # fmt: skip
        worst = images.mean(dim=(1, 2, 3)).argsort(descending=True)[:3].tolist()  # the brightest
        lines = [json.loads(line) for line in (failures / entry / "dark.jsonl").read_text().splitlines()]
        assert [(line["row"], line["sample"]) for line in lines] == [divmod(i, 4) for i in worst]
        assert [line["prompt"] for line in lines] == [["a green two", "a blue nine"][i // 4] for i in worst]
        assert [line["score"] for line in lines] == pytest.approx([-images[i].mean().item() for i in worst], abs=0.01)
        first, second, third = images[worst]
        upper, lower = torch.cat([first, second], dim=2), torch.cat([third, torch.ones_like(third)], dim=2)
        assert torch.equal(read_png(failures / entry / "dark.png"), torch.cat([upper, lower], dim=1))


def test_what_fails_late_is_refused_at_once(tmp_path, few, runs, monkeypatch):
    monkeypatch.setattr(evaluate.Evaluation, "measure", lambda *args: pytest.fail("work has begun"))
    write_images(tmp_path / "plain")
    write_images(tmp_path / "seeded" / "seed0")
    (tmp_path / "nothing").mkdir()
    config = json.loads((BASE / "transformer" / "config.json").read_text())
    shutil.copytree(BASE, tmp_path / "smaller")
    (tmp_path / "smaller" / "transformer" / "config.json").write_text(json.dumps(config | {"sample_size": 12}))
    for models, message in (
        ([f"x={tmp_path / 'nothing'}"], "nothing: no transformer/ in it"),
        ([f"x={BASE}+{tmp_path / 'nothing'}"], "nothing"),
        ([f"x={tmp_path / 'seeded'}"], "seed1: no image of prompt 0; expected some of each of the 2 prompts"),
        ([f"x={BASE}", f"x={tmp_path / 'plain'}"], "plain: x is images and a model; expected one of them to a name"),
        ([f"x@1={tmp_path / 'plain'}", f"x@2={BASE}"], f"{BASE}: x is images and a model"),
        ([f"x={tmp_path / 'smaller'}"], r"smaller: images \[3, 12, 12\]; expected \[3, 16, 16\], those of"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run("--models", f"base={BASE}", *models, *few)
    with pytest.raises(ValueError, match="--resolution: resolution 7: expected a multiple of 4"):
        run("--models", f"base={BASE}", *few, "--resolution", 7)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_evaluation_goes_on(tmp_path, few, runs, monkeypatch):
    models = ["--models", f"base={BASE}", f"tuned={runs / 'full' / 'model'}"]
    whole = run(*models, *few[:-1], tmp_path / "whole")
    drawn, measure = [], evaluate.Evaluation.measure

    def watched(self, entry, seed):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append((entry.name, seed))
        return measure(self, entry, seed)

    monkeypatch.setattr(evaluate.Evaluation, "measure", watched)
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
    with pytest.raises(ValueError, match=r"was measured from the reference .*demo/base, not .*; expected another --out"):
        run(both[0], both[2], both[1], *few)  # W2 would be another's
    file = tmp_path / "out" / "scores" / "base.0.seed0.json"
    file.write_text(json.dumps({"reward": 1.0}))  # of another program
    with pytest.raises(ValueError, match="base.0.seed0.json: holds another model's scores"):
        run("--models", f"base={BASE}", *few)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="the folder is not empty"):
        run("--models", f"base={BASE}", *few, "--out", tmp_path / "used")


def test_two_evaluations_do_not_share_a_folder(tmp_path, few):
    run("--models", f"base={BASE}", *few)
    with Life() as life:
        life.lock(tmp_path / "out", ".lock")
        with pytest.raises(errors.InputError, match="another run has it"):
            run("--models", f"base={BASE}", *few)


def test_batches_change_nothing(tmp_path, few, monkeypatch):
    batches, draw = [], TextToImage.draw

    def watched(self, x0, condition, times, negative, guidance, method, batch):
        batches.append(batch)
        return draw(self, x0, condition, times, negative, guidance, method, batch)

    monkeypatch.setattr(TextToImage, "draw", watched)
    a = run("--models", f"base={BASE}", *few)
    b = run("--models", f"base={BASE}", *few[:-1], tmp_path / "batched", "--batch", 3)
    assert {m: v[0] for m, v in a["base"].items()} == pytest.approx({m: v[0] for m, v in b["base"].items()}, rel=1e-4)
    assert batches == [None, None, 3, 3]


def test_the_diversity_of_embeddings_as_they_are(tmp_path, few):
    a = run("--models", f"base={BASE}", *few)["base"]["clip_diversity"][0]
    b = run("--models", f"base={BASE}", *few[:-1], tmp_path / "b", "--clip-diversity", "projected")["base"]["clip_diversity"][0]
    assert a <= 2 and b != pytest.approx(a)


def test_a_reward_of_ones_own_alone(tmp_path, few):
    (tmp_path / "mine.py").write_text("def bright(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    table = run("--models", f"base={BASE}", *few, "--rewards", f"{tmp_path / 'mine.py'}:bright")
    assert set(table["base"]) == {"reward", "pixel_diversity", "reward_std", "w2"}


def test_what_is_misspelt_is_refused_in_one_line(tmp_path, few, capsys):
    (tmp_path / "mine.py").write_text("other = 1\ndef dark(images, prompts):\n    return [1.0] * len(prompts)\n")
    write_images(tmp_path / "plain")
    for options, message in (
        (["--models", "base"], "--models 'base': expected NAME=MODEL"),
        (["--models", "base=nowhere"], "nowhere: no such file or folder"),
        (["--models", f"base={BASE}+nowhere"], "nowhere: no such file or folder"),
        (["--models", "a/b=x"], "--models 'a/b=x': expected NAME=MODEL"),
        (["--models", f"..={BASE}"], "--models '..="),
        (["--models", f"..@3={BASE}"], "expected the plain name of a file"),
        (["--models", f"a={BASE}", "--negative-prompt", "x"], "--negative-prompt: expected only with --guidance above 1"),
        (["--models", f"a={BASE}", "--images", "x.csv"], "--images: expected only with a folder of images among --models"),
        (["--models", f"a={BASE}", "--t5", "stream"], "--t5 stream: "),
        (["--models", f"a={BASE}", "--rewards", f"{FLOW['reward'][0]}@0"], "every weight is 0"),
        (["--models", f"a={BASE}", "--rewards", f"{tmp_path / 'mine.py'}:dark", "--clip-diversity", "projected"], "--clip-div"),
        (["--models", f"a={tmp_path / 'plain'}", "--guidance", 3], "--guidance: expected only with a model among --models"),
        (["--models", f"a={tmp_path / 'plain'}", "--lower-case"], "--lower-case: expected only with a model among --models"),
        (["--models", f"a={BASE}", "--samples", 1], "--samples 1: expected at least 2"),
        (["--models", f"a={BASE}", "--judge", "judge"], "--judge: 'judge': expected FILE.py:FUNCTION"),
        (["--models", f"a={BASE}", "--judge", f"{tmp_path / 'mine.py'}:judge"], "mine.py: no function 'judge' in it"),
    ):
        with pytest.raises(SystemExit) as stop:
            errors.run_command(lambda options=options: run(*few, *options))
        assert stop.value.code == 2 and message in (line := capsys.readouterr().err) and line.count("\n") == 1, line
    assert not (tmp_path / "out").exists()


def test_the_categories_of_prompts():
    prompts = read_prompts(HERE / "compositional.jsonl")
    names = ["artistic style", "text rendering", "attribute binding", "colouring", "counting", "position"]  # Figure 2's
    assert [prompt.category for prompt in prompts] == [name for name in names for _ in range(10)]
    assert len({prompt.text for prompt in prompts}) == 60


def test_the_pictures_are_those_of_the_shown_prompts(tmp_path, few):
    run("--models", f"base={BASE}", *few)
    evaluation = evaluate.Evaluation(evaluate.parse(["--models", f"base={BASE}", *map(str, few)]))
    _, drawn = evaluation.measure(evaluation.entries[0], 0)
    for row in (0, 1):
        image = read_png(tmp_path / "out" / "images" / "base" / f"{row:04d}_01.png")
        assert (image - drawn[row][1].clamp(-1, 1)).abs().max() < 1 / 127


def test_a_judge_of_ones_own_adds_metrics(tmp_path, few):
    judge = (
        "def judge(images, prompts):\n"
        "    return {'green': [0, 1]['green' in prompts[0]], 'dark': images.mean(dim=(1, 2, 3)) > 0}\n"
    )
    (tmp_path / "mine.py").write_text(judge)
    table = run("--models", f"base={BASE}", *few, "--judge", f"{tmp_path / 'mine.py'}:judge")
    assert list(table["base"])[-3:] == ["w2", "green", "dark"] and table["base"]["green"][0] == 1
    with pytest.raises(errors.InputError, match="holds an evaluation with another --judge"):
        run("--models", f"base={BASE}", *few)
    assert evaluate.parse(["--models", "a=b"]).judge == FLOW["judge"]
    assert evaluate.parse(["--models", "a=b", "--prompts", "p.txt"]).judge is None
    assert evaluate.parse(["--models", "a=b", "--judge", "mine.py:f"]).judge == "mine.py:f"


def test_guidance_shift_and_steps_change_the_images(tmp_path, few):
    """Every option of sampling has its effect on the numbers."""
    plain = run("--models", f"base={BASE}", *few)["base"]["reward"]
    for name, value in (("steps", 3), ("shift", 3), ("guidance", 3), ("resolution", 12), ("dtype", "bfloat16")):
        other = run("--models", f"base={BASE}", *few, f"--{name}", value, "--out", tmp_path / name)["base"]["reward"]
        assert other != plain, name
    assert run("--models", f"base={BASE}", *few, "--guidance", 0, "--out", tmp_path / "none")["base"]["reward"] == plain
    wanted = [*few, "--guidance", 3, "--negative-prompt", "a green two", "--out", tmp_path / "negative"]
    guided = json.loads((tmp_path / "guidance" / "results.json").read_text())["rows"][0]["final"]["reward"]
    assert run("--models", f"base={BASE}", *wanted)["base"]["reward"] != tuple(guided)
