"""Guides from outside the package: a Python file that adds to `GUIDES`, or an entry point `pyro_pixels.guides`.

A file is only executed on request. Its checksum is stored in the configuration of the run, because a changed file could
build a different network under the same name. A package registers its guides with an entry point,
``[project.entry-points."pyro_pixels.guides"]`` with a line ``mine = "my_package:make_guide"``, where
``make_guide(config, model)`` returns a `Guide`; it is imported when the name is first used.
"""

import importlib.util
import sys
from collections.abc import Callable, MutableMapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from pyro_pixels._checksums import digest

GROUP = "pyro_pixels.guides"
Registry = MutableMapping[str, Callable[..., Any]]
_loaded: dict[tuple[str, str], dict[str, Callable[..., Any]]] = {}  # (path, SHA-256) -> name -> factory


class GuideFile(NamedTuple):
    """A Python file that was executed."""

    path: Path
    """The absolute path."""
    sha256: str
    names: tuple[str, ...]
    """The names of the guides that it added."""


def load_guides(path: str | Path, registry: Registry) -> GuideFile:
    """Registers the guides that a Python file adds to the registry, `GUIDES`; the file is executed once per process.

    They replace guides of the same names. A file that fails leaves the registry as it was.

    Raises:
        ValueError: if there is no such file, it fails, or it adds no guide.
    """
    path = Path(path).expanduser().resolve()
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"{path} is not a Python file; wanted one that adds a guide to GUIDES, see docs/write_a_guide.md"
        )
    found = digest(path.read_bytes())
    key = (str(path), found)
    if key not in _loaded:
        before = dict(registry)
        name = f"{path.stem}_{found[:12]}"  # unique, as another module may have the same name
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            registry.clear()
            registry.update(before)
            raise ValueError(f"{path} fails: {type(error).__name__}: {_first_line(error)}") from error
        made = {n: make for n, make in registry.items() if before.get(n) is not make}
        if not made:
            raise ValueError(f'{path} adds no guide; wanted a line such as GUIDES["mine"] = lambda config, model: ...')
        _loaded[key] = made
    registry.update(_loaded[key])
    return GuideFile(path, found, tuple(sorted(_loaded[key])))


def file_of(name: str, registry: Registry) -> GuideFile | None:
    """Returns the file whose guide is registered under a name; None if it is not from a file, or there is none."""
    for (path, sha256), made in _loaded.items():
        if name in made and registry.get(name) is made[name]:
            return GuideFile(Path(path), sha256, tuple(sorted(made)))
    return None


def load_unchanged(path: str | Path, sha256: str, registry: Registry, where: str) -> GuideFile:
    """Calls `load_guides` if the file is the one that a run was trained with.

    Args:
        sha256: the file's checksum when the run was trained.
        where: the run, for messages.

    Raises:
        ValueError: if the file is missing or has changed.
    """
    path = Path(path).expanduser().resolve()
    if not path.is_file():
        raise ValueError(
            f"{where} was trained with the guides in {path}, which is gone; pass its new location with --custom"
        )
    if digest(path.read_bytes()) != sha256:
        raise ValueError(
            f"{path} has changed since {where} was trained with it (SHA-256 {sha256[:12]}...); restore it, pass "
            "the location of the original file with --custom, or train again in another folder"
        )
    return load_guides(path, registry)


def find_guide(name: str, registry: Registry) -> Callable[..., Any] | None:
    """Returns the factory of a guide by name, from the registry or an installed package; None if there is none.

    Raises:
        ValueError: if the package's entry point cannot be imported.
    """
    if name not in registry:
        for point in entry_points(group=GROUP, name=name):
            try:
                registry[name] = point.load()
            except Exception as error:
                raise ValueError(
                    f"the guide '{name}' is in {point.value}, which cannot be imported: {_first_line(error)}; "
                    "reinstall that package"
                ) from error
    return registry.get(name)


def guide_names(registry: Registry) -> list[str]:
    """Returns all known names, including entry points, in alphabetical order."""
    return sorted({*registry, *(point.name for point in entry_points(group=GROUP))})


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
