"""What model and guide share: computed once, and on a GPU beside everything else, in an order that is safe."""

from contextlib import nullcontext

import pytest
import torch
from conftest import make_guide, make_model
from rehearsal import RehearsedSteps, Stream, rehearse, rehearse_streams

from pyro_pixels._batch import Known
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.lgssm import sharing as sharing_module
from pyro_pixels.lgssm.dynamics import Dynamics, hmm_components
from pyro_pixels.lgssm.sharing import computing_beside, once, sharing
from pyro_pixels.training import step_runners
from pyro_pixels.training.elbo import AnnealedELBO
from pyro_pixels.training.step_runners import Batch


@pytest.fixture
def beside(monkeypatch):
    rehearse_streams(monkeypatch)
    return Stream()


def test_each_quantity_is_computed_once_within_a_context():
    made = []

    def make():
        made.append(torch.zeros(()))
        return made[-1]

    x = torch.zeros(2)
    with sharing():
        assert once("a", make, x) is once("a", make, x)
        assert once("b", make, x) is not once("a", make, x)
        assert once("a", make, torch.zeros(2)) is not once("a", make, x)
        with torch.no_grad():
            assert once("a", make, x) is not made[0]
    assert len(made) == 4
    assert once("a", make, x) is not once("a", make, x)


def test_what_depends_on_parameters_alone_waits_for_the_beginning_only(beside):
    main, dynamics = Stream.current, Dynamics()
    with computing_beside(beside), sharing():
        where = []
        once("p", lambda: where.append(Stream.current), dynamics, 30)
        assert where == [beside]
        assert Stream.current is main
        assert Stream.orders == [(beside, "event", ("event", main)), (main, "stream", beside)]
        once("p", lambda: where.append(Stream.current), dynamics, 30)  # not computed, but waited for
        assert where == [beside]
        assert Stream.orders[2:] == [(main, "stream", beside)]


def test_what_depends_on_other_results_waits_for_them(beside):
    main, value = Stream.current, torch.zeros(3)
    with computing_beside(beside), sharing():
        once("q", lambda: value + 1, Dynamics(), value)
    assert Stream.orders == [(beside, "stream", main), (main, "stream", beside)]


def test_dynamics_that_may_depend_on_more_wait_for_everything_before(beside):
    class Driven(Dynamics):
        """Its force could come from a network."""

    def own_components(lgssm, n_frames):
        """May use anything."""

    main, swapped = Stream.current, Dynamics()
    del swapped.u  # as `torch.func.functional_call` does for a while
    swapped._parameters["u"] = 2 * torch.zeros(4)
    for dynamics in (Driven(), Dynamics(components=own_components), swapped):
        Stream.orders.clear()
        with computing_beside(beside), sharing():
            once("p", lambda: None, dynamics, 30)
        assert Stream.orders == [(beside, "stream", main), (main, "stream", beside)]


def test_nested_quantities_stay_on_the_stream(beside):
    where = []

    def inner():
        where.append(Stream.current)
        return torch.zeros(())

    with computing_beside(beside), sharing():
        once("outer", lambda: once("inner", inner, torch.zeros(3)) + 1)
    assert where == [beside]
    assert len(Stream.orders) == 2


def test_all_tensors_of_a_result_are_found():
    """Also those of Pyro's `GaussianHMM`, which keeps them in objects of its own; but no parameters."""
    p_a = Dynamics(components=hmm_components).positions(6)
    found = {x.data_ptr() for x in sharing_module._tensors((p_a, [p_a]))}
    hmm = p_a.component_distribution
    for gaussian in (hmm._init, hmm._trans, hmm._obs):
        assert {x.data_ptr() for x in (gaussian.log_normalizer, gaussian.info_vec, gaussian.precision)} <= found
    assert not list(sharing_module._tensors(Dynamics()))


def test_memory_is_kept_for_the_stream_that_reads_it(beside, monkeypatch):
    """Results are read by the current stream, arguments by the other; parameters are never freed."""
    recorded = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: recorded.append((x, stream)))
    main, dynamics, value = Stream.current, Dynamics(), torch.zeros(1, 2, 5, 2)
    with computing_beside(beside), sharing():
        p_a = dynamics.positions(5)
        mean, cov, L = p_a.component_distribution.stacked_moments
        for x in (mean, cov, L, p_a.mixture_distribution.logits):
            assert any(x.data_ptr() == y.data_ptr() and stream is main for y, stream in recorded)
        assert not any(stream is beside for _, stream in recorded)
        recorded.clear()
        lgssm = dynamics.lgssm()  # made beside, within p_a
        assert any(x is lgssm.Sigma_H and stream is main for x, stream in recorded)
        log_p = p_a.log_prob(value)
    assert any(x is value and stream is beside for x, stream in recorded)
    assert any(x is log_p and stream is main for x, stream in recorded)
    assert not any(x is p for x, _ in recorded for p in dynamics.parameters())


@pytest.mark.parametrize("kind", ["recurrent", "structured"])
def test_a_step_computes_p_a_beside_the_network(kind, small_data, monkeypatch):
    """From the beginning of the step on, and the step's numbers stay the same."""
    found = []
    for steps_beside in (True, False):
        rehearse(monkeypatch)
        if not steps_beside:
            monkeypatch.setattr(step_runners, "computing_beside", lambda stream: nullcontext())
        torch.manual_seed(0)
        model = make_model()
        rnn = make_guide().rnn
        guide = RecurrentGuide(rnn) if kind == "recurrent" else StructuredGuide(model.dynamics, rnn)
        loss = AnnealedELBO()(model, guide)
        steps = RehearsedSteps(loss.elbo, loss, 1e-3, {1.0: list(loss.parameters())})
        steps.set(kl_weight=2.0, learning_rate=1e-3)
        with steps.stream():
            steps.take(Batch(small_data.images, small_data.n_objects, torch.arange(7), Known(3, 40), seed=5))
        waited = [event for stream, event, _ in Stream.orders if stream is steps._beside]
        assert ("event" in waited) == steps_beside
        found.append((steps.read_totals(), *(p.detach() for p in loss.parameters())))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)
