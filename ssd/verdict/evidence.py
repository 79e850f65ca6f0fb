"""What stands behind a comparison, as records: the runs, the checkpoints, the problem sets and samples to be shown."""

from typing import NamedTuple

from ssd.stats.estimate import Estimate


class StepRun(NamedTuple):
    """A run of a step: its parameters with inputs resolved, and `datasets`, digests by context or name."""

    step: str
    arm: str
    run_id: str
    experiment_id: str
    name: str
    params: dict[str, str]
    metrics: dict[str, float]
    datasets: dict[str, str]
    commit: str
    started_ms: int
    hours: float


class Checkpoint(NamedTuple):
    """pass@1 of a checkpoint of `arm` after `step` steps of training, on the set `split` at `decoding`."""

    arm: str
    split: str
    decoding: str
    step: int
    pass_at_1: Estimate


class Overlap(NamedTuple):
    """Problems of each set, problems taken out because they repeat others, and the pairs found, by rule."""

    num_problems: dict[str, int]
    num_removed: int
    num_pairs: dict[str, int]


class Shown(NamedTuple):
    """A sample that is shown to a person, with its problem, the gold answer and the one that was extracted."""

    arm: str
    outcome: str
    problem_id: str
    problem: str
    gold: str
    answer: str
    text: str
