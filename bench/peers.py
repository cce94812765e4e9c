"""What points.py, images.py and digits.py share: the peers, called like the samplers of agm_ref.py, and the comparison.

EDM's Heun, DPM-Solver++, UniPC, DEIS, iPNDM and SA-Solver run on the very prediction E[x | y] that AGM and HOLD run on.
Flow matching trains its own network.
"""

import inspect
import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import agm_ref
import data
import train
from data import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Flow matching: x_t = (1 - t) noise + t x; the network learns x - noise, and is told 1 - t


def fm_loss(process, net, x, label=None):
    """That of torchcfm's ConditionalFlowMatcher(sigma=0): independent pairs, t uniform."""
    t, noise = torch.rand(len(x)).to(x), torch.randn_like(x)
    x_t = agm_ref.each(1 - t, noise) + agm_ref.each(t, x)
    return (net(x_t, 1 - t, label) - (x - noise)).square().mean()


def fm_denoise(net, m, t):
    return m + (1 - t) * net(m, m.new_full((len(m),), 1 - t))


def fm_times(steps, rho):
    """steps + 1 times from 0 to 1; rho > 1 makes the steps near the data shorter."""
    return [1 - (1 - i / steps) ** rho for i in range(steps + 1)]


def fm_midpoint(process, predict, m, nfe, rho=1.0):
    """Two calls a step; an odd call left over is a last Euler step."""
    for i, (t, t_next) in enumerate(pairwise(fm_times((nfe + 1) // 2, rho))):
        v, h = (predict(m, t) - m) / (1 - t), t_next - t
        if 2 * i + 1 < nfe:
            middle, at = m + h / 2 * v, t + h / 2
            v = (predict(middle, at) - middle) / (1 - at)
        m = m + h * v
    return m


def fm_adams_bashforth(process, predict, m, nfe, rho=1.0, order=2):
    """One call a step; the last step, as in every other sampler here, goes to the prediction."""
    past = None
    for i, (t, t_next) in enumerate(pairwise(fm_times(nfe, rho))):
        v, h = (predict(m, t) - m) / (1 - t), t_next - t
        slope = (v - past[1]) / (t - past[0]) if past and order == 2 and i < nfe - 1 else 0
        past = (t, v)
        m = m + h * v + h**2 / 2 * slope
    return m


# ---------------------------------------------------------------------------------------------------------------------
# The field's samplers on a denoiser: m is unit noise (B, C, ...), predict(y, sigma) is D = E[x | y], y = x + sigma
# noise. The flow is dy = eps dsigma, eps = (y - D) / sigma, which is the same as d(y / sigma) = D d(1 / sigma). A
# multistep sampler puts a polynomial through the last few eps or D, in one clock or another, and integrates it.


@dataclass(frozen=True)
class VE:
    """y as a process, for agm_ref.denoise; its time is sigma, its prior is unit noise."""

    sigma_data: float
    bound: float
    target: ClassVar[str] = "data"

    def mean(self, t):
        return torch.ones(1, **agm_ref.F64)

    def cholesky(self, t):
        return torch.full((1, 1), t, **agm_ref.F64)

    def prior(self, shape, generator=None):
        return torch.randn(shape, generator=generator)


def karras(n, sigma_max=80.0, sigma_min=0.002, rho=7.0):
    """n noise levels, even in their (1/rho)-th power, for rho = inf in the logarithm; the defaults are EDM's."""
    u = [i / max(n - 1, 1) for i in range(n)]
    if rho == math.inf:
        return [sigma_max * (sigma_min / sigma_max) ** v for v in u]
    a, b = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(a + v * (b - a)) ** rho for v in u]


def edm_heun(process, predict, m, nfe, **grid):
    """Two calls a step but one in the last, to sigma = 0; of an even nfe one call is not used."""
    sigmas = [*karras((nfe + 1) // 2, **grid), 0.0]
    y = sigmas[0] * m
    for s, s_next in pairwise(sigmas):
        d = (y - predict(y, s)) / s
        end = y + (s_next - s) * d
        if s_next > 0:
            d = (d + (end - predict(end, s_next)) / s_next) / 2
        y = y + (s_next - s) * d
    return y


def multistep(process, predict, m, nfe, step, order, first=None, correct=False, noise=None, last=True, **grid):
    """One call a step, y <- step(y, sigma, next sigma, [(sigma, D, eps) of the last `order` calls, newest last]).

    first(y, sigma): a first D that costs no call, so that there is one step more. correct: UniPC's corrector, which
    repeats the step that led to y with the D found there as a further node; D itself stays, so it costs no call.
    noise(y, sigma): more of what the step takes, the same when it is repeated. last: the result is D of a call at
    sigma_min, a first-order step to sigma = 0, as in DPM-Solver++ and UniPC; else it is y at sigma_min, as in DEIS and
    iPNDM, and saves that call. The first is better once sigma_min is well chosen.
    """
    sigmas, past, drawn = karras(nfe + bool(first) + (not last), **grid), [], ()
    y = before = sigmas[0] * m
    for s, s_next in pairwise([*sigmas, None]):
        if not (last or s_next):
            return y
        D = first(y, s) if first and not past else predict(y, s)
        if correct and past:
            y = step(before, past[-1][0], s, [*past, (s, D, None)], *drawn)
        past = [*past, (s, D, (y - D) / s)][-order:]
        if s_next:
            before, drawn = y, noise(y, s) if noise else ()
            y = step(y, s, s_next, past, *drawn)
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
    if len(past) != 2:
        return adams_step(y, s, s_next, past)
    nodes, middle = [-math.log(sigma) for sigma, *_ in past], -math.log(s * s_next) / 2
    weights = [(1 / s_next - 1 / s) * polynomial for polynomial in basis(nodes, middle)]
    return s_next * (y / s + sum(w * D for w, (_, D, _) in zip(weights, past, strict=True)))


def adams_step(y, s, s_next, past, tau=0.0, noise=0.0):
    """Exact for D a polynomial in lambda = -log sigma, also for the SDE of the same marginals with tau times the usual
    noise: d(y / sigma) = -tau^2 (y / sigma) dlambda + (1 + tau^2) e^lambda D dlambda + sqrt(2) tau dW."""
    nodes, a, b, k = [-math.log(sigma) for sigma, *_ in past], -math.log(s), -math.log(s_next), tau**2
    weights = integrals(nodes, a, b, lambda u: (1 + k) * np.exp(u - k * (b - u)))
    kept = math.exp(-k * (b - a))
    mean = kept * y / s + sum(w * D for w, (_, D, _) in zip(weights, past, strict=True))
    return s_next * (mean + math.sqrt(1 - kept**2) * noise)


def sa_solver(process, predict, m, nfe, tau=1.0, between=(0.05, 1.0), randn=torch.randn_like, **grid):
    """SA-Solver (Xue et al. 2023) with predictor order 3 and corrector order 4, as its authors advise for data without
    strong guidance. tau, 0 for the flow and 1 for the usual SDE, is in force for sigma in `between`: theirs is 0 at the
    start and the end, too, but they give it for other clocks, so this interval is ours."""

    def noise(y, s):
        return tau * (between[0] <= s <= between[1]), randn(y)

    return multistep(process, predict, m, nfe, adams_step, 3, correct=True, noise=noise, **grid)


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


def from_mean(process, predict, m, nfe, data_mean=0.0, **options):
    """The free first node of our `ode`: at sigma_max the data's mean is the prediction."""
    return multistep(process, predict, m, nfe, first=lambda y, s: torch.zeros_like(y) + data_mean, **options)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison

NETS = ["denoiser", "agm", "hold1", "hold2", "hold3", "hold4", "fm"]
FM_GRIDS = [{"rho": rho} for rho in (1.0, 1.5, 2.0)]
ODE_GRIDS = [{"rho": rho, "end": end} for rho in (1.0, 1.4, 2.0) for end in (2.0, 3.0, 5.0)]
SIGMA_GRIDS = [  # Karras's grids, and grids even in log SNR
    {"sigma_max": a, "sigma_min": b, "rho": rho}
    for rho, ends in ((7.0, (0.002, 0.02, 0.1)), (math.inf, (0.02, 0.05, 0.1)))
    for a in (80.0, 10.0)  # from 10 fewer steps do, but the prior is wrong: the flow of other samples
    for b in ends
]
SA_NOISE = ({}, {"between": (0, math.inf)}, {"between": (0, math.inf), "tau": 0.5})
SA_GRIDS = [{**grid, **noise} for grid in SIGMA_GRIDS for noise in SA_NOISE]
PEERS = {
    "FM, Euler": partial(fm_adams_bashforth, order=1),
    "FM, midpoint": fm_midpoint,
    "FM, Adams-Bashforth 2": fm_adams_bashforth,
    "EDM, Heun": edm_heun,
    "EDM, DPM-Solver++(2M)": partial(multistep, step=data_step, order=2),
    "EDM, DPM-Solver++(3M)": partial(multistep, step=data_step, order=3),
    "EDM, UniPC-2": partial(multistep, step=data_step, order=2, correct=True),
    "EDM, UniPC-3": partial(multistep, step=data_step, order=3, correct=True),
    "EDM, UniPC-2 from the mean": partial(from_mean, step=data_step, order=2, correct=True),
    "EDM, DEIS tAB3": partial(multistep, step=deis_step, order=4),  # a cubic, so four calls
    "EDM, iPNDM-3": partial(multistep, step=ipndm_step, order=3),
    "EDM, iPNDM-4": partial(multistep, step=ipndm_step, order=4),
    "EDM, SA-Solver": sa_solver,
}
STATE = ("EDM, DEIS tAB3", "EDM, iPNDM-3", "EDM, iPNDM-4")  # these by themselves stop at the state
PEERS |= {f"{name} with AFS": partial(PEERS[name], first=analytic) for name in STATE}


class Contender(NamedTuple):
    title: str
    model: str  # agm, hold1 ..., ve, fm: a process and what the net predicts for it
    sampler: Callable
    grids: list  # options of the sampler; of several the best is taken
    flow: str | None = "ode"  # the sampler that with many calls follows the same flow; None: it adds noise


def to_end(ode, process, predict, m, nfe, end, **options):
    """`ode` with its last call at noise of std 1 / (end nfe)."""
    return ode(process, predict, m, nfe, t_end=float(process.time_of_snr((end * nfe) ** 2)), **options)


def contenders(net, only):
    """All that sample with this net and have a part of `only` in their title. Each peer is there with its field's
    default schedule and with the best of its grids, `ode` by default and as `best grid`."""
    found, kind = [], "denoiser" if net == "denoiser" else "paper"
    for model in [] if net == "fm" else ["agm", "hold1", "hold2", "hold3", "hold4"] if net == "denoiser" else [net]:
        title, samplers = f"{model.upper()} {kind}", train.METHODS[model.rstrip("1234")].SAMPLERS
        for name, sampler in samplers.items():
            flow = name if name in ("ode", "exponential") else None  # two flows of the same marginals
            found.append(Contender(f"{title}, {name}", model, sampler, [{}], flow))
        if net == "denoiser":
            found.append(Contender(f"{title}, best grid", model, partial(to_end, samplers["ode"]), ODE_GRIDS))
    for name, sampler in PEERS.items() if net in ("denoiser", "fm") else ():
        model, grids, flow = "ve", SIGMA_GRIDS, "ode"
        if name.startswith("FM"):
            model, grids = "fm", FM_GRIDS
        elif sampler is sa_solver:
            grids, flow = SA_GRIDS, None
        if (net == "fm") == (model == "fm"):
            default = {"last": False} if name.startswith(STATE) else {}
            found.append(Contender(f"{name}, default", model, sampler, [default], flow))
            found.append(Contender(f"{name}, best grid", model, sampler, grids, flow))
    return [c for c in found if any(part in c.title for part in only)]


def checkpoint(out, net, steps, options):
    """The checkpoint of folder `out`, which is trained, or trained to the end, if it is not there."""
    method, path, done = "hold" if net.startswith("hold") else "agm", out / "ckpt.pt", 0
    target = {"agm": "ode", "denoiser": "data", "fm": "data"}.get(net, "noise")
    options = [*options, "--method", method, "--target", target, "--steps", str(steps), "--out", str(out)]
    options += ["--order", net[-1]] if method == "hold" else []
    if path.exists():
        ckpt = train.load_checkpoint(path)
        done, asked = ckpt["step"], ckpt["config"].steps
        if asked != steps:  # the numbers kept beside it belong to it
            raise UserError(f"{out} was trained with steps {asked}, not {steps}: ask for that, or choose another --out")
    if done < steps:
        with patch.object(agm_ref, "loss", fm_loss) if net == "fm" else nullcontext():
            train.main([*options, *["--resume"] * (done > 0)])
    return path


@lru_cache(4)
def restore(path, model):
    """process, predict and the facts of the data, of a checkpoint's net as that model."""
    ckpt, order = train.load_checkpoint(path), int(model[-1]) if model[-1].isdigit() else 3
    facts, method = ckpt["data"], "hold" if model.startswith("hold") else "agm"
    module, process, net = train.build(replace(ckpt["config"], method=method, order=order), facts)
    net.load_state_dict(ckpt["ema"])
    net.eval()
    if model in ("ve", "fm"):
        process = VE(process.sigma_data, process.bound)
    predict = partial(fm_denoise, net) if model == "fm" else partial(module.denoise, process, net)
    return process, predict, facts


@torch.no_grad()
def draw(path, model, sampler, n, nfe, seed, grid, batch=1000):
    """n samples on the CPU, `batch` at a time: the noise of the first is the same whatever n is."""
    process, predict, facts = restore(path, model)
    generator, out = torch.Generator().manual_seed(seed), []
    torch.manual_seed(seed + 10**6)  # the noise of stochastic steps, which must not repeat that of the prior
    if "data_mean" in inspect.signature(sampler).parameters:
        grid = {"data_mean": facts["mean"], **grid}
    for i in range(0, n, batch):
        m = process.prior((min(batch, n - i), *facts["shape"]), generator)
        out.append(sampler(process, predict, m, nfe, **grid).float())
    return torch.cat(out).clamp(-facts["bound"], facts["bound"])


def converged(path, model, flow, n, seed, nfe, batch=1000):
    """The first n samples again, from the same noise but along the network's own flow with so many calls that they no
    longer move. Kept beside the checkpoint. The peers, which start from the noise of y, share that of HOLD of order 1.

    Without `ode`'s free first node, whose error falls only as 1 / nfe; but a network that is no denoiser knows less at
    the prior than the mean."""
    model = "hold1" if model == "ve" else model
    file = path.parent / f"{flow}-{model}-{nfe}-{seed}-{min(n, batch)}-{n}.pt"
    if not file.exists():
        sampler = fm_midpoint if model == "fm" else train.METHODS[model.rstrip("1234")].SAMPLERS[flow]
        is_denoiser = restore(path, model)[0].target == "data" and model != "fm"
        grid = {"data_mean": None} if flow == "ode" and is_denoiser else {}
        torch.save(draw(path, model, sampler, n, nfe, seed, grid, batch), file)
    return torch.load(file, weights_only=True)


class Results(dict):
    """{key: list of numbers}, kept in a file, so that another call goes on where this one stopped."""

    def __init__(self, path=None):
        self.path = path
        super().__init__(json.loads(path.read_text()) if path and path.exists() else {})

    def of(self, key, compute):
        if key not in self:
            self[key] = compute()
            if self.path:
                data.write_files({self.path: json.dumps(self, indent=0).encode()})
        return self[key]


def evaluate(contender, paths, nfes, n, measure, results, score, n_search=None, n_flow=2000, flow_nfe=400, **options):
    """{nfe: (grid, [numbers of every path])}, the numbers of `measure` and the distance of the first n_flow samples to
    the flow that flow_nfe calls follow. The grid has the lowest score with the first path, searched at every nfe up to
    20 with n_search samples; above, the grid of the nfe before."""
    title, model, sampler, grids, flow = contender

    def numbers(nfe, grid, seed, n):
        x = draw(paths[seed], model, sampler, n, nfe, seed, grid, **options)
        if flow is None:
            return [*measure(x), math.nan]
        limit = converged(paths[seed], model, flow, min(n, n_flow), seed, flow_nfe, **options)
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
