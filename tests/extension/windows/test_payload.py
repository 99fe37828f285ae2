"""ext.ps1 and the scripts of the driver. Nothing here can run them: they are parsed, and searched for what must not be
there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import tree_sitter
import tree_sitter_powershell

from tests.guests.fake_windows_shell import EXT
from tests.guests.fake_windows_system import PROVIDER_ID_KEY, PROVIDER_KEY
from workers.contract.guests import CONTRACT_VERSION, Quiesced, Resumed, Status
from workers.guests.package import VERBS
from workers.guests.windows import CLOSED, SCRIPTS, script

PARSER = tree_sitter.Parser(tree_sitter.Language(tree_sitter_powershell.language()))
EXT_TEXT = EXT.read_text(encoding="ascii")
TEXTS = {
    "ext.ps1": EXT_TEXT,
    "look": script("look", {}),
    "stage": script("stage", {"stage": ".stage-1", "folders": ["a", "a/b"]}),
    "check": script("check", {"stage": ".stage-1", "files": {"ext.ps1": "00", "a/b": "11"}}),
    "remove": script("remove", {"names": ["current.txt"]}),
}
CMDLETS = {
    *("ConvertTo-Json", "Get-FileHash", "Get-Item", "Join-Path", "New-ItemProperty", "New-Object", "Remove-Item"),
    *("Split-Path", "Test-Path", "Write-Output"),
}
WRITING = {
    "[IO.File]::WriteAllText",
    "[IO.File]::Replace",
    "[IO.File]::Move",
    "[IO.Directory]::Move",
    "[IO.Directory]::CreateDirectory",
    "[IO.Directory]::SetAccessControl",
}
READING = {
    "[IO.File]::Exists",
    "[IO.File]::ReadAllText",
    "[IO.File]::GetAttributes",
    "[IO.Directory]::GetAccessControl",
    "[IO.Directory]::GetDirectories",
}


def nodes(text: str, kind: str) -> Iterator[str]:
    """The source of every node of that kind."""
    data = text.encode()
    waiting = [PARSER.parse(data).root_node]
    while waiting:
        node = waiting.pop()
        waiting += node.children
        if node.type == kind:
            yield data[node.start_byte : node.end_byte].decode()


def functions(text: str) -> dict[str, str]:
    """Name → source."""
    return {source.split("(")[0].split("{")[0].split()[1]: source for source in nodes(text, "function_statement")}


def parses(text: str) -> bool:
    return not PARSER.parse(text.encode()).root_node.has_error


@pytest.mark.parametrize("name", TEXTS)
class TestEveryScript:
    def test_it_parses(self, name: str) -> None:
        assert parses(TEXTS[name])

    def test_the_parser_would_notice(self, name: str) -> None:
        text = TEXTS[name]
        for broken in (text + "\nif ($x) {", "".join(text.rsplit("}", 1)), text + "\n'open", text + "\n}"):
            assert not parses(broken)

    def test_only_commands_that_are_known_by_their_full_names(self, name: str) -> None:
        """No alias, and nothing that runs text."""
        text = TEXTS[name]
        assert set(nodes(text, "command_name")) <= CMDLETS | set(functions(text))
        for word in ("Invoke-Expression", "iex", "Invoke-Command", "DownloadString", "Everyone", "S-1-1-0", "Add-Type"):
            assert not re.search(rf"(?i)\b{re.escape(word)}\b", text)
        started = [command for command in nodes(text, "command") if command.startswith(("&", "."))]
        assert started == (
            ["& (Join-Path $env:SystemRoot 'System32\\vssadmin.exe') 'list' 'writers'"] * (name == "ext.ps1")
        )

    def test_files_are_touched_in_known_ways(self, name: str) -> None:
        used = set(re.findall(r"\[IO\.\w+\]::\w+", TEXTS[name]))
        assert used <= WRITING | READING | {"[IO.FileAttributes]::ReparsePoint"}

    def test_where_paths_begin(self, name: str) -> None:
        """No path of the file system is written out: all begin at the two folders, or at the system's own."""
        text = TEXTS[name]
        assert not re.search(r"(?<!HKLM:)['\"(]\s*[A-Za-z]:\\", text.replace("HKLM:\\", ""))
        assert set(re.findall(r"\$env:\w+", text)) <= {"$env:ProgramFiles", "$env:ProgramData", "$env:SystemRoot"}
        assert text.count("$env:SystemRoot") == (name == "ext.ps1")
        for use in re.findall(r"Join-Path \$env:Program\w+ '\w+'|\$env:Program\w+", text):
            assert use in ("Join-Path $env:ProgramFiles 'Stillframe'", "Join-Path $env:ProgramData 'Stillframe'")

    def test_errors_stop_it_and_progress_is_silent(self, name: str) -> None:
        assert "$ErrorActionPreference = 'Stop'\n$ProgressPreference = 'SilentlyContinue'" in TEXTS[name]


