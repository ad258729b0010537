import pytest

from tests import models


@pytest.fixture
def model():
    return models.make_model()


@pytest.fixture
def tokenizer():
    return models.make_tokenizer()


@pytest.fixture
def data_dir(tmp_path):
    """Tiny data in the columns of PIQA, SciQ and ARC-easy, some splits absent."""
    return models_data(tmp_path / "data")


def models_data(folder):
    datasets = pytest.importorskip("datasets", reason="needs the extra eval")
    words = ["red", "green", "blue", "black", "white", "grey", "brown", "pink"]

    def save(task, split, rows):
        (folder / task).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / task / f"{split}.parquet")

    save("piqa", "validation", [
        {"goal": f"paint it {word}", "sol1": f"use {word}", "sol2": f"use no {word} at all",
         "label": i % 2}
        for i, word in enumerate(words)
    ])  # fmt: skip
    save("sciq", "validation", [
        {"question": f"what is {word}?", "support": f"{word} is a colour", "distractor1": "a",
         "distractor2": "bb", "distractor3": "ccc", "correct_answer": "a colour"}
        for word in words
    ])  # fmt: skip
    for split in ("test", "validation"):
        save("arc_easy", split, [
            {"id": f"{split}{i}", "question": f"which is {word}?", "answerKey": "AB"[i % 2],
             "choices": {"text": [word, "none"], "label": ["A", "B"]}}
            for i, word in enumerate(words)
        ])  # fmt: skip
    return folder
