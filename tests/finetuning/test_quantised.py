import pytest
import torch

import cats
from cats.decode.stream.spec import read_spec
from cats.errors import UnsupportedModelError
from cats.finetuning import load_adapter
from cats.quantisation import quantise_
from cats.weights import QuantisedLinear
from tests import models

SIZES = dict(hidden_size=64, intermediate_size=128, head_dim=32)


@pytest.fixture
def base(tmp_path):
    """Folder of a model in 4 bits."""
    torch.manual_seed(1)
    model = quantise_(models.make_model(**SIZES), bits=4, group_size=32)
    cats.formats.store_packed_(model).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def stored(model):
    """Every tensor of the quantised layers, by the name that it has without adapters."""
    return {
        f"{name.removeprefix('base_model.model.').removesuffix('.base_layer')}.{part}": tensor
        for name, module in model.named_modules()
        if isinstance(module, QuantisedLinear)
        for part, tensor in module.named_buffers()
    }


def greedy_by_hand(model, ids, count):
    for _ in range(count):
        chosen = models.logits(model, ids)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, chosen), 1)
    return ids


def test_adapters_learn_beside_codes_and_are_decoded(tune, make, base, ids, tmp_path):
    model = make()
    before = {name: tensor.clone() for name, tensor in stored(model).items()}
    assert len(before) == 28
    result = tune("run", model)
    first, last = result.history.points[0], result.history.points[-1]
    assert last.losses["held out"] < first.losses["held out"] - 0.5
    assert {n: t.tolist() for n, t in stored(result.model).items()} == {
        n: t.tolist() for n, t in before.items()
    }
    loaded = load_adapter(base, tmp_path / "run" / "adapter")
    prompt = ids[:1, :8]
    assert torch.equal(models.logits(loaded, prompt), models.logits(result.model, prompt))
    expected = greedy_by_hand(result.model, prompt, 6)
    assert cats.generate(loaded, prompt, max_new_tokens=6, engine="eager").tolist() == (
        expected.tolist()
    )
    with pytest.raises(UnsupportedModelError, match=r"expected ordinary weights .* or quantised"):
        read_spec(loaded.get_base_model())
    without = cats.generate(make(), prompt, max_new_tokens=6, engine="eager")
    assert without.tolist() != expected.tolist()


def test_what_codes_cannot_do_is_refused_before_the_training(tune, make, tmp_path):
    with pytest.raises(UnsupportedModelError, match="not merged into quantised"):
        tune("merged", make(), merge=True)
    with pytest.raises(UnsupportedModelError, match="no gradient"):
        tune("full", make(), options={"full": True})
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "full").exists()
