"""The immutable flag of a file (`chattr +i`), where the file system has one and we may set it.

While it is set nobody changes, renames, links or removes the file, root included, before taking it off again.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

_GET_FLAGS = 0x80086601
_SET_FLAGS = 0x40086602
_IMMUTABLE = 0x10
"""FS_IOC_GETFLAGS, FS_IOC_SETFLAGS and FS_IMMUTABLE_FL of `linux/fs.h`."""


def set_immutable(path: Path, wanted: bool) -> bool:
    """Set the flag or take it off. False: this file system has none, or we may not."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        buffer = bytearray(8)
        fcntl.ioctl(fd, _GET_FLAGS, buffer)
        (flags,) = struct.unpack_from("=I", buffer)
        changed = flags | _IMMUTABLE if wanted else flags & ~_IMMUTABLE
        if changed != flags:
            fcntl.ioctl(fd, _SET_FLAGS, struct.pack("=II", changed, 0))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
