"""All tests: python -m pytest -q. Each compares with something independent of the code it tests. First the two method
files, section by section and mostly side by side, then data, networks, training and sampling."""

import contextlib
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
import resource
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
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

import agm_ref
import data
import hold_ref
import nets
import sample
import train
from agm_ref import AGM
from hold_ref import HOLD

# ---------------------------------------------------------------------------------------------------------------------
# What serves both methods: their laws in 100 digits, a mixture with its posterior mean, Runge and Kutta's fourth order

F64 = torch.float64
ODE, SDE = AGM(), AGM(sde=True)
PROCESSES = [ODE, *(HOLD(order=n) for n in (1, 2, 3, 4))]


def each_of(*processes):
    return pytest.mark.parametrize("P", processes, ids=lambda P: f"{type(P).__name__}{P.n}")


def module_of(P):
    return agm_ref if isinstance(P, AGM) else hold_ref


def paper(P):
    return dataclasses.replace(P, param="paper")


def randn64(seed, *shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def worst(a, b, relative=False):
    """Largest absolute (or relative) difference, in float64."""
    a, b = torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    return float(((a - b) / (b if relative else 1)).abs().max())


def rk4(rate, s, y, h):
    k1 = rate(s, y)
    k2 = rate(s + h / 2, y + h / 2 * k1)
    k3 = rate(s + h / 2, y + h / 2 * k2)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(s + h, y + h * k3))


@lru_cache(None)
def exact(P, t):
    """mean (n,), cov (n, n) and its lower factor as float64, computed with 100 digits at the exact value of float t."""
    with localcontext() as context:
        context.prec = 100
        mean, cov = (agm_law if isinstance(P, AGM) else hold_law)(P, Decimal(float(t)))
        L = 0 * cov
        for i, j in zip(*np.tril_indices(P.n), strict=True):
            rest = cov[i, j] - L[i, :j] @ L[j, :j]
            L[i, j] = rest.sqrt() if i == j else rest / L[j, j]
        return [torch.from_numpy(a.astype(float)) for a in (mean, cov, L)]


def agm_law(P, t):
    """The error e = x - x1 after a unit of e(0), of v(0), and of a kick at remaining time s is a sum of tau and tau^4:
    e = (4 tau - tau^4)/3, (tau - tau^4)/3, (tau - tau^4/s^3)/3, and v = de/dt. Kicks have variance p^2 s^2 ds."""
    tau, p, k, O = 1 - t, Decimal(str(P.p)), Decimal(str(P.k)), np.outer
    one, four = np.array([tau, Decimal(-1)]) / 3, np.array([tau**4, -4 * tau**3]) / 3  # (e, v) of each
    e0, v0 = 4 * one - four, one - four
    I = (1 - tau**3) / 3, -tau.ln(), (tau**-3 - 1) / 3  # int s^2 (1, s^-3, s^-6) ds from tau to 1
    kicks = O(one, one) * I[0] - (O(one, four) + O(four, one)) * I[1] + O(four, four) * I[2]
    return [1, 0] - e0, O(e0, e0) + O(v0, v0) + k * (O(e0, v0) + O(v0, e0)) + p**2 * kicks


def hold_law(P, t):
    """exp(F t) by Taylor's series at t / 4096, squared twelve times, also where a finite sum would do."""
    n, lam2, L_inv = P.n, Decimal(max(2 * P.n - 3, 1)), Decimal(P.L_inv)
    gamma = [(lam2 * (n * n - i * i) / (4 * i * i - 1)).sqrt() for i in range(n - 1, 0, -1)]
    eye = np.array([[Decimal(i == j) for i in range(n)] for j in range(n)])
    F = 0 * eye
    for i, g in enumerate(gamma if P.gamma is None else map(Decimal, P.gamma)):
        F[i, i + 1], F[i + 1, i] = g, -g
    F[-1, -1] = -(n * lam2.sqrt() if P.xi is None else Decimal(P.xi))
    E = term = eye
    for k in range(1, 50):
        term = term @ F * t / 4096 / k
        E = E + term
    for _ in range(12):
        E = E @ E
    S0 = Decimal(P.alpha) * L_inv * eye
    S0[0, 0] *= 0
    return E[:, 0], L_inv * eye + E @ (S0 - L_inv * eye) @ E.T


def white(P, m, t):
    """z = L^-1 m as (B, n, D), and kappa = L^-1 mean (n,)."""
    mean, _, L = exact(P, t)
    solve = torch.linalg.solve_triangular
    return solve(L, m.double().reshape(len(m), P.n, -1), upper=False), solve(L, mean[:, None], upper=False)[:, 0]


class Mixture:
    """Data sum_j weight_j N(centre_j, std^2 I) in D dimensions, and what a perfectly trained network returns. `denoise`
    also takes one std for each j."""

    def __init__(self, weights, centres, std):
        self.weights, self.centres = (torch.tensor(a, dtype=F64) for a in (weights, centres))
        self.std, self.mean, self.times = std, self.weights @ self.centres, []

    def posterior_mean(self, P, m, t):
        """E[x | m] for m (B, n D), by Bayes: p(j | m) and the Gaussian regression of x on m within each component.
        Given j, z is N(kappa centre_j, I + std^2 kappa kappa^T), inverted by Sherman and Morrison."""
        z, kappa = white(P, m, t)
        gap = z[:, None] - kappa[:, None] * self.centres[:, None]  # (B, j, n, D)
        along, shrink = kappa @ gap, self.std**2 / (1 + self.std**2 * kappa @ kappa)
        distance = gap.square().sum((-2, -1)) - shrink * along.square().sum(-1)
        share = torch.softmax(self.weights.log() - distance / 2, 1)
        return (share[..., None] * (self.centres + shrink * along)).sum(1)

    def denoise(self, y, sigma):
        """E[x | y], y = x + sigma noise (B, D), sigma (B, 1) or ()."""
        gap, var = y[:, None] - self.centres, self.std**2 + sigma**2
        density = -gap.square().sum(-1) / (2 * var) - y.shape[-1] / 2 * var.log()
        share = torch.softmax(self.weights.log() + density, 1)
        return (share[..., None] * (self.centres + (self.std**2 / var)[..., None] * gap)).sum(1)

    def net(self, P):
        """F/s or eps_n for a process of the paper's parameterisation, which it notes the times of; else the output that
        `precondition` turns into E[x | y], given c_in y and sigma / (1 + sigma)."""

        def target(m, t, label=None):
            assert t.shape == (len(m),) and t.dtype == m.dtype
            self.times.append(float(t[0]))
            return target_of(P, self.posterior_mean(P, m, self.times[-1]), m.double(), self.times[-1]).to(m)

        def denoiser(u, time, label=None):
            sigma, s = (time / (1 - time)).double()[:, None], P.sigma_data
            root = (sigma**2 + s**2).sqrt()
            return ((self.denoise(root * u.double(), sigma) - s**2 / root * u) * root / (sigma * s)).to(u)

        return target if P.param == "paper" else denoiser


def target_of(P, x, m, t):
    """What the paper's network is to return at m if the data are x: F/s or eps_n."""
    if isinstance(P, AGM):
        return agm_ref.acceleration(P, x, m, t) / agm_ref.scale(P, t)
    w, b = hold_ref.affine(P, t)
    return hold_ref.mix(w[None], m) + float(b) * x


GAUSSIAN = Mixture([1.0], [[0.4, -0.7]], 0.5)
MIXTURE = Mixture([0.2, 0.5, 0.3], [[-0.8, 0.1], [0.3, 0.9], [0.6, -0.7]], 0.1)
SMOOTH = Mixture([0.2, 0.5, 0.3], [[-0.8, 0.1], [0.3, 0.9], [0.6, -0.7]], 0.25)  # modes not told apart at once


def asked(P):
    """Times from prior to data at which targets are compared."""
    return [1e-5, 0.1, 0.37, 0.5, 0.8, 0.9, 0.97, 0.99, 0.999] if isinstance(P, AGM) else [P.T, 3.0, 0.7, 0.5, P.t_min]


def answering(P, x_of, seen):
    """A denoiser network that answers x_of(root), root = sqrt(SNR) (B,), and notes what it saw: y / sigma, root."""

    def net(u, time, label=None):
        root, s = (1 / time - 1).double(), P.sigma_data
        c = (1 + s**2 * root[:, None] ** 2) ** -0.5
        seen.append((u.double() / c, float(root[0])))
        return (x_of(root) - s**2 * root[:, None] * c * u) / (s * c)

    return net


def time_of_noise(P, sigma):
    """The time at which y has noise of standard deviation sigma."""
    if isinstance(P, HOLD):
        return P.time_of_snr(sigma**-2)
    return float(P.time(torch.tensor(1 / sigma, dtype=F64).log1p(), 1.0))


def flow(P, data, z, t_end, steps=400):
    """z (B, n, D) at t_end of dz = E[x | y] dkappa from the prior's time on, by Runge and Kutta in log t."""
    s = torch.linspace(math.log(asked(P)[0]), math.log(t_end), 2 * steps + 1, dtype=F64)
    h, (kappa, a, b, c, d) = float(s[2] - s[0]), (P.kappa((s + k * 1e-3).exp()) for k in (0, -2, -1, 1, 2))
    slope = (a - 8 * b + 8 * c - d) / 12e-3

    def rate(i, z):
        k, snr = kappa[round(i)], kappa[round(i)].square().sum()
        return h / 2 * slope[round(i)][:, None] * data.denoise(k @ z / snr, snr**-0.5)[:, None]

    for i in range(steps):
        z = rk4(rate, 2 * i, z, 2)
    return z


# ---------------------------------------------------------------------------------------------------------------------
# 1. The process

CUSTOM = HOLD(order=3, gamma=(1.0, 2.0), xi=4.0, L_inv=0.5, alpha=0.3, T=12.0)


@each_of(ODE, AGM(p=1.5, k=0.4), *(HOLD(order=n) for n in range(1, 7)), CUSTOM)
def test_mean_and_covariance_solve_the_moment_equations(P):
    """Given x = 1: mean' = A mean + b, cov' = A cov + cov A^T + Q. AGM in s = -ln tau up to t = .999, HOLD up to 2."""
    n, is_agm = P.n, isinstance(P, AGM)
    A, b, Q = np.zeros((n, n)), np.zeros(n), np.zeros((n, n))
    cov = np.array([[1, P.k], [P.k, 1]]) if is_agm else np.diag([0.0] + [P.alpha * P.L_inv] * (n - 1))
    if not is_agm:
        gamma, xi = P.damping
        for i, g in enumerate(gamma):
            A[i, i + 1], A[i + 1, i] = g, -g
        A[-1, -1], Q[-1, -1] = -xi, 2 * xi * P.L_inv

    def rate(s, y):
        tau = math.exp(-s) if is_agm else 1
        if is_agm:
            A[:], b[1], Q[1, 1] = [[0, 1], [-4 / tau**2, -4 / tau]], 4 / tau**2, (P.p * tau) ** 2
        AS = A @ y[:, 1:]
        return tau * np.column_stack([A @ y[:, 0] + b, AS + AS.T + Q])

    y, end, parts = np.column_stack([[0 if is_agm else 1] + [0] * (n - 1), cov]), -math.log(1e-3) if is_agm else 2.0, 20
    steps = 600 if n > 4 else 200
    for i in range(parts):
        for j in range(steps):
            y = rk4(rate, end * (i + j / steps) / parts, y, end / parts / steps)
        t = end * (i + 1) / parts
        t = -math.expm1(-t) if is_agm else t
        assert worst(P.mean(t), y[:, 0]) < 1e-9 and worst(P.cov(t), y[:, 1:]) < 1e-9


@each_of(ODE, *(HOLD(order=n) for n in range(1, 9)))
def test_the_factor_keeps_its_digits(P):
    """Every entry to nine digits, without jitter, up to t = 1 for AGM and down to t_min for HOLD. An entry that changes
    its sign near t has no relative error, so a second list of times asks for absolute digits."""
    rows = torch.tril_indices(P.n, P.n).unbind()
    if isinstance(P, AGM):
        times, more = [0.0, 1e-5, 1e-3, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, *(1 - 10.0**-j for j in range(2, 7))], []
    else:
        early = [1e-5, 1e-3, 0.1, 1.0] if P.n < 4 else [0.02, 0.1, 1.0] if P.n < 7 else [1.5]
        times, more = [*early, P.t_min, 3.0, 6.0], np.geomspace(P.t_min, P.T, 20)
    for t in times:
        _, cov, L = exact(P, t)
        assert worst(P.cholesky(t)[rows], L[rows], relative=True) < 1e-9
        assert worst(P.cholesky(t).triu(1), 0 * L) == 0
        assert isinstance(P, HOLD) or worst(P.cov(t), cov, relative=True) < 1e-9
    for t in more:
        assert worst(P.cholesky(t), exact(P, t)[2]) < 5e-11


OTHER = [((1.0,), 0.5), ((0.7, 1.3), 9.0), ((1.0, 2.0, 3.0), 5.0), ((30.0, 80.0), 160.0)]
OTHER += [(None, xi) for xi in (12.0, 20.0, 100.0)]  # of order 3: overdamped


@pytest.mark.parametrize(("gamma", "xi"), OTHER, ids=str)
def test_other_constants(gamma, xi):
    """Also where the friction is strong or the time long, and the integral over the noise needs many nodes."""
    P = HOLD(order=len(gamma) + 1 if gamma else 3, gamma=gamma, xi=xi, T=100.0 if xi < 12 or not gamma else 6.0)
    for t in (0.01, 0.1, 0.5, 3.0, 6.0, 20.0, 50.0):
        assert P.diffusion(t).shape[-1] <= 40  # whatever t: memory is bounded
        for found, truth in zip((P.mean(t), P.cov(t), P.cholesky(t)), exact(P, t), strict=True):
            assert worst(found, truth) < 1e-11
    assert P.diffusion(torch.tensor([1e-3, 50.0])).shape[-1] <= 40


@pytest.mark.parametrize("n", range(1, 9))
def test_critical_damping(n):
    """(F - lam I)^n = 0, and no lower power; the values known for n <= 5."""
    P, lam, eye = HOLD(order=n), -math.sqrt(max(2 * n - 3, 1)), torch.eye(n, dtype=F64)
    N = P.drift() - lam * eye
    assert worst(torch.linalg.matrix_power(N, n), 0 * N) <= 1e-12 * float(torch.linalg.matrix_norm(N, 2)) ** n
    assert worst(torch.linalg.matrix_power(N, n - 1), 0 * N) > 0.1
    known = {1: ((), 1), 2: ((1,), 2), 3: ((1, 8**0.5), 27**0.5), 4: ((1, 2, 5), 80**0.5)}
    known[5] = ((1, 3.2**0.5, 9.8**0.5, 56**0.5), 175**0.5)
    if n in known:
        for found, value in zip(P.damping, known[n], strict=True):
            assert found == pytest.approx(value, rel=1e-14)
    assert dataclasses.replace(HOLD(), order=n).damping == P.damping


def test_orders_1_and_2_are_ou_and_langevin():
    """By hand; for unit mass and friction 2, exp(F t) = e^-t [[1 + t, t], [-t, 1 - t]]."""
    t, P, Q = torch.linspace(0.001, 6, 50, dtype=F64), HOLD(order=1, L_inv=0.8), HOLD(order=2)
    assert worst(P.mean(t)[:, 0], torch.exp(-t)) < 1e-14
    assert worst(P.cov(t)[:, 0, 0], 0.8 * (1 - torch.exp(-2 * t))) < 1e-14
    E = torch.stack([1 + t, t, -t, 1 - t], -1).view(50, 2, 2) * torch.exp(-t)[:, None, None]
    assert worst(Q.mean(t), E[..., 0]) < 1e-14
    eye, S0 = torch.eye(2, dtype=F64), torch.tensor([[0, 0], [0, 0.04]], dtype=F64)
    assert worst(Q.cov(t), eye + E @ (S0 - eye) @ E.mT) < 1e-13


@each_of(*PROCESSES, HOLD(order=5), HOLD(order=6))
def test_snr_and_clock(P):
    """|kappa|^2, near 0 at the prior, at known times; `time` inverts `clock`, up to HOLD's table of 1,000 knots."""
    start, end = asked(P)[0], asked(P)[-1]
    assert float(P.snr(start)) <= 1e-3
    known = {1: 3.454, 2: 5.615, 3: 4.272, 4: 4.041, 5: 4.002, 6: 4.029}
    if isinstance(P, HOLD):
        assert abs(P.time_of_snr(1e-3) - known[P.n]) < 1e-3
        assert abs(float(P.snr(end)) / P.snr_max - 1) < 1e-6 and abs(float(P.snr(P.time_of_snr(1.0))) - 1) < 1e-6
        assert end >= (1e-5 if P.n <= 3 else 0.02)  # where the factor is tested
    for t in (start, 0.5, end):
        kappa = white(P, torch.zeros(1, P.n), t)[1]
        assert worst(P.kappa(t), kappa) < 1e-9 * float(kappa.norm())
        assert abs(float(P.snr(t) / kappa.square().sum()) - 1) < 1e-9
    for R in (1.0, 10.0):
        clock = torch.linspace(float(P.clock(start, R)), float(P.clock(end, R)), 777, dtype=F64)
        t = P.time(clock, R)
        assert worst(P.clock(t, R), clock) < (1e-9 if isinstance(P, AGM) else 1e-4)
        assert abs(float(t[0]) - start) < 1e-12 and abs(float(t[-1]) - end) < 1e-9


@each_of(ODE, HOLD(), HOLD(order=5, gamma=(1.0, 2.0, 3.0, 4.0), xi=5.0, T=100.0))
def test_times_of_any_shape(P):
    """Entry by entry, for float32 and float64 times."""
    for t in (torch.rand(2, 5, generator=torch.Generator().manual_seed(0)), torch.full((2, 5), 0.5, dtype=F64)):
        for f in (P.mean, P.kappa, P.cov, P.cholesky, P.snr):
            assert f(t).shape == (2, 5, *f(0.5).shape) and f(t).dtype == F64
            assert worst(f(t)[1, 2], f(float(t[1, 2]))) < 1e-12 * float(f(t).abs().max())


@each_of(ODE, AGM(k=0.5), HOLD(order=2, L_inv=0.25), HOLD())
def test_prior(P):
    """The generator's normal numbers, coloured by the factor of the prior's covariance: its law and its seed."""
    shape = (5000, P.n * 3, 2, 2)
    m = P.prior((5000, 3, 2, 2), torch.Generator().manual_seed(1))
    eps = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double().view(5000, P.n, -1)
    L = exact(P, 0.0)[2] if isinstance(P, AGM) else P.L_inv**0.5 * torch.eye(P.n, dtype=F64)
    assert m.shape == shape and m.dtype == torch.float32
    assert worst(m.view(5000, P.n, -1), L @ eps) < 1e-6
    blocks = m.double().view(5000, P.n, -1).movedim(1, 0).flatten(1)
    assert worst(blocks.cov(), L @ L.T) < 5 * math.sqrt(2 / 60000)  # five standard errors


@each_of(ODE, paper(ODE), HOLD(order=2), paper(HOLD()))
def test_defaults_of_torch_do_not_matter(P):
    """A script may set another default device and dtype: coefficients stay float64 on the CPU, states as they came."""
    module, m0, x0 = module_of(P), P.prior((4, 2), torch.Generator().manual_seed(0)), torch.zeros(5, 2)
    names = [name for name in module.SAMPLERS if name in ("ode", "exponential")]

    def net(m, t, label=None):
        return 0.1 * m[:, :2]

    def run(P):
        return [P.cov(0.5), P.prior((4, 2), torch.Generator("cpu").manual_seed(0)),
                *(module.SAMPLERS[name](P, net, m0, 4) for name in names)]  # fmt: skip

    right, Q = run(P), dataclasses.replace(P, sigma_data=0.5 + 1e-9)  # whose coefficients nothing keeps yet
    with torch.device("meta"):
        torch.set_default_dtype(torch.float16)
        try:
            found = run(Q)
            assert module.loss(Q, net, x0).dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and worst(a, b) < 1e-5 for a, b in zip(right, found, strict=True))


@each_of(ODE, HOLD())
def test_mix_and_each_keep_their_precision_under_autocast(P):
    module, A, m = module_of(P), randn64(0, 5, 2, 3), randn64(1, 5, 6, 4, 4)
    truth = torch.einsum("bij,bjk->bik", A, m.view(5, 3, -1)).reshape(5, 4, 4, 4)
    assert worst(module.mix(A, m), truth) < 1e-14
    assert worst(module.each(A[:, 0, 0], m), torch.einsum("b,bcij->bcij", A[:, 0, 0], m)) < 1e-14
    with torch.autocast("cpu", torch.bfloat16):
        y = module.mix(A, m.float())
    assert y.dtype == torch.float32 and worst(y.double(), truth) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# 2. The paper's target and loss


def definition(P, x, m, t):
    """F of one state m (n, D) in the words of the papers: a*, less g^2/2 score_v for the ODE; -L_nn score_n of HOLD."""
    tau, (mean, _, L), eye = 1 - t, exact(P, t), torch.eye(m.shape[1], dtype=F64)
    state = m.detach().clone().requires_grad_()
    law = MultivariateNormal(torch.kron(mean, x.detach()), scale_tril=torch.kron(L, eye))
    (score,) = torch.autograd.grad(law.log_prob(state.reshape(-1)), state)
    if isinstance(P, HOLD):
        return -L[-1, -1] * score[-1]
    a = 4 / tau * ((x - m[0]) / tau - m[1])
    return a if P.sde else a - (P.p * tau) ** 2 / 2 * score[1]


@each_of(ODE, SDE, *(HOLD(order=n, L_inv=0.6) for n in (1, 2, 3, 4)))
def test_target_and_hop(P):
    module = module_of(P)
    for i, t in enumerate(asked(P)):
        x, eps, ts = randn64(i, 4, 3).clamp(-1, 1), randn64(100 + i, 4, P.n * 3), torch.full((4,), t, dtype=F64)
        mean, _, L = exact(P, t)
        m, label = module.training_pair(P, x, ts, eps)
        assert worst(m.view(4, P.n, 3), mean[:, None] * x[:, None] + L @ eps.view(4, P.n, 3)) < 1e-12
        s = agm_ref.scale(P, t) if isinstance(P, AGM) else 1
        truth = torch.stack([definition(P, *pair, t) for pair in zip(x, m.view(4, P.n, 3), strict=True)])
        # a* divides by tau^2: one rounding of the state, 2^-53, alone is worth 4e-10 at t = .999
        assert worst(s * label, truth) < 1e-9
        assert worst(s * target_of(P, x, m, t), truth) < 1e-9
        for other in (x, randn64(200 + i, 4, 3)):
            F = s * target_of(P, other, m, t)
            assert worst(module.hop(P, F, m, t), other) < (1e-8 if isinstance(P, AGM) else 1e-9)
            if P == SDE:
                y, v = m.chunk(2, 1)
                assert worst(module.hop(P, F, m, t), y + (1 - t) * (v + (1 - t) * F / 4)) < 1e-12
        # at x = 0 the label is linear in eps and has unit variance
        eye = torch.eye(P.n, dtype=F64)
        _, label = module.training_pair(P, torch.zeros(P.n, 1, dtype=F64), ts[:1].expand(P.n), eye)
        assert abs(float(label.square().sum()) - 1) < 1e-12


