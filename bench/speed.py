"""What training and sampling cost beside the network itself, as Markdown tables of ratios.

    python bench/speed.py                               points and 8x8 digits; some ten minutes on a core
    python bench/speed.py --sizes 28 32 --batch 4       also larger images: random ones, which cost the same

`training`: a step of train.py, from its batch to the moving average, over forward, backward and AdamW of the same
network at a fixed input. `sampling`: a sampler of --nfe calls over as many bare calls. The two sides of a ratio take
turns and each counts with its median, so a busy machine spoils them less. The networks are untrained.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import agm_ref
import data
import hold_ref
import train
from sample import Noise


def now():
    """The time when all work is done, also a GPU's."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(body, *args):
    start = now()
    body(*args)
    return now() - start


def build(method, order, name, *options):
    """config, process, net and shape of train.py's preset for the data of this name, which may be a file."""
    config, _ = train.configure(["--method", method, "--order", str(order), "--data", name, *options])
    dataset = data.load(name)
    config = {**config, "shape": list(dataset.shape), "std": dataset.std, "bound": dataset.bound}
    return config, *train.build(config)[1:], tuple(dataset.shape)


def training(method, order, param, repeats, name, options, warm=3):
    """The ratio of train.py's own step to the bare one, which is slipped in where train.py asks for a batch."""
    endless = "--steps 1000000 --log-every 1000000 --save-every 1000000".split()
    config, process, net, (C, *size) = build(method, order, name, "--param", param, *endless, *options)
    m = torch.randn(config["batch"], C if param == "denoiser" else process.n * C, *size)
    adam, take, ours, bare, start = torch.optim.AdamW(net.parameters(), fused=True), data.Dataset.batch, [], [], None

    def bare_step():
        adam.zero_grad()
        net(m, torch.full((len(m),), 0.5)).square().mean().backward()
        adam.step()

    def batch(dataset, n):
        nonlocal start
        if start:
            ours.append(time.perf_counter() - start)
        if len(ours) == repeats + warm:
            raise StopIteration
        bare.append(seconds(bare_step))
        start = time.perf_counter()
        return take(dataset, n)

    quiet, hook = contextlib.redirect_stdout(io.StringIO()), mock.patch.object(data.Dataset, "batch", batch)
    with tempfile.TemporaryDirectory() as folder, quiet, hook, contextlib.suppress(StopIteration):
        train.train({**config, "out": str(Path(folder) / "run")})
    return median(ours[warm:]) / median(bare[warm:])


@torch.no_grad()
def sampling(method, order, sampler, name, n, nfe, repeats, device="cpu"):
    """The ratio of drawing n samples with a denoiser to nfe calls of it."""
    _, process, net, shape = build(method, order, name, "--param", "denoiser")
    m0, m, t = (x.to(device) for x in (process.prior((n, *shape)), torch.randn(n, *shape), torch.full((n,), 0.5)))
    net, ours, bare = net.to(device).eval(), [], []
    for _ in range(repeats + 1):  # the first warms up, and computes what later ones find
        ours.append(seconds(sampler, process, net, m0, nfe))
        bare.append(seconds(lambda: [net(m, t) for _ in range(nfe)]))
    return median(ours[1:]) / median(bare[1:])


def table(first, columns, rows):
    print("|", " | ".join([first, *columns]), "|\n" + "|---" * (len(columns) + 1) + "|")
    for name, cells in rows:
        cells = (cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells)
        print("|", " | ".join([name, *cells]), "|", flush=True)
    print()


TOY = "--repeats 1 --nfe 2 --orders 1 --prior 20 --sizes".split()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--sizes", type=int, nargs="*", default=[], choices=[28, 32], help="also images of these sizes")
    p.add_argument("--batch", help="of those images; default: that of their preset")
    p.add_argument("--orders", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6], help="of HOLD; default: 1 to 6")
    p.add_argument("--repeats", type=int, default=15, help="of each of the two in a ratio; default: 15")
    p.add_argument("--nfe", type=int, default=20, help="network calls of the samplers; default: 20")
    p.add_argument("--prior", type=int, default=50_000, help="images of AGM's prior; default: 50,000")
    args = p.parse_args(argv)
    models = {"AGM": ("agm", 1), **{f"HOLD{n}": ("hold", n) for n in args.orders}}
    with tempfile.TemporaryDirectory() as folder:
        sets = {"512 points": ("spiral", []), "8x8": ("digits", [])}
        batch = ["--batch", args.batch] if args.batch else []
        for n in args.sizes:
            sets[f"{n}x{n}"] = f"{folder}/{n}.npy", batch
            np.save(f"{folder}/{n}", torch.randint(256, (512, n, n, 1 if n == 28 else 3), dtype=torch.uint8).numpy())
        for param in ("denoiser", "paper"):
            rows = ((k, [training(*v, param, args.repeats, *d) for d in sets.values()]) for k, v in models.items())
            table(f"training, {param}", sets, rows)

    cases = {"64 digits": ("digits", 64), "10,000 points": ("spiral", 10_000), "256 points": ("spiral", 256)}
    for model, v in models.items():
        found = train.METHODS[v[0]][0].SAMPLERS
        rows = ((k, [sampling(*v, f, *c, args.nfe, args.repeats) for c in cases.values()]) for k, f in found.items())
        table(f"sampling, {model}", cases, rows)

    t, m0 = torch.rand(512, dtype=torch.float64), torch.randn(4, 12)
    fresh = [hold_ref.HOLD(order=6, param="denoiser", T=6 + 1e-6 * i) for i in range(5)]  # nothing found in a cache
    first = median(seconds(hold_ref.ode, P, lambda m, t, label: m, m0, 10) for P in fresh)
    cholesky = median(seconds(fresh[0].cholesky, t) for _ in range(2 * args.repeats))
    parts = [range(i, min(i + 256, args.prior)) for i in range(0, args.prior, 256)]
    prior = seconds(lambda: [Noise(0, part).prior(agm_ref.AGM(), (1, 8, 8)) for part in parts])
    names = "HOLD6, its first `ode`, 10 calls", "HOLD6, `cholesky` of 512 times", f"AGM, prior of {args.prior} digits"
    table("milliseconds", [""], [(name, [1000 * s]) for name, s in zip(names, (first, cholesky, prior), strict=True)])


if __name__ == "__main__":
    train.run(main)
