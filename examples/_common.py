"""Shared code of the scripts: the command line, one-line errors, devices, and opening a run and its sequences."""

# ruff: noqa: E402
import importlib.util
import os
import signal
import sys

STOPPED = 130


def _stop(*_: object) -> None:
    """Ends the process at once; Python would print a traceback and end by the signal."""
    os.write(2, b"stopped\n")
    os._exit(STOPPED)


def _is_of_the_script() -> bool:
    """Returns whether the main program imports this module, rather than a test or another module."""
    frame = sys._getframe(1).f_back
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_globals["__name__"] == "__main__"


if _is_of_the_script():
    for _name in ("torch", "pyro", "tyro", "pyro_pixels"):
        if importlib.util.find_spec(_name) is None:
            print(f'error: {_name} is not installed; pip install -c constraints.txt -e ".[examples]"', file=sys.stderr)
            sys.exit(2)
    if sys.stderr.isatty():  # torch and Pyro take seconds to import
        print("loading ...", end="\r", file=sys.stderr, flush=True)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until `start` is called:
        signal.signal(signal.SIGINT, _stop)  # during imports an exception would be lost, or abort the process

import io
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from pyro_pixels._checksums import read_json, write_json
from pyro_pixels._files import CannotWrite, atomic_write
from pyro_pixels._options import Positive, Seed, Sequences, check_options, refuse_with_pretrained
from pyro_pixels.config import RunConfig
from pyro_pixels.custom import CustomFile, file_of, load_file, where
from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.refining import RefinedGuide
from pyro_pixels.guides.untangled import UntangledGuide, can_be_untangled
from pyro_pixels.run_sequences import TEST_SEED, AskedSequences, sequences_to_ask
from pyro_pixels.runs import (
    REGISTRIES,
    Run,
    check_custom,
    load_config,
    load_pretrained,
    load_run,
    named,
    names_in,
    recorded_file,
)
from pyro_pixels.worlds.base import WorldConfig

__all__ = [
    "Opened", "QueryArguments", "TableArguments", "choose", "device_of", "improved", "make_world", "new_folder",
    "open_run", "open_sequences", "parse", "progress", "read_config", "read_json", "read_run", "save_arrays",
    "say_where", "start", "with_named", "write_json",
]  # fmt: skip


def _one_line(message: Warning | str, *_args: object, **_options: object) -> str:
    return f"warning: {' '.join(str(message).split())}\n"


warnings.formatwarning = _one_line

Arguments = TypeVar("Arguments")
Item = TypeVar("Item")


