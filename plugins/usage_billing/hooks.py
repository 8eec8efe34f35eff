"""Airflow hooks of the billing sites, usable alone in anybody's DAG.

A hook turns a connection into frozen settings, with every fault at once, and the settings into a plain client::

    from usage_billing.destinations.maxio import usage_body
    from usage_billing.hooks import MaxioHook

    site = MaxioHook("maxio_acme").get_conn()
    site.create_usage("acct-0001", "handle:api-calls", usage_body(3))

``docs/calls.md`` has an example of each call of the clients, `destinations.maxio.MaxioSite` and
`destinations.chargeover.ChargeOverSite`; the hook repeats none of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, cast

from airflow.sdk import BaseHook
from airflow.sdk.log import mask_secret

from usage_billing.destinations import destination_class
from usage_billing.destinations.base import Destination
from usage_billing.destinations.chargeover import ChargeOverSettings, ChargeOverSite
from usage_billing.destinations.http import Transport
from usage_billing.destinations.maxio import MaxioSettings, MaxioSite
from usage_billing.errors import Misconfigured, UsageBillingError
from usage_billing.sources import BillingSource

_IMPATIENT = Transport(patience_seconds=0)
"""For the Test button: a person waits for what it says."""


class _SiteHook(BaseHook):
    """What both hooks share; a connection is read when it is needed, never when a DAG is parsed."""

    conn_name_attr: ClassVar[str]
    default_conn_name: ClassVar[str]
    conn_type: ClassVar[str]
    hook_name: ClassVar[str]
    extras: ClassVar[tuple[str, ...]]
    """The names of the connection's extras, which are those of the settings."""
    transport: ClassVar[Transport] = Transport()
    """What stands for network and time."""

    def __init__(self, conn_id: str) -> None:
        super().__init__()
        self.conn_id = conn_id

    def settings(self) -> Any:
        """Return the connection as settings."""
        raise NotImplementedError

    def get_conn(self) -> Any:
        """Return the site's plain client."""
        raise NotImplementedError

    def test_connection(self) -> tuple[bool, str]:
        """Make one cheap read and say how it went; this is the Test button of the connection form."""
        try:
            return True, self._try()
        except UsageBillingError as failure:
            return False, str(failure)

    def _try(self) -> str:
        raise NotImplementedError

    def _connection(self) -> Any:
        """Return the connection.

        Raises:
            Misconfigured: there is no such connection, or it is of another type.
        """
        try:
            connection = self.get_connection(self.conn_id)
        except Exception as missing:
            # Airflow raises another class in a task, in the API server and without a database; all mean the same here.
            raise Misconfigured(
                f"{self._subject} cannot be read: {type(missing).__name__}; create it first"
            ) from missing
        # Before anything can fail: what is masked cannot be logged.
        if connection.password:
            mask_secret(connection.password)
        if connection.conn_type != self.conn_type:
            raise Misconfigured(f"{self._subject} is of type {connection.conn_type!r}; it has to be {self.conn_type!r}")
        return connection

    @property
    def _subject(self) -> str:
        return f"connection {self.conn_id!r}"

    def _extras(self, connection: Any) -> dict[str, Any]:
        """Return the extras as arguments of the settings; those that nobody knows are faults."""
        given = {key: value for key, value in connection.extra_dejson.items() if value not in (None, "")}
        known = {key: value for key, value in given.items() if key in self.extras}
        faults = [
            f"{key}: unknown extra; known are {', '.join(self.extras)}" for key in sorted(given.keys() - known.keys())
        ]
        return {**known, "subject": self._subject, "known_faults": faults}


