"""Queries of a trained model (Secs 2.3, 3.3-3.5): inference, prediction, retrodiction, counterfactuals, evidence."""

from pyro_pixels.queries.counterfactual import Change, canonical, scale_force, scale_period, unchanged, what_if
from pyro_pixels.queries.evidence import Count, Evidence, count_objects, log_evidence
from pyro_pixels.queries.inference_data import to_inference_data
from pyro_pixels.queries.latent_states import (
    averaged,
    filter_states,
    moves,
    positions,
    posterior_states,
    retrodict,
    states,
)
from pyro_pixels.queries.numbering import numbered_as
from pyro_pixels.queries.predict import (
    Inference,
    Prediction,
    States,
    generate,
    infer,
    interpolate,
    reconstruct,
    render,
    smooth,
)
from pyro_pixels.queries.streaming import (
    FilterState,
    ImageStream,
    filtered,
    forecast,
    start,
    start_images,
    step,
    step_image,
)

__all__ = [
    "Change",
    "Count",
    "Evidence",
    "FilterState",
    "ImageStream",
    "Inference",
    "Prediction",
    "States",
    "averaged",
    "canonical",
    "count_objects",
    "filter_states",
    "filtered",
    "forecast",
    "generate",
    "infer",
    "interpolate",
    "log_evidence",
    "moves",
    "numbered_as",
    "positions",
    "posterior_states",
    "reconstruct",
    "render",
    "retrodict",
    "scale_force",
    "scale_period",
    "smooth",
    "start",
    "start_images",
    "states",
    "step",
    "step_image",
    "to_inference_data",
    "unchanged",
    "what_if",
]
