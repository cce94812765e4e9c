"""formats/: files that appear whole, PNGs, pictures, official files. Everything is made here."""

import gzip
import hashlib
import io
import os
import re
import shutil
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from formats import files, official, pictures, png


def fails(match, function, *args, **kwargs):
    """The call raises a UserError of exactly one line that matches."""
    with pytest.raises(files.UserError, match=match) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


def same(a, b):
    return a.dtype == b.dtype and np.array_equal(a, b)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def flat(colour, height=20, width=20):
    return np.full((height, width, 3), colour, np.uint8)


def damaged(path, bits=()):
    """Writes the file cut in several places, empty, foreign, and with one wrong bit at each of
    those places, and yields after each; then restores it."""
    path = Path(path)
    good = path.read_bytes()
    contents = [good[:n] for n in (0, 1, 5, 40, len(good) // 2, len(good) - 1)]
    contents.append(b"foreign\n" * 99)
    for i in bits:
        content = bytearray(good)
        content[i] ^= 4
        contents.append(content)
    for content in contents:
        path.write_bytes(content)
        yield
    path.write_bytes(good)


def pillow():
    return pytest.importorskip("PIL.Image")


def paint(path, pixels, **keywords):
    """A picture file, by Pillow; without it the test is skipped."""
    image = pillow().fromarray(np.asarray(pixels))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **keywords)


def deep(value):
    return np.full((9, 9), value, np.uint16)


def loaded(path="s"):
    return pictures.load(Path(path), 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder to work in, with an empty folder s; the cache is below it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("s").mkdir()
    return tmp_path / "cache" / "phase-ref"


# -------------------------------------------------------------------------------------------------
# Files


def test_if_one_file_cannot_be_written_none_is_and_the_old_ones_stay():
    Path("s/a").write_bytes(b"old")
    full = Mock(side_effect=OSError(28, "No space left"))
    fails("cannot write s/b .*No space.*: make room", files.write_files, {"s/a": b"", "s/b": full})
    assert [path.read_bytes() for path in Path("s").iterdir()] == [b"old"]


def test_a_file_is_replaced_by_renaming(monkeypatch):
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(13, "Permission denied")))
    fails("cannot write a .*Permission denied.*: here", files.write_files, {"a": b""}, "here")
    assert not Path("a").exists()


def test_without_a_home_folder_the_line_names_the_way_out(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", Mock(side_effect=RuntimeError("no home directory")))
    fails("no such folder: ~.*set XDG_CACHE_HOME to a folder", files.cache_dir)


# -------------------------------------------------------------------------------------------------
# PNG


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3)])
def test_pillow_reads_a_png(shape):
    array = noise(0, *shape).swapaxes(0, 1)  # in an order that is not that of the file
    png.write_png("a.png", array)
    assert same(np.asarray(pillow().open("a.png")), array)


def test_pillow_reads_an_animation():
    frames = [noise(i, 4, 6, 3) for i in range(3)]
    Path("a.png").write_bytes(png.apng(frames, 40))
    image = pillow().open("a.png")
    for i, frame in enumerate([frames[2], *frames]):  # the default image comes first
        image.seek(i)
        assert same(np.asarray(image.convert("RGB")), frame)
        assert image.info.get("duration") == [None, 40, 40, 2000][i]
    assert image.n_frames == 4
    assert image.info["loop"] == 0


# -------------------------------------------------------------------------------------------------
# Grids and histograms


def test_a_grid_holds_every_image_enlarged():
    images = noise(0, 5, 8, 6, 3)
    grid = png.image_grid(images, columns=3, scale=4)
    truth = flat(128, 17, 20)  # the lines and the empty sixth place
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        truth[9 * row :, 7 * column :][:8, :6] = image
    assert same(grid, truth.repeat(4, 0).repeat(4, 1))


def test_small_images_grow_by_whole_factors():
    sides = [len(png.image_grid(noise(0, 1, n, n, 1))) for n in (8, 28, 64, 200)]
    assert sides == [64, 56, 64, 200]


