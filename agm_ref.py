"""AGM, the phase stochastic bridge, in one file: process -> target and loss -> denoiser -> samplers.

"Generative Modeling with Phase Stochastic Bridges", Chen et al., ICLR 2024, arXiv 2310.07805. The paper writes x1 for
our data x, and (x, v) for our state (q, v).

    process = AGM(sigma_data=0.5)                      # standard deviation of the data, which are centred
    loss(process, net, x).backward()                   # in your training loop; net(y, t, label) -> like x
    predict = functools.partial(denoise, process, net)
    x = ode(process, predict, process.prior((64, 3, 32, 32)), nfe=20, data_mean=mean)

1. The process. A particle with position q and velocity v starts as noise at t = 0 and is steered to a data point x at
t = 1; tau = 1 - t:

    dq = v dt,    dv = a dt + g dW,    g = p tau,    (q, v) at 0 ~ N(0, [[1, k], [k, 1]])
    a* = (4/tau) ((x - q)/tau - v)

All dimensions of the data behave alike; the vectors and matrices below act on the two blocks q and v. The path that
ends at (x, u) after the time tau and has the least int |a|^2 dt is a cubic, which starts with a = 6 (x - q)/tau^2 -
(4 v + 2 u)/tau; u = (x - q)/tau, the velocity of the straight line, gives a*, and it is planned anew at every t. Under
a* the error e = q - x obeys e'' = -4 e/tau^2 - 4 e'/tau. Try e = tau^j: j (j - 1) = 4 j - 4, so j is 1 or 4, and

    (e, v) = M c,    M = [[tau, tau^4], [-1, -4 tau^3]],    c the amplitudes of the two

where c is constant but for the noise: a kick dv adds dc = M^-1 (0, dv) = dv/3 (1, -1/tau^3). So, given x, the state m =
(q, v) is Gaussian: m = mu x + L eps, eps ~ N(0, I), with mu = (1, 0) + M M(0)^-1 (-1, 0) and L L^T = M Cov(c) M^T.

2. The paper's target is the drift of v: F = a* for the SDE, F = a* - g^2/2 grad_v log p(m | x) for the ODE of the same
law. Both are F = w . m + b x, so a prediction of E[F | m] is one of E[x | m], and back. With m = mu x + L eps,
F = 4 tau^2 x + r . eps, r = L^T w. The network learns F/s, s = |r|, whose noise part has unit variance.

3. The default target is the data, by a plain denoiser. y = mu^T cov^-1 m / SNR, SNR = mu^T cov^-1 mu, is a sufficient
statistic: m depends on x only through it. It is x + sigma noise, sigma = SNR^-1/2, so E[x | m] = E[x | y]: one network,
trained on plain noise, serves AGM, HOLD of any order, and every sampler. Its loss knows nothing of AGM.

4. Samplers ask for x_hat(m, t) = E[x | m] and nothing else. Two ODEs have the law of m and serve here. That of item 2
is `exponential`'s. `ode` is DDIM for this process: split m into mu x_hat + L eps, keep eps, put it back together at the
next time. For fixed x this keeps eps fixed; its velocity averaged over p(x | m) gives a flow with the same marginals,
as in flow matching. From the same start the two end at different samples.

    symbol     here            shape         meaning
    m          m               (B, nC, ...)  state cat(q, v), n = 2; x (B, C, ...): images in [-1, 1], points of scale 1
    p, k       AGM.p, AGM.k    ()            diffusion scale; covariance of q and v in the prior (the authors' k is -k)
    mu         mean(t)         (..., n)      mean of the blocks per unit of x
    Sigma, L   cov, cholesky   (..., n, n)   covariance of the blocks given x, and its lower factor
    w, b       affine(t)       (..., n), ()  F = w . m + b x
    x_hat      predict(m, t)   (B, C, ...)   E[x | m], what a sampler is given: `denoise` with your network
    F_theta    s * net         (B, C, ...)   target "ode" or "sde": net(m, t, label), t (B,) is the time of the process
    D          denoise_y       (B, C, ...)   target "data": E[x | y]; net(c_in y, t, label), t = sigma / (1 + sigma)

Coefficients are float64 on the CPU, F64, and become those of the state's dtype and device where they meet it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch

F64 = {"dtype": torch.float64, "device": "cpu"}

# ---------------------------------------------------------------------------------------------------------------------
# 1. The process


@dataclass(frozen=True)
class AGM:
    """The bridge; AGM() has the paper's p and k. Times are numbers or tensors of any shape (...), in [0, 1)."""

    p: float = 3.0  # diffusion scale, > 0
    k: float = -0.2  # prior covariance of q and v, |k| < 1
    first: float = 1e-5  # first and last time of sampling, and of the paper's training
    last: float = 0.999
    target: str = "data"  # what the network learns: "data", x from y; or from m the paper's F/s of the "ode" or "sde"
    sigma_data: float = 0.5  # standard deviation of the data, .1 to 5; `ode` alone also from .03 to 30
    bound: float = math.inf  # largest |x| of the data (images: 1); data predictions are kept within it
    n: ClassVar[int] = 2  # blocks of the state

    def __post_init__(self):
        if not (0 < self.p < math.inf and abs(self.k) < 1 and 0 < self.first < self.last < 1):
            raise ValueError(f"AGM wants p > 0, |k| < 1 and 0 < first < last < 1, got {self}")
        if not (self.bound > 0 and 0 < self.sigma_data < math.inf and self.target in ("data", "ode", "sde")):
            raise ValueError(f"AGM wants bound > 0, sigma_data > 0 and target data, ode or sde, got {self}")

    @property
    def prior_cov(self):
        """(n, n): covariance of the blocks in the prior."""
        return torch.tensor([[1.0, self.k], [self.k, 1.0]], **F64)

    def modes(self, t):
        """tau (...), M (..., 2, 2) and Cov(c) (..., 2, 2). ValueError for t outside of [0, 1)."""
        t = torch.as_tensor(t, **F64)
        if not ((t >= 0) & (t < 1)).all():
            raise ValueError(f"AGM time runs from 0 (prior) to 1 (data, excluded), got {t.min():g} to {t.max():g}")
        tau, log_tau = 1 - t, torch.log1p(-t)
        M = matrix([[tau, tau**4], [-torch.ones_like(tau), -4 * tau**3]])
        M0_inv = torch.tensor([[4.0, 1.0], [-1.0, -1.0]], **F64) / 3
        # int_0^t dc dc^T = p^2/9 int tau^2 (1, -tau^-3) (1, -tau^-3)^T dt
        kicks = matrix([[-torch.expm1(3 * log_tau), 3 * log_tau], [3 * log_tau, torch.expm1(-3 * log_tau)]])
        return tau, M, M0_inv @ self.prior_cov @ M0_inv.T + self.p**2 / 27 * kicks

    def mean(self, t):
        """(..., n): mu = (1 - 4 tau/3 + tau^4/3, 4/3 (1 - tau^3)), written in t, where nothing cancels."""
        t = torch.as_tensor(t, **F64)
        return torch.stack([t**2 * (6 - 4 * t + t**2), 4 * t * (3 - 3 * t + t**2)], -1) / 3

    def cov(self, t):
        """(..., n, n): L L^T."""
        L = self.cholesky(t)
        return L @ L.mT

    def cholesky(self, t):
        """(..., n, n): lower L. L_vv = |det M| sqrt(det Cov(c)) / L_qq, |det M| = 3 tau^4, so that nothing cancels."""
        tau, M, C = self.modes(t)
        S = M @ C @ M.mT
        Lqq = S[..., 0, 0].sqrt()
        det = C[..., 0, 0] * C[..., 1, 1] - C[..., 0, 1] ** 2
        return matrix([[Lqq, torch.zeros_like(Lqq)], [S[..., 0, 1] / Lqq, 3 * tau**4 * det.sqrt() / Lqq]])

    def snr(self, t):
        """(...): mu^T cov^-1 mu = |L^-1 mu|^2."""
        mean = self.mean(t)[..., None]
        return torch.linalg.solve_triangular(self.cholesky(t), mean, upper=False).square().sum((-2, -1))

    def time_of_snr(self, snr):
        """t (...) from `first` to `last` at which the SNR is nearest to `snr`, by bisection."""
        snr = torch.as_tensor(snr, **F64)
        low, high = torch.full_like(snr, self.first), torch.full_like(snr, self.last)
        for _ in range(60):
            middle = (low + high) / 2
            early = self.snr(middle) < snr
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return high

    def prior(self, shape, generator=None, device=None):
        """(B, nC, ...) float32: the state at `first` for data of shape (B, C, ...)."""
        shape, device = (shape[0], self.n * shape[1], *shape[2:]), device or getattr(generator, "device", None)
        eps = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
        return mix(torch.linalg.cholesky(self.prior_cov), eps)


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


