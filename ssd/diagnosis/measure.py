"""Locks and forks: what each model says at every position of texts that all models read alike.

Letters: B positions, V vocabulary, K tokens that a truncation looks at, N all positions, T texts. S is the set of
tokens that the base model's training decoding keeps at a position, q its distribution there (tempered, truncated and
renormalised), p a model's own, and p(S) the kept mass. Definitions are those of arXiv 2604.01193, section 4 and
appendix B; what the paper leaves open (when is a position a lock) stands in `Rules`.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ssd import models, prompts
from ssd.decoding import Decoding
from ssd.engines.logits import truncate
from ssd.records import Sample

CLASSES = ("certain", "lock", "fork", "diffuse")
TERMS = ("support", "reshaping", "alignment")
SELF_CORRECTION = ("wait", "hmm", "actually", "alternatively", "however", "oops")
END_OF_THINKING = "</think>"
LENGTH_BANDS = 3
TOKENS_PER_BATCH = 1 << 15  # padded, as in training
CELLS_PER_CHUNK = 1 << 26  # positions x vocabulary of one model's logits held at a time
LONGEST_NUCLEUS = 1024
# The curves of the paper's figure 6.
NUM_RANKS = 60
EVAL_TEMPERATURES = tuple(round(0.4 + 0.2 * step, 1) for step in range(9))
HEAD_TOKENS = 20
CURVE_POSITIONS = 8192


@dataclasses.dataclass(frozen=True)
class Rules:
    """When a position is what, by the base model's distribution there alone, so that a class is no result of training.

    The head of a position is its likeliest token and that token's rivals, the rest its tail. `certain`: one token, and
    the tail below `least_tail`. `lock`: one token, and a tail. `fork`: several tokens. `diffuse`: the head holds less
    than `least_head_mass`.

    Parameters
    ----------
    rival_ratio : float
        A rival is at least this times as likely as the likeliest. 0.1 is what min-p is run with; every state of the
        paper's toy automaton then falls into its class.
    least_tail : float
        A tail below this could not cost a percent of the runs.
    least_head_mass : float
        A head below this is no more likely than its tail.
    nucleus_mass : float
        Of the nucleus whose size is reported.
    """

    rival_ratio: float = 0.1
    least_tail: float = 0.01
    least_head_mass: float = 0.5
    nucleus_mass: float = 0.95


class Text(NamedTuple):
    """A carrier: a stored sample, the arm it was drawn by, and what became of it ('' where it was not graded)."""

    sample: Sample
    arm: str
    outcome: str


class Truncated(NamedTuple):
    """q: log-probabilities of the tokens `ids_BK`, minus infinity outside S."""

    log_q_BK: Tensor
    ids_BK: Tensor


class Measured(NamedTuple):
    """Every position of `texts`: where it is, the token taken, its class, and what was measured of each model.

    `thinking_N` are the positions within the thinking, `ends_N` those at which it was ended, `corrects_N` those at
    which a word of SELF_CORRECTION was taken. `curves[model][name]` holds the values of `curves` at the positions
    `sampled_M`. `problem_T` numbers the problems, the unit of intervals.
    """

    texts: Sequence[Text]
    problem_T: NDArray
    text_N: NDArray
    index_N: NDArray
    token_N: NDArray
    class_N: NDArray
    thinking_N: NDArray
    ends_N: NDArray
    corrects_N: NDArray
    of: dict[str, dict[str, NDArray]]
    sampled_M: NDArray
    curves: dict[str, dict[str, NDArray]]


def choose(texts: Sequence[Text], num_texts: int, seed: int) -> list[Text]:
    """At most `num_texts` of `texts`, each arm, outcome and band of lengths in its own proportion.

    A systematic sample of the texts in the order of arm, outcome, length band and chance (Cochran 1977, ch. 8).
    """
    if num_texts >= len(texts):
        return list(texts)
    rng = np.random.default_rng(seed)
    cuts = np.quantile([len(text.sample.token_ids) for text in texts], np.arange(1, LENGTH_BANDS) / LENGTH_BANDS)
    bands = [int(np.searchsorted(cuts, len(text.sample.token_ids), side="right")) for text in texts]
    chance = rng.random(len(texts))
    ordered = sorted(range(len(texts)), key=lambda i: (texts[i].arm, texts[i].outcome, bands[i], chance[i]))
    places = (np.arange(num_texts) + rng.random()) * len(texts) / num_texts
    return [texts[ordered[int(place)]] for place in places]


def truncated(logits_BV: Tensor, decoding: Decoding) -> Truncated:
    """q of `decoding`, in the order temperature, top-k, top-p; K is top-k, or V without it.

    Of tokens that tie for the last of top-k's places, one is kept.
    """
    if decoding.temperature == 0:
        raise ValueError("temperature=0 is greedy, and nobody trains on that; give the temperature of the samples")
    tempered_BV = logits_BV / decoding.temperature
    if 0 < decoding.top_k < logits_BV.shape[-1]:
        tempered_BK, ids_BK = tempered_BV.topk(decoding.top_k)
    else:
        tempered_BK, ids_BK = (
            tempered_BV,
            torch.arange(logits_BV.shape[-1], device=logits_BV.device).expand_as(logits_BV),
        )
    kept_BK = truncate(tempered_BK, dataclasses.replace(decoding, top_k=0))
    return Truncated(kept_BK.log_softmax(-1), ids_BK)


def classify(logp_BV: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Class of each position as an index into CLASSES, and which tokens are its head, by the base's `logp_BV`."""
    head_BV = logp_BV >= logp_BV.max(-1, keepdim=True).values + math.log(rules.rival_ratio)
    size_B, mass_B = head_BV.sum(-1), (logp_BV.exp() * head_BV).sum(-1)
    class_B = torch.where(size_B > 1, 2, torch.where(mass_B > 1 - rules.least_tail, 0, 1))
    return torch.where(mass_B < rules.least_head_mass, 3, class_B), head_BV


