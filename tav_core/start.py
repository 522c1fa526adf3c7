"""Starts a command line: what must be in place before the libraries are imported, which takes seconds."""

import importlib
import os
import signal
import sys

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def start(module: str, *args: str):
    """Calls `main(*args)` of a module of this package. A Ctrl-C during its imports ends in a word, like later ones."""
    for descriptor in range(3):  # one that is closed would become that of the next file, and messages be written there
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    for number in _SIGNALS:
        signal.signal(number, _leave)
    main = importlib.import_module(module, __package__).main
    try:
        main(*args)
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        for number in _SIGNALS:  # all is written: nothing is left to stop
            signal.signal(number, signal.SIG_IGN)


def _leave(number, frame):
    """Not by an exception: libraries that are being imported catch those, or make others of them."""
    os.write(2, b"stopped\n")
    os._exit(130)
