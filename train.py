"""Trains AGM or HOLD and leaves a checkpoint, a log and pictures in a folder. With no options: AGM on the digits.

python train.py                                     minutes on a CPU
python train.py --data FOLDER --size 32             own pictures
python train.py --resume                            resumes the newest run
torchrun --standalone --nproc_per_node=4 train.py   on four GPUs
"""

import argparse
import copy
import math
import os
import signal
import sys
import time
import warnings
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import distributed as dist

import agm_ref
import data
import hold_ref
import nets
from data import UserError, why

METHODS = {"agm": agm_ref, "hold": hold_ref}
RANK, WORLD = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1)))  # by torchrun; 0 alone writes

# ---------------------------------------------------------------------------------------------------------------------
# Options: one list of fields makes the command line, the check of a checkpoint, and the rule of --resume


def option(default, help, low=None, high=None, choices=None, may_change=False, kind=None):
    """A field and an option of the same name; kind: the type of a value, by default that of the default."""
    kind, limits = kind or (str if default is None else type(default)), dict(low=low, high=high, choices=choices)
    return field(default=default, metadata=dict(help=help, kind=kind, may_change=may_change, **limits))


@dataclass(frozen=True)
class Config:
    """What a run was asked for. may_change: a resumed run may have another value."""

    method: str = option("agm", "phase stochastic bridge, or high-order Langevin", choices=tuple(METHODS))
    order: int = option(3, "of HOLD: 1 is OU/VP, 2 is CLD, 3 is HOLD", 1, 8)
    target: str = option("data", "a denoiser's; AGM's ode, sde; HOLD's noise", choices=("data", "ode", "sde", "noise"))
    data: str = option("digits", f"{', '.join(data.NAMES)}, .npy or .npz file, folder or zip", may_change=True)
    data_dir: str = option("", "where the files of a named data set are; default: the cache", may_change=True)
    size: int = option(0, "pixels a side that a folder or zip of pictures is brought to", 0, 1024)
    steps: int = option(1000, "updates", 1, 10**9, may_change=True)
    minutes: float = option(0.0, "sets --steps after 20 updates, for a run of that length", 0, 1e6)
    batch: int = option(128, "samples an update, of all processes together", 1, 10**6)
    accum: int = option(1, "parts of a batch, one after the other: less memory", 1, 10**6, may_change=True)
    lr: float = option(1e-3, "peak learning rate of AdamW; cosine decay to 0", 1e-9, 1.0)
    warmup: int = option(100, "updates of linear warm-up", 0, 10**9)
    clip: float = option(1.0, "largest gradient norm", 1e-6, 1e6)
    ema: float = option(0.999, "decay of the weight average that samples are drawn with", 0.0, 0.999999)
    width: int = option(32, "channels of the net, of a UNet's first level", 1, 4096)
    mult: tuple = option((1, 2), "UNet: width of each level, in units of --width", 1, 64, kind=int)
    blocks: int = option(1, "UNet: residual blocks a level; MLP: layers", 1, 100)
    attention: tuple = option((), "UNet: levels with attention, 0 is full size", 0, 15, kind=int)
    dropout: float = option(0.0, "UNet: dropout rate", 0.0, 0.99)
    classes: bool = option(False, "learn the labels, too: sample.py --class, --guidance")
    flip: bool = option(None, "mirror half of the training images; default: the data set's", kind=bool)
    amp: str = option("off", "bf16: autocast the net to bfloat16", choices=("off", "bf16"), may_change=True)
    compile: bool = option(False, "compile the net: faster steps after some minutes", may_change=True)
    seed: int = option(0, "of the weights, the order of the data and the noise", 0, 2**32 - 1)
    device: str = option("auto", "cpu, cuda, mps; auto takes the first that is there", may_change=True)
    out: str = option("", "new folder for the run; default: runs/METHOD-DATA, numbered", may_change=True)
    save_every: int = option(500, "updates between checkpoints and pictures", 1, 10**9, may_change=True)
    log_every: int = option(50, "updates between log lines", 1, 10**9, may_change=True)
    resume: bool = option(False, "go on with the run in --out; default: the newest in runs/", may_change=True)

    def __post_init__(self):
        for f in fields(self):
            value, m = getattr(self, f.name), f.metadata
            for v in value if isinstance(value, tuple) else (value,):
                outside = v is not None and m["low"] is not None and not m["low"] <= v <= m["high"]
                if outside or (m["choices"] and v not in (*m["choices"], f.default)):
                    wanted = f"from {m['low']:g} to {m['high']:g}" if outside else f"one of {', '.join(m['choices'])}"
                    raise UserError(f"--{f.name.replace('_', '-')} must be {wanted}, got {v!r:.40}")


