"""data.py, extras/official.py and extras/pictures.py. Every file and server is made here."""

import gzip
import hashlib
import io
import math
import os
import re
import struct
import sys
import tarfile
import zipfile
import zlib
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
from extras import official, pictures

PIXELS = {"kind": "image", "scale": 1.0}


def fails(match, function, *args, **kwargs):
    """The call raises a UserError of exactly one line that matches."""
    with pytest.raises(data.UserError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and re.search(match, text), text


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def worst(a, b):
    return float(abs(torch.as_tensor(a).double() - torch.as_tensor(b).double()).max())


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def held_out(n):
    """Which rows of a file are held out, by the documented rule."""
    return np.isin(np.arange(n), np.random.default_rng(0).permutation(n)[: n // 5])


def whole(dataset):
    """All samples in the order of the file."""
    n = len(dataset.train) + len(dataset.test)
    out = torch.empty(n, *dataset.shape, dtype=dataset.train[:1].dtype)
    out[~held_out(n)], out[held_out(n)] = dataset.train[:], dataset.test[:]
    return out


def damaged(path, bits=None):
    """The file cut in several places, empty, foreign, and with a wrong bit in several places or in those given."""
    path, good = Path(path), Path(path).read_bytes()
    n = len(good)
    bad = [good[:i] for i in (0, 1, 5, 40, n // 2, n - 1)] + [b"foreign\n" * 99]
    bits = range(n // 3, n - 60, n // 9) if bits is None else bits
    bad += [good[:i] + bytes([good[i] ^ 4]) + good[i + 1 :] for i in bits]
    for content in bad:
        path.write_bytes(content)
        yield content
    path.write_bytes(good)


def paint(path, pixels, mode=None, **keywords):
    """A picture file, by Pillow; without it the test is skipped."""
    image = pytest.importorskip("PIL.Image").fromarray(np.asarray(pixels)).convert(mode)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **keywords)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "phase-ref"


def test_all_256_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x, label = data.Dataset("made", "image", levels, levels).batch(1)
    assert x.dtype == torch.float32 and label is None and (x.min(), x.max()) == (-1, 1)
    assert same(data.finish(x, PIXELS), levels.reshape(1, 16, 16, 1).numpy())
    odd = torch.tensor([-9.0, 1.001, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1]).reshape(1, 1, 2, 2)  # rounds, clamps
    assert data.finish(odd, PIXELS).ravel().tolist() == [0, 255, 100, 101]


def test_batches_draw_every_sample_with_its_own_label_and_mirror_half():
    torch.manual_seed(0)
    x = 12 * torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1) + torch.arange(12).reshape(1, 3, 2, 2)
    dataset = data.Dataset("ten", "image", x.byte(), x.byte(), torch.arange(10) * 3, flip=True)
    batch, label = dataset.batch(5000)
    truth = x[label // 3] / 127.5 - 1
    plain, mirrored = ((batch - t).abs().flatten(1).amax(1) < 1e-6 for t in (truth, truth.flip(-1)))
    assert (plain ^ mirrored).all()  # whole images, along the width, all channels together
    assert abs(mirrored.sum() - 2500) < 180  # 5 standard deviations
    assert (label.bincount(minlength=28)[::3] - 500).abs().max() < 110


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", ["image", "field", "points"])
def test_facts_are_those_of_what_a_network_meets(kind, flip, monkeypatch):
    rng = np.random.default_rng(0)
    shape, labels = {"image": (60, 6, 5, 3), "field": (60, 5, 4, 7), "points": (60, 3)}[kind], rng.integers(0, 4, 60)
    labels[labels == 2] = 3
    array = noise(0, *shape) if kind == "image" else rng.normal(size=shape) * 5 + 300 + 20 * np.arange(shape[-1])
    np.savez("a.npz", images=array, labels=labels)
    facts, batches = [], []
    for large in (2**30, 10):  # in memory, and row by row
        monkeypatch.setattr(data, "LARGE", large)
        dataset = data.load("a.npz", flip=flip)
        assert dataset.kind == kind and isinstance(dataset.train, data.Rows) == (large == 10)
        facts.append(dataset.summary())
        torch.manual_seed(5)
        batches.append(torch.stack([dataset.batch(9)[0] for _ in range(20)]))
    assert same(*batches) and len(dataset.held_out(slice(3))[0]) == 3
    x, f, raw = dataset.units(dataset.train[:]).double(), facts[0], dataset.train_labels
    mirrored = torch.cat([x, x.flip(-1)]) if flip and kind != "points" else torch.cat([x, x])
    means = [mirrored[torch.cat([raw, raw]) == k].mean(0) for k in (0, 1, 3)]
    assert worst(f["mean"], mirrored.mean(0)) < 1e-6 and abs(f["std"] - mirrored.std(correction=0)) < 1e-6
    assert worst(f["class_means"][[0, 1, 3]], torch.stack(means)) < 1e-6 and f["shape"] == list(dataset.shape)
    assert (f["labels"], f["names"], f["kind"]) == (4, list("0123"), kind) and f["counts"] == raw.bincount().tolist()
    assert abs(f["bound"] - (1.0 if kind == "image" else 1.1 * x.abs().max())) < 1e-6
    inside = array[~held_out(60)]
    assert np.abs(data.finish(x.float(), f) - inside).max() < 1e-3  # in the order of the file, and in its units
    assert kind != "field" or np.allclose(f["window"], np.quantile(inside[..., :3], (0.001, 0.999)), atol=1e-3)
    assert all(same(v, facts[1][k]) if torch.is_tensor(v) else v == facts[1][k] for k, v in f.items())


def twin(name, n, rng):
    """The 2-D sets once more, as their papers and scikit-learn describe them."""
    noise, u = rng.normal(size=(n, 2)), rng.random((4 * n, 2))
    if name == "gmm":
        return rng.integers(-1, 2, (n, 2)) * 0.5 @ np.array([[1, 1], [-1, 1]]) / math.sqrt(2) + 0.04 * noise
    if name == "spiral":
        t = 1.5 * np.pi + 3 * np.pi * u[:n, :1]
        corners = 1.2 * np.array([(0, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)])
        return 0.05 * (t * np.concatenate([np.cos(t), np.sin(t)], 1) + 0.3 * noise) + corners[rng.integers(0, 5, n)]
    if name == "checkerboard":
        board = 4 * u - 2
        return board[np.floor(board).sum(1) % 2 == 0][:n]
    t, upper = np.pi * u[:n, 0], u[n : 2 * n, :1] < 0.5
    moons = np.where(upper, np.stack([np.cos(t), np.sin(t)], 1), np.stack([1 - np.cos(t), 0.5 - np.sin(t)], 1))
    return 1.5 * (moons + 0.05 * noise - (0.5, 0.25))


@pytest.mark.parametrize("name", list(data.POINTS))
def test_points_follow_their_law(name):
    dataset, n = data.load(name), 40_000
    assert dataset.shape == data.shape_of(name) == (2,) and dataset.kind == "points" and not dataset.is_image
    torch.manual_seed(0)
    x, label = dataset.batch(n)
    assert label is None and x.dtype == torch.float32 and same(data.finish(x, dataset.summary()), x.numpy())
    assert len(x.unique(dim=0)) > 0.99 * n and not torch.equal(dataset.train, dataset.test)  # fresh points
    bins = [np.linspace(-2.5, 2.5, 51)] * 2
    truth = np.histogram2d(*twin(name, n, np.random.default_rng(0)).T, bins)[0]
    for part in (x, dataset.train, dataset.test):
        count, share = np.histogram2d(*part.numpy().T, bins)[0], len(part) / n
        full = count + truth > 9
        chi2 = ((count - share * truth) ** 2 / (share * (count + truth)).clip(1e-9))[full].sum()
        assert part.abs().max() < 2.5 and chi2 < full.sum() + 6 * math.sqrt(2 * full.sum()), chi2


def test_digits_are_the_1797_images_and_every_fifth_is_held_out():
    digits, every = data.load("digits"), np.arange(1797) % 5 == 4
    with np.load(data.DIGITS_FILE, allow_pickle=False) as file:
        array, labels = file["images"], file["labels"]
    assert digits.shape == data.shape_of("digits") == (1, 8, 8) and digits.names == list("0123456789")
    for rows, x, y in ((every, digits.test, digits.test_labels), (~every, digits.train, digits.train_labels)):
        assert same(x[:, 0].numpy(), array[rows]) and y.tolist() == labels[rows].tolist()


ARRAYS = [
    *product([(40, 5, 6), (40, 5, 6, 1), (40, 5, 6, 3)], ["u1"], [None, "arr_0", "images", "x", "other"]),
    *product([(40, 5, 6), (40, 5, 6, 1), (40, 5, 6, 2), (40, 5, 6, 7)], ["<f2", ">f4", "<f8", ">u2"], ["arr_0"]),
    *product([(500, 3)], ["<f2", ">f4", "<f8"], [None, "x"]),
]


@pytest.mark.parametrize(("shape", "dtype", "key"), ARRAYS)
def test_arrays_of_every_kind_are_read_and_restored_and_floats_standardised(shape, dtype, key):
    array = (np.random.default_rng(0).normal(size=shape) * np.linspace(1, 4, shape[-1]) + 50).astype(dtype)
    labels, rows = np.arange(len(array), dtype=np.int16)[:, None], ~held_out(len(array))
    path = "f.npz" if key else "f.npy"
    np.savez_compressed(path, labels=labels, **{key: array}) if key else np.save(path, np.asfortranarray(array))
    dataset, flat = data.load(path), array[rows].astype(float).reshape(-1, 1 if len(shape) == 3 else shape[-1])
    facts, x = dataset.summary(), dataset.units(dataset.train[:]).float()
    restored, picture = data.finish(x, facts), data.picture(data.finish(x[:16], facts), facts)
    assert restored.dtype == (np.uint8 if dtype == "u1" else np.float32) and picture.dtype == np.uint8
    assert np.abs(restored.reshape(flat.shape).astype(float) - flat).max() < 1e-4
    assert data.shape_of(path) == dataset.shape == x.shape[1:] and not dataset.flip
    assert (picture.ndim == 3) == (flat.shape[1] > 1) and len(dataset.test) == len(array) // 5
    assert (dataset.train_labels is None) == (key is None) == (not dataset.names)
    assert key is None or same(dataset.train_labels.numpy(), np.flatnonzero(rows))
    if dtype != "u1":
        assert np.abs(dataset.shift.numpy() - flat.mean(0)).max() < 1e-9
        assert abs(dataset.scale - math.sqrt(flat.var(0).mean())) < 1e-9 and abs(facts["std"] - 1) < 1e-6


@pytest.mark.filterwarnings("error")
def test_broken_files_and_wrong_arrays_and_labels_say_what_was_found():
    for name, save, bits in (("a.npy", np.save, ()), ("a.npz", np.savez_compressed, None)):
        save(name, noise(0, 200, 4, 4))
        for _ in damaged(name, bits):
            fails("cannot read.*numpy.save", data.load, name)
    np.savez("b.npz", a=noise(0, 5, 4, 4), y=np.arange(5))
    fails("cannot read .* call the samples images or x", data.load, "b.npz")
    for array, match in (
        (np.zeros((0, 8, 8), np.uint8), "empty"),
        (np.zeros((5, 3, 8, 8), np.uint8), "C 1 or 3"),
        (np.zeros((5, 8, 8), np.int64), "int64.*convert"),
        (np.zeros((24, 25, 3), np.uint8), "one picture or many"),
        (np.eye(5, dtype=np.uint8)[None], "multiply masks by 255"),
        (np.array([[0.0, 1], [np.nan, 2]]), "not finite"),
        (np.full((9, 2), 0.1), "constant"),
        (np.array([{"a": 1}, None]), "cannot read.*(pickle|objects).*numpy.save"),
    ):
        for name, save in (("a.npy", np.save), ("a.npz", np.savez)):
            save(name, array)
            fails(match, data.load, name)
    for labels, match in (
        (np.arange(40)[:, None], r"5 integers.*found int64 \(40, 1\)"),
        (np.arange(5.0), r"found float64 \(5,\)"),
        (np.array(list("abcde")), "found text"),
        (np.arange(5) - 1, "found -1 to 3"),
        (np.arange(5) * 10_000, "found 0 to 40000"),
    ):
        np.savez("a.npz", images=noise(0, 5, 4, 4), labels=labels)
        fails(f"labels must be .*{match}", data.load, "a.npz")


def test_a_few_rows_that_set_the_scale_are_warned_of(recwarn):
    rng, n = np.random.default_rng(0), 20_000
    clean = [rng.normal(size=(n, 2)), *(rng.standard_t(3, size=(n, c)) for c in (1, 2)), data.spiral(n).numpy()]
    for array in (*clean, np.eye(10)[rng.integers(0, 10, n)]):
        np.save("a.npy", array)
        data.load("a.npy")
    assert not [str(w.message) for w in recwarn]
    odd = [(rng.normal(size=(99, 2)) * (1, 1000), "axis 0 spreads over .* one scale")]
    odd += [(rng.normal(size=(20, 4, 8, 8)), r"\(N, C, H, W\)")]
    for rows, value, shape in ((20, 1e4, (n, 2)), (5, -1e3, (n, 1)), (40, 300, (n, 8)), (3, 1e3, (400, 8, 8, 3))):
        odd.append((rng.normal(size=shape), "half of the rows lie within .* a few set the scale"))
        odd[-1][0][:rows] = value
    for array, match in odd:
        np.save("a.npy", array)
        with pytest.warns(UserWarning, match=match):
            data.load("a.npy")


def official_files(folder):
    """Small files of Fashion-MNIST and CIFAR-10 in their formats; {name: images (N, H, W, C), train and test}."""
    Path(folder).mkdir()
    truth = {"fashion": [noise(0, 7, 5, 6, 1), noise(1, 3, 5, 6, 1)]}
    for part, array in zip(("train", "t10k"), truth["fashion"], strict=True):
        for kind, content in (("images-idx3", array[..., 0]), ("labels-idx1", np.arange(len(array), dtype=np.uint8))):
            header = struct.pack(f">{1 + content.ndim}I", 0x0800 + content.ndim, *content.shape)
            Path(folder, f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + content.tobytes()))
    parts = [noise(2 + i, 2 + i, 32, 32, 3) for i in range(6)]
    truth["cifar10"] = [np.concatenate(parts[:5]), parts[5]]
    with tarfile.open(Path(folder, "cifar-10-binary.tar.gz"), "w:gz") as tar:
        for name, array in zip(official.CIFAR10_FILES, parts, strict=True):
            content = b"".join(bytes([i]) + x.transpose(2, 0, 1).tobytes() for i, x in enumerate(array))
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return truth


@pytest.mark.parametrize(("name", "counts", "third"), [("fashion", [7], "Dress"), ("cifar10", range(2, 7), "cat")])
def test_official_files_are_downloaded_checked_and_kept(cache, name, counts, third, monkeypatch):
    def check(dataset):
        for x, images in ((dataset.train, truth[0]), (dataset.test, truth[1])):
            assert same(x.numpy().transpose(0, 2, 3, 1), images)
        assert dataset.train_labels.tolist() == [i for n in counts for i in range(n)] and dataset.names[3] == third
        assert dataset.flip == (name == "cifar10") and len(dataset.names) == 10

    truth, files = official_files("files")[name], [Path(url).name for url in getattr(official, name.upper())]
    check(data.load(name, "files"))
    assert not cache.exists()  # with --data-dir
    paths = [Path("files", file).resolve() for file in files]
    hashes = {path.as_uri(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    monkeypatch.setattr(official, name.upper(), dict.fromkeys(hashes, "0" * 64))
    fails("cannot fetch .*invalid hash.*: remove it and run again, or fetch file:.* by hand", data.load, name)
    assert not [*cache.iterdir()]
    monkeypatch.setattr(official, name.upper(), hashes)
    check(data.load(name))
    assert {path.name for path in cache.iterdir()} == {*files}
    for _ in damaged(f"files/{files[0]}"):
        fails(f"cannot fetch or read files/{files[0]} .*: remove it", data.load, name, "files")
    Path("files", files[0]).unlink()
    check(data.load(name))  # from the cache
    fails(f"{files[0]}.*No such file.*by hand and give its folder as --data-dir", data.load, name, "files")


def test_imagenet64_is_its_batches_with_labels_from_0():
    array, labels = noise(0, 33, 64, 64, 3), np.random.default_rng(1).integers(1, 1001, 33)
    Path("in").mkdir()
    for i, name in enumerate(official.IMAGENET64):
        rows = slice(3 * i, 3 * i + 3)
        planes = array[rows].transpose(0, 3, 1, 2).reshape(3, -1)
        np.savez(f"in/{name}", data=planes, labels=labels[rows].tolist(), mean=planes.mean(0))
    for _ in range(2):  # converted, and found
        found = data.load("imagenet64", "in")
        assert found.flip and found.name == "imagenet64" and len(found.names) == labels.max()
        assert same(torch.cat([found.train, found.test]).numpy(), array.transpose(0, 3, 1, 2)) and len(found.test) == 3
        assert torch.cat([found.train_labels, found.test_labels]).tolist() == (labels - 1).tolist()


def test_strange_pictures(capfd):
    """Each of one colour or two, so that what must come is known without a library."""
    pil, text = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.PngImagePlugin").PngInfo()
    flat, turn = np.ones((20, 30, 1), np.uint8), pil.Exif()
    red, grey = flat * np.uint8([[[255, 0, 0]]]), flat[..., 0]
    blue, halves = red[..., ::-1], np.concatenate([red[:, :20], red[:, :20, ::-1]], 1)
    turn[0x0112] = 6  # to be seen after a quarter turn clockwise: the left side comes on top
    text.add_text("prompt", "x" * 5_000_000, zip=True)
    for name, pixels, mode, keywords in (
        ("01 one pixel.png", red[:1, :1], "RGB", {}),
        ("03 sixteen bits.png", grey * np.uint16(100 * 257 + 100), None, {}),
        ("05 turned.jfif", halves, "RGB", dict(format="JPEG", quality=95, exif=turn)),
        ("06 palette.png", grey * 0, "P", dict(transparency=0)),
        ("07 alpha.png", flat * np.uint8([[[255, 0, 0, 102]]]), "RGBA", {}),
        ("09 wide.ppm", np.concatenate([blue, red, red, blue], 1), "RGB", {}),
        ("10 CAPITALS and a bitmap.PNG", red, "RGB", dict(format="BMP")),
        ("11 картинка\n.webp", red, "RGB", dict(lossless=True)),
        ("12 chunks.png", red, "RGB", dict(pnginfo=text, icc_profile=bytes(3_000_000))),
        ("13 floats.tif", np.float32(grey), "F", {}),
    ):
        paint(f"s/{name}", pixels, mode, **keywords)
    Path("s/14 truncated.png").write_bytes(Path("s/06 palette.png").read_bytes()[:60])
    Path("s/15 postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in (".hidden.png", "a.txt", "b.txt", "README"):
        Path("s", name).touch()
    Path("s/broken.png").symlink_to("nowhere.png")
    Path("s/me").symlink_to("../s")
    found, said = whole(data.load("s", size=8)).int(), capfd.readouterr().err
    colours = {1: (100,) * 3, 3: (255,) * 3, 4: (255, 153, 153)}
    truth = torch.tensor([colours.get(i, (255, 0, 0)) for i in range(9)])[:, :, None, None].repeat(1, 1, 8, 8)
    truth[2, :, 4:] = truth[2, :, 4:].flip(0)
    error = (found - truth).abs().amax(1)
    assert error[2, [0, 1, 2, 5, 6, 7]].max() <= 20 and error[[0, 1, *range(3, 9)]].max() <= 1
    for part in ("4 files not read (2 .txt, 1 without ending, 1 hidden), 1 broken links", "2 transparent",
                 "1 enlarged", "3 broken pictures skipped: 13 floats.tif ("):  # fmt: skip
        assert part in said and said.count("\n") == 1, said
    pil.new("1", (9500, 9500), 1).save("large.png")  # 90 megapixels, where Pillow begins to warn
    assert pictures.decode("large.png")[0].size == (9500, 9500)


@pytest.mark.parametrize(("height", "width", "size"), [(40, 61, 16), (61, 40, 8), (50, 50, 50), (9, 7, 20)])
def test_pictures_are_cut_and_resized_as_stated(height, width, size):
    """The central square, by Pillow's Lanczos filter."""
    image, side = noise(0, height, width), min(height, width)
    paint("grey/0.png", image)
    left, top = (width - side) / 2, (height - side) / 2
    pil = pytest.importorskip("PIL.Image")
    truth = pil.fromarray(image).resize((size, size), pil.LANCZOS, (left, top, left + side, top + side))
    dataset = data.load("grey", size=size)
    assert dataset.shape == (1, size, size) and not dataset.flip and worst(np.array(truth), dataset.train[0, 0]) <= 1


CHUNKS = "0/a.png 1/b.png 0/c.png"  # of EDM and StyleGAN
LAYOUTS = [  # files, dataset.json -> classes, the class of each file, what is held out, and why there are no classes
    ("b/1.png b/2/3.png кот/4.png a/5.png", "", "a b кот", [1, 1, 2, 0], "", "^$"),
    ("all/10/a.png all/9/a.png all/x/a.png all/9/b.png", "", "9 10 x", [1, 0, 2, 0], "", "^$"),
    ("afhq/Train/cat/1.png afhq/Train/dog/2.png afhq/VAL/dog/3.png", "", "cat dog", [0, 1, 1], "VAL", "^$"),
    ("train/a/1.png train/b/1.png validation/a/2.png test/b/3.png", "", "a b", [0, 1, 0, 1], "test valid", "^$"),
    ("train/a/1.png train/b/2.png test/a/3.png train/stray.png", "", "", None, "test", "train/stray.png lies beside"),
    ("only/1.png only/2.png", "", "", None, "", "^$"),
    (CHUNKS, '{"labels": [["0/a.png", 2], ["1\\\\b.png", 0], ["0/c.png", 2]]}', "0 1 2", [2, 0, 2], "", "^$"),
    (CHUNKS, '{"labels": null}', "", None, "", "dataset.json gives 0/a.png no class"),
    (CHUNKS, '{"labels": [["0/a.png", 3]]}', "", None, "", "dataset.json gives 0/c.png no class"),
]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("names", "index", "classes", "labels", "apart", "reason"), LAYOUTS)
def test_what_the_classes_are_and_what_is_held_out(names, index, classes, labels, apart, reason, zipped):
    names = names.split()
    with zipfile.ZipFile("set.ZIP", "w") as file:
        for i, name in enumerate(names):
            paint(f"set/{name}", np.full((9, 9, 3), 20 * i + 20, np.uint8))
            file.write(f"set/{name}", name.replace("/", "\\"))
            file.writestr(f"__MACOSX/._{name}", b"resource")
        if index:
            Path("set/dataset.json").write_text(index)
            file.write("set/dataset.json", "dataset.json")
    dataset = data.load("set.ZIP" if zipped else "set", size=4)
    assert dataset.names == classes.split() and re.search(reason, dataset.no_labels)
    for x, y, is_test in ((dataset.train, dataset.train_labels, False), (dataset.test, dataset.test_labels, True)):
        files = (x[:, 0, 0, 0] // 20 - 1).tolist()
        assert y is None if labels is None else y.tolist() == [labels[i] for i in files]
        expected = [i for i, name in enumerate(names) if any(part in name for part in apart.split()) == is_test]
        assert not apart or sorted(files) == expected


def test_a_set_is_converted_once_and_again_when_it_changes(cache, monkeypatch):
    for i in range(6):
        paint(f"set/{'ab'[i % 2]}/{i}.png", noise(i, 8, 8, 3))
    Path("set/a/broken.png").touch()
    opened, decode = [], pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda *args: opened.append(1) or decode(*args))
    first = whole(data.load("set", size=8))
    assert len(opened) == 7 and same(whole(data.load("./set/", size=8)), first) and len(opened) == 7
    for path in cache.iterdir():
        for _ in damaged(path, bits=()):
            assert same(whole(data.load("set", size=8)), first)
    Path("set/a/0.png").unlink()
    closed = Mock(side_effect=PermissionError(13, "Permission denied"))
    with monkeypatch.context() as patch:  # what is closed today may be open tomorrow; what is half done leaves nothing
        patch.setattr(pictures, "decode", closed)
        fails("cannot read a/2.png of set .*Permission denied", data.load, "set", size=8)
    assert not [*cache.glob("*.tmp")] and same(whole(data.load("set", size=8)), first[1:])
    os.utime("set/b/5.png", (2, 2))
    opened.clear()
    assert same(whole(data.load("set", size=8)), first[1:]) and len(opened) == 6


def test_one_line_for_every_mistake_with_names_and_pictures(monkeypatch):
    for name in ("empty/notes.txt", "broken/a.png", "photos/flags/a.txt"):
        Path(name).parent.mkdir(parents=True)
        Path(name).touch()
    paint("set/a.png", noise(0, 8, 8, 3))
    with zipfile.ZipFile("set.zip", "w") as file:
        file.write("set/a.png")
    for match, *args in (
        ("no data set 'spirals' \\(did you mean spiral\\?\\)", "spirals"),
        ("did you mean cifar10\\?", "CIFAR-10"),
        ("no such file or folder.*did you mean photos/flags\\?", "photos/flag"),
        (".*".join(data.NAMES), "zzzz"),
        ("add --size", "photos"),
        ("--data-dir is for", "digits", "."),
    ):
        fails(match, data.load, *args)
    fails("--size 8 is for a folder", data.shape_of, "digits", 8)
    assert data.shape_of("photos", 8) == (3, 8, 8) and data.shape_of("imagenet64") == (3, 64, 64)
    fails(r"no pictures in empty \(1 files not read \(1 .txt\)\)", data.load, "empty", size=8)
    fails("no pictures in broken .*1 broken pictures skipped: a.png", data.load, "broken", size=8)
    for _ in damaged("set.zip", bits=()):
        fails("cannot read set.zip", data.load, "set.zip", size=8)
    monkeypatch.setenv("XDG_CACHE_HOME", "set/a.png")
    fails("cannot write .*make room, or set XDG_CACHE_HOME", data.load, "set", size=8)
    monkeypatch.setenv("XDG_CACHE_HOME", "other")
    monkeypatch.setitem(sys.modules, "PIL", None)
    fails("pip install pillow", data.load, "set", size=8)


def read_png(content):
    """Frames and delays of a PNG of filter 0 rows, animated or not; checks CRCs, header and order of the chunks."""
    chunks, i = [], 8
    while i < len(content):
        n, kind = struct.unpack(">I4s", content[i : i + 8])
        chunks.append((kind, content[i + 8 : i + 8 + n]))
        assert struct.unpack(">I", content[i + 8 + n : i + 12 + n])[0] == zlib.crc32(kind + chunks[-1][1])
        i += 12 + n
    w, h, depth, colour, *rest = struct.unpack(">2I5B", chunks[0][1])
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and depth == 8 and colour in (0, 2) and rest == [0, 0, 0]
    pixels = [body[4 * (kind == b"fdAT") :] for kind, body in chunks if kind in (b"IDAT", b"fdAT")]
    rows = [np.frombuffer(zlib.decompress(body), np.uint8).reshape(h, -1) for body in pixels]
    assert not any(r[:, 0].any() for r in rows)
    numbers = [struct.unpack(">I", body[:4])[0] for kind, body in chunks if kind in (b"fcTL", b"fdAT")]
    controls = [struct.unpack(">4I2H2B", body[4:]) for kind, body in chunks if kind == b"fcTL"]
    assert numbers == [*range(len(numbers))] and all((*c[:4], *c[6:]) == (w, h, 0, 0, 0, 0) for c in controls)
    animated = [b"acTL", b"fcTL", b"IDAT"] + [b"fcTL", b"fdAT"] * (len(rows) - 1)
    assert [kind for kind, _ in chunks] == [b"IHDR", *(animated if controls else [b"IDAT"]), b"IEND"]
    return [r[:, 1:].reshape((h, w, 3) if colour else (h, w)) for r in rows], [c[4] / c[5] for c in controls]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1)])
def test_png_decodes_back(shape):
    array = noise(0, *shape)
    for image in (array, array.swapaxes(0, 1)):  # not contiguous; replaces
        data.write_png("a.png", image)
        (found,), delays = read_png(Path("a.png").read_bytes())
        assert same(found, image) and not delays
    frames, delays = read_png(data.apng([array, 255 - array, array[::-1]], 40))
    assert all(same(*pair) for pair in zip(frames, (array, 255 - array, array[::-1]), strict=True))
    assert delays == [0.04, 0.04, 2.0]
    fails("cannot write .*another folder", data.write_files, {"b.txt": b"x", "no/b.png": b"x"})
    assert [path.name for path in Path().iterdir()] == ["a.png"]  # all or none


@pytest.mark.parametrize("c", [1, 3])
def test_grids_hold_every_image_enlarged(c):
    array = noise(0, 5, 8, 6, c)
    grid = data.image_grid(array, columns=3, border=2, scale=4).reshape(72, 88, c)
    small = grid[::4, ::4].copy()
    assert same(small.repeat(4, 0).repeat(4, 1), grid)
    for i in range(5):
        cell = small[10 * (i // 3) :, 8 * (i % 3) :][:8, :6]
        assert same(cell, array[i])
        cell[:] = 128
    assert (small == 128).all()  # the borders and the empty sixth place
    field = np.array([-9.0, -2, 0, 1, 2, np.nan]).reshape(1, 1, 6, 1)  # shown between the ends of a window
    assert data.picture(field, {"kind": "field", "window": (-2, 2)})[0, ::10].tolist() == [0, 0, 128, 191, 255, 0]
    for size, scale in ((8, 8), (28, 2), (64, 1), (200, 1)):  # by whole factors
        assert data.picture(np.zeros((64, size, size, c), np.uint8), PIXELS).shape[0] == scale * (8 * size + 7)
