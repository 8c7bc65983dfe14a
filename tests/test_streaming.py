"""Frame by frame is the same as all at once."""

import pytest
import torch
from conftest import SMALL, make_guide, make_model

from pyro_pixels.evaluation.calibration import Correction, corrected
from pyro_pixels.guides.heads import AttentionHead
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.guides.tracking_head import TrackingHead
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.queries.predict import generate, interpolate, smooth
from pyro_pixels.queries.streaming import filtered, forecast, start, start_images, step, step_image


@pytest.fixture
def dynamics():
    torch.manual_seed(1)
    dynamics = Dynamics(DynamicsConfig(delta=0.3, state_noise=1e-2, position_noise=0.1, n_components=3)).double()
    with torch.no_grad():
        dynamics.u.normal_()
        dynamics.log_pi.normal_()
    return dynamics


def test_a_stream_is_the_batch_filter(dynamics):
    """Every component's moments, p(z | a_{1:t}) and log p(a_{1:t}), with frames missing, after every frame."""
    torch.manual_seed(2)
    a, observed = torch.randn(2, 3, 9, 2, dtype=torch.float64), torch.rand(2, 3, 9) > 0.3
    batch = kalman.kalman_filter(dynamics.lgssm(), a.unsqueeze(-3), observed.unsqueeze(-2))
    a = a.masked_fill(~observed.unsqueeze(-1), torch.nan)
    state = start(dynamics, (2, 3))
    for t in range(9):
        state = step(dynamics.lgssm(), state, a[..., t, :], observed[..., t])
        torch.testing.assert_close(state.mean, batch.mean[..., t, :], rtol=0, atol=1e-10)
        torch.testing.assert_close(state.cov, batch.cov[..., t, :, :].expand_as(state.cov), rtol=0, atol=1e-10)
        so_far = a[..., : t + 1, :].nan_to_num()
        p_z = dynamics.component_posterior(so_far, observed[..., : t + 1])
        torch.testing.assert_close(state.log_w, p_z.logits.log_softmax(-1), rtol=0, atol=1e-10)
    log_p = (batch.log_likelihood + dynamics.log_pi.log_softmax(-1)).logsumexp(-1)
    torch.testing.assert_close(state.log_likelihood, log_p, rtol=0, atol=1e-10)
    last = smooth(dynamics, a, observed)
    torch.testing.assert_close(filtered(state).mean, last.mean[..., -1, :], rtol=0, atol=1e-10)


def test_a_state_can_be_kept_and_gone_on_from(dynamics):
    """A step changes nothing of the state that it is given."""
    a, lgssm = torch.randn(4, 5, 2, dtype=torch.float64), dynamics.lgssm()
    kept = step(lgssm, start(dynamics, (4,)), a[:, 0])
    before = [x.clone() for x in kept[:4]]
    one, two = (step(lgssm, kept, a[:, 1]) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(kept[:4], before))
    assert all(torch.equal(x, y) for x, y in zip(one[:4], two[:4]))
    assert (kept.n_frames, one.n_frames) == (1, 2)


def test_a_forecast_is_the_mixture_of_the_predicted(dynamics):
    a, lgssm = torch.randn(4, 3, 2, dtype=torch.float64), dynamics.lgssm()
    state = start(dynamics, (4,))
    for t in range(3):
        state = step(lgssm, state, a[:, t])
    next_frame = torch.cat([a, torch.zeros(4, 1, 2)], 1)
    wanted = smooth(dynamics, next_frame, torch.arange(4) < 3)
    found = forecast(lgssm, state)
    torch.testing.assert_close(found.mean, wanted.mean[:, -1, :2], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.cov, wanted.cov[:, -1, :2, :2] + lgssm.Sigma_A, rtol=1e-9, atol=1e-10)


