"""A machine into the file and out of it: what people wrote stays, and the result means what was asked for."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import Config, parse_config
from orchestrator.config_doubts import doubts
from orchestrator.config_edit import Subject, protect, replace_file, replacement, unprotect
from orchestrator.config_origin import settings as settings_of
from workers.contract.errors import Busy, ConfigError, NotFound, UsageError

TEXT = """\
# The lab.
[vaults.main]   # near
url = "file://./v"
key_file = "k"
[vaults.far]
url = "file://./f"
key_file = "k2"
[vaults.copy]
url = "file://./c"
key_file = "k"
replica_of = "main"
[backup]
vault = "main"
[policies.gold]
schedule = "daily at 02:00"
retention = { daily = 7 }
[policies.silver]

[protect.web]
machines = [
    "web-*",  # all of them
    "db-1",
]
policy = "gold"
"""
WEB = Subject("lab", "web-1", ())


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "stillframe.toml"
    file.write_text(TEXT)
    return parse_config(TEXT, file)


def changed(edit_before: str, edit_after: str) -> list[str]:
    """Lines that are new, with `+`, and lines that are gone, with `-`."""
    old, new = edit_before.splitlines(), edit_after.splitlines()
    return [f"-{line}" for line in old if line not in new] + [f"+{line}" for line in new if line not in old and line]


def test_a_new_section_stands_at_the_end(config: Config) -> None:
    edit = protect(config, Subject("lab", "mail", ()), "silver", "far")
    assert edit.after == TEXT + '\n[protect.silver]\nmachines = ["mail"]\npolicy = "silver"\nvault = "far"\n'
    edit.write()
    assert config.path.read_text() == edit.after


def test_a_section_by_names_takes_one_more_and_its_comments_stay(config: Config) -> None:
    edit = protect(config, Subject("lab", "mail", ()), "gold", None)
    assert changed(edit.before, edit.after) == ['+    "mail",'] or '"mail"' in edit.after
    assert "# all of them" in edit.after
    assert "# near" in edit.after


def test_who_is_covered_by_another_policy_is_excluded_there(config: Config) -> None:
    edit = protect(config, WEB, "silver", None)
    assert changed(edit.before, edit.after) == [
        '+exclude = ["web-1"]',
        "+[protect.silver]",
        '+machines = ["web-1"]',
        '+policy = "silver"',
    ]
    assert edit.config.protections("lab", "web-1", ()) == ["silver"]
    into_another = protect(config, WEB, "silver", "far")
    assert into_another.config.protections("lab", "web-1", ()) == ["web", "silver"]


def test_who_is_protected_so_already_stays(config: Config) -> None:
    assert protect(config, WEB, "gold", None).diff == ""
    assert protect(config, WEB, "gold", "main").diff == ""


def test_out_of_the_file(config: Config) -> None:
    assert changed(TEXT, unprotect(config, WEB).after) == ['+exclude = ["web-1"]']
    assert changed(TEXT, unprotect(config, Subject("lab", "db-1", ())).after) == ['-    "db-1",']
    assert unprotect(config, Subject("lab", "mail", ())).diff == ""
    alone = replacement(config, TEXT.replace('    "web-*",  # all of them\n', ""), config.path)
    gone = unprotect(alone.config, Subject("lab", "db-1", ())) if alone.write() is None else alone
    assert "[protect.web]" not in gone.after


def test_mistakes_change_nothing(config: Config) -> None:
    with pytest.raises(NotFound, match="no policy is named 'glod'") as unknown:
        protect(config, WEB, "glod", None)
    assert unknown.value.hint == "did you mean gold?"
    with pytest.raises(NotFound, match="no vault is named 'fat'"):
        protect(config, WEB, "silver", "fat")
    with pytest.raises(UsageError, match="copy is a replica of main"):
        protect(config, WEB, "silver", "copy")
    with pytest.raises(ConfigError, match=r"new\.toml:1: unknown key 'a'"):
        replacement(config, "a = 1\n", Path("new.toml"))
    edit = unprotect(config, WEB)
    config.path.write_text(TEXT + "# somebody else\n")
    with pytest.raises(Busy, match="changed by somebody else"):
        edit.write()
    assert config.path.read_text() == TEXT + "# somebody else\n"


NAMES = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="/"), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(name=NAMES, tags=st.sets(st.sampled_from(["a", "gold"])), alone=st.booleans())
def test_any_name_can_be_written_and_taken_out(
    tmp_path_factory: pytest.TempPathFactory, name: str, tags: set[str], alone: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.toml"
    text = TEXT + '[protect.tagged]\ntags = ["gold"]\npolicy = "gold"\nvault = "far"\n'
    file.write_text(text)
    subject = Subject("lab[1]", name, tags, alone=alone)
    edit = protect(parse_config(text, file), subject, "silver", None)
    edit.write()
    assert edit.config.policies_into("main", "lab[1]", name, tags).keys() == {"silver"}
    assert not edit.config.policies_into("main", "lab[1]", f"{name}x", ())
    out = unprotect(edit.config, subject)
    assert out.config.protections("lab[1]", name, tags) == []


def test_the_file_is_replaced_in_one_step_with_its_mode_behind_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.toml", tmp_path / "link.toml"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    replace_file(link, "new")
    assert (link.is_symlink(), real.read_text(), stat.S_IMODE(real.stat().st_mode)) == (True, "new", 0o640)
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []
    with pytest.raises(ConfigError, match="cannot be written"):
        replace_file(tmp_path / "none" / "x.toml", "new")
    assert not (tmp_path / "none").exists()


# --- what is in force, and what is doubtful ------------------------------------------------------------------------


def test_every_setting_with_its_line(config: Config) -> None:
    config.path.write_text(TEXT + '[catalog]\nurl = "postgresql://u:secret@h/d"\n')
    found = {one.key: one for one in settings_of(parse_config(config.path.read_text(), config.path))}
    assert (found["policies.gold.schedule"].value, found["policies.gold.schedule"].line) == ("daily at 02:00", 15)
    assert (found["policies.gold.retention.daily"].line, found["policies.gold.retention.weekly"].line) == (16, 0)
    assert (found["policies.gold.spread"].value, found["policies.gold.spread"].line) == (0, 0)
    assert found["catalog.url"].value == "postgresql://…@h/d"
    assert found["paths.cache"].line == 0
    assert str(found["paths.cache"].value).startswith("/")


def test_doubts_have_their_lines(config: Config) -> None:
    text = TEXT + (
        '[protect.all]\nmachines = ["*"]\npolicy = "gold"\n[protect.late]\nmachines = ["lab9/x"]\npolicy = "gold"\n'
        '[protect.copied]\nhypervisors = ["*"]\npolicy = "silver"\nvault = "copy"\n[policies.idle]\n'
    )
    config.path.write_text(text)
    lines = text.splitlines()
    found = [(lines[one.line - 1], one.text) for one in doubts(parse_config(text, config.path))]
    assert ("[policies.idle]", "no [protect.*] section uses policy idle") in found
    assert (
        "[protect.late]",
        "[protect.late] never counts: [protect.all] before it has all machines in vault main",
    ) in found
    assert ('machines = ["lab9/x"]', '"lab9/x" is on no hypervisor that is configured (none)') in found
    assert any(line == 'vault = "copy"' and "copy is a replica of main" in words for line, words in found)
    assert any(line == 'policy = "silver"' and "has no schedule" in words for line, words in found)
    assert doubts(config.model_copy(update={"protect": {}, "policies": {}})) == []


@pytest.mark.parametrize("away", [True, False])
def test_a_machine_of_the_same_name_elsewhere_stays_protected(tmp_path: Path, away: bool) -> None:
    text = TEXT.replace('"db-1",', '"db",')
    file = tmp_path / "stillframe.toml"
    file.write_text(text)
    config = parse_config(text, file)
    subject = Subject("lab1", "db", (), alone=False)
    edit = unprotect(config, subject) if away else protect(config, subject, "silver", None)
    assert edit.config.protections("lab2", "db", ()) == ["web"]
    assert "web" not in edit.config.protections("lab1", "db", ())
