"""Sounds: WAV files, and sounds of other sampling rates at 16 kHz.

A sound is a tensor [n] in float32, mono, 16,000 samples a second, within ±1 where the file is. Read are PCM of 8, 16, 24 and
32 bits and floats of 32 and 64, of any rate and number of channels, which are averaged. Nothing is read of a file that is not
whole, or that holds less than 0.02 s or more than 300 s; only the samples at 16 kHz and a few more are ever in memory.
"""

import contextlib
import math
import os
import shlex
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from nano_adrpo import files
from nano_adrpo.errors import InputError, MissingFile, NotFinite, about

RATE = 16_000  # samples a second, of Whisper's front end and so of Qwen2.5-Omni's
SHORTEST, LONGEST = 0.02, 300  # seconds
PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # codes of the format (WAVE_FORMAT_…)
KINDS = {(PCM, 8), (PCM, 16), (PCM, 24), (PCM, 32), (FLOAT, 32), (FLOAT, 64)}  # (code, bits)
UNKNOWN = 0xFFFFFFFF, 0x7FFFF000  # the length that ffmpeg and sox give samples in a pipe: they end where the file does
OTHERS = (  # (where, what stands there, its name): the sounds that are most often called .wav
    (0, b"ID3", "an MP3 file"), *((0, bytes([0xFF, code]), "an MP3 file") for code in (0xFB, 0xFA, 0xF3, 0xF2, 0xE3)),
    *((0, bytes([0xFF, code]), "an AAC file") for code in (0xF1, 0xF9)), (0, b"fLaC", "a FLAC file"),
    (0, b"OggS", "an OGG file"), (4, b"ftyp", "an M4A or MP4 file"), (0, b"FORM", "an AIFF file"),
    (0, b"RIFX", "a big-endian WAV file"), (0, b"RF64", "a WAV file with 64-bit lengths"), (0, b"\x1aE\xdf\xa3", "a WebM file"),
)  # fmt: skip
PIECE = 2**16  # frames that are read at a time


class Layout(NamedTuple):
    """Where the samples of a file are, and what they are. A frame is one sample of each channel."""

    code: int
    channels: int
    rate: int
    width: int  # bytes of a sample
    start: int  # of the first frame, in the file
    frames: int


def read_wav(path):
    """The sound in a WAV file, float32 [n]. Raises MissingFile, or InputError naming the file where it is another kind of file
    (with the command that converts it), damaged, cut off, too short or too long, or has a sample that is not finite."""
    with opened(path) as file:
        found = layout(file, path)
        sound = torch.empty(found.frames)
        file.seek(found.start)
        for first in range(0, found.frames, PIECE):
            count = min(PIECE, found.frames - first)
            raw = np.frombuffer(file.read(count * found.channels * found.width), np.uint8)
            sound[first : first + count] = torch.from_numpy(decoded(found, raw).mean(axis=1))
        if not sound.isfinite().all():
            at = int((~sound.isfinite()).nonzero()[0])
            raise NotFinite(f"sample {at} is {sound[at].item()}; expected finite numbers")
        return resample(sound, found.rate)


