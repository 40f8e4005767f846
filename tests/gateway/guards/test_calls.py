"""Guards of calls over gRPC, over HTTP and in sessions, through a real gateway with the simulated engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.api.output_parts import OutputPart, PartKind
from cluster.config.document import parse
from cluster.gateway.guards.remote import on_this_host
from cluster.gateway.server import Gateway
from cluster.guard.v1 import guard_pb2, guard_pb2_grpc
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.gateway.apis.grpc.test_session import ReceivedEvents, start
from tests.support.calls import chat, complete, refused, rest_of, text_of
from tests.support.certificates import Authority
from tests.support.cluster import sim_engine, until
from tests.support.http import chat_body, completion_body
from tests.support.keyed import Keyed, bearer, eventually, keyed_cluster, keyed_text
from tests.support.parsed_outputs import ParsedByEngine
from tests.support.parts_engine import PartsEngine

pytestmark = pytest.mark.slow

TOKENS = 60
ASK: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle) -> AsyncIterator[Keyed]:
    """Start a gateway with keys, and a worker whose output depends only on the prompt and the tenant."""
    async with keyed_cluster(tmp_path_factory.mktemp("guarded")) as keyed:
        engine = sim_engine(checkpoint, decode_ms=1, max_model_len=50_000)
        await keyed.cluster.add_worker(engine, bundle)
        yield keyed
        await keyed.cluster.until_idle()


class Tenant:
    """A tenant whose guards the test sets."""

    def __init__(self, keyed: Keyed, name: str, key: str) -> None:
        self.keyed = keyed
        self.name = name
        self.key = key
        self.stub = keyed.cluster.stub

    @property
    def who(self) -> Any:
        """gRPC metadata that authenticates the tenant's calls."""
        return bearer(self.key)

    async def guard(self, *rules: dict[str, Any], **fields: Any) -> None:
        """Set the guards of the tenant, and wait until the gateway knows the new policy."""
        await asyncio.to_thread(self.keyed.ledger.tenants.update, self.name, {"guards": list(rules), **fields})
        await self.keyed.until_known(self.name, self.key)

    async def text(self, **fields: Any) -> str:
        """Return the text of the model's answer to the tenant's chat request."""
        answer = await self.stub.Chat(chat(**{**ASK, **fields}), metadata=self.who)
        return str(answer.choices[0].message.content)

    def counted(self, guard: str, outcome: str) -> float:
        """Return the value of guard_actions_total for this tenant, guard and outcome."""
        labels = {"headrace_cluster": "test", "tenant": self.name, "reason": guard, "outcome": outcome}
        registry = self.keyed.gateway.metrics.registry
        return registry.get_sample_value("headrace_guard_actions_total", labels) or 0.0

    async def audited(self, at_least: int) -> Sequence[dict[str, Any]]:
        """Wait until the tenant has `at_least` audit events of the kind `policy`, and return the events."""
        found: Sequence[dict[str, Any]] = ()

        async def there() -> bool:
            nonlocal found
            found = await asyncio.to_thread(self.keyed.ledger.audit.list, tenant=self.name, kind="policy")
            return len(found) >= at_least

        await eventually(there, f"{at_least} decisions are audited")
        return found


async def tenant(keyed: Keyed, name: str) -> Tenant:
    """Create a tenant without guards."""
    return Tenant(keyed, name, await keyed.key(name))


