"""Requests to the lab's model, and whether what an engine draws is the distribution that the decoding defines."""

import numpy as np
import pytest
import torch
from scipy import stats

from ssd import models, prompts
from ssd.decoding import Decoding
from ssd.engines.logits import next_token_probs
from ssd.engines.request import Request, requests_for
from ssd.lab import world


@pytest.fixture(scope="session")
def requests_to():
    """Makes `n` requests for each of `num_problems` problems of the lab."""

    def make(model: str, decoding: Decoding, num_problems: int, n: int, seed: int = 0) -> list[Request]:
        problems, tokenizer = world.problems(num_problems, seed=7), models.load_tokenizer(model)
        rendered = [prompts.render(tokenizer, problem.problem) for problem in problems]
        return requests_for(problems, rendered, decoding, n, seed)

    return make


@pytest.fixture(scope="session")
def is_drawn_as_defined():
    """Whether first tokens of one prompt stray no further from their distribution than chance (chi-squared, .001)."""

    def check(model: str, requests: list[Request], first_tokens: list[int]) -> bool:
        prompt_1T = torch.tensor([requests[0].prompt_token_ids])
        logits = models.load_weights(model, torch.float32)(prompt_1T).logits[:, -1].detach().double()
        generated = torch.zeros((1, 0), dtype=torch.long)
        probs = next_token_probs(logits, requests[0].decoding, generated, prompt_1T)[0].numpy()
        counts = np.bincount(first_tokens, minlength=len(probs))
        possible = probs > 0
        expected = len(first_tokens) * probs[possible] / probs.sum()
        return not counts[~possible].any() and stats.chisquare(counts[possible], expected).pvalue > 1e-3

    return check
