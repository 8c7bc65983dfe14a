"""Presets: the paper's configuration; the paper's network with an initialisation and a schedule with which it learns;
and the structured guide, which learns in minutes."""

from dataclasses import replace

from pyro_pixels.config import RunConfig
from pyro_pixels.lgssm.dynamics import DynamicsConfig
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.worlds.cannonballs import CannonballConfig

NEVER = 10**9
"""A step that is never reached: parameters learned from there on stay fixed."""
_NOISE = ("model.dynamics.root_Sigma_H", "model.dynamics.root_Sigma_A")


PRESETS: dict[str, RunConfig] = {
    # The paper does not specify how batches are composed.
    "paper": RunConfig(schedule=Schedule(one_n_per_batch=True, evaluate_every=2_000)),
    # Takes minutes on two CPU cores. The reasons for each value are in docs/decisions.md.
    "quick": RunConfig(
        guide="structured",
        state_size=256,
        guide_state_size=64,
        background_logit=-4.5,
        renderer_input_scale=12.0,
        dynamics=DynamicsConfig(
            delta=0.2,
            state_noise=1e-6,
            position_noise=2e-3,
            start_spread=0.1,
            start_velocity_spread=0.3,
            start_variance=0.1,
        ),
        schedule=Schedule(
            steps=1_000,
            learning_rate_factors={
                "model.renderer": 3.0,
                "model.dynamics": 3.0,
                "model.dynamics.log_pi": 0.3,
                "model.dynamics.u": 0.2,
                "model.dynamics.log_delta": 0.2,
            },
            decay_from=500,
            learn_from=dict.fromkeys(_NOISE, 700),
            kl_before=1 / 3,
            kl_start=1.0,
            anneal_from=700,
            anneal_steps=0,
            one_n_per_batch=True,
            single_object_steps=200,
            fit_starts_at=(350, 700),
            evaluate_every=100,
        ),
        data=CannonballConfig(height=32, width=32),
    ),
}

_QUICK = PRESETS["quick"]

# The paper's network and head, Eqs (8)-(9), trained on the bound and later also on its own samples (`OwnTracks`); the
# initial values and the schedule depart from Sec 3.2. Reasons for each value and ablations are in docs/learning.md.
PRESETS["recurrent"] = replace(
    _QUICK,
    guide="recurrent",
    state_size=128,
    guide_state_size=None,
    image_ramps=3.0,
    schedule=Schedule(
        steps=8_000,
        learning_rate=2e-3,
        learning_rate_factors=_QUICK.schedule.learning_rate_factors,
        decay_from=4_000,
        learn_from=dict.fromkeys(_NOISE, NEVER),
        kl_before=3.0,
        kl_start=1.0,
        anneal_from=2_000,
        anneal_steps=0,
        one_n_per_batch=True,
        random_order_from=5_000,
        own_tracks_from=5_000,
        fit_starts_at=(1_000, 4_000, 7_500),
        clip_norm=1_000.0,
        evaluate_every=500,
    ),
)
# The same for an hour; the pretrained `recurrent` weights of the package come from it.
PRESETS["recurrent_long"] = replace(
    PRESETS["recurrent"],
    schedule=replace(
        PRESETS["recurrent"].schedule,
        steps=40_000,
        decay_from=20_000,
        anneal_from=30_000,
        random_order_from=4_000,
        own_tracks_from=4_000,
        fit_starts_at=(1_000, 5_000, 20_000, 38_000),
    ),
)
# The same at the paper's size, for a GPU: minutes on an H100.
PRESETS["paper_learned"] = replace(
    PRESETS["recurrent"],
    state_size=1024,
    n_sequences=6_000,
    schedule=replace(
        PRESETS["recurrent"].schedule,
        steps=100_000,
        learning_rate=1e-3,
        decay_from=50_000,
        anneal_from=75_000,
        random_order_from=8_000,
        own_tracks_from=8_000,
        fit_starts_at=(1_000, 10_000, 50_000, 95_000),
        evaluate_every=5_000,
    ),
    data=CannonballConfig(),
)
