"""nets.py and train.py at toy size: what a run keeps, how it stops and goes on, what it says."""

import ast
import io
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import agm_ref
import data
import hold_ref
import nets
import train
from formats import command
from formats.files import UserError

ROOT = Path(__file__).parent.parent
TOY = "--steps 6 --batch 16 --width 8 --blocks 1 --log-every 1 --save-every 3 --device cpu".split()
POINTS = [*TOY, "--data", "moons"]
CHILD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder, one thread as child processes have, signals as a terminal has them."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    former = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    torch.set_num_threads(threads)
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of a toy run with classes, for tests that only read it."""
    out = tmp_path_factory.mktemp("toy") / "run"
    train.main([*TOY, "--classes", "--out", str(out)])
    return out


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(train, "draw_picture", Mock())


def shaken(net):
    """The net with its zero layers filled, so that every path counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net.eval()


def read(out):
    return torch.load(f"{out}/ckpt.pt", weights_only=True)


def rewrite(source, out, change):
    """The checkpoint of one run in the folder of another, after change(its content)."""
    content = read(source)
    change(content)
    Path(out).mkdir(exist_ok=True)
    torch.save(content, f"{out}/ckpt.pt")


def snapshot(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def refused(*argv):
    """The one line with which a command is refused."""
    with pytest.raises(SystemExit, match=r"^error: [^\n]+$") as stop:
        train.main(list(argv))
    return stop.value.code


def assert_same_run(a, b):
    """Two runs have come to the same checkpoint, to the last bit."""
    for key in ("net", "ema", "optimizer", "step", "held_out"):
        torch.testing.assert_close(read(a)[key], read(b)[key], rtol=0, atol=0)


def send_in_batch(monkeypatch, number, call):
    """The signal comes while the call-th batch is drawn."""
    calls = itertools.count(1)
    batch = data.Dataset.batch

    def patched(dataset, n):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return batch(dataset, n)

    monkeypatch.setattr(data.Dataset, "batch", patched)


def status_of(argv):
    """The exit status of a command, 0 if it returns."""
    try:
        train.main(argv)
    except SystemExit as stop:
        return stop.code
    return 0


# -------------------------------------------------------------------------------------------------
# nets.py


def test_untrained_nets_return_zero():
    t = torch.full((3,), 0.5)
    assert not nets.MLP(4, 2)(torch.randn(3, 4), t).any()
    assert not nets.UNet(2, 1, width=8)(torch.randn(3, 2, 8, 8), t).any()


def test_each_class_changes_what_a_net_says():
    net = shaken(nets.MLP(4, 2, width=16, depth=2, classes=3))
    m = torch.randn(3, 4)
    t = torch.full((3,), 0.5)
    said = [net(m, t, torch.full((3,), c)) for c in range(4)]
    for a, b in itertools.combinations(said, 2):
        assert (a - b).abs().max() > 1e-3


def test_no_label_is_the_last_class():
    net = shaken(nets.MLP(4, 2, width=16, depth=2, classes=3))
    m = torch.randn(3, 4)
    t = torch.full((3,), 0.5)
    assert torch.equal(net(m, t), net(m, t, torch.full((3,), 3)))


def test_a_net_without_classes_takes_no_label():
    with pytest.raises(ValueError, match="built without classes"):
        nets.MLP(4, 2)(torch.randn(3, 4), torch.rand(3), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("size", [(8, 8), (5, 11), (1, 3)])
def test_unet_pads_any_size_with_zeros_and_crops(size):
    H, W = size
    net = shaken(nets.UNet(6, 3, 8, mult=(1, 2, 2)))
    m = torch.randn(2, 6, H, W)
    t = torch.tensor([0.2, 0.7])
    padded = torch.zeros(2, 6, 4 * math.ceil(H / 4), 4 * math.ceil(W / 4))
    padded[..., :H, :W] = m
    assert net(m, t).shape == (2, 3, H, W)
    assert (net(m, t) - net(padded, t)[..., :H, :W]).abs().max() < 1e-4


def test_the_largest_divisor_is_the_one_that_a_search_finds():
    for number, most in itertools.product(range(1, 40), range(1, 40)):
        divisors = [d for d in range(1, most + 1) if number % d == 0]
        assert nets.largest_divisor(number, most) == max(divisors)


@pytest.mark.parametrize("order", range(1, 9))
def test_times_of_a_paper_net_have_different_embeddings(order):
    """The data's time is the process's knowledge: `last` of orders 7 and 8 rounds to 1."""
    facts = dict(shape=[2], std=0.5, bound=1.0, labels=0)
    config = train.Config(method="hold", order=order, target="noise")
    net = train.build(config, facts)[2]
    early, late = net.time(torch.tensor([0.8, 1.2]))
    assert (early - late).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------
# What a run is built of


def parameters(shape, device):
    """Millions of weights of a preset's net."""
    with torch.device("meta"):
        config = replace(train.Config(), **train.preset_for(shape, device))
        facts = dict(shape=list(shape), std=0.5, bound=1.0, labels=0)
        net = train.build(config, facts)[2]
    return sum(p.numel() for p in net.parameters()) / 1e6


@pytest.mark.parametrize("side", [16, 28, 32, 48, 64])
def test_a_cpu_gets_a_net_of_about_a_million_weights(side):
    assert 0.5 < parameters((3, side, side), "cpu") < 2


def test_a_gpu_gets_the_usual_size_for_cifar10():
    assert 35 < parameters((3, 32, 32), "cuda") < 60


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 12, 9)])
def test_small_data_have_the_same_preset_everywhere(shape):
    assert train.preset_for(shape, "cpu") == train.preset_for(shape, "cuda")


