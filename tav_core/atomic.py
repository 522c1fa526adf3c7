"""Writing files so that a reader never sees half of one."""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import TavError, field

_FULL = (errno.ENOSPC, errno.EDQUOT)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and takes the place of `path`.

    The temporary name keeps the suffix of `path`, because writers choose the format by it. Missing parent
    folders are made. On failure the temporary file is removed and `path` is as it was before.

    Raises:
        TavError: the operating system refused to write (disk full, no permission, a folder in the way).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # safetensors lets only the owner read its files
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        # safetensors writes from Rust and tells the number of an I/O error in its text alone
        told = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        reason = os.strerror(number) if number is not None else str(error)
        remedy = f"{'free space or ' if number in _FULL else ''}choose another {field('output')}"
        raise TavError("output", path, f"can't be written ({reason})", remedy) from error
