"""The training schedule: learning rates, KL annealing, and freezing of parameters (Sec 3.2), and departures from it."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, TypeVar

from pyro_pixels._checks import Bounds, check_fields

Value = TypeVar("Value")
MAX_STEP = 10**9
Step = Annotated[int, Bounds(0, MAX_STEP)]
Count = Annotated[int, Bounds(1, MAX_STEP)]
Rate = Annotated[float, Bounds(0, 1e38, above=True)]


@dataclass(frozen=True)
class Schedule:
    """The settings of training; the defaults are those of Sec 3.2 where it gives them."""

    steps: Count = 200_000
    batch_size: Annotated[int, Bounds(1, 10**6)] = 20
    learning_rate: Rate = 1e-3
    """The learning rate of Adam, with beta_1 = 0.9, beta_2 = 0.999, epsilon = 1e-8."""
    learning_rate_factors: Mapping[str, Annotated[float, Bounds(0, 1e38)]] = field(default_factory=dict)
    """A map from prefixes of parameter names to factors on their learning rate, such as {"model.dynamics": 3.0}."""
    decay_from: Step | None = None
    """The step at which the learning rate starts its linear decay to a twentieth at the end; None keeps it constant."""
    learn_from: Mapping[str, Step] = field(default_factory=lambda: {"model.dynamics": 10_000})
    """A map from prefixes of parameter names to the step before which they are frozen; the longest match counts."""
    kl_start: Rate = 100.0
    """The KL weight beta at the start of annealing."""
    anneal_from: Step = 10_000
    anneal_steps: Step = 10_000
    """The number of steps, starting at anneal_from, in which beta falls geometrically from kl_start to 1."""
    kl_before: Rate = 1.0
    one_n_per_batch: bool = False
    """Whether all sequences of a batch have the same N, which saves work for absent objects; else N is mixed."""
    random_order_from: Step | None = None
    """The step from which, in training, the renderer draws the objects of each sequence in random order
    (`drawing_in_random_order`); None: always in the same order, as in the paper."""
    own_tracks_from: Step | None = None
    """The step from which the guide also learns from its own samples, with identity switches undone (`OwnTracks`);
    None: never. No effect if `fit` is called with an ``objective``."""
    own_tracks_weight: Annotated[float, Bounds(0, 1e6)] = 3.0
    """The weight of that term relative to the bound."""
    single_object_steps: Step = 0
    """The number of initial steps that use only sequences with N = 1."""
    fit_starts_at: tuple[Step, ...] = ()
    """The steps before which pi, mu_k and Sigma_k are fitted by EM to tracks inferred from 500 sequences."""
    parts: Count = 1
    """The number of parts of a batch; their gradients are accumulated, to save memory or to share among processes."""
    clip_norm: Rate | None = None
    """The largest gradient norm, in nats per sequence; larger gradients are scaled down to it."""
    evaluate_every: Count = 500
    """The number of steps between evaluations, each with a line in metrics.jsonl and a checkpoint."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.parts > self.batch_size:
            raise ValueError(f"parts is {self.parts}; wanted between 1 and batch_size, {self.batch_size}")

    def shortened(self, steps: int) -> "Schedule":
        """Returns a schedule of ``steps`` steps, fewer or more, with all events at the same fractions of them."""

        def at(step: int) -> int:
            return min(MAX_STEP, round(step * steps / self.steps))

        return replace(
            self,
            steps=steps,
            decay_from=None if self.decay_from is None else at(self.decay_from),
            learn_from={prefix: at(step) for prefix, step in self.learn_from.items()},
            anneal_from=at(self.anneal_from),
            own_tracks_from=None if self.own_tracks_from is None else at(self.own_tracks_from),
            random_order_from=None if self.random_order_from is None else at(self.random_order_from),
            anneal_steps=at(self.anneal_steps),
            single_object_steps=at(self.single_object_steps),
            fit_starts_at=tuple(at(step) for step in self.fit_starts_at),
            evaluate_every=max(1, at(self.evaluate_every)),
        )

    def with_steps(self, steps: int) -> "Schedule":
        """Returns the schedule with ``steps`` steps: fewer scale it down, more extend it after its last event.

        In both cases a decaying learning rate reaches its final value at the last step.
        """
        return self.shortened(steps) if steps < self.steps else replace(self, steps=steps)

    def kl_weight(self, step: int) -> float:
        """Returns the KL weight beta at a step."""
        if step < self.anneal_from:
            return self.kl_before
        done = min(1.0, (step - self.anneal_from) / self.anneal_steps) if self.anneal_steps else 1.0
        return self.kl_start ** (1.0 - done)

    def learning_rate_at(self, step: int) -> float:
        """Returns the learning rate at a step."""
        if self.decay_from is None or step <= self.decay_from:
            return self.learning_rate
        left = max(0.0, 1.0 - (step - self.decay_from) / max(1, self.steps - self.decay_from))
        return self.learning_rate * (0.05 + 0.95 * left)


def by_longest_prefix(table: Mapping[str, Value], name: str, default: Value) -> Value:
    """Returns the entry with the longest key that is a prefix of ``name``."""
    fitting = [prefix for prefix in table if name.startswith(prefix)]
    return table[max(fitting, key=len)] if fitting else default


def check_prefixes(schedule: Schedule, names: Collection[str]) -> None:
    """Raises ValueError if a prefix in the schedule matches no parameter and would silently have no effect."""
    for option in ("learning_rate_factors", "learn_from"):
        for prefix in getattr(schedule, option):
            if not any(name.startswith(prefix) for name in names):
                near = difflib.get_close_matches(prefix, [*names, *{name.rpartition(".")[0] for name in names}], 1)
                raise ValueError(
                    f"{option} has '{prefix}', which is not a prefix of any parameter name; "
                    + (f"did you mean '{near[0]}'?" if near else f"names look like '{next(iter(names))}'")
                )


def check_learning(schedule: Schedule, learnable: Collection[str]) -> None:
    """Raises ValueError if the first step would train none of the parameters with these names."""
    first = min((by_longest_prefix(schedule.learn_from, name, 0) for name in learnable), default=None)
    if first is None:
        raise ValueError("requires_grad is False for every parameter of model and guide; wanted True for at least one")
    if first > 0:
        raise ValueError(
            f"learn_from freezes every parameter until step {first}; wanted at least one that is trained from step 0"
        )