def test_the_std_of_nearly_black_pictures_is_held_within_what_a_process_takes():
    facts = dict(shape=[1, 8, 8], std=0.01, bound=1.0, labels=0)
    assert train.build(train.Config(), facts)[1].sigma_data == 0.1


def test_points_and_images_have_noise_levels_of_their_own(toy):
    assert read(toy)["data"]["noise"] == (-1.2, 1.2)
    train.main([*POINTS, "--out", "points"])
    process = train.build(train.Config(data="moons"), read("points")["data"])[1]
    assert (process.noise_mean, process.noise_std) == train.POINTS_NOISE


class FlowMatching(agm_ref.Process):
    n, first, last, prior_cov = 1, 1e-5, 0.999, torch.ones(1, 1, dtype=torch.float64)

    def mean(self, t):
        return torch.as_tensor(t, dtype=torch.float64)[..., None]

    def cholesky(self, t):
        return 1 - torch.as_tensor(t, dtype=torch.float64)[..., None, None]


def test_a_third_method_is_trained_and_sampled_once_it_stands_in_METHODS(monkeypatch):
    import sample

    monkeypatch.setitem(train.METHODS, "flow", (agm_ref, FlowMatching))
    train.main([*POINTS, "--method", "flow", "--out", "run"])
    sample.main("--ckpt run --nfe 3 --n 5".split())
    assert np.load("run/samples.npz")["arr_0"].shape == (5, 2)


def test_an_error_in_an_edited_network_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(nets.UNet, "forward", lambda net, m, t, label=None: net.first(m[:, :0]))
    with pytest.raises(RuntimeError, match="channels"):
        train.main(TOY)


def test_a_net_that_was_edited_after_its_training_is_told_from_a_bad_file(toy, monkeypatch):
    shutil.copytree(toy, "run")
    monkeypatch.setattr(nets.UNet, "__init__", edited_init)
    said = refused("--resume", "--out", "run", "--steps", "7")
    assert "was it edited since?" in said


def edited_init(net, *args, init=nets.UNet.__init__, **more):
    init(net, *args, **more)
    net.extra = torch.nn.Linear(2, 2)


# -------------------------------------------------------------------------------------------------
# A run and its log


def test_the_log_repeats_the_terminal_and_greps(no_pictures, capsys):
    train.main([*TOY, "--out", "run"])
    said = capsys.readouterr().out
    assert said == Path("run/log.txt").read_text()
    line = r"\nstep 3 loss \S+ grad \S+ it/s \S+ images/s \S+ minutes left \d+\.\d\n"
    assert re.search(line, said)


def test_the_logged_held_out_loss_is_that_of_the_saved_average(toy):
    ckpt = train.load_checkpoint(toy)
    run = train.prepare(ckpt["config"], ckpt["data"], ckpt, torch.device("cpu"))
    found = train.held_out_loss(run, data.load("digits"))
    assert f"held-out {found:.5f}" in (toy / "log.txt").read_text()


