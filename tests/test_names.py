"""Which object is called object k: not a matter of rounding, nor of the other sequences of a batch, nor of padding."""

import pytest
import torch

from pyro_pixels import load_pretrained, simulate
from pyro_pixels.guides.association import LATER_START, Pixels, Tracks, absent_penalty, with_slopes
from pyro_pixels.guides.forecasts import frame_orders
from pyro_pixels.guides.heads import WhitePixels
from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.queries.counterfactual import Change, what_if
from pyro_pixels.queries.numbering import numbered_as
from pyro_pixels.queries.predict import generate, infer, interpolate

T, NEAR = 30, 1e-3  # pixels


@pytest.fixture(scope="module", params=["quick", "long"])
def trained(request):
    run = load_pretrained(request.param)
    data = simulate(run.config.data, 48, seed=11)
    return run.model, run.guide, data.images, data.n_objects


def assert_same(a, b, n_objects, within=NEAR):
    """The tracks of every sequence and object agree within that many pixels, names included."""
    for b_, n in enumerate(n_objects.tolist()):
        apart = (a[b_, :n] - b[b_, :n]).norm(dim=-1).max() * 15.5
        assert float(apart) < within, f"sequence {b_}"


def each_alone(query, images, n_objects, rows):
    return [(b, query(images[b : b + 1], n_objects[b : b + 1])) for b in rows]


def patterns():
    """Frames seen (48, T): padded at the end, at the beginning, and with frames missing in between."""
    random = torch.Generator().manual_seed(0)
    t, seen = torch.arange(T), torch.ones(48, T, dtype=torch.bool)
    seen[::4] = t < torch.randint(12, 30, (12, 1), generator=random)
    seen[1::4] = t >= torch.randint(1, 12, (12, 1), generator=random)
    seen[2::4] = torch.rand(12, T, generator=random) < 0.7
    return seen


def test_a_sequence_has_the_tracks_it_has_alone(trained):
    _, guide, images, n = trained
    together = infer(guide, images, n).mean
    for b, alone in each_alone(lambda x, k: infer(guide, x, k).mean, images, n, range(24)):
        assert_same(alone, together[b : b + 1], n[b : b + 1])
    rows = torch.tensor([40, 3, 17, 5])
    assert_same(infer(guide, images[rows], n[rows]).mean, together[rows], n[rows])


def test_names_are_not_decided_by_rounding(trained):
    _, guide, images, n = trained
    assert_same(infer(guide, images.float() * (1 - 1e-6), n).mean, infer(guide, images, n).mean, n, within=0.01)


def test_a_sequence_with_missing_frames_has_the_tracks_it_has_alone(trained):
    model, guide, images, n = trained
    images = torch.where(patterns()[..., None, None], images.float(), torch.nan)
    together = infer(guide, images, n).mean
    for b, alone in each_alone(lambda x, k: infer(guide, x, k).mean, images, n, range(24)):
        assert_same(alone, together[b : b + 1], n[b : b + 1])
    assert_same(interpolate(model, guide, images, n, torch.ones(T, dtype=torch.bool)).mean, together, n)


def test_padding_changes_nothing(trained):
    model, guide, images, n = trained
    first = infer(guide, images[:, :5], n)
    assert_same(generate(model, guide, images[:, :5], n, n_frames=T).mean[:, :, :5], first.mean, n)
    assert_same(generate(model, guide, images[:, :5], n, n_frames=60).mean[:, :, :5], first.mean, n)
    assert_same(interpolate(model, guide, images, n, torch.arange(T) < 5).mean[:, :, :5], first.mean, n)
    same = what_if(model, guide, images[:, :5], n, Change(), frame=5, n_frames=T, n_samples=2)
    assert_same(same.mean[:, :, :5], first.mean, n)


def test_black_frames_of_other_sequences_change_nothing(trained):
    _, guide, images, n = trained
    images = images[:12].clone()
    images[::2, 0:3] = 0  # nothing to be seen yet: starts differ from those of the other sequences
    images[1::3, 14:17] = 0
    together = infer(guide, images, n[:12]).mean
    for b, alone in each_alone(lambda x, k: infer(guide, x, k).mean, images, n, range(12)):
        assert_same(alone, together[b : b + 1], n[b : b + 1])


def test_the_object_hidden_is_that_of_infer(trained):
    model, guide, images, n = trained
    where = infer(guide, images, n).mean
    for b in range(24):
        if (N := int(n[b])) > 1:
            seen = torch.ones(1, N, T, dtype=torch.bool)
            seen[:, 0, 10:20] = False
            found = interpolate(model, guide, images[b : b + 1], n[b : b + 1], seen).mean
            assert_same(found[:, 1:], where[b : b + 1, 1:N], n[b : b + 1] - 1)


