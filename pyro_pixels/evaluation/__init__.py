"""Evaluation of trained models: errors with their floors, calibration, health, and baselines."""

from pyro_pixels.evaluation.blob_tracker import BlobTracker, evaluate_tracker
from pyro_pixels.evaluation.calibration import corrected, coverage, fit_correction
from pyro_pixels.evaluation.ed_lstm import EDLSTM, EDLSTMConfig, evaluate_edlstm, fit_edlstm, load_edlstm
from pyro_pixels.evaluation.health import Health, check_health, format_health
from pyro_pixels.evaluation.mean_field import MeanFieldGuide, fit_mean_field
from pyro_pixels.evaluation.table import evaluate, format_table
from pyro_pixels.evaluation.untangled import evaluate_refined, evaluate_untangled

__all__ = [
    "EDLSTM",
    "BlobTracker",
    "EDLSTMConfig",
    "Health",
    "MeanFieldGuide",
    "check_health",
    "corrected",
    "coverage",
    "evaluate",
    "evaluate_edlstm",
    "evaluate_refined",
    "evaluate_tracker",
    "evaluate_untangled",
    "fit_correction",
    "fit_edlstm",
    "fit_mean_field",
    "format_health",
    "format_table",
    "load_edlstm",
]
