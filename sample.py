"""Draws samples from a trained network: samples.npz to measure, samples.png to look at.

    python sample.py                                    the newest run, rows of each class it knows
    python sample.py --method hold --order 3            the same network, another process
    python sample.py --class 7 --guidance 1.5           one class, exaggerated
    python sample.py --first 25000 --n 25000            samples 25,000 to 49,999, on another day

In Python:

    model = sample.load("runs/agm-digits")
    images = np.concatenate([x for x, labels in sample.draw(model, 64)])   # uint8 (64, 8, 8, 1)

extras/complete.py completes pictures, extras/likelihood.py measures the likelihood.
"""

import inspect
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from types import ModuleType

import numpy as np
import torch

import data
import train
from extras import clock
from formats.command import Options, Stopping, flag, option, parser, run
from formats.files import UserError, make_folder, say, why, write_files
from formats.png import apng, png, write_png


@dataclass(frozen=True)
class Drawing(Options):
    """Options of all commands that draw; None: not given."""

    ckpt: str = option(None, "checkpoint or folder of a run; default: the newest under runs/")
    nfe: int = option(20, "calls of the sampler", 1, 10**5)
    n: int = option(
        None, "samples; default: 64, at least 8 a class, 10,000 points", 1, 10**7, kind=int
    )
    first: int = option(0, "number of the first sample, which depends on it and --seed", 0, 10**9)
    sampler: str = option(None, "AGM: ode, exponential, splitting, em; HOLD: ode, strang, lie, em")
    class_: str = option(None, "a class, its number, all or none; default: all that the net knows")
    guidance: float = option(1.0, "1 follows the class, more exaggerates it", 0, 100)
    seed: int = option(0, "of the noise", 0, 2**32 - 1)
    batch: int = option(256, "samples at a time", 1, 10**6)
    method: str = option(None, "process to sample with", choices=train.METHODS)
    order: int = option(None, "of that process, for HOLD", 1, 8, kind=int)
    device: str = option("auto", "cpu, cuda, mps; auto takes the first that is there")
    out: str = option(None, "folder for the results, which replace former ones; default: the run's")


@dataclass(frozen=True)
class Sampling(Drawing):
    """Further options of sample.py."""

    grid: str = option(None, "ode: learned, the default, or even", choices=("learned", "even"))
    rho: float = option(
        None,
        "AGM's exponential, splitting, em: above 1, shorter early steps",
        0.01,
        100,
        kind=float,
    )
    t_end: float = option(
        None, "not for ode: time of the last call, or end of the last step", kind=float
    )
    multistep: int = option(None, "exponential: how many calls it extrapolates", 1, 4, kind=int)
    raw: bool = option(False, "draw with the last weights, not with their average (EMA)")
    amp: str = option("off", "bf16: autocast the net to bfloat16", choices=("off", "bf16"))
    compile: bool = option(False, "compile the net: faster calls after a minute")
    png_dir: str = option(None, "folder for one PNG a sample, 000000.png ..., RGB")
    film: bool = option(False, "film.png, too: the state's data block and the prediction by call")


# -------------------------------------------------------------------------------------------------
# From Python: load, draw


@dataclass
class Model:
    """A trained network, and the process that it is sampled with."""

    net: torch.nn.Module
    method: ModuleType  # agm_ref or hold_ref
    process: object  # AGM or HOLD
    config: train.Config
    facts: dict  # of the training data: shape, units, mean, classes
    device: torch.device
    bend: dict | None  # what extras/clock.py measured: lam, size
    path: Path  # of the checkpoint


def load(path=None, method=None, order=None, raw=False, device="auto"):
    """The network of a checkpoint file or run folder; path None: the newest under runs/.

    method and order: the process to sample with, if the net is a denoiser. raw: the last weights,
    not their average. UserError for another file, or a process that the net does not serve.
    """
    device = train.pick_device(device)
    ckpt = train.load_checkpoint(path)

    # the process: that of the training, or for a denoiser any other
    trained = ckpt["config"]
    own = method in (None, trained.method) and order in (None, trained.order)
    if trained.target != "data" and not own:
        raise UserError(
            f"a net of target {trained.target} serves its own process only: "
            "leave out --method and --order"
        )
    config = replace(trained, method=method or trained.method, order=order or trained.order)
    method, process, net = train.build(config, ckpt["data"])
    if order and not hasattr(process, "order"):
        raise UserError(f"{config.method} has no --order: leave it out, or add --method hold")

    # the weights, which nothing changes from here on
    train.load_weights(net, ckpt["net" if raw else "ema"], ckpt["path"])
    net = net.to(device).eval().requires_grad_(False)
    return Model(net, method, process, config, ckpt["data"], device, ckpt["bend"], ckpt["path"])