def affine(process, t, sde):
    """w (..., n) and b (...) of F = w . m + b x: a*, and for the ODE g^2/2 times row v of cov^-1 (m - mu x)."""
    t = torch.as_tensor(t, **F64)
    tau = 1 - t
    w, b = torch.stack([-4 / tau**2, -4 / tau], -1), 4 / tau**2
    if not sde:
        row = ((process.p * tau) ** 2 / 2)[..., None] * torch.cholesky_inverse(process.cholesky(t))[..., 1, :]
        w, b = w + row, b - (row * process.mean(t)).sum(-1)
    return w, b


def noise_part(process, t, sde):
    """r (..., n) of F = 4 tau^2 x + r . eps, by m = mu x + L eps: r = L^T w; 4 tau^2 is w . mu + b."""
    w, _ = affine(process, t, sde)
    return (process.cholesky(t).mT @ w[..., None])[..., 0]


@lru_cache(1000)
def acceleration(process, t, sde):
    """(1, n + 1): F as a combination of the blocks of cat(m, x), at time t, a number."""
    w, b = affine(process, t, sde)
    return torch.cat([w, b[None]])[None]


def hop(process, F, m, t):
    """The paper's sampling-hop: the x (B, C, ...) that F, of the process's target, steers to."""
    w, b = affine(process, t, process.target == "sde")
    return (F - mix(w[None], m)) / float(b)


