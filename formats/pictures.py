"""Pictures -> arrays: one picture, or a folder or zip of them. Needs Pillow.

Of each picture the central square, upright, on white, is brought to size x size by Lanczos'
filter; all are grey if each is. What lies below a folder counts, also through links, but not what
begins with a dot or is in __MACOSX, nor what this program wrote: the folders of its runs, and its
pictures, which carry a mark.

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
import os
import sys
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

from formats.files import MARK, UserError, cached, say, why

FORMATS = "PNG JPEG WEBP GIF BMP TIFF PPM".split()  # Pillow's others could start foreign programs
ENDINGS = tuple(".png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .ppm .pgm".split())
HELD_OUT = {"test", "val", "valid", "validation"}
OF_A_RUN = {"ckpt.pt", "log.txt", "samples.npz"}  # files that mark a folder of this program
CHANNELS = ((), (1,), (3,))
DEEP = "largest of 16 bits"
COLOUR = "in colour"


# -------------------------------------------------------------------------------------------------
# One picture


def opened(file):
    """A picture file or path -> Pillow's image, upright, 8 bits, of mode RGB or RGBA; and what was
    changed in it, {what: how many}; of pictures of 16 bits also their largest value."""
    from PIL import Image, ImageOps, PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK = 2**28  # texts and colour profiles may be long
    PngImagePlugin.MAX_TEXT_MEMORY = 2**28
    image = Image.open(file, formats=FORMATS)
    changes = {}
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        changes["further frames not read"] = frames - 1
    stored = str(image.tile)  # of colours of 16 bits Pillow keeps the upper eight
    has_16_bits = ";16" in stored or "65535" in stored
    image = ImageOps.exif_transpose(image)

    if image.mode == "F":
        raise ValueError("its pixels are floats")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its values are not from 0 to 65535")
        changes[DEEP] = int(values.max())
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif has_16_bits and not image.has_transparency_data:
        changes[DEEP] = 257 * int(np.asarray(image.convert("RGB")).max())

    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            return image, changes
    return image.convert("RGB"), changes


def decode(file, size=0):
    """A picture file or path -> Pillow's image, 8-bit RGB, upright, on white, or its central square
    of `size`; and what was changed, as `opened` says."""
    from PIL import Image, ImageOps

    image, changes = opened(file)
    if image.mode == "RGBA":
        changes["transparent"] = 1
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if size:
        if min(image.size) < size:
            changes["enlarged"] = 1
        if image.width != image.height:
            changes["cropped to the central square"] = 1
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return image, changes


def read(path):
    """One picture, or an .npy of uint8 -> uint8 (H, W) or (H, W, C), on white. UserError says what
    is wrong with it."""
    with reading(path):
        if str(path).endswith(".npy"):
            array = np.load(path, allow_pickle=False)
        else:
            image, changes = decode(path)
            array = np.asarray(image)
            if 0 <= changes.get(DEEP, -1) < 2**14:
                raise ValueError("its 16-bit values are all small: give an .npy of 8 bits")
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in CHANNELS:
            raise ValueError(f"it is {array.dtype} {array.shape}, not uint8 (H, W) or (H, W, C)")
        if not array.size:
            raise ValueError("it is empty")
    return array


def read_mask(path):
    """One picture, or an .npy of numbers from 0 to 1 or from 0 to 255 -> uint8 (H, W): the alpha
    channel where a picture has one, else its grey."""
    with reading(path):
        if str(path).endswith(".npy"):
            array = np.load(path, allow_pickle=False)
            array = array.reshape(array.shape[:2]).astype(float)
            if array.max() <= 1:
                array = 255 * array
            return array.clip(0, 255).astype(np.uint8)
        image, _ = opened(path)
        return np.asarray(image.getchannel("A") if image.mode == "RGBA" else image.convert("L"))


@contextmanager
def reading(path):
    """Whatever Pillow and numpy raise (a dozen kinds) becomes a UserError."""
    try:
        yield
    except ImportError:
        raise UserError(f"pip install pillow to read {path}, or give an .npy") from None
    except Exception as error:
        raise UserError(f"cannot read {path} ({why(error)}): give a picture or an .npy") from None


# -------------------------------------------------------------------------------------------------
# A folder or zip of pictures


def load(path, size):
    """A folder or zip of pictures -> what a data set is made of, by name: array uint8 (N, size,
    size, C); labels (N,) or None; names of the classes; held_out, rows or None; no_labels, why
    there are none; files, the name of each. What was found, and what was left out, goes to stderr
    in one line."""
    found, index, left_out = sort_out(path)
    array, state = converted(path, size, found)
    names = state["names"]
    if 0 <= state["largest"] < 2**16 // 4:
        raise UserError(
            f"{path} has pictures of 16 bits whose largest value is {state['largest']}, where 65535"
            " is white: give their values as one .npy of uint16 (N, H, W, C)"
        )
    if index:
        labels, classes, held_out, reason = by_list(names, *index)
    else:
        labels, classes, held_out, reason = by_folder(names)

    said = [f"{len(names)} pictures of {size} x {size} pixels"] if names else []
    if classes:
        more = ", ..." if len(classes) > 20 else ""
        said.append(f"{len(classes)} classes ({', '.join(classes[:20])}{more})")
    if held_out is not None:
        said.append(f"{len(held_out)} held out")
    said += [f"{count} {what}" for what, count in state["changed"].items()]
    said += left_out
    if state["ours"]:
        said.append(f"{state['ours']} pictures that this program drew left out")
    if state["skipped"]:
        examples = ", ".join(state["skipped"][:5])
        said.append(f"{len(state['skipped'])} broken pictures skipped: {examples}")
    text = " ".join(", ".join(said).split()) or "it is empty"
    if not names:
        wanted = f"give a folder or zip with {' '.join(ENDINGS)}"
        raise UserError(f"no pictures in {path} ({text}): {wanted}")
    say(f"{path}: {text}", sys.stderr)
    return {
        "array": array if COLOUR in state["changed"] else array[..., :1],
        "labels": labels,
        "names": classes,
        "held_out": held_out,
        "no_labels": reason,
        "files": names,
    }


def is_our_log(opened):
    """Whether a log.txt is that of train.py, which begins with the process; or of a run that has
    just begun. Others have files of that name, too."""
    with suppress(Exception), opened() as file:
        head = file.read(4000)
        return not head or b"sigma_data=" in head
    return False


def sort_out(path):
    """The pictures of a folder or zip {name: function that opens it}, sorted; its dataset.json
    (name, function) or None; and what else is there, in words."""
    try:
        files, broken_links = walk(path) if path.is_dir() else (members(path), 0)
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        fix = "give a folder or zip of pictures"
        raise UserError(f"cannot read {path} ({why(error)}): {fix}") from None

    run_folders = set()
    for name in files:
        folder, _, last = name.rpartition("/")
        if last in OF_A_RUN and (last != "log.txt" or is_our_log(files[name])):
            run_folders.add(folder)
    run_folders.discard("")  # the folder that was asked for
    found = {}
    lists = []
    others = Counter()
    of_runs = 0
    for name in sorted(files):
        parts = name.split("/")
        if any("/".join(parts[:i]) in run_folders for i in range(1, len(parts))):
            of_runs += 1
        elif "__MACOSX" in parts or any(part.startswith(".") for part in parts):
            others["hidden"] += 1
        elif name.lower().endswith(ENDINGS):
            found[name] = files[name]
        elif parts[-1] == "dataset.json":
            lists.append(name)
        else:
            others[Path(name).suffix.lower() or "without ending"] += 1

    index = None
    if lists:
        nearest = min(lists, key=len)
        others[".json"] += len(lists) - 1
        index = (nearest, files[nearest])
    left_out = []
    if others.total():
        kinds = [f"{count} {kind}" for kind, count in others.most_common() if count]
        left_out.append(f"{others.total()} files not read ({', '.join(kinds)})")
    if of_runs:
        left_out.append(f"{of_runs} files in run folders of this program left out")
    if broken_links:
        left_out.append(f"{broken_links} broken links")
    return found, index, left_out


def walk(folder):
    """{name: function that opens it} of the files below the folder, and how many links lead
    nowhere. Links to other folders are followed, but none into or around the folder itself, nor to
    one met before: that would double files."""
    root = folder.resolve()
    met = set()
    closed = []
    paths = []
    for here, folders, names in os.walk(folder, onerror=closed.append, followlinks=True):
        for name in list(folders):
            path = Path(here, name)
            real = path.resolve()
            is_around = real.is_relative_to(root) or root.is_relative_to(real)
            if real in met or (path.is_symlink() and is_around):
                folders.remove(name)
            else:
                met.add(real)
        paths += [Path(here, name) for name in names]
    if closed:
        raise closed[0]
    files = {}
    for path in paths:
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = partial(open, path, "rb")
    return files, len(paths) - len(files)


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
    the names that were read, what was changed {what: how often}, the largest value of 16 bits or
    -1, what was skipped (name and reason), how many are ours."""
    changed = Counter()
    state = {"names": [], "changed": changed, "largest": -1, "skipped": [], "ours": 0}

    def squares():
        for name, open_file in found.items():
            try:
                with open_file() as file:
                    if MARK in file.read(100):
                        state["ours"] += 1
                        continue
                with open_file() as file:
                    image, changes = decode(file, size)
            except ImportError:
                raise UserError(f"pip install pillow to read the pictures of {path}") from None
            except Exception as error:  # Pillow raises a dozen kinds
                if isinstance(error, MemoryError) or getattr(error, "errno", None):
                    fix = "mend or remove it"  # it may be read tomorrow
                    raise UserError(f"cannot read {name} of {path} ({why(error)}): {fix}") from None
                state["skipped"].append(f"{name} ({why(error)})")
                continue
            square = np.asarray(image)
            if (square != square[..., :1]).any():
                changes[COLOUR] = 1
            state["largest"] = max(state["largest"], changes.pop(DEEP, -1))
            changed.update(changes)
            state["names"].append(name)
            yield square

    sources = [path / name for name in found] if path.is_dir() else [path]
    return cached(path, size, sources, squares(), state)


