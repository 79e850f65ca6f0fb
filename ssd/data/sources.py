"""Each public problem set, read from the hub or from a local mirror with the same field names, as `Problem` rows.

Adding a source is one entry in SOURCES. Every row that is not kept is listed with its reason: nothing is lost
silently, and `raw_rows == len(problems) + len(dropped)` always holds.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ssd.grading.writing import last_box, normalise
from ssd.records import NOTATIONS, Problem

HUB = "hub"
MAX_PROBLEM_BYTES = 100_000
WRONG_LEVEL = "level below 4 or unknown"

_FIGURE = re.compile(
    r"!\[|<ima?ge?\b|\[img|\\includegraphics|\bshown below\b|\b(figure|diagram)s?\b[^.]{0,20}\b(below|above|shown)\b"
    r"|\b(in|see) the (\w+ )?(figure|diagram)\b",
    re.IGNORECASE,
)
_DRAWN_IN_TEXT = re.compile(r"\[asy\]|\\begin\{(array|tabular|tikzpicture|[pbv]?matrix)\}")
# 'A:', '(A)' or 'A)' after a space or brace, 'A.' only at the start of a line: a sentence may end in 'point A.'
_CHOICES = re.compile(
    r".*?".join(rf"(?:(?:^|[\s{{])\(?{letter}\s?[:)]|^\s*{letter}\.)" for letter in "ABC"), re.DOTALL | re.MULTILINE
)
_LETTER = re.compile(r"(\\(text|textbf|mathrm|mathbf)\s*\{)?\s*\(?[A-E]\)?\s*\}?([:.)].*)?", re.DOTALL)
_PROOF = re.compile(r"\b(prove|show|proof) (that|the following|of)\b", re.IGNORECASE)
_QUESTION = re.compile(
    r"\?|\b(find|determine|compute|calculate|evaluate|what|how many|which|solve|express)\b", re.IGNORECASE
)
_GIVES_ANSWER = re.compile(r"\banswer\s*(?:is|[:=])[\s$]*", re.IGNORECASE)
_NO_MORE = re.compile(r"[ $.,;)]*(?:$|\n)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_OTHER_SCRIPT = re.compile(r"[\u0400-\u04ff\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]")


class Fields(NamedTuple):
    """What a row function reads from a row, unchecked.

    `subset` is '' or the set's own name for a part of itself, `unwanted` the reason why the row is left out, or ''.
    `tolerance` is how far a number may be off, None or '' for not at all; `notation` is one of NOTATIONS or None.
    """

    problem: Any
    answer: Any
    level: Any = ""
    subset: str = ""
    unwanted: str = ""
    tolerance: Any = None
    notation: Any = None


@dataclasses.dataclass(frozen=True)
class Source:
    """One public set. `read_row` returns the row's `Fields`.

    `mirror` lists the files, without suffix, that may hold the set below a mirror directory; the first found is read.
    `revision` is a commit, or a branch whose commit is looked up when the set is loaded. A set with `streaming` is read
    row by row as it arrives, without a copy of all of it on disk.
    """

    name: str
    hub_id: str
    split: str
    licence: str
    mirror: tuple[str, ...]
    columns: tuple[str, ...]
    read_row: Callable[[dict], Fields]
    configs: tuple[str | None, ...] = (None,)
    revision: str = "main"
    streaming: bool = False


class Loaded(NamedTuple):
    """What `load` returns: the problems kept, the rows dropped and why, the number of rows read, and from where.

    A dropped row is a Problem as far as it can be: what its fields hold, as text.
    """

    problems: list[Problem]
    dropped: list[tuple[Problem, str]]
    raw_rows: int
    uri: str

    @property
    def reasons(self) -> Counter:
        """Number of rows dropped, by reason."""
        return Counter(reason for _, reason in self.dropped)


def load(name: str, source_root: str = HUB) -> Loaded:
    """Read one source.

    Parameters
    ----------
    name : str
        A key of SOURCES, or the path of a `.jsonl` or `.parquet` file with the columns problem and answer, and level,
        tolerance and notation where there are such: a set of one's own.
    source_root : str
        'hub', or a directory laid out as `<set>/<split>.jsonl` (or `.parquet`) with the hub's field names.

    Raises
    ------
    ValueError
        If the source is unknown, the hub cannot be reached, or the mirror lacks the directory, the file or a column.
    """
    if name.endswith((".jsonl", ".parquet")):
        source = Source(
            Path(name).stem, "", "", "your own", (), ("problem", "answer"), _plain("problem", "answer", "level")
        )
        rows, uri = _file_rows(Path(name)), name
    elif name in SOURCES:
        source = SOURCES[name]
        rows, uri = _hub_rows(source) if source_root == HUB else _mirror_rows(source, source_root)
    else:
        raise ValueError(
            f"source {name!r} is not known; choose from {', '.join(SOURCES)}, or give a .jsonl or .parquet"
        )
    problems: dict[str, Problem] = {}
    dropped, raw_rows, missing, found = [], 0, {*source.columns}, {}
    for row in rows:
        raw_rows += 1
        if missing and isinstance(row, dict):
            missing -= row.keys()
            found.update(row)
        fields = source.read_row(row) if isinstance(row, dict) else Fields(None, None, unwanted="not a JSON object")
        problem = _to_problem(source, fields)
        reason = fields.unwanted or _why_unusable(fields) or _why_not_gradable(problem)
        if reason or problems.setdefault(problem.problem_id, problem) is not problem:
            dropped.append((problem, reason or "duplicate id"))
    if raw_rows == 0:
        raise ValueError(f"{uri}: no rows; source {name} needs the columns {', '.join(source.columns)}")
    if missing:
        raise ValueError(
            f"{uri}: column {', '.join(sorted(missing))} is missing (found {', '.join(found) or 'no object'}); "
            f"give the fields of {source.hub_id or 'a problem'}"
        )
    return Loaded(list(problems.values()), dropped, raw_rows, uri)


def mirrored(source: Source, root: Path) -> Path | None:
    """The file below a mirror's directory `root` that holds `source`, None where there is none."""
    paths = (root / f"{stem}{suffix}" for stem in source.mirror for suffix in (".jsonl", ".parquet"))
    return next((path for path in paths if path.is_file()), None)


