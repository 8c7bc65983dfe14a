"""Where will they be? Generates the frames that follow a few seen ones (Sec 3.4); pictures like Figs 6 and 8, a GIF."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common import TEST_SEED, Shown, device_of, draw_generation, new_folder, save_arrays, sequences_for, start
from pyro_pixels.evaluation import N_SEEN
from pyro_pixels.runs import load_run


@dataclass
class Arguments:
    run: Path = Path("runs/quick")
    """Folder of a trained run."""
    data: Path | None = None
    """An .npz of image sequences; default: fresh ones, simulated as the run's were."""
    out: Path | None = None
    """Folder for the figures and generation.npz; default: generate in the run's folder."""
    n_sequences: int = 60
    n_seen: int = N_SEEN
    """Frames seen."""
    n_frames: int | None = None
    """T, frames in all; default: as many as the sequences have."""
    n_samples: int = 0
    """Sampled futures to save as well."""
    seed: int = TEST_SEED
    device: str = "auto"


def main(args: Arguments) -> None:
    device = device_of(args.device)
    torch.manual_seed(args.seed)
    run = load_run(args.run, device)
    data = sequences_for(run, args.data, args.n_sequences, args.seed)
    out = new_folder(args.out or args.run / "generate")
    shown = Shown(run, data, device, n_seen=args.n_seen)
    prediction = shown.generation(args.n_frames, args.n_samples)
    last = prediction.mean.shape[2]
    print(f"generated frames {args.n_seen + 1} to {last} of {len(data)} sequences from the first {args.n_seen}")
    draw_generation(shown, prediction, out)
    save_arrays(out / "generation.npz", **prediction._asdict())


if __name__ == "__main__":
    start(main, Arguments, __doc__)
