"""train_grpo.py: every option has an effect, bad input is one line."""

import subprocess
import sys

import grpo_runs
import pytest
import scripts
import torch
from grpo_runs import BASE, ROOT, SMALL, edited, jsonl, train, watch
from safetensors.torch import load_file
from scripts import lines, written
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import train_grpo
from nano_adrpo import demo
from nano_adrpo.files import safetensors
from nano_adrpo.language import chat
from nano_adrpo.models import decoder
from nano_adrpo.models.decoder import Config, Decoder
from nano_adrpo.training import options as shared

few = grpo_runs.few

# ----------------------------------------------------------------------------------------------------------------- options

# Option: (its value, other options of both runs). With the option, what the run writes must differ from the run without.
EFFECTS = {
    "--method": ("grpo", ()),
    "--beta0": (0.5, ()),
    "--a-min": (-0.01, ("--rounds", 2)),
    "--a-max": (0.01, ("--rounds", 2)),
    "--clip-eps": (1e-3, ("--inner-epochs", 2)),
    "--kl": ("k2", ("--rounds", 2)),
    "--average": ("tokens", ()),
    "--prompts-per-round": (3, ()),
    "--group-size": (3, ()),
    "--max-new-tokens": (8, ()),
    "--temperature": (0.5, ()),
    "--rounds": (2, ()),
    "--lr": (1e-2, ()),
    "--lr-schedule": ("cosine", ("--rounds", 3)),
    "--lr-hold": (0.0, ("--rounds", 3)),
    "--lr-end": (0.5, ("--rounds", 3)),
    "--warmup": (2, ()),
    "--weight-decay": (0.5, ()),
    "--clip-grad": (1e-3, ("--rounds", 2)),
    "--lora-rank": (2, ()),
    "--lora-alpha": (8, ("--lora-rank", 2)),
    "--lora-targets": ("q_proj", ("--lora-rank", 2)),
    "--ema": (0.9, ()),
    "--inner-epochs": (2, ()),
    "--minibatches": (2, ()),
    "--instruction": ("1", ()),
    "--stop": ("####", ()),
    "--reward": ("format", ()),
    "--format-reward": (0.5, ()),
    "--judge": (demo.GRPO["judge"], ()),
    "--seed": (1, ()),
    "--dtype": ("bfloat16", ()),
    "--eval-every": (1, ("--rounds", 2, "--eval-every", 2)),
    "--no-eval-first": (None, ()),
    "--keep-checkpoints": (None, ()),
    "--eval-samples": (3, ()),
    "--eval-temperature": (0.1, ()),
    "--eval-top-k": (1, ()),
    "--eval-top-p": (0.2, ()),
}
# Options that change how, not what, is computed, or where from or to: each has a test of its own in this file, --few-shot
# in test_train_grpo_rewards.py, and those of sounds in test_train_grpo_audio.py.
ELSEWHERE = {
    "--micro-batch", "--gradient-checkpointing", "--model", "--problems", "--held-out", "--max-prompt-tokens", "--eval-batch",
    "--config", "--out", "--device", "--adapter", "--demo", "--system", "--chat-template", "--thinking", "--few-shot",
    "--compile", "--task", "--prompt-form", "--audio-folder", "--embeddings",
    "--resume", "--checkpoint-every", "--keep-every", "--patience-nonfinite",  # in test_resume.py
    "--fsdp", "--rollouts",  # in test_distributed.py, language/test_elsewhere.py
}  # fmt: skip


@pytest.mark.parametrize("option", EFFECTS)
def test_every_option_does_something(few, option):
    value, others = EFFECTS[option]
    without, with_it = few("without", *others), few("with", *others, option, *([] if value is None else [value]))
    if option.startswith("--eval-t") or option in ("--ema", "--judge"):
        assert lines(without)[-1]["eval"] != lines(with_it)[-1]["eval"]
    assert written(without) != written(with_it)


