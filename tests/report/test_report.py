"""The report says what was found: verdict and interval first, hostile text as text, a page that needs nothing else."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import mlflow
import numpy as np
import pytest
from matplotlib.figure import Figure

from ssd import records, tracking
from ssd.lab import world
from ssd.records import Problem
from ssd.report import blocks, figures, page
from ssd.stats import compare as comparing
from ssd.stats.estimate import Estimate
from ssd.stats.power import Cost
from ssd.verdict import decision
from ssd.verdict.comparison import Arm, compare_arms, comparison_of, read_files
from ssd.verdict.evidence import Checkpoint, Overlap, Shown, StepRun

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = (
    "<script>document.title='owned'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>`````</pre>"
    "[a](javascript:b)\u202egnp\x1b[2J\r|"
)
ACCURACY = {
    "base": 0.40,
    "ssd-same-decoding": 0.50,
    "ssd": 0.55,
    "base-tuned-min-p": 0.70,
    "control": 0.40,
    "mine": 0.45,
}


def simulated(accuracy: dict[str, float], n: int = 1500, seed: int = 0) -> dict[str, np.ndarray]:
    """correct_PS by arm: each problem has a luck of its own that all arms share, so that arms are paired."""
    rng = np.random.default_rng(seed)
    luck_P = rng.random(n)
    return {
        arm: (np.where(rng.random(n) < 0.7, luck_P, rng.random(n)) < share)[:, None] * 1.0
        for arm, share in accuracy.items()
    }


def found(accuracy: dict[str, float], **changes) -> page.Evidence:
    """What a comparison of arms with these true accuracies finds, with all that a report may hold."""
    correct = simulated(accuracy)
    n = len(correct["base"])
    rate = Estimate(0.9, 0.01, 0.88, 0.92, n)
    health = {name: rate for name in page.HEALTH} | {"tokens_per_sample": Estimate(812.0, 4.0, 804.0, 820.0, n)}
    lengths = {"p10": 8, "p50": 20, "p90": 33, "p99": 48}
    arms = {arm: Arm(f"{arm}-run", "runs:/1/model", "T=1", health, lengths, Cost(1e6, 2.5, 7.5)) for arm in correct}
    sources_P, levels_P = ["aime", "omni"] * (n // 2), [["1", "2", "10"][i % 3] for i in range(n)]
    conditions = {"max_tokens": 4096, "engine": "vllm", "prompt": "Solve.", "problems": "d"}
    comparison = compare_arms(arms, correct, sources_P, levels_P, conditions, "quick")
    pairs = [(claim.arm, claim.against) for claim in decision.PLAN.claims]
    verdict = decision.decide(
        {pair: comparing.paired(correct[pair[0]], correct[pair[1]]) for pair in pairs if set(pair) <= correct.keys()},
        chosen_on={"decoding": "quick", "checkpoint": "quick"},
        evaluated_on="final",
        num_earlier_reads=changes.pop("num_earlier_reads", 0),
    )
    run = StepRun(
        "sample", "ssd", "4f" * 16, "0", HOSTILE, {"n": "1"}, {"num_tokens": 9e6, "gpu_hours": 3.25}, {}, "abc", 0, 1.5
    )
    shown = [
        Shown("ssd", "right", "p1", HOSTILE, HOSTILE, HOSTILE, HOSTILE),
        Shown("ssd", "cut_off", "p2", "What?", "1", "", "x" * 9000),
    ]
    checkpoints = [
        Checkpoint(
            "ssd", "val", "T=1", step, Estimate(0.4 + step / 1000, 0.01, 0.38 + step / 1000, 0.42 + step / 1000, 1000)
        )
        for step in (0, 48, 96)
    ]
    given = {
        "commands": ["mlflow run ."], "checkpoints": checkpoints,
        "samples": shown, "overlap": Overlap({"train": 9000, "final": n}, 77, {"equal": 70, "suspected, but kept": 3}),
    }  # fmt: skip
    given |= {"runs": [run]} | changes
    return page.Evidence(verdict, comparison, "Qwen/Qwen3.5-4B", **given)


@pytest.fixture(scope="module")
def sections() -> list[blocks.Section]:
    """The report of a comparison of all arms, and of one more."""
    return page.sections(found(ACCURACY))


class Outline(html.parser.HTMLParser):
    """Elements with their attributes, and the text of each `pre`."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.pres, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = self.inside or tag == "pre"
        self.pres += [""] * (tag == "pre")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data):
        if self.inside:
            self.pres[-1] += data


