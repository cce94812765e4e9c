"""extras/conditions.py and extras/likelihood.py: against the formulas of Gaussians, mixtures, and files made here."""

import math
import sys
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal
from torch.nn.functional import avg_pool2d

sys.path.insert(0, str(Path(__file__).parent.parent))
import agm_ref
from agm_ref import AGM
from data import Dataset, UserError
from extras import conditions
from extras.likelihood import held_out_nll, log_likelihood_bound
from hold_ref import HOLD
from test_ref import F64, Mixture, module_of

RNG = np.random.default_rng(0)
PROCESSES = [AGM(), HOLD(order=1), HOLD(order=2), HOLD()]
OPTIONS = "stroke inpaint held_out inject share mask shrink rule passes noise sampler nfe".split()
FACTS = {"kind": "image", "shape": [3, 8, 8], "shift": 0.0, "scale": 1.0}


def fails(words, function, *args, **kwargs):
    with pytest.raises(UserError, match=rf"\A.*{words}.*\Z"):  # "." matches no line break
        function(*args, **kwargs)


def zero(y, t, label=None):
    """A network whose denoiser is exact for N(0, sigma_data^2)."""
    return 0 * y


# Likelihood

GAUSS, MIXED = Mixture([1.0], [[0.0] * 3], 0.7), Mixture([0.2, 0.5, 0.3], [[0.8, 0.0], [-0.6, 0.5], [0.0, -0.9]], 0.1)
LONG = [AGM(p=2.0), HOLD(order=1, first=12.0), HOLD(order=2, first=12.0, var=1.5), HOLD(first=12.0), HOLD(order=4)]
BOUNDS = [(P, GAUSS, P.n % 2 == 1, *least) for P in LONG for least in ((32, 2e-4, 2e-3), (64, 5e-5, 1e-3))]
BOUNDS += [(P, MIXED, None, 96, 2e-3, 0.06) for P in (AGM(), HOLD())]


@pytest.mark.parametrize(("P", "data", "exact", "steps", "least_mean", "least"), BOUNDS)
def test_likelihood(P, data, exact, steps, least_mean, least):
    """The Jacobian of Gaussian data is a multiple of I, so that Hutchinson's estimate has no noise."""
    torch.manual_seed(0)
    x = data.centres[data.weights.multinomial(200, replacement=True)]
    x = x + data.std * torch.randn_like(x)
    truth = (Normal(data.centres, data.std).log_prob(x[:, None]).sum(2) + data.weights.log()).logsumexp(1)
    off = log_likelihood_bound(module_of(P), P, data.at_y(P), x, steps, exact) - truth
    assert off.mean().abs() < least_mean and off.abs().max() < least


def test_hutchinson_is_unbiased():
    """On a mixture the divergence is not a multiple of I: the mean over probes meets the exact trace."""
    torch.manual_seed(0)
    P, x = AGM(last=0.9), torch.tensor([[0.9, 0.1]], dtype=F64).expand(600, 2)
    predict = Mixture(MIXED.weights.tolist(), MIXED.centres.tolist(), 0.3).at_y(P)
    a, b = (log_likelihood_bound(agm_ref, P, predict, x, 16, exact) for exact in (True, False))
    assert b.std() > 1.5 * a.std()
    assert (a.mean() - b.mean()).abs() < 4.5 * ((a.var() + b.var()) / 600).sqrt()


