"""Which request reaches which handler: encoded segments, suffixes, unknown paths and methods, on every host."""

from typing import Any

import pytest
import requests

from usage_billing.sandbox import Sandbox

ACME = "maxio:us:acme"


@pytest.mark.parametrize("spelling", ["external_key:a%2Fb", "external_key%3Aa%2Fb", "external_key%3aa%2fb"])
def test_an_encoded_slash_stays_inside_its_segment(telco: Any, spelling: str) -> None:
    """A key with a slash is one segment when it is encoded, and part of a longer path when it is not."""
    telco.use(3, external_key="a/b")
    assert telco.get(f"usage/{spelling}").json()["response"]["external_key"] == "a/b"
    assert telco.get("usage/external_key:a/b").status_code == 400


def test_what_is_encoded_twice_is_decoded_once(telco: Any) -> None:
    """A key that itself looks encoded is not decoded any further."""
    telco.use(3, external_key="a%2Fb")
    assert telco.get("usage/external_key:a%252Fb").json()["response"]["external_key"] == "a%2Fb"
    assert telco.get("usage/external_key:a%2Fb").status_code == 404


def test_batch_parts_find_their_route_like_requests(telco: Any) -> None:
    """An encoded key in a part's path names the same record as in a request of its own."""
    telco.use(3, external_key="a/b")
    parts = [{"request_method": "GET", "uri": f"/api/v3/usage/external_key{colon}a%2Fb"} for colon in (":", "%3A")]
    results = telco.post("_bulk", parts).json()["response"]["_bulk"]
    assert [result["response"]["external_key"] for result in results] == ["a/b", "a/b"]


@pytest.mark.parametrize("path", ["site", "site.json", "/site.json", "site/"])
def test_the_suffix_may_be_left_out(acme: Any, bench: Any, path: str) -> None:
    """Maxio's paths may end with `.json`; a slash too many does no harm either."""
    assert acme.get(path).json()["site"]["subdomain"] == "acme"
    assert bench.requests(ACME)["by_route"] == {"read_site": 1}


def test_chargeover_keys_may_end_like_a_suffix(telco: Any) -> None:
    """ChargeOver knows no suffix, so a key may end with `.json`."""
    telco.use(3, external_key="report.json")
    assert telco.get("usage/external_key:report.json").status_code == 200
    assert telco.get("package/713.json").status_code == 404


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
def test_unknown_paths_and_methods_are_answered_by_their_site(
    acme: Any, telco: Any, orbit: Any, bench: Any, method: str
) -> None:
    """Neither a site's bare root nor a wrong method is 405 or a redirect: Maxio says 404, ChargeOver 400."""
    for client, status in ((acme, 404), (orbit, 404), (telco, 400)):
        for path in ("", "/", "/nothing", "/nothing/at/all"):
            reply = client.session.request(method, f"{client.base}{path}", timeout=10, allow_redirects=False)
            assert reply.status_code == status
    assert telco.session.request("PUT", f"{telco.base}/package/713", timeout=10).status_code == 400
    assert acme.session.request("HEAD", f"{acme.base}/site.json", timeout=10).status_code == 404
    assert bench.requests("chargeover:telco")["by_route"] == {"unknown": 5}


@pytest.mark.parametrize(
    "path", ["", "maxio", "maxio/none/site.json", "maxio/telco/site.json", "chargeover/telco/usage"]
)
def test_paths_of_no_site_are_404(bench: Any, path: str) -> None:
    """What belongs to no site says so, and no site counts it."""
    reply = requests.get(f"{bench.url}/{path}", timeout=10, allow_redirects=False)
    assert (reply.status_code, reply.text) == (404, "No such site or API.\n")
    assert bench.requests("chargeover:telco")["by_route"] == bench.requests(ACME)["by_route"] == {}


@pytest.mark.parametrize("path", ["_sandbox", "_sandbox/"])
def test_the_root_of_control_is_its_summary(running: Sandbox, path: str) -> None:
    """People who type the address without its slash see the summary too."""
    reply = requests.get(f"{running.url}/{path}", timeout=10, allow_redirects=False)
    assert reply.json()["version"]
