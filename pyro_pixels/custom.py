"""Guides, worlds and likelihoods from outside the package: a Python file that adds to the registries, or entry points.

The registries are `GUIDES`, `WORLDS` and `LIKELIHOODS`. A file is only executed on request. Its checksum is stored in
the configuration of the run, because a changed file could define something else under the same name. A package
registers what it has with entry points, such as ``[project.entry-points."pyro_pixels.guides"]`` with a line
``mine = "my_package:make_guide"``, where ``make_guide(config, model)`` returns a `Guide`; the names of the other groups
end in ``.worlds`` and ``.likelihoods``. It is imported when the name is first used.
"""

import importlib.util
import sys
from collections.abc import Mapping, MutableMapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn

from pyro_pixels._checksums import digest

Made = TypeVar("Made")
Registries = Mapping[str, MutableMapping[str, Any]]
"""Kind ("guide", "world" or "likelihood") -> name -> factory, or class of a world."""
_loaded: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}  # (path, SHA-256) -> what the file added
_imported: dict[tuple[str, str], tuple[Any, str]] = {}  # (kind, name) -> what an entry point loaded, and its value
_FACTORIES = {
    "guide": "a function of config and model that returns a Guide",
    "likelihood": "a class or function without arguments that makes a PixelLikelihood",
}


class CustomFile(NamedTuple):
    """A Python file that was executed."""

    path: Path
    """The absolute path."""
    sha256: str
    names: Mapping[str, tuple[str, ...]]
    """The names that it added, by kind."""

    def describe(self) -> str:
        """Returns a text such as "the guide 'a', the worlds 'b', 'c'"."""
        return ", ".join(
            f"the {kind}{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
            for kind, names in self.names.items()
            if names
        )


def load_file(path: str | Path, registries: Registries) -> CustomFile:
    """Registers what a Python file adds to the registries; the file is executed once per process.

    It replaces what has the same name. A file that fails leaves the registries as they were.

    Raises:
        ValueError: if there is no such file, it fails, or it adds nothing.
    """
    path = Path(path).expanduser().resolve()
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"{path} is not a Python file; wanted one that adds to GUIDES, WORLDS or LIKELIHOODS, see "
            "docs/write_a_guide.md and docs/other_worlds.md"
        )
    found = digest(path.read_bytes())
    key = (str(path), found)
    if key not in _loaded:
        _loaded[key] = _execute(path, f"{path.stem}_{found[:12]}", registries)
    for kind, made in _loaded[key].items():
        registries[kind].update(made)
    return _file(key)


def _execute(path: Path, name: str, registries: Registries) -> dict[str, dict[str, Any]]:
    """Returns what a file adds to each registry; it is executed as a module, whose name no other module may have."""
    before = {kind: dict(registry) for kind, registry in registries.items()}
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        for kind, registry in registries.items():
            registry.clear()
            registry.update(before[kind])
        raise ValueError(f"{path} fails: {type(error).__name__}: {_first_line(error)}") from error
    made = {
        kind: {n: x for n, x in registry.items() if before[kind].get(n) is not x}
        for kind, registry in registries.items()
    }
    if not any(made.values()):
        raise ValueError(
            f'{path} adds no guide, world or likelihood; wanted a line such as GUIDES["mine"] = lambda config, model: '
            '..., WORLDS["mine"] = MyWorld or LIKELIHOODS["mine"] = MyPixels'
        )
    return made


def _file(key: tuple[str, str]) -> CustomFile:
    names = {kind: tuple(sorted(made)) for kind, made in _loaded[key].items()}
    return CustomFile(Path(key[0]), key[1], names)


def loaded_file(sha256: str) -> CustomFile | None:
    """Returns the file with a checksum if it was executed in this process."""
    return next((_file(key) for key in _loaded if key[1] == sha256), None)


