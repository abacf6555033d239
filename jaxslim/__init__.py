"""jaxslim: make pretrained speech transformers small, fast and linear-time, in JAX.

Everything here is loaded on first use, so `import jaxslim` costs nothing.
"""
import importlib
import sys
import types

from jaxslim._version import __version__

_LAZY = {
    "Slim": "slim", "from_pretrained": "hub:load", "slim": "recipe:run", "evaluate": "evaluate:evaluate",
    "transcribe": "transcription:transcribe", "bench": "speed:bench", "to_flax": "models.bind",
    "from_flax": "models.bind",
}
__all__ = ["__version__", *sorted(_LAZY)]


class _Package(types.ModuleType):
    def __setattr__(self, name, value):
        if not (name in _LAZY and isinstance(value, types.ModuleType)):  # functions win over submodules of their name
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxslim' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    return getattr(importlib.import_module(f"jaxslim.{module}"), attribute or name)
