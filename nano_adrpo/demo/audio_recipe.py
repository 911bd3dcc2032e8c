"""The recipe of the audio demo: draws its problems and trains its model anew, which no run needs (see sounds.py).

    python -m nano_adrpo.demo.audio_recipe --out FOLDER     # sounds_data/, sounds_base/

First the audio tower learns to transcribe: what sounds in each 40 ms, how high, and whose voice it is, by a linear layer that
is then dropped. Then the decoder learns to answer, with the tower frozen: all ways, and at last the mixture of them that leaves
RL something to select. It takes about eight minutes on one core. Its seeds are fixed: on one machine and version of torch the
files come out the same.
"""

import json
import math
import random
import re
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from nano_adrpo import files
from nano_adrpo.demo import AUDIO as DEMO
from nano_adrpo.demo import sounds
from nano_adrpo.demo.sounds import KINDS, VALID, WAYS
from nano_adrpo.errors import Parser, run_command
from nano_adrpo.language.chat import decode, encode_prompts
from nano_adrpo.models.omni import AudioConfig, Config, Omni, log_mel
from nano_adrpo.rewards import choices
from nano_adrpo.training.run import new_folder

PAD, END, AUDIO = "<|endoftext|>", "<|im_end|>", "<|AUDIO|>"
SPECIAL = [PAD, "<|im_start|>", END, "<|audio_bos|>", AUDIO, "<|audio_eos|>"]
MARKS = ["<think>", "</think>", "<answer>", "</answer>"]
SENTENCES = list(choices.FORMS["think"].replace("{question}", "").split("{choices}"))  # one token each: every prompt has them
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WIDTH = 96  # of the tower and of the decoder

COUNTS = {"train": 48, "held_out": 24}  # problems of each kind
CLIPS = {"train": 300, "held_out": 30}  # scenes of each kind that the model is trained on, and measured on
LEARNT = dict(zip(VALID, (0.95, 0.75)))  # how often a way must be right before the model is shown the mixture
STEPS = {"tower": 700, "ways": 1000, "mixture": 120}
MIXTURE = dict(zip(WAYS, (0.16, 0.14, 0.15, 0.17, 0.15, 0.13, 0.10)))  # how often the model starts each way
SPEAKERS = list(sounds.KINDS["speaker"].choices)
CLASSES = ["", "beep", "siren", "noise", "clicks", "note", "major", "minor", *sounds.VOWELS]  # of 40 ms; "": nothing sounds


def problems(split):
    """The problems of a split, kind by kind in turn."""
    rng = random.Random(f"problems/{split}")
    scenes = [sounds.draw(kind, split, rng) for _ in range(COUNTS[split]) for kind in KINDS]
    return [sounds.problem(scene, f"{split}-{index:03d}", split) for index, scene in enumerate(scenes)]


def heard(scene):
    """What a careful listener says of a scene."""
    names = [event.sound for event in scene.events]
    if scene.kind == "counting":
        return ", ".join(names)
    if scene.kind == "melody":
        return "low, then high" if sounds.answer(scene) == "higher" else "high, then low"
    if scene.kind == "tempo":
        return "gaps that shrink" if sounds.answer(scene) == "faster" else "gaps that grow"
    if scene.kind == "speaker":
        return {"man": "a low voice", "woman": "a high voice", "child": "a small voice"}[sounds.answer(scene)]
    return ", then ".join(names)


def write_out(way, scene, choices, rng):
    """The completion of a problem in a way, as the demonstrations have it."""
    right, guess = sounds.answer(scene), rng.choice(choices)
    if way == "<think>Is it":
        tried = choices[: choices.index(right) + 1]
        return f"{way} {'? No, '.join(tried)}? Yes.</think><answer>{right}</answer>"
    return (
        way
        + {
            "<think>I hear": f" {heard(scene)}.</think><answer>{right}</answer>",
            "<think>Hm,": f" {heard(scene)}.</think>{right}",
            "<think>The first": f" will do.</think><answer>{choices[0]}</answer>",
            "<think>A guess": f".</think><answer>{guess}</answer>",
            "<answer>": f"{guess}</answer>",
            "<think>Hard": " to say.</think>",
        }[way]
    )


# -------------------------------------------------------------------------------------------------------- tokenizer, model


