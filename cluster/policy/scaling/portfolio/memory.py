"""State that the policy carries from one decision to the next: a frozen value, opaque to callers."""

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
    """One stretch within the last cold start and patience: its end, and the means, signals and plans at that time.

    A plan is the maximum of its signal during the patience; it keeps a rule's replicas from leaving.
    """

    at_s: float
    means: Floats
    signals: Floats
    plans: Floats


@dataclass(frozen=True, slots=True)
class Stretch:
    """Demand since the last learning step. `load_s` is in replica-seconds."""

    passed_s: float = 0.0
    load_s: float = 0.0
    calls: float = 0.0
    within: float = 0.0
    outside: float = 0.0
    prompt_s: float = 0.0
    """Replica-seconds of all prompts."""
    tokens: float = 0.0
    """Output tokens."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Agreement of the backtest with the results of real calls. Sums fade.

    `correction` scales the replicas of every rule: above 1 if calls are late that the backtest served in time.
    """

    waiting: float = 0.0
    predicted_late: float = 0.0
    """Late calls according to a backtest of the real replicas."""
    recent_late_share: float = 0.0
    """Share of the recent calls that are late according to that backtest."""
    late: float = 0.0
    calls: float = 0.0
    time_s: float = 0.0
    """Time over which `calls` were judged."""
    correction: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Memory of one model. `recent_targets`: (time, raw target), for patience with scaling down."""

    last_call_s: float
    stretch: Stretch = field(default_factory=Stretch)
    levels: DemandLevels = field(default_factory=forecasts.empty)
    backtest: Backtest = field(default_factory=backtests.empty)
    gains: MarginalGains = field(default_factory=marginal_gains.empty)
    past: tuple[Past, ...] = ()
    rules: tuple[int, ...] = ()
    """Rules that are followed, the cheapest first."""
    fidelity: Fidelity = field(default_factory=Fidelity)
    recent_targets: tuple[tuple[float, int], ...] = ()
    ranks: Mapping[int, float] = field(default_factory=dict)
    """Load by class rank, a mean over five cold starts; `calls_per_s` likewise."""
    calls_per_s: float = 0.0
    output: float = 0.0
    """Load of decoding, in replicas; a mean over about the duration of a stream."""
    tokens: float = 0.0
    """Output tokens per call; a mean over up to five cold starts."""
    down: tuple[float, int] | None = None
    """The last scale-down: its time, and the number of replicas before it."""
    cut_s: float | None = None
    """Time when wanted replicas last went to other models."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of all models. `at_s`: time of the last observation; None in an empty memory."""

    at_s: float | None = None
    models: Mapping[str, ModelMemory] = field(default_factory=dict)
