"""Figures that answer questions about sequences with a trained run, with uncertainties (docs/queries.md)."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_pixels._batch import unseen_frames
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.calibration import (
    LEVELS,
    Distances,
    corrected,
    coverage,
    fit_correction,
    mahalanobis_distances,
)
from pyro_pixels.lgssm.kalman import Gaussians
from pyro_pixels.plots import answers as plots
from pyro_pixels.queries.counterfactual import Change, scale_force, what_if
from pyro_pixels.queries.evidence import count_objects, log_evidence
from pyro_pixels.queries.latent_states import filter_states, moves, positions, retrodict, states
from pyro_pixels.queries.masks import seen_or_none
from pyro_pixels.queries.numbering import numbered_as
from pyro_pixels.queries.predict import Inference, States, infer, interpolate, smooth
from pyro_pixels.queries.streaming import forecast, start, start_images, step, step_image
from pyro_pixels.result_tables import markdown
from pyro_pixels.run_figures import RunView
from pyro_pixels.runs import Run

CALIBRATION = "How often the truth lies within regions of a stated probability"
FRAMES_BACK = 10  # before the first frame, in `draw_retrodict`


class Answer(NamedTuple):
    """The answer to a question."""

    figure: Figure
    title: str
    """The title of the figure."""
    text: str = ""
    """Text to print along with the figure."""
    numbers: dict[str, Any] = {}  # noqa: RUF012  # never changed
    """The numbers of the answer, for a file that accompanies the figure."""


class Scene(RunView):
    """A `RunView` with a selection of sequences to draw, and Gaussians in plotted coordinates.

    Attributes:
        rows: indices of the sequences to draw, ``per_n`` of each N, the largest N first.
        drawn: images, n_objects and inferred means of these sequences, the input of questions that plot tracks.
        drawn_inference: their inference; it numbers the objects.
        n_samples: the number of samples of q(a | v) to average over.
    """

    def __init__(
        self, run: Run, data: ImageSequences, device: torch.device, *, per_n: int = 2, n_samples: int = 20,
        first: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(run, data, device, first=first)
        self.model, self.guide, self.dynamics = run.model, run.guide, run.model.dynamics
        self.rows, self.n_samples = self.pick(per_n), n_samples
        rows = self.rows.to(device)
        self.drawn = (self.images[rows], self.n_objects[rows], self.inference.mean[rows])
        std, cov = self.inference.std[rows], self.inference.cov
        self.drawn_inference = Inference(self.drawn[2], std, None, None if cov is None else cov[rows])

    def regions(self, found: Gaussians, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns means and covariances of positions as `tracks` plots them, of all sequences or of ``rows``."""
        cov = found.cov.expand(*found.mean.shape, 2).cpu()
        if isinstance(self.to_pixels, metrics.Affine):
            cov = self.to_pixels.covariance(cov)
        mean, order = self.to_pixels(found.mean.cpu()), self.order
        if order is None:
            return mean, cov
        order = order if rows is None else order[rows]
        return metrics.reorder(mean, order), metrics.reorder(cov, order)

    def picture(self, found: Gaussians, known: Tensor, truth: Tensor | None = None) -> Figure:
        """Returns a plot of the regions of positions of the drawn sequences; ``truth`` is given for all sequences."""
        mean, cov = self.regions(found, self.rows)
        mean = mean.masked_fill(self.padding(mean.shape[2])[self.rows], torch.nan)
        known = known.expand(mean.shape[:-1]).cpu()
        known = known if self.order is None else metrics.reorder(known, self.order[self.rows])
        truth = self.data.positions if truth is None else truth
        rows, truth = self.rows, None if self.order is None else truth
        return plots.plot_regions(
            mean, cov, known=known, truth=None if truth is None else truth[rows],
            n_objects=self.data.n_objects[rows], size=self.size, titles=self.titles(rows),
        )  # fmt: skip

    def moves(self, h: States, rows: Tensor | None = None) -> Gaussians:
        """Returns the moves to the next frame as they are plotted; ``rows`` as in `regions`."""
        mean, cov = self.regions(moves(self.dynamics, h), rows)
        offset = self.to_pixels(torch.zeros_like(h.mean[..., :2]).cpu())  # of the map to pixels; moves have none
        return Gaussians(mean - offset, cov)

    def true_moves(self) -> Tensor | None:
        """Returns the true moves (B, N, T, 2) in pixels, NaN in the last frame; None if the true paths are unknown."""
        paths = self.data.paths
        if self.order is None or paths is None:
            return None
        return torch.cat([paths.diff(dim=2), torch.full_like(paths[:, :, :1], torch.nan)], 2)


