"""Ten minutes on a CUDA machine: is everything right there, and how fast is it? Prints Markdown for bench/README.md.

    python bench/gpu.py                          ends with a short training on CIFAR-10 if it is there, else on digits
    python bench/gpu.py --data cifar10 --data-dir FOLDER
    python bench/gpu.py --device cpu --toy       tests this script

The exit status is not 0 where the GPU's samples are not the CPU's or a resumed run is not the uninterrupted one.
diffusers' UNet2DModel and torchcfm's UNetModel are measured beside this project's UNet where they are installed.
"""

import argparse
import contextlib
import copy
import io
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from speed import build, now, sampling, table

import data
import nets
import train

MODELS = {"AGM": ("agm", 1), **{f"HOLD{n}": ("hold", n) for n in (1, 2, 3, 6)}}
TOLERANCE = 1e-3  # of samples in [-1, 1]; a grey level is 8e-3
MODES = {  # name -> options of train.py, and whether convolutions and matrix products may use TF32
    "fp32": ([], False),
    "TF32": ([], True),
    "bf16": (["--amp", "bf16"], True),
    "bf16, channels last": (["--amp", "bf16"], True),
    "bf16, compiled": (["--amp", "bf16", "--compile"], True),
}
TOY = "--device cpu --toy".split()


def precision(tf32):
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def quiet():
    return contextlib.redirect_stdout(io.StringIO())


def agreement(device, options, nfe):
    """{model: {sampler: largest difference between the CPU's and the device's samples}}, of either kind of network with
    random weights in float32, from the same noise."""
    precision(tf32=False)
    found = {}
    for model, (method, order) in MODELS.items():
        for param in ("denoiser", "paper"):
            torch.manual_seed(0)
            _, process, net, shape = build(method, order, "digits", "--param", param, *options)
            for p in net.parameters():
                p.data += 0.05 * torch.randn_like(p)
            both = {"cpu": net.eval(), device: copy.deepcopy(net).to(device)}
            for name, sampler in train.METHODS[method][0].SAMPLERS.items():
                a, b = (train.draw(sampler, process, both[d], shape, 8, nfe, device=d) for d in ("cpu", device))
                found.setdefault(model, {})[f"{name}, {param}"] = float((a - b).abs().max())
    return found


def resume(device, options, deterministic):
    """The largest difference between the weights of a run and of one that was stopped and resumed; infinite if one of
    them failed, as where an operation has no deterministic form."""
    options = [*f"--steps 40 --save-every 20 --log-every 20 --dropout 0.1 --device {device}".split(), *options]
    take, calls = data.Dataset.batch, 0

    def batch(dataset, n):
        nonlocal calls
        calls += 1
        if calls == 25:
            os.kill(os.getpid(), signal.SIGINT)
        return take(dataset, n)

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or cuBLAS may add in another order
    torch.use_deterministic_algorithms(deterministic)
    try:
        no_pictures = mock.patch.object(train, "draw_picture")
        with tempfile.TemporaryDirectory() as folder, quiet(), no_pictures:
            train.main([*options, "--out", f"{folder}/whole"])
            hook = mock.patch.object(data.Dataset, "batch", batch)
            with hook, contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
                train.main([*options, "--out", f"{folder}/cut"])
            train.main(["--resume", "--out", f"{folder}/cut"])
            a, b = (train.load_checkpoint(f"{folder}/{run}/ckpt.pt")["net"] for run in ("whole", "cut"))
        return max(float((a[k] - b[k]).abs().max()) for k in a)
    except SystemExit as e:
        print(e.code)
        return math.inf
    finally:
        torch.use_deterministic_algorithms(False)


