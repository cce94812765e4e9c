"""HOLD, high-order Langevin dynamics, in one file: equations -> process -> loss -> samplers -> likelihood.

Paper: "Generative Modelling with High-Order Langevin Dynamics" (Shi & Liu, arXiv 2404.12814); it has no public code,
and the defaults here are ours. Order n = 1 is the OU (VP) process, 2 is CLD, 3 is HOLD.

Data q is coupled to n - 1 auxiliary blocks, m = (q, p, s, ...), and noise enters the last block only:

    dm = F m dt + sqrt(2 xi L_inv) e_n dW,    F = sum_i gamma_i (E_{i,i+1} - E_{i+1,i}) - xi E_{nn}
    from m = (x, N(0, alpha L_inv), ...) at t = 0 to N(0, L_inv I) at T, stationary as F + F^T = -2 xi E_{nn}

Given x the state is Gaussian, m = mean x + L eps. In whitened coordinates z = L^-1 m it reads

    z = kappa x + eps,    kappa = L^-1 mean,    SNR = |kappa|^2,    eps_n = z_n - kappa_n x,

so a prediction of eps_n is a prediction of x and back (`hop`, `noise`), and the score of the last block, the only one
that is needed, is -eps_n / L_nn. All that m tells of x is one mirror of it,

    y = x + sigma noise,    sigma = SNR^-1/2,    E[x | m] = E[x | y],

so instead of eps_n the network may learn to denoise y (param = "denoiser"); that network then serves every process and
order. Two ways back, t falling:

    SDE    dm = (F^T m + 2 xi e_n f) |dt| + sqrt(2 xi L_inv) e_n dW,    f = m_n + L_inv grad_n log p(m)
    ODE    dz = E[x | m] dkappa        (given x, z moves with kappa and eps stands still; average over x)

The ODE has the SDE's marginals. It is the probability flow for n = 1, and for n > 1 up to a rotation of eps, which a
Gaussian does not notice: the probability flow turns the faster the higher the order, this one not at all.

    symbol     name here            meaning
    m          m                    state cat(q, p, s, ...) on axis 1: (B, n C, H, W) or (B, n D)
    gamma, xi  HOLD.gamma, HOLD.xi  rotation speeds and friction; None is critical damping
    L_inv      HOLD.L_inv           prior variance of every block; alpha L_inv is that of the auxiliaries at t = 0
    F          drift()              (n, n)       drift matrix; transition(t) is exp(F t)
    mu_t       mean(t)              (..., n)     mean of the blocks per unit of x
    Sigma_t    cov(t)               (..., n, n)  covariance of the blocks given x
    L_t        cholesky(t)          (..., n, n)  lower factor of Sigma_t
    kappa      kappa(t)             (..., n)     L^-1 mean; |kappa|^2 is snr(t)
    lambda     clock(t, R)          (...)        log(1 + R sqrt(SNR)): training times and grids are even in it
    y          project(t)           w (..., n) and SNR (...) with y / sigma = w . m
    eps_theta  net(m, t)            "paper": what the network learns, net(m, t, label) -> (B, C, ...), t of shape (B,)
    D          precondition()       "denoiser": E[x | y] from net(c_in y, sigma / (1 + sigma), label)

Coefficients are float64 tensors on the CPU whatever the state is; only their product with the state takes its dtype and
device (`mix`). Data have unit scale: images in [-1, 1].
"""

import math
import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import ClassVar

import torch

# ---------------------------------------------------------------------------------------------------------------------
# Process


