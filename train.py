"""Trains AGM or HOLD and leaves a checkpoint and pictures in --out. Alone it is AGM on the embedded digits.

python train.py                                     minutes on a CPU
python train.py --method hold --order 3             the other method
python train.py --data cifar10                      one GPU
python train.py --data cifar10 --help               the defaults of that data set
python train.py --resume                            goes on with the newest run
"""

import argparse
import copy
import math
import os
import sys
import time
import warnings
from pathlib import Path

import torch

import agm_ref
import data
import hold_ref
import nets

# Name -> module, and what makes its process from a run's config.
METHODS = {
    "agm": (agm_ref, lambda c: agm_ref.AGM(sde=c["sde"], param=c["param"], sigma_data=c["std"])),
    "hold": (
        hold_ref,
        lambda c: hold_ref.HOLD(order=c["order"], bound=c["bound"], param=c["param"], sigma_data=c["std"]),
    ),
}

# What each kind of data needs. Any of these is one flag away; `width` is the MLP's, or the UNet's first level's.
PRESETS = {
    "points": dict(
        steps=6000,  # minutes on a CPU; the spiral is still a little blurred
        batch=512,  # fresh points are free, large batches steady the loss
        lr=1e-3,  # the cosine decay to zero makes this safe
        width=128,  # with 20 layers the size that published 2-D studies use
        blocks=20,
        save_every=2000,
    ),
    "digits": dict(
        steps=1600,  # what two CPU cores do in about five minutes
        batch=128,  # one update sees a tenth of the data
        lr=2e-3,  # few updates, so large ones
        width=32,  # 1.0M parameters: at this budget more steps beat a wider net
        mult=(1, 2),  # 8 -> 4
        blocks=2,
        save_every=400,
    ),
    "fashion": dict(
        steps=20000,  # 43 epochs
        batch=128,
        lr=5e-4,
        width=64,
        mult=(1, 2, 2),  # 28 -> 14 -> 7
        blocks=2,
        save_every=2000,
    ),
    "cifar10": dict(
        steps=200000,  # 512 epochs; days on one GPU, not run
        batch=128,
        lr=2e-4,  # the usual rate for a UNet of this size
        width=128,  # 51M parameters
        mult=(1, 2, 2, 2),
        blocks=3,
        attention=(1,),  # 16x16, the usual place
        dropout=0.1,  # 50,000 images are few for this many parameters
        ema=0.9999,  # averages the last 10,000 updates
        save_every=5000,
    ),
    "images": dict(steps=20000, batch=64, lr=5e-4, width=64, mult=(1, 2, 2), blocks=2, save_every=2000),
}


def parser(preset):
    """The command line; the defaults are those of the preset."""
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--method", choices=METHODS, default="agm", help="phase stochastic bridge, or high-order Langevin")
    p.add_argument("--data", default="digits", help=f"{', '.join(data.NAMES)}, or an .npy/.npz file")
    p.add_argument("--data-dir", help="folder or archive of the data set; default: the cache, after a download")
    p.add_argument("--order", type=int, default=3, help="HOLD only: 1 is OU/VP, 2 is CLD, 3 is HOLD")
    p.add_argument("--sde", action="store_true", help="AGM only: learn the SDE's acceleration, not the ODE's")
    p.add_argument(
        "--param", choices=["denoiser", "paper"], default="denoiser", help="what the net learns: x from y, or F / eps_n"
    )
    p.add_argument("--steps", type=int, help="updates")
    p.add_argument("--batch", type=int, help="images or points an update")
    p.add_argument("--lr", type=float, help="peak learning rate of AdamW; cosine decay to 0")
    p.add_argument("--warmup", type=int, default=100, help="updates of linear warm-up")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--ema", type=float, default=0.999, help="decay of the weight average that samples are drawn with")
    p.add_argument("--width", type=int, help="channels of the net's first level")
    p.add_argument("--blocks", type=int, help="UNet: residual blocks a level; MLP: layers")
    p.add_argument("--mult", type=int, nargs="+", default=(), help="UNet: width of each level, in units of --width")
    p.add_argument("--attention", type=int, nargs="*", default=(), help="UNet: levels with attention, 0 is full size")
    p.add_argument("--dropout", type=float, default=0.0, help="UNet: dropout rate")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, help="random mirror images; default: the data's")
    p.add_argument("--amp", choices=["off", "bf16"], default="off", help="bf16: autocast the net to bfloat16")
    p.add_argument("--seed", type=int, default=0, help="of the weights, the data order and the noise")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes the first that is there")
    p.add_argument("--out", help="folder of the run; default: runs/METHOD-DATA, numbered when taken")
    p.add_argument("--save-every", type=int, help="updates between checkpoints and pictures")
    p.add_argument("--log-every", type=int, default=50, help="updates between log lines")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out; default: the newest in runs/")
    p.set_defaults(**preset)
    p.error = refuse
    return p


