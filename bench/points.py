"""Sharpness, coverage and sliced W2 on the 2-D sets, ours against flow matching, EDM and DDIM, as Markdown tables.

    python bench/points.py                                        everything; 84 trainings, some 4 hours on two cores
    python bench/points.py --data spiral --nets denoiser agm fm   a part; another call goes on where this one stopped

Every network is the same 20 x 128 MLP with the same 6,000 updates of 512 fresh points (train.py's preset), --seeds
times.
`denoiser` is one network, sampled by AGM, HOLD of every order and EDM's samplers. `agm`, `hold1` ... `hold4` learn what
their papers say, `fm` is flow matching with torchcfm's loss, `hold1` with DDIM stands for VP.

sharpness  mean distance from a sample to the nearest of 10,000 data points: blur and strays
coverage   mean distance from a data point to the nearest sample: what is missing
W2         sliced 2-Wasserstein distance, 100 directions; hardly sees blur, its floor is high
floor      the same of fresh data in place of samples, mean and standard deviation over ten draws

Ours run on their default grid, but for `best grid`, which like the peers gets the best of the grids in peers.py at
every NFE up to 20 (at 50 and 100: the one that won at 20), best in sharpness + coverage with seed 0. Networks and
numbers are kept in runs/points.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import peers

import data
from train import run

NFES = [4, 5, 6, 8, 10, 20, 50, 100]


def measure(x, points):
    """Sharpness, coverage and sliced W2 of samples x (N, 2) against points (M, 2), M a multiple of N."""
    near = torch.cat([torch.cdist(part, points).min(1).values for part in x.split(1000)])
    far = torch.cat([torch.cdist(part, x).min(1).values for part in points.split(1000)])
    angles = torch.arange(100) * math.pi / 100
    lines = torch.stack([angles.cos(), angles.sin()])
    quantiles = (points @ lines).sort(0).values.reshape(len(x), -1, 100).mean(1)  # M points as N
    w2 = ((x @ lines).sort(0).values - quantiles).square().mean().sqrt()
    return [near.mean().item(), far.mean().item(), w2.item()]


def picture(path, folder, name):
    """Rows: AGM, HOLD of order 3 (`ode`), flow matching (Adams-Bashforth, even steps); columns: 3, 5, 10, 20 calls."""
    rows = []
    for kind, title in (("denoiser", "AGM denoiser, ode"), ("denoiser", "HOLD3 denoiser, ode"), ("fm", "FM, Adams")):
        [(_, method, order, sampler, _)] = peers.contenders(kind, [title])
        ckpt = folder / f"{name}-{kind}-0" / "ckpt.pt"
        x = [peers.draw(ckpt, method, order, sampler, 10_000, nfe, 0, {}).numpy() for nfe in (3, 5, 10, 20)]
        rows.append(np.concatenate([data.histogram(v, 240, limit=2.1) for v in x], 1))
    data.write_png(path, np.concatenate(rows, 0))


TOY = "--nets denoiser --data gmm --seeds 1 --steps 2 --n 20 --nfe 2 --only exponential".split()


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--data", nargs="+", default=list(data.POINTS), choices=data.POINTS, help="sets")
    p.add_argument("--nets", nargs="+", default=peers.NETS, choices=peers.NETS, help="networks to train or load")
    p.add_argument("--only", nargs="+", default=[""], help="contenders whose name contains one of these")
    p.add_argument("--seeds", type=int, default=3, help="training seeds")
    p.add_argument("--nfe", type=int, nargs="+", default=NFES, help="network calls")
    p.add_argument("--n", type=int, default=5000, help="samples")
    p.add_argument("--steps", type=int, default=6000, help="updates a network")
    p.add_argument("--out", default="runs/points", help="folder of networks and numbers")
    p.add_argument("--picture", help="write this PNG instead, of the networks `denoiser` and `fm` of seed 0")
    args = p.parse_args(argv)
    peers.register()
    folder = Path(args.out)
    if args.picture:
        return picture(args.picture, folder, args.data[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.data:
        results = peers.Results(folder / f"{name}.json")
        points = data.POINTS[name](10_000, torch.Generator().manual_seed(99))
        points = points[: len(points) // args.n * args.n]
        fresh = [data.POINTS[name](args.n, torch.Generator().manual_seed(seed)) for seed in range(10)]
        floor = torch.tensor([measure(x, points) for x in fresh])
        against, rows = partial(measure, points=points), {}
        for kind in args.nets:
            wanted = peers.contenders(kind, args.only)
            paths = []
            for seed in range(args.seeds if wanted else 0):
                options = ["--data", name, "--seed", str(seed)]
                paths.append(peers.checkpoint(folder / f"{name}-{kind}-{seed}", kind, args.steps, options))
            for contender in wanted:
                rows[contender[0]] = peers.evaluate(
                    contender, paths, args.nfe, args.n, against, results, lambda row: row[0] + row[1]
                )
        for i, quantity in enumerate(("sharpness", "coverage", "sliced W2")):
            mean, std = floor[:, i].mean(), floor[:, i].std()
            print(f"\n{name}, {quantity}: mean of {args.seeds} seeds; floor {mean:.4f} ± {std:.4f}\n")
            peers.table(rows, args.nfe, i)
        peers.grids_used(rows)


if __name__ == "__main__":
    run(main)
