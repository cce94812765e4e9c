"""Trains AGM or HOLD and leaves a checkpoint, a log and pictures in a folder.

python train.py                                     AGM on the digits: minutes on a CPU
python train.py --data FOLDER --size 16 --classes   own pictures, a folder for each class
python train.py --resume                            goes on with the newest run
torchrun --standalone --nproc_per_node=4 train.py   on four GPUs
"""

import copy
import itertools
import math
import os
import sys
import time
import zipfile
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import distributed

import agm_ref
import data
import hold_ref
import nets
from extras import clock
from formats import command
from formats.command import HEARD, Options, Stopping, flag, option, parser
from formats.files import UserError, absolute, make_folder, say, shorten, why, write_files
from formats.png import write_png

# The methods: the page (a module) with loss, denoise and SAMPLERS, and the process. One of your
# own, added here, is trained and sampled: METHODS["flow"] = (agm_ref, FlowMatching), say.
METHODS = {"agm": (agm_ref, agm_ref.AGM), "hold": (hold_ref, hold_ref.HOLD)}

# -------------------------------------------------------------------------------------------------
# Options: one list of fields makes the command line, the check of values, and the rule of --resume


adjustable = partial(option, may_change=True)  # by --resume


@dataclass(frozen=True)
class Config(Options):
    """What a run was asked for."""

    method: str = option("agm", "phase stochastic bridge, or high-order Langevin", choices=METHODS)
    order: int = option(3, "of HOLD: 1 is OU/VP, 2 is CLD, 3 is HOLD", 1, 8)
    target: str = option(
        "data", "what the net learns: data, or a paper's: ode, sde (AGM), noise (HOLD)"
    )
    data: str = adjustable("digits", f"{', '.join(data.NAMES)}, .npy or .npz file, folder or zip")
    data_dir: str = adjustable("", "where the files of a named data set are; default: the cache")
    size: int = option(0, "pixels a side that a folder or zip of pictures is brought to", 0, 1024)
    steps: int = adjustable(1000, "updates", 1, 10**9)
    minutes: float = adjustable(
        0.0, "train for so long, whatever --steps; with --resume: so much longer", 0, 1e6
    )
    batch: int = option(128, "samples an update, of all processes together", 1, 10**6)
    accum: int = adjustable(1, "parts of a batch, one after the other: less memory", 1, 10**6)
    lr: float = option(1e-3, "peak learning rate of AdamW; cosine decay to 0", 1e-9, 1.0)
    warmup: int = option(100, "updates of linear warm-up", 0, 10**9)
    clip: float = option(1.0, "largest gradient norm", 1e-6, 1e6)
    ema: float = option(
        0.999, "decay of the weight average that samples are drawn with", 0.0, 0.999999
    )
    width: int = option(32, "channels of the net, of a UNet's first level", 1, 4096)
    mult: tuple = option((1, 2), "UNet: width of each level, in units of --width", 1, 64)
    blocks: int = option(1, "UNet: residual blocks a level; MLP: layers", 1, 100)
    attention: tuple = option((), "UNet: levels with attention, 0 is full size", 0, 15)
    dropout: float = option(0.0, "UNet: dropout rate", 0.0, 0.99)
    classes: bool = option(False, "learn the labels, too: sample.py --class, --guidance")
    flip: bool = option(None, "mirror half of the training images; default: the data set's")
    amp: str = adjustable("off", "bf16: autocast the net to bfloat16", choices=("off", "bf16"))
    compile: bool = adjustable(False, "compile the net: faster steps after some minutes")
    seed: int = option(0, "of the weights, the batches and the noise", 0, 2**32 - 1)
    device: str = adjustable("auto", "cpu, cuda, mps; auto takes the first that is there")
    out: str = adjustable("", "new folder for the run; default: runs/METHOD-DATA, numbered")
    save_every: int = adjustable(
        0, "updates between saves (not with --minutes); default: a sixth of the run", 0, 10**9
    )
    log_every: int = adjustable(50, "updates between log lines", 1, 10**9)
    resume: bool = adjustable(False, "go on with the run in --out; default: the newest in runs/")

    def __post_init__(self):
        super().__post_init__()
        targets = METHODS[self.method][1].targets
        if self.target not in targets:
            raise UserError(f"--target of {self.method} must be one of {', '.join(targets)}")
        if not self.mult or max(self.attention, default=0) >= len(self.mult):
            raise UserError("--attention names levels of --mult, from 0, and --mult needs one")


