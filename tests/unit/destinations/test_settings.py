"""Settings of the sites: every fault at once, no credential in sight, and names that do not depend on addresses."""

from datetime import timedelta

import pytest

from usage_billing.destinations.chargeover import ChargeOverSettings
from usage_billing.destinations.maxio import MaxioSettings
from usage_billing.errors import Misconfigured

SECRET = "hush-hush-hush"


def test_addresses_follow_from_subdomain_and_region() -> None:
    """Without an address, the vendor's own is made of subdomain and region; the events host is the same for both."""
    us = MaxioSettings(subdomain="acme", api_key=SECRET)
    eu = MaxioSettings(subdomain="Acme", region="eu", api_key=SECRET)

    assert (us.site, us.base_url) == ("maxio:us:acme", "https://acme.chargify.com")
    assert (eu.site, eu.base_url) == ("maxio:eu:acme", "https://acme.ebilling.maxio.com")
    assert us.events_url == eu.events_url == "https://events.chargify.com"
    assert us.timeouts.write > 120


def test_the_sites_name_does_not_depend_on_the_address() -> None:
    """A sandbox of acme and acme itself differ by their subdomain, never by URL."""
    near = MaxioSettings(subdomain="acme", api_key=SECRET, base_url="http://127.0.0.1:8080/maxio/acme/")

    assert near.site == "maxio:us:acme"
    assert near.base_url == "http://127.0.0.1:8080/maxio/acme"


def test_another_sites_address_is_a_fault() -> None:
    """Usage of one site must never pass for another's because somebody pasted an address."""
    with pytest.raises(Misconfigured, match="not the address of maxio:us:acme"):
        MaxioSettings(subdomain="acme", api_key=SECRET, base_url="https://other.chargify.com")
    with pytest.raises(Misconfigured, match="not the address of maxio:us:acme"):
        MaxioSettings(subdomain="acme", api_key=SECRET, base_url="https://acme.ebilling.maxio.com")
    with pytest.raises(Misconfigured, match="address of instance 'other'"):
        ChargeOverSettings(
            instance="telco", base_url="https://other.chargeover.com", public_key="p", private_key=SECRET
        )


def test_every_fault_is_told_at_once() -> None:
    """Seven mistakes make seven lines, each with its field."""
    with pytest.raises(Misconfigured) as told:
        MaxioSettings(
            subdomain="ac me",
            api_key="",
            region="mars",
            base_url="http://billing.example.com",
            events_url="nowhere",
            concurrency="four",  # type: ignore[arg-type]
            settle_after_seconds="1 minute",  # type: ignore[arg-type]
            subject="connection 'maxio_acme'",
        )

    first, *lines = str(told.value).splitlines()
    assert first == "connection 'maxio_acme': 7 faults"
    assert sorted(line.split(":")[0].removeprefix("  - ") for line in lines) == [
        "concurrency",
        "events_url",
        "host",
        "password",
        "region",
        "settle_after_seconds",
        "subdomain",
    ]


def test_every_fault_of_an_account_is_told_at_once() -> None:
    """The same for ChargeOver."""
    with pytest.raises(Misconfigured, match="6 faults") as told:
        ChargeOverSettings(
            public_key="",
            private_key="",
            timezone="Chicago",
            negative_usage="maybe",
            concurrency=0,
            base_url="https://billing.example.com",
            settle_after_seconds=900,
        )
    assert "extra instance" in str(told.value)


@pytest.mark.parametrize("host", ["telco.chargeover.com", "https://telco.chargeover.com"])
def test_an_instance_follows_from_the_vendors_address(host: str) -> None:
    """The vendor's address names the instance, so nobody has to write it twice."""
    url = host if "://" in host else f"https://{host}"
    assert ChargeOverSettings(base_url=url, public_key="p", private_key=SECRET).site == "chargeover:telco"


def test_a_short_wait_before_settling_is_for_loopback_only() -> None:
    """A request may still land while the site works on it: only a sandbox beside us is known to be quicker."""
    near = MaxioSettings(subdomain="acme", api_key=SECRET, base_url="http://[::1]:1", settle_after_seconds=0)
    assert near.settle_after == timedelta(0)
    assert MaxioSettings(subdomain="acme", api_key=SECRET).settle_after == timedelta(seconds=150)

    with pytest.raises(Misconfigured, match="settle_after_seconds: 149"):
        MaxioSettings(subdomain="acme", api_key=SECRET, settle_after_seconds=149)
    with pytest.raises(Misconfigured, match="settle_after_seconds: 60"):
        ChargeOverSettings(instance="telco", public_key="p", private_key=SECRET, settle_after_seconds=60)


def test_numbers_may_come_as_text() -> None:
    """A connection form and an environment variable give text."""
    made = ChargeOverSettings(
        instance="telco",
        public_key="p",
        private_key=SECRET,
        concurrency="2",  # type: ignore[arg-type]
        settle_after_seconds="1200",  # type: ignore[arg-type]
    )
    assert (made.concurrency, made.settle_after) == (2, timedelta(minutes=20))


def test_no_credential_is_shown() -> None:
    """Neither the settings nor their faults show a key, not even one that was put into an address."""
    assert SECRET not in repr(MaxioSettings(subdomain="acme", api_key=SECRET))
    assert SECRET not in repr(ChargeOverSettings(instance="telco", public_key="p", private_key=SECRET))
    with pytest.raises(Misconfigured) as told:
        MaxioSettings(subdomain="acme", api_key=SECRET, base_url=f"https://me:{SECRET}@billing.example.com")
    assert SECRET not in str(told.value)