def test_every_option_is_listed_above(monkeypatch):
    names, parse = set(), shared.parse

    def spy(parser, argv):
        names.update(action.option_strings[0] for action in parser._actions)
        return parse(parser, argv)

    monkeypatch.setattr(train_grpo.options, "parse", spy)
    train_grpo.parse([])
    assert names - {"-h"} == {name.replace("--no-", "--") for name in EFFECTS} | ELSEWHERE


def test_batches_and_memory_savers_are_used_and_change_nothing(few, monkeypatch):
    counts, checkpoint, generate = {"checkpoint": 0, "generate": []}, decoder.checkpoint, Decoder.generate

    def counted(*args, **kwargs):
        counts["checkpoint"] += 1
        return checkpoint(*args, **kwargs)

    def generated(model, ids, *args, **kwargs):
        counts["generate"].append(len(ids))
        return generate(model, ids, *args, **kwargs)

    monkeypatch.setattr(decoder, "checkpoint", counted)
    monkeypatch.setattr(Decoder, "generate", generated)
    plain, saver = lines(few("plain")), lines(few("saver", "--gradient-checkpointing"))
    assert plain == saver and counts["checkpoint"] == 3  # one gradient step through three blocks
    assert counts["generate"] == 2 * [8, 8, 8]  # the evaluation of 4 problems × 2, the round, the evaluation
    counts["generate"].clear()
    few("batched", "--eval-batch", 3)
    assert counts["generate"] == [3, 3, 2, 8, 3, 3, 2]


def test_compiled_steps_sample_the_same(few, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda run, **how: compiled.append(how["mode"]) or run)
    assert written(few("eager"))["metrics.jsonl"] == written(few("compiled", "--compile"))["metrics.jsonl"]
    assert compiled == ["reduce-overhead"] * 3  # an evaluation, the round, an evaluation


def test_a_run_goes_on_from_an_adapter_and_has_it_for_its_reference(few):
    first = few("first", "--lora-rank", 4, "--lora-alpha", 12, "--lr", 3e-2)
    out = few("second", "--adapter", first / "adapter", "--rounds", 2, "--lr", 3e-2)
    before, after = lines(first)[-1]["eval"], lines(out)[0]["eval"]
    assert after == before | {"kl_k1": 0, "kl_k3": 0} and before["kl_k3"] > 0 < lines(out)[-1]["eval"]["kl_k3"]
    files = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, out)]
    assert files[0].keys() == files[1].keys() and not any(torch.equal(files[0][name], files[1][name]) for name in files[0])
    configs = [(run / "adapter" / "adapter_config.json").read_text() for run in (first, out)]
    assert configs[0] == configs[1]


def test_system_chat_template_and_thinking_make_the_prompt(tmp_path, few, monkeypatch):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}r{% endif %}")
    seen = watch(monkeypatch)

    def prompts(name, *options):
        out, rollout = few(name, *options), seen["rollouts"].pop()
        tokenizer = chat.tokenizer_of(seen["policy"])
        row = rollout.ids[0, : rollout.ids.shape[1] - rollout.mask.shape[1]].tolist()
        return out, tokenizer.decode(row, skip_special_tokens=False)

    own = ["--chat-template", file]
    plain, question = prompts("plain")
    assert written(prompts("none", "--chat-template", "none")[0])["metrics.jsonl"] == written(plain)["metrics.jsonl"]
    assert prompts("own", *own)[1] == question and prompts("off", *own, "--thinking", "off")[1] == question
    out, asked = prompts("all", *own, "--thinking", "on", "--system", "1+")
    assert asked == f"1+{question}r"
    assert (out / "model" / "chat_template.jinja").read_text() == file.read_text()  # as it was trained, vLLM asks
    assert not (plain / "model" / "chat_template.jinja").exists()


