"""AGM, the phase stochastic bridge, in one file: process -> target and loss -> denoiser -> samplers.

"Generative Modeling with Phase Stochastic Bridges", Chen et al., ICLR 2024, arXiv 2310.07805.

1. The process. A particle (x, v) starts as noise at t = 0 and is steered to a data point x1 at t = 1; tau = 1 - t:

    dx = v dt,    dv = a dt + g dW,    g = p tau,    (x, v) at 0 ~ N(0, [[1, k], [k, 1]])
    a* = (4/tau) ((x1 - x)/tau - v)

All dimensions of the data behave alike; the vectors and matrices below act on the two blocks x and v. At every t, a* is
the start of the cheapest path, min int |a|^2 dt, that ends at x1 with the velocity of the straight line from here,
(x1 - x)/tau. Under a* the error e = x - x1 obeys e'' = -4 e/tau^2 - 4 e'/tau. Try e = tau^j: j (j - 1) = 4 j - 4, so j
is 1 or 4, and

    (e, v) = M c,    M = [[tau, tau^4], [-1, -4 tau^3]],    c the two mode amplitudes

where c is constant but for the noise: a kick dv adds dc = M^-1 (0, dv) = dv/3 (1, -1/tau^3). So, given x1, the state
m = (x, v) is Gaussian: m = mean x1 + L eps, eps ~ N(0, I), with L L^T = M Cov(c) M^T.

2. The target is the acceleration that moves the particles of x1: F = a* for the SDE, and for the ODE of the same law
F = a* - g^2/2 grad_v log p(m | x1). Both are affine in (x1, eps): F = 4 tau^2 x1 + r . eps. The paper's network learns
F/s, s = |r|, which has unit variance at x1 = 0. Regression on m gives E[F | m], and as F = w . m + b x1 this is a
prediction of x1, and back.

3. A denoiser will do, and is the default. y = mean^T cov^-1 m / SNR, SNR = mean^T cov^-1 mean, is a sufficient
statistic: m depends on x1 only through it. It is x1 + sigma noise, sigma = SNR^-1/2, so E[x1 | m] = E[x1 | y]: one
network serves every process.

4. Samplers. Two ODEs have the law of m at every t. That of item 2, dx = v dt, dv = E[F | m] dt, is `exponential`'s.
`ode` follows a simpler one in z = L^-1 m = kappa x1 + eps: dz = E[x1 | m] dkappa, as given x1 the noise eps stands
still. From the same start they end at different samples.

    symbol    here           shape         meaning
    m         m              (B, 2C, ...)  state cat(x, v); x1 has (B, C, ...), images in [-1, 1], points of scale 1
    p, k      AGM.p, AGM.k                 diffusion scale; covariance of x and v in the prior
    mu        mean(t)        (..., 2)      mean of (x, v) per unit of x1
    Sigma, L  cov, cholesky  (..., 2, 2)   covariance of (x, v) given x1, and its lower factor
    kappa     kappa(t)       (..., 2)      L^-1 mean; |kappa|^2 is the SNR
    lambda    clock(t, R)    (...)         log(1 + R sqrt(SNR)), in which the steps of `ode` are even
    r, s      gain, scale    (..., 2), ()  noise part of F, and its length
    w, b      affine         (..., 2), ()  F = w . m + b x1
    F_theta   s * net        (B, C, ...)   param = "paper": net(m, t, label), t of shape (B,)
    D         precondition   (B, C, ...)   param = "denoiser": E[x1 | y] from net(c_in y, c_noise, label)

Coefficients are float64 on the CPU, F64; `mix` and `each` alone bring them to the dtype and the device of the state.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from itertools import pairwise
from typing import ClassVar

import torch

F64 = {"dtype": torch.float64, "device": "cpu"}

# ---------------------------------------------------------------------------------------------------------------------
# 1. The process


def by_time(f):
    """f(process, t, ...) that keeps its results for times given as floats, as samplers ask for the same ones in every
    batch: do not change them in place. They come from outside of inference mode, so that autograd can use them, too."""
    kept = lru_cache(4096)(torch.inference_mode(False)(f))
    return wraps(f)(lambda process, t, *args, **kw: (kept if isinstance(t, float) else f)(process, t, *args, **kw))


@dataclass(frozen=True)
class AGM:
    """The bridge; AGM() has the paper's p and k. Times are numbers or tensors of any shape (...), in [0, 1)."""

    p: float = 3.0  # diffusion scale, > 0
    k: float = -0.2  # prior covariance of x and v, |k| < 1
    sde: bool = False  # which F the paper's network learns: the SDE's (True), or the ODE's
    t0: float = 1e-5  # first and last time of sampling, and of the paper's training
    t1: float = 0.999
    bound: float = math.inf  # largest |x1| of the data (images: 1); data predictions are kept within it
    param: str = "denoiser"  # what the network learns: x1 from y, or F/s from m ("paper")
    sigma_data: float = 0.5  # standard deviation of the data
    n: ClassVar[int] = 2  # blocks of the state
    T: ClassVar[float] = 1.0  # the largest time
    t_data: ClassVar[float] = 1.0  # the time of the data

    def __post_init__(self):
        if not (0 < self.p < math.inf and abs(self.k) < 1 and 0 < self.t0 < self.t1 < 1):
            raise ValueError(f"AGM wants p > 0, |k| < 1 and 0 < t0 < t1 < 1, got {self}")
        if not (self.bound > 0 and 0 < self.sigma_data < math.inf and self.param in ("paper", "denoiser")):
            raise ValueError(f"AGM wants bound > 0, sigma_data > 0 and param 'paper' or 'denoiser', got {self}")

    def modes(self, t):
        """t (...) as float64, M (..., 2, 2) and Cov(c) (..., 2, 2). ValueError for t outside of [0, 1)."""
        t = torch.as_tensor(t, **F64)
        if not ((t >= 0) & (t < 1)).all():
            raise ValueError(f"AGM time runs from 0 (prior) to 1 (data, excluded), got {t.min():g} to {t.max():g}")
        tau, log_tau = 1 - t, torch.log1p(-t)
        M = matrix([[tau, tau**4], [-torch.ones_like(tau), -4 * tau**3]])
        M0_inv = torch.tensor([[4.0, 1.0], [-1.0, -1.0]], **F64) / 3
        prior = torch.tensor([[1.0, self.k], [self.k, 1.0]], **F64)
        # int_0^t dc dc^T = p^2/9 int tau^2 (1, -tau^-3) (1, -tau^-3)^T dt
        kicks = matrix([[-torch.expm1(3 * log_tau), 3 * log_tau], [3 * log_tau, torch.expm1(-3 * log_tau)]])
        return t, M, M0_inv @ prior @ M0_inv.T + self.p**2 / 27 * kicks

    @by_time
    def mean(self, t):
        """(..., 2): (1, 0) + M M(0)^-1 (-1, 0) = (1 - 4 tau/3 + tau^4/3, 4/3 (1 - tau^3)), in t: nothing cancels."""
        t = self.modes(t)[0]
        return torch.stack([t**2 * (6 - 4 * t + t**2), 4 * t * (3 - 3 * t + t**2)], -1) / 3

    def cov(self, t):
        """(..., 2, 2): L L^T."""
        L = self.cholesky(t)
        return L @ L.mT

    @by_time
    def cholesky(self, t):
        """(..., 2, 2): lower L, L L^T = M Cov(c) M^T. L_vv = |det M| sqrt(det C) / L_xx: nothing cancels as t -> 1."""
        t, M, C = self.modes(t)
        S = M @ C @ M.mT
        Lxx = S[..., 0, 0].sqrt()
        det = C[..., 0, 0] * C[..., 1, 1] - C[..., 0, 1] ** 2
        return matrix([[Lxx, torch.zeros_like(Lxx)], [S[..., 0, 1] / Lxx, 3 * (1 - t) ** 4 * det.sqrt() / Lxx]])

    @by_time
    def kappa(self, t):
        """(..., 2): L^-1 mean."""
        return torch.linalg.solve_triangular(self.cholesky(t), self.mean(t)[..., None], upper=False)[..., 0]

    def snr(self, t):
        """(...): mean^T cov^-1 mean, rising from 0 at t = 0."""
        return self.kappa(t).square().sum(-1)

    @by_time
    def clock(self, t, R):
        """(...): lambda = log(1 + R sqrt(SNR)): about R sqrt(SNR) where sqrt(SNR) < 1/R, and log(R sqrt(SNR)) above."""
        return torch.log1p(R * self.snr(t).sqrt())

    def time(self, clock, R):
        """t (...) in [t0, t1] at lambda = clock, by bisection."""
        low, high = torch.full_like(clock, self.t0), torch.full_like(clock, self.t1)
        for _ in range(60):
            middle = (low + high) / 2
            early = self.clock(middle, R) < clock
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return high

    def prior(self, shape, generator=None):
        """(B, 2C, ...) float32: the state at t = 0 for data of shape (B, C, ...), on the generator's device."""
        shape = (shape[0], 2 * shape[1], *shape[2:])
        device = generator.device if generator else None
        eps = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
        return mix(torch.tensor([[1.0, 0.0], [self.k, math.sqrt(1 - self.k**2)]], **F64), eps)


