"""sample.py: what is drawn, from Python and from the command line, and what is said."""

import math
import os
import re
import shutil
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

RNG = np.random.default_rng(0)
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
    facts = data.load(config.data).summary()
    if change:
        facts |= change
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
    """Folders of four runs, for tests that only read them: digits with classes, points, fields, and
    a net of the paper's."""
    base = tmp_path_factory.mktemp("runs")
    np.save(base / "fields.npy", RNG.normal(size=(50, 6, 6, 4)))
    checkpoint(base / "digits", bend=BEND, classes=True)
    checkpoint(base / "points", data="moons")
    checkpoint(base / "fields", data=str(base / "fields.npy"))
    checkpoint(base / "paper", data="moons", target="ode")
    return base


def drawn(model, n, **options):
    """The samples of `draw` as one array."""
    return np.concatenate([x for x, _ in sample.draw(model, n, **options)])


def command(*argv):
    """Runs the command line, and returns its exit status."""
    try:
        sample.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def refused(*argv):
    """The one line with which a command is refused."""
    said = command(*argv)
    assert re.fullmatch(r"error: [^\n]+", str(said))
    return said


def results(out):
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


def recorded(monkeypatch, page, name):
    """The keyword arguments that a sampler of the page is called with, a dict for each batch."""
    seen = []
    original = page.SAMPLERS[name]

    def sampler(process, predict, m, nfe, data_mean=None, ts=None):
        seen.append(dict(data_mean=data_mean, ts=ts))
        return original(process, predict, m, nfe, data_mean, ts)

    monkeypatch.setitem(page.SAMPLERS, name, sampler)
    return seen


# -------------------------------------------------------------------------------------------------
# From Python


def test_the_lines_of_the_docstring_draw_64_digits(runs):
    lines = re.findall(r"^    (model = .*|images = .*)$", sample.__doc__, re.M)
    program = "\n".join(lines).replace("runs/agm-digits", str(runs / "digits"))
    names = dict(sample=sample, np=np)
    exec(program, names)
    assert names["images"].shape == (64, 8, 8, 1)
    assert names["images"].dtype == np.uint8


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
    whole = drawn(model, 20, nfe=4, batch=20, **options).astype(float)
    some = drawn(model, 12, nfe=4, first=8, batch=batch, **options).astype(float)
    # rounding may turn a grey level of an image; other data are compared in network units
    grey = model.facts["kind"] == "image"
    assert np.abs(some - whole[8:]).max() <= (1 if grey else 1e-4 * model.facts["scale"])


@pytest.mark.parametrize(("run", "options"), WAYS)
def test_samples_in_the_same_batches_are_equal_to_the_bit(runs, run, options):
    model = sample.load(runs / run)
    a = drawn(model, 9, nfe=3, first=5, batch=4, **options)
    b = drawn(model, 9, nfe=3, first=5, batch=4, **options)
    assert a.tobytes() == b.tobytes()


def test_another_seed_draws_other_samples(runs):
    model = sample.load(runs / "points")
    assert (drawn(model, 9, nfe=2) != drawn(model, 9, nfe=2, seed=1)).all()


def test_two_samples_have_nothing_in_common(runs):
    x = drawn(sample.load(runs / "points"), 500, nfe=2)
    assert len(np.unique(x, axis=0)) == 500


def test_classes_are_taken_in_turn_by_the_number_of_the_sample(runs):
    batches = sample.draw(
        sample.load(runs / "digits"), 6, nfe=1, first=4, batch=4, classes=[2, 5, 9]
    )
    assert np.concatenate([label for _, label in batches]).tolist() == [5, 9, 2, 5, 9, 2]


@pytest.mark.parametrize(("guidance", "factor"), [(0, 2), (1, 5), (0.5, 3.5), (3, 11)])
def test_guidance_goes_from_no_class_through_the_class_and_beyond(guidance, factor):
    def net(y, t, label=None):
        return y * (2 if label is None else 5)

    guided = sample.guide(net, guidance)
    one = torch.ones(3)
    assert (guided(one, one, label=one) == factor).all()
    assert (guided(one, one) == 2).all()


def test_the_first_step_starts_from_the_mean_of_the_data(runs, monkeypatch):
    model = sample.load(runs / "digits")
    seen = recorded(monkeypatch, agm_ref, "ode")
    drawn(model, 4)
    assert torch.equal(seen[0]["data_mean"], model.facts["mean"])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_first_step_of_a_class_starts_from_its_guided_mean(runs, monkeypatch, guidance):
    model = sample.load(runs / "digits")
    seen = recorded(monkeypatch, agm_ref, "ode")
    drawn(model, 2, classes=[3, 8], guidance=guidance)
    mean = model.facts["mean"]
    means = model.facts["class_means"][[3, 8]]
    wanted = (mean + guidance * (means - mean)).clamp(-1, 1)
    assert (seen[0]["data_mean"] - wanted).abs().max() < 1e-6