def parser(defaults, doc):
    """A command line with an option for each field of `defaults`; a mistake is a UserError, and so one line."""
    p = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)

    def refuse(message):
        raise UserError(f"{why(message)}; --help shows the options")

    p.error = refuse
    for f in fields(defaults):
        value, kind, choices = getattr(defaults, f.name), f.metadata["kind"], "|".join(f.metadata["choices"] or ())
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": choices or None}
        if isinstance(value, tuple):
            how["nargs"] = "*"
        shown = "" if value in (None, "", ()) else f" (default: {value})"
        flag = "--" + f.name.rstrip("_").replace("_", "-")
        p.add_argument(flag, dest=f.name, default=value, help=f.metadata["help"] + shown, **how)
    return p


def configure(argv):
    """Command line -> (config, checkpoint or None). The defaults are a preset's, or those of the run that goes on."""
    given, ckpt = parser(Config(), __doc__).parse_args([a for a in argv if a not in ("-h", "--help")]), None
    if given.resume:
        ckpt = load_checkpoint(given.out)
        defaults = replace(ckpt["config"], out=str(ckpt["path"].parent))
    else:
        shape, device = data.shape_of(given.data, given.size), pick_device(given.device)
        defaults = replace(Config(), **preset_for(shape, device.type))
    args = vars(parser(defaults, __doc__).parse_args(argv))
    args |= {key: tuple(value) for key, value in args.items() if isinstance(value, list)}
    for key in ("data", "data_dir"):  # absolute, so that a resumed run finds them from any folder
        if args[key] and args[key] not in data.NAMES:
            args[key] = str(Path(args[key]).expanduser().resolve())
    for f in fields(Config):
        old, new = getattr(defaults, f.name), args[f.name]
        if ckpt and new != old and not f.metadata["may_change"]:
            raise UserError(f"the run has --{f.name.replace('_', '-')} {old}: leave it out, or start a new run")
    return Config(**args), ckpt


# Defaults by the largest side of an image, 0 for points. SMALL: a CPU's, about 1M parameters and half an hour above 12
# pixels. LARGE: a GPU's, which were not run.
SMALL = {
    0: dict(steps=6000, batch=512, width=128, blocks=20, save_every=2000),
    12: dict(steps=1400, batch=128, lr=3e-3, save_every=350),
    16: dict(steps=8000, batch=64, lr=2e-3, mult=(1, 2, 2), save_every=1000),
    32: dict(steps=2500, batch=64, lr=2e-3, mult=(1, 2, 2), save_every=500),
    math.inf: dict(steps=1000, batch=8, lr=5e-4, width=16, mult=(1, 2, 3, 4, 6), save_every=100),
}
WIDE = dict(lr=2e-4, width=128, mult=(1, 2, 2, 2), blocks=3, dropout=0.1, ema=0.9999, save_every=5000)
LARGE = {
    28: dict(steps=20_000, batch=128, lr=5e-4, width=64, mult=(1, 2, 2), blocks=2, save_every=2000),
    32: WIDE | dict(steps=200_000, batch=128, attention=(1,)),
    64: WIDE | dict(steps=400_000, batch=64, attention=(2,)),
    math.inf: WIDE | dict(steps=500_000, batch=8, lr=2e-5, mult=(1, 1, 2, 2, 4, 4), blocks=2, attention=(4,)),
}


def preset_for(shape, device):
    """The defaults for data of that shape on that type of device."""
    side = max(shape[1:], default=0)
    presets = LARGE if device != "cpu" and side > 12 else SMALL
    return next(preset for largest, preset in presets.items() if side <= largest)


