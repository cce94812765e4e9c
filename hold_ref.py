"""HOLD, high-order Langevin dynamics, in one file: process, the paper's target, denoiser, samplers.

"Generative Modelling with High-Order Langevin Dynamics", Shi & Liu, 2024, arXiv 2404.12814. The
authors published no code: the defaults are ours. Order n = 1 is the OU (VP) process, 2 is
critically damped Langevin (CLD), 3 is HOLD.

    data = data - data.mean(0)
    data = data / data.std()                            # centred, of unit scale
    process = HOLD(sigma_data=1.0)                      # images in [-1, 1]: sigma_data=std, bound=1
    loss(process, net, x).backward()                    # a batch x; net(noisy, t, label) -> like x
    predict = functools.partial(denoise, process, net)  # label=... for a net with classes
    x = ode(process, predict, process.prior((64, 3, 32, 32)), nfe=20, data_mean=0.0)

Images need not be centred, but then their mean is the data_mean of the last line.

Read agm_ref.py first. Word for word the same in both: section 3 of this text, `Process` and what it
uses, `denoiser_loss` to `to_z`, `ode` and its grid, the small tools at the end.

Here the data x are (64, 3, 32, 32), the state m = cat(q, v, a) is (64, 9, 32, 32), and what the
network sees and returns is (64, 3, 32, 32) again.


1. The process

The data are the first block of a chain m = (q, v, a, ...) of n blocks. Neighbours rotate into each
other with the speeds gamma_i. Friction xi and noise enter the last block only. For n = 3

    dq =  gamma_1 v dt
    dv = -gamma_1 q dt + gamma_2 a dt
    da = -gamma_2 v dt - xi a dt + sqrt(2 xi var) dW

In general, with E_ij the matrix that has a 1 at (i, j), and e_i the i-th unit vector,

    dm = G m dt + sqrt(2 xi var) e_n dW,     G = sum_i gamma_i (E_i,i+1 - E_i+1,i) - xi E_nn

These act on the blocks: the dimensions of the data do not interact. The process runs

    from m = (x, N(0, alpha var), ...) at t = 0   to nearly   N(0, var I) at t = T

The end is stationary, as G + G^T = -2 xi E_nn takes out what the noise puts in. (var is the paper's
L^-1, G its F.)

Critical damping, the default: gamma and xi are such that all n eigenvalues of G equal one lam < 0.
(Real parts sum to -xi, so the largest is at least -xi/n: equal ones decay fastest.) Let P_k(s) =
det(s - G) of the first k blocks, without friction. Expanded from the damped end, the determinant of
the whole gives

    (s - lam)^n = P_n + xi P_n-1,     P_k = s P_k-1 + gamma_k-1^2 P_k-2,     P_0 = 1, P_1 = s

P_k has the parity of k, so P_n and xi P_n-1 are the two halves of (s - lam)^n, with even and with
odd powers of s. For lam = -1 and with u = 1/s, division by s^n makes them the even and the odd part
of (1 + u)^n, for every n. The recursion makes their quotient a continued fraction of all gammas, as
P_k/P_k-1 = s + gamma_k-1^2/(P_k-1/P_k-2), down to P_1/P_0 = s:

    xi P_n-1 / P_n = xi u/(1 + gamma_n-1^2 u^2/(1 + gamma_n-2^2 u^2/(1 + ...)))

So does Euler's, which is that of tan(n arctan x) at x = iu (x^2 = -u^2 turns its minus signs to
plus), as (1 + u)/(1 - u) = e^(2 artanh u):

    odd part of (1 + u)^n / even part = tanh(n artanh u)
                                      = n u/(1 + (n^2 - 1) u^2/(3 + (n^2 - 4) u^2/(5 + ...)))

(n = 2: 2u/(1 + u^2).) Divide level i by 2i + 1, so that all start with 1: its numerator n^2 - i^2
is divided by 2i + 1, and by the 2i - 1 of the level above. The two agree for xi = n and, i counted
from the damped end,

    gamma_n-i^2 = (n^2 - i^2)/((2i - 1)(2i + 1)),     i = 1 ... n - 1

All speeds scale with -lam, which is chosen so that gamma_1 = 1: lam = -sqrt(2n - 3) (n = 1: -1).
For n = 3: gamma = (1, 2 sqrt(2)) and xi = 3 sqrt(3). By Cayley and Hamilton (G - lam I)^n = 0, and
so the exponential is a finite sum:

    exp(G t) = e^(lam t) sum_{k<n} (G - lam I)^k t^k / k!

Given x, the state is

    m = mu x + L eps,     eps ~ N(0, I)
    mu = exp(G t) e_1,    L L^T = Sigma = var I + exp(G t) (S0 - var I) exp(G t)^T,    L lower

with S0 = var diag(0, alpha, alpha, ...) at t = 0: var I is stationary, and the difference from it
only decays. For n = 3 at t = .84, mu = (.738, -.481, .233).


2. What the paper's network learns

eps_n, the noise of the last block (block coordinate score matching, BCSM). Given x,
grad log p(m | x) = -Sigma^-1 (m - mu x) = -L^-T eps, and L^-T is upper triangular: the last entry
is -eps_n / L_nn, the only score that the reverse SDE needs. The last row of eps = L^-1 (m - mu x)
has the form eps_n = w . m + w_x x, so whoever predicts E[eps_n | m] predicts E[x | m], and vice
versa.


3. What our network learns: the data

    log p(m | x) = x mu^T Sigma^-1 m - x^2 SNR/2 + (terms without x),     SNR = mu^T Sigma^-1 mu

As a function of x it depends on m only through y = mu^T Sigma^-1 m / SNR: y is a sufficient
statistic, and E[x | m] = E[x | y]. Given x, y ~ N(x, sigma^2) with sigma = SNR^-1/2: a network
trained to remove plain noise serves AGM, HOLD of any order, and every sampler. Its loss uses
neither mu nor Sigma.


4. How samples are drawn

A sampler asks for x_hat(m, t) = E[x | m] and for nothing else; t falls from T. In reverse the drift
G m becomes -G m + 2 xi var e_n grad_n log p, and -G = G^T + 2 xi E_nn, so

    dm = (G^T m + 2 xi e_n f) |dt| + sqrt(2 xi var) e_n dW,     f = m_n + var grad_n log p(m)

G^T rotates the other way and has the same friction; f, the force, is what brings the data back.
`ode` keeps eps: given x, such a path has dm/dt = mu' x + L' L^-1 (m - mu x). The mean of that over
p(x | m) has x_hat in place of x, and is a flow with the same marginals, as in flow matching. So
`ode` is DDIM: write m as mu x_hat + L eps, keep eps, and recombine at the next time. (For n = 1 it
is the probability flow.)

With 5 calls, order 3, sigma_data = 0.5 and points of 2 dimensions `ode` visits

    t       6      1.757  1.159  .840   .624   .460
    sigma   334    1.34   .491   .233   .122   .067
    mu_q    .001   .340   .584   .738   .838   .905

The first costs no call: nothing is known yet, and x_hat is the mean of the data.

    symbol     here            shape         meaning
    m          m               (B, nC, ...)  state cat(q, v, ...), n blocks
    x          x               (B, C, ...)   data: images in [-1, 1], points of scale 1
    gamma, xi  damping         (n - 1,), ()  rotation speeds, friction
    G          drift           (n, n)        drift matrix; transition(t) is exp(G t)
    mu         mean(t)         (..., n)      mean of the blocks per unit of x
    Sigma, L   cov, cholesky   (..., n, n)   covariance of the blocks given x, and its factor
    w, w_x     affine(t)       (n,), ()      eps_n = w . m + w_x x
    x_hat      predict(m, t)   (B, C, ...)   E[x | m]; with a network: `denoise`
    eps_theta  net             (B, C, ...)   target "noise": net(m, t, label), t of the process
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
class HOLD(Process):
    """The forward process; HOLD() has order 3 at critical damping. Times run from 0 (data) to T.
    Targets: "data"; or the paper's "noise", eps_n."""

    order: int = 3  # n, blocks of the state, 1 to 8
    gamma: tuple | None = None  # n - 1 rotation speeds, > 0; None, with xi: critical damping
    xi: float | None = None  # friction, > 0; None, with gamma: critical damping
    var: float = 1.0  # prior variance of every block, > 0
    alpha: float = 0.04  # the other blocks start with variance alpha var, > 0
    first: float = 6.0  # T, first time of every sampler; SNR(T) < 1e-3 at critical damping
    snr_max: float = 4e4  # SNR at `last`: noise of std .005, less than an 8-bit grey level, 2/255
    targets: ClassVar[tuple] = ("data", "noise")
    data_time: ClassVar[float] = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.order not in range(1, 9):
            raise ValueError(f"order counts blocks, an integer from 1 to 8, got {self.order}")
        if (self.gamma is None) != (self.xi is None):
            raise ValueError("give both gamma and xi, or neither: critical damping")
        gamma, xi = self.damping
        if not isinstance(gamma, tuple) or len(gamma) != self.n - 1:
            raise ValueError(f"gamma must be a tuple of {self.n - 1} speeds, got {gamma}")
        positive = (*gamma, xi, self.var, self.alpha, self.first)
        if not all(0 < value < math.inf for value in positive):
            raise ValueError(f"gamma, xi, var, alpha and first must be > 0, got {self}")
        snr = float(self.snr(self.first)) * self.sigma_data**2
        if not 0 < snr < 1e-2 < self.snr_max < math.inf:  # else the prior would miss too much
            raise ValueError(
                f"want 0 < sigma_data^2 SNR(T) < .01 < snr_max, got {snr:.2g} at T = {self.first}:"
                " change first"
            )

    @property
    def n(self):
        """Blocks of the state."""
        return int(self.order)

    @property
    def damping(self):
        """gamma (n - 1,) and xi in use; where none are given, those of critical damping."""
        if self.gamma is not None:
            return self.gamma, self.xi
        n = self.n
        lam = -math.sqrt(max(2 * n - 3, 1))
        squares = [(n**2 - i**2) / (4 * i**2 - 1) for i in range(n - 1, 0, -1)]
        gamma = tuple(-lam * math.sqrt(square) for square in squares)
        return gamma, -lam * n

    @property
    def drift(self):
        """(n, n): G."""
        gamma, xi = self.damping
        G = torch.zeros(self.n, self.n, **F64)
        for i, speed in enumerate(gamma):
            G[i, i + 1] = speed
            G[i + 1, i] = -speed
        G[-1, -1] = -xi
        return G

    @property
    def prior_cov(self):
        """(n, n): covariance of the blocks in the prior."""
        return self.var * torch.eye(self.n, **F64)

    def transition(self, t):
        """(..., n, n): exp(G t). ValueError for a t outside of [0, inf)."""
        t = torch.as_tensor(t, **F64)[..., None, None]
        if not ((t >= 0) & (t < math.inf)).all():
            raise ValueError(f"HOLD time runs from 0 (data) to `first` (noise), got {t.flatten()}")
        if self.gamma is not None:
            return torch.linalg.matrix_exp(self.drift * t)
        lam = -self.damping[1] / self.n
        N = self.drift - lam * torch.eye(self.n, **F64)
        E = torch.zeros_like(N)
        for k in range(self.n):
            E = E + torch.linalg.matrix_power(N, k) * t**k / math.factorial(k)
        return torch.exp(lam * t) * E

    def mean(self, t):
        """(..., n): mu = exp(G t) e_1."""
        return self.transition(t)[..., 0]

    def cholesky(self, t):
        """(..., n, n): lower L. Good to 1e-11 of its largest entry from `last` to `first`; nearer
        to the data the digits of Sigma cancel."""
        E = self.transition(t)
        gap = torch.full((self.n,), (self.alpha - 1) * self.var, **F64)  # S0 - var I
        gap[0] = -self.var
        L, failed = torch.linalg.cholesky_ex(self.prior_cov + (E * gap) @ E.mT)
        if failed.any():
            raise ValueError(f"float64 cannot tell Sigma at time {t} from a singular matrix")
        return L

    @cached_property
    def last(self):
        """The last time of every sampler, where the SNR is snr_max, by bisection of log t."""
        late = self.first
        while self.snr(late / 2) < self.snr_max:
            late /= 2
        early = late / 2
        for _ in range(50):
            middle = math.sqrt(early * late)
            if self.snr(middle) < self.snr_max:
                late = middle
            else:
                early = middle
        return late

    @cached_property
    def knots(self):
        """log SNR (2000,), rising, and times (2000,) from `first` down to `last`, even in log t."""
        t = torch.logspace(math.log10(self.first), math.log10(self.last), 2000, **F64)
        t[0], t[-1] = self.first, self.last
        return self.snr(t).log().numpy(), t.numpy()