def test_five_frames_are_numbered_as_thirty(trained):
    model, guide, images, n = trained
    where, start = infer(guide, images, n), images[:, :5]
    found = numbered_as(where, generate(model, guide, start, n, n_frames=T, n_samples=2), n)
    plain = generate(model, guide, start, n, n_frames=T)
    several = n > 1
    alike = [(x.mean - where.mean)[several, :, :5].norm(dim=-1).mean((1, 2)) for x in (found, plain)]
    assert float((alike[0] <= alike[1] + 1e-6).double().mean()) == 1
    assert float(alike[0].median()) * 15.5 < 1
    assert float((alike[0] < alike[1] - 0.1).double().mean()) > 0.1  # which is why they are matched
    assert float((found.samples.mean(0) - found.mean)[several, :, :5].norm(dim=-1).median()) * 15.5 < 1
    drawn = infer(guide, start, n, n_samples=2)
    first = Change(removed=torch.arange(3) == 0)
    gone = what_if(model, guide, start, n, first, frame=5, n_frames=T, inferred=numbered_as(where, drawn, n))
    assert_same(gone.mean[:, :, :5], found.mean[:, :, :5], n)
    assert bool(gone.mean[:, 0, 5:].isnan().all())


def test_objects_are_hidden_and_numbered_as_in_an_earlier_inference(trained):
    """Numbers that are exchanged in the inference are exchanged in the mask and in every field of the result."""
    model, guide, images, n = trained
    where = infer(guide, images, n)
    rows = n == 3
    images, n, where = images[rows], n[rows], where._replace(mean=where.mean[rows], std=where.std[rows])
    seen = torch.ones(len(n), 3, T, dtype=torch.bool)
    seen[:, 0, 10:20] = False
    order = torch.tensor([2, 0, 1])
    other = where._replace(mean=where.mean[:, order], std=where.std[:, order])
    wanted = interpolate(model, guide, images, n, seen)
    found = interpolate(model, guide, images, n, seen[:, order], inferred=other)
    for name in ("mean", "cov", "component", "observed"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)[:, order]), name
    assert torch.equal(found.images, wanted.images)
    ends = torch.arange(T) % 10 < 5
    found, wanted = (interpolate(model, guide, images, n, ends, inferred=x) for x in (other, where))
    assert torch.equal(found.mean, wanted.mean[:, order])
    with pytest.raises(ValueError, match="inferred has means"):
        interpolate(model, guide, images[:2], n[:2], ends, inferred=where)
    with pytest.raises(ValueError, match="object of sequence 0 has no position in any frame that both have"):
        numbered_as(where, where._replace(mean=where.mean * torch.nan), n)


def test_of_equal_tracks_those_of_the_earliest_start_are_kept():
    """Start 2 gives the tracks of start 0 with exchanged names, start 1 others, start 3 better ones by less or more."""
    torch.manual_seed(0)
    tracks = Tracks.of(Dynamics(), 0.01 * torch.eye(2), 4, torch.float32)
    paths = torch.rand(1, 4, 2, 2) - 0.5  # two objects
    place = (paths.mT.unsqueeze(3) + 0.05 * torch.randn(1, 4, 2, 9, 2)).flatten(2, 3)
    pixels = Pixels.of(WhitePixels(torch.ones(1, 4, 18), place, torch.zeros(1, 4, 18)))
    penalty = absent_penalty(torch.ones(1, 2, dtype=torch.bool))

    def kept(*starts, keep=1):
        """The tracks (keep, 2, 4, 2) kept of those of several starts, each (1, 4, 2, 2)."""
        y = torch.stack(starts, -1).flatten(-2)  # (1, T, 2, N S)
        blobs = tracks.likeliest(pixels, with_slopes(y, tracks.blob_precision), penalty, None, keep)
        return blobs[0, :, :2].unflatten(-1, (2, keep)).permute(3, 2, 0, 1)

    far = paths + 0.3
    assert torch.equal(kept(paths, far, paths.flip(-1))[0], paths[0].permute(2, 0, 1))
    assert torch.equal(kept(paths.flip(-1), far, paths)[0], paths[0].flip(-1).permute(2, 0, 1))
    assert torch.equal(kept(far, paths.flip(-1), paths)[0], paths[0].flip(-1).permute(2, 0, 1))
    both = kept(far, paths.flip(-1), far, paths, keep=2)  # in the order of their starts
    assert torch.equal(both[0], paths[0].flip(-1).permute(2, 0, 1))
    assert torch.equal(both[1], paths[0].permute(2, 0, 1))
    assert 0 < LATER_START < 0.1


@pytest.mark.parametrize("n_starts", [2, 4, 8])
def test_orders_of_the_frames_seen_are_those_without_the_others(n_starts):
    def orders(v):
        return frame_orders(WhitePixels(v, v.unsqueeze(-1), v), n_starts)

    for seen in (torch.arange(12) < 5, torch.arange(12) >= 4, torch.arange(12) % 3 != 1):
        frames, n = seen.nonzero().squeeze(1), int(seen.sum())
        found = orders(seen.float().expand(2, 12).unsqueeze(-1))
        assert torch.equal(found[:, :n], frames[orders(torch.ones(2, n, 1))])
        assert torch.equal(found.sort(1).values, torch.arange(12).expand(n_starts, 12))
    found, middle = orders(torch.ones(1, 8, 1)).tolist(), 8 * (n_starts // 4) // (n_starts // 2)
    assert found[0] == [*range(middle, 8), *range(middle - 1, -1, -1)]
    assert found[1] == [7 - t for t in found[0]]
    assert {0, 7} <= {order[0] for order in found[-2:]}
    assert torch.equal(orders(torch.zeros(2, 6, 1)).sort(1).values, torch.arange(6).expand(n_starts, 6))
