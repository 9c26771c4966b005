"""The buckets that are on their way: each one's journey, their order, and storage for them.

Storage for gathered rows is bounded: a bucket may `Claim` it while fewer than ``lookahead`` earlier
ones are under way. What ends and what is waited for goes in the order of the buckets on every rank,
so no two ranks wait for each other.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Sequence

from torch import Tensor

from hvdnoise.comm import Handle
from hvdnoise.ordering import FinishOrder
from hvdnoise.plans import Claim, Journey


class Trip:
    """One bucket's journey, and how far it has come."""

    def __init__(self, traffic: Traffic, journey: Journey) -> None:
        self.has_mean = self.over = self.started = False
        self.held = False  # not to go beyond the mean yet
        self._traffic, self._journey = traffic, journey
        self._waits: Handle | Claim | None = None

    def go(self, *, wait: bool) -> bool:
        """One stage further, if it can be reached (with ``wait``: once it can be); whether it was.
        """
        result = None
        if self.held and self.has_mean:
            return False
        if isinstance(self._waits, Claim):
            if not self._traffic.may_claim(self):
                return False
        elif self._waits is not None:
            if not wait and not self._waits.done():
                return False
            result = self._traffic.wait_for(self._waits)
        try:
            self._waits = self._journey.send(result)
            self.started = True
            self.has_mean = self.has_mean or self._waits is None
        except StopIteration:
            self.over = True
        return True

    def as_far_as_possible(self) -> None:
        """What can be done without waiting."""
        while not self.over and self.go(wait=False):
            pass


class Traffic:
    """All trips of the step under way and, with lag 2, of the one before."""

    def __init__(self, lookahead: int, order: FinishOrder | None = None) -> None:
        self.seconds = 0.0  # spent waiting, ever
        self._order = order
        self._lookahead = lookahead
        self._trips: deque[Trip] = deque()  # in the order of their buckets, older steps first

    def plan(self, journeys: Sequence[Journey], *, hold: bool) -> list[Trip]:
        """The trips of a step, none of which has started; those of a step that broke off go.

        Args:
            hold: no trip goes beyond its mean before `release`.
        """
        self._trips = deque(trip for trip in self._trips if trip.started)
        trips = [Trip(self, journey) for journey in journeys]
        for trip in trips:
            trip.held = hold
        self._trips.extend(trips)
        return trips

    def leave(self, trip: Trip) -> None:
        """A bucket is ready; others may have come further meanwhile."""
        trip.as_far_as_possible()
        self.look()

    def look(self) -> None:
        """Take every trip that has left as far as possible."""
        for trip in self._trips:
            if trip.started:
                trip.as_far_as_possible()

    def until_mean(self, trip: Trip) -> None:
        """Wait until the bucket's mean is in its place."""
        while not trip.has_mean:
            if not trip.go(wait=True):
                self._end_first()  # and so give it storage

    def release(self, trips: Sequence[Trip]) -> None:
        """All means are there: let mixtures go their way."""
        for trip in trips:
            trip.held = False
        self.look()

    def settle(self, trips: Sequence[Trip]) -> None:
        """Wait until these trips, and earlier ones, are over."""
        while not all(trip.over for trip in trips):
            self._end_first()

    def quiet(self) -> bool:
        """Whether nothing is on its way, having looked."""
        self.look()
        return all(trip.over for trip in self._trips)

    def may_claim(self, trip: Trip) -> bool:
        """Whether fewer than ``lookahead`` earlier trips are under way."""
        under_way = [other for other in self._trips if not other.over]
        return trip in under_way[:self._lookahead]

    def wait_for(self, handle: Handle) -> Tensor:
        """The result of a collective."""
        started = time.perf_counter()
        result = handle.wait(self._order.poll if self._order is not None else None)
        self.seconds += time.perf_counter() - started
        return result

    def _end_first(self) -> None:
        first = self._trips[0]
        first.held = False
        while not first.over:
            first.go(wait=True)
        self._trips.popleft()