def test_a_grid_that_is_too_large_is_cut_with_a_warning():
    images = np.zeros((24_000, 8, 8, 1), np.uint8)
    with pytest.warns(UserWarning, match="138 of 160 rows, 138 of 150 columns"):
        grid = png.image_grid(images, columns=150)
    assert grid.shape == (9928, 9928)


def test_a_name_stands_beside_its_row_and_is_cut():
    images = np.full((3, 1, 16, 3), 128, np.uint8)
    grid = png.image_grid(images, columns=1, names=["", 100 * "cat"])
    ink = (grid == 0).any((1, 2))
    assert np.flatnonzero(ink).tolist() == list(range(23, 37))  # of the second row, 20 to 40
    assert grid.shape[1] < 400


def test_every_printable_character_has_its_own_glyph_others_are_question_marks():
    glyphs = {png.letters(chr(i)).tobytes() for i in range(32, 127)}
    assert len(glyphs) == 95
    assert same(png.letters("\nкé"), png.letters(" ??"))


def test_a_histogram_puts_the_second_axis_upwards():
    point = np.array([[0.9, 0.1]])
    picture = png.histogram(point, limit=[(0, 1), (0, 1)])
    ink = np.argwhere(picture[..., 0] < 255)
    assert ink.mean(0).tolist() == [430.5, 432.5]


def test_of_numbers_the_bars_are_as_high_as_their_counts():
    numbers = np.repeat([0.25, 0.75], [100, 50])[:, None]
    picture = png.histogram(numbers, limit=[(0, 1)])
    heights = (picture[..., 0] < 255).sum(0)
    assert set(heights) == {0, 228, 456}  # of 480
    assert (heights > 0).sum() == 72  # two of thirteen bars


def test_points_that_are_not_finite_are_left_out():
    points = np.eye(2)
    with_others = np.vstack([points, [[np.nan, 0]], [[0, np.inf]]])
    assert same(png.histogram(with_others), png.histogram(points))


def test_where_no_points_are_it_is_white():
    assert (png.histogram(np.ones((9, 2)), limit=[(2, 3), (2, 3)]) == 255).all()


def test_the_window_has_a_margin_and_leaves_out_one_in_a_thousand():
    points = np.linspace(0, 1000, 1001)[:, None]
    assert np.allclose(png.extent(points), [(500 - 0.58 * 998, 500 + 0.58 * 998)])


# -------------------------------------------------------------------------------------------------
# One picture


def test_what_is_transparent_becomes_white():
    paint("a.png", np.uint8([[[255, 0, 0, 0], [255, 0, 0, 102], [7, 8, 9, 255]]]))
    found = pictures.read("a.png").astype(int)
    assert abs(found - [[[255, 255, 255], [255, 153, 153], [7, 8, 9]]]).max() <= 1


def test_a_turned_picture_is_put_upright():
    turn = pillow().Exif()
    turn[0x0112] = 6  # to be seen after a quarter turn clockwise: the left side comes on top
    halves = [flat(0), flat(255)]
    paint("a.png", np.hstack(halves), exif=turn)
    assert same(pictures.read("a.png"), np.vstack(halves))


def test_the_central_square_is_resized_by_lanczos():
    wide = noise(0, 40, 60)
    paint("s/a.png", wide)
    paint("s/b.png", wide.T)
    image = pillow().open("s/a.png")
    truth = image.resize((8, 8), pillow().LANCZOS, box=(10, 0, 50, 40))
    a, b = loaded()["array"][..., 0].astype(int)
    assert abs(a - truth).max() <= 1
    assert abs(b.T - truth).max() <= 1


def test_one_picture_is_read_as_it_is():
    image = noise(0, 5, 7, 3)
    paint("a.PNG", image, icc_profile=bytes(3_000_000))  # as long as some are
    np.save("a.npy", image)
    assert same(pictures.read("a.PNG"), image)
    assert same(pictures.read("a.npy"), image)