def test_nll_is_in_the_units_of_the_file():
    """Points of a set of other units than the run's; 8-bit images, float32, in bits a dimension."""
    torch.manual_seed(0)
    P, raw, here = AGM(), torch.tensor([30.0, -7.0]) + 4 * torch.randn(50, 2, dtype=F64), torch.tensor([5.0, 2.0])
    facts, stored = {"kind": "points", "shape": [2], "shift": [30.0, -7.0], "scale": 8.0}, ((raw - here) / 3).float()
    dataset = Dataset("set", "points", stored, stored, shift=here, scale=3.0)
    predict = partial(agm_ref.denoise, P, zero)
    nll, unit = held_out_nll(agm_ref, P, predict, dataset, facts, n=40, batch=16)
    truth = -Normal(torch.tensor([30.0, -7.0]), 4.0).log_prob(raw).sum(1)[:40]  # 4 = 8 sigma_data
    assert unit == "nats/point" and (nll - truth).abs().max() < 0.02
    pixels, images = torch.randint(0, 256, (6, 1, 5, 5), dtype=torch.uint8), FACTS | {"shape": [1, 5, 5]}
    dataset = Dataset("set", "image", pixels, pixels)
    torch.manual_seed(1)
    nll, unit = held_out_nll(agm_ref, P, predict, dataset, images)
    torch.manual_seed(1)
    values = pixels + torch.rand(pixels.shape, dtype=F64) - 0.5
    truth = -Normal(127.5, 127.5 * 0.5).log_prob(values).mean((1, 2, 3)) / math.log(2)
    assert unit == "bits/dim" and (nll - truth).abs().max() < 2e-3
    fails("at least 2 of image .*, set has 1 ", held_out_nll, agm_ref, P, predict, dataset, images, n=1)
    fails("set has 6 held-out samples of image", held_out_nll, agm_ref, P, predict, dataset, facts)


# Conditions: 8 numbers as an image (1, 2, 4), of covariance COV; half of them known, or the means of 2 x 2 blocks

EYE = torch.eye(8, dtype=F64)
ROWS, COLUMNS = torch.cartesian_prod(torch.arange(2), torch.arange(4)).T
COV = 0.25 * 0.9 ** ((ROWS[:, None] - ROWS).abs() + (COLUMNS[:, None] - COLUMNS).abs()).double()
SEEN = {"pixels": conditions.observation((ROWS + COLUMNS).reshape(2, 4) % 2), "means": conditions.observation(shrink=2)}
VALUE = torch.tensor([0.7, -0.2, 0.1, 0.4], dtype=F64).repeat(2).reshape(1, 1, 2, 4)


def gaussian_net(y, t, label=None):
    """The network whose denoiser is exact for N(0, COV) at sigma_data 1/2."""
    root = float(1 / t[0] - 1)  # 1 / sigma
    c_in = (1 + 0.25 * root**2) ** -0.5
    gain = torch.linalg.solve(root**2 * COV + EYE, root * COV) - 0.25 * root * c_in**2 * EYE
    return (y.flatten(1) / c_in @ gain / (0.5 * c_in)).reshape(y.shape)


def rows_of(see):
    """The projection as U^T U, U (r, 8)."""
    values, vectors = torch.linalg.eigh(see(EYE.reshape(8, 1, 2, 4)).reshape(8, 8))
    assert ((values.abs() < 1e-9) | ((values - 1).abs() < 1e-9)).all()
    return vectors[:, values > 0.5].T


@pytest.mark.parametrize("P", PROCESSES, ids=repr)
@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_one_call_gives_the_posterior_mean(P, kind, noise):
    """E[x | m, known]: both are observations of x with Gaussian noise."""
    torch.manual_seed(0)
    method, t, m, U = module_of(P), 0.4, torch.randn(5, P.n, 2, 4, dtype=F64), rows_of(SEEN[kind])
    A = torch.cat([torch.kron(P.mean(t)[:, None], EYE), U])
    S = torch.block_diag(torch.kron(P.cov(t), EYE), noise**2 * EYE[: len(U), : len(U)])
    data = torch.cat([m.flatten(1), (U @ VALUE.flatten()).expand(5, -1)], 1)
    predict = conditions.by_covariance(method, P, gaussian_net, SEEN[kind], SEEN[kind](VALUE), 12, noise)
    truth = data @ torch.linalg.solve(A @ COV @ A.mT + S, A @ COV)
    assert (predict(m, t).flatten(1) - truth).abs().max() < 1e-9


