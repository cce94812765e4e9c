"""AGM, the phase stochastic bridge, in one file: process, the paper's target, denoiser, samplers.

"Generative Modeling with Phase Stochastic Bridges", Chen et al., ICLR 2024, arXiv 2310.07805.
The paper writes x1 for our data x, and (x, v) for our state (q, v).

    data = data - data.mean(0)
    data = data / data.std()                            # centred, of unit scale
    process = AGM(sigma_data=1.0)                       # images in [-1, 1]: sigma_data=std, bound=1
    loss(process, net, x).backward()                    # a batch x; net(noisy, t, label) -> like x
    predict = functools.partial(denoise, process, net)  # label=... for a net with classes
    x = ode(process, predict, process.prior((64, 3, 32, 32)), nfe=20, data_mean=0.0)

Images need not be centred, but then their mean is the data_mean of the last line.

Here the data x are (64, 3, 32, 32), the state m = cat(q, v) is (64, 6, 32, 32), and what the
network sees and returns is (64, 3, 32, 32) again.


1. The process

A particle with position q and velocity v starts as noise at t = 0 and is steered to a data point
x at t = 1. With tau = 1 - t, the time that is left:

    dq = v dt
    dv = a* dt + g dW,     g = p tau
    (q, v) at t = 0  ~  N(0, [[1, k], [k, 1]])

Which acceleration a*? Of all paths that reach position x with velocity v_end after the time tau,
the one with the least int |a|^2 is a cubic: its fourth derivative is zero. Position and velocity
at both ends fix the cubic q + v s + a s^2/2 + b s^3/6, 0 < s < tau: x - q = v tau + a tau^2/2 +
b tau^3/6, and v_end = v + a tau + b tau^2/2. The first minus tau/3 of the second has no b, and so
the cubic starts with the acceleration

    a = 6 (x - q)/tau^2 - (4 v + 2 v_end)/tau

The paper chooses v_end = (x - q)/tau, the velocity of the straight line, and plans anew at every t:

    a* = (4/tau) ((x - q)/tau - v)

(It is a choice. With v_end left free the cubic ends without acceleration, a + b tau = 0, and the 4
is a 3: the momentum Brownian bridge.)

Under a* the error e = q - x obeys e'' = -4 e/tau^2 - 4 e'/tau. Try e = tau^j, with dtau/dt = -1:
j (j - 1) = 4 j - 4, so j is 1 or 4. Error and velocity are therefore

    (e, v) = M beta,     M = [[tau,    tau^4],
                              [ -1, -4 tau^3]],     beta (2,): the amplitudes of the two modes

    det M = -3 tau^4,     M^-1 = 1/3 [[4/tau, 1], [-tau^-4, -tau^-3]]

Without noise beta is constant. A kick dv changes it by M^-1 (0, dv) = dv/3 (1, -tau^-3), and kicks
have the variance p^2 tau^2 dt. Given x, (e, v) has the covariance of (q, v). So Cov(beta) is at
first M(0)^-1 [[1, k], [k, 1]] M(0)^-T, and the kicks add to it

    p^2/9 int_0^t tau^2 (1, -tau^-3) (1, -tau^-3)^T dt = p^2/27 [[1 - tau^3,    3 ln tau],
                                                              [3 ln tau,  tau^-3 - 1]]

All of this is linear and Gaussian. Given x, the state is

    m = mu x + L eps,     eps ~ N(0, I)
    mu = (1, 0) + M M(0)^-1 (-1, 0) = (1 - 4 tau/3 + tau^4/3, 4/3 (1 - tau^3))
    L L^T = Sigma = M Cov(beta) M^T,     L lower

where (-1, 0) is the mean of (e, v) at t = 0, per unit of x. The dimensions of the data do not
interact: mu (2,) and L (2, 2) act on the blocks q and v. At t = .5, mu = (.354, 1.167).


2. What the paper's network learns

F, the drift of v given x: a* for the SDE, and a* - g^2/2 grad_v log p(m | x) for the ODE with the
same marginals. What samples is its mean over p(x | m): p(m) is the mean of p(m | x) over x, and so
is its flux. E[F | m] p(m) is the mean of F p(m | x), so E[F | m] moves p(m).

As grad log p(m | x) = -Sigma^-1 (m - mu x), both have the form F = w . m + w_x x. (w_x > 0: plain
for a*, checked in numbers for the other.) So whoever predicts E[F | m] predicts E[x | m], and vice
versa. Insert m = mu x + L eps: F = (w . mu + w_x) x + (L^T w) . eps. At eps = 0 the score is 0 and
a* is the acceleration of the mean, dmu_v/dt = 4 tau^2 per unit of x. So that is the bracket:

    F = 4 tau^2 x + r . eps,     r = L^T w

The network learns F/|r|, whose noise part has unit variance.


3. What our network learns: the data

    log p(m | x) = x mu^T Sigma^-1 m - x^2 SNR/2 + (terms without x),     SNR = mu^T Sigma^-1 mu

As a function of x it depends on m only through y = mu^T Sigma^-1 m / SNR: y is a sufficient
statistic, and E[x | m] = E[x | y]. Given x, y ~ N(x, sigma^2) with sigma = SNR^-1/2: a network
trained to remove plain noise serves AGM, HOLD of any order, and every sampler. Its loss uses
neither mu nor Sigma.


4. How samples are drawn

A sampler asks for x_hat(m, t) = E[x | m] and for nothing else. Of the many ODEs with the marginals
of m two are here. `exponential` takes that of section 2. `ode` follows another: given x, a path
that keeps its eps has dm/dt = mu' x + L' L^-1 (m - mu x). The mean of that over p(x | m) has x_hat
in place of x, and is a flow with the same marginals, as in flow matching. So `ode` is DDIM: write m
as mu x_hat + L eps, keep eps, and recombine at the next time.

With 5 calls, sigma_data = 0.5 and points of 2 dimensions `ode` visits

    t       1e-5   .197   .405   .551   .652   .727
    sigma   24495  1.35   .492   .234   .122   .067
    mu_q    .000   .068   .248   .414   .541   .638

(Near t = 0, mu = (2 t^2, 4 t) and so sigma = sqrt(1 - k^2)/(4 t).) The first time costs no call:
nothing is known yet, and x_hat is the mean of the data.

    symbol     here            shape         meaning
    m          m               (B, nC, ...)  state cat(q, v), n = 2 blocks
    x, x1      x               (B, C, ...)   data: images in [-1, 1], points of scale 1
    p, k       AGM.p, AGM.k    ()            strength of noise; covariance of q and v in the prior
    mu         mean(t)         (..., n)      mean of the blocks per unit of x
    Sigma, L   cov, cholesky   (..., n, n)   covariance of the blocks given x, and its factor
    w, w_x     affine(t)       (..., n)      F = w . m + w_x x; w_x is (...)
    x_hat      predict(m, t)   (B, C, ...)   E[x | m]; with a network: `denoise`
    F_theta    |r| net         (B, C, ...)   target "ode", "sde": net(m, t, label), t of the process
    z          to_z(t)         (B, C, ...)   y/sigma = w . m, with a w of its own
    D          denoise_y       (B, C, ...)   target "data": net(c_in z, sigma/(1 + sigma), label)

Coefficients are float64 on the CPU and are cast where they meet the state.
"""

