"""Fréchet distance on small images at few network calls, ours against the peers, as Markdown tables.

    python bench/images.py                                  Fashion-MNIST; some two hours on two cores
    python bench/images.py --nfe 5 10 20 --n 2000           a part; another call goes on where this one stopped
    python bench/images.py --data cifar10 --data-dir DIR    CIFAR-10, whole or in part

Images are made 16x16. Every network is the same UNet with the same number of updates (the minutes are in its log):
`denoiser`, which AGM, HOLD and the field's samplers (`EDM, ...`) share, and `fm`, flow matching with torchcfm's loss.
The Fréchet distance is between samples and training images in the features of a small classifier that this script
trains on their labels; floor is that of as many held-out images. It also rewards lucky errors, too much contrast among
them; the distance to the converged flow, root mean square per pixel of the first 500 samples against the same noise
taken along the network's flow with 400 calls, is the error of the sampler alone. Ours run on their default grid and
each peer on its field's default, but for `best grid`, which gets the best of the grids in peers.py at every NFE up to
20, found with --search samples. Networks and numbers are kept in --out.
"""

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
from train import command_line, run


def small(images):
    """uint8 (N, C, H, W) of 28x28, padded to 32x32, or 32x32; the mean of 2x2 pixels is 16x16."""
    edge = (32 - images.shape[-1]) // 2
    return avg_pool2d(pad(images.float(), (edge,) * 4), 2).round().to(torch.uint8)


def picture(path, found, rows, nfes):
    """A row each for AGM, HOLD of order 3, flow matching and EDM: six samples at every NFE, from the same noise."""
    strips = []
    best = ("FM, Adams-Bashforth 2, best grid", "EDM, DPM-Solver++(2M), best grid")
    for title in ("AGM denoiser, ode", "HOLD3 denoiser, ode", *best):
        c, ckpt = found[title]
        x = [peers.draw(ckpt, c.method, c.order, c.sampler, 6, nfe, 0, rows[title][nfe][0]) for nfe in nfes]
        images = np.pad(data.Dataset.to_pixels(torch.cat(x)), [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=255)
        blocks = [np.concatenate(part, 1) for part in np.split(images, len(nfes))]
        strips.append(np.concatenate([np.pad(b, [(0, 0), (0, 4), (0, 0)], constant_values=255) for b in blocks], 1))
    data.write_png(path, np.concatenate(strips, 0).repeat(2, 0).repeat(2, 1))


TOY = "--steps 2 --n 20 --search 10 --nfe 2 --flow-nfe 4 --epochs 1 --nets denoiser --width 8".split()
TOY += ["--only", "exponential", "UniPC-2"]


def main(argv=None):
    p = command_line(__doc__)
    p.add_argument("--data", default="fashion", choices=["fashion", "cifar10"], help="data set")
    p.add_argument("--data-dir", help="its folder or archive")
    p.add_argument(
        "--nets", nargs="+", default=["denoiser", "fm"], choices=peers.NETS, help="networks to train or load"
    )
    p.add_argument(
        "--only",
        nargs="+",
        help="contenders whose name contains one of these",
        default=[
            "AGM denoiser, ode",
            "AGM denoiser, exp",
            "HOLD1 denoiser, ode",
            "HOLD1 denoiser, best",
            "HOLD3 denoiser, ode",
            "FM",
            "EDM",
        ],
    )
    p.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20, 50], help="network calls")
    p.add_argument("--n", type=int, default=5000, help="samples")
    p.add_argument("--search", type=int, default=1000, help="samples for the choice of a peer's grid")
    p.add_argument("--flow-nfe", type=int, default=400, help="network calls of the converged flow")
    p.add_argument("--steps", type=int, default=5000, help="updates of 128 images a network")
    p.add_argument("--width", type=int, default=32, help="of the UNet")
    p.add_argument("--epochs", type=int, default=3, help="of the classifier")
    p.add_argument("--amp", choices=["off", "bf16"], default="bf16", help="autocast of the training")
    p.add_argument("--out", default="runs/images", help="folder of networks and numbers")
    p.add_argument("--picture", help="also write this PNG: samples of AGM, HOLD of order 3, flow matching, EDM")
    args = p.parse_args(argv)
    if min(args.n, args.search) < 10:
        sys.exit("error: --n and --search must be at least 10 for a Fréchet distance")
    peers.register()
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = data.load(args.data, args.data_dir)
    train, test = small(dataset.train), small(dataset.test)
    file = folder / f"{args.data}.npz"
    np.savez(file, images=train.permute(0, 2, 3, 1).numpy(), labels=dataset.train_labels.numpy())
    features = classifier(
        folder / f"{args.data}-classifier.pt", train, dataset.train_labels, test, dataset.test_labels, args.epochs
    )
    reference = moments([features(train / 127.5 - 1)])

    average = (train / 127.5 - 1).mean(0)

    def seen(x, contrast=1.0):
        return features((average + contrast * (x.clamp(-1, 1) - average)).clamp(-1, 1))

    def measure(x):
        """Fréchet distance; its standard error from the draw of the samples (jackknife, a fifth left out); the
        standard deviation of the pixels; the distance once the contrast is lowered and raised by 2 %."""
        f, fifth = seen(x), torch.arange(len(x)) % 5
        rest = torch.tensor([frechet(moments([f[fifth != i]]), reference) for i in range(5)])
        other = [frechet(moments([seen(x, contrast)]), reference) for contrast in (0.98, 1.02)]
        return [
            frechet(moments([f]), reference),
            2 * float(rest.std(correction=0)),
            float(x.clamp(-1, 1).std()),
            *other,
        ]

    floor, error, std, *_ = measure(test[: args.n] / 127.5 - 1)
    print(f"floor: {floor:.4f} ± {error:.4f}, pixels {std:.4f} ({len(test[: args.n])} held-out images)", flush=True)
    results, rows = peers.Results(folder / f"{args.data}.json"), {}
    found = {}
    options = ["--data", str(file), "--width", str(args.width), "--mult", "1", "2", "--blocks", "1", "--batch", "128"]
    options += ["--lr", "2e-3", "--amp", args.amp]
    sampling = partial(peers.evaluate, score=lambda row: row[0], n_search=args.search, n_flow=500)
    sampling = partial(sampling, flow_nfe=args.flow_nfe, batch=250)
    for kind in args.nets:
        path = peers.checkpoint(folder / f"{args.data}-{kind}", kind, args.steps, options)
        for contender in peers.contenders(kind, args.only):
            found[contender.title] = contender, path
            rows[contender.title] = sampling(contender, [path], args.nfe, args.n, measure, results)
    quantities = ("Fréchet distance", "its error", "std of the pixels", "at contrast 0.98", "at 1.02")
    quantities += ("distance to the converged flow",)
    for i, quantity in enumerate(quantities):
        print(f"\n{args.data}, {quantity}\n")
        peers.table(rows, args.nfe, i)
    peers.grids_used(rows)
    if args.picture:
        picture(args.picture, found, rows, args.nfe)


if __name__ == "__main__":
    run(main)
