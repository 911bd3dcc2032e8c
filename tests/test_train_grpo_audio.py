"""train_grpo.py --task audio: the same loop on questions about sounds; each of its options does something; bad input."""

import json

import pytest
import scripts
import tiny_omni
import torch
from grpo_runs import BASE, watch
from safetensors.torch import load_file
from scripts import lines, written

import train_grpo
from nano_adrpo.files.wav import write_wav
from nano_adrpo.models.omni import Omni
from nano_adrpo.rewards import choices

OPTIONS = ["e", "a dog"]
SIZES = "--rounds 1 --prompts-per-round 2 --group-size 4 --eval-samples 2 --lr 3e-3 --max-new-tokens 4 --chat-template none"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_omni.folder(tmp_path_factory.mktemp("omni"))


@pytest.fixture
def few(tmp_path, model, monkeypatch):
    """A run of one round on questions about two sounds; -> a function of its folder's name and more options."""
    monkeypatch.setattr(train_grpo.plots, "pyplot", lambda file: None)
    reward = "    assert all('Is it' in prompt for prompt in prompts)\n    return [len(text) for text in completions]\n"
    (tmp_path / "mine.py").write_text(f"def long(prompts, completions):\n{reward}")
    rows = []
    for number in (0, 1):
        write_wav(tmp_path / f"{number}.wav", tiny_omni.clip(0.2 + 0.1 * number, number))
        rows.append({"question": f"Is it {number}?", "choices": OPTIONS, "answer": "e", "audio": f"{number}.wav"})
    for name, some in (("train", rows), ("test", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    files = ["--model", model, "--problems", tmp_path / "train.jsonl", "--held-out", tmp_path / "test.jsonl"]
    files += ["--reward", f"{tmp_path / 'mine.py'}:long"]

    def run(name, *options):
        train_grpo.main([*SIZES.split(), "--task", "audio", *map(str, [*files, *options]), "--out", str(tmp_path / name)])
        return tmp_path / name

    return run


def test_the_loop_trains_what_hears_and_leaves_the_tower(tmp_path, few, model, monkeypatch):
    seen = watch(monkeypatch)
    out = few("run", "--inner-epochs", 2)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, out / "model"))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys() and moved and not any("audio_tower" in key for key in moved)
    last = lines(out)[-1]
    assert last["grad_norm"] > 0 and last["eval"]["kl_k3"] > 0 and {"accuracy", "reward"} <= last.keys()
    assert set(last["eval"]) == {"reward", "pass@1", "entropy", "kl_k1", "kl_k3", "length"}
    drawn = torch.randint(2, (2,), generator=torch.Generator().manual_seed(0)).tolist()
    counts = [len(clip) for (clip,) in seen["rollouts"][0].clips]
    assert counts == [[5, 7][row] for row in drawn for _ in range(4)]  # 0.2 s and 0.3 s, those of a group side by side
    assert choices.ask("Is it 0?", OPTIONS, "answer") in (out / "samples.txt").read_text()
    assert Omni.from_pretrained(out / "model").config == Omni.from_pretrained(model).config
    again = few("again", "--inner-epochs", 2)  # with embeddings that are read, not computed
    assert written(again)["metrics.jsonl"] == written(out)["metrics.jsonl"]


def test_adapters_are_the_texts_alone(few):
    out = few("run", "--lora-rank", 2, "--embeddings", "none")
    keys = load_file(out / "adapter" / "adapter_model.safetensors").keys()
    assert keys and not any("audio_tower" in key for key in keys)
    assert not (out.parent / "train.jsonl.embeddings").exists() and len(lines(out)) == 2


def test_the_rewards_are_by_default_the_choice_and_the_form(few):
    assert train_grpo.parse(["--task", "audio", "--problems", "a", "--held-out", "b"]).reward == ["choice", "answer_format"]
    out = few("run", "--reward", "choice@2", "answer_format@1", "--rounds", 0)
    assert {"reward", "reward_choice", "reward_answer_format", "pass@1"} <= lines(out)[0]["eval"].keys()


def test_each_option_does_something(tmp_path, few, monkeypatch):
    seen = watch(monkeypatch)
    plain = few("plain")
    assert len(list((tmp_path / "train.jsonl.embeddings").iterdir())) == 2
    asked = few("asked", "--prompt-form", "think", "--embeddings", tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2
    assert choices.ask("Is it 0?", OPTIONS, "think") in (asked / "samples.txt").read_text()
    assert written(plain)["metrics.jsonl"] != written(asked)["metrics.jsonl"]
    (tmp_path / "sounds").mkdir()
    for number in (0, 1):
        write_wav(tmp_path / "sounds" / f"{number}.wav", tiny_omni.clip(0.4))
    few("other", "--audio-folder", tmp_path / "sounds")
    assert {len(clip) for (clip,) in seen["rollouts"][-1].clips} == {10}


def test_bad_input_is_one_line_before_any_work(capsys, tmp_path, few, model):
    problems = tmp_path / "train.jsonl"
    row = json.loads(problems.read_text().splitlines()[0])
    for options, message in (
        (["--problems", tmp_path / "no.jsonl"], "no.jsonl: no such file"),
        (["--audio-folder", tmp_path / "no"], f"{problems}, line 1: no such file: '{tmp_path / 'no' / '0.wav'}'"),
        (["--max-prompt-tokens", 20], f"{problems}, --max-prompt-tokens 20: prompt 0 has"),
        (["--prompt-form", "short"], "argument --prompt-form: invalid choice: 'short'"),
        (["--model", BASE], f"--model {BASE}: a qwen3 reads text only; expected Qwen2.5-Omni's folder, for sounds"),
        (["--model", tmp_path], "config.json: no such file"),
    ):
        line = scripts.refused(capsys, lambda options=options: few("run", *options))
        assert message in line and not (tmp_path / "run").exists(), options
    problems.write_text(json.dumps({**row, "answer": "a cat"}) + "\n")
    line = scripts.refused(capsys, lambda: few("run"))
    assert f"{problems}, line 1: key 'answer' is 'a cat'; expected one of 'choices'" in line
    for option in ("--prompt-form", "--audio-folder", "--embeddings"):
        line = scripts.refused(capsys, lambda option=option: train_grpo.main([option, "answer"]))
        assert f"{option}: expected only with --task audio" in line
    line = scripts.refused(capsys, lambda: train_grpo.main(["--reward", "choice@2"]))
    assert "--reward choice: expected only with --task audio, whose questions have choices" in line
    assert "--task audio: expected --problems" in scripts.refused(capsys, lambda: train_grpo.main(["--task", "audio"]))
