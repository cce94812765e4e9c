"""What points.py, images.py and digits.py share: the peers, under the same names as in agm_ref.py, and the comparison.

Flow matching trains its own network, with torchcfm's loss (`pip install torchcfm`): `register()` makes it a --method of
train.py. EDM's Heun, DPM-Solver++, UniPC, DEIS and iPNDM run on the very denoiser that AGM and HOLD run on, and DDIM on
the noise network of HOLD of order 1, which is the VP process.
"""

import inspect
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import agm_ref
import hold_ref
import train
from sample import data_mean, restore

# ---------------------------------------------------------------------------------------------------------------------
# Flow matching: x_t = (1 - t) noise + t x, the network learns x - noise


@dataclass(frozen=True)
class FM:
    n: ClassVar[int] = 1
    T: ClassVar[float] = 1.0
    t_data: ClassVar[float] = 1.0

    def prior(self, shape, generator=None):
        return torch.randn(shape, generator=generator)


def loss(process, net, x, label=None):
    """torchcfm's conditional flow matching with independent pairs and sigma 0."""
    try:
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    except ImportError:
        sys.exit("error: flow matching is trained with torchcfm: pip install torchcfm")
    t, x_t, velocity = ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(torch.randn_like(x), x)
    return (net(x_t, t, label) - velocity).square().mean()


def fm_velocity(net, x, t):
    return net(x, torch.full((len(x),), t))


def fm_times(steps, rho):
    """steps + 1 times from 0 to 1; rho > 1 makes the steps near the data shorter."""
    return [1 - (1 - i / steps) ** rho for i in range(steps + 1)]


