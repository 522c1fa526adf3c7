"""What runs on each machine: a worker has one checkpoint, and does one job after the other.

Ray makes an actor of it; nothing here knows of Ray. What it is given and what it gives back is plain data.
"""

import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import load_checkpoint
from ..drawing import settings_of
from ..errors import Cancelled, OutOfMemory, TavError
from ..evaluation import edit_clip, prepared, read_json, told_of
from ..events import Callback, Event, Note, Plan, Reading, Step, TuningStep
from ..given import with_added
from ..job import EditJob, claimed, run_edit
from ..measure import MODELS, as_json, load_models, measure
from ..memory import is_out_of_memory, release
from ..noise import read_noise
from ..project import NOISE, SUMMARY, Project, changeable, write_json
from ..recompute import MEMORY
from ..record import explained
from ..remaining import Remaining
from ..sampling import Edit
from ..tuned_weights import base_fingerprint
from ..video import load_video
from .jobs import comparable, job_of_spec, of_tuning

STARTED = "batch.json"  # in the output folder: by what a worker knows that it sees the driver's folder
JOB = "job.json"  # in that of each job
OF_PROJECT = ("seconds", "steps", "probe_loss", "reconstruction_psnr", "vae_psnr")  # of its summary
_PATIENCE = 60  # seconds for another worker, of which nobody hears any more, to leave a job's folder


