"""data.py: batches, facts, named sets, arrays of every kind, and what is said of them."""

import math
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from test_formats import damaged, fails, make_cifar10, noise, paint, same

import data
from formats import png

PIXELS = {"kind": "image", "scale": 1.0}


def worst(a, b):
    a = torch.as_tensor(a).double()
    b = torch.as_tensor(b).double()
    return float((a - b).abs().max())


def held_out(n):
    """Which rows of a file are held out, by the documented rule."""
    return np.isin(np.arange(n), np.random.default_rng(0).permutation(n)[: n // 5])


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


def load(array, name="a.npy", **keywords):
    np.save(name, array)
    return data.load(name, **keywords)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


# -------------------------------------------------------------------------------------------------
# Batches and units


def test_all_256_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x, label = data.Dataset("made", "image", levels, levels).batch(1)
    assert (x.dtype, label, x.min(), x.max()) == (torch.float32, None, -1, 1)
    assert same(data.finish(x, PIXELS), levels.reshape(1, 16, 16, 1).numpy())


def test_pixels_are_rounded_and_clamped():
    odd = torch.tensor([-9.0, 1.001, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1]).reshape(1, 1, 2, 2)
    assert data.finish(odd, PIXELS).ravel().tolist() == [0, 255, 100, 101]


@pytest.fixture
def drawn():
    """5,000 samples of ten images, drawn with mirroring, and the images that they are made of."""
    torch.manual_seed(0)
    level = 12 * torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    images = level + torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2)
    dataset = data.Dataset("ten", "image", images, images, torch.arange(10) * 3, flip=True)
    x, label = dataset.batch(5000)
    return x, label, images[label // 3] / 127.5 - 1


def test_images_are_mirrored_whole_along_the_width(drawn):
    x, _, truth = drawn
    plain = (x - truth).abs().flatten(1).amax(1) < 1e-6
    mirrored = (x - truth.flip(-1)).abs().flatten(1).amax(1) < 1e-6
    assert (plain ^ mirrored).all()
    assert abs(mirrored.sum() - 2500) < 180  # 5 standard deviations


def test_every_sample_is_drawn_as_often(drawn):
    counts = drawn[1].bincount(minlength=28)[::3]
    assert (counts - 500).abs().max() < 110  # 5 standard deviations


def test_a_seed_draws_the_batch_that_it_always_drew():
    torch.manual_seed(3)
    _, label = data.load("digits").batch(12)
    assert label.tolist() == [3, 6, 3, 9, 8, 2, 5, 7, 3, 0, 2, 6]


@pytest.mark.parametrize("kind", ["image", "field", "points"])
def test_a_large_array_gives_the_same_batches_as_one_in_memory(kind, monkeypatch):
    found = []
    for large in (2**30, 10):
        monkeypatch.setattr(data, "LARGE", large)
        dataset = data.load(classed(kind)[0], flip=True)
        assert isinstance(dataset.train, data.Rows) == (large == 10)
        torch.manual_seed(5)
        found.append(torch.cat([dataset.batch(9)[0] for _ in range(20)]))
    assert torch.equal(*found)


def test_held_out_samples_come_with_their_labels():
    path, array, labels = classed("image")
    x, label = data.load(path).held_out(slice(3))
    rows = held_out(60)
    assert worst(x.permute(0, 2, 3, 1), array[rows][:3] / 127.5 - 1) < 1e-6
    assert label.tolist() == labels[rows][:3].tolist()


def test_a_sample_that_is_held_out_has_the_name_of_its_file():
    for part in ("train", "test"):
        paint(f"s/{part}/a/1.png", noise(0, 9, 9))
    assert data.load("s", size=8).held_out_name(0) == "test/a/1.png"


def test_a_sample_without_a_file_is_named_by_its_number():
    assert data.load("digits").held_out_name(3) == "held-out sample 3 of digits"


# -------------------------------------------------------------------------------------------------
# Facts


def classed(kind):
    """A file of 60 samples of classes 0, 1 and 3: its name, its array, its labels."""
    shape = {"image": (60, 6, 5, 3), "field": (60, 8, 9, 7), "points": (60, 3)}[kind]
    labels = np.random.default_rng(0).integers(0, 4, 60)
    labels[labels == 2] = 3
    array = noise(0, *shape)
    if kind != "image":
        array = normal(*shape) * 5 + 300 + 20 * np.arange(shape[-1])
    np.savez("a.npz", images=array, labels=labels)
    return "a.npz", array, labels


@pytest.fixture(params=product(["image", "field", "points"], [False, True], [2**30, 10]))
def known(request, monkeypatch):
    """A data set, its facts, and all that a network meets of it, with the labels; of every kind,
    mirrored or not, in memory or read row by row."""
    kind, flip, large = request.param
    monkeypatch.setattr(data, "LARGE", large)
    dataset = data.load(classed(kind)[0], flip=flip)
    x = dataset.units(dataset.train[:]).double()
    mirrored = x.flip(-1) if flip and kind != "points" else x
    labels = torch.cat([dataset.train_labels] * 2)
    return dataset, dataset.summary(), torch.cat([x, mirrored]), labels


def test_facts_name_shape_kind_and_classes(known):
    dataset, facts, _, _ = known
    assert (facts["kind"], facts["shape"]) == (dataset.kind, list(dataset.shape))
    assert (facts["labels"], facts["names"]) == (4, list("0123"))
    assert facts["counts"] == dataset.train_labels.bincount().tolist()


def test_mean_and_std_are_those_of_what_a_network_meets(known):
    _, facts, x, _ = known
    assert worst(facts["mean"], x.mean(0)) < 1e-6
    assert abs(facts["std"] - x.std(correction=0)) < 1e-6


def test_means_of_classes_are_those_of_what_a_network_meets(known):
    _, facts, x, labels = known
    for k in (0, 1, 3):
        assert worst(facts["class_means"][k], x[labels == k].mean(0)) < 1e-6


def test_the_bound_is_a_tenth_above_the_largest_value(known):
    dataset, facts, x, _ = known
    bound = 1.0 if dataset.is_image else 1.1 * x.abs().max()
    assert abs(facts["bound"] - bound) < 1e-6


def test_finished_samples_are_in_the_order_and_units_of_the_file(known):
    dataset, facts, x, _ = known
    with np.load("a.npz") as file:
        inside = file["images"][~held_out(60)]
    assert worst(data.finish(x[: len(dataset.train)].float(), facts), inside) < 1e-3


def test_the_window_of_a_field_shows_its_first_three_channels():
    path, array, _ = classed("field")
    shown = array[~held_out(60)][..., :3]
    truth = np.quantile(shown, (0.001, 0.999))
    assert np.allclose(data.load(path).summary()["window"], truth, atol=1e-3)


# -------------------------------------------------------------------------------------------------
# Named sets


def twin(name, n, rng):
    """The 2-D sets once more, as their papers and scikit-learn describe them."""
    noise = rng.normal(size=(n, 2))
    if name == "gmm":
        rotation = np.array([[1, 1], [-1, 1]]) / math.sqrt(2)
        return rng.integers(-1, 2, (n, 2)) * 0.5 @ rotation + 0.04 * noise
    if name == "spiral":
        t = 1.5 * np.pi + 3 * np.pi * rng.random((n, 1))
        roll = t * np.concatenate([np.cos(t), np.sin(t)], 1) + 0.3 * noise
        corners = 1.2 * np.array([(0, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)])
        return 0.05 * roll + corners[rng.integers(0, 5, n)]
    if name == "checkerboard":
        board = 4 * rng.random((4 * n, 2)) - 2
        return board[np.floor(board).sum(1) % 2 == 0][:n]
    t = np.pi * rng.random(n)
    upper = np.stack([np.cos(t), np.sin(t)], 1)
    lower = np.stack([1 - np.cos(t), 0.5 - np.sin(t)], 1)
    moons = np.where(rng.random((n, 1)) < 0.5, upper, lower)
    return 1.5 * (moons + 0.05 * noise - (0.5, 0.25))


def squares(points):
    return np.histogram2d(*points.T, [np.linspace(-2.5, 2.5, 51)] * 2)[0]


@pytest.mark.parametrize("name", data.POINTS)
def test_points_follow_their_law(name):
    dataset = data.load(name)
    torch.manual_seed(0)
    truth = squares(twin(name, 40_000, np.random.default_rng(0)))
    for part in (dataset.batch(40_000)[0], dataset.train, dataset.test):
        count = squares(part.numpy())
        share = len(part) / 40_000
        full = count + truth > 9
        chi2 = (count - share * truth)[full] ** 2 / (share * (count + truth))[full]
        assert chi2.sum() < full.sum() + 6 * math.sqrt(2 * full.sum())


@pytest.mark.parametrize("name", data.POINTS)
def test_points_are_drawn_afresh(name):
    dataset = data.load(name)
    x, label = dataset.batch(1000)
    assert (label, x.dtype, dataset.shape) == (None, torch.float32, data.shape_of(name))
    assert len(torch.cat([x, dataset.batch(1000)[0]]).unique(dim=0)) > 1990


def test_digits_are_the_1797_images_and_every_fifth_is_held_out():
    digits = data.load("digits")
    every_fifth = np.arange(1797) % 5 == 4
    with np.load(data.DIGITS_FILE, allow_pickle=False) as file:
        images = file["images"]
        labels = file["labels"]
    assert same(digits.test[:, 0].numpy(), images[every_fifth])
    assert same(digits.train[:, 0].numpy(), images[~every_fifth])
    assert digits.test_labels.tolist() == labels[every_fifth].tolist()
    assert digits.train_labels.tolist() == labels[~every_fifth].tolist()


def test_official_files_become_a_data_set():
    images = make_cifar10()
    dataset = data.load("cifar10", "files")
    assert same(torch.cat([dataset.train, dataset.test]).permute(0, 2, 3, 1).numpy(), images)
    assert (dataset.flip, len(dataset.test), dataset.names[3]) == (True, 7, "cat")


def test_a_folder_becomes_a_data_set():
    for i, name in enumerate(("train/a/1", "train/b/2", "test/b/3")):
        paint(f"s/{name}.png", np.full((9, 9), 20 * i, np.uint8))
    dataset = data.load("s", size=4)
    assert (dataset.shape, dataset.names) == ((1, 4, 4), ["a", "b"])
    assert dataset.train_labels.tolist() == [0, 1]
    assert (dataset.test == 40).all()


@pytest.mark.parametrize(
    ("match", "name", "folder"),
    [
        ("no data set 'spirals' \\(did you mean spiral\\?\\)", "spirals", None),
        ("did you mean cifar10\\?", "CIFAR-10", None),
        ("no such file or folder.*did you mean photos/flags\\?", "photos/flag", None),
        (".*".join(data.NAMES), "zzzz", None),
        ("photos/flags/a.txt is no data", "photos/flags/a.txt", None),
        ("add --size", "photos", None),
        ("--data-dir is for", "digits", "."),
    ],
)
def test_a_wrong_name_is_one_line(match, name, folder):
    Path("photos/flags").mkdir(parents=True)
    Path("photos/flags/a.txt").touch()
    fails(match, data.load, name, folder)


def test_a_size_is_for_pictures_only():
    fails("--size 8 is for a folder", data.shape_of, "digits", 8)


def test_the_shape_of_pictures_is_known_unread():
    Path("photos").mkdir()
    assert data.shape_of("photos", 8) == (3, 8, 8)


# -------------------------------------------------------------------------------------------------
# Arrays


@pytest.fixture(
    params=[
        *product([(40, 5, 6), (40, 5, 6, 1), (40, 5, 6, 3)], ["u1"]),
        *product([(40, 6, 6), (40, 5, 6, 2), (40, 9, 1, 2), (500, 3)], ["<f2", ">f4", "<f8"]),
        *product([(40, 6, 6), (40, 5, 6, 2)], [">u2"]),
    ],
    ids=str,
)
def array(request):
    shape, dtype = request.param
    return (normal(*shape) * np.linspace(1, 4, shape[-1]) + 50).astype(dtype)


@pytest.mark.filterwarnings("error")
def test_arrays_are_read_and_restored(array):
    dataset = load(np.asfortranarray(array))
    restored = data.finish(dataset.units(dataset.train[:]).float(), dataset.summary())
    truth = array[~held_out(len(array))]
    assert restored.dtype == (np.uint8 if array.dtype == np.uint8 else np.float32)
    assert np.abs(restored.reshape(truth.shape) - truth.astype(float)).max() < 1e-4
    assert dataset.shape == data.shape_of("a.npy")


@pytest.mark.parametrize("shape", [(40, 6, 6, 1), (40, 5, 6, 2), (500, 3)])
def test_floats_are_centred_by_channel_and_divided_by_one_scale(shape):
    array = normal(*shape) * np.linspace(1, 4, shape[-1]) + 50
    dataset = load(array)
    rows = array[~held_out(len(array))].reshape(-1, shape[-1])
    assert np.abs(dataset.shift.numpy() - rows.mean(0)).max() < 1e-9
    assert abs(dataset.scale - math.sqrt(rows.var(0).mean())) < 1e-9


@pytest.mark.parametrize("key", ["arr_0", "images", "x", "other"])
def test_the_array_of_an_npz_and_its_labels_are_found(key):
    labels = np.arange(40, dtype=np.int16)[:, None]
    np.savez_compressed("a.npz", labels=labels, **{key: noise(0, 40, 5, 6)})
    dataset = data.load("a.npz")
    assert dataset.train_labels.tolist() == np.flatnonzero(~held_out(40)).tolist()
    assert dataset.names == [str(i) for i in range(40)]


def test_samples_of_sample_py_are_data_with_the_names_of_their_classes():
    names = ["cat", "dog", "owl"]
    np.savez_compressed("a.npz", arr_0=noise(0, 40, 5, 6, 3), labels=np.arange(40) % 2, names=names)
    facts = data.load("a.npz").summary()
    assert (facts["names"], facts["labels"], facts["counts"][2]) == (names, 3, 0)


def test_too_few_names_are_refused():
    np.savez("a.npz", x=noise(0, 9, 5, 6), labels=np.arange(9), names=["a", "b"])
    fails("labels up to 8, but 2 names", data.load, "a.npz")


def test_other_arrays_of_an_npz_are_not_used_and_told():
    np.savez("a.npz", images=noise(0, 9, 5, 6), other=np.zeros(3))
    with pytest.warns(UserWarning, match="the samples are images; the other arrays are not used"):
        data.load("a.npz")


def test_an_npz_that_could_be_two_things_is_refused():
    np.savez("b.npz", a=noise(0, 5, 4, 4), y=np.arange(5))
    fails("cannot read .* call the samples images or x", data.load, "b.npz")


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
@pytest.mark.filterwarnings("error")
def test_a_damaged_file_is_one_line(save):
    name = "a.npy" if save is np.save else "a.npz"
    save(name, noise(0, 200, 4, 4))
    size = Path(name).stat().st_size
    bits = () if save is np.save else range(size // 3, size - 60, size // 9)
    for _ in damaged(name, bits):
        fails("cannot read.*numpy.save", data.load, name)


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
def test_an_array_of_objects_is_told_from_a_broken_file(save):
    name = "a.npy" if save is np.save else "a.npz"
    save(name, np.array([np.zeros((2, 2)), np.zeros((3, 3)), None], dtype=object))
    fails(
        "it holds Python objects, as images of different sizes do: give one array", data.load, name
    )


def huge(name, entries):
    """A small file whose header claims so many float64."""
    with open(name, "wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (entries, 2)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(1000))


def test_a_header_that_lies_is_one_line():
    huge("a.npy", 10**14)
    fails("cannot read a.npy", data.load, "a.npy")


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((0, 8, 8), np.uint8), "empty"),
        (np.zeros((5, 3, 8, 8), np.uint8), "C 1 or 3"),
        (np.zeros((5, 8, 8), np.int64), "int64.*convert"),
        (np.zeros((24, 25, 3), np.uint8), r"one picture or many: give \(N, H, W, C\)$"),
        (np.zeros((2000, 128, 1)), r"one picture or many: .*series are \(N, L, 1, C\)"),
        (np.zeros((5, 4, 4, 4, 1)), "of a volume the slices can be channels"),
        (np.zeros(9), r"points are \(N, D\)"),
        (np.eye(5, dtype=np.uint8)[None], "multiply masks by 255"),
        (np.array([[0.0, 1], [np.nan, 2]]), "not finite.*fill them, say with the mean"),
        (np.full((9, 2), 0.1), "constant"),
    ],
)
def test_what_is_no_data_is_one_line(array, match):
    fails(match, load, array)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (np.arange(40)[:, None], r"5 integers.*found int64 \(40, 1\)"),
        (np.arange(5.0), r"found float64 \(5,\)"),
        (np.array(list("abcde")), "found text"),
        (np.arange(5) - 1, "found -1 to 3"),
        (np.arange(5) * 10_000, "found 0 to 40000"),
    ],
)
def test_wrong_labels_are_one_line(labels, match):
    np.savez("a.npz", images=noise(0, 5, 4, 4), labels=labels)
    fails(f"labels must be .*{match}", data.load, "a.npz")


