"""The pages on Airflow's API server, behind its login: who may read a task's log may read its validation result.

What a sub-application may take from Airflow for that is no promised interface, so it is taken here and nowhere else.
"""

from html import escape

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import requires_access_dag
from fastapi import Depends, FastAPI
from fastapi.responses import HTMLResponse

from usage_billing.installation import staging
from usage_billing.links import TaskTry

# A page shows what customers wrote into rows. It is text there; and if ever it were not, a browser would run nothing of
# it, load nothing for it, and give it no part in Airflow's session.
_HEADERS = {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

app = FastAPI(title="Usage billing", openapi_url=None)


@app.get(
    "/validation/{dag_id}/{run_id}/{task_id}/{map_index}/{try_number}",
    dependencies=[Depends(requires_access_dag("GET", DagAccessEntity.TASK_LOGS))],
)
def validation(dag_id: str, run_id: str, task_id: str, map_index: int, try_number: int) -> HTMLResponse:
    """Return the page that a validate task wrote, or say why there is none."""
    page = staging().kept(TaskTry(dag_id, run_id, task_id, map_index, try_number).document)
    if page is None:
        missing = (
            f"<!DOCTYPE html><title>No validation result</title><p>There is no validation result of {escape(task_id)}, "
            f"try {try_number}, of {escape(run_id)} in the staging area: it was cleaned, or this server does not reach "
            "the staging_path of the workers (section [usage_billing])."
        )
        return HTMLResponse(missing, status_code=404, headers=_HEADERS)
    return HTMLResponse(page, headers=_HEADERS)
