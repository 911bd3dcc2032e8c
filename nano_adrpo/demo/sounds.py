"""The audio demo's task: questions about short synthesised sounds, of MMAU's three kinds, and how a model may answer them.

    python -m nano_adrpo.demo.sounds --out FOLDER     # train.jsonl, held_out.jsonl and the WAV files that they name

    sound    which of two sounds comes first; how many beeps there are; what a sound is
    music    whether a second note is higher or lower; whether a chord is major or minor; whether notes get faster or slower
    speech   which vowel it is; which of two vowels comes last; who speaks. These are no recordings: a vowel is a sum of
             harmonics under the resonances of a vocal tract

A problem is an object as in MMAU's JSON file. Its sound is a Scene, which the object holds as numbers; the waveform is a
function of them. sounds_data/ has 432 problems to train on and 216 held-out ones, whose pitches, speakers and noises are not
those of any other.

A completion answers in one of seven ways, which its first words decide and nothing in the prompt tells. Three of them listen:
they say what they hear, or go through the choices, or forget the answer's tags. The others do not. The base model has learnt
all of them, so RL only has to select. audio_recipe.py makes the problems and the model.
"""

import atexit
import functools
import math
import random
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from nano_adrpo import files, metrics
from nano_adrpo.demo import AUDIO
from nano_adrpo.errors import Parser, run_command
from nano_adrpo.files.wav import RATE, write_wav
from nano_adrpo.rewards.choices import is_right
from nano_adrpo.training.run import new_folder


class Event(NamedTuple):
    sound: str  # "beep", "siren", "noise", "clicks", "note", "major", "minor", or a vowel
    start: float  # seconds
    length: float  # seconds
    pitch: float = 0.0  # MIDI number, 69 is 440 Hz; of a chord its root's, of a voice its fundamental's; 0: none
    shape: float = 0.0  # noise: power falls as 1 / frequency^shape; voice: its formants' scale; siren: octaves it rises


class Scene(NamedTuple):
    kind: str  # a key of KINDS
    seconds: float
    events: tuple  # of Event, in order
    noise: tuple  # of the background: its level in dB below the events, and its shape as above
    seed: int  # of the noises and of the order of the choices


class Kind(NamedTuple):
    task: str  # MMAU's three
    difficulty: str
    question: str
    choices: tuple  # four of them are asked about


SOUNDS, VOWELS, NUMBERS = ("beep", "siren", "noise", "clicks"), ("ah", "eh", "ee", "oh", "oo"), ("one", "two", "three", "four")
KINDS = {
    "order of sounds": Kind("sound", "medium", "Which sound comes first?", SOUNDS),
    "counting": Kind("sound", "hard", "How many beeps are there?", NUMBERS),
    "source": Kind("sound", "easy", "What is this sound?", SOUNDS),
    "melody": Kind("music", "medium", "Is the second note higher or lower?", ("higher", "lower")),
    "harmony": Kind("music", "hard", "Is the chord major or minor?", ("major", "minor")),
    "tempo": Kind("music", "medium", "Do the notes get faster or slower?", ("faster", "slower")),
    "vowel": Kind("speech", "easy", "Which vowel is spoken?", VOWELS),
    "order of vowels": Kind("speech", "hard", "Which vowel comes last?", VOWELS),
    "speaker": Kind("speech", "easy", "Who speaks?", ("man", "woman", "child")),
}

# What differs between the sounds to train on and the held-out ones. Held-out values lie between the others.
SPLITS = {
    "train": {
        "cents": (0, 25, 75),  # above a note of the piano
        "speakers": {  # MIDI number of the fundamental, scale of the formants
            "man": ((43.0, 0.98), (45.0, 1.04), (47.0, 0.98), (49.0, 1.04)),
            "woman": ((54.0, 1.14), (56.0, 1.20), (58.0, 1.14), (60.0, 1.20)),
            "child": ((63.0, 1.30), (65.0, 1.37), (67.0, 1.30), (69.0, 1.37)),
        },
        "shapes": (0.0, 0.6, 1.2),
        "levels": (15.0, 25.0),
    },
    "held_out": {
        "cents": (50,),
        "speakers": {
            "man": ((44.0, 1.01), (48.0, 1.01)), "woman": ((55.0, 1.17), (59.0, 1.17)), "child": ((64.0, 1.335), (68.0, 1.335)),
        },
        "shapes": (0.3, 0.9),
        "levels": (20.0,),
    },
}  # fmt: skip

