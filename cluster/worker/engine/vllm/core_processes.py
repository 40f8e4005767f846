"""The processes of the engine core and its ranks: their start, their sockets on this host, and why they ended."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.api.ports import EngineDead
from cluster.api.types import ModelSpec
from cluster.worker.engine.processes import end_causes, exit_status, fork_server, sockets, watchdog
from cluster.worker.engine.vllm import arguments, fast_path, kv_events, repairs
from cluster.worker.engine.vllm.cpu import lone_rank
from cluster.worker.engine.vllm.fast_path import FastPath
from cluster.worker.engine.vllm.paths import EnginePath, StepStats
from cluster.worker.engine.vllm.private_names import missing
from cluster.worker.engine.vllm.public_path import PublicPath


def why_not_fast() -> str:
    """Return why the installed vLLM cannot be driven over the fast path; "" if it can."""
    lacking = missing(fast_path.SYMBOLS)
    return f"this vLLM lacks {', '.join(lacking)}" if lacking else ""


class CoreProcesses:
    """The processes of one engine: its core and its ranks. `start` is called once."""

    def __init__(
        self, spec: ModelSpec, model_folder: Path, executor: str, reasoning_parser: str, tokenizer_mode: str
    ) -> None:
        """Create the object; `start` starts the processes.

        `executor`: how several ranks are placed: "ray" on the placement group of this process's Ray actor, "mp" as
        processes on this host. `reasoning_parser`: name of vLLM's parser of the model's reasoning, or "".
        `tokenizer_mode`: vLLM's mode for the model's tokenizer, used if the catalog entry sets none; "" for vLLM's
        own choice.
        """
        self._spec = spec
        self._folder = model_folder
        self._executor = executor
        self._reasoning_parser = reasoning_parser
        self._tokenizer_mode = tokenizer_mode
        self._others: Set[int] = frozenset()
        """Children that this process had before the engine."""
        self._has_sockets = False
        self._notes_name = ""
        self._end_reason = ""
        self._architecture = ""
        self.kv_events: kv_events.KvEventSocket | None = None
        """The socket of the engine's KV events; None before `start` and for an engine without events."""

    def start(self, stats: StepStats, *, fast: bool, configured: Callable[[Any], None]) -> tuple[Any, EnginePath]:
        """Start the engine core and its ranks; return vLLM's VllmConfig and the EnginePath that drives the core.
        Blocks the thread.

        `fast`: whether to use the fast path. `configured`: called with the VllmConfig before the core starts. Raises
        ValueError for an invalid catalog entry, EngineDead if the core does not start.
        """
        self._others = watchdog.children() - fork_server.server_pids()
        arguments.prepare_environment(self._spec, self._executor)
        self._has_sockets = sockets.OURS.acquire()
        if self._has_sockets and kv_events.has_events(self._spec):
            self.kv_events = kv_events.KvEventSocket(Path(os.environ[sockets.ENV]))
        config = self._config()
        self._architecture = config.model_config.architecture
        in_core = lone_rank.settle(config)
        fork_server.install(rank_in_core=in_core)
        configured(config)
        try:
            with (
                end_causes.name_engine() as self._notes_name,
                lone_rank.environment(config) if in_core else contextlib.nullcontext(),
            ):
                return config, FastPath(config, stats) if fast else PublicPath(config, stats)
        except Exception as error:
            why = end_causes.find_cause(self._notes_name) or end_causes.with_log(
                _start_error(str(error)), end_causes.log_of("stdout")
            )
            why = with_remedy(self._architecture, why)
            raise EngineDead(f"models[{self._spec.name}]: the engine did not come up: {why}") from error

    def _config(self) -> Any:
        """Return vLLM's VllmConfig for the catalog entry, and apply the repairs of vLLM. Raises ValueError."""
        args = arguments.engine_arguments(
            self._spec,
            self._folder,
            self._executor,
            self._reasoning_parser,
            self._tokenizer_mode,
            None if self.kv_events is None else self.kv_events.config(),
        )
        try:
            config = args.create_engine_config()
            if config.cache_config.enable_prefix_caching and (why := arguments.why_no_prefix_caching(config)):
                if self._spec.engine.get("enable_prefix_caching"):
                    raise ValueError(f"enable_prefix_caching: {why}; leave it out, or set it to false")
                args.enable_prefix_caching = False
                config = args.create_engine_config()
        except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
            raise ValueError(f"models[{self._spec.name}]: vLLM refuses this entry: {refusal_text(error)}") from error
        repairs.apply()
        if config.lora_config is not None and (why := repairs.why_no_adapters()):
            raise ValueError(f"models[{self._spec.name}].engine.enable_lora: {why}")
        return config

    def forget_names(self) -> Set[int]:
        """Unlink the engine's names in /dev/shm. The engine must be up. Blocks.

        Returns the ids of this process and of the engine's processes on this host.
        """
        watchdog.forget_names(self._others)
        return watchdog.own_processes(self._others)

    def end_error(self, dead: EngineDead, path: EnginePath | None) -> EngineDead:
        """Return an EngineDead with the reason why the engine ended. Later calls return the reason that the first call
        found.

        `dead`: the error that a method of `path` has raised. `path`: None if the engine is closed.
        """
        self._end_reason = self._end_reason or self._find_end_reason(dead, path)
        return EngineDead(self._end_reason)

    def _find_end_reason(self, dead: EngineDead, path: EnginePath | None) -> str:
        if why := end_causes.find_cause(self._notes_name, recent=True):
            return with_remedy(self._architecture, why)
        code = None if path is None else path.core_exit()
        cause = (
            f"{end_causes.CORE} {exit_status.describe(code)}"
            if code is not None
            else str(dead).partition(". See stack trace")[0]
        )
        return with_remedy(self._architecture, end_causes.with_log(cause, end_causes.log_of("stdout")))

    def release_sockets(self) -> None:
        """Close the socket of KV events and release the folder of the sockets. Idempotent.

        The folder is removed when the last engine of this process has released it.
        """
        if self.kv_events is not None:
            self.kv_events.close()
        has_sockets, self._has_sockets = self._has_sockets, False
        if has_sockets:
            sockets.OURS.release()


