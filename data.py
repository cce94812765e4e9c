"""Data: a name or file -> Dataset -> batches in network units -> samples in the file's units.

    gmm, spiral, checkerboard, moons   2-D points, drawn afresh for every batch
    digits                             1,797 grey 8x8 images in assets/digits.npz
    fashion, cifar10                   Fashion-MNIST, 28x28 grey, and CIFAR-10, 32x32 colour:
                                       downloaded once, or taken from --data-dir
    imagenet64                         ImageNet, 64x64 colour, the official eleven .npz files
    FOLDER, FILE.zip                   pictures of any kind; sub-folders are classes
    FILE.npy, FILE.npz                 one array, of which an .npz may have integer `labels`, and
                                       `names` of the classes:
        uint8 (N, H, W), (N, H, W, C)  images, C is 1 or 3
        float (N, D)                   points
        float or uint16 (N, H, W, C)   fields: images of any C; series are (N, L, 1, C)

Images stay uint8 until `batch` takes them to [-1, 1]. Points and fields are centred by the mean of
each channel and divided by one scale.

digits is the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0), from
scikit-learn's `load_digits`. The only change is from 17 grey levels v to uint8,
round(v * 255 / 16).
"""

import difflib
import math
import os
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from formats import official, pictures
from formats.files import UserError, absolute, why
from formats.png import extent, histogram, image_grid, titled

DIGITS_FILE = Path(__file__).resolve().parent / "assets" / "digits.npz"
ARRAYS = (".npy", ".npz")
LARGE = 2**30  # bytes: a larger array stays on the disk, and batches read their rows


class Rows:
    """Rows of an array that is too large to copy. They are read and converted when they are
    indexed: rows[index] is change(array[...]) as a tensor."""

    def __init__(self, array, rows, change):
        self.array = array
        self.rows = rows
        self.change = change
        self.shape = (len(rows), *self[:0].shape[1:])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        part = self.change(self.array[self.rows[index]])
        return torch.from_numpy(np.ascontiguousarray(part))


