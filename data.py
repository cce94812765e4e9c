"""Data and pictures: name or file -> one tensor, or rows of a file -> batches in [-1, 1] -> pixels -> PNG.

    gmm, spiral, checkerboard, moons   2-D points, drawn afresh for every batch
    digits                             1,797 grey 8x8 images in assets/digits.npz
    fashion                            Fashion-MNIST, 28x28 grey, four IDX gz files
    cifar10                            CIFAR-10, 32x32 colour, the official binary archive
    imagenet64                         ImageNet, 64x64 colour, the official eleven .npz files
    FILE.npy, FILE.npz                 uint8 images (N, H, W) or (N, H, W, C), or float points (N, D)
    FOLDER, FILE.zip                   pictures that Pillow reads, each brought to --size; sub-folders are classes

Images stay uint8 and `batch` converts them to [-1, 1]; points are centred and scaled once, in float64, when they are
read; `to_pixels` and `to_points` convert back. No workers: a batch is one indexing operation on the training device.
What has more than LARGE bytes stays in the file (.npy) or in memory, and one thread reads the next batch ahead.

digits is the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0), taken from scikit-learn's `load_digits`; the
only change is from 17 grey levels v to uint8, round(v * 255 / 16).
"""

import difflib
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import re
import secrets
import struct
import sys
import tarfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

DIGITS_FILE = Path(__file__).resolve().parent / "assets" / "digits.npz"
FASHION_DIR = "/usr/share/datasets/fashion-mnist"  # where Debian's package puts it
FASHION_URL = "https://github.com/zalandoresearch/fashion-mnist/tree/master/data/fashion"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # 170,052,171 bytes
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
CIFAR10_TEST = "test_batch.bin"
IMAGENET64 = [*(f"train_data_batch_{i}.npz" for i in range(1, 11)), "val_data.npz"]
IMAGENET64_URL = "https://image-net.org/download-images"  # for registered users
FORMATS = "PNG JPEG WEBP GIF BMP TIFF".split()  # of pictures; Pillow's others could start foreign programs
ARRAYS = (".npy", ".npz")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
LIMIT = 200 * 10**6  # bytes: no set that is read compressed or from the internet is larger, no picture in a zip
LARGE = 2**30  # bytes: training takes as much for a net worth so many images. What is larger stays where it is


class UserError(Exception):
    """A mistake of the user, a broken file, a full disk: one line that names the cause and the fix."""


def why(error):
    """The text of an exception on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def lock(file):
    """Whether the open file is now this process's alone: until it is closed, or the process ends, however it ends."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows and some network file systems have no such locks
        pass
    return True