@dataclass(frozen=True)
class HOLD:
    """The forward process. HOLD() is order 3 at critical damping; `gamma` and `xi` then hold the numbers in use.

    Times are numbers or tensors of any shape (...), at least 0; a ValueError says so otherwise.
    snr_max: training and sampling stop at noise of std .005 on the data, below one 8-bit grey level (2/255); the last
    call's hop takes that away too. It also keeps every order's t_min where `cholesky` is right to 1e-9.
    """

    order: int = 3  # n, blocks of the state
    gamma: tuple | None = None  # n - 1 rotation speeds, > 0; None: critical damping
    xi: float | None = None  # friction, > 0; None: critical damping
    L_inv: float = 1.0  # prior variance of every block, > 0
    alpha: float = 0.04  # the auxiliary blocks start with variance alpha L_inv, > 0
    T: float = 6.0  # last time of training and first of every sampler; SNR(T) < 1e-3 for all critical orders
    snr_max: float = 4e4  # SNR of t_min, first time of training and the latest a sampler may ask the network about
    bound: float = math.inf  # largest |x| of the data (images: 1); data predictions are kept within it
    param: str = "paper"  # what the network learns: eps_n from m ("paper"), or x from y ("denoiser")
    sigma_data: float = 0.5  # standard deviation of the data, for the denoiser and for the grid of `ode`
    R: ClassVar[float] = 10.0  # of the clock that an eps-network is trained in, and the SDE samplers step in
    t_data: ClassVar[float] = 0.0  # where on the time axis the data are

    def __post_init__(self):
        if not (isinstance(self.order, int) and self.order >= 1):
            raise ValueError(f"order counts blocks of the state and must be an integer >= 1, got {self.order}")
        gamma, xi = self.critical()
        object.__setattr__(self, "gamma", gamma if self.gamma is None else tuple(self.gamma))
        object.__setattr__(self, "xi", xi if self.xi is None else self.xi)
        if len(self.gamma) != self.n - 1:
            raise ValueError(f"order {self.n} wants {self.n - 1} values of gamma (None: critical), got {self.gamma}")
        if not all(0 < v < math.inf for v in (*self.gamma, self.xi, self.L_inv, self.alpha, self.T, self.snr_max)):
            raise ValueError(f"HOLD wants gamma, xi, L_inv, alpha, T and snr_max positive and finite, got {self}")
        if not (self.bound > 0 and self.sigma_data > 0 and self.param in ("paper", "denoiser")):
            raise ValueError(f"HOLD wants bound > 0, sigma_data > 0 and param 'paper' or 'denoiser', got {self}")
        snr = float(self.snr(self.T))
        if not 0 < snr < self.snr_max:
            fix = "raise T" if snr else "lower T"
            raise ValueError(f"SNR at T={self.T} must be above 0 and below snr_max={self.snr_max:g}, is {snr:g}: {fix}")
        if snr > 1e-2:  # the prior would miss that much of the data
            T = self.time_of(1e-3)
            warnings.warn(
                f"SNR at T={self.T} is {snr:.2g}, so the prior is off: use T={T:.2f} (SNR 1e-3)", stacklevel=3
            )

    @property
    def n(self):
        return self.order

    @property
    def t_range(self):
        """First and last time a network is asked about."""
        return self.t_min, self.T

    def critical(self):
        """gamma and xi at which all n eigenvalues of the drift are equal, -sqrt(2n - 3) (n = 1: -1)."""
        n, lam2 = self.order, max(2 * self.order - 3, 1)
        gamma = [math.sqrt(lam2 * (n**2 - i**2) / (4 * i**2 - 1)) for i in range(n - 1, 0, -1)]
        return tuple(gamma), n * math.sqrt(lam2)

    def drift(self):
        """(n, n): F."""
        G = torch.diag(torch.tensor(self.gamma, dtype=torch.float64), 1)
        F = G - G.mT
        F[-1, -1] = -self.xi
        return F

    def transition(self, t):
        """(..., n, n): exp(F t), at critical damping the finite sum e^{lam t} sum_k (F - lam I)^k t^k / k!, k < n."""
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")[..., None, None]
        if not ((t >= 0) & (t < math.inf)).all():
            raise ValueError(f"HOLD time runs from 0 (data) to T (prior), got {t.min():g} to {t.max():g}")
        if (self.gamma, self.xi) != self.critical():
            return torch.linalg.matrix_exp(self.drift() * t)
        lam, eye = -self.xi / self.n, torch.eye(self.n, dtype=torch.float64)
        term, total = eye, eye
        for k in range(1, self.n):
            term = term @ (self.drift() - lam * eye) * t / k
            total = total + term
        return torch.exp(lam * t) * total

    def mean(self, t):
        """(..., n): mean of the blocks per unit of x."""
        return self.transition(t)[..., 0]

    def cov(self, t):
        """(..., n, n): covariance of the blocks given x, L_inv I + exp(F t) (S0 - L_inv I) exp(F t)^T."""
        L = self.cholesky(t)  # from the factor, which keeps the digits at small t
        return L @ L.mT

    def cholesky(self, t):
        """(..., n, n): lower L with L L^T = cov(t).

        At early times S0 and the noise of [0, t] are stacked in square-root form, where nothing cancels; at late times
        cov is nearly L_inv I, and the small entries keep their digits only if computed as the difference from that.
        """
        E, eye = self.transition(t), torch.eye(self.n, dtype=torch.float64)
        S0 = torch.full((self.n,), self.alpha * self.L_inv, dtype=torch.float64)
        S0[0] = 0
        early = lower(torch.cat([E * S0.sqrt(), self.diffusion(t)], -1))
        rest = (E * (S0 - self.L_inv)) @ E.mT
        is_late = rest.abs().amax((-2, -1), keepdim=True) < self.L_inv / 4
        return torch.where(is_late, torch.linalg.cholesky(self.L_inv * eye + rest * is_late), early)

    def diffusion(self, t):
        """(..., n, K): Q with Q Q^T = 2 xi L_inv int_0^t exp(F s) e_n e_n^T exp(F s)^T ds, a column per node s."""
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")[..., None]
        turns = 0 if (self.gamma, self.xi) == self.critical() else torch.linalg.matrix_norm(self.drift(), 2) * t.max()
        s, ds = gauss_legendre(0.0, 1.0, 40 + int(turns))
        return self.transition(t * s)[..., -1].mT * (2 * self.xi * self.L_inv * t * ds).sqrt()[..., None, :]

    def whiten(self, t):
        """L (..., n, n) and kappa = L^-1 mean (..., n)."""
        L = self.cholesky(t)
        return L, torch.linalg.solve_triangular(L, self.mean(t)[..., None], upper=False)[..., 0]

    def kappa(self, t):
        """(..., n): L^-1 mean."""
        return self.whiten(t)[1]

    def kappa_rate(self, t):
        """(..., n): d kappa / dt, from mean' = F mean and L' = L P, P the lower half of L^-1 cov' L^-T."""
        L, e_n = self.cholesky(t), torch.eye(self.n, dtype=torch.float64)[-1]
        G = torch.linalg.solve_triangular(L, self.drift() @ L, upper=False)
        P = G + G.mT + torch.diag(e_n) * (2 * self.xi * self.L_inv / L[..., -1:, -1:] ** 2)
        P = P.tril() - torch.diag_embed(P.diagonal(dim1=-2, dim2=-1)) / 2
        return ((G - P) @ self.kappa(t)[..., None])[..., 0]

    def affine(self, t):
        """w (..., n) and b (...) with eps_n = w . m + b x: w is the last row of L^-1, b = -kappa_n."""
        e_n = torch.eye(self.n, dtype=torch.float64)[:, -1:]
        w = torch.linalg.solve_triangular(self.cholesky(t).mT, e_n, upper=True)[..., 0]
        return w, -(w * self.mean(t)).sum(-1)

    def project(self, t):
        """w (..., n) and SNR (...), t > 0: y / sigma = w . m, where y = x + sigma noise is all that m tells of x."""
        L, kappa = self.whiten(t)
        w = torch.linalg.solve_triangular(L.mT, kappa[..., None], upper=True)[..., 0]
        norm = kappa.norm(dim=-1)
        return w / norm[..., None], norm**2

    def snr(self, t):
        """(...): mean^T cov^-1 mean, falling from infinity at t = 0."""
        return self.kappa(t).square().sum(-1)

    def clock(self, t, R=R):
        """(...): lambda = log(1 + R sqrt(SNR)). Below SNR = 1/R^2 little is known of x and even steps of sqrt(SNR) will
        do; above, a network's error in x is its error in eps_n over kappa_n, and steps must be even factors of it."""
        return torch.log1p(R * self.snr(t).sqrt())

    def time_of(self, snr):
        """The time (a float) at which the SNR falls to `snr`, by bisection in log t."""
        low, high = math.log(1e-12), math.log(1e6)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.snr(math.exp(middle)) > snr else (low, middle)
        return math.exp(high)

    @cached_property
    def t_min(self):
        """The smallest time of training and of every sampler, where the SNR is snr_max."""
        return self.time_of(self.snr_max)

    @cached_property
    def knots(self):
        """sqrt(SNR) (1000,), rising, and t (1000,), from T to t_min: the table behind `time`."""
        t = torch.linspace(math.log(self.T), math.log(self.t_min), 1000, dtype=torch.float64).exp()
        return self.snr(t).sqrt(), t

    def time(self, clock, R=R):
        """t (...) and dt/dlambda (...) at lambda = clock, by straight lines between the knots."""
        root_snr, t = self.knots
        c = torch.log1p(R * root_snr)
        k = torch.searchsorted(c, clock).clamp(1, len(c) - 1)
        slope = (t[k] - t[k - 1]) / (c[k] - c[k - 1])
        return t[k - 1] + slope * (clock - c[k - 1]), slope

    def prior(self, shape, generator=None):
        """(B, n C, ...) float32 draw of the state at t = T for data of shape (B, C, ...), on the generator's device."""
        shape = (shape[0], self.n * shape[1], *shape[2:])
        eps = torch.randn(shape, generator=generator, device=generator.device if generator else None)
        return math.sqrt(self.L_inv) * eps


