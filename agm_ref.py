"""AGM, the phase stochastic bridge, in one file: equations -> process -> loss -> samplers.

Paper: "Generative Modeling with Phase Stochastic Bridges" (Chen et al., ICLR 2024, arXiv 2310.07805).

A particle with position x and velocity v is steered from noise at t = 0 to a data point x1 at t = 1:

    dx = v dt,    dv = a dt + g(t) dW,    g(t) = p (1 - t),    (x, v) at 0 ~ N(0, [[1, k], [k, 1]])
    a*(m, t) = (4/tau) ((x1 - x)/tau - v),    tau = 1 - t            the optimal acceleration (stochastic bridge)

The bridge in two modes. Under a* the error e = x - x1 obeys e'' = -4 e/tau^2 - 4 e'/tau, solved by tau and tau^4. Hence

    (e, v) = M c,    M = [[tau, tau^4], [-1, -4 tau^3]],    c = (c_1, c_2) the mode amplitudes

and noise only ever adds to c. Given x1, the state at time t is Gaussian, m = mean x1 + L eps, with L L^T = M C M^T,
C = Cov(c): that is all `mean`, `cov` and `cholesky` compute. Given x1, the acceleration is F = a* for the SDE, and
F = a* - g^2/2 grad_v log p(m | x1) for the probability-flow ODE. The network learns the mean of F over all x1 that may
have led to m, in which that score becomes grad_v log p(m). Either F is affine in (x1, eps),

    F = 4 tau^2 x1 + r . eps     or, the same in terms of the state,     F = w . m + b x1,    w = L^-T r,

so a prediction of F is one of E[x1 | m], and back (`hop`, `acceleration`). All that m tells of x1 is one mirror of it,

    y = x1 + sigma noise,    sigma = SNR^-1/2,    SNR = mean^T cov^-1 mean,    E[x1 | m] = E[x1 | y],

so instead of F the network may learn to denoise y (param = "denoiser"); that network then serves every process.

    symbol   name here         meaning
    m        m                 state cat(x, v) on axis 1: (B, 2C, H, W) or (B, 2D)
    p, k     AGM.p, AGM.k      diffusion scale; covariance of x and v in the prior
    mu_t     mean(t)           (..., 2)     mean of (x, v) per unit of x1
    Sigma_t  cov(t)            (..., 2, 2)  covariance of (x, v) given x1
    L_t      cholesky(t)       (..., 2, 2)  lower factor of Sigma_t
    kappa    kappa(t)          (..., 2)     L^-1 mean; |kappa|^2 is the SNR
    r        gain(t)           (..., 2)     noise part of the target F
    s        scale(t)          (...)        |r|, so that F / s has unit variance at x1 = 0
    lambda   clock(t, R)       (...)        log(1 + R sqrt(SNR)): the times of `ode` are even in it
    y        project(t)        w (..., 2) and SNR (...) with y / sigma = w . m
    F_theta  s * net(m, t)     "paper": what the network learns, net(m, t, label) -> (B, C, ...), t of shape (B,)
    D        precondition()    "denoiser": E[x1 | y] from net(c_in y, sigma / (1 + sigma), label)

Coefficients are float64 tensors on the CPU whatever the state is; only their product with the state takes its dtype and
device (`mix`). Data have unit scale: images in [-1, 1].
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import torch

# ---------------------------------------------------------------------------------------------------------------------
# Process


@dataclass(frozen=True)
class AGM:
    """The bridge process. AGM() is the probability-flow ODE with the paper's p = 3, k = -0.2 and unit prior variances.

    Times are numbers or tensors of any shape (...) in [0, 1); a ValueError says so otherwise.
    """

    p: float = 3.0  # diffusion scale, > 0
    k: float = -0.2  # prior covariance of x and v, |k| < 1
    sde: bool = False  # which acceleration the network learns: the SDE's, or the probability-flow ODE's
    t0: float = 1e-5  # first time of training and of every sampler
    t1: float = 0.999  # last time of training, and the latest a sampler may ask the network about
    param: str = "paper"  # what the network learns: F / s from m ("paper"), or x1 from y ("denoiser")
    sigma_data: float = 0.5  # standard deviation of the data, for the denoiser and for the grid of `ode`
    n: ClassVar[int] = 2  # blocks of the state
    T: ClassVar[float] = 1.0  # end of time
    t_data: ClassVar[float] = 1.0  # where on it the data are

    def __post_init__(self):
        if not (self.p > 0 and abs(self.k) < 1 and 0 < self.t0 < self.t1 < 1):
            raise ValueError(f"AGM wants p > 0, |k| < 1 and 0 < t0 < t1 < 1, got {self}")
        if not (self.sigma_data > 0 and self.param in ("paper", "denoiser")):
            raise ValueError(f"AGM wants sigma_data > 0 and param 'paper' or 'denoiser', got {self}")

    @property
    def t_range(self):
        """First and last time a network is asked about."""
        return self.t0, self.t1

    def modes(self, t):
        """tau (...) and C (..., 2, 2), the covariance of the two mode amplitudes."""
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        if not ((t >= 0) & (t < 1)).all():
            raise ValueError(f"AGM time runs from 0 (prior) to 1 (data, excluded), got {t.min():g} to {t.max():g}")
        tau, log_tau = 1 - t, torch.log1p(-t)
        B = torch.tensor([[4.0, 1.0], [-1.0, -1.0]], dtype=torch.float64) / 3  # M(tau = 1)^-1
        S0 = torch.tensor([[1.0, self.k], [self.k, 1.0]], dtype=torch.float64)
        # A kick dv adds (dv/3, -dv/(3 tau^3)) to c; integrated against p^2 tau^2 dt these make the noise part.
        noise = matrix([[-torch.expm1(3 * log_tau), 3 * log_tau], [3 * log_tau, torch.expm1(-3 * log_tau)]])
        return tau, B @ S0 @ B.T + self.p**2 / 27 * noise

    def mean(self, t):
        """(..., 2): mean of (x, v) per unit of x1, namely (1 - 4 tau/3 + tau^4/3, 4/3 (1 - tau^3)), factored in t."""
        t = 1 - self.modes(t)[0]  # checked and in float64
        return torch.stack([t**2 * (6 - 4 * t + t**2), 4 * t * (3 - 3 * t + t**2)], -1) / 3

    def cov(self, t):
        """(..., 2, 2): covariance of (x, v) given x1, M C M^T."""
        tau, C = self.modes(t)
        M = matrix([[tau, tau**4], [-torch.ones_like(tau), -4 * tau**3]])
        return M @ C @ M.mT

    def cholesky(self, t):
        """(..., 2, 2): lower L with L L^T = cov(t). L_vv = |det M| sqrt(det C) / L_xx: no cancellation as t -> 1."""
        (tau, C), S = self.modes(t), self.cov(t)
        Lxx = S[..., 0, 0].sqrt()
        det = C[..., 0, 0] * C[..., 1, 1] - C[..., 0, 1] ** 2
        return matrix([[Lxx, torch.zeros_like(Lxx)], [S[..., 0, 1] / Lxx, 3 * tau**4 * det.sqrt() / Lxx]])

    def whiten(self, t):
        """L (..., 2, 2) and kappa = L^-1 mean (..., 2)."""
        L = self.cholesky(t)
        return L, torch.linalg.solve_triangular(L, self.mean(t)[..., None], upper=False)[..., 0]

    def kappa(self, t):
        """(..., 2): L^-1 mean."""
        return self.whiten(t)[1]

    def gain(self, t):
        """(..., 2): r, the noise part of the target F = 4 tau^2 x1 + r . eps.

        r_0 = -(4/tau) (L_xx/tau + L_vx), written in C because the two terms cancel as t -> 1; r_1 = -(4/tau) L_vv, and
        the ODE adds -g^2/2 grad_v log p(m | x1) = g^2 eps_v / (2 L_vv).
        """
        (tau, C), L = self.modes(t), self.cholesky(t)
        r0 = 12 * tau**3 * (C[..., 0, 1] + tau**3 * C[..., 1, 1]) / L[..., 0, 0]
        r1 = -4 / tau * L[..., 1, 1]
        if not self.sde:
            r1 = r1 + (self.p * tau) ** 2 / (2 * L[..., 1, 1])
        return torch.stack([r0, r1], -1)

    def scale(self, t):
        """(...): s = |r|, the standard deviation of the target at x1 = 0."""
        return self.gain(t).norm(dim=-1)

    def affine(self, t):
        """w (..., 2) and b (...) with F = w . m + b x1; for the SDE w = -(4/tau^2, 4/tau), b = 4/tau^2, which is a*."""
        tau = self.modes(t)[0]
        w = torch.linalg.solve_triangular(self.cholesky(t).mT, self.gain(t)[..., None], upper=True)[..., 0]
        return w, 4 * tau**2 - (w * self.mean(t)).sum(-1)

    def project(self, t):
        """w (..., 2) and SNR (...), t > 0: y / sigma = w . m, where y = x1 + sigma noise is all that m tells of x1."""
        L, kappa = self.whiten(t)
        w = torch.linalg.solve_triangular(L.mT, kappa[..., None], upper=True)[..., 0]
        norm = kappa.norm(dim=-1)
        return w / norm[..., None], norm**2

    def clock(self, t, R):
        """(...): lambda = log(1 + R sqrt(SNR))."""
        return torch.log1p(R * self.kappa(t).norm(dim=-1))

    def time(self, clock, R):
        """t (...) in [t0, t1] at lambda = clock, by bisection."""
        low, high = torch.full_like(clock, self.t0), torch.full_like(clock, self.t1)
        for _ in range(60):
            middle = (low + high) / 2
            early = self.clock(middle, R) < clock
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return high

    def prior(self, shape, generator=None):
        """(B, 2C, ...) float32 draw of the state at t = 0 for data of shape (B, C, ...), on the generator's device."""
        shape = (shape[0], 2 * shape[1], *shape[2:])
        eps = torch.randn(shape, generator=generator, device=generator.device if generator else None)
        return mix(self.cholesky(0.0), eps)


