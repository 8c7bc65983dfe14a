"""The paper's baseline (Sec 3.4, Fig 7): an encoder-decoder LSTM that generates images without any notion of objects.

`evaluate_edlstm` returns a table of the same layout as `evaluation.evaluate` does for a model.

Readings of Sec 3.4 where the paper leaves a choice: the image before the first is black, and the LSTM's first state is
0; layers are fully connected; the last observed image is an input, so that all of v_{1:tau} is used; and an LSTM has
two weight matrices, (4 D, D) for the input and (4 D, D) for the state, each starting from N(0, 1 / sqrt(d)) (Sec 3.2).
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_pixels._batch import unseen_frames
from pyro_pixels._checks import MAX_SEED, Bounds, check_fields, check_number, check_value
from pyro_pixels._init import init_as_paper
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.blob_tracker import RADIUS, find_disks
from pyro_pixels.evaluation.table import N_SEEN, means_by_n
from pyro_pixels.training import states
from pyro_pixels.training.checkpoints import load_checkpoint, load_weights
from pyro_pixels.training.finite import GOOD_SEQUENCES, what_is_not_finite
from pyro_pixels.training.loop import FitResult, Loop, prepared


@dataclass(frozen=True)
class EDLSTMConfig:
    """Sizes of an `EDLSTM`; the defaults are those of Sec 3.4."""

    height: Annotated[int, Bounds(1, 4_096)] = 48
    width: Annotated[int, Bounds(1, 4_096)] = 48
    state_size: Annotated[int, Bounds(1, 65_536)] = 2048
    """D, the length of the LSTM's state and of every hidden layer."""
    n_layers: Annotated[int, Bounds(1, 100)] = 1
    """The number of fully connected layers in the encoder, and in the decoder; one or two in the paper."""

    def __post_init__(self) -> None:
        check_fields(self)


class EDLSTM(nn.Module):
    """Encoder-decoder LSTM of Fig 7: image v_{t-1} is encoded and fed to an LSTM, whose state is decoded into image t.

    A ReLU follows each layer of the encoder and of the decoder except the last.
    """

    def __init__(self, config: EDLSTMConfig) -> None:
        super().__init__()
        self.config = config
        D, P = config.state_size, config.height * config.width
        self.encoder = _layers([P] + [D] * config.n_layers)
        self.lstm = nn.LSTM(D, D, batch_first=True)
        self.decoder = _layers([D] * config.n_layers + [P])
        for p in self.lstm.parameters():
            nn.init.normal_(p, std=p.numel() ** -0.25) if p.dim() == 2 else nn.init.zeros_(p)

    def forward(self, images: Tensor, n_seen: int | None = None) -> Tensor:
        """Returns logits (B, T, H, W) of every frame given those before it; the first is preceded by a black image.

        Args:
            images: (B, T, H, W) in [0, 1] or uint8. Frames of NaN are unobserved: black as an input.
            n_seen: the number of frames of ``images`` that are used; later ones are replaced by the network's own
                probabilities. With None all are used, as in the paper's training. The logits of frames 1 to n_seen + 1
                are the same in both cases.

        Raises:
            ValueError: if the images have another size, or ``n_seen`` is negative.
        """
        size = (self.config.height, self.config.width)
        if images.dim() != 4 or 0 in images.shape or images.shape[2:] != size:
            raise ValueError(f"images have shape {tuple(images.shape)}; wanted (B, T, {size[0]}, {size[1]}), none 0")
        if n_seen is not None and n_seen < 0:
            raise ValueError(f"n_seen is {n_seen}; wanted at least 0, or None for all frames")
        T = images.shape[1]
        given = T if n_seen is None else min(n_seen + 1, T)
        previous = images[:, : given - 1].flatten(2).to(next(self.parameters())).nan_to_num()
        previous = F.pad(previous, (0, 0, 1, 0))
        x, (h, c) = self.lstm(self.encoder(previous))
        logits, h, c = [self.decoder(x)], h[0], c[0]
        for _ in range(given, T):  # a cell is faster here than the LSTM on one frame
            x = self.encoder(logits[-1][:, -1].sigmoid())
            h, c = torch.lstm_cell(x, (h, c), *self.lstm.all_weights[0])
            logits.append(self.decoder(h).unsqueeze(1))
        return torch.cat(logits, 1).unflatten(-1, size)

    @torch.no_grad()
    def generate(self, images: Tensor, n_frames: int) -> Tensor:
        """Returns pixel probabilities (B, T, H, W) given the observed frames (Sec 3.4).

        Frames up to tau + 1 are one-step predictions from the true frames before them; later ones continue from the
        network's own predictions.

        Args:
            images: (B, tau, H, W), the observed frames.
            n_frames: T, the total number of frames, more than tau.

        Raises:
            ValueError: if tau >= T, or as in `forward`.
        """
        tau = images.shape[1]
        if n_frames <= tau:
            raise ValueError(f"n_frames is {n_frames} and includes the {tau} observed frames; give more than {tau}")
        return self(F.pad(images, (0, 0, 0, 0, 0, n_frames - tau)), n_seen=tau).sigmoid()