def lower(A):
    """Lower L with L L^T = A A^T and diagonal >= 0, by QR: nothing is subtracted, so nothing cancels and no jitter."""
    L = torch.linalg.qr(A.mT, mode="r").R.mT
    return L * torch.where(L.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(L)[..., None, :]


def mix(A, m):
    """Block algebra (A kron I) m: A (i, j) or (B, i, j), m (B, j*C, ...) -> (B, i*C, ...), in m's dtype and device.

    A product and a sum, not a matmul, so that neither autocast nor TF32 rounds the coefficients.
    """
    z = m.reshape(len(m), 1, A.shape[-1], -1)  # (B, 1, j, K)
    y = (A.to(z)[..., None] * z).sum(-2)  # (B, i, K)
    return y.reshape(len(m), -1, *m.shape[2:])


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def loss(process, net, x, label=None, weight="uniform"):
    """BCSM, E[w(t) |net(m, t) - eps_n|^2] per data dimension, lambda uniform on [clock(T), clock(t_min)]; or
    `denoiser_loss`, with param = "denoiser".

    x: data (B, C, ...), unit scale. One t per image, stratified over the batch.
    weight: "uniform" is w = 1; "likelihood", with param = "paper" only, is w = xi L_inv / L_nn^2 for t uniform on
    [t_min, T], the bound's weight: the density of t is divided out, and even steps of lambda put the samples where that
    weight is large. Errors: ValueError for any other weight.
    """
    weights = ["uniform", "likelihood"] if process.param == "paper" else ["uniform"]
    if weight not in weights:
        raise ValueError(f"with param {process.param!r} weight must be one of {weights}, got {weight!r}")
    if process.param == "denoiser":
        return denoiser_loss(process, net, x, label)
    first, last = torch.log1p(process.R * process.knots[0][[0, -1]])  # clock(T), clock(t_min)
    t, slope = process.time(first + (last - first) * stratified(len(x)))  # (B,)
    m, target = training_pair(process, x, t, torch.randn_like(torch.cat([x] * process.n, 1)))
    error = net(m, t.to(x), label) - target
    w = torch.ones_like(t)
    if weight == "likelihood":
        ratio = -slope * (last - first) / (process.T - process.t_min)  # density of uniform t over that of t here
        w = process.xi * process.L_inv / process.cholesky(t)[:, -1, -1] ** 2 * ratio
    return mix(w[:, None, None], error**2).mean()


def stratified(n):
    """n numbers (n,), each uniform on [0, 1], one in each of n equal parts: together they spread over the batch."""
    return (torch.arange(n) + torch.rand(n, dtype=torch.float64)) / n


def denoiser_loss(process, net, x, label=None):
    """E[|D - x|^2 / c_out^2] per dimension, D the denoiser at y = x + sigma noise, ln sigma ~ N(-1.2, 1.2^2) as
    EDM's: the same for every process. One sigma per image, stratified over the batch."""
    u = stratified(len(x))
    snr = torch.exp(-2 * (-1.2 + 1.2 * torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9))))  # (B,)
    y = mix(snr.sqrt()[:, None, None], x) + torch.randn_like(x)  # over sigma
    error = precondition(process, net, y, snr, label) - x
    return mix((1 / process.sigma_data**2 + snr)[:, None, None], error**2).mean()


