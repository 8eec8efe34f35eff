"""Our pages on Airflow's own API server: who may see a validation result, and what a browser may do with it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from usage_billing.installation import staging
from usage_billing.links import TaskTry

pytestmark = pytest.mark.filterwarnings("default")  # Airflow warns about itself in a dozen places.

THIS = TaskTry("bill_api_calls", "scheduled__2026-10-06T04:00:00+00:00", "validate", -1, 2)
PAGE = "<!DOCTYPE html><p>all rows as expected"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """Airflow's API server with whatever plugins this environment has installed."""
    from airflow.api_fastapi.app import create_app, purge_cached_app  # noqa: PLC0415
    from airflow.utils import db  # noqa: PLC0415
    from fastapi.testclient import TestClient  # noqa: PLC0415

    db.initdb()
    with TestClient(create_app(apps="core"), base_url="http://localhost") as client:
        yield client
    purge_cached_app()


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of one try, in a staging area of this test alone."""
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__STAGING_PATH", f"file://{tmp_path}/staging")
    staging().keep(THIS.document, PAGE.encode())


def signed_in(role: str | None) -> dict[str, str]:
    """Return the headers of somebody with a role."""
    from airflow.api_fastapi.app import get_auth_manager  # noqa: PLC0415
    from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser  # noqa: PLC0415

    user = SimpleAuthManagerUser(username="vera", role=role)
    return {"Authorization": f"Bearer {get_auth_manager().generate_jwt(user)}"}


@pytest.mark.usefixtures("written")
def test_a_page_is_shown_to_who_may_read_the_tasks_log_and_to_nobody_else(server: Any) -> None:
    """Signed out, signed in without a role, and a viewer."""
    address = f"/{THIS.address}"
    assert server.get(address).status_code == 401
    assert server.get(address, headers={"Authorization": "Bearer forged"}).status_code in {401, 403}
    assert server.get(address, headers=signed_in(None)).status_code == 403
    shown = server.get(address, headers=signed_in("viewer"))
    assert (shown.status_code, shown.text) == (200, PAGE)
    assert shown.headers["content-type"].startswith("text/html")


@pytest.mark.usefixtures("written")
def test_a_browser_runs_nothing_of_a_page_and_keeps_nothing(server: Any) -> None:
    """Whatever a row brought into it: no script, no form, no part in the session, nothing from elsewhere."""
    for address in (THIS.address, THIS._replace(try_number=9).address):
        headers = server.get(f"/{address}", headers=signed_in("viewer")).headers
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy == {
            "sandbox": "",
            "default-src": "'none'",
            "style-src": "'unsafe-inline'",
            "base-uri": "'none'",
        }
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.usefixtures("written")
def test_another_name_leads_to_no_page_of_this_one(server: Any) -> None:
    """Each part of the name counts, and none leads out of the staging area's own folder."""
    for other in (
        THIS._replace(dag_id="bill_platform_events"),
        THIS._replace(run_id="manual"),
        THIS._replace(task_id="plan"),
        THIS._replace(map_index=0),
        THIS._replace(try_number=1),
    ):
        missing = server.get(f"/{other.address}", headers=signed_in("admin"))
        assert missing.status_code == 404, other
        assert PAGE not in missing.text
    missing = server.get(f"/{THIS._replace(run_id='<b>').address}", headers=signed_in("admin"))
    assert "There is no validation result of validate, try 2, of &lt;b&gt; in the staging area" in missing.text
    assert "staging_path" in missing.text


def test_two_names_never_share_a_page() -> None:
    """Names are parted, so that no other split of the same letters is the same page."""
    names = [TaskTry("a", "b", "c", 1, 11), TaskTry("a", "b", "c", 11, 1), TaskTry("a", "bc", "", 1, 11)]
    assert len({name.document for name in names}) == 3
    assert TaskTry("d", "manual__2026-10-06T04:00:00+00:00", "t", -1, 1).address == (
        "usage-billing/validation/d/manual__2026-10-06T04%3A00%3A00%2B00%3A00/t/-1/1"
    )


def test_every_process_loads_the_plugin_and_little_with_it() -> None:
    """Tasks too: no pandas, no requests, no SQL model, no web server; only the API server asks it for pages."""
    program = (
        "import sys, airflow.sdk\n"
        "before = set(sys.modules)\n"
        "from airflow._shared.plugins_manager import is_valid_plugin\n"
        "from usage_billing.plugin import UsageBillingPlugin\n"
        "heavy = {'pandas', 'pyarrow', 'requests', 'pydantic', 'fastapi', 'airflow.models.pool', 'usage_billing.pages'}"
        " - before\n"
        "loaded = sorted(heavy & set(sys.modules))\n"
        "(pages,) = UsageBillingPlugin().fastapi_apps\n"
        "print(is_valid_plugin(UsageBillingPlugin), loaded, pages['url_prefix'], pages['app'].title)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)  # noqa: S603
    assert done.stdout.splitlines()[-1] == "True [] /usage-billing Usage billing"