def test_a_picture_comes_early_and_with_every_save(toy):
    assert sorted(p.name[-5] for p in toy.glob("step-*.png")) == ["1", "3", "6"]


def test_the_bend_of_the_grid_is_kept_with_the_last_checkpoint(toy):
    bend = read(toy)["bend"]
    assert len(bend["lam"]) == len(bend["size"]) > 30


def test_data_with_classes_say_so_where_none_are_learned(no_pictures, capsys):
    train.main([*TOY, "--out", "run"])
    assert "--classes would learn the 10 classes" in capsys.readouterr().out


def test_a_warning_about_the_data_stands_in_the_log(no_pictures):
    x = np.random.default_rng(0).normal(size=(60, 2)) * [1, 1000]
    np.save("uneven.npy", x)
    train.main([*TOY, "--data", "uneven.npy", "--out", "run"])
    assert re.search("^warning: .*uneven.npy", Path("run/log.txt").read_text(), re.M)


def test_six_saves_are_the_default(no_pictures):
    train.main([*POINTS, "--save-every", "0", "--steps", "30", "--log-every", "99", "--out", "run"])
    assert Path("run/log.txt").read_text().count("held-out") == 6


class Clock:
    """Time that only batches take, one second each."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        batch = data.Dataset.batch

        def slow(dataset, n):
            self.now += 1
            return batch(dataset, n)

        monkeypatch.setattr(data.Dataset, "batch", slow)
        monkeypatch.setattr(train.time, "perf_counter", lambda: self.now)


def test_minutes_end_a_run_by_the_clock_with_its_rate_at_zero(no_pictures, monkeypatch):
    Clock(monkeypatch)
    train.main([*POINTS, "--minutes", "1", "--out", "run"])
    assert read("run")["step"] == 60
    rate = read("run")["optimizer"]["param_groups"][0]["lr"]
    assert 0 < rate < 1e-3 * (math.pi / 60) ** 2  # the cosine one update before its end


def test_a_run_of_minutes_saves_six_times(no_pictures, monkeypatch):
    Clock(monkeypatch)
    train.main([*POINTS, "--minutes", "1", "--out", "run"])
    assert Path("run/log.txt").read_text().count("held-out") == 6


def test_minutes_are_added_by_resume(no_pictures, monkeypatch):
    Clock(monkeypatch)
    train.main([*POINTS, "--minutes", "1", "--out", "run"])
    train.main("--resume --out run --minutes 0.5".split())
    assert read("run")["step"] == 90


def test_a_run_of_minutes_goes_on_by_steps(no_pictures, monkeypatch):
    Clock(monkeypatch)
    train.main([*POINTS, "--steps", "70", "--minutes", "1", "--out", "run"])
    train.main("--resume --out run --steps 70".split())
    assert read("run")["step"] == 70


def test_a_stopped_run_of_minutes_does_the_rest_of_them(no_pictures, monkeypatch):
    Clock(monkeypatch)
    with monkeypatch.context() as patch:
        send_in_batch(patch, signal.SIGTERM, 20)
        assert status_of([*POINTS, "--minutes", "1", "--out", "run"]) == 143
    train.main("--resume --out run".split())
    assert read("run")["step"] == 60


def test_minutes_left_are_those_of_the_last_minute(monkeypatch):
    now = 0.0
    monkeypatch.setattr(train.time, "perf_counter", lambda: now)
    pace = train.Pace(train.Config(steps=1000), 0, 0.0)
    for step in range(1, 101):  # slow for 100 s, then fast for 100 s
        now += 1
        pace.look(step)
    for step in range(110, 1110, 10):
        now += 1
        speed, _ = pace.look(step)
    assert abs(speed - 10) < 0.5


def test_a_clock_that_stands_still_divides_nothing_by_zero(no_pictures, monkeypatch):
    monkeypatch.setattr(train.time, "perf_counter", lambda: 5.0)
    train.main([*POINTS, "--out", "run"])
    assert read("run")["step"] == 6


def test_a_run_without_held_out_samples_has_no_held_out_loss(no_pictures):
    np.save("few.npy", np.random.default_rng(0).normal(size=(4, 2)))
    train.main([*TOY, "--data", "few.npy", "--out", "run"])
    assert math.isnan(read("run")["held_out"])


def test_a_folder_with_a_run_is_refused_with_the_way_to_go_on(toy):
    assert "has a run: --resume" in refused(*TOY, "--out", str(toy))


def test_help_takes_a_folder_with_a_per_cent_sign(toy):
    shutil.copytree(toy, "50%")
    with pytest.raises(SystemExit) as stop:
        train.main("--resume --out 50% --help".split())
    assert stop.value.code == 0


def test_held_out_losses_do_not_depend_on_the_batch(no_pictures, monkeypatch):
    calls = []
    loss = agm_ref.loss

    def counted(process, net, x, label=None):
        calls.append(len(x))
        return loss(process, net, x, label)

    monkeypatch.setattr(agm_ref, "loss", counted)
    train.main([*POINTS, "--batch", "2", "--steps", "1", "--out", "run"])
    assert calls == [2, 512]


# -------------------------------------------------------------------------------------------------
# Stopped and resumed


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_lets_the_update_and_its_save_end(number, no_pictures, monkeypatch, capsys):
    send_in_batch(monkeypatch, number, 2)
    assert status_of([*POINTS, "--save-every", "99", "--out", "run"]) == 128 + number
    assert read("run")["step"] == 2
    assert "stopped at step 2, which is saved: --resume --out 'run'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        "--method hold --target noise --classes --accum 2 --dropout 0.1",
        "--data moons --target sde",
        "--mult 1 --flip --amp bf16",
    ],
)
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(options, no_pictures, monkeypatch):
    options = [*TOY, "--save-every", "99", *options.split()]
    train.main([*options, "--log-every", "4", "--out", "whole"])
    with monkeypatch.context() as patch:
        send_in_batch(patch, signal.SIGTERM, 2)
        assert status_of([*options, "--out", "cut"]) == 143
    train.main("--resume --out cut".split())
    assert_same_run("whole", "cut")


def test_a_killed_run_goes_on_from_its_last_save(no_pictures, tmp_path):
    program = "import sys, test_train as t; t.killed_in_its_fifth_update(sys.argv[1:])"
    argv = [sys.executable, "-c", program, *POINTS, "--out", "cut"]
    assert subprocess.run(argv, env=CHILD, capture_output=True).returncode == -signal.SIGKILL
    assert read("cut")["step"] == 3
    train.main("--resume --out cut".split())
    train.main([*POINTS, "--out", "whole"])
    assert_same_run("whole", "cut")


def killed_in_its_fifth_update(argv):
    torch.set_num_threads(1)
    train.draw_picture = Mock()
    with pytest.MonkeyPatch.context() as patch:
        send_in_batch(patch, signal.SIGKILL, 5)
        train.main(argv)


@pytest.mark.parametrize("end", ["success", "error", "stop"])
def test_signal_handlers_are_as_before_whatever_ends_a_run(end, no_pictures, monkeypatch):
    handlers = [signal.getsignal(number) for number in SIGNALS]
    if end == "error":
        monkeypatch.setattr(agm_ref, "loss", Mock(side_effect=KeyError("broken")))
        with pytest.raises(KeyError):
            train.main([*POINTS, "--out", "run"])
    elif end == "stop":
        send_in_batch(monkeypatch, signal.SIGINT, 2)
        assert status_of([*POINTS, "--out", "run"]) == 130
    else:
        train.main([*POINTS, "--out", "run"])
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_a_signal_that_was_ignored_stays_ignored(no_pictures, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    send_in_batch(monkeypatch, signal.SIGHUP, 2)
    assert status_of([*POINTS, "--out", "run"]) == 0


def test_a_thread_trains(no_pictures):
    thread = threading.Thread(target=train.main, args=[[*POINTS, "--out", "run"]])
    thread.start()
    thread.join()
    assert read("run")["step"] == 6


def test_a_finished_run_says_what_makes_it_longer(toy, no_pictures, capsys):
    shutil.copytree(toy, "run")
    train.main("--resume --out run".split())
    assert "nothing is left to do: --resume with a larger --steps" in capsys.readouterr().out


def test_resume_refuses_what_it_cannot_change(toy):
    shutil.copytree(toy, "run")
    before = snapshot("run")
    assert "the run has --width 8: leave it out" in refused("--resume", "--out", "run", "--width=9")
    assert "the run has --classes True" in refused("--resume", "--out", "run", "--no-classes")
    assert snapshot("run") == before


def test_every_option_of_before_that_may_not_change_still_may_not():
    fixed = {f.name for f in fields(train.Config) if not f.metadata["may_change"]}
    assert fixed == set(
        "method order target size batch lr warmup clip ema width mult blocks attention dropout "
        "classes flip seed".split()
    )


def test_resume_takes_the_newest_run(toy, no_pictures):
    shutil.copytree(toy, "runs/new")
    shutil.copytree(toy, "runs/old")
    os.utime("runs/old/ckpt.pt", (0, 0))
    train.main("--resume --steps 7".split())
    assert read("runs/new")["step"] == 7
    assert read("runs/old")["step"] == 6


def test_resume_finds_its_data_from_any_folder(no_pictures, monkeypatch):
    np.save("mine.npy", np.random.default_rng(0).normal(size=(60, 2)))
    train.main([*TOY, "--data", "mine.npy", "--out", "run"])
    Path("deep").mkdir()
    monkeypatch.chdir("deep")
    train.main("--resume --out ../run --steps 7".split())
    assert read("../run")["step"] == 7


def test_resume_knows_its_data_by_their_content(no_pictures):
    for seed in (0, 1):
        np.save(f"{seed}.npy", 5 + np.random.default_rng(seed).normal(size=(60, 2)))
    train.main([*TOY, "--data", "0.npy", "--out", "run"])
    said = refused("--resume", "--out", "run", "--steps", "7", "--data", "1.npy")
    assert "not the run's data" in said
    Path("0.npy").rename("moved.npy")
    train.main("--resume --out run --steps 7 --data moved.npy".split())
    assert read("run")["step"] == 7


# -------------------------------------------------------------------------------------------------
# Several processes


def shared(out, accum):
    """A run whose updates see the same eight samples, however many processes and parts share
    them."""
    calls = itertools.count()
    build = train.build

    def batch(dataset, n):
        step, part = divmod(next(calls), accum)
        first = 8 * step + (part * train.WORLD + train.RANK) * n
        return dataset.train[first : first + n] / 127.5 - 1, None

    def loss(process, net, x, label=None):  # draws nothing
        return (net(x, x.mean((1, 2, 3)).sigmoid()) - x.flip(-1)).square().mean()

    def shaken_build(*args):
        page, process, net = build(*args)
        return page, process, shaken(net)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build", shaken_build)
        patch.setattr(train, "draw_picture", Mock())
        patch.setattr(data.Dataset, "batch", batch)
        patch.setattr(agm_ref, "loss", loss)
        options = f"--steps 1 --batch 8 --warmup 0 --clip 1e6 --accum {accum} --out {out}"
        train.main([*TOY, *options.split()])


def in_each_of_two_processes():
    """What torchrun runs for the tests below."""
    torch.set_num_threads(1)
    train.draw_picture = Mock()
    shared("both", 2)
    train.distributed.init_process_group = Mock()  # once is enough
    train.main([*POINTS, "--out", "whole"])
    with pytest.MonkeyPatch.context() as patch:
        send_in_batch(patch, signal.SIGTERM, 2 if train.RANK else 0)
        status_of([*POINTS, "--save-every", "99", "--out", "cut"])
    train.distributed.barrier()
    train.main("--resume --out cut".split())
    train.distributed.barrier()  # the end of train.py does the same
    train.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which two processes have worked, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "both.py").write_text("import test_train\ntest_train.in_each_of_two_processes()")
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 both.py".split()
    with open(folder / "said", "w") as said:  # a pipe could outlive what torchrun kills
        argv = [sys.executable, *launch]
        done = subprocess.run(argv, env=CHILD, cwd=folder, stdout=said, stderr=said)
    text = (folder / "said").read_text()
    assert done.returncode == 0, text
    return folder, text


def first_moments(out):
    """AdamW's average of gradients after one update, a tenth of the gradient."""
    return [state["exp_avg"] for state in read(out)["optimizer"]["state"].values()]


