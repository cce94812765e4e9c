"""data.py: batches, facts, named sets, arrays of every kind, and what is said of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_formats import damaged, fails, make_cifar10, noise, paint

import data
from formats import png

FIVE = noise(0, 5, 8, 8, 1)  # images
PIXELS = {"kind": "image", "names": ["cat", "dog", "owl"]}


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


def held_out(n):
    """Which rows of a file are held out, by the documented rule."""
    fifth = np.random.default_rng(0).permutation(n)[: n // 5]
    return np.isin(np.arange(n), fifth)


def worst(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).max()


def load(array=None, flip=None, **arrays):
    """The data set of a file that holds one array, or several."""
    if array is None:
        np.savez("a.npz", **arrays)
        return data.load("a.npz", flip=flip)
    np.save("a.npy", array)
    return data.load("a.npy", flip=flip)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


# -------------------------------------------------------------------------------------------------
# Batches and facts


def test_pixels_are_rounded_and_clamped():
    levels = torch.tensor([[-300, 255.4, 100.4, 100.6]])
    pixels = data.finish(levels / 127.5 - 1, PIXELS)
    assert pixels.tolist() == [[0, 255, 100, 101]]


def test_samples_are_drawn_evenly_and_half_of_them_mirrored_along_the_width():
    torch.manual_seed(0)
    images = torch.arange(120, dtype=torch.uint8).reshape(10, 3, 2, 2)
    dataset = data.Dataset("ten", "image", images, images, torch.arange(10), flip=True)
    x, label = dataset.batch(5000)
    truth = dataset.units(images[label])
    plain = (x == truth).flatten(1).all(1)
    mirrored = (x == truth.flip(-1)).flatten(1).all(1)
    assert (plain ^ mirrored).all()
    assert abs(mirrored.sum() - 2500) < 180  # 5 standard deviations
    assert (label.bincount() - 500).abs().max() < 110  # 5 standard deviations


def test_of_digits_each_fifth_is_held_out_and_a_seed_draws_what_it_always_drew():
    torch.manual_seed(3)
    digits = data.load("digits")
    _, label = digits.batch(6)
    assert digits.test_labels[:3].tolist() == [4, 9, 4]
    assert label.tolist() == [3, 6, 3, 9, 8, 2]


ARRAYS = {
    "image": noise(0, 60, 6, 5, 3),
    "field": normal(60, 220, 220, 1) * np.linspace(2, 1, 60).reshape(60, 1, 1, 1),  # two parts
    "points": normal(60, 3) * (1, 2, 3),
}
LABELS = np.arange(60) % 5 % 4  # a class is larger than the others


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("flip", [False, True])
def test_facts_are_those_of_what_a_network_meets(kind, flip):
    dataset = load(x=ARRAYS[kind], labels=LABELS, flip=flip)
    facts = dataset.summary()
    x = dataset.units(dataset.train).double()
    labels = dataset.train_labels
    assert facts["counts"] == labels.bincount().tolist()
    if flip and kind != "points":
        x = torch.cat([x, x.flip(-1)])
        labels = labels.repeat(2)
    bound = 1 if kind == "image" else 1.1 * x.abs().max()
    assert worst(facts["bound"], bound) < 1e-6
    assert worst(facts["mean"], x.mean(0)) < 1e-6
    assert worst(facts["std"], x.std(correction=0)) < 1e-6
    for k in range(4):
        assert worst(facts["class_means"][k], x[labels == k].mean(0)) < 1e-6


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_large_array_stays_on_the_disk_and_gives_the_same(kind, monkeypatch):
    found = []
    for large in (2**30, 10):
        monkeypatch.setattr(data, "LARGE", large)
        dataset = load(x=ARRAYS[kind], labels=LABELS, flip=True)
        torch.manual_seed(5)
        x, _ = dataset.batch(50)
        one, _ = dataset.batch(1)
        found.append(torch.cat([x, one, dataset.summary()["class_means"]]))
    assert isinstance(dataset.train, data.Rows)
    assert torch.equal(*found)


# -------------------------------------------------------------------------------------------------
# Named sets


def twin(name, n):
    """The 2-D sets once more, as complex numbers, as their papers and scikit-learn have them."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=n) + 1j * rng.normal(size=n)
    if name == "gmm":
        grid = rng.integers(-1, 2, n) + 1j * rng.integers(-1, 2, n)
        return 0.5 * grid * np.exp(0.25j * np.pi) + 0.04 * noise
    if name == "spiral":
        t = 1.5 * np.pi + 3 * np.pi * rng.random(n)
        centres = rng.choice([0, 1 + 1j, 1 - 1j, -1 + 1j, -1 - 1j], n)
        return 0.05 * (t * np.exp(1j * t) + 0.3 * noise) + 1.2 * centres
    if name == "checkerboard":
        x, y = 4 * rng.random((2, 4 * n)) - 2
        is_dark = (np.floor(x) + np.floor(y)) % 2 == 0
        return (x + 1j * y)[is_dark][:n]
    arc = np.exp(1j * np.pi * rng.random(n))
    moons = np.where(rng.random(n) < 0.5, arc, 1 + 0.5j - arc)
    return 1.5 * (moons + 0.05 * noise - 0.5 - 0.25j)


