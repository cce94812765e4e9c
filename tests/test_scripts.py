"""nets.py, train.py and sample.py at toy size: what a run keeps and draws, and what it says when something is wrong."""

import io
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_data import damaged, read_png, worst

import agm_ref
import data
import nets
import sample
import train

ROOT = Path(train.__file__).parent
TOY = "--steps 6 --batch 16 --width 8 --blocks 1 --log-every 1 --save-every 3 --device cpu".split()
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder; one thread, as the child processes have; signals as a terminal has them; no pictures."""
    threads, former = torch.get_num_threads(), [signal.getsignal(number) for number in SIGNALS]
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw_picture", Mock())
    yield
    torch.set_num_threads(threads)
    list(map(signal.signal, SIGNALS, former))


def shaken(net):
    """The net with its zero layers filled, so that every path counts."""
    generator = torch.Generator().manual_seed(0)
    for p in net.requires_grad_(False).parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net.eval()


def checkpoint(out, **config):
    """A checkpoint of shaken weights, as if trained."""
    config = train.Config(**{"width": 8, "blocks": 1} | config)
    facts = data.load(config.data).summary()
    weights = shaken(train.build(config, facts)[2]).state_dict()
    Path(out).mkdir()
    content = dict(config=asdict(config), data=facts, net=weights, ema=weights, optimizer={}, step=1)
    torch.save(content, f"{out}/ckpt.pt")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of a toy run, for tests that only read it; its average is shaken."""
    out = tmp_path_factory.mktemp("toy") / "run"
    train.main([*TOY, "--classes", "--out", str(out)])
    altered(out, lambda c: c["ema"].update(shaken(train.build(train.Config(**c["config"]), c["data"])[2]).state_dict()))
    return out


def read(out):
    return torch.load(f"{out}/ckpt.pt", weights_only=True)


def altered(out, change, source=None):
    """Writes the checkpoint, or that of another run, anew after change(its content)."""
    content = read(source or out)
    change(content)
    torch.save(content, f"{out}/ckpt.pt")


def arrays(out):
    return dict(np.load(f"{out}/samples.npz"))


def pixels(path):
    return read_png(Path(path).read_bytes())[0][0]


def snapshot(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def same_run(a, b):
    """Whether two runs have come to the same checkpoint, to the last bit."""
    for key in ("net", "ema", "optimizer", "step", "held_out"):
        torch.testing.assert_close(read(a)[key], read(b)[key], rtol=0, atol=0)
    return True


def refused(script, *argv):
    """The one line of a command that is refused."""
    with pytest.raises(SystemExit, match=r"^error: [^\n]+$") as stop:
        script.main(list(argv))
    return stop.value.code


def interrupted(script, number, call, *argv, place=None):
    """The exit status of a command that gets the signal at the call-th call of place, by default for a batch."""
    if number == signal.SIGKILL and place is None:
        command = f"t.{script.__name__}, {int(number)}, {call}, *{argv}, place=(t.data.Dataset, 'batch')"
        program = f"import test_scripts as t; t.interrupted({command})"
        return 128 - subprocess.run([sys.executable, "-c", program], env=ENV, capture_output=True).returncode
    owner, name = place or ((data.Dataset, "batch") if script is train else (sample.Noise, "prior"))
    calls, original = itertools.count(1), getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, lambda *a: (next(calls) == call and os.kill(os.getpid(), number), original(*a))[1])
        try:
            return script.main(list(argv))
        except SystemExit as stop:
            return stop.code


def test_untrained_nets_predict_zero_each_class_is_another_and_guidance_goes_beyond():
    m, t, net = torch.randn(3, 4), torch.full((3,), 0.5), shaken(nets.MLP(4, 2, width=16, depth=2, classes=3))
    assert not nets.MLP(4, 2)(m, t).any() and not nets.UNet(2, 1, width=8)(torch.randn(3, 2, 8, 8), t).any()
    by_class = [net(m, t, torch.full((3,), c)) for c in range(4)]
    assert all(worst(a, b) > 1e-3 for a, b in itertools.combinations(by_class, 2))
    assert worst(by_class[3], net(m, t)) == 0  # the last row is "no class"
    for guidance, factor in ((0, 2), (1, 5), (0.5, 3.5), (3, 11)):
        guided = sample.guide(lambda y, t, label=None: y * (2 if label is None else 5), guidance)
        assert (guided(torch.ones(3), t, t) == factor).all() and (guided(torch.ones(3), t) == 2).all()


