"""Pictures of how the processes and the denoiser work (matplotlib: pip install matplotlib).

    python bench/figures.py phase --out assets/phase.png
    python bench/figures.py denoise --ckpt runs/agm-digits --out assets/denoise.png

phase    AGM's position and velocity at eight times, and paths of AGM and HOLD, of numbers in three
         clusters; no network: the denoiser of a mixture is exact
snr      signal to noise against time, AGM and HOLD of order 1 to 6, and ten calls of `ode`
denoise  at eight noise levels: what a denoiser of images, --ckpt, sees, and what it predicts

Each writes a PNG and prints a line with its number; some seconds to a minute.
"""

import time
from functools import partial
from pathlib import Path

import compare
import numpy as np
import plot
import torch

import agm_ref
import data
import hold_ref
from agm_ref import F64, mix
from formats import command
from formats.files import UserError

CENTRES = torch.tensor([-1.2, 0.1, 1.1], **F64)  # of three equally likely clusters
S = 0.12  # their standard deviation
COLOURS = np.array(["#0072B2", "#E69F00", "#009E73"])
MOMENTS = (0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1)
SIGMAS = (0.05, 0.12, 0.25, 0.5, 0.8, 1.3, 2.5, 6.0)


def exact(process, m, t):
    """E[x | m] (B, 1) of the clusters, from y / sigma = x / sigma + noise."""
    w, snr = agm_ref.to_z(process, t)
    off = mix(w, m) - snr.sqrt() * CENTRES  # (B, 3)
    var = 1 + snr * S**2
    share = torch.softmax(-(off**2) / (2 * var), 1)
    means = CENTRES + snr.sqrt() * S**2 * off / var
    return (share * means).sum(1, keepdim=True)


def follow(sampler, process, predict, m, nfe, **options):
    """Times (K,) and states (K, B, ...) at the calls of a sampler, and its samples."""
    ts = []
    states = []

    def recorded(m, t):
        ts.append(t)
        states.append(m.clone())
        return predict(m, t)

    x = sampler(process, recorded, m, nfe, **options)
    return torch.tensor(ts), torch.stack(states), x


def nearest(x):
    """The cluster (B,) that each sample (B, 1) is nearest to."""
    return (x - CENTRES).abs().argmin(1)


def told(statistic, cluster, bins=60):
    """The share of particles whose cluster is the most frequent one in their bin of the statistic
    (N,)."""
    rank = statistic.argsort().argsort() * bins // len(cluster)
    counts = (3 * rank + cluster).bincount(minlength=3 * bins).reshape(bins, 3)
    return float(counts.amax(1).sum() / len(cluster))


def phase(args):
    fig = plot.figure(11, 5.4)
    upper, lower = fig.subfigures(2, 1, height_ratios=[1.05, 1])
    process = agm_ref.AGM(sigma_data=1.0)
    start = process.prior((args.n or 3000, 1), torch.Generator().manual_seed(1)).double()
    predict = partial(exact, process)
    ts, states, x = follow(
        agm_ref.exponential, process, predict, start, args.steps, t_end=process.last
    )
    numbers = []
    axes = upper.subplots(1, len(MOMENTS), sharex=True, sharey=True)
    for ax, moment in zip(axes, MOMENTS, strict=True):
        i = int((ts - moment).abs().argmin())
        shares = plane(ax, process, float(ts[i]), states[i], nearest(x))
        numbers.append(f"t {moment} {shares[0]:.2f} {shares[1]:.2f}")
        ax.set(xlim=(-3, 3), ylim=(-6.5, 5), title=f"t = {moment}")
    axes[0].set_ylabel("v")
    upper.suptitle(
        f"AGM: position q and velocity v of {len(start):,} particles, coloured by the cluster "
        "where each ends. Arrows: where the state moves.\nPer cent: the share whose cluster is "
        "told from q alone, and from q and v"
    )

    # paths of 24 particles
    axes = lower.subplots(1, 4)
    ts, states, x = follow(agm_ref.splitting, process, predict, start[:24], args.steps)
    titles = "AGM, position", "AGM, velocity: noise enters here"
    paths(axes[:2], ts, states, nearest(x), titles)
    for ax in axes[:2]:
        ax.set_xlabel("t, from noise at 0 to data at 1")
    process = hold_ref.HOLD(order=3, sigma_data=1.0)
    m = process.prior((24, 1), torch.Generator().manual_seed(1)).double()
    ts, states, x = follow(hold_ref.lie, process, partial(exact, process), m, args.steps)
    titles = "HOLD 3, position", "HOLD 3, velocity: smooth, too"
    paths(axes[2:], ts.sqrt(), states, nearest(x), titles)
    for ax in axes[2:]:
        ax.set_xlabel("t, from noise at 6 to data at 0")
        ax.set_xticks([t**0.5 for t in (6, 4, 2, 1, 0.5, 0.1)], [6, 4, 2, 1, 0.5, 0.1])
        ax.set_xlim(6**0.5, 0)
    return fig, f"cluster told from q, and from q and v: {'; '.join(numbers)}"


