"""What the scripts share: the command line, errors of one line, devices, and opening a run and its sequences."""

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyro
import torch
import tyro
from torch import Tensor

from pyro_pixels._files import atomic_write
from pyro_pixels.data import ImageSequences
from pyro_pixels.run_sequences import TEST_SEED, sequences_to_ask
from pyro_pixels.runs import Run, load_pretrained, load_run

Arguments = TypeVar("Arguments")


def start(main: Callable[[Arguments], int | None], arguments: type[Arguments], doc: str | None) -> None:
    """Reads the command line into ``arguments`` and runs ``main``; what is wrong is one line and exit code 2."""
    try:
        sys.exit(main(tyro.cli(arguments, description=doc)) or 0)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


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
    """Which of these weights: quick, or long, which learned for fifteen times as many steps. Needs --pretrained."""
    data: Path | None = None
    """An .npz of image sequences to ask about. By default fresh ones are simulated as the run's were."""
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


def open_run(args: QueryArguments) -> Opened:
    """The run and the sequences that a script is to ask about, and the device.

    Raises:
        ValueError: if weights that come with the package are named, and a run is asked.
    """
    if args.weights != QueryArguments.weights and not args.pretrained:
        raise ValueError(
            f"--weights {args.weights} names weights that come with the package, and {args.run} is asked; "
            f"add --pretrained, or leave --weights out"
        )
    device = device_of(args.device)
    torch.manual_seed(args.seed)
    run = load_pretrained(args.weights, device) if args.pretrained else load_run(args.run, device)
    return Opened(run, sequences_to_ask(run.config, args.data, args.n_sequences, args.seed), device)


def environment(device: torch.device) -> dict[str, str | int | None]:
    """What a number was measured with."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "processor": platform.processor() if name is None else name[1],
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
    }


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