@pytest.mark.parametrize("array", [np.eye(3), noise(0, 5), noise(0, 5, 7, 2), noise(0, 5, 0)])
def test_an_npy_of_another_kind_is_refused(array):
    np.save("a.npy", array)
    fails("cannot read a.npy .it is .*, not uint8 .*: give a picture", pictures.read, "a.npy")


def test_one_dark_picture_of_sixteen_bits_is_refused():
    paint("a.png", deep(4095))
    fails("cannot read a.png .its 16-bit values are all small", pictures.read, "a.png")


def test_an_error_in_edited_code_keeps_its_traceback(monkeypatch):
    paint("s/a.png", flat(9))
    monkeypatch.setattr(pictures, "opened", Mock(side_effect=UnboundLocalError))
    with pytest.raises(UnboundLocalError):
        pictures.read("s/a.png")
    with pytest.raises(UnboundLocalError):
        loaded()


HALF = np.arange(16).reshape(4, 4) % 4 < 2
WHITE = np.uint8(255) * HALF


@pytest.mark.parametrize("mask", [HALF, HALF * 1.0, WHITE, WHITE[..., None]])
def test_a_mask_of_numbers_is_black_and_white(mask):
    np.save("a.npy", mask)
    assert same(pictures.read_mask("a.npy"), WHITE)


@pytest.mark.parametrize(
    "bands", [(WHITE, WHITE, WHITE), (HALF, HALF, HALF, WHITE), (WHITE, WHITE, WHITE, WHITE | 255)]
)
def test_a_mask_is_the_alpha_of_a_picture_or_its_grey(bands):
    paint("a.png", np.dstack(bands))
    assert same(pictures.read_mask("a.png"), WHITE)


# -------------------------------------------------------------------------------------------------
# A folder of pictures


def test_pictures_of_every_format_are_read():
    for ending in "PNG jpg jfif webp gif bmp tif ppm".split():
        keywords = {"format": "JPEG"} if ending == "jfif" else {}
        paint(f"s/картинка\n.{ending}", flat((250, 10, 10)), **keywords)
    array = loaded()["array"].astype(int)
    assert len(array) == 8
    assert abs(array - (250, 10, 10)).max() <= 12  # of JPEG and WebP; 1 or 2 levels on this colour


