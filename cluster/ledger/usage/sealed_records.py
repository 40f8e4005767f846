"""Authenticated encryption of open records and resume tokens, which workers and clients keep for the gateways.

The cipher is AES-256-GCM, under keys derived from the gateways' common secret. Each process derives a key from the
secret and a random salt. A key with random 96-bit nonces is safe for 2^32 messages, which a busy cluster seals in
weeks. So the process draws a new salt and derives a new key after MESSAGES_PER_SALT messages. The layout of sealed data
is: version (1 byte), number of the secret (4 bytes), salt (16 bytes), nonce (12 bytes), ciphertext and tag. The bytes
before the nonce are authenticated too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cluster.ledger.usage.records import OpenRecord, RecordError
from cluster.policy.tenants.identity import derive, key_number

VERSION = 1
SALT_BYTES, NONCE_BYTES, TAG_BYTES = 16, 12, 16
HEAD_BYTES = 1 + 4 + SALT_BYTES
MAX_BYTES = 64 * 1024
MESSAGES_PER_SALT = 1 << 30
_MAX_KEYS = 1024


class SealError(ValueError):
    """Error: the data was not sealed under any of the secrets, or the data was changed."""


class UnknownSecret(SealError):
    """Error: the data was sealed under a secret that this process does not have or no longer has."""


class Envelopes:
    """Encryption of bytes. `seal` uses the first secret. `open` accepts data that was sealed with any of the secrets.

    Data that was sealed for one `purpose` does not open for another purpose. `what` names the data in error messages.
    Sealed data longer than `max_bytes` does not open.
    """

    def __init__(self, secrets: Sequence[bytes], purpose: str, what: str, max_bytes: int = MAX_BYTES) -> None:
        if not secrets:
            raise ValueError(f"auth.cluster_secret_file: {what}s cannot be sealed without a secret")
        self._secrets = {bytes.fromhex(key_number(secret)): secret for secret in secrets}
        self._head = bytes([VERSION]) + bytes.fromhex(key_number(secrets[0]))
        self._purpose = purpose
        self._what = what
        self._max_bytes = max_bytes
        self._keys: dict[bytes, AESGCM] = {}
        self._new_key()

    def _new_key(self) -> None:
        """Draw a new salt and derive a new key from it."""
        self._messages_left = MESSAGES_PER_SALT
        self._own_head = self._head + os.urandom(SALT_BYTES)
        self._encrypt = AESGCM(self._derive(self._own_head)).encrypt

    def seal(self, body: bytes) -> bytes:
        """Encrypt `body`. The result is 49 bytes longer than `body`, and different for each call."""
        if not self._messages_left:
            self._new_key()
        self._messages_left -= 1
        nonce = os.urandom(NONCE_BYTES)
        return self._own_head + nonce + self._encrypt(nonce, body, self._own_head)

    def open(self, data: bytes) -> bytes:
        """Decrypt sealed data. Raises SealError."""
        if not HEAD_BYTES + NONCE_BYTES + TAG_BYTES <= len(data) <= self._max_bytes or data[0] != VERSION:
            raise SealError(f"not a {self._what} of this release")
        head, nonce = data[:HEAD_BYTES], data[HEAD_BYTES : HEAD_BYTES + NONCE_BYTES]
        if head[1:5] not in self._secrets:
            raise UnknownSecret(f"the {self._what} was sealed under a secret that this gateway does not have")
        try:
            return self._key(head).decrypt(nonce, data[HEAD_BYTES + NONCE_BYTES :], head)
        except InvalidTag:
            raise SealError(f"the {self._what} was changed") from None

    def _key(self, head: bytes) -> AESGCM:
        key = self._keys.get(head)
        if key is None:
            if len(self._keys) >= _MAX_KEYS:  # salts come from outside, so the cache must be bounded
                self._keys.clear()
            key = self._keys[head] = AESGCM(self._derive(head))
        return key

    def _derive(self, head: bytes) -> bytes:
        return derive(self._secrets[head[1:5]], self._purpose, head[5:])


class Sealer:
    """Encryption and decryption of open records (the parts of usage records that are known when a sequence is sent).
    Workers keep the encrypted records."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        self._envelopes = Envelopes(secrets, "sealed-record", "sealed record")

    def seal(self, record: OpenRecord) -> bytes:
        """Seal a record. A sealed record without labels has about 350 bytes."""
        return self._envelopes.seal(orjson.dumps(record.as_json()))

    def open(self, data: bytes) -> OpenRecord:
        """Open a sealed record. Raises SealError."""
        body = self._envelopes.open(data)
        try:
            return OpenRecord.from_json(orjson.loads(body))
        except (RecordError, ValueError) as error:
            raise SealError(f"the sealed record does not contain a valid record: {error}") from None
