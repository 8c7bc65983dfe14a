"""Options of scripts: bounds of numbers, options that contradict a run, and output files."""

import os
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pyro_pixels._checks import SEED, Bounds, check_value, fields_of

Count = Annotated[int, Bounds(1, 10**9)]
Sequences = Annotated[int, Bounds(1, 10**8)]
Objects = Annotated[int, Bounds(1, 1_000)]
Frames = Annotated[int, Bounds(1, 100_000)]
Samples = Annotated[int, Bounds(0, 10**6)]
Draws = Annotated[int, Bounds(1, 10**6)]
Pixels = Annotated[int, Bounds(1, 4_096)]
Size = Annotated[int, Bounds(1, 65_536)]
Seed = Annotated[int, SEED]
Seeds = Annotated[int, Bounds(1, 10**6)]
Threads = Annotated[int, Bounds(1, 4 * (os.cpu_count() or 1), words="a number of threads, up to 4 per core,")]
Positive = Annotated[float, Bounds(0, 1e12, above=True)]
Share = Annotated[float, Bounds(0, 1)]
Workers = Annotated[int, Bounds(1, 1_000)]


def option_of(field: str) -> str:
    """Returns the command-line option of a field of a script's arguments."""
    return f"--{field.replace('_', '-')}"


def check_options(args: Any) -> None:
    """Checks every option against its annotation and `Bounds`, like `_checks.check_fields`; None means not given.

    Raises:
        ValueError: names the first option that does not fit, its value, and what was wanted.
    """
    hints = fields_of(type(args))
    for field in fields(args):
        value = getattr(args, field.name)
        if value is None:
            continue
        try:
            setattr(args, field.name, check_value(option_of(field.name), value, hints[field.name]))
        except ValueError as error:
            raise ValueError(str(error).removesuffix(", or None")) from None


def refuse_changes(args: Any, there: dict[str, Any], folder: Path) -> None:
    """Raises ValueError if an option differs from the value that the run in ``folder`` was trained with.

    Options with their default value count as not given.
    """
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in there and value not in (field.default, there[field.name]):
            raise ValueError(
                f"{option_of(field.name)} is {value}, but the run in {folder} was trained with {there[field.name]}; "
                "leave the option out to continue, or choose another folder"
            )


def refuse_with_pretrained(args: Any, names: Collection[str]) -> None:
    """Raises ValueError if one of the named options, which only concern a run of the user's own, is given.

    To be called where the weights that come with the package are used. Options with their default value count as not
    given.
    """
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in names and value != field.default:
            raise ValueError(
                f"{option_of(field.name)} {value} is for a run of your own, but the weights that come with the package "
                f"are used (--pretrained); leave {option_of(field.name)} out, or give --no-pretrained"
            )


def one_job(job: str, names: Collection[str]) -> tuple[str, int]:
    """Returns the name and the seed of VARIANT/SEED, or raises a ValueError."""
    name, _, seed = job.rpartition("/")
    if name not in names or not seed.isdecimal():
        raise ValueError(f"--job is {job!r}; wanted VARIANT/SEED, with a variant of {sorted(names)}")
    return name, check_value("the seed of --job", int(seed), int, SEED)


def result_file(path: Path, suffix: str, data: Path | None = None) -> Path:
    """Returns a path for results; raises ValueError if it does not end in ``suffix`` or is the input file ``data``."""
    if path.suffix != suffix:
        raise ValueError(f"{path} does not end in {suffix}; wanted a name that does")
    if data is not None and path.resolve() == data.resolve():
        raise ValueError(f"{path} is the input file and would be overwritten; choose another name")
    return path