def _boxed(solution: Any) -> str | None:
    return last_box(solution) if isinstance(solution, str) else None


def _math(row: dict) -> Fields:
    return Fields(row.get("problem"), _boxed(row.get("solution")), row.get("level"))


def _hard_math(row: dict) -> Fields:
    fields = _math(row)
    return fields._replace(unwanted="" if fields.level in ("Level 4", "Level 5") else WRONG_LEVEL)


def _numinamath(row: dict) -> Fields:
    return Fields(row.get("problem"), _boxed(row.get("solution")), subset=str(row.get("source") or "unknown"))


def _omni_math(row: dict) -> Fields:
    # Omni-MATH-2 tags a row that needs an image, asks for a proof or has several answers; the clean ones have no tag.
    unwanted = "tagged as not clean" if row.get("tags") else ""
    return Fields(row.get("problem"), row.get("answer"), row.get("difficulty"), unwanted=unwanted)


def _olympiadbench(row: dict) -> Fields:
    answers = row.get("final_answer")
    if isinstance(answers, list) and len(answers) <= 1:
        answers = next(iter(answers), None)
    unwanted = "several answers" if row.get("is_multiple_answer") else ""
    return Fields(row.get("question"), answers, unwanted=unwanted, tolerance=row.get("error"))


def _gsm8k(row: dict) -> Fields:
    answer = row.get("answer")
    return Fields(row.get("question"), answer.split("####")[-1].replace(",", "") if isinstance(answer, str) else None)


def _plain(problem: str, answer: str, level: str = "") -> Callable[[dict], Fields]:
    def read_row(row: dict) -> Fields:
        rules = {name: row.get(name) for name in ("tolerance", "notation")}
        return Fields(row.get(problem), row.get(answer), row.get(level, ""), **rules)

    return read_row


_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra")

