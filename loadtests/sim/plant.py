"""Step model of a replica: speed as a function of load. Simulation, optimum and baselines share this model.

A step computes one token for each running sequence and at most `chunk_tokens` of prompts. The duration of a step is

    step_s + per_sequence_s * running + prompt tokens / prefill_tokens_per_s

So a fully used replica that computes p prompt tokens, d output tokens and f steps per second satisfies

    1 = p / prefill_tokens_per_s + per_sequence_s * d + step_s * f

`SMALL` has the constants of the realistic engine in the mock worker of SMG, a router for LLM servers: 8,000 prompt
tokens/s, 6 ms a step and 0.35 ms a sequence, 256 sequences, 524,288 tokens of cache.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplicaModel:
    """Model of a replica's engine steps. Times are in seconds. In the methods, `itl_s` is the time between two tokens
    of one sequence."""

    prefill_tokens_per_s: float = 8_000.0
    step_s: float = 0.006
    per_sequence_s: float = 0.00035
    chunk_tokens: int = 512
    max_running: int = 256
    kv_tokens: int = 524_288

    def most_prefill(self, running: float) -> float:
        """Return the prompt tokens per second if every step computes `chunk_tokens` prompt tokens and one token of each
        of `running` sequences."""
        chunk_s = self.chunk_tokens / self.prefill_tokens_per_s
        return self.chunk_tokens / (self.step_s + self.per_sequence_s * running + chunk_s)

    def steps_per_s(self, running: float, prefill_tokens_per_s: float) -> float:
        """Return the steps per second if each step computes one token of each of `running` sequences, and the engine
        also computes `prefill_tokens_per_s` prompt tokens per second."""
        left = max(1.0 - prefill_tokens_per_s / self.prefill_tokens_per_s, 0.0)
        return left / (self.step_s + self.per_sequence_s * running)

    def decode_tokens_per_s(self, itl_s: float) -> float:
        """Maximum number of decoded tokens per second without prefill, if each sequence gets its next token within
        `itl_s`."""
        running = self.sequences(itl_s)
        return running / (self.step_s + self.per_sequence_s * running)

    def sequences(self, itl_s: float) -> float:
        """Return the maximum number of running sequences at which each sequence still gets its next token within
        `itl_s` seconds, while no prompt is computed."""
        return min((itl_s - self.step_s) / self.per_sequence_s, self.max_running)

    def busy(self, prompt_tokens: float, output_tokens: float, itl_s: float) -> float:
        """Return the replica-seconds that a fully used replica needs for these prompt and output tokens. `itl_s`:
        longest allowed time between two output tokens of a sequence."""
        return prompt_tokens / self.prefill_at(itl_s) + output_tokens / self.decode_tokens_per_s(itl_s)

    def prefill_at(self, itl_s: float) -> float:
        """Return the number of prompt tokens per second that a replica can compute while it also decodes a few
        sequences. The replica makes one step every `itl_s` seconds, so that each sequence gets a token in this time."""
        return self.prefill_tokens_per_s * (1.0 - self.step_s / itl_s)


SMALL = ReplicaModel()
LARGE = ReplicaModel(prefill_tokens_per_s=64_000.0, chunk_tokens=4096, kv_tokens=4 * 524_288)
"""Model of eight GPUs as one replica, for prompts whose prefill on a small replica takes longer than the TTFT
target."""
