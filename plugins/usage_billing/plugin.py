"""What Airflow itself runs of this package: a listener in the scheduler, and pages in the API server.

Every Airflow process loads this file, each task included, so it imports nothing heavy.
"""

from typing import Any

from airflow.plugins_manager import AirflowPlugin

from usage_billing.links import PREFIX
from usage_billing.pools import PoolWatch


class UsageBillingPlugin(AirflowPlugin):
    """The entry point ``airflow.plugins`` names it."""

    name = "usage_billing"
    listeners = (PoolWatch(),)

    @property
    def fastapi_apps(self) -> list[dict[str, Any]]:
        """The pages; only the API server asks for them."""
        from usage_billing.pages import app  # noqa: PLC0415 - FastAPI, and Airflow's own server.

        return [{"app": app, "url_prefix": f"/{PREFIX}", "name": "usage_billing"}]
