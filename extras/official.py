"""Official files -> arrays: Fashion-MNIST and CIFAR-10, downloaded once to the cache, and downsampled ImageNet-64."""

import gzip
import io
import tarfile

import numpy as np
import torch

from data import UserError, cache_dir, why
from extras.pictures import cached

ZALANDO = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"
FASHION = {  # and the SHA-256 of each file
    f"{ZALANDO}/train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    f"{ZALANDO}/train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    f"{ZALANDO}/t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    f"{ZALANDO}/t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
FASHION_NAMES = ["T-shirt/top", *"Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag".split(), "Ankle boot"]
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # 170,052,171 bytes
CIFAR10 = {CIFAR10_URL: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}
CIFAR10_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
IMAGENET64 = [*(f"train_data_batch_{i}.npz" for i in range(1, 11)), "val_data.npz"]


def load(name, folder):
    """fashion, cifar10 or imagenet64, from the folder of --data-dir, or where that is None from the cache -> uint8
    images (N, H, W, C), labels (N,), names of the classes, and the rows that are held out."""
    if name == "imagenet64":
        return imagenet64(folder or cache_dir())
    urls, names, read = (FASHION, FASHION_NAMES, idx) if name == "fashion" else (CIFAR10, CIFAR10_NAMES, records)
    arrays = []
    for url, sha256 in urls.items():
        path = folder if folder and folder.is_file() else (folder or cache_dir()) / url.rsplit("/", 1)[1]
        try:
            if folder is None and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                print(f"downloading {url} to {path}", flush=True)
                torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)  # appears whole, or not at all
            arrays += read(path)
        except Exception as error:  # of urllib, ssl, files, gzip, tarfile, numpy; a wrong hash is a RuntimeError
            fix = f"remove it and run again, or fetch {url} by hand and give its folder as --data-dir"
            raise UserError(f"cannot fetch or read {path} ({why(error)}): {fix}") from None
    return np.concatenate(arrays[::2]), np.concatenate(arrays[1::2]), names, slice(-len(arrays[-1]), None)


def idx(path):
    """Fashion-MNIST's format: two zeros, 8 for bytes, the number of axes, big-endian sizes, bytes -> [array]."""
    content = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(content, ">u4", content[3], 4)
    return [np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)]


def records(path):
    """CIFAR-10's archive or unpacked folder: files of a label and 3,072 pixels (planes R, G, B) -> images, labels."""
    unpacked = path.parent / "cifar-10-batches-bin"
    if unpacked.is_dir():
        files = [(unpacked / name).read_bytes() for name in CIFAR10_FILES]
    else:
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(path.read_bytes()))) as tar:
            files = [tar.extractfile(f"{unpacked.name}/{name}").read() for name in CIFAR10_FILES]
    rows = [np.frombuffer(file, np.uint8).reshape(-1, 3073) for file in files]
    return [array for r in rows for array in (r[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), r[:, 0])]


def imagenet64(folder):
    """Chrabaszcz et al. 2017, arXiv 1707.08819: .npz files of `data`, uint8 (N, 3 * 64 * 64), and `labels`, 1..1000."""

    def read(name, key, kind, *shape):
        try:
            with np.load(folder / name, allow_pickle=False) as file:
                return file[key].astype(kind, casting="safe", copy=False).reshape(shape)
        except Exception as error:  # numpy and zipfile raise a dozen kinds
            raise UserError(f"cannot read {folder / name} ({why(error)}): get it from image-net.org") from None

    labels = [read(name, "labels", np.int64, -1) - 1 for name in IMAGENET64]
    pictures = (x for name in IMAGENET64 for x in read(name, "data", np.uint8, -1, 3, 64, 64).transpose(0, 2, 3, 1))
    array, _ = cached(folder, 64, [folder / name for name in IMAGENET64], pictures, {})
    return array, np.concatenate(labels), [], slice(-len(labels[-1]), None)
