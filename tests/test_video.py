"""Films of every kind that people have, to sequences and back to their own pixels."""

import csv
import io
import re
import struct
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image, ImageFile

import prepare
import simulate
from pyro_pixels import load_sequences
from pyro_pixels.data import ImageSequences
from pyro_pixels.plots.film import plot_contact_sheet
from pyro_pixels.video import (
    check_film,
    draw_tracks_gif,
    formats,
    load_source,
    load_video,
    prepare_video,
    read_films,
    save_prepared,
    track_rows,
    write_csv,
)
from pyro_pixels.video.formats import collect

iio = pytest.importorskip("imageio.v3")
pytest.importorskip("skimage")
pytest.importorskip("av")
tifffile = pytest.importorskip("tifffile")

H, W, T = 48, 64, 12
Y, X = np.mgrid[:H, :W]


def centre(t, k=0):
    return 12 + 3.5 * t, 14 + 1.5 * t + 12 * k


def film(n=1, *, dark=False, noise=0.02, seed=0):
    """(T, H, W) float: anti-aliased discs that move."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((T, H, W))
    for t in range(T):
        for k in range(n):
            column, row = centre(t, k)
            frames[t] = np.maximum(frames[t], np.clip(5.5 - np.hypot(X - column, Y - row), 0, 1))
    frames = 0.15 + 0.7 * frames + rng.normal(0, noise, frames.shape)
    return (1 - frames if dark else frames).clip(0, 1)


def centroids(v):
    """(T, 2), (column, row), of grey values (T, H, W)."""
    mass, (y, x) = v.sum((1, 2)), np.mgrid[: v.shape[1], : v.shape[2]]
    return np.stack([(v * g).sum((1, 2)) / mass for g in (x, y)], -1)


BYTES = (255 * film()).astype(np.uint8)
COLOUR = np.repeat(BYTES[..., None], 3, -1)


def write_folder(path, suffix):
    path.mkdir()
    for t, frame in enumerate(BYTES):  # 1, 2, ..., 10, 11: natural order is that of time
        iio.imwrite(path / f"frame{t}{suffix}", frame)
    return path


KINDS = {
    "gif": lambda d: iio.imwrite(d / "a.gif", BYTES) or d / "a.gif",
    "apng": lambda d: iio.imwrite(d / "a.apng", BYTES, plugin="pillow", extension=".png") or d / "a.apng",
    "mp4": lambda d: iio.imwrite(d / "a.mp4", COLOUR, plugin="pyav", codec="libx264", fps=25) or d / "a.mp4",
    "mov": lambda d: iio.imwrite(d / "a.mov", COLOUR, plugin="pyav", codec="libx264", fps=25) or d / "a.mov",
    "avi": lambda d: iio.imwrite(d / "a.avi", COLOUR, plugin="pyav", codec="mpeg4", fps=25) or d / "a.avi",
    "tiff": lambda d: tifffile.imwrite(d / "a.tif", BYTES, photometric="minisblack") or d / "a.tif",
    "tiff of 16 bits": lambda d: tifffile.imwrite(d / "a.tif", (film() * 4095).astype(np.uint16)) or d / "a.tif",
    "folder of png": lambda d: write_folder(d / "f", ".png"),
    "folder of jpeg": lambda d: write_folder(d / "f", ".jpg"),
    "folder of tiff": lambda d: write_folder(d / "f", ".tif"),
    "glob": lambda d: str(write_folder(d / "f", ".png") / "frame*.png"),
    "npy": lambda d: np.save(d / "a.npy", film()) or d / "a.npy",
    "npy of bytes": lambda d: np.save(d / "a.npy", BYTES) or d / "a.npy",
    "npy with colour": lambda d: np.save(d / "a.npy", COLOUR) or d / "a.npy",
    "npy, colour first": lambda d: np.save(d / "a.npy", COLOUR.transpose(0, 3, 1, 2)) or d / "a.npy",
    "npz of one": lambda d: np.savez(d / "a.npz", images=BYTES[None]) or d / "a.npz",
    "npy of bool": lambda d: np.save(d / "a.npy", film() > 0.5) or d / "a.npy",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_film_gives_the_same_sequence(tmp_path, kind):
    data = load_video(KINDS[kind](tmp_path), n_objects=1, size=32)
    assert data.images.shape == (1, T, 32, 32)  # 24 x 32, and black above and below
    assert data.images[:, :, :4].sum() == data.images[:, :, -4:].sum() == 0
    mass = data.images[0].numpy()
    for t in range(T):
        rows, columns = np.nonzero(mass[t])
        column, row = ((c + 0.5) / 2 - 0.5 for c in centre(t))
        assert abs(columns.mean() - column) < 0.6
        assert abs(rows.mean() - (row + 4)) < 0.6
    assert 10 < mass.sum((1, 2)).mean() < 30  # a disc of radius 2.5


def test_dark_objects_are_found_and_said(tmp_path):
    np.save(tmp_path / "dark.npy", film(dark=True))
    prepared = prepare_video(tmp_path / "dark.npy", n_objects=1)
    assert "objects are darker than the background, inverted" in prepared.notes
    bright = load_video(KINDS["npy"](tmp_path), n_objects=1)
    assert (prepared.data.images != bright.images).float().mean() < 0.01
    wrong = load_video(tmp_path / "dark.npy", n_objects=1, invert=False, background="keep")
    inside = bright.images.bool()
    assert wrong.images[inside].float().mean() < 0.1  # asked for the ground, it gives no object


LAMP = np.exp(-(((Y - 24) / 22) ** 2) - ((X - 32) / 28) ** 2)
WALL = np.where((X < 4) | (Y > 43), 1.0, 0.0)


@pytest.mark.parametrize(
    "frames, dark",
    [
        (0.1 + 0.8 * LAMP * (1.1 - 0.8 * film()), True),
        (0.1 + 0.5 * LAMP + 0.4 * film(), False),
        (np.maximum(0.6 - 0.4 * film(), WALL), True),
        (np.where(WALL > 0, 0, 0.3 + 0.5 * film()), False),
    ],
    ids=["dark before a lamp", "bright before a lamp", "dark beside a white wall", "bright beside a black wall"],
)
def test_a_still_background_does_not_decide_which_side_is_bright(tmp_path, frames, dark):
    np.save(tmp_path / "a.npy", frames.clip(0, 1))
    prepared = prepare_video(tmp_path / "a.npy")
    assert prepared.data.n_objects.tolist() == [1]
    assert any(f"objects are {'darker' if dark else 'brighter'}" in note for note in prepared.notes)
    found = prepared.source.to_source(centroids(prepared.data.images[0].numpy().astype(float)))
    assert np.median(np.abs(found - [centre(t) for t in range(T)])) < 1


@pytest.mark.parametrize("options, wanted", [([], None), (["--invert"], True), (["--no-invert"], False)])
def test_the_script_takes_either_side_or_guesses(options, wanted):
    assert tyro.cli(prepare.Arguments, args=["film.gif", *options, "--grey"]).invert is wanted


def test_a_background_taken_for_objects_is_warned_of(tmp_path):
    np.save(tmp_path / "a.npy", 0.1 + 0.8 * LAMP * (1.1 - 0.8 * film()))
    warnings = check_film(load_video(tmp_path / "a.npy", n_objects=1, invert=False, background="keep"))
    assert any("white pixels hardly change over time" in line for line in warnings)


def test_a_still_background_is_subtracted(tmp_path):
    background = 0.5 * np.exp(-((X - 40) ** 2 + (Y - 10) ** 2) / 60)
    np.save(tmp_path / "a.npy", np.maximum(film(), background))
    prepared = prepare_video(tmp_path / "a.npy")
    assert "the median over time was subtracted" in prepared.notes
    assert prepared.data.n_objects.tolist() == [1]
    assert prepared.data.images[0, :, 9, 20].float().mean() < 0.2


def test_what_is_larger_than_objects_is_subtracted_where_it_is_asked_for(tmp_path):
    """Light that changes from frame to frame, and a blur that moves, are in no median over time."""
    light = 0.3 * np.sin(np.arange(T))[:, None, None] * (X / W)
    blur = [0.3 * np.exp(-((X - 50 + t) ** 2 + (Y - 10) ** 2) / 200) for t in range(T)]
    np.save(tmp_path / "a.npy", (film(noise=0.0) + light + np.stack(blur)).clip(0, 1.3) / 1.3)
    prepared = prepare_video(tmp_path / "a.npy", n_objects=1, grey=True, background="local")
    assert any("larger than a quarter of the image" in note for note in prepared.notes)
    images = prepared.data.images[0].numpy()
    for t in range(T):
        column, row = ((c + 0.5) / 2 - 0.5 for c in centre(t))
        far = np.hypot(np.arange(32) - column, np.arange(32)[:, None] - row - 4) > 5
        assert images[t][far].max() < 0.25
        assert images[t][~far].max() > 0.6
    plain = load_video(tmp_path / "a.npy", n_objects=1, grey=True, background="keep")
    assert float(plain.images[0, :, 4:14, 20:30].mean()) > 0.1
    with pytest.raises(ValueError, match="background is 'mean'; wanted one of keep, median, local"):
        load_video(tmp_path / "a.npy", n_objects=1, background="mean")


@pytest.mark.parametrize("zoom, lost", [(1, False), (6, True)])
def test_a_film_that_is_shrunk_until_objects_are_lost_says_so(tmp_path, zoom, lost):
    np.save(tmp_path / "a.npy", film().repeat(zoom, 1).repeat(zoom, 2).astype(np.float32))
    notes = prepare_video(tmp_path / "a.npy", n_objects=1).notes
    assert any(f"a pixel stands for {2 * zoom} x {2 * zoom} of the film's" in note for note in notes) == lost


def test_objects_are_counted_film_by_film_and_long_films_cut(tmp_path):
    for n in (1, 2):
        np.save(tmp_path / f"{n}.npy", film(n))
    prepared = prepare_video([tmp_path / "1.npy", tmp_path / "2.npy"], frames=6, stride=3)
    assert prepared.data.n_objects.tolist() == [1, 1, 1, 2, 2, 2]
    assert prepared.source.first_frames == ((0, 0), (0, 3), (0, 6), (1, 0), (1, 3), (1, 6))
    assert any("n_objects was counted: 100%" in note for note in prepared.notes)
    assert not any("in no sequence" in note for note in prepared.notes)
    notes = prepare_video(tmp_path / "1.npy", frames=5, stride=4).notes  # 0 to 8 of 12
    assert any("3 frames at the ends of films are in no sequence" in note for note in notes)
    given = load_video([tmp_path / "1.npy", tmp_path / "2.npy"], frames=6, stride=3, n_objects=[1, 3])
    assert given.n_objects.tolist() == [1, 1, 1, 3, 3, 3]


def test_numbers_of_objects_beside_the_images_are_kept(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.stack([film(1), film(2)]), n_objects=np.array([3, 2]))
    prepared = prepare_video(tmp_path / "a.npz")
    assert prepared.data.n_objects.tolist() == [3, 2]
    assert any("n_objects is read from the file" in note for note in prepared.notes)
    assert load_video(tmp_path / "a.npz", n_objects=1).n_objects.tolist() == [1, 1]
    np.savez(tmp_path / "b.npz", images=np.stack([film(1), film(2)]), n_objects=np.array([[3, 2]]))
    assert load_video(tmp_path / "b.npz").n_objects.tolist() == [1, 2]  # what is no number a film is not taken for it


def test_films_of_unequal_length_are_padded(tmp_path):
    np.save(tmp_path / "a.npy", film())
    np.save(tmp_path / "b.npy", film()[:9])
    prepared = prepare_video([tmp_path / "a.npy", tmp_path / "b.npy"], n_objects=1)
    assert prepared.data.seen.sum(1).tolist() == [12, 9]
    assert any(note.startswith("2 films of 9 to 12 frames, ") for note in prepared.notes)
    assert prepared.notes[-1] == "2 sequences of 9 to 12 frames, padded to 12 with unobserved frames; N: {1: 2}"


@pytest.mark.parametrize(
    "options, films, sequences",
    [({}, "1 film of 12 frames", "1 sequence of 12 frames; "), ({"frames": 6}, "1 film of 12", "3 sequences of 6 fr")],
)
def test_lengths_are_said(tmp_path, options, films, sequences):
    np.save(tmp_path / "a.npy", film())
    notes = prepare_video(tmp_path / "a.npy", n_objects=1, **options).notes
    assert any(note.startswith(films) for note in notes)
    assert notes[-1].startswith(sequences)


def test_grey_values_are_kept_where_they_are_asked_for(tmp_path):
    data = load_video(KINDS["npy"](tmp_path), n_objects=1, grey=True)
    assert data.images.dtype.is_floating_point
    assert 0.4 < float(data.images.max()) <= 1


@pytest.mark.parametrize(
    "content, options, message",
    [
        (film() * 7 - 3, {}, "has values from -2.* wanted bytes, or numbers from 0 to 1"),
        (film()[0], {}, r"has shape \(48, 64\); wanted \(T, H, W\)"),
        (film()[:1], {}, "a film has 1 frame"),
        (film(), {"axes": "HWX"}, "axes is 'HWX'"),
        (film(), {"crop": (0, 50, 0, 64)}, "wanted .top, bottom, left, right."),
        (film(), {"n_objects": [1, 2]}, "n_objects has length 2 for 1 sequences of 1 films"),
        (film(), {"n_objects": 0}, "every sequence needs at least 1 object"),
        (film(), {"n_objects": 1.5}, "n_objects is 1.5; wanted a whole number, or a list of them"),
        (film(), {"n_objects": [1.7]}, r"n_objects is \[1.7\]; wanted a whole number"),
        (film(), {"n_objects": [[1], [2, 3]]}, "n_objects is .*; wanted a whole number"),
        (film(), {"n_objects": "2"}, "n_objects is '2'; wanted a whole number"),
        (film(), {"n_objects": np.nan}, "n_objects is nan; wanted a whole number"),
        (film(), {"crop": (0, 40.5, 0, 60)}, "crop is .*; wanted a whole number, or a list of them"),
        (film(), {"crop": (0, 40, 0)}, "crop is .0, 40, 0.; wanted .top, bottom, left, right."),
        (film(), {"crop": 3}, "crop is 3; wanted .top, bottom, left, right."),
        (film(), {"threshold": -1}, "threshold is -1; wanted a finite number of at least 0, at most 1"),
        (film(), {"size": 30.5}, "size is 30.5; wanted a whole number of at least 8"),
        (film(), {"frames": "6"}, "frames is '6'; wanted a whole number of at least 2"),
        (film(), {"frames": 6, "stride": 0}, "stride is 0; wanted a whole number of at least 1"),
        (film(), {"frames": 40}, "wanted from 2 to the length of the longest film, 12"),
        (np.zeros((5, 9, 9)), {}, "nothing moves or stands out"),
    ],
)
def test_what_cannot_be_prepared_is_said_in_one_line(tmp_path, content, options, message):
    np.save(tmp_path / "a.npy", content)
    with pytest.raises(ValueError, match=message) as error:
        load_video(tmp_path / "a.npy", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("paths", [film(), 3, [film()], b"a.npy", None])
def test_what_is_no_path_is_said(paths):
    with pytest.raises(ValueError, match=r"paths has a .*; wanted names of files, folders or globs"):
        load_video(paths)


@pytest.mark.parametrize("n", [np.int64(2), torch.tensor(2), 2.0, np.array([2]), torch.tensor([2]), [2.0], (2,)])
def test_whole_numbers_of_any_type_are_taken(tmp_path, n):
    np.save(tmp_path / "a.npy", film())
    prepared = prepare_video(tmp_path / "a.npy", n_objects=n, crop=np.array([0.0, 48, 0, 64]))
    assert prepared.data.n_objects.tolist() == [2]
    save_prepared(tmp_path / "mine.npz", prepared)
    assert load_source(tmp_path / "mine.npz") == prepared.source


def test_a_threshold_of_grey_films_is_said_to_serve_the_count(tmp_path):
    np.save(tmp_path / "a.npy", film())
    notes = prepare_video(tmp_path / "a.npy", grey=True, threshold=0.3).notes
    assert any("grey values are kept" in note and "threshold 0.30 only serves to count" in note for note in notes)


def test_wrong_paths_and_broken_files(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no film")
    (tmp_path / "notes.txt").write_text("no film")
    wrong = {"nowhere.gif": "no file", "a.mp4": "cannot be read", "notes.txt": "unknown format", "*.jpg": "no pictures"}
    for path, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            load_video(str(tmp_path / path))


def write_pictures(path, frames, name="f{}.png"):
    path.mkdir()
    for t, frame in enumerate(frames):
        (frame if isinstance(frame, Image.Image) else Image.fromarray(frame)).save(path / name.format(t))
    return path


def write_pages(path, pages):
    with tifffile.TiffWriter(path) as file:
        for page in pages:
            file.write(page, photometric="minisblack", contiguous=False)
    return path


UNUSUAL = {
    "grey with alpha": lambda d: write_pictures(d / "f", [Image.fromarray(x).convert("LA") for x in BYTES]),
    "superscripts in names": lambda d: write_pictures(d / "f", BYTES, "f{}\u00b2.png"),
    "pages written one by one": lambda d: write_pages(d / "a.tif", BYTES),
    "chunks of pages": lambda d: write_pages(d / "a.tif", np.split(BYTES, [5])),
    "a TIFF with a thumbnail": lambda d: with_thumbnail(d / "a.tif"),
    "colours in planes": lambda d: (
        tifffile.imwrite(d / "a.tif", np.moveaxis(COLOUR, -1, 1), photometric="rgb", planarconfig="separate")
        or d / "a.tif"
    ),
    "hidden files of macOS": lambda d: [
        write_pictures(d / "f", BYTES), (d / "f/._f0.png").write_bytes(b"junk")
    ] and d / "f",
}  # fmt: skip


def with_thumbnail(path):
    with tifffile.TiffWriter(path) as file:
        file.write(BYTES, photometric="minisblack")
        file.write(BYTES[0, ::8, ::8], subfiletype=1, photometric="minisblack")
    return path


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_files_are_read_whole(tmp_path, kind):
    (found,) = read_films(UNUSUAL[kind](tmp_path))
    assert np.array_equal(found, BYTES / np.float32(255))


def test_a_folder_of_animations_is_several_films(tmp_path):
    for name in "ab":
        iio.imwrite(tmp_path / f"{name}.png", BYTES, plugin="pillow")
    assert [len(f) for f in read_films(tmp_path)] == [T, T]


def test_bits_among_bytes_are_white(tmp_path):
    bits = BYTES > 100
    (found,) = read_films(write_pictures(tmp_path / "f", [*bits[:6], *(bits[6:] * np.uint8(255))]))
    assert np.array_equal(found, bits)


def test_positions_of_the_stage_are_several_films(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as file:
        for frames in (BYTES, BYTES[:5]):
            file.write(frames, photometric="minisblack", metadata={"axes": "TYX"})
    assert [len(f) for f in read_films(tmp_path / "a.ome.tif")] == [T, 5]


def test_four_axes_are_films_or_colours_first(tmp_path):
    films = np.stack([BYTES[:3]] * 5)
    np.save(tmp_path / "a.npy", films)
    assert [f.shape for f in read_films(tmp_path / "a.npy")] == [(5, H, W)]
    assert [f.shape for f in read_films(tmp_path / "a.npy", axes="NTHW")] == [(3, H, W)] * 5
    np.savez(tmp_path / "a.npz", images=films, n_objects=np.ones(5, int))  # a file for --data is certain
    assert [f.shape for f in read_films(tmp_path / "a.npz")] == [(3, H, W)] * 5


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda d: write_pictures(d / "f", [*BYTES[:6], *BYTES[6:].astype(np.uint16)]), "differ in type, .*uint16"),
        (lambda d: write_pictures(d / "f", [*BYTES[:6], *BYTES[6:, 1:]]), "f: frames differ in size"),
        (lambda d: write_pages(d / "a.tif", [*BYTES[:6], *BYTES[6:, 1:]]), r"a.tif: frames differ in size"),
        (lambda d: gif_of_two_sizes(d / "a.gif"), r"a.gif: frames differ in size"),
        (lambda d: damaged(write_pictures(d / "f", BYTES, "f{}.tif") / "f5.tif"), r"f5.tif cannot be read"),
        (lambda d: np.save(d / "a.npy", BYTES.astype(complex)) or d / "a.npy", "type complex128; wanted numbers"),
    ],
    ids=["bits", "pictures", "pages", "gif", "damaged", "complex"],
)  # fmt: skip
def test_films_that_would_be_read_wrong_are_refused(tmp_path, write, message):
    with pytest.raises(ValueError, match=message) as error:
        read_films(write(tmp_path))
    assert "\n" not in str(error.value)


def gif_of_two_sizes(path):
    first, *rest = [Image.fromarray(x) for x in (*BYTES[:6, 4:, 4:], *BYTES[6:])]
    first.save(path, save_all=True, append_images=rest)
    return path


def damaged(path):
    path.write_bytes(b"junk")
    return path.parent


PALETTE = np.array([0, 255, 128, 200], np.uint8)
BALL = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]], np.uint8)
EMPTY = np.full((12, 20), 2, np.uint8)
KEEP, BACKGROUND, PREVIOUS = 1, 2, 3  # what a GIF does with a frame before the next


def write_gif(path, frames, background):
    """A GIF of 20 x 12 pixels: (column, row, indices into `PALETTE`, what happens to it, transparent index or None)."""
    head = struct.pack("<HHBBB", 20, 12, 0xF1, background, 0) + np.repeat(PALETTE, 3).tobytes()
    blocks = [b"GIF89a", head]
    for column, row, indices, then, transparent in frames:
        picture, compressed = Image.fromarray(indices), io.BytesIO()
        picture.encoderconfig = (8, False)
        ImageFile._save(picture, compressed, [ImageFile._Tile("gif", (0, 0, *picture.size), 0, "L")])
        flags = then << 2 | (transparent is not None)
        blocks += [b"\x21\xf9\x04", struct.pack("<BHBB", flags, 5, transparent or 0, 0)]
        blocks += [b"\x2c", struct.pack("<HHHHB", column, row, *picture.size, 0), b"\x08", compressed.getvalue(), b"\0"]
    path.write_bytes(b"".join([*blocks, b";"]))


def shown_of(frames, nothing):
    """What a viewer shows, with the grey value ``nothing`` where there is none."""
    canvas, shown = np.full((12, 20), -1), []
    for column, row, indices, then, transparent in frames:
        before, at = canvas.copy(), np.s_[row : row + len(indices), column : column + indices.shape[1]]
        canvas[at] = np.where(indices == (-1 if transparent is None else transparent), canvas[at], indices)
        shown.append(np.where(canvas < 0, nothing, PALETTE[canvas]))
        if then == BACKGROUND:
            canvas[at] = -1
        canvas = before if then == PREVIOUS else canvas
    return np.stack(shown)


@pytest.mark.parametrize("background", [0, 1, 2])
@pytest.mark.parametrize("transparent", [None, 0])
@pytest.mark.parametrize("then", [KEEP, BACKGROUND, PREVIOUS])
@pytest.mark.parametrize("whole", [False, True])
def test_gifs_of_partial_frames_are_read_as_they_are_shown(tmp_path, whole, then, transparent, background):
    """The first frame fills the canvas, or is partial itself, with nothing around it."""
    balls = [(2 + 3 * t, 4, BALL, then, transparent) for t in range(5)]
    frames = [(0, 0, EMPTY, KEEP, None), *balls] if whole else balls
    write_gif(tmp_path / "a.gif", frames, background)
    (found,) = read_films(tmp_path / "a.gif")
    nothing = PALETTE[background] if transparent is None else 0
    if whole and transparent is not None and then == BACKGROUND:
        nothing = np.round(255 * found[-1, 5, 3]).astype(int)  # any value, but the same everywhere
    assert np.array_equal(np.round(255 * found), shown_of(frames, nothing))


def test_a_gif_whose_end_is_missing_is_refused_where_its_first_frame_is_partial(tmp_path):
    write_gif(tmp_path / "a.gif", [(2 + 3 * t, 4, BALL, KEEP, None) for t in range(5)], 0)
    content = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(content[: content.rindex(b"\x2c") + 14])
    with pytest.raises(ValueError, match=r"a\.gif cannot be read .*; is it complete") as error:
        read_films(tmp_path / "a.gif")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".apng", ".webp", ".gif"])
def test_what_is_transparent_has_one_value_whichever_colours_are_hidden(tmp_path, suffix):
    """The hidden colours change from frame to frame; what shows is a disc."""
    frames = np.zeros((T, H, W, 4), np.uint8)
    for t in range(T):
        there = np.hypot(X - centre(t)[0], Y - centre(t)[1]) < 5
        frames[t] = np.where(there[..., None], [220, 220, 220, 255], [90 if t == 0 else 20 * t, 0, 0, 0])
    pictures = [Image.fromarray(frame) for frame in frames]
    options = {".webp": {"lossless": True, "exact": True}, ".gif": {"disposal": 2}}.get(suffix, {"disposal": 1})
    kind = "PNG" if suffix == ".apng" else None
    pictures[0].save(tmp_path / f"a{suffix}", kind, save_all=True, append_images=pictures[1:], **options)
    (found,) = read_films(tmp_path / f"a{suffix}")
    there = frames[..., 3] > 0
    assert found.shape == (T, H, W)
    assert np.allclose(found[there], 220 / 255, atol=0.01)
    assert len(np.unique(found[~there])) == 1


@pytest.mark.parametrize("blend", [0, 1])
def test_apngs_of_partial_frames_are_read_as_they_are_shown(tmp_path, blend):
    pictures = [Image.fromarray(frame) for frame in BYTES.clip(40)]
    pictures[0].save(tmp_path / "a.apng", "PNG", save_all=True, append_images=pictures[1:], blend=blend)
    (found,) = read_films(tmp_path / "a.apng")
    assert np.array_equal(np.round(255 * found), BYTES.clip(40))


TURNED = {
    1: lambda x: x, 2: lambda x: x[..., ::-1], 3: lambda x: x[..., ::-1, ::-1], 4: lambda x: x[..., ::-1, :],
    5: lambda x: x.swapaxes(-1, -2), 6: lambda x: x.swapaxes(-1, -2)[..., ::-1],
    7: lambda x: x[..., ::-1, ::-1].swapaxes(-1, -2), 8: lambda x: x.swapaxes(-1, -2)[..., ::-1, :],
}  # fmt: skip
"""The eight values of the tag, by what the stored rows and columns are in the picture."""


@pytest.mark.parametrize("tag", TURNED)
@pytest.mark.parametrize("kind", ["jpg", "png", "palette", "webp", "apng", "tif", "colour tif", "stack"])
def test_every_orientation_is_turned(tmp_path, kind, tag):
    grey, colour, exif = [Image.fromarray(x) for x in BYTES[:2]], Image.fromarray(COLOUR[0]), Image.Exif()
    exif[0x0112] = tag
    suffix = {"palette": "png", "stack": "tif"}.get(kind, kind.split()[-1])
    path = tmp_path / f"a.{suffix}"
    if kind == "stack":
        tifffile.imwrite(path, BYTES, photometric="minisblack", extratags=[(274, "H", 1, tag, True)])
    elif "tif" in kind:
        (colour if "colour" in kind else grey[0]).save(path, tiffinfo={274: tag})
    elif kind == "apng":
        grey[0].save(path, "PNG", save_all=True, append_images=grey[1:], exif=exif)
    else:
        picture = grey[0].convert("P") if kind == "palette" else grey[0]
        picture.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {"quality": 97}))
    (found,) = read_films(path)
    wanted = TURNED[tag](BYTES[: {"stack": T, "apng": 2}.get(kind, 1)]) / 255
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < (0.05 if kind == "jpg" else 0.005)


def test_films_are_turned_as_a_phone_was_held(tmp_path):
    """The tag of a JPEG and the matrix of an MP4 that say: turn it clockwise by a quarter."""
    upright = np.rot90(BYTES, -1, (1, 2)) / np.float32(255)
    exif = Image.Exif()
    exif[0x0112] = 6
    for t, frame in enumerate(BYTES):
        Image.fromarray(frame).save(tmp_path / f"{t}.jpg", exif=exif, quality=95)
    (found,) = read_films(tmp_path)
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() < 0.1

    iio.imwrite(tmp_path / "a.mp4", COLOUR, plugin="pyav", codec="libx264", fps=25)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = content.find(b"tkhd") + 4 + 40  # of version 0, behind 40 bytes
    assert struct.unpack_from(">9i", content, matrix) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", content, matrix, 0, 1 << 16, 0, -1 << 16, 0, 0, H << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(content)
    (found,), (lying,) = read_films(tmp_path / "turned.mp4"), read_films(tmp_path / "a.mp4")
    assert np.array_equal(found, np.rot90(lying, -1, (1, 2)))
    assert np.abs(found - upright).mean() < 0.05


def test_films_of_wide_integers_have_one_scale_and_no_hot_pixels(tmp_path):
    counts = (4000 * film(noise=0)).astype(np.uint16)
    hot = counts // 2
    hot[3, 5, 5] = 60_000
    for name, x in {"a": counts, "b": hot, "c": counts // 4}.items():
        np.save(tmp_path / f"{name}.npy", x)
    films = read_films(tmp_path)
    for x, y in zip(films, (counts, hot, counts // 4)):
        assert np.array_equal(x, (y / np.float32(counts.max())).clip(0, 1))
    assert np.array_equal(read_films(tmp_path / "c.npy")[0], (counts // 4) / np.float32((counts // 4).max()))


def test_a_film_of_bytes_need_not_fit_into_memory():
    alive = []

    def frames():
        for frame in map(np.copy, BYTES):
            alive.append(weakref.ref(frame))
            assert sum(x() is not None for x in alive) <= 2  # the last and the next
            yield frame

    found = collect(frames(), "a film", lambda frame: frame[::2, ::2].astype(np.float32))
    assert np.array_equal(found.frames, BYTES[:, ::2, ::2])
    assert (found.size, found.top) == ((H, W), BYTES.max())


def test_a_movie_is_read_again_only_up_to_the_frames_that_are_wanted(tmp_path, monkeypatch):
    iio.imwrite(tmp_path / "a.mp4", COLOUR, plugin="pyav", codec="libx264", fps=25)
    (whole,) = read_films(tmp_path / "a.mp4")
    prepared = prepare_video(tmp_path / "a.mp4", n_objects=1, frames=4, stride=4)
    read, to_grey = [], formats.to_grey
    monkeypatch.setattr(formats, "to_grey", lambda frame, colour: read.append(0) or to_grey(frame, colour))
    assert np.array_equal(prepared.source.frames(1, 4), whole[4:8])
    assert len(read) == 8


@pytest.mark.parametrize("kind", ["mp4", "gif", "folder of png", "tiff of 16 bits"])
def test_frames_shrunk_one_by_one_are_those_of_the_whole_film(kind, tmp_path):
    path = KINDS[kind](tmp_path)
    np.save(tmp_path / "whole.npy", np.stack(read_films(path)))
    options = {"n_objects": 1, "crop": (0, 46, 2, 62), "size": 20, "grey": True}
    found, wanted = prepare_video(path, **options), prepare_video(tmp_path / "whole.npy", **options)
    assert (found.data.images - wanted.data.images).abs().max() < 1e-5
    assert found.source[:5] == wanted.source[:5]


def test_axes_say_what_an_array_is(tmp_path):
    np.save(tmp_path / "a.npy", film().transpose(1, 2, 0))
    data = load_video(tmp_path / "a.npy", axes="HWT", n_objects=1)
    assert data.images.shape == (1, T, 32, 32)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    path = KINDS["tiff"](tmp_path)
    monkeypatch.setattr(formats.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(ValueError, match=r"needs tifffile; install pyro_pixels with its extra 'video'"):
        load_video(path)


def test_tracks_in_the_films_own_pixels(tmp_path):
    np.save(tmp_path / "a.npy", film())
    prepared = prepare_video(tmp_path / "a.npy", n_objects=1, crop=(4, 44, 0, 60), frames=6, stride=6)
    save_prepared(tmp_path / "mine.npz", prepared)
    assert len(load_sequences(tmp_path / "mine.npz")) == 2
    source = load_source(tmp_path / "mine.npz")
    assert source == prepared.source
    v = prepared.data.images.numpy().astype(float)
    y, x = np.mgrid[: v.shape[2], : v.shape[3]]
    a = np.stack([(v * g).sum((2, 3)) / v.sum((2, 3)) for g in (x, y)], -1)[:, None]  # (2, 1, 6, 2)
    cov = np.broadcast_to(np.eye(2), (2, 1, 6, 2, 2))
    write_csv(tmp_path / "a.csv", *track_rows(a, cov, [[0], [1]], [1, 1], source=source, scale=0.01, fps=25))
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [int(r["frame"]) for r in rows] == list(range(12))
    assert [int(r["particle"]) for r in rows] == [0] * 6 + [1] * 6
    for t, r in enumerate(rows):
        assert abs(float(r["x"]) - 0.01 * centre(t)[0]) < 0.012
        assert abs(float(r["y"]) - 0.01 * centre(t)[1]) < 0.012
        assert float(r["time"]) == pytest.approx(t / 25)
        for axis, scale in zip("xy", source.scale):
            assert float(r[f"var_{axis}"]) == pytest.approx((0.01 / scale) ** 2, rel=1e-4)
    (whole,) = read_films(tmp_path / "a.npy")
    draw_tracks_gif(tmp_path / "a.gif", whole[:6], source.to_source(a[0]))
    assert iio.imread(tmp_path / "a.gif", index=None).shape[0] == 6
    assert np.array_equal(source.frames(1, 6), whole[6:12])  # the film itself, read again
    assert source.frames(2, 6) is None
    (tmp_path / "a.npy").unlink()
    assert source.frames(0, 6) is None
    figure = plot_contact_sheet(whole, v, prepared.counts, [1, 1], threshold=0.4, notes=prepared.notes)
    assert len(figure.axes) == 14


def test_the_gif_of_a_large_film_is_small(tmp_path):
    frames = np.zeros((2, 1080, 1920), np.float32)
    frames[:, 540:, 960:] = 1
    draw_tracks_gif(tmp_path / "a.gif", frames, np.array([[[np.nan] * 2, [480.0, 270.0]]]))
    picture = iio.imread(tmp_path / "a.gif", index=1)
    assert picture.shape[:2] == (640, 1138)
    assert picture[480, 853].min() > 250
    coloured = np.argwhere(np.ptp(picture.astype(int), -1) > 50)  # the ring around the object
    assert np.abs(coloured.mean(0) - [160, 284.5]).max() < 1


def test_tracks_are_exact_along_both_sides_whatever_their_ratio(tmp_path):
    np.save(tmp_path / "a.npy", film(noise=0))
    prepared = prepare_video(tmp_path / "a.npy", n_objects=1, crop=(0, 42, 0, 64), size=16, grey=True)
    scale = prepared.source.scale
    assert scale == (16 / 64, 10 / 42)  # 10.5 rows were rounded
    found = prepared.source.to_source(centroids(prepared.data.images[0].numpy().astype(float)))
    assert np.abs(found - [centre(t) for t in range(T)]).max() < 0.3
    row = next(track_rows(found[None, None], np.ones((1, 1, T, 2, 2)), [[0]], [1], source=prepared.source)[1])
    wanted = [1 / scale[0] ** 2, 1 / scale[0] / scale[1], 1 / scale[1] ** 2]
    assert [float(x) for x in row[5:8]] == pytest.approx(wanted, rel=1e-4)


def test_files_with_one_scale_for_both_axes_give_the_same_tracks_as_ever(tmp_path):
    np.save(tmp_path / "a.npy", film())
    prepared = prepare_video(tmp_path / "a.npy", n_objects=1)
    save_prepared(tmp_path / "mine.npz", prepared._replace(source=prepared.source._replace(scale=0.5)))
    source = load_source(tmp_path / "mine.npz")
    assert source == prepared.source
    a = np.random.default_rng(0).random((3, 2)) * 32
    assert np.array_equal(source.to_source(a), (a + 0.5 - np.array(source.offset)) / 0.5 - 0.5)
    assert np.array_equal(source.to_source_covariances(np.eye(2)), np.eye(2) / 0.5**2)


def test_good_films_are_not_warned_of(tmp_path):
    for n in (1, 2):
        np.save(tmp_path / f"{n}.npy", film(n))
    assert check_film(load_video([tmp_path / "1.npy", tmp_path / "2.npy"])) == []


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: 1 - v, "mostly white .*--invert"),
        (lambda v: v[:, ::2, ::8, ::8].repeat(8, 2).repeat(8, 3)[:, :, ::8, ::8], "objects cover|no frame shows"),
        (lambda v: v * (np.arange(T) < 8)[None, :, None, None], "of the frames show no object"),
        (lambda v: np.roll(v, 9, 3)[..., 8:], "touch the edge"),
        (
            lambda v: np.where(np.arange(T)[None, :, None, None] % 2, np.roll(v, 14, 2), v),
            "longer than a quarter|temporal order",
        ),
        (lambda v: np.maximum(v, np.roll(v, 12, 2)), "show more objects"),
    ],
    ids=["inverted", "tiny", "empty", "edge", "jumps", "more"],
)
def test_what_may_go_wrong_is_said_before_the_first_step(tmp_path, change, message):
    np.save(tmp_path / "a.npy", film())
    v = load_video(tmp_path / "a.npy", n_objects=1).images.numpy()
    found = check_film(ImageSequences(np.ascontiguousarray(change(v)).astype(np.uint8), 1))
    assert any(re.search(message, line) for line in found), found


def test_nothing_that_was_there_is_lost_to_a_contact_sheet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    iio.imwrite("film.png", BYTES, plugin="pillow")  # an animation
    write_folder(tmp_path / "frames", ".png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}

    def run(*films, out):
        prepare.main(prepare.Arguments(films=films, out=Path(out), n_objects=(1,)))

    run("film.png", out="mine.npz")
    run("film.png", out="mine.npz")  # the same again replaces its own results
    assert Path("mine.png").exists()
    for films, out in (
        ("film.png", "film.npz"),
        ("frames", "frames/mine.npz"),
        ("frames/frame*.png", "frames/frame_all.npz"),
        ("*.png", "new.npz"),
    ):
        with pytest.raises(ValueError, match=r"would overwrite, or be added to, the film .*; choose another --out"):
            run(films, out=out)
    np.save("a.npy", BYTES)
    with pytest.raises(ValueError, match=r"film.png was not drawn by this program and would be overwritten"):
        run("a.npy", out="film.npz")
    with pytest.raises(ValueError, match=r"film.png was not drawn by this program and would be overwritten"):
        simulate.main(simulate.Arguments(out=Path("film.npz"), n_sequences=2))
    run("frames/frame*.png", out="frames/mine.npz")  # the glob does not include mine.png
    assert not Path("film.npz").exists()
    assert {path: path.read_bytes() for path in before} == before


def test_without_a_single_object_it_is_said(tmp_path):
    np.save(tmp_path / "a.npy", film(2))
    assert "no sequence has N = 1" in check_film(load_video(tmp_path / "a.npy"))[0]


def test_of_several_films_each_is_read_again_by_itself(tmp_path):
    write_folder(tmp_path / "pictures", ".png")
    np.save(tmp_path / "many.npy", np.stack([film(seed=s) for s in (1, 2)]))
    prepared = prepare_video([tmp_path / "pictures", tmp_path / "many.npy"], n_objects=1)
    assert [origin.index for origin in prepared.source.films] == [0, 0, 1]
    for i, whole in enumerate(read_films([tmp_path / "pictures", tmp_path / "many.npy"])):
        assert np.array_equal(prepared.source.frames(i, T), whole)
