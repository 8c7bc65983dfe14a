"""The training, held-out and query sequences of a run."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pyro_pixels.config import RunConfig
from pyro_pixels.data import ImageSequences, load_sequences
from pyro_pixels.worlds.base import simulate

TEST_SEED = 1_000_003
"""Seed of fresh sequences for figures and tables; training seeds are small numbers."""
VALIDATION_SEED = TEST_SEED - 1
"""Seed of the validation sequences of runs that are trained on simulated ones."""
MOST_HELD_OUT = 60
ASKED = 60
"""The largest number of simulated or held-out sequences that are queried by default."""


class RunSequences(NamedTuple):
    """The training and held-out sequences of a configuration."""

    training: ImageSequences
    held_out: ImageSequences | None
    """Sequences of the same kind that are not trained on; by default None if a file has fewer than 10."""
    config: RunConfig
    """The configuration, with image size, largest N and numbers of sequences of the file if there is one."""


def run_sequences(config: RunConfig) -> RunSequences:
    """Loads or simulates the training and held-out sequences of a run.

    The last ``config.n_held_out`` sequences of a file are held out; by default a tenth, at most 60. Without a file, 60
    further sequences are simulated.

    Raises:
        ValueError: if the file cannot be read, or all of its sequences are held out.
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
    """Returns the training sequences of a run, without those held out."""
    if config.data_file is None:
        return simulate(config.data, config.n_sequences, seed=config.seed)
    return run_sequences(config).training


class AskedSequences(NamedTuple):
    """Sequences to query a run with."""

    data: ImageSequences
    source: str
    """A description of their origin."""
    file: Path | None = None
    """Their file, if any."""
    first: int = 0
    """The index in the file of the first of these sequences."""


def sequences_to_ask(
    config: RunConfig,
    data: str | Path | None,
    n_sequences: int | None,
    seed: int,
    *,
    simulated: bool = False,
    trained_on_too: bool = True,
) -> AskedSequences:
    """Returns sequences from a file, held-out ones of the run's own file, or fresh ones of the run's world.

    Args:
        config: the run's configuration.
        data: a file; None for the held-out sequences if the run was trained on a file, else for simulated ones.
        n_sequences: the largest number of sequences; the first ones are taken. None for all of ``data``, else 60.
        seed: seeds simulated sequences.
        simulated: without ``data``, simulate sequences even if the run was trained on a file.
        trained_on_too: if ``data`` is the run's own file, include the sequences that it was trained on.

    Raises:
        ValueError: if the file cannot be read, its image size differs from the run's, or held-out sequences are needed
            and there are none.
    """
    if data is None:
        n_sequences = n_sequences or ASKED
        if simulated or config.data_file is None:
            drawn = simulate(config.data, n_sequences, seed=seed)
            return AskedSequences(drawn, f"{n_sequences} simulated sequences, seed {seed}")
    own = config.data_file is not None and (data is None or Path(data).resolve() == Path(config.data_file))
    if own and (data is None or not trained_on_too):
        held_out = run_sequences(config).held_out
        if held_out is None:
            raise ValueError(
                f"no sequences of {config.data_file} were held out of training; give "
                + (
                    "others with --data, the same ones with --data and its path, or --simulated to simulate the "
                    "preset's world"
                    if data is None
                    else "--trained-on-too to use those that this run was trained on, or others with --data"
                )
            )
        file, first = Path(str(config.data_file)), len(training_sequences(config))
        last = first + len(held_out[:n_sequences]) - 1
        found, source = held_out, f"held-out sequences of {config.data_file} ({first} to {last}, counted from 0)"
    else:
        assert data is not None
        file, first = Path(data), 0
        found, source = load_sequences(data), f"sequences in {data}"
        if own:
            source += f", of which this run was trained on {len(training_sequences(config))}"
    wanted = (config.data.height, config.data.width)
    if found.size != wanted:
        raise ValueError(
            f"the sequences are {found.size[0]} x {found.size[1]} pixels, "
            f"but this run was trained on {wanted[0]} x {wanted[1]}"
        )
    asked = found[:n_sequences]
    some = f"{len(found)}" if len(asked) == len(found) else f"the first {len(asked)} of {len(found)}"
    return AskedSequences(asked, f"{some} {source}", file, first)
