"""extras/: against the formulas of Gaussians and mixtures, and what their commands say."""

import math
import re
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from test_sample import checkpoint
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import agm_ref
import sample
from agm_ref import AGM
from data import Dataset
from extras import clock, complete, likelihood
from extras.likelihood import held_out_nll, log_likelihood_bound
from formats import pictures
from formats.files import UserError
from hold_ref import HOLD
from test_ref import F64, GAUSSIAN, NARROW, SMOOTH, Mixture, each, page_of, prior

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (8, 8), np.uint8)
LEFT = np.arange(64).reshape(8, 8) % 8 < 4


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory):
    """Three runs, a picture and three masks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("extras"))
        checkpoint("digits")
        checkpoint("points", data="moons")
        checkpoint("paper", target="ode")
        np.save("grey.npy", GREY)
        np.save("left.npy", LEFT)
        np.save("none.npy", 0 * LEFT)
        np.save("all.npy", np.ones((8, 8)))
        yield


def model_of(process):
    """What a rule needs of sample.Model."""
    return SimpleNamespace(method=page_of(process), process=process)


# -------------------------------------------------------------------------------------------------
# The learned grid

WIDE = Mixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], 0.3)
LAM = np.linspace(0, 9, 38)


@cache
def measured(data):
    """What `bend` finds along AGM's flow of exact data."""
    m = prior(AGM(), 16, 2)
    return clock.bend(agm_ref, AGM(), data.predictor(AGM()), m, data.mean)


@cache
def flow(process, data):
    """end(nfe, ts), where `ode` leads 128 states, and where 300 calls lead them."""
    m = prior(process, 128, 2)
    predict = data.predictor(process)
    end = partial(page_of(process).ode, process, predict, m, data_mean=data.mean)
    return end, end(nfe=300)


GRIDS = [
    (WIDE, 5, 1.01),
    (WIDE, 8, 0.85),
    (WIDE, 10, 0.85),
    (WIDE, 15, 0.85),
    (WIDE, 20, 0.85),
    (GAUSSIAN, 5, 1.01),
    (GAUSSIAN, 20, 1.1),
]


@pytest.mark.parametrize(("data", "nfe", "most"), GRIDS)
@each(AGM(), HOLD(order=1), HOLD())
def test_the_learned_grid_is_nearer_to_the_flow_and_never_far(process, data, nfe, most):
    """One curve of AGM serves all: it belongs to the denoiser. At five calls the grid is even."""
    page = page_of(process)
    end, limit = flow(process, data)
    R = page.clock_rate(process, torch.zeros(1, 2 * process.n))
    ts = clock.learned_times(page, process, nfe, R, *measured(data))
    even = (end(nfe=nfe) - limit).norm()
    learned = (end(nfe=nfe, ts=ts) - limit).norm()
    assert learned < most * even


@pytest.mark.parametrize("size", [0 * LAM, LAM > 4.5, LAM.round(1) == 4.1])
@pytest.mark.parametrize("free", [True, False])
@each(AGM(), HOLD())
def test_times_are_monotonous_with_the_right_ends(process, size, free):
    """Where x_hat bends nowhere, only late, or at one place."""
    page = page_of(process)
    direction = np.sign(process.last - process.first)
    for nfe in range(1, 201):
        ts = clock.learned_times(page, process, nfe, 5.6, LAM, size, free)
        assert len(ts) == nfe + (free and nfe > 1)
        assert ts[0] == process.first
        assert nfe == 1 or ts[-1] == page.end_time(process, nfe)
        assert (np.diff(ts) * direction > 0).all()


def test_bend_is_the_second_derivative_and_leaves_all_as_it_is():
    """A prediction that is a parabola in lambda bends by 2 a everywhere."""
    m = torch.ones(3, 4, dtype=F64)
    R = agm_ref.clock_rate(AGM(), m)

    def predict(state, t):
        state.zero_()
        lam = agm_ref.clock(AGM(), t, R)
        return torch.full((3, 2), 0.3 * lam**2, dtype=F64)

    generator = torch.get_rng_state()
    _, size = clock.bend(agm_ref, AGM(), predict, m, 0.0)
    assert np.abs(size - 0.6).max() < 1e-6
    assert (m == 1).all()
    assert torch.equal(torch.get_rng_state(), generator)


# -------------------------------------------------------------------------------------------------
# Likelihood

GAUSS = Mixture([1.0], [[0.0] * 3], 0.7)
BOUNDS = [
    (GAUSS, 32, True, 2e-4, 2e-3),
    (GAUSS, 32, False, 2e-4, 2e-3),  # J is a multiple of I: a random probe has no noise
    (GAUSS, 64, True, 5e-5, 1e-3),
    (NARROW, 96, None, 2e-3, 0.06),
]


