"""The writers' states, read from texts in the languages and code pages in which they come."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from workers.guests.vss import Writer, failed_writers, writers

NAMES = ["Task Scheduler Writer", "VSS Metadata Store Writer", "System Writer", "SqlServerWriter", "WMI Writer"]
# Labels, quotation mark, what stands for `stable`, `failed`, `no error`, `timed out`. English, German and French as
# recorded; Japanese in the same order.
LANGUAGES: dict[str, tuple[list[str], str, list[str]]] = {
    "english": (
        ["Writer name: ", "Writer Id: ", "Writer Instance Id: ", "State: ", "Last error: "],
        "'",
        ["Stable", "Failed", "No error", "Timed out"],
    ),
    "german": (
        ["Verfassername: ", "Verfasserkennung: ", "Verfasserinstanzkennung: ", "Status: ", "Letzter Fehler: "],
        '"',
        ["Stabil", "Fehlgeschlagen", "Kein Fehler", "Zeitüberschreitung"],
    ),
    "french": (
        [
            *("Nom du rédacteur : ", "ID du rédacteur : ", "ID de l’instance du rédacteur : "),
            *("État : ", "Dernière erreur : "),
        ],
        "'",
        ["Stable", "Échec", "Aucune erreur", "Délai dépassé"],
    ),
    "japanese": (
        ["ライター名: ", "ライター ID: ", "ライター インスタンス ID: ", "状態: ", "最後のエラー: "],
        "'",
        ["安定", "失敗", "エラーなし", "タイムアウト"],
    ),
}
MANGLED: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "cp850 taken for utf-8": lambda text: text.encode("cp850", "replace").decode("utf-8", "replace"),
    "utf-8 taken for cp437": lambda text: text.encode().decode("cp437"),
    "shift-jis taken for cp1252": lambda text: text.encode("cp932", "replace").decode("cp1252", "replace"),
    "question marks": lambda text: text.encode("ascii", "replace").decode(),
    "without empty lines": lambda text: "\n".join(line for line in text.splitlines() if line.strip()),
    "with carriage returns": lambda text: text.replace("\n", "\r\n"),
}


def guid(number: int) -> str:
    return f"{{e8132975-6f93-4464-a53e-{number:012x}}}"


def printed(language: str, bad: dict[str, tuple[int, bool]] | None = None, names: list[str] = NAMES) -> str:
    """What vssadmin prints; `bad`: name → (state, whether there is an error)."""
    labels, quote, (stable, failed, none, error) = LANGUAGES[language]
    lines = ["vssadmin 1.1 - Volume Shadow Copy Service", "(C) Copyright 2001-2013 Microsoft Corp.", ""]
    lines += ["Waiting for responses.", "These may be delayed if a shadow copy is being prepared.", ""]
    for number, name in enumerate(names):
        state, has_error = (bad or {}).get(name, (1, False))
        lines += [f"{labels[0]}{quote}{name}{quote}", f"   {labels[1]}{guid(number)}", f"   {labels[2]}{guid(99)}"]
        lines += [f"   {labels[3]}[{state}] {stable if state == 1 else failed}"]
        lines += [f"   {labels[4]}{error if has_error else none}", ""]
    return "\n".join(lines)


@pytest.mark.parametrize("mangled", MANGLED)
@pytest.mark.parametrize("language", LANGUAGES)
class TestInAnyLanguage:
    def test_all_is_well(self, language: str, mangled: str) -> None:
        text = MANGLED[mangled](printed(language))
        assert [(writer.name, writer.id, writer.state_code) for writer in writers(text)] == [
            (name, guid(number), 1) for number, name in enumerate(NAMES)
        ]
        assert failed_writers(text) == []

    def test_a_failed_one_is_named(self, language: str, mangled: str) -> None:
        found = failed_writers(MANGLED[mangled](printed(language, {"SqlServerWriter": (8, True)})))
        assert found is not None
        assert len(found) == 1
        assert found[0].startswith("SqlServerWriter (state 8: ")

    def test_one_that_is_stable_with_an_error(self, language: str, mangled: str) -> None:
        found = failed_writers(MANGLED[mangled](printed(language, {"System Writer": (1, True)})))
        assert found is not None
        assert [name.partition(" (")[0] for name in found] == ["System Writer"]

    def test_waiting_for_a_completion_that_nobody_tells_is_fine(self, language: str, mangled: str) -> None:
        assert failed_writers(MANGLED[mangled](printed(language, {"WMI Writer": (5, False)}))) == []

    @pytest.mark.parametrize("state", [0, 2, 3, 4, 6, 12, 15])
    def test_every_other_state(self, language: str, mangled: str, state: int) -> None:
        found = failed_writers(MANGLED[mangled](printed(language, {"WMI Writer": (state, False)})))
        assert found is not None
        assert len(found) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "vssadmin 1.1\n\nNo items found that satisfy the query.\n",
        "Error: A Volume Shadow Copy Service component encountered an unexpected error.\n",
        "State: [1] Stable\nLast error: No error\n",
        guid(1),
        "{not a guid}\n" * 50,
        "\0\ufffd" * 1000,
    ],
)
def test_what_proves_nothing(text: str) -> None:
    assert failed_writers(text) is None


def test_words_of_an_unknown_language_need_to_be_said_often() -> None:
    assert failed_writers(printed("japanese", names=NAMES[:2])) is None
    assert failed_writers(printed("japanese", names=NAMES[:3])) == []
    half = dict.fromkeys(NAMES[:3], (1, True))
    assert failed_writers(printed("japanese", half, names=[*NAMES, "Sixth"])) is None


@pytest.mark.parametrize("language", ["english", "german", "french"])
def test_all_with_the_same_error(language: str) -> None:
    found = failed_writers(printed(language, dict.fromkeys(NAMES, (1, True))))
    assert found is not None
    assert len(found) == len(NAMES)


def test_all_failed_in_a_language_that_nobody_knows() -> None:
    found = failed_writers(printed("japanese", dict.fromkeys(NAMES, (7, True))))
    assert found is not None
    assert len(found) == len(NAMES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_text_that_was_cut(language: str) -> None:
    """Wherever the cut is, no writer passes for a good one whose last line is not whole."""
    text = printed(language)
    for at in range(len(text)):
        found = failed_writers(text[:at])
        if found is not None:
            assert len(writers(text[:at])) - len(found) <= text[:at].count(LANGUAGES[language][2][2])


def test_a_name_with_quotation_marks_and_colons() -> None:
    [writer] = writers(printed("english", names=["Joe's: 'odd' Writer"]))
    assert writer == Writer("Joe's: 'odd' Writer", guid(0), 1, "No error")
