"""What training and sampling cost beside the network itself, as Markdown tables of ratios.

    python bench/speed.py
    python bench/speed.py --data images.npy --orders 3     other data

`training`: a step of train.py, from its batch to the moving average, over forward, backward and AdamW of the same
network at a fixed input. `sampling`: a sampler of --nfe calls over as many bare calls. The two sides of a ratio take
turns and each counts with its median, so a busy machine spoils them less. The networks are untrained presets.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import train


def now():
    """The time when all work is done, also a GPU's."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(body, *args):
    start = now()
    body(*args)
    return now() - start


def build(model, name, *options):
    """config, module, process, net and shape, for a model such as agm or hold3, of the preset for the data `name`."""
    method, order = ("hold", model[-1]) if model.startswith("hold") else (model, "1")
    config, _ = train.configure(["--method", method, "--order", order, "--data", str(name), *options])
    facts = data.load(config.data).summary()
    return config, *train.build(config, facts), tuple(facts["shape"])


def training(model, target, repeats, name, *options, warm=3):
    """The ratio of train.py's own step to the bare one, which is slipped in where train.py asks for a batch."""
    endless = "--steps 1000000 --log-every 1000000 --save-every 1000000".split()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--target", target, *endless, "--out", f"{folder}/run", *options]
        config, _, process, net, (C, *size) = build(model, name, *options)
        m = torch.randn(config.batch, C if target == "data" else process.n * C, *size)
        adam, take, start = torch.optim.AdamW(net.parameters(), fused=True), data.Dataset.batch, None
        ours, bare = [], []

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

        hook, quiet = mock.patch.object(data.Dataset, "batch", batch), contextlib.redirect_stdout(io.StringIO())
        with hook, quiet, contextlib.suppress(StopIteration):
            train.train(config)
    return median(ours[warm:]) / median(bare[warm:])


@torch.no_grad()
def sampling(model, sampler, name, n, nfe, repeats, device="cpu"):
    """The ratio of drawing n samples with a denoiser to nfe calls of it."""
    _, module, process, net, shape = build(model, name)
    start, m, t = (x.to(device) for x in (process.prior((n, *shape)), torch.randn(n, *shape), torch.full((n,), 0.5)))
    net, ours, bare = net.to(device).eval(), [], []
    predict = partial(module.denoise, process, net)
    for _ in range(repeats + 1):  # the first warms up, and computes what later ones find
        ours.append(seconds(sampler, process, predict, start, nfe))
        bare.append(seconds(lambda: [net(m, t) for _ in range(nfe)]))
    return median(ours[1:]) / median(bare[1:])


def samplers(model):
    return train.METHODS[model.rstrip("123456")].SAMPLERS


def table(first, columns, rows):
    print("|", " | ".join([first, *columns]), "|\n" + "|---" * (len(columns) + 1) + "|")
    for name, cells in rows:
        cells = (cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells)
        print("|", " | ".join([name, *cells]), "|", flush=True)
    print()


def measure(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", nargs="+", default=["spiral", "digits"], help="of the training; default: spiral digits")
    p.add_argument("--orders", type=int, nargs="*", default=[1, 2, 3, 4, 5, 6], help="of HOLD; default: 1 to 6")
    p.add_argument("--repeats", type=int, default=5, help="of each of the two in a ratio; default: 5")
    p.add_argument("--nfe", type=int, default=20, help="network calls of the samplers; default: 20")
    args = p.parse_args(argv)
    models = ["agm", *(f"hold{n}" for n in args.orders)]
    runs = [(model, t) for model in models for t in (("data", "ode", "sde") if model == "agm" else ("data", "noise"))]
    rows = ((" ".join(run), [training(*run, 2 * args.repeats, name) for name in args.data]) for run in runs)
    table("training", args.data, rows)
    cases = {"64 digits": ("digits", 64), "10,000 points": ("spiral", 10_000), "256 points": ("spiral", 256)}
    for model in models:
        found = samplers(model).items()
        rows = ((k, [sampling(model, f, *case, args.nfe, args.repeats) for case in cases.values()]) for k, f in found)
        table(f"sampling, {model}", cases, rows)


TOY = "--repeats 1 --nfe 1 --data spiral --orders"


def main(argv=None):
    train.run(lambda: measure(argv))


if __name__ == "__main__":
    main()
