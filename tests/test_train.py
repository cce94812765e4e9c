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
import nets
import train
from formats import command
from formats.files import UserError
from test_ref import flow_matching

ROOT = Path(__file__).parent.parent
TOY = "--steps 6 --batch 16 --width 8 --blocks 1 --log-every 1 --save-every 3 --device cpu"
POINTS = f"{TOY} --data moons"
CHILD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FACTS = dict(shape=[2], std=0.5, bound=1.0, labels=0)
FULL = OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of a toy run with classes, for tests that only read it."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    run(f"{TOY} --classes", folder)
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder, one thread as child processes have, no pictures, and signals as a terminal
    has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw_picture", Mock())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    former = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    torch.set_num_threads(threads)
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture
def copied(toy):
    """The toy run again, as `run` in the working folder."""
    shutil.copytree(toy, "run")


def begin(options, out="run"):
    train.main([*options.split(), "--out", str(out)])


def run(options, out="run"):
    """Trains, and returns the checkpoint."""
    begin(options, out)
    return read(out)


def read(out):
    return torch.load(f"{out}/ckpt.pt", weights_only=True)


def log_of(out="run"):
    return Path(out, "log.txt").read_text("utf-8")


def status_of(options, out="run"):
    """The exit status of a command, 0 if it returns."""
    try:
        begin(options, out)
    except SystemExit as stop:
        return stop.code
    return 0


def refused(options):
    """The one line with which a command is refused."""
    with pytest.raises(SystemExit, match=r"^error: [^\n]+$") as stop:
        train.main(options.split())
    return stop.value.code


def snapshot():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def numbers(name, seed=0):
    """A file of 60 points."""
    np.save(name, np.random.default_rng(seed).normal(size=(60, 2)))


def assert_same_run(a, b):
    """Two runs have come to the same checkpoint, to the last bit."""
    for key in ("net", "ema", "optimizer", "step", "held_out"):
        torch.testing.assert_close(read(a)[key], read(b)[key], rtol=0, atol=0)


def on_batch(monkeypatch, event):
    """event(number of the batch) happens while each batch is drawn."""
    count = itertools.count(1)
    batch = data.Dataset.batch

    def patched(dataset, n):
        event(next(count))
        return batch(dataset, n)

    monkeypatch.setattr(data.Dataset, "batch", patched)


def send_in_batch(monkeypatch, number, call):
    """The signal comes while that batch is drawn."""

    def event(count):
        if count == call:
            os.kill(os.getpid(), number)

    on_batch(monkeypatch, event)


# -------------------------------------------------------------------------------------------------
# nets.py

M = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
T = torch.full((3,), 0.5)


