"""Figures of answers: what is drawn lies where it should."""

import numpy as np
import pytest
from matplotlib.quiver import Quiver
from scipy.stats import chi2

from pyro_pixels.plots.answers import (
    RADIUS_95,
    plot_counts,
    plot_evidence,
    plot_fan,
    plot_moves,
    plot_over_time,
    plot_regions,
    plot_reliability,
    plot_starts,
)
from pyro_pixels.plots.paper import plot_error_over_time, save_figure

B, N, T = 2, 2, 5
rng = np.random.default_rng(0)
root = rng.normal(size=(B, N, T, 2, 2))
cov = root @ root.swapaxes(-1, -2) + np.eye(2)
mean = rng.normal(size=(B, N, T, 2))
known = np.arange(T) < np.full((B, N, 1), 3)


def test_regions_are_those_of_chi2():
    """Every outline lies at the Mahalanobis distance that holds 95 %."""
    assert pytest.approx(chi2.ppf(0.95, 2)) == RADIUS_95**2
    axes = plot_regions(mean, cov, known=known, truth=mean).axes
    assert len(axes) == B
    for b, ax in enumerate(axes):
        collections = [c for c in ax.collections if len(c.get_paths()) > 1]
        outlines = [p.vertices[:-1] for c in collections[: 3 * N] for p in c.get_paths() if len(p.vertices) > 30]
        wanted = [(n, t) for n in range(N) for t in range(T)]
        assert len(outlines) == len(wanted)
        for outline, (n, t) in zip(outlines, wanted):
            e = outline - mean[b, n, t]
            distance = np.einsum("pi,ij,pj->p", e, np.linalg.inv(cov[b, n, t]), e)
            np.testing.assert_allclose(distance, RADIUS_95**2, rtol=1e-6)


def test_absent_objects_and_nan_are_not_drawn():
    a = mean.copy()
    a[0, 0, 2] = np.nan
    axes = plot_regions(a, cov, known=known, n_objects=[2, 1]).axes
    shapes = [sum(len(p.vertices) > 30 for c in ax.collections for p in c.get_paths()) for ax in axes]
    assert shapes == [2 * T - 1, T]


def test_bands_reach_two_standard_deviations():
    x, sd = rng.normal(size=(3, T)), rng.uniform(0.5, 1, size=(3, T))
    figure = plot_over_time({"so far": x}, {"so far": sd}, truth=x, titles=["a", "b", "c"], label="y", seen=x > 0)
    for r, ax in enumerate(figure.axes):
        vertices = ax.collections[0].get_paths()[0].vertices
        assert vertices[:, 1].max() == pytest.approx((x[r] + 2 * sd[r]).max())
        assert vertices[:, 1].min() == pytest.approx((x[r] - 2 * sd[r]).min())
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), x[r])


def test_reliability_has_a_diagonal_and_every_curve():
    levels = np.linspace(0.1, 0.9, 5)
    (ax,) = plot_reliability({"smoothing": (levels, levels**2), "smoothing, corrected": (levels, levels)}).axes
    diagonal, raw, corrected = ax.lines
    np.testing.assert_array_equal(raw.get_ydata(), levels**2)
    np.testing.assert_array_equal(corrected.get_xdata(), corrected.get_ydata())
    assert raw.get_color() == corrected.get_color()
    assert (raw.get_linestyle(), corrected.get_linestyle()) == ("-", "--")
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]


def test_counts_are_counted():
    evidence = np.array([[0.0, 9.0, 5.0], [0.0, 9.0, 5.0], [0.0, 2.0, 8.0]])
    left, right = plot_counts([1, 2, 2], [1, 1, 2], evidence).axes
    table = np.array([int(t.get_text()) for t in left.texts]).reshape(3, 3)
    np.testing.assert_array_equal(table, [[0, 0, 0], [0, 1, 0], [0, 1, 1]])
    np.testing.assert_array_equal(right.lines[0].get_xdata(), [4])
    np.testing.assert_array_equal(right.lines[1].get_xdata(), [-4, 6])


def test_evidence_is_per_frame_and_sorted():
    top, below = plot_evidence([-50, -40, -60], [-30, -20, -40], [1, 2, 3], [1, 1, 2], 10).axes
    np.testing.assert_allclose(top.collections[-1].get_offsets()[:, 1], [-2, -3, -4])
    assert [bar.get_height() for bar in below.patches] == [2, 1, 3]
    top, _ = plot_evidence([-50, -40, -60], [-30, -20, -40], [1, 2, 3], [1, 1, 2], [10, 5, 20]).axes
    np.testing.assert_allclose(top.collections[-1].get_offsets()[:, 1], [-4, -3, -2])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_regions(mean, cov[..., 0], known=known),
        lambda: plot_regions(mean, cov, known=known[:, :, :2]),
        lambda: plot_over_time({"x": mean[0, 0]}, {"y": mean[0, 0]}),
        lambda: plot_reliability({"smoothing": ([0.1, 0.2], [0.1])}),
    ],
    ids=["covariances", "mask", "names", "lengths"],
)
def test_bad_input(draw):
    with pytest.raises(ValueError):
        draw()


