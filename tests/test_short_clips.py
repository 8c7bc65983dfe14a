"""Sequences shorter than twice the frames that are usually seen: every default command works on them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

import ask
import evaluate
import gallery
import generate
import infer
import interpolate
import to_arviz
import train
from pyro_pixels import run_figures
from pyro_pixels.data import ImageSequences, load_sequences, save_sequences
from pyro_pixels.queries.evidence import Evidence
from pyro_pixels.question_figures import Scene
from pyro_pixels.runs import load_pretrained
from pyro_pixels.worlds.base import simulate


@pytest.fixture(scope="module", params=[4, 9])
def clips(request, tmp_path_factory):
    """Six sequences without positions, N = 1, 2, 3."""
    path = tmp_path_factory.mktemp("clips") / "short.npz"
    data = simulate(load_pretrained().config.data, 6, seed=2)
    save_sequences(path, ImageSequences(data.images[:, : request.param], data.n_objects))
    return path, request.param


def run(script, clips, out, **options):
    arguments = script.Arguments(pretrained=True, data=clips[0], out=out, device="cpu", **options)
    torch.manual_seed(0)
    assert not script.main(arguments)


def test_generation_and_interpolation_fit_the_clips(clips, tmp_path, capsys):
    T, n_seen = clips[1], (clips[1] - 1) // 2
    run(generate, clips, tmp_path / "g")
    run(interpolate, clips, tmp_path / "i")
    said = capsys.readouterr().out
    assert f"generated frames {n_seen + 1} to {T} of 6 sequences from the first {n_seen}" in said
    assert f"filled frames {n_seen + 1} to {T - n_seen} of 6 sequences from {n_seen} at either end" in said
    with np.load(tmp_path / "i/interpolation.npz") as file:
        assert file["observed"].sum() == 2 * n_seen
        assert np.isfinite(file["mean_px"]).all()


LENGTHS = [14, 20, 17, 12, 20, 20]


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Six sequences of unequal length without positions, N = 1, 2, 3."""
    path = tmp_path_factory.mktemp("unequal") / "unequal.npz"
    data = simulate(load_pretrained().config.data, 6, seed=2)
    images = [v[:n].numpy() for v, n in zip(data.images, LENGTHS)]
    save_sequences(path, ImageSequences(images, data.n_objects))
    return path, max(LENGTHS)


def test_clips_of_unequal_length_are_generated_and_filled(unequal, tmp_path, capsys):
    run(generate, unequal, tmp_path / "g")
    assert (tmp_path / "g/generation.gif").exists()
    run(interpolate, unequal, tmp_path / "i")
    assert "from 5 at either end, fewer in shorter sequences" in capsys.readouterr().out
    with np.load(tmp_path / "i/interpolation.npz") as file:
        for seen, n in zip(file["observed"][:, 0], LENGTHS):  # both ends are those of each clip
            assert np.flatnonzero(seen).tolist() == [*range(5), *range(n - 5, n)]


