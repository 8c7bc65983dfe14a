"""Options of scripts: limits of those that count something, options that contradict a run, and files to write to."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from pyro_pixels._checks import MAX_SEED

N_CORES = os.cpu_count() or 1
LIMITS: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(("seed", "first_seed"), (0, MAX_SEED)),
    **dict.fromkeys(("n_samples", "n_futures"), (0, None)),
    **dict.fromkeys(("n_sequences", "n_test", "n_validation", "n_fitted", "n_seen", "n_frames"), (1, None)),
    **dict.fromkeys(("steps", "fit_steps", "seeds", "starts", "parts", "workers", "rounds"), (1, None)),
    **dict.fromkeys(("state_size", "layers", "height", "width"), (1, None)),
    "threads": (1, 4 * N_CORES),
}
"""The least and the largest value of options that count something, in whichever script they occur."""


def check_limits(args: Any) -> None:
    """Raises a ValueError if an option that counts something is out of its `LIMITS`."""
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name not in LIMITS or not isinstance(value, int):
            continue
        least, most = LIMITS[field.name]
        option = f"--{field.name.replace('_', '-')} is {value}; wanted"
        if value < least:
            raise ValueError(f"{option} at least {least}")
        if most is not None and value > most:
            raise ValueError(f"{option} at most {most}" + (", 4 for each core" if field.name == "threads" else ""))


def refuse_changes(args: Any, there: dict[str, Any], folder: Path) -> None:
    """Raises a ValueError if an option is given that differs from what the run in ``folder`` was trained with.

    Options that have their default count as not given.
    """
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in there and value not in (field.default, there[field.name]):
            raise ValueError(
                f"--{field.name.replace('_', '-')} is {value}, and the run in {folder} was trained with "
                f"{there[field.name]}; leave the option out to go on, or choose another folder"
            )


def result_file(path: Path, suffix: str, data: Path | None = None) -> Path:
    """A path to write results to; a ValueError if it does not end in ``suffix``, or is the ``data`` to be read."""
    if path.suffix != suffix:
        raise ValueError(f"{path} does not end in {suffix}; wanted a name that does")
    if data is not None and path.resolve() == data.resolve():
        raise ValueError(f"{path} is what is to be read, and would be overwritten; choose another name")
    return path
