import ast
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from cats.integrations import vllm as plugin

ROOT = Path(__file__).parents[3]
FILES = sorted(Path(plugin.__file__).parent.glob("*.py"))


class Registry:
    def __init__(self):
        self.models = {}

    def add(self, architecture, module, name=None):
        entry = SimpleNamespace(module_name=module, class_name=name or architecture)
        self.models[architecture] = entry

    def register_model(self, architecture, spec):
        module, name = spec.split(":")
        self.add(architecture, module, name)


@pytest.fixture
def registry(monkeypatch):
    found = Registry()
    vllm, version = ModuleType("vllm"), ModuleType("vllm.version")
    vllm.ModelRegistry, version.__version__ = found, "0.32.0"
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.version", version)
    return found


def test_classes_that_generate_text_are_registered_once(registry):
    registry.add("LlamaForCausalLM", "vllm.models.llama")
    registry.add("MistralForCausalLM", "vllm.models.llama", "LlamaForCausalLM")
    registry.add("BertModel", "vllm.models.bert")
    registry.models["OtherForCausalLM"] = SimpleNamespace(model_cls=object)
    plugin.register()
    plugin.register()
    entries = {name: vars(entry) for name, entry in registry.models.items()}
    llama = {
        "module_name": "cats.integrations.vllm.models",
        "class_name": "vllm.models.llama LlamaForCausalLM 0.32.0",
    }
    assert entries["LlamaForCausalLM"] == entries["MistralForCausalLM"] == llama
    assert entries["BertModel"]["module_name"] == "vllm.models.bert"
    assert entries["OtherForCausalLM"] == {"model_cls": object}


def test_vllm_finds_the_plugin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plugins = project["entry-points"]["vllm.general_plugins"]
    assert plugins == {"cats": "cats.integrations.vllm:register"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_vllm_is_imported_by_what_it_loads_alone(path):
    statements = ast.parse(path.read_text()).body
    imported = {
        name.partition(".")[0]
        for node in statements
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert ("vllm" in imported) == (path.stem in ("layers", "models"))
