"""Shows where a guide switches identities: switch rates by events in a sequence, as inferred, untangled, and refined.

A network that sorts objects by height switches them when the order of heights changes, wherever they are; one that
loses them in a meeting switches them where they meet. True positions are needed. A picture shows some sequences that
`untangle` leaves switched.
"""

from examples._common import QueryArguments, new_folder, open_run, say_where, start, write_json

import itertools
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_pixels._options import Sequences, result_file
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.guides.refining import refine
from pyro_pixels.guides.untangled import can_be_untangled
from pyro_pixels.guides.untangling import untangle
from pyro_pixels.plots.paper import figure_beside, save_figure
from pyro_pixels.plots.style import START, TEXT, TRUTH, add_legend, colour_of, draw_tracks, grid, plane
from pyro_pixels.queries.predict import infer
from pyro_pixels.result_tables import markdown
from pyro_pixels.runs import Run

BINS = (0.0, 1.0, 2.0, 4.0, float("inf"))  # closest approach of two objects, pixels


@dataclass
class Arguments(QueryArguments):
    n_sequences: Sequences = 900
    """Number of sequences to query."""
    json: Path | None = field(default=None)
    """File for the numbers, with the picture next to it. By default switches.json in --out."""


def order_changes(positions: Tensor, n: int) -> Tensor:
    """Returns (b,) bool, whether the order of mean rows of n objects differs between the first and the last frames.

    The frames are those of `metrics.known_ends`.
    """
    rows, ends = positions[:, :n, :, 1], metrics.known_ends(positions, torch.full((len(positions),), n))
    first, last = (rows.where(frames[:, None], torch.nan).nanmean(-1).argsort(1) for frames in ends)
    return (first != last).any(1)


def closest(positions: Tensor, n: int) -> Tensor:
    """Returns (b,), the smallest distance between any two of n objects in any frame with true positions, in pixels."""
    pairs = [(positions[:, i] - positions[:, j]).norm(dim=-1) for i, j in combinations(range(n), 2)]
    return torch.stack(pairs).nan_to_num(torch.inf).amin((0, -1))


def matched(in_pixels: Tensor, data: ImageSequences) -> Tensor:
    """Returns tracks (B, N, T, 2) in the order of the true ones."""
    assert data.positions is not None
    return metrics.reorder(in_pixels, metrics.assign(in_pixels, data.positions, data.n_objects))


def switches(in_pixels: Tensor, data: ImageSequences) -> Tensor:
    """Returns (B,) bool, whether objects of tracks (B, N, T, 2) are switched between the first and the last frames."""
    assert data.positions is not None
    return metrics.switches(matched(in_pixels, data), data.positions, data.n_objects)


def switched_by(in_pixels: Tensor, data: ImageSequences) -> dict[str, Any]:
    """Returns switch rates of tracks (B, N, T, 2) by N, by change of order, and by closest approach."""
    assert data.positions is not None
    switched = switches(in_pixels, data)
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


def tracks_of(run: Run, data: ImageSequences, device: torch.device) -> dict[str, Tensor]:
    """Returns tracks (B, N, T, 2) in pixels: inferred, untangled, and, if frames can be exchanged, refined."""
    images, n_objects = data.images.to(device), data.n_objects.to(device)
    a = infer(run.guide, images, n_objects).mean
    found = {"inferred": a, "untangled": untangle(run.model.dynamics, a, n_objects).a}
    if can_be_untangled(run.guide.q(images[:1], n_objects[:1])):
        found["refined"] = refine(run.model, a, n_objects, images).a
    assert data.positions is not None
    affine = metrics.fit_affine(a.cpu(), data.positions, data.n_objects)
    return {name: affine(x.cpu()) for name, x in found.items()}


def draw(tracks: dict[str, Tensor], data: ImageSequences) -> Figure:
    """Draws sequences of the largest N that stay switched when untangled (or any), with one column per method."""
    most = data.n_objects == data.n_objects.max()
    left = most & switches(tracks["untangled"], data)
    rows = (left if bool(left.any()) else most).nonzero().squeeze(1)[:3].tolist()
    figure, cells = grid(len(tracks) * len(rows), len(tracks), 2.4, [2.4 * data.images.shape[2] / data.images.shape[3]])
    assert data.positions is not None
    for i, ((ax,), (b, name)) in enumerate(zip(cells, itertools.product(rows, tracks))):
        N = int(data.n_objects[b])
        for n, track in enumerate(matched(tracks[name][b : b + 1], data[b : b + 1])[0, :N].numpy()):
            draw_tracks(ax, track[None], colour_of("", n), linewidth=1.8, start=True)
        draw_tracks(ax, data.positions[b, :N].numpy(), TRUTH, linewidth=0.7, zorder=2.5)
        plane(ax, (data.images.shape[2], data.images.shape[3]))
        ax.set_title(f"sequence {b}, {name}" if i % len(tracks) == 0 else name, **TEXT)
    return add_legend(figure, ["truth"], [START])


def main(args: Arguments) -> None:
    out = result_file(args.json or (args.out or args.home) / "switches.json", ".json")
    new_folder(out.parent)
    picture = figure_beside(out)
    run, data, device = open_run(args, as_trained=True)
    if data.positions is None or not bool((data.n_objects > 1).any()):
        raise ValueError(
            "no sequence has several objects and known positions; give --data that has some, or leave it out"
        )
    tracks = tracks_of(run, data, device)
    found = {which: switched_by(x, data) for which, x in tracks.items()}
    rows = []
    for n, groups in found["inferred"].items():
        for name, group in groups.items():
            rates = [found[which][n][name]["rate"] for which in found]
            rows.append([n, name, str(group["n"]), *("-" if rate is None else f"{100 * rate:.1f}" for rate in rates)])
    print(markdown(["N", "sequences where", "how many", *(f"{which}: switched, %" for which in found)], rows))
    write_json(out, {"seed": args.seed, "n_sequences": len(data), **found})
    save_figure(draw(tracks, data), picture)
    say_where([out, picture])


if __name__ == "__main__":
    start(main, Arguments, __doc__)