def matrix(rows):
    """Stacks nested lists of (...) tensors into (..., rows, columns)."""
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def mix(A, m):
    """Block algebra (A kron I) m: A (i, j) or (B, i, j), m (B, j*C, ...) -> (B, i*C, ...), in m's dtype and device.

    A product and a sum, not a matmul, so that neither autocast nor TF32 rounds the coefficients.
    """
    z = m.reshape(len(m), 1, A.shape[-1], -1)  # (B, 1, j, K)
    y = (A.to(z)[..., None] * z).sum(-2)  # (B, i, K)
    return y.reshape(len(m), -1, *m.shape[2:])


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def loss(process, net, x, label=None):
    """Weighted acceleration matching, E[(1 - t) |net(m, t) - F/s|^2] per data dimension, t uniform on [t0, t1]; or
    `denoiser_loss`, with param = "denoiser".

    x: data (B, C, ...), unit scale. One t per image, stratified over the batch.
    """
    if process.param == "denoiser":
        return denoiser_loss(process, net, x, label)
    t = process.t0 + (process.t1 - process.t0) * stratified(len(x))  # (B,)
    m, target = training_pair(process, x, t, torch.randn_like(torch.cat([x, x], 1)))
    error = net(m, t.to(x), label) - target
    return mix((1 - t)[:, None, None], error**2).mean()  # one weight an image


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
    """State m = mean x + L eps (B, 2C, ...) and label F/s (B, C, ...) for times t (B,) and noise eps (B, 2C, ...)."""
    m = mix(process.mean(t)[..., None], x) + mix(process.cholesky(t), eps)
    F = mix(4 * (1 - t)[:, None, None] ** 2, x) + mix(process.gain(t)[:, None], eps)
    return m, mix(1 / process.scale(t)[:, None, None], F)


