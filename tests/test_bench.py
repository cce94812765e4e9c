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
from test_ref import F64, SMOOTH, difference, normal, rk4

KARRAS = {"sigma_max": 80.0, "sigma_min": 0.05}
EVEN = {"sigma_max": 6.0, "sigma_min": 0.3, "rho": 1.0}  # where iPNDM has its full order
NOISE = normal(0, 100, 2)
exact = SMOOTH.given_y  # E[x | y] of three Gaussians in the plane


# -------------------------------------------------------------------------------------------------
# Peers


def runge_kutta(rate, y, times):
    for t, t_next in pairwise(times):
        y = rk4(rate, t, y, t_next - t)
    return y


@lru_cache
def flow(first, last):
    """E[x | y] where dy/dlog sigma = y - E[x | y] has taken first * NOISE."""
    levels = np.linspace(math.log(first), math.log(last), 1000)
    y = runge_kutta(lambda level, y: y - exact(y, math.exp(level)), first * NOISE, levels)
    return exact(y, last)


def order(sampler, limit):
    """By how much its error falls from 160 to 320 calls, as a power of two."""
    coarse = (sampler(160) - limit).norm()
    fine = (sampler(320) - limit).norm()
    return math.log2(coarse / fine)


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
    peer = {**peers.PEERS, "SA-Solver": peers.sa_solver}[name]
    limit = flow(grid["sigma_max"], grid["sigma_min"])
    found = order(lambda n: peer(None, exact, NOISE, n, **grid), limit)
    assert abs(found - expected) < 0.4


def tada_rate(t, q, v, x):
    """dv/dt of TADA's bridge to x."""
    return 2 / (1 - t) * ((x - q) / (1 - t) - v)


def test_tada_has_order_3_along_its_own_flow():
    process = peers.TADA()
    predict = SMOOTH.predictor(process)
    m = normal(1, 100, 4)

    def rate(t, m):
        q, v = m.chunk(2, 1)
        return torch.cat([v, tada_rate(t, q, v, predict(m, t))], 1)

    snr = torch.tensor([80.0, 0.05], dtype=F64) ** -2
    first, last = process.time_of_snr(snr).tolist()
    times = 1 - np.geomspace(1 - first, 1 - last, 1000)
    start = agm_ref.mix(process.transition(first), m)
    limit = predict(runge_kutta(rate, start, times), last)
    found = order(lambda n: peers.tada(process, predict, m, n, **KARRAS), limit)
    assert abs(found - 3) < 0.4


def test_tada_s_mean_and_transition_solve_its_equations():
    m = torch.tensor([0.4, -1.1], dtype=F64)

    def rate(t, m):
        return torch.stack([m[1], tada_rate(t, m[0], m[1], 0.7)])

    found = runge_kutta(rate, m, np.linspace(0, 0.9, 1000))
    process = peers.TADA()
    expected = 0.7 * process.mean(0.9) + process.transition(0.9) @ m
    assert difference(found, expected) < 1e-9


def test_sa_solver_has_the_law_of_its_sde():
    """For Gaussian data the result is linear in its noises, which here come one by one."""
    unit = torch.eye(161, dtype=F64)[..., None]
    noises = iter(unit[1:])
    x = peers.sa_solver(
        None,
        lambda y, sigma: 0.25 / (0.25 + sigma**2) * y,
        unit[0],
        160,
        between=(0, math.inf),
        randn=lambda y: next(noises),
        sigma_max=1e4,
        sigma_min=0.05,
        rho=None,
    )
    assert abs(float(x.square().sum()) - 0.25**2 / (0.25 + 0.05**2)) < 2e-4


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_every_contender_makes_nfe_calls_on_every_grid(nfe):
    calls = []

    def predict(m, t):
        calls.append(t)
        return exact(m[:, :2], t + 0.1)

    for contender in compare.chosen("stochastic", ["SA"]) + compare.chosen("few", peers.PEERS):
        blocks = 2 if contender.process == "TADA" else 1
        for grid in contender.grids:
            calls.clear()
            x = contender.sampler(peers.TADA(), predict, NOISE.repeat(1, blocks), nfe, **grid)
            assert len(calls) == nfe
            assert x.isfinite().all()


def test_peers_share_the_flow_of_hold_of_order_1():
    process = hold_ref.HOLD(order=1)
    x = hold_ref.ode(process, SMOOTH.predictor(process), NOISE, 400)
    limit = flow(float(process.snr(process.first)) ** -0.5, 1 / 1200)
    assert (x - limit).square().mean().sqrt() < 1e-3


# -------------------------------------------------------------------------------------------------
# Scores


def centred(x):
    """A root of the covariance."""
    return (x - x.mean(0)) / math.sqrt(len(x) - 1)


