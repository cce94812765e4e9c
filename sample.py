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
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

import data
import train
from extras import clock
from formats.command import Options, Stopping, flag, option, parser, run
from formats.files import UserError, make_folder, say, shorten, why, write_files
from formats.png import apng, png, write_png


@dataclass(frozen=True)
class Asking(Options):
    """Options of all commands that ask a trained network; None: not given."""

    ckpt: str = option(None, "checkpoint or folder of a run; default: the newest under runs/")
    method: str = option(None, "process to sample with", choices=train.METHODS)
    order: int = option(None, "of that process, for HOLD", 1, 8)
    seed: int = option(0, "of the noise", 0, 2**32 - 1)
    batch: int = option(256, "samples at a time", 1, 1e6)
    device: str = option("auto", "cpu, cuda, mps; auto takes the first that is there")


@dataclass(frozen=True)
class Drawing(Asking):
    """Options of all commands that draw."""

    nfe: int = option(20, "calls of the sampler", 1, 1e5)
    n: int = option(None, "samples; default: 64, or 8 a class up to 1,024; 10,000 points", 1, 1e7)
    first: int = option(0, "number of the first sample, which depends on it and --seed", 0, 1e9)
    sampler: str = option("ode", "AGM: ode, exponential, splitting, em; HOLD: ode, strang, lie, em")
    class_: str = option(None, "a class, its number, all or none; default: all that the net knows")
    guidance: float = option(1.0, "1 follows the class, more exaggerates it", 0, 100)
    out: str = option(None, "folder for the results, which replace former ones; default: the run's")


@dataclass(frozen=True)
class Sampling(Drawing):
    """Further options of sample.py."""

    grid: str = option(
        "learned", "of ode: learned, where the run has one, or even", choices=("learned", "even")
    )
    rho: float = option(
        None, "AGM's exponential, splitting, em: above 1, shorter early steps", 0.01, 100
    )
    t_end: float = option(None, "not for ode: time of the last call, or end of the last step")
    multistep: int = option(None, "exponential: how many calls it extrapolates", 1, 4)
    raw: bool = option(False, "draw with the last weights, not with their average (EMA)")
    amp: str = option("off", "bf16: autocast the net to bfloat16", choices=("off", "bf16"))
    compile: bool = option(False, "compile the net: faster calls after a minute")
    png_dir: str = option(None, "new folder for one PNG a sample, 000000.png ..., RGB")
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
        fix = "leave out --method and --order"
        raise UserError(f"a net of target {trained.target} serves its own process only: {fix}")
    config = replace(trained, method=method or trained.method, order=order or trained.order)
    method, process, net = train.build(config, ckpt["data"])
    if order and not hasattr(process, "order"):
        raise UserError(f"{config.method} has no --order: leave it out, or add --method hold")

    # the weights, which nothing changes from here on
    net.load_state_dict(ckpt["net" if raw else "ema"])
    net = net.to(device).eval().requires_grad_(False)
    return Model(net, method, process, config, ckpt["data"], device, ckpt["bend"], ckpt["path"])


def draw(
    model,
    n,
    nfe=20,
    sampler="ode",
    classes=None,
    guidance=1.0,
    seed=0,
    first=0,
    batch=256,
    grid="learned",
    condition=None,
    watch=None,
    **options,
):
    """An iterator over pairs of numpy arrays: samples (b, ...) in the units of the data, and their
    labels (b,) or None.

    Sample i depends on seed, classes and i alone, i = first ... first + n - 1: bit for bit at equal
    batch, up to float32 rounding otherwise. Samples take the classes (numbers) in turn. grid of
    `ode`: "learned", if there is one, or "even". condition(model, m, net, label, randn) -> m,
    predict is what is known (extras/complete.py). watch(m, x_hat) is told of each call. options:
    rho, t_end, multistep, ts; UserError for one that the sampler does not have.
    """
    sampler, takes = pick_sampler(model, sampler, nfe, options)
    guided = guide(model.net, guidance)

    def draw_batch(numbers):
        randn = Noise(seed, numbers.tolist())
        m = randn.prior(model.process, model.facts["shape"]).to(model.device)
        label = None
        if classes:
            label = torch.tensor(classes)[numbers % len(classes)].to(model.device)

        # what predicts the data from the state, and what it says where nothing is known
        predict = partial(model.method.denoise, model.process, guided, label=label)
        mean = mean_of(model.facts, label, guidance)
        if condition:
            m, predict = condition(model, m, guided, label, randn)
            mean = None  # what is known moves it
        predict = partial(watched, predict, watch)

        # the sampler, with what it takes of these
        given = dict(randn=randn, data_mean=mean)
        if "ts" in takes and grid == "learned" and model.bend:
            given["ts"] = learned_times(model, m, nfe, free=mean is not None)
        given |= options  # what is asked for wins
        given = {key: value for key, value in given.items() if key in takes}
        x = sampler(model.process, predict, m, nfe, **given)
        if not x.isfinite().all():
            raise UserError("samples are not finite, nothing was written: try another --sampler")
        return data.finish(x, model.facts), None if label is None else label.cpu().numpy()

    return map(draw_batch, torch.arange(first, first + n).split(batch))


