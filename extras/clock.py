"""A grid of times for `ode`, learned from the network in a second after its training.

Over a step `ode` takes x_hat as linear in lambda, a chord of its curve. What the chord misses grows
with the second derivative of x_hat along the flow: `bend` runs the flow once with many calls, and
measures that derivative as a function of lambda. `learned_times` puts more steps where it is large.
The curve belongs to the denoiser: one `bend` serves AGM and HOLD of every order.
"""

import numpy as np
import torch


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
        x_hats.append(x_hat.flatten().cpu().double())
        return x_hat

    end = float(process.time_of_snr(200**2))
    ts = method.times(process, calls + 1, end, R)
    method.ode(process, recorded, m, calls, data_mean, ts=ts)

    # slopes between two calls each, and second derivatives between two slopes each
    lam = np.array(lam)
    x_hats = torch.stack(x_hats).numpy()
    steps = np.diff(lam)[:, None]
    slopes = np.diff(x_hats, axis=0) / steps
    reach = (steps[1:] + steps[:-1]) / 2
    seconds = np.diff(slopes, axis=0) / reach
    mean_square = np.square(seconds).mean(1)
    size = np.sqrt(mean_square)

    # smoothed over five calls
    padded = np.pad(size, 2, mode="edge")
    window = np.ones(5) / 5
    smooth = np.convolve(padded, window, "valid")
    return lam[1:-1], smooth


def learned_times(method, process, nfe, R, lam, size, free=True):
    """The times of nfe calls of `ode` by what `bend` measured, one more if its first step is free.

    A step of length h misses about h^3 size: all steps miss the same with the density size^(1/3).
    With few calls the higher derivatives count as well, and they are not known. The exponent
    (1 - 5/nfe)/3 is 0 up to 5 calls, which leaves the grid even in lambda, and 1/3 for many.
    (Where clusters are narrower than the noise of the last call, the grid gains nothing.)
    """
    n = nfe
    if free and nfe > 1:
        n += 1
    end = method.end_time(process, nfe)
    low = method.clock(process, process.first, R)
    high = method.clock(process, end, R)

    # the density of steps over lambda; a straight stretch gets wide steps, but no gap
    knots = np.linspace(low, high, 1000)
    size = np.interp(knots, lam, size)
    least = max(1e-3 * size.max(), 1e-30)
    exponent = max(0, (1 - 5 / nfe) / 3)
    density = np.maximum(size, least) ** exponent

    # its integral counts the steps up to each knot: the times are at equal shares of it
    areas = (density[1:] + density[:-1]) / 2
    counts = np.cumsum(areas)
    steps = np.append(0, counts)
    shares = np.linspace(0, steps[-1], n)
    inner = np.interp(shares[1:-1], steps, knots)
    snr = (np.expm1(inner) / R) ** 2
    times = process.time_of_snr(snr).tolist()
    return (process.first, *times, end)[:n]  # n = 1: `first` alone
