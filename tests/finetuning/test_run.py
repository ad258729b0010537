import dataclasses
import shutil

import pytest
import torch
import transformers
from torch import nn

import cats
from cats.errors import (
    ConfigError,
    DataError,
    StorageError,
    TrainingError,
    UnsupportedModelError,
)
from cats.finetuning import Blocks, StreamedBlocks, load_adapter
from cats.finetuning.settings import data_settings, thresholds_of
from cats.history import History
from tests import models


def curve(history):
    """What a run measured, without the time that it took."""
    return [dataclasses.replace(point, seconds_per_step=None) for point in history.points]


@pytest.mark.parametrize("method", ["cats", "relu", "dense"])
def test_loss_falls_and_sparsity_stays(tune, method):
    points = tune(method=method).history.points
    assert [point.step for point in points] == [0, 2, 4, 6, 8]
    assert [point.tokens for point in points] == [0, 256, 512, 768, 1024]
    losses = [point.losses["held out"] for point in points]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    assert points[0].train_loss is None
    assert points[1].train_loss > points[-1].train_loss
    if method == "dense":
        assert all(point.sparsity is None for point in points)
    else:
        assert all(0.4 < point.sparsity < 0.6 for point in points)


def test_last_step_is_measured_once(tune):
    points = tune(options={"steps": 7, "evaluate_every": 4, "save_every": 0}).history.points
    assert [point.step for point in points] == [0, 4, 7]
    assert points[-1].train_loss < points[-2].train_loss
    assert points[-1].seconds_per_step > 0


def test_train_loss_is_the_mean_over_the_steps_between(tune):
    often = tune("often", options={"steps": 6, "evaluate_every": 1}).history.points
    seldom = tune("seldom", options={"steps": 6, "evaluate_every": 4}).history.points
    for last, first, stop in ((1, 1, 5), (2, 5, 7)):
        mean = sum(p.train_loss for p in often[first:stop]) / (stop - first)
        assert seldom[last].train_loss == pytest.approx(mean, rel=1e-6)


def test_step_zero_and_the_metrics_agree(tune, make, ids):
    point = tune(options={"steps": 1}).history.points[0]
    perplexity, sparsity = cats.metrics.perplexity_and_sparsity(make(), [ids[16:]])
    assert torch.isclose(torch.tensor(point.losses["held out"]).exp(), torch.tensor(perplexity))
    assert abs(point.sparsity - sum(sparsity.values()) / len(sparsity)) < 1e-6


def test_base_weights_do_not_change(tune, make):
    model = make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = tune(model=model).model
    after = {n.replace(".base_layer", ""): p for n, p in tuned.get_base_model().named_parameters()}
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_dropped_neurons_get_no_gradient(make, ids):
    model = make()
    is_kept = {}

    def record(name):
        def hook(module, args, output):
            is_kept[name] = (output != 0).flatten(0, 1).any(0)

        return hook

    # one token: some neurons are dropped for all that the model sees
    mlps = cats.model.find_gated_mlps(model)
    for mlp in mlps:
        mlp.act.register_forward_hook(record(mlp.name))
    model(input_ids=ids[:1, :1]).logits.sum().backward()
    for mlp in mlps:
        dropped = ~is_kept[mlp.name]
        assert 0 < dropped.sum() < models.F
        for layer in (mlp.module.gate_proj, mlp.module.up_proj):
            assert not layer.weight.grad[dropped].any()
            assert layer.weight.grad[~dropped].any(1).all()
        assert not mlp.module.down_proj.weight.grad[:, dropped].any()


def test_interrupted_run_continues_as_if_it_had_not_been(tune, ids, tmp_path):
    options = {"recalibrate": 2, "distillation": 0.5}
    uninterrupted = tune("uninterrupted", options=options, calibration=ids)

    def interrupt(step):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune("stopped", options=options, calibration=ids, on_step=interrupt)
    assert (tmp_path / "stopped" / "checkpoint-4").is_dir()
    steps = []
    resumed = tune("stopped", options=options, calibration=ids, on_step=steps.append)
    assert steps == [5, 6, 7, 8]
    assert curve(resumed.history) == curve(uninterrupted.history)
    for name in ("adapter_model.safetensors", "thresholds.safetensors"):
        one, two = (tmp_path / run / "adapter" / name for run in ("uninterrupted", "stopped"))
        assert one.read_bytes() == two.read_bytes()