# The first three formants of men in Hz: Peterson and Barney 1952, "Control methods used in a study of the vowels".
FORMANTS = {
    "ah": (730, 1090, 2440), "eh": (530, 1840, 2480), "ee": (270, 2290, 3010), "oh": (570, 840, 2410), "oo": (300, 870, 2240),
}  # fmt: skip
BANDWIDTHS = 60, 90, 150  # Hz


# ------------------------------------------------------------------------------------------------------------------ scenes


def draw(kind, split, rng):
    """A scene of a kind with the pitches, speakers and noises of a split; rng: a random.Random."""
    own = SPLITS[split]
    start = rng.uniform(0.05, 0.2)

    def pitch(low=64, high=88):
        return rng.randint(low, high) + rng.choice(own["cents"]) / 100

    def a_sound(name, start, length):
        shape = {"noise": rng.choice(own["shapes"]), "siren": rng.choice((-1.0, 1.0))}.get(name, 0.0)
        return Event(name, start, length, pitch() if name in ("beep", "siren") else 0.0, shape)

    if kind == "order of sounds":
        first, second = rng.sample(SOUNDS, 2)
        events = a_sound(first, start, 0.4), a_sound(second, start + rng.uniform(0.45, 0.6), 0.4)
    elif kind == "source":
        events = (a_sound(rng.choice(SOUNDS), start, rng.uniform(0.4, 0.8)),)
    elif kind == "counting":
        count, height, gap = rng.randint(1, 4), pitch(), rng.uniform(0.24, 0.34)
        events = tuple(Event("beep", start + gap * i, 0.12, height) for i in range(count))
    elif kind == "melody":
        low = pitch(64, 84)
        notes = rng.sample((low, low + rng.randint(2, 9)), 2)
        events = tuple(Event("note", start + 0.45 * i, 0.4, height) for i, height in enumerate(notes))
    elif kind == "harmony":
        events = (Event(rng.choice(("major", "minor")), start, rng.uniform(0.6, 0.9), pitch(84, 91)),)
    elif kind == "tempo":
        gaps = [0.14, 0.22, 0.3, 0.38]
        gaps = gaps if rng.random() < 0.5 else gaps[::-1]
        height = pitch()
        events = tuple(Event("note", start + sum(gaps[:i]), 0.1, height) for i in range(5))
    else:
        who = rng.choice(("man", "woman", "child"))
        voice = rng.choice(own["speakers"][who])
        vowels = rng.sample(VOWELS, 2 if kind == "order of vowels" else 1)
        events = tuple(Event(vowel, start + 0.5 * i, 0.4, *voice) for i, vowel in enumerate(vowels))
    end = 1.6 if kind in ("counting", "tempo") else events[-1].start + events[-1].length + rng.uniform(0.05, 0.2)
    events = tuple(event._replace(start=round(event.start, 3), length=round(event.length, 3)) for event in events)
    noise = rng.choice(own["levels"]), rng.choice(own["shapes"])
    return Scene(kind, round(min(end, 1.6), 2), events, noise, rng.randrange(2**31))


def answer(scene):
    """The right choice, as the scene's events tell it."""
    first, last = scene.events[0], scene.events[-1]
    if scene.kind == "counting":
        return NUMBERS[len(scene.events) - 1]
    if scene.kind == "melody":
        return "higher" if last.pitch > first.pitch else "lower"
    if scene.kind == "tempo":
        return "faster" if last.start - scene.events[-2].start < scene.events[1].start - first.start else "slower"
    if scene.kind == "speaker":
        return "man" if first.pitch < 52 else "woman" if first.pitch < 62 else "child"
    return last.sound if scene.kind == "order of vowels" else first.sound


