import json

import pytest
import torch

from cats.errors import ConfigError
from cats.recipes import TrainingData
from tests import models


@pytest.fixture
def file(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("bos", "expected"), [(None, True), (False, False)])
def test_the_begin_of_a_text_reaches_all_data(file, tmp_path, bos, expected):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"question": "abc", "answer": "d"}) + "\n")
    tokenizer = models.make_tokenizer(begins=True)

    def begins(ids):
        return bool((torch.as_tensor(ids)[..., 0] == models.BOS).all())

    data = TrainingData(
        text=(file,), eval_text=(f"t={file}",), eval_pairs=(f"p={pairs}",), block=8, bos=bos
    )
    train, evaluations = data.train(tokenizer), data.evaluations(tokenizer)
    assert begins(train.ids) is expected
    assert begins(evaluations["t"].ids) is expected
    assert begins(evaluations["p"].prompts) is expected
    assert begins(data.calibration(tokenizer, train)) is expected
    data = TrainingData(pairs=(str(pairs),), calibration_text=(file,), block=8, bos=bos)
    train = data.train(tokenizer)
    assert begins(train.prompts) is expected
    assert begins(data.calibration(tokenizer, train)) is expected


def test_one_name_instead_of_a_list_is_refused():
    with pytest.raises(ConfigError, match=r"text must be a list of names, got 'a\.txt'"):
        TrainingData(text="a.txt")