def draw_filter(scene: Scene) -> Answer:
    """Draws vertical velocities of the first object, given the frames so far and given all frames."""
    images, _, a = scene.drawn
    given = (scene.dynamics, a, seen_or_none(images))
    found = {"so far": filter_states(*given), "in hindsight": smooth(*given)}
    moves = {name: scene.moves(h, scene.rows) for name, h in found.items()}
    padding = scene.padding(a.shape[2])[scene.rows, 0, :, 0]
    means = {name: x.mean[:, 0, :, 1].masked_fill(padding, torch.nan) for name, x in moves.items()}
    stds = {name: x.cov[:, 0, :, 1, 1].sqrt() for name, x in moves.items()}
    truth = scene.true_moves()
    titles = [f"{title}, object 1" for title in scene.titles(scene.rows)]
    figure = plots.plot_over_time(
        means, stds, truth=None if truth is None else truth[scene.rows, 0, :, 1], titles=titles,
        label="downward move a frame",
    )  # fmt: skip
    return Answer(figure, "Velocity from the frames so far, and from all frames")


def draw_hidden(scene: Scene) -> Answer:
    """Draws positions when the first object is hidden in the middle third of the frames."""
    (images, n_objects, means), rows = scene.drawn, scene.rows
    (N, T), lengths = means.shape[1:3], scene.lengths[rows, None]
    first = torch.zeros(len(rows), dtype=torch.long) if scene.order is None else scene.order[rows, 0]
    time, is_first = torch.arange(T), torch.arange(N) == first[:, None]  # in the guide's order
    middle = (time >= lengths // 3) & (time < 2 * lengths // 3)
    observed = ~(is_first[:, :, None] & middle[:, None]).to(scene.device)
    found = interpolate(scene.model, scene.guide, images, n_objects, observed, inferred=scene.drawn_inference)
    figure = scene.picture(Gaussians(found.mean, found.cov), found.observed)
    where = (
        f"frames {T // 3 + 1} to {2 * T // 3}" if bool((lengths == T).all()) else "the middle third of each sequence"
    )
    hidden = f"object 1 is hidden in {where}"
    return Answer(figure, f"Positions where {hidden}", hidden)


def draw_retrodict(scene: Scene) -> Answer:
    """Draws paths, including frames before the first."""
    n = FRAMES_BACK
    after = states(scene.model, scene.guide, *scene.drawn[:2], n_samples=scene.n_samples)
    before = retrodict(scene.dynamics, after, n)
    each = [positions(scene.dynamics, h, noise=False) for h in (before, after)]
    found = Gaussians(*(torch.cat(x, 2) for x in zip(*each)))
    paths = scene.data.paths
    truth = scene.data.positions if paths is None else paths
    if truth is not None:
        for _ in range(n):  # a parabola has third differences 0; noisy positions or two points do not determine it
            before = 3 * truth[:, :, :1] - 3 * truth[:, :, 1:2] + truth[:, :, 2:3]
            unknown = paths is None or not before.shape[2]
            truth = torch.cat([torch.full_like(truth[:, :, :1], torch.nan) if unknown else before, truth], 2)
    seen = scene.data.seen[scene.rows]
    known = torch.cat([torch.zeros(len(seen), n, dtype=torch.bool), seen], 1)
    figure = scene.picture(found, known[:, None], truth)
    text = f"frames {1 - n} to 0, before the first; paths are drawn without noise"
    text += "" if paths is None or scene.order is None else ", the true ones as parabolas"
    return Answer(figure, f"Paths from {n} frames before the first one on", text)


def draw_what_if(scene: Scene) -> Answer:
    """Draws one sequence after changes in some frame: half the gravity, none, a push upwards, or one object fewer."""
    row = scene.rows[:1]
    T, N = int(scene.lengths[row]), int(scene.drawn[1][0])
    images, n_objects = scene.drawn[0][:1, :T], scene.drawn[1][:1]
    inferred = infer(scene.guide, images, n_objects, n_samples=scene.n_samples, model=scene.model)
    inferred = numbered_as(scene.drawn_inference.of_part(slice(0, 1), 1, N), inferred, n_objects)
    push = torch.tensor([0.0, 0.0, 0.0, -0.1])  # upwards
    changes = {
        "half the gravity": Change(dynamics=lambda lgssm: scale_force(lgssm, 0.5)),
        "no gravity": Change(dynamics=lambda lgssm: scale_force(lgssm, 0.0)),
        "a push upwards": Change(shift=push.to(scene.device)),
        "one object fewer": Change(removed=torch.arange(int(n_objects.max()), device=scene.device) == 0),
    }
    frame = max(1, 2 * T // 5)
    known = scene.data.seen[row, :T] & (torch.arange(T) < frame)
    means, covs = [], []
    for change in scene.progress(changes.values(), "changes"):
        found = what_if(
            scene.model, scene.guide, images, n_objects, change, frame=frame, n_frames=T, inferred=inferred,
        )  # fmt: skip
        mean, cov = scene.regions(Gaussians(found.mean, found.cov), row)
        means.append(mean)
        covs.append(cov)
    mean, truth, n = torch.cat(means), None if scene.order is None else scene.data.positions, len(changes)
    figure = plots.plot_regions(
        mean, torch.cat(covs), known=known.expand(mean.shape[:-1]),
        truth=None if truth is None else truth[row, :, :T].repeat(n, 1, 1, 1),
        n_objects=scene.data.n_objects[row].repeat(n), size=scene.size, columns=2,
        titles=[f"{name} from frame {frame + 1} on" for name in changes],
    )  # fmt: skip
    title = scene.titles(row)[0]
    return Answer(figure, f"What if, in {title}?" if truth is None else f"What if? In black {title}, as it was")


def draw_evidence(scene: Scene) -> Answer:
    """Draws log p(v) by importance sampling and the ELBO of Eq (7) for comparison."""
    args, n_frames = (scene.model, scene.guide, scene.images, scene.n_objects), scene.data.seen.sum(1)
    times = scene.progress(range(5), "bound")
    one = torch.stack([log_evidence(*args, n_samples=1).log_evidence for _ in times]).mean(0)
    found = log_evidence(*args, n_samples=scene.n_samples)
    text = (
        f"bound of Eq (7) {float((one.cpu() / n_frames).mean()):.2f}, with {scene.n_samples} samples "
        f"{float((found.log_evidence.cpu() / n_frames).mean()):.2f} nats per frame; "
        f"effective samples {float(found.effective_samples.mean()):.1f}"
    )
    figure = plots.plot_evidence(one, found.log_evidence, found.effective_samples, scene.data.n_objects, n_frames)
    return Answer(figure, f"log p(v) from {scene.n_samples} weighted samples, and its bound", text)


def draw_count(scene: Scene) -> Answer:
    """Draws the inferred number of objects; the numbers have the likeliest N and p(N | v) of each sequence."""
    most = int(scene.n_objects.max())
    found = count_objects(
        scene.model, scene.guide, scene.images, most,
        n_samples=max(1, scene.n_samples // 2), progress=scene.shows_progress,
    )  # fmt: skip
    right = (found.n_objects == scene.n_objects).cpu()
    by_n = {n: right[scene.data.n_objects == n] for n in sorted(set(scene.data.n_objects.tolist()))}
    each = zip(scene.data.n_objects.tolist(), found.n_objects.tolist(), found.probs.tolist())
    numbers = {
        "right": {str(n): {"right": int(x.sum()), "of": len(x)} for n, x in by_n.items()},
        "sequences": [
            {"sequence": scene.first + b, "n_objects": n, "likeliest": counted, "probs": [round(p, 6) for p in probs]}
            for b, (n, counted, probs) in enumerate(each)
        ],
    }
    figure = plots.plot_counts(scene.data.n_objects, found.n_objects.cpu(), found.log_evidence.cpu())
    text = f"right in {int(right.sum())} of {len(right)} sequences"
    if scene.data.positions is None:  # nor is the true N known
        text = f"as in the file in {int(right.sum())} of {len(right)} sequences"
    counts = ", ".join(f"{n} in {k}" for n, k in sorted(Counter(found.n_objects.tolist()).items()))
    return Answer(figure, f"The number of objects, {text}", f"likeliest N: {counts}; {text}", numbers)


def draw_stream(scene: Scene) -> Answer:
    """Draws each position as forecast from the frames before it."""
    lgssm, ahead, text = scene.dynamics.lgssm(), [], ""
    images, n_objects, means = scene.drawn
    try:
        stream = start_images(scene.model, scene.guide, n_objects)
    except ValueError as error:
        text = f"positions, not images, are streamed: {error}\n"
        tracks = start(scene.dynamics, means.shape[:2])
        seen = (~unseen_frames(images)).unsqueeze(1).expand(means.shape[:3])
        for a_t, seen_t in zip(means.unbind(2), seen.unbind(2)):
            ahead.append(forecast(lgssm, tracks))
            tracks = step(lgssm, tracks, a_t, seen_t)
    else:
        for image in scene.progress(images.unbind(1), "frames"):
            ahead.append(forecast(lgssm, stream.tracks))
            stream = step_image(scene.model, scene.guide, stream, image)
    mean, cov = torch.stack([x.mean for x in ahead], 2), torch.stack([x.cov for x in ahead], 2)
    mean[:, :, :2] = torch.nan
    figure = scene.picture(Gaussians(mean, cov), torch.zeros(mean.shape[:-1], dtype=torch.bool))
    text += "each position is forecast from the frames before it; drawn from frame 3 on"
    return Answer(figure, "Each position, forecast from the frames before it", text)


def draw_calibration(scene: Scene, validation: ImageSequences | None = None) -> Answer:
    """Draws how often the truth lies within regions of a stated probability.

    Args:
        validation: further sequences to fit a correction of the uncertainties on; its effect is then shown as well.
    """
    n_samples = 0 if scene.run.config.guide == "structured" or validation is None else scene.n_samples
    found = mahalanobis_distances(scene.model, scene.guide, scene.data, n_samples=n_samples)
    if validation is None:
        shares = {kind: coverage(x, (0.5,)).shares.tolist() for kind, x in found.items()}
        text = "\n".join(f"{kind}: the 50 % regions hold {_percent(share)} %" for kind, share in shares.items())
        return Answer(plots.plot_reliability(_curves(found)), CALIBRATION, text)
    factors = fit_correction(scene.model, scene.guide, validation, n_samples=n_samples, progress=scene.shows_progress)
    text = f"factors: {factors.position_noise:.2f} on Sigma_A, {factors.measurement_noise:.2f} on R\n"
    mended = mahalanobis_distances(*corrected(scene.model, scene.guide, factors), scene.data, n_samples=n_samples)
    found |= {f"{kind}, corrected": x for kind, x in mended.items()}
    rows, numbers = [], {}
    for kind, x in found.items():
        for n in (None, *sorted(set(scene.data.n_objects.tolist()))):
            among = torch.ones_like(x.held) if n is None else scene.data.n_objects == n
            cells = [coverage(x, LEVELS, part).shares.tolist() for part in (among, among & x.held)]
            name = "all" if n is None else str(n)
            rows.append([kind, name, *(_percent(cell) for cell in cells)])
            about = {"every": cells[0], "held": cells[1], "positions": coverage(x, LEVELS, among).n_positions}
            numbers.setdefault(kind, {})[name] = about
    levels = " / ".join(f"{100 * level:.0f}" for level in LEVELS)
    text += markdown(["prediction", "N", f"coverage of {levels} %", "identities held"], rows)
    numbers = {"factors": factors._asdict(), "levels": LEVELS, "coverage": numbers}
    return Answer(plots.plot_reliability(_curves(found)), CALIBRATION, text, numbers)


def _percent(shares: list[float]) -> str:
    """Returns a text such as "50 / 90 / 95", or "-" for the NaN of no positions."""
    return "-" if any(share != share for share in shares) else " / ".join(f"{100 * share:.0f}" for share in shares)


def _curves(found: dict[str, Distances]) -> dict[str, tuple[Tensor, Tensor]]:
    levels = torch.linspace(0.05, 0.99, 48).tolist()
    curves = {kind: coverage(x, levels) for kind, x in found.items()}
    return {kind: (curve.levels, curve.shares) for kind, curve in curves.items()}


QUESTIONS: dict[str, Callable[[Scene], Answer]] = {
    "filter": draw_filter,
    "hidden": draw_hidden,
    "retrodict": draw_retrodict,
    "what-if": draw_what_if,
    "evidence": draw_evidence,
    "count": draw_count,
    "stream": draw_stream,
    "calibration": draw_calibration,
}
"""The functions that draw the answers, by the names of the questions in examples/ask.py and examples/gallery.py."""