def squares(z):
    """How many of the complex numbers lie in each of 50 x 50 squares."""
    count, _, _ = np.histogram2d(z.real, z.imag, 50, [(-2.5, 2.5), (-2.5, 2.5)])
    return count


@pytest.mark.parametrize("name", data.POINTS)
def test_points_follow_their_law_drawn_afresh_but_for_those_that_are_held_out(name):
    torch.manual_seed(0)
    dataset = data.load(name)
    x, _ = dataset.batch(40_000)
    count = squares(torch.view_as_complex(x).numpy())
    truth = squares(twin(name, 40_000))
    total = count + truth
    full = total > 9
    chi2 = ((count - truth) ** 2)[full] / total[full]
    assert chi2.sum() < full.sum() + 6 * np.sqrt(2 * full.sum())
    assert len(x.unique(dim=0)) > 39_900
    assert torch.equal(dataset.test, data.load(name).test)


def test_official_files_become_a_data_set():
    images = make_cifar10()
    dataset = data.load("cifar10", "files")
    assert dataset.flip
    assert worst(dataset.test.movedim(1, -1), images[-7:]) == 0


def test_a_folder_becomes_a_data_set():
    for name in ("train/a/1", "train/b/2", "test/b/3"):
        paint(f"s/{name}.png", noise(0, 9, 9))
    dataset = data.load("s", size=4)
    assert dataset.names == ["a", "b"]
    assert dataset.train_labels.tolist() == [0, 1]
    assert dataset.held_out_name(0) == "test/b/3.png"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("spirals", r"no data set 'spirals' \(did you mean spiral\?\)"),
        ("CIFAR-10", "did you mean cifar10"),
        ("photos/flag", "no such file or folder.*did you mean photos/flags"),
        ("photos/flags/a.txt", "a.txt is no data"),
        ("photos", "add --size"),
    ],
)
def test_a_wrong_name_is_one_line(name, match):
    Path("photos/flags").mkdir(parents=True)
    Path("photos/flags/a.txt").touch()
    fails(match, data.load, name)


def test_an_option_of_other_data_is_refused():
    fails("--data-dir is for fashion", data.load, "digits", ".")
    fails("--size 8 is for a folder", data.shape_of, "digits", 8)


def test_the_shape_of_pictures_is_known_unread():
    Path("photos").mkdir()
    assert data.shape_of("photos", 8) == (3, 8, 8)


# -------------------------------------------------------------------------------------------------
# Arrays


