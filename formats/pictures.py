"""Pictures -> arrays: one picture, or a folder or zip of them. Needs Pillow.

Of each picture the central square, upright, on white, is brought to size x size by Lanczos'
filter; all are grey if each is. What lies below a folder counts, also through links, but not what
begins with a dot, nor what this program wrote: the folders of its runs, and its pictures, which
carry a mark.

    a/1.png b/2.png              classes a and b, numbers in their own order; one folder around
                                 them all changes nothing
    train/a/1.png test/a/2.png   classes a and b; the parts test, val, valid and validation, in any
                                 case, are held out
    00000/1.png dataset.json     EDM's and StyleGAN's layout: {"labels": [["00000/1.png", 3], ...]};
                                 null: no classes
    1.png a/2.png                no classes, as a picture lies beside them

The array is kept in the cache (formats/files.py), which may be deleted.
"""

import json
import math
import os
import sys
import zipfile
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from formats.files import MARK, UserError, cached, reading, say, shorten, why

FORMATS = "PNG JPEG WEBP GIF BMP TIFF PPM".split()  # Pillow's others could start foreign programs
ENDINGS = tuple(".png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .ppm .pgm".split())
HELD_OUT = {"test", "val", "valid", "validation"}
# files that mark the folder of a run, and what their first 4,000 bytes hold, unless they are empty
# (b"": anything): others have a log.txt, too
OF_A_RUN = {"ckpt.pt": b"", "samples.npz": b"", "log.txt": b"sigma_data="}
LARGEST = "largest value of 16 bits"
DARK = 2**14  # below it are rather 12 bits in 16, or 8
COLOUR = "in colour"
FIX = "give a picture or an .npy"


# -------------------------------------------------------------------------------------------------
# One picture


def opened(file, changes):
    """A picture file or path -> Pillow's image, upright, 8 bits, of mode RGB or RGBA. changes: a
    Counter, to which is added what was changed; of pictures of 16 bits also their largest value."""
    try:
        from PIL import Image, ImageOps, PngImagePlugin
    except ImportError:
        raise UserError("pip install pillow to read pictures, or give an .npy") from None

    PngImagePlugin.MAX_TEXT_CHUNK = 2**28  # texts and colour profiles may be long
    image = Image.open(file, formats=FORMATS)
    changes["further frames not read"] += getattr(image, "n_frames", 1) - 1
    # of colours of 16 bits Pillow keeps the upper eight: tile tells PNG's "RGB;16B", PPM's 65535
    stored = str(image.tile)
    has_16_bits = ";16" in stored or "65535" in stored
    image = ImageOps.exif_transpose(image)

    # grey of 16 bits is brought to 8 here, colour by Pillow
    largest = 0
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("its values are not integers from 0 to 65535")
        largest = int(values.max())
        image = Image.fromarray((values / 257).round().astype(np.uint8))  # 65535/255
    elif has_16_bits and not image.has_transparency_data:
        largest = 257 * int(np.max(image.convert("RGB")))
    changes[LARGEST] = max(changes[LARGEST], largest)

    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            return image
    return image.convert("RGB")


def decode(file, changes, size=0):
    """A picture file or path -> uint8 (H, W, 3), upright, on white, or its central square of
    `size`. changes: as `opened` says."""
    image = opened(file, changes)
    from PIL import Image, ImageOps

    if image.mode == "RGBA":
        changes["transparent"] += 1
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if size:
        changes["enlarged"] += min(image.size) < size
        changes["cropped to the central square"] += image.width != image.height
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    changes[COLOUR] += int((pixels != pixels[..., :1]).any())
    return pixels


def read(path):
    """One picture, or an .npy of uint8 -> uint8 (H, W) or (H, W, C), on white. UserError says what
    is wrong with it."""
    with reading(path, FIX):
        if str(path).endswith(".npy"):
            array = np.load(path, allow_pickle=False)
        else:
            changes = Counter()
            array = decode(path, changes)
            if 0 < changes[LARGEST] < DARK:
                raise ValueError("its 16-bit values are all small: give an .npy of 8 bits")
        is_picture = array.ndim > 1 and array.shape[2:] in ((), (1,), (3,))
        if array.dtype != np.uint8 or not is_picture or not array.size:
            raise ValueError(f"it is {array.dtype} {array.shape}, not uint8 (H, W) or (H, W, C)")
    return array


