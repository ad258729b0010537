"""A model that is larger than the memory of a device: one layer in memory, one on disk."""

import pytest
import torch

import cats
from cats.checkpoint import load_dense
from cats.errors import ConfigError
from cats.weights.placement import is_offloaded
from tests import models

ON_DISK = "model.layers.1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a dense model, of the sparse one, and the thresholds."""
    folder = tmp_path_factory.mktemp("offloaded")
    torch.manual_seed(0)
    model = models.make_model()
    model.save_pretrained(folder / "dense")
    models.make_tokenizer().save_pretrained(folder / "dense")
    config = cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)
    cats.sparsify_(model, config).save_pretrained(folder / "sparse")
    models.make_tokenizer().save_pretrained(folder / "sparse")
    return folder / "dense", folder / "sparse", config


@pytest.fixture
def places(tmp_path):
    names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0")
    where = dict.fromkeys(names, "cpu") | {ON_DISK: "disk"}
    return {"device_map": where, "offload_folder": tmp_path / "offload"}


@pytest.fixture
def small_memory(monkeypatch):
    """``device_map="auto"`` finds place for one layer."""
    name = "transformers.integrations.accelerate.accelerate_max_memory"
    monkeypatch.setattr(name, lambda given=None: {"cpu": 50_000})


def generate(model, **options):
    prompts = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    return cats.generate(model, prompts, max_new_tokens=12, **options)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}, {"engine": "eager"}])
def test_sparse_checkpoint_generates_what_the_whole_one_does(folders, places, options):
    model = cats.from_pretrained(folders[1], **places)
    assert is_offloaded(model.get_submodule(ON_DISK))
    expected = generate(cats.from_pretrained(folders[1]), **options)
    assert torch.equal(generate(model, **options), expected)
    assert not torch.equal(generate(cats.densify_(model), **options), expected)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_thresholds_of_an_offloaded_model_go_with_the_checkpoint(folders, places, tmp_path):
    dense, sparse, config = folders
    model = load_dense(dense, **places)
    found = cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)
    assert found == config
    cats.sparsify_(model, found).save_pretrained(tmp_path / "saved")
    again, whole = cats.from_pretrained(tmp_path / "saved"), cats.from_pretrained(sparse)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_turns_of_a_conversation_are_those_of_the_whole_model(folders, places):
    tokenizer = models.make_tokenizer()
    texts = []
    for options in (places, {}):
        decoder = cats.Decoder(cats.from_pretrained(folders[1], **options))
        first = "".join(decoder.stream_text("one", tokenizer=tokenizer, max_new_tokens=8))
        second = "".join(decoder.stream_text("one two", tokenizer=tokenizer, max_new_tokens=8))
        texts.append((first, second))
    assert texts[0] == texts[1]


def test_commands_spread_a_model_over_all_devices(
    folders, small_memory, command, command_json, monkeypatch, tmp_path
):
    from cats.cli import options

    dense, _, _ = folders
    loaded = []
    load = options.load

    def recording_load(*args, **named):
        model, tokenizer = load(*args, **named)
        loaded.append(is_offloaded(model))
        return model, tokenizer

    monkeypatch.setattr(options, "load", recording_load)
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged. " * 60)
    calibrate = ["calibrate", dense, "--text", text, "--block", 32, "--tokens", 512]
    configs, answers, qualities = [], [], []
    for device in ("cpu", "all"):
        path = tmp_path / f"{device}.safetensors"
        assert command(*calibrate, "--device", device, "-o", path)[0] == 0
        configs.append(cats.CatsConfig.load(path))
        sparse = [dense, "--thresholds", path, "--device", device]
        answers.append(command_json("generate", *sparse, "a", "--max-new-tokens", 8)["text"])
        qualities.append(command_json("evaluate", *sparse, "--text", text, "--block", 32))
    assert loaded == [False] * 3 + [True] * 3
    assert configs[0] == configs[1]
    assert answers[0] == answers[1]
    assert qualities[0] == qualities[1]


def test_each_of_several_processes_cannot_take_all_devices(monkeypatch):
    from cats.cli.options import process_device

    assert process_device("all") == "all"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        process_device("all")