def fm_midpoint(process, net, m0, nfe, rho=1.0):
    """Two calls a step; an odd call left over is a last Euler step."""
    x, ts = m0, fm_times((nfe + 1) // 2, rho)
    for i, (t, t_next) in enumerate(pairwise(ts)):
        v, h = fm_velocity(net, x, t), t_next - t
        if 2 * i + 1 < nfe:
            v = fm_velocity(net, x + h / 2 * v, t + h / 2)
        x = x + h * v
    return x


def fm_adams_bashforth(process, net, m0, nfe, rho=1.0, order=2):
    """One call a step; the last step, as in every other sampler here, is the hop x + (1 - t) v."""
    x, ts, past = m0, fm_times(nfe, rho), None
    for i, (t, t_next) in enumerate(pairwise(ts)):
        v, h = fm_velocity(net, x, t), t_next - t
        slope = (v - past[1]) / (t - past[0]) if past and order == 2 and i < nfe - 1 else 0
        past = (t, v)
        x = x + h * v + h**2 / 2 * slope
    return x


fm_euler = partial(fm_adams_bashforth, order=1)
SAMPLERS = {"midpoint": fm_midpoint}  # train.py draws its pictures with the first


def register():
    """Makes flow matching a --method of train.py, and of what restores its checkpoints."""
    train.METHODS["fm"] = (sys.modules[__name__], lambda config: FM())


# ---------------------------------------------------------------------------------------------------------------------
# The field's samplers on a denoiser checkpoint; m0 is unit noise (B, C, ...), process any with its sigma_data.
#
# With y = x + sigma noise and D = E[x | y] the flow is dy = eps dsigma, eps = (y - D) / sigma, which is the same as
# d(y / sigma) = D d(1 / sigma). A multistep sampler puts a polynomial through the last few eps or D, in one clock or
# another, and integrates it.


def powers(n, first, last, rho=7.0):
    """n numbers from first to last, even in their (1/rho)-th power; EDM's noise levels. rho = inf: in the logarithm."""
    u = [i / max(n - 1, 1) for i in range(n)]
    if rho == math.inf:
        return [first * (last / first) ** v for v in u]
    a, b = first ** (1 / rho), last ** (1 / rho)
    return [(a + v * (b - a)) ** rho for v in u]


def edm_denoise(process, net, y, sigma):
    snr = torch.full((len(y),), sigma**-2, dtype=torch.float64)
    return agm_ref.precondition(process, net, y / sigma, snr)


def edm_heun(process, net, m0, nfe, sigma_max=80.0, sigma_min=0.002, rho=7.0):
    """Two calls a step but one in the last, to sigma = 0; of an even nfe one call is not used."""
    sigmas = [*powers((nfe + 1) // 2, sigma_max, sigma_min, rho), 0.0]
    y = sigmas[0] * m0
    for s, s_next in pairwise(sigmas):
        d = (y - edm_denoise(process, net, y, s)) / s
        end = y + (s_next - s) * d
        if s_next > 0:
            d = (d + (end - edm_denoise(process, net, end, s_next)) / s_next) / 2
        y = y + (s_next - s) * d
    return y


def multistep(
    process, net, m0, nfe, step, order, first=None, correct=False, last=True, sigma_max=80.0, sigma_min=0.002, rho=7.0
):
    """One call a step, y <- step(y, sigma, next sigma, [(sigma, D, eps) of the last `order` calls, newest last]).

    first(y, sigma): a first D that costs no call, so that there is one step more. correct: UniPC's corrector, which
    repeats the step that led to y with the D found there as a further node; D itself stays, so it costs no call.
    last: the result is D of a call at sigma_min, a first-order step to sigma = 0, as in DPM-Solver++ and UniPC; else it
    is y at sigma_min, as in DEIS and iPNDM, and saves that call. The first is better once sigma_min is well chosen.
    """
    sigmas, past = powers(nfe + bool(first) + (not last), sigma_max, sigma_min, rho), []
    y = before = sigmas[0] * m0
    for s, s_next in pairwise([*sigmas, None]):
        if not (last or s_next):
            return y
        D = first(y, s) if first and not past else edm_denoise(process, net, y, s)
        if correct and past:
            y = step(before, past[-1][0], s, [*past, (s, D, None)])
        past = [*past, (s, D, (y - D) / s)][-order:]
        if s_next:
            before, y = y, step(y, s, s_next, past)
    return D


def basis(nodes, u):
    """The Lagrange polynomial of each node at u."""
    return [math.prod((u - s) / (t - s) for s in nodes if s != t) for t in nodes]


def integrals(nodes, a, b, density):
    """The integral from a to b of density(u) times each node's Lagrange polynomial, by Gauss-Legendre."""
    x, w = np.polynomial.legendre.leggauss(32)
    u = (a + b) / 2 + (b - a) / 2 * x
    return [float((b - a) / 2 * (w * density(u) * polynomial).sum()) for polynomial in basis(nodes, u)]


def data_step(y, s, s_next, past):
    """DPM-Solver++ (multistep) and UniPC: D is a polynomial in lambda = -log sigma, and 1 / sigma = e^lambda.

    Exact but for two nodes, of which both take the value at mid-step: that is (2M), and UniPC with B(h) = e^h - 1.
    """
    nodes, a, b = [-math.log(sigma) for sigma, *_ in past], -math.log(s), -math.log(s_next)
    if len(past) == 2:
        weights = [(1 / s_next - 1 / s) * polynomial for polynomial in basis(nodes, (a + b) / 2)]
    else:
        weights = integrals(nodes, a, b, np.exp)
    return s_next * (y / s + sum(w * D for w, (_, D, _) in zip(weights, past, strict=True)))


def deis_step(y, s, s_next, past):
    """DEIS, tAB: eps is a polynomial in the time t of the VP process, sigma^2 = e^B - 1, B = .1 t + 19.9 t^2 / 2."""

    def time(sigma):
        return (math.sqrt(0.1**2 + 2 * 19.9 * math.log1p(sigma**2)) - 0.1) / 19.9

    def rate(t):  # dsigma/dt
        B = 0.1 * t + 19.9 * t**2 / 2
        return (0.1 + 19.9 * t) * np.exp(B) / (2 * np.sqrt(np.expm1(B)))

    weights = integrals([time(sigma) for sigma, *_ in past], time(s), time(s_next), rate)
    return y + sum(w * eps for w, (*_, eps) in zip(weights, past, strict=True))


ADAMS = {1: [1], 2: [-1 / 2, 3 / 2], 3: [5 / 12, -16 / 12, 23 / 12], 4: [-9 / 24, 37 / 24, -59 / 24, 55 / 24]}


def ipndm_step(y, s, s_next, past):
    """iPNDM: Adams-Bashforth in sigma as if the steps were equal; of full order if they are, else of second."""
    return y + (s_next - s) * sum(w * eps for w, (*_, eps) in zip(ADAMS[len(past)], past, strict=True))


def analytic(y, s):
    """The first step without a call (AFS): eps = y / sqrt(1 + sigma^2), that of data of unit variance."""
    return y - s * y / math.sqrt(1 + s**2)


dpm2, dpm3 = (partial(multistep, step=data_step, order=k) for k in (2, 3))
unipc2, unipc3 = (partial(multistep, step=data_step, order=k, correct=True) for k in (2, 3))
deis = partial(multistep, step=deis_step, order=4)  # tAB3: a cubic, so four calls
ipndm3, ipndm4 = (partial(multistep, step=ipndm_step, order=k) for k in (3, 4))
deis_afs, ipndm3_afs, ipndm4_afs = (partial(sampler, first=analytic) for sampler in (deis, ipndm3, ipndm4))


def unipc2_mean(process, net, m0, nfe, data_mean=0.0, **grid):
    """UniPC-2 with the free first node of our `ode`: at sigma_max the data's mean is the prediction."""
    return unipc2(process, net, m0, nfe, first=lambda y, s: torch.zeros_like(y) + data_mean, **grid)


# ---------------------------------------------------------------------------------------------------------------------
# DDIM on a network of HOLD(order=1)


def ddim(process, net, m0, nfe, rho=1.0, t_end=0.01):
    """First order on the data prediction, times even in t^(1/rho)."""
    ts, x, m = powers(nfe, process.T, t_end, rho), None, m0
    for i, t in enumerate(ts):
        if i:
            eps = (m - float(process.mean(ts[i - 1])) * x) / float(process.cholesky(ts[i - 1]))
            m = float(process.mean(t)) * x + float(process.cholesky(t)) * eps
        x = hold_ref.denoise(process, net, m, t)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# The comparison

NETS = ["denoiser", "agm", "hold1", "hold2", "hold3", "hold4", "fm"]
FM_GRIDS = [{"rho": rho} for rho in (1.0, 1.5, 2.0)]
DDIM_GRIDS = [{"rho": rho, "t_end": end} for rho in (1.0, 2.0) for end in (0.001, 0.01)]
ODE_GRIDS = [{"rho": rho, "end": end} for rho in (1.0, 1.4, 2.0) for end in (2.0, 3.0, 5.0)]
SIGMA_GRIDS = [  # Karras's grids, and grids even in log SNR
    {"sigma_max": a, "sigma_min": b, "rho": rho}
    for rho, ends in ((7.0, (0.002, 0.02, 0.1)), (math.inf, (0.02, 0.05, 0.1)))
    for a in (80.0, 10.0)  # from 10 fewer steps do, but the prior is wrong: the flow of other samples
    for b in ends
]
STATE = {"last": False}  # where DEIS and iPNDM stop by themselves
PEERS = {  # name: (net, sampler, its field's default, grids)
    "FM, Euler": ("fm", fm_euler, {}, FM_GRIDS),
    "FM, midpoint": ("fm", fm_midpoint, {}, FM_GRIDS),
    "FM, Adams-Bashforth 2": ("fm", fm_adams_bashforth, {}, FM_GRIDS),
    "EDM, Heun": ("denoiser", edm_heun, {}, SIGMA_GRIDS),
    "EDM, DPM-Solver++(2M)": ("denoiser", dpm2, {}, SIGMA_GRIDS),
    "EDM, DPM-Solver++(3M)": ("denoiser", dpm3, {}, SIGMA_GRIDS),
    "EDM, UniPC-2": ("denoiser", unipc2, {}, SIGMA_GRIDS),
    "EDM, UniPC-3": ("denoiser", unipc3, {}, SIGMA_GRIDS),
    "EDM, UniPC-2 from the mean": ("denoiser", unipc2_mean, {}, SIGMA_GRIDS),
    "EDM, DEIS tAB3": ("denoiser", deis, STATE, SIGMA_GRIDS),
    "EDM, DEIS tAB3 with AFS": ("denoiser", deis_afs, STATE, SIGMA_GRIDS),
    "EDM, iPNDM-3": ("denoiser", ipndm3, STATE, SIGMA_GRIDS),
    "EDM, iPNDM-4": ("denoiser", ipndm4, STATE, SIGMA_GRIDS),
    "EDM, iPNDM-3 with AFS": ("denoiser", ipndm3_afs, STATE, SIGMA_GRIDS),
    "EDM, iPNDM-4 with AFS": ("denoiser", ipndm4_afs, STATE, SIGMA_GRIDS),
    "VP, DDIM": ("hold1", ddim, {}, DDIM_GRIDS),
}


class Contender(NamedTuple):
    title: str
    method: str | None  # None: a peer
    order: int | None
    sampler: Callable
    grids: list  # options of the sampler; of several the best is taken
    flow: str | None = "ode"  # the sampler that with many calls follows the same flow; None: it adds noise


def to_end(ode, process, net, m0, nfe, end, data_mean=0.0, **options):
    """`ode` with its last call at noise of std 1 / (end nfe)."""
    t = float(process.time(torch.tensor(end * nfe, dtype=torch.float64).log1p(), 1.0))
    return ode(process, net, m0, nfe, t_end=t, data_mean=data_mean, **options)


def contenders(kind, only):
    """All that sample with a net of this kind and have a part of `only` in their title. Each peer is there with its
    field's default schedule and with the best of its grids, ours by default and as `best grid`."""
    processes = {"denoiser": [("agm", None), *(("hold", n) for n in (1, 2, 3, 4))], "agm": [("agm", None)], "fm": []}
    found = []
    for method, order in processes.get(kind) or ([("hold", int(kind[-1]))] if kind.startswith("hold") else []):
        title = f"{method.upper()}{order or ''} {'denoiser' if kind == 'denoiser' else 'paper'}"
        samplers = train.METHODS[method][0].SAMPLERS
        for name, sampler in samplers.items():
            flow = name if name in ("ode", "exponential") else None  # two flows of the same marginals
            found.append(Contender(f"{title}, {name}", method, order, sampler, [{}], flow))
        if kind == "denoiser":
            eta, best = partial(samplers["ode"], eta=1.0), partial(to_end, samplers["ode"])
            found.append(Contender(f"{title}, eta 1", method, order, eta, [{}], None))
            found.append(Contender(f"{title}, best grid", method, order, best, ODE_GRIDS))
    for name, (net, sampler, default, grids) in PEERS.items():
        if net == kind:
            found.append(Contender(f"{name}, default", None, None, sampler, [default]))
            found.append(Contender(f"{name}, best grid", None, None, sampler, grids))
    return [c for c in found if any(part in c.title for part in only)]


def checkpoint(out, kind, steps, options):
    """The checkpoint of folder `out`, which is trained, or trained to the end, if it is not there."""
    options = [*options, "--steps", str(steps), "--out", str(out)]
    options += ["--param", "denoiser" if kind == "denoiser" else "paper"]
    options += ["--method", "agm" if kind == "denoiser" else kind.rstrip("1234")]
    options += ["--order", kind[-1]] if kind.startswith("hold") else []
    if not (out / "ckpt.pt").exists():
        train.main(options)
    trained = train.load_checkpoint(out / "ckpt.pt")["config"]
    if trained["steps"] != steps:  # the numbers kept beside it belong to it
        was = f"steps {trained['steps']}, not {steps}"
        sys.exit(f"error: {out} was trained with {was}: ask for that, or choose another --out")
    goes_on = [*options, "--data", trained["data"], "--resume"]
    _, ckpt = train.configure(goes_on)  # refuses other settings
    if ckpt["step"] < steps:
        train.main(goes_on)
    return out / "ckpt.pt"


@torch.no_grad()
def draw(path, method, order, sampler, n, nfe, seed, grid, batch=1000):
    """n samples on the CPU, `batch` at a time: the noise of the first is the same whatever n is."""
    config, _, process, net = restore(path, "cpu", method=method, order=order)
    prior = FM().prior if method is None and process.n > 1 else process.prior  # EDM's samplers start from plain noise
    generator, out = torch.Generator().manual_seed(seed), []
    torch.manual_seed(seed + 10**6)  # the noise of stochastic steps, which must not repeat that of m0
    takes = inspect.signature(sampler).parameters
    if "data_mean" in takes and takes["data_mean"].default is not None:  # its free first node is on
        grid = {"data_mean": data_mean(config), **grid}
    for i in range(0, n, batch):
        m0 = prior((min(batch, n - i), *config["shape"]), generator)
        out.append(sampler(process, net, m0, nfe, **grid).float())
    return torch.cat(out).clamp(-config["bound"], config["bound"])


def converged(path, method, order, flow, n, seed, nfe, batch=1000):
    """The first n samples again, from the same noise but along the network's own flow with so many calls that they no
    longer move. Kept beside the checkpoint. The peers, whose m0 is the noise of y, share that of HOLD of order 1.

    Without `ode`'s free first node, whose error falls only as 1 / nfe; but a network that is no denoiser knows less at
    the prior than the mean."""
    config = train.load_checkpoint(path)["config"]
    fm, grid = config["method"] == "fm", {"data_mean": None} if (flow, config["param"]) == ("ode", "denoiser") else {}
    if method is None and not fm:
        method, order = "hold", 1
    file = path.parent / f"{flow}-{method}{order or ''}-{nfe}-{seed}-{min(n, batch)}-{n}.pt"
    if not file.exists():
        sampler = fm_midpoint if fm else train.METHODS[method][0].SAMPLERS[flow]
        torch.save(draw(path, method, order, sampler, n, nfe, seed, grid, batch), file)
    return torch.load(file, weights_only=True)


class Results(dict):
    """{key: list of numbers}, kept in a file that parts of a run may share; without a path, in memory."""

    def __init__(self, path=None):
        self.path = path
        self.read()

    def read(self):
        self.update(json.loads(self.path.read_text()) if self.path and self.path.exists() else {})

    def of(self, key, compute):
        if key not in self:
            self[key] = compute()
            self.read()
            if self.path:
                temporary = self.path.with_suffix(f".{os.getpid()}")
                temporary.write_text(json.dumps(self, indent=0))
                temporary.replace(self.path)
        return self[key]


def evaluate(contender, paths, nfes, n, measure, results, score, n_search=None, n_flow=2000, flow_nfe=400, **options):
    """{nfe: (grid, [numbers of every path])}, the numbers of `measure` and the distance of the first n_flow samples to
    the flow that flow_nfe calls follow. The grid has the lowest score with the first path, searched at every nfe up to
    20 with n_search samples; above, the grid of the nfe before."""
    title, method, order, sampler, grids, flow = contender

    def numbers(nfe, grid, seed, n):
        x = draw(paths[seed], method, order, sampler, n, nfe, seed, grid, **options)
        if flow is None:
            return [*measure(x), math.nan]
        limit = converged(paths[seed], method, order, flow, min(n, n_flow), seed, flow_nfe, **options)
        return [*measure(x), float((x[: len(limit)] - limit).square().mean().sqrt())]

    def run(nfe, grid, seed, n):
        return results.of(f"{title} | {nfe} | {grid} | {seed} | {n}", lambda: numbers(nfe, grid, seed, n))

    row, grid = {}, grids[0]
    for nfe in sorted(nfes):
        if nfe <= 20 and len(grids) > 1:
            grid = min(grids, key=lambda g: score(run(nfe, g, 0, n_search or n)))
        row[nfe] = grid, [run(nfe, grid, seed, n) for seed in range(len(paths))]
    return row


def table(rows, nfes, i):
    """Markdown: the i-th number of every contender at every nfe, mean over the networks."""
    print("| contender |" + "".join(f" {nfe} |" for nfe in nfes) + "\n|---|" + "---|" * len(nfes))
    for title, row in rows.items():
        means = [float(torch.tensor(row[nfe][1])[:, i].mean()) for nfe in nfes]
        if not all(math.isnan(v) for v in means):
            print(f"| {title} |" + "".join(f" {v:.4f} |" for v in means), flush=True)


def grids_used(rows):
    print("\nbest grids:")
    for title, row in rows.items():
        if "best" in title:
            print(f"  {title}: { {nfe: grid for nfe, (grid, _) in row.items()} }")
