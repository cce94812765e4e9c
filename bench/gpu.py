"""Some minutes on a CUDA machine: is everything right there, and how fast is it? Prints Markdown for bench/README.md.

    python bench/gpu.py
    python bench/gpu.py --device cpu        toy sizes: tests this script, measures nothing

The exit status is not 0 where the GPU's samples are not the CPU's or a resumed run is not the uninterrupted one.
`python train.py --data cifar10 --minutes 10` trains for as long.
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
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from speed import build, now, samplers, sampling, table

import data
import train

MODELS = ["agm", "hold1", "hold2", "hold3", "hold6"]
TOLERANCE = 1e-3  # of samples in [-1, 1]; a grey level is 8e-3
MODES = {  # name -> options of train.py, and whether convolutions and matrix products may use TF32
    "fp32": ([], False),
    "TF32": ([], True),
    "bf16": (["--amp", "bf16"], True),
    "bf16, compiled": (["--amp", "bf16", "--compile"], True),
}


def precision(tf32):
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def quiet():
    return contextlib.redirect_stdout(io.StringIO())


@torch.no_grad()
def agreement(device, options, nfe):
    """{model and target: {sampler: largest difference between the CPU's and the device's samples}}, with random weights
    in float32, from the same noise."""
    precision(tf32=False)
    found = {}
    for model in MODELS:
        for target in ("data", "ode") if model == "agm" else ("data", "noise"):
            torch.manual_seed(0)
            _, module, process, net, shape = build(model, "digits", "--target", target, *options)
            for p in net.parameters():
                p += 0.05 * torch.randn_like(p)
            both = {"cpu": net.eval(), device: copy.deepcopy(net).to(device)}
            for name, sampler in samplers(model).items():
                x = []
                for d in ("cpu", device):
                    torch.manual_seed(0)
                    more = {} if name in ("ode", "exponential") else {"randn": lambda v: torch.randn(v.shape).to(v)}
                    m = process.prior((8, *shape)).to(d)
                    x.append(sampler(process, partial(module.denoise, process, both[d]), m, nfe, **more).cpu())
                found.setdefault(f"{model} {target}", {})[name] = float((x[0] - x[1]).abs().max())
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
            with mock.patch.object(data.Dataset, "batch", batch), contextlib.suppress(SystemExit):
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
    """Of a training with train.py's preset: images/s, those of forward, backward and AdamW alone, their ratio, GiB at
    the peak, and transfers a step for which the CPU waits. `most` steps are timed, or as many as begin within `limit`
    seconds."""
    more, tf32 = MODES[mode]
    take, warm, done, start, watched = data.Dataset.batch, 4, 0, 0.0, 2
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

    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        endless = "--steps 1000000 --log-every 1000000 --save-every 1000000".split()
        endless += ["--device", device, "--out", f"{folder}/run"]
        config, _, _, net, shape = build("agm", name, *endless, *options, *more)
        stack.enter_context(mock.patch.object(data.Dataset, "batch", batch))
        waits = stack.enter_context(warnings.catch_warnings(record=True, action="always"))
        stack.enter_context(quiet())
        stack.enter_context(contextlib.suppress(StopIteration))
        train.train(config)
    ours, steps = now() - start, done - warm
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else math.nan
    waits = sum("synchronizing" in str(w.message) for w in waits)
    bare = steps_of(net.to(device), torch.randn(config.batch, *shape, device=device), mode, steps)
    speed = config.batch * steps / ours
    return [f"{speed:.0f}", f"{config.batch / bare:.0f}", config.batch / bare / speed, peak, str(waits)]


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
            loss = call(x, t).float().square().mean()
        loss.backward()
        adam.step()
    return (now() - start) / steps


def measure(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--device", default="cuda", help="a CUDA device; cpu: toy sizes")
    p.add_argument("--batch", type=int, default=128, help="of the CIFAR-10 preset; lower it where memory is short")
    args = p.parse_args(argv)
    device, began, toy = str(train.pick_device(args.device)), now(), args.device == "cpu"
    card = f"CPU, {os.cpu_count()} cores, toy sizes" if toy else torch.cuda.get_device_name(device)
    print(f"{card}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}\n")

    small = "--width 8 --blocks 1 --batch 16".split() if toy else []
    found = agreement(device, small, 2 if toy else 10)
    names = list(dict.fromkeys(name for differences in found.values() for name in differences))
    rows = ((m, [f"{s[n]:.0e}" if n in s else "" for n in names]) for m, s in found.items())
    table("largest difference to the CPU's samples, float32", names, rows)
    wrong = [f"{m} {n}" for m, differences in found.items() for n, v in differences.items() if not v < TOLERANCE]
    exact, usual = (resume(device, small, deterministic) for deterministic in (True, False))
    print("Resumed against uninterrupted run, largest difference of a weight (0: bit for bit):")
    print(f"{exact:.0e} with deterministic algorithms, {usual:.0e} without\n")

    most, limit, modes, fast = (2, 1.0, ["fp32"], "fp32") if toy else (100, 12.0, list(MODES), "bf16")
    with tempfile.TemporaryDirectory() as folder:
        name = f"{folder}/random.npy"  # which costs what CIFAR-10 does
        np.save(name, torch.randint(256, (512, 32, 32, 3), dtype=torch.uint8).numpy())
        columns = "train.py, images/s", "bare step, images/s", "ratio", "peak, GiB", "waits a step"
        preset = small or ["--batch", str(args.batch)]
        table("CIFAR-10 preset", columns, ((m, training(name, device, m, preset, most, limit)) for m in modes))
        others = ((other, training(other, device, fast, small, most, limit)) for other in ("spiral", "digits"))
        table(f"other presets, {fast}", columns, others)

        cases = {"64 digits": ("digits", 64), "256 points": ("spiral", 256), "64 of 32x32": (name, 64)}
        cases, nfe, repeats = ({"4 digits": ("digits", 4)}, 2, 1) if toy else (cases, 20, 5)
        for model in MODELS[: 1 if toy else None]:
            times = partial(sampling, model, nfe=nfe, repeats=repeats, device=device)
            rows = ((k, [times(f, *case) for case in cases.values()]) for k, f in samplers(model).items())
            table(f"sampling over network calls, {model}", cases, rows)

    print(f"{(now() - began) / 60:.1f} minutes in all.")
    if wrong or exact:
        raise data.UserError(f"not as on a CPU: {', '.join(wrong) or 'no samples'}; resume differs by {exact:.0e}")


TOY = "--device cpu"


def main(argv=None):
    train.run(lambda: measure(argv))


if __name__ == "__main__":
    main()
