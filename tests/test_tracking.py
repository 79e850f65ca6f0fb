"""What makes two pieces of work the same."""

import multiprocessing
import time

import mlflow

from ssd import tracking


def test_a_local_file_counts_by_what_it_holds(tmp_path):
    path = tmp_path / "grades.parquet"
    path.write_bytes(b"one")
    before = tracking._key("power", {"grades": str(path)})
    assert tracking._key("power", {"grades": str(path)}) == before
    path.write_bytes(b"other")
    assert tracking._key("power", {"grades": str(path)}) != before


def test_files_in_a_list_and_behind_a_linked_folder_count_by_what_they_hold(tmp_path):
    path = tmp_path / "elsewhere" / "set.jsonl"
    path.parent.mkdir()
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "set").symlink_to(path.parent)
    keys = set()
    for content in ("one", "other ones"):
        path.write_text(content)
        keys.add(tracking._key("prepare", {"train_sources": f"hendrycks_math, {path}"}))
        keys.add(tracking._key("prepare", {"source_root": str(tmp_path / "mirror")}))
    assert len(keys) == 4


def test_a_folder_that_is_called_like_an_arm_is_no_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tracking._key("sample", {"arm": "ssd", "engine": "transformers"})
    (tmp_path / "ssd").mkdir()
    (tmp_path / "ssd" / "cache").write_text("made by Python")
    assert tracking._key("sample", {"arm": "ssd", "engine": "transformers"}) == before


def test_where_samples_are_drawn_and_what_that_costs_is_no_part_of_the_work():
    common = {"n": 1, "gpu_hour_price": 0.0}
    keys = {
        tracking._key("sample", common | {"engine": place}) for place in ("openai:http://a/v1", "openai:http://b/v1")
    }
    assert len({*keys, tracking._key("sample", {"n": 1, "engine": "openai:http://a/v1", "gpu_hour_price": 3.0})}) == 1
    assert tracking._key("sample", common | {"engine": "transformers"}) not in keys
    assert tracking._key("search", {"storage": "local"}) == tracking._key("search", {"storage": "mlflow"})


forked = multiprocessing.get_context("fork")  # imports nothing again


def start_run(uri: str) -> None:
    tracking._prepare_store(uri)
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run():
        mlflow.log_param("a", 1)


def test_a_store_whose_making_was_killed_at_any_moment_is_made_by_the_next_process(tmp_path):
    uri, partial = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / ".mlflow.db.partial"
    for after_bytes in (0, 40_000, 200_000, 500_000):
        maker = forked.Process(target=tracking._prepare_store, args=(uri,))
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