def samples(path):
    """How many samples `read_wav` gives, from the header of the file alone. Raises what it does but for samples."""
    with opened(path) as file:
        found = layout(file, path)
        return -(-found.frames * RATE // found.rate)


def write_wav(path, sound, rate=RATE):
    """Writes a sound [n], clamped to ±1, as PCM of 16 bits, whole or not at all. Raises InputError for NaN and other shapes."""
    sound = torch.as_tensor(sound).detach().float().cpu()
    if sound.ndim != 1 or not len(sound) or sound.isnan().any():
        raise InputError(f"{path}: cannot write a sound of shape {list(sound.shape)}; expected numbers [n], none of them NaN")
    data = (sound * 2**15).round().clamp(-(2**15), 2**15 - 1).numpy().astype("<i2").tobytes()
    form = struct.pack("<4sI2H2I2H", b"fmt ", 16, PCM, 1, rate, 2 * rate, 2, 16)
    body = b"WAVE" + form + struct.pack("<4sI", b"data", len(data)) + data
    files.write_bytes(path, struct.pack("<4sI", b"RIFF", len(body)) + body)


@contextlib.contextmanager
def opened(path):
    """The open file; an InputError inside is about it."""
    if not Path(path).is_file():
        raise MissingFile(f"{path}: no such file")
    with about(path), open(path, "rb") as file:
        yield file


def layout(file, path):
    """The Layout of an open file. Chunks that are neither format nor samples, such as LIST, are passed over."""
    size, head = os.fstat(file.fileno()).st_size, file.read(12)
    if not head:
        raise InputError("the file is empty; expected a WAV file")
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        other = next((name for at, mark, name in OTHERS if head[at:].startswith(mark)), "not a WAV file")
        raise InputError(f"{other}; {converts(path)}")
    position, form = 12, None
    for _ in range(1000):  # chunks; no file has so many in front of its samples
        file.seek(position)
        kind, length = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
        if kind == b"fmt ":
            form = file.read(min(length, 40))
        elif kind == b"data" and form:
            return described(form, position + 8, length, size, path)
        position += 8 + length + length % 2  # a byte of padding follows an odd one
        if position >= size:
            break
    raise InputError("damaged or cut off: no format and samples ('fmt ' and then 'data') in it")


def described(form, start, length, size, path):
    """The Layout that a format chunk and the place of the samples tell, checked."""
    if len(form) < 16:
        raise InputError("damaged (the 'fmt ' chunk is too short)")
    code, channels, rate, _, frame, bits = struct.unpack("<2H2I2H", form[:16])
    if code == EXTENSIBLE and len(form) >= 26:
        (code,) = struct.unpack("<H", form[24:26])  # the first bytes of the GUID
    if (code, bits) not in KINDS:
        raise InputError(f"its samples have the format {code:#06x} with {bits} bits; {converts(path)}")
    if not channels or frame != channels * bits // 8 or not 1000 <= rate <= 384_000:
        raise InputError(f"damaged (impossible: {channels} channels, {rate} Hz, {frame} bytes a frame of {bits}-bit samples)")
    there = size - start
    if length not in UNKNOWN and length > there:
        raise InputError(f"cut off: {there} of {length} bytes of its samples are there; expected a whole file")
    frames = min(length, there) // frame
    if not SHORTEST * rate <= frames <= LONGEST * rate:
        raise InputError(f"it holds {frames / rate:.4g} s of sound; expected {SHORTEST} … {LONGEST} s")
    return Layout(code, channels, rate, bits // 8, start, frames)


def converts(path):
    """What was expected of a sound in another format: PCM, and the command that makes it."""
    new = Path(path).with_suffix(".wav").name
    back = f" && mv {shlex.quote(f'pcm-{new}')} {shlex.quote(new)}" if Path(path).name == new else ""
    target = f"pcm-{new}" if back else new
    line = f"ffmpeg -i {shlex.quote(Path(path).name)} -c:a pcm_s16le {shlex.quote(target)}{back}"
    return f"expected PCM in WAV, as `{line}` makes of it"


def decoded(found, raw):
    """Bytes of whole frames -> float64 [frames, channels], within ±1 of PCM."""
    raw = raw.reshape(-1, found.channels, found.width)
    if found.code == FLOAT:
        with np.errstate(all="ignore"):  # a signalling NaN is found later
            return raw.view(f"<f{found.width}")[..., 0].astype(np.float64)
    if found.width == 1:
        raw = raw ^ 0x80  # 8 bits alone are unsigned
    whole = np.zeros((*raw.shape[:2], 4), np.uint8)
    whole[..., 4 - found.width :] = raw  # as the upper bytes of 32 bits
    return whole.view("<i4")[..., 0] / 2**31


ZEROS, CUTOFF, BETA = 64, 0.95, 10.0  # zero crossings on a side; of the lower Nyquist frequency; Kaiser's β, for −100 dB


def resample(sound, rate, new=RATE):
    """A sound [n] of `rate` at the rate `new`, [⌈n · new / rate⌉]: the sum of its samples times a sinc that passes 95 % of the
    lower Nyquist frequency, under a Kaiser window. Tones up to 90 % are kept within 1e-5, and 1e-5 is left of those beyond
    100 %. Outside the sound is silence."""
    divisor = math.gcd(rate, new)
    up, down = new // divisor, rate // divisor
    if up == down:
        return sound
    cutoff = CUTOFF * min(1, up / down)  # in old Nyquist frequencies
    half, count = math.ceil(ZEROS / cutoff), -(-len(sound) * up // down)
    blocks = -(-count // up)  # new samples `up` apart see the old ones under the same weights, `down` apart
    padded = F.pad(sound, (half, half + 2 + max(0, blocks * down - len(sound))))
    out = sound.new_empty(blocks, up)
    for phases in torch.arange(min(up, count)).split(64):
        first, last = int(phases[0]) * down // up, int(phases[-1]) * down // up
        old = torch.arange(first - half, last + half + 2)  # [S], the old samples that one of these new ones sees
        t = old[:, None] - phases.double() * down / up  # [S, phases], how far one is from the other, in old samples
        window = torch.special.i0(BETA * (1 - (t / half) ** 2).clamp(min=0).sqrt()) / torch.special.i0(torch.tensor(BETA))
        weights = (cutoff * torch.sinc(cutoff * t) * window * (t.abs() <= half)).to(sound.dtype)
        seen = padded[first:].unfold(0, len(old), down)  # [blocks or more, S], a view
        for some in torch.arange(blocks).split(max(1, 2**22 // len(old))):
            out[some, phases[0] : phases[-1] + 1] = seen[some[0] : some[-1] + 1] @ weights
    return out.flatten()[:count]
