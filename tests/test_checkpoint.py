import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

import cats
from cats import checkpoint, smollm2
from cats.errors import ConfigError, FormatError, ModelMismatchError, StorageError
from tests import models


@pytest.fixture
def sparse():
    model = models.make_model()
    return cats.sparsify_(model, cats.calibrate(model, [models.make_ids()], target_sparsity=0.5))


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_saved_model_gives_equal_logits(sparse, tmp_path, shard):
    sparse.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len([*tmp_path.glob("*.safetensors")]) > 1) == (shard == "10KB")
    loaded = cats.from_pretrained(tmp_path)
    ids = models.make_ids(seed=1)
    assert torch.equal(models.logits(loaded, ids), models.logits(sparse, ids))


def test_plain_transformers_loads_the_dense_model(sparse, tmp_path):
    sparse.save_pretrained(tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["unexpected_keys"]) == 2
    ids = models.make_ids(seed=1)
    assert torch.equal(models.logits(plain, ids), models.logits(cats.densify_(sparse), ids))


def test_config_json_holds_the_small_block(sparse, tmp_path):
    sparse.save_pretrained(tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["cats"]
    names = "version method router target_sparsity realized_sparsity"
    assert block.keys() == {*names.split(), "calibration_tokens", "calibration_hash"}
    assert block["version"] == 1
    assert block["calibration_tokens"] == 128


def test_dense_checkpoint_is_refused(tmp_path):
    models.make_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"dense.*AutoModelForCausalLM\.from_pretrained"):
        cats.from_pretrained(tmp_path)


def test_thresholds_of_another_model_are_refused(sparse, tmp_path):
    config = cats.calibrate(cats.densify_(sparse), [models.make_ids()], target_sparsity=0.5)
    models.make_model().save_pretrained(tmp_path)
    with pytest.raises(ModelMismatchError):
        cats.from_pretrained(tmp_path, thresholds=config)


def test_thresholds_file_applies_in_another_dtype(sparse, tmp_path):
    dense = cats.densify_(sparse)
    config = cats.calibrate(dense, [models.make_ids()], target_sparsity=0.5)
    dense.save_pretrained(tmp_path)
    config.save(tmp_path / "t.safetensors")
    model = cats.from_pretrained(
        tmp_path, thresholds=tmp_path / "t.safetensors", dtype=torch.bfloat16
    )
    assert model.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.act_fn.threshold == config.thresholds["model.layers.1.mlp"]


def test_newer_checkpoint_is_refused(sparse, tmp_path):
    sparse.config.cats["version"] = 3
    sparse.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="upgrade"):
        cats.from_pretrained(tmp_path)


def test_truncated_weights_and_unknown_folder_are_refused(sparse, tmp_path):
    sparse.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises((FormatError, StorageError)):
        cats.from_pretrained(tmp_path)
    with pytest.raises(StorageError):
        cats.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "message"), [("adapter_config.json", "load_adapter"), ("history.jsonl", "merged/")]
)
def test_what_finetuning_writes_beside_a_model_is_named(tmp_path, name, message):
    (tmp_path / name).write_text("{}")
    with pytest.raises(StorageError, match=message):
        cats.from_pretrained(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path):
    models.make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(FormatError, match="other sizes"):
        cats.checkpoint.load_dense(tmp_path)


def test_built_in_name_is_taken_wherever_a_model_is_named(sparse, tmp_path, monkeypatch):
    config = cats.calibrate(cats.densify_(sparse), [models.make_ids()], target_sparsity=0.5)
    sparse.save_pretrained(tmp_path / "unpacked")
    monkeypatch.setattr(smollm2, "checkpoint", lambda: tmp_path / "unpacked")
    monkeypatch.chdir(tmp_path)
    models.make_model().save_pretrained("smollm2")
    ids = models.make_ids(seed=1)
    loaded = cats.from_pretrained("smollm2", thresholds=config)
    assert torch.equal(
        models.logits(loaded, ids), models.logits(cats.sparsify_(sparse, config), ids)
    )
    assert not checkpoint.is_sparse_checkpoint("smollm2")
    with pytest.raises(
        ConfigError,
        match=r"smollm2 is a dense checkpoint.*AutoModelForCausalLM\.from_pretrained\('",
    ):
        cats.from_pretrained("smollm2")
    with pytest.raises(ModelMismatchError):
        cats.from_pretrained("./smollm2", thresholds=config)


class Hub:
    """A hub on this machine with the files of one folder, as ``someone/model``."""

    def __init__(self, folder, patch):
        hub, self.requests = self, []

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.requests.append(self.path)
                file = folder / self.path.removeprefix("/someone/model/resolve/main/")
                exists = file.is_file()
                body = file.read_bytes() if exists else b""
                self.send_response(200 if exists else 404)
                if exists:
                    self.send_header("ETag", f'"{file.name}"')
                    self.send_header("X-Repo-Commit", "0" * 40)
                else:
                    missing = "Entry" if "someone/model" in self.path else "Repo"
                    self.send_header("X-Error-Code", f"{missing}NotFound")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                return body

            def do_GET(self):
                self.wfile.write(self.do_HEAD())

            def log_message(self, *args):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        url = f"http://127.0.0.1:{self.server.server_port}"
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = url + template.removeprefix(huggingface_hub.constants.ENDPOINT)
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub", monkeypatch)
    yield hub
    hub.close()


