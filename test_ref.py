"""All tests: python -m pytest -q. Each compares with something independent of the code it tests."""

import dataclasses
import gzip
import hashlib
import http.server
import importlib.util
import inspect
import io
import itertools
import math
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
import zlib
from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import agm_ref
import data
import hold_ref
import nets
import sample
import train
from agm_ref import AGM
from hold_ref import HOLD

# ---------------------------------------------------------------------------------------------------------------------
# AGM: independent moments, the definition of the target, exact denoisers in place of a network

ODE, SDE = AGM(), AGM(sde=True)
F64 = torch.float64


def randn64(seed, *shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def worst(a, b, relative=False):
    """Largest absolute (or relative) difference, in float64."""
    a, b = torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    return float(((a - b) / (b if relative else 1)).abs().max())


# --- closed forms ----------------------------------------------------------------------------------------------------


@lru_cache(None)
def exact(t, p=3, k="-0.2"):
    """mean (2,), cov (2, 2), cholesky (2, 2) as float64, computed with 60 digits at the exact value of the float t.

    The error e = x - x1 after a unit of e(0), of v(0), and of a kick at remaining time s is a sum of tau and tau^4:
    e = (4 tau - tau^4)/3, (tau - tau^4)/3, (tau - tau^4/s^3)/3, and v = de/dt. Kicks have variance p^2 s^2 ds.
    """
    with localcontext() as context:
        context.prec = 60
        tau, p, k, O = 1 - Decimal(float(t)), Decimal(p), Decimal(k), np.outer
        one, four = np.array([tau, Decimal(-1)]) / 3, np.array([tau**4, -4 * tau**3]) / 3  # (e, v) of each
        e0, v0 = 4 * one - four, one - four
        I = (1 - tau**3) / 3, -tau.ln(), (tau**-3 - 1) / 3  # int s^2 (1, s^-3, s^-6) ds from tau to 1
        kicks = O(one, one) * I[0] - (O(one, four) + O(four, one)) * I[1] + O(four, four) * I[2]
        cov = O(e0, e0) + O(v0, v0) + k * (O(e0, v0) + O(v0, e0)) + p**2 * kicks
        Lxx = cov[0, 0].sqrt()
        Lxv = cov[0, 1] / Lxx
        L = [[Lxx, 0], [Lxv, (cov[1, 1] - Lxv * Lxv).sqrt()]]
        return tuple(torch.from_numpy(np.array(a, dtype=float)) for a in ([1, 0] - e0, cov, L))


def moments_by_runge_kutta(times, p=3.0, k=-0.2, step=2e-3):
    """(mean, cov) at increasing times: classical RK4 on mean' = A mean + b, cov' = A cov + cov A^T + Q, in -ln tau."""

    def rate(s, y):
        tau = math.exp(-s)
        A = np.array([[0, 1], [-4 / tau**2, -4 / tau]])
        AS = A @ y[:, 1:]
        return tau * np.column_stack([A @ y[:, 0] + [0, 4 / tau**2], AS + AS.T + np.diag([0, (p * tau) ** 2])])

    s, y, out = 0.0, np.array([[0, 1, k], [0, k, 1]]), []
    for end in (-math.log1p(-t) for t in times):
        n = math.ceil((end - s) / step)
        for start in s + (end - s) / max(n, 1) * np.arange(n):
            y = rk4(rate, start, y, (end - s) / n)
        s = end
        out.append((y[:, 0], y[:, 1:]))
    return out


def rk4(rate, s, y, h):
    k1 = rate(s, y)
    k2 = rate(s + h / 2, y + h / 2 * k1)
    k3 = rate(s + h / 2, y + h / 2 * k2)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(s + h, y + h * k3))


def test_mean_and_covariance_solve_the_moment_equations():
    times = np.linspace(0, 0.999, 20)
    for t, (mean, cov) in zip(times, moments_by_runge_kutta(times), strict=True):
        assert worst(ODE.mean(t), mean) < 1e-9
        assert worst(ODE.cov(t), cov) < 1e-9
    (mean, cov), other = moments_by_runge_kutta([0.7], 1.5, 0.4)[0], AGM(p=1.5, k=0.4)
    assert max(worst(other.mean(0.7), mean), worst(other.cov(0.7), cov)) < 1e-9


def test_cholesky_keeps_every_digit_up_to_one():
    for t in [0.0, 1e-5, 1e-3, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, *(1 - 10.0**-j for j in range(2, 7))]:
        L, truth = ODE.cholesky(t), exact(t)[2]
        i, j = torch.tril_indices(2, 2)
        assert L[0, 1] == 0
        assert worst(L[i, j], truth[i, j], relative=True) < 1e-9
        assert worst(ODE.cov(t), exact(t)[1], relative=True) < 1e-9
    times = torch.rand(3, 4, dtype=F64)  # any shape of times, entry by entry
    assert worst(ODE.cholesky(times)[2, 1], ODE.cholesky(float(times[2, 1]))) < 1e-14


# --- targets ---------------------------------------------------------------------------------------------------------

TIMES = [1e-5, 0.1, 0.37, 0.5, 0.8, 0.9, 0.97, 0.99, 0.999]


def definition(process, x1, m, t):
    """The acceleration of one state m (2, D), in the words of the paper: a*, less g^2/2 score_v for the ODE."""
    tau, (mean, _, L), eye = 1 - t, exact(t), torch.eye(m.shape[1], dtype=F64)
    F = 4 / tau * ((x1 - m[0]) / tau - m[1])
    if not process.sde:
        m = m.clone().requires_grad_()
        density = MultivariateNormal(torch.kron(mean, x1), scale_tril=torch.kron(L, eye))
        (score,) = torch.autograd.grad(density.log_prob(m.reshape(-1)), m)
        F = F - (process.p * tau) ** 2 / 2 * score[1]
    return F


@pytest.mark.parametrize("process", [ODE, SDE])
def test_target_is_the_acceleration_of_the_definition(process):
    for i, t in enumerate(TIMES):
        x1, eps = randn64(i, 4, 3).clamp(-1, 1), randn64(100 + i, 4, 6)
        m, label = agm_ref.training_pair(process, x1, torch.full((4,), t, dtype=F64), eps)
        F = label * process.scale(t)
        truth = torch.stack([definition(process, *pair, t) for pair in zip(x1, m.view(4, 2, 3), strict=True)])
        # a* divides by tau^2: one rounding of the state, 2^-53, alone is worth 4e-10 at t = .999
        assert worst(F, truth) < 1e-9
        assert worst(agm_ref.acceleration(process, x1, m, t), truth) < 1e-9
        assert worst(agm_ref.hop(process, F, m, t), x1) < 1e-8
        x, v = m.chunk(2, 1)
        if process.sde:
            assert worst(agm_ref.hop(process, F, m, t), x + (1 - t) * (v + (1 - t) * F / 4)) < 1e-12


@pytest.mark.parametrize("process", [ODE, SDE])
def test_labels_have_unit_variance_at_zero(process):
    B, D, t = 40000, 4, torch.tensor(TIMES, dtype=F64)
    assert worst(process.gain(t).norm(dim=-1) / process.scale(t), torch.ones(len(t), dtype=F64)) < 1e-14
    for i, t in enumerate(TIMES):
        x1, ts = torch.zeros(B, D, dtype=F64), torch.full((B,), t)
        _, label = agm_ref.training_pair(process, x1, ts, randn64(i, B, 2 * D))
        assert abs(float(label.square().mean()) - 1) < 5 * math.sqrt(2 / (B * D))  # five standard errors


@pytest.mark.parametrize("process", [ODE, SDE])
def test_loss_of_nets_whose_loss_is_known(process):
    torch.manual_seed(0)
    x, seen = torch.tensor([[0.3, -0.8]], dtype=F64).repeat(32, 1), []

    def conditional(m, t, label=None):
        seen.append(t)
        pairs = zip(m.view(-1, 2, 2), t.tolist(), strict=True)
        return torch.stack([definition(process, x[0], mi, ti) / process.scale(ti) for mi, ti in pairs])

    assert float(agm_ref.loss(process, conditional, x)) < 1e-18
    off_by_one = float(agm_ref.loss(process, lambda m, t, label=None: conditional(m, t) + 1, x))
    assert abs(off_by_one - float(1 - seen[-1].mean())) < 1e-9  # the weight is 1 - t

    def zero(m, t, label=None):
        seen.append(t)
        return torch.zeros_like(m.chunk(2, 1)[0])

    B, D = 40000, 8
    expected = 1 - (process.t0 + process.t1) / 2  # E[(1 - t) z^2], z unit normal; Var z^2 = 2, E(1 - t)^2 = 1/3
    assert abs(float(agm_ref.loss(process, zero, torch.zeros(B, D))) - expected) < 5 * math.sqrt(2 / 3 / (B * D))
    edges = torch.linspace(process.t0, process.t1, B + 1)  # one t in every stratum: uniform on [t0, t1]
    assert bool(((seen[-1] >= edges[:-1] - 1e-7) & (seen[-1] <= edges[1:] + 1e-7)).all())


# --- exact denoisers -------------------------------------------------------------------------------------------------


class Mixture:
    """Data sum_j weight_j N(centre_j, std^2 I) in D dimensions, with the exact E[x1 | m]."""

    def __init__(self, weights, centres, std):
        self.weights, self.centres = (torch.tensor(a, dtype=F64) for a in (weights, centres))
        self.std, self.calls = std, []

    def posterior_mean(self, m, t):
        """E[x1 | m] for m (B, 2D), by Bayes: p(j | m) and the Gaussian regression of x1 on m within each component."""
        mean, cov, _ = exact(t)
        P = torch.linalg.inv(torch.outer(mean, mean) * self.std**2 + cov)  # of m given j, the same for every pixel
        x, v = m.view(len(m), 2, 1, -1).unbind(1)
        x, v = x - mean[0] * self.centres, v - mean[1] * self.centres  # (B, j, D)
        Px, Pv = P[0, 0] * x + P[0, 1] * v, P[1, 0] * x + P[1, 1] * v
        share = torch.softmax(self.weights.log() - (x * Px + v * Pv).sum(-1) / 2, 1)  # (B, j)
        inside = self.centres + self.std**2 * (mean[0] * Px + mean[1] * Pv)
        return (share[..., None] * inside).sum(1)

    def net(self, process):
        """What a perfectly trained network returns; keeps the times it was asked about in self.calls."""

        def net(m, t, label=None):
            self.calls.append(float(t[0]))
            x1 = self.posterior_mean(m.double(), float(t[0]))
            return (agm_ref.acceleration(process, x1, m.double(), float(t[0])) / process.scale(float(t[0]))).to(m)

        return net


GAUSSIAN = Mixture([1.0], [[0.4, -0.7]], 0.5)
MIXTURE = Mixture([0.2, 0.5, 0.3], [[-0.8, 0.1], [0.3, 0.9], [0.6, -0.7]], 0.1)


def exact_flow(m, t_end):
    """GAUSSIAN's probability flow x' = v, v' = E[a* | m] - g^2/2 score_v of the marginal, then the hop: fine RK4."""

    @lru_cache(None)
    def at(t):
        mean, cov, _ = exact(t)
        return mean, torch.linalg.inv(torch.outer(mean, mean) * GAUSSIAN.std**2 + cov)

    def rate(t, m):
        x, v = m.chunk(2, 1)
        mean, P = at(t)
        score_v = -torch.einsum("a,bad->bd", P[1], m.view(-1, 2, 2) - torch.outer(mean, GAUSSIAN.centres[0]))
        tau = 1 - t
        a = 4 / tau * ((GAUSSIAN.posterior_mean(m, t) - x) / tau - v)
        return torch.cat([v, a - (3 * tau) ** 2 / 2 * score_v], 1)

    for t, t_next in pairwise(np.linspace(ODE.t0, t_end, 401)):
        m = rk4(rate, t, m, t_next - t)
    return GAUSSIAN.posterior_mean(m, t_end)


def test_exponential_converges_with_its_order():
    """On a uniform grid the first step, of order one, leaves an error h^2 that holds orders 3 and 4 to slope 2, here
    above the error of order 2. With rho = 2 the first step is only h^2 long and its error h^4: every order has its own
    slope, and each is better than the one below. That is the true statement, so it is the one tested."""
    m0, t_end, nfes = ODE.prior((64, 2), torch.Generator().manual_seed(0)).double(), 0.8, [10, 20, 40]
    truth, net, run = exact_flow(m0, t_end), GAUSSIAN.net(ODE), agm_ref.SAMPLERS["exponential"]

    def errors(order, rho):
        return [worst(run(ODE, net, m0, n, order=order, rho=rho, t_end=t_end), truth) for n in nfes]

    for rho, orders in ((1, [1, 2]), (2, [1, 2, 3, 4])):
        error = np.array([errors(order, rho) for order in orders])
        excess = np.log2(error[:, 1] / error[:, 2]) - orders
        assert np.abs(excess[:2]).max() < 0.3
        assert excess.min() > -0.3  # orders 3 and 4 still come down faster than their order
        assert (error[1:] < error[:-1]).all()  # and a higher order is nearer at every nfe


def test_exponential_is_exact_for_a_constant_network():
    m0, N = randn64(0, 5, 4), randn64(1, 5, 2)
    u, weight = np.polynomial.legendre.leggauss(60)
    u, weight = torch.tensor(0.45 * (1 + u)), torch.tensor(0.45 * weight)  # on [0, 0.9]
    process, (x, v) = AGM(t0=1e-15), m0.chunk(2, 1)
    force = weight * process.scale(u)
    m = torch.cat([x + 0.9 * v + ((0.9 - u) * force).sum() * N, v + force.sum() * N], 1)
    truth = agm_ref.hop(process, process.scale(0.9) * N, m, 0.9)
    for order, nfe in ((1, 3), (2, 5), (4, 9)):
        x1 = agm_ref.SAMPLERS["exponential"](process, lambda m, t, label: N, m0, nfe, order=order, t_end=0.9)
        assert worst(x1, truth) < 1e-9


def agm_law(name, nfe, process):
    """Exact mean and variance of what an SDE sampler returns for one-dimensional Gaussian data, and of the truth.

    The sampler is affine in its start and its noise, so one run on a batch of unit inputs has all coefficients.
    """
    data = Mixture([1.0], [[0.4]], 0.5)
    m0, row = torch.zeros(3 + 4 * nfe, 2, dtype=F64), 3
    m0[1:3] = exact(0.0)[2].T

    def unit(x):
        nonlocal row
        e = torch.zeros_like(x)
        e[row : row + x.shape[1]] = torch.eye(x.shape[1])
        row += x.shape[1]
        return e

    x = agm_ref.SAMPLERS[name](process, data.net(process), m0, nfe, t_end=0.9, randn=unit)
    mean, cov, _ = exact(data.calls[-1])
    snr = mean @ torch.linalg.solve(cov, mean)
    return [float(x[0]), float((x[1:] - x[0]).square().sum())], [0.4, float(0.25 / (1 + 1 / (0.25 * snr)))]


@pytest.mark.parametrize("name", ["em", "splitting"])
def test_sde_samplers_converge_in_law(name):
    """Weak order one, no Monte Carlo error; the kick is an Euler step, so the symmetry of `splitting` adds nothing."""
    process = AGM(t0=1e-9)  # the law above starts at t = 0
    e = np.array([np.subtract(*agm_law(name, nfe, process)) for nfe in (24, 48)])
    assert np.abs(np.log2(e[0] / e[1]) - 1).max() < 0.3, e
    assert np.abs(e[1]).max() < 0.01, e


@pytest.mark.parametrize(("name", "nfe"), [("em", 100), ("splitting", 100), ("exponential", 40)])
@pytest.mark.parametrize("process", [ODE, SDE])
def test_samplers_reach_the_mixture(name, nfe, process):
    """One denoiser, whether the network learned the ODE's or the SDE's acceleration, through all three samplers."""
    torch.manual_seed(0)
    N, w, c = 10000, MIXTURE.weights, MIXTURE.centres
    x = agm_ref.SAMPLERS[name](process, MIXTURE.net(process), process.prior((N, 2)).double(), nfe)
    mode = torch.cdist(x, c).argmin(1)
    mean = w @ c
    cov = (c - mean).T @ (w[:, None] * (c - mean)) + MIXTURE.std**2 * torch.eye(2)
    gap = x - mean
    features = [x, (gap[:, :, None] * gap[:, None]).flatten(1), torch.nn.functional.one_hot(mode).double()]
    for feature, truth in zip(features, (mean, cov.flatten(), w), strict=True):  # mean, covariance, mode weights
        error = (feature.mean(0) - truth) / (feature.std(0) / math.sqrt(N))
        assert float(error.abs().max()) < 4, error  # four standard errors
    # the hop is a posterior mean, tau^2-ish narrower than the data, and steps are finite: 5 per cent for the width
    assert worst((x - c[mode]).std(0), torch.full((2,), MIXTURE.std, dtype=F64), relative=True) < 0.05


