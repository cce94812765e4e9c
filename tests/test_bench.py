"""The peers, the scores and the pictures of bench/, and its scripts at toy size."""

import math
import re
import sys
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import digits
import fid
import figures
import images
import peers
import points
import speed

import data
import hold_ref
import train

F64 = {"dtype": torch.float64}
CENTRES = torch.tensor([[-1.0, 0.3], [0.6, -0.8], [0.5, 0.9]], **F64)
STD, SHARES = torch.tensor([0.3, 0.2, 0.25], **F64), torch.tensor([0.3, 0.5, 0.2], **F64)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64)


def rms(x):
    return float(x.square().mean().sqrt())


NOISE = randn(0, 100, 2)


def denoise(y, sigma):
    """E[x | y] of three Gaussians in the plane."""
    var, off = STD**2 + sigma**2, y[:, None] - CENTRES
    share = torch.softmax(SHARES.log() - var.log() - (off**2).sum(-1) / (2 * var), 1)
    return (share[..., None] * (CENTRES + (STD**2 / var)[:, None] * off)).sum(1)


@lru_cache(None)
def flow(first, last, steps=1500):
    """E[x | y] where dy/dsigma = (y - E[x | y]) / sigma has taken first * NOISE, by Runge-Kutta 4 in log sigma."""
    y, h = first * NOISE, math.log(last / first) / steps
    for i in range(steps):
        a, k = math.log(first) + i * h, [0 * y]
        for part in (0, 0.5, 0.5, 1):
            at = y + part * h * k[-1]
            k.append(at - denoise(at, math.exp(a + part * h)))
        y = y + h / 6 * (k[1] + 2 * k[2] + 2 * k[3] + k[4])
    return denoise(y, last)


EVEN = {"sigma_max": 6.0, "sigma_min": 0.3, "rho": 1.0}  # in sigma: where iPNDM has its full order
KARRAS, FAR = {"sigma_max": 80.0, "sigma_min": 0.05}, {"sigma_max": 1e5, "sigma_min": 0.05, "rho": math.inf}
NAMES = ["Heun", "DPM-Solver++(2M)", "DPM-Solver++(3M)", "UniPC-2", "UniPC-3", "DEIS tAB3", "iPNDM-4"]
ORDERS = [(name, KARRAS, order, 160) for name, order in zip(NAMES, (2, 2, 3, 3, 4, 4, 2), strict=True)]
ORDERS += [("SA-Solver", KARRAS | {"tau": 0.0}, 4, 160), ("iPNDM-3", EVEN, 3, 320), ("iPNDM-4", EVEN, 4, 320)]
ORDERS += [("UniPC-2 from the mean", FAR, 3, 160), ("DEIS tAB3 with AFS", FAR, 4, 320)]