def entropy_split(logp_BV: Tensor, truncation: Truncated) -> dict[str, Tensor]:
    r"""Kept mass and the three parts of the entropy, in nats (arXiv 2604.01193, appendix B).

    .. math:: H(p) = h_2(p(S)) + p(S) \, H(p | S) + (1 - p(S)) \, H(p | S^c)

    `gate`, whether a token of S is drawn; `head`, which of them; `tail`, which of the others.
    """
    in_S_BK = truncation.log_q_BK > -torch.inf
    probs_BK = logp_BV.gather(-1, truncation.ids_BK).exp()
    inside_BK, outside_BK = probs_BK * in_S_BK, probs_BK * ~in_S_BK
    outside_BV = logp_BV.exp().scatter(-1, truncation.ids_BK, outside_BK)
    kept_B, lost_B = inside_BK.sum(-1), outside_BV.sum(-1)
    entropy = torch.special.entr
    return {
        "kept_mass": kept_B,
        "gate": entropy(kept_B) + entropy(lost_B),
        "head": entropy(inside_BK).sum(-1) - entropy(kept_B),
        "tail": entropy(outside_BV).sum(-1) - entropy(lost_B),
    }


def loss_terms(logp_BV: Tensor, truncation: Truncated, temperature: float) -> dict[str, Tensor]:
    r"""The parts of the cross-entropy of p under q, in nats (arXiv 2604.01193, appendix B).

    .. math:: -\sum_v q_v \log p_v = \underbrace{-\log p(S)}_{support}
              \underbrace{- T \log \sum_{v \in S} p(v|S)^{1/T}}_{reshaping, \; (1-T) H_{1/T}(p(\cdot|S))}
              + \underbrace{T \, KL(q \| p_T(\cdot|S))}_{alignment} + \underbrace{T \, H(q)}_{floor}

    with p_T(.|S) proportional to p(.|S)^{1/T}, T the training temperature and H_{1/T} Renyi's entropy. `floor` is the
    same for every model.
    """
    log_q_BK, ids_BK = truncation
    in_S_BK = log_q_BK > -torch.inf
    q_BK = log_q_BK.exp()
    logp_BK = logp_BV.gather(-1, ids_BK)
    log_kept_B1 = logp_BK.masked_fill(~in_S_BK, -torch.inf).logsumexp(-1, keepdim=True)
    tempered_BK = (logp_BK - log_kept_B1) / temperature
    log_norm_B1 = tempered_BK.masked_fill(~in_S_BK, -torch.inf).logsumexp(-1, keepdim=True)
    apart_BK = (log_q_BK - (tempered_BK - log_norm_B1)).masked_fill(~in_S_BK, 0)
    return {
        "support": -log_kept_B1.squeeze(-1),
        "reshaping": -temperature * log_norm_B1.squeeze(-1),
        "alignment": temperature * (q_BK * apart_BK).sum(-1),
        "floor": temperature * torch.special.entr(q_BK).sum(-1),
        "cross_entropy": -(q_BK * logp_BK.masked_fill(~in_S_BK, 0)).sum(-1),
    }


