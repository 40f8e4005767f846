"""Ray Serve's own autoscaling policy, run from Ray Serve's own code in virtual time.

All code that decides is Ray Serve's: the policy on ongoing requests, the scaling factors, the delays (through Ray's own
time argument) and the start from zero. This module replaces Ray Serve's controller. It provides the bounds, and the
mean number of running and queued requests over the look-back period, sampled at every decision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from cluster.policy.scaling.portfolio import ModelSeen, Observation

TARGETS = (2, 3, 4, 6, 8, 12, 16)
UPSCALE_S = (0.0, 10.0, 30.0)
DOWNSCALE_S = (60.0, 300.0, 600.0)


@dataclass(frozen=True, slots=True)
class RaySettings:
    """Settings of Ray Serve's autoscaling_config, with the defaults of Ray Serve."""

    target_ongoing_requests: float = 2.0
    look_back_period_s: float = 30.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0


def grid() -> Iterator[RaySettings]:
    """Yield all settings of Ray Serve's policy that are compared."""
    for target, up_s, down_s in product(TARGETS, UPSCALE_S, DOWNSCALE_S):
        yield RaySettings(float(target), 30.0, up_s, down_s)


@dataclass(slots=True)
class _Model:
    state: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[float, float]] = field(default_factory=list)
    target: int | None = None


class RayPolicy:
    """A scaler that runs Ray Serve's policy, for the simulator in loadtests/sim/scaling.py. Needs the package ray."""

    def __init__(self, settings: RaySettings) -> None:
        from ray.serve.config import AutoscalingConfig

        self.settings = settings
        self._models: dict[str, _Model] = {}
        self._config_of: dict[tuple[int, int], Any] = {}
        self._make = AutoscalingConfig

    def __call__(self, observation: Observation, now_s: float) -> Mapping[str, int]:
        """Return the wanted number of replicas of each model."""
        return {name: self._wanted_replicas(name, seen, now_s) for name, seen in observation.models.items()}

    def _config(self, least: int, most: int) -> Any:
        if (least, most) not in self._config_of:
            s = self.settings
            self._config_of[least, most] = self._make(
                min_replicas=least,
                max_replicas=most,
                target_ongoing_requests=s.target_ongoing_requests,
                look_back_period_s=s.look_back_period_s,
                upscale_delay_s=s.upscale_delay_s,
                downscale_delay_s=s.downscale_delay_s,
            )
        return self._config_of[least, most]

    def _wanted_replicas(self, name: str, seen: ModelSeen, now_s: float) -> int:
        from ray.serve import autoscaling_policy as ray_code
        from ray.serve.config import AutoscalingContext

        model = self._models.setdefault(name, _Model())
        ready = [r for r in seen.replicas if r.state == "ready"]
        if model.target is None:
            model.target = sum(r.state != "draining" for r in seen.replicas)
        ongoing = sum(r.running for r in ready) + sum(d.queued_requests for d in seen.demand.values())
        model.samples.append((now_s, float(ongoing)))
        opens = now_s - self.settings.look_back_period_s
        model.samples = [(at, value) for at, value in model.samples if at >= opens]
        config = self._config(seen.settings.min_replicas, seen.settings.max_replicas)
        context = AutoscalingContext(
            deployment_id=None,
            deployment_name=name,
            app_name=name,
            current_num_replicas=len(ready),
            target_num_replicas=model.target,
            running_replicas=[],
            total_num_requests=sum(value for _, value in model.samples) / len(model.samples),
            total_queued_requests=None,
            aggregated_metrics=None,
            raw_metrics=None,
            capacity_adjusted_min_replicas=seen.settings.min_replicas,
            capacity_adjusted_max_replicas=seen.settings.max_replicas,
            policy_state=model.state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=config,
        )
        wanted = ray_code._get_cold_start_scale_up_replicas(context)
        if wanted is None:
            desired, _ = ray_code._core_replica_queue_length_policy(context)
            factored = ray_code._apply_scaling_factors(desired, context.current_num_replicas, config)
            if context.current_num_replicas == 0 and factored > 0:
                wanted = factored
            else:
                wanted, model.state = ray_code._apply_delay_logic(
                    max(0, factored), model.target, config, model.state, _now=now_s
                )
        model.target = min(max(math.ceil(wanted), seen.settings.min_replicas), seen.settings.max_replicas)
        return model.target
