"""Optimizers and schedules that torch does not have."""

from src.optim.schedule import OneCycle

__all__ = ["OneCycle"]
