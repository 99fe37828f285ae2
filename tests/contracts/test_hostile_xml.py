"""Documents and tags that somebody wrote who means no good, or nothing at all."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.contract.errors import HypervisorError
from workers.hypervisors import domain_xml, tags, xml

BOMB = "<!DOCTYPE d [<!ENTITY a 'aaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;'>]><domain><name>&b;</name></domain>"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BOMB, "document type"),
        ("<!DOCTYPE d SYSTEM 'file:///etc/passwd'><d/>", "document type"),
        ("<a>" * 257 + "</a>" * 257, "256 elements"),
        ("<a>" + " " * xml.LONGEST + "</a>", "is not read"),
        ("<a", "cannot be read"),
        ("<a>\ud800</a>", "cannot be read"),
        ("", "cannot be read"),
        ("<a>\x1b[2J</a>", "cannot be read"),
    ],
)
def test_what_is_not_read(text: str, why: str) -> None:
    with pytest.raises(HypervisorError, match=why):
        xml.parse(text)
    assert tags.of_definition(text) == []


def test_it_is_read_as_elementtree_reads_it() -> None:
    text = "<d xmlns:q='urn:q' q:at='1'><q:a b='2'>x<c/>y</q:a>\n<n>&lt;\u202e</n></d>"
    assert ET.tostring(xml.parse(text)) == ET.tostring(ET.fromstring(text))


def machine(metadata: str = "", description: str = "") -> str:
    return f"<domain><metadata>{metadata}</metadata><description>{description}</description></domain>"


@pytest.mark.parametrize(
    ("definition", "found"),
    [
        (machine("<s:tags xmlns:s='urn:stillframe:tags'>gold  nightly,gold</s:tags>"), ["gold", "nightly"]),
        (machine("<tags xmlns='urn:stillframe:tags'><t>gold</t> <t>db</t></tags>"), ["gold", "db"]),
        (machine("<s:tags xmlns:s='urn:other'>gold</s:tags>"), []),
        (machine(description="web [stillframe: gold nightly], and [stillframe:db]"), ["gold", "nightly", "db"]),
        (machine(description="[stillframe: $(reboot) ../x 'a' -rf \u202eevil * gold]"), ["gold"]),
        (machine(description="[stillframe: " + "x" * 64 + " " + "y" * 63 + "]"), ["y" * 63]),
        (machine(description=" ".join(f"[stillframe: t{n}]" for n in range(99))), [f"t{n}" for n in range(32)]),
        (machine(description="[stillframe: gold"), []),
    ],
)
def test_tags(definition: str, found: list[str]) -> None:
    assert tags.of_definition(definition) == found


@given(st.text(max_size=200))
def test_whatever_is_written_tags_are_plain_words(text: str) -> None:
    for word in [*tags.words(text), *tags.in_description(f"[stillframe:{text}]"), *tags.of_definition(text)]:
        assert word.isascii()
        assert not set(word) & set(" /\\'\"$*?[]\n\t;|&<>`~")
        assert word[0].isalnum()


@given(st.recursive(st.text("<>&'\"ab/ \x00", max_size=20), lambda inner: inner.map(lambda s: f"<disk>{s}</disk>")))
def test_a_definition_is_read_or_refused(text: str) -> None:
    for look in (domain_xml.disks, domain_xml.nvram_path, domain_xml.agent_connected, domain_xml.pool_folder):
        try:
            look(f"<domain><devices>{text}</devices></domain>")
        except HypervisorError:
            continue
