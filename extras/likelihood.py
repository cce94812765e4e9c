"""Bounds the likelihood of held-out data, with a network of any target.

    python -m extras.likelihood                    bits per dimension of the newest run's images
    python -m extras.likelihood --steps 32         faster: for points that is mostly enough

The model: z = L^-1 m starts from the prior, runs along the flow of `ode`, dz = x_hat dkappa with
kappa = L^-1 mu, up to a last time of small noise, and the sample is x_hat there plus noise of
variance 1/SNR. The forward process leads from x to z = kappa x + eps, that is q(z | x). So

    log p(x) >= E_q[log p(z) + log N(x; x_hat(z), 1/SNR) - log q(z | x)]

on average over the data, though not at every x.
"""

import math
import time
from dataclasses import dataclass

import torch

import data
import sample
from formats.command import option, parser, run
from formats.files import UserError, say


@dataclass(frozen=True)
class Options(sample.Asking):
    """What the command line asks for; None: not given."""

    n: int = option(None, "held-out samples; default: all of them", 2, 1e7)
    steps: int = option(96, "steps of Runge-Kutta 4, four calls each", 1, 1e5)
    data: str = option(None, "another data set or file than the run's")
    data_dir: str = option(None, "where the files of a named data set are")
    raw: bool = option(False, "the last weights, not their average (EMA)")


def log_likelihood_bound(method, process, predict, x, steps=96, exact=None):
    """A lower bound of log p(x) (B,), in nats, for x (B, ...), from one draw of the noise.

    steps: even in the lambda of `ode`; 32 are enough for most points, 96 for images. Too few are
    not noticed: twice as many must give the same.
    exact: the divergence of the flow by d backward passes a call (the default up to d = 16), else
    by one random probe.
    """
    B, C, *sides = x.shape
    d = C * math.prod(sides)
    if exact is None:
        exact = d <= 16
    if exact:
        probes = torch.eye(d).to(x).reshape(d, 1, C, *sides)
    else:
        probes = 2 * torch.randint_like(x, 2)[None] - 1
    eps = torch.randn(B, process.n * C, *sides).to(x)
    ts, L, kappa = path_of(method, process, steps, method.clock_rate(process, eps))

    # from the data to z, and what x_hat misses of x there
    z = method.mix(kappa[0], x) + eps
    missed = x - predict(method.mix(L[0], z), ts[0]).detach()

    # along the flow to the prior
    def rate(z, i, slope):
        return flow_rate(method, predict, probes, z, ts[i], L[i], slope)

    z, log_p = along_flow(rate, z, kappa)

    # the prior's density, in units in which it is N(0, I)
    prior_L = torch.linalg.cholesky(process.prior_cov)
    whiten = torch.linalg.solve_triangular(prior_L, L[-1], upper=False)
    log_p = log_p + d * float(whiten.logdet())
    log_p = log_p - half_square(method.mix(whiten, z))

    # log N(x; x_hat, 1/SNR), and log q; q and the prior share (2 pi)^(-n d/2), which is left out
    snr = float(process.snr(ts[0]))
    log_scale = math.log(snr / (2 * math.pi))
    log_x = d / 2 * log_scale - snr * half_square(missed)
    log_q = -half_square(eps)
    return log_p + log_x - log_q


def path_of(method, process, steps, R):
    """2 steps + 1 times from the data to the prior, even in lambda, and L and kappa (..., n, 1)
    there. The first has SNR 4e4, if the process comes so near."""
    end = float(process.time_of_snr(200**2))
    ts = method.times(process, 2 * steps + 1, end, R)[::-1]
    at = torch.tensor(ts, dtype=torch.float64)
    L = process.cholesky(at)
    mean = process.mean(at)[..., None]
    kappa = torch.linalg.solve_triangular(L, mean, upper=False)
    return ts, L, kappa


def along_flow(rate, z, kappa):
    """z at the last time, and what the divergence adds up to (B,), by Runge and Kutta's method.

    A step is three times, i to i + 2, and s runs over it from 0 to 1. rate(z, i, dkappa/ds) ->
    dz/ds and its divergence at time i.
    """
    total = 0
    for i in range(0, len(kappa) - 1, 2):
        start, middle, end = slopes_of(*kappa[i : i + 3])
        dz_1, trace_1 = rate(z, i, start)
        dz_2, trace_2 = rate(z + dz_1 / 2, i + 1, middle)
        dz_3, trace_3 = rate(z + dz_2 / 2, i + 1, middle)
        dz_4, trace_4 = rate(z + dz_3, i + 2, end)
        z = z + (dz_1 + 2 * dz_2 + 2 * dz_3 + dz_4) / 6
        total = total + (trace_1 + 2 * trace_2 + 2 * trace_3 + trace_4) / 6
    return z, total


