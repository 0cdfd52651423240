"""`graft plan`: what full, LoRA and QLoRA would take, from a config alone."""

from __future__ import annotations

from graftlm.config import PlanConfig
from graftlm.planning.plan import PlanReport, plan_for


def plan(config: PlanConfig) -> PlanReport:
    """Plan every model of the config. Raises GraftError for a model or a card that is not known."""
    return plan_for(config)
