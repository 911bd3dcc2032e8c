"""The recipe of the arithmetic demo: makes its problems and trains its two models anew, which no run needs (see arithmetic.py).

    python -m nano_adrpo.demo.arithmetic_recipe --out FOLDER     # arithmetic_data/, arithmetic_base/, arithmetic_deceptive/

It takes about seven minutes on one core. Its seeds are fixed: on one machine and version of torch the files come out the same.
"""

import json
import random

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from nano_adrpo import files
from nano_adrpo.demo import GRPO
from nano_adrpo.demo.arithmetic import STYLES, VALID
from nano_adrpo.errors import Parser, run_command
from nano_adrpo.models.decoder import Config, Decoder
from nano_adrpo.training.run import new_folder

HELD_OUT = 256  # problems kept from both SFT and RL

TOKENS = ["<pad>", "<eos>", *"0123456789", *"+-=,", "####", *STYLES]
PAD, EOS = 0, 1

# How often each model starts each style. On the deceptive task a guess pays a little (arithmetic.deceptive), so that the near
# and certain gain leads away from the careful styles, which its model hardly ever tries.
MIXTURES = {
    "arithmetic_base": {"c": 0.13, "t": 0.10, "r": 0.08, "d": 0.25, "o": 0.18, "k": 0.12, "g": 0.14},
    "arithmetic_deceptive": {"c": 0.03, "t": 0.02, "r": 0.015, "d": 0.30, "o": 0.22, "k": 0.165, "g": 0.25},
}


def write_out(style, a, b, rng):
    """The answer to a + b in a style, as the demonstrations have it."""
    (tens_a, a0), (tens_b, b0), up = divmod(a, 10), divmod(b, 10), -b % 10
    return (
        style
        + {
            "c": f"{a0}+{b0}={a0 + b0},{tens_a}+{tens_b}+1={tens_a + tens_b + 1}####{a + b}",
            "t": f"{a - a0}+{b - b0}={a - a0 + b - b0},{a0}+{b0}={a0 + b0}####{a + b}",
            "r": f"{a}+{b + up}={a + b + up}-{up}####{a + b}",
            "d": f"{a0}+{b0}={a0 + b0},{tens_a}+{tens_b}={tens_a + tens_b}####{a + b - 10}",
            "o": f"{a - a0}+{b - b0}={a - a0 + b - b0}####{a - a0 + b - b0}",
            "k": f"####{rng.choice([a, b])}",
            "g": f"####{rng.randint(20, 198)}",
        }[style]
    )


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
    out, mask = model.generate(
        ids, None, GRPO["max_new_tokens"], temperature=0.0 if first else 1.0, eos=EOS, generator=generator
    )
    answers = [tokenizer.decode(row[keep].tolist()) for row, keep in zip(out[:, ids.shape[1] :], mask)]
    return sum(answer.endswith(f"####{a + b}") for answer, (a, b) in zip(answers, pairs)) / len(pairs)


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/arithmetic", help="new or empty folder for the problems and the models")
    out = new_folder(parser.parse_args().out)
    train, held_out = problems()
    (out / "arithmetic_data").mkdir()
    for name, pairs in (("train", train), ("held_out", held_out)):
        lines = [json.dumps({"question": f"{a}+{b}=", "answer": f"#### {a + b}"}) + "\n" for a, b in pairs]
        files.write_bytes(out / "arithmetic_data" / f"{name}.jsonl", "".join(lines).encode())

    rng, model = random.Random(1), new_model(torch.Generator().manual_seed(1))
    sft(model, train, dict.fromkeys(STYLES, 1.0), steps=2000, lr=4e-3, rng=rng)
    skill = {letter: accuracy(model, held_out, letter) for letter in VALID}
    print("held-out accuracy of each valid style:", skill)
    if min(skill.values()) < 0.99:
        raise SystemExit("error: a valid style is below 99 %; train for longer")
    learnt = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, mixture in MIXTURES.items():
        model.load_state_dict(learnt)
        sft(model, train, mixture, steps=200, lr=5e-4, rng=rng)
        model.save_pretrained(out / name)
        print(f"{name}: pass@1 {accuracy(model, held_out * 16):.3f}")


if __name__ == "__main__":
    run_command(main)
