"""How hard a history is: which troubles it knows, and how often each strikes."""

from dataclasses import dataclass, field, fields

from usage_billing.testing.chance import Chance

_SHARES = {"power_cut": 0.2, "move": 1.0}
"""The share of histories that know a trouble, where it is not half of them."""


@dataclass
class Faults:
    """The share of effects that each trouble strikes; a history draws which troubles it knows at all.

    Every trouble at once would hide most of what each does alone: a process that is killed at every turn never reaches
    the second request.
    """

    crash: float = 0.0
    suspend: float = 0.0
    ledger_away: float = 0.0
    ledger_reply_lost: float = 0.0
    write: float = 0.0
    read: float = 0.0
    late: float = 0.0
    storm: float = 0.0
    twins: float = 0.0
    clock: float = 0.0
    power_cut: float = 0.0
    rival: float = 0.0
    move: float = 0.0
    quiet: bool = field(default=False, init=False)
    """Whether nothing goes wrong any more."""

    @classmethod
    def drawn(cls, chance: Chance) -> "Faults":
        """Draw the troubles of one history."""
        ranges = {
            "crash": (0.003, 0.012, 0.03),
            "suspend": (0.003, 0.01),
            "ledger_away": (0.003, 0.01),
            "ledger_reply_lost": (0.005, 0.02),
            "write": (0.1, 0.25, 0.5),
            "read": (0.01, 0.04),
            "late": (0.05, 0.2),
            "storm": (0.01, 0.05),
            "twins": (0.3,),
            "clock": (1.0,),
            "power_cut": (0.1, 0.3),
            "rival": (0.5,),
            "move": (1.0,),
        }
        known = {
            name: chance.pick(f"faults/{name}/rate", rates)
            for name, rates in ranges.items()
            if chance.odds(f"faults/{name}", _SHARES.get(name, 0.5))
        }
        return cls(**known)

    def stop(self) -> None:
        """From now on nothing goes wrong any more."""
        for trouble in fields(self):
            setattr(self, trouble.name, 0.0)
        self.quiet = True
