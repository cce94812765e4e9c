"""A lower bound of log p(x) for AGM and HOLD with a network of any target, and what sample.py --nll makes of it."""

import math

import torch

from data import UserError


def log_likelihood_bound(method, process, predict, x, steps=96, exact=None):
    """A lower bound of log p(x), in nats per sample (B,), from one draw of the noise. The model: z = L^-1 m from the
    prior along the flow of `ode`, dz = x_hat dkappa, kappa = L^-1 mu, to SNR 4e4 or the process's last, then x_hat plus
    noise of variance 1/SNR. With q(z | x) = N(kappa x, I) of the forward process, z = kappa x + eps, on average
    log p(x) >= E_q[log p_ODE(z) + log N(x; x_hat(z), 1/SNR) - log q(z | x)], though not at every x.
    steps: of Runge-Kutta 4, four calls each, even in the lambda of `ode`: 32 do for a smooth x_hat, but that of images
    is clamped. exact: the divergence by d backward passes a call (default for d <= 16), else by a Rademacher probe."""
    B, d = len(x), x[0].numel()
    exact = d <= 16 if exact is None else exact
    probes = torch.eye(d).to(x).reshape(d, 1, *x.shape[1:]) if exact else torch.randint_like(x, 2)[None] * 2 - 1
    eps, R = torch.randn_like(torch.cat([x] * process.n, 1)), process.sigma_data * math.sqrt(2 * d)
    low, high = method.lam(process, process.first, R), min(math.log1p(200 * R), method.lam(process, process.last, R))
    ts = process.time_of_snr((torch.linspace(high, low, 2 * steps + 1, dtype=torch.float64).expm1() / R) ** 2)
    L, mean = process.cholesky(ts), process.mean(ts)[..., None]
    kappa, ts = torch.linalg.solve_triangular(L, mean, upper=False), ts.tolist()

    def rate(i, z, slope):  # per unit of s, at time i: of z, and of log p, the divergence of that
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x_hat = predict(method.mix(L[i], z), ts[i])
            grads = [torch.autograd.grad((x_hat * v).sum(), z, retain_graph=True)[0] for v in probes]
        trace = sum((v * method.mix(slope.mT, g)).flatten(1).sum(1) for v, g in zip(probes, grads, strict=True))
        return method.mix(slope, x_hat.detach()), trace

    z, log_p = method.mix(kappa[0], x) + eps, torch.zeros(B).to(x)
    error = x - predict(method.mix(L[0], z), ts[0]).detach()
    for i in range(0, 2 * steps, 2):  # s from 0 to 1 over the step, kappa a parabola through its three times
        k0, k1, k2 = kappa[i : i + 3]
        a, da = rate(i, z, -3 * k0 + 4 * k1 - k2)
        b, db = rate(i + 1, z + a / 2, k2 - k0)
        c, dc = rate(i + 1, z + b / 2, k2 - k0)
        e, de = rate(i + 2, z + c, k0 - 4 * k1 + 3 * k2)
        z, log_p = z + (a + 2 * b + 2 * c + e) / 6, log_p + (da + 2 * db + 2 * dc + de) / 6
    w = torch.linalg.solve_triangular(torch.linalg.cholesky(process.prior_cov), L[-1], upper=False)
    snr, prior = float(process.snr(ts[0])), method.mix(w, z)  # w z is N(0, I) under the prior
    prior, error, eps = (v.flatten(1).square().sum(1) / 2 for v in (prior, error, eps))
    log_p = log_p + d * float(w.diagonal().log().sum()) - prior  # of z at the last time, but for (2 pi)^(-n d/2)
    return log_p + d / 2 * math.log(snr / (2 * math.pi)) - snr * error + eps


def held_out_nll(method, process, predict, dataset, facts, n=None, batch=256, steps=96, device="cpu"):
    """A bound on -log p of each of the first n held-out samples, (n,) float64, and its unit. Images: bits per dimension
    of the 8-bit values, made continuous by uniform noise of a grey level (its mean is again a bound); else nats in the
    units of the file. facts: those of the run, whose units may be others than those of the dataset."""
    n, shape, d = min(n or len(dataset.test), len(dataset.test)), list(dataset.shape), math.prod(dataset.shape)
    if n < 2 or (dataset.kind, shape) != (facts["kind"], facts["shape"]):
        wanted = f"at least 2 of {facts['kind']} {facts['shape']}"
        raise UserError(f"--nll wants {wanted}, {dataset.name} has {n} held-out samples of {dataset.kind} {shape}")
    shift, bounds = dataset.shift - torch.tensor(facts["shift"], dtype=torch.float64), []
    for rows in torch.arange(n).split(batch):
        x = dataset.held_out(rows)[0].double() * dataset.scale + shift.reshape(-1, *[1] * (len(shape) - 1))
        x = x / facts["scale"] + (torch.rand_like(x) - 0.5) / 127.5 * dataset.is_image
        bounds.append(log_likelihood_bound(method, process, predict, x.float().to(device), steps).cpu().double())
    nats = d * math.log(127.5 if dataset.is_image else facts["scale"]) - torch.cat(bounds)
    return (nats / (d * math.log(2)), "bits/dim") if dataset.is_image else (nats, "nats/point")
