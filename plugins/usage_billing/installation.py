"""What this Airflow installation has for us: its sources, its staging area, its ledger, its pools."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from airflow.sdk import BaseHook, ObjectStoragePath, conf
from sqlalchemy import URL

from usage_billing import hooks
from usage_billing.archive import Archive
from usage_billing.destinations import destination_settings
from usage_billing.destinations.base import Destination
from usage_billing.destinations.chargeover import ChargeOverSettings
from usage_billing.destinations.maxio import MaxioSettings
from usage_billing.errors import Misconfigured
from usage_billing.ledger import Ledger
from usage_billing.periods import Calendar
from usage_billing.pools import pool_name
from usage_billing.records import Edition, Period, overlap
from usage_billing.sources import BillingSource, as_of, load_source, source_names
from usage_billing.staging import Staging

LEDGER_CONNECTION = "usage_ledger"


def sources_folder() -> Path:
    """Return the folder of billing sources: the configured one, else ``include/sources`` beside the DAGs folder."""
    configured = conf.get("usage_billing", "sources_folder", fallback="")
    return Path(configured) if configured else Path(conf.get("core", "dags_folder")).parent / "include" / "sources"


def billing_source(name: str) -> BillingSource:
    """Read the billing source called `name`.

    Raises:
        Misconfigured: with every fault of its files.
    """
    return load_source(sources_folder() / name, destination_settings)


def ledger_name(name: str) -> str:
    """Return the name under which the ledger knows a source: its own, or the one that it had formerly.

    That of a source which is gone, or cannot be read, is the name itself.
    """
    try:
        return billing_source(name).name
    except Misconfigured:
        return name


def billing_sources() -> list[BillingSource]:
    """Read every billing source.

    Raises:
        Misconfigured: with every fault of every source.
    """
    found, faults = [], []
    for name in source_names(sources_folder()):
        try:
            found.append(billing_source(name))
        except Misconfigured as error:
            faults.append(str(error))
    if faults:
        raise Misconfigured("\n".join(faults))
    return found


def staging() -> Staging:
    """Return the configured staging area; by default a folder in Airflow's home, which only one machine sees."""
    return Staging(_area("staging"))


def archive() -> Archive:
    """Return the configured archive of sent events; by default a folder in Airflow's home, which one machine sees.

    It lies outside staging, which may be cleaned at any time; this may not.
    """
    return Archive(_area("archive"))


def _area(name: str) -> ObjectStoragePath:
    home = Path(os.environ.get("AIRFLOW_HOME", "~/airflow")).expanduser()
    configured = conf.get("usage_billing", f"{name}_path", fallback="")
    return ObjectStoragePath(configured or f"file://{home}/usage_billing/{name}")


def destination_of(source: BillingSource) -> Destination:
    """Return the destination that `source` is billed to, with the archive of what it sent and the user's mapping.

    Raises:
        Misconfigured: the source's connection does not exist, is of another type, or has faults.
    """
    found = hooks.destination(source)
    found.archive = archive()
    if source.accounts_sql:
        from usage_billing.accounts import Accounts  # noqa: PLC0415 - pandas and pyarrow, not at every parse.

        found.mapping = Accounts(source, partial(BaseHook.get_hook, source.settings.warehouse))
    return found


def editions(source: BillingSource, *, writes: bool = True) -> tuple[Edition, ...]:
    """Return all editions of `source`, once the ledger has found that its last one is as the source is defined today.

    A definition that is new is registered; without `writes` it is only judged.

    Raises:
        Misconfigured: the definition changed under its history, or the connection does not lead to a site.
    """
    book = ledger()
    judge = book.register if writes else book.agrees
    whole = source.destination.model_dump(mode="json")
    return judge(source.name, destination_of(source).site, source.definition(), whole, source.since)


def destination_in(source: BillingSource, edition: Edition, latest: Edition) -> Destination:
    """Return the destination of an edition of `source`, whose last one is `latest`; it knows its edition as its source.

    Raises:
        Misconfigured: the site to which usage was billed then cannot be reached, or the settings of today do not go
            with the definition of then.
    """
    if edition == latest:
        return destination_of(replace(source, span=edition.span, edition=edition.number))
    connection: str = source.destination.connection
    if edition.site != latest.site:
        connection = edition.settings.get("connection", connection)
    until = f"{edition.span.end:%Y-%m-%d %H:%M} UTC"
    subject = f"billing source {source.title!r}: its usage until {until} is billed to {edition.site}"
    then = as_of(source, edition, connection, destination_settings)
    try:
        found = destination_of(then)
    except Misconfigured as fault:
        raise Misconfigured(f"{subject}, by connection {connection!r}: {fault}") from fault
    if found.site != edition.site:
        raise Misconfigured(
            f"{subject}, and connection {connection!r} leads to {found.site} by now: let it lead to {edition.site} "
            f"again, and give {found.site} a connection of its own in source.yaml; newer usage is not kept waiting"
        )
    return found


