"""The proof that agm_ref.py and hold_ref.py are right, and nothing else.

    python -m pytest -q test_ref.py

In the order of the pages, both side by side. A test compares with something that does not use the
code under test: 100 digits, Runge and Kutta's method, autograd, Bayes' rule, Monte Carlo; later
ones use what the first have proved. A bound leaves at least a factor of ten over rounding; one that
has another reason says which.
"""

import ast
import dataclasses
import inspect
import math
import re
import textwrap
import warnings
from decimal import Decimal, localcontext
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import agm_ref
import hold_ref
from agm_ref import AGM
from hold_ref import HOLD

torch.set_num_threads(1)  # tensors are small: more threads would wait for each other

F64 = torch.float64
AGM_ODE = AGM(target="ode")
AGM_SDE = AGM(target="sde")
HOLD_NOISE = HOLD(target="noise")
CUSTOM = HOLD(order=3, gamma=(1.0, 2.0), xi=4.0, var=0.5, alpha=0.3, first=12.0)
BOTH = [AGM(), AGM_ODE, HOLD(), HOLD_NOISE]
ALL_ORDERS = [HOLD(order=n) for n in range(1, 9)]
PAPER_TARGETS = [AGM_ODE, AGM_SDE]
PAPER_TARGETS += [HOLD(order=n, var=0.6, target="noise") for n in (1, 2, 3, 4)]

# -------------------------------------------------------------------------------------------------
# Helpers: names, numbers and numerical methods


def name_of(value):
    if isinstance(value, AGM):
        return f"AGM-{value.target}"
    if isinstance(value, HOLD):
        return f"HOLD{value.n}-{value.target}"


def each(*processes):
    return pytest.mark.parametrize("process", processes, ids=name_of)


def page_of(process):
    return agm_ref if isinstance(process, agm_ref.Process) else hold_ref


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator)


def prior(process, B, D, seed=1):
    return process.prior((B, D), torch.Generator().manual_seed(seed)).double()


def difference(a, b):
    """The largest absolute difference."""
    a = torch.as_tensor(a, dtype=F64).detach()
    b = torch.as_tensor(b, dtype=F64).detach()
    assert a.shape == b.shape
    return float((a - b).abs().max())


def relative_difference(a, b):
    """The largest difference of an entry, per size of that entry."""
    a = torch.as_tensor(a, dtype=F64).detach()
    b = torch.as_tensor(b, dtype=F64).detach()
    return difference(a / b, torch.ones_like(b))


def rk4(rate, s, y, h):
    """y(s + h) of y' = rate(s, y), by Runge and Kutta's method of fourth order."""
    k1 = rate(s, y)
    k2 = rate(s + h / 2, y + h / 2 * k1)
    k3 = rate(s + h / 2, y + h / 2 * k2)
    k4 = rate(s + h, y + h * k3)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def recorder(answer, seen):
    """A network or a predict that returns answer(m, t), and notes (m, t, what it returned)."""

    def predict(m, t, label=None):
        x = answer(m, t)
        seen.append((m, t, x))
        return x

    return predict


# -------------------------------------------------------------------------------------------------
# Helpers: the law of the state given x, in 100 digits


@lru_cache(None)
def exact_law(process, t):
    """Mean (n,), covariance (n, n) and its lower factor at the float t, from 100 digits."""
    with localcontext() as context:
        context.prec = 100
        law = agm_law if isinstance(process, AGM) else hold_law
        mean, cov = law(process, Decimal(t))
        factor = decimal_cholesky(cov)
    return to_float64(mean), to_float64(cov), to_float64(factor)


def to_float64(decimals):
    return torch.from_numpy(decimals.astype(float))


def decimal_cholesky(cov):
    L = 0 * cov
    for i in range(len(cov)):
        for j in range(i):
            L[i, j] = (cov[i, j] - L[i, :j] @ L[j, :j]) / L[j, j]
        L[i, i] = (cov[i, i] - L[i, :i] @ L[i, :i]).sqrt()
    return L


def agm_law(process, t):
    """The error e = q - x is a sum of the modes tau and tau^4, and v is its rate. It is

    (4 tau - tau^4)/3        after a unit of e at t = 0,
    (tau - tau^4)/3          after a unit of v at t = 0,
    (tau - tau^4 s^-3)/3     after a unit kick of v that came when tau was s.
    """
    p = Decimal(str(process.p))
    k = Decimal(str(process.k))
    tau = 1 - t
    line = np.array([tau, Decimal(-1)]) / 3  # (e, v) of the mode tau
    bend = np.array([tau**4, -4 * tau**3]) / 3  # and of the mode tau^4
    from_e = 4 * line - bend
    from_v = line - bend
    cross = np.outer(from_e, from_v)
    start = np.outer(from_e, from_e) + np.outer(from_v, from_v) + k * (cross + cross.T)
    # kicks have the variance p^2 s^2 ds: int s^2, int s^-1, int s^-4 ds from tau to 1
    both = np.outer(line, bend)
    kicks = np.outer(line, line) * (1 - tau**3) / 3
    kicks = kicks + (both + both.T) * tau.ln()
    kicks = kicks + np.outer(bend, bend) * (tau**-3 - 1) / 3
    mean = np.array([Decimal(1), Decimal(0)]) - from_e
    return mean, start + p**2 * kicks


def hold_law(process, t):
    n = process.n
    var = Decimal(process.var)
    E = decimal_transition(process, t)
    prior_cov = var * decimal_eye(n)
    start = Decimal(process.alpha) * prior_cov
    start[0, 0] = Decimal(0)
    return E[:, 0], prior_cov + E @ (start - prior_cov) @ E.T


def decimal_eye(n):
    return np.array([[Decimal(int(i == j)) for i in range(n)] for j in range(n)])


def decimal_transition(process, t):
    """exp(G t): Taylor's series at t/4096, squared twelve times."""
    n = process.n
    if process.gamma is None:
        lam2 = Decimal(max(2 * n - 3, 1))
        squares = [lam2 * (n * n - i * i) / (4 * i * i - 1) for i in range(n - 1, 0, -1)]
        gamma = [square.sqrt() for square in squares]
        xi = n * lam2.sqrt()
    else:
        gamma = [Decimal(speed) for speed in process.gamma]
        xi = Decimal(process.xi)
    G = 0 * decimal_eye(n)
    for i, speed in enumerate(gamma):
        G[i, i + 1] = speed
        G[i + 1, i] = -speed
    G[-1, -1] = -xi
    term = decimal_eye(n)
    E = term
    for k in range(1, 50):
        term = term @ G * t / 4096 / k
        E = E + term
    for _ in range(12):
        E = E @ E
    return E


# -------------------------------------------------------------------------------------------------
# Helpers: the state in units of its factor L, and data whose posterior mean is known


def white_mean(process, t):
    """kappa = L^-1 mu (..., n): in units of L the state is kappa x + eps."""
    mean = process.mean(t)[..., None]
    return torch.linalg.solve_triangular(process.cholesky(t), mean, upper=False)[..., 0]


def whitened(process, m, t):
    """z = L^-1 m (B, n, D) of the state m (B, nD)."""
    blocks = m.double().reshape(len(m), process.n, -1)
    return torch.linalg.solve_triangular(process.cholesky(t), blocks, upper=False)


