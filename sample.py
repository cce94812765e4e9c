"""Draws samples from a checkpoint: samples.npz to measure, samples.png to look at.

python sample.py                                   the newest run under runs/, 64 samples, 20 network calls
python sample.py --ckpt runs/agm-digits/ckpt.pt --sampler splitting --nfe 50 --n 1000 --out samples
python sample.py --sampler ode --eta 0.5 --nfe 20  with fresh noise injected on the way
python sample.py --method hold --order 3           the newest run, if it is a denoiser, with another process
python sample.py --ckpt runs/hold-digits/ckpt.pt --nll        HOLD: likelihood bound on the held-out data
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads ends without a traceback

import argparse
import inspect
import math
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
import train
from train import Noise, draw, option, run  # noqa: F401

OPTIONS = {"rho": "rho", "t_end": "t_end", "multistep": "multistep", "eta": "eta"}  # command line -> sampler's keyword


def parser():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = partial(option, p)
    add("--ckpt", "checkpoint; default: the newest under runs/")
    add("--nfe", "network calls a sample", default=20)
    add("--n", "how many samples; default: 64 images or 10,000 points")
    add("--sampler", "AGM: ode, exponential, splitting, em; HOLD: ode, strang, lie, em; default: the first")
    add("--rho", "exponent of the sampler's time grid; default: the sampler's")
    add("--t-end", "time of the last call (splitting, lie, strang: end of the last step)")
    add("--multistep", "exponential: how many calls are extrapolated")
    add("--eta", "ode: fresh noise injected on the way; 0: none, 1: as much as the reverse SDE")
    add("--seed", "sample i is the same for every --n and --batch", default=0)
    add("--batch", "samples at a time", default=256)
    p.add_argument("--raw", action="store_true", help="draw with the raw weights, not with their average (EMA)")
    add("--method", "process to sample with; only a denoiser serves another than its own")
    add("--order", "HOLD: order to sample with; only a denoiser serves another than its own")
    p.add_argument("--nll", action="store_true", help="HOLD: bound the likelihood of held-out data, draw nothing")
    add("--tol", "nll: error tolerance of the ODE solver", default=1e-4)
    add("--data", "nll: another data set or file than the checkpoint's")
    add("--data-dir", "nll: folder or archive of the data set")
    add("--device", "cpu, cuda, mps; auto takes the first that is there", default="auto")
    add("--out", "folder for the results; default: the checkpoint's")
    p.error = train.refuse
    return p


def restore(path, device, raw=False, method=None, order=None, amp=False):
    """Checkpoint -> (config, method module, process, net in eval mode), amp if the caller will use bf16. A denoiser
    serves any method and order; for any other net UserError says what it was trained for."""
    ckpt = train.load_checkpoint(path)
    config = ckpt["config"]
    if order is not None and (method or config["method"]) != "hold":
        raise data.UserError(f"--order {order} is HOLD's: give --method hold as well, or leave it out")
    asked = {"method": method or config["method"], "order": config["order"] if order is None else order}
    if config["param"] != "denoiser" and not asked.items() <= config.items():
        trained = config["method"] + (f" of order {config['order']}" if config["method"] == "hold" else "")
        raise data.UserError(
            f"{path} was trained as {trained} with --param {config['param']}, and only a denoiser serves other "
            "processes: leave out --method and --order, or name another --ckpt"
        )
    config.update(asked)
    method, process, net = train.build(config)
    try:
        net.load_state_dict(ckpt["net" if raw else "ema"])
    except RuntimeError:
        raise data.UserError(f"{path} does not fit the net that its config describes: train again") from None
    return config, method, process, net.to(device, memory_format=train.layout(torch.device(device), amp)).eval()


def sampler_options(method, args):
    """The sampler by name, with the options it takes; one that it does not take is refused."""
    name = next(iter(method.SAMPLERS)) if args.sampler is None else args.sampler
    if name not in method.SAMPLERS:
        raise data.UserError(f"no sampler {name!r} for this method: choose from {', '.join(method.SAMPLERS)}")
    sampler = method.SAMPLERS[name]
    takes, options = inspect.signature(sampler).parameters, {}
    for flag, keyword in OPTIONS.items():
        if getattr(args, flag) is not None:
            if keyword not in takes:
                able = [k for k, f in method.SAMPLERS.items() if keyword in inspect.signature(f).parameters]
                fix = f"leave it out, or choose --sampler {' or '.join(able)}" if able else "leave it out"
                raise data.UserError(f"sampler {name} has no --{flag.replace('_', '-')}: {fix}")
            options[keyword] = getattr(args, flag)
    return name, sampler, options


def sample(args):
    path, device = Path(args.ckpt) if args.ckpt else train.newest_checkpoint(), train.pick_device(args.device)
    config, method, process, net = restore(path, device, args.raw, args.method, args.order)
    if args.nll:
        return print_nll(args, config, method, process, net, device)
    name, sampler, options = sampler_options(method, args)
    out, shape = Path(args.out) if args.out else path.parent, tuple(config["shape"])
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # before the work is done; it has no name
    except OSError as e:
        raise data.UserError(f"cannot write to {out} ({e.strerror}): choose another --out") from None

    calls = 0

    def counted(m, t, label=None):
        nonlocal calls
        calls += 1
        return net(m, t, label)

    n, start = args.n or (64 if len(shape) == 3 else 10000), time.time()
    mean = config.get("data_mean", 0.0 if len(shape) == 1 else None)  # None: of an older checkpoint
    x = draw(sampler, process, counted, shape, n, args.nfe, args.seed, args.batch, device, data_mean=mean, **options)
    seconds = time.time() - start
    array = train.finish(x, config)
    if not x.isfinite().all() or not np.isfinite(array).all():
        raise data.UserError("samples are not finite, so nothing was written: try other --sampler, --rho or --t-end")
    shown = min(n, 1024, max(1, 2**26 // math.prod(shape))) if len(shape) == 3 else n  # readers refuse huge pictures
    files = {out / "samples.npz": partial(np.savez_compressed, arr_0=array)}
    try:
        files[out / "samples.png"] = data.png(data.picture(array[:shown], config.get("window")))
    except (MemoryError, ValueError) as e:
        print(f"no picture: {data.why(e)}")
    stop = []
    with train.signals(lambda number, _: stop.append(number)):  # the samples may be the work of hours
        data.write_files(files)
    wrote = f"wrote {' and '.join(map(str, files))}" + (f", which shows the first {shown}" if shown < n else "")
    if stop:
        raise train.Stopped(stop[0], f"stopped: {wrote}")
    print(f"{n} samples from {path} ({config['param']} net on {config['data']}), drawn with {process}")
    nfe = calls // -(-n // args.batch)
    print(f"sampler {name} {options or ''} NFE {nfe} seconds/sample {seconds / n:.5f} on {device}")
    if array.dtype == np.float64:
        print("the points are float64: float32 would round them too much, so far from 0 they lie")
    print(wrote)


def print_nll(args, config, method, process, net, device):
    """Mean and standard error of the negative log-likelihood bound over the held-out data, or its first --n samples.

    Images: bits per dimension of the 8-bit values, which uniform noise of one grey level makes continuous (its mean is
    again a bound). Points: nats per point, in the units of the data.
    """
    if not hasattr(method, "log_likelihood_bound"):
        raise data.UserError("--nll needs a HOLD checkpoint, or a denoiser with --method hold: AGM has none here")
    if args.sampler or any(getattr(args, flag) is not None for flag in OPTIONS):
        raise data.UserError("--nll follows a flow of its own: leave out --sampler, --rho, --t-end, --multistep, --eta")
    dataset = data.load(args.data or config["data"], args.data_dir or config["data_dir"])
    if list(dataset.shape) != config["shape"]:
        raise data.UserError(f"{dataset.name} has shape {dataset.shape}, the checkpoint {tuple(config['shape'])}")
    held_out = dataset.test[: args.n]
    if len(held_out) < 2:
        raise data.UserError(f"{dataset.name} holds out {len(held_out)} samples: a mean and its error need at least 2")
    torch.manual_seed(args.seed)
    start, nats = time.time(), []
    for batch in held_out.split(args.batch):
        if dataset.is_image:
            x, log_unit = (batch + torch.rand(batch.shape) - 0.5) / 127.5 - 1, math.log(127.5)
        else:  # from the units of these data to those of the run's
            x = batch.double() * dataset.scale + torch.as_tensor(dataset.shift) - torch.as_tensor(config["shift"])
            x, log_unit = (x / config["scale"]).float(), math.log(config["scale"])
        bound = method.log_likelihood_bound(process, net, x.to(device), tol=args.tol).cpu().double()
        nats.append(log_unit * x[0].numel() - bound)
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
