"""Fréchet distance between samples and reference images: FID, with the public Inception network.

    python bench/fid.py samples.npz --ref cifar10 --features inception-2015-12-05.pt
    python bench/fid.py FOLDER --ref cifar10-32x32.npz --features inception-2015-12-05.pt
    python bench/fid.py runs/agm-digits --ref digits

It prints one line: the distance, and of how many samples against what. Some seconds for digits; for
10,000 pictures of 32 x 32 some minutes of a GPU, an hour of a CPU.

Samples are a run's folder with its samples.npz, any .npz or .npy of uint8 images, or a folder of
pictures of any format that training reads. The reference is a data set of data.py (its training
images), a file or folder of images (all of them, brought to the size of the samples), or an .npz of
`mu` and `sigma`, as EDM's fid-refs are. The network is StyleGAN2's and EDM's Inception, called as
net(uint8 (B, 3, H, W), return_features=True); grey images are repeated to three channels. Without
it a small classifier is trained on the reference's labels and kept in --out: its distance is no FID
and compares only with others in the same features.
"""

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
import compare

import data
import train
from formats import command, pictures
from formats.files import UserError, why, write_files

NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"
NVIDIA += "/inception-2015-12-05.pt"


def moments(parts):
    """Number, mean (D,) and covariance (D, D) of all rows of the parts (B, D), in float64."""
    n = 0
    for part in parts:
        if n == 0:
            centre = part.double().mean(0)
            total = torch.zeros_like(centre)
            square = torch.zeros(len(centre), len(centre), dtype=torch.float64)
        off = part.double() - centre  # sums of what is near 0 lose nothing
        n += len(off)
        total += off.sum(0)
        square += off.mT @ off
    if n < 2:
        raise UserError(f"a covariance wants at least two samples, got {n}")
    return n, centre + total / n, (square - torch.outer(total, total) / n) / (n - 1)


def frechet(a, b):
    """Fréchet distance |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two `moments`.

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2).
    """
    _, mu_a, A = a
    _, mu_b, B = b
    cross = torch.linalg.svdvals(root(A).mT @ root(B)).sum()
    return float((mu_a - mu_b).square().sum() + A.trace() + B.trace() - 2 * cross)


def root(cov):
    """R with R R^T = cov, without eigenvalues that are 0 but for rounding: with fewer samples than
    features there are many, and their roots are not small."""
    values, vectors = torch.linalg.eigh(cov)
    keep = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, keep] * values[keep].sqrt()


# -------------------------------------------------------------------------------------------------
# Features


def classifier(folder, dataset, epochs=None):
    """Features (B, 64) of images (B, C, H, W) in [-1, 1]: of a small convolutional net, trained on
    the labels of a data set and kept in the folder, under a name that depends on the data. Prints
    its accuracy on the held-out images."""
    images = dataset.train[:]
    labels = dataset.train_labels
    epochs = epochs or max(3, 180_000 // len(images))
    content = zlib.crc32(labels.numpy(), zlib.crc32(images.numpy()))
    path = Path(folder, f"classifier-{content:08x}-{epochs}.pt")
    images = images.expand(-1, 3, -1, -1)
    torch.manual_seed(0)
    layers = []
    for c_in, c_out in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(body, nn.Linear(64, int(labels.max()) + 1))
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(epochs):
            for index in torch.randperm(len(images)).split(256):
                optimizer.zero_grad()
                cross_entropy(net(images[index] / 127.5 - 1), labels[index]).backward()
                optimizer.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files({path: partial(torch.save, net.state_dict())})
    net.eval().requires_grad_(False)

    def features(x):
        return torch.cat([body(part) for part in x.expand(-1, 3, -1, -1).split(1000)])

    answers = net[1](features(dataset.test[:] / 127.5 - 1)).argmax(1)
    right = (answers == dataset.test_labels).float().mean()
    print(f"classifier: {right:.3f} of {len(answers)} held-out images right", flush=True)
    return features


def inception(path, device):
    """uint8 (B, 3, H, W) -> features (B, D) of a TorchScript file, and D."""

    @torch.no_grad()
    def features(images):
        return net(images.to(device), return_features=True).cpu()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but the net comes in it
            net = torch.jit.load(path, map_location=device).eval()
        size = features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]
    except (RuntimeError, ValueError, OSError, AttributeError) as error:
        text = f"--features {path} is no Inception network of NVIDIA's ({why(error):.80})"
        raise UserError(f"{text}: get {NVIDIA}") from None
    return features, size


