"""Trains AGM or HOLD and leaves a checkpoint, a log and pictures in --out. With no options: AGM on the embedded digits.

python train.py                                     minutes on a CPU
python train.py --method hold --order 3             the other method
python train.py --data cifar10                      one GPU
python train.py --data points.npy --help            the defaults for that data
python train.py --resume                            resumes the newest run
torchrun --standalone --nproc_per_node=4 train.py   the same on four GPUs
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads ends without a traceback

import argparse
import copy
import inspect
import itertools
import math
import os
import re
import shlex
import sys
import threading
import time
import warnings
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import agm_ref
import data
import hold_ref
import nets

# Name -> module, and what makes its process from a run's config.
METHODS = {
    "agm": (agm_ref, lambda c: agm_ref.AGM(sde=c["sde"], **common(c))),
    "hold": (hold_ref, lambda c: hold_ref.HOLD(order=c["order"], **common(c))),
}
LOSSES = {"agm": "acceleration matching", "hold": "BCSM"}


# Number of this process and of all, by torchrun. The others read, train and end as process 0 does, which alone writes.
RANK, WORLD = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE")) if "TORCHELASTIC_RUN_ID" in os.environ else (0, 1)


def common(c):
    return dict(bound=c["bound"], param=c["param"], sigma_data=c["std"])


# What data need, by the largest side of an image; 0: points. `width` is the MLP's, or the UNet's first level's.
PRESETS = {
    # Minutes on a CPU. Fresh points are free and large batches steady the loss; the cosine decay to zero makes the
    # learning rate safe; 20 layers of 128 are the size that published 2-D studies use.
    0: dict(steps=6000, batch=512, lr=1e-3, width=128, blocks=20, save_every=2000),
    # digits: five minutes on two CPU cores; one update sees a tenth of the data. Few updates, so large ones, and a net
    # of 0.7M parameters: at this budget more steps beat a wider or deeper net.
    12: dict(steps=1400, batch=128, lr=3e-3, width=32, mult=[1, 2], blocks=1, save_every=350),
    # fashion: 43 epochs; 28 -> 14 -> 7.
    28: dict(steps=20000, batch=128, lr=5e-4, width=64, mult=[1, 2, 2], blocks=2, save_every=2000),
    # cifar10: 512 epochs of a net of 51M parameters, not run: 1.3e18 FLOP, 9 hours at 40 TFLOP/s. The usual rate and
    # attention for a UNet of this size; dropout, as 50,000 images are few; the average is over 10,000 updates.
    32: dict(steps=200000, batch=128, lr=2e-4, width=128, mult=[1, 2, 2, 2], blocks=3, save_every=5000)
    | dict(attention=[1], dropout=0.1, ema=0.9999),
    # imagenet64, AFHQv2: the same net. Four times the pixels, so half the batch (17 GiB in fp32 by count), and
    # attention stays at 16x16. Not run: 4.7e18 FLOP.
    64: dict(steps=400000, batch=64, lr=2e-4, width=128, mult=[1, 2, 2, 2], blocks=3, save_every=5000)
    | dict(attention=[2], dropout=0.1, ema=0.9999),
    # 256 pixels: DDPM's net for them, 119M parameters, wide only where images are small, attention at 16x16. Eight
    # images take 19 GiB in fp32 by count; a low rate, as they are few. Not run: 6.0e18 FLOP.
    math.inf: dict(steps=500000, batch=8, lr=2e-5, width=128, mult=[1, 1, 2, 2, 4, 4], blocks=2, save_every=5000)
    | dict(attention=[4], ema=0.9999),
}

# Smallest and largest value, which also give the type: for the command lines and for the config of a checkpoint.
LIMITS = {
    **dict.fromkeys(("steps", "save_every", "log_every"), (1, 10**9)),
    **dict.fromkeys(("batch", "accum"), (1, 10**6)),
    **dict(lr=(1e-9, 1.0), warmup=(0, 10**9), clip=(1e-6, 1e6), ema=(0.0, 0.999999)),
    **dict(width=(1, 4096), blocks=(1, 100), mult=(1, 64), attention=(0, 15), dropout=(0.0, 0.99)),
    **dict(sde=(False, True), classes=(False, True), labels=(0, 10**4), guidance=(0.0, 100.0)),
    **dict(order=(1, 8), seed=(0, 2**32 - 1)),  # HOLD is tested up to order 8
    **dict(nfe=(1, 10**5), n=(1, 10**7), rho=(0.01, 100.0), t_end=(0.0, 100.0), multistep=(1, 4), eta=(0.0, 10.0)),
    **dict(share=(0.0, 1.0), shrink=(2, 4096), passes=(1, 100), noise=(0.0, 255.0)),
    **dict(tol=(1e-12, 1.0), shape=(1, 65536), shift=(-1e300, 1e300), scale=(1e-300, 1e300)),
    **dict(size=(0, 1024), epochs=(1, 10**6)),
    **dict.fromkeys(("std", "bound"), (1e-9, 1e9)),
}
CHOICES = {
    "inject": ("dyn", "init"),
    "rule": ("covariance", "paper"),
    "method": METHODS,
    "param": ("denoiser", "paper"),
    "amp": ("off", "bf16"),
}


def check(key, value):
    """value, if LIMITS or CHOICES allow it for that option or entry of a config; text is read as a number."""
    name, number = "--" + key.replace("_", "-"), value
    low, high = LIMITS.get(key, (" ", None))
    with suppress(ValueError, OverflowError):
        number = type(low)(value) if isinstance(value, str) else value
    if key in CHOICES:
        wanted, fits = f"one of {', '.join(CHOICES[key])}", value in list(CHOICES[key])
    elif key in LIMITS:
        wanted = f"a {'whole ' if type(low) is int else ''}number from {low:g} to {high:.12g}"
        fits = type(number) is type(low) and low <= number <= high
    else:
        wanted, fits = "text", isinstance(value, str) and value.strip()
    if not fits:
        raise data.UserError(f"{name} must be {wanted}, got {value!r:.40}")
    return number


def option(p, flag, help, **keywords):
    """Adds an option that takes what `check` allows."""
    key = flag[2:].replace("-", "_")
    p.add_argument(flag, type=partial(check, key), choices=CHOICES.get(key), help=help, **keywords)


def refuse(message):
    """What argparse does with a bad option, in one line."""
    raise data.UserError(f"{data.why(message)}; --help shows the options")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults; where an option has none, its text says what happens."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def command_line(doc):
    """The parser of a script with that docstring, still without options."""
    p = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=Help, allow_abbrev=False)
    p.error = refuse
    return p


def read(p, argv):
    """What the command line says. `--x=--` would be an empty list for argparse before Python 3.13."""
    if any(a.endswith("=--") for a in argv):
        refuse("an option is given as --")
    return p.parse_args(argv)


def parser(preset):
    """The command line; the defaults are those of the preset."""
    p = command_line(__doc__)
    add, flag = partial(option, p), argparse.BooleanOptionalAction
    add("--method", "phase stochastic bridge, or high-order Langevin", default="agm")
    add("--data", f"{', '.join(data.NAMES)}, an .npy/.npz file, a folder or zip of pictures", default="digits")
    add("--data-dir", "folder or archive of the data set; default: the cache, after a download")
    add("--size", "pixels a side that a folder or zip of pictures is brought to", default=0)
    add("--order", "HOLD only: 1 is OU/VP, 2 is CLD, 3 is HOLD", default=3)
    p.add_argument("--sde", action="store_true", help="AGM only: learn the SDE's acceleration, not the ODE's")
    add("--param", "what the net learns: x from y, or F / eps_n", default="denoiser")
    add("--steps", "updates; a resumed run that gets more of them follows the cosine of the new number")
    add("--batch", "images or points an update, of all processes together")
    add("--accum", "parts of a batch, one after the other: less memory, the same update", default=1)
    add("--lr", "peak learning rate of AdamW; cosine decay to 0")
    add("--warmup", "updates of linear warm-up", default=100)
    add("--clip", "largest gradient norm", default=1.0)
    add("--ema", "decay of the weight average that samples are drawn with", default=0.999)
    add("--width", "channels of the net's first level")
    add("--blocks", "UNet: residual blocks a level; MLP: layers")
    add("--mult", "UNet: width of each level, in units of --width", nargs="+", default=[])
    add("--attention", "UNet: levels with attention, 0 is full size", nargs="*", default=[])
    add("--dropout", "UNet: dropout rate", default=0.0)
    p.add_argument("--classes", action="store_true", help="learn the labels, too: sample.py --class, --guidance")
    p.add_argument("--flip", action=flag, help="random mirror images; default: the data's")
    add("--amp", "bf16: autocast the net to bfloat16", default="off")
    p.add_argument("--compile", action=flag, default=False, help="compile the net: faster steps after some minutes")
    add("--seed", "of the weights, the data order and the noise", default=0)
    add("--device", "cpu, cuda, mps; auto takes the first that is there", default="auto")
    add("--out", "folder of the run; default: runs/METHOD-DATA, numbered when taken")
    add("--save-every", "updates between checkpoints and pictures")
    add("--log-every", "updates between log lines", default=50)
    p.add_argument("--resume", action="store_true", help="go on with the run in --out; default: the newest in runs/")
    p.set_defaults(**preset)
    return p


MAY_CHANGE = "steps data data_dir device out save_every log_every resume accum compile".split()  # when a run goes on


def preset_for(shape):
    """The defaults for data of that shape."""
    side = next(s for s in PRESETS if max(shape[1:], default=0) <= s)
    name = f"images up to {side}x{side}" if 0 < side < math.inf else "larger images" if side else "points"
    preset = {"mult": [], "attention": [], **PRESETS[side], "preset": name}
    preset["attention"] = [level for level in preset["attention"] if level < levels(shape)]
    return {**preset, "mult": preset["mult"][: levels(shape)]}


def levels(shape):
    """How many levels a UNet can have: 8x8 -> 4x4 -> 2x2 -> 1x1 are four. Points have none."""
    return min(shape[1:], default=0).bit_length()


def configure(argv):
    """Command line -> (config, checkpoint or None). A run that goes on keeps the options it was started with."""
    known = read(parser({}), [a for a in argv if a not in ("-h", "--help")])
    if not known.resume:
        shape = data.shape_of(known.data, known.size)
        for key, unused in {"sde": known.method == "hold", "dropout": len(shape) == 1, "flip": len(shape) == 1}.items():
            if unused and getattr(known, key):
                raise data.UserError(f"--{key} has no effect on {'HOLD' if key == 'sde' else 'points'}: leave it out")
        return vars(parser(preset_for(shape)).parse_args(argv)), None
    path = Path(known.out) / "ckpt.pt" if known.out else newest_checkpoint()
    ckpt = load_checkpoint(path)
    config = vars(parser(ckpt["config"]).parse_args(argv))
    for key in vars(known).keys() - set(MAY_CHANGE):
        if config[key] != ckpt["config"][key]:
            raise data.UserError(
                f"{path} was trained with --{key.replace('_', '-')} {ckpt['config'][key]}, not {config[key]}: "
                "leave the option out, or start a new run with another --out"
            )
    return {**config, "out": str(path.parent), "resume": True}, ckpt


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: {config, net, ema, optimizer, step, rng}; the first three are all that sampling needs


def build(config):
    """config -> (method module, process, net). The config is a checkpoint's, or that of a new run with its `shape`."""
    (method, make), (C, *size), mult = METHODS[config["method"]], config["shape"], config["mult"]
    if config["sde"] and config["param"] == "denoiser":
        raise data.UserError("--sde says what the paper's network learns: add --param paper, or leave it out")
    if len(mult) > levels(config["shape"]) or not set(config["attention"]) <= set(range(len(mult))):
        levels_text = f"--mult {mult} with --attention {config['attention']}"
        most = f"data of shape {config['shape']} have at most {levels(config['shape'])} levels"
        raise data.UserError(f"{levels_text}: {most}, and attention names levels of mult, from 0")
    process = make(config)
    if config["param"] == "denoiser":  # sees y, and its time is sigma / (1 + sigma)
        channels, T, t_data = C, 1.0, 0.0
    else:
        channels, T, t_data = process.n * C, process.T, process.t_data
    last = {"T": T, "t_data": t_data, "classes": config["labels"] if config["classes"] else 0}
    if not size:
        return method, process, nets.MLP(channels, C, config["width"], config["blocks"], **last)
    keys = ("width", "mult", "blocks", "attention", "dropout")
    return method, process, nets.UNet(channels, C, **{k: config[k] for k in keys}, **last)