# -------------------------------------------------------------------------------------------------
# 2. The paper's target eps_n, and its loss


@lru_cache(1000)
def affine(process, t):
    """w (n,) and w_x () of eps_n = w . m + w_x x at time t, a number; w is row n of L^-1."""
    e_n = torch.eye(process.n, **F64)[:, -1:]
    w = torch.linalg.solve_triangular(process.cholesky(t).mT, e_n, upper=True)[:, 0]
    return w, -w @ process.mean(t)


def hop(process, eps_n, m, t):
    """The x (B, C, ...) that leaves the noise eps_n (not in the paper). Near T it divides the error
    of a network by a w_x close to 0: a finite `bound` catches the outliers."""
    w, w_x = affine(process, t)
    return (eps_n - mix(w[None], m)) / float(w_x)


def training_pair(process, x, t, eps):
    """State m (B, nC, ...) and target eps_n (B, C, ...) at times t (B,), noise eps (B, nC, ...)."""
    m = mix(process.mean(t)[..., None], x) + mix(process.cholesky(t), eps)
    return m, eps.chunk(process.n, 1)[-1]


def loss(process, net, x, label=None):
    """A scalar to minimise; x (B, C, ...) float. Target "data": `denoiser_loss`. Else the paper's,
    E|net - eps_n|^2 per dimension, at times even in lambda = log(1 + R sqrt(SNR)): if they were
    even in t, a high order would hardly ever see low noise. R = 10 is `ode`'s for 200 numbers of
    sigma_data .5.

    Both have the same minimiser: with eps_theta = w . m + w_x D, |eps_theta - eps_n|^2 = w_x^2
    |D - x|^2. They differ in how they weight the noise levels, and the denoiser sees y alone. A
    network that returns 0 has the loss 1.
    """
    check_data(process, x)
    if process.target == "data":
        return denoiser_loss(process, net, x, label)
    low = clock(process, process.first, 10)
    high = clock(process, process.last, 10)
    even = low + (high - low) * stratified(len(x))
    t = process.time_of_snr((even.expm1() / 10) ** 2)
    B, C, *rest = x.shape
    eps = x.new_empty(B, process.n * C, *rest).normal_()
    m, target = training_pair(process, x, t, eps)
    error = call_net(net, m, like(t, x), label, x) - target
    return (error**2).mean()


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
        q = m.chunk(process.n, 1)[0]
        t_batch = m.new_full((len(m),), t)
        x = hop(process, call_net(net, m, t_batch, label, q), m, t)
    return x.clamp(-process.bound, process.bound)