def training_pair(process, x, t, eps):
    """State m = mean x + L eps (B, n C, ...) and label eps_n (B, C, ...), t (B,), eps (B, n C, ...)."""
    m = mix(process.mean(t)[..., None], x) + mix(process.cholesky(t), eps)
    return m, eps.chunk(process.n, 1)[-1]


# ---------------------------------------------------------------------------------------------------------------------
# From a prediction of eps_n to one of x, and back


def hop(process, eps_n, m, t):
    """Sampling-hop (not in the paper): the x (B, C, ...) that explains noise eps_n at state m, time t (a number)."""
    w, b = process.affine(t)
    return (eps_n - mix(w[None], m)) / float(b)


def noise(process, x, m, t):
    """The inverse of hop: the eps_n (B, C, ...) that belongs to the data prediction x."""
    w, b = process.affine(t)
    return mix(w[None], m) + float(b) * x


def precondition(process, net, u, snr, label=None):
    """EDM's denoiser (Karras et al. 2022, section 5): E[x | y] (B, C, ...) for y = x + sigma noise, sigma = SNR^-1/2.

    u: y / sigma (B, C, ...); snr: (B,) float64. Unlike y, all that is used stays finite as SNR -> 0. The network sees
    c_in y, of unit variance, and the time sigma / (1 + sigma): 0 at the data, 1 at pure noise.
    """
    s = process.sigma_data
    c = (1 + s**2 * snr) ** -0.5  # (B,)
    out = net(mix(c[:, None, None], u), (1 / (1 + snr.sqrt())).to(u), label).to(u)
    return mix((s**2 * snr.sqrt() * c**2)[:, None, None], u) + mix((s * c)[:, None, None], out)  # c_skip y + c_out out


