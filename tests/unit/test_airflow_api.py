"""What the demo's client of Airflow's API does when an order meets another one, or a lock of Airflow's database."""

import importlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests
from requests.adapters import BaseAdapter
from requests.models import PreparedRequest, Response

SCRIPTS = Path(__file__).parents[2] / "include" / "sandbox"
URL = "http://airflow.test"
DAY = datetime(2026, 10, 2, tzinfo=UTC)


class Airflow(BaseAdapter):
    """An API server with one backfill, open or not; it answers each order, and each cancelling, as it is told to."""

    def __init__(self, orders: list[int], cancels: int = 200) -> None:
        super().__init__()
        self._orders = orders
        self._cancels = cancels
        self.open = False
        self.asked: list[str] = []

    def send(self, request: PreparedRequest, *_: Any, **__: Any) -> Response:
        """Answer, and remember method and path."""
        path = str(request.path_url).split("?", maxsplit=1)[0].removeprefix("/api/v2")
        self.asked.append(f"{request.method} {path}")
        if request.method == "GET":
            ended = None if self.open else "2026-10-02T00:00:00Z"
            return _reply(request, 200, {"backfills": [{"id": 7, "completed_at": ended}]})
        if request.method == "PUT":
            self.open = False
            return _reply(request, self._cancels, {})
        status = self._orders.pop(0)
        # An order that met another, or that Airflow has yet to undo, leaves an open one to be seen.
        self.open = status != requests.codes.ok
        return _reply(request, status, {})

    def close(self) -> None:
        """Nothing is open."""


def _reply(request: PreparedRequest, status: int, body: Mapping[str, Any]) -> Response:
    reply = Response()
    reply.status_code, reply.request, reply.url = status, request, str(request.url)
    reply._content = json.dumps(body).encode()
    return reply


@pytest.fixture(name="module")
def _module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("airflow_api")
    monkeypatch.setattr(module, "ORDER_PAUSES", (0, 0))
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0)
    return module


def order(module: ModuleType, airflow: Airflow) -> None:
    """Order one day of one DAG."""
    session = requests.Session()
    session.mount(URL, airflow)
    module.AirflowApi(URL, "admin", "secret", session).backfill("bill_api_calls", DAY, DAY)


@pytest.mark.parametrize("cancels", [200, 404, 409])
@pytest.mark.parametrize("refusals", [[409], [503, 503, 503, 503], [500, 409]])
def test_an_order_that_meets_another_or_a_lock_is_given_again(
    module: ModuleType, refusals: list[int], cancels: int
) -> None:
    """What stands in its way is cancelled; if that has ended or is gone by then, nothing stands in its way."""
    airflow = Airflow([*refusals, 200], cancels)
    order(module, airflow)
    assert airflow.asked.count("POST /backfills") == len(refusals) + 1
    assert "PUT /backfills/7/cancel" in airflow.asked


@pytest.mark.parametrize(("orders", "cancels"), [([400], 200), ([409] * 3, 200), ([409], 403)])
def test_other_refusals_are_told(module: ModuleType, orders: list[int], cancels: int) -> None:
    """An order that cannot work, one that meets others for ever, and a cancelling that is not allowed."""
    with pytest.raises(requests.HTTPError):
        order(module, Airflow([*orders, 200], cancels))