def save_checkpoint(path, config, net, ema, optimizer, step):
    rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    state = dict(config=config, net=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
    data.write_files({path: partial(torch.save, {**state, "step": step, "rng": rng})})


def load_checkpoint(path, device="cpu"):
    """Reads and checks a checkpoint. UserError says in one line what is wrong with a file."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not compare the checksums
            if any(part.compress_type for part in file.infolist()) or file.testzip():
                raise ValueError("wrong checksum")
        ckpt = torch.load(path, map_location=device, weights_only=True)
        given = {k: list(v) if isinstance(v, tuple) else v for k, v in ckpt["config"].items()}
        config = {**vars(parser({}).parse_args([])), "shift": 0.0, "scale": 1.0, "bound": 1.0, **given}
        for key in {"method", "param", "data", "shape", "std", *given} & {*LIMITS, *CHOICES, "data"}:
            several = key in ("mult", "attention", "shape") or (key == "shift" and isinstance(given[key], list))
            for value in given[key] if several else [given[key]]:
                if check(key, value) != value:  # a number as text
                    raise ValueError(f"{key} {value!r}")
        step, shape, mean = ckpt["step"], tuple(config["shape"]), torch.as_tensor(given.get("data_mean", 0.0))
        means = given.get("class_means", torch.zeros(0))
        wanted = (given["labels"], *shape) if given.get("classes") else ()
        units = torch.as_tensor(config["shift"]).shape
        if len(shape) not in (1, 3) or not {mean.shape, units} <= {(), shape} or type(step) is not int or step < 0:
            raise ValueError(f"step {step}, shape {shape} with a mean of {mean.shape} and a shift of {units}")
        if means.shape not in ((0,), wanted):
            raise ValueError(f"class means of {means.shape}, wanted {wanted}")
        tensors = [*ckpt["net"].values(), *ckpt["ema"].values(), mean, means]
        tensors += [v for state in ckpt["optimizer"]["state"].values() for v in state.values()]
        if not all(v.isfinite().all() for v in tensors):
            raise data.UserError("its weights are not finite numbers; take an older one, or train again")
    except OSError as e:
        raise data.UserError(f"no checkpoint at {path} ({e.strerror}): train first, or name another") from None
    except data.UserError as e:
        raise data.UserError(f"{path} cannot be used: {e}") from None
    except MemoryError:
        raise
    except Exception as e:  # whatever torch.load raises for a damaged file, and whatever lacks in a foreign one
        raise data.UserError(f"{path} is damaged, or no checkpoint of this project ({data.why(e):.80})") from None
    return {**ckpt, "config": config}


def newest_checkpoint():
    found = sorted(Path("runs").glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise data.UserError("no checkpoint under runs/: run train.py first, or name one")
    return found[-1]


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and WORLD > 1:
        if 0 < torch.cuda.device_count() < WORLD:
            raise data.UserError(f"one GPU for each process: lower --nproc_per_node to {torch.cuda.device_count()}")
        name = f"cuda:{RANK}"
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32, which convolutions have by default
            torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
        if device.type in ("cpu", "cuda", "mps"):
            return torch.device(name)
        text = "want cpu, cuda or mps"
    except (RuntimeError, AssertionError, ImportError) as e:
        text = str(e).splitlines()[0]
    raise data.UserError(f"cannot use --device {name}: {text}")


def claim(config, goes_on):
    """The run's folder and its open log: this run's alone, by a lock on the log that ends with the process."""
    if RANK:
        return Path(os.devnull), open(os.devnull, "wb")
    base = f"runs/{config['method']}-{Path(config['data']).stem}"
    names = [config["out"]] if config["out"] else (f"{base}-{i}" if i > 1 else base for i in itertools.count(1))
    for out in map(Path, names):
        try:
            out.mkdir(parents=True, exist_ok=bool(config["out"]))
            log = open(out / "log.txt", "a+b", buffering=0)  # noqa: SIM115, it stays open
            break
        except OSError as e:
            if config["out"] or not (isinstance(e, FileExistsError) and os.path.lexists(out)):
                raise data.UserError(f"cannot write to {out} ({e.strerror}): choose another --out") from None
    if not data.lock(log):
        raise data.UserError(f"{out} belongs to another process, which is running: choose another --out")
    if not goes_on and any(out.glob("*.pt")):
        raise data.UserError(f"{out} already holds a run: --resume goes on with it; or choose another --out")
    leftover = r"(ckpt\.pt|step-\d{7}\.png)\.[0-9a-f]{8}\.tmp"  # of a run that was killed
    if not goes_on and log.seek(0, os.SEEK_END):  # or that ended before its first save
        log.seek(0)
        if not re.match(rb"\w+\(.*\) on |step \d", log.readline(1000)):
            raise data.UserError(f"{out / 'log.txt'} is not the log of a run: choose another --out")
        leftover += r"|step-\d{7}\.png"
        log.truncate(0)
    for path in out.iterdir():
        if re.fullmatch(leftover, path.name):
            path.unlink(missing_ok=True)
    return out, log


# ---------------------------------------------------------------------------------------------------------------------
# Samples


class Noise:
    """Unit noise with one generator a sample, so that sample i does not depend on the batch it is drawn in."""

    def __init__(self, seed, indices):
        self.generators = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**32) for i in indices]

    def prior(self, process, shape):
        return torch.cat([process.prior((1, *shape), g) for g in self.generators])

    def __call__(self, like):
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in self.generators]).to(like)


def draw(*args, **options):
    """What `batches` draws, as one tensor (n, *shape)."""
    return torch.cat(list(batches(*args, **options)))


@torch.no_grad()
def batches(
    sampler, process, net, shape, n, nfe, seed=0, batch=256, device="cpu", conditional=None, label=None, start=0, **more
):
    """Samples start ... n - 1 on the CPU, `batch` at a time; `data_mean` is for samplers that start from a mean.
    conditional: (m0, noise) -> another m0 and a condition for the sampler. label: classes (n,); then data_mean has a
    row for each class."""
    takes = inspect.signature(sampler).parameters
    if "data_mean" not in takes or takes["data_mean"].default is None:
        more.pop("data_mean", None)
    means = more.get("data_mean")
    for i in range(start, n, batch):
        noise = Noise(seed, range(i, min(i + batch, n)))
        extra = {"randn": noise} if "randn" in takes else {}
        m0 = noise.prior(process, shape).to(device)
        if conditional:
            m0, extra["condition"] = conditional(m0, noise)
        if label is not None:
            extra["label"] = label[i : i + batch].to(device)
            more |= {} if means is None else {"data_mean": means[label[i : i + batch]]}
        yield sampler(process, net, m0, nfe, **more, **extra).float().cpu()


def finish(x, config):
    """Samples in network units -> uint8 images (N, H, W, C), or points (N, D) in the units of the data."""
    is_image = len(config["shape"]) == 3
    return data.Dataset.to_pixels(x) if is_image else data.in_units(x, config["shift"], config["scale"])


def draw_picture(path, config, method, process, net, device):
    """What sample.py draws with no options; images in no larger batches than those of the training, which fit."""
    n, batch = (64, config["batch"] // config["accum"] // WORLD) if len(config["shape"]) == 3 else (10_000, 10_000)
    sampler, mean = next(iter(method.SAMPLERS.values())), config["data_mean"]
    x = draw(sampler, process, net, config["shape"], n, 20, batch=batch, device=device, data_mean=mean)
    data.write_files({path: data.png(data.picture(finish(x, config), config["window"]))})


# ---------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step, config):
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / config["warmup"]) if config["warmup"] else 1.0
    return config["lr"] * warm * 0.5 * (1 + math.cos(math.pi * step / config["steps"]))


@torch.no_grad()
def update_ema(averages, params, step, decay):
    """ema <- d ema + (1 - d) net; d ramps up, so that the average forgets the first, random weights."""
    torch._foreach_lerp_(averages, params, 1 - min(decay, (1 + step) / (10 + step)))


def reseed(config, step):
    """Of several processes: what each draws in that step differs from the others and is the same after --resume."""
    if WORLD > 1:
        torch.manual_seed(((config["seed"] * 1_000_003 + step) * 1009 + RANK) % 2**32)


def drop(label, classes):
    """Labels (B,) with one in ten of them "no class", which guidance needs (Ho & Salimans 2022)."""
    return torch.where(data.send(torch.rand(len(label)) < 0.1, label.device), classes, label)


def compare(found, config, name):
    """Refuses data that are not those of the run, wherever they lie; the run's units stand."""
    is_old = not isinstance(config.get("data_mean"), torch.Tensor)  # when points had the mean 0
    for key in (k for k in found if k in config and k != "window" and not (is_old and k == "data_mean")):
        new, old = (torch.as_tensor(c[key], dtype=torch.float64) for c in (found, config))
        unit = config["scale"] if key in ("shift", "scale") else 1.0
        if new.shape != old.shape or (new - old).abs().max() > 1e-5 * unit:
            was, now = (data.why(v.tolist())[:60] for v in (old, new))
            raise data.UserError(f"{name} is not the run's data ({config['data']}): its {key} is {now}, that was {was}")


def load_state(ckpt, net, ema, optimizer):
    """Weights, optimizer and random numbers as at the save."""
    try:
        net.load_state_dict(ckpt["net"])
        ema.load_state_dict(ckpt["ema"])
        groups = optimizer.state_dict()["param_groups"]  # ours: the file's could say anything
        optimizer.load_state_dict({"state": ckpt["optimizer"]["state"], "param_groups": groups})
        for p, state in optimizer.state.items():
            if not state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape:
                raise ValueError("optimizer of another net")
            for key in ("exp_avg", "exp_avg_sq"):  # the fused AdamW does not notice that older runs had another layout
                state[key] = state[key].contiguous()
        torch.set_rng_state(ckpt["rng"]["cpu"])
        if torch.cuda.is_available() and ckpt["rng"]["cuda"]:
            torch.cuda.set_rng_state_all(ckpt["rng"]["cuda"])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise data.UserError(
            f"the checkpoint's state does not fit its config ({data.why(e):.80}): train again"
        ) from None


def train(config, ckpt=None):
    device, (part, rest) = pick_device(config["device"]), divmod(config["batch"], config["accum"] * WORLD)
    if rest:
        text = f"{config['accum'] * WORLD}: --accum times the number of processes"
        raise data.UserError(f"--batch {config['batch']} must be a multiple of {text}")
    dataset = data.load(config["data"], config["data_dir"], config["flip"], config["size"])
    found = dataset.summary()
    if config["classes"]:
        found.update(dataset.labels_summary())
    if ckpt:
        compare(found, ckpt["config"], config["data"])
    config = {**found, **config, "flip": dataset.flip}  # all that sample.py needs
    dataset = dataset.to(device)

    torch.manual_seed(config["seed"])
    method, process, net = build(config)
    net = net.to(device)
    served = torch.compile(net) if config["compile"] else net  # shares its weights
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    params, averages, fast = list(net.parameters()), list(ema.parameters()), device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(params, lr=config["lr"], weight_decay=0.01, fused=fast)
    if ckpt:
        load_state(ckpt, net, ema, optimizer)
    start, steps, save_every = ckpt["step"] if ckpt else 0, config["steps"], config["save_every"]
    out, log = claim(config, bool(ckpt))
    if WORLD > 1:
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 convolutions, whose strides say nothing
        RANK or dist.init_process_group()  # now that all is checked; the others wait for it in main
        served = DistributedDataParallel(served)
    config["out"], again, stop = str(out), f"python train.py --resume --out {shlex.quote(str(out))}", []

    def picture(step):
        if RANK == 0 and (step % save_every == 0 or step in (steps, max(steps // 10, 1))):
            draw_picture(out / f"step-{step:07d}.png", config, method, process, ema, device)

    def signalled(number, _):  # the first lets the step and its save end
        if stop and WORLD == 1:  # torchrun repeats what the terminal has already sent
            raise Stopped(number, f"stopped at once; {again} goes on from the last save, if there was one")
        stop.append(number)

    what = LOSSES.get(config["method"], config["method"])
    if config["param"] == "denoiser":
        what += " with a preconditioned network and EDM's weight in t (a denoiser)"
    say(log, f"{process} on {config['data']}; defaults for {config.get('preset', 'it')}; the loss is {what}")
    size = f"{type(net).__name__} with {sum(p.numel() for p in params) / 1e6:.2f}M parameters"
    where = f"{device}{f' x {WORLD}' if WORLD > 1 else ''}, {out}"
    say(log, f"{len(dataset.train)} samples {dataset.shape}, {size}, {where}, steps {start}-{steps}")
    if start >= steps:
        say(log, f"nothing to do: the run already has {start} steps; more with --steps")
    if ckpt and not (out / f"step-{start:07d}.png").exists():  # the run was killed before it was drawn
        picture(start)
    since, began, seen = start, time.time(), torch.zeros(2, device=device)
    reseed(config, start + 1)
    with log, signals(signalled):
        for done in range(start + 1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done - 1, config)
            optimizer.zero_grad()
            for left in reversed(range(config["accum"])):
                x, label = dataset.batch(part)
                label = drop(label, config["labels"]) if config["classes"] else None
                with torch.autocast(device.type, torch.bfloat16, enabled=config["amp"] == "bf16"):
                    loss = method.loss(process, served, x, label) / config["accum"]
                if not left:
                    reseed(config, done + 1)
                dataset.read_ahead(part)  # this part has drawn all its numbers
                loss.backward()
                seen[0] += loss.detach()  # on the device: to read it would wait for each step
            norm = torch.nn.utils.clip_grad_norm_(params, config["clip"], foreach=fast or None)
            optimizer.step()
            update_ema(averages, params, done - 1, config["ema"])
            seen[1] += norm

            halt = torch.tensor(max(stop, default=0))
            if WORLD > 1:  # a signal to one ends all after the same step
                dist.all_reduce(halt, dist.ReduceOp.MAX)
            saves = done % save_every == 0 or done == steps or bool(halt)
            if saves or done % config["log_every"] == 0:
                if WORLD > 1:
                    dist.all_reduce(seen)
                mean, norm = (seen / (done - since) / WORLD).tolist()
                if not math.isfinite(mean + norm):
                    drawn = f"all t of {process}" if config["param"] == "paper" else "ln sigma ~ N(-1.2, 1.2^2)"
                    where = f"loss {mean:g} and gradient norm {norm:g} in steps {since + 1}-{done}, {drawn}"
                    kept = f"{out / 'ckpt.pt'}, if there is one, holds the last good weights"
                    raise data.UserError(f"{where}: lower --lr or --clip; {kept}")
                speed = (done - since) / (time.time() - began)
                say(
                    log,
                    f"step {done} loss {mean:.5f} grad {norm:.3f} it/s {speed:.2f} "
                    f"images/s {speed * config['batch']:.0f} minutes left {(steps - done) / speed / 60:.1f}",
                )
                since, seen = done, torch.zeros(2, device=device)
            if saves and RANK == 0:
                save_checkpoint(out / "ckpt.pt", config, net, ema, optimizer, done)
            picture(done)
            began = time.time() if since == done else began  # speed without pictures
            if halt and done < steps:
                raise Stopped(int(halt), f"stopped at step {done}, which is saved; {again} goes on")
        path = out / "ckpt.pt"
        say(log, f"done: {path} and the pictures beside it; next: python sample.py --ckpt {shlex.quote(str(path))}")


def say(log, line):
    """A line to the terminal and to the run's log; where one is lost or full, the other goes on."""
    with suppress(OSError, ValueError):
        RANK or print(line, flush=True)
    with suppress(OSError):
        log.write(f"{line}\n".encode(errors="backslashreplace"))


class Stopped(BaseException):
    """A signal: its number, and what to tell the user."""


@contextmanager
def signals(handler):
    """Within, SIGINT, SIGTERM and SIGHUP go to handler(number, frame), but those that are ignored (nohup)."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    is_main = threading.current_thread() is threading.main_thread()
    old = {n: signal.signal(n, handler) for n in numbers if is_main and signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, former in old.items():
            signal.signal(number, former)


def run(body):
    """Runs a script's body: a mistake, a lack of memory or a signal is one line on stderr and an exit status not 0."""

    def stopped(number, _):
        raise Stopped(number, "stopped: nothing was written")

    warnings.formatwarning = lambda message, *_, **__: f"warning: {data.why(message)}\n"
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # what the terminal's encoding lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        with nullcontext() if RANK else signals(stopped):  # the others may be killed while they wait for process 0
            body()
    except (data.UserError, ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as e:
        gone = WORLD > 1 and any(words in str(e) for words in ("by peer", "remote process"))
        if gone or (RANK and isinstance(e, data.UserError)):
            sys.exit(1)  # another process is gone, or makes the same mistake: it says why
        lacks = isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and "memory" in str(e))
        sys.exit(f"error: {'out of memory, lower --batch, --width or --n: ' if lacks else ''}{data.why(e)}")
    except Stopped as e:
        with suppress(OSError, ValueError):
            RANK or print(e.args[1], file=sys.stderr, flush=True)
        sys.exit(128 + e.args[0])
    finally:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):  # a lost terminal must not change the exit status
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def main(argv=None):
    def body():
        if RANK:
            dist.init_process_group()  # returns when process 0 joins
        train(*configure(sys.argv[1:] if argv is None else argv))
        if WORLD > 1:
            dist.destroy_process_group()

    run(body)


if __name__ == "__main__":
    main()
