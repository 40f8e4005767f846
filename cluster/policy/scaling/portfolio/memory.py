"""What the policy remembers between two rounds: a frozen value that nobody else needs to understand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.policy.scaling.portfolio import backtest as shadow
from cluster.policy.scaling.portfolio import forecast as levels
from cluster.policy.scaling.portfolio import marginal_gain as gains
from cluster.policy.scaling.portfolio.backtest import Backtest
from cluster.policy.scaling.portfolio.forecast import DemandLevels, Floats
from cluster.policy.scaling.portfolio.marginal_gain import MarginalGains


@dataclass(frozen=True, slots=True)
class Past:
    """One stretch of the last cold start and patience: when it ended, and means, signals and plans then.

    A plan is the most of its signal during the patience: what keeps a rule's replicas there.
    """

    at_s: float
    means: Floats
    signals: Floats
    plans: Floats


@dataclass(frozen=True, slots=True)
class Stretch:
    """What came since something was last learnt. `load_s` in replica-seconds."""

    passed_s: float = 0.0
    load_s: float = 0.0
    calls: float = 0.0
    within: float = 0.0
    outside: float = 0.0
    prompt_s: float = 0.0
    """Of one replica, for all prompts."""
    tokens: float = 0.0
    """Of output."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How well the shadow tells what becomes of real calls. Sums fade.

    `correction` stretches what every rule wants: above 1 where calls are late that the shadow served in time.
    """

    waiting: float = 0.0
    told: float = 0.0
    """Late calls by the shadow of the real replicas."""
    lately: float = 0.0
    """Of the calls that came lately, the share that the shadow told late."""
    late: float = 0.0
    calls: float = 0.0
    time_s: float = 0.0
    """Over which `calls` were judged."""
    correction: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Of one model. `wishes`: (when, how many replicas were wished for), for patience with scaling down."""

    last_call_s: float
    stretch: Stretch = field(default_factory=Stretch)
    levels: DemandLevels = field(default_factory=levels.nothing)
    shadow: Backtest = field(default_factory=shadow.nothing)
    gains: MarginalGains = field(default_factory=gains.nothing)
    past: tuple[Past, ...] = ()
    rules: tuple[int, ...] = ()
    """That are followed, the cheapest first."""
    fidelity: Fidelity = field(default_factory=Fidelity)
    wishes: tuple[tuple[float, int], ...] = ()
    ranks: Mapping[int, float] = field(default_factory=dict)
    """Load by class rank, a mean over five cold starts, as `calls_per_s`."""
    calls_per_s: float = 0.0
    output: float = 0.0
    """Load by decoding, in replicas, as `calls_per_s`."""
    tokens: float = 0.0
    """Of output by call, as `calls_per_s`."""
    down: tuple[float, int] | None = None
    """The last scale-down: when, and how many there were before."""
    cut_s: float | None = None
    """When replicas that were wished for last went to other models."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of all models. `at_s`: of the last observation; None in an empty memory."""

    at_s: float | None = None
    models: Mapping[str, ModelMemory] = field(default_factory=dict)
