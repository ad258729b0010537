import numpy as np
import pytest
import torch

from cats.decode.inputs import batch_of
from cats.errors import DataError

IDS = [[9, 9, 1], [2, 3, 4]]


def batch(inputs, mask=None, **options):
    return batch_of(inputs, mask, pad_token_id=9, vocabulary=10, **options)


@pytest.mark.parametrize(
    "inputs",
    [
        [[1], [2, 3, 4]],
        ((1,), (2, 3, 4)),
        [np.array([1]), np.array([2, 3, 4], dtype=np.uint8)],
        [torch.tensor([1]), torch.tensor([2, 3, 4])],
        [[np.int64(1)], [np.int32(2), torch.tensor(3), 4]],
        np.array([[1], [2, 3, 4]], dtype=object),
        {"input_ids": [[1], [2, 3, 4]], "attention_mask": [[1], [1, 1, 1]]},
        {"input_ids": [[9, 9, 1], [2, 3, 4]], "attention_mask": [[0, 0, 1], [1, 1, 1]]},
        {"input_ids": np.array(IDS), "attention_mask": np.array([[0, 0, 1], [1, 1, 1]])},
    ],
    ids=str,
)
def test_ids_in_every_form_are_one_batch(inputs):
    ids, mask = batch(inputs)
    assert ids.tolist() == IDS
    assert mask.tolist() == [[False, False, True], [True, True, True]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, tuple])
def test_one_prompt_is_one_row(form):
    assert batch(form([1, 2]))[0].tolist() == [[1, 2]]


def test_uint32_is_taken():
    assert batch(np.array([[1, 2]], dtype=np.uint32))[0].tolist() == [[1, 2]]


@pytest.mark.parametrize("infer", [False, True])
def test_padding_is_inferred_where_that_is_asked_for(infer):
    _, mask = batch(torch.tensor(IDS), infer_mask=infer)
    assert (not mask.all()) == infer
    # the ids of lists are what their owner meant
    assert batch([[9, 1]], infer_mask=True)[1].all()


@pytest.mark.parametrize(
    ("inputs", "mask"),
    [
        ([True, False], None),
        ([[1, True]], None),
        (torch.tensor([[True, False]]), None),
        (np.array([[True]]), None),
        (np.array([[0.5]]), None),
        ([[np.float32(1)]], None),
        ([[-1]], None),
        ([[10]], None),
        (np.array([2**64 - 1], dtype=np.uint64), None),
        ([[1], 2], None),
        ([[[1]]], None),
        ([[1, 2]], [[1]]),
        ([[1], [2, 3]], [[1, 1], [1, 1]]),
        (torch.tensor([[1, 2]]), torch.tensor([[0.0, -torch.inf]])),
    ],
    ids=str,
)
def test_what_is_no_id_or_mask_is_refused(inputs, mask):
    with pytest.raises(DataError):
        batch(inputs, mask)
