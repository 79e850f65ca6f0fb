"""Open the engine of a name, `KIND` or `KIND:PLACE`.

`vllm`, `vllm:data_parallel_size=2`, `transformers`, `openai:http://one:8000/v1,http://two:8000/v1`, `ray`,
`ray:HOST:PORT`, `replay:FOLDER`. One backend is imported, in its own file, and nothing else of it.
"""

from collections.abc import Sequence

from ssd.engines.request import Engine, Request

ENGINES = ("vllm", "transformers", "openai", "ray", "replay")
LOCAL = ("vllm", "transformers")  # they use the GPU of this machine


def kind(engine: str) -> str:
    """`engine` without its place: what a sample depends on, wherever it was made."""
    return engine.partition(":")[0]


def open_engine(engine: str, model: str, requests: Sequence[Request]) -> Engine:
    """Load `model` (a folder or hub id) in `engine` (KIND or KIND:PLACE), with room for the longest of `requests`.

    Raises
    ------
    ValueError
        If the engine is unknown or not installed, its place is not there, it has no GPU where it needs one or too old
        a driver, it cannot honour a decoding, or a prompt with its cap is longer than the model's context.
    """
    name, _, place = engine.partition(":")
    if name not in ENGINES:
        raise ValueError(f"engine={name!r} is not one of {', '.join(ENGINES)}")
    if name in LOCAL:
        from ssd import driver  # torch takes seconds to load

        driver.check()
    try:
        match name:
            case "vllm":
                from ssd.engines.vllm import VLLMEngine as backend
            case "transformers":
                from ssd.engines.transformers import TransformersEngine as backend
            case "openai":
                from ssd.engines.openai import OpenAIEngine as backend
            case "ray":
                from ssd.engines.ray import RayEngine as backend
            case "replay":
                from ssd.engines.replay import ReplayEngine as backend
    except ModuleNotFoundError as error:
        extra = "ray" if error.name == "ray" else "gpu"
        raise ValueError(
            f"engine={name!r} needs the package {error.name}, which is not installed; install the {extra} extra "
            f"(pip install '.[{extra}]') or use engine=transformers"
        ) from error
    return backend(model, requests, place)