@pytest.mark.parametrize(
    ("shape", "dtype", "level", "restored_as"),
    [
        ((40, 5, 6), "u1", 100, "u1"),
        ((40, 5, 6, 3), "u1", 100, "u1"),
        ((40, 6, 6), ">u2", 100, "f4"),
        ((40, 9, 1, 2), ">f4", 100, "f4"),
        ((500, 3), "<f8", 100, "f4"),
        ((500, 3), "<f8", 1e9, "f8"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_arrays_are_read_and_restored(shape, dtype, level, restored_as):
    array = (10 * normal(*shape) + level).astype(dtype)
    dataset = load(np.asfortranarray(array))
    x, _ = dataset.held_out(slice(None))
    restored = data.finish(x, dataset.summary())
    truth = array[held_out(len(array))]
    assert restored.dtype == restored_as
    assert worst(restored.reshape(truth.shape), truth) < 1e-4
    assert dataset.shape == data.shape_of("a.npy")


def test_floats_are_centred_by_channel_and_divided_by_one_scale():
    array = normal(40, 5, 6, 2) * (1, 4) + 50
    dataset = load(array)
    rows = array[~held_out(40)].reshape(-1, 2)
    assert worst(dataset.shift, rows.mean(0)) < 1e-9
    assert worst(dataset.scale, np.sqrt(rows.var(0).mean())) < 1e-9


@pytest.mark.parametrize("key", ["arr_0", "images", "x", "other"])
def test_the_array_of_an_npz_its_labels_and_names_are_found(key):
    names = list("äbcdefghi")
    coded = [name.encode() for name in names]
    dataset = load(**{key: noise(0, 9, 5, 6)}, labels=np.arange(9)[:, None], names=coded)
    _, label = dataset.held_out(slice(9))
    assert label.tolist() == np.flatnonzero(held_out(9)).tolist()
    assert dataset.names == names


@pytest.mark.parametrize(("save", "name"), [(np.save, "a.npy"), (np.savez_compressed, "a.npz")])
def test_a_damaged_file_is_one_line(save, name):
    save(name, noise(0, 200, 4, 4))
    for _ in damaged(name):
        fails("cannot read.*numpy.save", data.load, name)


@pytest.mark.parametrize(
    ("dtype", "shape", "match"),
    [
        ("u1", (0, 8, 8), "is empty"),
        ("u1", (5, 3, 8, 8), "C 1 or 3"),
        ("i8", (5, 8, 8), "int64.*convert"),
        ("u1", (24, 25, 3), "one picture or many"),
        ("u1", (24, 25, 4), "one picture or many"),
        ("u2", (24, 25), "points to float32"),
        ("f8", (200, 128, 1), r"series \(N, L, 1, C\)"),
        ("f8", (5, 4, 4, 4, 1), "of a volume the slices can be channels"),
        ("f8", (9, 2), "is constant"),
    ],
)
def test_an_array_of_another_shape_is_refused(dtype, shape, match):
    fails(match, load, np.zeros(shape, dtype))


OBJECTS = np.array([np.zeros(2), None], dtype=object)
HOLES = np.where(held_out(40), np.nan, normal(40))  # in what is held out
CONTENTS = {
    "masks": ({"x": FIVE % 2}, "multiply masks by 255"),
    "NaN": ({"x": HOLES[:, None]}, "not finite.*fill them, say with the mean"),
    "objects": ({"array": OBJECTS}, "no Python objects, as images of different sizes"),
    "objects in an npz": ({"x": OBJECTS}, "no Python objects, as images of different sizes"),
    "two arrays": ({"a": FIVE, "b": FIVE}, "call the samples images or x"),
    "images and x": ({"x": FIVE, "images": FIVE}, "images and x: keep one of them"),
    "infinities": ({"x": np.array([[1], [np.inf], [-np.inf]])}, "not finite.*say with the mean"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_other_contents_of_a_file_are_refused(name):
    arrays, match = CONTENTS[name]
    fails(match, load, **arrays)


def test_labels_may_reach_the_limit_of_their_type():
    dataset = load(x=FIVE, labels=np.array([0, 1, 2, 3, 255], np.uint8))
    assert len(dataset.names) == 256


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (range(6), r"must be 5 integers.*found int64 \(6,\)"),
        (list("abcde"), "must be .*found text"),
        (range(-1, 4), "must be from 0 .*found -1 to 3"),
        ([0, 1, 2, 3, 10_000], "must be from 0 .*found 0 to 10000"),
        ([0, 1, 2, 3, 3], "up to 3, but 3 names"),
    ],
)
def test_wrong_labels_are_refused(labels, match):
    fails(match, load, x=FIVE, labels=labels, names=PIXELS["names"])


# -------------------------------------------------------------------------------------------------
# What is odd


def replaced(shape, where, value):
    array = normal(*shape)
    array[where] = value
    return array


ORDINARY = {
    "heavy tails": np.random.default_rng(0).standard_t(3, size=(20_000, 2)),
    "one of ten": np.eye(10)[np.arange(5000) % 10],
    "half of it 0, but near": np.maximum(normal(300, 8, 8, 1), 0),
    "a third far, which is not few": replaced((999, 2), slice(333), 30 + normal(333, 2)),
}


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.filterwarnings("error")
def test_ordinary_floats_are_not_warned_of(name):
    load(ORDINARY[name])


LAND = slice(None), slice(40)
FEW = "half of the rows lie within .* a few set the scale"


@pytest.mark.parametrize(
    ("shape", "where", "value", "match"),
    [
        ((20_000, 2), slice(20), 1e4 + normal(20, 2), FEW),
        ((400, 8, 8, 3), slice(3), 1e3 + normal(3, 8, 8, 3), FEW),
        ((50, 100, 1, 1), LAND, -9999, "40 % of the values are -9999, far"),
        ((50, 100, 1, 1), LAND, 1e20, r"40 % .* 1e\+20.*say with the mean"),
        ((99, 2), (..., 1), 999 * normal(99), "channel 0 .*, 1 over .*one scale"),
    ],
)
def test_odd_values_are_warned_of(shape, where, value, match):
    with pytest.warns(UserWarning, match=match):
        load(replaced(shape, where, value))


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((60, 5, 24, 36), r"height 5 and width 24 with 36 channels.*\(N, C, H, W\)"),
        ((60, 1, 20, 32), "transpose it"),
        ((60, 4, 16, 12), "transpose it"),
        ((20, 16, 16, 16), r"of a volume \(N, D, H, W\) slices become channels"),
        ((60, 128, 2), r"give \(N, L, 1, C\) if they are series"),
    ],
)
def test_axes_that_may_be_others_are_warned_of(shape, match):
    with pytest.warns(UserWarning, match=match):
        load(normal(*shape))


def test_arrays_that_are_not_used_are_named_once(recwarn):
    load(x=FIVE, y=FIVE)
    assert data.shape_of("a.npz") == (1, 8, 8)
    (warning,) = recwarn
    assert "the samples are x; the other arrays are not used" in str(warning.message)


# -------------------------------------------------------------------------------------------------
# Words and pictures


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((10, 9, 8, 1), "8 images of height 9 and width 8 with 1 channel"),
        ((10, 128, 1, 2), "8 series of length 128 with 2 channels"),
        ((10, 2), "8 points of 2 numbers"),
    ],
)
def test_data_are_described_with_channels_and_sides_by_name(shape, words):
    assert data.describe(load(normal(*shape))) == words


