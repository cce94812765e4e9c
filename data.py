"""Data and pictures: a name or file -> one tensor -> batches in network units -> samples in the file's units -> PNG.

    gmm, spiral, checkerboard, moons   2-D points, drawn afresh for every batch
    digits                             1,797 grey 8x8 images in assets/digits.npz
    fashion, cifar10                   Fashion-MNIST, 28x28 grey, CIFAR-10, 32x32 colour: downloaded once, or --data-dir
    FILE.npy, FILE.npz                 uint8 images (N, H, W) or (N, H, W, C), float points (N, D), or fields: float or
                                       uint16 images (N, H, W, C) of any C; an .npz may have integer `labels`
    FOLDER, FILE.zip                   pictures of any kind (extras/pictures.py); sub-folders are classes
    imagenet64                         ImageNet, 64x64 colour, the official eleven .npz files

Images stay uint8 until `batch` takes them to [-1, 1]; points and fields are centred by each channel's mean and divided
by one scale. digits is the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998,
UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0), from scikit-learn's `load_digits`;
the only change is from 17 grey levels v to uint8, round(v * 255 / 16).
"""

import difflib
import math
import os
import struct
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

DIGITS_FILE = Path(__file__).resolve().parent / "assets" / "digits.npz"
ARRAYS = (".npy", ".npz")
LARGE = 2**30  # bytes: a larger array stays where it is, and batches index it


class UserError(Exception):
    """A mistake of the user, a broken file, a full disk: one line that names the cause and the fix."""