SETTINGS = [
    *((P, "ode", 20, gibbs, *k) for P, gibbs, k in product(PROCESSES, (0, 1), (("pixels", 0.0), ("means", 0.2)))),
    *((AGM(), "exponential", 50, 1, "means", 0.0), (AGM(), "splitting", 100, 1, "pixels", 0.0)),
    *((AGM(), "em", 100, 1, "means", 0.2), (HOLD(), "lie", 100, 1, "pixels", 0.0)),
    *((HOLD(), "strang", 100, 0, "means", 0.0), (HOLD(), "ode", 50, 1, "pixels", 0.2)),
]


@pytest.mark.parametrize(("P", "sampler", "nfe", "gibbs", "kind", "noise"), SETTINGS, ids=lambda v: str(v)[:13])
def test_samples_have_the_conditional_law_of_gaussian_data(P, sampler, nfe, gibbs, kind, noise):
    """Mean and covariance; the Gibbs rule's draws of x are white, so that it approaches the law as nfe grows."""
    torch.manual_seed(0)
    method, n, see, U = module_of(P), 5_000, SEEN[kind], rows_of(SEEN[kind])
    K = COV @ U.mT @ torch.linalg.inv(U @ COV @ U.mT + noise**2 * EYE[: len(U), : len(U)])
    mean, cov, randn = K @ U @ VALUE.flatten(), COV - K @ U @ COV, torch.randn_like if gibbs else None
    predict = conditions.by_covariance(method, P, gaussian_net, see, see(VALUE), 4, noise, randn=randn)
    x = method.SAMPLERS[sampler](P, predict, P.prior((n, 1, 2, 4)).double(), nfe)
    assert noise or (see(x) - see(VALUE)).abs().max() < 1e-9
    x = x.flatten(1)
    assert (x.mean(0) - mean).square().mean().sqrt() < 0.05 * cov.diagonal().mean().sqrt()
    assert (torch.cov(x.mT) - cov).norm() < (0.12 if gibbs and P.n > 1 else 0.05) * cov.norm()


@pytest.mark.parametrize("P", [AGM(), HOLD(order=1), HOLD()], ids=repr)
def test_redrawing_leaves_the_law_of_the_state(P):
    """Given x, a state redrawn is one of the same law with the same data block."""
    torch.manual_seed(0)
    method, n, t = module_of(P), 100_000, 0.5
    x = torch.full((n, 1, 1, 1), 0.7, dtype=F64)
    old = method.mix(P.mean(t)[:, None], x) + method.mix(P.cholesky(t), torch.randn(n, P.n, 1, 1, dtype=F64))
    new = old.clone()
    conditions.redraw(method, P, new, t, x, torch.randn_like)
    assert (new[:, 0] == old[:, 0]).all() and ((new[:, 1:] != old[:, 1:]).all() or P.n == 1)
    off = new.flatten(1) - 0.7 * P.mean(t)
    assert (off.mean(0) / P.cov(t).diagonal().sqrt()).abs().max() < 0.02
    assert (torch.cov(off.mT) - P.cov(t)).abs().max() < 0.02 * P.cov(t).diagonal().max()


def given(P=PROCESSES[0], picture=None, facts=FACTS, **options):
    args = SimpleNamespace(**dict.fromkeys(OPTIONS) | {"nfe": 4} | options)
    return conditions.given(args, module_of(P), P, facts, picture)


def drawn(start, P=PROCESSES[0], net=zero, label=None):
    """Two samples as pixels (2, C, H, W)."""
    torch.manual_seed(0)
    m, predict = start(P.prior((2, *FACTS["shape"])), net, label, torch.randn_like)
    return (module_of(P).ode(P, predict, m, 4) + 1) * 127.5


