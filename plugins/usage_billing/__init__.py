"""Usage billing for Apache Airflow: every unit billed exactly once, or listed by name with the reason."""

__version__ = "0.1.0"
