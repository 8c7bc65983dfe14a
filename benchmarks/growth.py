"""Measures how the time of a training step grows with each of its sizes, with the others kept small."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.steps import OurStep, make_step, with_objects
from benchmarks.timing import Stopwatch
from pyro_pixels.config import RunConfig
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.worlds.cannonballs import CannonballConfig

BASE = RunConfig(
    state_size=128,
    data=CannonballConfig(height=32, width=32, n_objects=(2,)),
    schedule=Schedule(batch_size=10),
)


class Axis(NamedTuple):
    """Values of a size, and a function that sets it in a configuration."""

    values: tuple[int, ...]
    change: Callable[[RunConfig, int], RunConfig]


def _frames(config: RunConfig, T: int) -> RunConfig:
    return replace(config, data=replace(config.data, n_frames=T))


def _in_parts(config: RunConfig) -> RunConfig:
    return replace(config, schedule=replace(config.schedule, parts=config.schedule.batch_size))


def _pixels(config: RunConfig, n_pixels: int) -> RunConfig:
    side = math.isqrt(n_pixels)
    return replace(config, data=replace(config.data, height=side, width=side))


AXES: dict[str, Axis] = {
    "frames": Axis((30, 60, 120, 250, 500, 1000), _frames),
    "frames, structured guide": Axis((15, 30, 60, 120), lambda c, T: _frames(replace(c, guide="structured"), T)),
    "frames, one sequence at a time": Axis((30, 120, 500, 1000), lambda c, T: _in_parts(_frames(c, T))),
    "objects": Axis((1, 2, 5, 10), lambda c, N: replace(with_objects(c, N), max_objects=N)),
    "batch": Axis((5, 10, 20, 40, 80), lambda c, B: replace(c, schedule=replace(c.schedule, batch_size=B))),
    "state size": Axis((64, 128, 256, 512), lambda c, D: replace(c, state_size=D)),
    "pixels": Axis((16**2, 32**2, 64**2, 128**2), _pixels),
}


def measure(watch: Stopwatch, *, axes: dict[str, Axis] = AXES, base: RunConfig = BASE) -> dict[str, Any]:
    """Returns times of a step for each value of each axis."""
    return {
        name: watch.compare(
            {str(value): make_step(OurStep, axis.change(base, value), watch.device) for value in axis.values}
        )
        for name, axis in axes.items()
    }
