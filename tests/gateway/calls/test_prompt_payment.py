"""Rules that decide whether a tenant is charged for the prompt of a resumed call."""

from __future__ import annotations

import pytest

from cluster.gateway.calls.prompt_payment import PromptPayment
from cluster.gateway.resume_tokens.claim import ResumeTerms

FREE, IF_ALIVE, PAID = ResumeTerms.FREE, ResumeTerms.IF_ALIVE, ResumeTerms.PAID


@pytest.mark.parametrize("may_be_computed", [False, True])
def test_a_new_call_pays(may_be_computed: bool) -> None:
    """A call that began at this gateway is charged for its prompt, before and after the first output."""
    payment = PromptPayment()
    assert payment.is_due(may_be_computed)
    payment.record_output(None)
    assert payment.is_due(may_be_computed)


@pytest.mark.parametrize(
    ("terms", "origin_lost", "is_due"),
    [
        (FREE, None, False),
        (FREE, False, False),
        (IF_ALIVE, True, False),
        (IF_ALIVE, False, True),
        (IF_ALIVE, None, True),
        (PAID, True, True),
        (PAID, None, True),
    ],
)
def test_the_terms_decide_after_the_first_output(terms: ResumeTerms, origin_lost: bool | None, is_due: bool) -> None:
    """After the first output of a resumed call, the terms of the resume decide whether the tenant pays for the prompt
    again. With `IF_ALIVE`, the tenant pays unless a worker has reported that the gateway before the resume was lost."""
    payment = PromptPayment()
    payment.resume(FREE)
    payment.resume(terms)
    payment.record_output(origin_lost)
    assert payment.is_due(False) is is_due


@pytest.mark.parametrize(("terms", "is_due"), [(FREE, False), (IF_ALIVE, True), (PAID, True)])
def test_a_call_that_its_client_ends_early_may_pay(terms: ResumeTerms, is_due: bool) -> None:
    """If a client ends a resumed call before its first output, the call is charged for the prompt only if an engine may
    have computed the prompt and the resume terms are not FREE."""
    payment = PromptPayment()
    payment.resume(terms)
    assert payment.is_due(True) is is_due
    assert not payment.is_due(False)
