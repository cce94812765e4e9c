"""Draws samples from a checkpoint: samples.npz to measure, samples.png to look at.

python sample.py                                   the newest run under runs/, 64 samples, 20 network calls
python sample.py --ckpt runs/agm-digits/ckpt.pt --sampler splitting --nfe 50 --n 1000 --out samples
python sample.py --n 50000 --png-dir pngs          a file each for other evaluators; after a stop it goes on
python sample.py --sampler ode --eta 0.5 --nfe 20  with fresh noise injected on the way
python sample.py --method hold --order 3           the newest run, if it is a denoiser, with another process
python sample.py --class all --guidance 1.5        rows of each class, of a run with --classes
python sample.py --inpaint FILE --mask FILE        the rest of a picture, or --shrink K; --stroke FILE for a sketch
python sample.py --ckpt runs/hold-digits/ckpt.pt --nll        HOLD: likelihood bound on the held-out data
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads ends without a traceback

import argparse
import hashlib
import inspect
import io
import math
import os
import secrets
import shutil
import sys
import tempfile
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

import data
import train
from train import Noise, batches, option, run  # noqa: F401

OPTIONS = ("rho", "t_end", "multistep", "eta", "correct")  # that samplers take

# Option -> the option that it belongs to, and its default there.
NEEDS = {
    "guidance": ("class", 1.0),
    **{"inject": ("stroke", "dyn"), "share": ("stroke", 0.25)},
    **{"mask": ("inpaint", None), "shrink": ("inpaint", None), "rule": ("inpaint", "covariance")},
    **{"passes": ("inpaint", 2), "noise": ("inpaint", 0.0)},
    **{"tol": ("nll", 1e-4), "data": ("nll", None), "data_dir": ("nll", None)},
}


def parser():
    p = train.command_line(__doc__)
    add = partial(option, p)
    add("--ckpt", "checkpoint; default: the newest under runs/")
    add("--nfe", "network calls a sample", default=20)
    add("--n", "how many samples; default: 64 images or 10,000 points")
    add("--sampler", "AGM: ode, exponential, splitting, em; HOLD: ode, strang, lie, em; default: the first")
    add("--rho", "exponent of the sampler's time grid; default: 1")
    add("--t-end", "time of the last call (splitting, lie, strang: end of the last step); default: the sampler's")
    add("--multistep", "exponential: how many calls are extrapolated; default: 2")
    add("--eta", "ode: fresh noise injected on the way; 0: none (default), 1: as much as the reverse SDE")
    text = "ode, exponential: repeat each step with the next prediction, at no further call; default: yes"
    p.add_argument("--correct", action=argparse.BooleanOptionalAction, help=text)
    add("--class", "number of the class to draw, or all: as many of each; for networks trained with --classes")
    add("--guidance", "class: 1 draws from its law, 0 from that of all data, more than 1 exaggerates; default: 1")
    add("--stroke", "picture that guides the samples, without retraining: uint8 .npy, or any file with Pillow")
    add("--inject", "stroke: redraw v given it in the first share of the calls (dyn, default), or mix it into v (init)")
    add("--share", "stroke, dyn: share of the calls; default: 0.25")
    add("--inpaint", "picture of which a part is known, with --mask or --shrink")
    add("--mask", "inpaint: which pixels are known, bool or uint8 (H, W), not 0")
    add("--shrink", "inpaint: the means of blocks of this size are known (super-resolution)")
    add("--rule", "inpaint: by the posterior covariance (default), or by redrawing v as in AGM's paper")
    add("--passes", "inpaint: backward passes a call, steps of conjugate gradients; default: 2")
    add("--noise", "inpaint: what is known has noise of that standard deviation, in grey levels of 255; default: 0")
    add("--seed", "sample i is the same for every --n and --batch", default=0)
    add("--batch", "samples at a time", default=256)
    p.add_argument("--raw", action="store_true", help="draw with the raw weights, not with their average (EMA)")
    add("--method", "process to sample with; only a denoiser serves another than its own")
    add("--order", "HOLD: order to sample with; only a denoiser serves another than its own")
    p.add_argument("--nll", action="store_true", help="HOLD: bound the likelihood of held-out data, draw nothing")
    add("--tol", "nll: error tolerance of the ODE solver; default: 0.0001")
    add("--data", "nll: another data set or file than the checkpoint's")
    add("--data-dir", "nll: folder or archive of the data set")
    add("--amp", "bf16: autocast the net to bfloat16", default="off")
    p.add_argument("--compile", action="store_true", help="compile the net: faster calls after a start of a minute")
    add("--device", "cpu, cuda, mps; auto takes the first that is there", default="auto")
    add("--out", "folder for the results, in place of former ones; default: the checkpoint's")
    add("--png-dir", "new folder for one PNG a sample: 000000.png ..., RGB even of grey, as evaluators want it")
    return p


def restore(path, device, raw=False, method=None, order=None):
    """Checkpoint -> (config, method module, process, net in eval mode). A denoiser serves any method and order; for any
    other net UserError says what it was trained for."""
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
    return config, method, process, net.to(device).eval()


def sampler_options(method, args):
    """The sampler by name, with the options it takes; one that it does not take is refused."""
    name = next(iter(method.SAMPLERS)) if args.sampler is None else args.sampler
    if name not in method.SAMPLERS:
        raise data.UserError(f"no sampler {name!r} for this method: choose from {', '.join(method.SAMPLERS)}")
    sampler = method.SAMPLERS[name]
    takes, options = inspect.signature(sampler).parameters, {}
    for key in OPTIONS:
        if getattr(args, key) is not None:
            if key not in takes:
                able = [k for k, f in method.SAMPLERS.items() if key in inspect.signature(f).parameters]
                fix = f"leave it out, or choose --sampler {' or '.join(able)}" if able else "leave it out"
                raise data.UserError(f"sampler {name} has no --{key.replace('_', '-')}: {fix}")
            options[key] = getattr(args, key)
    return name, sampler, options


def settle(args):
    """Fills in the defaults of NEEDS; an option without the one that it belongs to is refused."""
    for flag, other, value in (("passes", "rule", "paper"), ("noise", "rule", "paper"), ("share", "inject", "init")):
        if getattr(args, flag) is not None and getattr(args, other) == value:
            raise data.UserError(f"--{other} {value} has no --{flag}: leave one of them out")
    for flag, (needs, default) in NEEDS.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
        elif not getattr(args, needs):
            raise data.UserError(f"--{flag.replace('_', '-')} belongs to --{needs}: add that, or leave it out")


def data_mean(config):
    """The mean of the data, which their flow starts from; None: unknown, as in older checkpoints of images."""
    return config.get("data_mean", 0.0 if len(config["shape"]) == 1 else None)


def labels(config, n, wanted, guidance):
    """How many samples (n, or the default), the classes (n,) that are wanted (a number, all) or None, and the mean that
    their flow starts from: with classes, a row for each of them."""
    shape = config["shape"]
    classes, every = config["labels"] if config["classes"] else 0, wanted == "all"
    n = n or (10_000 if len(shape) == 1 else 8 * classes if every else 64)
    mean = data_mean(config)
    if wanted is None:
        return n, None, mean
    if not classes:
        raise data.UserError("--class wants a network that was trained with --classes: leave it out, or train one")
    if not every and not (wanted.isdecimal() and int(wanted) < classes):
        raise data.UserError(f"--class must be all or a whole number from 0 to {classes - 1}, got {wanted:.40}")
    label = torch.arange(n) * classes // n if every else torch.full((n,), int(wanted))
    means = config.get("class_means")
    if means is not None:
        means = (mean + guidance * (means - mean)).clamp(-config["bound"], config["bound"])
    return n, label, means


def guide(net, guidance):
    """Classifier-free guidance (Ho & Salimans 2022): what the network says without the label, and `guidance` times what
    the label changes. Every target here is affine in the data, so it guides E[x | m], whatever the network predicts."""

    def guided(m, t, label):
        if guidance in (0, 1):
            return net(m, t, label if guidance else None)
        free = net(m, t, None)
        return free + guidance * (net(m, t, label) - free)

    return guided


def sample(args):
    settle(args)
    path, device = Path(args.ckpt) if args.ckpt else train.newest_checkpoint(), train.pick_device(args.device)
    config, method, process, net = restore(path, device, args.raw, args.method, args.order)
    if args.nll:
        return print_nll(args, config, method, process, net, device)
    name, sampler, options = sampler_options(method, args)
    out, shape = Path(args.out) if args.out else path.parent, tuple(config["shape"])
    given = conditional(args, method, process, shape, device)
    n, label, mean = labels(config, args.n, getattr(args, "class"), args.guidance)
    pngs = Path(args.png_dir) if args.png_dir else None
    if pngs and (any(pngs.glob("*")) or out.resolve().is_relative_to(pngs.resolve())):
        raise data.UserError(f"--png-dir {pngs} must be new or empty, and another folder than that of --out")
    if pngs and len(shape) != 3:
        raise data.UserError("--png-dir wants a network of images, this one draws points: leave it out")
    for flag, folder in [("--out", out), *([("--png-dir", pngs)] if pngs else [])]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # before the work is done; it has no name
        except OSError as e:
            raise data.UserError(f"cannot write to {folder} ({e.strerror}): choose another {flag}") from None

    calls, net = 0, torch.compile(net) if args.compile else net

    def counted(m, t, label=None):
        nonlocal calls
        calls += 1
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            return net(m, t, label).to(m)

    start, guided = time.time(), counted if label is None else guide(counted, args.guidance)
    options_of_draw = dict(seed=args.seed, batch=args.batch, device=device, conditional=given, label=label)
    options_of_draw["data_mean"] = None if given else mean  # where something is given, the mean is another
    drawn = partial(batches, sampler, process, guided, shape, n, args.nfe, **options_of_draw, **options)
    part = part_file(args, out, path, n, device)
    array, kept = collect(drawn, config, n, args.batch, part)
    seconds = time.time() - start
    shown = min(n, 1024, max(1, 2**26 // math.prod(shape))) if len(shape) == 3 else n  # readers refuse huge pictures
    classes = {} if label is None else {"labels": label.numpy()}
    files = {out / "samples.npz": partial(np.savez_compressed, arr_0=array, **classes)}
    columns, rows, what = None, slice(shown), f"the first {shown}"
    if getattr(args, "class") == "all" and (columns := shown // config["labels"]):  # a row for each class
        rows = np.concatenate([(label == i).nonzero()[:columns, 0] for i in range(config["labels"])])
        shown, what = len(rows), f"the first {columns} of each class"
    stop = []
    with train.signals(lambda number, _: stop.append(number)):  # the samples may be the work of hours
        try:
            files[out / "samples.png"] = data.png(data.picture(array[rows], config.get("window"), columns or None))
        except (MemoryError, ValueError) as e:
            print(f"no picture: {data.why(e)}")
        data.write_files(files)
        if pngs:
            write_pngs(pngs, array)
        part.unlink(missing_ok=True)
    names = " and ".join(map(str, [pngs, *files] if pngs else files))
    wrote = f"wrote {names}" + (f", which shows {what}" if shown < n else "")
    if stop:
        raise train.Stopped(stop[0], f"stopped: {wrote}")
    print(f"{n} samples from {path} ({config['param']} net on {config['data']}), drawn with {process}")
    nfe = calls // -(-(n - kept) // args.batch) if n > kept else args.nfe
    by = "" if args.inpaint is None or args.rule == "paper" else f" with {args.passes} backward passes each"
    print(f"sampler {name} {options or ''} NFE {nfe}{by} seconds/sample {seconds / max(n - kept, 1):.5f} on {device}")
    if array.dtype == np.float64:
        print("the points are float64: float32 would round them too much, so far from 0 they lie")
    print(wrote)


# ---------------------------------------------------------------------------------------------------------------------
# Many samples


def part_file(args, out, ckpt, n, device):
    """Where batches are kept while others are drawn. All that the samples depend on is in the name, so that a command
    with other settings neither uses nor loses them: options, device, and size and time of the files that are read."""
    read = [os.stat(file) for file in (ckpt, args.stroke, args.inpaint, args.mask) if file]
    options = sorted((k, v) for k, v in vars(args).items() if k != "png_dir")
    key = (options, n, str(device), str(ckpt), [(file.st_size, file.st_mtime_ns) for file in read])
    return out / f"samples-{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}.part"


def collect(drawn, config, n, batch, part):
    """The n finished samples that drawn(start=...) yields by the batch, and how many of them were in `part`, a file to
    which each batch is added (points in network units) if there are several. The caller removes it."""
    C, *size = config["shape"]
    array, done, owned = np.empty((n, *size, C), np.uint8 if size else np.float32), 0, False
    try:
        with data.open_part(part) if n > batch else io.BytesIO() as file:
            owned = True
            done = kept = file.readinto(array) // (batch * array[0].nbytes) * batch  # without a batch that was cut
            file.seek(file.truncate(kept * array[0].nbytes))
            if kept:
                print(f"going on after {kept} samples in {part}", flush=True)
            with closing(progress(drawn(start=kept), n, kept)) as parts:
                for x in parts:
                    finished, where = train.finish(x, config), slice(done, done + len(x))
                    if not x.isfinite().all() or not np.isfinite(finished).all():
                        done, text = 0, "samples are not finite, so nothing was written"
                        raise data.UserError(f"{text}: try other --sampler, --rho or --t-end")
                    array[where] = finished if size else x
                    file.write(array[where])
                    file.flush()
                    done = where.stop
    except OSError as e:
        raise data.UserError(f"cannot write {part} ({data.why(e)}): make room, or choose another --out") from None
    except train.Stopped as e:
        if done and n > batch:
            e.args = e.args[0], f"stopped: {done} of {n} samples are kept in {part}; the same command goes on"
        raise
    finally:
        if owned and not done:
            part.unlink(missing_ok=True)
    return array if size else train.finish(torch.from_numpy(array), config), kept


def progress(parts, n, done=0, what="samples"):
    """Passes parts on; a line on stderr says how many of the n rows in them are done, and how long the rest takes."""
    first, start, said, every = done, time.time(), 0, 0.5 if sys.stderr.isatty() else 10  # seconds

    def say(text):
        with suppress(OSError, ValueError):  # a lost terminal ends nothing
            print(text, end="", file=sys.stderr, flush=True)

    try:
        for part in parts:
            yield part
            done, spent = done + len(part), time.time() - start
            if spent // every > said and done < n:
                said = spent // every
                say(f"\r{done} of {n} {what}, {spent / (done - first) * (n - done) / 60:.1f} minutes left ")
    finally:
        if said:
            say("\n")


def write_pngs(folder, images):
    """uint8 (N, H, W, C) as 000000.png ... in a folder that is empty now; it stays, as it may be a link or a mount."""
    temporary = folder / f"{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir()
        for i, image in enumerate(images):
            (temporary / f"{i:06d}.png").write_bytes(data.png(image.repeat(3 // image.shape[2], 2)))
        for path in list(temporary.iterdir()):  # all are on the disk: from here on nothing is likely to fail
            path.rename(folder / path.name)
        temporary.rmdir()
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise data.UserError(f"cannot write --png-dir {folder} ({data.why(e)}): make room, or name another") from None


# ---------------------------------------------------------------------------------------------------------------------
# Conditional generation without retraining. A condition is what the samplers take as `condition`: (process, net, m, t,
# label) -> (x, m), a prediction of the data and the state to go on from. An observation is `see`, linear on x (B, C, H,
# W), and `fill`, the smallest x of what was seen: see(fill(c)) = c, and fill is see's adjoint but for a factor.


def observation(mask=None, shrink=1):
    """see and fill for known pixels, mask (H, W) of 0 and 1, or for the means of shrink x shrink blocks."""
    if mask is not None:
        return (lambda x: x * mask.to(x)), (lambda c: c * mask.to(c))
    return (lambda x: avg_pool2d(x, shrink)), (lambda c: c.repeat_interleave(shrink, -1).repeat_interleave(shrink, -2))


def by_covariance(method, see, fill, known, steps=2, noise=0.0):
    """The posterior mean given known = see(x) + noise, exact for Gaussian data (moment matching, Rozet et al. 2024).

    With J = dD/dy, Cov[x | y] = sigma^2 J (Tweedie), so x = D + J H^T (H J H^T + noise^2/sigma^2)^-1 (known - H D),
    H = see, by `steps` of conjugate gradients; each costs a backward pass, as J is taken for symmetric. Without noise
    the rest of known - H x is filled in. noise: its standard deviation, times k where fill is k^2 H^T.
    """

    def dot(a, b):
        return (a * b).flatten(1).sum(1)[:, None, None, None]

    def condition(process, net, m, t, label):
        w, snr = method.project(process, t)
        with torch.enable_grad():
            y = method.mix(w[None], m).requires_grad_()
            D = method.precondition(process, net, y, snr.expand(len(m)), label)
        x, rest = D.detach(), known - see(D.detach())
        p, size = rest, dot(rest, rest)
        for _ in range(steps):
            (Jp,) = torch.autograd.grad(D, y, fill(p), retain_graph=True)
            Ap = see(Jp) + noise**2 * float(snr.sqrt()) * p  # y is in units of sigma, so Jp is sigma J H^T p
            curvature = dot(p, Ap)
            step = torch.where(curvature > 0, size / curvature, 0.0).nan_to_num(posinf=0.0)  # J is a network's
            x, rest, before = x + step * Jp, rest - step * Ap, size
            size = dot(rest, rest)
            p = rest + (size / before).nan_to_num() * p
        x = x if noise else x + fill(known - see(x))
        return x.clamp(-process.bound, process.bound), m

    return condition


def by_redrawing(method, see, fill, known, randn):
    """The AGM paper's inpainting: what is known replaces its part of the prediction, and v (HOLD: the auxiliary blocks)
    is drawn anew given the result, at every call. HOLD of order 1 has nothing to redraw."""

    def condition(process, net, m, t, label):
        x = method.denoise(process, net, m, t, label)
        x = x + fill(known - see(x))
        return x, redraw(method, process, m, t, x, randn)

    return condition


def by_stroke(method, stroke, calls, randn):
    """The AGM paper's dyn-v: in the first `calls` calls v (HOLD: all auxiliary blocks) is redrawn, given the stroke."""
    left = calls

    def condition(process, net, m, t, label):
        nonlocal left
        left -= 1
        m = redraw(method, process, m, t, stroke.expand(len(m), -1, -1, -1), randn) if left >= 0 else m
        return method.denoise(process, net, m, t, label), m

    return condition


