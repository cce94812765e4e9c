"""What training and sampling cost beside the network itself, as ratios.

    python bench/speed.py                 six minutes on one core without other work

training: a step of train.py, from its batch to the moving average, over forward, backward and AdamW
of the same network at a fixed input. sampling: a sampler of --nfe calls over as many bare calls.
The two sides of a ratio take turns and each counts with its median, so a busy machine spoils them
less; the spread is over --rounds. The networks are untrained presets. It prints a table of each,
and keeps them in bench/results/speed.json.
"""

import contextlib
import io
import tempfile
import time
from functools import partial
from statistics import median
from unittest import mock

import compare
import torch

import data
import train
from formats import command

MODELS = ("agm", "hold1", "hold2", "hold3")
TARGETS = {"agm": ("data", "ode"), "hold": ("data", "noise")}
ENDLESS = "--steps 1000000 --log-every 1000000 --save-every 1000000".split()
CASES = {
    "64 digits": ("digits", 64),
    "10,000 points": ("spiral", 10_000),
    "256 points": ("spiral", 256),
}
WARM = 3  # steps that are not counted


def now():
    """The time when all work is done, also a GPU's."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(body, *args):
    began = now()
    body(*args)
    return now() - began


def build(model, name, *options):
    """config, page, process, net and shape, for a model such as agm or hold3, of the preset for the
    data `name`."""
    method = model.rstrip("12345678")
    options = ["--data", str(name), "--method", method, *options]
    if method == "hold":
        options += ["--order", model[-1]]
    config, _ = train.configure(options)
    _, facts = train.load_data(config, None)
    page, process, net = train.build(config, facts)
    return config, page, process, net, tuple(facts["shape"])


class Watch(BaseException):
    """Ends a training that is timed."""


def watched(at_batch):
    """Calls at_batch() whenever train.py asks for a batch, without what it prints."""
    take = data.Dataset.batch

    def batch(dataset, n):
        at_batch()
        return take(dataset, n)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(data.Dataset, "batch", batch))
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.suppress(Watch))
    return stack


def training(model, target, repeats, name, round_):
    """The ratio of train.py's own step to the bare one, which is slipped in between its steps."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--target", target, *ENDLESS, "--out", f"{folder}/run", "--device", "cpu"]
        config, _, process, net, (C, *size) = build(model, name, *options)
        m = torch.randn(config.batch, C if target == "data" else process.n * C, *size)
        t = torch.full((len(m),), 0.5)
        adam = torch.optim.AdamW(net.parameters(), fused=True)
        ours = []
        bare = []
        began = None

        def bare_step():
            adam.zero_grad()
            net(m, t).square().mean().backward()
            adam.step()

        def at_batch():
            nonlocal began
            if began:
                ours.append(now() - began)
            if len(ours) == repeats + WARM:
                raise Watch
            bare.append(seconds(bare_step))
            began = now()

        with watched(at_batch):
            train.train(config)
    return {"ratio": median(ours[WARM:]) / median(bare[WARM:])}


@torch.no_grad()
def sampling(model, sampler, name, n, nfe, repeats, round_):
    """The ratio of drawing n samples with a denoiser to nfe calls of it."""
    _, page, process, net, shape = build(model, name)
    net.eval()
    start = process.prior((n, *shape))
    m = torch.randn(n, *shape)
    t = torch.full((n,), 0.5)
    predict = partial(page.denoise, process, net)
    ours = []
    bare = []
    for _ in range(repeats + 1):  # the first warms up, and computes what later ones find
        ours.append(seconds(sampler, process, predict, start, nfe))
        bare.append(seconds(lambda: [net(m, t) for _ in range(nfe)]))
    return {"ratio": median(ours[1:]) / median(bare[1:])}


def samplers(model):
    return train.METHODS[model.rstrip("12345678")][0].SAMPLERS


def measure(argv):
    p = compare.parser(__doc__, "speed")
    p.add_argument("--data", nargs="+", default=["spiral", "digits"], help="sets to train on")
    p.add_argument("--models", nargs="*", default=MODELS, help="agm, hold1 ... hold8")
    p.add_argument("--repeats", type=int, default=5, help="of each side of a ratio in a round")
    p.add_argument("--rounds", type=int, default=3, help="measurements of each ratio")
    p.add_argument("--nfe", type=int, default=20, help="network calls of the samplers")
    args = p.parse_args(argv)
    fixed = {"repeats": args.repeats, "nfe": args.nfe}
    results = compare.Results(args.results, fixed)
    trained = {}
    sampled = {}
    for model in args.models:
        for target in TARGETS[model.rstrip("12345678")]:
            for name in args.data:
                key = compare.key_of("training", f"{model} {target}", "", name)
                measurement = partial(training, model, target, 2 * args.repeats, name)
                rows = trained.setdefault(f"{model} {target}", {})
                rows[name] = results.all(key, args.rounds, measurement)
        for sampler, run in samplers(model).items():
            for case, what in CASES.items():
                key = compare.key_of("sampling", f"{model} {sampler}", "", case)
                measurement = partial(sampling, model, run, *what, args.nfe, args.repeats)
                rows = sampled.setdefault(f"{model} {sampler}", {})
                rows[case] = results.all(key, args.rounds, measurement)
    compare.table(trained, "ratio", args.data)
    compare.table(sampled, "ratio", list(CASES))


def main(argv=None):
    command.run(lambda: measure(argv))


if __name__ == "__main__":
    main()
