"""Fréchet distance on small images at few network calls, ours against the peers, as Markdown tables.

    python bench/images.py --nfe 5 10 --n 2000              Fashion-MNIST; another call goes on where this one stopped
    python bench/images.py --data cifar10 --data-dir DIR    CIFAR-10, whole or in part

Images are made 16x16. Every network is the same UNet with the same number of updates (the minutes are in its log):
`denoiser`, which AGM, HOLD and the field's samplers (`EDM, ...`) share, and `fm`, flow matching. The Fréchet distance
is between samples and training images in the features of a small classifier that this script trains on their labels;
floor is that of as many held-out images. It also rewards lucky errors, too much contrast among them; the distance to
the converged flow, root mean square per pixel of the first 500 samples against the same noise taken along the
network's flow with --flow-nfe calls, is the error of the sampler alone. Ours run on their default grid and each peer on
its field's default, but for `best grid`, which gets the best of the grids in peers.py at every NFE up to 20, found with
--search samples. Networks and numbers are kept in --out.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, pad

sys.path.insert(0, str(Path(__file__).parent))
import peers
from fid import classifier, frechet, moments

import data
import train

OURS = ["AGM denoiser, ode", "AGM denoiser, exp", "HOLD1 denoiser, ode", "HOLD3 denoiser, ode"]
FIELD = ["(2M)", "(3M)", "UniPC", "DEIS tAB3 with", "iPNDM-3"]


def small(images):
    """uint8 (N, C, H, W) of 28x28, padded to 32x32, or 32x32; the mean of 2x2 pixels is 16x16."""
    edge = (32 - images.shape[-1]) // 2
    return avg_pool2d(pad(images.float(), (edge,) * 4), 2).round().to(torch.uint8)


def score(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", default="fashion", help="fashion, cifar10, or an .npz of such images and their labels")
    p.add_argument("--data-dir", help="its folder or archive")
    p.add_argument("--nets", nargs="+", default=["denoiser"], choices=peers.NETS, help="networks to train or load")
    p.add_argument("--only", nargs="+", default=OURS + FIELD, help="contenders whose name contains one of these")
    p.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20, 50], help="network calls")
    p.add_argument("--n", type=int, default=5000, help="samples")
    p.add_argument("--search", type=int, default=1000, help="samples for the choice of a peer's grid")
    p.add_argument("--flow-nfe", type=int, default=400, help="network calls of the converged flow")
    p.add_argument("--steps", type=int, default=5000, help="updates of 128 images a network")
    p.add_argument("--width", type=int, default=32, help="of the UNet")
    p.add_argument("--epochs", type=int, default=3, help="of the classifier")
    p.add_argument("--amp", choices=["off", "bf16"], default="bf16", help="autocast of the training")
    p.add_argument("--out", default="runs/images", help="folder of networks and numbers")
    args = p.parse_args(argv)
    if min(args.n, args.search) < 10:
        raise data.UserError("--n and --search must be at least 10 for a Fréchet distance")
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    dataset, name = data.load(args.data, args.data_dir), Path(args.data).stem
    images, test, labels = small(dataset.train), small(dataset.test), dataset.train_labels
    file, kept = folder / f"{name}.npz", folder / f"{name}-classifier.pt"
    np.savez(file, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    features = classifier(kept, images, labels, test, dataset.test_labels, args.epochs)
    reference = moments([features(images / 127.5 - 1)])

    def measure(x):
        """Fréchet distance; its standard error from the draw of the samples (jackknife, a fifth left out); the
        standard deviation of the pixels."""
        f, fifth = features(x), torch.arange(len(x)) % 5
        rest = torch.tensor([frechet(moments([f[fifth != i]]), reference) for i in range(5)])
        return [frechet(moments([f]), reference), 2 * float(rest.std(correction=0)), float(x.std())]

    held_out = test[: args.n] / 127.5 - 1
    floor, error, std = measure(held_out)
    print(f"floor: {floor:.4f} ± {error:.4f}, pixels {std:.4f} ({len(held_out)} held-out images)", flush=True)
    results, rows = peers.Results(folder / f"{name}.json"), {}
    options = ["--data", str(file), "--width", str(args.width), "--mult", "1", "2", "--blocks", "1", "--batch", "128"]
    options += ["--lr", "2e-3", "--amp", args.amp]
    sampling = partial(peers.evaluate, score=lambda row: row[0], n_search=args.search, n_flow=500, batch=250)
    for net in args.nets:
        path = peers.checkpoint(folder / f"{name}-{net}", net, args.steps, options)
        for contender in peers.contenders(net, args.only):
            row = sampling(contender, [path], args.nfe, args.n, measure, results, flow_nfe=args.flow_nfe)
            rows[contender.title] = row
    for i, quantity in enumerate(("Fréchet distance", "its error", "std of the pixels", "distance to the flow")):
        print(f"\n{name}, {quantity}\n")
        peers.table(rows, args.nfe, i)
    peers.grids_used(rows)


TOY = "--steps 2 --n 20 --search 10 --nfe 2 --flow-nfe 4 --epochs 1 --width 8 --only exponential UniPC-2"


def main(argv=None):
    train.run(lambda: score(argv))


if __name__ == "__main__":
    main()