@pytest.mark.parametrize(
    ("accuracy", "promotion", "said"),
    [
        (ACCURACY, "candidate", r"the model better, by \+\d.*but is not shown to beat .* against base-tuned-min-p"),
        (ACCURACY | {"base-tuned-min-p": 0.42}, "champion", r"better than the untrained model at every tuned decoding"),
        (ACCURACY | {"ssd-same-decoding": 0.40}, "refused", r"not shown to make the model better|no difference"),
        (ACCURACY | {"ssd-same-decoding": 0.30}, "refused", r"made the model worse"),
        ({"base": 0.4, "ssd-same-decoding": 0.5, "control": 0.52}, "refused", r"not shown to gain more than"),
        ({"base": 0.4, "ssd-same-decoding": 0.5}, "candidate", r"not compared with the untrained model at any"),
    ],
    ids=["min-p is better", "champion", "no gain", "a loss", "the control gains as much", "two arms"],
)  # fmt: skip
def test_the_verdict_is_one_sentence_with_its_interval_and_says_what_would_change_it(accuracy, promotion, said):
    made = found(accuracy)
    assert made.verdict.promotion == promotion
    sentence = page.sentence(made.verdict)
    assert re.search(said, sentence)
    correct = simulated(accuracy)
    difference = comparing.paired(correct["ssd-same-decoding"], correct["base"])
    interval = f"{100 * difference.value:+.1f} [{100 * difference.ci_low:+.1f}, {100 * difference.ci_high:+.1f}]"
    assert interval in sentence and "n = 1,500" in sentence
    changes = decision.what_would_change(made.verdict)
    assert "Another seed of the training" in changes[-1]
    unbeaten = [f.claim.against for f in made.verdict.findings if f.claim.role == "decoding" and f.word != "better"]
    if promotion == "candidate":
        assert all(any(against in change for change in changes) for against in unbeaten)


def test_the_verdict_comes_first(sections):
    titles = [section.title for section in sections]
    assert titles[:4] == ["The question", "The verdict: candidate", "What would change it", "Arms"]
    loud = [block.text for section in sections for block in section.blocks if getattr(block, "loud", False)]
    assert loud == [page.sentence(found(ACCURACY).verdict)]


def test_a_set_that_was_read_before_is_said_to_be(sections):
    assert "No other comparison" in blocks.markdown("", sections)
    made = found(ACCURACY, num_earlier_reads=2)
    assert made.verdict.reading == 3
    assert "reading 3 of the set final" in blocks.markdown("", page.sections(made))
    assert any("2 other comparisons have read it before" in reason for reason in made.verdict.reasons)


def test_the_lab_is_said_to_be_no_evidence_about_other_models():
    lab = StepRun("lab", "", "1" * 32, "0", "lab model", {}, {}, {}, "abc", 0, 0.1)
    text = blocks.markdown("", page.sections(found(ACCURACY, runs=[lab])))
    assert "In the lab: Self-distillation" in text and "no evidence about any larger model" in text


def test_arms_outside_of_the_plan_are_adjusted_among_themselves():
    made = found(ACCURACY).comparison
    outside = {"ssd", "base-tuned-min-p", "mine"}
    assert set(made.p_outside_plan) == outside
    raw = sorted(made.against_base[arm].p_value for arm in outside)
    stepped = np.maximum.accumulate([min(1, p * (3 - i)) for i, p in enumerate(raw)])
    assert sorted(made.p_outside_plan.values()) == pytest.approx(list(stepped))