def plane(ax, process, t, m, cluster):
    """Particles (B, 2) at a time, and arrows of the flow; the shares told from q, and from q, v."""
    ax.scatter(*m.T, s=1.5, c=COLOURS[cluster], lw=0, alpha=0.6)
    q = torch.linspace(-2.5, 2.5, 6, **F64)
    v = torch.linspace(-4.2, 4.2, 7, **F64)
    grid = torch.cartesian_prod(q, v)
    a = mix(
        agm_ref.acceleration(process, t, sde=False), torch.cat([grid, exact(process, grid, t)], 1)
    )
    arrow = torch.cat([grid[:, 1:] / 3, a / 5], 1)  # in units of the axes
    arrow = arrow / arrow.norm(dim=1, keepdim=True)
    shape = dict(pivot="mid", scale=7, width=0.012, headwidth=4.5, color="0.25", alpha=0.75)
    ax.quiver(*grid.T, *arrow.T, **shape)
    by_q = told(m[:, 0], cluster)
    by_both = told(mix(agm_ref.to_z(process, t)[0], m)[:, 0], cluster)
    ax.text(0, -5.9, f"q: {by_q:.0%}   q, v: {by_both:.0%}", ha="center", va="center")
    return by_q, by_both


def paths(axes, ts, states, cluster, titles):
    """The first blocks of states (K, B, n) against time."""
    for block, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        ax.set_title(title)
        for path, i in zip(states[..., block].T, cluster, strict=True):
            ax.plot(ts, path, color=COLOURS[i], lw=0.8)


def snr(args):
    fig = plot.figure(8.6, 4.6)
    ax = fig.subplots()
    nth = []
    for order in range(7):
        process = hold_ref.HOLD(order=order) if order else agm_ref.AGM()
        span = process.data_time - process.first

        # crowded at both ends
        share = torch.sigmoid(torch.linspace(-12, 12, 1000, **F64))
        t = (process.first + share * span).clamp(*sorted([process.first, process.last]))
        name = f"HOLD {order}" if order else "AGM"
        ax.plot((t - process.first) / span, process.snr(t).log10(), color=f"C{order}", label=name)
        m = process.prior((1, 64))
        options = {"nfe": 10, "data_mean": 0.0}
        t, *_ = follow(agm_ref.ode, process, lambda m, t: 0 * m[:, :64], m, **options)
        nth.append(process.snr(t).log10())
        ax.plot((t - process.first) / span, nth[-1], "o", color=f"C{order}", ms=4)
    ax.set(ylabel="log10 SNR", ylim=(-9.2, 6.5), title="circles: the 10 calls of ode")
    ax.set_xlabel("share of the time from the prior to the data")
    ax.legend()
    low, high = torch.stack(nth).aminmax(dim=0)
    return fig, f"the n-th calls of ode are at most {float((high - low).max()):.2f} apart"


def denoise(args):
    model = compare.load(args.ckpt)
    config = model.config
    if model.facts["kind"] != "image" or config.target != "data":
        raise UserError(f"{model.path} is no denoiser of images: name another by --ckpt")
    dataset = data.load(config.data, config.data_dir or None, config.flip, config.size)
    n = min(args.n or 512, len(dataset.test))
    x, label = dataset.held_out(torch.linspace(0, len(dataset.test) - 1, n).long())
    label = label if config.classes else None
    shown = [0, n // 3, 2 * n // 3]
    sd = model.process.sigma_data
    generator = torch.Generator().manual_seed(0)
    columns = []
    losses = []
    for sigma in SIGMAS:
        snr = torch.full((n,), sigma**-2)
        z = x / sigma + torch.randn(x.shape, generator=generator)
        D = agm_ref.denoise_y(model.process, model.net, z, snr, label)
        D = D.clamp(-model.process.bound, model.process.bound)
        losses.append(float((D - x).square().mean() * (1 / sd**2 + 1 / sigma**2)))
        seen = sd * z / (1 + sd**2 * snr[0]).sqrt()  # of the data's contrast, as the net sees it
        columns.append(torch.stack([seen[shown], D[shown]], 1).flatten(0, 1))
    rows = torch.stack(columns, 1).clamp(-1, 1)  # (6, 8, C, H, W)
    images = data.finish(rows.flatten(0, 1), model.facts)
    fig = plot.figure(8.6, 6.9)
    for i, ax in enumerate(fig.subplots(6, len(SIGMAS)).flat):
        ax.imshow(images[i].squeeze(), cmap="gray", vmin=0, vmax=255)
        ax.set_xticks([])
        ax.set_yticks([])
        if i < len(SIGMAS):
            ax.set_title(f"sigma {SIGMAS[i]:g}\nloss {losses[i]:.2f}")
        if i % len(SIGMAS) == 0:
            ax.set_ylabel("predicted" if i // len(SIGMAS) % 2 else "seen")
    pairs = zip(SIGMAS, losses, strict=True)
    return fig, "held-out loss " + "; ".join(f"{sigma:g}: {loss:.4f}" for sigma, loss in pairs)


FIGURES = {f.__name__: f for f in (phase, snr, denoise)}


@torch.no_grad()
def paint(argv):
    p = compare.parser(__doc__)
    p.add_argument("name", choices=FIGURES)
    p.add_argument("--ckpt", type=Path, help="of denoise: a run on images; default: the newest")
    p.add_argument("--n", type=int, help="samples behind the number; default: the figure's own")
    p.add_argument("--steps", type=int, default=400, help="calls of a path")
    p.add_argument("--out", type=Path, help="the PNG; default: runs/figures/NAME.png")
    args = p.parse_args(argv)
    began = time.perf_counter()
    torch.manual_seed(0)
    fig, number = FIGURES[args.name](args)
    path = args.out or Path(f"runs/figures/{args.name}.png")
    plot.write(fig, path)
    print(f"{path}: {number}; {time.perf_counter() - began:.0f} seconds")


def main(argv=None):
    command.run(lambda: paint(argv))


if __name__ == "__main__":
    main()