def test_run_interrupted_between_epochs_continues_exactly(tune):
    # 16 rows and batches of 4: checkpoint-4 lies at the end of an epoch, checkpoint-6 within one
    uninterrupted = tune("uninterrupted", options={"save_every": 6})

    def interrupt(step):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune("stopped", options={"save_every": 6}, on_step=interrupt)
    resumed = tune("stopped", options={"save_every": 6})
    assert curve(resumed.history) == curve(uninterrupted.history)


def test_interrupted_stream_continues_exactly(tune, tokenizer):
    def stream(number):
        texts = [f"{i} cats sat on {i * 7 % 11} mats. " * 2 for i in range(number)]
        return StreamedBlocks(tokenizer, lambda: iter(texts), length=32)

    uninterrupted = tune("uninterrupted", train=stream(60))

    def interrupt(step):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune("stopped", train=stream(60), on_step=interrupt)
    assert curve(tune("stopped", train=stream(60)).history) == curve(uninterrupted.history)
    # a stream that ends before the steps do starts again
    short = tune("short", train=stream(8)).history.points
    assert [point.step for point in short] == [0, 2, 4, 6, 8]


def test_run_killed_after_its_last_checkpoint_trains_no_further(tune, tmp_path):
    uninterrupted = tune("run")
    history = History.load(tmp_path / "run" / "history.jsonl")
    history.complete = False
    history.save(tmp_path / "run" / "history.jsonl")
    shutil.rmtree(tmp_path / "run" / "adapter")
    steps = []
    again = tune("run", on_step=steps.append)
    assert steps == []
    assert curve(again.history) == curve(uninterrupted.history)


def test_finished_run_is_not_run_again(tune, ids):
    first = tune()
    again = tune(on_step=lambda step: pytest.fail("trained again"))
    assert again.history == first.history
    assert torch.equal(models.logits(first.model, ids), models.logits(again.model, ids))


def test_other_settings_are_refused(tune):
    tune(options={"steps": 2})
    with pytest.raises(ConfigError, match=r"options\.learning_rate"):
        tune(options={"steps": 2, "learning_rate": 1e-3})


