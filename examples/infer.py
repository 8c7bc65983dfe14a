"""Where are the objects? Infers positions from image sequences (Sec 3.3); a picture like Fig 3 and an .npz."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common import TEST_SEED, Shown, device_of, draw_inference, new_folder, save_arrays, sequences_for, start
from pyro_pixels.queries import infer, smooth
from pyro_pixels.runs import load_run


@dataclass
class Arguments:
    run: Path = Path("runs/quick")
    """Folder of a trained run."""
    data: Path | None = None
    """An .npz of image sequences; default: fresh ones, simulated as the run's were."""
    out: Path | None = None
    """Folder for the figure and positions.npz; default: infer in the run's folder."""
    n_sequences: int = 60
    n_samples: int = 0
    """Samples of the positions to save as well."""
    seed: int = TEST_SEED
    device: str = "auto"


def main(args: Arguments) -> None:
    device = device_of(args.device)
    torch.manual_seed(args.seed)
    run = load_run(args.run, device)
    data = sequences_for(run, args.data, args.n_sequences, args.seed)
    out = new_folder(args.out or args.run / "infer")
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
