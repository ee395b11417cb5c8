"""What one API process counts of itself, as the flat figures that the engine collects from all."""

from __future__ import annotations

from collections import Counter


class Counters:
    """Cumulative counts since this process started."""

    def __init__(self) -> None:
        self._replies: Counter[tuple[str, int]] = Counter()
        self._gone = 0

    def reply(self, route: str, status: int) -> None:
        """Count one finished reply."""
        self._replies[route, status] += 1

    def gone(self) -> None:
        """Count one client that left before its reply was whole."""
        self._gone += 1

    def flat(self) -> dict[str, float]:
        """Return every count by a name that `split` takes apart again."""
        counts = {f"replies {route} {status}": float(n) for (route, status), n in self._replies.items()}
        counts["disconnects"] = float(self._gone)
        return counts


def split(name: str) -> tuple[str, ...]:
    """Take a flat name apart into the count's name and its labels."""
    return tuple(name.split(" "))