def test_model_of_the_hub_loads_and_again_from_the_cache_without_it(
    sparse, hub, tmp_path, monkeypatch
):
    sparse.save_pretrained(tmp_path / "hub")
    ids, cache = models.make_ids(seed=1), tmp_path / "cache"
    loaded = cats.from_pretrained("someone/model", cache_dir=cache)
    assert torch.equal(models.logits(loaded, ids), models.logits(sparse, ids))
    cats.from_pretrained("someone/model", cache_dir=cache, local_files_only=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.close()
    loaded = cats.from_pretrained("someone/model", cache_dir=cache)
    assert torch.equal(models.logits(loaded, ids), models.logits(sparse, ids))


def test_mistyped_name_asks_the_hub_once_and_says_what_was_looked_for(hub, tmp_path):
    with pytest.raises(StorageError, match=r"no folder of that name.*not on the.*smollm2 is the"):
        cats.from_pretrained("smollm", cache_dir=tmp_path)
    requested = [path for path in hub.requests if "smollm" in path]
    assert requested == ["/smollm/resolve/main/config.json"]


def test_hub_that_does_not_answer_is_asked_once(hub, tmp_path, caplog):
    hub.close()
    with pytest.raises(StorageError, match=r"no folder of that name.*cannot be reached"):
        checkpoint.load_dense("smollm", cache_dir=tmp_path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("smollm", {}, "HF_HUB_OFFLINE"),
        ("smollm", {"local_files_only": True}, "not in the cache"),
        ("run/adapter/absent", {}, "no folder of that name, and no name of a model"),
        ("./smollm", {}, "no such folder"),
        (__file__, {}, "a file, expected a folder"),
    ],
)
def test_name_that_leads_nowhere_says_why(tmp_path, name, options, message):
    with pytest.raises(StorageError, match=message):
        cats.from_pretrained(name, cache_dir=tmp_path, **options)


def test_tensors_that_no_method_uses_are_refused_where_they_are_stored(sparse, tmp_path):
    act = sparse.model.layers[1].mlp.act_fn
    act.register_buffer("product_threshold", torch.rand(models.F))
    sparse.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.product_threshold"):
        cats.from_pretrained(tmp_path)


def test_thresholds_written_in_a_fused_model_are_saved(sparse, tmp_path):
    cats.fuse_(sparse).model.layers[1].mlp.act_fn.threshold[::2] = 0.9
    sparse.save_pretrained(tmp_path)
    ids = models.make_ids(seed=1)
    loaded = models.logits(cats.from_pretrained(tmp_path), ids)
    assert torch.equal(loaded, models.logits(cats.unfuse_(sparse), ids))


@pytest.mark.parametrize("target", [0.5, None])
def test_options_of_the_hub_reach_every_file(tmp_path, target):
    stored = models.fill_hub_cache(tmp_path, revision="v2", subfolder="sub", target=target)
    where = dict(revision="v2", subfolder="sub", cache_dir=tmp_path, local_files_only=True)
    assert checkpoint.is_sparse_checkpoint("org/model", **where) == (target is not None)
    load = checkpoint.load_dense if target is None else cats.from_pretrained
    ids = models.make_ids(seed=1)
    loaded = load("org/model", **where)
    assert torch.equal(models.logits(loaded, ids), models.logits(stored, ids))
    assert checkpoint.load_tokenizer("org/model", **where).eos_token == "<eos>"
    for name in where.keys() - {"local_files_only"}:
        less = {key: value for key, value in where.items() if key != name}
        with pytest.raises(StorageError, match="org/model"):
            load("org/model", **less)
        with pytest.raises(StorageError, match="org/model"):
            checkpoint.is_sparse_checkpoint("org/model", **less)


def test_thresholds_are_read_from_the_files_of_a_variant(sparse, tmp_path):
    for shard in ("5GB", "10KB"):
        sparse.save_pretrained(tmp_path / shard, variant="fp16", max_shard_size=shard)
        loaded = cats.from_pretrained(tmp_path / shard, variant="fp16")
        assert loaded.model.layers[1].mlp.act_fn.threshold == (
            sparse.model.layers[1].mlp.act_fn.threshold
        )
        with pytest.raises(StorageError, match=r"has no model\.safetensors"):
            cats.from_pretrained(tmp_path / shard)


def test_revision_of_a_folder_is_refused(sparse, tmp_path):
    sparse.save_pretrained(tmp_path)
    cats.from_pretrained(tmp_path, revision="main")
    with pytest.raises(StorageError, match="only models of the Hugging Face hub have revisions"):
        cats.from_pretrained(tmp_path, revision="v2")