def why(error):
    """The text of an exception on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def write_files(files, fix="make room, or choose another folder"):
    """Write {path: bytes or function(file)}, all or none: under temporary names first, then renamed."""
    temporary = {path: Path(f"{path}.{os.getpid()}.tmp") for path in files}
    try:
        for path, content in files.items():
            with open(temporary[path], "wb") as file:
                content(file) if callable(content) else file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, name in temporary.items():
            os.replace(name, path)
    except (OSError, RuntimeError) as error:  # torch.save makes the second of the first
        raise UserError(f"cannot write {path} ({why(error)}): {fix}") from None
    finally:
        for name in filter(Path.exists, temporary.values()):
            name.unlink()


class Rows:
    """change(array[rows]) of an array that is too large to copy, indexed like the tensor that it would be."""

    def __init__(self, array, rows, change):
        self.array, self.rows, self.change = array, rows, change
        self.shape = (len(rows), *self[:0].shape[1:])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return torch.from_numpy(np.ascontiguousarray(self.change(self.array[self.rows[index]])))


def parts(x):
    """(first row, rows) of an array, a tensor or Rows, some megabytes at a time."""
    step = max(1, 2**21 // math.prod(x.shape[1:]))
    return ((i, x[i : i + step]) for i in range(0, len(x), step))


@dataclass
class Dataset:
    name: str
    kind: str  # "image": uint8 pixels; "points": floats (N, D); "field": float images
    train: torch.Tensor | Rows  # uint8 (N, C, H, W), or float32 (N, D) or (N, C, H, W) in network units
    test: torch.Tensor | Rows  # held out, the same kind; may be empty for small files
    train_labels: torch.Tensor | None = None  # int64 (N,)
    test_labels: torch.Tensor | None = None
    names: tuple | list = ()  # of the classes; empty: no labels
    no_labels: str = ""  # why there are none, where that is not plain
    draw: object = None  # n -> fresh points (n, D)
    flip: bool = False  # mirror half of the training images
    shift: torch.Tensor | float = 0.0  # float64, of each channel: value in the file = shift + scale * network units
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
        """The same with batches on that device; Rows stay where they are, as does what is held out."""
        tensors = {k: getattr(self, k) for k in ("train", "train_labels") if torch.is_tensor(getattr(self, k))}
        return replace(self, **{k: v.to(device) for k, v in tensors.items()}, device=torch.device(device))

    def units(self, x):
        """Samples as they are kept -> network units."""
        return x / 127.5 - 1 if self.is_image else x

    def batch(self, n):
        """x (n, C, H, W) or (n, D) in network units, float32, and its labels (n,) or None, drawn with replacement. All
        randomness is the global CPU generator's, whatever the device: its state is enough to resume exactly."""
        if self.draw:
            return send(self.draw(n), self.device), None
        index = torch.randint(len(self.train), (n,))
        there = send(index, self.device)
        x = send(self.train[index], self.device) if isinstance(self.train, Rows) else self.train[there]
        if self.flip:
            mirrored = send(torch.rand(n) < 0.5, self.device)
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return self.units(x), None if self.train_labels is None else self.train_labels[there]

    def held_out(self, rows):
        """Held-out samples in network units, and their labels or None, on the CPU. rows: a slice, or indices."""
        return self.units(self.test[rows]), None if self.test_labels is None else self.test_labels[rows]

    def summary(self):
        """The facts of the training data that a checkpoint keeps: what sampling needs, and what tells them from other
        data. Means and std are those of what a network meets, of flipped data where `flip` is on."""
        n, classes, size, labels = len(self.train), len(self.names), math.prod(self.shape), self.train_labels
        few = 0 < classes * size <= 2**22  # numbers in the means of all classes
        sums, square, largest = torch.zeros(classes if few else 1, size, dtype=torch.float64), 0.0, 0.0
        for i, part in parts(self.train):
            x = part.cpu().flatten(1).double()
            sums.index_add_(0, labels[i : i + len(x)].cpu() if few else torch.zeros(len(x), dtype=torch.int64), x)
            square, largest = square + float(x.square().sum()), max(largest, float(x.abs().max()))
        middle = float(sums.sum()) / (n * size)
        std = math.sqrt(max(0.0, square / (n * size) - middle**2)) / (127.5 if self.is_image else 1)
        counts = torch.zeros(0) if labels is None else labels.cpu().bincount(minlength=classes)

        def mean(total, count):
            mean = self.units((total / count).reshape(-1, *self.shape)).float()
            return (mean + mean.flip(-1)) / 2 if self.flip else mean

        facts = dict(kind=self.kind, shape=list(self.shape), shift=torch.as_tensor(self.shift).tolist())
        facts |= dict(scale=self.scale, std=std, bound=1.0 if self.is_image else 1.1 * largest, window=None)
        facts |= dict(labels=classes, names=list(self.names), counts=counts.tolist(), mean=mean(sums.sum(0), n)[0])
        facts["class_means"] = mean(sums, counts.clamp(min=1)[:, None]) if few else None
        some = self.train[:: 1 + n // min(10_000, 1 + 2**22 // size)]
        if self.kind == "points":
            facts["window"] = extent(finish(some, facts))
        elif self.kind == "field":
            facts["window"] = tuple(np.quantile(finish(some, facts)[..., :3], (0.001, 0.999)).tolist())
        return facts


def send(x, device):
    """x on that device; to a GPU from pinned memory, or the copy would wait until the GPU has nothing left to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def finish(x, facts):
    """Samples in network units -> numpy: uint8 (N, H, W, C), or floats (N, D) or (N, H, W, C) in the units of the
    file; float32, or float64 where that would round by more than 1e-4 scale."""
    x, scale = x.detach().cpu(), facts["scale"]
    if facts["kind"] == "image":
        return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    shift = torch.tensor(facts["shift"], dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 2))
    is_short = float(shift.abs().max()) < 1000 * scale and 1e-30 < scale < 1e30
    return (x.double() * scale + shift).to(torch.float32 if is_short else torch.float64).movedim(1, -1).numpy()


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
    """Data set `name` of NAMES, or of that path: an .npy/.npz file, a folder or zip of pictures; on the CPU. data_dir:
    where official files live. flip: overrides the set's own choice. size: pixels a side of a folder's pictures."""
    name, folder = str(name), Path(data_dir).expanduser() if data_dir else None
    if folder and name not in ("fashion", "cifar10", "imagenet64"):
        raise UserError(f"--data-dir is for fashion, cifar10 and imagenet64, not for {name}: leave it out")
    if name in POINTS:
        draw, generator = POINTS[name], torch.Generator().manual_seed(0)
        dataset = Dataset(name, "points", draw(10_000, generator), draw(10_000, generator), draw=draw)
    elif name == "digits":
        dataset = samples(DIGITS_FILE, *read_array(DIGITS_FILE), held_out=slice(4, None, 5))
    elif name not in NAMES and (path := path_of(name, size)).suffix in ARRAYS:
        dataset = samples(path, *read_array(path))
    else:
        from extras import official, pictures

        found = official.load(name, folder) if name in NAMES else pictures.load(path, size)
        dataset = samples(Path(name), *found)
    flip = name in ("cifar10", "imagenet64") if flip is None else flip
    return replace(dataset, flip=flip and dataset.kind != "points")


def shape_of(name, size=0):
    """Shape of one sample, (C, H, W) or (D,), of the data set or file of that name. For pictures, unread, C is 3."""
    path = None if name in SHAPES else path_of(name, size)
    if path and path.suffix not in ARRAYS:
        return (3, size, size)
    if size:
        raise UserError(f"--size {size} is for a folder or zip of pictures, {name} is neither: leave --size out")
    if not path:
        return SHAPES[name]
    _, *sides, channels = as_samples(path, read_array(path)[0])[0].shape
    return (channels, *sides)


def path_of(name, size):
    """The array file, or the folder or zip of pictures, of that name."""
    path = Path(name).expanduser()
    if not path.is_dir() and (not path.exists() or path.suffix not in (*ARRAYS, ".zip", ".ZIP")):
        near = difflib.get_close_matches(name.lower(), [*NAMES, *map(str, path.parent.glob("*"))], 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        what = f"{path} is no data" if path.exists() else f"no such file or folder, and no data set {name!r}{hint}"
        raise UserError(f"{what}: give {', '.join(NAMES)}, an .npy/.npz file, a folder or zip of pictures")
    if path.suffix not in ARRAYS and not size:
        raise UserError(f"{path} is for pictures: add --size, the pixels a side that they are brought to, say 64")
    return path


def samples(path, array, labels=None, names=(), held_out=None, no_labels=""):
    """The arrays of a file as a Dataset. held_out: rows; by default a fifth, drawn at random but always the same."""
    array, kind = as_samples(path, array)
    n, label_parts, units = len(array), [None, None], {}
    trains = np.ones(n, bool)
    trains[np.random.default_rng(0).permutation(n)[: n // 5] if held_out is None else held_out] = False
    rows = [np.flatnonzero(trains), np.flatnonzero(~trains)]
    if labels is not None:
        found = "text" if labels.dtype.kind in "US" else f"{labels.dtype} {labels.shape}"
        labels = labels[:, 0] if labels.shape == (n, 1) else labels
        if labels.shape != (n,) or labels.dtype.kind not in "iu":
            raise UserError(f"{path}: labels must be {n} integers, one for each sample; found {found}")
        if not 0 <= labels.min() <= labels.max() < 10_000:
            raise UserError(f"{path}: labels must be from 0 to 9999; found {labels.min()} to {labels.max()}")
        label_parts = [torch.from_numpy(labels[r].astype(np.int64)) for r in rows]
        names = names or [str(i) for i in range(labels.max() + 1)]
    if kind == "image":
        low, high = int(array.min()), int(array.max())
        if low == high or high == 1:
            raise UserError(f"{path} has pixels from {low} to {high}: 255 is white, so multiply masks by 255")
        both = [Rows(array, r, lambda part: part.transpose(0, 3, 1, 2)) for r in rows]
    else:
        shift, scale = standard(path, array, rows[0])
        units = dict(shift=torch.from_numpy(shift), scale=scale)
        both = [Rows(array, r, lambda x: np.moveaxis(np.float32((x - shift) / scale), -1, 1)) for r in rows]
    if array.nbytes <= LARGE:
        both = [torch.cat([x[:0], *(part for _, part in parts(x))]) for x in both]
    return Dataset(path.resolve().stem, kind, *both, *label_parts, names, no_labels, **units)


def as_samples(path, array):
    """The array with its channels last, and its kind: "image" for uint8 (N, H, W) or (N, H, W, C), "points" for floats
    (N, D), "field" for floats or uint16 (N, H, W, C). UserError where it is none, or could be two things."""
    shape, ndim, is_image = array.shape, array.ndim, array.dtype == np.uint8
    is_float = array.dtype.kind == "f" or (array.dtype.kind == "u" and array.itemsize == 2 and ndim > 2)
    fix = "" if array.size else "is empty: give at least one sample"
    if not (is_image or is_float):
        fix = "is neither: convert images to uint8 (0..255), points to float32"
    elif ndim == 3 and (shape[2] in (1, 3) or shape[1] > shape[2] == 4):
        fix = "may be one picture or many: give (N, H, W, C)"
    elif ndim not in ((2, 3, 4) if is_float else (3, 4)) or (is_image and shape[3:] not in ((), (1,), (3,))):
        fix = "is neither: images are (N, H, W) or (N, H, W, C), of uint8 with C 1 or 3, points are floats (N, D)"
    if fix:
        raise UserError(f"{path}: {array.dtype} {shape} {fix}")
    return array[..., None] if ndim == 3 else array, "image" if is_image else "points" if ndim == 2 else "field"


def standard(path, array, rows):
    """Mean (C,) of each channel and one scale of those rows, in float64: float32 would lose what lies far from 0. Warns
    where channels differ a lot, and where a few rows set the scale."""
    C, kind = array.shape[-1], "axis" if array.ndim == 2 else "channel"
    values = Rows(array, rows, lambda part: part.astype(np.float64))
    n = len(rows) * math.prod(array.shape[1:-1])
    shift = sum(part.flatten(0, -2).sum(0) for _, part in parts(values)) / n
    spread = (sum((part.flatten(0, -2) - shift).square().sum(0) for _, part in parts(values)) / n).sqrt()
    scale = float(spread.square().mean().sqrt())
    if not math.isfinite(scale) or not all(np.isfinite(part).all() for _, part in parts(array)):
        raise UserError(f"{path} has values that are not finite, or too large: remove the rows with NaN or infinity")
    if scale <= 1e-14 * float(shift.abs().max()):
        raise UserError(f"{path} is constant on every {kind}: there is nothing to learn, give samples that differ")
    if array.ndim == 4 and array.shape[1] < array.shape[2] == C:
        warnings.warn(f"{path}: {array.shape} taken for (N, H, W, C): transpose it if it is (N, C, H, W)", stacklevel=2)
    if spread.min() < spread.max() / 100:
        low, high = (f"{kind} {int(i)} spreads over {spread[i]:.3g}" for i in (spread.argmin(), spread.argmax()))
        warnings.warn(f"{path}: {low}, {high}, and one scale serves all: rescale if both matter", stacklevel=2)
    some = values[:: 1 + n * C // 2**22].reshape(-1, n // len(rows), C).numpy()
    near = float(np.median(np.sqrt(np.square(some - np.median(some, (0, 1))).mean((1, 2)))))
    if near < scale / 6:  # Gaussians: 0.7 to 1; Student's t with 3 degrees of freedom: 0.4 and more
        text = f"{path}: half of the rows lie within {near:.2g} of the median, but a few set the scale of all"
        warnings.warn(f"{text}, {scale:.2g}: are they data?", stacklevel=2)
    return shift.numpy(), scale


def read_array(path):
    """The samples of an .npy/.npz file, and its `labels` or None. Never unpickles, never guesses."""
    try:
        with path.open("rb") as file:  # numpy would leave a broken zip open
            if file.read(6) == b"\x93NUMPY":
                return np.load(path, mmap_mode="r", allow_pickle=False), None
            file.seek(0)
            loaded = np.load(file, allow_pickle=False)
            names = [key for key in loaded.files if key != "labels"]
            chosen = [key for key in names if len(names) == 1 or key in ("images", "x")]
            if len(chosen) != 1:
                raise ValueError(f"it holds {', '.join(names)[:99]}: call the samples images or x, the classes labels")
            array, *labels = [loaded[key][...] for key in (*chosen, "labels") if key in loaded.files]
    except Exception as error:  # numpy and zipfile raise a dozen kinds; a file that is no array a TypeError
        raise UserError(f"cannot read {path} ({why(error)}): write it again with numpy.save or numpy.savez") from None
    if len(names) > 1:
        warnings.warn(f"{path}: the samples are {chosen[0]}; the other arrays are not used", stacklevel=1)
    return array, labels[0] if labels else None


def cache_dir():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phase-ref"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def picture(array, facts, columns=None):
    """Finished samples as uint8 (H, W) or (H, W, 3): a grid of images, of fields the first three channels between the
    window's ends, of points a histogram in the window, of numbers bars."""
    if facts["kind"] == "points":
        return histogram(array, limit=facts["window"])
    if facts["kind"] == "field":
        low, high = facts["window"]
        array = np.nan_to_num((array[..., :3] - low) / ((high - low) or 1)).clip(0, 1)
        array = (255 * array[..., [0, 1, 0] if array.shape[3] == 2 else slice(3)]).round().astype(np.uint8)
    return image_grid(array, columns)


def write_png(path, array):
    """Write uint8 (H, W) grey or (H, W, 3) colour as a PNG that appears whole or not at all."""
    write_files({path: png(array)})


def png(array):
    """uint8 (H, W) or (H, W, 3) -> the bytes of a PNG."""
    return apng([array])


def apng(frames, milliseconds=100):
    """uint8 pictures of one shape, (H, W) or (H, W, 3) -> the bytes of an animated PNG that repeats for ever and holds
    its last frame for two seconds; of one picture the bytes of a plain PNG."""
    (h, w, *colour), n = frames[0].shape, len(frames)
    if colour not in ([], [3]) or any(f.dtype != np.uint8 or f.shape != frames[0].shape for f in frames):
        raise ValueError(f"a picture is uint8 (H, W) or (H, W, 3), got {frames[0].dtype} {frames[0].shape}")

    def chunk(kind, form="", *numbers, body=b""):
        body = kind + struct.pack(">" + form, *numbers) + body
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    out = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", "2I5B", w, h, 8, 2 if colour else 0, 0, 0, 0)]
    out += [chunk(b"acTL", "2I", n, 0)] if n > 1 else []
    for i, array in enumerate(frames):
        rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in array), 9)  # filter 0 (none) before every row
        if n > 1:  # chunks are numbered: fcTL 0, IDAT, fcTL 1, fdAT 2, fcTL 3, fdAT 4, ...
            delay = milliseconds if i < n - 1 else 2000
            out.append(chunk(b"fcTL", "5I2H2B", max(0, 2 * i - 1), w, h, 0, 0, delay, 1000, 0, 0))
        out.append(chunk(b"fdAT", "I", 2 * i, body=rows) if i else chunk(b"IDAT", body=rows))
    return b"".join([*out, chunk(b"IEND")])


