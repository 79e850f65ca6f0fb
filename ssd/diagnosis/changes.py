"""What training changed at the positions that `measure` read, and what that is worth, with intervals.

Letters as there: N all positions, T texts, M positions sampled for the curves. Means are clustered by problem.
"""

import itertools
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ssd.diagnosis.measure import CLASSES, TERMS, Measured
from ssd.stats import estimate
from ssd.stats.estimate import Estimate

QUANTITIES = ("top_1", "entropy", "nucleus_size", "tail_mass", "kept_mass", "gate", "head", "tail", *TERMS)
QUANTITIES += ("cross_entropy", "logprob", "rank", "end_of_thinking", "self_correction")
HEAD_MASS_EDGES = (0.0, 0.95, 0.99, 0.999, 1.0)
LEAST_PROBLEMS = 20  # for a curve of its own


def groups(measured: Measured, model: str) -> dict[str, NDArray]:
    """Positions of each group, as masks of N: CLASSES, which together are all positions, and others that overlap.

    `strict lock`: a lock whose likeliest token is the same under `model`; `swap`: any position where it is not. These
    two are chosen by what training did: top-1 rises on strict locks partly because they were chosen so. `thinking`: up
    to its end. `self-correction`, `end of thinking`: positions at which such a token was taken.
    """
    same_N = measured.of["base"]["top_token"] == measured.of[model]["top_token"]
    found = {name: measured.class_N == index for index, name in enumerate(CLASSES)}
    return found | {
        "thinking": measured.thinking_N,
        "strict lock": found["lock"] & same_N,
        "swap": ~same_N,
        "self-correction": measured.corrects_N,
        "end of thinking": measured.ends_N,
    }


def change(
    measured: Measured, quantity: str, model: str, against: str = "base", mask_N: NDArray | None = None
) -> Estimate:
    """Mean over positions of a quantity of `model` minus that of `against`, clustered by problem."""
    values_N = measured.of[model][quantity] - measured.of[against][quantity].astype(float)
    return mean(measured, values_N, mask_N)


def mean(measured: Measured, values_N: NDArray, mask_N: NDArray | None = None) -> Estimate:
    """Mean of `values_N` over the positions of `mask_N`, clustered by problem; NaN where there are none."""
    mask_N = np.ones(len(values_N), dtype=bool) if mask_N is None else mask_N
    return _by_problem(measured.problem_T[measured.text_N[mask_N]], values_N[mask_N])