def parts(x):
    """Yields (first row, rows) of an array, a tensor or Rows, some megabytes at a time."""
    step = max(1, 2**21 // math.prod(x.shape[1:]))
    for start in range(0, len(x), step):
        yield start, x[start : start + step]


@dataclass
class Dataset:
    name: str
    kind: str  # "image": uint8 pixels; "points": floats (N, D); "field": float images
    train: torch.Tensor | Rows  # uint8 (N, C, H, W), or float32 in network units, or (N, D)
    test: torch.Tensor | Rows  # held out, the same kind; may be empty for small files
    train_labels: torch.Tensor | None = None  # int64 (N,)
    test_labels: torch.Tensor | None = None
    names: tuple | list = ()  # of the classes; empty: no labels
    no_labels: str = ""  # why there are none, where that is not plain
    files: tuple | list = ()  # names of the files that are held out, where there are such
    draw: object = None  # function: n -> fresh points (n, D)
    flip: bool = False  # mirror half of the training images
    shift: torch.Tensor | float = 0.0  # float64 (C,): value in the file = shift + scale * x
    scale: float = 1.0  # one number for all channels keeps the shape of the data
    device: torch.device = torch.device("cpu")  # noqa: RUF009, of the batches

    @property
    def shape(self):
        """Shape of one sample: (C, H, W) or (D,)."""
        return tuple(self.train.shape[1:])

    @property
    def is_image(self):
        return self.kind == "image"

    def to(self, device):
        """The same with batches on that device. Rows and what is held out stay on the CPU."""
        moved = replace(self, device=torch.device(device))
        if torch.is_tensor(self.train):
            moved.train = self.train.to(device)
        if self.train_labels is not None:
            moved.train_labels = self.train_labels.to(device)
        return moved

    def units(self, x):
        """Samples as they are kept -> network units."""
        return x / 127.5 - 1 if self.is_image else x

    def batch(self, n):
        """Training samples in network units, float32 (n, C, H, W) or (n, D), and their labels (n,)
        or None, drawn with replacement. All randomness is the global CPU generator's, whatever the
        device, so a seed fixes the batch."""
        if self.draw:
            return send(self.draw(n), self.device), None
        index = torch.randint(len(self.train), (n,))
        index_there = send(index, self.device)
        if isinstance(self.train, Rows):
            x = send(self.train[index], self.device)
        else:
            x = self.train[index_there]
        if self.flip:
            mirrored = send(torch.rand(n) < 0.5, self.device)
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        label = None if self.train_labels is None else self.train_labels[index_there]
        return self.units(x), label

    def held_out(self, rows):
        """Held-out samples in network units, and their labels or None, on the CPU. rows: a slice,
        or indices."""
        label = None if self.test_labels is None else self.test_labels[rows]
        return self.units(self.test[rows]), label

    def held_out_name(self, i):
        """The file of held-out sample i where there is one, or its number in words."""
        if len(self.files):
            return self.files[i]
        return f"held-out sample {i} of {self.name}"

    def summary(self):
        """The facts of the training data that a checkpoint keeps: what sampling needs, and what
        tells these data from others. Means are those of what a network meets: of mirrored data,
        too, where `flip` is on."""
        n = len(self.train)
        size = math.prod(self.shape)
        classes = len(self.names)
        by_class = 0 < classes * size <= 2**22  # else the means of all classes are too large
        sums, square, largest = self.totals(classes if by_class else 0)
        centre = float(sums.sum()) / (n * size)
        std = math.sqrt(max(0.0, square / (n * size) - centre**2))

        counts = torch.zeros(0)
        if classes:
            counts = self.train_labels.cpu().bincount(minlength=classes)

        facts = {
            "kind": self.kind,
            "shape": list(self.shape),
            "shift": torch.as_tensor(self.shift).tolist(),
            "scale": self.scale,
            "std": std / 127.5 if self.is_image else std,
            "bound": 1.0 if self.is_image else 1.1 * largest,
            "labels": classes,
            "names": list(self.names),
            "counts": counts.tolist(),
            "mean": self.mean(sums.sum(0), n)[0],
            "class_means": self.mean(sums, counts.clamp(min=1)[:, None]) if by_class else None,
            "window": None,
        }
        some = self.train[:: 1 + n // min(10_000, 1 + 2**22 // size)]
        if self.kind == "points":
            facts["window"] = extent(finish(some, facts))
        if self.kind == "field":
            shown = finish(some, facts)[..., :3]
            facts["window"] = tuple(np.quantile(shown, (0.001, 0.999)).tolist())
        return facts

    def totals(self, classes):
        """Over all training samples as they are kept: their sums (classes, D) by class, or (1, D)
        where classes is 0; the sum of their squares; the largest absolute value."""
        sums = torch.zeros(max(classes, 1), math.prod(self.shape), dtype=torch.float64)
        square = 0.0
        largest = 0.0
        row_of_sum = torch.zeros(len(self.train), dtype=torch.int64)
        if classes:
            row_of_sum = self.train_labels.cpu()
        for start, part in parts(self.train):
            x = part.cpu().flatten(1).double()
            sums.index_add_(0, row_of_sum[start : start + len(x)], x)
            square += float(x.square().sum())
            largest = max(largest, float(x.abs().max()))
        return sums, square, largest

    def mean(self, total, count):
        """float32 (K, C, H, W) or (K, D) in network units, from sums (K, D) or (D,)."""
        mean = self.units((total / count).reshape(-1, *self.shape)).float()
        return (mean + mean.flip(-1)) / 2 if self.flip else mean


def send(x, device):
    """x on that device. To a GPU it goes from pinned memory: without, the copy would wait until the
    GPU has nothing left to do."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def finish(x, facts):
    """Samples in network units -> numpy: uint8 (N, H, W, C), or floats (N, D) or (N, H, W, C) in
    the units of the file: float32, or float64 where float32 would round by more than 1e-4 scale."""
    x = x.detach().cpu()
    if facts["kind"] == "image":
        pixels = ((x.float() + 1) * 127.5).round().clamp(0, 255)
        return pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    scale = facts["scale"]
    shift = torch.tensor(facts["shift"], dtype=torch.float64)
    is_near = float(shift.abs().max()) < 1000 * scale
    dtype = torch.float32 if is_near and 1e-30 < scale < 1e30 else torch.float64
    values = x.double() * scale + shift.reshape(-1, *[1] * (x.ndim - 2))
    return values.to(dtype).movedim(1, -1).numpy()


# -------------------------------------------------------------------------------------------------
# Words and pictures


def describe(dataset):
    """How many training samples there are, and of what size: channels and sides by name."""
    n = len(dataset.train)
    C, *sides = dataset.shape
    if not sides:
        return f"{n} points of {C} number{'s' if C > 1 else ''}"
    height, width = sides
    channels = f"{C} channel{'s' if C > 1 else ''}"
    if width == 1:
        return f"{n} series of length {height} with {channels}"
    order = "" if height == width else " (height x width)"
    return f"{n} images of {height} x {width} pixels{order}, {channels}"


def picture(array, facts, labels=None, columns=None):
    """Finished samples as a picture, uint8 (H, W) or (H, W, 3): of points a histogram in the
    window, of numbers bars, of images a grid; of fields the first three channels between the
    window's ends. labels (N,): one row for each class that occurs, its name beside it, at most 32
    columns."""
    if facts["kind"] == "points":
        drawn = histogram(array, limit=facts["window"])
        dimensions = array.shape[1]
        return titled(drawn, f"axes 0 and 1 of {dimensions}") if dimensions > 2 else drawn

    if facts["kind"] == "field":
        low, high = facts["window"]
        level = (array[..., :3] - low) / ((high - low) or 1)
        array = (255 * np.nan_to_num(level).clip(0, 1)).round().astype(np.uint8)
        if array.shape[3] == 2:
            array = array[..., [0, 1, 0]]

    if labels is None:
        return image_grid(array[:1024], columns)
    labels = np.asarray(labels)
    classes, counts = np.unique(labels, return_counts=True)
    names = [facts["names"][k] for k in classes]
    if len(classes) == 1:  # a grid says more than one row
        return image_grid(array[:1024], columns, names=names)
    columns = min(columns or 32, int(counts.max()))
    rows = np.full((len(classes), columns, *array.shape[1:]), 128, np.uint8)
    for row, k in zip(rows, classes, strict=True):
        some = array[labels == k][:columns]
        row[: len(some)] = some
    return image_grid(rows.reshape(-1, *array.shape[1:]), columns, names=names)


# -------------------------------------------------------------------------------------------------
# 2-D sets: n -> float32 (n, 2)


def gmm(n, generator=None):
    """Nine Gaussians of standard deviation 0.04 on a 3x3 grid of spacing 0.5, rotated by 45
    degrees."""
    i, j = torch.randint(-1, 2, (2, n), generator=generator) * 0.5
    centres = torch.stack([i - j, i + j], 1) / math.sqrt(2)
    return centres + 0.04 * torch.randn(n, 2, generator=generator)


def spiral(n, generator=None):
    """Five swiss rolls around five centres: (t cos t, t sin t) for t = 1.5 pi (1 + 2u), noise 0.3,
    all times 0.05."""
    t = 1.5 * math.pi * (1 + 2 * torch.rand(n, 1, generator=generator))
    roll = torch.cat([t * t.cos(), t * t.sin()], 1)
    roll = roll + 0.3 * torch.randn(n, 2, generator=generator)
    centres = 1.2 * torch.tensor([[0.0, 0.0], [1, 1], [1, -1], [-1, 1], [-1, -1]])
    which = torch.randint(5, (n,), generator=generator)
    return 0.05 * roll + centres[which]


def checkerboard(n, generator=None):
    """Uniform on the eight dark unit squares of a 4x4 board over [-2, 2]^2."""
    row = torch.randint(4, (n,), generator=generator)
    half = torch.randint(2, (n,), generator=generator)
    corner = torch.stack([2 * half + row % 2, row], 1) - 2
    return corner + torch.rand(n, 2, generator=generator)


def moons(n, generator=None):
    """Two interleaved half circles of radius 1.5, each the other's point reflection in 0, with
    noise 0.075."""
    t = math.pi * torch.rand(n, generator=generator)
    sign = 2 * torch.randint(2, (n, 1), generator=generator) - 1
    arc = torch.stack([t.cos() - 0.5, t.sin() - 0.25], 1)
    return 1.5 * (sign * arc + 0.05 * torch.randn(n, 2, generator=generator))


POINTS = {"gmm": gmm, "spiral": spiral, "checkerboard": checkerboard, "moons": moons}
OFFICIAL = {"fashion": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet64": (3, 64, 64)}
SHAPES = {**dict.fromkeys(POINTS, (2,)), "digits": (1, 8, 8), **OFFICIAL}
NAMES = list(SHAPES)


# -------------------------------------------------------------------------------------------------
# Loading


def load(name, data_dir=None, flip=None, size=0):
    """The data set `name` of NAMES, or of that path: an .npy or .npz file, a folder or zip of
    pictures; on the CPU. data_dir: where official files are. flip: in place of the set's own
    choice. size: pixels a side that a folder's pictures are brought to. UserError says what is
    wrong with the data."""
    name = str(name)
    if data_dir and name not in OFFICIAL:
        wanted = ", ".join(OFFICIAL)
        raise UserError(f"--data-dir is for {wanted}, not for {name}: leave it out")
    if flip is None:
        flip = name in ("cifar10", "imagenet64")

    if name in POINTS:
        draw = POINTS[name]
        generator = torch.Generator().manual_seed(0)
        train = draw(10_000, generator)
        test = draw(10_000, generator)
        return Dataset(name, "points", train, test, draw=draw)
    if name in OFFICIAL:
        path = Path(name)
        found = official.load(name, data_dir and absolute(data_dir))
    elif name == "digits":
        path = DIGITS_FILE
        found = read_array(path) | {"held_out": slice(4, None, 5)}
    else:
        path = path_of(name, size)
        found = read_array(path) if path.suffix in ARRAYS else pictures.load(path, size)
    dataset = samples(path, **found)
    dataset.flip = flip and dataset.kind != "points"
    return dataset


def shape_of(name, size=0):
    """Shape of one sample, (C, H, W) or (D,), of the data set or file of that name. For pictures,
    unread, C is 3."""
    path = None if name in SHAPES else path_of(name, size)
    if path and path.suffix not in ARRAYS:
        return (3, size, size)
    if size:
        fix = f"is for a folder or zip of pictures, {name} is neither: leave --size out"
        raise UserError(f"--size {size} {fix}")
    if path is None:
        return SHAPES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `load` gives them again
        array, _ = as_samples(path, read_array(path)["array"])
    _, *sides, channels = array.shape
    return (channels, *sides)


def path_of(name, size):
    """The array file, or the folder or zip of pictures, of that name. UserError if neither."""
    path = Path(name)
    if name.startswith("~"):
        path = absolute(path)
    wanted = f"give {', '.join(NAMES)}, an .npy/.npz file, a folder or zip of pictures"
    if not os.path.exists(path):  # which is False for a name that is too long, too
        neighbours = [str(neighbour) for neighbour in path.parent.glob("*")]
        near = difflib.get_close_matches(name.lower(), {*NAMES, *neighbours} - {name}, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"no such file or folder, and no data set {name[:99]!r}{hint}: {wanted}")
    if path.is_file() and path.suffix not in (*ARRAYS, ".zip", ".ZIP"):
        raise UserError(f"{path} is no data: {wanted}")
    if path.suffix not in ARRAYS and not size:
        fix = "add --size, the pixels a side that they are brought to: 16 on a CPU"
        raise UserError(f"{path} is for pictures: {fix}")
    return path


def read_array(path):
    """Of an .npy or .npz file the samples, `array`, and if it has them, the `labels` and the
    `names` of the classes. Never unpickles, never guesses."""
    try:
        with path.open("rb") as file:  # numpy would leave a broken zip open
            head = file.read(200)
            file.seek(0)
            if head.startswith(b"\x93NUMPY"):
                refuse_objects(head)
                return {"array": np.load(path, mmap_mode="r", allow_pickle=False)}
            loaded = np.load(file, allow_pickle=False)
            keys = set(loaded.files) - {"labels", "names"}
            chosen = keys if len(keys) == 1 else keys & {"images", "x"}
            if len(chosen) == 2:
                raise ValueError("it holds images and x: keep one of them")
            if len(chosen) != 1:
                held = ", ".join(loaded.files) or "nothing"
                raise ValueError(f"it holds {held:.99}: call the samples images or x")
            (key,) = chosen
            with loaded.zip.open(f"{key}.npy") as member:
                refuse_objects(member.read(200))
            found = {"array": loaded[key]}
            for name in {"labels", "names"} & set(loaded.files):
                found[name] = np.atleast_1d(loaded[name])
    except Exception as error:  # numpy and zipfile raise a dozen kinds
        fix = "write it again with numpy.save or numpy.savez"
        raise UserError(f"cannot read {path} ({why(error)}): {fix}") from None
    if len(keys) > 1:
        warn(path, f"the samples are {key}; the other arrays are not used")
    return found


def refuse_objects(head):
    """ValueError where the header of an .npy says that its values are Python objects."""
    if b"'|O'" in head:
        what = "it holds Python objects, as images of different sizes do: give one array"
        raise ValueError(what)


def as_samples(path, array):
    """The array with its channels last, and its kind: "image" for uint8 (N, H, W) or (N, H, W, C),
    "points" for floats (N, D), "field" for floats or uint16 (N, H, W, C). UserError where it is
    none of these, or could be two of them."""
    shape = array.shape
    ndim = array.ndim
    found = f"{path}: {array.dtype} {shape}"
    is_image = array.dtype == np.uint8
    is_uint16 = array.dtype.kind == "u" and array.itemsize == 2
    is_float = array.dtype.kind == "f" or (is_uint16 and ndim > 2)
    if not array.size:
        raise UserError(f"{found} is empty: give at least one sample")
    if not (is_image or is_float):
        raise UserError(f"{found} is no data: convert images to uint8 (0..255), points to float32")
    if ndim == 2 and is_float:
        return array, "points"
    if ndim == 3 and (shape[2] in (1, 3) or shape[1] > shape[2] == 4):
        series = "; series are (N, L, 1, C)" if is_float else ""
        raise UserError(f"{found} may be one picture or many: give (N, H, W, C){series}")
    if ndim not in (3, 4) or (is_image and shape[3:] not in ((), (1,), (3,))):
        raise UserError(
            f"{found} is no data: images are uint8 (N, H, W) or (N, H, W, C), C 1 or 3; of floats,"
            " points are (N, D), images (N, H, W, C), series (N, L, 1, C), and of a volume the"
            " slices can be channels, (N, H, W, slices)"
        )
    if is_float:
        warn_of_axes(path, shape)
    if ndim == 3:
        array = array[..., None]
    return array, "image" if is_image else "field"


def samples(path, array, labels=None, names=(), held_out=None, no_labels="", files=()):
    """The arrays of a file as a Dataset. held_out: rows. files: the name of each row's file."""
    array, kind = as_samples(path, array)
    train_rows, test_rows = split(len(array), held_out)
    if kind == "image":
        low = int(array.min())
        high = int(array.max())
        if low == high or high == 1:
            fix = "255 is white, so multiply masks by 255"
            raise UserError(f"{path} has pixels from {low} to {high}: {fix}")
        units = {}
        change = partial(np.moveaxis, source=-1, destination=1)
    else:
        shift, scale = standard(path, array, train_rows)
        units = {"shift": torch.from_numpy(shift), "scale": scale}

        def change(part):
            return np.moveaxis(np.float32((part - shift) / scale), -1, 1)

    train = Rows(array, train_rows, change)
    test = Rows(array, test_rows, change)
    if array.nbytes <= LARGE:
        train = in_memory(train)
        test = in_memory(test)
    dataset = Dataset(
        path.resolve().stem, kind, train, test, names=[], no_labels=no_labels, **units
    )
    if labels is not None:
        labels, dataset.names = check_labels(path, labels, names, len(array))
        dataset.train_labels = torch.from_numpy(labels[train_rows])
        dataset.test_labels = torch.from_numpy(labels[test_rows])
    if len(files):
        dataset.files = [files[row] for row in test_rows]
    return dataset


def split(n, held_out=None):
    """The rows to train on, and those that are held out: by default a fifth, drawn at random but
    always the same."""
    rows = np.arange(n)
    if held_out is None:
        held_out = np.random.default_rng(0).permutation(n)[: n // 5]
    test = np.sort(rows[held_out])
    return np.setdiff1d(rows, test), test


def in_memory(rows):
    """Rows -> a tensor of all of them, converted some megabytes at a time."""
    converted = [part for _, part in parts(rows)]
    return torch.cat([rows[:0], *converted])


def check_labels(path, labels, names, n):
    """Labels as int64 (N,), and a name for each class. UserError if they are not what they should
    be."""
    if labels.shape == (n, 1):
        labels = labels[:, 0]
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        found = "text" if labels.dtype.kind in "US" else f"{labels.dtype} {labels.shape}"
        raise UserError(f"{path}: labels must be {n} integers, one for each sample; found {found}")
    low = labels.min()
    high = labels.max()
    if low < 0 or high >= 10_000:
        raise UserError(f"{path}: labels must be from 0 to 9999; found {low} to {high}")
    names = np.ravel(names if len(names) else range(high + 1))
    if names.dtype.kind == "S":
        names = np.char.decode(names, "utf-8", "replace")
    names = names.astype(str)
    if high >= len(names):
        raise UserError(f"{path} has labels up to {high}, but {len(names)} names: give all names")
    return labels.astype(np.int64), names.tolist()


# -------------------------------------------------------------------------------------------------
# Floats: their units, and what is odd about them


def standard(path, array, rows):
    """The mean (C,) of each channel over those rows, and one scale, in float64: float32 would lose
    what lies far from 0. UserError where there is nothing to learn, warnings where values are
    odd."""
    kind = "axis" if array.ndim == 2 else "channel"
    values = Rows(array, rows, lambda part: part.astype(np.float64))
    n = len(rows) * math.prod(array.shape[1:-1])
    shift = sum(part.flatten(0, -2).sum(0) for _, part in parts(values)) / n
    square = sum((part.flatten(0, -2) - shift).square().sum(0) for _, part in parts(values))
    spread = (square / n).sqrt()
    scale = float(spread.square().mean().sqrt())

    is_finite = all(np.isfinite(part).all() for _, part in parts(array))
    if not is_finite or not math.isfinite(scale):
        fix = "remove the rows with NaN or infinity, or fill them, say with the mean"
        raise UserError(f"{path} has values that are not finite, or too large: {fix}")
    if scale <= 1e-14 * float(shift.abs().max()):
        fix = "there is nothing to learn, give samples that differ"
        raise UserError(f"{path} is constant on every {kind}: {fix}")
    if spread.min() < spread.max() / 100:
        narrow = int(spread.argmin())
        wide = int(spread.argmax())
        warn(
            path,
            f"{kind} {narrow} spreads over {spread[narrow]:.3g}, {kind} {wide} over"
            f" {spread[wide]:.3g}, and one scale serves all: rescale if both matter",
        )
    some = values[:: 1 + values.array[0].size * len(rows) // 2**22]
    some = some.reshape(len(some), -1, array.shape[-1]).numpy()
    warn_of_fill(path, some)
    warn_of_far_rows(path, some, scale)
    return shift.numpy(), scale


def warn(path, text):
    warnings.warn(f"{path}: {text}", stacklevel=3)


def warn_of_axes(path, shape):
    """Fields of shape (N, H, W) or (N, H, W, C) whose axes may be others."""
    height, width, *channels = shape[1:]
    taken = f"{shape} taken for images of height {height} and width {width}"
    if not channels and height != width:
        warn(path, f"{taken}: give (N, L, 1, C) if they are series of length L with C channels")
    if channels and channels[0] >= min(height, width) and width > 1:
        fix = "transpose it if it is (N, C, H, W); of a volume (N, D, H, W) slices become channels"
        warn(path, f"{taken} with {channels[0]} channels: {fix}")


def warn_of_fill(path, some):
    """A value that stands for "missing", as -9999 does: frequent, and far from all others."""
    for values in np.moveaxis(some, 2, 0):
        found, counts = np.unique(values, return_counts=True)
        for value in {found[counts.argmax()], found[0], found[-1]}:
            is_value = values == value
            others = values[~is_value]
            if is_value.sum() < max(3, 0.001 * values.size) or not len(others):
                continue
            low, middle, high = np.quantile(others, (0.05, 0.5, 0.95))
            if abs(value - middle) > 20 * (high - low) > 0:
                warn(
                    path,
                    f"{100 * is_value.mean():.2g} % of the values are {value:.6g}, far from all"
                    " others: if that stands for missing values, fill them, say with the mean",
                )
                return


def warn_of_far_rows(path, some, scale):
    """A few rows so far from the others that these become nearly equal in network units."""
    off = some - np.median(some, (0, 1))
    distance = np.sqrt(np.square(off).mean((1, 2)))
    near = float(np.median(distance))
    few = np.mean(distance > scale) < 0.1
    if few and near < scale / 6:  # Gaussians: 0.7 to 1; Student's t, 3 degrees of freedom: 0.4
        warn(
            path,
            f"half of the rows lie within {near:.2g} of the median, but a few set the scale of all,"
            f" {scale:.2g}: are they data?",
        )
