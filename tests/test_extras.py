"""extras/: against the formulas of Gaussians and mixtures, and what their commands say."""

import math
import re
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_sample import checkpoint, drawn
from torch.distributions import Normal
from torch.nn.functional import avg_pool2d

import agm_ref
import sample
from agm_ref import AGM
from data import Dataset
from extras import clock, complete, likelihood
from extras.likelihood import held_out_nll, log_likelihood_bound
from formats.files import UserError
from hold_ref import HOLD
from test_ref import F64, GAUSSIAN, Mixture, page_of

RNG = np.random.default_rng(0)
PROCESSES = [AGM(), HOLD(order=1), HOLD(order=2), HOLD()]
WIDE = Mixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], 0.3)


def zero(y, t, label=None):
    """A network whose denoiser is exact for N(0, sigma_data^2)."""
    return 0 * y


def model_of(process):
    """What a rule needs of sample.Model."""
    return SimpleNamespace(method=page_of(process), process=process)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder, but for a colour picture and a mask of its left half."""
    monkeypatch.chdir(tmp_path)
    np.save("colour.npy", RNG.integers(0, 256, (8, 8, 3), np.uint8))
    np.save("half.npy", np.arange(64).reshape(8, 8) % 8 < 4)


def said_by(command, *argv):
    """What a command is refused with."""
    with pytest.raises(SystemExit, match=r"^error: [^\n]+$") as stop:
        command.main([str(word) for word in argv])
    return stop.value.code


# -------------------------------------------------------------------------------------------------
# The learned grid


@cache
def measured(process, data, n=128):
    """States, predict, R, lambda and size of exact data."""
    page = page_of(process)
    predict = data.predictor(process)
    generator = torch.Generator().manual_seed(0)
    m = process.prior((n, len(data.mean)), generator).double()
    lam, size = clock.bend(page, process, predict, m[:16], data.mean)
    return m, predict, page.clock_rate(process, m), lam, size


@cache
def flow(process, data):
    """Where 300 calls lead."""
    m, predict, R, _, _ = measured(process, data)
    page = page_of(process)
    ts = page.times(process, 301, float(process.time_of_snr(200.0**2)), R)
    return page.ode(process, predict, m, 300, data.mean, ts)


def errors(process, data, nfe):
    """Mean distance to the flow: on the even grid, and on the learned one."""
    page = page_of(process)
    m, predict, R, lam, size = measured(process, data)
    learned = clock.learned_times(page, process, nfe, R, lam, size)
    even = page.ode(process, predict, m, nfe, data.mean) - flow(process, data)
    bent = page.ode(process, predict, m, nfe, data.mean, learned) - flow(process, data)
    return float(even.norm(dim=1).mean()), float(bent.norm(dim=1).mean())


@pytest.mark.parametrize("process", [AGM(sigma_data=0.77), HOLD(order=1, sigma_data=0.77)])
@pytest.mark.parametrize("nfe", [8, 10, 15, 20])
def test_the_learned_grid_is_nearer_to_the_exact_flow_of_a_mixture(process, nfe):
    even, learned = errors(process, WIDE, nfe)
    assert learned < 0.85 * even


@pytest.mark.parametrize("process", [AGM(sigma_data=0.77), HOLD(order=1, sigma_data=0.77)])
def test_at_five_calls_the_learned_grid_loses_nothing(process):
    even, learned = errors(process, WIDE, 5)
    assert learned < 1.1 * even


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("nfe", [5, 10, 20])
def test_gaussian_data_lose_nothing(process, nfe):
    even, learned = errors(process, GAUSSIAN, nfe)
    assert learned < 1.1 * even


SIZES = {
    "as measured": np.exp(-((np.linspace(0, 9, 38) - 3) ** 2)),
    "all zero": np.zeros(38),
    "half zero": np.linspace(0, 9, 38) > 4.5,
    "one spike": np.arange(38) == 20,
}


@pytest.mark.parametrize("process", [AGM(), HOLD()])
@pytest.mark.parametrize("name", SIZES)
def test_times_are_monotonous_with_the_right_ends(process, name):
    page = page_of(process)
    R = page.clock_rate(process, torch.zeros(1, process.n * 64, 1, 1))
    for nfe in range(1, 201):
        ts = clock.learned_times(page, process, nfe, R, np.linspace(0, 9, 38), SIZES[name])
        steps = np.diff(ts) * np.sign(process.last - process.first)
        assert len(ts) == nfe + (nfe > 1)
        assert ts[0] == process.first
        assert nfe == 1 or ts[-1] == page.end_time(process, nfe)
        assert (steps > 0).all()


def test_without_a_free_step_there_is_a_time_for_each_call():
    lam = np.linspace(0, 9, 38)
    ts = clock.learned_times(agm_ref, AGM(), 7, 1.0, lam, SIZES["as measured"], free=False)
    assert len(ts) == 7


def test_up_to_five_calls_the_learned_grid_is_even():
    lam = np.linspace(0, 9, 38)
    learned = clock.learned_times(agm_ref, AGM(), 5, 1.2, lam, SIZES["one spike"])
    even = agm_ref.times(AGM(), 6, agm_ref.end_time(AGM(), 5), 1.2)
    assert np.abs(np.subtract(learned, even)).max() < 1e-4


def test_bend_finds_the_second_derivative_along_the_flow():
    """A prediction that is a parabola in lambda bends by 2 a everywhere."""
    process = AGM()
    R = agm_ref.clock_rate(process, torch.zeros(1, 4))

    def predict(m, t):
        parabola = 0.3 * agm_ref.clock(process, t, R) ** 2
        return torch.full((len(m), 2), parabola, dtype=F64)

    lam, size = clock.bend(agm_ref, process, predict, torch.zeros(3, 4, dtype=F64), 0.0)
    assert (np.diff(lam) > 0).all()
    assert np.abs(size - 0.6).max() < 1e-6


def test_bend_belongs_to_the_denoiser_whatever_the_process():
    curves = []
    for process in (AGM(sigma_data=0.77), HOLD(order=1, sigma_data=0.77)):
        *_, lam, size = measured(process, WIDE, 16)
        curves.append(np.interp(np.linspace(1, 5, 20), lam, size))
    assert np.abs(curves[0] - curves[1]).max() < 0.3 * curves[0].max()


def test_bend_changes_neither_states_nor_network_nor_generators():
    checkpoint("run")
    model = sample.load("run")
    m = model.process.prior((4, 1, 8, 8), torch.Generator().manual_seed(0))
    before = [m.clone(), *(p.clone() for p in model.net.state_dict().values())]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    predict = partial(agm_ref.denoise, model.process, model.net)
    clock.bend(agm_ref, model.process, predict, m, model.facts["mean"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.net.training
    for old, new in zip(before, [m, *model.net.state_dict().values()], strict=True):
        assert torch.equal(old, new)


# -------------------------------------------------------------------------------------------------
# Likelihood

LONG = [
    AGM(p=2.0),
    HOLD(order=1, first=12.0),
    HOLD(order=2, first=12.0, var=1.5),
    HOLD(first=12.0),
    HOLD(order=4),
]
GAUSS = Mixture([1.0], [[0.0] * 3], 0.7)
MIXED = Mixture([0.2, 0.5, 0.3], [[0.8, 0.0], [-0.6, 0.5], [0.0, -0.9]], 0.1)


def off_truth(process, data, steps, exact=None):
    """The bound minus log p, for 200 points of the data."""
    torch.manual_seed(0)
    x = data.centres[data.weights.multinomial(200, replacement=True)]
    x = x + data.std * torch.randn_like(x)
    by_mode = Normal(data.centres, data.std).log_prob(x[:, None]).sum(2)
    truth = (by_mode + data.weights.log()).logsumexp(1)
    predict = data.predictor(process)
    return log_likelihood_bound(page_of(process), process, predict, x, steps, exact) - truth


@pytest.mark.parametrize("process", LONG)
@pytest.mark.parametrize("exact", [True, False])
def test_the_bound_meets_the_likelihood_of_gaussian_data(process, exact):
    """Their Jacobian is a multiple of I, so that a random probe has no noise."""
    off = off_truth(process, GAUSS, 32, exact)
    assert off.mean().abs() < 2e-4
    assert off.abs().max() < 2e-3


def test_half_the_step_is_nearer():
    off = off_truth(LONG[0], GAUSS, 64, True)
    assert off.mean().abs() < 5e-5
    assert off.abs().max() < 1e-3


@pytest.mark.parametrize("process", [AGM(), HOLD()])
def test_the_bound_meets_the_likelihood_of_a_mixture(process):
    off = off_truth(process, MIXED, 96)
    assert off.mean().abs() < 2e-3
    assert off.abs().max() < 0.06


def test_a_random_probe_is_right_on_average():
    process = AGM(last=0.9)
    x = torch.tensor([[0.9, 0.1]], dtype=F64).expand(600, 2)
    predict = Mixture(MIXED.weights.tolist(), MIXED.centres.tolist(), 0.3).predictor(process)
    torch.manual_seed(0)
    a = log_likelihood_bound(agm_ref, process, predict, x, 16, exact=True)
    b = log_likelihood_bound(agm_ref, process, predict, x, 16, exact=False)
    assert b.std() > 1.5 * a.std()
    assert (a.mean() - b.mean()).abs() < 4.5 * ((a.var() + b.var()) / 600).sqrt()


FACTS = dict(kind="image", shape=[1, 5, 5], shift=0.0, scale=1.0)
DENOISE = partial(agm_ref.denoise, AGM(), zero)


def measured_by(facts):
    return SimpleNamespace(method=agm_ref, process=AGM(), facts=facts)


def test_points_are_measured_in_the_units_of_their_file():
    torch.manual_seed(0)
    mean = torch.tensor([30.0, -7.0])
    raw = mean + 4 * torch.randn(50, 2, dtype=F64)
    shift = torch.tensor([5.0, 2.0])
    stored = ((raw - shift) / 3).float()
    dataset = Dataset("set", "points", stored, stored, shift=shift, scale=3.0)
    facts = dict(kind="points", shape=[2], shift=[30.0, -7.0], scale=8.0)
    nll, unit = held_out_nll(measured_by(facts), DENOISE, dataset, n=40, batch=16)
    truth = -Normal(mean, 4.0).log_prob(raw).sum(1)[:40]  # 4 = 8 sigma_data
    assert unit == "nats/point"
    assert (nll - truth).abs().max() < 0.02


def test_images_are_measured_in_bits_of_their_8_bit_values():
    pixels = torch.randint(0, 256, (6, 1, 5, 5), dtype=torch.uint8)
    dataset = Dataset("set", "image", pixels, pixels)
    torch.manual_seed(1)
    nll, unit = held_out_nll(measured_by(FACTS), DENOISE, dataset, n=6)
    torch.manual_seed(1)
    values = pixels + torch.rand(pixels.shape, dtype=F64) - 0.5
    truth = -Normal(127.5, 127.5 * 0.5).log_prob(values).mean((1, 2, 3)) / math.log(2)
    assert unit == "bits/dim"
    assert (nll - truth).abs().max() < 2e-3


def test_data_of_another_kind_are_refused():
    pixels = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    dataset = Dataset("set", "image", pixels, pixels)
    with pytest.raises(UserError, match="set has 6 of image"):
        held_out_nll(measured_by(FACTS), DENOISE, dataset, n=6)


def test_the_command_says_what_is_worse_than_noise_and_why(capsys):
    checkpoint("run")
    likelihood.main("--ckpt run --n 3 --steps 1".split())
    said = capsys.readouterr().out
    assert re.search(r"negative log-likelihood <= \d+\.\d+ \+- \d+\.\d+ bits/dim", said)
    assert "worse than uniform noise, which has 8 bits/dim: 1 steps are too few" in said


def test_the_command_says_how_long_it_takes(monkeypatch):
    checkpoint("run", data="moons")
    shares = []
    monkeypatch.setattr(sample, "say_progress", lambda share, began: shares.append(share))
    likelihood.main("--ckpt run --n 6 --batch 4 --steps 2".split())
    assert shares == sorted(shares)
    assert shares[-1] == 1


# -------------------------------------------------------------------------------------------------
# Rules: 8 numbers as a picture (1, 2, 4), of covariance COV. Half of them are known, or the means
# of blocks of 2 x 2.

EYE = torch.eye(8, dtype=F64)
ROWS, COLUMNS = torch.cartesian_prod(torch.arange(2), torch.arange(4)).T
DISTANCE = (ROWS[:, None] - ROWS).abs() + (COLUMNS[:, None] - COLUMNS).abs()
COV = 0.25 * 0.9 ** DISTANCE.double()
SEEN = {
    "pixels": complete.observation(mask=(ROWS + COLUMNS).reshape(2, 4) % 2),
    "means": complete.observation(shrink=2),
}
VALUE = torch.tensor([0.7, -0.2, 0.1, 0.4], dtype=F64).repeat(2).reshape(1, 1, 2, 4)


def gaussian_net(y, t, label=None):
    """The network whose denoiser is exact for N(0, COV) at sigma_data 1/2."""
    root = float(1 / t[0] - 1)  # 1 / sigma
    c_in = (1 + 0.25 * root**2) ** -0.5
    gain = torch.linalg.solve(root**2 * COV + EYE, root * COV)
    gain = gain - 0.25 * root * c_in**2 * EYE
    return (y.flatten(1) / c_in @ gain / (0.5 * c_in)).reshape(y.shape)


def rows_of(see):
    """see as U^T U, U (r, 8)."""
    projection = see(EYE.reshape(8, 1, 2, 4)).reshape(8, 8)
    values, vectors = torch.linalg.eigh(projection)
    return vectors[:, values > 0.5].T


@pytest.mark.parametrize("see", SEEN.values(), ids=SEEN)
def test_what_is_seen_is_an_orthogonal_projection(see):
    projection = see(EYE.reshape(8, 1, 2, 4)).reshape(8, 8)
    assert (projection - projection.T).abs().max() < 1e-12
    assert (projection @ projection - projection).abs().max() < 1e-12


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_one_call_gives_the_posterior_mean_of_gaussian_data(process, kind, noise):
    """The state and what is known are both observations of x with Gaussian noise."""
    torch.manual_seed(0)
    t = 0.4
    see = SEEN[kind]
    U = rows_of(see)
    m = torch.randn(5, process.n, 2, 4, dtype=F64)
    A = torch.cat([torch.kron(process.mean(t)[:, None], EYE), U])
    noise_cov = noise**2 * torch.eye(len(U), dtype=F64)
    S = torch.block_diag(torch.kron(process.cov(t), EYE), noise_cov)
    seen = torch.cat([m.flatten(1), (U @ VALUE.flatten()).expand(5, -1)], 1)
    truth = seen @ torch.linalg.solve(A @ COV @ A.mT + S, A @ COV)

    rule = complete.by_covariance(
        model_of(process), gaussian_net, see, see(VALUE), passes=12, noise=noise
    )
    assert (rule(m, t).flatten(1) - truth).abs().max() < 1e-9


LAWS = [
    (AGM(), "ode", 20, "covariance", "pixels", 0.0),
    (AGM(), "ode", 20, "gibbs", "means", 0.2),
    (AGM(), "em", 100, "gibbs", "means", 0.2),
    (HOLD(order=1), "ode", 20, "gibbs", "pixels", 0.0),
    (HOLD(order=2), "ode", 20, "gibbs", "pixels", 0.0),
    (HOLD(), "ode", 50, "gibbs", "pixels", 0.2),
    (HOLD(), "ode", 20, "covariance", "means", 0.2),
    (HOLD(), "lie", 100, "gibbs", "pixels", 0.0),
    (HOLD(), "strang", 50, "covariance", "means", 0.0),
]


@pytest.mark.parametrize(("process", "sampler", "nfe", "rule", "kind", "noise"), LAWS)
def test_completions_have_the_conditional_law(process, sampler, nfe, rule, kind, noise):
    """Mean and covariance. The Gibbs rule draws white noise, and comes near with many calls."""
    torch.manual_seed(0)
    model = model_of(process)
    see = SEEN[kind]
    U = rows_of(see)
    noise_cov = noise**2 * torch.eye(len(U), dtype=F64)
    K = COV @ U.mT @ torch.linalg.inv(U @ COV @ U.mT + noise_cov)
    mean = K @ U @ VALUE.flatten()
    cov = COV - K @ U @ COV

    start = complete.condition(VALUE, see, rule, passes=4, noise=noise)
    m = process.prior((5_000, 1, 2, 4)).double()
    m, predict = start(model, m, gaussian_net, None, torch.randn_like)
    x = model.method.SAMPLERS[sampler](process, predict, m, nfe).flatten(1)
    assert (x.mean(0) - mean).square().mean().sqrt() < 0.05 * cov.diagonal().mean().sqrt()
    assert (torch.cov(x.mT) - cov).norm() < (0.12 if rule == "gibbs" else 0.05) * cov.norm()


@pytest.mark.parametrize("process", [AGM(), HOLD()])
def test_redrawing_leaves_the_law_of_the_state(process):
    """Given x, a state redrawn is another one of the same law, with the same data block."""
    torch.manual_seed(0)
    model = model_of(process)
    x = torch.full((100_000, 1, 1, 1), 0.7, dtype=F64)
    eps = torch.randn(100_000, process.n, 1, 1, dtype=F64)
    mix = model.method.mix
    old = mix(process.mean(0.5)[:, None], x) + mix(process.cholesky(0.5), eps)
    new = old.clone()
    complete.redraw(model, new, 0.5, x, torch.randn_like)
    assert (new[:, 0] == old[:, 0]).all()
    assert (new[:, 1:] != old[:, 1:]).all()
    off = new.flatten(1) - 0.7 * process.mean(0.5)
    cov = process.cov(0.5)
    assert (off.mean(0) / cov.diagonal().sqrt()).abs().max() < 0.02
    assert (torch.cov(off.mT) - cov).abs().max() < 0.02 * cov.diagonal().max()


# -------------------------------------------------------------------------------------------------
# Conditions on pictures


def picture(file="colour.npy", shrink=1):
    """A file as a picture (1, 3, 8, 8) in network units."""
    return complete.fitted(np.load(file), file, (3, 8, 8), shrink) / 127.5 - 1


def completions(condition, process=AGM(), net=zero, label=None):  # noqa: B008
    """Two samples (2, 3, 8, 8)."""
    torch.manual_seed(0)
    m = process.prior((2, 3, 8, 8))
    m, predict = condition(model_of(process), m, net, label, torch.randn_like)
    return page_of(process).ode(process, predict, m, 4)


@pytest.mark.parametrize("rule", ["gibbs", "covariance", "paper"])
def test_known_pixels_are_kept_and_the_others_are_drawn(rule):
    half = torch.from_numpy(np.load("half.npy"))
    x = completions(complete.condition(picture(), complete.observation(mask=half), rule))
    assert (x - picture())[..., half].abs().max() < 1e-5
    assert (x[0] != x[1])[..., ~half].all()


@pytest.mark.parametrize("rule", ["gibbs", "covariance", "paper"])
def test_known_means_are_kept(rule):
    x = completions(complete.condition(picture(), complete.observation(shrink=4), rule))
    assert (avg_pool2d(x, 4) - avg_pool2d(picture(), 4)).abs().max() < 1e-5


@pytest.mark.parametrize("rule", ["gibbs", "covariance", "paper"])
def test_the_network_gets_the_label_of_each_sample(rule):
    labels = []

    def net(y, t, label=None):
        labels.append(label.tolist())
        return 0 * y

    condition = complete.condition(picture(), complete.observation(shrink=4), rule)
    completions(condition, net=net, label=torch.tensor([2, 0]))
    assert labels == [[2, 0]] * 4


def test_a_picture_of_the_size_of_the_blocks_is_taken_for_their_means():
    np.save("small.npy", np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    x = picture("small.npy", shrink=4)
    values = (avg_pool2d(x, 4) + 1) * 127.5
    assert x.shape == (1, 3, 8, 8)
    assert (values[0].movedim(0, 2).numpy() - np.load("small.npy")).max() < 1e-4


@pytest.mark.parametrize(("share", "calls"), [(0.25, 2), (0.5, 4), (0.01, 1)])
def test_a_stroke_redraws_v_in_the_first_share_of_the_calls(share, calls):
    condition = complete.stroke_condition(picture(), math.ceil(share * 8))
    m, predict = condition(model_of(AGM()), torch.randn(2, 6, 8, 8), zero, None, torch.randn_like)
    changed = []
    for _ in range(8):
        before = m.clone()
        predict(m, 0.5)
        assert torch.equal(m[:, :3], before[:, :3])
        changed.append(bool((m[:, 3:] != before[:, 3:]).all()))
    assert changed == [True] * calls + [False] * (8 - calls)


def test_a_stroke_can_be_mixed_into_the_first_v_once():
    m = torch.randn(2, 6, 8, 8)
    new, _ = complete.stroke_condition(picture(), 0)(
        model_of(AGM()), m, zero, None, torch.randn_like
    )
    assert torch.equal(new[:, :3], m[:, :3])
    assert (new[:, 3:] - (0.9 * m[:, 3:] + 0.1 * picture())).abs().max() < 1e-6


def test_a_condition_is_one_of_sample_draw():
    checkpoint("run")
    known = complete.fitted(np.full((8, 8), 200, np.uint8), "", (1, 8, 8), 1) / 127.5 - 1
    half = torch.from_numpy(np.load("half.npy"))
    condition = complete.condition(known, complete.observation(mask=half))
    x = drawn(sample.load("run"), 3, nfe=3, condition=condition)
    assert (x[:, half] == 200).all()


# -------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def run(folder):
    checkpoint("run")
    np.save("grey.npy", RNG.integers(0, 256, (8, 8), np.uint8))
    return "run"


def test_original_and_known_part_lead_each_row(run, monkeypatch):
    shown = []
    grid = complete.image_grid
    monkeypatch.setattr(complete, "image_grid", lambda *a: shown.append(a) or grid(*a))
    complete.main("--ckpt run --inpaint grey.npy --mask half.npy --n 12 --nfe 2".split())
    cells, columns = shown[0]
    grey = np.load("grey.npy")
    known = np.where(np.load("half.npy"), grey, 128)
    for start in (0, columns):
        assert (cells[start, ..., 0] == grey).all()
        assert np.abs(cells[start + 1, ..., 0] - known.astype(int)).max() <= 1
    assert columns == 10
    assert (cells[2:10] == np.load("run/samples.npz")["arr_0"][:8]).all()


def test_the_line_names_the_picture(run, capsys):
    complete.main("--ckpt run --held-out 3 --shrink 2 --n 2 --nfe 2".split())
    said = capsys.readouterr().out
    assert "held-out sample 3 of digits stands first in each row" in said
    assert "NFE 2 with 3 backward passes each" in said


def test_a_stroke_leads_each_row(run, capsys):
    complete.main("--ckpt run --stroke grey.npy --n 2 --nfe 2".split())
    assert "grey.npy stands first in each row" in capsys.readouterr().out


MISTAKES = [
    ("--mask half.npy", "give one picture"),
    ("--held-out 3 --stroke grey.npy", "give one picture"),
    ("--stroke grey.npy --mask half.npy", "--mask is for --inpaint and --held-out"),
    ("--inpaint grey.npy --mask half.npy --share .3", "--share is for --stroke"),
    ("--inpaint grey.npy", "give --mask FILE or --shrink K"),
    ("--inpaint grey.npy --mask half.npy --shrink 2", "give --mask FILE or --shrink K"),
    ("--inpaint grey.npy --shrink 3", "--shrink must divide the sides of the pictures, [8, 8]"),
    ("--inpaint nowhere.npy --shrink 2", "cannot read nowhere.npy"),
    ("--inpaint grey.npy --mask none.npy", "0 of 64 pixels are known"),
    ("--inpaint grey.npy --mask all.npy", "64 of 64 pixels are known"),
    ("--held-out 359 --shrink 2", "--held-out must be below 359"),
    (
        "--inpaint grey.npy --shrink 2 --method hold --sampler strang",
        "strang loses what is redrawn",
    ),
    ("--stroke grey.npy --method hold --order 1", "nothing for a stroke to act on"),
    ("--inpaint grey.npy --shrink 2 --class 3", "no --class 3: the net knows none"),
    ("--inpaint grey.npy --shrink 2 --guidance 2", "--guidance belongs to a class"),
    ("--inpaint grey.npy --shrink 2 --sampler heun", "no --sampler heun"),
]


@pytest.mark.parametrize(("options", "words"), MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(run, options, words):
    np.save("none.npy", np.zeros((8, 8)))
    np.save("all.npy", np.ones((8, 8)))
    assert words in said_by(complete, "--ckpt", "run", "--out", "new", *options.split())
    assert not Path("new").exists()


def test_points_have_no_pictures():
    checkpoint("points", data="moons")
    said = said_by(complete, "--ckpt", "points", "--stroke", "colour.npy")
    assert "networks of 8-bit images, not of points data" in said


def test_a_net_of_the_paper_completes_by_the_papers_rule():
    checkpoint("paper", target="ode")
    options = "--ckpt paper --held-out 0 --shrink 2 --n 2 --nfe 2".split()
    assert "take --rule paper" in said_by(complete, *options)
    complete.main([*options, "--rule", "paper"])
    assert Path("paper/samples.png").exists()


def test_a_picture_is_fitted_as_in_training():
    Image = pytest.importorskip("PIL.Image")
    ImageOps = pytest.importorskip("PIL.ImageOps")
    image = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), np.uint8))
    fit = np.asarray(ImageOps.fit(image, (8, 8), Image.Resampling.LANCZOS))
    x = complete.fitted(np.asarray(image), "", (3, 8, 8), 1)
    assert (x[0].movedim(0, 2).numpy() == fit).all()


def test_a_colour_picture_is_grey_for_a_grey_network():
    Image = pytest.importorskip("PIL.Image")
    colour = np.load("colour.npy")
    grey = np.asarray(Image.fromarray(colour).convert("L")).astype(float)
    x = complete.fitted(colour, "", (1, 8, 8), 1)
    assert np.abs(x[0, 0].numpy() - grey).max() <= 1


def test_the_alpha_of_a_mask_is_the_mask(run):
    Image = pytest.importorskip("PIL.Image")
    half = np.load("half.npy")
    rgba = np.dstack([RNG.integers(0, 256, (8, 8, 3)), 255 * half]).astype(np.uint8)
    Image.fromarray(rgba).save("mask.png")
    args = SimpleNamespace(mask="mask.png")
    assert (complete.mask_of(args, sample.load("run")).numpy() == half).all()


def test_another_size_wants_pillow(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(UserError, match="give 8 x 8 pixels, or pip install pillow"):
        complete.fitted(np.zeros((9, 9), np.uint8), "a.npy", (1, 8, 8), 1)
