"""XML on Maxio's main API: what old clients send and get in place of JSON.

Elements follow the public documentation of the old API, which says little; numbers are typed where its examples type
them.
"""

import json
from decimal import Decimal
from typing import Any
from xml.etree.ElementTree import Element, ParseError, SubElement, tostring

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from starlette.responses import Response

from usage_billing.sandbox.wire import BadJson, Call, dump_json

MEDIA_TYPE = "application/xml"
_LISTS = {"list_usages": "usages", "list_components": "components", "list_family_components": "components"}
_DECIMALS = ("quantity", "unit_price", "unit_balance")
"""Elements that are numbers though JSON has them as text."""
_PROLOGUE = '<?xml version="1.0" encoding="UTF-8"?>\n'


def wanted(call: Call) -> bool:
    """Say whether a request is about XML: by the suffix of its path, or by what it accepts."""
    return bool(call.request.scope.get("xml")) or MEDIA_TYPE in call.request.headers.get("accept", "")


def understood(call: Call) -> Call:
    """Return a request whose body is XML as one of JSON; `BadJson` when it is none."""
    if not call.body.strip():
        return call
    try:
        root = fromstring(call.body, forbid_dtd=True)
    except (ParseError, DefusedXmlException) as error:
        raise BadJson(str(error)) from error
    return Call(call.request, dump_json({root.tag: _content(root)}).encode())


def marked_up(reply: Response, route: str, *, bare_when_empty: bool) -> Response:
    """Return a reply of JSON as XML; `bare_when_empty` gives an empty list the name that it has without any row."""
    if not reply.body or "json" not in reply.headers.get("content-type", ""):
        return reply
    said = json.loads(bytes(reply.body), parse_float=Decimal)
    if isinstance(said, list):
        root = Element("nil-classes" if bare_when_empty and not said else _LISTS.get(route, "rows"), type="array")
        for row in said:
            ((name, value),) = row.items()
            _write(SubElement(root, name), value)
    else:
        ((name, value),) = said.items()
        root = Element(name)
        if name == "errors":
            for message in value:
                SubElement(root, "error").text = str(message)
        else:
            _write(root, value)
    return Response(_PROLOGUE + tostring(root, encoding="unicode"), reply.status_code, media_type=MEDIA_TYPE)


def _content(element: Element) -> Any:
    if element.get("nil") == "true":
        return None
    if element.get("type") == "array":
        return [_content(child) for child in element]
    if len(element):
        return {child.tag: _content(child) for child in element}
    text = element.text or ""
    # Bodies name no types, so what is a number is told by its name.
    if element.tag in _DECIMALS:
        try:
            return Decimal(text.strip())
        except ArithmeticError:
            return text
    return text


def _write(element: Element, value: object) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _write(SubElement(element, name), inner)
    elif isinstance(value, list):
        element.set("type", "array")
        for inner in value:
            _write(SubElement(element, element.tag.removesuffix("s")), inner)
    elif value is None:
        element.set("nil", "true")
    elif isinstance(value, bool):
        element.set("type", "boolean")
        element.text = str(value).lower()
    else:
        whole = isinstance(value, int)
        if whole or isinstance(value, Decimal) or element.tag in _DECIMALS:
            element.set("type", "integer" if whole else "decimal")
        element.text = f"{value:f}" if isinstance(value, Decimal) else str(value)
