"""Measures peak memory of training steps, each program in its own process.

`python -m benchmarks.memory PRESET PROGRAM DEVICE` measures a step of a preset, and `python -m benchmarks.memory AXIS
SIZE DEVICE` the small step of `growth` with one of its sizes changed.
"""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.growth import AXES, BASE
from benchmarks.steps import LITERAL, OURS, STRUCTURED, OurStep, Step, make_step, programs
from benchmarks.timing import Stopwatch

STEPS = 3
GROWING = ("frames", "frames, one sequence at a time", "objects", "batch")


def measure(watch: Stopwatch, preset: str) -> dict[str, Any]:
    """Returns peak bytes over a few steps, and bytes before the program was created."""
    names = [LITERAL, OURS, *([f"{STRUCTURED}, N = 3"] if preset == "quick" else [])]
    return {name: _elsewhere(preset, name, watch) for name in names}


def measure_growth(watch: Stopwatch) -> dict[str, Any]:
    """Returns the same for each value of those axes of `growth` along which memory has to grow."""
    return {axis: {str(size): _elsewhere(axis, str(size), watch) for size in AXES[axis].values} for axis in GROWING}


def _elsewhere(what: str, which: str, watch: Stopwatch) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.memory", what, which, str(watch.device)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def peak_of_process() -> int:
    """Returns the largest resident memory of this process so far, in bytes.

    On Linux, getrusage's value is inherited from the parent process, so VmHWM is read instead where it exists.
    """
    status = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if own is not None:
        return 1024 * int(own[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(what: str, which: str, device_name: str) -> None:
    device = torch.device(device_name)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else peak_of_process()
    step = _step(what, which, device)
    for _ in range(STEPS):
        step()
    peak = torch.cuda.max_memory_allocated(device) if cuda else peak_of_process()
    print(json.dumps({"before": before, "peak": peak}))


def _step(what: str, which: str, device: torch.device) -> Step:
    if what in AXES:
        return make_step(OurStep, AXES[what].change(BASE, int(which)), device)
    return programs(what, device)[which]()


if __name__ == "__main__":
    main(*sys.argv[1:])