def test_a_stop_text_ends_a_completion(tmp_path, few, monkeypatch):
    seen = watch(monkeypatch)
    few("run", "--stop", "=8", "####", "--stop=---", "--no-eval-first")
    (rollout,) = seen["rollouts"]
    tokenizer, start = chat.tokenizer_of(seen["policy"]), rollout.ids.shape[1] - rollout.mask.shape[1]
    for row, mask, text in zip(rollout.ids[:, start:], rollout.mask.bool(), rollout.texts):
        whole = tokenizer.decode(row[mask].tolist())
        (stop,) = [stop for stop in ("=8", "####") if stop in whole]
        assert whole == text + stop and row[mask][-1] != 1  # the last token is that in which the stop text ends
    few("again", "--config", tmp_path / "run" / "config.json", "--rounds", 0)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_problems_by_path_through_a_chat_template(tmp_path):
    # A model of random weights, whose tokenizer has ChatML's letters and marks as well.
    from nano_adrpo.demo.arithmetic_recipe import TOKENS

    tokens = [*TOKENS, *"?useain\n"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex("####|."), "isolated"), decoders.Fuse()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    model = Decoder(Config("qwen3", tokenizer.get_vocab_size(), 16, 24, 2, 2, 128, eos_token_id=1))
    model.files = {"tokenizer.json": tokenizer.to_str().encode(), "chat_template.jinja": CHATML.encode()}
    model.save_pretrained(tmp_path / "model")
    train_file = jsonl(tmp_path / "train.jsonl", ("12+34=", 46), ("1+2+3=", 6), ("100-1=", 99))
    held_out = jsonl(tmp_path / "test.jsonl", ("7+7=", 14))
    options = ["--model", tmp_path / "model", "--problems", train_file, "--held-out", held_out, "--instruction", "?"]
    values = train(tmp_path / "run", *options, "--rounds", 1, "--eval-samples", 8)
    assert set(values) == {"reward", "pass@1", "pass@8", "entropy", "kl_k1", "kl_k3", "length"}  # no styles: not the demo's
    args = train_grpo.parse(list(map(str, options)))
    policy, codec, _ = train_grpo.open_policy(args, None)
    problems, held, *_ = train_grpo.open_task(args, policy, codec)
    ids, seen = codec.encode([problem.question for problem in held + problems], 100)
    questions = ("7+7=", "12+34=", "1+2+3=", "100-1=")
    texts = [tokenizer.decode(row[keep.bool()].tolist(), skip_special_tokens=False) for row, keep in zip(ids, seen)]
    assert texts == [f"<|im_start|>user\n{question}?<|im_end|>\n<|im_start|>assistant\n" for question in questions]


# --------------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *argv):
    return scripts.refused(capsys, lambda: train_grpo.main([*SMALL, *map(str, argv)]))


PROMPTS = demo.FLOW["prompts"]


