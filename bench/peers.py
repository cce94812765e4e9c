"""The field's samplers for few calls, called like those of agm_ref.py. It has no command.

All but TADA's act on m, unit noise (B, C, ...); predict(y, sigma) is D = E[x | y], y = x + sigma
noise. The flow is

    dy = eps dsigma,  eps = (y - D) / sigma,     or, the same,     d(y / sigma) = D d(1 / sigma)

A multistep sampler puts a polynomial in a clock of its own through the last few eps or D, and
integrates it over the step.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from agm_ref import F64, Process, gauss_legendre, mix


class VE(Process):
    """y itself as a process, for agm_ref.denoise: its time is sigma, its prior is unit noise."""

    n, first, last, prior_cov = 1, 80.0, 0.002, torch.ones(1, 1, **F64)

    def mean(self, t):
        return torch.ones_like(torch.as_tensor(t, **F64))[..., None]

    def cholesky(self, t):
        return torch.as_tensor(t, **F64)[..., None, None]


def karras(n, sigma_max=80.0, sigma_min=0.002, rho=7.0):
    """n noise levels, even in their (1/rho)-th power, for rho None in the logarithm; the defaults
    are EDM's."""
    if n == 1:
        return [sigma_max]
    u = np.linspace(0, 1, n)
    if rho is None:
        return (sigma_max * (sigma_min / sigma_max) ** u).tolist()
    high = sigma_max ** (1 / rho)
    low = sigma_min ** (1 / rho)
    return ((high + u * (low - high)) ** rho).tolist()


# -------------------------------------------------------------------------------------------------
# Multistep samplers on y


class Call(NamedTuple):
    """A network call: where, and what it gave."""

    sigma: float
    D: torch.Tensor
    eps: torch.Tensor | None = None


def multistep(
    process,
    predict,
    m,
    nfe,
    step,
    order,
    first=None,
    correct=False,
    noise=None,
    last=True,
    **grid,
):
    """One call a step: y <- step(y, sigma, next sigma, [the last `order` Calls], *noise(y, sigma)).

    first(y, sigma): a first D that costs no call, and so there is one step more. correct: UniPC's
    corrector, which repeats the step that led to y with the Call there as a further node, and the
    same noise. D itself stays, so it costs no call. last: the sample is the D of a call at
    sigma_min, as in DPM-Solver++ and UniPC; else it is y there, as in DEIS and iPNDM, which saves
    that call. The first is better once sigma_min is well chosen.
    """
    sigmas = karras(nfe + bool(first) + (not last), **grid)
    y = before = sigmas[0] * m
    past = []
    drawn = ()
    for i, sigma in enumerate(sigmas):
        at_end = i == len(sigmas) - 1
        if at_end and not last:
            return y
        D = first(y, sigma) if first and i == 0 else predict(y, sigma)
        if at_end:
            return D
        if correct and past:
            y = step(before, past[-1].sigma, sigma, [*past, Call(sigma, D)], *drawn)
        past = [*past, Call(sigma, D, (y - D) / sigma)][-order:]
        before = y
        if noise:
            drawn = noise(y, sigma)
        y = step(y, sigma, sigmas[i + 1], past, *drawn)


def lagrange(nodes, u):
    """The Lagrange polynomial of each node at u."""
    polynomials = []
    for node in nodes:
        others = [(u - other) / (node - other) for other in nodes if other != node]
        polynomials.append(math.prod(others))
    return polynomials


def integrals(nodes, a, b, density):
    """The integral from a to b of density(u) times each node's Lagrange polynomial."""
    u, du = gauss_legendre(a, b, 32)
    weighted = du * density(u)
    return [float((weighted * polynomial).sum()) for polynomial in lagrange(nodes, u)]


def combine(weights, tensors):
    """The sum of weight times tensor."""
    return sum(w * x for w, x in zip(weights, tensors, strict=True))


def data_step(y, sigma, sigma_next, past):
    """DPM-Solver++ (multistep) and UniPC: D is a polynomial in lambda = -log sigma. For two nodes
    both take the value at mid-step, that is (2M), and UniPC with B(h) = e^h - 1; else it is exact.
    """
    if len(past) != 2:
        return adams_step(y, sigma, sigma_next, past)
    nodes = [-math.log(call.sigma) for call in past]
    middle = -math.log(sigma * sigma_next) / 2
    D = combine(lagrange(nodes, middle), [call.D for call in past])
    return sigma_next * (y / sigma + (1 / sigma_next - 1 / sigma) * D)


def adams_step(y, sigma, sigma_next, past, tau=0.0, noise=0.0):
    """Exact for D a polynomial in lambda = -log sigma, also for the SDE of the same marginals with
    tau times the usual noise: d(y / sigma) = -tau^2 (y / sigma) dlambda + (1 + tau^2) e^lambda D
    dlambda + sqrt(2) tau dW."""
    start = -math.log(sigma)
    end = -math.log(sigma_next)
    nodes = [-math.log(call.sigma) for call in past]

    def density(u):
        return (1 + tau**2) * torch.exp(u - tau**2 * (end - u))

    kept = math.exp(-(tau**2) * (end - start))
    D = combine(integrals(nodes, start, end, density), [call.D for call in past])
    return sigma_next * (kept * y / sigma + D + math.sqrt(1 - kept**2) * noise)