# -------------------------------------------------------------------------------------------------
# 4. Samplers: m (B, nC, ...) from the prior -> x (B, C, ...), exactly nfe calls of predict(m, t),
# no gradients. predict is functools.partial(denoise, process, net, label=label), or anything else
# that returns x_hat; it may change m in place (completing a picture does), and the sampler goes on
# from there (not `strang`).
# The last x_hat is the sample. A Gaussian cluster of standard deviation std comes out with the
# share std^2/(std^2 + sigma^2) of its variance, sigma the noise at the last call: by that share of
# y - mean its x_hat leaves the mean.
# t_end is the time of the last call, or the end of the last step; randn(x) draws unit noise shaped
# like x.


@torch.no_grad()
def em(process, predict, m, nfe, t_end=None, randn=torch.randn_like):
    """SDE, Euler-Maruyama."""
    xi = process.damping[1]
    e_n = torch.eye(process.n, **F64)[:, -1:]
    ts = sde_times(process, nfe, t_end)
    for t, t_next in pairwise(ts):
        h = t - t_next
        x_hat = predict(m, t)
        f = mix(force(process, t), torch.cat([m, x_hat], 1))
        push = 2 * xi * h * f + math.sqrt(2 * xi * process.var * h) * randn(f)
        m = m + mix(h * process.drift.mT, m) + mix(e_n, push)
    return predict(m, ts[-1])


