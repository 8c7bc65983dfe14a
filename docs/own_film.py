"""Makes the film of docs/your_own_video.md: balls thrown before a bright wall, by another physics engine (pymunk).

Anti-aliased, dark on light, uneven light, grain: as a phone sees them. ``python docs/own_film.py films 120`` writes one
MP4 a throw, one of them also as GIF beside the folder, and the true positions in truth.npz there, for comparison.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

try:
    import av  # noqa: F401  # with which imageio writes MP4
    import imageio.v3 as iio
    import pymunk
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    name = str(missing.name).split(".")[0]
    print(f'error: {name} is not installed; pip install "pyro_pixels[video]" pymunk', file=sys.stderr)
    sys.exit(2)

HEIGHT, WIDTH, T, RADIUS = 96, 128, 40, 7.0


def throw(rng: np.random.Generator, n_balls: int) -> NDArray[np.float64]:
    """Positions (N, T, 2), (column, row), of balls that do not touch each other, within the picture."""
    while True:
        space, balls = pymunk.Space(), []
        space.gravity = (0, 0.055)  # rows count downwards; pixels a frame squared
        for _ in range(n_balls):
            body = pymunk.Body(1, pymunk.moment_for_circle(1, 0, RADIUS))
            left = rng.random() < 0.5
            x, vx = (
                (rng.uniform(10, 30), rng.uniform(1.2, 2.2)) if left else (rng.uniform(98, 118), -rng.uniform(1.2, 2.2))
            )
            body.position, body.velocity = (x, rng.uniform(50, 85)), (vx, -rng.uniform(0.9, 1.9))
            shape = pymunk.Circle(body, RADIUS)
            shape.filter = pymunk.ShapeFilter(group=1)  # they pass in front of each other
            space.add(body, shape)
            balls.append(body)
        path = []
        for _ in range(T):
            path.append([tuple(ball.position) for ball in balls])
            for _ in range(10):
                space.step(0.1)
        positions = np.array(path).transpose(1, 0, 2)
        if (positions > RADIUS).all() and (positions < np.array([WIDTH, HEIGHT]) - 1 - RADIUS).all():
            return positions


def draw(positions: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Frames (T, H, W): dark discs with soft edges on a bright wall, uneven light, and grain."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    wall = 0.82 + 0.10 * np.cos(x / 50) * np.cos(y / 40)
    frames = np.repeat(wall[None], T, 0)
    for track in positions:
        for t, (column, row) in enumerate(track):
            distance = np.hypot(x - column, y - row)
            cover = np.clip(RADIUS + 0.5 - distance, 0, 1)
            frames[t] = frames[t] * (1 - cover) + 0.15 * cover
    frames += rng.normal(0, 0.03, frames.shape)
    return (255 * frames.clip(0, 1)).round().astype(np.uint8)


def make_films(folder: str | Path, n_films: int = 150, *, seed: int = 0, gifs: int = 1) -> list[NDArray[np.float64]]:
    """Writes throw_000.mp4, ... with 1, 2, 1, 2, ... balls, and some as GIF; returns the true positions of each."""
    folder, rng, truth = Path(folder), np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n_films):
        positions = throw(rng, 1 + i % 2)
        frames = draw(positions, rng)
        colour = np.repeat(frames[..., None], 3, -1)
        name = folder / f"throw_{i:03d}"
        iio.imwrite(name.with_suffix(".mp4"), colour, plugin="pyav", codec="libx264", fps=30)
        if i < gifs:
            iio.imwrite(folder.parent / f"{name.name}.gif", frames, duration=40, loop=0)
        truth.append(positions)
    return truth


def main(folder: str, n_films: int) -> None:
    truth = make_films(folder, n_films)
    padded = np.full((len(truth), 2, T, 2), np.nan)
    for row, positions in zip(padded, truth):
        row[: len(positions)] = positions
    np.savez_compressed(Path(folder).absolute().parent / "truth.npz", positions=padded)
    print(f"{n_films} films of {T} frames, {HEIGHT} x {WIDTH} pixels, in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdigit():
        print("error: give a folder and a number of films, such as: python docs/own_film.py films 120", file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1], int(sys.argv[2]))
