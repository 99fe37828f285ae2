"""Reading XML that a machine's owner may have written: within limits, and without entities.

libvirt has read every definition before us and refuses the worst; the limits here hold for whatever else speaks its
language, and for documents that come from somewhere else.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET
from xml.parsers import expat

from workers.contract.errors import HypervisorError

LONGEST = 4 << 20
"""Characters: what libvirt carries in one string."""
DEEPEST = 256
"""Elements inside each other: where libvirt's own parser gives up."""


def parse(text: str) -> ET.Element:
    """The root element. Raises HypervisorError for what is no XML, has a document type (and so could have entities),
    is longer than LONGEST or deeper than DEEPEST."""
    if len(text) > LONGEST:
        raise HypervisorError(f"an XML document of {len(text)} characters is not read: {LONGEST} are the limit")
    builder, depth = ET.TreeBuilder(), 0

    def begin(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise HypervisorError(f"an XML document with more than {DEEPEST} elements inside each other is not read")
        builder.start(_named(tag), {_named(name): value for name, value in attributes.items()})

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(_named(tag))

    def refuse(*_: object) -> None:
        raise HypervisorError("an XML document with a document type is not read")

    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = begin, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(text, True)
    except (expat.ExpatError, UnicodeEncodeError) as error:
        raise HypervisorError(f"an XML document cannot be read: {error}") from None
    return builder.close()


def _named(name: str) -> str:
    """As ElementTree writes it: `{namespace}tag`."""
    return "{" + name if "}" in name else name