def fit_edlstm(
    net: EDLSTM, data: ImageSequences, *, steps: int, own_predictions: bool, batch_size: int = 20,
    learning_rate: float = 1e-3, seed: int = 0, run_dir: str | Path | None = None, resume: bool = False,
    progress: bool = True, on_evaluation: Callable[[dict[str, float]], None] | None = None, evaluate_every: int = 500,
    config: Any = None,
) -> FitResult:  # fmt: skip
    """Minimises -log p of all observed frames with Adam, in place, on the device of ``net``.

    Args:
        data: the training data; only the images are used.
        own_predictions: if False, every frame is predicted from the true frames before it, as in the paper. If True,
            only the first 5 frames are given and gradients pass through the predictions, so that training matches
            testing.
        seed: seeds the order of the sequences; the caller's random state is not used.
        run_dir: the folder for metrics.jsonl and checkpoint.pt; with None nothing is written.
        resume: continue from the checkpoint in ``run_dir``; on a CPU the numbers are those of an uninterrupted run.
        on_evaluation: called with each line of metrics, every ``evaluate_every`` steps.
        config: a dataclass, written to config.json after the contents of the folder have been checked.

    Raises:
        ValueError: if a number is out of range; if ``resume`` finds no checkpoint, or one of a different training; or
            if the folder holds a run and ``resume`` is False.
        FloatingPointError: if the loss is no longer finite; the last checkpoint before that is kept.
    """
    for name, value in {"steps": steps, "batch_size": batch_size, "evaluate_every": evaluate_every}.items():
        check_number(name, value, 1)
    check_value("learning_rate", learning_rate, float, Bounds(0, 1e38, above=True))
    check_number("seed", seed, 0, MAX_SEED)
    training = _Training(
        net, data, steps, evaluate_every, own_predictions=own_predictions, batch_size=batch_size,
        learning_rate=learning_rate, seed=seed, run_dir=run_dir, on_evaluation=on_evaluation,
        config=config,
    )  # fmt: skip
    with prepared([training], resume) as stop:
        training.train(stop, progress=progress)
        return training.result(stop)


class _Training(Loop):
    """The training of one network; arguments as in `fit_edlstm`."""

    def __init__(
        self, net: EDLSTM, data: ImageSequences, steps: int, evaluate_every: int, *, own_predictions: bool,
        batch_size: int, learning_rate: float, seed: int, **where: Any,
    ) -> None:  # fmt: skip
        self.net, self.weight = net, next(net.parameters())
        super().__init__(steps, evaluate_every, device=self.weight.device, **where)
        self.data, self._mark = data, None
        self.images, self.n_seen = data.images.to(self.device), N_SEEN if own_predictions else None
        self.optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate, fused=True)
        self.settings = {"config": dataclasses.asdict(net.config), "own_predictions": own_predictions, "seed": seed,
                         "batch_size": batch_size, "learning_rate": learning_rate}  # fmt: skip
        self.nll = torch.zeros((), dtype=torch.float64, device=self.device)  # summed over steps, in nats per frame

    def begin(self, resume: bool) -> None:
        self._mark = None if self.run_dir is None else states.fingerprint(self.data)
        super().begin(resume)

    def _take_step(self) -> None:
        index = _batch(len(self.images), self.settings["batch_size"], self.settings["seed"], self.step)
        v = self.images[index.to(self.device)].to(self.weight.dtype)
        loss = _loss(self.net(v, self.n_seen), v)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.nll += loss.detach()

    def _look(self) -> dict[str, float]:
        nll = float(self.nll) / self.since["steps"]
        if not math.isfinite(nll):
            raise FloatingPointError(
                f"the loss is not finite at step {self.step}; {self._kept()}. Try a smaller learning_rate"
            )
        return {"nll": nll}

    def _line(self) -> dict[str, float]:
        self.nll.zero_()
        return {"nll_per_frame": self.seen["nll"], "learning_rate": self.settings["learning_rate"]}

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step, "seconds": self.seconds, "sums": {"nll": float(self.nll), **self.since}, **self.settings,
            "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
            **({} if self._mark is None else {"data": self._mark}),
        }  # fmt: skip

    def _check(self, state: dict[str, Any], path: Path) -> None:
        _check_kind(state, path)
        for name, value in self.settings.items():
            if state.get(name) != value:
                raise ValueError(
                    f"{path} was trained with {name} {state.get(name)}, not {value}; resume with the same {name}"
                )
        states.check_progress(state, path, {"sums": ["nll", *self.since]})
        states.check_same_data(state, {"data": self._mark}, path)
        states.check_weights(self.net, state.get("net"), path)
        states.check_optimizer(self.optimizer, state.get("optimizer"), path)

    def _not_finite(self) -> str | None:
        def loss(v: Tensor) -> Tensor:
            return _loss(self.net.forward(v, self.n_seen), v)

        v = self.images[:GOOD_SEQUENCES].to(self.weight.dtype)
        return what_is_not_finite({"net": self.net}, self.optimizer, loss, [v])

    def _restore(self, state: dict[str, Any], source: str | Path) -> None:
        load_weights(self.net, state["net"], source)
        states.restore_optimizer(self.optimizer, state["optimizer"])
        self.step, self.seconds, sums = state["step"], state["seconds"], dict(state["sums"])
        self.nll.fill_(sums.pop("nll"))
        self.since = sums


