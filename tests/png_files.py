"""PNG files put together byte by byte, by the definitions of the specification, for the tests that read them."""

import struct
import zlib

import numpy as np

SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type
# The interlaced image's first row and column, and its steps down and to the right, of each of the seven passes.
PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def chunk(kind, content, checksum=None):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum or zlib.crc32(kind + content))


def png(width, height, colour, rows, depth=8, interlaced=0, before=b"", parts=1):
    """A PNG of already filtered `rows`, its pixels in `parts` chunks."""
    pixels = zlib.compress(b"".join(rows))
    cuts = [len(pixels) * i // parts for i in range(parts + 1)]
    idat = b"".join(chunk(b"IDAT", pixels[a:b]) for a, b in zip(cuts, cuts[1:]))
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, colour, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + before + idat + chunk(b"IEND", b"")


def filtered(pixels, filters):
    """Rows of bytes [H][W * depth] as PNG stores them, one byte at a time."""
    height, width, depth = pixels.shape
    rows, value = [], np.pad(pixels.astype(int), ((1, 0), (1, 0), (0, 0)))  # zeros above and at the left
    for y, kind in enumerate(filters):
        row = [kind]
        for x in range(width):
            for c in range(depth):
                left, above, corner = value[y + 1, x, c], value[y, x + 1, c], value[y, x, c]
                paeth = min((left, above, corner), key=lambda v: abs(left + above - corner - v))  # the first of equals
                row.append((pixels[y, x, c] - [0, left, above, (left + above) // 2, paeth][kind]) % 256)
        rows.append(bytes(row))
    return rows


def packed(row, depth):
    """Numbers of `depth` bits as bytes, the last one filled up with ones, which no reader may look at."""
    bits = "".join(f"{number:0{depth}b}" for number in row)
    bits += "1" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def encoded(numbers, colour, depth, interlaced, before=b""):
    """A PNG of the numbers [H, W, samples], its rows filtered in turn by every filter."""
    rows, size = [], max(1, SAMPLES[colour] * depth // 8)
    for y, x, down, right in PASSES if interlaced else [(0, 0, 1, 1)]:
        some = numbers[y::down, x::right]
        if some.size:
            lines = np.array([packed(row.flatten().tolist(), depth) for row in some])
            rows += filtered(lines.reshape(len(lines), -1, size), [(y + i) % 5 for i in range(len(lines))])
    return png(numbers.shape[1], numbers.shape[0], colour, rows, depth, interlaced, before)
