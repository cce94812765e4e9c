"""Completes pictures of which something is known, with a network that was not trained for it.

    python -m extras.complete --inpaint FILE --mask FILE    where the mask is white (or opaque)
    python -m extras.complete --inpaint FILE --shrink 4     from the means of 4x4 blocks
    python -m extras.complete --held-out 3 --shrink 2       held-out picture 3 of the run's data
    python -m extras.complete --stroke FILE                 samples that follow a sketch in colour

In Python:

    see = complete.observation(shrink=2)                    # what is known of a picture
    known = complete.condition(picture, see)                # picture (1, C, H, W) in [-1, 1]
    ((images, labels),) = sample.draw(model, 8, condition=known)       # one batch

Known of x (B, C, H, W) is c = H x, H an orthogonal projection, here the function `see`. A rule is a
prediction in place of `denoise`. It keeps something from call to call, so each batch gets a new
one.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, interpolate

import data
import sample
import train
from formats.command import flag, option, parser, run
from formats.files import UserError, say
from formats.pictures import read, read_mask
from formats.png import image_grid, png


@dataclass(frozen=True)
class Options(sample.Drawing):
    """What the command line asks for; None: not given."""

    n: int = option(32, "samples", 1, 10**7)
    class_: str = option("none", "a class, its number, or all in turn, if the net knows classes")
    inpaint: str = option(None, "picture of which a part is known, by --mask or --shrink")
    held_out: int = option(None, "number of a held-out picture, in place of a FILE", 0, 1e9)
    mask: str = option(None, "picture or .npy, white where it is known; its alpha, if it has one")
    shrink: int = option(1, "side of the blocks whose means are known", 1, 4096)
    rule: str = option("gibbs", "how it is completed", choices=("gibbs", "covariance", "paper"))
    passes: int = option(2, "backward passes a call; gibbs makes one more", 1, 1000)
    noise: float = option(
        0.0, "noise in what is known: its standard deviation in grey levels", 0, 255
    )
    stroke: str = option(None, "picture that the samples follow")
    inject: str = option("dyn", "redraw v given the stroke, or mix it in", choices=("dyn", "init"))
    share: float = option(0.6, "dyn: share of the calls that follow the stroke", 0.01, 1)


# -------------------------------------------------------------------------------------------------
# What is known


def observation(mask=None, shrink=1):
    """The function H: x where mask (H, W) is 1, and 0 where it is 0; or the mean of each block of
    shrink x shrink pixels, in all of its pixels."""
    if mask is not None:
        return lambda x: x * mask.to(x)
    return lambda x: interpolate(avg_pool2d(x, shrink), scale_factor=shrink)


def condition(picture, see, rule="gibbs", passes=2, noise=0.0):
    """What sample.draw takes as its condition, where see(picture) is known.

    picture: (1, C, H, W) in network units. rule: gibbs, covariance or paper. passes: of the first
    two. noise: standard deviation of white noise in each pixel, before see.
    """

    def start(model, m, net, label, randn):
        known = see(picture.to(m))
        if rule == "paper":
            return m, by_paper(model, net, see, known, label, randn)
        if rule == "covariance" or model.process.n == 1:  # one block: there is nothing to redraw
            return m, by_covariance(model, net, see, known, passes, noise, label)
        return m, by_gibbs(model, net, see, known, passes, noise, label, randn)

    return start


def stroke_condition(picture, calls):
    """What sample.draw takes as its condition: the samples follow the picture (1, C, H, W).

    Before each of the first calls the auxiliary blocks are redrawn, given the picture (the AGM
    paper's dyn-v). calls 0: it is mixed into those of the prior (the paper's init-v).
    """

    def start(model, m, net, label, randn):
        stroke = picture.to(m)
        left = calls
        if calls == 0:
            m = mixed_in(model, m, stroke)

        def predict(m, t):
            nonlocal left
            if left > 0:
                redraw(model, m, t, stroke, randn)
            left -= 1
            return model.method.denoise(model.process, net, m, t, label)

        return m, predict

    return start


# -------------------------------------------------------------------------------------------------
# The rules. model brings a page (`method`) and a process; net(y, t, label) is its network.


def by_paper(model, net, see, known, label, randn):
    """The AGM paper's inpainting: c replaces H x_hat in each prediction, and the auxiliary blocks
    are redrawn given that."""

    def predict(m, t):
        x = model.method.denoise(model.process, net, m, t, label)
        x = x + known - see(x)
        redraw(model, m, t, x, randn)
        return x

    return predict


def by_covariance(model, net, see, known, passes, noise, label):
    """The posterior mean x' of `posterior_mean`; exact for Gaussian data (Rozet et al. 2024)."""

    def predict(m, t):
        D, sigma, times_J = denoised(model, net, m, t, label)
        return posterior_mean(model, D, sigma, times_J, see, known, passes, noise)

    return predict


