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


def parts(array):
    """A picture as the four parts of a PNG: what begins it, our mark, the pixels, the end."""
    height, width = array.shape[:2]
    colour = 2 if array.ndim == 3 else 0
    header = struct.pack(">2I5B", width, height, 8, colour, 0, 0, 0)
    start = SIGNATURE + chunk(b"IHDR", header)
    mark = chunk(MARK[:4], MARK[4:])
    pixels = chunk(b"IDAT", compressed(array))
    return start, mark, pixels, chunk(b"IEND", b"")


def png(array):
    """uint8 (H, W) or (H, W, 3) -> the bytes of a PNG."""
    return b"".join(parts(array))


def apng(frames, milliseconds=100):
    """uint8 pictures of one shape -> the bytes of an animated PNG that repeats for ever and holds
    its last frame for two seconds. Viewers that do not animate show the last frame."""
    n = len(frames)
    height, width = frames[-1].shape[:2]
    start, mark, pixels, end = parts(frames[-1])
    count = struct.pack(">2I", n, 0)

    # the picture itself has no control chunk, so it is no part of the animation
    out = [start, mark, chunk(b"acTL", count), pixels]
    for i, frame in enumerate(frames):
        delay = milliseconds if i < n - 1 else 2000
        place = (width, height, 0, 0)
        time = (delay, 1000)
        control = struct.pack(">5I2H2B", 2 * i, *place, *time, 0, 0)
        number = struct.pack(">I", 2 * i + 1)
        out.append(chunk(b"fcTL", control))
        out.append(chunk(b"fdAT", number + compressed(frame)))
    return b"".join([*out, end])


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
INK = np.array([list(line) for line in FONT.split()]) == "#"
PIXELS = np.where(INK, 0, 255).astype(np.uint8)
SIX_ROWS = PIXELS.reshape(6, 7, 16, 6)  # each of sixteen characters
GLYPHS = SIX_ROWS.swapaxes(1, 2).reshape(96, 7, 6)
LETTER_HEIGHT = 14  # pixels: each of a glyph becomes 2 x 2
LETTER_WIDTH = 12


def enlarged(picture, scale):
    """Each pixel of (H, W) or (H, W, C) becomes scale x scale of them."""
    return picture.repeat(scale, 0).repeat(scale, 1)


def letters(words):
    """A text of at least one character as uint8 (14, 12 n), black on white; "?" stands for what
    is not ASCII."""
    codes = np.frombuffer(words.encode("ascii", "replace"), np.uint8)
    glyphs = GLYPHS[codes.clip(32) - 32]
    return enlarged(np.hstack(glyphs), 2)


def label(words, height, width, channels):
    """White (height, width, channels) with a text in the middle of its height, cut at its width."""
    out = np.full((height, width, channels), 255, np.uint8)
    text = letters(f" {words}")[:, :width, None]
    top = (height - LETTER_HEIGHT) // 2
    out[top : top + LETTER_HEIGHT, : text.shape[1]] = text
    return out


def titled(picture, words):
    """The picture (H, W, 3) below a line of text, which is cut at its width."""
    line = label(words, LETTER_HEIGHT + 8, *picture.shape[1:])
    return np.concatenate([line, picture])


# -------------------------------------------------------------------------------------------------
# Grids


def image_grid(images, columns=None, scale=None, names=()):
    """uint8 images (N, H, W, C) side by side -> one picture, grey lines between them.

    columns: by default the grid is about square. scale: whole factor of enlargement; by default
    small images grow to about 64 pixels (8x8: 8 times, 32x32: twice). names: texts, the i-th to the
    left of row i. What lies beyond LARGEST_SIDE is left out, with a warning.
    """
    n, h, w, c = images.shape
    scale = scale or max(1, 64 // max(h, w))
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)

    # a cell is an image, and a line below it and to its right
    H = h + 1
    W = w + 1
    if names:
        lowest = math.ceil(LETTER_HEIGHT / scale)
        H = max(H, lowest + 1)
    cells = np.full((rows * columns, H, W, c), 128, np.uint8)
    cells[:n, :h, :w] = images
    cells = cells.reshape(rows, columns, H, W, c)

    # as many of them as the largest side has room for
    most_rows = max(1, LARGEST_SIDE // (H * scale))
    most_columns = max(1, LARGEST_SIDE // (W * scale))
    shown = cells[:most_rows, :most_columns]
    if shown.size < cells.size:
        part = f"{len(shown)} of {rows} rows, {shown.shape[1]} of {columns} columns"
        warnings.warn(f"the picture shows {part}: all would be too large", stacklevel=2)
    by_pixel_rows = shown.swapaxes(1, 2)
    grid = by_pixel_rows.reshape(len(shown) * H, -1, c)
    grid = enlarged(grid[:-1, :-1], scale)

    if names:
        column = beside_rows(names, len(shown), H * scale, c)
        grid = np.concatenate([column[: len(grid)], grid], 1)
    return grid[..., 0] if c == 1 else grid


def beside_rows(names, rows, height, channels):
    """White (rows * height, width, channels), a name in the middle of each row that has one; long
    names are cut."""
    names = [name[:20] for name in names[:rows]]
    names += [""] * (rows - len(names))
    width = LETTER_WIDTH * (1 + max(map(len, names)))
    labels = [label(name, height, width, channels) for name in names]
    return np.concatenate(labels)


# -------------------------------------------------------------------------------------------------
# Points


def extent(points):
    """A square window [(x0, x1), (y0, y1)] around the first two axes of points (N, D), but for one
    in a thousand on each side."""
    first_two = points[:, :2]
    low, high = np.quantile(first_two, (0.001, 0.999), axis=0)
    centre = (low + high) / 2
    half = 0.58 * float((high - low).max())
    return [(float(c) - half, float(c) + half) for c in centre]


def histogram(points, limit=None):
    """Density of points (N, D) as uint8 (480, 480, 3), y upwards; only the first two axes count,
    and what is not finite is left out. Of numbers (N, 1) a bar chart. limit: [(x0, x1), (y0, y1)],
    by default the extent of the points."""
    points = points[np.isfinite(points).all(1)]
    limit = limit or extent(points)
    if points.shape[1] == 1:
        level = bars(points[:, 0], 240, limit[0])
    else:
        level = density(points, 240, limit)

    # white, light blue, blue, nearly black
    steps = (0, 1 / 3, 2 / 3, 1)
    red = np.interp(level, steps, (255, 130, 40, 10))
    green = np.interp(level, steps, (255, 180, 80, 10))
    blue = np.interp(level, steps, (255, 220, 160, 50))
    picture = np.stack([red, green, blue], -1)
    picture = picture.round().astype(np.uint8)
    return enlarged(picture, 2)


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
    x = points[:, 0]
    y = points[:, 1]
    count = np.histogram2d(x, y, bins, limit)[0]
    count = count.T[::-1]
    dense = np.quantile(count[count > 0], 0.99) if count.any() else 1
    return np.sqrt(np.minimum(count / dense, 1))  # the root shows thin structure beside dense
