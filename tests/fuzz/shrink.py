"""Make a failing program small: edit the choices that it was drawn from, and keep what still fails in the same way.

Choices are kept as what they exceed their lowest by, so that 0 is the simplest; a replay that runs out of them takes
the simplest ever after. Runs of choices are deleted, zeroed, then halved and lowered one by one, until nothing helps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tests.fuzz.description import Description
from tests.fuzz.draft import Choose
from tests.fuzz.draw import draw_description

Choices = tuple[int, ...]
_RUNS = (64, 32, 16, 12, 8, 6, 4, 3, 2, 1)


@dataclass
class Record:
    """Chooses as `choose` does, and keeps what was chosen."""

    choose: Choose
    choices: list[int] = field(default_factory=list)

    def __call__(self, low: int, high: int) -> int:
        """See draw.py."""
        chosen = self.choose(low, high)
        self.choices.append(chosen - low)
        return chosen


@dataclass
class Replay:
    """Chooses what was recorded, as far as it fits; then the simplest."""

    choices: Choices
    used: int = 0

    def __call__(self, low: int, high: int) -> int:
        """See draw.py."""
        chosen = self.choices[self.used] if self.used < len(self.choices) else 0
        self.used += 1
        return min(low + chosen, high)


def replay(choices: Choices) -> tuple[Description, Choices]:
    """The description that these choices make, and the choices that it really took."""
    record = Record(Replay(choices))
    description = draw_description(record)
    return description, tuple(record.choices)


def shrink(
    choices: Choices, is_same_failure: Callable[[Description], bool], most_trials: int = 300
) -> tuple[Description, Choices]:
    """The smallest description found that still fails, and its choices; `choices` must make one that does.

    `is_same_failure` is asked at most `most_trials` times, and never twice about one description.
    """
    search = _Search(choices, is_same_failure, most_trials)
    while search.improves():
        pass
    return search.best, search.choices


class _Search:
    """The smallest failure so far."""

    def __init__(self, choices: Choices, is_same_failure: Callable[[Description], bool], most_trials: int) -> None:
        self.best, self.choices = replay(choices)
        self._is_same_failure = is_same_failure
        self._most_trials = most_trials
        self._seen = {self.best}

    def improves(self) -> bool:
        """One round of all edits; whether any helped."""
        before = self.choices
        for run in _RUNS:
            self._each(run, partial(_without, run))
        for run in _RUNS[3:]:
            self._each(run, partial(_zeroed, run))
        self._each(1, _halved)
        self._each(1, _lowered)
        return self.choices != before

    def _each(self, run: int, edit: Callable[[Choices, int], Choices]) -> None:
        """Try an edit at each place from the back to the front; again at the same place after it helped."""
        start = len(self.choices) - run
        while start >= 0:
            helped = self._try(edit(self.choices, start))
            start = min(start - (0 if helped else 1), len(self.choices) - run)

    def _try(self, candidate: Choices) -> bool:
        description, taken = replay(candidate)
        if _size(taken) >= _size(self.choices) or description in self._seen:
            return False
        if len(self._seen) > self._most_trials:
            return False
        self._seen.add(description)
        if not self._is_same_failure(description):
            return False
        self.best, self.choices = description, taken
        return True


def _without(run: int, choices: Choices, start: int) -> Choices:
    return choices[:start] + choices[start + run :]


def _zeroed(run: int, choices: Choices, start: int) -> Choices:
    return choices[:start] + (0,) * run + choices[start + run :]


def _halved(choices: Choices, start: int) -> Choices:
    return choices[:start] + (choices[start] // 2,) + choices[start + 1 :]


def _lowered(choices: Choices, start: int) -> Choices:
    return choices[:start] + (max(0, choices[start] - 1),) + choices[start + 1 :]


def _size(choices: Choices) -> tuple[int, Choices]:
    return len(choices), choices
