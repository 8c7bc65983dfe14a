"""Training (Secs 2.2.2, 3.2): the ELBO with KL annealing, the schedule, the loop, and learning from another guide."""

from pyro_pixels.training.checkpoints import load_checkpoint, save_checkpoint
from pyro_pixels.training.distillation import GivenTracks, draw_tracks
from pyro_pixels.training.elbo import AnnealedELBO, BoundTerms, bound
from pyro_pixels.training.fitting import fit, fit_together
from pyro_pixels.training.loop import FitResult
from pyro_pixels.training.own_tracks import OwnTracks
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.training.start_mixture import fit_starts
from pyro_pixels.training.svi import Training, TrainingOptions

__all__ = [
    "AnnealedELBO",
    "BoundTerms",
    "FitResult",
    "GivenTracks",
    "OwnTracks",
    "Schedule",
    "Training",
    "TrainingOptions",
    "bound",
    "draw_tracks",
    "fit",
    "fit_starts",
    "fit_together",
    "load_checkpoint",
    "save_checkpoint",
]
