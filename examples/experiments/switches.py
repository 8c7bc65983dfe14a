"""Where a guide loses names: switch rates by what happens in a sequence, as inferred and with names put right by p(a).

A network that sorts objects by height switches them where the order of heights changes, wherever they are; one that
loses them in a meeting switches them where they meet. True positions are needed.
"""

from examples._common import QueryArguments, open_run, say_where, start, write_json

from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_pixels._options import Sequences, result_file
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.guides.untangling import untangle
from pyro_pixels.queries.predict import infer
from pyro_pixels.result_tables import markdown
from pyro_pixels.runs import Run

BINS = (0.0, 1.0, 2.0, 4.0, float("inf"))  # closest approach of two objects, pixels
END = 4  # frames at either end whose mean height is compared


@dataclass
class Arguments(QueryArguments):
    n_sequences: Sequences = 900
    """How many sequences to ask about."""
    json: Path | None = field(default=None)
    """Where the numbers go. By default switches.json in the run's folder."""


def order_changes(positions: Tensor, n: int) -> Tensor:
    """(b,) bool: whether the order of mean rows differs between the first and the last frames of n objects."""
    rows = positions[:, :n, :, 1]
    return (rows[..., :END].mean(-1).argsort(1) != rows[..., -END:].mean(-1).argsort(1)).any(1)


def closest(positions: Tensor, n: int) -> Tensor:
    """(b,), the smallest distance between any two of n objects in any frame, pixels."""
    pairs = [(positions[:, i] - positions[:, j]).norm(dim=-1).amin(-1) for i, j in combinations(range(n), 2)]
    return torch.stack(pairs).amin(0)


def switched_by(in_pixels: Tensor, data: ImageSequences) -> dict[str, Any]:
    """Switch rates of tracks (B, N, T, 2) by N, by change of order, and by closest approach."""
    assert data.positions is not None
    matched = metrics.reorder(in_pixels, metrics.assign(in_pixels, data.positions, data.n_objects))
    switched = metrics.switches(matched, data.positions, data.n_objects)
    found: dict[str, Any] = {}
    for n in (int(n) for n in data.n_objects.unique() if n > 1):
        chosen = data.n_objects == n
        here, where = switched[chosen].double(), data.positions[chosen]
        changes, distance = order_changes(where, n), closest(where, n)
        groups = {
            "all": torch.ones_like(changes),
            "order of heights kept": ~changes,
            "order of heights changes": changes,
        }
        for low, high in pairwise(BINS):
            between = f"{low:g} to {high:g}" if high < BINS[-1] else f"above {low:g}"
            groups[f"closest approach {between} px"] = (distance >= low) & (distance < high)
        found[str(n)] = {
            name: {"n": int(group.sum()), "rate": metrics.nan_mean(here[group]) if bool(group.any()) else None}
            for name, group in groups.items()
        }
    return found


def measure(run: Run, data: ImageSequences, device: torch.device) -> dict[str, Any]:
    n_objects = data.n_objects.to(device)
    a = infer(run.guide, data.images.to(device), n_objects).mean
    renamed = untangle(run.model.dynamics, a, n_objects).a
    assert data.positions is not None
    affine = metrics.fit_affine(a.cpu(), data.positions, data.n_objects)
    return {"inferred": switched_by(affine(a.cpu()), data), "untangled": switched_by(affine(renamed.cpu()), data)}


def main(args: Arguments) -> None:
    out = result_file(args.json or args.home / "switches.json", ".json")
    run, data, device = open_run(args, as_trained=True)
    if data.positions is None or not bool((data.n_objects > 1).any()):
        raise ValueError("there is no sequence with several objects and known positions; give such --data, or none")
    found = measure(run, data, device)
    rows = []
    for n, groups in found["inferred"].items():
        for name, group in groups.items():
            rates = [found[which][n][name]["rate"] for which in ("inferred", "untangled")]
            rows.append([n, name, str(group["n"]), *("-" if rate is None else f"{100 * rate:.1f}" for rate in rates)])
    print(markdown(["N", "sequences where", "how many", "switched, %", "untangled, %"], rows))
    write_json(out, {"seed": args.seed, "n_sequences": len(data), **found})
    say_where([out])


if __name__ == "__main__":
    start(main, Arguments, __doc__)
