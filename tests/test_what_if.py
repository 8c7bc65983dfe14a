"""Changed worlds against physics, and an unchanged one against the forecast."""

import numpy as np
import pytest
import torch
from conftest import make_guide, make_model
from test_queries import Oracle, true_world

from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.lgssm import kalman
from pyro_pixels.queries import parts
from pyro_pixels.queries.counterfactual import Change, scale_force, scale_period, what_if
from pyro_pixels.queries.latent_states import averaged
from pyro_pixels.queries.predict import generate, infer


def ask(change, *, frame=10, n_frames=20, n_samples=3):
    data, model = true_world()
    guide = Oracle(data.paths)
    torch.manual_seed(0)
    return data, what_if(
        model, guide, data.images, data.n_objects, change, frame=frame, n_frames=n_frames, n_samples=n_samples
    )


def test_nothing_changed_is_what_happened():
    data, p = ask(Change(), n_frames=30)
    present = ~data.paths.isnan()
    assert float((p.mean - data.paths.nan_to_num())[present].abs().max()) < 0.01
    assert p.observed.tolist() == [True] * 10 + [False] * 20
    assert p.samples.shape == (3, 8, 3, 30, 2)
    assert p.sample_images.shape == (3, 8, 30, 32, 32)
    assert p.images.shape == (8, 30, 32, 32)


def test_without_gravity_objects_go_straight_on():
    data, p = ask(Change(dynamics=lambda lgssm: scale_force(lgssm, 0.0)))
    a = p.mean[:, 0, 9:]
    assert float((a[:, 2:] - 2 * a[:, 1:-1] + a[:, :-2]).abs().max()) < 1e-3
    before = data.paths[:, 0, :11]
    u = data.dynamics.lgssm.u
    torch.testing.assert_close(a[:, 1] - a[:, 0], before[:, 10] - before[:, 9] - u[:2], rtol=0, atol=0.02)


def test_half_the_period_shows_every_moment_twice():
    """Two steps of half a period are one of a whole: exactly so for a force that acts evenly (u_x = delta u_v / 2)."""
    _, model = true_world()
    lgssm = model.dynamics.lgssm()
    slow = scale_period(lgssm, 0.5)
    h, P = torch.randn(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    one, two = kalman.rollout(lgssm, h, P, 3).mean, kalman.rollout(slow, h, P, 6).mean[1::2]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)


def test_a_shift_moves_one_object_alone():
    push = torch.zeros(3, 4)
    push[0] = torch.tensor([1.0, 2.0, 30.0, 0.0])
    _, plain = ask(Change())
    data, pushed = ask(Change(shift=push))
    moved = pushed.mean - plain.mean
    delta = data.dynamics.lgssm.A[0, 2]
    n = torch.arange(1, 11, dtype=torch.float64)
    torch.testing.assert_close(moved[:, 0, 10:, 0], (1 + 30 * delta * n).expand(8, 10), rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[:, 0, 10:, 1], torch.full((8, 10), 2.0, dtype=torch.float64), rtol=0, atol=1e-5)
    assert float(moved[:, :, :10].abs().max()) < 1e-3
    assert float(moved[:, 1:].abs().max()) < 1e-3
    drawn = pushed.samples - plain.samples
    torch.testing.assert_close(drawn[..., 0, 10:, 1], torch.full((3, 8, 10), 2.0, dtype=torch.float64))


def test_a_removed_object_is_gone_from_the_images():
    data, p = ask(Change(removed=torch.tensor([True, False, False])))
    assert p.mean[:, 0, 10:].isnan().all()
    assert not p.mean[:, :, :10].isnan().any()
    assert not p.mean[:, 1:].isnan().any()
    _, model = true_world()
    empty = model.renderer.to_v(model.renderer.theta_x0.tanh()).sigmoid().unflatten(-1, (32, 32))
    alone = data.n_objects == 1
    torch.testing.assert_close(p.images[alone, 10:], empty.expand(int(alone.sum()), 10, 32, 32))
    assert float((p.images[alone, :10] - empty).abs().max().detach()) > 0.01
    assert torch.isfinite(p.images).all()
    assert torch.isfinite(p.sample_images).all()


def test_an_unchanged_future_is_the_averaged_forecast(small_data):
    """Given the first frames alone, both average over q and z; 6 standard errors of the differing samples."""
    model, guide = make_model(position_noise=0.2, delta=0.3), make_guide()
    images, n_objects, n = small_data.images[:2, :4], small_data.n_objects[:2], 300
    torch.manual_seed(0)
    one = what_if(model, guide, images, n_objects, Change(), frame=4, n_frames=8, n_samples=n)
    two = averaged(model, generate(model, guide, images, n_objects, n_frames=8, n_samples=n), n_objects)
    scale = two.cov.diagonal(0, -2, -1).sqrt()
    assert ((one.mean - two.mean).abs() < 6 * scale * (2 / n) ** 0.5).all()
    assert ((one.cov.diagonal(0, -2, -1) / scale**2 - 1)[:, :, 4:].abs() < 6 * (4 / n) ** 0.5).all()
    draws = one.samples[..., 4:, :]
    assert ((draws.mean(0) - one.mean[:, :, 4:]).abs() < 6 * scale[:, :, 4:] / n**0.5).all()


@pytest.mark.parametrize(
    "options",
    [{"frame": 0}, {"frame": 31, "n_frames": 40}, {"frame": 10, "n_frames": 10}, {"n_samples": 0}],
    ids=["before the first", "beyond the last", "nothing after", "no samples"],
)
def test_bad_input(options):
    with pytest.raises(ValueError):
        ask(Change(), **options)


