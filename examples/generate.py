"""Where will they be? Generates the frames that follow a few seen ones (Sec 3.4); pictures like Figs 6 and 8, a GIF."""

from dataclasses import dataclass

from common import QueryArguments, Shown, ask, draw_generation, new_folder, save_arrays, start
from pyro_pixels.evaluation.table import N_SEEN


@dataclass
class Arguments(QueryArguments):
    n_seen: int = N_SEEN
    """Frames seen."""
    n_frames: int | None = None
    """T, frames in all; default: as many as the sequences have."""
    n_samples: int = 0
    """Sampled futures to save as well."""


def main(args: Arguments) -> None:
    run, data, device = ask(args)
    out = new_folder(args.out or args.home / "generate")
    shown = Shown(run, data, device, n_seen=args.n_seen)
    prediction = shown.generation(args.n_frames, args.n_samples)
    last = prediction.mean.shape[2]
    print(f"generated frames {args.n_seen + 1} to {last} of {len(data)} sequences from the first {args.n_seen}")
    draw_generation(shown, prediction, out)
    save_arrays(out / "generation.npz", **prediction._asdict())


if __name__ == "__main__":
    start(main, Arguments, __doc__)
