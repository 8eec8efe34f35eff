"""What others do at the site: usage that they enter, never with a token of ours, and names that they change."""

import json
from base64 import b64encode
from datetime import timedelta
from typing import Any

import requests

from usage_billing.sandbox import DirectSandbox
from usage_billing.sandbox.world import MaxioWorld
from usage_billing.testing.scenes import Scene


def use(scene: Scene, sandbox: DirectSandbox, owner: str, quantity: int) -> int:
    """Enter usage of the simulated component for a subscription, now; return the site's status."""
    number = next(number for number, name in scene.owner_of.items() if name == owner)
    url, body, keys = _request(scene, sandbox, number, quantity)
    return sandbox.request("POST", url, _headers(keys), json.dumps(body).encode()).status


def rename(scene: Scene, sandbox: DirectSandbox, owner: str, reference: str) -> None:
    """Give a subscription another reference, now; the one that it had is nobody's."""
    url, headers = _subscription(scene, sandbox, owner)
    body = {"subscription": {"reference": reference}}
    reply = sandbox.request("PUT", url, headers, json.dumps(body).encode())
    assert reply.status == requests.codes.ok, reply.body  # noqa: S101


def _reference(scene: Scene, sandbox: DirectSandbox, owner: str) -> str:
    url, headers = _subscription(scene, sandbox, owner)
    found = json.loads(sandbox.request("GET", url, headers, b"").body)
    return str(found["subscription"]["reference"])


def _subscription(scene: Scene, sandbox: DirectSandbox, owner: str) -> tuple[str, dict[str, str]]:
    number = next(number for number, name in scene.owner_of.items() if name == owner)
    assert isinstance(scene.world, MaxioWorld)  # noqa: S101 - only there anybody is known by a reference.
    return f"{sandbox.maxio_url(scene.world.name)}/subscriptions/{number}.json", _headers((scene.world.api_key, "x"))


def _headers(keys: tuple[str, str]) -> dict[str, str]:
    return {
        "Authorization": f"Basic {b64encode(':'.join(keys).encode()).decode()}",
        "Content-Type": "application/json",
    }


def _request(
    scene: Scene, sandbox: DirectSandbox, number: str, quantity: int
) -> tuple[str, dict[str, Any], tuple[str, str]]:
    if not isinstance(scene.world, MaxioWorld):
        now = sandbox.now().astimezone(scene.world.zone)
        times = {"from": f"{now:%Y-%m-%d %H:%M:%S}", "to": f"{now + timedelta(seconds=1):%Y-%m-%d %H:%M:%S}"}
        body = {"line_item_id": int(number) + 150, "usage_value": quantity, **times}
        url = f"{sandbox.chargeover_url(scene.world.name)}/api/v3/usage"
        return url, body, (scene.world.public_key, scene.world.private_key)
    keys = (scene.world.api_key, "x")
    if scene.kind == "maxio_metered":
        part = f"/subscriptions/{number}/components/handle%3A{scene.component}/usages.json"
        return sandbox.maxio_url(scene.world.name) + part, {"usage": {"quantity": quantity, "memo": "by hand"}}, keys
    stream = scene.world.streams[0]
    by_id = stream.identifier == "subscription_id"
    named = number if by_id else _reference(scene, sandbox, scene.owner_of[number])
    event: dict[str, Any] = {"chargify": {}, str(scene.world.components[0].metric.property): quantity}  # type: ignore[union-attr]
    holder = event["chargify"] if stream.identifier.startswith("subscription_") else event
    holder[stream.identifier] = named
    return f"{sandbox.events_url}/{scene.world.name}/events/{stream.handle}.json", event, keys
