"""Writing files so that a reader never sees half of one, and folders so that no two runs write in them at once."""

import errno
import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from safetensors import SafetensorError

from .errors import TavError, field

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

_FULL = (errno.ENOSPC, errno.EDQUOT)
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"  # processes of another machine may write there, too
_TEMPORARY = re.compile(r"\.tav-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")
_writing: set[str] = set()  # names of this process


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder beside `path`; on success it is synced and takes its place.

    A folder, because writers make temporary files of their own beside theirs. Missing parent folders are made, and what
    killed processes have left there is removed. On failure nothing is left of it, and `path` is as it was before.

    Raises:
        TavError: the operating system refused to write (disk full, no permission, a folder in the way).
    """
    with _beside(path := Path(path)) as temporary:
        yield temporary
        _sync_file(temporary)
        os.replace(temporary, path)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a folder of the same name in a temporary one beside `path`, which takes its place as `atomic_path` has it.

    Raises:
        TavError: something is there already but an empty folder, or the operating system refused to write.
    """
    check_new_folder(path := Path(path))
    with _beside(path) as temporary:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)


def check_new_folder(path: Path):
    """Raises a TavError where there is something already but an empty folder."""
    remedy = f"choose another {field('output')}"
    try:
        held = os.listdir(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise TavError("output", path, f"can't be a new folder ({error.strerror})", remedy) from error
    if held:
        raise TavError("output", path, "is a folder that holds something", remedy)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """The temporary path of both: what is left there goes, and what fails is an error of `path`."""
    folder = path.parent / f".tav-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        _writing.add(folder.name)
        try:
            folder.mkdir()
            yield folder / path.name
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _writing.discard(folder.name)
    except (OSError, SafetensorError) as error:
        # safetensors writes from Rust and tells the number of an I/O error in its text alone
        told = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        reason = os.strerror(number) if number is not None else str(error)
        remedy = f"{'free space or ' if number in _FULL else ''}choose another {field('output')}"
        raise TavError("output", path, f"can't be written ({reason})", remedy) from error


def _sync_file(path: Path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    os.chmod(path, 0o666 & ~_umask())  # safetensors lets only the owner read its files


def _sync_folder(folder: Path):
    """So that after a power cut the new file has its name; Windows sees to that itself."""
    if fcntl is None:
        return
    with suppress(OSError):  # some network file systems know no such thing
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_leftovers(folder: Path):
    """Temporary folders of processes of this machine that are no more."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if (made := _TEMPORARY.fullmatch(name)) and made[1] == _HOST and name not in _writing:
                process = int(made[2])
                if process == os.getpid() or not psutil.pid_exists(process):
                    shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder. The lock is the operating system's: it goes with the process, however it ends.

    Raises:
        TavError: another run has it.
    """
    try:
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY)
        else:  # folders can't be locked there; this file goes when it is closed
            descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_TEMPORARY)
    except OSError as error:
        raise TavError("output", folder, f"can't be used ({error.strerror})", "choose another one") from error
    try:
        if not _lock(descriptor):
            raise TavError("output", folder, "is in use by another run", "wait for it, or choose another one")
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether nobody else has the lock; some network file systems have none, and nobody has it."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
    return True
