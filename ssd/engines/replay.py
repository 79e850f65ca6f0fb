"""Recorded samples as an engine: a pipeline runs again, to the same samples, without the model's weights in memory."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ssd import models
from ssd.decoding import Decoding
from ssd.engines.request import Request, request_seed
from ssd.records import Sample
from ssd.samples import MANIFEST, load_samples


class ReplayEngine:
    """`folder` is a samples/ of an earlier run, or holds several. Nothing stands in for what was not recorded."""

    num_gpus = 0.0

    def __init__(self, model: str, requests: Sequence[Request], folder: str):
        manifests = sorted(Path(folder).rglob(MANIFEST)) if folder else []
        if not manifests:
            raise ValueError(f"engine=replay:{folder} has no {MANIFEST}; give a samples folder: replay:FOLDER")
        digest = models.digest(model)
        self.recorded: dict[tuple[str, int, int, Decoding], Sample] = {}
        for path in manifests:
            recorded = load_samples(path.parent)
            if recorded.manifest["model"] != digest:
                raise ValueError(f"{path} records model {recorded.manifest['model']}, not {digest} ({model})")
            for sample in recorded.rows:
                seed = request_seed(recorded.manifest["seed"], sample.problem_id, sample.sample_index)
                self.recorded[sample.problem_id, sample.sample_index, seed, recorded.decoding] = sample
        for request in requests:
            self._find(request, folder)

    def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
        for request in requests:
            yield self._find(request, "")

    def _find(self, request: Request, folder: str) -> Sample:
        found = self.recorded.get((request.problem_id, request.sample_index, request.seed, request.decoding))
        if found is None or found.prompt_token_ids != list(request.prompt_token_ids):
            raise ValueError(
                f"{folder} has no sample {request.sample_index} of problem {request.problem_id} with this prompt, seed "
                f"and decoding ({request.decoding}); give the settings of the recorded run, or another engine"
            )
        return found
