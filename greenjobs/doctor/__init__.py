"""`greenjobs doctor`: whether all that jobs need is there and works, proved where it can be, and what to do if not."""

from greenjobs.doctor.case import Application
from greenjobs.doctor.examination import AREAS, at_start, examine
from greenjobs.doctor.finding import Finding, Limits

__all__ = ["AREAS", "Application", "Finding", "Limits", "at_start", "examine"]