@pytest.mark.parametrize("size", [(8, 8), (5, 11), (1, 3)])
def test_unet_pads_any_size_and_crops(size):
    net, m, t = shaken(nets.UNet(6, 3, 8, mult=(1, 2, 2))), torch.randn(2, 6, *size), torch.tensor([0.2, 0.7])
    padded = torch.zeros(2, 6, *(-(-s // 4) * 4 for s in size))
    padded[..., : size[0], : size[1]] = m
    assert net(m, t).shape == (2, 3, *size)
    assert worst(net(m, t), net(padded, t)[..., : size[0], : size[1]]) < 1e-4


def test_presets_follow_the_shape_and_the_device():
    def parameters(shape, device):
        with torch.device("meta"):
            config = replace(train.Config(), **train.preset_for(shape, device))
            net = train.build(config, dict(shape=list(shape), std=0.5, bound=1.0, labels=0))[2]
        return sum(p.numel() for p in net.parameters()) / 1e6

    assert all(0.5 < parameters((3, side, side), "cpu") < 2 for side in (16, 28, 32, 48, 64))
    assert 35 < parameters((3, 32, 32), "cuda") < 60  # as is usual for CIFAR-10
    for shape in ((2,), (1, 8, 8), (3, 12, 9)):
        assert train.preset_for(shape, "cpu") == train.preset_for(shape, "cuda") and parameters(shape, "cpu") < 1


def test_a_runs_log_pictures_and_held_out_loss(toy, capsys, monkeypatch):
    np.save("mine.npy", np.random.default_rng(0).integers(0, 256, (40, 13, 13), np.uint8))
    monkeypatch.setattr(sys, "argv", [os.path.relpath(ROOT / "train.py")])
    options = "--data mine.npy --mult 1 --log-every 99 --steps 12 --save-every 6 --lr 1e-2 --warmup 0"
    train.main([*TOY, *options.split()])
    said, out = capsys.readouterr().out, Path("runs/agm-mine")
    assert said == (out / "log.txt").read_text() and re.search("on a GPU: .*width 64.*\n.*\n.*steps 0-12\n", said)
    assert re.search(r"\nstep 3 loss \S+ grad \S+ it/s \S+ images/s \S+ minutes left \d+\.\d\n", said)
    command = shlex.split(said.splitlines()[-1])[-4:]
    assert command == ["python", os.path.relpath(ROOT / "sample.py"), "--ckpt", str(out)]
    (sixth, a), (last, b) = re.findall(r"step (\d+) loss .* held-out (\S+) minutes left", said)
    ckpt = train.load_checkpoint(out)
    method, process, net = train.build(ckpt["config"], ckpt["data"])
    net.load_state_dict(ckpt["ema"])
    found = train.held_out_loss(ckpt["config"], method, process, net.eval(), data.load("mine.npy"), 16)
    assert (sixth, last) == ("6", "12") and a != b == f"{found:.5f}" and found == ckpt["held_out"]
    assert all(pixels(toy / f"step-000000{i}.png").shape == (568, 568) for i in (1, 3, 6))  # the first one early


def test_minutes_set_the_steps_a_resumed_run_keeps_them_and_days_are_said_once(monkeypatch, capsys):
    now, batch = [0.0], data.Dataset.batch  # each batch takes a second
    monkeypatch.setattr(train, "time", Mock(time=lambda: now[-1], monotonic=lambda: now[-1]))
    monkeypatch.setattr(data.Dataset, "batch", lambda *a: (now.append(now[-1] + 1), batch(*a))[1])
    options = [*TOY, "--data", "moons", "--steps", "864000", "--save-every", "99"]
    assert interrupted(train, signal.SIGINT, 8, *options, "--out", "long") == 130
    assert len(re.findall("that is 10.0 days: lower --steps", capsys.readouterr().out)) == 1
    train.main([*options, "--minutes", "0.45", "--out", "whole"])
    assert interrupted(train, signal.SIGTERM, 23, *options, "--minutes", "0.45", "--out", "cut") == 143
    assert read("whole")["step"] == 27 == read("cut")["config"]["steps"] and read("cut")["step"] == 23
    train.main(["--resume", "--out", "cut"])
    assert same_run("whole", "cut")


@pytest.mark.parametrize(("number", "options"), [
    (signal.SIGKILL, "--method hold --target noise --classes --accum 2 --dropout 0.1 --save-every 3"),
    (signal.SIGINT, "--data moons --target sde"),
    (signal.SIGTERM, "--mult 1 --flip --amp bf16"),
])  # fmt: skip
def test_stopped_and_resumed_is_uninterrupted_to_the_last_bit(number, options, capsys):
    options = [*TOY, "--save-every", "99", *options.split()]
    train.main([*options, "--save-every", "99", "--log-every", "4", "--out", "whole"])
    if number == signal.SIGKILL:
        assert interrupted(train, number, 9, *options, "--out", "cut") == 137 and read("cut")["step"] == 3
    else:  # before the first save: the step ends, and is saved
        assert interrupted(train, number, 2, *options, "--out", "cut") == SIGNALS[number] and read("cut")["step"] == 2
        assert re.search("stopped at step 2, which is saved: .*--resume --out '?cut", capsys.readouterr().out)
    train.main(["--resume", "--out", "cut"])
    mean = read("cut")["data"]["mean"]
    assert same_run("whole", "cut") and ("--flip" not in options or worst(mean, mean.flip(-1)) < 1e-6)


def shared(out, accum):
    """A run whose updates have the same eight samples, however many processes and parts share them."""
    calls, build = itertools.count(), train.build

    def batch(dataset, n):
        step, i = divmod(next(calls), accum)
        first = 8 * step + (i * train.WORLD + train.RANK) * n
        return dataset.train[first : first + n] / 127.5 - 1, None

    def loss(process, net, x, label=None):  # draws nothing
        return (net(x, x.mean((1, 2, 3)).sigmoid()) - x.flip(-1)).square().mean()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build", lambda *a: (*build(*a)[:2], shaken(build(*a)[2]).requires_grad_()))
        patch.setattr(data.Dataset, "batch", batch)
        patch.setattr(agm_ref, "loss", loss)
        train.main([*TOY, *f"--steps 3 --batch 8 --warmup 0 --clip 99 --accum {accum} --out {out}".split()])


def in_each_of_two_processes():
    """What torchrun runs for the test below: some updates; a run; the same run stopped by a signal to one process."""
    train.draw_picture, options = Mock(), [*TOY, *"--steps 5 --dropout 0.1 --out".split()]
    shared("both", 2)
    train.dist.init_process_group = Mock()
    train.main([*options, "whole"])
    interrupted(train, signal.SIGTERM if train.RANK else 0, 2, *options, "cut", "--save-every", "99")
    train.dist.barrier()
    train.main(["--resume", "--out", "cut"])


def test_an_update_is_the_same_however_many_share_it_and_processes_stop_together():
    Path("both.py").write_text("import test_scripts\ntest_scripts.in_each_of_two_processes()")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "both.py"]
    with open("said", "w") as file:  # a pipe could outlive what torchrun kills
        done = subprocess.run(command, env=ENV, stdout=file, stderr=file)
    said = Path("said").read_text()
    assert done.returncode == 0 and said.count("stopped at step 2, which is saved") == 1, said
    assert same_run("whole", "cut")
    shared("one", 1)
    shared("parts", 4)
    for one, other in ((read("one"), read(out)) for out in ("parts", "both")):
        for i, (key, weight) in enumerate(one["net"].items()):
            a, b = (run["optimizer"]["state"][i] for run in (one, other))
            apart = (weight - other["net"][key])[a["exp_avg_sq"].sqrt() > 1e-5]  # AdamW divides by |gradient|
            assert worst(a["exp_avg"], b["exp_avg"]) < 1e-6 and all(apart.abs() < 2e-5)
    assert max(state["exp_avg"].abs().max() for state in one["optimizer"]["state"].values()) > 1e-2


def test_runs_started_at_once_take_different_folders():
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda _: train.new_folder(train.Config()), range(8))
    assert sorted(p.name for p in found) == ["agm-digits", *(f"agm-digits-{i}" for i in range(2, 9))]


@pytest.mark.parametrize("name", ["ascii", "full", "closed"])
def test_a_lost_or_narrow_terminal_costs_nothing(name, monkeypatch):
    np.savez("данные.npz", x=np.random.default_rng(0).normal(size=(60, 2)), labels=np.arange(60) % 2)
    full, narrow = Mock(write=Mock(side_effect=OSError(28, "No space"))), io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", {"ascii": narrow, "full": full, "closed": None}[name])
    train.main([*TOY, "--data", "данные.npz", "--classes"])
    run, draw = Path("runs/agm-данные"), "--class пёс --n 5 --nfe 2".split()
    assert re.search("данные(.|\n)*\nstep 6 ", (run / "log.txt").read_text("utf-8"))
    altered(run, lambda c: c["data"].update(names=["кот", "пёс"]))
    status = interrupted(sample, 0, 0, *draw)
    assert status is None or (name == "full" and status == "error: [Errno 28] No space")
    assert len(arrays(run)["arr_0"]) == 5 and list(arrays(run)["names"]) == ["кот", "пёс"]


def test_a_full_disk_keeps_the_old_files_and_a_lost_log_or_picture_costs_nothing_else(toy, monkeypatch, capsys):
    shutil.copytree(toy, "run")
    sample.main("--ckpt run --n 2 --nfe 2".split())
    Path("run/log.txt").unlink()
    Path("run/log.txt").symlink_to("/dev/full")
    before = snapshot(".")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
        assert "cannot write run/samples.npz" in refused(sample, *"--ckpt run --n 2 --nfe 2".split())
        assert "cannot write run/ckpt.pt" in refused(train, *"--resume --out run --steps 7".split())
    assert snapshot(".") == before
    train.main("--resume --out run --steps 7".split())
    for n, error in enumerate((MemoryError(), data.UserError("disk full"), ValueError("too wide")), 3):
        monkeypatch.setattr(data, "png", Mock(side_effect=error))
        sample.main(["--ckpt", "run", "--n", str(n), "--nfe", "2"])
        assert "no picture: " in capsys.readouterr().out and len(arrays("run")["arr_0"]) == n


def test_what_is_not_finite_is_neither_saved_nor_drawn(toy, monkeypatch):
    loss, factors = agm_ref.loss, iter([1, 1, 1, *[1] * 3, math.nan, 1])  # three for what is held out
    with monkeypatch.context() as patch:
        patch.setattr(agm_ref, "loss", lambda *a: loss(*a) * next(factors, 1))
        assert "step 6: lower --lr" in refused(train, *TOY, "--batch", "128", "--log-every", "99", "--out", "run")
    assert train.load_checkpoint("run")["step"] == 3
    monkeypatch.setitem(agm_ref.SAMPLERS, "ode", lambda process, predict, m, nfe: m[:, :1] * math.nan)
    assert "not finite" in refused(sample, "--ckpt", str(toy), "--out", "here") and not os.listdir("here")


def test_a_damaged_checkpoint_is_one_line(toy):
    place = (toy / "ckpt.pt").read_bytes().find(read(toy)["ema"]["first.weight"].numpy().tobytes()) + 9
    content = [lambda c, k=k: c.pop(k) for k in ("config", "data", "net", "ema", "optimizer", "step")]
    content += [lambda c, k=k: c["config"].update({k: 99}) for k in ("colour", "order", "width")]
    content += [lambda c, k=k: next(iter(c[k].values())).fill_(math.nan) for k in ("net", "ema")]
    shutil.copytree(toy, "run")
    for _ in itertools.chain(damaged("run/ckpt.pt", [place]), (altered("run", change, toy) for change in content)):
        before = snapshot("run")
        assert "run/ckpt.pt" in refused(train, *"--resume --steps 7 --out run".split())
        assert "run/ckpt.pt" in refused(sample, "--ckpt", "run") and snapshot("run") == before


def test_resume_takes_what_may_change_and_refuses_the_rest(toy):
    shutil.copytree(toy, "runs/a")
    os.utime(shutil.copytree(toy, "runs/old") + "/ckpt.pt", (0, 0))
    before = snapshot("runs")
    for f in fields(train.Config):
        old, flag, m = read(toy)["config"][f.name], f.name.replace("_", "-"), f.metadata
        if not m["may_change"]:
            other = next((str(v) for v in m["choices"] or (m["low"], m["high"]) if v != old), None)
            argv = [f"--no-{flag}" if old else f"--{flag}"] if m["kind"] is bool else [f"--{flag}", other]
            assert f"the run has --{flag} {old}: leave it out" in refused(train, "--resume", *argv)
    assert snapshot("runs") == before
    train.main("--resume --steps 7 --accum 2 --log-every 2 --save-every 5 --device cpu --amp bf16".split())
    assert read("runs/a")["step"] == 7 and read("runs/a")["config"]["amp"] == "bf16"


def test_resume_finds_the_data_from_anywhere_and_knows_them_by_their_content(monkeypatch):
    for seed in (0, 1):
        np.save(f"{seed}.npy", 5 + np.random.default_rng(seed).normal(size=(200, 2)))
    train.main([*TOY, "--data", "0.npy", "--out", "run"])
    Path("deep").mkdir()
    monkeypatch.chdir("deep")
    train.main("--resume --out ../run/ckpt.pt --steps 7".split())
    Path("../0.npy").rename("moved.npy")
    before, again = snapshot(".."), "--resume --out ../run --steps 8".split()
    assert re.search(r"0\.npy.*--data|--data.*0\.npy", refused(train, *again))
    for name in ("../1.npy", "digits"):
        assert "not the run's data" in refused(train, *again, "--data", name)
    assert snapshot("..") == before and read("../run")["step"] == 7
    train.main([*again, "--data", "moved.npy"])


@pytest.mark.parametrize(("script", "options"), [(train, train.Config), (sample, sample.Options)])
def test_every_option_refuses_what_is_out_of_its_range(script, options, monkeypatch):
    monkeypatch.setattr(script, script.__name__, Mock())
    for f in fields(options):
        low, high, kind = (f.metadata[key] for key in ("low", "high", "kind"))
        wrong = {bool: ["yes"], int: ["x", "", "1.5", "1e400"], float: ["x", ""], str: []}[kind]
        if low is not None:
            wrong = [*wrong, low - 1, high + 1 if kind is int else 2 * high, *["nan", "inf"] * (kind is float)]
        for value in ["nonsense", ""] if f.metadata["choices"] else wrong:
            flag = "--" + f.name.rstrip("_").replace("_", "-")
            assert flag in refused(script, "--out", "new", f"{flag}={value}")
    assert not os.listdir(".")


MISTAKES = """
train --data digit: did you mean digits
train --data moons --classes: no labels
train --batch 16 --accum 3: --batch 16 must be a multiple
train --out TOY/..: is not empty
train --out TOY: --resume
train --out TOY/ckpt.pt/deeper: ckpt.pt/deeper
sample --ckpt TOY --method hold --sampler em --multistep 2: sampler em has no --multistep
sample --ckpt TOY --guidance 2: --guidance belongs to --class
sample --ckpt TOY --nll --class 3: leave out --class
sample --ckpt TOY --held-out 359 --shrink 2: --held-out must be below 359
sample --ckpt paper --method hold: serves its own process only
sample --ckpt points --png-dir p --n 2: --png-dir p wants images
"""


def test_a_mistake_is_one_line_and_changes_nothing(toy, monkeypatch):
    checkpoint("paper", target="ode")
    checkpoint("points", data="moons")
    before = snapshot("."), snapshot(toy)
    for line in MISTAKES.strip().split("\n"):
        command, words = line.replace("TOY", str(toy)).split(": ")
        script, *argv = command.split()
        said = refused(*((train, *TOY) if script == "train" else (sample, "--out", "new")), *argv)
        assert words in said and (snapshot("."), snapshot(toy)) == before, (line, said)
    assert "runs/" in refused(sample) and "runs/" in refused(train, "--resume")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=Mock(side_effect=RuntimeError("no C++"))))
    assert "leave out --compile" in refused(train, *TOY, *"--data moons --compile --out a".split())
    assert "leave out --compile" in refused(sample, "--ckpt", str(toy), *"--n 2 --out b --compile".split())


