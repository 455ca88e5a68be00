"""Linux calls that Python lacks: claim space, clone, rename without replacing, exchange two names. All degrade."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from functools import cache
from pathlib import Path
from typing import Any

UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})
"""What a kernel, a sandbox or a file system answers to a call it does not know."""

_HERE = -100  # AT_FDCWD
_NO_REPLACE, _EXCHANGE = 1, 2
_CLONE = 0x40049409  # FICLONE


def reserve(file: int, nbytes: int) -> None:
    """Claim disk blocks for the first `nbytes` bytes of an open file, and make it that long, where that is supported.

    Raises:
        OSError: the disk, a quota or a limit does not allow that size.
    """
    _call("fallocate", file, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))


def clone(source: int, target: int) -> bool:
    """Let an open file share all blocks of another until one of them changes; False where that is not supported."""
    try:
        fcntl.ioctl(target, _CLONE, source)
    except OSError as error:
        if error.errno in UNSUPPORTED | {errno.EXDEV, errno.ENOTTY, errno.EBADF, errno.EISDIR, errno.ETXTBSY}:
            return False
        raise
    return True


def can_clone(source: Path, folder: Path) -> bool:
    """Whether a file in `folder` can share the blocks of `source`: tried, on a file that never has a name."""
    try:
        file = os.open(folder, getattr(os, "O_TMPFILE", 0) | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        with source.open("rb") as opened:
            return clone(opened.fileno(), file)
    except OSError:
        return False
    finally:
        os.close(file)


def rename_new(old: Path, new: Path) -> None:
    """Rename; never replaces anything, even if it appears at the last moment (where the system can promise that).

    Raises:
        FileExistsError: `new` exists.
        OSError: anything else that stops a rename.
    """
    if not _call("renameat2", _HERE, os.fsencode(old), _HERE, os.fsencode(new), _NO_REPLACE):
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
        old.rename(new)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot, with nothing changed.

    Raises:
        OSError: anything else that stops a rename.
    """
    return _call("renameat2", _HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> bool:
    """Make a call of the C library; False where it is not supported, with nothing done."""
    function = getattr(_library(), name, None)
    if function is None:
        return False
    while function(*arguments) != 0:
        code = ctypes.get_errno()
        if code in UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True
