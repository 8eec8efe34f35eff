"""XML as Maxio keeps it for old clients: the same usages and components, read into what the JSON of them gives.

Elements and their ``type`` follow Maxio's public documentation: "API: Metered Usage" and "Request and Response Data".
Entities, and documents that define any, are refused (see the documentation of ``defusedxml``).
"""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any
from xml.etree.ElementTree import Element, ParseError, SubElement, tostring

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

_MARKS = {True: "true", False: "false"}


def exact_xml(text: bytes) -> Any:
    """Return what an XML text says, its numbers with every digit: a list for an array, else the root's name and value.

    Raises:
        ValueError: it is no XML, defines entities, or holds what is not of the type that it names.
    """
    try:
        root = fromstring(text, forbid_dtd=True)
        found = _value(root)
    except (ParseError, DefusedXmlException, InvalidOperation, RecursionError, LookupError) as error:
        raise ValueError(f"no XML: {type(error).__name__}") from None
    return found if isinstance(found, list) else {_name(root): found}


def request_xml(body: object) -> str:
    """Return the body of a request, an object with one resource, as XML.

    Raises:
        ValueError: it is no such object.
    """
    if not isinstance(body, dict) or len(body) != 1:
        raise ValueError("no single resource")
    ((name, value),) = body.items()
    root = Element(name)
    _fill(root, value)
    return '<?xml version="1.0" encoding="UTF-8"?>' + tostring(root, encoding="unicode")


def _value(element: Element) -> Any:
    if element.get("nil") == "true":
        return None
    kind, text = element.get("type", ""), (element.text or "").strip()
    if kind == "array":
        return [_value(child) for child in element]
    if len(element):
        return _object(element)
    read = _TYPES.get(kind)
    return (element.text or "") if read is None else read(text)


def _object(element: Element) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for child in element:
        name, value = _name(child), _value(child)
        # Errors come as one element after the other, without a word that they are a list.
        known = found.get(name)
        found[name] = value if name not in found else [*(known if isinstance(known, list) else [known]), value]
    return found


def _name(element: Element) -> str:
    """Return the name of an element as JSON has it; the oldest replies have dashes."""
    return element.tag.replace("-", "_")


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"no XML: {text!r} is no boolean")
    return text == "true"


def _decimal(text: str) -> Decimal:
    if not re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", text):
        raise ValueError(f"no XML: {text!r} is no decimal")
    return Decimal(text)


def _integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(f"no XML: {text!r} is no integer")
    return int(text)


_TYPES: Mapping[str, Callable[[str], Any]] = {"integer": _integer, "decimal": _decimal, "boolean": _boolean}


def _fill(element: Element, value: object) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _fill(SubElement(element, str(name)), inner)
    elif isinstance(value, list):
        element.set("type", "array")
        for inner in value:
            _fill(SubElement(element, element.tag.removesuffix("s")), inner)
    elif value is None:
        element.set("nil", "true")
    else:
        text = _MARKS[value] if isinstance(value, bool) else f"{value:f}" if isinstance(value, Decimal) else str(value)
        element.text = text
