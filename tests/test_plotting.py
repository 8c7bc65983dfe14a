"""Figures and GIFs: what is drawn and what is refused, without comparing pictures."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from pyro_pixels.plots import paper as plotting
from pyro_pixels.plots import style as canvas
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig

B, N, T, H, W = 3, 3, 30, 32, 32


@pytest.fixture(scope="module")
def data():
    return simulate(CannonballConfig(n_frames=T, height=H, width=W), B, seed=0)


def test_overlay_is_lighter_for_later_frames_and_later_ones_lie_on_top():
    images = torch.zeros(3, 1, 4, dtype=torch.uint8)
    for t in range(3):
        images[t, 0, t] = 1
    images[0, 0, 2] = 1  # covered by the last frame
    first, second, last, background = plotting.overlay(images)[0]
    assert background == 0 < first < second < last == 1
    assert plotting.overlay(np.full((1, 2, 2), 0.5))[0, 0] == 0.5  # one frame is the most recent, and keeps its grey


def test_plot_frames_has_a_row_a_sequence_with_its_frames_side_by_side(data):
    figure = plotting.plot_frames({"seen": data.images[0], "drawn": 0.5 * data.images[0].double()})
    seen, drawn = (ax.images[0].get_array() for ax in figure.axes)
    assert seen.shape == (H + 2, T * (W + 2))
    np.testing.assert_array_equal(seen[1:-1, W + 3 : 2 * W + 3], data.images[0, 1])
    np.testing.assert_array_equal(drawn[1:-1, W + 3 : 2 * W + 3], 0.5 * data.images[0, 1].double())
    assert [ax.texts[0].get_text() for ax in figure.axes] == ["seen", "drawn"]


def test_unobserved_frames_are_black():
    images = torch.full((1, 3, 4, 4), torch.nan)
    images[0, 0, 1, 1] = 1
    images[0, 0] = images[0, 0].nan_to_num()
    picture = plotting.plot_sequences(images).axes[0].images[0].get_array()[1:-1, 1:-1]
    np.testing.assert_allclose(picture, plotting.DARKEST * images[0, 0])
    assert images[0, 1:].isnan().all()  # the caller's are left alone


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_plot_sequences_has_an_axes_a_sequence_and_no_empty_ones(data, columns):
    assert [len(ax.images) for ax in plotting.plot_sequences(data.images, columns=columns).axes] == [1] * B


def test_absent_objects_draw_nothing(data):
    assert data.n_objects.tolist() == [1, 2, 3]
    figure = plotting.plot_trajectories(data.positions, inferred=data.paths, size=data.size)
    assert [len(ax.lines) for ax in figure.axes] == [2, 4, 6]
    everywhere = torch.zeros(B, N, T, 2)
    figure = plotting.plot_trajectories(None, everywhere, n_objects=data.n_objects)
    assert [len(ax.lines) for ax in figure.axes] == [1, 2, 3]


def test_trajectories_lie_in_the_image_with_rows_counted_downwards(data):
    ax = plotting.plot_trajectories(data.positions, size=(H, W)).axes[0]
    assert ax.get_xlim() == (0, W - 1)
    assert ax.get_ylim() == (H - 1, 0)
    column, row = ax.lines[0].get_data()
    np.testing.assert_array_equal(np.stack([column, row], -1), data.positions[0, 0])


def test_bands_are_two_standard_deviations_wide_and_only_where_there_is_a_track(data):
    sd = torch.tensor([0.5, 1.5]).expand(B, N, T, 2)
    figure = plotting.plot_trajectories(data.positions, generated=data.paths, bands={"generated": sd})
    assert [len(ax.collections) for ax in figure.axes] == [1 + 1, 2 + 2, 3 + 3]  # bands and the circles at the start
    ribbon = max(figure.axes[0].collections, key=lambda c: len(c.get_paths()))
    assert len(ribbon.get_paths()) == T
    np.testing.assert_allclose(np.ptp(ribbon.get_paths()[0].vertices, axis=0), [2.0, 6.0], rtol=0.01)


def test_images_come_below_their_trajectories(data):
    below = {"generated": data.images * 0.5, "truth": data.images}
    figure = plotting.plot_trajectories(data.positions, size=data.size, images=below, columns=2)
    assert len(figure.axes) == 2 * B
    pictures = [ax for ax in figure.axes if ax.images]
    assert len(pictures) == B
    assert [text.get_text() for text in pictures[0].texts] == ["generated", "truth"]


def test_inferred_positions_in_latent_units_have_their_own_scale(data):
    latent = 100 * data.positions
    truth, inferred = plotting.plot_positions(data.positions, latent).axes[:2]
    assert truth.yaxis_inverted()
    assert not inferred.yaxis_inverted()
    assert inferred.get_xlim()[1] > 10 * truth.get_xlim()[1]
    assert [len(ax.lines) for ax in plotting.plot_positions(latent, latent, size=(H, W)).axes[:2]] == [1, 2]


def test_models_have_rows_of_their_own(data):
    figure = plotting.plot_generated_images({"ours": data.images, "other": data.images}, data.images, rows=2)
    names = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert sum(len(ax.images) for ax in figure.axes) == 2 * B
    assert names.count("ours") == names.count("other") == 1


def test_the_other_figures_draw_what_they_are_given(data):
    latent = torch.randn(B, 2, T, 2, requires_grad=True)
    start = plotting.plot_start(latent[0], latent[1])
    assert [len(c.get_offsets()) for c in start.axes[0].collections] == [T] * 4
    means = plotting.plot_inference_means({"early": latent, "late": latent.double()})
    assert [(ax.get_title(), len(ax.lines)) for ax in means.axes] == [("early", 2 * B), ("late", 2 * B)]

    error = np.linspace(0, 1, T)
    figure = plotting.plot_error_over_time({"generated": error, "ED-LSTM": error}, floors={"generated": error})
    assert len(figure.axes[0].lines) == 3
    assert figure.axes[0].lines[0].get_color() == canvas.GENERATED
    assert [text.get_text() for text in figure.legends[0].texts] == ["generated", "ED-LSTM", "floor"]

    keys = ("bound_per_frame", "log_likelihood_per_frame", "kl_per_frame", "kl_weight")
    metrics = [{"step": step, **dict.fromkeys(keys, 1.0)} for step in (10, 20)]
    metrics[1]["validation_bound_per_frame"] = 0.5
    assert [len(ax.lines) for ax in plotting.plot_training(metrics).axes] == [3, 1, 1]
    assert [len(ax.lines) for ax in plotting.plot_training(metrics[:1]).axes] == [2, 1, 1]


@pytest.mark.parametrize("unknown", [None, math.nan, -math.inf])
def test_curves_have_gaps_where_values_are_not_known(unknown):
    keys = ("bound_per_frame", "validation_bound_per_frame", "log_likelihood_per_frame", "kl_per_frame", "kl_weight")
    metrics = [{"step": step, **dict.fromkeys(keys, float(step))} for step in (1, 10, 20, 30)]
    metrics[1] |= {"validation_bound_per_frame": unknown, "kl_per_frame": unknown}
    ax = plotting.plot_training(metrics).axes
    assert np.isnan(ax[0].lines[1].get_ydata()).tolist() == [False, True, False, False]
    assert np.isnan(ax[1].lines[0].get_ydata()).tolist() == [False, True, False, False]
    assert np.allclose(ax[0].get_ylim(), (10 - 1 - 1e-3, 30 + 1 + 1e-3))  # without the first step
    for line in metrics:
        line |= dict.fromkeys(keys, unknown)
    assert len(plotting.plot_training(metrics).axes) == 3
    [curve] = plotting.plot_learning_curves({"a": [[(1.0, 2.0), (2.0, unknown)]]}).axes[0].lines
    assert np.isfinite(curve.get_ydata()).tolist() == [True, False]


@pytest.mark.parametrize("seen", [3, slice(3), [0, 1, 2], torch.arange(3), np.arange(T) < 3])
def test_the_frames_seen_are_shaded(seen):
    shades = plotting.plot_error_over_time({"x": np.ones(T)}, seen=seen).axes[0].patches
    assert [shade.get_x() + 0.5 for shade in shades] == [1, 2, 3]  # frames count from 1, as in the paper


def test_frames_seen_by_interpolation_only_are_shaded_apart():
    ends = [0, T - 1]
    figure = plotting.plot_error_over_time({"generated": np.ones(T)}, seen=1, seen_by_interpolation=ends)
    first, last = figure.axes[0].patches
    assert (first.get_x() + 0.5, last.get_x() + 0.5) == (1, T)
    assert first.get_facecolor() != last.get_facecolor()
    assert [text.get_text() for text in figure.legends[0].texts][-2:] == ["seen", "seen by interpolation only"]


def test_a_gif_has_a_page_a_frame_and_marks_the_frames_seen(tmp_path):
    still = torch.zeros(T, H, W)  # equal frames must not be merged
    plotting.gif(tmp_path / "a.gif", {"a": still, "b": still}, scale=3, mark={"b": 3})
    seen = np.round(255 * np.array(to_rgb(canvas.SEEN)))
    marked = []
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == T
        assert gif.info["loop"] == 0
        assert gif.info["duration"] == 80
        for t in range(T):
            gif.seek(t)
            marked.append(bool((np.asarray(gif.convert("RGB")) == seen).all(-1).any()))
    assert marked == [t < 3 for t in range(T)]


def test_a_gif_stacks_sequences_and_keeps_every_pixel(tmp_path):
    images = np.zeros((2, 2, 4, 4))
    images[1, 1, 0, 0] = 1  # in the second sequence, last frame
    plotting.gif(tmp_path / "a.gif", {"x": images}, scale=5)
    black = []
    with Image.open(tmp_path / "a.gif") as gif:
        for t in range(2):
            gif.seek(t)
            black.append(int((np.asarray(gif.convert("L")) == 0).sum()))
    assert black == [2 * 20 * 20, 2 * 20 * 20 - 5 * 5]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda d: plotting.overlay(d.images), r"images has shape \(3, 30, 32, 32\); wanted \(T, H, W\)"),
        (lambda d: plotting.plot_sequences(255 * d.images), "values from 0 to 255; wanted 0 to 1"),
        (lambda d: plotting.overlay([[[0.5, np.nan]]]), "NaN in part of a frame"),
        (lambda d: plotting.plot_sequences(d.images, titles=["one"]), "1 titles for 3 sequences"),
        (lambda d: plotting.plot_trajectories(d.positions[..., 0]), r"\(3, 3, 30\); wanted \(B, N, T, 2\)"),
        (
            lambda d: plotting.plot_trajectories(d.positions, d.positions[:, :, 1:]),
            r"inferred has shape \(3, 3, 29, 2\); wanted \(B, N, T, 2\) = \(3, 3, 30, 2\)",
        ),
        (lambda d: plotting.plot_trajectories(None), "wanted at least one"),
        (lambda d: plotting.plot_trajectories(d.positions, n_objects=[1, 2]), r"shape \(2,\); wanted \(3\)"),
        (lambda d: plotting.plot_trajectories(d.paths, bands={"inferred": d.paths}), r"wanted some of \['truth'\]"),
        (lambda d: plotting.plot_trajectories(d.paths, images={"truth": d.images[:2]}), r"wanted \(3, T, H, W\)"),
        (lambda d: plotting.plot_error_over_time({"x": [1.0, 2.0]}, seen=[2]), "of 2 frames"),
        (lambda d: plotting.plot_training([{"step": 1}]), "kl_weight"),
        (lambda d: plotting.gif("never.gif", {"x": d.images[0]}, mark={"y": 5}), r"wanted some of \['x'\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_wanted(data, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(data)


def test_a_file_that_cannot_be_finished_leaves_the_old_one(data, tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    plotting.save_figure(plotting.plot_sequences(data.images), path)
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG")

    def break_off(self, file, **options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", break_off)
    with pytest.raises(OSError, match="disk full"):
        plotting.save_figure(Figure(), path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def test_settings_and_pyplot_are_left_alone(data, tmp_path):
    before = dict(matplotlib.rcParams)
    plotting.save_figure(plotting.plot_trajectories(data.positions, size=data.size), tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


def test_learning_curves_have_a_line_a_seed_and_marks_in_their_colour():
    curves = {"N = 1": [[(1.0, 3.0), (10.0, 0.5)], [(1.0, 2.0)]], "N = 2": [[(2.0, 4.0), (20.0, 1.0)]]}
    figure = plotting.plot_learning_curves(curves, {"N = 2, others": (300.0, 1.4)})
    (ax,) = figure.axes
    assert len(ax.lines) == 4
    assert ax.lines[-1].get_color() == ax.lines[2].get_color()
    assert ax.lines[-1].get_xydata().tolist() == [[300.0, 1.4]]
    with pytest.raises(ValueError, match="no evaluations"):
        plotting.plot_learning_curves({"N = 1": []})
