"""Prompt log, with prompts and outputs as JSON lines. Only calls of tenants whose policy sets `log_prompts` are logged.

The log is under the gateway's folder. It has one folder for each tenant, with one file for each day (UTC). So old days
and erased tenants are removed as whole files. Only the owner can read the files. A thread writes the log, and calls
never wait for this thread: if its queue is full, a call is not logged and is counted as lost. Texts that look like keys
or tokens are hidden, as in the audit log.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.calls import request
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.pooling.pooling_request import IdsInputs, PairInputs, PoolingInputs, TextInputs
from cluster.gateway.text.tokenizer import TextModel
from cluster.ledger.audit.audit import hide_secrets
from cluster.observe.metrics import Metrics
from cluster.policy.limits.budgets import day_name
from cluster.policy.tenants.policy import TenantPolicy
from cluster.process.private_files import make_private_folder

log = structlog.get_logger("prompts")

MAX_WAITING = 1000
SWEEP_S = 3600.0
DAY_S = 86_400.0
Policies = Callable[[], Mapping[str, TenantPolicy]]


@dataclass(frozen=True, slots=True)
class _Ended:
    call: Call
    prompt: request.Prompt | PoolingInputs
    text: TextModel
    outcome: Outcome
    at_s: float


class PromptLog:
    """Writes the prompts and outputs of a gateway process to files, for tenants whose policy sets `log_prompts`."""

    def __init__(
        self, folder: Path, policies: Policies, days: int, metrics: Metrics, wall: Callable[[], float] = time.time
    ) -> None:
        """`policies`: returns the policies of all tenants and may raise CallError. `days`: retention in days for
        tenants whose policy sets none."""
        self._folder = folder
        self._policies = policies
        self._days = days
        self._metrics = metrics
        self._wall = wall
        self._waiting: queue.Queue[_Ended | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="prompts", daemon=True)
        self._error = ""

    def start(self) -> None:
        """Start the thread that writes the log and removes old files."""
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Write the queued calls and stop the thread."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join(timeout_s)

    def ended(self, call: Call, prompt: request.Prompt | PoolingInputs, text: TextModel, outcome: Outcome) -> None:
        """Log an ended call if the policy of the call's tenant asks for it. For a pooling call, the inputs are logged
        but not the vectors."""
        if not call.policy.log_prompts or call.policy.retention.prompts_days == 0:
            return
        try:
            self._waiting.put_nowait(_Ended(call, prompt, text, outcome, self._wall()))
        except queue.Full:
            self._metrics.count("prompt_log_lost_total")

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                due = time.monotonic() + SWEEP_S
                self._run_logged(self.sweep)
            try:
                ended = self._waiting.get(timeout=max(due - time.monotonic(), 0.0))
            except queue.Empty:
                continue
            if ended is None:
                return
            self._run_logged(lambda ended=ended: self._write(ended))  # type: ignore[misc]

    def _run_logged(self, work: Callable[[], None]) -> None:
        """Run `work`. Each exception is counted. If an exception repeats, only the first is logged."""
        error = ""
        try:
            work()
        except Exception as problem:  # any kind of exception: the next call must still be written
            self._metrics.count("prompt_log_lost_total")
            error = f"{type(problem).__name__}: {problem.strerror if isinstance(problem, OSError) else ''}"
        if error and error != self._error:
            log.error("prompt_log.not_written", error=error)
        self._error = error

    def _write(self, ended: _Ended) -> None:
        line = json.dumps(_line(ended), ensure_ascii=False, separators=(",", ":")) + "\n"
        folder = self._folder / ended.call.tenant
        make_private_folder(folder)
        path = folder / f"{day_name(ended.at_s)}.jsonl"
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "ab") as file:
            file.write(line.encode("utf-8", "replace"))

    def sweep(self) -> None:
        """Remove files that are older than the tenant's retention, and all files of tenants that no longer exist."""
        if not self._folder.is_dir():
            return
        try:
            policies = self._policies()
        except CallError:
            return
        now_s = self._wall()
        for folder in self._folder.iterdir():
            policy = policies.get(folder.name)
            if policy is None:
                shutil.rmtree(folder)
                continue
            own_days = policy.retention.prompts_days
            oldest = day_name(now_s - (self._days if own_days is None else own_days) * DAY_S)
            for file in folder.glob("*.jsonl"):
                if file.stem < oldest:
                    file.unlink()

    def __repr__(self) -> str:
        return f"PromptLog({self._waiting.qsize()} to write)"


def _line(ended: _Ended) -> dict[str, Any]:
    call = ended.call
    outputs = [
        {
            "index": sequence.index,
            "text": ended.text.decode(list(sequence.emitted)),
            "finish_reason": sequence.finish_reason,
        }
        for sequence in (() if call.is_pooling else call.sequences)
    ]
    line = {
        "at_s": round(ended.at_s, 3),
        "tenant": call.tenant,
        "key_id": call.key_id,
        "request_id": call.request_id,
        "call_id": call.id,
        "model": call.shown_model,
        "outcome": ended.outcome.value,
        "prompt": _prompt(ended),
        "outputs": outputs,
    }
    return {name: hide_secrets(value) for name, value in line.items()}


def _prompt(ended: _Ended) -> Any:
    if isinstance(ended.prompt, IdsInputs):
        return [ended.text.decode(list(ids), skip_special_tokens=False) for ids in ended.prompt.token_ids]
    if isinstance(ended.prompt, TextInputs | PairInputs):
        return list(ended.prompt.all_texts)
    prompt = ended.prompt.unpacked() if isinstance(ended.prompt, request.PackedPrompt) else ended.prompt
    if isinstance(prompt, request.ChatPrompt):
        return [dict(message) for message in prompt.messages]
    if isinstance(prompt, request.TextPrompt):
        return prompt.text
    return ended.text.decode(list(prompt.token_ids), skip_special_tokens=False)