@pytest.fixture(autouse=True)
def pixels(tmp_path, monkeypatch):
    """An empty folder but for a colour picture, returned as (3, 8, 8), and a mask of its left half."""
    monkeypatch.chdir(tmp_path)
    np.save("colour.npy", RNG.integers(0, 256, (8, 8, 3), "u1"))
    np.save("half.npy", np.arange(64).reshape(8, 8) % 8 < 4)
    return torch.from_numpy(np.load("colour.npy")).permute(2, 0, 1)


def test_what_is_known_is_kept(pixels):
    """By every rule, from a file or a held-out picture, as pixels or means, with the label of each sample."""
    half, labels = np.load("half.npy"), []

    def net(y, t, label=None):
        labels.append(label)
        return 0 * y

    for rule, passes in ("gibbs", 3), ("covariance", 2), ("paper", 0):
        start, note = given(inpaint="colour.npy", mask="half.npy", rule=rule)
        x = drawn(start, net=net, label=torch.tensor([2, 0]))
        assert note == f" with {passes} backward passes each" * bool(passes)
        assert (x - pixels).abs().numpy()[..., half].max() < 1e-3 and (x[0] != x[1]).numpy()[..., ~half].all()
        start, _ = given(picture=pixels[None] / 127.5 - 1, held_out=3, mask="half.npy", rule=rule)
        assert (drawn(start) - x).abs().max() < 1e-3
    assert all(label.tolist() == [2, 0] for label in labels)
    means = avg_pool2d(pixels.float(), 4)
    np.save("small.npy", means.permute(1, 2, 0).round().byte().numpy())
    for file in "colour.npy", "small.npy":
        assert (avg_pool2d(drawn(given(inpaint=file, shrink=4)[0]), 4) - means).abs().max() < 0.6
    np.save("small.npy", np.full((2, 2, 3), 200, "u1"))  # noise is in grey levels, of means as well
    start, _ = given(inpaint="small.npy", shrink=4, noise=20.0, rule="covariance")
    m, predict = start(torch.zeros(1, 6, 8, 8, dtype=F64), zero, None, torch.randn_like)
    prior, noise = 0.25 / 16 / (1 + 0.25 * float(AGM().snr(0.5))), (20 / 127.5) ** 2  # variances of a mean
    assert (predict(m, 0.5) - (200 / 127.5 - 1) * prior / (prior + noise)).abs().max() < 1e-6  # the file is float32


def test_strokes(pixels):
    """init mixes a tenth into v; dyn redraws v given the stroke in the first share of the calls and no other."""
    stroke, m = pixels / 127.5 - 1, torch.randn(2, 6, 8, 8)
    for options, calls in ({}, 2), ({"share": 0.5}, 4), ({"inject": "dyn", "share": 0.01}, 1), ({"inject": "init"}, 0):
        new, predict = given(stroke="colour.npy", nfe=8, **options)[0](m, zero, None, torch.randn_like)
        start, changed = torch.cat([m[:, :3], 0.9 * m[:, 3:] + 0.1 * stroke], 1) if calls == 0 else m, []
        assert new is not m and (new - start).abs().max() < 1e-6  # the caller's own stays what it is
        for _ in range(8):
            before = new.clone()
            predict(new, 0.5)
            changed.append(bool((new[:, 3:] != before[:, 3:]).all()) and bool((new[:, :3] == before[:, :3]).all()))
        assert changed == [True] * calls + [False] * (8 - calls)
    guided = drawn(given(HOLD(), stroke="colour.npy", share=0.5)[0], HOLD())
    assert (guided - drawn(given(HOLD(), stroke="colour.npy", inject="init")[0], HOLD())).abs().max() > 1
    assert given(picture=stroke[None], held_out=0, inject="dyn")[0] and given() == (None, "")


BOTH = {"inpaint": "colour.npy", "mask": "half.npy"}
ARRAYS = {"none": np.full((8, 8), 127, "u1"), "all": np.ones((8, 8))}


