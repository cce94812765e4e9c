"""sample.py: what is drawn, from Python and from the command line, and what is said."""

import math
import os
import re
import signal
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import agm_ref
import data
import hold_ref
import sample
import train
from formats.files import UserError

BEND = dict(lam=[0.0, 1.0, 2.0, 3.0, 4.0], size=[0.1, 0.5, 3.0, 1.0, 0.1])
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder, and signals as a terminal has them."""
    monkeypatch.chdir(tmp_path)
    former = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def checkpoint(out, bend=None, change=None, **config):
    """A run as if it were trained: random weights, of which every path counts."""
    config = train.Config(**{"width": 8, "blocks": 1} | config)
    facts = data.load(config.data).summary() | (change or {})
    net = train.build(config, facts)[2]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
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


def signal_at(monkeypatch, number, call):
    """The signal comes while the call-th batch is prepared."""
    prior = sample.Noise.prior
    calls = []

    def patched(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return prior(*args)

    monkeypatch.setattr(sample.Noise, "prior", patched)


@pytest.fixture
def ode_options(monkeypatch):
    """The options that AGM's `ode` is called with, a dict for each batch."""
    seen = []
    original = agm_ref.ode

    def ode(process, predict, m, nfe, data_mean=None, ts=None):
        seen.append(dict(data_mean=data_mean, ts=ts))
        return original(process, predict, m, nfe, data_mean, ts)

    monkeypatch.setitem(agm_ref.SAMPLERS, "ode", ode)
    return seen


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
@pytest.mark.parametrize("batch", [1, 7, 40])
def test_a_sample_depends_on_its_number_alone(runs, run, options, batch):
    model = sample.load(runs / run)
    whole = drawn(model, 20, nfe=4, **options).astype(float)
    some = drawn(model, 12, nfe=4, first=8, batch=batch, **options).astype(float)
    # rounding may turn a grey level of an image; other data are compared in network units
    grey = model.facts["kind"] == "image"
    assert np.abs(some - whole[8:]).max() <= (1 if grey else 1e-4 * model.facts["scale"])