def read_mask(path):
    """One picture, or an .npy of numbers from 0 to 1 or from 0 to 255 -> uint8 (H, W): the alpha
    channel where a picture has one, else its grey."""
    with reading(path, FIX):
        if str(path).endswith(".npy"):
            array = np.load(path, allow_pickle=False)
            array = np.float64(array.squeeze())
            if array.ndim != 2 or not np.isfinite(array).all():
                raise ValueError("a mask is numbers of shape (H, W)")
            if array.max() <= 1:
                array = 255 * array
            return array.clip(0, 255).astype(np.uint8)
        image = opened(path, Counter())
        if image.mode == "RGBA":
            return np.asarray(image.getchannel("A"))
        return np.asarray(image.convert("L"))


# -------------------------------------------------------------------------------------------------
# A folder or zip of pictures


def load(path, size):
    """A folder or zip of pictures -> what a data set is made of, by name: array uint8 (N, size,
    size, C); labels (N,); names of the classes; held_out, rows; no_labels, why there are none;
    files, the name of each. What was found, and what was left out, goes to stderr in one line."""
    found, lists, left_out = sort_out(path)
    array, (files, changes, skipped) = converted(path, size, found)
    largest = changes.pop(LARGEST, 0)
    if 0 < largest < DARK:
        raise UserError(
            f"{path} has pictures of 16 bits whose largest value is {largest}, where 65535 is"
            " white: give their values as one .npy of uint16 (N, H, W, C)"
        )
    about = by_list(files, lists) if lists else by_folder(files)
    classes = about.get("names", [])

    counts = {
        f"pictures of {size} x {size} pixels": len(files),
        f"classes ({shorten(classes, 200)})": len(classes),
        "held out": len(about.get("held_out", [])),
        **changes,
        **left_out,
        f"broken pictures skipped: {shorten(skipped, 200)}": len(skipped),
    }
    said = [f"{count} {what}" for what, count in counts.items() if count]
    text = " ".join(", ".join(said).split()) or "it is empty"
    if not files:
        wanted = f"give a folder or zip with {' '.join(ENDINGS)}"
        raise UserError(f"no pictures in {path} ({text}): {wanted}")
    say(f"{path}: {text}", sys.stderr)
    if not changes.get(COLOUR):
        array = array[..., :1]
    return {"array": array, "files": files, **about}


def sort_out(path):
    """What is in a folder or zip: its pictures {name: function that opens it}, sorted; likewise
    each dataset.json; and what is left out, {what: how many}."""
    left_out = Counter()
    with reading(path, "give a folder or zip of pictures"):
        files = walk(path, left_out) if path.is_dir() else members(path)

    # the folders of runs, but for the one that was asked for
    runs = set()
    for name, open_file in files.items():
        place = Path(name)
        if place.name in OF_A_RUN:
            with suppress(Exception), open_file() as file:
                head = file.read(4000)
                if not head or OF_A_RUN[place.name] in head:
                    runs.add(place.parent)
    runs.discard(Path())

    pictures = {}
    lists = {}
    for name in sorted(files):
        place = Path(name)
        if not runs.isdisjoint(place.parents):
            left_out["files in run folders of this program left out"] += 1
        elif "/." in f"/{name}":
            left_out["hidden files not read"] += 1
        elif place.suffix.lower() in ENDINGS:
            pictures[name] = files[name]
        elif place.name == "dataset.json":
            lists[name] = files[name]
        else:
            left_out[f"{place.suffix.lower()} files not read"] += 1
    return pictures, lists, left_out


