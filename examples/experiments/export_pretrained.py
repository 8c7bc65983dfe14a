"""Exports the weights of a trained run, with its configuration and metrics, to where `load_pretrained` finds them."""

from examples._common import read_json, read_run, start

from dataclasses import dataclass
from pathlib import Path

from pyro_pixels._checks import check_name
from pyro_pixels.runs import PRETRAINED, export_weights, recorded_file


@dataclass
class Arguments:
    run: Path = Path("runs/quick")
    """Folder of a trained and evaluated run."""
    name: str = "quick"
    """Name of the weights for `load_pretrained`."""
    command: str = "python examples/quickstart.py"
    """The command that made the run, which is stored in about.json."""
    folder: Path = PRETRAINED
    """Parent of the new folder NAME. By default that of the weights that come with the package."""


def main(args: Arguments) -> None:
    check_name("--name", args.name)
    if args.run.resolve() == (args.folder / args.name).resolve():
        raise ValueError(f"{args.run} would be overwritten by its own weights; choose another --folder or --name")
    file = recorded_file(args.run)
    if file is not None:  # `load_pretrained` executes no file
        raise ValueError(
            f"{args.run} needs the definitions in {file}, which do not come with the package; export a run with a "
            "guide, a world and a likelihood of the library or of an installed package"
        )
    run = read_run(args.run)
    measured = args.run / "metrics.json"
    if not measured.exists():
        raise ValueError(f"{measured} is missing; evaluate the run first with examples/evaluate.py --run {args.run}")
    metrics = read_json(measured)
    export_weights(run, args.folder / args.name, {"command": args.command, "seed": run.config.seed, "metrics": metrics})
    size = (args.folder / args.name / "weights.npz").stat().st_size
    print(f"  {args.folder / args.name} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    start(main, Arguments, __doc__)
