"""Uses of a sparse model in transformers itself; a plain model with hooks says what is right."""

import base64
import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load, load_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

import cats
from cats.model import CatsActivation, is_sparse
from tests import models

GREEDY = dict(do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return models.make_model()


@pytest.fixture(scope="module")
def config(dense):
    return cats.calibrate(dense, [models.make_ids()], target_sparsity=0.5)


@pytest.fixture(scope="module")
def plain(dense, config):
    """The dense model, whose small activations hooks set to zero."""
    model = copy.deepcopy(dense)
    for name, threshold in config.thresholds.items():
        model.get_submodule(name).act_fn.register_forward_hook(
            lambda m, args, out, t=threshold: torch.where(out.abs() >= t, out, 0.0)
        )
    return model


@pytest.fixture(scope="module")
def folder(dense, config, tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse")
    cats.sparsify_(copy.deepcopy(dense), config).save_pretrained(path)
    models.make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def registered():
    cats.register()
    yield
    cats.unregister()


@pytest.fixture(params=["sparse", "fused"])
def model(request, dense, config):
    model = cats.sparsify_(copy.deepcopy(dense), config)
    return model if request.param == "sparse" else cats.fuse_(model)


def assert_as(plain, model):
    ids = models.make_ids(2, 9, seed=3)
    torch.testing.assert_close(
        models.logits(model, ids), models.logits(plain, ids), rtol=1e-4, atol=1e-4
    )


def test_auto_class_applies_the_thresholds_once_registered(folder, plain, dense, registered):
    cats.register()
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert_as(plain, loaded)
    assert_as(plain, cats.from_pretrained(folder))
    cats.unregister()
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["unexpected_keys"] == {f"model.layers.{i}.mlp.act_fn.threshold" for i in range(2)}
    assert_as(dense, loaded)


def test_dense_checkpoints_are_loaded_as_before(dense, registered, tmp_path):
    dense.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_sparse(loaded)
    assert not (tmp_path / "README.md").exists()
    assert_as(dense, loaded)


def test_dense_model_of_a_sparse_checkpoint_can_still_be_loaded(folder, dense, registered):
    from cats.checkpoint import load_dense

    assert_as(dense, load_dense(folder))


def test_pipeline_and_harness_pick_the_thresholds_up(folder, plain, registered):
    from lm_eval.models.huggingface import HFLM

    generator = pipeline("text-generation", model=str(folder), device="cpu")
    assert_as(plain, generator.model)
    (answer,) = generator("A cat", max_new_tokens=3, do_sample=False)
    assert answer["generated_text"].startswith("A cat")
    assert_as(plain, HFLM(pretrained=str(folder), device="cpu", dtype="float32").model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")
def test_adapter_on_a_sparse_base_is_loaded_and_merged(folder, plain, registered, tmp_path):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder)
    lora = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, r=2)
    adapted = get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = models.make_ids(2, 9)
    expected = models.logits(adapted, ids)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert is_sparse(loaded)
    assert torch.equal(models.logits(loaded, ids), expected)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(models.logits(again, ids), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, models.logits(plain, ids), atol=1e-2)


def test_trainer_trains_and_saves_the_sparse_model(folder, registered, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = TrainingArguments(
        tmp_path, max_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in models.make_ids(4, 8)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert is_sparse(loaded)
    ids = models.make_ids(2, 9)
    torch.testing.assert_close(models.logits(loaded, ids), models.logits(model.eval(), ids))


def test_saved_loaded_and_saved_again_is_the_same(folder, registered, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    blocks = [json.loads((p / "config.json").read_text())["cats"] for p in (folder, tmp_path)]
    assert blocks[0] == blocks[1]
    assert "| target sparsity | 50% |" in (tmp_path / "README.md").read_text()


WITH_DISK = dict.fromkeys(
    ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
) | {"model.layers.1": "disk"}


@pytest.mark.parametrize("device_map", ["auto", WITH_DISK], ids=["auto", "disk"])
def test_device_map_and_disk_offload(folder, plain, registered, tmp_path, device_map):
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path
    )
    assert is_sparse(loaded)
    assert_as(plain, loaded)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as ``push_to_hub`` asks for; what is committed is kept in memory."""

    files: dict

    def do_GET(self):
        self._answer({"error": "not found"}, 404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path.endswith("/repos/create"):
            self._answer({"url": "https://huggingface.co/org/model", "name": "org/model"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self._answer({"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[entry["value"]["path"]] = content
            url = "https://huggingface.co/org/model/commit/0"
            self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})
        else:
            self._answer({})

    def _answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_push_to_hub_sends_the_thresholds(folder, config, registered, monkeypatch):
    import huggingface_hub

    class KeepingHub(Hub):
        pass

    KeepingHub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), KeepingHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    # transformers keeps one, which remembers the address of whoever asked first
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    try:
        AutoModelForCausalLM.from_pretrained(folder).push_to_hub("org/model", token="hf_x")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    files = KeepingHub.files
    weights = load(files["model.safetensors"])
    for name, threshold in config.thresholds.items():
        assert torch.equal(weights[f"{name}.act_fn.threshold"], threshold)
    assert json.loads(files["config.json"])["cats"] == config.to_dict()


def test_exported_program_computes_the_same(model, plain):
    ids = models.make_ids(2, 9, seed=3)
    arguments = {"input_ids": ids, "use_cache": False}
    program = torch.export.export(model, (), arguments, strict=False)
    torch.testing.assert_close(
        program.module()(**arguments).logits, models.logits(plain, ids), rtol=1e-4, atol=1e-4
    )


def test_compiled_as_one_graph(model, plain):
    ids = models.make_ids(2, 9, seed=3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        actual = compiled(input_ids=ids, use_cache=False).logits
    torch._dynamo.reset()
    torch.testing.assert_close(actual, models.logits(plain, ids), rtol=1e-4, atol=1e-4)


MODES = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_generate_gives_what_the_plain_model_gives(model, plain, options):
    ids = models.make_ids(1, 7, seed=5)
    mask = torch.ones_like(ids)
    arguments = GREEDY | options | {"attention_mask": mask}
    expected = plain.generate(ids, **arguments)
    models.assert_same_tokens(plain, model.generate(ids, **arguments), expected)


def test_assisted_generation(model, plain, dense):
    ids = models.make_ids(1, 7, seed=6)
    arguments = GREEDY | {"attention_mask": torch.ones_like(ids)}
    expected = plain.generate(ids, **arguments)
    # in both roles
    assisted = model.generate(ids, assistant_model=dense, **arguments)
    models.assert_same_tokens(plain, assisted, expected)
    expected = dense.generate(ids, **arguments)
    assisted = dense.generate(ids, assistant_model=model, **arguments)
    models.assert_same_tokens(dense, assisted, expected)


@pytest.mark.thorough
def test_continuous_batching(model, plain):
    prompts = [models.make_ids(1, length, seed=length)[0].tolist() for length in (3, 8, 5)]
    shapes = []
    mlp = model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape))
    options = GenerationConfig(do_sample=False, max_new_tokens=4, eos_token_id=None, pad_token_id=0)
    answers = model.generate_batch(inputs=prompts, generation_config=options)
    assert {shape[0] for shape in shapes} == {1}
    assert max(shape[1] for shape in shapes) > 8
    new = sorted(answers.values(), key=lambda answer: prompts.index(answer.prompt_ids))
    for prompt, answer in zip(prompts, new, strict=True):
        ids = torch.tensor([prompt])
        expected = plain.generate(
            ids, attention_mask=torch.ones_like(ids), **GREEDY | {"max_new_tokens": 4}
        )
        actual = torch.tensor([prompt + answer.generated_tokens])
        models.assert_same_tokens(plain, actual, expected)


def test_sparse_activations_are_all_there(model):
    assert sum(isinstance(m, CatsActivation) for m in model.modules()) == 2