def shape(logp_BV: Tensor, taken_B: Tensor, head_BV: Tensor, rules: Rules) -> dict[str, Tensor]:
    """What one model's distribution is like: likeliest token, entropy, nucleus, the base's tail, the token taken.

    `nucleus_size` counts to 1,024 at most; `rank` of the token taken is 1 where it is the likeliest.
    """
    probs_BV, top = logp_BV.exp(), logp_BV.max(-1)
    taken_B1 = logp_BV.gather(-1, taken_B[:, None])
    largest_BR = probs_BV.topk(min(LONGEST_NUCLEUS, logp_BV.shape[-1])).values
    return {
        "top_1": top.values.exp(),
        "top_token": top.indices,
        "entropy": torch.special.entr(probs_BV).sum(-1),
        "nucleus_size": (largest_BR.cumsum(-1) - largest_BR < rules.nucleus_mass).sum(-1),
        "tail_mass": (probs_BV * ~head_BV).sum(-1),
        "logprob": taken_B1.squeeze(-1),
        "rank": (logp_BV > taken_B1).sum(-1) + 1,
    }


def curves(logits_BV: Tensor, truncation: Decoding) -> dict[str, Tensor]:
    """What the paper's figure 6 draws: mass of the first ranks, and what truncation leaves at EVAL_TEMPERATURES."""
    probs_BR = logits_BV.softmax(-1).topk(min(NUM_RANKS, logits_BV.shape[-1])).values
    found = {"cumulative_mass": probs_BR.cumsum(-1), "head_mass": probs_BR[:, :HEAD_TOKENS].sum(-1, keepdim=True)}
    at = [truncated(logits_BV, dataclasses.replace(truncation, temperature=t)).log_q_BK for t in EVAL_TEMPERATURES]
    found["num_surviving"] = torch.stack([(log_q_BK > -torch.inf).sum(-1) for log_q_BK in at], -1)
    found["entropy_left"] = torch.stack([torch.special.entr(log_q_BK.exp()).sum(-1) for log_q_BK in at], -1)
    return found


