"""The audio demo: what its sounds are, measured in the waveforms; its problems, answers and judge; and that the committed model
is what its recipe promises."""

import collections
import json
import math
import random
from pathlib import Path
from statistics import fmean

import pytest
import torch

import train_grpo
from nano_adrpo import demo, files
from nano_adrpo.demo import audio_recipe as recipe
from nano_adrpo.demo import sounds
from nano_adrpo.demo.sounds import KINDS, SPLITS, VALID, WAYS, Event, Scene
from nano_adrpo.errors import InputError
from nano_adrpo.evaluation.mmau import is_correct
from nano_adrpo.files.wav import RATE, read_wav, write_wav
from nano_adrpo.language import chat
from nano_adrpo.language.audio import AudioCodec
from nano_adrpo.models.omni import Omni, log_mel
from nano_adrpo.rewards import choices
from nano_adrpo.rewards.questions import read_questions

QUIET = 200.0, 0.0  # a background 200 dB below the events


def drawn(*kinds, split="train", count=20):
    """Scenes of these kinds without their background noise."""
    rng = random.Random(0)
    return [sounds.draw(kind, split, rng)._replace(noise=QUIET) for kind in kinds or KINDS for _ in range(count)]


def alone(sound, pitch=0.0, shape=0.0, length=1.0):
    """The waveform of one event, without its 10 ms ramps."""
    scene = Scene("source", length + 0.2, (Event(sound, 0.1, length, pitch, shape),), QUIET, 0)
    return sounds.render(scene)[round(0.11 * RATE) : round((0.09 + length) * RATE)].double()


def spectrum(wave):
    """Amplitudes at frequencies 0, 1, 2, … Hz, under a Hann window."""
    return torch.fft.rfft(wave * torch.hann_window(len(wave), dtype=wave.dtype), n=RATE).abs()


