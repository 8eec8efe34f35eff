"""Airflow imports this file in each of its processes ("Configuring local settings"): the scheduler warms up here.

Its workers, and so the tasks, are forks of it: what it has imported costs them nothing, where Great Expectations alone
would take two seconds of each validation. Only other people's libraries: a change in this project's code
still counts from the next task on.
"""

import sys
from importlib import import_module

if sys.argv[1:2] == ["scheduler"]:
    for library in ("great_expectations", "pyarrow.parquet", "requests", "duckdb"):
        import_module(library)
