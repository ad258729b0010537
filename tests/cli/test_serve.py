"""``cats serve`` up to the point where it listens; tests/serving has the rest."""

import socket

import pytest
import torch

import cats
from cats.checkpoint import load_dense
from cats.cli import options
from cats.finetuning.adapters import add_adapters, load_adapter, save_adapter
from cats.finetuning.options import FinetuneOptions
from cats.serving import run
from tests.models import logits, make_ids, make_model

pytest.importorskip("peft", reason="needs the extra finetune")


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """Folder of an adapter that changes much, with thresholds."""
    model = load_dense(checkpoint)
    config = cats.calibrate(model, [make_ids()], target_sparsity=0.5)
    cats.sparsify_(model, config)
    wrapped = add_adapters(model, FinetuneOptions())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_adapter(wrapped, config, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_added_to_the_weights_and_brings_its_thresholds(checkpoint, adapter):
    loaded, _ = options.load(
        checkpoint, adapter=adapter, dtype=options.Dtype.auto, device="cpu", threads=1
    )
    assert type(loaded) is type(make_model())
    ids = make_ids(2, 8)
    expected = logits(load_adapter(checkpoint, adapter), ids)
    torch.testing.assert_close(logits(loaded, ids), expected, atol=1e-4, rtol=1e-3)
    options.fuse_where_possible(loaded)
    torch.testing.assert_close(logits(loaded, ids), expected, atol=1e-4, rtol=1e-3)


@pytest.fixture
def served(monkeypatch):
    """What would be served, instead of serving it."""
    found = []

    def keep(models, settings, *, on_start):
        on_start("http://127.0.0.1:1")
        found.append((list(models), settings))
        models.close()

    monkeypatch.setattr(run, "run", keep)
    return found


def test_the_command_says_what_is_served_and_where(command, checkpoint, adapter, served):
    code, _, err = command(
        "serve", checkpoint, "--adapter", adapter, "--name", "cat", "--context", 64, "--rows", 2
    )
    assert code == 0, err
    [(models, settings)] = served
    assert [model.id for model in models] == ["cat", "cat:dense"]
    assert settings.is_local
    assert "cat: sparse, context 64 tokens, 2 answers at a time" in err
    assert "cat:dense: dense, context 64 tokens, 2 answers at a time" in err
    assert "chat at http://127.0.0.1:1/, OpenAI clients at http://127.0.0.1:1/v1" in err
    assert "warning" not in err


def test_a_dense_model_is_made_sparse_at_the_start(command, checkpoint, served):
    small = ("--context", 64, "--rows", 1)
    code, _, err = command("serve", checkpoint, "--sparsity", 0.5, *small)
    assert code == 0, err
    [(models, _)] = served
    assert [model.describe()["cats"]["sparse"] for model in models] == [True, False]
    assert "thresholds of" in err
    assert "what they cost in quality was not measured" in " ".join(err.split())


def test_another_address_comes_with_a_warning(command, checkpoint, served):
    small = ("--context", 64, "--rows", 1)
    code, _, err = command("serve", checkpoint, "--host", "0.0.0.0", *small)
    assert code == 0, err
    assert "everybody who reaches this address may use the model" in err
    code, _, err = command("serve", checkpoint, "--host", "0.0.0.0", "--api-key", "k", *small)
    assert "only requests with the key are answered" in err
    assert served[-1][1].api_keys == ("k",)


def test_a_chat_template_of_a_file_replaces_the_models_own(command, checkpoint, served, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!")
    template = ("--chat-template", tmp_path / "t.jinja")
    code, _, err = command("serve", checkpoint, "--context", 64, "--rows", 1, *template)
    assert code == 0, err
    [(models, _)] = served
    text = models[0].prompts.text_of_chat([{"role": "user", "content": "Hi"}])
    assert text == "Hi!"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--adapter", "x", "--thresholds", "y"), "an adapter brings its own thresholds"),
        (("--adapter", "x", "--sparsity", "0.5"), "an adapter brings its own thresholds"),
        (("--thresholds", "y", "--sparsity", "0.5"), "--thresholds or --sparsity, not both"),
        (("--sparsity", "50"), "inside (0, 1)"),
        (("--text", "y"), "give --sparsity too"),
        (("--api-key", " k"), "an API key is"),
        (("--request-timeout", "0"), "positive request_timeout"),
        (("--chat-template", "absent.jinja"), "absent.jinja"),
        (("--engine", "stream", "--context", "64", "--rows", "1"), "stream"),
        (("--context", "100000"), "expected a context up to the model's, 512"),
    ],
)
def test_options_that_cannot_be_right_end_in_one_line(command, checkpoint, arguments, words):
    code, _, err = command("serve", checkpoint, *arguments)
    assert code == 1
    assert words in " ".join(err.split())


def test_a_port_that_another_program_has_is_said(command, checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = command("serve", checkpoint, "--port", port, "--context", 64, "--rows", 1)
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in err