def open_part(path):
    """The file `path`, made where it lacks, to be written in parts by this process alone."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # a link could make us write anywhere
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "r+b", opener=lambda path, _: os.open(path, flags, 0o666))  # noqa: SIM115, it stays open
    if not lock(file):
        file.close()
        raise UserError(f"another process is writing {path}: wait for it, then run again")
    return file


def write_files(files):
    """Write {path: bytes or function(file)}, all or none: under temporary names of their own first, then renamed."""
    temporary, path = {}, None
    try:
        for path, content in files.items():
            temporary[path] = f"{path}.{secrets.token_hex(4)}.tmp"
            with open(temporary[path], "xb") as file:
                content(file) if callable(content) else file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, name in temporary.items():
            os.replace(name, path)
    except (OSError, RuntimeError) as error:  # torch.save turns the first, and what a signal raises, into the second
        if error.__context__ and not isinstance(error.__context__, Exception):
            raise error.__context__ from None
        done = [str(p) for p, name in temporary.items() if p != path and not os.path.exists(name)]
        kept = f"; wrote {', '.join(done)}" if done else "; nothing was written"
        raise UserError(f"cannot write {path} ({why(error)}){kept}: make room, or choose another folder") from None
    finally:
        for name in temporary.values():
            Path(name).unlink(missing_ok=True)


class Rows:
    """array[rows] of uint8 images (N, H, W, C) that lie in a file, indexed like a tensor (N, C, H, W)."""

    def __init__(self, array, rows):
        self.array, self.rows, self.dtype, self.nbytes = array, torch.from_numpy(rows), torch.uint8, array.nbytes
        self.shape = (len(rows), array.shape[3], *array.shape[1:3])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return torch.from_numpy(self.array[self.rows[index].numpy()]).permute(0, 3, 1, 2).contiguous()


@dataclass
class Dataset:
    name: str
    train: torch.Tensor | Rows  # uint8 (N, C, H, W), or float32 (N, D) in network units
    test: torch.Tensor  # held out, the same kind; may be empty for small files
    train_labels: torch.Tensor | None = None  # int64 (N,)
    test_labels: torch.Tensor | None = None
    draw: Callable | None = None  # n -> fresh points (n, D)
    flip: bool = False  # mirror half of the training images
    shift: torch.Tensor | float = 0.0  # points as given = shift + scale * points in network units; float64
    scale: float = 1.0  # one number for all axes keeps the shape of the data
    device: torch.device = torch.device("cpu")  # noqa: RUF009, of the batches
    ahead: tuple = ()  # rows that a thread reads, and the promise of their images
    reader = ThreadPoolExecutor(1)

    @property
    def shape(self):
        """Shape of one sample: (C, H, W) or (D,)."""
        return tuple(self.train.shape[1:])

    @property
    def is_image(self):
        return self.train.dtype == torch.uint8

    @property
    def bound(self):
        """The largest |value| that a network may meet in the data."""
        return 1.0 if self.is_image else 1.1 * max(-float(self.train.min()), float(self.train.max()))

    @property
    def mean(self):
        """The mean of what a network meets, over all training samples: float32 (C, H, W) or (D,)."""
        kind = np.int64 if self.is_image else np.float64  # torch's sum over the first axis is ten times slower
        total = sum(part.cpu().numpy().sum(0, dtype=kind) for part in parts(self.train))
        mean = torch.from_numpy(total / len(self.train))
        return (mean / 127.5 - 1 if self.is_image else mean).float()

    @property
    def std(self):
        """The standard deviation of what a network meets, over all training samples and dimensions."""
        if not self.is_image:
            sums = [sum(float(part.double().pow(k).sum()) for part in parts(self.train)) for k in (1, 2)]
            return math.sqrt(sums[1] / self.train.numel() - (sums[0] / self.train.numel()) ** 2)
        count = sum(part.flatten().bincount(minlength=256).cpu() for part in parts(self.train)).double()
        value = torch.arange(256).double() / 127.5
        centred = value - (count * value).sum() / count.sum()
        return float(((count * centred**2).sum() / count.sum()).sqrt())

    def labels_summary(self):
        """What a checkpoint keeps of the classes: `labels`, how many there are, and `class_means`, E[x | label] of what
        a network meets, float32 (labels, *shape), where they are small."""
        classes, size = 0 if self.train_labels is None else int(self.train_labels.max()) + 1, math.prod(self.shape)
        if not 0 < classes <= 10_000:
            raise UserError(f"{self.name} has {classes or 'no'} classes, --classes wants labels from 0 to at most 9999")
        count = self.train_labels.bincount(minlength=classes)
        if empty := (count == 0).nonzero().flatten().tolist():
            warnings.warn(f"{self.name} has no sample of class {', '.join(map(str, empty[:9]))} to learn", stacklevel=2)
        if classes * size > 2**22:
            return {"labels": classes}
        total, i = torch.zeros(classes, size, dtype=torch.float64), 0
        for part in parts(self.train):
            total.index_add_(0, self.train_labels[i : i + len(part)], part.flatten(1).double())
            i += len(part)
        mean = total / count.clamp(min=1)[:, None]
        mean = (mean / 127.5 - 1 if self.is_image else mean).float()
        return {"labels": classes, "class_means": mean.reshape(classes, *self.shape)}

    def summary(self):
        """What a checkpoint keeps of its data: what sampling needs, and what tells them from other data."""
        units = {"shape": list(self.shape), "shift": torch.as_tensor(self.shift).tolist(), "scale": self.scale}
        window = None if self.is_image else extent(self.to_points(self.train[:: max(1, len(self.train) // 10_000)]))
        return {**units, "bound": self.bound, "std": self.std, "data_mean": self.mean, "window": window}

    def to(self, device):
        """The same with batches on that device; what is LARGE stays, and so does shift, as not all have float64."""
        small = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor) and v.nbytes <= LARGE}
        return replace(self, **{k: v.to(device) for k, v in small.items() if k != "shift"}, device=torch.device(device))

    def batch(self, n):
        """x (n, C, H, W) in [-1, 1] or (n, D) of unit scale, float32, and its labels (n,) or None, with replacement.

        All randomness is the global CPU generator's, whatever the device: its state is enough to resume exactly.
        """
        if self.draw:
            return send(self.draw(n), self.device), None
        index = torch.randint(len(self.train), (n,))
        there = send(index, self.device)
        if self.train.nbytes <= LARGE:
            x = self.train[there]
        else:
            known, promise = self.ahead or (index[:0], None)
            x = send(promise.result() if torch.equal(known, index) else self.train[index], self.device)
        label = None if self.train_labels is None else self.train_labels[there]
        if not self.is_image:
            return x, label
        if self.flip:
            mirrored = send(torch.rand(n) < 0.5, self.device)
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return x / 127.5 - 1, label

    def read_ahead(self, n):
        """Lets a thread read what `batch(n)` will ask for, if that is the next to draw. The generator stays as it was:
        no number and no checkpoint depends on this, and a wrong guess costs the reading only."""
        if self.train.nbytes > LARGE:
            with torch.random.fork_rng(devices=[]):
                index = torch.randint(len(self.train), (n,))
            self.ahead = index, self.reader.submit(self.train.__getitem__, index)

    @staticmethod
    def to_pixels(x):
        """Images (B, C, H, W) in [-1, 1] -> uint8 numpy (B, H, W, C), rounded and clamped."""
        pixels = ((x.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    def to_points(self, x):
        """Points (B, D) in network units -> numpy (B, D) in the units of the data."""
        return in_units(x, self.shift, self.scale)


def send(x, device):
    """x on that device; to a GPU from pinned memory, or the copy would wait until the GPU has nothing left to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def in_units(x, shift, scale):
    """Points (B, D) in network units -> shift + scale x, worked out in float64: numpy (B, D), float32 unless that would
    round a number by more than 1e-4 scale."""
    points = (x.detach().cpu().double() * scale + torch.as_tensor(shift, dtype=torch.float64)).numpy()
    with np.errstate(over="ignore"):
        short = points.astype(np.float32)
    return short if np.abs(short - points).max(initial=0) <= 1e-4 * scale else points