def denoise(process, net, m, t, label=None):
    """One network call: E[x | m] at time t (a number), within the data's bound: near T it is a network's error in eps_n
    over a kappa_n near 0, and without a bound one stray prediction there throws the sample off for good."""
    if process.param == "denoiser":
        w, snr = process.project(t)
        x = precondition(process, net, mix(w[None], m), snr.expand(len(m)), label)
    else:
        x = hop(process, net(m, torch.full((len(m),), float(t), dtype=m.dtype, device=m.device), label).to(m), m, t)
    return x.clamp(-process.bound, process.bound)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers. All of them: m0 (B, n C, ...) from the prior -> x (B, C, ...); exactly nfe network calls; the result is the
# data prediction of the last call. Each takes its force from the data prediction, so any denoiser serves them all.


@lru_cache(1000)  # the same for every batch
def grid(process, nfe, rho, t_end, R=HOLD.R, extra=0):
    """nfe + extra times from T down to t_end (None: `last_time`), uniform in lambda^(1/rho), lambda = clock(t, R): in
    t, a high order would skip low noise."""
    if nfe < 1:
        raise ValueError(f"nfe counts network calls and must be at least 1, got {nfe}")
    t_end = last_time(process, nfe) if t_end is None else t_end
    if not (0.01 <= rho <= 100 and process.t_min <= t_end < process.T):
        raise ValueError(
            f"want 0.01 <= rho <= 100 and {process.t_min} <= t_end < {process.T}, got rho={rho}, t_end={t_end}"
        )
    a, b = (float(process.clock(t, R)) ** (1 / rho) for t in (process.T, t_end))
    clock = torch.linspace(a, b, nfe + extra, dtype=torch.float64) ** rho
    return tuple(process.time(clock, R)[0].tolist())


