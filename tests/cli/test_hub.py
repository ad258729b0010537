import json

import huggingface_hub
import pytest

from tests import models
from tests.evaluation.conftest import models_data

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
HUB = ("--revision", "v2", "--subfolder", "sub")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Name of a sparse model that the cache holds in one revision and one subfolder."""
    cache = tmp_path / "hub"
    models.fill_hub_cache(cache, revision="v2", subfolder="sub", target=0.8)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return "org/model"


COMMANDS = {
    "calibrate": "calibrate MODEL --text TEXT --block 64",
    "evaluate": "evaluate MODEL --text TEXT --block 64",
    "evaluate tasks": "evaluate MODEL --tasks sciq --data-dir DATA",
    "finetune": "finetune MODEL --text TEXT --block 32 --steps 1 -o OUT",
    "generate": "generate MODEL hello --max-new-tokens 2",
    "info": "info MODEL",
    "profile": "profile MODEL TEXT --block 64",
    "reproduce": "reproduce --model MODEL -o OUT --text TEXT --samples 8 --length 64 --sparsity .5 "
    "--tasks sciq --data-dir DATA --methods cats --no-speed",
    "bench decode": "bench decode MODEL --sparsity 0 --no-generate --new-tokens 3 --rounds 2 "
    "--prompt-length 4 --read-mib 1 --calibration-tokens 256 --engine eager",
    "bench sessions": "bench sessions MODEL --sparsity 0 --sessions 2 --seconds 0 --prompts 4,8 "
    "--new-tokens 2,3",
    "bench finetune": "bench finetune MODEL --text TEXT --calibration-text TEXT --block 32 "
    "--steps 1 --batch-size 4 --method dense -o OUT",
}


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_revision_and_subfolder_reach_every_file(command, cached, text, tmp_path, line):
    if "sciq" in line:
        pytest.importorskip("lm_eval", reason="needs the extra eval")
    if "finetune" in line:
        pytest.importorskip("peft", reason="needs the extra finetune")
    if "reproduce" in line:
        pytest.importorskip("matplotlib", reason="needs the extra report")
    values = {"MODEL": cached, "TEXT": text, "OUT": tmp_path / "out"}
    if "DATA" in line:
        values["DATA"] = models_data(tmp_path / "data")
    arguments = [values.get(word, word) for word in line.split()]
    code, _, err = command(*arguments, *HUB)
    assert code == 0, err
    code, _, err = command(*arguments, *HUB[:2])
    assert code == 1
    assert "cannot load the model org/model" in err.replace("\n", " ")


def test_thresholds_are_those_of_the_revision(command, cached, tmp_path):
    models.fill_hub_cache(tmp_path / "hub", revision="v3", subfolder="sub", target=0.2)
    for revision, target in (("v2", 0.8), ("v3", 0.2)):
        code, out, err = command("info", cached, "--json", "--revision", revision, *HUB[2:])
        assert code == 0, err
        assert json.loads(out)["model"]["target_sparsity"] == target


def test_revision_of_a_folder_or_of_random_weights_is_refused(command, checkpoint):
    code, _, err = command("info", checkpoint, "--revision", "v2")
    assert (code, "it is a folder, and only models of the" in err.replace("\n", " ")) == (1, True)
    code, _, err = command("bench", "decode", "llama-3.2-1b", "--revision", "v2")
    assert (code, "random weights" in err) == (1, True)
