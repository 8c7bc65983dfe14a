"""Where are the objects? Infers positions from image sequences (Sec 3.3); a picture like Fig 3 and an .npz."""

from dataclasses import dataclass

from common import QueryArguments, Shown, ask, draw_inference, new_folder, save_arrays, start
from pyro_pixels.queries.predict import infer, smooth


@dataclass
class Arguments(QueryArguments):
    n_samples: int = 0
    """Samples of the positions to save as well."""


def main(args: Arguments) -> None:
    run, data, device = ask(args)
    out = new_folder(args.out or args.home / "infer")
    print(f"inferring the positions of {len(data)} sequences {tuple(data.images.shape[1:])}")
    shown = Shown(run, data, device)
    inferred = infer(run.guide, shown.images, shown.n_objects, n_samples=args.n_samples)
    states = smooth(run.model.dynamics, inferred.mean)
    draw_inference(shown, out)
    save_arrays(
        out / "positions.npz", mean=inferred.mean, std=inferred.std, samples=inferred.samples, states=states.mean,
        states_cov=states.cov, component_probabilities=states.p_z, images=shown.reconstruction(),
    )  # fmt: skip


if __name__ == "__main__":
    start(main, Arguments, __doc__)