def configure(argv):
    """Command line -> (config, checkpoint or None)."""
    # once to find the run, or the data and the device, as these decide on the defaults; then with
    # those defaults, which --help shows
    words = [word.split("=")[0] for word in argv]
    asks_help = not {"-h", "--help"}.isdisjoint(words)
    given = parser(Config(), __doc__).parse_args([w for w in argv if w not in ("-h", "--help")])
    ckpt = None
    defaults = Config()
    try:
        if given.resume:
            ckpt = load_checkpoint(given.out)
            defaults = replace(ckpt["config"], out=str(ckpt["path"].parent))
        else:
            shape = data.shape_of(given.data, given.size)
            defaults = replace(defaults, **preset_for(shape, pick_device(given.device).type))
    except UserError:
        if not asks_help:
            raise
    args = vars(parser(defaults, __doc__).parse_args(argv))

    # paths are absolute, so that a resumed run finds them from any folder
    if args["data"] not in data.NAMES:
        args["data"] = str(absolute(args["data"]))
    if args["data_dir"]:
        args["data_dir"] = str(absolute(args["data_dir"]))
    for key in ("mult", "attention"):
        args[key] = tuple(args[key])

    if ckpt:
        check_changes(defaults, args)
        # --minutes begins a schedule by the clock, --steps ends one
        if given.minutes:
            ckpt["minutes"] = 0.0
        elif "--steps" in words:
            args["minutes"] = 0.0

    # what does not go together
    config = Config(**args)
    _, Process = METHODS[config.method]
    if config.order != Config.order and not hasattr(Process, "order"):
        raise UserError(f"{config.method} has no --order: leave it out, or add --method hold")
    if config.batch % (config.accum * WORLD):
        raise UserError("--batch must be a multiple of --accum times the number of processes")
    return config, ckpt


def check_changes(defaults, args):
    """UserError for an option that a resumed run cannot change."""
    for f in fields(defaults):
        had = getattr(defaults, f.name)
        if args[f.name] != had and not f.metadata["may_change"]:
            raise UserError(f"the run has {flag(f.name)} {had}: leave it out, or start a new run")


# Defaults by the largest side of an image, 0 for points. SMALL: for a CPU, about 1M parameters and
# half an hour above 12 pixels. LARGE: for a GPU; those were not run.
SMALL = {
    0: dict(steps=6000, batch=512, width=128, blocks=20),
    12: dict(steps=1400, batch=128, lr=3e-3),
    16: dict(steps=8000, batch=64, lr=2e-3, mult=(1, 2, 2)),
    32: dict(steps=2500, batch=64, lr=2e-3, mult=(1, 2, 2)),
    math.inf: dict(steps=1000, batch=8, lr=5e-4, width=16, mult=(1, 2, 3, 4, 6)),
}
WIDE = dict(
    lr=2e-4, width=128, mult=(1, 2, 2, 2), blocks=3, dropout=0.1, ema=0.9999, save_every=5000
)
LARGE = {
    28: dict(steps=20_000, batch=128, lr=5e-4, width=64, mult=(1, 2, 2), blocks=2),
    32: WIDE | dict(steps=200_000, batch=128, attention=(1,)),
    math.inf: WIDE | dict(steps=400_000, batch=64, attention=(2,)),
}


def preset_for(shape, device):
    """The defaults for data of that shape on that type of device."""
    side = max(shape[1:], default=0)
    presets = LARGE if device != "cpu" and side > 12 else SMALL
    for largest, preset in presets.items():
        if side <= largest:
            return preset