@pytest.mark.parametrize(("words", "options"), [
    ("--mask: give one of --stroke, --inpaint, --held-out", {"mask": "half.npy"}),
    ("--share are for a stroke", {"stroke": "colour.npy", "mask": "half.npy"}),
    ("what is known", BOTH | {"shrink": 2}),
    ("points data", BOTH | {"facts": {"kind": "points", "shape": [2]}}),
    ("--rule paper", BOTH | {"P": AGM(target="ode")}),
    ("strang", BOTH | {"P": HOLD(), "sampler": "strang"}),
    ("strang", {"stroke": "colour.npy", "P": HOLD(), "sampler": "strang"}),
    ("order 1", {"stroke": "colour.npy", "P": HOLD(order=1)}),
    ("must divide .8, 8", {"inpaint": "colour.npy", "shrink": 3}),
    ("no pixels are known", BOTH | {"mask": "none.npy"}),
    ("all pixels are known", BOTH | {"mask": "all.npy"}),
    ("cannot read --inpaint nowhere.npy: .*No such file", BOTH | {"inpaint": "nowhere.npy"}),
    (r"float64 \(8, 8\), not uint8", BOTH | {"inpaint": "all.npy"}),
], ids=lambda v: "" if isinstance(v, dict) else v)  # fmt: skip
def test_what_is_refused_in_one_line(words, options):
    for name, array in ARRAYS.items():
        np.save(name, array)
    fails(words, given, **options)


def test_pictures_are_brought_to_the_network_as_in_training(monkeypatch):
    """The central part by Lanczos' filter, a mask then known above 127; grey and colour as Pillow does."""
    half = np.load("half.npy")
    for mask in half, half.astype(int), half.astype(float), 128 * half[..., None].astype("u1"):
        np.save("mask.npy", mask)
        assert ((conditions.read("--mask", "mask.npy", (1, 8, 8))[0, 0] > 127).numpy() == half).all()
    Image, ImageOps = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")
    picture, black = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), "u1")), Image.new("L", (16, 16))
    images = {"colour": picture, "grey": picture.convert("L")}
    for name, image in images.items():
        image.save(f"{name}.png")
        np.save(f"{name}.npy", np.asarray(image))
    for file, C in *product(("colour.png", "grey.png", "grey.npy"), (1, 3)), ("colour.npy", 3):
        fit = ImageOps.fit(images[file[:-4]], (8, 8), Image.Resampling.LANCZOS).convert("L" if C == 1 else "RGB")
        x = conditions.read("--inpaint", file, (C, 8, 8))[0].permute(1, 2, 0).numpy().squeeze()
        assert np.abs(x - np.asarray(fit)).max() <= (file == "colour.png" and C == 1)
    fails(r"uint8 \(20, 30, 3\), not uint8 \(H, W\) or", given, stroke="colour.npy", facts=FACTS | {"shape": [1, 8, 8]})
    black.paste(255, (0, 0, 8, 16))
    black.save("mask.jpg", quality=30)  # black pixels that are not quite black are not known
    black.convert("RGB").save("mask.png")
    for file in "mask.jpg", "mask.png":
        assert ((conditions.read("--mask", file, (1, 8, 8))[0, 0] > 127).numpy() == half).all()
    picture.putalpha(ImageOps.invert(black.resize(picture.size)))
    picture.save("alpha.png")
    fails("--inpaint alpha.png: it has an alpha channel", given, inpaint="alpha.png", mask="mask.png")
    fails("--mask alpha.png: it has an alpha channel", given, inpaint="colour.png", mask="alpha.png")
    assert given(stroke="alpha.png")[0]
    Path("broken.png").write_bytes(b"no picture")
    fails("cannot read --stroke broken.png", given, stroke="broken.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    for file in "colour.png", "colour.npy":
        fails("pip install pillow, or give an .npy of 8 x 8 pixels", given, stroke=file)