def draw(
    model,
    n,
    nfe=20,
    sampler=None,
    classes=None,
    guidance=1.0,
    seed=0,
    first=0,
    batch=256,
    condition=None,
    watch=None,
    **grid,
):
    """Yields samples (b, ...) in the units of the data, and their labels (b,) or None, as numpy.

    Sample i depends on seed and i alone, i = first ... first + n - 1: bit for bit in batches of
    the same size, up to float32 rounding otherwise.
    classes: class numbers, which samples take in turn; None or []: no class.
    condition(model, m, net, label, randn) -> m, predict: a rule for what is known of the samples
    (extras/complete.py). watch(m, x_hat) is called after each prediction.
    grid: rho, t_end, multistep, ts, where the sampler has them; and for `ode` grid="learned", the
    default if the run has it, or "even". UserError where the sampler has no such option.
    """
    sampler = pick_sampler(model, sampler, nfe, grid)
    guided = guide(model.net, guidance)
    for start in range(first, first + n, batch):
        numbers = range(start, min(start + batch, first + n))
        randn = Noise(seed, numbers)
        m = randn.prior(model.process, model.facts["shape"]).to(model.device)
        label = None
        if classes:
            label = torch.tensor([classes[i % len(classes)] for i in numbers])
            label = label.to(model.device)

        # what predicts the data from the state, and what it says where nothing is known
        if condition:
            m, predict = condition(model, m, guided, label, randn)
            mean = None  # what is known moves the mean
        else:
            predict = partial(model.method.denoise, model.process, guided, label=label)
            mean = mean_of(model.facts, label, guidance)

        # the sampler, with what it takes
        predict = watched(predict, watch)
        more = keywords(sampler, model, m, nfe, randn, mean, grid)
        x = sampler(model.process, predict, m, nfe, **more)
        if not x.isfinite().all():
            raise UserError("samples are not finite, nothing was written: try another --sampler")
        yield data.finish(x, model.facts), None if label is None else label.cpu().numpy()


def pick_sampler(model, name, nfe, grid):
    """The sampler of that name, by default the method's first. UserError for an unknown name, or
    for an option in grid that it does not take."""
    samplers = model.method.SAMPLERS
    name = name or next(iter(samplers))
    if name not in samplers:
        raise UserError(f"no --sampler {name}: choose from {', '.join(samplers)}")

    # the options: those in its signature, and --grid where it takes times of its own
    takes = inspect.signature(samplers[name]).parameters
    for key in grid:
        if key not in takes and not (key == "grid" and "ts" in takes):
            raise UserError(f"sampler {name} has no {flag(key)}: leave it out")
    if grid.get("grid") == "learned" and not model.bend:
        raise UserError(f"{model.path} has no learned grid: leave out --grid")
    if "t_end" in grid:
        try:
            model.method.check_grid(model.process, nfe, grid["t_end"])
        except ValueError as error:
            raise UserError(f"--t-end: {why(error)}") from None
    return samplers[name]


def keywords(sampler, model, m, nfe, randn, mean, grid):
    """What the sampler takes besides the process, predict, m and nfe."""
    takes = inspect.signature(sampler).parameters
    given = dict(grid, randn=randn, data_mean=mean)
    # times where the network bends, unless the caller has times or wants even ones
    if "ts" in takes and model.bend and grid.get("grid") != "even":
        R = model.method.clock_rate(model.process, m)
        free = mean is not None and "data_mean" in takes
        ts = clock.learned_times(model.method, model.process, nfe, R, **model.bend, free=free)
        given.setdefault("ts", ts)
    return {key: value for key, value in given.items() if key in takes}


