"""What others keep for the gateways and must not read, change or make up: open records, resume tokens.

AES-256-GCM under a key of the gateways' common secret. Each process draws a salt and so a key of its own, and another
one in time, because one key with random 96-bit nonces is good for 2^32 messages, which a busy cluster seals in weeks.
Layout: version (1 byte), number of the secret (4), salt (16), nonce (12), ciphertext and tag; everything before the
nonce is authenticated too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cluster.ledger.usage.records import OpenRecord, RecordError
from cluster.policy.tenants.identity import derive, key_number

VERSION = 1
SALT_BYTES, NONCE_BYTES, TAG_BYTES = 16, 12, 16
HEAD_BYTES = 1 + 4 + SALT_BYTES
MAX_BYTES = 64 * 1024
MESSAGES_A_SALT = 1 << 30
_MAX_KEYS = 1024


class SealError(ValueError):
    """These bytes were not sealed under any of the secrets, or were changed."""


class UnknownSecret(SealError):
    """Whatever they are, they were sealed under a secret that is not, or no longer, one of ours."""


class Envelopes:
    """Seals bytes with the first secret, opens with any of them; for one purpose, under whose name nothing of another
    opens. `what` names them in errors; longer ones than `max_bytes` are none."""

    def __init__(self, secrets: Sequence[bytes], purpose: str, what: str, max_bytes: int = MAX_BYTES) -> None:
        if not secrets:
            raise ValueError(f"auth.cluster_secret_file: {what}s cannot be sealed without a secret")
        self._secrets = {bytes.fromhex(key_number(secret)): secret for secret in secrets}
        self._head = bytes([VERSION]) + bytes.fromhex(key_number(secrets[0]))
        self._purpose = purpose
        self._what = what
        self._max_bytes = max_bytes
        self._keys: dict[bytes, AESGCM] = {}
        self._draw()

    def _draw(self) -> None:
        """A new salt, and so a new key."""
        self._left = MESSAGES_A_SALT
        self._own = self._head + os.urandom(SALT_BYTES)
        self._encrypt = AESGCM(self._derived(self._own)).encrypt

    def seal(self, body: bytes) -> bytes:
        """49 bytes longer, never the same twice."""
        if not self._left:
            self._draw()
        self._left -= 1
        nonce = os.urandom(NONCE_BYTES)
        return self._own + nonce + self._encrypt(nonce, body, self._own)

    def open(self, data: bytes) -> bytes:
        """What was sealed. Raises SealError."""
        if not HEAD_BYTES + NONCE_BYTES + TAG_BYTES <= len(data) <= self._max_bytes or data[0] != VERSION:
            raise SealError(f"not a {self._what} of this release")
        head, nonce = data[:HEAD_BYTES], data[HEAD_BYTES : HEAD_BYTES + NONCE_BYTES]
        if head[1:5] not in self._secrets:
            raise UnknownSecret(f"a {self._what} under a secret that this gateway does not have")
        try:
            return self._key(head).decrypt(nonce, data[HEAD_BYTES + NONCE_BYTES :], head)
        except InvalidTag:
            raise SealError(f"a {self._what} was changed") from None

    def _key(self, head: bytes) -> AESGCM:
        key = self._keys.get(head)
        if key is None:
            if len(self._keys) >= _MAX_KEYS:  # salts come from outside: what is kept of them is bounded
                self._keys.clear()
            key = self._keys[head] = AESGCM(self._derived(head))
        return key

    def _derived(self, head: bytes) -> bytes:
        return derive(self._secrets[head[1:5]], self._purpose, head[5:])


class Sealer:
    """The open record as a worker keeps it."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        self._envelopes = Envelopes(secrets, "sealed-record", "sealed record")

    def seal(self, record: OpenRecord) -> bytes:
        """Some 350 bytes for a record without labels."""
        return self._envelopes.seal(record.json_text().encode())

    def open(self, data: bytes) -> OpenRecord:
        """The record. Raises SealError."""
        body = self._envelopes.open(data)
        try:
            return OpenRecord.from_json(json.loads(body))
        except (RecordError, ValueError) as error:
            raise SealError(f"a sealed record holds no record: {error}") from None
