"""What Airflow has to know of this distribution: connection types with their forms, hooks, configuration.

Every Airflow process reads it, so it imports nothing. Keys are Airflow's ("Provider metadata", custom providers).
"""

from typing import Any

_CONCURRENCY = {
    "label": "Requests at once",
    "description": "The size of the site's pool. Maxio processes at most 4 requests of a site at once.",
    "schema": {"type": ["integer", "null"], "default": 4, "minimum": 1},
}


def _settle_after(seconds: int) -> dict[str, Any]:
    return {
        "label": "Settle after (seconds)",
        "description": (
            f"How long after a request the site may still apply it; {seconds} unless given. "
            "Shorter is taken for a loopback address only."
        ),
        "schema": {"type": ["integer", "null"], "minimum": 0},
    }


def _text(label: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"label": label, "description": description, "schema": {"type": ["string", "null"], **schema}}


def get_provider_info() -> dict[str, Any]:
    """Return the provider's metadata, as the entry point ``apache_airflow_provider`` promises."""
    return {
        "package-name": "usage-billing",
        "name": "Usage billing",
        "description": "Bill usage from any warehouse to Maxio and ChargeOver, every unit exactly once.",
        "connection-types": [_maxio(), _chargeover()],
        "extra-links": ["usage_billing.links.ValidationResultLink"],
        "config": {"usage_billing": _config()},
    }


def _maxio() -> dict[str, Any]:
    return {
        "connection-type": "maxio",
        "hook-name": "Maxio",
        "hook-class-name": "usage_billing.hooks.MaxioHook",
        "ui-field-behaviour": {
            "hidden-fields": ["port", "schema", "login"],
            "relabeling": {"host": "Address of the main API", "password": "API key"},
            "placeholders": {"host": "empty: made from subdomain and region"},
        },
        "conn-fields": {
            "subdomain": _text("Subdomain", "The first word of the site's address: acme in acme.chargify.com."),
            "region": _text("Region", "Where the site is hosted.", enum=["us", "eu"], default="us"),
            "events_url": _text("Address of the events host", "Empty: https://events.chargify.com."),
            "concurrency": _CONCURRENCY,
            "settle_after_seconds": _settle_after(150),
        },
    }


def _chargeover() -> dict[str, Any]:
    return {
        "connection-type": "chargeover",
        "hook-name": "ChargeOver",
        "hook-class-name": "usage_billing.hooks.ChargeOverHook",
        "ui-field-behaviour": {
            "hidden-fields": ["port", "schema"],
            "relabeling": {"host": "Instance or address", "login": "Public key", "password": "Private key"},
            "placeholders": {"host": "acme, or https://acme.chargeover.com"},
        },
        "conn-fields": {
            "instance": _text("Instance", "Needed where the address above does not name it."),
            "timezone": _text("Time zone", "The account's own, in which it reads times.", default="America/Chicago"),
            "negative_usage": _text(
                "Negative usage",
                "Whether the account takes negative records: ask ChargeOver before you allow it.",
                enum=["hold", "allowed"],
                default="hold",
            ),
            "auth": _text(
                "Authentication",
                "How requests prove who sends them: with both keys, or with a signature, an older way.",
                enum=["basic", "signature"],
                default="basic",
            ),
            "concurrency": _CONCURRENCY | {"description": "The size of the site's pool."},
            "settle_after_seconds": _settle_after(900),
        },
    }


def _config() -> dict[str, Any]:
    return {
        "description": "Where usage billing finds its sources, and where its tasks leave rows for each other.",
        "options": {
            "sources_folder": {
                "description": (
                    "The folder with a subfolder for each billing source.\n"
                    "Empty: include/sources beside the DAGs folder.\n"
                ),
                "version_added": "0.1.0",
                "type": "string",
                "example": "/opt/airflow/include/sources",
                "default": "",
            },
            "staging_path": {
                "description": (
                    "Where tasks leave rows for the next one: a folder that every worker reaches, or a bucket as URL.\n"
                    "Empty: a folder in AIRFLOW_HOME, which is right for one machine only.\n"
                ),
                "version_added": "0.1.0",
                "type": "string",
                "example": "s3://conn_id@bucket/usage-billing",
                "default": "",
            },
            "archive_path": {
                "description": (
                    "Where sources that send raw events keep what they sent: a folder or a bucket, never cleaned.\n"
                    "Empty: a folder in AIRFLOW_HOME, which is right for one machine only.\n"
                ),
                "version_added": "0.1.0",
                "type": "string",
                "example": "s3://conn_id@bucket/usage-billing-archive",
                "default": "",
            },
        },
    }
