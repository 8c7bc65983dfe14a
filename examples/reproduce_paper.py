"""Regenerates the paper's figures and tables, and what goes beyond them, into docs/reproduction.md.

Figures 3, 5(a), 5(b), 6, 8, 9 and 10 to 13 go to docs/figures/paper; every part leaves its numbers as JSON in
docs/results, and is skipped when they are there already: delete a file, or give --again, to do a part anew. The text
of docs/reproduction.md is kept; only what stands between its markers <!-- begin PART --> and <!-- end PART --> is
replaced.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sweep
from common import TEST_SEED, Shown, device_of, environment, markdown, per_n, save, start
from pyro_pixels._files import atomic_write
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.blob_tracker import evaluate_tracker
from pyro_pixels.evaluation.ed_lstm import evaluate_edlstm, load_edlstm
from pyro_pixels.evaluation.table import N_SEEN, evaluate
from pyro_pixels.plots import paper as plotting
from pyro_pixels.queries.predict import infer
from pyro_pixels.runs import Run, load_pretrained, load_run
from pyro_pixels.worlds.base import simulate

# Error after 300 CPU-seconds, measured beforehand on the same kind of data: 32 x 32, small noise; untuned, three seeds.
STOVE = {"N = 2, STOVE": (300.0, 1.36), "N = 3, STOVE": (300.0, 2.58)}
SHOWN_SEED = TEST_SEED + 1  # the sequences of the figures, as in quickstart.py


@dataclass
class Arguments:
    run: Path | None = None
    """Folder of a trained run; default: the weights that come with the package."""
    recurrent: Path | None = None
    """Folder of a run with the paper's guide, for Fig 5(b); default: the worst sequence of --run."""
    edlstm: Path | None = None
    """Folder of an ED-LSTM trained on true frames (examples/train_edlstm.py)."""
    edlstm_own: Path | None = None
    """Folder of one trained on its own predictions (--own-predictions)."""
    sweeps: Path | None = None
    """Folder with the summaries of examples/sweep.py."""
    docs: Path = Path("docs")
    n_test: int = 1500
    """Fresh sequences for the tables."""
    n_futures: int = 32
    """Sampled futures of each, whose images are averaged."""
    seed: int = TEST_SEED
    device: str = "auto"
    again: bool = False
    """Do everything anew."""