def by_gibbs(model, net, see, known, passes, noise, label, randn):
    """The posterior mean x', with a Gibbs step before each call.

    A network's J is not quite right, and its errors would add up from call to call. A Gibbs step
    forgets them: the auxiliary blocks of m are drawn anew given the data block and a draw of x,

        x = x' + s (n - (1 - l) H n),     n ~ N(0, I),     s^2 = sigma^2 mean(diag J)

    drawn after the previous call. What is not known gets the standard deviation s, what is known
    the share l = noise / sqrt(s^2 + noise^2) of it. That leaves the law of m, given c, as it is.
    mean(diag J) is estimated by n.Jn / n.n, one more backward pass (Hutchinson).
    """
    draw = None

    def predict(m, t):
        nonlocal draw
        if draw is not None:
            redraw(model, m, t, draw, randn)
        D, sigma, times_J = denoised(model, net, m, t, label)
        x = posterior_mean(model, D, sigma, times_J, see, known, passes, noise)

        n = randn(x)
        mean_diagonal = dot(n, times_J(n)) / dot(n, n)
        variance = (sigma**2 * mean_diagonal).clamp(min=1e-12)
        left = noise / (variance + noise**2).sqrt()
        draw = x + variance.sqrt() * (n - (1 - left) * see(n))
        return x

    return predict


def denoised(model, net, m, t, label):
    """D = E[x | y] (B, C, H, W), the noise sigma of y, and a function v -> J v, J = dD/dy, which
    costs a backward pass. (That gives J^T v. The J of an exact denoiser is symmetric.)"""
    w, snr = model.method.to_z(model.process, t)
    sigma = float(snr) ** -0.5
    with torch.enable_grad():
        z = model.method.mix(w, m).requires_grad_()  # y / sigma
        D = model.method.denoise_y(model.process, net, z, snr.expand(len(m)), label)

    def times_J(v):
        (sigma_J_v,) = torch.autograd.grad(D, z, v, retain_graph=True)
        return sigma_J_v / sigma

    return D.detach(), sigma, times_J


def posterior_mean(model, D, sigma, times_J, see, known, passes, noise):
    """E[x | y, c], c with white noise of that standard deviation, if x given y is Gaussian. Its
    covariance is sigma^2 J (Tweedie), so the mean is

        x' = D + J H u,     (H J H + noise^2/sigma^2) u = c - H D

    as in a Kalman update. u comes from `passes` steps of conjugate gradients, each with one product
    J v. (Directions lie in the range of H, so H v = v.)
    """
    x = D
    residual = known - see(D)
    direction = residual
    for _ in range(passes):
        J_direction = times_J(direction)
        A_direction = see(J_direction) + (noise / sigma) ** 2 * direction
        square = dot(residual, residual)
        step = square / dot(direction, A_direction)
        step = step.nan_to_num(posinf=0.0).clamp(min=0)  # a network's J may be anything
        x = x + step * J_direction
        residual = residual - step * A_direction
        growth = dot(residual, residual) / square
        direction = residual + growth.nan_to_num() * direction
    if noise == 0:
        x = x + known - see(x)
    return x.clamp(-model.process.bound, model.process.bound)


def dot(a, b):
    """(B, 1, 1, 1): the product of each picture of a with that of b."""
    return (a * b).sum((1, 2, 3), keepdim=True)


def redraw(model, m, t, x, randn):
    """Draws the auxiliary blocks of m anew, in place, given its data block and x: in m = mu x + L
    eps, L lower, the data block fixes its own noise, and the rest of eps is fresh."""
    C = x.shape[1]
    L = model.process.cholesky(t)
    mean = model.method.mix(model.process.mean(t)[:, None], x)
    data_noise = (m - mean)[:, :C] / float(L[0, 0])
    fresh_noise = randn(m[:, C:])
    eps = torch.cat([data_noise, fresh_noise], 1)
    drawn = mean + model.method.mix(L, eps)
    m[:, C:] = drawn[:, C:]


def mixed_in(model, m, stroke):
    """The AGM paper's v <- .9 v + .1 stroke. Several auxiliary blocks: in the direction of their
    mean, which for AGM is 1."""
    C = stroke.shape[1]
    mean = model.process.mean(model.process.first)[1:, None]
    direction = mean / mean.norm()
    push = model.method.mix(0.1 * direction, stroke)
    return torch.cat([m[:, :C], 0.9 * m[:, C:] + push], 1)


# -------------------------------------------------------------------------------------------------
# From the command line


def check_options(args):
    """UserError for options that do not go together."""
    pictures = given(args, "inpaint held_out stroke")
    if len(pictures) != 1:
        raise UserError("give one picture: --inpaint FILE, --held-out NUMBER or --stroke FILE")
    of_stroke = given(args, "inject share")
    of_rest = given(args, "mask shrink rule passes noise")
    idle = of_rest if args.stroke else of_stroke
    if idle:
        raise UserError(f"{idle[0]} is not for {pictures[0]}: leave it out")
    if args.rule == "paper" and given(args, "passes noise"):
        raise UserError("--passes and --noise are not for --rule paper: leave them out")
    if not args.stroke and len(given(args, "mask shrink")) != 1:
        raise UserError(f"{pictures[0]}: give one of --mask FILE and --shrink K, what is known")


