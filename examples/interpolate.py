"""Interpolates missing frames between observed ones at both ends (Sec 3.5): a picture like Fig 9, .npz and CSV."""

from _common import TableArguments, new_folder, open_sequences, save_arrays, say_where, start

from dataclasses import dataclass

from pyro_pixels._options import Frames, Samples
from pyro_pixels.evaluation.answers import check_n_seen, seen_by_default
from pyro_pixels.run_figures import RunView, draw_interpolation
from pyro_pixels.run_tracks import write_prediction


@dataclass
class Arguments(TableArguments):
    n_seen: Frames | None = None
    """Number of observed frames at either end. By default 5, or fewer if sequences have fewer than 11 frames."""
    n_samples: Samples = 0
    """Number of sampled interpolations to save as well."""


def main(args: Arguments) -> None:
    (run, data, device), asked = open_sequences(args)
    out = new_folder(args.out or args.home / "interpolate")
    T = data.images.shape[1]
    n_seen = check_n_seen(seen_by_default(T) if args.n_seen is None else args.n_seen, T, "--n-seen")
    view = RunView(run, data, device, n_seen=n_seen, first=asked.first)
    prediction = view.interpolation(args.n_samples)
    last = T - view.n_seen
    print(
        f"filled frames {view.n_seen + 1} to {last} of {len(data)} sequences from {view.n_seen} at either end"
        + (", fewer in shorter sequences" if int(view.lengths.min()) < T else "")
    )
    arrays = save_arrays(out / "interpolation.npz", mean_px=view.in_pixels(prediction.mean), **prediction._asdict())
    table = {"data_file": asked.file, "scale": args.scale, "fps": args.fps}
    path = out / "interpolation.csv"
    tables = [write_prediction(view, prediction, path, lengths=view.lengths, **table)] if view.size else []
    say_where([*draw_interpolation(view, view.generation(), prediction, out), arrays, *tables])


if __name__ == "__main__":
    start(main, Arguments, __doc__)