def test_gradients_do_not_depend_on_how_many_processes_or_parts_share_a_batch(two_processes):
    shared("one", 1)
    shared("parts", 4)
    one = first_moments("one")
    assert max(float(g.abs().max()) for g in one) > 1e-3
    for out in ("parts", two_processes[0] / "both"):
        for a, b in zip(one, first_moments(out), strict=True):
            assert (a - b).abs().max() < 1e-6  # sums in float32 differ by about 1e-8


def test_a_signal_to_one_process_stops_both_once(two_processes):
    folder, said = two_processes
    assert said.count("stopped at step 2, which is saved") == 1
    assert_same_run(folder / "whole", folder / "cut")


@pytest.mark.parametrize("left", [{"RANK": "1"}, {"RANK": ""}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_left_overs_of_torchrun_change_nothing(left):
    argv = [sys.executable, str(ROOT / "train.py"), *POINTS, "--steps", "1", "--out", "run"]
    done = subprocess.run(argv, env=CHILD | left, capture_output=True, text=True)
    assert done.returncode == 0
    assert "step 1 " in done.stdout
    assert Path("run/ckpt.pt").exists()


# -------------------------------------------------------------------------------------------------
# What a user meets is one line, and loses nothing


MISTAKES = {
    "--data digit": "did you mean digits",
    "--data moons --classes": "no labels",
    "--batch 16 --accum 3": "--batch must be a multiple",
    "--target noise": "--target of agm must be one of data, ode, sde",
    "--attention 2": "--attention names levels of --mult",
    "--steps 0": "--steps must be from 1 to",
    "--steps x": "--steps",
    "--lr nan": "--lr must be from",
    "--device nowhere": "cannot use --device nowhere",
    "--device meta": "cannot use --device meta",
    "--data ~nobodys/x": "no such",
    "--method hodl": "--method must be one of agm, hold",
    "--order 5": "agm has no --order",
    "--colour": "--colour",
    "--out taken": "taken is not empty",
    "--out taken/file/deeper": "cannot make taken/file/deeper",
    "--resume": "no run under runs/ yet: train first",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(options):
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    before = snapshot(".")
    assert MISTAKES[options] in refused(*TOY, *options.split())
    assert snapshot(".") == before


def test_runs_started_at_once_take_different_folders():
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: train.new_folder(train.Config()).name, range(8)))
    assert sorted(found) == ["agm-digits", *(f"agm-digits-{i}" for i in range(2, 9))]


@pytest.mark.parametrize("name", ["ascii", "full", "closed"])
def test_a_lost_or_narrow_terminal_costs_nothing(name, no_pictures, monkeypatch):
    np.save("данные.npy", np.random.default_rng(0).normal(size=(60, 2)))
    streams = dict(
        full=Mock(write=Mock(side_effect=OSError(28, "No space"))),
        ascii=io.TextIOWrapper(io.BytesIO(), "ascii"),
        closed=None,
    )
    monkeypatch.setattr(sys, "stdout", streams[name])
    train.main([*TOY, "--data", "данные.npy"])
    assert "данные" in Path("runs/agm-данные/log.txt").read_text("utf-8")


def test_a_full_disk_keeps_the_old_checkpoint(toy, no_pictures, monkeypatch):
    shutil.copytree(toy, "run")
    before = read("run")["step"]
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    assert "cannot write run/ckpt.pt" in refused("--resume", "--out", "run", "--steps", "7")
    assert read("run")["step"] == before
    assert not list(Path("run").glob("*.tmp"))


def test_a_full_log_costs_nothing(no_pictures):
    Path("run").mkdir()
    log = train.Log(Path("/dev/full"), "cpu")
    log.say("a line")


def diverging(monkeypatch, updates):
    """The loss is not a number after so many calls."""
    loss = agm_ref.loss
    calls = itertools.count(1)
    monkeypatch.setattr(
        agm_ref, "loss", lambda *a: loss(*a) * (math.nan if next(calls) > updates else 1)
    )


def test_divergence_keeps_the_last_good_weights_and_says_where(no_pictures, monkeypatch):
    diverging(monkeypatch, 4)  # three updates and one held-out loss
    said = refused(*POINTS, "--log-every", "99", "--out", "run")
    assert "lower --lr or --clip; run/ckpt.pt has the last good weights" in said
    assert train.load_checkpoint("run")["step"] == 3


def test_divergence_before_the_first_save_says_that_nothing_was_saved(no_pictures, monkeypatch):
    diverging(monkeypatch, 1)
    assert "nothing was saved yet" in refused(*POINTS, "--out", "run")


BROKEN = {
    "another program": lambda c: c.pop("config"),
    "an older version": lambda c: c["data"].pop("window"),
    "a newer version": lambda c: c.update(layout=99),
    "weights are not finite": lambda c: next(iter(c["net"].values())).fill_(math.nan),
}


@pytest.mark.parametrize("words", BROKEN)
def test_what_is_wrong_with_a_checkpoint_is_said(words, toy):
    rewrite(toy, "run", BROKEN[words])
    assert words in refused("--resume", "--out", "run")


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text"])
def test_a_damaged_checkpoint_is_one_line(damage, toy):
    shutil.copytree(toy, "run")
    path = Path("run/ckpt.pt")
    content = bytearray(path.read_bytes())
    weights = read(toy)["ema"]["first.weight"].numpy().tobytes()
    content[content.find(weights) + 9] ^= 1
    damaged = dict(cut=content[:-999], bit=content, empty=b"", text=b"hello")
    path.write_bytes(damaged[damage])
    assert "cannot use run/ckpt.pt as a checkpoint" in refused("--resume", "--out", "run")


def test_a_checkpoint_of_layout_1_goes_on_with_its_own_noise_levels(no_pictures):
    train.main([*POINTS, "--out", "new"])

    def as_before(content):
        for key in ("layout", "bend", "minutes"):
            content.pop(key)
        content["data"].pop("noise")

    rewrite("new", "old", as_before)
    ckpt = train.load_checkpoint("old")
    assert train.build(ckpt["config"], ckpt["data"])[1].noise_mean == -1.2
    train.main("--resume --out old --steps 7".split())
    assert "noise" not in read("old")["data"]


def test_no_memory_is_told_by_the_type_of_the_error_and_not_by_a_word(no_pictures):
    assert command.is_of_memory(MemoryError())
    assert command.is_of_memory(torch.OutOfMemoryError())
    assert not command.is_of_memory(RuntimeError("the network lost its memory"))
    with pytest.raises(RuntimeError) as no_memory:
        torch.empty(2**60)
    assert command.is_of_memory(no_memory.value)


def test_no_memory_is_one_line(no_pictures, monkeypatch):
    monkeypatch.setattr(agm_ref, "loss", Mock(side_effect=MemoryError()))
    assert "out of memory: lower --batch" in refused(*POINTS, "--out", "run")


def test_no_compiler_is_one_line(no_pictures, monkeypatch):
    compile = torch.compile
    no_compiler = Mock(side_effect=RuntimeError("no C++ compiler"))
    monkeypatch.setattr(torch, "compile", lambda net: compile(net, backend=no_compiler))
    assert "leave out --compile" in refused(*POINTS, "--compile", "--out", "run")


def test_a_users_error_keeps_pythons_own_way_of_warning():
    former = warnings.showwarning
    with pytest.raises(SystemExit):
        command.run(Mock(side_effect=UserError("no")))
    assert warnings.showwarning is former


# -------------------------------------------------------------------------------------------------
# Imports point down


LEVELS = [
    ["agm_ref", "hold_ref", "nets", "formats", "extras.clock"],
    ["data"],
    ["train"],
    ["sample"],
    ["extras.complete", "extras.likelihood"],
]


def imports_of(path):
    """Modules of this project that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if (ROOT / parts[0]).is_dir() or (ROOT / f"{parts[0]}.py").exists():
                found.add(name)
    return found


def level_of(name):
    """The level at which a module stands."""
    for level, modules in enumerate(LEVELS):
        for module in modules:
            if name == module or name.startswith(module + "."):
                return level
    return None


FILES = [*ROOT.glob("*.py"), *ROOT.glob("formats/*.py"), *ROOT.glob("extras/*.py")]
FILES = [path for path in FILES if path.name not in ("test_ref.py", "__init__.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_point_down(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for name in imports_of(path):
        if own.startswith("formats."):
            assert name.startswith("formats.")
        else:
            assert level_of(name) is not None, f"{own} imports {name}"
            assert level_of(name) < level_of(own), f"{own} imports {name}"


@pytest.mark.parametrize("page", [agm_ref, hold_ref, nets], ids=lambda page: page.__name__)
def test_a_page_imports_nothing_of_the_project(page):
    assert not imports_of(Path(page.__file__))
