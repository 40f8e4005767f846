"""The open record as a worker keeps it: bytes that it cannot read, change or make up.

AES-256-GCM under a key of the gateways' common secret. Each process draws a salt and so a key of its own, because one
key with random 96-bit nonces is good for 2^32 messages, which a busy cluster seals in weeks. Layout: version (1 byte),
number of the secret (4), salt (16), nonce (12), ciphertext and tag; everything before the nonce is authenticated too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cluster.ledger.records import OpenRecord, RecordError
from cluster.tenancy.identity import derive, key_number

VERSION = 1
PURPOSE = "sealed-record"
SALT_BYTES, NONCE_BYTES, TAG_BYTES = 16, 12, 16
HEAD_BYTES = 1 + 4 + SALT_BYTES
MAX_BYTES = 64 * 1024
_MAX_KEYS = 1024
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class SealError(ValueError):
    """These bytes were not sealed under any of the secrets, or were changed."""


class Sealer:
    """Seals with the first secret, opens with any of them."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        if not secrets:
            raise ValueError("auth.cluster_secret_file: records cannot be sealed without a secret")
        self._secrets = {bytes.fromhex(key_number(secret)): secret for secret in secrets}
        self._head = bytes([VERSION]) + bytes.fromhex(key_number(secrets[0])) + os.urandom(SALT_BYTES)
        self._keys: dict[bytes, AESGCM] = {}

    def seal(self, record: OpenRecord) -> bytes:
        """Some 350 bytes for a record without labels."""
        head, nonce = self._head, os.urandom(NONCE_BYTES)
        body = _encode(record.as_json()).encode()
        return head + nonce + self._key(head).encrypt(nonce, body, head)

    def open(self, data: bytes) -> OpenRecord:
        """The record. Raises SealError."""
        if not HEAD_BYTES + NONCE_BYTES + TAG_BYTES <= len(data) <= MAX_BYTES or data[0] != VERSION:
            raise SealError("not a sealed record of this release")
        head, nonce, body = (
            data[:HEAD_BYTES],
            data[HEAD_BYTES : HEAD_BYTES + NONCE_BYTES],
            data[HEAD_BYTES + NONCE_BYTES :],
        )
        if head[1:5] not in self._secrets:
            raise SealError("sealed under a secret that this gateway does not have")
        try:
            return OpenRecord.from_json(json.loads(self._key(head).decrypt(nonce, body, head)))
        except InvalidTag:
            raise SealError("a sealed record was changed") from None
        except (RecordError, ValueError) as error:
            raise SealError(f"a sealed record holds no record: {error}") from None

    def _key(self, head: bytes) -> AESGCM:
        key = self._keys.get(head)
        if key is None:
            if len(self._keys) >= _MAX_KEYS:  # salts come from outside: what is kept of them is bounded
                self._keys.clear()
            key = self._keys[head] = AESGCM(derive(self._secrets[head[1:5]], PURPOSE, head[5:]))
        return key