def refuse(message):
    """What argparse does with a bad option, in one line."""
    sys.exit(f"error: {message}; --help shows the options")


MAY_CHANGE = ("steps", "data_dir", "device", "out", "save_every", "log_every", "resume")  # when a run goes on


def configure(argv):
    """Command line -> (config, checkpoint or None). A run that goes on keeps the options it was started with."""
    known, _ = parser({}).parse_known_args([a for a in argv if a not in ("-h", "--help")])
    preset = PRESETS.get(known.data) or PRESETS["points" if known.data in data.POINTS else "images"]
    if not known.resume:
        config = vars(parser(preset).parse_args(argv))
        check(config)
        return config, None
    path = Path(known.out) / "ckpt.pt" if known.out else newest_checkpoint()
    ckpt = load_checkpoint(path)
    config = vars(parser(preset).parse_args(argv, argparse.Namespace(**ckpt["config"])))
    for key, value in config.items():
        if key not in MAY_CHANGE and value != ckpt["config"].get(key):
            raise data.DataError(
                f"{path} was trained with --{key.replace('_', '-')} {ckpt['config'].get(key)}, not {value}: "
                "leave the option out, or start a new run with another --out"
            )
    check(config)
    return {**config, "out": str(path.parent), "resume": True}, ckpt


def check(config):
    for key in ("steps", "batch", "width", "blocks", "save_every", "log_every"):
        if config[key] < 1:
            raise data.DataError(f"--{key.replace('_', '-')} must be at least 1, got {config[key]}")
    for key, low, high in (("lr", 0, 1), ("clip", 0, math.inf), ("ema", 0, 1)):
        if not low < config[key] < high:
            raise data.DataError(f"--{key} must lie between {low} and {high}, got {config[key]}")
    if config["sde"] and config["param"] == "denoiser":
        raise data.DataError("--sde says what the paper's network learns: add --param paper, or leave it out")
    if config["warmup"] < 0:
        raise data.DataError(f"--warmup must be at least 0, got {config['warmup']}")
    if min(config["mult"], default=1) < 1 or not set(config["attention"]) <= set(range(len(config["mult"]))):
        levels = f"--mult {config['mult']} with --attention {config['attention']}"
        raise data.DataError(f"{levels}: mult must be at least 1, and attention name levels of it, from 0")
    if not 0 <= config["dropout"] < 1:
        raise data.DataError(f"--dropout must lie in [0, 1), got {config['dropout']}")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: {config, net, ema, optimizer, step, rng}; the first three are all that sampling needs


def build(config):
    """config -> (method module, process, net). The config is a checkpoint's, or that of a new run with its `shape`."""
    (method, make), (C, *size) = METHODS[config["method"]], config["shape"]
    process = make(config)
    if config["param"] == "denoiser":  # sees y, and its time is sigma / (1 + sigma)
        channels, T, t_data = C, 1.0, 0.0
    else:
        channels, T, t_data = process.n * C, process.T, process.t_data
    if not size:
        return method, process, nets.MLP(channels, C, config["width"], config["blocks"], T, t_data)
    keys = ("width", "mult", "blocks", "attention", "dropout")
    return method, process, nets.UNet(channels, C, **{k: config[k] for k in keys}, T=T, t_data=t_data)