class Mixture:
    """Data drawn from sum_j weights_j N(centres_j, std^2 I), in D dimensions."""

    def __init__(self, weights, centres, std):
        self.weights = torch.tensor(weights, dtype=F64)
        self.centres = torch.tensor(centres, dtype=F64)  # (modes, D)
        self.std = std
        self.mean = self.weights @ self.centres

    def given_state(self, process, m, t):
        """E[x | m] (B, D) by Bayes' rule in phase space. In mode j every dimension of z = L^-1 m is
        N(kappa centre_j, C) with C = I + std^2 kappa kappa^T, and Cov(x, z) = std^2 kappa."""
        kappa = white_mean(process, t)
        C = torch.eye(process.n, dtype=F64) + self.std**2 * torch.outer(kappa, kappa)
        C_inv = torch.linalg.inv(C)
        centres = self.centres[:, None, None]  # (modes, 1, 1, D)
        gap = whitened(process, m, t) - kappa[:, None] * centres  # (modes, B, n, D)
        distance = (gap * (C_inv @ gap)).sum((2, 3))
        return self.average(distance, self.std**2 * (kappa @ C_inv @ gap))

    def given_y(self, y, sigma):
        """E[x | y] (B, D) for y = x + sigma noise; sigma (B, 1) or ()."""
        variance = self.std**2 + sigma**2
        gap = y - self.centres[:, None]  # (modes, B, D)
        distance = (gap.square() / variance).sum(2)
        return self.average(distance, self.std**2 / variance * gap)

    def average(self, distance, shift):
        """The mean of centre + shift (modes, B, D) over the modes, of density e^(-distance/2)."""
        log_weights = self.weights.log()[:, None]
        probability = torch.softmax(log_weights - distance / 2, 0)
        return (probability[..., None] * (self.centres[:, None] + shift)).sum(0)

    def predictor(self, process):
        """predict(m, t) of a sampler. By way of y, which is faster; test_denoise_... proves it."""

        def predict(m, t):
            kappa = white_mean(process, t)
            snr = kappa @ kappa
            y = kappa @ whitened(process, m, t) / snr
            return self.given_y(y, snr**-0.5).to(m)

        return predict

    def network(self, process):
        """What a perfectly trained network of the process returns."""

        def paper_network(m, t, label=None):
            x = self.given_state(process, m, t[0])
            return paper_label(process, x, m, float(t[0]))

        def denoiser(u, time, label=None):
            # EDM's preconditioning, solved for the network's output
            sigma = (time / (1 - time))[:, None]
            size = (sigma**2 + process.sigma_data**2).sqrt()
            y = size * u
            c_skip = process.sigma_data**2 / size**2
            c_out = process.sigma_data * sigma / size
            return (self.given_y(y, sigma) - c_skip * y) / c_out

        return denoiser if process.target == "data" else paper_network


CENTRES = [[-0.8, 0.1], [0.3, 0.9], [0.6, -0.7]]
GAUSSIAN = Mixture([1.0], [[0.4, -0.7]], 0.5)
NARROW = Mixture([0.2, 0.5, 0.3], CENTRES, 0.1)
SMOOTH = Mixture([0.2, 0.5, 0.3], CENTRES, 0.25)


def score(process, x, m, t):
    """grad_m log p(m | x) (B, nD) by autograd; x (B, D), m (B, nD), a float t."""
    mean, _, L = exact_law(process, t)
    m = m.detach().requires_grad_()
    states = m.view(len(m), process.n, -1).mT  # (B, D, n)
    law = MultivariateNormal(x[..., None] * mean, scale_tril=L)
    (gradient,) = torch.autograd.grad(law.log_prob(states).sum(), m, create_graph=True)
    return gradient


def paper_target(process, x, m, t):
    """What the papers define: F of AGM, eps_n = -L_nn score_n of HOLD; x (B, D), m (B, nD)."""
    if isinstance(process, HOLD):
        L = exact_law(process, t)[2]
        return -L[-1, -1] * score(process, x, m, t).chunk(process.n, 1)[-1]
    tau = 1 - t
    q, v = m.chunk(2, 1)
    a = 4 / tau * ((x - q) / tau - v)
    if process.target == "sde":
        return a
    g = process.p * tau
    return a - g**2 / 2 * score(process, x, m, t).chunk(2, 1)[1]


def paper_label(process, x, m, t):
    """The target over the standard deviation of its noise, |r|: r_i is the target of x = 0 and the
    noise eps = e_i."""
    L = exact_law(process, t)[2]
    r = paper_target(process, torch.zeros(process.n, 1, dtype=F64), L.mT, t)
    return paper_target(process, x, m, t) / r.detach().norm()


def target_times(process):
    """Times from prior to data at which targets are compared."""
    if isinstance(process, AGM):
        return [process.first, 0.1, 0.5, 0.9, 0.99, process.last]
    return [process.first, 3.0, 0.7, 0.5, process.last]


def time_of_noise(process, sigma):
    """The time at which y has noise of standard deviation sigma."""
    return float(process.time_of_snr(sigma**-2))


# -------------------------------------------------------------------------------------------------
# 1. The process


def linear_sde(process, t):
    """A, b, Q of dm = (A m + b x) dt + noise of covariance Q dt, as the papers write them."""
    n = process.n
    A = np.zeros((n, n))
    b = np.zeros(n)
    Q = np.zeros((n, n))
    if isinstance(process, AGM):
        tau = 1 - t
        A[:] = [[0, 1], [-4 / tau**2, -4 / tau]]
        b[1] = 4 / tau**2
        Q[1, 1] = (process.p * tau) ** 2
    else:
        gamma, xi = process.damping
        for i, speed in enumerate(gamma):
            A[i, i + 1] = speed
            A[i + 1, i] = -speed
        A[-1, -1] = -xi
        Q[-1, -1] = 2 * xi * process.var
    return A, b, Q


@each(AGM(), AGM(p=1.5, k=0.4), *ALL_ORDERS[:6], CUSTOM)
def test_mean_and_covariance_solve_the_moment_equations(process):
    """mean' = A mean + b and cov' = A cov + cov A^T + Q, by Runge and Kutta to t = .4 and .8."""

    def rate(t, moments):
        A, b, Q = linear_sde(process, t)
        mean = moments[:, 0]
        cov = moments[:, 1:]
        return np.column_stack([A @ mean + b, A @ cov + cov @ A.T + Q])

    if isinstance(process, AGM):
        start = [[0, 1, process.k], [0, process.k, 1]]
    else:
        start = process.alpha * process.var * np.eye(process.n, process.n + 1, 1)
        start[0, :2] = [1, 0]
    moments = np.array(start)  # (n, 1 + n): the mean beside the covariance
    h = 0.4 / 800
    for i in range(1600):
        moments = rk4(rate, i * h, moments, h)
        if i in (799, 1599):
            assert difference(process.mean((i + 1) * h), moments[:, 0]) < 1e-9
            assert difference(process.cov((i + 1) * h), moments[:, 1:]) < 1e-9


@pytest.mark.parametrize(
    "t", [0.0, 1e-5, 1e-3, 0.1, 0.5, 0.9, *(1 - 10.0**-j for j in range(2, 7))]
)
def test_every_entry_of_agms_law_has_nine_digits(t):
    mean, cov, L = exact_law(AGM(), t)
    lower = torch.tril_indices(2, 2).unbind()
    assert difference(AGM().mean(t), mean) < 1e-14
    assert relative_difference(AGM().cov(t), cov) < 1e-9
    assert relative_difference(AGM().cholesky(t)[lower], L[lower]) < 1e-9


OTHER_DAMPING = [
    HOLD(order=2, gamma=(1.0,), xi=0.5, first=100.0),
    HOLD(gamma=(30.0, 80.0), xi=160.0),
]


@each(*ALL_ORDERS, CUSTOM, *OTHER_DAMPING)
def test_holds_law_has_nine_digits_from_last_to_first(process):
    """Relative to the largest entry, as entries pass through 0."""
    for t in np.geomspace(process.last, process.first, 12).clip(process.last, process.first):
        mean, _, L = exact_law(process, float(t))
        assert difference(process.mean(t), mean) < 1e-11
        assert difference(process.cholesky(t), L) < 1e-9 * float(L.abs().max())


@pytest.mark.parametrize("n", range(1, 9))
def test_critical_damping_has_one_eigenvalue(n):
    """(G - lam)^n = 0, and no lower power is 0."""
    process = HOLD(order=n)
    lam = -math.sqrt(max(2 * n - 3, 1))
    N = process.drift - lam * torch.eye(n, dtype=F64)
    power = torch.linalg.matrix_power(N, n - 1)
    assert power.abs().max() > 0.1
    assert (N @ power).abs().max() < 1e-9 * power.abs().max()