@torch.no_grad()
def lie(process, predict, m, nfe, t_end=None, randn=torch.randn_like):
    """SDE, Lie-Trotter splitting (the paper's): a step of linear flow, then the kick at its end.
    Weak order 1."""
    for t, t_next in pairwise(sde_times(process, nfe, t_end, extra=1)):
        m = linear_flow(process, m, t - t_next, randn)
        x_hat = predict(m, t_next)
        m = mix(kick(process, t_next, t - t_next), torch.cat([m, x_hat], 1))
    return x_hat


@torch.no_grad()
def strang(process, predict, m, nfe, t_end=None, randn=torch.randn_like):
    """SDE, Strang splitting: half a step of linear flow, the kick, half a step of linear flow.

    The kick changes m_n while it lasts, so x_hat is asked for after half a kick, which is made with
    the previous x_hat. That one is off by O(h), so half a kick with it by O(h^2), and the new kick
    by O(h^3): m has weak order 2, at many calls, and 1 without the half kick (CLD's SSCS), both at
    one call a step. The result is the last x_hat.
    What predict changes in place is lost here, except at the first call.
    """
    x_hat = None
    for t, t_next in pairwise(sde_times(process, nfe, t_end, extra=1)):
        h = t - t_next
        middle = (t + t_next) / 2
        m = linear_flow(process, m, h / 2, randn)
        halfway = m
        if x_hat is not None:
            halfway = mix(kick(process, middle, h / 2), torch.cat([m, x_hat], 1))
        x_hat = predict(halfway, middle)
        m = mix(kick(process, middle, h), torch.cat([m, x_hat], 1))
        m = linear_flow(process, m, h / 2, randn)
    return x_hat


