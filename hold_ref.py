"""HOLD, high-order Langevin dynamics, in one file: process -> target and loss -> denoiser -> samplers -> likelihood.

"Generative Modelling with High-Order Langevin Dynamics", Shi & Liu, 2024, arXiv 2404.12814. The authors published no
code: the defaults are ours. Order n = 1 is the OU (VP) process, 2 is critically damped Langevin (CLD), 3 is HOLD.

1. The process. The data q drive a chain of auxiliary blocks, m = (q, p, s, ...); noise enters the last block only:

    dm = F m dt + sqrt(2 xi L_inv) e_n dW,    F = sum_i gamma_i (E_{i,i+1} - E_{i+1,i}) - xi E_{nn}
    from m = (x, N(0, alpha L_inv), ...) at t = 0 to N(0, L_inv I) at T, stationary as F + F^T = -2 xi E_{nn}

E_ij is the matrix with a 1 at (i, j); it acts on the blocks, as all dimensions of the data behave alike.
Critical damping, the default: gamma and xi for which all eigenvalues of F are lam = -sqrt(2n - 3) (n = 1: -1). Then
(F - lam I)^n = 0, and exp(F t) = e^{lam t} sum_{k<n} (F - lam I)^k t^k / k! is a finite sum.
Given x the state is Gaussian: m = mean x + L eps, eps ~ N(0, I), with mean = exp(F t) e_1 and, as L_inv I is
stationary, L L^T = L_inv I + exp(F t) (S0 - L_inv I) exp(F t)^T, S0 = cov(0).

2. The paper's target is eps_n, the noise of the last block (BCSM): the reverse SDE needs the score of that block only,
and it is -eps_n / L_nn. Regression on m gives E[eps_n | m], and as eps_n = w . m - kappa_n x this is a prediction of x,
and back.

3. A denoiser will do, and is the default. y = mean^T cov^-1 m / SNR, SNR = mean^T cov^-1 mean, is a sufficient
statistic: m depends on x only through it. It is x + sigma noise, sigma = SNR^-1/2, so E[x | m] = E[x | y]: one network
serves every process.

4. Samplers, t falling. Reversed, the drift F m becomes -F m + 2 xi L_inv e_n grad_n log p, and -F = F^T + 2 xi E_{nn}:

    SDE    dm = (F^T m + 2 xi e_n f) |dt| + sqrt(2 xi L_inv) e_n dW,    f = m_n + L_inv grad_n log p(m)
    ODE    dz = E[x | m] dkappa    in    z = L^-1 m = kappa x + eps: given x the noise eps stands still

The ODE has the SDE's marginals. For n = 1 it is the probability flow; for n > 1 there eps turns with time, and here it
stands still, so that the same start ends at another sample.

    symbol     here           shape         meaning
    m          m              (B, nC, ...)  state cat(q, p, ...); x (B, C, ...): images in [-1, 1], points of scale 1
    gamma, xi  damping        (n - 1,), ()  rotation speeds, friction
    L_inv      HOLD.L_inv     ()            prior variance of every block; alpha L_inv: of the auxiliaries at t = 0
    F          drift()        (n, n)        drift matrix; transition(t) is exp(F t)
    mu         mean(t)        (..., n)      mean of the blocks per unit of x
    Sigma, L   cov, cholesky  (..., n, n)   covariance of the blocks given x, and its lower factor
    kappa      kappa(t)       (..., n)      L^-1 mean; |kappa|^2 is the SNR
    lambda     clock(t, R)    (...)         log(1 + R sqrt(SNR)), in which the paper's times and all steps are even
    eps_theta  net            (B, C, ...)   param = "paper": net(m, t, label), t of shape (B,)
    D          precondition   (B, C, ...)   param = "denoiser": E[x | y] from net(c_in y, c_noise, label)

Coefficients are float64 on the CPU, F64; `mix` and `each` alone bring them to the dtype and the device of the state.
"""

import math
import operator
import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from itertools import pairwise
from typing import ClassVar

import torch
from torch.nn.functional import pad

F64 = {"dtype": torch.float64, "device": "cpu"}

# ---------------------------------------------------------------------------------------------------------------------
# 1. The process


