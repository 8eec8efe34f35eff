"""Accounts that lead to another subscription from some moment on: whose usage is owed where, told without the package.

What a run may know of a move is what it was shown, and of a person what they chose until then; so both are noted when
the ledger has taken them. Which subscription then owes what follows from the documents alone, account by account.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from usage_billing.destinations.base import Destination
from usage_billing.records import Choice, Reading, Target
from usage_billing.testing.clockwork import Process


def put_before(destination: Destination, led: Mapping[str, str]) -> Destination:
    """Let a mapping say to whose name at the site each account leads, before the site is asked."""

    def mapped(ask: Callable[[Sequence[str]], list[Target]]) -> Callable[[Sequence[str]], list[Target]]:
        def asked(accounts: Sequence[str]) -> list[Target]:
            found = ask([led.get(account, account) for account in accounts])
            return [replace(target, account=account) for account, target in zip(accounts, found, strict=True)]

        return asked

    vars(destination).update(resolve=mapped(destination.resolve), locate=mapped(destination.locate))
    return destination


@dataclass(frozen=True)
class Place:
    """Where an account led from a usage period on, None for ever; and what was chosen about its usage of before."""

    owner: str
    since: datetime | None = None
    choice: str = ""


@dataclass(frozen=True)
class Belonging:
    """Where one account's usage of one period may be billed: by now, and formerly."""

    owner: str
    former: frozenset[str] = frozenset()
    undecided: bool = False


Known = Mapping[tuple[str, int, str], tuple[Place, ...]]
"""The places of accounts, in their order, by source, number of its definition, and account."""


class Whereabouts:
    """The places of all accounts as somebody knew them at one moment; a later moment has one of its own.

    Under another definition of its source an account is another matter; `edge` is when the second one begins, if any.
    """

    def __init__(self, edge: datetime | None = None, places: Known | None = None) -> None:
        self._edge = edge
        self._places = places or {}

    def of(self, source: str, account: str, start: datetime) -> Belonging:
        """Return where an account's usage of the period that begins at `start` belongs.

        It stays where the account led then, unless a later move takes it along. One that is undecided would take it
        along too, if it is chosen; until then both sides wait, and nothing of it was billed there.
        """
        places = self._places.get((source, self._definition(start), account)) or (Place(account),)
        led = max(number for number, place in enumerate(places) if place.since is None or place.since <= start)
        taken = [place for place in places[led + 1 :] if place.choice != Choice.FROM_NOW]
        at = [places[led], *taken][-1]
        been = {places[led].owner, *(place.owner for place in taken[:-1] if place.choice == Choice.MOVE)}
        former = frozenset(been - {at.owner})
        return Belonging(at.owner, former, undecided=bool(taken and not at.choice and former))

    def waits(self, source: str, owner: str, start: datetime) -> bool:
        """Say whether a person has to choose whether usage of a period belongs to a subscription, or elsewhere."""
        return any(one.undecided and owner in {one.owner, *one.former} for one in self._all(source, start))

    def former(self, source: str, owner: str, start: datetime) -> frozenset[str]:
        """Return whose bills have to be credited before usage of a period is added to that of `owner`."""
        ours = (one for one in self._all(source, start) if one.owner == owner and not one.undecided)
        return frozenset().union(*(one.former for one in ours))

    def _all(self, source: str, start: datetime) -> list[Belonging]:
        which = source, self._definition(start)
        return [self.of(source, account, start) for *known, account in self._places if tuple(known) == which]

    def _definition(self, start: datetime) -> int:
        return int(self._edge is not None and start >= self._edge)

    def last(self, source: str, account: str, start: datetime) -> str | None:
        """Return where an account was last seen to lead, for usage of any period by the same definition as one."""
        places = self._places.get((source, self._definition(start), account))
        return places[-1].owner if places else None

    def been(self, source: str, account: str, start: datetime) -> frozenset[str]:
        """Return wherever an account ever led, by the definition of a usage period; at first to its own."""
        places = self._places.get((source, self._definition(start), account), ())
        return frozenset(place.owner for place in places) or frozenset([account])

    def undecided(self, source: str) -> list[str]:
        """Return the accounts about a move of which nothing was chosen."""
        known = self._places.items()
        found = [who for (name, _, who), places in known if name == source and any(map(_is_open, places))]
        return list(dict.fromkeys(found))

    def seen(self, source: str, definition: int, account: str, owner: str, since: datetime | None) -> "Whereabouts":
        """Return what is known once an account was seen to lead to `owner`, for usage from `since` on."""
        key = source, definition, account
        places = self._places.get(key, ())
        if places and places[-1].owner == owner:
            return self
        place = Place(owner, since if places else None)
        return Whereabouts(self._edge, {**self._places, key: (*places, place)})

    def chosen(self, source: str, account: str, choice: Choice) -> "Whereabouts":
        """Return what is known once a person has chosen about all that is open of an account."""

        def decided(name: str, who: str, places: tuple[Place, ...]) -> tuple[Place, ...]:
            ours = (name, who) == (source, account)
            return tuple(replace(each, choice=choice) if ours and _is_open(each) else each for each in places)

        known = {key: decided(key[0], key[2], places) for key, places in self._places.items()}
        return Whereabouts(self._edge, known)


def _is_open(place: Place) -> bool:
    return place.since is not None and not place.choice


class Sightings:
    """What the runs of a history have seen of where accounts lead, and by what each reading was counted."""

    def __init__(
        self, owner: Callable[[str], str], definition: Callable[[str, int], int], edge: datetime | None
    ) -> None:
        """Take what tells a subscription's name by what the ledger calls it, and which definition an edition is."""
        self.now = Whereabouts(edge)
        self._owner = owner
        self._definition = definition
        self._compared: dict[str, datetime] = {}
        self._known_to: dict[Process, Whereabouts] = {}
        self._counted_by: dict[tuple[str, Reading], Whereabouts] = {}

    def note(self, process: Process, what: str, args: Sequence[Any]) -> None:
        """Note one call of the ledger that came about."""
        if what == "begin_comparison":
            name, _, periods = args[:3]
            ends = [period.end for period in periods]
            self._compared[name] = max([*ends, self._compared.get(name, ends[0])])
        elif what == "place":
            name, edition, targets = args[:3]
            which, until = self._definition(name, edition), self._compared.get(name)
            for account, subscription in zip(targets["account"], targets["subscription"], strict=True):
                self.now = self.now.seen(name, which, account, self._owner(subscription), until)
        elif what == "placements":
            self._known_to[process] = self.now

    def choose(self, source: str, account: str, choice: Choice) -> None:
        """Note what a person chose about an account."""
        self.now = self.now.chosen(source, account, choice)

    def known_to(self, process: Process) -> Whereabouts:
        """Return what a process has read of the places of accounts."""
        return self._known_to[process]

    def counts(self, source: str, reading: Reading, by: Whereabouts) -> None:
        """Note by what a reading is counted."""
        self._counted_by[source, reading] = by

    def of(self, source: str, reading: Reading) -> Whereabouts:
        """Return by what a reading is counted; one that reads nothing is counted by nothing."""
        return self._counted_by.get((source, reading), self.now)
