"""Official files -> arrays: Fashion-MNIST and CIFAR-10, downloaded once to the cache, and
downsampled ImageNet-64."""

import gzip
import io
import tarfile

import numpy as np
import torch

from formats.files import cache_dir, cached, reading, say

SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
    ),
    "train-labels-idx1-ubyte.gz": (
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
    ),
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
}
*FASHION, CIFAR10 = SHA256
FASHION_URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
FASHION_NAMES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/"  # 170,052,171 bytes
CIFAR10_NAMES = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
CIFAR10_PARTS = (
    "data_batch_1 data_batch_2 data_batch_3 data_batch_4 data_batch_5 test_batch".split()
)
IMAGENET64 = [*(f"train_data_batch_{i}.npz" for i in range(1, 11)), "val_data.npz"]


def load(name, folder):
    """fashion, cifar10 or imagenet64, from the folder of --data-dir, or where that is None from the
    cache -> what a data set is made of, by name: array uint8 (N, H, W, C), labels (N,), names of
    the classes, and the rows that are held_out."""
    if name == "imagenet64":
        return imagenet64(folder or cache_dir())
    if name == "fashion":
        arrays = [fetch(FASHION_URL, file, folder, idx) for file in FASHION]
        train_images, train_labels, test_images, test_labels = arrays
        images = [train_images, test_images]
        labels = [train_labels, test_labels]
        names = FASHION_NAMES
    else:
        images, labels = fetch(CIFAR10_URL, CIFAR10, folder, records)
        names = CIFAR10_NAMES
    return {
        "array": np.concatenate(images),
        "labels": np.concatenate(labels),
        "names": names.split(","),
        "held_out": slice(-len(labels[-1]), None),
    }


def fetch(url, file, folder, read):
    """What the function `read` makes of a file, which is in the folder, or in the cache where
    folder is None; what the cache lacks is downloaded from below that url."""
    if folder and folder.is_file():
        path = folder
    else:
        path = (folder or cache_dir()) / file
    with reading(path, f"remove it and run again, or fetch {url}{file} and give --data-dir FOLDER"):
        if folder is None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            say(f"downloading {url}{file} to {path}")
            # the file appears whole, or not at all
            torch.hub.download_url_to_file(url + file, str(path), SHA256[file])
        return read(path)


def idx(path):
    """Fashion-MNIST's format, two zeros, 8 for bytes, the number of axes, big-endian sizes, bytes
    -> the array."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    sizes = np.frombuffer(content, ">u4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(sizes)


def records(path):
    """CIFAR-10's archive or unpacked folder -> for each of its six files the images
    (N, 32, 32, 3), and the labels (N,)."""
    unpacked = path.parent / "cifar-10-batches-bin"
    if unpacked.is_dir():
        files = [(unpacked / f"{part}.bin").read_bytes() for part in CIFAR10_PARTS]
    else:
        archive = io.BytesIO(gzip.decompress(path.read_bytes()))
        with tarfile.open(fileobj=archive) as tar:
            names = [f"{unpacked.name}/{part}.bin" for part in CIFAR10_PARTS]
            files = [tar.extractfile(name).read() for name in names]

    images = []
    labels = []
    for content in files:
        # a row is a label and 3,072 pixels, all red ones first, then green, then blue
        rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        planes = rows[:, 1:].reshape(-1, 3, 32, 32)
        images.append(planes.transpose(0, 2, 3, 1))
        labels.append(rows[:, 0])
    return images, labels


def imagenet64(folder):
    """Chrabaszcz et al. 2017, arXiv 1707.08819: .npz files of `data`, uint8 (N, 3 * 64 * 64), and
    `labels`, 1..1000."""

    paths = [folder / name for name in IMAGENET64]

    def read(path, key, *shape):
        with reading(path, "get it from image-net.org"), np.load(path, allow_pickle=False) as file:
            return file[key].reshape(shape)

    def pictures():
        for path in paths:
            planes = read(path, "data", -1, 3, 64, 64)
            yield from planes.transpose(0, 2, 3, 1)

    labels = [read(path, "labels", -1) - 1 for path in paths]
    array, _ = cached(folder, 64, paths, pictures(), {})
    held_out = slice(-len(labels[-1]), None)
    return {"array": array, "labels": np.concatenate(labels), "held_out": held_out}