# -------------------------------------------------------------------------------------------------
# Classes: labels (N,) or None, the names of the classes, held-out rows or None, why no labels


def by_list(names, index, open_index):
    """The classes as a dataset.json has them: its name, and the function that opens it."""
    try:
        with open_index() as file:
            pairs = json.load(file)["labels"] or []
        folder = Path(index).parent
        labels = {(folder / name.replace("\\", "/")).as_posix(): label for name, label in pairs}
    except Exception as error:  # of JSON, and of whatever else may be in one
        return None, [], None, f"{index} is of another kind ({why(error)})"
    for name in names:
        label = labels.get(name)
        if type(label) is not int or not 0 <= label < 10_000:
            return None, [], None, f"{index} gives {why(name)} no class from 0 to 9999"
    return np.array([labels[name] for name in names]), [], None, ""


def by_folder(names):
    """The classes by the folders that the pictures are in."""
    folders = [name.split("/")[:-1] for name in names]
    held_out = None
    while folders and all(folders):
        outer = [folder[0].lower() for folder in folders]
        if held_out is None and "train" in outer and HELD_OUT & set(outer):
            held_out = np.flatnonzero([part in HELD_OUT for part in outer])
        elif len({folder[0] for folder in folders}) > 1:
            break  # these are the classes, below the folders around them all
        folders = [folder[1:] for folder in folders]
    classes = sorted({folder[0] for folder in folders if folder}, key=by_number)
    if not all(folders):
        reason = ""
        if classes:
            stray = names[folders.index([])]
            reason = f"{why(stray)} lies beside the class folders"
        return None, [], held_out, reason
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[folder[0]] for folder in folders]), classes, held_out, ""


def by_number(name):
    """A key that sorts numbers by their size, before other names."""
    if name.isdecimal():
        return 0, int(name), name
    return 1, 0, name
