"""sample.py: what is drawn, from Python and from the command line, and what is said."""

import itertools
import math
import os
import re
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
import torch

import agm_ref
import data
import sample
import train
from formats.files import UserError

BEND = dict(lam=[0.0, 1.0, 2.0, 3.0, 4.0], size=[0.1, 0.5, 3.0, 1.0, 0.1])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checkpoint(out, bend=None, change=None, **config):
    """A run as if it were trained: random weights, of which every path counts."""
    config = train.Config(**{"width": 8, "blocks": 1} | config)
    facts = data.load(config.data).summary() | (change or {})
    torch.manual_seed(0)
    net = train.build(config, facts)[2]
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    content = dict(layout=2, config=asdict(config), data=facts, bend=bend, step=1, optimizer={})
    weights = net.state_dict()
    content |= dict(ema=weights, net={key: 1.1 * value for key, value in weights.items()})
    Path(out).mkdir(parents=True)
    torch.save(content, f"{out}/ckpt.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs, for tests that only read them."""
    base = tmp_path_factory.mktemp("runs")
    np.save(base / "fields.npy", np.random.default_rng(0).normal(size=(50, 6, 6, 4)))
    checkpoint(base / "digits", bend=BEND, classes=True)
    checkpoint(base / "points", data="moons")
    checkpoint(base / "fields", data=str(base / "fields.npy"))
    checkpoint(base / "paper", data="moons", target="ode")

    # a class of the name "7" that is not number 7, and one without samples
    names = "zero 7 two three four five six seven eight nine".split()
    counts = [9] * 4 + [0] + [9] * 5
    checkpoint(base / "named", classes=True, change=dict(names=names, counts=counts))

    # so many classes that their means are not kept
    change = dict(labels=300, names=list(map(str, range(300))), counts=[1] * 300, class_means=None)
    checkpoint(base / "many", classes=True, change=change)
    return base


@pytest.fixture
def command(runs):
    """A function that runs a command line, which begins with a run's name, and returns the exit
    status."""

    def status_of(line, out="here"):
        name, *options = line.split()
        try:
            sample.main(["--ckpt", str(runs / name), "--out", out, *options])
        except SystemExit as stop:
            return stop.code
        return 0

    return status_of


def drawn(model, n, **options):
    """The samples of `draw` as one array."""
    return np.concatenate([x for x, _ in sample.draw(model, n, **options)])


def results(out="here"):
    return dict(np.load(f"{out}/samples.npz"))


def sigterm_at(monkeypatch, call):
    """The signal comes while the call-th batch is prepared."""
    prior = sample.Noise.prior
    calls = itertools.count(1)

    def patched(*args):
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return prior(*args)

    monkeypatch.setattr(sample.Noise, "prior", patched)


@pytest.fixture
def ode(monkeypatch):
    """AGM's `ode`, which remembers what it was called with."""
    spy = create_autospec(agm_ref.ode, side_effect=agm_ref.ode)
    monkeypatch.setitem(agm_ref.SAMPLERS, "ode", spy)
    return spy


# -------------------------------------------------------------------------------------------------
# From Python


WAYS = [
    ("digits", {}),
    ("digits", dict(sampler="em")),
    ("digits", dict(classes=[1, 4, 7], guidance=2.0)),
    ("fields", dict(sampler="splitting")),
    ("points", {}),
]


@pytest.mark.parametrize(("run", "options"), WAYS)
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_a_sample_depends_on_its_number_alone(runs, run, options, batch):
    model = sample.load(runs / run)
    whole = drawn(model, 20, nfe=4, batch=4, **options)
    some = drawn(model, 12, nfe=4, first=8, batch=batch, **options)
    # of other batches rounding may turn a grey level, and moves numbers by 1e-4 in network units
    bound = 0 if batch == 4 else max(1e-4 * model.facts["scale"], some.dtype == np.uint8)
    assert np.abs(some.astype(float) - whole[8:]).max() <= bound


def test_no_two_samples_are_alike_nor_two_seeds(runs):
    model = sample.load(runs / "points")
    x = np.concatenate([drawn(model, 500, nfe=2, seed=seed) for seed in (0, 1)])
    assert len(np.unique(x, axis=0)) == 1000


def test_classes_are_taken_in_turn_by_the_number_of_the_sample(runs):
    model = sample.load(runs / "digits")
    batches = sample.draw(model, 6, nfe=1, first=4, batch=4, classes=[2, 5, 9])
    assert [label.tolist() for _, label in batches] == [[5, 9, 2, 5], [9, 2]]


@pytest.mark.parametrize(("guidance", "factor", "calls"), [(0, 2, 2), (1, 5, 1), (3, 11, 2)])
def test_guidance_goes_from_no_class_through_the_class_and_beyond(guidance, factor, calls):
    net = Mock(side_effect=lambda y, t, label=None: y * (2 if label is None else 5))
    guided = sample.guide(net, guidance)
    assert guided(1, 0, label=7) == factor
    assert net.call_count == calls
    assert guided(1, 0) == 2


@pytest.mark.parametrize(("classes", "guidance"), [([], 1.0), ([3, 8], 1.0), ([3, 8], 3.0)])
def test_the_first_step_starts_from_the_guided_mean(runs, ode, classes, guidance):
    model = sample.load(runs / "digits")
    drawn(model, 2, classes=classes, guidance=guidance)
    wanted = model.facts["mean"]
    if classes:
        away = model.facts["class_means"][classes] - wanted
        wanted = (wanted + guidance * away).clamp(-1, 1)
    assert (ode.call_args.kwargs["data_mean"] - wanted).abs().max() < 1e-6


def test_where_something_is_known_the_mean_is_not(runs, ode):
    drawn(
        sample.load(runs / "points"), 3, condition=lambda model, m, *_: (m, lambda m, t: m[:, :2])
    )
    assert ode.call_args.kwargs["data_mean"] is None


def test_raw_weights_are_those_of_the_last_update(runs):
    average = sample.load(runs / "points").net
    raw = sample.load(runs / "points", raw=True).net
    for a, r in zip(average.parameters(), raw.parameters(), strict=True):
        assert torch.equal(r, 1.1 * a)


@pytest.mark.parametrize(("nfe", "times"), [(1, 1), (2, 3), (10, 11)])
def test_the_learned_grid_is_the_default_where_the_run_has_one(runs, ode, nfe, times):
    drawn(sample.load(runs / "digits"), 2, nfe=nfe)
    ts = ode.call_args.kwargs["ts"]
    assert len(ts) == times
    assert (np.diff(ts) > 0).all()


def test_the_even_grid_is_that_of_a_run_without_bend(runs):
    model = sample.load(runs / "digits", method="hold")
    without = drawn(replace(model, bend=None), 4, nfe=10)
    assert (drawn(model, 4, nfe=10, grid="even") == without).all()


def test_times_of_the_callers_own_go_before_the_learned_grid(runs, ode):
    drawn(sample.load(runs / "digits"), 2, nfe=2, ts=(1e-5, 0.3, 0.9))
    assert ode.call_args.kwargs["ts"] == (1e-5, 0.3, 0.9)


def test_a_sampler_that_a_reader_adds_needs_no_options(runs, monkeypatch):
    def first_guess(process, predict, m, nfe):
        return predict(m, process.first)

    monkeypatch.setitem(agm_ref.SAMPLERS, "mine", first_guess)
    assert drawn(sample.load(runs / "digits"), 2, sampler="mine").shape == (2, 8, 8, 1)


# -------------------------------------------------------------------------------------------------
# The command line


DRAWN = [
    ("digits", 80, list(range(10)) * 8),
    ("digits --n 3 --first 9", 3, [9, 0, 1]),
    ("digits --class none", 64, None),
    ("points", 10_000, None),
    ("many", 1024, [i % 300 for i in range(1024)]),
    ("named --n 6 --first 3", 6, [3, 5, 6, 7, 8, 9]),
    ("named --n 2 --class two", 2, [2, 2]),
    ("named --n 2 --class 2", 2, [2, 2]),
    ("named --n 2 --class 7", 2, [1, 1]),
]


@pytest.mark.parametrize(("line", "n", "labels"), DRAWN)
def test_so_many_are_drawn_of_these_classes(command, line, n, labels):
    command(f"{line} --nfe 1")
    found = results()
    assert len(found["arr_0"]) == n
    assert labels == (found["labels"].tolist() if "labels" in found else None)


CHANGES = [
    ("--seed 1", ""),
    ("--grid even", ""),
    ("--raw", ""),
    ("--method hold", ""),
    ("--method hold --order 2", "--method hold"),
    ("--sampler exponential --rho 2", "--sampler exponential"),
    ("--sampler exponential --multistep 1", "--sampler exponential"),
    ("--sampler exponential --t-end .5", "--sampler exponential"),
]


@pytest.mark.parametrize(("one", "other"), CHANGES)
def test_an_option_changes_what_is_drawn(command, one, other):
    command(f"digits --n 2 --nfe 10 {one}", out="one")
    command(f"digits --n 2 --nfe 10 {other}", out="other")
    assert (results("one")["arr_0"] != results("other")["arr_0"]).any()


def test_the_picture_has_a_row_for_each_class(command, monkeypatch):
    shown = Mock(wraps=data.picture)
    monkeypatch.setattr(data, "picture", shown)
    command("digits --nfe 1")
    assert (shown.call_args.args[2] == results()["labels"]).all()


def test_what_is_written_can_be_trained_on(command):
    command("digits --nfe 1")
    assert list(data.load("here/samples.npz").names) == [str(i) for i in range(10)]


def test_network_calls_of_guidance_are_explained(command, capsys):
    command("digits --class 3 --n 2 --nfe 3 --guidance 2")
    assert "ode NFE 3 x 2 (guidance calls the net" in capsys.readouterr().out


MISTAKES = [
    ("digits --inpaint FILE", "--inpaint is for python -m extras.complete"),
    ("digits --data=x", "is for python -m extras.likelihood"),
    ("digits --colour", "unrecognized arguments: --colour; --help shows"),
    ("digits --n x", "invalid int value: 'x'"),
    ("digits --batch 0", "--batch must be from 1 to 1e+06, got 0"),
    ("digits --guidance 101", "--guidance must be from 0 to 100, got 101"),
    ("digits --method flow", "--method must be one of agm, hold, got 'flow'"),
    ("digits --sampler heun", "no --sampler heun: choose from ode, exponential"),
    ("digits --t-end .5", "sampler ode has no --t-end"),
    ("digits --rho 2", "sampler ode has no --rho"),
    ("digits --sampler em --multistep 2", "sampler em has no --multistep"),
    ("digits --sampler em --t-end 6", "--t-end: t_end must be from 1e-05 to 0.999"),
    ("digits --guidance 2 --class none", "--guidance belongs to a class"),
    ("points --guidance 2", "--guidance belongs to a class"),
    ("points --class all", "no --class all: the net knows none"),
    ("digits --class x", "no --class x: the net knows 0, 1, 2"),
    ("named --class four", "no --class four: the net knows zero, 7, two, three, five"),
    ("digits --png-dir .", ". exists already: choose another --png-dir"),
    ("points --png-dir p", "--png-dir is for 8-bit images"),
    ("paper --method hold", "target ode serves its own process only"),
    ("paper --order 2", "target ode serves its own process only"),
    ("points --order 2", "agm has no --order"),
    ("nowhere", "nowhere"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(command, line, words):
    said = command(line)
    assert words in said
    assert re.fullmatch(r"error: [^\n]+", said)
    assert not os.listdir(".")


def test_pngs_are_rgb_and_numbered_from_first(command):
    command("digits --n 3 --first 5 --nfe 1 --png-dir png")
    assert sorted(os.listdir("png")) == ["000005.png", "000006.png", "000007.png"]
    for i, image in enumerate(results()["arr_0"], 5):
        assert Path(f"png/{i:06d}.png").read_bytes() == sample.png(image.repeat(3, 2))


def test_a_film_has_a_frame_for_each_call_and_ends_with_what_is_drawn(command, monkeypatch):
    film = Mock(wraps=sample.apng)
    monkeypatch.setattr(sample, "apng", film)
    command("digits --class 1 --n 6 --batch 4 --nfe 5 --film")
    frames = film.call_args.args[0]
    shown = data.image_grid(results()["arr_0"][:4])
    assert len(frames) == 5
    assert (frames[-1][:, shown.shape[1] :] == shown).all()
    assert Path("here/film.png").exists()


def test_bfloat16_changes_little(command):
    for amp in ("off", "bf16"):
        command(f"digits --n 20 --nfe 3 --class none --amp {amp}", out=amp)
    off = np.abs(results("off")["arr_0"].astype(float) - results("bf16")["arr_0"])
    assert 0 < off.mean() < 3


def test_help_shows_defaults_and_choices(capsys):
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "--nfe NFE calls of the sampler (default: 20)",
        "--class CLASS",
        "--amp off|bf16",
    ):
        assert words in said


# -------------------------------------------------------------------------------------------------
# Signals, terminals, disks


def test_a_signal_keeps_the_batches_that_are_done_and_says_how_to_go_on(
    command, monkeypatch, capsys
):
    handler = signal.getsignal(signal.SIGTERM)
    command("digits --nfe 3 --batch 4 --first 7 --n 13", out="whole")
    with monkeypatch.context() as patch:
        sigterm_at(patch, 3)
        assert command("digits --nfe 3 --batch 4 --first 7 --n 13", out="cut") == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    rest = re.search(r"stopped, 8 of 13 .*(--first 15 --n 5) ", capsys.readouterr().err)[1]
    command(f"digits --nfe 3 --batch 4 {rest}", out="rest")
    both = np.concatenate([results(out)["arr_0"] for out in ("cut", "rest")])
    assert (both == results("whole")["arr_0"]).all()


def test_a_signal_before_the_first_batch_says_that_nothing_is_written(command, monkeypatch, capsys):
    sigterm_at(monkeypatch, 1)
    assert command("digits") == 143
    assert "0 of 80 samples are written" in capsys.readouterr().err
    assert not os.listdir("here")


GONE = Mock(isatty=lambda: True, write=Mock(side_effect=OSError))


@pytest.mark.parametrize("stderr", [None, GONE])
def test_progress_on_a_terminal_that_is_gone_costs_nothing(stderr, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr)
    sample.say_progress(0.01, -1e6)


def test_progress_is_said_on_a_terminal(command, monkeypatch, capsys):
    monkeypatch.setattr(sample.time, "perf_counter", Mock(side_effect=itertools.count(0, 120)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    command("points --n 4 --batch 1 --nfe 1")
    assert "25% done, 6.0 minutes left" in capsys.readouterr().err


def test_samples_that_are_not_finite_are_not_written(command, monkeypatch):
    monkeypatch.setitem(agm_ref.SAMPLERS, "ode", lambda process, predict, m, nfe: m * math.nan)
    assert "not finite" in command("points")
    assert not os.listdir("here")


def test_a_full_disk_keeps_the_old_samples(command, monkeypatch):
    command("digits --n 2 --nfe 1")
    before = Path("here/samples.npz").read_bytes()
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    assert "cannot write here/samples.npz" in command("digits --n 3 --nfe 1")
    assert Path("here/samples.npz").read_bytes() == before
    assert sorted(os.listdir("here")) == ["samples.npz", "samples.png"]


def test_a_picture_that_cannot_be_made_leaves_the_samples(command, monkeypatch):
    monkeypatch.setattr(data, "picture", Mock(side_effect=UserError("too wide")))
    assert "too wide" in command("digits --n 4 --nfe 1")
    assert len(results()["arr_0"]) == 4
