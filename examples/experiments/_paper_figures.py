"""The paper's figures, redrawn for a trained run by `reproduce_paper.py`."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.ed_lstm import EDLSTM
from pyro_pixels.evaluation.table import N_SEEN
from pyro_pixels.plots import paper as plots
from pyro_pixels.plots.paper import save_figure
from pyro_pixels.run_figures import RunView


def draw_model_figures(view: RunView, folder: Path) -> None:
    """Draws Figs 3, 6, 8, 9, 10, 12 and 13, from sequences of two objects and of the largest number."""
    data, size = view.data, view.data.size
    generated, interpolated = view.generation(), view.interpolation()
    truth, inferred = data.positions, view.tracks(view.inference.mean)
    assert truth is not None
    two, three = ((data.n_objects == n).nonzero().squeeze(1) for n in (2, int(data.n_objects.max())))
    rows = three[:6]
    figure = plots.plot_positions(truth[rows], inferred[rows], n_objects=data.n_objects[rows], size=size)
    save_figure(figure, folder / "fig3.png")

    drawn, tail = generated.images.cpu(), slice(N_SEEN, None)
    rows = torch.cat([two[:3], three[:3]])
    figure = plots.plot_generated_images(drawn[rows, tail], data.images[rows, tail], rows=2)
    save_figure(figure, folder / "fig6.png")

    red, cyan = (view.tracks(p.mean) for p in (generated, interpolated))
    red[:, :, : N_SEEN - 1] = torch.nan

    def trajectories(rows: Tensor, *, between: bool, images: dict[str, Tensor] | None = None) -> Figure:
        return plots.plot_trajectories(
            truth[rows], inferred[rows], red[rows], cyan[rows] if between else None, size=size, columns=4,
            n_objects=data.n_objects[rows], images=images and {name: x[rows] for name, x in images.items()},
        )  # fmt: skip

    save_figure(trajectories(torch.cat([two[:4], three[:4]]), between=False), folder / "fig8.png")
    images = {"generated": drawn, "truth": data.images, "interpolated": interpolated.images.cpu()}
    save_figure(trajectories(torch.cat([two[:2], three[:2]]), between=True, images=images), folder / "fig9.png")
    rows = torch.cat([two[:4], three[:4]])
    for name, frames in (("fig10_last", slice(-1, None)), ("fig10_overlaid", tail)):
        figure = plots.plot_generated_images(drawn[rows, frames], data.images[rows, frames], rows=2)
        save_figure(figure, folder / f"{name}.png")
    for name, rows in (("fig12", two[4:8]), ("fig13", three[4:8])):
        save_figure(trajectories(rows, between=True, images=images), folder / f"{name}.png")


def draw_worst(view: RunView, path: Path) -> None:
    """Draws Fig 5(b): sequences of two balls in which identities switch, or else those with the largest errors."""
    data = view.data
    assert data.positions is not None
    inferred = view.tracks(view.inference.mean)
    error = metrics.errors(inferred, data.positions, data.n_objects).nanmean((1, 2))
    error += 1e3 * metrics.switches(inferred, data.positions, data.n_objects)
    rows = torch.where(data.n_objects == 2, error, -1.0).argsort(descending=True)[:4]
    generated = view.tracks(view.generation().mean)
    figure = plots.plot_trajectories(
        data.positions[rows], inferred[rows], generated[rows], n_objects=data.n_objects[rows], size=data.size
    )
    save_figure(figure, path)


def draw_edlstm(view: RunView, net: EDLSTM, folder: Path, kind: str) -> None:
    """Draws Fig 11, and Fig 6 (bottom row): frames that an ED-LSTM generates for two objects and the largest number."""
    data = view.data
    two, three = ((data.n_objects == n).nonzero().squeeze(1)[:4] for n in (2, int(data.n_objects.max())))
    rows = torch.cat([two, three])
    drawn = net.generate(data.images[rows, :N_SEEN].to(view.device), data.images.shape[1]).cpu()
    for part, frames in (("last", slice(-1, None)), ("overlaid", slice(N_SEEN, None))):
        figure = plots.plot_generated_images(drawn[:, frames], data.images[rows, frames], rows=2)
        save_figure(figure, folder / f"fig11_{kind}_{part}.png")
