"""What happened in between? Fills missing frames from those at both ends (Sec 3.5); a picture like Fig 9."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common import TEST_SEED, Shown, device_of, draw_interpolation, new_folder, save_arrays, sequences_for, start
from pyro_pixels.evaluation import N_SEEN
from pyro_pixels.runs import load_run


@dataclass
class Arguments:
    run: Path = Path("runs/quick")
    """Folder of a trained run."""
    data: Path | None = None
    """An .npz of image sequences; default: fresh ones, simulated as the run's were."""
    out: Path | None = None
    """Folder for the figure and interpolation.npz; default: interpolate in the run's folder."""
    n_sequences: int = 60
    n_seen: int = N_SEEN
    """Frames seen at either end."""
    n_samples: int = 0
    """Sampled fillings to save as well."""
    seed: int = TEST_SEED
    device: str = "auto"


def main(args: Arguments) -> None:
    device = device_of(args.device)
    torch.manual_seed(args.seed)
    run = load_run(args.run, device)
    data = sequences_for(run, args.data, args.n_sequences, args.seed)
    out = new_folder(args.out or args.run / "interpolate")
    shown = Shown(run, data, device, n_seen=args.n_seen)
    prediction = shown.interpolation(args.n_samples)
    last = data.images.shape[1] - args.n_seen
    print(f"filled frames {args.n_seen + 1} to {last} of {len(data)} sequences from {args.n_seen} at either end")
    draw_interpolation(shown, shown.generation(), prediction, out)
    save_arrays(out / "interpolation.npz", **prediction._asdict())


if __name__ == "__main__":
    start(main, Arguments, __doc__)
