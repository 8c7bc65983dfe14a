"""Times the commands that query a run, beside those of another commit: ``python benchmarks/commands.py TREE``.

TREE is a checkout of the other commit, for example from ``git worktree add ../before 478dc58``. Each command processes
200 sequences with the pretrained weights, alternating between the trees, each time in a new process with one thread.
Times are processor seconds, as others may use the machine. The time of Python's imports is measured as well, since no
query can reduce it. Writes docs/results/commands.json.
"""

import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from pyro_pixels._checksums import write_json

COMMANDS = {
    "import": ["infer.py", "--help"],
    "evaluate": ["evaluate.py", "--out", "o.json"],
    "infer": ["infer.py", "--out", "o"],
    "what-if": ["ask.py", "--question", "what-if", "--out", "o"],
}
ASKED = ["--pretrained", "--n-sequences", "200", "--device", "cpu"]
HERE, OUT = Path(__file__).absolute().parent.parent, Path("docs/results/commands.json")


def seconds_of(tree: Path, words: list[str], folder: Path) -> float:
    """Returns the processor seconds, user plus system, of a script in a tree."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(tree / "examples" / words[0]), *words[1:]]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commit_of(tree: Path) -> str:
    """Returns the commit checked out in a tree."""
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main(before: Path, rounds: int) -> None:
    trees = {"before": before.absolute(), "now": HERE}
    seconds: dict[str, dict[str, list[float]]] = {name: {tree: [] for tree in trees} for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, words in COMMANDS.items():
                for tree, path in trees.items():
                    asked = [] if name == "import" else ASKED
                    seconds[name][tree].append(seconds_of(path, [*words, *asked], Path(folder)))
    middle = {name: {tree: float(np.median(x)) for tree, x in each.items()} for name, each in seconds.items()}
    work = {
        name: {tree: middle[name][tree] - middle["import"][tree] for tree in trees}
        for name in COMMANDS
        if name != "import"
    }
    result = {
        "commits": {tree: commit_of(path) for tree, path in trees.items()},
        "command": f"python benchmarks/commands.py TREE {rounds}",
        "processor_seconds": seconds,
        "median": middle,
        "without_imports": work,
        "share": {name: x["now"] / x["before"] for name, x in middle.items()},
        "share_without_imports": {name: x["now"] / x["before"] for name, x in work.items()},
        "environment": {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()},
    }
    write_json(OUT, result)
    for name, x in middle.items():
        print(f"{name:<10}{x['before']:>8.2f} s before{x['now']:>8.2f} s now")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not (Path(sys.argv[1]) / "examples").is_dir():
        print(
            "error: give the folder of a checkout of another commit, and optionally a number of rounds", file=sys.stderr
        )
        sys.exit(2)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 3)
