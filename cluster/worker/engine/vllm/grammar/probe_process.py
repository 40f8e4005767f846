"""The process that tries grammars before the engine gets them, and the measurement of their cost.

Problem: a compiled grammar computes a mask over the vocabulary for each token, inside the engine core and before all
requests' next tokens. What a grammar costs does not show in its text: a few hundred bytes can compile for minutes, or
make masks of a second. So each grammar is compiled and tried with the engine's own backend and vocabulary, in a process
that the kernel ends.

The parent loads the tokenizer and the backend once, and forks a child for each socket that the worker sends. A child
measures one grammar after another. A timer on the CPU time of all its threads ends it by a signal at MAX_CPU_S, and its
memory is limited; the worker sees either as the end of the socket. All processes end with the worker.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import re
import resource
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.worker.engine.vllm import repairs
from cluster.worker.engine.vllm.grammar.mask_times import lower_priority

MAX_CPU_S = 2.0
"""CPU seconds within which a grammar must be validated, compiled and tried."""
MAX_NEW_BYTES = 1 << 30
"""Memory that a child may allocate in addition to what it shares with its parent."""
MAX_COMPILED_BYTES = 128 << 20
"""Size of a compiled grammar. A string with a length bound has up to 60 MB with a vocabulary of 128,000."""
MAX_MASK_S, MAX_MEAN_MASK_S = 0.02, 0.002
"""CPU seconds of one mask, and of a mask on average. Ordinary schemas and expressions stay below a millisecond, but a
counted `.{1,200}` has single masks of 12 ms."""
DRAWS = 8
"""Attempts to draw a token that leads on: white space does not, and xgrammar allows some tokens that end within a
character, but refuses them afterwards."""
STEPS, RULE_STEPS = 40, 10
"""Number of tokens in a trial output of the whole grammar, and of one of its rules. In an ambiguous grammar, masks
become slower with each token."""
RULES_S = 0.02
"""CPU seconds for the trials of rules, which an ordinary schema has too."""

SYMBOLS: dict[str, tuple[str, ...]] = {
    "vllm.v1.structured_output.StructuredOutputManager": ("vllm_config",),
    "vllm.v1.structured_output.StructuredOutputManager.grammar_init": ("request",),
    "vllm.v1.structured_output.StructuredOutputManager._create_grammar": ("request",),
    "vllm.v1.structured_output.request.StructuredOutputRequest.from_sampling_params": ("sampling_params",),
    "vllm.v1.structured_output.backend_types.StructuredOutputBackend.allocate_token_bitmask": ("max_num_seqs",),
    "vllm.v1.structured_output.backend_types.StructuredOutputGrammar.fill_bitmask": (),
    "vllm.v1.structured_output.backend_types.StructuredOutputGrammar.accept_tokens": ("request_id", "tokens"),
    "vllm.v1.structured_output.backend_types.StructuredOutputGrammar.is_terminated": (),
    "vllm.sampling_params.SamplingParams.verify": ("model_config", "structured_outputs_config", "tokenizer"),
}
"""Private names of vLLM that a trial uses."""

_PIECES = (
    *({"type": "string", "maxLength": most} for most in (128, 200, 255, 500, 1000, 2000)),
    *({"type": "string", "format": form} for form in ("date-time", "email", "uri")),
    {"type": "object", "additionalProperties": True},
)
"""Schemas whose parts many other schemas contain. Compiled once in the parent, they are in each child's cache."""


