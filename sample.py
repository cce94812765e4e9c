"""Draws samples from a checkpoint: samples.png to look at, samples.npz to measure.

python sample.py                                   the newest run under runs/, 64 samples, 20 network calls
python sample.py --ckpt runs/agm-digits/ckpt.pt --sampler splitting --nfe 50 --n 1000 --out samples
python sample.py --sampler ode --eta 0.5 --nfe 20  the noise renewed on the way
python sample.py --method hold --order 3           the newest run, if it is a denoiser, with another process
python sample.py --ckpt runs/hold-digits/ckpt.pt --nll        HOLD: likelihood bound on the held-out data
"""

import argparse
import inspect
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

import data
from train import METHODS, build, layout, load_checkpoint, make_folder, newest_checkpoint, pick_device, refuse, run

OPTIONS = {"rho": "rho", "t_end": "t_end", "multistep": "order", "eta": "eta"}  # command line -> the sampler's keyword


def parser():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--ckpt", help="checkpoint; default: the newest under runs/")
    p.add_argument("--nfe", type=int, default=20, help="network calls a sample")
    p.add_argument("--n", type=int, help="how many samples; default: 64 images or 10,000 points")
    p.add_argument(
        "--sampler", help="AGM: exponential, ode, splitting, em; HOLD: ode, strang, lie, em; default: the first"
    )
    p.add_argument("--rho", type=float, help="exponent of the sampler's time grid; default: the sampler's")
    p.add_argument("--t-end", type=float, help="time of the last call (splitting, lie, strang: end of the last step)")
    p.add_argument("--multistep", type=int, help="exponential, ode: how many calls are extrapolated, 1-4")
    p.add_argument(
        "--eta", type=float, help="ode: noise that is renewed on the way; 0: none, 1: as much as the reverse SDE"
    )
    p.add_argument("--seed", type=int, default=0, help="sample i is the same for every --n and --batch")
    p.add_argument("--batch", type=int, default=256, help="samples at a time")
    p.add_argument("--raw", action="store_true", help="draw with the raw weights, not with their average (EMA)")
    p.add_argument(
        "--method", choices=METHODS, help="process to sample with; only a denoiser serves another than its own"
    )
    p.add_argument("--order", type=int, help="HOLD: order to sample with; only a denoiser serves another than its own")
    p.add_argument("--nll", action="store_true", help="HOLD: bound the likelihood of held-out data, draw nothing")
    p.add_argument("--tol", type=float, default=1e-4, help="nll: error tolerance of the ODE solver")
    p.add_argument("--data", help="nll: another data set or file than the checkpoint's")
    p.add_argument("--data-dir", help="nll: folder or archive of the data set")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes the first that is there")
    p.add_argument("--out", help="folder for the results; default: the checkpoint's")
    p.error = refuse
    return p


class Noise:
    """Unit noise with one generator an image, so that image i does not depend on the batch it is drawn in."""

    def __init__(self, seed, indices):
        self.generators = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**32) for i in indices]

    def prior(self, process, shape):
        return torch.cat([process.prior((1, *shape), g) for g in self.generators])

    def __call__(self, like):
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in self.generators]).to(like)


def restore(path, device, raw=False, method=None, order=None, amp=False):
    """Checkpoint -> (config, method module, process, net in eval mode), amp if the caller will use bf16. A denoiser
    serves any method and order; for any other net DataError says what it was trained for."""
    ckpt = load_checkpoint(path)
    config = ckpt["config"]
    if order is not None and (method or config["method"]) != "hold":
        raise data.DataError(f"--order {order} is HOLD's: give --method hold as well, or leave it out")
    asked = {"method": method or config["method"], "order": config["order"] if order is None else order}
    if config["param"] != "denoiser" and not asked.items() <= config.items():
        trained = config["method"] + (f" of order {config['order']}" if config["method"] == "hold" else "")
        raise data.DataError(
            f"{path} was trained as {trained} with --param {config['param']}, and only a denoiser serves other "
            "processes: leave out --method and --order, or name another --ckpt"
        )
    config.update(asked)
    method, process, net = build(config)
    try:
        net.load_state_dict(ckpt["net" if raw else "ema"])
    except RuntimeError:
        raise data.DataError(f"{path} does not fit the net that its config describes: train again") from None
    return config, method, process, net.to(device, memory_format=layout(torch.device(device), amp)).eval()


def sampler_options(method, args):
    """The sampler by name, with the options it takes; one that it does not take is refused."""
    name = args.sampler or next(iter(method.SAMPLERS))
    if name not in method.SAMPLERS:
        raise data.DataError(f"no sampler {name!r} for this method: choose from {', '.join(method.SAMPLERS)}")
    sampler = method.SAMPLERS[name]
    takes, options = inspect.signature(sampler).parameters, {}
    for flag, keyword in OPTIONS.items():
        if getattr(args, flag) is not None:
            if keyword not in takes:
                able = [k for k, f in method.SAMPLERS.items() if keyword in inspect.signature(f).parameters]
                fix = f"leave it out, or choose --sampler {' or '.join(able)}" if able else "leave it out"
                raise data.DataError(f"sampler {name} has no --{flag.replace('_', '-')}: {fix}")
            options[keyword] = getattr(args, flag)
    return name, sampler, options