@pytest.mark.parametrize("options", [
    "--ckpt TOY --nfe 3",
    "--ckpt TOY --nfe 3 --sampler em --class all --guidance 2 --method hold",
    "--ckpt TOY --nfe 4 --stroke stroke.npy",
    "--ckpt points --nfe 5",
    "--ckpt points --nfe 5 --sampler splitting",
    "--ckpt fields --nfe 3",
])  # fmt: skip
def test_a_sample_depends_on_its_number_alone(toy, options):
    np.save("stroke.npy", np.eye(8, dtype=np.uint8) * 200)
    np.save("fields.npy", np.random.default_rng(0).normal(size=(50, 6, 6, 4)))
    checkpoint("points", data="moons", width=128, blocks=4)
    checkpoint("fields", data="fields.npy")

    def drawn(n, first, more):
        sample.main(f"{options.replace('TOY', str(toy))} --n {n} --first {first} {more} --out here".split())
        return {key: value for key, value in arrays("here").items() if key != "names"}

    n = 1500 if "points" in options else 75
    whole = drawn(n, 0, "--batch 16")
    assert len(np.unique(whole["arr_0"].reshape(n, -1), axis=0)) > 0.99 * n
    for count, first, batch in ((n, 0, 256), (75, 0, 17), (52, 23, 40), (1, 74, 999)):
        for key, value in drawn(count, first, f"--batch {batch}").items():
            assert value.tobytes() == whole[key][first : first + count].tobytes(), (count, first, batch, key)
    assert (drawn(5, 0, "--seed 1")["arr_0"] != whole["arr_0"][:5]).any()


