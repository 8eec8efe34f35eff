"""Replies as they come when something is wrong with them."""

import json
from decimal import Decimal

from starlette.responses import HTMLResponse, Response

from .faults import Fault
from .wire import BadJson, Call, CutShort, NoReply, dump_json

_PAGE = "<!DOCTYPE html><html><head><title>Error</title></head><body><h1>Please try again later.</h1></body></html>"


def spoilt(reply: Response, fault: Fault) -> Response:
    """Return what a client gets instead of a reply."""
    if fault.fault == "truncated_body":
        return CutShort(reply) if reply.body else NoReply()
    if fault.fault == "empty_body":
        return Response(b"", reply.status_code)
    if fault.fault == "html_error":
        return HTMLResponse(_PAGE, fault.code)
    if fault.fault == "wrong_type":
        return Response(_with_wrong_types(bytes(reply.body)), reply.status_code, media_type="application/json")
    return NoReply()


def first_half(call: Call) -> Call:
    """Return a bulk request with the first half of its items; one that has none, as it is."""
    try:
        items = call.json()
    except BadJson:
        return call
    return Call(call.request, dump_json(items[: len(items) // 2]).encode()) if isinstance(items, list) else call


def _with_wrong_types(body: bytes) -> str:
    """Return JSON in which texts stand for objects, arrays and numbers, and an object for an array."""
    try:
        content = json.loads(body, parse_float=Decimal)
    except ValueError:
        return dump_json({"result": "true"})
    if isinstance(content, list):
        return dump_json({str(position): dump_json(item) for position, item in enumerate(content)})
    if isinstance(content, dict):
        return dump_json({name: dump_json(value) for name, value in content.items()})
    return dump_json(str(content))
