"""The Airflow rim: connections become settings, and a source finds the destination that it is billed to."""

import json
from typing import Any

import pytest
from airflow.sdk._shared.secrets_masker import redact

from usage_billing import hooks
from usage_billing.destinations.maxio import MaxioEvents, MaxioSite
from usage_billing.errors import Misconfigured
from usage_billing.get_provider_info import get_provider_info
from usage_billing.hooks import ChargeOverHook, MaxioHook
from usage_billing.sources import BillingSource, SourceSettings


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that defines a connection by environment."""

    def define(conn_id: str, **fields: Any) -> str:
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(fields))
        return conn_id

    return define


def test_a_maxio_connection_becomes_settings(connect: Any) -> None:
    """Password, host and extras find their places; numbers may be text."""
    extra = {
        "subdomain": "acme",
        "events_url": "http://127.0.0.1:1/events",
        "concurrency": "2",
        "settle_after_seconds": 0,
    }
    connect("maxio_acme", conn_type="maxio", host="http://127.0.0.1:1/maxio/acme", password="hush-hush", extra=extra)

    settings = MaxioHook("maxio_acme").settings()

    assert settings.site == "maxio:us:acme"
    assert settings.base_url == "http://127.0.0.1:1/maxio/acme"
    assert (settings.api_key, settings.concurrency, settings.settle_after_seconds) == ("hush-hush", 2, 0)


@pytest.mark.parametrize(
    ("host", "extra"),
    [
        ("telco", {}),
        ("telco.chargeover.com", {}),
        ("https://telco.chargeover.com", {}),
        ("http://127.0.0.1:1/chargeover/telco", {"instance": "telco"}),
    ],
)
def test_a_chargeover_host_is_a_name_or_an_address(connect: Any, host: str, extra: dict[str, Any]) -> None:
    """The instance's name, the vendor's address, or any address with the instance named beside it."""
    connect("co", conn_type="chargeover", host=host, login="public", password="private", extra=extra)

    settings = ChargeOverHook("co").settings()

    assert settings.site == "chargeover:telco"
    assert settings.base_url == (host if "://" in host else "https://telco.chargeover.com")
    assert (settings.public_key, settings.private_key, settings.timezone) == ("public", "private", "America/Chicago")


def test_every_fault_of_a_connection_is_told_at_once(connect: Any) -> None:
    """One error names the connection and each field, an extra that nobody reads too."""
    connect("maxio_acme", conn_type="maxio", extra={"subdomian": "acme", "region": "mars"})

    with pytest.raises(Misconfigured) as told:
        MaxioHook("maxio_acme").settings()

    first, *lines = str(told.value).splitlines()
    assert first == "connection 'maxio_acme': 4 faults"
    assert [line.split(":")[0].strip(" -") for line in lines] == ["subdomian", "password", "subdomain", "region"]


def test_a_missing_connection_and_a_wrong_type_are_told(connect: Any) -> None:
    """Neither ends in a stack trace of Airflow's."""
    connect("web", conn_type="http", host="x")

    with pytest.raises(Misconfigured, match="connection 'nowhere' cannot be read"):
        MaxioHook("nowhere").settings()
    with pytest.raises(Misconfigured, match="connection 'web' is of type 'http'; it has to be 'maxio'"):
        MaxioHook("web").settings()


def test_keys_are_masked_from_logs(connect: Any) -> None:
    """Once a connection was read, Airflow hides its key wherever it would be logged."""
    connect("co", conn_type="chargeover", host="telco", login="public", password="a-private-key-8472")

    ChargeOverHook("co").settings()

    assert "8472" not in str(redact("sent with a-private-key-8472"))


def test_the_test_button_tells_what_is_wrong(connect: Any) -> None:
    """Faults and an unreachable site are words in the form, not a stack trace."""
    connect("faulty", conn_type="maxio", password="hush-hush")
    extra = {"subdomain": "acme", "settle_after_seconds": 0}
    connect("away", conn_type="maxio", host="http://127.0.0.1:9", password="hush-hush", extra=extra)

    assert MaxioHook("faulty").test_connection() == (False, str_of(MaxioHook("faulty")))
    worked, words = MaxioHook("away").test_connection()
    assert not worked
    assert "connection refused" in words


def str_of(hook: MaxioHook) -> str:
    """Return what the hook's settings complain of."""
    with pytest.raises(Misconfigured) as told:
        hook.settings()
    return str(told.value)


def source(**keys: Any) -> BillingSource:
    """Return a source that is billed as events."""
    declared = {
        "name": "units",
        "description": "units",
        "warehouse": "warehouse",
        "schedule": "0 0 * * *",
        "timezone": "UTC",
        "period": "hour",
        "bill_from": "2026-10-01",
        "columns": {"event_id": "id", "time": "at", "account": "who", "quantity": "units"},
        "meter": {"function": "sum"},
    }
    own = {"name": "maxio_events", "stream": "s", "subscription_by": "who", "component": 1, "property": "units", **keys}
    return BillingSource(
        SourceSettings.model_validate(declared), MaxioEvents.settings_model.model_validate(own), "", ()
    )


def test_a_source_finds_its_destination(connect: Any) -> None:
    """The destination's name chooses the class, its connection the site."""
    connect("orbit", conn_type="maxio", password="hush-hush", extra={"subdomain": "orbit", "region": "eu"})

    found = hooks.destination(source(connection="orbit"))

    assert isinstance(found, MaxioEvents)
    assert isinstance(found.client, MaxioSite)
    assert found.site == "maxio:eu:orbit"


def test_a_source_with_the_wrong_connection_is_told(connect: Any) -> None:
    """A ChargeOver connection does not lead to a Maxio stream."""
    connect("co", conn_type="chargeover", host="telco", login="public", password="private")

    with pytest.raises(Misconfigured, match="it has to be 'maxio'"):
        hooks.destination(source(connection="co"))


@pytest.mark.parametrize("hook", [MaxioHook, ChargeOverHook], ids=lambda hook: hook.conn_type)
def test_the_form_and_the_hook_know_the_same_extras(hook: Any) -> None:
    """Every extra that the hook reads has a field in the connection form, and no field is read by nobody."""
    form = next(form for form in get_provider_info()["connection-types"] if form["connection-type"] == hook.conn_type)

    assert set(form["conn-fields"]) == set(hook.extras)
    assert form["hook-class-name"] == f"{hook.__module__}.{hook.__qualname__}"
    assert form["hook-name"] == hook.hook_name
    assert hook(**{hook.conn_name_attr: "x"}).conn_id == "x"
    assert hook().conn_id == hook.default_conn_name