def test_broken_pictures_are_skipped_and_told(capsys):
    paint("s/a.png", flat(9))
    paint("s/float.tif", np.ones((9, 9), np.float32))
    paint("s/deep.tif", np.full((9, 9), 70_000, np.int32))
    pillow().new("1", (14_000, 14_000)).save("s/bomb.png")
    Path("s/cut.png").write_bytes(Path("s/a.png").read_bytes()[:60])
    Path("s/script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert loaded()["files"] == ["a.png"]
    assert "5 broken pictures skipped: bomb.png (Image size" in capsys.readouterr().err
    fails("cannot identify", pictures.read, "s/script.png")


def test_what_was_found_changed_and_left_out_is_counted(capsys):
    for i in range(26):
        paint(f"s/{i}/a.png", flat(i))
    paint("s/0/wide.png", flat(9, 20, 30))
    paint("s/1/small.png", flat((1, 2, 3), 1, 1))
    paint("s/1/clear.png", flat(0)[..., 0], transparency=0)
    frames = [pillow().fromarray(noise(i, 16, 16, 3)) for i in range(40)]
    for ending in ("gif", "webp", "png", "tif"):
        frames[0].save(f"s/2/b.{ending}", save_all=True, append_images=frames[1:])
    png.write_png("s/3/drawn.png", noise(0, 9, 9))
    for name in ("ckpt.pt", "samples.npz", "log.txt"):
        paint(f"s/runs/{name}/0/a.png", flat(8))
        Path(f"s/runs/{name}", name).touch()
    for name in ("ckpt.pt", ".hidden.png", "3/a.txt", "3/README"):
        Path("s", name).touch()
    Path("s/4/log.txt").write_text("fetched a.png\n")
    Path("s/5/broken.png").symlink_to("nowhere.png")
    loaded()
    said = capsys.readouterr().err.replace("\n", ",")
    for part in (
        "s: 33 pictures of 8 x 8 pixels,",
        " 26 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,",
        " 1 cropped to the central square,",
        " 1 enlarged,",
        " 1 transparent,",
        " 5 in colour,",
        " 156 further frames not read,",
        " 1 pictures that this program drew left out,",
        " 6 files in run folders of this program left out,",
        " 1 hidden files not read,",
        " 2 .txt files not read,",
        " 1 files not read,",
        " 1 broken links,",
    ):
        assert part in said


def test_a_link_doubles_nothing():
    paint("s/b/1.png", flat(9))
    paint("elsewhere/2.png", flat(9))
    Path("s/a").symlink_to("b")
    Path("s/around").symlink_to("../s")
    Path("s/c").symlink_to("../elsewhere")
    Path("elsewhere/loop").symlink_to("../elsewhere")
    assert loaded()["files"] == ["b/1.png", "c/2.png"]


FEW_BITS = "s has pictures of 16 bits .* is 3855, where 65535 .* give .* one .npy of uint16"


def test_few_bits_in_sixteen_are_refused_with_the_way_out():
    paint("s/a.tif", deep(3855))
    for _ in range(2):  # read, and out of the cache
        fails(FEW_BITS, loaded)


def test_few_bits_in_sixteen_are_refused_in_colour_too():
    pillow()
    header = struct.pack(">2I5B", 9, 9, 16, 2, 0, 0, 0)
    pixels = png.compressed(np.full((9, 9, 3), 3855, ">u2"))
    content = png.SIGNATURE + png.chunk(b"IHDR", header) + png.chunk(b"IDAT", pixels)
    Path("s/a.png").write_bytes(content + png.chunk(b"IEND", b""))
    fails(FEW_BITS, loaded)


def test_the_largest_value_of_the_whole_set_decides():
    paint("s/bright.png", deep(65535))
    paint("s/dark.png", deep(4095))
    array = loaded()["array"]
    assert array.shape == (2, 8, 8, 1)
    assert array[:, 0, 0, 0].tolist() == [255, 16]


@pytest.mark.parametrize(
    ("name", "said"),
    [(".", "it is empty"), ("a.txt", "1 .txt files not read"), ("a.png", "1 broken .*: a.png .*")],
)
def test_a_folder_without_pictures_is_one_line(name, said):
    pillow()
    Path("s", name).touch()
    fails(rf"no pictures in s \({said}\): give a folder or zip with .png", loaded)


def test_without_pillow_the_line_says_what_to_install(monkeypatch):
    Path("s/a.png").touch()
    monkeypatch.setitem(sys.modules, "PIL", None)
    fails("pip install pillow to read pictures, or give an .npy", loaded)


def test_a_damaged_zip_is_one_line():
    with zipfile.ZipFile("s.zip", "w") as file:
        file.writestr("a.png", png.png(noise(0, 9, 9)))
    for _ in damaged("s.zip"):
        fails("cannot read s.zip .*: give a folder or zip", loaded, "s.zip")


# -------------------------------------------------------------------------------------------------
# Classes


def zipped(folder):
    """The folder as a zip of Windows and macOS."""
    with zipfile.ZipFile("s.ZIP", "w") as file:
        for path in Path(folder).rglob("*"):
            name = str(path.relative_to(folder)).replace("/", "\\")
            if path.is_dir():
                file.writestr(f"{name}\\", b"")
            else:
                file.write(path, name)
                file.writestr(f"__MACOSX\\._{name}", b"resource")
    return "s.ZIP"


@pytest.mark.parametrize("form", [str, zipped])
@pytest.mark.parametrize(
    "pictures",  # and their classes, * held out
    [
        "b/1.png=b b/2/3.png=b кот/4.png=кот a/5.png=a",
        "of/Train/cat/1.png=cat of/Train/dog/2.png=dog of/VAL/dog/3.png=dog*",
        "train/a/1.png=a validation/a/2.png=a* test/b/3.png=b*",
        "train/a/1.png= train/x.png= test/a/3.png=*",
        "train/train/1.png=train train/val/2.png=val test/train/3.png=train*",
        "val/1.png=val a/2.png=a",
        "only/1.png= only/2.png=",
    ],
)
def test_folders_are_classes_and_parts(pictures, form):
    wanted = dict(picture.split("=") for picture in pictures.split())
    for i, name in enumerate(wanted):
        paint(f"s/{name}", flat(20 * i))
    found = loaded(form("s"))
    classes = {}
    for i, level in enumerate(found["array"][:, 0, 0, 0]):
        name = list(wanted)[level // 20]
        assert found["files"][i] == name
        classes[name] = found["names"][found["labels"][i]] if "labels" in found else ""
        if i in found.get("held_out", []):
            classes[name] += "*"
    assert classes == wanted


def test_a_picture_beside_the_class_folders_is_named():
    paint("s/a/1.png", flat(1))
    paint("s/x.png", flat(2))
    assert loaded()["no_labels"] == "x.png lies beside the class folders"


@pytest.mark.parametrize("form", [str, zipped])
def test_classes_of_a_list(form):
    for name in "abc":
        paint(f"s/0/{name}.png", flat(9))
    Path("s/dataset.json").write_text(
        '{"labels": [["0/c.png", 0], ["0/a.png", 3], ["0\\\\b.png", 2]]}'
    )
    assert loaded(form("s"))["labels"].tolist() == [3, 2, 0]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ("7", ""),
        ("null", "a.png has None"),
        ('[["b.png", 0]]', "a.png has None"),
        ('[["a.png", -1]]', "a.png has -1"),
        ('[["a.png", 1.0]]', "a.png has 1.0"),
        ('[["a.png", true]]', "a.png has True"),
        ('[["a.png", [0.5, 0.5]]]', r"a.png has \[0.5"),
    ],
)
def test_a_list_without_classes_says_why(labels, reason):
    paint("s/a.png", flat(9))
    Path("s/dataset.json").write_text(f'{{"labels": {labels}}}')
    found = loaded()
    start = "dataset.json gives no class from 0 to 9999"
    assert re.match(f"{start}.*{reason}", found["no_labels"])
    assert "labels" not in found


