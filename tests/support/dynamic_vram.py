"""ComfyUI's dynamic VRAM without a GPU: what its core calls of `comfy_aimdo`, played in Python on the device of
`accelerator`.

A model has a region of virtual addresses (VBAR) with a place for each of its big weights. When a layer is called, its
weights are cast into their place, if memory is left for it, and stay there until others need it; or else into a buffer
that is gone after the call.
"""

import mmap
import sys
import types

import torch

from support.accelerator import OnDevice

MODULES = ("control", "host_buffer", "model_mmap", "model_vbar", "torch", "vram_buffer")


class ModelVBAR:
    """The region of a model. `left`: bytes of memory that no region has taken."""

    left = 0

    def __init__(self, size: int, device: int):
        self.memory: dict[int, bytearray] = {}  # that of the places which have some
        self.places = 0

    def alloc(self, size: int) -> tuple["ModelVBAR", int, int]:
        self.places += 1
        return self, self.places, size

    def fault(self, place: int, size: int) -> bytearray | None:
        """Its memory, if there is any: a signature, which changes when it was taken away meanwhile."""
        if place not in self.memory and size <= ModelVBAR.left:
            ModelVBAR.left -= size
            self.memory[place] = bytearray(size)
        return self.memory.get(place)

    def loaded_size(self) -> int:
        return sum(map(len, self.memory.values()))

    def free_memory(self, size: int) -> int:
        freed = self.loaded_size()
        ModelVBAR.left += freed
        for memory in self.memory.values():
            memory[:] = b"\xff" * len(memory)  # not a number, to whom still looks there
        self.memory.clear()
        return freed

    def prioritize(self):
        pass

    def __del__(self):
        self.free_memory(0)


class HostBuffer:
    """Pinned memory, which is switched off."""

    size = 0

    def __init__(self, size: int, prewarm: int, max_grow_size: int):
        pass


class ModelMMAP:
    """A file of weights that are read where they lie; without a handle of it they are copied as any tensor is."""

    def __init__(self, path: str):
        with open(path, "rb") as file:
            self.bytes = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)

    def get(self) -> int:
        return self.bytes.data_ptr()

    def get_file_handle(self):
        return None

    def bounce(self) -> bool:
        """Drops the pages that were read, which come again from the file: nothing to do, as they stay."""
        return True


def play(memory: int):
    """Has ComfyUI find it. So many bytes are for weights."""
    ModelVBAR.left = memory
    package = sys.modules["comfy_aimdo"] = types.ModuleType("comfy_aimdo")
    for name in MODULES:
        module = sys.modules[f"comfy_aimdo.{name}"] = types.ModuleType(f"comfy_aimdo.{name}")
        setattr(package, name, module)
    control, vbar = package.control, package.model_vbar
    control.init = lambda **_: True
    control.init_devices = lambda devices: bool(list(devices))
    control.set_log_info = control.analyze = lambda: None
    vbar.ModelVBAR = ModelVBAR
    vbar.vbar_fault = lambda place: place[0].fault(*place[1:])
    vbar.vbar_signature_compare = lambda a, b: a is not None and a is b
    vbar.vbar_unpin = lambda place: None
    vbar.vbars_analyze = lambda device: 0
    vbar.vbars_reset_watermark_limits = lambda: None
    package.torch.aimdo_to_tensor = lambda place, device: OnDevice(
        torch.frombuffer(place[0].memory[place[1]], dtype=torch.uint8)
    )
    package.host_buffer.HostBuffer = HostBuffer
    package.model_mmap.ModelMMAP = ModelMMAP
