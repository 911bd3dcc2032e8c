"""evaluate: the training script's numbers, checkpoints, others' images, going on, judges, refusals."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import train_flow
from nano_adrpo import errors, evaluate, metrics
from nano_adrpo.demo import FLOW, HERE
from nano_adrpo.evaluation import image_folders, plots
from nano_adrpo.files.png import read_png, write_png
from nano_adrpo.rewards.images import ClipScore
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.text_to_image.prompts import read_prompts
from nano_adrpo.training.life import Life

BASE = HERE / "base"
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


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Options for an evaluation of two prompts without pictures, which takes a second."""
    monkeypatch.setattr(plots, "pyplot", lambda file: None)
    (tmp_path / "prompts.txt").write_text("a green two\na blue nine\n")
    return ["--prompts", tmp_path / "prompts.txt", "--steps", 2, "--samples", 2, "--seeds", 2, "--out", tmp_path / "out"]


def run(*options):
    return evaluate.main([str(option) for option in options])


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


def write_images(folder, seed=0, count=2, size=8):
    folder.mkdir(parents=True)
    drawn = 2 * torch.rand(2 * count, 1, size, size, generator=torch.Generator().manual_seed(seed)) - 1
    files = [folder / f"{i // 2:04d}_{i % 2:02d}.png" for i in range(2 * count)]
    for file, image in zip(files, drawn):
        write_png(file, image)
    return torch.stack([read_png(file) for file in files])


def test_the_demos_judge_looks_at_the_demos_images(tmp_path):
    write_images(tmp_path / "plain", count=130, size=16)
    with pytest.raises(errors.InputError, match=r"plain: the demo's judge was given images \[1, 16, 16\]; expected its own"):
        run("--models", f"x={tmp_path / 'plain'}", "--samples", 2, "--out", tmp_path / "out")


def test_images_of_another_system_enter_the_table(tmp_path, few):
    for seed in (0, 1):
        write_images(tmp_path / "seeded" / f"seed{seed}", seed)
    drawn = write_images(tmp_path / "plain", 3)
    table = run("--models", f"base={BASE}", f"seeded={tmp_path / 'seeded'}", f"plain={tmp_path / 'plain'}", *few)
    texts = ["a green two"] * 2 + ["a blue nine"] * 2
    assert table["plain"]["reward"][0] == pytest.approx(ClipScore(HERE / "clip")(drawn, texts).mean().item(), rel=1e-5)
    assert "w2" not in table["plain"] and math.isnan(table["plain"]["reward"][1]) and table["seeded"]["reward"][1] > 0
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    results = (tmp_path / "out" / "results.json").read_text()
    assert json.loads(results)["rows"][2]["final"]["reward"] == [table["plain"]["reward"][0], None] and "NaN" not in results
    assert lines[-1].startswith("| plain |") and lines[-1].endswith("| – |") and "±" not in lines[-1]
    (tmp_path / "plain" / "0001_00.png").unlink()
    (tmp_path / "plain" / "0001_01.png").unlink()
    with pytest.raises(FileNotFoundError, match="plain: no image of prompt 1; expected some of each of the 2 prompts"):
        run("--models", f"other={tmp_path / 'plain'}", *few[:-1], tmp_path / "second")


def named(folder, *names):
    """write_images, but under these names."""
    drawn = write_images(folder)
    for file, name in zip(sorted(folder.iterdir()), names):
        file.rename(folder / name)
    return drawn


def test_names_of_any_kind_are_taken_in_their_order(tmp_path, few, capsys):
    drawn = named(tmp_path / "plain", "a 2.png", "a 9.png", "a 10.png", "b 1.PNG")
    table = run("--models", f"plain={tmp_path / 'plain'}", *few)
    texts = ["a green two"] * 2 + ["a blue nine"] * 2
    assert table["plain"]["reward"][0] == pytest.approx(ClipScore(HERE / "clip")(drawn, texts).mean().item(), rel=1e-5)
    assert "plain: 2 images a prompt in the order of names; a 2.png is of 'a green two'" in capsys.readouterr().out


