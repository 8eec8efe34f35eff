"""The button on a validate task, and where the page behind it lies: what the task and the API server agree on.

Both sides reckon it from the name of the task instance alone, so whoever may read that task's log in Airflow reaches
this page, and no other.
"""

from hashlib import sha256
from typing import Any, NamedTuple
from urllib.parse import quote

from airflow.sdk import BaseOperatorLink

PREFIX = "usage-billing"
"""Below which address our pages are, on Airflow's API server."""


class TaskTry(NamedTuple):
    """One try of one task instance, by its name in Airflow."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    try_number: int

    @property
    def address(self) -> str:
        """The page's address, relative to that of Airflow's UI, wherever a proxy puts it."""
        return "/".join((PREFIX, "validation", *(quote(str(part), safe="") for part in self)))

    @property
    def document(self) -> str:
        """Where its page lies in the staging area; no source's folder can have that name."""
        # A hash, because a name may be longer than a file's, and may have dots that lead elsewhere.
        return f"data-docs/{sha256('/'.join(map(str, self)).encode()).hexdigest()}.html"


class ValidationResultLink(BaseOperatorLink):
    """The validation result of a task's last try, as a page of Great Expectations' Data Docs."""

    name = "Validation result"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:  # noqa: ARG002
        """Return the address of the page that the task wrote, nothing if it wrote none."""
        return str(getattr(operator, "page", ""))
