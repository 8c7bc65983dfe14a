"""Asks a trained run one of many questions, and draws the answer with its uncertainty (docs/queries.md).

filter: velocities, known so far and in hindsight. hidden: one object is not seen for a while. retrodict: where did
they come from? what-if: without gravity, with half of it, pushed. evidence: how likely are the images? count: how many
objects are there? stream: frame by frame. calibration: are the stated uncertainties true?
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from common import QueryArguments, Shown, ask, markdown, new_folder, sequences_for, start
from common import save as save_figure
from pyro_pixels import metrics, query_plots
from pyro_pixels.calibration import LEVELS, corrected, coverage, distances, fit_correction
from pyro_pixels.evidence import count_objects, log_evidence
from pyro_pixels.lgssm import Gaussians
from pyro_pixels.queries import interpolate, smooth
from pyro_pixels.states import filter_states, positions, retrodict, states
from pyro_pixels.streaming import forecast, start_images, step, step_image
from pyro_pixels.streaming import start as start_stream
from pyro_pixels.what_if import Change, scale_force, what_if

Question = Literal["filter", "hidden", "retrodict", "what-if", "evidence", "count", "stream", "calibration"]


@dataclass
class Arguments(QueryArguments):
    question: Question = "hidden"
    """What to ask."""
    n_samples: int = 20
    """Samples of q(a | v) to average over."""
    n_validation: int = 60
    """Further sequences that a correction of the uncertainties is fitted on (calibration)."""


class Scene(Shown):
    """The sequences that are drawn, two of each N, and Gaussians as they are plotted."""

    def __init__(self, args: Arguments) -> None:
        run, data, device = ask(args)
        super().__init__(run, data, device)
        self.args, self.model, self.guide, self.dynamics = args, run.model, run.guide, run.model.dynamics
        self.rows = self.pick(2)

    def regions(self, found: Gaussians) -> tuple[Tensor, Tensor]:
        """Means and covariances of positions, in pixels if the truth is known."""
        cov = found.cov.expand(*found.mean.shape, 2).cpu()
        if isinstance(self.to_pixels, metrics.Affine):
            cov = self.to_pixels.covariance(cov)
        return self.tracks(found.mean), cov if self.order is None else metrics.reorder(cov, self.order)

    def draw(self, found: Gaussians, known: Tensor, truth: Tensor | None = None) -> None:
        """One picture, named after the question."""
        mean, cov = self.regions(found)
        known = known.expand(mean.shape[:-1]).cpu()
        known = known if self.order is None else metrics.reorder(known, self.order)
        truth = self.data.positions if truth is None else truth
        rows = self.rows
        figure = query_plots.plot_regions(
            mean[rows], cov[rows], known=known[rows], truth=None if truth is None or self.size is None else truth[rows],
            n_objects=self.data.n_objects[rows], size=self.size,
        )  # fmt: skip
        self.save(figure)

    def save(self, figure: object) -> None:
        out = new_folder(self.args.out or self.args.home / "ask")
        save_figure(figure, out / f"{self.args.question}.png")


def ask_filter(scene: Scene) -> None:
    a = scene.inference.mean
    lgssm = scene.dynamics.lgssm()
    found = {"so far": filter_states(scene.dynamics, a), "in hindsight": smooth(scene.dynamics, a)}
    step_matrix = lgssm.B @ lgssm.A - lgssm.B  # the expected move to the next frame is step_matrix h + B u
    means, stds = {}, {}
    for name, h in found.items():
        moves = Gaussians(h.mean @ step_matrix.mT + lgssm.B @ lgssm.u, step_matrix @ h.cov @ step_matrix.mT)
        mean, cov = scene.regions(moves)
        origin = scene.tracks(torch.zeros_like(a))  # the map's offset is none of a move's
        means[name], stds[name] = ((x[scene.rows, 0, :, 1]) for x in (mean - origin, cov.diagonal(0, -2, -1).sqrt()))
    truth = None
    if scene.size and scene.data.paths is not None:
        paths = scene.data.paths[scene.rows, 0, :, 1]
        truth = torch.cat([paths.diff(dim=-1), torch.full_like(paths[:, :1], torch.nan)], -1)
    titles = [f"N = {n}, object 1" for n in scene.data.n_objects[scene.rows].tolist()]
    scene.save(query_plots.plot_over_time(means, stds, truth=truth, titles=titles, label="downward move a frame"))


def ask_hidden(scene: Scene) -> None:
    B, N, T = scene.inference.mean.shape[:3]
    observed = torch.ones(B, N, T, dtype=torch.bool, device=scene.device)
    observed[:, 0, T // 3 : 2 * T // 3] = False
    found = interpolate(scene.model, scene.guide, scene.images, scene.n_objects, observed)
    print(f"object 1 is hidden in frames {T // 3 + 1} to {2 * T // 3}")
    scene.draw(Gaussians(found.mean, found.cov), observed)


def ask_retrodict(scene: Scene) -> None:
    n = 10
    after = states(scene.model, scene.guide, scene.images, scene.n_objects, n_samples=scene.args.n_samples)
    before = retrodict(scene.dynamics, after, n)
    each = [positions(scene.dynamics, h, noise=False) for h in (before, after)]
    found = Gaussians(*(torch.cat(x, 2) for x in zip(*each)))
    truth = scene.data.paths
    for _ in range(n if truth is not None else 0):  # a parabola has no third differences
        truth = torch.cat([3 * truth[:, :, :1] - 3 * truth[:, :, 1:2] + truth[:, :, 2:3], truth], 2)
    print(f"frames {1 - n} to 0, before the first; drawn is the path, the truth a parabola")
    scene.draw(found, torch.arange(found.mean.shape[2]) >= n, truth)


def ask_what_if(scene: Scene) -> None:
    push = torch.tensor([0.0, 0.0, 0.0, -0.15])  # upwards
    changes = {
        "no gravity": Change(dynamics=lambda lgssm: scale_force(lgssm, 0.0)),
        "half the gravity": Change(dynamics=lambda lgssm: scale_force(lgssm, 0.5)),
        "pushed": Change(shift=push),
    }
    rows, T = scene.pick(1), scene.images.shape[1]
    frame = 2 * T // 5
    means, covs, titles = [], [], []
    for name, change in changes.items():
        found = what_if(
            scene.model, scene.guide, scene.images, scene.n_objects, change,
            frame=frame, n_frames=T, n_samples=scene.args.n_samples,
        )  # fmt: skip
        mean, cov = scene.regions(Gaussians(found.mean, found.cov))
        means.append(mean[rows])
        covs.append(cov[rows])
        titles += [f"{name} from frame {frame} on"] * len(rows)
    mean, truth = torch.cat(means), scene.data.positions
    figure = query_plots.plot_regions(
        mean, torch.cat(covs), known=(torch.arange(T) < frame).expand(mean.shape[:-1]),
        truth=None if truth is None or scene.size is None else truth[rows].repeat(len(changes), 1, 1, 1),
        n_objects=scene.data.n_objects[rows].repeat(len(changes)), size=scene.size, titles=titles, columns=len(rows),
    )  # fmt: skip
    scene.save(figure)


def ask_evidence(scene: Scene) -> None:
    args, T = (scene.model, scene.guide, scene.images, scene.n_objects), scene.images.shape[1]
    one = torch.stack([log_evidence(*args, n_samples=1).log_evidence for _ in range(5)]).mean(0)
    found = log_evidence(*args, n_samples=scene.args.n_samples)
    print(f"bound of Eq (7) {float(one.mean()) / T:.2f}, with {scene.args.n_samples} samples "
          f"{float(found.log_evidence.mean()) / T:.2f} nats per frame; "
          f"effective samples {float(found.effective_samples.mean()):.1f}")  # fmt: skip
    scene.save(query_plots.plot_evidence(one, found.log_evidence, found.effective_samples, scene.data.n_objects, T))


def ask_count(scene: Scene) -> None:
    most = int(scene.n_objects.max())
    found = count_objects(scene.model, scene.guide, scene.images, most, n_samples=max(1, scene.args.n_samples // 2))
    right = found.n_objects == scene.n_objects
    print(f"right in {int(right.sum())} of {len(right)} sequences")
    scene.save(query_plots.plot_counts(scene.data.n_objects, found.n_objects.cpu(), found.log_evidence.cpu()))


def ask_stream(scene: Scene) -> None:
    lgssm, ahead = scene.dynamics.lgssm(), []
    try:
        stream = start_images(scene.model, scene.guide, scene.n_objects)
    except ValueError as error:
        print(f"positions are streamed, not images: {error}")
        tracks = start_stream(scene.dynamics, scene.inference.mean.shape[:2])
        for a_t in scene.inference.mean.unbind(2):
            ahead.append(forecast(lgssm, tracks))
            tracks = step(lgssm, tracks, a_t)
    else:
        for image in scene.images.unbind(1):
            ahead.append(forecast(lgssm, stream.tracks))
            stream = step_image(scene.model, scene.guide, stream, image)
    found = Gaussians(torch.stack([x.mean for x in ahead], 2), torch.stack([x.cov for x in ahead], 2))
    print("each position is forecast from the frames before it; drawn from frame 3 on")
    mean = found.mean.clone()
    mean[:, :, :2] = torch.nan
    scene.draw(Gaussians(mean, found.cov), torch.zeros(mean.shape[:-1], dtype=torch.bool))


def ask_calibration(scene: Scene) -> None:
    n_samples = 0 if scene.run.config.guide == "structured" else scene.args.n_samples
    raw = distances(scene.model, scene.guide, scene.data, n_samples=n_samples)
    validation = sequences_for(scene.run, None, scene.args.n_validation, scene.args.seed + 1)
    factors = fit_correction(scene.model, scene.guide, validation, n_samples=n_samples)
    print(f"factors: {factors.position_noise:.2f} on Sigma_A, {factors.measurement_noise:.2f} on R")
    grid, curves, rows = torch.linspace(0.05, 0.99, 48).tolist(), {}, []
    mended = distances(*corrected(scene.model, scene.guide, factors), scene.data, n_samples=n_samples)
    for state, each in {"": raw, ", corrected": mended}.items():
        for kind, found in each.items():
            curves[kind + state] = tuple(coverage(found, grid)[:2])
            for n in (None, *sorted(set(scene.data.n_objects.tolist()))):
                among = torch.ones_like(found.held) if n is None else scene.data.n_objects == n
                cells = [coverage(found, LEVELS, part).shares.tolist() for part in (among, among & found.held)]
                shares = [" / ".join(f"{100 * share:.0f}" for share in cell) for cell in cells]
                rows.append([kind + state, "all" if n is None else str(n), *shares])
    levels = " / ".join(f"{100 * level:.0f}" for level in LEVELS)
    print(markdown(["prediction", "N", f"coverage of {levels} %", "identities held"], rows))
    scene.save(query_plots.plot_reliability(curves))


ASK: dict[str, Callable[[Scene], None]] = {
    "filter": ask_filter,
    "hidden": ask_hidden,
    "retrodict": ask_retrodict,
    "what-if": ask_what_if,
    "evidence": ask_evidence,
    "count": ask_count,
    "stream": ask_stream,
    "calibration": ask_calibration,
}
assert set(ASK) == set(get_args(Question))


@torch.no_grad()
def main(args: Arguments) -> None:
    ASK[args.question](Scene(args))


if __name__ == "__main__":
    start(main, Arguments, __doc__)
