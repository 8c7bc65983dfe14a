"""Simulates cannonballs (Sec 3.1), or another world, and writes them as an .npz, with a picture like Fig 1."""

from dataclasses import dataclass, field
from pathlib import Path

from _common import say_where, start
from pyro_pixels.data import save_sequences
from pyro_pixels.run_figures import draw_sequences
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig
from pyro_pixels.worlds.others import BouncingConfig, DriftConfig


@dataclass
class Arguments:
    out: Path = Path("data/test.npz")
    """The file to write; the picture lies beside it."""
    n_sequences: int = 300
    seed: int = 0
    config: CannonballConfig | DriftConfig | BouncingConfig = field(
        default_factory=lambda: CannonballConfig(height=32, width=32)
    )
    """Which world, and everything about it."""


def main(args: Arguments) -> None:
    c = args.config
    print(
        f"simulating {args.n_sequences} sequences of {c.n_frames} frames, {c.height} x {c.width} pixels, "
        f"N in {c.n_objects}, seed {args.seed}"
    )
    data = simulate(c, args.n_sequences, seed=args.seed)
    save_sequences(args.out, data)
    say_where([args.out, draw_sequences(data, args.out.with_suffix(".png"))])


if __name__ == "__main__":
    start(main, Arguments, __doc__)