# ---------------------------------------------------------------------------------------------------------------------
# 2-D sets: n -> float32 (n, 2)


def gmm(n, generator=None):
    """Nine Gaussians of standard deviation 0.04 on a 3x3 grid of spacing 0.5, rotated by 45 degrees."""
    i, j = torch.randint(-1, 2, (2, n), generator=generator) * 0.5
    return torch.stack([i - j, i + j], 1) / math.sqrt(2) + 0.04 * torch.randn(n, 2, generator=generator)


def spiral(n, generator=None):
    """Five swiss rolls: (t cos t, t sin t) for t = 1.5 pi (1 + 2u), noise 0.3, all times 0.05, around five centres."""
    t = 1.5 * math.pi * (1 + 2 * torch.rand(n, 1, generator=generator))
    roll = torch.cat([t * t.cos(), t * t.sin()], 1) + 0.3 * torch.randn(n, 2, generator=generator)
    centres = 1.2 * torch.tensor([[0.0, 0.0], [1, 1], [1, -1], [-1, 1], [-1, -1]])
    return 0.05 * roll + centres[torch.randint(5, (n,), generator=generator)]


def checkerboard(n, generator=None):
    """Uniform on the eight dark unit squares of a 4x4 board over [-2, 2]^2."""
    row, half = torch.randint(4, (n,), generator=generator), torch.randint(2, (n,), generator=generator)
    return torch.stack([2 * half + row % 2, row], 1) - 2 + torch.rand(n, 2, generator=generator)


def moons(n, generator=None):
    """Two interleaved half circles of radius 1.5, each the other's point reflection in 0, with noise 0.075."""
    t = math.pi * torch.rand(n, generator=generator)
    sign = 2 * torch.randint(2, (n, 1), generator=generator) - 1
    arc = torch.stack([t.cos() - 0.5, t.sin() - 0.25], 1)
    return 1.5 * (sign * arc + 0.05 * torch.randn(n, 2, generator=generator))


POINTS = {"gmm": gmm, "spiral": spiral, "checkerboard": checkerboard, "moons": moons}
SHAPES = {**dict.fromkeys(POINTS, (2,)), "digits": (1, 8, 8), "fashion": (1, 28, 28), "cifar10": (3, 32, 32)}
SHAPES["imagenet64"] = (3, 64, 64)
NAMES = list(SHAPES)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(name, data_dir=None, flip=None, size=0):
    """Data set `name` of NAMES, or of that path: an .npy/.npz file, a folder or zip of pictures; on the CPU. UserError
    says what to do otherwise.

    data_dir: where fashion, cifar10 (or its archive) and imagenet64 live. flip: overrides the data set's own choice.
    size: pixels a side of the pictures.
    """
    name = str(name)
    if data_dir and name not in ("fashion", "cifar10", "imagenet64"):
        raise UserError(f"--data-dir is for fashion, cifar10 and imagenet64, not for {name}: leave it out")
    if name in POINTS:
        draw, generator = POINTS[name], torch.Generator().manual_seed(0)
        dataset = Dataset(name, draw(10_000, generator), draw(10_000, generator), draw=draw)
    elif name == "digits":
        dataset = samples(DIGITS_FILE, name, *read_array(DIGITS_FILE), slice(4, None, 5))
    elif name == "fashion":
        dataset = fashion(data_dir)
    elif name == "cifar10":
        dataset = cifar10(data_dir)
    elif name == "imagenet64":
        dataset = imagenet64(data_dir)
    elif (path := path_of(name, size)).suffix in ARRAYS:
        dataset = samples(path, path.stem, *read_array(path))
    else:
        dataset = pictures(path, size)
    return dataset if flip is None else replace(dataset, flip=flip)


def shape_of(name, size=0):
    """Shape of one sample, (C, H, W) or (D,), of the data set or file of that name. For pictures, unread, C is 3."""
    path = None if name in SHAPES else path_of(name, size)
    if path and path.suffix not in ARRAYS:
        return (3, size, size)
    if size:
        raise UserError(f"--size {size} is for a folder or zip of pictures, {name} is neither: leave --size out")
    if not path:
        return SHAPES[name]
    _, *size = as_samples(path, read_array(path)[0]).shape
    return (size[2], *size[:2]) if len(size) == 3 else tuple(size)