def start(main: Callable[[Arguments], int | None], arguments: type[Arguments], doc: str | None) -> None:
    """Parses the command line into ``arguments`` and runs ``main``.

    Errors are printed in one line. The exit code is 2 if another command would avoid the error, 1 if it occurred
    later, and 130 after Ctrl-C.
    """
    try:
        if signal.getsignal(signal.SIGINT) is _stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        args = parse(arguments, doc)
        check_options(args)
        sys.exit(main(args) or 0)
    except ValueError as error:
        _end(2, error)
    except BrokenPipeError:  # the program that read the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _end(2, f"{error.filename or 'a file'}: {error.strerror or error}")
    except FloatingPointError as error:
        _end(1, error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(r"(out of|not enough|allocate) memory", str(error)):
            raise
        _end(1, "not enough memory; use fewer sequences or samples, or a smaller configuration")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(STOPPED)


def parse(arguments: type[Arguments], doc: str | None) -> Arguments:
    """Parses the command line; tyro's framed errors of several lines become a ValueError of one line."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(arguments, description=doc)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise ValueError(_in_one_line(said.getvalue())) from None


def _in_one_line(framed: str) -> str:
    """Returns the message in a framed text of tyro's, without its title and the help after a rule or an empty line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", framed)
    rows = [re.sub(r"^[│|]\s?|\s*[│|]$", "", row.strip()).strip() for row in text.splitlines()]
    inside = [row for row in rows if not re.match(r"[╭╰+]", row)]
    has_frame, rows = len(inside) < len(rows), inside
    rules = [not re.search(r"[^─\-]", row) for row in rows]
    if not has_frame and rules[1:2] == [True]:  # without characters for frames, the title is above a rule
        rows, rules = rows[2:], rules[2:]
    ends = [i for i, is_rule in enumerate(rules) if i and is_rule]
    message = " ".join(rows[: ends[0] if ends else None]).removeprefix("Error parsing ").rstrip(". ")
    similar = re.findall(r"Perhaps you meant.*?(--[\w.-]+)", " ".join(rows))
    return f"{message}{f'; perhaps {similar[0]}' if similar else ''}; --help lists all options"


def _end(code: int, error: object) -> None:
    message = str(error).partition("\nTrace Shapes:")[0]  # which Pyro adds to errors in a program
    print(f"error: {' '.join(message.split()) or type(error).__name__}", file=sys.stderr)
    sys.exit(code)


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """Returns the items, with a progress bar on a terminal."""
    return tqdm(items, desc=what, total=total, disable=None, leave=False)


def device_of(name: str) -> torch.device:
    """Returns the device ``name`` (cpu, cuda, cuda:1, mps, or auto), or raises a ValueError if it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"'{name}' is not a device; wanted cpu, cuda, mps or auto") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise ValueError(f"no {device.type} device is available; use --device cpu or auto")
    return device


@dataclass
class QueryArguments:
    """Options of all scripts that query a trained run."""

    run: Path = Path("runs/quick")
    """Folder of a trained run."""
    custom: Path | None = None
    """The Python file with the run's own guide, world or likelihood, if the run does not name it or it has moved
    since."""
    pretrained: bool = False
    """Use the weights that come with the package instead of a run."""
    weights: str = "quick"
    """Which of these weights to use: quick; long, trained for fifteen times as many steps; or recurrent, the paper's
    network on its own. Needs --pretrained."""
    data: Path | None = None
    """An .npz of image sequences to query. By default fresh ones are simulated like the training sequences; if the run
    was trained on a file, its held-out sequences are used."""
    simulated: bool = False
    """Simulate sequences even if the run was trained on a file."""
    out: Path | None = None
    """Where results go. By default in the run's folder, or in runs/pretrained (runs/pretrained_NAME for other
    weights)."""
    n_sequences: Sequences | None = None
    """Number of sequences to query; of a file, the first ones. By default all of --data, else 60."""
    seed: Seed = TEST_SEED
    """Seed of simulated sequences and of samples."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps, or auto, which is CUDA if available and else the CPU."""
    untangle: bool = False
    """Correct identities frame by frame by p(a), which undoes switches of a guide without dynamics, such as the
    recurrent one."""
    refine: bool = False
    """Improve positions and identities from a guide without dynamics by ascent on log p(v, a); takes about 0.25 s for a
    sequence of 30 frames of 32 x 32 on one core."""

    @property
    def home(self) -> Path:
        """Returns the default folder for results."""
        if not self.pretrained:
            return self.run
        return Path("runs/pretrained" if self.weights == QueryArguments.weights else f"runs/pretrained_{self.weights}")


@dataclass
class TableArguments(QueryArguments):
    """Options of query scripts that write a table of positions."""

    scale: Positive | None = None
    """Metres per pixel of the film; if given, positions in the table are in metres."""
    fps: Positive | None = None
    """Frames per second of the film; if given, the table has a column of seconds."""


class Opened(NamedTuple):
    run: Run
    data: ImageSequences
    device: torch.device


def open_run(args: QueryArguments, *, trained_on_too: bool = True, as_trained: bool = False) -> Opened:
    """Returns the first result of `open_sequences`, without the origin of the sequences."""
    return open_sequences(args, trained_on_too=trained_on_too, as_trained=as_trained)[0]


def open_sequences(
    args: QueryArguments, *, trained_on_too: bool = True, as_trained: bool = False
) -> tuple[Opened, AskedSequences]:
    """Returns the run, the sequences to query and the device, and the origin of the sequences, which is also printed.

    Args:
        trained_on_too: include the run's training sequences if --data is the file on which it was trained.
        as_trained: keep the guide as it was trained, regardless of --untangle and --refine.

    Raises:
        ValueError: if --weights is given without --pretrained, --run or --custom with it, or --simulated with --data;
            or if --untangle or --refine is given for a guide whose frames cannot be exchanged.
    """
    if args.pretrained:
        refuse_with_pretrained(args, ("custom", "run"))
    if args.weights != QueryArguments.weights and not args.pretrained:
        raise ValueError(
            f"--weights {args.weights} needs --pretrained, but {args.run} was given; "
            "add --pretrained, or leave --weights out"
        )
    if args.simulated and args.data is not None:
        raise ValueError(f"--simulated and --data {args.data} contradict each other; leave one of them out")
    device = device_of(args.device)
    torch.manual_seed(args.seed)
    run = load_pretrained(args.weights, device) if args.pretrained else read_run(args.run, device, args.custom)
    if not as_trained:
        run = improved(run, untangle=args.untangle, refine=args.refine)
    asked = sequences_to_ask(
        run.config, args.data, args.n_sequences, args.seed, simulated=args.simulated, trained_on_too=trained_on_too
    )
    print(f"{'the pretrained weights' if args.pretrained else args.run} (step {run.step:,}), on {asked.source}")
    return Opened(run, asked.data, device), asked


