"""Wrong calls of the API: each is one line of a ValueError that says what was given and what was wanted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import DATA, TINY

from pyro_pixels import evaluate, fit, generate, infer, interpolate, load_pretrained, load_run, simulate
from pyro_pixels.data import ImageSequences, load_sequences
from pyro_pixels.lgssm.dynamics import DynamicsConfig
from pyro_pixels.queries.predict import reconstruct, render
from pyro_pixels.runs import build, load_config
from pyro_pixels.training.checkpoints import load_checkpoint
from pyro_pixels.training.elbo import bound
from pyro_pixels.training.schedule import Schedule

RUN = build(TINY)
MODEL, GUIDE = RUN.model, RUN.guide
V, N = DATA.images, DATA.n_objects
NAN = V.float()
NAN = torch.where(torch.rand(NAN.shape, generator=torch.Generator().manual_seed(0)) < 0.1, torch.nan, NAN)
SEEN = torch.ones(6, dtype=torch.bool)

IMAGES: dict[str, Any] = {
    "None": None,
    "a text": "v",
    "a number": 3,
    "three axes": V[0],
    "five axes": V[None],
    "no sequence": V[:0],
    "no frame": V[:, :0],
    "another size": V[..., :5],
    "0 to 255": V * 255 + (V == 0) * 7,
    "-1 to 1": V.float() * 2 - 1,
    "NaN pixels": NAN,
    "infinite": V.float() + torch.inf,
    "complex": V.cfloat(),
    "other number of sequences": V[:3],
    "a list of numbers": [1, 2],
}
OBJECTS: dict[str, Any] = {
    "None": None,
    "a text": "1",
    "floats": N.float(),
    "bools": N > 0,
    "zero": N * 0,
    "negative": -N,
    "two axes": N[None],
    "too few": N[:3],
    "too many": torch.cat([N, N]),
    "complex": N.cfloat(),
}
ASKED: dict[str, Callable[[Any, Any], Any]] = {
    "infer": lambda v, n: infer(GUIDE, v, n),
    "reconstruct": lambda v, n: reconstruct(MODEL, GUIDE, v, n),
    "generate": lambda v, n: generate(MODEL, GUIDE, v, n, n_frames=9),
    "interpolate": lambda v, n: interpolate(MODEL, GUIDE, v, n, SEEN),
    "ImageSequences": lambda v, n: ImageSequences(v, n),
}
SAMPLES = [-1, 1.5, "2", float("nan")]


def with_schedule(**changes: Any) -> Callable[[], Any]:
    return lambda: fit(MODEL, GUIDE, DATA, replace(TINY.schedule, **changes), progress=False)


CALLS: dict[str, Callable[[], Any]] = {
    **{f"{f}, images: {k}": (lambda f=f, v=v: ASKED[f](v, N)) for f in ASKED for k, v in IMAGES.items()
       if not (f == "ImageSequences" and k == "another size")},
    **{f"{f}, n_objects: {k}": (lambda f=f, n=n: ASKED[f](V, n)) for f in ASKED for k, n in OBJECTS.items()},
    **{f"infer, n_samples {n}": (lambda n=n: infer(GUIDE, V, N, n_samples=n)) for n in SAMPLES},
    **{f"generate, n_samples {n}": (lambda n=n: generate(MODEL, GUIDE, V, N, n_frames=9, n_samples=n))
       for n in SAMPLES},
    **{f"generate, n_frames {n}": (lambda n=n: generate(MODEL, GUIDE, V, N, n_frames=n)) for n in (-3, 0, 6, 7.5, "9")},
    **{f"interpolate, observed {k}": (lambda s=s: interpolate(MODEL, GUIDE, V, N, s)) for k, s in {
        "none": ~SEEN, "floats": SEEN.float(), "too few": SEEN[:3], "None": None, "a text": "11"}.items()},
    **{f"evaluate, n_seen {n}": (lambda n=n: evaluate(MODEL, GUIDE, DATA, n_seen=n)) for n in (-3, 0, 3, 16, 1.5, "2")},
    **{f"simulate, n_sequences {n}": (lambda n=n: simulate(TINY.data, n, seed=0)) for n in (-59, 0, 1.5, "3", None)},
    **{f"simulate, seed {n}": (lambda n=n: simulate(TINY.data, 1, seed=n)) for n in (-1, 0.5, "0", 10**30)},
    **{f"build of {k}": (lambda c=c: build(c)) for k, c in {
        "None": None, "a dict": {}, "a Schedule": Schedule()}.items()},
    "simulate, no world": lambda: simulate(None, 1, seed=0),  # type: ignore
    "load_run, nowhere": lambda: load_run("/nowhere"),
    "load_config, nowhere": lambda: load_config("/nowhere"),
    "load_sequences, a folder": lambda: load_sequences("/"),
    "load_checkpoint, a folder": lambda: load_checkpoint("/"),
    "load_pretrained, elsewhere": lambda: load_pretrained("../../etc"),
    "guide unknown": lambda: build(replace(TINY, guide="mine")),
    "likelihood unknown": lambda: build(replace(TINY, likelihood="mine")),
    "dynamics of a text": lambda: DynamicsConfig(delta="0.1"),  # type: ignore
    "steps 1.5": with_schedule(steps=1.5),
    "rates infinite": with_schedule(learning_rate=float("inf")),
    "rates negative": with_schedule(learning_rate_factors={"model": -1.0}),
    "prefix of nothing": with_schedule(learn_from={"modell": 1}),
    "fit, resume without a folder": lambda: fit(MODEL, GUIDE, DATA, TINY.schedule, resume=True, progress=False),
    "fit, seed -1": lambda: fit(MODEL, GUIDE, DATA, TINY.schedule, seed=-1, progress=False),
    "fit, seed 1.5": lambda: fit(MODEL, GUIDE, DATA, TINY.schedule, seed=1.5, progress=False),  # type: ignore
    "fit, no data": lambda: fit(MODEL, GUIDE, None, TINY.schedule, progress=False),  # type: ignore
    "fit, no schedule": lambda: fit(MODEL, GUIDE, DATA, None, progress=False),  # type: ignore
    "fit, half precision": lambda: fit(
        *(m.half() for m in build(TINY)[1:3]), DATA, TINY.schedule, progress=False  # type: ignore
    ),
    "bound, no sequence": lambda: bound(MODEL, GUIDE, DATA[:0]),
    "render, one axis": lambda: render(MODEL, torch.zeros(3), N),
}  # fmt: skip


def test_there_are_many():
    assert len(CALLS) > 150


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_wrong_call_is_one_line(call):
    with pytest.raises(ValueError) as error:
        call()
    said = str(error.value)
    assert said.strip()
    assert "\n" not in said
    assert len(said) < 400


@pytest.mark.parametrize("f", ASKED)
def test_what_a_user_means_is_taken(f):
    """Arrays of numpy, and lists of numbers of objects."""
    wanted = ASKED[f](V, N)
    found = ASKED[f](V.numpy(), N.tolist())
    first = (lambda x: x.images) if f == "ImageSequences" else lambda x: x if torch.is_tensor(x) else x.mean
    torch.testing.assert_close(first(found), first(wanted))
    assert np.isfinite(first(found).float().numpy()).all()
