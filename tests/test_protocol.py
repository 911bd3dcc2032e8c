"""The paper's protocols as docs/sd3.md and docs/language.md have them: loops of commands that bash expands, on tiny folders."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import tiny_rewards
import tiny_sd3
import torch
from grpo_runs import BASE, edited

import train_flow
import train_grpo
from nano_adrpo import evaluate
from nano_adrpo.evaluation import progress
from nano_adrpo.files.png import write_png
from nano_adrpo.models.decoder import Config, RewardModel

ROOT = Path(train_flow.__file__).parent
MAINS = {"train_flow.py": train_flow.main, "train_grpo.py": train_grpo.main, "nano_adrpo.evaluate": evaluate.main}


def section(page, title):
    return (ROOT / "docs" / page).read_text("utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]


def run(script, environment, replaced, small):
    """Runs a page's commands in this process and on the CPU; bash expands their variables and loops. -> the names of what ran

    replaced   {a text of the page: what stands there instead}
    small      {name of a command: more options}; the last of an option counts
    """
    for old, new in replaced.items():
        assert old in script, old
        script = script.replace(old, new)
    shell = 'python() { printf "%s\\0" "$@"; printf "\\n\\0"; }\nhf() { :; }\n' + script.replace("-m nano", "nano")
    done = subprocess.run(["bash", "-euc", shell], env=environment, capture_output=True, text=True, check=True)
    ran = []
    for words in filter(None, done.stdout.split("\n\0")):
        name, *options = words.strip("\0").split("\0")
        options = " ".join(options).replace("--device cuda", "").replace("--dtype bfloat16", "").split()
        MAINS[name]([*options, *small.get(name, "").split()])
        ran.append(name)
    return ran


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_flow.plots, "pyplot", lambda file: None)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------- images

METHODS = "adrpo fixed-beta orw-cfm-w2 raft dpo-offline"
# Fewer methods (the others train adapters in other tests), seeds, checkpoints and noises.
FEWER = {METHODS: "adrpo dpo-offline", "0 1 2": "0 1", "$(seq 3 3 90)": "1 2", "--seeds 3": "--seeds 2"}
FEWER |= {"docs/sd3.json": str(ROOT / "docs" / "sd3.json")}
SMALL = {
    "train_flow.py": "--resolution 16 --rounds 2 --eval-every 1 --ode-steps 1 --prompts-per-round 1 --group-size 2 "
    "--inner-steps 1 --eval-prompts 1 --eval-samples 2 --rollout-batch 4 --micro-batch 1 --lora-rank 2 --lr 1e-2 --t5 load "
    "--device cpu --dtype float32",
    "nano_adrpo.evaluate": "--resolution 16 --steps 1 --samples 2 --batch 4 --t5 load",
}


def test_the_protocol_of_images_runs(here):
    folders = {"SD3": tiny_sd3.folder(here / "sd3"), "PATH": "/usr/bin:/bin"}
    names = {"CLIP": "aesthetic", "PICK": "pick_score", "BLIP": "blip_score", "IMAGE_REWARD": "image_reward"}
    folders |= {variable: tiny_rewards.folder(name, here / name) for variable, name in names.items()}
    (here / "photographs").mkdir()
    for n, image in enumerate(torch.rand(5, 3, 20, 24, generator=torch.Generator().manual_seed(0))):
        write_png(here / "photographs" / f"{n}.png", 2 * image - 1)
    (here / "drawbench.csv").write_text('"Prompts","Category"\n"a cat","Colors"\n"the one","Counting"\n')

    page = section("sd3.md", "The paper's Table 1 and Figure 3")
    lines = "\n".join(line[4:] for line in page.splitlines() if line.startswith("    "))
    script = lines[lines.index("for method") :].replace(".venv/bin/python", "python")
    ran = run(script, {name: str(value) for name, value in folders.items()}, FEWER, SMALL)
    assert ran == ["train_flow.py"] * 4 + ["nano_adrpo.evaluate"] * 2
    assert {*METHODS.split()} < train_flow.METHODS.keys()
    methods = FEWER[METHODS].split()
    for method in methods:
        config = json.loads((here / "runs" / f"{method}-1" / "config.json").read_text())
        assert (config["method"], config["seed"], config["keep_checkpoints"]) == (method, 1, True)

    table = json.loads((here / "runs" / "table1" / "results.json").read_text())
    assert [row["setting"] for row in table["rows"]] == ["base", *methods]
    scores = ["clip_score", "aesthetic", "blip_score", "image_reward", "pick_score"]
    for row in table["rows"]:
        assert {*scores, "clip_diversity", "clip_frechet", "w2", "reward/Colors", "reward/Counting"} <= row["final"].keys()
        assert row["runs"] == (1 if row["setting"] == "base" else 2) and bool(row["noise"]) == (row["runs"] == 2)
        for score in scores:
            assert (here / "runs" / "table1" / "failures" / row["setting"] / f"{score}.png").is_file()
    text = (here / "runs" / "table1" / "table.md").read_text()
    assert re.search(r"\| adrpo \| \S+ ± \S+ \(\S+\) \|", text) and re.search(r"\| base \| \S+ \(\S+\) \|", text)

    figure = json.loads((here / "runs" / "figure3" / "results.json").read_text())
    assert {row["setting"]: len(row["path"]) for row in figure["rows"]} == {"base": 1} | dict.fromkeys(methods, 2)
    assert figure["seeds"] == 1 and all(row["path"][-1]["w2"] > 0 for row in figure["rows"][1:])


def test_thirty_checkpoints_are_where_the_figure_looks_for_them():
    args = train_flow.parse("--rounds 90 --eval-every 3 --keep-checkpoints".split())
    kept = [round for round in train_flow.run.rounds(args, -1) if round and train_flow.run.evaluation_is_due(args, round)]
    assert kept == list(range(3, 91, 3)) and len(kept) == 30


# ------------------------------------------------------------------------------------------------------------------ text

FEWER_OF_TEXT = {"0 1 2": "0 1", "new-tokens 256": "new-tokens 9"}
FEWER_OF_TEXT |= {"--rounds 200": "--rounds 5 --prompts-per-round 2 --group-size 4"}


def test_the_protocol_of_texts_runs(here, monkeypatch):
    """The demo's model with a template that reads enable_thinking, and a reward model of its tokens."""
    policy = edited(here / "qwen")
    (policy / "chat_template.jinja").write_text("{{ messages[-1].content }}{% if enable_thinking %}+{% endif %}")
    vocabulary = json.loads((BASE / "config.json").read_text())["vocab_size"]
    model = RewardModel(Config("gemma", vocabulary, 16, 24, 2, 2, 64))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    model.files = {"tokenizer.json": (BASE / "tokenizer.json").read_bytes()}
    model.save_pretrained(here / "reward")
    (here / "prompts.txt").write_text("17+48=\n29+34=\n")
    (here / "others.txt").write_text("38+45=\n19+19=\n66+27=\n")

    page = section("language.md", "The paper's Figure 4: prompts and a reward model")
    (script,), (lines,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("sh", "python"))
    script = script.replace("QWEN=Qwen3-0.6B RM=RM-Gemma-2B", f"QWEN={policy} RM={here / 'reward'}")
    ran = run(script, {"PATH": "/usr/bin:/bin"}, FEWER_OF_TEXT, {})
    assert ran == ["train_grpo.py"] * 4 + ["nano_adrpo.evaluate"]
    for method in ("grpo", "adrpo"):
        config = json.loads((here / "runs" / f"{method}-1" / "config.json").read_text())
        assert (config["method"], config["beta0"], config["thinking"], config["rounds"]) == (method, 0.04, "off", 5)
    rows = json.loads((here / "runs" / "figure4" / "results.json").read_text())["rows"]
    assert [(row["setting"], row["runs"]) for row in rows] == [("base", 1), ("grpo", 2), ("adrpo", 2)]
    assert {"reward", "entropy", "kl_k1", "length"} <= rows[0]["final"].keys() and "pass@1" not in rows[0]["final"]

    drawn = []
    monkeypatch.setattr(progress, "picture", lambda file, runs: drawn.append((file, [len(files) for files in runs.values()])))
    printed = {}
    exec(lines.replace("(0, 1, 2)", "(0, 1)"), {"print": lambda text: printed.update(text=text)})
    assert drawn == [("figure4.png", [2, 2])]
    assert re.search(r"\| entropy \| adrpo \|( \S+ ± \S+ \|){5}", printed["text"])
