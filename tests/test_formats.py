"""formats/: files that appear whole, PNGs, pictures, official files. Everything is made here."""

import gzip
import hashlib
import http.server
import io
import os
import re
import resource
import struct
import sys
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from formats import files, official, pictures, png


def fails(match, function, *args, **kwargs):
    """The call raises a UserError of exactly one line that matches."""
    with pytest.raises(files.UserError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert re.search(match, text), text


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def damaged(path, bits=()):
    """Writes the file cut in several places, empty, foreign, and with one wrong bit at each of
    those places, and yields after each; then restores it."""
    path = Path(path)
    good = path.read_bytes()
    for length in (0, 1, 5, 40, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        yield
    path.write_bytes(b"foreign\n" * 99)
    yield
    for i in bits:
        path.write_bytes(good[:i] + bytes([good[i] ^ 4]) + good[i + 1 :])
        yield
    path.write_bytes(good)


def pillow():
    return pytest.importorskip("PIL.Image")


def paint(path, pixels, mode=None, **keywords):
    """A picture file, by Pillow; without it the test is skipped."""
    image = pillow().fromarray(np.asarray(pixels)).convert(mode)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **keywords)


def flat(colour, height=20, width=20):
    return np.full((height, width, 3), colour, np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder to work in; the cache is below it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "phase-ref"


@pytest.fixture
def little_memory():
    """Two gigabytes more than there are now."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# -------------------------------------------------------------------------------------------------
# Files


def test_of_several_files_all_are_written():
    files.write_files({"a": b"1", "b": lambda file: file.write(b"2")})
    assert (Path("a").read_bytes(), Path("b").read_bytes()) == (b"1", b"2")


def test_if_one_file_cannot_be_written_none_is():
    fails("cannot write no/b .*another folder", files.write_files, {"a": b"1", "no/b": b"2"})
    assert not [*Path().iterdir()]


def test_an_error_while_writing_keeps_the_old_file():
    Path("a").write_bytes(b"old")
    full = Mock(side_effect=OSError(28, "No space left on device"))
    fails("cannot write a .*No space left.*: make room", files.write_files, {"a": full})
    assert [path.name for path in Path().iterdir()] == ["a"]
    assert Path("a").read_bytes() == b"old"


def test_without_a_home_folder_the_line_names_the_way_out(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home directory")))
    fails("no home folder.*set XDG_CACHE_HOME to a folder", files.cache_dir)


# -------------------------------------------------------------------------------------------------
# PNG


def read_png(content):
    """The chunks [(kind, body)] of a PNG; checks the checksums."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks = []
    i = 8
    while i < len(content):
        length, kind = struct.unpack(">I4s", content[i : i + 8])
        body = content[i + 8 : i + 8 + length]
        checksum = struct.unpack(">I", content[i + 8 + length : i + 12 + length])[0]
        assert checksum == zlib.crc32(kind + body)
        chunks.append((kind, body))
        i += 12 + length
    return chunks


def pixels_of(body, like):
    """The content of an IDAT chunk as an array; each row must have filter 0."""
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(len(like), -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(like.shape)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1)])
def test_a_png_decodes_back(shape):
    array = noise(0, *shape)
    chunks = read_png(png.png(array))
    assert [kind for kind, _ in chunks] == [b"IHDR", b"tEXt", b"IDAT", b"IEND"]
    colour = 2 if len(shape) == 3 else 0
    assert struct.unpack(">2I5B", chunks[0][1]) == (*shape[1::-1], 8, colour, 0, 0, 0)
    assert same(pixels_of(chunks[2][1], array), array)


def test_an_array_that_is_not_contiguous_is_written_too():
    array = noise(0, 5, 7, 3).swapaxes(0, 1)
    png.write_png("a.png", array)
    chunks = dict(read_png(Path("a.png").read_bytes()))
    assert same(pixels_of(chunks[b"IDAT"], array), array)


@pytest.fixture
def film():
    frames = [noise(i, 4, 6, 3) for i in range(3)]
    return frames, read_png(png.apng(frames, milliseconds=40))


