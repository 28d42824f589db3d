"""The search for the cheapest configuration that reaches a target, over ladders of options for each group.

The order is that of the greedy algorithm for the multiple-choice knapsack problem (Sinha and Zoltners, "The
Multiple-Choice Knapsack Problem", Operations Research 27, 1979): each group's options are reduced to the lower convex
hull of damage over cost, and its steps are taken, over all groups, by rising damage for each unit of cost saved.

    1. Bisection along that order: the longest prefix of steps that reaches the target.
    2. Moves to a cheaper option, many at once: a set that fails is halved, and a single one that fails is left. Rounds
       go on while one is accepted, as what was wrong beside one neighbour may be right beside another.
    3. Where no move is left: exchanges, one group cheaper and another dearer by less, those that are reckoned to do the
       least damage first; behind one that is accepted, moves again. A few that fail end it: the optimum is likely, not
       certain.

Deterministic; `try_out` is asked for an assignment at most once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Assignment = tuple[str, ...]
EXCHANGES = 16  # that are tried from one assignment


@dataclass(frozen=True)
class Option:
    """A candidate at one group: what it is reckoned to cost there, and the damage that it does."""

    candidate: str
    cost: float
    damage: float


@dataclass(frozen=True)
class Step:
    """Going to the next option of a group, with the damage for each unit of cost that is saved."""

    group: int
    candidate: str
    price: float


@dataclass(frozen=True)
class _Change:
    """Another option of a group: the cost that it saves (below 0 it adds), and the damage that it adds."""

    step: Step
    saved: float
    added: float


@dataclass(frozen=True)
class Outcome:
    """What an assignment was found to be; of equal costs the one with fewer activation bits is the cheaper."""

    reached: bool
    cost: float
    activation_bits: int = 0


TryOut = Callable[[Assignment], Outcome]
Ladder = tuple[Option, ...]


class BudgetSpent(Exception):
    """Raised by `try_out`: no more trials."""


def ladder(options: Sequence[Option]) -> Ladder:
    """The options from the dearest to the cheapest without those that another beats: cost falls, damage rises."""
    found: list[Option] = []
    for option in sorted(options, key=lambda item: (item.damage, item.cost)):
        if not found or option.cost < found[-1].cost:
            found.append(option)
    return tuple(found)


def hull(options: Ladder) -> Ladder:
    """The options on the lower convex hull of damage over cost: prices rise along it."""
    found: list[Option] = []
    for option in options:
        while len(found) > 1 and _price(found[-2], found[-1]) >= _price(found[-1], option):
            found.pop()
        found.append(option)
    return tuple(found)


def _price(one: Option, cheaper: Option) -> float:
    return (cheaper.damage - one.damage) / (one.cost - cheaper.cost)


def steps(ladders: Sequence[Ladder]) -> list[Step]:
    """Every group's steps along its hull, by rising price; those of one group in their order."""
    found = [
        Step(group, cheaper.candidate, _price(one, cheaper))
        for group, options in enumerate(ladders)
        for one, cheaper in pairwise(hull(options))
    ]
    return sorted(found, key=lambda step: step.price)  # stable, and prices rise within a group