def load_edlstm(folder: str | Path, device: torch.device | str = "cpu") -> EDLSTM:
    """Loads the network that `fit_edlstm` saved in a folder.

    Raises:
        ValueError: if there is no checkpoint, or if it is damaged or not that of an ED-LSTM.
    """
    path = Path(folder) / "checkpoint.pt"
    state = load_checkpoint(path)
    _check_kind(state, path)
    with torch.random.fork_rng(devices=[]):
        try:
            net = EDLSTM(EDLSTMConfig(**state["config"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has no configuration of an ED-LSTM ({error}); train again") from None
    load_weights(net, state["net"], path)
    return net.to(device)


def evaluate_edlstm(
    net: EDLSTM, data: ImageSequences, *, n_seen: int = N_SEEN, batch_size: int = 100, radius: float = RADIUS
) -> dict[str, Any]:
    """Returns the losses of generated images and the errors of the balls in them, in the layout of `evaluate`.

    ``generation_error_px`` favours the network: balls are detected with `find_disks` in each generated image, whose
    pixels above 1/2 count as white, and are matched with the true noisy positions in each frame separately, so that
    identities do not matter. A missing object counts as being at the centre of the image; ``missing_share`` is the
    fraction of missing objects, and ``generation_found_error_px`` the error of the others.

    Args:
        data: held-out sequences; without ``positions`` only losses are returned.
        n_seen: observed frames before generation.
        radius: radius of a ball, in pixels.

    Raises:
        ValueError: if the sequences are too short, or their size is not the network's.
    """
    T = data.images.shape[1]
    if not 1 <= n_seen < T:
        raise ValueError(f"n_seen is {n_seen}; wanted at least 1 and less than the {T} frames of a sequence")
    weight, parts = next(net.parameters()), data.images[:, :n_seen].split(batch_size)
    drawn = torch.cat([net.generate(part.to(weight), T)[:, n_seen:].cpu() for part in parts])
    unseen, n_objects = data.images[:, n_seen:], data.n_objects
    values = {
        "nll_per_frame_nats": metrics.nll_per_frame(unseen, drawn).double(),
        "paper_style_loss": metrics.paper_style_loss(unseen, drawn).double(),
        "constant_image_nll_per_frame_nats": metrics.constant_image_nll(unseen),
    }
    if data.positions is not None:
        found = find_disks(drawn > 0.5, n_objects, radius)
        missing = found.isnan().any(-1)  # (n, N, T - n_seen)
        centre = (torch.tensor([data.size[1], data.size[0]], dtype=found.dtype) - 1) / 2
        frames = [x.transpose(1, 2).flatten(0, 1).unsqueeze(2) for x in (found, data.positions[:, :, n_seen:])]
        guess, truth = torch.where(frames[0].isnan(), centre, frames[0]), frames[1]  # (n (T - n_seen), N, 1, 2)
        n_each = n_objects.repeat_interleave(T - n_seen)
        order = metrics.assign(guess, truth, n_each)
        error = metrics.errors(metrics.reorder(guess, order), truth, n_each).view(len(data), T - n_seen, -1)
        lost = metrics.reorder(missing.transpose(1, 2).flatten(0, 1), order).view(error.shape)
        values["generation_error_px"] = error.nanmean(1)
        values["generation_found_error_px"] = error.masked_fill(lost, torch.nan)
        values["missing_share"] = torch.where(error.isnan(), torch.nan, lost.double())
    return {"n_seen": n_seen, "n_frames": T} | means_by_n(values, n_objects)


def _layers(sizes: list[int]) -> nn.Sequential:
    """Returns fully connected layers with the paper's initial weights and a ReLU after each but the last."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        init_as_paper(layers[-2])  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])


def _loss(logits: Tensor, v: Tensor) -> Tensor:
    """Returns -log p of images (B, T, H, W) given their logits, in nats per observed frame."""
    seen = (~unseen_frames(v)).to(v.dtype)
    weight = seen[..., None, None]
    total = F.binary_cross_entropy_with_logits(logits, v.nan_to_num(), weight=weight, reduction="sum")
    return total / seen.sum().clamp(min=1)


def _batch(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Returns the sequences of a step from seed and step alone; an epoch uses each at most once, leaving out a rest."""
    epoch, place = divmod(step, max(1, n // batch_size))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[place * batch_size : (place + 1) * batch_size]


def _check_kind(state: dict[str, Any], path: Path) -> None:
    if "net" not in state:
        raise ValueError(f"{path} holds no ED-LSTM; train one with examples/experiments/train_edlstm.py")
