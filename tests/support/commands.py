"""The command line in processes of its own; the fixture `tav` runs it in the process of the tests."""

import os
import subprocess
import sys

from support import ROOT


def environment(**more: str) -> dict[str, str]:
    # two threads on two busy cores wait for each other in each of a step's thousands of operations: it takes 20 times
    # as long
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def tav_process(*args, module="tav_core", check=True, **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, args)], capture_output=True, text=True, env=environment(), **kwargs
    )
    assert not check or done.returncode == 0, done.stderr
    return done
