import copy

import pytest

import cats
from cats.card import card, write_card
from cats.errors import StorageError
from tests import models


@pytest.fixture(scope="module")
def block():
    model = models.make_model()
    return cats.calibrate(model, [models.make_ids()], target_sparsity=0.5).to_dict()


def test_card_says_what_was_calibrated_on_what_and_how_to_load_it(block):
    facts = {"perplexity on 100 held-out tokens": "12.5 (dense 12.0)"}
    text = card(block, base="org/model", facts=facts)
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: org/model\n" in text
    assert "| target sparsity | 50% |" in text
    assert f"| {block['calibration_tokens']:,} tokens, hash `{block['calibration_hash']}` |" in text
    assert "of the neurons in 2 MLPs" in text
    assert "| perplexity on 100 held-out tokens | 12.5 (dense 12.0) |" in text
    assert "cats.from_pretrained(" in text
    assert "cats.register()" in text


def test_folder_is_no_base_model_of_the_hub(block):
    assert "base_model" not in card(block, base="/home/me/model")
    relu = copy.deepcopy(block) | {"target_sparsity": None}
    assert "| target sparsity | none |" in card(relu)


def test_card_of_another_hand_stays_and_ours_is_renewed(block, tmp_path):
    write_card(tmp_path, block)
    write_card(tmp_path, block | {"method": "relu"})
    assert "| method | relu |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine")
    write_card(tmp_path, block)
    assert (tmp_path / "README.md").read_text() == "# Mine"


def test_card_that_cannot_be_written_is_an_error(block, tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        write_card(tmp_path / "nowhere", block)