def test_arrays_are_saved_even_if_drawing_fails(unequal, tmp_path, monkeypatch):
    for script, draw, name in (
        (infer, "draw_inference", "positions"),
        (generate, "draw_generation", "generation"),
        (interpolate, "draw_interpolation", "interpolation"),
    ):
        monkeypatch.setattr(script, draw, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(script, unequal, tmp_path, n_sequences=2)
        assert (tmp_path / f"{name}.npz").exists()


def test_tracks_are_drawn_up_to_the_end_of_each_clip(unequal):
    run, data = load_pretrained(), load_sequences(unequal[0])
    scene = Scene(run, data, torch.device("cpu"), first=7)
    assert scene.lengths.tolist() == LENGTHS
    shown = scene.truth_and_inferred(torch.arange(6))[1]
    assert [int(track[0, :, 0].isfinite().sum()) for track in shown] == LENGTHS
    longer = scene.padding(30)  # ten frames before the first
    assert [int((~x).sum()) for x in longer] == [10 + n for n in LENGTHS]
    assert scene.titles(torch.tensor([1])) == ["sequence 8, N = 2"]


@pytest.mark.parametrize("n_frames", [16, 20, 26])
def test_generated_frames_are_drawn_up_to_the_end_of_each_clip_or_beyond_all(unequal, tmp_path, monkeypatch, n_frames):
    drawn = {}
    for name in ("plot_generated_images", "plot_trajectories", "gif"):
        plot = getattr(run_figures.plots, name)
        monkeypatch.setattr(
            run_figures.plots, name,
            lambda *args, name=name, plot=plot, **kw: drawn.update({name: args}) or plot(*args, **kw),
        )  # fmt: skip
    view = run_figures.RunView(load_pretrained(), load_sequences(unequal[0]), torch.device("cpu"))
    run_figures.draw_generation(view, view.generation(n_frames), tmp_path)
    true_ends = torch.tensor([min(n, n_frames) for n in LENGTHS])
    ends = torch.full((6,), n_frames) if n_frames > 20 else true_ends
    generated, truth = drawn["plot_generated_images"]
    assert [int(x[:, 0, 0].isfinite().sum()) + 5 for x in generated] == ends[view.pick(2)].tolist()
    assert [int(x[:, 0, 0].isfinite().sum()) + 5 for x in truth] == true_ends[view.pick(2)].tolist()
    _, inferred, predicted = drawn["plot_trajectories"]
    assert [int(x[0, :, 0].isfinite().sum()) for x in inferred] == true_ends[view.pick(2)].tolist()
    assert [int(x[0, :, 0].isfinite().sum()) + 4 for x in predicted] == ends[view.pick(2)].tolist()
    panels = {name: [int(v[:, 0, 0].isfinite().sum()) for v in x] for name, x in drawn["gif"][1].items()}
    first, true_first = ends[view.pick(1)].tolist(), true_ends[view.pick(1)].tolist()
    assert panels == {"truth": true_first, "reconstruction": true_first, "generation": first}


def test_evidence_counts_the_observed_frames(unequal, tmp_path, capsys, monkeypatch):
    def two_nats_per_frame(model, guide, images, n_objects, *, n_samples):
        seen = (~images[..., 0, 0].isnan()).sum(1).double()
        return Evidence(-2 * seen, seen)

    monkeypatch.setattr("pyro_pixels.question_figures.log_evidence", two_nats_per_frame)
    run(ask, unequal, tmp_path, question="evidence", n_samples=2)
    assert "bound of Eq (7) -2.00, with 2 samples -2.00 nats per frame" in capsys.readouterr().out


def test_the_gallery_leaves_out_what_needs_true_positions(unequal, tmp_path, capsys):
    pictures = ("fan", "missing", "velocities", "filter", "what-if", "retrodict", "calibration")
    run(gallery, unequal, tmp_path, n_samples=2, pictures=pictures)
    said = capsys.readouterr().out
    assert "calibration: not drawn, as the sequences have no true positions" in said
    assert "drawn without noise\n" in said  # and no word of a truth
    assert {path.stem for path in tmp_path.iterdir()} == {*pictures} - {"calibration"}
    with pytest.raises(ValueError, match="no true positions"):
        run(gallery, unequal, tmp_path, pictures=("calibration",))


def test_inference_and_evaluation(clips, tmp_path):
    run(infer, clips, tmp_path / "i")
    run(evaluate, clips, tmp_path / "metrics.json")
    assert (tmp_path / "i/tracks.gif").exists()
    assert '"forecast_nll_per_frame_nats"' in (tmp_path / "metrics.json").read_text()


@pytest.mark.parametrize("question", ["filter", "hidden", "retrodict", "what-if", "evidence", "count", "stream"])
def test_questions(clips, tmp_path, question):
    run(ask, clips, tmp_path, question=question, n_samples=2)
    assert (tmp_path / f"{question}.png").exists()


def test_the_gallery_and_arviz(clips, tmp_path):
    pictures = ("positions", "velocities", "starts", "fan", "forecast", "missing")
    run(gallery, clips, tmp_path / "g", pictures=pictures, n_samples=2)
    run(to_arviz, clips, tmp_path / "a", n_samples=10)
    assert (tmp_path / "a/posterior.nc").exists()


def test_arviz_counts_as_the_file_does_and_promises_no_more_than_there_is(clips, tmp_path, monkeypatch, capsys):
    figures, opened = {}, to_arviz.open_sequences(to_arviz.Arguments(pretrained=True, data=clips[0], device="cpu"))
    monkeypatch.setattr(to_arviz, "open_sequences", lambda args: (opened[0], opened[1]._replace(first=5)))
    monkeypatch.setattr(
        to_arviz, "save_figure", lambda figure, path, title: figures.update({path.stem: (figure, title)})
    )
    run(to_arviz, clips, tmp_path, n_samples=20)
    assert "pareto_k: not drawn, as 20 draws are too few" in capsys.readouterr().out
    assert "pareto_k" not in figures
    assert not any("tru" in title for _, title in figures.values())
    assert {ax.get_title() for ax in figures["futures"][0].axes} >= {"sequence 5: x", "sequence 6: y"}
    labels = [label.get_text() for label in figures["first_steps"][0].axes[0].get_yticklabels()]
    assert any("sequence 5, ball 1" in label for label in labels)
    assert not any("sequence 0" in label for label in labels)
    for group in ("posterior", "prior", "observed_data", "constant_data"):
        with xr.open_dataset(tmp_path / "posterior.nc", group=group, engine="h5netcdf") as found:
            assert found.sequence.values.tolist() == [5, 6, 7, 8, 9, 10]


def test_training(clips, tmp_path):
    arguments = train.Arguments(run=tmp_path / "r", data=clips[0], steps=2, threads=1, progress=False)
    assert train.main(arguments) == 0


@pytest.mark.parametrize(
    "script, name", [(generate, "--n-seen is 9, but the total is 9 frames"), (interpolate, "--n-seen is 9 at")]
)
def test_too_many_frames_are_refused_by_the_name_of_the_option(clips, tmp_path, script, name):
    with pytest.raises(ValueError, match=name.replace("9 ", f"{clips[1]} ").replace("9,", f"{clips[1]},")) as error:
        run(script, clips, tmp_path, n_seen=clips[1])
    assert "\n" not in str(error.value)


def test_two_frames_are_on_many_parabolas(tmp_path):
    """The true path before them is not known; what was inferred is drawn alone."""
    data = simulate(replace(load_pretrained().config.data, n_frames=2), 6, seed=2)
    path = tmp_path / "two.npz"
    save_sequences(path, data)
    run(ask, (path, 2), tmp_path, question="retrodict", n_samples=2)
    assert (tmp_path / "retrodict.png").exists()


def test_the_gallery_leaves_out_what_needs_three_frames(tmp_path, capsys):
    data = simulate(replace(load_pretrained().config.data, n_frames=2), 6, seed=2)
    path = tmp_path / "two.npz"
    save_sequences(path, data)
    run(gallery, (path, 2), tmp_path / "g", pictures=("missing", "stream", "fan", "calibration"), n_samples=2)
    said = capsys.readouterr().out
    assert said.count("not drawn, as the sequences have only 2 frames; wanted at least 3") == 3
    assert f"  {tmp_path / 'g/fan.png'}" in said
    with pytest.raises(ValueError, match="missing: not drawn, as the sequences have only 2 frames"):
        run(gallery, (path, 2), tmp_path / "n", pictures=("missing",))
    assert not (tmp_path / "n").exists()
