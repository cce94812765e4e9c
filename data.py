"""Data and pictures: name or file -> one tensor in memory -> batches in [-1, 1] -> pixels -> PNG.

    gmm, spiral, checkerboard, moons   2-D points, drawn afresh for every batch
    digits                             1,797 grey 8x8 images in assets/digits.npz
    fashion                            Fashion-MNIST, 28x28 grey, four IDX gz files
    cifar10                            CIFAR-10, 32x32 colour, the official binary archive
    FILE.npy, FILE.npz                 uint8 images (N, H, W) or (N, H, W, C), or float points (N, D)

Everything a data set holds stays in its own units (uint8 pixels, points as given); `batch` converts to what a network
sees and `to_pixels`/`restore` convert back. No workers: a batch is one indexing operation on the training device.

digits is the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0), taken from scikit-learn's `load_digits`; the
only change is from 17 grey levels v to uint8, round(v * 255 / 16).
"""

import difflib
import gzip
import hashlib
import http.client
import math
import os
import struct
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
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


class DataError(Exception):
    """A mistake of the user or a broken file: one line that names the cause and the fix."""


def why(error):
    """The text of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__


@dataclass
class Dataset:
    name: str
    train: torch.Tensor  # uint8 (N, C, H, W) or float32 (N, D)
    test: torch.Tensor  # held out, the same kind; may be empty for small files
    train_labels: torch.Tensor | None = None  # int64 (N,)
    test_labels: torch.Tensor | None = None
    draw: Callable | None = None  # n -> fresh points (n, D)
    flip: bool = False  # mirror half of the training images
    shift: torch.Tensor | float = 0.0  # network units = (points - shift) / scale
    scale: float = 1.0

    @property
    def shape(self):
        """Shape of one sample: (C, H, W) or (D,)."""
        return tuple(self.train.shape[1:])

    @property
    def bound(self):
        """The largest |value| that a network may meet in the data."""
        return 1.0 if self.is_image else 1.1 * float(((self.train - self.shift) / self.scale).abs().max())

    @property
    def std(self):
        """The standard deviation of what a network meets, over samples and dimensions."""
        some = self.train[:10000]
        some = some.float() / 127.5 if self.is_image else (some - self.shift) / self.scale
        return float(some.std(correction=0)) or 1.0

    @property
    def is_image(self):
        return self.train.dtype == torch.uint8

    def to(self, device):
        tensors = {key: value.to(device) for key, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)

    def batch(self, n):
        """x (n, C, H, W) in [-1, 1] or (n, D) of unit scale, float32, and its labels (n,) or None, with replacement.

        All randomness is the global CPU generator's, whatever the device: its state is enough to resume exactly.
        """
        device, label = self.train.device, None
        if self.draw:
            x = self.draw(n).to(device)
        else:
            index = torch.randint(len(self.train), (n,)).to(device)
            x = self.train[index]
            label = None if self.train_labels is None else self.train_labels[index]
        if not self.is_image:
            return (x - self.shift) / self.scale, label
        if self.flip:
            mirrored = (torch.rand(n) < 0.5).to(device)
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return x / 127.5 - 1, label

    @staticmethod
    def to_pixels(x):
        """Images (B, C, H, W) in [-1, 1] -> uint8 numpy (B, H, W, C), rounded and clamped."""
        pixels = ((x.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    def restore(self, x):
        """Points (B, D) in network units -> float32 numpy (B, D) in the units of the data."""
        return (x.detach().float() * self.scale + self.shift).cpu().numpy()


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
NAMES = [*POINTS, "digits", "fashion", "cifar10"]


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(name, data_dir=None, flip=None):
    """Data set `name` of NAMES, or the .npy/.npz file of that path, on the CPU. DataError says what to do otherwise.

    data_dir: where fashion and cifar10 live (cifar10: folder or archive). flip: overrides the data set's own choice.
    """
    name = str(name)
    if name in POINTS:
        draw, generator = POINTS[name], torch.Generator().manual_seed(0)
        dataset = Dataset(name, draw(10_000, generator), draw(10_000, generator), draw=draw)
    elif name == "digits":
        dataset = array_file(DIGITS_FILE, name)
    elif name == "fashion":
        dataset = fashion(data_dir)
    elif name == "cifar10":
        dataset = cifar10(data_dir)
    elif name.endswith((".npy", ".npz")):
        dataset = array_file(Path(name).expanduser(), Path(name).stem)
    else:
        near = difflib.get_close_matches(name.lower(), NAMES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(f"no data set {name!r}{hint}: give one of {', '.join(NAMES)}, or an .npy/.npz file")
    return dataset if flip is None else replace(dataset, flip=flip)


def image_tensor(nhwc):
    """uint8 numpy (N, H, W, C) -> contiguous uint8 tensor (N, C, H, W)."""
    return torch.from_numpy(nhwc.transpose(0, 3, 1, 2).copy())


def label_tensor(labels):
    return torch.from_numpy(labels.astype(np.int64))


def array_file(path, name):
    """An .npy or .npz file. Every fifth sample is held out; no flips, as nothing says that a mirror image is data."""
    array, labels = read_array(path)
    if array.size == 0:
        raise DataError(f"{path} holds an empty array of shape {array.shape}: give at least one sample")
    is_image = array.dtype == np.uint8
    if is_image and array.ndim == 3:
        array = array[..., None]
    if is_image and (array.ndim != 4 or array.shape[-1] not in (1, 3)):
        raise DataError(f"{path} has uint8 shape {array.shape}: images must be (N, H, W) or (N, H, W, C) with C 1 or 3")
    if not is_image and array.dtype.kind != "f":
        raise DataError(f"{path} has dtype {array.dtype}: convert images to uint8 (0..255), points to float32")
    if not is_image and array.ndim in (3, 4):
        raise DataError(f"{path} has float images {array.shape}: convert them to uint8 (0..255)")
    if not is_image and (array.ndim != 2 or array.shape[1] < 2):
        raise DataError(f"{path} has float shape {array.shape}: points must be (N, D) with D at least 2")
    if labels is not None and (labels.shape != array.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0):
        raise DataError(f"{path} has bad labels: they must be {len(array)} integers >= 0, one for each sample")

    held_out = np.arange(len(array)) % 5 == 4
    train_labels = None if labels is None else label_tensor(labels[~held_out])
    test_labels = None if labels is None else label_tensor(labels[held_out])
    if is_image:
        x = image_tensor(array)
        return Dataset(name, x[~held_out], x[held_out], train_labels, test_labels)
    with np.errstate(over="ignore"):  # what overflows float32 is caught as an infinity
        x = torch.from_numpy(array.astype(np.float32))
    if not x.isfinite().all():
        raise DataError(f"{path} has values that are not finite in float32: remove the rows with NaN or infinity")
    train = x[~held_out]
    shift = train.double().mean(0)
    scale = float((train - shift).square().mean().sqrt())  # one number for all axes keeps the shape of the data
    if scale == 0:
        raise DataError(f"{path} holds {len(train)} equal points: there is nothing to learn, give points that differ")
    return Dataset(name, train, x[held_out], train_labels, test_labels, shift=shift.float(), scale=scale)


def read_array(path):
    """The samples of an .npy/.npz file, and its `labels` or None. Never unpickles."""
    if not path.is_file():
        raise DataError(f"no file {path}: give the path of an existing .npy or .npz file")
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded, None
            keys = [key for key in ("arr_0", "images", "x", *loaded) if key in loaded and key != "labels"]
            array, labels = loaded[keys[0]] if keys else np.empty(0), loaded.get("labels")
    except Exception as error:  # numpy and zipfile raise a dozen kinds; all mean the same here
        raise DataError(f"cannot read {path} ({why(error)}): write it again with numpy.save or numpy.savez") from None
    if not all(isinstance(a, np.ndarray) for a in (array, labels) if a is not None):
        raise DataError(f"{path} is a zip of other files than arrays: write it with numpy.savez")
    return array, labels


def fashion(data_dir):
    """Fashion-MNIST. No flips: its shoes all point to the left."""
    folder = Path(data_dir or FASHION_DIR).expanduser()
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels):
            raise DataError(f"{folder} has {len(images)} {part} images but {len(labels)} labels: fetch the files again")
        parts.append((image_tensor(images[..., None]), label_tensor(labels)))
    (train, train_labels), (test, test_labels) = parts
    return Dataset("fashion", train, test, train_labels, test_labels)


def read_idx(path, ndim):
    """IDX of bytes, gzipped: big-endian magic 0x0800 + ndim, ndim sizes, data -> uint8 array of ndim axes."""
    if not path.is_file():
        raise DataError(f"no {path}: apt-get install dataset-fashion-mnist, or get {FASHION_URL} and give --data-dir")
    try:
        with gzip.open(path) as file:
            content = file.read()
        magic, *sizes = struct.unpack_from(f">{1 + ndim}I", content)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{path} is damaged ({why(error)}): fetch it again") from None
    body = content[4 + 4 * ndim :]
    if magic != 0x0800 + ndim or len(body) != math.prod(sizes) or not body:
        raise DataError(f"{path} is no IDX file of {ndim} axes (magic {magic}, sizes {sizes}): fetch it again")
    return np.frombuffer(body, np.uint8).reshape(sizes)


def cifar10(data_dir):
    """CIFAR-10 from the archive or the unpacked folder that data_dir points at or holds; else from the internet."""
    archive_name, folder_name = CIFAR10_URL.rsplit("/", 1)[1], "cifar-10-batches-bin"
    root = Path(data_dir).expanduser() if data_dir else cache_dir()
    folder = next((f for f in (root, root / folder_name) if (f / CIFAR10_TEST).is_file()), None)
    archive = root if root.is_file() else root / archive_name
    if folder:
        files = {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    else:
        if data_dir is None and not archive.is_file():
            download(CIFAR10_URL, CIFAR10_MD5, archive)
        if not archive.is_file():
            state = "has neither" if root.exists() else "does not exist: want a folder with"
            raise DataError(f"--data-dir {root} {state} {archive_name} or {folder_name}/; {CIFAR10_URL} has it")
        files = read_tar(archive)
    where = folder or archive
    train, train_labels = cifar_records(files, CIFAR10_TRAIN, where)
    test, test_labels = cifar_records(files, [CIFAR10_TEST], where)
    return Dataset("cifar10", train, test, train_labels, test_labels, flip=True)


def read_tar(path):
    """{name: content} of the .bin files of a tar.gz, in memory: nothing is unpacked to disk."""
    try:
        with gzip.open(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = (m for m in tar if m.isfile() and m.name.endswith(".bin"))
            files = {Path(m.name).name: tar.extractfile(m).read() for m in members}
            while file.read(1 << 20):  # tarfile stops early, and gzip checks its CRC only at the very end
                pass
            return files
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({why(error)}): replace it by {CIFAR10_URL}") from None


def cifar_records(files, names, where):
    """Records of 1 label byte + 3,072 pixels (R, G, B planes, row-major) -> uint8 (N, 3, 32, 32), int64 (N,)."""
    for name in names:
        if not files.get(name) or len(files[name]) % 3073:
            size = f"{len(files[name])} bytes" if name in files else "missing"
            raise DataError(f"{where}: {name} is {size}, wanted n x 3073 bytes: fetch {CIFAR10_URL} again")
    records = np.frombuffer(b"".join(files[name] for name in names), np.uint8).reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise DataError(f"{where} has labels over 9, so it is not CIFAR-10's binary version: get {CIFAR10_URL}")
    return torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()), label_tensor(records[:, 0])


def cache_dir():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phase-ref"


def download(url, md5, target):
    """Fetch url to target through target.part, which a later call resumes; target only ever appears whole."""
    part = target.with_name(target.name + ".part")
    by_hand = f"fetch {url} by hand and give --data-dir"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        done, total = fetch(url, part)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"download failed ({why(error)}): run again to resume, or {by_hand}") from None
    if done < total:
        raise DataError(f"download stopped at {done} of {total} bytes: run again to resume, or {by_hand}")
    found = hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest()
    if found != md5:
        part.unlink()
        raise DataError(f"{url} came with MD5 {found}, wanted {md5}; removed it: run again, or {by_hand}")
    part.replace(target)


def fetch(url, part):
    """Append the rest of url to the file `part`. Bytes now there, and bytes wanted as far as the server tells."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        error.close()
        if done and error.code == 416:  # nothing is left to send: the MD5 decides
            return done, done
        raise
    with response:
        done = done if response.status == 206 else 0  # 200: the server ignores Range and starts over
        total = done + int(response.headers.get("Content-Length") or 0)
        try:
            with part.open("ab" if done else "wb") as file:
                while block := response.read(1 << 20):
                    file.write(block)
                    done += len(block)
                    sys.stderr.write(f"\r{url}: {done / 1e6:.1f} of {total / 1e6:.1f} MB")
        finally:
            sys.stderr.write("\n")  # an error message starts its own line
    return done, total


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def save_picture(path, samples, dataset):
    """Write finished samples as a PNG: a grid of uint8 images (N, H, W, C), or a histogram of points (N, D).

    dataset: the Dataset they belong to, whose training points then fix the window of the histogram so that pictures
    of one run compare; or just True for images, False for points.
    """
    if getattr(dataset, "is_image", dataset):
        picture = image_grid(samples)
    else:
        reference = dataset.train.cpu().numpy() if isinstance(dataset, Dataset) else samples
        picture = histogram(samples, limit=extent(reference))
    write_png(path, picture)


