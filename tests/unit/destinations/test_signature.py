"""ChargeOver's signature of a request, by a vector and against the sandbox."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from usage_billing.destinations.chargeover import ChargeOverSettings, ChargeOverSite
from usage_billing.destinations.chargeover.signature import SignatureAuth, signature
from usage_billing.destinations.http import Transport
from usage_billing.errors import Misconfigured
from usage_billing.sandbox import Sandbox

WORLD = Path(__file__).parents[3] / "include" / "sandbox" / "worlds" / "telco.yaml"
PUBLIC, PRIVATE = "sandboxtelcopublickey00000000000", "sandboxtelcoprivatekey0000000000"
SITE = "chargeover:telco"


@pytest.fixture(scope="module")
def running() -> Iterator[Sandbox]:
    """Run the account once."""
    with Sandbox([WORLD]) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running: Sandbox) -> Sandbox:
    """Give each test the account as its file describes it."""
    running.reset()
    return running


def test_a_request_is_signed_as_the_vendors_libraries_sign_it() -> None:
    """The address in lower case, the body to the letter, five parts."""
    url, body = "https://Example.chargeover.com/api/v3/usage", '{"line_item_id":854,"usage_value":22}'
    found = signature("PUBLICKEY", "PRIVATEKEY", url, "abcd1234", 1442300000, body)
    assert found == "da33a363e8f02530b53d4782200aa468df9c2f73d5081133f0e964d7b33fcfd4"


def ask(sandbox: Sandbox, auth: SignatureAuth, path: str = "/package?limit=1&where=nickname:EQUALS:A\\:b") -> int:
    """Ask with a signature; return the status."""
    return requests.get(sandbox.chargeover_url("telco") + "/api/v3" + path, auth=auth, timeout=5).status_code


def signing(private: str = PRIVATE, public: str = PUBLIC, **more: Callable[[], object]) -> SignatureAuth:
    """Return what signs."""
    return SignatureAuth(public, private, **more)  # type: ignore[arg-type]


def test_only_the_accounts_own_key_signs(sandbox: Sandbox) -> None:
    """Neither another private key nor another public one."""
    assert ask(sandbox, signing()) == 200
    assert ask(sandbox, signing(private="another")) == 401
    assert ask(sandbox, signing(public="another")) == 401


def test_a_signature_is_for_one_request_at_its_time(sandbox: Sandbox) -> None:
    """A nonce that came before, and a clock that is off, are turned away, unless the account does not look."""
    again = signing(nonce=lambda: "abcd1234")
    assert [ask(sandbox, again) for _ in range(2)] == [200, 401]
    assert ask(sandbox, signing(clock=lambda: 1442300000)) == 401
    sandbox.switch(SITE, signature_nonce="any", signature_skew_seconds="none")
    assert [ask(sandbox, again) for _ in range(2)] == [200, 200]
    assert ask(sandbox, signing(clock=lambda: 1442300000)) == 200


def test_a_client_signs_every_request_anew(sandbox: Sandbox) -> None:
    """Also each page of a list; the private key is in none of them."""
    settings = {"instance": "telco", "base_url": sandbox.chargeover_url("telco"), "auth": "signature"}
    made = [ChargeOverSettings(public_key=PUBLIC, private_key=key, **settings) for key in (PRIVATE, "another")]
    site, stranger = (ChargeOverSite(each, Transport(patience_seconds=0)) for each in made)
    assert len(list(site.packages())) == 8
    assert site.create_usage('{"line_item_id":854,"usage_value":22,"from":"2026-10-05","to":"2026-10-05"}')["id"]
    with pytest.raises(Misconfigured, match="does not know these credentials"):
        stranger.read_account()
    with pytest.raises(Misconfigured, match="auth: 'digest' is unknown"):
        ChargeOverSettings(instance="telco", public_key=PUBLIC, private_key=PRIVATE, auth="digest")