class GrammarTrial:
    """Compiles grammars as the engine core does, and measures their masks."""

    def __init__(self, config: Any) -> None:
        """Load tokenizer and backend. `config`: the engine's VllmConfig."""
        from vllm.v1.structured_output import StructuredOutputManager

        self._manager = StructuredOutputManager(config)
        self._manager._use_async_grammar_compilation = False
        self._config = config
        tokenizer = self._manager.tokenizer
        ends = getattr(config.model_config.hf_config, "eos_token_id", None)
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._blank = {token for text, token in tokenizer.get_vocab().items() if not str(text).strip("ĠĊĉč▁ \n\r\t")}
        self._compile({"json_object": True})  # creates the backend
        with ThreadPoolExecutor(1, initializer=lower_priority) as beside_the_engines_start:
            for piece in _PIECES:
                schema = json.dumps({"type": "object", "properties": {"a": piece}})
                beside_the_engines_start.submit(self._compile, {"json": schema})  # another backend may refuse one
            beside_the_engines_start.submit(self._compile, {"regex": ".{0,200}"})
        self._bitmask = self._manager.backend.allocate_token_bitmask(1)

    def problem(self, arguments: Mapping[str, Any]) -> str:
        """Return why a grammar costs too much, with the remedy; empty if it does not, or if it does not compile.

        `arguments`: the arguments of vLLM's StructuredOutputsParams. The engine reports an error of the grammar itself.
        """
        try:
            grammar = self._compile(arguments)
        except MemoryError:
            return "compiling it takes too much memory; make it smaller"
        except Exception as error:
            return "compiling it takes too much memory; make it smaller" if "bad_alloc" in str(error) else ""
        size = getattr(getattr(grammar, "ctx", None), "memory_size_bytes", 0)
        if size > MAX_COMPILED_BYTES:
            return f"it compiles to {size >> 20} MiB, at most {MAX_COMPILED_BYTES >> 20}; make it smaller"
        return self._mask_problem(grammar)

    def _compile(self, arguments: Mapping[str, Any]) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams
        from vllm.v1.structured_output.request import StructuredOutputRequest

        params = SamplingParams(structured_outputs=StructuredOutputsParams(**arguments))
        config = self._config
        params.verify(config.model_config, None, config.structured_outputs_config, self._manager.tokenizer)
        request = SimpleNamespace(
            request_id="trial",
            sampling_params=params,
            structured_output_request=StructuredOutputRequest.from_sampling_params(params),
        )
        if self._manager.backend is None:
            self._manager.grammar_init(request)
        return self._manager._create_grammar(request)

    def _mask_problem(self, grammar: Any) -> str:
        """Try outputs of the whole grammar, then of single rules: a costly rule may stand where no trial gets to."""
        for repeats in (False, True):
            if problem := self._walk_problem(grammar, STEPS, repeats):
                return problem
            grammar.reset()
        ends_at = time.process_time() + RULES_S
        for rule in self._rules(grammar):
            if problem := self._walk_problem(rule, RULE_STEPS, True):
                return problem
            if time.process_time() > ends_at:
                break
        return ""

    def _rules(self, grammar: Any) -> Iterator[Any]:
        """Yield a grammar for each rule of xgrammar's grammar, in random order."""
        if (compiled := getattr(grammar, "ctx", None)) is None:
            return
        import xgrammar

        text = str(compiled.grammar)
        names = re.findall(r"^(\w+) ::= ", text, re.MULTILINE)
        random.Random(0).shuffle(names)  # noqa: S311
        for name in names:
            with contextlib.suppress(Exception):  # a rule with no output
                part = self._manager.backend.compiler.compile_grammar(
                    xgrammar.Grammar.from_ebnf(text, root_rule_name=name)
                )
                yield replace(grammar, matcher=xgrammar.GrammarMatcher(part), ctx=part)

    def _walk_problem(self, grammar: Any, steps: int, repeats: bool) -> str:
        """Return why the masks along a random output are too slow; empty if they are not. `repeats`: whether a token is
        repeated as often as the grammar allows it."""
        draw, spent_s, last = random.Random(0), 0.0, -1  # noqa: S311
        words = self._bitmask[0].numpy().view("uint32")
        for masks in range(1, steps + 1):
            took_s = _fill_s(grammar, self._bitmask)
            if took_s > MAX_MASK_S:  # once more, without cold caches
                took_s = min(took_s, _fill_s(grammar, self._bitmask))
            spent_s += took_s
            if took_s > MAX_MASK_S:
                return _too_slow(took_s, MAX_MASK_S)
            if masks >= RULE_STEPS and spent_s / masks > MAX_MEAN_MASK_S:
                return _too_slow(spent_s / masks, MAX_MEAN_MASK_S)
            again = repeats and last >= 0 and words[last >> 5] >> (last & 31) & 1
            last = self._accepted(grammar, words, draw, last if again else -1)
            if last < 0 or grammar.is_terminated():
                break
        return ""

    def _accepted(self, grammar: Any, words: Any, draw: random.Random, token: int) -> int:
        """Append `token` to the grammar's output, or a random one if `token` is negative or refused. Return the token;
        -1 if there is none."""
        for _ in range(DRAWS):
            token = self._drawn(words, draw) if token < 0 else token
            if token < 0 or grammar.accept_tokens("trial", [token]):
                return token
            token = -1
        return -1

    def _drawn(self, words: Any, draw: random.Random) -> int:
        """Return a random token that the mask allows and that does not end the output; -1 if there is none."""
        import numpy as np

        for end in self._ends:
            words[end >> 5] &= ~np.uint32(1 << (end & 31))
        places = np.flatnonzero(words)
        if not len(places):
            return -1
        for _ in range(DRAWS):
            place = int(places[draw.randrange(len(places))])
            token = place * 32 + draw.choice([bit for bit in range(32) if int(words[place]) >> bit & 1])
            if token not in self._blank:
                break
        return token


def _too_slow(took_s: float, most_s: float) -> str:
    return (
        f"each token takes {took_s * 1000:.1f} ms to check against it, at most {most_s * 1000:g}; nest fewer loops and "
        "optional parts, and let alternatives begin differently"
    )


def _fill_s(grammar: Any, bitmask: Any) -> float:
    began = time.thread_time()
    grammar.fill_bitmask(bitmask, 0)
    return time.thread_time() - began


def serve(connection: socket.socket, config: Any) -> None:
    """Load the backend, then fork a child for each socket that arrives, until the worker closes the connection."""
    os.environ["VLLM_REGEX_COMPILATION_TIMEOUT_S"] = "0"  # a limit in a thread, which would go on; ours ends it
    logging.getLogger("vllm").setLevel(logging.CRITICAL)  # errors of the callers' grammars
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes children that have ended
    repairs.apply()
    trial = GrammarTrial(config)
    gc.freeze()
    while True:
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
        if not descriptors:
            os._exit(0)
        if not os.fork():
            connection.close()
            _measure_all(socket.socket(fileno=descriptors[0]), trial)
            os._exit(0)
        os.close(descriptors[0])


def _measure_all(connection: socket.socket, trial: GrammarTrial) -> None:
    """Answer the worker's grammars in a child: first the child's process id, then a text for each grammar."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    used = int(re.findall(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (used + MAX_NEW_BYTES, resource.RLIM_INFINITY))
    channel = Connection(connection.detach())
    channel.send_bytes(str(os.getpid()).encode())
    while True:
        try:
            arguments = json.loads(channel.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
        problem = trial.problem(arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        channel.send_bytes(problem.encode())
