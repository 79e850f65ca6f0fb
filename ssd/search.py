"""Search settings by trials that grow: the space, which trial comes next, when it is stopped, which one is the best.

A trial is measured on growing nested parts of the problems and stopped where its paired interval against the best
complete trial excludes winning. What a trial found stands in the Optuna study alone, so that workers on several
machines share it and a killed one's trial is taken up again.
"""

import contextlib
import functools
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import sqlalchemy
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from scipy import special
from scipy.stats import qmc

from ssd import parameters, processes
from ssd.data import splits
from ssd.records import Problem
from ssd.stats import compare, sequential, surface

# Chance that a trial as good as the best one is stopped, over all looks together: large, since to lose an equal costs
# nothing, and what it would have taken pays for other trials.
ALPHA = 0.3
MIN_PART = 50  # problems of the first look
NUM_CANDIDATES = 1000  # settings among which the next trial is chosen
# From so many trials on, near ones count as one, and the surface is fitted anew where there are a tenth more.
MAX_APART, REFIT_AT = 128, 1.1
HEARTBEAT_S, DEAD_AFTER_S = 30.0, 300.0
POLL_S = 2.0
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Space(NamedTuple):
    """Settings of one family and their ranges; `known` are settings that others found good, each with its `source`."""

    settings: dict[str, BaseDistribution]
    known: list[dict[str, Any]]


class Attempt(NamedTuple):
    """What became of a trial: correct_PS of the first len(correct_PS) problems; its tokens and run; `notes` to keep."""

    correct_PS: NDArray
    num_tokens: int
    run_id: str = ""
    notes: dict[str, Any] | None = None


class Trial(NamedTuple):
    """A finished trial; `stopped` before all problems were measured. `level` is what was told to Optuna."""

    number: int
    params: dict[str, Any]
    source: str
    level: float
    stopped: bool
    attempt: Attempt


# attempt(folder, params, best_PS) measures a trial, raced against the best complete one, None where there is none yet.
Attempter = Callable[[str, dict[str, Any], NDArray | None], Attempt]


def load_space(path: str) -> dict[str, Space]:
    """Spaces by family of a YAML file: `settings`, each `{low, high, log}` or a list of choices in order, and `known`.

    Raises
    ------
    ValueError
        If a range is none, or a known point lies outside of it or says no source.
    """
    if not Path(path).is_file():
        raise ValueError(f"space={path}: no such file; give a YAML file of settings by family, as in presets/spaces")
    families = parameters.read_yaml(Path(path))
    if not isinstance(families, dict) or not families or not all(map(_is_family, families.values())):
        raise ValueError(f"space={path} does not hold settings by family, as the files in presets/spaces do")
    return {family: _space(path, family, content) for family, content in families.items()}


def _is_family(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        return False
    known = content.get("known", [])
    return bool(content["settings"]) and isinstance(known, list) and all(isinstance(point, dict) for point in known)


def _space(path: str, family: str, content: dict[str, Any]) -> Space:
    settings = {name: _distribution(path, name, given) for name, given in content["settings"].items()}
    for point in content.get("known", []):
        if point.keys() != {*settings, "source"}:
            raise ValueError(f"space={path}: {family} knows {point}; it needs source, {', '.join(settings)}")
        for name, distribution in settings.items():
            if not _holds(distribution, point[name]):
                raise ValueError(f"space={path}: {family} knows {name}={point[name]}, outside {distribution}")
    return Space(settings, content.get("known", []))


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (TypeError, ValueError):  # a text where a number belongs
        return False


def _distribution(path: str, name: str, given: Any) -> BaseDistribution:
    try:
        if isinstance(given, list):
            return CategoricalDistribution(given)
        is_int = all(isinstance(given[end], int) for end in ("low", "high"))
        return (IntDistribution if is_int else FloatDistribution)(**given)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"space={path}: {name}: {given} is neither {{low, high, log}} nor a list ({error})") from error


def corners(space: Space) -> list[dict[str, Any]]:
    """The settings of `space` at their highest, with each choice in turn: what honours these honours all of it."""
    highest = _from_unit(space.settings, np.ones(len(space.settings)))
    lists = {name: each.choices for name, each in space.settings.items() if isinstance(each, CategoricalDistribution)}
    others = [highest | {name: choice} for name, choices in lists.items() for choice in choices]
    return [highest, *(each for each in others if each != highest)]


