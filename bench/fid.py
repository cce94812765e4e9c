"""Fréchet distance between samples and reference images: FID, with the public Inception network given as a file.

    python bench/fid.py samples.npz --ref cifar10 --features inception-2015-12-05.pt
    python bench/fid.py FOLDER --ref cifar10-32x32.npz --features inception-2015-12-05.pt
    python bench/fid.py runs/agm-digits/samples.npz --ref digits

Samples are uint8 images in an .npz or .npy, as sample.py writes them, or a folder of PNGs. The reference is a data set
of data.py (its training images), a file or folder of images (all of them; those of a folder are brought to the size of
the samples), or an .npz of `mu` and `sigma`, as EDM's fid-refs are. The network is StyleGAN2's and EDM's Inception,
called as net(uint8 (B, 3, H, W), return_features=True); grey images are repeated to three channels. Without it a small
classifier is trained on the reference's labels and kept in --out: its distance is no FID and compares only with others
in the same features.
"""

import argparse
import sys
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import train
from data import UserError, why

NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


def moments(parts):
    """Number, mean (D,) and covariance (D, D) of all rows of the parts (B, D), in float64."""
    n, centre = 0, None
    for part in parts:
        if centre is None:
            centre, total, square = part.double().mean(0), 0, 0
        off = part.double() - centre  # sums of what is near 0 lose nothing
        n, total, square = n + len(off), total + off.sum(0), square + off.mT @ off
    if n < 2:
        raise UserError(f"a covariance wants at least two samples, got {n}")
    return n, centre + total / n, (square - torch.outer(total, total) / n) / (n - 1)


def frechet(a, b):
    """Fréchet distance |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two `moments`.

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2). Eigenvalues that are 0 but for rounding are
    left out: with fewer samples than features there are many, and their roots are not small.
    """

    def root(cov):
        w, V = torch.linalg.eigh(cov)
        keep = w > len(w) * torch.finfo(w.dtype).eps * w[-1]
        return V[:, keep] * w[keep].sqrt()

    (_, mu_a, A), (_, mu_b, B) = a, b
    cross = torch.linalg.svdvals(root(A).mT @ root(B)).sum()
    return float((mu_a - mu_b).square().sum() + A.trace() + B.trace() - 2 * cross)


