"""The demo: a real machine, made here, backed up, changed, backed up again, restored, and compared from inside.

Also the makers of the small guests that the tests use. Everything of the demo's own is named `stillframe-demo-*` or
lies in one marked folder, so that it can be removed without asking what belongs to whom.
"""

from __future__ import annotations

from pathlib import Path


def run_demo(directory: Path | None = None, *, clean: bool = False, json: bool = False, svg: Path | None = None) -> int:
    """Run the demo in `directory` (default: /var/lib/stillframe-demo), or with `clean` remove what it left; its exit
    code. `svg`: also draw what was printed into that file. Raises StillframeError."""
    # Imported now: `stillframe --help` and the tests' guests need none of it.
    from orchestrator.demo.place import DEFAULT, Place
    from orchestrator.demo.stage import Stage
    from orchestrator.demo.story import Story

    place = Place((directory or DEFAULT).expanduser().absolute())
    stage = Stage(as_json=json)
    if clean:
        for line in place.clean():
            stage.say(f"removed {line}")
            stage.record("removed", {"what": line})
        return 0
    code = Story(place, stage).tell()
    if svg is not None:
        stage.save_svg(svg)
    return code