# -------------------------------------------------------------------------------------------------
# The cache


@pytest.fixture
def counted(monkeypatch):
    """Counts the pictures that are decoded, of a set of six in two classes."""
    for i in range(6):
        paint(f"s/{'ab'[i % 2]}/{i}.png", noise(i, 8, 8, 3))
    decode = Mock(side_effect=pictures.decode)
    monkeypatch.setattr(pictures, "decode", decode)
    return decode


def test_a_set_is_converted_once_until_it_changes(counted):
    np.testing.assert_equal(loaded(), loaded("./s/"))
    assert counted.call_count == 6
    os.utime("s/b/5.png", (2, 2))
    loaded()
    assert counted.call_count == 12
    os.unlink("s/b/5.png")
    loaded()
    assert counted.call_count == 17


def test_a_broken_cache_is_made_again(counted, cache):
    first = loaded()["array"].copy()
    for path in list(cache.iterdir()):
        for _ in damaged(path):
            assert same(loaded()["array"], first)


def test_a_file_that_is_closed_today_leaves_nothing_half_done(counted, cache):
    counted.side_effect = PermissionError(13, "Permission denied")
    fails("cannot read a/0.png of s .*Permission denied.*: mend or remove it", loaded)
    assert not [*cache.iterdir()]


def test_a_cache_that_cannot_be_written_is_one_line(counted, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "s/a/0.png")
    fails("cannot write .*: make room, or set XDG_CACHE_HOME", loaded)