class Reproduction:
    """The parts; each returns its numbers, and has a method of the same name in `Text` that puts them into words."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.device = args, device_of(args.device)
        self.run = load_pretrained(device=self.device) if args.run is None else load_run(args.run, self.device)
        self.config = self.run.config.data
        self.figures = args.docs / "figures" / "paper"
        self._shown: Shown | None = None

    def test(self, **changes: Any) -> ImageSequences:
        return simulate(replace(self.config, **changes), self.args.n_test, seed=self.args.seed)

    @property
    def shown(self) -> Shown:
        if self._shown is None:
            self._shown = Shown(self.run, simulate(self.config, 60, seed=SHOWN_SEED), self.device)
        return self._shown

    def model(self) -> dict[str, Any]:
        """The run on fresh sequences, and Figs 3, 5(a), 6, 8, 9, 10, 12, 13."""
        self._figures()
        return self._measure(self.run, self.test())

    def longer(self) -> dict[str, Any]:
        """The packaged weights that learned for longer, on sequences of their own world, and what they draw."""
        runs = [load_pretrained(name, self.device) for name in ("quick", "long")]
        config = runs[-1].config.data
        data = simulate(config, 60, seed=SHOWN_SEED)
        b, frames = int((data.n_objects == 3).nonzero()[0]), slice(0, None, 4)
        drawn = {f"{run.step:,} steps": Shown(run, data, self.device).reconstruction()[b, frames] for run in runs}
        self._save(plotting.plot_frames({"seen": data.images[b, frames], **drawn}), "longer")
        return self._measure(runs[-1], simulate(config, self.args.n_test, seed=self.args.seed))

    def _measure(self, run: Run, test: ImageSequences) -> dict[str, Any]:
        torch.manual_seed(self.args.seed)
        found = evaluate(run.model, run.guide, test, n_futures=self.args.n_futures)
        assert test.positions is not None
        assert test.dynamics is not None
        labelled = metrics.likeliest_labels(test.dynamics, test.positions, test.n_objects)
        floor = metrics.switches(labelled, test.positions, test.n_objects).double()
        for n, row in found["by_n_objects"].items():
            row["switch_floor"] = None if n == "1" else float(floor[test.n_objects == int(n)].mean())
        found["all"]["switch_floor"] = float(floor[test.n_objects > 1].mean())
        about = {"step": run.step, "train_seed": run.config.seed, "test_seed": self.args.seed}
        return {**about, "preset_guide": run.config.guide, "n_futures": self.args.n_futures, **found}

    def baselines(self) -> dict[str, Any]:
        """The classical tracker and the ED-LSTMs on the same sequences; Figs 6 (bottom row) and 11."""
        test = self.test()
        found = {"tracker": evaluate_tracker(test)}
        for name, folder in (("ED-LSTM, true frames", self.args.edlstm), ("ED-LSTM, own frames", self.args.edlstm_own)):
            if folder is not None:
                net = load_edlstm(folder, self.device)
                lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                found[name] = {
                    "state_size": net.config.state_size,
                    "steps": lines[-1]["step"],
                    "seconds": lines[-1]["seconds"],
                    **evaluate_edlstm(net, test),
                }
                self._edlstm_figures(name, net)
        return found

    def generalisation(self) -> dict[str, Any]:
        """More objects, and more frames, than were trained on."""
        most = max(self.config.n_objects)
        more = self.test(n_objects=(1, most + 1, most + 2))
        T = self.config.n_frames
        long = self.test(n_frames=T + 20, n_frames_in_view=T)
        a = infer(self.run.guide, long.images.to(self.device), long.n_objects.to(self.device)).mean.cpu()
        assert long.positions is not None
        in_pixels = metrics.fit_affine(a[:, :, :T], long.positions[:, :, :T], long.n_objects)(a)
        order = metrics.assign(in_pixels[:, :, :T], long.positions[:, :, :T], long.n_objects)
        errors = metrics.errors(metrics.reorder(in_pixels, order), long.positions, long.n_objects)
        size = torch.tensor([self.config.width, self.config.height]) - 1
        inside = ((long.positions >= 0) & (long.positions <= size)).all(-1)

        def split(group: Tensor) -> dict[str, float]:
            e, seen = errors[group], inside[group]
            return {
                "trained_frames": metrics.nan_mean(e[..., :T]),
                "later_in_view": metrics.nan_mean(torch.where(seen, e, torch.nan)[..., T:]),
                "later_out_of_view": metrics.nan_mean(torch.where(seen, torch.nan, e)[..., T:]),
            }

        by_n = {str(n): split(long.n_objects == n) for n in self.config.n_objects}
        return {"more_objects": evaluate(self.run.model, self.run.guide, more), "longer": by_n}

    def sweeps(self) -> dict[str, Any] | None:
        """Summaries of the sweeps that there are, without the curves."""
        if self.args.sweeps is None:
            return None
        found = {}
        for file in sorted(self.args.sweeps.glob("*.json")):
            found[file.stem] = json.loads(file.read_text())
        if "small-noise" in found:
            runs = next(iter(found["small-noise"]["variants"].values()))["runs"]
            curves = {f"N = {n}": [[(x["seconds"], x[n]) for x in r["curve"]] for r in runs] for n in ("1", "2", "3")}
            self._save(plotting.plot_learning_curves(curves, STOVE), "small_noise")
        return found or None

    def _figures(self) -> None:
        shown, data = self.shown, self.shown.data
        generated, interpolated = shown.generation(), shown.interpolation()
        truth, inferred = data.positions, shown.tracks(shown.inference.mean)
        assert truth is not None
        three = (data.n_objects == max(self.config.n_objects)).nonzero().squeeze(1)
        two = (data.n_objects == 2).nonzero().squeeze(1)
        rows = three[:6]
        figure = plotting.plot_positions(truth[rows], inferred[rows], n_objects=data.n_objects[rows], size=data.size)
        self._save(figure, "fig3")
        self._stages()
        self._worst()
        rows = torch.cat([two[:3], three[:3]])
        drawn = generated.images.cpu()
        tail = slice(N_SEEN, None)
        self._save(plotting.plot_generated_images(drawn[rows, tail], data.images[rows, tail], rows=2), "fig6")
        red, cyan = (shown.tracks(p.mean) for p in (generated, interpolated))
        red[:, :, : N_SEEN - 1] = torch.nan

        def trajectories(rows: Tensor, *, between: bool, images: dict[str, Tensor] | None = None) -> Any:
            return plotting.plot_trajectories(
                truth[rows], inferred[rows], red[rows], cyan[rows] if between else None, size=data.size, columns=4,
                n_objects=data.n_objects[rows], images=images and {name: x[rows] for name, x in images.items()},
            )  # fmt: skip

        self._save(trajectories(torch.cat([two[:4], three[:4]]), between=False), "fig8")
        images = {"generated": drawn, "truth": data.images, "interpolated": interpolated.images.cpu()}
        self._save(trajectories(torch.cat([two[:2], three[:2]]), between=True, images=images), "fig9")
        rows = torch.cat([two[:4], three[:4]])
        for name, frames in (("fig10_last", slice(-1, None)), ("fig10_overlaid", tail)):
            self._save(plotting.plot_generated_images(drawn[rows, frames], data.images[rows, frames], rows=2), name)
        for name, rows in (("fig12", two[4:8]), ("fig13", three[4:8])):
            self._save(trajectories(rows, between=True, images=images), name)

    def _stages(self) -> None:
        """Fig 5(a), from the snapshots that train.py leaves."""
        snapshots = None if self.args.run is None else self.args.run / "snapshots.npz"
        if snapshots is None or not snapshots.exists():
            return
        with np.load(snapshots) as file:
            means = {int(step): file[step] for step in file.files}
        steps = sorted(means)
        stages = {f"step {s:,}": means[s] for s in dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1]))}
        self._save(plotting.plot_inference_means(stages), "fig5a")

    def _worst(self) -> None:
        """Fig 5(b): sequences of two balls in which identities swap, or else those with the largest errors."""
        run = self.run if self.args.recurrent is None else load_run(self.args.recurrent, self.device)
        data = simulate(run.config.data, 300, seed=SHOWN_SEED)
        shown = Shown(run, data, self.device)
        assert data.positions is not None
        inferred = shown.tracks(shown.inference.mean)
        error = metrics.errors(inferred, data.positions, data.n_objects).nanmean((1, 2))
        error += 1e3 * metrics.switches(inferred, data.positions, data.n_objects)
        rows = torch.where(data.n_objects == 2, error, -1.0).argsort(descending=True)[:4]
        generated = shown.tracks(shown.generation().mean)
        figure = plotting.plot_trajectories(
            data.positions[rows], inferred[rows], generated[rows], n_objects=data.n_objects[rows], size=data.size
        )
        self._save(figure, "fig5b")

    def _edlstm_figures(self, name: str, net: Any) -> None:
        data = self.shown.data
        two, three = ((data.n_objects == n).nonzero().squeeze(1)[:4] for n in (2, max(self.config.n_objects)))
        rows = torch.cat([two, three])
        drawn = net.generate(data.images[rows, :N_SEEN].to(self.device), data.images.shape[1]).cpu()
        kind = "own" if "own" in name else "true"
        for part, frames in (("last", slice(-1, None)), ("overlaid", slice(N_SEEN, None))):
            figure = plotting.plot_generated_images(drawn[:, frames], data.images[rows, frames], rows=2)
            self._save(figure, f"fig11_{kind}_{part}")

    def _save(self, figure: Any, name: str) -> None:
        save(figure, self.figures / f"{name}.png")


class Text:
    """Numbers of each part as Markdown."""

    @staticmethod
    def model(r: dict[str, Any]) -> str:
        header = [
            "N",
            "position error",
            "switch rate",
            "floor",
            "sides told",
            "generation",
            "floor",
            "interpolation",
            "floor",
        ]
        header += ["bound, nats a frame"]
        predictions = [f"{q}_{kind}_px" for q in ("generation", "interpolation") for kind in ("error", "floor")]
        rows = [
            [
                name, f"{row['position_error_px']:.2f}",
                *(_percent(row[key]) for key in ("switch_rate", "switch_floor", "side_accuracy")),
                *(f"{row[key]:.2f}" for key in predictions), f"{row['bound_per_frame_nats']:.1f}",
            ]
            for name, row in {**r["by_n_objects"], "all": r["all"]}.items()
        ]  # fmt: skip
        dynamics, everything = r["dynamics"], r["all"]
        averaged = everything.get("averaged_nll_per_frame_nats")
        sampled = "" if averaged is None else f", {averaged:.0f} averaged over {r['n_futures']} sampled futures"
        x, y = dynamics["acceleration_px_per_frame2"]
        about = (
            f"Learned acceleration ({x:.4f}, {y:.4f}) px per frame squared, {abs(dynamics['degrees_from_down']):.2f} "
            f"degrees from down; learned noise of the positions {dynamics['position_noise_sd_px'][0]:.2f} px. "
            f"Generated frames, -log p in nats: {everything['nll_per_frame_nats']:.0f} drawn at the forecast's mean"
            f"{sampled}, {everything['constant_image_nll_per_frame_nats']:.0f} for the best single grey value. "
            f"{everything['n_sequences']} fresh sequences (seed {r['test_seed']}); training seed {r['train_seed']}, "
            f"{r['step']:,} steps. {_machine(r)}"
        )
        return f"{markdown(header, rows)}\n\n{about}"

    longer = model

    @staticmethod
    def baselines(r: dict[str, Any], ours: dict[str, Any] | None) -> str:
        models = {} if ours is None else {"pyro_pixels": ours}
        models["classical tracker, true dynamics and radius"] = r["tracker"]
        for name, x in r.items():
            if "ED-LSTM" in name:
                models[f"{name}, state {x['state_size']:,}, {x['steps']:,} steps"] = x
        measures = {
            "position error, px": ("position_error_px", 1, 2),
            "switch rate, %": ("switch_rate", 100, 1),
            "generation, px": ("generation_error_px", 1, 2),
            "interpolation, px": ("interpolation_error_px", 1, 2),
            "generated frames, -log p in nats": ("nll_per_frame_nats", 1, 1),
            "averaged over sampled futures": ("averaged_nll_per_frame_nats", 1, 1),
            "paper-style loss": ("paper_style_loss", 1, 4),
        }

        def cell(result: dict[str, Any], key: str, scale: float, digits: int) -> str:
            return per_n(result, lambda row: None if row.get(key) is None else scale * row[key], digits)

        rows = [[name, *(cell(result, *how) for how in measures.values())] for name, result in models.items()]
        return f"{markdown(['', *measures], rows)}\n\nFor N = 1 / 2 / 3 (N = 2 / 3 for switches). {_machine(r)}"

    @staticmethod
    def generalisation(r: dict[str, Any]) -> str:
        header = ["N", "position error, px", "switch rate", "generation / floor", "interpolation / floor"]
        rows = [
            [
                n, f"{row['position_error_px']:.2f}", _percent(row["switch_rate"]),
                _ratio(row, "generation"), _ratio(row, "interpolation"),
            ]
            for n, row in r["more_objects"]["by_n_objects"].items()
        ]  # fmt: skip
        frames = {"trained frames, px": "trained_frames", "later, in view": "later_in_view"}
        frames["later, out of view"] = "later_out_of_view"
        longer = [[n, *(f"{row[key]:.2f}" for key in frames.values())] for n, row in r["longer"].items()]
        return f"{markdown(header, rows)}\n\n{markdown(['N', *frames], longer)}\n\n{_machine(r)}"

    @staticmethod
    def sweeps(r: dict[str, Any]) -> str:
        parts = []
        for name, result in r.items():
            if "variants" in result:
                seeds = sorted({run["train_seed"] for v in result["variants"].values() for run in v["runs"]})
                some = next(iter(result["variants"].values()))["runs"][0]
                parts.append(f"### {name}\n\n{sweep.table(result)}\n\nSeeds {seeds}. {_machine(some)}")
        return "\n\n".join(parts)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _ratio(row: dict[str, Any], query: str) -> str:
    return f"{row[f'{query}_error_px'] / row[f'{query}_floor_px']:.2f}"


def _machine(r: dict[str, Any]) -> str:
    e = r["environment"]
    where = e["processor"] if e["device"] == "cpu" else e["device"]
    return f"{where}, Python {e['python']}, torch {e['torch']}, pyro {e['pyro']}."


def insert(page: str, part: str, text: str) -> str:
    """The page with what is between a part's markers replaced.

    Raises:
        ValueError: if the markers are not there.
    """
    pattern = re.compile(rf"(<!-- begin {part} -->\n).*?(<!-- end {part} -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(
            f"the page has no <!-- begin {part} --> ... <!-- end {part} -->; put them where the part is to go"
        )
    return pattern.sub(lambda m: f"{m[1]}\n{text}\n\n{m[2]}", page)


def main(args: Arguments) -> None:
    page_file = args.docs / "reproduction.md"
    if not page_file.exists():
        raise ValueError(f"there is no {page_file}; run from the root of the repository, or give --docs")
    page, work = page_file.read_text(), Reproduction(args)
    parts: dict[str, Callable[[], dict[str, Any] | None]] = {
        "model": work.model, "baselines": work.baselines, "longer": work.longer,
        "generalisation": work.generalisation, "sweeps": work.sweeps,
    }  # fmt: skip
    found: dict[str, Any] = {}
    for part, make in parts.items():
        file = args.docs / "results" / f"{part}.json"
        if args.again or not file.exists():
            print(f"{part} ...", flush=True)
            numbers = make()
            if numbers is None:
                continue
            with atomic_write(file) as out:
                numbers.setdefault("environment", environment(work.device))
                out.write(json.dumps(numbers, indent=1).encode() + b"\n")
            print(f"  {file}")
        found[part] = json.loads(file.read_text())
        text = (
            Text.baselines(found[part], found.get("model")) if part == "baselines" else getattr(Text, part)(found[part])
        )
        page = insert(page, part, text)
        with atomic_write(page_file) as out:
            out.write(page.encode())
    print(f"  {page_file}")


if __name__ == "__main__":
    start(main, Arguments, __doc__)