@pytest.mark.parametrize(("name", "grid", "order", "nfe"), ORDERS)
def test_peers_have_the_order_of_their_papers(name, grid, order, nfe):
    """Against another solver of the exact flow. A corrector adds one to the order."""
    limit, sampler = flow(grid["sigma_max"], grid["sigma_min"]), peers.PEERS[f"EDM, {name}"]
    errors = [rms(sampler(None, denoise, NOISE, n, **grid) - limit) for n in (nfe, 2 * nfe)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.4


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_sa_solver_has_the_law_of_its_sde(tau):
    """For Gaussian data the result is linear in the noises of all steps: fed one by one, they give its variance."""
    s, last, errors = 0.5, 0.05, []
    for nfe in (80, 160):
        noises, mean = iter(torch.eye(nfe + 1, **F64)[1:, :, None]), lambda y, sigma: s**2 / (s**2 + sigma**2) * y
        options = dict(between=(0, math.inf), sigma_max=1e4, sigma_min=last, rho=math.inf)
        options |= dict(tau=tau, randn=lambda y, n=noises: next(n))
        x = peers.sa_solver(None, mean, torch.eye(nfe + 1, 1, **F64), nfe, **options)
        errors.append(abs(float(x.square().sum()) - s**4 / (s**2 + last**2)))
    assert errors[1] < 2e-4 and abs(math.log2(errors[0] / errors[1]) - 2) < 0.3


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_peers_make_nfe_calls(nfe):
    """Also with every grid that they are given; Heun's method leaves one call of an even number unused."""
    calls = []
    for contender in (*peers.contenders("denoiser", ["EDM"]), *peers.contenders("fm", ["FM"])):
        for grid in contender.grids:
            calls.clear()
            x = contender.sampler(None, lambda m, t: calls.append(t) or denoise(m, t + 0.1), NOISE, nfe, **grid)
            assert len(calls) == nfe - ("Heun" in contender.title and nfe % 2 == 0) and x.isfinite().all(), contender


def test_peers_share_the_flow_of_hold_of_order_1():
    """Their distance is that to `ode` of HOLD of order 1 from the same noise, with 400 calls."""
    process = hold_ref.HOLD(order=1)
    sigma = lambda t: float(process.snr(t)) ** -0.5  # noqa: E731
    limit = hold_ref.ode(process, lambda m, t: denoise(m / float(process.mean(t)), sigma(t)), NOISE, 400)
    assert rms(limit - flow(sigma(process.first), 1 / 1200)) < 3e-4
    assert rms(limit - peers.PEERS["EDM, iPNDM-4"](None, denoise, NOISE, 301)) < 6e-3


def test_flow_matching_follows_the_same_flow():
    """x_t = (1 - t) noise + t x is t times y at sigma = (1 - t) / t, and at t = 0 tells nothing of x."""
    limit, mean = flow(1e5, 1e-4), (SHARES @ CENTRES).expand_as(NOISE)
    for name, order in (("Euler", 1), ("midpoint", 2), ("Adams-Bashforth 2", 2)):
        sampler = partial(peers.PEERS[f"FM, {name}"], None, lambda m, t: denoise(m / t, (1 - t) / t) if t else mean)
        errors = [rms(sampler(NOISE, n) - limit) for n in (160, 320)]
        assert errors[1] < 0.02 and abs(math.log2(errors[0] / errors[1]) - order) < 0.4, (name, errors)
    net = lambda m, s, label=None: (0.7 - m) / s[:, None]  # noqa: E731, the velocity towards a point
    assert peers.fm_loss(None, net, 0 * NOISE + 0.7) + rms(peers.fm_denoise(net, NOISE, 0.4) - 0.7) < 1e-12


@pytest.mark.parametrize(("n", "m", "D"), [(300, 500, 12), (50, 70, 200), (2, 500, 200)])
def test_frechet_distance_against_independent_numerics(n, m, D):
    """By the singular values of the centred data's X Y^T, with enough samples also by the eigenvalues of A B."""
    scale = 10 ** torch.linspace(0, -3 * (n < D), D, **F64)
    mixing = (torch.eye(D, **F64) + 0.1 * randn(3, D, D)) * scale
    a, b = 1e4 + randn(1, n, D) * scale, 1e4 + 0.1 + randn(2, m, D) @ mixing
    A, B = fid.moments(a.split(30)), fid.moments([b])
    assert np.abs(A[2].numpy() - np.cov(a.numpy().T)).max() < 1e-9
    X, Y = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    apart = (a.mean(0) - b.mean(0)).square().sum() + X.square().sum() + Y.square().sum()
    exact, found = float(apart - 2 * torch.linalg.svdvals(X @ Y.mT).sum()), fid.frechet(A, B)
    assert abs(found - exact) < 1e-6 * exact and abs(fid.frechet(A, A)) < 1e-6
    if n > D:
        assert abs(found - float(apart - 2 * torch.linalg.eigvals(A[2] @ B[2]).sqrt().sum().real)) < 1e-8 * exact


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("bench"))
        patch.setattr(train, "draw_picture", lambda *_: None)
        train.main("--steps 2 --width 8 --batch 16 --classes --out digits".split())
        yield Path("digits/ckpt.pt")


def said(capsys, script, line):
    script.main(line.split())
    return capsys.readouterr().out


def test_scores(run, capsys):
    """Also against a folder, whose pictures are brought to the size of the samples."""
    np.save("good.npy", data.load("digits").test[:, 0].numpy())
    with pytest.warns(UserWarning, match="samples are few"):
        text = said(capsys, fid, "good.npy --ref digits --epochs 1")
    assert re.search(r"small classifier's features: [\d.]+, of 359 samples against 1438 images of digits", text)
    pytest.importorskip("PIL")
    for i in range(20):
        Path("pictures", "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        data.write_png(Path("pictures", "ab"[i % 2], f"{i}.png"), np.full((16, 24), 10 * i, np.uint8))
    with pytest.warns(UserWarning, match="samples are few"):
        assert "20 images of pictures" in said(capsys, fid, "good.npy --ref pictures --epochs 1")


def test_tables(run, capsys, monkeypatch):
    assert "| EDM, SA-Solver, best grid |" in said(capsys, points, points.TOY)
    assert "| EDM, SA-Solver, default | 2 |" in said(capsys, digits, f"--ckpt {run} {digits.TOY}")
    assert len(said(capsys, digits, f"--ckpt {run} --nfe 2 --n 70 --guidance 0 1 2").splitlines()) == 5
    assert "| agm sde |" in said(capsys, speed, speed.TOY)
    stand_in = lambda name, *args, load=data.load: load("digits" if name == "fashion" else name, *args)  # noqa: E731
    monkeypatch.setattr(data, "load", stand_in)
    assert "fashion, its error" in said(capsys, images, images.TOY)


@pytest.mark.parametrize("name", ["phase", "hold12", "snr", "calls"])
def test_figures(run, capsys, name):
    pytest.importorskip("matplotlib")
    text = said(capsys, figures, f"{name} --n 8 --steps 6 --ckpt {run} --out {name}.png")
    assert re.match(rf"{name}.png: .* -?\d+\.\d+", text) and Path(f"{name}.png").read_bytes().startswith(b"\x89PNG")
