"""The base classes of all methods. A new method is one subclass in its own file."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cats.errors import UnsupportedModelError
from cats.model import CatsActivation, GatedMLP, is_hooked, share_hooks
from cats.weights.placement import input_device


class Method(ABC):
    """A way to choose which weights of an MLP a token does not read.

    Attributes:
        name: The value of ``method=``, also in the config of a checkpoint.
        router: The branch whose outputs are compared with the thresholds: ``"gate"`` or ``"up"``.
        tensors: Names of the tensors that it stores per MLP.
        masked: Layers of an MLP whose inputs it compares with thresholds, of ``"gate"``, ``"up"``
            and ``"down"``.
    """

    name: ClassVar[str]
    router: ClassVar[str] = "gate"
    tensors: ClassVar[frozenset[str]] = frozenset({"threshold"})
    masked: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def apply_(self, mlp: GatedMLP, tensors: dict[str, Tensor]) -> None:
        """Make the MLP sparse in place; its weights do not change.

        A saved model is made sparse again with the tensors of its activation. So they must be those
        that came, unchanged: what is computed from them is computed in the forward pass.

        Args:
            mlp: A dense or sparse MLP.
            tensors: Those of :attr:`tensors`. Thresholds of inputs are applied for all methods
                alike, after this.
        """

    def _threshold_on(
        self,
        mlp: GatedMLP,
        act: nn.Module,
        threshold: Tensor,
    ) -> None:
        """Put the thresholded activation into the MLP.

        A method with another router than the gate gives the MLP a forward of its own that compares
        it. ``fuse_`` then passes the router to the operator, and takes the MLP only if a probe
        shows that the operator computes the same.
        """
        if act is not mlp.dense_act and is_hooked(mlp.dense_act):
            raise UnsupportedModelError(
                f"{mlp.name}.{mlp.activation_name} has a hook, and method {self.name!r} puts "
                "another activation there: remove the hook first"
            )
        device = input_device(mlp.module)
        sparse = CatsActivation(
            act,
            threshold.to(device),
            dense=mlp.dense_act,
            router=self.router,
        )
        if isinstance(mlp.act, CatsActivation):
            share_hooks(mlp.act, sparse)
        for module in (sparse,) if act is mlp.dense_act else (sparse, act):
            module.training = mlp.module.training
        mlp.replace_act(sparse)


class CountedMethod(Method):
    """A method with one threshold per MLP, which follows from counts of single numbers.

    Attributes:
        has_target: Whether it has a target sparsity.
    """

    has_target: ClassVar[bool] = True

    def observe(self, mlp: GatedMLP, record: Callable[[Tensor], None]) -> RemovableHandle:
        """Hook the dense MLP so that ``record`` gets the values ``[B, T, F]`` to count.

        By default these are the inputs of the activation. Their density is smooth, while that of
        ``abs(silu)`` piles up below 0.2785, so counting the inputs gives finer thresholds.
        """

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            record(args[0])

        return mlp.act.register_forward_pre_hook(hook)

    @abstractmethod
    def score(self, values: Tensor, activation: str) -> Tensor:
        """The scores of counted values, float32, same shape; a threshold is compared with them."""
