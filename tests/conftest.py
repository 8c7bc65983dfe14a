"""Small worlds that several test modules use, and a check that no test leaves torch's global state changed."""

import pyro
import pytest
import torch

from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.model.renderer import Renderer
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig

torch.set_num_threads(1)  # the tests run in parallel processes

SMALL = CannonballConfig(n_frames=11, height=12, width=12, radius=1.5)


@pytest.fixture(autouse=True)
def _global_state_is_left_alone():
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    yield
    assert (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()) == before
    assert not list(pyro.get_param_store().keys()), "a test left parameters in Pyro's global store"


@pytest.fixture(scope="session")
def small_data():
    """12 sequences with N = 1, 2, 3 of 11 frames of 12 x 12 pixels."""
    return simulate(SMALL, 12, seed=0)


def make_model(seed: int = 0, state_size: int = 8, **dynamics) -> PixelModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PixelModel(Dynamics(DynamicsConfig(**dynamics)), Renderer(SMALL.height, SMALL.width, state_size))


def make_guide(seed: int = 0, state_size: int = 8, max_objects: int = 3) -> RecurrentGuide:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RecurrentGuide(InferenceRNN(SMALL.height, SMALL.width, state_size, max_objects))
