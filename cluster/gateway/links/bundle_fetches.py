"""Fetches of tokenizer bundles over the link: from a worker that has the bundle, else from the controller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.gateway.links.worker_link import WorkerLink
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.bundle import MAX_BUNDLE_BYTES, Bundle


class BundleFetches:
    """Running fetches of bundles. All tasks that wait for one bundle share one fetch."""

    def __init__(
        self, holder_of: Callable[[str], WorkerLink | None], request_from_controller: Callable[[str], bool]
    ) -> None:
        """`holder_of(digest)`: returns the link of a worker that has the bundle; None if no worker has it.
        `request_from_controller(digest)`: requests the bundle from the controller; returns False if no controller is
        connected."""
        self._holder_of = holder_of
        self._request_from_controller = request_from_controller
        self._bundles: dict[str, asyncio.Future[Bundle]] = {}
        self._holders: dict[str, WorkerLink | None] = {}
        """The link on which each bundle was requested, keyed by the digest of the bundle. None: the bundle was
        requested from the controller."""

    async def fetch(self, digest: str, timeout_s: float = 30.0) -> Bundle:
        """Fetch a bundle by its digest. Raises LookupError if no peer can send the bundle in time."""
        waiting = self._bundles.get(digest)
        if waiting is None or waiting.done():
            waiting = self._bundles[digest] = asyncio.get_running_loop().create_future()
            if not self._request(digest):
                del self._bundles[digest]
                raise LookupError("neither the controller nor a worker that has it is connected")
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(waiting)
        except TimeoutError:
            raise LookupError(f"no answer within {timeout_s:g} s") from None
        finally:
            if self._bundles.get(digest) is waiting:
                del self._bundles[digest]
                self._holders.pop(digest, None)

    def _request(self, digest: str) -> bool:
        """Request a bundle. Returns False if neither a worker that has the bundle nor the controller is connected."""
        holder = self._holder_of(digest)
        if holder is not None:
            holder.box.fetch(digest)
        elif not self._request_from_controller(digest):
            return False
        self._holders[digest] = holder
        return True

    def request_again(self) -> None:
        """Repeat the requests for bundles that were sent over a link that has ended. Must be called after each start
        and each end of a link."""
        for digest, holder in list(self._holders.items()):
            if holder is not None and holder.ended:
                self._request(digest)

    def receive(self, parts: dict[str, bytearray], blob: pb.Blob) -> None:
        """Add a chunk of a bundle, received on a Bulk stream. After the last chunk, the tasks that wait for the bundle
        get it. `parts`: the bytes received so far on this stream, keyed by the key of the bundle."""
        digest = blob.key.removeprefix("bundle:")
        waiting = self._bundles.get(digest)
        if waiting is None or waiting.done():
            parts.pop(blob.key, None)
            return
        if blob.error:
            waiting.set_exception(LookupError(blob.error))
            return
        buffer = parts.setdefault(blob.key, bytearray())
        buffer.extend(blob.data)
        if len(buffer) > MAX_BUNDLE_BYTES:
            waiting.set_exception(LookupError(f"the bundle exceeds {MAX_BUNDLE_BYTES} bytes"))
        elif blob.last:
            try:
                bundle = Bundle.unpack(bytes(parts.pop(blob.key)))
            except ValueError as error:
                waiting.set_exception(LookupError(str(error)))
                return
            if bundle.digest != digest:
                waiting.set_exception(LookupError(f"the received bundle has digest {bundle.digest}, not {digest}"))
            else:
                waiting.set_result(bundle)