@torch.inference_mode()
def measure(
    folders: Mapping[str, str], texts: Sequence[Text], truncation: Decoding, rules: Rules, seed: int
) -> Measured:
    """Read `texts` once with each model of `folders`, of which `base` is one, and measure every completion position.

    Both distributions of a position are needed at once, so all models are loaded (bfloat16 on a GPU, 8.4 GB for
    Qwen3.5-4B, and 2.5 GB for its output layer in float32). Where they do not fit on the GPU together, they take turns
    there for each batch, and wait in the computer's memory; only hidden states are kept in between. Logits exist for
    CELLS_PER_CHUNK at a time.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    networks = {name: models.load_weights(folder, dtype).eval() for name, folder in folders.items()}
    in_turns = device.type == "cuda" and (
        sum(network.get_memory_footprint() for network in networks.values()) > 0.7 * torch.cuda.mem_get_info()[0]
    )
    tokenizer = models.load_tokenizer(folders["base"])
    end, thinks = _token(tokenizer, END_OF_THINKING), prompts.opens_thinking(tokenizer)
    marked = {"end_of_thinking": [end] if end is not None else [], "self_correction": self_correction_ids(tokenizer)}
    # In bfloat16 a logit of 20 would be rounded to an eighth; TF32 holds every digit of the bfloat16 it multiplies.
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    heads = {
        name: copy.deepcopy(network.get_output_embeddings()).to(device, torch.float32)
        for name, network in networks.items()
    }
    sizes = {name: head.weight.shape[0] for name, head in heads.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the models have vocabularies of {sizes}; give models that read the same token ids")
    first_T = np.cumsum([0, *(len(text.sample.token_ids) for text in texts)])
    if first_T[-1] == 0:
        raise ValueError(f"the {len(texts)} texts have no token; give samples that are not empty")
    sampled_N = np.zeros(first_T[-1], dtype=bool)
    rng = np.random.default_rng(seed)
    sampled_N[rng.choice(first_T[-1], min(CURVE_POSITIONS, first_T[-1]), replace=False)] = True
    batches, rows, drawn = list(_batches(texts)), [], []
    with tqdm(total=int(first_T[-1]), desc="diagnose", unit="position", mininterval=1) as bar:
        for batch in batches:
            hidden = {}
            for name, network in networks.items():
                network.to(device)
                hidden[name] = _hidden(network, [texts[t].sample for t in batch], device)
                if in_turns:
                    network.to("cpu")
            taken_B = torch.tensor([token for t in batch for token in texts[t].sample.token_ids], device=device)
            place_B = np.concatenate([np.arange(first_T[t], first_T[t + 1]) for t in batch])
            size = max(1, CELLS_PER_CHUNK // sizes["base"])
            chunks = []
            for low in range(0, len(taken_B), size):
                part = slice(low, low + size)
                logits = {name: head(hidden[name][part].float()) for name, head in heads.items()}
                chunks.append(_quantities(logits, taken_B[part], truncation, rules, marked))
                if (chosen := np.flatnonzero(sampled_N[place_B[part]])).size:
                    drawn.append({"place": torch.from_numpy(place_B[part][chosen])})
                    for name, each in logits.items():
                        of = curves(each[torch.from_numpy(chosen).to(device)], truncation)
                        drawn[-1] |= {f"{name}.{key}": value.cpu() for key, value in of.items()}
                bar.update(len(taken_B[part]))
            of_batch = {key: torch.cat([chunk[key] for chunk in chunks]).cpu() for key in chunks[0]}
            rows.append({"place": torch.from_numpy(place_B)} | of_batch)
    values, sampled = _joined(rows), _joined(drawn)
    text_N = np.repeat(np.arange(len(texts)), np.diff(first_T))
    token_N = np.concatenate([np.array(text.sample.token_ids, dtype=np.int32) for text in texts])
    thinking_N = np.concatenate([_thinking(text.sample.token_ids, end if thinks else None) for text in texts])
    _, problem_T = np.unique([text.sample.problem_id for text in texts], return_inverse=True)
    return Measured(
        texts, problem_T, text_N, np.arange(len(text_N)) - first_T[text_N], token_N, values["class"],
        thinking_N, thinking_N & (token_N == end), np.isin(token_N, marked["self_correction"]),
        _by_model(values, folders), sampled["place"], _by_model(sampled, folders),
    )  # fmt: skip


def self_correction_ids(tokenizer) -> list[int]:
    """Tokens that are a word of SELF_CORRECTION, with or without a space before it, in any usual case."""
    spelled = [space + form for word in SELF_CORRECTION for form in (word, word.title()) for space in ("", " ")]
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in spelled]
    return sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id})


def _quantities(
    logits: Mapping[str, Tensor], taken_B: Tensor, truncation: Decoding, rules: Rules, marked: Mapping[str, list[int]]
) -> dict[str, Tensor]:
    """Everything that is measured at a chunk of positions, as `model.quantity`, and `class`; mass of `marked` ids."""
    q = truncated(logits["base"], truncation)
    found = {}
    for name, logits_BV in logits.items():
        logp_BV = logits_BV.log_softmax(-1)
        if name == "base":
            found["class"], head_BV = classify(logp_BV, rules)
        of = shape(logp_BV, taken_B, head_BV, rules) | entropy_split(logp_BV, q)
        of |= loss_terms(logp_BV, q, truncation.temperature)
        of |= {key: logp_BV[:, ids].exp().sum(-1) for key, ids in marked.items() if ids}
        found |= {f"{name}.{key}": value for key, value in of.items()}
    return found


def _hidden(network, samples: Sequence[Sample], device: torch.device) -> Tensor:
    """Last hidden states, shape (B, width), of the positions that predict a completion's token, text after text.

    Padding is on the right, where no earlier position sees it, so no mask is needed.
    """
    rows = [[*sample.prompt_token_ids, *sample.token_ids] for sample in samples]
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    wanted = torch.zeros_like(input_ids, dtype=torch.bool)
    for index, (row, sample) in enumerate(zip(rows, samples)):
        input_ids[index, : len(row)] = torch.tensor(row)
        wanted[index, len(sample.prompt_token_ids) - 1 : len(row) - 1] = True
    states_TLD = network.base_model(input_ids=input_ids.to(device), use_cache=False).last_hidden_state
    return states_TLD[wanted.to(device)]


def _batches(texts: Sequence[Text]) -> Iterator[list[int]]:
    """Indices of texts of like length, the longest first, so that what does not fit fails at once."""
    length_T = [len(text.sample.prompt_token_ids) + len(text.sample.token_ids) for text in texts]
    waiting = sorted((t for t in range(len(texts)) if texts[t].sample.token_ids), key=lambda t: -length_T[t])
    while waiting:
        size = max(1, TOKENS_PER_BATCH // length_T[waiting[0]])
        yield waiting[:size]
        waiting = waiting[size:]


def _thinking(token_ids: Sequence[int], end: int | None) -> NDArray:
    """Which positions of a completion are within its thinking, the one that ends it included."""
    if end is None:
        return np.zeros(len(token_ids), dtype=bool)
    last = token_ids.index(end) if end in token_ids else len(token_ids)
    return np.arange(len(token_ids)) <= last


def _token(tokenizer, text: str) -> int | None:
    found = tokenizer.convert_tokens_to_ids(text)
    return None if found in (None, tokenizer.unk_token_id) else found


def _joined(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, NDArray]:
    """The chunks as one array for each name, in the order of `place`."""
    joined = {key: torch.cat([row[key] for row in rows]).numpy() for key in rows[0]}
    order = np.argsort(joined["place"])
    return {key: values[order] for key, values in joined.items()}


def _by_model(values: Mapping[str, NDArray], folders: Mapping[str, str]) -> dict[str, dict[str, NDArray]]:
    return {
        name: {key.partition(".")[2]: each for key, each in values.items() if key.startswith(f"{name}.")}
        for name in folders
    }