@pytest.mark.parametrize(("number", "place", "call", "options"), [
    (signal.SIGINT, (sample.Noise, "prior"), 3, "--ckpt TOY --class all --guidance 2 --png-dir png"),
    (signal.SIGTERM, (sample.Noise, "prior"), 3, "--ckpt points --sampler em"),
    (signal.SIGTERM, (data, "finish"), 3, "--ckpt TOY --png-dir png"),
])  # fmt: skip
def test_stopped_and_gone_on_with_are_the_samples_of_one_call(toy, number, place, call, options, capsys):
    checkpoint("points", data="moons")
    options = [*options.replace("TOY", str(toy)).split(), *"--nfe 3 --batch 16 --first 7 --n 50 --out".split()]
    assert interrupted(sample, number, 1, *options, "none") == SIGNALS[number] and not os.listdir("none")
    assert interrupted(sample, number, call, *options, "cut", place=place) == SIGNALS[number]
    rest = re.search(r"stopped: (--first \d+ --n \d+) ", capsys.readouterr().err)[1]
    sample.main([*options, "rest", *rest.split()])
    both = {key: np.concatenate([arrays(out)[key] for out in ("cut", "rest")]) for key in arrays("cut")}
    if "png" in options:
        assert all((pixels(f"png/{i + 7:06d}.png") == x).all() for i, x in enumerate(both["arr_0"]))
        shutil.rmtree("png")
    sample.main([*options, "whole"])
    assert len(both["arr_0"]) == 50 and Path("cut/samples.png").exists()
    assert all(both[key].tobytes() == value.tobytes() for key, value in arrays("whole").items() if key != "names")