@pytest.mark.filterwarnings("error")
def test_a_field_is_drawn_between_the_ends_of_its_window_two_channels_in_colour():
    field = np.array([[[[-9, 0], [2, 1], [9, np.nan]]]])
    drawn = data.picture(field, {"kind": "field", "window": (-2, 2)})
    assert drawn[0, ::21].tolist() == [[0, 128, 0], [255, 191, 255], [255, 0, 255]]


def test_images_of_one_class_are_a_square_grid():
    drawn = data.picture(FIVE, PIXELS, [1] * 5)
    assert np.array_equal(drawn, png.image_grid(FIVE, 3, names=["dog"]))


def test_each_class_has_a_row_with_its_name():
    drawn = data.picture(FIVE, PIXELS, torch.tensor([2, 0, 2, 2, 0]))
    grey = np.full_like(FIVE[:1], 128)
    rows = np.concatenate([FIVE, grey])[[1, 4, 5, 0, 2, 3]]
    assert np.array_equal(drawn, png.image_grid(rows, 3, names=["cat", "owl"]))


def test_points_of_more_than_two_dimensions_say_which_are_drawn():
    points = normal(1000, 5)
    facts = {"kind": "points", "window": png.extent(points)}
    drawn = png.titled(png.histogram(points), "axes 0 and 1 of 5")
    assert np.array_equal(data.picture(points, facts), drawn)