@pytest.mark.parametrize(("n", "m", "D"), [(300, 500, 12), (50, 70, 200)])
def test_frechet_distance_is_that_of_the_centred_data_s_singular_values(n, m, D):
    a = 1e4 + normal(1, n, D)
    b = 1e4 + normal(2, m, D) @ normal(3, D, D)
    X = centred(a)
    Y = centred(b)
    means = (a.mean(0) - b.mean(0)).square().sum()
    traces = X.square().sum() + Y.square().sum()
    cross = torch.linalg.svdvals(X @ Y.mT).sum()
    found = fid.frechet(fid.moments(a.split(30)), fid.moments([b]))
    assert found == pytest.approx(float(means + traces - 2 * cross), rel=1e-11)


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


def paint(folder, *sides):
    """Pictures of those sides (0 is broken), and files that training would leave out."""
    folder.mkdir()
    for i, side in enumerate(sides):
        write_png(folder / f"{i}.PNG", np.full((side, side, 3), 200, np.uint8))
    (folder / ".hidden.png").touch()
    (folder / "notes.txt").touch()


def test_pictures_are_scored_as_training_reads_them(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "some"
    paint(folder, 8)
    Image.new("RGB", (8, 8), (200, 200, 200)).save(folder / "photo.jpg")
    Image.new("RGBA", (8, 8)).save(folder / "clear.png")  # that is white
    (found,) = fid.batches([fid.images_of(folder)], 10)
    assert found[:, 0, 0, 0].tolist() == [200, 255, 200]


@pytest.mark.parametrize(
    ("sides", "words"),
    [
        ((8, 8, 9), "pictures of 9x9 and of 8x8 pixels: give one size"),
        ((8, 8, 0), "cannot read .*2.PNG"),
        ((9, 9), "pictures of 8x8 and of 9x9 pixels: give one size"),
    ],
    ids=["of two sizes", "broken", "of another size than the reference"],
)
def test_pictures_are_looked_at_before_a_classifier_is_trained(sides, words, tmp_path):
    pytest.importorskip("PIL")
    paint(tmp_path / "some", *sides)
    with pytest.raises(SystemExit, match=words):
        fid.main(f"{tmp_path}/some --ref digits --out {tmp_path}/kept".split())
    assert not (tmp_path / "kept").exists()


# -------------------------------------------------------------------------------------------------
# Scripts


def test_results_go_on_where_they_stopped_and_refuse_other_options(tmp_path):
    file = tmp_path / "x.json"
    compare.Results(file, {"n": 5}).of("row", 0, lambda: {"a": 1.0})
    compare.Results(file, {"n": 5}).of("row", 1, lambda: {"a": 2.0})
    found = compare.Results(file)
    assert found.of("row", 1, None) == {"a": 2.0}
    assert found.rows["row"]["mean"] == {"a": 1.5}
    assert found.rows["row"]["spread"] == {"a": 0.70711}
    with pytest.raises(UserError, match="n 5, not 6"):
        compare.Results(file, {"n": 6})


TINY = "--train=--steps=2 --runs . --seeds 1 --nfe 2 --n 20 --search 10 --flow-calls 3"
POINTS = f"{TINY} --results results/points.json --data gmm"
IMAGES = f"{TINY} --results results/images.json"
CONDITIONS = "--results results/conditions.json --ckpt digits-0 --n 2 --nfe 2 --seeds 1"
SPEED = "--results results/speed.json --data spiral --models agm --repeats 1 --rounds 1 --nfe 1"
SCRIPTS = [
    (points, f"{POINTS} --only TADA AGM", "| TADA, best distance |"),
    (points, f"{POINTS} --group stochastic", "SA-Solver, default"),
    (points, f"{POINTS} --group paper", "paper's loss"),
    (points, f"{POINTS} --group likelihood", "| HOLD 3 |"),
    (images, f"{IMAGES} --only UniPC", "| UniPC-2, best frechet |"),
    (images, f"{IMAGES} --group guidance", "| guidance |"),
    (conditions, f"{CONDITIONS} --strip s.png", "| 2x2 means, HOLD 3, even |"),
    (speed, SPEED, "| agm ode |"),
]
DRAWN = [
    (plot, "--out pictures", "bench-points.png"),
    (figures, "phase --n 8 --steps 6 --out phase.png", "phase.png: "),
    (figures, "snr --out snr.png", "snr.png: "),
    (figures, "denoise --n 8 --ckpt digits-0 --out denoise.png", "denoise.png: "),
]


def test_scripts_print_tables_and_their_results_are_drawn(run, capsys, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", Path("results"))
    for script, line, words in SCRIPTS:
        assert words in said(capsys, script, line)
    pytest.importorskip("matplotlib")
    for script, line, words in DRAWN:
        assert words in said(capsys, script, line)


def test_what_needs_a_gpu_is_tried_at_toy_size(run):
    options = "--width 8 --blocks 1".split()
    assert gpu.training("spiral", "cpu", "fp32", options, 2, 1.0)[0] > 0