def by_time(f):
    """f(process, t, ...) that keeps its results for times given as floats, as samplers ask for the same ones in every
    batch: do not change them in place. They come from outside of inference mode, so that autograd can use them, too."""
    kept = lru_cache(4096)(torch.inference_mode(False)(f))
    return wraps(f)(lambda process, t, *args, **kw: (kept if isinstance(t, float) else f)(process, t, *args, **kw))


@dataclass(frozen=True)
class HOLD:
    """The forward process; HOLD() has order 3 at critical damping. Times are numbers or tensors of any shape, >= 0.

    snr_max: sampling and the paper's training stop at noise of std .005 on the data, less than an 8-bit grey level,
    2/255; the last prediction removes it. From there on `cholesky` has errors below 1e-11, up to order 7 below 1e-12.
    """

    order: int = 3  # n, blocks of the state, 1 to 8
    gamma: tuple | None = None  # n - 1 rotation speeds, > 0; None: critical damping
    xi: float | None = None  # friction, > 0; None: critical damping
    L_inv: float = 1.0  # prior variance of every block, > 0
    alpha: float = 0.04  # the auxiliary blocks start with variance alpha L_inv, > 0
    T: float = 6.0  # first time of every sampler, last of the paper's training; SNR(T) < 1e-3 at critical damping
    snr_max: float = 4e4  # SNR at t_min, last time of every sampler and first of the paper's training
    bound: float = math.inf  # largest |x| of the data (images: 1); data predictions are kept within it
    param: str = "denoiser"  # what the network learns: x from y, or eps_n from m ("paper")
    sigma_data: float = 0.5  # standard deviation of the data
    R: ClassVar[float] = 10.0  # of the clock that an eps-network is trained in, and the SDE samplers step in
    t_data: ClassVar[float] = 0.0  # the time of the data

    def __post_init__(self):
        if isinstance(self.order, bool) or not hasattr(self.order, "__index__") or not 1 <= self.order <= 8:
            raise ValueError(f"order counts blocks of the state and must be an integer from 1 to 8, got {self.order}")
        gamma, xi = self.damping
        if not isinstance(self.gamma, tuple | None) or len(gamma) != self.n - 1:
            raise ValueError(f"order {self.n} wants a tuple of {self.n - 1} gammas (None: critical), got {self.gamma}")
        if not all(0 < v < math.inf for v in (*gamma, xi, self.L_inv, self.alpha, self.T, self.snr_max)):
            raise ValueError(f"HOLD wants gamma, xi, L_inv, alpha, T and snr_max positive and finite, got {self}")
        if not (self.bound > 0 and 0 < self.sigma_data < math.inf and self.param in ("paper", "denoiser")):
            raise ValueError(f"HOLD wants bound > 0, sigma_data > 0 and param 'paper' or 'denoiser', got {self}")
        snr = float(self.snr(self.T))
        if not 0 < snr < self.snr_max:
            fix = "raise T" if snr else "lower T"
            raise ValueError(f"SNR at T={self.T} must be above 0 and below snr_max={self.snr_max:g}, is {snr:g}: {fix}")
        if snr > 1e-2:  # the prior would miss that much of the data
            T = self.time_of_snr(1e-3)
            warnings.warn(
                f"SNR at T={self.T} is {snr:.2g}, so the prior is off: use T={T:.2f} (SNR 1e-3)", stacklevel=3
            )

    @property
    def n(self):
        """Blocks of the state."""
        return operator.index(self.order)

    @property
    def critical(self):
        """gamma (n - 1,) and xi at which all n eigenvalues of the drift are equal."""
        n, lam2 = self.n, max(2 * self.n - 3, 1)
        gamma = [math.sqrt(lam2 * (n**2 - i**2) / (4 * i**2 - 1)) for i in range(n - 1, 0, -1)]
        return tuple(gamma), n * math.sqrt(lam2)

    @property
    def damping(self):
        """gamma (n - 1,) and xi in use."""
        gamma, xi = self.critical
        return gamma if self.gamma is None else self.gamma, xi if self.xi is None else self.xi

    @property
    def is_critical(self):
        """Whether gamma and xi are those of critical damping."""
        return self.damping == self.critical

    def drift(self):
        """(n, n): F."""
        gamma, xi = self.damping
        G = torch.diag(torch.tensor(gamma, **F64), 1)
        F = G - G.mT
        F[-1, -1] = -xi
        return F

    @by_time
    def transition(self, t, column=None):
        """(..., n, n), or one column (..., n): exp(F t)."""
        t = torch.as_tensor(t, **F64)
        if not ((t >= 0) & (t < math.inf)).all():
            raise ValueError(f"HOLD time runs from 0 (data) to T (prior), got {t.min():g} to {t.max():g}")
        if not self.is_critical:
            E = torch.linalg.matrix_exp(self.drift() * t[..., None, None])
            return E if column is None else E[..., column]
        n, lam = self.n, -self.damping[1] / self.n
        N = self.drift() - lam * torch.eye(n, **F64)
        terms = torch.stack([torch.linalg.matrix_power(N, k) / math.factorial(k) for k in range(n)])
        # e^{lam t} t^k for all k
        powers = torch.cat([torch.exp(lam * t)[..., None], t[..., None].expand(*t.shape, n - 1)], -1).cumprod(-1)
        return torch.tensordot(powers, terms if column is None else terms[..., column], 1)

    @by_time
    def mean(self, t):
        """(..., n): exp(F t) e_1."""
        return self.transition(t, 0)

    def cov(self, t):
        """(..., n, n): L L^T, from the factor, which keeps the digits at small t."""
        L = self.cholesky(t)
        return L @ L.mT

    @by_time
    def cholesky(self, t):
        """(..., n, n): lower L with L L^T = cov(t).

        At early times S0 and the noise of [0, t] are stacked in square-root form, where nothing cancels; at late times
        cov is nearly L_inv I, and the small entries keep their digits only if computed as the difference from that.
        """
        E, eye = self.transition(t), torch.eye(self.n, **F64)
        S0 = torch.full((self.n,), self.alpha * self.L_inv, **F64)
        S0[0] = 0
        early = lower(torch.cat([E * S0.sqrt(), self.diffusion(t)], -1))
        rest = (E * (S0 - self.L_inv)) @ E.mT
        is_late = rest.abs().amax((-2, -1), keepdim=True) < self.L_inv / 4
        return torch.where(is_late, torch.linalg.cholesky(self.L_inv * eye + rest * is_late), early)

    @by_time
    def diffusion(self, t):
        """(..., n, K): Q with Q Q^T = 2 xi L_inv int_0^t exp(F s) e_n e_n^T exp(F s)^T ds, a column per node s.

        40 nodes resolve |F| t <= 16, at critical damping |lam| t <= 24; longer times are reached by doubling, Q(2t)
        Q(2t)^T = exp(F t) Q Q^T exp(F t)^T + Q Q^T.
        """
        t = torch.as_tensor(t, **F64)
        F, xi = self.drift(), self.damping[1]
        longest = 24 * self.n / xi if self.is_critical else 16 / float(torch.linalg.matrix_norm(F, 2))
        doublings = max(0, math.ceil(math.log2(max(float(t.max()), longest) / longest)))
        t = t / 2**doublings
        s, ds = gauss_legendre(0.0, 1.0, 40)
        columns = self.transition(t[..., None] * s, self.n - 1).mT
        Q = columns * (2 * xi * self.L_inv * t[..., None] * ds).sqrt()[..., None, :]
        for i in range(doublings):
            Q = lower(torch.cat([self.transition(t * 2**i) @ Q, Q], -1))
        return Q

    @by_time
    def kappa(self, t):
        """(..., n): L^-1 mean."""
        return torch.linalg.solve_triangular(self.cholesky(t), self.mean(t)[..., None], upper=False)[..., 0]

    def snr(self, t):
        """(...): mean^T cov^-1 mean, falling from infinity at t = 0."""
        return self.kappa(t).square().sum(-1)

    @by_time
    def clock(self, t, R=R):
        """(...): lambda = log(1 + R sqrt(SNR)): about R sqrt(SNR) where sqrt(SNR) < 1/R, and log(R sqrt(SNR)) above."""
        return torch.log1p(R * self.snr(t).sqrt())

    def time(self, clock, R=R):
        """t (...) in [t_min, T] at lambda = clock, by straight lines between 1,000 knots."""
        root_snr, t = self.knots
        c = torch.log1p(R * root_snr)
        k = torch.searchsorted(c, clock).clamp(1, len(c) - 1)
        return t[k - 1] + (t[k] - t[k - 1]) * ((clock - c[k - 1]) / (c[k] - c[k - 1])).clamp(0, 1)

    @cached_property
    def knots(self):
        """sqrt(SNR) (1000,), rising, and t (1000,), falling from T to t_min."""
        t = torch.linspace(math.log(self.T), math.log(self.t_min), 1000, **F64).exp()
        return self.snr(t).sqrt(), t

    @cached_property
    def t_min(self):
        """The last time of every sampler, where the SNR is snr_max."""
        return self.time_of_snr(self.snr_max)

    def time_of_snr(self, snr):
        """t (a float) at which the SNR is `snr`, by bisection in log t from 1e-12 to T, doubled until it is beyond."""
        low, high = math.log(1e-12), math.log(self.T)
        while self.snr(math.exp(high)) > snr:
            high += math.log(2)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.snr(math.exp(middle)) > snr else (low, middle)
        return math.exp(high)

    def prior(self, shape, generator=None):
        """(B, n C, ...) float32: the state at t = T for data of shape (B, C, ...), on the generator's device."""
        shape = (shape[0], self.n * shape[1], *shape[2:])
        device = generator.device if generator else None
        eps = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
        return math.sqrt(self.L_inv) * eps


