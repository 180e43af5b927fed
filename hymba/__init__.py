"""hymba: hybrid-head language models, attention heads and Mamba heads side by side in every layer.

After Dong et al., "Hymba: A Hybrid-head Architecture for Small Language Models" (arXiv 2411.13676).
Names are imported when they are first used, so that `import hymba` is instant.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "Hymba": "hymba.model.hymba",
    "HymbaCache": "hymba.model.cache",
    "HymbaConfig": "hymba.config",
    "LLM": "hymba.engine.llm",
    "SamplingParams": "hymba.engine.sampling",
    "Tokenizer": "hymba.tokenizer",
    "UserError": "hymba.errors",
}

__all__ = ["LLM", "Hymba", "HymbaCache", "HymbaConfig", "SamplingParams", "Tokenizer", "UserError", "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'hymba' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
