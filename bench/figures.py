"""Pictures of the processes, each with a line that has its number (matplotlib: pip install matplotlib).

    python bench/figures.py phase --out assets/phase.png

phase: AGM's position and velocity in eight moments, and paths of AGM and HOLD, of numbers in three clusters.
hold12: position, velocity, acceleration of the same under HOLD of order 1 to 3 (HOLD paper, figures 1 and 2).
snr: signal to noise against time for AGM and HOLD of order 1 to 6, and the calls of every sampler.
calls: the same noise at 5, 10 and 20 calls by AGM and HOLD of order 3, with a denoiser of images, --ckpt.
The first three need no network: the denoiser of a mixture is exact.
"""

import argparse
import io
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import peers

import agm_ref
import data
import hold_ref
import train
from agm_ref import mix

NAMES = ["AGM", "VP (order 1)", "CLD (order 2)", *(f"HOLD (order {n})" for n in range(3, 7))]  # by order, 0: AGM
CENTRES, S = torch.tensor([-1.2, 0.1, 1.1], dtype=torch.float64), 0.12  # of three equally likely clusters
COLOURS = np.array(["#0072B2", "#E69F00", "#009E73"])


def figure(height):
    """As wide as a README."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise data.UserError("figures are drawn with matplotlib: pip install matplotlib") from None
    rcParams["font.size"] = 8
    return Figure((11, height), dpi=100, layout="constrained")


def exact(process, m, t):
    """E[x | m] (B, 1) of the clusters, from y / sigma = x / sigma + noise."""
    w, snr = agm_ref.to_z(process, t)
    off, var = mix(w, m) - snr.sqrt() * CENTRES, 1 + snr * S**2  # (B, 3), ()
    share = torch.softmax(-(off**2) / (2 * var), 1)
    return (share * (CENTRES + snr.sqrt() * S**2 * off / var)).sum(1, keepdim=True)


def follow(sampler, process, m, nfe, predict=None, **options):
    """Times (K,) and states (K, B, ...) at the calls of a sampler, and the cluster that each sample is nearest to."""
    ts, states = [], []

    def recorded(m, t):
        ts.append(t)
        states.append(m.clone())
        return (predict or partial(exact, process))(m, t)

    x = sampler(process, recorded, m, nfe, **options)
    return torch.tensor(ts), torch.stack(states), (x[:, :1] - CENTRES).abs().argmin(1)


def told(statistic, cluster, bins=60):
    """The share of particles whose cluster is the most frequent one in their bin of the statistic (N,)."""
    rank = statistic.argsort().argsort() * bins // len(cluster)
    counts = torch.zeros(bins, 3).index_put_((rank, cluster), torch.tensor(1.0), accumulate=True)
    return float(counts.amax(1).sum() / len(cluster))


def phase(args):
    fig, process, numbers = figure(5.4), agm_ref.AGM(sigma_data=1.0), []
    upper, lower = fig.subfigures(2, 1, height_ratios=[1.05, 1])
    start = process.prior((args.n or 3000, 1), torch.Generator().manual_seed(1)).double()
    ts, states, cluster = follow(agm_ref.exponential, process, start, args.steps, t_end=process.last)
    axes = upper.subplots(1, 8, sharex=True, sharey=True)
    grid = torch.cartesian_prod(torch.linspace(-2.5, 2.5, 6), torch.linspace(-4.2, 4.2, 7)).double()
    for ax, moment in zip(axes, (0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1), strict=True):
        i = int((ts - moment).abs().argmin())
        t, (x, v) = float(ts[i]), states[i].T
        ax.scatter(x, v, s=1.5, c=COLOURS[cluster], lw=0, alpha=0.6)
        a = mix(agm_ref.acceleration(process, t, sde=False), torch.cat([grid, exact(process, grid, t)], 1))
        arrow = torch.cat([grid[:, 1:] / 3, a / 5], 1)  # in units of the axes
        arrow = arrow / arrow.norm(dim=1, keepdim=True)
        ax.quiver(*grid.T, *arrow.T, pivot="mid", scale=7, width=0.012, headwidth=4.5, color="0.25", alpha=0.75)
        by_x, by_both = told(x, cluster), told(mix(agm_ref.to_z(process, t)[0], states[i])[:, 0], cluster)
        numbers.append(f"t {moment} {by_x:.2f} {by_both:.2f}")
        ax.text(0, -5.9, f"q: {by_x:.0%}   q, v: {by_both:.0%}", ha="center", va="center")
        ax.set(xlim=(-3, 3), ylim=(-6.5, 5), title=f"t = {moment}")
    axes[0].set_ylabel("v")
    what = f"AGM: position q and velocity v of {len(start):,} particles, coloured by the cluster where each ends. "
    what += "Arrows: where the state moves.\nPer cent: the share whose cluster is told from q alone, and from q and v"
    upper.suptitle(what)

    panels = iter(lower.subplots(1, 4))
    hold = hold_ref.HOLD(order=3, sigma_data=1.0)
    from_prior = hold.prior((24, 1), torch.Generator().manual_seed(1)).double()
    for module, p, m, titles in (
        (agm_ref, process, start[:24], ("AGM, position", "AGM, velocity: noise enters here")),
        (hold_ref, hold, from_prior, ("HOLD 3, position", "HOLD 3, velocity: smooth, too")),
    ):
        ts, states, cluster = follow(module.splitting if p is process else module.lie, p, m, args.steps)
        for block, title in enumerate(titles):
            ax = next(panels)
            for path, c in zip(states[..., block].T, cluster, strict=True):
                ax.plot(ts if p is process else ts.sqrt(), path, color=COLOURS[c], lw=0.8)
            ax.set_xlabel("t, from noise at 0 to data at 1" if p is process else "t, from noise at 6 to data at 0")
            ax.set_title(title)
            if p is hold:
                root_scale(ax)
    return fig, f"cluster told from q, and from q and v: {'; '.join(numbers)}"


def root_scale(ax):
    """Ticks of a time axis that runs down, in root of t."""
    ax.set_xticks([t**0.5 for t in (6, 4, 2, 1, 0.5, 0.1)], [6, 4, 2, 1, 0.5, 0.1])
    ax.set_xlim(6**0.5, 0)


def hold12(args):
    fig, n, generator = figure(6), args.n or 10_000, torch.Generator().manual_seed(1)
    chosen = CENTRES[torch.randint(3, (2 * n,), generator=generator)]
    fresh, ends = (chosen + S * torch.randn(2 * n, generator=generator)).view(2, n).sort().values
    numbers = [f"fresh data {float((fresh - ends).abs().mean()):.4f}"]
    panels = iter(fig.subplots(2, 3, sharey=True).flat)
    for order in (1, 2, 3):
        process = hold_ref.HOLD(order=order, sigma_data=1.0)
        m, w1, paths = process.prior((n, 1), generator).double(), [], []
        for sampler in (hold_ref.ode, hold_ref.lie):
            paths.append(follow(sampler, process, m, args.steps)[:2])
            x = exact(process, paths[-1][1][-1], float(paths[-1][0][-1]))[:, 0]
            w1.append(float((x.sort().values - ends).abs().mean()))
        numbers.append(f"{NAMES[order]} ode {w1[0]:.4f} lie {w1[1]:.4f}")
        root, y = torch.linspace(0.01, process.first**0.5, 300), torch.linspace(-3, 3, 200)[:, None]
        for i, block in enumerate(("position", "velocity", "acceleration")[:order]):
            ax, mean = next(panels), process.mean(root**2)[:, i]
            v = process.cov(root**2)[:, i, i] + (mean * S) ** 2
            law = (-((y - mean * CENTRES[:, None, None]) ** 2) / (2 * v)).exp().sum(0)
            ax.contourf(*map(np.asarray, (root, y[:, 0], law / law.amax(0))), 12, cmap="bone", vmax=1.7)
            for (ts, states), colours in zip(paths, (["w"] * 6, ["C1", "C2", "C3"]), strict=True):
                for k, colour in enumerate(colours):
                    ax.plot(ts.sqrt(), states[:, k, i], color=colour, lw=0.9)
            ax.set(ylim=(-3, 3), title=f"{NAMES[order]}, {block}")
            root_scale(ax)
    fig.supxlabel("t, root scale; white: ode, coloured: lie; grey: the law")
    return fig, f"W1 to the data: {'; '.join(numbers)}"


def snr(args):
    fig, names, nth = figure(5), [], []
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=[1, 1.2])
    u = torch.sigmoid(torch.linspace(-12, 12, 1000).double())
    for order, name in enumerate(NAMES):
        process, module = (hold_ref.HOLD(order=order), hold_ref) if order else (agm_ref.AGM(), agm_ref)

        def share(t, end=process.first if order else None):
            return 1 - t / end if end else t

        t = process.first + u * ((0 if order else process.last) - process.first)
        left.plot(share(t), process.snr(t).log10(), color=f"C{order}", label=name)
        for sampler in module.SAMPLERS:
            run = partial(follow, module.SAMPLERS[sampler], process, process.prior((1, 64)), 10)
            t = run(predict=lambda m, t: 0 * m[:, :64], **{"data_mean": 0.0} if sampler == "ode" else {})[0]
            right.plot([len(names)] * 10, process.snr(t).log10(), "o", color=f"C{order}", ms=3)
            names.append(sampler)
            if sampler == "ode":
                nth.append(process.snr(t).log10())
                left.plot(share(t), nth[-1], "o", color=f"C{order}", ms=4)
    left.set(ylabel="log10 SNR", ylim=(-9.2, 6.5), title="circles: the 10 calls of ode")
    left.set_xlabel("share of the time from the prior to the data")
    left.legend()
    right.set(title="the 10 calls of every sampler, 64 dimensions")
    right.set_xticks(range(len(names)), names, rotation=90)
    low, high = torch.stack(nth).aminmax(dim=0)
    return fig, f"the n-th calls of ode are at most {float((high - low).max()):.2f} apart in log10 SNR"


def calls(args):
    images, numbers, n = [], [], args.n or 16
    for model, sampler in (("agm", agm_ref.ode), ("hold3", hold_ref.ode)):
        *few, many = (peers.draw(args.ckpt, model, sampler, n, nfe, 0, {}) for nfe in (5, 10, 20, args.steps))
        for nfe, x in zip((5, 10, 20), few, strict=True):
            numbers.append(f"{model.upper()}, {nfe} calls {float((x - many).square().mean().sqrt()):.3f}")
            images.append(x[:16])
    grid = data.picture(
        data.finish(torch.cat(images), peers.restore(args.ckpt, "agm")[2]), {"kind": "image"}, min(n, 16)
    )
    fig = figure(10.5 * len(grid) / grid.shape[1] + 0.4)
    ax = fig.subplots()
    ax.imshow(grid, cmap="gray", vmin=0, vmax=255)
    ax.set_yticks((np.arange(6) + 0.5) * len(grid) / 6, [name.rsplit(" ", 1)[0] for name in numbers])
    ax.set_xticks([])
    return fig, f"rms to {args.steps} calls: {'; '.join(numbers)}"


FIGURES = {f.__name__: f for f in (phase, hold12, snr, calls)}


def draw(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("name", choices=FIGURES)
    p.add_argument("--ckpt", type=Path, help="of calls: a denoiser of images")
    p.add_argument("--n", type=int, help="samples behind the number; default: the figure's own")
    p.add_argument("--steps", type=int, default=400, help="calls of a path that is drawn, and of the reference")
    p.add_argument("--out", type=Path, help="the PNG; default: runs/figures/NAME.png")
    args, start = p.parse_args(argv), time.time()
    torch.manual_seed(0)
    fig, number = FIGURES[args.name](args)
    from PIL import Image  # comes with matplotlib

    fig.savefig(picture := io.BytesIO())
    small, path = Image.open(picture).convert("RGB").quantize(128), args.out or Path(f"runs/figures/{args.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_files({path: partial(small.save, format="png", optimize=True)})
    print(f"{path}: {number}; {time.time() - start:.0f} seconds")


def main(argv=None):
    train.run(lambda: draw(argv))


if __name__ == "__main__":
    main()
