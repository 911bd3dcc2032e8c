"""Images: PNG files (zlib and struct are all that PNG needs) and grids of them.

An image is a tensor [C, H, W] in [−1, 1], C = 1 (grey) or 3 (RGB). Files are written with 256 levels a value; every kind of PNG
is read.
"""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

from nano_adrpo import files
from nano_adrpo.errors import InputError, MissingFile, about

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types (PNG specification, section 11.2.1)
SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}  # per pixel
DEPTHS = {GREY: (1, 2, 4, 8, 16), PALETTE: (1, 2, 4, 8)}  # bits per sample; the other types have 8 or 16
LONGEST, MOST = 2**14, 2**24  # pixels of a side, of an image (4096 × 4096): a few bytes may say that they are any number
# An interlaced image is stored as seven small ones (section 8.2): the first row and column of each, the steps to its next.
WHOLE, ADAM7 = (
    [(0, 0, 1, 1)],
    [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)],
)


def write_png(file, image):
    """Writes `image` [1 or 3, H, W], clamped to [−1, 1], as an 8-bit PNG, whole or not at all. Raises InputError for
    another shape, for integers (they would be 0 … 255) and for NaN."""
    if not image.is_floating_point():
        raise InputError(f"{file}: cannot write an image of {image.dtype}; expected floats in [−1, 1]")
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise InputError(f"{file}: cannot write an image of shape {list(image.shape)}; expected [1 or 3, height, width]")
    image = image.detach().float().cpu()
    if image.isnan().any():
        raise InputError(f"{file}: cannot write an image with NaN in it")
    channels, height, width = image.shape
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).reshape(height, -1).numpy()
    # Each row as its difference from the row above (filter 2, modulo 256): images are smooth, so this compresses better.
    rows = np.diff(pixels, axis=0, prepend=np.zeros_like(pixels[:1]))
    rows = np.insert(rows, 0, 2, axis=1)
    header = struct.pack(">2I5B", width, height, 8, GREY if channels == 1 else RGB, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    files.write_bytes(file, SIGNATURE + b"".join(map(_chunk, chunks)))


def _chunk(chunk):
    kind, content = chunk
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def read_png(file):
    """The image in a PNG: [1, H, W] (grey) or [3, H, W] (RGB, palette), float32, with all levels of 16 bits. Transparency is
    dropped. Raises MissingFile, or InputError naming the file where it is another kind of file or damaged."""
    if not Path(file).is_file():
        raise MissingFile(f"{file}: no such file")
    with about(file):
        return _decode(Path(file).read_bytes())


def _decode(content):
    if content.startswith(b"\xff\xd8\xff"):
        raise InputError(
            "a JPEG file, which is not read; expected PNG, as `mogrify -format png FILE` (ImageMagick) makes of it"
        )
    if not content.startswith(SIGNATURE):
        raise InputError("not a PNG file")
    chunks = {}
    for kind, data in _chunks(content):
        if kind[:1].isupper() and kind not in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            raise InputError(f"chunk {kind!r} is not known, and the file says that it must be")
        chunks.setdefault(kind, []).append(data)
    chunks = {kind: b"".join(pieces) for kind, pieces in chunks.items()}  # pixels may be cut into many IDAT chunks
    if len(chunks.get(b"IHDR", b"")) != 13 or b"IDAT" not in chunks:
        raise InputError("damaged PNG (no header or no pixels)")
    width, height, depth, colour, compression, filtering, interlaced = struct.unpack(">2I5B", chunks[b"IHDR"])
    known = colour in SAMPLES and depth in DEPTHS.get(colour, (8, 16)) and interlaced in (0, 1)
    if not known or not width or not height or compression or filtering:
        raise InputError("damaged PNG (impossible header)")
    if max(width, height) > LONGEST or width * height > MOST:
        raise InputError(f"an image of {width} × {height} pixels; expected at most {MOST:,} of them, and {LONGEST:,} on a side")
    bits = SAMPLES[colour] * depth  # per pixel
    passes = [(y, x, dy, dx) for y, x, dy, dx in (ADAM7 if interlaced else WHOLE) if y < height and x < width]
    sizes = [(-(-(height - y) // dy), -(-(width - x) // dx)) for y, x, dy, dx in passes]
    lengths = [h * (1 + -(-w * bits // 8)) for h, w in sizes]  # in bytes; each row has its filter in front
    data = _inflate(chunks[b"IDAT"], sum(lengths), f"{width} × {height}")
    pixels = np.empty((height, width, SAMPLES[colour]), np.uint16)
    for (y, x, dy, dx), (h, w), length in zip(passes, sizes, lengths):
        rows, data = data[:length].reshape(h, -1), data[length:]
        pixels[y::dy, x::dx] = _samples(_unfilter(rows, max(bits // 8, 1)), depth).reshape(h, -1, SAMPLES[colour])[:, :w]
    if colour == PALETTE:
        palette = np.frombuffer(chunks.get(b"PLTE", b""), np.uint8)
        if len(palette) % 3 or pixels.max() >= len(palette) // 3:
            raise InputError("damaged PNG (a pixel's colour is not in the palette)")
        pixels, depth = palette.reshape(-1, 3)[pixels[..., 0]], 8
    channels = 1 if colour in (GREY, GREY_ALPHA) else 3
    image = torch.from_numpy(pixels[..., :channels].astype(np.float32)).permute(2, 0, 1).contiguous()
    return image.div_((2**depth - 1) / 2).sub_(1)


def _inflate(compressed, expected, size):
    """The bytes of all rows, an array [expected]."""
    inflate = zlib.decompressobj()
    try:  # one byte beyond what is expected: enough to see that there is more, too little for a file that unpacks forever
        data = inflate.decompress(compressed, min(expected + 1, sys.maxsize))
    except zlib.error as error:
        raise InputError(f"damaged PNG ({error})") from None
    if len(data) != expected or not inflate.eof:
        raise InputError(f"damaged PNG (its pixels are not the {expected} bytes that {size} take)")
    return np.frombuffer(data, np.uint8)


def _samples(rows, depth):
    """Bytes [H, n] -> the numbers of `depth` bits in them, [H, n · 8 / depth]; what fills a row's last byte is among them."""
    if depth == 16:
        return rows.view(">u2")
    if depth == 8:
        return rows
    bits = np.unpackbits(rows, axis=1).reshape(len(rows), -1, depth)
    return np.packbits(bits, axis=2)[..., 0] >> (8 - depth)


def _chunks(content):
    """(kind, data) of each chunk through IEND, lengths and checksums checked."""
    position, kind = len(SIGNATURE), None
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content.ljust(position + 8, b"\0"), position)
        end = position + 12 + length
        if end > len(content):
            raise InputError("truncated PNG")
        if zlib.crc32(content[position + 4 : end - 4]) != struct.unpack_from(">I", content, end - 4)[0]:
            raise InputError(f"damaged PNG (checksum of chunk {kind!r})")
        yield kind, content[position + 8 : end - 4]
        position = end


def _unfilter(rows, size):
    """[H, 1 + W · size] bytes, each row behind its filter's number -> [H, W · size] (PNG specification, section 9).

    size is the bytes per pixel; several pixels in one byte count as one. A pixel is stored as its difference from a prediction
    by the pixels at its left, above it and above the left one, so all pixels of one antidiagonal (x + y = const) depend on
    earlier antidiagonals only and are restored at once.
    """
    filters, (height, width) = rows[:, 0], (len(rows), (rows.shape[1] - 1) // size)
    if filters.max() > 4:
        raise InputError(f"damaged PNG (row filter {filters.max()})")
    stored = rows[:, 1:].reshape(height, width, size)
    if filters.max() < 3:
        return _unfilter_rows(stored, filters)
    stored = np.ascontiguousarray(stored).reshape(-1, size)  # an antidiagonal: one pixel, then every `width − 1`-th
    pixels, step = np.empty_like(stored), max(width - 1, 1)
    sub, up, average, paeth = ((filters == kind)[:, None].astype(np.int16) for kind in (1, 2, 3, 4))
    # The last two antidiagonals by their rows, behind one row of zeros; int16, as predictions are not taken modulo 256.
    last, before = (np.zeros((height + 1, size), np.int16) for _ in range(2))
    for diagonal in range(height + width - 1):
        low, high = max(0, diagonal - width + 1), min(height, diagonal + 1)  # its rows
        first = low * width + diagonal - low
        here, kinds = slice(first, first + (high - low - 1) * step + 1, step), slice(low, high)
        left, above, corner = last[low + 1 : high + 1], last[low:high], before[low:high]
        across, down = above - corner, left - corner  # and their sum: the distances of Paeth's estimate
        a, b, c = abs(across), abs(down), abs(across + down)
        nearest = np.where((a <= b) & (a <= c), left, np.where(b <= c, above, corner))
        guess = nearest * paeth[kinds] + ((left + above) >> 1) * average[kinds] + left * sub[kinds] + above * up[kinds]
        before[low + 1 : high + 1] = pixels[here] = stored[here] + guess.astype(np.uint8)
        last, before = before, last
    return pixels.reshape(height, -1)


def _unfilter_rows(rows, filters):
    """The same for filters that predict by the left pixel alone or by the one above: a row at a time, in bytes, modulo 256."""
    pixels = rows.copy()
    for y, kind in enumerate(filters):
        if kind == 1:
            np.add.accumulate(rows[y], axis=0, dtype=np.uint8, out=pixels[y])
        elif kind == 2 and y > 0:
            pixels[y] += pixels[y - 1]
    return pixels.reshape(len(rows), -1)


def grid(images, columns, gap=2):
    """[N, C, H, W] -> one image [C, H', W']: row by row, `columns` a row, `gap` white pixels between neighbours; what is
    missing in the last row is white."""
    if images.ndim != 4 or len(images) == 0 or columns < 1 or gap < 0:
        raise InputError(f"no grid of images {list(images.shape)} with {columns} columns and a gap of {gap}")
    (channels, height, width), rows = images.shape[1:], -(-len(images) // columns)
    picture = images.new_ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        picture[:, top : top + height, left : left + width] = image
    return picture
