"""Workers of batches to which things happen; they import nothing that stubs don't need."""

import os
import platform
import time
from pathlib import Path
from typing import Any


class Stub:
    """Does nothing, for as long as a job says, and notes in a file that it did it."""

    def __init__(self, settings: dict[str, Any]):
        self.output, self.base, self.stopped = Path(settings["output"]), settings.get("base"), False

    def hello(self) -> dict[str, Any]:
        return {"node": platform.node(), "base": self.base}

    def progress(self) -> dict[str, Any]:
        return {}

    def stop(self):
        self.stopped = True

    def run(self, spec: dict[str, Any]) -> dict[str, Any]:
        began = time.time()
        time.sleep(spec.get("seconds", 0))
        if spec.get("dies"):
            os.kill(os.getpid(), 9)
        with open(self.output / f"{os.getpid()}.txt", "a") as file:
            file.write(f"{spec['name']}\n")
        times = {"pid": os.getpid(), "began": began, "ended": time.time()}
        return {"status": "stopped" if self.stopped else "done", "node": platform.node(), **times}


def made_short_of_memory(worker: type) -> type:
    """A worker for which the job "large" needs the memory mode checkpointing, and whose process is known by a file."""

    class Short(worker):
        def run(self, spec: dict[str, Any]) -> dict[str, Any]:
            import torch

            import tav_core.tuning as tuning

            (self.output / f"{spec['name']}.pid").write_text(str(os.getpid()))
            if spec["name"] == "large" and not hasattr(tuning, "plenty"):
                tuning.plenty = plenty = tuning.tuning_loss

                def short(unet, *args, **kwargs):
                    if self.name == "large" and torch.is_grad_enabled() and unet.memory in ("fast", "selective"):
                        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate "
                                           "memory: you tried to allocate 8 bytes")  # fmt: skip
                    return plenty(unet, *args, **kwargs)

                tuning.tuning_loss = short
            self.name = spec["name"]
            return super().run(spec)

    return Short
