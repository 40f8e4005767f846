"""The model or adapter that a caller's model name denotes."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.api.adapters import full_name
from cluster.api.types import ModelState
from cluster.gateway.models.adapters import MODEL_STATES
from cluster.gateway.models.known_model import KnownModel


@dataclass(frozen=True, slots=True)
class Target:
    """The model, or the adapter of a model, that a caller's model name denotes."""

    model: KnownModel
    adapter: str = ""

    @property
    def name(self) -> str:
        """Full name of the model or adapter."""
        return full_name(self.model.name, self.adapter)

    @property
    def state(self) -> ModelState:
        """State as callers see it. An adapter is READY while a worker takes its calls."""
        if not self.adapter or self.model.state in (ModelState.DRAINING, ModelState.FAILED, ModelState.GONE):
            return self.model.state
        state = MODEL_STATES[self.model.adapters.view(self.adapter).state]
        return self.model.state if state is ModelState.LOADING and not self.model.served else state

    @property
    def state_reason(self) -> str:
        """Reason for the state of the model or adapter; "" for no reason."""
        if not self.adapter:
            return self.model.entry.state_reason
        if not self.model.served and self.model.entry.state_reason:
            return self.model.entry.state_reason
        return self.model.adapters.shown_reason(self.adapter)
