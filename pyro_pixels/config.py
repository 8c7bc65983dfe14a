"""What makes a run: one dataclass that says everything."""

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
    """Everything that makes a run; the defaults are the `paper` preset, Secs 3.1-3.2 to the letter."""

    guide: str = "recurrent"
    """A name in `GUIDES`."""
    custom_file: str | None = None
    """The Python file that added the guide to `GUIDES`, where it is neither the package's nor an installed one's."""
    custom_sha256: str | None = None
    """The checksum of ``custom_file`` when the run was trained."""
    state_size: Size = 1024
    """Length of the states x of the renderer, and of s of the inference network."""
    guide_state_size: Size | None = None
    """Length of s, if it is another."""
    clutter: Annotated[float, Bounds(0, 1, below=True, words="a probability")] = 0.0
    """Probability that a pixel of the background is white, which a structured guide reckons with (`TrackingHead`)."""
    max_objects: Annotated[int, Bounds(1, 1_000)] = 3
    """The largest N."""
    background_logit: Annotated[float, Bounds(-1e4, 1e4)] = 0.0
    """Where the renderer's b^v starts; below 0 the canvas starts dark."""
    renderer_input_scale: Annotated[float, Bounds(0, 1e6, above=True)] | None = None
    """Where the renderer's W^alpha and W^x start; None: as the paper."""
    image_ramps: Annotated[float, Bounds(-1e6, 1e6)] | None = None
    """Weight of the ramps that the inference network's image weights start as (`start_as_ramps`); None: as the
    paper."""
    common_s0: Annotated[float, Bounds(0, 1)] | None = None
    """Share of its own that each object's s_0 starts with, the rest being common to all (`start_alike`); None: as the
    paper, all its own."""
    memory: Annotated[float, Bounds(-1e6, 1e6)] | None = None
    """Gain of the identity that the inference network's weights from s_{t-1}^n start with (`start_with_memory`); None:
    as the paper, none."""
    likelihood: str = "bernoulli"
    """A name in `LIKELIHOODS`: what pixels are, given the renderer's logits."""
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    schedule: Schedule = field(default_factory=Schedule)
    data: WorldConfig = field(default_factory=CannonballConfig)
    """What to simulate, one of `WORLDS`; height, width and n_frames are those of the file where there is one."""
    data_file: str | None = None
    """An .npz of sequences to learn from instead."""
    n_held_out: Annotated[int, Bounds(0, 10**8)] | None = None
    """How many sequences at the end of ``data_file`` are not trained on; None: a tenth, at most 60."""
    n_sequences: Annotated[int, Bounds(1, 10**8)] = 9_000
    """How many sequences there are for training."""
    seed: Annotated[int, SEED] = 0
    """Of the data, the starting weights, and training."""

    def __post_init__(self) -> None:
        check_fields(self)
