"""A folder or zip of pictures -> one .npy in the cache. Needs Pillow. Of each picture the central square, upright, on
white, is brought to size x size by Lanczos' filter; grey if all are. What lies below the folder counts, also through
links, but not what begins with a dot or is in __MACOSX.

    a/1.png b/2.png              classes a and b, numbers in their own order; one folder around them all changes nothing
    train/a/1.png test/a/2.png   classes a and b; the parts test, val, valid and validation, in any case, are held out
    00000/1.png dataset.json     EDM's and StyleGAN's layout: {"labels": [["00000/1.png", 3], ...]}; null: no classes
    1.png a/2.png                no classes, as a picture lies beside them
"""

import hashlib
import json
import os
import sys
import zipfile
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from data import UserError, cache_dir, why, write_files

FORMATS = "PNG JPEG WEBP GIF BMP TIFF PPM".split()  # Pillow's others could start foreign programs
ENDINGS = ".png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .ppm .pgm".split()
HELD_OUT = {"test", "val", "valid", "validation"}


def load(path, size):
    """A folder or zip of pictures -> uint8 (N, size, size, C), labels (N,) or None, names of the classes, held-out rows
    or None, and why there are no labels. What was found and what was left out goes to stderr in one line."""
    try:
        files, broken = walk(path) if path.is_dir() else (members(path), 0)
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"cannot read {path} ({why(error)}): give a folder or zip of pictures") from None
    seen = [n for n in files if not any(part.startswith(".") or part == "__MACOSX" for part in n.split("/"))]
    names = sorted(n for n in seen if n.lower().endswith(tuple(ENDINGS)))
    index = min((n for n in seen if n.split("/")[-1] == "dataset.json"), key=len, default=None)
    others = Counter(Path(n).suffix.lower() or "without ending" for n in {*seen} - {*names, index})
    others += Counter(hidden=len(files) - len(seen))
    read, skipped = {}, []  # {name: what was changed in it}, [name and reason]

    def squares():
        for name in names:
            try:
                with files[name]() as file:
                    image, changed = decode(file, size)
            except ImportError:
                raise UserError(f"pip install pillow to read the pictures of {path}") from None
            except Exception as error:  # Pillow raises a dozen kinds
                if isinstance(error, MemoryError) or getattr(error, "errno", None):  # it may be read tomorrow
                    raise UserError(f"cannot read {name} of {path} ({why(error)}): mend or remove it") from None
                skipped.append(f"{name} ({why(error)})")
            else:
                square = np.asarray(image)
                read[name] = changed + ["in colour"] * bool((square != square[..., :1]).any())
                yield square

    sources = [path / n for n in names] if path.is_dir() else [path]
    array, (read, skipped) = cached(path, size, sources, squares(), (read, skipped))
    changed = Counter(what for each in read.values() for what in each)
    array = array if changed["in colour"] else array[..., :1]
    labels, classes, held_out, reason = by_list([*read], index, files[index]) if index else by_folder([*read])
    found = {f"pictures {array.shape[1:]}": len(array), f"classes ({', '.join(classes[:20])})": len(classes), **changed}
    found["held out"] = 0 if held_out is None else len(held_out)
    found[f"files not read ({', '.join(f'{n} {what}' for what, n in others.most_common())})"] = others.total()
    found["broken links"], found[f"broken pictures skipped: {', '.join(skipped[:5])}"] = broken, len(skipped)
    text = " ".join(", ".join(f"{count} {what}" for what, count in found.items() if count).split())
    if not read:
        raise UserError(f"no pictures in {path} ({text}): give a folder or zip with {' '.join(ENDINGS)}")
    print(f"{path}: {text}", file=sys.stderr)
    return array, labels, classes, held_out, reason


