"""Decides whether this gateway charges a call's prompt to the tenant.

If the call began at another gateway, an engine may compute the prompt a second time. Whether the tenant
then pays a second time depends on the terms of the resume (resume_tokens/claim.py).
"""

from __future__ import annotations

from cluster.gateway.resume_tokens.claim import ResumeTerms


class PromptPayment:
    """Decides whether this gateway charges a call's prompt to the call's tenant. If the call began at this gateway, the
    prompt is always charged. If the call was resumed from another gateway, the decision depends on the resume terms,
    which say who pays if an engine computes the prompt again."""

    __slots__ = ("_origin_lost", "_pays_again", "terms")

    def __init__(self) -> None:
        self.terms: ResumeTerms | None = None
        """Terms of the call's resume; None if the call began at this gateway."""
        self._pays_again = False
        self._origin_lost: bool | None = None
        """Whether the gateway from which the call was resumed is lost; None as long as no worker has reported whether
        that gateway is lost."""

    def resume(self, terms: ResumeTerms) -> None:
        """Record that the call began at another gateway and is resumed here. `terms`: who pays if an engine computes
        the prompt again."""
        self.terms = terms

    def record_output(self, origin_lost: bool | None) -> None:
        """Record the first output of a worker, which shows that the worker has computed the prompt.

        `origin_lost`: whether the gateway from which the call was resumed is lost; None if the worker does not report
        this.
        """
        self._origin_lost = origin_lost
        if self.terms is ResumeTerms.PAID or (self.terms is ResumeTerms.IF_ALIVE and not origin_lost):
            self._pays_again = True  # the client pays for the second computation of the prompt

    def is_due(self, may_be_computed: bool) -> bool:
        """Return whether the prompt is charged. `may_be_computed`: whether an engine may have computed the prompt. This
        parameter matters only for a resumed call that has had no output at this gateway."""
        if self.terms is None or self._pays_again:
            return True
        return may_be_computed and self._origin_lost is None and self.terms is not ResumeTerms.FREE