def attentive(seed=0):
    torch.manual_seed(seed)
    guide = RecurrentGuide(
        InferenceRNN(SMALL.height, SMALL.width, 8), AttentionHead(SMALL.height, SMALL.width, 8, n_waves=3)
    )
    torch.nn.init.normal_(guide.head.to_claim.weight)
    return guide


@pytest.mark.parametrize("guide", [make_guide(), attentive()], ids=["linear", "attention"])
def test_streamed_images_give_the_means_of_the_batch(guide, small_data):
    model, images, n_objects = make_model(), small_data.images, small_data.n_objects
    q_a = guide.q(images, n_objects)
    stream = start_images(model, guide, n_objects)
    for t in range(images.shape[1]):
        stream = step_image(model, guide, stream, images[:, t])
        torch.testing.assert_close(stream.mean, q_a.mean[:, :, t], rtol=0, atol=1e-5)
        torch.testing.assert_close(stream.std, q_a.stddev[:, :, t], rtol=0, atol=1e-5)
    p_z = model.dynamics.component_posterior(q_a.mean)
    torch.testing.assert_close(stream.tracks.log_w.exp(), p_z.probs, rtol=1e-3, atol=1e-4)


def test_a_missing_image_is_forecast_and_gone_on_from(small_data):
    """With one component this is Sec 3.5's warming in: frames behind a gap get what `interpolate` gives them."""
    model, guide = make_model(n_components=1), make_guide()
    images, n_objects = small_data.images, small_data.n_objects
    observed = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]).bool()
    stream, means = start_images(model, guide, n_objects), []
    for t, seen in enumerate(observed.tolist()):
        stream = step_image(model, guide, stream, images[:, t] if seen else None)
        means.append(stream.mean)
    means = torch.stack(means, 2)
    between = interpolate(model, guide, images, n_objects, observed)
    torch.testing.assert_close(means[:, :, observed].double(), between.mean[:, :, observed], rtol=0, atol=1e-5)
    ahead = generate(model, guide, images[:, :3], n_objects, n_frames=5)
    torch.testing.assert_close(means[:, :, 3:5].double(), ahead.mean[:, :, 3:5], rtol=0, atol=1e-5)


def structured():
    model = make_model()
    rnn = InferenceRNN(SMALL.height, SMALL.width, 8)
    tracking = TrackingHead(model.dynamics, SMALL.height, SMALL.width, 8)
    other = RecurrentGuide(rnn, tracking)
    return model, StructuredGuide(model.dynamics, rnn), other, corrected(model, other, Correction(1.0, 0.5))[1]


@pytest.mark.parametrize("which", [1, 2, 3], ids=["structured", "tracking head", "tracking head, corrected"])
def test_what_looks_at_all_frames_cannot_stream(which):
    made = structured()
    with pytest.raises(ValueError, match="all frames"):
        start_images(made[0], made[which], torch.tensor([1, 2]))


def test_images_of_another_size_are_refused():
    model, guide = make_model(), make_guide()
    with pytest.raises(ValueError, match="pixels"):
        step_image(model, guide, start_images(model, guide, torch.tensor([1])), torch.zeros(1, 9, 9))


@pytest.mark.parametrize("brightest", [2.0, 255.0])
def test_images_out_of_range_are_refused(brightest):
    model, guide = make_model(), make_guide()
    with pytest.raises(ValueError, match=f"from 0 to {brightest:g}"):
        step_image(model, guide, start_images(model, guide, [1]), brightest * torch.eye(12)[None])


def test_a_mask_of_sequences_holds_for_all_their_objects(dynamics):
    """Also where there are as many sequences as objects, and it could be taken for a mask of objects."""
    a, observed = torch.randn(3, 3, 2), torch.tensor([True, False, True])
    found = step(dynamics.lgssm(), start(dynamics, (3, 3)), a, observed)
    wanted = step(dynamics.lgssm(), start(dynamics, (3, 3)), a, observed[:, None].expand(3, 3))
    torch.testing.assert_close(found.mean, wanted.mean)