# -------------------------------------------------------------------------------------------------
# What is odd about floats


def replaced(array, rows, value):
    array[rows] = value
    return array


def sea(fill):
    """Temperatures of which the left 40 % are land."""
    array = 290 + normal(300, 10, 10, 1)
    array[:, :, :4] = fill
    return array


@pytest.mark.parametrize(
    "array",
    [
        normal(20_000, 2),
        np.random.default_rng(0).standard_t(3, size=(20_000, 2)),
        data.spiral(20_000, torch.Generator().manual_seed(0)).numpy(),
        np.eye(10)[np.random.default_rng(0).integers(0, 10, 20_000)],
        np.maximum(normal(300, 8, 8, 1), 0),  # half of it is 0, but near
        replaced(normal(1000, 2), slice(360), 30.0 + normal(360, 2)),  # 36 % are not few
        normal(300, 24, 36, 5),
        normal(300, 128, 1, 2),
    ],
)
def test_ordinary_floats_are_not_warned_of(array):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(array)


FEW = "half of the rows lie within .* a few set the scale"


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (replaced(normal(20_000, 2), slice(20), 1e4), FEW),
        (replaced(normal(20_000, 1), slice(5), -1e3), FEW),
        (replaced(normal(400, 8, 8, 3), slice(3), 1e3), FEW),
        (normal(99, 2) * (1, 1000), "axis 0 spreads over .*axis 1 over .*one scale"),
        (sea(-9999), "40 % of the values are -9999, far from all others.*say with the mean"),
        (sea(1e20), r"40 % of the values are 1e\+20, far from all others"),
        (normal(60, 5, 24, 36), r"height 5 and width 24 with 36 channels.*\(N, C, H, W\)"),
        (normal(60, 1, 20, 32), r"transpose it if it is \(N, C, H, W\)"),
        (normal(60, 4, 16, 12), r"transpose it if it is \(N, C, H, W\)"),
        (normal(20, 16, 16, 16), r"of a volume \(N, D, H, W\) slices become channels"),
        (normal(60, 128, 2), r"give \(N, L, 1, C\) if they are series of length L with C channels"),
    ],
)
def test_odd_floats_are_warned_of(array, match):
    with pytest.warns(UserWarning, match=match):
        load(array)