class Worker:
    """Jobs of a batch, one at a time; `progress` and `stop` may be called beside one that runs."""

    def __init__(self, settings: dict[str, Any]):
        """Loads nothing yet: what fails here would be told by nobody.

        Args:
            settings: output, batch (what STARTED says), layout ("project" or "evaluation"), checkpoint,
                prediction_type, added and prompt_weights (see `given.checkpoint`), device, threads, and those of
                `load_models`.
        """
        self.settings, self.output = settings, Path(settings["output"])
        self.checkpoint = self.models = None
        self.stopping = threading.Event()
        self.now: dict[str, Any] = {}

    def hello(self) -> dict[str, Any]:
        """Loads the checkpoint, and tells of the machine and of what it sees there; or why it can do nothing."""
        told = {"node": platform.node()}
        if (read_json(self.output / STARTED) or {}).get("batch") != self.settings["batch"]:
            return told | {"fault": f"doesn't see {self.output}, which all must share"}
        try:
            if self.checkpoint is None:
                self._load()
        except Exception as error:
            return told | {"fault": f"can't load the checkpoint ({' '.join(str(error).split())[:300]})"}
        return told | {"base": base_fingerprint(self.checkpoint.unet)}

    def _load(self):
        settings = self.settings
        torch.set_num_threads(settings["threads"])
        checkpoint = load_checkpoint(settings["checkpoint"], prediction_type=settings["prediction_type"])
        checkpoint = with_added(checkpoint, **settings["added"])
        checkpoint = replace(checkpoint, prompt_weights=settings["prompt_weights"])
        for part in (checkpoint.vae, checkpoint.text_encoder):  # of the U-Net, only what is inflated from it goes there
            nn.Module.to(part, settings["device"])
        self.models = load_models(**{name: settings[name] for name in MODELS})
        self.checkpoint = checkpoint

    def progress(self) -> dict[str, Any]:
        """Of the job that runs: its stage, step and total, the share that is done, and steps a second of a tuning."""
        return dict(self.now)

    def stop(self):
        """The running job stops after its step, and no other begins."""
        self.stopping.set()

    def run(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Does a job (see `spec_of`), or goes on with it.

        Args:
            spec: with `memory`, the mode of this try, or None.

        Returns:
            its `status`: "done", with its `edits`; "failed", and `why`; "memory", if it ran out of that in the mode
            `memory`; "stopped". Also `took`, in seconds, and `lost` where the process is better begun anew.
        """
        began, self.now = time.monotonic(), {"stage": "", "share": 0.0}
        folder = self.output / ("runs" if self.settings["layout"] == "evaluation" else "jobs") / spec["name"]
        try:
            self._check()
            told = {"status": "done", **self._done(spec, folder)}
        except Cancelled:
            told = {"status": "stopped"}
        except Exception as error:
            told = {"status": "failed", "why": told_of(error, folder), "lost": not isinstance(error, TavError)}
            if isinstance(error, OutOfMemory | MemoryError) or is_out_of_memory(error):
                used = error.value if isinstance(error, OutOfMemory) else self.now.get("memory")
                told |= {"status": "memory", "memory": used if used in MEMORY else MEMORY[0]}
        self.now = {}
        release(torch.device(self.settings["device"]))
        return told | {"node": platform.node(), "took": round(time.monotonic() - began, 2)}

    def _check(self):
        if self.stopping.is_set():
            raise Cancelled("stopped")

    def _done(self, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
        with self._alone(folder):
            if self.settings["layout"] == "evaluation":
                clip, frames = job_of_spec(spec, spec.get("memory"))
                edit_clip(clip, self.checkpoint, self.output, frames, self._follow())
                return {}
            job, before = comparable(spec), read_json(folder / JOB)
            if before and of_tuning(before["job"]) != of_tuning(job):  # nothing of it shall be mixed with this one
                _empty(folder)
                before = None
            known = {"job": job, "memory": spec.get("memory") or (before or {}).get("memory")}
            write_json(folder / JOB, known)
            clip, frames = job_of_spec(spec, known["memory"])

            def note(memory: str):  # so that whoever goes on computes as this one does
                known["memory"] = memory
                write_json(folder / JOB, known)

            callback = self._follow(note)
            job, video = prepared(clip, frames, callback)
            summary, _ = run_edit(job, self.checkpoint, video, folder, callback=callback)
            write_json(folder / SUMMARY, summary | explained(summary))
            result = {"edits": self._measured(summary, clip.entry.edits, job, folder)}
            result |= {name: summary[name] for name in OF_PROJECT}
            write_json(folder / JOB, known | {"result": result})
            return result

    @contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        """A job's folder; a worker on a machine that nobody hears of any more may still be in it for a while."""
        began = time.monotonic()
        while True:
            claim = claimed(folder)
            try:
                claim.__enter__()
                break
            except TavError as error:
                if "in use" not in error.problem or time.monotonic() - began > _PATIENCE:
                    raise
            self._check()
            time.sleep(1)
        try:
            yield
        finally:
            claim.__exit__(None, None, None)

    def _follow(self, note: Callable[[str], None] = lambda memory: None) -> Callback:
        """The callback of a job: keeps what there is to tell, and stops it."""
        remaining = None

        def callback(event: Event):
            nonlocal remaining
            self._check()
            if isinstance(event, Plan):
                remaining = Remaining(event)
            elif isinstance(event, Note) and event.about == "memory":
                memory = event.text.removeprefix("memory: ").split(",")[0].split(" ")[0]
                self.now |= {"memory": memory}
                note(memory)
            elif isinstance(event, Step):
                told = {"stage": event.stage, "step": event.step, "total": event.total}
                if remaining is not None:
                    told |= {"left": remaining.after(event), "share": _share(remaining)}
                if isinstance(event, TuningStep) and event.seconds > 0:
                    told["rate"] = (event.step - event.started) / event.seconds
                self.now |= told
            elif isinstance(event, Reading):
                self.now["stage"] = "reading"

        return callback

    def _measured(self, summary: dict, edits: dict[str, Edit], job: EditJob, folder: Path) -> list[dict[str, Any]]:
        """The figures of a job's edits, of its files, beside the clip's own."""
        noise, project, rows = read_noise(folder / NOISE), Project(folder, summary), []
        self.now |= {"stage": "measuring"}
        device = torch.device(self.settings["device"])
        try:
            self.models.to(device)
            for kind, edit in edits.items():
                self._check()
                drawn = project.find(settings_of(edit, self.checkpoint, job.preset, noise, job.negative_prompt))
                video = load_video(folder / drawn["file"], sound=False).frames
                mask = changeable(edit.region, noise)
                row = measure(kind, video, noise.frames, edit.prompt, job.prompt, mask, self.models)
                rows.append(as_json(row) | {"file": drawn["file"]})
        finally:
            self.models.to(torch.device("cpu"))  # a tuning has the whole device
        return rows


def _empty(folder: Path):
    """But for what keeps others out of it, and other jobs, as those of a sweep are."""
    for path in folder.iterdir():
        if path.is_dir():
            if next(path.rglob(JOB), None) is None:
                shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _share(remaining: Remaining) -> float:
    """Of a job's work that is done, 0 ... 1."""
    costs = [stage.steps * stage.cost for stage in remaining.stages]
    done = sum(costs[: remaining.at]) + remaining.done * remaining.stages[remaining.at].cost
    return done / max(sum(costs), 1e-9)