BAD = {
    "a frame between two": ({"frame": 5.0}, "frame is 5.0; wanted a whole number"),
    "frames between two": ({"n_frames": 8.5}, "n_frames is 8.5; wanted a whole number"),
    "half a sample": ({"n_samples": 1.5}, "n_samples is 1.5; wanted a whole number of at least 1"),
    "no change": ({"change": lambda: scale_force}, "change is a function; wanted a Change"),
    "a shift of other objects": (
        {"change": lambda: Change(shift=torch.zeros(3, 4))},
        r"shift has shape \(3, 4\) for 2 sequences of up to 2 objects; wanted one that broadcasts to \(2, 2, 4\)",
    ),
    "a shift of other sequences": (
        {"change": lambda: Change(shift=torch.zeros(3, 1, 4))},
        r"shift has shape \(3, 1, 4\) for 2 sequences",
    ),
    "a shift with too many axes": ({"change": lambda: Change(shift=torch.zeros(1, 2, 2, 4))}, "shift has shape"),
    "a shift of positions alone": ({"change": lambda: Change(shift=torch.zeros(2, 2))}, "wanted 4 values for each"),
    "removed of other objects": (
        {"change": lambda: Change(removed=[True, False, False])},
        r"removed has shape \(3,\) for 2 sequences of up to 2 objects; wanted one that broadcasts to \(2, 2\)",
    ),
    "removed as numbers": ({"change": lambda: Change(removed=[1, 0])}, "removed has type int64; wanted bool"),
    "removed as floats": ({"change": lambda: Change(removed=[1.0, 0.0])}, "removed has type float32; wanted bool"),
    "a shift as words": ({"change": lambda: Change(shift="up")}, "shift is a str; wanted a tensor of real numbers"),
    "a shift as a mask": ({"change": lambda: Change(shift=np.ones((2, 4), bool))}, "shift has type bool; wanted real"),
    "dynamics as a factor": ({"change": lambda: Change(dynamics=0.5)}, "dynamics is a float; wanted a function"),
}  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 16], ids=["in parts", "at once"])
@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD.keys())
def test_what_is_wrong_is_said_in_one_line(small_data, monkeypatch, options, message, at_once):
    monkeypatch.setattr(parts, "FEWEST", at_once)
    monkeypatch.setattr(parts, "PIXELS_AT_ONCE", 1)
    v, n = small_data.images[:2], small_data.n_objects[:2]  # N = 1, 2

    def asked(change=Change, **options):
        options = {"frame": 5, "n_frames": 9, "n_samples": 2, **options}
        return what_if(make_model(), make_guide(), v, n, change(), **options)

    with pytest.raises(ValueError, match=message) as error:
        asked(**options)
    assert "\n" not in str(error.value)


def test_an_inference_of_other_images_is_refused_in_parts_too(small_data, monkeypatch):
    monkeypatch.setattr(parts, "FEWEST", 1)
    monkeypatch.setattr(parts, "PIXELS_AT_ONCE", 1)
    model, guide, (v, n) = make_model(), make_guide(), (small_data.images, small_data.n_objects)
    inferred = infer(guide, v, n, n_samples=2)
    with pytest.raises(ValueError, match="give the result of infer for these images"):
        what_if(model, guide, v[:4], n[:4], Change(), frame=5, n_frames=9, n_samples=2, inferred=inferred)


def test_a_change_takes_arrays_and_lists():
    push = np.zeros((3, 4))
    push[0, 0] = 2.0
    _, one = ask(Change(shift=push, removed=[False, True, False]))
    _, two = ask(Change(shift=torch.from_numpy(push).float(), removed=torch.tensor([False, True, False])))
    torch.testing.assert_close(one.mean, two.mean, equal_nan=True)
    assert one.mean[:, 1, 10:].isnan().all()


def test_the_frames_before_a_change_have_the_covariances_of_q(small_data):
    """Those of `generate`, whose guide gives x and y a correlation, and the variances of `infer` elsewhere."""
    model, plain = make_model(position_noise=0.2, delta=0.3), make_guide()
    with torch.no_grad():
        model.dynamics.root_Sigma_H[1, 0] = 0.5
        model.dynamics.root_Sigma_A[1, 0] = 1.0
    v, n = small_data.images[:6, :5], small_data.n_objects[:6]
    there = n[:, None] > torch.arange(3)
    for guide in (StructuredGuide(model.dynamics, plain.rnn, plain.head), plain):
        found = what_if(model, guide, v, n, Change(), frame=5, n_frames=9, n_samples=2)
        wanted = generate(model, guide, v, n, n_frames=9)
        torch.testing.assert_close(found.cov[:, :, :5][there], wanted.cov[:, :, :5][there], rtol=1e-4, atol=1e-6)
        inferred = infer(guide, v, n, n_samples=2)
        torch.testing.assert_close(inferred.cov.diagonal(dim1=-2, dim2=-1).sqrt(), inferred.std)
        again = what_if(model, guide, v, n, Change(), frame=5, n_frames=9, inferred=inferred)
        assert torch.equal(again.cov[:, :, :5], inferred.cov)
        off_diagonal = found.cov[:, :, :5][there][..., 0, 1].abs()
        assert off_diagonal.max() > 1e-3 if guide is not plain else not off_diagonal.any()

    hole = torch.where(torch.arange(5)[:, None, None] == 2, torch.nan, v.float())
    filled = what_if(model, plain, hole, n, Change(), frame=5, n_frames=9, n_samples=2)
    assert (filled.cov[:, :, 2][there][..., 0, 1].abs() > 1e-3).any()  # that of the smoother