def literal(text: str) -> str:
    """Return a pattern that matches exactly `text`."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def middle(text: str) -> str:
    """Return nine characters from the middle of a text."""
    return text[len(text) // 2 : len(text) // 2 + 9]


def redacting(secret: str, **fields: Any) -> dict[str, Any]:
    """Return an output guard that redacts the text `secret`."""
    return {
        "builtin": "patterns",
        "on": "output",
        "action": "redact",
        "patterns": {"secret": literal(secret)},
        **fields,
    }


async def test_an_output_is_redacted_over_every_face(keyed: Keyed) -> None:
    """A secret that spans several tokens is redacted on every API, and is not in the log probabilities."""
    lab = await tenant(keyed, "redact")
    bare = await lab.text()
    secret = middle(bare)
    wanted = bare.replace(secret, "[redacted: secret]")
    await lab.guard(redacting(secret))

    assert await lab.text() == wanted
    chunks = await rest_of(lab.stub.StreamChat(chat(**ASK), metadata=lab.who))
    assert text_of(chunks) == wanted
    assert len(chunks) > 5
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == TOKENS
    session = lab.stub.Session(metadata=lab.who)
    received = ReceivedEvents()
    await session.write(start(1, chat(**ASK)))
    while not received.ended(1):
        message = await asyncio.wait_for(read(session), 60)
        assert message is not None
        received.add(message)
    await session.done_writing()
    assert received.text[1] == wanted
    whole = await keyed.fetch("/v1/chat/completions", chat_body(**ASK), key=lab.key)
    assert whole.json["choices"][0]["message"]["content"] == wanted
    streamed = await keyed.fetch("/v1/chat/completions", chat_body(stream=True, **ASK), key=lab.key)
    events = [json.loads(line[6:]) for line in streamed.body.decode().splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"]) == wanted

    answer = await lab.stub.Chat(chat(logprobs=True, top_logprobs=1, **ASK), metadata=lab.who)
    assert answer.choices[0].message.content == wanted
    numbers = answer.choices[0].logprobs
    assert 0 < len(numbers) < TOKENS
    assert secret not in "".join(logprob.token for logprob in numbers)
    assert "".join(logprob.token for logprob in numbers).startswith(bare[:8])
    await until(lambda: lab.counted("output_patterns", "redacted") == 6, "six redactions are counted")


async def test_each_of_several_outputs_has_guards_of_its_own(keyed: Keyed) -> None:
    """Each sequence of a call with n = 3 has its own guards. A match in one sequence does not affect the others."""
    lab = await tenant(keyed, "several")
    ask = chat(n=3, seed=5, **{**ASK, "temperature": 1.0})
    bare = [choice.message.content for choice in (await lab.stub.Chat(ask, metadata=lab.who)).choices]
    secret = middle(bare[1])
    assert secret not in bare[0] + bare[2]
    await lab.guard(redacting(secret, action="refuse"))
    answer = await lab.stub.Chat(ask, metadata=lab.who)
    assert [choice.message.content for choice in answer.choices] == [bare[0], bare[1].split(secret)[0], bare[2]]
    assert [choice.finish_reason for choice in answer.choices] == ["length", "content_filter", "length"]


async def test_a_refused_output_ends_and_leaves_the_engine(keyed: Keyed) -> None:
    """The refusal of an output ends the sequence in the engine, and tokens after the refusal are not billed."""
    lab = await tenant(keyed, "refuse")
    bare = await lab.text(max_tokens=200)
    secret = middle(bare)
    before = bare.split(secret)[0]
    await lab.guard(redacting(secret, action="refuse"), log_prompts=True)
    chunks = await rest_of(lab.stub.StreamChat(chat(**{**ASK, "max_tokens": 40_000}), metadata=lab.who))
    assert text_of(chunks) == before
    last = chunks[-1]
    assert last.choices[0].finish_reason == "content_filter"
    assert 0 < last.usage.completion_tokens < 200
    await keyed.cluster.until_idle(5)
    reply = await keyed.fetch("/v1/completions", completion_body(**{**ASK, "max_tokens": 400}), key=lab.key)
    assert reply.status == 200  # with another prompt the model returns another text
    (event,) = await lab.audited(1)
    details = event["details"]
    assert (event["outcome"], details["guard"], details["found"]) == ("refused", "output_patterns", {"secret": 1})
    assert details["texts"] == [secret]


async def test_a_prompt_is_refused_without_telling_what_was_found(keyed: Keyed) -> None:
    """The error of a refused prompt names the guard and the pattern, but not the matched text."""
    lab = await tenant(keyed, "prompts")
    await lab.guard({"builtin": "patterns", "patterns": {"card": r"\b\d{16}\b"}})
    answer = await refused(lab.stub.Chat(chat("my card is 4111111111111111"), metadata=lab.who))
    assert (answer.code, answer.reason, answer.fields) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "GUARD_REFUSED",
        ["messages"],
    )
    assert "card" in answer.message
    assert "patterns" in answer.message
    assert "41111111" not in str(answer.message) + str(answer.trailers)
    reply = await keyed.fetch("/v1/completions", completion_body("4111111111111111"), key=lab.key)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (403, "guard_refused", "prompt")
    nested = pb.Message(role="assistant", tool_calls=[pb.ToolCall(name="f", arguments='{"a":["4111111111111111"]}')])
    hidden = chat()
    hidden.messages.insert(0, nested)
    assert (await refused(lab.stub.Chat(hidden, metadata=lab.who))).reason == "GUARD_REFUSED"
    arguments = chat(chat_template_kwargs_json='{"date_string":"4111111111111111"}')
    assert (await refused(lab.stub.Chat(arguments, metadata=lab.who))).reason == "GUARD_REFUSED"
    tools = chat(tools=[pb.Tool(name="f", description="4111111111111111")], tool_choice=pb.ToolChoice(mode="none"))
    assert (await refused(lab.stub.Chat(tools, metadata=lab.who))).reason == "GUARD_REFUSED"
    documents = chat_body(documents=[{"text": "4111111111111111"}])
    reply = await keyed.fetch("/v1/chat/completions", documents, key=lab.key)
    assert reply.error["code"] == "guard_refused"
    assert await lab.text()
    events = await lab.audited(6)
    assert "41111111" not in str(events)
    assert lab.counted("input_patterns", "refused") == 6


async def test_the_model_sees_the_redacted_prompt(keyed: Keyed) -> None:
    """The model gets the redacted prompt, whether the prompt is a text, a chat message or a list of token ids."""
    lab = await tenant(keyed, "seen")
    said, seen = "write to a@b.example now", "write to [redacted: mail] now"
    prompts = [
        (chat(said, **ASK), chat(seen, **ASK)),
        (complete(said, **ASK), complete(seen, **ASK)),
    ]
    ids = {
        text: list((await lab.stub.Tokenize(pb.TokenizeRequest(model="sim", text=text), metadata=lab.who)).token_ids)
        for text in (said, seen)
    }
    prompts.append(
        (
            pb.CompleteRequest(model="sim", prompt_token_ids=ids[said], temperature=0, **ASK),
            pb.CompleteRequest(model="sim", prompt_token_ids=ids[seen], temperature=0, **ASK),
        )
    )

    async def ask(request: Any) -> Any:
        method = lab.stub.Chat if isinstance(request, pb.ChatRequest) else lab.stub.Complete
        return (await method(request, metadata=lab.who)).choices[0]

    wanted = [await ask(redacted) for _, redacted in prompts]
    assert [await ask(given) for given, _ in prompts] != wanted
    mail = {"builtin": "patterns", "action": "redact", "patterns": {"mail": r"[a-z]{1,20}@[a-z.]{1,40}"}}
    await lab.guard(mail)
    assert [await ask(given) for given, _ in prompts] == wanted
    long = "word " * 3000
    before = await ask(complete(f"{long}[redacted: mail]", **ASK))
    assert await ask(complete(f"{long}a@b.example", **ASK)) == before
    unknown = pb.CompleteRequest(model="sim", prompt_token_ids=[2**31 - 1], **ASK)
    assert (await refused(lab.stub.Complete(unknown, metadata=lab.who))).reason == "INVALID_FIELD"
    surrogate = await keyed.fetch("/v1/completions", completion_body("\ud800"), key=lab.key)
    assert (surrogate.status, surrogate.error["code"]) == (400, "invalid_field")


async def test_sizes(keyed: Keyed) -> None:
    """A size guard refuses prompts and outputs that exceed its bounds on characters or messages. Smaller ones pass."""
    lab = await tenant(keyed, "sizes")
    bare = await lab.text()
    await lab.guard(
        {"builtin": "sizes", "max_characters": 40, "max_messages": 2},
        {"builtin": "sizes", "on": "output", "max_characters": len(bare) - 3},
        {"builtin": "sizes", "on": "output", "max_characters": 5, "action": "flag"},
    )
    long = await refused(lab.stub.Chat(chat("x" * 41), metadata=lab.who))
    assert (long.reason, "40 characters" in long.message) == ("GUARD_REFUSED", True)
    many = chat("hi")
    many.messages.extend([many.messages[0], many.messages[0]])
    assert "2 messages" in (await refused(lab.stub.Chat(many, metadata=lab.who))).message
    answer = (await lab.stub.Chat(chat(**ASK), metadata=lab.who)).choices[0]
    assert (answer.message.content, answer.finish_reason) == (bare[:-3], "content_filter")
    assert lab.counted("output_sizes", "flagged") == 1


async def test_a_file_of_patterns_is_read_again(keyed: Keyed, tmp_path: Path) -> None:
    """A pattern file is reloaded when it changes. If the changed file is invalid, the last valid patterns stay in
    force. If there has never been a file, the setting `fail` decides whether calls are refused or pass unchecked."""
    lab = await tenant(keyed, "files")
    file = tmp_path / "pii.yaml"
    await lab.guard({"builtin": "patterns", "patterns_file": str(file)})
    answer = await refused(lab.stub.Chat(chat("anything"), metadata=lab.who))
    assert (answer.reason, "could not decide" in answer.message) == ("GUARD_REFUSED", True)
    assert str(file) not in answer.message
    await lab.guard({"builtin": "patterns", "patterns_file": str(file), "fail": "open"})
    assert await lab.text()
    assert (lab.counted("input_patterns", "failed_closed"), lab.counted("input_patterns", "failed_open")) == (1, 1)
    file.write_text("word: 'hel{1,2}o'\n")
    assert "word" in (await refused(lab.stub.Chat(chat("so hello there"), metadata=lab.who))).message
    file.write_text("word: 'hel+o'\n")
    assert "word" in (await refused(lab.stub.Chat(chat("so hello there"), metadata=lab.who))).message
    file.write_text("other: 'there'\n# \n")
    assert "other" in (await refused(lab.stub.Chat(chat("so hello there"), metadata=lab.who))).message


class Server(guard_pb2_grpc.GuardServicer):
    """A guard server that takes its action from the first word of the last text."""

    def __init__(self) -> None:
        self.asked: list[guard_pb2.CheckRequest] = []

    async def Check(self, request: guard_pb2.CheckRequest, context: Any) -> guard_pb2.CheckResponse:
        """Return the action that the first word of the last text names, such as `refuse`; allow any other text."""
        self.asked.append(request)
        kind = guard_pb2.CheckResponse
        match request.texts[-1].split()[0]:
            case "hang":
                await asyncio.Event().wait()
            case "refuse":
                return kind(action=kind.ACTION_REFUSE, finding="insult")
            case "replace":
                return kind(action=kind.ACTION_REPLACE, texts=["Hello, who are you?"] * len(request.texts))
            case "fewer":
                return kind(action=kind.ACTION_REPLACE)
            case "flag":
                return kind(action=kind.ACTION_FLAG, finding="Not A Name")
            case "break":
                raise RuntimeError("broken")
        return kind(action=kind.ACTION_ALLOW)


async def test_a_guard_server_decides_in_its_time(keyed: Keyed) -> None:
    """If a guard server hangs, fails or is unreachable, the guard fails within the time limit. A guard that fails
    closed refuses the call; a guard that fails open lets the call pass."""
    lab = await tenant(keyed, "server")
    bare = await lab.text()
    servicer, server = Server(), grpc.aio.server()
    guard_pb2_grpc.add_GuardServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    rule = {"address": f"127.0.0.1:{port}", "timeout_s": 0.3}
    try:
        await lab.guard(rule)
        assert await lab.text() == bare
        asked = servicer.asked[-1]
        assert (asked.tenant, asked.model, list(asked.texts)) == ("server", "sim", ["Hello, who are you?"])
        answer = await refused(lab.stub.Chat(chat("refuse me"), metadata=lab.who))
        assert (answer.reason, "insult" in answer.message) == ("GUARD_REFUSED", True)
        replaced = await lab.stub.Chat(chat("replace me", **ASK), metadata=lab.who)
        assert replaced.choices[0].message.content == bare
        assert (await lab.stub.Chat(chat("flag me"), metadata=lab.who)).choices
        for word in ("hang", "break", "fewer"):
            closed = await refused(lab.stub.Chat(chat(f"{word} now"), metadata=lab.who))
            assert (closed.reason, "could not decide" in closed.message) == ("GUARD_REFUSED", True), word
        assert lab.counted("input_server", "failed_closed") == 3
        await lab.guard({**rule, "fail": "open"})
        for word in ("hang", "break", "fewer"):
            assert (await lab.stub.Chat(chat(f"{word} now"), metadata=lab.who)).choices
        assert lab.counted("input_server", "failed_open") == 3
    finally:
        await server.stop(0)
    await lab.guard(rule)
    assert (await refused(lab.stub.Chat(chat(), metadata=lab.who))).reason == "GUARD_REFUSED"


async def test_a_guard_server_elsewhere_is_asked_over_tls(keyed: Keyed, tmp_path: Path) -> None:
    """A guard server on another host is called over TLS with a verified certificate."""
    lab = await tenant(keyed, "far")
    files = Authority(tmp_path / "ca").issue("guard")
    servicer, server = Server(), grpc.aio.server()
    guard_pb2_grpc.add_GuardServicer_to_server(servicer, server)
    pair = (files.key_file.read_bytes(), files.cert_file.read_bytes())
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    await server.start()
    address = f"ipv4:127.0.0.1:{port}"  # a spelling that is not recognized as this host
    assert not on_this_host(address)
    try:
        for ca_file, allowed in ((files.ca_file, True), (Authority(tmp_path / "other").issue("x").ca_file, False)):
            await lab.guard({"address": address, "ca_file": str(ca_file), "timeout_s": 2})
            asking = lab.stub.Chat(chat(), metadata=lab.who)
            if allowed:
                assert (await asking).choices
            else:
                assert (await refused(asking)).reason == "GUARD_REFUSED"
        assert len(servicer.asked) == 1
    finally:
        await server.stop(0)


@pytest.mark.parametrize(
    ("address", "here"),
    [("unix:/run/g", True), ("localhost:1", True), ("[::1]:1", True), ("10.0.0.1:1", False), ("guard:1", False)],
)
def test_what_is_on_this_host(address: str, here: bool) -> None:
    """Only addresses on this host count as local. A guard server at a local address may be called without TLS."""
    assert on_this_host(address) is here


async def test_guards_by_the_command_line(keyed: Keyed) -> None:
    """The command line accepts the same guards as the configuration file. Guards that a gateway could not apply are
    refused."""
    lab = await tenant(keyed, "typed")
    rule = "[{builtin: patterns, on: output, action: redact, patterns: {mail: '[a-z]{1,9}@x'}}]"
    done = await keyed.cli("tenants", "update", "typed", "--set", f"guards={rule}")
    assert done.returncode == 0, done.stderr
    await keyed.until_known("typed", lab.key)
    stored = (await asyncio.to_thread(keyed.ledger.tenants.get, "typed")).policy.guards
    assert (stored[0].on, dict(stored[0].patterns)) == ("output", {"mail": "[a-z]{1,9}@x"})
    wrong = await keyed.cli("tenants", "update", "typed", "--set", f"guards={rule.replace('{1,9}', '+')}")
    assert wrong.returncode != 0
    assert "guards[0].patterns.mail" in wrong.stderr
    assert "{1,64}" in wrong.stderr


async def test_who_has_no_guards_keeps_the_short_way(keyed: Keyed) -> None:
    """Without output guards, the tokens of a call take the fast path from the link to the connection."""
    lab = await tenant(keyed, "bare")
    await lab.guard({"builtin": "sizes", "max_characters": 1000})
    stream = lab.stub.StreamChat(chat(**{**ASK, "max_tokens": 20_000}), metadata=lab.who)
    await read(stream)

    def direct() -> bool:
        calls = [call for call in keyed.gateway.service.calls if call.tenant == "bare"]
        return any(output.direct is not None for call in calls for output in call.sequences)

    await until(direct, "the call's tokens are sent directly to its connection")
    stream.cancel()


async def test_a_guard_goes_on_with_a_call_on_another_worker(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A secret is redacted even if one worker emits its first half and another worker its second half."""
    async with keyed_cluster(tmp_path) as keyed:
        engines = [sim_engine(checkpoint, decode_ms=5, max_model_len=50_000) for _ in range(2)]
        for engine in engines:
            await keyed.cluster.add_worker(engine, bundle)
        lab = await tenant(keyed, "moved")
        bare = await lab.text(max_tokens=120)
        secret = bare[len(bare) // 4 : -len(bare) // 4]  # long enough not to be complete when the worker dies
        await lab.guard(redacting(secret))
        stream = lab.stub.StreamChat(chat(**{**ASK, "max_tokens": 120}), metadata=lab.who)
        chunks = [await asyncio.wait_for(read(stream), 60)]
        (call,) = keyed.gateway.service.calls
        await until(lambda: len(call.sequences[0].emitted) >= 60, "half of the answer is emitted")
        next(engine for engine in engines if engine.load().running).faults.kill()
        chunks += await rest_of(stream)
        assert text_of(chunks) == bare.replace(secret, "[redacted: secret]")
        assert chunks[-1].usage.completion_tokens == 120


def test_a_declared_tenants_file_must_be_there(tmp_path: Path) -> None:
    """A gateway does not start if the pattern file of a configured tenant is missing or invalid."""
    (tmp_path / "bad.yaml").write_text("mail: '.+@.+'\n")
    for name, error in (("none.yaml", "cannot be read"), ("bad.yaml", "mail: its longest match is without bound")):
        guards = f"[{{builtin: patterns, on: output, patterns_file: {tmp_path / name}}}]"
        text = keyed_text(tmp_path, f"tenants: [{{name: acme, guards: {guards}}}]\n")
        with pytest.raises(ValueError, match=rf"tenants\[acme\]\.guards\[0\]\.patterns_file: .*{error}"):
            Gateway(parse(text), tmp_path / "gateway")


async def test_the_parsers_get_what_the_guards_leave(tmp_path: Path, bundle: Bundle) -> None:
    """If an input guard removes text from a tool definition, the text reaches neither the prompt nor the worker's
    parsers."""
    engine = PartsEngine([[OutputPart(PartKind.CONTENT, "ok")]])
    async with keyed_cluster(tmp_path) as keyed:
        await keyed.cluster.add_worker(engine, bundle, parser=ParsedByEngine())
        lab = await tenant(keyed, "lab")
        await lab.guard({**redacting("hunter2"), "on": "input"})
        await lab.text(tools=[pb.Tool(name="f", description="it is hunter2")])
    parsing = engine.requests[-1].parsing
    assert parsing is not None
    (tool,) = json.loads(parsing.request)["tools"]
    assert (tool["function"]["name"], tool["function"]["description"]) == ("f", "it is [redacted: secret]")