# --- contracts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", agm_ref.SAMPLERS)
def test_every_sampler_calls_the_network_nfe_times(name):
    m0 = randn64(0, 5, 4)
    for nfe in (1, 2, 3, 7):
        MIXTURE.calls.clear()
        agm_ref.SAMPLERS[name](ODE, MIXTURE.net(ODE), m0, nfe, rho=2, t_end=0.8)
        t = (1e-5**0.5 + (0.8**0.5 - 1e-5**0.5) * np.arange(nfe + 1) / max(nfe - (name != "splitting"), 1)) ** 2
        t = (t[1:] + t[:-1]) / 2 if name == "splitting" else t[:nfe]
        assert len(MIXTURE.calls) == nfe
        assert name == "ode" or worst(torch.tensor(MIXTURE.calls, dtype=F64), t) < 1e-12


BAD = [
    *(({"nfe": nfe}, "nfe") for nfe in (0, -1)),
    *(({"t_end": t}, "t_end") for t in (0.0, 1e-6, -0.5, 0.9995, 1.0, math.nan)),
    *(({"rho": rho}, "rho") for rho in (0, -1.0, math.nan)),
]


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [(name, *bad) for name in agm_ref.SAMPLERS for bad in BAD]
    + [(name, {"order": i}, "order") for name in ("exponential", "ode") for i in (0, 5, -1)],
)
def test_bad_options_are_refused_in_one_line(name, options, word):
    with pytest.raises(ValueError, match=rf"\A.*{word}.*\Z"):  # "." matches no line break
        agm_ref.SAMPLERS[name](ODE, lambda m, t, label: m[:, :2], randn64(0, 5, 4), **{"nfe": 5, **options})


def test_process_is_validated_and_frozen():
    for bad in ({"p": 0}, {"p": -3}, {"p": math.nan}, {"k": 1}, {"k": -1.0}, {"k": math.nan}, {"t0": 0.0}, {"t1": 1.0},
                {"t0": 0.5, "t1": 0.4}):  # fmt: skip
        with pytest.raises(ValueError, match=r"\A.*AGM.*\Z"):
            AGM(**bad)
    with pytest.raises(AttributeError):
        ODE.p = 2.0
    for t in (1.0, -1e-9, math.nan, torch.tensor([0.5, 1.0])):
        with pytest.raises(ValueError, match=r"\A.*time.*\Z"):
            ODE.cov(t)


def test_prior():
    m = ODE.prior((50000, 2, 1, 1), torch.Generator().manual_seed(0))
    assert m.shape == (50000, 4, 1, 1)
    assert m.dtype == torch.float32
    S = torch.tensor([[1.0, 0, -0.2, 0], [0, 1, 0, -0.2], [-0.2, 0, 1, 0], [0, -0.2, 0, 1]])
    assert worst(m.flatten(1).T.cov(), S) < 5 * math.sqrt(2 / 50000)  # five standard errors
    assert torch.equal(m, ODE.prior((50000, 2, 1, 1), torch.Generator().manual_seed(0)))


def test_free_motion_is_exact():
    def matrices(t, h):
        """State and noise matrices of free_motion, read off from unit vectors in float64."""
        e, nothing = torch.eye(2, dtype=F64), torch.zeros(2, 2, dtype=F64)
        move = agm_ref.free_motion
        return move(ODE, e, t, h, torch.zeros_like).T, move(ODE, nothing, t, h, lambda m: e).T

    u, weight = np.polynomial.legendre.leggauss(8)
    for t, h in [(1e-5, 0.5), (0.3, 0.01), (0.5, 0.4), (0.9, 0.05), (0.95, 0.05), (0.998, 5e-4), (0.998, 1e-3)]:
        ago = h / 2 * (1 - u)  # time from the kick to the end of the step
        kick = np.stack([ago, np.ones(8)]) * 3 * (1 - t - h + ago)
        A, L = matrices(t, h)
        assert worst(A, [[1.0, h], [0.0, 1.0]]) < 1e-15
        assert worst(L @ L.T, h / 2 * (kick * weight) @ kick.T, relative=True) < 1e-9
        (A1, L1), (A2, L2) = matrices(t, h / 2), matrices(t + h / 2, h / 2)
        assert worst(A2 @ A1, A) < 1e-15
        assert worst(A2 @ L1 @ L1.T @ A2.T + L2 @ L2.T, L @ L.T, relative=True) < 1e-9