def matrix(rows):
    """Nested lists of (...) tensors -> (..., rows, columns)."""
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def mix(A, m):
    """Linear combinations of blocks: A (i, j) or (B, i, j) on m (B, j C, ...) -> (B, i C, ...), m's dtype and device.
    A product and a sum, not a matmul, so that neither autocast nor TF32 rounds the coefficients."""
    blocks = m.reshape(len(m), 1, A.shape[-1], -1)
    return (A.to(blocks, non_blocking=blocks.is_cuda)[..., None] * blocks).sum(-2).reshape(len(m), -1, *m.shape[2:])


def each(c, x):
    """One number c (B,) for each x (B, ...)."""
    return c.to(x, non_blocking=x.is_cuda).reshape(-1, *[1] * (x.ndim - 1)) * x


# ---------------------------------------------------------------------------------------------------------------------
# 2. The paper's target F, and its loss


def gain(process, t):
    """r (..., 2) of F = 4 tau^2 x1 + r . eps.

    r_x = -(4/tau) (L_xx/tau + L_vx), written in C because the two terms cancel as t -> 1; r_v = -(4/tau) L_vv, and the
    ODE adds -g^2/2 grad_v log p(m | x1) = g^2 eps_v / (2 L_vv).
    """
    (t, _, C), L = process.modes(t), process.cholesky(t)
    tau = 1 - t
    r_x = 12 * tau**3 * (C[..., 0, 1] + tau**3 * C[..., 1, 1]) / L[..., 0, 0]
    r_v = -4 / tau * L[..., 1, 1]
    if not process.sde:
        r_v = r_v + (process.p * tau) ** 2 / (2 * L[..., 1, 1])
    return torch.stack([r_x, r_v], -1)


