"""Amortised guides q(a | v) (Sec 2.2.1): the base class, the paper's network, and guides that contain the dynamics."""

from pyro_pixels._batch import most_objects, object_mask
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.heads import AttentionHead, LinearHead
from pyro_pixels.guides.inference_rnn import InferenceRNN, StateNetwork
from pyro_pixels.guides.joint import JointGuide
from pyro_pixels.guides.network_starts import start_alike, start_as_ramps, start_with_memory
from pyro_pixels.guides.other_networks import BidirectionalRNN, ConvolutionalFrontEnd
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.guides.refining import Refined, RefinedGuide, refine
from pyro_pixels.guides.structured import ConditionedTracks, StructuredGuide
from pyro_pixels.guides.tracking_head import TrackingHead
from pyro_pixels.guides.untangled import UntangledGuide
from pyro_pixels.guides.untangling import Untangled, resample_labels, untangle

__all__ = [
    "AttentionHead",
    "BidirectionalRNN",
    "ConditionedTracks",
    "ConvolutionalFrontEnd",
    "Guide",
    "InferenceRNN",
    "JointGuide",
    "LinearHead",
    "RecurrentGuide",
    "Refined",
    "RefinedGuide",
    "StateNetwork",
    "StructuredGuide",
    "TrackingHead",
    "Untangled",
    "UntangledGuide",
    "most_objects",
    "object_mask",
    "refine",
    "resample_labels",
    "start_alike",
    "start_as_ramps",
    "start_with_memory",
    "untangle",
]