def walk(folder):
    """{name: function that opens it} of the files below the folder, and how many links lead nowhere. Links to other
    folders are followed, but none into or around the folder itself, nor to one met before: that would double files."""
    root, met, paths, closed = folder.resolve(), set(), [], []
    for here, folders, names in os.walk(folder, onerror=closed.append, followlinks=True):
        for path in [Path(here, name) for name in folders]:
            real = path.resolve()
            if real in met or (path.is_symlink() and (real.is_relative_to(root) or root.is_relative_to(real))):
                folders.remove(path.name)
            else:
                met.add(real)
        paths += [Path(here, name) for name in names]
    if closed:
        raise closed[0]
    files = {p.relative_to(folder).as_posix(): partial(open, p, "rb") for p in paths if p.is_file()}
    return files, len(paths) - len(files)


def members(path):
    """{name: function that opens it} of the files in a zip; Windows' backslashes are slashes."""
    archive = zipfile.ZipFile(path)
    files = {info.filename.replace("\\", "/"): partial(archive.open, info) for info in archive.infolist()}
    return {Path(name).as_posix(): opened for name, opened in files.items() if not name.endswith("/")}


def by_list(names, index, opened):
    """The same as by_folder, as a dataset.json has it: its name, and the function that opens it."""
    try:
        with opened() as file:
            pairs = json.load(file)["labels"] or []
        labels = {(Path(index).parent / name.replace("\\", "/")).as_posix(): label for name, label in pairs}
    except Exception as error:  # of JSON, and of whatever else may be in one
        return None, [], None, f"{index} is of another kind ({why(error)})"
    for name in names:
        if type(labels.get(name)) is not int or labels[name] not in range(10_000):
            return None, [], None, f"{index} gives {why(name)} no class from 0 to 9999"
    return np.array([labels[name] for name in names]), [], None, ""


def by_folder(names):
    """Labels (N,) of the pictures or None, the names of the classes, held-out rows or None, why there are no labels."""
    folders, held_out = [name.split("/")[:-1] for name in names], None
    while folders and all(folders):
        parts = [f[0].lower() for f in folders]
        if held_out is None and "train" in parts and HELD_OUT & {*parts}:
            held_out = np.flatnonzero([part in HELD_OUT for part in parts])
        elif len({f[0] for f in folders}) > 1:
            break  # these are the classes, below the folders around them all
        folders = [f[1:] for f in folders]
    classes = sorted({f[0] for f in folders if f}, key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n))
    if not all(folders):
        return None, [], held_out, f"{why(names[folders.index([])])} lies beside the class folders" if classes else ""
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[f[0]] for f in folders]), classes, held_out, ""


def decode(file, size=0):
    """A picture file or path -> Pillow's image, 8-bit RGB, upright, on white, or its square of `size`; what changed."""
    from PIL import Image, ImageOps, PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # of texts and colour profiles
    image = ImageOps.exif_transpose(Image.open(file, formats=FORMATS))
    changed = ["enlarged"] if min(image.size) < size else []
    if image.mode == "F":
        raise ValueError("its pixels are floats")
    if image.mode.startswith("I"):  # of 16 bits
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        changed.append("transparent")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS) if size else image, changed


def cached(source, size, files, pictures, state):
    """What the generator `pictures` yields, uint8 (size, size, 3) each, as one memory-mapped array, and the `state`
    that it fills. Both are kept, until the name, size or time of one of the files changes."""
    stats = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr((size, stats)).encode()).hexdigest()[:16]
    target = cache_dir() / f"{source.stem[:50]}-{size}-{key}.npy"
    beside, fix = target.with_suffix(".json"), "make room, or set XDG_CACHE_HOME to another folder"

    def write(file):
        file.seek(128)  # past the header, of 128 bytes for any n, which is written last: only then n is known
        n = 0
        for n, picture in enumerate(pictures, 1):
            file.write(np.ascontiguousarray(picture))
            if n % 500 == 0:
                print(f"{source}: {n} pictures read", end="\r", file=sys.stderr, flush=True)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(n, size, size, 3)))

    with suppress(Exception):  # what is missing or damaged is made again, and write_files will say what cannot be
        target.parent.mkdir(parents=True, exist_ok=True)
        return np.load(target, mmap_mode="r"), json.loads(beside.read_text())
    write_files({target: write, beside: lambda file: file.write(json.dumps(state).encode())}, fix)
    return np.load(target, mmap_mode="r"), state
