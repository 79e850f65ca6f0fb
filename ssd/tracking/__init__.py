"""Steps as MLflow runs: begin and end one, find or launch the runs that it needs, log tables, datasets, checkpoints."""

from ssd.tracking.log import digest, log_dataset
from ssd.tracking.reuse import code_version
from ssd.tracking.runs import (
    CHECKPOINT,
    checkpoints,
    finished_runs,
    lineage,
    local_path,
    metric_of,
    overlap,
    parent,
    read_json,
    reads,
    run_of,
    step_run,
    tag_of,
)
from ssd.tracking.step import Step, execute

__all__ = [
    "CHECKPOINT", "Step", "checkpoints", "code_version", "digest", "execute", "finished_runs", "lineage", "local_path",
    "log_dataset", "metric_of", "overlap", "parent", "read_json", "reads", "run_of", "step_run", "tag_of",
]  # fmt: skip