@lru_cache(1000)
def last_time(process, nfe):
    """Where a sampler ends by default: noise of std 1/(3 nfe) on unit data, or t_min if that is larger."""
    return max(process.time_of((3 * nfe) ** 2), process.t_min)


def em(process, net, m0, nfe, label=None, rho=1.0, t_end=None, randn=torch.randn_like):
    """SDE, Euler-Maruyama. t_end: time of the last call (default `last_time`); randn(x): unit noise shaped like x."""
    m, e_n = m0, torch.eye(process.n, dtype=torch.float64)[:, -1:]
    ts = grid(process, nfe, rho, t_end)
    for t, t_next in pairwise(ts):
        h = t - t_next
        f = force(process, denoise(process, net, m, t, label), m, t)
        push = 2 * process.xi * h * f + math.sqrt(2 * process.xi * process.L_inv * h) * randn(f)
        m = m + mix(h * process.drift().mT, m) + mix(e_n, push)
    return denoise(process, net, m, ts[-1], label)


def lie(process, net, m0, nfe, label=None, rho=1.0, t_end=None, randn=torch.randn_like):
    """SDE, Lie-Trotter splitting (the paper's): a step of linear flow, then the kick. Weak order 1.
    t_end: end of the last step (default `last_time`), where the last call is."""
    m = m0
    ts = grid(process, nfe, rho, t_end, extra=1)
    for i in range(nfe):
        h = ts[i] - ts[i + 1]
        m = linear_flow(process, m, h, randn)
        x = denoise(process, net, m, ts[i + 1], label)
        if i == nfe - 1:
            return x
        m = kick(process, x, m, ts[i + 1], h)


def strang(process, net, m0, nfe, label=None, rho=1.0, t_end=None, randn=torch.randn_like):
    """SDE, Strang splitting: half a step of linear flow, the kick with x at mid-step, half a step of linear flow.

    The force depends on the block it kicks, so x is asked for half-way through the kick, which the x of the step before
    takes us to: without that the scheme (CLD's SSCS) has weak order 1, with it 2, at the same one call a step.
    t_end: end of the last step (default `last_time`); the last call is at its middle.
    """
    m, x = m0, None
    ts = grid(process, nfe, rho, t_end, extra=1)
    for i in range(nfe):
        h, middle = ts[i] - ts[i + 1], (ts[i] + ts[i + 1]) / 2
        m = linear_flow(process, m, h / 2, randn)
        half_way = m if x is None else kick(process, x, m, middle, h / 2)
        x = denoise(process, net, half_way, middle, label)
        if i == nfe - 1:
            return x
        m = linear_flow(process, kick(process, x, m, middle, h), h / 2, randn)


def linear_flow(process, m, h, randn):
    """dm = F^T m |dt| + sqrt(2 xi L_inv) e_n dW over h, drawn exactly. F^T is F with every other block's sign changed,
    so its noise is the forward process's with those signs."""
    sign = (-1.0) ** torch.arange(process.n, dtype=torch.float64)[:, None]
    return mix(process.transition(h).mT, m) + mix(sign * lower(process.diffusion(h)), randn(m))


