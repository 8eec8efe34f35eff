"""Shrinking: the fewest disturbances with which a seed still fails the same way.

Delta debugging after Zeller and Hildebrandt ("Simplifying and Isolating Failure-Inducing Input"), over the names of the
disturbances that struck. Each telling is a whole history, and the others strike where they struck before.
"""

from collections.abc import Callable, Sequence

from usage_billing.testing.history import Outcome

Tell = Callable[[frozenset[str]], Outcome]


def shrunk(outcome: Outcome, tell: Tell, most_tellings: int = 150) -> Outcome:
    """Return a shorter story that violates the same check; `tell` tells the seed again without some disturbances."""
    check = outcome.violations[0][0]
    best, left = outcome, most_tellings
    kept = list(outcome.struck)
    muted: set[str] = set()
    parts = 2
    while kept and left > 0:
        smaller = None
        for part in _parts(kept, parts):
            left -= 1
            found = tell(frozenset(muted | set(part)))
            if any(name == check for name, _ in found.violations):
                smaller = (part, found)
                break
            if left <= 0:
                break
        if smaller is not None:
            part, best = smaller
            muted |= set(part)
            # What struck only because of something that is gone now is gone with it.
            kept = [name for name in best.struck if name not in muted]
            parts = max(parts - 1, 2)
        elif parts >= len(kept):
            break
        else:
            parts = min(2 * parts, len(kept))
    return best


def _parts(names: Sequence[str], count: int) -> list[Sequence[str]]:
    size = max(-(-len(names) // count), 1)
    return [names[start : start + size] for start in range(0, len(names), size)]