def build_tokenizer(texts):
    """Byte pairs of the texts' words: most words are one token, and any other text is some tokens. The two sentences that every
    prompt has are one each. The marks of thought and answer are not special, or completions would be read without them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(re.split("|".join(map(re.escape, SPECIAL + SENTENCES + MARKS)), " ".join(texts)), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in MARKS + SENTENCES])
    return tokenizer


def new_model(tokenizer, generator):
    """Qwen2.5-Omni's thinker in small, drawn from the generator."""
    size = tokenizer.get_vocab_size()
    config = Config(
        model_type="qwen2", vocab_size=size, hidden_size=WIDTH, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD), audio_token_index=tokenizer.token_to_id(AUDIO),
        audio_config=AudioConfig(
            d_model=WIDTH, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=256, output_dim=WIDTH
        ),
    )  # fmt: skip
    model = Omni(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            torch.nn.init.normal_(parameter, std=0.5 if "embed" in name else fan_in**-0.5, generator=generator)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "eos_token": END, "model_max_length": 512}
    model.files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": as_json(settings),
        "generation_config.json": as_json({"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}),
        "chat_template.jinja": TEMPLATE.encode(),
    }
    return model


def as_json(value):
    return (json.dumps(value, indent=2) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------- training


class Clip(NamedTuple):
    scene: sounds.Scene
    mel: torch.Tensor  # [128, frames], of the waveform as a WAV file keeps it


def draw_clips(split, count, rng):
    """`count` scenes of each kind, of harmony, which is the hardest to hear, twice as many. -> [Clip]"""
    kinds = [*KINDS, "harmony"]
    scenes = [sounds.draw(kind, split, rng) for _ in range(count) for kind in kinds]
    return [Clip(scene, log_mel(sounds.render(scene))) for scene in scenes]


def transcript(scene, tokens):
    """What a scene has at the middle of each audio token, three [tokens]: the class of its sound; its pitch in octaves above
    MIDI number 70, NaN: none; who speaks, −100: nobody."""
    sound, pitch, who = torch.zeros(tokens).long(), torch.full((tokens,), math.nan), torch.full((tokens,), -100)
    t = 0.04 * (torch.arange(tokens) + 0.5)
    for event in scene.events:
        on = (event.start <= t) & (t < event.start + event.length)
        sound[on] = CLASSES.index(event.sound)
        if event.pitch and event.sound != "siren":
            pitch[on] = (event.pitch - 70) / 12
        if event.sound in sounds.VOWELS:
            who[on] = SPEAKERS.index(sounds.answer(scene._replace(kind="speaker")))
    return sound, pitch, who


def batches(items, length, steps, size, rng):
    """Yields `steps` batches of `size` items, drawn at random; those of a batch have similar lengths, for little padding."""
    for step in range(steps):
        if step % 4 == 0:
            drawn = sorted(rng.choices(items, k=4 * size), key=length)
            some = [drawn[at * size : (at + 1) * size] for at in rng.sample(range(4), 4)]
        yield some[step % 4]


def train_tower(tower, clips, steps, lr, rng, generator, batch=32):
    """The tower learns to write transcripts, by a linear layer on its tokens, which is then dropped."""
    heads = torch.nn.Linear(WIDTH, len(CLASSES) + 1 + len(SPEAKERS))
    torch.nn.init.normal_(heads.weight, std=WIDTH**-0.5, generator=generator)
    parameters, window = [*tower.requires_grad_(True).parameters(), *heads.parameters()], tower.config.n_window
    optimizer, schedule = optimizer_of(parameters, steps, lr)
    for step, some in enumerate(batches(clips, lambda clip: clip.mel.shape[1], steps, batch, rng)):
        tower.config.n_window = (max(clip.mel.shape[1] for clip in some) + 1) // 2  # the same tokens, with less padding
        tokens = tower([clip.mel for clip in some])
        truth = [transcript(clip.scene, len(each)) for clip, each in zip(some, tokens)]
        sound, pitch, who = (torch.cat(each) for each in zip(*truth))
        of_sound, of_pitch, of_who = heads(torch.cat(tokens)).split((len(CLASSES), 1, len(SPEAKERS)), dim=1)
        high, spoken = ~pitch.isnan(), who != -100
        loss = F.cross_entropy(of_sound, sound) + 4 * (of_pitch[high, 0] - pitch[high]).square().sum() / len(pitch)
        loss = loss + F.cross_entropy(of_who[spoken], who[spoken], reduction="sum") / len(who)
        take_step(optimizer, schedule, parameters, loss, step, steps)
    tower.config.n_window = window
    tower.requires_grad_(False)


def demonstrations(tokenizer, heard, mixture, rng):
    """Problems with answers in ways drawn from the mixture. heard: [(scene, its tokens [n, D])]
    -> ids [N, T], labels [N, T − 1], clips."""
    ways = rng.choices(list(mixture), list(mixture.values()), k=len(heard))
    end, rows, starts = tokenizer.token_to_id(END), [], []
    for (scene, tokens), way in zip(heard, ways):
        scene = scene._replace(seed=rng.randrange(2**31))  # the order of the choices
        asked = sounds.choices(scene)
        prompt = prompt_of(choices.ask(KINDS[scene.kind].question, asked, "think"), len(tokens))
        answer = tokenizer.encode(write_out(way, scene, asked, rng)).ids
        rows.append(tokenizer.encode(prompt).ids + answer + [end])
        starts.append(len(rows[-1]) - len(answer) - 1)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
    labels = ids[:, 1:].clone()
    for label, row, start in zip(labels, rows, starts):
        label[: start - 1] = label[len(row) - 1 :] = -100  # the prompt is given, not learnt
    return ids, labels, [tokens for _, tokens in heard]


def prompt_of(text, tokens):
    """What the chat template and language.audio.AudioCodec make of a question about a sound of so many tokens."""
    return f"<|im_start|>user\n<|audio_bos|>{AUDIO * tokens}<|audio_eos|>{text}{END}\n<|im_start|>assistant\n"


def sft(model, heard, mixture, steps, lr, rng, batch=32):
    """Maximum likelihood on demonstrations; the tower stays as it is."""
    tokenizer = Tokenizer.from_str(model.files["tokenizer.json"].decode())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, schedule = optimizer_of(parameters, steps, lr)
    for step, some in enumerate(batches(heard, lambda each: len(each[1]), steps, batch, rng)):
        ids, labels, clips = demonstrations(tokenizer, some, mixture, rng)
        hidden = model.model(ids, embeddings=model.embed(ids, clips))[:, :-1]
        taught = labels != -100
        loss = F.cross_entropy(model.head(hidden[taught]), labels[taught])
        take_step(optimizer, schedule, parameters, loss, step, steps)


def optimizer_of(parameters, steps, lr):
    """AdamW, and a learning rate that falls to zero along a cosine."""
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)


def take_step(optimizer, schedule, parameters, loss, step, steps):
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    if (step + 1) % 100 == 0:
        print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def answers(model, heard, start=""):
    """The completions of problems: greedy ones behind the given beginning, else sampled at temperature 1."""
    tokenizer = Tokenizer.from_str(model.files["tokenizer.json"].decode())
    asked = [choices.ask(KINDS[scene.kind].question, sounds.choices(scene), "think") for scene, _ in heard]
    prompts = [prompt_of(text, len(tokens)) + start for text, (_, tokens) in zip(asked, heard)]
    ids, mask = encode_prompts(tokenizer, prompts, 512)
    out, keep = model.generate(
        ids, mask, DEMO["options"]["max_new_tokens"], temperature=0.0 if start else 1.0, eos=tokenizer.token_to_id(END),
        generator=torch.Generator().manual_seed(0), clips=[tokens for _, tokens in heard],
    )  # fmt: skip
    return [start + text for text in decode(tokenizer, out[:, ids.shape[1] :], keep)]


def accuracy(model, heard, start=""):
    """{kind: share of the `answers` that are right}"""
    texts = zip(heard, answers(model, heard, start))
    right = [(scene.kind, choices.is_right(text, sounds.answer(scene))) for (scene, _), text in texts]
    return {kind: fmean(each for name, each in right if name == kind) for kind in KINDS}


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/sounds", help="new or empty folder for the problems and the model")
    out = new_folder(parser.parse_args().out)
    torch.set_num_threads(1)
    (out / "sounds_data").mkdir()
    for split in COUNTS:
        lines = [json.dumps(row) + "\n" for row in problems(split)]
        files.write_bytes(out / "sounds_data" / f"{split}.jsonl", "".join(lines).encode())

    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    model = new_model(build_tokenizer(list(texts(rng))), generator)
    train, held_out = (draw_clips(split, CLIPS[split], rng) for split in CLIPS)
    train_tower(model.audio_tower, train, STEPS["tower"], 3e-3, rng, generator)
    train, held_out = ([*zip((clip.scene for clip in clips), hear(model, clips))] for clips in (train, held_out))
    sft(model, train, dict.fromkeys(WAYS, 1.0) | dict.fromkeys(VALID, 6.0), STEPS["ways"], 3e-3, rng)
    for start in VALID:
        found = accuracy(model, held_out, start)
        print(f"held-out accuracy behind {start}:", found, flush=True)
        if fmean(found.values()) < LEARNT[start]:
            raise SystemExit(f"error: the way {start} is below {LEARNT[start]}; train for longer")
    sft(model, train, MIXTURE, STEPS["mixture"], 5e-4, rng)
    print("held-out accuracy:", accuracy(model, held_out))
    model.to(torch.bfloat16).save_pretrained(out / "sounds_base")


@torch.no_grad()
def hear(model, clips):
    """The tokens of clips, a list of [n, D], rounded as language.audio.AudioCodec keeps them."""
    found = [model.audio_tower([clip.mel for clip in clips[at : at + 64]]) for at in range(0, len(clips), 64)]
    return [tokens.bfloat16().float() for some in found for tokens in some]


def texts(rng):
    """Yields what the tokenizer is made of: prompts and answers of every kind and way."""
    for kind in KINDS:
        for _ in range(20):
            scene = sounds.draw(kind, "train", rng)
            asked = sounds.choices(scene)
            yield prompt_of(choices.ask(KINDS[kind].question, asked, "think"), 1)
            yield from (write_out(way, scene, asked, rng) for way in WAYS)


if __name__ == "__main__":
    run_command(main)