@pytest.mark.parametrize(("data", "steps", "exact", "mean", "most"), BOUNDS)
@each(AGM(p=2.0), HOLD(order=1, first=12.0), HOLD(order=2, first=12.0, var=1.5), HOLD(order=4))
def test_the_bound_meets_the_likelihood(process, data, steps, exact, mean, most):
    modes = Independent(Normal(data.centres, data.std), 1)
    law = MixtureSameFamily(Categorical(data.weights), modes)
    torch.manual_seed(0)
    x = law.sample((200,))
    predict = data.predictor(process)
    bound = log_likelihood_bound(page_of(process), process, predict, x, steps, exact)
    off = bound - law.log_prob(x)
    assert off.mean().abs() < mean
    assert off.abs().max() < most


def test_a_random_probe_is_right_on_average():
    process = AGM(last=0.9)
    x = torch.tensor([[0.9, 0.1]], dtype=F64).expand(600, 2)
    bound = partial(log_likelihood_bound, agm_ref, process, SMOOTH.predictor(process), x, 16)
    torch.manual_seed(0)
    a = bound(exact=True)
    b = bound(exact=False)
    error = ((a.var() + b.var()) / 600).sqrt()
    assert (a.mean() - b.mean()).abs() < 4.5 * error


def nll(dataset, facts, n, **how):
    """By a network whose denoiser is exact for N(0, 1/4)."""
    model = SimpleNamespace(method=agm_ref, process=AGM(), facts=facts)
    predict = partial(agm_ref.denoise, AGM(), lambda y, t, label: 0 * y)
    return held_out_nll(model, predict, dataset, n, **how)


def test_points_are_measured_in_the_units_of_their_file():
    torch.manual_seed(0)
    law = Normal(torch.tensor([30.0, -7.0]), 4.0)
    x = law.sample((50,))
    shift = torch.tensor([5.0, 2.0])
    stored = (x - shift) / 3
    dataset = Dataset("set", "points", stored, stored, shift=shift, scale=3.0)
    facts = dict(kind="points", shape=[2], shift=[30.0, -7.0], scale=8.0)  # 4 = 8 sigma_data
    found, unit = nll(dataset, facts, 40, batch=16)
    assert unit == "nats/point"
    assert (found + law.log_prob(x[:40]).sum(1)).abs().max() < 0.02


PIXELS = torch.randint(256, (6, 1, 5, 5), dtype=torch.uint8)
IMAGES = Dataset("set", "image", PIXELS, PIXELS)


def test_images_are_measured_in_bits_of_their_8_bit_values():
    torch.manual_seed(1)
    facts = dict(kind="image", shape=[1, 5, 5], shift=0.0, scale=1.0)
    found, unit = nll(IMAGES, facts, 6)
    torch.manual_seed(1)
    values = PIXELS + torch.rand(PIXELS.shape, dtype=F64) - 0.5
    nats = Normal(127.5, 127.5 / 2).log_prob(values).mean((1, 2, 3))
    assert unit == "bits/dim"
    assert (found + nats / math.log(2)).abs().max() < 5e-4


def test_data_of_another_shape_are_refused():
    with pytest.raises(UserError, match="set has 6 of image"):
        nll(IMAGES, dict(kind="image", shape=[1, 4, 4]), 6)


def test_the_command_says_what_is_worse_than_noise_and_why(capsys):
    likelihood.main("--ckpt digits --n 3 --steps 1".split())
    said = capsys.readouterr().out
    assert re.search(r"negative log-likelihood <= \d+\.\d+ \+- \d+\.\d+ bits/dim", said)
    assert "worse than uniform noise, which has 8 bits/dim: 1 steps are too few" in said


def test_the_command_says_how_far_it_is(monkeypatch):
    shares = []
    monkeypatch.setattr(sample, "say_progress", lambda share, began: shares.append(share))
    likelihood.main("--ckpt points --n 6 --batch 4 --steps 2".split())
    assert shares == sorted(shares)
    assert shares[-1] == 1


# -------------------------------------------------------------------------------------------------
# Rules: 8 numbers as a picture (2, 2, 2), of covariance COV. Half of them are known, or the mean of
# each channel.

EYE = torch.eye(8, dtype=F64)
APART = (torch.arange(8) - torch.arange(8)[:, None]).abs()
COV = 0.25 * 0.9 ** APART.double()
VALUE = torch.linspace(-0.5, 0.7, 8, dtype=F64).reshape(1, 2, 2, 2)
MASK = torch.tensor([0, 1]).expand(2, 2)
MEANS = EYE[:2, :2].repeat_interleave(4, 1) / 2
KNOWN = {  # what is seen, by a function and by directions (r, 8), and its noise
    "pixels": (complete.observation(mask=MASK), EYE[1::2], 0.0),
    "means": (complete.observation(shrink=2), MEANS, 0.2),
}
LABEL = torch.tensor([3])