import math
import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch

F64 = {"dtype": torch.float64, "device": "cpu"}

# -------------------------------------------------------------------------------------------------
# What every process shares. Yours brings n, first, last, prior_cov, mean and cholesky, no more, and
# gets the denoiser and `ode` for it. Flow matching is six lines:
#
#     class FlowMatching(Process):
#         n, first, last, prior_cov = 1, 1e-5, 0.999, torch.ones(1, 1, **F64)
#
#         def mean(self, t):
#             return torch.as_tensor(t, **F64)[..., None]
#
#         def cholesky(self, t):
#             return 1 - torch.as_tensor(t, **F64)[..., None, None]
#
# A process with parameters is a @dataclass(frozen=True) with them as fields: what is computed for a
# time is kept, and serves every process that compares equal.


@dataclass(frozen=True)
class Process:
    """m = mean(t) x + cholesky(t) eps, of n blocks. Times are numbers or tensors of shape (...).
    Samples are drawn from time `first`, with covariance prior_cov (n, n), to `last`.

    The denoiser is trained at noise sigma, ln sigma ~ N(noise_mean, noise_std^2), EDM's P_mean and
    P_std, whatever sigma_data is. EDM's values suit images. Points with fine structure want more
    low noise, since only that reveals it: train.py gives them values of their own.
    """

    target: str = "data"  # what the network learns
    sigma_data: float = 0.5  # standard deviation of the centred data, .1 to 5
    bound: float = math.inf  # largest |x| of the data (images: 1); predictions are kept within it
    noise_mean: float = -1.2
    noise_std: float = 1.2  # > 0
    targets: ClassVar[tuple] = ("data",)
    data_time: ClassVar[float] = 1.0  # the time of the data, which a network's time embedding wants

    def __post_init__(self):
        if self.target not in self.targets:
            raise ValueError(f"target must be {' or '.join(self.targets)}, got {self.target}")
        if not (self.bound > 0 and 0.1 <= self.sigma_data <= 5):
            raise ValueError(
                f"want bound > 0, and sigma_data from .1 to 5: rescale the data of {self}"
            )

    def cov(self, t):
        """(..., n, n): covariance of the blocks given x."""
        L = self.cholesky(t)
        return L @ L.mT

    def snr(self, t):
        """(...): mu^T Sigma^-1 mu = |L^-1 mu|^2."""
        L = self.cholesky(t)
        white = torch.linalg.solve_triangular(L, self.mean(t)[..., None], upper=False)
        return white.square().sum((-2, -1))

    @cached_property
    def knots(self):
        """log SNR (2000,), rising, and the times (2000,) from `first` to `last`."""
        t = torch.linspace(self.first, self.last, 2000, **F64)
        return self.snr(t).log().numpy(), t.numpy()

    def time_of_snr(self, snr):
        """Time (...) from `first` to `last` at which the SNR is snr (...), or nearest to it.
        Between the knots it is interpolated: an SNR of .01 to 4e4 is met to 2e-4 of it by AGM and
        HOLD."""
        log_snr, t = self.knots
        wanted = torch.as_tensor(snr, **F64).log().numpy()
        return torch.as_tensor(np.interp(wanted, log_snr, t), **F64)

    def prior(self, shape, generator=None, device=None):
        """(B, nC, ...) float32: states at `first` for data of shape (B, C, ...)."""
        if len(shape) < 2:
            raise ValueError(f"prior wants the shape (B, C, ...) of B data, got {tuple(shape)}")
        B, C, *rest = shape
        device = device or getattr(generator, "device", None)
        size = (B, self.n * C, *rest)
        eps = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
        return mix(torch.linalg.cholesky(self.prior_cov), eps)


