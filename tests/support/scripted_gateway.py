"""Small real gRPC server with a scripted public API and admin API, for tests of the clients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster.admin.v1 import adapters_pb2, admin_pb2, admin_pb2_grpc, catalog_pb2, routing_pb2, scaling_pb2
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc

WORDS = ("The capital", " of France", " is Paris.")


def refusal(
    code: int,
    reason: str,
    message: str,
    *,
    violations: tuple[tuple[str, str], ...] = (),
    retry_after_s: float | None = None,
) -> status_pb2.Status:
    """Return an error as the google.rpc.Status that a gateway sends."""
    details: list[Any] = [error_details_pb2.ErrorInfo(domain="headrace", reason=reason)]
    if violations:
        fields = [error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in violations]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        boxed = any_pb2.Any()
        boxed.Pack(detail)
        packed.append(boxed)
    return status_pb2.Status(code=code, message=message, details=packed)


MODEL_NOT_FOUND = refusal(code_pb2.NOT_FOUND, "MODEL_NOT_FOUND", "no model is called 'nope'")


@dataclass
class Script:
    """The answers that the server must give, and the requests that the server has received."""

    models: list[pb.Model] = field(default_factory=list)
    page_size: int = 100
    refusals: list[status_pb2.Status] = field(default_factory=list)
    """Errors for the next calls, one error for each call, before any answer."""
    pushback_ms: int | None = None
    break_after: int | None = None
    """Number of pieces after which a stream fails with WORKER_LOST."""
    finish_reason: str = "stop"
    completion_tokens: int = 3
    hold: threading.Event | None = None
    """Event that a stream waits for after its first piece."""
    overview: bytes = b"{}"
    """Document that GetOverview returns."""
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    credentials: set[str] = field(default_factory=set)
    """The `authorization` of all calls, of both APIs."""
    deadlines_s: list[float | None] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    """Event that is set when the call of a stream has ended at the server, for any reason."""
    workers: list[admin_pb2.Worker] = field(default_factory=list)
    entries: list[admin_pb2.CatalogEntry] = field(default_factory=list)
    catalog_age_s: float = 0.5
    """Seconds since the controller's last report; negative: there is no report yet."""
    changes: list[catalog_pb2.Change] = field(default_factory=list)
    explained: list[routing_pb2.ExplainedCall] = field(default_factory=list)
    story: scaling_pb2.ExplainScalingResponse = field(default_factory=scaling_pb2.ExplainScalingResponse)