def test_critical_damping_is_that_of_the_literature():
    known = {
        1: [1],
        2: [1, 2],
        3: [1, 8**0.5, 27**0.5],
        4: [1, 2, 5, 80**0.5],
        5: [1, 3.2**0.5, 9.8**0.5, 56**0.5, 175**0.5],
    }
    for n, gamma_and_xi in known.items():
        gamma, xi = HOLD(order=n).damping
        assert [*gamma, xi] == pytest.approx(gamma_and_xi, rel=1e-14)


@pytest.mark.parametrize("n", range(1, 9))
def test_gamma_makes_the_continued_fraction_of_the_tangent(n):
    """xi u/(1 + gamma_n-1^2 u^2/(1 + ...)) = tanh(n artanh u), where lam is scaled to -1."""
    gamma, xi = HOLD(order=n).damping
    scale = xi / n
    u = 0.3
    denominator = 1.0
    for speed in gamma:  # gamma_1 stands innermost
        denominator = 1 + (speed / scale * u) ** 2 / denominator
    assert n * u / denominator == pytest.approx(math.tanh(n * math.atanh(u)), rel=1e-12)


@each(*ALL_ORDERS, CUSTOM)
def test_holds_prior_is_stationary(process):
    """G S + S G^T + Q = 0 for S = var I."""
    G, _, Q = linear_sde(process, 0.0)
    S = process.var * np.eye(process.n)
    assert difference(process.prior_cov, S) == 0
    assert difference(process.drift, G) == 0
    assert np.abs(G @ S + S @ G.T + Q).max() < 1e-12


@each(AGM(), AGM(k=0.5), *ALL_ORDERS, CUSTOM)
def test_the_prior_has_the_covariance_of_the_state_at_first(process):
    """To .01, as HOLD's state has not forgotten the data: SNR(T) is up to .01."""
    _, cov, _ = exact_law(process, process.first)
    assert difference(process.prior_cov, cov) < 0.01


@each(*ALL_ORDERS, HOLD(snr_max=100.0), CUSTOM)
def test_holds_last_time_has_the_snr_snr_max(process):
    assert float(process.snr(process.last)) == pytest.approx(process.snr_max, rel=1e-6)


@each(AGM(), *ALL_ORDERS, CUSTOM)
def test_time_of_snr_inverts_snr(process):
    """From noise of 10 to noise of 1/200: to 2e-5, of straight lines between 2,000 knots."""
    snr = torch.logspace(-2, math.log10(4e4), 5000, dtype=F64)
    t = process.time_of_snr(snr.view(50, 100))
    assert t.shape == (50, 100)
    assert relative_difference(process.snr(t).view(-1), snr) < 3e-4


@each(AGM(), *ALL_ORDERS, CUSTOM)
def test_time_of_snr_stays_from_first_to_last(process):
    assert float(process.time_of_snr(1e-30)) == process.first
    assert float(process.time_of_snr(1e30)) == process.last


