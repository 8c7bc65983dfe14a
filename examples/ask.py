"""Asks a trained run one of many questions, and draws the answer with its uncertainty (docs/queries.md).

filter: velocities, known so far and in hindsight. hidden: one object is not seen for a while. retrodict: where did
they come from? what-if: without gravity, with half of it, pushed. evidence: how likely are the images? count: how many
objects are there? stream: frame by frame. calibration: are the stated uncertainties true?
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from matplotlib.figure import Figure
from torch import Tensor

from common import (
    QueryArguments,
    Shown,
    ask,
    environment,
    markdown,
    new_folder,
    save,
    sequences_for,
    start,
    write_json,
)
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.calibration import LEVELS, corrected, coverage, fit_correction, mahalanobis_distances
from pyro_pixels.lgssm.kalman import Gaussians
from pyro_pixels.plots import answers as query_plots
from pyro_pixels.queries.counterfactual import Change, scale_force, what_if
from pyro_pixels.queries.evidence import count_objects, log_evidence
from pyro_pixels.queries.latent_states import filter_states, positions, retrodict, states
from pyro_pixels.queries.predict import States, interpolate, smooth
from pyro_pixels.queries.streaming import forecast, start_images, step, step_image
from pyro_pixels.queries.streaming import start as start_stream

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
    """The sequences that are drawn, so many of each N, and Gaussians as they are plotted."""

    def __init__(self, args: Arguments, per_n: int = 2) -> None:
        run, data, device = ask(args)
        super().__init__(run, data, device)
        self.args, self.model, self.guide, self.dynamics = args, run.model, run.guide, run.model.dynamics
        self.rows = self.pick(per_n)
        self.numbers: dict[str, Any] = {}
        """What an answer says in numbers, for a file beside the picture."""

    def regions(self, found: Gaussians) -> tuple[Tensor, Tensor]:
        """Means and covariances of positions, in pixels if the truth is known."""
        cov = found.cov.expand(*found.mean.shape, 2).cpu()
        if isinstance(self.to_pixels, metrics.Affine):
            cov = self.to_pixels.covariance(cov)
        return self.tracks(found.mean), cov if self.order is None else metrics.reorder(cov, self.order)

    def picture(self, found: Gaussians, known: Tensor, truth: Tensor | None = None) -> Figure:
        """The regions of positions of the sequences that are drawn."""
        mean, cov = self.regions(found)
        known = known.expand(mean.shape[:-1]).cpu()
        known = known if self.order is None else metrics.reorder(known, self.order)
        truth = self.data.positions if truth is None else truth
        rows = self.rows
        return query_plots.plot_regions(
            mean[rows], cov[rows], known=known[rows], truth=None if truth is None or self.size is None else truth[rows],
            n_objects=self.data.n_objects[rows], size=self.size,
        )  # fmt: skip

    def moves(self, h: States) -> Gaussians:
        """The expected move to the next frame, B (A - I) h + B u, as it is plotted."""
        A, B, u = self.dynamics.lgssm()[:3]
        step_matrix = B @ A - B
        mean, cov = self.regions(Gaussians(h.mean @ step_matrix.mT + B @ u, step_matrix @ h.cov @ step_matrix.mT))
        return Gaussians(mean - self.tracks(torch.zeros_like(h.mean[..., :2])), cov)  # the map's offset is no move's

    def true_moves(self) -> Tensor | None:
        """(B, N, T, 2) in pixels, NaN in the last frame; None where the true paths are not known."""
        paths = self.data.paths
        if self.size is None or paths is None:
            return None
        return torch.cat([paths.diff(dim=2), torch.full_like(paths[:, :, :1], torch.nan)], 2)


def ask_filter(scene: Scene) -> Figure:
    a = scene.inference.mean
    found = {"so far": filter_states(scene.dynamics, a), "in hindsight": smooth(scene.dynamics, a)}
    moves = {name: scene.moves(h) for name, h in found.items()}
    means = {name: x.mean[scene.rows, 0, :, 1] for name, x in moves.items()}
    stds = {name: x.cov[scene.rows, 0, :, 1, 1].sqrt() for name, x in moves.items()}
    truth = scene.true_moves()
    titles = [f"N = {n}, object 1" for n in scene.data.n_objects[scene.rows].tolist()]
    return query_plots.plot_over_time(
        means, stds, truth=None if truth is None else truth[scene.rows, 0, :, 1], titles=titles,
        label="downward move a frame",
    )  # fmt: skip


def ask_hidden(scene: Scene) -> Figure:
    B, N, T = scene.inference.mean.shape[:3]
    observed = torch.ones(B, N, T, dtype=torch.bool, device=scene.device)
    observed[:, 0, T // 3 : 2 * T // 3] = False
    found = interpolate(scene.model, scene.guide, scene.images, scene.n_objects, observed)
    print(f"object 1 is hidden in frames {T // 3 + 1} to {2 * T // 3}")
    return scene.picture(Gaussians(found.mean, found.cov), observed)


def ask_retrodict(scene: Scene) -> Figure:
    n = 10
    after = states(scene.model, scene.guide, scene.images, scene.n_objects, n_samples=scene.args.n_samples)
    before = retrodict(scene.dynamics, after, n)
    each = [positions(scene.dynamics, h, noise=False) for h in (before, after)]
    found = Gaussians(*(torch.cat(x, 2) for x in zip(*each)))
    truth = scene.data.paths
    for _ in range(n if truth is not None else 0):  # a parabola has no third differences
        truth = torch.cat([3 * truth[:, :, :1] - 3 * truth[:, :, 1:2] + truth[:, :, 2:3], truth], 2)
    print(f"frames {1 - n} to 0, before the first; drawn is the path, the truth a parabola")
    return scene.picture(found, torch.arange(found.mean.shape[2]) >= n, truth)


def ask_what_if(scene: Scene) -> Figure:
    push = torch.tensor([0.0, 0.0, 0.0, -0.1])  # upwards
    changes = {
        "half the gravity": Change(dynamics=lambda lgssm: scale_force(lgssm, 0.5)),
        "no gravity": Change(dynamics=lambda lgssm: scale_force(lgssm, 0.0)),
        "a push upwards": Change(shift=push.to(scene.device)),
        "one object fewer": Change(removed=torch.arange(scene.inference.mean.shape[1], device=scene.device) == 0),
    }
    row, T = scene.rows[:1], scene.images.shape[1]
    frame = 2 * T // 5
    means, covs = [], []
    for change in changes.values():
        found = what_if(
            scene.model, scene.guide, scene.images, scene.n_objects, change,
            frame=frame, n_frames=T, n_samples=scene.args.n_samples,
        )  # fmt: skip
        mean, cov = scene.regions(Gaussians(found.mean, found.cov))
        means.append(mean[row])
        covs.append(cov[row])
    mean, truth, n = torch.cat(means), scene.data.positions, len(changes)
    return query_plots.plot_regions(
        mean, torch.cat(covs), known=(torch.arange(T) < frame).expand(mean.shape[:-1]),
        truth=None if truth is None or scene.size is None else truth[row].repeat(n, 1, 1, 1),
        n_objects=scene.data.n_objects[row].repeat(n), size=scene.size, columns=2,
        titles=[f"{name} from frame {frame + 1} on" for name in changes],
    )  # fmt: skip


def ask_evidence(scene: Scene) -> Figure:
    args, T = (scene.model, scene.guide, scene.images, scene.n_objects), scene.images.shape[1]
    one = torch.stack([log_evidence(*args, n_samples=1).log_evidence for _ in range(5)]).mean(0)
    found = log_evidence(*args, n_samples=scene.args.n_samples)
    print(f"bound of Eq (7) {float(one.mean()) / T:.2f}, with {scene.args.n_samples} samples "
          f"{float(found.log_evidence.mean()) / T:.2f} nats per frame; "
          f"effective samples {float(found.effective_samples.mean()):.1f}")  # fmt: skip
    return query_plots.plot_evidence(one, found.log_evidence, found.effective_samples, scene.data.n_objects, T)


def ask_count(scene: Scene) -> Figure:
    most = int(scene.n_objects.max())
    found = count_objects(scene.model, scene.guide, scene.images, most, n_samples=max(1, scene.args.n_samples // 2))
    right = (found.n_objects == scene.n_objects).cpu()
    print(f"right in {int(right.sum())} of {len(right)} sequences")
    by_n = {n: right[scene.data.n_objects == n] for n in sorted(set(scene.data.n_objects.tolist()))}
    scene.numbers["right"] = {str(n): {"right": int(x.sum()), "of": len(x)} for n, x in by_n.items()}
    return query_plots.plot_counts(scene.data.n_objects, found.n_objects.cpu(), found.log_evidence.cpu())


def ask_stream(scene: Scene) -> Figure:
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
    return scene.picture(Gaussians(mean, found.cov), torch.zeros(mean.shape[:-1], dtype=torch.bool))


def ask_calibration(scene: Scene) -> Figure:
    n_samples = 0 if scene.run.config.guide == "structured" else scene.args.n_samples
    raw = mahalanobis_distances(scene.model, scene.guide, scene.data, n_samples=n_samples)
    validation = sequences_for(scene.run, None, scene.args.n_validation, scene.args.seed + 1)
    factors = fit_correction(scene.model, scene.guide, validation, n_samples=n_samples)
    print(f"factors: {factors.position_noise:.2f} on Sigma_A, {factors.measurement_noise:.2f} on R")
    scene.numbers |= {"factors": factors._asdict(), "levels": LEVELS, "coverage": {}}
    grid, curves, rows = torch.linspace(0.05, 0.99, 48).tolist(), {}, []
    mended = mahalanobis_distances(*corrected(scene.model, scene.guide, factors), scene.data, n_samples=n_samples)
    for state, each in {"": raw, ", corrected": mended}.items():
        for kind, found in each.items():
            curves[kind + state] = tuple(coverage(found, grid)[:2])
            for n in (None, *sorted(set(scene.data.n_objects.tolist()))):
                among = torch.ones_like(found.held) if n is None else scene.data.n_objects == n
                cells = [coverage(found, LEVELS, part).shares.tolist() for part in (among, among & found.held)]
                shares = [" / ".join(f"{100 * share:.0f}" for share in cell) for cell in cells]
                name = "all" if n is None else str(n)
                rows.append([kind + state, name, *shares])
                about = {"every": cells[0], "held": cells[1], "positions": coverage(found, LEVELS, among).n_positions}
                scene.numbers["coverage"].setdefault(kind + state, {})[name] = about
    levels = " / ".join(f"{100 * level:.0f}" for level in LEVELS)
    print(markdown(["prediction", "N", f"coverage of {levels} %", "identities held"], rows))
    return query_plots.plot_reliability(curves)


ASK: dict[Question, Callable[[Scene], Figure]] = {
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
    out, scene = new_folder(args.out or args.home / "ask"), Scene(args)
    save(ASK[args.question](scene), out / f"{args.question}.png")
    if scene.numbers:
        about = {"seed": args.seed, "n_sequences": len(scene.data), "environment": environment(scene.device)}
        write_json(out / f"{args.question}.json", {**scene.numbers, **about})
        print(f"  {out / args.question}.json")


if __name__ == "__main__":
    start(main, Arguments, __doc__)