def training_pair(process, x, t, eps):
    """State m (B, nC, ...) and label F/s (B, C, ...) at times t (B,) with noise eps (B, nC, ...)."""
    m = mix(process.mean(t)[..., None], x) + mix(process.cholesky(t), eps)
    r = noise_part(process, t, process.target == "sde")
    F = each(4 * (1 - t) ** 2, x) + mix(r[:, None], eps)
    return m, each(1 / r.norm(dim=-1), F)


def loss(process, net, x, label=None):
    """A scalar to minimise; x (B, C, ...) float. Target "data": `denoiser_loss`. Else the paper's, with its label in
    units of s: E[(1 - t) |net - F/s|^2] per dimension, t uniform from `first` to `last`.

    Both have the same minimiser: with F_theta = w . m + b D, |F_theta - F|^2 = b^2 |D - x|^2. They differ in the weight
    and in the distribution of noise levels, and the denoiser sees y alone. A network that returns 0 has the loss 1;
    for "ode" and "sde" .5 to .8, if the data's standard deviation is at most 1.
    """
    if x.ndim < 2:
        raise ValueError(f"data have the shape (B, C, ...), numbers (B, 1), got {tuple(x.shape)}")
    if process.target == "data":
        return denoiser_loss(process, net, x, label)
    t = process.first + (process.last - process.first) * stratified(len(x))
    m, target = training_pair(process, x, t, torch.randn_like(torch.cat([x] * process.n, 1)))
    return each(1 - t, (called(net, m, t.to(x), label, x) - target) ** 2).mean()


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
        s = float(noise_part(process, t, process.target == "sde").norm())
        x = hop(process, s * called(net, m, m.new_full((len(m),), t), label, m.chunk(process.n, 1)[0]), m, t)
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
    ts = even_times(process, nfe, rho, t_end)
    for t, t_next in pairwise(ts):
        h, x_hat = t_next - t, predict(m, t)
        q, v = m.chunk(2, 1)
        F = mix(acceleration(process, t, sde=True), torch.cat([m, x_hat], 1))
        m = torch.cat([q + h * v, v + h * F + process.p * (1 - t) * math.sqrt(h) * randn(v)], 1)
    return predict(m, ts[-1])