class ScriptedInference(inference_pb2_grpc.InferenceServicer):
    """Public API whose answers come from the script."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def _enter(self, request: Any, context: Any) -> None:
        self.script.requests.append(request)
        self.script.metadata.append({key: str(value) for key, value in context.invocation_metadata()})
        self.script.deadlines_s.append(context.time_remaining())
        if self.script.refusals:
            status: Any = rpc_status.to_status(self.script.refusals.pop(0))
            if self.script.pushback_ms is not None:
                pause = ("grpc-retry-pushback-ms", str(self.script.pushback_ms))
                status = status._replace(trailing_metadata=(*status.trailing_metadata, pause))
            context.abort_with_status(status)

    def _usage(self) -> pb.Usage:
        tokens = self.script.completion_tokens
        return pb.Usage(prompt_tokens=7, completion_tokens=tokens, total_tokens=7 + tokens)

    def _pieces(self, context: Any) -> Iterator[tuple[str, bool]]:
        context.add_callback(self.script.ended.set)
        for i, word in enumerate(WORDS):
            if i == self.script.break_after:
                lost = refusal(code_pb2.UNAVAILABLE, "WORKER_LOST", "the worker is gone", retry_after_s=0.5)
                context.abort_with_status(rpc_status.to_status(lost))
            if i == 1 and self.script.hold is not None:
                self.script.hold.wait(20)
            yield word, i == len(WORDS) - 1

    def Chat(self, request: pb.ChatRequest, context: Any) -> pb.ChatResponse:
        self._enter(request, context)
        choice = pb.Choice(message=pb.Message(role="assistant", content="".join(WORDS)), finish_reason="stop")
        return pb.ChatResponse(id="chat-1", model="tiny", choices=[choice], usage=self._usage())

    def StreamChat(self, request: pb.ChatRequest, context: Any) -> Iterator[pb.ChatChunk]:
        self._enter(request, context)
        yield pb.ChatChunk(id="chat-1", model="tiny", progress=pb.Progress(state="queued", queue_position=2))
        for word, last in self._pieces(context):
            finish_reason = self.script.finish_reason if last else ""
            delta = pb.ChoiceDelta(delta=pb.Message(content=word), finish_reason=finish_reason)
            yield pb.ChatChunk(id="chat-1", model="tiny", choices=[delta], usage=self._usage() if last else None)

    def Complete(self, request: pb.CompleteRequest, context: Any) -> pb.CompleteResponse:
        self._enter(request, context)
        choice = pb.CompleteChoice(text="".join(WORDS), finish_reason="length")
        return pb.CompleteResponse(id="cmpl-1", model="tiny", choices=[choice], usage=self._usage())

    def StreamComplete(self, request: pb.CompleteRequest, context: Any) -> Iterator[pb.CompleteChunk]:
        self._enter(request, context)
        for word, last in self._pieces(context):
            choice = pb.CompleteChoice(text=word, finish_reason="length" if last else "")
            yield pb.CompleteChunk(id="cmpl-1", model="tiny", choices=[choice], usage=self._usage() if last else None)

    def Resume(self, request: pb.ResumeRequest, context: Any) -> Iterator[pb.ResumeChunk]:
        """Refuse the call with UNIMPLEMENTED, as a gateway without resume does."""
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        raise AssertionError("abort raises")

    def Session(self, request_iterator: object, context: Any) -> Iterator[pb.SessionEvents]:
        """Refuse the call with UNIMPLEMENTED, as a gateway without sessions does."""
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        raise AssertionError("abort raises")

    def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        """Answer with one vector for each text: the text's length and its index."""
        self._enter(request, context)
        vectors = [pb.Embedding(index=i, values=[len(text), i]) for i, text in enumerate(request.texts)]
        return pb.EmbedResponse(id="embd-1", model="tiny", embeddings=vectors, usage=self._usage())

    def Rerank(self, request: pb.RerankRequest, context: Any) -> pb.RerankResponse:
        """Answer with the documents ranked by length, the longest first."""
        self._enter(request, context)
        order = sorted(range(len(request.documents)), key=lambda i: -len(request.documents[i]))
        results = [pb.RankedDocument(index=i, score=len(request.documents[i]) / 8) for i in order]
        return pb.RerankResponse(id="score-1", model="tiny", results=results, usage=self._usage())

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        self._enter(request, context)
        text = request.text or "".join(m.content for m in request.messages)
        return pb.TokenizeResponse(token_ids=list(text.encode()), max_model_len=64)

    def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        self._enter(request, context)
        return pb.DetokenizeResponse(text=bytes(request.token_ids).decode())

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        self._enter(request, context)
        start = int(request.page_token or 0)
        end = start + self.script.page_size
        more = str(end) if end < len(self.script.models) else ""
        return pb.ListModelsResponse(models=self.script.models[start:end], next_page_token=more)

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.Model:
        self._enter(request, context)
        for model in self.script.models:
            if request.name in (model.name, *model.aliases):
                return model
        context.abort_with_status(rpc_status.to_status(MODEL_NOT_FOUND))
        raise AssertionError("abort raises")