def nested(problems: Sequence[Problem], seed: int) -> tuple[list[Problem], list[int]]:
    """`problems` in an order whose beginnings are parts, each proportional to source and level, and the parts' sizes.

    Each part is half of the next, down to MIN_PART.
    """
    parts = [list(problems)]
    while len(parts[0]) >= 2 * MIN_PART:
        parts.insert(0, splits.draw_quick(parts[0], math.ceil(len(parts[0]) / 2), seed))
    return list({problem.problem_id: problem for part in parts for problem in part}.values()), list(map(len, parts))


def race(measure: Callable[[int], NDArray], best_PS: NDArray | None, sizes: Sequence[int], alpha: float) -> NDArray:
    """correct_PS of a trial on as many problems as it took: all, or the part at which it could no longer win.

    At each part the upper end of the paired interval of trial - best, at the confidence that alpha spending leaves to
    this look, is compared with 0. A trial that is as good as `best_PS` is stopped with chance `alpha` at most, where
    `best_PS` was not itself picked for its luck.
    """
    for size, confidence in zip(sizes, _confidences(tuple(sizes), alpha)):
        correct_PS = measure(size)
        if best_PS is not None and size < sizes[-1]:
            difference = compare.paired(correct_PS, best_PS[:size], confidence=confidence, num_permutations=1)
            if difference.ci_high < 0:
                break
    return correct_PS


@functools.cache
def _confidences(sizes: tuple[int, ...], alpha: float) -> list[float]:
    """Two-sided confidence at each part whose upper end is that of a one-sided test at the spending bound."""
    return (2 * special.ndtr(sequential.bounds(np.array(sizes) / sizes[-1], alpha)) - 1).tolist()


