"""HOLD, high-order Langevin dynamics, in one file: process -> target and loss -> denoiser -> samplers.

"Generative Modelling with High-Order Langevin Dynamics", Shi & Liu, 2024, arXiv 2404.12814. The authors published no
code: the defaults are ours. Order n = 1 is the OU (VP) process, 2 is critically damped Langevin (CLD), 3 is HOLD.

    process = HOLD(order=3, sigma_data=0.5)            # standard deviation of the data, which are centred
    loss(process, net, x).backward()                   # in your training loop; net(y, t, label) -> like x
    predict = functools.partial(denoise, process, net)
    x = ode(process, predict, process.prior((64, 3, 32, 32)), nfe=20, data_mean=mean)

1. The process. The data x are the first block of a chain m = (q, v, ...) of n blocks; neighbours rotate into each other
with the speeds gamma_i, and friction xi and noise enter the last block only. E_ij is the matrix with a 1 at (i, j), e_i
the i-th unit vector; they act on the blocks, as all dimensions of the data behave alike:

    dm = F m dt + sqrt(2 xi var) e_n dW,    F = sum_i gamma_i (E_{i,i+1} - E_{i+1,i}) - xi E_{nn}
    from m = (x, N(0, alpha var), ...) at t = 0 to N(0, var I) at T, stationary as F + F^T = -2 xi E_{nn}

(var is the paper's L^-1.) Critical damping, the default: gamma and xi for which all eigenvalues of F are equal. With
gamma_1 = 1 for n > 1 they are lam = -sqrt(2n - 3) (n = 1: -1). Then (F - lam I)^n = 0, and exp(F t) = e^{lam t}
sum_{k<n} (F - lam I)^k t^k / k! is a finite sum.
Given x the state is Gaussian: m = mu x + L eps, eps ~ N(0, I), with mu = exp(F t) e_1 and, as var I is stationary,
L L^T = var I + exp(F t) (S0 - var I) exp(F t)^T, S0 = cov(0).

2. The paper's target is eps_n, the noise of the last block (block coordinate score matching, BCSM): the reverse SDE
needs the score of that block only, and it is -eps_n / L_nn. The last row of eps = L^-1 (m - mu x) reads eps_n = w . m +
b x, so a prediction of E[eps_n | m] is one of E[x | m], and back.

3. The default target is the data, by a plain denoiser. y = mu^T cov^-1 m / SNR, SNR = mu^T cov^-1 mu, is a sufficient
statistic: m depends on x only through it. It is x + sigma noise, sigma = SNR^-1/2, so E[x | m] = E[x | y]: one network,
trained on plain noise, serves AGM, HOLD of any order, and every sampler. Its loss knows nothing of HOLD.

4. Samplers ask for x_hat(m, t) = E[x | m] and nothing else; t falls. Reversed, the drift F m becomes -F m + 2 xi var
e_n grad_n log p, and -F = F^T + 2 xi E_{nn}:

    dm = (F^T m + 2 xi e_n f) |dt| + sqrt(2 xi var) e_n dW,    f = m_n + var grad_n log p(m)

`ode` is DDIM for this process: split m into mu x_hat + L eps, keep eps, put it back together at the next time. For
fixed x this keeps eps fixed; its velocity averaged over p(x | m) gives a flow with the same marginals, as in flow
matching. For n = 1 it is the probability flow. For n > 1 the probability flow rotates eps, and `ode` does not: the same
marginals, another sample from the same start.

    symbol     here            shape         meaning
    m          m               (B, nC, ...)  state cat(q, v, ...); x (B, C, ...): images in [-1, 1], points of scale 1
    gamma, xi  damping         (n - 1,), ()  rotation speeds, friction
    F          drift           (n, n)        drift matrix; transition(t) is exp(F t)
    mu         mean(t)         (..., n)      mean of the blocks per unit of x
    Sigma, L   cov, cholesky   (..., n, n)   covariance of the blocks given x, and its lower factor
    w, b       affine(t)       (n,), ()      eps_n = w . m + b x
    x_hat      predict(m, t)   (B, C, ...)   E[x | m], what a sampler is given: `denoise` with your network
    eps_theta  net             (B, C, ...)   target "noise": net(m, t, label), t (B,) is the time of the process
    D          denoise_y       (B, C, ...)   target "data": E[x | y]; net(c_in y, t, label), t = sigma / (1 + sigma)

Coefficients are float64 on the CPU, F64, and become those of the state's dtype and device where they meet it.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch

F64 = {"dtype": torch.float64, "device": "cpu"}

# ---------------------------------------------------------------------------------------------------------------------
# 1. The process


@dataclass(frozen=True)
class HOLD:
    """The forward process; HOLD() has order 3 at critical damping. Times are numbers or tensors of any shape, >= 0."""

    order: int = 3  # n, blocks of the state, 1 to 8
    gamma: tuple | None = None  # n - 1 rotation speeds, > 0; None: critical damping
    xi: float | None = None  # friction, > 0; None: critical damping
    var: float = 1.0  # prior variance of every block, > 0
    alpha: float = 0.04  # the auxiliary blocks start with variance alpha var, > 0
    first: float = 6.0  # T, first time of every sampler; SNR(T) < 1e-3 at critical damping
    snr_max: float = 4e4  # SNR at `last`: noise of std .005 on the data, less than an 8-bit grey level, 2/255
    target: str = "data"  # what the network learns: "data", x from y; or from m the paper's "noise", eps_n
    sigma_data: float = 0.5  # standard deviation of the data, .1 to 5; `ode` alone also from .03 to 30
    bound: float = math.inf  # largest |x| of the data (images: 1); data predictions are kept within it

    def __post_init__(self):
        if self.order not in range(1, 9):
            raise ValueError(f"order counts blocks of the state and must be an integer from 1 to 8, got {self.order}")
        gamma, xi = self.damping
        fits = isinstance(gamma, tuple) and len(gamma) == self.n - 1
        if not fits or not all(0 < v < math.inf for v in (*gamma, xi, self.var, self.alpha, self.first)):
            raise ValueError(f"HOLD wants a tuple of {self.n - 1} gammas, xi, var, alpha, first, all > 0, got {self}")
        if not (self.bound > 0 and 0 < self.sigma_data < math.inf and self.target in ("data", "noise")):
            raise ValueError(f"HOLD wants bound > 0, sigma_data > 0 and target data or noise, got {self}")
        snr = float(self.snr(self.first)) * self.sigma_data**2
        if not 0 < snr < 1e-2 < self.snr_max < math.inf:  # else the prior would miss too much of the data
            raise ValueError(f"want 0 < sigma_data^2 SNR(T) < .01 < snr_max, got {snr:.2g}, T = first = {self.first:g}")

    @property
    def n(self):
        """Blocks of the state."""
        return int(self.order)

    @property
    def is_critical(self):
        return self.gamma is None and self.xi is None

    @property
    def damping(self):
        """gamma (n - 1,) and xi in use; where none are given, those that make all n eigenvalues of F equal."""
        n, lam2 = self.n, max(2 * self.n - 3, 1)
        gamma = tuple(math.sqrt(lam2 * (n**2 - i**2) / (4 * i**2 - 1)) for i in range(n - 1, 0, -1))
        return gamma if self.gamma is None else self.gamma, n * math.sqrt(lam2) if self.xi is None else self.xi

    @property
    def drift(self):
        """(n, n): F."""
        gamma, xi = self.damping
        F = torch.zeros(self.n, self.n, **F64)
        for i, rate in enumerate(gamma):
            F[i, i + 1], F[i + 1, i] = rate, -rate
        F[-1, -1] = -xi
        return F

    @property
    def prior_cov(self):
        """(n, n): covariance of the blocks in the prior."""
        return self.var * torch.eye(self.n, **F64)

    def transition(self, t, column=slice(None)):
        """(..., n, n): exp(F t), or one column of it (..., n), which takes half the time."""
        t = torch.as_tensor(t, **F64)
        if not ((t >= 0) & (t < math.inf)).all():
            raise ValueError(f"HOLD time runs from 0 (data) to `first` (prior), got {t.min():g} to {t.max():g}")
        if not self.is_critical:
            return torch.linalg.matrix_exp(self.drift * t[..., None, None])[..., column]
        lam, powers = -self.damping[1] / self.n, range(self.n)
        N = self.drift - lam * torch.eye(self.n, **F64)
        terms = torch.stack([torch.linalg.matrix_power(N, k) / math.factorial(k) for k in powers])
        return torch.tensordot(torch.stack([torch.exp(lam * t) * t**k for k in powers], -1), terms[..., column], 1)

    def mean(self, t):
        """(..., n): mu = exp(F t) e_1."""
        return self.transition(t, 0)

    def cov(self, t):
        """(..., n, n): L L^T, from the factor, which keeps the digits at small t."""
        L = self.cholesky(t)
        return L @ L.mT

    def cholesky(self, t):
        """(..., n, n): lower L with L L^T = cov(t).

        At early times S0 and the noise of [0, t] are stacked in square-root form, where nothing cancels; at late times
        cov is nearly var I, and the small entries keep their digits only if computed as the difference from that.
        """
        E, eye = self.transition(t), torch.eye(self.n, **F64)
        S0 = torch.full((self.n,), self.alpha * self.var, **F64)
        S0[0] = 0
        early = lower(torch.cat([E * S0.sqrt(), self.noise_factor(t)], -1))
        gap = (E * (S0 - self.var)) @ E.mT
        is_late = gap.abs().amax((-2, -1), keepdim=True) < self.var / 4
        return torch.where(is_late, torch.linalg.cholesky(self.var * eye + gap * is_late), early)

    def noise_factor(self, t):
        """(..., n, K): Q with Q Q^T = 2 xi var int_0^t exp(F s) e_n e_n^T exp(F s)^T ds, a column per node s.

        40 nodes resolve |F| t <= 16, at critical damping |lam| t <= 24; longer times are reached by doubling, Q(2t)
        Q(2t)^T = exp(F t) Q Q^T exp(F t)^T + Q Q^T.
        """
        t, xi = torch.as_tensor(t, **F64), self.damping[1]
        longest = 24 * self.n / xi if self.is_critical else 16 / float(torch.linalg.matrix_norm(self.drift, 2))
        doublings = max(0, math.ceil(math.log2(max(float(t.max()), longest) / longest)))
        t = t / 2**doublings
        s, ds = gauss_legendre(0.0, 1.0, 40)
        Q = self.transition(t[..., None] * s, -1).mT * (2 * xi * self.var * t[..., None] * ds).sqrt()[..., None, :]
        for i in range(doublings):
            Q = lower(torch.cat([self.transition(t * 2**i) @ Q, Q], -1))
        return Q

    def snr(self, t):
        """(...): mu^T cov^-1 mu = |L^-1 mu|^2."""
        mean = self.mean(t)[..., None]
        return torch.linalg.solve_triangular(self.cholesky(t), mean, upper=False).square().sum((-2, -1))

    def time_of_snr(self, snr):
        """t (...) from `first` to `last` at which the SNR is nearest to `snr`, by straight lines between 2,000 knots of
        the logarithms."""
        snr = np.clip(torch.as_tensor(snr, **F64).numpy(), 1e-99, self.snr_max)
        return torch.from_numpy(np.asarray(np.exp(np.interp(np.log(snr), *self.knots))))

    @cached_property
    def knots(self):
        """log SNR (2000,), rising, and log t (2000,), falling from log `first` to where the SNR is above snr_max."""
        t = self.first
        while self.snr(t) < self.snr_max:
            t /= 2
        log_t = torch.linspace(math.log(self.first), math.log(t), 2000, **F64)
        return self.snr(log_t.exp()).log().numpy(), log_t.numpy()

    @property
    def last(self):
        """The last time of every sampler, where the SNR is snr_max; the last x_hat removes what noise is left."""
        return float(self.time_of_snr(self.snr_max))

    def prior(self, shape, generator=None, device=None):
        """(B, nC, ...) float32: the state at `first` for data of shape (B, C, ...)."""
        shape, device = (shape[0], self.n * shape[1], *shape[2:]), device or getattr(generator, "device", None)
        eps = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
        return mix(torch.linalg.cholesky(self.prior_cov), eps)


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


@lru_cache(1000)
def affine(process, t):
    """w (n,) and b () of eps_n = w . m + b x at time t, a number: w is the last row of L^-1."""
    e_n = torch.eye(process.n, **F64)[:, -1:]
    w = torch.linalg.solve_triangular(process.cholesky(t).mT, e_n, upper=True)[:, 0]
    return w, -w @ process.mean(t)


def hop(process, eps_n, m, t):
    """Sampling-hop (not in the paper): the x (B, C, ...) that leaves the noise eps_n. Near T it divides the error of a
    network by a b close to 0: a finite `bound` stops the strays."""
    w, b = affine(process, t)
    return (eps_n - mix(w[None], m)) / float(b)


def training_pair(process, x, t, eps):
    """State m (B, nC, ...) and label eps_n (B, C, ...) at times t (B,) with noise eps (B, nC, ...)."""
    m = mix(process.mean(t)[..., None], x) + mix(process.cholesky(t), eps)
    return m, eps.chunk(process.n, 1)[-1]


def loss(process, net, x, label=None):
    """A scalar to minimise; x (B, C, ...) float. Target "data": `denoiser_loss`. Else the paper's: E|net - eps_n|^2 per
    dimension, t even in log(1 + 10 sqrt(SNR)): even in t, a high order would hardly see low noise.

    Both have the same minimiser: with eps_theta = w . m + b D, |eps_theta - eps_n|^2 = b^2 |D - x|^2. They differ in
    the weight and in the distribution of noise levels, and the denoiser sees y alone. A network that returns 0 has the
    loss 1.
    """
    if x.ndim < 2:
        raise ValueError(f"data have the shape (B, C, ...), numbers (B, 1), got {tuple(x.shape)}")
    if process.target == "data":
        return denoiser_loss(process, net, x, label)
    low, high = lam(process, process.first, 10.0), lam(process, process.last, 10.0)
    t = process.time_of_snr(((low + (high - low) * stratified(len(x))).expm1() / 10) ** 2)
    m, target = training_pair(process, x, t, torch.randn_like(torch.cat([x] * process.n, 1)))
    return ((called(net, m, t.to(x), label, x) - target) ** 2).mean()


def stratified(n):
    """n uniform numbers in random order, one in each n-th of [0, 1]: a batch covers all times."""
    return (torch.randperm(n, device="cpu") + torch.rand(n, **F64)) / n


def called(net, m, t, label, x):
    """net(m, t, label), in the dtype of x. ValueError if it has another shape than x: it would be broadcast unseen."""
    out = net(m, t, label)
    if out.shape != x.shape:
        raise ValueError(f"the network returns {tuple(out.shape)} for data of shape {tuple(x.shape)}")
    return out.to(x)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The denoiser, the same for every process (Karras et al. 2022, sections 5 and B.6); z = y / sigma, finite at SNR 0


def denoiser_loss(process, net, x, label=None):
    """E[|D - x|^2 / c_out^2] per dimension, a scalar, ln sigma ~ N(-1.2, 1.2^2)."""
    u = stratified(len(x)).clamp(1e-9, 1 - 1e-9)
    snr = torch.exp(-2 * (-1.2 + 1.2 * torch.special.ndtri(u)))
    z = each(snr.sqrt(), x) + torch.randn_like(x)
    error = denoise_y(process, net, z, snr, label) - x
    return each(1 / process.sigma_data**2 + snr, error**2).mean()


def denoise_y(process, net, z, snr, label=None):
    """One network call: D = E[x | y] (B, C, ...) from z = y / sigma (B, C, ...) and snr (B,)."""
    s, root = process.sigma_data, snr.sqrt()
    c_in = 1 / (1 + s**2 * snr).sqrt()
    c_out = s * c_in
    c_skip = s**2 * root * c_in**2
    c_noise = 1 / (1 + root)  # ours: sigma / (1 + sigma), 0 at the data, 1 at pure noise
    return each(c_skip, z) + each(c_out, called(net, each(c_in, z), c_noise.to(z, non_blocking=z.is_cuda), label, z))


@lru_cache(1000)
def to_z(process, t):
    """w (1, n) and SNR () at time t (a number), with y / sigma = w . m: w = cov^-1 mu / sqrt(SNR)."""
    w = torch.cholesky_solve(process.mean(t)[:, None], process.cholesky(t))[:, 0]
    snr = w @ process.mean(t)
    return (w / snr.sqrt())[None], snr


def denoise(process, net, m, t, label=None):
    """One network call: x_hat = E[x | m] (B, C, ...) at time t (a number) from `first` to `last`."""
    if process.target == "data":
        w, snr = to_z(process, t)
        x = denoise_y(process, net, mix(w, m), snr.expand(len(m)), label)
    else:
        x = hop(process, called(net, m, m.new_full((len(m),), t), label, m.chunk(process.n, 1)[0]), m, t)
    return x.clamp(-process.bound, process.bound)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Samplers: m (B, nC, ...) from the prior -> x (B, C, ...), with exactly nfe calls of predict(m, t), no gradients.
# predict is functools.partial(denoise, process, net, label=label), or anything else that returns x_hat; it may change m
# in place, and the sampler goes on from there. The last x_hat is the sample: a cluster of standard deviation s keeps
# the share s^2 / (s^2 + sigma^2) of its variance, sigma the noise at the last call. rho and t_end, a time of the
# process, shape the grid of times; randn(x) draws unit noise shaped like x.


@torch.no_grad()
def em(process, predict, m, nfe, rho=1.0, t_end=None, randn=torch.randn_like):
    """SDE, Euler-Maruyama."""
    ts, xi, e_n = times(process, nfe, rho, t_end), process.damping[1], torch.eye(process.n, **F64)[:, -1:]
    for t, t_next in pairwise(ts):
        h, x_hat = t - t_next, predict(m, t)
        f = mix(force(process, t), torch.cat([m, x_hat], 1))
        push = 2 * xi * h * f + math.sqrt(2 * xi * process.var * h) * randn(f)
        m = m + mix(h * process.drift.mT, m) + mix(e_n, push)
    return predict(m, ts[-1])


@torch.no_grad()
def lie(process, predict, m, nfe, rho=1.0, t_end=None, randn=torch.randn_like):
    """SDE, Lie-Trotter splitting (the paper's): a step of linear flow, then the kick. Weak order 1.
    t_end ends the last step, where its call is."""
    for t, t_next in pairwise(times(process, nfe, rho, t_end, extra=1)):
        m = linear_flow(process, m, t - t_next, randn)
        x_hat = predict(m, t_next)
        m = mix(kick(process, t_next, t - t_next), torch.cat([m, x_hat], 1))
    return x_hat


@torch.no_grad()
def strang(process, predict, m, nfe, rho=1.0, t_end=None, randn=torch.randn_like):
    """SDE, Strang splitting: half a step of linear flow, the kick with x_hat at mid-step, half a step of linear flow.

    The force depends on the block it kicks, so x_hat is asked for half-way through the kick, where the one of the step
    before takes us: without that the scheme (CLD's SSCS) has weak order 1, with it 2, at the same one call a step. What
    predict changes in place is lost here, but at the first call. t_end ends the last step; its call is at mid-step.
    """
    x_hat = None
    for t, t_next in pairwise(times(process, nfe, rho, t_end, extra=1)):
        h, middle = t - t_next, (t + t_next) / 2
        m = linear_flow(process, m, h / 2, randn)
        half_way = m if x_hat is None else mix(kick(process, middle, h / 2), torch.cat([m, x_hat], 1))
        x_hat = predict(half_way, middle)
        m = linear_flow(process, mix(kick(process, middle, h), torch.cat([m, x_hat], 1)), h / 2, randn)
    return x_hat


def linear_flow(process, m, h, randn):
    """dm = F^T m |dt| + sqrt(2 xi var) e_n dW over h, drawn exactly."""
    E, L = linear_step(process, h)
    return mix(E, m) + mix(L, randn(m))


@lru_cache(1000)
def linear_step(process, h):
    """exp(F^T h) (n, n), and the factor (n, n) of its noise. F^T is F with every other block's sign changed, so its
    noise is the forward one's with those signs."""
    sign = (-1.0) ** torch.arange(process.n, **F64)[:, None]
    return process.transition(h).mT, sign * lower(process.noise_factor(h))


def force(process, t):
    """(1, n + 1): f = m_n + var grad_n log p(m | x) as a combination of the blocks of cat(m, x)."""
    w, b = affine(process, t)
    eps_n = torch.cat([w, b[None]])
    return (torch.eye(process.n + 1, **F64)[-2] - process.var * w[-1] * eps_n)[None]  # w_n is 1/L_nn


@lru_cache(1000)
def kick(process, t, h):
    """(n, n + 1), on cat(m, x): dm_n = 2 xi f |dt| over h at frozen t and x, solved exactly: df/d|dt| = a f, a < 0
    for alpha <= 1, and at low noise so far below 0 that an Euler step would be unstable."""
    xi, f, eye = process.damping[1], force(process, t), torch.eye(process.n, process.n + 1, **F64)
    a = 2 * xi * float(f[0, -2])  # d(2 xi f) / dm_n
    growth = math.expm1(a * h) / a if a else h
    return eye + 2 * xi * growth * eye[:, [-2]] * f


@torch.no_grad()
def ode(process, predict, m, nfe, data_mean=None, rho=1.0, t_end=None):
    """ODE, for few steps, the default: DDIM for this process, second order; with data_mean the first step is free.

    m = mu x_hat + L eps goes to mu' x_hat + L' eps = A m + b x_hat (`ddim_step`). In units of L the step is d(L^-1 m) =
    x_hat d(L^-1 mu), and |L^-1 mu| = sqrt(SNR). Over it x_hat is taken as linear in lambda = log(1 + R sqrt(SNR)), in
    which the grid is even: x_0 + slope (lambda - lambda_0). Its mean by d sqrt(SNR) ~ e^lambda dlambda is x_0 + c
    slope, c = h / (1 - e^-h) - 1, for the step h; where L^-1 mu turns, this is near enough for second order.
    R = sigma_data sqrt(2 d) is about the distance of two samples of d numbers: noise of that size hides which is which.
    data_mean: before the first call nothing is known, so the first x_hat is the mean of the data, a number, (C, ...) or
    (B, C, ...), for free. A wrong mean moves the samples. None: a call, one of the nfe.
    After each call but the last the step that led to it is repeated with the new slope, and x_hat is corrected to first
    order by dE[x | y]/dy = s^2 / (s^2 + sigma^2) of Gaussian data, s = sigma_data (after UniPC). It costs no call.
    """
    R = process.sigma_data * math.sqrt(2 * m[0].numel() / process.n)
    ts = times(process, nfe, rho, t_end, R, extra=data_mean is not None and nfe > 1)
    if len(ts) > nfe:
        x = torch.zeros_like(m.chunk(process.n, 1)[0]) + torch.as_tensor(data_mean, dtype=m.dtype, device=m.device)
    else:
        x = predict(m, ts[0])
    slope = 0.0
    for t, t_next in pairwise(ts):
        A, b, h, follow = ddim_step(process, t, t_next, R)
        c = h / -math.expm1(-h) - 1
        ahead = x + c * slope
        m = mix(A, m) + mix(b, ahead)
        x_next = predict(m, t_next)
        if t_next != ts[-1]:
            shift = x + c * (x_next - x) / h - ahead
            m, x_next = m + mix(b, shift), x_next + follow * shift
        x, slope = x_next, (x_next - x) / h
    return x


@lru_cache(1000)
def ddim_step(process, t, t_next, R):
    """A (n, n) and b (n, 1) that take m to t_next at the noise that x_hat leaves; h, the step in lambda; and the rate
    at which x_hat at t_next follows a change of the one that led there."""
    A = torch.linalg.solve_triangular(process.cholesky(t), process.cholesky(t_next), upper=False, left=False)
    b = (process.mean(t_next) - A @ process.mean(t))[:, None]
    (w, snr), s2 = to_z(process, t_next), process.sigma_data**2
    follow = float(s2 * snr.sqrt() / (1 + s2 * snr) * (w @ b))
    return A, b, lam(process, t_next, R) - lam(process, t, R), follow


@lru_cache(1000)
def lam(process, t, R):
    """lambda (a float) = log(1 + R sqrt(SNR)): about R sqrt(SNR) where that is below 1, its logarithm above."""
    return math.log1p(R * float(process.snr(t).sqrt()))


@lru_cache(1000)
def times(process, nfe, rho, t_end, R=None, extra=0):
    """nfe + extra times from `first` to t_end, even in lambda^(1/rho). Default end: where y has noise of standard
    deviation 1/(3 nfe), or less if the data's is below 1/2, but at most `last`."""
    noise = min(1.0, 2 * process.sigma_data) / (3 * max(nfe, 1))
    t_end = float(process.time_of_snr(noise**-2)) if t_end is None else t_end
    check_grid(process, nfe, rho, t_end, any_scale=R is not None)
    R = R or 10.0
    a, b = (lam(process, t, R) ** (1 / rho) for t in (process.first, t_end))
    u = torch.linspace(a, b, nfe + extra, **F64)[1:-1] ** rho
    return (process.first, *process.time_of_snr((u.expm1() / R) ** 2).tolist(), t_end)[: nfe + extra]


def check_grid(process, nfe, rho, t_end, any_scale=False):
    """ValueError for what no grid of times can have, and, but for `ode`, for data whose scale the steps do not fit."""
    low, high = sorted([process.first, process.last])
    if nfe < 1:
        raise ValueError(f"nfe counts network calls and must be at least 1, got {nfe}")
    if not (0.01 <= rho <= 100 and low <= t_end <= high and t_end != process.first):
        raise ValueError(f"want 0.01 <= rho <= 100, and t_end from {low:g} to {high:g}, got {rho=}, {t_end=}")
    if not (any_scale or 0.1 <= process.sigma_data <= 5):
        raise ValueError(f"sigma_data must be from .1 to 5, or use `ode`; got {process.sigma_data:g}: rescale the data")


@lru_cache(1000)
def gauss_legendre(a, b, nodes=16):
    """Nodes and weights (nodes,) on [a, b]."""
    x, w = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(nodes))
    return (a + b) / 2 + (b - a) / 2 * x, (b - a) / 2 * w


SAMPLERS = {"ode": ode, "strang": strang, "lie": lie, "em": em}  # the first is the default