def noise_per_image(seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda x: torch.stack([torch.randn(x.shape[1:], dtype=F64, generator=g) for g in generators]).to(x)


@pytest.mark.parametrize("name", agm_ref.SAMPLERS)
def test_points_images_dtypes_and_batches_agree(name):
    def run(m0, seeds):
        noise = {} if name in ("exponential", "ode") else {"randn": noise_per_image(seeds)}
        net = lambda m, t, label: torch.sin(m.chunk(2, 1)[0] - label * m.chunk(2, 1)[1])  # noqa: E731
        return agm_ref.SAMPLERS[name](ODE, net, m0, 6, label=0.5, **noise)

    m = randn64(0, 5, 2 * 3, 2, 4)
    x = run(m, range(5))
    assert x.shape == (5, 3, 2, 4)
    assert x.dtype == F64
    small = run(m.float(), range(5))
    assert small.dtype == torch.float32
    assert worst(small.double(), x) < 1e-4
    assert worst(run(m[3:4], [3]), x[3:4]) < 1e-12  # image 3 alone
    assert worst(run(m.view(5, 48), range(5)), x.view(5, 24)) < 1e-12  # an image is a point of 24 numbers


def test_mix_keeps_its_precision_under_autocast():
    A, m = randn64(0, 5, 2, 2), randn64(1, 5, 6, 4, 4)
    truth = torch.einsum("bij,bjk->bik", A, m.view(5, 2, -1)).view_as(m)
    assert worst(agm_ref.mix(A, m), truth) < 1e-14
    with torch.autocast("cpu", torch.bfloat16):
        y = agm_ref.mix(A, m.float())
    assert y.dtype == torch.float32
    assert worst(y.double(), truth) < 1e-5


def test_the_posterior_mean_sees_only_one_mirror():
    """E[x | m] is a function of y = r.m, and that of a plain denoiser of y = x + noise of variance 1/SNR."""
    for i, t in enumerate([0.01, 0.2, 0.5, 0.8, 0.99]):
        mean, cov, m = ODE.mean(t), ODE.cov(t), randn64(i, 50, 4)
        snr = mean @ torch.linalg.solve(cov, mean)
        r = torch.linalg.solve(cov, mean) / snr
        x1 = MIXTURE.posterior_mean(m, t)
        y = agm_ref.mix(r[None], m)
        variance = MIXTURE.std**2 + 1 / snr
        gap = y[:, None] - MIXTURE.centres
        share = torch.softmax(MIXTURE.weights.log() - gap.square().sum(-1) / (2 * variance), 1)
        denoised = (share[..., None] * (MIXTURE.centres + MIXTURE.std**2 / variance * gap)).sum(1)
        assert worst(x1, denoised) < 1e-9
        across = agm_ref.mix(torch.stack([-r[1], r[0]])[:, None] / r.norm(), randn64(9, 50, 2))  # leaves y alone
        assert worst(MIXTURE.posterior_mean(m + across, t), x1) < 1e-9
        assert worst(MIXTURE.posterior_mean(m + agm_ref.mix(mean[:, None], 0.1 * y), t), x1) > 1e-3  # and y does matter


# ---------------------------------------------------------------------------------------------------------------------
# HOLD: the process against independent references, the samplers with exact denoisers

ORDERS = [1, 2, 3, 4, 5, 6]


def start(P):
    """S0, written again."""
    return torch.diag(torch.tensor([0.0] + [P.alpha * P.L_inv] * (P.n - 1), dtype=F64))


def e_n(P):
    return torch.eye(P.n, dtype=F64)[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Process


@pytest.mark.parametrize(
    "kw",
    [{"order": n} for n in ORDERS]
    + [{"order": 3, "gamma": (1.0, 2.0), "xi": 4.0, "L_inv": 0.5, "alpha": 0.3, "T": 12.0}],
    ids=str,
)
def test_moments_solve_their_ode(kw):
    """mean' = F mean, cov' = F cov + cov F^T + 2 xi L_inv e_n e_n^T, by classical Runge-Kutta from t = 0."""
    P = HOLD(**kw)
    n, steps, t_end = P.n, 12000 if P.n > 4 else 4000, 2.0
    F = torch.zeros(n, n, dtype=F64)
    for i, g in enumerate(P.gamma):
        F[i, i + 1], F[i + 1, i] = g, -g
    F[-1, -1] = -P.xi
    noise = 2 * P.xi * P.L_inv * torch.outer(e_n(P), e_n(P))
    pick = torch.eye(n, dtype=F64)[0]

    def rate(y):  # rows 0..n-1: cov, row n: mean
        A = F @ y[:n]
        return torch.cat([A + A.T + noise, (F @ y[n])[None]])

    y, h, error = torch.cat([start(P), pick[None]]), t_end / steps, 0.0
    for k in range(steps):
        k1 = rate(y)
        k2 = rate(y + h / 2 * k1)
        k3 = rate(y + h / 2 * k2)
        k4 = rate(y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        if (k + 1) % (steps // 20) == 0:
            t = (k + 1) * h
            error = max(error, worst(P.cov(t), y[:n]), worst(P.mean(t), y[n]))
    assert error < 1e-9


@pytest.mark.parametrize("n", ORDERS)
def test_prior_is_stationary(n):
    for P in (HOLD(order=n, L_inv=0.7), HOLD(order=n, gamma=range(1, n), xi=n, L_inv=0.7, T=60.0)):
        F = P.drift()
        assert worst(F + F.mT, -2 * P.xi * torch.outer(e_n(P), e_n(P))) == 0
        # data of variance L_inv and auxiliaries at alpha = 1 are the prior, and must stay so
        P1 = HOLD(order=n, gamma=P.gamma, xi=P.xi, L_inv=P.L_inv, alpha=1.0, T=P.T)
        for t in (0.1, 1.0, 5.0):
            total = P1.cov(t) + P1.L_inv * torch.outer(P1.mean(t), P1.mean(t))
            assert worst(total, P1.L_inv * torch.eye(n, dtype=F64)) < 1e-12


@pytest.mark.parametrize("n", ORDERS)
def test_critical_eigenvalues_coincide(n):
    """(F - lam I)^n = 0; the eigenvalues themselves are known to rounding^(1/n) only."""
    P, lam = HOLD(order=n), -math.sqrt(max(2 * n - 3, 1))
    N = P.drift() - lam * torch.eye(n, dtype=F64)
    assert worst(torch.linalg.matrix_power(N, n), 0 * N) <= 1e-12 * float(torch.linalg.matrix_norm(N, 2)) ** n
    if n > 1:
        assert worst(torch.linalg.matrix_power(N, n - 1), 0 * N) > 0.1
    assert float((torch.linalg.eigvals(P.drift()) - lam).abs().max()) < 20 * 1e-15 ** (1 / n)


def test_critical_values_are_the_known_ones():
    known = {1: ((), 1), 2: ((1,), 2), 3: ((1, 8**0.5), 27**0.5), 4: ((1, 2, 5), 80**0.5)}
    known[5] = ((1, 3.2**0.5, 9.8**0.5, 56**0.5), 175**0.5)
    for n, (gamma, xi) in known.items():
        assert HOLD(order=n).gamma == pytest.approx(gamma, rel=1e-14)
        assert HOLD(order=n).xi == pytest.approx(xi, rel=1e-14)
    t = torch.tensor([0.0, 0.3, 2.0], dtype=F64)
    w = 3**0.5
    q = torch.stack([1 + w * t + t**2, -(t + w * t**2), 2**0.5 * t**2], -1) * torch.exp(-w * t)[:, None]
    assert worst(HOLD().mean(t), q) < 1e-14


def expm_pade(A):
    """exp(A) by scaling, the (6, 6) Pade approximant, squaring."""
    squarings = max(0, int(math.log2(float(A.abs().sum()) + 1e-300)) + 3)
    A, eye = A / 2**squarings, torch.eye(len(A), dtype=F64)
    c, N, M, power = 1.0, eye, eye, eye
    for k in range(1, 7):
        c, power = c * (6 - k + 1) / (k * (12 - k + 1)), power @ A
        N, M = N + c * power, M + (-1) ** k * c * power
    E = torch.linalg.solve(M, N)
    for _ in range(squarings):
        E = E @ E
    return E


@pytest.mark.parametrize(("gamma", "xi"), [((1.0,), 0.5), ((1.0, 2.0), 4.0), ((0.7, 1.3), 9.0), ((1.0, 2.0, 3.0), 5.0)])
def test_user_gamma_and_xi(gamma, xi):
    P = HOLD(order=len(gamma) + 1, gamma=list(gamma), xi=xi, T=100.0)
    assert P.gamma == gamma
    for t in (0.02, 0.5, 3.0, 20.0):
        E = expm_pade(P.drift() * t)
        assert worst(P.transition(t), E) < 1e-11
        cov = P.L_inv * torch.eye(P.n) + E @ (start(P) - P.L_inv * torch.eye(P.n)) @ E.T
        assert worst(P.cov(t), cov) < 1e-11
        assert worst(P.cholesky(t) @ P.cholesky(t).mT, cov) < 1e-11


def test_transition_at_critical_damping_equals_the_exponential():
    for n in ORDERS:
        P = HOLD(order=n)
        for t in (0.01, 0.5, 4.0):
            assert worst(P.transition(t), expm_pade(P.drift() * t)) < 1e-11


DIGITS50 = {  # (n, t): rows of the lower factor, row by row
    (1, 1e-5): [0.0044721135944129736145],
    (1, 1e-3): [0.04469900818437623057],
    (1, 0.1): [0.42575726291164798089],
    (1, 1): [0.92987349503219377874],
    (1, 3): [0.9987598549317716953],
    (1, 6): [0.99999692788910440322],
    (2, 1e-5): [2.0003133039935239103e-6, 0.20006265786518724775, 0.0036513224900124892231],
    (2, 1e-3): [0.00020310444327768446911, 0.20618044188638546393, 0.036358140992341370613],
    (2, 0.1): [0.038418401139210949289, 0.50293726963352787967, 0.31972138134531066021],
    (2, 1): [0.5733559061755630404, 0.47208123882192183468, 0.80112671951180539121],
    (2, 3): [0.96898067388722512563, 0.04543190575823404199, 0.98290831921943711787],
    (2, 6): [0.99974326185063927881, 0.00043512194701906115845, 0.99981556195514957075],
    (3, 1e-5): [
        1.9999999999001004561e-6,
        0.19999999997004018214,
        2.8302880434544652029e-6,
        -2.8260267474074947047e-6,
        0.2001973557230841578,
        0.0045584752020181873957,
    ],
    (3, 1e-3): [
        0.00019999991001711713555,
        0.19999974003973813859,
        0.0003008072151546799945,
        -0.00025896001862534249892,
        0.21883758358224275132,
        0.045110644913153697928,
    ],
    (3, 0.1): [
        0.020644921524853522027,
        0.22438783036962569532,
        0.085387953318271845551,
        0.11027542785859064792,
        0.68862060907280915391,
        0.40017143132388813482,
    ],
    (3, 1): [
        0.52881404447159519892,
        0.6146680911228115886,
        0.61812310232460789496,
        -0.21628249102750605417,
        0.41434091600465612386,
        0.84151894368137282815,
    ],
    (3, 3): [
        0.98892669431428328945,
        0.025410523969558802187,
        0.98519145820920491555,
        -0.016763613240415338879,
        0.019715373923211558809,
        0.99336161356079234323,
    ],
    (3, 6): [
        0.99999566442450967376,
        0.000012282291885583292969,
        0.99999130019483138871,
        -9.0643018136514934318e-6,
        0.000012841756072075632716,
        0.9999952608915117717,
    ],
    (4, 0.02): [
        0.0039994678150894881774,
        0.19992033348882043838,
        0.0040149330620242846199,
        -0.0039753770380711274506,
        0.20182602266404758009,
        0.015857371762875942396,
        0.00036619255237079382517,
        0.02935314516288880764,
        0.53135189526062482367,
        0.21124374063772559653,
    ],
    (4, 0.1): [
        0.019945312732047444856,
        0.19866996280407675239,
        0.025671355031620772467,
        -0.011374905119144866365,
        0.31880696559173380774,
        0.10597826034971316326,
        0.016104347031355091975,
        0.30355617173013346365,
        0.7126481957863367567,
        0.43863497953382579129,
    ],
    (4, 1): [
        0.42712179253789560402,
        0.66924951405738342185,
        0.48306579255680799133,
        -0.11105611700311044412,
        0.61544367590674477158,
        0.63552185905619250884,
        -0.015897336757866833966,
        -0.21279061903772886035,
        0.38595023866074872891,
        0.85861756804179312937,
    ],
    (4, 3): [
        0.99017398977155530998,
        0.026361260784953150362,
        0.98200680395867163893,
        -0.024837257266062706524,
        0.034310020234233039716,
        0.98332347298900095215,
        0.015464848921006920293,
        -0.021394902570429093902,
        0.020997464036186146744,
        0.99330870910074758738,
    ],
    (4, 6): [
        0.99999929399871780278,
        2.4819831329422097513e-6,
        0.99999781833348118202,
        -2.8337365399270682033e-6,
        4.9821605442048694955e-6,
        0.99999715544404834877,
        1.9478895453911855025e-6,
        -3.4248540360964630416e-6,
        3.9109553317160630581e-6,
        0.99999865569137014176,
    ],
    (5, 0.02): [
        0.003999520071237228444,
        0.19992801788015079431,
        0.0035772650119408341973,
        -0.0035757332331923463122,
        0.19992778662701296887,
        0.0042443090570791308677,
        0.00007531433727368439897,
        -0.0040097143014731490267,
        0.20651965482011665663,
        0.021035049583518102468,
        2.7565472022901268896e-6,
        0.0013586398945961877995,
        0.078775659678468690739,
        0.61120288880220866338,
        0.22794147194618825384,
    ],
    (5, 0.1): [
        0.019940353884644155938,
        0.19822106475504346118,
        0.017996479400706712391,
        -0.017447635085302207226,
        0.20402092096248223767,
        0.037331773027672980885,
        0.0030328335143480480037,
        0.029652480461591674326,
        0.44757617564167255453,
        0.11422123819390008901,
        0.00062372816072572524831,
        0.045072923767956226429,
        0.35572495005261863894,
        0.70975055322665800056,
        0.45706155938161510356,
    ],
    (5, 1): [
        0.33071983692250150589,
        0.63089714981485554094,
        0.40541621588350871641,
        0.10448825172940720053,
        0.61949885811417756203,
        0.54236143243732623803,
        -0.18852831243836519694,
        -0.12560185789795324117,
        0.56067484057232314196,
        0.69001372500192708954,
        0.11063780665595684943,
        0.0084612521789663526756,
        -0.22142759675622313947,
        0.33645279373119058255,
        0.88119427266143607802,
    ],
    (5, 3): [
        0.98859838532234031907,
        0.032911483589395232302,
        0.9757031863419187746,
        -0.034621825718445652574,
        0.051977086055413252724,
        0.97134822054231200463,
        0.029609549920514068197,
        -0.044597319653041022695,
        0.050029104109729556981,
        0.97754826272739902339,
        -0.017750187435501827161,
        0.026782521836210156414,
        -0.030089169985691294964,
        0.0273454773172726294,
        0.99153858661432564602,
    ],
    (5, 6): [
        0.99999973554848503353,
        1.0602378220528578606e-6,
        0.99999893717688018731,
        -1.4535110866610529976e-6,
        2.9144259329615265159e-6,
        0.99999800187780156075,
        1.4947705425975049478e-6,
        -2.9973757100889250588e-6,
        4.1102239039377714818e-6,
        0.99999788618578230247,
        -9.8519430885443725078e-7,
        1.9756262603803418708e-6,
        -2.7092039927539858317e-6,
        2.7866480967682035946e-6,
        0.99999908157754260815,
    ],
    (6, 0.02): [
        0.0039995429132986371927,
        0.19993144260965418616,
        0.0033803080000887163833,
        -0.0033791106910267591808,
        0.19994058926893389099,
        0.0035128199750291133711,
        0.000059344793599416088878,
        -0.0035111114144325025685,
        0.19993923626210014008,
        0.0045926542965334307613,
        -1.2768615672563535595e-6,
        0.000083040959446455062051,
        -0.0037134067491190752596,
        0.21612619514596113323,
        0.025602064224995379522,
        1.5567566547606722147e-7,
        0.000028277275938903569505,
        0.0037366318403765134823,
        0.14869980009211906556,
        0.66796750122658548273,
        0.24133247688883528698,
    ],
    (6, 0.1): [
        0.019943033319735212278,
        0.19829456759026629656,
        0.016867342815645591089,
        -0.016712992742226754828,
        0.19865777823997193987,
        0.018435510667308081969,
        0.0014956031792390139087,
        -0.015418334353678650254,
        0.22312247686676710764,
        0.051220538194191358024,
        -0.000016574204354113689176,
        0.0096185911119945455395,
        0.13180609892869138962,
        0.56037311398887899558,
        0.12791729087608133545,
        0.000057678352248655676204,
        0.0020014490814597835527,
        0.064098396666547387009,
        0.29826930629388863699,
        0.72739124738816380997,
        0.47409125641946806156,
    ],
    (6, 1): [
        0.25557282951543221004,
        0.51993599441145787385,
        0.37654614408278534705,
        0.26729307335649327828,
        0.58881049317696999114,
        0.47417874386102143139,
        -0.1986485735456281306,
        -0.045009556280780981965,
        0.65252932082826252568,
        0.5580841048558769627,
        0.065941456615189136016,
        -0.062960117546252546147,
        -0.22512567282829081575,
        0.57287834875709005797,
        0.69021898323835536386,
        -0.010510460661082169043,
        0.047511195429577083537,
        0.068438710252983055918,
        -0.23736153209429348212,
        0.3380919379847173451,
        0.88104642661783707943,
    ],
    (6, 3): [
        0.98528973941389168279,
        0.043897789754032762346,
        0.96622210488849852663,
        -0.048113386727711021362,
        0.075819241047149403452,
        0.95548005638844542643,
        0.044624290645512499822,
        -0.070724543633182524492,
        0.085431567913636834565,
        0.95698162284395119566,
        -0.035745295642066212415,
        0.05690230405192636445,
        -0.069006726775452011699,
        0.071283287520091868378,
        0.96928281489863867607,
        0.020819457614959014353,
        -0.033222290745341060866,
        0.040376351902465505271,
        -0.041780432724371521639,
        0.036622017304672108972,
        0.98884530737703850915,
    ],
    (6, 6): [
        0.99999984664778644893,
        6.7348599497912366326e-7,
        0.9999992604396031916,
        -1.0330161149209872221e-6,
        2.2690156901646307742e-6,
        0.99999825944493555586,
        1.2511727972071477544e-6,
        -2.7484659784361858258e-6,
        4.2170279991863297478e-6,
        0.9999974455724867004,
        -1.2073627737804408832e-6,
        2.6524056550760967196e-6,
        -4.0698673344000007989e-6,
        4.9307911824463455361e-6,
        0.99999762045745603947,
        7.7400060479514400681e-7,
        -1.7004278521808589223e-6,
        2.6092204761278249644e-6,
        -3.161233816791115054e-6,
        3.0511984875562622891e-6,
        0.99999902188152525545,
    ],
}


@pytest.mark.parametrize("case", DIGITS50, ids=str)
def test_cholesky_has_its_digits(case):
    """Relative error of every entry against 50-digit arithmetic (bench/hold_digits50.py), no jitter."""
    n, t = case
    L = HOLD(order=n).cholesky(t)
    rows = torch.tril_indices(n, n)
    known = torch.tensor(DIGITS50[case], dtype=F64)
    assert float(((L[rows[0], rows[1]] - known) / known).abs().max()) < 1e-9
    assert worst(L.triu(1), 0 * L) == 0


def test_shapes_of_coefficients():
    P, t = HOLD(), torch.rand(2, 5)
    assert P.mean(t).shape == P.kappa(t).shape == (2, 5, 3)
    assert P.cov(t).shape == P.cholesky(t).shape == P.transition(t).shape == (2, 5, 3, 3)
    assert P.snr(t).shape == (2, 5)
    assert P.cov(t).dtype == F64
    assert worst(P.cholesky(t)[1, 2], P.cholesky(float(t[1, 2]))) < 1e-14


def test_order_1_is_the_ou_process():
    P, t = HOLD(order=1, L_inv=0.8), torch.linspace(0.001, 6, 50, dtype=F64)
    assert worst(P.mean(t)[:, 0], torch.exp(-t)) < 1e-14
    assert worst(P.cov(t)[:, 0, 0], 0.8 * (1 - torch.exp(-2 * t))) < 1e-14


def test_order_2_is_critically_damped_langevin():
    """CLD with unit mass, friction 2, by hand: exp(F t) = e^-t [[1 + t, t], [-t, 1 - t]]."""
    P, t = HOLD(order=2), torch.linspace(0.01, 6, 50, dtype=F64)
    decay, a = torch.exp(-2 * t), P.alpha
    qq = 1 + decay * (a * t**2 - (1 + t) ** 2 - t**2)
    qp = decay * (a * t * (1 - t) + (1 + t) * t - t * (1 - t))
    pp = 1 + decay * (a * (1 - t) ** 2 - t**2 - (1 - t) ** 2)
    assert worst(P.mean(t), torch.stack([1 + t, -t], -1) * torch.exp(-t)[:, None]) < 1e-14
    assert worst(P.cov(t), torch.stack([torch.stack([qq, qp], -1), torch.stack([qp, pp], -1)], -2)) < 1e-13


@pytest.mark.parametrize("n", ORDERS)
def test_snr_at_T_and_time_of(n):
    P = HOLD(order=n)
    assert float(P.snr(P.T)) <= 1e-3
    for snr in (1e-3, 1.0, 1e3):
        t = P.time_of(snr)
        x = torch.linalg.solve(P.cov(t), P.mean(t)) @ P.mean(t)
        assert abs(float(x) / snr - 1) < 1e-6
    known = {1: 3.454, 2: 5.615, 3: 4.272, 4: 4.041, 5: 4.002, 6: 4.029}
    assert abs(P.time_of(1e-3) - known[n]) < 1e-3
    assert P.t_min >= (1e-5 if n <= 3 else 0.02)  # where cholesky is tested


def test_clock_table_is_inverted():
    P = HOLD()
    clock = torch.linspace(float(P.clock(P.T)), float(P.clock(P.t_min)), 777, dtype=F64)
    t, slope = P.time(clock)
    assert worst(P.clock(t), clock) < 1e-4
    inner = slice(1, -1)
    exact = (P.time(clock + 1e-9)[0] - P.time(clock - 1e-9)[0]) / 2e-9
    assert float((slope[inner] / exact[inner] - 1).abs().median()) < 1e-4
    assert abs(float(t[0]) - P.T) < 1e-12
    assert abs(float(t[-1]) - P.t_min) < 1e-9


@pytest.mark.parametrize("n", ORDERS)
def test_kappa_rate(n):
    P = HOLD(order=n)
    for t in (1.2 * P.t_min, 0.8, 3.0):
        h = 1e-3 * t  # 4th order central difference
        a, b = (P.kappa(t + k * h) - P.kappa(t - k * h) for k in (1, 2))
        assert worst(P.kappa_rate(t), (8 * a - b) / (12 * h)) < 1e-6 * max(1.0, float(P.kappa_rate(t).norm()))


# ---------------------------------------------------------------------------------------------------------------------
# Loss and hop


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_target_is_the_score_of_the_last_block(n):
    """eps_n of the training pair = -L_nn grad_n log p(m | x), the gradient by autograd through cov's own inverse."""
    torch.manual_seed(0)
    P = HOLD(order=n, L_inv=0.6)
    t, x = torch.tensor([P.t_min, 0.7, 3.0], dtype=F64), torch.randn(3, 2, dtype=F64)
    eps = torch.randn(3, 2 * n, dtype=F64)
    m, target = hold_ref.training_pair(P, x, t, eps)
    assert worst(target, eps[:, -2:]) == 0
    for i in range(3):
        state = m[i].reshape(n, 2).clone().requires_grad_()
        mean = P.mean(t[i])[:, None] * x[i]
        law = torch.distributions.MultivariateNormal(torch.zeros(n, dtype=F64), P.cov(t[i]))
        score = torch.autograd.grad(law.log_prob((state - mean).T).sum(), state)[0][-1]
        assert worst(-P.cholesky(t[i])[-1, -1] * score, target[i]) < 1e-6


def test_hop_round_trip():
    torch.manual_seed(0)
    for n in (1, 2, 3, 4):
        P = HOLD(order=n)
        x, eps = torch.randn(4, 3, 2, 2, dtype=F64), torch.randn(4, 3 * n, 2, 2, dtype=F64)
        for t in (P.t_min, 0.5, 3.0, P.T):
            m, eps_n = hold_ref.training_pair(P, x, torch.full((4,), t, dtype=F64), eps)
            assert worst(hold_ref.hop(P, eps_n, m, t), x) < 1e-9
            assert worst(hold_ref.noise(P, x, m, t), eps_n) < 1e-9
            other = torch.randn_like(x)
            assert worst(hold_ref.hop(P, hold_ref.noise(P, other, m, t), m, t), other) < 1e-9


def test_loss_of_a_zero_net_and_weights():
    """|eps_n|^2 = 1 on average, so the loss of net = 0 is the mean weight; for `likelihood` that is the integral of
    xi L_inv / L_nn^2 over [t_min, T], divided by its length, here by Simpson's rule in log t."""
    torch.manual_seed(0)
    P, zero = HOLD(order=2, L_inv=0.5, snr_max=1e3), lambda m, t, label=None: torch.zeros_like(m[:, :2])
    x = torch.randn(40000, 2)
    assert abs(float(hold_ref.loss(P, zero, x)) - 1) < 0.02
    s = torch.linspace(math.log(P.t_min), math.log(P.T), 4001, dtype=F64)
    y = P.xi * P.L_inv / P.cov(s.exp()).inverse()[:, -1, -1] ** -1 * s.exp()  # 1 / L_nn^2 = (cov^-1)_nn
    simpson = float((y[:-2:2] + 4 * y[1:-1:2] + y[2::2]).sum() * (s[1] - s[0]) / 3) / (P.T - P.t_min)
    got = float(hold_ref.loss(P, zero, x, weight="likelihood"))
    assert abs(got / simpson - 1) < 0.03


def test_loss_runs_under_autocast_and_backward():
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = hold_ref.loss(HOLD(), lambda m, t, label=None: net(m), torch.randn(16, 2))
    value.backward()
    assert value.dtype == torch.float32
    assert float(net.weight.grad.abs().max()) > 0


def test_prior_is_reproducible_and_has_its_variance():
    P = HOLD(order=2, L_inv=0.25)
    a, b = (P.prior((5000, 3, 2, 2), torch.Generator().manual_seed(1)) for _ in range(2))
    assert a.shape == (5000, 6, 2, 2)
    assert a.dtype == torch.float32
    assert torch.equal(a, b)
    assert abs(float(a.std()) - 0.5) < 0.005


# ---------------------------------------------------------------------------------------------------------------------
# Samplers with exact denoisers, as networks: the posterior mean is computed from cov and mean with dense solves


class ExactNet:
    """eps_n for data drawn from an equal mixture of N(c, s^2 I), c the rows of centres (K, d). Counts its calls."""

    def __init__(self, P, centres, s):
        self.P, self.centres, self.s, self.times = P, centres, s, []

    def __call__(self, m, t, label=None):
        P, s, n = self.P, self.s, self.P.n
        assert t.shape == (len(m),)
        assert t.dtype == m.dtype
        self.times.append(float(t[0]))
        mean, L = P.mean(self.times[-1]), P.cholesky(self.times[-1])
        white = torch.linalg.solve_triangular(L, m.reshape(len(m), n, -1).to(F64), upper=False)  # (B, n, d)
        kappa = torch.linalg.solve_triangular(L, mean[:, None], upper=False)
        snr = float(kappa.square().sum())
        y = (white * kappa).sum(1) / snr  # x + noise of variance 1/snr
        p = torch.softmax(-torch.cdist(y, self.centres).square() / 2 / (s**2 + 1 / snr), -1)
        x = (p @ self.centres / snr + s**2 * y) / (s**2 + 1 / snr)
        return (white[:, -1] - kappa[-1] * x).to(m)


MODES = torch.tensor([[0.8, 0.0], [-0.6, 0.5], [0.0, -0.9]], dtype=F64)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", hold_ref.SAMPLERS)
def test_hold_samplers_reach_the_mixture(name, n):
    """Mean, covariance and mode weights at many calls, to 4.5 standard errors of 6,000 draws."""
    torch.manual_seed(n)
    N, s, P = 6000, 0.1, HOLD(order=n, L_inv=0.5 if n == 2 else 1.0)
    calls = {"ode": 40, "strang": 60, "lie": 100, "em": 200}[name]
    m0 = P.prior((N, 2)).to(F64)
    x = hold_ref.SAMPLERS[name](P, ExactNet(P, MODES, s), m0, calls)
    weights = torch.bincount(torch.cdist(x, MODES).argmin(1), minlength=3) / N
    assert worst(weights, torch.full((3,), 1 / 3)) < 4.5 * math.sqrt(2 / 9 / N)
    assert worst(x.mean(0), MODES.mean(0)) < 4.5 * 0.7 / math.sqrt(N)
    assert worst(torch.cov(x.T), torch.cov(MODES.T, correction=0) + s**2 * torch.eye(2)) < 4.5 * 0.7 / math.sqrt(N)
    inside = torch.cdist(x, MODES).min(1).values.square().mean() / 2
    assert abs(float(inside.sqrt()) / s - 1) < 0.06  # .006 is chance, the rest the methods' bias


@pytest.mark.parametrize("name", hold_ref.SAMPLERS)
def test_call_counts_labels_and_images(name):
    P, seen = HOLD(), []

    def net(m, t, label=None):
        seen.append(label)
        return 0.1 * m[:, :3]

    torch.manual_seed(0)
    for nfe in (1, 2, 5, 10):
        seen.clear()
        x = hold_ref.SAMPLERS[name](P, net, P.prior((2, 3, 4, 4)), nfe, label="a")
        assert seen == ["a"] * nfe
        assert x.shape == (2, 3, 4, 4)
        assert x.dtype == torch.float32
        assert bool(x.isfinite().all())


def hold_law(P, name, nfe, mu=0.5, s=0.6, **options):
    """Exact mean and variance of a sampler's output on N(mu, s^2) data, from the exact marginal at T, and the time of
    its last call. Every step is affine, so a batch of unit noises gives the map's columns one by one."""
    n, net = P.n, ExactNet(P, torch.tensor([[mu]], dtype=F64), s)
    calls = {"em": nfe - 1, "lie": n * nfe, "strang": n * (2 * nfe - 1)}[name]
    root = torch.linalg.cholesky(P.cov(P.T) + s**2 * torch.outer(P.mean(P.T), P.mean(P.T)))
    m0 = P.mean(P.T) * mu + torch.cat([torch.zeros(1, n, dtype=F64), root.T, torch.zeros(calls, n, dtype=F64)])
    row = [1 + n]

    def randn(v):
        unit = torch.zeros_like(v)
        unit[row[0] : row[0] + v.shape[1]] = torch.eye(v.shape[1], dtype=F64)
        row[0] += v.shape[1]
        return unit

    x = hold_ref.SAMPLERS[name](P, net, m0, nfe, randn=randn, **options)[:, 0]
    assert row[0] == len(m0)
    assert len(net.times) == nfe
    return float(x[0]), float((x[1:] - x[0]).square().sum()), net.times[-1]


def law_errors(P, name, calls, mu=0.5, s=0.6, **options):
    """(calls, 2): errors of mean and variance; the exact output is the posterior mean at the last call's time."""
    errors = []
    for nfe in calls:
        mean, var, t = hold_law(P, name, nfe, mu, s, **options)
        errors.append([abs(mean - mu), abs(var - s**4 / (s**2 + 1 / float(P.snr(t))))])
    return torch.tensor(errors, dtype=F64)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_weak_order_of_the_splittings(n):
    P = HOLD(order=n, L_inv=0.8)
    t_end = P.time_of(100.0)
    strang, lie = (law_errors(P, name, [80, 160], t_end=t_end) for name in ("strang", "lie"))
    assert bool((torch.log2(strang[0] / strang[1]) - 2).abs().max() < 0.2)
    # at order 3 lie's mean error is small and still nears slope 1 from above, so there the variance alone is judged
    assert abs(math.log2(lie[0, 1] / lie[1, 1]) - 1) < 0.25
    if n < 3:
        assert abs(math.log2(lie[0, 0] / lie[1, 0]) - 1) < 0.25
    assert bool((strang[1] < lie[1]).all())


def test_em_converges_weakly_at_order_1():
    P = HOLD(order=2)
    em = law_errors(P, "em", [80, 160], t_end=P.time_of(100.0))
    assert bool((torch.log2(em[0] / em[1]) - 1).abs().max() < 0.25)


def module_of(process):
    return agm_ref if isinstance(process, AGM) else hold_ref


def answering(P, x_of, seen):
    """A denoiser network that answers x_of(root), root = sqrt(SNR) (B, 1), and notes what it saw: y / sigma, root."""

    def net(u, time, label=None):
        root, s = (1 / time - 1).double()[:, None], P.sigma_data
        c = (1 + s**2 * root**2) ** -0.5
        seen.append((u.double() / c, float(root[0, 0])))
        return (x_of(root) - s**2 * root * c * u) / (s * c)

    return net


def time_at(P, root):
    """The time at which sqrt(SNR) is root."""
    return agm_ref.noise_time(P, 1 / root) if isinstance(P, AGM) else P.time_of(root**2)


@pytest.mark.parametrize("process", [AGM(), HOLD(order=1), HOLD(order=3)], ids=repr)
def test_ode_orders(process):
    """The distance to the end of the flow, which 320 calls reach, on a mixture with an exact denoiser: slopes 1 and 2;
    orders 3 and 4 keep slope 2, as their first steps are of lower order, with a smaller error."""
    module, P = module_of(process), dataclasses.replace(process, param="denoiser")
    net = edm_net(0.5, torch.full((2,), 0.5, dtype=F64), torch.tensor([[0.8, 0.0], [-0.6, 0.5]], dtype=F64), 0.2)
    t_end, m0 = time_at(P, 10.0), P.prior((100, 2), torch.Generator().manual_seed(1)).double()
    end = module.ode(P, net, m0, 320, order=3, t_end=t_end)
    error = {
        (nfe, order): float((module.ode(P, net, m0, nfe, order=order, t_end=t_end) - end).square().mean().sqrt())
        for nfe, order in [(40, 1), (80, 1), (40, 2), (80, 2), (80, 3), (80, 4)]
    }
    for order in (1, 2):
        assert abs(math.log2(error[40, order] / error[80, order]) - order) < 0.15
    assert max(error[80, 3], error[80, 4]) < error[80, 2] < error[80, 1] / 10


def test_bound_keeps_the_data_prediction_in_range():
    """A stray eps_n near T is a huge x; the bound stops it there and leaves every prediction within it alone."""
    free, P = HOLD(), HOLD(bound=1.0)
    m = torch.randn(50, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    for t in (P.T, 0.5):
        x = hold_ref.denoise(free, lambda m, t, label=None: 0.3 * m[:, 4:], m, t)
        kept = hold_ref.denoise(P, lambda m, t, label=None: 0.3 * m[:, 4:], m, t)
        assert x.abs().max() > 1
        assert worst(kept, x.clamp(-1, 1)) == 0
    with pytest.raises(ValueError, match="bound"):
        HOLD(bound=0.0)


@pytest.mark.parametrize("process", [AGM(), *(HOLD(order=n) for n in (1, 2, 3, 4))], ids=repr)
def test_ode_integrates_a_polynomial_of_lambda_exactly(process):
    """A data prediction that is a line (parabola) in lambda: order 2 (3) has it exactly after its first step (two).
    Against sums over 20,000 parts of every step of kappa, at what the last call sees."""
    P, R = dataclasses.replace(process, sigma_data=0.7, param="denoiser"), 0.7 * math.sqrt(2)
    powers = [[0.3, -0.5], [0.2, 0.1], [-0.05, 0.02]]

    def polynomial(c, degree):  # (..., 2)
        return sum(torch.tensor(powers[k], dtype=F64) * c[..., None] ** k for k in range(degree + 1))

    m0 = randn64(P.n, 3, 2 * P.n)
    for order in (1, 2, 3):
        seen, degree = [], order - 1
        net = answering(P, lambda root, degree=degree: polynomial(torch.log1p(R * root[:, 0]), degree), seen)
        module_of(P).ode(P, net, m0, 5, order=order)
        ts = [time_at(P, root) for _, root in seen]
        z = hold_ref.mix(torch.linalg.inv(P.cholesky(ts[0])), m0)
        for i, (a, b) in enumerate(pairwise(ts)):
            u = torch.linspace(0, 1, 20001, dtype=F64)
            u = a + (b - a) * u * (2 - u)  # short steps near the data
            kappa = P.kappa(u)
            clock = torch.log1p(R * kappa.norm(dim=-1))
            truth, nodes = polynomial(clock, degree), [math.log1p(R * root) for _, root in seen[: i + 1]][-order:]
            V = torch.tensor(nodes, dtype=F64)[:, None] ** torch.arange(len(nodes), dtype=F64)
            fit = torch.linalg.solve(V, polynomial(torch.tensor(nodes, dtype=F64), degree))  # (p, 2) coefficients
            line = clock[:, None] ** torch.arange(len(nodes), dtype=F64) @ fit
            if len(nodes) == order:
                assert worst(line, truth) < 1e-9
            step = (kappa.diff(dim=0).T @ (line[1:] + line[:-1])) / 2  # (n, 2)
            z = z + step.reshape(1, -1)
        w, snr = P.project(ts[-1])
        u, c = hold_ref.mix(w[None], hold_ref.mix(P.cholesky(ts[-1]), z)), (1 + P.sigma_data**2 * snr) ** -0.5
        assert worst(c * seen[-1][0], c * u) < 1e-5


@pytest.mark.parametrize("process", [AGM(), HOLD(order=1), HOLD(), HOLD(order=4)], ids=repr)
@pytest.mark.parametrize("eta", [0.6, 1.0])
def test_eta_renews_the_noise(process, eta):
    """With a denoiser that always answers x = 0.4, z - kappa x shrinks by keep = (sigma'/sigma)^(eta^2) a step and gets
    fresh noise of variance 1 - keep^2. At eta = 1 and n = 1, that is the posterior of
    y' = x + sigma' noise given x and y, of mean x + (sigma'/sigma)^2 (y - x)."""
    P = dataclasses.replace(process, sigma_data=0.7, param="denoiser")
    answer, seen, draws = 0.4, [], []

    def randn(z):
        draws.append(randn64(len(draws), *z.shape))
        return draws[-1]

    m0 = randn64(9, 3, 2 * P.n)
    module_of(P).ode(P, answering(P, lambda root: answer, seen), m0, 6, eta=eta, randn=randn)
    assert len(seen) == 6 and len(draws) == 5
    ts = [time_at(P, root) for _, root in seen]
    z, kappa = hold_ref.mix(torch.linalg.inv(P.cholesky(ts[0])), m0), P.kappa(torch.tensor(ts, dtype=F64))
    for i, (a, b) in enumerate(pairwise(kappa)):
        z_hat = z - answer * a.repeat_interleave(2)
        keep = (seen[i][1] / seen[i + 1][1]) ** eta**2
        z = answer * b.repeat_interleave(2) + keep * z_hat + math.sqrt(1 - keep**2) * draws[i]
        assert worst(seen[i + 1][0], hold_ref.mix(b[None] / b.norm(), z)) < 1e-5
        if P.n == 1 and eta == 1.0:
            (u, root), root2 = seen[i], seen[i + 1][1]
            mean = answer + (root / root2) ** 2 * (u / root - answer)
            noise = (1 - (root / root2) ** 2) ** 0.5 / root2 * draws[i]
            assert worst(seen[i + 1][0] / root2, mean + noise) < 1e-5 / root2


@pytest.mark.parametrize("process", [AGM(), HOLD()], ids=repr)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_eta_keeps_the_law(process, eta):
    """40 calls on an exact mixture in one dimension: the weight, mean and spread of its modes, to four standard errors
    of 20,000 samples and, for the spread, the error of the steps (1 %)."""
    P = dataclasses.replace(process, param="denoiser")
    n = 20_000
    net = edm_net(0.5, torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([[0.8], [-0.6]], dtype=F64), 0.1)
    generator = torch.Generator().manual_seed(5)
    m0 = P.prior((n, 1), generator).double()
    noise = iter(torch.randn(39, *m0.shape, generator=generator, dtype=F64))
    x = module_of(P).ode(P, net, m0, 40, eta=eta, randn=lambda z: next(noise))[:, 0]
    right, left = x[x > 0.1], x[x < 0.1]
    assert abs(len(right) / n - 0.3) < 4 * math.sqrt(0.3 * 0.7 / n)
    for part, mean in ((right, 0.8), (left, -0.6)):
        assert abs(part.mean() - mean) < 4 * 0.1 / math.sqrt(len(part))
        assert abs(part.std() - 0.1) < 4 * 0.1 / math.sqrt(2 * len(part)) + 0.001


@pytest.mark.parametrize("process", [AGM(), HOLD()], ids=repr)
def test_ode_grid_is_even_in_its_own_lambda(process):
    """lambda = log(1 + sigma_data sqrt(d SNR)), from the prior to noise of std 1/(3 nfe)."""
    P, seen = dataclasses.replace(process, sigma_data=0.7, param="denoiser"), []
    start = P.t0 if isinstance(P, AGM) else P.T

    def net(u, time, label=None):
        seen.append(float(1 / time[0] - 1))
        return torch.zeros_like(u)

    module_of(P).ode(P, net, P.prior((2, 3, 4, 4)), 7)
    clock = torch.log1p(0.7 * math.sqrt(48) * torch.tensor(seen, dtype=F64))
    assert worst(clock, torch.linspace(float(clock[0]), float(clock[-1]), 7, dtype=F64)) < 1e-4
    assert abs(seen[-1] - 21) < 1e-2 and abs(seen[0] ** 2 / float(P.project(start)[1]) - 1) < 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# The denoiser: one network for every process


PROCESSES = [(agm_ref, AGM), (hold_ref, HOLD)]


def edm_net(s, weights, centres, std):
    """What a perfectly trained network puts out for the mixture, given c_in y and sigma / (1 + sigma)."""

    def net(v, time, label=None):
        sigma = (time / (1 - time)).double()[:, None]
        y = v.double() * (sigma**2 + s**2).sqrt()
        gaps, var = y[:, None] - centres, (std**2 + sigma**2)[..., None]
        share = torch.softmax(weights.log() - gaps.square().sum(-1) / (2 * var[..., 0]), 1)
        x = (share[..., None] * (centres + std**2 / var * gaps)).sum(1)
        return ((x - s**2 / (sigma**2 + s**2) * y) * (sigma**2 + s**2).sqrt() / (sigma * s)).to(v)

    return net


EDM_NET = edm_net(0.5, MIXTURE.weights, MIXTURE.centres, MIXTURE.std)


@pytest.mark.parametrize("sde", [False, True])
def test_a_denoiser_is_the_posterior_mean_of_agm(sde):
    """Proposition 3.1 of TADA: E[x1 | m] by Bayes in phase space is that of the plain denoiser at y."""
    P = AGM(sde=sde, param="denoiser")
    for i, t in enumerate([1e-5, 0.01, 0.2, 0.5, 0.8, 0.99]):
        m = agm_ref.mix(P.cholesky(t), randn64(i, 50, 4)) + agm_ref.mix(P.mean(t)[:, None], randn64(i + 9, 50, 2))
        assert worst(agm_ref.denoise(P, EDM_NET, m, t), MIXTURE.posterior_mean(m, t)) < 1e-8


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_a_denoiser_is_the_posterior_mean_of_hold(n):
    P, paper = HOLD(order=n, param="denoiser"), HOLD(order=n)
    centres = torch.tensor([[0.8, 0.0], [-0.6, 0.5]], dtype=F64)
    net = edm_net(0.5, torch.full((2,), 0.5, dtype=F64), centres, 0.2)
    for i, t in enumerate([0.2, 0.6, 1.5, 4.0]):
        m = hold_ref.mix(P.cholesky(t), randn64(i, 50, 2 * n)) + hold_ref.mix(P.mean(t)[:, None], randn64(i + 9, 50, 2))
        truth = hold_ref.denoise(paper, ExactNet(paper, centres, 0.2), m, t)
        assert worst(hold_ref.denoise(P, net, m, t), truth) < 1e-7


@pytest.mark.parametrize(
    "process", [AGM(param="denoiser"), *(HOLD(order=n, param="denoiser") for n in (1, 2, 3, 4))], ids=repr
)
def test_one_denoiser_samples_every_process(process):
    """The default sampler at 40 calls, from 4,000 draws of the prior: mode weights within four standard errors."""
    module = module_of(process)
    m0 = process.prior((4000, 2), torch.Generator().manual_seed(3)).double()
    x = next(iter(module.SAMPLERS.values()))(process, EDM_NET, m0, 40)
    distance = torch.cdist(x, MIXTURE.centres)
    share = torch.bincount(distance.argmin(1), minlength=3) / 4000
    assert bool(((share - MIXTURE.weights).abs() < 4 * (MIXTURE.weights * (1 - MIXTURE.weights) / 4000).sqrt()).all())
    assert distance.min(1).values.square().mean() < 2.2 * 2 * MIXTURE.std**2 / 2


@pytest.mark.parametrize(("module", "make"), PROCESSES)
def test_denoiser_preconditioning(module, make):
    """Zero output is the posterior mean of Gaussian data, finite down to SNR 0; the net's input has unit variance."""
    P = make(sigma_data=0.7, param="denoiser")
    snr = torch.tensor([0.0, 1e-12, 1e-2, 1.0, 1e4], dtype=F64)
    seen = []

    def net(v, time, label=None):
        seen.append((v, time))
        return torch.zeros_like(v)

    x, eps = randn64(0, 5, 20000) * 0.7, randn64(1, 5, 20000)
    u = snr.sqrt()[:, None] * x + eps
    out = module.precondition(P, net, u, snr)
    assert worst(out[2:], (0.49 / (0.49 + 1 / snr[2:]))[:, None] * (u / snr.sqrt()[:, None])[2:]) < 1e-12
    assert worst(out[:2], torch.zeros_like(out[:2])) < 1e-4
    (v, time), sigma = seen[0], snr[1:] ** -0.5
    assert worst(time[1:], sigma / (1 + sigma)) < 1e-12 and float(time[0]) == 1
    assert (v.square().mean(1) - 1).abs().max() < 5 * math.sqrt(2 / 20000)
    one = module.precondition(P, lambda v, time, label=None: torch.ones_like(v), u, snr) - out
    assert worst(one, (0.7 / (1 + 0.49 * snr).sqrt())[:, None].expand_as(u)) < 1e-12  # c_out


@pytest.mark.parametrize(("module", "make"), PROCESSES)
def test_denoiser_loss(module, make):
    """With a zero net it is 1 whatever the data of variance sigma_data^2, and its gradient there is -2 E[target]."""
    torch.manual_seed(0)
    P = make(sigma_data=0.7, param="denoiser")
    times = []

    def net(v, time, label=None):
        times.append(time)
        return torch.zeros_like(v)

    x = 0.7 * (torch.randint(2, (40000, 1), dtype=F64) * 2 - 1)  # two points: nothing Gaussian about it
    found = float(module.loss(P, net, x))
    assert abs(found - 1) < 0.03  # standard error .006
    log_sigma = torch.log(times[0] / (1 - times[0]))
    assert abs(float(log_sigma.mean()) + 1.2) < 0.01 and abs(float(log_sigma.std()) - 1.2) < 0.01
    shift = torch.zeros(1, dtype=F64, requires_grad=True)
    module.loss(P, lambda v, time, label=None: v.sign() * shift, x).backward()
    assert float(shift.grad) < -0.05  # the sign of y tells the sign of x
    with pytest.raises(ValueError, match="param"):
        make(param="noise")
    with pytest.raises(ValueError, match="sigma_data"):
        make(sigma_data=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood


@pytest.mark.parametrize(("n", "exact"), [(1, True), (2, False), (3, True), (4, False)])
def test_likelihood_of_gaussian_data(n, exact):
    """log N(x; mu, s^2) by hand: the bound is tight for an exact network, T = 12 makes the prior exact. The Jacobian
    is a multiple of I here, so that Hutchinson's estimate has no noise."""
    torch.manual_seed(0)
    mu, s, P = 0.3, 0.7, HOLD(order=n, L_inv=0.6, T=12.0)
    x = mu + s * torch.randn(32, 3, dtype=F64)
    hand = (-0.5 * math.log(2 * math.pi * s**2) - (x - mu) ** 2 / (2 * s**2)).sum(1)
    got = hold_ref.log_likelihood_bound(P, ExactNet(P, torch.full((1, 3), mu, dtype=F64), s), x, exact=exact)
    assert got.shape == (32,)
    assert worst(got, hand) < 1e-3


def test_likelihood_sees_the_prior_it_is_given():
    """At a short T the model is not the data law: for data N(0, s^2) the flow is linear, and N(0, L_inv I) is pushed
    through it by hand, as a matrix, with many midpoint steps and one Richardson extrapolation."""
    torch.manual_seed(0)
    n, s = 2, 0.7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        P = HOLD(order=n, T=2.5, L_inv=1.5)
    assert float(P.snr(P.T)) > 0.1

    def propagate(steps):  # z at t_min = A z at T
        ts = torch.exp(torch.linspace(math.log(P.T), math.log(P.t_min), 2 * steps + 1, dtype=F64))
        kappa = P.kappa(ts)
        A = torch.eye(n, dtype=F64)
        for i in range(0, 2 * steps, 2):  # midpoint rule, E[x | z] = s^2 kappa.z / (1 + s^2 |kappa|^2)
            gain = [s**2 * k / (1 + s**2 * k @ k) for k in kappa[i : i + 2]]
            half = A + torch.outer(kappa[i + 1] - kappa[i], gain[0] @ A)
            A = A + torch.outer(kappa[i + 2] - kappa[i], gain[1] @ half)
        return A

    coarse, fine = propagate(1000), propagate(2000)
    A = (4 * fine - coarse) / 3
    assert worst(fine, coarse) < 1e-2 * float(A.abs().max())
    root = A @ torch.linalg.inv(P.cholesky(P.T)) * math.sqrt(P.L_inv)  # z at t_min = root N(0, I)
    model = torch.distributions.MultivariateNormal(torch.zeros(n, dtype=F64), root @ root.T)
    x = s * torch.randn(64, 1, dtype=F64)
    torch.manual_seed(5)
    got = hold_ref.log_likelihood_bound(P, ExactNet(P, torch.zeros(1, 1, dtype=F64), s), x)
    torch.manual_seed(5)  # the same draw of eps
    eps, kappa = torch.randn(64, n, dtype=F64), P.kappa(P.t_min)
    z, snr = kappa * x + eps, float(P.snr(P.t_min))
    decoder = torch.distributions.Normal((z @ kappa) * s**2 / (1 + s**2 * snr), snr**-0.5).log_prob(x[:, 0])
    encoder = torch.distributions.Normal(0.0, 1.0).log_prob(eps).sum(1)
    assert worst(got, model.log_prob(z) + decoder - encoder) < 1e-3
    true = torch.distributions.Normal(0.0, s).log_prob(x[:, 0])
    assert worst(got, true) > 0.05  # the test can tell the two apart


def test_hutchinson_is_unbiased():
    """On a mixture the divergence is not a multiple of I: the mean over probes meets the exact trace."""
    torch.manual_seed(0)
    P, x = HOLD(order=2, snr_max=100.0), MODES[:1].expand(600, 2) + 0.1
    net = ExactNet(P, MODES, 0.3)
    a = hold_ref.log_likelihood_bound(P, net, x, exact=True, tol=1e-3)
    b = hold_ref.log_likelihood_bound(P, net, x, exact=False, tol=1e-3)
    assert float(b.std()) > float(a.std())
    assert abs(float(a.mean() - b.mean())) < 4.5 * math.sqrt(float(a.var() + b.var()) / 600)


def test_likelihood_of_images_in_float32():
    torch.manual_seed(0)
    P, s = HOLD(T=12.0), 0.5
    x = s * torch.randn(4, 1, 5, 5)

    def net(m, t, label=None):
        L, kappa = P.cholesky(float(t[0])), P.kappa(float(t[0]))
        z = hold_ref.mix(torch.linalg.inv(L), m)
        posterior = hold_ref.mix(s**2 * kappa[None] / (1 + s**2 * float(kappa @ kappa)), z)
        return hold_ref.noise(P, posterior, m, float(t[0]))

    hand = (-0.5 * math.log(2 * math.pi * s**2) - x**2 / (2 * s**2)).sum((1, 2, 3))
    got = hold_ref.log_likelihood_bound(P, net, x)
    assert got.dtype == torch.float32
    assert worst(got, hand) < 25e-3  # 1e-3 per dimension: float32 and sums of 25


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes in use


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": 0}, "order .* integer >= 1, got 0"),
        ({"order": 2.5}, "order .* integer >= 1, got 2.5"),
        ({"order": 3, "gamma": (1.0,)}, "order 3 wants 2 values of gamma"),
        ({"order": 2, "gamma": (-1.0,)}, "positive and finite"),
        ({"order": 2, "xi": 0.0}, "positive and finite"),
        ({"order": 2, "xi": float("nan")}, "positive and finite"),
        ({"alpha": 0.0}, "positive and finite"),
        ({"L_inv": -1.0}, "positive and finite"),
        ({"T": 0.0}, "positive and finite"),
        ({"T": 0.05}, "raise T"),
        ({"T": 1000.0}, "lower T"),
    ],
    ids=str,
)
def test_wrong_process(options, words):
    with pytest.raises(ValueError, match=words) as error:
        HOLD(**options)
    assert "\n" not in str(error.value)


def test_short_T_warns_with_the_T_to_use():
    with pytest.warns(UserWarning, match=r"use T=4\.27"):
        HOLD(T=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in ORDERS:
            HOLD(order=n)


def test_wrong_arguments():
    P, net, m0 = HOLD(), (lambda m, t, label=None: m[:, :2]), torch.zeros(1, 6)
    for name, sampler in hold_ref.SAMPLERS.items():
        with pytest.raises(ValueError, match="at least 1, got 0"):
            sampler(P, net, m0, 0)
        with pytest.raises(ValueError, match="t_end="):
            sampler(P, net, m0, 5, t_end=7.0)
        with pytest.raises(ValueError, match="rho"):
            sampler(P, net, m0, 5, rho=-1.0)
        assert name in ("ode", "strang", "lie", "em")
    with pytest.raises(ValueError, match="order must be 1, 2, 3 or 4"):
        hold_ref.ode(P, net, m0, 5, order=5)
    with pytest.raises(ValueError, match="weight must be"):
        hold_ref.loss(P, net, torch.zeros(1, 2), weight="snr")
    with pytest.raises(ValueError, match="with param 'denoiser' weight must be"):
        hold_ref.loss(hold_ref.HOLD(param="denoiser"), net, torch.zeros(1, 2), weight="likelihood")
    with pytest.raises(ValueError, match="HOLD time runs from 0"):
        P.mean(-0.1)
    with pytest.raises(ValueError, match="HOLD time runs from 0"):
        P.mean(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        hold_ref.log_likelihood_bound(P, lambda m, t, label=None: m[:, :2] * float("nan"), torch.zeros(1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# The peers of bench/


@lru_cache(None)
def peers():
    sys.path.insert(0, str(HERE / "bench"))
    return importlib.import_module("peers")


TRIANGLE = torch.tensor([[-1.0, 0.3], [0.6, -0.8], [0.5, 0.9]], dtype=F64)
PEER_NOISE = randn64(0, 100, 2)


def triangle_mean(y, sigma):
    """E[x | y] of three modes of deviation 0.3, 0.2, 0.25, for y = x + sigma noise."""
    variance, d = torch.tensor([0.09, 0.04, 0.0625], dtype=F64), y[:, None] - TRIANGLE
    log_weight = -d.square().sum(-1) / (2 * (variance + sigma**2)) - (variance + sigma**2).log()
    share = torch.softmax(log_weight + torch.tensor([0.3, 0.5, 0.2], dtype=F64).log(), 1)
    return (share[..., None] * (TRIANGLE + (variance / (variance + sigma**2))[:, None] * d)).sum(1)


def triangle_net(u, t, label=None, s=0.5):
    """The network that `precondition` with sigma_data s turns into triangle_mean."""
    sigma = float(t[0] / (1 - t[0]))
    root = math.hypot(s, sigma)
    return (triangle_mean(root * u, sigma) - s**2 / root * u) * root / (s * sigma)


@lru_cache(None)
def triangle_flow(sigma_max, sigma_min, steps=1500):
    """E[x | y] where dy/dsigma = (y - E[x | y])/sigma has taken sigma_max PEER_NOISE, by Runge and Kutta's fourth order
    in log sigma."""
    y, h = sigma_max * PEER_NOISE, math.log(sigma_min / sigma_max) / steps
    for i in range(steps):
        s, middle, end = (sigma_max * math.exp((i + part) * h) for part in (0, 0.5, 1))
        a = y - triangle_mean(y, s)
        b = y + h / 2 * a - triangle_mean(y + h / 2 * a, middle)
        c = y + h / 2 * b - triangle_mean(y + h / 2 * b, middle)
        d = y + h * c - triangle_mean(y + h * c, end)
        y = y + h / 6 * (a + 2 * b + 2 * c + d)
    return triangle_mean(y, sigma_min)


EVEN = {"sigma_max": 6.0, "sigma_min": 0.3, "rho": 1.0}  # in sigma: where iPNDM has its full order
KARRAS, FAR = {"sigma_max": 80.0, "sigma_min": 0.05}, {"sigma_max": 1e5, "sigma_min": 0.05, "rho": math.inf}
ORDERS = [  # a first node that costs no call errs with 1 / sigma_max, so it gets a large one
    ("edm_heun", KARRAS, 2, 160),
    ("dpm2", KARRAS, 2, 160),
    ("dpm3", KARRAS, 3, 160),
    ("unipc2", KARRAS, 3, 160),
    ("unipc3", KARRAS, 4, 160),
    ("unipc2_mean", FAR, 3, 160),
    ("deis", KARRAS, 4, 160),
    ("deis_afs", FAR, 4, 320),
    ("ipndm3", EVEN, 3, 320),
    ("ipndm4", EVEN, 4, 320),
    ("ipndm3", KARRAS, 2, 320),
    ("ipndm4", KARRAS, 2, 160),
    ("ipndm3_afs", FAR, 2, 320),
    ("ipndm4_afs", FAR, 2, 320),
]


def peer(name, nfe, **grid):
    return getattr(peers(), name)(AGM(sigma_data=0.5), triangle_net, PEER_NOISE, nfe, **grid)


@pytest.mark.parametrize(("name", "grid", "order", "nfe"), ORDERS)
def test_peers_have_the_order_of_their_papers(name, grid, order, nfe):
    """Against another solver of the exact flow. UniPC's corrector adds one to its order."""
    limit = triangle_flow(grid["sigma_max"], grid["sigma_min"])
    errors = [(peer(name, n, **grid) - limit).square().mean().sqrt() for n in (nfe, 2 * nfe)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.4


@pytest.mark.parametrize("nfe", [1, 2, 5, 8])
def test_peers_call_the_network_nfe_times(nfe):
    """Also with every grid that they are given; Heun's method leaves one call of an even number unused."""
    calls = []

    def net(u, t, label=None):
        calls.append(t)
        return triangle_net(u, t)

    for title, (kind, sampler, default, grids) in peers().PEERS.items():
        for grid in (default, *grids) if kind == "denoiser" else ():
            calls.clear()
            x = sampler(AGM(sigma_data=0.5), net, PEER_NOISE, nfe, **grid)
            assert len(calls) == nfe - (title == "EDM, Heun" and nfe % 2 == 0) and x.isfinite().all(), (title, grid)


def test_peers_end_where_the_reference_of_their_distance_ends():
    """What benches call the converged flow is `ode` of HOLD of order 1 from the same noise with 400 calls. The peers
    start from sigma 80, not its 403, as if the data had mean 0; from sigma 10 they end further off."""
    P = HOLD(order=1, param="denoiser", sigma_data=0.5)
    limit = hold_ref.ode(P, triangle_net, PEER_NOISE, 400, data_mean=None)
    assert (limit - triangle_flow(1 / math.sqrt(P.snr(P.T)), 1 / 1200)).square().mean().sqrt() < 3e-4
    for name in ("edm_heun", "unipc3", "deis", "ipndm4"):
        near, far = ((peer(name, 301, sigma_max=s) - limit).square().mean().sqrt() for s in (80.0, 10.0))
        assert near < 6e-3 and far > 3e-2, (name, near, far)


# ---------------------------------------------------------------------------------------------------------------------
# Data and pictures; every file and server is made here

CIFAR_FILES = [*data.CIFAR10_TRAIN, data.CIFAR10_TEST]


def fails(match, function, *args, **kwargs):
    """The call raises a UserError of exactly one line that matches."""
    with pytest.raises(data.UserError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert re.search(match, text), text


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


# -- batches and units


def test_all_256_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    dataset = data.Dataset("levels", levels, levels)
    x, label = dataset.batch(1)
    assert x.dtype == torch.float32
    assert label is None
    assert (x.min(), x.max()) == (-1, 1)
    assert same(dataset.to_pixels(x), levels.permute(0, 2, 3, 1).numpy())
    beyond = torch.tensor([-9.0, -1.001, 1.001, 9.0]).reshape(1, 1, 2, 2)
    assert dataset.to_pixels(beyond).ravel().tolist() == [0, 0, 255, 255]
    nearest = torch.tensor([100.4, 100.6]).reshape(1, 1, 1, 2) / 127.5 - 1  # rounds, does not truncate
    assert dataset.to_pixels(nearest).ravel().tolist() == [100, 101]


def test_batches_draw_every_sample_with_its_own_label():
    torch.manual_seed(0)
    train = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    dataset = data.Dataset("ten", train, train, train_labels=torch.arange(10) * 3)
    x, label = dataset.batch(5000)
    pixels = torch.from_numpy(dataset.to_pixels(x)).long().ravel()
    assert same(label, pixels * 3)
    counts = pixels.bincount(minlength=10)
    assert counts.min() > 400  # 500 +- 21 each
    assert counts.max() < 600


def test_half_of_the_images_are_mirrored_and_digits_never():
    torch.manual_seed(0)
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2)
    plain, mirrored = image[0] / 127.5 - 1, image[0].flip(-1) / 127.5 - 1
    x, _ = data.Dataset("one", image, image, flip=True).batch(4000)
    is_plain, is_mirrored = (x == plain).flatten(1).all(1), (x == mirrored).flatten(1).all(1)
    assert (is_plain ^ is_mirrored).all()  # whole images, along the width, all channels together
    assert abs(is_mirrored.sum() - 2000) < 160  # 5 standard deviations
    x, _ = data.Dataset("one", image, image).batch(500)
    assert (x == plain).all()

    digits = data.load("digits")
    known = {tuple(row) for row in digits.train.flatten(1).tolist()}
    pixels = digits.to_pixels(digits.batch(500)[0]).reshape(500, 64)
    assert all(tuple(row) in known for row in pixels.tolist())
    assert data.load("digits", flip=True).flip
    assert not digits.flip


@pytest.mark.parametrize("name", ["spiral", "digits", "flipped"])
def test_a_restored_generator_state_gives_the_same_batches(name):
    dataset = data.load("digits", flip=True) if name == "flipped" else data.load(name)
    torch.manual_seed(3)
    dataset.batch(7)
    state = torch.get_rng_state()
    first = [dataset.batch(16)[0] for _ in range(3)]
    torch.set_rng_state(state)
    assert all(torch.equal(a, dataset.batch(16)[0]) for a in first)
    assert not torch.equal(first[0], first[1])


def test_loading_leaves_the_global_generator_alone_and_repeats():
    state = torch.get_rng_state()
    a, b = data.load("moons"), data.load("moons")
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a.train, b.train)
    assert torch.equal(a.test, b.test)
    assert not torch.equal(a.train, a.test)


def test_to_moves_every_tensor():
    dataset = data.Dataset("d", torch.zeros(4, 2), torch.zeros(1, 2), torch.arange(4), torch.arange(1), None, False)
    moved = dataset.to("meta")
    assert all(v.is_meta for v in (moved.train, moved.test, moved.train_labels, moved.test_labels))
    assert dataset.train.device.type == "cpu"


# -- 2-D sets


@pytest.mark.parametrize("name", list(data.POINTS))
def test_points_have_the_stated_form(name):
    dataset = data.load(name)
    assert dataset.shape == (2,)
    assert not dataset.is_image
    assert dataset.train.shape == dataset.test.shape == (10_000, 2)
    torch.manual_seed(0)
    x, label = dataset.batch(20_000)
    assert label is None
    assert x.dtype == dataset.train.dtype == torch.float32
    assert len(x.unique(dim=0)) > 19_900  # fresh points, not a resampling of train
    assert same(dataset.to_points(x), x.numpy())
    for part in (dataset.train, dataset.test):  # the fixed parts follow the same law
        assert (part.mean(0) - x.mean(0)).abs().max() < 0.06
        assert (part.std(0) / x.std(0) - 1).abs().max() < 0.03


def test_gmm_has_nine_round_modes():
    x = data.gmm(90_000, torch.Generator().manual_seed(0)).double()
    turn = torch.tensor([[1, -1], [1, 1]], dtype=torch.float64) / math.sqrt(2)
    flat = x @ turn.T  # rotated by 45 degrees: the grid is now axis-aligned
    mode = (flat / 0.5).round()
    centres = torch.tensor(list(itertools.product((-1, 0, 1), repeat=2)), dtype=torch.float64)
    for centre in centres:
        rest = flat[(mode == centre).all(1)] - 0.5 * centre
        assert abs(len(rest) - 10_000) < 5 * 95  # binomial
        assert rest.mean(0).abs().max() < 5 * 0.04 / 100
        assert (rest.std(0) - 0.04).abs().max() < 5 * 0.04 / math.sqrt(20_000)
    assert (flat.abs() < 0.75).all()
    assert (x.norm(dim=1).max() - 0.5 * math.sqrt(2)).abs() < 0.3  # a corner of the grid lies on an axis
    corner = x[:, 0] > 0.6
    assert abs(x[corner, 1].mean()) < 0.005


def test_spiral_is_five_swiss_rolls():
    x = data.spiral(50_000, torch.Generator().manual_seed(0)).double()
    centres = torch.tensor([[0, 0], [1.2, 1.2], [1.2, -1.2], [-1.2, 1.2], [-1.2, -1.2]], dtype=torch.float64)
    distance = torch.cdist(x, centres)
    roll = (x - centres[distance.argmin(1)]) / 0.05
    assert (distance.argmin(1).bincount() - 10_000).abs().max() < 5 * 90
    # The arm at angle a lies at radius t = a + 2 pi k: the distance to the nearest arm along the ray is noise / cos,
    # and the curve is nearly a circle, so radius - t is the noise 0.3 to a per cent.
    radius, angle = roll.norm(dim=1), torch.atan2(roll[:, 1], roll[:, 0])
    offset = torch.remainder(radius - angle + math.pi, 2 * math.pi) - math.pi
    inside = (radius > 6) & (radius < 13)  # away from the ends of the arm
    assert abs(offset[inside].mean()) < 0.03
    assert abs(offset[inside].std() - 0.3) < 0.01
    assert abs(radius.min() - 1.5 * math.pi) < 1.3  # t from 1.5 pi ...
    assert abs(radius.max() - 4.5 * math.pi) < 1.3  # ... to 4.5 pi
    share = ((radius > 1.5 * math.pi + 1) & (radius < 3 * math.pi)).double().mean()
    assert abs(share - (1.5 * math.pi - 1) / (3 * math.pi)) < 0.012  # t is uniform


def test_checkerboard_fills_eight_squares_evenly():
    x = data.checkerboard(40_000, torch.Generator().manual_seed(0))
    cell = (x + 2).floor().long()
    assert cell.min() == 0
    assert cell.max() == 3
    assert (cell.sum(1) % 2 == 0).all()
    counts = (4 * cell[:, 0] + cell[:, 1]).bincount(minlength=16)
    assert (counts[counts > 0] - 5000).abs().max() < 5 * 66
    within = (x + 2) % 1
    assert (within.mean(0) - 0.5).abs().max() < 5 * 0.289 / 200


def test_moons_are_two_noisy_half_circles():
    x = data.moons(40_000, torch.Generator().manual_seed(0)).double()
    distance = []
    for side in (1, -1):  # the upper moon, and the lower one turned by 180 degrees onto it
        arm = side * x - torch.tensor([-0.75, -0.375])
        ends = torch.stack([arm - torch.tensor([e, 0.0]) for e in (1.5, -1.5)]).norm(dim=2).min(0).values
        distance.append(torch.where(arm[:, 1] > 0, arm.norm(dim=1) - 1.5, ends))
    upper, lower = distance
    on_upper = upper.abs() < lower.abs()
    assert abs(on_upper.double().mean() - 0.5) < 5 * 0.5 / 200
    error = torch.where(on_upper, upper, lower)
    assert error.abs().max() < 5 * 0.075
    assert abs(error[on_upper].std() - 0.075) < 0.002
    from_top = torch.atan2(x[on_upper, 0] + 0.75, x[on_upper, 1] + 0.375)
    assert abs(from_top.mean()) < 0.03
    assert abs(from_top.std() - math.pi / math.sqrt(12)) < 0.03  # uniform on half a circle


# -- digits


def test_digits_are_the_1797_images_and_every_fifth_is_held_out():
    digits = data.load("digits")
    assert digits.shape == (1, 8, 8)
    assert digits.is_image
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert (len(digits.train_labels), len(digits.test_labels)) == (1438, 359)
    with np.load(data.DIGITS_FILE, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    assert same(digits.test[:, 0].numpy(), images[4::5])
    assert same(digits.test_labels, torch.from_numpy(labels[4::5].astype(np.int64)))
    assert same(digits.train[:5, 0].numpy(), images[[0, 1, 2, 3, 5]])
    assert set(np.unique(images)) == {round(v * 255 / 16) for v in range(17)}
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as UCI's page counts


# -- arrays from files


@pytest.mark.parametrize("shape", [(11, 4, 6), (11, 4, 6, 1), (11, 4, 6, 3)])
@pytest.mark.parametrize("key", [None, "arr_0", "images", "x", "other"])
def test_image_files(tmp_path, shape, key):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / ("f.npy" if key is None else "f.npz")
    np.save(path, images) if key is None else np.savez(path, labels=np.arange(11, dtype=np.int16), **{key: images})
    dataset = data.load(path)
    nchw = images.reshape(11, 4, 6, -1).transpose(0, 3, 1, 2)
    whole = torch.cat([dataset.train, dataset.test]).numpy()
    assert (len(dataset.train), len(dataset.test), dataset.flip) == (9, 2, False)
    assert sorted(map(bytes, whole)) == sorted(map(bytes, np.ascontiguousarray(nchw)))
    assert data.shape_of(str(path)) == dataset.shape == nchw.shape[1:]
    if key is None:
        assert dataset.train_labels is None
    else:
        assert same(whole, nchw[torch.cat([dataset.train_labels, dataset.test_labels])])
        assert same(dataset.to_pixels(dataset.train / 127.5 - 1), nchw[dataset.train_labels].transpose(0, 2, 3, 1))
    exact = dataset.train.double() / 127.5 - 1
    assert worst(dataset.mean, exact.mean(0)) < 1e-7 and abs(dataset.std - exact.std(correction=0)) < 1e-12


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_point_files_are_standardised_and_restored(tmp_path, dtype):
    rng = np.random.default_rng(0)
    points = (rng.normal(size=(1000, 3)) * (1, 2, 4) + (50, -20, 0)).astype(dtype)
    np.savez_compressed(tmp_path / "p.npz", points, labels=np.arange(1000))
    dataset = data.load(str(tmp_path / "p.npz"))
    train = points[dataset.train_labels].astype(np.float64)
    assert np.abs(dataset.shift.numpy() - train.mean(0)).max() < 1e-5
    assert abs(dataset.scale - math.sqrt(train.var(0).mean())) < 1e-5
    assert abs(dataset.std - 1) < 1e-6 and abs(dataset.bound - 1.1 * dataset.train.abs().max()) < 1e-6
    torch.manual_seed(0)
    x, label = dataset.batch(20_000)
    assert x.dtype == torch.float32
    assert len(label) == 20_000
    assert abs(x.square().mean() - 1) < 0.05
    assert abs(x[:, 2].std() / x[:, 0].std() - 4) < 0.3  # one scalar: the proportions stay
    assert np.abs(dataset.to_points(x) - points[label]).max() < 1e-5
    assert np.abs(dataset.to_points(dataset.train) - train).max() < 1e-5
    assert dataset.to_points(dataset.train).dtype == np.float32


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((0, 8, 8), np.uint8), "empty"),
        (np.zeros((5, 0), np.float32), "empty"),
        (np.zeros((5, 8), np.uint8), r"\(N, H, W\)"),
        (np.zeros((5, 3, 8, 8), np.uint8), "C 1 or 3"),
        (np.zeros((5, 8, 8, 4), np.uint8), "C 1 or 3"),
        (np.zeros((5, 8, 8, 3), np.float32), "convert them to uint8"),
        (np.zeros((5, 8, 8), np.float64), "convert them to uint8"),
        (np.zeros((5, 8, 8), np.int64), "dtype int64.*convert"),
        (np.zeros((5, 2), np.int32), "dtype int32.*convert"),
        (np.zeros((5, 2), complex), "dtype complex128.*convert"),
        (np.zeros(5, np.float32), r"\(N, D\)"),
        (np.zeros((24, 25, 3), np.uint8), "one picture or many"),
        (np.zeros((24, 25, 4), np.uint8), "one picture or many"),
        (np.eye(5, dtype=np.uint8)[None], "multiply masks by 255"),
        (np.full((5, 8, 8), 77, np.uint8), "values 77 to 77"),
        (np.array([[0.0, 1], [np.nan, 2]]), "not finite"),
        (np.array([[0.0, 1], [np.inf, 2]]), "not finite"),
        (np.array([[0.0, 1], [1e200, 2]]), "too large"),
        (np.ones((9, 2)), "equal points"),
        (np.array([{"a": 1}, None]), "cannot read.*pickle.*numpy.save"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_wrong_arrays_are_refused(tmp_path, array, match):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    fails(match, data.load, tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", array)
    fails(match, data.load, tmp_path / "a.npz")


@pytest.mark.parametrize("labels", [np.arange(4), np.arange(5.0), np.arange(5) - 1, np.zeros((5, 1), int)])
def test_wrong_labels_are_refused(tmp_path, labels):
    np.savez(tmp_path / "a.npz", images=np.zeros((5, 4, 4), np.uint8), labels=labels)
    fails("bad labels.*5 integers", data.load, tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_broken_array_files(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    fails("no file .*a.np", data.load, path)
    points = np.random.default_rng(0).normal(size=(200, 2))
    np.save(path, points) if suffix == ".npy" else np.savez_compressed(path, points)
    data.load(path)
    whole = path.read_bytes()
    for n in (0, 1, 5, 50, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        fails("cannot read.*numpy.save", data.load, path)
    path.write_bytes(b"foreign\n" * 99)
    fails("cannot read", data.load, path)
    if suffix == ".npz":
        middle = bytearray(whole)
        middle[len(whole) // 2] ^= 255
        path.write_bytes(middle)
        fails("cannot read", data.load, path)
        np.savez(path, labels=np.arange(3))
        fails("empty", data.load, path)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("notes.txt", "hello")
        fails("other files than arrays", data.load, path)


def test_unknown_names_list_the_known_and_the_nearest():
    fails("no data set 'spirals' .*spiral\\?", data.load, "spirals")
    fails("did you mean cifar10\\?", data.load, "CIFAR-10")
    for name in data.NAMES:
        fails(name, data.load, "zzzz")
    fails("no data set 'picture.png'.*npy", data.load, "picture.png")


# -- Fashion-MNIST


def write_idx(path, array, magic=None, sizes=None):
    header = struct.pack(f">{1 + array.ndim}I", magic or 0x0800 + array.ndim, *(sizes or array.shape))
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def fashion_dir(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 7), ("t10k", 3)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 5, 4), dtype=np.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8))
    return tmp_path


def test_fashion_reads_idx(fashion_dir):
    dataset = data.load("fashion", fashion_dir)
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4), dtype=np.uint8)
    assert same(dataset.train[:, 0].numpy(), images)
    assert dataset.shape == (1, 5, 4)
    assert dataset.test.shape == (3, 1, 5, 4)
    assert same(dataset.train_labels, torch.arange(7))
    assert same(dataset.test_labels, torch.arange(3))


@pytest.mark.filterwarnings("error")
def test_broken_fashion_files(fashion_dir, tmp_path):
    images, labels = fashion_dir / "train-images-idx3-ubyte.gz", fashion_dir / "train-labels-idx1-ubyte.gz"
    whole = images.read_bytes()
    for n in (0, 5, len(whole) // 2, len(whole) - 1):
        images.write_bytes(whole[:n])
        fails("train-images.*fetch it again", data.load, "fashion", fashion_dir)
    images.write_bytes(b"not gzip")
    fails("damaged", data.load, "fashion", fashion_dir)
    array = np.zeros((7, 5, 4), np.uint8)
    write_idx(images, array, magic=2049)
    fails("no IDX file of 3 axes", data.load, "fashion", fashion_dir)
    write_idx(images, array, sizes=(8, 5, 4))
    fails("no IDX file of 3 axes", data.load, "fashion", fashion_dir)
    write_idx(images, array)
    write_idx(labels, np.zeros(6, np.uint8))
    fails("7 train images but 6 labels", data.load, "fashion", fashion_dir)
    labels.unlink()
    fails(
        "no .*train-labels.*apt-get install dataset-fashion-mnist.*https.*--data-dir", data.load, "fashion", fashion_dir
    )


def test_fashion_without_data_dir_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FASHION_DIR", str(tmp_path / "none"))
    fails("apt-get install dataset-fashion-mnist", data.load, "fashion")


# -- CIFAR-10


def cifar_bytes(n, seed):
    """n records: label i % 10, then red, green and blue planes of random pixels; also the images (n, 32, 32, 3)."""
    images = np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    records = []
    for i, image in enumerate(images):
        planes = [bytes(image[row, :, channel].tolist()) for channel in range(3) for row in range(32)]
        records.append(bytes([i % 10]) + b"".join(planes))
    return b"".join(records), images


def cifar_tar(contents):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        folder = tarfile.TarInfo("cifar-10-batches-bin")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in {**contents, "readme.html": b"<html>"}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


CIFAR = {name: cifar_bytes(2 + i, i) for i, name in enumerate(CIFAR_FILES)}
CIFAR_CONTENTS = {name: content for name, (content, _) in CIFAR.items()}
CIFAR_TAR = cifar_tar(CIFAR_CONTENTS)


def is_the_tiny_cifar(dataset):
    train = np.concatenate([CIFAR[name][1] for name in data.CIFAR10_TRAIN])
    labels = torch.cat([torch.arange(2 + i) for i in range(5)])
    return (
        same(dataset.train.permute(0, 2, 3, 1).numpy(), train)
        and same(dataset.test.permute(0, 2, 3, 1).numpy(), CIFAR[data.CIFAR10_TEST][1])
        and same(dataset.train_labels, labels)
        and same(dataset.test_labels, torch.arange(7))
        and dataset.flip
    )


def unpack(folder, contents=CIFAR_CONTENTS):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def test_cifar_layout_from_the_folder_its_parent_the_archive_and_its_folder(tmp_path):
    folder = unpack(tmp_path / "a" / "cifar-10-batches-bin")
    assert is_the_tiny_cifar(data.load("cifar10", folder))
    assert is_the_tiny_cifar(data.load("cifar10", folder.parent))
    other = tmp_path / "renamed.tgz"
    other.write_bytes(CIFAR_TAR)
    assert is_the_tiny_cifar(data.load("cifar10", other))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "cifar-10-binary.tar.gz").write_bytes(CIFAR_TAR)
    assert is_the_tiny_cifar(data.load("cifar10", str(tmp_path / "b")))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(
        [*CIFAR_FILES, "renamed.tgz", "cifar-10-binary.tar.gz"]  # nothing was unpacked or added
    )


def test_broken_cifar_folders(tmp_path):
    fails("does not exist.*cifar-10-binary.tar.gz", data.load, "cifar10", tmp_path / "none")
    fails("has neither.*cifar-10-batches-bin", data.load, "cifar10", tmp_path)
    good = CIFAR_CONTENTS["data_batch_3.bin"]
    for bad, match in (
        (good[:-1], "data_batch_3.bin is .* bytes, wanted n x 3073"),
        (b"", "data_batch_3.bin is 0 bytes"),
    ):
        fails(match, data.load, "cifar10", unpack(tmp_path, {**CIFAR_CONTENTS, "data_batch_3.bin": bad}))
    fails(
        "labels over 9",
        data.load,
        "cifar10",
        unpack(tmp_path, {**CIFAR_CONTENTS, "data_batch_3.bin": b"\x0a" + good[1:]}),
    )
    (tmp_path / "data_batch_3.bin").unlink()
    fails("data_batch_3.bin is missing", data.load, "cifar10", tmp_path)


def test_broken_cifar_archives(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    for n in (0, 5, 1000, len(CIFAR_TAR) // 2, len(CIFAR_TAR) - 9):
        path.write_bytes(CIFAR_TAR[:n])
        fails("is damaged.*replace it by http", data.load, "cifar10", path)
    for i in range(20):  # a wrong bit anywhere, pixels too
        flipped = bytearray(CIFAR_TAR)
        flipped[20 + i * (len(flipped) - 21) // 19] ^= 4
        path.write_bytes(flipped)
        fails("cifar-10-binary.tar.gz", data.load, "cifar10", path)
    path.write_bytes(gzip.compress(gzip.decompress(CIFAR_TAR)[:20_000]))  # a whole gzip of half a tar
    fails("damaged|missing", data.load, "cifar10", path)
    path.write_bytes(cifar_tar({name: CIFAR_CONTENTS[name] for name in data.CIFAR10_TRAIN}))
    fails("test_batch.bin is missing", data.load, "cifar10", path)


class Server(http.server.ThreadingHTTPServer):
    """Serves CIFAR_TAR; `ranges`: obeys Range; `cut`: hangs up after that many bytes; logs requests."""

    def __init__(self):
        self.ranges, self.cut, self.status, self.log = True, None, None, []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.log.append(asked)
        start = int(asked[6:-1]) if asked and self.server.ranges else 0
        status = self.server.status or (
            416 if start >= len(CIFAR_TAR) else 206 if asked and self.server.ranges else 200
        )
        body = b"" if status >= 400 else CIFAR_TAR[start:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
        monkeypatch.setattr(data, "CIFAR10_URL", url)
        monkeypatch.setattr(data, "CIFAR10_MD5", hashlib.md5(CIFAR_TAR).hexdigest())
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("no_proxy", "*")
        server.target = tmp_path / "phase-ref" / "cifar-10-binary.tar.gz"
        server.part = server.target.with_name("cifar-10-binary.tar.gz.part")
        server.target.parent.mkdir()
        yield server
        server.shutdown()
        thread.join()


def cached(server):
    return sorted(p.name for p in server.target.parent.iterdir())


def test_download_is_checked_cached_and_shown(server, capsys):
    assert is_the_tiny_cifar(data.load("cifar10"))
    assert server.target.read_bytes() == CIFAR_TAR
    assert cached(server) == ["cifar-10-binary.tar.gz"]
    size = f"{len(CIFAR_TAR) / 1e6:.1f}"
    assert f"{size} of {size} MB\n" in capsys.readouterr().err
    assert is_the_tiny_cifar(data.load("cifar10"))
    assert server.log == [None]  # the second time comes from the cache


def test_wrong_md5_removes_the_part(server, monkeypatch):
    monkeypatch.setattr(data, "CIFAR10_MD5", "0" * 32)
    fails("MD5 .*wanted 000.*removed", data.load, "cifar10")
    assert cached(server) == []


@pytest.mark.parametrize("ranges", [True, False])
def test_download_resumes_or_restarts(server, ranges):
    server.ranges = ranges
    server.part.write_bytes(CIFAR_TAR[:777])
    assert is_the_tiny_cifar(data.load("cifar10"))
    assert server.log == ["bytes=777-"]
    assert server.target.read_bytes() == CIFAR_TAR
    assert cached(server) == ["cifar-10-binary.tar.gz"]


def test_a_broken_connection_keeps_the_part_for_the_next_run(server):
    server.cut = 1000
    fails("download (stopped|failed).*run again.*by hand.*--data-dir", data.load, "cifar10")
    assert cached(server) == ["cifar-10-binary.tar.gz.part"]
    assert server.part.read_bytes() == CIFAR_TAR[:1000]
    server.cut = None
    assert is_the_tiny_cifar(data.load("cifar10"))
    assert server.log == [None, "bytes=1000-"]


def test_a_complete_part_is_accepted_and_a_foreign_one_removed(server):
    server.part.write_bytes(CIFAR_TAR)
    assert is_the_tiny_cifar(data.load("cifar10"))
    server.target.unlink()
    server.part.write_bytes(b"x" * (len(CIFAR_TAR) + 5))
    fails("MD5", data.load, "cifar10")
    assert cached(server) == []


def test_server_errors_overwrite_nothing(server):
    server.status = 404
    server.part.write_bytes(b"half")
    fails("404.*by hand and give --data-dir", data.load, "cifar10")
    assert server.part.read_bytes() == b"half"
    assert cached(server) == ["cifar-10-binary.tar.gz.part"]


def test_no_network(server, monkeypatch):
    other = Server()  # a port that nobody listens on once this is closed
    other.server_close()
    url = f"http://127.0.0.1:{other.server_port}/cifar-10-binary.tar.gz"
    monkeypatch.setattr(data, "CIFAR10_URL", url)
    fails(f"download failed.*fetch {url} by hand and give --data-dir", data.load, "cifar10")
    assert cached(server) == []


def test_cache_folder_that_cannot_be_made(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fails("download failed.*--data-dir", data.load, "cifar10")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert data.cache_dir() == data.Path.home() / ".cache" / "phase-ref"


# -- pictures


def read_png(path):
    """Decode a PNG of filter 0 rows, checking signature, chunk CRCs and header."""
    content = path.read_bytes()
    assert content[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    chunks, i = [], 8
    while i < len(content):
        (n,) = struct.unpack(">I", content[i : i + 4])
        kind, body = content[i + 4 : i + 8], content[i + 8 : i + 8 + n]
        assert struct.unpack(">I", content[i + 8 + n : i + 12 + n])[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        i += 12 + n
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    w, h, depth, colour, *rest = struct.unpack(">2I5B", chunks[0][1])
    assert (depth, rest) == (8, [0, 0, 0])
    c = {0: 1, 2: 3}[colour]
    rows = np.frombuffer(zlib.decompress(chunks[1][1]), np.uint8).reshape(h, 1 + w * c)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape((h, w) if c == 1 else (h, w, c))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1)])
def test_png_decodes_back(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data.write_png(tmp_path / "a.png", array)
    assert same(read_png(tmp_path / "a.png"), array)
    data.write_png(tmp_path / "a.png", array.T if array.ndim == 2 else array[::-1, ::2])  # not contiguous; replaces
    assert same(read_png(tmp_path / "a.png"), array.T if array.ndim == 2 else array[::-1, ::2])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_png_errors(tmp_path):
    for array in (np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(ValueError, match="a picture is uint8"):
            data.write_png(tmp_path / "a.png", array)
    fails(
        "cannot write .*nothing was written.*another folder",
        data.write_png,
        tmp_path / "no" / "a.png",
        np.zeros((2, 2), np.uint8),
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("c", [1, 3])
def test_grid_holds_every_image_enlarged(c):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 6, c), dtype=np.uint8)
    grid = data.image_grid(images, columns=3, border=2, scale=4).reshape(72, 88, c)
    small = grid[::4, ::4]
    assert same(small.repeat(4, 0).repeat(4, 1), grid)
    for i in range(5):
        y, x = 10 * (i // 3), 8 * (i % 3)
        assert same(small[y : y + 8, x : x + 6], images[i])
    assert (small[8:10] == 128).all()
    assert (small[:, 6:8] == 128).all()
    assert (small[10:, 16:] == 128).all()  # the empty sixth place


@pytest.mark.parametrize(("size", "scale"), [(8, 8), (28, 2), (32, 2), (64, 1), (200, 1)])
def test_grid_enlarges_small_images_by_whole_factors(size, scale):
    grid = data.image_grid(np.zeros((64, size, size, 3), np.uint8))
    assert grid.shape == (scale * (8 * size + 7), scale * (8 * size + 7), 3)
    assert data.image_grid(np.zeros((1, size, size, 1), np.uint8), border=0).shape == (scale * size, scale * size)


def test_histogram_puts_points_where_they_belong():
    points = np.array([[0.95, 0.85]] * 4 + [[-0.85, -0.35], [5.0, 0.0], [np.nan, 0.0]])
    picture = data.histogram(points, size=40, limit=1)
    dark = (picture != 255).any(2)
    assert picture.dtype == np.uint8
    assert picture.shape == (40, 40, 3)
    assert dark[2:4, 38:].all()  # the last bin of 20 in x, the last but one in y, which points upwards
    assert dark[26:28, 2:4].all()
    assert dark.sum() == 8  # two bins of 2 x 2 pixels; the far and the NaN point are left out
    assert picture[2, 38].sum() < picture[26, 2].sum() < 3 * 255  # denser is darker
    assert (data.histogram(np.full((3, 2), np.nan)) == 255).all()
    wide = data.histogram(np.concatenate([points[:5], points[:5] * 0 + 7], 1), size=40, limit=((-1, 1), (-1, 1)))
    assert same(wide, data.histogram(points[:5], size=40, limit=1.0))  # further coordinates do not count


def test_extent_holds_the_points_and_shrugs_at_outliers():
    x = data.gmm(10_000, torch.Generator().manual_seed(0)).numpy() + np.float32([30, -4])
    x[0], x[1] = 1e6, np.nan
    (x0, x1), (y0, y1) = data.extent(x)
    assert 29 < x0 < 29.3
    assert 30.7 < x1 < 31
    assert abs((x1 - x0) - (y1 - y0)) < 1e-6
    assert abs((y0 + y1) / 2 + 4) < 0.05


def test_pictures_go_by_the_kind_of_samples():
    digits, spiral = data.load("digits"), data.load("spiral")
    pixels = digits.to_pixels(digits.test[:4] / 127.5 - 1)
    assert same(data.picture(pixels), data.image_grid(pixels))
    points = spiral.test.numpy() * 0.5
    half = data.picture(points, spiral.summary()["window"])
    assert same(half, data.histogram(points, limit=data.extent(spiral.train.numpy())))
    ink = (half != 255).any(2)
    assert ink[100:-100, 100:-100].sum() == ink.sum()  # the data set's window: half the size looks half the size
    assert same(data.picture(points), data.histogram(points))


def test_numbers_are_drawn_as_bars():
    picture = data.histogram(np.repeat([-0.9, 0.3], [10, 20])[:, None], size=40, limit=[(-1, 1)])
    height = (picture != 255).any(2).sum(0)
    assert height[2:4].tolist() == [20, 20] and height[26:28].tolist() == [38, 38]  # of 40: 0.95 for the tallest
    assert height.sum() == 116


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def perturbed(net, seed=0):
    """The net with its zero layers filled, so that every path counts."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


def test_untrained_net_predicts_zero():
    t = torch.tensor([0.1, 0.9])
    assert (nets.MLP(4, 2)(torch.randn(2, 4), t) == 0).all()
    assert (nets.UNet(2, 1, width=8)(torch.randn(2, 2, 8, 8), t) == 0).all()


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (5, 11), (1, 3)])
def test_unet_pads_any_size_and_crops(size):
    net = perturbed(nets.UNet(6, 3, width=8, mult=(1, 2, 2)))
    m, t = torch.randn(2, 6, *size), torch.tensor([0.2, 0.7])
    padded = torch.zeros(2, 6, *(-(-s // 4) * 4 for s in size))
    padded[..., : size[0], : size[1]] = m
    assert net(m, t).shape == (2, 3, *size)
    assert (net(m, t) - net(padded, t)[..., : size[0], : size[1]]).abs().max() < 1e-5


def test_every_layer_of_the_unet_has_a_gradient():
    net = perturbed(nets.UNet(2, 1, width=8, mult=(1, 2), attention=(0,), classes=3)).train()
    net(torch.randn(2, 2, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 2])).square().sum().backward()
    dead = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # a bias before a normalisation of its own channels, or of the keys inside a softmax, cannot matter
    assert all(k.endswith(".bias") for k in dead), dead


def test_attention_is_softmax_attention():
    layer = perturbed(nets.Attention(8))
    x = torch.randn(2, 8, 3, 2)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, 1)  # (2, 8, 6) each
    weights = torch.softmax(q.mT @ k / 8**0.5, -1)
    expected = x + layer.out((v @ weights.mT).reshape(2, 8, 3, 2))
    assert (layer(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("process", [AGM(), *(HOLD(order=n) for n in (1, 2, 3, 4))], ids=repr)
def test_time_input_resolves_the_data_end_and_is_smooth_at_the_prior(process):
    embed = perturbed(nets.TimeEmbedding(32, process.T, process.t_data)).double()
    first, last = sorted(process.t_range, key=lambda t: abs(t - process.t_data))  # at the data, at the prior
    near = process.t_data + (first - process.t_data) * torch.tensor([1.0, 1.1, 1.5, 3.0], dtype=torch.float64)
    e = embed(near)
    assert e.isfinite().all()
    assert ((e[1:] - e[:-1]).abs().max(1).values > 1e-2).all()
    # samplers start exactly at the prior's end, where training times are rare: nothing may jump there
    far = last + (process.t_data - last) * torch.tensor([0.0, 1e-3, 1e-2], dtype=torch.float64)
    assert (embed(far) - embed(far[:1])).abs().max() < 2e-2
    assert (embed(near.float().double()) - e).abs().max() < 1e-3  # nor may the rounding of t matter


def test_classes():
    net = perturbed(nets.MLP(4, 2, width=16, depth=2, classes=3))
    m, t = torch.randn(3, 4), torch.full((3,), 0.5)
    by_class = [net(m, t, torch.full((3,), c)) for c in range(3)] + [net(m, t)]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(by_class) for b in by_class[:i])
    with pytest.raises(ValueError, match="without classes"):
        nets.MLP(4, 2)(m, t, torch.zeros(3, dtype=torch.long))


def test_bf16_autocast_of_the_net_is_close_to_float32():
    net = perturbed(nets.UNet(2, 1, width=16))
    m, t = torch.randn(4, 2, 8, 8), torch.linspace(0.1, 0.9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(m, t)
    full = net(m, t)
    assert (low - full).abs().max() < 0.05 * full.abs().max()


def test_cifar10_net_has_the_promised_size():
    config, _ = train.configure(["--data", "cifar10"])
    config |= {"shape": [3, 32, 32], "std": 0.5, "bound": 1.0}
    with torch.device("meta"):
        net = train.build(config)[2]
    assert 35e6 < sum(p.numel() for p in net.parameters()) < 60e6


# ---------------------------------------------------------------------------------------------------------------------
# Training and sampling from the command line, at toy size

TOY = "--steps 6 --batch 16 --width 8 --blocks 1 --log-every 1 --save-every 3 --device cpu".split()
HERE = Path(__file__).resolve().parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Checkpoints of toy runs, by method."""
    out = tmp_path_factory.mktemp("toy")
    for method in ("agm", "hold"):
        train.main(["--method", method, "--param", "paper", "--out", str(out / method), *TOY])
    train.main(["--out", str(out / "denoiser"), *TOY])
    return out


def losses(folder):
    """{step: (loss, gradient norm)} as printed; a later line about the same step wins."""
    found = re.findall(r"^step (\d+) loss (\S+) grad (\S+)", (folder / "log.txt").read_text(), re.M)
    return {int(step): rest for step, *rest in found}


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_learning_rate_and_ema():
    config = {"lr": 1.0, "warmup": 10, "steps": 100}
    rates = [train.learning_rate(s, config) for s in range(100)]
    assert max(rates) <= 1 and rates[0] < 0.11 and rates[-1] < 1e-3 and rates[50] == pytest.approx(0.5)
    net, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    weights, average = [0.3, -1.0, 2.0], 5.0
    ema.weight.data.fill_(average)
    for step, w in enumerate(weights):
        net.weight.data.fill_(w)
        train.update_ema([ema.weight], [net.weight], step, 0.15)
        d = min(0.15, (1 + step) / (10 + step))
        average = d * average + (1 - d) * w
        assert abs(ema.weight.item() - average) < 1e-6


@pytest.mark.parametrize("param", ["paper", "denoiser"])
@pytest.mark.parametrize("method", ["agm", "hold"])
def test_training_learns(folder, method, param):
    """Two thousand samples of a toy run have the data's mean and spread: far from the prior's, and from zero's."""
    np.save("blob.npy", (5 + 0.5 * np.random.default_rng(0).standard_normal((500, 2)) * [1, 3]).astype("f4"))
    options = "--data blob.npy --steps 800 --batch 128 --width 64 --blocks 4 --lr 3e-3 --out run".split()
    train.main(["--method", method, "--param", param, *options])
    sample.main("--ckpt run/ckpt.pt --n 2000 --nfe 20".split())
    x = np.load("run/samples.npz")["arr_0"]
    assert x.dtype == np.float32 and x.shape == (2000, 2)
    assert np.abs(x.mean(0) - 5).max() < 0.2  # in the file's own units
    assert np.abs(x.std(0) / [0.5, 1.5] - 1).max() < 0.2


def test_kill_and_resume_repeats_the_uninterrupted_run(folder):
    options = [*TOY, "--steps", "40", "--save-every", "7", "--dropout", "0.1"]
    train.main(["--out", "whole", *options])
    command = [sys.executable, str(HERE / "train.py"), "--out", "cut", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 17 "):
            os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert torch.load("cut/ckpt.pt", weights_only=True)["step"] < 40
    train.main(["--resume", "--out", "cut"])
    assert losses(folder / "cut") == losses(folder / "whole") and len(losses(folder / "whole")) == 40
    a, b = (torch.load(f"{run}/ckpt.pt", weights_only=True) for run in ("whole", "cut"))
    assert all((a[part][k] == b[part][k]).all() for part in ("net", "ema") for k in a[part])


def test_resume_without_out_takes_the_newest_run_and_may_go_further(folder):
    train.main(TOY)
    train.main(TOY)
    assert sorted(p.name for p in Path("runs").iterdir()) == ["agm-digits", "agm-digits-2"]  # nothing overwritten
    train.main(["--resume", "--steps", "8"])
    assert len(losses(folder / "runs/agm-digits-2")) == 8
    assert len(losses(folder / "runs/agm-digits")) == 6


@pytest.mark.parametrize(
    ("param", "drawn"), [("denoiser", "ln sigma ~ N(-1.2, 1.2^2)"), ("paper", "t in (1e-05, 0.999)")]
)
def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(folder, capsys, monkeypatch, param, drawn):
    train.main(["--out", "run", *TOY, "--param", param])
    before = Path("run/ckpt.pt").read_bytes()
    monkeypatch.setattr(agm_ref, "loss", lambda process, net, x: next(net.parameters()).sum() * math.nan)
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "--out", "run", "--steps", "9"])
    assert "steps 7-7" in stop.value.code and "--lr" in stop.value.code and drawn in stop.value.code
    assert Path("run/ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("method", ["agm", "hold"])
def test_samples_do_not_depend_on_batch_or_count(toy, folder, method, capsys):
    ckpt = str(toy / method / "ckpt.pt")
    for name in train.METHODS[method][0].SAMPLERS:
        for out, n, batch in (("a", 5, 5), ("b", 3, 2)):
            options = ["--sampler", name, "--nfe", "3", "--n", str(n), "--batch", str(batch), "--out", out]
            sample.main(["--ckpt", ckpt, *options])
        assert "NFE 3 " in capsys.readouterr().out
        a, b = (np.load(f"{out}/samples.npz")["arr_0"] for out in "ab")
        assert a.dtype == np.uint8 and a.shape == (5, 8, 8, 1)
        assert np.abs(a[:3].astype(int) - b).max() <= 1  # a batch's size may round a pixel the other way
        assert (a[0] != a[1]).any()
    sample.main(["--ckpt", ckpt, "--n", "3", "--nfe", "3", "--seed", "1", "--out", "c", "--sampler", name])
    assert np.abs(np.load("c/samples.npz")["arr_0"].astype(int) - b).max() > 1


@pytest.mark.parametrize(("asked", "name"), [([], "AGM("), (["--method", "hold", "--order", "2"], "HOLD(order=2")])
def test_a_denoiser_checkpoint_serves_any_process(toy, folder, asked, name, capsys):
    sample.main(["--ckpt", str(toy / "denoiser" / "ckpt.pt"), "--n", "3", "--nfe", "4", "--out", "here", *asked])
    line = capsys.readouterr().out
    assert name in line and "NFE 4 " in line and "denoiser" in line
    assert np.load("here/samples.npz")["arr_0"].shape == (3, 8, 8, 1)


def test_likelihood_from_the_command_line(toy, folder, capsys):
    """Images: an untrained toy net knows little, so the bound is some bits above the 8 of uniform noise, and finite."""
    sample.main(["--ckpt", str(toy / "hold" / "ckpt.pt"), "--nll", "--n", "3", "--tol", "1e-1"])
    line = capsys.readouterr().out
    bits, error = (float(v) for v in re.search(r"<= (\S+) \+- (\S+) bits/dim", line).groups())
    assert math.isfinite(bits) and bits > 1 and error > 0
    assert "3 held-out samples of digits" in line


def test_likelihood_is_in_the_units_of_the_data(folder, capsys, monkeypatch):
    """Points scaled by s cost log s more nats each per axis, whatever the network."""
    points = np.random.default_rng(0).standard_normal((50, 2)).astype("f4")
    found = {}
    for factor in (1.0, 10.0):
        np.save("blob.npy", factor * points)
        train.main(["--method", "hold", "--data", "blob.npy", "--out", f"run{factor}", *TOY])
        capsys.readouterr()
        sample.main(["--ckpt", f"run{factor}/ckpt.pt", "--nll", "--tol", "1e-3"])
        found[factor] = float(re.search(r"<= (\S+) \+-", capsys.readouterr().out)[1])
    assert abs(found[10.0] - found[1.0] - 2 * math.log(10)) < 1e-2


MISTAKES = {
    "unknown data set": (["train", "--data", "digit", "--out", "new"], "did you mean digits"),
    "missing data folder": (["train", "--data", "cifar10", "--data-dir", "nowhere", "--out", "new"], "nowhere"),
    "missing file": (["train", "--data", "none.npy", "--out", "new"], "none.npy"),
    "no steps": (["train", "--steps", "0", "--out", "new"], "--steps must be a whole number from 1"),
    "no number": (["train", "--steps", "many", "--out", "new"], "--steps"),
    "unknown option": (["sample", "--nef", "5"], "--nef"),
    "no such level": (["train", "--attention", "2", "--out", "new"], "--attention"),
    "no width": (["train", "--mult", "0", "--out", "new"], "--mult"),
    "no learning rate": (["train", "--lr", "0", "--out", "new"], "--lr must be a number from"),
    "SDE without its network": (["train", "--sde", "--out", "new"], "add --param paper"),
    "HOLD of order 0": (["train", "--method", "hold", "--order", "0", "--out", "new"], "order"),
    "folder with a run": (["train", "--out", "{toy}/agm"], "--resume"),
    "unwritable folder": (["train", "--out", "{toy}/agm/ckpt.pt/deeper"], "choose another --out"),
    "no such device": (["train", "--device", "warp", "--out", "new"], "--device warp"),
    "resume of nothing": (["train", "--resume", "--out", "new"], "no checkpoint at new/ckpt.pt"),
    "resume, no runs": (["train", "--resume"], "no checkpoint under runs/"),
    "resume with another method": (["train", "--resume", "--out", "{toy}/agm", "--method", "hold"], "--method agm"),
    "resume with another rate": (["train", "--resume", "--out", "{toy}/agm", "--lr", "0.5"], "--lr 0.002"),
    "resume of a cut checkpoint": (["train", "--resume", "--out", "{toy}/cut"], "is damaged"),
    "sample from nothing": (["sample", "--ckpt", "new.pt"], "no checkpoint at new.pt"),
    "sample, no runs": (["sample"], "no checkpoint under runs/"),
    "sample from a folder": (["sample", "--ckpt", "{toy}/agm"], "Is a directory"),
    "sample from a cut checkpoint": (["sample", "--ckpt", "{toy}/cut/ckpt.pt"], "is damaged"),
    "sample from a foreign file": (["sample", "--ckpt", "{toy}/foreign.pt"], "no checkpoint of this project"),
    "sample from a list": (["sample", "--ckpt", "{toy}/list.pt"], "no checkpoint of this project"),
    "sample from an old file": (["sample", "--ckpt", "{toy}/old.pt"], "'param'"),
    "sample from text": (["sample", "--ckpt", "{toy}/agm/log.txt"], "no checkpoint"),
    "nfe 0": (["sample", "--ckpt", "{toy}/agm/ckpt.pt", "--nfe", "0"], "--nfe must be a whole number from 1"),
    "n 0": (["sample", "--ckpt", "{toy}/agm/ckpt.pt", "--n", "0"], "--n must be a whole number from 1"),
    "the other method": (["sample", "--ckpt", "{toy}/agm/ckpt.pt", "--method", "hold"], "was trained as agm"),
    "another order": (["sample", "--ckpt", "{toy}/hold/ckpt.pt", "--order", "2"], "was trained as hold of order 3"),
    "the other method's sampler": (["sample", "--ckpt", "{toy}/agm/ckpt.pt", "--sampler", "lie"], "exponential"),
    "another sampler's option": (
        ["sample", "--ckpt", "{toy}/agm/ckpt.pt", "--sampler", "em", "--multistep", "2"],
        "em has no --multistep: leave it out, or choose --sampler exponential",
    ),
    "eta for AGM's default": (
        ["sample", "--ckpt", "{toy}/agm/ckpt.pt", "--sampler", "em", "--eta", "1"],
        "choose --sampler ode",
    ),
    "endless rho": (
        ["sample", "--ckpt", "{toy}/agm/ckpt.pt", "--rho", "inf"],
        "--rho must be a number from 0.01 to 100",
    ),
    "tiny rho": (["sample", "--ckpt", "{toy}/hold/ckpt.pt", "--rho", "1e-3"], "--rho must be"),
    "nll with a sampler": (["sample", "--ckpt", "{toy}/hold/ckpt.pt", "--nll", "--eta", "1"], "leave out --sampler"),
    "negative eta": (["sample", "--ckpt", "{toy}/hold/ckpt.pt", "--eta", "-1"], "--eta must be a number from 0"),
    "an order for AGM": (["sample", "--ckpt", "{toy}/denoiser/ckpt.pt", "--order", "2"], "give --method hold"),
    "t_end after the data": (["sample", "--ckpt", "{toy}/agm/ckpt.pt", "--t-end", "1.5"], "t_end"),
    "nll of AGM": (["sample", "--ckpt", "{toy}/agm/ckpt.pt", "--nll"], "--nll needs a HOLD checkpoint"),
    "nll of other data": (["sample", "--ckpt", "{toy}/hold/ckpt.pt", "--nll", "--data", "moons"], "moons has shape"),
    "nll without tolerance": (["sample", "--ckpt", "{toy}/hold/ckpt.pt", "--nll", "--tol", "0"], "--tol"),
    "samples nowhere": (["sample", "--ckpt", "{toy}/agm/ckpt.pt", "--out", "{toy}/agm/ckpt.pt"], "another --out"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_loses_nothing(toy, folder, name, capsys):
    (toy / "cut").mkdir(exist_ok=True)
    (toy / "cut" / "ckpt.pt").write_bytes((toy / "agm" / "ckpt.pt").read_bytes()[:20000])
    torch.save({"state_dict": torch.zeros(3)}, toy / "foreign.pt")
    torch.save([1, 2], toy / "list.pt")
    old = torch.load(toy / "agm" / "ckpt.pt", weights_only=True)
    del old["config"]["param"]
    torch.save(old, toy / "old.pt")
    before = snapshot(toy)
    (script, *argv), expected = MISTAKES[name]
    with pytest.raises(SystemExit) as stop:
        {"train": train, "sample": sample}[script].main([a.replace("{toy}", str(toy)) for a in argv])
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code and expected in stop.value.code
    assert snapshot(toy) == before and not list(folder.rglob("*.*"))


def load_bench(script):
    spec = importlib.util.spec_from_file_location("bench", HERE / script)
    bench = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = bench  # dataclasses look their module up
    spec.loader.exec_module(bench)
    return bench


def test_bench_refuses_networks_of_another_number_of_updates(folder):
    train.main([*TOY, "--data", "gmm", "--out", "net"])
    with pytest.raises(SystemExit, match="net was trained with steps 6, not 3: ask for that, or choose another --out"):
        load_bench("bench/peers.py").checkpoint(Path("net"), "denoiser", 3, [])


def test_errors_reach_the_shell_as_one_line_and_a_status(folder):
    command = [sys.executable, str(HERE / "sample.py"), "--ckpt", "none.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: no checkpoint at none.pt")


def test_readme_states_the_line_counts():
    text = (HERE / "README.md").read_text()
    stated = dict(re.findall(r"`([\w./]+\.py)` \| (\d+)", text))
    assert set(stated) == {p.name for p in HERE.glob("*.py")} | {f"bench/{p.name}" for p in HERE.glob("bench/*.py")}
    for name, lines in stated.items():
        assert len((HERE / name).read_text().splitlines()) == int(lines), name


def test_what_both_methods_need_stands_in_both_letter_for_letter():
    for name in re.search(r"what both need \((.*?)\)", (HERE / "README.md").read_text(), re.S)[1].split(","):
        one, other = (inspect.getsource(getattr(module, name.strip(" `\n"))) for module in (agm_ref, hold_ref))
        assert one == other, name


def readme_commands():
    """Every `python SCRIPT.py ...` of the two READMEs' code blocks but the tests' own, in order and once."""
    text = "".join((HERE / name).read_text() for name in ("README.md", "bench/README.md"))
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S))
    commands = dict.fromkeys(re.findall(r"python [\w/]+\.py[^\n&]*", blocks))
    return [shlex.split(c, comments=True)[1:] for c in commands]


def test_readme_commands_run(folder, tmp_path, capsys):
    """All of them, in order, in one folder, with toy sizes appended."""
    unpack(tmp_path)
    commands = readme_commands()
    assert {"train.py", "sample.py"} <= {script for script, *_ in commands}
    for script, *options in commands:
        if script == "train.py":
            small = TOY[2:] if "--resume" in options else TOY
            small = ["--steps", "9"] if "--resume" in options else small
            options += [*small, *(["--data-dir", str(tmp_path)] if "cifar10" in options else [])]
            train.main(options)
        elif script == "sample.py":
            sample.main([*options, "--n", "4", "--nfe", "2"])
        else:
            bench = load_bench(script)
            images = ["--data", "cifar10", "--data-dir", str(tmp_path)] if script == "bench/images.py" else []
            bench.main([*options, *bench.TOY, *images])
