"""train_flow.py on an SD3 in small: latents, three text encoders, adapters; and the README's commands for it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_rewards
import tiny_sd3
import torch
from safetensors.torch import load_file

import train_flow
from nano_adrpo import lora, prompts, runtime
from nano_adrpo.text_to_image import TextToImage

ROOT = Path(train_flow.__file__).parent
SMALL = (
    "--rounds 3 --prompts-per-round 2 --group-size 2 --inner-steps 2 --ode-steps 3 --guidance 3 --resolution 16 --eval-every 3 "
    "--eval-samples 2"
).split()


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return tiny_sd3.folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_rewards.folder("clip_score", tmp_path_factory.mktemp("clip"))


@pytest.fixture
def train(tmp_path, sd3, clip):
    """Runs the script with a file of two prompts; -> (folder of the run, its metrics)."""
    (tmp_path / "prompts.txt").write_text("a cat\nthe one\n")

    def run(name, *options, model=sd3):
        argv = [*SMALL, "--model", model, "--reward", f"clip_score:{clip}", "--prompts", tmp_path / "prompts.txt"]
        train_flow.main([*map(str, argv), "--out", str(tmp_path / name), *map(str, options)])
        return tmp_path / name, [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    return run


ADAPTERS = ["--lora-rank", 2, "--lr", 1e-2]


def test_adapters_train_and_the_base_stays(train, sd3, monkeypatch):
    runs, optimizer = [], torch.optim.Adam

    class Run(train_flow.Run):
        def __init__(self, args):
            super().__init__(args)
            runs.append(self)

    monkeypatch.setattr(train_flow, "Run", Run)
    out, rows = train("run", *ADAPTERS, "--dtype", "bfloat16")
    (run,) = runs
    assert isinstance(run.optimizer, optimizer) and {p.dtype for p in run.trained} == {torch.float32}
    assert {p.dtype for p in run.policy.transformer.parameters() if not p.requires_grad} == {torch.bfloat16}
    state = [value for values in run.optimizer.state.values() for value in values.values() if value.dim()]
    assert state and {value.dtype for value in state} == {torch.float32}
    base = load_file(sd3 / "transformer" / "diffusion_pytorch_model.safetensors")
    weights = run.policy.transformer.state_dict()
    assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in base.items())
    assert {path.name for path in out.iterdir()} >= {"adapter", "config.json", "metrics.jsonl"}
    assert not (out / "model").exists()
    assert rows[0]["eval"]["w2"] == 0 < rows[3]["eval"]["w2"]

    model = TextToImage.from_pretrained(sd3, torch.bfloat16, encoders=False)
    lora.load(model.transformer, out / "adapter")
    tuned = {name: p for name, p in model.transformer.named_parameters() if p.requires_grad}
    assert tuned.keys() == {name for name, p in run.policy.transformer.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, run.policy.transformer.get_parameter(name)) for name, p in tuned.items())


def test_all_weights_train_and_open_again(train, sd3):
    out, rows = train("run", "--lr", 1e-3)
    assert {path.name for path in (out / "model").iterdir()} == {"transformer", "vae", "scheduler", "model_index.json"}
    model = TextToImage.from_pretrained(out / "model", base=sd3)
    assert model.encode(["a cat"]).context.shape[0] == 1 and rows[3]["eval"]["w2"] > 1e-6 > rows[0]["eval"]["w2"]
    with pytest.raises(FileNotFoundError, match="text_encoder: no such folder"):
        TextToImage.from_pretrained(out / "model")


def test_a_single_file_and_its_base_are_the_folder(train, sd3, tmp_path):
    file = tiny_sd3.single_file(tmp_path / "sd3_medium.safetensors", sd3, ["transformer", "vae"])
    (_, folder), (_, single) = train("folder", *ADAPTERS), train("file", *ADAPTERS, "--base", sd3, model=file)
    for a, b in zip(folder, single):
        assert a.pop("eval", {}) == pytest.approx(b.pop("eval", {}), rel=1e-3, abs=1e-5)
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_memory_savers_change_nothing(train):
    _, plain = train("plain", *ADAPTERS)
    _, checkpointed = train("checkpointed", *ADAPTERS, "--gradient-checkpointing")
    _, streamed = train("streamed", *ADAPTERS, "--t5", "stream")
    assert plain == checkpointed == streamed
    _, split = train("split", *ADAPTERS, "--micro-batch", 1, "--rollout-batch", 1)
    for a, b in zip(plain[:2], split):
        assert a.pop("eval", {}) == pytest.approx(b.pop("eval", {}), rel=1e-3, abs=1e-4)
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("method", ["dpo", "raft", "orw-cfm-w2", "fixed-beta"])
def test_every_method_trains_adapters(train, method):
    _, rows = train("run", *ADAPTERS, "--method", method)
    assert rows[3]["eval"]["w2"] > 0


def test_embeddings_are_kept_and_no_encoder_is_loaded_again(train, sd3, tmp_path, monkeypatch):
    first, rows = train("first", *ADAPTERS)
    file = tmp_path / "prompts.txt.embeddings.safetensors"
    fresh = prompts.PromptEncoder.from_pretrained(sd3, torch.float32).encode(["a cat", "the one", ""])
    assert torch.equal(load_file(file)["context"], fresh.context) and torch.equal(load_file(file)["pooled"], fresh.pooled)
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(prompts.PromptEncoder, "from_pretrained", lambda *args: pytest.fail("an encoder was loaded"))
        second, again = train("second", *ADAPTERS)
    assert rows == again and file.read_bytes() == before
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)  # the same seed, the same bytes
    train("third", *ADAPTERS, "--negative-prompt", "dog")
    assert file.read_bytes() != before


def test_what_is_saved_is_the_average(train, sd3, monkeypatch):
    steps, step = [], torch.optim.Adam.step

    def watched(self, *args):
        step(self, *args)
        steps.append([p.detach().clone() for group in self.param_groups for p in group["params"]])

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    out, _ = train("run", *ADAPTERS, "--ema", 0.5)
    model = TextToImage.from_pretrained(sd3, encoders=False).transformer
    lora.load(model, out / "adapter")
    saved = [p for p in model.parameters() if p.requires_grad]
    # Six steps: the start has weight 2⁻⁶ and B starts at zero, so the sum over steps is B's whole average.
    for i, parameter in enumerate(saved):
        expected = sum(0.5 ** (len(steps) - k) * values[i] for k, values in enumerate(steps))
        if torch.count_nonzero(steps[0][i]) and parameter.shape[1] == 2:  # a B: [out, rank]
            assert torch.allclose(parameter, expected, atol=1e-6) and not torch.allclose(parameter, steps[-1][i], atol=1e-4)


def test_checkpoints_are_kept(train):
    out, _ = train("run", *ADAPTERS, "--eval-every", 1, "--keep-checkpoints")
    kept = [(out / f"round-{n}" / "adapter" / "adapter_model.safetensors").read_bytes() for n in (1, 2, 3)]
    assert len(set(kept)) == 3 and (out / "adapter" / "adapter_model.safetensors").read_bytes() == kept[2]


def test_phases_are_logged_on_the_console(train, capsys):
    train("run", *ADAPTERS)
    assert re.search(
        r"rollout \d+\.\d\d s \d+\.\d GiB  reward \d+\.\d\d s \d+\.\d GiB  update \d+\.\d\d s", capsys.readouterr().out
    )


def test_json_lines_are_prompts(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "id": 3}\n\n{"prompt": "the one"}\n')
    assert prompts.read_prompts(tmp_path / "p.jsonl") == ["a cat", "the one"]
    (tmp_path / "p.txt").write_bytes("\ufeffa cat\r\nthe\u2028one\n".encode())  # as some editors write it: a mark in front, \r\n
    assert prompts.read_prompts(tmp_path / "p.txt") == ["a cat", "the\u2028one"]
    line2 = "line 2: expected a JSON object"
    for content, message in (
        ('{"prompt": "a"}\n{"text": "b"}', line2),
        ('{"prompt": "a"}\n{"prompt": 3}', line2),
        ('{"prompt": "a"}\n{"prompt": "\\ud83d"}', line2),
        ("\n", "no prompts in it"),
    ):
        (tmp_path / "p.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            prompts.read_prompts(tmp_path / "p.jsonl")


def refused(capsys, train, *options, **kinds):
    with pytest.raises(SystemExit) as stop:
        runtime.run(lambda: train("refused", *options, **kinds))
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    "options, message",
    [
        (["--resolution", 20], "--resolution: resolution 20: expected a multiple of 16"),
        (["--lora-rank", 2, "--lora-targets", "to_x"], "no linear layer whose name ends in 'to_x'"),
        (["--lora-alpha", 2], "--lora-alpha and --lora-targets: expected only with --lora-rank"),
        (["--ema", 1], "argument --ema: 1 is not a number in [0, 1)"),
        (["--base", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_options_are_refused(capsys, tmp_path, train, options, message):
    assert message in refused(capsys, train, *options)
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()


def test_missing_parts_are_named(capsys, tmp_path, train, sd3):
    file = tiny_sd3.single_file(tmp_path / "sd3_medium.safetensors", sd3, ["transformer", "vae"])
    assert "no text_encoder in this file" in refused(capsys, train, model=file)
    shutil.copytree(sd3, tmp_path / "sd3")
    shutil.rmtree(tmp_path / "sd3" / "vae")
    assert "vae: no such folder; it turns latents into images" in refused(capsys, train, model=tmp_path / "sd3")


def test_a_file_that_holds_no_embeddings_is_not_written_over(capsys, tmp_path, train, clip):
    shutil.copy(clip / "model.safetensors", tmp_path / "other.safetensors")
    before = (tmp_path / "other.safetensors").read_bytes()
    assert "not a file of prompt embeddings" in refused(capsys, train, "--embeddings", tmp_path / "other.safetensors")
    assert (tmp_path / "other.safetensors").read_bytes() == before


def test_a_used_run_folder_is_refused_before_anything_is_loaded(capsys, tmp_path, train, monkeypatch):
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / "kept").touch()
    monkeypatch.setattr(prompts, "cached", lambda *args: pytest.fail("loaded"))
    assert "the folder is not empty" in refused(capsys, train)


def test_what_does_not_fit_is_told_before_prompts_are_encoded(capsys, tmp_path, train, sd3, monkeypatch):
    monkeypatch.setattr(prompts, "cached", lambda *args: pytest.fail("an encoder was loaded"))
    assert "--resolution: resolution 20: expected a multiple of 16" in refused(capsys, train, "--resolution", 20)
    shutil.copytree(sd3, tmp_path / "cut")
    file = tmp_path / "cut" / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file}: not a whole safetensors file" in refused(capsys, train, model=tmp_path / "cut")


@pytest.mark.slow  # torch.compile calls a C++ compiler
def test_a_compiled_transformer_trains_the_same(train):
    (_, plain), (_, compiled) = train("plain", *ADAPTERS), train("compiled", *ADAPTERS, "--compile")
    assert plain[1]["loss"] == pytest.approx(compiled[1]["loss"], rel=1e-3, abs=1e-4)


# --------------------------------------------------------------------------------------------------------------- README

# What makes the README's commands run here: the last of an option counts.
HERE = {
    "train_flow.py": "--resolution 16 --rounds 1 --ode-steps 2 --prompts-per-round 2 --group-size 2 --eval-samples 2 "
    "--rollout-batch 2 --micro-batch 2 --inner-steps 1",
    "nano_adrpo.sample": "--resolution 16 --steps 2",
    "nano_adrpo.evaluate": "--resolution 16 --steps 2 --samples 2 --seeds 1",
}


def readme_commands(section):
    """The indented commands of a section, lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def test_the_readmes_sd3_commands_run(tmp_path, sd3, clip):
    commands = [line for line in readme_commands("Stable Diffusion 3") if line.startswith(".venv/bin/python")]
    assert len(commands) == 3
    (tmp_path / "prompts.txt").write_text("a cat\nthe one\n")
    for command in commands:
        script = next(name for name in HERE if name in command)
        command = command.replace(".venv/bin/python", sys.executable).replace(" train_flow.py", f" {ROOT / 'train_flow.py'}")
        command = command.replace("--device cuda", "--device cpu")
        environment = {
            "SD3": str(sd3),
            "CLIP": str(clip),
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            f"{command} {HERE[script]}", shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 8
    table = (tmp_path / "runs" / "sd3-evaluation" / "table.md").read_text()
    assert "| base |" in table and "| tuned |" in table and (tmp_path / "prompts.txt.embeddings.safetensors").is_file()