# -------------------------------------------------------------------------------------------------
# Words and pictures


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (noise(0, 10, 32, 32, 3), "8 images of 32 x 32 pixels, 3 channels"),
        (noise(0, 10, 24, 36), "8 images of 24 x 36 pixels (height x width), 1 channel"),
        (normal(10, 9, 9, 5), "8 images of 9 x 9 pixels, 5 channels"),
        (normal(10, 128, 1, 2), "8 series of length 128 with 2 channels"),
        (normal(10, 2), "8 points of 2 numbers"),
    ],
)
def test_data_are_described_with_channels_and_sides_by_name(array, words):
    assert data.describe(load(array)) == words


def test_a_field_is_drawn_between_the_ends_of_its_window():
    field = np.array([-9.0, -2, 0, 1, 2, np.nan]).reshape(1, 1, 6, 1)
    drawn = data.picture(field, {"kind": "field", "window": (-2, 2)})
    assert drawn[0, ::10].tolist() == [0, 0, 128, 191, 255, 0]


def test_two_channels_are_drawn_in_colour():
    facts = {"kind": "field", "window": (-2, 2)}
    assert data.picture(normal(4, 8, 8, 2), facts).shape[2] == 3


def test_images_without_labels_are_a_square_grid():
    images = noise(0, 9, 8, 8, 1)
    assert same(data.picture(images, PIXELS), png.image_grid(images, 3))


