"""What the scripts of bench/ share: contenders, their samples, results that are files. No command.

Results are kept in bench/results/NAME.json after every number: another call goes on where one
stopped. (Two at the same time would overwrite each other's.) The file says what was run, when,
where and at which commit; a row has the numbers of each seed, their mean and their standard
deviation.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import peers

import agm_ref
import hold_ref
import sample
import train
from extras import clock
from formats.files import UserError, write_files

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def parser(doc, name=None):
    """A command line; a mistake is a UserError. name: the script keeps results in NAME.json."""
    p = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)

    def refuse(message):
        raise UserError(f"{message}; --help shows the options")

    p.error = refuse
    if name:
        file = RESULTS / f"{name}.json"
        p.add_argument("--results", type=Path, default=file, help="file of results")
    return p


def comparing(doc, name, groups, **defaults):
    """The command line of a comparison, with groups of contenders besides those of GROUPS."""
    p = parser(doc, name)
    p.add_argument("--group", choices=[*GROUPS, *groups], help="of contenders")
    p.add_argument("--only", nargs="+", help="contenders that contain one of these")
    p.add_argument("--seeds", type=int, help="networks")
    p.add_argument("--nfe", type=int, nargs="+", help="calls")
    p.add_argument("--n", type=int, help="samples")
    p.add_argument("--search", type=int, help="samples for the choice of a grid")
    p.add_argument("--flow-calls", type=int, help="calls of the converged flow")
    p.add_argument("--train", default="", help="more options of train.py")
    p.add_argument("--runs", help="folder of the networks")
    p.set_defaults(group="few", only=[""], seeds=2, flow_calls=100, **defaults)
    return p


def file_of(args):
    """The results file of --group: `few` are in that of the script."""
    if args.group == "few":
        return args.results
    return args.results.with_name(f"{args.group}.json")


# -------------------------------------------------------------------------------------------------
# Results


def about(options):
    """Where and when a call ran."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")  # Linux knows the name, Python does not
    if cpuinfo.exists():
        processor = cpuinfo.read_text().partition("model name\t: ")[2].partition("\n")[0]
    return {
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
        "processor": f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} in use",
        "torch": torch.__version__,
        "minutes": 0.0,
        "options": options,
    }


class Results:
    """The rows of a results file, {key: {"seeds": {seed: numbers}, "mean": ..., "spread": ...}}.
    fixed: the options that every number depends on; UserError if the file has others."""

    def __init__(self, path, fixed=None):
        self.path = Path(path)
        self.fixed = fixed or {}
        self.calls = []
        self.rows = {}
        self.began = time.perf_counter()
        if self.path.exists():
            found = json.loads(self.path.read_text())
            self.calls = found["calls"]
            self.rows = found["rows"]
            for name, value in self.fixed.items():
                known = found["fixed"].get(name, value)
                if known != value:
                    raise UserError(
                        f"{path} was measured with {name} {known}, not {value}: "
                        "delete it, or name another by --results"
                    )
            self.fixed = {**found["fixed"], **self.fixed}
        self.call = about(self.fixed)

    def of(self, key, seed, compute):
        """The numbers of that row and seed, a dict: from the file, or computed and kept."""
        row = self.rows.setdefault(key, {"seeds": {}})
        if str(seed) not in row["seeds"]:
            row["seeds"][str(seed)] = {k: rounded(v) for k, v in compute().items()}
            self.save()
        return row["seeds"][str(seed)]

    def all(self, key, seeds, compute):
        """The row of that key, with the numbers compute(seed) of each of so many seeds."""
        for seed in range(seeds):
            self.of(key, seed, partial(compute, seed))
        return self.rows[key]

    def save(self):
        self.call["minutes"] = round((time.perf_counter() - self.began) / 60, 1)
        for row in self.rows.values():
            row["mean"] = over_seeds(row, statistics.fmean)
            if len(row["seeds"]) > 1:
                row["spread"] = over_seeds(row, statistics.stdev)
        head = {"calls": [*self.calls, self.call], "fixed": self.fixed}
        lines = [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in self.rows.items()]
        text = json.dumps(head, indent=1)[:-2] + ',\n "rows": {\n' + ",\n".join(lines) + "\n}}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_files({self.path: text.encode()})


def rounded(value):
    """Five digits of a number."""
    return float(f"{value:.5g}")


