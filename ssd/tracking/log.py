"""What takes more than one MLflow call to log: a dataset with its digest, a checkpoint as a LoggedModel."""

import hashlib
import json
import urllib.parse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
from mlflow.data.pandas_dataset import PandasDataset
from mlflow.tracking.artifact_utils import get_artifact_uri

from ssd.samples import Samples
from ssd.tracking.runs import CHECKPOINT


class _SamplesDataset(PandasDataset):
    """A dataset of `num_rows` samples, of which MLflow sees the first: they tell it the columns."""

    num_rows = 0

    @property
    def profile(self) -> dict[str, int]:
        return {"num_rows": self.num_rows, "num_elements": self.num_rows * self.df.shape[1]}


def log_dataset(name: str, rows: pa.Table | Samples, context: str, source: str) -> PandasDataset:
    """Log `rows` as an input of the run, with a digest over all of its content."""
    source = _dataset_source(source)
    is_table = isinstance(rows, pa.Table)
    seen = rows if is_table else next(rows.tables())
    content = digest(rows) if is_table else rows.digest()
    with warnings.catch_warnings():
        for hint in ("The specified dataset source can be interpreted", "Hint: Inferred schema contains integer"):
            warnings.filterwarnings("ignore", hint)
        dataset = mlflow.data.from_pandas(seen.to_pandas(), source=source, name=name, digest=content)
        if not is_table:
            dataset = _SamplesDataset(dataset.df, dataset.source, name=name, digest=content)
            dataset.num_rows = len(rows)
        mlflow.log_input(dataset, context=context)
    return dataset


def _dataset_source(uri: str) -> str:
    """`uri` as MLflow takes it for the source of a dataset: neither runs:/ nor mlflow-artifacts:/."""
    if not uri.startswith("runs:/"):
        return uri
    run_id, artifact = uri.removeprefix("runs:/").split("/", 1)
    resolved = get_artifact_uri(run_id, artifact)
    is_served = resolved.startswith("mlflow-artifacts:")
    return _served_at(mlflow.get_tracking_uri(), run_id, artifact) if is_served else resolved


def _served_at(server: str, run_id: str, artifact: str) -> str:
    """Address at which the tracking server `server` gives a file of a run, or lists a folder; without credentials.

    >>> _served_at("https://me:secret@host:5000", "a1", "val.parquet")
    'https://host:5000/get-artifact?run_uuid=a1&path=val.parquet'
    >>> _served_at("http://host/mlflow/", "a1", "samples")
    'http://host/mlflow/api/2.0/mlflow/artifacts/list?run_id=a1&path=samples'
    """
    parts = urllib.parse.urlsplit(server)
    root = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    path = urllib.parse.quote(artifact)
    if Path(artifact).suffix:
        return f"{root}/get-artifact?run_uuid={run_id}&path={path}"
    return f"{root}/api/2.0/mlflow/artifacts/list?run_id={run_id}&path={path}"


def digest(rows: pa.Table) -> str:
    """SHA-256 of every value of `rows`, in order; 32 hex digits (MLflow's own stops after 10,000 rows)."""
    content = hashlib.sha256(str(rows.schema.names).encode())
    for batch in rows.to_batches(max_chunksize=1000):  # never a Python object for every row at once
        for row in batch.to_pylist():
            content.update(json.dumps(list(row.values()), ensure_ascii=False, default=str).encode())
    return content.hexdigest()[:32]


def log_checkpoint(name: str, run_id: str, params: Mapping[str, Any], folder: Path, artifact: str, number: int) -> str:
    """Log the model in `folder` as `artifact` of the run and as a LoggedModel of training step `number`: its id.

    `name` is that of the step that trained it, `params` its parameters.
    """
    mlflow.log_artifacts(str(folder), artifact)
    uri = f"runs:/{run_id}/{artifact}"
    logged = mlflow.create_external_model(
        name=f"{name}-step-{number:06d}",
        source_run_id=run_id,
        params={key: str(value) for key, value in params.items()} | {"step": str(number)},
        tags={"uri": uri},
        model_type="checkpoint",
    )
    mlflow.log_outputs([mlflow.entities.LoggedModelOutput(logged.model_id, number)])
    mlflow.set_tags({f"ssd.logged_model.{artifact}": logged.model_id, f"{CHECKPOINT}{artifact}": number})
    return logged.model_id
