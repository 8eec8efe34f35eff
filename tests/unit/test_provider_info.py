"""What Airflow reads in every process: sound by Airflow's own schema, and light."""

import json
import subprocess
import sys
from importlib import resources

import jsonschema

from usage_billing.destinations import DESTINATIONS, destination_class
from usage_billing.get_provider_info import get_provider_info


def test_it_is_what_airflow_expects() -> None:
    """The dict passes the schema by which Airflow discards a provider it does not understand."""
    schema = json.loads((resources.files("airflow") / "provider_info.schema.json").read_text())

    jsonschema.validate(get_provider_info(), schema)


def test_every_destination_has_its_connection_type() -> None:
    """A destination without a form could not be configured."""
    known = {form["connection-type"] for form in get_provider_info()["connection-types"]}

    for name in DESTINATIONS:
        found = destination_class(name)
        assert found is not None
        assert found.connection_type in known


def test_reading_it_imports_almost_nothing() -> None:
    """Every Airflow process reads it: neither Airflow nor pandas nor requests may come with it."""
    script = (
        "import sys; from usage_billing.get_provider_info import get_provider_info; get_provider_info();"
        "print([name for name in ('airflow', 'pandas', 'pyarrow', 'requests', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run(  # noqa: S603 - words of our own.
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=_environment()
    )

    assert done.stdout.strip() == "[]"


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(path for path in sys.path if path)}
