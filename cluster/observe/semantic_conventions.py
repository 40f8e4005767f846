"""Names of spans and of their attributes. The names come from OpenTelemetry's semantic conventions; names that begin
with `headrace.` are our own.

The conventions for generative AI are still in development, so only this module contains the names. They follow
open-telemetry/semantic-conventions-genai as of semantic conventions 1.42. For a new release of the conventions, only
this file must be changed.
"""

from __future__ import annotations

from typing import Final

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.42.0"

# Generative AI
OPERATION: Final = "gen_ai.operation.name"
CHAT: Final = "chat"
TEXT_COMPLETION: Final = "text_completion"
EMBEDDINGS: Final = "embeddings"
SCORE: Final = "score"
"""Our own name: the conventions have no operation for scores, and allow other names."""
PROVIDER: Final = "gen_ai.provider.name"
PROVIDER_HEADRACE: Final = "headrace"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_CHOICES: Final = "gen_ai.request.choice.count"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
REASONING_TOKENS: Final = "gen_ai.usage.reasoning.output_tokens"

# General
ERROR_TYPE: Final = "error.type"
SERVICE_NAME: Final = "service.name"
SERVICE_INSTANCE: Final = "service.instance.id"
SERVICE_VERSION: Final = "service.version"
POD: Final = "k8s.pod.name"
NODE: Final = "k8s.node.name"
HOST: Final = "host.name"

# Ours: of processes
CLUSTER: Final = "headrace.cluster"
GATEWAY_SERVICE: Final = "headrace-gateway"
WORKER_SERVICE: Final = "headrace-worker"

# Ours: of calls
API: Final = "headrace.api"
TENANT: Final = "headrace.tenant"
REQUEST_ID: Final = "headrace.request_id"
OUTCOME: Final = "headrace.outcome"
PRIORITY_CLASS: Final = "headrace.class"
VERSION: Final = "headrace.model.version"
RESUMES: Final = "headrace.resumes"
IS_CONTINUED: Final = "headrace.continued_from_other_gateway"
OMITTED_ATTEMPTS: Final = "headrace.attempts.omitted"

# Ours: of attempts
SEQUENCE: Final = "headrace.sequence"
ATTEMPT_NUMBER: Final = "headrace.attempt.number"
ATTEMPT_END: Final = "headrace.attempt.end"
WORKER: Final = "headrace.worker"
GPU: Final = "headrace.gpu"
TOKENS_BEFORE: Final = "headrace.attempt.tokens_before"
TOKENS: Final = "headrace.attempt.output_tokens"
ATTEMPT_CACHED: Final = "headrace.attempt.cached_tokens"
ROUTE_REASON: Final = "headrace.route.reason"
ROUTE_AGAIN: Final = "headrace.route.again"
ROUTE_PROMPT: Final = "headrace.route.prompt_tokens"
ROUTE_PREDICTED: Final = "headrace.route.predicted_cached_tokens"
ROUTE_WORKERS: Final = "headrace.route.workers"
ROUTE_DROPPED: Final = "headrace.route.dropped_workers"
ROUTE_AWAITED: Final = "headrace.route.awaited_worker"
ROUTE_WAIT: Final = "headrace.route.wait_s"
WAIT_REASON: Final = "headrace.wait.reason"
MEASURED_BY: Final = "headrace.measured_by"
PARSER: Final = "headrace.parser"

# Names of spans and events below the call's span. The name of the call's span is its operation and model.
ADMISSION: Final = "admission"
QUEUE: Final = "queue"
RESUME: Final = "resume"
ATTEMPT: Final = "attempt"
ROUTE: Final = "route"
WORKER_WAIT: Final = "worker wait"
ENGINE_QUEUE: Final = "engine queue"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
PARSE: Final = "parse output"
FIRST_TOKEN: Final = "first token"  # noqa: S105 - the name of an event
