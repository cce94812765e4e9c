"""The rest of pictures of which a part is known, by the rules of extras/conditions.py and by DPS, as a Markdown table.

    python bench/conditions.py                                       Gaussian data, whose law given a part is known
    python bench/conditions.py --data digits --out nets/digits       a net trained there, or the one that is there
    python bench/conditions.py --data FOLDER --out nets/icons --strip icons.png --train "--size 16 --steps 1400"

Known is the left half, or the means of 2x2 blocks; the sampler is `ode`. Gaussian: 16 numbers as a 4x4 picture of
correlation .9^distance, an exact denoiser, --n samples given each of five draws: `mean` is the error of the conditional
mean in conditional standard deviations (root mean square), `std` the standard deviation over the true one. Else, over
--n held-out pictures: `rms` from the original, of what is not known; `nearest`, the mean distance to the nearest
training picture (the original's is in the first row); `class`, the share whose nearest has the original's class.

DPS (Chung et al., ICLR 2023), the rule that everybody knows, as a prediction: x_hat = D - zeta/2 d|known - D|^2/dy over
what is known. Its own step, zeta / |known - D| added to each of 1,000 small steps, has no meaning in 20; from about
zeta 3 on it diverges.
"""

import argparse
import sys
from functools import partial
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import peers

import agm_ref
import data
import hold_ref
import train
from extras import conditions


def dps(method, process, net, see, known, zeta):
    def predict(m, t):
        w, snr = method.to_z(process, t)
        with torch.enable_grad():
            z = method.mix(w, m).requires_grad_()
            D = method.denoise_y(process, net, z, snr.expand(len(m)))
            (slope,) = torch.autograd.grad((known - see(D)).square().sum() / 2, z)
        return (D.detach() - zeta * float(snr.sqrt()) * slope).clamp(-process.bound, process.bound)

    return predict


def paper(method, process, net, see, known):
    return conditions.by_redrawing(method, process, partial(method.denoise, process, net), see, known)


def covariance(passes, randn=None):
    return partial(conditions.by_covariance, passes=passes, randn=randn)


RULES = {"the paper's": paper, "covariance, 2 passes": covariance(2), "gibbs, 1 pass": covariance(1, torch.randn_like)}
RULES |= {"gibbs, 2 passes": covariance(2, torch.randn_like), "gibbs, 3 passes": covariance(3, torch.randn_like)}
RULES |= {f"DPS, zeta {zeta:g}": partial(dps, zeta=zeta) for zeta in (1, 2)}


UNKNOWN = {"left half": 1 / 2, "2x2 means": 3 / 4}  # share of the numbers


