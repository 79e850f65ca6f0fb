"""The paper's grid on a model of the lab: T_train x truncation x T_eval (arXiv 2604.01193, section 3.4 and C.2).

Run: python -m benchmarks.scale MODEL FOLDER [--preset lab-h200] [--shard 0/1]
     python -m benchmarks.scale report GRID.parquet

MODEL is that of a finished run of `lab`. For each training temperature and top-p the model is sampled, trained on its
samples and decoded, untruncated, at every evaluation temperature; the untrained model is decoded too. All else is the
preset's. FOLDER keeps what is done, and the same command goes on there; several shards, each with its own
CUDA_VISIBLE_DEVICES, divide the trainings among them. FOLDER/grid.parquet holds what is done: of each problem and cell
how many of n samples are right. `report` prints from it, and draws beside it, the two questions:

- does pass@1 depend on T_train and T_eval by their product alone? R^2 and peak of a polynomial in the product's
  logarithm, of degree 4: over a grid so wide that pass@1 ends near nothing, the paper's parabola has no peak.
- does truncation raise the ceiling? The best cell of each truncation; it is chosen on one half of the problems and
  measured on the other, and the halves then change places, so that no cell is measured where it was chosen.
"""

import argparse
import gc
import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from ssd import parameters, records
from ssd.decoding import Decoding
from ssd.grades import correct_matrix
from ssd.grading import grader
from ssd.lab import world
from ssd.report.text import percent, points
from ssd.stats import compare, estimate

T_TRAIN = (0.7, 1.0, 1.5)
TOP_P = (1.0, 0.95, 0.85)
T_EVAL = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0)
UNTRAINED = "untrained"
NUM_BOOTSTRAPS = 1000
RIDGE_DEGREE = 4
Cell = tuple[float, float, float]  # T_train and top-p, NaN where nothing was trained, and T_eval


def run(args: argparse.Namespace) -> None:
    from ssd import sampling  # torch takes seconds to load, and a report does without
    from ssd.training.rows import rows
    from ssd.training.sft import train as fine_tune

    prepare, sample, train = (parameters.preset_values(args.preset, name) for name in ("prepare", "sample", "train"))
    engine, folder = args.engine or sample["engine"], args.folder
    train_size = args.train_size or prepare["train_size"]
    of = world.WORLDS[prepare["train_sources"]]
    problems = world.problems(train_size + args.num_problems, args.seed, of)
    training, held_out = problems[:train_size], problems[train_size:]
    shard, num_shards = map(int, args.shard.split("/"))
    trainings = list(itertools.product(T_TRAIN, TOP_P))[shard::num_shards]
    decodings = {f"T{t:g}": Decoding(temperature=t, max_tokens=sample["max_tokens"]) for t in T_EVAL}

    def evaluate(name: str, sampler: "sampling.Sampler", t_train: float, top_p: float) -> None:
        drawn = sampler.generate(held_out, decodings, args.n, args.seed + 1, folder / f"evaluate-{name}")
        cells = []
        for t_eval, generated in zip(T_EVAL, drawn.values()):
            ids, correct_PS = correct_matrix(grader.grade(generated.samples, held_out, generated.manifest["thinks"]))
            cells.append(
                pa.table(
                    {"t_train": [t_train] * len(ids), "top_p": [top_p] * len(ids), "t_eval": [t_eval] * len(ids),
                     "problem_id": ids, "num_right": correct_PS.sum(1).astype(np.int16),
                     "n": np.full(len(ids), args.n, np.int16)}
                )
            )  # fmt: skip
        records.write_table(folder / f"cells-{name}.parquet", pa.concat_tables(cells))
        shutil.rmtree(folder / f"evaluate-{name}")
        done = [pq.read_table(part) for part in sorted(folder.glob("cells-*.parquet"))]
        records.write_table(folder / "grid.parquet", pa.concat_tables(done))

    waiting = {f"T{t:g}-p{p:g}": (t, p) for t, p in trainings if not (folder / f"cells-T{t:g}-p{p:g}.parquet").exists()}
    base = sampling.Sampler(args.model, engine, "", closes=True)
    at = {name: Decoding(temperature=t, top_p=p, max_tokens=sample["max_tokens"]) for name, (t, p) in waiting.items()}
    drawn = base.generate(training, at, sample["n"], args.seed, folder / "samples") if at else {}
    if shard == 0 and not (folder / f"cells-{UNTRAINED}.parquet").exists():
        evaluate(UNTRAINED, base, np.nan, np.nan)
    base.close()
    for name, (t_train, top_p) in waiting.items():
        dataset = rows(drawn[name].samples, train["max_length"]).dataset
        settings = {key: train[key] for key in ("lr", "epochs", "global_batch_size", "max_length", "lora_rank")}
        [*_, (_, checkpoint)] = fine_tune(
            args.model, dataset, folder / f"train-{name}", **settings, save_steps=10**6, seed=args.seed,
            on_log=lambda step, metrics: None,
        )  # fmt: skip
        gc.collect()
        trained = sampling.Sampler(str(checkpoint), engine, "", closes=True)
        evaluate(name, trained, t_train, top_p)
        trained.close()
        shutil.rmtree(folder / f"train-{name}")
        print(f"{name}: done", flush=True)
    print(describe(folder / "grid.parquet"))