def test_png_dir_is_numbered_from_first_and_overwrites_nothing_and_a_film_has_a_frame_a_call(toy):
    options = f"--ckpt {toy} --nfe 4 --batch 4 --class 3 --guidance 2 --out here --png-dir png/deep --n".split()
    sample.main([*options, "5"])
    sample.main([*options, "6", "--first", "5", "--film"])
    assert sorted(os.listdir("png/deep")) == [f"{i:06d}.png" for i in range(11)]
    drawn = arrays("here")["arr_0"]
    assert (np.stack([pixels(f"png/deep/{i + 5:06d}.png") for i in range(6)]) == drawn.repeat(3, 3)).all()
    frames, last = read_png(Path("here/film.png").read_bytes())[0], data.image_grid(drawn[:4])  # of the first batch
    assert len(frames) == 4 and (frames[-1][:, last.shape[1] :] == last).all()  # what is said last is what is drawn
    before = snapshot(".")
    assert "--png-dir png/deep" in refused(sample, *options, "5", "--first", "10") and snapshot(".") == before


@pytest.mark.parametrize(("method", "target"), [("agm", "data"), ("agm", "ode"), ("hold", "data"), ("hold", "noise")])
def test_classes_are_learnt_and_drawn_in_the_units_of_the_file(method, target):
    labels, noise = np.arange(400) % 2, np.random.default_rng(0).normal(size=(400, 2))
    np.savez("two.npz", x=295 + 10 * labels[:, None] + noise, labels=labels)
    options = "--data two.npz --classes --steps 300 --batch 256 --width 32 --blocks 3 --lr 3e-3 --warmup 10 --out run"
    train.main(["--method", method, "--target", target, *options.split()])
    for guidance in ("1", "1.5"):
        sample.main(["--ckpt", "run", *"--nfe 10 --n 201 --class all --guidance".split(), guidance])
        x, label = arrays("run")["arr_0"], arrays("run")["labels"]
        assert (label == np.arange(201) % 2).all() and ((x.mean(1) > 300) == label).mean() > 0.97
        for c, centre in enumerate((295, 305)):
            assert np.abs(x[label == c].mean(0) - centre).max() < 2 and 0.3 < x[label == c].std() < 2.5