# ---------------------------------------------------------------------------------------------------------------------
# From a prediction of F to one of x1, and back


def hop(process, F, m, t):
    """Sampling-hop: the x1 (B, C, ...) that explains acceleration F at state m, time t (a number).

    One formula for SDE and ODE; for the SDE it is the paper's x + tau (v + tau F / 4).
    """
    w, b = process.affine(t)
    return (F - mix(w[None], m)) / float(b)


def acceleration(process, x1, m, t):
    """The inverse of hop: the acceleration F (B, C, ...) that belongs to the data prediction x1."""
    w, b = process.affine(t)
    return mix(w[None], m) + float(b) * x1


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
    """One network call: E[x1 | m] at time t (a number)."""
    if process.param == "denoiser":
        w, snr = process.project(t)
        return precondition(process, net, mix(w[None], m), snr.expand(len(m)), label)
    out = net(m, torch.full((len(m),), float(t), dtype=m.dtype, device=m.device), label)
    return hop(process, float(process.scale(t)) * out.to(m), m, t)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers. All of them: m0 (B, 2C, ...) from the prior -> x (B, C, ...); exactly nfe network calls; the result is the
# data prediction of the last call. Each takes its acceleration from the data prediction, so that one network serves
# them all, whether it learned the SDE's or the ODE's.