class ScriptedFleet(admin_pb2_grpc.FleetServicer):
    """The admin API's Fleet service, with answers from a test's `Script`."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def ListWorkers(self, request: admin_pb2.ListWorkersRequest, context: Any) -> admin_pb2.ListWorkersResponse:
        return admin_pb2.ListWorkersResponse(workers=self.script.workers)

    def AbortRequest(self, request: admin_pb2.AbortRequestRequest, context: Any) -> admin_pb2.AbortRequestResponse:
        self.script.requests.append(request)
        return admin_pb2.AbortRequestResponse(aborted=1)

    def Drain(self, request: admin_pb2.DrainRequest, context: Any) -> admin_pb2.DrainResponse:
        raise AssertionError("a script moves no worker")

    def Cordon(self, request: admin_pb2.CordonRequest, context: Any) -> admin_pb2.CordonResponse:
        raise AssertionError("a script moves no worker")

    def Uncordon(self, request: admin_pb2.UncordonRequest, context: Any) -> admin_pb2.UncordonResponse:
        raise AssertionError("a script moves no worker")

    def GetOverview(self, request: admin_pb2.GetOverviewRequest, context: Any) -> admin_pb2.GetOverviewResponse:
        self.script.requests.append(request)
        return admin_pb2.GetOverviewResponse(document=self.script.overview)

    def ExplainRequest(
        self, request: routing_pb2.ExplainRequestRequest, context: Any
    ) -> routing_pb2.ExplainRequestResponse:
        self.script.requests.append(request)
        if not self.script.explained:
            unknown = refusal(code_pb2.NOT_FOUND, "NOT_FOUND", "this gateway remembers no such call")
            context.abort_with_status(rpc_status.to_status(unknown))
        return routing_pb2.ExplainRequestResponse(calls=self.script.explained)

    def ExplainScaling(
        self, request: scaling_pb2.ExplainScalingRequest, context: Any
    ) -> scaling_pb2.ExplainScalingResponse:
        self.script.requests.append(request)
        return self.script.story


class ScriptedCatalog(admin_pb2_grpc.CatalogServicer):
    """Admin API of the catalog, whose answers come from the script."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def List(self, request: admin_pb2.ListRequest, context: Any) -> admin_pb2.ListResponse:
        return admin_pb2.ListResponse(models=self.script.entries, age_s=self.script.catalog_age_s)

    def Get(self, request: admin_pb2.GetRequest, context: Any) -> admin_pb2.CatalogEntry:
        for entry in self.script.entries:
            if request.name in (entry.name, *entry.aliases):
                return entry
        context.abort_with_status(rpc_status.to_status(MODEL_NOT_FOUND))
        raise AssertionError("abort raises")

    def Apply(self, request: catalog_pb2.ApplyRequest, context: Any) -> catalog_pb2.ApplyResponse:
        self.script.requests.append(request)
        return catalog_pb2.ApplyResponse(changes=self.script.changes)

    def Diff(self, request: catalog_pb2.DiffRequest, context: Any) -> catalog_pb2.DiffResponse:
        self.script.requests.append(request)
        return catalog_pb2.DiffResponse(changes=self.script.changes)

    def SetWeights(self, request: catalog_pb2.SetWeightsRequest, context: Any) -> catalog_pb2.VersionsResponse:
        return self._versions(request)

    def Promote(self, request: catalog_pb2.PromoteRequest, context: Any) -> catalog_pb2.VersionsResponse:
        return self._versions(request)

    def Rollback(self, request: catalog_pb2.RollbackRequest, context: Any) -> catalog_pb2.VersionsResponse:
        return self._versions(request)

    def Quarantine(self, request: catalog_pb2.QuarantineRequest, context: Any) -> catalog_pb2.VersionsResponse:
        return self._versions(request)

    def _versions(self, request: Any) -> catalog_pb2.VersionsResponse:
        self.script.requests.append(request)
        shares = [
            catalog_pb2.VersionStatus(version="v1", weight=0.75),
            catalog_pb2.VersionStatus(version="v2", weight=0.25),
        ]
        return catalog_pb2.VersionsResponse(name=request.name, versions=shares)

    def LoadAdapter(self, request: adapters_pb2.LoadAdapterRequest, context: Any) -> adapters_pb2.LoadAdapterResponse:
        self.script.requests.append(request)
        return adapters_pb2.LoadAdapterResponse(
            adapter=adapters_pb2.Adapter(model=request.name, name=request.adapter, source=request.source)
        )

    def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: Any
    ) -> adapters_pb2.UnloadAdapterResponse:
        self.script.requests.append(request)
        return adapters_pb2.UnloadAdapterResponse(
            adapter=adapters_pb2.Adapter(model=request.name, name=request.adapter)
        )

    def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        return adapters_pb2.ListAdaptersResponse()

    def Scale(self, request: scaling_pb2.ScaleRequest, context: Any) -> scaling_pb2.ScaleResponse:
        self.script.requests.append(request)
        by = "manual" if request.HasField("replicas") else "demand"
        return scaling_pb2.ScaleResponse(
            model=scaling_pb2.ModelScaling(name=request.name, desired=request.replicas, by=by)
        )

    def Freeze(self, request: scaling_pb2.FreezeRequest, context: Any) -> scaling_pb2.FreezeResponse:
        self.script.requests.append(request)
        return scaling_pb2.FreezeResponse(models=[scaling_pb2.ModelScaling(name=request.name or "all", by="frozen")])

    def Unfreeze(self, request: scaling_pb2.UnfreezeRequest, context: Any) -> scaling_pb2.UnfreezeResponse:
        self.script.requests.append(request)
        return scaling_pb2.UnfreezeResponse(models=[scaling_pb2.ModelScaling(name=request.name or "all", by="demand")])


class CredentialRecorder(grpc.ServerInterceptor):
    """Records the credentials of each call."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Record the credentials, and pass the call on."""
        self.script.credentials |= {str(v) for key, v in details.invocation_metadata if key == "authorization"}
        return continuation(details)


@dataclass
class ScriptedGateway:
    """The running server. `endpoint` is the host:port at which both APIs answer."""

    script: Script
    server: grpc.Server
    endpoint: str

    def stop(self) -> None:
        """Stop the server and every call."""
        if self.script.hold is not None:
            self.script.hold.set()
        self.server.stop(None).wait(60)


def serve(script: Script, address: str = "127.0.0.1:0") -> ScriptedGateway:
    """Start a server with the message size limit of a real gateway."""
    limit = 16 * 1024 * 1024
    server = grpc.server(
        ThreadPoolExecutor(8),
        interceptors=[CredentialRecorder(script)],
        options=[("grpc.max_receive_message_length", limit), ("grpc.max_send_message_length", limit)],
    )
    inference_pb2_grpc.add_InferenceServicer_to_server(ScriptedInference(script), server)
    admin_pb2_grpc.add_FleetServicer_to_server(ScriptedFleet(script), server)
    admin_pb2_grpc.add_CatalogServicer_to_server(ScriptedCatalog(script), server)
    port = server.add_insecure_port(address)
    server.start()
    return ScriptedGateway(script, server, f"127.0.0.1:{port}")
