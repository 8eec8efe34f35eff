"""Airflow DAG: bill voip_minutes to ChargeOver, every night at Chicago's midnight."""

from usage_billing.flow import billing_dag

bill_voip_minutes = billing_dag("voip_minutes")