def pick_device(name):
    """torch.device. UserError if it cannot be used."""
    if name == "auto":
        there = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if there else "cpu"
    try:
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if name.startswith("cuda"):
            torch.set_float32_matmul_precision("high")  # TF32, which convolutions have by default
            torch.backends.cudnn.benchmark = True
        number = torch.zeros(1, device=name)
        number.item()  # a device without numbers, as meta, fails here
        return number.device
    except Exception as error:  # torch raises a dozen kinds
        text = f"cannot use --device {name} ({why(error):.60})"
        raise UserError(f"{text}: leave it out, or give cpu, cuda or mps") from None


# -------------------------------------------------------------------------------------------------
# What a run is built of


# Mean and standard deviation of ln sigma at which a denoiser is trained: EDM's for images, lower
# ones for points, whose fine structure shows at low noise only (measured in bench/README.md).
IMAGES_NOISE = (-1.2, 1.2)
POINTS_NOISE = (-1.8, 1.6)


def build(config, facts):
    """A config and the facts of its data -> the method's page, the process, the net."""
    page, Process = METHODS[config.method]
    noise_mean, noise_std = facts.get("noise", IMAGES_NOISE)
    options = dict(
        target=config.target,
        sigma_data=min(max(facts["std"], 0.1), 5.0),  # nearly black pictures have less
        bound=facts["bound"],
        noise_mean=noise_mean,
        noise_std=noise_std,
    )
    if hasattr(Process, "order"):
        options["order"] = config.order
    process = Process(**options)

    # a denoiser sees y at the time sigma/(1 + sigma), a paper's net sees the state. T and t_data:
    # the length of the time axis, and where on it the data are
    C, *size = facts["shape"]
    channels = C
    times = dict(T=1.0, t_data=0.0)
    if config.target != "data":
        channels = process.n * C
        times = dict(T=max(process.first, process.last), t_data=process.data_time)

    # a network of your own goes here: net(m, t, label=None) -> (B, C, ...), see nets.py
    classes = facts["labels"] if config.classes else 0
    common = dict(width=config.width, classes=classes, **times)
    if size:
        shape = dict(mult=config.mult, blocks=config.blocks, attention=config.attention)
        net = nets.UNet(channels, C, dropout=config.dropout, **shape, **common)
    else:
        net = nets.MLP(channels, C, depth=config.blocks, **common)
    return page, process, net


def load_data(config, ckpt):
    """The data set, and its facts: those of the run, if one goes on. UserError if they differ."""
    try:
        dataset = data.load(config.data, config.data_dir or None, config.flip, config.size)
    except UserError as error:  # moved, perhaps
        anew = "name the data anew by --data: " if ckpt else ""
        raise UserError(f"{anew}{error}") from None

    # what sampling and --resume need to know of it
    facts = dataset.summary()
    facts["noise"] = POINTS_NOISE if facts["kind"] == "points" else IMAGES_NOISE
    if ckpt:
        check_same(facts, ckpt["data"], config.data)
        facts = ckpt["data"]
    if config.classes and not facts["labels"]:
        reason = dataset.no_labels or "no class folders"
        raise UserError(f"{config.data} has no labels ({reason}): leave out --classes")
    return dataset, facts


def check_same(found, facts, name):
    """UserError if what was found of the data is not what the run knows of them."""
    for key in ("shape", "labels", "shift", "scale", "std", "mean"):
        unit = facts["scale"] if key in ("shift", "scale") else 1.0
        new = torch.as_tensor(found[key], dtype=torch.float64)
        old = torch.as_tensor(facts[key], dtype=torch.float64)
        if new.shape != old.shape or not new.allclose(old, rtol=0, atol=1e-5 * unit):
            differs = f"its {key} is {found[key]!s:.50}, not {facts[key]!s:.50}"
            raise UserError(f"{name} is not the run's data: {differs}")


def folder_of(config, ckpt):
    """The run's folder: that of the checkpoint, or a new one, which the first process makes."""
    if ckpt:
        return ckpt["path"].parent
    return Path(config.out) if RANK else new_folder(config)