def path_of(name, size):
    """The array file, or the folder or zip of pictures, of that name."""
    path = Path(name).expanduser()
    is_array, is_pictures = path.suffix in ARRAYS, path.is_dir() or path.suffix.lower() == ".zip"
    if not is_array and not is_pictures:
        near = difflib.get_close_matches(name.lower(), NAMES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        known = f"{', '.join(NAMES)}, an .npy/.npz file, a folder or zip of pictures"
        raise UserError(f"no data set {name!r}{hint}: give one of {known}")
    if not is_array and not size:
        raise UserError(f"{path} is for pictures: add --size, the pixels a side that they are brought to, say 64")
    return path


def label_tensor(labels):
    return torch.from_numpy(labels.astype(np.int64))


def samples(path, name, array, labels=None, held_out=None):
    """The arrays of a file as a Dataset. held_out: rows; by default a fifth, drawn at random but always the same. No
    flips, as nothing says that a mirror image is data."""
    array = as_samples(path, array)
    n, form = len(array), labels is not None and (labels.shape, labels.dtype.kind)
    if form and (form[0] != (n,) or form[1] not in "iu" or not 0 <= labels.min() <= labels.max() < 2**31):
        raise UserError(f"{path} has bad labels: they must be {n} integers >= 0, one for each sample")
    trains = np.ones(n, bool)
    trains[np.random.default_rng(0).permutation(n)[: n // 5] if held_out is None else held_out] = False
    rows = [np.flatnonzero(trains), np.flatnonzero(~trains)]
    both = [None, None] if labels is None else [label_tensor(labels[r]) for r in rows]
    if array.dtype == np.uint8:
        low, high = int(array.min()), int(array.max())
        if low == high or high == 1:
            raise UserError(f"{path} has pixels from {low} to {high}: 255 is white, so multiply masks by 255")
        if high < 64:
            warnings.warn(f"{path}: the largest pixel is {high}, taken as dark, for white is 255", stacklevel=2)
        if array.nbytes > LARGE:
            return Dataset(name, *(Rows(array, r) for r in rows), *both)
        images = (gather(array, r, lambda part: part.transpose(0, 3, 1, 2), np.uint8) for r in rows)
        return Dataset(name, *images, *both)
    shift, scale = standard(path, array, rows[0])
    train, test = (gather(array, r, lambda part: (part.astype(np.float64) - shift) / scale, np.float32) for r in rows)
    return Dataset(name, train, test, *both, shift=torch.from_numpy(shift), scale=scale)


def as_samples(path, array):
    """The array as uint8 images (N, H, W, C) or float points (N, D). UserError where it is neither, or could be both
    one thing and another."""
    shape, is_image, is_float = array.shape, array.dtype == np.uint8, array.dtype.kind == "f"
    one_or_many = array.ndim == 3 and (shape[2] in (1, 3) or shape[1] > shape[2] == 4)
    channels = array.ndim == 3 or (array.ndim == 4 and shape[3] in (1, 3))
    for wrong, text in (
        (array.size == 0, f"an empty array of shape {shape}: give at least one sample"),
        (not (is_image or is_float), f"dtype {array.dtype}: convert images to uint8 (0..255), points to float32"),
        (is_float and array.ndim in (3, 4), f"float images {shape}: convert them to uint8 (0..255)"),
        (is_float and array.ndim != 2, f"float shape {shape}: points must be (N, D), numbers (N, 1)"),
        (is_image and one_or_many, f"uint8 shape {shape}, which may be one picture or many: give (N, H, W, C)"),
        (is_image and not channels, f"uint8 shape {shape}: images must be (N, H, W) or (N, H, W, C) with C 1 or 3"),
    ):
        if wrong:
            raise UserError(f"{path} has {text}")
    return array[..., None] if array.ndim == 3 else array


def standard(path, points, rows):
    """Mean (D,) and scale of those rows, in float64 and in parts: float32 would lose what lies far from 0."""

    n = len(rows)
    with np.errstate(all="ignore"):  # what overflows is caught as an infinity
        shift = sum(part.astype(np.float64).sum(0) for part in parts(points, rows)) / n
        spread = np.sqrt(sum(np.square(part.astype(np.float64) - shift).sum(0) for part in parts(points, rows)) / n)
        scale = float(np.sqrt(np.square(spread).mean()))
    if not math.isfinite(scale) or not all(np.isfinite(part).all() for part in parts(points)):
        raise UserError(f"{path} has values that are not finite, or too large: remove the rows with NaN or infinity")
    if scale == 0:
        raise UserError(f"{path} holds {n} equal points: there is nothing to learn, give points that differ")
    if spread.min() < spread.max() / 100:
        low, high = (f"axis {i} spreads over {spread[i]:.3g}" for i in (spread.argmin(), spread.argmax()))
        warnings.warn(f"{path}: {low}, {high}, and one scale serves all: rescale if both matter", stacklevel=2)
    if len(points) < points.shape[1]:
        warnings.warn(f"{path}: taken as {len(points)} points of {points.shape[1]} numbers each", stacklevel=2)
    return shift, scale


def parts(array, rows=None):
    """array[rows], or all of it, some megabytes at a time."""
    rows, step = range(len(array)) if rows is None else rows, max(1, 2**21 // math.prod(array.shape[1:]))
    for i in range(0, len(rows), step):
        yield array[i : i + step] if isinstance(rows, range) else array[rows[i : i + step]]


def gather(array, rows, change, dtype):
    """change(array[rows]) as a tensor, made in parts: a large array is never copied twice."""
    out, i = np.empty((len(rows), *change(array[:1]).shape[1:]), dtype), 0
    for part in parts(array, rows):
        out[i : i + len(part)] = change(part)
        i += len(part)
    return torch.from_numpy(out)


def read_array(path):
    """The samples of an .npy/.npz file, and its `labels` or None. Never unpickles, never guesses."""
    if not path.is_file():
        raise UserError(f"no file {path}: give the path of an existing .npy or .npz file")
    try:
        with path.open("rb") as file:  # numpy would leave a broken zip open
            if file.read(6) == b"\x93NUMPY":
                return np.load(path, mmap_mode="r", allow_pickle=False), None
            file.seek(0)
            loaded = np.load(file, allow_pickle=False)
            names = [key for key in loaded.files if key != "labels"]
            known = {"images", "x"} if "arr_1" in names else {"images", "x", "arr_0"}
            chosen = names if len(names) == 1 else [key for key in names if key in known]
            array = loaded[chosen[0]] if len(chosen) == 1 else np.empty(0)
            labels = loaded["labels"] if "labels" in loaded.files else None
    except MemoryError:
        raise
    except Exception as error:  # numpy and zipfile raise a dozen kinds; all mean the same here
        raise UserError(f"cannot read {path} ({why(error)}): write it again with numpy.save or numpy.savez") from None
    if len(chosen) != 1 and names:
        raise UserError(f"{path} holds {', '.join(names)[:200]}: call the samples images or x, the classes labels")
    if not all(isinstance(a, np.ndarray) for a in (array, labels) if a is not None):
        raise UserError(f"{path} is a zip of other files than arrays: write it with numpy.savez")
    if len(names) > 1:
        warnings.warn(f"{path}: the samples are {chosen[0]}; the other arrays are not used", stacklevel=2)
    return array, labels


def fashion(data_dir):
    """Fashion-MNIST. No flips: its shoes all point to the left."""
    folder = Path(data_dir or FASHION_DIR).expanduser()
    pairs = []
    for part in ("train", "t10k"):
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels):
            raise UserError(f"{folder} has {len(images)} {part} images but {len(labels)} labels: fetch the files again")
        pairs.append((torch.from_numpy(images[:, None].copy()), label_tensor(labels)))
    (train, train_labels), (test, test_labels) = pairs
    return Dataset("fashion", train, test, train_labels, test_labels)


def read_idx(path, ndim):
    """IDX of bytes, gzipped: big-endian magic 0x0800 + ndim, ndim sizes, data -> uint8 array of ndim axes."""
    if not path.is_file():
        raise UserError(f"no {path}: apt-get install dataset-fashion-mnist, or get {FASHION_URL} and give --data-dir")
    content = gunzip(path, "fetch it again")
    if len(content) < 4 + 4 * ndim:
        raise UserError(f"{path} is damaged ({len(content)} bytes): fetch it again")
    (magic, *sizes), body = struct.unpack_from(f">{1 + ndim}I", content), content[4 + 4 * ndim :]
    if magic != 0x0800 + ndim or len(body) != math.prod(sizes) or not body:
        raise UserError(f"{path} is no IDX file of {ndim} axes (magic {magic}, sizes {sizes}): fetch it again")
    return np.frombuffer(body, np.uint8).reshape(sizes)


def gunzip(path, fix):
    """The content of a gzip file, which must not exceed LIMIT: a small file can claim to hold more than any memory."""
    try:
        with gzip.open(path) as file:
            content = file.read(LIMIT + 1)  # to the end, where gzip checks its CRC
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({why(error)}): {fix}") from None
    if len(content) > LIMIT:
        raise UserError(f"{path} unpacks to more than {LIMIT / 1e6:.0f} MB: {fix}")
    return content


def cifar10(data_dir):
    """CIFAR-10 from the archive or the unpacked folder that data_dir points at or holds; else from the internet."""
    archive_name, folder_name = CIFAR10_URL.rsplit("/", 1)[1], "cifar-10-batches-bin"
    root = Path(data_dir).expanduser() if data_dir else cache_dir()
    folder = next((f for f in (root, root / folder_name) if (f / CIFAR10_TEST).is_file()), None)
    archive = root if root.is_file() else root / archive_name
    if folder:
        paths = [folder / name for name in (*CIFAR10_TRAIN, CIFAR10_TEST)]
        files = {path.name: path.read_bytes() for path in paths if path.is_file() and path.stat().st_size < LIMIT}
    else:
        if data_dir is None and not archive.is_file():
            download(CIFAR10_URL, CIFAR10_MD5, archive)
        if not archive.is_file():
            state = "has neither" if root.exists() else "does not exist: want a folder with"
            raise UserError(f"--data-dir {root} {state} {archive_name} or {folder_name}/; {CIFAR10_URL} has it")
        files = read_tar(archive)
    where = folder or archive
    train, train_labels = cifar_records(files, CIFAR10_TRAIN, where)
    test, test_labels = cifar_records(files, [CIFAR10_TEST], where)
    return Dataset("cifar10", train, test, train_labels, test_labels, flip=True)


def read_tar(path):
    """{name: content} of the .bin files of a tar.gz, in memory: nothing is unpacked to disk."""
    content = gunzip(path, f"replace it by {CIFAR10_URL}")
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            members = (m for m in tar if m.isfile() and m.name.endswith(".bin") and 0 <= m.size <= len(content))
            return {Path(m.name).name: tar.extractfile(m).read() for m in members}
    except (tarfile.TarError, ValueError, OSError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({why(error)}): replace it by {CIFAR10_URL}") from None


def cifar_records(files, names, where):
    """Records of 1 label byte + 3,072 pixels (R, G, B planes, row-major) -> uint8 (N, 3, 32, 32), int64 (N,)."""
    for name in names:
        if not files.get(name) or len(files[name]) % 3073:
            size = f"{len(files[name])} bytes" if name in files else "missing"
            raise UserError(f"{where}: {name} is {size}, wanted n x 3073 bytes: fetch {CIFAR10_URL} again")
    records = np.frombuffer(b"".join(files[name] for name in names), np.uint8).reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise UserError(f"{where} has labels over 9, so it is not CIFAR-10's binary version: get {CIFAR10_URL}")
    return torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()), label_tensor(records[:, 0])


def imagenet64(data_dir):
    """Downsampled ImageNet (Chrabaszcz, Loshchilov & Hutter 2017, arXiv 1707.08819): .npz files of `data`, uint8
    (N, 12288) in planes R, G, B, and `labels`, 1..1000. Its validation images are held out."""
    folder = Path(data_dir or cache_dir()).expanduser()

    def read(name, key):
        try:
            with np.load(folder / name, allow_pickle=False) as file:
                return file[key] if key == "data" else file[key].reshape(-1).astype(np.int64) - 1
        except MemoryError:
            raise
        except Exception as error:  # as in read_array
            raise UserError(f"cannot read {folder / name} ({why(error)}): get it from {IMAGENET64_URL}") from None

    def images(name):
        array, n = read(name, "data"), len(labels[name])
        if array.dtype != np.uint8 or array.shape != (n, 12288):
            raise UserError(f"{folder / name}: data {array.dtype} {array.shape} for {n} labels, get it again")
        return array.reshape(n, 3, 64, 64).transpose(0, 2, 3, 1), []

    labels = {name: read(name, "labels") for name in IMAGENET64}
    array, _ = converted("imagenet64", folder, 64, IMAGENET64, images)
    held_out = slice(-len(labels[IMAGENET64[-1]]), None)
    return replace(samples(folder, "imagenet64", array, np.concatenate([*labels.values()]), held_out), flip=True)


def walk(folder):
    """The files below it, through links too; OSError for what is closed."""

    def closed(error):
        raise error

    seen = set()
    for root, folders, files in os.walk(folder, onerror=closed, followlinks=True):
        folders[:] = [f for f in folders if os.path.realpath(os.path.join(root, f)) not in seen]
        seen.update(os.path.realpath(os.path.join(root, f)) for f in folders)
        yield from (Path(root, f).relative_to(folder).as_posix() for f in files if Path(root, f).is_file())


def decode(file):
    """A picture file, or its path -> Pillow's image, RGB of 8 bits, upright, on white; and {kind: whether it was}."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(file, formats=FORMATS)
        mode, alpha = image.mode, "A" in image.getbands() or "transparency" in image.info
        grey, wide, turned = mode in ("1", "L", "LA"), mode[0] == "I", image.getexif().get(0x0112) in range(2, 9)
        kinds = {"grey": grey or wide, "16-bit": wide, "CMYK": mode == "CMYK", "palette": mode[0] == "P"}
        kinds |= {"transparent": alpha, "turned by EXIF": turned, "animated": getattr(image, "is_animated", False)}
        if mode == "F":
            raise ValueError("its pixels are floats")
        image = ImageOps.exif_transpose(image)
    if wide:
        image = Image.fromarray(((np.asarray(image).astype(int).clip(0, 65535) + 128) // 257).astype(np.uint8))
    elif alpha:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB"), kinds


def pictures(path, size):
    """A folder or zip of pictures: the central square of each, brought to size x size by Lanczos' filter; grey if all
    are. Sub-folders are classes in the order of their names, if no picture lies outside of them."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError(f"pip install pillow to read the pictures of {path}") from None
    try:
        archive = None if path.is_dir() else zipfile.ZipFile(path)
        files = set(archive.namelist() if archive else walk(path))
        names = sorted(n for n in files if n.lower().endswith(ENDINGS) and not re.search(r"(^|/)(\.|__MACOSX/)", n))
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"cannot read {path} ({why(error)}): give a folder or zip of pictures") from None
    if not names:
        raise UserError(f"{path} has no pictures: give a folder or zip with files {' '.join(ENDINGS)}")

    def read(name):
        if archive and archive.getinfo(name).file_size > LIMIT:
            raise ValueError(f"unpacks to more than {LIMIT / 1e6:.0f} MB")
        try:
            with archive.open(name) if archive else open(path / name, "rb") as file:
                image, kinds = decode(file)
        except OSError as error:
            if error.errno:  # not the picture's fault: what cannot be read today may be there tomorrow
                raise UserError(f"cannot read {path / name} ({why(error)}): make it readable, or remove it") from None
            raise
        kinds["enlarged"] = min(image.size) < size
        square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        return np.asarray(square)[None], [key for key, value in kinds.items() if value]

    array, state = converted(path.stem, path, size, names, read)
    skipped, n = dict(state["skipped"]), len(array)
    folders = [Path(name).parts[:-1] for name in names if name not in skipped]
    while all(folders) and len({f[0] for f in folders}) == 1:
        folders = [f[1:] for f in folders]
    classes = {name: i for i, name in enumerate(sorted({f[0] for f in folders}))} if all(folders) else {}
    notes = [f"{path}: {n} pictures {array.shape[1:]}"]
    if classes:
        notes.append(f"{len(classes)} classes: {', '.join(f'{i} {name}' for name, i in [*classes.items()][:20])}")
    notes += [f"{k} {key}" for key, k in state["notes"].items() if key != "grey" or k < n]
    if skipped:
        broken = ", ".join(f"{why(name)} ({text})" for name, text in [*skipped.items()][:5])
        notes.append(f"{len(skipped)} broken and skipped: {broken}")
    print("; ".join(notes), file=sys.stderr)
    return samples(path, path.stem, array, np.array([classes[f[0]] for f in folders]) if classes else None)


def converted(title, source, size, names, read):
    """The images of all files, uint8 (N, size, size, C), memory-mapped, and the manifest: an .npy and a .json in the
    cache, made once. After a kill a call goes on where the manifest was written last. Needs twice the room for a while.

    read(name) -> uint8 (n, size, size, 3), and kinds of what was converted. What it fails for is skipped; a UserError
    ends all. C is 1 if all are of the kind "grey".
    """
    stats = [os.stat(p) for p in ([source / n for n in names] if source.is_dir() else [source])]
    tag = hashlib.sha256(f"{source.resolve()} {size}".encode(errors="backslashreplace")).hexdigest()[:8]
    key = hashlib.sha256(repr([names, [(s.st_size, s.st_mtime_ns) for s in stats]]).encode()).hexdigest()
    path, row = cache_dir() / f"{title}-{size}-{tag}.npy", 3 * size**2
    part, manifest, due = path.with_suffix(".part"), path.with_suffix(".json"), 0
    blank, fits = {"source": str(source), "key": key, "done": 0, "rows": 0, "notes": {}, "skipped": []}, False
    with suppress(OSError, ValueError, AttributeError):
        state = json.loads(manifest.read_text())
        fits = {k: type(v) for k, v in state.items()} == {k: type(v) for k, v in blank.items()} and state["key"] == key
    if fits and path.is_file():
        with suppress(UserError):  # a file that was cut is made again
            return read_array(path)[0], state
    try:
        with open_part(part) as file:
            if not fits or file.seek(0, os.SEEK_END) < row * state["rows"]:
                path.unlink(missing_ok=True)
                state = blank
            file.truncate(row * state["rows"])
            file.seek(0, os.SEEK_END)
            for i in range(state["done"], len(names)):
                try:
                    images, notes = read(names[i])
                except (UserError, MemoryError):
                    raise
                except Exception as error:  # Pillow raises a dozen kinds
                    state["skipped"].append((names[i], why(error).split(" <")[0]))
                else:
                    file.writelines(np.ascontiguousarray(block) for block in parts(images))
                    state["rows"] += len(images)
                    state["notes"] = Counter(state["notes"]) + Counter(notes)
                state["done"] = i + 1
                if time.monotonic() > due or i + 1 == len(names):
                    file.flush()
                    os.fsync(file.fileno())
                    write_files({manifest: json.dumps(state).encode()})
                    print(f"{source}: {i + 1} of {len(names)} files read", file=sys.stderr, flush=True)
                    due = time.monotonic() + 5
            if not (n := state["rows"]):
                raise UserError(f"{source} has no picture that can be read: {': '.join(state['skipped'][0])}")

            def write(target):
                shape = (n, size, size, 1 if state["notes"].get("grey") == n else 3)
                np.lib.format.write_array_header_1_0(target, {"descr": "|u1", "fortran_order": False, "shape": shape})
                whole = np.memmap(file, np.uint8, "r", shape=(n, size, size, 3))
                target.writelines(np.ascontiguousarray(block[..., : shape[3]]) for block in parts(whole))

            write_files({path: write})
        part.unlink()
    except OSError as error:
        raise UserError(f"cannot write {part} ({why(error)}): make room, or set XDG_CACHE_HOME elsewhere") from None
    return read_array(path)[0], state


def cache_dir():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phase-ref"


def download(url, md5, target):
    """Fetch url to target through target.part, which a later call resumes; target only ever appears whole."""
    part = target.with_name(target.name + ".part")
    by_hand = f"fetch {url} by hand and give --data-dir"
    try:
        with open_part(part) as file:
            if target.is_file():  # it has just finished
                return
            done, total = fetch(url, file)
            if done < total:
                raise OSError(f"stopped at {done} of {total} bytes")
            file.seek(0)
            found = hashlib.md5(file.read(), usedforsecurity=False).hexdigest()
            if found != md5:
                part.unlink()
                raise UserError(f"{url} came with MD5 {found}, wanted {md5}; removed it: run again, or {by_hand}")
            part.replace(target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if part.is_file() and not part.stat().st_size:
            part.unlink()
        raise UserError(f"download failed ({why(error)}): run again to resume, or {by_hand}") from None


class OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to where nobody on the way can change what comes."""

    def redirect_request(self, request, file, code, message, headers, url):
        if not url.lower().startswith("https://"):
            raise OSError(f"redirected to {url[:100]}, which is not https")
        return super().redirect_request(request, file, code, message, headers, url)


def fetch(url, file):
    """Append the rest of url to the open file. Bytes now there, and bytes wanted as far as the server tells."""
    done = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.build_opener(OnlyHttps).open(request, timeout=30)
    except urllib.error.HTTPError as error:
        error.close()
        if done and error.code == 416:  # nothing is left to send: the MD5 decides
            return done, done
        raise
    with response:
        if response.status != 206:  # 200: the server ignores Range and starts over
            done = file.seek(0)
            file.truncate()
        length = response.headers.get("Content-Length") or "0"
        if not length.isdecimal() or (total := done + int(length)) > LIMIT:
            raise OSError(f"a length of {length[:40]!r} bytes, more than {LIMIT / 1e6:.0f} MB or no number")
        try:
            while block := response.read(1 << 20):
                done += file.write(block)
                sys.stderr.write(f"\r{url}: {done / 1e6:.1f} of {total / 1e6:.1f} MB")
                if done > LIMIT:
                    raise OSError(f"more than {LIMIT / 1e6:.0f} MB came")
        finally:
            sys.stderr.write("\n")  # an error message starts its own line
    return done, total


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def picture(samples, window=None, columns=None):
    """Finished samples as uint8 (H, W) or (H, W, 3): a grid of uint8 images (N, H, W, C), or a histogram of points.

    window: that of the histogram, `extent` of the training points, so that pictures of one run compare.
    """
    return image_grid(samples, columns) if samples.dtype == np.uint8 else histogram(samples, limit=window)


def write_png(path, array):
    """Write uint8 (H, W) grey or (H, W, 3) colour as a PNG that appears whole or not at all."""
    write_files({path: png(array)})


def png(array):
    """uint8 (H, W) or (H, W, 3) -> the bytes of a PNG."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise ValueError(f"a picture is uint8 (H, W) or (H, W, 3), got {array.dtype} {array.shape}")

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">2I5B", array.shape[1], array.shape[0], 8, 2 if array.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in array)  # filter byte 0 (none) before every row
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def image_grid(images, columns=None, border=1, scale=None):
    """uint8 images (N, H, W, C) side by side -> (H', W') or (H', W', 3), grey lines of `border` image pixels between.

    scale: whole enlargement factor; by default small images grow to about 64 pixels (8x8: 8 times, 32x32: twice).
    """
    n, h, w, c = images.shape
    scale = scale or max(1, 64 // max(h, w))
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = np.full((rows * columns, h + border, w + border, c), 128, np.uint8)
    cells[:n, :h, :w] = images
    grid = cells.reshape(rows, columns, h + border, w + border, c).swapaxes(1, 2)
    grid = grid.reshape(rows * (h + border), columns * (w + border), c)
    grid = grid[: len(grid) - border, : grid.shape[1] - border].repeat(scale, 0).repeat(scale, 1)
    return grid[..., 0] if c == 1 else grid


def extent(points):
    """A square window [(x0, x1), (y0, y1)] around the finite points but for one in a thousand on each side."""
    points = points[np.isfinite(points).all(1)][:, :2]
    low, high = np.quantile(points if len(points) else np.zeros((1, 2)), (0.001, 0.999), axis=0)
    centre = (low + high) / 2
    half = 0.58 * float(max((high - low).max(), 1e-12 * np.abs(centre).max()) or 1)  # of equal points, too
    return [(float(c) - half, float(c) + half) for c in centre]


def histogram(points, size=480, limit=None):
    """Density of points (N, D) as uint8 (size, size, 3), y upwards; only the first two axes count. Of numbers (N, 1) a
    bar chart.

    limit: [(x0, x1), (y0, y1)], or a number for the square [-limit, limit]^2; by default the extent of the points.
    """
    limit = [(-limit, limit)] * 2 if isinstance(limit, (int, float)) else limit or extent(points)
    points, bins = points[np.isfinite(points).all(1)], size // 2
    if points.shape[1] == 1:
        bars = min(bins, math.isqrt(len(points)) + 1)  # few samples would make a comb of narrow bars
        count = np.histogram(points[:, 0], bars, limit[0])[0][np.arange(bins) * bars // bins]
        level = np.arange(bins)[::-1, None] < 0.95 * bins * count / max(count.max(), 1)
    else:
        count = np.flip(np.histogram2d(points[:, 0], points[:, 1], bins, limit[:2])[0].T, 0)
        dense = np.quantile(count[count > 0], 0.99) if count.any() else 1
        level = np.sqrt(np.minimum(count / dense, 1))  # the square root shows thin structure beside dense
    level = level.repeat(2, 0).repeat(2, 1)
    ramp = np.array([(255, 255, 255), (130, 180, 220), (40, 80, 160), (10, 10, 50)])
    return np.stack([np.interp(level, (0, 1 / 3, 2 / 3, 1), ramp[:, i]) for i in range(3)], -1).round().astype(np.uint8)
