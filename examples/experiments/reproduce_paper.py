"""Regenerates the paper's figures and tables, and further results, for docs/reproduction.md.

Figures 3, 5(a), 5(b), 6, 8, 9 and 10 to 13 go to docs/figures/paper, those of the paper's own network to
docs/figures/paper_network. Every part saves its numbers as JSON in docs/results and is skipped if they exist: delete a
file, or give --again, to redo a part. The text of docs/reproduction.md is kept; only what stands between its markers
<!-- begin PART --> and <!-- end PART --> is replaced.
"""

from examples._common import device_of, new_folder, read_json, read_run, say_where, start, write_json
from examples.experiments._paper_figures import draw_edlstm, draw_model_figures, draw_worst
from examples.experiments._reproduction_text import baselines_text, generalisation_text, model_text, sweeps_text

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_pixels._files import atomic_write
from pyro_pixels._options import Samples, Seed, Sequences
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.blob_tracker import evaluate_tracker
from pyro_pixels.evaluation.ed_lstm import evaluate_edlstm, load_edlstm
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.plots import paper as plots
from pyro_pixels.queries.predict import infer
from pyro_pixels.result_tables import environment, insert
from pyro_pixels.run_figures import RunView, draw_stages
from pyro_pixels.run_sequences import TEST_SEED
from pyro_pixels.runs import Run, load_pretrained
from pyro_pixels.training.checkpoints import read_lines
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig

SHOWN_SEED = TEST_SEED + 1  # the sequences of the figures, as in quickstart.py


@dataclass
class Arguments:
    run: Path | None = None
    """Folder of a trained run. By default the weights that come with the package are used."""
    custom: Path | None = None
    """The Python file with that run's own guide or likelihood, if the run does not name it or it has moved since."""
    recurrent: Path | None = None
    """Folder of a run with the paper's guide, for Fig 5(b). By default the worst sequences of --run are shown."""
    recurrent_custom: Path | None = None
    """The same file as --custom, for the run of --recurrent."""
    edlstm: Path | None = None
    """Folder of an ED-LSTM trained on true frames (examples/experiments/train_edlstm.py)."""
    edlstm_own: Path | None = None
    """Folder of an ED-LSTM trained on its own predictions (--own-predictions)."""
    sweeps: Path | None = None
    """Folder with the summaries of examples/experiments/sweep.py."""
    docs: Path = Path("docs")
    """Folder of the documentation."""
    n_test: Sequences = 1500
    """Number of fresh sequences for the tables."""
    n_futures: Samples = 32
    """Number of sampled futures per sequence whose images are averaged."""
    seed: Seed = TEST_SEED
    """Seed of the fresh sequences."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps, or auto, which is CUDA if available and else the CPU."""
    again: bool = False
    """Redo every part, even if its numbers exist."""


