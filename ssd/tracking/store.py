"""The tracking store: made whole or not at all, and read again where its answer breaks off."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
import sqlalchemy.exc
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service.utils import _get_sqlalchemy_store

from ssd import records

HALF_MADE = ("_alembic_tmp_", "duplicate column name")  # what SQLite says of such a store
READ_PAUSES_S = (1, 5, 15, 30, 60)  # before an answer that broke off is asked for again
BROKEN_OFF = re.compile("Connection broken|IncompleteRead|Connection aborted|Connection reset|ended prematurely")
TRACKING_ERRORS = (MlflowException, sqlalchemy.exc.SQLAlchemyError, requests.exceptions.RequestException, OSError)


def prepare(uri: str) -> None:
    """Make the SQLite file of a tracking store, whole or not at all and by one process of several that need it.

    MLflow would make it table by table, and try an unwritable one for two minutes.
    """
    if not uri.startswith("sqlite:"):
        return
    path = Path(sqlalchemy.engine.make_url(uri).database)
    if not path.exists() or not path.stat().st_size:
        with records.alone(path, waits=True):
            if not path.exists() or not path.stat().st_size:
                _make_store(path)
    open(path, "ab").close()


def _make_store(path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    for left in path.parent.glob(f"{partial.name}*"):  # by a kill: the file and its journal
        left.unlink()
    _get_sqlalchemy_store(f"sqlite:///{partial}", None).engine.dispose()
    partial.replace(path)


def patiently(read: Callable[[], Any]) -> Any:
    """What `read` gives, asked for again where the answer breaks off: MLflow repeats only what got no answer."""
    for pause_s in READ_PAUSES_S:
        try:
            return read()
        except TRACKING_ERRORS as error:
            if not broke_off(error):
                raise
        time.sleep(pause_s)
    return read()


def broke_off(error: BaseException | None) -> bool:
    """Whether an answer that ended too early is the error or the cause of it."""
    if error is None:
        return False
    return bool(BROKEN_OFF.search(str(error))) or broke_off(error.__cause__ or error.__context__)


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that follow."""
    return str(error).strip().split("\n")[0]
