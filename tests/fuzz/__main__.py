"""Fuzz the vault's decoders, guided by coverage: `python -m tests.fuzz [DECODER] [libFuzzer's options]`.

Without a name the first byte chooses one. What crashes is kept as `crash-…` (where: `-artifact_prefix=`); give that
file as an argument to see it again. A night of it: `-max_total_time=28800 -rss_limit_mb=256 -fork=2`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["workers.vault", "workers.contract"]):
    from tests.fuzz.decoders import Decoder, decoders


def _corpus(folder: Path, chosen: dict[str, Decoder], *, prefixed: bool) -> None:
    """Objects that are accepted, to begin with."""
    for number, decoder in enumerate(chosen.values()):
        for at, seed in enumerate(decoder.seeds):
            (folder / f"{number}-{at}").write_bytes(bytes([number]) * prefixed + seed)


def main() -> None:
    known = decoders()
    names = [argument for argument in sys.argv[1:] if argument in known]
    chosen = {name: known[name] for name in names} or known
    checks = [decoder.check for decoder in chosen.values()]

    def one(data: bytes) -> None:
        if len(checks) == 1:
            checks[0](data)
        elif data:
            checks[data[0] % len(checks)](data[1:])

    with tempfile.TemporaryDirectory() as corpus:
        _corpus(Path(corpus), chosen, prefixed=len(checks) > 1)
        options = [argument for argument in sys.argv[1:] if argument not in known]
        files = [option for option in options if not option.startswith("-")]
        atheris.Setup([sys.argv[0], "-max_len=16384", *options, *([] if files else [corpus])], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
