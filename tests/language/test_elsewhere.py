"""--rollouts: completions of another engine are trained on as the policy's own, and its probabilities are the ratio's."""

import json

import pytest
import scripts
import torch
from grpo_runs import BASE, few, watch  # noqa: F401
from scripts import lines

import train_grpo
from nano_adrpo.language.chat import TextCodec
from nano_adrpo.language.elsewhere import open_engine
from nano_adrpo.models.decoder import Decoder
from nano_adrpo.rewards.text import Problem

# A plain generator: it samples token by token, from the policy's whole forward pass, and says with which probability.
ENGINE = """
import torch

@torch.no_grad()
def sample(prompts, problems, policy, max_new_tokens, temperature, off={off}):
    draw, found = torch.Generator().manual_seed({seed} + len(prompts)), []
    for prompt in prompts:
        ids, logprobs = [], []
        while len(ids) < max_new_tokens and ids[-1:] != [{end}]:
            logp = (policy(torch.tensor([prompt + ids]))[0, -1] / temperature).log_softmax(-1)
            token = int(torch.multinomial(logp.exp(), 1, generator=draw))
            ids.append(token)
            logprobs.append(min(float(logp[token]) + off, 0.0))
        found.append({{"ids": ids, {logprobs}}})
    return found
"""
SAYS = '"logprobs": logprobs'


@pytest.fixture(scope="module")
def base():
    policy = Decoder.from_pretrained(BASE)
    return policy, TextCodec(policy)


def engine(folder, base, says=SAYS, **values):
    text = ENGINE.format(end=base[1].eos[0], logprobs=says, **{"off": 0.0, "seed": 0, **values})
    (folder / "engine.py").write_text(text)
    return f"{folder}/engine.py:sample"


def test_a_plain_generator_is_as_good_as_our_own(few, base, tmp_path, monkeypatch):  # noqa: F811
    seen = watch(monkeypatch)
    (tmp_path / "long.py").write_text("def long(prompts, texts):\n    return [float(sum(map(ord, text))) for text in texts]\n")
    options = "--max-new-tokens", 12, "--reward", f"{tmp_path}/long.py:long"
    without = few("without", "--rollouts", engine(tmp_path, base, says=""), *options)
    says = few("says", "--rollouts", engine(tmp_path, base), *options)
    wrong = few("wrong", "--rollouts", engine(tmp_path, base, off=-0.1), *options)
    plain, exact, corrected = seen["gradients"]
    assert max(gradient.norm() for gradient in plain.values()) > 0.1
    for name in plain:  # where it samples from the policy itself the ratio is 1, whether it says so or not
        assert torch.allclose(plain[name], exact[name], atol=1e-6), name
    # An engine that says less than the policy: the ratio is exp(0.1) within the clip, and so is the gradient's RL part.
    assert any((corrected[name] - exact[name]).norm() > 0.01 * exact[name].norm() for name in plain)
    assert "engine_kl" not in lines(without)[-1] and lines(says)[-1]["engine_kl"] < 1e-6
    assert lines(wrong)[-1]["engine_kl"] == pytest.approx(torch.tensor(0.1).exp().item() - 1 - 0.1, rel=1e-2)


def test_a_file_of_completions(few, tmp_path, capsys, base):  # noqa: F811
    policy, codec = base
    file = tmp_path / "made.jsonl"
    questions = ("17+48=", "29+34=", "57+36=", "88+13=")
    rows = [{"question": q, "text": f"{q}{n}"} for q in questions for n in range(6)]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert "loss" in lines(few("file", "--rollouts", file))[-1]
    file.write_text("\n".join(map(json.dumps, [row for row in rows if row["question"] != questions[3]] + rows[-3:])))
    line = scripts.refused(capsys, lambda: few("short", "--rollouts", file))
    assert f"{file}: 3 completions of the question '88+13='; expected 4 or more, the group's size" in line
    assert not (tmp_path / "short").exists()  # before the first round, whatever it draws
    numbers = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    file.write_text("\n".join(map(json.dumps, rows)))
    problems = [Problem(q, row={"question": q}) for q in questions[:2] for _ in range(2)]
    rolled = open_engine(str(file), 2)(policy, codec, problems, 20, 50, numbers)
    assert all(text.startswith(problem.question) for text, problem in zip(rolled.texts, problems))
    assert len(set(rolled.texts)) == 4 and rolled.logp is None
    halves = [open_engine(str(file), 2)(policy, codec, problems[i : i + 2], 20, 50, numbers[i : i + 2]) for i in (0, 2)]
    assert [text for half in halves for text in half.texts] == rolled.texts  # however rows are shared out
    assert torch.isin(rolled.ids[:, -1], torch.tensor(codec.eos)).all() and rolled.mask.sum(dim=1).min() > 3
    problems = [Problem(questions[0], row={"question": questions[0]})] * 8  # drawn twice in a row: two groups, of 6 completions
    texts = open_engine(str(file), 4, problems)(policy, codec, problems, 20, 50, torch.rand(8, 3, dtype=torch.float64)).texts
    assert len(set(texts[:4])) == len(set(texts[4:])) == 4


