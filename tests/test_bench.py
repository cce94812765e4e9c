"""The peers and the scores of bench/ against independent numerics, and its scripts at toy size."""

import math
import sys
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import compare
import conditions
import fid
import figures
import gpu
import images
import peers
import plot
import points
import speed

import agm_ref
import data
import hold_ref
import train
from formats.files import UserError
from formats.png import write_png

F64 = {"dtype": torch.float64}
CENTRES = torch.tensor([[-1.0, 0.3], [0.6, -0.8], [0.5, 0.9]], **F64)
STD = torch.tensor([0.3, 0.2, 0.25], **F64)
SHARES = torch.tensor([0.3, 0.5, 0.2], **F64)
KARRAS = {"sigma_max": 80.0, "sigma_min": 0.05}
EVEN = {"sigma_max": 6.0, "sigma_min": 0.3, "rho": 1.0}  # where iPNDM has its full order


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64)


def rms(x):
    return float(x.square().mean().sqrt())


NOISE = randn(0, 100, 2)


def exact(y, sigma):
    """E[x | y] of three Gaussians in the plane."""
    var = STD**2 + sigma**2
    off = y[:, None] - CENTRES
    share = torch.softmax(SHARES.log() - var.log() - (off**2).sum(-1) / (2 * var), 1)
    means = CENTRES + (STD**2 / var)[:, None] * off
    return (share[..., None] * means).sum(1)


def runge_kutta(rate, y, times):
    for a, b in pairwise(times):
        h = b - a
        k1 = rate(y, a)
        k2 = rate(y + h / 2 * k1, a + h / 2)
        k3 = rate(y + h / 2 * k2, a + h / 2)
        k4 = rate(y + h * k3, b)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


@lru_cache
def flow(first, last):
    """E[x | y] where dy/dlog sigma = y - E[x | y] has taken first * NOISE."""
    levels = np.linspace(math.log(first), math.log(last), 1000)
    y = runge_kutta(lambda y, a: y - exact(y, math.exp(a)), first * NOISE, levels)
    return exact(y, last)


def order(errors):
    """That of a method, from its errors with n and with 2 n calls."""
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    ("name", "grid", "expected"),
    [
        ("DPM-Solver++(2M)", KARRAS, 2),
        ("UniPC-2", KARRAS, 3),
        ("DEIS tAB3", KARRAS, 4),
        ("iPNDM-3", EVEN, 3),
        ("SA-Solver", KARRAS | {"tau": 0.0}, 4),
    ],
)
def test_peers_have_the_order_of_their_papers(name, grid, expected):
    sampler = {**peers.PEERS, "SA-Solver": peers.sa_solver}[name]
    limit = flow(grid["sigma_max"], grid["sigma_min"])
    errors = [rms(sampler(None, exact, NOISE, n, **grid) - limit) for n in (160, 320)]
    assert abs(order(errors) - expected) < 0.4


def test_tada_has_order_3_along_its_own_flow():
    process = peers.TADA()
    m = randn(1, 100, 4)
    first, last = process.time_of_snr(torch.tensor([80.0, 0.05], **F64) ** -2).tolist()

    def predict(m, t):
        w, snr = agm_ref.to_z(process, t)
        return exact(agm_ref.mix(w, m) / snr.sqrt(), float(snr) ** -0.5)

    def rate(m, t):
        q, v = m.chunk(2, 1)
        return torch.cat([v, 2 / (1 - t) * ((predict(m, t) - q) / (1 - t) - v)], 1)

    times = 1 - np.geomspace(1 - first, 1 - last, 1000)
    start = agm_ref.mix(process.transition(first), m)
    limit = predict(runge_kutta(rate, start, times), last)
    errors = [rms(peers.tada(process, predict, m, n, **KARRAS) - limit) for n in (160, 320)]
    assert errors[1] < 1e-4
    assert abs(order(errors) - 3) < 0.4


def test_tada_s_mean_and_transition_solve_its_equations():
    x, m = 0.7, torch.tensor([0.4, -1.1], **F64)
    rate = lambda m, t: torch.stack([m[1], 2 / (1 - t) * ((x - m[0]) / (1 - t) - m[1])])  # noqa: E731
    found = runge_kutta(rate, m, np.linspace(0, 0.9, 1000))
    assert (
        found - peers.TADA().mean(0.9) * x - peers.TADA().transition(0.9) @ m
    ).abs().max() < 1e-9


def test_sa_solver_has_the_law_of_its_sde():
    """For Gaussian data the result is linear in its noises, which here come one by one."""
    s = 0.5
    n = 160
    noises = iter(torch.eye(n + 1, **F64)[1:, :, None])
    options = dict(between=(0, math.inf), sigma_max=1e4, sigma_min=0.05, rho=None)
    shrink = lambda y, sigma: s**2 / (s**2 + sigma**2) * y  # noqa: E731
    start = torch.eye(n + 1, 1, **F64)
    x = peers.sa_solver(None, shrink, start, n, randn=lambda y: next(noises), **options)
    assert abs(float(x.square().sum()) - s**4 / (s**2 + 0.05**2)) < 2e-4


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_every_contender_makes_nfe_calls_on_every_grid(nfe):
    calls = []

    def predict(m, t):
        calls.append(t)
        return exact(m[:, :2], t + 0.1)

    for contender in compare.chosen("stochastic", ["SA"]) + compare.chosen("few", peers.PEERS):
        process = peers.TADA()
        m = torch.cat([NOISE, NOISE], 1) if contender.process == "TADA" else NOISE
        for grid in contender.grids:
            calls.clear()
            x = contender.sampler(process, predict, m, nfe, **grid)
            assert len(calls) == nfe and x.isfinite().all(), contender