def test_an_animation_has_its_chunks_in_order(film):
    kinds = [kind for kind, _ in film[1]]
    frames = [b"fcTL", b"fdAT"] * 3
    assert kinds == [b"IHDR", b"tEXt", b"acTL", b"IDAT", *frames, b"IEND"]


def test_the_chunks_of_an_animation_are_numbered(film):
    numbered = [body for kind, body in film[1] if kind in (b"fcTL", b"fdAT")]
    assert [struct.unpack(">I", body[:4])[0] for body in numbered] == list(range(6))


def test_an_animation_holds_every_frame(film):
    frames, chunks = film
    assert dict(chunks)[b"acTL"] == struct.pack(">2I", 3, 0)
    found = [pixels_of(body[4:], frames[0]) for kind, body in chunks if kind == b"fdAT"]
    assert all(same(*pair) for pair in zip(found, frames, strict=True))


def test_viewers_that_do_not_animate_show_the_last_frame(film):
    frames, chunks = film
    assert same(pixels_of(dict(chunks)[b"IDAT"], frames[0]), frames[2])


def test_the_last_frame_stays_for_two_seconds(film):
    controls = [struct.unpack(">5I2H2B", body) for kind, body in film[1] if kind == b"fcTL"]
    assert [control[5] / control[6] for control in controls] == [0.04, 0.04, 2.0]


def test_pillow_reads_an_animation_with_all_its_frames(film):
    Path("film.png").write_bytes(png.apng(film[0]))
    image = pillow().open("film.png")
    shown = []
    for i in range(image.n_frames):
        image.seek(i)
        shown.append(np.asarray(image.convert("RGB")))
    frames = [film[0][2], *film[0]]  # the default image comes first
    assert all(same(*pair) for pair in zip(shown, frames, strict=True))


@pytest.mark.parametrize("odd", [np.zeros((2, 2)), np.zeros((2, 2, 2), "u1"), np.zeros(3, "u1")])
def test_what_is_no_picture_is_refused(odd):
    with pytest.raises(ValueError, match=r"pictures are uint8|unpack"):
        png.png(odd)


def test_a_png_of_this_program_carries_its_mark():
    assert files.MARK in png.png(noise(0, 3, 3))[:100]


# -------------------------------------------------------------------------------------------------
# Grids and histograms


