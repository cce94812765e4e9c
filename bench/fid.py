"""Fréchet distance between samples and reference images: FID, with the public Inception network given as a file.

    python bench/fid.py samples.npz --ref cifar10 --features inception-2015-12-05.pt
    python bench/fid.py FOLDER --ref cifar10-32x32.npz --features inception-2015-12-05.pt
    python bench/fid.py runs/agm-digits/samples.npz --ref digits

Samples are uint8 images in an .npz or .npy, as sample.py writes them, or a folder of PNGs. The reference is a data set
of data.py (its training images), an .npz of images (all), or one of `mu` and `sigma`, as EDM's fid-refs are. The
network is StyleGAN2's and EDM's Inception, called as net(uint8 (B, 3, H, W), return_features=True); grey images are
repeated to three channels. Without it a small classifier is trained on the reference's labels and kept in --out: its
distance is no FID and compares only with others in the same features.
"""

import sys
import warnings
import zlib
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import train
from sample import progress, read_picture

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


def small_features(dataset, folder, epochs):
    """uint8 (B, 3, H, W) -> features (B, 64) of the classifier of these data, which the folder keeps."""
    epochs = epochs or max(3, 180_000 // len(dataset.train))
    content = zlib.crc32(dataset.train_labels.numpy(), zlib.crc32(dataset.train.numpy()))
    folder.mkdir(parents=True, exist_ok=True)
    train, test = (x.expand(-1, 3, -1, -1) for x in (dataset.train, dataset.test))
    path = folder / f"classifier-{content:08x}-{epochs}.pt"
    net = classifier(path, train, dataset.train_labels, test, dataset.test_labels, epochs)
    return lambda images: net(images / 127.5 - 1)


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
        raise data.UserError(f"--features {path} is not {wanted} ({data.why(e):.80}): get {NVIDIA}") from None
    return features, D


def pictures(path):
    """uint8 images (N, C, H, W), or the paths of a folder's PNGs."""
    if path.is_dir():
        return sorted(path.rglob("*.png"))
    array = data.as_samples(path, data.read_array(path)[0])
    if array.dtype != np.uint8:
        raise data.UserError(f"{path} holds points: the distance is one of images")
    return data.gather(array, range(len(array)), lambda part: part.transpose(0, 3, 1, 2), np.uint8)


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
    """`moments` in an .npz of `mu` and `sigma`; None for any other reference."""
    if path.suffix != ".npz" or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            mu, sigma = (torch.from_numpy(file[key]).double() for key in ("mu", "sigma"))
        if mu.ndim != 1 or sigma.shape != mu.shape * 2 or not (mu.isfinite().all() and sigma.isfinite().all()):
            raise ValueError(f"mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}, or not finite")
    except Exception as e:  # numpy and zipfile raise a dozen kinds
        raise data.UserError(f"cannot use {path} ({data.why(e):.80}): fetch it again") from None
    return None, mu, sigma


def score(args):
    device, samples, reference = train.pick_device(args.device), pictures(Path(args.samples)), stored(Path(args.ref))
    dataset, images = None, []
    if reference is None:
        dataset = data.load(args.ref, args.data_dir)
        if not dataset.is_image:
            raise data.UserError(f"--ref {args.ref} holds points: the distance is one of images")
        images = [dataset.train] if args.ref in data.NAMES else [dataset.train, dataset.test]
    if args.features:
        features, D = inception(args.features, device)
        if reference and len(reference[1]) != D:
            raise data.UserError(f"{args.ref} has {len(reference[1])} features, {args.features} {D}: they differ")
    elif dataset is None or dataset.train_labels is None or not isinstance(dataset.train, torch.Tensor):
        text = "is too large" if images and dataset.train_labels is not None else "has no labels"
        raise data.UserError(f"--ref {args.ref} {text} to train a classifier with: give --features FILE")
    else:
        features = small_features(dataset, Path(args.out), args.epochs)
    if any(x.shape[1] == 1 for x in (samples, *images) if not isinstance(x, list)):
        print("grey images are repeated to three channels")

    def seen(sources, what, *shape):
        parts = chain.from_iterable(batches(source, args.batch, *shape) for source in sources)
        return moments(map(features, progress(parts, sum(map(len, sources)), what=what)))

    found = seen([samples], "samples", *([images[0].shape[2:]] if images else []))
    reference = reference or seen(images, "reference images")
    title = "Fréchet distance in a small classifier's features"
    if args.features:
        title = "FID" if D == 2048 else f"Fréchet distance in the features of {args.features}"
    against = f"{sum(map(len, images))} images of {args.ref}" if images else args.ref
    print(f"{title}: {frechet(found, reference):.4f}, of {found[0]} samples against {against}")
    if found[0] < 10_000:
        text = "samples are few, which raises the distance: compare equal numbers only; published FIDs are of 50,000"
        warnings.warn(f"{found[0]} {text}", stacklevel=2)


TOY = ["--epochs", "1"]  # what the tests append


def main(argv=None):
    p = train.command_line(__doc__)
    add = partial(train.option, p)
    p.add_argument("samples", help=".npz or .npy of uint8 images, or a folder of PNGs")
    add("--ref", f"{', '.join(data.NAMES[4:])}, an .npz of images, or one of mu and sigma", required=True)
    add("--data-dir", "folder or archive of the data set")
    add("--features", "TorchScript file of the Inception network")
    add("--batch", "images at a time", default=100)
    add("--device", "cpu, cuda, mps; auto takes the first that is there", default="auto")
    add("--out", "folder that keeps the classifier", default="runs/fid")
    add("--epochs", "of the classifier; default: 180,000 images in all, at least 3 epochs")
    train.run(lambda: score(train.read(p, sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    main()