def choices(scene):
    """Up to four choices in an order that the seed decides, with the right one; of two sounds or vowels both are among them."""
    rng, every = random.Random(scene.seed), KINDS[scene.kind].choices
    heard = {event.sound for event in scene.events} | {answer(scene)}
    others = [choice for choice in every if choice not in heard]
    some = [choice for choice in every if choice in heard] + rng.sample(others, len(others))
    return rng.sample(some[:4], len(some[:4]))


def problem(scene, name, split):
    """The scene's problem, an object as in MMAU's file, with the scene as one more key."""
    kind = KINDS[scene.kind]
    return {
        "id": name, "audio_id": f"./{split}/{name}.wav", "question": kind.question, "choices": choices(scene),
        "answer": answer(scene), "dataset": "nano_adrpo.demo.sounds", "task": kind.task, "split": split,
        "category": "Reasoning" if len(scene.events) > 1 else "Information Extraction", "sub-category": scene.kind,
        "difficulty": kind.difficulty, "scene": scene._replace(events=[event._asdict() for event in scene.events])._asdict(),
    }  # fmt: skip


def scene_of(row):
    """The Scene that a problem's object holds."""
    scene = row["scene"]
    return Scene(**{**scene, "events": tuple(Event(**event) for event in scene["events"]), "noise": tuple(scene["noise"])})


# --------------------------------------------------------------------------------------------------------------- waveforms


def render(scene):
    """The scene's waveform, float32 [n] in ±1 at 16 kHz; the same one from the same scene."""
    generator = torch.Generator().manual_seed(scene.seed)
    level, shape = scene.noise
    mixed = coloured(round(scene.seconds * RATE), shape, generator) * 10 ** (-level / 20)
    for event in scene.events:
        start, count = round(event.start * RATE), round(event.length * RATE)
        sound = sounded(event, torch.arange(count, dtype=torch.float64) / RATE, generator)
        ramp = (torch.arange(count).clamp(max=160) / 160).minimum((count - 1 - torch.arange(count)).clamp(max=160) / 160)
        mixed[start : start + count] += (sound / sound.square().mean().sqrt() * ramp)[: len(mixed) - start]
    return (0.1 * mixed).clamp(-1, 1).float()


def sounded(event, t, generator):
    """An event at the times t [n] in seconds from its start, of any loudness, float64."""
    f0 = hertz(event.pitch)
    if event.sound == "noise":
        return coloured(len(t), event.shape, generator)
    if event.sound == "clicks":  # twelve a second, each a burst of noise that dies away in 15 ms
        return torch.randn(len(t), dtype=torch.float64, generator=generator) * torch.exp(-(t % (1 / 12)) / 0.015)
    if event.sound == "siren":  # the phase is the integral of a pitch that moves by `shape` octaves
        turn = f0 * event.shape * math.log(2) / t[-1]
        return torch.sin(2 * math.pi * f0**2 / turn * torch.expm1(turn / f0 * t))
    if event.sound == "beep":
        return torch.sin(2 * math.pi * f0 * t)
    if event.sound in FORMANTS:
        return voiced(event.sound, f0, event.shape, t)
    third = {"major": (0, 4, 7), "minor": (0, 3, 7)}.get(event.sound, (0,))
    return sum(harmonics(hertz(event.pitch + steps), t, [1, 0.7, 0.5, 0.4]) for steps in third)


def hertz(pitch):
    """A MIDI number's frequency."""
    return 440 * 2 ** ((pitch - 69) / 12)