# A revision is the commit that public code pins for the set; 'main' where none was found.
# fmt: off
SOURCES: dict[str, Source] = {source.name: source for source in (
    # Levels 4 and 5 alone; the two after it have all levels.
    Source("hendrycks_math", "EleutherAI/hendrycks_math", "train", "MIT", ("hendrycks_math/train",),
           ("problem", "level", "solution"), _hard_math, (*_SUBJECTS, "precalculus"),
           "21a5633873b6a120296cce3e2df9d5550074f4a3"),
    Source("hendrycks_math-train", "EleutherAI/hendrycks_math", "train", "MIT", ("hendrycks_math/train",),
           ("problem", "level", "solution"), _math, (*_SUBJECTS, "precalculus"),
           "21a5633873b6a120296cce3e2df9d5550074f4a3"),
    Source("hendrycks_math-test", "EleutherAI/hendrycks_math", "test", "MIT", ("hendrycks_math/test",),
           ("problem", "level", "solution"), _math, (*_SUBJECTS, "precalculus"),
           "21a5633873b6a120296cce3e2df9d5550074f4a3"),
    Source("numinamath-cot", "AI-MO/NuminaMath-CoT", "train", "Apache-2.0",
           ("numinamath-cot_composite/train", "numinamath-cot/train"), ("source", "problem", "solution"), _numinamath,
           revision="9d8d210c9f6a36c8f3cd84045668c9b7800ef517", streaming=True),
    Source("beyond-aime", "ByteDance-Seed/BeyondAIME", "test", "CC0-1.0", ("beyond-aime/test",),
           ("problem", "answer"), _plain("problem", "answer")),
    Source("omni-math-2", "martheballon/Omni-MATH-2", "train", "Apache-2.0", ("omni-math-2/train", "omni-math/test"),
           ("problem", "answer", "difficulty"), _omni_math, revision="1c10fd492252173c73468badf6dc1804225eb5bb"),
    Source("olympiadbench", "Hothan/OlympiadBench", "train", "Apache-2.0", ("olympiadbench/OE_TO_maths_en_COMP",),
           ("question", "final_answer", "is_multiple_answer"), _olympiadbench, ("OE_TO_maths_en_COMP",)),
    Source("aimo-validation-aime", "AI-MO/aimo-validation-aime", "train", "Apache-2.0", ("aimo-validation-aime/train",),
           ("problem", "answer"), _plain("problem", "answer"), revision="13f9e12f613e720c2a2b2f345dd04b998a29494d"),
    # The number of a problem within its AIME is the archive's measure of difficulty.
    Source("aime_1983_2023", "di-zhang-fdu/AIME_1983_2024", "train", "MIT (contest text: MAA)",
           ("aime_1983_2023/train",), ("Question", "Answer", "Problem Number"),
           _plain("Question", "Answer", "Problem Number"), revision="3e2cc86390666c5c756622afc0eeb9e6194496bc"),
    Source("math-500", "HuggingFaceH4/MATH-500", "test", "MIT", ("math-500/test",),
           ("problem", "answer", "level"), _plain("problem", "answer", "level"),
           revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"),
    Source("gsm8k", "openai/gsm8k", "test", "MIT", ("gsm8k/main_test", "gsm8k/test"),
           ("question", "answer"), _gsm8k, ("main",), "740312add88f781978c0658806c59bc2815b9866"),
    Source("aime_2025", "MathArena/aime_2025", "train", "CC-BY-NC-SA-4.0", ("aime_2025/train",),
           ("problem", "answer"), _plain("problem", "answer"), revision="c94da77eb22bbd6439e62a323bec18493a421302"),
    Source("aime_2026", "MathArena/aime_2026", "train", "CC-BY-NC-SA-4.0", ("aime_2026/train",),
           ("problem", "answer"), _plain("problem", "answer"), revision="d2de22f3c656b4f56cf8981212186377d1e23bc3"),
    Source("hmmt_feb_2025", "MathArena/hmmt_feb_2025", "train", "CC-BY-NC-SA-4.0", ("hmmt_feb_2025/train",),
           ("problem", "answer"), _plain("problem", "answer")),
)}
# fmt: on


def _to_problem(source: Source, fields: Fields) -> Problem:
    """The row as a Problem, whatever its fields hold."""
    problem, answer, level = (_text(value) for value in fields[:3])
    answer = answer.strip().removeprefix("$").removesuffix("$").strip()
    name = f"{source.name}/{_text(fields.subset)}" if fields.subset else source.name
    digest = hashlib.sha256(" ".join(problem.split()).encode()).hexdigest()[:16]
    rules = _tolerance(fields.tolerance) or 0.0, _text(fields.notation)
    return Problem(f"{name}:{digest}", name, problem, answer, level, *rules)


def _tolerance(value: Any) -> float | None:
    """0 where there is none, None where what there is is no finite number from 0."""
    if value is None or value == "" or _is_nan(value):
        return 0.0
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < math.inf else None


def _text(value: Any) -> str:
    text = "" if value is None or _is_nan(value) else value if isinstance(value, str) else str(value)
    return text if text.isascii() else text.encode(errors="replace").decode()


def _why_unusable(fields: Fields) -> str:
    """Why the fields are no statement and one answer, '' where they are."""
    problem, answer = fields.problem, fields.answer
    if not isinstance(problem, str) or not problem.strip():
        return "no problem statement"
    if _SURROGATE.search(f"{problem}{answer}"):
        return "not valid Unicode"
    if len(problem.encode()) > MAX_PROBLEM_BYTES:
        return "statement over 100 kB"
    if isinstance(answer, list):
        return "several answers"
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | Decimal) or _is_nan(answer):
        return "no answer"
    if _tolerance(fields.tolerance) is None:
        return "tolerance is no number from 0"
    if _text(fields.notation) not in NOTATIONS:
        return f"notation is none of {', '.join(filter(None, NOTATIONS))}"
    return ""