@by_time
def scale(process, t):
    """s (...) = |r|: the standard deviation of F at x1 = 0."""
    return gain(process, t).norm(dim=-1)


@by_time
def affine(process, t):
    """w (..., 2) and b (...) of F = w . m + b x1, from r . eps = (L^-T r) . (m - mean x1)."""
    w = torch.linalg.solve_triangular(process.cholesky(t).mT, gain(process, t)[..., None], upper=True)[..., 0]
    return w, 4 * (1 - process.modes(t)[0]) ** 2 - (w * process.mean(t)).sum(-1)


def acceleration(process, x1, m, t):
    """F (B, C, ...) at state m and time t (a number) if the data are x1."""
    w, b = affine(process, t)
    return mix(w[None], m) + float(b) * x1


def hop(process, F, m, t):
    """The paper's sampling-hop, for SDE and ODE: the x1 (B, C, ...) that F steers to."""
    w, b = affine(process, t)
    return (F - mix(w[None], m)) / float(b)


def training_pair(process, x1, t, eps):
    """State m (B, 2C, ...) and label F/s (B, C, ...) at times t (B,) with noise eps (B, 2C, ...)."""
    m = mix(process.mean(t)[..., None], x1) + mix(process.cholesky(t), eps)
    r = gain(process, t)
    F = each(4 * (1 - t) ** 2, x1) + mix(r[:, None], eps)
    return m, each(1 / r.norm(dim=-1), F)


def loss(process, net, x1, label=None):
    """The paper's, E[(1 - t) |net(m, t) - F/s|^2] per dimension, a scalar, t uniform on [t0, t1]; x1 (B, C, ...).

    A denoiser's loss has the same minimiser: with F_theta = w . m + b D, |F_theta - F|^2 = b^2 |D - x1|^2. It weights
    the noise levels and draws them in another way (`denoiser_loss`), and draws y in place of m, as D sees no more.
    """
    if process.param == "denoiser":
        return denoiser_loss(process, net, x1, label)
    t = process.t0 + (process.t1 - process.t0) * stratified(len(x1))
    m, target = training_pair(process, x1, t, torch.randn_like(torch.cat([x1, x1], 1)))
    return each(1 - t, (net(m, t.to(x1), label) - target) ** 2).mean()


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
    """w (..., 2) and SNR (...), t > 0, with y / sigma = w . m: w = cov^-1 mean / sqrt(SNR)."""
    kappa = process.kappa(t)
    w = torch.linalg.solve_triangular(process.cholesky(t).mT, kappa[..., None], upper=True)[..., 0]
    return w / kappa.norm(dim=-1, keepdim=True), kappa.square().sum(-1)


