"""Airflow DAG: settle what is in doubt at every billing site, each quarter of an hour."""

from usage_billing.flow import sweep_dag

sweep_doubts = sweep_dag()