def test_a_table_says_which_image_is_of_which_prompt(tmp_path, few):
    drawn = named(tmp_path / "plain", "p.png", "q.png", "r.png", "s.png")
    lines = ["prompt,file", "1,p.png", "a green two,q.png", "0,s.png", "0,r.png"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    options = ["--models", f"plain={tmp_path / 'plain'}", *few, "--images", tmp_path / "t.csv"]
    table = run(*options)["plain"]
    texts = ["a green two"] * 3 + ["a blue nine"]
    ordered = drawn[[1, 3, 2, 0]]
    assert table["reward"][0] == pytest.approx(ClipScore(HERE / "clip")(ordered, texts).mean().item(), rel=1e-5)
    pairs = [(ordered[i] - ordered[j]).square().mean().sqrt().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert table["pixel_diversity"][0] == pytest.approx(sum(pairs) / 3, rel=1e-5)  # the other prompt has one image, so no pair
    for line, message in (
        ("0,z.png", r"t.csv, row 5: .*z.png: no such file; expected"),
        ("2,p.png", r"t.csv, row 5: no prompt '2'; expected one of --prompts, or a number from 0 to 1"),
        ("a cat,p.png", r"t.csv, row 5: no prompt 'a cat'; expected"),
    ):
        (tmp_path / "t.csv").write_text("\n".join([*lines, line]))
        with pytest.raises(ValueError, match=message):
            run(*options, "--out", tmp_path / "other")


def test_any_number_of_images_a_prompt(tmp_path, few):
    write_images(tmp_path / "plain")
    (tmp_path / "plain" / "0001_01.png").unlink()
    values = run("--models", f"plain={tmp_path / 'plain'}", *few)["plain"]
    a, b, c = (read_png(tmp_path / "plain" / name) for name in ("0000_00.png", "0000_01.png", "0001_00.png"))
    assert values["pixel_diversity"][0] == pytest.approx((a - b).square().mean().sqrt().item(), rel=1e-5)
    (tmp_path / "plain" / "0000_01.png").unlink()  # one image a prompt: no diversity
    single = run("--models", f"base={BASE}", f"plain={tmp_path / 'plain'}", *few[:-1], tmp_path / "single")["plain"]
    assert "pixel_diversity" not in single and "clip_diversity" not in single
    expected = ClipScore(HERE / "clip")(torch.stack([a, c]), ["a green two", "a blue nine"])
    assert single["reward"][0] == pytest.approx(expected.mean().item(), rel=1e-5)
    write_png(tmp_path / "plain" / "0001_00.png", c.expand(3, -1, -1))  # grey beside colour
    both = image_folders.read_images([tmp_path / "plain" / name for name in ("0000_00.png", "0001_00.png")])
    assert torch.equal(both, torch.stack([a, c]).expand(-1, 3, -1, -1))
    named(tmp_path / "three", "x.png", "y.png", "z.png", "0.png")
    (tmp_path / "three" / "0.png").unlink()
    with pytest.raises(ValueError, match="three: 3 images, which 2 prompts do not divide; expected names as PROMPT_SAMPLE.png"):
        run("--models", f"three={tmp_path / 'three'}", *few)


def test_the_distance_to_real_images(tmp_path, few, capsys):
    drawn, real = write_images(tmp_path / "plain"), [*write_images(tmp_path / "real", 5), torch.zeros(1, 6, 12)]
    write_png(tmp_path / "real" / "of another size.png", real[-1])
    options = [*few, "--reference-images", tmp_path / "real"]
    values = run("--models", f"plain={tmp_path / 'plain'}", *options)["plain"]
    clip = ClipScore(HERE / "clip")
    theirs = torch.cat([clip.embed_images(read_png(file)[None]) for file in sorted((tmp_path / "real").iterdir())])
    assert len(theirs) == 5
    pair = (x / x.norm(dim=1, keepdim=True) for x in (clip.embed_images(drawn), theirs))
    assert values["clip_frechet"][0] == pytest.approx(metrics.frechet_distance(*pair), rel=1e-4)
    line = f"--reference-images: 5 real images, 4 of a model; with no more than {theirs.shape[1]}, the embeddings' width"
    assert line in capsys.readouterr().out
    model = run("--models", f"base={BASE}", *options, "--out", tmp_path / "drawn", "--clip-diversity", "projected")["base"]
    assert model["clip_frechet"][0] > 0
    for folder in ("few", "others"):
        (tmp_path / folder).mkdir()
    for name in "ab":
        (tmp_path / "others" / f"{name}.jpg").touch()
    (tmp_path / "mine.py").write_text("def bright(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    for more, message in (
        (["--reference-images", tmp_path / "few"], "few: 0 images in it; expected a folder of at least two"),
        (["--reference-images", tmp_path / "others"], "a.jpg: a JPEG file, which is not read; expected PNG"),
        (["--rewards", f"{tmp_path / 'mine.py'}:bright"], "--reference-images: expected only with a reward of CLIP's"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run("--models", f"base={BASE}", *options, *more)


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


def test_a_jpeg_is_named_with_the_line_that_converts_it(tmp_path, few):
    write_images(tmp_path / "some photos")
    for file in (tmp_path / "some photos").iterdir():
        file.with_suffix(".jpg").write_bytes(b"\xff\xd8\xff\xe0")
        file.unlink()
    convert = f"mogrify -format png '{tmp_path / 'some photos'}'/*.jpg"
    with pytest.raises(ValueError, match="0000_00.jpg: a JPEG file, which is not read; expected PNG, as") as error:
        run("--models", f"photos={tmp_path / 'some photos'}", *few)
    assert convert in str(error.value) and "\n" not in str(error.value)
    write_images(tmp_path / "both")
    (tmp_path / "both" / "0000_00.jpg").write_bytes(b"\xff\xd8\xff\xe0")  # what was converted may stay
    assert run("--models", f"both={tmp_path / 'both'}", *few)


def test_a_models_folder_may_show_images(tmp_path, few):
    shutil.copytree(BASE, tmp_path / "base")
    write_png(tmp_path / "base" / "example.png", torch.zeros(3, 4, 4))  # as the public SD3 folder does
    a, b = (
        run("--models", f"base={folder}", *few[:-1], tmp_path / f"out{i}") for i, folder in enumerate((BASE, tmp_path / "base"))
    )
    assert a == b


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


def test_images_of_several_sizes_are_refused(tmp_path, few):
    write_images(tmp_path / "plain")
    write_png(tmp_path / "plain" / "0001_01.png", torch.zeros(1, 9, 8))
    with pytest.raises(ValueError, match=r"0001_01.png: is \[1, 9, 8\]; expected \[1, 8, 8\]"):
        run("--models", f"plain={tmp_path / 'plain'}", *few)


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
        (["--models", f"a={BASE}", "--judge", "judge"], "--judge: : no such file; expected one with the function 'judge'"),
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
