"""jaxslim: make pretrained speech transformers small, fast and linear-time, in JAX.

Everything here is loaded on first use, so `import jaxslim` costs nothing.
"""
import importlib

__version__ = "0.1.0"

_LAZY = {
    "Slim": "slim", "from_pretrained": "hub:load", "slim": "recipe:run", "evaluate": "evaluate:evaluate",
    "transcribe": "evaluate:transcribe", "bench": "speed:bench", "to_flax": "models.bind",
    "from_flax": "models.bind",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxslim' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    return getattr(importlib.import_module(f"jaxslim.{module}"), attribute or name)
