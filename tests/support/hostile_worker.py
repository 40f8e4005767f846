"""A hostile worker, as a process of its own. It has a valid certificate of one model, and sends what may harm others.

The messages have valid types and hostile values: guessed ids of records, incarnations and ids of other workers, made-up
tenants, lists far too long, and any bytes. Usage: python -m tests.support.hostile_worker ADDRESS CERTIFICATES SECONDS
SEED VICTIM_ID VICTIM_INCARNATION BUNDLE
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from cluster.api.types import KV_EVENTS
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.wire.tls import TlsFiles

MODEL = "other"
BIG = (1 << 63) + 5
COUNTS = (1, 1, 3, 100, 1000, 5000, 100_000)


class HostileWorker:
    """A peer that opens links as workers of its model, and sends hostile messages on them."""

    def __init__(self, address: str, files: TlsFiles, seed: int, victim: tuple[str, str], bundle: str) -> None:
        """`victim`: worker id and incarnation of a worker of another model. `bundle`: digest of its tokenizer."""
        self._address = address
        self._files = files
        self._random = random.Random(seed)
        self._victim = victim
        self._bundle = bundle
        self._numbers = itertools.count(1)
        self._gateway = "i"
        self._seals = [b"s" * 100]
        self.sent = 0

    def run(self, until: float) -> None:
        """Attack until a monotonic time."""
        attacks = [self._turn, self._turn, self._turn, self._beats, self._bulk, self._starting, self._garbage]
        while time.monotonic() < until:
            options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1))
            with grpc.secure_channel(self._address, self._files.channel_credentials(), options=options) as channel:
                for _ in range(self._random.choice((1, 4, 20))):
                    with contextlib.suppress(grpc.RpcError, ValueError):
                        self._random.choice(attacks)(channel)

    # ---- streams

    def _turn(self, channel: grpc.Channel) -> None:
        """Open a link, and send hostile turns while the gateway accepts them."""
        hello = self._hello()
        stop = threading.Event()
        turns = self._turns(self._random.choice((5, 50)))
        replies: list[pb.WorkerTurn] = []

        def send() -> Iterator[pb.WorkerTurn]:
            yield pb.WorkerTurn(hello=hello)
            yield pb.WorkerTurn(seq=1, credit=pb.Credit(grant_id=1, sequences=4, tokens=10_000))
            for turn in turns:
                if stop.is_set():
                    return
                while replies:
                    yield replies.pop()
                self.sent += 1
                yield turn
            until = time.monotonic() + 0.3
            while time.monotonic() < until and not stop.wait(0.02):
                while replies:
                    yield replies.pop()

        for answer in pb_grpc.LinkStub(channel).Turn(send(), timeout=self._random.choice((0.3, 2.0))):
            self._gateway = answer.welcome.incarnation or self._gateway
            for submit in answer.submits:
                self._seals.append(submit.sealed_record)
                replies.append(self._answer(submit))
        stop.set()

    def _answer(self, submit: pb.Submit) -> pb.WorkerTurn:
        """Answer a request, and report its usage many times."""
        step = pb.StepOutputs(slots=[submit.slot], token_ids=[5])
        step.firsts.add(slot=submit.slot, prompt_tokens=1)
        step.finishes.add(slot=submit.slot, reason=pb.Finish.REASON_LENGTH)
        usage = [pb.Usage(key=n, sealed_record=submit.sealed_record, generated_tokens=BIG % 7) for n in range(50)]
        return pb.WorkerTurn(accepted=[pb.Accepted(slot=submit.slot)], step=step, usage=usage)

    def _beats(self, channel: grpc.Channel) -> None:
        name, incarnation = self._random.choice((self._victim, ("other-w", "x"), ("y" * 5000, "")))
        beats = [pb.WorkerBeat(worker_id=name, incarnation=incarnation, epoch=self._epoch(), seq=n) for n in range(500)]
        self._drain(pb_grpc.LinkStub(channel).Beat(iter(beats), timeout=0.5))

    def _bulk(self, channel: grpc.Channel) -> None:
        name, incarnation = self._random.choice((self._victim, ("other-w", "x")))
        first = pb.Blob(worker_id=name, incarnation=incarnation, epoch=self._epoch())
        rest = [pb.Blob(key=f"bundle:{n}", data=b"x" * self._random.choice((0, 1 << 20))) for n in range(5)]
        self._drain(pb_grpc.LinkStub(channel).Bulk(iter([first, *rest]), timeout=0.5))

    def _starting(self, channel: grpc.Channel) -> None:
        count = self._random.choice((5, 500))
        sent = [pb.StartingWorker(worker_id=f"s{n}", model=MODEL, bytes_per_s=float("nan")) for n in range(count)]
        self._drain(pb_grpc.LinkStub(channel).Starting(iter(sent), timeout=0.5))

    def _garbage(self, channel: grpc.Channel) -> None:
        method = self._random.choice(("Turn", "Bulk", "Beat", "Control", "Starting"))
        raw: Any = channel.stream_stream(f"/cluster.link.v1.Link/{method}")
        data = [b"\x12\x00" * self._random.choice(COUNTS), self._random.randbytes(200), b"\x0a" * 9]
        self._drain(raw(iter(self._random.sample(data, 2)), timeout=0.5))

    def _drain(self, answers: Any) -> None:
        for _ in answers:
            self.sent += 1

    # ---- messages

    def _epoch(self) -> int:
        return self._random.choice((1, 2, BIG, (1 << 64) - 1))

    def _hello(self) -> pb.Hello:
        number = next(self._numbers)
        hello = pb.Hello(protocol_min=1, protocol_max=1, worker_id=f"other-{number}", incarnation=f"x{number}")
        hello.model, hello.epoch, hello.max_model_len, hello.vocab_size = MODEL, self._epoch(), 2048, 300
        hello.bundle_digest = self._bundle
        hello.max_num_seqs, hello.block_size = 8, self._random.choice((16, 32, 64))
        hello.capabilities.extend(self._random.choice(([], [KV_EVENTS], ["adapters:v1", KV_EVENTS])))
        change = self._random.randrange(8)
        if change == 0:
            hello.worker_id = self._victim[0]
        elif change in (1, 2):
            hello.incarnation = self._victim[1]
        elif change == 3:
            hello.default_sampling_json = json.dumps({"a": "x" * (5 << 20)})
        elif change == 4:
            hello.default_sampling_json = "[" * self._random.choice((90, 100_000))
        elif change == 5:
            hello.engine_class = "x" * 100_000
        return hello

    def _turns(self, count: int) -> Iterator[pb.WorkerTurn]:
        kinds: list[Callable[[], pb.WorkerTurn]] = [
            *(self._idle, self._usage, self._served, self._elsewhere, self._stray_step, self._blocks, self._adapters),
            lambda: self._filled(pb.WorkerTurn),
        ]
        for number in range(count):
            turn = self._random.choice(kinds)()
            turn.seq = number + 2
            yield turn

    def _count(self) -> int:
        return self._random.choice(COUNTS)

    def _idle(self) -> pb.WorkerTurn:
        """Return idle reports with guessed ids of records."""
        before = self._random.choice((f"{self._gateway}.", f"idle-{self._victim[1]}-", "idle:", "idle-x1-"))
        after = self._random.choice((".0", "", "-0.0"))
        ids = (f"{before}{number}{after}" for number in range(self._count()))
        return pb.WorkerTurn(usage=[pb.Usage(key=n, idle_id=name) for n, name in enumerate(ids)])

    def _usage(self) -> pb.WorkerTurn:
        """Return usage reports with seals that are known or made up."""
        seal = self._random.choice((self._random.choice(self._seals), self._random.randbytes(400)))
        return pb.WorkerTurn(usage=[pb.Usage(key=n, sealed_record=seal, gpu="x") for n in range(self._count())])

    def _handle(self) -> str:
        return self._random.choice((self._random.randbytes(16).hex(), "default", "y" * 100 if self._rarely() else "z"))

    def _rarely(self) -> bool:
        return self._random.random() < 0.05

    def _rank(self) -> int:
        return self._random.choice((0, 0, 1, 1 << 31))

    def _served(self) -> pb.WorkerTurn:
        flows = [
            pb.ServedFlow(rank=self._rank(), tenant_handle=self._handle(), total=n, weight=1e9)
            for n in range(self._count() // 4)
        ]
        return pb.WorkerTurn(served=pb.Served(flows=flows))

    def _elsewhere(self) -> pb.WorkerTurn:
        turn = pb.WorkerTurn()
        for _ in range(self._random.choice((1, 3))):
            each = turn.elsewhere.add(gateway=self._handle())
            for n in range(self._count() // 10):
                each.flows.add(rank=self._rank(), tenant_handle=self._handle(), requests=n, service=n, weight=0.1)
        return turn

    def _stray_step(self) -> pb.WorkerTurn:
        count = self._count()
        step = pb.StepOutputs(slots=range(1, count + 1), token_ids=range(count))
        for slot in range(min(count, 2000) if self._rarely() else 1):
            step.firsts.add(slot=slot, cached_tokens=1 << 31)
            step.logprobs.add(slot=slot, width=slot % 3, token_ids=[1], logprobs=[0.5])
        return pb.WorkerTurn(step=step, load=pb.Load(kv_usage=float("nan"), busy="x" * 1000))

    def _blocks(self) -> pb.WorkerTurn:
        blocks = self._random.randbytes(8 * self._random.choice((1, 512, 8192, 9000)))
        return pb.WorkerTurn(kv_blocks=pb.KvBlocks(is_reset=self._rarely(), stored=blocks))

    def _adapters(self) -> pb.WorkerTurn:
        ready = pb.AdapterStatus.STATE_READY
        statuses = [pb.AdapterStatus(name=f"a{n}", digest="0" * 64, state=ready) for n in range(self._count() // 5)]
        return pb.WorkerTurn(adapters=pb.AdapterReport(adapters=statuses))

    def _filled(self, kind: type[Message], depth: int = 3) -> Any:
        """Return a message of a type with any values in a part of its fields."""
        message: Any = kind()
        for field in kind.DESCRIPTOR.fields:
            if self._random.random() < 0.6 or field.name in ("hello", "engine_ended"):
                continue
            count = self._random.choice((1, 2, 40)) if field.is_repeated else 1
            if field.message_type is None:
                values = [self._scalar(field) for _ in range(count)]
                if field.is_repeated:
                    getattr(message, field.name).extend(values)
                else:
                    setattr(message, field.name, values[0])
            elif depth:
                inner = getattr(pb, field.message_type.name)
                for _ in range(count):
                    value = self._filled(inner, depth - 1)
                    target = getattr(message, field.name)
                    (target.add() if field.is_repeated else target).CopyFrom(value)
        return message

    def _scalar(self, field: Any) -> Any:
        kinds = FieldDescriptor
        if field.cpp_type == kinds.CPPTYPE_STRING:
            text = self._random.choice(("", "x", *self._victim, MODEL, "sim", "x" * 300, "\0é"))
            return text.encode() if field.type == kinds.TYPE_BYTES else text
        if field.cpp_type in (kinds.CPPTYPE_DOUBLE, kinds.CPPTYPE_FLOAT):
            return self._random.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
        if field.cpp_type in (kinds.CPPTYPE_BOOL, kinds.CPPTYPE_ENUM):
            return self._random.choice((0, 1))
        most = (1 << (64 if "64" in str(field.type) or field.cpp_type in (2, 4) else 32)) - 1
        signed = field.cpp_type in (kinds.CPPTYPE_INT32, kinds.CPPTYPE_INT64)
        return self._random.choice((0, 1, 2, 3, most >> 1 if signed else most))


def main(address: str, folder: str, seconds: str, seed: str, *victim: str) -> None:
    """Attack a gateway, and print the number of messages that were sent."""
    files = Path(folder)
    tls = TlsFiles(files / f"{MODEL}.crt", files / f"{MODEL}.key", files / "ca.crt")
    worker = HostileWorker(address, tls, int(seed), (victim[0], victim[1]), victim[2])
    worker.run(time.monotonic() + float(seconds))
    print(worker.sent)


if __name__ == "__main__":
    main(*sys.argv[1:])
