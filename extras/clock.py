"""A grid of times for `ode`, learned from the network in a second after its training.

Over a step `ode` takes x_hat as linear in lambda, a chord of its curve. What the chord misses grows
with the second derivative of x_hat along the flow: `bend` runs the flow once with many calls, and
measures that derivative as a function of lambda. `learned_times` puts more steps where it is large.
The curve belongs to the denoiser: one `bend` serves AGM and HOLD of every order.
"""

import numpy as np
import torch

LOWEST = 1e-3  # of the largest size: a straight stretch gets wide steps, but no gap
KNOTS = 1000  # of the integral over lambda


@torch.no_grad()
def bend(method, process, predict, m, data_mean, calls=40):
    """Where x_hat bends along the flow that starts at the states m (B, nC, ...).

    Returns lambda (calls - 2,), rising, and size (calls - 2,): the root mean square of the second
    derivative of x_hat there, smoothed over five calls. Draws nothing, changes neither m nor net.
    """
    R = method.clock_rate(process, m)
    lam = []
    x_hats = []

    def recorded(m, t):
        x_hat = predict(m, t)
        lam.append(method.clock(process, t, R))
        x_hats.append(x_hat.double().flatten().cpu())
        return x_hat

    end = float(process.time_of_snr(200**2))
    ts = method.times(process, calls + 1, end, R)
    method.ode(process, recorded, m.clone(), calls, data_mean, ts=ts)

    # slopes live between two calls, their differences around the call between two slopes
    lam = np.array(lam)
    steps = np.diff(lam)
    slopes = np.diff(torch.stack(x_hats).numpy(), axis=0) / steps[:, None]
    reach = (steps[1:] + steps[:-1]) / 2
    second = np.diff(slopes, axis=0) / reach[:, None]
    size = np.sqrt((second**2).mean(1))

    padded = np.pad(size, 2, mode="edge")
    return lam[1:-1], np.convolve(padded, np.ones(5) / 5, "valid")


def learned_times(method, process, nfe, R, lam, size, free=True):
    """The times of nfe calls of `ode` by what `bend` measured, one more if its first step is free.

    A step of length h misses about h^3 size: all steps miss the same with the density size^(1/3).
    With few calls the higher derivatives count as well, and they are not known. The exponent
    (1 - 4/nfe)/3 was best on all sets that were tried: even in lambda up to 4 calls, 1/3 for many.
    """
    n = nfe + 1 if free and nfe > 1 else nfe
    end = method.end_time(process, nfe)
    low = method.clock(process, process.first, R)
    high = method.clock(process, end, R)

    # the density of steps at knots of lambda
    knots = np.linspace(low, high, KNOTS)
    size = np.maximum(np.interp(knots, lam, size), LOWEST * np.max(size))
    exponent = max(0, (1 - 4 / nfe) / 3)
    density = size**exponent if size.all() else np.ones(KNOTS)

    # its integral counts the steps up to each knot: equal shares of it are the times
    areas = (density[1:] + density[:-1]) / 2
    steps = np.concatenate([[0], np.cumsum(areas)])
    wanted = np.linspace(0, steps[-1], n)[1:-1]
    inner = np.interp(wanted, steps, knots)
    snr = torch.from_numpy((np.expm1(inner) / R) ** 2)
    return (process.first, *process.time_of_snr(snr).tolist(), end)[:n]  # n = 1: `first` alone
