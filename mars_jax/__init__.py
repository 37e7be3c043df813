"""mars_jax: finds the LoRA ranks of a multimodal LLM's modules from short probes, then fine-tunes with them.

The public names are listed by theme in `__init__.pyi` and loaded when they are first used, so importing the package
costs nothing. Everything else is private by convention and may change without notice.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