def edition_of(source: BillingSource, known: Sequence[Edition], span: Period) -> Edition:
    """Return the one edition whose usage periods end in a run's `span`; where none ends, the one in force at its end.

    Raises:
        Misconfigured: they are of several editions, with the spans to run instead.
    """
    ours = [one for one in known if Calendar.of(one).ending_in(span)]
    if len(ours) > 1:
        parts = "; ".join(str(part) for one in ours if (part := overlap(span, one.span)))
        raise Misconfigured(
            f"the definition of billing source {source.title!r} changes within {span}, and a run compares the usage "
            f"periods of one definition: run instead, each by itself: {parts}"
        )
    in_force = [one for one in known if one.span.start < span.end <= one.span.end]
    return (ours or in_force)[0]


def ledger_url() -> str | URL:
    """Return the database address behind connection ``usage_ledger``.

    Raises:
        Misconfigured: there is no such connection, or it is neither SQLite nor PostgreSQL.
    """
    try:
        connection = BaseHook.get_connection(LEDGER_CONNECTION)
    except Exception as missing:
        # Airflow raises another class in a task, in the API server and without a database; each means the same here.
        raise Misconfigured(
            f"connection {LEDGER_CONNECTION!r} cannot be read ({type(missing).__name__}); "
            "create it: SQLite with the file as host, or PostgreSQL"
        ) from missing
    if connection.conn_type == "sqlite":
        if not connection.host:
            raise Misconfigured(f"connection {LEDGER_CONNECTION!r}: host is empty; put the ledger's file there")
        return f"sqlite:///{connection.host}"
    if connection.conn_type in {"postgres", "postgresql"}:
        return URL.create(
            "postgresql+psycopg",
            username=connection.login,
            password=connection.password,
            host=connection.host,
            port=connection.port,
            database=connection.schema,
            query={name: str(value) for name, value in connection.extra_dejson.items()},
        )
    raise Misconfigured(
        f"connection {LEDGER_CONNECTION!r} is of type {connection.conn_type!r}; "
        "the ledger lives in SQLite or PostgreSQL"
    )


def ledger() -> Ledger:
    """Return the connected ledger, the same one for the length of this process.

    Raises:
        Misconfigured: there is none; only `usage-billing ledger init` makes one.
    """
    return _ledger(ledger_url())


@cache
def _ledger(url: str | URL) -> Ledger:
    return Ledger.connect(url)


@dataclass(frozen=True)
class Pool:
    """One billing site's Airflow pool: a slot is a request that the site processes."""

    name: str
    slots: int
    description: str


def pools(sources: Iterable[BillingSource]) -> list[Pool]:
    """Return the pool of each billing site that `sources` call.

    Raises:
        Misconfigured: two connections lead to one site, which would have two pools and twice the requests; or a source
            wants more threads than its site's pool has slots, and would wait for ever.
    """
    by_connection: dict[str, list[BillingSource]] = defaultdict(list)
    for source in sources:
        by_connection[source.destination.connection].append(source)
    settings = {name: hooks.settings(some[0]) for name, some in sorted(by_connection.items())}
    if faults := [
        *_shared_sites({name: found.site for name, found in settings.items()}),
        *_greedy(by_connection, settings),
    ]:
        raise Misconfigured.all_at_once("pools", faults)
    return [
        Pool(pool_name(name), found.concurrency, f"requests that {found.site} processes at once")
        for name, found in settings.items()
    ]


def _shared_sites(sites: dict[str, str]) -> Iterator[str]:
    for site in sorted(set(sites.values())):
        if len(names := [name for name, found in sites.items() if found == site]) > 1:
            yield (
                f"connections {', '.join(names)} all lead to {site}: use one of them in every source, "
                "so that one pool holds its limit"
            )


def _greedy(
    by_connection: dict[str, list[BillingSource]], settings: Mapping[str, MaxioSettings | ChargeOverSettings]
) -> Iterator[str]:
    for name, some in by_connection.items():
        slots = settings[name].concurrency
        for source in some:
            if source.destination.threads > slots:
                yield (
                    f"source {source.title}: destination.threads is {source.destination.threads}, but connection "
                    f"{name} allows {slots} requests at once: lower the one or raise the other"
                )
