"""What is finished of a job, kept in files until all of it is: a run that was stopped doesn't compute it again."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .atomic import atomic_path
from .errors import TavError
from .stored import reading

FORMAT = "tune-a-video-kept-1"


@dataclass(frozen=True)
class Kept:
    """Tensors of a job in a folder of their own.

    Attributes:
        folder: made with the first of them.
        job: what they all depend on, as JSON has it; the same settings in other words are another job.
    """

    folder: Path
    job: dict[str, Any]

    def __call__(self, name: str, make: Callable[[], Tensor], **settings: Any) -> Tensor:
        """The tensor that `make` makes; of an earlier run of the job, if it was made with the same settings there."""
        path, key = self.folder / f"{name}.safetensors", self._key(settings)
        try:
            with reading(path, "output", FORMAT, "part of a job", "delete it") as file:
                if file.metadata()["job"] == key:
                    return file.get_tensor("content")
        except TavError:  # there is none, or none that is whole: it is made anew
            pass
        made = make()
        with atomic_path(path) as temporary:
            save_file({"content": made.cpu().contiguous()}, temporary, {"format": FORMAT, "job": key})
        return made

    def _key(self, settings: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps([self.job, settings], sort_keys=True).encode()).hexdigest()

    def remove(self):
        """The job is done."""
        shutil.rmtree(self.folder, ignore_errors=True)