def over_seeds(row, reduce):
    """That of each number over the seeds."""
    seeds = list(row["seeds"].values())
    return {key: rounded(float(reduce([seed[key] for seed in seeds]))) for key in seeds[0]}


def key_of(*parts):
    return " | ".join(str(part) for part in parts)


def table(rows, quantity, columns):
    """Markdown of {title: {column: row of a results file}}, mean and spread over the seeds."""
    print(f"\n{quantity}\n\n| |" + "".join(f" {column} |" for column in columns))
    print("|---" * (1 + len(columns)) + "|")
    for title, found in rows.items():
        cells = []
        for column in columns:
            row = found[column]
            cell = ""
            if quantity in row["mean"]:
                cell = f"{row['mean'][quantity]:.4g}"
                if "spread" in row:
                    cell += f" ± {row['spread'][quantity]:.2g}"
            cells.append(cell)
        print(f"| {title} |" + "".join(f" {cell} |" for cell in cells))


# -------------------------------------------------------------------------------------------------
# Contenders


@dataclass(frozen=True)
class Contender:
    """Somebody who samples from a network. flow: the name of the flow that it follows, None if it
    adds noise. Of several grids the best one is searched."""

    name: str
    kind: str  # learned, even: our grid; default, best: a peer's
    process: str  # AGM, HOLD 1 ..., VE, TADA, or own: the network's
    sampler: Callable
    grids: tuple = ({},)
    flow: str | None = None


def ours(process, predict, m, nfe, model, learned):
    """`ode` as sample.py runs it, on the grid learned from the network or on the even one."""
    ts = None
    if learned:
        R = agm_ref.clock_rate(process, m)
        ts = clock.learned_times(agm_ref, process, nfe, R, **model.bend)
    return agm_ref.ode(process, predict, m, nfe, model.facts["mean"], ts)


def few_calls():
    """Those that follow a flow: `ode` of both methods, and the peers."""
    found = []
    for process in ("AGM", "HOLD 1", "HOLD 3"):
        found.append(Contender(process, "learned", process, ours, ({"learned": True},), process))
        found.append(Contender(process, "even", process, ours, ({"learned": False},), process))
    for name, sampler in peers.PEERS.items():
        process = "TADA" if name == "TADA" else "VE"
        default = {"last": False} if name in peers.END_AT_STATE else {}
        found.append(Contender(name, "default", process, sampler, (default,), process))
        found.append(Contender(name, "best", process, sampler, tuple(peers.GRIDS), process))
    return found


def stochastic():
    """Those that add noise, and `ode` of AGM beside them."""
    found = few_calls()[:1]
    for process, method in (("AGM", agm_ref), ("HOLD 3", hold_ref)):
        for name, sampler in method.SAMPLERS.items():
            if name not in ("ode", "exponential"):
                found.append(Contender(f"{process}, {name}", "default", process, sampler))
    found.append(Contender("SA-Solver", "default", "VE", peers.sa_solver))
    found.append(Contender("SA-Solver", "best", "VE", peers.sa_solver, tuple(peers.GRIDS)))
    return found


GROUPS = {"few": few_calls, "grid": lambda: few_calls()[:6], "stochastic": stochastic}


def chosen(group, only):
    """The contenders of a group that have a part of `only` in their name."""
    return [c for c in GROUPS[group]() if any(part in c.name for part in only)]


def trained(folder, *options):
    """The run in that folder, which is trained if it is not there."""
    if not (folder / "ckpt.pt").exists():
        train.main([*options, "--out", str(folder)])
    return folder


@lru_cache(2)
def load(path):
    """sample.Model of a run; a checkpoint of a denoiser that has no `bend` gets one."""
    model = sample.load(path)
    if model.config.target == "data" and model.bend is None:
        process, predict = process_of(model, "AGM")
        m = process.prior((16, *model.facts["shape"]), torch.Generator().manual_seed(0))
        lam, size = clock.bend(agm_ref, process, predict, m, model.facts["mean"])
        model.bend = {"lam": lam, "size": size}
    return model