@torch.no_grad()
def draw(sampler, process, net, shape, n, nfe, seed=0, batch=256, device="cpu", **options):
    """n samples (n, *shape) on the CPU, drawn `batch` at a time."""
    out, stochastic = [], "randn" in inspect.signature(sampler).parameters
    for i in range(0, n, batch):
        noise = Noise(seed, range(i, min(i + batch, n)))
        extra = {"randn": noise} if stochastic else {}
        m0 = noise.prior(process, shape).to(device)
        out.append(sampler(process, net, m0, nfe, **options, **extra).float().cpu())
    return torch.cat(out)


def sample(args):
    for key in ("nfe", "n", "batch"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise data.DataError(f"--{key} must be at least 1, got {getattr(args, key)}")
    path, device = Path(args.ckpt) if args.ckpt else newest_checkpoint(), pick_device(args.device)
    config, method, process, net = restore(path, device, args.raw, args.method, args.order)
    if args.nll:
        return print_nll(args, config, method, process, net, device)
    name, sampler, options = sampler_options(method, args)
    out = Path(args.out) if args.out else path.parent
    make_folder(out)

    calls = 0

    def counted(m, t, label=None):
        nonlocal calls
        calls += 1
        return net(m, t, label)

    shape = tuple(config["shape"])
    is_image = len(shape) == 3
    n = args.n or (64 if is_image else 10000)
    start = time.time()
    x = draw(sampler, process, counted, shape, n, args.nfe, args.seed, args.batch, device, **options)
    seconds = time.time() - start
    array = data.Dataset.to_pixels(x) if is_image else (x * config["scale"] + torch.tensor(config["shift"])).numpy()
    data.save_picture(out / "samples.png", array, is_image)
    with open(out / "samples.npz.tmp", "wb") as f:
        np.savez_compressed(f, arr_0=array)
    os.replace(out / "samples.npz.tmp", out / "samples.npz")
    batches = -(-n // args.batch)
    print(f"{n} samples from {path} ({config['param']} net on {config['data']}), drawn with {process}")
    print(f"sampler {name} {options or ''} NFE {calls // batches} seconds/sample {seconds / n:.5f} on {device}")
    print(f"wrote {out / 'samples.png'} and {out / 'samples.npz'}")


def print_nll(args, config, method, process, net, device):
    """Mean and standard error of the negative log-likelihood bound over the held-out data, or its first --n samples.

    Images: bits per dimension of the 8-bit values, which uniform noise of one grey level makes continuous (its mean is
    again a bound). Points: nats per point, in the units of the data.
    """
    if not hasattr(method, "log_likelihood_bound"):
        raise data.DataError(
            "--nll needs a HOLD checkpoint, or a denoiser with --method hold: AGM has no likelihood here"
        )
    if args.sampler or any(getattr(args, flag) is not None for flag in OPTIONS):
        raise data.DataError("--nll follows a flow of its own: leave out --sampler, --rho, --t-end, --multistep, --eta")
    if not args.tol > 0:
        raise data.DataError(f"--tol must be positive, got {args.tol}")
    dataset = data.load(args.data or config["data"], args.data_dir or config["data_dir"])
    if list(dataset.shape) != config["shape"]:
        raise data.DataError(f"{dataset.name} has shape {dataset.shape}, the checkpoint {tuple(config['shape'])}")
    held_out = dataset.test[: args.n]
    if len(held_out) < 2:
        raise data.DataError(f"{dataset.name} holds out {len(held_out)} samples: a mean and its error need at least 2")
    torch.manual_seed(args.seed)
    start, nats = time.time(), []
    for batch in held_out.split(args.batch):
        x = batch.to(device, torch.float32)
        if dataset.is_image:
            x, log_unit = (x + torch.rand_like(x) - 0.5) / 127.5 - 1, math.log(127.5)
        else:
            x, log_unit = (x - torch.tensor(config["shift"]).to(x)) / config["scale"], math.log(config["scale"])
        nats.append(log_unit * x[0].numel() - method.log_likelihood_bound(process, net, x, tol=args.tol).double().cpu())
    nll, unit = torch.cat(nats), "nats/point"
    if dataset.is_image:
        nll, unit = nll / (held_out[0].numel() * math.log(2)), "bits/dim"
    print(
        f"negative log-likelihood <= {nll.mean():.4f} +- {nll.std() / len(nll) ** 0.5:.4f} {unit} (standard error over "
        f"{len(nll)} held-out samples of {dataset.name}), {(time.time() - start) / 60:.1f} minutes on {device}"
    )


def main(argv=None):
    run(lambda: sample(parser().parse_args(argv)))


if __name__ == "__main__":
    main()