def file_of(kind: str, name: str, registries: Registries) -> CustomFile | None:
    """Returns the file that added what is registered under a name; None if it is not from a file, or there is none."""
    now = registries[kind].get(name)
    return next((_file(key) for key, made in _loaded.items() if now is not None and made[kind].get(name) is now), None)


def load_unchanged(path: str | Path, sha256: str, registries: Registries, where: str) -> CustomFile:
    """Calls `load_file` if the file is the one that a run was trained with.

    Args:
        sha256: the file's checksum when the run was trained.
        where: the run, for messages.

    Raises:
        ValueError: if the file is missing or has changed.
    """
    path = Path(path).expanduser().resolve()
    if not path.is_file():
        raise ValueError(
            f"{where} was trained with definitions in {path}, which is gone; pass its new location with --custom"
        )
    if digest(path.read_bytes()) != sha256:
        raise ValueError(
            f"{path} has changed since {where} was trained with it (SHA-256 {sha256[:12]}...); restore it, pass "
            "the location of the original file with --custom, or train again in another folder"
        )
    return load_file(path, registries)


def find(kind: str, name: str, registries: Registries) -> Any:
    """Returns what has a name, from the registry or an installed package.

    Raises:
        ValueError: if there is nothing of that name, or the package's entry point cannot be imported.
    """
    registry = registries[kind]
    if name not in registry:
        for point in entry_points(group=_group(kind), name=name):
            try:
                registry[name] = found = point.load()
                _imported[kind, name] = (found, point.value)
            except Exception as error:
                raise ValueError(
                    f"the {kind} '{name}' is in {point.value}, which cannot be imported: {_first_line(error)}; "
                    "reinstall that package"
                ) from error
    if name not in registry:
        raise ValueError(
            f"there is no {kind} '{name}'; wanted one of {known_names(kind, registries)}, or add yours to "
            f"{kind.upper()}S (in scripts, pass the file that does so with --custom)"
        )
    return registry[name]


def _origin(kind: str, name: str, registries: Registries) -> str | None:
    """Returns the file or the entry point that a definition is from, or None if it is from neither."""
    file, (imported, point) = file_of(kind, name, registries), _imported.get((kind, name), (None, None))
    return str(file.path) if file is not None else point if registries[kind].get(name) is imported else None


def where(kind: str, name: str, registries: Registries) -> str:
    """Returns what to call a definition in messages: its kind and name, and the file or package that it is from."""
    origin = _origin(kind, name, registries)
    return f"the {kind} '{name}'" + ("" if origin is None else f" of {origin}")


def check_factory(kind: str, name: str, registries: Registries) -> None:
    """Raises a ValueError if what is registered as a guide or a likelihood cannot be called to make one."""
    found = registries[kind][name]
    if not callable(found) or isinstance(found, nn.Module):
        raise ValueError(f"{where(kind, name, registries)} is a {type(found).__name__}; wanted {_FACTORIES[kind]}")


def make(kind: str, name: str, registries: Registries, arguments: tuple[Any, ...], wanted: type[Made]) -> Made:
    """Calls the factory of a guide or a likelihood, which has to make a ``wanted``.

    Raises:
        ValueError: if it makes something else, or fails and is from a file or a package.
    """
    factory, what = find(kind, name, registries), where(kind, name, registries)
    try:
        made = factory(*arguments)
    except Exception as error:
        if _origin(kind, name, registries) is None:
            raise
        raise ValueError(
            f"{what} fails: {type(error).__name__}: {_first_line(error)}; wanted {_FACTORIES[kind]}"
        ) from error
    if not isinstance(made, wanted):
        raise ValueError(f"{what} makes a {type(made).__name__}; wanted {_FACTORIES[kind]}")
    return made


def known_names(kind: str, registries: Registries) -> list[str]:
    """Returns all names of a kind, including entry points, in alphabetical order."""
    return sorted({*registries[kind], *(point.name for point in entry_points(group=_group(kind)))})


def _group(kind: str) -> str:
    return f"pyro_pixels.{kind}s"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
