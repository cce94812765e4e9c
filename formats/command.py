"""Makes a command line from a dataclass, and prints a user's mistake as one line.

@dataclass(frozen=True)
class Config(Options):
    steps: int = option(1000, "updates", low=1, high=10**9)

args = parser(Config(), __doc__).parse_args(argv)      # --steps N
run(lambda: work(Config(**vars(args))))                # a UserError ends it in one line
"""

import argparse
import signal
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass, field, fields

import torch

from formats.files import UserError, say, why


def option(default, help, low=None, high=None, choices=(), may_change=False):
    """A dataclass field that is also an option of the field's type; a tuple is whole numbers.
    may_change: a resumed run may have another value."""
    about = dict(help=help, low=low, high=high, choices=choices, may_change=may_change)
    return field(default=default, metadata=about)


def flag(name):
    """The option of a field: class_ is --class, png_dir is --png-dir."""
    return "--" + name.rstrip("_").replace("_", "-")


@dataclass(frozen=True)
class Options:
    """Fields made by `option`. UserError for a value out of range."""

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            values = value if isinstance(value, tuple) else (value,)
            for one in values:
                check(f, one)


def check(f, value):
    """UserError for a value that the option of field f does not take."""
    about = f.metadata
    if value is None:
        return
    low = about["low"]
    high = about["high"]
    if low is not None and not low <= value <= high:
        raise UserError(f"{flag(f.name)} must be from {low:g} to {high:g}, got {value!r:.40}")
    if about["choices"] and value not in about["choices"]:
        choices = ", ".join(about["choices"])
        raise UserError(f"{flag(f.name)} must be one of {choices}, got {value!r:.40}")


def parser(defaults, doc):
    """A command line with an option for each field of `defaults`; a mistake is a UserError."""
    p = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    p.error = refuse
    for f in fields(defaults):
        about = f.metadata
        value = getattr(defaults, f.name)
        text = about["help"]
        if value not in (None, "", ()) and "default:" not in text:
            text += " (default: %(default)s)"
        how = dict(dest=f.name, default=value, help=text)
        if f.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["type"] = f.type
            how["metavar"] = "|".join(about["choices"]) or flag(f.name)[2:].upper()
        if f.type is tuple:
            how |= dict(type=int, nargs="*")
        p.add_argument(flag(f.name), **how)
    return p


def refuse(message):
    """UserError for what argparse says."""
    raise UserError(f"{why(message)}; --help shows the options")


class Stopping:
    """Remembers a signal to stop, so that the work at hand can end. Ignored signals stay ignored;
    on exit the former handlers return."""

    def __enter__(self):
        self.number = 0
        self.former = {}
        with suppress(ValueError):  # no thread but the main one may set handlers
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number and signal.getsignal(number) != signal.SIG_IGN:
                    self.former[number] = signal.signal(number, self.remember)
        return self

    def remember(self, number, frame):
        self.number = number

    def __exit__(self, *error):
        for number, handler in self.former.items():
            signal.signal(number, handler)


HEARD = []  # warnings so far, for log.txt


def run(body):
    """Calls body. A UserError, too little memory or a missing compiler prints one line and exits
    with a status that is not 0, Ctrl-C exits with 130. Any other error keeps its traceback."""
    HEARD.clear()
    if hasattr(sys.stdout, "reconfigure"):  # a console that cannot show the name of a class
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = hear
            body()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if is_of_memory(error):
            fix = "lower --batch, --width or --n, or raise --accum"
            sys.exit(f"error: out of memory: {fix} ({why(error):.80})")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(f"error: cannot compile the net ({why(error):.80}): leave out --compile")
        raise


def hear(message, *where, **more):
    """A warning on one line, which goes to log.txt, too."""
    text = why(message)
    HEARD.append(text)
    say(f"warning: {text}", sys.stderr)


def is_of_memory(error):
    """Whether memory ran out. On a CPU torch has no type of its own for that, but its allocator
    signs the message."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)
