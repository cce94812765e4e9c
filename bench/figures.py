"""The figures of both papers, and two that neither has: a picture, and a line with its number.

    python bench/figures.py hold12

AGM's: agm1, agm2, agm3, agm5 (digits). HOLD's: hold12 (numbers, an exact denoiser), hold34 (spiral). Neither's: snr,
calls (images). bench/README.md says what is in them. Networks are denoisers, AGM's and HOLD's samplers with one and the
same.
"""

import argparse
import contextlib
import io
import math
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

sys.path.insert(0, str(Path(__file__).parent))
import peers
import points
from conditions import exact_net

import agm_ref
import data
import hold_ref
import sample
from train import draw, run

NAMES = ["AGM", "VP (order 1)", "CLD (order 2)", *(f"HOLD (order {n})" for n in range(3, 7))]  # by order, 0: AGM
SHARE = "share of the time from the prior to the data"
CENTRES, S = torch.tensor([[-1.2], [0.1], [1.1]]).double(), 0.12  # of hold12's three modes, equally likely


def subplots(rows, columns, height, **options):
    """A figure as wide as a README, and its axes (rows, columns)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise data.UserError("figures are drawn with matplotlib: pip install matplotlib") from None
    fig = Figure((8.8, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def strips(images, rows):
    """A figure of rows of images (N, H, W, C), named by strings that end in a number."""
    names, grid = [row.rsplit(" ", 1)[0] for row in rows], data.image_grid(images, len(images) // len(rows))
    fig, ((ax,),) = subplots(1, 1, 7.5 * len(grid) / grid.shape[1] + 0.4)
    ax.imshow(grid, cmap="gray", vmin=0, vmax=255)
    ax.set_yticks((np.arange(len(names)) + 0.5) * len(grid) / len(names), names, fontsize=9)
    ax.set_xticks([])
    return fig


def share(process, t):
    return t if process.t_data else 1 - t / process.T


def follow(method, process, net, m0, nfe, sampler):
    """Times (K,), states (K, B, n C, ...) and predictions (K, B, C, ...) at the calls of a sampler."""
    calls = []

    def condition(process, net, m, t, label):
        calls.append((torch.tensor(t).double(), m, method.denoise(process, net, m, t, label)))
        return calls[-1][2], m

    method.SAMPLERS[sampler](process, net, m0, nfe, condition=condition)
    return [torch.stack(v) for v in zip(*calls, strict=True)]


@torch.no_grad()
def flow(process, net, m, steps):
    """As `follow`, on HOLD's probability flow: a rotation by F without its friction, and half of the SDE's kick. `ode`
    has the same marginals, but the same paths only at order 1."""
    calls, turn, ts = [], process.drift().mT, hold_ref.times(process, steps, 2.0, None)
    turn[-1, -1] = 0
    for t, t_next in pairwise((*ts, ts[-1])):
        calls.append((torch.tensor(t), m, hold_ref.denoise(process, net, m, t)))
        kicked = hold_ref.mix(hold_ref.kick(process, t, (t - t_next) / 2), torch.cat(calls[-1][1:], 1))
        m = hold_ref.mix(torch.linalg.matrix_exp((t - t_next) * turn), kicked)
    return [torch.stack(v) for v in zip(*calls, strict=True)]


def agm1(args):
    (fig, axes), numbers = subplots(2, 2, 4.4, sharex=True, sharey="row"), []
    agm = {"method": "agm"}, partial(follow, agm_ref, sampler="exponential")
    for i, (options, walk) in enumerate((agm, ({"method": "hold", "order": 2}, flow))):
        config, _, process, net = sample.restore(args.ckpt, "cpu", **options)
        m0 = process.prior((args.n or 16, *config["shape"]), torch.Generator().manual_seed(0))
        t, m, _ = walk(process, net, m0, args.steps)
        x, v = m.flatten(2).chunk(2, 2)  # (K, B, pixels)
        numbers.append(f"{NAMES[2 * i]} {float(x.diff(dim=0).abs().sum() / (x[-1] - x[0]).abs().sum()):.3f}")
        for ax, block, name in zip(axes[:, i], (x, v), ("position", "velocity"), strict=True):
            ax.plot(share(process, t), block[:, 0, :: x.shape[2] // 16], lw=0.9)
            ax.set(title=f"{NAMES[2 * i]}, {name}", xlabel=SHARE if block is v else None)
    return fig, f"length of the paths over the distance of their ends: {', '.join(numbers)}"


@torch.no_grad()
def agm2(args):
    config, _, process, net = sample.restore(args.ckpt, "cpu", method="agm")
    seen, images, numbers, predict = [], [], [], agm_ref.precondition
    ours = "AGM", process.prior, partial(agm_ref.ode, data_mean=sample.data_mean(config))
    for nfe, (name, prior, sampler) in product((5, 10, 20), (ours, ("EDM", peers.FM().prior, peers.edm_heun))):
        seen.clear()
        m0 = prior((args.n or 64, *config["shape"]), torch.Generator().manual_seed(0))
        with patch.object(agm_ref, "precondition", lambda *a: seen.append(predict(*a)) or seen[-1]):
            x = sampler(process, net, m0, nfe)
        off = (seen[(len(seen) - 1) // 2].clamp(-1, 1) - x.clamp(-1, 1)).square().mean().sqrt()
        numbers.append(f"{name}, {len(seen)} calls {off:.3f}")
        images += [seen[math.ceil(len(seen) * i / 10) - 1][:1] for i in range(1, 11)]
    fig = strips(data.Dataset.to_pixels(torch.cat(images)), numbers)
    fig.axes[0].set(xlabel="the prediction in hand after 10 %, 20 %, ... 100 % of the calls")
    return fig, f"from the middle call's prediction to the sample: {'; '.join(numbers)}"


def spread(p, k):
    """Standard deviation of x(1) = x_0 + v_0 + p int (1 - t)^2 dW, where a = 0."""
    return np.sqrt(2 + 2 * k + p**2 / 5)


def agm3(args):
    (fig, ((ax,),)), n, ks, off = subplots(1, 1, 3), args.n or 20_000, np.linspace(-0.95, 0.95, 20), 0
    for p, color in ((1.0, "C0"), (3.0, "C1"), (5.0, "C2")):
        for k in ks:
            process = agm_ref.AGM(p=p, k=k)
            m = process.prior((n, 1)).double()
            for t in range(10):
                m = agm_ref.free_motion(process, m, t / 10, 0.1, torch.randn_like)
            ax.plot(k, found := float(m[:, 0].std()), ".", color=color)
            off = max(off, abs(found / spread(p, k) - 1) * math.sqrt(2 * n))
        ax.plot(ks, spread(p, ks), color=color, label=f"p = {p:g}")
    ax.set(title="nothing steers, a = 0: standard deviation of x(1), by formula and simulated (dots)", xlabel="k")
    ax.legend()
    return fig, f"at most {off:.2f} standard errors of {n} particles off"


def agm5(args):
    coarse = avg_pool2d(data.load("digits").test[[18, 16, 26]].float(), 2)  # a 7, a 2 and a 4
    strokes = 170 * (coarse > 120).byte().repeat_interleave(2, -1).repeat_interleave(2, -2).permute(0, 2, 3, 1).numpy()
    rules = {"no stroke": [], "init": ["--inject", "init"], "dyn 25 %": [], "dyn 50 %": ["--share", "0.5"]}
    process, images, numbers = {0: ["--method", "agm"], 3: ["--method", "hold", "--order", "3"]}, [], []
    for order, rule in product(process, rules):
        rms = []
        for stroke in strokes:
            with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
                np.save(f"{out}/stroke.npy", stroke)
                given = ["--stroke", f"{out}/stroke.npy", *rules[rule]] if rule != "no stroke" else []
                sample.main(["--ckpt", args.ckpt, "--n", str(args.n or 50), "--out", out, *process[order], *given])
                x = np.load(f"{out}/samples.npz")["arr_0"]
            rms.append(np.sqrt(np.square(x / 127.5 - stroke / 127.5).mean()))
            images += [stroke[None], x[:5]]
        numbers.append(f"{NAMES[order]}, {rule} {np.mean(rms):.3f}")
    return strips(np.concatenate(images), numbers), f"to the stroke: {'; '.join(numbers)}"


def hold12(args):
    (fig, axes), n, generator = subplots(2, 3, 5, sharey=True), args.n or 10_000, torch.Generator().manual_seed(1)
    chosen = CENTRES[torch.randint(3, (2 * n,), generator=generator), 0]
    fresh, ends = (chosen + S * torch.randn(2 * n, generator=generator)).view(2, n).sort().values
    numbers, panels = [f"fresh data {float((fresh - ends).abs().mean()):.4f}"], iter(axes.flat)
    for order in (1, 2, 3):
        process = hold_ref.HOLD(order=order, sigma_data=1.0)
        net, m0 = exact_net(CENTRES, 1.0, S**2 * torch.eye(1).double()), process.prior((n, 1), generator)
        paths = flow(process, net, m0, args.steps), follow(hold_ref, process, net, m0, args.steps, "lie")
        w1 = [float((x[-1, :, 0].sort().values - ends).abs().mean()) for _, _, x in paths]
        numbers.append(f"{NAMES[order]} flow {w1[0]:.4f} SDE {w1[1]:.4f}")
        root, y = torch.linspace(process.t_min**0.5, process.T**0.5, 300), torch.linspace(-3, 3, 200)[:, None]
        for i, block in enumerate(("position", "velocity", "acceleration")[:order]):
            ax, mean = next(panels), process.mean(root**2)[:, i]
            v = process.cov(root**2)[:, i, i] + (mean * S) ** 2
            law = (-((y - mean * CENTRES[:, None]) ** 2) / (2 * v)).exp().sum(0)
            ax.contourf(*map(np.asarray, (root, y[:, 0], law / law.amax(0))), 12, cmap="bone", vmax=1.7)
            for (t, m, _), colors in zip(paths, (["w"] * 6, ["C1", "C2", "C3"]), strict=True):
                for k, color in enumerate(colors):
                    ax.plot(t.sqrt(), m[:, k, i], color=color, lw=0.9)
            ax.set(xlim=(float(root[-1]), float(root[0])), ylim=(-3, 3), title=f"{NAMES[order]}, {block}")
            ax.set_xticks([t**0.5 for t in (6, 4, 2, 1, 0.5, 0.1)], [6, 4, 2, 1, 0.5, 0.1])
    fig.supxlabel("t, root scale; white: flow, coloured: SDE, grey: the law; exact denoiser, no network", fontsize=10)
    return fig, f"W1 to the data: {'; '.join(numbers)}"


def hold34(args):
    (fig, axes), reference, numbers = subplots(3, 6, 5), data.spiral(10_000, torch.Generator().manual_seed(99)), []
    for ax, (order, sampler, nfe) in zip(axes.flat, product((1, 2, 3), ("lie", "ode"), (5, 10, 20)), strict=True):
        _, method, process, net = sample.restore(args.ckpt, "cpu", method="hold", order=order)
        x = draw(method.SAMPLERS[sampler], process, net, [2], args.n or 10_000, nfe, batch=10_000)
        sharp = points.measure(x, reference)[0]
        numbers.append(f"{NAMES[order]} {sampler} {nfe} {sharp:.4f}")
        ax.imshow(data.histogram(x.numpy(), 240, 2.1))
        ax.set(xticks=[], yticks=[], xlabel=f"sharpness {sharp:.4f}")
        ax.set_title(f"{sampler}, {nfe} calls", fontsize=10)
        axes[order - 1, 0].set(ylabel=NAMES[order])
    return fig, f"sharpness: {'; '.join(numbers)}"


def snr(args):
    (fig, ((left, right),)), names, nth = subplots(1, 2, 4.4, sharey=True, width_ratios=[1, 1.2]), [], []
    u = torch.sigmoid(torch.linspace(-12, 12, 1000).double())
    for order, name in enumerate(NAMES):
        process, method = (hold_ref.HOLD(order=order), hold_ref) if order else (agm_ref.AGM(), agm_ref)
        t = ((1 - u) * process.T).clamp(min=process.t_min) if order else u.clamp(process.t0, process.t1)
        left.plot(share(process, t), process.snr(t).log10(), color=f"C{order}", label=name)
        for sampler in method.SAMPLERS:
            t = follow(method, process, lambda y, *_: 0 * y[:, :64], process.prior((1, 64)), 10, sampler)[0]
            right.plot([len(names)] * 10, process.snr(t).log10(), "o", color=f"C{order}", ms=3)
            names.append(sampler)
            if sampler == "ode":
                nth.append(process.snr(t).log10())
                left.plot(share(process, t), nth[-1], "o", color=f"C{order}", ms=4)
    left.set(xlabel=SHARE, ylabel="log10 SNR", ylim=(-9.2, 6.5), title="circles: the 10 calls of ode")
    left.legend(fontsize=8)
    right.set(title="the 10 calls of every sampler, 64 dimensions")
    right.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    low, high = torch.stack(nth).aminmax(dim=0)
    return fig, f"the n-th calls of ode are at most {float((high - low).max()):.2f} apart in log10 SNR"


def calls(args):
    images, numbers = [], []
    for method, order in (("agm", 0), ("hold", 3)):
        config, module, process, net = sample.restore(args.ckpt, "cpu", method=method, order=order or None)
        options = dict(n=args.n or 16, batch=64, data_mean=sample.data_mean(config))
        *few, many = (draw(module.ode, process, net, config["shape"], nfe=nfe, **options) for nfe in (5, 10, 20, 100))
        for nfe, x in zip((5, 10, 20), few, strict=True):
            numbers.append(f"{NAMES[order]}, {nfe} calls {float((x - many).square().mean().sqrt()):.3f}")
            images.append(x[:16])
    return strips(data.Dataset.to_pixels(torch.cat(images)), numbers), f"rms to 100 calls: {'; '.join(numbers)}"


FIGURES = {f.__name__: f for f in (agm1, agm2, agm3, agm5, hold12, hold34, snr, calls)}
TOY = "--n 20 --steps 4".split()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("name", choices=FIGURES)
    p.add_argument("--ckpt", help="a denoiser; default: runs/agm-digits/ckpt.pt, of hold34 runs/agm-spiral/ckpt.pt")
    p.add_argument("--n", type=int, help="samples behind the number; default: the figure's own")
    p.add_argument("--steps", type=int, default=400, help="steps of a path that is drawn")
    p.add_argument("--out", default="runs/figures", help="folder of the picture")
    args, start = p.parse_args(argv), time.time()
    args.ckpt = args.ckpt or f"runs/agm-{'spiral' if args.name == 'hold34' else 'digits'}/ckpt.pt"
    torch.manual_seed(0)
    fig, number = FIGURES[args.name](args)
    from PIL import Image  # comes with matplotlib

    fig.savefig(picture := io.BytesIO(), dpi=100, bbox_inches="tight")
    small = Image.open(picture).convert("RGB").quantize(128)
    path = Path(args.out) / f"{args.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_files({path: partial(small.save, format="png", optimize=True)})
    print(f"{path}: {number}; {time.time() - start:.0f} seconds")


if __name__ == "__main__":
    run(main)
