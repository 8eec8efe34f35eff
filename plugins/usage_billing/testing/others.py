"""Usage that somebody else enters at the site: never with a token of ours."""

import json
from base64 import b64encode
from datetime import timedelta
from typing import Any

from usage_billing.sandbox import DirectSandbox
from usage_billing.sandbox.world import MaxioWorld
from usage_billing.testing.scenes import Scene


def use(scene: Scene, sandbox: DirectSandbox, owner: str, quantity: int) -> int:
    """Enter usage of the simulated component for a subscription, now; return the site's status."""
    number = next(number for number, name in scene.owner_of.items() if name == owner)
    url, body, keys = _request(scene, sandbox, number, quantity)
    headers = {
        "Authorization": f"Basic {b64encode(':'.join(keys).encode()).decode()}",
        "Content-Type": "application/json",
    }
    return sandbox.request("POST", url, headers, json.dumps(body).encode()).status


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
    reference = next(str(one.reference) for one in scene.world.subscriptions if str(one.id) == number)
    named = number if stream.identifier == "subscription_id" else reference
    event: dict[str, Any] = {"chargify": {}, str(scene.world.components[0].metric.property): quantity}  # type: ignore[union-attr]
    holder = event["chargify"] if stream.identifier.startswith("subscription_") else event
    holder[stream.identifier] = named
    return f"{sandbox.events_url}/{scene.world.name}/events/{stream.handle}.json", event, keys
