"""Bad values made from the bounds of a dataclass' fields, and command lines run as the scripts do, in this process."""

import contextlib
import dataclasses
import importlib
import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args, get_origin
from unittest import mock

import numpy as np
import torch
import tyro

from pyro_pixels._checks import ANY, Bounds, fields_of, unwrap
from pyro_pixels.runs import GUIDES

ROOT = Path(__file__).parents[2]
ANY_ARGUMENTS = Annotated[tuple[str, ...], tyro.conf.Positional]  # of prepare.py: whatever is no option is a film
NO_NUMBERS = ["x", [], {}, object(), 1j, b"1", True]


def parts_of(hint: Any, bounds: Bounds = ANY) -> tuple[Any, Bounds, str]:
    """The number within an annotation, its bounds, and what it is wrapped in: "", "tuple" or "mapping"."""
    hint, bounds = unwrap(hint, bounds)
    origin, arguments = get_origin(hint), [x for x in get_args(hint) if x not in (type(None), Ellipsis)]
    if origin is Literal:
        return Literal, bounds, ""
    if origin is tuple:
        number, bounds, _ = parts_of(arguments[0], bounds)
        return number, bounds, "tuple"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        number, bounds, _ = parts_of(arguments[1], bounds)
        return number, bounds, "mapping"
    if arguments and origin is not None:
        return parts_of(arguments[0], bounds)
    return hint, bounds, ""


def fields_with_parts(kind: type) -> list[tuple[str, Any, Bounds, str]]:
    """Name, type, bounds and wrapping of each field that can be given."""
    hints, fields = fields_of(kind), [field.name for field in dataclasses.fields(kind) if field.init]
    return [(name, *parts_of(hints[name])) for name in fields]


def numbers_of(kind: type) -> list[tuple[str, Any, Bounds, str]]:
    return [row for row in fields_with_parts(kind) if row[1] in (int, float)]


def bad_numbers(number: type, bounds: Bounds) -> list[Any]:
    """What a field must refuse: no numbers, those out of its bounds, and for integers those that are not whole."""
    bad: list[Any] = [math.nan, math.inf, -math.inf, np.nan, *NO_NUMBERS]
    if number is int:
        bad += [1.5, -0.5, 2.0, np.float64(3.0)]
    if bounds.low is not None:
        bad += [bounds.low - 1, -(10**30), bounds.low - 10**9] + ([bounds.low] if bounds.above else [])
    if bounds.high is not None:
        bad += [bounds.high * 2 + 1, 10**40 if number is int else 1e300] + ([bounds.high] if bounds.below else [])
    return bad


def scripts() -> dict[str, Path]:
    """Every file with a command line of its own, by its name, but for the one that does without the package."""
    files = [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/experiments/*.py"), *ROOT.glob("benchmarks/*.py")]
    return {path.stem: path for path in sorted(files) if "\nclass Arguments" in path.read_text()}


def load(path: Path) -> ModuleType:
    """A script as a module; a guide that it adds is not known to other tests."""
    folder, known = path.parent.relative_to(ROOT).as_posix().replace("/", "."), dict(GUIDES)
    try:
        return importlib.import_module(path.stem if folder == "examples" else f"{folder}.{path.stem}")
    finally:
        GUIDES.clear()
        GUIDES.update(known)


@dataclasses.dataclass(frozen=True)
class End:
    """How a command ended."""

    code: Any
    said: str

    @property
    def is_one_line(self) -> bool:
        return self.said.count("\n") == 1 and self.said.startswith("error: ") and "Traceback" not in self.said


def run(line: list[str], main: Callable[[Any], Any], arguments: type, doc: str | None) -> End:
    """What a script does with a command line, in this process; its exit code and its standard error."""
    from _common import start

    err, threads = io.StringIO(), torch.get_num_threads()
    with (
        mock.patch.object(sys, "argv", ["script.py", *line]),
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(io.StringIO()),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            start(main, arguments, doc)
        except SystemExit as end:
            return End(end.code, err.getvalue())
        finally:
            torch.set_num_threads(threads)
    return End("no exit", err.getvalue())


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """What there is in a folder, with times and sizes of the files."""
    files = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    folders = {str(path.relative_to(folder)): (0, 0) for path in folder.rglob("*") if path.is_dir()}
    return folders | {name: (about.st_mtime_ns, about.st_size) for name, about in files.items()}


def options_of(arguments: type) -> Iterator[tuple[str, str, Any, Bounds, str]]:
    """Field, option, type, bounds and wrapping of every option of a script, but for a world's."""
    for name, kind, bounds, how in fields_with_parts(arguments):
        if not dataclasses.is_dataclass(kind):
            yield name, f"--{name.replace('_', '-')}", kind, bounds, how


def as_text(x: Any) -> str | None:
    """A bad value as it is typed; None for those that cannot be."""
    return None if isinstance(x, bool) or not isinstance(x, int | float | str) else str(x)


def bad_lines(arguments: type) -> list[list[str]]:
    """Command lines that must be refused before anything is done, from the fields of a script's arguments alone."""
    takes_any = any(field.type == ANY_ARGUMENTS for field in dataclasses.fields(arguments))
    lines = [] if takes_any else [["--no-such-option"], ["--no-such-option", "3"], ["stray"], ["--", "stray"]]
    for _, option, kind, bounds, how in options_of(arguments):
        if kind in (int, float):
            texts = dict.fromkeys(x for x in map(as_text, bad_numbers(kind, bounds)) if x is not None)
            lines += [[option, x] for x in [*texts, "", "0x10", "1e", "None "]]
        elif kind is Literal:
            lines += [[option, "nonsense"], [option, ""]]
        elif kind is bool and not takes_any:
            lines += [[option, "3"], [f"{option}=maybe"]]
        if kind is not bool and how == "":
            lines.append([option])
    return lines
