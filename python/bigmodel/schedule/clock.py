"""Slots are equal lengths of elapsed time; the zone only labels them."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

_ROUNDING = 1e-9  # of a slot: an instant this close to a boundary is on it


class Clock:
    """Instants to slots and back. Local times that daylight saving skips are refused; of one that occurs twice the
    earlier is taken, but for releases, which are never moved forward, the later."""

    def __init__(self, start: str, tz: str, slots: int, slot_hours: float):
        self.zone = ZoneInfo(tz)
        self.slots = slots
        self.slot_hours = slot_hours
        self.start = self.instant(start)

    def instant(self, text: str, *, later: bool = False) -> datetime:
        """An ISO 8601 time in UTC."""
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
        if moment.tzinfo is None:
            local = moment.replace(tzinfo=self.zone, fold=int(later))
            moment = local.astimezone(timezone.utc)
            if moment.astimezone(self.zone).replace(tzinfo=None) != local.replace(tzinfo=None):
                raise ValueError(f"{text} does not exist in {self.zone.key}: clocks skip it")
        return moment.astimezone(timezone.utc)

    def slot(self, moment: datetime) -> float:
        return (moment - self.start) / timedelta(hours=1) / self.slot_hours

    def release(self, when: int | str) -> int:
        """The first slot that begins at or after `when`."""
        if not isinstance(when, str):
            return int(when)
        return max(0, math.ceil(self.slot(self.instant(when, later=True)) - _ROUNDING))

    def deadline(self, when: int | str) -> int:
        """The slot before which what ends by `when` must end: rounded down, so no deadline is stretched."""
        if not isinstance(when, str):
            return int(when)
        return math.floor(self.slot(self.instant(when)) + _ROUNDING)

    def rounds(self, when: int | str) -> bool:
        """Whether `deadline` takes something from it."""
        return isinstance(when, str) and self.slot(self.instant(when)) - self.deadline(when) > _ROUNDING

    def begins(self, slot: int) -> datetime:
        """When a slot begins, in the zone."""
        return (self.start + timedelta(hours=slot * self.slot_hours)).astimezone(self.zone)

    def label(self, slot: int) -> str:
        return self.begins(slot).strftime("%a %Y-%m-%d %H:%M %Z")
