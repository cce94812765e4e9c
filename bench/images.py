"""Fréchet distance and distance to the flow on small images, ours beside the peers.

    python bench/images.py                                    digits: 25 minutes of one core, and
                                                              5 for the training of two networks
    python bench/images.py --group stochastic --nfe 10 20 50  digits: 20 minutes
    python bench/images.py --group grid --nfe 5 6 8 10 15 20  digits: 10 minutes
    python bench/images.py --group guidance --nfe 10          digits: 3 minutes, and 3 of training
    python bench/images.py --data fashion --nfe 5 10 20 --search 200 --seeds 1      an hour, and
                                                              25 minutes of training; or cifar10

It prints a table for each quantity, calls in columns, means and spreads over --seeds networks, and
keeps them in bench/results, in images.json or GROUP.json. Networks are in --runs, NAME-SEED;
missing ones are trained: digits by train.py's preset, the others, brought to 16 x 16, by 4,500
updates of 64.

frechet   distance of the samples to the data: digits on their 64 raw pixels, to all 1,797; else in
          the features of a small classifier that is trained on the labels, to the training images
distance  root mean square distance per pixel of the first 500 samples to where the network's own
          flow, followed with --flow-calls calls, takes the same noise: the sampler's error alone
right     with guidance in columns: share of the samples of AGM's `ode`, as many of each class,
          whose nearest digit has the class that was asked for
"data" is the same of data: half of what a half of the digits has against the other half, as its
error falls with the number; held-out images.
A peer's best grids are those of peers.GRIDS with the least of each, of --search samples.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import compare
import numpy as np
import torch
from fid import classifier, frechet, moments
from torch.nn.functional import avg_pool2d, pad

import data
import sample
from formats import command

GUIDANCE = (0, 1, 1.25, 1.5, 2, 3)
PRESET = "--steps 4500 --batch 64 --width 24 --mult 1 2 2 --blocks 1 --lr 2e-3"


def small(images):
    """uint8 (N, C, H, W) of 28x28, padded to 32x32, or 32x32; the mean of 2x2 pixels is 16x16."""
    edge = (32 - images.shape[-1]) // 2
    return avg_pool2d(pad(images.float(), (edge,) * 4), 2).round().to(torch.uint8)


def units(images):
    return images / 127.5 - 1


def of_digits():
    """How samples are measured, and the numbers of five halves of the digits against the rest."""
    digits = data.load("digits")
    everything = units(torch.cat([digits.train, digits.test])).flatten(1)
    known = moments([everything])

    def measure(x):
        return {"frechet": frechet(moments([x.flatten(1)]), known)}

    def held_out(seed):
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
        half, rest = everything[order].split(len(order) // 2 + 1)
        distance = frechet(moments([half]), moments([rest]))  # twice that of twice as many
        return {"frechet": distance / 2}

    return measure, held_out


def of_classifier(args):
    """The same in a classifier's features; writes the small images that the net is trained on."""
    dataset = data.load(args.data, args.data_dir)
    dataset = replace(dataset, train=small(dataset.train), test=small(dataset.test))
    features = classifier(args.runs, dataset)
    pixels = dataset.train.permute(0, 2, 3, 1).numpy()
    np.savez(Path(args.runs, f"{args.data}.npz"), images=pixels, labels=dataset.train_labels)
    known = moments(features(units(part)) for part in dataset.train.split(1000))

    def measure(x):
        return {"frechet": frechet(moments([features(x)]), known)}

    def held_out(seed):
        order = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(seed))
        return measure(units(dataset.test[order[: args.n]]))

    return measure, held_out


def by_class(path, guidance, args, measure, seed):
    """The numbers of samples of all ten digits in turn."""
    drawn = sample.draw(
        sample.load(path), args.n, args.nfe[0], classes=range(10), guidance=guidance, seed=seed
    )
    x = units(torch.from_numpy(np.concatenate([array for array, _ in drawn]))).flatten(1)
    digits = data.load("digits")
    index = torch.cdist(x, units(digits.train).flatten(1)).argmin(1)
    is_right = digits.train_labels[index] == torch.arange(args.n) % 10
    return {"right": float(is_right.double().mean()), **measure(x)}


def score(argv):
    p = compare.comparing(
        __doc__,
        "images",
        ["guidance"],
        nfe=[5, 10, 20],
        n=1797,
        search=200,
        runs="runs/images",
    )
    p.add_argument("--data", default="digits", help="digits, fashion, cifar10; default: digits")
    p.add_argument("--data-dir", help="folder or archive of the data set")
    p.add_argument("--ckpt", nargs="+", help="runs on pictures; of them the distance alone")
    args = p.parse_args(argv)
    name = args.data
    if args.ckpt:
        name = Path(args.ckpt[0]).name
    settings = {"n": args.n, "search": args.search, "flow_calls": args.flow_calls}
    fixed = {f"{key} of {name}": value for key, value in settings.items()}
    results = compare.Results(compare.file_of(args), fixed)
    if args.ckpt:
        none = compare.Comparison(results, lambda x: {}, dict, args.n, 0, args.n, args.flow_calls)
        contenders = compare.chosen(args.group, args.only)
        return none.run(name, args.ckpt, contenders, args.nfe)
    if name == "digits":
        options = "--data digits"
        measure, held_out = of_digits()
    else:
        options = f"--data {args.runs}/{name}.npz {PRESET}"
        measure, held_out = of_classifier(args)
    if args.group == "guidance":
        path = compare.trained(Path(args.runs, "classes"), "--classes", *args.train.split())
        rows = {}
        for guidance in GUIDANCE:
            key = compare.key_of("digits", "AGM", "guidance", guidance)
            compute = partial(by_class, path, guidance, args, measure)
            rows[guidance] = results.all(key, args.seeds, compute)
        for quantity in ("right", "frechet"):
            compare.table({"guidance": rows}, quantity, GUIDANCE)
        return
    for seed in range(5):
        results.of(compare.key_of(name, "data", "", 0), seed, partial(held_out, seed))
    paths = []
    for seed in range(args.seeds):
        more = f"{options} --seed {seed} {args.train}"
        folder = Path(args.runs, f"{name}-{seed}")
        paths.append(compare.trained(folder, *more.split()))
    comparison = compare.Comparison(
        results, measure, dict, args.n, args.search, 500, args.flow_calls
    )
    comparison.run(name, paths, compare.chosen(args.group, args.only), args.nfe)


def main(argv=None):
    command.run(lambda: score(argv))


if __name__ == "__main__":
    main()
