"""A rehearsal of CUDA graphs on a CPU: what is recorded is taken again at every replay.

`rehearse` puts a graph, a generator and a stream that behave as CUDA's in the place of CUDA's, and lets trainings on a
CPU take `CapturedSteps`. Of a generator it keeps what matters here: drawing is refused, outside of a recording, with
the state that a failed recording left behind, and so is a replay of whatever was recorded with it.
"""

from contextlib import contextmanager

import torch

from pyro_pixels.training import step_runners as steps_module
from pyro_pixels.training import svi
from pyro_pixels.training.step_runners import CapturedSteps


class State:
    """What CUDA's generators point to."""

    def __init__(self, seed=0):
        self.seed, self.recording = seed, False


class Generator:
    def __init__(self, state=None):
        self.state = State() if state is None else state

    def clone_state(self):
        return Generator(State(self.state.seed))

    def graphsafe_get_state(self):
        return Generator(self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state

    def manual_seed(self, seed):
        self.state.seed = seed

    def get_state(self):
        return torch.tensor([self.state.seed])

    def set_state(self, state):
        self.state.seed = int(state)


DEFAULT = Generator()


class Graph:
    recording: "Graph | None" = None

    def __init__(self):
        self.again = None

    def replay(self):
        if self.state.recording:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.again()

    def reset(self):
        self.again = None


@contextmanager
def record(graph, pool, stream):
    graph.state = DEFAULT.state
    Graph.recording, graph.state.recording = graph, True
    try:
        yield
    finally:
        Graph.recording = None
    graph.state.recording = False


class Stream:
    """Notes, in ``orders``, which streams wait for which."""

    current: "Stream"
    orders: "list[tuple[Stream, str, object]]" = []  # noqa: RUF012

    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        self.orders.append((self, "stream", other))

    def wait_event(self, event):
        self.orders.append((self, "event", event))

    def record_event(self):
        return "event", self


@contextmanager
def on(stream):
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


def rehearse_streams(monkeypatch):
    """Puts streams that do nothing in the place of CUDA's; `Stream.current` is the current one."""
    Stream.current = Stream()
    Stream.orders.clear()
    for name, stand_in in {
        "Stream": Stream,
        "current_stream": lambda device=None: Stream.current,
        "stream": on,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


class RehearsedSteps(CapturedSteps):
    """`CapturedSteps` on a CPU."""

    made: "list[RehearsedSteps]" = []  # noqa: RUF012

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.made.append(self)

    def _adam_options(self):
        return {}

    def _take_as_recorded(self, batch):
        if Graph.recording is not None:
            Graph.recording.again = lambda: super(RehearsedSteps, self)._take_as_recorded(batch)
        elif DEFAULT.state.recording:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        super()._take_as_recorded(batch)


def rehearse(monkeypatch):
    """Lets what follows in a test take the CPU for a CUDA device when it trains."""
    cuda = torch.cuda
    rehearse_streams(monkeypatch)
    for name, stand_in in {
        "CUDAGraph": Graph, "graph": record, "synchronize": lambda device=None: None,
        "graph_pool_handle": lambda: (0, 1), "empty_cache": lambda: None, "default_generators": {None: DEFAULT},
    }.items():  # fmt: skip
        monkeypatch.setattr(cuda, name, stand_in)
    DEFAULT.state = State()
    RehearsedSteps.made.clear()
    monkeypatch.setattr(steps_module, "CapturedSteps", RehearsedSteps)
    monkeypatch.setattr(svi, "steps_for", lambda device, n_processes: RehearsedSteps)
