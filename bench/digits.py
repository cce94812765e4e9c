"""Fréchet and nearest-neighbour distances on the 64 raw pixels of the embedded digits, as a Markdown table.

    python bench/digits.py --ckpt runs/agm-digits/ckpt.pt --nfe 5 10 20
    python bench/digits.py --ckpt runs/agm-digits/ckpt.pt --only "HOLD3 denoiser, ode" "EDM, UniPC" --nfe 5 10
    python bench/digits.py --ckpt runs/agm-digits/ckpt.pt --guidance 0 1 1.5 3      of a run with --classes

Contenders have the names of peers.py; without --only they are the samplers of the checkpoint's own process. Pixels lie
in [-1, 1]. `all`, `train`, `held-out` are the Fréchet distances of --n samples to all 1,797 digits, to the four fifths
that were trained on and to the fifth that was held out; `nearest` is the mean distance from a sample to its nearest
training digit; `flow` is the root mean square distance, per pixel of the first 500 samples, to where the network's own
flow takes the same noise in 400 calls. The first rows are the data's own: as many digits as samples (half of all at
most) against the others, train against held-out, and the nearest training digit of a held-out one. A sampler that
memorised would come out nearer than that. With --guidance, as many samples of each class are drawn by the run's own
default sampler, and `right` is the share of them whose nearest digit has the class that was asked for.
"""

import argparse
import itertools
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import peers
from fid import frechet, moments

import data
import sample
import train
from train import run


def nearest(a, b):
    """Mean distance from each row of a to its nearest row of b."""
    return torch.cdist(a, b).min(1).values.mean().item()


def by_class(path, args, measure, everything, classes):
    """The rows of --guidance; NFE counts all calls."""
    config, method, process, net = sample.restore(path, "cpu")
    for guidance, nfe in itertools.product(args.guidance, args.nfe):
        n, label, means = sample.labels(config, args.n, "all", guidance)
        guided, sampler = sample.guide(net, guidance), next(iter(method.SAMPLERS.values()))
        x = train.draw(sampler, process, guided, config["shape"], n, nfe, label=label, data_mean=means)
        right = (classes[torch.cdist(x.flatten(1), everything).argmin(1)] == label).double().mean()
        cells = [f"{v:.3f}" for v in (right, *measure(x))]
        print("|", *(f"{cell} |" for cell in (guidance, nfe if guidance in (0, 1) else 2 * nfe, *cells)), flush=True)


TOY = ["--nfe", "2", "--n", "70", "--flow-nfe", "4", "--only", "ode", "UniPC-2 from"]  # what the tests append


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", nargs="+", required=True, help="checkpoints trained on digits")
    p.add_argument("--only", nargs="+", help="contenders whose name contains one of these; default: all of its own")
    p.add_argument("--guidance", type=float, nargs="+", help="strengths, for runs with --classes")
    p.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20], help="network calls")
    p.add_argument("--n", type=int, default=1797, help="samples")
    p.add_argument("--flow-nfe", type=int, default=400, help="network calls of the converged flow")
    args = p.parse_args(argv)
    peers.register()

    digits = data.load("digits")
    train_set, test = ((x.flatten(1).float() / 127.5 - 1) for x in (digits.train, digits.test))
    everything = torch.cat([train_set, test])
    known = [moments([part]) for part in (everything, train_set, test)]

    def measure(x):
        x = x.clamp(-1, 1).flatten(1)
        found = moments([x])
        return [*(frechet(found, part) for part in known), nearest(x, train_set)]

    if args.guidance:
        print("| guidance | NFE | right | all | train | held-out | nearest |\n" + "|---" * 7 + "|")
        labels = torch.cat([digits.train_labels, digits.test_labels])
        return [by_class(path, args, measure, everything, labels) for path in args.ckpt]

    floor, k = [], min(args.n, len(everything) // 2)
    for seed in range(20):
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
        floor.append(frechet(moments([everything[order[:k]]]), moments([everything[order[k:]]])))
    floor = torch.tensor(floor)
    sampling = partial(peers.evaluate, score=lambda row: row[0], n_flow=500, flow_nfe=args.flow_nfe, batch=250)
    print("| run | contender | NFE | all | train | held-out | nearest | flow | seconds |\n" + "|---" * 9 + "|")
    print(f"| data: {k} against the others | | | {floor.mean():.3f} ± {floor.std():.3f} | | | | | |")
    row = f"{frechet(*known[1:]):.3f} | {nearest(test, train_set):.3f}"
    print(f"| data: train against held-out | | | | | {row} | | |")
    for path in map(Path, args.ckpt):
        config = train.load_checkpoint(path)["config"]
        method, order = config["method"], config["order"] if config["method"] == "hold" else ""
        kind = "denoiser" if config["param"] == "denoiser" else f"{method}{order}"
        own = f"{method.upper()}{order} {'denoiser' if kind == 'denoiser' else 'paper'}, "
        names = args.only or [own + name for name in train.METHODS[method][0].SAMPLERS]
        for contender in peers.contenders(kind, names):
            for nfe in args.nfe:
                start = time.time()
                numbers = sampling(contender, [path], [nfe], args.n, measure, peers.Results())
                cells = [*(f"{v:.3f}" if v == v else "" for v in numbers[nfe][1][0]), f"{time.time() - start:.0f}"]
                print("|", *(f"{cell} |" for cell in (path.parent.name, contender.title, nfe, *cells)), flush=True)


if __name__ == "__main__":
    run(main)
