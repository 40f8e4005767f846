"""Choice of the place where a text job (rendering, encoding or decoding of a text) runs: on the event loop, in a
thread, or in a helper process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import structlog

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.helpers.pool import JobLost, TooMuchCpu
from cluster.gateway.helpers.wire import Job
from cluster.gateway.text.encoding.encoding_pool import EncodingPool
from cluster.gateway.text.encoding.thread_turns import thread_turns
from cluster.observe.log import call_fields

log = structlog.get_logger("text")

ENCODE_OFFLOAD_CHARS: Final = 4096
"""Length in characters above which a text is tokenized in a thread. A text of this length takes about a millisecond of
one core, at 3-4 million characters a second."""
ENCODE_HELPER_CHARS: Final = 32_768
"""Length in characters above which a text is tokenized in a helper process (encoding_pool.py), if one is available."""


class TextJobs:
    """Runs the text jobs (rendering, encoding, decoding) of one model on the event loop, in a thread, or in a helper
    process.

    `is_quick`: whether the tokenizer takes linear time for every text.
    """

    def __init__(self, pool: EncodingPool | None, *, is_quick: bool) -> None:
        self._pool = pool
        self.is_quick = is_quick

    def is_short(self, chars: int) -> bool:
        """Return whether a text of `chars` characters is short enough to be processed on the event loop: it then blocks
        the loop for a millisecond at most."""
        return chars <= ENCODE_OFFLOAD_CHARS and self.is_quick

    async def run(
        self,
        tenant: str,
        chars: int,
        job: Job,
        field: str,
        work: Callable[[], Any],
        then: Callable[[Any], Job | None] | None = None,
    ) -> Any:
        """Run a job without blocking the event loop. `chars`: length of the job's text. `work`: does the job's work
        in this process, for a short text or without a helper process. `then`: takes the result of the job, and
        returns a second job for the same helper process, or None.

        Raises CallError if a helper process fails or is too busy. `field`: the request field that the error
        names.
        """
        if self.is_short(chars):
            return work()
        if (chars > ENCODE_HELPER_CHARS or not self.is_quick) and self._pool is not None:
            try:
                result = await self._pool.run(job, size=chars, tenant=tenant, local_fallback=self.is_quick, then=then)
            except TooMuchCpu:
                raise invalid(field, "takes the model's tokenizer too long: send a shorter or simpler text") from None
            except JobLost as lost:
                log.warning("tokenizer.job_lost", **call_fields(), job=job[0], reason=str(lost))
                raise CallError(
                    Outcome.INTERNAL, f"{field}: the model's tokenizer could not process this text"
                ) from None
            if result is not None:
                return result
            if not self.is_quick:
                raise CallError(Outcome.NO_WORKER, "this gateway is too busy to tokenize; retry shortly")
        return await thread_turns().run(tenant, work)
