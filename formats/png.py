"""Arrays -> pictures, with numpy alone: PNG, animated PNG, grids of images, histograms of points.

A picture is uint8 (H, W) grey or (H, W, 3) colour. Every PNG carries a text that marks it as
written here, so that nobody trains on it by accident.
"""

import math
import struct
import warnings
import zlib

import numpy as np

from formats.files import MARK, write_files

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST_SIDE = 10_000  # pixels of a grid: rows and columns beyond it are left out


# -------------------------------------------------------------------------------------------------
# PNG


def chunk(kind, body):
    """A part of a PNG: its length, its kind (4 letters), its content, a checksum."""
    content = kind + body
    length = struct.pack(">I", len(body))
    checksum = struct.pack(">I", zlib.crc32(content))
    return length + content + checksum


def compressed(array):
    """The pixels as a PNG keeps them: each row begins with 0, which says "no filter"."""
    rows = [b"\0" + row.tobytes() for row in array]
    return zlib.compress(b"".join(rows), 9)


def png(array):
    """uint8 (H, W) or (H, W, 3) -> the bytes of a PNG."""
    return apng([array])


def apng(frames, milliseconds=100):
    """uint8 pictures of one shape -> the bytes of an animated PNG that repeats for ever and holds
    its last frame for two seconds. Viewers that do not animate show the last frame. Of one picture
    it makes a plain PNG."""
    last = frames[-1]
    for frame in frames:
        if frame.dtype != np.uint8 or frame.shape != last.shape or last.shape[2:] not in ((), (3,)):
            found = f"{frame.dtype} {frame.shape}"
            raise ValueError(f"pictures are uint8 (H, W) or (H, W, 3), of one shape; got {found}")
    height, width = last.shape[:2]
    colour = 2 if last.ndim == 3 else 0
    header = struct.pack(">2I5B", width, height, 8, colour, 0, 0, 0)

    # the picture itself has no control chunk, so it is no part of the animation
    out = [SIGNATURE, chunk(b"IHDR", header), chunk(MARK[:4], MARK[4:])]
    if len(frames) > 1:
        out.append(chunk(b"acTL", struct.pack(">2I", len(frames), 0)))
    out.append(chunk(b"IDAT", compressed(last)))
    if len(frames) > 1:
        number = 0  # of the chunks that animate
        for frame in frames:
            delay = 2000 if number == 2 * len(frames) - 2 else milliseconds
            control = struct.pack(">5I2H2B", number, width, height, 0, 0, delay, 1000, 0, 0)
            out.append(chunk(b"fcTL", control))
            out.append(chunk(b"fdAT", struct.pack(">I", number + 1) + compressed(frame)))
            number += 2
    out.append(chunk(b"IEND", b""))
    return b"".join(out)


def write_png(path, array):
    """Write a picture as a PNG that appears whole or not at all."""
    write_files({path: png(array)})


# -------------------------------------------------------------------------------------------------
# Text: the 95 printable ASCII characters, 16 in a row, of 5 x 7 pixels