def pick_sampler(model, name, nfe, options):
    """The sampler of that name, and its parameters. UserError for an unknown one, and for options
    that it does not take."""
    samplers = model.method.SAMPLERS
    if name not in samplers:
        raise UserError(f"no --sampler {name}: choose from {', '.join(samplers)}")
    takes = inspect.signature(samplers[name]).parameters
    for key in options:
        if key not in takes:
            raise UserError(f"sampler {name} has no {flag(key)}: leave it out")
    if "t_end" in options:
        try:
            model.method.check_grid(model.process, nfe, options["t_end"])
        except ValueError as error:
            raise UserError(f"--t-end: {why(error)}") from None
    return samplers[name], takes


def learned_times(model, m, nfe, free):
    """Times of `ode`, more of them where the network bends. free: the first one costs no call."""
    R = model.method.clock_rate(model.process, m)
    return clock.learned_times(model.method, model.process, nfe, R, **model.bend, free=free)


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
        if label is None or guidance == 1:
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


def watched(predict, watch, m, t):
    """predict(m, t), of which watch is told."""
    x_hat = predict(m, t)
    if watch:
        watch(m, x_hat)
    return x_hat


# -------------------------------------------------------------------------------------------------
# From the command line: what is asked


def pick_classes(args, model):
    """The classes that samples take in turn; [] for none. UserError for a class that the net does
    not know, and for guidance without one."""
    # the classes of which there were samples to learn
    known = []
    if model.config.classes:
        known = np.flatnonzero(model.facts["counts"]).tolist()
    names = {model.facts["names"][i]: [i] for i in known}
    numbers = {str(i): [i] for i in known}

    # what may be asked for: a name counts before a number
    choices = {None: known, "all": known} | numbers | names
    found = choices.get(args.class_, [])
    if not found and args.class_ not in (None, "none"):
        some = shorten(names, 300)
        raise UserError(f"no --class {args.class_:.40}: the net knows {some or 'none'}")
    if args.guidance != 1 and not found:
        raise UserError("--guidance belongs to a class: leave it out")
    return found


# -------------------------------------------------------------------------------------------------
# Drawing in a loop, writing, and what is said


def draw_and_save(model, args, n, classes, pictures, note="", watch=None, condition=None):
    """Draws n samples, writes them, and says so; after a signal to stop, those of whole batches.

    pictures(array, labels) -> {name: bytes of a picture}. note: what a call costs besides.
    condition, watch: as in `draw`.
    """
    # between two calls: progress, signals, and whoever watches
    calls = 0
    began = time.perf_counter()
    stopping = Stopping()

    def between_calls(m, x_hat):
        nonlocal calls
        calls += len(m)
        say_progress(calls / (n * args.nfe), began)
        if stopping.number:
            raise KeyboardInterrupt  # out of the batch at hand
        if watch:
            watch(m, x_hat)

    # what draw cannot do, it refuses now, before a folder is made
    how = dict(classes=classes, condition=condition, watch=between_calls)
    for key in "nfe sampler guidance seed first batch grid rho t_end multistep".split():
        if getattr(args, key, None) is not None:
            how[key] = getattr(args, key)
    batches = draw(model, n, **how)

    out = make_folder(args.out or model.path.parent)
    drawn = []
    with stopping:
        # whole batches, until a signal comes
        with suppress(KeyboardInterrupt):
            for batch in batches:
                drawn.append(batch)
        seconds = time.perf_counter() - began
        done = sum(len(array) for array, _ in drawn)

        # what they are
        if drawn:
            save(out, model.facts, drawn, pictures)
            if args.guidance != 1:
                note = f" x 2 (guidance calls the net with and without the class){note}"
            say(f"{done} samples of {model.path} (target {model.config.target}) by {model.process}")
            say(f"sampler {args.sampler} NFE {args.nfe}{note} seconds/sample {seconds / done:.5f}")

    # what is left to do
    if done < n:
        rest = f"--first {args.first + done} --n {n - done} with another --out draws the rest"
        say(f"stopped, {done} of {n} samples are written: {rest}", sys.stderr)
        sys.exit(128 + stopping.number)