def save_checkpoint(path, config, net, ema, optimizer, step):
    rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    state = dict(config=config, net=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
    torch.save({**state, "step": step, "rng": rng}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)  # so that a kill leaves the old file or the new one, never half of one


def load_checkpoint(path, device="cpu"):
    """Reads and checks a checkpoint. Errors: data.DataError in one line for a missing, cut or foreign file."""
    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise data.DataError(f"no checkpoint at {path}: train first, or name one") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as e:
        raise data.DataError(f"cannot read {path}: {e.strerror}") from None
    except Exception:  # torch.load raises anything from OSError to UnpicklingError on a damaged file
        raise data.DataError(f"{path} is cut short, or not a checkpoint: train again, or name another") from None
    missing = {"config", "net", "ema", "optimizer", "step", "rng"} - set(ckpt if isinstance(ckpt, dict) else ())
    missing = missing or {"method", "param", "data", "shape", "std"} - set(ckpt["config"])
    if missing or ckpt["config"]["method"] not in METHODS:
        raise data.DataError(
            f"{path} is not a checkpoint of this project: it lacks {', '.join(sorted(missing)) or 'a known method'}"
        )
    return ckpt


def newest_checkpoint():
    found = sorted(Path("runs").glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise data.DataError("no checkpoint under runs/: run train.py first, or name one")
    return found[-1]


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise data.DataError(f"cannot use --device {name}: {str(e).splitlines()[0]}") from None
    return torch.device(name)


def layout(device, amp):
    """The faster memory format for convolutions; on a CPU in bf16, channels last took 1.5 times as long."""
    return torch.contiguous_format if amp and device.type == "cpu" else torch.channels_last


def open_folder(config):
    """Makes the run's folder and tries it, before any work is done. Never one that already holds a run."""
    base = Path("runs") / f"{config['method']}-{Path(config['data']).stem}"
    names = [Path(config["out"])] if config["out"] else [base, *(Path(f"{base}-{i}") for i in range(2, 10**6))]
    out = next((n for n in names if not (n / "ckpt.pt").exists()), None)
    if out is None:
        raise data.DataError(f"{config['out']} already holds a run: --resume goes on with it; or choose another --out")
    make_folder(out)
    return out


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".try").touch()
        (path / ".try").unlink()
    except OSError as e:
        raise data.DataError(f"cannot write to {path} ({e.strerror}): choose another --out") from None


# ---------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step, config):
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / config["warmup"]) if config["warmup"] else 1.0
    return config["lr"] * warm * 0.5 * (1 + math.cos(math.pi * step / config["steps"]))


@torch.no_grad()
def update_ema(ema, net, step, decay):
    """ema <- d ema + (1 - d) net; d ramps up, so that the average forgets the first, random weights."""
    d = min(decay, (1 + step) / (10 + step))
    for a, b in zip(ema.parameters(), net.parameters(), strict=True):
        a.lerp_(b, 1 - d)


@torch.no_grad()
def draw_picture(path, method, process, ema, dataset, device, n_images=64, n_points=10000, nfe=20):
    """Samples with the default sampler, always from the same noise."""
    n = n_images if dataset.is_image else n_points
    m0 = process.prior((n, *dataset.shape), torch.Generator().manual_seed(0)).to(device)
    sampler = next(iter(method.SAMPLERS.values()))
    x = sampler(process, ema.eval(), m0, nfe)
    data.save_picture(path, dataset.to_pixels(x) if dataset.is_image else dataset.restore(x), dataset)