def redraw(method, process, m, t, x, randn):
    """m with its auxiliary blocks drawn anew, given the data block and x: in m = mean x + L eps, L lower, the noise of
    the data block stays and the rest of eps is fresh."""
    mean, L, C = process.mean(t), process.cholesky(t), x.shape[1]
    eps = torch.cat([(m[:, :C] - float(mean[0]) * x) / float(L[0, 0]), randn(m[:, C:])], 1)
    return torch.cat([m[:, :C], (method.mix(mean[:, None], x) + method.mix(L, eps))[:, C:]], 1)


def read_picture(path, shape, flag):
    """A picture (C, H, W) uint8: an .npy of (H, W) or (H, W, C), or with Pillow any picture file."""
    try:
        if path.endswith(".npy"):
            array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        else:
            array = np.asarray(data.decode(path)[0].convert("L" if shape[0] == 1 else "RGB"))
    except ImportError:
        raise data.UserError(f"{flag} {path}: pip install pillow to read picture files, or give an .npy") from None
    except MemoryError:
        raise
    except Exception as e:  # numpy and Pillow raise a dozen kinds
        raise data.UserError(f"cannot read {flag} {path}: {data.why(e)}") from None
    array = array.astype(np.uint8) * 255 if array.dtype == bool else array
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != shape[0]:
        raise data.UserError(f"{flag} {path} is {array.dtype} {array.shape}: give uint8 (H, W) or (H, W, {shape[0]})")
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def conditional(args, method, process, shape, device):
    """What --stroke or --inpaint ask for, as `draw` wants it: (m0, randn) -> (m0, condition). None without them."""
    if not (args.stroke or args.inpaint):
        return None
    if args.stroke and args.inpaint:
        raise data.UserError("--stroke and --inpaint exclude each other: leave one out")
    if len(shape) != 3:
        raise data.UserError("--stroke and --inpaint want a network of images, this one draws points")
    H, W = shape[1:]
    if args.stroke:
        stroke = read_picture(args.stroke, shape, "--stroke").to(device) / 127.5 - 1
        if stroke.shape != shape:
            raise data.UserError(f"--stroke {args.stroke} has shape {tuple(stroke.shape)}, the network draws {shape}")
        if process.n == 1:
            raise data.UserError("HOLD of order 1 has no auxiliary blocks for a stroke to act on: --order 2 or more")
        if args.inject == "init":  # v0 <- .9 v0 + .1 stroke; HOLD: the auxiliary blocks, in the direction of their mean
            mean = process.mean(process.T if process.t_data == 0 else process.t0)[1:]
            push = method.mix((0.1 * mean / mean.norm())[:, None], stroke[None])
            C = shape[0]
            return lambda m0, randn: (torch.cat([m0[:, :C], 0.9 * m0[:, C:] + push.to(m0)], 1), None)
        calls = math.ceil(args.share * args.nfe)
        return lambda m0, randn: (m0, by_stroke(method, stroke, calls, randn))
    picture, mask = read_picture(args.inpaint, shape, "--inpaint").to(device) / 127.5 - 1, None
    if (args.mask is None) == (args.shrink is None):
        raise data.UserError("--inpaint wants what is known of it: --mask FILE, or --shrink K for block means")
    if args.mask:
        mask = (read_picture(args.mask, (1, H, W), "--mask").to(device) > 0).float()[0]
        if mask.shape != (H, W) or not 0 < mask.mean() < 1:
            raise data.UserError(f"--mask {args.mask} must be ({H}, {W}) and mark some pixels, but not all, as known")
    elif H % args.shrink or W % args.shrink:
        raise data.UserError(f"--shrink {args.shrink} must divide {H} and {W}")
    see, fill = observation(mask, args.shrink or 1)
    small = (shape[0], H // args.shrink, W // args.shrink) if args.shrink else shape
    if picture.shape not in (shape, small):
        raise data.UserError(f"--inpaint {args.inpaint} has shape {tuple(picture.shape)}, the network draws {shape}")
    known = see(picture[None]) if picture.shape == shape else picture[None]
    if args.rule == "paper":
        return lambda m0, randn: (m0, by_redrawing(method, see, fill, known, randn))
    if process.param != "denoiser":
        raise data.UserError("the rule by covariance needs a denoiser: --rule paper, or another --ckpt")
    noise = args.noise / 127.5 * (args.shrink or 1)
    return lambda m0, randn: (m0, by_covariance(method, see, fill, known, args.passes, noise))


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood


def print_nll(args, config, method, process, net, device):
    """Mean and standard error of the negative log-likelihood bound over the held-out data, or its first --n samples.

    Images: bits per dimension of the 8-bit values, which uniform noise of one grey level makes continuous (its mean is
    again a bound). Points: nats per point, in the units of the data.
    """
    if not hasattr(method, "log_likelihood_bound"):
        raise data.UserError("--nll needs a HOLD checkpoint, or a denoiser with --method hold: AGM has none here")
    draws = ("sampler", *OPTIONS, "class", "stroke", "inpaint", "png_dir")
    asked = [flag.replace("_", "-") for flag in draws if getattr(args, flag) is not None]
    if asked:
        raise data.UserError(f"--nll follows a flow of its own and draws nothing: leave out --{asked[0]}")
    if args.amp != "off" or args.compile:
        raise data.UserError("--nll differentiates the net and wants all its digits: leave out --amp and --compile")
    folder = args.data_dir or (None if args.data else config["data_dir"])
    dataset = data.load(args.data or config["data"], folder, size=config["shape"][-1])
    if list(dataset.shape) != config["shape"]:
        raise data.UserError(f"{dataset.name} has shape {dataset.shape}, the checkpoint {tuple(config['shape'])}")
    held_out = dataset.test[: args.n]
    if len(held_out) < 2:
        text = f"{dataset.name} has {len(dataset.test)}, --n takes {len(held_out)}"
        raise data.UserError(f"a mean and its error need at least 2 held-out samples: {text}")
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
    run(lambda: sample(train.read(parser(), sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    main()
