"""Fréchet distance between samples and reference images: FID, with the public Inception network given as a file.

    python bench/fid.py samples.npz --ref cifar10 --features inception-2015-12-05.pt
    python bench/fid.py FOLDER --ref cifar10-32x32.npz --features inception-2015-12-05.pt
    python bench/fid.py runs/agm-digits/samples.npz --ref digits

Samples are uint8 images in an .npz or .npy, as sample.py writes them, or a folder of PNGs. The reference is a data set
of data.py (its training images), an .npz of images, or one of `mu` and `sigma`, as EDM's fid-refs are. The network is
the TorchScript Inception of StyleGAN and EDM, called as net(uint8 (B, 3, H, W), return_features=True); grey images are
repeated to three channels. Without it a small classifier is trained on the reference's labels and kept in --out: its
distance is no FID and compares only with others in the same features.
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
from sample import progress, read_picture


def moments(parts):
    """Number, mean (D,) and covariance (D, D) of all rows of the parts (B, D), in float64."""
    n, centre = 0, None
    for part in parts:
        if centre is None:
            centre, total, square = part.double().mean(0), 0, 0
        off = part.double() - centre  # sums of what is near 0 lose nothing
        n, total, square = n + len(off), total + off.sum(0), square + off.mT @ off
    if n < 2:
        raise data.UserError(f"a covariance wants at least two samples, got {n}")
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
    """A small convolutional net with 64 features, trained once and kept; prints its accuracy on the held-out images."""

    def layer(c_in, c_out):
        return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2))

    torch.manual_seed(0)
    body = nn.Sequential(layer(train.shape[1], 16), layer(16, 32), layer(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(body, nn.Linear(64, int(labels.max()) + 1))
    if path.exists():
        try:
            net.load_state_dict(torch.load(path, weights_only=True))
        except Exception as e:  # whatever torch.load raises for a damaged file
            raise data.UserError(f"{path} is no classifier of these data ({data.why(e):.80}): remove it") from None
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
    """uint8 (B, 3, H, W) -> features (B, D), by a TorchScript file."""
    try:
        net = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as e:
        raise data.UserError(f"--features {path} is no TorchScript file ({data.why(e):.80}): fetch it again") from None
    return lambda images: net(images.to(device), return_features=True).cpu()


def pictures(path):
    """uint8 images (N, C, H, W), or the paths of a folder's PNGs."""
    if path.is_dir():
        return sorted(path.rglob("*.png"))
    array = data.as_samples(path, data.read_array(path)[0])
    if array.dtype != np.uint8:
        raise data.UserError(f"{path} holds points: the distance is one of images")
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def batches(source, size, shape=None):
    """uint8 (B, 3, H, W) of pictures, grey ones repeated; all must have that shape (H, W), or that of the first."""
    for i in range(0, len(source), size):
        some = source[i : i + size]
        some = [read_picture(str(p), (3,), "picture") for p in some] if isinstance(some, list) else some
        shape = shape or some[0].shape[1:]
        for odd in (tuple(x.shape[1:]) for x in some if x.shape[1:] != shape):
            raise data.UserError(f"pictures of {odd} and of {tuple(shape)} pixels: give samples as large as the data")
        yield torch.stack(list(some)).expand(-1, 3, -1, -1)


def stored(path):
    """Moments of an .npz with `mu` and `sigma`; None for any other reference."""
    if path.suffix != ".npz" or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            mu, sigma = (torch.from_numpy(file[key]).double() for key in ("mu", "sigma"))
    except Exception as e:  # numpy and zipfile raise a dozen kinds
        raise data.UserError(f"cannot read {path} ({data.why(e):.80}): fetch it again") from None
    if mu.ndim != 1 or sigma.shape != (len(mu),) * 2 or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise data.UserError(f"{path} has mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}: want finite (D,), (D, D)")
    return math.nan, mu, sigma


def score(args):
    device, found, reference = train.pick_device(args.device), pictures(Path(args.samples)), stored(Path(args.ref))
    size, images = None, None
    if reference is None:
        dataset = data.load(args.ref, args.data_dir)
        if not dataset.is_image:
            raise data.UserError(f"--ref {args.ref} holds points: the distance is one of images")
        images = dataset.train if args.ref in data.NAMES else torch.cat([dataset.train, dataset.test])
        size = images.shape[2:]
    if args.features:
        features = inception(args.features, device)
    elif images is None or dataset.train_labels is None:
        raise data.UserError(f"--ref {args.ref} has no labels to train a classifier with: give --features FILE")
    else:
        known = dataset.train.expand(-1, 3, -1, -1), dataset.train_labels
        path = Path(args.out) / f"classifier-{zlib.crc32(known[1].numpy(), zlib.crc32(dataset.train.numpy())):08x}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        epochs = max(3, 180_000 // len(known[0]))
        net = classifier(path, *known, dataset.test.expand(-1, 3, -1, -1), dataset.test_labels, epochs)
        features = lambda x: net(x / 127.5 - 1)  # noqa: E731

    def seen(source, kind):
        with torch.no_grad():
            parts = batches(source, args.batch, size)
            return moments(features(part) for part in progress(parts, len(source), what=kind))

    if reference is None:
        reference = seen(images, "reference images")
    found = seen(found, "samples")
    n, D, against = found[0], len(found[1]), args.ref if images is None else f"the {len(images)} images of {args.ref}"
    if D != len(reference[1]):
        raise data.UserError(f"{args.ref} is of {len(reference[1])} features, the network has {D}: give its own file")
    name = f"Fréchet distance in the features of {args.features or 'a small classifier'}"
    if args.features and D == 2048:
        name = f"FID ({args.features})"
    print(f"{name}: {frechet(found, reference):.4f}, {n} samples against {against}")
