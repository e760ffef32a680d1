"""MLflow: a run a report, in the experiment and at the server that its own settings name (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)."""

import time

from compress.results.report import Report
from compress.trackers import _facts


def log(report: Report) -> None:
    import mlflow
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(f"{side.role}/{name}", value, now, 0) for side in report.sides for name, value in _facts.figures(side).items()]
    for stage, step, taken in _facts.curves(report):
        metrics += [Metric(f"{stage}/{name}", value, now, step) for name, value in taken.items()]
    with mlflow.start_run(run_name=_facts.title(report), nested=True) as run:  # nested: within a run that a notebook has begun
        mlflow.log_params(_facts.params(report))
        mlflow.set_tags(_facts.tags(report))
        mlflow.MlflowClient().log_batch(run.info.run_id, metrics=metrics)
        mlflow.log_artifacts(str(report.folder))
