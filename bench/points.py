"""Sharpness, coverage, sliced W2 and distance to the converged flow on the 2-D sets, ours against the peers, as tables.

    python bench/points.py --nets denoiser --seeds 1 --n 2500 --nfe 5 10   a part; another call goes on where it stopped
    python bench/points.py --data spiral --nets denoiser --only SA- splitting strang lie em --nfe 10 20 50

Every network is the same 20 x 128 MLP with the same 6,000 updates of 512 fresh points (train.py's preset), --seeds
times. `denoiser` is one network, sampled by AGM, HOLD of every order and the field's samplers (`EDM, ...`). `agm`,
`hold1` ... `hold4` learn what their papers say, `fm` is flow matching.

sharpness  mean distance from a sample to the nearest of 10,000 data points: blur and strays
coverage   mean distance from a data point to the nearest sample: what is missing
W2         sliced 2-Wasserstein distance, 100 directions; hardly sees blur, its floor is high
distance   root mean square distance per dimension from a sample to where the network's own flow, followed with 400
           calls, takes the same noise: the sampler's error alone (no row for samplers that add noise)
floor      the same of fresh data in place of samples, mean and standard deviation over ten draws

Ours run on their default grid and each peer on its field's default, but for `best grid`, which gets the best of the
grids in peers.py at every NFE up to 20 (above: the one that won at 20), best in sharpness + coverage of --search
samples with seed 0. Networks and numbers are kept in --out.
"""

import argparse
import math
import sys
from functools import lru_cache, partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import peers

import data
import train

ANGLES = torch.arange(100) * math.pi / 100
LINES = torch.stack([ANGLES.cos(), ANGLES.sin()])


def measure(x, points):
    """Sharpness, coverage and sliced W2 of samples x (N, 2) against points (M, 2), M at least N."""
    near = torch.cat([torch.cdist(part, points).min(1).values for part in x.split(1000)])
    far = torch.cat([torch.cdist(part, x).min(1).values for part in points.split(1000)])
    w2 = ((x @ LINES).sort(0).values - quantiles(points, len(x))).square().mean().sqrt()
    return [near.mean().item(), far.mean().item(), w2.item()]


@lru_cache(10)
def quantiles(points, n):
    """(n, 100): of the points along every line, as many as there are samples."""
    return (points[: len(points) // n * n] @ LINES).sort(0).values.reshape(n, -1, 100).mean(1)


def score(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", nargs="+", default=list(data.POINTS), choices=data.POINTS, help="sets")
    p.add_argument("--nets", nargs="+", default=peers.NETS, choices=peers.NETS, help="networks to train or load")
    p.add_argument("--only", nargs="+", default=[""], help="contenders whose name contains one of these")
    p.add_argument("--seeds", type=int, default=3, help="training seeds")
    p.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20], help="network calls")
    p.add_argument("--n", type=int, default=5000, help="samples")
    p.add_argument("--search", type=int, default=2500, help="samples for the choice of a grid")
    p.add_argument("--flow-nfe", type=int, default=400, help="network calls of the converged flow")
    p.add_argument("--steps", type=int, default=6000, help="updates a network")
    p.add_argument("--out", default="runs/points", help="folder of networks and numbers")
    args = p.parse_args(argv)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    sampling = partial(peers.evaluate, score=lambda row: row[0] + row[1], n_search=args.search, flow_nfe=args.flow_nfe)
    for name in args.data:
        results = peers.Results(folder / f"{name}.json")
        points = data.POINTS[name](10_000, torch.Generator().manual_seed(99))
        fresh = [data.POINTS[name](args.n, torch.Generator().manual_seed(seed)) for seed in range(10)]
        floor = torch.tensor([measure(x, points) for x in fresh])
        against, rows = partial(measure, points=points), {}
        for net in args.nets:
            wanted, paths = peers.contenders(net, args.only), []
            for seed in range(args.seeds if wanted else 0):
                options = ["--data", name, "--seed", str(seed)]
                paths.append(peers.checkpoint(folder / f"{name}-{net}-{seed}", net, args.steps, options))
            for contender in wanted:
                rows[contender.title] = sampling(contender, paths, args.nfe, args.n, against, results)
        for i, quantity in enumerate(("sharpness", "coverage", "sliced W2", "distance to the converged flow")):
            known = f"; floor {floor[:, i].mean():.4f} ± {floor[:, i].std():.4f}" if i < 3 else ""
            print(f"\n{name}, {quantity}: mean of {args.seeds} seeds{known}\n")
            peers.table(rows, args.nfe, i)
        peers.grids_used(rows)


TOY = "--nets denoiser --data gmm --seeds 1 --steps 2 --n 20 --search 20 --nfe 2 --only exponential SA- --flow-nfe 4"


def main(argv=None):
    train.run(lambda: score(argv))


if __name__ == "__main__":
    main()