def slopes_of(k0, k1, k2):
    """dkappa/ds at s = 0, 1/2 and 1, of the parabola through kappa at these."""
    return -3 * k0 + 4 * k1 - k2, k2 - k0, k0 - 4 * k1 + 3 * k2


def flow_rate(method, predict, probes, z, t, L, slope):
    """dz/ds = x_hat dkappa/ds, and its divergence (B,): v . J v summed over the probes v."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        x_hat = predict(method.mix(L, z), t)
        trace = 0
        for v in probes:
            v_x_hat = (v * x_hat).sum()
            (grad,) = torch.autograd.grad(v_x_hat, z, retain_graph=True)
            v_J = method.mix(slope.mT, grad)
            trace = trace + (v_J * v).flatten(1).sum(1)
    return method.mix(slope, x_hat.detach()), trace


def half_square(v):
    """(B,): |v|^2 / 2."""
    return v.flatten(1).square().sum(1) / 2


def held_out_nll(model, predict, dataset, n, batch=256, steps=96):
    """A bound on -log p of the first n held-out samples (n,), float64, and its unit.

    Images: bits per dimension of the 8-bit values, made continuous by uniform noise of one grey
    level, which makes the mean again a bound. Else nats in the units of the file. model: brings
    method, process and facts; the units of its facts may be others than those of the dataset.
    """
    facts = model.facts
    wanted = f"{facts['kind']} {facts['shape']}"
    found = f"{dataset.kind} {list(dataset.shape)}"
    if n < 2 or found != wanted:
        text = f"want at least 2 held-out samples of {wanted}"
        raise UserError(f"{text}: {dataset.name} has {n} of {found}")

    bounds = []
    for rows in torch.arange(n).split(batch):
        x = in_units_of(facts, dataset, rows)
        if dataset.is_image:
            x = x + (torch.rand_like(x) - 0.5) / 127.5
        bound = log_likelihood_bound(model.method, model.process, predict, x.float(), steps)
        bounds.append(bound.double())
    log_p = torch.cat(bounds)

    d = math.prod(dataset.shape)
    if dataset.is_image:
        return math.log2(127.5) - log_p / (d * math.log(2)), "bits/dim"
    return d * math.log(facts["scale"]) - log_p, "nats/point"


def in_units_of(facts, dataset, rows):
    """Held-out samples in the network units of a run, float64."""
    x, _ = dataset.held_out(rows)
    moved = dataset.shift - torch.tensor(facts["shift"], dtype=torch.float64)
    channels_last = x.double().movedim(1, -1)
    values = channels_last * dataset.scale + moved
    return values.movedim(-1, 1) / facts["scale"]


def measure(args):
    """Prints what the command line asks for."""
    model = sample.load(args.ckpt, args.method, args.order, args.raw, args.device)
    config = model.config
    folder = args.data_dir
    if not (args.data or folder):
        folder = config.data_dir or None
    side = model.facts["shape"][-1]  # of pictures in a folder
    dataset = data.load(args.data or config.data, folder, size=side)
    n = min(args.n or 10**9, len(dataset.test))
    began = time.perf_counter()
    calls = 0

    def predict(m, t):
        nonlocal calls
        calls += len(m)
        all_calls = n * (4 * args.steps + 1)
        sample.say_progress(calls / all_calls, began)
        x_hat = model.method.denoise(model.process, model.net, m.to(model.device), t)
        return x_hat.to(m.device)

    torch.manual_seed(args.seed)
    values, unit = held_out_nll(model, predict, dataset, n, args.batch, args.steps)
    mean = float(values.mean())
    error = float(values.std()) / math.sqrt(n)
    say(f"negative log-likelihood <= {mean:.4f} +- {error:.4f} {unit}")
    say(f"(standard error over {n} held-out samples of {dataset.name})")
    if unit == "bits/dim" and mean > 8:
        cause = f"{args.steps} steps are too few, or the network does not know these data"
        say(f"that is worse than uniform noise, which has 8 bits/dim: {cause}")


def main(argv=None):
    run(lambda: measure(Options(**vars(parser(Options(), __doc__).parse_args(argv)))))


if __name__ == "__main__":
    main()
