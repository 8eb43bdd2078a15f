"""Compare the first third of a soak with its last third, after the warm-up, by a bound for each figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from soaking.measure import KINDS, Sample

__all__ = ["BOUNDS", "Row", "compare", "latencies", "thirds"]

MB = 1e6
SEGMENT = 64 << 20


@dataclass(frozen=True)
class Bound:
    """The growth allowed for a figure: `more`, plus a `share` of its first value; or anything up to a `ceiling`.

    `why`: the growth by design.
    """

    more: float = 0.0
    share: float = 0.0
    why: str = ""
    ceiling: float = 0.0

    def most(self, before: float) -> float:
        """Return the maximum at the end."""
        return self.ceiling or before * (1 + self.share) + self.more


BOUNDS: dict[tuple[str, str], Bound] = {
    **{("rss", kind): Bound(8 * MB, 0.05) for kind in KINDS},
    ("rss", "broker"): Bound(16 * MB, 0.05, "it remembers the last 50,000 finished ids"),
    ("rss", "node"): Bound(72 * MB, 0.05, "the page cache of the history grows to 64 MB"),
    **{("descriptors", kind): Bound(3) for kind in KINDS},
    **{("threads", kind): Bound(2) for kind in KINDS},
    **{("processes", kind): Bound(1) for kind in KINDS},
    ("disk", "journal"): Bound(ceiling=6 * SEGMENT, why="the oldest of 3 or more segments of 64 MiB is deleted"),
    ("entries", "sockets"): Bound(1),
}


@dataclass(frozen=True)
class Row:
    """One figure: its medians in the first and last third, and its maximum (None: it grows by design)."""

    what: str
    which: str
    first: float
    last: float
    most: float | None
    why: str = ""

    @property
    def grown(self) -> bool:
        """True if it is over its bound."""
        return self.most is not None and self.last > self.most


def thirds(began: float, ended: float, warm: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (from, to) of the first and of the last third of the time after `warm` seconds."""
    begin = began + warm
    third = (ended - begin) / 3
    return (begin, begin + third), (ended - third, ended)


def compare(samples: Sequence[Sample], first: tuple[float, float], last: tuple[float, float]) -> list[Row]:
    """Return a row per bounded figure. Raises `ValueError` if a third has no sample."""
    early = [sample.figures for sample in samples if first[0] <= sample.at <= first[1]]
    late = [sample.figures for sample in samples if last[0] <= sample.at <= last[1]]
    if not early or not late:
        raise ValueError(f"{len(samples)} samples are too few: give it more --seconds")
    rows = []
    for (what, which), bound in BOUNDS.items():
        before = median(figures[what, which] for figures in early)
        after = median(figures[what, which] for figures in late)
        rows.append(Row(what, which, before, after, bound.most(before), bound.why))
    return rows


def latencies(
    probes: Sequence[tuple[float, float]], first: tuple[float, float], last: tuple[float, float]
) -> list[Row]:
    """Return rows for p50 and p95 of the probes (at, seconds). Other load of the machine shows in them."""
    early = [took for at, took in probes if first[0] <= at <= first[1]]
    late = [took for at, took in probes if last[0] <= at <= last[1]]
    if len(early) < 2 or len(late) < 2:
        raise ValueError(f"{len(probes)} probes are too few: give it more --seconds")
    rows = []
    for which, place, times, more in (("p50", 49, 2.0, 0.01), ("p95", 94, 3.0, 0.05)):
        before, after = quantiles(early, n=100)[place], quantiles(late, n=100)[place]
        rows.append(Row("latency", which, before, after, before * times + more))
    return rows
