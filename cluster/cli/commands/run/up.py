"""Commands `up`, which starts a local cluster, and `down`, which stops a local cluster.

`up --detach` starts the cluster in the background.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Annotated, Any

import psutil
import typer

from cluster.admin.v1 import admin_pb2
from cluster.api.pooling import PoolingTask
from cluster.cli import terminal
from cluster.cli.base import replace_file
from cluster.cli.commands.doctor import find_tool
from cluster.cli.commands.operate.traces import start_receiver, with_tracing
from cluster.cli.common import FAILED, USAGE, FileOption, fail, read_config
from cluster.cli.confirmation import YesOption, confirm
from cluster.cli.local.children import StartFailed, headrace_command
from cluster.cli.local.cluster import LocalCluster
from cluster.cli.local.first_answer import first_answer, served_tasks
from cluster.cli.local.model_states import SERVED
from cluster.cli.local.ports import PortTaken, choose_ports
from cluster.cli.local.run_folder import AlreadyUp, RunFolder
from cluster.cli.local.step_lines import StepLine, duration, say
from cluster.cli.target.contexts import LOCAL, ContextError, TypedOptions, contexts_file, read_contexts, select_target
from cluster.config.paths import secret_files
from cluster.config.schema import Config
from cluster.ledger.files import make_secret
from cluster.process.private_files import make_private_folder
from cluster.ray import reaper

STOP_TIMEOUT_S = 30.0


def up(
    file: FileOption,
    detach: Annotated[bool, typer.Option("--detach", help="Run in the background; return when ready.")] = False,
    traces: Annotated[bool, typer.Option("--traces", help="Print the spans of each call as a tree.")] = False,
    demo: Annotated[bool, typer.Option("--demo", hidden=True)] = False,
    background: Annotated[bool, typer.Option("--background", hidden=True)] = False,
) -> None:
    """Start a local cluster in the foreground. It has a local Ray, one or more gateway processes and a controller.
    Ctrl-C stops everything."""
    config = read_config(file)
    _check_installed(config)
    if traces and detach:
        fail("--traces prints to this terminal: leave out --detach, or use `headrace traces`", USAGE)
    if detach:
        raise typer.Exit(_detach(file, config))
    run = RunFolder(config.name)
    try:
        lock = run.lock()
    except AlreadyUp as error:
        fail(str(error))
    with lock:
        _end_leftovers(run)
        try:
            config = choose_ports(config)
        except PortTaken as error:
            fail(str(error), USAGE)
        make_secrets(config)
        receiver = start_receiver("127.0.0.1:0") if traces else None
        if receiver is not None:
            config = with_tracing(config, receiver.address)
        try:
            raise typer.Exit(asyncio.run(_run_cluster(config, run, demo=demo, background=background)))
        finally:
            if receiver is not None:
                receiver.stop()


def make_secrets(config: Config) -> None:
    """Create the missing secret files of a local cluster.

    With an external Ray, no file is created: all hosts must have the same secret files, and a new file would be on this
    host only.
    """
    if config.ray:
        return
    for setting, path in secret_files(config).items():
        if path.exists():
            continue
        try:
            make_secret(path)
        except OSError as error:
            fail(f"{setting}: {path} cannot be created: {error.strerror}")


def _check_installed(config: Config) -> None:
    """Exit with an error if Ray or vLLM is needed and not installed. The base install has neither Ray nor vLLM."""
    needed = [] if config.ray else ["ray"]
    if not config.ray and any(not model.source.startswith("sim://") for model in config.models):
        needed.append("vllm")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        fail(f"{' and '.join(missing)} not installed: install the extra `cpu` or `gpu` (in a checkout: `make setup`)")


def down(
    name: Annotated[str | None, typer.Argument(help="The cluster's name; optional if only one is up.")] = None,
    yes: YesOption = False,
) -> None:
    """Stop a local cluster. Also ends the processes that are left over from a crashed cluster."""
    run = _choose_run(name)
    confirm(f"Stop the local cluster {run.name}?", yes)
    began = time.monotonic()
    supervisor = run.supervisor()
    if supervisor is not None:
        say(f"stopping {run.name} (process {supervisor.pid})")
        with suppress(ProcessLookupError):
            os.kill(supervisor.pid, signal.SIGTERM)
        while supervisor.alive() and time.monotonic() - began < STOP_TIMEOUT_S:
            time.sleep(0.05)
        if supervisor.alive():
            with suppress(ProcessLookupError):
                os.kill(supervisor.pid, signal.SIGKILL)
    _end_leftovers(run)
    say(f"stopped in {duration(time.monotonic() - began)}, logs in {run.path}")


def _choose_run(name: str | None) -> RunFolder:
    if name is not None:
        run = RunFolder(name)
        if not run.state():
            known = ", ".join(other.name for other in RunFolder.known()) or "none"
            fail(f"no local cluster is named {name!r}; known: {known}")
        return run
    known_runs = RunFolder.known()
    if not known_runs:
        fail("no local cluster is up")
    if len(known_runs) > 1:
        fail(f"several local clusters are up: name one of {', '.join(run.name for run in known_runs)}", USAGE)
    return known_runs[0]


def _end_leftovers(run: RunFolder) -> None:
    """End the processes that are left over from a crashed cluster.

    The instance id and the folder of the cluster's Ray identify the processes.
    """
    state = run.state()
    instance = run.instance()
    if not instance:
        return
    folder = Path(state["ray_folder"]) if state.get("ray_folder") else None
    ended = reaper.end(instance, folder)
    if ended:
        say(f"ended {ended} processes left over from {run.name}")
    run.clear()


# ---- in the foreground


async def _run_cluster(config: Config, run: RunFolder, *, demo: bool, background: bool) -> int:
    """Start the cluster, supervise the cluster until a signal, and stop the cluster. Returns the exit code."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    cluster = LocalCluster(config, run, say)
    stopping = asyncio.create_task(stop.wait())
    code = 0
    try:
        started = await _run_unless(stopping, _start(cluster, demo=demo, background=background))
        if started:
            cluster.write_state("ready")
            await _run_unless(stopping, cluster.supervise())
    except StartFailed as error:
        terminal.say("")
        terminal.say(f"error: {error}", error=True)
        code = FAILED
    finally:
        stopping.cancel()
        await _stop(cluster)
    return code


