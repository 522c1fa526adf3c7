"""A custom node for the ComfyUI of the tests: a MODEL for which there is never enough memory."""

from comfy.patcher_extension import WrappersMP


def run_out(executor, *args, **kwargs):
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    )


class ShortOfMemory:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        model = model.clone()
        model.add_wrapper(WrappersMP.DIFFUSION_MODEL, run_out)
        return (model,)


NODE_CLASS_MAPPINGS = {"ShortOfMemory": ShortOfMemory}
