"""What happened in between? Fills missing frames from those at both ends (Sec 3.5); a picture like Fig 9."""

from dataclasses import dataclass

from common import QueryArguments, Shown, ask, draw_interpolation, new_folder, save_arrays, start
from pyro_pixels.evaluation.table import N_SEEN


@dataclass
class Arguments(QueryArguments):
    n_seen: int = N_SEEN
    """Frames seen at either end."""
    n_samples: int = 0
    """Sampled fillings to save as well."""


def main(args: Arguments) -> None:
    run, data, device = ask(args)
    out = new_folder(args.out or args.home / "interpolate")
    shown = Shown(run, data, device, n_seen=args.n_seen)
    prediction = shown.interpolation(args.n_samples)
    last = data.images.shape[1] - args.n_seen
    print(f"filled frames {args.n_seen + 1} to {last} of {len(data)} sequences from {args.n_seen} at either end")
    draw_interpolation(shown, shown.generation(), prediction, out)
    save_arrays(out / "interpolation.npz", **prediction._asdict())


if __name__ == "__main__":
    start(main, Arguments, __doc__)
