"""What every method answers. A new method is one subclass in a file of its own."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cats.mlp import CatsActivation, GatedMLP


class Method(ABC):
    """A way to choose which neurons are dropped.

    Attributes:
        name: The word that ``method=`` and a checkpoint's config use.
        router: The branch that is read whole and compared: ``"gate"`` or ``"up"``.
        has_target: Whether it aims at a target sparsity.
    """

    name: ClassVar[str]
    router: ClassVar[str] = "gate"
    has_target: ClassVar[bool] = True

    def observe(self, mlp: GatedMLP, record: Callable[[Tensor], None]) -> RemovableHandle:
        """Hook the dense MLP so that ``record`` gets the values ``[B, T, F]`` to be counted.

        Here these are the inputs of the activation: their density is smooth, where that of
        ``abs(silu)`` piles up below 0.2785, so that counting them gives finer thresholds.
        """

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            record(args[0])

        return mlp.act.register_forward_pre_hook(hook)

    @abstractmethod
    def score(self, values: Tensor, activation: str) -> Tensor:
        """From counted values to what the threshold is compared with, float32, same shape."""

    @abstractmethod
    def apply_(self, mlp: GatedMLP, tensors: dict[str, Tensor]) -> None:
        """Make the MLP sparse in place with the stored tensors; a stored weight never changes."""

    def _threshold_on(self, mlp: GatedMLP, act: nn.Module, threshold: Tensor) -> None:
        device = next(mlp.module.parameters()).device
        sparse = CatsActivation(act, threshold.to(device), dense=mlp.dense_act)
        mlp.replace_act(sparse.train(mlp.module.training))