@each_of(paper(ODE), paper(SDE), paper(HOLD(order=2)), paper(HOLD()))
def test_loss_of_nets_whose_loss_is_known(P):
    """The true target has loss 0; off by one, the mean weight; one time in every stratum, in t or in lambda."""
    torch.manual_seed(0)
    module, x, seen = module_of(P), torch.tensor([[0.3, -0.8]], dtype=F64).repeat(32, 1), []

    def true(m, t, label=None):
        seen.append(t)
        return torch.cat([target_of(P, x[:1], m[i : i + 1], float(t[i])) for i in range(len(m))])

    assert float(module.loss(P, true, x)) < 1e-18
    off_by_one = float(module.loss(P, lambda m, t, label=None: true(m, t) + 1, x))
    assert abs(off_by_one - (float(1 - seen[-1].mean()) if isinstance(P, AGM) else 1)) < 1e-9

    def zero(m, t, label=None):
        seen.append(t)
        return torch.zeros_like(m.chunk(P.n, 1)[0])

    B, D = 40000, 8
    found = float(module.loss(P, zero, torch.zeros(B, D)))  # E[w z^2], z unit normal; Var z^2 = 2, E(1 - t)^2 = 1/3
    expected = 1 - (P.t0 + P.t1) / 2 if isinstance(P, AGM) else 1
    assert abs(found - expected) < 5 * math.sqrt((2 / 3 if isinstance(P, AGM) else 2) / (B * D))
    u = seen[-1].double() if isinstance(P, AGM) else P.clock(seen[-1])
    ends = torch.tensor([asked(P)[0], asked(P)[-1]], dtype=F64)
    edges = torch.linspace(*(ends if isinstance(P, AGM) else P.clock(ends)).tolist(), B + 1, dtype=F64)
    slack = 1e-7 if isinstance(P, AGM) else 1e-4  # float32 times; HOLD's table
    u = u.sort().values
    assert bool(((u >= edges[:-1] - slack) & (u <= edges[1:] + slack)).all())


@each_of(ODE, HOLD())
def test_strata_come_in_random_order(P):
    """One number in each n-th of [0, 1], none tied to a row: over 4,000 draws each row's mean is 1/2."""
    torch.manual_seed(0)
    draws = torch.stack([module_of(P).stratified(8) for _ in range(4000)])
    assert torch.equal((draws * 8).long().sort(1).values, torch.arange(8).expand(4000, 8))
    assert not torch.equal((draws[0] * 8).long(), (draws[1] * 8).long())
    assert (draws.mean(0) - 0.5).abs().max() < 5 / math.sqrt(12 * 4000)
    assert (draws.sort(1).values.mean(0) - (torch.arange(8) + 0.5) / 8).abs().max() < 5 / 8 / math.sqrt(12 * 4000)


@each_of(paper(ODE), paper(SDE), *(paper(HOLD(order=n)) for n in (1, 2, 3, 4)))
def test_the_denoiser_minimises_the_papers_loss(P):
    """A network F_theta = w . m + b D, of a denoiser D, has the paper's loss w(t) b^2 |D(y) - x|^2: the same draws give
    the same value and the same gradients with respect to the denoiser's parameters."""
    torch.manual_seed(0)
    module, x, seen = module_of(P), randn64(0, 32, 2), []
    D = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.SiLU(), torch.nn.Linear(16, 2)).double()

    def denoised(m, t):
        w, snr = module.project(P, t)
        y = module.each((1 + snr).rsqrt(), module.mix(w[:, None], m))  # of unit size
        return D(torch.cat([y, 1 / (1 + snr[:, None].sqrt())], 1))

    def as_the_papers_network(m, t, label=None):
        seen.append((m, t))
        w, b = module.affine(P, t)
        F = module.mix(w[:, None], m) + module.each(b, denoised(m, t))
        return module.each(1 / module.scale(P, t), F) if isinstance(P, AGM) else F

    loss = module.loss(P, as_the_papers_network, x)
    ((m, t),) = seen
    rows = zip(t.tolist(), m.view(32, P.n, 2), x, strict=True)
    # b: how F, by its definition, moves with x at the same m
    b = [(definition(P, xi + 1, mi, ti) - definition(P, xi, mi, ti))[0] for ti, mi, xi in rows]
    weight = torch.stack(b) ** 2
    if isinstance(P, AGM):
        weight = (1 - t) * weight / module.gain(P, t).square().sum(1)
    same = (weight[:, None] * (denoised(m, t) - x).square()).mean()
    assert abs((loss / same).item() - 1) < 1e-10
    for one, other in zip(*(torch.autograd.grad(value, list(D.parameters())) for value in (loss, same)), strict=True):
        assert worst(one, other) < 1e-10 * max(1, float(other.abs().max()))


