"""Ray: one of this machine, started and stopped by us, or a cluster that is there; workers on it."""

import contextlib
import math
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import TavError, field
from .pool import PARTS

_STORE = 80 * 2**20  # bytes of Ray's object store, the least: what goes through it are names and figures
_REMEDY = "begin it with ray start, and set RAY_AUTH_MODE and RAY_AUTH_TOKEN as there, if it has them"


def check_ray(address: str | None):
    """Raises a TavError where there is no Ray. It is told what it reads but once, when it is imported."""
    if address is None and "RAY_AUTH_MODE" not in os.environ:  # nobody else of this machine may use ours
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        import ray  # noqa: F401
    except ImportError as error:
        problem = "needs Ray, which is an extra of the pack"
        raise TavError("batch", None, problem, 'run pip install "comfyui-tune-a-video[batch]"') from error


@contextlib.contextmanager
def cluster(address: str | None, cpus: int, gpus: float, workers: int | None, name: str) -> Iterator[int]:
    """Ray is there, and how many workers fit on it.

    Args:
        address: of a cluster that exists, or "auto"; None starts one of this machine.
        cpus, gpus: of each worker.
        workers: as many, whether they fit now or not; None for those that fit.
        name: of the batch, beside others of a cluster.

    Raises:
        TavError: no cluster answers, or not a single worker fits.
    """
    import ray

    options: dict[str, Any] = dict(namespace=name, log_to_driver=False, logging_level="ERROR")
    if address is None:
        options |= dict(object_store_memory=_STORE, include_dashboard=False)
        options |= {} if workers is None else dict(num_cpus=max(workers * cpus, os.cpu_count() or 1))
    with silence():
        try:
            ray.init(address="local" if address is None else address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            told = " ".join(str(error).split())[:200]
            if address is None:
                raise TavError("Ray", None, f"can't be started here ({told})", "look into its logs") from error
            raise TavError("address", address, f"can't be reached ({told})", _REMEDY) from error
        try:
            fitting = sum(_fitting(node["Resources"], cpus, gpus) for node in ray.nodes() if node["Alive"])
            if not fitting:
                needs = f"{cpus} CPUs and {gpus:g} GPUs" if gpus else f"{cpus} CPUs"
                problem = f"are more than any machine has: a worker needs {needs}"
                remedy = f"give fewer, or {field('cpus_per_job')}" if gpus else "give fewer"
                raise TavError("gpus_per_job" if gpus else "cpus_per_job", None, problem, remedy)
            yield workers or fitting
        finally:
            ray.shutdown()


def _fitting(resources: dict[str, float], cpus: int, gpus: float) -> int:
    """Workers on a machine."""
    by = [resources.get("CPU", 0) / cpus, *([resources.get("GPU", 0) / gpus] if gpus else [])]
    return math.floor(min(by) + 1e-6)


def hiring(worker: type, settings: dict[str, Any], cpus: int, gpus: float) -> Callable[[str], Any]:
    """What starts an actor of a name.

    It needs its resources for as long as it lives, and is started anew, there or elsewhere, whenever it dies.
    """
    import ray

    actor = ray.remote(concurrency_groups=PARTS)(worker)
    options = dict(num_cpus=cpus, num_gpus=gpus, max_restarts=-1)
    return lambda name: actor.options(name=name, **options).remote(settings)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What Ray prints of workers that died is told by us."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def whole(path: Path | str | None) -> str | None:
    """A path as other machines know it too."""
    return None if path is None else str(path) if str(path) == "mini" else os.path.abspath(path)
