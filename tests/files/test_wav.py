"""WAV files: every kind of samples, other rates, refusals."""

import math
import struct
import wave

import numpy as np
import pytest
import torch

from nano_adrpo.errors import InputError
from nano_adrpo.files import wav
from nano_adrpo.files.wav import read_wav, resample, samples, write_wav

N = 1600  # samples, 0.1 s
GUID = bytes.fromhex("000000001000800000aa00389b71")  # of WAVE_FORMAT_EXTENSIBLE, behind the code of the format


def chunk(kind, content, length=None):
    return struct.pack("<4sI", kind, len(content) if length is None else length) + content + b"\0" * (len(content) % 2)


def form(code=1, channels=1, rate=16000, bits=16, frame=None, more=b""):
    frame = channels * bits // 8 if frame is None else frame
    return chunk(b"fmt ", struct.pack("<2H2I2H", code, channels, rate, rate * frame, frame, bits) + more)


def riff(*chunks):
    return b"RIFF" + struct.pack("<I", 4 + sum(map(len, chunks))) + b"WAVE" + b"".join(chunks)


def pcm(values, bits):
    """Values in [−1, 1) as integers of so many bits, the 8-bit ones from 0 up, with the struct module's own means."""
    numbers = [math.floor(value * 2 ** (bits - 1)) + (128 if bits == 8 else 0) for value in values]
    return b"".join(number.to_bytes(bits // 8, "little", signed=bits > 8) for number in numbers)


@pytest.fixture
def sine():
    return 0.75 * torch.sin(torch.arange(N) * 0.1).double()


@pytest.fixture
def file(tmp_path):
    def write(content):
        (tmp_path / "a.wav").write_bytes(content)
        return tmp_path / "a.wav"

    return write


def test_every_kind_of_samples_is_the_same_sound(file, sine):
    for bits, step in ((8, 2**-7), (16, 2**-15), (24, 2**-23), (32, 2**-24)):  # the last are rounded to float32
        data = chunk(b"data", pcm(sine.tolist(), bits))
        extensible = form(0xFFFE, bits=bits, more=struct.pack("<2HI", 22, bits, 4) + b"\1\0" + GUID)
        for head in (form(bits=bits), extensible):
            sound = read_wav(file(riff(head, data)))
            assert sound.dtype == torch.float32 and sound.shape == (N,) and (sound - sine).abs().max() <= step
            assert (sound - sine).max() <= 1e-7  # they are rounded down: no half step is added or lost
    for bits in (32, 64):
        content = sine.numpy().astype(f"<f{bits // 8}").tobytes()
        assert torch.equal(read_wav(file(riff(form(3, bits=bits), chunk(b"data", content)))), sine.float())
    assert read_wav(file(riff(form(bits=8), chunk(b"data", b"\0\x80\xff" * 400))))[:3].tolist() == [-1, 0, 127 / 128]


def test_channels_are_averaged(file, sine):
    for count in (2, 6):
        values = torch.stack([sine * weight for weight in range(count)], dim=1)
        content = values.numpy().astype("<f4").tobytes()
        sound = read_wav(file(riff(form(3, count, bits=32), chunk(b"data", content))))
        assert (sound - sine * (count - 1) / 2).abs().max() < 1e-6


def test_other_chunks_padding_and_open_ends_are_passed_over(file, sine):
    data = pcm(sine.tolist(), 16)
    expected = read_wav(file(riff(form(), chunk(b"data", data))))
    odd = chunk(b"LIST", b"INFOa")
    for content in (
        riff(odd, form(), odd, chunk(b"fact", bytes(4)), chunk(b"data", data), odd),
        riff(form(), chunk(b"data", data, 0xFFFFFFFF)),  # as ffmpeg and sox write into a pipe
        riff(form(), chunk(b"data", data, 0x7FFFF000)) + b"\1",
        riff(form(), chunk(b"data", data + b"\1")),  # a frame that is not whole
    ):
        assert torch.equal(read_wav(file(content)), expected) and samples(file(content)) == N


def test_long_sounds_are_read_in_pieces(tmp_path, monkeypatch, sine):
    write_wav(tmp_path / "a.wav", sine)
    whole = read_wav(tmp_path / "a.wav")
    monkeypatch.setattr(wav, "PIECE", 7)
    assert torch.equal(read_wav(tmp_path / "a.wav"), whole)


def test_silence_is_a_sound(tmp_path):
    write_wav(tmp_path / "a.wav", torch.zeros(N))
    assert torch.equal(read_wav(tmp_path / "a.wav"), torch.zeros(N))


def test_what_is_written_other_programs_read(tmp_path, sine):
    sound = torch.cat([sine, torch.tensor([2.0, -2.0, 1.0, -1.0])])
    write_wav(tmp_path / "a.wav", sound, 8000)
    with wave.open(str(tmp_path / "a.wav")) as opened:
        assert (opened.getnchannels(), opened.getsampwidth(), opened.getframerate()) == (1, 2, 8000)
        numbers = np.frombuffer(opened.readframes(10**6), "<i2")
    assert numbers[-4:].tolist() == [32767, -32768, 32767, -32768] and np.abs(numbers[:-4] - sine.numpy() * 32768).max() <= 0.5
    write_wav(tmp_path / "b.wav", sound)
    assert (read_wav(tmp_path / "b.wav") - sound.clamp(-1, 1)).abs().max() <= 1 / 32768
    for bad in (torch.tensor([math.nan] * N), torch.zeros(2, N), torch.zeros(0)):
        with pytest.raises(InputError, match=r"c.wav: cannot write a sound of shape"):
            write_wav(tmp_path / "c.wav", bad)
    assert not (tmp_path / "c.wav").exists()


# ------------------------------------------------------------------------------------------------------------------- rates


def sweep(rate, seconds, top):
    """A tone that rises from 50 Hz to `top`, soft at both ends, as the formula gives it at this rate."""
    t = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    return torch.sin(2 * torch.pi * (50 * t + (top - 50) * t**2 / 2 / seconds)) * torch.sin(torch.pi * t / seconds) ** 2


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 32000, 44100, 48000, 96000, 15999])
def test_a_sweep_is_the_same_sweep_at_16_khz(rate):
    seconds = 0.25 if rate == 15999 else 1
    top = 0.9 * min(rate, 16000) / 2
    given, expected = sweep(rate, seconds, top).float(), sweep(16000, seconds, top)
    found = resample(given, rate)
    assert len(found) == math.ceil(len(given) * 16000 / rate)
    assert (found[: len(expected)] - expected[: len(found)]).abs().max() < 1e-4


