"""Conditional generation without retraining: what takes the place of `denoise` in a sampler, called as predict(m, t).

Known of x (B, C, H, W) is see(x), an orthogonal projection. Make a rule for each sampling: it changes m, and remembers.
"""

from functools import partial

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, interpolate

from data import UserError, why
from extras.pictures import decode


def observation(mask=None, shrink=1):
    """see: x where mask (H, W) is 1 and 0 where it is 0, or each shrink x shrink block's mean in all of its pixels."""
    if mask is not None:
        return lambda x: x * mask.to(x)
    return lambda x: interpolate(avg_pool2d(x, shrink), scale_factor=shrink)


def by_covariance(method, process, net, see, known, passes=2, noise=0.0, label=None, randn=None):
    """The posterior mean x' given known = see(x) + see(noise), white noise of that standard deviation; exact for
    Gaussian data (moment matching, Rozet et al. 2024). As Cov[x | y] = sigma^2 J, J = dD/dy (Tweedie), it is x' = D +
    J H (H J H + noise^2/sigma^2)^-1 (known - H D), H = see, by conjugate gradients; each of the passes goes backward
    through the net, as J is taken for symmetric. With randn(x), unit noise like x, it is the rule "gibbs": before each
    call `redraw` acts, given the last call's draw of x, or the errors of a network's J would add up. That is x' plus
    white noise of variance sigma^2 mean(diag J), by Hutchinson's estimate, one more pass, of what is known `left`."""
    last, total = None, partial(torch.sum, dim=(1, 2, 3), keepdim=True)  # last: the draw of x at the call before

    def predict(m, t):
        nonlocal last
        if last is not None:
            redraw(method, process, m, t, last, randn)
        w, snr = method.to_z(process, t)
        with torch.enable_grad():
            z = method.mix(w, m).requires_grad_()
            D = method.denoise_y(process, net, z, snr.expand(len(m)), label)
        x, root = D.detach(), float(snr.sqrt())  # root: 1 / sigma
        p = rest = known - see(x)
        for _ in range(passes):
            (Jp,) = torch.autograd.grad(D, z, p, retain_graph=True)  # dD/dz = sigma J
            Ap = see(Jp) + noise**2 * root * p
            size = total(rest**2)
            step = (size / total(p * Ap)).nan_to_num(posinf=0.0).clamp(min=0)  # J is a network's
            x, rest = x + step * Jp, rest - step * Ap
            p = rest + (total(rest**2) / size).nan_to_num() * p
        x = (x if noise else x + known - see(x)).clamp(-process.bound, process.bound)
        if randn and process.n > 1:
            n = randn(x)
            (Jn,) = torch.autograd.grad(D, z, n)
            variance = (total(n * Jn) / total(n**2) / root).clamp(min=1e-12)
            left = noise / (variance + noise**2).sqrt()
            last = x + variance.sqrt() * (n - (1 - left) * see(n))
        return x

    return predict


def by_redrawing(method, process, predict, see, known, randn=torch.randn_like):
    """The AGM paper's inpainting: what is known goes into each prediction, given which `redraw` acts."""

    def conditioned(m, t):
        x = predict(m, t)
        x = x + known - see(x)
        redraw(method, process, m, t, x, randn)
        return x

    return conditioned


def by_stroke(method, process, predict, stroke, calls, randn=torch.randn_like):
    """The AGM paper's dyn-v: before each of the first `calls` calls `redraw` acts, given the stroke."""
    left = iter(range(calls))

    def conditioned(m, t):
        if next(left, None) is not None:
            redraw(method, process, m, t, stroke, randn)
        return predict(m, t)

    return conditioned


def redraw(method, process, m, t, x, randn):
    """Draws v (HOLD: all auxiliary blocks) of m anew, in place, given its data block and x: in m = mu x + L eps, L
    lower, the noise of the data block stays and the rest of eps is fresh."""
    mean, L, C = process.mean(t), process.cholesky(t), x.shape[1]
    eps = torch.cat([(m[:, :C] - float(mean[0]) * x) / float(L[0, 0]), randn(m[:, C:])], 1)
    m[:, C:] = (method.mix(mean[:, None], x) + method.mix(L, eps))[:, C:]


