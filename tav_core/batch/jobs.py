"""The jobs of a batch: read from a list, multiplied by a sweep, checked, and made plain data that any machine can read.

A list is YAML, `defaults` and `jobs`, or jobs alone, each of them a clip as `dataset` knows it, with a size of its own;
or a table in CSV, a row a job, whose columns are the same keys (`edits.style`, `settings.steps`).
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..dataset import SEVERAL, Entry, in_words, read_clips, read_yaml
from ..errors import TavError
from ..evaluation import ClipJob, Frames, job_of, mattering
from ..presets import Preset, with_settings
from ..project import SWEPT
from ..sampling import Edit
from ..tuned_weights import base_fingerprint
from ..tuning import TuneConfig
from ..video import FITS

JOBS = "JOBS"  # the field of errors about the list, as the help calls it
LISTS = ("jobs.yaml", "jobs.yml", "jobs.csv", "clips.yaml")  # in a folder
_NUMBER = re.compile(r"[+-]?[0-9]+")
_OF_EDITS = tuple(name for name in SWEPT if name != "seed")  # settings that need no tuning of their own


@dataclass(frozen=True)
class Listed:
    """A job of a list.

    Attributes:
        size: pixels, width and height; None where the list doesn't say it.
        fit: how a clip of another shape is brought to it; None as usual.
        swept: settings of the sweep that made it of another job, by name.
    """

    entry: Entry
    size: tuple[int, int] | None = None
    fit: str | None = None
    swept: dict[str, Any] | None = None


# ---------------------------------------------------------------------------------------------------- reading


def read_jobs(path: Path) -> tuple[list[Listed], list[str]]:
    """Reads a list; the clips themselves are not looked at.

    Args:
        path: a YAML or CSV file, or a folder with one of the names of `LISTS`.

    Returns: the jobs that are right, and all that is wrong with the others, a sentence each.

    Raises:
        TavError: nothing of that is there, or nothing that can be read.
    """
    if path.is_dir():
        found = [path / name for name in LISTS if (path / name).is_file()]
        if len(found) != 1:
            problem = f"holds {'several' if found else 'none'} of {', '.join(LISTS)}"
            raise TavError(JOBS, path, problem, "give the file")
        path = found[0]
    if not path.is_file() or path.suffix.lower() not in (".yaml", ".yml", ".csv"):
        problem = "is neither YAML nor CSV" if path.exists() else "does not exist"
        raise TavError(JOBS, path, problem, "give a .yaml or a .csv file")
    try:
        defaults, jobs = _of_table(path) if path.suffix.lower() == ".csv" else _of_yaml(path)
    except TavError as error:
        raise TavError(JOBS, error.value, error.problem, error.remedy) from error
    shapes, clips, faults = [], [], []
    for number, job in enumerate(jobs, 1):
        whole = _with_defaults(job, defaults) if isinstance(job, dict) else job
        shape, told = _shape(whole) if isinstance(job, dict) else ((None, None), [])
        faults += [f"{path.name}, clip {number}: {each}" for each in told]
        shapes.append(shape)
        clips.append({key: value for key, value in whole.items() if key not in ("size", "fit")}
                     if isinstance(whole, dict) else whole)  # fmt: skip
    entries, more = read_clips(clips, path.absolute())
    of_name = {_name(clip): shape for clip, shape in zip(clips, shapes)}
    return [Listed(entry, *of_name[entry.name]) for entry in entries], [*faults, *more]


def _of_yaml(path: Path) -> tuple[dict[str, Any], list[Any]]:
    content = read_yaml(path)
    if isinstance(content, list):
        return {}, content
    defaults, jobs = (content.get("defaults"), content.get("jobs")) if isinstance(content, dict) else (None, None)
    if not isinstance(jobs, list) or not isinstance(defaults, dict | None) or content.keys() - {"defaults", "jobs"}:
        remedy = "begin each job with a dash, under jobs: where there are defaults: beside them"
        raise TavError(JOBS, path, "is no list of jobs", remedy)
    return defaults or {}, jobs


def _of_table(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Empty cells say nothing; a column "edits.style" is the key style of edits."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TavError(JOBS, path, f"can't be read as a table ({error})", "repair it") from error
    header = [cell.strip() for cell in rows[0]] if rows else []
    if len(set(header)) < len(header) or len(header) < max(map(len, rows), default=0):
        raise TavError(JOBS, path, "has columns without a name of their own", "name each of them in the first row")
    jobs = []
    for row in rows[1:]:
        job = {}
        for column, cell in zip(header, map(str.strip, row)):
            key, _, of = column.partition(".")
            if cell and of:
                job.setdefault(key, {})[of] = _value(cell) if key == "settings" else cell
            elif cell:
                job[key] = int(cell) if key != "name" and _NUMBER.fullmatch(cell) and len(cell) < 20 else cell
        jobs.append(job)
    return {}, jobs


def _value(text: str) -> int | float | str:
    """A setting as YAML would read it."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _with_defaults(job: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A job wins; of settings it replaces single ones."""
    both = [each.get("settings") for each in (defaults, job)]
    settings = {"settings": both[0] | both[1]} if all(isinstance(each, dict) for each in both) else {}
    return defaults | job | settings


def _shape(job: dict[str, Any]) -> tuple[tuple[tuple[int, int] | None, str | None], list[str]]:
    from ..arguments import size as size_of  # which makes argparse's errors

    size, fit, faults = job.get("size"), job.get("fit"), []
    if fit is not None and fit not in FITS:
        faults.append(f"fit {fit!r} is unknown; choose one of {', '.join(FITS)}")
    try:
        size = None if size is None else size_of(str(size))
    except Exception as error:
        faults.append(f"size {error}")
    return (size, fit), faults