FONT = """
........#....#.#...#.#....#...##.....##.....#......#...#........................................
........#....#.#...#.#...####.##..#.#..#....#.....#.....#.....#.....#.........................#.
........#....#.#..#####.#.#......#..#.#.....#....#.......#..#.#.#...#........................#..
........#..........#.#...###....#....#...........#.......#...###..#####.......#####.........#...
........#.........#####...#.#..#....#.#.#........#.......#..#.#.#...#.....##...............#....
...................#.#..####..#..##.#..#..........#.....#.....#.....#.....#..........##...#.....
........#..........#.#....#......##..##.#..........#...#.................#...........##.........

.###....#....###...###.....#..#####...##..#####..###...###.................#.........#.....###..
#...#..##...#...#.#...#...##..#......#........#.#...#.#...#..##....##.....#...........#...#...#.
#..##...#.......#.....#..#.#..####..#........#..#...#.#...#..##....##....#....#####....#......#.
#.#.#...#......#....##..#..#......#.####....#....###...####.............#...............#....#..
##..#...#.....#.......#.#####.....#.#...#...#...#...#.....#..##....##....#....#####....#....#...
#...#...#....#....#...#....#..#...#.#...#...#...#...#....#...##.....#.....#...........#.........
.###...###..#####..###.....#...###...###....#....###...##..........#.......#.........#......#...

.###...###..####...###..####..#####.#####..###..#...#..###....###.#...#.#.....#...#.#...#..###..
#...#.#...#.#...#.#...#.#...#.#.....#.....#...#.#...#...#......#..#..#..#.....##.##.##..#.#...#.
#.###.#...#.#...#.#.....#...#.#.....#.....#.....#...#...#......#..#.#...#.....#.#.#.##..#.#...#.
#.#.#.#####.####..#.....#...#.####..####..#.###.#####...#......#..##....#.....#.#.#.#.#.#.#...#.
#.###.#...#.#...#.#.....#...#.#.....#.....#...#.#...#...#......#..#.#...#.....#...#.#..##.#...#.
#.....#...#.#...#.#...#.#...#.#.....#.....#...#.#...#...#...#..#..#..#..#.....#...#.#..##.#...#.
.###..#...#.####...###..####..#####.#......####.#...#..###...##...#...#.#####.#...#.#...#..###..

####...###..####...####.#####.#...#.#...#.#...#.#...#.#...#.#####..###.........###....#.........
#...#.#...#.#...#.#.......#...#...#.#...#.#...#.#...#.#...#.....#..#....#........#...#.#........
#...#.#...#.#...#.#.......#...#...#.#...#.#...#..#.#...#.#.....#...#.....#.......#..#...#.......
####..#...#.####...###....#...#...#.#...#.#.#.#...#.....#.....#....#......#......#..............
#.....#.#.#.#.#.......#...#...#...#.#...#.#.#.#..#.#....#....#.....#.......#.....#..............
#.....#..#..#..#......#...#...#...#..#.#..##.##.#...#...#...#......#........#....#..............
#......##.#.#...#.####....#....###....#...#...#.#...#...#...#####..###.........###........#####.

.#..........#...............#.........##........#.......#......#..#......##.....................
..#.........#...............#........#..........#.................#.......#.....................
.......###..####...####..####..###..####...####.####...##.....##..#..#....#...##.#..####...###..
..........#.#...#.#.....#...#.#...#..#....#...#.#...#...#......#..#.#.....#...#.#.#.#...#.#...#.
.......####.#...#.#.....#...#.#####..#.....####.#...#...#......#..##......#...#.#.#.#...#.#...#.
......#...#.#...#.#.....#...#.#......#........#.#...#...#...#..#..#.#.....#...#.#.#.#...#.#...#.
.......####.####...####..####..###...#.....###..#...#..###...##...#..#...###..#.#.#.#...#..###..

.........................#...........................................##...#...##................
.........................#..........................................#.....#.....#...............
####...####.#.##...####.####..#...#.#...#.#...#.#...#.#...#.#####...#.....#.....#....#..#.......
#...#.#...#.##....#......#....#...#.#...#.#...#..#.#..#...#....#...#......#......#..#.#.#.......
####...####.#......###...#....#...#.#...#.#.#.#...#....####...#.....#.....#.....#...#..#........
#.........#.#.........#..#....#...#..#.#..#.#.#..#.#......#..#......#.....#.....#...............
#.........#.#.....####....##...####...#....#.#..#...#..###..#####....##...#...##................
"""
GLYPHS = np.array([list(line) for line in FONT.split()]) == "#"
GLYPHS = GLYPHS.reshape(6, 7, 16, 6).swapaxes(1, 2).reshape(96, 7, 6)
LETTER = (14, 12)  # pixels: each of a glyph becomes 2 x 2


def letters(words):
    """A text as uint8 (14, 12 n), black on white; "?" stands for characters that FONT lacks."""
    numbers = [ord(c if " " <= c <= "~" else "?") - 32 for c in words]
    line = GLYPHS[np.array(numbers, int)].swapaxes(0, 1).reshape(7, -1)
    return np.where(line, 0, 255).astype(np.uint8).repeat(2, 0).repeat(2, 1)


def titled(picture, words):
    """The picture (H, W, 3) below a line of text, which is cut at its width."""
    line = np.full((LETTER[0] + 8, *picture.shape[1:]), 255, np.uint8)
    label = letters(words)[:, : line.shape[1] - LETTER[1], None]
    line[4:-4, LETTER[1] : LETTER[1] + label.shape[1]] = label
    return np.concatenate([line, picture])


# -------------------------------------------------------------------------------------------------
# Grids