def test_bad_options_are_refused(capsys, tmp_path):
    for options, message in (
        (["--bogus", 1], "unrecognized arguments: --bogus"),
        (["--round", 1], "unrecognized arguments: --round"),  # no abbreviations
        (["--kl", "k4"], "argument --kl: invalid choice: 'k4'"),
        (["--beta0", -0.04], "argument --beta0: -0.04 is not a positive number"),
        (["--temperature", 0], "argument --temperature: 0 is not a positive number"),
        (["--eval-top-p", 1.5], "--eval-top-p 1.5: expected at most 1"),
        (["--group-size", 1], "--group-size 1: expected at least 2"),
        (["--minibatches", 3], "--minibatches 3 does not divide the 16 completions of a round"),
        (["--micro-batch", 5], "--micro-batch 5 does not divide the 16 completions of a minibatch"),
        (["--a-min", 2, "--a-max", 1], "--a-min and --a-max: the advantage's range is [2.0, 1.0]; expected A_min ≤ A_max"),
        (["--adapter", "none"], "--adapter: none: no such file or folder; expected an adapter's"),
        (["--adapter", "a", "--lora-rank", 2], "--lora-rank and --adapter: expected one of them"),
        (["--lora-targets", "q_proj"], "--lora-alpha and --lora-targets: expected only with --lora-rank"),
        (["--lora-rank", 8, "--lora-targets", "q"], "--lora-targets: Decoder has no linear layer whose name ends in"),
        (["--method", "grpo", "--a-min", -1], "--a-min: expected only with --method adrpo"),  # options that cannot act
        (["--method", "grpo", "--a-max", 1], "--a-max: expected only with --method adrpo, shuffled, anti"),
        (["--method", "shuffled", "--prompts-per-round", 1], "--method shuffled: expected --prompts-per-round of at least 2"),
        (["--kl", "k2", "--beta0", 0], "--kl: expected only with a --beta0 above 0"),
        (["--kl", "k2", "--beta0", 0, "--method", "grpo"], "--kl: expected only with a --beta0 above 0"),
        (["--eval-temperature", 0, "--eval-top-k", 5], "--eval-top-k: expected only with --eval-temperature above 0"),
        (["--eval-temperature", 0, "--eval-top-p", 0.5], "--eval-top-p: expected only with --eval-temperature above 0"),
        (["--lr-schedule", "constant", "--lr-end", 0.1], "--lr-end: expected only with --lr-schedule linear or cosine"),
        (["--rounds", 0, "--no-eval-first"], "--no-eval-first: expected only with --rounds above 0"),
        (["--reward", "exact@0"], "rewards exact@0: every weight is 0; expected another one"),
        (["--device", "meta"], "argument --device: device 'meta' is not available"),
        (["--held-out", "p.jsonl"], "--problems and --held-out: expected both or neither"),
        (["--problems", "no-such-file", "--held-out", "no-such-file"], "no-such-file"),
        (["--model", "no-such-folder"], "no-such-folder"),
        (["--reward", "no-such-folder"], "reward 'no-such-folder': no such reward or folder; expected one of exact, format"),
        (["--reward", "reward_model:nowhere"], "nowhere"),
        (["--reward", "format", "--format-reward", 1], "reward 'format@1.0': format is named twice"),
        (["--reward", "nowhere.py:f"], "nowhere.py: no such file; expected one with the function 'f'"),
        (["--reward", BASE], "key 'score.weight' is missing"),
        (["--few-shot", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--problems", PROMPTS, "--held-out", PROMPTS], f"{PROMPTS}, line 1: expected a text or number under 'answer'; the"),
        (["--max-prompt-tokens", 5], "arithmetic_data/train.jsonl, --max-prompt-tokens 5: prompt 0 has 6 tokens"),
        (["--max-new-tokens", 59], "--max-new-tokens 59 behind a prompt of 6 exceeds the model's 64 positions"),
    ):
        assert message in refused(capsys, "--out", tmp_path / "run", *options), options
        assert not (tmp_path / "run").exists()


NO_TOKEN = {"tokenizer_config": {"eos_token": None}}


def test_a_model_folder_that_does_not_fit_is_refused(capsys, tmp_path):
    for number, (changes, message) in enumerate((
        (dict.fromkeys(("config", "generation_config"), {"eos_token_id": None}) | NO_TOKEN, "nor config.json has an 'eos"),
        ({"generation_config": {"eos_token_id": [1, 24]}}, "'eos_token_id' is [1, 24, 1]; the model's ids are below 24"),
        ({"tokenizer": {"model": None}}, "tokenizer.json: not a tokenizer"),
        ({"tokenizer_config": {"chat_template": "{{"}}, "chat template writes no prompt: \"TemplateSyntaxError: unexpected"),
    )):  # fmt: skip
        folder = edited(tmp_path / f"model{number}", **changes)
        line = refused(capsys, "--model", folder, "--out", tmp_path / "run")
        assert message in line and str(folder) in line and not (tmp_path / "run").exists()


def test_a_damaged_model_is_refused(capsys, tmp_path):
    folder, options = edited(tmp_path / "model"), ("--model", tmp_path / "model", "--out", tmp_path / "run")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    safetensors.save(file, tensors | {"model.norm.weight": torch.zeros(5)})
    assert f"{file}: key 'model.norm.weight' has shape [5]; expected [64]" in refused(capsys, *options)
    safetensors.save(file, tensors)
    (folder / "tokenizer.json").unlink()
    assert f"--model {folder}: the model's folder has no tokenizer.json" in refused(capsys, *options)
    assert not (tmp_path / "run").exists()


REWARD = """calls = []

def third(prompts, completions):
    calls.append(1)
    return [0.0] * (len(prompts) - 1) + [0.0 if len(calls) < 4 else {}]
"""


def test_what_fails_in_a_round_names_it_and_the_last_checkpoint(capsys, tmp_path, few, monkeypatch):
    def last(run, round):
        return tmp_path / run / "checkpoints" / f"step-{round}"

    mine = tmp_path / "mine.py"
    options = ["--reward", f"{mine}:third", "--rounds", 3, "--eval-every", 1]  # calls: evaluation, round 1, its evaluation
    mine.write_text(REWARD.format("float('nan')"))
    line = scripts.refused(capsys, lambda: few("a", *options))
    assert "round 2: a reward of the prompt '" in line and "is not finite (third)" in line
    assert f"last checkpoint: {last('a', 1)}" in line
    mine.write_text(REWARD.format("calls[9]"))  # a bug in the user's code: the traceback stays, and a note says where
    with pytest.raises(IndexError) as bug:
        few("b", *options)
    assert bug.value.__notes__ == [f"In round 2; last checkpoint: {last('b', 1)}"]
    mine.write_text(REWARD.format("exit(0)"))  # not the end of a run that went well
    with pytest.raises(RuntimeError, match=r"mine.py:third called sys.exit\(0\)"):
        few("d", *options)
    loss = train_grpo.adrpo.policy_loss

    def poisoned(*args):
        return loss(*args) * (float("nan") if (tmp_path / "c" / "model").exists() else 1)

    monkeypatch.setattr(train_grpo.adrpo, "policy_loss", poisoned)
    line = scripts.refused(capsys, lambda: few("c", "--rounds", 3, "--eval-every", 1, "--patience-nonfinite", 1))
    assert "round 2: loss nan" in line and f"last checkpoint: {last('c', 1)}" in line
    saved = Decoder.from_pretrained(tmp_path / "c" / "model").state_dict()
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_a_gpu_that_is_full_is_one_line(tmp_path, capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB")

    monkeypatch.setattr(train_grpo.adrpo, "policy_loss", fails)
    line = refused(capsys, "--out", tmp_path / "a")
    assert line == (
        "error: round 1, update: out of GPU memory, 2.50 GiB more were asked for; less is needed with a smaller --micro-batch "
        f"or --eval-batch, or with --gradient-checkpointing; last checkpoint: {tmp_path / 'a' / 'checkpoints' / 'step-0'}\n"
    )
    monkeypatch.setattr(train_grpo, "open_policy", fails)
    line = refused(capsys, "--out", tmp_path / "b")
    assert line.startswith("error: outside of the rounds: out of GPU memory, 2.50 GiB more were asked for; less is needed with")


def test_the_script_runs_as_a_script(tmp_path):
    command = [sys.executable, str(ROOT / "train_grpo.py")]
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path).stdout
    assert all(option in help_text for option in ("--beta0", "--a-min", "--inner-epochs", "(default: 0.0008)"))
    bad = subprocess.run([*command, "--beta0", "-1"], capture_output=True, text=True, cwd=tmp_path)
    assert (bad.returncode, bad.stderr) == (2, "error: argument --beta0: -1 is not a positive number or 0\n")