class MaxioHook(_SiteHook):
    """A Maxio Advanced Billing site.

    Connection: `password` is the API key; extras `subdomain`, `region` (``us`` or ``eu``), `events_url`, `concurrency`,
    `settle_after_seconds`; `host` is the base URL of the main API where it is not the site's own.
    """

    conn_name_attr = "maxio_conn_id"
    default_conn_name = "maxio_default"
    conn_type = "maxio"
    hook_name = "Maxio"
    extras = ("subdomain", "region", "events_url", "concurrency", "settle_after_seconds")

    def __init__(
        self, maxio_conn_id: str = default_conn_name, response_format: Literal["json", "xml"] = "json"
    ) -> None:
        """Prepare; see `MaxioSite` for what ``"xml"`` does."""
        super().__init__(maxio_conn_id)
        self.response_format = response_format

    def settings(self) -> MaxioSettings:
        """Return the connection as settings.

        Raises:
            Misconfigured: names the connection, and every field that is wrong with its mend.
        """
        connection = self._connection()
        values = {"subdomain": ""} | self._extras(connection)
        return MaxioSettings(api_key=connection.password or "", base_url=_address(connection.host), **values)

    def get_conn(self) -> MaxioSite:
        """Return the site's plain client."""
        return MaxioSite(self.settings(), self.transport, response_format=self.response_format)

    def _try(self) -> str:
        client = MaxioSite(self.settings(), _IMPATIENT)
        name = client.read_site().get("name")
        return f"{client.settings.site} answers" + (f" as {name!r}" if name else "")


class ChargeOverHook(_SiteHook):
    """A ChargeOver account.

    Connection: `host` is the instance's name or the base URL; `login` and `password` are the public and the private key
    of the REST API; extras `instance` (needed where the address does not name it), `timezone`, `negative_usage`
    (``hold`` or ``allowed``), `auth` (``basic`` or ``signature``), `concurrency`, `settle_after_seconds`.
    """

    conn_name_attr = "chargeover_conn_id"
    default_conn_name = "chargeover_default"
    conn_type = "chargeover"
    hook_name = "ChargeOver"
    extras = ("instance", "timezone", "negative_usage", "auth", "concurrency", "settle_after_seconds")

    def __init__(self, chargeover_conn_id: str = default_conn_name) -> None:
        super().__init__(chargeover_conn_id)

    def settings(self) -> ChargeOverSettings:
        """Return the connection as settings.

        Raises:
            Misconfigured: names the connection, and every field that is wrong with its mend.
        """
        connection = self._connection()
        host = (connection.host or "").strip()
        is_name = "." not in host and ":" not in host
        values: dict[str, Any] = {"instance": host} if is_name else {"base_url": _address(host)}
        values |= self._extras(connection)
        values |= {"public_key": connection.login or "", "private_key": connection.password or ""}
        return ChargeOverSettings(**values)

    def get_conn(self) -> ChargeOverSite:
        """Return the account's plain client."""
        return ChargeOverSite(self.settings(), self.transport)

    def _try(self) -> str:
        client = ChargeOverSite(self.settings(), _IMPATIENT)
        client.read_account()
        return f"{client.settings.site} answers"


HOOKS: Mapping[str, type[_SiteHook]] = {hook.conn_type: hook for hook in (MaxioHook, ChargeOverHook)}


def settings(source: BillingSource) -> MaxioSettings | ChargeOverSettings:
    """Return the settings of the billing site that `source` is billed to; no request is made.

    Raises:
        Misconfigured: the connection does not exist, is of another type, or has faults.
    """
    found: MaxioSettings | ChargeOverSettings = _hook(source).settings()
    return found


def destination(source: BillingSource) -> Destination:
    """Return the destination that `source` is billed to, reached through the source's connection.

    Raises:
        Misconfigured: the connection does not exist, is of another type, or has faults.
    """
    kind = cast("Callable[[BillingSource, object], Destination]", _kind(source))
    return kind(source, _hook(source).get_conn())


def _kind(source: BillingSource) -> type[Destination]:
    found = destination_class(source.destination.name)
    if found is None:
        raise Misconfigured(
            f"billing source {source.name!r}: {source.destination.name!r} is no destination of this package"
        )
    return found


def _hook(source: BillingSource) -> _SiteHook:
    return HOOKS[_kind(source).connection_type](source.destination.connection)


def _address(host: str | None) -> str:
    """Return a host as an address: https where it does not say."""
    host = (host or "").strip()
    return host if not host or "://" in host else f"https://{host}"