async def _run_unless(stopping: asyncio.Task[bool], work: Coroutine[Any, Any, Any]) -> bool:
    """Run `work`, but cancel it if `stopping` is done first. Returns whether `work` was completed."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
        return True
    task.cancel()
    with suppress(asyncio.CancelledError, StartFailed):
        await task
    return False


async def _start(cluster: LocalCluster, *, demo: bool, background: bool) -> None:
    numbers = ("[2/4]", "[3/4]", "[4/4]") if demo else ("[1/2]", "[2/2]", "")
    step = StepLine(numbers[0], "model" if len(cluster.config.models) == 1 else "models")
    step.done(f"{await _prepare(cluster, step):<34} {duration(step.elapsed_s):>7}")
    step = StepLine(numbers[1], "cluster")
    await cluster.start(step)
    step.show("gateway and ray are up, models are loading")
    entries = await cluster.wait_for_models(step)
    states = "   ".join(_state_text(entry) for entry in entries)
    count = cluster.config.gateway.processes
    gateways = "gateway" if count == 1 else f"{count} gateways"
    step.done(f"{f'ray · controller · {gateways}   ' + states:<34} {duration(step.elapsed_s):>7}")
    if demo and cluster.config.auth is None:
        try:
            await first_answer(
                cluster.endpoints["grpc"], cluster.config.models[0].name, StepLine(numbers[2], "first answer")
            )
        except StartFailed as error:
            raise StartFailed(f"{error}; logs: {cluster.run.path}") from None
    ready = [entry for entry in entries if entry.state in SERVED]
    has_keys = cluster.config.auth is not None
    tasks = await served_tasks(cluster.endpoints["grpc"], ready[0].name) if ready and not has_keys else ()
    _say_ready(cluster, entries, tasks, background=background)


def _state_text(entry: admin_pb2.CatalogEntry) -> str:
    state = entry.state.lower() + (f" ({entry.state_reason})" if entry.state == "FAILED" else "")
    return f"{entry.name} {state}"


async def _prepare(cluster: LocalCluster, step: StepLine) -> str:
    """Fetch or build the files of every model, by the command `prepare` in a child process.

    Returns the models' names. Raises StartFailed.
    """
    replace_file(cluster.run.config_file, cluster.config_text())
    process = await asyncio.create_subprocess_exec(
        *headrace_command("prepare", "-f", cluster.run.config_file),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, reaper.INSTANCE_ENV: cluster.instance}, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.ensure_future(process.stderr.read())
    try:
        async for line in process.stdout:
            with suppress(ValueError, KeyError):
                progress = json.loads(line)
                part = progress["done"] / max(progress["total"], 1)
                step.show(f"{progress['model']} {progress['what']}", part)
        code = await process.wait()
    except asyncio.CancelledError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if code:
        lines = (await errors).decode(errors="replace").strip().splitlines()
        raise StartFailed("\n".join(lines[-12:]).removeprefix("error: "))
    return ", ".join(model.name for model in cluster.config.models) or "none"


def _say_ready(
    cluster: LocalCluster,
    entries: list[admin_pb2.CatalogEntry],
    tasks: Sequence[PoolingTask],
    *,
    background: bool,
) -> None:
    """Print the addresses, the models and commands to try. `tasks`: pooling tasks of the first ready model."""
    where = {name: address.replace("127.0.0.1", "localhost") for name, address in cluster.endpoints.items()}
    command = _command_to_type("headrace")
    say("")
    say(f"ready   gRPC {where['grpc']}   OpenAI http://{where['http']}/v1")
    if cluster.config.gateway.console.enabled:
        say(f"        console http://{where['http']}/")
    say(f"        admin {where['admin']}   metrics http://{where['metrics']}/metrics")
    for entry in entries:
        names = " = ".join([*entry.aliases, entry.name])
        say(f"        model {names}" + ("" if entry.state == "READY" else f"   {_state_text(entry)}"))
    if cluster.config.auth is None:
        say("        these addresses are on loopback, and no keys are needed")
    elif cluster.config.auth.api_keys is not None:
        say(f"keys    {command} keys create TENANT -f {cluster.run.config_file}")
    ready = [entry for entry in entries if entry.state in SERVED]
    if ready:
        name = ready[0].aliases[0] if ready[0].aliases else ready[0].name
        for number, line in enumerate(_commands_to_try(command + _local_option(), name, where, tasks)):
            say(f"{'' if number else 'try':<8}{line}")
    end = f"{command} down {cluster.config.name}" if background else "Ctrl-C"
    say(f"{end} stops everything. Logs: {cluster.run.path}")


def _local_option() -> str:
    """Return ` --context local` if the current context or an environment variable selects a cluster, else ""."""
    with suppress(ContextError):
        if not select_target(TypedOptions(), os.environ, read_contexts(contexts_file())).is_named:
            return ""
    return f" --context {LOCAL}"


def _commands_to_try(command: str, name: str, where: Mapping[str, str], tasks: Sequence[PoolingTask]) -> Iterator[str]:
    """Yield commands that use the model `name`. `command`: how to call `headrace`. `where`: the cluster's addresses."""
    if PoolingTask.EMBED in tasks:
        body = json.dumps({"model": name, "input": ["A cat sleeps.", "Rates rose."]})
        yield f'{command} embed {name} "A cat sleeps." "A kitten is napping." "Rates rose."'
        yield f"{command} status"
        if find_tool("curl"):
            yield f"curl http://{where['http']}/v1/embeddings -H 'content-type: application/json' -d '{body}'"
        return
    if PoolingTask.SCORE in tasks:
        yield f'{command} rerank {name} "What do cats do?" "Rates rose." "Cats sleep most of the day."'
        yield f"{command} status"
        return
    yield f'{command} chat {name} "Write a haiku about rivers"'
    yield f"{command} status"
    if (Path.cwd() / "examples" / "hello.py").exists():
        yield f"{_command_to_type('python')} examples/hello.py"
    if find_tool("buf"):
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100})
        yield (
            f"{_command_to_type('buf')} curl --protocol grpc --http2-prior-knowledge -d '{body}' "
            f"http://{where['grpc']}/cluster.v1.Inference/StreamChat"
        )


