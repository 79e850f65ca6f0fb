"""Samples -> training rows: the very token ids that were sampled, with the loss on the completion alone."""

from collections.abc import Sequence
from typing import NamedTuple

import datasets

from ssd.records import Sample


class Rows(NamedTuple):
    """Training rows `input_ids`, `completion_mask`, and how many samples were left out and why."""

    dataset: datasets.Dataset
    num_stubs: int
    num_too_long: int


def rows(samples: Sequence[Sample], max_length: int) -> Rows:
    """Rows of at most `max_length` tokens, in the order of `samples`; longer ones are dropped, not cut.

    The end-of-turn token is in the loss where the model drew it, and absent where the cap cut the completion off.
    Empty completions and one-line stubs are left out, as in the paper (arXiv 2604.01193, section 3.1); nothing looks
    at the answer.
    """
    kept = [sample for sample in samples if not _is_stub(sample)]
    fitting = [sample for sample in kept if len(sample.prompt_token_ids) + len(sample.token_ids) <= max_length]
    if not fitting:
        raise ValueError(
            f"none of {len(samples)} samples can be trained on: {len(samples) - len(kept)} are stubs and {len(kept)} "
            f"exceed max_length={max_length}; raise max_length or sample again"
        )
    dataset = datasets.Dataset.from_dict(
        {
            "input_ids": [[*sample.prompt_token_ids, *sample.token_ids] for sample in fitting],
            "completion_mask": [[0] * len(sample.prompt_token_ids) + [1] * len(sample.token_ids) for sample in fitting],
        }
    )
    return Rows(dataset, len(samples) - len(kept), len(kept) - len(fitting))


def _is_stub(sample: Sample) -> bool:
    text = sample.text.strip()
    return not text or (sample.finish_reason == "stop" and "\n" not in text)