def say_progress(share, began):
    """On a terminal, how long the rest of a work will take."""
    left = (time.perf_counter() - began) * (1 / share - 1) / 60
    with suppress(AttributeError, ValueError):  # a terminal that is gone costs nothing
        if left > 0.1 and sys.stderr.isatty():
            say(f"{share:.0%} done, {left:.1f} minutes left ", sys.stderr, end="\r")


def save(out, facts, drawn, pictures):
    """Writes the batches that were drawn, and then the pictures: no picture is worth losing the
    arrays."""
    array = np.concatenate([array for array, _ in drawn])
    arrays = dict(arr_0=array)
    labels = None
    if drawn[0][1] is not None:
        labels = np.concatenate([label for _, label in drawn])
        arrays |= dict(labels=labels, names=facts["names"])
    write_files({out / "samples.npz": partial(np.savez_compressed, **arrays)})
    files = pictures(array, labels)
    write_files({out / name: files[name] for name in files})
    say(f"wrote samples.npz, {', '.join(files)} in {out}")


def sample(args):
    """Draws and writes what the command line asks for."""
    # what is asked for
    model = load(args.ckpt, args.method, args.order, args.raw, args.device)
    facts = model.facts
    classes = pick_classes(args, model)
    n = args.n or min(max(64, 8 * len(classes)), 1024)
    if facts["kind"] == "points":
        n = args.n or 10_000
    if args.png_dir:
        if facts["kind"] != "image":
            raise UserError("--png-dir is for 8-bit images: leave it out, samples.npz has all")
        if os.path.exists(args.png_dir):
            raise UserError(f"{args.png_dir} exists already: choose another --png-dir")

    # the film: at each call of the first batch the state's data block beside the prediction
    frames = []

    def film(m, x_hat):
        if args.film and len(frames) < args.nfe:
            q = m[:, : x_hat.shape[1]]
            both = [data.picture(data.finish(x, facts), facts) for x in (q, x_hat)]
            frames.append(np.concatenate(both, 1))

    # one PNG a sample, and the pictures of all of them
    def pictures(array, labels):
        if args.png_dir:
            folder = make_folder(args.png_dir)
            for i, image in enumerate(array, args.first):
                write_png(folder / f"{i:06d}.png", image.repeat(3 // image.shape[2], 2))
        drawn = {"samples.png": png(data.picture(array, facts, labels))}
        if frames:
            drawn["film.png"] = apng(frames, 200)
        return drawn

    # with a faster net, or a coarser one
    if args.compile:
        model.net = torch.compile(model.net)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        draw_and_save(model, args, n, classes, pictures, watch=film)


MOVED = {  # options that sample.py once had
    "extras.complete": ("--inpaint", "--mask", "--shrink", "--held-out", "--stroke"),
    "extras.likelihood": ("--nll", "--nll-steps", "--data", "--data-dir"),
}


def command(argv):
    """Reads the command line, and draws."""
    for word in argv:
        for module, options in MOVED.items():
            if word.split("=")[0] in options:
                raise UserError(f"{word:.40} is for python -m {module}, see its --help")
    sample(Sampling(**vars(parser(Sampling(), __doc__).parse_args(argv))))


def main(argv=None):
    run(lambda: command(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