def new_folder(config):
    """The folder of a new run. UserError if --out names one that is not empty."""
    if config.out:
        out = make_folder(config.out)
        if (out / "ckpt.pt").exists():
            raise UserError(f"{out} has a run: --resume, or another --out")
        if any(out.iterdir()):
            raise UserError(f"{out} is not empty: choose another --out")
        return out

    # the first number that is free; mkdir is atomic, so no two runs get the same
    base = make_folder("runs") / f"{config.method}-{Path(config.data).stem:.50}"
    for number in itertools.count(1):
        out = Path(base if number == 1 else f"{base}-{number}")
        with suppress(FileExistsError):
            out.mkdir()
            return out


# -------------------------------------------------------------------------------------------------
# Checkpoints. What an update draws depends on seed, step and process: no generator is kept

LAYOUT = 2  # 1: without this number, `bend` and `noise`


def save(out, run, step, held_out, bend, minutes):
    """ckpt.pt, whole or not at all."""
    state = dict(
        layout=LAYOUT,
        config=asdict(run.config),
        data=run.facts,
        net=run.net.state_dict(),
        ema=run.average.state_dict(),
        optimizer=run.optimizer.state_dict(),
        step=step,
        held_out=held_out,
        bend=bend,  # of the learned grid, extras/clock.py
        minutes=minutes,  # of --minutes that have passed
    )
    write_files({out / "ckpt.pt": partial(torch.save, state)})


def load_checkpoint(path=None):
    """What `save` wrote, with `config` a Config, and its `path`. path: the file or its folder, by
    default the newest under runs/. UserError says what is wrong with a file."""
    # the newest run, or the one that is named by its file or folder
    if not path:
        path = max(Path("runs").glob("*/ckpt.pt"), key=os.path.getmtime, default=None)
    if path is None:
        raise UserError("no run under runs/ yet: train first, or name a checkpoint")
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt.pt"

    # its content, whole and of this program
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not compare the checksums
                raise ValueError("it is damaged")
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        check_writer(ckpt)
        ckpt["config"] = Config(**ckpt["config"])
    except Exception as error:  # whatever zipfile and torch.load raise for a damaged file
        text = f"cannot use {path} as a checkpoint ({why(error):.150})"
        raise UserError(f"{text}: name another, or train first") from None
    return dict(bend=None, minutes=0.0) | ckpt | dict(path=path)


def check_writer(ckpt):
    """ValueError for a checkpoint of another program or version, or with broken weights."""
    if not isinstance(ckpt, dict) or not {"config", "net", "ema", "data"} <= ckpt.keys():
        raise ValueError("another program wrote it")
    if ckpt.get("layout", 1) > LAYOUT:
        raise ValueError("a newer version of this program wrote it")
    if "optimizer" not in ckpt or "window" not in ckpt["data"]:
        raise ValueError("an older version of this program wrote it")
    if not all(weights.isfinite().all() for weights in ckpt["ema"].values()):
        raise ValueError("its weights are not finite numbers")


# -------------------------------------------------------------------------------------------------
# Several processes, started by torchrun: each takes its part of a batch, the first one writes

WORLD = 1
RANK = 0
if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():  # all three are torchrun's
    WORLD = int(os.environ["WORLD_SIZE"] or 1)
    RANK = int(os.environ["RANK"] or 0) if WORLD > 1 else 0


def in_parallel(net, compiled):
    """The net with the same weights, compiled or not, which averages gradients over processes."""
    if compiled:
        net = torch.compile(net)
    if WORLD == 1:
        return net
    distributed.init_process_group()
    return torch.nn.parallel.DistributedDataParallel(net)


def over_all(tensor, op=distributed.ReduceOp.SUM):
    """The sum, or another reduction, of a tensor over all processes."""
    if WORLD > 1:
        tensor = tensor.clone()
        distributed.all_reduce(tensor, op)
    return tensor


# -------------------------------------------------------------------------------------------------
# Time and log