def like(coefficients, x):
    """Coefficients in the dtype and on the device of x."""
    return coefficients.to(x, non_blocking=x.is_cuda)


def mix(A, m):
    """Linear combinations of blocks: A (i, j) or (B, i, j) on m (B, j C, ...) -> (B, i C, ...).
    A product and a sum, not a matmul: neither autocast nor TF32 rounds the coefficients."""
    blocks = m.reshape(len(m), 1, A.shape[-1], -1)
    mixed = (like(A, m)[..., None] * blocks).sum(-2)
    return mixed.reshape(len(m), -1, *m.shape[2:])


def scale_each(c, x):
    """One number c (B,) for each x (B, ...)."""
    return like(c, x).reshape(-1, *[1] * (x.ndim - 1)) * x


# -------------------------------------------------------------------------------------------------
# 1. The process


@dataclass(frozen=True)
class AGM(Process):
    """The bridge; AGM() has the paper's p and k. Times run from 0 (noise) to 1 (data, excluded).
    Targets: "data"; or the paper's F/|r|, of its "ode" or its "sde"."""

    p: float = 3.0  # strength of the noise, > 0
    k: float = -0.2  # covariance of q and v in the prior, |k| < 1
    first: float = 1e-5  # times between which samples are drawn, and the paper's network is trained
    last: float = 0.999
    n: ClassVar[int] = 2  # blocks of the state
    targets: ClassVar[tuple] = ("data", "ode", "sde")

    def __post_init__(self):
        super().__post_init__()
        if not (0 < self.p < math.inf and abs(self.k) < 1 and 0 < self.first < self.last < 1):
            raise ValueError(f"AGM wants p > 0, |k| < 1 and 0 < first < last < 1, got {self}")

    @property
    def prior_cov(self):
        """(n, n): covariance of the blocks in the prior."""
        return torch.tensor([[1.0, self.k], [self.k, 1.0]], **F64)

    def mean(self, t):
        """(..., n): mu, expanded in t = 1 - tau: near t = 0 the terms in tau would cancel."""
        t = torch.as_tensor(t, **F64)
        q = t**2 * (6 - 4 * t + t**2) / 3
        v = 4 * t * (3 - 3 * t + t**2) / 3
        return torch.stack([q, v], -1)

    def mode_cov(self, t):
        """(..., 2, 2): Cov(beta). ValueError for a t outside of [0, 1)."""
        if not ((t >= 0) & (t < 1)).all():
            raise ValueError(f"AGM time runs from 0 (noise) to 1 (data, excluded), got {t}")
        M0_inv = torch.tensor([[4.0, 1.0], [-1.0, -1.0]], **F64) / 3
        log_tau = torch.log1p(-t)
        cross = 3 * log_tau
        kicks = matrix([[-torch.expm1(cross), cross], [cross, torch.expm1(-cross)]])
        return M0_inv @ self.prior_cov @ M0_inv.T + self.p**2 / 27 * kicks

    def cholesky(self, t):
        """(..., n, n): lower L. L_vv = sqrt(det Sigma)/L_qq, where Sigma_vv - L_vq^2 would lose its
        digits; det Sigma = det(M)^2 det Cov(beta), and det M = -3 tau^4."""
        t = torch.as_tensor(t, **F64)
        tau = 1 - t
        modes = self.mode_cov(t)
        M = matrix([[tau, tau**4], [-torch.ones_like(tau), -4 * tau**3]])
        Sigma = M @ modes @ M.mT
        det = modes[..., 0, 0] * modes[..., 1, 1] - modes[..., 0, 1] ** 2
        L_qq = Sigma[..., 0, 0].sqrt()
        L_vq = Sigma[..., 0, 1] / L_qq
        L_vv = 3 * tau**4 * det.sqrt() / L_qq
        return matrix([[L_qq, torch.zeros_like(L_qq)], [L_vq, L_vv]])


