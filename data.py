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
from pathlib import Path

import numpy as np
import torch

from formats import official, pictures
from formats.files import UserError, absolute, reading
from formats.png import extent, histogram, image_grid, titled

DIGITS_FILE = Path(__file__).resolve().parent / "assets" / "digits.npz"
ARRAYS = (".npy", ".npz")
LARGE = 2**30  # bytes: a larger .npy or cache stays on the disk, and batches read their rows


@dataclass
class Rows:
    """Rows of an array, which are read and converted when they are indexed: rows[index] is
    change(array[...]) as a tensor, its channels moved from the last axis to the second."""

    array: np.ndarray
    rows: np.ndarray  # which of its rows
    change: object  # function: array -> array of the same shape

    @property
    def shape(self):
        _, *sides, C = self.array.shape
        return len(self.rows), C, *sides

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        part = self.change(self.array[np.atleast_1d(self.rows[index])])
        return torch.from_numpy(np.moveaxis(part, -1, 1)).contiguous()


def parts(x):
    """Yields (first row, rows) of a tensor or Rows, some megabytes at a time; at least one part."""
    step = max(1, 2**21 // math.prod(x.shape[1:]))
    for start in range(0, max(1, len(x)), step):
        yield start, x[start : start + step]


def some(x):
    """Rows from all over a tensor or Rows: all of them, or some million numbers."""
    return x[:: 1 + math.prod(x.shape) // 2**22]


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
    draw: object = None  # function: n, generator=None -> fresh points (n, D)
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
        """The same with batches on that device; the data themselves stay on the CPU."""
        return replace(self, device=torch.device(device))

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
        x = self.train[index]
        if self.flip:
            mirrored = torch.rand(n) < 0.5
            x[mirrored] = x[mirrored].flip(-1)
        label = None
        if self.train_labels is not None:
            label = send(self.train_labels[index], self.device)
        return self.units(send(x, self.device)), label

    def held_out(self, rows):
        """Held-out samples in network units, and their labels or None, on the CPU. rows: a slice,
        or indices."""
        label = None if self.test_labels is None else self.test_labels[rows]
        return self.units(self.test[rows]), label

    def held_out_name(self, i):
        """The file of held-out sample i where there is one, or its number in words."""
        return self.files[i] if self.files else f"held-out sample {i} of {self.name}"

    def summary(self):
        """The facts of the training data that a checkpoint keeps: what sampling needs, and what
        tells these data from others."""
        facts = {
            "kind": self.kind,
            "shape": list(self.shape),
            "shift": torch.as_tensor(self.shift).tolist(),
            "scale": self.scale,
            "labels": len(self.names),
            "names": list(self.names),
            "window": None,
        }
        # what pictures of the samples show
        if self.kind == "points":
            facts["window"] = extent(finish(some(self.train), facts))
        if self.kind == "field":
            shown = finish(some(self.train), facts)[..., :3]
            facts["window"] = np.quantile(shown, (0.001, 0.999)).tolist()
        return facts | self.moments()

    def moments(self):
        """Facts of all training values in network units: their standard deviation, a bound on their
        size, and the means (C, H, W) or (D,) of all samples and of each class (without classes, of
        one class; None for so many that they would be too large). Means are those of what a network
        meets: of mirrored images, too."""
        n = len(self.train)
        size = math.prod(self.shape)
        label = self.train_labels
        if label is None:
            label = torch.zeros(n).long()
        count = label.bincount(minlength=len(self.names))

        # as they are kept, for sums of pixels are exact
        sums = torch.zeros(len(count), size).double()
        square = 0.0
        largest = 0.0
        for start, part in parts(self.train):
            x = part.flatten(1).double()
            sums.index_add_(0, label[start : start + len(x)], x)
            square += x.square().sum()
            largest = max(largest, float(x.abs().max()))
        total = sums.sum(0)
        centre = total.mean() / n
        std = math.sqrt(square / (n * size) - centre**2)

        # of all samples, then of each class
        means = torch.cat([total[None] / n, sums / count.clamp(min=1)[:, None]])
        means = self.units(means).float().reshape(-1, *self.shape)
        if self.flip:
            means = (means + means.flip(-1)) / 2
        return {
            "counts": count.tolist(),
            "std": std / 127.5 if self.is_image else std,
            "bound": 1.0 if self.is_image else 1.1 * largest,
            "mean": means[0],
            "class_means": means[1:] if means.numel() < 2**24 else None,
        }


def send(x, device):
    """x on that device. To a GPU it goes from pinned memory: without, the copy would wait until the
    GPU has nothing left to do."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def finish(x, facts):
    """Samples in network units -> numpy: uint8 (N, H, W, C), or floats (N, D) or (N, H, W, C) in
    the units of the file: float32, or float64 where float32 would round by more than 1e-4 scale."""
    x = x.cpu().movedim(1, -1)
    if facts["kind"] == "image":
        pixels = ((x.float() + 1) * 127.5).round().clamp(0, 255)
        return pixels.to(torch.uint8).numpy()
    scale = facts["scale"]
    shift = np.array(facts["shift"])
    values = x.double().numpy() * scale + shift
    is_near = np.abs(shift).max() < 1000 * scale
    return values.astype(np.float32 if is_near else np.float64)


# -------------------------------------------------------------------------------------------------
# Words and pictures


def describe(dataset):
    """How many training samples there are, and of what size: channels and sides by name."""
    n = len(dataset.train)
    C, *sides = dataset.shape
    plural = "s" if C > 1 else ""
    if not sides:
        return f"{n} points of {C} number{plural}"
    height, width = sides
    if width == 1:
        return f"{n} series of length {height} with {C} channel{plural}"
    return f"{n} images of height {height} and width {width} with {C} channel{plural}"


def picture(array, facts, labels=None):
    """Finished samples as a picture, uint8 (H, W) or (H, W, 3): of points a histogram in the
    window, of numbers bars, of images a grid; of fields the first three channels between the
    window's ends. labels (N,): one row for each class that occurs, its name beside it, at most 32
    columns."""
    if facts["kind"] == "points":
        drawn = histogram(array, limit=facts["window"])
        dimensions = array.shape[1]
        return titled(drawn, f"axes 0 and 1 of {dimensions}") if dimensions > 2 else drawn

    if facts["kind"] == "field":
        level = np.interp(array[..., :3], facts["window"], (0, 255))
        array = np.nan_to_num(level).round().astype(np.uint8)
        if array.shape[3] == 2:  # there is no picture of two channels
            array = array[..., [0, 1, 0]]

    names = []
    if labels is not None:
        classes, counts = np.unique(labels, return_counts=True)
        names = [facts["names"][k] for k in classes]
    if len(names) < 2:  # a grid says more than one row
        return image_grid(array[:1024], names=names)

    # a row for each class, its empty places grey
    columns = min(32, counts.max())
    cells = []
    for k in classes:
        shown = array[labels == k][:columns]
        empty = np.full((columns - len(shown), *array.shape[1:]), 128, np.uint8)
        cells += [shown, empty]
    return image_grid(np.concatenate(cells), columns, names=names)


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
        raise UserError(f"--data-dir is for {', '.join(OFFICIAL)}, not for {name}: leave it out")
    if flip is None:
        flip = name in ("cifar10", "imagenet64")

    # points that are drawn, from one seed those that are kept
    if name in POINTS:
        draw = POINTS[name]
        generator = torch.Generator().manual_seed(0)
        train = draw(10_000, generator)
        test = draw(10_000, generator)
        return Dataset(name, "points", train, test, draw=draw)
    # arrays: official files, digits, the user's own
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
    is_array = name in SHAPES or name.endswith(ARRAYS)
    if size and is_array:
        raise UserError(f"--size {size} is for a folder or zip of pictures: leave it out")
    if name in SHAPES:
        return SHAPES[name]
    path = path_of(name, size)
    if not is_array:
        return 3, size, size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `load` gives them again
        array, _ = as_samples(path, read_array(path)["array"])
    return np.moveaxis(array[0], -1, 0).shape


def path_of(name, size):
    """The array file, or the folder or zip of pictures, of that name. UserError if neither."""
    path = Path(os.path.expanduser(name))
    wanted = f"give {', '.join(NAMES)}, an .npy/.npz file, a folder or zip of pictures"
    if not os.path.exists(path):  # which is False for a name that is too long, too
        neighbours = map(str, path.parent.glob("*"))
        near = difflib.get_close_matches(name.lower(), [*NAMES, *neighbours], 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"no such file or folder, and no data set {name[:99]!r}{hint}: {wanted}")
    if path.suffix in ARRAYS:
        return path
    if path.is_file() and path.suffix.lower() != ".zip":
        raise UserError(f"{path} is no data: {wanted}")
    if not size:
        raise UserError(f"{path} is for pictures: add --size, their pixels a side, 16 on a CPU")
    return path


def read_array(path):
    """Of an .npy or .npz file the samples, `array`, and if it has them, the `labels` and the
    `names` of the classes. Never unpickles, never guesses."""
    fix = "write one array with numpy.save or numpy.savez, and no Python objects, as images of"
    with reading(path, f"{fix} different sizes are"):
        file = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(file, np.ndarray):
            return {"array": file}
        # of several arrays the samples are `images` or `x`
        more = {"labels", "names"}
        keys = set(file) - more
        chosen = keys & {"images", "x"} or keys
        if {"images", "x"} <= keys:
            raise ValueError("it holds images and x: keep one of them")
        if len(chosen) != 1:
            raise ValueError(f"it holds {file.files}: call the samples images or x")
        (key,) = chosen
        found = {"array": file[key]}
        for name in more & set(file):
            found[name] = file[name]
    if len(keys) > 1:
        warn(path, f"the samples are {key}; the other arrays are not used")
    return found


def as_samples(path, array):
    """The array with its channels last, and its kind: "image" for uint8 (N, H, W) or (N, H, W, C),
    "points" for floats (N, D), "field" for floats or uint16 (N, H, W, C). UserError where it is
    none of these, or could be two of them."""
    shape = array.shape
    found = f"{path}: {array.dtype} {shape}"
    is_image = array.dtype == np.uint8
    is_float = array.dtype.kind == "f"
    is_uint16 = array.dtype.type is np.uint16  # of either byte order
    is_field = is_float or (is_uint16 and len(shape) > 2)
    if not array.size:
        raise UserError(f"{found} is empty: give at least one sample")
    if not (is_image or is_field):
        raise UserError(f"{found} is no data: convert images to uint8 (0..255), points to float32")
    if is_float and len(shape) == 2:
        return array, "points"
    # (N, H, W), unless it looks like one picture (H, W, C)
    if len(shape) == 3:
        is_rgba = shape[2] == 4 and shape[1] > 4
        if shape[2] in (1, 3) or is_rgba:
            fix = "give (N, H, W, C), and of series (N, L, 1, C)"
            raise UserError(f"{found} may be one picture or many: {fix}")
        array = array[..., None]
    if array.ndim != 4 or (is_image and array.shape[3] not in (1, 3)):
        raise UserError(
            f"{found} is no data: images are uint8 (N, H, W) or (N, H, W, C), C 1 or 3; of floats,"
            " points are (N, D), images (N, H, W, C), series (N, L, 1, C), and of a volume the"
            " slices can be channels, (N, H, W, slices)"
        )
    if is_field:
        warn_of_axes(path, shape)
    return array, "image" if is_image else "field"


def samples(path, array, labels=None, names=(), held_out=None, no_labels="", files=()):
    """The arrays of a file as a Dataset. held_out: rows. files: the name of each row's file."""
    array, kind = as_samples(path, array)
    train_rows, test_rows = split(len(array), held_out)
    units = {}
    change = np.uint8  # which leaves pixels as they are
    # pixels stay as they are, floats are brought to network units
    if kind == "image":
        low = array.min()
        high = array.max()
        if low == high:
            raise UserError(f"{path} has pixels of {low} alone: give pictures that differ")
        if high == 1:
            raise UserError(
                f"{path} has pixels of 0 and 1, but 255 is white: multiply masks by 255"
            )
    else:
        shift, scale = standard(path, array, train_rows)
        units = {"shift": torch.from_numpy(shift), "scale": scale}

        def change(part):
            return np.float32((part - shift) / scale)

    train = in_memory(Rows(array, train_rows, change))
    test = in_memory(Rows(array, test_rows, change))
    name = path.resolve().stem
    dataset = Dataset(name, kind, train, test, no_labels=no_labels, **units)
    if labels is not None:
        labels, dataset.names = check_labels(path, labels, names, len(array))
        dataset.train_labels = torch.from_numpy(labels[train_rows])
        dataset.test_labels = torch.from_numpy(labels[test_rows])
    if files:
        dataset.files = [files[row] for row in test_rows]
    return dataset


def split(n, held_out):
    """The rows to train on, and those that are held out, a slice or indices: by default a fifth,
    drawn at random but always the same."""
    rows = np.arange(n)
    if held_out is None:
        held_out = np.random.default_rng(0).permutation(n)[: n // 5]
    return np.delete(rows, held_out), np.sort(rows[held_out])


def in_memory(rows):
    """Rows -> a tensor of all of them; as they are, if the array is too large."""
    if rows.array.nbytes > LARGE:
        return rows
    return torch.cat([part for _, part in parts(rows)])


def check_labels(path, labels, names, n):
    """Labels as int64 (N,), and a name for each class. UserError if they are not what they should
    be."""
    if labels.shape == (n, 1):
        labels = labels[:, 0]
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        found = "text" if labels.dtype.kind in "US" else f"{labels.dtype} {labels.shape}"
        raise UserError(f"{path}: labels must be {n} integers, one for each sample; found {found}")
    high = int(labels.max())
    if labels.min() < 0 or high >= 10_000:
        raise UserError(f"{path}: labels must be from 0 to 9999; found {labels.min()} to {high}")
    if not np.size(names):
        names = range(high + 1)
    names = [
        n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in np.ravel(names)
    ]
    if high >= len(names):
        raise UserError(f"{path} has labels up to {high}, but {len(names)} names: give all names")
    return labels.astype(np.int64), names


# -------------------------------------------------------------------------------------------------
# Floats: their units, and what is odd about them


def standard(path, array, rows):
    """The mean (C,) of each channel over those rows, and one scale, in float64: float32 would lose
    what lies far from 0. UserError where there is nothing to learn, warnings where values are
    odd."""
    values = Rows(array, rows, np.float64)
    n = len(rows) * math.prod(array.shape[1:-1])  # values of a channel
    axes = (0,) if array.ndim == 2 else (0, 2, 3)  # all but the channels
    # one pass over the rows for the mean, one for the spread of each channel
    shift = sum(x.sum(axes, keepdim=True) for _, x in parts(values)) / n
    square = sum((x - shift).square().sum(axes) for _, x in parts(values))
    spread = (square / n).sqrt()
    scale = math.sqrt(square.mean() / n)

    # a sum is finite only if all of its terms are
    with np.errstate(invalid="ignore"):
        total = array.sum(dtype=np.float64)
    if not math.isfinite(scale + total):
        fix = "remove the rows with NaN or infinity, or fill them, say with the mean"
        raise UserError(f"{path} has values that are not finite, or too large: {fix}")
    if scale <= 1e-14 * shift.abs().max():
        raise UserError(f"{path} is constant in every channel: give samples that differ")
    if spread.min() < spread.max() / 100:
        warn(
            path,
            f"axis or channel {spread.argmin()} spreads over {spread.min():.3g}, {spread.argmax()}"
            f" over {spread.max():.3g}, and one scale serves all: rescale if both matter",
        )
    sample = some(values).numpy()
    off = sample - np.median(sample, axes, keepdims=True)
    warn_of_fill(path, sample)
    warn_of_far_rows(path, off, scale)
    return shift.flatten().numpy(), scale


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


def warn_of_fill(path, sample):
    """A value that stands for "missing", as -9999 does: frequent in one channel of the sample
    (N, C, ...), and far from all others, so that it is the smallest or the largest there."""
    for values in sample.swapaxes(0, 1):
        for value in (values.min(), values.max()):
            count = np.sum(values == value)
            if not max(3, values.size / 1000) <= count < values.size:
                continue
            others = values[values != value]
            low, middle, high = np.quantile(others, (0.05, 0.5, 0.95))
            spread = high - low
            if spread > 0 and abs(value - middle) > 20 * spread:
                warn(
                    path,
                    f"{100 * count / values.size:.2g} % of the values are {value:.6g}, far from all"
                    " others: if that stands for missing values, fill them, say with the mean",
                )
                return


def warn_of_far_rows(path, off, scale):
    """A few rows so far from the others that these become nearly equal in network units. off:
    differences from the median of each channel."""
    squares = np.square(off).reshape(len(off), -1)
    distance = np.sqrt(squares.mean(1))
    near = np.median(distance)
    few = np.mean(distance > scale) < 0.1
    if few and near < scale / 6:  # Gaussians: 0.7 to 1; Student's t, 3 degrees of freedom: 0.4
        warn(
            path,
            f"half of the rows lie within {near:.2g} of the median, but a few set the scale of all,"
            f" {scale:.2g}: are they data?",
        )