@each_of(ODE, paper(ODE), HOLD(), paper(HOLD()))
def test_loss_runs_under_autocast_and_backward(P):
    torch.manual_seed(0)
    net = torch.nn.Linear(2 if P.param == "denoiser" else 2 * P.n, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = module_of(P).loss(P, lambda m, t, label=None: net(m), torch.randn(16, 2))
    value.backward()
    assert value.dtype == torch.float32 and float(net.weight.grad.abs().max()) > 0


# ---------------------------------------------------------------------------------------------------------------------
# 3. The denoiser: one network for every process


@pytest.mark.parametrize("param", ["denoiser", "paper"])
@each_of(ODE, SDE, *(HOLD(order=n) for n in (1, 2, 3, 4, 5)))
def test_denoise_is_the_posterior_mean(P, param):
    """E[x | m] by Bayes in phase space is that of a plain denoiser at y (TADA, Prop. 3.1); no more of m matters."""
    P = dataclasses.replace(P, param=param)
    module, net = module_of(P), MIXTURE.net(P)
    for i, t in enumerate([1e-5, 0.01, 0.2, 0.5, 0.8, 0.99] if isinstance(P, AGM) else [0.2, 0.6, 1.5, 4.0]):
        mean, _, L = exact(P, t)
        state = mean[:, None] * randn64(i + 9, 50, 1, 2) + L @ randn64(i, 50, P.n, 2)  # (B, n, D)
        m, w = state.flatten(1), module.project(P, t)[0]
        truth = MIXTURE.posterior_mean(P, m, t)
        assert worst(module.denoise(P, net, m, t), truth) < (1e-8 if isinstance(P, AGM) else 1e-7)
        aside = randn64(20 + i, 50, P.n, 2) * L.diagonal()[:, None]
        aside = aside - w[:, None] * (w @ aside)[:, None] / w.square().sum()  # leaves y alone
        assert worst(MIXTURE.posterior_mean(P, (state + aside).flatten(1), t), truth) < 1e-9
        ahead = mean[:, None] * 0.1 * randn64(30 + i, 50, 1, 2)
        moved = MIXTURE.posterior_mean(P, (state + ahead).flatten(1), t)
        assert t < 0.1 or t > 1 or worst(moved, truth) > 1e-3  # and y does matter


@each_of(AGM(sigma_data=0.7), HOLD(sigma_data=0.7))
def test_denoiser_preconditioning(P):
    """Zero output is the posterior mean of Gaussian data, finite down to SNR 0; the net's input has unit variance."""
    snr, seen = torch.tensor([0.0, 1e-12, 1e-2, 1.0, 1e4], dtype=F64), []

    def net(v, time, label=None):
        seen.append((v, time))
        return torch.zeros_like(v)

    x, eps = randn64(0, 5, 20000) * 0.7, randn64(1, 5, 20000)
    u, precondition = snr.sqrt()[:, None] * x + eps, module_of(P).precondition
    out = precondition(P, net, u, snr)
    assert worst(out[2:], (0.49 / (0.49 + 1 / snr[2:]))[:, None] * (u / snr.sqrt()[:, None])[2:]) < 1e-12
    assert worst(out[:2], torch.zeros_like(out[:2])) < 1e-4
    (v, time), sigma = seen[0], snr[1:] ** -0.5
    assert worst(time[1:], sigma / (1 + sigma)) < 1e-12 and float(time[0]) == 1
    assert (v.square().mean(1) - 1).abs().max() < 5 * math.sqrt(2 / 20000)
    one = precondition(P, lambda v, time, label=None: torch.ones_like(v), u, snr) - out
    assert worst(one, (0.7 / (1 + 0.49 * snr).sqrt())[:, None].expand_as(u)) < 1e-12  # c_out


@each_of(AGM(sigma_data=0.7), HOLD(sigma_data=0.7))
def test_denoiser_loss(P):
    """With a zero net it is 1 whatever the data of variance sigma_data^2, and its gradient there is -2 E[target]."""
    torch.manual_seed(0)
    module, times = module_of(P), []

    def net(v, time, label=None):
        times.append(time)
        return torch.zeros_like(v)

    x = 0.7 * (torch.randint(2, (40000, 1), dtype=F64) * 2 - 1)  # two points: nothing Gaussian about it
    assert abs(float(module.loss(P, net, x)) - 1) < 0.03  # standard error .006
    log_sigma = torch.log(times[0] / (1 - times[0]))
    assert abs(float(log_sigma.mean()) + 1.2) < 0.01 and abs(float(log_sigma.std()) - 1.2) < 0.01
    shift = torch.zeros(1, dtype=F64, requires_grad=True)
    module.loss(P, lambda v, time, label=None: v.sign() * shift, x).backward()
    assert float(shift.grad) < -0.05  # the sign of y tells the sign of x


@each_of(paper(ODE), ODE, paper(HOLD()), HOLD())
def test_bound_keeps_the_data_prediction_in_range(P):
    """A stray of a network near the prior is a huge x; the bound stops it and leaves predictions within it alone."""
    m, net = randn64(0, 50, 2 * P.n), lambda m, t, label=None: 3 * m[:, -2:]
    for t in (asked(P)[0], 0.5, 0.9):
        x, kept = (module_of(P).denoise(Q, net, m, t) for Q in (P, dataclasses.replace(P, bound=1.0)))
        assert x.abs().max() > 1 and worst(kept, x.clamp(-1, 1)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# 4. Samplers

OPTIONS = {
    name: [{key: v, "correct": c, "data_mean": m} for v in values for c in (0, 1) for m in (None, 0.2)]
    for name, key, values in (("ode", "eta", (0, 1)), ("exponential", "multistep", (1, 4)))
}
SAMPLERS = [(P, name) for P in (ODE, HOLD(order=1), HOLD()) for name in module_of(P).SAMPLERS]
every_sampler = pytest.mark.parametrize(("P", "name"), SAMPLERS, ids=lambda v: v if isinstance(v, str) else f"{v.n}")


def prior(P, *shape, seed=1):
    return P.prior(shape, torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("param", ["paper", "denoiser"])
@every_sampler
def test_every_sampler_calls_the_network_nfe_times(P, name, param):
    """With every option, also for one and two calls; the label goes to the network, and no graph comes back."""
    P, seen = dataclasses.replace(P, param=param), []
    weight = torch.tensor(0.1, requires_grad=True)

    def net(m, t, label=None):
        seen.append(label)
        return weight * m[:, :3]

    torch.manual_seed(0)
    for options in OPTIONS.get(name, [{}]):
        for nfe in (1, 2, 5):
            seen.clear()
            x = module_of(P).SAMPLERS[name](P, net, P.prior((2, 3, 4, 4)), nfe, label="a", **options)
            assert seen == ["a"] * nfe, options
            assert x.shape == (2, 3, 4, 4) and x.dtype == torch.float32 and not x.requires_grad
            assert bool(x.isfinite().all())


@every_sampler
def test_points_images_dtypes_and_batches_agree(P, name):
    """Image 3 alone; an image is a point of 24 numbers; the data's mean is a number, or one for each pixel."""

    def net(u, t, label):
        return torch.sin(u + label * u**2) / 9

    def run(m0, seeds, **options):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def randn(x):
            return torch.stack([torch.randn(x.shape[1:], dtype=F64, generator=g) for g in generators]).to(x)

        noise = {} if name == "exponential" else {"randn": randn}
        return module_of(P).SAMPLERS[name](P, net, m0, 6, label=0.5, **noise, **options)

    m, mean = randn64(0, 5, P.n * 3, 2, 4), {"data_mean": 0.2} if name in OPTIONS else {}
    x = run(m, range(5), **mean)
    assert x.shape == (5, 3, 2, 4) and x.dtype == F64
    small = run(m.float(), range(5), **mean)
    assert small.dtype == torch.float32 and worst(small, x) < 1e-4
    assert worst(run(m[3:4], [3], **mean), x[3:4]) < 1e-12
    assert worst(run(m.view(5, -1), range(5), **mean), x.view(5, 24)) < 1e-12
    for shape in [(3, 2, 4), (5, 3, 2, 4)] if mean else ():
        assert worst(run(m, range(5), data_mean=torch.full(shape, 0.2)), x) < 1e-7


@pytest.mark.parametrize("rho", [0.01, 0.5, 1.0, 2.0, 100.0])
@each_of(ODE, HOLD(order=1), HOLD(), HOLD(order=8))
def test_grids(P, rho):
    """Even in t^(1/rho) for AGM, lambda^(1/rho) for HOLD and `ode`, strictly monotone, with exact ends."""
    start, last = asked(P)[0], asked(P)[-1]
    for nfe, t_end in itertools.product((1, 2, 20), (time_of_noise(P, 0.1), last, None)):
        for R in (None, 3.0) if isinstance(P, AGM) else (10.0, 3.0):
            ts = module_of(P).times(P, nfe, rho, t_end, R, extra=1)
            end = t_end or (time_of_noise(P, 1 / (3 * nfe)) if R else 1 - 1.5 / (nfe + 1))
            assert len(ts) == nfe + 1 and ts[0] == start and ts[-1] == pytest.approx(end, rel=1e-4)
            assert t_end is None or ts[-1] == t_end
            assert all(a < b for a, b in pairwise(ts[:: 1 if last > start else -1]))
            u = torch.tensor(ts, dtype=F64)
            u = (P.clock(u, R) if R else u) / float(P.clock(ts[-1], R) if R else ts[-1])
            even = torch.linspace(float(u[0]) ** (1 / rho), 1, nfe + 1, dtype=F64) ** rho
            assert worst(u[1:], even[1:]) < 1e-4
        assert module_of(P).times(P, 1, rho, t_end) == (start,)


@each_of(paper(ODE), paper(HOLD()))
def test_samplers_ask_at_the_times_of_their_grid(P):
    """`splitting` and `strang` at mid-steps, `lie` at the ends of its steps, all others at the nodes. The lambda of
    `ode` has R = sigma_data sqrt(2 d)."""
    for name, nfe in itertools.product(module_of(P).SAMPLERS, (1, 2, 3)):
        SMOOTH.times.clear()
        module_of(P).SAMPLERS[name](P, SMOOTH.net(P), prior(P, 5, 2), nfe, rho=2.0, t_end=time_of_noise(P, 0.1))
        R = P.sigma_data * math.sqrt(2 * 2) if name == "ode" else None if isinstance(P, AGM) else 10.0
        extra = name in ("splitting", "strang", "lie", "ode")
        ts = np.array(module_of(P).times(P, nfe, 2.0, time_of_noise(P, 0.1), R, extra=extra))
        ts = (ts[1:] + ts[:-1]) / 2 if name in ("splitting", "strang") else ts[int(extra) :]
        assert worst(SMOOTH.times, ts) < 1e-12, name


REACH = [
    *((paper(P), *run) for P in (ODE, SDE)
      for run in (("em", 100), ("splitting", 100), ("exponential", 40), ("ode", 40))),
    *((paper(P), *run) for P in (HOLD(order=2, L_inv=0.5), HOLD())
      for run in (("ode", 40), ("strang", 60), ("lie", 100), ("em", 200))),
    *((P, "ode", 40) for P in PROCESSES),
    (ODE, "exponential", 40),
]  # fmt: skip


@pytest.mark.parametrize(("P", "name", "nfe"), REACH, ids=lambda v: f"{v.param}{v.n}" if hasattr(v, "n") else str(v))
def test_samplers_reach_the_mixture(P, name, nfe):
    """The paper's network, of whichever target, and one denoiser through every sampler: mean, covariance and weights of
    the modes to four standard errors of 10,000 draws."""
    torch.manual_seed(0)
    N, w, c = 10000, MIXTURE.weights, MIXTURE.centres
    options = {"data_mean": MIXTURE.mean} if name == "ode" else {}
    x = module_of(P).SAMPLERS[name](P, MIXTURE.net(P), prior(P, N, 2, seed=3), nfe, **options)
    mode, gap = torch.cdist(x, c).argmin(1), x - MIXTURE.mean
    cov = torch.cov(c.T, correction=0, aweights=w) + MIXTURE.std**2 * torch.eye(2)
    features = [x, (gap[:, :, None] * gap[:, None]).flatten(1), torch.nn.functional.one_hot(mode).double()]
    for feature, truth in zip(features, (MIXTURE.mean, cov.flatten(), w), strict=True):
        error = (feature.mean(0) - truth) / (feature.std(0) / math.sqrt(N))
        assert float(error.abs().max()) < 4, error
    # the last prediction is a posterior mean, narrower than the data, and steps are finite: 5 per cent for the width
    assert worst((x - c[mode]).std(0), torch.full((2,), MIXTURE.std, dtype=F64), relative=True) < 0.05


# --- laws without Monte Carlo error ----------------------------------------------------------------------------------


def law(P, name, nfe, mu=0.5, s=0.6, **options):
    """Mean and variance of what a sampler returns for one-dimensional data N(mu, s^2), less the truth: the law of the
    posterior mean at its last call. The sampler is affine in its start, drawn from the exact law there, and in its
    noise, so one run on a batch of unit inputs has all coefficients."""
    P, data, start, row = paper(P), Mixture([1.0], [[mu]], s), asked(P)[0], P.n + 1
    mean, cov, _ = exact(P, start)
    root = torch.linalg.cholesky(cov + s**2 * torch.outer(mean, mean))
    m0 = mean * mu + torch.cat([torch.zeros(1, P.n), root.T, torch.zeros(2 * P.n * nfe, P.n)]).to(F64)

    def unit(x):
        nonlocal row
        e = torch.zeros_like(x)
        e[row : row + x.shape[1]] = torch.eye(x.shape[1])
        row += x.shape[1]
        return e

    x = module_of(P).SAMPLERS[name](P, data.net(P), m0, nfe, randn=unit, **options)[:, 0]
    assert row <= len(m0) and len(data.times) == nfe
    kappa = white(P, m0[:1], data.times[-1])[1]
    variance = s**4 / (s**2 + 1 / float(kappa @ kappa))
    return np.array([float(x[0]) - mu, float((x[1:] - x[0]).square().sum()) - variance]), variance


@each_of(ODE, *(HOLD(order=n, L_inv=0.8) for n in (1, 2, 3)))
def test_sde_samplers_converge_in_law(P):
    """Weak order two for `strang`, one for the others: AGM's kick is an Euler step, and symmetry adds nothing."""
    names = {ODE: ("em", "splitting"), HOLD(order=2, L_inv=0.8): ("lie", "strang", "em")}.get(P, ("lie", "strang"))
    t_end, nfes = (0.9, (24, 48)) if P == ODE else (time_of_noise(P, 0.1), (80, 160))
    error = {name: np.abs([law(P, name, nfe, t_end=t_end)[0] for nfe in nfes]) for name in names}
    for name, e in error.items():
        order, bound = (2, 0.2) if name == "strang" else (1, 0.3 if P == ODE else 0.25)
        # at order 3 lie's mean error is small and still nears slope 1 from above, so there the variance alone is judged
        slope = np.log2(e[0] / e[1])[name == "lie" and P.n > 2 :]
        assert np.abs(slope - order).max() < bound and (P != ODE or e[1].max() < 0.01), e
    assert P == ODE or (error["strang"][1] < error["lie"][1]).all()


@each_of(*PROCESSES)
def test_ode_ends_in_the_law_of_its_last_prediction(P):
    """Data of variance s^2 keep the share s^2 / (s^2 + sigma^2) of it, sigma the noise at t_end; to 1 per cent."""
    for correct in (False, True):
        error, variance = law(P, "ode", 100, t_end=time_of_noise(P, 0.3), data_mean=0.5, correct=correct)
        assert variance == pytest.approx(0.36 * 0.36 / (0.36 + 0.09), rel=1e-6)
        assert abs(error[0]) < 0.005 and abs(error[1]) < 0.01 * variance


def moves(n, step):
    """Matrix and noise covariance of a linear step, read off from unit vectors."""
    e, nothing = torch.eye(n, dtype=F64), torch.zeros(n, n, dtype=F64)
    L = step(nothing, lambda m: e).T
    return step(e, torch.zeros_like).T, L @ L.T


def test_free_motion_of_agm_is_exact():
    u, weight = np.polynomial.legendre.leggauss(8)
    for t, h in [(1e-5, 0.5), (0.3, 0.01), (0.5, 0.4), (0.9, 0.05), (0.95, 0.05), (0.998, 5e-4), (0.998, 1e-3)]:
        ago = h / 2 * (1 - u)  # time from the kick to the end of the step
        kick = np.stack([ago, np.ones(8)]) * 3 * (1 - t - h + ago)
        A, Q = moves(2, lambda m, randn, t=t, h=h: agm_ref.free_motion(ODE, m, t, h, randn))
        assert worst(A, [[1.0, h], [0.0, 1.0]]) < 1e-15
        assert worst(Q, h / 2 * (kick * weight) @ kick.T, relative=True) < 1e-9


@each_of(*(HOLD(order=n, L_inv=0.8) for n in range(1, 7)), CUSTOM)
def test_linear_flow_of_hold_is_exact(P):
    """exp(F^T h), with noise that keeps the prior N(0, L_inv I): it is stationary, as F + F^T = -2 xi E_nn."""
    F, last = P.drift(), torch.eye(P.n, dtype=F64)[-1]
    assert worst(F + F.mT, -2 * P.damping[1] * torch.outer(last, last)) == 0
    for h in (1e-3, 0.3, 2.0, 90.0):
        A, Q = moves(P.n, lambda m, randn, h=h: hold_ref.linear_flow(P, m, h, randn))
        assert worst(A, torch.linalg.matrix_exp(F.mT * h)) < 1e-12 and worst(A[0], exact(P, h)[0]) < 1e-12
        assert worst(Q, P.L_inv * (torch.eye(P.n, dtype=F64) - A @ A.mT)) < 1e-12


# --- the ODE samplers ------------------------------------------------------------------------------------------------


@each_of(*(HOLD(order=n, T=14.0) for n in (1, 2, 3, 4)), ODE)
def test_ode_is_of_second_order_and_its_extras_help(P):
    """Root mean square distance to the end of the flow. T = 14, as the free node's error is a multiple of sqrt(SNR(T)),
    and of order one in the step. At 5 and 10 calls the free node is nearer than none, the corrector nearer still."""
    t_end, module, m0 = time_of_noise(P, 0.1), module_of(P), prior(P, 100, 2)
    end = flow(P, SMOOTH, white(P, m0, asked(P)[0])[0], t_end)
    end = SMOOTH.posterior_mean(P, (exact(P, t_end)[2] @ end).flatten(1), t_end)

    def error(nfe, **options):
        return float((module.ode(P, SMOOTH.net(P), m0, nfe, t_end=t_end, **options) - end).square().mean().sqrt())

    free = {"data_mean": SMOOTH.mean}
    plain, free, both = {"data_mean": None, "correct": False}, {"correct": False, **free}, free
    for options in (plain, free, both, {"data_mean": None}):
        assert abs(math.log2(error(80, **options) / error(160, **options)) - 2) < 0.15
    for nfe, least in ((5, 0.8), (10, 0.9)):
        e = [error(nfe, **options) for options in (plain, free, both)]
        assert e[1] < least * e[0] and e[2] < 0.85 * e[1], e


@each_of(*(dataclasses.replace(P, sigma_data=0.7) for P in PROCESSES))
def test_ode_steps_against_a_quadrature(P):
    """A prediction linear in lambda is x_0 at the first step and itself from then on. The closed form takes kappa's
    direction for constant over a step: exact for n = 1, right to 1e-4 of the network's unit input for the others."""
    module, R, m0 = module_of(P), 2 * P.sigma_data, randn64(P.n, 3, 2 * P.n)

    def line(root):
        return torch.tensor([0.3, -0.5], dtype=F64) + torch.log1p(R * root)[:, None] * torch.tensor([0.2, 0.1])

    for nfe in (5, 10, 20):
        seen = []
        x = module.ode(P, answering(P, line, seen), m0, nfe, correct=False, data_mean=None)
        ts, error = module.times(P, nfe, 1.0, None, R), []
        z = white(P, m0, ts[0])[0]
        for i, (a, b) in enumerate(pairwise(ts)):
            u = torch.linspace(0, 1, 4001, dtype=F64)
            kappa = P.kappa(a + (b - a) * u * (2 - u))  # short steps near the data
            answer = line(kappa.norm(dim=-1)) if i else line(kappa[:1].norm(dim=-1)).expand(4001, 2)
            fine, coarse = (kappa[::j].diff(dim=0).T @ (answer[j::j] + answer[:-j:j]) / 2 for j in (1, 2))
            z = z + (4 * fine - coarse) / 3
            y = kappa[-1] @ z / kappa[-1].norm()
            error.append(worst(seen[i + 1][0], y) / math.sqrt(1 + 0.49 * float(kappa[-1] @ kappa[-1])))
        assert max(error) < (1e-10 if P.n == 1 else 1e-4)
        assert worst(x, line(torch.full((3,), seen[-1][1], dtype=F64))) < 1e-10


@each_of(*PROCESSES)
def test_the_result_is_the_last_prediction(P):
    """What the corrector does to predictions on the way, it does not do to the last."""
    for name in [name for name in module_of(P).SAMPLERS if name in OPTIONS]:
        for mean in (None, 0.3):
            seen = []
            net = answering(P, lambda root: torch.sin(3 * root)[:, None].expand(3, 2), seen)
            x = module_of(P).SAMPLERS[name](P, net, prior(P, 3, 2), 6, data_mean=mean, correct=True)
            assert worst(x, torch.full((3, 2), math.sin(3 * seen[-1][1]), dtype=F64)) < 1e-12


def test_ode_of_order_1_is_ddim():
    """In m = alpha x + s eps: m' = alpha' x + s' (m - alpha x)/s. Any denoiser's first step, and every step of one that
    always answers the same."""
    P, answer = HOLD(order=1, L_inv=0.8), torch.tensor([[0.4, -0.3]], dtype=F64)
    for nfe, net in ((10, answering(P, lambda root: answer, seen := [])), (2, SMOOTH.net(P))):
        m = prior(P, 20, 2)
        x = hold_ref.ode(P, net, m, nfe, correct=False, data_mean=None)
        for i, (t, t_next) in enumerate(pairwise(hold_ref.times(P, nfe, 1.0, None, 2 * P.sigma_data))):
            a, b = math.exp(-t), math.exp(-t_next)
            s, r = (math.sqrt(0.8 * (1 - c**2)) for c in (a, b))
            D = answer if nfe > 2 else SMOOTH.posterior_mean(P, m, t)
            m = b * D + r / s * (m - a * D)
            assert nfe == 2 or worst(seen[i + 1][0], m / r) < 1e-10
        assert nfe > 2 or worst(x, SMOOTH.posterior_mean(P, m, t_next)) < 1e-10


def probability_flow(t_end):
    """AGM's x' = v, v' = E[a* | m] - g^2/2 score_v of GAUSSIAN's marginal, then E[x1 | m]: fine RK4."""

    def rate(t, m):
        mean, cov, _ = exact(ODE, t)
        P, (x, v) = torch.linalg.inv(torch.outer(mean, mean) * GAUSSIAN.std**2 + cov), m.chunk(2, 1)
        score_v = -torch.einsum("a,bad->bd", P[1], m.view(-1, 2, 2) - torch.outer(mean, GAUSSIAN.centres[0]))
        a = 4 / (1 - t) * ((GAUSSIAN.posterior_mean(ODE, m, t) - x) / (1 - t) - v)
        return torch.cat([v, a - (3 * (1 - t)) ** 2 / 2 * score_v], 1)

    m = prior(ODE, 64, 2, seed=0)
    for t, t_next in pairwise(np.linspace(ODE.t0, t_end, 401)):
        m = rk4(rate, t, m, t_next - t)
    return GAUSSIAN.posterior_mean(ODE, m, t_end)


def test_exponential_converges_with_its_order():
    """On a uniform grid the first step, of order one, leaves an error h^2 that holds orders 3 and 4 to slope 2, here
    above the error of order 2. With rho = 2 the first step is only h^2 long and its error h^4: every order has its own
    slope, and each is better than the one below."""
    m0, truth, nfes = prior(ODE, 64, 2, seed=0), probability_flow(0.8), [10, 20, 40]

    def errors(order, **options):
        run, options = agm_ref.exponential, {"multistep": order, "t_end": 0.8, "correct": False, **options}
        return np.array([worst(run(ODE, GAUSSIAN.net(ODE), m0, n, **options), truth) for n in nfes])

    for rho, orders in ((1.0, [1, 2]), (2.0, [1, 2, 3, 4])):
        error = np.array([errors(order, rho=rho) for order in orders])
        excess = np.log2(error[:, 1] / error[:, 2]) - orders
        assert np.abs(excess[:2]).max() < 0.3
        assert excess.min() > -0.3  # orders 3 and 4 still come down faster than their order
        assert (error[1:] < error[:-1]).all()  # and a higher order is nearer at every nfe
    for order, plain in zip(orders, error, strict=True):
        corrected = errors(order, rho=2.0, correct=True)
        assert (corrected < plain).all()
        assert math.log2(corrected[1] / corrected[2]) > order + 0.7  # Adams-Moulton's order is one higher
    assert errors(2, data_mean=GAUSSIAN.mean)[2] < 4 * errors(2)[2]


def test_exponential_is_exact_for_a_constant_network():
    m0, N, P = randn64(0, 5, 4), randn64(1, 5, 2), AGM(t0=1e-15, param="paper")
    u, weight = np.polynomial.legendre.leggauss(60)
    u, weight, (x, v) = torch.tensor(0.45 * (1 + u)), torch.tensor(0.45 * weight), m0.chunk(2, 1)  # on [0, 0.9]
    force = weight * agm_ref.scale(P, u)
    m = torch.cat([x + 0.9 * v + ((0.9 - u) * force).sum() * N, v + force.sum() * N], 1)
    truth = agm_ref.hop(P, agm_ref.scale(P, 0.9) * N, m, 0.9)
    for (order, nfe), correct in itertools.product(((1, 3), (2, 5), (4, 9)), (False, True)):
        options = {"multistep": order, "t_end": 0.9, "correct": correct}
        assert worst(agm_ref.exponential(P, lambda m, t, label: N, m0, nfe, **options), truth) < 1e-9


@pytest.mark.parametrize("eta", [0.6, 1.0])
@each_of(*(dataclasses.replace(P, sigma_data=0.7) for P in PROCESSES))
def test_eta_renews_the_noise(P, eta):
    """With a denoiser that always answers x = 0.4, z - kappa x shrinks by keep = (sigma'/sigma)^(eta^2) a step and gets
    fresh noise of variance 1 - keep^2. At eta = 1 and n = 1, that is the posterior of
    y' = x + sigma' noise given x and y, of mean x + (sigma'/sigma)^2 (y - x)."""
    answer, seen, draws = 0.4, [], []

    def randn(z):
        draws.append(randn64(len(draws), *z.shape))
        return draws[-1]

    m0 = randn64(9, 3, 2 * P.n)
    module_of(P).ode(P, answering(P, lambda root: answer, seen), m0, 6, eta=eta, randn=randn, data_mean=None)
    assert len(seen) == 6 and len(draws) == 5
    ts = module_of(P).times(P, 6, 1.0, None, 2 * P.sigma_data)
    z, kappa = white(P, m0, ts[0])[0], P.kappa(torch.tensor(ts, dtype=F64))
    for i, (a, b) in enumerate(pairwise(kappa)):
        keep = (seen[i][1] / seen[i + 1][1]) ** eta**2
        z = answer * b[:, None] + keep * (z - answer * a[:, None]) + math.sqrt(1 - keep**2) * draws[i].view(3, P.n, 2)
        assert worst(seen[i + 1][0], b @ z / b.norm()) < 1e-9
        if P.n == 1 and eta == 1.0:
            (u, root), root2 = seen[i], seen[i + 1][1]
            mean = answer + (root / root2) ** 2 * (u / root - answer)
            noise = (1 - (root / root2) ** 2) ** 0.5 / root2 * draws[i]
            assert worst(seen[i + 1][0] / root2, mean + noise) < 1e-9


@pytest.mark.parametrize("eta", [0.5, 1.0])
@each_of(ODE, HOLD())
def test_eta_keeps_the_law(P, eta):
    """40 calls on an exact mixture in one dimension: the weight, mean and spread of its modes, to four standard errors
    of 20,000 samples and, for the spread, the error of the steps (1 %)."""
    n, data, generator = 20_000, Mixture([0.3, 0.7], [[0.8], [-0.6]], 0.1), torch.Generator().manual_seed(5)
    m0 = P.prior((n, 1), generator).double()
    noise = iter(torch.randn(40, *m0.shape, generator=generator, dtype=F64))
    x = module_of(P).ode(P, data.net(P), m0, 40, eta=eta, randn=lambda z: next(noise), data_mean=data.mean)[:, 0]
    right, left = x[x > 0.1], x[x < 0.1]
    assert abs(len(right) / n - 0.3) < 4 * math.sqrt(0.3 * 0.7 / n)
    for part, mean in ((right, 0.8), (left, -0.6)):
        assert abs(part.mean() - mean) < 4 * 0.1 / math.sqrt(len(part))
        assert abs(part.std() - 0.1) < 4 * 0.1 / math.sqrt(2 * len(part)) + 0.001


# ---------------------------------------------------------------------------------------------------------------------
# 5. Likelihood


@pytest.mark.parametrize(("n", "exact"), [(1, True), (2, False), (3, True), (4, False)])
def test_likelihood_of_gaussian_data(n, exact):
    """log N(x; mu, s^2) by hand, T = 16 makes the prior exact: the bound is tight for an exact network, the more so the
    higher snr_max. The Jacobian is a multiple of I here, so that Hutchinson's estimate has no noise."""
    data = Mixture([1.0], [[0.3, 0.3, 0.3]], 0.7)
    for snr_max, tol, least in ((4e4, 1e-5, 5e-4), (1e6, 1e-6, 1e-4)):
        torch.manual_seed(0)
        P, x = HOLD(order=n, L_inv=0.6, T=16.0, snr_max=snr_max), 0.3 + 0.7 * torch.randn(32, 3, dtype=F64)
        P = paper(P) if n == 1 else P
        found = hold_ref.log_likelihood_bound(P, data.net(P), x, exact=exact, tol=tol)
        assert worst(found, Normal(0.3, 0.7).log_prob(x).sum(1)) < least


def test_likelihood_sees_the_prior_it_is_given():
    """At a short T the model is not the data law: for data N(0, s^2) the flow is linear, and N(0, L_inv I) is pushed
    through it as a matrix."""
    torch.manual_seed(0)
    n, s, data = 2, 0.7, Mixture([1.0], [[0.0]], 0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        P = HOLD(order=n, T=2.5, L_inv=1.5)
    assert float(P.snr(P.T)) > 0.1

    A = flow(P, data, torch.eye(n, dtype=F64)[..., None], P.t_min)[..., 0].T  # z at t_min = A z at T
    root = A @ torch.linalg.inv(P.cholesky(P.T)) * math.sqrt(P.L_inv)  # z at t_min = root N(0, I)
    model = MultivariateNormal(torch.zeros(n, dtype=F64), root @ root.T)
    x = s * torch.randn(64, 1, dtype=F64)
    torch.manual_seed(5)
    found = hold_ref.log_likelihood_bound(P, data.net(P), x)
    torch.manual_seed(5)  # the same draw of eps
    eps, kappa = torch.randn(64, n, dtype=F64), P.kappa(P.t_min)
    z, snr = kappa * x + eps, float(P.snr(P.t_min))
    decoder = Normal((z @ kappa) * s**2 / (1 + s**2 * snr), snr**-0.5).log_prob(x[:, 0])
    encoder = Normal(0.0, 1.0).log_prob(eps).sum(1)
    assert worst(found, model.log_prob(z) + decoder - encoder) < 1e-3
    assert worst(found, Normal(0.0, s).log_prob(x[:, 0])) > 0.05  # the test can tell the two apart


def test_hutchinson_is_unbiased():
    """On a mixture the divergence is not a multiple of I: the mean over probes meets the exact trace."""
    torch.manual_seed(0)
    P, data = HOLD(order=2, snr_max=100.0), Mixture([1 / 3] * 3, [[0.8, 0.0], [-0.6, 0.5], [0.0, -0.9]], 0.3)
    x = data.centres[:1].expand(600, 2) + 0.1
    a, b = (hold_ref.log_likelihood_bound(P, data.net(P), x, exact=e, tol=1e-3) for e in (True, False))
    assert float(b.std()) > float(a.std())
    assert abs(float(a.mean() - b.mean())) < 4.5 * math.sqrt(float(a.var() + b.var()) / 600)


def test_likelihood_of_images_in_float32():
    """A denoiser that always puts out 0 is exact for data N(0, sigma_data^2)."""
    torch.manual_seed(0)
    P, x = HOLD(T=12.0), 0.5 * torch.randn(4, 1, 5, 5)
    found = hold_ref.log_likelihood_bound(P, lambda u, t, label=None: 0 * u, x)
    assert found.dtype == torch.float32
    assert worst(found, Normal(0.0, 0.5).log_prob(x).sum((1, 2, 3))) < 25e-3  # 1e-3 per dimension: sums of 25


def test_likelihood_stops_with_one_line():
    wild, tol = (lambda u, t, label=None: torch.sin(9 * u)), "tol=1e-16 .* torch.float32: raise it"
    for net, words in ((lambda u, t, label=None: u * math.nan, "not finite"), (wild, tol)):
        with pytest.raises(ValueError, match=rf"\A.*{words}.*\Z"):
            hold_ref.log_likelihood_bound(HOLD(), net, torch.zeros(2, 2) + 0.3, tol=1e-16)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes in use

WRONG = [
    *((AGM, {key: value}, "AGM wants") for key, values in {"p": (0, -3, math.nan), "k": (1, -1.0, math.nan),
      "t1": (1.0, 0), "t0": (0.0, 0.9995), "bound": (0.0,), "param": ("noise",), "sigma_data": (0.0, math.nan)}.items()
      for value in values),
    *((HOLD, {"order": order}, "order .* integer from 1 to 8") for order in (0, 9, -1, 2.5, 3.0, True, "3", None)),
    (HOLD, {"gamma": (1.0,)}, "order 3 wants a tuple of 2 gammas"),
    *((HOLD, {"order": 2, key: value}, "positive and finite") for key, values in {"gamma": ((-1.0,), (math.nan,)),
      "xi": (0.0, math.nan), "alpha": (0.0,), "L_inv": (-1.0,), "T": (0.0,), "snr_max": (0.0,)}.items()
      for value in values),
    *((HOLD, {key: value}, key) for key, value in {"bound": 0.0, "param": "noise", "sigma_data": 0.0}.items()),
    (HOLD, {"T": 0.05}, "raise T"),
    (HOLD, {"T": 1000.0}, "lower T"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "options", "words"), WRONG, ids=str)
def test_wrong_process(make, options, words):
    with pytest.raises(ValueError, match=rf"\A.*{words}.*\Z"):  # "." matches no line break
        make(**options)


def test_order_may_be_any_integer_type():
    for order in (np.int64(3), np.uint8(3), torch.tensor(3)):
        P = HOLD(order=order)
        assert P.n == 3 and worst(P.cov(0.5), HOLD().cov(0.5)) == 0 and P.prior((2, 1)).shape == (2, 3)


@each_of(ODE, HOLD())
def test_process_is_frozen_and_refuses_times_outside(P):
    with pytest.raises(AttributeError):
        P.sigma_data = 2.0
    for t in (-1e-9, math.nan, torch.tensor([0.5, math.inf]), *([1.0] if isinstance(P, AGM) else [])):
        for f in (P.mean, P.cov, P.kappa):
            with pytest.raises(ValueError, match=r"\A.* time runs from 0 .*\Z"):
                f(t)


def test_short_T_warns_with_the_T_to_use():
    with pytest.warns(UserWarning, match=r"use T=4\.27"):
        HOLD(T=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(1, 9):
            HOLD(order=n)


@every_sampler
def test_bad_options_are_refused_in_one_line(P, name):
    t_ends = (0.0, 1e-6, -0.5, 0.9995, 1.0, math.nan) if isinstance(P, AGM) else (0.0, 1e-6, -0.5, 6.0, 7.0, math.nan)
    bad = {"nfe": (0, -1), "t_end": t_ends, "rho": (0.0, -1.0, 0.009, 101.0, math.nan)}
    bad |= {"multistep": (0, 5, -1)} if name == "exponential" else {"eta": (-0.1, math.nan)} if name == "ode" else {}
    net, m0 = (lambda m, t, label: m[:, :2]), randn64(0, 5, P.n * 2)
    for option, value in [(option, value) for option, values in bad.items() for value in values]:
        with pytest.raises(ValueError, match=rf"\A.*{option}.*\Z"):
            module_of(P).SAMPLERS[name](P, net, m0, **{"nfe": 5, option: value})


# ---------------------------------------------------------------------------------------------------------------------
# The peers of bench/


@lru_cache(None)
def peers():
    sys.path.insert(0, str(HERE / "bench"))
    return importlib.import_module("peers")


TRIANGLE = Mixture([0.3, 0.5, 0.2], [[-1.0, 0.3], [0.6, -0.8], [0.5, 0.9]], torch.tensor([0.3, 0.2, 0.25], dtype=F64))
PEER_NOISE = randn64(0, 100, 2)


@lru_cache(None)
def triangle_flow(sigma_max, sigma_min, steps=1500):
    """E[x | y] where dy/dsigma = (y - E[x | y])/sigma has taken sigma_max PEER_NOISE, by RK4 in log sigma."""
    y, start, h = sigma_max * PEER_NOISE, math.log(sigma_max), math.log(sigma_min / sigma_max) / steps
    for i in range(steps):
        y = rk4(lambda s, y: y - TRIANGLE.denoise(y, math.exp(s)), start + i * h, y, h)
    return TRIANGLE.denoise(y, sigma_min)


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
    return getattr(peers(), name)(ODE, TRIANGLE.net(ODE), PEER_NOISE, nfe, **grid)


@pytest.mark.parametrize(("name", "grid", "order", "nfe"), ORDERS)
def test_peers_have_the_order_of_their_papers(name, grid, order, nfe):
    """Against another solver of the exact flow. UniPC's corrector adds one to its order."""
    limit = triangle_flow(grid["sigma_max"], grid["sigma_min"])
    errors = [(peer(name, n, **grid) - limit).square().mean().sqrt() for n in (nfe, 2 * nfe)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.4


@pytest.mark.parametrize("nfe", [1, 2, 5, 8])
def test_peers_call_the_network_nfe_times(nfe):
    """Also with every grid that they are given; Heun's method leaves one call of an even number unused."""
    calls, denoiser = [], TRIANGLE.net(ODE)

    def net(u, t, label=None):
        calls.append(t)
        return denoiser(u, t)

    for title, (kind, sampler, default, grids) in peers().PEERS.items():
        for grid in (default, *grids) if kind == "denoiser" else ():
            calls.clear()
            x = sampler(ODE, net, PEER_NOISE, nfe, **grid)
            assert len(calls) == nfe - (title == "EDM, Heun" and nfe % 2 == 0) and x.isfinite().all(), (title, grid)


def test_peers_end_where_the_reference_of_their_distance_ends():
    """What benches call the converged flow is `ode` of HOLD of order 1 from the same noise with 400 calls. The peers
    start from sigma 80, not its 403, as if the data had mean 0; from sigma 10 they end further off."""
    P = HOLD(order=1)
    limit = hold_ref.ode(P, TRIANGLE.net(P), PEER_NOISE, 400, data_mean=None)
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
    assert x.dtype == torch.float32 and label is None and (x.min(), x.max()) == (-1, 1)
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
    assert (pixels.bincount(minlength=10) - 500).abs().max() < 100  # 500 +- 21 each


def test_half_of_the_images_are_mirrored_and_digits_never():
    torch.manual_seed(0)
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2)
    plain, mirrored = image[0] / 127.5 - 1, image[0].flip(-1) / 127.5 - 1
    x, _ = data.Dataset("one", image, image, flip=True).batch(4000)
    is_plain, is_mirrored = (x == plain).flatten(1).all(1), (x == mirrored).flatten(1).all(1)
    assert (is_plain ^ is_mirrored).all()  # whole images, along the width, all channels together
    assert abs(is_mirrored.sum() - 2000) < 160  # 5 standard deviations
    assert (data.Dataset("one", image, image).batch(500)[0] == plain).all()
    digits = data.load("digits")
    known = {tuple(row) for row in digits.train.flatten(1).tolist()}
    pixels = digits.to_pixels(digits.batch(500)[0]).reshape(500, 64)
    assert all(tuple(row) in known for row in pixels.tolist())
    assert data.load("digits", flip=True).flip and not digits.flip


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
    assert torch.equal(a.train, b.train) and torch.equal(a.test, b.test) and not torch.equal(a.train, a.test)


def test_to_moves_every_tensor():
    dataset = data.Dataset("d", torch.zeros(4, 2), torch.zeros(1, 2), torch.arange(4), torch.arange(1), None, False)
    moved = dataset.to("meta")
    assert all(v.is_meta for v in (moved.train, moved.test, moved.train_labels, moved.test_labels))
    assert dataset.train.device.type == "cpu"


# -- 2-D sets


@pytest.mark.parametrize("name", list(data.POINTS))
def test_points_have_the_stated_form(name):
    dataset = data.load(name)
    assert dataset.shape == (2,) and not dataset.is_image
    assert dataset.train.shape == dataset.test.shape == (10_000, 2)
    torch.manual_seed(0)
    x, label = dataset.batch(20_000)
    assert label is None and x.dtype == dataset.train.dtype == torch.float32
    assert len(x.unique(dim=0)) > 19_900  # fresh points, not a resampling of train
    assert same(dataset.to_points(x), x.numpy())
    assert dataset.mean.shape == (2,) and worst(dataset.mean, dataset.train.double().mean(0)) < 1e-7
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
    assert abs(x[x[:, 0] > 0.6, 1].mean()) < 0.005


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
    assert abs(offset[inside].mean()) < 0.03 and abs(offset[inside].std() - 0.3) < 0.01
    assert abs(radius.min() - 1.5 * math.pi) < 1.3 and abs(radius.max() - 4.5 * math.pi) < 1.3  # t from 1.5 to 4.5 pi
    share = ((radius > 1.5 * math.pi + 1) & (radius < 3 * math.pi)).double().mean()
    assert abs(share - (1.5 * math.pi - 1) / (3 * math.pi)) < 0.012  # t is uniform


def test_checkerboard_fills_eight_squares_evenly():
    x = data.checkerboard(40_000, torch.Generator().manual_seed(0))
    cell = (x + 2).floor().long()
    assert (cell.min(), cell.max()) == (0, 3)
    assert (cell.sum(1) % 2 == 0).all()
    counts = (4 * cell[:, 0] + cell[:, 1]).bincount(minlength=16)
    assert (counts[counts > 0] - 5000).abs().max() < 5 * 66
    assert (((x + 2) % 1).mean(0) - 0.5).abs().max() < 5 * 0.289 / 200


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
    assert error.abs().max() < 5 * 0.075 and abs(error[on_upper].std() - 0.075) < 0.002
    from_top = torch.atan2(x[on_upper, 0] + 0.75, x[on_upper, 1] + 0.375)  # uniform on half a circle
    assert abs(from_top.mean()) < 0.03 and abs(from_top.std() - math.pi / math.sqrt(12)) < 0.03


# -- digits


def test_digits_are_the_1797_images_and_every_fifth_is_held_out():
    digits = data.load("digits")
    assert digits.shape == (1, 8, 8) and digits.is_image
    assert len(digits.train) == len(digits.train_labels) == 1438 and len(digits.test) == len(digits.test_labels) == 359
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
    assert (dataset.train_labels is None) == (key is None)
    if key:
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
    assert x.dtype == torch.float32 and len(label) == 20_000 and abs(x.square().mean() - 1) < 0.05
    assert abs(x[:, 2].std() / x[:, 0].std() - 4) < 0.3  # one scalar: the proportions stay
    assert np.abs(dataset.to_points(x) - points[label]).max() < 1e-5
    restored = dataset.to_points(dataset.train)
    assert restored.dtype == np.float32 and np.abs(restored - train).max() < 1e-5


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
        (np.full((5, 8, 8), 77, np.uint8), "from 77 to 77"),
        (np.array([[0.0, 1], [np.nan, 2]]), "not finite"),
        (np.array([[0.0, 1], [np.inf, 2]]), "not finite"),
        (np.array([[0.0, 1], [1e200, 2]]), "too large"),
        (np.ones((9, 2)), "equal points"),
        (np.array([{"a": 1}, None]), "cannot read.*(pickle|objects).*numpy.save"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_wrong_arrays_are_refused(tmp_path, array, match):
    for name, save in (("a.npy", np.save), ("a.npz", np.savez)):
        save(tmp_path / name, array)
        fails(match, data.load, tmp_path / name)


def test_wrong_labels_are_refused(tmp_path):
    for labels in (np.arange(4), np.arange(5.0), np.arange(5) - 1, np.zeros((5, 1), int)):
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
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 255
    for content in (b"foreign\n" * 99, *([middle] if suffix == ".npz" else [])):
        path.write_bytes(content)
        fails("cannot read", data.load, path)
    if suffix == ".npz":
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
    assert same(dataset.train[:, 0].numpy(), images) and same(dataset.train_labels, torch.arange(7))
    assert dataset.shape == (1, 5, 4) and dataset.test.shape == (3, 1, 5, 4)
    assert same(dataset.test_labels, torch.arange(3))


@pytest.mark.filterwarnings("error")
def test_broken_fashion_files(fashion_dir, monkeypatch):
    images, labels = fashion_dir / "train-images-idx3-ubyte.gz", fashion_dir / "train-labels-idx1-ubyte.gz"
    whole = images.read_bytes()
    for n in (0, 5, len(whole) // 2, len(whole) - 1):
        images.write_bytes(whole[:n])
        fails("train-images.*fetch it again", data.load, "fashion", fashion_dir)
    images.write_bytes(b"not gzip")
    fails("damaged", data.load, "fashion", fashion_dir)
    array = np.zeros((7, 5, 4), np.uint8)
    for wrong in ({"magic": 2049}, {"sizes": (8, 5, 4)}):
        write_idx(images, array, **wrong)
        fails("no IDX file of 3 axes", data.load, "fashion", fashion_dir)
    write_idx(images, array)
    write_idx(labels, np.zeros(6, np.uint8))
    fails("7 train images but 6 labels", data.load, "fashion", fashion_dir)
    labels.unlink()
    package = "apt-get install dataset-fashion-mnist"
    fails(f"no .*train-labels.*{package}.*https.*--data-dir", data.load, "fashion", fashion_dir)
    monkeypatch.setattr(data, "FASHION_DIR", str(fashion_dir / "none"))
    fails(package, data.load, "fashion")


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
    archives = {"renamed.tgz": CIFAR_TAR, "b/cifar-10-binary.tar.gz": CIFAR_TAR}
    (tmp_path / "b").mkdir()
    unpack(tmp_path, archives)
    assert is_the_tiny_cifar(data.load("cifar10", tmp_path / "renamed.tgz"))
    assert is_the_tiny_cifar(data.load("cifar10", str(tmp_path / "b")))
    files = {tmp_path / name for name in archives} | {folder / name for name in CIFAR_FILES}
    assert snapshot(tmp_path).keys() == files  # nothing was unpacked or added


def test_broken_cifar_folders(tmp_path):
    fails("does not exist.*cifar-10-binary.tar.gz", data.load, "cifar10", tmp_path / "none")
    fails("has neither.*cifar-10-batches-bin", data.load, "cifar10", tmp_path)
    good = CIFAR_CONTENTS["data_batch_3.bin"]
    for bad, match in (
        (good[:-1], "data_batch_3.bin is .* bytes, wanted n x 3073"),
        (b"", "data_batch_3.bin is 0 bytes"),
        (b"\x0a" + good[1:], "labels over 9"),
    ):
        fails(match, data.load, "cifar10", unpack(tmp_path, {**CIFAR_CONTENTS, "data_batch_3.bin": bad}))
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
        self.ranges, self.cut, self.status, self.log, self.headers = True, None, None, [], {}
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.log.append(asked)
        start = int(asked[6:-1]) if asked and self.server.ranges else 0
        beyond, part = start >= len(CIFAR_TAR), asked and self.server.ranges
        status = self.server.status or (416 if beyond else 206 if part else 200)
        body = b"" if status >= 400 else CIFAR_TAR[start:]
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | self.server.headers).items():
            self.send_header(name, value)
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
    assert server.target.read_bytes() == CIFAR_TAR and cached(server) == [server.target.name]
    assert "{0:.1f} of {0:.1f} MB\n".format(len(CIFAR_TAR) / 1e6) in capsys.readouterr().err
    assert is_the_tiny_cifar(data.load("cifar10"))
    assert server.log == [None]  # the second time comes from the cache


@pytest.mark.parametrize("ranges", [True, False])
def test_download_resumes_or_restarts(server, ranges):
    server.ranges = ranges
    server.part.write_bytes(CIFAR_TAR[:777])
    assert is_the_tiny_cifar(data.load("cifar10"))
    assert server.log == ["bytes=777-"]
    assert server.target.read_bytes() == CIFAR_TAR and cached(server) == [server.target.name]


def test_a_broken_connection_keeps_the_part_for_the_next_run(server):
    server.cut = 1000
    fails("download (stopped|failed).*run again.*by hand.*--data-dir", data.load, "cifar10")
    assert cached(server) == [server.part.name] and server.part.read_bytes() == CIFAR_TAR[:1000]
    server.cut = None
    assert is_the_tiny_cifar(data.load("cifar10"))
    assert server.log == [None, "bytes=1000-"]


def test_a_complete_part_is_accepted_and_what_has_a_wrong_md5_removed(server, monkeypatch):
    server.part.write_bytes(CIFAR_TAR)
    assert is_the_tiny_cifar(data.load("cifar10"))
    server.target.unlink()
    server.part.write_bytes(b"x" * (len(CIFAR_TAR) + 5))
    fails("MD5", data.load, "cifar10")
    assert cached(server) == []
    monkeypatch.setattr(data, "CIFAR10_MD5", "0" * 32)
    fails("MD5 .*wanted 000.*removed", data.load, "cifar10")
    assert cached(server) == []


def test_server_errors_and_no_network_overwrite_nothing(server, monkeypatch):
    server.status = 404
    server.part.write_bytes(b"half")
    fails("404.*by hand and give --data-dir", data.load, "cifar10")
    assert server.part.read_bytes() == b"half" and cached(server) == [server.part.name]
    server.part.unlink()
    other = Server()  # a port that nobody listens on once this is closed
    other.server_close()
    url = f"http://127.0.0.1:{other.server_port}/cifar-10-binary.tar.gz"
    monkeypatch.setattr(data, "CIFAR10_URL", url)
    fails(f"download failed.*fetch {url} by hand and give --data-dir", data.load, "cifar10")
    assert cached(server) == []


@pytest.mark.parametrize(
    ("status", "headers", "match"),
    [
        (302, {"Location": "http://127.0.0.1:1/other"}, "which is not https"),
        (302, {"Location": "file:///etc/hostname"}, "is not allowed"),
        (None, {"Content-Length": "many"}, "'many' bytes"),
        (None, {"Content-Length": "-5"}, "'-5' bytes"),
        (None, {"Content-Length": str(10**12)}, "more than 200 MB"),
    ],
)
def test_what_a_server_may_not_do(server, status, headers, match):
    server.status, server.headers = status, headers
    fails(f"download failed.*{match}.*by hand", data.load, "cifar10")
    assert cached(server) == []


def test_a_download_follows_no_link_and_leaves_another_process_its_file(server, tmp_path, monkeypatch):
    (tmp_path / "mine").write_bytes(b"mine")
    server.part.symlink_to(tmp_path / "mine")
    fails("download failed", data.load, "cifar10")
    assert (tmp_path / "mine").read_bytes() == b"mine"
    server.part.unlink()
    with open(server.part, "wb") as other:
        assert data.lock(other)
        fails("another process is writing", data.load, "cifar10")
    monkeypatch.setattr(data, "LIMIT", 1000)  # a server that says nothing of the length and never ends
    server.headers = {"Content-Length": ""}
    fails("more than 0 MB came", data.load, "cifar10")


def test_cache_folder_that_cannot_be_made(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fails("download failed.*--data-dir", data.load, "cifar10")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert data.cache_dir() == data.Path.home() / ".cache" / "phase-ref"


# -- pictures of any kind, ImageNet, arrays that stay in their file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "phase-ref"


@pytest.fixture
def pil():
    return pytest.importorskip("PIL.Image")


def paint(pil, path, pixels, mode=None, **keywords):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pil.fromarray(np.asarray(pixels)).convert(mode).save(path, **keywords)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def whole(dataset):
    """All images (N, C, H, W) in the order of the files, by the documented rule alone."""
    n = len(dataset.train) + len(dataset.test)
    out, held_out = torch.empty(n, *dataset.shape, dtype=torch.uint8), np.zeros(n, bool)
    held_out[np.random.default_rng(0).permutation(n)[: n // 5]] = True
    out[~held_out], out[held_out] = dataset.train[:], dataset.test[:]
    return out


def test_twenty_strange_pictures(cache, pil, capfd):
    """Each picture of one colour or two, so that what must come is known without a library."""
    folder, flat = Path("strange"), np.ones((20, 30, 1), np.uint8)
    red, blue = flat * np.uint8([[[255, 0, 0]]]), flat * np.uint8([[[0, 0, 255]]])
    paint(pil, folder / "01 one pixel.png", red[:1, :1])
    pil.fromarray(flat * np.uint8([[[0, 255, 255, 51]]]), "CMYK").save(folder / "02 cmyk.tif")
    pil.fromarray(flat[..., 0] * np.uint16(100 * 257 + 100)).save(folder / "03 sixteen bits.png")
    pil.fromarray(red).save(folder / "04 animated.gif", save_all=True, append_images=[pil.fromarray(blue)])
    turn = pil.Exif()
    turn[0x0112] = 6  # to be seen after a quarter turn clockwise: the left side comes on top
    paint(pil, folder / "05 turned.jpg", np.concatenate([red[:, :20], blue[:, :20]], 1), quality=95, exif=turn)
    paint(pil, folder / "06 palette.png", red, "P")
    pil.fromarray(flat * np.uint8([[[255, 0, 0, 102]]]), "RGBA").save(folder / "07 alpha.png")
    pil.fromarray(flat * np.uint8([[[40, 0]]]), "LA").save(folder / "08 transparent grey.png")
    pil.fromarray(flat[..., 0] * 0).convert("P").save(folder / "09 transparent colour.png", transparency=0)
    thirds = np.stack([blue[0, 0], red[0, 0], blue[0, 0]]).repeat(500, 0)
    paint(pil, folder / "10 wide.png", thirds[None].repeat(4, 0))
    paint(pil, folder / "11 bits.png", flat[..., 0] * 255, "1")
    paint(pil, folder / "12 really a bitmap.png", red, format="BMP")
    paint(pil, folder / "13 CAPITALS.JPEG", red, quality=95)
    paint(pil, folder / "14 картинка\n.webp", red, lossless=True)
    paint(pil, folder / "15 truncated.jpg", noise(0, 99, 99, 3), format="JPEG")
    (folder / "15 truncated.jpg").write_bytes((folder / "15 truncated.jpg").read_bytes()[:3000])
    (folder / "16 text.png").write_text("a picture, honestly")
    (folder / "17 zero bytes.jpg").write_bytes(b"")
    chunk = b"IHDR" + struct.pack(">2I5B", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (folder / "18 bomb.png").write_bytes(bomb + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    pil.fromarray(np.float32(flat[..., 0])).save(folder / "19 floats.tif")
    (folder / "20 postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "._15 hidden.png").write_bytes(b"")
    (folder / "read me.txt").write_text("no picture")
    images = whole(data.load("strange", size=8))
    said = capfd.readouterr().err
    assert images.shape == (14, 3, 8, 8)
    expected = {2: (204, 0, 0), 3: (100,) * 3, 7: (255, 153, 153), 8: (255,) * 3, 9: (255,) * 3, 11: (255,) * 3}
    for i, image in enumerate(images[:14].int(), 1):
        colour = torch.tensor(expected.get(i, (255, 0, 0)))[:, None, None].expand(3, 8, 8)
        if i == 5:
            assert worst(image[:, :3], colour[:, :3]) <= 20 and worst(image[:, 5:], colour.flip(0)[:, 5:]) <= 20
        else:
            assert worst(image, colour) <= (2 if i in (7, 13) else 0), i
    for text in ("14 pictures", "3 grey", "1 CMYK", "1 16-bit", "1 animated", "1 turned", "3 palette", "3 transparent"):
        assert text in said, text
    assert "2 enlarged" in said and "6 broken and skipped: 15 truncated.jpg (" in said and "19 floats" in said
    assert "20 post" not in said and "hidden" not in said  # five names are enough


def test_one_picture_is_read_as_a_set_of_them_is(folder, pil):
    """16 bits, transparent, turned; and one line for what is no picture."""
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8)
    pil.fromarray(grey * 1024).save("wide.png")
    pil.fromarray(np.stack([grey.astype("u1")] * 3 + [grey.astype("u1") * 0], 2), "RGBA").save("clear.png")
    turn = pil.Exif()
    turn[0x0112] = 3
    pil.fromarray(grey.astype("u1")).save("turned.png", exif=turn)
    for name, right in (("wide", (grey * 1024 + 128) // 257), ("clear", grey * 0 + 255), ("turned", grey[::-1, ::-1])):
        assert same(sample.read_picture(f"{name}.png", (1, 8, 8), "--stroke")[0].numpy(), right.astype("u1"))
    Path("empty.npy").write_bytes(b"")
    np.savez("z.npz", grey)
    Path("z.npz").rename("archive.npy")
    Path("cut.png").write_bytes(Path("wide.png").read_bytes()[:60])
    Path("text.png").write_text("a picture, honestly")
    np.save("objects.npy", np.array([{}, None]))
    for name in ("empty.npy", "archive.npy", "cut.png", "text.png", "objects.npy", "none.png"):
        fails(f"--stroke {name}", sample.read_picture, name, (1, 8, 8), "--stroke")


def lanczos(image, side, size):
    """The central square of image (H, W), to size x size: each axis, the width first, is weighted with
    sinc(t) sinc(t / 3), t in units of what a pixel of the result covers."""
    for axis, n in ((1, image.shape[1]), (0, image.shape[0])):
        scale = side / size
        centre = (n - side) / 2 + scale * (np.arange(size) + 0.5)
        t = (np.arange(n) + 0.5 - centre[:, None]) / max(scale, 1)
        weight = np.sinc(t) * np.sinc(t / 3) * (abs(t) < 3)
        image = np.moveaxis(np.tensordot(weight / weight.sum(1, keepdims=True), image, (1, axis)), 0, axis)
        image = image.round().clip(0, 255)
    return image


@pytest.mark.parametrize(("height", "width", "size"), [(40, 61, 16), (61, 40, 8), (50, 50, 50), (9, 7, 20)])
def test_pictures_are_cut_and_resized_as_stated(cache, pil, height, width, size):
    pixels = [noise(i, height, width) for i in range(5)]
    for i, p in enumerate(pixels):
        paint(pil, f"grey/{i}.png", p)
    dataset = data.load("grey", size=size)
    assert dataset.shape == (1, size, size) and not dataset.flip  # all are grey
    for p, image in zip(pixels, whole(dataset), strict=True):
        assert worst(lanczos(p.astype(float), min(p.shape), size), image[0]) <= 1
    paint(pil, "grey/colour.png", noise(9, height, width, 3))
    images = whole(data.load("grey", size=size))
    assert images.shape == (6, 3, size, size) and same(images[:5, 0], images[:5, 2])


def test_sub_folders_are_classes_and_a_zip_is_a_folder(cache, pil, capfd):
    names = ["b/1.png", "b/deep/er/2.png", "кот/3.png", "кот/4.png", "a/5.jpg", "a/6.png"]
    for i, name in enumerate(names):
        paint(pil, f"set/of mine/{name}", noise(i, 12, 12, 3))
    (Path("set/empty")).mkdir()
    with zipfile.ZipFile("set.ZIP", "w") as file:
        for name in names:
            file.write(f"set/of mine/{name}", f"of mine/{name}")
            file.writestr(f"__MACOSX/of mine/._{name}", b"resource")
        file.writestr("of mine/notes.txt", "text")
    folder, archive = (data.load(name, size=12) for name in ("set", "set.ZIP"))
    assert same(whole(folder), whole(archive)) and capfd.readouterr().err.count("3 classes: 0 a, 1 b, 2 кот") == 2
    labels = torch.cat([folder.train_labels, folder.test_labels])
    order = sorted(names)  # the order of the rows
    for image, label in zip(torch.cat([folder.train, folder.test]), labels, strict=True):
        i = [torch.equal(image, other) for other in whole(folder)].index(True)
        assert ["a", "b", "кот"][label] == order[i].split("/")[0]
    train.main([*TOY, *"--data set.ZIP --size 12 --classes --out run".split()])
    assert data.shape_of("set", 12) == (3, 12, 12) and train.load_checkpoint("run/ckpt.pt")["config"]["labels"] == 3
    paint(pil, "set/of mine/beside.png", noise(7, 12, 12))
    assert data.load("set", size=12).train_labels is None
    for name in "ab":
        Path("links").mkdir(exist_ok=True)
        Path("links", name).symlink_to(f"../set/of mine/{name}")
    Path("links/b").resolve().joinpath("round").symlink_to("..")  # without end
    dataset = data.load("links", size=12)
    assert len(whole(dataset)) >= 4 and set(torch.cat([dataset.train_labels, dataset.test_labels]).tolist()) == {0, 1}


def test_a_set_is_converted_once_and_again_when_it_changes(cache, pil, monkeypatch):
    for i in range(6):
        paint(pil, f"set/{i}.png", noise(i, 8, 8, 3))
    opened, read = [], pil.open
    monkeypatch.setattr(pil, "open", lambda *a, **k: opened.append(1) or read(*a, **k))
    first = whole(data.load("set", size=8))
    assert len(opened) == 6 and same(whole(data.load("./set/", size=8)), first) and len(opened) == 6
    assert sorted(p.suffix for p in cache.iterdir()) == [".json", ".npy"]
    assert data.load(next(cache.glob("*.npy"))).shape == (3, 8, 8)  # an array like any other
    data.load("set", size=4)
    paint(pil, "set/6.png", noise(6, 8, 8, 3))
    assert same(whole(data.load("set", size=8))[:6], first) and len(opened) == 6 + 6 + 7
    os.utime("set/6.png", (1, 1))
    Path("set/0.png").unlink()
    assert same(whole(data.load("set", size=8))[:5], first[1:]) and len(opened) == 19 + 6
    assert len(list(cache.iterdir())) == 4  # what was replaced is gone
    manifest, array = next(cache.glob("set-8*.json")), next(cache.glob("set-8*.npy"))
    good, pixels = manifest.read_text(), array.read_bytes()
    for text in ("{", "null", "[]", "3", good.replace("skipped", "skippet"), good.replace('"rows": 6', '"rows": "6"')):
        opened.clear()
        manifest.write_text(text)
        assert same(whole(data.load("set", size=8))[:5], first[1:]) and len(opened) == 6
    array.write_bytes(pixels[:-9])
    assert same(whole(data.load("set", size=8))[:5], first[1:]) and len(opened) == 12
    os.utime("set/5.png", (2, 2))
    with monkeypatch.context() as patch:  # what is closed today may be open tomorrow
        patch.setattr(pil, "open", lambda file, **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        fails("cannot read set/1.png .*Permission denied", data.load, "set", size=8)
    assert same(whole(data.load("set", size=8))[:5], first[1:])


def test_a_conversion_goes_on_where_it_was_killed(cache, pil, monkeypatch):
    for i in range(20):
        paint(pil, f"set/{i:02d}.png", noise(i, 9, 9, 3))
    Path("set/03.png").write_text("broken")
    script = f"""if True:
        import itertools, os, sys; sys.path.insert(0, {str(HERE)!r}); import data
        turns = itertools.count()
        def monotonic():  # every file is noted in the manifest; the sixth note is the last
            if (turn := next(turns)) == 12: os.kill(os.getpid(), 9)
            return 10 * turn
        data.time.monotonic = monotonic
        data.load("set", size=8)"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert killed.returncode == -9, killed.stderr
    assert sorted(p.suffix for p in cache.iterdir()) == [".json", ".part"]
    opened, read = [], pil.open
    monkeypatch.setattr(pil, "open", lambda *a, **k: opened.append(1) or read(*a, **k))
    with next(cache.glob("*.part")).open("ab") as file:
        file.write(b"half a row")
    on = whole(data.load("set", size=8))
    assert 10 < len(opened) < 16 and len(on) == 19
    monkeypatch.setenv("XDG_CACHE_HOME", "other")
    assert same(on, whole(data.load("set", size=8)))
    Path("other/phase-ref").joinpath(next(cache.glob("*.npy")).name).unlink()
    assert same(on, whole(data.load("set", size=8)))  # the manifest alone is not enough


def test_one_line_for_every_mistake_with_pictures(cache, pil, monkeypatch):
    for i, name in enumerate("ab"):
        paint(pil, f"set/{name}.png", noise(i, 8, 8, 3))
    np.save("a.npy", noise(2, 9, 8, 8))
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/a.png").write_text("no")
    Path("bad.zip").write_bytes(b"PK no zip")
    before = snapshot(Path())
    for line, match in (
        ("--data set", "add --size"),
        ("--data digits --size 8", "--size 8 is for a folder or zip of pictures, digits"),
        ("--data set --size 1025", "--size must be a whole number from 0 to 1024"),
        ("--data empty --size 8", "empty has no pictures"),
        ("--data broken --size 8", "no picture that can be read: a.png: cannot identify"),
        ("--data bad.zip --size 8", "cannot read bad.zip"),
        ("--data none.zip --size 8", "cannot read none.zip .*No such file"),
        ("--data a.npy --size 8", "--size 8 is for a folder"),
        ("--data none", "no data set 'none'.*folder or zip"),
        ("--data imagenet64 --data-dir set", "cannot read set/train_data_batch_1.npz .*image-net.org"),
    ):
        assert re.search(match, refused(train, *line.split(), "--out", "new").splitlines()[-1]), line
    assert {p: c for p, c in snapshot(Path()).items() if cache not in p.absolute().parents} == before
    with data.open_part(next(iter({cache / p.name for p in cache.glob("*.part")}))):
        fails("another process is writing", data.load, "broken", size=8)
    monkeypatch.setattr(data, "LIMIT", 1000)
    with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb.png", bytes(10**6))
        file.write("set/a.png", "a.png")
    assert len(whole(data.load("bomb.zip", size=8))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "set/a.png")
    fails("cannot write .*make room, or set XDG_CACHE_HOME", data.load, "set", size=8)
    monkeypatch.setitem(sys.modules, "PIL", None)
    fails("pip install pillow", data.load, "set", size=8)


def test_imagenet64_is_its_batches_with_labels_from_0(cache):
    images, labels = noise(0, 33, 64, 64, 3), np.random.default_rng(1).integers(1, 1001, 33)
    Path("in").mkdir()
    for i, name in enumerate(data.IMAGENET64):
        rows = slice(3 * i, 3 * i + 3)
        planes = images[rows].transpose(0, 3, 1, 2).reshape(3, -1)
        np.savez(f"in/{name}", data=planes, labels=labels[rows].tolist(), mean=planes.mean(0))
    assert data.shape_of("imagenet64") == (3, 64, 64)
    for _ in range(2):  # converted, and found
        dataset = data.load("imagenet64", "in")
        parts = ((dataset.train, dataset.train_labels), slice(30)), ((dataset.test, dataset.test_labels), slice(30, 33))
        for (found, found_labels), rows in parts:
            assert same(found.numpy(), images[rows].transpose(0, 3, 1, 2))
            assert same(found_labels.numpy(), labels[rows] - 1)
        assert dataset.flip
    for bad, match in (
        (dict(data=planes), "cannot read in/val_data.npz .*labels"),
        (dict(data=planes[:2], labels=labels[30:]), "for 3 labels"),
        (dict(data=planes.astype(float), labels=labels[30:]), "float64"),
        (dict(data=planes, labels=labels[30:] * 0), "bad labels"),
    ):
        np.savez("in/val_data.npz", **bad)
        fails(match, data.load, "imagenet64", "in")


@pytest.mark.parametrize(
    "shape", [(3, s, s) for s in (8, 28, 32, 64, 256, 500)] + [(1, 300, 3), (1, 3, 40), (1, 1, 64)]
)
def test_every_size_of_image_has_a_preset_that_its_net_can_have(shape):
    preset = train.preset_for(shape)
    config = {**vars(train.parser(preset).parse_args([])), "shape": shape, "std": 0.5, "bound": 1.0, "width": 8}
    with torch.device("meta"):
        net = train.build({**config, "blocks": 1})[2]
        assert net(torch.zeros(2, *shape), torch.zeros(2)).shape == (2, *shape)
    assert shape[1:] != (64, 64) or (preset["mult"], preset["attention"]) == ([1, 2, 2, 2], [2])  # 16x16


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(data, "LARGE", 1000)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_an_array_in_its_file_is_the_same_data(cache, large, monkeypatch, order, suffix):
    images = np.asarray(noise(0, 60, 6, 5, 3), order=order)
    np.save("a.npy", images) if suffix == ".npy" else np.savez("a.npz", images=images, labels=np.arange(60))
    there = data.load(f"a{suffix}", flip=True).to("cpu")
    monkeypatch.setattr(data, "LARGE", 10**6)
    here = data.load(f"a{suffix}", flip=True)
    assert isinstance(there.train, data.Rows) and isinstance(here.train, torch.Tensor)
    assert there.shape == here.shape and same(there.train[:], here.train) and same(there.test[:7], here.test[:7])
    assert there.std == here.std and same(there.mean, here.mean)
    monkeypatch.setattr(data, "LARGE", 1000)
    batches = []
    for dataset, ahead, extra in ((here, 0, 0), (there, 0, 0), (there, 1, 0), (there, 1, 1), (there, 9, 0)):
        torch.manual_seed(5)
        took = []
        for _ in range(20):
            x, label = dataset.batch(9)
            took += [x, torch.zeros(0) if label is None else label]
            torch.randn(7)
            if ahead:
                state = torch.get_rng_state()
                dataset.read_ahead(9 if ahead == 1 else 4)
                assert same(torch.get_rng_state(), state)
        batches.append(took if not extra else batches[0])
    assert all(same(a, b) for other in batches for a, b in zip(batches[0], other, strict=True))


def test_the_thread_reads_what_is_asked_for_next(cache, large, monkeypatch):
    np.save("a.npy", noise(0, 60, 6, 5, 3))
    reads, take = [], data.Rows.__getitem__

    def read(rows, i):
        reads.append(threading.current_thread().name)
        return take(rows, i)

    monkeypatch.setattr(data.Rows, "__getitem__", read)
    train.main([*TOY, *"--data a.npy --out run --log-every 2".split()])
    batches = [name for name in reads if name != "MainThread"]
    # of six steps the first reads its own; the last guess is unused
    assert len(batches) == 6 and len(set(batches)) == 1


@pytest.mark.parametrize("kind", ["npy", "pictures"])
def test_a_resumed_run_on_an_array_in_its_file_is_exact(cache, large, pil, kind, monkeypatch):
    images = noise(0, 40, 8, 8, 3)
    np.save("a.npy", images)
    for i, image in enumerate(images):
        paint(pil, f"set/{i:02d}.png", image)
    line = [*TOY, *("--data a.npy" if kind == "npy" else "--data set --size 8").split(), "--flip", "--dropout", "0.1"]
    train.main([*line, "--out", "once"])
    save = train.save_checkpoint
    with monkeypatch.context() as m:
        m.setattr(train, "save_checkpoint", lambda *a: (save(*a), a[-1] == 3 and os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit):
            train.main([*line, "--out", "twice"])
    assert train.load_checkpoint("twice/ckpt.pt")["step"] == 4
    train.main("--resume --out twice".split())
    monkeypatch.setattr(data, "LARGE", 10**9)
    train.main([*line, "--out", "memory"])
    once, *others = (train.load_checkpoint(f"{out}/ckpt.pt")["net"] for out in ("once", "twice", "memory"))
    assert all(same(once[key], other[key]) for other in others for key in once)


def test_three_gigabytes_train_in_less_than_one(cache):
    n = 1_000_000
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({n}, 32, 32, 3), }}".ljust(117) + "\n"
    with open("big.npy", "wb") as file:
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.encode() + noise(0, 9, 32, 32, 3).tobytes())
        file.truncate(128 + n * 3072)  # the rest is a hole, which reads as zeros
    script = f"""if True:
        import re, sys, threading, time; sys.path.insert(0, {str(HERE)!r}); import torch, train
        most, first = [0], []
        def watch():
            while True:
                used = int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
                most[0] = max(most[0], used)
                first.append(used)
                time.sleep(0.005)
        threading.Thread(target=watch, daemon=True).start()
        time.sleep(0.1)
        train.main({[*TOY, *"--data big.npy --out run --steps 2 --mult 1 1 1 --attention".split()]!r})
        print("MB", most[0] - first[0])"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1000, done.stdout


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
    array = noise(0, *shape)
    for image in (array, array.T if array.ndim == 2 else array[::-1, ::2]):  # not contiguous; replaces
        data.write_png(tmp_path / "a.png", image)
        assert same(read_png(tmp_path / "a.png"), image)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_png_errors(tmp_path):
    for array in (np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(ValueError, match="a picture is uint8"):
            data.write_png(tmp_path / "a.png", array)
    match, nowhere = "cannot write .*nothing was written.*another folder", tmp_path / "no" / "a.png"
    fails(match, data.write_png, nowhere, np.zeros((2, 2), np.uint8))
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
    for rest in (small[8:10], small[:, 6:8], small[10:, 16:]):  # two borders and the empty sixth place
        assert (rest == 128).all()


def test_grid_enlarges_small_images_by_whole_factors():
    for size, scale in ((8, 8), (28, 2), (32, 2), (64, 1), (200, 1)):
        grid, one = (np.zeros((n, size, size, c), np.uint8) for n, c in ((64, 3), (1, 1)))
        assert data.image_grid(grid).shape == (scale * (8 * size + 7), scale * (8 * size + 7), 3)
        assert data.image_grid(one, border=0).shape == (scale * size, scale * size)


def test_histogram_puts_points_where_they_belong():
    points = np.array([[0.95, 0.85]] * 4 + [[-0.85, -0.35], [5.0, 0.0], [np.nan, 0.0]])
    picture = data.histogram(points, size=40, limit=1)
    dark = (picture != 255).any(2)
    assert picture.dtype == np.uint8 and picture.shape == (40, 40, 3)
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
    assert 29 < x0 < 29.3 and 30.7 < x1 < 31
    assert abs((x1 - x0) - (y1 - y0)) < 1e-6 and abs((y0 + y1) / 2 + 4) < 0.05


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
    """30 numbers make 6 bars, of 3 or 4 of the 20 bins of 2 pixels, which start at 0, 4, 7, 10, 14 and 17."""
    picture = data.histogram(np.repeat([-0.9, 0.35], [10, 20])[:, None], size=40, limit=[(-1, 1)])
    height = (picture != 255).any(2).sum(0)
    assert height[:8].tolist() == [20] * 8 and height[8:28].tolist() == [0] * 20
    assert height[28:34].tolist() == [38] * 6 and not height[34:].any()  # of 40: 0.95 for the tallest


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
    for c, heads in ((64, 1), (128, 2), (200, 2), (256, 4), (320, 5), (202, 2), (205, 1)):
        assert nets.Attention(c).heads == heads
    layer = perturbed(nets.Attention(8))
    x = torch.randn(2, 8, 3, 2)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, 1)  # (2, 8, 6) each
    weights = torch.softmax(q.mT @ k / 8**0.5, -1)
    expected = x + layer.out((v @ weights.mT).reshape(2, 8, 3, 2))
    assert (layer(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("process", [AGM(), *(HOLD(order=n) for n in (1, 2, 3, 4))], ids=repr)
def test_time_input_resolves_the_data_end_and_is_smooth_at_the_prior(process):
    embed = perturbed(nets.TimeEmbedding(32, process.T, process.t_data)).double()
    first, last = (process.t1, process.t0) if isinstance(process, AGM) else (process.t_min, process.T)  # data, prior
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
    for name, options in {"agm": "--param paper", "hold": "--param paper --method hold", "denoiser": ""}.items():
        train.main([*options.split(), "--out", str(out / name), *TOY])
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
    ("param", "drawn"), [("denoiser", "ln sigma ~ N(-1.2, 1.2^2)"), ("paper", "t0=1e-05, t1=0.999")]
)
def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(folder, monkeypatch, param, drawn):
    train.main(["--out", "run", *TOY, "--param", param])
    before = Path("run/ckpt.pt").read_bytes()
    monkeypatch.setattr(agm_ref, "loss", lambda process, net, x, label: next(net.parameters()).sum() * math.nan)
    line = refused(train, *"--resume --out run --steps 9".split())
    assert all(words in line for words in ("steps 7-7", "--lr", drawn))
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


SERVED = [("", "AGM("), ("--method hold --order 2", "HOLD(order=2"), ("--no-correct", "'correct': False")]


@pytest.mark.parametrize(("asked", "name"), SERVED)
def test_a_denoiser_checkpoint_serves_any_process(toy, folder, asked, name, capsys):
    sample.main(["--ckpt", str(toy / "denoiser" / "ckpt.pt"), *f"--n 3 --nfe 4 --out here {asked}".split()])
    line = capsys.readouterr().out
    assert name in line and "NFE 4 " in line and "denoiser" in line
    assert np.load("here/samples.npz")["arr_0"].shape == (3, 8, 8, 1)


def test_likelihood_from_the_command_line(toy, folder, capsys):
    """Images: an untrained toy net knows little, so the bound is some bits above the 8 of uniform noise, and finite."""
    sample.main(["--ckpt", str(toy / "hold" / "ckpt.pt"), "--nll", "--n", "3", "--tol", "1e-1"])
    line = capsys.readouterr().out
    bits, error = (float(v) for v in re.search(r"<= (\S+) \+- (\S+) bits/dim", line).groups())
    assert math.isfinite(bits) and bits > 1 and error > 0 and "3 held-out samples of digits" in line


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


# -- the figures of bench/


def test_without_steering_the_spread_is_the_formula():
    """Against dV/dt of V = E (x, v)(x, v)^T with dx = v dt, dv = p (1 - t) dW, by Runge and Kutta."""
    spread = load_bench("bench/figures.py").spread
    for p, k in ((3.0, -0.2), (1.0, -0.95), (5.0, 0.7)):
        V = np.array([1.0, k, 1.0])  # xx, xv, vv
        for i in range(100):
            V = rk4(lambda t, V, p=p: np.array([2 * V[1], V[2], (p * (1 - t)) ** 2]), i / 100, V, 0.01)
        assert abs(V[0] ** 0.5 - spread(p, k)) < 1e-9


def test_figures_without_matplotlib_say_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fails("pip install matplotlib", load_bench("bench/figures.py").main, ["snr"])
    assert not snapshot(folder)


def test_figures_are_drawn_with_a_number(toy, folder, capsys):
    pytest.importorskip("matplotlib")
    bench = load_bench("bench/figures.py")
    for name in bench.FIGURES.keys() - {"agm5", "hold34"}:  # these take as long as all others
        capsys.readouterr()
        bench.main([name, "--ckpt", str(toy / "denoiser/ckpt.pt"), *bench.TOY])
        assert re.match(rf"runs/figures/{name}.png: .* -?\d+\.\d+", capsys.readouterr().out), name
        assert Path(f"runs/figures/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_one_axis_end_to_end(folder):
    """Numbers (N, 1) through training, sampling and their picture, in the units of the file."""
    values = np.random.default_rng(0).choice([30.0, 50.0], (400, 1)) + np.linspace(0, 1, 400)[:, None]
    np.save("one.npy", values)
    train.main([*TOY, "--data", "one.npy", "--out", "one"])
    for n in ("7", "200"):
        sample.main(["--ckpt", "one/ckpt.pt", "--n", n, "--nfe", "4"])
        x = np.load("one/samples.npz")["arr_0"]
        assert x.shape == (int(n), 1) and x.dtype == np.float32 and 20 < x.mean() < 60
    assert read_png(Path("one/samples.png")).shape == (480, 480, 3)


# -- classes and guidance


CLASSES = Mixture([0.3, 0.7], [[0.8], [-0.6]], 0.1)  # two classes of one mode each


def class_net(P):
    """What a perfectly trained network with classes returns: for label j that of the j-th mode, for None all data's."""
    alone = [Mixture([1.0], CLASSES.centres[[j]].tolist(), CLASSES.std).net(P) for j in range(2)]

    def net(m, t, label=None):
        if label is None:
            return whole(m, t)
        return torch.where((label == 0)[:, None], alone[0](m, t), alone[1](m, t))

    whole = CLASSES.net(P)
    return net


@pytest.mark.parametrize("param", ["paper", "denoiser"])
@each_of(SDE, *PROCESSES)
def test_guiding_the_network_guides_the_prediction(P, param):
    P, m, label = dataclasses.replace(P, param=param), prior(P, 6, 1), torch.tensor([0, 1, 0, 1, 1, 0])
    net, denoise = class_net(P), module_of(P).denoise
    for t in asked(P)[1:-1]:
        free, told = denoise(P, net, m, t, None), denoise(P, net, m, t, label)
        for guidance in (0, 0.5, 1, 3):
            guided = denoise(P, sample.guide(net, guidance), m, t, label)
            assert worst(guided, free + guidance * (told - free)) < 1e-7


@every_sampler
def test_guidance_one_draws_from_the_class_and_none_from_all(P, name):
    """Weight, mean and spread of the two modes, to four standard errors of 2,000 samples, and what 50 steps of each
    sampler are wrong by."""
    P, n, classes = paper(P), 2000, torch.arange(2000) % 2
    means, sampler = CLASSES.centres, module_of(P).SAMPLERS[name]
    for guidance in (0, 1):
        start = CLASSES.mean + guidance * (means - CLASSES.mean)
        net = sample.guide(class_net(P), guidance)
        x = train.draw(sampler, P, net, (1,), n, 50, batch=1500, label=classes, data_mean=start)[:, 0].double()
        of_mode = (x < 0.1).long()
        assert guidance == 0 or (of_mode == classes).double().mean() > 0.999
        assert guidance == 1 or abs(of_mode.double().mean() - 0.7) < 4 * math.sqrt(0.21 / n) + 0.01
        for j in range(2):
            part = x[of_mode == j]
            assert abs(part.mean() - means[j, 0]) < 4 * 0.1 / math.sqrt(len(part)) + 0.01
            assert name == "em" or abs(part.std() - 0.1) < 4 * 0.1 / math.sqrt(2 * len(part)) + 0.02


def test_a_sample_of_a_class_does_not_depend_on_its_batch():
    means, label, net = torch.tensor([[0.5], [-0.5]]), torch.tensor([0, 1, 1, 0, 1]), class_net(ODE)
    for sampler in (agm_ref.ode, agm_ref.em):
        one, two = (train.draw(sampler, ODE, net, (1,), 5, 4, batch=b, label=label, data_mean=means) for b in (2, 5))
        assert worst(one, two) < 1e-6


def test_one_label_in_ten_is_dropped_and_class_means_are_exact(folder):
    torch.manual_seed(0)
    label = torch.randint(5, (20_000,))
    kept = train.drop(label, 5)
    assert abs((kept == 5).double().mean() - 0.1) < 0.01 and (kept[kept < 5] == label[kept < 5]).all()
    labels = np.random.default_rng(0).integers(0, 3, 50) * 2  # classes 1 and 3 are empty
    pixels = np.random.default_rng(1).integers(0, 256, (50, 4, 4, 3), np.uint8)
    for name, x in (("images", pixels), ("points", randn64(0, 50, 3).numpy() * 9 + 4)):
        np.savez(name, x=x, labels=labels)
        dataset = data.load(f"{name}.npz")
        with pytest.warns(UserWarning, match="no sample of class 1, 3 to learn"):
            found = dataset.labels_summary()
        assert found["labels"] == 5 and found["class_means"].shape == (5, *dataset.shape)
        seen = dataset.train.double() / 127.5 - 1 if dataset.is_image else dataset.train.double()
        for k in (0, 2, 4):
            assert worst(found["class_means"][k], seen[dataset.train_labels == k].mean(0)) < 1e-6


@pytest.mark.parametrize("method", ["agm", "hold"])
@pytest.mark.parametrize("param", ["paper", "denoiser"])
def test_classes_are_learnt(folder, method, param, capsys):
    """Points around +5 and -5, in other units than the network's."""
    labels = np.arange(400) % 2
    np.savez("two.npz", x=labels[:, None] * 10 - 5 + randn64(0, 400, 2).numpy(), labels=labels)
    options = "--data two.npz --classes --steps 300 --batch 128 --width 32 --blocks 3 --lr 3e-3 --out run".split()
    train.main(["--method", method, "--param", param, *options])
    for wanted, n in (("0", 100), ("1", 100), ("all", 101)):
        sample.main(["--ckpt", "run/ckpt.pt", "--nfe", "10", "--n", str(n), "--class", wanted, "--guidance", "1.5"])
        assert "NFE 20 " in capsys.readouterr().out
        file = np.load("run/samples.npz")
        drawn, asked_for = file["arr_0"], file["labels"]
        assert len(drawn) == n and (wanted == "all" or (asked_for == int(wanted)).all())
        assert abs(int(asked_for.sum()) * 2 - n) < 2 or wanted != "all"
        assert ((drawn.mean(1) > 0) == asked_for).mean() > 0.97


def test_runs_with_classes_resume_and_old_ones_are_sampled(folder, toy):
    options = ["--classes", *TOY, "--steps", "8"]
    train.main([*options, "--out", "whole"])
    train.main([*options, "--out", "cut", "--steps", "4", "--save-every", "2"])
    ckpt = torch.load("cut/ckpt.pt", weights_only=True)
    assert ckpt["config"]["labels"] == 10 and ckpt["net"]["time.label.weight"].shape[0] == 11
    train.main("--resume --classes --out cut --steps 8".split())
    assert set(losses(folder / "cut")) == set(range(1, 9))
    sample.main("--ckpt cut/ckpt.pt --class all --nfe 2".split())
    file = np.load("cut/samples.npz")
    assert file["arr_0"].shape == (80, 8, 8, 1) and (file["labels"] == np.arange(10).repeat(8)).all()
    assert read_png(Path("cut/samples.png")).shape == (8 * (10 * 9 - 1), 8 * (8 * 9 - 1))  # a row for each class
    for n, columns in ((15, 1), (1100, 102)):  # rows of one class each, as long as all can have
        sample.main(["--ckpt", "cut/ckpt.pt", *f"--class all --nfe 1 --n {n} --out many".split()])
        found, labels = np.load("many/samples.npz").values()
        first = np.concatenate([found[labels == i][:columns] for i in range(10)])
        assert len(found) == n and same(read_png(Path("many/samples.png")), data.image_grid(first, columns))
    old = broken(toy / "denoiser/ckpt.pt", lambda c: c["config"].pop("classes"))
    sample.main(["--ckpt", old, "--n", "2", "--nfe", "2", "--out", "here"])
    for command, words in (
        ("--ckpt cut/ckpt.pt --class 10", "from 0 to 9, got 10"),
        ("--ckpt cut/ckpt.pt --class -1", "from 0 to 9, got -1"),
        ("--ckpt cut/ckpt.pt --guidance 2", "--guidance belongs to --class"),
        ("--ckpt cut/ckpt.pt --class 1 --guidance nan", "--guidance must be a number"),
        (f"--ckpt {old} --class 1", "trained with --classes"),
        ("--ckpt cut/ckpt.pt --class 1 --nll --method hold", "leave out --class"),
    ):
        assert words in refused(sample, *command.split(), "--out", "new")
    assert not Path("new").exists() and "spiral has no classes" in refused(train, *TOY, "--data", "spiral", "--classes")
    for key, value in itertools.product(("classes", "labels", "class_means"), (3, "x", None, [1.0], torch.ones(2))):
        wrong = broken("cut/ckpt.pt", lambda c, key=key, value=value: c["config"].update({key: value}))
        assert re.search("bad.pt|does not fit", refused(sample, "--ckpt", wrong, "--out", "new"))


# -- nothing lost: interrupted, full, broken


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
for number, _ in SIGNALS:  # nohup, or a shell's &, makes this process and its children deaf to some
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_signal_ends_after_the_step_and_its_save(folder, monkeypatch, capsys, number, status):
    options = [*TOY, "--save-every", "100", "--out", "my run"]
    calls, batch = itertools.count(1), data.Dataset.batch
    with monkeypatch.context() as patch:  # the signal comes in the middle of step 2
        kill = partial(os.kill, os.getpid(), number)
        patch.setattr(data.Dataset, "batch", lambda *a: (next(calls) == 2 and kill(), batch(*a))[1])
        with pytest.raises(SystemExit) as stop:
            train.main(options)
    assert stop.value.code == status
    line = capsys.readouterr().err
    assert "stopped at step 2" in line and "train.py --resume --out 'my run'" in line and line.count("\n") == 1
    assert torch.load("my run/ckpt.pt", weights_only=True)["step"] == 2
    train.main(["--resume", "--out", "my run"])
    assert sorted(losses(folder / "my run")) == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(data, "load", lambda *a: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stop:
        train.main(TOY)
    assert stop.value.code == status and "nothing was written" in capsys.readouterr().err and not Path("runs").exists()


def test_a_signal_while_samples_are_written_lets_them_be_written(toy, folder, monkeypatch, capsys):
    write = data.write_files
    monkeypatch.setattr(data, "write_files", lambda files: (os.kill(os.getpid(), signal.SIGTERM), write(files)))
    with pytest.raises(SystemExit) as stop:
        sample.main(["--ckpt", str(toy / "denoiser/ckpt.pt"), "--n", "2", "--nfe", "2", "--out", "here"])
    assert stop.value.code == 143 and "wrote here/samples.npz and here/samples.png" in capsys.readouterr().err
    assert len(np.load("here/samples.npz")["arr_0"]) == 2


def test_a_narrow_locale_a_lost_terminal_and_a_full_disk_for_the_log_end_nothing(folder):
    """A terminal that cannot show the data's name, then also `| head -1`, then /dev/full as the log."""
    np.save("данные.npy", randn64(0, 40, 2).numpy())
    Path("full").mkdir()
    Path("full/log.txt").symlink_to("/dev/full")
    command = [sys.executable, str(HERE / "train.py"), *TOY, "--data", "данные.npy"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=env)
    assert done.returncode == 0 and Path("runs/agm-данные/ckpt.pt").exists(), done.stderr
    process = subprocess.Popen([*command, "--out", "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0 and process.stderr.read() == b""
    assert len(losses(folder / "run")) == 6 and "данные" in Path("run/log.txt").read_text("utf-8")
    train.main([*TOY, "--out", "full"])
    assert Path("full/ckpt.pt").exists()
    closed = f"{shlex.join([*command, '--out', 'closed'])} >&- 2>&-"
    assert subprocess.run(closed, shell=True).returncode == 0 and Path("closed/ckpt.pt").exists()


@contextlib.contextmanager
def at_most(kind, number):
    limits = resource.getrlimit(kind)
    resource.setrlimit(kind, (number, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, limits)


def full_disk():
    """No file may grow beyond a few bytes, as on a full disk: not the one either that pytest itself may write to."""
    return at_most(resource.RLIMIT_FSIZE, 100)


def memory_limit(extra=2 * 2**30):
    """Hostile input may take that much more address space, and not the machine's."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return at_most(resource.RLIMIT_AS, now + extra)


def refused(script, *argv):
    """The one line of a command that is refused."""
    with pytest.raises(SystemExit) as stop:
        script.main(list(argv))
    assert isinstance(stop.value.code, str) and re.match("error: [^\n]+$", stop.value.code), stop.value.code
    return stop.value.code


def test_a_full_disk_keeps_the_old_files_and_leaves_no_others(folder):
    train.main(["--out", "run", *TOY])
    sample.main("--ckpt run/ckpt.pt --n 2 --nfe 2".split())
    before = snapshot(folder)
    with full_disk():
        assert "cannot write run/samples.npz" in refused(sample, *"--ckpt run/ckpt.pt --n 2 --nfe 2".split())
        assert snapshot(folder) == before
        assert "cannot write run/ckpt.pt" in refused(train, *"--resume --out run --steps 9 --log-every 9".split())
    del before[folder / "run/log.txt"]
    assert {k: v for k, v in snapshot(folder).items() if k.name != "log.txt"} == before
    with pytest.raises(KeyboardInterrupt):
        data.write_files({folder / "a": b"1", folder / "b": lambda file: (_ for _ in ()).throw(KeyboardInterrupt)})
    assert not list(folder.glob("*.tmp")) and not (folder / "a").exists()

    class Impatient(BaseException):
        pass

    def save(file):
        wrapped = SimpleNamespace(write=lambda part: (_ for _ in ()).throw(Impatient), flush=file.flush)
        torch.save({"net": torch.zeros(10**6)}, wrapped)

    with pytest.raises(Impatient):  # not "make room"
        data.write_files({folder / "a": save})
    assert not list(folder.glob("*.tmp")) and not (folder / "a").exists()


def test_a_run_owns_its_folder(folder):
    config, found = {"method": "agm", "data": "digits", "out": None}, []
    threads = [threading.Thread(target=lambda: found.append(train.claim(config, False))) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len({out for out, _ in found}) == 8
    out, log = found[0]
    for goes_on in (False, True):
        fails("another process", train.claim, {**config, "out": str(out)}, goes_on)
    log.write(b"step 1 of a run that ended before its first save")
    log.close()
    kept = [".try", "ckpt.pt.mine.tmp", "notes.txt", "step-by-step.png"]
    for name in (*kept, "step-0000001.png", "ckpt.pt.0a1b2c3d.tmp"):
        (out / name).write_text("mine")
    train.main([*TOY, "--out", str(out), "--steps", "1"])
    assert sorted(p.name for p in out.iterdir()) == sorted([*kept, "ckpt.pt", "log.txt", "step-0000001.png"])
    assert "before its first save" not in (out / "log.txt").read_text()
    assert (out / "step-0000001.png").read_bytes()[:4] == b"\x89PNG"
    [log.close() for _, log in found]
    Path("mine").mkdir()
    (out / "ckpt.pt").rename(out / "best.pt")
    for path in (Path("mine/log.txt"), folder / "precious.txt"):
        path.write_text("dear diary")
    Path("linked").mkdir()
    Path("linked/log.txt").symlink_to(folder / "precious.txt")
    before = snapshot(folder)
    for name, words in ((out, "holds a run"), ("mine", "not the log of a run"), ("linked", "not the log of a run")):
        assert words in refused(train, *TOY, "--out", str(name))
    assert snapshot(folder) == before
    Path("runs").rename("moved")
    Path("runs").symlink_to("/nonexistent/scratch")  # a disk that is not mounted
    assert "cannot write to runs/agm-digits" in refused(train, *TOY)


@pytest.mark.parametrize("name", ["digits", "moons"])
def test_pictures_of_a_run_are_those_of_sample_and_are_made_up_for(folder, name, monkeypatch, capsys):
    train.main([*TOY, "--data", name, "--out", "run", "--steps", "3"])
    drawn = Path("run/step-0000003.png").read_bytes()
    Path("run/step-0000003.png").unlink()  # as a kill between the save and the picture leaves it
    train.main("--resume --out run --steps 3".split())
    assert Path("run/step-0000003.png").read_bytes() == drawn
    sample.main(["--ckpt", "run/ckpt.pt", "--batch", "16" if name == "digits" else "10000"])
    assert Path("run/samples.png").read_bytes() == drawn
    if name == "digits":  # all images go into the arrays, and as many as readers take into the picture
        sizes, forward = set(), nets.UNet.forward
        monkeypatch.setattr(nets.UNet, "forward", lambda net, m, *a: (sizes.add(len(m)), forward(net, m, *a))[1])
        train.main("--resume --out run --steps 4".split())
        sample.main("--ckpt run/ckpt.pt --n 1100 --nfe 1 --batch 16".split())
        assert "shows the first 1024" in capsys.readouterr().out
        assert max(sizes) == 16 and len(np.load("run/samples.npz")["arr_0"]) == 1100
        assert read_png(Path("run/samples.png")).shape == (8 * (9 * 32 - 1),) * 2  # 32 x 32 images, enlarged 8 times


def broken(path, change, out="bad.pt"):
    """A copy of the checkpoint after change(its content)."""
    ckpt = torch.load(path, weights_only=True)
    change(ckpt)
    torch.save(ckpt, out)
    return out


def test_what_is_not_finite_is_neither_sampled_nor_resumed_nor_written(toy, folder, monkeypatch):
    source = toy / "denoiser/ckpt.pt"
    Path("run").mkdir()
    for part in ("net", "ema"):
        bad = broken(source, lambda c: next(iter(c[part].values())).fill_(math.nan), "run/ckpt.pt")  # noqa: B023
        for script, options in ((sample, ["--ckpt", bad]), (train, ["--resume", "--out", "run"])):
            assert "not finite" in refused(script, *options)
    monkeypatch.setitem(agm_ref.SAMPLERS, "ode", lambda process, net, m0, nfe: m0[:, :1] * math.nan)
    assert "not finite" in refused(sample, "--ckpt", str(source), "--out", "here") and not list(Path("here").iterdir())


def test_a_flipped_bit_is_noticed_or_changes_nothing(toy, folder):
    whole, good = (toy / "denoiser/ckpt.pt").read_bytes(), train.load_checkpoint(toy / "denoiser/ckpt.pt")
    noticed = 0
    for i in np.random.default_rng(0).integers(len(whole), size=60):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << i % 8
        Path("bad.pt").write_bytes(flipped)
        try:
            ckpt = train.load_checkpoint("bad.pt")
        except data.UserError as e:
            noticed += "is damaged" in str(e)
        else:  # in what fills the gaps between the parts
            assert all(same(ckpt[part][k], v) for part in ("net", "ema") for k, v in good[part].items())
    assert noticed > 40


# -- nothing guessed: presets, arrays, units


@pytest.mark.parametrize("name", ["spiral", "digits"])
def test_the_preset_follows_the_data_and_not_their_name(folder, name, capsys):
    dataset = data.load(name)
    np.save("mine.npy", dataset.train.numpy() if name == "spiral" else dataset.train[:, 0].numpy())
    known, mine = ({**train.configure(["--data", d])[0], "data": None} for d in (name, "mine.npy"))
    assert known == mine
    with pytest.raises(SystemExit):
        train.main(["--data", "mine.npy", "--help"])
    assert f"(default: {known['batch']})" in capsys.readouterr().out
    train.main([*TOY, "--data", "mine.npy"])
    assert known["preset"] in capsys.readouterr().out.splitlines()[0]


def test_points_of_any_number_of_axes_and_far_from_zero_train_and_keep_their_units(folder):
    far = ((3, 1.7e9, 10, "f8"), (2, 1e6, 0.05, "f8"), (2, -1e15, 3e4, "f8"))
    for D, centre, spread, dtype in ((1, 0, 1, "f4"), *far, (2, 1e-30, 1e-32, "f4")):
        bound = 1e-6 * spread + {"f4": 1e-7, "f8": 1e-15}[dtype] * abs(centre)
        points = centre + spread * randn64(D, 500, D).numpy()
        np.savez("p.npz", x=points, labels=np.arange(500))
        dataset = data.load("p.npz")
        assert len(dataset.train[:, 0].unique()) == 400 and abs(dataset.std - 1) < 1e-6
        for part, rows in ((dataset.train, dataset.train_labels), (dataset.test, dataset.test_labels)):
            assert np.abs(dataset.to_points(part) - points[rows]).max() < bound
        train.main([*TOY, "--data", "p.npz", "--out", f"run{centre}"])
        sample.main(f"--ckpt run{centre}/ckpt.pt --n 400 --nfe 5 --out s".split())
        x = np.load("s/samples.npz")["arr_0"]
        assert x.dtype == dtype and len(np.unique(x[:, 0])) > 395
        assert abs(x.mean() - centre) < 2 * spread


def test_the_order_of_the_rows_does_not_matter(folder):
    label = np.arange(1000) % 10
    np.savez("a.npz", x=np.sort(randn64(0, 1000, 2).numpy(), 0), labels=label)
    dataset = data.load("a.npz")
    assert len(dataset.test) == 200 and dataset.train_labels.bincount().min() > 60
    images = np.repeat(np.arange(250, dtype=np.uint8), 80)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    np.save("b.npy", images)
    exact = images.astype(float).std() / 127.5  # of all 20,000 rows, not of the first
    assert abs(data.load("b.npy").std / exact - 1) < 0.01


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        (dict(x_test=np.zeros((5, 2)), x_train=np.ones((50, 2))), "error: .*x_test, x_train.*images or x"),
        (dict(arr_0=np.arange(50), arr_1=np.ones((50, 2))), "error: .*arr_0, arr_1"),
        (dict(images=np.full((5, 8, 8), 9, np.uint8), x=np.ones((50, 2))), "error: .*images, x"),
        (dict(x=randn64(0, 50, 2).numpy(), weights=np.ones(50)), "samples are x"),
        (dict(x=randn64(0, 50, 2).numpy() * [1, 500]), "axis 0 spreads over"),
        (dict(x=randn64(0, 5, 40).numpy()), "5 points of 40 numbers"),
        (dict(images=np.random.default_rng(0).integers(0, 17, (9, 8, 8), np.uint8)), "largest pixel is 16"),
    ],
)
def test_what_could_be_meant_otherwise_is_refused_or_said(folder, arrays, match, recwarn):
    np.savez("a.npz", **arrays)
    if match.startswith("error: "):
        fails(match[7:], data.load, "a.npz")
    else:
        data.load("a.npz")
        assert [re.search(match, str(w.message)) is not None for w in recwarn] == [True]


def test_resume_knows_the_data_by_their_content(folder):
    points = {name: (5 + randn64(name, 200, 2)).numpy() for name in (0, 1)}
    np.save("a.npy", points[0])
    train.main([*TOY, "--data", "a.npy", "--out", "run"])
    Path("a.npy").rename("moved.npy")
    assert "no file a.npy" in refused(train, *"--resume --out run --steps 8".split())
    train.main("--resume --out run --steps 8 --data moved.npy".split())
    np.save("moved.npy", points[1])
    before = snapshot(folder)
    line = refused(train, *"--resume --out run --steps 9".split())
    assert re.search("moved.npy is not the run's data.*that was", line)
    assert "shape" in refused(train, *"--resume --out run --data digits".split())
    assert snapshot(folder) == before
    broken("run/ckpt.pt", lambda c: c["config"].update(data_mean=0.0), "run/ckpt.pt")  # as points once had it
    np.save("moved.npy", points[0])
    train.main("--resume --out run --steps 9".split())
    train.main([*TOY, "--out", "digits"])
    train.main("--resume --out digits --mult 1 2 --lr 3e-3 --no-flip --steps 7".split())


# -- a score, and many samples


def test_frechet_distance_against_independent_numerics():
    fid, (D, n, m) = load_bench("bench/fid.py"), (12, 300, 500)
    mixing = randn64(0, 2, D, D)
    a, b = 5 + randn64(1, n, D) @ mixing[0], 5.5 + randn64(2, m, D) @ mixing[1]
    (k, mu, A), (_, nu, B) = fid.moments(a.split(70)), fid.moments([b])
    assert k == n and worst(mu, a.numpy().mean(0)) < 1e-13 and worst(A, np.cov(a.numpy().T)) < 1e-12
    far = fid.moments((a + 1e6).float().double().split(70))  # what is common to all samples costs no digits
    assert worst(far[2], np.cov((a + 1e6).float().double().numpy().T)) < 1e-9
    apart = (mu - nu).square().sum() + A.trace() + B.trace()
    found = fid.frechet((n, mu, A), (m, nu, B))
    Y, Z = A @ B, torch.eye(D, dtype=F64)
    for _ in range(40):  # Denman and Beavers: Y to the square root of A B
        Y, Z = (Y + torch.linalg.inv(Z)) / 2, (Z + torch.linalg.inv(Y)) / 2
    assert abs(found - (apart - 2 * Y.trace())) < 1e-9 * found
    assert abs(found - (apart - 2 * torch.linalg.eigvals(A @ B).sqrt().sum().real)) < 1e-9 * found
    assert abs(fid.frechet((m, nu, B), (n, mu, A)) - found) < 1e-10 * found
    s, t, V = randn64(3, D).square(), randn64(4, D).square(), torch.linalg.qr(mixing[0])[0]  # they commute
    closed = (mu - nu).square().sum() + (s.sqrt() - t.sqrt()).square().sum()
    assert abs(fid.frechet((n, mu, V * s @ V.mT), (m, nu, V * t @ V.mT)) - closed) < 1e-9


@pytest.mark.parametrize(("n", "m"), [(50, 70), (50, 500), (2, 500), (2, 2)])
def test_frechet_distance_with_fewer_samples_than_features(n, m):
    """Then tr (A B)^(1/2) is the sum of the singular values of X Y^T / ((n - 1) (m - 1))^(1/2), X and Y centred."""
    fid, D = load_bench("bench/fid.py"), 200
    scale = 10 ** torch.linspace(0, -3, D, dtype=F64)
    a, b = randn64(1, n, D) * scale, 0.1 + randn64(2, m, D) * scale
    X, Y = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    exact = (a.mean(0) - b.mean(0)).square().sum() + X.square().sum() + Y.square().sum()
    exact -= 2 * torch.linalg.svdvals(X @ Y.mT).sum()
    A, B = fid.moments(a.split(30)), fid.moments([b])
    assert abs(fid.frechet(A, B) - exact) < 1e-6 * exact and abs(fid.frechet(A, A)) < 1e-6


class Flat(torch.nn.Module):
    """Stands in for the Inception network: linear in the pixels, and as strict about what it takes."""

    def __init__(self, D):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(D, 3 * 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor, return_features: bool = False):
        assert return_features and x.dtype == torch.uint8 and x.shape[1] == 3
        return torch.nn.functional.adaptive_avg_pool2d(x / 255, 8).flatten(1) @ self.weight.T


@pytest.fixture
def score(folder, capsys, monkeypatch):
    """Runs bench/fid.py -> what it says, and the distance. There are networks of 40 and 2048 features."""
    if importlib.util.find_spec("PIL") is None:  # which is not required
        monkeypatch.setattr(sample, "read_picture", lambda p, *_: torch.tensor(read_png(Path(p)).transpose(2, 0, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is no longer developed
        for D in (40, 2048):
            torch.jit.script(Flat(D)).save(f"{D}.pt")

    def run(*argv):
        capsys.readouterr()
        load_bench("bench/fid.py").main([*argv, "--device", "cpu"])
        said = capsys.readouterr().out
        return said, float(re.search(r": (-?[\d.]+), of", said)[1])

    return run


def test_the_score_of_arrays_pngs_and_stored_moments_is_one(folder, score, monkeypatch):
    """Also against the features in float64, by the singular values of the test above."""
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), np.uint8)
    drawn = images[:200] // 2
    np.savez("samples.npz", arr_0=drawn)
    np.save("data.npy", images)
    Path("a/b").mkdir(parents=True)
    sample.write_pngs(Path("a/b"), drawn)
    for D, title in ((2048, "FID"), (40, "Fréchet distance in the features of 40.pt")):
        net = Flat(D).weight.detach().double().numpy()
        f, g = (np.repeat(x / 255, 3, 3).transpose(0, 3, 1, 2).reshape(len(x), -1) @ net.T for x in (drawn, images))
        X, Y = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (f, g))
        exact = np.square(f.mean(0) - g.mean(0)).sum() + np.square(X).sum() + np.square(Y).sum()
        exact -= 2 * np.linalg.svd(X @ Y.T, compute_uv=False).sum()
        options = ["--features", f"{D}.pt", "--batch", "70"]
        with pytest.warns(UserWarning, match="200 samples are few"):
            said, found = score("samples.npz", "--ref", "data.npy", *options)
        assert said.startswith(f"grey images are repeated to three channels\n{title}: ")
        assert "of 200 samples against 300 images of data.npy" in said and abs(found / exact - 1) < 1e-6
    np.savez("ref.npz", mu=g.mean(0), sigma=np.cov(g.T))
    for source, ref in (("a", "data.npy"), ("samples.npz", "ref.npz")):
        with pytest.warns(UserWarning, match="samples are few"):
            assert abs(score(source, "--ref", ref, *options)[1] / exact - 1) < 1e-6
    with monkeypatch.context() as patch:
        patch.setattr(data, "LARGE", 1000)
        with pytest.warns(UserWarning, match="samples are few"):
            assert abs(score("samples.npz", "--ref", "data.npy", *options)[1] / exact - 1) < 1e-6
    np.save("many.npy", np.resize(drawn, (10_000, 8, 8, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abs(score("many.npy", "--ref", "data.npy", *options)[1] / exact - 1) < 0.1


def test_a_small_classifiers_distance_is_not_called_fid(folder, score, recwarn):
    digits = data.load("digits")
    held_out, noise = digits.test[:, 0].numpy(), np.random.default_rng(0).integers(0, 256, (300, 8, 8), np.uint8)
    np.save("good.npy", held_out)
    np.save("bad.npy", noise)
    (said, good), (_, bad) = (score(file, "--ref", "digits", "--epochs", "2") for file in ("good.npy", "bad.npy"))
    assert "Fréchet distance in a small classifier's features: " in said and "FID" not in said
    assert "against 1438 images of digits" in said and 0 <= good < bad / 5
    np.savez("mine.npz", images=held_out, labels=digits.test_labels.numpy())
    assert score("good.npy", "--ref", "mine.npz", "--epochs", "1")[1] < 1e-6  # of a file all images count
    for path in Path("runs/fid").iterdir():
        path.write_bytes(b"cut")
    line = refused(load_bench("bench/fid.py"), *"good.npy --ref digits --epochs 2".split())
    assert re.search("runs/fid/classifier-.* is no classifier of these data.*: remove it", line)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("none --ref digits", "no file none"),
        ("empty --ref digits", "at least two"),
        ("one.npy --ref digits", "at least two"),
        ("points.npy --ref digits", "points.npy holds points"),
        ("odd --ref digits", "pictures of (9, 8) and of (8, 8) pixels"),
        ("wide.npy --ref digits", "pictures of (8, 9) and of (8, 8) pixels"),
        ("odd --ref ref.npz --features 40.pt", "pictures of (9, 8) and of (8, 8) pixels"),
        ("fine.npy", "required: --ref"),
        ("fine.npy --ref digit", "did you mean digits"),
        ("fine.npy --ref moons", "moons holds points"),
        ("fine.npy --ref fine.npy", "no labels to train a classifier with: give --features"),
        ("fine.npy --ref ref.npz", "no labels to train a classifier with: give --features"),
        ("fine.npy --ref cut.npz --features 40.pt", "cannot use cut.npz"),
        ("fine.npy --ref bad.npz --features 40.pt", "cannot use bad.npz (mu (40,) and sigma (40, 3)"),
        ("fine.npy --ref ref.npz --features 2048.pt", "ref.npz has 40 features, 2048.pt 2048"),
        ("fine.npy --ref digits --features none.pt", "--features none.pt is not a TorchScript file"),
        ("fine.npy --ref digits --features fine.npy", "--features fine.npy is not a TorchScript file"),
        ("fine.npy --ref digits --features other.pt", "--features other.pt is not a TorchScript file"),
        ("fine.npy --ref digits --batch 0", "--batch must be a whole number"),
        ("fine.npy --ref digits --epochs -3", "--epochs must be a whole number"),
    ],
)
def test_what_cannot_be_scored_is_one_line(score, folder, argv, words):
    for name, shape in {"fine": (9, 8, 8, 1), "one": (1, 8, 8, 1), "wide": (9, 8, 9, 1)}.items():
        np.save(f"{name}.npy", np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    np.save("points.npy", np.ones((9, 2)))
    Path("empty").mkdir()
    for name, shape in {"odd/a": (3, 8, 8, 1), "odd/b": (3, 9, 8, 3)}.items():
        Path(name).mkdir(parents=True)
        sample.write_pngs(Path(name), np.zeros(shape, np.uint8))
    np.savez("ref.npz", mu=np.zeros(40), sigma=np.eye(40))
    np.savez("bad.npz", mu=np.zeros(40), sigma=np.ones((40, 3)))
    Path("cut.npz").write_bytes(Path("ref.npz").read_bytes()[:-30])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(3, 3)).save("other.pt")
    small = [] if "--features" in argv else ["--epochs", "1"]
    assert words in refused(load_bench("bench/fid.py"), *argv.split(), *small)


def at_batch(monkeypatch, number, action):
    """Runs action() before that batch is drawn; the next of what is returned is the number of the next batch."""
    calls, prior = itertools.count(1), train.Noise.prior
    monkeypatch.setattr(train.Noise, "prior", lambda *a: (next(calls) == number and action(), prior(*a))[1])
    return calls


# What is drawn -> options of its training and of sampling.
DRAWN = {
    "by stroke": ([], ["--stroke", "stroke.npy"]),
    "by class": (["--classes"], ["--class", "all", "--guidance", "2"]),
    "points": (["--data", "moons"], []),
}


@pytest.mark.parametrize(("name", "number", "status"), [(k, *v) for k, v in zip(DRAWN, SIGNALS, strict=True)])
def test_a_stopped_command_goes_on_and_gives_the_samples_of_one_run(folder, monkeypatch, capsys, name, number, status):
    np.save("stroke.npy", np.eye(8, dtype=np.uint8) * 200)
    trained, drawn = DRAWN[name]
    train.main([*TOY, "--out", "run", *trained])
    options = ["--ckpt", "run/ckpt.pt", *"--nfe 3 --sampler em --n 50 --batch 8".split(), *drawn, "--out"]
    sample.main([*options, "whole"])
    with monkeypatch.context() as patch:
        at_batch(patch, 4, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            sample.main([*options, "cut"])
    (part,), size = Path("cut").iterdir(), 3 * 8 * (8 if name == "points" else 64)
    assert stop.value.code == status and part.stat().st_size == size
    assert capsys.readouterr().err.endswith(f"stopped: 24 of 50 samples are kept in {part}; the same command goes on\n")
    with part.open("ab") as file:
        file.write(b"a batch that was cut")
    sample.main([*options, "cut", "--seed", "1"])  # begins anew, and leaves alone what is kept
    assert "going on" not in capsys.readouterr().out and part.stat().st_size == size + 20
    calls = at_batch(monkeypatch, 0, None)
    sample.main([*options, "cut"])
    assert f"going on after 24 samples in {part}" in capsys.readouterr().out and next(calls) == 5
    assert snapshot(Path("cut")).keys() == {Path("cut/samples.npz"), Path("cut/samples.png")}
    whole, cut = (np.load(f"{out}/samples.npz")["arr_0"] for out in ("whole", "cut"))
    assert whole.dtype == cut.dtype and whole.tobytes() == cut.tobytes()


def test_samples_go_on_after_a_kill(toy, folder):
    options = ["--ckpt", str(toy / "denoiser/ckpt.pt"), *"--nfe 3 --n 50 --batch 8 --out".split()]
    script = f"""if True:
        import itertools, os, sys; sys.path.insert(0, {str(HERE)!r}); import sample, train
        calls, prior = itertools.count(1), train.Noise.prior
        train.Noise.prior = lambda *a: os.kill(os.getpid(), 9) if next(calls) == 4 else prior(*a)
        sample.main({[*options, "cut"]!r})"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    (part,) = Path("cut").iterdir()
    assert part.stat().st_size == 3 * 8 * 64
    for out in ("cut", "whole"):
        sample.main([*options, out])
    whole, cut = (np.load(f"{out}/samples.npz")["arr_0"] for out in ("whole", "cut"))
    assert whole.tobytes() == cut.tobytes() and not part.exists()


def test_what_goes_wrong_with_a_part_is_one_line_and_keeps_what_is_there(toy, folder, monkeypatch, capsys):
    options = ["--ckpt", str(toy / "denoiser/ckpt.pt"), *"--nfe 2 --n 50 --batch 8 --out here".split()]
    with monkeypatch.context() as patch:
        at_batch(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            sample.main(options)
    assert "nothing was written" in capsys.readouterr().err and not os.listdir("here")
    with monkeypatch.context() as patch:
        at_batch(patch, 3, lambda: 1 / 0)
        refused(sample, *options)
    (part,) = Path("here").iterdir()
    before = snapshot(folder)
    with part.open("rb") as file:
        assert data.lock(file) and f"another process is writing {part}" in refused(sample, *options)
    assert snapshot(folder) == before
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", lambda x, config: np.full((len(x), 8, 8, 1), np.nan))
        assert "not finite" in refused(sample, *options) and not os.listdir("here")
    with full_disk():
        assert "cannot write here/samples-" in refused(sample, *options) and not os.listdir("here")


def test_one_batch_needs_no_part(toy, folder, monkeypatch):
    monkeypatch.setattr(sample, "open", lambda *_: 1 / 0, raising=False)
    sample.main(["--ckpt", str(toy / "denoiser/ckpt.pt"), *"--nfe 2 --n 8 --batch 8 --out here".split()])
    assert len(np.load("here/samples.npz")["arr_0"]) == 8


def test_progress_says_how_long_the_rest_takes(monkeypatch, capsys):
    clock = iter(range(0, 1000, 15))
    monkeypatch.setattr(sample.time, "time", lambda: next(clock))
    assert list(sample.progress([[0] * 10] * 4, 60, done=20, what="images")) == [[0] * 10] * 4
    lines = (f"\r{done} of 60 images, {left:.1f} minutes left " for done, left in ((30, 0.75), (40, 0.5), (50, 0.25)))
    assert capsys.readouterr().err == "".join(lines) + "\n"


def test_png_dir_has_a_file_a_sample_of_three_channels(toy, folder, monkeypatch):
    options = ["--ckpt", str(toy / "denoiser/ckpt.pt"), *"--nfe 2 --n 5 --batch 2 --out here --png-dir".split()]
    Path("there").mkdir()
    Path("real").mkdir()
    Path("link").symlink_to("real")
    for name in ("new/deep", "there", "link"):
        sample.main([*options, name])
        x = np.load("here/samples.npz")["arr_0"]
        assert sorted(os.listdir(name)) == [f"00000{i}.png" for i in range(5)] and len(os.listdir("new")) == 1
        assert all((read_png(Path(name, f"00000{i}.png")) == x[i]).all() for i in range(5))
        assert read_png(Path(name, "000000.png")).shape == (8, 8, 3)
    before = snapshot(folder)
    for name in ("there", "here", "."):
        assert "must be new or empty" in refused(sample, *options, name)
    assert "another folder than" in refused(sample, *options[:-2], "fresh/a", "--png-dir", "fresh")
    train.main([*TOY, "--data", "gmm", "--out", "points"])
    assert "wants a network of images" in refused(sample, "--ckpt", "points/ckpt.pt", "--png-dir", "other")
    assert "leave out --png-dir" in refused(sample, "--ckpt", str(toy / "hold/ckpt.pt"), "--nll", "--png-dir", "other")
    monkeypatch.setattr(data, "write_files", lambda files: None)
    with full_disk():
        line = refused(sample, *options[:4], *"--n 2 --out new --png-dir other".split())
    assert "cannot write --png-dir other" in line
    assert {p: v for p, v in snapshot(folder).items() if p in before} == before
    assert not os.listdir("other") and not list(folder.glob("*.tmp"))
    for name in ("here/samples.npz", "here/samples.npz/deeper"):
        assert "choose another --png-dir" in refused(sample, *options, name)


# -- one line for every mistake


def test_a_checkpoint_that_does_not_fit_itself_is_one_line(toy, folder):
    def config(key, value):
        return lambda c: c["config"].update({key: value})

    wrong = [[], 1.5, "x", "1", None, -3, 2**70, math.nan, {}, [0], True]
    fine = [("sde", True), ("data", "x"), ("data", "1"), ("data_mean", -3), ("data_mean", True)]
    fine = [*map(str, fine), *(str((key, 1.5)) for key in ("shift", "bound", "std", "scale", "data_mean"))]
    keys = "method param width shape std order seed mult shift bound dropout data_mean sde data scale steps".split()
    more = [("shape", [1, 8]), ("shape", [10**6, 8, 8]), ("mult", [1] * 9), ("mult", ["1"])]
    small = broken(toy / "denoiser/ckpt.pt", lambda c: c["optimizer"].update(state={}), "small.pt")  # loads faster
    sample.restore(small, "cpu")
    for key, value in [*itertools.product(keys, wrong), *more]:
        if str((key, value)) not in fine:
            fails("bad.pt|--mult", sample.restore, broken(small, config(key, value)), "cpu")
    changes = [
        *(lambda c, part=part: c[part].popitem() for part in ("net", "ema")),
        *(lambda c, new=new: c.update(new) for new in ({"net": 5}, {"step": -1}, {"rng": []})),
        *(lambda c: c.pop("step"), lambda c: c["rng"].update(cpu=torch.zeros(3))),
        lambda c: next(iter(c["optimizer"]["state"].values())).update(exp_avg=torch.zeros(2)),
        lambda c: c["optimizer"].clear(),
    ]
    Path("run").mkdir()
    for change in changes:
        broken(toy / "denoiser/ckpt.pt", change, "run/ckpt.pt")
        before = snapshot(folder)
        refused(train, "--resume", "--out", "run", "--steps", "9")
        assert snapshot(folder) == before


WORDS = "-1 1e400 nan inf -inf 1e30 10000000000000000000 x '' \\x00 -- 0x10 [] {} one 2,5 1;2 3e é ../..".split()
FLAGS = {train: "steps batch lr clip width blocks mult attention order seed save-every log-every warmup ema".split()}
FLAGS[train] += "dropout device amp param method data size flip unknown".split()
FLAGS[sample] = "nfe n rho t-end multistep eta seed batch order tol sampler device method raw unknown".split()
FLAGS[sample] += "class guidance share passes noise shrink rule inject mask stroke inpaint".split()


def test_two_hundred_wrong_command_lines_are_one_line_each_and_change_nothing(toy, folder):
    before, lines = snapshot(toy), 0
    for (script, flags), word in itertools.product(FLAGS.items(), WORDS):
        for flag in np.random.default_rng(lines).choice(flags, 7, replace=False):
            target = [] if script is train else ["--ckpt", str(toy / "denoiser/ckpt.pt")]
            refused(script, *target, "--out", "new", f"--{flag}={word}")
            lines += 1
    assert lines > 200 and snapshot(toy) == before and not list(folder.rglob("*"))


def test_a_hundred_damaged_files_are_one_line_each_or_the_same_data(folder):
    rng = np.random.default_rng(0)
    np.save("a.npy", rng.integers(0, 256, (20, 8, 8), np.uint8))
    np.savez_compressed("a.npz", x=randn64(0, 50, 2).numpy(), labels=np.arange(50))
    write_idx(Path("a.gz"), rng.integers(0, 256, (20, 8, 8), np.uint8))
    Path("a.tar.gz").write_bytes(CIFAR_TAR)
    readers = {"a.npy": data.load, "a.npz": data.load, "a.gz": lambda p: data.read_idx(Path(p), 3)}
    readers["a.tar.gz"] = lambda p: data.load("cifar10", p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, read in readers.items():
            whole = Path(name).read_bytes()
            for i in range(40):
                bad = bytearray(whole)
                for place in rng.integers(len(bad) if i % 2 else min(len(bad), 100), size=1 + i % 3):
                    bad[place] = rng.integers(256)
                Path(f"bad.{name}").write_bytes(bad[: None if i % 5 else len(bad) * i // 40])
                with contextlib.suppress(data.UserError) as _, memory_limit():
                    read(f"bad.{name}")


def test_a_small_file_that_claims_to_be_huge_is_refused_before_it_fills_the_memory(folder, monkeypatch):
    monkeypatch.setattr(data, "LIMIT", 10**6)
    Path("bomb.gz").write_bytes(gzip.compress(struct.pack(">4I", 0x803, 2000, 1000, 1) + bytes(2 * 10**6)))
    member = tarfile.TarInfo("test_batch.bin")
    member.size = 2**87
    Path("claim.tar.gz").write_bytes(gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + bytes(4096)))
    header = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 8, 8), }"
    Path("claim.npy").write_bytes(header.ljust(127) + b"\n")
    with memory_limit():
        fails("unpacks to more than", data.read_idx, Path("bomb.gz"), 3)
        fails("unpacks to more than", data.load, "cifar10", "bomb.gz")
        fails("damaged|missing", data.load, "cifar10", "claim.tar.gz")
        with pytest.raises((data.UserError, MemoryError)):
            data.load("claim.npy")


def test_out_of_memory_names_the_knobs(folder):
    with memory_limit(2**30):
        line = refused(train, *"--data spiral --batch 1000000 --width 4096 --blocks 99 --out new".split())
    assert "lower --batch" in line
    assert not Path("new/ckpt.pt").exists()


def test_a_large_array_is_held_about_twice_at_most(folder):
    script = f"""if True:
        import resource, sys; sys.path.insert(0, {str(HERE)!r}); import data
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        dataset = data.load("big.npy"); dataset.std, dataset.mean
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"""
    np.save("big.npy", np.random.default_rng(0).integers(0, 256, (60_000, 32, 32, 3), np.uint8))
    used = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(used) < 2.2 * Path("big.npy").stat().st_size


MISTAKES = [
    ("train --data digit --out new", "did you mean digits"),
    ("train --data cifar10 --data-dir nowhere --out new", "nowhere"),
    ("train --data none.npy --out new", "none.npy"),
    ("train --data memory.npy --out new", "error: no file memory.npy"),
    ("train --data moons --dropout 0.5 --out new", "--dropout has no effect on points"),
    ("train --data gmm --flip --out new", "--flip has no effect on points"),
    ("train --method hold --param paper --sde --out new", "--sde has no effect on HOLD"),
    ("train --data digits --data-dir {toy} --out new", "--data-dir is for fashion"),
    ("train --steps 0 --out new", "--steps must be a whole number from 1"),
    ("train --steps many --out new", "--steps"),
    ("sample --nef 5", "--nef"),
    ("train --attention 2 --out new", "--attention"),
    ("train --mult 0 --out new", "--mult"),
    ("train --lr 0 --out new", "--lr must be a number from"),
    ("train --sde --out new", "add --param paper"),
    ("train --method hold --order 0 --out new", "order"),
    ("train --out {toy}/agm", "--resume"),
    ("train --out {toy}/agm/ckpt.pt/deeper", "choose another --out"),
    ("train --device warp --out new", "--device warp"),
    ("train --resume --out new", "no checkpoint at new/ckpt.pt"),
    ("train --resume", "no checkpoint under runs/"),
    ("train --resume --out {toy}/agm --method hold", "--method agm"),
    ("train --resume --out {toy}/agm --lr 0.5", "--lr 0.003"),
    ("train --resume --out {toy}/cut", "is damaged"),
    ("sample --ckpt new.pt", "no checkpoint at new.pt"),
    ("sample", "no checkpoint under runs/"),
    ("sample --ckpt {toy}/agm", "Is a directory"),
    ("sample --ckpt {toy}/cut/ckpt.pt", "is damaged"),
    ("sample --ckpt {toy}/foreign.pt", "no checkpoint of this project"),
    ("sample --ckpt {toy}/list.pt", "no checkpoint of this project"),
    ("sample --ckpt {toy}/old.pt", "'param'"),
    ("sample --ckpt {toy}/agm/log.txt", "no checkpoint"),
    ("sample --ckpt {agm} --nfe 0", "--nfe must be a whole number from 1"),
    ("sample --ckpt {agm} --n 0", "--n must be a whole number from 1"),
    ("sample --ckpt {agm} --method hold", "was trained as agm"),
    ("sample --ckpt {hold} --order 2", "was trained as hold of order 3"),
    ("sample --ckpt {agm} --sampler lie", "exponential"),
    (
        "sample --ckpt {agm} --sampler em --multistep 2",
        "em has no --multistep: leave it out, or choose --sampler exponential",
    ),
    ("sample --ckpt {agm} --sampler em --eta 1", "choose --sampler ode"),
    ("sample --ckpt {agm} --sampler em --no-correct", "em has no --correct: leave it out, or choose"),
    ("sample --ckpt {agm} --rho inf", "--rho must be a number from 0.01 to 100"),
    ("sample --ckpt {hold} --rho 1e-3", "--rho must be"),
    ("sample --ckpt {hold} --nll --eta 1", "leave out --eta"),
    ("sample --ckpt {hold} --eta -1", "--eta must be a number from 0"),
    ("sample --ckpt {denoiser} --order 2", "give --method hold"),
    ("sample --ckpt {agm} --t-end 1.5", "t_end"),
    ("sample --ckpt {agm} --nll", "--nll needs a HOLD checkpoint"),
    ("sample --ckpt {hold} --nll --data moons", "moons has shape"),
    ("sample --ckpt {hold} --nll --tol 0", "--tol"),
    ("sample --ckpt {agm} --out {agm}", "another --out"),
    # more than one part of a batch, and bf16
    ("train --batch 16 --accum 3 --out new", "--batch 16 must be a multiple of 3"),
    ("train --batch 16 --accum 32 --out new", "must be a multiple of 32"),
    ("sample --ckpt {hold} --nll --amp bf16", "leave out --amp and --compile"),
    ("sample --ckpt {hold} --nll --compile", "leave out --amp and --compile"),
    ("sample --ckpt {hold} --amp fp16", "--amp must be one of off, bf16"),
    # conditions
    ("sample --ckpt {denoiser} --out here --inpaint p.npy", "--mask FILE, or --shrink K"),
    ("sample --ckpt {denoiser} --out here --mask p.npy", "--mask belongs to --inpaint"),
    ("sample --ckpt {denoiser} --out here --share 0.5", "--share belongs to --stroke"),
    ("sample --ckpt {denoiser} --out here --inpaint p.npy --mask m.npy --inject dyn", "--inject belongs to --stroke"),
    ("sample --ckpt {denoiser} --out here --stroke p.npy --passes 3", "--passes belongs to --inpaint"),
    ("sample --ckpt {denoiser} --out here --inpaint p.npy --mask m.npy --rule paper --passes 3", "has no --passes"),
    ("sample --ckpt {denoiser} --out here --inpaint p.npy --mask m.npy --rule paper --noise 3", "has no --noise"),
    ("sample --ckpt {denoiser} --out here --stroke p.npy --inject init --share 0.5", "init has no --share"),
    ("sample --ckpt {denoiser} --out here --tol 1e-3", "--tol belongs to --nll"),
    ("sample --ckpt {denoiser} --out here --stroke p.npy --inpaint p.npy --mask m.npy", "exclude each other"),
    ("sample --ckpt {denoiser} --out here --inpaint p.npy --mask none.npy", "cannot read --mask none.npy"),
    ("sample --ckpt {denoiser} --out here --inpaint p.npy --mask z.npy", "mark some pixels, but not all"),
    ("sample --ckpt {denoiser} --out here --inpaint p.npy --mask wide.npy", "must be (8, 8)"),
    ("sample --ckpt {denoiser} --out here --inpaint p.npy --shrink 3", "must divide 8 and 8"),
    ("sample --ckpt {denoiser} --out here --inpaint wide.npy --mask m.npy", "the network draws (1, 8, 8)"),
    ("sample --ckpt {denoiser} --out here --stroke f.npy", "give uint8 (H, W)"),
    ("sample --ckpt {denoiser} --out here --stroke p.npy --method hold --order 1", "no auxiliary blocks"),
]


@pytest.mark.parametrize(("line", "expected"), MISTAKES)
def test_a_mistake_is_one_line_and_loses_nothing(toy, folder, line, expected):
    (toy / "cut").mkdir(exist_ok=True)
    (toy / "cut" / "ckpt.pt").write_bytes((toy / "agm" / "ckpt.pt").read_bytes()[:20000])
    torch.save({"state_dict": torch.zeros(3)}, toy / "foreign.pt")
    torch.save([1, 2], toy / "list.pt")
    broken(toy / "agm/ckpt.pt", lambda c: c["config"].pop("param"), toy / "old.pt")
    arrays = dict(p=np.eye(8, dtype="u1"), m=np.eye(8, dtype=bool), z=np.zeros((8, 8), bool), f=np.eye(8))
    for name, array in {**arrays, "wide": np.ones((8, 9), "u1")}.items():
        np.save(f"{name}.npy", array)
    before, there = (snapshot(toy), snapshot(folder)), set(folder.rglob("*.*"))
    script, *argv = line.format(toy=toy, **{m: toy / m / "ckpt.pt" for m in ("agm", "hold", "denoiser")}).split()
    said = refused({"train": train, "sample": sample}[script], *argv)
    assert expected in said, said
    assert (snapshot(toy), snapshot(folder)) == before and set(folder.rglob("*.*")) == there


def test_two_runs_started_at_once_take_two_folders(folder):
    command = [sys.executable, str(HERE / "train.py"), *TOY]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # two threads each would wait for each other on two cores
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env) for _ in range(2)]
    assert [p.wait() for p in running] == [0, 0]
    assert sorted(p.parent.name for p in Path("runs").glob("*/ckpt.pt")) == ["agm-digits", "agm-digits-2"]
    assert all(len(losses(p)) == 6 for p in Path("runs").iterdir())


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_signal_saves_and_says_how_to_go_on(folder, number, status):
    sizes = [*TOY, "--steps", "100000", "--save-every", "50000"]
    command = [sys.executable, str(HERE / "train.py"), "--out", "my run", *sizes]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in running.stdout:
        if line.startswith("step 4 "):
            running.send_signal(number)
            break
    said = running.communicate()[1]
    assert running.returncode == status
    step = torch.load("my run/ckpt.pt", weights_only=True)["step"]
    assert said == f"stopped at step {step}, which is saved; python train.py --resume --out 'my run' goes on\n"
    train.main(["--resume", "--out", "my run", "--steps", str(step + 2)])
    assert sorted(losses(folder / "my run")) == list(range(1, step + 3))


def test_the_arrays_do_not_hang_on_the_picture(toy, folder, monkeypatch):
    def broken(*_):
        raise MemoryError

    monkeypatch.setattr(data, "picture", broken)
    sample.main(["--ckpt", str(toy / "agm/ckpt.pt"), *"--nfe 1 --out here --n 3".split()])
    assert len(np.load("here/samples.npz")["arr_0"]) == 3


def gaussian_net(cov, s):
    """The network whose denoiser is exact for N(0, cov), d numbers as an image (1, 1, d)."""

    def net(y, t, label=None):
        root = float(1 / t[0] - 1)  # 1 / sigma
        c_in = (1 + s**2 * root**2) ** -0.5
        u = y.flatten(1) / c_in
        x = torch.linalg.solve(root**2 * cov + torch.eye(len(cov)), root * u.mT).mT @ cov
        return ((x - s**2 * root * c_in**2 * u) / (s * c_in)).reshape(y.shape)

    return net


@pytest.mark.parametrize("process", [AGM(), HOLD(order=1), HOLD(order=2), HOLD()], ids=repr)
@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("known", ["pixels", "means"])
def test_conditioning_by_the_posterior_covariance_is_exact_for_gaussian_data(process, known, noise):
    """Mean and covariance given half of eight numbers, or the means of pairs, by the formulas of Gaussians."""
    method, d, n, s = sys.modules[type(process).__module__], 8, 20_000, process.sigma_data
    cov = s**2 * 0.9 ** (torch.arange(d)[:, None] - torch.arange(d)).abs().double()
    if known == "pixels":
        H, look = torch.eye(d).double()[1::2], sample.observation(mask=(torch.arange(d) % 2)[None])
        value = H.mT @ torch.tensor([0.7, -0.2, 0.1, 0.4]).double()
    else:
        H = torch.eye(4).double().repeat_interleave(2, 1) / 2
        see, fill = (lambda x: x.unflatten(-1, (4, 2)).mean(-1)), (lambda c: c.repeat_interleave(2, -1))
        look, value = (see, fill), torch.tensor([0.7, -0.2, 0.1, 0.4]).double()
    c = H @ value if known == "pixels" else value
    K = cov @ H.mT @ torch.linalg.inv(H @ cov @ H.mT + noise**2 * torch.eye(len(c)))
    mean, rest, value = K @ c, cov - K @ H @ cov, value.reshape(1, 1, 1, -1).expand(n, 1, 1, -1)
    factor = math.sqrt(2) if known == "means" else 1  # here fill is 2 H^T
    condition = sample.by_covariance(method, *look, value, steps=4, noise=noise * factor)
    m0 = process.prior((n, 1, 1, d), torch.Generator().manual_seed(0)).double()
    x = method.ode(process, gaussian_net(cov, s), m0, 20, data_mean=None, condition=condition).flatten(1)
    assert noise or (x @ H.mT - c).abs().max() < 1e-9
    assert (x.mean(0) - mean).square().mean().sqrt() < 0.05 * rest.diagonal().mean().sqrt()
    assert (torch.cov(x.mT) - rest).norm() < 0.05 * rest.norm()


@pytest.mark.parametrize("process", [AGM(), HOLD(order=1), HOLD(order=3)], ids=repr)
def test_redrawing_leaves_the_law_of_the_state(process):
    """Given x, a state redrawn is one of the same law with the same data block."""
    torch.manual_seed(0)
    method, n, t = sys.modules[type(process).__module__], 100_000, 0.5
    x = torch.full((n, 1, 1, 1), 0.7).double()
    eps = torch.randn(n, process.n, 1, 1).double()
    m = method.mix(process.mean(t)[:, None], x) + method.mix(process.cholesky(t), eps)
    new = sample.redraw(method, process, m, t, x, torch.randn_like)
    assert (new[:, 0] == m[:, 0]).all() and ((new[:, 1:] != m[:, 1:]).all() or process.n == 1)
    off = new.flatten(1) - 0.7 * process.mean(t)
    assert (off.mean(0) / process.cov(t).diagonal().sqrt()).abs().max() < 0.02
    assert (torch.cov(off.mT) - process.cov(t)).abs().max() < 0.02 * process.cov(t).diagonal().max()


@pytest.mark.parametrize("sampler", [[], ["--sampler", "exponential"], ["--sampler", "em"], ["--method", "hold"]])
def test_conditions_from_the_command_line(toy, folder, sampler, capsys):
    picture, mask = np.random.default_rng(0).integers(0, 256, (8, 8), "u1"), np.arange(64).reshape(8, 8) % 2 == 0
    np.save("picture.npy", picture)
    np.save("mask.npy", mask)
    base = ["--ckpt", str(toy / "denoiser/ckpt.pt"), "--n", "3", "--nfe", "3", "--out", "here", *sampler]
    sample.main([*base, "--inpaint", "picture.npy", "--mask", "mask.npy"])
    assert "NFE 3 with 2 backward passes each" in capsys.readouterr().out
    x = np.load("here/samples.npz")["arr_0"][..., 0]
    assert np.abs(x.astype(int) - picture)[:, mask].max() <= 1 and (x[0] != x[1]).any()
    sample.main([*base, "--inpaint", "picture.npy", "--mask", "mask.npy", "--rule", "paper"])
    assert np.abs(np.load("here/samples.npz")["arr_0"][..., 0].astype(int) - picture)[:, mask].max() <= 1
    sample.main([*base, "--inpaint", "picture.npy", "--shrink", "4"])
    found = np.load("here/samples.npz")["arr_0"][0, ..., 0].astype(float).reshape(2, 4, 2, 4).mean((1, 3))
    assert np.abs(found - picture.reshape(2, 4, 2, 4).mean((1, 3))).max() < 40  # an untrained net leaves the range
    sample.main(base)
    plain = np.load("here/samples.npz")["arr_0"]
    for options in ("--stroke picture.npy", "--stroke picture.npy --inject init"):
        sample.main([*base, *options.split()])
        assert (np.load("here/samples.npz")["arr_0"] != plain).any()


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


def test_readmes_state_the_line_counts():
    text = "".join((HERE / name).read_text() for name in ("README.md", "bench/README.md"))
    stated = dict(re.findall(r"`([\w./]+\.py)` \| (\d+)", text))
    assert set(stated) == {p.name for p in HERE.glob("*.py")} | {f"bench/{p.name}" for p in HERE.glob("bench/*.py")}
    for name, lines in stated.items():
        assert len((HERE / name).read_text().splitlines()) == int(lines), name


def test_what_both_methods_need_stands_in_both_letter_for_letter():
    for name in re.search(r"what both need \((.*?)\)", (HERE / "README.md").read_text(), re.S)[1].split(","):
        one, other = (inspect.getsource(getattr(module, name.strip(" `\n"))) for module in (agm_ref, hold_ref))
        assert one == other, name


def test_the_program_of_the_readme_learns_its_four_clusters():
    torch.manual_seed(0)
    exec(re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1], names := {})
    x = names["x"]
    assert x.shape == (1000, 2) and (x.abs() - 1).std() < 0.2 and ((x > 0).double().mean(0) - 0.5).abs().max() < 0.1


def readme_commands():
    """Every `python SCRIPT.py ...` of the two READMEs' code blocks but the tests' own, in order and once."""
    text = "".join((HERE / name).read_text() for name in ("README.md", "bench/README.md"))
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S))
    commands = (shlex.split(c, comments=True)[1:] for c in re.findall(r"python [\w/]+\.py[^\n&]*", blocks))
    return [list(c) for c in dict.fromkeys(map(tuple, commands))]


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
        elif script != "bench/figures.py" or importlib.util.find_spec("matplotlib"):
            bench = load_bench(script)
            images = ["--data", "cifar10", "--data-dir", str(tmp_path)] if script == "bench/images.py" else []
            bench.main([*options, *bench.TOY, *images])


# ---------------------------------------------------------------------------------------------------------------------
# Large networks: parts of a batch, several processes, bf16, compiled


def feed(setattr, accum):
    """Eight samples, times and noises an update, the same ones however many processes and parts share them; and a
    network whose zero layers are filled, as those block all gradients."""
    calls, now, build, randn_like = itertools.count(), {}, train.build, torch.randn_like

    def batch(dataset, n):
        step, i = divmod(next(calls), accum)
        first, generator = (i * train.WORLD + train.RANK) * n, torch.Generator().manual_seed(step)
        now["u"] = torch.rand(8, dtype=F64, generator=generator)[first : first + n]
        now["eps"] = torch.randn(8, 1, 8, 8, generator=generator)[first : first + n]
        return dataset.train[8 * step + first :][:n] / 127.5 - 1, None

    setattr(train, "build", lambda config: (*build(config)[:2], perturbed(build(config)[2]).train()))
    setattr(data.Dataset, "batch", batch)
    setattr(agm_ref, "stratified", lambda n: now["u"])
    setattr(torch, "randn_like", lambda x: now["eps"] if now else randn_like(x))


def torchrun(script, *argv):
    """Two processes of it; train.py's path, or the body of a program."""
    if not str(script).endswith(".py"):
        path = Path(f"{hashlib.md5(script.encode()).hexdigest()}.py")
        path.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r}); from test_ref import *\n{script}")
        script = path
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ours(stderr):
    """The lines that are not torchrun's report."""
    return [line for line in stderr.splitlines() if re.match("error: |stopped|warning", line)]


def test_the_update_does_not_depend_on_how_many_share_the_batch(folder, monkeypatch):
    """Rounding moves a weight by lr 1e-7 / |gradient|."""
    options = [*TOY, *"--steps 3 --batch 8 --warmup 0 --lr 1e-3".split()]
    with monkeypatch.context() as patch:
        feed(patch.setattr, 1)
        train.main([*options, "--out", "whole"])
    with monkeypatch.context() as patch:
        feed(patch.setattr, 4)
        train.main([*options, "--out", "parts", "--accum", "4"])
    script = "feed(setattr, 2)\ntrain.main(sys.argv[1:])"
    running = torchrun(script, *options, "--out", "both", "--accum", "2")
    assert running.wait() == 0, running.stderr.read()
    whole, *others = (torch.load(f"{out}/ckpt.pt", weights_only=True) for out in ("whole", "parts", "both"))
    for other in others:
        for i, state in whole["optimizer"]["state"].items():  # sums of three gradients, and of their squares
            assert worst(state["exp_avg"], other["optimizer"]["state"][i]["exp_avg"]) < 1e-6
        for i, (k, weight) in enumerate(whole["net"].items()):  # AdamW divides by |gradient|: rounding counts near 0
            large = whole["optimizer"]["state"][i]["exp_avg_sq"].sqrt() > 1e-5
            assert worst(weight[large], other["net"][k][large]) < 1e-5
    assert max(state["exp_avg"].abs().max() for state in whole["optimizer"]["state"].values()) > 1e-2
    for out in ("parts", "both"):
        for found, right in zip(losses(folder / out).values(), losses(folder / "whole").values(), strict=True):
            assert [float(v) for v in found] == pytest.approx([float(v) for v in right], abs=2e-3)


def test_processes_stop_together_resume_exactly_and_end_with_one_line(folder):
    options = [*TOY, "--steps", "24", "--save-every", "8", "--dropout", "0.1", "--out"]
    whole = torchrun(HERE / "train.py", *options, "whole")
    cut = torchrun(HERE / "train.py", *options, "cut")
    next(line for line in cut.stdout if line.startswith("step 4 "))
    cut.send_signal(signal.SIGTERM)
    said = ours(cut.stderr.read())
    assert cut.wait() != 0 and whole.wait() == 0
    step = torch.load("cut/ckpt.pt", weights_only=True)["step"]
    assert step < 10
    assert said == [f"stopped at step {step}, which is saved; python train.py --resume --out cut goes on"]
    script = "if train.RANK: train.update_ema = lambda *a: a[2] < 14 or 1 / 0\ntrain.main(sys.argv[1:])"
    broken = torchrun(script, "--resume", "--out", "cut")
    assert ours(broken.stderr.read()) == ["error: division by zero"] and broken.wait() != 0
    assert torch.load("cut/ckpt.pt", weights_only=True)["step"] == 8
    right = losses(folder / "whole")
    assert losses(folder / "cut") == {step: right[step] for step in range(1, 15)} and len(right) == 24
    train.main("--resume --out cut --steps 9".split())  # one process goes on where two were


def test_the_other_processes_do_not_repeat_a_mistake_and_want_a_gpu_each(folder, monkeypatch):
    def mistake():
        raise data.UserError("x")

    assert refused(SimpleNamespace(main=lambda argv: train.run(mistake)), []) == "error: x"
    monkeypatch.setattr(train, "RANK", 1)
    with pytest.raises(SystemExit) as stop:
        train.run(mistake)
    assert stop.value.code == 1
    monkeypatch.setattr(train, "RANK", 0)
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "lower --nproc_per_node to 1" in refused(train, *TOY[:-1], "cuda")


def test_processes_draw_differently(folder, monkeypatch):
    """Ranks 0 and 1 of 2, one after the other in this process: other samples, times and noise at every step."""
    seen = {0: [], 1: []}
    for rank, draws in seen.items():
        with monkeypatch.context() as patch:
            patch.setattr(train, "WORLD", 2)
            patch.setattr(train, "RANK", 0)
            patch.setattr(train, "DistributedDataParallel", lambda net: net)
            patch.setattr(train.dist, "init_process_group", lambda rank=rank: setattr(train, "RANK", rank))
            patch.setattr(train.dist, "all_reduce", lambda *a: None)
            patch.setattr(train.dist, "destroy_process_group", lambda: None)

            def loss(P, net, x, *_, draws=draws):
                draws.append(x)
                return net(x, x[:, 0, 0, 0]).sum()

            patch.setattr(agm_ref, "loss", loss)
            train.main([*TOY, "--out", f"rank{rank}"])
    assert [len(x) for x in seen[0]] == [8] * 6
    assert len({tuple(x.flatten().tolist()) for draws in seen.values() for x in draws}) == 12


def test_compiled_and_plain_networks_share_their_checkpoints(folder, monkeypatch):
    train.main([*TOY, "--out", "plain"])
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # wants no C++ compiler
    train.main([*TOY, "--out", "compiled", "--compile"])
    a, b = (torch.load(f"{run}/ckpt.pt", weights_only=True) for run in ("plain", "compiled"))
    assert a["net"].keys() == b["net"].keys() == b["ema"].keys()
    assert all(worst(a[part][k], b[part][k]) < 1e-3 for part in ("net", "ema") for k in a[part])
    train.main("--resume --out compiled --no-compile --steps 7".split())
    for out, options in (("p", []), ("c", ["--compile"])):
        sample.main(["--ckpt", "compiled/ckpt.pt", "--n", "3", "--nfe", "3", "--out", out, *options])
    p, c = (np.load(f"{out}/samples.npz")["arr_0"].astype(int) for out in "pc")
    assert np.abs(p - c).max() <= 1


def test_samples_in_bf16_are_close_and_not_equal(toy, folder):
    def change(ckpt):  # or the last layer, which starts at zero, hides the others
        torch.manual_seed(0)
        [v.add_(0.05 * torch.randn_like(v)) for v in ckpt["ema"].values()]

    path = broken(toy / "denoiser/ckpt.pt", change)
    for amp in ("off", "bf16"):
        sample.main(["--ckpt", path, "--n", "8", "--nfe", "5", "--amp", amp, "--out", amp])
    off, bf16 = (np.load(f"{amp}/samples.npz")["arr_0"].astype(int) for amp in ("off", "bf16"))
    assert 0 < np.abs(off - bf16).max() < 16


def test_norm_is_computed_in_float32_under_autocast():
    norm, x = perturbed(nets.norm(32)), (3 + torch.randn(2, 32, 8, 8)).bfloat16()
    groups = x.double().reshape(2, 8, -1)
    right = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    right = right.reshape(x.shape) * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16 and ((found.double() - right).abs() <= 2**-8 * right.abs() + 1e-5).all()


def test_moments_of_a_former_layout_are_read_as_they_were_meant(toy, folder):
    """They follow their weights, not the order in memory."""

    def turn(ckpt):
        for state in ckpt["optimizer"]["state"].values():
            state |= {k: v.to(memory_format=torch.channels_last) for k, v in state.items() if v.ndim == 4}

    for run, change in (("same", dict), ("turned", turn)):
        Path(run).mkdir()
        broken(toy / "denoiser/ckpt.pt", change, f"{run}/ckpt.pt")
        train.main(["--resume", "--out", run, "--steps", "8"])
    a, b = (torch.load(f"{run}/ckpt.pt", weights_only=True)["net"] for run in ("same", "turned"))
    assert all((a[k] == b[k]).all() for k in a)