class Pace:
    """How much of a run is done: by updates, or with --minutes by the clock, whatever else the
    machine does. minutes: how many of them have passed before."""

    def __init__(self, config, step, minutes):
        self.config = config
        self.began = time.perf_counter() - 60 * minutes
        self.recent = deque([(step, time.perf_counter())])  # of lines of the last minute

    def minutes(self):
        return (time.perf_counter() - self.began) / 60

    def share(self, step):
        """From 0 at the start to 1 at the end: it sets the learning rate, the saves and the end."""
        share = step / self.config.steps
        if self.config.minutes:
            share = self.minutes() / self.config.minutes
            share = float(over_all(torch.tensor(share), distributed.ReduceOp.MAX))
        return min(1.0, share)

    def look(self, step):
        """Updates a second over the last minute, and the minutes that are left."""
        now = time.perf_counter()
        while len(self.recent) > 1 and now - self.recent[1][1] > 60:
            self.recent.popleft()
        first, since = self.recent[0]
        self.recent.append((step, now))
        speed = (step - first) / max(now - since, 1e-9)
        left = (self.config.steps - step) / speed / 60
        if self.config.minutes:
            left = max(0.0, self.config.minutes - self.minutes())
        return speed, left


def share_between_saves(config):
    """A sixth of the run, or --save-every updates."""
    if config.save_every and not config.minutes:
        return config.save_every / config.steps
    return 1 / 6


def is_save_between(before, after, config):
    """Whether a save falls between these two shares of a run. There is one more after a twentieth,
    as people want to see a picture early."""
    every = share_between_saves(config)
    number_before = int(before / every + 1e-9)
    number_after = int(after / every + 1e-9)
    return number_after > number_before or before < 0.05 <= after or after == 1


class Log:
    """Lines on the terminal and in the run's log.txt; if one of them is full, the other goes on.
    UserError if log.txt cannot be opened."""

    def __init__(self, path):
        try:
            self.file = open(os.devnull if RANK else path, "a", errors="replace")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write {path} ({why(error)}): choose another --out") from None

    def say(self, line):
        if RANK:
            return
        say(line)
        while HEARD:  # warnings since the line before, which run has shown
            say(f"warning: {HEARD.pop(0)}", self.file)
        say(line, self.file)


# -------------------------------------------------------------------------------------------------
# Training


@dataclass
class Run:
    """What is trained."""

    config: Config
    facts: dict  # of the data
    device: torch.device
    page: object  # agm_ref or hold_ref
    process: object  # AGM or HOLD
    net: torch.nn.Module
    average: torch.nn.Module  # of the weights of net; samples are drawn with it
    optimizer: torch.optim.Optimizer

    def predict(self, m, t, label=None):
        return self.page.denoise(self.process, self.average, m, t, label)


def train(config, ckpt=None):
    """Trains until the last update, the last minute, or a signal."""
    # the data, and the net as it is new or was saved
    device = pick_device(config.device)
    part = config.batch // config.accum // WORLD
    dataset, facts = load_data(config, ckpt)
    run = prepare(config, facts, ckpt, device)
    step = start = ckpt["step"] if ckpt else 0
    served = in_parallel(run.net, config.compile)
    dataset = dataset.to(device)

    # where the run is kept, and what is said of it
    out = folder_of(config, ckpt)
    log = Log(out / "log.txt")
    announce(log, run, dataset, start)
    pace = Pace(config, start, ckpt["minutes"] if ckpt else 0.0)
    share = pace.share(step)
    losses = []  # since the last line; they stay on the device, as to read one waits for it
    norms = []
    halted = 0
    with Stopping() as stopping:
        while share < 1 and not halted:
            # what an update draws depends on the seed, the update and the process alone
            step += 1
            torch.manual_seed(((config.seed * 1_000_003 + step) * 1009 + RANK) % 2**32)

            # learning rate: linear warm-up, then a cosine to zero
            warm = min(1.0, step / max(config.warmup, 1))
            cosine = (1 + math.cos(math.pi * share)) / 2
            for group in run.optimizer.param_groups:
                group["lr"] = config.lr * warm * cosine

            # gradients, in parts that fit the memory
            run.optimizer.zero_grad()
            for _ in range(config.accum):
                x, label = dataset.batch(part)
                label = forget_some(label, facts["labels"]) if config.classes else None
                with torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16"):
                    loss = run.page.loss(run.process, served, x, label) / config.accum
                loss.backward()
                losses.append(loss.detach())

            # the update, and the average that follows it
            norms.append(torch.nn.utils.clip_grad_norm_(run.net.parameters(), config.clip))
            run.optimizer.step()
            follow(run.average, run.net, min(config.ema, step / (9 + step)))

            # where the run stands
            before = share
            share = pace.share(step)
            halted = int(over_all(torch.tensor(stopping.number), distributed.ReduceOp.MAX))
            saves = halted or is_save_between(before, share, config)

            # log
            if saves or step % config.log_every == 0 or step == start + 3:
                speed, left = pace.look(step)
                log.say(report(losses, norms, config, step, speed, left, out))
                losses.clear()
                norms.clear()
            if step == start + 3:
                log.say(outlook(config, speed, left))

            # checkpoint and picture
            if saves and RANK == 0:
                finish(log, run, dataset, out, step, pace.minutes(), share == 1, halted)

    # how the run ended; the first process saves last
    if WORLD > 1:
        distributed.barrier()
    if halted and share < 1:
        log.say(f"stopped at step {step}, which is saved: --resume --out '{out}' goes on")
        sys.exit(128 + halted)
    if step == start:
        log.say("nothing is left to do: --resume with a larger --steps, or --minutes, goes on")
    log.say(f"done: {out}; next: python sample.py --ckpt '{out}'")