def shaken(net):
    """The net with its zero layers filled, so that every path counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net.eval()


def test_untrained_nets_return_zero():
    assert not nets.MLP(4, 2)(M, T).any()
    assert not nets.UNet(2, 1, width=8)(torch.randn(3, 2, 8, 8), T).any()


def test_each_class_changes_what_a_net_says_and_no_label_is_the_last():
    net = shaken(nets.MLP(4, 2, width=16, depth=2, classes=3))
    said = [net(M, T, torch.full((3,), label)) for label in range(4)]
    for a, b in itertools.combinations(said, 2):
        assert (a - b).abs().max() > 1e-3
    assert torch.equal(net(M, T), said[3])


def test_a_net_without_classes_takes_no_label():
    with pytest.raises(ValueError, match="built without classes"):
        nets.MLP(4, 2)(M, T, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(("H", "W"), [(8, 8), (5, 11), (1, 3)])
def test_unet_pads_any_size_with_zeros_and_crops(H, W):
    net = shaken(nets.UNet(6, 3, 8, mult=(1, 2, 2)))
    m = torch.randn(3, 6, H, W)
    padded = torch.zeros(3, 6, 4 * math.ceil(H / 4), 4 * math.ceil(W / 4))
    padded[..., :H, :W] = m
    assert net(m, T).shape == (3, 3, H, W)
    assert (net(m, T) - net(padded, T)[..., :H, :W]).abs().max() < 1e-4


def test_the_largest_divisor_is_the_one_that_a_search_finds():
    for number, most in itertools.product(range(1, 40), range(1, 40)):
        divisors = [d for d in range(1, most + 1) if number % d == 0]
        assert nets.largest_divisor(number, most) == max(divisors)


@pytest.mark.parametrize("order", range(1, 9))
def test_times_of_a_paper_net_have_different_embeddings(order):
    """The data's time is the process's knowledge: `last` of orders 7 and 8 rounds to 1."""
    config = train.Config(method="hold", order=order, target="noise")
    _, _, net = train.build(config, FACTS)
    early, late = net.time(torch.tensor([0.8, 1.2]))
    assert (early - late).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------
# What a run is built of


@pytest.mark.parametrize(
    ("side", "device", "low", "high"),
    [(16, "cpu", 0.5, 2), (28, "cpu", 0.5, 2), (64, "cpu", 0.5, 2), (32, "cuda", 35, 60)],
)
def test_a_cpu_gets_a_million_weights_and_a_gpu_the_usual_number(side, device, low, high):
    config = replace(train.Config(), **train.preset_for((3, side, side), device))
    with torch.device("meta"):
        _, _, net = train.build(config, FACTS | dict(shape=[3, side, side]))
    assert low < sum(p.numel() for p in net.parameters()) / 1e6 < high


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 12, 9)])
def test_small_data_have_the_same_preset_everywhere(shape):
    assert train.preset_for(shape, "cpu") == train.preset_for(shape, "cuda")


def test_the_std_of_nearly_black_pictures_is_held_within_what_a_process_takes():
    _, process, _ = train.build(train.Config(), FACTS | dict(std=0.01))
    assert process.sigma_data == 0.1


def test_points_have_noise_levels_of_their_own_which_the_checkpoint_keeps(toy):
    assert read(toy)["data"]["noise"] == (-1.2, 1.2)
    _, process, _ = train.build(train.Config(), run(POINTS)["data"])
    assert (process.noise_mean, process.noise_std) == train.POINTS_NOISE


def test_a_third_method_is_trained_and_sampled_once_it_stands_in_METHODS(monkeypatch):
    import sample

    monkeypatch.setitem(train.METHODS, "flow", (agm_ref, flow_matching(agm_ref)))
    run(f"{POINTS} --method flow")
    sample.main("--ckpt run --nfe 3 --n 5".split())
    assert np.load("run/samples.npz")["arr_0"].shape == (5, 2)


def test_an_error_in_an_edited_network_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(nets.UNet, "forward", lambda net, m, t, label=None: net.first(m[:, :0]))
    with pytest.raises(RuntimeError, match="channels"):
        run(TOY)


def test_a_net_that_was_edited_after_its_training_keeps_its_traceback(copied, monkeypatch):
    monkeypatch.setattr(nets, "UNet", Mock(return_value=torch.nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match="Missing key"):
        run("--resume --steps 7")


# -------------------------------------------------------------------------------------------------
# A run and its log


def test_the_log_repeats_the_terminal_and_greps(capsys):
    run(TOY)
    said = capsys.readouterr().out
    assert said == log_of()
    line = r"\nstep 3 loss \S+ grad \S+ it/s \S+ images/s \S+ minutes left \d+\.\d\n"
    assert re.search(line, said)


def test_the_logged_held_out_loss_is_that_of_the_saved_average(toy):
    ckpt = train.load_checkpoint(toy)
    again = train.prepare(ckpt["config"], ckpt["data"], ckpt, torch.device("cpu"))
    found = train.held_out_loss(again, data.load("digits"))
    assert f"held-out {found:.5f}" in log_of(toy)


def test_a_picture_comes_early_and_with_every_save(toy):
    assert sorted(p.name[-5] for p in toy.glob("step-*.png")) == ["1", "3", "6"]


def test_the_bend_of_the_grid_is_kept_with_the_last_checkpoint(toy):
    bend = read(toy)["bend"]
    assert len(bend["lam"]) == len(bend["size"]) > 30


def test_data_with_classes_say_so_where_none_are_learned():
    run(TOY)
    assert "--classes would learn the 10 classes" in log_of()


def test_a_warning_about_the_data_stands_in_the_log():
    np.save("uneven.npy", np.random.default_rng(0).normal(size=(60, 2)) * [1, 1000])
    run(f"{TOY} --data uneven.npy")
    assert re.search("^warning: .*uneven.npy", log_of(), re.M)


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        (100, 0, [5, 17, 34, 50, 67, 84, 100]),
        (1002, 0, [51, 167, 334, 501, 668, 835, 1002]),
        (49, 7, [3, 7, 14, 21, 28, 35, 42, 49]),
        (10, 3, [1, 3, 6, 9, 10]),
    ],
)
def test_saves_come_in_sixths_or_every_so_many_updates_and_once_early(steps, every, expected):
    config = train.Config(steps=steps, save_every=every)
    saves = []
    for step in range(1, steps + 1):
        if train.is_save_between((step - 1) / steps, step / steps, config):
            saves.append(step)
    assert saves == expected


@pytest.fixture
def clock(monkeypatch):
    """Time that only batches take, one second each."""
    now = itertools.count(1000)
    seconds = [next(now)]
    on_batch(monkeypatch, lambda number: seconds.append(next(now)))
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(seconds[-1]))


def test_minutes_end_a_run_by_the_clock_with_its_rate_at_zero(clock):
    ckpt = run(f"{POINTS} --minutes 1")
    assert ckpt["step"] == 60
    rate = ckpt["optimizer"]["param_groups"][0]["lr"]
    assert 0 < rate < 1e-3 * (math.pi / 60) ** 2  # the cosine one update before its end
    assert log_of().count("held-out") == 7


@pytest.mark.parametrize(("options", "step"), [("", 60), ("--minutes 0.5", 90), ("--steps 70", 70)])
def test_a_run_of_minutes_goes_on_by_minutes_or_by_steps(options, step, clock):
    run(f"{POINTS} --steps 70 --minutes 1")
    assert run(f"--resume {options}")["step"] == step


def test_a_stopped_run_of_minutes_does_the_rest_of_them(clock, monkeypatch):
    with monkeypatch.context() as patch:
        send_in_batch(patch, signal.SIGTERM, 20)
        assert status_of(f"{POINTS} --minutes 1") == 143
    assert run("--resume")["step"] == 60


def test_minutes_left_are_those_of_the_last_minute(monkeypatch):
    now = 0.0
    monkeypatch.setattr(train.time, "perf_counter", lambda: now)
    pace = train.Pace(train.Config(steps=1000), 0, 0.0)
    for step in [*range(1, 101), *range(110, 1110, 10)]:  # slow for 100 s, then fast for 100 s
        now += 1
        speed, _ = pace.look(step)
    assert abs(speed - 10) < 0.5


def test_a_clock_that_stands_still_divides_nothing_by_zero(monkeypatch):
    monkeypatch.setattr(train.time, "perf_counter", lambda: 5.0)
    assert run(POINTS)["step"] == 6


def test_the_rate_warms_up_and_falls_as_a_cosine(monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def recorded(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    run(f"{POINTS} --lr 0.1 --warmup 4")
    cosine = [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]
    assert np.abs(rates - 0.1 * np.multiply(cosine, [0.25, 0.5, 0.75, 1, 1, 1])).max() < 1e-8


def test_the_average_keeps_its_share_and_takes_the_rest_of_the_net():
    average = torch.nn.Linear(2, 2)
    net = torch.nn.Linear(2, 2)
    expected = 0.9 * average.weight + 0.1 * net.weight
    train.follow(average, net, 0.9)
    assert (average.weight - expected).abs().max() < 1e-6


def test_a_young_average_forgets_soon(monkeypatch):
    follow = Mock()
    monkeypatch.setattr(train, "follow", follow)
    run(f"{POINTS} --ema 0.3")
    decays = [call.args[2] for call in follow.call_args_list]
    assert decays == [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3]


def test_one_label_in_ten_is_forgotten():
    torch.manual_seed(0)
    label = torch.arange(10_000) % 7
    kept = train.forget_some(label, 7)
    forgotten = kept == 7
    assert torch.equal(kept[~forgotten], label[~forgotten])
    assert abs(float(forgotten.double().mean()) - 0.1) < 0.012  # four standard errors


def test_each_update_of_each_process_draws_its_own_noise(monkeypatch):
    seeds = []
    on_batch(monkeypatch, lambda number: seeds.append(torch.initial_seed()))
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        begin(POINTS, f"run{rank}")
    assert len(set(seeds)) == 12


def test_a_run_without_held_out_samples_has_no_held_out_loss():
    np.save("few.npy", np.random.default_rng(0).normal(size=(4, 2)))
    assert math.isnan(run(f"{TOY} --data few.npy")["held_out"])


def test_held_out_losses_do_not_depend_on_the_batch(monkeypatch):
    sizes = []
    loss = agm_ref.loss

    def counted(process, net, x, label=None):
        sizes.append(len(x))
        return loss(process, net, x, label)

    monkeypatch.setattr(agm_ref, "loss", counted)
    run(f"{POINTS} --batch 2 --steps 1")
    assert sizes == [2, 512]


def test_help_takes_a_folder_with_a_per_cent_sign(toy):
    shutil.copytree(toy, "50%")
    assert status_of("--resume --help", "50%") == 0


# -------------------------------------------------------------------------------------------------
# Stopped and resumed


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_lets_the_update_and_its_save_end(number, monkeypatch):
    send_in_batch(monkeypatch, number, 2)
    assert status_of(f"{POINTS} --save-every 99") == 128 + number
    assert read("run")["step"] == 2
    assert "stopped at step 2, which is saved: --resume --out 'run'" in log_of()


@pytest.mark.parametrize(
    "options",
    [
        "--method hold --target noise --classes --accum 2 --dropout 0.1",
        "--data moons --target sde",
        "--mult 1 --flip --amp bf16",
    ],
)
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(options, monkeypatch):
    options = f"{TOY} --save-every 99 {options}"
    run(f"{options} --log-every 4", "whole")
    with monkeypatch.context() as patch:
        send_in_batch(patch, signal.SIGTERM, 2)
        assert status_of(options, "cut") == 143
    run("--resume", "cut")
    assert_same_run("whole", "cut")


def test_a_killed_run_goes_on_from_its_last_save():
    program = "import test_train as t; t.killed_in_its_fifth_update()"
    done = subprocess.run([sys.executable, "-c", program], env=CHILD, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert read("cut")["step"] == 3
    run("--resume", "cut")
    run(POINTS, "whole")
    assert_same_run("whole", "cut")


def killed_in_its_fifth_update():
    torch.set_num_threads(1)
    train.draw_picture = Mock()
    with pytest.MonkeyPatch.context() as patch:
        send_in_batch(patch, signal.SIGKILL, 5)
        run(POINTS, "cut")


@pytest.mark.parametrize("end", ["success", "error", "stop"])
def test_signal_handlers_are_as_before_whatever_ends_a_run(end, monkeypatch):
    handlers = [signal.getsignal(number) for number in SIGNALS]
    if end == "error":
        monkeypatch.setattr(agm_ref, "loss", Mock(side_effect=MemoryError))
    if end == "stop":
        send_in_batch(monkeypatch, signal.SIGINT, 2)
    assert (status_of(POINTS) == 0) == (end == "success")
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_a_signal_that_was_ignored_stays_ignored(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    send_in_batch(monkeypatch, signal.SIGHUP, 2)
    assert run(POINTS)["step"] == 6


def test_a_thread_trains():
    thread = threading.Thread(target=run, args=[POINTS])
    thread.start()
    thread.join()
    assert read("run")["step"] == 6


def test_a_finished_run_says_what_makes_it_longer(copied):
    run("--resume")
    assert "nothing is left to do: --resume with a larger --steps" in log_of()


@pytest.mark.parametrize(
    ("option", "said"),
    [("--width=9", "the run has --width 8: leave it out"), ("--no-classes", "--classes True")],
)
def test_resume_refuses_what_it_cannot_change(option, said, copied):
    before = snapshot()
    assert said in refused(f"--resume --out run {option}")
    assert snapshot() == before


def test_every_option_of_before_that_may_not_change_still_may_not():
    fixed = {f.name for f in fields(train.Config) if not f.metadata["may_change"]}
    assert fixed == set(
        "method order target size batch lr warmup clip ema width mult blocks attention dropout "
        "classes flip seed".split()
    )


def test_resume_takes_the_newest_run(toy):
    for name in ("new", "old"):
        shutil.copytree(toy, f"runs/{name}")
    os.utime("runs/old/ckpt.pt", (0, 0))
    train.main("--resume --steps 7".split())
    assert read("runs/new")["step"] == 7
    assert read("runs/old")["step"] == 6


def test_resume_finds_its_data_from_any_folder(monkeypatch):
    numbers("mine.npy")
    run(f"{TOY} --data mine.npy")
    Path("deep").mkdir()
    monkeypatch.chdir("deep")
    assert run("--resume --steps 7", "../run")["step"] == 7


def test_resume_knows_its_data_by_their_content():
    numbers("mine.npy", seed=0)
    numbers("other.npy", seed=1)
    run(f"{TOY} --data mine.npy")
    assert "not the run's data" in refused("--resume --out run --steps 7 --data other.npy")
    Path("mine.npy").rename("moved.npy")
    assert "name the data anew by --data" in refused("--resume --out run --steps 7")
    assert run("--resume --steps 7 --data moved.npy")["step"] == 7


# -------------------------------------------------------------------------------------------------
# Several processes


def shared(out, accum):
    """A run whose update sees the same eight samples, however many processes and parts share
    them."""
    count = itertools.count()
    build = train.build

    def batch(dataset, n):
        first = (next(count) * train.WORLD + train.RANK) * n
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
        begin(f"{TOY} --steps 1 --batch 8 --warmup 0 --clip 1e6 --accum {accum}", out)


def in_each_of_two_processes():
    """What torchrun runs for the tests below."""
    torch.set_num_threads(1)
    train.draw_picture = Mock()
    shared("both", 2)
    train.distributed.init_process_group = Mock()  # once is enough
    begin(POINTS, "whole")
    with pytest.MonkeyPatch.context() as patch:
        send_in_batch(patch, signal.SIGTERM, 2 if train.RANK else 0)
        status_of(f"{POINTS} --save-every 99", "cut")
    train.distributed.barrier()
    begin("--resume", "cut")
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
    argv = [sys.executable, str(ROOT / "train.py"), *POINTS.split(), "--steps", "1"]
    done = subprocess.run(argv, env=CHILD | left, capture_output=True, text=True)
    assert done.returncode == 0
    assert "step 1 " in done.stdout
    assert Path("runs/agm-moons/ckpt.pt").exists()


# -------------------------------------------------------------------------------------------------
# What a user meets is one line, and loses nothing


MISTAKES = {
    "--data digit": "did you mean digits",
    "--data moons --classes": "no labels",
    "--batch 16 --accum 3": "--batch must be a multiple",
    "--target noise": "--target of agm must be one of data, ode, sde",
    "--attention 2": "--attention names levels of --mult",
    "--mult": "--mult needs one",
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
    "--out old": "old has a run: --resume",
    "--out taken/file/deeper": "cannot make taken/file/deeper",
    "--resume": "no run under runs/ yet: train first",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(options):
    for name in ("taken/file", "old/ckpt.pt"):
        Path(name).parent.mkdir()
        Path(name).write_text("mine")
    before = snapshot()
    assert MISTAKES[options] in refused(f"{TOY} {options}")
    assert snapshot() == before


def test_runs_started_at_once_take_different_folders():
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: train.new_folder(train.Config()).name, range(8)))
    assert sorted(found) == ["agm-digits", *(f"agm-digits-{i}" for i in range(2, 9))]


@pytest.mark.parametrize("name", ["ascii", "full", "closed"])
def test_a_lost_or_narrow_terminal_costs_nothing(name, monkeypatch):
    numbers("данные.npy")
    streams = dict(
        full=Mock(write=Mock(side_effect=FULL)),
        ascii=io.TextIOWrapper(io.BytesIO(), "ascii"),
        closed=None,
    )
    monkeypatch.setattr(sys, "stdout", streams[name])
    train.main([*TOY.split(), "--data", "данные.npy"])
    assert "данные" in log_of("runs/agm-данные")


def test_a_full_disk_keeps_the_old_checkpoint(copied, monkeypatch):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=FULL))
    assert "cannot write run/ckpt.pt" in refused("--resume --out run --steps 7")
    assert read("run")["step"] == 6
    assert not list(Path("run").glob("*.tmp"))


def test_a_full_log_costs_nothing():
    train.Log(Path("/dev/full")).say("a line")


@pytest.mark.parametrize(
    ("calls", "said"),
    [(4, "lower --lr or --clip; run/ckpt.pt has the last good weights"), (0, "nothing was saved")],
)
def test_divergence_keeps_the_last_good_weights_and_says_where(calls, said, monkeypatch):
    loss = agm_ref.loss
    count = itertools.count()
    monkeypatch.setattr(
        agm_ref, "loss", lambda *a: loss(*a) * (1 if next(count) < calls else math.nan)
    )
    assert said in refused(f"{POINTS} --log-every 99 --out run")
    if calls:
        assert train.load_checkpoint("run")["step"] < 6


BROKEN = {
    "another program": lambda c: c.pop("config"),
    "an older version": lambda c: c["data"].pop("window"),
    "a newer version": lambda c: c.update(layout=99),
    "weights are not finite": lambda c: next(iter(c["ema"].values())).fill_(math.nan),
}


@pytest.mark.parametrize("words", BROKEN)
def test_what_is_wrong_with_a_checkpoint_is_said(words, copied):
    content = read("run")
    BROKEN[words](content)
    torch.save(content, "run/ckpt.pt")
    assert words in refused("--resume --out run")


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text"])
def test_a_damaged_checkpoint_is_one_line(damage, copied):
    path = Path("run/ckpt.pt")
    content = bytearray(path.read_bytes())
    weights = read("run")["ema"]["first.weight"].numpy().tobytes()
    content[content.find(weights) + 9] ^= 1
    damaged = dict(cut=content[:-999], bit=content, empty=b"", text=b"hello")
    path.write_bytes(damaged[damage])
    assert "cannot use run/ckpt.pt as a checkpoint" in refused("--resume --out run")


def test_a_checkpoint_of_layout_1_goes_on_with_its_own_noise_levels():
    content = run(POINTS)
    for key in ("layout", "bend", "minutes"):
        content.pop(key)
    content["data"].pop("noise")
    torch.save(content, "run/ckpt.pt")
    content = run("--resume --steps 7")
    assert train.build(train.Config(), content["data"])[1].noise_mean == -1.2


def test_no_memory_is_told_by_the_type_of_the_error_and_not_by_a_word():
    assert command.is_of_memory(MemoryError())
    assert command.is_of_memory(torch.OutOfMemoryError())
    assert not command.is_of_memory(RuntimeError("the network lost its memory"))
    with pytest.raises(RuntimeError) as no_memory:
        torch.empty(2**60)
    assert command.is_of_memory(no_memory.value)


def test_no_memory_is_one_line(monkeypatch):
    monkeypatch.setattr(agm_ref, "loss", Mock(side_effect=MemoryError))
    assert "out of memory: lower --batch" in refused(POINTS)


def test_no_compiler_is_one_line(monkeypatch):
    compile = torch.compile
    no_compiler = Mock(side_effect=RuntimeError("no C++ compiler"))
    monkeypatch.setattr(torch, "compile", lambda net: compile(net, backend=no_compiler))
    assert "leave out --compile" in refused(f"{POINTS} --compile")


def test_a_users_error_keeps_pythons_own_way_of_warning():
    former = warnings.showwarning
    with pytest.raises(SystemExit):
        command.run(Mock(side_effect=UserError("no")))
    assert warnings.showwarning is former


# -------------------------------------------------------------------------------------------------
# Imports point down

LEVELS = [  # each imports of the levels above it alone
    {"agm_ref", "hold_ref", "nets", "formats", "extras.clock"},
    {"data"},
    {"train"},
    {"sample"},
    {"extras.complete", "extras.likelihood"},
]
FILES = [*ROOT.glob("*.py"), *ROOT.glob("formats/*.py"), *ROOT.glob("extras/*.py")]
FILES.remove(ROOT / "test_ref.py")


def imports_of(path):
    """Modules that a file imports, also inside functions; `from a import b` is a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def level_of(name):
    """The level of a module or of a name in it, -1 for other people's."""
    for level, modules in enumerate(LEVELS):
        if any(f"{name}.".startswith(f"{module}.") for module in modules):
            return level
    return -1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_point_down(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for name in imports_of(path):
        is_beside = own.startswith("formats.") and name.startswith("formats.")
        assert is_beside or level_of(name) < level_of(own), f"{own} imports {name}"
        assert name.split(".")[0] not in ("tests", "bench")