def image_grid(images, columns=None, border=1, scale=None, names=()):
    """uint8 images (N, H, W, C) side by side -> one picture, grey lines of `border` image pixels
    between them.

    columns: by default the grid is about square. scale: whole factor of enlargement; by default
    small images grow to about 64 pixels (8x8: 8 times, 32x32: twice). names: texts, the i-th to the
    left of row i. What lies beyond LARGEST_SIDE is left out, with a warning.
    """
    n, h, w, c = images.shape
    scale = scale or max(1, 64 // max(h, w))
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    H = h + border
    W = w + border
    if names:
        H = max(H, border + math.ceil(LETTER[0] / scale))

    # empty places are as grey as the lines
    cells = np.full((rows * columns, H, W, c), 128, np.uint8)
    cells[:n, :h, :w] = images
    cells = cells.reshape(rows, columns, H, W, c)

    most_rows = max(1, LARGEST_SIDE // (H * scale))
    most_columns = max(1, LARGEST_SIDE // (W * scale))
    if rows > most_rows or columns > most_columns:
        all_of_them = f"{rows} rows of {columns}"
        rows = min(rows, most_rows)
        columns = min(columns, most_columns)
        text = f"the picture shows {rows} rows of {columns}: {all_of_them} would be too large"
        warnings.warn(text, stacklevel=2)
        cells = cells[:rows, :columns]

    grid = cells.swapaxes(1, 2).reshape(rows * H, columns * W, c)
    grid = grid[: rows * H - border, : columns * W - border]
    grid = grid.repeat(scale, 0).repeat(scale, 1)
    if names:
        grid = np.concatenate([beside_rows(names, len(grid), H * scale, h * scale, c), grid], 1)
    return grid[..., 0] if c == 1 else grid


def beside_rows(names, height, step, image_height, channels):
    """White (height, width, channels) with name i in the middle of the image that begins at
    i * step; long names are cut."""
    names = [name if len(name) <= 20 else name[:17] + "..." for name in names]
    width = LETTER[1] * (1 + max(len(name) for name in names))
    out = np.full((height, width, channels), 255, np.uint8)
    for i, name in enumerate(names):
        label = letters(name)
        top = i * step + max(0, image_height - LETTER[0]) // 2
        if top < height:
            out[top : top + LETTER[0], 6 : 6 + label.shape[1]] = label[..., None]
    return out


# -------------------------------------------------------------------------------------------------
# Points


def extent(points):
    """A square window [(x0, x1), (y0, y1)] around the first two axes of the finite points (N, D),
    but for one in a thousand on each side."""
    points = points[np.isfinite(points).all(1)][:, :2]
    if len(points) == 0:
        points = np.zeros((1, 2))
    low, high = np.quantile(points, (0.001, 0.999), axis=0)
    centre = (low + high) / 2
    width = max((high - low).max(), 1e-12 * np.abs(centre).max())
    half = 0.58 * float(width or 1)  # of equal points, too
    return [(float(c) - half, float(c) + half) for c in centre]


def histogram(points, size=480, limit=None):
    """Density of points (N, D) as uint8 (size, size, 3), y upwards; only the first two axes count.
    Of numbers (N, 1) a bar chart. limit: [(x0, x1), (y0, y1)], by default the extent of the
    points."""
    limit = limit or extent(points)
    points = points[np.isfinite(points).all(1)]
    if points.shape[1] == 1:
        level = bars(points[:, 0], size // 2, limit[0])
    else:
        level = density(points, size // 2, limit)

    # white, light blue, blue, nearly black
    ramp = np.array([(255, 255, 255), (130, 180, 220), (40, 80, 160), (10, 10, 50)])
    colour = [np.interp(level, (0, 1 / 3, 2 / 3, 1), channel) for channel in ramp.T]
    picture = np.stack(colour, -1).round().astype(np.uint8)
    return picture.repeat(2, 0).repeat(2, 1)


def bars(numbers, bins, limit):
    """(bins, bins) from 0 to 1: a bar chart of numbers (N,)."""
    n = min(bins, math.isqrt(len(numbers)) + 1)  # more would make a comb of narrow bars
    count = np.histogram(numbers, n, limit)[0]
    height = 0.95 * bins * count / max(count.max(), 1)
    bar_of_column = np.arange(bins) * n // bins
    row = np.arange(bins)[::-1, None]  # counted from below
    return row < height[bar_of_column]


def density(points, bins, limit):
    """(bins, bins) from 0 to 1: how dense the points (N, D) are, the first axis to the right."""
    count, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins, limit)
    count = np.flip(count.T, 0)
    dense = np.quantile(count[count > 0], 0.99) if count.any() else 1
    return np.sqrt(np.minimum(count / dense, 1))  # the root shows thin structure beside dense
