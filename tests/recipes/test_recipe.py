import pytest

from cats.errors import ConfigError
from cats.evaluation import Dense
from cats.recipes import Progress, Recipe, reproduce
from tests import models

SMALL = {"name": "tiny", "targets": [0.5], "samples": 2, "length": 8, "source": "text"}


@pytest.mark.parametrize(("bos", "begins"), [(None, True), (True, True), (False, None)])
def test_blocks_begin_as_the_option_says_and_every_number_tells(tmp_path, model, bos, begins):
    tokenizer = models.make_tokenizer(begins=True)
    common = {"model": model, "tokenizer": tokenizer, "folder": tmp_path}
    recipe = Recipe(**common, **SMALL, bos=bos)
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


def test_a_bar_moves_while_a_perplexity_is_measured(tmp_path, model, tokenizer):
    passed = []

    class Bar(Progress):
        def track(self, items, text):
            for i, item in enumerate(items):
                passed.append(i)
                yield item

    class Watched(Dense):
        def measure(self, model, batches):
            for done, _ in enumerate(batches, 1):
                assert len(passed) == done
            return 1.0, 1.0

    common = {"model": model, "tokenizer": tokenizer, "folder": tmp_path}
    recipe = Recipe(**common, **SMALL, progress=Bar())
    recipe.perplexity(Watched(), "text", models.make_ids(rows=12, length=8))
    assert passed == [0, 1, 2]
    recipe.perplexity(Watched(), "text", models.make_ids(rows=12, length=8))
    assert passed == [0, 1, 2], "what is in the folder is not measured again"