def force(process, x, m, t):
    """f = m_n + L_inv grad_n log p(m | x) (B, C, ...)."""
    L_nn = float(process.cholesky(t)[-1, -1])
    return m.chunk(process.n, 1)[-1] - process.L_inv / L_nn * noise(process, x, m, t)


def kick(process, x, m, t, h):
    """dm_n = 2 xi f |dt| over h at frozen t and x, solved exactly: f grows at rate a, and a h << -1 at low noise."""
    a = 2 * process.xi * (1 - process.L_inv / float(process.cholesky(t)[-1, -1]) ** 2)
    e_n = torch.eye(process.n, dtype=torch.float64)[:, -1:]
    growth = math.expm1(a * h) / a if a else h
    return m + mix(2 * process.xi * growth * e_n, force(process, x, m, t))


def ode(process, net, m0, nfe, label=None, order=2, rho=1.0, t_end=None, eta=0.0, randn=torch.randn_like):
    """ODE, dz = E[x|m] dkappa, exponential Adams-Bashforth: the data prediction of the last `order` (1-4) calls is
    extrapolated in lambda and the rest integrated exactly.

    lambda = log(1 + R sqrt(SNR)) with R = sigma_data sqrt(d), the length of a sample of d numbers: a whole image
    stands out from noise of that size, which drowns each of its pixels, and there the first steps belong. An
    eps-network, whose first prediction is too poor for a long step, keeps the clock it was trained in. Calls are even
    in lambda^(1/rho). t_end: time of the last call (default `last_time`).

    eta > 0 renews the noise on the way and keeps the marginals: with l = log |kappa|,
    dz = E[x|m] dkappa - eta^2 (z - kappa E[x|m]) dl + sqrt(2) eta dW(l). eta = 1 renews as much of it as the reverse
    SDE of y does (n = 1: that very SDE).
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order must be 1, 2, 3 or 4, got {order}")
    if not eta >= 0:
        raise ValueError(f"eta scales the noise and must be at least 0, got {eta}")
    R = process.sigma_data * math.sqrt(m0[0].numel() / process.n) if process.param == "denoiser" else process.R
    ts = grid(process, nfe, rho, t_end, R)
    z, past = mix(torch.linalg.inv(process.cholesky(ts[0])), m0), []  # past: (lambda, x) of the last calls
    for t, t_next in pairwise(ts):
        x = denoise(process, net, mix(process.cholesky(t), z), t, label)
        past = [*past, (float(process.clock(t, R)), x)][-order:]
        weights, keep = kappa_steps(process, t, t_next, R, tuple(clock for clock, _ in past), eta)
        z = keep * z + mix(weights, torch.cat([x for _, x in past], 1))
        if eta:
            z = z + math.sqrt(1 - keep**2) * randn(z)
    return denoise(process, net, mix(process.cholesky(ts[-1]), z), ts[-1], label)


@lru_cache(1000)  # the same for every batch
def kappa_steps(process, t, t_next, R, nodes, eta, parts=256):
    """(n, p) and keep: column i is int l_i(lambda) d(w kappa) from t to t_next, l_i the Lagrange polynomial of node i,
    w = (|kappa| / |kappa(t_next)|)^(eta^2), keep = w(t); for d(w z) = E[x|m] d(w kappa) + noise."""
    u = torch.linspace(math.log(t), math.log(t_next), parts + 1, dtype=torch.float64).exp()
    kappa, clock = process.kappa(u), process.clock(u, R)
    basis = torch.stack([lagrange(nodes, i, (clock[1:] + clock[:-1]) / 2) for i in range(len(nodes))])  # (p, parts)
    norm = kappa.norm(dim=-1, keepdim=True)
    w = ((norm / norm[-1]) ** eta) ** eta
    return (basis @ (w * kappa).diff(dim=0)).mT, float(w[0])


def gauss_legendre(a, b, nodes=16):
    """Nodes and weights on [a, b] from the eigenvectors of the Jacobi matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, nodes, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    x, V = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (a + b) / 2 + (b - a) / 2 * x, (b - a) * V[0] ** 2