def test_groups_add_up_to_the_whole():
    made = found(ACCURACY).comparison
    for groups in (made.by_source["mine"], made.by_level["mine"]):
        assert sum(group.n for group in groups.values()) == 1500
        whole = sum(group.value * group.n for group in groups.values()) / 1500
        assert whole == pytest.approx(made.against_base["mine"].value)


def test_a_comparison_and_a_verdict_survive_their_files(tmp_path):
    made = found(ACCURACY)
    for name, content in (("verdict", made.verdict), ("comparison", made.comparison)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records.jsonable(content), allow_nan=False))
    assert read_files(tmp_path / "verdict.json", tmp_path / "comparison.json") == (made.verdict, made.comparison)
    with pytest.raises(ValueError, match="run -e compare again"):
        comparison_of({"arms": {}})


def test_hostile_text_is_text_in_html_and_in_markdown(sections):
    outline = Outline(blocks.html("<b>title</b>", sections))
    assert {tag for tag, _ in outline.elements} <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "section", "p", "ul", "li", "div",
        "table", "thead", "tbody", "tr", "th", "td", "a", "img", "pre",
    }  # fmt: skip
    assert all(attributes["href"].startswith("#/experiments/") for tag, attributes in outline.elements if tag == "a")
    assert all(attributes["src"].startswith("data:image/png") for tag, attributes in outline.elements if tag == "img")
    assert not any(name.startswith("on") for _, attributes in outline.elements for name in attributes)
    shown = HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\x1b", "⟨U+001B⟩").replace("\r", "⟨U+000D⟩")
    assert outline.pres.count(shown) == 2
    assert max(map(len, outline.pres)) < 2 * page.MAX_SHOWN_CHARS
    markdown = blocks.markdown("", sections)
    assert f"``````\n{shown}\n``````" in markdown
    outside = re.sub(r"(?s)(`{3,})\n.*?\n\1\n", "", markdown)
    assert "\\<script>" in outside and not re.search(r"(?<!\\)<[a-z]|\](?<!\\)\(javascript", outside)


def test_every_figure_says_in_words_what_is_seen_with_the_numbers(sections):
    pictures = {block.name: block for part in sections for block in part.blocks if block.kind == "picture"}
    assert set(pictures) == {"arms", "claims", "by_step", "lengths"}
    for arm, correct_PS in simulated(ACCURACY).items():
        assert f"{arm} {correct_PS.mean():.1%}" in pictures["arms"].alt
    assert "step 48 44.8% [42.8, 46.8]" in pictures["by_step"].alt
    assert all(block.png.startswith(b"\x89PNG") for block in pictures.values())


def test_what_was_not_measured_has_no_section():
    titles = {part.title for part in page.sections(found(ACCURACY, checkpoints=[], samples=[], overlap=None))}
    assert not titles & {"Accuracy against training step", "A few samples", "Overlap removed"}
    assert {"Health", "Lengths", "Cost", "Runs", "To get it again"} <= titles


