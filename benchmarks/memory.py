"""Peak memory of training steps, each program in a process of its own: `python memory.py PRESET PROGRAM DEVICE`."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from steps import LITERAL, OURS, STRUCTURED, programs
from timing import Stopwatch

STEPS = 3


def measure(watch: Stopwatch, preset: str) -> dict[str, Any]:
    """Bytes at the peak of a few steps, and those that the process had before it made the program."""
    found = {}
    for name in [LITERAL, OURS, *([f"{STRUCTURED}, N = 3"] if preset == "quick" else [])]:
        command = [sys.executable, __file__, preset, name, str(watch.device)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        found[name] = json.loads(done.stdout)
    return found


def peak_of_process() -> int:
    """The largest resident memory so far, in bytes.

    Linux hands getrusage's figure down from the process that started this one, so its own is read where there is one.
    """
    status = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if own is not None:
        return 1024 * int(own[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(preset: str, name: str, device_name: str) -> None:
    device = torch.device(device_name)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else peak_of_process()
    step = programs(preset, device)[name]()
    for _ in range(STEPS):
        step()
    peak = torch.cuda.max_memory_allocated(device) if cuda else peak_of_process()
    print(json.dumps({"before": before, "peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
