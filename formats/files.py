"""What every file of the project needs: errors of one line, files that appear whole, a cache."""

import hashlib
import json
import os
import sys
import textwrap
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

MARK = b"tEXtSoftware\0phase-ref"  # in each PNG that is written here, so that nobody trains on it


class UserError(Exception):
    """A mistake of the user, a broken file, a full disk: one line that names the cause and the
    fix. The scripts print that line; any other exception keeps its traceback."""


def why(error):
    """The text of an exception (or any other text) on one line."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


def shorten(names, width):
    """The first of many names, with commas, in so many characters."""
    return textwrap.shorten(", ".join(names), width, placeholder=" ...")


def say(text, stream=None, end="\n"):
    """Prints, by default to stdout. A terminal or pipe that is gone costs nothing."""
    with suppress(OSError, ValueError, AttributeError):
        print(text, file=stream, end=end, flush=True)


@contextmanager
def reading(path, fix):
    """Whatever numpy, Pillow, zipfile and others raise (a dozen kinds) becomes a UserError. They
    raise no NameError: that is of code which somebody edits, and keeps its traceback."""
    try:
        yield
    except (UserError, NameError):
        raise
    except Exception as error:
        raise UserError(f"cannot read {path} ({why(error)}): {fix}") from None


def write_files(files, fix="make room, or choose another folder"):
    """Write {path: bytes or function(file)}, all of them or none: first under temporary names,
    then each is renamed. UserError where that fails, with the fix."""
    temporary = {path: Path(f"{path}.{os.getpid()}.tmp") for path in files}
    try:
        for path, content in files.items():
            with open(temporary[path], "wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
    except (OSError, RuntimeError) as error:  # torch.save turns the first into the second
        raise UserError(f"cannot write {path} ({why(error)}): {fix}") from None
    finally:
        for name in temporary.values():
            if name.exists():
                name.unlink()


def make_folder(path):
    """The folder, made where it is missing. UserError where it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {path} ({why(error)}): choose another folder") from None
    return Path(path)


def absolute(path, fix="give another path"):
    """The absolute path, with ~ for a home folder. UserError where that is not known."""
    try:
        return Path(os.path.abspath(Path(path).expanduser()))
    except RuntimeError as error:
        raise UserError(f"no such folder: {path} ({why(error)}): {fix}") from None


def cache_dir():
    """The folder for downloads and converted pictures. It may be deleted at any time."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return absolute(folder, fix="set XDG_CACHE_HOME to a folder") / "phase-ref"


def cached(source, size, files, pictures, state):
    """What the generator `pictures` yields, uint8 (size, size, 3) each, as one memory-mapped array,
    and the `state` that it fills. Both are kept in the cache, until the name, size or time of one
    of the files changes."""
    # a changed file changes the name of the array in the cache
    stats = []
    for file in files:
        found = file.stat()
        stats.append((str(file.absolute()), found.st_size, found.st_mtime_ns))
    key = hashlib.sha256(repr(("3", size, stats)).encode()).hexdigest()
    target = cache_dir() / f"{source.stem[:50]}-{size}-{key[:16]}.npy"
    beside = target.with_suffix(".json")

    # what is missing or damaged is made again; write_files says what cannot be made
    with suppress(Exception):
        target.parent.mkdir(parents=True, exist_ok=True)
        return np.load(target, mmap_mode="r"), json.loads(beside.read_text())

    def write(file):
        # the header has 128 bytes for any n; it is written last, when n is known
        file.seek(128)
        n = 0
        for picture in pictures:
            file.write(picture.tobytes())
            n += 1
            if n % 500 == 0:
                say(f"{source}: {n} pictures read", sys.stderr, end="\r")
        file.seek(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, size, size, 3)}
        np.lib.format.write_array_header_1_0(file, header)

    def write_state(file):
        file.write(json.dumps(state).encode())

    write_files({target: write, beside: write_state}, "make room, or set XDG_CACHE_HOME")
    return np.load(target, mmap_mode="r"), state
