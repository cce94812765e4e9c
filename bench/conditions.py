"""The rest of pictures of which a part is known, by the rules of extras/complete.py and by DPS.

    python bench/conditions.py --ckpt runs/agm-digits                   12 minutes on one core
    python bench/conditions.py --ckpt runs/emoji --n 64 --strip assets/inpaint.png        15

Known is the left half of --n held-out pictures, or the means of 2x2 blocks. It prints a table for
each quantity and keeps them in bench/results/conditions.json; the spread is over --seeds of the
noise. --strip writes a PNG: six pictures, what is known, and AGM's completions by each rule.

rms      root mean square from the original, of what is not known
right    share whose nearest training picture has the original's class; the originals' own share is
         in the row "original"

DPS (Chung et al., ICLR 2023), the rule that everybody knows, as a prediction: x_hat = D - zeta/2
d|known - D|^2/dy over what is known. Its own step, zeta/|known - D| added to each of 1,000 small
steps, has no meaning in 20.
"""

from functools import partial
from itertools import product
from pathlib import Path

import compare
import torch

import data
import sample
from extras import complete
from formats import command
from formats.files import UserError
from formats.png import image_grid, write_png

UNKNOWN = {"left half": 1 / 2, "2x2 means": 3 / 4}  # share of the numbers
PROCESSES = {"AGM": ("agm", None), "HOLD 3": ("hold", 3)}


def dps(picture, see, zeta=2.0):
    """What sample.draw takes as its condition."""

    def start(model, m, net, label, randn):
        known = see(picture.to(m))

        def predict(m, t):
            D, _, times_J = complete.denoised(model, net, m, t, label)
            x = D + zeta * times_J(see(known - D))
            return x.clamp(-model.process.bound, model.process.bound)

        return m, predict

    return start


RULES = {
    "the paper's": partial(complete.condition, rule="paper"),
    "covariance": partial(complete.condition, rule="covariance"),
    "gibbs, 1 pass": partial(complete.condition, passes=1),
    "gibbs, 2 passes": complete.condition,
    "DPS": dps,
}


def seen(known, shape):
    """The observation of that name."""
    H, W = shape[-2:]
    if known == "left half":
        return complete.observation((torch.arange(W) < W // 2).expand(H, W))
    return complete.observation(shrink=2)


def completions(model, originals, known, rule, nfe, grid, seed):
    """(N, C, H, W) in network units."""
    n = len(originals)
    condition = RULES[rule](originals, seen(known, originals.shape))
    more = dict(batch=n, seed=seed, condition=condition, grid=grid)
    ((pixels, _),) = sample.draw(model, n, nfe, **more)
    return torch.from_numpy(pixels).movedim(3, 1) / 127.5 - 1


def scores(x, originals, classes, dataset, unknown):
    """The numbers of completions x (N, C, H, W) in network units."""
    everything = (dataset.train[:].float() / 127.5 - 1).flatten(1)
    index = torch.cdist(x.flatten(1), everything).argmin(1)
    is_right = dataset.train_labels[index] == classes
    rms = float((x - originals).square().mean() / unknown) ** 0.5
    return {"rms": rms, "right": float(is_right.double().mean())}


def strip(model, originals, rules, path):
    """The PNG of --strip."""
    cells = [originals]
    for known in UNKNOWN:
        cells.append(seen(known, originals.shape)(originals))
        for rule in rules:
            cells.append(completions(model, originals, known, rule, 20, "even", 0))
    array = data.finish(torch.stack(cells, 1).flatten(0, 1), model.facts)
    write_png(path, image_grid(array, columns=len(cells)))
    print(f"{path}: the original, what is known, and {', '.join(rules)}; twice")


def measure(argv):
    p = compare.parser(__doc__, "conditions")
    p.add_argument("--ckpt", type=Path, required=True, help="a run on images")
    p.add_argument("--n", type=int, default=128, help="pictures")
    p.add_argument("--nfe", type=int, default=20, help="network calls")
    p.add_argument("--seeds", type=int, default=2, help="of the noise")
    p.add_argument("--grids", nargs="+", default=["learned", "even"], help="of ode")
    p.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES, help="default: all")
    p.add_argument("--strip", type=Path, help="write a PNG of six pictures")
    args = p.parse_args(argv)
    models = {}
    for title, (method, order) in PROCESSES.items():
        models[title] = sample.load(args.ckpt, method, order)
        models[title].bend = compare.load(args.ckpt).bend
    config = models["AGM"].config
    dataset = data.load(config.data, config.data_dir or None, config.flip, config.size)
    if not dataset.is_image or dataset.train_labels is None:
        raise UserError(f"{args.ckpt} is no run on 8-bit images with classes: name another")
    rows = torch.linspace(0, len(dataset.test) - 1, args.n).long()
    originals, classes = dataset.held_out(rows)
    name = Path(config.data).stem
    fixed = {f"n of {name}": args.n, f"nfe of {name}": args.nfe}
    results = compare.Results(args.results, fixed)
    own = partial(scores, originals, originals, classes, dataset, 1.0)
    results.of(compare.key_of(name, "original", "", 0), 0, own)

    printed = {}
    for known, title, grid, rule in product(UNKNOWN, models, args.grids, args.rules):
        key = compare.key_of(f"{name}, {known}", title, grid, rule)

        def numbers(seed, model=models[title], how=(known, rule, args.nfe, grid)):
            x = completions(model, originals, *how, seed)
            return scores(x, originals, classes, dataset, UNKNOWN[how[0]])

        row = results.all(key, args.seeds, numbers)
        printed.setdefault(f"{known}, {title}, {grid}", {})[rule] = row
    for quantity in ("rms", "right"):
        compare.table(printed, quantity, args.rules)
    if args.strip:
        strip(models["AGM"], originals[:: args.n // 6 + 1], args.rules, args.strip)


def main(argv=None):
    command.run(lambda: measure(argv))


if __name__ == "__main__":
    main()