def lower(A):
    """Lower L with L L^T = A A^T and diagonal >= 0, by QR: nothing is subtracted, so nothing cancels and no jitter."""
    L = torch.linalg.qr(A.mT, mode="r").R.mT
    return L * torch.where(L.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(L)[..., None, :]


def mix(A, m):
    """Linear combinations of blocks: A (i, j) or (B, i, j) on m (B, j C, ...) -> (B, i C, ...), m's dtype and device.
    A product and a sum, not a matmul, so that neither autocast nor TF32 rounds the coefficients."""
    blocks = m.reshape(len(m), 1, A.shape[-1], -1)
    return (A.to(blocks, non_blocking=blocks.is_cuda)[..., None] * blocks).sum(-2).reshape(len(m), -1, *m.shape[2:])


def each(c, x):
    """One number c (B,) for each x (B, ...)."""
    return c.to(x, non_blocking=x.is_cuda).reshape(-1, *[1] * (x.ndim - 1)) * x


# ---------------------------------------------------------------------------------------------------------------------
# 2. The paper's target eps_n, and its loss


@by_time
def affine(process, t):
    """w (..., n) and b (...) of eps_n = w . m + b x: w is the last row of L^-1, b = -kappa_n."""
    e_n = torch.eye(process.n, **F64)[:, -1:]
    w = torch.linalg.solve_triangular(process.cholesky(t).mT, e_n, upper=True)[..., 0]
    return w, -(w * process.mean(t)).sum(-1)


def hop(process, eps_n, m, t):
    """Sampling-hop (not in the paper): the x (B, C, ...) that leaves the noise eps_n."""
    w, b = affine(process, t)
    return (eps_n - mix(w[None], m)) / float(b)


def training_pair(process, x, t, eps):
    """State m (B, n C, ...) and label eps_n (B, C, ...) at times t (B,) with noise eps (B, n C, ...)."""
    m = mix(process.mean(t)[..., None], x) + mix(process.cholesky(t), eps)
    return m, eps.chunk(process.n, 1)[-1]


def loss(process, net, x, label=None):
    """The paper's (BCSM), E|net(m, t) - eps_n|^2 per dimension, a scalar, t even in lambda; x (B, C, ...).

    A denoiser's loss has the same minimiser: with eps_theta = w . m - kappa_n D, |eps_theta - eps_n|^2 = kappa_n^2
    |D - x|^2. It weights the noise levels and draws them in another way (`denoiser_loss`), and draws y in place of m,
    as D sees no more.
    """
    if process.param == "denoiser":
        return denoiser_loss(process, net, x, label)
    first, last = process.clock(process.T), process.clock(process.t_min)
    t = process.time(first + (last - first) * stratified(len(x)))
    m, target = training_pair(process, x, t, torch.randn_like(torch.cat([x] * process.n, 1)))
    return ((net(m, t.to(x), label) - target) ** 2).mean()


def stratified(n):
    """n uniform numbers in random order, one in each n-th of [0, 1]: a batch covers all times."""
    return (torch.randperm(n, device="cpu") + torch.rand(n, **F64)) / n


# ---------------------------------------------------------------------------------------------------------------------
# 3. The denoiser, the same for every process (Karras et al. 2022, sections 5 and B.6)


def denoiser_loss(process, net, x, label=None):
    """E[|D - x|^2 / c_out^2] per dimension, a scalar, ln sigma ~ N(-1.2, 1.2^2)."""
    u = stratified(len(x)).clamp(1e-9, 1 - 1e-9)
    snr = torch.exp(-2 * (-1.2 + 1.2 * torch.special.ndtri(u)))
    y = each(snr.sqrt(), x) + torch.randn_like(x)
    error = precondition(process, net, y, snr, label) - x
    return each(1 / process.sigma_data**2 + snr, error**2).mean()


def precondition(process, net, y, snr, label=None):
    """D = E[x | y] (B, C, ...), with y in units of its noise sigma, so that all stays finite as snr (B,) -> 0."""
    s, root = process.sigma_data, snr.sqrt()
    c_in = 1 / (1 + s**2 * snr).sqrt()
    c_out = s * c_in
    c_skip = s**2 * root * c_in**2
    c_noise = 1 / (1 + root)  # ours: sigma / (1 + sigma), 0 at the data, 1 at pure noise
    return each(c_skip, y) + each(c_out, net(each(c_in, y), c_noise.to(y, non_blocking=y.is_cuda), label).to(y))


@by_time
def project(process, t):
    """w (..., n) and SNR (...), t > 0, with y / sigma = w . m: w = cov^-1 mean / sqrt(SNR)."""
    kappa = process.kappa(t)
    w = torch.linalg.solve_triangular(process.cholesky(t).mT, kappa[..., None], upper=True)[..., 0]
    return w / kappa.norm(dim=-1, keepdim=True), kappa.square().sum(-1)


def denoise(process, net, m, t, label=None):
    """One network call: E[x | m] (B, C, ...) at time t (a number). Near T, hop divides the error of an eps-network by a
    kappa_n close to 0: a finite `bound` stops the strays."""
    if process.param == "denoiser":
        w, snr = project(process, t)
        x = precondition(process, net, mix(w[None], m), snr.expand(len(m)), label)
    else:
        x = hop(process, net(m, m.new_full((len(m),), float(t)), label).to(m), m, t)
    return x.clamp(-process.bound, process.bound)


def predict(process, net, m, t, label=None, condition=None, data_mean=None):
    """E[x | m] (B, C, ...), and the state to go on from, m: by `denoise`, or by condition(process, net, m, t, label),
    which may change both. data_mean: where m tells nothing yet, this is E[x | m], without a call."""
    if data_mean is not None:
        mean = torch.as_tensor(data_mean, dtype=m.dtype, device=m.device)
        return torch.zeros_like(m.chunk(process.n, 1)[0]) + mean, m
    return condition(process, net, m, t, label) if condition else (denoise(process, net, m, t, label), m)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Samplers: m0 (B, n C, ...) from the prior -> x (B, C, ...), with exactly nfe network calls and no gradients; the
# result is the last call's prediction. All take their force from the prediction of x, so any network serves them all.
# rho and t_end shape the grid of times, randn(x) draws unit noise shaped like x, label goes to the network.
# They end in the law of that prediction, not in the data's: a mode of standard deviation s keeps the share
# s^2 / (s^2 + sigma^2) of its variance, sigma the noise at the last call.


@lru_cache(1000)
def times(process, nfe, rho, t_end, R=HOLD.R, extra=0):
    """nfe + extra times from T down to t_end, even in lambda^(1/rho): in t, a high order would skip low noise.

    t_end None: where y has noise of standard deviation 1/(3 nfe); t_min at least. ValueError for nfe, rho or t_end out
    of range.
    """
    if nfe < 1:
        raise ValueError(f"nfe counts network calls and must be at least 1, got {nfe}")
    if t_end is None:
        t_end = float(process.time(torch.tensor(3.0 * nfe, **F64).log1p(), 1.0))
    if not (0.01 <= rho <= 100 and process.t_min <= t_end < process.T):
        raise ValueError(f"want 0.01 <= rho <= 100 and {process.t_min:g} <= t_end < {process.T}, got {rho=}, {t_end=}")
    a, b = (float(process.clock(t, R)) ** (1 / rho) for t in (process.T, t_end))
    u = torch.linspace(a, b, nfe + extra, **F64)[1:-1] ** rho
    return (process.T, *process.time(u, R).tolist(), t_end)[: nfe + extra]


@torch.no_grad()
def em(process, net, m0, nfe, label=None, rho=1.0, t_end=None, randn=torch.randn_like, condition=None):
    """SDE, Euler-Maruyama."""
    m, xi, e_n = m0, process.damping[1], torch.eye(process.n, **F64)[:, -1:]
    ts = times(process, nfe, rho, t_end)
    for t, t_next in pairwise(ts):
        h = t - t_next
        x, m = predict(process, net, m, t, label, condition)
        f = mix(force(process, t), torch.cat([m, x], 1))
        push = 2 * xi * h * f + math.sqrt(2 * xi * process.L_inv * h) * randn(f)
        m = m + mix(h * process.drift().mT, m) + mix(e_n, push)
    return predict(process, net, m, ts[-1], label, condition)[0]


@torch.no_grad()
def lie(process, net, m0, nfe, label=None, rho=1.0, t_end=None, randn=torch.randn_like, condition=None):
    """SDE, Lie-Trotter splitting (the paper's): a step of linear flow, then the kick. Weak order 1.
    t_end ends the last step, where its call is."""
    m = m0
    for t, t_next in pairwise(times(process, nfe, rho, t_end, extra=1)):
        m = linear_flow(process, m, t - t_next, randn)
        x, m = predict(process, net, m, t_next, label, condition)
        m = mix(kick(process, t_next, t - t_next), torch.cat([m, x], 1))
    return x


@torch.no_grad()
def strang(process, net, m0, nfe, label=None, rho=1.0, t_end=None, randn=torch.randn_like, condition=None):
    """SDE, Strang splitting: half a step of linear flow, the kick with x at mid-step, half a step of linear flow.

    The force depends on the block it kicks, so x is asked for half-way through the kick, where the x of the step before
    takes us: without that the scheme (CLD's SSCS) has weak order 1, with it 2, at the same one call a step. It beats
    `lie` of order 2 on Gaussian data of standard deviation 1 only above 300 calls, of 0.5 from about 25 on, of 0.1 from
    10. t_end ends the last step; its call is at mid-step.
    """
    m, x = m0, None
    for t, t_next in pairwise(times(process, nfe, rho, t_end, extra=1)):
        h, middle = t - t_next, (t + t_next) / 2
        m = linear_flow(process, m, h / 2, randn)
        half_way = m if x is None else mix(kick(process, middle, h / 2), torch.cat([m, x], 1))
        x, new = predict(process, net, half_way, middle, label, condition)
        m = torch.cat([m + (new - half_way), x], 1)
        m = linear_flow(process, mix(kick(process, middle, h), m), h / 2, randn)
    return x


def linear_flow(process, m, h, randn):
    """dm = F^T m |dt| + sqrt(2 xi L_inv) e_n dW over h, drawn exactly."""
    return mix(process.transition(h).mT, m) + mix(linear_noise(process, h), randn(m))


@by_time
def linear_noise(process, h):
    """(n, n): F^T is F with every other block's sign changed, so its noise is the forward one's with those signs."""
    sign = (-1.0) ** torch.arange(process.n, **F64)[:, None]
    return sign * lower(process.diffusion(h))


@by_time
def force(process, t):
    """(1, n + 1): f = m_n + L_inv grad_n log p(m | x) as a combination of the blocks of cat(m, x)."""
    w, b = affine(process, t)
    eps_n = torch.cat([w, b[None]])
    return (torch.eye(process.n + 1, **F64)[-2] - process.L_inv * w[-1] * eps_n)[None]  # w_n is 1/L_nn


@by_time
def kick(process, t, h):
    """(n, n + 1), on cat(m, x): dm_n = 2 xi f |dt| over h at frozen t and x, solved exactly: df/d|dt| = a f with a < 0,
    at low noise so large that an Euler step would be unstable."""
    xi, f, eye = process.damping[1], force(process, t), torch.eye(process.n, process.n + 1, **F64)
    a = 2 * xi * float(f[0, -2])  # d(2 xi f) / dm_n
    growth = math.expm1(a * h) / a if a else h
    return eye + 2 * xi * growth * eye[:, [-2]] * f


@torch.no_grad()
def ode(
    process, net, m0, nfe, label=None, rho=1.0, t_end=None, eta=0.0, data_mean=0.0, correct=True,
    randn=torch.randn_like, condition=None,
):  # fmt: skip
    """ODE, for few steps: predict x, split z into kappa x + eps, go to the next kappa with the same eps, as in DDIM.

    Over a step of length h the prediction is linear in lambda, x_0 + slope (lambda - lambda_0), and kappa keeps its
    direction. As d|kappa| ~ e^lambda dlambda, int x dkappa = (kappa_next - kappa) (x_0 + c slope),
    c = h / (1 - e^-h) - 1. Second order, as DPM-Solver++(2M).
    correct: the step is repeated with the next prediction, which then follows y as that of Gaussian data does, at the
    rate dE[x | y]/dy = s^2 / (s^2 + sigma^2), s = sigma_data (after UniPC). It costs no call.
    data_mean: at T nothing is known, so the first prediction is the mean of the data, a number or (C, ...): the free
    node, which costs no call. A wrong mean moves the samples. None: a call.
    eta > 0 renews a part of the noise, 1 as much as the SDE of y; the law stays as h -> 0. ValueError for eta < 0.
    R = sigma_data sqrt(2 d): about the distance of two samples of d numbers; noise of that size hides which is which.
    """
    if not eta >= 0:
        raise ValueError(f"eta scales the noise and must be at least 0, got {eta}")
    s, R = process.sigma_data, process.sigma_data * math.sqrt(2 * m0[0].numel() / process.n)
    ts = times(process, nfe, rho, t_end, R, extra=data_mean is not None)
    x, m = predict(process, net, m0, ts[0], label, condition, data_mean)
    z, slope = mix(torch.linalg.inv(process.cholesky(ts[0])), m), 0.0
    for t, t_next in pairwise(ts):
        h = float(process.clock(t_next, R) - process.clock(t, R))
        c = h / -math.expm1(-h) - 1
        kappa, kappa_next = process.kappa(t), process.kappa(t_next)
        keep = float(kappa.norm() / kappa_next.norm()) ** eta**2
        step = (kappa_next - keep * kappa)[:, None]
        ahead = x + c * slope
        z = mix(step, ahead) + keep * z + math.sqrt(1 - keep**2) * (randn(z) if eta else 0)
        m = mix(process.cholesky(t_next), z)
        x_next, new = predict(process, net, m, t_next, label, condition)
        z = z if new is m else mix(torch.linalg.inv(process.cholesky(t_next)), new)
        if correct and t_next != ts[-1]:
            shift = x + c * (x_next - x) / h - ahead
            z = z + mix(step, shift)
            x_next = x_next + s**2 * float(kappa_next @ step) / (1 + s**2 * float(kappa_next @ kappa_next)) * shift
        x, slope = x_next, (x_next - x) / h
    return x


@lru_cache(1000)
def gauss_legendre(a, b, nodes=16):
    """Nodes and weights on [a, b] from the eigenvectors of the Jacobi matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, nodes, **F64)
    off = k / (4 * k**2 - 1).sqrt()
    x, V = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (a + b) / 2 + (b - a) / 2 * x, (b - a) * V[0] ** 2


SAMPLERS = {"ode": ode, "strang": strang, "lie": lie, "em": em}  # the first is the default

# ---------------------------------------------------------------------------------------------------------------------
# 5. Likelihood


def log_likelihood_bound(process, net, x, label=None, exact=None, tol=1e-5):
    """A lower bound of log p(x), in nats per sample (B,), from one draw of the noise; averaging draws is the caller's.

    The model: z from the prior along the exact flow of `ode` to t_min, then D = `denoise` plus noise of variance 1/SNR.
    With the forward process q(z | x) = N(kappa x, I) as encoder, for any network,

        log p(x) >= E_q[log p_ODE(z) + log N(x; D(z), 1/SNR) - log q(z | x)],    z = kappa x + eps at t_min,

    which as t_min -> 0 is E[log p_ODE(q, aux)] + (n - 1) d/2 (1 + log 2 pi alpha L_inv). With an exact net it is on
    average d/4 (1 / (SNR s^2))^2 nats below the truth for Gaussian data of variance s^2 >> 1/SNR.
    exact: the divergence by d backward passes a call (default up to d = 16), else by Hutchinson's estimate with one
    Rademacher probe a sample. tol: the flow's tolerance (`dormand_prince`); 1e-5 costs some 120 calls on smooth data.
    The caller adds what made x from pixels: uniform dequantisation and log |dx / dpixel|.
    """
    B, d, n, t = len(x), x[0].numel(), process.n, process.t_min
    exact = d <= 16 if exact is None else exact
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    probes = eye.reshape(d, 1, *x.shape[1:]) if exact else torch.randint_like(x, 2)[None] * 2 - 1
    eps = torch.randn_like(torch.cat([x] * n, 1))
    z = mix(process.kappa(t)[:, None], x) + eps

    def field(s, y):  # d(z, log p)/ds, s = log time
        time, near = math.exp(s), torch.tensor([-2e-3, -1e-3, 1e-3, 2e-3], **F64)
        rate = torch.tensor([1.0, -8.0, 8.0, -1.0], **F64) @ process.kappa((s + near).exp()) / 12e-3
        with torch.enable_grad():
            state = y[:, :-1].detach().reshape(eps.shape).requires_grad_()
            D = denoise(process, net, mix(process.cholesky(time), state), time, label)
            grads = [torch.autograd.grad((D * v).sum(), state, retain_graph=True)[0] for v in probes]
        div = sum((v * mix(rate[None], g)).reshape(B, -1).sum(1) for v, g in zip(probes, grads, strict=True))
        return torch.cat([mix(rate[:, None], D.detach()).reshape(B, -1), div[:, None]], 1)

    with torch.no_grad():
        error = x - denoise(process, net, mix(process.cholesky(t), z), t, label)
    y = dormand_prince(field, pad(z.reshape(B, -1), (0, 1)), math.log(t), math.log(process.T), tol)
    L, snr = process.cholesky(process.T), float(process.snr(t))
    m, log_det = mix(L, y[:, :-1].reshape(eps.shape)), float(L.diagonal().log().sum()) - n / 2 * math.log(process.L_inv)
    a, b, c = (v.reshape(B, -1).square().sum(1) / 2 for v in (m, error, eps))
    log_prior = d * log_det - a / process.L_inv  # of z at T; its (2 pi)^(-n d/2) cancels against that of q
    return log_prior + y[:, -1] + d / 2 * math.log(snr / (2 * math.pi)) - snr * b + c


def dormand_prince(field, y, s, s_end, tol):
    """y (B, K) at s_end of dy/ds = field(s, y) by Dormand & Prince's 5(4) pair, six calls a step. In every row the root
    mean square over K of the step's error / (1 + |y|) stays below tol."""
    tableau = [
        [1 / 5],
        [3 / 40, 9 / 40],
        [44 / 45, -56 / 15, 32 / 9],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
    ]
    fifth_minus_fourth = [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40]
    h, k, shortest = (s_end - s) / 100, [field(s, y)], (s_end - s) * 1e-4
    while s < s_end:
        h = min(h, s_end - s)
        for row in tableau:
            new = y + h * sum(a * v for a, v in zip(row, k, strict=True))
            k.append(field(s + h * sum(row), new))
        error = h * sum(a * v for a, v in zip(fifth_minus_fourth, k, strict=True)) / (tol * (1 + y.abs()))
        error = float(error.square().mean(1).max().sqrt())
        if not math.isfinite(error):
            raise ValueError(f"the flow is not finite at t = {math.exp(s):.3g}: check the network and the scale of x")
        if h < shortest and s + h < s_end:
            raise ValueError(
                f"tol={tol:g} asks for steps under {shortest:.1g} in log t, finer than {y.dtype}: raise it"
            )
        s, y, k = (s + h, new, k[-1:]) if error <= 1 else (s, y, k[:1])  # the last call is the next step's first
        h *= min(5.0, max(0.2, 0.9 * max(error, 1e-9) ** -0.2))
    return y
