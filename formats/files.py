"""What every file of the project needs: errors of one line, files that appear whole, the cache."""

import os
from pathlib import Path


class UserError(Exception):
    """A mistake of the user, a broken file, a full disk: one line that names the cause and the
    fix. The scripts print that line; any other exception keeps its traceback."""


def why(error):
    """The text of an exception (or any other text) on one line."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


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
            name.unlink(missing_ok=True)


def cache_dir():
    """The folder for downloads and converted pictures. It may be deleted at any time."""
    folder = os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(folder) if folder else Path.home() / ".cache"
    except RuntimeError:  # HOME is not set, and the system does not know this user
        raise UserError(
            "there is no home folder for the cache: set XDG_CACHE_HOME to a folder"
        ) from None
    return base / "phase-ref"
