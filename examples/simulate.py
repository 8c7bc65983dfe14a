"""Simulates cannonballs (Sec 3.1), or another world, and writes them to an .npz, with a picture like Fig 1.

All other settings of a world can be changed by adding its configuration after the other options:
`python examples/simulate.py --out drift.npz config:drift-config --config.look.salt-and-pepper 0.02`.
"""

from _common import choose, make_world, say_where, start

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from pyro_pixels._options import Frames, Objects, Pixels, Positive, Seed, Sequences, result_file
from pyro_pixels.custom import load_file
from pyro_pixels.data import save_sequences
from pyro_pixels.plots.paper import figure_beside
from pyro_pixels.run_figures import draw_sequences
from pyro_pixels.runs import REGISTRIES
from pyro_pixels.worlds.base import WorldConfig, simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig
from pyro_pixels.worlds.others import BouncingConfig, DriftConfig

SIZE = 32  # default height and width, in pixels

Cannonballs = Annotated[
    CannonballConfig,
    tyro.conf.subcommand("cannonball-config", default=CannonballConfig(height=SIZE, width=SIZE)),
]
Drift = Annotated[DriftConfig, tyro.conf.subcommand("drift-config", default=DriftConfig(height=SIZE, width=SIZE))]
Bouncing = Annotated[
    BouncingConfig, tyro.conf.subcommand("bouncing-config", default=BouncingConfig(height=SIZE, width=SIZE))
]


@dataclass
class Arguments:
    out: Path = Path("data/test.npz")
    """The .npz to write; the picture is written next to it."""
    n_sequences: Sequences = 300
    """Number of sequences to simulate."""
    seed: Seed = 0
    """Seed of the sequences."""
    world: str | None = None
    """Name of a world in `WORLDS` to simulate: cannonballs, drift or bouncing. By default that of --custom, or else
    cannonballs."""
    custom: Path | None = None
    """A Python file that adds your own world to `WORLDS` (docs/other_worlds.md)."""
    height: Pixels | None = None
    """Height of the images in pixels. By default 32."""
    width: Pixels | None = None
    """Width of the images in pixels. By default 32."""
    n_frames: Frames | None = None
    """Number of frames per sequence. By default 30."""
    n_objects: tuple[Objects, ...] | None = None
    """Numbers of objects, which occur equally often. By default 1 2 3."""
    radius: Positive | None = None
    """Radius of the objects in pixels. By default 2."""
    config: Cannonballs | Drift | Bouncing | None = None
    """All settings of the world; options given above override them."""


def configure(args: Arguments) -> WorldConfig:
    """Returns the configuration of the requested world.

    Raises:
        ValueError: if there is no such world, or two different worlds are given.
    """
    file = None if args.custom is None else load_file(args.custom, REGISTRIES)
    if file is not None and not file.names["world"]:
        raise ValueError(f"{args.custom} adds {file.describe()}, but no world; leave out --custom")
    world = choose(file, "world", args.world)
    names = ("height", "width", "n_frames", "n_objects", "radius")
    given: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.config is None:
        return replace(make_world(world or "cannonballs", height=SIZE, width=SIZE), **given)
    if world not in (None, args.config.world):
        option = f"--custom {args.custom}" if args.world is None else f"--world {args.world}"
        raise ValueError(f"{option} contradicts the configuration of {args.config.world}; leave one out")
    return replace(args.config, **given)


def main(args: Arguments) -> None:
    out, c = result_file(args.out, ".npz"), configure(args)
    picture = figure_beside(out)
    print(
        f"simulating {args.n_sequences} sequences of {c.n_frames} frames, {c.height} x {c.width} pixels, "
        f"N in {c.n_objects}, seed {args.seed}"
    )
    data = simulate(c, args.n_sequences, seed=args.seed)
    save_sequences(out, data)
    say_where([out, draw_sequences(data, picture)])


if __name__ == "__main__":
    start(main, Arguments, __doc__)
