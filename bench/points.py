"""Sharpness, coverage, sliced W2 and distance to the flow on the 2-D sets, ours beside the peers.

    python bench/points.py                         few calls: a set takes 10 minutes of one core,
                                                   and 5 for the training of its two networks
    python bench/points.py --group grid --n 10000 --nfe 5 6 8 10 15 20           4 minutes a set
    python bench/points.py --group stochastic --data spiral --nfe 10 20 50      10 minutes
    python bench/points.py --group paper --data spiral --nfe 5 10 20 50         25, mostly training
    python bench/points.py --group likelihood --data gmm --nfe 8 16 32 64        5 minutes

It prints a table for each set and quantity, calls in columns, means and spreads over --seeds
networks, and keeps them in bench/results, in points.json or GROUP.json. Networks are in --runs,
NAME-SEED; missing ones are trained (train.py's preset: a 20 x 128 MLP, 6,000 updates of 512).

sharpness  mean distance from a sample to the nearest of 10,000 data points: blur and strays
coverage   mean distance from a data point to the nearest sample: what is missing
w2         sliced 2-Wasserstein distance, 100 directions
distance   root mean square distance per dimension from a sample to where the network's own flow,
           followed with --flow-calls calls, takes the same noise: the sampler's error alone
nats       how far the bound of extras/likelihood.py, with --nfe steps, lies below the mixture's
           own log p, per point
"fresh data" are the same of data in place of samples, over ten draws. A peer's best grids are those
of peers.GRIDS with the least sharpness + coverage, and the least distance, of --search samples.
"""

import math
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import compare
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

import agm_ref
import data
import hold_ref
from extras.likelihood import log_likelihood_bound
from formats import command

ANGLES = torch.arange(100) * math.pi / 100
LINES = torch.stack([ANGLES.cos(), ANGLES.sin()])
PAPER = {  # name -> sampler, and what trains the paper's network
    "AGM, exponential": (agm_ref.exponential, "--method agm --target ode"),
    "HOLD 3, strang": (hold_ref.strang, "--method hold --order 3 --target noise"),
}


def measure(x, points):
    """The numbers of samples x (N, 2) against points (M, 2), M at least N."""
    between = torch.cdist(x, points)
    apart = (x @ LINES).sort(0).values - quantiles(points, len(x))
    return {
        "sharpness": float(between.amin(1).mean()),
        "coverage": float(between.amin(0).mean()),
        "w2": float(apart.square().mean().sqrt()),
    }


@lru_cache(10)
def quantiles(points, n):
    """(n, 100): of the points along every line, as many as there are samples."""
    along = (points[: len(points) // n * n] @ LINES).sort(0).values
    return along.reshape(n, -1, len(ANGLES)).mean(1)


def goals(numbers):
    """What a peer's best grid is best in."""
    found = {"sharpness": numbers["sharpness"] + numbers["coverage"]}
    if "distance" in numbers:
        found["distance"] = numbers["distance"]
    return found


def true_log_p(x):
    """log p (B,) of data.gmm: nine Gaussians of std .04 on a grid of spacing .5, turned by 45
    degrees."""
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) / math.sqrt(2)
    means = torch.tensor([-0.5, 0.0, 0.5]).expand(2, 3)
    line = MixtureSameFamily(Categorical(torch.ones(2, 3)), Normal(means, torch.tensor(0.04)))
    return line.log_prob(x @ turn.T).sum(1)


def below_truth(path, name, steps, n, seed):
    """Nats per point between the data's log p and the bound."""
    process, predict = compare.process_of(compare.load(path), name)
    x = data.POINTS["gmm"](n, torch.Generator().manual_seed(7))
    torch.manual_seed(seed)
    bound = log_likelihood_bound(agm_ref, process, predict, x, steps)
    return {"nats": float((true_log_p(x) - bound).mean())}


def networks(args, name, more=""):
    """The runs of all seeds."""
    paths = []
    for seed in range(args.seeds):
        folder = Path(args.runs, "-".join([name, *more.replace("--", "").split(), str(seed)]))
        options = f"--data {name} --seed {seed} {more} {args.train}"
        paths.append(compare.trained(folder, *options.split()))
    return paths


def score(argv):
    p = compare.comparing(
        __doc__,
        "points",
        ["paper", "likelihood"],
        nfe=[4, 5, 7, 10, 20],
        n=2000,
        search=300,
        runs="runs/points",
    )
    p.add_argument("--data", nargs="+", default=list(data.POINTS), choices=data.POINTS, help="sets")
    args = p.parse_args(argv)
    fixed = {"n": args.n, "search": args.search, "flow_calls": args.flow_calls}
    results = compare.Results(compare.file_of(args), fixed)
    if args.group == "likelihood":
        rows = {}
        for process, steps in product(("AGM", "HOLD 1", "HOLD 3"), args.nfe):
            key = compare.key_of("gmm", process, "bound", steps)
            for seed, path in enumerate(networks(args, "gmm")):
                gap = partial(below_truth, path, process, steps, args.n, seed)
                results.of(key, seed, gap)
            rows.setdefault(process, {})[steps] = results.rows[key]
        return compare.table(rows, "nats", args.nfe)
    for name in args.data:
        points = data.POINTS[name](10_000, torch.Generator().manual_seed(99))
        for seed in range(10):
            fresh = data.POINTS[name](args.n, torch.Generator().manual_seed(seed))
            key = compare.key_of(name, "fresh data", "", 0)
            results.of(key, seed, partial(measure, fresh, points))

        comparison = compare.Comparison(
            results,
            partial(measure, points=points),
            goals,
            args.n,
            args.search,
            args.n,
            args.flow_calls,
        )
        if args.group == "paper":
            for title, (sampler, options) in PAPER.items():
                process = title.split(",")[0]
                by_denoiser = compare.Contender(title, "denoiser", process, sampler)
                comparison.run(name, networks(args, name), [by_denoiser], args.nfe)
                by_own = compare.Contender(title, "paper's loss", "own", sampler)
                comparison.run(name, networks(args, name, options), [by_own], args.nfe)
            continue
        contenders = compare.chosen(args.group, args.only)
        comparison.run(name, networks(args, name), contenders, args.nfe)


def main(argv=None):
    command.run(lambda: score(argv))


if __name__ == "__main__":
    main()