def test_a_condition_gets_the_state_and_gives_state_and_prediction(runs):
    model = sample.load(runs / "points")
    one = torch.tensor([0.3, -0.6])

    def condition(model, m, net, label, randn):
        return m, lambda m, t: one.expand(len(m), 2)

    x = drawn(model, 3, condition=condition)
    assert np.abs(x - data.finish(one[None], model.facts)).max() < 1e-6


def test_watch_sees_each_prediction(runs):
    seen = []
    model = sample.load(runs / "points")
    x = drawn(model, 5, nfe=7, watch=lambda m, x_hat: seen.append((m.shape, x_hat)))
    assert [shape for shape, _ in seen] == [(5, 4)] * 7
    assert (data.finish(seen[-1][1], model.facts) == x).all()


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


def test_a_net_of_the_paper_serves_its_own_process_only(runs):
    with pytest.raises(UserError, match="target ode serves its own process only"):
        sample.load(runs / "paper", method="hold")


def test_order_is_refused_where_there_are_no_orders(runs):
    with pytest.raises(UserError, match="agm has no --order"):
        sample.load(runs / "points", order=2)


# -------------------------------------------------------------------------------------------------
# Samplers and their grids


def test_the_learned_grid_is_the_default_where_the_run_has_one(runs, monkeypatch):
    model = sample.load(runs / "digits")
    seen = recorded(monkeypatch, agm_ref, "ode")
    default = drawn(model, 4, nfe=10)
    learned = drawn(model, 4, nfe=10, grid="learned")
    ts = np.array(seen[0]["ts"])
    assert len(ts) == 11
    assert (np.diff(ts) > 0).all()
    assert (default == learned).all()


@pytest.mark.parametrize("method", ["agm", "hold"])
def test_the_even_grid_is_that_of_a_run_without_bend(runs, method):
    model = sample.load(runs / "digits", method=method)
    without = replace(model, bend=None)
    even = drawn(model, 4, nfe=10, grid="even")
    assert (even == drawn(without, 4, nfe=10)).all()
    assert (even == drawn(without, 4, nfe=10, grid="even")).all()
    assert (even != drawn(model, 4, nfe=10)).any()


def test_a_learned_grid_that_is_not_there_is_refused(runs):
    with pytest.raises(UserError, match="has no learned grid: leave out --grid"):
        drawn(sample.load(runs / "points"), 2, grid="learned")


def test_times_of_the_callers_own_go_before_the_learned_grid(runs, monkeypatch):
    seen = recorded(monkeypatch, agm_ref, "ode")
    drawn(sample.load(runs / "digits"), 2, nfe=2, ts=(1e-5, 0.3, 0.9))
    assert seen[0]["ts"] == (1e-5, 0.3, 0.9)


@pytest.mark.parametrize("nfe", [1, 2, 3])
def test_few_calls_are_drawn_with_the_learned_grid(runs, nfe):
    calls = []
    model = sample.load(runs / "digits")
    drawn(model, 2, nfe=nfe, watch=lambda m, x_hat: calls.append(1))
    assert len(calls) == nfe


