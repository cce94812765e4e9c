"""Draws samples from a checkpoint: samples.npz to measure, samples.png to look at.

python sample.py --method hold --order 3                 the same network, another process
python sample.py --class all --guidance 1.5              rows of each class, of a run with --classes
python sample.py --first 25000 --n 25000                 samples 25,000 to 49,999, on another day or machine
python sample.py --inpaint FILE --mask FILE              the rest of a picture; --shrink K; --stroke FILE for a sketch
python sample.py --nll                                   bound on the likelihood of held-out data
"""

import inspect
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
import train
from data import UserError, why
from train import option


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None: not given."""

    ckpt: str = option(None, "checkpoint or folder of a run; default: the newest under runs/")
    nfe: int = option(20, "network calls a sample", 1, 10**5)
    n: int = option(None, "how many samples; default: 64 images, 10,000 points or 8 of each class", 1, 10**7, kind=int)
    first: int = option(0, "number of the first sample: each depends on --seed and its number alone", 0, 10**9)
    sampler: str = option(None, "AGM: ode, exponential, splitting, em; HOLD: ode, strang, lie, em")
    rho: float = option(None, "exponent of the sampler's grid of times; default: 1", 0.01, 100, kind=float)
    t_end: float = option(None, "time of the last call, or end of the last step; default: the sampler's", kind=float)
    multistep: int = option(None, "exponential: how many calls are extrapolated; default: 2", 1, 4, kind=int)
    class_: str = option(None, "name or number of a class, or all: as many of each; for a run with --classes")
    guidance: float = option(None, "class: 1 is its law, the default; more exaggerates", 0, 100, kind=float)
    seed: int = option(0, "of the noise", 0, 2**32 - 1)
    batch: int = option(256, "samples at a time", 1, 10**6)
    raw: bool = option(False, "draw with the raw weights, not with their average (EMA)")
    method: str = option(None, "process to sample with, if the net is a denoiser", choices=tuple(train.METHODS))
    order: int = option(None, "of HOLD, if the net is a denoiser", 1, 8, kind=int)
    amp: str = option("off", "bf16: autocast the net to bfloat16", choices=("off", "bf16"))
    compile: bool = option(False, "compile the net: faster calls after a minute")
    device: str = option("auto", "cpu, cuda, mps; auto takes the first that is there")
    out: str = option(None, "folder for the results, in place of former ones; default: the checkpoint's")
    png_dir: str = option(None, "folder for one PNG a sample, 000000.png ..., RGB as evaluators want it")
    film: bool = option(False, "write film.png, too: the state's data block, and the prediction, call by call")
    stroke: str = option(None, "picture that guides the samples")
    inject: str = option(None, "stroke: redraw v given it (dyn, default), or mix it in (init)", choices=("dyn", "init"))
    share: float = option(None, "stroke, dyn: share of the calls; default: 0.25", 0, 1, kind=float)
    inpaint: str = option(None, "picture of which a part is known, by --mask or --shrink")
    mask: str = option(None, "inpaint: picture or .npy, white where it is known")
    shrink: int = option(None, "inpaint: the means of blocks of that size are known", 2, 4096, kind=int)
    rule: str = option(None, "inpaint; default: gibbs", choices=("gibbs", "covariance", "paper"))
    passes: int = option(None, "inpaint: backward passes a call", 1, 1000, kind=int)
    noise: float = option(None, "inpaint: what is known has noise of that std, of 255; default: 0", 0, 255, kind=float)
    held_out: int = option(None, "held-out picture of that number in place of a FILE", 0, 10**9, kind=int)
    nll: bool = option(False, "bound the negative log-likelihood of held-out data, draw nothing")
    nll_steps: int = option(None, "nll: steps of Runge-Kutta 4, four calls each; default: 96", 1, 10**5, kind=int)
    data: str = option(None, "nll: another data set or file than the run's")
    data_dir: str = option(None, "nll: where the files of a named data set are")

    __post_init__ = train.Config.__post_init__


class Noise:
    """Unit noise with one generator a sample, so that sample i does not depend on the batch it is drawn in. (SAME:
    batches are padded to multiples of 16, or the last bit of what a network says would depend on them.)"""

    def __init__(self, seed, numbers):
        self.generators = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**32) for i in numbers]

    def prior(self, process, shape):
        return torch.cat([process.prior((1, *shape), g) for g in self.generators])

    def __call__(self, like):
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in self.generators]).to(like)


def restore(args):
    """-> (checkpoint, config, method module, process, net). UserError if the net does not serve that process."""
    ckpt = train.load_checkpoint(args.ckpt)
    asked = dict(method=args.method or ckpt["config"].method, order=args.order or ckpt["config"].order)
    if args.order and asked["method"] != "hold":
        raise UserError("--order is HOLD's: add --method hold, or leave it out")
    config = replace(ckpt["config"], **asked)
    if config.target != "data" and config != ckpt["config"]:
        raise UserError(f"a net of target {config.target} serves its own process only: leave out --method and --order")
    method, process, net = train.build(config, ckpt["data"])
    net.load_state_dict(ckpt["net" if args.raw else "ema"])
    return ckpt, config, method, process, net.eval().requires_grad_(False)


def pick_sampler(method, args):
    """Name, sampler, and options for it. UserError for an unknown one, or an option that it does not take."""
    name = args.sampler or next(iter(method.SAMPLERS))
    if name not in method.SAMPLERS:
        raise UserError(f"no sampler {name!r} for this method: choose from {', '.join(method.SAMPLERS)}")
    if args.multistep and name != "exponential":
        raise UserError(f"sampler {name} has no --multistep: leave it out, or take AGM's exponential")
    options = {key: getattr(args, key) for key in ("rho", "t_end", "multistep")}
    return name, method.SAMPLERS[name], {key: value for key, value in options.items() if value is not None}


def pick_classes(args, config, facts):
    """The classes (k,) that samples take in turn, or None: all data."""
    if args.class_ is None:
        return None
    if not config.classes:
        raise UserError("--class wants a net that was trained with --classes: leave it out, or train one")
    there = [i for i, n in enumerate(facts["counts"]) if n]
    if args.class_ == "all":
        return torch.tensor(there)
    names = {str(i): i for i in there} | {facts["names"][i]: i for i in there}  # a name counts before a number
    if args.class_ not in names:
        known = ", ".join(f"{i} {facts['names'][i]}" for i in there)
        raise UserError(f"no class {args.class_!r:.40} with samples to learn: give all, or one of {known:.300}")
    return torch.tensor([names[args.class_]])


def guide(net, guidance):
    """Classifier-free guidance (Ho & Salimans 2022): what the net says without the label, and `guidance` times what the
    label changes. Every target is affine in the data, so it guides E[x | m], whatever the net predicts."""

    def guided(y, t, label=None):
        if label is None or guidance in (0, 1):
            return net(y, t, label if guidance else None)
        free = net(y, t, None)
        return free + guidance * (net(y, t, label) - free)

    return guided


def filmed(predict, frames, facts, n):
    """predict, which also adds to `frames` what it sees of n samples, the data block of m, beside what it says."""

    def recorded(m, t):
        seen = m[:, : facts["shape"][0]].clone()
        x_hat = predict(m, t)
        frames.append(np.concatenate([data.picture(data.finish(x[:n], facts), facts) for x in (seen, x_hat)], 1))
        return x_hat

    return recorded


def sample(args):
    """Draws, or with --nll measures. Files appear whole, arrays before pictures."""
    for key, needs in dict(guidance="class_", nll_steps="nll", data="nll", data_dir="nll").items():
        if getattr(args, key) is not None and not getattr(args, needs):
            key, needs = (f"--{k.rstrip('_').replace('_', '-')}" for k in (key, needs))
            raise UserError(f"{key} belongs to {needs}: add that, or leave it out")
    device = train.pick_device(args.device)
    ckpt, config, method, process, net = restore(args)
    net, facts, out = net.to(device), ckpt["data"], Path(args.out) if args.out else ckpt["path"].parent
    if args.nll:
        return print_nll(args, config, facts, method, process, net, device)
    name, sampler, options = pick_sampler(method, args)
    classes, guidance = pick_classes(args, config, facts), 1.0 if args.guidance is None else args.guidance
    n = args.n or (10_000 if facts["kind"] == "points" else 8 * len(classes) if args.class_ == "all" else 64)
    start, note = given(args, config, facts, method, process)
    pngs = [Path(args.png_dir, f"{i:06d}.png") for i in range(args.first, args.first + n)] if args.png_dir else []
    if pngs and (facts["kind"] != "image" or any(path.exists() for path in pngs)):
        raise UserError(f"--png-dir {args.png_dir} wants images, and no file there of the same number: name another")
    for folder in [out, pngs[0].parent] if pngs else [out]:
        folder.mkdir(parents=True, exist_ok=True)

    fast = torch.compile(net) if args.compile else net

    def served(y, t, label=None):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            return fast(y, t, label).to(y)

    guided, takes = guide(served, guidance), inspect.signature(sampler).parameters
    arrays, labels, frames, status, began = [], [], [], 0, time.time()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        for done in range(0, n, args.batch):
            few = min(n - done, args.batch)
            numbers = args.first + done + torch.arange(few if args.batch < 16 else -(-few // 16) * 16)  # see SAME
            randn, label = (
                Noise(args.seed, numbers.tolist()),
                None if classes is None else classes[numbers % len(classes)],
            )
            m, mean = randn.prior(process, facts["shape"]).to(device), mean_of(facts, label, guidance)
            on_device = None if label is None else label.to(device)
            predict = partial(method.denoise, process, guided, label=on_device)
            if start:  # with what is given, the mean is another
                (m, predict), mean = start(m, guided, on_device, randn), None
            if args.film and not done:
                predict = filmed(predict, frames, facts, few)
            more = {key: value for key, value in dict(randn=randn, data_mean=mean).items() if key in takes}
            x = sampler(process, predict, m, args.nfe, **options, **more)[:few]
            if not x.isfinite().all():
                raise UserError("samples are not finite, so nothing was written: try other --sampler, --rho or --t-end")
            arrays.append(data.finish(x.cpu(), facts))
            labels.append(label if label is None else label[:few])
            show_progress(done + few, n, began)
    except KeyboardInterrupt as e:
        status = 128 + e.args[0]
        if not arrays:
            raise
    for number in (signal.SIGINT, signal.SIGTERM):  # what was drawn may be the work of hours
        signal.signal(number, signal.SIG_IGN)
    array, seconds = np.concatenate(arrays), time.time() - began
    named = {} if classes is None else dict(labels=torch.cat(labels[: len(arrays)]).numpy(), names=facts["names"])
    for path, image in zip(pngs, array, strict=False):
        data.write_png(path, image.repeat(3 // image.shape[2], 2))
    data.write_files({out / "samples.npz": partial(np.savez_compressed, arr_0=array, **named)})
    wrote = [args.png_dir, out / "samples.npz"] if pngs else [out / "samples.npz"]
    try:
        files = {out / "samples.png": data.png(picture_of(array, named, facts, args.class_ == "all"))}
        data.write_files(files | ({out / "film.png": data.apng(frames, 200)} if frames else {}))
        wrote += [*files, *([out / "film.png"] if frames else [])]
    except (UserError, MemoryError, ValueError) as e:
        print(f"no picture: {why(e)}")
    print(f"{len(array)} samples from {ckpt['path']} (target {config.target}, {config.data}) by {process}")
    calls = args.nfe * (1 if classes is None or guidance in (0, 1) else 2)
    how = " ".join([name, *(f"--{key.replace('_', '-')} {value:g}" for key, value in options.items())])
    print(f"sampler {how} NFE {calls}{note} seconds/sample {seconds / len(array):.5f} on {device}")
    if classes is not None:
        print("classes: " + ", ".join(f"{i} {facts['names'][i]}" for i in classes.tolist()))
    print(f"wrote {', '.join(map(str, wrote))}", flush=True)
    if status and len(array) < n:
        rest = f"--first {args.first + len(array)} --n {n - len(array)}"
        print(f"stopped: {rest} with another --out draws the rest", file=sys.stderr)
        sys.exit(status)


def stop(number, _):
    raise KeyboardInterrupt(number)


def mean_of(facts, label, guidance):
    """The mean of what is to be drawn, from which `ode` starts: of all data, or (B, ...) of the classes."""
    mean, means = facts["mean"], facts["class_means"]
    if label is None or means is None:
        return mean
    return (mean + guidance * (means[label] - mean)).clamp(-facts["bound"], facts["bound"])


def given(args, config, facts, method, process):
    """What extras/conditions.py makes of the options about given pictures: (start, note), or (None, "")."""
    from extras import conditions

    picture = None
    if args.held_out is not None:
        dataset = data.load(config.data, config.data_dir or None, config.flip, config.size)
        if args.held_out >= len(dataset.test):
            raise UserError(f"--held-out must be below {len(dataset.test)}, the number of held-out samples")
        picture = dataset.held_out(slice(args.held_out, args.held_out + 1))[0]
    return conditions.given(args, method, process, facts, picture)


def show_progress(done, n, began):
    """A line on stderr, if the whole takes more than some seconds."""
    left = (time.time() - began) * (n / int(done) - 1)
    if left > 5 and sys.stderr.isatty():
        print(f"\r{done} of {n} samples, {left / 60:.1f} minutes left ", end="", file=sys.stderr, flush=True)


def picture_of(array, named, facts, of_all):
    """What fits a picture: points, or the first 1,024 images at most, of all classes with a row for each."""
    if facts["kind"] == "points" or not of_all:
        return data.picture(array[: len(array) if facts["kind"] == "points" else 1024], facts)
    rows = [np.flatnonzero(named["labels"] == i)[:32] for i in np.unique(named["labels"])]
    columns = min(len(row) for row in rows)
    return data.picture(array[np.concatenate([row[:columns] for row in rows])], facts, columns)


def print_nll(args, config, facts, method, process, net, device):
    """Mean and standard error of a bound on the negative log-likelihood of the held-out data, or its first --n."""
    from extras.likelihood import held_out_nll

    used = "ckpt nfe n seed batch raw method order device out nll nll_steps data data_dir".split()
    if asked := [key for key, value in vars(args).items() if key not in used and value not in (None, False, "off")]:
        flag = f"--{asked[0].rstrip('_').replace('_', '-')}"
        raise UserError(f"--nll draws nothing, and runs in full precision: leave out {flag}")
    folder = args.data_dir or (None if args.data else config.data_dir or None)
    dataset, began = data.load(args.data or config.data, folder, config.flip, config.size), time.time()
    torch.manual_seed(args.seed)
    predict, more = partial(method.denoise, process, net), {} if args.nll_steps is None else dict(steps=args.nll_steps)
    values, unit = held_out_nll(method, process, predict, dataset, facts, args.n, args.batch, device=device, **more)
    error, minutes = values.std() / len(values) ** 0.5, (time.time() - began) / 60
    print(f"negative log-likelihood <= {values.mean():.4f} +- {error:.4f} {unit} (standard error over {len(values)} "
          f"held-out samples of {dataset.name}), {minutes:.1f} minutes on {device}")  # fmt: skip


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    train.run(lambda: sample(Options(**vars(train.parser(Options(), __doc__).parse_args(argv)))))


if __name__ == "__main__":
    main()