def gaussian_net(y, t, label):
    """The network whose denoiser is exact for N(0, COV) at sigma_data 1/2."""
    assert label is LABEL
    root = float(1 / t[0] - 1)  # 1 / sigma
    c_in = (1 + 0.25 * root**2) ** -0.5
    gain = torch.linalg.solve(root**2 * COV + EYE, root * COV)
    gain = gain - 0.25 * root * c_in**2 * EYE
    out = y.flatten(1) / c_in @ gain / (0.5 * c_in)
    return out.reshape(y.shape)


def posterior(A, noise_cov, seen):
    """Mean and covariance of x ~ N(0, COV) where A x + noise is seen (B, r)."""
    gain = COV @ A.mT @ torch.linalg.inv(A @ COV @ A.mT + noise_cov)
    return seen @ gain.mT, COV - gain @ A @ COV


def completions(process, rule, see, n, sampler="ode", nfe=4, **how):
    torch.manual_seed(0)
    model = model_of(process)
    m = process.prior((n, 2, 2, 2)).double()
    start = complete.condition(VALUE, see, rule, **how)
    m, predict = start(model, m, gaussian_net, LABEL, torch.randn_like)
    return model.method.SAMPLERS[sampler](process, predict, m, nfe)


@pytest.mark.parametrize(("see", "U", "noise"), KNOWN.values(), ids=KNOWN)
@each(AGM(), HOLD(order=1), HOLD(order=2), HOLD())
def test_one_call_gives_the_posterior_mean_of_gaussian_data(process, see, U, noise):
    """The state and what is known are both observations of x with Gaussian noise."""
    torch.manual_seed(0)
    m = torch.randn(5, 2 * process.n, 2, 2, dtype=F64)
    mean = torch.kron(process.mean(0.4)[:, None], EYE)
    cov = torch.kron(process.cov(0.4), EYE)
    known = (U @ VALUE.flatten()).expand(5, -1)
    seen = torch.cat([m.flatten(1), known], 1)
    noise_cov = torch.block_diag(cov, noise**2 * U @ U.mT)
    truth, _ = posterior(torch.cat([mean, U]), noise_cov, seen)

    model = model_of(process)
    rule = complete.by_covariance(model, gaussian_net, see, see(VALUE), 12, noise, LABEL)
    assert (rule(m, 0.4).flatten(1) - truth).abs().max() < 1e-9


LAWS = [
    (AGM(), "ode", 20, "covariance", "pixels"),
    (AGM(), "em", 100, "gibbs", "means"),
    (HOLD(order=1), "ode", 20, "gibbs", "pixels"),
    (HOLD(order=2), "ode", 20, "gibbs", "pixels"),
    (HOLD(), "ode", 50, "gibbs", "means"),
    (HOLD(), "lie", 100, "gibbs", "pixels"),
    (HOLD(), "strang", 50, "covariance", "means"),
]


@pytest.mark.parametrize(("process", "sampler", "nfe", "rule", "kind"), LAWS)
def test_completions_have_the_conditional_law(process, sampler, nfe, rule, kind):
    """Mean and covariance. The Gibbs rule draws white noise, and comes near with many calls."""
    see, U, noise = KNOWN[kind]
    mean, cov = posterior(U, noise**2 * U @ U.mT, U @ VALUE.flatten())
    x = completions(process, rule, see, 5_000, sampler, nfe, passes=4, noise=noise)
    x = x.flatten(1)
    off = x.mean(0) - mean
    cov_off = torch.cov(x.mT) - cov
    assert off.square().mean() < 0.05**2 * cov.diagonal().mean()
    assert cov_off.norm() < {"gibbs": 0.12, "covariance": 0.05}[rule] * cov.norm()


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("rule", ["gibbs", "covariance", "paper"])
def test_what_is_known_is_kept(rule, kind):
    see, *_ = KNOWN[kind]
    off = see(completions(AGM(), rule, see, 2) - VALUE)
    assert off.abs().max() < 1e-12


def test_a_stroke_can_be_mixed_into_the_first_v_once():
    q, v = torch.randn(2, 2, 3, 8, 8)
    m = torch.cat([q, v], 1)
    mixed = complete.mixed_in(model_of(AGM()), m, torch.ones(1, 3, 8, 8))
    assert (mixed - torch.cat([q, 0.9 * v + 0.1], 1)).abs().max() < 1e-6


# -------------------------------------------------------------------------------------------------
# The command