def test_full_disk_leaves_no_checkpoint_that_is_not_whole(tune, tmp_path, monkeypatch):
    saved = torch.save
    calls = []

    def full_at_the_scheduler(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        saved(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_at_the_scheduler)
        with pytest.raises(StorageError, match="No space left"):
            tune()
    assert len(calls) == 2
    assert not [*(tmp_path / "run").glob("checkpoint-*")]
    assert curve(tune().history) == curve(tune("other").history)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_process_killed_within_a_checkpoint_continues_from_the_one_before(
    tune, tmp_path, monkeypatch, call
):
    saved = torch.save
    calls = []

    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        calls.append(args)
        # three files a checkpoint: the second checkpoint is cut short
        if len(calls) == 3 + call:
            raise Killed
        saved(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(Killed):
            tune(options={"save_every": 2})
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    steps = []
    resumed = tune(options={"save_every": 2}, on_step=steps.append)
    assert steps[0] == 3
    assert curve(resumed.history) == curve(tune("uninterrupted").history)


def test_nan_stops_with_a_reason_and_keeps_the_checkpoint_before(tune, make, tmp_path):
    model = make()

    def poison(step):
        if step == 5:
            model.model.norm.weight.data.fill_(torch.nan)

    with pytest.raises(TrainingError, match=r"after 5 steps.*lower learning rate"):
        tune(model=model, on_step=poison)
    folder = tmp_path / "run"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    history = History.load(folder / "history.jsonl")
    assert [point.step for point in history.points] == [0, 2, 4]
    assert curve(tune().history) == curve(tune("uninterrupted").history)


def test_adapter_loads_on_the_base_and_merged_is_the_same(tune, base, ids, tmp_path):
    tuned = tune(merge=True).model
    adapter = load_adapter(base, tmp_path / "run" / "adapter")
    merged = cats.from_pretrained(tmp_path / "run" / "merged")
    expected = models.logits(adapter, ids)
    assert (
        expected
        - models.logits(
            cats.from_pretrained(
                base, thresholds=tmp_path / "run" / "adapter" / "thresholds.safetensors"
            ),
            ids,
        )
    ).abs().max() > 0.1
    torch.testing.assert_close(models.logits(merged, ids), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(models.logits(tuned, ids), models.logits(merged, ids))
    assert not any("lora" in name for name, _ in merged.named_modules())


def test_merged_checkpoint_fuses_and_decodes(tune, ids, tmp_path):
    tune(merge=True)
    model = cats.from_pretrained(tmp_path / "run" / "merged")
    plain = cats.generate(model, ids[:1, :5], max_new_tokens=6, engine="eager")
    fused = cats.generate(cats.fuse_(model), ids[:1, :5], max_new_tokens=6, engine="eager")
    assert torch.equal(plain, fused)


def test_recalibrated_thresholds_are_those_of_the_tuned_weights(tune, make, ids, base, tmp_path):
    result = tune(options={"recalibrate": 8}, calibration=ids, merge=True)
    before = thresholds_of(make()).thresholds
    merged = cats.from_pretrained(tmp_path / "run" / "merged")
    after = thresholds_of(merged).thresholds
    anew = cats.calibrate(cats.densify_(merged), [ids], target_sparsity=0.5).thresholds
    for name, threshold in after.items():
        assert threshold != before[name]
        # the sums of merged and separate weights differ in their last bits
        assert torch.isclose(threshold, anew[name], rtol=1e-3)
    adapter = load_adapter(base, tmp_path / "run" / "adapter")
    assert torch.allclose(models.logits(adapter, ids), models.logits(result.model, ids), atol=1e-4)


def test_full_finetuning_writes_a_sparse_checkpoint(tune, ids, tmp_path):
    tuned = tune(options={"full": True, "learning_rate": 1e-3})
    assert tuned.history.points[-1].losses["held out"] < tuned.history.points[0].losses["held out"]
    stored = cats.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(models.logits(stored, ids), models.logits(tuned.model, ids))
    assert stored.config.cats["method"] == "cats"


def test_gradient_checkpointing_gives_the_same_curve(tune):
    plain = tune("plain", options={"dropout": 0.0})
    less_memory = tune("less", options={"dropout": 0.0, "gradient_checkpointing": True})
    for a, b in zip(plain.history.points, less_memory.history.points, strict=True):
        assert a.losses["held out"] == pytest.approx(b.losses["held out"], rel=1e-6)


def test_accumulated_steps_are_those_of_a_large_batch(tune):
    large = tune("large", options={"dropout": 0.0})
    parts = tune("parts", options={"dropout": 0.0, "batch_size": 2, "accumulate": 2})
    for a, b in zip(large.history.points, parts.history.points, strict=True):
        assert a.tokens == b.tokens
        assert a.losses["held out"] == pytest.approx(b.losses["held out"], rel=1e-4)


def test_fused_model_is_refused(tune, make):
    with pytest.raises(UnsupportedModelError, match="unfuse_"):
        tune(model=cats.fuse_(make()))


def with_last_token(token):
    ids = models.make_ids(8, 32)
    ids[-1, -1] = token
    return Blocks(ids)


def test_model_with_adapters_is_refused(tune):
    tuned = tune().model
    with pytest.raises(UnsupportedModelError, match="has adapters already"):
        tune("again", model=tuned)


def test_what_is_no_language_model_is_refused(tune):
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        tune(model=nn.Linear(2, 2))


def test_full_finetuning_has_nothing_to_merge(tune):
    with pytest.raises(ConfigError, match="model/"):
        tune(options={"full": True}, merge=True)


@pytest.mark.parametrize("output", ["run", "run/within"])
def test_file_instead_of_the_folder_is_refused(tune, tmp_path, output):
    (tmp_path / "run").write_text("dear diary")
    with pytest.raises(StorageError, match="run"):
        tune(output)


BAD = {
    "too few rows": (lambda: Blocks(models.make_ids(3, 32)), {}, "fill no step"),
    "longer than the context": (lambda: Blocks(models.make_ids(8, 600)), {}, "context 512"),
    "other vocabulary": (lambda: Blocks(models.make_ids(8, 32) + 9), {}, "vocabulary"),
    "other vocabulary in the last row": (lambda: with_last_token(10_000), {}, "token 10000"),
    "negative token": (lambda: with_last_token(-1), {}, "token -1"),
    "bare tensor": (lambda: torch.zeros(8, 32), {}, "expected Blocks"),
    "no such layer": (None, {"targets": ("absent",)}, "absent"),
    "unknown tracker": (None, {"report_to": ("carrier pigeon",)}, "carrier pigeon"),
    "recalibrate without text": (None, {"recalibrate": 2}, "needs calibration"),
}


@pytest.mark.parametrize(("train", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_the_first_step(tune, train, options, message):
    def fail(_):
        pytest.fail("a step was taken")

    with pytest.raises((DataError, ConfigError), match=message):
        tune(train=None if train is None else train(), options=options, on_step=fail)


@pytest.mark.parametrize("method", ["relu", "dense"])
def test_model_without_a_target_has_nothing_to_recalibrate(tune, ids, tmp_path, method):
    with pytest.raises(ConfigError, match="target sparsity"):
        tune(method=method, options={"recalibrate": 2}, calibration=ids)
    assert not (tmp_path / "run").exists()


def test_dense_model_is_not_its_own_teacher(tune, tmp_path):
    with pytest.raises(ConfigError, match="its own teacher"):
        tune(method="dense", options={"distillation": 0.5})
    assert not (tmp_path / "run").exists()


def test_sparse_checkpoint_that_plain_transformers_loaded_is_refused(tune, make, tmp_path):
    make().save_pretrained(tmp_path / "sparse")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert model.config.cats["target_sparsity"] == 0.5
    with pytest.raises(ConfigError, match=r"cats\.from_pretrained"):
        tune(model=model)
    assert not (tmp_path / "run").exists()


def test_folder_with_other_files_is_refused(tune, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diary.txt").write_text("dear diary")
    with pytest.raises(ConfigError, match="other files"):
        tune()


def test_adapters_sit_on_queries_values_and_the_mlp(make):
    model = make()
    expected = ["down_proj", "gate_proj", "q_proj", "up_proj", "v_proj"]
    assert cats.finetuning.adapters.target_layers(model) == expected
    assert isinstance(model.model.layers[0].mlp.gate_proj, nn.Linear)


def test_tokenizer_is_needed_for_answers_alone(tune, tmp_path):
    tuned = tune(options={"steps": 1}, merge=True, tokenizer=None)
    assert (tuned.folder / "merged" / "config.json").exists()
    with pytest.raises(ConfigError, match="tokenizer"):
        tune("answers", answers={"a task": None}, tokenizer=None)


def test_run_of_other_weights_thresholds_or_data_under_the_same_names_is_refused(tune, make, ids):
    tune(options={"steps": 1})
    model = make()
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] += 1
    with pytest.raises(ConfigError, match=r"other settings \(weights\)"):
        tune(model=model, options={"steps": 1})
    model = make()
    model.model.layers[1].mlp.act_fn.threshold.mul_(1.01)
    with pytest.raises(ConfigError, match=r"other settings \(thresholds\)"):
        tune(model=model, options={"steps": 1})
    templated = models.make_tokenizer()
    templated.chat_template = "{{ messages }}"
    with pytest.raises(ConfigError, match=r"other settings \(tokenizer\)"):
        tune(tokenizer=templated, options={"steps": 1})
    tune("again", options={"steps": 2, "recalibrate": 1}, calibration=ids[:8])
    with pytest.raises(ConfigError, match=r"other settings \(calibration\)"):
        tune("again", options={"steps": 2, "recalibrate": 1}, calibration=ids[8:16])


def test_streams_that_begin_differently_are_told_apart(ids, tokenizer):
    def first(text):
        stream = StreamedBlocks(tokenizer, lambda: iter([text]), length=8)
        return data_settings(stream, {}, {}, None)["train"]

    assert first("a text of some length") == first("a text of some length")
    assert first("a text of some length") != first("another text of some length")


def test_run_of_an_older_release_is_refused(tune, tmp_path):
    tune(options={"steps": 1})
    path = tmp_path / "run" / "history.jsonl"
    history = History.load(path)
    del history.settings["weights"]
    history.save(path)
    with pytest.raises(ConfigError, match="older release, which did not record weights"):
        tune(options={"steps": 1})