def image_grid(images, columns=None, border=1, scale=None):
    """uint8 images (N, H, W, C) side by side -> (H', W') or (H', W', 3), grey lines of `border` image pixels between.
    scale: whole enlargement factor; by default small images grow to about 64 pixels (8x8: 8 times, 32x32: twice)."""
    n, h, w, c = images.shape
    scale, columns = scale or max(1, 64 // max(h, w)), columns or math.ceil(math.sqrt(n))
    rows, H, W = math.ceil(n / columns), h + border, w + border
    cells = np.full((rows * columns, H, W, c), 128, np.uint8)
    cells[:n, :h, :w] = images
    grid = cells.reshape(rows, columns, H, W, c).swapaxes(1, 2).reshape(rows * H, columns * W, c)
    grid = grid[: rows * H - border, : columns * W - border].repeat(scale, 0).repeat(scale, 1)
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
    bar chart. limit: [(x0, x1), (y0, y1)], or a number for [-limit, limit]^2; by default the extent of the points."""
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
    ramp = np.array([(255, 255, 255), (130, 180, 220), (40, 80, 160), (10, 10, 50)])
    colour = np.stack([np.interp(level, (0, 1 / 3, 2 / 3, 1), ramp[:, i]) for i in range(3)], -1)
    return colour.round().astype(np.uint8).repeat(2, 0).repeat(2, 1)