def sa_solver(
    process, predict, m, nfe, tau=1.0, between=(0.05, 1.0), randn=torch.randn_like, **grid
):
    """SA-Solver (Xue et al. 2023), predictor of order 3 and corrector of order 4, as its authors
    advise. tau, 0 for the flow and 1 for the usual SDE, is in force for sigma in `between`, 0
    elsewhere; theirs is so, too, but they give it for other clocks: this interval is ours."""

    def noise(y, sigma):
        inside = between[0] <= sigma <= between[1]
        return tau * inside, randn(y)

    return multistep(process, predict, m, nfe, adams_step, 3, correct=True, noise=noise, **grid)


def deis_step(y, sigma, sigma_next, past):
    """DEIS, tAB: eps is a polynomial in the time t of the VP process, sigma^2 = e^B - 1, B = .1 t +
    19.9 t^2 / 2."""

    def time(sigma):
        return (math.sqrt(0.1**2 + 2 * 19.9 * math.log1p(sigma**2)) - 0.1) / 19.9

    def rate(t):  # dsigma/dt
        B = 0.1 * t + 19.9 * t**2 / 2
        return (0.1 + 19.9 * t) * torch.exp(B) / (2 * torch.expm1(B).sqrt())

    nodes = [time(call.sigma) for call in past]
    weights = integrals(nodes, time(sigma), time(sigma_next), rate)
    return y + combine(weights, [call.eps for call in past])


ADAMS = {1: [1], 2: [-1 / 2, 3 / 2], 3: [5 / 12, -16 / 12, 23 / 12]}


def ipndm_step(y, sigma, sigma_next, past):
    """iPNDM: Adams-Bashforth in sigma as if the steps were equal; of full order if they are, else
    of second."""
    eps = combine(ADAMS[len(past)], [call.eps for call in past])
    return y + (sigma_next - sigma) * eps


def analytic(y, sigma):
    """The first D without a call (AFS): eps = y / sqrt(1 + sigma^2), that of data of variance 1."""
    return y - sigma * y / math.sqrt(1 + sigma**2)


# -------------------------------------------------------------------------------------------------
# TADA (Chen et al. 2025, arXiv 2506.21757) with two blocks


@dataclass(frozen=True)
class TADA(Process):
    """A chain without noise: dq = v dt, dv = a* dt, a* = (2/tau)((x - q)/tau - v), tau = 1 - t. In
    its modes tau and tau^2 of e = q - x (`agm_ref`, section 1), m = mean(t) x + W(t) m_0, where m_0
    is the prior, of covariance diag(1, k)."""

    k: float = 1.0
    n, first, last = 2, 1e-4, 0.97

    @property
    def prior_cov(self):
        return torch.diag(torch.tensor([1.0, self.k], **F64))

    def mean(self, t):
        t = torch.as_tensor(t, **F64)
        return torch.stack([t**2, 2 * t], -1)

    def transition(self, t):
        """(..., 2, 2): W."""
        t = torch.as_tensor(t, **F64)
        row_q = torch.stack([1 - t**2, t * (1 - t)], -1)
        row_v = torch.stack([-2 * t, 1 - 2 * t], -1)
        return torch.stack([row_q, row_v], -2)

    def cholesky(self, t):
        W = self.transition(t)
        return torch.linalg.cholesky(W @ self.prior_cov @ W.mT)


def tada(process, predict, m, nfe, **grid):
    """Adams-Bashforth of order 3 on the acceleration, a polynomial in t, at the times of the noise
    levels `karras`; the sample is the last prediction."""
    sigmas = torch.tensor(karras(nfe, **grid), **F64)
    ts = process.time_of_snr(sigmas**-2).tolist()
    m = mix(process.transition(ts[0]), m)
    past = []  # (time, acceleration) of the last three calls
    for i, t in enumerate(ts):
        x = predict(m, t)
        if i == nfe - 1:
            return x
        q, v = m.chunk(2, 1)
        tau = 1 - t
        past = [*past, (t, 2 / tau**2 * (x - q - tau * v))][-3:]
        nodes, accelerations = zip(*past, strict=True)
        t_next = ts[i + 1]
        moves = integrals(nodes, t, t_next, lambda u, end=t_next: end - u)
        kicks = integrals(nodes, t, t_next, torch.ones_like)
        q = q + (t_next - t) * v + combine(moves, accelerations)
        m = torch.cat([q, v + combine(kicks, accelerations)], 1)


# -------------------------------------------------------------------------------------------------
# By name, and the grids that each gets: Karras's, and even in log SNR

PEERS = {
    "DPM-Solver++(2M)": partial(multistep, step=data_step, order=2),
    "UniPC-2": partial(multistep, step=data_step, order=2, correct=True),
    "DEIS tAB3": partial(multistep, step=deis_step, order=4),  # a cubic, so four calls
    "iPNDM-3": partial(multistep, step=ipndm_step, order=3),
    "iPNDM-3 with AFS": partial(multistep, step=ipndm_step, order=3, first=analytic),
    "TADA": tada,
}
END_AT_STATE = ("DEIS tAB3", "iPNDM-3", "iPNDM-3 with AFS")  # by default; see `last` in multistep
GRIDS = []
for high in (
    80.0,
    10.0,
):  # from 10 fewer steps do, but the prior is wrong: the flow of other samples
    for low in (0.002, 0.02, 0.1):
        GRIDS.append({"sigma_max": high, "sigma_min": low, "rho": 7.0})
    for low in (0.02, 0.05, 0.1):
        GRIDS.append({"sigma_max": high, "sigma_min": low, "rho": None})