def write_png(path, array):
    """Write uint8 (H, W) grey or (H, W, 3) colour as a PNG that appears whole or not at all."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise ValueError(f"a picture is uint8 (H, W) or (H, W, 3), got {array.dtype} {array.shape}")

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">2I5B", array.shape[1], array.shape[0], 8, 2 if array.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in array)  # filter byte 0 (none) before every row
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(png)
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path} ({why(error)}): give a folder that can be written") from None


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
    """A square window ((x0, x1), (y0, y1)) around the finite points but for one in a thousand on each side."""
    points = points[np.isfinite(points).all(1)][:, :2]
    low, high = np.quantile(points if len(points) else np.zeros((1, 2)), (0.001, 0.999), axis=0)
    centre, half = (low + high) / 2, 0.58 * max(*(high - low), 1e-6)
    return [(c - half, c + half) for c in centre]


def histogram(points, size=480, limit=None):
    """Density of points (N, 2) as uint8 (size, size, 3), dark on white, y upwards; only the first two axes count.

    limit: ((x0, x1), (y0, y1)), or a number for the square [-limit, limit]^2; by default the extent of the points.
    """
    limit = [(-limit, limit)] * 2 if isinstance(limit, (int, float)) else limit or extent(points)
    points = points[np.isfinite(points).all(1)]
    count = np.histogram2d(points[:, 0], points[:, 1], bins=size // 2, range=limit)[0]
    count = np.flip(count.T, 0).repeat(2, 0).repeat(2, 1)
    dense = np.quantile(count[count > 0], 0.99) if count.any() else 1
    level = np.sqrt(np.minimum(count / dense, 1))  # the square root shows thin structure beside dense
    ramp = np.array([(255, 255, 255), (130, 180, 220), (40, 80, 160), (10, 10, 50)])
    return np.stack([np.interp(level, (0, 1 / 3, 2 / 3, 1), ramp[:, i]) for i in range(3)], -1).round().astype(np.uint8)