def pick_device(name):
    """torch.device. UserError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.set_float32_matmul_precision("high")  # TF32, which convolutions have by default
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"cannot use --device {name} ({why(e):.100}): leave it out") from None


# ---------------------------------------------------------------------------------------------------------------------
# Runs and checkpoints. What a step draws depends on seed, step and process alone: no state of a generator is kept.


def build(config, facts):
    """A config and what a dataset's `summary` says -> (method module, process, net)."""
    method, (C, *size) = METHODS[config.method], facts["shape"]
    common = dict(target=config.target, sigma_data=facts["std"], bound=facts["bound"])
    process = agm_ref.AGM(**common) if config.method == "agm" else hold_ref.HOLD(order=config.order, **common)
    channels, T, t_data = C, 1.0, 0.0  # what a denoiser sees: y, at the time sigma / (1 + sigma)
    if config.target != "data":
        channels, T, t_data = process.n * C, max(process.first, process.last), round(process.last)  # the data's time
    last = dict(T=T, t_data=t_data, classes=facts["labels"] if config.classes else 0)
    if not size:
        return method, process, nets.MLP(channels, C, config.width, config.blocks, **last)
    unet = {key: getattr(config, key) for key in ("width", "mult", "blocks", "attention", "dropout")}
    return method, process, nets.UNet(channels, C, **unet, **last)


def load_checkpoint(path=None):
    """What `train` saved, with `config` a Config, and its `path`; path: the file or its folder, by default the newest
    under runs/. UserError says what is wrong with a file."""
    path = Path(path or max(Path("runs").glob("*/ckpt.pt"), key=os.path.getmtime, default="runs/*/ckpt.pt"))
    path = path / "ckpt.pt" if path.is_dir() else path
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not compare the checksums
                raise ValueError("wrong checksum")
        ckpt = torch.load(path, map_location="cpu", weights_only=True) | {"path": path}
        if not {"optimizer", "step"} <= ckpt.keys() or not {"mean", "scale", "window", "counts"} <= ckpt["data"].keys():
            raise ValueError("parts of it are missing")
        ckpt["config"] = Config(**ckpt["config"])
        net = build(ckpt["config"], ckpt["data"])[2]
        for weights in (ckpt["net"], ckpt["ema"]):
            net.load_state_dict(weights)
            if not all(v.isfinite().all() for v in weights.values()):
                raise ValueError("its weights are not finite numbers")
    except Exception as e:  # whatever torch.load raises for a damaged file, and what a foreign one lacks
        raise UserError(f"cannot use {path} as a checkpoint ({why(e):.150}): name another, or train first") from None
    return ckpt


def new_folder(config):
    """The folder of a new run. mkdir is atomic, so no two runs get the same."""
    base = config.out.removesuffix("/ckpt.pt") or f"runs/{config.method}-{Path(config.data).stem}"
    for i in range(1, 10**6):
        out = Path(base if i == 1 else f"{base}-{i}")
        with suppress(FileExistsError):
            out.mkdir(parents=True, exist_ok=bool(config.out) and not any(out.glob("*")))
            return out
        if config.out:
            raise UserError(f"{out} is not empty: --resume goes on with a run, or choose another --out")


def check_same(found, facts, name):
    """UserError if what was found of the data is not what the run knows of them."""
    for key in ("shape", "labels", "shift", "scale", "std", "mean"):
        unit = facts["scale"] if key in ("shift", "scale") else 1.0
        new, old = (torch.as_tensor(v[key], dtype=torch.float64) for v in (found, facts))
        if new.shape != old.shape or ((new - old).abs() > 1e-5 * unit).any():
            raise UserError(f"{name} is not the run's data: its {key} is {found[key]!s:.50}, not {facts[key]!s:.50}")


# ---------------------------------------------------------------------------------------------------------------------
# Training


