"""Fréchet and nearest-neighbour distances on the 64 raw pixels of the embedded digits, as a Markdown table.

    python bench/digits.py --ckpt runs/agm-digits/ckpt.pt --nfe 5 10 20

Pixels lie in [-1, 1]. `all`, `train`, `held-out` are the Fréchet distances of --n samples to all 1,797 digits, to the
four fifths that were trained on and to the fifth that was held out; `nearest` is the mean distance from a sample to its
nearest training digit. The first rows are the data's own: as many digits as samples (half of all at most) against the
others, train against held-out, and the nearest training digit of a held-out one. A sampler that memorised would come
out nearer than that.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from sample import OPTIONS, draw, restore, sampler_options
from train import run


def frechet(a, b):
    """Fréchet distance |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two sets (N, D)."""
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    w, V = torch.linalg.eigh(A)
    root = V @ torch.diag(w.clamp(min=0).sqrt()) @ V.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def nearest(a, b):
    """Mean distance from each row of a to its nearest row of b."""
    return torch.cdist(a, b).min(1).values.mean().item()


TOY = ["--nfe", "2", "--n", "70"]  # what the tests append


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", nargs="+", required=True, help="checkpoints trained on digits")
    p.add_argument("--sampler", nargs="+", help="samplers; default: all of the method's")
    p.add_argument("--method", help="process to sample a denoiser with; default: the checkpoint's")
    p.add_argument("--order", type=int, help="HOLD: its order")
    p.add_argument("--eta", type=float, help="noise renewed on the way, with --sampler ode; default 0")
    p.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20], help="network calls")
    p.add_argument("--n", type=int, default=1797, help="samples")
    args = p.parse_args(argv)

    digits = data.load("digits")
    train, test = ((x.flatten(1).float() / 127.5 - 1) for x in (digits.train, digits.test))
    everything = torch.cat([train, test])
    floor, k = [], min(args.n, len(everything) // 2)
    for seed in range(20):
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
        floor.append(frechet(everything[order[:k]], everything[order[k:]]))
    floor = torch.tensor(floor)
    print("| run | sampler | NFE | all | train | held-out | nearest | seconds |\n|---|---|---|---|---|---|---|---|")
    print(f"| data: {k} against the others | | | {floor.mean():.3f} ± {floor.std():.3f} | | | | |")
    print(f"| data: train against held-out | | | | | {frechet(train, test):.3f} | {nearest(test, train):.3f} | |")
    for path in args.ckpt:
        _, method, process, net = restore(path, "cpu", method=args.method, order=args.order)
        for name in args.sampler or method.SAMPLERS:
            chosen = argparse.Namespace(**{**dict.fromkeys(OPTIONS), "sampler": name, "eta": args.eta})
            _, sampler, options = sampler_options(method, chosen)
            for nfe in args.nfe:
                start = time.time()
                x = draw(sampler, process, net, digits.shape, args.n, nfe, **options)
                x = x.clamp(-1, 1).flatten(1)
                row = [frechet(x, everything), frechet(x, train), frechet(x, test), nearest(x, train)]
                row = [
                    Path(path).parent.name,
                    name if args.eta is None else f"{name}, eta {args.eta:g}",
                    nfe,
                    *(f"{v:.3f}" for v in row),
                    f"{time.time() - start:.0f}",
                ]
                print("|", *(f"{cell} |" for cell in row), flush=True)


if __name__ == "__main__":
    run(main)