def denoise(process, net, m, t, label=None):
    """One network call: E[x1 | m] (B, C, ...) at time t (a number)."""
    if process.param == "denoiser":
        w, snr = project(process, t)
        x1 = precondition(process, net, mix(w[None], m), snr.expand(len(m)), label)
    else:
        out = net(m, m.new_full((len(m),), float(t)), label).to(m)
        x1 = hop(process, float(scale(process, t)) * out, m, t)
    return x1.clamp(-process.bound, process.bound)


def predict(process, net, m, t, label=None, condition=None, data_mean=None):
    """E[x1 | m] (B, C, ...), and the state to go on from, m: by `denoise`, or by condition(process, net, m, t, label),
    which may change both. data_mean: where m tells nothing yet, this is E[x1 | m], without a call."""
    if data_mean is not None:
        mean = torch.as_tensor(data_mean, dtype=m.dtype, device=m.device)
        return torch.zeros_like(m.chunk(process.n, 1)[0]) + mean, m
    return condition(process, net, m, t, label) if condition else (denoise(process, net, m, t, label), m)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Samplers: m0 (B, 2C, ...) from the prior -> x1 (B, C, ...), with exactly nfe network calls and no gradients; the
# result is the last call's prediction. All take their force from the prediction of x1, so any network serves them all.
# rho and t_end shape the grid of times, randn(x) draws unit noise shaped like x, label goes to the network.
# They end in the law of that prediction, not in the data's: a mode of standard deviation s keeps the share
# s^2 / (s^2 + sigma^2) of its variance, sigma the noise at the last call.


@lru_cache(1000)
def times(process, nfe, rho, t_end, R=None, extra=0):
    """nfe + extra times from t0 to t_end, even in t^(1/rho), or given R in lambda^(1/rho).

    t_end None: 1 - 1.5/(nfe + extra), from where the last prediction leads to the data; given R, where y has noise of
    standard deviation 1/(3 nfe); t1 at most. ValueError for nfe, rho or t_end out of range.
    """
    if nfe < 1:
        raise ValueError(f"nfe counts network calls and must be at least 1, got {nfe}")
    if t_end is None and R:
        t_end = float(process.time(torch.tensor(3.0 * nfe, **F64).log1p(), 1.0))
    elif t_end is None:
        t_end = min(1 - 1.5 / max(nfe + extra, 2), process.t1)
    if not (0.01 <= rho <= 100 and process.t0 < t_end <= process.t1):
        raise ValueError(f"want 0.01 <= rho <= 100 and {process.t0} < t_end <= {process.t1}, got {rho=}, {t_end=}")
    a, b = (float(process.clock(t, R) if R else t) ** (1 / rho) for t in (process.t0, t_end))
    u = torch.linspace(a, b, nfe + extra, **F64)[1:-1] ** rho
    return (process.t0, *(process.time(u, R) if R else u).tolist(), t_end)[: nfe + extra]


@torch.no_grad()
def em(process, net, m0, nfe, label=None, rho=1.0, t_end=None, randn=torch.randn_like, condition=None):
    """SDE, Euler-Maruyama."""
    sde, m, ts = replace(process, sde=True), m0, times(process, nfe, rho, t_end)
    for t, t_next in pairwise(ts):
        h = t_next - t
        x1, m = predict(process, net, m, t, label, condition)
        F = acceleration(sde, x1, m, t)
        x, v = m.chunk(2, 1)
        m = torch.cat([x + h * v, v + h * F + process.p * (1 - t) * math.sqrt(h) * randn(v)], 1)
    return predict(process, net, m, ts[-1], label, condition)[0]


@torch.no_grad()
def splitting(process, net, m0, nfe, label=None, rho=1.0, t_end=None, randn=torch.randn_like, condition=None):
    """SDE, symmetric splitting (the paper's SSS): half a step of free motion with noise, the kick v += h F with F at
    mid-step, half a step of free motion. First order in law: F contains v, and the kick is an Euler step.
    t_end ends the last step (default t1), whose call is at its middle."""
    sde, m = replace(process, sde=True), m0
    ts = times(process, nfe, rho, process.t1 if t_end is None else t_end, extra=1)
    for t, t_next in pairwise(ts):
        h, middle = t_next - t, (t + t_next) / 2
        m = free_motion(process, m, t, h / 2, randn)
        x1, m = predict(process, net, m, middle, label, condition)
        x, v = m.chunk(2, 1)
        m = torch.cat([x, v + h * acceleration(sde, x1, m, middle)], 1)
        m = free_motion(process, m, middle, h / 2, randn)
    return x1


