"""Unsupervised separation of dynamics from pixels (Chiappa and Paquet) in Pyro.

Shapes throughout: B sequences, N objects, K components, T time steps, H x W pixels, S samples.

    v, images   (B, T, H, W)   images within [0, 1], the paper's 0 or 1; unobserved frames are NaN
    n_objects   (B,)           number of objects in each sequence, at most N
    a           (B, N, T, 2)   positions in latent units; ``positions`` and ``paths`` are in pixels, (column, row)
    h           (B, N, T, 4)   states (x, y, vx, vy)
    z           (B, N)         mixture component of the start
    s           (B, N, T, D)   states of the inference network
"""

from pyro_pixels.data import load_sequences, save_sequences
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.model.renderer import Renderer
from pyro_pixels.presets import PRESETS
from pyro_pixels.queries.predict import generate, infer, interpolate, reconstruct, smooth
from pyro_pixels.runs import build, load_pretrained, load_run
from pyro_pixels.training.elbo import AnnealedELBO
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.video import load_video
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig

__all__ = [
    "PRESETS",
    "AnnealedELBO",
    "CannonballConfig",
    "Dynamics",
    "DynamicsConfig",
    "Guide",
    "InferenceRNN",
    "PixelModel",
    "RecurrentGuide",
    "Renderer",
    "Schedule",
    "StructuredGuide",
    "build",
    "evaluate",
    "fit",
    "generate",
    "infer",
    "interpolate",
    "load_pretrained",
    "load_run",
    "load_sequences",
    "load_video",
    "reconstruct",
    "save_sequences",
    "simulate",
    "smooth",
]
__version__ = "0.1.0"