def test_peers_share_the_flow_of_hold_of_order_1():
    process = hold_ref.HOLD(order=1)
    sigma = lambda t: float(process.snr(t)) ** -0.5  # noqa: E731
    predict = lambda m, t: exact(m / float(process.mean(t)), sigma(t))  # noqa: E731
    assert (
        rms(hold_ref.ode(process, predict, NOISE, 400) - flow(sigma(process.first), 1 / 1200))
        < 1e-3
    )


@pytest.mark.parametrize(("n", "m", "D"), [(300, 500, 12), (50, 70, 200)])
def test_frechet_distance_is_that_of_the_centred_data_s_singular_values(n, m, D):
    a = 1e4 + randn(1, n, D)
    b = 1e4 + 0.1 + randn(2, m, D) @ (torch.eye(D, **F64) + 0.1 * randn(3, D, D))
    X = (a - a.mean(0)) / (n - 1) ** 0.5
    Y = (b - b.mean(0)) / (m - 1) ** 0.5
    apart = (a.mean(0) - b.mean(0)).square().sum() + X.square().sum() + Y.square().sum()
    expected = float(apart - 2 * torch.linalg.svdvals(X @ Y.mT).sum())
    found = fid.frechet(fid.moments(a.split(30)), fid.moments([b]))
    assert abs(found - expected) < 1e-6 * expected


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("bench"))
        patch.setattr(train, "draw_picture", lambda *_: None)
        train.main("--steps 2 --width 8 --batch 16 --classes --out digits-0".split())
        yield Path("digits-0")


def said(capsys, script, line):
    script.main(line.split())
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*samples are few")
def test_samples_npz_is_scored(run, capsys):
    pixels = data.load("digits").test.permute(0, 2, 3, 1).numpy()
    np.savez("samples.npz", arr_0=pixels, labels=np.zeros(len(pixels), int), names=["a"])
    text = said(capsys, fid, "samples.npz --ref digits --epochs 1")
    assert "of 359 samples against 1438 images of digits" in text


def test_pictures_are_scored_as_training_reads_them(run):
    Image = pytest.importorskip("PIL.Image")
    pixels = np.full((8, 8, 3), 200, np.uint8)
    Path("some").mkdir()
    write_png(Path("some/plain.PNG"), pixels)
    Image.fromarray(np.full((8, 8), 257 * 200, np.uint16)).save("some/deep.png")
    Image.fromarray(np.dstack([pixels, np.full((8, 8), 255, np.uint8)])).save("some/alpha.png")
    Image.fromarray(pixels).save("some/photo.jpg")
    (found,) = fid.batches(fid.images_of(Path("some")), 10)
    assert found.shape == (4, 3, 8, 8) and (found.int() - 200).abs().max() <= 1


def test_results_go_on_where_they_stopped_and_refuse_other_options(tmp_path):
    file = tmp_path / "x.json"
    for seed in (0, 1):
        compare.Results(file, {"n": 5}).of("row", seed, lambda s=seed: {"a": 1.0 + s})
    row = compare.Results(file, {"n": 5}).rows["row"]
    assert compare.Results(file).of("row", 1, None) == {"a": 2.0}
    assert row["mean"] == {"a": 1.5} and row["spread"] == {"a": 0.70711}
    with pytest.raises(UserError, match="n 5, not 6"):
        compare.Results(file, {"n": 6})


def test_scripts_print_tables_and_their_results_are_drawn(run, capsys, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", Path("results"))
    tiny = "--train=--steps=2 --runs . --results results/"
    few = "--seeds 1 --nfe 2 --n 20 --search 10 --flow-calls 3"
    text = said(capsys, points, f"{tiny}points.json {few} --data gmm --only TADA AGM")
    assert "| TADA, best distance |" in text and "| AGM, learned |" in text
    more = f"{tiny}points.json {few} --data gmm --group"
    assert "SA-Solver, default" in said(capsys, points, f"{more} stochastic")
    assert "paper's loss" in said(capsys, points, f"{more} paper")
    assert "| HOLD 3 |" in said(capsys, points, f"{more} likelihood")
    text = said(capsys, images, f"{tiny}images.json {few} --only UniPC")
    assert "| UniPC-2, best frechet |" in text
    assert "| guidance |" in said(capsys, images, f"{tiny}images.json {few} --group guidance")
    line = f"--results results/conditions.json --ckpt {run} --n 2 --nfe 2 --seeds 1 --strip s.png"
    assert "| 2x2 means, HOLD 3, even |" in said(capsys, conditions, line)
    line = "--results results/speed.json --data spiral --models agm --repeats 1 --rounds 1 --nfe 1"
    assert "| agm ode |" in said(capsys, speed, line)
    pytest.importorskip("matplotlib")
    assert "bench-points.png" in said(capsys, plot, "--out pictures")


@pytest.mark.parametrize("name", ["phase", "snr", "denoise"])
def test_figures_are_drawn(run, capsys, name):
    pytest.importorskip("matplotlib")
    text = said(capsys, figures, f"{name} --n 8 --steps 6 --ckpt {run} --out {name}.png")
    assert text.startswith(f"{name}.png: ")
    assert Path(f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_needs_a_gpu_is_tried_at_toy_size(run):
    speed_of_training = gpu.training(
        "spiral", "cpu", "fp32", "--width 8 --blocks 1".split(), 2, 1.0
    )
    assert speed_of_training[0] > 0
