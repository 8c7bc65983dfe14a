"""Simulates cannonballs (Sec 3.1), or another world, and writes them as an .npz, with a picture like Fig 1.

Everything else about a world can be changed, too, by naming its configuration after the other options:
`python examples/simulate.py --out drift.npz config:drift-config --config.look.salt-and-pepper 0.02`.
"""

from _common import say_where, start

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pyro_pixels._options import Frames, Objects, Pixels, Positive, Seed, Sequences, result_file
from pyro_pixels.data import save_sequences
from pyro_pixels.run_figures import draw_sequences
from pyro_pixels.worlds.base import WorldConfig, simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig
from pyro_pixels.worlds.others import WORLDS, BouncingConfig, DriftConfig

SIZE = 32  # pixels, where no size is given

Cannonballs = Annotated[
    CannonballConfig,
    tyro.conf.subcommand("cannonball-config", default=CannonballConfig(height=SIZE, width=SIZE)),
]


@dataclass
class Arguments:
    out: Path = Path("data/test.npz")
    """The .npz to write; the picture lies beside it."""
    n_sequences: Sequences = 300
    """How many sequences to simulate."""
    seed: Seed = 0
    """Seed of the sequences."""
    world: Literal["cannonballs", "drift", "bouncing"] | None = None
    """The world to simulate. By default cannonballs."""
    height: Pixels | None = None
    """Height of the images in pixels. By default 32."""
    width: Pixels | None = None
    """Width of the images in pixels. By default 32."""
    n_frames: Frames | None = None
    """How many frames a sequence has. By default 30."""
    n_objects: tuple[Objects, ...] | None = None
    """The numbers of objects that occur, equally often. By default 1 2 3."""
    radius: Positive | None = None
    """Radius of the objects in pixels. By default 2."""
    config: Cannonballs | DriftConfig | BouncingConfig | None = None
    """Everything about the world, in the place of the options above."""


def configure(args: Arguments) -> WorldConfig:
    """The world that is asked for.

    Raises:
        ValueError: if it is described twice.
    """
    names = ("height", "width", "n_frames", "n_objects", "radius")
    given: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.config is None:
        return replace(WORLDS[args.world or "cannonballs"](height=SIZE, width=SIZE), **given)
    if args.world not in (None, args.config.world):
        raise ValueError(f"--world {args.world} contradicts the configuration of {args.config.world}; leave one out")
    return replace(args.config, **given)


def main(args: Arguments) -> None:
    out, c = result_file(args.out, ".npz"), configure(args)
    print(
        f"simulating {args.n_sequences} sequences of {c.n_frames} frames, {c.height} x {c.width} pixels, "
        f"N in {c.n_objects}, seed {args.seed}"
    )
    data = simulate(c, args.n_sequences, seed=args.seed)
    save_sequences(out, data)
    say_where([out, draw_sequences(data, out.with_suffix(".png"))])


if __name__ == "__main__":
    start(main, Arguments, __doc__)
