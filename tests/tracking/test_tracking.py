"""What makes two pieces of work the same."""

import http.server
import json
import multiprocessing
import threading
import time

import mlflow
import pytest

from ssd import tracking
from ssd.tracking import store
from ssd.tracking.reuse import work_key


def test_a_local_file_counts_by_what_it_holds(tmp_path):
    path = tmp_path / "grades.parquet"
    path.write_bytes(b"one")
    before = work_key("power", {"grades": str(path)})
    assert work_key("power", {"grades": str(path)}) == before
    path.write_bytes(b"other")
    assert work_key("power", {"grades": str(path)}) != before


def test_files_in_a_list_and_behind_a_linked_folder_count_by_what_they_hold(tmp_path):
    path = tmp_path / "elsewhere" / "set.jsonl"
    path.parent.mkdir()
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "set").symlink_to(path.parent)
    keys = set()
    for content in ("one", "other ones"):
        path.write_text(content)
        keys.add(work_key("prepare", {"train_sources": f"hendrycks_math, {path}"}))
        keys.add(work_key("prepare", {"source_root": str(tmp_path / "mirror")}))
    assert len(keys) == 4


def test_a_folder_that_is_called_like_an_arm_is_no_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = work_key("sample", {"arm": "ssd", "engine": "transformers"})
    (tmp_path / "ssd").mkdir()
    (tmp_path / "ssd" / "cache").write_text("made by Python")
    assert work_key("sample", {"arm": "ssd", "engine": "transformers"}) == before


def test_where_samples_are_drawn_and_what_that_costs_is_no_part_of_the_work():
    common = {"n": 1, "gpu_hour_price": 0.0}
    keys = {work_key("sample", common | {"engine": place}) for place in ("openai:http://a/v1", "openai:http://b/v1")}
    assert len({*keys, work_key("sample", {"n": 1, "engine": "openai:http://a/v1", "gpu_hour_price": 3.0})}) == 1
    assert work_key("sample", common | {"engine": "transformers"}) not in keys
    assert work_key("search", {"storage": "local"}) == work_key("search", {"storage": "mlflow"})


forked = multiprocessing.get_context("fork")  # imports nothing again


def start_run(uri: str) -> None:
    store.prepare(uri)
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run(experiment_id="0"):
        mlflow.log_param("a", 1)


def test_a_store_whose_making_was_killed_at_any_moment_is_made_by_the_next_process(tmp_path):
    uri, partial = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / ".mlflow.db.partial"
    for after_bytes in (0, 40_000, 200_000, 500_000):
        maker = forked.Process(target=store.prepare, args=(uri,))
        maker.start()
        while not partial.exists() or partial.stat().st_size < after_bytes:
            assert maker.is_alive()
            time.sleep(0.001)
        maker.kill()
        maker.join()
        assert not (tmp_path / "mlflow.db").exists()
    last = forked.Process(target=start_run, args=(uri,))
    last.start()
    last.join()
    assert last.exitcode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db"}


def test_two_processes_that_begin_at_once_on_a_store_that_is_not_there_both_find_one(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    pair = [forked.Process(target=start_run, args=(uri,)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    assert len(mlflow.MlflowClient(uri).search_runs(["0"])) == 2


class BreaksOff(http.server.BaseHTTPRequestHandler):
    """An artifact store whose first answers end in the midst of a file."""

    def do_GET(self):
        is_file = "?path=" not in self.path  # else a listing
        body = json.dumps({"numbers": list(range(1000))} if is_file else {"files": []}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.server.num_asked += is_file
        self.wfile.write(body[: 100 if is_file and self.server.num_asked <= self.server.num_broken else None])

    def log_message(self, *_):
        """Nothing: the requests are not of interest."""


@pytest.mark.parametrize(("num_broken", "is_read"), [(3, True), (99, False)])
def test_an_artifact_whose_download_breaks_off_is_asked_for_again(tmp_path, monkeypatch, num_broken, is_read):
    monkeypatch.setattr(store, "READ_PAUSES_S", (0.01,) * 4)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), BreaksOff) as server:
        server.num_asked, server.num_broken = 0, num_broken
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
        try:
            root = f"http://127.0.0.1:{server.server_port}/api/2.0/mlflow-artifacts/artifacts"
            experiment = mlflow.create_experiment("far", root)
            with mlflow.start_run(experiment_id=experiment) as run:
                uri = f"runs:/{run.info.run_id}/numbers.json"
            if is_read:
                assert tracking.read_json(uri) == {"numbers": list(range(1000))}
            else:
                with pytest.raises(ValueError, match="numbers.json.*cannot be read from the tracking store.*again"):
                    tracking.read_json(uri)
        finally:
            mlflow.set_tracking_uri(None)
            server.shutdown()
    assert server.num_asked == (4 if is_read else 5)
