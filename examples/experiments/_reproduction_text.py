"""The numbers of `reproduce_paper.py` as Markdown, one function per part of docs/reproduction.md."""

from pyro_pixels.result_tables import Row, machine, markdown, per_n, percent, seeds_table


def model_text(r: Row) -> str:
    """Returns the table of a run, for each N, and a paragraph about what it learned."""
    header = ["N", "position error", "switch rate", "floor", "launch side correct", "generation", "floor",
              "interpolation", "floor", "bound, nats per frame"]  # fmt: skip
    predictions = [f"{q}_{kind}_px" for q in ("generation", "interpolation") for kind in ("error", "floor")]
    rows = [
        [
            name, f"{row['position_error_px']:.2f}",
            *(percent(row[key]) for key in ("switch_rate", "switch_floor", "side_accuracy")),
            *(f"{row[key]:.2f}" for key in predictions), f"{row['bound_per_frame_nats']:.1f}",
        ]
        for name, row in {**r["by_n_objects"], "all": r["all"]}.items()
    ]  # fmt: skip
    dynamics, everything = r["dynamics"], r["all"]
    averaged = everything.get("averaged_nll_per_frame_nats")
    sampled = "" if averaged is None else f", {averaged:.0f} averaged over {r['n_futures']} sampled futures"
    x, y = dynamics["acceleration_px_per_frame2"]
    about = (
        f"Learned acceleration ({x:.4f}, {y:.4f}) px per frame squared, {abs(dynamics['degrees_from_down']):.2f} "
        f"degrees from down; learned noise of the positions {dynamics['position_noise_sd_px'][0]:.2f} px. "
        f"Generated frames, -log p in nats: {everything['nll_per_frame_nats']:.0f} drawn at the forecast's mean"
        f"{sampled}, {everything['constant_image_nll_per_frame_nats']:.0f} for the best single grey value. "
        f"{everything['n_sequences']} fresh sequences (seed {r['test_seed']}); training seed {r['train_seed']}, "
        f"{r['step']:,} steps. {machine(r)}"
    )
    return f"{markdown(header, rows)}\n\n{about}"


def baselines_text(r: Row, ours: Row | None) -> str:
    """Returns the table of the baselines, below the row of a run if there is one."""
    models = {} if ours is None else {"pyro_pixels": ours}
    models["classical tracker, true dynamics and radius"] = r["tracker"]
    for name, x in r.items():
        if "ED-LSTM" in name:
            models[f"{name}, state {x['state_size']:,}, {x['steps']:,} steps"] = x
    measures = {
        "position error, px": ("position_error_px", 1, 2),
        "switch rate, %": ("switch_rate", 100, 1),
        "generation, px": ("generation_error_px", 1, 2),
        "interpolation, px": ("interpolation_error_px", 1, 2),
        "generated frames, -log p in nats": ("nll_per_frame_nats", 1, 1),
        "averaged over sampled futures": ("averaged_nll_per_frame_nats", 1, 1),
        "paper-style loss": ("paper_style_loss", 1, 4),
    }

    def cell(result: Row, key: str, scale: float, digits: int) -> str:
        return per_n(result, lambda row: None if row.get(key) is None else scale * row[key], digits)

    rows = [[name, *(cell(result, *how) for how in measures.values())] for name, result in models.items()]
    return f"{markdown(['', *measures], rows)}\n\nFor N = 1 / 2 / 3 (N = 2 / 3 for switches). {machine(r)}"


def generalisation_text(r: Row) -> str:
    """Returns the tables for more objects and for more frames."""
    header = ["N", "position error, px", "switch rate", "generation / floor", "interpolation / floor"]
    rows = [
        [
            n, f"{row['position_error_px']:.2f}", percent(row["switch_rate"]),
            _ratio(row, "generation"), _ratio(row, "interpolation"),
        ]
        for n, row in r["more_objects"]["by_n_objects"].items()
    ]  # fmt: skip
    frames = {"trained frames, px": "trained_frames", "later, in view": "later_in_view"}
    frames["later, out of view"] = "later_out_of_view"
    longer = [[n, *(f"{row[key]:.2f}" for key in frames.values())] for n, row in r["longer"].items()]
    return f"{markdown(header, rows)}\n\n{markdown(['N', *frames], longer)}\n\n{machine(r)}"


def sweeps_text(r: Row) -> str:
    """Returns the tables of all sweeps."""
    parts = []
    for name, result in r.items():
        if "variants" in result:
            seeds = sorted({run["train_seed"] for v in result["variants"].values() for run in v["runs"]})
            some = next(iter(result["variants"].values()))["runs"][0]
            parts.append(f"### {name}\n\n{seeds_table(result)}\n\nSeeds {seeds}. {machine(some)}")
    return "\n\n".join(parts)


def _ratio(row: Row, query: str) -> str:
    return f"{row[f'{query}_error_px'] / row[f'{query}_floor_px']:.2f}"
