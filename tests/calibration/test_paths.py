import pytest
import torch
from torch.nn import functional as F

from cats.calibration import Paths, Samples
from cats.calibration.paths import Point
from cats.errors import DataError, FormatError, ModelMismatchError, UnsupportedModelError
from tests import models


@pytest.fixture(scope="module")
def searched():
    torch.manual_seed(0)
    model, ids = models.make_model(), models.make_ids(4, 40)
    samples = Samples.collect(model, [ids], attention=True)
    return model, ids, samples, Paths.search(model, samples, "cascade")


def test_inputs_and_gradients_are_those_of_the_layers(searched):
    model, ids, samples, _ = searched
    seen = {}
    names = ("model.layers.1.mlp", "model.layers.0.self_attn.o_proj")

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            seen[name] = args[0], output

        return hook

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    logits = model(input_ids=ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    picks = torch.arange(32) * 39 // 32
    for name in names:
        x, y = seen[name]
        torch.testing.assert_close(samples.inputs[name], x[:, picks].flatten(0, 1).detach())
        expected = y.grad[:, picks].square().sum(-1).flatten()
        torch.testing.assert_close(samples.weights[name], expected, rtol=1e-3, atol=1e-6)


def test_collecting_leaves_the_model_as_it_was(searched):
    model = models.make_model().train()
    flags = {
        n: p.requires_grad_("gate" not in n).requires_grad for n, p in model.named_parameters()
    }
    Samples.collect(model, [models.make_ids(2, 8)])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_parts_of_a_text_add_up_and_come_back_from_a_file(searched, tmp_path):
    model, ids, samples, paths = searched
    first = Samples.collect(model, [ids[:2]], attention=True)
    both = Samples.collect(model, [ids[2:]], attention=True, samples=first)
    assert (both.tokens, both.blocks, both.text_hash) == (160, 4, samples.text_hash)
    both.save(tmp_path / "s.safetensors", paths=[paths.to_dict()])
    loaded, block = Samples.load(tmp_path / "s.safetensors")
    for name, x in both.inputs.items():
        assert torch.equal(loaded.inputs[name], x)
        assert torch.equal(loaded.weights[name], both.weights[name])
    assert Paths.from_dict(block["paths"][0], "file") == paths
    torch.manual_seed(1)
    with pytest.raises(ModelMismatchError):
        Samples.collect(models.make_model(), [], attention=True, samples=loaded)
    with pytest.raises(FormatError, match="damaged paths"):
        Paths.from_dict({"method": "cascade", "points": {"a": [{}]}}, "file")


def test_search_is_deterministic_and_continues(searched):
    model, _, samples, paths = searched
    some = {name: paths.points[name] for name in [*paths.points][:5]}
    seen = []
    again = Paths.search(
        model, samples, "cascade", known=some, track=lambda names: seen.extend(names) or names
    )
    assert again == paths
    assert seen == [*paths.points][5:]


def test_every_step_reads_less(searched):
    for points in searched[3].points.values():
        assert points[0].error == 0
        sizes = [point.bytes for point in points]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] < 0.3 * sizes[0]


def test_split_takes_the_cheapest_steps_first():
    def path(*errors):
        return [
            Point(dropped={"rows": i / 10}, bytes=100.0 - 10 * i, error=e)
            for i, e in enumerate(errors)
        ]

    # the second step of b is so cheap that the first one comes with it
    paths = Paths(method="cascade", points={"a": path(0, 1, 3, 9), "b": path(0, 4, 4.5, 20)})
    assert [p.error for p in paths.split(0.95).values()] == [1, 0]
    assert [p.error for p in paths.split(0.9).values()] == [3, 0]
    assert [p.error for p in paths.split(0.8).values()] == [3, 4.5]


def test_split_beats_the_same_split_everywhere(searched):
    paths = searched[3]
    split = paths.split(0.6)
    error = sum(point.error for point in split.values())
    even = 0.0
    for points in paths.points.values():
        even += next(p.error for p in points if p.bytes <= 0.6 * points[0].bytes)
    assert error <= even


def test_padding_offloading_and_missing_text_are_refused():
    model, ids = models.make_model(), models.make_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(DataError, match="without padding"):
        Samples.collect(model, [{"input_ids": ids, "attention_mask": mask}])
    with pytest.raises(DataError, match="no tokens"):
        Paths.search(model, Samples.collect(model, []), "cascade")
    with pytest.raises(DataError, match="two tokens"):
        Samples.collect(model, [ids[:, :1]])
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="offloaded"):
        Samples.collect(model, [ids])