def bursts(wave):
    """Where the sound begins each time, in seconds: the RMS of 10 ms passes a tenth of its greatest."""
    loud = wave[: len(wave) // 160 * 160].reshape(-1, 160).square().mean(dim=1).sqrt()
    on = (loud > 0.1 * loud.max()).long()
    return (0.01 * ((on[1:] - on[:-1]) == 1).nonzero()[:, 0] + 0.01).tolist()


# ------------------------------------------------------------------------------------------------------------------ sounds


@pytest.mark.parametrize("pitch, hertz", [(69, 440), (57, 220), (81, 880), (70.5, 440 * 2 ** (1.5 / 12))])
@pytest.mark.parametrize("sound", ["beep", "note", "ah"])
def test_a_sound_has_its_pitch(sound, pitch, hertz):
    wave = alone(sound, pitch, 1.0)
    if sound == "beep":
        assert spectrum(wave).argmax() == pytest.approx(hertz, abs=1)
    peaks = spectrum(wave)[: round(3.5 * hertz)]
    for k in (1, 2, 3) if sound != "beep" else (1,):  # each harmonic stands out of what is between it and the next
        here, between = round(k * hertz), round((k - 0.5) * hertz)
        assert peaks[here - 3 : here + 4].max() > 20 * peaks[between]


def test_a_siren_moves_by_its_octaves():
    for octaves in (1.0, -1.0):
        wave = alone("siren", 69, octaves)
        first, last = (spectrum(part).argmax().item() for part in (wave[:1600], wave[-1600:]))
        assert math.log2(last / first) == pytest.approx(octaves, abs=0.15) and first == pytest.approx(440, rel=0.1)


@pytest.mark.parametrize("sound, third", [("major", 4), ("minor", 3)])
def test_the_chords_third(sound, third):
    root = 440 * 2 ** (17 / 12)
    peaks = spectrum(alone(sound, 86))
    for steps in (0, third, 7):
        assert peaks[round(root * 2 ** (steps / 12))] > 0.25 * peaks.max()
    other = round(root * 2 ** ((7 - third) / 12))
    assert peaks[other - 3 : other + 4].max() < 0.02 * peaks.max()


@pytest.mark.parametrize("vowel", sounds.VOWELS)
@pytest.mark.parametrize("scale", [1.0, 1.17])
def test_a_vowel_has_its_formants(vowel, scale):
    """Spoken so low that harmonics lie close, it has one near each formant that is louder than its neighbours, beside what the
    source's 1 / frequency makes of them."""
    hertz, peaks = 55, spectrum(alone(vowel, 33.0, scale))
    k = torch.arange(1, int(4000 / hertz) + 1)
    envelope = k * peaks[(k * hertz).round().long()]
    tops = [i for i in range(len(k)) if envelope[i] >= envelope[max(0, i - 1) : i + 2].max()]
    for formant in sounds.FORMANTS[vowel]:
        assert min(abs((i + 1) * hertz - formant * scale) for i in tops) < hertz, formant


@pytest.mark.parametrize("shape", [0.0, 0.6, 1.2])
def test_noise_falls_as_its_shape_says(shape):
    wave = alone("noise", shape=shape, length=1.4)
    power = torch.stft(wave, 512, window=torch.hann_window(512, dtype=wave.dtype), return_complex=True).abs().square()
    levels = power.mean(dim=1)[8:250].log()
    frequencies = torch.arange(8, 250).double().log()
    slope = torch.linalg.lstsq(torch.stack([frequencies, torch.ones_like(frequencies)], dim=1), levels[:, None]).solution[0]
    assert -slope.item() == pytest.approx(shape, abs=0.1)


def test_clicks_come_twelve_times_a_second():
    assert len(bursts(alone("clicks"))) in (11, 12, 13)


def test_the_answers_are_in_the_sounds():
    """Told from the waveforms: how many beeps, which way the gaps and the notes go."""
    for scene in drawn("counting"):
        assert sounds.NUMBERS[len(bursts(sounds.render(scene))) - 1] == sounds.answer(scene)
    for scene in drawn("tempo"):
        starts = bursts(sounds.render(scene))
        assert len(starts) == 5
        assert sounds.answer(scene) == ("faster" if starts[4] - starts[3] < starts[1] - starts[0] else "slower")
    for scene in drawn("melody"):
        wave, cut = sounds.render(scene), round(scene.events[1].start * RATE)
        first, second = spectrum(wave[:cut]).argmax(), spectrum(wave[cut:]).argmax()
        assert sounds.answer(scene) == ("higher" if second > first else "lower")


def test_a_scenes_waveform_is_a_function_of_it():
    for scene in [*drawn(count=2), *(scene._replace(noise=(20.0, 0.6)) for scene in drawn(count=2))]:
        wave = sounds.render(scene)
        assert wave.dtype == torch.float32 and len(wave) == round(scene.seconds * RATE) and wave.abs().max() <= 1
        assert 0.5 <= scene.seconds <= 1.6 and torch.equal(wave, sounds.render(scene))
    noisy = scene._replace(noise=(20.0, 0.6))
    assert not torch.equal(sounds.render(noisy), sounds.render(noisy._replace(seed=1)))
    beep = Scene("source", 1.5, (Event("beep", 0.7, 0.5, 69.0),), (20.0, 0.0), 0)
    before, during = sounds.render(beep)[:11000], sounds.render(beep)[11500:18500]
    assert 20 * (during.square().mean() / before.square().mean()).log10() / 2 == pytest.approx(20, abs=0.5)


# ---------------------------------------------------------------------------------------------------------------- problems


def test_held_out_sounds_have_pitches_speakers_and_noises_of_their_own():
    seen = {}
    for split in SPLITS:
        scenes = [sounds.draw(kind, split, random.Random(seed)) for kind in KINDS for seed in range(200)]
        events = [event for scene in scenes for event in scene.events]
        voices = [event for event in events if event.sound in sounds.VOWELS]
        shapes = [scene.noise[1] for scene in scenes] + [event.shape for event in events if event.sound == "noise"]
        seen[split] = [
            {event.pitch for event in events if event.pitch and event not in voices},
            {(event.pitch, event.shape) for event in voices},
            {event.pitch for event in voices},
            {event.shape for event in voices},
            set(shapes),
            {scene.noise[0] for scene in scenes},
        ]
    for train, held_out in zip(seen["train"], seen["held_out"]):
        assert train and held_out and train.isdisjoint(held_out)


@pytest.mark.parametrize("split, name", [("train", "problems"), ("held_out", "held_out")])
def test_the_committed_problems(split, name):
    """They are what the recipe draws, in MMAU's form, all different; the three tasks are as many, and no place is more often
    right than the others."""
    rows = [row for _, row in files.read_json_lines(demo.AUDIO[name])]
    assert rows == json.loads(json.dumps(recipe.problems(split)))
    assert len(rows) == recipe.COUNTS[split] * len(KINDS) == len({json.dumps(row["scene"]) for row in rows})
    assert {len(rows) // 3} == set(collections.Counter(row["task"] for row in rows).values())
    for row in rows:
        assert set(row) == {
            "id", "audio_id", "question", "choices", "answer", "dataset", "task", "split", "category", "sub-category",
            "difficulty", "scene",
        }  # fmt: skip
        assert row["answer"] in row["choices"] and len(set(row["choices"])) == len(row["choices"]) in (2, 3, 4)
        assert row["audio_id"] == f"./{split}/{row['id']}.wav" and sounds.answer(sounds.scene_of(row)) == row["answer"]
    four = [row["choices"].index(row["answer"]) for row in rows if len(row["choices"]) == 4]
    for place in range(4):  # by luck off by 4 standard errors with a chance below 1e-4
        assert abs(four.count(place) / len(four) - 0.25) < 4 * (0.25 * 0.75 / len(four)) ** 0.5


def test_the_rendered_folder(tmp_path, monkeypatch, capsys):
    """The command writes the problems and their sounds, which are read as any questions about sounds are."""
    some = {name: tmp_path / f"{name}.jsonl" for name in ("problems", "held_out")}
    for name, file in some.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in recipe.problems("held_out")[:9]))
        monkeypatch.setitem(demo.AUDIO, name, str(file))
    monkeypatch.setattr("sys.argv", ["sounds", "--out", str(tmp_path / "out")])
    sounds.main()
    for problem in read_questions(tmp_path / "out" / "held_out.jsonl", form="think"):
        wave = sounds.render(sounds.scene_of(problem.row))
        assert (read_wav(problem.audio) - wave).abs().max() < 2**-15
        assert problem.question == choices.ask(problem.row["question"], problem.row["choices"], "think")


