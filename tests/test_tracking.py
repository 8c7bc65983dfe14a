"""Pixels shared by forecasts: identities come from where objects come from."""

import numpy as np
import pytest
import torch

from pyro_pixels.data import render_disks
from pyro_pixels.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.tracking import TrackingHead, share

W, T, D = 32, 16, 4


def make_head():
    """A head whose first state unit claims the left half (above 0) or the right half (below 0) of the image."""
    torch.manual_seed(0)
    dynamics = Dynamics(DynamicsConfig(delta=0.2, state_noise=1e-6, position_noise=2e-3, start_spread=0.1))
    head = TrackingHead(dynamics, W, W, D)
    with torch.no_grad():
        head.to_claim.weight.zero_()
        head.to_claim.weight[1, 0] = 10.0  # the wave that falls from 1 at the left edge to -1 at the right
    return head


def crossing(rows=(14.0, 17.0)):
    """Two balls that start at either side, meet in the middle and part: positions (1, 2, T, 2) and images."""
    t = np.linspace(0, 1, T)
    paths = np.stack([np.stack([6 + 19 * t, rows[0] + 0 * t], -1), np.stack([25 - 19 * t, rows[1] + 0 * t], -1)])[None]
    return torch.from_numpy(paths), torch.from_numpy(render_disks(paths, W, W, 2.0)).float()


def first_frame_claims():
    """States that say left or right in the first frame, and nothing later."""
    s = torch.zeros(1, 2, T, D)
    s[0, :, 0, 0] = torch.tensor([1.0, -1.0])
    return s


def in_pixels(y):
    return (y + 1) * (W - 1) / 2


@pytest.mark.parametrize("rows", [(14.0, 17.0), (15.0, 15.0)], ids=["past each other", "through each other"])
def test_identities_survive_a_crossing(rows):
    paths, images = crossing(rows)
    y, _ = make_head()(first_frame_claims(), images, torch.tensor([2]))
    error = (in_pixels(y.detach()) - paths).norm(dim=-1)
    assert float(error[..., :4].max()) < 0.7
    assert float(error[..., -4:].max()) < 0.7
    assert float(error.mean()) < 1.0


def test_the_claims_decide_who_is_who():
    paths, images = crossing()
    y, _ = make_head()(-first_frame_claims(), images, torch.tensor([2]))
    assert float((in_pixels(y.detach()) - paths.flip(1)).norm(dim=-1).mean()) < 1.0


def test_an_object_nobody_sees_keeps_its_course():
    """Black frames in the middle: the forecasts carry each object on, so each is found again on its side."""
    paths, images = crossing()
    images[:, 5:10] = 0
    y, sigma = make_head()(first_frame_claims(), images, torch.tensor([2]))
    assert bool(y.isfinite().all())
    assert float((in_pixels(y.detach()) - paths)[:, :, 10:].norm(dim=-1).max()) < 1.5
    assert float(sigma[:, :, 5:10].min()) > 50 * float(sigma[:, :, 10:].max())


def test_absent_objects_get_nothing():
    _, images = crossing()
    head = make_head()
    y, sigma = head(first_frame_claims(), images, torch.tensor([1]))
    white = images[0, 0].nonzero().double().mean(0).flip(0)
    torch.testing.assert_close(in_pixels(y[0, 0, 0].double()), white, rtol=0, atol=0.05)
    assert bool((sigma[0, 1] > 10 * sigma[0, 0]).all())


def test_shares_add_up():
    torch.manual_seed(0)
    v, place, log_claim = torch.rand(2, 1, 5, 7), torch.randn(2, 1, 5, 7, 2), torch.randn(2, 3, 5, 7)
    centroid, mass = share(v, place, log_claim)
    torch.testing.assert_close(mass.sum(1, keepdim=True), v.sum(-1, keepdim=True))
    whole = (v.unsqueeze(-1) * place).sum(-2)
    torch.testing.assert_close((centroid * mass).sum(1, keepdim=True), whole)


def test_gradients_reach_the_claims_and_sigma_and_stay_finite():
    _, images = crossing()
    images[:, 3] = 0
    head = make_head()
    s = first_frame_claims().requires_grad_()
    y, sigma = head(s, images, torch.tensor([2]))
    (y.sum() + sigma.sum()).backward()
    for gradient in (s.grad, head.to_claim.weight.grad, head.to_log_sigma.weight.grad):
        assert bool(gradient.isfinite().all())
    assert bool((head.to_claim.weight.grad != 0).any())
    assert all(p.grad is None for p in head.dynamics.parameters())
