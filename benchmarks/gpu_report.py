"""Tables of GPU measurements for the pages, from the JSON files of `gpu.py` and of a probe."""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.timing import mean_over
from pyro_pixels._files import atomic_write
from pyro_pixels.result_tables import insert, markdown

Found = dict[str, Any]


def fill(docs: Path, results: Path) -> None:
    """Inserts the tables of every device's folder between the markers of the pages."""
    folders = sorted(path for path in results.iterdir() if path.is_dir()) if results.exists() else []
    for page, part, describe in (("performance", "gpu speed", speed), ("reproduction", "gpu learning", learning)):
        file = docs / f"{page}.md"
        if not file.exists():
            continue
        shown = [text for folder in folders if (text := describe(read_all(folder)))]
        if shown:
            with atomic_write(file) as out:
                out.write(insert(file.read_text(), part, "\n\n".join(shown)).encode())
            print(f"  {file}")


def read_all(folder: Path) -> dict[str, Found]:
    """Returns the contents of each job's JSON file, by job."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def where(results: dict[str, Found]) -> str:
    """Returns the device and versions of a folder's results."""
    e = next(iter(results.values()))["environment"]
    parts = [e["device"], f"driver {e['driver']}" if e.get("driver") else None, f"torch {e['torch']}",
             f"Python {e['python']}", f"pyro {e['pyro']}", f"commit {str(e['commit'])[:7]}", e.get("date"),
             e.get("how")]  # fmt: skip
    return ", ".join(p for p in parts if p) + "."


def speed(results: dict[str, Found]) -> str:
    """Returns a table of tests, steps beside the literal program, quickstart, and several seeds at once."""
    rows = []
    if "tests" in results:
        t = results["tests"]["found"]
        if "tests" in t:
            wrong = t["failures"] + t["errors"]
            rows.append(
                ["gpu tests", f"{t['tests'] - wrong - t['skipped']} pass, {wrong} fail", seconds(results["tests"])]
            )
    for part, r in (results.get("steps", {}).get("found") or {}).items():
        literal = statistics.median(r["seconds"]["literal Pyro"]) if "literal Pyro" in r.get("seconds", {}) else None
        for name, times in _with_mean(r.get("seconds", {})).items():
            ms = 1e3 * statistics.median(times)
            ratio = f"{1e3 * literal / ms:.1f} x literal" if literal and name != "literal Pyro" else "-"
            rows.append([f"{part}: {name}", f"{ms:.2f} ms", ratio])
    by_hand = results.get("by_hand", {}).get("found") or {}
    for of, times in by_hand.get("by_hand", {}).get("seconds", {}).items():
        as_it_is = statistics.median(times.pop("as it is"))
        rows += [
            [f"{of}, {variant}", f"{1e3 * statistics.median(each):.2f} ms", f"as it is {1e3 * as_it_is:.2f} ms"]
            for variant, each in times.items()
        ]
    for row in (results.get("probe", {}).get("found") or {}).get("rows", []):
        rows.append([row["what"], row["value"], row.get("beside", "-")])
    if "quickstart" in results:
        rows.append(["quickstart", results["quickstart"]["state"], seconds(results["quickstart"])])
    found = results.get("seeds", {}).get("found") or {}
    if found.get("steps_per_second"):
        rate, alone = statistics.median(found["steps_per_second"]), found.get("alone")
        beside = f"one alone: {alone:.0f} steps a second, {alone / rate:.1f} times as many" if alone else "-"
        rows.append([f"{len(found['steps_per_second'])} seeds at once", f"{rate:.0f} steps a second each", beside])
    tables = [markdown(["what", "measured", "beside"], rows)] if rows else []
    kernels = (results.get("kernels", {}).get("found") or {}).get("kernels")
    tables += [report.kernels(kernels)] if kernels else []
    return "\n\n".join([*tables, where(results)]) if tables else ""


def _with_mean(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Returns the times of steps, and after those of N = 1, 2, 3 of each program their mean."""
    found = dict(seconds)
    for program in dict.fromkeys(name.split(", N = ")[0] for name in seconds if ", N = " in name):
        found[f"{program}, mean over N"] = mean_over(
            t for name, t in seconds.items() if name.startswith(f"{program}, N")
        )
    return found


def learning(results: dict[str, Found]) -> str:
    """Returns a table of trainings at the paper's size: steps, time, bound and errors."""
    rows = []
    for name in results:
        found = results[name]["found"]
        if not isinstance(found, dict) or not found.get("metrics"):
            continue
        last, evaluation = found["metrics"][-1], found.get("evaluation") or {}
        by_n = evaluation.get("by_n_objects", {})
        cells = [" / ".join(f"{row[key]:{form}}" for row in by_n.values() if row.get(key) is not None) or "-"
                 for key, form in (("position_error_px", ".2f"), ("switch_rate", ".0%"))]  # fmt: skip
        bound = f"{last['bound_per_frame']:.1f}" if last.get("bound_per_frame") is not None else "-"
        state = "" if results[name]["state"] == "done" else f" ({results[name]['state']})"
        rows.append([name + state, f"{last['step']:,}", f"{last['seconds']:.0f}", bound, *cells])
    header = ["training", "steps", "seconds", "bound, nats per frame", "error, px, N = 1 / 2 / 3", "switches"]
    return f"{markdown(header, rows)}\n\n{where(results)}" if rows else ""


def seconds(result: Found) -> str:
    return f"{result['seconds']:.0f} s"
