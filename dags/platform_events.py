"""Airflow DAG: bill platform_events to Maxio as events, every night at midnight UTC."""

from usage_billing.flow import billing_dag

bill_platform_events = billing_dag("platform_events")
