"""Tables and a figure of the measurements: medians over rounds, with quartiles in brackets."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from benchmarks.steps import LITERAL, OURS, PRODUCT, STRUCTURED
from benchmarks.timing import Times, exponent, mean_over, quartiles, ratio
from pyro_pixels.plots.style import FONT, OBJECTS
from pyro_pixels.result_tables import markdown

Results = dict[str, Any]
MEGA, GIGA = 1e6, 1e9
LABELS = {
    "frames": "recurrent guide",
    "frames, structured guide": "structured guide",
    "frames, one sequence at a time": "one sequence at a time",
}


def step(r: Results) -> str:
    seconds, flops = dict(r["seconds"]), dict(r["flops"])
    shown = [LITERAL, OURS]
    for name in (OURS, STRUCTURED):
        alone = [key for key in seconds if key.startswith(f"{name}, N = ")]
        if alone:
            mean = f"{name}, one N a batch, mean"
            seconds[mean] = mean_over(seconds[key] for key in alone)
            flops[mean] = statistics.fmean(flops[key] for key in alone)
            shown += [mean, *alone]
    machine = flops[PRODUCT] / statistics.median(seconds[PRODUCT])
    rows = []
    for name in [*shown, PRODUCT]:
        rate = flops[name] / statistics.median(seconds[name])
        other_work = name.startswith((STRUCTURED, PRODUCT))
        rows.append(
            [
                name,
                milliseconds(seconds[name]),
                "-" if other_work else f"{ratio(seconds[name], seconds[LITERAL]):.2f}",
                f"{flops[name] / GIGA:.2f}",
                f"{rate / GIGA:.0f}",
                f"{100 * rate / machine:.0f} %",
            ]
        )
    sizes = ", ".join(f"{symbol} = {value:,}" for symbol, value in r["sizes"].items())
    header = ["step", "ms", "times as fast as literal", "GFLOP", "GFLOP/s", "of the matrix product's"]
    return f"{markdown(header, rows)}\n\n{sizes}."


def density(r: Results) -> str:
    methods = list(next(iter(r["seconds"].values())))
    times = [[T, *(milliseconds(row[m]) for m in methods)] for T, row in r["seconds"].items()]
    errors = [
        [T, *(f"{r['value_error'][T][m]:.0e} / {r['gradient_error'][T][m]:.0e}" for m in methods)] for T in r["seconds"]
    ]
    return f"{markdown(['T, ms', *methods], times)}\n\n{markdown(['T, value / worst gradient', *methods], errors)}"


def queries(r: Results) -> str:
    n = r["n_sequences"]
    rows = [[name, milliseconds(times), f"{n / statistics.median(times):,.0f}"] for name, times in r["seconds"].items()]
    return markdown(["query", f"ms for {n} sequences", "sequences per second"], rows)


def memory(r: Results) -> str:
    rows = [
        [name, f"{x['peak'] / MEGA:,.0f}", f"{(x['peak'] - x['before']) / MEGA:,.0f}"]
        for name, x in r.items()
        if "peak" in x
    ]
    return markdown(["step", "MB at the peak", "MB more than before"], rows)


def growth(r: Results) -> str:
    rows = []
    for name, sweep in _axes(r).items():
        sizes, times = _curve(sweep)
        cells = ", ".join(f"{size:,}: {1e3 * statistics.median(t):.0f}" for size, t in zip(sizes, times))
        rows.append([name, cells, f"{exponent(sizes, times):.2f}"])
    return markdown(["size", "ms", "exponent"], rows)


def memory_growth(r: Results) -> str:
    rows = []
    for name, sweep in _axes(r).items():
        sizes, more = _curve(_more(sweep))
        cells = ", ".join(f"{size:,}: {m[0] / MEGA:,.0f}" for size, m in zip(sizes, more))
        rows.append([name, cells, f"{exponent(sizes, more):.2f}"])
    return markdown(["size", "MB more than before", "exponent"], rows)


def _more(sweep: dict[str, dict[str, int]]) -> dict[str, list[float]]:
    """Returns peak bytes minus the bytes before."""
    return {size: [x["peak"] - x["before"]] for size, x in sweep.items()}


def against(r: Results) -> str:
    if "skipped" in r:
        return f"Not measured: {r['skipped']}."
    names = ["mean over N", "N = 1", "N = 2", "N = 3"]
    rows = []
    for name in names:
        picked = (lambda x: statistics.fmean(x)) if name == names[0] else (lambda x, i=int(name[-1]) - 1: x[i])
        ms = [f"{1e3 * statistics.median(picked(x) for x in r['seconds'][v]['wall']):.1f}" for v in ("before", "now")]
        rows.append([name, *ms, f"{r['ratio'][f'{name}, wall']:.2f}", f"{r['ratio'][f'{name}, busy']:.2f}"])
    header = ["quick preset's step", f"ms at {r['commit']}", "ms now", "times as fast", "in processor time"]
    return markdown(header, rows)


def by_hand(r: Results) -> str:
    rows = []
    for name, times in r["seconds"].items():
        whole = times["as it is"]
        for piece, without in times.items():
            more = "-" if piece == "as it is" else f"{100 * (ratio(whole, without) - 1):+.0f} %"
            rows.append([name, piece, milliseconds(without), more])
    return markdown(["step, N = 3, or density", "variant", "ms", "longer by"], rows)


def kernels(r: Results) -> str:
    variants = next(iter(r["seconds"].values()))
    rows = [
        [name, *(milliseconds(times[variant]) for variant in variants)] for name, times in _with_means(r["seconds"])
    ]
    return markdown(["step, ms", *variants], rows)


def _with_means(seconds: dict[str, dict[str, Times]]) -> list[tuple[str, dict[str, Times]]]:
    """Returns the times of steps such as "paper, N = 1", by variant, and before them the mean over N of each preset."""
    shown = []
    for preset in dict.fromkeys(name.split(",")[0] for name in seconds):
        each = {name: times for name, times in seconds.items() if name.split(",")[0] == preset}
        variants = next(iter(each.values()))
        mean = {variant: mean_over(times[variant] for times in each.values()) for variant in variants}
        shown += [(f"{preset}, mean over N", mean), *each.items()]
    return shown


def parts_of_step(r: Results) -> str:
    rows = [[part, *(f"{1e3 * s:.1f}" if s else "-" for s in of.values())] for part, of in r["seconds"].items()]
    return markdown(["part, ms on one thread", "N = 1", "N = 2", "N = 3"], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "step": step, "against": against, "by_hand": by_hand, "parts_of_step": parts_of_step, "kernels": kernels,
    "density": density, "queries": queries, "memory": memory, "growth": growth, "memory_growth": memory_growth,
    "paper_step": step, "paper_memory": memory,
}  # fmt: skip


def describe(part: str, r: Results) -> str:
    """Returns a part's table, and the environment in which it was measured."""
    e = r["environment"]
    where = e["processor"] if e["device"] == "cpu" else e["device"]
    about = f"{where}, {e['threads']} threads, Python {e['python']}, torch {e['torch']}, pyro {e['pyro']}, {e['date']}."
    return f"{TABLES[part](r)}\n\n{about}"


