"""The sampling store: nothing lost, nothing twice, nothing mixed."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from ssd import records, sampling
from ssd.decoding import Decoding
from ssd.engines.request import requests_for
from ssd.records import Problem, Sample
from ssd.samples import Drawn, load_samples, stored

PROBLEMS = [Problem(f"p{i}", "made", f"What is {i}+{i}?", str(2 * i), "1") for i in range(10)]
REQUESTS = requests_for(PROBLEMS, [[1, 2, 3]] * 10, Decoding(), 60, seed=0)
ASKED = {(request.problem_id, request.sample_index) for request in REQUESTS}
MANIFEST = {"model": "m", "prompt": "?", "thinks": False, "engine": "echo", "seed": 0, "n": 60}
MANIFEST |= {"decoding": {"temperature": 1.0}}


class Echo:
    """An engine whose sample of a request is its seed; it dies after `lifetime` samples."""

    num_gpus = 2.0

    def __init__(self, lifetime: int = 10**9):
        self.lifetime = lifetime

    def generate(self, requests):
        for number, request in enumerate(requests):
            if number == self.lifetime:
                raise KeyboardInterrupt
            yield Sample(request.problem_id, request.sample_index, [1, 2, 3], [request.seed % 1000], "", "stop", -1.0)


def test_an_interrupted_run_goes_on_and_ends_with_each_sample_once(tmp_path):
    for lifetime in (100, 333):
        with pytest.raises(KeyboardInterrupt):
            sampling.sample(Echo(lifetime), sampling.pending(tmp_path, REQUESTS, MANIFEST), tmp_path)
    assert len(stored(tmp_path)) == 433
    sampling.sample(Echo(), sampling.pending(tmp_path, REQUESTS, MANIFEST), tmp_path)
    found = [(sample.problem_id, sample.sample_index, sample.token_ids) for sample in stored(tmp_path)]
    assert found == sorted((r.problem_id, r.sample_index, [r.seed % 1000]) for r in REQUESTS)
    assert sampling.pending(tmp_path, REQUESTS, MANIFEST) == []


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_a_shard_that_was_removed_is_drawn_again_and_no_other_is_overwritten(tmp_path, removed):
    """As the error about a damaged shard advises."""
    with pytest.raises(KeyboardInterrupt):
        sampling.sample(Echo(600 - 30), sampling.pending(tmp_path, REQUESTS, MANIFEST), tmp_path)
    shards = sorted(tmp_path.glob("*.parquet"))
    assert len(shards) == 3
    shards[removed].unlink()
    sampling.sample(Echo(), sampling.pending(tmp_path, REQUESTS, MANIFEST), tmp_path)
    assert {(s.problem_id, s.sample_index) for s in sampling.completed(tmp_path, REQUESTS).samples} == ASKED
    assert {shard for number, shard in enumerate(shards) if number != removed} <= set(tmp_path.glob("*.parquet"))


def test_samples_whose_file_vanishes_while_others_are_drawn_are_missed_and_drawn_by_the_next_command(
    tmp_path, lab_model, monkeypatch
):
    class Losing(Echo):
        def generate(self, requests):
            for number, sample in enumerate(super().generate(requests)):
                if number == 300 and len(requests) == len(REQUESTS):
                    (tmp_path / "a" / "part-000000.parquet").unlink()
                yield sample

    monkeypatch.setattr(sampling, "open_engine", lambda *_: Losing())
    sampler = sampling.Sampler(lab_model, "transformers", "code")
    with pytest.raises(ValueError, match="holds 344 of the 600 samples .*give the same command again"):
        sampler.generate(PROBLEMS, {"a": Decoding()}, 60, 0, tmp_path)
    generated = sampler.generate(PROBLEMS, {"a": Decoding()}, 60, 0, tmp_path)["a"]
    assert {(s.problem_id, s.sample_index) for s in generated.samples} == ASKED
    assert len(generated.samples) == len(REQUESTS) and len(generated.drawn.num_tokens) == 256


def test_a_smaller_set_of_problems_gets_its_own_samples_alone_from_a_folder_with_more(tmp_path, lab_model, monkeypatch):
    """A search that is killed in a trial begins it again with the smallest part of the problems."""
    monkeypatch.setattr(sampling, "open_engine", lambda *_: Echo())
    for num_problems in (10, 4):
        sampler = sampling.Sampler(lab_model, "transformers", "code")
        generated = sampler.generate(PROBLEMS[:num_problems], {"a": Decoding()}, 2, 0, tmp_path)["a"]
        assert Counter(sample.problem_id for sample in generated.samples) == {f"p{i}": 2 for i in range(num_problems)}
    assert generated.drawn is None


def test_what_another_process_has_stored_meanwhile_is_not_drawn_again(tmp_path):
    for count in (40, 0):
        sampling.sample(Echo(), sampling.pending(tmp_path, REQUESTS[:count], MANIFEST), tmp_path)
    assert sampling.sample(Echo(), REQUESTS[:40], tmp_path) is None
    assert len(sampling.sample(Echo(), REQUESTS[:50], tmp_path).num_tokens) == 10


def test_an_engine_that_gives_a_sample_twice_is_stopped_before_it_is_stored_twice(tmp_path):
    class Doubling(Echo):
        def generate(self, requests):
            for sample in super().generate(requests):
                yield from (sample, sample)

    with pytest.raises(RuntimeError, match=r"gave \('p0', 0\) twice"):
        sampling.sample(Doubling(), REQUESTS, tmp_path)
    assert len(stored(tmp_path)) == 1


def test_a_bit_that_flips_in_a_shard_changes_no_sample_unnoticed_and_its_file_is_named(tmp_path):
    sampling.sample(Echo(), sampling.pending(tmp_path, REQUESTS, MANIFEST), tmp_path)
    shard, samples, num_noticed = tmp_path / "part-000001.parquet", stored(tmp_path), 0
    whole = shard.read_bytes()
    positions = range(40, len(whole) // 2, 97)
    for position in positions:
        shard.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            assert stored(tmp_path) == samples  # a page's header has idle parts
        except ValueError as error:
            assert re.search(r"part-000001.parquet: not a readable Parquet file .*; remove it", str(error))
            num_noticed += 1
    assert num_noticed > len(positions) / 2


class Slow(Echo):
    """Says how many samples it has given, in memory that outlives its process."""

    def __init__(self, given):
        super().__init__()
        self.given = given

    def generate(self, requests):
        for sample in super().generate(requests):
            time.sleep(0.0002)
            self.given.value += 1
            yield sample


def test_a_sampler_killed_at_random_moments_loses_at_most_what_it_had_not_yet_written(tmp_path, monkeypatch):
    """20 times kill -9, then to the end: nothing lost, nothing twice, no shard unreadable."""
    monkeypatch.setattr(sampling, "FLUSH_SAMPLES", 40)
    monkeypatch.setattr(sampling, "FLUSH_S", 0.01)  # so that both ways to disk are taken
    folder, random = tmp_path / "samples", np.random.default_rng(0)
    requests = requests_for(PROBLEMS, [[1, 2, 3]] * 10, Decoding(), 600, seed=0)
    forked = multiprocessing.get_context("fork")  # imports nothing again
    # Without a lock, which a killed process would hold for ever.
    num_killed, num_stored, given = 0, 0, forked.RawValue("i", 0)
    while num_killed < 20:
        pending = sampling.pending(folder, requests, MANIFEST)
        assert len(pending) == len(requests) - num_stored
        given.value = 0
        sampler = forked.Process(target=sampling.sample, args=(Slow(given), pending, folder))
        sampler.start()
        while not given.value and sampler.is_alive():
            time.sleep(0.001)
        time.sleep(random.uniform(0.0, 0.06))
        os.kill(sampler.pid, signal.SIGKILL)
        sampler.join()
        assert sampler.exitcode == -signal.SIGKILL
        before, num_stored = num_stored, len(stored(folder))  # which reads every shard and refuses a sample twice
        assert 0 <= given.value - (num_stored - before) <= 40 + 1
        num_killed += 1
    assert 0 < num_stored < len(requests)
    sampling.sample(Echo(), sampling.pending(folder, requests, MANIFEST), folder)
    found = [(sample.problem_id, sample.sample_index, sample.token_ids) for sample in stored(folder)]
    assert found == sorted((r.problem_id, r.sample_index, [r.seed % 1000]) for r in requests)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".parquet"}  # nothing half written is left


def test_a_sample_is_on_disk_soon_though_the_next_is_long_in_coming(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "FLUSH_S", 0.05)

    class Pausing(Echo):
        def generate(self, requests):
            for number, sample in enumerate(super().generate(requests)):
                if number == 3:
                    time.sleep(0.5)
                    assert len(stored(tmp_path)) == 3
                yield sample

    sampling.sample(Pausing(), sampling.pending(tmp_path, REQUESTS[:9], MANIFEST), tmp_path)
    assert len(stored(tmp_path)) == 9


def test_a_disk_that_is_full_ends_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(records, "write", full)
    with pytest.raises(OSError, match="No space left"):
        sampling.sample(Echo(), sampling.pending(tmp_path, REQUESTS, MANIFEST), tmp_path)


def test_the_progress_line_says_how_much_is_done_how_fast_and_until_when(tmp_path, capsys):
    sampling.sample(Echo(), REQUESTS[100:], tmp_path, num_stored=100, description="T=1")
    line = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"^T=1: 100%.* 600/600 \[.*ends \d\d:\d\d, [\d,]+ tokens/s, 0.0% cut off\]", line)


def test_what_a_run_took_follows_from_when_its_samples_ended():
    drawn = Drawn(finished_s=[*range(1, 10), 18], num_tokens=[10] * 10, num_gpus=2.0)
    assert drawn.tokens_per_second == pytest.approx(100 / 18)
    assert drawn.gpu_hours == pytest.approx(2 * 18 / 3600)
    assert drawn.tail_share == pytest.approx(1 / 2)  # from the ninth sample's end, one of ten is left


def test_samples_are_on_disk_before_the_run_ends(tmp_path):
    class Watching(Echo):
        def generate(self, requests):
            for number, sample in enumerate(super().generate(requests)):
                assert len(stored(tmp_path)) >= number - sampling.FLUSH_SAMPLES
                yield sample

    sampling.sample(Watching(), sampling.pending(tmp_path, REQUESTS, MANIFEST), tmp_path)


def test_a_folder_begun_with_other_settings_is_refused_by_name(tmp_path):
    sampling.pending(tmp_path, REQUESTS, MANIFEST)
    with pytest.raises(ValueError, match="decoding={'temperature': 1.0}, not {'temperature': 2.0}"):
        sampling.pending(tmp_path, REQUESTS, MANIFEST | {"decoding": {"temperature": 2.0}})


@pytest.mark.parametrize("content", ["[]", '{"model": "m', "null", "{}", '{"n": 1}', "[" * 100_000, "\udcff"])
def test_a_damaged_manifest_is_refused_by_name(tmp_path, content):
    sampling.sample(Echo(), sampling.pending(tmp_path, REQUESTS[:3], MANIFEST), tmp_path)
    (tmp_path / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"manifest.json .*copy the folder again"):
        load_samples(tmp_path)


def test_a_second_process_on_the_folder_is_refused(tmp_path):
    sampling.pending(tmp_path, REQUESTS, MANIFEST)
    with records.alone(tmp_path):
        take = f"import pathlib\nfrom ssd import records\nwith records.alone(pathlib.Path({str(tmp_path)!r})): pass"
        second = subprocess.run([sys.executable, "-c", take], capture_output=True, text=True)
        with pytest.raises(ValueError, match="another process is at work"):
            sampling.sample(Echo(), REQUESTS, tmp_path)
    assert "another process is at work" in second.stderr


def test_a_folder_that_is_shared_is_nobodys_alone(tmp_path):
    folder = tmp_path / "study"
    with contextlib.ExitStack() as held:
        for _ in range(2):
            held.enter_context(records.alone(folder, shared=True))
        with pytest.raises(ValueError, match="another process is at work"):
            held.enter_context(records.alone(folder))
    with contextlib.ExitStack() as held:
        held.enter_context(records.alone(folder))
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_seeds_depend_on_the_problem_and_the_index_alone():
    reordered = requests_for(PROBLEMS[::-1], [[1, 2, 3]] * 10, Decoding(), 60, seed=0)
    assert {(r.problem_id, r.sample_index): r.seed for r in REQUESTS} == {
        (r.problem_id, r.sample_index): r.seed for r in reordered
    }
    assert len({r.seed for r in REQUESTS}) == len(REQUESTS)