@lru_cache(1000)  # the same for every batch
def grid(process, nfe, rho, t_end, R=None, extra=0):
    """nfe + extra times from t0 to t_end, uniform in t^(1/rho): rho = 1 is uniform, rho = 2 the paper's. Given R,
    uniform in lambda^(1/rho), lambda = clock(t, R)."""
    if nfe < 1:
        raise ValueError(f"nfe counts network calls and must be at least 1, got {nfe}")
    if not (0.01 <= rho <= 100 and process.t0 < t_end <= process.t1):
        raise ValueError(
            f"want 0.01 <= rho <= 100 and {process.t0} < t_end <= {process.t1}, got rho={rho}, t_end={t_end}"
        )
    a, b = (float(t if R is None else process.clock(t, R)) ** (1 / rho) for t in (process.t0, t_end))
    u = torch.linspace(a, b, nfe + extra, dtype=torch.float64) ** rho
    return tuple((u if R is None else process.time(u, R)).tolist())


def last_time(process, nfe):
    """Where the last of nfe calls falls by default: one and a half mean steps before the data, which the hop covers."""
    return min(1 - 1.5 / max(nfe, 2), process.t1)


def em(process, net, m0, nfe, label=None, rho=1.0, t_end=None, randn=torch.randn_like):
    """SDE, Euler-Maruyama. t_end: time of the last call (default `last_time`); randn(x): unit noise shaped like x."""
    sde, m = replace(process, sde=True), m0
    ts = grid(process, nfe, rho, last_time(process, nfe) if t_end is None else t_end)
    for t, t_next in pairwise(ts):
        h = t_next - t
        F = acceleration(sde, denoise(process, net, m, t, label), m, t)
        x, v = m.chunk(2, 1)
        m = torch.cat([x + h * v, v + h * F + process.p * (1 - t) * math.sqrt(h) * randn(v)], 1)
    return denoise(process, net, m, ts[-1], label)


def splitting(process, net, m0, nfe, label=None, rho=1.0, t_end=None, randn=torch.randn_like):
    """SDE, symmetric splitting (the paper's SSS): half a step of free motion with noise, the kick v += h F with F at
    mid-step, half a step of free motion. First order in law: F contains v, and the kick is an Euler step.

    t_end: end of the last step (default t1); the last call is at its middle.
    """
    sde, m = replace(process, sde=True), m0
    ts = grid(process, nfe, rho, process.t1 if t_end is None else t_end, extra=1)
    for i in range(nfe):
        h, middle = ts[i + 1] - ts[i], (ts[i] + ts[i + 1]) / 2
        m = free_motion(process, m, ts[i], h / 2, randn)
        x1 = denoise(process, net, m, middle, label)
        if i == nfe - 1:
            return x1
        x, v = m.chunk(2, 1)
        m = torch.cat([x, v + h * acceleration(sde, x1, m, middle)], 1)
        m = free_motion(process, m, middle, h / 2, randn)


def free_motion(process, m, t, h, randn):
    """dx = v dt, dv = g dW over [t, t + h], drawn exactly (official code: tau^2 times the covariance at tau = 1)."""
    u, du = gauss_legendre(0.0, h)  # a kick dv at t + u has moved x by (h - u) dv at the end
    Q = process.p * (1 - t - u) * du.sqrt() * torch.stack([torch.ones_like(u), h - u])  # (2, nodes), as v, x
    return drift(m, h) + mix(torch.linalg.cholesky(Q @ Q.mT).flip(0), randn(m))


def drift(m, h):
    """The exact flow of dx = v dt."""
    return mix(torch.tensor([[1.0, h], [0.0, 1.0]], dtype=torch.float64), m)