@pytest.mark.parametrize(("run", "options"), WAYS)
def test_samples_in_the_same_batches_are_equal_to_the_bit(runs, run, options):
    model = sample.load(runs / run)
    first, second = (drawn(model, 9, nfe=3, first=5, batch=4, **options) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_no_two_samples_are_alike_nor_two_seeds(runs):
    model = sample.load(runs / "points")
    both = [drawn(model, 500, nfe=2, seed=seed) for seed in (0, 1)]
    assert len(np.unique(np.concatenate(both), axis=0)) == 1000


def test_classes_are_taken_in_turn_by_the_number_of_the_sample(runs):
    model = sample.load(runs / "digits")
    batches = sample.draw(model, 6, nfe=1, first=4, batch=4, classes=[2, 5, 9])
    assert np.concatenate([label for _, label in batches]).tolist() == [5, 9, 2, 5, 9, 2]


@pytest.mark.parametrize(("guidance", "factor"), [(0, 2), (1, 5), (0.5, 3.5), (3, 11)])
def test_guidance_goes_from_no_class_through_the_class_and_beyond(guidance, factor):
    guided = sample.guide(lambda y, t, label=None: y * (2 if label is None else 5), guidance)
    assert guided(1, 0, label=7) == factor
    assert guided(1, 0) == 2


@pytest.mark.parametrize(("classes", "guidance"), [([], 1.0), ([3, 8], 1.0), ([3, 8], 3.0)])
def test_the_first_step_starts_from_the_guided_mean(runs, ode_options, classes, guidance):
    model = sample.load(runs / "digits")
    drawn(model, 2, classes=classes, guidance=guidance)
    wanted = model.facts["mean"]
    if classes:
        away = model.facts["class_means"][classes] - wanted
        wanted = (wanted + guidance * away).clamp(-1, 1)
    assert (ode_options[0]["data_mean"] - wanted).abs().max() < 1e-6


def test_where_something_is_known_the_mean_is_not(runs, ode_options):
    def condition(model, m, net, label, randn):
        return m, lambda m, t: torch.ones(len(m), 2)

    model = sample.load(runs / "points")
    x = drawn(model, 3, condition=condition)
    assert (x == data.finish(torch.ones(3, 2), model.facts)).all()
    assert ode_options[0]["data_mean"] is None


def test_raw_weights_are_those_of_the_last_update(runs):
    average = sample.load(runs / "points").net.state_dict()
    raw = sample.load(runs / "points", raw=True).net.state_dict()
    for key, value in average.items():
        assert torch.equal(raw[key], 1.1 * value)


def test_a_denoiser_serves_the_other_method(runs):
    model = sample.load(runs / "points", method="hold", order=2)
    assert model.method is hold_ref
    assert model.process.n == 2
    assert np.isfinite(drawn(model, 3)).all()


@pytest.mark.parametrize(("nfe", "times"), [(1, 1), (2, 3), (3, 4), (10, 11)])
def test_the_learned_grid_is_the_default_where_the_run_has_one(runs, ode_options, nfe, times):
    drawn(sample.load(runs / "digits"), 2, nfe=nfe)
    ts = ode_options[0]["ts"]
    assert len(ts) == times
    assert (np.diff(ts) > 0).all()


@pytest.mark.parametrize("method", ["agm", "hold"])
def test_the_even_grid_is_that_of_a_run_without_bend(runs, method):
    model = sample.load(runs / "digits", method=method)
    without = drawn(replace(model, bend=None), 4, nfe=10)
    assert (drawn(model, 4, nfe=10, grid="even") == without).all()
    assert (drawn(model, 4, nfe=10) != without).any()


def test_times_of_the_callers_own_go_before_the_learned_grid(runs, ode_options):
    drawn(sample.load(runs / "digits"), 2, nfe=2, ts=(1e-5, 0.3, 0.9))
    assert ode_options[0]["ts"] == (1e-5, 0.3, 0.9)


def test_a_sampler_that_a_reader_adds_needs_no_options(runs, monkeypatch):
    mine = lambda process, predict, m, nfe: predict(m, process.first)  # noqa: E731
    monkeypatch.setitem(agm_ref.SAMPLERS, "mine", mine)
    model = sample.load(runs / "digits")
    assert drawn(model, 2, sampler="mine").shape == (2, 8, 8, 1)
    with pytest.raises(UserError, match="sampler mine has no --rho"):
        sample.draw(model, 2, sampler="mine", rho=2.0)


# -------------------------------------------------------------------------------------------------
# The command line


DRAWN = [
    ("digits", list(range(10)) * 8),
    ("digits --class none", None),
    ("digits --n 3 --first 9", [9, 0, 1]),
    ("named --n 11", [0, 1, 2, 3, 5, 6, 7, 8, 9, 0, 1]),
    ("named --n 2 --class two", [2, 2]),
    ("named --n 2 --class 2", [2, 2]),
    ("named --n 2 --class 7", [1, 1]),
]


@pytest.mark.parametrize(("line", "labels"), DRAWN)
def test_classes_are_those_asked_for_or_eight_of_each(command, line, labels):
    assert command(f"{line} --nfe 1") == 0
    found = results()
    if labels is None:
        assert list(found) == ["arr_0"]
        assert len(found["arr_0"]) == 64
    else:
        assert found["labels"].tolist() == labels
        assert len(found["arr_0"]) == len(labels)


def test_the_picture_has_a_row_for_each_class(command, monkeypatch):
    shown = Mock(wraps=data.picture)
    monkeypatch.setattr(data, "picture", shown)
    command("digits --nfe 1")
    assert (shown.call_args.args[2] == results()["labels"]).all()


def test_points_are_ten_thousand(command):
    command("points --nfe 1")
    assert results()["arr_0"].shape == (10_000, 2)


def test_what_is_written_can_be_trained_on(command):
    command("digits --nfe 1")
    again = data.load("here/samples.npz")
    assert again.shape == (1, 8, 8)
    assert list(again.names) == [str(i) for i in range(10)]


@pytest.mark.parametrize(("more", "said"), [("", "ode NFE 3 seconds"), ("2", "ode NFE 3 x 2 (gui")])
def test_network_calls_of_guidance_are_explained(command, capsys, more, said):
    command(f"digits --class 3 --n 2 --nfe 3 --guidance {more or 1}")
    assert said in capsys.readouterr().out


MISTAKES = [
    ("digits --inpaint FILE", "unrecognized arguments: --inpaint FILE; --help"),
    ("digits --nll", "python -m extras.likelihood"),
    ("digits --n x", "invalid int value: 'x'"),
    ("digits --batch 0", "--batch must be from 1 to 1e+06, got 0"),
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
    Image = pytest.importorskip("PIL.Image")
    command("digits --n 3 --first 5 --nfe 1 --png-dir png")
    assert sorted(os.listdir("png")) == ["000005.png", "000006.png", "000007.png"]
    for i, image in enumerate(results()["arr_0"], 5):
        assert (np.asarray(Image.open(f"png/{i:06d}.png")) == image.repeat(3, 2)).all()


def test_pngs_overwrite_nothing(command):
    Path("png").mkdir()
    assert "png exists already: choose another" in command("digits --png-dir png")


def test_a_film_has_a_frame_for_each_call_and_ends_with_what_is_drawn(command, monkeypatch):
    film = Mock(wraps=sample.apng)
    monkeypatch.setattr(sample, "apng", film)
    command("digits --class 1 --n 6 --batch 4 --nfe 5 --film")
    frames = film.call_args.args[0]
    first_batch = data.image_grid(results()["arr_0"][:4])
    assert len(frames) == 5
    assert (frames[-1][:, first_batch.shape[1] :] == first_batch).all()
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
    assert "--nfe NFE calls of the sampler (default: 20)" in said
    assert "--class CLASS a class, its number, all or none; default: all that the net knows" in said
    assert "--amp off|bf16" in said


# -------------------------------------------------------------------------------------------------
# Signals, terminals, disks


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_keeps_the_batches_that_are_done_and_says_how_to_go_on(
    command, number, monkeypatch, capsys
):
    line = "digits --nfe 3 --batch 4 --guidance 2"
    command(f"{line} --first 7 --n 13", out="whole")
    with monkeypatch.context() as patch:
        signal_at(patch, number, 3)
        assert command(f"{line} --first 7 --n 13", out="cut") == 128 + number
    rest = re.search(r"stopped, 8 of 13 .*(--first 15 --n 5) ", capsys.readouterr().err)[1]
    command(f"{line} {rest}", out="rest")
    for key in ("arr_0", "labels"):
        both = np.concatenate([results("cut")[key], results("rest")[key]]).astype(float)
        assert np.abs(both - results("whole")[key]).max() <= 1
    assert signal.getsignal(number) is signal.default_int_handler


def test_a_signal_before_the_first_batch_says_that_nothing_was_written(
    command, monkeypatch, capsys
):
    signal_at(monkeypatch, signal.SIGTERM, 1)
    assert command("digits") == 128 + signal.SIGTERM
    assert "0 of 80 samples are written" in capsys.readouterr().err
    assert not os.listdir("here")


def test_after_an_error_a_signal_is_handled_as_before(command, monkeypatch):
    monkeypatch.setattr(data, "finish", Mock(side_effect=ValueError("broken")))
    with pytest.raises(ValueError, match="broken"):
        command("points --n 8 --nfe 1")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_thread_draws(command):
    thread = threading.Thread(target=command, args=["points --n 8 --nfe 1"])
    thread.start()
    thread.join()
    assert len(results()["arr_0"]) == 8


GONE = Mock(isatty=lambda: True, write=Mock(side_effect=OSError))


@pytest.mark.parametrize("stderr", [None, GONE])
def test_progress_on_a_terminal_that_is_gone_costs_nothing(stderr, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr)
    sample.say_progress(0.01, -1e6)


def test_progress_is_said_on_a_terminal(command, monkeypatch, capsys):
    monkeypatch.setattr(sample.time, "perf_counter", Mock(side_effect=[0.0, 120.0, 120.0, 120.0]))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    command("points --n 4 --batch 1 --nfe 1")
    assert "25% done, 6.0 minutes left" in capsys.readouterr().err


def test_samples_that_are_not_finite_are_not_written(command, monkeypatch):
    monkeypatch.setitem(agm_ref.SAMPLERS, "ode", lambda process, predict, m, nfe: m * math.nan)
    assert "not finite" in command("points")
    assert not os.listdir("here")


def test_a_full_disk_keeps_the_old_samples(command, monkeypatch):
    command("digits --n 2 --nfe 1")
    before = {path: path.read_bytes() for path in Path("here").iterdir()}
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    assert "cannot write here/samples.npz" in command("digits --n 3 --nfe 1")
    assert {path: path.read_bytes() for path in Path("here").iterdir()} == before


def test_a_picture_that_cannot_be_made_leaves_the_samples(command, monkeypatch):
    monkeypatch.setattr(data, "picture", Mock(side_effect=UserError("too wide")))
    assert "too wide" in command("digits --n 4 --nfe 1")
    assert len(results()["arr_0"]) == 4
