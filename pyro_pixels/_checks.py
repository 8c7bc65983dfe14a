"""Checks of configurations: types and bounds, whole and finite numbers, as declared in the annotation of each field.

    @dataclass(frozen=True)
    class Schedule:
        steps: Annotated[int, Bounds(1, 10**9)] = 200_000

        def __post_init__(self) -> None:
            check_fields(self)

The library's dataclasses and the scripts' command lines use the same check, and tests/faults generates bad values from
the same bounds, so a new field is covered as soon as it is declared. Types are checked with or without bounds: a float
must be finite, an int whole and not a bool, and a Literal one of its values.
"""

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

MAX_SEED = 10**12
"""Training multiplies seeds by about a million; torch takes less than 2^64."""


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, or of each number in a tuple or a mapping."""

    low: float | None = None
    high: float | None = None
    above: bool = False
    """Whether ``low`` itself is excluded."""
    below: bool = False
    """Whether ``high`` itself is excluded."""
    ordered: bool = False
    """Whether the numbers of a tuple must be in ascending order."""
    words: str | None = None
    """The wording for what is wanted in messages, such as "a probability", instead of the type; limits are added."""

    def hold(self, x: float) -> bool:
        """Tells whether a number is within the bounds; NaN is not."""
        over = self.low is None or (x > self.low if self.above else x >= self.low)
        under = self.high is None or (x < self.high if self.below else x <= self.high)
        return over and under

    def describe(self) -> str:
        """Returns a text such as " of at least 1" or " above 0, at most 10"; empty if there are no bounds."""
        low = "" if self.low is None else f" above {self.low:g}" if self.above else f" of at least {_number(self.low)}"
        if self.high is None:
            return low
        high = f"below {_number(self.high)}" if self.below else f"at most {_number(self.high)}"
        return f"{low}, {high}" if low else f" of {high}"


ANY = Bounds()
SEED = Bounds(0, MAX_SEED)


def check_fields(instance: Any) -> None:
    """Checks each field of a dataclass against its annotation; NumPy numbers become Python's, and lists tuples.

    Raises:
        ValueError: names the first field that does not fit, its value, and what was wanted.
    """
    hints = fields_of(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        checked = check_value(field.name, value, hints[field.name])
        if checked is not value:
            object.__setattr__(instance, field.name, checked)


@lru_cache(maxsize=256)
def fields_of(kind: type) -> Mapping[str, Any]:
    """Returns the annotations of a dataclass, `Bounds` included."""
    return get_type_hints(kind, include_extras=True)


def check_value(name: str, value: Any, hint: Any, bounds: Bounds = ANY) -> Any:
    """Returns the value, in Python's own types; raises ValueError if it does not fit the annotation."""
    hint, bounds = unwrap(hint, bounds)
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(value, np.generic):
        value = value.item()
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _check_union(name, value, arguments, bounds)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple or hint is tuple:
        return _check_tuple(name, value, arguments, bounds)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{name} is {value!r}; wanted a mapping of names to values")
        checked = {key: check_value(f"{name}[{key!r}]", x, arguments[1], bounds) for key, x in value.items()}
        return value if all(checked[key] is x for key, x in value.items()) else checked
    if hint in (int, float):
        return _check_number(name, value, hint, bounds)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise ValueError(f"{name} is {_shortened(value)}; wanted {_kind(hint)}")
    return value


def check_number(name: str, value: Any, low: float | None = None, high: float | None = None) -> int:
    """Returns an argument of a function as an int; raises ValueError unless it is whole and within bounds."""
    return check_value(name, value, int, Bounds(low, high))


def check_name(option: str, name: str) -> str:
    """Returns a folder's name; raises ValueError unless it has only letters, digits, ``_``, ``-`` and inner dots."""
    if not re.fullmatch(r"\w[\w.-]*", name) or len(name) > 100 or ".." in name:
        raise ValueError(f"{option} is {_shortened(name)}; wanted a plain name of letters, digits, '_', '-' and '.'")
    return name


def unwrap(hint: Any, bounds: Bounds = ANY) -> tuple[Any, Bounds]:
    """Returns the type within an Annotated, and its bounds."""
    while get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        bounds = next((extra for extra in extras if isinstance(extra, Bounds)), bounds)
    return hint, bounds


def _check_union(name: str, value: Any, kinds: tuple[Any, ...], bounds: Bounds) -> Any:
    if value is None and type(None) in kinds:
        return value
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        try:
            return check_value(name, value, kinds[0], bounds)
        except ValueError as error:
            raise ValueError(f"{error}, or None") from None
    for kind in kinds:
        try:
            return check_value(name, value, kind, bounds)
        except ValueError:
            continue
    raise ValueError(f"{name} is {_shortened(value)}; wanted {' or '.join(map(_kind, kinds))}")


def _check_tuple(name: str, value: Any, kinds: tuple[Any, ...], bounds: Bounds) -> Any:
    given, value = value, tuple(value) if isinstance(value, list) else value
    endless = len(kinds) == 2 and kinds[1] is Ellipsis
    if not isinstance(value, tuple) or (kinds and not endless and len(value) != len(kinds)):
        wanted = "a tuple" if endless or not kinds else f"{len(kinds)} values"
        raise ValueError(f"{name} is {_shortened(value)}; wanted {wanted}")
    each = (kinds[0],) * len(value) if endless else kinds
    try:
        checked = tuple(check_value(name, x, kind, bounds) for x, kind in zip(value, each))
    except ValueError as error:
        wanted = str(error).split("; ", 1)[-1]
        raise ValueError(f"{name} is {_shortened(value)}; {wanted} for each value") from None
    if bounds.ordered and any(a > b for a, b in pairwise(checked)):
        raise ValueError(f"{name} is {checked}; wanted finite numbers in ascending order")
    return given if given is value and all(a is b for a, b in zip(checked, given)) else checked


def _check_number(name: str, value: Any, kind: type, bounds: Bounds) -> Any:
    numbers = int if kind is int else (int, float)
    fits = isinstance(value, numbers) and not isinstance(value, bool)
    if fits and not isinstance(value, int):
        fits = math.isfinite(value)
    if not fits or not bounds.hold(value):
        raise ValueError(
            f"{name} is {_shortened(value)}; wanted "
            + (bounds.words or ("a whole number" if kind is int else "a finite number"))
            + bounds.describe()
        )
    return value


def _kind(hint: Any) -> str:
    names = {int: "a whole number", float: "a finite number", str: "a string", bool: "True or False", Path: "a path"}
    hint, _ = unwrap(hint)
    return names.get(hint, f"a {getattr(hint, '__name__', hint)}")


def _number(x: float) -> str:
    return f"{x:,}" if isinstance(x, int) else f"{x:g}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
