"""One pure function: configuration, model and hardware in, a plan out. No torch."""

from sailfish.plan.make import make_plan
from sailfish.plan.overlay import DeviceOverlay
from sailfish.plan.suggest import Suggestion, suggest
from sailfish.plan.types import Plan

__all__ = ["DeviceOverlay", "Plan", "Suggestion", "make_plan", "suggest"]