@pytest.mark.parametrize("c", [1, 3])
def test_a_grid_holds_every_image_enlarged(c):
    array = noise(0, 5, 8, 6, c)
    grid = png.image_grid(array, columns=3, border=2, scale=4).reshape(72, 88, c)
    small = grid[::4, ::4].copy()
    assert same(small.repeat(4, 0).repeat(4, 1), grid)
    for i in range(5):
        cell = small[10 * (i // 3) :, 8 * (i % 3) :][:8, :6]
        assert same(cell, array[i])
        cell[:] = 128
    assert (small == 128).all()  # the borders and the empty sixth place


@pytest.mark.parametrize(("size", "scale"), [(8, 8), (28, 2), (64, 1), (200, 1)])
def test_small_images_grow_by_whole_factors(size, scale):
    grid = png.image_grid(np.zeros((64, size, size, 1), np.uint8))
    assert grid.shape == (scale * (8 * size + 7),) * 2


def test_a_grid_that_is_too_large_is_cut_with_a_warning():
    images = np.broadcast_to(np.uint8(0), (24_000, 8, 8, 3))
    with pytest.warns(UserWarning, match="shows .* rows of 8: 3000 rows of 8 would be"):
        grid = png.image_grid(images, columns=8)
    assert max(grid.shape) <= png.LARGEST_SIDE


def test_names_stand_beside_their_rows():
    grid = png.image_grid(np.zeros((4, 8, 8, 3), np.uint8), columns=2, names=("", "cat"))
    side = grid[:, : -8 * 17]
    assert (side[:64] == 255).all()
    assert (side[72:] == 0).any(axis=(1, 2)).sum() >= 10  # as many rows of pixels have ink


def test_names_fit_beside_the_lowest_of_images():
    grid = png.image_grid(np.zeros((3, 1, 128, 1), np.uint8), columns=1, names=["a", "b", "c"])
    side = grid[:, :12]
    assert grid.shape[0] >= 3 * 14
    assert (side == 0).any()


def test_a_long_name_is_cut():
    short, long = (png.image_grid(noise(0, 1, 8, 8, 1), names=["x" * n]) for n in (20, 500))
    assert short.shape == long.shape


def test_every_printable_character_has_its_own_glyph():
    drawn = {png.letters(chr(i)).tobytes() for i in range(32, 127)}
    assert len(drawn) == 95


def test_other_characters_are_question_marks():
    assert same(png.letters("кé"), png.letters("??"))


def test_a_histogram_puts_the_second_axis_upwards():
    points = np.array([[0.9, 0.1]] * 9 + [[0.1, 0.1]])
    picture = png.histogram(points, size=40, limit=[(0, 1), (0, 1)])
    darkest = np.argwhere(picture[..., 0] == picture[..., 0].min())
    assert (darkest >= (34, 34)).all()
    assert picture.shape == (40, 40, 3)


def test_of_numbers_the_bars_are_as_high_as_their_counts():
    numbers = np.repeat([0.25, 0.75], [100, 50])[:, None]
    picture = png.histogram(numbers, size=400, limit=[(0, 1)])
    ink = (picture[..., 0] < 255).sum(0)
    assert abs(ink[ink > 0].min() / ink.max() - 0.5) < 0.02  # one pixel of 190


def test_points_that_are_not_finite_are_left_out():
    points = np.array([[0, 0], [1, 1], [np.nan, 0], [0, np.inf]])
    assert np.isfinite(png.extent(points)).all()
    assert same(png.histogram(points), png.histogram(points[:2]))


# -------------------------------------------------------------------------------------------------
# One picture


def test_sixteen_bits_are_brought_to_eight():
    paint("a.png", np.full((4, 4), 100 * 257 + 100, np.uint16))
    image, changes = pictures.decode("a.png")
    assert set(np.asarray(image).ravel()) == {100}
    assert changes[pictures.DEEP] == 100 * 257 + 100


def test_a_turned_picture_is_put_upright():
    turn = pillow().Exif()
    turn[0x0112] = 6  # to be seen after a quarter turn clockwise: the left side comes on top
    halves = np.concatenate([flat((255, 0, 0)), flat((0, 0, 255))], 1)
    paint("a.jpg", halves, quality=95, exif=turn)
    found = np.asarray(pictures.decode("a.jpg")[0])
    assert found.shape == (40, 20, 3)
    assert found[:15, ..., 0].min() > 200
    assert found[25:, ..., 2].min() > 200


@pytest.mark.parametrize("kind", ["palette", "alpha"])
def test_what_is_transparent_becomes_white(kind):
    if kind == "palette":
        paint("a.png", flat(0)[..., 0], "P", transparency=0)
    else:
        paint("a.png", np.dstack([flat((255, 0, 0)), flat(0)[..., :1]]), "RGBA")
    image, changes = pictures.decode("a.png")
    assert (np.asarray(image) == 255).all()
    assert changes == {"transparent": 1}


def test_half_transparent_red_is_pale():
    alpha = np.full((20, 20, 1), 102, np.uint8)
    paint("a.png", np.dstack([flat((255, 0, 0)), alpha]), "RGBA")
    colour = np.asarray(pictures.decode("a.png")[0])[0, 0].astype(int)
    assert abs(colour - (255, 153, 153)).max() <= 1


def test_an_alpha_channel_that_hides_nothing_is_not_counted():
    paint("a.png", np.dstack([flat(7), flat(255)[..., :1]]), "RGBA")
    assert pictures.decode("a.png")[1] == {}


def test_a_picture_of_ninety_megapixels_is_read():
    pillow().new("1", (9500, 9500), 1).save("a.png")
    assert pictures.decode("a.png")[0].size == (9500, 9500)


def test_long_texts_and_profiles_do_no_harm():
    text = pytest.importorskip("PIL.PngImagePlugin").PngInfo()
    text.add_text("prompt", "x" * 5_000_000, zip=True)
    paint("a.png", flat(9), pnginfo=text, icc_profile=bytes(3_000_000))
    assert (np.asarray(pictures.decode("a.png")[0]) == 9).all()


@pytest.mark.parametrize(("height", "width", "size"), [(40, 61, 16), (61, 40, 8), (9, 7, 20)])
def test_the_central_square_is_resized_by_lanczos(height, width, size):
    image = noise(0, height, width)
    paint("a.png", image)
    side = min(height, width)
    left = (width - side) / 2
    top = (height - side) / 2
    box = (left, top, left + side, top + side)
    truth = pillow().fromarray(image).resize((size, size), pillow().LANCZOS, box)
    found = np.asarray(pictures.decode("a.png", size)[0]).astype(int)
    assert abs(found - np.asarray(truth)[..., None]).max() <= 1


def test_one_picture_is_read_as_colour():
    image = noise(0, 5, 7, 3)
    paint("a.PNG", image)
    assert same(pictures.read("a.PNG"), image)


def test_an_npy_is_read_as_it_is():
    image = noise(0, 5, 7, 1)
    np.save("a.npy", image)
    assert same(pictures.read("a.npy"), image)


def test_an_npy_of_another_kind_is_refused():
    np.save("a.npy", np.zeros((5, 7)))
    fails(r"cannot read a.npy \(it is float64 \(5, 7\), not uint8", pictures.read, "a.npy")


def test_a_broken_picture_is_one_line():
    pillow()
    Path("a.png").write_bytes(b"no picture")
    fails("cannot read a.png", pictures.read, "a.png")


def test_without_pillow_the_line_says_what_to_install(monkeypatch):
    Path("a.png").touch()
    monkeypatch.setitem(sys.modules, "PIL", None)
    fails("pip install pillow to read a.png, or give an .npy", pictures.read, "a.png")


HALF = np.arange(16).reshape(4, 4) % 4 < 2


@pytest.mark.parametrize("dtype", ["?", "i8", "f4", "u1"])
def test_a_mask_of_zero_and_one_is_black_and_white(dtype):
    np.save("a.npy", HALF.astype(dtype))
    assert same(pictures.read_mask("a.npy"), np.uint8(255) * HALF)


def test_a_mask_may_have_an_axis_of_one_channel():
    np.save("a.npy", 255 * HALF[..., None].astype("u1"))
    assert same(pictures.read_mask("a.npy"), np.uint8(255) * HALF)


def test_a_mask_in_colour_counts_by_its_grey():
    paint("a.png", np.uint8(255) * HALF[..., None].repeat(3, 2))
    assert same(pictures.read_mask("a.png"), np.uint8(255) * HALF)


def test_the_alpha_channel_of_a_mask_is_the_mask():
    alpha = np.uint8(255) * HALF
    paint("a.png", np.dstack([flat(9, 4, 4), alpha]), "RGBA")
    assert same(pictures.read_mask("a.png"), alpha)


# -------------------------------------------------------------------------------------------------
# A folder of pictures


def loaded(size=8, path="s"):
    return pictures.load(Path(path), size)


def test_pictures_of_every_format_are_read():
    for ending in "png jpg jfif webp gif bmp tif ppm".split():
        keywords = {"format": "JPEG"} if ending == "jfif" else {}
        paint(f"s/картинка\n.{ending}", flat((250, 10, 10)), **keywords)
    array = loaded()["array"].astype(int)
    assert len(array) == 8
    assert abs(array - (250, 10, 10)).max() <= 12  # of JPEG and WebP; 1 or 2 levels on this colour


def test_a_file_is_known_by_its_content():
    paint("s/a.PNG", flat(9), format="BMP")
    assert (loaded()["array"] == 9).all()


def test_grey_pictures_have_one_channel():
    paint("s/a.png", noise(0, 9, 9))
    assert loaded()["array"].shape == (1, 8, 8, 1)


@pytest.mark.parametrize("content", ["cut", "postscript", "bomb"])
def test_a_broken_picture_is_skipped_and_told(content, capsys, little_memory):
    paint("s/a.png", flat(9))
    broken = Path("s/b.png")
    if content == "cut":
        broken.write_bytes(Path("s/a.png").read_bytes()[:60])
    if content == "postscript":
        broken.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    if content == "bomb":  # 60,000 pixels a side
        good = Path("s/a.png").read_bytes()
        header = b"IHDR" + struct.pack(">2I", 60_000, 60_000) + good[24:29]
        broken.write_bytes(good[:12] + header + struct.pack(">I", zlib.crc32(header)) + good[33:])
    assert len(loaded()["array"]) == 1
    assert re.search(r"1 broken pictures skipped: b.png \(.+\)\n$", capsys.readouterr().err)


def test_pictures_of_floats_are_skipped_and_told(capsys):
    paint("s/a.png", flat(9))
    paint("s/b.tif", np.ones((9, 9), np.float32), "F")
    assert len(loaded()["array"]) == 1
    assert "skipped: b.tif (its pixels are floats)" in capsys.readouterr().err


def said_of(capsys):
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text


def test_what_is_not_read_is_counted(capsys):
    paint("s/a.png", flat(9))
    for name in (".hidden.png", "a.txt", "b.txt", "README"):
        Path("s", name).touch()
    Path("s/broken.png").symlink_to("nowhere.png")
    loaded()
    text = said_of(capsys)
    for part in ("1 pictures of 8 x 8", "4 files not read (2 .txt,", "1 hidden", "1 broken links"):
        assert part in text, text


def test_what_was_changed_is_counted(capsys):
    paint("s/a.png", flat(9, 20, 30))
    paint("s/b.png", flat((1, 2, 3), 30, 20))
    paint("s/c.png", flat(9, 1, 1))
    loaded()
    text = said_of(capsys)
    for part in ("2 cropped to the central square", "1 enlarged", "1 in colour"):
        assert part in text, text


def test_further_frames_of_all_pictures_are_counted(capsys):
    frames = [pillow().fromarray(noise(i, 16, 16, 3)) for i in range(40)]
    Path("s").mkdir()
    for ending in ("gif", "webp", "png", "tif"):
        frames[0].save(f"s/a.{ending}", save_all=True, append_images=frames[1:])
    loaded()
    assert "156 further frames not read" in said_of(capsys)


@pytest.mark.parametrize(("count", "end"), [(20, r"19\)"), (26, r"19, \.\.\.\)")])
def test_of_many_classes_the_first_twenty_are_named(count, end, capsys):
    for i in range(count):
        paint(f"s/{i}/a.png", flat(i))
    loaded()
    assert re.search(rf"{count} classes \(0, 1, .* {end}", said_of(capsys))


def test_a_link_into_the_folder_itself_doubles_nothing():
    paint("s/a/1.png", flat(9))
    Path("s/again").symlink_to("a")
    Path("s/around").symlink_to("../s")
    assert loaded()["files"] == ["a/1.png"]


def test_a_link_to_another_folder_is_followed():
    paint("elsewhere/1.png", flat(9))
    Path("s").mkdir()
    Path("s/a").symlink_to("../elsewhere")
    assert loaded()["files"] == ["a/1.png"]


@pytest.mark.parametrize("name", ["ckpt.pt", "log.txt", "samples.npz"])
def test_the_folder_of_a_run_is_left_out_and_counted(name, capsys):
    paint("s/a/1.png", flat(9))
    paint("s/b/1.png", flat(7))
    paint("s/runs/x/samples.png", flat(8))
    Path("s/runs/x", name).touch()
    assert loaded()["names"] == ["a", "b"]
    assert "2 files in run folders of this program left out" in said_of(capsys)


def test_a_log_of_somebody_else_hides_no_class():
    paint("s/a/1.png", flat(9))
    paint("s/b/1.png", flat(7))
    Path("s/b/log.txt").write_text("fetched 1.png\n")
    assert loaded()["names"] == ["a", "b"]


def test_the_folder_that_was_asked_for_may_be_that_of_a_run():
    paint("s/1.png", flat(9))
    Path("s/log.txt").touch()
    assert loaded()["files"] == ["1.png"]


def test_pictures_that_the_program_drew_are_left_out_and_counted(capsys):
    paint("s/a/1.png", flat(9))
    paint("s/b/1.png", flat(7))
    Path("s/drawn").mkdir()
    for i in range(3):
        png.write_png(f"s/drawn/{i}.png", noise(i, 9, 9))
    assert loaded()["names"] == ["a", "b"]
    assert "3 pictures that this program drew left out" in said_of(capsys)


def test_twelve_bits_in_sixteen_are_refused_with_the_way_out():
    paint("s/a.png", (np.arange(4096) * np.ones((9, 1))).astype(np.uint16))
    for _ in range(2):  # read, and out of the cache
        fails("s has pictures of 16 bits .* 4095.*one .npy of uint16", loaded)


def test_eight_bits_in_sixteen_are_refused_with_the_way_out():
    paint("s/a.tif", noise(0, 9, 9).astype(np.uint16))
    fails("largest value is 2.., where 65535", loaded)


def test_the_largest_value_of_the_whole_set_decides():
    paint("s/dark.png", np.full((9, 9), 4095, np.uint16))
    paint("s/bright.png", np.full((9, 9), 65535, np.uint16))
    assert loaded()["array"][:, 0, 0, 0].tolist() == [255, 16]


def test_twelve_bits_in_sixteen_are_refused_in_colour_too():
    pillow()
    rows = [b"\0" + row.tobytes() for row in noise(0, 9, 9, 3).astype(">u2")]
    header = png.chunk(b"IHDR", struct.pack(">2I5B", 9, 9, 16, 2, 0, 0, 0))
    body = png.chunk(b"IDAT", zlib.compress(b"".join(rows)))
    Path("s").mkdir()
    Path("s/a.png").write_bytes(png.SIGNATURE + header + body + png.chunk(b"IEND", b""))
    fails("s has pictures of 16 bits", loaded)


def test_integers_that_sixteen_bits_do_not_hold_are_skipped(capsys):
    paint("s/a.png", flat(9))
    paint("s/b.tif", np.full((9, 9), 70_000, np.int32))
    loaded()
    assert "skipped: b.tif (its values are not from 0 to 65535)" in said_of(capsys)


def test_an_empty_folder_is_one_line_without_empty_brackets():
    Path("s").mkdir()
    fails(r"no pictures in s \(it is empty\): give a folder or zip", loaded)


def test_a_folder_without_pictures_says_what_is_there():
    Path("s").mkdir()
    Path("s/a.txt").touch()
    fails(r"no pictures in s \(1 files not read \(1 .txt\)\)", loaded)


def test_a_folder_of_broken_pictures_says_so():
    pillow()
    Path("s").mkdir()
    Path("s/a.png").touch()
    fails("no pictures in s .*1 broken pictures skipped: a.png", loaded)


def test_a_damaged_zip_is_one_line():
    paint("a.png", flat(9))
    with zipfile.ZipFile("s.zip", "w") as file:
        file.write("a.png")
    for _ in damaged("s.zip"):
        fails("cannot read s.zip", loaded, path="s.zip")


def test_without_pillow_a_folder_is_one_line(monkeypatch):
    Path("s").mkdir()
    Path("s/a.png").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "PIL", None)
    fails("pip install pillow to read the pictures of s", loaded)


# -------------------------------------------------------------------------------------------------
# Classes


CHUNKS = "0/a.png 1/b.png 0/c.png"  # of EDM and StyleGAN


def make(names, index, zipped):
    """A folder or zip of the pictures; the i-th is of grey level 20 i."""
    with zipfile.ZipFile("s.ZIP", "w") as file:
        for i, name in enumerate(names):
            paint(f"s/{name}", flat(20 * i))
            file.write(f"s/{name}", name.replace("/", "\\"))
            file.writestr(f"__MACOSX/._{name}", b"resource")
        if index:
            Path("s/dataset.json").write_text(f'{{"labels": {index}}}')
            file.write("s/dataset.json", "dataset.json")
    return "s.ZIP" if zipped else "s"


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("names", "index", "classes", "labels", "held_out", "reason"),
    [  # files, dataset.json -> classes, the class of each file, held out, why no classes
        ("b/1.png b/2/3.png кот/4.png a/5.png", "", "a b кот", [1, 1, 2, 0], None, "^$"),
        ("all/10/a.png all/9/a.png all/x/a.png", "", "9 10 x", [1, 0, 2], None, "^$"),
        (
            "of/Train/cat/1.png of/Train/dog/2.png of/VAL/dog/3.png",
            "",
            "cat dog",
            [0, 1, 1],
            [2],
            "^$",
        ),
        ("train/a/1.png validation/a/2.png test/b/3.png", "", "a b", [0, 0, 1], [1, 2], "^$"),
        ("train/a/1.png train/x.png test/a/3.png", "", "", None, [2], "train/x.png lies beside"),
        ("only/1.png only/2.png", "", "", None, None, "^$"),
        (CHUNKS, '[["0/a.png", 2], ["1\\\\b.png", 0], ["0/c.png", 2]]', "", [2, 0, 2], None, "^$"),
        (CHUNKS, "null", "", None, None, "dataset.json gives 0/a.png no class"),
        (CHUNKS, '[["0/a.png", 3]]', "", None, None, "dataset.json gives 0/c.png no class"),
        (CHUNKS, "7", "", None, None, "dataset.json is of another kind"),
    ],
)
def test_classes_and_what_is_held_out(names, index, classes, labels, held_out, reason, zipped):
    names = names.split()
    found = loaded(path=make(names, index, zipped))
    files_in_order = [names[level // 20] for level in found["array"][:, 0, 0, 0]]
    assert found["files"] == files_in_order
    assert found["names"] == classes.split()
    assert re.search(reason, found["no_labels"])
    if labels is None:
        assert found["labels"] is None
    else:
        assert found["labels"].tolist() == [labels[names.index(name)] for name in found["files"]]
    if held_out is None:
        assert found["held_out"] is None
    else:
        rows = sorted(names.index(found["files"][row]) for row in found["held_out"])
        assert rows == held_out


# -------------------------------------------------------------------------------------------------
# The cache


@pytest.fixture
def counted(monkeypatch):
    """Names of the files that are decoded, in a set of six pictures of two classes."""
    for i in range(6):
        paint(f"s/{'ab'[i % 2]}/{i}.png", noise(i, 8, 8, 3))
    opened = []
    decode = pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda *args: opened.append(1) or decode(*args))
    return opened


def test_a_set_is_converted_once(counted):
    first = loaded()
    second = loaded(path="./s/")
    assert len(counted) == 6
    assert same(first.pop("array"), second.pop("array"))
    assert same(first.pop("labels"), second.pop("labels"))
    assert first == second


def test_a_broken_cache_is_made_again(counted, cache):
    first = loaded()["array"].copy()
    for path in list(cache.iterdir()):
        for _ in damaged(path):
            assert same(loaded()["array"], first)


@pytest.mark.parametrize("change", ["removed", "touched"])
def test_a_changed_set_is_converted_again(change, counted):
    loaded()
    if change == "removed":
        Path("s/b/5.png").unlink()
    else:
        os.utime("s/b/5.png", (2, 2))
    loaded()
    assert len(counted) == (11 if change == "removed" else 12)


def test_a_file_that_is_closed_today_leaves_nothing_half_done(counted, cache, monkeypatch):
    closed = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(pictures, "decode", closed)
    fails("cannot read a/0.png of s .*Permission denied", loaded)
    assert not [*cache.iterdir()]


def test_a_cache_that_cannot_be_written_is_one_line(counted, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "s/a/0.png")
    fails("cannot write .*make room, or set XDG_CACHE_HOME", loaded)


# -------------------------------------------------------------------------------------------------
# Official files, made small


def make_fashion():
    """Files of Fashion-MNIST in its format; images of the training and of the test part."""
    Path("files").mkdir()
    parts = {"train": noise(0, 7, 5, 6), "t10k": noise(1, 3, 5, 6)}
    for part, images in parts.items():
        labels = np.arange(len(images), dtype=np.uint8)
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + content.ndim}I", 0x0800 + content.ndim, *content.shape)
            path = Path("files", f"{part}-{kind}-ubyte.gz")
            path.write_bytes(gzip.compress(header + content.tobytes()))
    return np.concatenate([*parts.values()])