def prepare(config, facts, ckpt, device):
    """The Run of a config, new or as a checkpoint has it."""
    # the net, and the average of its weights
    torch.manual_seed(config.seed)
    page, process, net = build(config, facts)
    net = net.to(device)
    if device.type == "cuda" and len(facts["shape"]) == 3:
        net = net.to(memory_format=torch.channels_last)  # in which convolutions are faster
    average = copy.deepcopy(net).requires_grad_(False).eval()

    # the optimizer; one fused call updates all weights
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(net.parameters(), config.lr, weight_decay=0.01, fused=fused)

    # a run that goes on
    if ckpt:
        net.load_state_dict(ckpt["net"])
        average.load_state_dict(ckpt["ema"])
        optimizer.load_state_dict(ckpt["optimizer"])
    return Run(config, facts, device, page, process, net, average, optimizer)


def finish(log, run, dataset, out, step, minutes, is_last, halted):
    """Saves the run, with its held-out loss and the learned grid, and draws a picture; if it has to
    stop it is only saved."""
    if halted and not is_last:
        return save(out, run, step, None, None, minutes)
    held_out = held_out_loss(run, dataset)
    log.say(f"step {step} held-out {held_out:.5f}")
    bend = None
    if is_last or step * run.config.batch > 10_000:  # else the grid costs more than it is worth
        bend = learned_bend(log, run)
    save(out, run, step, held_out, bend, minutes)
    draw_picture(run, out / f"step-{step:07d}.png")


def announce(log, run, dataset, start):
    """The first lines of a run: what is trained on what, and what to expect of it."""
    # the process, the data, the net
    config = run.config
    log.say(str(run.process))
    log.say(f"{config.data}: {data.describe(dataset)}, {len(dataset.test)} more held out")
    size = sum(p.numel() for p in run.net.parameters()) / 1e6
    until = f"for {config.minutes:g} minutes" if config.minutes else f"to {config.steps}"
    log.say(f"{type(run.net).__name__} of {size:.2f}M parameters, from update {start} {until}")

    # the classes, learned or not
    names = run.facts["names"]
    if config.classes:
        log.say("classes: " + shorten(names, 300))
    elif names:
        log.say(f"--classes would learn the {len(names)} classes: samples by class are better")

    # what pictures of that size needed in our runs
    if run.device.type == "cpu" and max(run.facts["shape"][1:], default=0) > 12:
        log.say("half an hour on one core was good for 16 pixels and classes, 32 were blobs")


def forget_some(label, none):
    """Labels (B,), one in ten replaced by `none`, the number of no class: guidance needs it."""
    forgotten = data.send(torch.rand(len(label)) < 0.1, label.device)
    return torch.where(forgotten, none, label)


@torch.no_grad()
def follow(average, net, decay):
    """average <- decay average + (1 - decay) net. The decay of a young run is small: its first,
    random weights are forgotten soon."""
    for a, p in zip(average.parameters(), net.parameters(), strict=True):
        a.lerp_(p, 1 - decay)
    for a, b in zip(average.buffers(), net.buffers(), strict=True):
        a.copy_(b)  # of BatchNorm, say