class Noise:
    """Unit noise, with a generator of its own for each sample."""

    def __init__(self, seed, numbers):
        self.generators = [
            torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**32) for i in numbers
        ]

    def prior(self, process, shape):
        return torch.cat([process.prior((1, *shape), g) for g in self.generators])

    def __call__(self, like):
        noise = [torch.randn(like.shape[1:], generator=g) for g in self.generators]
        return torch.stack(noise).to(like)


def guide(net, guidance):
    """Classifier-free guidance (Ho & Salimans 2022): what the net says without the label, and
    `guidance` times what the label changes. Every target is affine in the data, so this guides
    E[x | m], whatever the net predicts."""

    def guided(y, t, label=None):
        if label is None or guidance == 0:
            return net(y, t)
        if guidance == 1:
            return net(y, t, label)
        free = net(y, t)
        return free + guidance * (net(y, t, label) - free)

    return guided


def mean_of(facts, label, guidance):
    """The mean of what is to be drawn, from which `ode` starts: of all data, or (B, ...) of the
    classes, moved as guidance moves a prediction."""
    mean = facts["mean"]
    if label is None or facts["class_means"] is None:
        return mean
    moved = mean + guidance * (facts["class_means"][label.cpu()] - mean)
    return moved.clamp(-facts["bound"], facts["bound"])


def watched(predict, watch):
    """predict, which also hands the state and the prediction to watch."""
    if watch is None:
        return predict

    def with_watch(m, t):
        x_hat = predict(m, t)
        watch(m, x_hat)
        return x_hat

    return with_watch


# -------------------------------------------------------------------------------------------------
# From the command line: what is asked


def pick_classes(args, model):
    """The classes that samples take in turn; [] for none. UserError for a class that the net does
    not know, and for guidance without one."""
    # classes of which there were samples to learn
    names = model.facts["names"]
    known = []
    if model.config.classes:
        known = [i for i, count in enumerate(model.facts["counts"]) if count]
    name = args.class_
    found = [i for i in known if names[i] == name]  # a name counts before anything else
    if name is None or (name == "all" and known and not found):
        found = known
    elif name != "none" and not found:
        found = [i for i in known if str(i) == name]
        if not found:
            some = shorten(", ".join(names[i] for i in known), 300, placeholder=" ...")
            raise UserError(f"no --class {name:.40}: the net knows {some or 'none'}")
    if args.guidance != 1 and not found:
        raise UserError("--guidance belongs to a class: leave it out")
    return found


def new_pngs(args, facts, n):
    """The files of --png-dir. UserError where one of them is there."""
    if args.png_dir is None:
        return []
    if facts["kind"] != "image":
        raise UserError("--png-dir is for 8-bit images: leave it out, samples.npz has the samples")
    paths = [Path(args.png_dir, f"{i:06d}.png") for i in range(args.first, args.first + n)]
    for path in paths:
        if path.exists():
            raise UserError(f"{path} exists already: choose another --png-dir")
    make_folder(args.png_dir)
    return paths


# -------------------------------------------------------------------------------------------------
# Drawing, writing, and what is said


class Stopped(Exception):
    """A signal to stop came between two network calls."""


def collect(model, args, n, stopping, watch=None, **how):
    """What `draw` yields, as one array each; how: more of its options. After a signal that is what
    was drawn in whole batches, and if there are none the script ends."""
    arrays = []
    labels = []
    calls = 0
    began = time.perf_counter()

    # between two network calls: progress, signals, and the film of the first batch
    def between_calls(m, x_hat):
        nonlocal calls
        calls += len(m)
        say_progress(calls / (n * args.nfe), began)
        if stopping.number:
            raise Stopped
        if watch and not arrays:
            watch(m, x_hat)

    # the batches, until a signal comes
    for key in ("nfe", "sampler", "guidance", "seed", "first", "batch"):
        how[key] = getattr(args, key)
    with suppress(Stopped):
        for array, label in draw(model, n, watch=between_calls, **how):
            arrays.append(array)
            labels.append(label)
    if not arrays:
        say("stopped before a batch was drawn: nothing was written", sys.stderr)
        sys.exit(128 + stopping.number)
    return np.concatenate(arrays), None if labels[0] is None else np.concatenate(labels)


