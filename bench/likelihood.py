"""The bound of extras/likelihood.py against the true likelihood, by steps, on the mixture `gmm`.

    python bench/likelihood.py          5 minutes on one core, with the networks of points.py

It prints how many nats per point the bound lies below the data's own log p, steps of Runge-Kutta in
columns, for AGM and HOLD; networks of two seeds give the spread. Kept in
bench/results/likelihood.json.
"""

import math
from functools import partial
from pathlib import Path

import compare
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

import agm_ref
import data
import train
from extras.likelihood import log_likelihood_bound

PROCESSES = ("AGM", "HOLD 1", "HOLD 3")


def truth(x):
    """log p (B,) of data.gmm: nine Gaussians of std .04 on a grid of spacing .5, turned by 45
    degrees."""
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) / math.sqrt(2)
    steps = torch.tensor([-0.5, 0.0, 0.5]).expand(2, 3)
    line = MixtureSameFamily(Categorical(torch.ones(2, 3)), Normal(steps, torch.tensor(0.04)))
    return line.log_prob(x @ turn.T).sum(1)


def gap(path, process, steps, n, seed):
    """Nats per point between the data's log p and the bound."""
    model = compare.load(path)
    process, predict = compare.process_of(model, process)
    x = data.POINTS["gmm"](n, torch.Generator().manual_seed(7))
    torch.manual_seed(seed)
    bound = log_likelihood_bound(agm_ref, process, predict, x, steps)
    return {"nats": float((truth(x) - bound).mean())}


def measure(argv):
    p = compare.parser(__doc__, "likelihood")
    p.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    p.add_argument("--n", type=int, default=2000, help="points")
    p.add_argument("--seeds", type=int, default=2, help="networks")
    p.add_argument("--train", default="", help="more options of train.py")
    p.add_argument("--runs", default="runs/points", help="folder of the networks")
    args = p.parse_args(argv)
    results = compare.Results(args.results, {"n": args.n})
    printed = {}
    for seed in range(args.seeds):
        options = ["--data", "gmm", "--seed", str(seed), *args.train.split()]
        path = compare.trained(Path(args.runs, f"gmm-{seed}"), *options)
        for process in PROCESSES:
            for steps in args.steps:
                key = compare.key_of("gmm", process, "bound", steps)
                results.of(key, seed, partial(gap, path, process, steps, args.n, seed))
                printed.setdefault(process, {})[steps] = results.rows[key]
    compare.table(printed, "nats", args.steps)


def main(argv=None):
    train.run(lambda: measure(argv))


if __name__ == "__main__":
    main()