def harmonics(f0, t, amplitudes):
    """A sum of the harmonics of f0, from the first on: the imaginary part of a polynomial in z = exp(2πi f0 t)."""
    z = torch.exp(2j * math.pi * f0 * t)
    total = torch.zeros_like(z)
    for amplitude in reversed(amplitudes):
        total = (total + amplitude) * z
    return total.imag


def voiced(vowel, f0, scale, t):
    """A vowel: harmonics that fall as 1 / frequency (the glottis and the lips), under a resonance at each formant."""
    f = f0 * torch.arange(1, int(4000 // f0) + 1, dtype=torch.float64)
    gain = f0 / f
    for formant, width in zip(FORMANTS[vowel], BANDWIDTHS):
        x = f / (formant * scale)
        gain = gain / torch.sqrt((1 - x**2) ** 2 + (x * width / formant) ** 2)
    return harmonics(f0, t, gain.tolist())


def coloured(count, shape, generator):
    """Gaussian noise [count] of mean square 1, whose power falls as 1 / frequency^shape; flat below 50 Hz. float64."""
    spectrum = torch.fft.rfft(torch.randn(count, dtype=torch.float64, generator=generator))
    f = torch.fft.rfftfreq(count, 1 / RATE, dtype=torch.float64).clamp(min=50)
    noise = torch.fft.irfft(spectrum * f ** (-shape / 2), count)
    return noise / noise.square().mean().sqrt()


# ----------------------------------------------------------------------------------------------------------------- answers

WAYS = {  # how a completion begins: whether it listens and keeps the form asked for, and a name
    "<think>I hear": "right/says what it hears",
    "<think>Is it": "right/goes through the choices",
    "<think>Hm,": "wrong/forgets the tags",
    "<think>The first": "wrong/takes the first choice",
    "<think>A guess": "wrong/guesses",
    "<answer>": "wrong/does not think",
    "<think>Hard": "wrong/gives up",
}
VALID = [start for start, name in WAYS.items() if name.startswith("right/")]


def way(completion):
    """How a completion begins, a key of WAYS, "" where it begins in another way."""
    return next((start for start in WAYS if completion.startswith(start)), "")


def judge(prompts, completions, rows):
    """-> accuracy/TASK, the share of right answers to each of the three kinds of questions; way_entropy, in nats: how evenly
    the right answers use the valid ways, at most ln 2; and by the names in WAYS the share of the completions in each way."""
    used = [way(completion) for completion in completions]
    right = [is_right(completion, row["answer"]) for completion, row in zip(completions, rows)]
    of_tasks = {kind.task: [each for each, row in zip(right, rows) if row["task"] == kind.task] for kind in KINDS.values()}
    counts = [sum(each == start for each, good in zip(used, right) if good) for start in VALID]
    return {
        **{f"accuracy/{task}": sum(values) / len(values) for task, values in of_tasks.items() if values},
        "way_entropy": metrics.entropy(torch.tensor(counts)),
        **{name: used.count(start) / len(used) for start, name in WAYS.items()},
    }


# ------------------------------------------------------------------------------------------------------------------- files


def write_sounds(out):
    """Writes the demo's problems into a folder, train.jsonl and held_out.jsonl, with the sounds that they name."""
    for name in ("problems", "held_out"):
        file = Path(AUDIO[name])
        for _, row in files.read_json_lines(file):
            (Path(out) / row["audio_id"]).parent.mkdir(exist_ok=True)
            write_wav(Path(out) / row["audio_id"], render(scene_of(row)))
        files.write_bytes(Path(out) / file.name, file.read_bytes())


@functools.cache
def written():
    """Writes them once into a temporary folder, which goes with the process. -> its train.jsonl and held_out.jsonl"""
    folder = tempfile.mkdtemp(prefix="sounds-")
    atexit.register(shutil.rmtree, folder)
    write_sounds(folder)
    return [str(Path(folder) / Path(AUDIO[name]).name) for name in ("problems", "held_out")]


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/sounds", help="new or empty folder")
    write_sounds(new_folder(parser.parse_args().out))


if __name__ == "__main__":
    run_command(main)
