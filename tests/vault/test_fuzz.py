"""Any bytes, in the place of any object: an error of ours or the right content, and never much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.decoders import decoders

DECODERS = decoders()
JSON = [
    name
    for name in DECODERS
    if name
    in (
        "keyring",
        "manifest",
        "marker",
        "slot",
        "stretched slot",
        "session",
        "trash",
        "deletion",
        "pin",
        "gone",
        "plain",
    )
]


@st.composite
def edits(draw: st.DrawFn, seed: bytes) -> bytes:
    """`seed` after a few accidents."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "set", "cut", "drop", "insert", "repeat", "number"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if data:
                data[at] = draw(st.sampled_from([0, 1, 127, 128, 255]))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=64))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 200))]
            case "number":
                data[at : at + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"]))
    return bytes(data)


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_objects_after_an_accident(name: str, data: st.DataObject) -> None:
    decoder = DECODERS[name]
    decoder.check(data.draw(edits(data.draw(st.sampled_from(decoder.seeds)))))


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=300))
def test_bytes_of_any_kind(name: str, data: bytes) -> None:
    DECODERS[name].check(data)


def test_what_we_wrote_is_accepted() -> None:
    """Else the tests above would pass with decoders that refuse everything."""
    for name, decoder in DECODERS.items():
        for seed in decoder.seeds:
            if name != "stretched slot":  # nobody has its passphrase
                found = decoder.decode(seed)
                assert decoder.genuine is None or found in decoder.genuine, name


LEAVES = [
    None,
    True,
    0,
    -1,
    1 << 70,
    1.5,
    float("inf"),
    float("nan"),
    "",
    "x",
    "\ud800",
    "zz" * 32,
    [],
    {},
    [[]],
    {"": []},
]


@st.composite
def twisted(draw: st.DrawFn, value: object) -> object:
    """JSON of the same shape, of which some values are others."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(LEAVES))
    if isinstance(value, dict):
        return {key: draw(twisted(child)) for key, child in value.items() if draw(st.integers(0, 9))}
    if isinstance(value, list):
        return [draw(twisted(child)) for child in value]
    return value


@pytest.mark.parametrize("name", JSON)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_json_of_the_right_shape_with_wrong_values(name: str, data: st.DataObject) -> None:
    """Plain objects get the sum of what they say now: sums need no key."""
    decoder = DECODERS[name]
    fields = json.loads(data.draw(st.sampled_from(decoder.seeds)))
    decoder.check(json.dumps(data.draw(twisted(fields))).encode())


def replaced(value: object) -> Iterator[object]:
    """JSON in which one value, anywhere, is another."""
    yield from LEAVES
    for key, child in value.items() if isinstance(value, dict) else ():
        yield {other: kept for other, kept in value.items() if other != key}
        yield from ({**value, key: other} for other in replaced(child))
    for at, child in enumerate(value) if isinstance(value, list) else ():
        yield from ([*value[:at], other, *value[at + 1 :]] for other in replaced(child))


@pytest.mark.parametrize("name", JSON)
def test_each_value_in_turn_is_of_another_kind(name: str) -> None:
    for seed in DECODERS[name].seeds:
        for fields in replaced(json.loads(seed)):
            DECODERS[name].check(json.dumps(fields).encode())


@pytest.mark.parametrize("name", JSON)
def test_nesting_of_any_depth(name: str) -> None:
    """Also of a depth that is just not too much for the parser."""
    near = range(850, 1000) if name == "plain" else (900, 950)
    for depth in (100, *near, 5000, 30_000):
        for open, close in (("[", "]"), ('{"a":', "}")):
            text = open * depth + "1" + close * depth
            DECODERS[name].check(text.encode())
            DECODERS[name].check(f'{{"sum": 1, "id": {text}}}'.encode())


def test_bombs_do_not_cost_memory() -> None:
    """In a process of its own, which tells its largest size: Python and the libraries are about a quarter of it."""
    ran = subprocess.run([sys.executable, "-m", "tests.fuzz.bombs"], capture_output=True, text=True, check=True)
    peaks = dict(line.split(": ") for line in ran.stdout.splitlines())
    assert len(peaks) >= 8
    assert max(map(int, peaks.values())) < 256, ran.stdout


def test_atheris_finds_nothing(tmp_path: Path) -> None:
    """A bounded run over all decoders, guided by coverage; for a long one see `tests/fuzz/__main__.py`."""
    limits = ["-runs=3000", "-max_total_time=20", "-rss_limit_mb=256", "-seed=7"]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *limits, f"-artifact_prefix={tmp_path}/"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert list(tmp_path.iterdir()) == []
    assert "Done" in ran.stderr