def ode(process, net, m0, nfe, label=None, order=2, rho=1.0, t_end=None, eta=0.0, randn=torch.randn_like):
    """ODE, dz = E[x1|m] dkappa with z = L^-1 m, exponential Adams-Bashforth: the data prediction of the last `order`
    (1-4) calls is extrapolated in lambda and the rest integrated exactly.

    Given x1, z moves with kappa and eps stands still; averaged over x1 this has the SDE's marginals, as the probability
    flow has. lambda = log(1 + R sqrt(SNR)) with R = sigma_data sqrt(d), the length of a sample of d numbers: a whole
    image stands out from noise of that size, which drowns each of its pixels, and there the first steps belong. Calls
    are even in lambda^(1/rho). t_end: time of the last call (default: noise of std 1/(3 nfe)).

    eta > 0 renews the noise on the way and keeps the marginals: with l = log |kappa|,
    dz = E[x1|m] dkappa - eta^2 (z - kappa E[x1|m]) dl + sqrt(2) eta dW(l). eta = 1 renews as much of it as the reverse
    SDE of y does.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order must be 1, 2, 3 or 4, got {order}")
    if not eta >= 0:
        raise ValueError(f"eta scales the noise and must be at least 0, got {eta}")
    R = process.sigma_data * math.sqrt(m0[0].numel() / process.n)
    ts = grid(process, nfe, rho, noise_time(process, 1 / (3 * max(nfe, 1))) if t_end is None else t_end, R)
    z, past = mix(torch.linalg.inv(process.cholesky(ts[0])), m0), []  # past: (lambda, x1) of the last calls
    for t, t_next in pairwise(ts):
        x1 = denoise(process, net, mix(process.cholesky(t), z), t, label)
        past = [*past, (float(process.clock(t, R)), x1)][-order:]
        weights, keep = kappa_steps(process, t, t_next, R, tuple(clock for clock, _ in past), eta)
        z = keep * z + mix(weights, torch.cat([x1 for _, x1 in past], 1))
        if eta:
            z = z + math.sqrt(1 - keep**2) * randn(z)
    return denoise(process, net, mix(process.cholesky(ts[-1]), z), ts[-1], label)


@lru_cache(1000)
def noise_time(process, sigma):
    """The time (a float) at which y has noise of std sigma."""
    return float(process.time(torch.tensor(1 / sigma, dtype=torch.float64).log1p(), 1.0))


@lru_cache(1000)  # the same for every batch
def kappa_steps(process, t, t_next, R, nodes, eta, parts=256):
    """(n, p) and keep: column i is int l_i(lambda) d(w kappa) from t to t_next, l_i the Lagrange polynomial of node i,
    w = (|kappa| / |kappa(t_next)|)^(eta^2), keep = w(t); for d(w z) = E[x1|m] d(w kappa) + noise."""
    u = 1 - torch.linspace(math.log1p(-t), math.log1p(-t_next), parts + 1, dtype=torch.float64).exp()
    kappa, clock = process.kappa(u), process.clock(u, R)
    basis = torch.stack([lagrange(nodes, i, (clock[1:] + clock[:-1]) / 2) for i in range(len(nodes))])  # (p, parts)
    norm = kappa.norm(dim=-1, keepdim=True)
    w = ((norm / norm[-1]) ** eta) ** eta
    return (basis @ (w * kappa).diff(dim=0)).mT, float(w[0])


def exponential(process, net, m0, nfe, label=None, order=2, rho=1.0, t_end=None):
    """Probability-flow ODE, exponential Adams-Bashforth: N = F/s of the last `order` (1-4) calls is extrapolated over
    the step, x += h v + int (t + h - u) s(u) N(u) du, v += int s(u) N(u) du, by Gauss-Legendre.

    The first steps have fewer calls to extrapolate. With equal steps (rho = 1) their error keeps the whole at second
    order; rho = 2 makes them so short that orders 3 and 4 show. t_end: time of the last call (default `last_time`;
    the paper: rho = 2, t_end = .4/.7/.9 for nfe 5/10/20).
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order must be 1, 2, 3 or 4, got {order}")
    flow, m, past = replace(process, sde=False), m0, []  # past: (t, N) of the last calls
    ts = grid(process, nfe, rho, last_time(process, nfe) if t_end is None else t_end)
    for t, t_next in pairwise(ts):
        F = acceleration(flow, denoise(process, net, m, t, label), m, t)
        past = [*past, (t, F / float(flow.scale(t)))][-order:]
        u, du = gauss_legendre(t, t_next)
        m, s = drift(m, t_next - t), flow.scale(u)
        for i, (_, N) in enumerate(past):
            force = du * s * lagrange([time for time, _ in past], i, u)
            m = m + mix(torch.stack([((t_next - u) * force).sum(), force.sum()])[:, None], N)
    return denoise(process, net, m, ts[-1], label)


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


SAMPLERS = {"exponential": exponential, "ode": ode, "splitting": splitting, "em": em}  # the first is the default