def describe(path: Path) -> str:
    """Tables of the grid in `path`, and its figure beside it."""
    correct = _correct(path)
    trained = [cell for cell in correct if not np.isnan(cell[0])]
    num_problems, n = next(iter(correct.values())).shape
    lines = [f"{num_problems:,} problems, {n} samples each; pass@1 in percent.", ""]
    lines += [f"| T_train | top-p | {' | '.join(f'{t:g}' for t in T_EVAL)} |", "| --- " * (2 + len(T_EVAL)) + "|"]
    rows = dict.fromkeys(cell[:2] for cell in trained)
    untrained = [cell for cell in correct if np.isnan(cell[0])]
    if untrained:
        lines.append(f"| {UNTRAINED} | | {_row(correct, untrained)} |")
    lines += [f"| {t:g} | {p:g} | {_row(correct, [cell for cell in trained if cell[:2] == (t, p)])} |" for t, p in rows]
    lines += ["", "| cells | R^2 in T_train T_eval | peak |", "| --- | ---: | --- |"]
    of_top_p = {p: [cell for cell in trained if cell[1] == p] for p in dict.fromkeys(cell[1] for cell in trained)}
    for top_p, cells in of_top_p.items():
        r2, peak, low, high = ridge(correct, cells)
        lines.append(f"| top-p {top_p:g} | {r2:.2f} | {peak:.2f} [{low:.2f}, {high:.2f}] |")
    ceilings = {f"top-p {p:g}": ceiling(correct, cells) for p, cells in of_top_p.items()}
    if untrained:
        ceilings[UNTRAINED] = ceiling(correct, untrained)
    lines += ["", "| cells | ceiling | minus untruncated | minus untrained |", "| --- | --- | --- | --- |"]
    for name, ceiling_PS in ceilings.items():
        against = [
            points(compare.paired(ceiling_PS, ceilings[other])) if other in ceilings.keys() - {name} else ""
            for other in ("top-p 1", UNTRAINED)
        ]
        lines.append(f"| {name} | {percent(estimate.mean(ceiling_PS))} | {' | '.join(against)} |")
    _draw(correct, of_top_p, untrained, path.with_suffix(".png"))
    return "\n".join(lines)


def ridge(correct: dict[Cell, NDArray], cells: Iterable[Cell]) -> tuple[float, float, float, float]:
    """R^2 of a polynomial in log(T_train T_eval) through the means of `cells`, its peak, and the peak's 95% interval.

    The interval is a percentile bootstrap over problems.
    """
    cells = list(cells)
    log_product_C = np.log([t_train * t_eval for t_train, _, t_eval in cells])
    mean_CP = np.array([correct[cell].mean(1) for cell in cells])
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(mean_CP.shape[1], np.full(mean_CP.shape[1], 1 / mean_CP.shape[1]), NUM_BOOTSTRAPS)
    means_CR = np.column_stack([mean_CP.mean(1), mean_CP @ drawn.T / mean_CP.shape[1]])
    fitted = np.polynomial.polynomial.polyfit(log_product_C, means_CR, RIDGE_DEGREE)
    between = np.linspace(log_product_C.min(), log_product_C.max(), 1000)
    peaks_R = np.exp(between[np.polynomial.polynomial.polyval(between, fitted).argmax(1)])
    residual_C = means_CR[:, 0] - np.polynomial.polynomial.polyval(log_product_C, fitted[:, 0])
    low, high = np.percentile(peaks_R[1:], (2.5, 97.5))
    return 1 - residual_C.var() / means_CR[:, 0].var(), peaks_R[0], low, high


