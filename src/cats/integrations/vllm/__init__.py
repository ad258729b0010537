"""vLLM serves CATS checkpoints: the plugin behind the entry point ``vllm.general_plugins``.

vLLM calls :func:`register` in each of its processes. From then on, a checkpoint whose
``config.json`` has a ``cats`` block runs with its thresholds; every other one runs in vLLM's own
class, as without the plugin. ``block.py`` reads the ``cats`` block, ``loading.py`` follows the
thresholds through vLLM's loader, ``mlps.py`` finds the gated MLPs of a vLLM model and
``activation.py`` is what drops neurons in them. These four need no vLLM. ``layers.py`` runs an MLP
as one operator, and ``models.py`` makes the classes that vLLM loads.
"""

from typing import Any

_SUFFIXES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


def register() -> None:
    """Put sparse classes in the place of all of vLLM's classes that generate text.

    Nothing is imported before vLLM asks for one of them. Calling this again changes nothing.
    """
    from vllm import ModelRegistry
    from vllm.version import __version__

    for architecture, entry in list(ModelRegistry.models.items()):
        name = class_name(entry, __version__)
        if architecture.endswith(_SUFFIXES) and name is not None:
            ModelRegistry.register_model(architecture, f"{__name__}.models:{name}")


def class_name(entry: Any, version: str) -> str | None:
    """The name by which ``models.py`` makes the sparse class of an entry of vLLM's registry.

    vLLM stores what it knows about a class under its name, between its runs and releases. So the
    name holds all that the class depends on.

    Returns:
        None for a class that is sparse already, and for one that another plugin has imported.
    """
    module, name = getattr(entry, "module_name", None), getattr(entry, "class_name", None)
    if module is None or name is None or module.startswith(__name__):
        return None
    return f"{module} {name} {version}"
