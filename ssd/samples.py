"""Samples that were drawn, with the manifest of what made them: a folder of Parquet files, read back whole."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from ssd import records
from ssd.decoding import Decoding
from ssd.records import Sample

MANIFEST = "manifest.json"


class Drawn(NamedTuple):
    """What one process drew: when each of its samples ended, in seconds since it began, and of how many tokens."""

    finished_s: list[float]
    num_tokens: list[int]
    num_gpus: float

    @property
    def tokens_per_second(self) -> float:
        return sum(self.num_tokens) / self.finished_s[-1]

    @property
    def gpu_hours(self) -> float:
        """NaN where the engine does not know how many GPUs it kept busy."""
        return self.num_gpus * self.finished_s[-1] / 3600

    @property
    def tail_share(self) -> float:
        """Share of the time in which a tenth of the samples or less was left, and a GPU may have had too few."""
        return 1 - self.finished_s[math.ceil(0.9 * len(self.finished_s)) - 1] / self.finished_s[-1]


class Generated(NamedTuple):
    """Samples in order of problem id and sample index, and the manifest of what made them.

    `manifest` holds `model` (digest), `prompt`, `thinks` (the prompt opens the thinking, so that an answer counts only
    after it), `engine` (its kind), `seed`, `n`, `decoding` and `code`. `drawn` is this process's own part, None where
    it drew nothing.
    """

    samples: list[Sample]
    manifest: dict
    drawn: Drawn | None = None

    @property
    def decoding(self) -> Decoding:
        return Decoding(**self.manifest["decoding"])


def load_samples(folder: Path) -> Generated:
    """What an earlier run has drawn into `folder`."""
    file = folder / MANIFEST
    if not file.exists():
        raise ValueError(f"{folder} has no {MANIFEST}; give the samples/ of a run of sample, baseline or evaluate")
    manifest = read_manifest(file)
    try:
        missing = {"model", "prompt", "thinks", "engine", "seed", "n"} - manifest.keys()
        if missing:
            raise ValueError(f"it does not say {min(missing)}")
        Decoding(**manifest.get("decoding", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not what a run wrote ({error}); copy the folder again") from error
    return Generated(stored(folder), manifest)


def read_manifest(file: Path) -> dict:
    """Content of the manifest `file`; ValueError where it is no JSON object."""
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} holds no JSON object ({error}); copy the folder again, or remove it to draw its samples anew"
        ) from error


def stored(folder: Path) -> list[Sample]:
    """Samples in `folder`, in order of problem id and sample index, so that equal content is equal order."""
    if not any(folder.glob("*.parquet")):
        return []
    return sorted(records.read(folder, Sample), key=sample_key)


def sample_key(row: Sample) -> tuple[str, int]:
    """Problem id and sample index, of a sample or of the request that it answers."""
    return row.problem_id, row.sample_index
