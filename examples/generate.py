"""Generates the frames that follow a few observed ones (Sec 3.4): pictures like Figs 6 and 8, GIF, .npz and CSV."""

from _common import TableArguments, new_folder, open_sequences, save_arrays, say_where, start

from dataclasses import dataclass

from pyro_pixels._options import Frames, Samples
from pyro_pixels.run_figures import RunView, draw_generation
from pyro_pixels.run_tracks import write_prediction


@dataclass
class Arguments(TableArguments):
    n_seen: Frames | None = None
    """Number of observed frames. By default 5, or fewer if sequences have fewer than 11 frames."""
    n_frames: Frames | None = None
    """Total number of frames, observed and generated. By default as many as the sequences have."""
    n_samples: Samples = 0
    """Number of sampled futures to save as well."""


def main(args: Arguments) -> None:
    (run, data, device), asked = open_sequences(args)
    out = new_folder(args.out or args.home / "generate")
    T = args.n_frames or data.images.shape[1]
    if args.n_seen is not None and args.n_seen >= T:
        raise ValueError(
            f"--n-seen is {args.n_seen}, but the total is {T} frames; give a smaller --n-seen, or a larger --n-frames"
        )
    view = RunView(run, data, device, n_seen=args.n_seen, first=asked.first)
    prediction = view.generation(args.n_frames, args.n_samples)
    last = prediction.mean.shape[2]
    print(f"generated frames {view.n_seen + 1} to {last} of {len(data)} sequences from the first {view.n_seen}")
    arrays = save_arrays(out / "generation.npz", mean_px=view.in_pixels(prediction.mean), **prediction._asdict())
    table = {"data_file": asked.file, "scale": args.scale, "fps": args.fps}
    tables = [write_prediction(view, prediction, out / "generation.csv", **table)] if view.size else []
    say_where([*draw_generation(view, prediction, out), arrays, *tables])


if __name__ == "__main__":
    start(main, Arguments, __doc__)
