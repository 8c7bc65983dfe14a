"""The configuration of a run, in one dataclass."""

from dataclasses import dataclass, field
from typing import Annotated

from pyro_pixels._checks import SEED, Bounds, check_fields
from pyro_pixels.lgssm.dynamics import DynamicsConfig
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.worlds.base import WorldConfig
from pyro_pixels.worlds.cannonballs import CannonballConfig

Size = Annotated[int, Bounds(1, 65_536)]


@dataclass(frozen=True)
class RunConfig:
    """The complete configuration of a run; the defaults follow Secs 3.1-3.2 to the letter."""

    guide: str = "recurrent"
    """A name in `GUIDES`."""
    custom_file: str | None = None
    """The Python file that added the guide, the world or the likelihood to its registry, if neither this nor another
    installed package provides it."""
    custom_sha256: str | None = None
    """The SHA-256 of ``custom_file`` when the run was trained."""
    state_size: Size = 1024
    """Length of the renderer's states x and of the inference network's states s."""
    guide_state_size: Size | None = None
    """Length of s, if it differs from ``state_size``."""
    clutter: Annotated[float, Bounds(0, 1, below=True, words="a probability")] = 0.0
    """Probability that a background pixel is white, which a structured guide allows for (`TrackingHead`)."""
    max_objects: Annotated[int, Bounds(1, 1_000)] = 3
    """The largest N."""
    background_logit: Annotated[float, Bounds(-1e4, 1e4)] = 0.0
    """Initial value of the renderer's b^v; below 0 the canvas starts dark."""
    renderer_input_scale: Annotated[float, Bounds(0, 1e6, above=True)] | None = None
    """Initial scale of the renderer's W^alpha and W^x; None: as in the paper."""
    image_ramps: Annotated[float, Bounds(-1e6, 1e6)] | None = None
    """Weight of the linear ramps that the inference network's image weights start as (`start_as_ramps`); None: as in
    the paper."""
    common_s0: Annotated[float, Bounds(0, 1)] | None = None
    """Share of each object's initial s_0 that is its own, the rest being common to all (`start_alike`); None: as in the
    paper, all of it."""
    memory: Annotated[float, Bounds(-1e6, 1e6)] | None = None
    """Factor on the identity matrix that is added to the inference network's initial weights from s_{t-1}^n
    (`start_with_memory`); None: as in the paper, none."""
    likelihood: str = "bernoulli"
    """A name in `LIKELIHOODS`, the distribution of pixels given the renderer's logits."""
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    schedule: Schedule = field(default_factory=Schedule)
    data: WorldConfig = field(default_factory=CannonballConfig)
    """The simulated world, one of `WORLDS`; with a ``data_file``, height, width and n_frames are those of the file."""
    data_file: str | None = None
    """An .npz of sequences to train on instead."""
    n_held_out: Annotated[int, Bounds(0, 10**8)] | None = None
    """The number of sequences at the end of ``data_file`` that are held out; None: a tenth, at most 60."""
    n_sequences: Annotated[int, Bounds(1, 10**8)] = 9_000
    """The number of simulated training sequences; with a ``data_file``, that of all sequences in it."""
    seed: Annotated[int, SEED] = 0
    """Seed of the data, the initial weights and training."""

    def __post_init__(self) -> None:
        check_fields(self)
