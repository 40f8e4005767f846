"""The Python SDK: `Client` for blocking code, `AsyncClient` for asyncio, `HeadraceError` for failed calls."""

from cluster.api.outcomes import Violation
from cluster.client.aio import AsyncClient
from cluster.client.aio_calls import AsyncStream
from cluster.client.answers import Answer, ChatAnswer, CompleteAnswer
from cluster.client.errors import UNREACHABLE, HeadraceError
from cluster.client.pooling import EmbedAnswer, PoolingParams, RankedDocument, RerankAnswer
from cluster.client.requests import ChatParams, Messages, SamplingParams
from cluster.client.sync import Client
from cluster.client.sync_calls import Stream
from cluster.client.tools import Tool, ToolCall, run_calls

__all__ = [
    "UNREACHABLE",
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "ChatAnswer",
    "ChatParams",
    "Client",
    "CompleteAnswer",
    "EmbedAnswer",
    "HeadraceError",
    "Messages",
    "PoolingParams",
    "RankedDocument",
    "RerankAnswer",
    "SamplingParams",
    "Stream",
    "Tool",
    "ToolCall",
    "Violation",
    "run_calls",
]