# ----------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("start", WAYS)
def test_ways_of_answering(start):
    """Those that listen state the right choice, by our rule and by MMAU's; those that keep the form think and then answer."""
    rng, right = random.Random(0), []
    for scene in drawn():
        asked = sounds.choices(scene)
        text = recipe.write_out(start, scene, asked, rng)
        assert sounds.way(text) == start and choices.keeps_form(text, True) == (text.count("<") == 4)
        right.append(choices.is_right(text, sounds.answer(scene)))
        assert right[-1] == is_correct(choices.chosen(text), sounds.answer(scene), asked)
    name, share = WAYS[start], sum(right) / len(right)
    assert share == 1 if name.startswith("right/") or name == "wrong/forgets the tags" else share < 0.6
    assert name.startswith("right/") == (share == 1 and choices.keeps_form(text, True) == 1)


def test_the_judge():
    def judge(*answers):
        texts, tasks, rights = zip(*answers)
        rows = [{"task": task, "answer": right} for task, right in zip(tasks, rights)]
        return sounds.judge(["?"] * len(texts), texts, rows)

    hears, asks = "<think>I hear ee.</think><answer>ee</answer>", "<think>Is it ee? Yes.</think><answer>ee</answer>"
    values = judge((hears, "speech", "ee"), (asks, "speech", "ee"), (asks, "sound", "oh"), ("<answer>ee", "sound", "oh"))
    assert values["accuracy/speech"] == 1 and values["accuracy/sound"] == 0 and "accuracy/music" not in values
    assert values["way_entropy"] == pytest.approx(math.log(2))
    assert values["right/says what it hears"] == 0.25 and values["right/goes through the choices"] == 0.5
    assert values["wrong/does not think"] == 0.25 and values["wrong/guesses"] == 0
    assert judge((hears, "speech", "ee"), (asks, "speech", "oh"))["way_entropy"] == 0
    assert [sounds.way(text) for text in ("", "<think>", "I hear", "<answer>x")] == ["", "", "", "<answer>"]


# ------------------------------------------------------------------------------------------------------------------- model


@pytest.fixture(scope="module")
def base():
    return Omni.from_pretrained(demo.AUDIO["options"]["model"], torch.float32)


