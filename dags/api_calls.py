"""Airflow DAG: bill api_calls to Maxio as metered usage, every night at New York's midnight."""

from usage_billing.flow import billing_dag

bill_api_calls = billing_dag("api_calls")