@torch.no_grad()
def splitting(process, predict, m, nfe, rho=1.0, t_end=None, randn=torch.randn_like):
    """SDE, symmetric splitting (the paper's SSS): half a step of free motion, the kick v += h F, half a step of free
    motion. First order in law, as F contains v. t_end ends the last step (default: `last`); calls are at mid-step."""
    for t, t_next in pairwise(even_times(process, nfe, rho, process.last if t_end is None else t_end, extra=1)):
        h, middle = t_next - t, (t + t_next) / 2
        m = free_motion(process, m, t, h / 2, randn)
        x_hat = predict(m, middle)
        q, v = m.chunk(2, 1)
        m = torch.cat([q, v + h * mix(acceleration(process, middle, sde=True), torch.cat([m, x_hat], 1))], 1)
        m = free_motion(process, m, middle, h / 2, randn)
    return x_hat


def free_motion(process, m, t, h, randn):
    """dq = v dt, dv = g dW over [t, t + h], drawn exactly."""
    (q, v), L = m.chunk(2, 1), free_noise(process, t, h)
    return torch.cat([q + h * v, v], 1) + mix(L, randn(m))


@lru_cache(1000)
def free_noise(process, t, h):
    """(2, 2): rows q and v of what `free_motion` adds per unit noise. A kick dv at t + u has moved q by (h - u) dv."""
    u, du = gauss_legendre(0.0, h)
    Q = process.p * (1 - t - u) * du.sqrt() * torch.stack([h - u, torch.ones_like(u)])
    return torch.linalg.cholesky(Q @ Q.mT)


@torch.no_grad()
def exponential(process, predict, m, nfe, multistep=2, rho=1.0, t_end=None):
    """ODE, the paper's exponential Adams-Bashforth: N = F/s of the last `multistep` calls (1 to 4, else ValueError) is
    extrapolated, q += h v + int (t_next - u) s(u) N(u) du, v += int s(u) N(u) du. Second order for multistep > 1, as it
    starts with an Euler step. The paper's on CIFAR-10: multistep 3, rho 2, t_end .4, .7, .9 for nfe 5, 10, 20."""
    if multistep not in (1, 2, 3, 4):
        raise ValueError(f"multistep must be 1, 2, 3 or 4, got {multistep}")
    ts, past = even_times(process, nfe, rho, t_end), []  # past: (time, F) of the last calls
    for t, t_next in pairwise(ts):
        x_hat = predict(m, t)
        F = mix(acceleration(process, t, sde=False), torch.cat([m, x_hat], 1))
        past = [*past, (t, F)][-multistep:]
        at, F = zip(*past, strict=True)
        m = mix(adams_weights(process, at, t, t_next), torch.cat([m, *F], 1))
    return predict(m, ts[-1])


@lru_cache(1000)
def adams_weights(process, at, t, t_next):
    """(2, 2 + calls), on cat(m, F at each time of `at`): (q + h v, v), and what each F adds to it, int (t_next - u, 1)
    s(u) l(u) du / s(its time), l its Lagrange polynomial, by Gauss-Legendre."""

    def s(t):
        return noise_part(process, t, sde=False).norm(dim=-1)

    u, du = gauss_legendre(t, t_next)
    basis = torch.stack([math.prod([(u - b) / (a - b) for b in at if b != a], start=torch.ones_like(u)) for a in at])
    force = du * s(u) * basis / s(torch.tensor(at, **F64))[:, None]
    free = torch.tensor([[1.0, t_next - t], [0.0, 1.0]], **F64)
    return torch.cat([free, torch.stack([((t_next - u) * force).sum(-1), force.sum(-1)])], 1)


def even_times(process, nfe, rho, t_end, extra=0):
    """nfe + extra times from `first` to t_end (default: where 1.5 steps are left, or `last`), even in t^(1/rho)."""
    t_end = min(1 - 1.5 / max(nfe + extra, 2), process.last) if t_end is None else t_end
    check_grid(process, nfe, rho, t_end)
    u = torch.linspace(process.first ** (1 / rho), t_end ** (1 / rho), nfe + extra, **F64)[1:-1] ** rho
    return (process.first, *u.tolist(), t_end)[: nfe + extra]


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


SAMPLERS = {"ode": ode, "exponential": exponential, "splitting": splitting, "em": em}  # the first is the default
