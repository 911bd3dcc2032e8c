"""The demo's language task: two-digit additions with a carry, written out in one of seven styles, of which three are right.

    47+38=  c7+8=15,4+3+1=8####85       columns: units first, then tens with the carry
            t40+30=70,7+8=15####85      tens first
            r47+40=87-2####85           round the second number up, then take off what was added
            d7+8=15,4+3=7####75         careless: the carry is dropped
            o40+30=70####70             careless: the tens only
            k####47                     careless: a number of the problem, copied
            g####132                    careless: a guess

The first token decides the style and nothing in the prompt tells which. The base model has learnt to carry out every style but
starts mostly with a careless one: what is left for RL is to select, and that a small model learns in minutes. It is right on
31 % of its attempts. Problem and answer are in GSM8K's format (JSON lines with `question` and `answer`, "####" before the
number), so the demo takes the road of any other task.

`python -m nano_adrpo.demo.arithmetic` makes the folders arithmetic_data, arithmetic_base and arithmetic_deceptive again,
in about seven minutes on one core. Its seeds are fixed: on one machine and version of torch the files come out the same.
"""
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from nano_adrpo import weights
from nano_adrpo.models.decoder import Config, Decoder

HERE = Path(__file__).parent
HELD_OUT = 256  # problems kept from both SFT and RL
LONGEST = 22  # tokens of the longest answer, with its end: a limit below it cuts right answers off and pays nothing for them

TOKENS = ["<pad>", "<eos>", *"0123456789", *"+-=,", "####", *"ctrdokg"]
PAD, EOS = 0, 1
VALID = "ctr"

# How often the base model starts each style. On the deceptive task a guess pays a little (see `deceptive_reward`), so that the
# near and certain gain leads away from the careful styles, which the model hardly ever tries.
MIXTURES = {
    "arithmetic_base": {"c": 0.13, "t": 0.10, "r": 0.08, "d": 0.25, "o": 0.18, "k": 0.12, "g": 0.14},
    "arithmetic_deceptive": {"c": 0.03, "t": 0.02, "r": 0.015, "d": 0.30, "o": 0.22, "k": 0.165, "g": 0.25},
}


def write_out(style, a, b, rng):
    """The answer to a + b in a style, as the demonstrations have it."""
    (tens_a, a0), (tens_b, b0), up = divmod(a, 10), divmod(b, 10), -b % 10
    return style + {
        "c": f"{a0}+{b0}={a0 + b0},{tens_a}+{tens_b}+1={tens_a + tens_b + 1}####{a + b}",
        "t": f"{a - a0}+{b - b0}={a - a0 + b - b0},{a0}+{b0}={a0 + b0}####{a + b}",
        "r": f"{a}+{b + up}={a + b + up}-{up}####{a + b}",
        "d": f"{a0}+{b0}={a0 + b0},{tens_a}+{tens_b}={tens_a + tens_b}####{a + b - 10}",
        "o": f"{a - a0}+{b - b0}={a - a0 + b - b0}####{a - a0 + b - b0}",
        "k": f"####{rng.choice([a, b])}",
        "g": f"####{rng.randint(20, 198)}",
    }[style]


def style(completion):
    """The letter of a completion's style, "" where it has none."""
    return completion[:1] if completion[:1] in tuple("ctrdokg") else ""


def deceptive_reward(completion, correct):
    """The deceptive task: 0.3 for any guess, 1 for a worked answer that is correct, 0 for one that is not."""
    return 0.3 if style(completion) == "g" else float(correct)


def problems():
    """All pairs of two-digit numbers whose units carry, shuffled -> (training, held out), lists of (a, b)."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a % 10 + b % 10 >= 10]
    random.Random(0).shuffle(pairs)
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def build_tokenizer():
    """A token for each character, and one for "####"."""
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("####|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    return tokenizer


def new_model(generator):
    """Qwen3 in small: 150,000 parameters, drawn from the generator."""
    config = Config(
        model_type="qwen3", vocab_size=len(TOKENS), hidden_size=64, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True,
        eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    model = Decoder(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.08, generator=generator)
    model.files = {
        "tokenizer.json": build_tokenizer().to_str(pretty=True).encode(),
        "tokenizer_config.json": as_json(
            {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>", "model_max_length": 64}
        ),
        "generation_config.json": as_json({"eos_token_id": EOS, "pad_token_id": PAD}),
    }
    return model


def as_json(value):
    return (json.dumps(value, indent=2) + "\n").encode()


def demonstrations(tokenizer, pairs, mixture, count, rng):
    """`count` problems with answers in styles drawn from the mixture -> ids [count, T], labels [count, T − 1]."""
    drawn, styles = rng.choices(pairs, k=count), rng.choices(list(mixture), list(mixture.values()), k=count)
    prompts = [f"{a}+{b}=" for a, b in drawn]
    texts = [prompt + write_out(style, *pair, rng) for prompt, style, pair in zip(prompts, styles, drawn)]
    rows = [encoding.ids + [EOS] for encoding in tokenizer.encode_batch(texts)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    labels = ids[:, 1:].clone()
    labels[:, : len(prompts[0]) - 1] = -100  # prompts are given, not learnt; all have the same length
    for label, row in zip(labels, rows):
        label[len(row) - 1 :] = -100
    return ids, labels


def sft(model, pairs, mixture, steps, lr, rng, batch=256):
    """Maximum likelihood on demonstrations; the learning rate falls to zero along a cosine."""
    tokenizer = Tokenizer.from_str(model.files["tokenizer.json"].decode())
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        ids, labels = demonstrations(tokenizer, pairs, mixture, batch, rng)
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(model, pairs, first=""):
    """The share of problems answered right: greedily after a given first token, else sampled at temperature 1."""
    tokenizer = Tokenizer.from_str(model.files["tokenizer.json"].decode())
    ids = torch.tensor([tokenizer.encode(f"{a}+{b}={first}").ids for a, b in pairs])
    generator = torch.Generator().manual_seed(0)
    out, mask = model.generate(ids, None, LONGEST, temperature=0.0 if first else 1.0, eos=EOS, generator=generator)
    answers = [tokenizer.decode(row[keep].tolist()) for row, keep in zip(out[:, ids.shape[1] :], mask)]
    return sum(answer.endswith(f"####{a + b}") for answer, (a, b) in zip(answers, pairs)) / len(pairs)


def main():
    train, held_out = problems()
    (HERE / "arithmetic_data").mkdir(exist_ok=True)
    for name, pairs in (("train", train), ("held_out", held_out)):
        lines = [json.dumps({"question": f"{a}+{b}=", "answer": f"#### {a + b}"}) + "\n" for a, b in pairs]
        weights.write_bytes(HERE / "arithmetic_data" / f"{name}.jsonl", "".join(lines).encode())

    rng, model = random.Random(1), new_model(torch.Generator().manual_seed(1))
    sft(model, train, dict.fromkeys("ctrdokg", 1.0), steps=2000, lr=4e-3, rng=rng)
    skill = {letter: accuracy(model, held_out, letter) for letter in VALID}
    print("held-out accuracy of each valid style:", skill)
    if min(skill.values()) < 0.99:
        raise SystemExit("error: a valid style is below 99 %; train for longer")
    learnt = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, mixture in MIXTURES.items():
        model.load_state_dict(learnt)
        sft(model, train, mixture, steps=200, lr=5e-4, rng=rng)
        model.save_pretrained(HERE / name)
        print(f"{name}: pass@1 {accuracy(model, held_out * 16):.3f}")


if __name__ == "__main__":
    main()
