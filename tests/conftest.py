"""One Airflow home for the whole test session, made before anything imports Airflow."""

import os
import tempfile
from pathlib import Path

_CHECKOUT = Path(__file__).parents[1]
_HOME = tempfile.TemporaryDirectory(prefix="usage-billing-tests-", ignore_cleanup_errors=True)

os.environ.update(
    {
        "AIRFLOW_HOME": _HOME.name,
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(_CHECKOUT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(_CHECKOUT / "plugins"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{_HOME.name}/airflow.db",
        "AIRFLOW__USAGE_BILLING__SOURCES_FOLDER": str(_CHECKOUT / "include" / "sources"),
        "AIRFLOW__USAGE_BILLING__STAGING_PATH": f"file://{_HOME.name}/staging",
    }
)
for _name in [name for name in os.environ if name.startswith("AIRFLOW_CONN_")]:
    del os.environ[_name]  # A developer's own connections must never be billed by a test.
