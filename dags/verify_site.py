"""Airflow DAG: try a billing source out at a test site, when a person triggers it."""

from usage_billing.flow import verify_dag

verify_site = verify_dag()