class TestExt:
    def test_every_verb_is_there_and_ends_with_an_answer(self) -> None:
        clauses = re.findall(r"'(\w+)' \{ (Invoke-\w+) \}", EXT_TEXT)
        assert sorted(verb for verb, _ in clauses) == sorted(VERBS)
        for _, function in clauses:
            last = functions(EXT_TEXT)[function].rstrip("} \n").splitlines()[-1]
            assert "Exit-Verb" in functions(EXT_TEXT)[function], last

    def test_only_small_and_plain(self) -> None:
        assert len(EXT_TEXT.splitlines()) < 300
        assert EXT_TEXT.isascii()
        assert "\r" not in EXT_TEXT
        assert max(map(len, EXT_TEXT.splitlines())) <= 130

    def test_what_is_written_is_in_the_two_folders(self) -> None:
        """All writing goes through four functions, and each use of these names a path in one of the two folders."""
        body = functions(EXT_TEXT)
        for name, source in body.items():
            if name not in ("Save-Text", "New-Data", "Invoke-Install"):
                assert not WRITING & set(re.findall(r"\[IO\.\w+\]::\w+", source)), name
        assert [name for name, source in body.items() if "Remove-Item" in source] == ["Remove-Whole"]
        places = r"\(Join-Path \$(Root|Data|PSScriptRoot) '[a-z.]+'\)|\$Root|\$Data|\$file|\$folder"
        for use in re.findall(r"(?:Save-Text|Remove-Whole) (?!\{)(.*)", EXT_TEXT.replace("function Remove-Whole(", "")):
            if not use.startswith("([string]"):
                assert re.match(places, use), use

    def test_one_value_of_the_registry_is_set(self) -> None:
        [setting] = re.findall(r"New-ItemProperty.*", EXT_TEXT)
        assert "-LiteralPath $Provider -Name 'VssOption' -PropertyType DWord" in setting
        assert f"$Provider = '{PROVIDER_KEY}'" in EXT_TEXT
        assert f"$ProviderId = '{PROVIDER_ID_KEY.rpartition(chr(92))[2]}'" in EXT_TEXT
        assert "$FullBackup = 1\n$CopyBackup = 5\n" in EXT_TEXT

    def test_folders_are_closed_by_the_same_rules(self) -> None:
        assert EXT_TEXT.count(CLOSED) == 1
        assert SCRIPTS["stage"].count(CLOSED) == 1
        assert re.findall(r"\(A;\w*;\w+;;;(\w+)\)", CLOSED) == ["SY", "BA"]
        assert "D:P(" in CLOSED, "nothing inherited"

    def test_the_answers_have_the_contracts_fields(self) -> None:
        body = functions(EXT_TEXT)
        for function, kind in (("Status", Status), ("Quiesce", Quiesced), ("Resume", Resumed)):
            said = set(
                re.findall(
                    r"(?:@\{|;|\n) *(\w+) = ", "".join(nodes(body[f"Invoke-{function}"], "hash_literal_expression"))
                )
            )
            assert said
            assert said <= set(kind.model_fields)
            required = {name for name, field in kind.model_fields.items() if field.is_required()}
            assert required <= said
        assert f"$Contract = {CONTRACT_VERSION}\n" in EXT_TEXT

    def test_exit_codes_are_the_contracts(self) -> None:
        assert {int(code) for code in re.findall(r"(?:Exit-Verb|Stop-Verb|exit) (\d+)", EXT_TEXT)} <= {
            0,
            3,
            10,
            11,
            20,
            30,
        }
