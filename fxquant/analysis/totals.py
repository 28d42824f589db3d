"""Totals: what the batches of an analysis gave, summed, so that memory and records do not grow with their number.

A run that was killed goes on from two records of its TrialLog: the sum over the batches that are finished, with the
digest of each (all that is kept of a batch), and what is known of the batch in work.
"""

from __future__ import annotations

from dataclasses import replace

from fxquant.analysis.noise import Noise, added
from fxquant.analysis.sweep import BatchResult
from fxquant.errors import FxquantError
from fxquant.trials import TrialLog

FINISHED, IN_WORK = "finished batches", "batch in work"


class Totals:
    """The sum over the batches that were begun and finished in order, 0, 1, ...; `log` is read and written."""

    def __init__(self, log: TrialLog) -> None:
        self._log = log
        record = log.get(FINISHED)
        self._digests: list[str] = [] if record is None else list(record["digests"])
        self.sum = BatchResult("", 0) if record is None else BatchResult.from_dict(record["sum"])
        self.count = 0

    def begun(self, digest: str, samples: int) -> BatchResult:
        """What is known of the next batch: of a finished one that nothing is to be measured again."""
        record = self._log.get(IN_WORK)
        if self.count < len(self._digests):
            self._require_same(self._digests[self.count], digest)
            return replace(self.sum, digest=digest)
        if record is None or record["number"] != self.count:
            return BatchResult(digest, samples)
        self._require_same(record["result"]["digest"], digest)
        return BatchResult.from_dict(record["result"])

    def keep(self, result: BatchResult) -> None:
        """Record what is known of the batch in work."""
        if self.count >= len(self._digests):
            self._log.put(IN_WORK, {"number": self.count, "result": result.to_dict()})

    def finish(self, result: BatchResult) -> None:
        """Add the batch in work, unless an earlier process did."""
        if self.count == len(self._digests):
            self._digests.append(result.digest)
            self.sum = _added(self.sum, result)
            self._log.put(FINISHED, {"digests": list(self._digests), "sum": self.sum.to_dict()})
        self.count += 1

    def require_all(self) -> None:
        """Refuse the end of batches that are none, or fewer than those of the run that is resumed."""
        if not self.count:
            raise FxquantError("analyze", expected="at least one batch", got="none", remedy="Is the iterator used up?")
        if self.count < len(self._digests):
            expected = f"the {len(self._digests)} batches that the run that is resumed has finished, or more"
            raise FxquantError("analyze", expected=expected, got=str(self.count), remedy="overwrite=True begins anew.")

    def _require_same(self, known: str, digest: str) -> None:
        if known != digest:
            raise FxquantError(
                f"analyze: batch {self.count}",
                expected="the batches of the run that is resumed, in the same order",
                got="another batch",
                remedy="Is the loader shuffling? overwrite=True begins anew.",
            )


def _added(total: BatchResult, result: BatchResult) -> BatchResult:
    runs = {name: total.runs.get(name, Noise()) + noise for name, noise in result.runs.items()}
    signals = added(total.signals, result.signals)
    return BatchResult("", total.samples + result.samples, signals, total.rows + result.rows, runs)
