"""A process of its own that thaws the guest if this one dies between freeze and thaw.

`kill -9`, the kernel's out-of-memory killer or a crash of the interpreter run no `finally`. The watchdog in the guest
would end the freeze too, but only at its deadline, and a guest whose agent allows no commands has none. So before the
freeze a small shell is started that holds the other end of a pipe: if it reads `done`, it ends; if the pipe is closed
without that word, whoever had it is gone, and it thaws at once; where the way to the guest is away too, it tries for
some minutes.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_SCRIPT = """
trap '' HUP INT TERM
read -r word && [ "$word" = done ] && exit 0
for pause in 1 2 4 8 16 30 30 30 30 30 30 30 30 0; do
    "$@" >/dev/null 2>&1 </dev/null && exit 0
    sleep "$pause"
done
"""


@contextmanager
def guarded(thaw: Sequence[str]) -> Iterator[None]:
    """Run the program `thaw` if this process dies inside, or if the block ends by an error: nobody knows then what the
    guest is. Without a program nothing is guarded."""
    if not thaw:
        yield
        return
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _SCRIPT, "stillframe-thaw-guard", *thaw],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    assert guard.stdin is not None
    try:
        yield
        guard.stdin.write(b"done\n")
    finally:
        guard.stdin.close()
        threading.Thread(target=guard.wait, daemon=True).start()