@each(AGM(), HOLD(), CUSTOM)
def test_times_have_any_shape(process):
    times = torch.tensor([[0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    for function in (process.mean, process.cov, process.cholesky, process.snr):
        alone = torch.stack([function(float(t)) for t in times.flatten()])
        together = function(times)
        assert together.dtype == F64
        assert difference(together, alone.unflatten(0, (2, 3))) < 1e-9


@pytest.mark.parametrize("t", [-1e-9, math.nan, math.inf, torch.tensor([0.5, -1.0])], ids=str)
@each(AGM(), HOLD(), CUSTOM)
def test_a_time_outside_of_the_process_is_refused(process, t):
    for function in (process.cov, process.cholesky, process.snr):
        with pytest.raises(ValueError, match=r"\A.* time runs from 0 .*\Z"):
            function(t)


@each(AGM(), AGM(k=0.5), HOLD(order=2, var=0.25), HOLD())
def test_prior_colours_the_generators_numbers(process):
    m = process.prior((50, 3, 2, 2), torch.Generator().manual_seed(1))
    eps = torch.randn(50, process.n * 3, 2, 2, generator=torch.Generator().manual_seed(1))
    L = torch.linalg.cholesky(process.prior_cov)
    assert m.dtype == torch.float32
    assert m.shape == eps.shape
    assert difference(m.flatten(), (L @ eps.double().view(50, process.n, 12)).flatten()) < 1e-5


def test_prior_is_drawn_on_the_device_that_is_asked_for():
    assert AGM().prior((2, 3), device="meta").is_meta


def test_prior_of_a_shape_of_one_number_is_refused():
    with pytest.raises(ValueError, match=r"\Aprior wants the shape \(B, C, ...\).* got \(5,\)\Z"):
        AGM().prior((5,))


def test_coefficients_that_are_kept_belong_to_one_process():
    """lru_cache tells processes apart by their fields: it gives what is computed anew."""
    for k in (-0.2, 0.2, -0.2):
        kept = agm_ref.times(AGM(k=k), 5, 0.9, 1.0)
        assert kept == agm_ref.times.__wrapped__(AGM(k=k), 5, 0.9, 1.0)
        _, kept = agm_ref.to_z(AGM(k=k), 0.3)
        assert kept == agm_ref.to_z.__wrapped__(AGM(k=k), 0.3)[1]


@each(*BOTH)
def test_defaults_of_torch_do_not_matter(process):
    """Coefficients stay float64 on the CPU, and states stay as they came."""
    page = page_of(process)
    m = prior(process, 4, 2)

    def sample(process):
        predict = partial(page.denoise, process, lambda m, t, label: 0.1 * m[:, :2])
        return page.ode(process, predict, m, 4)

    nothing_kept = dataclasses.replace(process, noise_mean=0.0)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            found = sample(nothing_kept)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == F64
    assert difference(found, sample(process)) < 1e-12


# -------------------------------------------------------------------------------------------------
# Block algebra


def test_mix_is_a_matrix_on_blocks():
    A = normal(0, 5, 2, 3)
    m = normal(1, 5, 6, 4, 4)
    expected = torch.einsum("bij,bjk->bik", A, m.view(5, 3, -1)).view(5, 4, 4, 4)
    assert difference(agm_ref.mix(A, m), expected) < 1e-13
    assert difference(agm_ref.mix(A[0], m)[:1], expected[:1]) < 1e-13


def test_autocast_rounds_no_coefficient():
    A = normal(0, 5, 2, 3)
    m = normal(1, 5, 6, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = agm_ref.mix(A, m)
    assert difference(mixed, agm_ref.mix(A, m.double())) < 1e-5


# -------------------------------------------------------------------------------------------------
# 2. The paper's target and loss


@each(*PAPER_TARGETS)
def test_training_pair_is_a_state_of_the_law_and_its_label(process):
    for t in target_times(process):
        x = normal(0, 4, 3)
        eps = normal(1, 4, process.n * 3)
        mean, _, L = exact_law(process, t)
        times = torch.full((4,), t, dtype=F64)
        m, label = page_of(process).training_pair(process, x, times, eps)
        blocks = mean[:, None] * x[:, None] + L @ eps.view(4, process.n, 3)
        assert difference(m, blocks.flatten(1)) < 1e-10
        # a* of AGM divides by tau^2, which makes 5e-9 of m's rounding
        assert difference(label, paper_label(process, x, m, t)) < 1e-7


def loss_of_zero(process, x):
    """The loss of a network that returns 0."""
    return float(page_of(process).loss(process, lambda m, t, label: torch.zeros_like(x), x))


@each(AGM_ODE, AGM_SDE, HOLD_NOISE)
@pytest.mark.parametrize("std", [0.2, 0.5, 1.0])
def test_a_network_that_returns_zero_has_the_loss_that_the_docstring_names(process, std):
    """1 for HOLD, to 5 standard errors sqrt(2/320,000); .5 to .8 for AGM."""
    torch.manual_seed(0)
    found = loss_of_zero(process, std * torch.randn(40_000, 8))
    if isinstance(process, AGM):
        assert 0.5 < found < 0.8
    else:
        assert abs(found - 1) < 0.0125


@each(AGM_ODE, HOLD_NOISE)
def test_training_times_lie_one_in_each_stratum(process):
    """Strata are even in t for AGM and in log(1 + 10 sqrt(SNR)) for HOLD."""

    def clock(t):
        if isinstance(process, AGM):
            return t
        return torch.log1p(10 * process.snr(t).sqrt())

    seen = []
    net = recorder(lambda m, t: m[:, :1], seen)
    page_of(process).loss(process, net, normal(0, 1000, 1) / 2)
    times = seen[0][1]
    ends = clock(torch.tensor([process.first, process.last], dtype=F64))
    place = (clock(times).sort().values - ends[0]) / (ends[1] - ends[0])
    middle = (torch.arange(1000) + 0.5) / 1000
    assert difference(place, middle) < 0.55 / 1000  # half a stratum, and HOLD's knots


def test_strata_come_in_random_order():
    """The mean of 4,000 draws of each place is 1/2, to five standard errors."""
    torch.manual_seed(0)
    draws = torch.stack([agm_ref.stratified(8) for _ in range(4000)])
    assert (draws.mean(0) - 0.5).abs().max() < 5 / math.sqrt(12 * 4000)


@each(*PAPER_TARGETS)
def test_the_papers_loss_is_a_weighted_loss_of_a_denoiser(process):
    """A network that returns the label of a denoiser D(m) in place of x has the loss weight(t)
    (dlabel/dx)^2 |D - x|^2: equal values and equal gradients, hence the same minimiser."""
    torch.manual_seed(0)
    seen = []
    x = normal(0, 16, 2)
    D = torch.nn.Linear(2 * process.n, 2).double()

    def labels(x, m, times):
        rows = zip(x.split(1), m.split(1), times.tolist(), strict=True)
        return torch.cat([paper_label(process, *row) for row in rows])

    net = recorder(lambda m, t: labels(D(m), m, t), seen)
    loss = page_of(process).loss(process, net, x)
    m, times, _ = seen[0]
    weight = (labels(x + 1, m, times) - labels(x, m, times)).detach().square()
    if isinstance(process, AGM):
        weight = (1 - times)[:, None] * weight
    expected = (weight * (D(m) - x).square()).mean()
    assert relative_difference(loss, expected) < 1e-7
    (found_gradient,) = torch.autograd.grad(loss, D.weight)
    (gradient,) = torch.autograd.grad(expected, D.weight)
    assert difference(found_gradient, gradient) < 1e-7 * float(gradient.abs().max())


# -------------------------------------------------------------------------------------------------
# 3. The denoiser


EVERY_TARGET = [AGM(), *ALL_ORDERS[:5], *PAPER_TARGETS]


@each(*EVERY_TARGET)
def test_denoise_with_a_perfect_network_is_the_posterior_mean(process):
    """By Bayes' rule in phase space. For target "data" this also proves that y tells all that m
    does, as the network sees no more."""
    net = NARROW.network(process)
    for t in [1e-5, 0.2, 0.5, 0.99] if isinstance(process, AGM) else [0.2, 0.6, 1.5, 4.0]:
        mean, _, L = exact_law(process, t)
        x = normal(0, 50, 1, 2)
        eps = normal(1, 50, process.n, 2)
        m = (mean[:, None] * x + L @ eps).flatten(1)
        found = page_of(process).denoise(process, net, m, t)
        assert difference(found, NARROW.given_state(process, m, t)) < 1e-6


def test_a_network_that_returns_zero_denoises_gaussian_data():
    """E[x | y] = y sd^2/(sd^2 + sigma^2), finite down to an SNR of 0."""
    snr = torch.tensor([0.0, 1e-12, 1e-2, 1.0, 1e4], dtype=F64)
    z = normal(0, 5, 20)
    D = agm_ref.denoise_y(AGM(sigma_data=0.7), lambda u, t, label: 0 * u, z, snr)
    y_over_sigma2 = snr.sqrt()[:, None] * z
    assert difference(D, y_over_sigma2 / (snr + 1 / 0.49)[:, None]) < 1e-12


@each(AGM(), HOLD(), HOLD(noise_mean=-2.0, noise_std=0.5), AGM(noise_mean=0.3, noise_std=2.0))
def test_training_noise_follows_noise_mean_and_noise_std(process):
    """To 5 standard errors or less: strata make them smaller."""
    torch.manual_seed(0)
    seen = []
    x = 0.5 * normal(0, 40_000, 1)
    page_of(process).loss(process, recorder(lambda u, time: u, seen), x)
    time = seen[0][1]
    log_sigma = torch.log(time / (1 - time))
    bound = 5 * process.noise_std / math.sqrt(40_000)
    assert abs(float(log_sigma.mean()) - process.noise_mean) < bound
    assert abs(float(log_sigma.std()) - process.noise_std) < bound


@each(AGM(sigma_data=0.7), HOLD(sigma_data=0.7))
def test_the_denoisers_loss_of_a_network_that_returns_zero_is_1(process):
    """Whatever the data of standard deviation sigma_data; five standard errors of .006."""
    torch.manual_seed(0)
    two_points = 0.7 * normal(0, 40_000, 1).sign()
    assert abs(loss_of_zero(process, two_points) - 1) < 0.03


@each(AGM(sigma_data=0.7), HOLD(sigma_data=0.7))
def test_the_posterior_mean_minimises_the_denoisers_loss(process):
    """What is added to the network of E[x | y] adds its mean square, .01, to the loss; .003 is five
    standard errors of the product of both."""
    best = Mixture([0.5, 0.5], [[-0.7], [0.7]], 1e-6).network(process)
    two_points = 0.7 * normal(0, 40_000, 1).sign()

    def loss(extra):
        def net(u, time, label):
            return best(u, time) + 0.1 * extra(u)

        torch.manual_seed(1)
        return float(page_of(process).loss(process, net, two_points))

    least = loss(torch.zeros_like)
    for extra in (torch.ones_like, torch.sign, lambda u: -u.sign()):
        assert abs(loss(extra) - least - 0.01) < 0.003


@each(*BOTH)
def test_predictions_are_kept_within_the_bound(process):
    m = normal(0, 50, 2 * process.n)
    denoise = page_of(process).denoise

    def net(u, t, label):
        return 3 * u[:, -2:]

    free = denoise(process, net, m, 0.5)
    kept = denoise(dataclasses.replace(process, bound=1.0), net, m, 0.5)
    assert free.abs().max() > 1
    assert difference(kept, free.clamp(-1, 1)) == 0


# -------------------------------------------------------------------------------------------------
# 4. Samplers

SAMPLER_CASES = [
    (process, name)
    for process in (AGM(), HOLD(order=1), HOLD())
    for name in page_of(process).SAMPLERS
]


def samplers_but(*left_out):
    cases = [case for case in SAMPLER_CASES if case[1] not in left_out]
    return pytest.mark.parametrize(("process", "name"), cases, ids=name_of)


every_sampler = samplers_but()


def run(process, name, predict, m, nfe, randn=torch.randn_like, **options):
    """Samples of a sampler by name; those of an ODE draw no noise."""
    if name not in ("ode", "exponential"):
        options["randn"] = randn
    return page_of(process).SAMPLERS[name](process, predict, m, nfe, **options)


@every_sampler
@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_samplers_call_predict_nfe_times_and_return_the_last_prediction(process, name, nfe):
    seen = []
    weight = torch.tensor(0.1, requires_grad=True)
    predict = recorder(lambda m, t: weight * m[:, :3], seen)
    for options in ({}, {"data_mean": 0.2}) if name == "ode" else ({},):
        seen.clear()
        x = run(process, name, predict, process.prior((2, 3, 4, 4)), nfe, **options)
        assert len(seen) == nfe
        assert x is seen[-1][2]
        assert not x.requires_grad
        assert x.dtype == torch.float32


@each(*EVERY_TARGET)
def test_a_network_is_asked_with_its_label_and_a_time_for_each_sample(process):
    def net(u, t, label):
        assert label == "a"
        assert t.shape == (2,)
        assert t.dtype == u.dtype == torch.float32
        return u[:, :3]

    m = process.prior((2, 3, 4, 4))
    page_of(process).denoise(process, net, m, 0.7, label="a")
    page_of(process).loss(process, net, m[:, :3], label="a")


@samplers_but("strang")  # which says that it does not
def test_samplers_go_on_from_what_predict_changed_in_place(process, name):
    """From two starts, the second call writes the same state: the third call sees the same."""

    def third_state(seed):
        seen = []

        def predict(m, t):
            seen.append(m.clone())
            if len(seen) == 2:
                m.fill_(0.7)
            return torch.full_like(m[:, :2], 0.3)

        options = {"multistep": 1} if name == "exponential" else {}
        run(process, name, predict, prior(process, 3, 2, seed), 4, torch.zeros_like, **options)
        return seen[2]

    assert difference(third_state(1), third_state(2)) == 0


@every_sampler
def test_a_sample_does_not_depend_on_its_shape_its_batch_or_its_dtype(process, name):
    """Noise is off, as it would have to be the same for each sample."""
    predict = partial(page_of(process).denoise, process, lambda u, t, label: torch.sin(u) / 9)

    def samples(m):
        return run(process, name, predict, m, 6, torch.zeros_like)

    m = normal(0, 5, process.n * 3, 2, 4)
    x = samples(m)
    single = samples(m.float())
    assert x.dtype == F64
    assert single.dtype == torch.float32
    assert difference(samples(m.view(5, -1)), x.view(5, 24)) < 1e-11
    assert difference(samples(m[3:4]), x[3:4]) < 1e-11
    assert difference(single, x) < 1e-3


@each(AGM(), HOLD())
def test_data_mean_is_a_number_or_one_for_each_channel_or_pixel(process):
    page = page_of(process)
    predict = partial(page.denoise, process, lambda u, t, label: u / 9)
    m = normal(0, 5, process.n * 3, 2, 4)
    x = page.ode(process, predict, m, 6, data_mean=0.2)
    for shape in ((3, 1, 1), (5, 3, 2, 4)):
        same = page.ode(process, predict, m, 6, data_mean=torch.full(shape, 0.2))
        assert difference(same, x) < 1e-6


def test_a_data_mean_of_a_wrong_shape_is_refused():
    with pytest.raises(RuntimeError, match="expand"):
        agm_ref.ode(AGM(), None, prior(AGM(), 5, 2), 6, data_mean=torch.zeros(7))


# Times


def times_asked(process, name, nfe, D=2, **options):
    """The times at which a sampler calls predict, for points of D dimensions."""
    seen = []
    predict = recorder(lambda m, t: m[:, :D], seen)
    run(process, name, predict, prior(process, 3, D), nfe, **options)
    times = [t for _, t, _ in seen]
    assert all(type(t) is float for t in times)
    return times


@each(AGM(), AGM(sigma_data=0.2), *ALL_ORDERS)
@pytest.mark.parametrize("data_mean", [None, 0.0])
def test_ode_asks_at_times_even_in_its_clock(process, data_mean):
    """lambda = log(1 + R sqrt(SNR)), R = sigma_data sqrt(2 D), from `first` to noise 1/(3 nfe).
    With a data_mean the time `first` is not asked at."""
    D = 50
    for nfe in (3, 20):
        times = times_asked(process, "ode", nfe, D, data_mean=data_mean)
        if data_mean is not None:
            times = [process.first, *times]
        root_snr = process.snr(torch.tensor(times, dtype=F64)).sqrt()
        clock = torch.log1p(process.sigma_data * math.sqrt(2 * D) * root_snr)
        even = torch.linspace(float(clock[0]), float(clock[-1]), len(times), dtype=F64)
        assert times[0] == process.first
        assert difference(clock, even) < 1e-3  # the knots' error
        noise = min(1, 2 * process.sigma_data) / (3 * nfe)
        assert 1 / float(root_snr[-1]) == pytest.approx(noise, rel=1e-3)


def test_a_single_call_of_ode_is_at_first():
    """Also with a data_mean, whose first step is then not free."""
    assert times_asked(AGM(), "ode", 1, data_mean=0.0) == [AGM().first]


@each(AGM(), HOLD())
def test_ode_asks_at_the_times_that_are_given(process):
    times = (process.first, 0.6, process.last)
    assert times_asked(process, "ode", 3, ts=times) == list(times)
    assert times_asked(process, "ode", 2, ts=times, data_mean=0.0) == list(times[1:])


@each(AGM(), HOLD())
def test_the_mean_of_the_docstring_is_that_of_the_process(process):
    t, mu = re.search(r"t = (\S+), mu = \((.*?)\)", page_of(process).__doc__).groups()
    numbers = [float(number) for number in mu.split(",")]
    assert difference(numbers, process.mean(float(t))) < 6e-4  # half of the last digit


@each(AGM(), HOLD())
def test_the_five_calls_of_the_docstring_are_those_of_ode(process):
    table = page_of(process).__doc__.split("`ode` visits\n\n")[1]
    rows = {}
    for line in table.splitlines()[:3]:
        name, *numbers = line.split()
        rows[name] = [float(number) for number in numbers]
    times = [process.first, *times_asked(process, "ode", 5, data_mean=0.0)]
    times = torch.tensor(times, dtype=F64)
    assert difference(rows["t"], times) < 6e-4  # half of the last digit
    assert difference(rows["mu_q"], process.mean(times)[:, 0]) < 6e-4
    assert relative_difference(rows["sigma"], process.snr(times) ** -0.5) < 0.01


@pytest.mark.parametrize("name", ["em", "exponential"])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_em_and_exponential_of_agm_ask_at_times_even_in_a_power(name, rho):
    """The last 1.5 average steps before the data, where t_end is not given."""
    for t_end, end in ((0.8, 0.8), (None, 1 - 1.5 / 8)):
        even = np.linspace(1e-5 ** (1 / rho), end ** (1 / rho), 8)
        times = times_asked(AGM(), name, 8, rho=rho, t_end=t_end)
        assert difference(times, even**rho) < 1e-12


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_splitting_of_agm_asks_in_the_middle_of_steps_even_in_a_power(rho):
    for t_end, end in ((0.8, 0.8), (None, 0.999)):
        nodes = np.linspace(1e-5 ** (1 / rho), end ** (1 / rho), 9) ** rho
        times = times_asked(AGM(), "splitting", 8, rho=rho, t_end=t_end)
        assert difference(times, (nodes[1:] + nodes[:-1]) / 2) < 1e-12


@pytest.mark.parametrize("name", ["em", "lie", "strang"])
@pytest.mark.parametrize("t_end", [None, 0.7])
def test_holds_own_samplers_ask_at_times_even_in_log_1_plus_10_root_snr(name, t_end):
    """`em` at the nodes, `lie` at the ends of its steps, `strang` in their middle."""
    process = HOLD()
    end = t_end or process.time_of_snr((3 * 8) ** 2)
    number = 8 if name == "em" else 9
    nodes = np.array(hold_ref.times(process, number, float(end), 10.0))
    expected = {"em": nodes, "lie": nodes[1:], "strang": (nodes[1:] + nodes[:-1]) / 2}
    assert difference(times_asked(process, name, 8, t_end=t_end), expected[name]) < 1e-12


# The laws of samples


def assert_law_of_narrow(x):
    """Samples x (B, 2) have NARROW's weights and modes: shares and centres to four standard errors
    of Monte Carlo; widths to 7 %, as the last prediction is a little narrower than data."""
    mode = torch.cdist(x, NARROW.centres).argmin(1)
    for j, weight in enumerate(NARROW.weights):
        gap = x[mode == j] - NARROW.centres[j]
        share = len(gap) / len(x)
        assert abs(share - weight) < 4 * (weight * (1 - weight) / len(x)).sqrt()
        assert gap.mean(0).abs().max() < 4 * NARROW.std / math.sqrt(len(gap))
        assert abs(gap.std() / NARROW.std - 1) < 0.07


REACH = [
    (AGM(), "em", 100),
    (AGM(), "splitting", 100),
    (AGM(), "exponential", 40),
    (AGM(), "ode", 40),
    (HOLD(order=1), "ode", 40),
    (HOLD(order=2, var=0.5), "strang", 60),
    (HOLD(order=2, var=0.5), "lie", 100),
    (HOLD(), "em", 200),
    (HOLD(), "ode", 40),
]


@pytest.mark.parametrize(("process", "name", "nfe"), REACH, ids=name_of)
def test_samples_have_the_law_of_the_data(process, name, nfe):
    torch.manual_seed(0)
    options = {"data_mean": NARROW.mean} if name == "ode" else {}
    m = prior(process, 10_000, 2, seed=3)
    assert_law_of_narrow(run(process, name, NARROW.predictor(process), m, nfe, **options))


def flow_matching(page):
    """The class FlowMatching that stands in the page's comment as an example."""
    source = inspect.getsource(page)
    example = source.split("# gets the denoiser and `ode` for it.")[1].split("# A process")[0]
    code = example[example.index("#     class") :].replace("#", "")
    names = dict(vars(page))
    exec(textwrap.dedent(code), names)
    return names["FlowMatching"]


@pytest.mark.parametrize("page", [agm_ref, hold_ref])
def test_the_pages_example_flow_matching_is_run_by_ode(page):
    process = flow_matching(page)(sigma_data=0.7)
    m = prior(process, 10_000, 2, seed=3)
    predict = partial(page.denoise, process, NARROW.network(process))
    assert_law_of_narrow(page.ode(process, predict, m, 40, data_mean=NARROW.mean))


@dataclasses.dataclass(frozen=True)
class Cosine(agm_ref.Process):
    """A cosine schedule, with a parameter."""

    turn: float = 1.0
    n = 1
    first = 1e-4
    last = 0.99
    prior_cov = torch.ones(1, 1, dtype=F64)

    def angle(self, t):
        return torch.as_tensor(t, dtype=F64) ** self.turn * math.pi / 2

    def mean(self, t):
        return self.angle(t).sin()[..., None]

    def cholesky(self, t):
        return self.angle(t).cos()[..., None, None]


@each(Cosine(), Cosine(turn=2.0))
def test_a_process_of_your_own_is_run_by_ode(process):
    m = prior(process, 10_000, 2, seed=3)
    x = agm_ref.ode(process, NARROW.predictor(process), m, 40, data_mean=NARROW.mean)
    assert_law_of_narrow(x)


def law_of_gaussian_samples(process, name, nfe, **options):
    """Mean and variance of the samples for data N(.5, .6^2), without Monte Carlo error; and the
    variance of E[x | y] at the last call, which they should have.

    For Gaussian data a sampler is affine in its start and in each number of noise that it draws. In
    row 0 of the batch all of these are at their mean, so it ends in the mean of the samples. In
    each further row one of them is one standard deviation higher. What that moves the sample by,
    squared and summed over the rows, is the variance.
    """
    n = process.n
    mean, cov, _ = exact_law(process, process.first)
    factor = torch.linalg.cholesky(cov + 0.36 * torch.outer(mean, mean))
    m = (0.5 * mean).repeat(1 + n + 2 * n * nfe, 1)
    m[1 : 1 + n] += factor.T
    used = 1 + n

    def noise_in_rows_of_its_own(x):
        nonlocal used
        noise = torch.zeros_like(x)
        for column in range(x.shape[1]):
            noise[used, column] = 1
            used += 1
        return noise

    seen = []
    predict = recorder(Mixture([1.0], [[0.5]], 0.6).predictor(process), seen)
    x = run(process, name, predict, m, nfe, noise_in_rows_of_its_own, **options)[:, 0]
    sigma2 = 1 / float(process.snr(seen[-1][1]))
    variance = float((x - x[0]).square().sum())
    return float(x[0]), variance, 0.36**2 / (0.36 + sigma2)


WEAK_ORDERS = [(AGM(), "em", 1), (AGM(), "splitting", 1), (HOLD(order=2, var=0.8), "em", 1)]
WEAK_ORDERS += [(HOLD(order=n, var=0.8), "lie", 1) for n in (1, 2, 3)]
WEAK_ORDERS += [(HOLD(order=n, var=0.8), "strang", 2) for n in (1, 2, 3)]


@pytest.mark.parametrize(("process", "name", "order"), WEAK_ORDERS, ids=name_of)
def test_samplers_of_sdes_converge_in_law_with_their_order(process, name, order):
    """Twice the calls divide the error of the variance by 2^order, to a factor of 2^.3."""
    t_end = 0.9 if isinstance(process, AGM) else time_of_noise(process, 0.1)
    errors = []
    for nfe in (80, 160):
        mean, variance, expected = law_of_gaussian_samples(process, name, nfe, t_end=t_end)
        errors.append(abs(variance - expected))
    assert abs(mean - 0.5) < 0.02
    assert errors[1] < 0.02
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3


# Single steps


@pytest.mark.parametrize(("t", "h"), [(1e-5, 0.5), (0.3, 0.01), (0.9, 0.05), (0.998, 1e-3)])
def test_free_noise_of_agm_has_the_covariance_of_the_integral(t, h):
    """int (h - u, 1) (h - u, 1)^T p^2 (tau - u)^2 du over the step, a polynomial in h."""
    process = AGM(p=2.0)
    tau = 1 - t
    vv = tau**2 * h - tau * h**2 + h**3 / 3
    qv = tau**2 * h**2 / 2 - tau * h**3 / 3 + h**4 / 12
    qq = tau**2 * h**3 / 3 - tau * h**4 / 6 + h**5 / 30
    L = agm_ref.free_noise(process, t, h)
    assert relative_difference(L @ L.T / 4, [[qq, qv], [qv, vv]]) < 1e-7  # vv cancels at t + h = 1


def test_splitting_moves_freely_between_its_kicks():
    """Where x_hat is such that the acceleration is 0, up to the second call."""
    seen = []
    predict = recorder(lambda m, t: agm_ref.hop(AGM_SDE, 0.0, m, t), seen)
    m = prior(AGM(), 5, 2)
    agm_ref.splitting(AGM(), predict, m, 2, t_end=0.8, randn=torch.ones_like)
    for t, t_next in pairwise([AGM().first, seen[0][1], 0.4 + AGM().first / 2, seen[1][1]]):
        m = agm_ref.free_motion(AGM(), m, t, t_next - t, torch.ones_like)
    assert difference(seen[1][0], m) < 1e-9


@each(*(HOLD(order=n, var=0.8) for n in range(1, 9)), CUSTOM)
@pytest.mark.parametrize("h", [1e-2, 0.3, 2.0])
def test_linear_step_of_hold_is_exact(process, h):
    """exp(G^T h), and the factor of var (I - E E^T), which has digits in 100 digits only."""
    with localcontext() as context:
        context.prec = 100
        E = decimal_transition(process, Decimal(h)).T
        cov = Decimal(process.var) * (decimal_eye(process.n) - E @ E.T)
        L = to_float64(decimal_cholesky(cov))
    found_E, found_L = hold_ref.linear_step(process, h)
    row_sizes = L.norm(dim=1, keepdim=True)
    assert difference(found_E, to_float64(E)) < 1e-10
    assert difference(found_L / row_sizes, L / row_sizes) < 1e-8


def test_lie_kicks_at_the_end_of_its_step():
    process = HOLD()
    seen = []
    predict = recorder(lambda m, t: m[:, :2], seen)
    hold_ref.lie(process, predict, prior(process, 5, 2), 2, randn=torch.zeros_like)
    (m, t, x), (m_next, t_next, _) = seen
    kicked = hold_ref.mix(hold_ref.kick(process, t, process.first - t), torch.cat([m, x], 1))
    expected = hold_ref.linear_flow(process, kicked, t - t_next, torch.zeros_like)
    assert difference(m_next, expected) < 1e-12


def test_linear_step_refuses_what_its_nodes_do_not_resolve():
    stiff = HOLD(order=2, gamma=(1.0,), xi=50.0, first=400.0)
    with pytest.raises(ValueError, match="take more calls"):
        hold_ref.linear_step(stiff, 400.0)


@each(*ALL_ORDERS[:5], CUSTOM)
@pytest.mark.parametrize("t", [0.7, 3.0])
def test_kick_is_the_force_integrated(process, t):
    """dm_n = 2 xi f dt, f = m_n + var grad_n log p(m | x), with t and x frozen: Runge and Kutta."""
    h = 0.05
    x = normal(0, 4, 1)
    start = normal(1, 4, process.n)

    def rate(s, m):
        f = m[:, -1:] + process.var * score(process, x, m, t)[:, -1:]
        return torch.cat([0 * m[:, 1:], 2 * process.damping[1] * f], 1).detach()

    m = start
    for _ in range(200):
        m = rk4(rate, 0.0, m, h / 200)
    found = hold_ref.mix(hold_ref.kick(process, t, h), torch.cat([start, x], 1))
    assert difference(found, m) < 1e-7


# `ode`


def ode_in_z(process, predict, m, times, x=None):
    """`ode` in z = L^-1 m: a step adds kappa' - kappa times the mean of x_hat over the step. The
    mean of a line in lambda is at c = int l e^l dl / int e^l dl, by quadrature. x: the first
    prediction, None to ask for it."""
    D = m.shape[1] // process.n
    R = process.sigma_data * math.sqrt(2 * D)
    kappa = white_mean(process, torch.tensor(times, dtype=F64))
    clock = torch.log1p(R * kappa.norm(dim=1)).tolist()
    nodes, weights = np.polynomial.legendre.leggauss(20)
    z = whitened(process, m, times[0])
    if x is None:
        x = predict(m, times[0])
    slope = 0.0
    for i in range(1, len(times)):
        h = clock[i] - clock[i - 1]
        l = h / 2 * (1 + nodes)
        c = float((weights * l * np.exp(l)).sum() / (weights * np.exp(l)).sum())
        step = (kappa[i] - kappa[i - 1])[:, None]
        x_mean = (x + c * slope).expand(len(m), D)
        z = z + step * x_mean[:, None]
        x_next = predict((process.cholesky(times[i]) @ z).flatten(1), times[i])
        if i < len(times) - 1:
            # the step again, now that its slope is known
            shift = x + c * (x_next - x) / h - x_mean
            z = z + step * shift[:, None]
            # Gaussian data: E[x | z] = kappa . z/(1/sigma_data^2 + SNR)
            gain = kappa[i] / (process.sigma_data**-2 + kappa[i] @ kappa[i])
            x_next = x_next + (gain @ step) * shift
        slope = (x_next - x) / h
        x = x_next
    return x


@each(AGM(), *ALL_ORDERS)
@pytest.mark.parametrize("nfe", [2, 5, 20])
def test_ode_is_the_step_in_z(process, nfe):
    page = page_of(process)
    m = prior(process, 50, 2)
    predict = SMOOTH.predictor(process)
    for data_mean in (None, SMOOTH.mean):
        number = nfe + (data_mean is not None)
        times = page.times(process, number, page.end_time(process, nfe), 2 * process.sigma_data)
        expected = ode_in_z(process, predict, m, times, data_mean)
        x = page.ode(process, predict, m, nfe, data_mean=data_mean)
        assert difference(x, expected) < 1e-8
        small = page.ode(process, predict, m.float(), nfe, data_mean=data_mean)
        assert difference(small, x) < 1e-3


@lru_cache(None)
def end_of_the_flow(process, t_end):
    """E[x | m] at t_end for states on dz = E[x | y] dkappa, by Runge and Kutta."""

    def rate(t, z):
        d = 1e-4 * t
        kappa_rate = (white_mean(process, t + d) - white_mean(process, t - d)) / (2 * d)
        kappa = white_mean(process, t)
        snr = kappa @ kappa
        x = SMOOTH.given_y(kappa @ z / snr, snr**-0.5)
        return kappa_rate[:, None] * x[:, None]

    z = whitened(process, prior(process, 100, 2), process.first)
    spaced = np.linspace if isinstance(process, AGM) else np.geomspace
    for t, t_next in pairwise(spaced(process.first, t_end, 200).tolist()):
        z = rk4(rate, t, z, t_next - t)
    return SMOOTH.predictor(process)((process.cholesky(t_end) @ z).flatten(1), t_end)


# from T = 14 on, as the free first step leaves an error of the size of sqrt(SNR(T))
FLOWS = [HOLD(order=n, first=14.0) for n in (1, 2, 3, 4)] + [AGM()]


@lru_cache(None)
def distance_to_the_flow(process, nfe, data_mean):
    """Root mean square distance of samples of nfe calls to the end of the flow."""
    page = page_of(process)
    t_end = time_of_noise(process, 0.1)
    number = nfe + (data_mean is not None)
    times = page.times(process, number, t_end, 2 * process.sigma_data)
    m = prior(process, 100, 2)
    x = page.ode(process, SMOOTH.predictor(process), m, nfe, data_mean=data_mean, ts=times)
    return float((x - end_of_the_flow(process, t_end)).square().mean().sqrt())


@each(*FLOWS)
def test_ode_is_of_second_order(process):
    for data_mean in (None, SMOOTH.mean):
        coarse = distance_to_the_flow(process, 60, data_mean)
        fine = distance_to_the_flow(process, 120, data_mean)
        assert abs(math.log2(coarse / fine) - 2) < 0.3


def test_ode_of_order_1_is_ddim():
    """m' = alpha' x + s' (m - alpha x)/s, where x does not depend on m: no slope, no corrector."""
    process = HOLD(order=1)
    x = torch.tensor([[0.4, -0.3]], dtype=F64).expand(20, 2)
    seen = []
    m = prior(process, 20, 2)
    hold_ref.ode(process, recorder(lambda m, t: x, seen), m, 10)
    for (_, t, _), (m_next, t_next, _) in pairwise(seen):
        alpha = math.exp(-t)
        alpha_next = math.exp(-t_next)
        eps = (m - alpha * x) / math.sqrt(1 - alpha**2)
        m = alpha_next * x + math.sqrt(1 - alpha_next**2) * eps
        assert difference(m_next, m) < 1e-9


# `exponential`


@pytest.mark.parametrize("power", [0, 1, 2])
def test_adams_weights_are_exact_for_a_network_that_is_a_polynomial_in_time(power):
    """For F = |r(t)| t^power at three calls: v gains int F du, q gains int (t_next - u) F du."""
    past = (0.2, 0.3, 0.45)
    t_next = 0.6

    def F(t):
        return agm_ref.noise_part(AGM(), t, sde=False).norm(dim=-1) * t**power

    weights = agm_ref.adams_weights(AGM(), past, past[-1], t_next)
    found = weights[:, 2:] @ F(torch.tensor(past, dtype=F64))
    du = (t_next - past[-1]) / 1000
    u = past[-1] + du * (torch.arange(1000) + 0.5)
    expected = torch.stack([(t_next - u) * F(u), F(u)]).sum(1) * du
    assert difference(found, expected) < 1e-5  # the midpoint rule's


@lru_cache(None)
def end_of_agms_probability_flow(t_end):
    """E[x | m] at t_end of q' = v, v' = E[F | m] for GAUSSIAN: F is affine in x, so E[F | m] is F
    at E[x | m]."""

    def rate(t, m):
        F = paper_target(AGM_ODE, GAUSSIAN.given_state(AGM_ODE, m, t), m, t)
        return torch.cat([m[:, 2:], F.detach()], 1)

    m = prior(AGM(), 64, 2)
    start = AGM().first
    h = (t_end - start) / 100
    for i in range(100):
        m = rk4(rate, start + i * h, m, h)
    return GAUSSIAN.given_state(AGM(), m, t_end)


def error_of_exponential(multistep, nfe, rho):
    predict = GAUSSIAN.predictor(AGM())
    m = prior(AGM(), 64, 2)
    x = agm_ref.exponential(AGM(), predict, m, nfe, multistep=multistep, rho=rho, t_end=0.8)
    return difference(x, end_of_agms_probability_flow(0.8))


EXPONENTIAL_ORDERS = [(1, 1.0, 1), (2, 1.0, 2), (3, 1.0, 2), (2, 2.0, 2), (3, 2.0, 3)]


@pytest.mark.parametrize(("multistep", "rho", "order"), EXPONENTIAL_ORDERS)
def test_exponential_converges_with_its_order(multistep, rho, order):
    """That of its multistep at rho 2, where its first step, of order 1, is short; at rho 1 that
    step keeps it at order 2."""
    ratio = error_of_exponential(multistep, 40, rho) / error_of_exponential(multistep, 80, rho)
    assert abs(math.log2(ratio) - order) < 0.35


# -------------------------------------------------------------------------------------------------
# 5. Mistakes in use

WRONG_PROCESSES = [
    (AGM, {"p": math.nan}, "p > 0"),
    (AGM, {"k": -1.0}, r"\|k\| < 1"),
    (AGM, {"last": 1.0}, "last < 1"),
    (AGM, {"target": "noise"}, "data or ode or sde, got noise"),
    (AGM, {"sigma_data": 0.099}, "sigma_data from .1 to 5: rescale"),
    (HOLD, {"sigma_data": 5.01}, "sigma_data from .1 to 5: rescale"),
    (HOLD, {"bound": 0.0}, "bound > 0"),
    (HOLD, {"target": "ode"}, "data or noise, got ode"),
    (HOLD, {"order": 2.5}, "integer from 1 to 8, got 2.5"),
    (HOLD, {"gamma": (1.0, 2.0)}, "give both gamma and xi"),
    (HOLD, {"gamma": (1.0,), "xi": 2.0}, "tuple of 2 speeds"),
    (HOLD, {"gamma": [1.0, 2.0], "xi": 2.0}, "tuple of 2 speeds"),
    (HOLD, {"gamma": (1.0, -2.0), "xi": 2.0}, "must be > 0"),
    (HOLD, {"first": 2.0}, r"SNR\(T\) < .01 .*, got .* at T = 2.0"),
    (HOLD, {"first": 1000.0}, r"0 < sigma_data\^2 SNR\(T\) .*, got 0 at T = 1000"),
]


@pytest.mark.parametrize(("make", "options", "words"), WRONG_PROCESSES, ids=str)
def test_a_wrong_constant_is_refused_in_one_line(make, options, words):
    with pytest.raises(ValueError, match=rf"\A.*{words}.*\Z"):  # "." is no line break
        make(**options)


@every_sampler
def test_no_sampler_takes_no_calls(process, name):
    with pytest.raises(ValueError, match=r"\Anfe .* must be at least 1, got 0\Z"):
        run(process, name, None, prior(process, 5, 2), 0)


@samplers_but("ode")  # which takes times, no end
def test_an_end_outside_of_the_process_is_refused(process, name):
    for t_end in (process.first, 7.0, -0.5, math.nan):
        with pytest.raises(ValueError, match=r"\At_end must be from .*\Z"):
            run(process, name, None, prior(process, 5, 2), 5, t_end=t_end)


@pytest.mark.parametrize("multistep", [0, 5])
def test_multistep_is_from_1_to_4(multistep):
    with pytest.raises(ValueError, match="multistep must be 1, 2, 3 or 4"):
        agm_ref.exponential(AGM(), None, None, 5, multistep=multistep)


@each(*BOTH)
@pytest.mark.parametrize("x", [torch.zeros(5), torch.zeros(5, 2, dtype=torch.int64)], ids=str)
def test_data_that_no_network_takes_are_refused(process, x):
    with pytest.raises(ValueError, match=r"\Adata are floats .* got torch.* \(5,.*\)\Z"):
        page_of(process).loss(process, lambda m, t, label: m, x)


@each(*BOTH)
def test_float64_data_on_a_float32_network_are_refused_in_one_line(process):
    """Also where the network is a function around a module."""
    linear = torch.nn.Linear(2 if process.target == "data" else 2 * process.n, 2)
    with pytest.raises(ValueError, match=r"\Athe network fails on torch.float64: .*float\(\)\Z"):
        page_of(process).loss(process, lambda m, t, label: linear(m), normal(0, 8, 2) / 2)


@each(*BOTH)
def test_an_error_of_the_network_itself_stays_as_it_is(process):
    linear = torch.nn.Linear(17, 2)
    with pytest.raises(RuntimeError, match="shapes"):
        page_of(process).loss(process, lambda m, t, label: linear(m), torch.randn(8, 2) / 2)


@each(*BOTH)
@pytest.mark.parametrize("wrong", [(5, 1, 4, 4), (5, 3, 1, 1), (1, 3, 4, 4), (5,)], ids=str)
def test_a_network_that_returns_another_shape_is_refused(process, wrong):
    """It would broadcast."""
    words = re.escape(f"the network returns {wrong} for data (5, 3, 4, 4)")

    def net(m, t, label):
        return torch.zeros(wrong)

    with pytest.raises(ValueError, match=words):
        page_of(process).loss(process, net, torch.randn(5, 3, 4, 4) / 2)


@each(*BOTH)
@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_data_of_another_scale_give_a_warning(process, factor):
    with pytest.warns(UserWarning, match="scale of sigma_data"):
        loss_of_zero(process, factor * process.sigma_data * normal(0, 500, 2))


@each(*BOTH)
def test_data_within_a_finite_bound_or_three_times_off_give_no_warning(process):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of_zero(dataclasses.replace(process, bound=1.0), 0.01 * normal(0, 500, 2))
        loss_of_zero(process, 3 * process.sigma_data * normal(0, 500, 2))


# -------------------------------------------------------------------------------------------------
# 6. The two pages


def test_the_data_are_at_time_1_of_agm_and_at_time_0_of_hold():
    assert AGM().data_time == 1.0
    assert HOLD().data_time == 0.0


# what has the same name on both pages, but differs
OWN = {"affine", "hop", "training_pair", "loss", "denoise", "em"}


def definitions(page):
    """The functions and classes of a page, in their order."""
    return [node.name for node in ast.parse(inspect.getsource(page)).body if hasattr(node, "name")]


def test_what_both_pages_share_stands_in_both_word_for_word_and_in_order():
    agm_names = definitions(agm_ref)
    hold_names = definitions(hold_ref)
    shared = [name for name in agm_names if name in hold_names]
    assert shared == [name for name in hold_names if name in agm_names]
    assert {"Process", "mix", "denoise_y", "ode"} < set(shared)
    for name in shared:
        if name not in OWN:
            in_agm = inspect.getsource(getattr(agm_ref, name))
            assert in_agm == inspect.getsource(getattr(hold_ref, name)), name


def beginning(page):
    """From the imports to section 1."""
    source = inspect.getsource(page)
    return source[source.index("import math") : source.index("# 1. The process")]


def test_both_pages_begin_with_the_same_code_and_comments():
    assert beginning(agm_ref) == beginning(hold_ref)


@pytest.mark.parametrize("page", [agm_ref, hold_ref])
def test_samplers_are_called_alike_and_ode_is_the_first(page):
    assert next(iter(page.SAMPLERS)) == "ode"
    for sampler in page.SAMPLERS.values():
        parameters = list(inspect.signature(sampler).parameters)
        assert parameters[:4] == ["process", "predict", "m", "nfe"]


@pytest.mark.parametrize("page", [agm_ref, hold_ref])
def test_a_page_needs_no_other_file_of_the_project(page):
    pattern = r"^ *(?:import|from) (\w+)(?: as \w+| import .*)?$"
    imported = set(re.findall(pattern, inspect.getsource(page), re.M))
    standard = {"dataclasses", "functools", "itertools", "math", "typing", "warnings"}
    assert imported == standard | {"numpy", "torch"}