def make_cifar10():
    """CIFAR-10's archive with 2, 3, ... 7 images in its six files; all images."""
    Path("files").mkdir()
    parts = [noise(i, 2 + i, 32, 32, 3) for i in range(6)]
    with tarfile.open("files/cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, images in zip(official.CIFAR10_FILES, parts, strict=True):
            planes = images.transpose(0, 3, 1, 2)
            content = b"".join(bytes([i]) + x.tobytes() for i, x in enumerate(planes))
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return np.concatenate(parts)


SETS = {"fashion": make_fashion, "cifar10": make_cifar10}
LABELS = {
    "fashion": [*range(7), *range(3)],
    "cifar10": [label for n in range(2, 8) for label in range(n)],
}


@pytest.fixture(params=SETS)
def made(request):
    return request.param, SETS[request.param]()


@pytest.fixture
def server(made, monkeypatch):
    """A server of the files on the loopback device; the set's addresses are there."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{served.server_port}/files/"
    hashes = {}
    for url in getattr(official, made[0].upper()):
        name = url.rsplit("/", 1)[1]
        hashes[base + name] = hashlib.sha256(Path("files", name).read_bytes()).hexdigest()
    monkeypatch.setattr(official, made[0].upper(), hashes)
    yield hashes
    served.shutdown()
    served.server_close()


def test_official_files_are_read_from_a_folder(made, cache):
    name, images = made
    found = official.load(name, Path("files"))
    assert same(found["array"].reshape(images.shape), images)
    assert found["labels"].tolist() == LABELS[name]
    assert not cache.exists()


def test_the_official_test_part_is_held_out(made):
    found = official.load(made[0], Path("files"))
    count = {"fashion": 3, "cifar10": 7}[made[0]]
    assert found["held_out"] == slice(-count, None)


def test_official_classes_have_their_names(made):
    found = official.load(made[0], Path("files"))
    assert len(found["names"]) == 10
    assert found["names"][3] == {"fashion": "Dress", "cifar10": "cat"}[made[0]]


def test_official_files_are_downloaded_once(made, server, cache):
    for _ in range(2):
        found = official.load(made[0], None)
        assert same(found["array"].reshape(made[1].shape), made[1])
        for path in Path("files").iterdir():
            path.unlink()
    assert len([*cache.iterdir()]) == len(server)


def test_a_download_with_a_wrong_hash_is_not_kept(made, server, cache, monkeypatch):
    monkeypatch.setattr(official, made[0].upper(), dict.fromkeys(server, "0" * 64))
    fix = "remove it and run again, or fetch http:.* by hand and give its folder as --data-dir"
    fails(f"cannot fetch .*invalid hash.*: {fix}", official.load, made[0], None)
    assert not [*cache.iterdir()]


def test_a_damaged_official_file_is_one_line(made):
    path = sorted(Path("files").iterdir())[0]
    size = path.stat().st_size
    for _ in damaged(path, bits=range(size // 3, size - 60, size // 9)):
        fails(f"cannot fetch or read {path} .*: remove it", official.load, made[0], Path("files"))


def test_a_missing_official_file_is_one_line(made):
    path = sorted(Path("files").iterdir())[0]
    path.unlink()
    fails(f"{path} .*No such file.*by hand", official.load, made[0], Path("files"))


def test_cifar10_is_read_unpacked_too():
    images = make_cifar10()
    with tarfile.open("files/cifar-10-binary.tar.gz") as tar:
        tar.extractall("files", filter="data")
    Path("files/cifar-10-binary.tar.gz").unlink()
    assert same(official.load("cifar10", Path("files"))["array"], images)


def test_imagenet64_is_its_batches_with_labels_from_0():
    array = noise(0, 33, 64, 64, 3)
    labels = np.random.default_rng(1).integers(1, 1001, 33)
    Path("in").mkdir()
    for i, name in enumerate(official.IMAGENET64):
        rows = slice(3 * i, 3 * i + 3)
        planes = array[rows].transpose(0, 3, 1, 2).reshape(3, -1)
        np.savez(f"in/{name}", data=planes, labels=labels[rows].tolist(), mean=planes.mean(0))
    for _ in range(2):  # converted, and out of the cache
        found = official.load("imagenet64", Path("in"))
        assert same(np.asarray(found["array"]), array)
        assert found["labels"].tolist() == (labels - 1).tolist()
        assert found["held_out"] == slice(-3, None)
