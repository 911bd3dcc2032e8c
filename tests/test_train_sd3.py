"""train_flow.py on an SD3 in small: latents, three text encoders, adapters; and the commands of docs/sd3.md."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import scripts
import tiny_rewards
import tiny_sd3
import torch
from safetensors.torch import load_file

import train_flow
from nano_adrpo import lora
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.text_to_image import sd3 as release

ROOT = Path(train_flow.__file__).parent
SMALL = (
    "--rounds 2 --prompts-per-round 2 --group-size 2 --inner-steps 1 --ode-steps 2 --guidance 3 --resolution 16 --eval-every 2 "
    "--eval-samples 2 --beta-unit reward --lr-schedule constant"
).split()


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return tiny_sd3.folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_rewards.folder("clip_score", tmp_path_factory.mktemp("clip"))


@pytest.fixture
def train(tmp_path, sd3, clip, monkeypatch):
    """Runs the script with a file of two prompts, without pictures; -> (folder of the run, its metrics)."""
    monkeypatch.setattr(train_flow.plots, "pyplot", lambda file: None)
    (tmp_path / "prompts.txt").write_text("a cat\nthe one\n")

    def run(name, *options, model=sd3):
        beta0 = [] if "--method" in options else ["--beta0", 1]  # the other methods have none
        argv = [*SMALL, *beta0, "--model", model, "--reward", f"clip_score:{clip}", "--prompts", tmp_path / "prompts.txt"]
        train_flow.main([*map(str, argv), "--out", str(tmp_path / name), *map(str, options)])
        return tmp_path / name, [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    return run


ADAPTERS = ["--lora-rank", 2, "--lr", 1e-2]


def test_adapters_train_and_the_base_stays(train, sd3, monkeypatch):
    opened, optimizers, open_policy, AdamW = [], [], train_flow.open_policy, torch.optim.AdamW
    monkeypatch.setattr(train_flow, "open_policy", lambda *args: opened.append(open_policy(*args)) or opened[0])
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *args, **kwargs: optimizers.append(AdamW(*args, **kwargs)) or optimizers[0]
    )
    out, rows = train("run", *ADAPTERS, "--dtype", "bfloat16", "--rounds", 1, "--ode-steps", 1)
    transformer, (optimizer,) = opened[0][0].transformer, optimizers
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in transformer.parameters() if not p.requires_grad} == {torch.bfloat16}
    state = [value for values in optimizer.state.values() for value in values.values() if value.dim()]
    assert state and {value.dtype for value in state} == {torch.float32}
    base = load_file(sd3 / "transformer" / "diffusion_pytorch_model.safetensors")
    weights = transformer.state_dict()
    assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in base.items())
    assert {path.name for path in out.iterdir()} >= {"adapter", "config.json", "metrics.jsonl"}
    assert not (out / "model").exists()
    assert rows[-1]["eval"]["w2"] > 0

    model = TextToImage.from_pretrained(sd3, torch.bfloat16, encoders=False)
    lora.load(model.transformer, out / "adapter")
    tuned = {name: p for name, p in model.transformer.named_parameters() if p.requires_grad}
    assert tuned.keys() == {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, transformer.get_parameter(name)) for name, p in tuned.items())


def test_all_weights_train_and_open_again(train, sd3):
    out, rows = train("run", "--lr", 1e-3)
    assert {path.name for path in (out / "model").iterdir()} == {"transformer", "vae", "scheduler", "model_index.json"}
    model = TextToImage.from_pretrained(out / "model", base=sd3)
    assert model.encode(["a cat"]).context.shape[0] == 1 and rows[-1]["eval"]["w2"] > 1e-6 > rows[0]["eval"]["w2"]
    with pytest.raises(FileNotFoundError, match="text_encoder: no such folder"):
        TextToImage.from_pretrained(out / "model")


def test_a_single_file_and_its_base_are_the_folder(train, sd3, tmp_path):
    file = tiny_sd3.single_file(tmp_path / "sd3_medium.safetensors", sd3, ["transformer", "vae"])
    (_, folder), (_, single) = train("folder", *ADAPTERS), train("file", *ADAPTERS, "--base", sd3, model=file)
    for a, b in zip(folder, single):
        for name in ("eval", "eval_error"):
            assert a.pop(name, {}) == pytest.approx(b.pop(name, {}), rel=1e-3, abs=1e-5)
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_memory_savers_change_nothing(train):
    _, plain = train("plain", *ADAPTERS)
    _, checkpointed = train("checkpointed", *ADAPTERS, "--gradient-checkpointing")
    _, streamed = train("streamed", *ADAPTERS, "--t5", "stream")
    assert plain == checkpointed == streamed
    _, split = train("split", *ADAPTERS, "--micro-batch", 1, "--rollout-batch", 1)
    for a, b in zip(plain[:2], split):
        for name in ("eval", "eval_error"):
            assert a.pop(name, {}) == pytest.approx(b.pop(name, {}), rel=1e-3, abs=1e-4)
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("method", ["dpo", "raft"])
def test_every_method_trains_adapters(train, method):
    _, rows = train("run", *ADAPTERS, "--method", method)
    assert rows[-1]["eval"]["w2"] > 0


def test_embeddings_are_kept_and_no_encoder_is_loaded_again(train, sd3, tmp_path, monkeypatch):
    first, rows = train("first", *ADAPTERS)
    file = tmp_path / "prompts.txt.embeddings.safetensors"
    fresh, kept = release.PromptEncoder.from_pretrained(sd3, torch.float32).encode(["a cat", "the one", ""]), load_file(file)
    for prefix, some in (("", slice(2)), ("negative.", slice(2, 3))):
        assert torch.equal(kept[f"{prefix}context"], fresh.context[some])
        assert torch.equal(kept[f"{prefix}pooled"], fresh.pooled[some])
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(release.PromptEncoder, "from_pretrained", lambda *args, **options: pytest.fail("an encoder was loaded"))
        second, again = train("second", *ADAPTERS)
    assert rows == again and file.read_bytes() == before
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)  # the same seed, the same bytes
    train("third", *ADAPTERS, "--negative-prompt", "dog")
    assert file.read_bytes() != before


def test_checkpoints_are_kept(train):
    out, _ = train("run", *ADAPTERS, "--eval-every", 1, "--keep-checkpoints")
    kept = [(out / f"round-{n}" / "adapter" / "adapter_model.safetensors").read_bytes() for n in (1, 2)]
    assert len(set(kept)) == 2 and (out / "adapter" / "adapter_model.safetensors").read_bytes() == kept[1]


def refused(capsys, train, *options, **kinds):
    return scripts.refused(capsys, lambda: train("refused", *options, **kinds))


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
    monkeypatch.setattr(train_flow, "cached", lambda *args: pytest.fail("loaded"))
    assert "the folder is not empty" in refused(capsys, train)


def test_what_does_not_fit_is_told_before_prompts_are_encoded(capsys, tmp_path, train, sd3, monkeypatch):
    monkeypatch.setattr(train_flow, "cached", lambda *args: pytest.fail("an encoder was loaded"))
    assert "--resolution: resolution 20: expected a multiple of 16" in refused(capsys, train, "--resolution", 20)
    shutil.copytree(sd3, tmp_path / "cut")
    file = tmp_path / "cut" / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file}: not a whole safetensors file" in refused(capsys, train, model=tmp_path / "cut")


@pytest.mark.slow  # torch.compile calls a C++ compiler
def test_a_compiled_transformer_trains_the_same(train):
    (_, plain), (_, compiled) = train("plain", *ADAPTERS), train("compiled", *ADAPTERS, "--compile")
    assert plain[1]["loss"] == pytest.approx(compiled[1]["loss"], rel=1e-3, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------------ docs

# What makes the commands of docs/sd3.md run here: the last of an option counts.
HERE = {
    "train_flow.py": "--resolution 16 --rounds 1 --ode-steps 2 --prompts-per-round 2 --group-size 2 --eval-samples 2 "
    "--rollout-batch 2 --micro-batch 2 --inner-steps 1 --device cpu --dtype float32",
    "nano_adrpo.sample": "--resolution 16 --steps 2 --device cpu --dtype float32",
    "nano_adrpo.evaluate": "--resolution 16 --steps 2 --samples 2 --seeds 1 --device cpu --dtype float32",
}


def test_the_commands_of_the_docs_run(tmp_path, sd3, clip):
    text = (ROOT / "docs" / "sd3.md").read_text(encoding="utf-8")
    lines = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ")).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if line.startswith(".venv/bin/python") and any(name in line for name in HERE)]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "the one"}\n')
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    environment = {"SD3": str(sd3), "CLIP": str(clip), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    ran = []
    for command in commands[:3]:
        script = next(name for name in HERE if name in command)
        command = (
            command.replace("--device cuda", "")
            .replace(".venv/bin/python", sys.executable)
            .replace(" train_flow.py", f" {ROOT / 'train_flow.py'}")
        )
        done = subprocess.run(
            f"{command} {HERE[script]}", shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        ran.append(script)
    assert ran == list(HERE)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 8
    table = (tmp_path / "runs" / "sd3-evaluation" / "table.md").read_text()
    assert "| base |" in table and "| tuned |" in table and (tmp_path / "prompts.jsonl.embeddings.safetensors").is_file()