def improved(run: Run, *, untangle: bool, refine: bool) -> Run:
    """Returns the run with a guide that is untangled by p(a), refined by p(v, a), or unchanged.

    Raises:
        ValueError: if the guide's frames cannot be exchanged.
    """
    if not (untangle or refine):
        return run
    config, device = run.config.data, next(run.model.parameters()).device
    blank = torch.zeros(1, 2, config.height, config.width, device=device)
    if not can_be_untangled(run.guide.q(blank, torch.ones(1, dtype=torch.int64, device=device))):
        raise ValueError(
            f"--{'refine' if refine else 'untangle'} is for guides without dynamics, but the run's guide, "
            f"'{run.config.guide}', contains them; leave the option out"
        )
    guide = RefinedGuide(run.guide, run.model) if refine else UntangledGuide(run.guide, run.model.dynamics)
    return run._replace(guide=guide)


def read_run(folder: Path, device: torch.device | str = "cpu", custom: Path | None = None) -> Run:
    """Loads a run as `load_run` does, with the custom file from its training, or ``custom``."""
    return load_run(folder, device, custom=custom or recorded_file(folder))


def read_config(folder: Path, custom: Path | None = None) -> RunConfig:
    """Reads the configuration of a run to be resumed, with the custom file from its training, or ``custom``."""
    file = custom or recorded_file(folder)
    config = load_config(folder, custom=file)
    check_custom(config, folder, file)
    return config


def choose(file: CustomFile | None, kind: str, name: str | None) -> str | None:
    """Returns ``name``, or if it is None the only guide, world or likelihood that a file adds, if any.

    Raises:
        ValueError: if the file adds several and none is named.
    """
    own = () if file is None else file.names[kind]
    if name is None and len(own) > 1:
        assert file is not None
        raise ValueError(f"{file.path} adds the {kind}s {list(own)}; choose one with --{kind}, or keep only one there")
    return own[0] if name is None and own else name


def make_world(name: str, **size: Any) -> WorldConfig:
    """Returns the world of that name, with images of that size; raises ValueError if it cannot be made so."""
    world: type[WorldConfig] = named("world", name)
    try:
        return world(**size)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        what = f"{where('world', name, REGISTRIES)} cannot be made of {', '.join(size)} alone"
        raise ValueError(f"{what} ({why}); give its other fields defaults") from error


def with_named(config: RunConfig, custom: Path | None, **names: str | None) -> RunConfig:
    """Returns the configuration with what is named, or else with what a custom file adds.

    Args:
        custom: a file that adds to `GUIDES`, `WORLDS` or `LIKELIHOODS`.
        names: ``guide``, ``world`` and ``likelihood``, or those that may be chosen; None for the file's, or else the
            configuration's. A world has the image size and the number of frames of the configuration's.

    Raises:
        ValueError: if there is nothing of that name; or if the file adds several and none is named, nothing that it
            adds is used, or the configuration also uses another file.
    """
    file = None if custom is None else load_file(custom, REGISTRIES)
    for kind, given in names.items():
        name = choose(file, kind, given)
        if name is not None and kind == "world":
            size = {key: getattr(config.data, key) for key in ("n_frames", "height", "width")}
            config = replace(config, data=make_world(name, **size))
        elif name is not None:
            named(kind, name)  # refuses what there is none of
            config = replace(config, **{kind: name})
    if file is None:
        return config
    elsewhere = [(kind, name) for kind, name in names_in(config).items() if name not in file.names[kind]]
    if len(elsewhere) == len(names_in(config)):
        raise ValueError(
            f"{custom} adds {file.describe()}, but the run would use none of these; leave out --custom, or name one "
            "with an option"
        )
    for kind, name in elsewhere:
        other = file_of(kind, name, REGISTRIES)
        if other is not None:
            raise ValueError(
                f"{custom} adds {file.describe()}, but the {kind} '{name}' is from {other.path}, and a run keeps one "
                "file; put both into one"
            )
    return replace(config, custom_file=str(file.path), custom_sha256=file.sha256)


def new_folder(path: Path) -> Path:
    """Returns ``path`` if it can be written to, else raises a ValueError; the folder is made at the first write."""
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            return path
    except OSError as error:
        raise CannotWrite(
            f"cannot write to {path} ({error.strerror}); choose a folder that can be written to"
        ) from None


def save_arrays(path: Path, **arrays: Tensor | None) -> Path:
    """Writes the arrays that are not None to an .npz, in single precision; rendered images would hardly compress."""
    values: dict[str, Any] = {}
    for name, x in arrays.items():
        if x is not None:
            values[name] = x.cpu().float().numpy() if x.is_floating_point() else x.cpu().numpy()
    with atomic_write(path) as file:
        np.savez(file, **values)
    return path


def say_where(paths: Sequence[Path]) -> None:
    """Prints the paths of results, one per line."""
    for path in paths:
        print(f"  {path}")
