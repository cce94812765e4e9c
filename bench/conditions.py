"""Conditional generation against the exact conditional law, for the rules of sample.py, as a Markdown table.

    python bench/conditions.py
    python bench/conditions.py --ckpt runs/agm-digits/ckpt.pt --strip strip.png

Data of 8 numbers as 1x1x8 images, of which 4 are known; the denoiser is exact, so all error is the rule's and the
sampler's. `gauss`: correlation .9^|i - j|. `mixture`: two such Gaussians at -0.5 and 0.5. For the 4 unknown numbers:
mean, the error of the conditional mean in conditional standard deviations (root mean square), and cov, the relative
error of the conditional covariance (Frobenius norm), over --n samples of each of --known observations.

With --ckpt, the left half of --digits held-out digits is known, and that network completes them in 20 calls (the middle
one of --nfe). label: the share whose nearest training digit has the original's class; original, nearest: mean distance
to the original, and to the nearest training digit. --strip draws, for four of them, the original, what is known, and
six completions by the paper's rule and by covariance (AGM).
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import sample
from train import METHODS, run

S = 0.5  # standard deviation of a Gaussian
D = 8
COV = S**2 * 0.9 ** (torch.arange(D)[:, None] - torch.arange(D)).abs().double()
DATA = {"gauss": torch.zeros(1, D).double(), "mixture": torch.tensor([[-0.5], [0.5]]).double().expand(2, D)}  # centres


def weights(r, cov):
    """(N, k): the share of each Gaussian, given the distances r (k, N, d) from its centre, all of covariance cov."""
    return torch.softmax(-(torch.linalg.solve(cov, r.mT).mT * r).sum(-1).mT / 2, 1)


def exact_net(centres, sigma_data, cov=COV):
    """The network whose denoiser is the posterior mean: E[x | y] is a mean over the Gaussians, of x = c + K (y - c)."""

    def net(y, t, label=None):
        root = float(1 / t[0] - 1)  # 1 / sigma
        c_in = 1 / math.sqrt(1 + sigma_data**2 * root**2)
        u = y.flatten(1).double() / c_in  # y / sigma
        noisy = root**2 * cov + torch.eye(len(cov))
        r = u - root * centres[:, None]  # (k, N, d)
        means = centres[:, None] + root * torch.linalg.solve(noisy, r.mT).mT @ cov
        x = (weights(r, noisy).mT[..., None] * means).sum(0)
        return ((x - sigma_data**2 * root * c_in**2 * u) / (sigma_data * c_in)).reshape(y.shape).to(y)

    return net


def exact_law(centres, known, mask):
    """Mean and covariance of the unknown numbers given the known ones."""
    a, b = mask.bool(), ~mask.bool()
    K = COV[b][:, a] @ torch.linalg.inv(COV[a][:, a])
    r = known - centres[:, a]  # (k, 4)
    w = weights(r[:, None], COV[a][:, a])[0]
    means = centres[:, b] + r @ K.mT
    mean = w @ means
    return mean, COV[b][:, b] - K @ COV[a][:, b] + (w[:, None] * (means - mean)).mT @ (means - mean)


def errors(method, process, centres, mask, known, rule, nfe, n, generator):
    see, fill = sample.observation(mask[None])
    target = torch.zeros(D).double().masked_scatter(mask.bool(), known)[None, None, None].expand(n, 1, 1, D)
    condition = rule(method, see, fill, target)
    m0 = process.prior((n, 1, 1, D), generator).double()
    sampler = next(iter(method.SAMPLERS.values()))
    x = sampler(process, exact_net(centres, process.sigma_data), m0, nfe, data_mean=None, condition=condition)
    x = x.flatten(1)[:, ~mask.bool()]
    mean, cov = exact_law(centres, known, mask)
    off = (x.mean(0) - mean) / cov.diagonal().sqrt()
    return off.square().mean().sqrt(), (torch.cov(x.mT) - cov).norm() / cov.norm()


def redrawing(method, see, fill, known):
    return sample.by_redrawing(method, see, fill, known, torch.randn_like)


def covariance(steps):
    return lambda *args: sample.by_covariance(*args, steps=steps)


RULES = {"paper's": redrawing, "covariance, 2 steps": covariance(2), "covariance, 3 steps": covariance(3)}


def digits(path, count, strip, nfe):
    """The table of the trained network, and the picture."""
    known = (torch.arange(8) < 4).float().expand(8, 8)
    dataset = data.load("digits")
    train_set = dataset.train.flatten(1) / 127.5 - 1
    originals, classes = dataset.test[:count] / 127.5 - 1, dataset.test_labels[:count]

    def complete(module, process, net, rule, x, **options):
        see, fill = sample.observation(known)
        condition = rule(module, see, fill, see(x))
        m0 = process.prior(x.shape, torch.Generator().manual_seed(0))
        return module.ode(process, net, m0, nfe, data_mean=None, condition=condition, **options)

    def scores(x):
        distance, index = torch.cdist(x.flatten(1), train_set).min(1)
        same = (dataset.train_labels[index] == classes).double().mean()
        return f"{same:.3f} | {(x - originals).flatten(1).norm(dim=1).mean():.2f} | {distance.mean():.2f}"

    print("| process | rule | label | original | nearest |\n|---|---|---|---|---|")
    print(f"| the originals | | {scores(originals)} |")
    models = (("agm", None), ("hold", 1), ("hold", 2), ("hold", 3))
    restored = {model: sample.restore(path, "cpu", False, *model)[1:] for model in models}
    for (method, order), model in restored.items():
        for title, rule in RULES.items():
            for eta in (0.0, 1.0):
                torch.manual_seed(0)
                row = scores(complete(*model, rule, originals, eta=eta))
                print(f"| {method.upper()}{order or ''} | {title}{', eta 1' if eta else ''} | {row} |", flush=True)
    if strip:
        x = originals[:4].repeat_interleave(6, 0)
        rules = [complete(*restored["agm", None], rule, x).unflatten(0, (4, 6)) for rule in list(RULES.values())[:2]]
        gap = torch.zeros_like(originals[:4, None])
        cells = torch.cat([originals[:4, None], (originals * known)[:4, None], gap, rules[0], gap, rules[1]], 1)
        pixels = data.Dataset.to_pixels(cells.flatten(0, 1))
        data.write_png(strip, data.image_grid(pixels, columns=cells.shape[1], scale=5))


TOY = "--n 20 --known 1 --nfe 2 --digits 5".split()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--n", type=int, default=10_000, help="samples of each observation")
    p.add_argument("--known", type=int, default=5, help="observations")
    p.add_argument("--nfe", type=int, nargs="+", default=[10, 20, 100], help="network calls")
    p.add_argument("--ckpt", help="a denoiser trained on digits, to measure in place of the exact one")
    p.add_argument("--digits", type=int, default=200, help="with --ckpt: held-out digits")
    p.add_argument("--strip", help="with --ckpt: a PNG to write")
    args = p.parse_args(argv)
    if args.ckpt:
        return digits(Path(args.ckpt), args.digits, args.strip, args.nfe[len(args.nfe) // 2])
    head = "".join(f" mean {k} | cov {k} |" for k in args.nfe)
    print(f"| data | process | rule |{head}\n|---|---|---|{'---|' * 2 * len(args.nfe)}")
    mask = (torch.arange(D) % 2).double()
    for name, centres in DATA.items():
        generator = torch.Generator().manual_seed(0)
        draws = centres[torch.randint(len(centres), (args.known,), generator=generator)]
        draws = draws + torch.randn(args.known, D, generator=generator).double() @ torch.linalg.cholesky(COV).mT
        for method, order in (("agm", None), ("hold", 1), ("hold", 2), ("hold", 3)):
            module, _ = METHODS[method]
            process = module.HOLD(order=order, sigma_data=S) if order else module.AGM(sigma_data=S)
            for title, rule in RULES.items():
                torch.manual_seed(0)
                cells = []
                for nfe in args.nfe:
                    case = module, process, centres, mask
                    found = [errors(*case, x[mask.bool()], rule, nfe, args.n, generator) for x in draws]
                    cells += [f" {v:.3f} |" for v in torch.tensor(found).square().mean(0).sqrt()]
                print(f"| {name} | {method.upper()}{order or ''} | {title} |{''.join(cells)}", flush=True)


if __name__ == "__main__":
    run(main)