def walk(folder, left_out):
    """{name: function that opens it} of the files below the folder; links that lead nowhere are
    counted. Links to other folders are followed, but none into or around the folder itself, nor to
    one met before: that would double files."""

    def refuse(error):
        raise error

    root = folder.resolve()
    met = set()
    files = {}
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        for name in list(folders):
            path = Path(here, name)
            real = path.resolve()
            is_around = real.is_relative_to(root) or root.is_relative_to(real)
            if real in met or (path.is_symlink() and is_around):
                folders.remove(name)
            else:
                met.add(real)
        for name in names:
            path = Path(here, name)
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = partial(open, path, "rb")
            else:
                left_out["broken links"] += 1
    return files


def members(path):
    """{name: function that opens it} of the files in a zip; Windows' backslashes are slashes."""
    archive = zipfile.ZipFile(path)
    files = {}
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        if not name.endswith("/"):
            files[Path(name).as_posix()] = partial(archive.open, info)
    return files


def converted(path, size, found):
    """The pictures {name: function that opens it} as uint8 (N, size, size, 3); and what happened:
    the files that were read, the changes {what: how often}, what was skipped (name and reason)."""
    files = []
    changes = Counter()
    skipped = []

    def squares():
        for name, open_file in found.items():
            try:
                with open_file() as file:
                    if MARK in file.read(100):
                        changes["pictures that this program drew left out"] += 1
                        continue
                    file.seek(0)
                    square = decode(file, changes, size)
            except (UserError, NameError):
                raise
            except Exception as error:  # Pillow raises a dozen kinds
                if isinstance(error, MemoryError) or getattr(error, "errno", None):
                    fix = "mend or remove it"  # it may be read tomorrow
                    raise UserError(f"cannot read {name} of {path} ({why(error)}): {fix}") from None
                skipped.append(f"{name} ({why(error)})")
                continue
            files.append(name)
            yield square

    # the array of before, with the lists beside it, or squares(), which fills these
    sources = [path / name for name in found] if path.is_dir() else [path]
    return cached(path, size, sources, squares(), [files, changes, skipped])


# -------------------------------------------------------------------------------------------------
# Classes: labels (N,), or no_labels, why there are none; names of the classes; held_out rows


def by_list(files, lists):
    """The classes as the outermost dataset.json has them. lists: {name: function that opens it}."""
    index = min(lists, key=len)
    folder = Path(index).parent
    labels = {}
    try:
        with lists[index]() as file:
            pairs = json.load(file)["labels"]
        for name, label in pairs or []:
            path = folder / name.replace("\\", "/")
            labels[path.as_posix()] = label
        for name in files:
            label = labels.get(name)
            if type(label) is not int or not 0 <= label < 10_000:
                raise ValueError(f"{name} has {label!r:.20}")
        return {"labels": np.array([labels[name] for name in files])}
    except Exception as error:  # of JSON, and of whatever else may be in one
        reason = f"{index} gives no class from 0 to 9999 to each picture ({why(error)})"
        return {"no_labels": reason}


def by_folder(files):
    """The classes by the folders that the pictures are in."""
    folders = [name.split("/")[:-1] for name in files]
    about = {}
    # the outermost folders, until they are classes: one around all says nothing, and train and test
    # say what is held out
    while folders and all(folders):
        outer = [folder[0] for folder in folders]
        lowered = [name.lower() for name in outer]
        if not about and "train" in lowered and HELD_OUT & set(lowered):
            about["held_out"] = np.flatnonzero([name in HELD_OUT for name in lowered])
        elif len(set(outer)) > 1:
            classes = sorted(set(outer), key=by_number)
            number = {name: i for i, name in enumerate(classes)}
            labels = np.array([number[name] for name in outer])
            return about | {"labels": labels, "names": classes}
        folders = [folder[1:] for folder in folders]

    if any(folders):
        stray = files[folders.index([])]
        about["no_labels"] = f"{why(stray)} lies beside the class folders"
    return about


def by_number(name):
    """A key that sorts numbers by their size, before other names."""
    number = int(name) if name.isdecimal() else math.inf
    return number, name
