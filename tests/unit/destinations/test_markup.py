"""XML of a billing site: read exactly or not at all, and never more than was sent."""

from decimal import Decimal

import pytest

from usage_billing.destinations.exact import exact_json
from usage_billing.destinations.maxio.markup import exact_xml, request_xml

USAGE = b"<usage><id>123</id><quantity type='integer'>5</quantity><memo>My Memo</memo></usage>"


def test_a_usage_is_read_as_json_has_it() -> None:
    """Typed elements are numbers with every digit, untyped ones texts, and nil is nothing."""
    found = exact_xml(
        b"<?xml version='1.0' encoding='UTF-8'?>"
        b"<usage><id type='integer'>7</id><quantity type='decimal'>12345678901234567.10</quantity><memo nil='true'/>"
        b"<component-handle>calls</component-handle><archived type='boolean'>false</archived><note/></usage>"
    )
    assert found == {
        "usage": {
            "id": 7, "quantity": Decimal("12345678901234567.10"), "memo": None, "component_handle": "calls",
            "archived": False, "note": "",
        }
    }  # fmt: skip
    assert exact_xml(USAGE) == {"usage": {"id": "123", "quantity": 5, "memo": "My Memo"}}


@pytest.mark.parametrize("root", [b"usages", b"nil-classes"])
def test_an_array_is_a_list(root: bytes) -> None:
    """Also an empty one, whatever the site calls it."""
    assert exact_xml(b"<" + root + b" type='array'/>") == []
    assert exact_xml(b"<" + root + b" type='array'>" + USAGE + USAGE + b"</" + root + b">") == 2 * [
        {"id": "123", "quantity": 5, "memo": "My Memo"}
    ]


def test_errors_are_all_kept() -> None:
    """They come one after the other, and none takes another's place."""
    text = b"<errors><error>one</error><error>two</error><error>three</error></errors>"
    assert exact_xml(text) == {"errors": {"error": ["one", "two", "three"]}}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<usage>",
        b"{}",
        b"<usage><id type='integer'>5.5</id></usage>",
        b"<usage><id type='integer'/></usage>",
        b"<usage><quantity type='decimal'>many</quantity></usage>",
        b"<usage><quantity type='decimal'>NaN</quantity></usage>",
        b"<usage><quantity type='decimal'>1_000.5</quantity></usage>",
        b"<usage><id type='integer'>1_000</id></usage>",
        b"<?xml version='1.0' encoding='x-foo'?><usage/>",
        b"<usage><archived type='boolean'>1</archived></usage>",
        b"<!DOCTYPE u [<!ENTITY a 'aaaa'>]><usage><memo>&a;</memo></usage>",
        b"<!DOCTYPE u SYSTEM 'file:///etc/passwd'><usage/>",
        b"<!DOCTYPE html><html></html>",
    ],
)
def test_what_is_none_is_never_guessed(text: bytes) -> None:
    """Cut short, of another type than it names, or with entities, which may grow without end or read files."""
    with pytest.raises(ValueError, match="no XML"):
        exact_xml(text)


def test_a_request_keeps_every_digit() -> None:
    """And every character."""
    price = '"custom_price":{"prices":[{"unit_price":0.10}]}'
    body = f'{{"usage":{{"quantity":12345678901234567.10,"memo":"a & b <c>",{price}}}}}'
    prices = '<prices type="array"><price><unit_price>0.10</unit_price></price></prices>'
    parts = "<quantity>12345678901234567.10</quantity><memo>a &amp; b &lt;c&gt;</memo>"
    usage = f"<usage>{parts}<custom_price>{prices}</custom_price></usage>"
    assert request_xml(exact_json(body)) == f'<?xml version="1.0" encoding="UTF-8"?>{usage}'
    for odd in ("[]", "{}", '{"a":1,"b":2}', "5"):
        with pytest.raises(ValueError, match="no single resource"):
            request_xml(exact_json(odd))