class Search:
    """One search.

    Arguments:
        ladders: the options of each group.
        try_out: what an assignment really is.
        noise: by which fraction costs may differ for no reason.
    """

    def __init__(self, ladders: Sequence[Ladder], try_out: TryOut, noise: float = 0.0) -> None:
        self.ladders = tuple(ladders)
        self.steps = steps(ladders)
        self.noise = noise
        self._try_out = try_out
        self._known: dict[Assignment, Outcome] = {}
        self.is_spent = False  # whether `try_out` ended it

    def run(self) -> None:
        """Bisect, then improve, until nothing is left to try or `try_out` raises BudgetSpent."""
        try:
            start = self._bisect()
            if start is not None:
                self._improve(start)
        except BudgetSpent:
            self.is_spent = True

    def prefix(self, length: int) -> Assignment:
        """The assignment after so many steps; every group begins at its dearest option."""
        found = [options[0].candidate for options in self.ladders]
        for step in self.steps[:length]:
            found[step.group] = step.candidate
        return tuple(found)

    def _outcome(self, assignment: Assignment) -> Outcome:
        if assignment not in self._known:
            self._known[assignment] = self._try_out(assignment)
        return self._known[assignment]

    def _bisect(self) -> Assignment | None:
        """The assignment of the longest prefix that reaches the target, as far as bisection finds it."""
        enough, missed = 0, len(self.steps)
        if self._outcome(self.prefix(missed)).reached:
            return self.prefix(missed)
        if not self._outcome(self.prefix(enough)).reached:
            return None
        while missed - enough > 1:
            middle = (enough + missed) // 2
            if self._outcome(self.prefix(middle)).reached:
                enough = middle
            else:
                missed = middle
        return self.prefix(enough)

    def _improve(self, current: Assignment) -> None:
        while True:
            better = self._accepted(current, self._moves(current))
            if better == current:
                better = self._exchanged(current)
            if better == current:
                return
            current = better

    def _moves(self, current: Assignment) -> list[Step]:
        """One move to a cheaper option for each group, by rising price; those known to fail from here are left out."""
        found = []
        for group, options in enumerate(self.ladders):
            place = [option.candidate for option in options].index(current[group])
            for option in options[place + 1 :]:
                known = self._known.get(_moved(current, [Step(group, option.candidate, 0.0)]))
                if known is None or known.reached:
                    found.append(Step(group, option.candidate, _price(options[place], option)))
                    break
        return sorted(found, key=lambda step: step.price)

    def _accepted(self, current: Assignment, moves: Sequence[Step]) -> Assignment:
        """`current` with as many of the moves as keep to the target, found by halving."""
        if not moves:
            return current
        wanted = _moved(current, moves)
        outcome = self._outcome(wanted)
        if outcome.reached and self._is_no_dearer(outcome, self._outcome(current)):
            return wanted
        if len(moves) == 1:
            return current
        middle = len(moves) // 2
        return self._accepted(self._accepted(current, moves[:middle]), moves[middle:])

    def _exchanged(self, current: Assignment) -> Assignment:
        """`current` with the first exchange that reaches the target at less cost, noise aside; itself without one."""
        most = self._outcome(current).cost * (1 - self.noise)
        for wanted in self._exchanges(current)[:EXCHANGES]:
            outcome = self._outcome(wanted)
            if outcome.reached and outcome.cost < most:
                return wanted
        return current

    def _exchanges(self, current: Assignment) -> list[Assignment]:
        """A group cheaper, another dearer by less: by the damage that this is reckoned to add."""
        changes = [change for group in range(len(current)) for change in self._changes(current, group)]
        pairs = [
            (down, up)
            for down in changes
            for up in changes
            if down.saved > 0 > up.saved and down.step.group != up.step.group and down.saved + up.saved > 0
        ]
        pairs.sort(key=lambda pair: (pair[0].added + pair[1].added, -(pair[0].saved + pair[1].saved)))
        return [_moved(current, [down.step, up.step]) for down, up in pairs]

    def _changes(self, current: Assignment, group: int) -> list[_Change]:
        options = self.ladders[group]
        now = next(option for option in options if option.candidate == current[group])
        return [
            _Change(Step(group, option.candidate, 0.0), now.cost - option.cost, option.damage - now.damage)
            for option in options
            if option != now
        ]

    def _is_no_dearer(self, found: Outcome, before: Outcome) -> bool:
        """Whether an outcome costs less, or as much but for noise without being wider."""
        is_as_much = found.cost <= before.cost * (1 + self.noise)
        return found.cost < before.cost or (is_as_much and found.activation_bits <= before.activation_bits)


def _moved(current: Assignment, moves: Sequence[Step]) -> Assignment:
    found = list(current)
    for move in moves:
        found[move.group] = move.candidate
    return tuple(found)