def linear_flow(process, m, h, randn):
    """dm = G^T m |dt| + sqrt(2 xi var) e_n dW over a step h, drawn exactly."""
    E, L = linear_step(process, h)
    return mix(E, m) + mix(L, randn(m))


@lru_cache(1000)
def linear_step(process, h):
    """E = exp(G^T h) (n, n), and a factor (n, n) of the noise that the step adds. Its covariance is
    var (I - E E^T), but in a short step that has lost all its digits. So it is integrated, 2 xi var
    int exp(G^T s) e_n e_n^T exp(G s) ds from 0 to h (the integrand times -2 xi is the derivative of
    exp(G^T s) exp(G s)), at 100 nodes s_j. Row j of `noise` is
    sqrt(weight_j) times column n of exp(G^T s_j), so the covariance is noise^T noise, and with
    noise = Q R it is R^T R. ValueError where 100 nodes do not resolve the damping."""
    E = process.transition(h).mT
    s, ds = gauss_legendre(0.0, h, 100)
    weights = 2 * process.damping[1] * process.var * ds
    noise = process.transition(s).mT[..., -1] * weights.sqrt()[:, None]  # (100, n)
    missed = noise.T @ noise + process.var * (E @ E.T) - process.prior_cov
    if missed.abs().max() > 1e-6 * process.var:
        raise ValueError(f"a step of {h:g} is too long for this damping: take more calls")
    L = torch.linalg.qr(noise, mode="r").R.T
    return E, L * torch.copysign(torch.ones(process.n, **F64), L.diagonal())  # diagonal > 0


def force(process, t):
    """(1, n + 1): f = m_n + var grad_n log p(m | x) as a combination of the blocks of cat(m, x).
    The gradient is -eps_n / L_nn, and 1/L_nn is w_n."""
    w, w_x = affine(process, t)
    f = -process.var * w[-1] * torch.cat([w, w_x[None]])
    f[-2] += 1  # block n; f[-1] belongs to x
    return f[None]


@lru_cache(1000)
def kick(process, t, h):
    """(n, n + 1), on cat(m, x): dm_n = 2 xi f |dt| over h with t and x frozen, solved exactly. m_n
    enters its own rate of change with the factor rate, so dm_n/ds = rate m_n + rest, which adds
    2 xi f (e^(rate h) - 1)/rate, f at the start. At low noise -rate is so large that an Euler step
    would be unstable. (rate = 2 xi (1 - var/L_nn^2) < 0 for alpha <= 1, as L_nn^2 < var.)"""
    f = force(process, t)[0]
    two_xi = 2 * process.damping[1]
    rate = two_xi * float(f[-2])
    duration = math.expm1(rate * h) / rate if rate else h  # int_0^h e^(rate s) ds
    stay = torch.eye(process.n, process.n + 1, **F64)
    e_n = torch.eye(process.n, **F64)[-1]
    return stay + torch.outer(e_n, two_xi * duration * f)


def sde_times(process, nfe, t_end, extra=0):
    """nfe + extra times from `first` to t_end, by default that of `ode`, even in log(1 + 10
    sqrt(SNR))."""
    t_end = end_time(process, nfe) if t_end is None else t_end
    check_grid(process, nfe, t_end)
    return times(process, nfe + extra, t_end, 10.0)


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
    "strang": strang,
    "lie": lie,
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