def test_each_class_has_a_row_with_its_name():
    images = noise(0, 5, 8, 8, 1)
    facts = PIXELS | {"names": ["cat", "dog", "owl"]}
    drawn = data.picture(images, facts, labels=torch.tensor([2, 0, 2, 2, 0]))
    empty = np.full((1, 8, 8, 1), 128, np.uint8)
    rows = np.concatenate([images[[1, 4]], empty, images[[0, 2, 3]]])
    assert same(drawn, png.image_grid(rows, 3, names=["cat", "owl"]))


def test_a_class_has_at_most_32_columns():
    drawn = data.picture(
        noise(0, 80, 64, 64, 1), PIXELS | {"names": ["a", "b"]}, labels=np.arange(80) % 2
    )
    assert drawn.shape == (2 * 65 - 1, 24 + 32 * 65 - 1)


def test_one_class_alone_is_a_grid_with_its_name():
    images = noise(0, 9, 8, 8, 1)
    drawn = data.picture(images, PIXELS | {"names": ["cat", "dog"]}, labels=np.ones(9, int))
    assert same(drawn, png.image_grid(images, 3, names=["dog"]))


def test_points_of_more_than_two_dimensions_say_which_are_drawn():
    facts = {"kind": "points", "window": [(-3, 3), (-3, 3)]}
    points = normal(1000, 5)
    title = png.titled(png.histogram(points, limit=facts["window"]), "axes 0 and 1 of 5")
    assert same(data.picture(points, facts), title)