def matrix(rows):
    """Nested lists of (...) tensors -> (..., rows, columns)."""
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


# -------------------------------------------------------------------------------------------------
# 2. The paper's target F, and its loss


def affine(process, t, sde):
    """w (..., n) and w_x (...) of F = w . m + w_x x: a*, and for the ODE what is added to it,
    -g^2/2 grad_v log p(m | x) = g^2/2 (row v of Sigma^-1) . (m - mu x)."""
    t = torch.as_tensor(t, **F64)
    tau = 1 - t
    w = torch.stack([-4 / tau**2, -4 / tau], -1)
    w_x = 4 / tau**2
    if not sde:
        precision = torch.cholesky_inverse(process.cholesky(t))
        half_g2 = (process.p * tau) ** 2 / 2
        row_v = half_g2[..., None] * precision[..., 1, :]
        w = w + row_v
        w_x = w_x - (row_v * process.mean(t)).sum(-1)
    return w, w_x


def noise_part(process, t, sde):
    """r (..., n) = L^T w, of F = 4 tau^2 x + r . eps."""
    w, _ = affine(process, t, sde)
    return (process.cholesky(t).mT @ w[..., None])[..., 0]


def hop(process, F, m, t):
    """The paper's sampling-hop: the x (B, C, ...) that F, of the process's target, steers to."""
    w, w_x = affine(process, t, process.target == "sde")
    return (F - mix(w[None], m)) / float(w_x)


def training_pair(process, x, t, eps):
    """State m (B, nC, ...) and target F/|r| (B, C, ...) at times t (B,), noise eps (B, nC, ...)."""
    m = mix(process.mean(t)[..., None], x) + mix(process.cholesky(t), eps)
    r = noise_part(process, t, process.target == "sde")
    F = scale_each(4 * (1 - t) ** 2, x) + mix(r[:, None], eps)
    return m, scale_each(1 / r.norm(dim=-1), F)


def loss(process, net, x, label=None):
    """A scalar to minimise; x (B, C, ...) float. Target "data": `denoiser_loss`. Else the
    paper's, E[(1 - t) |net - F/|r||^2] per dimension, t uniform from `first` to `last`.

    Both have the same minimiser: with F_theta = w . m + w_x D, |F_theta - F|^2 = w_x^2 |D - x|^2.
    They differ in how they weight the noise levels, and the denoiser sees y alone. A network that
    returns 0 has the loss 1 ("data"), or int (1 - t) (1 + 16 tau^4 std^2/|r|^2) dt: .5 for the
    noise, and for data of standard deviation 1 another .27 ("ode") or .1 ("sde").
    """
    check_data(process, x)
    if process.target == "data":
        return denoiser_loss(process, net, x, label)
    t = process.first + (process.last - process.first) * stratified(len(x))
    B, C, *rest = x.shape
    eps = x.new_empty(B, process.n * C, *rest).normal_()
    m, target = training_pair(process, x, t, eps)
    error = call_net(net, m, like(t, x), label, x) - target
    return scale_each(1 - t, error**2).mean()


