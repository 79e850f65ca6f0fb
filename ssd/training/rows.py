"""Samples -> training rows: the very token ids that were sampled, with the loss on the completion alone."""

from collections.abc import Sequence
from typing import NamedTuple

import datasets

from ssd.records import Sample

COMPLETIONS = ("all", "finished", "cut")


class Rows(NamedTuple):
    """Rows of `problem_id`, `input_ids` and `completion_mask`, and how many samples were left out or cut, and why."""

    dataset: datasets.Dataset
    num_stubs: int
    num_unfinished: int
    num_too_long: int


def rows(samples: Sequence[Sample], max_length: int, completions: str = "all") -> Rows:
    """Rows of at most `max_length` tokens, in the order of `samples`.

    The end-of-turn token is in the loss where the model drew it, and absent where the cap cut the completion off.
    Empty completions and one-line stubs are left out, as in the paper (arXiv 2604.01193, section 3.1); nothing looks
    at the answer.

    Parameters
    ----------
    completions : {"all", "finished", "cut"}
        "all" drops rows that are too long; "cut" trains on their first `max_length` tokens; "finished" drops them and
        every completion that did not end by itself, which favours problems that the model can do.
    """
    if completions not in COMPLETIONS:
        raise ValueError(f"completions={completions!r} is none of {', '.join(COMPLETIONS)}")
    full = [sample for sample in samples if not _is_stub(sample)]
    kept = [sample for sample in full if completions != "finished" or sample.finish_reason == "stop"]
    too_long = [len(sample.prompt_token_ids) + len(sample.token_ids) > max_length for sample in kept]
    fitting = [sample for sample, is_long in zip(kept, too_long) if completions == "cut" or not is_long]
    if not fitting:
        raise ValueError(
            f"none of {len(samples)} samples can be trained on: {len(samples) - len(full)} are stubs, "
            f"{len(full) - len(kept)} unfinished (completions={completions}) and {len(kept)} exceed "
            f"max_length={max_length}; raise max_length or sample again"
        )
    dataset = datasets.Dataset.from_dict(
        {
            "problem_id": [row.problem_id for row in fitting],
            "input_ids": [[*row.prompt_token_ids, *row.token_ids][:max_length] for row in fitting],
            "completion_mask": [
                ([0] * len(row.prompt_token_ids) + [1] * len(row.token_ids))[:max_length] for row in fitting
            ],
        }
    )
    return Rows(dataset, len(samples) - len(full), len(full) - len(kept), sum(too_long))


def _is_stub(sample: Sample) -> bool:
    text = sample.text.strip()
    return not text or (sample.finish_reason == "stop" and "\n" not in text)