def seen(kind, shape):
    H, W = shape[-2:]
    return conditions.observation((torch.arange(W) < W // 2).expand(H, W) if kind == "left half" else None, shrink=2)


def complete(rule, method, process, net, see, x, nfe):
    """The completions of see(x), from the same noise for every rule."""
    torch.manual_seed(0)
    m = process.prior(x.shape).to(x)
    return method.ode(process, rule(method, process, net, see, see(x)), m, nfe)


def table(models, rules, names, nfes, measure):
    """measure(kind, rule, model, nfe) -> numbers, one for each name."""
    head = [f"{name} at {nfe}" for nfe in nfes for name in names]
    print(f"| known | process | rule | {' | '.join(head)} |\n" + "|---" * (3 + len(head)) + "|")
    for kind, (title, model), rule in product(UNKNOWN, models.items(), rules):
        numbers = [f"{v:.3f}" for nfe in nfes for v in measure(kind, RULES[rule], model, nfe)]
        print(f"| {kind} | {title} | {rule} | {' | '.join(numbers)} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Gaussian data

AXIS = torch.arange(4)
ROW, COLUMN = torch.cartesian_prod(AXIS, AXIS).double().T
COV = 0.25 * 0.9 ** torch.hypot(ROW[:, None] - ROW, COLUMN[:, None] - COLUMN)


def exact_net(y, t, label=None):
    """The network whose denoiser is exact for N(0, COV) at sigma_data 1/2."""
    root = float(1 / t[0] - 1)  # 1 / sigma
    c_in = (1 + 0.25 * root**2) ** -0.5
    eye = torch.eye(16, dtype=COV.dtype)
    gain = torch.linalg.solve(root**2 * COV + eye, root * COV) - 0.25 * root * c_in**2 * eye
    return (y.flatten(1) / c_in @ gain / (0.5 * c_in)).reshape(y.shape)


def errors(n, kind, rule, model, nfe):
    see = seen(kind, (4, 4))
    values, vectors = torch.linalg.eigh(see(torch.eye(16, dtype=COV.dtype).reshape(16, 1, 4, 4)).reshape(16, 16))
    U, found = vectors[:, values > 0.5].T, []  # see = U^T U
    K = COV @ U.T @ torch.linalg.inv(U @ COV @ U.T)
    cov, generator = COV - K @ U @ COV, torch.Generator().manual_seed(0)
    for draw in torch.randn(5, 16, dtype=COV.dtype, generator=generator) @ torch.linalg.cholesky(COV).T:
        x = complete(rule, *model, see, draw.reshape(1, 1, 4, 4).expand(n, 1, 4, 4), nfe).flatten(1)
        spread = torch.cov(x.T).diagonal().sum() / cov.diagonal().sum()
        found.append([(x.mean(0) - K @ U @ draw).square().sum() / cov.diagonal().sum(), spread])
    return torch.tensor(found).mean(0).sqrt().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# A trained network


def restored(args):
    """The dataset and {title: (method, process, net)} of the run in --out, which is trained if it is not there."""
    if not (args.out / "ckpt.pt").exists():
        train.main(["--data", args.data, "--out", str(args.out), *args.train.split()])
    config, models = train.load_checkpoint(args.out)["config"], {}
    for title, method in (("agm", agm_ref), ("hold3", hold_ref)):
        process, predict, _ = peers.restore(args.out / "ckpt.pt", title)
        models[title] = method, process, predict.args[1].requires_grad_(False)
    return data.load(config.data, config.data_dir or None, config.flip, config.size), models


def compare(args):
    dataset, models = restored(args)
    originals, classes = dataset.held_out(slice(args.n))
    everything = (dataset.train[:].float() / 127.5 - 1).flatten(1)

    def scores(x, unknown=1.0):
        distance, index = torch.cdist(x.flatten(1), everything).min(1)
        right = [] if classes is None else [float((dataset.train_labels[index] == classes).double().mean())]
        return [float((x - originals).square().mean() / unknown) ** 0.5, float(distance.mean()), *right]

    def measure(kind, rule, model, nfe):
        see = seen(kind, originals.shape)
        x = torch.cat([complete(rule, *model, see, part, nfe) for part in originals.split(64)])
        return scores(x, UNKNOWN[kind])

    print(f"{len(originals)} held-out pictures of {dataset.name}: {scores(originals)[1:]}")
    names = ["rms", "nearest", "class"][: 2 + (classes is not None)]
    table(models, args.rules, names, args.nfe, measure)
    if args.strip:
        cells = [originals[:6]]
        for kind in UNKNOWN:
            see = seen(kind, originals.shape)
            cells += [see(originals[:6])] + [
                complete(RULES[r], *models["agm"], see, originals[:6], 20) for r in args.rules
            ]
        array = data.finish(torch.stack(cells, 1).flatten(0, 1), dataset.summary())
        data.write_png(args.strip, data.image_grid(array, columns=len(cells)))


TOY = "--n 20 --nfe 2"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", help="as in train.py; default: Gaussian data")
    p.add_argument("--out", type=Path, help="folder of the run")
    p.add_argument("--train", default="", help="more options of train.py")
    p.add_argument("--n", type=int, default=2000, help="samples of each observation, or pictures")
    p.add_argument("--nfe", type=int, nargs="+", default=[20, 50], help="network calls")
    p.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES, help="default: all")
    p.add_argument("--strip", help="a PNG: six pictures, what is known, and AGM's completions by each rule")
    args = p.parse_args(argv)
    args.out = args.out or Path("runs", f"conditions-{Path(args.data or '').stem}")
    if args.data:
        return train.run(lambda: compare(args))
    models = {"agm": (agm_ref, agm_ref.AGM(), exact_net), "hold3": (hold_ref, hold_ref.HOLD(), exact_net)}
    table(models, args.rules, ["mean", "std"], args.nfe, partial(errors, args.n))


if __name__ == "__main__":
    main()