REFUSED = [
    (dict(sampler="heun"), "no --sampler heun: choose from ode, exponential"),
    (dict(t_end=0.5), "sampler ode has no --t-end"),
    (dict(rho=2.0), "sampler ode has no --rho"),
    (dict(sampler="em", multistep=2), "sampler em has no --multistep"),
    (dict(sampler="em", grid="even"), "sampler em has no --grid"),
    (dict(sampler="em", t_end=6.0), "--t-end: t_end must be from 1e-05 to 0.999"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_a_sampler_does_not_take_is_refused(runs, options, words):
    with pytest.raises(UserError, match=words):
        drawn(sample.load(runs / "points"), 2, **options)


def test_a_sampler_that_a_reader_adds_needs_no_options(runs, monkeypatch):
    def first_guess(process, predict, m, nfe):
        return predict(m, process.first)

    monkeypatch.setitem(agm_ref.SAMPLERS, "mine", first_guess)
    model = sample.load(runs / "digits")
    assert drawn(model, 2, sampler="mine").shape == (2, 8, 8, 1)
    with pytest.raises(UserError, match="sampler mine has no --rho"):
        drawn(model, 2, sampler="mine", rho=2.0)


# -------------------------------------------------------------------------------------------------
# The command line


def test_a_net_with_classes_draws_eight_of_each_in_named_rows(runs, monkeypatch):
    shown = Mock(wraps=data.picture)
    monkeypatch.setattr(data, "picture", shown)
    assert command("--ckpt", runs / "digits", "--nfe", 1, "--out", "here") == 0
    assert results("here")["labels"].tolist() == list(range(10)) * 8
    assert results("here")["names"].tolist() == [str(i) for i in range(10)]
    assert (shown.call_args.args[2] == results("here")["labels"]).all()


def test_class_none_draws_without_a_class(runs):
    command("--ckpt", runs / "digits", "--nfe", 1, "--class", "none", "--out", "here")
    assert list(results("here")) == ["arr_0"]
    assert len(results("here")["arr_0"]) == 64


def test_points_are_ten_thousand(runs):
    command("--ckpt", runs / "points", "--nfe", 1, "--out", "here")
    assert results("here")["arr_0"].shape == (10_000, 2)


@pytest.mark.parametrize(("name", "number"), [("two", 2), ("2", 2), ("7", 1)])
def test_a_class_is_asked_for_by_name_or_number_and_the_name_counts_first(name, number):
    names = ["zero", "7", *"two three four five six seven eight nine".split()]
    checkpoint("run", classes=True, change=dict(names=names))
    command("--ckpt", "run", "--class", name, "--n", 3, "--nfe", 1)
    assert results("run")["labels"].tolist() == [number] * 3


def test_a_class_without_samples_is_not_drawn():
    checkpoint("run", classes=True, change=dict(counts=[9] * 4 + [0] + [9] * 5))
    command("--ckpt", "run", "--nfe", 1)
    assert sorted(set(results("run")["labels"])) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert "no --class 4: the net knows 0, 1, 2, 3, 5" in refused("--ckpt", "run", "--class", 4)


def test_what_is_written_can_be_trained_on(runs):
    command("--ckpt", runs / "digits", "--nfe", 1, "--out", "here")
    again = data.load("here/samples.npz")
    assert again.shape == (1, 8, 8)
    assert list(again.names) == [str(i) for i in range(10)]


def test_network_calls_of_guidance_are_explained(runs, capsys):
    options = ("--class", 3, "--n", 2, "--nfe", 3, "--out", "here")
    command("--ckpt", runs / "digits", *options, "--guidance", 2)
    assert "ode NFE 6 (3 calls of the sampler, 2 network calls each)" in capsys.readouterr().out
    command("--ckpt", runs / "digits", *options)
    assert "ode NFE 3 seconds" in capsys.readouterr().out


MISTAKES = [
    ("digits --inpaint FILE", "--inpaint is an option of python -m extras.complete now"),
    ("digits --held-out=3", "--held-out is an option of python -m extras.complete now"),
    ("digits --nll", "--nll is an option of python -m extras.likelihood now"),
    ("digits --t-end .5", "sampler ode has no --t-end"),
    ("digits --guidance 2 --class none", "--guidance belongs to a class"),
    ("points --guidance 2", "--guidance belongs to a class"),
    ("points --class all", "no --class all: the net knows none"),
    ("digits --class x", "no --class x: the net knows 0, 1, 2"),
    ("points --png-dir p", "--png-dir is for 8-bit images"),
    ("paper --order 2", "serves its own process only"),
    ("nowhere", "nowhere"),
]


@pytest.mark.parametrize(("options", "words"), MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(runs, options, words):
    run, *more = options.split()
    assert words in refused("--ckpt", runs / run, "--out", "here", *more)
    assert not os.listdir(".")


def test_without_a_run_the_line_says_to_train(runs):
    assert "no run under runs/ yet: train first" in refused()


def test_pngs_are_rgb_and_numbered_from_first(runs):
    Image = pytest.importorskip("PIL.Image")
    command("--ckpt", runs / "digits", *"--n 3 --first 5 --nfe 1 --png-dir png --out here".split())
    assert sorted(os.listdir("png")) == ["000005.png", "000006.png", "000007.png"]
    for i, image in enumerate(results("here")["arr_0"], 5):
        assert (np.asarray(Image.open(f"png/{i:06d}.png")) == image.repeat(3, 2)).all()


def test_pngs_overwrite_nothing(runs):
    options = ("--ckpt", runs / "digits", *"--n 3 --nfe 1 --png-dir png --out here".split())
    command(*options)
    before = Path("png/000001.png").read_bytes()
    assert "png/000001.png exists already" in refused(*options, "--first", 1, "--seed", 1)
    assert Path("png/000001.png").read_bytes() == before


def test_a_film_has_a_frame_for_each_call_and_ends_with_what_is_drawn(runs, monkeypatch):
    film = Mock(wraps=sample.apng)
    monkeypatch.setattr(sample, "apng", film)
    command(
        "--ckpt", runs / "digits", *"--class 1 --n 6 --batch 4 --nfe 5 --film --out here".split()
    )
    frames = film.call_args.args[0]
    first_batch = data.image_grid(results("here")["arr_0"][:4])
    assert len(frames) == 5
    assert (frames[-1][:, first_batch.shape[1] :] == first_batch).all()
    assert Path("here/film.png").exists()


def test_bfloat16_changes_little(runs):
    for amp in ("off", "bf16"):
        options = ("--n", 20, "--nfe", 3, "--class", "none", "--amp", amp, "--out", amp)
        command("--ckpt", runs / "digits", *options)
    off = np.abs(results("off")["arr_0"].astype(float) - results("bf16")["arr_0"])
    assert 0 < off.mean() < 3


# -------------------------------------------------------------------------------------------------
# Signals, terminals, disks


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_keeps_the_batches_that_are_done_and_says_how_to_go_on(
    runs, number, monkeypatch, capsys
):
    options = ["--ckpt", runs / "digits", *"--nfe 3 --batch 4 --guidance 2 --out".split()]
    command(*options, "whole", "--first", 7, "--n", 13)
    with monkeypatch.context() as patch:
        signal_at(patch, number, 3)
        assert command(*options, "cut", "--first", 7, "--n", 13) == 128 + number
    rest = re.search(r"stopped: (--first 15 --n 5) ", capsys.readouterr().err)[1]
    command(*options, "rest", *rest.split())
    for key in ("arr_0", "labels"):
        both = np.concatenate([results("cut")[key], results("rest")[key]]).astype(float)
        assert np.abs(both - results("whole")[key]).max() <= 1


def test_a_signal_before_the_first_batch_says_that_nothing_was_drawn(runs, monkeypatch, capsys):
    signal_at(monkeypatch, signal.SIGTERM, 1)
    assert command("--ckpt", runs / "digits", "--out", "here") == 128 + signal.SIGTERM
    assert "nothing was written" in capsys.readouterr().err
    assert not os.listdir("here")


@pytest.mark.parametrize("end", ["success", "error", "signal"])
def test_signal_handlers_are_as_before(runs, end, monkeypatch):
    before = [signal.getsignal(number) for number in SIGNALS]
    if end == "error":
        monkeypatch.setattr(data, "finish", Mock(side_effect=ValueError("broken")))
    if end == "signal":
        signal_at(monkeypatch, signal.SIGINT, 2)
    try:
        command("--ckpt", runs / "points", *"--n 8 --batch 4 --nfe 1 --out here".split())
    except ValueError:
        assert end == "error"
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_thread_draws(runs):
    options = ["--ckpt", str(runs / "points"), *"--n 8 --nfe 1 --out here".split()]
    thread = threading.Thread(target=sample.main, args=[options])
    thread.start()
    thread.join()
    assert len(results("here")["arr_0"]) == 8


@pytest.mark.parametrize(
    "stderr", [None, Mock(isatty=lambda: True, write=Mock(side_effect=OSError))]
)
def test_progress_on_a_terminal_that_is_gone_costs_nothing(stderr, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr)
    sample.say_progress(0.01, -1e6)


def test_progress_is_said_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sample.time, "perf_counter", lambda: 130.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    sample.say_progress(0.25, 10.0)
    assert "25% done, 6.0 minutes left" in capsys.readouterr().err


def test_samples_that_are_not_finite_are_not_written(runs, monkeypatch):
    monkeypatch.setitem(agm_ref.SAMPLERS, "ode", lambda process, predict, m, nfe: m * math.nan)
    assert "not finite" in refused("--ckpt", runs / "points", "--out", "here")
    assert not os.listdir("here")


def test_a_full_disk_keeps_the_old_samples(runs, monkeypatch):
    shutil.copytree(runs / "digits", "run")
    command("--ckpt", "run", "--n", 2, "--nfe", 1)
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    assert "cannot write run/samples.npz" in refused("--ckpt", "run", "--n", 3, "--nfe", 1)
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_picture_that_cannot_be_made_leaves_the_samples(runs, monkeypatch):
    monkeypatch.setattr(data, "picture", Mock(side_effect=UserError("too wide")))
    assert "too wide" in refused("--ckpt", runs / "digits", *"--n 4 --nfe 1 --out here".split())
    assert len(results("here")["arr_0"]) == 4