def ceiling(correct: dict[Cell, NDArray], cells: Iterable[Cell]) -> NDArray:
    """correct_PS at the best of `cells`, which for each half of the problems is the best one on the other half."""
    cells = list(cells)
    found_PS = np.empty_like(correct[cells[0]])
    is_first_P = np.arange(len(found_PS)) % 2 == 0
    for half_P in (is_first_P, ~is_first_P):
        best = max(cells, key=lambda cell: correct[cell][~half_P].mean())
        found_PS[half_P] = correct[best][half_P]
    return found_PS


def _correct(path: Path) -> dict[Cell, NDArray]:
    """correct_PS of each cell, problems in one order; the first samples of a problem stand for those that are right."""
    table = pq.read_table(path).to_pandas().sort_values("problem_id", kind="stable")
    cells = table.groupby(["t_train", "top_p", "t_eval"], dropna=False, sort=False)
    found = {}
    for cell, rows in sorted(cells, key=lambda pair: [-1 if np.isnan(part) else part for part in pair[0]]):
        (n,) = rows["n"].unique()
        found[cell] = (np.arange(n) < rows["num_right"].to_numpy()[:, None]).astype(float)
    return found


def _row(correct: dict[Cell, NDArray], cells: Iterable[Cell]) -> str:
    by_t_eval = {cell[2]: 100 * correct[cell].mean() for cell in cells}
    return " | ".join(f"{by_t_eval[t]:.1f}" for t in T_EVAL)


def _draw(correct: dict[Cell, NDArray], of_top_p: dict[float, list[Cell]], untrained: list[Cell], path: Path) -> None:
    figure, axes = plt.subplots(1, len(of_top_p), figsize=(3 * len(of_top_p), 3), sharey=True, layout="constrained")
    for axis, (top_p, cells) in zip(np.atleast_1d(axes), of_top_p.items()):
        lines = {f"T_train {t:g}": [cell for cell in cells if cell[0] == t] for t in dict.fromkeys(c[0] for c in cells)}
        for label, of in (lines | ({UNTRAINED: untrained} if untrained else {})).items():
            found = [estimate.mean(correct[cell]) for cell in of]
            bounds = [[e.value - e.ci_low for e in found], [e.ci_high - e.value for e in found]]
            product = [cell[2] * (1 if label == UNTRAINED else cell[0]) for cell in of]
            axis.errorbar(product, [e.value for e in found], bounds, marker=".", label=label)
        axis.set(title=f"trained at top-p {top_p:g}", xlabel="T_train x T_eval", xscale="log")
        axis.set_xticks([0.5, 1, 2], ["0.5", "1", "2"])
        axis.xaxis.set_minor_formatter(NullFormatter())
    np.atleast_1d(axes)[0].set_ylabel("pass@1, 95% interval")
    np.atleast_1d(axes)[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the base model, or report")
    parser.add_argument("folder", type=Path, help="where the grid is kept; for a report, grid.parquet")
    parser.add_argument("--preset", default="lab-h200")
    parser.add_argument("--engine", default="", help="the preset's unless given")
    parser.add_argument("--shard", default="0/1", help="i/n: every nth training from the ith on")
    parser.add_argument("--num_problems", type=int, default=1000)
    parser.add_argument("--train_size", type=int, default=0, help="the preset's unless given")
    parser.add_argument("--n", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.model == "report":
        print(describe(arguments.folder))
    else:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        run(arguments)
