"""Queries about many sequences go through in parts: the same answers, whatever the size of a part."""

import pytest
import torch
from conftest import SMALL, make_guide, make_model

from pyro_pixels._batch import object_mask
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.guides.tracking_head import TrackingHead
from pyro_pixels.queries import parts
from pyro_pixels.queries.counterfactual import Change, what_if
from pyro_pixels.queries.inference_data import to_inference_data
from pyro_pixels.queries.latent_states import states
from pyro_pixels.queries.predict import generate, infer, interpolate, reconstruct

S = 3


@pytest.fixture(autouse=True)
def _parts_may_be_small(monkeypatch):
    monkeypatch.setattr(parts, "FEWEST", 1)


def structured_guide(model):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        rnn = InferenceRNN(SMALL.height, SMALL.width, 8, 3)
        return StructuredGuide(model.dynamics, rnn, TrackingHead(model.dynamics, SMALL.height, SMALL.width, 8))


QUERIES = {
    "infer": lambda m, g, v, n, S: infer(g, v, n, n_samples=S),
    "reconstruct": lambda m, g, v, n, S: reconstruct(m, g, v, n),
    "generate": lambda m, g, v, n, S: generate(m, g, v[:, :5], n, n_frames=11, n_samples=S),
    "interpolate": lambda m, g, v, n, S: interpolate(m, g, v, n, torch.arange(11) % 4 != 2, n_samples=S),
    "a mask each": lambda m, g, v, n, S: interpolate(
        m, g, v, n, (torch.arange(11) + torch.arange(len(v)).unsqueeze(1)) % 4 != 2, n_samples=S
    ),
    "hidden objects": lambda m, g, v, n, S: interpolate(
        m, g, v, n, ~((torch.arange(11) > 5) & (torch.arange(3).unsqueeze(1) == 0)).expand(len(v), 3, 11), n_samples=S
    ),
    "states": lambda m, g, v, n, S: states(m, g, v, n, n_samples=S),
    "what_if": lambda m, g, v, n, S: what_if(
        m, g, v, n, Change(shift=torch.full((len(v), 3, 4), 0.1), removed=torch.arange(3) == 0),
        frame=4, n_frames=9, n_samples=S,
    ),
}  # fmt: skip


def fields_of(answer):
    return {"": answer} if torch.is_tensor(answer) else answer._asdict()


def present_only(name, x, n_objects):
    """A field without the slots of absent objects, which may hold anything."""
    if name.endswith("images") or name in ("", "observed"):
        return x
    x = x.transpose(0, 1) if name.startswith("sample") else x
    x = x.movedim(2, 1) if name.startswith("sample") else x
    return x[object_mask(n_objects, x.shape[1])]


@pytest.mark.parametrize("guide", ["recurrent", "structured"])
@pytest.mark.parametrize("query", QUERIES)
def test_parts_give_what_one_batch_gives(query, guide, small_data, monkeypatch):
    model = make_model()
    guide = make_guide() if guide == "recurrent" else structured_guide(model)
    v, n = small_data.images, small_data.n_objects
    whole = fields_of(QUERIES[query](model, guide, v, n, S))
    asked = []
    monkeypatch.setattr(parts, "PIXELS_AT_ONCE", 5 * 11 * 12 * 12 * S)
    for name in ("q", "encode_observed"):
        original = getattr(type(guide), name)

        def counted(self, images, *args, original=original, **options):
            asked.append(len(images))
            return original(self, images, *args, **options)

        monkeypatch.setattr(type(guide), name, counted)
    found = fields_of(QUERIES[query](model, guide, v, n, S))
    assert asked
    assert max(asked) <= 5 * S
    assert found.keys() == whole.keys()
    for name, x in whole.items():
        if x is None:
            assert found[name] is None
            continue
        assert found[name].shape == x.shape
        assert found[name].dtype == x.dtype
        random = name.startswith("sample") or query in ("states", "what_if")  # averages over samples, too
        if not random:
            torch.testing.assert_close(
                present_only(name, found[name], n), present_only(name, x, n), rtol=1e-5, atol=1e-6
            )


def test_samples_of_parts_have_the_moments_of_one_batch(small_data, monkeypatch):
    guide, v, n = make_guide(), small_data.images[:4], small_data.n_objects[:4]
    monkeypatch.setattr(parts, "PIXELS_AT_ONCE", 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = infer(guide, v, n, n_samples=2_000)
    there = object_mask(n, 3)
    error = (found.samples.mean(0) - found.mean)[there] / found.std[there]
    assert error.abs().max() < 5 / 2_000**0.5
    assert (found.samples.std(0) / found.std)[there].sub(1).abs().max() < 0.1


def test_frames_that_were_not_seen_in_one_part_only(small_data, monkeypatch):
    model, guide = make_model(), make_guide()
    v = small_data.images.float()
    v[7, 1:3] = torch.nan
    whole = generate(model, guide, v[:, :5], small_data.n_objects, n_frames=11)
    monkeypatch.setattr(parts, "PIXELS_AT_ONCE", 3 * 11 * 12 * 12)
    found = generate(model, guide, v[:, :5], small_data.n_objects, n_frames=11)
    assert torch.equal(found.observed, whole.observed)
    torch.testing.assert_close(found.images, whole.images, rtol=1e-5, atol=1e-6)


def test_answers_that_no_memory_has_are_refused(small_data):
    model, guide = make_model(), make_guide()
    with pytest.raises(ValueError, match=r"images of 12 sequences with 10,000,000 samples each would take"):
        generate(model, guide, small_data.images[:, :5], small_data.n_objects, n_frames=11, n_samples=10**7)


def test_parts_of_inference_data_have_the_same_variables(small_data, monkeypatch):
    model, guide = make_model(), make_guide()

    def ask():
        return to_inference_data(model, guide, small_data.images, small_data.n_objects, n_samples=2, n_frames_ahead=2)

    whole = ask()
    monkeypatch.setattr(parts, "PIXELS_AT_ONCE", 5 * 13 * 12 * 12)
    found = ask()
    assert found.groups() == whole.groups()
    for group in whole.groups():
        for name, x in whole[group].items():
            assert found[group][name].dims == x.dims
            assert found[group][name].shape == x.shape
            assert (found[group][name].isnull() == x.isnull()).all(), "other slots are those of absent objects"
    with pytest.raises(ValueError, match="samples of the images of 12 sequences take"):
        to_inference_data(model, guide, small_data.images, small_data.n_objects, n_samples=10**7)