MEASURE = """<iframe id=f src=report.html width=390 height=800></iframe><pre id=out></pre><script>
onload = () => { const d = f.contentDocument, w = f.contentWindow;
  out.textContent = JSON.stringify({width: d.documentElement.scrollWidth, title: d.title, scripts: d.scripts.length,
    requests: w.performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:')),
    pres: [...d.querySelectorAll('pre')].map(e => e.textContent),
    images: [...d.images].map(e => [e.alt, e.naturalWidth]),
    boxes: [...d.querySelectorAll('.scroll')].every(e => e.getBoundingClientRect().right <= 390)})}
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_in_a_browser_the_page_fits_a_phone_asks_for_nothing_and_runs_nothing(tmp_path, sections):
    (tmp_path / "report.html").write_text(blocks.html("Report", sections))
    (tmp_path / "measure.html").write_text(MEASURE)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
    flags += [
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path}/p",
    ]
    seen = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", f"file://{tmp_path}/measure.html"], capture_output=True, text=True, timeout=120
    )
    assert [line for line in seen.stderr.splitlines() if "CONSOLE" in line] == []
    (content,) = re.findall(r'<pre id="out">(.*?)</pre>', seen.stdout, re.DOTALL)
    found_there = json.loads(html.unescape(content))
    assert found_there["width"] <= 390 and found_there["boxes"]
    assert (found_there["title"], found_there["scripts"], found_there["requests"]) == ("Report", 0, [])
    assert all(alt and width for alt, width in found_there["images"])
    assert any(text.startswith("<script>document.title='owned'</script>") for text in found_there["pres"])


@pytest.fixture(scope="module")
def measured(store, run_step, lab_model, tmp_path_factory) -> dict[str, str]:
    """Arms of a lab model, `name=runs:/ID` by name; `mine` is outside of the plan."""
    path = tmp_path_factory.mktemp("problems") / "final.parquet"
    records.write(path, Problem, world.problems(40, 5))
    common = {
        "model": lab_model,
        "problems": path,
        "engine": "transformers",
        "max_tokens": 40,
        "top_k": 0,
        "top_p": 1.0,
    }
    temperatures = {"base": 1.0, "ssd-same-decoding": 0.0, "mine": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "generation", lambda *_: Figure(figsize=(1, 1)))  # slow to draw, and not looked at
        runs = {arm: run_step("evaluate", arm=arm, temperature=t, **common) for arm, t in temperatures.items()}
    return {arm: f"{arm}=runs:/{run.info.run_id}" for arm, run in runs.items()}


def artifact(run, name: str) -> str:
    return Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/{name}")).read_text()


def test_each_reading_of_a_set_is_counted_once_and_a_deleted_one_too(run_step, measured):
    two = f"{measured['base']},{measured['ssd-same-decoding']}"
    first = run_step("compare", arms=two)
    again = run_step("compare", arms=f"{measured['ssd-same-decoding']},{measured['base']}")
    assert [run.data.metrics["reading"] for run in (first, again)] == [1, 1]
    mlflow.delete_run(first.info.run_id)
    mlflow.delete_run(again.info.run_id)
    other = run_step("compare", arms=f"{two},{measured['mine']}")
    verdict = json.loads(artifact(other, "verdict.json"))
    assert verdict["reading"] == other.data.metrics["reading"] == 2
    assert "reading 2 of the set final" in other.data.tags["mlflow.note.content"]
    comparison = json.loads(artifact(other, "comparison.json"))
    assert list(comparison["p_outside_plan"]) == ["mine"]
    assert {len(groups) for groups in comparison["by_level"].values()} == {
        len({p.level for p in world.problems(40, 5)})
    }


def test_a_report_is_written_from_a_verdict_and_its_runs(run_step, measured, monkeypatch):
    compared = run_step("compare", arms=",".join(measured.values()), chosen_on="val")
    uri = f"runs:/{compared.info.run_id}/verdict.json"
    run = run_step("report", verdict=uri)
    text, markdown = artifact(run, "report.html"), artifact(run, "report.md")
    verdict, comparison = read_files(
        mlflow.artifacts.download_artifacts(uri), tracking.local_path(uri.replace("verdict", "comparison"))
    )
    assert page.sentence(verdict) in html.unescape(text)
    for name in re.findall(r"!\[.*?\]\((figures/\w+\.png)\)", markdown):
        assert Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/{name}")).stat().st_size > 1000
    for each in measured.values():
        assert each.split("/")[1] in text and each.split("/")[1] in markdown
    assert f"verdict={uri}" in text
    for arm, row in comparison.pass_at_1.items():
        run_id = comparison.arms[arm].run_id
        assert row.value == pytest.approx(mlflow.get_run(run_id).data.metrics["pass_at_1"])
        assert comparison.arms[arm].health["length_stop_rate"].value == pytest.approx(
            mlflow.get_run(run_id).data.metrics["length_stop_rate"]
        )