def train(config, ckpt=None):
    device = pick_device(config["device"])
    dataset = data.load(config["data"], config["data_dir"], config["flip"]).to(device)
    units = {
        "shift": torch.as_tensor(dataset.shift).tolist(),
        "scale": dataset.scale,
        "bound": dataset.bound,
        "std": dataset.std,
    }
    if ckpt and list(dataset.shape) != config["shape"]:
        raise data.DataError(f"{dataset.name} has shape {dataset.shape}, the run {config['shape']}: start a new run")
    config = {**config, "shape": list(dataset.shape), **units}  # all that sample.py needs
    out = Path(config["out"]) if ckpt else open_folder(config)
    config["out"] = str(out)

    torch.manual_seed(config["seed"])
    method, process, net = build(config)
    net = net.to(device, memory_format=layout(device, config["amp"] == "bf16"))
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config["lr"], weight_decay=0.01)
    start = 0
    if ckpt:
        net.load_state_dict(ckpt["net"])
        ema.load_state_dict(ckpt["ema"])
        optimizer.load_state_dict(ckpt["optimizer"])
        start = ckpt["step"]
        torch.set_rng_state(ckpt["rng"]["cpu"])
        if device.type == "cuda" and ckpt["rng"]["cuda"]:
            torch.cuda.set_rng_state_all(ckpt["rng"]["cuda"])

    size = f"{type(net).__name__} with {sum(p.numel() for p in net.parameters()) / 1e6:.2f}M parameters"
    say(out, f"{process} on {dataset.name} {dataset.shape}, {len(dataset.train)} for training")
    say(out, f"{size}, {device}, {out}, steps {start}-{config['steps']}")
    if start >= config["steps"]:
        say(out, f"nothing to do: the run already has {start} steps; more with --steps")
    clock, losses = time.time(), []
    for step in range(start, config["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        x, _ = dataset.batch(config["batch"])
        with torch.autocast(device.type, torch.bfloat16, enabled=config["amp"] == "bf16"):
            loss = method.loss(process, net.train(), x)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config["clip"])
        if not torch.isfinite(norm):
            drawn = f"t in {process.t_range}" if config["param"] == "paper" else "ln sigma ~ N(-1.2, 1.2^2)"
            where = f"step {step + 1}, {drawn}"
            raise data.DataError(
                f"loss {loss.item():g} and gradient norm {norm.item():g} at {where}: lower --lr or --clip; "
                f"{out / 'ckpt.pt'}, if there is one, holds the last good weights"
            )
        optimizer.step()
        update_ema(ema, net, step, config["ema"])
        losses.append(loss.item())

        done = step + 1
        if done % config["log_every"] == 0 or done == config["steps"]:
            speed = len(losses) / (time.time() - clock)
            say(
                out,
                f"step {done} loss {sum(losses) / len(losses):.5f} grad {norm:.3f} it/s {speed:.2f} "
                f"images/s {speed * config['batch']:.0f} minutes left {(config['steps'] - done) / speed / 60:.1f}",
            )
            clock, losses = time.time(), []
        if done % config["save_every"] == 0 or done == config["steps"]:
            save_checkpoint(out / "ckpt.pt", config, net, ema, optimizer, done)
        if done % config["save_every"] == 0 or done in (config["steps"], max(config["steps"] // 10, 1)):
            draw_picture(out / f"step-{done:07d}.png", method, process, ema, dataset, device)
    say(out, f"done: {out / 'ckpt.pt'} and the pictures beside it; next: python sample.py --ckpt {out / 'ckpt.pt'}")


def say(out, line):
    """A line to the terminal and to the run's log."""
    print(line, flush=True)
    with open(out / "log.txt", "a") as f:
        f.write(line + "\n")


def run(body):
    """Runs a script's body; a user's mistake becomes one line on stderr and a non-zero exit status."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        body()
    except (data.DataError, ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on from the last checkpoint")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    run(lambda: train(*configure(argv)))


if __name__ == "__main__":
    main()