def test_what_16_khz_cannot_hold_is_gone():
    t = torch.arange(48000).double() / 48000
    for tone in (8000.0, 9000.0, 15900.0, 23000.0):  # they would be heard at 8000, 7000, 100 and 7000 Hz
        heard = resample(torch.cos(2 * torch.pi * tone * t).float(), 48000)
        assert heard[500:-500].abs().max() < 2e-5
    assert torch.equal(resample(t, 16000), t)


def test_a_file_of_another_rate(file):
    given = sweep(44100, 0.5, 7000)
    content = (given * 32767).round().numpy().astype("<i2").tobytes()
    path = file(riff(form(rate=44100), chunk(b"data", content)))
    assert (read_wav(path) - sweep(16000, 0.5, 7000)).abs().max() < 1e-4 and samples(path) == 8000


# --------------------------------------------------------------------------------------------------------------- bad input

SECOND = chunk(b"data", bytes(32000))


def test_what_is_no_whole_sound_is_refused_in_one_line(file):
    nan, infinite = (struct.pack("<f", number) for number in (math.nan, math.inf))
    convert = r"expected PCM in WAV, as `ffmpeg -i a\.wav -c:a pcm_s16le pcm-a\.wav && mv pcm-a\.wav a\.wav` makes of it"
    short = "expected 0.02 … 300 s"
    for content, message in (
        (b"", "the file is empty"),
        (b"ID3\4" + bytes(100), f"an MP3 file; {convert}"),
        (b"\xff\xfb\x90\x64" + bytes(100), f"an MP3 file; {convert}"),
        (b"fLaC" + bytes(100), "a FLAC file; expected PCM"), (b"OggS" + bytes(100), "an OGG file; expected PCM"),
        (bytes(4) + b"ftypM4A " + bytes(100), "an M4A or MP4 file; expected PCM"), (b"RIFX" + bytes(100), "a big-endian WAV"),
        (b"<html>", f"not a WAV file; {convert}"), (b"RI", "not a WAV file"), (riff(SECOND), r"damaged or cut off: no format"),
        (riff(form()), r"damaged or cut off"), (riff(form(), chunk(b"LIST", b"", 2**32 - 1)), "damaged or cut off"),
        (riff(chunk(b"fmt ", bytes(6)), SECOND), "damaged .the 'fmt ' chunk is too short"),
        (riff(form(0x55, bits=16), SECOND), f"its samples have the format 0x0055 with 16 bits; {convert}"),
        (riff(form(7, bits=8), SECOND), "its samples have the format 0x0007 with 8 bits"),
        (riff(form(bits=12), SECOND), "its samples .* with 12 bits"),
        (riff(form(rate=0), SECOND), "damaged .impossible: 1 channels, 0 Hz"),
        (riff(form(rate=2**30), SECOND), "damaged .impossible: 1 channels, 1073741824 Hz"),
        (riff(form(channels=0, frame=2), SECOND), "damaged .impossible: 0 channels"),
        (riff(form(channels=2, frame=2), SECOND), "damaged .impossible: 2 channels"),
        (riff(form(), chunk(b"data", bytes(32000), 32002)), "cut off: 32000 of 32002 bytes of its samples are there"),
        (riff(form(), chunk(b"data", bytes(32000), 2**32 - 2)), "cut off: 32000 of 4294967294 bytes"),
        (riff(form(), SECOND)[:-1], "cut off: 31999 of 32000 bytes"),
        (riff(form(), chunk(b"data", b"")), f"it holds 0 s of sound; {short}"),
        (riff(form(), chunk(b"data", bytes(2 * 319))), f"it holds 0.01994 s of sound; {short}"),
        (riff(form(bits=8), chunk(b"data", b"\x80" * (300 * 16000 + 1))), f"it holds 300 s of sound; {short}"),
        (riff(form(3, bits=32), chunk(b"data", bytes(4000) + nan + bytes(4000))), "sample 1000 is nan; expected finite"),
        (riff(form(3, bits=32), chunk(b"data", bytes(4000) + infinite + bytes(4000))), "sample 1000 is inf; expected finite"),
    ):  # fmt: skip
        path = file(content)
        with pytest.raises(InputError, match=f"^{path}: {message}") as error:
            read_wav(path)
        assert "\n" not in str(error.value)
        if "finite" not in message:
            with pytest.raises(InputError, match=f"^{path}: {message}"):
                samples(path)
    for bits, count in ((16, 320), (8, 300 * 16000)):  # the bounds themselves
        assert samples(file(riff(form(bits=bits), chunk(b"data", bytes(bits // 8 * count))))) == count


def test_a_file_that_is_not_there_or_has_another_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.wav: no such file"):
        read_wav(tmp_path / "no.wav")
    (tmp_path / "a b.mp3").write_bytes(b"ID3" + bytes(50))
    with pytest.raises(InputError, match=r"`ffmpeg -i 'a b.mp3' -c:a pcm_s16le 'a b.wav'` makes of it"):
        read_wav(tmp_path / "a b.mp3")
