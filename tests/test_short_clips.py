"""Sequences shorter than twice the frames that are usually seen: every default command works on them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import ask
import evaluate
import gallery
import generate
import infer
import interpolate
import to_arviz
import train
from pyro_pixels.data import ImageSequences, save_sequences
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