class SurfaceSampler(optuna.samplers.BaseSampler):
    """The next trial: where a surface through all trials, each with its own noise, is expected to improve the most.

    The first trials fill the space. Trials that other workers are at count as if they had come out as expected.
    Optuna's own samplers take a trial on 60 problems for as sure as one on 1,000.
    """

    def __init__(self, space: Space, seed: int):
        self.space, self.seed = space, seed
        self.num_fitted, self.fitted = 0, (math.nan, np.array([]))  # trials, and the scale and lengths through them

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.space.settings

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Mapping) -> dict[str, Any]:
        settings, everyone = self.space.settings, study.get_trials(deepcopy=False)
        place = _place(everyone, trial)
        rng = np.random.default_rng([self.seed, place])
        trials = [other for other in everyone if other.state == TrialState.COMPLETE]
        if place < 2 + 2 * len(settings) or len(trials) < 2:
            halton = qmc.Halton(len(settings), rng=np.random.default_rng(self.seed))
            return _from_unit(settings, halton.fast_forward(place).random(1)[0])
        x_TD = np.array([_to_unit(settings, each.params) for each in trials])
        y_T, variance_T = _levels(trials)
        at_work = [other for other in everyone if other.state == TrialState.RUNNING]
        x_RD = [_to_unit(settings, each.params) for each in at_work if each.params.keys() == settings.keys()]
        if x_RD:
            expected_R, _ = self._surface(trials, x_TD, y_T, variance_T).at(x_RD)
            x_TD, y_T = np.vstack([x_TD, x_RD]), np.append(y_T, expected_R)
            variance_T = np.append(variance_T, np.full(len(x_RD), np.median(variance_T)))
        fitted = self._surface(trials, x_TD, y_T, variance_T)
        near_QD = x_TD[rng.integers(len(x_TD), size=NUM_CANDIDATES // 2)]
        near_QD = np.clip(near_QD + rng.normal(0, 0.1, near_QD.shape), 0, 1)
        x_QD = np.vstack([rng.random((NUM_CANDIDATES - len(near_QD), len(settings))), near_QD])
        x_QD = _on_choices(settings, x_QD)
        best = fitted.at(x_TD)[0].max()
        return _from_unit(settings, x_QD[np.argmax(surface.expected_improvement(*fitted.at(x_QD), best))])

    def _surface(
        self, trials: Sequence[FrozenTrial], x_TD: NDArray, y_T: NDArray, variance_T: NDArray
    ) -> surface.Surface:
        """The surface through these trials, of which `trials` are complete."""
        if len(y_T) <= MAX_APART:
            return surface.fit(x_TD, y_T, variance_T)
        # A number of trials that does not depend on when this process began.
        num_fitted = int(MAX_APART * REFIT_AT ** math.floor(math.log(len(trials) / MAX_APART, REFIT_AT)))
        if self.num_fitted != num_fitted:
            fitted = surface.fit(*surface.merged(x_TD[:num_fitted], *_levels(trials[:num_fitted]), MAX_APART))
            self.num_fitted, self.fitted = num_fitted, (fitted.scale, fitted.lengths_D)
        return surface.through(*surface.merged(x_TD, y_T, variance_T, MAX_APART), *self.fitted)

    def sample_independent(self, study, trial, param_name, param_distribution) -> Any:
        raise AssertionError(f"{param_name} is not among the settings")


def _place(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> int:
    """How many of `trials` come before `trial`: one that was begun again counts once, as if nothing had been killed."""
    before = [each for each in trials if each.number < trial.number]
    return len({_origin(each) for each in before if each.state != TrialState.FAIL})


def _origin(trial: FrozenTrial) -> str:
    """The trial that `trial` stands for: itself, a known point, or one whose worker died."""
    return trial.user_attrs.get("origin", str(trial.number))


def _to_unit(settings: Mapping[str, BaseDistribution], params: Mapping[str, Any]) -> list[float]:
    """`params` in the unit cube; choices by their place in the list."""
    found = []
    for name, distribution in settings.items():
        if isinstance(distribution, CategoricalDistribution):
            found.append(distribution.choices.index(params[name]) / max(1, len(distribution.choices) - 1))
        else:
            change = math.log if distribution.log else float
            low, high = change(distribution.low), change(distribution.high)
            found.append((change(params[name]) - low) / (high - low))
    return found


def _from_unit(settings: Mapping[str, BaseDistribution], x_D: NDArray) -> dict[str, Any]:
    found = {}
    for (name, distribution), x in zip(settings.items(), x_D, strict=True):
        if isinstance(distribution, CategoricalDistribution):
            found[name] = distribution.choices[round(x * (len(distribution.choices) - 1))]
        else:
            change, back = (math.log, math.exp) if distribution.log else (float, float)
            low, high = change(distribution.low), change(distribution.high)
            value = min(max(back(low + x * (high - low)), distribution.low), distribution.high)
            found[name] = round(value) if isinstance(distribution, IntDistribution) else float(f"{value:.3g}")
    return found


def _on_choices(settings: Mapping[str, BaseDistribution], x_QD: NDArray) -> NDArray:
    """Rows of the unit cube moved to where `_to_unit` has the settings that `_from_unit` makes of them."""
    moved_QD = np.empty_like(x_QD)
    for d, distribution in enumerate(settings.values()):
        if isinstance(distribution, CategoricalDistribution):
            num_steps = len(distribution.choices) - 1
            moved_QD[:, d] = np.round(x_QD[:, d] * num_steps) / max(1, num_steps)
            continue
        change, back = (np.log, np.exp) if distribution.log else (np.float64, np.asarray)
        low, high = change(distribution.low), change(distribution.high)
        values_Q = np.clip(back(low + x_QD[:, d] * (high - low)), distribution.low, distribution.high)
        if isinstance(distribution, IntDistribution):
            values_Q = np.round(values_Q)
        else:  # three digits
            sizes_Q = np.abs(np.where(values_Q == 0, 1, values_Q))
            last_Q = 10.0 ** (np.floor(np.log10(sizes_Q)) - 2)
            values_Q = np.round(values_Q / last_Q) * last_Q
        moved_QD[:, d] = ((np.log(values_Q) if distribution.log else values_Q) - low) / (high - low)
    return moved_QD


def choose(trials: Sequence[Trial], space: Space) -> Trial:
    """The trial at which the surface through all of them is the highest: one trial's luck is not its neighbours'."""
    x_TD = np.array([_to_unit(space.settings, trial.params) for trial in trials])
    y_T, variance_T = surface.level_parts([trial.attempt.correct_PS for trial in trials])
    fitted = surface.fit(*surface.merged(x_TD, y_T, variance_T, MAX_APART))
    if len(trials) > MAX_APART:
        fitted = surface.through(x_TD, y_T, variance_T, fitted.scale, fitted.lengths_D)
    return trials[int(np.argmax(fitted.at(x_TD)[0]))]


def tokens_saved(trials: Sequence[Trial], num_problems: int) -> int:
    """Tokens that stopped trials would have taken on the rest of `num_problems`, at their tokens a problem so far."""
    return round(sum(t.attempt.num_tokens * (num_problems / len(t.attempt.correct_PS) - 1) for t in trials))


def open_study(storage: optuna.storages.BaseStorage, name: str, space: Space, seed: int) -> Study:
    """The study `name` in `storage`, begun where there is none."""
    # MLflow's storage would begin a second study of the same name.
    find = getattr(storage, "get_study_id_by_name_if_exists", lambda name: None)
    sampler = SurfaceSampler(space, seed)
    if find(name) is not None:
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    return optuna.create_study(
        study_name=name, storage=storage, sampler=sampler, direction="maximize", load_if_exists=True
    )


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Optuna's storage in the database at `url`, in SQLAlchemy's words."""
    for attempts_left in (2, 1, 0):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except sqlalchemy.exc.SQLAlchemyError as error:  # of two workers that begin at once, one finds half the tables
            if not attempts_left:
                shown = sqlalchemy.engine.make_url(url).render_as_string() if "://" in url else url
                remedy = (
                    "make it writable, or, where it is damaged, remove it and its trials begin again"
                    if shown.startswith("sqlite")
                    else "start the database or give another"
                )
                raise ValueError(f"storage={shown}: {str(error).splitlines()[0]}; {remedy}") from error
            time.sleep(1)


def open_local(path: Path) -> optuna.storages.RDBStorage:
    """Optuna's storage in the SQLite file at `path`, which does not wait for the disk.

    A killed process loses nothing by that. A power cut may damage the file; the samples of its trials are still there.
    """
    storage = open_storage(f"sqlite:///{path}")

    def do_not_wait(connection, _) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    sqlalchemy.event.listen(storage.engine, "connect", do_not_wait)
    storage.engine.dispose()  # connections from before
    return storage


def run(study: Study, space: Space, num_trials: int, attempt: Attempter, wait: bool = True) -> list[Trial]:
    """Take part in `study` until `num_trials` are finished, or without `wait` until all are begun; what is finished.

    The known points come first. Any number of workers may do this on one study. A trial whose worker died is enqueued
    again, once; of two that stand for the same one the first counts.
    """
    for number, known in enumerate(space.known[:num_trials]):
        begun = {each.user_attrs.get("origin") for each in study.get_trials(deepcopy=False)}
        if f"known-{number}" not in begun:
            params = {name: known[name] for name in space.settings}
            study.enqueue_trial(params, user_attrs={"origin": f"known-{number}", "source": known["source"]})
    while True:
        trials = _requeue(study)
        counts = {state: sum(each.state == state for each in trials) for state in TrialState}
        if not counts[TrialState.WAITING] and counts[TrialState.COMPLETE] + counts[TrialState.RUNNING] >= num_trials:
            if not counts[TrialState.RUNNING] or not wait:
                return finished(study)
            time.sleep(POLL_S)
            continue
        trial = study.ask(space.settings)
        trial.set_user_attr("worker", f"{socket.gethostname()} {processes.this()}")
        trials = study.get_trials(deepcopy=False)
        asked = next(each for each in reversed(trials) if each.number == trial.number)
        if _is_surplus(trials, asked, num_trials):
            study.tell(trial, state=TrialState.FAIL)
            continue
        with _heartbeat(trial):
            complete = _longest([each for each in trials if each.state == TrialState.COMPLETE])
            best = max(complete, key=lambda each: _means(each).mean(), default=None)
            measured = attempt(_origin(asked), dict(asked.params), None if best is None else _correct(best))
            right = " ".join(f"{right:g}" for right in measured.correct_PS.sum(axis=1))
            # One value, since each is a transaction.
            values = {"num_samples": measured.correct_PS.shape[1], "right": right, "num_tokens": measured.num_tokens}
            trial.set_user_attr("attempt", values | {"run_id": measured.run_id, "notes": measured.notes})
        # The others, that were stopped, do not change its level.
        means_P = [*map(_means, complete), measured.correct_PS.mean(axis=1)]
        levels, _ = surface.level_means(means_P, [measured.correct_PS.shape[1]] * len(means_P))
        study.tell(trial, float(levels[-1]), skip_if_finished=True)


def _longest(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that were not stopped."""
    longest = max((len(_means(each)) for each in trials), default=0)
    return [each for each in trials if len(_means(each)) == longest]


def finished(study: Study) -> list[Trial]:
    """Complete trials of `study`."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    counts = [_correct(each) for each in trials]
    longest = max(map(len, counts), default=0)
    return [
        Trial(
            each.number,
            each.params,
            each.user_attrs.get("source", "search"),
            each.value,
            len(correct_PS) < longest,
            Attempt(correct_PS, *(each.user_attrs["attempt"][name] for name in ("num_tokens", "run_id", "notes"))),
        )
        for each, correct_PS in zip(trials, counts)
    ]


def _correct(trial: FrozenTrial) -> NDArray:
    """correct_PS from the number of right samples by problem; which of them are right makes no difference here."""
    right_P = np.array(trial.user_attrs["attempt"]["right"].split(), dtype=float)
    return (np.arange(trial.user_attrs["attempt"]["num_samples"]) < right_P[:, None]).astype(float)


def _means(trial: FrozenTrial) -> NDArray:
    """Share of right samples by problem."""
    measured = trial.user_attrs["attempt"]
    return _means_of(measured["right"], measured["num_samples"])


@functools.lru_cache(maxsize=4096)  # every trial to come asks for those of all that are finished
def _means_of(right: str, num_samples: int) -> NDArray:
    means_P = np.array(right.split(), dtype=float) / num_samples
    means_P.setflags(write=False)
    return means_P


def _levels(trials: Sequence[FrozenTrial]) -> tuple[NDArray, NDArray]:
    """Levels of complete trials, as if each had done all problems, and their variances."""
    return surface.level_means(
        [_means(each) for each in trials], [each.user_attrs["attempt"]["num_samples"] for each in trials]
    )


def _requeue(study: Study) -> list[FrozenTrial]:
    """Enqueue again what a dead worker was at, before that trial is ended: a kill between the two doubles nothing.

    Returns the trials that there are then.
    """
    trials = study.get_trials(deepcopy=False)
    dead = [trial for trial in trials if trial.state == TrialState.RUNNING and not _is_alive(trial)]
    for trial in dead:
        origin = _origin(trial)
        again = [t for t in trials if t.number > trial.number and t.user_attrs.get("origin") == origin]
        if trial.params and not any(t.state != TrialState.FAIL for t in again):
            attrs = {"origin": origin, "source": trial.user_attrs.get("source", "search")}
            study.enqueue_trial(trial.params, user_attrs=attrs)
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    return study.get_trials(deepcopy=False) if dead else trials


def _is_alive(trial: FrozenTrial) -> bool:
    host, _, worker = trial.user_attrs.get("worker", " ").partition(" ")
    if host == socket.gethostname() and not processes.is_alive(worker):
        return False
    seen_at = trial.user_attrs.get("seen_at", trial.datetime_start.timestamp())
    return time.time() - seen_at < DEAD_AFTER_S


def _is_surplus(trials: Sequence[FrozenTrial], trial: FrozenTrial, num_trials: int) -> bool:
    """Whether another worker has the same trial, or took the last one at the same moment."""
    others = [
        each
        for each in trials
        if each.number < trial.number and each.state in (TrialState.RUNNING, TrialState.COMPLETE)
    ]
    origin = trial.user_attrs.get("origin")
    if origin is None:
        return len(others) >= num_trials
    return any(_origin(each) == origin for each in others)


@contextlib.contextmanager
def _heartbeat(trial: optuna.Trial) -> Iterator[None]:
    """Say in the study, for workers on other machines, that this one lives."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_S):
            trial.set_user_attr("seen_at", time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