def test_what_stands_behind_the_end_is_left_out(tmp_path, base):
    policy, codec = base
    end, ids = codec.eos[0], codec.tokenizer.encode("123945", add_special_tokens=False).ids
    for stop, given, kept in (
        ([], [*ids, end, end, ids[0]], [*ids, end]),  # padded, as a batch engine may
        (["9"], [*ids, end], ids[:4]),
        (["39"], [*ids, end], ids[:4]),
        ([], ids, ids),
    ):
        says = {"ids": given, "logprobs": [-float(i) for i in range(len(given))]}
        (tmp_path / "engine.py").write_text(f"def say(*given):\n    return [{says}]\n")
        stopping = TextCodec(policy, stop=stop)
        rolled = open_engine(f"{tmp_path}/engine.py:say", 1)(policy, stopping, [Problem("1+1=")], 9, 50, torch.zeros(1, 9))
        assert rolled.ids[0, -rolled.mask.shape[1] :].tolist() == kept and rolled.mask.all()
        assert rolled.logp.tolist() == [[-float(i) for i in range(len(kept))]]


def test_an_engine_that_exits_is_an_error(tmp_path, base):
    (tmp_path / "engine.py").write_text("import sys\ndef say(*given):\n    sys.exit(0)\n")
    with pytest.raises(RuntimeError, match=r"engine.py:say called sys.exit\(0\)"):
        open_engine(f"{tmp_path}/engine.py:say", 1)(*base, [Problem("1+1=")], 5, 50, torch.zeros(1, 5))


@pytest.mark.parametrize(
    "given, message",
    [
        ("None", "gave NoneType; expected a list of 1 completions"),
        ("[]", "gave 0 completions; expected"),
        ("['a text']", "completion 0: expected an object with 'ids' or 'text'"),
        ("[{'ids': []}]", "expected 'ids' to be 1 … 5 numbers below"),
        ("[{'ids': [1] * 6}]", "expected 'ids' to be 1 … 5 numbers below"),
        ("[{'ids': [10**6]}]", "expected 'ids' to be 1 … 5 numbers below"),
        ("[{'text': 5}]", "expected 'text' to be a text"),
        ("[{'text': 'a', 'logprobs': [0.0]}]", "'logprobs' only beside 'ids'"),
        ("[{'ids': [3, 4], 'logprobs': [-1.0]}]", "expected 'logprobs' to be 2 finite numbers, none above 0"),
        ("[{'ids': [3], 'logprobs': [0.5]}]", "none above 0"),
        ("[{'ids': [3], 'logprobs': [float('nan')]}]", "none above 0"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, base, given, message):
    (tmp_path / "engine.py").write_text(f"def say(*given):\n    return {given}\n")
    roll_out = open_engine(f"{tmp_path}/engine.py:say", 1)
    with pytest.raises(ValueError, match="engine.py:say.* ") as error:
        roll_out(*base, [Problem("1+1=")], 5, 50, torch.zeros(1, 5))
    assert message in str(error.value)


def test_the_option_is_opened_before_the_model(capsys, tmp_path):
    assert "no such file" in scripts.refused(
        capsys, lambda: train_grpo.main(["--rollouts", "nobody.py:sample", "--out", str(tmp_path / "run")])
    )
    assert not (tmp_path / "run").exists()
