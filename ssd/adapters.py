"""LoRA adapters (peft's folders) as models: only such as engines read alike, so that none stands in for another."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

if TYPE_CHECKING:
    import transformers

# What an adapter's config may say: vLLM reads these as peft does, or they are seen in the names of the weights; all
# others it passes over without a word.
KNOWN = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "peft_type",
    "peft_version", "r", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
MERGE = "give it merged into its model (peft's merge_and_unload)"


def base_of(model: str) -> str | None:
    """Model that the adapter in folder `model` was trained beside; None where `model` is no adapter.

    Raises
    ------
    ValueError
        If it is more than a plain LoRA adapter of layers, which is all that vLLM serves, or lacks a part.
    """
    file = Path(model) / "adapter_config.json"
    if not file.exists():
        return None
    try:
        config = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} holds no JSON object ({error}); copy the adapter again") from error
    base = config.get("base_model_name_or_path")
    if config.get("peft_type") != "LORA" or not base or not isinstance(base, str):
        raise ValueError(f"adapter {model} is not a LoRA adapter that names its base; {MERGE}")
    if (Path(base) / "adapter_config.json").exists():
        raise ValueError(f"adapter {model} has an adapter as its base, {base}; {MERGE}")
    import peft  # takes seconds to load

    usual = peft.LoraConfig().to_dict()
    strange = [name for name, value in config.items() if name not in KNOWN and value and value != usual.get(name)]
    if config.get("init_lora_weights") not in (None, True, False, "gaussian"):  # peft then moves the base's weights
        strange.append("init_lora_weights")
    if strange:
        raise ValueError(f"adapter {model} sets {strange[0]}={config[strange[0]]!r}, which vLLM passes over; {MERGE}")
    if whole := sorted(name for name in shapes(model) if "lm_head" in name or "embed_tokens" in name):
        raise ValueError(f"adapter {model} holds {whole[0]}, and vLLM adapts neither embeddings nor heads; {MERGE}")
    return base


def refuse(model: str, engine: str) -> None:
    """Raise ValueError where `model` is an adapter: `engine` cannot show that it is there."""
    if base_of(model):
        raise ValueError(f"engine={engine} serves no adapter like {model}; {MERGE}")


def beside(base: "transformers.PreTrainedModel", adapter: str):
    """`base` as peft wraps it for the folder `adapter`; ValueError unless that holds the weights of just its layers.

    The weights are not loaded: `base` may be on the device meta.
    """
    import peft

    wrapped = peft.get_peft_model(base, peft.PeftConfig.from_pretrained(adapter))
    state = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    expected = {name: tuple(weight.shape) for name, weight in state.items()}
    if strange := set(expected.items()) ^ set(shapes(adapter).items()):
        name, shape = min(strange)
        raise ValueError(f"adapter {adapter} is not of its base: {name} {shape} is in one of them alone; {MERGE}")
    return wrapped


def merge(base: "transformers.PreTrainedModel", adapter: str) -> "transformers.PreTrainedModel":
    """`base`, in float32 so that it rounds once, with the weights of the folder `adapter` added to its own."""
    import peft

    wrapped = beside(base, adapter)
    peft.set_peft_model_state_dict(wrapped, peft.utils.load_peft_weights(adapter, device=str(base.device)))
    return wrapped.merge_and_unload()


def shapes(adapter: str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the folder `adapter`, by name."""
    file = Path(adapter) / "adapter_model.safetensors"
    if not file.exists():
        raise ValueError(f"adapter {adapter} has no {file.name}; save it with save_pretrained")
    try:
        with safetensors.safe_open(file, "np") as tensors:
            names = tensors.keys()
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is cut short or damaged ({error}); copy the adapter again") from error
