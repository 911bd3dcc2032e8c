"""train_grpo.py: rewards are those asked for, and read what they should."""

import statistics

import grpo_runs
import pytest
import torch
from grpo_runs import BASE, watch
from scripts import lines
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import train_grpo
from nano_adrpo import demo
from nano_adrpo.models.decoder import Config, Decoder, RewardModel

few = grpo_runs.few


def test_rewards_are_those_asked_for(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def both(prompts, completions):\n    return [len(p) + 100 * len(c) for p, c in zip(prompts, completions)]\n"
    )
    policy, codec, _ = train_grpo.open_policy(train_grpo.parse([]), None)
    texts = ["g####62", "c7+8=15,4+1+1=6####65", "r17+48=65", "o40+10=50", "k####"]
    problems = [train_grpo.text.Problem("17+48=", 65)] * 5

    def rewards(*options):
        _, _, reward, _ = train_grpo.open_task(train_grpo.parse(list(map(str, options))), policy, codec)
        scores = reward(texts, problems)
        return scores.pop("reward").tolist(), {name: term.tolist() for name, term in scores.items()}

    right, guess, stated = [0, 1, 1, 0, 0], pytest.approx([0.3, 1, 1, 0, 0]), [1, 1, 0, 0, 0]
    deceptive = demo.DECEPTIVE["reward"][0]
    assert rewards() == (right, {})
    assert rewards("--format-reward", 0.5) == ([0.5, 1.5, 1, 0, 0], {"exact": right, "format": stated})
    assert rewards("--reward", "exact@2", "format@-0.5") == ([-0.5, 1.5, 2, 0, 0], {"exact": right, "format": stated})
    assert rewards("--reward", deceptive) == (guess, {})
    sums = pytest.approx([2.3, 3, 1, 0, 0])
    assert rewards("--reward", deceptive, "--format-reward", 2) == (sums, {"deceptive": guess, "format": stated})
    own = [6 + 100 * len(text) for text in texts]
    assert rewards("--reward", f"{tmp_path / 'mine.py'}:both") == (own, {})


def test_few_shot_text_is_read_by_the_policy_alone(tmp_path, few, monkeypatch):
    (tmp_path / "shots.txt").write_text("12+19=")
    (tmp_path / "mine.py").write_text(
        "def f(prompts, completions, rows):\n"
        "    assert all(p == row['question'] + '1' and '####' in row['answer'] for p, row in zip(prompts, rows))\n"
        "    return [0.0] * len(prompts)\n"
        "def judge(prompts, completions, rows):\n"
        "    return {'rows': sum(row['question'] + '1' == p for p, row in zip(prompts, rows)) / len(prompts)}\n"
    )
    mine, seen = tmp_path / "mine.py", watch(monkeypatch)
    options = ["--few-shot", tmp_path / "shots.txt", "--instruction", "1", "--reward", f"{mine}:f", "--judge", f"{mine}:judge"]
    out = few("run", *options)
    (rollout,) = seen["rollouts"]
    codec = train_grpo.TextCodec(Decoder.from_pretrained(BASE))
    texts = codec.decode(rollout.ids, rollout.seen)
    drawn = torch.randint(4, (2,), generator=torch.Generator().manual_seed(0)).tolist()
    questions = [("17+48=", "29+34=", "57+36=", "88+13=")[row] for row in drawn for _ in range(4)]
    assert all(text.startswith(f"12+19={question}1") for text, question in zip(texts, questions))
    assert lines(out)[1]["eval"]["rows"] == 1 and "12+19=" not in (out / "samples.txt").read_text()


def test_prompts_need_no_answers_where_the_reward_needs_none(tmp_path, few):
    # The paper's setting for language models: prompts alone, and a reward model.
    folder, _ = reward_folder(tmp_path / "rm")
    (tmp_path / "plain.txt").write_text("17+48=\n\n29+34=\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "17+48="}\n{"prompt": "2+9=", "answer": "11"}\n')
    out = few("run", "--problems", tmp_path / "plain.txt", "--held-out", tmp_path / "rows.jsonl", "--reward", folder)
    rows = lines(out)
    assert "accuracy" not in rows[1] and set(rows[1]["eval"]) == {"reward", "entropy", "kl_k1", "kl_k3", "length"}


def test_an_answer_may_be_a_word(tmp_path, few):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "17+48=", "answer": "g"}\n')
    files = ["--problems", tmp_path / "mine.jsonl", "--held-out", tmp_path / "mine.jsonl"]
    out = few("run", *files, "--max-new-tokens", 1, "--eval-samples", 64, "--rounds", 0)
    texts = (out / "samples.txt").read_text()
    assert 0 < lines(out)[0]["eval"]["pass@1"] < 1 and texts.count("17+48=") == 1  # some guess


def test_a_sum_of_rewards_is_logged_with_its_terms(tmp_path, few):
    # A reward may be called what the script logs anyway, such as length.
    (tmp_path / "mine.py").write_text("def length(prompts, completions):\n    return [-len(text) for text in completions]\n")
    row = lines(few("run", "--reward", "exact@2", f"{tmp_path / 'mine.py'}:length@0.1", "--no-eval-first"))[0]
    for values, right in ((row, row["accuracy"]), (row["eval"], row["eval"]["pass@1"])):
        assert values["reward"] == pytest.approx(2 * values["reward_exact"] + 0.1 * values["reward_length"], abs=1e-5)
        assert values["reward_exact"] == right and values["reward_length"] < -1 < values["length"]


def reward_folder(path):
    """A tiny RewardModel with the demo's tokenizer. -> its folder, and the ids of the tokens"""
    from nano_adrpo.demo.arithmetic_recipe import TOKENS

    model = RewardModel(Config("gemma", 24, 16, 24, 2, 2, 64))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("####|<[^>]*>|user|model|."), "isolated")
    model.files = {"tokenizer.json": tokenizer.to_str().encode()}
    model.save_pretrained(path)
    return path, vocabulary


def test_a_reward_model_reads_prompt_and_completion(tmp_path, few, monkeypatch):
    folder, vocabulary = reward_folder(tmp_path / "rm")
    seen = watch(monkeypatch)
    out = few("run", "--reward", f"reward_model:{folder}", "--micro-batch", 4)
    (rollout,), model = seen["rollouts"], RewardModel.from_pretrained(folder)
    drawn = torch.randint(4, (2,), generator=torch.Generator().manual_seed(0)).tolist()
    questions = [("17+48=", "29+34=", "57+36=", "88+13=")[row] for row in drawn for _ in range(4)]
    expected = []
    for question, text in zip(questions, rollout.texts):
        characters = (question + text).replace("####", "#")
        row = [vocabulary["####" if char == "#" else char] for char in characters]
        expected.append(model(torch.tensor([row])).item())
    assert lines(out)[1]["reward"] == pytest.approx(statistics.mean(expected), abs=1e-4)
