import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import cats
from cats.weights import QuantisedLinear
from tests import models

SMALL = ("--block", 32, "--tokens", 512, "--eval-tokens", 128)


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Folder of a tiny model whose widths are whole groups, its tokenizer and settings."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    model = models.make_model(hidden_size=64, intermediate_size=128, head_dim=32)
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=True)
    model.save_pretrained(folder)
    models.make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_result_is_a_checkpoint_for_cats_and_transformers(command_json, dense, text, tmp_path):
    pytest.importorskip("compressed_tensors", reason="transformers needs it")
    output = tmp_path / "int4"
    report = command_json("quantize", dense, "--text", text, *SMALL, "-o", output)
    assert (report["method"], report["bits"], report["group_size"]) == ("gptq", 4, 64)
    assert report["ignored"] == ["lm_head"]
    before, after = report["steps"]
    assert after["bytes"] < before["bytes"]
    assert after["layers"] == 14
    assert 0.8 < after["perplexity"] / before["perplexity"] < 1.2
    model = cats.checkpoint.load_dense(output)
    assert sum(isinstance(m, QuantisedLinear) for m in model.modules()) == 14
    assert model.generation_config.temperature == 0.7
    assert AutoTokenizer.from_pretrained(output)("abc") == AutoTokenizer.from_pretrained(dense)(
        "abc"
    )
    plain = AutoModelForCausalLM.from_pretrained(output)
    ids = models.make_ids()
    assert torch.equal(models.logits(plain, ids), models.logits(model, ids))


def test_table_names_what_it_did(command, dense, text, tmp_path):
    arguments = ("--method", "rtn", "--bits", 8, "--head", "-o", tmp_path / "int8")
    code, out, err = command("quantize", dense, "--text", text, *SMALL, *arguments)
    assert code == 0, err
    for words in ("float32", "14 layers (rtn)", "int8, a scale per row", "and the head (rtn)"):
        assert words in out
    assert "left as they are: none" in out
    assert "cats calibrate" in out
    code, out, err = command("quantize", dense, "--text", text, *SMALL)
    assert code == 0, err
    assert "groups of 64 columns, because a width is no multiple of 128" in err
    assert "GPTQ on 512 other tokens of the same text" in out
    assert "left as they are: lm_head" in out
    assert "nothing written" in out


def test_thresholds_are_found_on_the_quantised_model(command, command_json, dense, text, tmp_path):
    sparse, int4, file = tmp_path / "sparse", tmp_path / "int4", tmp_path / "t.safetensors"
    common = ("--text", text, *SMALL)
    assert command("calibrate", dense, *common, "-o", sparse)[0] == 0
    code, out, err = command("quantize", sparse, *common, "-o", int4)
    assert code == 0, err
    assert "the thresholds of the sparse model are left out" in out.replace("\n", " ")
    assert not cats.checkpoint.is_sparse_checkpoint(int4)
    assert "cats" not in json.loads((int4 / "config.json").read_text())
    report = command_json("calibrate", int4, *common, "-o", file)
    model = cats.from_pretrained(int4, thresholds=file)
    assert model.config.cats["target_sparsity"] == report["target_sparsity"] == 0.5
    shares = cats.metrics.realized_sparsity(model, [models.make_ids()])
    assert all(0.2 < share < 0.8 for share in shares.values())
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantisedLinear)
    arguments = ("--thresholds", file, "--max-new-tokens", 3)
    assert command_json("generate", int4, "abc", *arguments)["new_tokens"] <= 3


def test_info_shows_what_is_quantised(command_json, dense, text, tmp_path):
    output = tmp_path / "int4"
    arguments = ("--method", "rtn", "--group", 32, "--head", "--exclude", "*.o_proj", "-o", output)
    command_json("quantize", dense, "--text", text, *SMALL, *arguments)
    report = command_json("info", output)
    assert report["quantised weights"] == {
        "format": "compressed-tensors (pack-quantized)",
        "int8, a scale per row": "1 layer: lm_head",
        "int4, groups of 32": "12 layers: down_proj, gate_proj, up_proj, k_proj, q_proj, v_proj",
    }
    assert "quantised weights" not in command_json("info", dense)


def test_info_shows_the_blocks_of_a_gguf_file(command_json, tmp_path):
    pytest.importorskip("gguf", reason="the format's own library")
    from tests.formats import checkpoints

    path = checkpoints.write_gguf("Q8_0", tmp_path / "model.gguf")
    report = command_json("info", path)
    assert report["quantised weights"]["format"] == "GGUF"
    assert report["quantised weights"]["Q8_0"].endswith(" matrices")
    assert report["architecture"]["layers"] == 2


def test_info_names_a_format_that_is_not_read(command_json, dense, tmp_path):
    shutil.copytree(dense, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    path.write_text(json.dumps(config))
    kind = command_json("info", tmp_path / "other")["quantised weights"]["format"]
    assert kind.startswith("hqq: not read here")


BAD = {
    "bits": (("--bits", 3), "bits must be 4 or 8, got 3"),
    "group": (("--group", 0), "at least one column, got 0"),
    "method": (("--method", "awq"), "one of rtn, gptq"),
    "part of a block": (("--tokens", 5), "--tokens 5 is less than one block"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_options_that_cannot_be_are_refused_before_the_model_is_loaded(command, arguments, message):
    code, _, err = command("quantize", "no/such-model", *arguments)
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def test_what_is_refused_writes_nothing(command, dense, text, tmp_path):
    common = ("--text", text, *SMALL)
    output = tmp_path / "int4"
    code, _, err = command("quantize", dense, *common, "--exclude", "foo", "-o", output)
    assert code == 1
    assert "matches no layer" in err
    assert not output.exists()
    assert command("quantize", dense, *common, "-o", output)[0] == 0
    code, _, err = command("quantize", dense, *common, "-o", output)
    assert code == 1
    assert "exists already" in err
    code, _, err = command("quantize", output, *common, "-o", tmp_path / "again")
    assert code == 1
    assert "quantised already" in err
    assert [*tmp_path.glob("*again*")] == []
