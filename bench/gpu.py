"""Ten minutes on a CUDA machine: is everything right there, and how fast is it?

    python bench/gpu.py
    python bench/gpu.py --device cpu        toy sizes: tests this script, measures nothing

It prints the largest difference between the CPU's samples and the GPU's, that between a resumed and
an uninterrupted run, and tables of the speed and memory of training, with and without TF32, bf16,
channels_last and compiling. The exit status is not 0 where samples or resumed runs differ. Not run
so far. `python train.py --data cifar10 --minutes 10` trains for as long.
"""

import contextlib
import copy
import io
import math
import os
import signal
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import compare
import numpy as np
import torch
from speed import ENDLESS, Watch, build, now, samplers, watched

import train
from formats import command
from formats.files import UserError

MODELS = ("agm", "hold1", "hold2", "hold3", "hold6")
TOLERANCE = 1e-3  # of samples in [-1, 1]; a grey level is 8e-3
MODES = {  # options of train.py; whether TF32 may be used; the memory format of images
    "fp32": ([], False, torch.channels_last),
    "TF32": ([], True, torch.channels_last),
    "bf16": (["--amp", "bf16"], True, torch.channels_last),
    "bf16, not channels_last": (["--amp", "bf16"], True, torch.contiguous_format),
    "bf16, compiled": (["--amp", "bf16", "--compile"], True, torch.channels_last),
}
COLUMNS = ("images/s", "peak, GiB")


def precision(tf32):
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def show(first, columns, rows):
    """Markdown of {name: numbers}."""
    print(f"\n| {first} |" + "".join(f" {column} |" for column in columns))
    print("|---" * (1 + len(columns)) + "|")
    for name, numbers in rows.items():
        print(f"| {name} |" + "".join(f" {number:.3g} |" for number in numbers), flush=True)


@torch.no_grad()
def agreement(device, options, nfe):
    """{model, target and sampler: largest difference between the CPU's and the device's samples},
    with random weights in float32, from the same noise."""
    precision(tf32=False)
    found = {}
    for model in MODELS:
        for target in ("data", "ode") if model == "agm" else ("data", "noise"):
            torch.manual_seed(0)
            _, page, process, net, shape = build(model, "digits", "--target", target, *options)
            for p in net.parameters():
                p += 0.05 * torch.randn_like(p)
            both = {"cpu": net.eval(), device: copy.deepcopy(net).to(device)}
            for name, sampler in samplers(model).items():
                drawn = []
                more = {}
                if name not in ("ode", "exponential"):  # noise from the same generator
                    more["randn"] = lambda v: torch.randn(v.shape).to(v)
                for there, served in both.items():
                    torch.manual_seed(0)
                    m = process.prior((8, *shape)).to(there)
                    predict = partial(page.denoise, process, served)
                    drawn.append(sampler(process, predict, m, nfe, **more).cpu())
                found[f"{model} {target} {name}"] = [float((drawn[0] - drawn[-1]).abs().max())]
    return found


def resumed(device, options):
    """The largest difference between the weights of a run and of one that was stopped and resumed,
    with deterministic algorithms; infinite if one of them failed, as where there are none."""
    options = [*options, "--device", device, *"--steps 40 --save-every 20 --dropout .1".split()]
    batches = 0

    def interrupt():
        nonlocal batches
        batches += 1
        if batches == 25:
            os.kill(os.getpid(), signal.SIGINT)

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or cuBLAS may add in another order
    torch.use_deterministic_algorithms(True)
    quiet = contextlib.redirect_stdout(io.StringIO())
    no_pictures = mock.patch.object(train, "draw_picture")
    try:
        with tempfile.TemporaryDirectory() as folder, quiet, no_pictures:
            train.main([*options, "--out", f"{folder}/whole"])
            with watched(interrupt), contextlib.suppress(SystemExit):
                train.main([*options, "--out", f"{folder}/cut"])
            train.main(["--resume", "--out", f"{folder}/cut"])
            whole = train.load_checkpoint(f"{folder}/whole")["net"]
            cut = train.load_checkpoint(f"{folder}/cut")["net"]
        return max(float((whole[key] - cut[key]).abs().max()) for key in whole)
    except SystemExit as error:
        print(error.code)
        return math.inf
    finally:
        torch.use_deterministic_algorithms(False)


def training(name, device, mode, options, most, limit):
    """COLUMNS of a training with train.py's preset; `most` steps are timed, or as many as begin
    within `limit` seconds."""
    more, tf32, memory_format = MODES[mode]
    warm = 4
    cuda = torch.device(device).type == "cuda"
    done = 0
    began = 0.0

    def at_batch():
        nonlocal done, began
        if done == 0:
            precision(tf32)  # after train.py's own choice
        if done == warm:
            began = now()
        if done > warm and (done == warm + most or now() - began > limit):
            raise Watch
        done += 1

    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config, *_ = build("agm", name, "--device", device, *ENDLESS, *options, *more)
    with tempfile.TemporaryDirectory() as folder:
        config = train.replace(config, out=f"{folder}/run")
        layout = mock.patch.object(torch, "channels_last", memory_format)
        with layout, watched(at_batch):
            train.train(config)
    timed = done - warm
    speed = config.batch * timed / (now() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else math.nan
    return [speed, peak]


def measure(argv):
    p = compare.parser(__doc__)
    p.add_argument("--device", default="cuda", help="a CUDA device; cpu: toy sizes")
    args = p.parse_args(argv)
    device = str(train.pick_device(args.device))
    toy = args.device == "cpu"
    card = "CPU, toy sizes" if toy else torch.cuda.get_device_name(device)
    print(f"{card}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    small = "--width 8 --blocks 1 --batch 16".split() if toy else []
    nfe, most, limit = (1, 2, 1.0) if toy else (10, 100, 12.0)
    modes = ["fp32"] if toy else MODES

    found = agreement(device, small, nfe)
    show("largest difference to the CPU's samples, float32", [""], found)
    exact = resumed(device, small)
    print(f"\nResumed against uninterrupted run, largest difference of a weight: {exact:.0e}")

    with tempfile.TemporaryDirectory() as folder:
        name = Path(folder, "random.npy")  # which costs what CIFAR-10 does
        np.save(name, torch.randint(256, (512, 32, 32, 3), dtype=torch.uint8).numpy())
        rows = {mode: training(name, device, mode, small, most, limit) for mode in modes}
        show("CIFAR-10 preset", COLUMNS, rows)

    wrong = [name for name, (difference,) in found.items() if not difference < TOLERANCE]
    if wrong or exact:
        raise UserError(f"not as on a CPU: {', '.join(wrong) or 'no samples'}; resume {exact:.0e}")


def main(argv=None):
    command.run(lambda: measure(argv))


if __name__ == "__main__":
    main()
