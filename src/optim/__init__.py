"""Optimizers and schedules that torch does not have."""

from src.optim.decoupled import DecoupledSGD
from src.optim.muon import Muon
from src.optim.schedule import OneCycle

__all__ = ["DecoupledSGD", "Muon", "OneCycle"]
