"""What labels bring, and what guidance costs, on digits.

    python bench/guidance.py            3 minutes on one core, and 5 for the training

It prints a table for each quantity, strengths of guidance in columns, and keeps them in
bench/results/guidance.json; the spread is over two draws. 1,797 samples of AGM's `ode`, as many of
each class; --nfe counts the times, guidance other than 0 and 1 asks the network twice at each.

right    share of the samples whose nearest digit has the class that was asked for
frechet  distance to all 1,797 digits on their 64 raw pixels
"""

from functools import partial
from pathlib import Path

import compare
import numpy as np
import torch
from fid import frechet, moments

import data
import sample
import train


def numbers(path, guidance, args, everything, classes, seed):
    model = sample.load(path)
    every = list(range(10))
    drawn = sample.draw(model, args.n, args.nfe, classes=every, guidance=guidance, seed=seed)
    x = np.concatenate([array for array, _ in drawn])
    x = (torch.from_numpy(x) / 127.5 - 1).flatten(1)
    asked = torch.arange(args.n) % 10
    found = classes[torch.cdist(x, everything).argmin(1)]
    distance = frechet(moments([x]), moments([everything]))
    return {"right": float((found == asked).double().mean()), "frechet": distance}


def measure(argv):
    p = compare.parser(__doc__, "guidance")
    p.add_argument("--guidance", type=float, nargs="+", default=[0, 1, 1.25, 1.5, 2, 3])
    p.add_argument("--nfe", type=int, default=10, help="times at which the network is asked")
    p.add_argument("--n", type=int, default=1797, help="samples")
    p.add_argument("--train", default="", help="more options of train.py")
    p.add_argument("--runs", default="runs/images", help="folder of the network")
    args = p.parse_args(argv)
    results = compare.Results(args.results, {"n": args.n, "nfe": args.nfe})
    options = ["--data", "digits", "--classes", *args.train.split()]
    path = compare.trained(Path(args.runs, "digits-classes-0"), *options)
    digits = data.load("digits")
    everything = (torch.cat([digits.train, digits.test]) / 127.5 - 1).flatten(1)
    classes = torch.cat([digits.train_labels, digits.test_labels])
    rows = {}
    for guidance in args.guidance:
        key = compare.key_of("digits", "AGM", "guidance", guidance)
        compute = partial(numbers, path, guidance, args, everything, classes)
        for seed in range(2):
            results.of(key, seed, partial(compute, seed))
        rows[guidance] = results.rows[key]
    for quantity in ("right", "frechet"):
        compare.table({"guidance": rows}, quantity, args.guidance)


def main(argv=None):
    train.run(lambda: measure(argv))


if __name__ == "__main__":
    main()
