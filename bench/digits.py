"""Fréchet and nearest-neighbour distances on the 64 raw pixels of the embedded digits, as a Markdown table.

    python bench/digits.py --ckpt runs/agm-digits/ckpt.pt --only "HOLD3 denoiser, ode" "EDM, UniPC" --nfe 5 10
    python bench/digits.py --ckpt runs/classes/ckpt.pt --guidance 0 1 1.5 3              of a run with --classes

Contenders have the names of peers.py. Pixels lie in [-1, 1]. `Fréchet` is the distance of --n samples to all 1,797
digits; `nearest` the mean distance from a sample to its nearest training digit; `flow` the root mean square distance,
per pixel of the first 500 samples, to where the network's own flow takes the same noise in --flow-nfe calls. The first
rows are the data's own: as many digits as samples (half of all at most) against the others, and the nearest training
digit of a held-out one: a sampler that memorised would come out nearer than that. With --guidance, as many samples of
each class are drawn by AGM's `ode`, and `right` is the share of them whose nearest digit has the class asked for.
"""

import argparse
import sys
from functools import partial
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import peers
from fid import frechet, moments

import agm_ref
import data
import sample
import train


def nearest(a, b):
    """Mean distance from each row of a to its nearest row of b."""
    return torch.cdist(a, b).min(1).values.mean().item()


def row(*cells):
    print("|", *(f"{cell:.3f} |" if isinstance(cell, float) else f"{cell} |" for cell in cells), flush=True)


@torch.no_grad()
def by_class(path, args, measure, everything, classes):
    """The rows of --guidance; NFE counts all calls."""
    process, predict, facts = peers.restore(path, "agm")
    label = torch.arange(args.n) % facts["labels"]
    for strength, nfe in product(args.guidance, args.nfe):
        net, mean = sample.guide(predict.args[1], strength), facts["mean"]
        mean = (mean + strength * (facts["class_means"][label] - mean)).clamp(-1, 1)
        m = process.prior((args.n, *facts["shape"]), torch.Generator().manual_seed(0))
        x = agm_ref.ode(process, partial(agm_ref.denoise, process, net, label=label), m, nfe, data_mean=mean)
        right = float((classes[torch.cdist(x.flatten(1), everything).argmin(1)] == label).double().mean())
        row(f"{strength:g}", nfe if strength in (0, 1) else 2 * nfe, right, *measure(x))


def score(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", type=Path, required=True, help="checkpoint trained on digits")
    p.add_argument("--only", nargs="+", default=[""], help="contenders whose name contains one of these")
    p.add_argument("--guidance", type=float, nargs="+", help="strengths, for runs with --classes")
    p.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20], help="network calls")
    p.add_argument("--n", type=int, default=1797, help="samples")
    p.add_argument("--flow-nfe", type=int, default=400, help="network calls of the converged flow")
    args = p.parse_args(argv)
    args.ckpt = args.ckpt / "ckpt.pt" if args.ckpt.is_dir() else args.ckpt
    digits = data.load("digits")
    train_set, test = ((x / 127.5 - 1).flatten(1) for x in (digits.train, digits.test))
    everything = torch.cat([train_set, test])
    known = moments([everything])

    def measure(x):
        x = x.flatten(1)
        return [frechet(moments([x]), known), nearest(x, train_set)]

    if args.guidance:
        print("| guidance | NFE | right | Fréchet | nearest |\n" + "|---" * 5 + "|")
        classes = torch.cat([digits.train_labels, digits.test_labels])
        return by_class(args.ckpt, args, measure, everything, classes)

    floor, k = [], min(args.n, len(everything) // 2)
    for seed in range(20):
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
        floor.append(frechet(moments([everything[order[:k]]]), moments([everything[order[k:]]])))
    floor = torch.tensor(floor)
    print("| contender | NFE | Fréchet | nearest | flow |\n" + "|---" * 5 + "|")
    row(f"{k} digits against the others", "", f"{floor.mean():.3f} ± {floor.std():.3f}", "", "")
    row("held-out digits", "", "", nearest(test, train_set), "")
    config, options = train.load_checkpoint(args.ckpt)["config"], dict(n_flow=500, flow_nfe=args.flow_nfe, batch=250)
    own = config.method + (str(config.order) if config.method == "hold" else "")
    for contender in peers.contenders("denoiser" if config.target == "data" else own, args.only):
        found = peers.evaluate(
            contender, [args.ckpt], args.nfe, args.n, measure, peers.Results(), lambda v: v[0], **options
        )
        for nfe, (_, numbers) in found.items():
            row(contender.title, nfe, *(v if v == v else "" for v in numbers[0]))


TOY = "--nfe 2 --n 70 --flow-nfe 4 --only ode SA-"


def main(argv=None):
    train.run(lambda: score(argv))


if __name__ == "__main__":
    main()