def process_of(model, name):
    """The process of that name for the network of a model, and its prediction."""
    known = model.process
    common = {"sigma_data": known.sigma_data, "bound": known.bound}
    if name == "own":
        return model.process, partial(model.method.denoise, model.process, model.net)
    if name == "AGM":
        process = agm_ref.AGM(**common)
    elif name == "TADA":
        process = peers.TADA(**common)
    elif name == "VE":
        process = peers.VE(**common)
    else:
        process = hold_ref.HOLD(order=int(name.removeprefix("HOLD ")), **common)
    return process, partial(agm_ref.denoise, process, model.net)


@torch.no_grad()
def draw(model, name, sampler, nfe, n, seed, **grid):
    """n samples in network units; the noise of the first is the same whatever n is."""
    process, predict = process_of(model, name)
    if sampler is ours:
        grid["model"] = model
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed + 10**6)  # the noise of steps, which must not repeat that of the prior
    found = []
    batch = 1000 if model.facts["kind"] == "points" else 250
    for i in range(0, n, batch):
        m = process.prior((min(batch, n - i), *model.facts["shape"]), generator)
        found.append(sampler(process, predict, m, nfe, **grid).float())
    bound = model.facts["bound"]
    return torch.cat(found).clamp(-bound, bound)


def converged(model, flow, n, seed, calls):
    """The first n samples again, from the same noise but along the network's own flow with so many
    calls that they no longer move; kept beside the checkpoint. The flow of VE is that of HOLD 1."""
    name = "HOLD 1" if flow == "VE" else flow
    file = model.path.parent / f"flow-{name}-{n}-{seed}-{calls}.pt".replace(" ", "")
    if not file.exists() or file.stat().st_mtime < model.path.stat().st_mtime:
        sampler = peers.tada if flow == "TADA" else agm_ref.ode  # without the free first node
        torch.save(draw(model, name, sampler, calls, n, seed), file)
    return torch.load(file, weights_only=True)


@dataclass(frozen=True)
class Comparison:
    """How contenders are measured: measure(x) gives the numbers of samples; a peer's best grid has
    the least of each of goals(numbers), {name: number}, with `search` samples of the first seed."""

    results: Results
    measure: Callable
    goals: Callable
    n: int
    search: int
    flow_n: int
    flow_calls: int

    def numbers(self, model, contender, nfe, seed, n, grid):
        x = draw(model, contender.process, contender.sampler, nfe, n, seed, **grid)
        numbers = self.measure(x)
        if contender.flow:
            flow_n = min(n, self.flow_n)
            limit = converged(model, contender.flow, flow_n, seed, self.flow_calls)
            apart = (x[:flow_n] - limit).flatten(1).square().mean(1)
            numbers["distance"] = float(apart.mean().sqrt())
            numbers["mean distance"] = float(apart.sqrt().mean())
        return numbers

    def best_grids(self, model, contender, nfe):
        """{goal: grid}, searched once and kept beside the checkpoint."""
        kept = Results(model.path.parent / "search.json", {"search": self.search})
        scores = []
        for grid in contender.grids:
            key = key_of(contender.name, nfe, grid)
            compute = partial(self.numbers, model, contender, nfe, 0, self.search, grid)
            scores.append(self.goals(kept.of(key, 0, compute)))
        best = {}
        for goal in scores[0]:
            values = [score[goal] for score in scores]
            best[goal] = contender.grids[values.index(min(values))]
        return best

    def run(self, title, paths, contenders, nfes):
        """Every contender on the networks of all seeds, for one set; prints its tables."""
        printed = {}
        for contender in contenders:
            for nfe in nfes:
                kinds = {contender.kind: contender.grids[0]}
                if len(contender.grids) > 1:
                    best = self.best_grids(load(paths[0]), contender, nfe)
                    kinds = {f"best {goal}": grid for goal, grid in best.items()}
                for kind, grid in kinds.items():
                    key = key_of(title, contender.name, kind, nfe)
                    self.results.rows.setdefault(key, {"grid": grid, "seeds": {}})
                    for seed, path in enumerate(paths):
                        setting = load(path), contender, nfe, seed, self.n, grid
                        self.results.of(key, seed, partial(self.numbers, *setting))
                    rows = printed.setdefault(f"{contender.name}, {kind}", {})
                    rows[nfe] = self.results.rows[key]
        first = next(iter(printed.values()))[nfes[0]]
        for quantity in first["mean"]:
            print(f"\n## {title}")
            table(printed, quantity, nfes)