def milliseconds(times: Times) -> str:
    """Returns the median and the quartiles, such as "52.1 (50.0 to 55.3)"."""
    low, high = quartiles(times)
    digits = 0 if low > 1 else 1 if low > 0.01 else 2
    return f"{1e3 * statistics.median(times):,.{digits}f} ({1e3 * low:,.{digits}f} to {1e3 * high:,.{digits}f})"


Curves = dict[str, dict[str, list[float]]]
"""By label: measurements at each size."""


def plot_growth(steps: Results, densities: Results | None, memories: Results | None) -> Figure:
    """Draws step time by each size, time of p(a) by T, and peak memory, on logarithmic axes with fitted exponents."""
    times: dict[str, Curves] = {}
    for name, sweep in _axes(steps).items():
        times.setdefault(name.split(",")[0], {})[LABELS.get(name, "")] = sweep
    if densities is not None:
        by_frames = densities["seconds"]
        methods = next(iter(by_frames.values()))
        times["frames, p(a) alone"] = {m: {T: row[m] for T, row in by_frames.items()} for m in methods}
    bytes_more: dict[str, Curves] = {}
    for name, sweep in _axes(memories or {}).items():
        bytes_more.setdefault(name.split(",")[0], {})[LABELS.get(name, "")] = _more(sweep)
    panels = [(name, curves, 1e3, "ms") for name, curves in times.items()]
    panels += [(name, curves, 1 / MEGA, "MB") for name, curves in bytes_more.items()]
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.7 * columns, 2.3 * rows), layout="constrained")
    for i, panel in enumerate(panels):
        _panel(figure.add_subplot(rows, columns, i + 1), *panel)
    return figure


def _panel(ax: Axes, name: str, curves: Curves, factor: float, unit: str) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.margins(y=0.3)
    for (label, sweep), colour in zip(curves.items(), OBJECTS):
        sizes, measured = _curve(sweep)
        low, high = zip(*([factor * q for q in quartiles(x)] for x in measured))
        ax.fill_between(sizes, low, high, color=colour, alpha=0.25, linewidth=0)
        named = f"{label}: {exponent(sizes, measured):.2f}".removeprefix(": ")
        ax.plot(sizes, [factor * statistics.median(x) for x in measured], "o-", ms=3, lw=1, color=colour, label=named)
    ticks = sorted({int(size) for sweep in curves.values() for size in sweep})
    ax.set_xticks(ticks, [f"{size:,}" for size in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(name, fontsize=FONT)
    ax.set_ylabel(unit, fontsize=FONT)
    ax.tick_params(labelsize=FONT - 1)
    ax.legend(fontsize=FONT - 1, frameon=False, loc="upper left")


def _axes(r: Results) -> dict[str, dict[str, Any]]:
    return {name: sweep for name, sweep in r.items() if name != "environment"}


def _curve(sweep: dict[str, Times]) -> tuple[Sequence[int], Sequence[Times]]:
    return [int(size) for size in sweep], list(sweep.values())
