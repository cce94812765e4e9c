"""Official files -> arrays: Fashion-MNIST and CIFAR-10, downloaded once to the cache, and
downsampled ImageNet-64."""

import gzip
import io
import tarfile

import numpy as np
import torch

from formats.files import UserError, cache_dir, cached, say, why

# each file, and its SHA-256
ZALANDO = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"
FASHION = {
    f"{ZALANDO}/train-images-idx3-ubyte.gz": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
    ),
    f"{ZALANDO}/train-labels-idx1-ubyte.gz": (
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
    ),
    f"{ZALANDO}/t10k-images-idx3-ubyte.gz": (
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
    ),
    f"{ZALANDO}/t10k-labels-idx1-ubyte.gz": (
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
    ),
}
CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # 170,052,171 bytes
CIFAR10 = {CIFAR10_URL: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}
CIFAR10_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
IMAGENET64 = [*(f"train_data_batch_{i}.npz" for i in range(1, 11)), "val_data.npz"]


def load(name, folder):
    """fashion, cifar10 or imagenet64, from the folder of --data-dir, or where that is None from the
    cache -> what a data set is made of, by name: array uint8 (N, H, W, C), labels (N,), names of
    the classes, and the rows that are held_out."""
    if name == "imagenet64":
        return imagenet64(folder or cache_dir())
    if name == "fashion":
        images, labels, *test = [fetch(url, FASHION[url], folder, idx) for url in FASHION]
        parts = [(images, labels), test]
        names = CLOTHES.split(",")
    else:
        ((url, sha256),) = CIFAR10.items()
        parts = fetch(url, sha256, folder, records)
        names = CIFAR10_NAMES.split()
    return {
        "array": np.concatenate([images for images, _ in parts]),
        "labels": np.concatenate([labels for _, labels in parts]),
        "names": names,
        "held_out": slice(-len(parts[-1][1]), None),
    }


def fetch(url, sha256, folder, read):
    """What `read` makes of the file of that URL, which is in the folder, or in the cache where
    folder is None; what the cache lacks is downloaded."""
    if folder and folder.is_file():
        path = folder
    else:
        path = (folder or cache_dir()) / url.rsplit("/", 1)[1]
    try:
        if folder is None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            say(f"downloading {url} to {path}")
            # the file appears whole, or not at all
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        return read(path)
    except Exception as error:  # of urllib, ssl, gzip, tarfile, numpy; a wrong hash: RuntimeError
        raise UserError(
            f"cannot fetch or read {path} ({why(error)}): remove it and run again, or fetch {url}"
            " by hand and give its folder as --data-dir"
        ) from None


def idx(path):
    """Fashion-MNIST's format, two zeros, 8 for bytes, the number of axes, big-endian sizes, bytes
    -> the array."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    sizes = np.frombuffer(content, ">u4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(sizes)


def records(path):
    """CIFAR-10's archive or unpacked folder, six files of a label and 3,072 pixels (planes R, G, B)
    -> images (N, 32, 32, 3) and labels (N,) of each file."""
    unpacked = path.parent / "cifar-10-batches-bin"
    if unpacked.is_dir():
        files = [(unpacked / name).read_bytes() for name in CIFAR10_FILES]
    else:
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(path.read_bytes()))) as tar:
            files = [tar.extractfile(f"{unpacked.name}/{name}").read() for name in CIFAR10_FILES]
    parts = []
    for content in files:
        rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        planes = rows[:, 1:].reshape(-1, 3, 32, 32)
        parts.append((planes.transpose(0, 2, 3, 1), rows[:, 0]))
    return parts


def imagenet64(folder):
    """Chrabaszcz et al. 2017, arXiv 1707.08819: .npz files of `data`, uint8 (N, 3 * 64 * 64), and
    `labels`, 1..1000."""

    def read(name, key, kind, *shape):
        try:
            with np.load(folder / name, allow_pickle=False) as file:
                return file[key].astype(kind, casting="safe", copy=False).reshape(shape)
        except Exception as error:  # numpy and zipfile raise a dozen kinds
            raise UserError(
                f"cannot read {folder / name} ({why(error)}): get it from image-net.org"
            ) from None

    def pictures():
        for name in IMAGENET64:
            yield from read(name, "data", np.uint8, -1, 3, 64, 64).transpose(0, 2, 3, 1)

    labels = [read(name, "labels", np.int64, -1) - 1 for name in IMAGENET64]
    paths = [folder / name for name in IMAGENET64]
    array, _ = cached(folder, 64, paths, pictures(), {})
    held_out = slice(-len(labels[-1]), None)
    return {"array": array, "labels": np.concatenate(labels), "held_out": held_out}