def _why_not_gradable(problem: Problem) -> str:
    """Why no rule can grade this problem by its final answer, '' where one can as far as the text tells."""
    text, answer = problem.problem, problem.answer
    if not answer:
        return "no answer"
    if _FIGURE.search(text) and not _DRAWN_IN_TEXT.search(text):
        return "figure missing"
    if _CHOICES.search(text) or _LETTER.fullmatch(answer):
        return "multiple choice"
    if _PROOF.search(text) and not _QUESTION.search(text):
        return "proof"
    if _OTHER_SCRIPT.search(text):
        return "not English"
    if _is_list(answer):
        return "several answers"
    if _gives_answer(text, answer):
        return "answer in the statement"
    return ""


def _gives_answer(problem: str, answer: str) -> bool:
    """Whether the statement boxes the answer, or has it after 'answer is' or 'answer:'."""
    if "boxed" in problem and normalise(last_box(problem) or "") == normalise(answer):
        return True
    ends = [match.end() for match in _GIVES_ANSWER.finditer(problem)]
    return any(problem.startswith(answer, end) and _NO_MORE.match(problem, end + len(answer)) for end in ends)


def _is_list(answer: str) -> bool:
    """Whether commas, 'and' or 'or' outside all brackets separate several answers; 12,345 is one number."""
    answer = re.sub(r"(?<=\d)(,|\{,\}|,\\!)\s?(?=\d{3}(?!\d))", "", answer)
    depth, outside = 0, []
    for token in re.findall(r"\\.|.", answer, re.DOTALL):
        if depth == 0 and token not in ("\\,", "\\;"):
            outside.append(token)
        depth += (token in ("(", "[", "{", "\\{", "\\[")) - (token in (")", "]", "}", "\\}", "\\]"))
    return bool(re.search(r",|;|\b(and|or)\b", "".join(outside)) or re.search(r"\\text\{\s*(and|or)\s*\}", answer))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _hub_rows(source: Source) -> tuple[Iterator[dict], str]:
    import datasets
    import huggingface_hub

    with _reaching_hub(source):
        commit = source.revision
        if not _COMMIT.fullmatch(commit):
            commit = huggingface_hub.HfApi().dataset_info(source.hub_id, revision=commit).sha
        how = {"split": source.split, "revision": commit, "streaming": source.streaming}
        parts = [datasets.load_dataset(source.hub_id, config, **how) for config in source.configs]

    def rows() -> Iterator[dict]:
        with _reaching_hub(source):
            for part in parts:
                yield from tqdm(part, desc=source.name, unit="row", unit_scale=True, disable=not source.streaming)

    return rows(), f"hf://datasets/{source.hub_id}@{commit}"


@contextlib.contextmanager
def _reaching_hub(source: Source) -> Iterator[None]:
    import datasets
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source.hub_id}: cannot be loaded from the hub ({error}); check the network, or give "
            "source_root=DIR, a local mirror with the same field names"
        ) from error


def _mirror_rows(source: Source, source_root: str) -> tuple[Iterator[Any], str]:
    root = Path(source_root)
    if not root.is_dir():
        raise ValueError(f"source_root {source_root!r} is not a directory; give a local mirror, or 'hub'")
    if path := mirrored(source, root):
        return _file_rows(path), str(path)
    raise ValueError(
        f"source_root {source_root!r} has no {' or '.join(f'{stem}.jsonl' for stem in source.mirror)} (or .parquet) "
        f"for source {source.name}; mirror {source.hub_id} there"
    )


def _file_rows(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a .jsonl or .parquet file with the columns problem and answer")
    return _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)


def _jsonl_rows(path: Path) -> Iterator[Any]:
    # Bytes split on \n alone, where text would also split on the U+2028 that some statements hold.
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid UTF-8 ({error}); save the file again") from error
            except (ValueError, RecursionError):  # no JSON, a number of over 4,300 digits, or nested too deeply
                yield None


def _parquet_rows(path: Path) -> Iterator[dict]:
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error}); save the file again") from error