# -------------------------------------------------------------------------------------------------
# Official files, made small


FILES = Path("files")


@pytest.fixture
def fashion(monkeypatch):
    """All images of Fashion-MNIST, made small; its files lie where they would be downloaded."""
    images = noise(0, 10, 5, 6)
    labels = np.arange(10, dtype=np.uint8)
    arrays = [images[:7], labels[:7], images[7:], labels[7:]]
    FILES.mkdir()
    for name, array in zip(official.FASHION, arrays, strict=True):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        content = gzip.compress(header + array.tobytes())
        Path(FILES, name).write_bytes(content)
    monkeypatch.setattr(official, "FASHION_URL", FILES.absolute().as_uri() + "/")
    return images


def test_fashion_is_read_from_a_folder(fashion, cache):
    found = official.load("fashion", FILES)
    assert same(found["array"], fashion)
    assert found["labels"].tolist() == list(range(10))
    assert found["held_out"] == slice(-3, None)
    assert found["names"][3] == "Dress"
    assert not cache.exists()


def test_official_files_are_downloaded_once(fashion, monkeypatch):
    for path in FILES.iterdir():
        sha256 = hashlib.sha256(path.read_bytes())
        monkeypatch.setitem(official.SHA256, path.name, sha256.hexdigest())
    assert same(official.load("fashion", None)["array"], fashion)
    shutil.rmtree(FILES)
    assert same(official.load("fashion", None)["array"], fashion)


def test_a_download_with_a_wrong_hash_is_not_kept(fashion, cache):
    fix = "remove it and run again, or fetch file:.* and give --data-dir FOLDER"
    fails(f"cannot read .*invalid hash.*: {fix}", official.load, "fashion", None)
    assert not [*cache.iterdir()]


def test_a_damaged_official_file_is_one_line(fashion):
    path = FILES / "t10k-images-idx3-ubyte.gz"
    for _ in damaged(path, bits=[60, 90]):
        fails(f"cannot read {path} .*: remove it", official.load, "fashion", FILES)


def make_cifar10():
    """CIFAR-10's archive, with one image in each file but the last, which has 7; all images."""
    FILES.mkdir()
    images = noise(0, 12, 32, 32, 3)
    planes = images.transpose(0, 3, 1, 2).reshape(12, -1)
    records = np.insert(planes, 0, np.arange(12) % 10, axis=1)
    with tarfile.open(FILES / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for i, part in enumerate(official.CIFAR10_PARTS):
            content = records[i : i + 1 if i < 5 else 12].tobytes()
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{part}.bin")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return images


def test_cifar10_is_read_as_an_archive_and_unpacked_too():
    images = make_cifar10()
    archive = FILES / "cifar-10-binary.tar.gz"
    found = official.load("cifar10", archive)
    assert same(found["array"], images)
    assert found["labels"].tolist() == [*range(10), 0, 1]
    assert found["names"][3] == "cat"
    shutil.unpack_archive(archive, "s")
    np.testing.assert_equal(official.load("cifar10", Path("s")), found)


def test_imagenet64_is_its_batches_with_labels_from_0():
    images = noise(0, 11, 64, 64, 3)
    planes = images.transpose(0, 3, 1, 2).reshape(11, -1)
    for i, name in enumerate(official.IMAGENET64):
        np.savez(f"s/{name}", data=planes[[i]], labels=[i + 1])
    found = official.load("imagenet64", Path("s"))
    assert same(np.asarray(found["array"]), images)
    assert found["labels"].tolist() == list(range(11))
    assert found["held_out"] == slice(-1, None)


def test_a_missing_batch_of_imagenet64_is_one_line():
    fails(
        "cannot read s/train_.* get it from image-net.org", official.load, "imagenet64", Path("s")
    )