def say_progress(share, began):
    """On a terminal, how long the rest of a work will take."""
    left = (time.perf_counter() - began) * (1 / share - 1) / 60
    with suppress(OSError, ValueError, AttributeError):  # a terminal that is gone costs nothing
        if left > 0.1 and sys.stderr.isatty():
            say(f"{share:.0%} done, {left:.1f} minutes left ", sys.stderr, end="\r")


def draw_and_save(model, args, n, classes, pictures, note="", pngs=(), **how):
    """Draws n samples, with more options of `draw` and `collect` in how, writes them, and says so.
    pictures(array, labels) -> {name: bytes of a picture}. note: what a call costs besides."""
    out = make_folder(args.out or model.path.parent)
    began = time.perf_counter()
    with Stopping() as stopping:
        array, labels = collect(model, args, n, stopping, classes=classes, **how)
        seconds = (time.perf_counter() - began) / len(array)

        # arrays first: no picture is worth losing them
        arrays = dict(arr_0=array)
        if classes:
            arrays |= dict(labels=labels, names=model.facts["names"])
        write_files({out / "samples.npz": partial(np.savez_compressed, **arrays)})
        for path, image in zip(pngs, array, strict=False):
            write_png(path, image.repeat(3 // image.shape[2], 2))
        drawn = pictures(array, labels)
        write_files({out / name: drawn[name] for name in drawn})

    # what was done, and what a signal left to do
    calls = 1
    if classes and args.guidance not in (0, 1):
        calls = 2
        note += f" ({args.nfe} calls of the sampler, 2 network calls each)"
    sampler = args.sampler or next(iter(model.method.SAMPLERS))
    say(f"{len(array)} samples of {model.path} (target {model.config.target}) by {model.process}")
    say(f"sampler {sampler} NFE {calls * args.nfe}{note} seconds/sample {seconds:.5f}")
    say(f"wrote samples.npz, {', '.join(drawn)} in {out}")
    if stopping.number and len(array) < n:
        rest = f"--first {args.first + len(array)} --n {n - len(array)}"
        say(f"stopped: {rest} with another --out draws the rest", sys.stderr)
        sys.exit(128 + stopping.number)


def sample(args):
    """Draws and writes what the command line asks for."""
    model = load(args.ckpt, args.method, args.order, args.raw, args.device)
    facts = model.facts
    classes = pick_classes(args, model)

    # what the sampler is asked for besides
    grid = {}
    for key in ("rho", "t_end", "multistep", "grid"):
        if getattr(args, key) is not None:
            grid[key] = getattr(args, key)
    pick_sampler(model, args.sampler, args.nfe, grid)  # refuses before anything is written

    # how many samples, and where they go
    n = args.n or min(max(64, 8 * len(classes)), 1024)
    if facts["kind"] == "points":
        n = args.n or 10_000
    pngs = new_pngs(args, facts, n)
    if args.compile:
        model.net = torch.compile(model.net)

    # the film: at each call of the first batch the state's data block beside the prediction
    frames = []

    def film(m, x_hat):
        q = m.chunk(model.process.n, 1)[0]
        both = [data.picture(data.finish(x, facts), facts) for x in (q, x_hat)]
        frames.append(np.concatenate(both, 1))

    def pictures(array, labels):
        drawn = {"samples.png": png(data.picture(array, facts, labels))}
        if frames:
            drawn["film.png"] = apng(frames, 200)
        return drawn

    watch = film if args.film else None
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        draw_and_save(model, args, n, classes, pictures, pngs=pngs, watch=watch, **grid)


MOVED = {  # options of before -> the command that has them now
    **dict.fromkeys("--inpaint --mask --shrink --held-out --stroke".split(), "extras.complete"),
    **dict.fromkeys("--nll --nll-steps --data --data-dir".split(), "extras.likelihood"),
}


def command(argv):
    """Reads the command line, and draws."""
    for word in argv:
        word = word.split("=")[0]
        if word in MOVED:
            raise UserError(f"{word} is an option of python -m {MOVED[word]} now")
    sample(Sampling(**vars(parser(Sampling(), __doc__).parse_args(argv))))


def main(argv=None):
    run(lambda: command(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
