"""Draws every figure of bench/README.md from bench/results alone, in seconds.

    python bench/plot.py                  (matplotlib: pip install matplotlib)

Prints the path of each picture. Ours are bold, a peer's best grid is solid, its default dotted.
"""

import io
import math
from pathlib import Path

import compare
import numpy as np

from formats import command
from formats.files import UserError, write_files

BOLD = {"AGM": "#D55E00", "HOLD 1": "#0072B2", "HOLD 3": "#009E73"}
OTHERS = ("#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B", "#9467BD", "#17BECF", "#BCBD22")
STYLES = {"default": ":", "even": "--", "paper's loss": ":"}  # of a kind; else a solid line


def figure(width, height):
    """A figure of matplotlib, in inches. UserError where that is missing."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures are drawn with matplotlib: pip install matplotlib") from None
    rcParams["font.size"] = 8
    return Figure((width, height), dpi=100, layout="constrained")


def write(fig, path):
    """A figure as a small PNG of 128 colours."""
    from PIL import Image  # comes with matplotlib

    drawn = io.BytesIO()
    fig.savefig(drawn)
    small = Image.open(drawn).convert("RGB").quantize(128)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files({path: lambda file: small.save(file, "png", optimize=True)})


def curves(name, title, quantity):
    """{(who, kind): {x: (mean, spread)}} of a set. best: the lowest of all grids of a peer."""
    found = {}
    for key, row in compare.Results(compare.RESULTS / f"{name}.json").rows.items():
        of, who, kind, x = key.split(" | ")
        if of == title and quantity in row["mean"]:
            kind = "best" if kind.startswith("best") else kind
            points = found.setdefault((who, kind), {})
            point = row["mean"][quantity], row.get("spread", {}).get(quantity, 0.0)
            points[x] = min(point, points.get(x, point))
    for (who, kind), points in found.items():
        if kind == "best":
            for x, point in found[who, "default"].items():
                points[x] = min(point, points.get(x, point))
    return found


def panel(ax, name, title, quantity, xlabel="network calls", log=True, by_name=False):
    """A line for each contender and kind of grid, bars for the spread, and the data's own value.
    by_name: x are names, and there are no lines."""
    others = []
    if log:
        ax.set(xscale="log", yscale="log")
    for (who, kind), points in curves(name, title, quantity).items():
        if kind == "":
            ax.axhline(points["0"][0], color="0.8", lw=3, zorder=0, label=who)
            continue
        if who not in BOLD and who not in others:
            others.append(who)
        x = list(points)
        mean, spread = np.transpose(list(points.values()))
        if by_name:
            x = [name.replace(" ", "\n", 1) for name in x]
        else:
            order = np.argsort(np.float64(x))
            x, mean, spread = np.float64([x, mean, spread])[:, order]
            ax.set_xticks(x, [f"{value:g}" for value in x])
            ax.set_xticks([], minor=True)
        is_ours = who in BOLD and kind not in STYLES
        look = {
            "color": BOLD.get(who) or OTHERS[others.index(who)],
            "ls": "" if by_name else STYLES.get(kind, "-"),
            "lw": 2.4 if is_ours else 1.1,
            "marker": "o" if is_ours else ".",
        }
        ax.errorbar(
            x, mean, spread, elinewidth=0.8, ms=4, label=f"{who}, {kind.split()[0]}", **look
        )
    ax.set(title=f"{title}: {quantity}", xlabel=xlabel)


def page(panels, columns, **more):
    """A figure of panels (results, set, quantity) with one legend, or None without results."""
    panels = [parts for parts in panels if curves(*parts)]
    if not panels:
        return None
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig = figure(11, 1 + 2.4 * rows)
    labels = {}
    axes = fig.subplots(rows, columns, squeeze=False).flat
    for ax, (results, of, quantity) in zip(axes, panels, strict=False):
        panel(ax, results, of, quantity, **more)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    fig.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=5)
    return fig


def each(results, sets, quantities):
    """The panels of all sets and quantities."""
    return [(results, of, quantity) for quantity in quantities for of in sets]


def pages():
    """{name of the picture: figure}."""
    points = each("points", ("spiral", "moons", "checkerboard", "gmm"), ("distance", "sharpness"))
    grids = each("grid", ("spiral", "moons", "checkerboard", "digits", "emoji"), ["mean distance"])
    images = each("images", ("fashion", "cifar10"), ("distance", "frechet"))
    noisy = [("stochastic", "spiral", "sharpness"), ("stochastic", "digits", "frechet")]
    known = [f"{of}, {part}" for of in ("digits", "emoji") for part in ("left half", "2x2 means")]
    likely = each("likelihood", ["gmm"], ["nats"])
    guided = each("guidance", ["digits"], ("right", "frechet"))
    names = {"xlabel": "rule", "log": False, "by_name": True}
    return {
        "points": page(points, 4),
        "few-digits": page(each("images", ["digits"], ("distance", "frechet")), 2),
        "few-images": page(images, 4),
        "grid": page(grids, 5),
        "stochastic": page(noisy, 2),
        "completing": page(each("conditions", known, ["rms"]), 4, **names),
        "likelihood": page(likely, 2, xlabel="steps of Runge-Kutta", log=False),
        "guidance": page(guided, 2, xlabel="guidance", log=False),
        "paper": page(each("paper", ["spiral"], ("sharpness", "w2")), 2),
    }


def draw(argv):
    args = compare.parser(__doc__)
    args.add_argument("--out", type=Path, default=compare.ROOT / "assets", help="folder")
    out = args.parse_args(argv).out
    for name, fig in pages().items():
        if fig:
            write(fig, out / f"bench-{name}.png")
            print(out / f"bench-{name}.png")


def main(argv=None):
    command.run(lambda: draw(argv))


if __name__ == "__main__":
    main()
