"""evaluate: folders of other systems' images, and of real ones."""

import json
import math
import shutil

import evaluate_runs
import pytest
import torch
from evaluate_runs import BASE, run, write_images

from nano_adrpo import errors, metrics
from nano_adrpo.demo import HERE
from nano_adrpo.evaluation import image_folders
from nano_adrpo.files.png import read_png, write_png
from nano_adrpo.rewards.images import ClipScore

few = evaluate_runs.few


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


def test_a_number_in_a_name_is_no_prompts_text(tmp_path):
    names = "0_0.png", "1_0.png", "2_0.png", "3_0.png"
    named(tmp_path / "plain", *names)
    found = image_folders.files_of(tmp_path / "plain", 0, ["3", "a cat", "0", "b"])  # as PartiPrompts has "42" and "0"
    assert [[file.name for file in some] for some in found] == [[name] for name in names]


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


def test_images_of_several_sizes_are_refused(tmp_path, few):
    write_images(tmp_path / "plain")
    write_png(tmp_path / "plain" / "0001_01.png", torch.zeros(1, 9, 8))
    with pytest.raises(ValueError, match=r"0001_01.png: is \[1, 9, 8\]; expected \[1, 8, 8\]"):
        run("--models", f"plain={tmp_path / 'plain'}", *few)