# -------------------------------------------------------------------------------------------------
# 3. The denoiser, the same for every process (Karras et al. 2022, sections 5 and B.6), on z =
# y/sigma, which stays of unit size as the SNR goes to 0. With sd = sigma_data theirs are, on y,
#     c_in = 1/sqrt(sigma^2 + sd^2),     c_skip = sd^2 c_in^2,     c_out = sigma sd c_in
# and on z, as sigma c_in = 1/sqrt(1 + sd^2 SNR), those of `denoise_y`. The weight of the loss is
# 1/c_out^2 = 1/sd^2 + SNR.


def denoiser_loss(process, net, x, label=None):
    """E[|D - x|^2 / c_out^2] per dimension, a scalar, ln sigma ~ N(noise_mean, noise_std^2)."""
    normal = torch.special.ndtri(stratified(len(x)).clamp(1e-9, 1 - 1e-9))
    sigma = torch.exp(process.noise_mean + process.noise_std * normal)
    snr = sigma**-2
    z = scale_each(1 / sigma, x) + torch.randn_like(x)
    error = denoise_y(process, net, z, snr, label) - x
    return scale_each(1 / process.sigma_data**2 + snr, error**2).mean()


def denoise_y(process, net, z, snr, label=None):
    """One network call: D = E[x | y] (B, C, ...) from z = y/sigma (B, C, ...) and snr (B,)."""
    sd = process.sigma_data
    root = snr.sqrt()  # 1/sigma
    c_in = 1 / (1 + sd**2 * snr).sqrt()  # on z, as c_skip
    c_out = sd * c_in
    c_skip = sd**2 * root * c_in**2
    c_noise = 1 / (1 + root)  # ours: sigma/(1 + sigma), 0 at the data, 1 at pure noise
    out = call_net(net, scale_each(c_in, z), like(c_noise, z), label, z)
    return scale_each(c_skip, z) + scale_each(c_out, out)


@lru_cache(1000)
def to_z(process, t):
    """w (1, n) and SNR () at time t (a number): z = w . m, w = Sigma^-1 mu / sqrt(SNR). (This w is
    not that of `affine`.)"""
    mean = process.mean(t)
    w = torch.cholesky_solve(mean[:, None], process.cholesky(t))[:, 0]
    snr = w @ mean
    return (w / snr.sqrt())[None], snr


def denoise(process, net, m, t, label=None):
    """One network call: x_hat = E[x | m] (B, C, ...) at time t (a number), `first` to `last`."""
    if process.target == "data":
        w, snr = to_z(process, t)
        x = denoise_y(process, net, mix(w, m), snr.expand(len(m)), label)
    else:
        scale = float(noise_part(process, t, process.target == "sde").norm())
        q = m.chunk(process.n, 1)[0]
        t_batch = m.new_full((len(m),), t)
        F = scale * call_net(net, m, t_batch, label, q)
        x = hop(process, F, m, t)
    return x.clamp(-process.bound, process.bound)


# -------------------------------------------------------------------------------------------------
# 4. Samplers: m (B, nC, ...) from the prior -> x (B, C, ...), exactly nfe calls of predict(m, t),
# no gradients. predict is functools.partial(denoise, process, net, label=label), or anything else
# that returns x_hat; it may change m in place (completing a picture does), and the sampler goes on
# from there.
# The last x_hat is the sample. A Gaussian cluster of standard deviation std comes out with the
# share std^2/(std^2 + sigma^2) of its variance, sigma the noise at the last call: by that share of
# y - mean its x_hat leaves the mean.
# rho and t_end shape the grid of times; randn(x) draws unit noise shaped like x.


@torch.no_grad()
def em(process, predict, m, nfe, rho=1.0, t_end=None, randn=torch.randn_like):
    """SDE, Euler-Maruyama."""
    ts = even_times(process, nfe, rho, t_end)
    for t, t_next in pairwise(ts):
        h = t_next - t
        x_hat = predict(m, t)
        q, v = m.chunk(2, 1)
        F = mix(acceleration(process, t, sde=True), torch.cat([m, x_hat], 1))
        noise = process.p * (1 - t) * math.sqrt(h) * randn(v)
        m = torch.cat([q + h * v, v + h * F + noise], 1)
    return predict(m, ts[-1])