def given(args, method, process, facts, held_out=None):
    """Options of sample.py, None where not given -> (start, note), or (None, "") where nothing is given. note: what a
    call costs besides. start(m, net, label, randn) -> m and predict, once for each batch; it calls net(y, t, label).
    held_out: with --held-out, that sample (1, C, H, W) in network units."""
    of_stroke, of_rest = {"stroke", "inject", "share"}, {"inpaint", "mask", "shrink", "rule", "passes", "noise"}
    asked = {flag for flag in of_stroke | of_rest | {"held_out"} if getattr(args, flag) is not None}
    if not asked:
        return None, ""
    stroke, rule, k, (C, *size) = bool(asked & of_stroke), args.rule or "gibbs", args.shrink or 1, facts["shape"]
    redraws = process.n > 1 and (args.inject != "init" if stroke else rule != "covariance")
    for wrong, text in (
        (len(asked & {"stroke", "inpaint", "held_out"}) != 1, "give one of --stroke, --inpaint, --held-out"),
        (stroke and asked & of_rest, "--inject and --share are for a stroke, the others for the rest of a picture"),
        (facts["kind"] != "image", f"only for networks of 8-bit images, this one has {facts['kind']} data"),
        (redraws and args.sampler == "strang", "strang loses what is redrawn: choose another --sampler"),
        (stroke and process.n == 1, "HOLD of order 1 has nothing that a stroke could act on: --order 2 or more"),
        (not stroke and rule != "paper" and process.target != "data", f"{rule} wants target data: add --rule paper"),
        (not stroke and (args.mask is None) == (args.shrink is None), "add --mask FILE or --shrink K: what is known?"),
        (any(side % k for side in size), f"--shrink must divide {size}"),
    ):
        if wrong:
            raise UserError(f"{' '.join('--' + flag.replace('_', '-') for flag in sorted(asked))}: {text}")
    mask = None if args.mask is None else read("--mask", args.mask, (1, *size))[0, 0] > 127
    if mask is not None and len(mask.unique()) == 1:
        raise UserError(f"--mask {args.mask}: {'all' if mask.any() else 'no'} pixels are known, that is white")
    see, flag, file = observation(mask, k), "--stroke" if stroke else "--inpaint", args.stroke or args.inpaint
    picture = read(flag, file, (C, *size), k) / 127.5 - 1 if file else held_out
    calls = 0 if args.inject == "init" else int(np.ceil((0.25 if args.share is None else args.share) * args.nfe))
    passes, noise = args.passes or 2, (args.noise or 0.0) / 127.5 * k  # a block of means c has the norm k |c|

    def start(m, net, label, randn):
        m, x, predict = m.clone(), picture.to(m), partial(method.denoise, process, net, label=label)
        if args.inject == "init":  # v0 <- .9 v0 + .1 stroke; HOLD: the auxiliary blocks, in the direction of their mean
            mean = process.mean(process.first)[1:]
            m[:, C:] = 0.9 * m[:, C:] + method.mix((0.1 * mean / mean.norm())[:, None], x)
        if stroke:
            return m, by_stroke(method, process, predict, x, calls, randn)
        if rule == "paper":
            return m, by_redrawing(method, process, predict, see, see(x), randn)
        return m, by_covariance(method, process, net, see, see(x), passes, noise, label, randn if redraws else None)

    return start, "" if stroke or rule == "paper" else f" with {passes + redraws} backward passes each"


def read(flag, path, shape, k=1):
    """An .npy, or with Pillow any picture, brought to `shape` (C, H, W) as training does: (1, C, H, W), 0 to 255. One
    of (H/k, W/k) becomes blocks. A mask may have two values, 0 and 1. UserError, also for an alpha channel."""
    C, H, W = shape
    try:
        if str(path).endswith(".npy"):
            array = np.load(path, allow_pickle=False)
            if flag == "--mask" and array.max() <= 1:
                array = np.uint8(255) * (array > 0.5)
        else:
            image, changed = decode(path)
            if "transparent" in changed and flag != "--stroke":
                raise ValueError("it has an alpha channel: save it without, and mark what is known by --mask")
            array = np.asarray(image.convert("L" if C == 1 else "RGB"))
        array = array[..., 0] if array.shape[2:] == (1,) else array
        if array.dtype != np.uint8 or array.ndim < 2 or array.shape[2:] not in ((), (C,)):
            raise ValueError(f"it is {array.dtype} {array.shape}, not uint8 (H, W) or (H, W, {C})")
        if array.shape[:2] not in ((H, W), (H // k, W // k)):
            from PIL import Image, ImageOps

            array = np.asarray(ImageOps.fit(Image.fromarray(array), (W, H), Image.Resampling.LANCZOS))
    except ImportError:
        raise UserError(f"{flag}: pip install pillow, or give an .npy of {H} x {W} pixels") from None
    except Exception as error:  # numpy and Pillow raise a dozen kinds
        raise UserError(f"cannot read {flag} {path}: {why(error)}") from None
    x = torch.from_numpy(array.astype(np.float32)).reshape(*array.shape[:2], -1).movedim(2, 0).expand(C, -1, -1)
    return interpolate(x[None], (H, W))
