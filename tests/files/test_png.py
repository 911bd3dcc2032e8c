"""PNG files byte by byte, against files put together here; grids by hand."""

import struct
import time
import zlib

import numpy as np
import pytest
import torch
from png_files import chunk, encoded, filtered, png

from nano_adrpo.files import png as images


def levels(image):
    """[C, H, W] in [−1, 1] -> [H][W][C] of 0 … 255; every value is exactly a level."""
    scaled = (image.permute(1, 2, 0).double() + 1) * 127.5
    assert (scaled - scaled.round()).abs().max() < 1e-4
    return scaled.round().int().tolist()


def test_what_is_written_is_a_png_of_these_bytes(tmp_path):
    file = tmp_path / "x.png"
    images.write_png(file, torch.tensor([[[-1.0, 1.0, 0.0], [-5.0, 5.0, 0.2]]]))  # 127.5 rounds to the even 128
    content = file.read_bytes()
    assert content[:33] == b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes([0, 0, 0, 3, 0, 0, 0, 2, 8, 0, 0, 0, 0]))
    (length,) = struct.unpack(">I", content[33:37])
    assert zlib.decompress(content[41 : 41 + length]) == bytes([2, 0, 255, 128, 2, 0, 0, 25])  # 0.2 -> 153 = 128 + 25
    assert content[33:] == chunk(b"IDAT", content[41 : 41 + length]) + chunk(b"IEND", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_colour_is_written_in_the_order_red_green_blue(tmp_path, dtype):
    image = torch.tensor([1.0, -1.0, 0.0], dtype=dtype)[:, None, None].expand(3, 1, 2).requires_grad_()
    images.write_png(tmp_path / "x.png", image)
    content = (tmp_path / "x.png").read_bytes()
    assert content[25] == 2 and zlib.decompress(content[41:-16]) == bytes([2, 255, 0, 128, 255, 0, 128])


def test_every_level_and_shape_comes_back(tmp_path):
    for shape in ((1, 16, 16), (1, 1, 256), (1, 256, 1), (3, 32, 8), (3, 8, 32)):
        level = torch.arange(shape[0] * shape[1] * shape[2]).reshape(shape) * 7 % 256
        images.write_png(tmp_path / "x.png", level / 127.5 - 1)
        read = images.read_png(tmp_path / "x.png")
        assert read.dtype == torch.float32 and read.is_contiguous() and torch.equal(read, level / 127.5 - 1)
        assert levels(read) == level.permute(1, 2, 0).tolist()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.png"
    images.write_png(file, torch.zeros(1, 2, 2))
    before = file.read_bytes()
    for image, message in ((torch.zeros(2, 2), r"shape \[2, 2\]; expected \[1 or 3, height, width\]"),
                           (torch.zeros(4, 2, 2), r"shape \[4, 2, 2\]"), (torch.zeros(3, 0, 2), r"shape \[3, 0, 2\]"),
                           (torch.full((1, 2, 2), torch.nan), "NaN"),
                           (torch.full((1, 2, 2), 200, dtype=torch.uint8), "torch.uint8; expected floats")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{file}: cannot write an image .*{message}"):
            images.write_png(file, image)
    assert file.read_bytes() == before


@pytest.mark.parametrize("filters", [[0] * 7, [1] * 7, [2] * 7, [3] * 7, [4] * 7, [4, 3, 2, 1, 0, 4, 3], [3, 4, 4, 1, 3, 2, 4]])
@pytest.mark.parametrize("width", [1, 2, 5, 11])
@pytest.mark.parametrize("colour, depth", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_row_filters_and_colour_types(tmp_path, filters, width, colour, depth):
    pixels = np.random.default_rng(width).integers(0, 256, (7, width, depth))
    (tmp_path / "x.png").write_bytes(png(width, 7, colour, filtered(pixels, filters), parts=3))
    kept = pixels[..., : 1 if depth < 3 else 3]  # alpha is dropped
    assert levels(images.read_png(tmp_path / "x.png")) == kept.tolist()


def test_row_filters_by_hand(tmp_path):
    # Rows 10 20 30 / 15 14 13 / 1 2 250, each written in one filter. Average: 15-5, 14-17, 13-22. Paeth: 1-15 (estimate 15:
    # above), 2-1 (estimate 0: left), 250-2 (estimate 1: left).
    rows = [bytes([1, 10, 10, 10]), bytes([3, 10, 256 - 3, 256 - 9]), bytes([4, 256 - 14, 1, 248])]
    (tmp_path / "x.png").write_bytes(png(3, 3, 0, rows))
    assert levels(images.read_png(tmp_path / "x.png")) == [[[10], [20], [30]], [[15], [14], [13]], [[1], [2], [250]]]


def test_a_palette_is_looked_up(tmp_path):
    palette = chunk(b"PLTE", bytes([255, 0, 0, 1, 2, 3])) + chunk(b"tRNS", b"\0") + chunk(b"tEXt", b"a\0b")
    (tmp_path / "x.png").write_bytes(png(3, 1, 3, [bytes([0, 1, 0, 1])], before=palette))
    assert levels(images.read_png(tmp_path / "x.png")) == [[[1, 2, 3], [255, 0, 0], [1, 2, 3]]]


def test_small_numbers_of_bits_by_hand(tmp_path):
    """1, 2 and 4 bits, grey and in a palette; a row's last byte may have bits that are no pixels."""
    palette = chunk(b"PLTE", bytes(range(48)))
    for depth, colour, row, expected in (
        (1, 0, [0b10110000, 0b01111111], [255, 0, 255, 255, 0, 0, 0, 0, 0]),
        (2, 0, [0b00011011], [0, 85, 170, 255]),
        (4, 0, [0x0F, 0x1F], [0, 255, 17]),
        (2, 3, [0b00011011], [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),
        (4, 3, [0x0F, 0x1F], [[0, 1, 2], [45, 46, 47], [3, 4, 5]]),
    ):
        content = png(len(expected), 1, colour, [bytes([0, *row])], depth, before=palette if colour == 3 else b"")
        (tmp_path / "x.png").write_bytes(content)
        pixels = [[pixel] if colour == 0 else pixel for pixel in expected]
        assert levels(images.read_png(tmp_path / "x.png")) == [pixels], (depth, colour)


def test_all_levels_of_sixteen_bits_are_kept(tmp_path):
    numbers = [0, 1, 255, 256, 32767, 32768, 65534, 65535]
    row = bytes([0]) + struct.pack(">8H", *numbers)
    (tmp_path / "x.png").write_bytes(png(8, 1, 0, [row], depth=16))
    read = images.read_png(tmp_path / "x.png")
    assert torch.allclose(read, torch.tensor([[[number / 32767.5 - 1 for number in numbers]]]), rtol=0, atol=1.2e-7)
    assert read.unique().numel() == 8 and (read.min(), read.max()) == (-1, 1)


def test_interlaced_by_hand(tmp_path):
    """3 × 2 pixels: passes 1 (the first pixel), 4 (two to the right of it), 6 (odd columns) and 7 (odd rows) hold some."""
    (tmp_path / "x.png").write_bytes(png(3, 2, 0, [b"\0\1", b"\0\3", b"\0\2", b"\0\4\5\6"], interlaced=1))
    assert levels(images.read_png(tmp_path / "x.png")) == [[[1], [2], [3]], [[4], [5], [6]]]


@pytest.mark.parametrize("colour, depth", [(0, 1), (0, 16), (2, 8), (3, 4), (6, 16)])
def test_interlaced_files_hold_the_same_image(tmp_path, colour, depth):
    palette = chunk(b"PLTE", bytes(range(48))) if colour == 3 else b""
    for size in ((1, 1), (5, 3), (8, 9), (17, 10)):
        numbers = np.random.default_rng(0).integers(0, 2**depth, (*size, {0: 1, 2: 3, 3: 1, 6: 4}[colour]))
        for name, interlaced in (("a.png", 0), ("b.png", 1)):
            (tmp_path / name).write_bytes(encoded(numbers, colour, depth, interlaced, palette))
        assert torch.equal(images.read_png(tmp_path / "a.png"), images.read_png(tmp_path / "b.png"))


WHOLE = png(2, 1, 0, [bytes([0, 1, 2])])
ROW = [bytes([0, 1, 2])]
BAD = {
    "empty": (b"", "not a PNG file"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(50), "a JPEG file, which is not read; expected PNG, as .mogrify -format png"),
    "signature only": (WHOLE[:8], "truncated PNG"),
    "in the header": (WHOLE[:20], "truncated PNG"),
    "in a length": (WHOLE[:35], "truncated PNG"),
    "in the pixels": (WHOLE[:45], "truncated PNG"),
    "no end": (WHOLE[:-12], "truncated PNG"),
    "in the end": (WHOLE[:-1], "truncated PNG"),
    "checksum": (WHOLE[:-17] + bytes([WHOLE[-17] ^ 1]) + WHOLE[-16:], "checksum of chunk b'IDAT'"),
    "header's checksum": (WHOLE[:17] + b"\1" + WHOLE[18:], "checksum of chunk b'IHDR'"),
    "no pixels": (WHOLE[:33] + chunk(b"IEND", b""), "no header or no pixels"),
    "no header": (WHOLE[:8] + WHOLE[33:], "no header or no pixels"),
    "3 bits": (png(8, 1, 0, [b"\0\1"], depth=3), "impossible header"),
    "colours of 4 bits": (png(1, 1, 2, ROW, depth=4), "impossible header"),
    "a palette of 16 bits": (png(1, 1, 3, ROW, depth=16), "impossible header"),
    "interlaced in another way": (png(2, 1, 0, ROW, interlaced=2), "impossible header"),
    "too few bits": (png(9, 1, 0, [b"\0\1"], depth=1), "its pixels are not the 3 bytes that 9 × 1 take"),
    "too few passes": (png(2, 1, 0, ROW, interlaced=1), "its pixels are not the 4 bytes that 2 × 1 take"),
    "filter of a pass": (png(2, 1, 0, [bytes([0, 1, 7, 1])], interlaced=1), "row filter 7"),
    "beyond the palette": (png(2, 1, 3, [b"\0\xf0"], 4, before=chunk(b"PLTE", bytes(45))), "not in the palette"),
    "colour type": (png(2, 1, 5, ROW), "impossible header"),
    "no width": (png(0, 1, 0, [b"\0"]), "impossible header"),
    "filter": (png(2, 1, 0, [bytes([5, 1, 2])]), "row filter 5"),
    "too few rows": (png(2, 2, 0, ROW), "its pixels are not the 6 bytes that 2 × 2 take"),
    "too many rows": (png(2, 1, 0, ROW * 9), "its pixels are not the 3 bytes that 2 × 1 take"),
    "a size beyond memory": (png(2**31 - 1, 2**31 - 1, 2, ROW), "2147483647 × 2147483647 pixels; expected at most 16,777,216"),
    "not zlib": (WHOLE[:33] + chunk(b"IDAT", b"pixels") + chunk(b"IEND", b""), r"damaged PNG \(Error -3"),
    "cut zlib": (WHOLE[:33] + chunk(b"IDAT", zlib.compress(ROW[0])[:-2]) + chunk(b"IEND", b""), "its pixels are not"),
    "no palette": (png(2, 1, 3, ROW), "not in the palette"),
    "short palette": (png(2, 1, 3, ROW, before=chunk(b"PLTE", bytes(6))), "not in the palette"),
    "critical chunk": (png(2, 1, 0, ROW, before=chunk(b"CgBI", b"")), "chunk b'CgBI' is not known"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named(tmp_path, case):
    file, (content, message) = tmp_path / "x.png", BAD[case]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        images.read_png(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="x.png: no such file"):
        images.read_png(tmp_path / "x.png")


def test_a_megapixel_of_paeth_is_read_in_two_seconds(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (1024, 1 + 3 * 1024), np.uint8)
    rows[:, 0] = 4
    (tmp_path / "x.png").write_bytes(png(1024, 1024, 2, [rows.tobytes()]))
    start = time.process_time()  # this process's own time: other work on the machine does not count
    assert images.read_png(tmp_path / "x.png").shape == (3, 1024, 1024)
    assert time.process_time() - start < 2


def test_a_grid_is_filled_row_by_row_and_the_rest_is_white():
    numbers = torch.tensor([0.1, 0.2, 0.3])[:, None, None, None].expand(3, 1, 1, 2)
    assert torch.equal(images.grid(numbers, columns=2, gap=1), torch.tensor([[
        [0.1, 0.1, 1.0, 0.2, 0.2],
        [1.0, 1.0, 1.0, 1.0, 1.0],
        [0.3, 0.3, 1.0, 1.0, 1.0]]]))  # fmt: skip
    assert images.grid(torch.zeros(5, 3, 8, 6), columns=3).shape == (3, 8 * 2 + 2, 6 * 3 + 2 * 2)
    assert torch.equal(images.grid(numbers, columns=1, gap=0), torch.tensor([[[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]]]))
    for wrong in ((torch.zeros(0, 1, 2, 2), 1), (torch.zeros(1, 2, 2), 1), (torch.zeros(1, 1, 2, 2), 0)):
        with pytest.raises(ValueError, match="no grid of images"):
            images.grid(*wrong)


def test_small_files_do_little_work(tmp_path):
    start = time.process_time()
    for width, height, kind in ((300_000, 1, 3), (1, 300_000, 4), (16_384, 1, 4), (1, 16_384, 3), (5000, 5000, 4)):
        rows = (bytes([kind]) + bytes(width)) * height
        (tmp_path / "x.png").write_bytes(png(width, height, 0, [rows]))
        if max(width, height) > 2**14 or width * height > 2**24:
            with pytest.raises(ValueError, match=f"an image of {width} × {height} pixels; expected at most 16,777,216"):
                images.read_png(tmp_path / "x.png")
        else:
            assert (images.read_png(tmp_path / "x.png") == -1).all()
    assert time.process_time() - start < 5
