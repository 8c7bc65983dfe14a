"""Infers the positions of objects from image sequences (Sec 3.3): a picture like Fig 3, .npz, CSV and GIF."""

from _common import TableArguments, new_folder, open_sequences, save_arrays, say_where, start

from dataclasses import dataclass

from pyro_pixels._options import Samples
from pyro_pixels.run_figures import RunView, draw_inference
from pyro_pixels.run_tracks import write_tracks


@dataclass
class Arguments(TableArguments):
    n_samples: Samples = 0
    """Number of samples of the positions to save as well."""


def main(args: Arguments) -> None:
    (run, data, device), asked = open_sequences(args)
    out = new_folder(args.out or args.home / "infer")
    print(f"inferring the positions of {len(data)} sequences {tuple(data.images.shape[1:])}")
    view = RunView(run, data, device, n_samples=args.n_samples, first=asked.first)
    inferred, states = view.inference, view.states
    arrays = save_arrays(
        out / "positions.npz", mean_px=view.in_pixels(inferred.mean), mean=inferred.mean, std=inferred.std,
        samples=inferred.samples, states=states.mean, states_cov=states.cov, component_probabilities=states.p_z,
        images=view.reconstruction,
    )  # fmt: skip
    paths = draw_inference(view, out)
    tracks = write_tracks(view, out, data_file=asked.file, scale=args.scale, fps=args.fps) if view.size else []
    say_where([*paths, arrays, *tracks])


if __name__ == "__main__":
    start(main, Arguments, __doc__)
