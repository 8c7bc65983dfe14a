"""Which sequences a run learns from, which are held out, and which it is asked about."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pyro_pixels.config import RunConfig
from pyro_pixels.data import ImageSequences, load_sequences
from pyro_pixels.worlds.base import simulate

TEST_SEED = 1_000_003
"""Seed of fresh sequences for figures and tables. Training seeds are small numbers."""
VALIDATION_SEED = TEST_SEED - 1
"""Seed of the sequences that a run trained on simulated ones is validated on."""
MOST_HELD_OUT = 60


class RunSequences(NamedTuple):
    """The sequences that a configuration names."""

    training: ImageSequences
    held_out: ImageSequences | None
    """Sequences of the same kind that are not trained on; None where a file has fewer than 10."""
    config: RunConfig
    """The configuration, with image size, largest N and numbers of sequences taken from the file if there is one."""


def run_sequences(config: RunConfig) -> RunSequences:
    """Loads or simulates what a run learns from, and what is held out.

    Of a file the last tenth is held out, at most 60 sequences, or as many as ``config.n_held_out`` says. Where there is
    no file 60 further sequences are simulated.

    Raises:
        ValueError: if the file cannot be read.
    """
    if config.data_file is None:
        training = simulate(config.data, config.n_sequences, seed=config.seed)
        return RunSequences(training, simulate(config.data, MOST_HELD_OUT, seed=VALIDATION_SEED), config)
    data = load_sequences(config.data_file)
    (height, width), largest_n = data.size, int(data.n_objects.max())
    world = replace(
        config.data,
        height=height,
        width=width,
        n_frames=data.images.shape[1],
        radius=min(config.data.radius, (min(height, width) - 2) / 2),
    )
    n_held_out = min(MOST_HELD_OUT, len(data) // 10) if config.n_held_out is None else config.n_held_out
    config = replace(
        config,
        data=world,
        max_objects=max(largest_n, config.max_objects),
        n_sequences=len(data),
        n_held_out=n_held_out,
    )
    if not bool((data.n_objects == 1).any()):
        config = replace(config, schedule=replace(config.schedule, single_object_steps=0))
    n = len(data) - n_held_out
    if n < 1 or n_held_out < 0:
        raise ValueError(f"{n_held_out} of the {len(data)} sequences in {config.data_file} are held out; wanted fewer")
    return RunSequences(data[:n], data[n:] if n_held_out else None, config)


def training_sequences(config: RunConfig) -> ImageSequences:
    """The sequences that a run learned from, without those that were held out."""
    if config.data_file is None:
        return simulate(config.data, config.n_sequences, seed=config.seed)
    return run_sequences(config).training


class AskedSequences(NamedTuple):
    """Sequences that a run is asked about."""

    data: ImageSequences
    source: str
    """Where they come from, in words."""
    file: Path | None = None
    """The file that they are in, if any."""
    first: int = 0
    """Which of its sequences is the first of them."""


def sequences_to_ask(
    config: RunConfig,
    data: str | Path | None,
    n_sequences: int,
    seed: int,
    *,
    simulated: bool = False,
    trained_on_too: bool = True,
) -> AskedSequences:
    """Sequences from a file, those that were held out of the run's own file, or fresh ones of the run's world.

    Args:
        config: the run's configuration.
        data: a file, or None for what was held out where the run learned from a file, and else for simulated ones.
        n_sequences: how many at most, the first ones.
        seed: of simulated sequences.
        simulated: simulate also where the run learned from a file.
        trained_on_too: where ``data`` is the file that the run learned from, take also what it was trained on.

    Raises:
        ValueError: if the file cannot be read, its images are of another size than the run's, or nothing was held out
            where it is asked for.
    """
    if data is None and (simulated or config.data_file is None):
        return AskedSequences(
            simulate(config.data, n_sequences, seed=seed), f"{n_sequences} simulated sequences, seed {seed}"
        )
    own = config.data_file is not None and (data is None or Path(data).resolve() == Path(config.data_file))
    if own and (data is None or not trained_on_too):
        held_out = run_sequences(config).held_out
        if held_out is None:
            raise ValueError(
                f"no sequences of {config.data_file} were held out of training; give others with --data, or "
                "--simulated for a world of the preset's"
            )
        file, first = Path(str(config.data_file)), len(training_sequences(config))
        found, source = held_out, f"sequences that were held out of {config.data_file}"
    else:
        assert data is not None
        file, first = Path(data), 0
        found, source = load_sequences(data), f"sequences in {data}"
        if own:
            source += f", of which this run was trained on {len(training_sequences(config))}"
    wanted = (config.data.height, config.data.width)
    if found.size != wanted:
        raise ValueError(
            f"the sequences are {found.size[0]} x {found.size[1]} pixels; "
            f"this run was trained on {wanted[0]} x {wanted[1]}"
        )
    some = f"the first {n_sequences} of {len(found)}" if n_sequences < len(found) else f"{len(found)}"
    return AskedSequences(found[:n_sequences], f"{some} {source}", file, first)
