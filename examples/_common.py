"""What the scripts share: the command line, errors of one line, devices, and opening a run and its sequences."""

# ruff: noqa: E402
import sys
from types import TracebackType

if sys.stderr.isatty():  # torch and Pyro take seconds to import
    print("loading ...", end="\r", file=sys.stderr, flush=True)


def _no_traceback_for_ctrl_c(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _no_traceback_for_ctrl_c

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from pyro_pixels._files import atomic_write
from pyro_pixels._options import check_limits
from pyro_pixels.data import ImageSequences
from pyro_pixels.run_sequences import TEST_SEED, sequences_to_ask
from pyro_pixels.runs import Run, load_pretrained, load_run

Arguments = TypeVar("Arguments")
Item = TypeVar("Item")


def start(main: Callable[[Arguments], int | None], arguments: type[Arguments], doc: str | None) -> None:
    """Reads the command line into ``arguments`` and runs ``main``; what is wrong is one line and exit code 2."""
    try:
        args = tyro.cli(arguments, description=doc)
        check_limits(args)
        sys.exit(main(args) or 0)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """The items, with a progress bar on a terminal."""
    return tqdm(items, desc=what, total=total, disable=None, leave=False)


def device_of(name: str) -> torch.device:
    """The device of that name (cpu, cuda, cuda:1, mps, or auto: the best there is); a ValueError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"'{name}' is no device; wanted cpu, cuda, mps or auto") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise ValueError(f"there is no {device.type} device here; use --device cpu, or auto for the best there is")
    return device


@dataclass
class QueryArguments:
    """What every script that asks a trained run takes."""

    run: Path = Path("runs/quick")
    """Folder of a trained run."""
    pretrained: bool = False
    """Ask the weights that come with the package instead of a run."""
    weights: str = "quick"
    """Which of these weights: quick; long, which learned for fifteen times as many steps; or recurrent, the paper's
    network on its own. Needs --pretrained."""
    data: Path | None = None
    """An .npz of image sequences to ask about. By default fresh ones are simulated as the run's were; of a run that
    learned from a file, what was held out is taken."""
    simulated: bool = False
    """Simulate sequences also where the run learned from a file."""
    out: Path | None = None
    """Where results go. By default in the run's folder, or in runs/pretrained (runs/pretrained_NAME for other
    weights)."""
    n_sequences: int = 60
    """How many sequences to ask about; of a file, the first ones."""
    seed: int = TEST_SEED
    """Seed of simulated sequences and of samples."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, mps, or auto for CUDA where there is one and else the CPU."""

    @property
    def home(self) -> Path:
        """The folder that results go to by default."""
        if not self.pretrained:
            return self.run
        return Path("runs/pretrained" if self.weights == QueryArguments.weights else f"runs/pretrained_{self.weights}")


class Opened(NamedTuple):
    run: Run
    data: ImageSequences
    device: torch.device


def open_run(args: QueryArguments, *, trained_on_too: bool = True) -> Opened:
    """The run and the sequences that a script is to ask about, and the device; says which sequences they are.

    Args:
        trained_on_too: where --data is the file that the run learned from, take also what it was trained on.

    Raises:
        ValueError: if weights that come with the package are named, and a run is asked.
    """
    if args.weights != QueryArguments.weights and not args.pretrained:
        raise ValueError(
            f"--weights {args.weights} names weights that come with the package, and {args.run} is asked; "
            f"add --pretrained, or leave --weights out"
        )
    if args.simulated and args.data is not None:
        raise ValueError(f"--simulated and --data {args.data} contradict each other; leave one of them out")
    device = device_of(args.device)
    torch.manual_seed(args.seed)
    run = load_pretrained(args.weights, device) if args.pretrained else load_run(args.run, device)
    data, source = sequences_to_ask(
        run.config, args.data, args.n_sequences, args.seed, simulated=args.simulated, trained_on_too=trained_on_too
    )
    print(f"{'the pretrained weights' if args.pretrained else args.run} (step {run.step:,}), asked about {source}")
    return Opened(run, data, device)


def new_folder(path: Path) -> Path:
    """A folder that can be written to, made if need be, or a ValueError."""
    with atomic_write(path / ".writable"):
        pass
    (path / ".writable").unlink(missing_ok=True)  # other processes do the same
    return path


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """Writes JSON; an older file stays until the new one is whole."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=indent).encode() + b"\n")


def save_arrays(path: Path, **arrays: Tensor | None) -> Path:
    """Writes an .npz of the arrays that are not None, in single precision."""
    values: dict[str, Any] = {}
    for name, x in arrays.items():
        if x is not None:
            values[name] = x.cpu().float().numpy() if x.is_floating_point() else x.cpu().numpy()
    with atomic_write(path) as file:
        np.savez_compressed(file, **values)
    return path


def say_where(paths: Sequence[Path]) -> None:
    """Prints where results are, one path a line."""
    for path in paths:
        print(f"  {path}")
