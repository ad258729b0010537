import pytest

from cats.errors import ConfigError
from cats.recipes import Recipe, reproduce
from tests import models


@pytest.mark.parametrize(("bos", "begins"), [(None, True), (True, True), (False, None)])
def test_blocks_begin_as_the_option_says_and_every_number_tells(tmp_path, model, bos, begins):
    recipe = Recipe(
        model=model, tokenizer=models.make_tokenizer(begins=True), folder=tmp_path, name="tiny",
        targets=[0.5], samples=2, length=8, bos=bos, source="text",
    )  # fmt: skip
    blocks = [*recipe.split("abc" * 40), *recipe.eval_blocks({"other": "xy" * 40}, None).values()]
    assert all((b[:, 0] == models.BOS).all() == bool(begins) for b in blocks)
    assert recipe.settings["bos"] is begins


def test_what_cannot_be_right_is_refused_before_the_folder_is_written(tmp_path, model, tokenizer):
    common = {"model": model, "tokenizer": tokenizer, "folder": tmp_path, "name": "tiny"}
    with pytest.raises(ConfigError, match="inside"):
        Recipe(**common, targets=[50])
    recipe = Recipe(**common, samples=2, length=8)
    with pytest.raises(ConfigError, match="got 'dejavu'"):
        reproduce(recipe, text="abc" * 40, methods=["cats", "dejavu"], tasks=[])
    assert not any(tmp_path.iterdir())