@torch.no_grad()
def splitting(process, predict, m, nfe, rho=1.0, t_end=None, randn=torch.randn_like):
    """SDE, symmetric splitting (the paper's SSS): half a step of free motion (velocity and noise,
    without F), the kick v += h F, half a step of free motion. Order 1 despite the symmetry: F
    contains the v that the kick changes, so the kick is an Euler step. t_end ends the last step
    (default: `last`); the calls are at mid-step."""
    t_end = process.last if t_end is None else t_end
    for t, t_next in pairwise(even_times(process, nfe, rho, t_end, extra=1)):
        h = t_next - t
        middle = (t + t_next) / 2
        m = free_motion(process, m, t, h / 2, randn)
        x_hat = predict(m, middle)
        q, v = m.chunk(2, 1)
        F = mix(acceleration(process, middle, sde=True), torch.cat([m, x_hat], 1))
        m = torch.cat([q, v + h * F], 1)
        m = free_motion(process, m, middle, h / 2, randn)
    return x_hat


def free_motion(process, m, t, h, randn):
    """dq = v dt, dv = g dW over [t, t + h], drawn exactly."""
    q, v = m.chunk(2, 1)
    drift = torch.cat([q + h * v, v], 1)
    return drift + mix(free_noise(process, t, h), randn(m))


@lru_cache(1000)
def free_noise(process, t, h):
    """(2, 2): rows q and v of what `free_motion` adds per unit noise. A kick dv at t + u has moved
    q by (h - u) dv. The integrand is a polynomial of degree 4 in u: the quadrature is exact."""
    u, du = gauss_legendre(0.0, h)
    kick = process.p * (1 - t - u) * du.sqrt()
    Q = torch.stack([(h - u) * kick, kick])
    return torch.linalg.cholesky(Q @ Q.mT)


@torch.no_grad()
def exponential(process, predict, m, nfe, multistep=2, rho=1.0, t_end=None):
    """ODE, the paper's exponential Adams-Bashforth: dq = v du, dv = F du, integrated with
    F = |r| N. N of the last `multistep` calls (1 to 4, else ValueError) is extrapolated as a
    polynomial in time, and over a step h = t_next - t

        q += h v + int (t_next - u) |r(u)| N(u) du,     v += int |r(u)| N(u) du

    with N = sum_j l_j F_j/|r_j|, l_j the Lagrange polynomials of the times of the calls. The first
    steps lack past calls: the first is Euler's and has an error of its length squared. That length
    is about 1/nfe at rho 1, so the order is 2 for multistep > 1, and nfe^-2 at rho 2, where
    multistep 3 gives order 3. The paper's on CIFAR-10: multistep 3, rho 2, t_end .4, .7, .9 for nfe
    5, 10, 20."""
    if multistep not in (1, 2, 3, 4):
        raise ValueError(f"multistep must be 1, 2, 3 or 4, got {multistep}")
    ts = even_times(process, nfe, rho, t_end)
    past = []  # (time, F) of the last calls
    for t, t_next in pairwise(ts):
        x_hat = predict(m, t)
        F = mix(acceleration(process, t, sde=False), torch.cat([m, x_hat], 1))
        past = [*past, (t, F)][-multistep:]
        past_t, past_F = zip(*past, strict=True)
        m = mix(adams_weights(process, past_t, t, t_next), torch.cat([m, *past_F], 1))
    return predict(m, ts[-1])


@lru_cache(1000)
def adams_weights(process, past_t, t, t_next):
    """(2, 2 + calls), on cat(m, F at each of past_t): free motion, and what each F adds to q and v,
    int (t_next - u, 1) |r(u)| l(u) du / |r| at that F's time, l its Lagrange polynomial."""
    u, du = gauss_legendre(t, t_next)
    scale = noise_part(process, u, sde=False).norm(dim=-1)
    row_q = [1.0, t_next - t]  # q + h v
    row_v = [0.0, 1.0]
    for past in past_t:
        weight = du * scale / noise_part(process, past, sde=False).norm()
        for other in past_t:
            if other != past:
                weight = weight * (u - other) / (past - other)
        row_q.append(float(((t_next - u) * weight).sum()))
        row_v.append(float(weight.sum()))
    return torch.tensor([row_q, row_v], **F64)