def given(args, names):
    """Those of the options that differ from their defaults."""
    return [flag(name) for name in names.split() if getattr(args, name) != getattr(Options, name)]


def check_model(args, model):
    """UserError for what the network or the process cannot do."""
    kind = model.facts["kind"]
    if kind != "image":
        raise UserError(f"this is for networks of 8-bit images, not of {kind} data")
    if not args.stroke and args.rule != "paper" and model.process.target != "data":
        raise UserError(f"--rule {args.rule} wants a net of target data: take --rule paper")
    if args.stroke and model.process.n == 1:
        raise UserError("a process of one block has nothing for a stroke to act on: --order 2")
    redraws = args.inject == "dyn" if args.stroke else args.rule != "covariance"
    if args.sampler == "strang" and redraws:
        raise UserError("strang loses what is redrawn: take another --sampler")
    _, H, W = model.facts["shape"]
    if H % args.shrink or W % args.shrink:
        raise UserError(f"--shrink must divide the sides of the pictures, {H} and {W}")


def picture_of(args, model):
    """The picture that is asked for (1, C, H, W) in network units, and what it is called."""
    if args.held_out is None:
        path = args.inpaint or args.stroke
        pixels = fitted(read(path), path, model.facts["shape"], args.shrink)
        return pixels / 127.5 - 1, path
    config = model.config
    dataset = data.load(config.data, config.data_dir or None, config.flip, config.size)
    train.check_same(dataset.summary(), model.facts, config.data)
    if args.held_out >= len(dataset.test):
        raise UserError(f"--held-out counts from 0, and the run has {len(dataset.test)} of them")
    x, _ = dataset.held_out([args.held_out])
    return x, dataset.held_out_name(args.held_out)


def mask_of(args, model):
    """(H, W), 1 where it is known. UserError if that is all or nothing."""
    _, H, W = model.facts["shape"]
    grey = fitted(read_mask(args.mask), args.mask, (1, H, W))
    mask = grey[0, 0] > 127
    known = int(mask.sum())
    if known in (0, H * W):
        found = f"{known} of {H * W} pixels are known"
        raise UserError(f"--mask {args.mask}: {found}; paint some of them white, not all")
    return mask


def fitted(array, path, shape, shrink=1):
    """uint8 (h, w) or (h, w, c) -> float (1, C, H, W), 0 to 255, brought there as in training: its
    central part, by Lanczos' filter. One of the size of the blocks is taken for their means."""
    C, H, W = shape
    if array.shape[:2] not in ((H, W), (H // shrink, W // shrink)):
        try:
            from PIL import Image, ImageOps
        except ImportError:
            fix = f"give {H} x {W} pixels, or pip install pillow"
            raise UserError(f"{path} has {array.shape[:2]}: {fix}") from None
        image = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
        array = np.asarray(ImageOps.fit(image, (W, H), Image.Resampling.LANCZOS))

    # grey or in colour, as the network's pictures are
    if C == 1 and array.shape[2:] == (3,):
        array = (array @ [0.299, 0.587, 0.114]).round()
    x = torch.from_numpy(np.float32(np.atleast_3d(array)))
    x = x.permute(2, 0, 1).expand(1, C, -1, -1)
    return interpolate(x, (H, W))


def rows(array, beside, columns=8):
    """Completions as rows of a picture, each led by what is beside them."""
    cells = []
    for start in range(0, min(len(array), 256), columns):
        cells += [beside, array[start : start + columns]]
    return image_grid(np.concatenate(cells), len(beside) + columns)


def complete(args):
    """Draws and writes what the command line asks for."""
    check_options(args)
    model = sample.load(args.ckpt, args.method, args.order, device=args.device)
    check_model(args, model)
    classes = sample.pick_classes(args, model)
    picture, name = picture_of(args, model)

    beside = picture
    note = ""
    if args.stroke:
        calls = 0
        if args.inject == "dyn":
            calls = math.ceil(args.share * args.nfe)
        rule = stroke_condition(picture, calls)
    else:
        mask = mask_of(args, model) if args.mask else None
        see = observation(mask, args.shrink)
        noise = args.noise / 127.5 * args.shrink  # of a pixel: a mean has so much less
        rule = condition(picture, see, args.rule, args.passes, noise)
        beside = torch.cat([picture, see(picture)])
        if args.rule != "paper":
            passes = args.passes
            if args.rule == "gibbs" and model.process.n > 1:
                passes += 1
            note = f" with {passes} backward passes each"

    def pictures(array, labels):
        cells = rows(array, data.finish(beside, model.facts))
        return {"samples.png": png(cells)}

    say(f"{name} stands first in each row of samples.png")
    sample.draw_and_save(model, args, args.n, classes, pictures, note, condition=rule)


def main(argv=None):
    run(lambda: complete(Options(**vars(parser(Options(), __doc__).parse_args(argv)))))


if __name__ == "__main__":
    main()
