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
    return RunSequences(data[:n], data[n:] if n_held_out else None, config)


def training_sequences(config: RunConfig) -> ImageSequences:
    """The sequences that a run learned from, without those that were held out."""
    if config.data_file is None:
        return simulate(config.data, config.n_sequences, seed=config.seed)
    return run_sequences(config).training


def sequences_to_ask(config: RunConfig, data: str | Path | None, n_sequences: int, seed: int) -> ImageSequences:
    """Sequences from a file, or fresh ones simulated as the run's were.

    Raises:
        ValueError: if the file cannot be read, or its images are of another size than the run's.
    """
    found = simulate(config.data, n_sequences, seed=seed) if data is None else load_sequences(data)[:n_sequences]
    wanted = (config.data.height, config.data.width)
    if found.size != wanted:
        raise ValueError(
            f"the sequences are {found.size[0]} x {found.size[1]} pixels; "
            f"this run was trained on {wanted[0]} x {wanted[1]}"
        )
    return found
