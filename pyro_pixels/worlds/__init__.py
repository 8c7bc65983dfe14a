"""Simulated image sequences (Sec 3.1): cannonballs, drifting discs, bouncing balls."""

from pyro_pixels.worlds.base import WorldConfig, simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig, true_dynamics
from pyro_pixels.worlds.drawing import Look
from pyro_pixels.worlds.others import WORLDS, BouncingConfig, DriftConfig

__all__ = [
    "WORLDS",
    "BouncingConfig",
    "CannonballConfig",
    "DriftConfig",
    "Look",
    "WorldConfig",
    "simulate",
    "true_dynamics",
]
