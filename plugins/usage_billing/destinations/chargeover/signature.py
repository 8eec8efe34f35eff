"""ChargeOver's signature of a request, its older way in: the private key signs, and never travels.

What is signed, and the header, follow the vendor's public client libraries (``signature-v1``).
"""

import hmac
import secrets
import string
import time
from collections.abc import Callable
from hashlib import sha256

from requests import PreparedRequest
from requests.auth import AuthBase

_LETTERS = string.ascii_lowercase + string.digits
_NONCE_LENGTH = 8


def signature(public_key: str, private_key: str, url: str, nonce: str, timestamp: int, body: str) -> str:
    """Return the signature of a request, in lower-case hexadecimal; `body` is its exact text, empty where it has none.

    `timestamp` is in Unix seconds. The account reads the address in lower case, with its query.
    """
    signed = "||".join([public_key, url.lower(), nonce, str(timestamp), body])
    return hmac.new(private_key.encode(), signed.encode(), sha256).hexdigest()


def _nonce() -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(_NONCE_LENGTH))


class SignatureAuth(AuthBase):
    """Signs each request anew as it is prepared: a nonce is for one request alone."""

    def __init__(
        self,
        public_key: str,
        private_key: str,
        nonce: Callable[[], str] = _nonce,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._public_key = public_key
        self._private_key = private_key
        self._nonce = nonce
        self._clock = clock

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Add the header to a request that is otherwise ready."""
        body = request.body or b""
        text = body.decode() if isinstance(body, bytes) else str(body)
        nonce, timestamp = self._nonce(), int(self._clock())
        signed = signature(self._public_key, self._private_key, request.url or "", nonce, timestamp, text)
        fields = {
            "co_public_key": self._public_key,
            "co_nonce": nonce,
            "co_timestamp": timestamp,
            "co_signature_method": "HMAC-SHA256",
            "co_version": "1.0",
            "co_signature": signed,
        }
        request.headers["Authorization"] = "ChargeOver " + " ".join(
            f'{name}="{value}"' for name, value in fields.items()
        )
        return request