def classifier(path, train, labels, test, test_labels, epochs=3):
    """Features (B, 64) of images (B, C, H, W) in [-1, 1]: a small convolutional net, trained once on uint8 images and
    kept in the file; prints its accuracy on the held-out images."""

    def layer(c_in, c_out):
        return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2))

    torch.manual_seed(0)
    body = nn.Sequential(layer(train.shape[1], 16), layer(16, 32), layer(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(body, nn.Linear(64, int(labels.max()) + 1))
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(epochs):
            for index in torch.randperm(len(train)).split(256):
                optimizer.zero_grad()
                cross_entropy(net(train[index] / 127.5 - 1), labels[index]).backward()
                optimizer.step()
        data.write_files({path: partial(torch.save, net.state_dict())})
    net.eval().requires_grad_(False)
    answers = torch.cat([net(x / 127.5 - 1).argmax(1) for x in test.split(1000)])
    print(f"classifier: {(answers == test_labels).float().mean():.3f} of {len(test)} held-out images right", flush=True)
    return lambda x: torch.cat([body(part) for part in x.split(1000)])


def inception(path, device):
    """uint8 (B, 3, H, W) -> features (B, D) of a TorchScript file, and D."""

    @torch.no_grad()
    def features(images):
        return net(images.to(device), return_features=True).cpu()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but the public network comes in it
            net = torch.jit.load(path, map_location=device).eval()
        (_, D) = features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape
    except (RuntimeError, ValueError, OSError, AttributeError) as e:
        wanted = "a TorchScript file that takes uint8 (B, 3, H, W) and return_features=True"
        raise UserError(f"--features {path} is not {wanted} ({why(e):.80}): get {NVIDIA}") from None
    return features, D


def stored(path):
    """`moments` in an .npz of `mu` and `sigma`; None for any other reference."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (torch.from_numpy(file[key]).double() for key in ("mu", "sigma"))
    except Exception:  # no such file, or of another kind: data.load says what is wrong with it
        return None
    if sigma.shape != mu.shape * 2 or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(f"{path}: mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)} do not fit, or are not finite")
    return None, mu, sigma


def images_of(path):
    """The samples: uint8 (N, H, W, C), or the paths of a folder's PNGs."""
    if path.is_dir():
        return sorted(path.rglob("*.png"))
    array, kind = data.as_samples(path, data.read_array(path)[0])
    if kind != "image":
        raise UserError(f"{path} holds no uint8 images: the distance is one of images")
    return array


def read_png(path):
    """uint8 (H, W, 3)."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("pip install pillow to read a folder of PNGs") from None
    return np.asarray(Image.open(path).convert("RGB"))


def batches(source, size, shape):
    """uint8 (B, 3, H, W) of paths, an array (N, H, W, C) or a tensor (N, C, H, W); all must have the shape (H, W)."""
    for i in range(0, len(source), size):
        part = source[i : i + size]
        if isinstance(part, list):
            part = [read_png(path) for path in part]
        if not isinstance(part, torch.Tensor):
            part = [torch.tensor(x).permute(2, 0, 1) for x in part]
        for odd in (tuple(x.shape[1:]) for x in part if x.shape[1:] != shape):
            raise UserError(f"pictures of {odd} and of {tuple(shape)} pixels: give samples as large as the data")
        yield torch.stack(list(part)).expand(-1, 3, -1, -1)


def score(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("samples", type=Path, help=".npz or .npy of uint8 images, or a folder of PNGs")
    p.add_argument("--ref", required=True, help="data set, file or folder of images, or an .npz of mu and sigma")
    p.add_argument("--data-dir", help="folder or archive of the data set")
    p.add_argument("--features", help="TorchScript file of the Inception network")
    p.add_argument("--batch", type=int, default=100, help="images at a time")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes the first that is there")
    p.add_argument("--out", type=Path, default=Path("runs/fid"), help="folder that keeps the classifier")
    p.add_argument("--epochs", type=int, help="of the classifier; default: 180,000 images in all, at least 3 epochs")
    args = p.parse_args(argv)
    samples, reference, images, dataset = images_of(args.samples), stored(args.ref), [], None
    if len(samples) < 2 or args.batch < 1:
        raise UserError(f"{args.samples} has {len(samples)} images, --batch is {args.batch}: 2 and 1 is the least")
    first = read_png(samples[0]) if isinstance(samples, list) else samples[0]
    shape = torch.Size(first.shape[:2])
    if reference is None:
        dataset = data.load(args.ref, args.data_dir, size=shape[0])
        if not dataset.is_image:
            raise UserError(f"--ref {args.ref} holds no images: the distance is one of images")
        images = [dataset.train] if args.ref in data.NAMES else [dataset.train, dataset.test]
        shape = torch.Size(dataset.shape[1:])
    title = "Fréchet distance in a small classifier's features"
    if args.features:
        features, D = inception(args.features, train.pick_device(args.device))
        title = "FID" if D == 2048 else f"Fréchet distance in the features of {args.features}"
        if reference and len(reference[1]) != D:
            raise UserError(f"{args.ref} has {len(reference[1])} features, {args.features} {D}: they differ")
    elif dataset is None or dataset.train_labels is None or not isinstance(dataset.train, torch.Tensor):
        raise UserError(f"--ref {args.ref} has no labels, or is too large, to train a classifier: give --features FILE")
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        epochs = args.epochs or max(3, 180_000 // len(dataset.train))
        content = zlib.crc32(dataset.train_labels.numpy(), zlib.crc32(dataset.train.numpy()))
        parts = (x.expand(-1, 3, -1, -1) for x in (dataset.train, dataset.test))
        known = next(parts), dataset.train_labels, next(parts), dataset.test_labels
        net = classifier(args.out / f"classifier-{content:08x}-{epochs}.pt", *known, epochs)

        def features(x):
            return net(x / 127.5 - 1)

    def seen(*sources):
        return moments(features(x) for source in sources for x in batches(source, args.batch, shape))

    found, reference = seen(samples), reference or seen(*images)
    against = f"{sum(map(len, images))} images of {args.ref}" if images else args.ref
    print(f"{title}: {frechet(found, reference):.4f}, of {found[0]} samples against {against}")
    if found[0] < 10_000:
        text = "samples are few, which raises the distance: compare equal numbers only; published FIDs are of 50,000"
        warnings.warn(f"{found[0]} {text}", stacklevel=2)


def main(argv=None):
    train.run(lambda: score(argv))


if __name__ == "__main__":
    main()
