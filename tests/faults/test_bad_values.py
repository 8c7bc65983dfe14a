"""Nonsense in configurations, made from the bounds of each field: a new field is covered as soon as it is declared."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from bad import bad_numbers, numbers_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_pixels._checks import ANY, check_fields, check_name
from pyro_pixels.config import RunConfig
from pyro_pixels.evaluation.ed_lstm import EDLSTMConfig
from pyro_pixels.lgssm.dynamics import DynamicsConfig
from pyro_pixels.runs import build
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig
from pyro_pixels.worlds.drawing import Look
from pyro_pixels.worlds.others import BouncingConfig, DriftConfig

CONFIGS = (RunConfig, Schedule, DynamicsConfig, CannonballConfig, DriftConfig, BouncingConfig, Look, EDLSTMConfig)


def wrapped(x: Any, how: str) -> Any:
    return {"": x, "tuple": (x, x), "mapping": {"model.dynamics": x}}[how]


CASES = [
    pytest.param(kind, name, value, how, id=f"{kind.__name__}.{name}={str(value)[:20]}-{i}")
    for kind in CONFIGS
    for name, number, bounds, how in numbers_of(kind)
    for i, value in enumerate(bad_numbers(number, bounds))
]


def test_every_number_of_a_configuration_has_bounds():
    without = [
        f"{kind.__name__}.{name}" for kind in CONFIGS for name, _, bounds, _ in numbers_of(kind) if bounds == ANY
    ]
    assert not without
    assert len(CASES) > 500


def test_bad_values_are_refused_in_one_line_that_names_the_field():
    wrong = []
    for case in CASES:
        kind, name, value, how = case.values
        try:
            kind(**{name: wrapped(value, how)})
        except ValueError as error:
            said = str(error)
            named = name in said or (name == "radius" and "radius" in said)
            if "\n" in said or len(said) > 300 or not named:
                wrong.append((case.id, said))
        else:
            wrong.append((case.id, "accepted"))
    assert not wrong


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_any_value_is_taken_or_refused_in_one_line(data):
    kind = data.draw(st.sampled_from(CONFIGS))
    name = data.draw(st.sampled_from([field.name for field in dataclasses.fields(kind) if field.init]))
    anything = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.tuples(st.floats(), st.floats()),
        st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
    )  # fmt: skip
    value = data.draw(anything)
    try:
        config = kind(**{name: value})
    except ValueError as error:
        one_line = "\n" not in str(error)
    else:
        one_line = check_fields(config) is None
    assert one_line


def test_numbers_of_numpy_and_lists_become_pythons():
    config = CannonballConfig(n_frames=np.int64(5), gravity=np.float32(2.0), n_objects=[np.int32(1), 2])  # type: ignore
    assert (config.n_frames, config.gravity, config.n_objects) == (5, 2.0, (1, 2))
    assert type(config.n_frames) is int
    assert type(config.n_objects[0]) is int


def test_sizes_that_no_memory_has_are_refused_before_anything_is_made():
    huge = RunConfig(state_size=65_536, data=CannonballConfig(height=4_096, width=4_096))
    with pytest.raises(ValueError, match="more than max_weights"):
        build(huge)
    with pytest.raises(ValueError, match="more than max_bytes"):
        simulate(CannonballConfig(), 10**9, seed=0)


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None, 10**20, True])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match="seed is"):
        simulate(CannonballConfig(), 1, seed=seed)
    with pytest.raises(ValueError, match="seed is"):
        RunConfig(seed=seed)


@pytest.mark.parametrize("name", ["../../escaped", "/etc", "a/b", "", ".", "..", "a\\b", "a\n", "x" * 200, ".hidden"])
def test_names_that_lead_elsewhere(name):
    with pytest.raises(ValueError, match="--name is"):
        check_name("--name", name)