def report(losses, norms, config, step, speed, left, out):
    """The log line of an update, means since the line before. UserError for a loss that is not
    finite: what is saved stays as it is."""
    loss = float(over_all(torch.stack(losses).sum())) / len(norms) / WORLD
    norm = float(over_all(torch.stack(norms).mean())) / WORLD
    if not math.isfinite(loss + norm):
        kept = "nothing was saved yet"
        if (out / "ckpt.pt").exists():
            kept = f"{out}/ckpt.pt has the last good weights"
        raise UserError(f"loss {loss:g} at step {step}: lower --lr or --clip; {kept}")
    line = f"step {step} loss {loss:.5f} grad {norm:.3f} it/s {speed:.2f}"
    return f"{line} images/s {speed * config.batch:.0f} minutes left {left:.1f}"


def outlook(config, speed, left):
    """A line that says what an update costs, when pictures come, and when the run ends."""
    minutes = config.minutes or config.steps / speed / 60
    every = minutes * share_between_saves(config)
    ends = time.strftime("%H:%M", time.localtime(time.time() + 60 * left))
    line = f"an update takes {1 / speed:.3f} s: pictures after a twentieth and every {every:.1f}"
    line += f" minutes; the run ends in {left:.1f} minutes, at {ends}"
    if left > 24 * 60:
        line += f": {left / 1440:.1f} days; lower --steps, --width or --size, or give --minutes"
    return line


def parts_of(facts):
    """How many samples a network is asked about at once, outside of training."""
    return 10_000 if facts["kind"] == "points" else 16


@torch.no_grad()
def held_out_loss(run, dataset):
    """The average's loss on up to 512 held-out samples, with the same noise each time; nan without
    any."""
    n = min(512, len(dataset.test))
    if n == 0:
        return math.nan
    torch.manual_seed(0)
    total = 0.0
    for rows in torch.linspace(0, len(dataset.test) - 1, n).long().split(parts_of(run.facts)):
        x, label = dataset.held_out(rows)
        label = label.to(run.device) if run.config.classes else None
        loss = run.page.loss(run.process, run.average, x.to(run.device), label)
        total += len(rows) * float(loss)
    return total / n


def learned_bend(log, run):
    """What the learned grid of `ode` is made of (extras/clock.py), by 40 calls for 16 samples."""
    began = time.perf_counter()
    m = run.process.prior((16, *run.facts["shape"]), torch.Generator().manual_seed(0))
    m = m.to(run.device)
    lam, size = clock.bend(run.page, run.process, run.predict, m, run.facts["mean"])
    log.say(f"learned the grid of ode in {time.perf_counter() - began:.1f} s")
    return dict(lam=lam.tolist(), size=size.tolist())


def draw_picture(run, path):
    """64 images, or 8 and more of each of 32 classes, or 10,000 points; from the same noise each
    time."""
    # how many, and rows of the classes that the data have
    facts = run.facts
    n = 10_000 if facts["kind"] == "points" else 64
    labels = None
    mean = facts["mean"]
    if run.config.classes:
        known = torch.tensor(facts["counts"]).nonzero()[:32, 0]
        labels = known.repeat(max(8, math.ceil(n / len(known))))
        n = len(labels)
        mean = None  # each class has another: the net is asked for it

    # in parts that fit the memory
    states = run.process.prior((n, *facts["shape"]), torch.Generator().manual_seed(0))
    drawn = []
    for rows in torch.arange(n).split(parts_of(facts)):
        label = None if labels is None else labels[rows].to(run.device)
        predict = partial(run.predict, label=label)
        x = run.page.ode(run.process, predict, states[rows].to(run.device), 20, mean)
        drawn.append(x.cpu())
    samples = data.finish(torch.cat(drawn), facts)
    write_png(path, data.picture(samples, facts, labels))


def main(argv=None):
    command.run(lambda: train(*configure(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    main()
    if WORLD > 1:
        distributed.destroy_process_group()