def training(name, device, mode, options, most, limit):
    """Of a training with train.py's preset: images/s, those of forward, backward and AdamW alone, GiB at the peak, and
    transfers a step for which the CPU waits. `most` steps are timed, or as many as begin within `limit` seconds."""
    more, tf32 = MODES[mode]
    endless = "--steps 1000000 --log-every 1000000 --save-every 1000000 --device".split()
    config, _, net, (C, *size) = build("agm", 1, name, *endless, device, *options, *more)
    take, make, warm, done, start, watched = data.Dataset.batch, train.build, 4, 0, 0.0, 2
    cuda = torch.device(device).type == "cuda"

    def batch(dataset, n):
        nonlocal done, start
        if done == 0:
            precision(tf32)  # after train.py's own choice
        if cuda:
            torch.cuda.set_sync_debug_mode("warn" if done == watched else "default")
        if done == warm:
            start = now()
        if done > warm and (done == warm + most or time.perf_counter() - start > limit):
            raise StopIteration
        done += 1
        return take(dataset, n)

    def layout(config):
        method, process, net = make(config)
        return method, process, net.to(memory_format=torch.channels_last) if "last" in mode else net

    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(data.Dataset, "batch", batch))
        stack.enter_context(mock.patch.object(train, "build", layout))
        waits = stack.enter_context(warnings.catch_warnings(record=True, action="always"))
        stack.enter_context(quiet())
        stack.enter_context(contextlib.suppress(StopIteration))
        train.train({**config, "out": f"{folder}/run"})
    ours, steps = now() - start, done - warm
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    waits = sum("synchronizing" in str(w.message) for w in waits)

    net = layout(config)[2].to(device)
    bare = steps_of(net, torch.randn(config["batch"], C, *size, device=device), mode, steps)
    return config["batch"] * steps / ours, config["batch"] / bare, peak, waits


def steps_of(net, x, mode, steps, warm=3):
    """Seconds a step of forward, backward and AdamW."""
    options, tf32 = MODES[mode]
    precision(tf32)
    call = torch.compile(net) if "--compile" in options else net
    adam, t = torch.optim.AdamW(net.parameters(), fused=True), torch.full((len(x),), 0.5, device=x.device)
    for i in range(warm + steps):
        if i == warm:
            start = now()
        adam.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled="--amp" in options):
            y = call(x, t)
            loss = getattr(y, "sample", y).float().square().mean()
        loss.backward()
        adam.step()
    return (now() - start) / steps


def others(width):
    """The UNets of the peers that are installed and ours, all with the settings that DDPM used for CIFAR-10."""
    yield "ours", nets.UNet(3, 3, width=width, mult=(1, 2, 2, 2), blocks=2, attention=(1,), dropout=0.1)
    try:
        from diffusers import UNet2DModel

        kinds = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
        yield "diffusers UNet2DModel", UNet2DModel(
            sample_size=32, layers_per_block=2, block_out_channels=(width, 2 * width, 2 * width, 2 * width),
            down_block_types=kinds, up_block_types=[k.replace("Down", "Up") for k in reversed(kinds)],
            attention_head_dim=64, dropout=0.1,
        )  # fmt: skip
    except ImportError as e:
        print(f"diffusers left out ({data.why(e):.60}): pip install diffusers")
    try:
        from torchcfm.models.unet import UNetModel

        class Turned(UNetModel):  # its time comes first
            def forward(self, x, t):
                return super().forward(t, x)

        yield "torchcfm UNetModel", Turned(
            dim=(3, 32, 32), num_channels=width, num_res_blocks=2, channel_mult=[1, 2, 2, 2], num_head_channels=64,
            attention_resolutions="16", dropout=0.1,
        )  # fmt: skip
    except ImportError as e:
        print(f"torchcfm left out ({data.why(e):.60}): pip install torchcfm")


