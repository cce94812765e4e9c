"""What the README shows is run: its programs as they stand, its commands at toy size."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import sample
import train
from extras import complete, likelihood

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text("utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.S)
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = [
    c.strip() for c in re.findall(r"python (?:train\.py|sample\.py|-m extras\.\w+)[^\n&#]*", BASH)
]
ELSEWHERE = ("FOLDER", "FILE", "cifar10")  # what a test does not have
SMALL = "--steps 2 --batch 16 --width 8 --blocks 1 --device cpu".split()
FEW = "--n 4 --nfe 2".split()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run, in their order: later ones use what the former left."""
    path = tmp_path_factory.mktemp("readme")
    (path / "assets").symlink_to(ROOT / "assets")
    return path


def printed(program, capsys):
    """The numbers that a program prints."""
    exec(program, {"__name__": "__main__"})
    text = re.sub(r"\[|\]|tensor|\(|\)|,", " ", capsys.readouterr().out)
    return [float(word) for word in text.split()]


def test_there_are_three_programs_and_the_lines_of_a_notebook():
    assert len(PROGRAMS) == 4


def test_the_four_clusters_come_back_in_their_units(capsys):
    x, y, width = printed(PROGRAMS[0], capsys)
    assert abs(x - 100) < 5  # four standard errors of 1,000 samples
    assert abs(y - 100) < 5
    assert 2.5 < width < 6


def test_both_methods_sample_from_a_denoiser_of_ones_own(capsys):
    for std in printed(PROGRAMS[1], capsys):
        assert abs(std - 0.5) < 0.02  # four standard errors, and the last call's noise


def test_flow_matching_is_drawn_by_ode(capsys):
    (std,) = printed(PROGRAMS[2], capsys)
    assert abs(std - 0.5) < 0.02


@pytest.mark.parametrize("command", [c for c in COMMANDS if not any(w in c for w in ELSEWHERE)])
def test_a_command_of_the_readme_runs(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    _, *words = shlex.split(command)
    if words[0] == "train.py":
        train.main([*words[1:], *(SMALL[:2] if "--resume" in words else SMALL)])
    elif words[0] == "sample.py":
        sample.main([*words[1:], *FEW])
    elif words[1] == "extras.complete":
        complete.main([*words[2:], *FEW])
    else:
        likelihood.main([*words[2:], "--n", "4", "--steps", "1"])


def test_the_lines_of_a_notebook_draw_from_a_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    space = {}
    exec(PROGRAMS[3], space)
    assert space["images"].shape == (64, 8, 8, 1)
