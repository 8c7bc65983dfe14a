"""Counterfactual queries: what if, in some frame, objects are moved or removed, or the dynamics change.

`what_if` takes p(h_t, z | v) of one frame, applies a `Change`, and rolls the changed world forward, with means and
covariances in closed form and samples from jointly drawn states. Changes of the dynamics are functions of an `LGSSM`,
which can be composed::

    Change(dynamics=lambda lgssm: scale_period(scale_force(lgssm, 0.5), 2.0))

`scale_force`, `scale_period` and `canonical` are for motion at constant velocity apart from a constant force, the
A = [I, delta I; 0, I] of Eq (3). Other dynamics, such as damped ones, are refused: what their force and period are
depends on what A stands for.

Shapes are those of `pyro_pixels.queries.predict`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_pixels._batch import object_mask
from pyro_pixels._checks import check_number
from pyro_pixels._convert import checked_batch
from pyro_pixels.guides.base import Guide
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.kalman import LGSSM, Gaussians
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.latent_states import posterior_states
from pyro_pixels.queries.masks import seen_or_none
from pyro_pixels.queries.parts import in_parts
from pyro_pixels.queries.predict import Inference, Prediction, infer, render


def unchanged(lgssm: LGSSM) -> LGSSM:
    """Returns the learned dynamics unchanged."""
    return lgssm


def scale_force(lgssm: LGSSM, factor: float) -> LGSSM:
    """Returns the dynamics with the acceleration times a factor: 0 for no gravity, -1 for gravity upwards.

    The acceleration consists of the velocity part of u, u_v, and the position part of a constant force, delta u_v / 2.
    The rest of the learned position part is a constant drift, which images cannot distinguish from a velocity
    (`canonical`); it is kept. So objects that move at constant velocity are not affected.

    Raises:
        ValueError: unless A = [I, D; 0, I] and B = [I, 0].
    """
    _, drift = _acceleration(lgssm)
    velocity = factor * lgssm.u[2:]
    return lgssm._replace(u=torch.cat([drift + _half(lgssm, velocity), velocity]))


def canonical(lgssm: LGSSM) -> LGSSM:
    """Returns the same distribution of tracks with u = (delta u_v / 2, u_v): any drift is moved into the velocities.

    A drift d in the position part with all velocities smaller by d / delta yields the same tracks. Here the drift is 0,
    so that velocities are those observed in the middle of a step.

    Raises:
        ValueError: unless A = [I, D; 0, I] and B = [I, 0].
    """
    _, drift = _acceleration(lgssm)
    shift = torch.cat([torch.zeros_like(drift), torch.linalg.solve(lgssm.A[:2, 2:], drift)])
    return lgssm._replace(u=torch.cat([_half(lgssm, lgssm.u[2:]), lgssm.u[2:]]), mu=lgssm.mu + shift)


def _half(lgssm: LGSSM, velocity: Tensor) -> Tensor:
    """Returns delta u_v / 2, how far a constant force moves an object in a step that changes its velocity by u_v."""
    return lgssm.A[:2, 2:] @ velocity / 2


def _acceleration(lgssm: LGSSM) -> tuple[Tensor, Tensor]:
    """Returns the position part of u, split into that of the force and the remaining drift.

    Raises:
        ValueError: unless velocities only change by u, and are what moves positions.
    """
    I = torch.eye(4, dtype=lgssm.A.dtype, device=lgssm.A.device)
    A, B = lgssm.A, lgssm.B
    if A.shape != I.shape or not (torch.allclose(A[:, :2], I[:, :2]) and torch.allclose(A[2:], I[2:])):
        raise ValueError(
            f"the transition A is {[[round(x, 4) for x in row] for row in A.tolist()]}; wanted motion at constant "
            "velocity, A = [I, D; 0, I]: write a function of your own from one LGSSM to another"
        )
    if not torch.equal(B, I[:2]):
        raise ValueError(f"the observed part B is {B.tolist()}; wanted B = [I, 0], the positions")
    force = _half(lgssm, lgssm.u[2:])
    return force, lgssm.u[:2] - force


def scale_period(lgssm: LGSSM, factor: float) -> LGSSM:
    """Returns the dynamics with the sampling period delta times a factor: slow motion below 1, time lapse above 1.

    The velocity part of u, the drift and Sigma_H are scaled by the factor. The position part of the force, which is of
    second order in delta, is scaled by its square.

    Raises:
        ValueError: unless A = [I, D; 0, I] and B = [I, 0].
    """
    force, drift = _acceleration(lgssm)
    identity = torch.eye(lgssm.A.shape[-1], dtype=lgssm.A.dtype, device=lgssm.A.device)
    u = torch.cat([factor**2 * force + factor * drift, factor * lgssm.u[2:]])
    return lgssm._replace(A=identity + factor * (lgssm.A - identity), u=u, Sigma_H=factor * lgssm.Sigma_H)


@dataclass(frozen=True)
class Change:
    """A change that takes effect after some frame; by default none."""

    dynamics: Callable[[LGSSM], LGSSM] = unchanged
    """A function from the learned dynamics to those after the change; mu and Sigma of the result are not used."""
    shift: Tensor | None = None
    """A shift of the states h in that frame, broadcastable to (B, N, 4): positions, then velocities, latent units."""
    removed: Tensor | None = None
    """A mask of bool, broadcastable to (B, N), of the objects that are removed, starting with the next frame."""

    def __post_init__(self) -> None:
        """Converts arrays and lists to tensors.

        Raises:
            ValueError: unless ``dynamics`` is a function, ``shift`` real numbers, and ``removed`` bool.
        """
        if not callable(self.dynamics):
            raise ValueError(f"dynamics is a {type(self.dynamics).__name__}; wanted a function of an LGSSM")
        for name, wanted in (("shift", "real numbers"), ("removed", "bool, True where an object is removed")):
            value = getattr(self, name)
            if value is None:
                continue
            try:
                found = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"{name} is a {type(value).__name__}; wanted a tensor of {wanted}") from None
            if found.is_complex() or (found.dtype == torch.bool) != (name == "removed"):
                raise ValueError(f"{name} has type {str(found.dtype).removeprefix('torch.')}; wanted {wanted}")
            object.__setattr__(self, name, found)

    def check(self, n_sequences: int, most_objects: int) -> None:
        """Raises ValueError unless ``shift`` and ``removed`` broadcast to (B, N, ...)."""
        for name, x, last in (("shift", self.shift, 1), ("removed", self.removed, 0)):
            if x is None or x.dim() <= last:
                continue
            wanted = (n_sequences, most_objects, *x.shape[x.dim() - last :])
            if x.dim() > len(wanted) or any(n not in (1, m) for n, m in zip(reversed(x.shape), reversed(wanted))):
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)} for {n_sequences} sequences of up to {most_objects} objects; "
                    f"wanted one that broadcasts to {wanted}"
                )

    def of_part(self, part: slice, n_sequences: int, most_objects: int) -> "Change":
        """Returns the change for the sequences ``part``, which have at most ``most_objects`` objects."""

        def pick(x: Tensor | None, last: int) -> Tensor | None:
            """Returns the part of ``x``, which broadcasts to (B, N) and ``last`` further dimensions."""
            if x is None or x.dim() <= last:
                return x
            objects = x.dim() - last - 1
            x = x if x.shape[objects] == 1 else x.narrow(objects, 0, most_objects)
            return x[part] if objects == 1 and len(x) == n_sequences else x

        return replace(self, shift=pick(self.shift, 1), removed=pick(self.removed, 0))


@in_parts(with_images=True)
@torch.no_grad()
def what_if(
    model: PixelModel,
    guide: Guide,
    images: Tensor,
    n_objects: Tensor | int | Sequence[int],
    change: Change,
    *,
    frame: int,
    n_frames: int,
    n_samples: int = 100,
    inferred: Inference | None = None,
) -> Prediction:
    """Returns the first ``frame`` frames as inferred, and the following ones as predicted after a change.

    The states in frame ``frame`` are inferred from all given images, also later ones. Pass ``images[:, :frame]`` to
    infer them from the past only.

    Args:
        model: the trained model.
        guide: the trained guide.
        images: (B, T, H, W).
        n_objects: (B,), a list, or one number for all sequences.
        change: what changes after frame ``frame``.
        frame: the frame after which the world changes, from 1 to T.
        n_frames: the total number of frames, more than ``frame``.
        n_samples: S, at least 1, the number of samples of q(a | v) to average over.
        inferred: the result of `infer` for these images, with samples to average over, if it is already available;
            pass ``model`` to `infer` if there are frames of NaN.

    Returns:
        A `Prediction` of ``n_frames`` frames. ``observed`` marks those before the change; removed objects are NaN in
        the other frames.

    Raises:
        ValueError: if ``frame``, ``n_frames`` or ``n_samples`` are out of range or not whole, ``change`` does not fit
            the sequences, ``inferred`` is of other images or has no samples, or as in `infer`.
    """
    images, n_objects = checked_batch(images, n_objects)
    if not isinstance(change, Change):
        raise ValueError(f"change is a {type(change).__name__}; wanted a Change, such as Change(dynamics=...)")
    frame, n_frames = check_number("frame", frame), check_number("n_frames", n_frames)
    n_samples, T = check_number("n_samples", n_samples, 1), images.shape[1]
    if not 1 <= frame <= T or n_frames <= frame:
        raise ValueError(
            f"frame is {frame}, n_frames {n_frames}, and there are {T} images; "
            "wanted frame from 1 to the number of images, and n_frames, the total number of frames, above it"
        )
    lgssm, n_ahead = change.dynamics(model.dynamics.lgssm()), n_frames - frame
    d = model.dynamics.lgssm().A.shape[-1]
    if change.shift is not None and change.shift.dim() and change.shift.shape[-1] not in (1, d):
        raise ValueError(f"shift has shape {tuple(change.shift.shape)}; wanted {d} values for each object, h")
    found = infer(guide, images, n_objects, n_samples=n_samples, model=model) if inferred is None else inferred
    if len(found.mean) != len(images) or found.mean.shape[2] != T:
        raise ValueError(
            f"inferred has means {tuple(found.mean.shape)} for images {tuple(images.shape)}; "
            "give the result of infer for these images"
        )
    h = posterior_states(model.dynamics, found.samples, seen_or_none(images))
    assert found.samples is not None
    assert h.samples is not None
    shift = 0.0 if change.shift is None else change.shift.to(h.mean)
    ahead = kalman.rollout(lgssm, h.mean[..., frame - 1, :] + shift, h.cov[..., frame - 1, :, :], n_ahead)
    ahead = kalman.observation_moments(lgssm, ahead)
    drawn = kalman.sample_rollout(lgssm, h.samples[..., frame - 1, :] + shift, n_ahead)
    drawn = kalman.sample_observations(lgssm, drawn)

    nobody = torch.zeros_like(h.mean[..., 0, 0], dtype=torch.bool)
    gone = (nobody if change.removed is None else change.removed.to(nobody)).expand(h.mean.shape[:2])[..., None, None]
    present = object_mask(n_objects, h.mean.shape[1])
    cov = torch.diag_embed(found.std.square()) if found.cov is None else found.cov
    before = Gaussians(found.mean[:, :, :frame], cov[:, :, :frame])
    after = Gaussians(ahead.mean.masked_fill(gone, torch.nan), ahead.cov.masked_fill(gone.unsqueeze(-1), torch.nan))

    def drawn_images(a_before: Tensor, a_after: Tensor) -> Tensor:
        images_after = model.likelihood.checked_mean(model.renderer(a_after, present & ~gone[..., 0, 0]))
        return torch.cat([render(model, a_before, n_objects), images_after], -3)

    samples_before = found.samples[..., :frame, :]
    return Prediction(
        mean=torch.cat([before.mean, after.mean], 2),
        cov=torch.cat([before.cov, after.cov], 2),
        images=drawn_images(before.mean, ahead.mean),
        observed=torch.arange(n_frames, device=images.device) < frame,
        component=h.p_z.argmax(-1),
        samples=torch.cat([samples_before, drawn.masked_fill(gone, torch.nan)], 3),
        sample_images=drawn_images(samples_before, drawn),
    )
