"""The suites of configurations that `sweep.py` trains, most of them the quick preset with some values changed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pyro_pixels.config import RunConfig
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.guides.tracking_head import TrackingHead
from pyro_pixels.lgssm.dynamics import DynamicsConfig
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.presets import PRESETS
from pyro_pixels.run_training import teaching_schedule
from pyro_pixels.runs import GUIDES
from pyro_pixels.training.schedule import Schedule

QUICK, PAPER = PRESETS["quick"], PRESETS["paper"]
PAPERS_DYNAMICS = DynamicsConfig()


def _two_starts(config: RunConfig, model: PixelModel) -> Guide:
    guide = GUIDES["structured"](config, model)
    assert isinstance(guide, StructuredGuide)
    assert isinstance(guide.head, TrackingHead)
    guide.head.n_starts = 2
    return guide


def _untracked(config: RunConfig, model: PixelModel) -> Guide:
    guide = GUIDES["attentive"](config, model)
    assert isinstance(guide, RecurrentGuide)
    return StructuredGuide(model.dynamics, guide.rnn, guide.head)


GUIDES["untracked"] = _untracked
GUIDES["two starts"] = _two_starts


@dataclass(frozen=True)
class Variant:
    """Values that replace those of a configuration."""

    run: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `RunConfig`."""
    dynamics: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its `DynamicsConfig`."""
    schedule: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its `Schedule`."""
    factors: Mapping[str, float | None] = field(default_factory=dict)
    """Learning-rate factors by prefix; None removes one."""

    def applied_to(self, config: RunConfig) -> RunConfig:
        factors = {**config.schedule.learning_rate_factors, **self.factors}
        schedule = replace(
            config.schedule, learning_rate_factors={k: x for k, x in factors.items() if x is not None}, **self.schedule
        )
        return replace(config, dynamics=replace(config.dynamics, **self.dynamics), schedule=schedule, **self.run)


VARIANTS: dict[str, Variant] = {
    "quick": Variant(),
    "guide: dynamics outside q (attention head)": Variant(run={"guide": "attentive"}),
    "guide: dynamics inside q, attention head": Variant(run={"guide": "untracked"}),
    "tracking: from the first and the last frame alone": Variant(run={"guide": "two starts"}),
    "renderer: starts as the paper's": Variant(run={"renderer_input_scale": None}),
    "renderer: starts grey": Variant(run={"background_logit": 0.0}),
    "renderer: learning rate not raised": Variant(factors={"model.renderer": None}),
    "dynamics: learning rate not raised": Variant(factors={"model.dynamics": None, "model.dynamics.log_pi": None}),
    "dynamics: u and delta not slowed": Variant(factors={"model.dynamics.u": None, "model.dynamics.log_delta": None}),
    "dynamics: delta 0.1": Variant(dynamics={"delta": PAPERS_DYNAMICS.delta}),
    "dynamics: noises start as the paper's": Variant(
        dynamics={"state_noise": PAPERS_DYNAMICS.state_noise, "position_noise": PAPERS_DYNAMICS.position_noise}
    ),
    "dynamics: noises free from the start": Variant(schedule={"learn_from": {}}),
    "dynamics: mu, Sigma start as the paper's": Variant(
        dynamics={
            "start_spread": PAPERS_DYNAMICS.start_spread,
            "start_velocity_spread": PAPERS_DYNAMICS.start_velocity_spread,
            "start_variance": PAPERS_DYNAMICS.start_variance,
        }
    ),
    "dynamics: starts not fitted": Variant(schedule={"fit_starts_at": ()}),
    "dynamics: Sigma_A learns 50 times faster": Variant(factors={"model.dynamics.root_Sigma_A": 50.0}),
    "schedule: KL weight 1 throughout": Variant(schedule={"kl_before": 1.0}),
    "schedule: not one object first": Variant(schedule={"single_object_steps": 0}),
    "schedule: constant learning rate": Variant(schedule={"decay_from": None}),
    "schedule: mixed N in a batch": Variant(schedule={"one_n_per_batch": False}),
}
"""The quick preset, as it is and with one ingredient left out or changed."""

TOGETHER: dict[str, tuple[str, ...]] = {
    # Ingredients that can replace each other.
    "dynamics: starts neither fitted nor as the preset's": (
        "dynamics: mu, Sigma start as the paper's",
        "dynamics: starts not fitted",
    ),
    # Ingredients that can each be left out alone.
    "all that is not needed left out at once": (
        "dynamics: learning rate not raised",
        "dynamics: u and delta not slowed",
        "dynamics: delta 0.1",
        "dynamics: mu, Sigma start as the paper's",
        "dynamics: starts not fitted",
        "schedule: KL weight 1 throughout",
        "schedule: not one object first",
        "schedule: constant learning rate",
    ),
}
"""Combinations of several variants."""


def configurations(suite: str, steps: int | None) -> dict[str, RunConfig]:
    """Returns the configurations of a suite by name.

    Args:
        suite: the name of the suite.
        steps: the number of training steps, if not the suite's own.
    """
    if suite == "recurrent":
        schedule = short_paper_schedule(steps or 4_000)
        return {"recurrent": replace(PAPER, state_size=QUICK.state_size, data=QUICK.data, schedule=schedule)}
    if suite == "taught":
        taught = replace(QUICK, guide_state_size=QUICK.state_size, schedule=teaching_schedule(steps or 4_000))
        return {f"taught {guide}": replace(taught, guide=guide) for guide in ("recurrent", "attentive")}
    configs = {"quick": QUICK}
    if suite == "longer":
        for more in (7_500, 15_000):
            configs[f"quick, {more:,} steps"] = replace(QUICK, schedule=replace(QUICK.schedule, steps=more))
    elif suite == "ablation":
        configs = ablation()
    elif suite == "small-noise":
        # The preset starts Sigma_A far above the truth.
        faster = VARIANTS["dynamics: Sigma_A learns 50 times faster"].applied_to(QUICK)
        configs = {"small noise": replace(faster, data=replace(QUICK.data, position_noise=1e-6))}
    if steps is not None:
        configs = {name: replace(c, schedule=c.schedule.with_steps(steps)) for name, c in configs.items()}
    return configs


def ablation() -> dict[str, RunConfig]:
    """Returns the quick preset with each of the `VARIANTS`, and with those of each combination in `TOGETHER`."""
    configs = {name: variant.applied_to(QUICK) for name, variant in VARIANTS.items()}
    for name, parts in TOGETHER.items():
        configs[name] = QUICK
        for part in parts:
            configs[name] = VARIANTS[part].applied_to(configs[name])
    return configs


def short_paper_schedule(steps: int) -> Schedule:
    """Returns the paper's schedule with dynamics frozen for a quarter of the steps and the KL annealed over the next.

    A twentieth each, as in the paper's 200,000 steps, would be too short to learn anything.
    """
    quarter = steps // 4
    return replace(
        PAPER.schedule, steps=steps, learn_from={"model.dynamics": quarter}, anneal_from=quarter,
        anneal_steps=quarter, evaluate_every=max(1, steps // 20),
    )  # fmt: skip
