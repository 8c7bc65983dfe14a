"""Pixels shared by the dynamics: identities come from where objects come from."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyro_pixels.guides.association import (
    TRACK_NOISE,
    Pixels,
    Tracks,
    absent_penalty,
    centroids,
    log_density,
    share,
    with_slopes,
)
from pyro_pixels.guides.following import follow
from pyro_pixels.guides.forecasts import frame_orders
from pyro_pixels.guides.heads import WhitePixels
from pyro_pixels.guides.tracking_head import TrackingHead
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig, collapse_components
from pyro_pixels.worlds.drawing import render_disks

W, T, D = 32, 16, 4


def make_head(n_starts=8, clutter=0.0):
    """A head whose first state unit claims the left half (above 0) or the right half (below 0) of the image."""
    torch.manual_seed(0)
    dynamics = Dynamics(DynamicsConfig(delta=0.2, state_noise=1e-6, position_noise=2e-3, start_spread=0.1))
    head = TrackingHead(dynamics, W, W, D, n_starts=n_starts, clutter=clutter)
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
    """States that say left or right in the first frame and the other way round in the last; nothing in between."""
    s = torch.zeros(1, 2, T, D)
    s[0, :, 0, 0] = torch.tensor([1.0, -1.0])
    s[0, :, -1, 0] = torch.tensor([-1.0, 1.0])
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
    sigma = sigma.detach()
    assert float(sigma[:, :, 5:10].min()) > 50 * float(sigma[:, :, 10:].max())


def test_absent_objects_get_nothing():
    _, images = crossing()
    head = make_head()
    y, sigma = head(first_frame_claims(), images, torch.tensor([1]))
    white = images[0, 0].nonzero().double().mean(0).flip(0)
    torch.testing.assert_close(in_pixels(y[0, 0, 0].double()), white, rtol=0, atol=0.05)
    assert bool((sigma[0, 1] > 10 * sigma[0, 0]).all())


def test_a_start_in_which_objects_hide_each_other_is_not_kept():
    """Both balls at one place in the first frame, where no claim can tell them apart; later frames can."""
    t = np.linspace(0, 1, T)
    paths = np.stack([np.stack([4 + 20 * t, 16 + 10 * t], -1), np.stack([4 + 20 * t, 16 - 10 * t], -1)])[None]
    images = torch.from_numpy(render_disks(paths, W, W, 2.0)).float()
    s = torch.zeros(1, 2, T, D)
    s[0, :, -1, 1] = torch.tensor([1.0, -1.0])
    head = make_head()
    with torch.no_grad():
        head.to_claim.weight[8, 1] = -10.0  # the wave along the rows
    y, _ = head(s, images, torch.tensor([2]))
    assert float((in_pixels(y.detach()) - torch.from_numpy(paths)).norm(dim=-1)[..., 4:].max()) < 1.0


def random_tracks(seed, n_frames=9):
    torch.manual_seed(seed)
    dynamics = Dynamics(DynamicsConfig(delta=0.2, state_noise=1e-3, position_noise=1e-2, start_velocity_spread=0.3))
    return dynamics, Tracks.of(dynamics, 0.01 * torch.eye(2), n_frames, torch.float64)


def one_pixel_frames(place):
    """Sequences (B, T, 2) in which each frame has one white pixel of a weight that leaves no doubt."""
    return WhitePixels(torch.full((*place.shape[:2], 1), 1e12), place.unsqueeze(2), torch.zeros(*place.shape[:2], 1))


def test_following_forward_is_the_kalman_filter_and_smoothing_the_smoother():
    """With one object that is seen without doubt, the forecasts are the filter's; shown by its innovations."""
    dynamics, tracks = random_tracks(0)
    y = torch.randn(3, 9, 2, dtype=torch.float64)
    lgssm = collapse_components(dynamics.lgssm(), dynamics.pi)
    noise = TRACK_NOISE**2 * torch.eye(2, dtype=torch.float64)
    measured = lgssm._replace(Sigma_A=lgssm.Sigma_A + noise)
    filtered = kalman.kalman_filter(measured, y)
    blobs = tracks.smooth(y.unsqueeze(-1))
    smoothed = blobs[:, :, :2, 0]  # of a, that is of B h plus what Sigma_A adds
    a_given_h = kalman.rts_smoother(measured, y).mean @ lgssm.B.mT
    gain = lgssm.Sigma_A @ torch.linalg.inv(measured.Sigma_A)
    torch.testing.assert_close(smoothed, a_given_h + (y - a_given_h) @ gain.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(blobs[:, :, 2:, 0], smoothed @ tracks.blob_precision, rtol=0, atol=1e-8)

    unseen = torch.arange(9) >= 6  # weightless pixels far off: what follow gives there is its forecast
    white = one_pixel_frames(y)
    white = white._replace(v=white.v.double() * ~unseen[:, None])
    claim, penalty = torch.zeros(3, 1, 1, 1, dtype=torch.float64), torch.zeros(3, 1)
    followed = follow(tracks, Pixels.of(white), claim, penalty, torch.arange(9).unsqueeze(0))[..., 0]
    forecast = kalman.rollout(measured, filtered.mean[:, 5], filtered.cov[5], 3).mean @ lgssm.B.mT
    torch.testing.assert_close(followed[:, :6], y[:, :6], rtol=0, atol=1e-9)
    torch.testing.assert_close(followed[:, 6:], forecast, rtol=0, atol=1e-9)


def test_any_order_forecasts_from_what_it_has_passed():
    """A frame that is passed last, and not seen, is filled with its mean given all others, whatever the order."""
    _, tracks = random_tracks(1)
    y = torch.randn(2, 9, 2, dtype=torch.float64)
    for hidden in (0, 4, 8):
        orders = torch.stack(
            [torch.cat([p[p != hidden], torch.tensor([hidden])]) for p in (torch.randperm(9) for _ in range(3))]
        )
        white = one_pixel_frames(y)
        v = white.v.double()
        v[:, hidden] = 0
        claim, penalty = torch.zeros(2, 3, 1, 1, dtype=torch.float64), torch.zeros(2, 1)
        followed = follow(tracks, Pixels.of(white._replace(v=v)), claim, penalty, orders)[:, hidden].mT
        known = torch.arange(18) // 2 != hidden
        e = (y - tracks.mean).flatten(1)[:, known]
        C = tracks.cov
        expected = tracks.mean[hidden] + e @ torch.linalg.solve(C[known][:, known], C[known][:, ~known])
        torch.testing.assert_close(followed, expected.unsqueeze(1).expand(-1, 3, -1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("n_frames", [1, 2, 5, 30])
@pytest.mark.parametrize("n_starts", [2, 4, 6])
def test_orders_are_permutations_in_which_black_frames_come_last(n_frames, n_starts):
    v = torch.ones(2, n_frames, 3)
    v[:, 1::2] = 0
    orders = frame_orders(WhitePixels(v, torch.zeros(2, n_frames, 3, 2), v), n_starts)
    assert orders.shape == (n_starts, n_frames)
    assert bool((orders.sort(1).values == torch.arange(n_frames)).all())
    n_seen = -(-n_frames // 2)
    assert bool((orders[:, :n_seen] % 2 == 0).all())
    assert {0, 2 * (n_seen - 1)} <= set(orders[:, 0].tolist())


def test_shares_add_up():
    torch.manual_seed(0)
    v, place, l = torch.rand(2, 5, 7), torch.randn(2, 5, 7, 2), torch.randn(2, 5, 3, 7)
    l[:, :, 2] = -1e30
    centroid, mass = (x.mT for x in centroids(share(Pixels.of(WhitePixels(v, place, v)).weighed, l)))
    torch.testing.assert_close(mass[:, :, :2].sum(2), v.sum(-1, keepdim=True))
    whole = (v.unsqueeze(-1) * place).sum(-2)
    torch.testing.assert_close((centroid * mass)[:, :, :2].sum(2), whole)
    assert float(mass[:, :, 2].max()) <= 1e-4


def test_hypotheses_share_the_pixels_each_for_itself():
    torch.manual_seed(0)
    v, place, l, nobody = torch.rand(2, 5, 7), torch.randn(2, 5, 7, 2), torch.randn(2, 5, 3, 4, 7), torch.randn(2, 5, 7)
    weighed = Pixels.of(WhitePixels(v, place, v)).weighed
    for background in (None, nobody):
        shares = share(weighed, l.flatten(2, 3), background, 4).unflatten(-1, (3, 4))
        for i in range(4):
            torch.testing.assert_close(shares[..., i], share(weighed, l[:, :, :, i], background))


def test_shares_are_those_of_the_densities():
    torch.manual_seed(0)
    place, centre = torch.randn(4, 7, 2), torch.randn(4, 3, 2)
    root = torch.randn(2, 2)
    cov = root @ root.mT + torch.eye(2)
    penalty = absent_penalty(torch.tensor([True, True, False]).expand(4, 3))
    pixels = F.pad(place, (0, 1), value=1.0).mT
    blobs = with_slopes(centre.mT, torch.linalg.inv(cov))
    l = log_density(pixels, blobs, penalty.unsqueeze(1))
    many = log_density(pixels, blobs.repeat(1, 1, 3), penalty.unsqueeze(1).repeat(1, 1, 3))  # by one product
    torch.testing.assert_close(many.unflatten(1, (3, 3)), l.unsqueeze(1).expand(-1, 3, -1, -1))
    normal = torch.distributions.MultivariateNormal(centre.unsqueeze(2), cov)
    expected = normal.log_prob(place.unsqueeze(1))
    torch.testing.assert_close(l[:, :2].softmax(1), expected[:, :2].softmax(1))
    assert float(l[:, 2].max()) < -1e29


def test_a_frame_in_which_many_tracks_start_has_its_claims_counted_once():
    """With one frame that is not black all tracks start there; the shares are those of one start."""
    _, images = crossing()
    images[:, 1:] = 0
    images[:, 0] = torch.from_numpy(render_disks(np.array([[[[14.0, 15.0]], [[17.0, 15.0]]]]), W, W, 2.0))[0, 0]
    y = [make_head(n_starts)(first_frame_claims(), images, torch.tensor([2]))[0][0, :, 0] for n_starts in (2, 8)]
    torch.testing.assert_close(y[0], y[1])


def test_n_starts_must_be_even():
    dynamics = Dynamics()
    for n_starts in (0, 1, 3):
        with pytest.raises(ValueError, match=f"n_starts is {n_starts}; wanted an even number"):
            TrackingHead(dynamics, W, W, D, n_starts=n_starts)


def test_gradients_reach_the_claims_and_sigma_and_stay_finite():
    _, images = crossing()
    images[:, 3] = 0
    head = make_head()
    s = (first_frame_claims() + 0.1 * torch.randn(1, 2, T, D)).requires_grad_()
    y, sigma = head(s, images, torch.tensor([2]))
    (y.sum() + sigma.sum()).backward()
    for gradient in (s.grad, head.to_claim.weight.grad, head.to_log_sigma.weight.grad):
        assert bool(gradient.isfinite().all())
    assert bool((head.to_claim.weight.grad != 0).any())
    assert all(p.grad is None for p in head.dynamics.parameters())


def with_salt(images, share, seed=0):
    """Images with that share of the black pixels white."""
    torch.manual_seed(seed)
    return torch.maximum(images, (torch.rand(images.shape) < share).float())


def test_pixels_far_from_every_object_are_nobodys():
    """Shares are posterior probabilities under densities that are written out in full."""
    torch.manual_seed(0)
    head = make_head(clutter=0.02)
    tracks = Tracks.of(head.dynamics, head.blob, T, torch.float32, head.clutter * head.pixel_density)
    place, centre = torch.rand(7, 2) * 2 - 1, torch.rand(3, 2) * 2 - 1
    place[:3] = centre + 0.05
    pixels = F.pad(place, (0, 1), value=1.0).mT
    nobody = tracks.log_clutter(pixels, tracks.blob_precision)
    l = log_density(pixels, with_slopes(centre.mT, tracks.blob_precision), torch.zeros(1, 3))
    _, mass = centroids(share(pixels, l, nobody))
    blobs = torch.distributions.MultivariateNormal(centre, precision_matrix=tracks.blob_precision)
    per_object, background = 4 * torch.pi, 0.02 * W * W / 4  # white pixels, and white pixels in a unit of area
    mass = mass.detach().flatten()
    rates = per_object * blobs.log_prob(place[:, None]).exp()
    posterior = rates / (rates.sum(1, keepdim=True) + background)
    torch.testing.assert_close(mass, posterior.sum(0).detach(), rtol=1e-4, atol=0)
    assert 2 < float(mass.sum()) < 4  # three pixels near objects, four anywhere


def test_salt_pulls_centroids_away_unless_it_is_reckoned_with():
    paths, images = crossing()
    salted, errors = with_salt(images, 0.02), {}
    for clutter in (0.0, 0.02):
        y, _ = make_head(clutter=clutter)(first_frame_claims(), salted, torch.tensor([2]))
        errors[clutter] = float((in_pixels(y.detach()) - paths).norm(dim=-1).mean())
    assert errors[0.02] < 0.4 < 1.0 < errors[0.0]


def test_no_object_is_taken_for_background():
    """A large ball and a small one, far from the middle of all pixels, where blobs begin."""
    x = torch.arange(T, dtype=torch.float64)
    paths = torch.stack([torch.stack([4 + x / 8, 4 + x / 8], -1), torch.stack([27 - x / 8, 27 - x / 8], -1)])[None]
    large, small = (render_disks(paths[:, n : n + 1].numpy(), W, W, radius) for n, radius in enumerate((3.5, 1.5)))
    s = torch.zeros(1, 2, T, D)
    s[0, :, :, 0] = torch.tensor([[0.02], [-0.02]])
    y, _ = make_head(clutter=0.002)(s, torch.from_numpy(np.maximum(large, small)).float(), torch.tensor([2]))
    error = [(in_pixels(y.detach()) - p).norm(dim=-1).mean() for p in (paths, paths.flip(1))]
    assert float(min(error)) < 0.2  # 15 pixels where both blobs went to the large one


def test_one_object_in_salt_does_not_have_all_the_pixels():
    paths, _ = crossing()
    alone = torch.from_numpy(render_disks(paths[:, :1].numpy(), W, W, 2.0)).float()
    y, sigma = make_head(clutter=0.02)(torch.zeros(1, 1, T, D), with_salt(alone, 0.02), torch.tensor([1]))
    assert float((in_pixels(y.detach()) - paths[:, :1]).norm(dim=-1).mean()) < 0.4
    assert bool(sigma.isfinite().all())


@pytest.mark.parametrize("clutter", [-0.1, 1.0, float("nan")])
def test_clutter_is_a_probability(clutter):
    with pytest.raises(ValueError, match=r"clutter is .*; wanted a probability below 1"):
        make_head(clutter=clutter)
