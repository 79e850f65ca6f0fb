"""A model is a folder or a hub id: its config, tokenizer, weights and digest, loaded without remote code.

A folder may hold a LoRA adapter (`ssd.adapters`): it is its base with the adapter's weights added.
"""

import contextlib
import functools
import hashlib
import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from ssd import adapters

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
SAVING = "and write it and its tokenizer into a new folder with save_pretrained"
# What to do about weights in another format, by its ending. transformers 5.23 reads GGUF but cannot save it.
OTHER_FORMATS = {
    ".gguf": "give the model that this file was made from",
    ".bin": f"load the model in transformers with use_safetensors=False, {SAVING}",
    ".pt": f"load the model with the code that wrote it, {SAVING}",
    ".pth": f"load the model with the code that wrote it, {SAVING}",
}


@functools.lru_cache(maxsize=2)
def load_config(model: str) -> transformers.PretrainedConfig:
    """Config of `model`; ValueError with the remedy where it cannot be had."""
    folder = Path(model)
    if base := adapters.base_of(model):
        try:
            return load_config(base)
        except ValueError as error:
            raise ValueError(f"base of adapter {model}: {error}") from error
    if folder.is_file():
        raise ValueError(f"model {model} is a file; give the folder that holds it, with its config and tokenizer")
    if folder.is_dir():
        _check_weights(folder)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ValueError(f"model folder {model} has no config.json; give a folder that save_pretrained wrote")
    return _load(transformers.AutoConfig, model, "config")


def load_tokenizer(model: str) -> transformers.PreTrainedTokenizerBase:
    """Tokenizer of `model`, with its chat template; ValueError where either is missing or it does not fit the model."""
    load_config(model)
    base = adapters.base_of(model)
    source = base if base and not _has_tokenizer(model) else model
    if Path(source).is_dir() and not _has_tokenizer(source):
        raise ValueError(f"model folder {source} has no tokenizer; copy the base model's tokenizer files into it")
    tokenizer = _load(transformers.AutoTokenizer, source, "tokenizer")
    largest, num_rows = max(tokenizer.get_vocab().values()), load_config(model).get_text_config().vocab_size
    if largest >= num_rows:
        remedy = adapters.MERGE if base else "copy the files of the tokenizer that it was trained with into its folder"
        raise ValueError(
            f"tokenizer of {source} has ids up to {largest}, and the embedding of {model} has {num_rows} rows; {remedy}"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer of {source} has no chat template; use an instruction-tuned model or add chat_template.jinja "
            "to the model folder"
        )
    return tokenizer


def _load(loader: type, model: str, part: str, **options: Any) -> Any:
    """What `loader` makes of `model`, without running code that comes with it and without asking whether to."""
    try:
        return loader.from_pretrained(model, trust_remote_code=False, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the parsers of a tokenizer raise just this
        line = " ".join(str(error).split())[:300] or type(error).__name__
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the {part} of model {model!r} needs code that comes with it, which is never run; give a model whose "
                f"classes transformers {transformers.__version__} has"
            ) from error
        if Path(model).is_dir():
            raise ValueError(f"the {part} in model folder {model} cannot be read ({line}); copy it again") from error
        raise ValueError(
            f"model {model!r} is neither a local folder nor reachable on the hub ({line}); download it and give its "
            "folder"
        ) from error


def _has_tokenizer(folder: str) -> bool:
    return any((Path(folder) / name).exists() for name in TOKENIZER_FILES)


def _check_weights(folder: Path) -> None:
    """Refuse a folder without weights in safetensors, which vLLM, training and `digest` read alike."""
    if any(folder.glob("*.safetensors")):
        return
    files = [file for ending in OTHER_FORMATS for file in sorted(folder.glob(f"*{ending}"))]
    if not files:
        raise ValueError(f"model folder {folder} has no *.safetensors weights; save it with save_pretrained")
    name, remedy = files[0].name, OTHER_FORMATS[files[0].suffix]
    raise ValueError(f"model folder {folder} has its weights in {name}, not in *.safetensors; {remedy}")


def load_weights(model: str, dtype: torch.dtype | str) -> transformers.PreTrainedModel:
    """`model` in the class that its config names, so that saving loses no part of it (a vision tower)."""
    config = load_config(model)
    if base := adapters.base_of(model):
        of_base = config.get_text_config().dtype or torch.float32
        return adapters.merge(load_weights(base, torch.float32), model).to(of_base if dtype == "auto" else dtype)
    return _load(_class_of(model, config), model, "weights", dtype=dtype, use_safetensors=True)


def load_empty(model: str) -> transformers.PreTrainedModel:
    """`model` without its weights, on the device meta."""
    config = load_config(model)
    with torch.device("meta"):
        return _class_of(model, config)(config)


def _class_of(model: str, config: transformers.PretrainedConfig) -> type[transformers.PreTrainedModel]:
    architecture = (config.architectures or ["AutoModelForCausalLM"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(f"model {model}: transformers {transformers.__version__} has no class {architecture}")
    return model_class


def save_tokenizer(model: str, folder: str | Path) -> None:
    """Put the tokenizer of `model` into `folder`, and what vLLM asks of a model that takes images, too."""
    load_tokenizer(model).save_pretrained(folder)
    for name in PROCESSOR_FILES:
        with contextlib.suppress(OSError):  # it has no such file
            shutil.copy(transformers.utils.cached_file(adapters.base_of(model) or model, name), folder)


def context_length(model: str) -> int:
    """Longest sequence of `model`, in tokens."""
    return load_config(model).get_text_config().max_position_embeddings


def end_ids(model: str) -> set[int]:
    """Tokens that end a completion, as the tokenizer, the config and generation_config.json name them."""
    named = [load_tokenizer(model).eos_token_id, load_config(model).get_text_config().eos_token_id]
    with contextlib.suppress(OSError):  # it has no such file
        named.append(transformers.GenerationConfig.from_pretrained(model).eos_token_id)
    return {token for each in named for token in (each if isinstance(each, list) else [each]) if token is not None}


def digest(model: str) -> str:
    """Identity of `model`: of a folder, the SHA-256 of its weights and config; of a hub id, its commit."""
    folder, base = Path(model), adapters.base_of(model)
    if not folder.is_dir():
        return f"{model}@{load_config(model)._commit_hash}"
    _check_weights(folder)
    files = sorted([*folder.glob("*.safetensors"), folder / ("adapter_config.json" if base else "config.json")])
    content = hashlib.sha256(digest(base).encode() if base else b"")
    for file in files:
        content.update(file.name.encode())
        with open(file, "rb") as stream:
            content.update(hashlib.file_digest(stream, "sha256").digest())
    return content.hexdigest()[:32]


def same_weights(model: str, other: str) -> bool:
    """Whether two folders hold equal tensors by name, however they are spread over files."""
    of_one, of_other = _tensor_files(model), _tensor_files(other)
    if of_one.keys() != of_other.keys():
        return False
    with contextlib.ExitStack() as stack:
        files = {*of_one.values(), *of_other.values()}
        opened = {file: stack.enter_context(safetensors.safe_open(file, "pt")) for file in files}
        return all(
            torch.equal(opened[of_one[name]].get_tensor(name), opened[of_other[name]].get_tensor(name))
            for name in of_one
        )


def _tensor_files(folder: str) -> dict[str, Path]:
    """File of each tensor in `folder`, by name."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, "pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is cut short or damaged ({error}); copy the model again") from error
    return found