def test_picture_and_known_part_lead_each_row(monkeypatch):
    grid = Mock(wraps=complete.image_grid)
    monkeypatch.setattr(complete, "image_grid", grid)
    complete.main("--ckpt digits --inpaint grey.npy --mask left.npy --n 9 --nfe 2".split())
    cells, columns = grid.call_args.args
    samples = np.load("digits/samples.npz")["arr_0"]
    first = np.stack([GREY, np.where(LEFT, GREY, 128)])[..., None]
    assert (samples[:, LEFT, 0] == GREY[LEFT]).all()
    assert columns == 10
    assert (cells == np.concatenate([first, samples[:8], first, samples[8:]])).all()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("digits --held-out 3 --shrink 2", "held-out sample 3 of digits stands first in each row"),
        ("digits --held-out 3 --shrink 2", "NFE 2 with 3 backward passes each"),
        ("digits --held-out 3 --shrink 2 --rule covariance", "NFE 2 with 2 backward passes each"),
        ("digits --stroke grey.npy", "grey.npy stands first in each row"),
        ("paper --held-out 3 --shrink 2 --rule paper", "NFE 2 seconds"),
    ],
)
def test_what_is_said(line, words, capsys):
    complete.main(f"--n 2 --nfe 2 --ckpt {line}".split())
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "calls"),
    [
        ("--stroke grey.npy", 5),
        ("--stroke grey.npy --share .3", 3),
        ("--stroke grey.npy --inject init --method hold --sampler strang", 0),
        ("--held-out 3 --shrink 2 --rule paper", 8),
        ("--held-out 3 --shrink 2 --rule gibbs", 7),
        ("--held-out 3 --shrink 2 --method hold --order 1", 0),
    ],
)
def test_blocks_are_redrawn_before_so_many_of_eight_calls(line, calls, monkeypatch):
    redraw = Mock()
    monkeypatch.setattr(complete, "redraw", redraw)
    complete.main(f"--ckpt digits --n 1 --nfe 8 {line}".split())
    assert redraw.call_count == calls


def test_noise_is_in_grey_levels_and_a_mean_counts_once(monkeypatch):
    condition = Mock(wraps=complete.condition)
    monkeypatch.setattr(complete, "condition", condition)
    complete.main("--ckpt digits --held-out 3 --shrink 2 --noise 51 --n 1 --nfe 1".split())
    assert condition.call_args.args[-1] == 2 * 51 / 127.5


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("digits --mask left.npy", "give one picture"),
        ("digits --held-out 3 --stroke grey.npy", "give one picture"),
        ("digits --stroke grey.npy --mask left.npy", "--mask is not for --stroke"),
        ("digits --inpaint grey.npy --mask left.npy --share .3", "--share is not for --inpaint"),
        ("digits --held-out 0 --shrink 2 --rule paper --passes 3", "are not for --rule paper"),
        ("digits --inpaint grey.npy", "give one of --mask FILE and"),
        (
            "digits --inpaint grey.npy --mask left.npy --shrink 2",
            "give one of --mask FILE and",
        ),
        ("digits --inpaint grey.npy --shrink 3", "divide the sides of the pictures, 8 and 8"),
        ("digits --inpaint nowhere.npy --shrink 2", "cannot read nowhere.npy"),
        ("digits --inpaint grey.npy --mask none.npy", "0 of 64 pixels are known"),
        ("digits --inpaint grey.npy --mask all.npy", "64 of 64 pixels are known"),
        ("digits --held-out 359 --shrink 2", "the run has 359 of them"),
        ("digits --held-out 3 --shrink 2 --method hold --sampler strang", "loses what is redrawn"),
        ("digits --stroke grey.npy --method hold --order 1", "nothing for a stroke to act on"),
        ("digits --held-out 3 --shrink 2 --class 3", "no --class 3: the net knows none"),
        ("digits --held-out 3 --shrink 2 --guidance 2", "--guidance belongs to a class"),
        ("digits --held-out 3 --shrink 2 --sampler heun", "no --sampler heun"),
        ("points --stroke grey.npy", "networks of 8-bit images, not of points data"),
        ("paper --held-out 3 --shrink 2", "take --rule paper"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(line, words):
    with pytest.raises(SystemExit, match=rf"^error: .*{re.escape(words)}.*\Z"):
        complete.main(f"--out new --ckpt {line}".split())
    assert not Path("new").exists()


def test_a_picture_of_the_size_of_the_blocks_is_taken_for_their_means():
    x = complete.fitted(GREY, "", (1, 32, 32), 4)
    enlarged = GREY.repeat(4, 0).repeat(4, 1)
    assert (x[0, 0].numpy() == enlarged).all()


def test_a_picture_is_fitted_as_in_training():
    Image = pytest.importorskip("PIL.Image")
    photo = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(photo).save("photo.png")
    trained_on = Image.fromarray(pictures.decode("photo.png", Counter(), 8))
    x = complete.fitted(photo, "", (1, 8, 8))
    assert np.abs(x[0, 0].numpy() - trained_on.convert("L")).max() <= 1


def test_another_size_wants_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"a.npy has .*: give 9 x 9 pixels, or pip install pillow"):
        complete.fitted(GREY, "a.npy", (1, 9, 9))