def lagrange(times, i, u):
    """The Lagrange basis polynomial of node i at the points u."""
    terms = [(u - s) / (times[i] - s) for j, s in enumerate(times) if j != i]
    return math.prod(terms, start=torch.ones_like(u))


SAMPLERS = {"ode": ode, "strang": strang, "lie": lie, "em": em}  # the first is the default

# ---------------------------------------------------------------------------------------------------------------------
# Likelihood


def log_likelihood_bound(process, net, x, label=None, exact=None, tol=1e-5):
    """A lower bound of log p(x), in nats per sample (B,), from one draw of the noise; averaging draws is the caller's.

    The model is what `ode` samples: z from the prior along the flow to t_min, then the hop, plus noise of variance
    1/SNR. With the forward process q(z | x) = N(kappa x, I) as encoder, for any network,

        log p(x) >= E_q[log p_ODE(z) + log N(x; hop(z), 1/SNR) - log q(z | x)],    z = kappa x + eps at t_min,

    which as t_min -> 0 is E[log p_ODE(q, aux)] + (n - 1) d/2 (1 + log 2 pi alpha L_inv). With an exact net it is on
    average d/4 (1 / (SNR s^2))^2 nats below the truth for Gaussian data of variance s^2.
    exact: the divergence by d backward passes a call (default up to d = 16), else by Hutchinson's estimate with one
    Rademacher probe a sample. tol: the flow's tolerance (`dormand_prince`); 1e-5 costs some 120 calls on smooth data.
    The caller adds what made x from pixels: uniform dequantisation and log |dx / dpixel|.
    """
    B, d, n, t = len(x), x[0].numel(), process.n, process.t_min
    exact = d <= 16 if exact is None else exact
    probes = torch.eye(d).to(x).reshape(d, 1, *x.shape[1:]) if exact else torch.randint_like(x, 2)[None] * 2 - 1
    eps = torch.randn_like(torch.cat([x] * n, 1))
    z = mix(process.kappa(t)[:, None], x) + eps

    def field(s, y):  # d(z, log p)/ds, s = log time
        time = math.exp(s)
        rate = time * process.kappa_rate(time)
        with torch.enable_grad():
            state = y[:, :-1].detach().reshape(eps.shape).requires_grad_()
            D = denoise(process, net, mix(process.cholesky(time), state), time, label)
            grads = [torch.autograd.grad((D * v).sum(), state, retain_graph=True)[0] for v in probes]
        div = sum((v * mix(rate[None], g)).reshape(B, -1).sum(1) for v, g in zip(probes, grads, strict=True))
        return torch.cat([mix(rate[:, None], D.detach()).reshape(B, -1), div[:, None]], 1)

    with torch.no_grad():
        error = x - denoise(process, net, mix(process.cholesky(t), z), t, label)
    y = torch.cat([z.reshape(B, -1), torch.zeros_like(z.reshape(B, -1)[:, :1])], 1)
    y = dormand_prince(field, y, math.log(t), math.log(process.T), tol)
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
    h, k = (s_end - s) / 100, [field(s, y)]
    while s < s_end:
        h = min(h, s_end - s)
        for row in tableau:
            new = y + h * sum(a * v for a, v in zip(row, k, strict=True))
            k.append(field(s + h * sum(row), new))
        error = h * sum(a * v for a, v in zip(fifth_minus_fourth, k, strict=True)) / (tol * (1 + y.abs()))
        error = float(error.square().mean(1).max().sqrt())
        if not math.isfinite(error):
            raise ValueError(f"the flow is not finite at t = {math.exp(s):.3g}: check the network and the scale of x")
        s, y, k = (s + h, new, k[-1:]) if error <= 1 else (s, y, k[:1])  # the last call is the next step's first
        h *= min(5.0, max(0.2, 0.9 * max(error, 1e-9) ** -0.2))
    return y
