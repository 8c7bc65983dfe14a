"""Data as people have them: converted where the meaning is certain, refused in one line where it is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_guide, make_model
from pyro.infer import Predictive, Trace_ELBO
from torch.utils.data import DataLoader

from pyro_pixels import fit, generate, infer, interpolate, load_pretrained, load_sequences, save_sequences, simulate
from pyro_pixels._batch import unseen_frames
from pyro_pixels.data import ImageSequences, join_sequences
from pyro_pixels.evaluation.health import check_health
from pyro_pixels.evaluation.metrics import errors, floor_predictions
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.guides.joint import JointGuide
from pyro_pixels.guides.refining import refine
from pyro_pixels.guides.untangling import resample_labels, untangle
from pyro_pixels.queries.counterfactual import Change, what_if
from pyro_pixels.queries.evidence import count_objects, log_evidence
from pyro_pixels.queries.inference_data import to_inference_data
from pyro_pixels.queries.latent_states import filter_states, posterior_states, states
from pyro_pixels.queries.predict import smooth
from pyro_pixels.queries.streaming import start_images, step_image
from pyro_pixels.training.elbo import bound
from pyro_pixels.worlds.cannonballs import CannonballConfig


@pytest.fixture(scope="module")
def run():
    return load_pretrained()


@pytest.fixture(scope="module")
def data(run):
    return simulate(run.config.data, 6, seed=3)


BINARY = (np.random.default_rng(0).random((3, 4, 6, 7)) < 0.2).astype(np.uint8)


@pytest.mark.parametrize(
    "images",
    [
        BINARY, BINARY.astype(bool), BINARY * 255, BINARY.astype(np.int64), BINARY[..., None],
        torch.from_numpy(BINARY), list(BINARY), [x.astype(bool) for x in BINARY],
    ],
    ids=["uint8", "bool", "0-255", "int64", "channel", "tensor", "list", "list of bool"],
)  # fmt: skip
def test_what_is_certainly_binary_is_converted(images):
    found = ImageSequences(images, [1, 2, 1]).images
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.from_numpy(BINARY))


@pytest.mark.parametrize("scale, dtype", [(1, np.float64), (1, np.float16), (255, np.float32)])
def test_floats_become_float32_within_0_and_1(scale, dtype):
    found = ImageSequences((BINARY * scale).astype(dtype), 1)
    assert found.images.dtype == torch.float32
    assert torch.equal(found.images, torch.from_numpy(BINARY).float())
    assert found.n_objects.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "images, n_objects, message",
    [
        (BINARY * 100, 1, "images have the values 0 to 100; wanted 0 and 1 only"),
        (BINARY * 2.0 - 1, 1, "images have values from -1 to 1; wanted 0 for black to 1 for white"),
        (np.where(np.arange(7) == 2, np.nan, BINARY), 1, "images have NaN in part of a frame"),
        (np.stack([BINARY] * 3, -1), 1, "colour in the last axis"),
        (BINARY[0], 1, r"images have shape \(4, 6, 7\); wanted \(n, T, H, W\)"),
        ([BINARY[0], BINARY[1, :, :5]], 1, r"sequence 1 has shape \(4, 5, 7\)"),
        (BINARY, [1, 2], r"n_objects has shape \(2,\)"),
        (BINARY, [1, 0, 2], "value 0; every sequence needs at least 1 object"),
        (BINARY, [1.0, 2.0, 1.0], r"n_objects has .* float"),
        (BINARY, "two", "n_objects"),
    ],
)
def test_what_is_not_certain_is_refused_in_one_line(images, n_objects, message):
    with pytest.raises(ValueError, match=message) as error:
        ImageSequences(images, n_objects)
    assert "\n" not in str(error.value)


def test_queries_refuse_values_that_the_data_would_have_refused(run, data):
    for images in (data.images * 255, data.images.float() * 2 - 1):
        with pytest.raises(ValueError, match=r"images have values from .* wanted 0 for black"):
            infer(run.guide, images, data.n_objects)


def test_sequences_by_number_in_loops_and_in_a_data_loader(data):
    assert torch.equal(data[1].images, data.images[1:2])
    assert torch.equal(data[-1].positions[:, : data.n_objects[-1]], data.positions[-1:, : data.n_objects[-1]])
    assert len(list(data)) == 6
    assert torch.equal(data[[4, 0]].n_objects, data.n_objects[[4, 0]])
    with pytest.raises(IndexError, match="index 6 is out of range for"):
        data[6]
    batches = list(DataLoader(data, batch_size=4, collate_fn=join_sequences))  # type: ignore[arg-type]
    assert [len(b) for b in batches] == [4, 2]
    whole = join_sequences(batches)
    assert torch.equal(whole.images, data.images)
    torch.testing.assert_close(whole.positions, data.positions, equal_nan=True)


def test_shorter_sequences_are_padded_with_frames_that_were_not_seen(tmp_path, run, data):
    lengths = [30, 22, 30, 18, 30, 30]
    parts = [x[:t] for x, t in zip(data.images.numpy(), lengths)]
    short = ImageSequences(parts, data.n_objects)
    assert short.images.shape == (6, 30, 32, 32)
    assert short.seen.sum(1).tolist() == lengths
    save_sequences(tmp_path / "short.npz", short)
    again = load_sequences(tmp_path / "short.npz")
    torch.testing.assert_close(again.images, short.images, equal_nan=True)

    # what is padded changes nothing for the frames before: the posterior is that of the shorter sequence
    alone = interpolate(run.model, run.guide, data.images[1:2, :22], data.n_objects[1:2], torch.ones(22).bool())
    padded = interpolate(run.model, run.guide, short.images[1:2], data.n_objects[1:2], torch.ones(30).bool())
    assert (padded.mean[:, :, :22] - alone.mean).abs().max() < 0.05
    terms = bound(run.model, run.guide, short)
    assert terms.bound.isfinite().all()
    assert terms.log_likelihood[3] > bound(run.model, run.guide, data).log_likelihood[3]  # of fewer frames


def test_errors_and_floors_are_means_over_the_frames_whose_positions_are_known(run):
    """Half of the sequences lack the last four frames, and all lack one frame that is to be generated."""
    data = simulate(run.config.data, 12, seed=4)
    images, positions = data.images.float(), data.positions.clone()
    images[:, 12] = images[1::2, 26:] = torch.nan
    positions[:, :, 12] = positions[1::2, :, 26:] = torch.nan
    missing = evaluate(run.model, run.guide, replace(data, images=images, positions=positions))["all"]
    truth = evaluate(run.model, run.guide, replace(data, images=images))["all"]
    whole = evaluate(run.model, run.guide, data)["all"]
    for name in ("position", "generation", "interpolation"):
        assert missing[f"{name}_error_px"] == pytest.approx(truth[f"{name}_error_px"], rel=0.3)
    for name in ("generation", "interpolation"):
        assert missing[f"{name}_floor_px"] == pytest.approx(whole[f"{name}_floor_px"], rel=0.3)
        assert missing[f"{name}_floor_px"] < 1.1 * missing[f"{name}_error_px"]
    assert missing["switch_rate"] == 0.0

    path = floor_predictions(data.dynamics, data.positions, torch.arange(30) < 5)  # the same five frames are observed
    each = errors(path, positions, data.n_objects)[..., 5:].nanmean(-1)
    assert missing["generation_floor_px"] == pytest.approx(float(each.nanmean()), rel=1e-9)


def test_sets_without_sequences_are_refused_in_one_line(run, data):
    empty = data[:0]
    calls = [
        lambda: evaluate(run.model, run.guide, empty),
        lambda: check_health(run.model, run.guide, empty),
        lambda: fit(run.model, run.guide, empty, run.config.schedule, progress=False),
        lambda: bound(run.model, run.guide, empty),
        lambda: count_objects(run.model, run.guide, empty.images),
        lambda: join_sequences([empty, empty]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^there are no sequences to .*; wanted at least one$"):
            call()
    assert len(join_sequences([empty, data])) == len(data)


def test_an_array_of_objects_in_a_file_says_what_to_write_instead(tmp_path):
    images = np.empty(2, dtype=object)
    images[:] = [np.zeros((20, 8, 8), np.uint8), np.zeros((15, 8, 8), np.uint8)]
    np.savez_compressed(tmp_path / "unequal.npz", images=images, n_objects=np.ones(2, np.int64))
    with pytest.raises(ValueError, match=r"sequences of unequal length; pad those with ImageSequences\(list_of_arrays"):
        load_sequences(tmp_path / "unequal.npz")
    assert ImageSequences(images, 1).seen.sum(1).tolist() == [20, 15]


@pytest.mark.parametrize("n_samples", [0, 3])
def test_nan_in_frames_that_are_not_observed_is_ignored(run, data, n_samples):
    seen = torch.ones(30, dtype=torch.bool)
    seen[10:15] = False
    images = data.images.float()
    images[:, 10:15] = torch.nan
    answers = []
    for given in (images, data.images.float()):
        torch.manual_seed(0)
        answers.append(interpolate(run.model, run.guide, given, data.n_objects, seen, n_samples=n_samples))
    assert torch.equal(answers[0].mean, answers[1].mean)
    assert torch.equal(answers[0].images, answers[1].images)
    if n_samples:
        assert torch.equal(answers[0].samples, answers[1].samples)


@pytest.mark.parametrize("guide", ["recurrent", "attentive", "structured"])
def test_nan_frames_count_as_unseen_for_every_guide_and_query(guide):
    from dataclasses import replace

    from pyro_pixels import PRESETS, build

    config = replace(PRESETS["quick"], guide=guide, state_size=16, guide_state_size=8,
                     data=CannonballConfig(height=12, width=14, n_frames=12))  # fmt: skip
    run, data = build(config), simulate(config.data, 4, seed=0)
    images = data.images.float()
    images[1, 3:6], images[2, 8:] = torch.nan, torch.nan
    assert infer(run.guide, images, data.n_objects, n_samples=2, model=run.model).samples.isfinite().all()
    alone = infer(run.guide, images, data.n_objects, n_samples=2)
    known = torch.ones_like(alone.mean, dtype=torch.bool) & (
        guide == "structured" or ~unseen_frames(images)[:, None, :, None]
    )
    parts = (alone.mean, alone.std, alone.samples, *alone.cov.unbind(-1))
    assert all(torch.equal(x.isfinite(), known.expand(x.shape)) for x in parts)
    told = generate(run.model, run.guide, images[:, :8], data.n_objects, n_frames=12, n_samples=2)
    assert told.mean.isfinite().all()
    assert told.observed[:, 0].sum(1).tolist() == [8, 5, 8, 8]
    loss = run.model(images, data.n_objects)
    assert loss.isfinite().all()
    result = evaluate(run.model, run.guide, ImageSequences(images, data.n_objects), n_seen=3)
    assert all(x is None or x == x for x in result["all"].values())


def test_nan_positions_that_are_not_observed_are_ignored_by_exact_queries(run, data):
    a = infer(run.guide, data.images, data.n_objects).mean
    seen = torch.ones(30, dtype=torch.bool)
    seen[10:15] = False
    holes = a.clone()
    holes[:, :, 10:15] = torch.nan
    seen = seen.expand(a.shape[:-1])
    for query in (smooth, filter_states):
        assert torch.equal(query(run.model.dynamics, holes, seen).mean, query(run.model.dynamics, a, seen).mean)
    assert posterior_states(run.model.dynamics, holes[None], seen).mean.isfinite().all()


def test_one_number_of_objects_and_lists_stand_for_tensors(run, data):
    two = data.n_objects == 2
    images = data.images[two]
    wanted = infer(run.guide, images, data.n_objects[two]).mean
    for n in (2, [2, 2], np.array([2, 2])):
        assert torch.equal(infer(run.guide, images, n).mean, wanted)
        assert run.model(images, n).shape == images.shape
        assert run.guide(images, n).shape == wanted.shape
    with pytest.raises(ValueError, match="n_objects"):
        infer(run.guide, images, 0)


@pytest.mark.parametrize("n", [2, [2, 2], np.array([2, 2]), torch.tensor(2), torch.tensor([2, 2], dtype=torch.uint8),
                               torch.tensor([2, 2], dtype=torch.int16)])  # fmt: skip
def test_every_query_takes_any_kind_of_counts_and_arrays_of_images(n, small_data):
    model, guide = make_model(), make_guide()
    images = small_data.images[small_data.n_objects == 2][:2]
    two = torch.tensor([2, 2])
    a = infer(guide, images, two).mean

    def queries(v, n):
        joint = JointGuide(guide, model.dynamics)
        yield infer(guide, v, n).mean
        yield states(model, guide, v, n, n_samples=2).mean
        yield generate(model, guide, v, n, n_frames=13).mean
        yield interpolate(model, guide, v, n, torch.arange(11) < 8).mean
        yield what_if(model, guide, v, n, Change(), frame=3, n_frames=13, n_samples=2).mean
        yield log_evidence(model, guide, v, n, n_samples=2).log_evidence
        yield count_objects(model, guide, v, 2, n_samples=1).log_evidence
        yield torch.from_numpy(to_inference_data(model, guide, v, n, n_samples=2).posterior.h.values)
        yield refine(model, a, n, v, n_steps=2).a
        yield untangle(model.dynamics, a, n).a
        yield resample_labels(model, a, n, v).a
        yield start_images(model, guide, n).s[0]
        yield step_image(model, guide, start_images(model, guide, two), v[:, 0]).mean
        yield joint(images, n)[2]
        yield guide(images, n)
        yield model(images, n)
        yield torch.tensor(Trace_ELBO().loss(model, guide, images, n))

    def answers(v, n):
        torch.manual_seed(0)
        return list(queries(v, n))

    for found, wanted in zip(answers(images.numpy(), n), answers(images, two), strict=True):
        assert torch.equal(found, wanted)


def test_a_guide_without_images_says_what_it_needs(small_data):
    model, guide = make_model(), make_guide()
    for program in (guide, JointGuide(guide, model.dynamics)):
        with pytest.raises(ValueError, match=r"images are None; a guide infers positions from images"):
            Predictive(model, guide=program, num_samples=2)(None, small_data.n_objects, 6)