@lru_cache(1000)
def acceleration(process, t, sde):
    """(1, n + 1): F as a combination of the blocks of cat(m, x), at time t, a number."""
    w, w_x = affine(process, t, sde)
    return torch.cat([w, w_x[None]])[None]


def even_times(process, nfe, rho, t_end, extra=0):
    """n = nfe + extra times from `first` to t_end, even in t^(1/rho). t_end: by default 1 - 1.5/n,
    at most `last`. Steps are about 1/n long, so 1.5 of them are left for the last x_hat."""
    n = nfe + extra
    t_end = min(1 - 1.5 / max(n, 2), process.last) if t_end is None else t_end
    check_grid(process, nfe, t_end)
    roots = torch.linspace(process.first ** (1 / rho), t_end ** (1 / rho), n, **F64)
    inner = (roots**rho)[1:-1]
    return (process.first, *inner.tolist(), t_end)[:n]  # exact ends; n = 1: `first` alone


@torch.no_grad()
def ode(process, predict, m, nfe, data_mean=None, ts=None):
    """DDIM for this process, of second order, for few calls.

    data_mean: the mean of what you trained on, 0.0 if that was centred: a number, or a tensor that
    broadcasts to the samples, (C, 1, 1) for channels of images. It is the first x_hat, as nothing
    is known at the prior (except for the little that m tells), and so the first step is free.
    A wrong mean moves the samples. None: the first x_hat is one of the nfe calls, at a noise level
    that training hardly sees.
    ts: the times to visit, nfe of them, or nfe + 1 if the first one needs no call, as data_mean is
    its x_hat. None: `times`. (nfe = 1 is one call at `first`, whatever data_mean is.)

    A step. m = mu x_hat + L eps goes to mu_1 x_hat + L_1 eps = A m + b x_hat, with A = L_1 L^-1 and
    b = mu_1 - A mu at the next time. Along that flow d(L^-1) and L' L^-1 cancel: d(L^-1 m) =
    x_hat d(L^-1 mu), and |L^-1 mu| = sqrt(SNR). For one block, n = 1, it is DDIM as published.

    Second order. Let x be x_hat at the start of the step, h its length in lambda = log(1 + R
    sqrt(SNR)), and l, from 0 to h, how far lambda has come. x_hat is taken to be x + slope l, with
    the slope of the step before (at first 0). d sqrt(SNR) is proportional to e^l dl, so the mean of
    x_hat over the step is x + c slope, c = int l e^l dl / int e^l dl = h/(1 - e^-h) - 1. (Any c =
    h/2 + O(h^2) has order 2: that L^-1 mu turns as well changes the error by a factor. With very
    many calls the free first step, which leaves out what m tells at the prior, limits the order.)

    Corrector. x_next shows what the slope of the step to it was, and so what its mean x_hat should
    have been: more by shift = c (new slope - slope). So m moves by b shift, and y, which is
    sigma z = sigma w . m (`to_z`), by sigma w . b shift. x_next moves by the share
    dE[x | y]/dy = sigma_data^2/(sigma_data^2 + sigma^2) of that: exact for Gaussian data, a guess
    for others. It costs no call (UniPC). On trained networks it takes 10 to 50 % off the error (nfe
    4 to 10).

    R = sigma_data sqrt(2 d) is the rms distance between two samples of d numbers: noise that is
    larger hides which of them it is, and lambda spends few steps there.
    """
    R = clock_rate(process, m)
    free = data_mean is not None and nfe > 1
    if ts is None:
        ts = times(process, nfe + free, end_time(process, nfe), R)
    if free:
        q = m.chunk(process.n, 1)[0]
        x = torch.as_tensor(data_mean).to(q).expand_as(q)
    else:
        x = predict(m, ts[0])
    slope = 0.0
    for i in range(1, len(ts)):
        A, b, h, follow = ddim_step(process, ts[i - 1], ts[i], R)
        c = h / -math.expm1(-h) - 1
        m = mix(A, m) + mix(b, x + c * slope)
        x_next = predict(m, ts[i])
        if i == len(ts) - 1:
            return x_next  # a prediction: moving it would blur it
        new_slope = (x_next - x) / h
        shift = c * (new_slope - slope)
        m = m + mix(b, shift)
        x_next = x_next + follow * shift
        slope = (x_next - x) / h
        x = x_next
    return x