class Reproduction:
    """The parts of the page; each method draws its figures and returns its numbers."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.device = args, device_of(args.device)
        self.run = self._read("--run", args.run, args.custom) or load_pretrained(device=self.device)
        self.recurrent = self._read("--recurrent", args.recurrent, args.recurrent_custom) or self.run
        self.config = self.run.config.data
        if not isinstance(self.config, CannonballConfig):
            raise ValueError(
                f"{args.run} was trained in the world '{self.config.world}', but the paper's figures and floors are of "
                "cannonballs; give a --run that was trained in that world"
            )
        self.figures = args.docs / "figures" / "paper"
        self._shown: RunView | None = None

    def _read(self, option: str, folder: Path | None, custom: Path | None) -> Run | None:
        """Returns the run of an option, None if it is not given."""
        if folder is not None:
            return read_run(folder, self.device, custom)
        if custom is not None:
            raise ValueError(f"{custom} is for the run of {option}, which is not given; give both, or leave it out")
        return None

    def test(self, **changes: Any) -> ImageSequences:
        return simulate(replace(self.config, **changes), self.args.n_test, seed=self.args.seed)

    @property
    def shown(self) -> RunView:
        if self._shown is None:
            self._shown = RunView(self.run, simulate(self.config, 60, seed=SHOWN_SEED), self.device)
        return self._shown

    def model(self) -> dict[str, Any]:
        """Evaluates the run on fresh sequences; draws Figs 3, 5, 6, 8, 9, 10, 12 and 13."""
        draw_model_figures(self.shown, self.figures)
        if self.args.run is not None:
            draw_stages(self.args.run / "snapshots.npz", self.figures / "fig5a.png")
        many = simulate(self.recurrent.config.data, min(300, self.args.n_test), seed=SHOWN_SEED)
        draw_worst(RunView(self.recurrent, many, self.device), self.figures / "fig5b.png")
        return self._measure(self.run, self.test())

    def network(self) -> dict[str, Any]:
        """Evaluates the packaged weights of the paper's own network on their world; draws its figures."""
        run, folder = load_pretrained("recurrent", self.device), self.figures.parent / "paper_network"
        draw_model_figures(RunView(run, simulate(run.config.data, 60, seed=SHOWN_SEED), self.device), folder)
        many = simulate(run.config.data, min(300, self.args.n_test), seed=SHOWN_SEED)
        draw_worst(RunView(run, many, self.device), folder / "fig5b.png")
        return self._measure(run, simulate(run.config.data, self.args.n_test, seed=self.args.seed))

    def longer(self) -> dict[str, Any]:
        """Evaluates the packaged weights that were trained for longer, on their world; draws their reconstructions."""
        runs = [load_pretrained(name, self.device) for name in ("quick", "long")]
        config = runs[-1].config.data
        data = simulate(config, 60, seed=SHOWN_SEED)
        b, frames = int((data.n_objects == 3).nonzero()[0]), slice(0, None, 4)
        drawn = {f"{run.step:,} steps": RunView(run, data, self.device).reconstruction[b, frames] for run in runs}
        figure = plots.plot_frames({"seen": data.images[b, frames], **drawn})
        plots.save_figure(figure, self.figures / "longer.png")
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
        """Evaluates the classical tracker and the ED-LSTMs on the same sequences; draws Figs 6 (bottom row) and 11."""
        test = self.test()
        found = {"tracker": evaluate_tracker(test)}
        for kind, folder in (("true", self.args.edlstm), ("own", self.args.edlstm_own)):
            if folder is not None:
                net = load_edlstm(folder, self.device)
                lines = read_lines(folder)
                found[f"ED-LSTM, {kind} frames"] = {
                    "state_size": net.config.state_size,
                    "steps": lines[-1]["step"],
                    "seconds": lines[-1]["seconds"],
                    **evaluate_edlstm(net, test),
                }
                draw_edlstm(self.shown, net, self.figures, kind)
        return found

    def generalisation(self) -> dict[str, Any]:
        """Evaluates the run on more objects, and on more frames, than in training."""
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
        """Returns the summaries of the sweeps in --sweeps, None if there are none; draws the small-noise curves."""
        found: dict[str, Any] = {}
        if self.args.sweeps is None:
            return None
        for file in sorted(self.args.sweeps.glob("*.json")):
            found[file.stem] = read_json(file)
        if "small-noise" in found:
            runs = next(iter(found["small-noise"]["variants"].values()))["runs"]
            curves = {f"N = {n}": [[(x["seconds"], x[n]) for x in r["curve"]] for r in runs] for n in ("1", "2", "3")}
            plots.save_figure(plots.plot_learning_curves(curves), self.figures / "small_noise.png")
        return found or None


def main(args: Arguments) -> None:
    page_file = args.docs / "reproduction.md"
    if not page_file.exists():
        raise ValueError(f"there is no {page_file}; run from the root of the repository, or give --docs")
    new_folder(args.docs)
    page, work = page_file.read_text(), Reproduction(args)
    found: dict[str, dict[str, Any]] = {}
    for part, measure, describe in (
        ("model", work.model, lambda: model_text(found["model"])),
        ("baselines", work.baselines, lambda: baselines_text(found["baselines"], found.get("model"))),
        ("network", work.network, lambda: model_text(found["network"])),
        ("longer", work.longer, lambda: model_text(found["longer"])),
        ("generalisation", work.generalisation, lambda: generalisation_text(found["generalisation"])),
        ("sweeps", work.sweeps, lambda: sweeps_text(found["sweeps"])),
    ):
        file = args.docs / "results" / f"{part}.json"
        if args.again or not file.exists():
            print(f"{part} ...", flush=True)
            numbers = measure()
            if numbers is None:
                continue
            write_json(file, {**numbers, "environment": environment(work.device)})
            say_where([file])
        found[part] = read_json(file)
        page = insert(page, part, describe())
        with atomic_write(page_file) as out:
            out.write(page.encode())
    say_where([page_file, work.figures])


if __name__ == "__main__":
    start(main, Arguments, __doc__)