def test_classes_by_name_and_number_and_rows_of_those_that_are_there(toy, capsys):
    shutil.copytree(toy, "run")
    names, there = ["zero", "7", *"two three four five six seven eight nine".split()], [0, 1, 2, 3, 5, 6, 7, 8, 9]
    altered("run", lambda c: c["data"].update(names=names, counts=[9] * 4 + [0] + [9] * 5))
    for wanted, label in (("two", 2), ("2", 2), ("7", 1)):  # a name counts before a number
        sample.main(["--ckpt", "run", "--class", wanted, *"--n 3 --nfe 2".split()])
        assert (arrays("run")["labels"] == label).all() and list(arrays("run")["names"]) == names
        assert f"classes: {label} {names[label]}\n" in capsys.readouterr().out
    assert "no class '4'" in refused(sample, "--ckpt", "run", "--class", "4")
    sample.main("--ckpt run --class all --nfe 2".split())
    x, label = arrays("run")["arr_0"], arrays("run")["labels"]
    rows = np.concatenate([x[label == i] for i in there])
    assert label.tolist() == there * 8 and (pixels("run/samples.png") == data.image_grid(rows, 8)).all()


def test_the_first_step_starts_from_the_mean_of_what_is_drawn(toy, monkeypatch):
    seen, (mean, means) = [], (read(toy)["data"][key] for key in ("mean", "class_means"))

    def ode(process, predict, m, nfe, data_mean=None):
        seen.append(data_mean)
        return torch.zeros(len(m), 1, 8, 8)

    monkeypatch.setitem(agm_ref.SAMPLERS, "ode", ode)
    for options in ("", "--class all", "--class all --guidance 3"):
        sample.main(["--ckpt", str(toy), "--out", "here", *options.split()])
    for found, right in zip(seen, (mean, means, mean + 3 * (means - mean)), strict=True):
        assert worst(found[:10] if found.ndim == 4 else found, right.clamp(-1, 1)) < 1e-6


ELSEWHERE = re.compile("FOLDER|FILE|torchrun|pip|cifar10|fashion|imagenet")  # what is not here, and what takes long
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
COMMANDS = [c.strip() for c in re.findall(r"python (?:train|sample)\.py[^\n&#]*", "\n".join(BLOCKS))]


@pytest.mark.parametrize("command", dict.fromkeys(c for c in COMMANDS if not ELSEWHERE.search(c)))
def test_the_commands_of_the_readme_run_in_their_order(toy, monkeypatch, command):
    monkeypatch.chdir(toy.parent)
    _, script, *options = shlex.split(command)
    if script == "sample.py":
        sample.main([*options, "--n", "4", "--nfe", "2", *["--nll-steps", "1"] * ("--nll" in options)])
    else:
        small = ["--steps", "4", "--device", "cpu"] if "--resume" in options else [*TOY, "--steps", "2"]
        train.main([*options, *small])