def stored(path):
    """`moments` in an .npz of `mu` and `sigma`; None for any other reference."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mu = torch.from_numpy(file["mu"]).double()
            sigma = torch.from_numpy(file["sigma"]).double()
    except Exception:  # no such file, or of another kind: data.load says what is wrong with it
        return None
    if sigma.shape != mu.shape * 2 or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(f"{path}: mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)} do not fit")
    return None, mu, sigma


# -------------------------------------------------------------------------------------------------
# Images


def images_of(path):
    """The samples: uint8 (N, C, H, W), or the paths of a folder's pictures, of those that training
    would find."""
    if (path / "ckpt.pt").exists():
        path = path / "samples.npz"
    if path.is_dir():
        found, *_ = pictures.sort_out(path)
        return [path / name for name in found]
    dataset = data.load(path)
    if not dataset.is_image:
        raise UserError(f"{path} holds no uint8 images: the distance is one of images")
    return torch.cat([dataset.train[:], dataset.test[:]])


def batches(sources, size, shape=None):
    """uint8 (B, 3, H, W) of each source, paths or images (N, C, H, W). UserError for a picture that
    cannot be read, or has another shape than (H, W), by default that of the first."""
    for source in sources:
        for i in range(0, len(source), size):
            part = source[i : i + size]
            if isinstance(part, list):
                part = [torch.tensor(pictures.read(path)).permute(2, 0, 1) for path in part]
            for image in part:
                shape = shape or image.shape[1:]
                if image.shape[1:] != shape:
                    odd = "x".join(map(str, image.shape[1:]))
                    wanted = "x".join(map(str, shape))
                    raise UserError(f"pictures of {odd} and of {wanted} pixels: give one size")
            yield torch.stack(list(part)).expand(-1, 3, -1, -1)


def score(argv):
    p = compare.parser(__doc__)
    p.add_argument("samples", type=Path, help="run, .npz or .npy of uint8 images, or a folder")
    p.add_argument("--ref", required=True, help="data set, images, or an .npz of mu and sigma")
    p.add_argument("--data-dir", help="folder or archive of the data set")
    p.add_argument("--features", help="TorchScript file of the Inception network")
    p.add_argument("--batch", type=int, default=100, help="images at a time")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps; auto: the first that is there")
    p.add_argument("--out", type=Path, default=Path("runs/fid"), help="keeps the classifier")
    p.add_argument("--epochs", type=int, help="of the classifier; default: 180,000 images")
    args = p.parse_args(argv)
    samples = images_of(args.samples)
    if len(samples) < 2:
        raise UserError(f"{args.samples} has {len(samples)} images: 2 is the least")
    shape = next(batches([samples], 1)).shape[2:]

    # the reference: its moments, or its images
    reference = stored(args.ref)
    images = []
    dataset = None
    if reference is None:
        dataset = data.load(args.ref, args.data_dir, size=shape[0])
        if not dataset.is_image:
            raise UserError(f"--ref {args.ref} holds no images: the distance is one of images")
        images = [dataset.train]
        if args.ref not in data.NAMES:
            images.append(dataset.test)

    # every picture is read once before anything is trained
    for _ in batches([samples, *images], args.batch, shape):
        pass

    # the features
    title = "Fréchet distance in a small classifier's features"
    if args.features:
        features, size = inception(args.features, train.pick_device(args.device))
        title = "FID"
        if reference and len(reference[1]) != size:
            raise UserError(f"{args.ref} has {len(reference[1])} features, the network {size}")
    elif dataset is None or dataset.train_labels is None:
        raise UserError(f"--ref {args.ref} has no labels for a classifier: give --features FILE")
    else:
        net = classifier(args.out, dataset, args.epochs)

        def features(x):
            return net(x / 127.5 - 1)

    def seen(sources):
        return moments(features(x) for x in batches(sources, args.batch, shape))

    found = seen([samples])
    distance = frechet(found, reference or seen(images))
    against = f"{sum(map(len, images))} images of {args.ref}" if images else args.ref
    print(f"{title}: {distance:.4f}, of {found[0]} samples against {against}")
    if found[0] < 10_000:
        warnings.warn(
            f"{found[0]} samples are few, which raises the distance: compare equal numbers only; "
            "published FIDs are of 50,000",
            stacklevel=2,
        )


def main(argv=None):
    command.run(lambda: score(argv))


if __name__ == "__main__":
    main()
