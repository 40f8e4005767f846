"""State that the scaling policy carries from one decision to the next. It is a frozen value that callers do not
read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.policy.scaling.portfolio import backtest as backtests
from cluster.policy.scaling.portfolio import forecast as forecasts
from cluster.policy.scaling.portfolio import marginal_gain as marginal_gains
from cluster.policy.scaling.portfolio.backtest import Backtest
from cluster.policy.scaling.portfolio.forecast import DemandLevels, Floats
from cluster.policy.scaling.portfolio.marginal_gain import MarginalGains


@dataclass(frozen=True, slots=True)
class Past:
    """Forecasts that were made at the time `at_s`, at the end of an earlier learning step.

    `plans` has one value for each value of `signals`: the maximum of the signal over the last PATIENCE cold starts
    (replica_target.PATIENCE). The number of replicas follows the plan, so a falling signal does not remove replicas at
    once.
    """

    at_s: float
    means: Floats
    signals: Floats
    plans: Floats


@dataclass(frozen=True, slots=True)
class Stretch:
    """Demand since the last learning step. `load_s`: all work that came, in replica-seconds. `within`: number of judged
    calls that met the SLO. `outside`: number of judged calls that missed it."""

    passed_s: float = 0.0
    load_s: float = 0.0
    calls: float = 0.0
    within: float = 0.0
    outside: float = 0.0
    prompt_s: float = 0.0
    """Work of all prompts, in replica-seconds."""
    tokens: float = 0.0
    """Number of output tokens."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Record of how well the backtest agrees with the results of real calls. All sums fade with time.

    `correction`: factor by which the replicas of every rule are multiplied. It is above 1 after real calls were late
    although the backtest served them in time. `waiting`: queued work in a backtest of the real replicas, in
    replica-seconds.
    """

    waiting: float = 0.0
    predicted_late: float = 0.0
    """Late calls according to a backtest of the real replicas."""
    recent_late_share: float = 0.0
    """Share of the recent calls that are late according to a backtest of the real replicas."""
    late: float = 0.0
    calls: float = 0.0
    time_s: float = 0.0
    """Time over which `calls` were judged."""
    correction: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """The scaling policy's memory of one model. `recent_targets`: the newest targets for the number of replicas, as
    pairs of (time, target). A scale-down goes no lower than the highest of these targets, so the policy may keep more
    replicas than the newest target says."""

    last_call_s: float
    stretch: Stretch = field(default_factory=Stretch)
    levels: DemandLevels = field(default_factory=forecasts.empty)
    backtest: Backtest = field(default_factory=backtests.empty)
    gains: MarginalGains = field(default_factory=marginal_gains.empty)
    past: tuple[Past, ...] = ()
    rules: tuple[int, ...] = ()
    """Rules that the policy follows, the cheapest rule first."""
    fidelity: Fidelity = field(default_factory=Fidelity)
    recent_targets: tuple[tuple[float, int], ...] = ()
    ranks: Mapping[int, float] = field(default_factory=dict)
    """Load of each class, keyed by rank, as a mean over five cold starts. `calls_per_s` is a mean over the same
    time."""
    calls_per_s: float = 0.0
    output: float = 0.0
    """Load of decoding in replicas, as a mean over about the duration of a stream."""
    tokens: float = 0.0
    """Output tokens per call, as a mean over up to five cold starts."""
    down: tuple[float, int] | None = None
    """Time of the last scale-down, and the number of replicas before this scale-down."""
    cut_s: float | None = None
    """Last time when the GPU budget gave this model's replicas to other models; None: never."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of all models. `at_s` is the time of the last observation, or None in an empty memory."""

    at_s: float | None = None
    models: Mapping[str, ModelMemory] = field(default_factory=dict)