@lru_cache(1000)
def ddim_step(process, t, t_next, R):
    """A (n, n), b (n, 1), the length h of the step in lambda, and follow = dx_next/dx_hat: of what
    y at t_next moves by, sigma w . b (`to_z`), the share sd^2/(sd^2 + sigma^2), sd = sigma_data."""
    L = process.cholesky(t)
    L_next = process.cholesky(t_next)
    A = torch.linalg.solve_triangular(L, L_next, upper=False, left=False)
    b = process.mean(t_next) - A @ process.mean(t)
    h = clock(process, t_next, R) - clock(process, t, R)
    w, snr = to_z(process, t_next)
    variance = process.sigma_data**2
    follow = variance * snr.sqrt() / (1 + variance * snr) * (w @ b)
    return A, b[:, None], h, float(follow)


def clock_rate(process, m):
    """R of lambda for states m."""
    d = m[0].numel() / process.n
    return process.sigma_data * math.sqrt(2 * d)


def clock(process, t, R):
    """lambda = log(1 + R sqrt(SNR)): about R sqrt(SNR) where that is small, its logarithm above."""
    return math.log1p(R * float(process.snr(t).sqrt()))


@lru_cache(1000)
def end_time(process, nfe):
    """The time at which y has noise 1/(3 nfe), less for data of standard deviation below 1/2."""
    noise = min(1, 2 * process.sigma_data) / (3 * max(nfe, 1))
    return float(process.time_of_snr(noise**-2))


@lru_cache(1000)
def times(process, n, t_end, R):
    """n times from `first` to t_end, even in lambda; one time alone is `first`."""
    check_grid(process, n, t_end)
    ends = [clock(process, t, R) for t in (process.first, t_end)]
    even = torch.linspace(*ends, n, **F64)
    inner = process.time_of_snr((even[1:-1].expm1() / R) ** 2)
    return (process.first, *inner.tolist(), t_end)[:n]  # exact ends; n = 1: `first` alone


SAMPLERS = {  # the first is the default
    "ode": ode,
    "exponential": exponential,
    "splitting": splitting,
    "em": em,
}


# -------------------------------------------------------------------------------------------------
# Small tools and checks


@lru_cache(1000)
def gauss_legendre(low, high, nodes=16):
    """Nodes and weights (nodes,) on [low, high]."""
    x, weight = np.polynomial.legendre.leggauss(nodes)
    half = (high - low) / 2
    return torch.from_numpy(low + half * (1 + x)), torch.from_numpy(half * weight)


def stratified(n):
    """n uniform numbers in random order, one in each n-th of [0, 1]: a batch covers all times."""
    return (torch.randperm(n, device="cpu") + torch.rand(n, **F64)) / n


def call_net(net, m, t, label, x):
    """net(m, t, label), in the dtype of x, which shows what shape it should have. ValueError for
    another shape: it would broadcast."""
    try:
        out = net(m, t, label)
    except RuntimeError as error:
        if x.dtype == torch.get_default_dtype():
            raise
        raise ValueError(f"the network fails on {x.dtype}: give it x.float()") from error
    if out.shape != x.shape:
        raise ValueError(f"the network returns {tuple(out.shape)} for data {tuple(x.shape)}")
    return out.to(x)


def check_data(process, x):
    """ValueError for data that no network takes. A warning for data far from the scale of
    sigma_data, but not within a finite bound, nor on a GPU, where to look at a number means waiting
    for it."""
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"data are floats (B, C, ...) or (B, D), got {x.dtype} {tuple(x.shape)}")
    if x.is_cuda or x.abs().max() <= process.bound < math.inf:
        return
    scale = x.square().mean().sqrt() / process.sigma_data
    if not 1 / 4 < scale < 4:
        warnings.warn(
            "x is far from the scale of sigma_data: centre it, give its std", stacklevel=3
        )


def check_grid(process, nfe, t_end):
    """ValueError for what no grid of times can have."""
    low, high = sorted([process.first, process.last])
    if nfe < 1:
        raise ValueError(f"nfe counts network calls and must be at least 1, got {nfe}")
    if not (low <= t_end <= high and t_end != process.first):
        raise ValueError(f"t_end must be from {low:g} to {high:g}, and not `first`, got {t_end}")