def draw_picture(path, facts, method, process, net, device, part):
    """As many as sample.py draws, by `ode`, from the same noise at every save; part: samples that fit the memory."""
    shape = 10_000 if facts["kind"] == "points" else 64, *facts["shape"]
    predict = partial(method.denoise, process, net)
    states = process.prior(shape, torch.Generator().manual_seed(0)).split(part)
    x = torch.cat([method.ode(process, predict, m.to(device), 20, facts["mean"]).cpu() for m in states])
    data.write_png(path, data.picture(data.finish(x, facts), facts))


@torch.no_grad()
def held_out_loss(config, method, process, net, dataset, part):
    """The loss on up to 512 held-out samples, with the same noise each time; nan where there are none."""
    torch.manual_seed(0)
    rows, total = torch.linspace(0, len(dataset.test) - 1, min(512, len(dataset.test))).long(), 0.0
    for some in rows.split(part):
        x, label = (v if v is None else v.to(dataset.device) for v in dataset.held_out(some))
        total += len(some) * float(method.loss(process, net, x, label if config.classes else None))
    return total / len(rows) if len(rows) else math.nan


def train(config, ckpt=None):
    """A run, from its first or next update to the last one or to a signal."""
    device, (part, rest) = pick_device(config.device), divmod(config.batch, config.accum * WORLD)
    if rest:
        raise UserError(f"--batch {config.batch} must be a multiple of --accum times the number of processes")
    try:
        dataset = data.load(config.data, config.data_dir or None, config.flip, config.size)
    except UserError as e:
        raise UserError(f"{'name the data anew by --data: ' if ckpt else ''}{e}") from None
    facts, start = dataset.summary(), 0
    if config.classes and not facts["labels"]:
        raise UserError(f"{config.data} has no labels for --classes to learn: {dataset.no_labels}")
    if ckpt:
        check_same(facts, ckpt["data"], config.data)
        facts, start = ckpt["data"], ckpt["step"]
    torch.manual_seed(config.seed)
    method, process, net = build(config, facts)
    net, dataset = net.to(device), dataset.to(device)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    params, averages = list(net.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=0.01, fused=device.type in ("cpu", "cuda"))
    for one, key in ((net, "net"), (ema, "ema"), (optimizer, "optimizer")) if ckpt else ():
        one.load_state_dict(ckpt[key])
    served = torch.compile(net) if config.compile else net  # shares its weights
    if WORLD > 1:
        dist.init_process_group()
        served = torch.nn.parallel.DistributedDataParallel(served)
    out = ckpt["path"].parent if ckpt else Path(config.out) if RANK else new_folder(config)
    log = open(os.devnull if RANK else out / "log.txt", "a", errors="replace")  # noqa: SIM115
    announce(log, config, facts, process, net, dataset, start)
    stop, both = [], (signal.SIGINT, signal.SIGTERM)  # the signals that came: the step and its save end first
    former = [signal.signal(number, lambda number, _: stop.append(number)) for number in both]

    step, since, began, seen = start, start, time.time(), torch.zeros(2, device=device)
    while step < config.steps:
        step += 1
        torch.manual_seed(((config.seed * 1_000_003 + step) * 1009 + RANK) % 2**32)
        warm, turn = min(1.0, step / max(config.warmup, 1)), math.pi * (step - 1) / config.steps
        for group in optimizer.param_groups:
            group["lr"] = config.lr * warm * (1 + math.cos(turn)) / 2  # linear warm-up, then a cosine to zero
        optimizer.zero_grad()
        for _ in range(config.accum):
            x, label = dataset.batch(part)
            if config.classes:  # one in ten becomes "no class", which guidance needs (Ho & Salimans 2022)
                label = torch.where(torch.rand(part).to(device) < 0.1, facts["labels"], label)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16"):
                loss = method.loss(process, served, x, label if config.classes else None) / config.accum
            loss.backward()
            seen[0] += loss.detach()  # on the device: to read it would wait for each step
        seen[1] += torch.nn.utils.clip_grad_norm_(params, config.clip)
        optimizer.step()
        with torch.no_grad():  # its decay ramps up, so that the average forgets the first, random weights
            torch._foreach_lerp_(averages, params, 1 - min(config.ema, step / (9 + step)))

        speed = (step - start) / (time.time() - began)
        if step == 20 and config.minutes:
            steps = together(torch.tensor(60 * config.minutes * speed), dist.ReduceOp.MIN)
            config = replace(config, steps=max(20, int(steps)))
        halt = int(together(torch.tensor(max(stop, default=0)), dist.ReduceOp.MAX))  # a signal to one ends all
        saves = halt or step == config.steps or step % config.save_every == 0
        if saves or step % config.log_every == 0 or step == start + 3:
            mean, norm = (together(seen, dist.ReduceOp.SUM) / (step - since) / WORLD).tolist()
            if not math.isfinite(mean + norm):
                raise UserError(f"loss {mean:g} at step {step}: lower --lr or --clip; {out} has the last good weights")
            line = f"step {step} loss {mean:.5f} grad {norm:.3f} it/s {speed:.2f} images/s {speed * config.batch:.0f}"
            if saves:
                held_out = held_out_loss(config, method, process, ema, dataset, part)
                line += f" held-out {held_out:.5f}"
            left = (config.steps - step) / speed / 60
            say(log, f"{line} minutes left {left:.1f}")
            if step == start + 3 and left > 24 * 60:
                say(log, f"that is {left / 1440:.1f} days: lower --steps, --width or --size, or give --minutes")
            since, seen = step, torch.zeros(2, device=device)
        if saves and RANK == 0:
            state = dict(config=asdict(config), data=facts, net=net.state_dict(), ema=ema.state_dict())
            state |= dict(optimizer=optimizer.state_dict(), step=step, held_out=held_out)
            data.write_files({out / "ckpt.pt": partial(torch.save, state)})
        if RANK == 0 and (saves or step == max(config.steps // 10, 1)):
            draw_picture(out / f"step-{step:07d}.png", facts, method, process, ema, device, part)
        if halt and step < config.steps:
            say(log, f"stopped at step {step}, which is saved: python {sys.argv[0]} --resume --out '{out}' goes on")
            sys.exit(128 + halt)
    for number, handler in zip(both, former, strict=True):
        signal.signal(number, handler)
    say(log, f"done: {out}; next: python {Path(sys.argv[0]).with_name('sample.py')} --ckpt '{out}'")


def announce(log, config, facts, process, net, dataset, start):
    """The first lines of a run."""
    if dataset.device.type == "cpu" and max(facts["shape"][1:], default=0) > 12:
        gpu = " ".join(f"{key} {value}" for key, value in preset_for(facts["shape"], "cuda").items())
        say(log, f"the defaults are a CPU's; on a GPU: {gpu}")
    size = f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f}M parameters, steps {start}-{config.steps}"
    say(log, f"{process}{', from a denoiser that any method and order can use' * (config.target == 'data')}")
    say(log, f"{len(dataset.train)} samples {facts['shape']} of {config.data}; {type(net).__name__}, {size}")
    if config.classes:
        say(log, "classes: " + ", ".join(f"{i} {name}" for i, name in enumerate(facts["names"])))


def together(value, op):
    """A tensor of all processes: their sum, least or largest."""
    if WORLD > 1:
        dist.all_reduce(value, op)
    return value


def say(log, line):
    """A line to the terminal and to the run's log; where one is lost or full, the other goes on."""
    for stream in () if RANK else (sys.stdout, log):
        with suppress(OSError, ValueError):
            print(line, file=stream, flush=True)


def run(body):
    """Runs a script's body: what an ordinary user meets is one line on stderr, and an exit status not 0."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {why(message)}\n"
    if hasattr(sys.stdout, "reconfigure"):  # a console that cannot show the name of a class
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        body()
    except KeyboardInterrupt as e:
        sys.exit(128 + (e.args or [signal.SIGINT])[0])
    except (UserError, ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as e:
        text = why(e)
        if "memory" in text or isinstance(e, MemoryError):
            text = f"out of memory: lower --batch, --width or --n, or raise --accum ({text:.80})"
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            text = f"cannot compile the net ({text:.80}): leave out --compile"
        sys.exit(1 if RANK and isinstance(e, UserError) else f"error: {text}")  # process 0 makes the same mistake


def main(argv=None):
    run(lambda: train(*configure(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    main()