def refusal_text(error: Exception) -> str:
    """Return the reason in vLLM's error about an entry, without pydantic's framing and advice about installations."""
    if isinstance(error, ValidationError):
        details = error.errors(include_url=False, include_input=False, include_context=False)
        texts = [": ".join([*map(str, d["loc"]), d["msg"].removeprefix("Value error, ")]) for d in details]
    else:
        texts = [str(error)]
    return "; ".join(text.split("\n\n")[0].strip() for text in texts)


def _start_error(error: str) -> str:
    """Return in words how vLLM's processes ended, if vLLM's start error contains their exit codes; otherwise the
    error."""
    failed = re.findall(r"'(\w+)': (-?\d+)", error.partition("Failed core proc(s):")[2])
    return " and ".join(f"{end_causes.CORE} {exit_status.describe(int(code))}" for _, code in failed) or error


_REMEDIES = (
    (r"'_OpNamespace'", "this build of vLLM lacks a kernel that {} needs; serve it on GPUs, or serve another model"),
    (r" requires BF16", "vLLM's CPU kernels run {} in bfloat16 only; set `dtype: bfloat16`"),
    (r"expect weight to be bfloat16", "vLLM's CPU kernels run {} in 16 bits only; set `dtype: bfloat16`"),
    (
        r"was killed by SIG(SEGV|FPE|ILL|ABRT|BUS)",
        "a kernel crashed with {}; if it crashes again, set another `dtype`, serve it on GPUs, or serve another model",
    ),
    (
        r"does not dispatch through",
        "vLLM has no layers of its own for {}, and transformers' cannot be used; serve another model",
    ),
    (
        r"There is no module or parameter named|KeyError: '[\w.]+\.[\w.]+'",
        "vLLM's {} does not know a weight of these files; check that config.json belongs to them, "
        "or serve another model",
    ),
    (
        r"object has no attribute '\w+'",
        "vLLM's {} needs a field that config.json lacks; add it, or serve another model",
    ),
    (
        r"invalid for input of size|too many values to unpack|size mismatch|must match the size",
        "vLLM's {} does not fit the sizes in config.json; check them, or serve another model",
    ),
)
"""Regular expressions for errors of architectures that vLLM does not run, each with what is wrong and the remedy."""
_MAX_REASON = 400
"""Characters of vLLM's own reason that are kept."""


def with_remedy(architecture: str, why: str) -> str:
    """Return the reason why an engine ended, with the remedy if vLLM does not run its architecture."""
    known = next((text.format(architecture) for part, text in _REMEDIES if re.search(part, why)), "")
    reason, log, path = why.partition("; log: ")
    reason = reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}…"
    return f"{reason}; {known}{log}{path}" if known else why
