"""Whether a request carries a good signature: the account's older way in.

The scheme is that of the vendor's public client libraries; how far a clock may be off, and whether a nonce may come
again, is in no document, so each is a switch.
"""

import hmac
import re
from hashlib import sha256

from usage_billing.sandbox.wire import Call

from .envelope import ChargeOverAccount

_FIELD = re.compile(r'(co_\w+)="([^"]*)"')


class Signatures:
    """The signatures that one account has seen."""

    def __init__(self, account: ChargeOverAccount) -> None:
        self._account = account
        self._seen: set[str] = set()

    def accepts(self, call: Call) -> bool:
        """Say whether a request is signed by the account's key, in time, with a nonce that is new."""
        scheme, _, rest = call.request.headers.get("authorization", "").partition(" ")
        found = dict(_FIELD.findall(rest))
        world, timestamp = self._account.world, found.get("co_timestamp", "")
        if scheme != "ChargeOver" or found.get("co_public_key") != world.public_key or not timestamp.isdigit():
            return False
        nonce, request = found.get("co_nonce", ""), call.request
        path = request.scope["raw_path"].decode() + (f"?{request.url.query}" if request.url.query else "")
        url = f"{request.url.scheme}://{request.headers['host']}{path}".lower()
        text = "||".join([world.public_key, url, nonce, timestamp, call.body.decode("utf-8", "replace")])
        right = hmac.new(world.private_key.encode(), text.encode(), sha256).hexdigest()
        if not hmac.compare_digest(right, found.get("co_signature", "")):
            return False
        skew = self._account.switches["signature_skew_seconds"]
        if skew != "none" and abs(self._account.books.wall() - int(timestamp)) > int(skew):
            return False
        if self._account.switches["signature_nonce"] == "once" and nonce in self._seen:
            return False
        self._seen.add(nonce)
        return True