def test_the_base_hears_and_mostly_does_not_listen(base):
    """Greedy answers behind the first words of a valid way, and sampled ones as they come, on 12 held-out sounds of each kind.
    The shares of the ways may be off by 5 standard errors (by luck with a chance below 1e-5) and 2 %, what training misses."""
    rows = recipe.problems("held_out")[::2]
    scenes = [sounds.scene_of(row) for row in rows]
    clips = [recipe.Clip(scene, log_mel(sounds.render(scene))) for scene in scenes]
    heard = [*zip(scenes, recipe.hear(base, clips))]
    hears, asks = (recipe.accuracy(base, heard, start) for start in VALID)
    assert fmean(hears.values()) > 0.93 and min(hears.values()) > 0.8  # measured on all held-out sounds: 0.981 and 0.917
    assert 0.65 < fmean(asks.values()) < 0.9  # measured: 0.796; without saying what it hears it counts and compares badly
    texts = recipe.answers(base, heard * 3)
    measured = sounds.judge(None, texts, rows * 3)
    for start, share in recipe.MIXTURE.items():
        assert abs(measured[WAYS[start]] - share) < 5 * (share * (1 - share) / len(texts)) ** 0.5 + 0.02, start
    for task in ("sound", "music", "speech"):
        assert 0.4 < measured[f"accuracy/{task}"] < 0.7


def test_the_codec_writes_the_prompts_that_the_base_was_trained_on(base, tmp_path):
    scene = drawn("vowel", count=1)[0]
    write_wav(tmp_path / "vowel.wav", sounds.render(scene))
    codec = AudioCodec(base)
    ids, mask = codec.encode([("Which vowel is it?", str(tmp_path / "vowel.wav"))], 500)
    (clip,) = codec.clips([("Which vowel is it?", str(tmp_path / "vowel.wav"))])[0]
    assert mask.all() and ids[0].tolist() == codec.tokenizer.encode(recipe.prompt_of("Which vowel is it?", len(clip))).ids
    own = recipe.hear(base, [recipe.Clip(scene, log_mel(sounds.render(scene)))])[0]
    assert (clip - own).abs().max() < 0.02 * own.abs().max()  # a WAV file has 16 bits, embeddings are bfloat16
    assert codec.tokenizer.to_str() == recipe.build_tokenizer(list(recipe.texts(random.Random(1)))).to_str()
    text = recipe.write_out("<think>I hear", scene, sounds.choices(scene), random.Random(0))
    assert codec.decode(torch.tensor([codec.tokenizer.encode(text).ids]), torch.ones(1, 9).long()) == [text]


def test_the_committed_folder_is_small():
    assert sum(file.stat().st_size for file in Path(demo.AUDIO["options"]["model"]).iterdir()) < 4e6


def test_the_longest_answer_just_fits(base):
    tokenizer, rng = chat.tokenizer_of(base), random.Random(0)
    answers = [recipe.write_out(way, scene, sounds.choices(scene), rng) for scene in drawn(count=50) for way in WAYS]
    assert max(len(tokenizer.encode(answer).ids) + 1 for answer in answers) == demo.AUDIO["options"]["max_new_tokens"]


def test_one_round_of_the_demo(tmp_path, monkeypatch):
    """train_grpo.py --demo audio, end to end; its config.json runs it again, with the same digits."""
    monkeypatch.setattr(train_grpo.plots, "pyplot", lambda file: None)
    small = "--rounds 1 --prompts-per-round 2 --group-size 4 --eval-samples 1 --no-eval-first".split()
    for name in ("problems", "held_out"):
        monkeypatch.setitem(demo.AUDIO, name, shortened(demo.AUDIO[name], tmp_path / f"{name}.jsonl"))
    sounds.written.cache_clear()
    train_grpo.main(["--demo", "audio", *small, "--out", str(tmp_path / "run")])
    train_grpo.main(["--config", str(tmp_path / "run" / "config.json"), "--out", str(tmp_path / "again")])
    sounds.written.cache_clear()
    runs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "again")]
    values = json.loads(runs[0].splitlines()[-1])
    assert runs[0] == runs[1] and {"reward_choice", "reward_answer_format", "accuracy"} <= values.keys()
    assert {f"accuracy/{task}" for task in ("sound", "music", "speech")} | {"pass@1", *WAYS.values()} <= values["eval"].keys()
    before, after = (Omni.from_pretrained(path) for path in (demo.AUDIO["options"]["model"], tmp_path / "run" / "model"))
    assert all(torch.equal(*each) for each in zip(before.audio_tower.parameters(), after.audio_tower.parameters()))
    assert not torch.equal(before.model.norm.weight.float(), after.model.norm.weight)


def shortened(file, copy):
    copy.write_text("".join(Path(file).read_text().splitlines(keepends=True)[:9]))
    return str(copy)


def test_options_that_contradict_the_demo():
    with pytest.raises(InputError, match="--task text: expected audio with --demo audio"):
        train_grpo.parse(["--demo", "audio", "--task", "text"])
    assert train_grpo.parse(["--demo", "audio", "--rounds", "3"]).rounds == 3
