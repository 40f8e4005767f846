"""Sending of waiting sequences, after each change that may let a worker take more sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.scheduling.executor import Executor
from cluster.gateway.scheduling.peer_backlog import BacklogReports
from cluster.policy.scheduling.instructions import ResumingSequence
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy


class SequencePump:
    """Asks the policy which waiting sequences to send now, and has the executor send them."""

    def __init__(
        self,
        policy: SchedulingPolicy,
        executor: Executor,
        backlogs: BacklogReports,
        directory: Callable[[], ModelDirectory],
        clock: Callable[[], float],
    ) -> None:
        """`policy`: chooses the sequences to send. `executor`: sends them. `backlogs`: is notified of each change of a
        model's queues. `directory`: returns the gateway's models."""
        self._policy = policy
        self._executor = executor
        self._backlogs = backlogs
        self._directory = directory
        self._clock = clock

    def send_waiting(self, name: str) -> None:
        """Send waiting sequences of a model as long as a worker has capacity."""
        if self._directory().find(name) is None:
            return
        self._executor.carry_out(self._policy.assign(name, self._clock()))
        self._backlogs.changed(name)

    def send_resumed(self, name: str, sequences: Sequence[ResumingSequence]) -> None:
        """Try to send these resumed sequences of a model, and no other waiting sequences. After the loss of a gateway
        or worker, many sequences are requeued one by one. If each of them caused an attempt to send the whole queue,
        the total time would be quadratic."""
        self._executor.carry_out(self._policy.assign_resumed(name, sequences, self._clock()))
        self._backlogs.changed(name)

    def step_begun(self, name: str, resumed: bool) -> None:
        """Send further sequences after a worker has begun a step, because prefill pacing (the bound on prompt tokens
        that wait for a worker) now allows more. `resumed`: whether the step computes resumed sequences. If so, new
        sequences are tried too, because they may have waited behind the resumed ones."""
        if resumed or self._policy.resuming.waiting(name)[0]:
            self.send_waiting(name)


class UnservedModels:
    """The models for which calls wait and that no worker serves. Demand for such a model is reported at once, not with
    the next periodic report."""

    def __init__(self, report: Callable[[], None]) -> None:
        """`report`: reports the demand. It is called when the first call waits for a model that no worker serves. For
        the same model it is called again only after `retain` has forgotten the model."""
        self._report = report
        self._names: set[str] = set()

    def note(self, model: KnownModel) -> None:
        """Report the demand for a model for which a call waits. Does nothing if a worker serves the model or if the
        demand was already reported."""
        if model.name not in self._names and not model.served:
            self._names.add(model.name)
            self._report()

    def retain(self, models: Iterable[KnownModel]) -> None:
        """Forget the models that are served now or that are not among `models`."""
        self._names &= {model.name for model in models if not model.served}