def log_ratios(measured: Measured, model: str, masks: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """log p_model / p_base of the tokens taken, by the positions at which `model` is to draw in the base's place.

    `everywhere`; each of `masks`, in which nothing but what stands before a position may decide that it is; `end of
    thinking`: there `model` decides, at every position of the thinking, whether it ends, and the base all else.
    """
    base, after = measured.of["base"], measured.of[model]
    ratio_N = after["logprob"].astype(float) - base["logprob"]
    found = {"everywhere": ratio_N} | {name: np.where(mask_N, ratio_N, 0) for name, mask_N in masks.items()}
    if measured.thinking_N.any():
        chances = [np.clip(of["end_of_thinking"].astype(float), 1e-30, 1 - 1e-7) for of in (after, base)]
        after_N, base_N = (np.where(measured.ends_N, np.log(each), np.log1p(-each)) for each in chances)
        found["end of thinking"] = np.where(measured.thinking_N, after_N - base_N, 0)
    return found


def weights(measured: Measured, log_ratio_N: NDArray) -> NDArray:
    """How many times as likely each text becomes, shape (T,)."""
    return np.exp(np.bincount(measured.text_N, log_ratio_N, len(measured.texts)))


def gain(
    measured: Measured, values_T: NDArray, weight_T: NDArray, drawn_T: NDArray, against_T: NDArray | float = 1.0
) -> Estimate:
    r"""What the mean of `values_T` gains where another model draws some positions in the base's place.

    .. math:: E_{base}\Big[\Big(\prod_t \frac{p_{model}(x_t)}{p_{base}(x_t)} - 1\Big) (y - \bar y)\Big]

    over the texts `drawn_T`, which the base must have drawn at temperature 1 without truncation. The mean weight is 1,
    so that subtracting the mean of y changes nothing but the variance. Clustered by problem; the interval means little
    where `effective` texts are few.

    References
    ----------
    Precup, Sutton and Singh 2000, "Eligibility traces for off-policy policy evaluation".
    """
    values_T, change_T = values_T[drawn_T], (weight_T - against_T)[drawn_T]
    return _by_problem(measured.problem_T[drawn_T], change_T * (values_T - values_T.mean()))


def effective(weight_T: NDArray) -> float:
    """Effective number of texts (Kish 1965): of unweighted ones that would say as much."""
    return float(weight_T.sum() ** 2 / (weight_T @ weight_T))


def summary(measured: Measured, drawn_T: NDArray, truth_N: NDArray | None = None, least_effective: float = 100) -> dict:
    """What is reported of `measured`, every mean with its interval over problems.

    `positions`: number of positions by group. `changes`: rows of group, model, against, quantity, the mean `before` and
    the estimate of the change. `loss`: what each class, and all, add to the change of each term and of their sum, over
    all positions. `gains`:
    rows of where, model, against, accuracy or tokens (see `gain`), from the texts `drawn_T`; left out below
    `least_effective` texts. `truth`, where `truth_N` names what each position really is: counts by kind and class,
    precision and recall.
    """
    trained = [name for name in measured.of if name != "base"]
    pairs = [(name, "base") for name in trained] + ([("model", "control")] if "control" in trained else [])
    kinds = {} if truth_N is None else {f"true {kind}": truth_N == kind for kind in np.unique(truth_N).tolist()}
    found: dict = {"num_texts": len(measured.texts), "num_positions": len(measured.text_N)}
    found |= {"num_problems": len(np.unique(measured.problem_T)), "positions": {}, "changes": [], "loss": []}
    for model, against in pairs:
        everything = np.ones(len(measured.text_N), dtype=bool)
        of_model = {"all": everything} | groups(measured, model) | kinds
        if model == "model":
            found["positions"] = {name: int(mask_N.sum()) for name, mask_N in of_model.items()}
        for (group, mask_N), quantity in itertools.product(of_model.items(), QUANTITIES):
            if mask_N.any() and quantity in measured.of[model]:
                before = mean(measured, measured.of[against][quantity], mask_N)
                found["changes"].append(
                    {"group": group, "model": model, "against": against, "quantity": quantity, "before": before,
                     "num_positions": int(mask_N.sum()),
                     "estimate": change(measured, quantity, model, against, mask_N)}
                )  # fmt: skip
        moved = {term: measured.of[model][term].astype(float) - measured.of[against][term] for term in TERMS}
        moved["loss"] = sum(moved.values())
        masks = {name: measured.class_N == index for index, name in enumerate(CLASSES)} | {"all": everything}
        for (name, mask_N), (term, moved_N) in itertools.product(masks.items(), moved.items()):
            added = mean(measured, np.where(mask_N, moved_N, 0))
            found["loss"].append({"class": name, "model": model, "against": against, "term": term, "estimate": added})
    if drawn_T.any():
        found["gains"] = _gains(measured, pairs, drawn_T, kinds, least_effective)
    if truth_N is not None:
        found["truth"] = _against_truth(measured, truth_N)
    return found


def _share(measured: Measured, yes_N: NDArray, mask_N: NDArray) -> Estimate:
    """Share of `yes_N` among `mask_N`, with Wilson's interval at the effective number of positions."""
    share = mean(measured, yes_N.astype(float), mask_N)
    if not share.n:
        return share
    spread = share.value * (1 - share.value)
    interval = estimate.wilson(share.value, spread / share.se**2 if spread and share.se > 0 else share.n)
    return share._replace(ci_low=interval.low, ci_high=interval.high)


def carriers(measured: Measured) -> list[dict]:
    """What was read: for each arm its texts, their tokens with an interval, and their outcomes."""
    found = []
    tokens_T = np.array([float(len(text.sample.token_ids)) for text in measured.texts])
    for arm in sorted({text.arm for text in measured.texts}):
        of_arm_T = np.array([text.arm == arm for text in measured.texts])
        outcomes = Counter(text.outcome or "not graded" for text in measured.texts if text.arm == arm)
        tokens = _by_problem(measured.problem_T[of_arm_T], tokens_T[of_arm_T])
        found.append({"arm": arm, "num_texts": int(of_arm_T.sum()), "tokens": tokens, "outcomes": dict(outcomes)})
    return found


def positions(measured: Measured, chosen_M: NDArray) -> dict[str, NDArray]:
    """A column for everything that was measured at the positions `chosen_M`, `model.quantity`."""
    text_M = measured.text_N[chosen_M]
    columns = {
        "problem_id": np.array([text.sample.problem_id for text in measured.texts])[text_M],
        "sample_index": np.array([text.sample.sample_index for text in measured.texts])[text_M],
        "arm": np.array([text.arm for text in measured.texts])[text_M],
        "index": measured.index_N[chosen_M],
        "token": measured.token_N[chosen_M],
        "class": np.array(CLASSES)[measured.class_N[chosen_M]],
    }
    of = {f"{model}.{name}": each_N for model, of in measured.of.items() for name, each_N in of.items()}
    return columns | {name: each_N[chosen_M] for name, each_N in of.items()}


def mean_curves(measured: Measured) -> dict[str, dict[str, list[Estimate]]]:
    """The paper's figure 6, by curve and model: each point's mean over the sampled positions, clustered by problem.

    `cumulative_mass` over ranks 1, 2, ...; `num_surviving` and `entropy_left` over EVAL_TEMPERATURES; and `entropy_left
    LOW-HIGH`, the last one where the base's HEAD_TOKENS likeliest tokens hold such a mass, and at locks and forks.
    """
    problem_M = measured.problem_T[measured.text_N[measured.sampled_M]]

    def averaged(name: str, mask_M: NDArray) -> dict[str, list[Estimate]]:
        return {
            model: [_by_problem(problem_M[mask_M], column_M[mask_M].astype(float)) for column_M in of[name].T]
            for model, of in measured.curves.items()
        }

    everywhere_M, mass_M = np.ones(len(problem_M), dtype=bool), measured.curves["base"]["head_mass"][:, 0]
    found = {name: averaged(name, everywhere_M) for name in ("cumulative_mass", "num_surviving", "entropy_left")}
    for low, high in itertools.pairwise(HEAD_MASS_EDGES):
        mask_M = (mass_M >= low) & ((mass_M < high) | (high == 1))
        if len(np.unique(problem_M[mask_M])) >= LEAST_PROBLEMS:
            found[f"entropy_left {low:g}-{high:g}"] = averaged("entropy_left", mask_M)
    class_M = measured.class_N[measured.sampled_M]
    return found | {f"entropy_left at {name}s": averaged("entropy_left", class_M == CLASSES.index(name))
                    for name in ("lock", "fork") if (class_M == CLASSES.index(name)).any()}  # fmt: skip


def _gains(measured: Measured, pairs, drawn_T: NDArray, kinds: Mapping[str, NDArray], least_effective: float) -> list:
    values = {"tokens": np.array([float(len(text.sample.token_ids)) for text in measured.texts])}
    if all(text.outcome for text, drawn in zip(measured.texts, drawn_T) if drawn):
        values["accuracy"] = np.array([float(text.outcome == "right") for text in measured.texts])
    masks = {name: measured.class_N == index for index, name in enumerate(CLASSES)} | kinds
    ratios = {model: log_ratios(measured, model, masks) for model in sorted(set(itertools.chain(*pairs)) - {"base"})}
    rows = []
    for model, against in pairs:
        for where, ratio_N in ratios[model].items():
            weight_T = weights(measured, ratio_N)
            against_T = 1.0 if against == "base" else weights(measured, ratios[against][where])
            size = min(effective(weight_T[drawn_T]), effective(np.broadcast_to(against_T, weight_T.shape)[drawn_T]))
            for name, values_T in values.items():
                gained = gain(measured, values_T, weight_T, drawn_T, against_T) if size >= least_effective else None
                rows.append({"where": where, "model": model, "against": against, "value": name,
                             "effective_texts": size, "estimate": gained})  # fmt: skip
    return rows


def _against_truth(measured: Measured, truth_N: NDArray) -> dict:
    counts = {
        kind: {name: int(((truth_N == kind) & (measured.class_N == index)).sum()) for index, name in enumerate(CLASSES)}
        for kind in np.unique(truth_N).tolist()
    }
    scores = {
        kind: {
            "precision": _share(measured, truth_N == kind, measured.class_N == CLASSES.index(kind)),
            "recall": _share(measured, measured.class_N == CLASSES.index(kind), truth_N == kind),
        }
        for kind in ("lock", "fork")
    }
    return {"counts": counts, "scores": scores}


def _by_problem(problem_X: NDArray, values_X: NDArray) -> Estimate:
    sums_C, sizes_C = np.bincount(problem_X, values_X), np.bincount(problem_X)
    return estimate.of_clusters(sums_C[sizes_C > 0], sizes_C[sizes_C > 0])