def free_motion(process, m, t, h, randn):
    """dx = v dt, dv = g dW over [t, t + h], drawn exactly: a kick dv at t + u has moved x by (h - u) dv at the end."""
    u, du = gauss_legendre(0.0, h)
    Q = process.p * (1 - t - u) * du.sqrt() * torch.stack([torch.ones_like(u), h - u])  # (2, nodes), rows v and x
    x, v = m.chunk(2, 1)
    return torch.cat([x + h * v, v], 1) + mix(torch.linalg.cholesky(Q @ Q.mT).flip(0), randn(m))  # rows x and v


@torch.no_grad()
def ode(
    process, net, m0, nfe, label=None, rho=1.0, t_end=None, eta=0.0, data_mean=0.0, correct=True,
    randn=torch.randn_like, condition=None,
):  # fmt: skip
    """ODE, for few steps: predict x1, split z into kappa x1 + eps, go to the next kappa with the same eps, as in DDIM.

    Over a step of length h the prediction is linear in lambda, x_0 + slope (lambda - lambda_0), and kappa keeps its
    direction. As d|kappa| ~ e^lambda dlambda, int x1 dkappa = (kappa_next - kappa) (x_0 + c slope),
    c = h / (1 - e^-h) - 1. Second order, as DPM-Solver++(2M).
    correct: the step is repeated with the next prediction, which then follows y as that of Gaussian data does, at the
    rate dE[x1 | y]/dy = s^2 / (s^2 + sigma^2), s = sigma_data (after UniPC). It costs no call.
    data_mean: at t0 nothing is known, so the first prediction is the mean of the data, a number or (C, ...): the free
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


@torch.no_grad()
def exponential(
    process, net, m0, nfe, label=None, multistep=2, rho=1.0, t_end=None, data_mean=None, correct=True, condition=None
):
    """ODE, the paper's exponential Adams-Bashforth: N = F/s of the last `multistep` (1-4) nodes is extrapolated over
    the step, x += h v + int (t_next - u) s(u) N(u) du, v += int s(u) N(u) du. The paper on CIFAR-10: multistep = 3,
    rho = 2, t_end = .4, .7, .9 for nfe 5, 10, 20, correct = False. data_mean, correct: as in `ode`; corrected, N is
    interpolated through the new node too. ValueError for another multistep."""
    if multistep not in (1, 2, 3, 4):
        raise ValueError(f"multistep must be 1, 2, 3 or 4, got {multistep}")
    flow, ts = replace(process, sde=False), times(process, nfe, rho, t_end, extra=data_mean is not None)
    x, m = predict(process, net, m0, ts[0], label, condition, data_mean)
    past = []  # (t, N) of the last nodes
    for t, t_next in pairwise(ts):
        past = [*past, (t, acceleration(flow, x, m, t) / float(scale(flow, t)))][-multistep:]
        before, ahead = m, advance(flow, m, past, t, t_next)
        x, m = predict(process, net, ahead, t_next, label, condition)
        if correct and t_next != ts[-1]:
            new = (t_next, acceleration(flow, x, m, t_next) / float(scale(flow, t_next)))
            shift = advance(flow, before, [*past, new], t, t_next) - ahead
            (w, snr), s = project(process, t_next), process.sigma_data
            x = x + s**2 * float(snr.sqrt() / (1 + s**2 * snr)) * mix(w[None], shift)
            m = m + shift
    return x


def advance(flow, m, nodes, t, t_next):
    """The state at t_next: N by Lagrange through `nodes`, pairs (time, N)."""
    at, N = zip(*nodes, strict=True)
    return mix(weights(flow, at, t, t_next), torch.cat([m, *N], 1))


@lru_cache(1000)
def weights(flow, at, t, t_next):
    """(2, 2 + nodes), on cat(m, N at each of the times `at`): x + h v, v, and what N adds to both, int (t_next - u, 1)
    s(u) l(u) du with its Lagrange polynomial l, by Gauss-Legendre."""
    u, du = gauss_legendre(t, t_next)
    basis = torch.stack([math.prod([(u - b) / (a - b) for b in at if b != a], start=torch.ones_like(u)) for a in at])
    force = du * scale(flow, u) * basis
    free = torch.tensor([[1.0, t_next - t], [0.0, 1.0]], **F64)
    return torch.cat([free, torch.stack([((t_next - u) * force).sum(-1), force.sum(-1)])], 1)


@lru_cache(1000)
def gauss_legendre(a, b, nodes=16):
    """Nodes and weights on [a, b] from the eigenvectors of the Jacobi matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, nodes, **F64)
    off = k / (4 * k**2 - 1).sqrt()
    x, V = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (a + b) / 2 + (b - a) / 2 * x, (b - a) * V[0] ** 2


SAMPLERS = {"ode": ode, "exponential": exponential, "splitting": splitting, "em": em}  # the first is the default