def _command_to_type(tool: str) -> str:
    """Return what a user must type to run the program `tool` in the folder of this Python.

    The result is the program's name if the shell finds this program on PATH, else the program's path.
    """
    here = Path(sys.executable).parent / tool
    on_path = shutil.which(tool)
    if on_path is not None and (not here.exists() or Path(on_path).absolute() == here):
        return tool
    with suppress(ValueError):
        return str(here.relative_to(Path.cwd()))
    return str(here)


async def _stop(cluster: LocalCluster) -> None:
    step = StepLine("", "stopping")
    leftovers = await cluster.stop(step)
    remains = (
        "no process left"
        if leftovers == 0
        else f"{leftovers} processes are left: end them by `{_command_to_type('headrace')} down`"
    )
    step.done(
        f"gateway · controller · ray … stopped in {duration(step.elapsed_s)}, {remains}, logs in {cluster.run.path}"
    )


# ---- in the background


def _detach(file: Path, config: Config) -> int:
    """Start `up` as a background process. Returns the exit code.

    The output of the background process is printed until the cluster is ready.
    """
    run = RunFolder(config.name)
    make_private_folder(run.path)
    supervisor = run.supervisor()
    if supervisor is not None:
        fail(
            f"a cluster named {run.name!r} is already up (process {supervisor.pid}): `headrace down {run.name}` ends it"
        )
    command = headrace_command("up", "-f", file.absolute(), "--background")
    with run.log_file("up").open("wb") as log, run.log_file("up").open("rb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return _follow(process, run, output)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            return 130


def _follow(process: subprocess.Popen[bytes], run: RunFolder, output: IO[bytes]) -> int:
    """Copy the output of the background process to the terminal until the cluster is ready or the process has ended.

    Returns 0 if the cluster is ready, else the exit code of the process.
    """
    while True:
        code = process.poll()
        supervisor = run.supervisor()
        ready = run.state().get("phase") == "ready" and supervisor is not None and supervisor.pid == process.pid
        terminal.write(output.read().decode(errors="replace"))
        if code is not None:
            return code or FAILED
        if ready:
            return 0
        with suppress(psutil.TimeoutExpired):
            psutil.Process(process.pid).wait(0.1)