def unets(device, modes, width, batch, steps):
    """Rows: parameters in millions, then images/s of a training step in each mode."""
    x = torch.randn(batch, 3, 32, 32, device=device)
    for name, net in others(width):
        size = sum(p.numel() for p in net.parameters()) / 1e6
        yield name, [size, *(batch / steps_of(net.to(device), x, mode, steps) for mode in modes)]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--device", default="cuda", help="a CUDA device; cpu only with --toy")
    p.add_argument("--toy", action="store_true", help="tests the script, measures nothing")
    p.add_argument("--batch", type=int, default=128, help="of the CIFAR-10 preset; lower it where memory is short")
    p.add_argument("--data", help="of the training at the end; default: cifar10 if it is there, else digits")
    p.add_argument("--data-dir", help="its folder or archive")
    p.add_argument("--minutes", type=float, default=3.0, help="of that training; default: 3")
    p.add_argument("--out", default="runs/gpu", help="folder of that training; default: runs/gpu")
    args = p.parse_args(argv)
    if args.device == "cpu" and not args.toy:
        sys.exit("error: this measures a GPU: leave out --device cpu, or test the script with --device cpu --toy")
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no CUDA device here; the script itself can be tested with --device cpu --toy")
    toy, device, began = args.toy, str(train.pick_device(args.device)), now()
    card = f"CPU, {os.cpu_count()} cores" if device == "cpu" else torch.cuda.get_device_name(device)
    print(f"{card}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}{', toy sizes' if toy else ''}\n")

    small = "--width 8 --blocks 1 --batch 16".split() if toy else []
    preset = small or ["--batch", str(args.batch)]
    found = agreement(device, small, 2 if toy else 10)
    names = list(dict.fromkeys(name for samplers in found.values() for name in samplers))
    rows = ((m, [f"{s[n]:.0e}" if n in s else "" for n in names]) for m, s in found.items())
    table("largest difference to the CPU's samples, float32", names, rows)
    wrong = [f"{m} {n}" for m, samplers in found.items() for n, v in samplers.items() if not v < TOLERANCE]
    exact, usual = (resume(device, small, deterministic) for deterministic in (True, False))
    print("Resumed against uninterrupted run, largest difference of a weight (0: bit for bit):")
    print(f"{exact:.0e} with deterministic algorithms, {usual:.0e} without\n")

    most, limit = (2, 1.0) if toy else (100, 12.0)
    with tempfile.TemporaryDirectory() as folder:
        name = f"{folder}/random.npy"  # which costs what CIFAR-10 does
        np.save(name, torch.randint(256, (512, 32, 32, 3), dtype=torch.uint8).numpy())
        modes, fast = (["fp32"], "fp32") if toy else (list(MODES), "bf16")
        columns = "train.py, images/s", "bare step, images/s", "ratio", "peak, GiB", "waits a step"
        speeds = {}

        def row(name, mode, options):
            ours, bare, peak, waits = training(name, device, mode, options, most, limit)
            speeds[mode] = speeds.get(mode, ours)
            return [f"{ours:.0f}", f"{bare:.0f}", bare / ours, peak, str(waits)]

        table("CIFAR-10 preset", columns, ((mode, row(name, mode, preset)) for mode in modes))
        table(f"other presets, {fast}", columns, ((other, row(other, fast, small)) for other in ("spiral", "digits")))

        cases = {"64 digits": ("digits", 64), "256 points": ("spiral", 256)}
        cases = {"4 digits": ("digits", 4)} if toy else {**cases, "64 of 32x32": (name, 64)}
        nfe, repeats = (2, 1) if toy else (20, 5)
        for model, v in list(MODELS.items())[: 1 if toy else None]:
            found = train.METHODS[v[0]][0].SAMPLERS
            rows = ((k, [sampling(*v, f, *c, nfe, repeats, device) for c in cases.values()]) for k, f in found.items())
            table(f"sampling over network calls, {model}", cases, rows)

    modes, sizes = (["fp32"], (32, 2, 1)) if toy else (["fp32", "TF32", "bf16"], (128, args.batch, 20))
    table("UNet at 32x32", ["M parameters", *(f"{m}, images/s" for m in modes)], unets(device, modes, *sizes))

    name, options = args.data, ["--data-dir", args.data_dir] if args.data_dir else []
    if name is None:
        name = "cifar10"
        try:
            with mock.patch.object(data, "download", side_effect=data.UserError("not there")):
                data.load(name, args.data_dir)
        except data.UserError:
            name, options = "digits", []
    config, _ = train.configure(["--data", name, *options])
    fits = 2 if toy else max(1, int(60 * args.minutes * speeds["bf16"] / args.batch))  # at the CIFAR-10 preset's speed
    options += [*preset, "--steps", str(min(config["steps"], fits)), "--save-every", "1000000", *MODES[fast][0]]
    train.main(["--data", name, *options, "--device", device, "--out", args.out])
    print(f"\nThe picture of this training is the last in {args.out}. {(now() - began) / 60:.1f} minutes in all.")
    if wrong or exact:
        sys.exit(f"error: not as on a CPU: {', '.join(wrong) or 'no samples'}; resume differs by {exact:.0e}")


if __name__ == "__main__":
    train.run(main)