def _name(clip: Any) -> Any:
    """As `read_clips` has it."""
    if not isinstance(clip, dict):
        return None
    return clip.get("name") or Path(str(clip.get("video"))).stem


# ---------------------------------------------------------------------------------------------------- sweeps


def read_sweep(texts: Sequence[str], preset: Preset) -> dict[str, list[Any]]:
    """The values of each setting of a sweep.

    Args:
        texts: such as "learning_rate=1e-5,3e-5".

    Raises:
        TavError: no such text, a setting that there isn't, or a value out of range.
    """
    sweep = {}
    for text in texts:
        name, _, values = text.partition("=")
        values = [_value(value.strip()) for value in values.split(",") if value.strip()]
        remedy = "give each setting once, with its values, such as steps=200,500"
        if not values or name in sweep:
            raise TavError("sweep", text, "has no values" if not values else "comes twice", remedy)
        if name in SEVERAL:
            raise TavError("sweep", text, "is of a setting that has several values itself", remedy)
        for value in values:
            try:
                with_settings(preset, **{name: value})
            except TavError as error:
                raise TavError("sweep", text, in_words(error).split(";")[0], error.remedy) from error
        sweep[name] = list(dict.fromkeys(values))
    return sweep


def expanded(jobs: Sequence[Listed], sweep: dict[str, list[Any]]) -> Iterator[Listed]:
    """A job for each combination of the values of a sweep; those that edits may have as their own make edits of it, so
    that nothing is tuned twice.
    """
    of_tuning = {name: values for name, values in sweep.items() if name not in _OF_EDITS}
    of_edits = {name: values for name, values in sweep.items() if name in _OF_EDITS}
    for job, values in product(jobs, product(*of_tuning.values())):
        swept, entry = dict(zip(of_tuning, values)), job.entry
        edits = {
            _called(kind, dict(zip(of_edits, own)), "_"): replace(edit, **dict(zip(of_edits, own)))
            for (kind, edit), own in product(entry.edits.items(), product(*of_edits.values()))
        }
        name, settings = _called(entry.name, swept, "/"), entry.settings | swept
        yield replace(job, entry=replace(entry, name=name, edits=edits, settings=settings), swept=swept or None)


def _called(name: str, swept: dict[str, Any], between: str) -> str:
    """A name of a folder: "skiing/learning_rate-1e-05_steps-200"."""
    told = "_".join(f"{setting}-{value}" for setting, value in swept.items())
    return f"{name}{between}{told}" if told else name


def combination(name: str, kind: str, sweep: dict[str, list[Any]]) -> str:
    """What of a sweep an edit is: "learning_rate 1e-05, steps 200"."""
    told = {}
    for of, of_edits, between in ((name, False, "/"), (kind, True, "_")):
        settings = {setting: values for setting, values in sweep.items() if (setting in _OF_EDITS) == of_edits}
        for values in product(*settings.values()):
            swept = dict(zip(settings, values))
            if of.endswith(_called("", swept, between)):
                told |= swept
    return ", ".join(f"{setting} {told[setting]}" for setting in sweep if setting in told)


# ------------------------------------------------------------------------------------------------- plain data


def spec_of(clip: ClipJob, frames: Frames, facts: dict[str, Any]) -> dict[str, Any]:
    """A job as JSON has it, with whole paths: what a worker on another machine needs to know of it.

    Args:
        facts: `facts_of` the checkpoint.
    """
    entry = asdict(clip.entry) | {"video": str(clip.entry.video.absolute())}
    entry["mask"] = clip.entry.mask and str(clip.entry.mask.absolute())
    whole = {"name": clip.name, "entry": entry, "preset": asdict(clip.job.preset), "inflation": clip.job.inflation,
             "frames": asdict(frames), "checkpoint": facts}  # fmt: skip
    return json.loads(json.dumps(whole))


def facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What of a checkpoint decides on the jobs that are done with it."""
    return {"base": base_fingerprint(checkpoint.unet), "lora": list(checkpoint.loras),
            "embedding": dict(checkpoint.embeddings), "prompt_weights": checkpoint.prompt_weights}  # fmt: skip


def job_of_spec(spec: dict[str, Any], memory: str | None = None) -> tuple[ClipJob, Frames]:
    """What `spec_of` made plain, in another memory mode."""
    told = dict(spec["entry"])
    told["edits"] = {kind: Edit(**edit) for kind, edit in told["edits"].items()}
    told["contrasts"] = tuple(told["contrasts"])
    told["video"], told["mask"] = Path(told["video"]), told["mask"] and Path(told["mask"])
    tuning = dict(spec["preset"]["tuning"])
    tuning["betas"] = tuple(tuning["betas"])
    preset = Preset(**(spec["preset"] | {"tuning": TuneConfig(**tuning)}))
    preset, entry = with_settings(preset, memory=memory), Entry(**told)
    return ClipJob(entry, job_of(entry, preset, spec["inflation"])), Frames(**spec["frames"])


def comparable(spec: dict[str, Any]) -> dict[str, Any]:
    """What comes out of a job depends on this of it: a job that is done is so as long as this is the same."""
    entry = {name: value for name, value in spec["entry"].items() if name != "settings"}
    entry |= {name: entry[name] and Path(entry[name]).name for name in ("video", "mask")}
    others = {name: spec[name] for name in ("inflation", "frames", "checkpoint")}
    return {"entry": entry, "preset": mattering(spec["preset"]), **others}


def of_tuning(job: dict[str, Any]) -> dict[str, Any]:
    """What the tuning and the noise depend on: where this of `comparable` is the same, edits are added."""
    entry = {name: value for name, value in job["entry"].items() if name != "edits"}
    preset = {name: job["preset"][name] for name in ("tuning", "sampling_steps", "caption_as_negative")}
    return job | {"entry": entry, "preset": preset}