def test_arrows_are_the_moves_of_so_many_frames():
    moves = rng.normal(size=(B, N, T, 2))
    axes = plot_moves(mean, moves, truth=(mean, 2 * moves), n_objects=[2, 1], every=2, stretch=3.0).axes
    arrows = [c for c in axes[0].collections if isinstance(c, Quiver)]
    assert len(arrows) == 2 * N
    for n in range(N):
        for arrow, factor in zip(arrows[2 * n : 2 * n + 2], (1, 2)):
            np.testing.assert_allclose(np.stack([arrow.U, arrow.V], -1), factor * moves[0, n, ::2])
            np.testing.assert_allclose(arrow.get_offsets(), mean[0, n, ::2])
            assert arrow.scale == pytest.approx(1 / 3)
    absent = [c for c in axes[1].collections if isinstance(c, Quiver)][2]
    assert np.all(absent.Umask)


def test_starts_lie_in_the_colour_of_their_component():
    centres, spreads = rng.normal(size=(2, 4)), np.stack([np.diag([1.0, 2, 3, 4])] * 2)
    found, component = rng.normal(size=(6, 4)), np.array([0, 1, 1, 0, 1, 0])
    figure = plot_starts(centres, spreads, found, component, sides=[0, 0, 1, 1, 0, 1], size=(32, 32))
    for ax, i in zip(figure.axes, (0, 2)):
        for k, outline in enumerate(ax.lines):
            e = (outline.get_xydata() - centres[k, i : i + 2]) ** 2 / spreads[k].diagonal()[i : i + 2]
            np.testing.assert_allclose(e.sum(-1), RADIUS_95**2, rtol=1e-9)
        dots = np.concatenate([c.get_offsets() for c in ax.collections])
        colours = np.concatenate([c.get_facecolors() for c in ax.collections])
        order = [0, 1, 4, 2, 3, 5]  # by side
        np.testing.assert_allclose(dots, found[order, i : i + 2])
        same = (colours[:, None] == colours).all(-1)
        np.testing.assert_array_equal(same, component[order][:, None] == component[order])


def test_a_fan_begins_at_the_last_seen_frame():
    samples, images = rng.normal(size=(3, B, N, T, 2)), rng.uniform(size=(B, T, 6, 8))
    figure = plot_fan(samples, n_seen=2, images=images, truth=mean, n_objects=[2, 1], titles=["a", "b"])
    first, second = figure.axes
    assert (len(first.lines), len(second.lines)) == (3 * 2 + 2, 3 + 1)
    np.testing.assert_allclose(first.lines[0].get_xydata(), samples[0, 0, 0, 1:])
    assert first.get_xlim() == (0, 7)
    assert first.images[0].get_array().shape == (6, 8)
    assert len(plot_fan(samples, n_seen=2).axes[0].lines) == 3 * N


@pytest.mark.parametrize("n", [1, 2, 3])
def test_legends_lie_within_the_figure_and_so_do_titles(tmp_path, n):
    T = 30
    a = np.cumsum(np.ones((n, N, T, 2)), 2)
    region = np.broadcast_to(np.eye(2), (n, N, T, 2, 2))
    seen, titles, size = np.ones((n, N, T)), ["sequence 1, N = 2"] * n, (32, 32)
    line = dict.fromkeys(("given the frames so far", "in hindsight"), a[:, 0, :, 0])
    curve = {name: ([0.1, 0.9], [0.1, 0.9]) for name in ("interpolation", "interpolation, corrected", "forecasting")}
    for figure in (
        plot_regions(a, region, known=seen, truth=a, size=size, titles=titles),
        plot_fan(np.stack([a, a]), n_seen=5, truth=a, images=np.zeros((n, T, 32, 32))),
        plot_moves(a, a, truth=(a, a), size=size),
        plot_over_time(line, line, truth=a[:, 0, :, 0], seen=np.ones((n, T)), titles=titles),
        plot_reliability(curve),
    ):
        save_figure(figure, tmp_path / "x.png")
        figure.draw_without_rendering()
        inside = figure.bbox.padded(1)
        for part in (*figure.legends, *(ax.title for ax in figure.axes if ax.get_title())):
            box = part.get_window_extent()
            assert inside.x0 <= box.x0 <= box.x1 <= inside.x1
            assert inside.y0 <= box.y0 <= box.y1 <= inside.y1


def test_frames_and_sequences_have_whole_numbers():
    two = np.ones((1, 2))
    time = plot_over_time({"x": two}, {"x": two}).axes[0]
    below = plot_evidence(two[0], two[0], two[0], [1, 2], 2).axes[1]
    alone = plot_evidence([1.0], [1.0], [1.0], [1], 2).axes[1]
    for ax in (time, below, alone, plot_error_over_time({"x": two[0]}).axes[0]):
        assert all(float(x).is_integer() for x in ax.get_xticks())
    assert below.get_xlabel() == "sequences, sorted"
