"""What a batch writes of its results: a table of all edits, the means of a sweep, and a page with all strips."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic import atomic_path
from ..evaluation import means_of
from ..measure import FIGURES, Measured, lines_of, of_json, write_csv
from ..page import page
from ..project import write_json
from .jobs import combination

REPORT = ("results.csv", "results.json", "index.html")
SWEEP = "sweep.csv"
_SHOWN = ("psnr_rest", "motion_fidelity", "tgve_text", "tgve_frame", "tgve_pickscore")  # in the terminal
_OF_JOB = ("reconstruction_psnr", "probe_loss_before", "probe_loss_after", "steps", "seconds", "memory", "tries")


def write_results(jobs: Sequence[dict[str, Any]], sweep: dict[str, list[Any]], output: Path):
    """The files of `REPORT`, and with a sweep `SWEEP`.

    Args:
        jobs: each with `name`, `status` and `why`; those that are done with `result`, as the worker wrote it.
    """
    rows = [row for job in jobs for row in _rows(job, sweep)]
    figures = [name for name in FIGURES if any(name in row["figures"] for row in rows)]
    columns = ["job", "edit", "status", *sweep, "prompt", "video", *_OF_JOB, *figures,
               *(f"source_{name}" for name in figures), "why"]  # fmt: skip
    with atomic_path(output / "results.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            told = row | row["figures"] | {f"source_{name}": value for name, value in row["source"].items()}
            writer.writerow([told.get(name, "") for name in columns])
    means = compared(jobs, sweep)
    if sweep:
        write_csv(means, output / SWEEP)
    write_json(output / "results.json", {"figures": FIGURES, "sweep": sweep, "jobs": list(jobs)})
    done = [(job["name"], measured_of(job)) for job in jobs if job["status"] == "done"]
    content = page("batch.html", means=means, lines=lines_of(means),
                   failed=[(job["name"], job["why"]) for job in jobs if job["status"] == "failed"],
                   missing=[job["name"] for job in jobs if job["status"] == "missing"],
                   jobs=[(name, own, lines_of(own)) for name, own in done])  # fmt: skip
    with atomic_path(output / "index.html") as path:
        path.write_text(content, "utf-8")


def _rows(job: dict[str, Any], sweep: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """A row for each edit of a job; one for a job that isn't done."""
    shared = {"job": job["name"], "status": job["status"], "why": job.get("why", ""), "tries": job.get("tries", "")}
    if job["status"] != "done":
        return [shared | {"figures": {}, "source": {}}]
    result = job["result"]
    shared |= {f"probe_loss_{when}": value for when, value in result["probe_loss"].items()}
    shared |= {name: result[name] for name in ("reconstruction_psnr", "steps")} | {"memory": job.get("memory") or ""}
    shared["seconds"] = round(sum(result["seconds"].values()), 2)
    return [
        shared
        | dict(part.rsplit(" ", 1) for part in combination(job["name"], edit["video"], sweep).split(", ") if part)
        | {"edit": edit["video"], "prompt": edit["prompt"], "figures": edit["figures"], "source": edit["source"],
           "video": f"jobs/{job['name']}/{edit['file']}"}
        for edit in result["edits"]
    ]  # fmt: skip


def measured_of(job: dict[str, Any]) -> list[Measured]:
    """The figures of a job that is done, an edit each."""
    return [of_json(edit) for edit in job["result"]["edits"]]


def compared(jobs: Sequence[dict[str, Any]], sweep: dict[str, list[Any]]) -> list[Measured]:
    """The means of all edits under each combination of a sweep; without one, of all edits."""
    groups: dict[str, list[Measured]] = {}
    for job in jobs:
        for row in measured_of(job) if job["status"] == "done" else ():
            groups.setdefault(combination(job["name"], row.name, sweep) or "all", []).append(row)
    return [
        Measured(name, f"{len(rows)} edits", means_of([row.figures for row in rows]),
                 means_of([row.of_source for row in rows]))
        for name, rows in groups.items()
    ]  # fmt: skip


def as_lines(means: Sequence[Measured]) -> list[str]:
    """The comparison for a terminal, a combination a line."""
    lines = []
    for row in means:
        known = [(name, row.figures[name]) for name in _SHOWN if math.isfinite(row.figures.get(name, math.nan))]
        lines.append(f"{row.name} ({row.prompt}): " + ", ".join(f"{name} {value:.4g}" for name, value in known))
    return lines
