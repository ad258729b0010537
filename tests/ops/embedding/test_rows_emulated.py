"""The CUDA kernel of the embeddings of several rows on a CPU, by an emulator."""

import pytest
import torch

from tests.ops.emulator import emulated_kernels, needs_emulator

pytestmark = needs_emulator


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_active_row_starts_with_the_embedding_of_its_token(monkeypatch, dtype):
    from cats.ops.embedding import rows

    with emulated_kernels(monkeypatch):
        table = torch.randn(50, 2056).to(dtype)
        residual = torch.full((4, 2056), torch.nan)
        # launches hold only addresses
        tokens, lines = torch.tensor([7, 3, -1, 49]), torch.tensor([3, 10**6, 0, 1])
        active = torch.tensor([1, 0, 1, 1], dtype=torch.int32)
        launch = rows.launch(
            table=table,
            tokens=tokens,
            lines=lines,
            active=active,
            residual=residual,
            scale=1.5,
        )
        launch.function.launch(
            launch.arguments,
            blocks=launch.blocks,
            columns=launch.columns,
            stream=0,
            dependent=False,
        )
    expected = table[[49, 0, 7, 3]].float() * 1.5
    expected[1] = 0
    assert torch.equal(residual, expected)
