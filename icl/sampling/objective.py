"""The objective of a sampler: the loss as a function of a flat vector of the sampled weights.

A chain never changes the user's module. The module is run by `torch.func.functional_call` with the chain's weights; its other weights and
its buffers stay at w*.

Shapes: E chains, P sampled parameters, T losses of one batch (tokens; 1 for a scalar loss).
"""

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from icl.sampling.restriction import Masks, restrict

logger = logging.getLogger(__name__)

Batch = Any
LossFunction = Callable[[Callable[..., Any], Batch], Tensor]
"""(predict, batch) -> a scalar, or one loss per token (T,), whose mean then drives the chain."""

DETACHED = (
    "the loss does not depend on the sampled weights; loss_fn must run the model through its argument `predict`, "
    "without detaching the output"
)

WRITTEN = "the forward pass writes to its weights in place; let it compute with changed copies, or change them only in training"

VECTORISE_BELOW = 20_000
"""On a CPU, chains of modules with fewer sampled parameters run as one batched tensor, because the overhead of calls dominates."""


class Losses(Protocol):
    """Losses of chains' weights on a batch."""

    anchor: Tensor
    """w*: the sampled weights of the module, (P,)."""

    def losses(self, positions: Tensor, batch: Batch) -> Tensor:
        """Losses (E, T) at positions (E, P)."""
        ...


class Objective(Losses, Protocol):
    """Losses and gradients. The gradients drive a chain."""

    def losses_and_gradients(
        self, positions: Tensor, batch: Batch, token_weights: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (E, T), and gradients (E, P) of Σ_t token_weights_t loss_t, or of the mean loss if no weights are given.

        `out` (E, P) is memory that the gradients may be written to; it may be that of the positions.
        """
        ...


class ModuleObjective:
    """The loss of any `nn.Module`.

    Args:
        model: the module at w*. It is not modified, and its buffers stay as they are.
        loss_fn: see `LossFunction`. It must run the module through `predict` only.
        include, exclude, mask: which weights move (`icl.sampling.restriction`).
        vectorise: whether all chains run in one call by `torch.func.vmap`. None: decided by device and size.

    Parameters with `requires_grad=False` stay at w*. Parameters of several floating types are sampled in the widest of them. Half precision
    is sampled in float32, because a chain's steps are too small for half precision; the module still runs in its own types. Wrappers of
    `torch.compile` and data parallelism are removed.

    Raises:
        ValueError: the module has active dropout, or a batch norm without running statistics (its loss is then not a function of the
            weights); its weights are missing, on several devices, or share memory; a selected parameter is complex; all selected
            parameters are frozen; or a pattern matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        include: Sequence[str] = ("**",),
        exclude: Sequence[str] = (),
        vectorise: bool | None = None,
        mask: Masks | None = None,
    ) -> None:
        model = _unwrapped(model)
        refuse_stochastic_modules(model)
        refuse_unfit_weights(model)
        self._model = model
        self._own = threading.local()
        self._loss_fn = loss_fn
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        restriction = restrict(model, include, exclude, mask)
        names = list(restriction.masks)
        complex_ones = [name for name in names if parameters[name].is_complex()]
        if complex_ones:
            raise ValueError(f"the parameter {complex_ones[0]} is complex; only real parameters can be sampled")
        self._sizes = {name: parameters[name].shape for name in names}
        self._types = {name: parameters[name].dtype for name in names}
        # What rounding does to the loss, relative to it.
        self.resolution = max(torch.finfo(kind).eps for kind in self._types.values())
        self._frozen = {name: value for name, value in parameters.items() if name not in self._sizes}
        self._buffers = {name: value.detach() for name, value in model.named_buffers()}
        self._places = places_of_tensors(model)
        anchor = torch.cat([parameters[name].reshape(-1) for name in names]).clone()
        self._whole = anchor.to(torch.promote_types(anchor.dtype, torch.float32))
        index = restriction.index(names)
        self._index = None if index is None else index.to(anchor.device)
        self.anchor = self._whole if self._index is None else self._whole[self._index]
        if vectorise is None:
            vectorise = anchor.device.type != "cpu" or anchor.numel() < VECTORISE_BELOW
        self._vectorise = vectorise

    def losses(self, positions: Tensor, batch: Batch) -> Tensor:
        """Losses (E, T) at positions (E, P)."""
        with torch.no_grad():
            if self._vectorise and len(positions) > 1:
                try:
                    return vmap(lambda flat: self._losses_of(flat, batch))(positions)
                except (
                    Exception
                ) as error:  # a model may raise anything; if it also fails without vmap, the error is raised below
                    self._give_up_vectorising(error)
            return torch.stack([self._losses_of(flat, batch) for flat in positions])

    def losses_and_gradients(
        self, positions: Tensor, batch: Batch, token_weights: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (E, T) and gradients (E, P) of their weighted sum or mean; `out` is used for a single chain."""
        if self._vectorise and len(positions) > 1:

            def driven(flat: Tensor) -> tuple[Tensor, Tensor]:
                losses = self._losses_of(flat, batch)
                return _drive(losses, token_weights), losses

            try:
                gradients, (_, losses) = vmap(grad_and_value(driven, has_aux=True))(positions)
                return losses.detach(), gradients.detach()
            except Exception as error:
                self._give_up_vectorising(error)
        if len(positions) == 1:  # without a copy, because a large model's chains run one by one
            own = None if out is None else out[0]
            losses, gradient = self._one_with_gradient(positions[0], batch, token_weights, own)
            return losses[None], gradient[None]
        pairs = [self._one_with_gradient(flat, batch, token_weights) for flat in positions]
        return torch.stack([losses for losses, _ in pairs]), torch.stack([gradient for _, gradient in pairs])

    def unreached(self, gradient: Tensor, batch: Batch) -> list[str]:
        """Names of the sampled parameters on which the loss of a batch does not depend at all, given its gradient (P,)."""
        sizes = [size.numel() for size in self._sizes.values()]
        whole = gradient if self._index is None else torch.zeros_like(self._whole).index_copy(0, self._index, gradient)
        silent = [name for name, part in zip(self._sizes, whole.split(sizes), strict=True) if not part.any()]
        if not silent:
            return []
        with torch.enable_grad():
            flat = self._whole.detach()
            leaves = {
                name: part.clone().requires_grad_() for name, part in zip(self._sizes, flat.split(sizes), strict=True)
            }
            sought = [leaves[name] for name in silent]

            def gradients(predict: Callable[..., Any]) -> Sequence[Tensor | None]:
                losses = _checked(self._loss_fn(predict, batch))
                return torch.autograd.grad(losses.sum(), sought, allow_unused=True)

            found = self._at(list(leaves.values()), gradients)
        return [name for name, each in zip(silent, found, strict=True) if each is None]

    def loss_at(self, flat: Tensor, batch: Batch) -> Tensor:
        """The loss, a scalar with a graph to `flat` (P,), for derivatives of any order."""
        return self._losses_of(flat, batch).mean()

    def gradient_of_a_copy(self, position: Tensor, batch: Batch) -> Tensor | None:
        """The gradient (P,) at weights (P,), computed by a backward pass of a copy of the module that has these weights.

        None if this is not possible. It differs from the gradient of `losses_and_gradients` if the module reads its weights again during
        the backward pass.
        """
        try:
            module = copy.deepcopy(self._model)
            own = dict(module.named_parameters())
            with torch.no_grad():
                for (name, size), piece in zip(self._sizes.items(), self._pieces(position), strict=True):
                    own[name].copy_(piece.view(size))
                    own[name].grad = None
            with torch.enable_grad():
                self._loss_fn(module, batch).mean().backward()
        except Exception:  # a model may raise anything, and this is one look of several
            return None
        found = [(own[name], own[name].grad) for name in self._sizes]
        pieces = [torch.zeros_like(weight) if gradient is None else gradient for weight, gradient in found]
        whole = torch.cat([piece.reshape(-1) for piece in pieces]).to(position.dtype)
        return whole if self._index is None else whole[self._index]

    @property
    def groups(self) -> Tensor:
        """(P,) the number of the parameter tensor to which each sampled weight belongs."""
        sizes = torch.tensor([size.numel() for size in self._sizes.values()])
        groups = torch.arange(len(sizes)).repeat_interleave(sizes)
        return groups if self._index is None else groups[self._index.to(groups.device)]

    def bytes_for_backward(self, batch: Batch) -> int:
        """Memory that `losses_and_gradients` takes for every chain of a call; 0 if chains run one after the other."""
        # `vmap(grad_and_value)` of a transformer takes 3.4 to 3.5 times what a plain forward pass keeps (five sizes).
        return 4 * kept_for_backward(lambda flat: self._losses_of(flat, batch), self.anchor) if self._vectorise else 0

    def _one_with_gradient(
        self, flat: Tensor, batch: Batch, token_weights: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        # One leaf for each parameter, because the gradient of one vector that is split would be a copy of all its parts.
        leaves = [piece.detach().requires_grad_() for piece in self._pieces(flat.detach())]
        version = leaves[0]._version  # all are views of one tensor, with one version

        def losses_and_gradient(predict: Callable[..., Any]) -> tuple[Tensor, Sequence[Tensor | None]]:
            losses = _checked(self._loss_fn(predict, batch))
            driving = _drive(losses, token_weights)
            found = torch.autograd.grad(driving, leaves, allow_unused=True) if losses.requires_grad else [None]
            if all(each is None for each in found):
                raise ValueError(DETACHED)
            return losses.detach(), found

        with torch.enable_grad():
            losses, found = self._at(leaves, losses_and_gradient)
        if leaves[0]._version != version:
            raise ValueError(WRITTEN)
        parts = [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves, found, strict=True)]
        if self._index is None:
            return losses, torch.cat(parts, out=out)
        return losses, torch.cat(parts)[self._index]

    def _losses_of(self, flat: Tensor, batch: Batch) -> Tensor:
        return self._at(self._pieces(flat), lambda predict: _checked(self._loss_fn(predict, batch)))

    def _pieces(self, flat: Tensor) -> Sequence[Tensor]:
        """The parameters, each as a vector, in their order."""
        return self._full(flat).split([size.numel() for size in self._sizes.values()])

    def _at(self, pieces: Sequence[Tensor], run: Callable[[Callable[..., Any]], Any]) -> Any:
        """The result of `run(predict)`, with these weights in the module until `run` ends.

        So a backward pass in `run` that computes activations again, as activation checkpointing does, finds the weights of the forward
        pass.
        """
        weights = {
            name: piece.view(size).to(self._types[name])
            for (name, size), piece in zip(self._sizes.items(), pieces, strict=True)
        }
        # Buffers are copied, so that a forward pass that writes to one changes neither the user's module nor another chain.
        buffers = {name: value.clone() for name, value in self._buffers.items()}
        values = {**self._frozen, **buffers, **weights}
        placed = {f"model.{place}": values[name] for place, name in self._places.items()}
        # Every place is named. Torch would find the other places of a tied weight by itself, but in a module that is used twice it
        # takes one place for two, and leaves the chain's weights there.
        return functional_call(self._within(), placed, (run,), tie_weights=False)

    def _full(self, flat: Tensor) -> Tensor:
        """All coordinates of the parameters that move at least in part. Coordinates that do not move are at w*."""
        return flat if self._index is None else self._whole.index_copy(0, self._index, flat)

    def _within(self) -> "_Within":
        """This thread's copy of the module. `functional_call` puts a chain's weights into the module during the call, so two threads must
        not use the same one."""
        if not hasattr(self._own, "within"):
            self._own.within = _Within(self._model_of_thread())
        return self._own.within

    def _model_of_thread(self) -> nn.Module:
        if threading.current_thread() is threading.main_thread():
            return self._model
        try:
            return copy.deepcopy(self._model)
        except Exception as error:
            raise ValueError(
                f"{type(self._model).__name__} cannot be copied for a worker thread ({error}); use cores=1"
            ) from error

    def _give_up_vectorising(self, error: Exception) -> None:
        if self._vectorise:
            self._vectorise = False
            reason = str(error).split("\n")[0][:200]
            logger.warning("this model cannot be vectorised over chains, which run one by one: %s", reason)


class _Within(nn.Module):
    """Runs a function of a module as its forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[Callable[..., Any]], Any]) -> Any:
        inside = False

        def predict(*inputs: Any, **keywords: Any) -> Any:
            nonlocal inside
            before, inside = inside, True
            try:
                return self.model(*inputs, **keywords)
            finally:
                inside = before

        def only_through_predict(*_: Any) -> None:
            # On this thread the result would be right, but on another thread the module would run at w*.
            if not inside:
                raise ValueError(DETACHED)

        hook = self.model.register_forward_pre_hook(only_through_predict)
        try:
            return run(predict)
        finally:
            hook.remove()


def places_of_tensors(model: nn.Module) -> dict[str, str]:
    """Each place of a parameter or buffer, `module.name`, once -> the first name of the tensor. A module that is used twice has one place
    for each of its tensors; a tensor that two modules share has two."""
    # A tensor that is both goes by its name as a parameter, which moves.
    first = {id(value): name for name, value in (*model.named_buffers(), *model.named_parameters())}
    return {
        f"{prefix}.{name}" if prefix else name: first[id(value)]
        for prefix, module in model.named_modules()
        for name, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None
    }


def _checked(losses: object) -> Tensor:
    """The result of a loss function as (T,)."""
    if not isinstance(losses, Tensor):
        raise ValueError(
            f"loss_fn returned a {type(losses).__name__}; it must return a tensor: a scalar, or a loss per token"
        )
    return losses.reshape(-1)


def kept_for_backward(losses: Callable[[Tensor], Tensor], weights: Tensor) -> int:
    """Bytes that a forward pass of `losses(weights)` keeps for its backward pass; 0 if they cannot be counted, as when the losses use
    `torch.func`."""
    kept: dict[int, int] = {}

    def count(value: Tensor) -> Tensor:
        kept[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        return value.detach()  # detached, because the value would keep the graph alive that keeps it

    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            alive = losses(weights.detach().requires_grad_())
    except RuntimeError:
        return 0
    del alive
    return sum(kept.values())


def _drive(losses: Tensor, token_weights: Tensor | None) -> Tensor:
    return losses.mean() if token_weights is None else (losses * token_weights).sum()


def refuse_stochastic_modules(model: nn.Module) -> None:
    """Refuse modules whose output is random or depends on the other samples of a batch.

    Raises:
        ValueError: there is such a module. The message names it and the remedy.
    """
    for name, module in model.named_modules():
        what = f"{name or 'the model'} ({type(module).__name__})"
        by_batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if by_batch and module.running_mean is None:
            raise ValueError(
                f"{what} keeps no running statistics and normalises by its batch, so the loss is not a function of the weights alone; give "
                "it statistics (track_running_stats=True), or use a norm of single samples, such as a layer norm"
            )
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if module.training and (random or by_batch):
            kind = "drops units at random" if random else "normalises by its batch"
            raise ValueError(
                f"{what} is in training mode and {kind}, so the loss is not a function of the weights alone; call model.eval() first (a "
                "batch norm then uses its running statistics as constants)"
            )


def refuse_unfit_weights(model: nn.Module) -> None:
    """Refuse weights that are not a vector of independent numbers on one device.

    Raises:
        ValueError: there is such a weight. The message names it and the remedy.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "a compiled TorchScript module cannot be run with other weights; give the module from which it was made"
        )
    if not any(True for _ in model.parameters()):
        raise ValueError("the model has no parameters (quantised layers have none), so there is nothing to sample")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(value):
            raise ValueError(f"{name} has no shape yet; run the model once on a batch before the estimate")
        if value.device.type == "meta":
            raise ValueError(f"{name} holds no numbers (device meta); load the weights first")
    devices = sorted({str(value.device) for value in model.parameters()})
    if len(devices) > 1:
        raise ValueError(f"the weights lie on several devices ({', '.join(devices)}); move the model to one of them")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            if module.sparse:
                raise ValueError(f"{name or 'the model'} has sparse gradients; set sparse=False for the estimate")
            if module.max_norm is not None:
                raise ValueError(
                    f"{name or 'the model'} rescales its weights as it runs (max_norm); set max_norm=None for the estimate"
                )
    strided: list[tuple[str, Tensor]] = []
    for name, value in model.named_parameters():
        if any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)):
            raise ValueError(
                f"{name} repeats one number in several entries; make it contiguous, or make the number the parameter"
            )
        if value.numel() and value.layout == torch.strided:
            strided.append((name, value))
    strided.sort(key=lambda each: each[1].data_ptr())
    reaching: list[tuple[str, Tensor]] = []
    for name, value in strided:
        reaching = [each for each in reaching if _end(each[1]) > value.data_ptr()]
        for before, other in reaching:
            if _share_numbers(other, value):
                raise ValueError(
                    f"{name} and {before} share their memory but are two parameters; make them one, as in b.weight = a.weight"
                )
        reaching.append((name, value))


def _end(value: Tensor) -> int:
    """The address after the last number of a strided tensor."""
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr() + (last + 1) * value.element_size()


def _share_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether a number belongs to both, of two tensors whose memory overlaps and of which `one` begins first. Views that interleave,
    such as every second number each, share none. Views of two types are taken to share."""
    if one.dtype != other.dtype or (one.is_contiguous() and other.is_contiguous()):
        return True
    start, size = one.data_ptr(), one.element_size()
    length = (max(_end(one), _end(other)) - start) // size
    seen = torch.zeros(length, dtype=torch.bool)
    seen.as_strided(one.shape, one.stride()).fill_(True)
    return bool(seen.as_strided(other.shape, other.stride(), (other.data_ptr() - start) // size).any())


def _unwrapped(model: Any) -> nn.Module:
    """The module inside the wrappers of `torch.compile` and data parallelism. It computes the same, and can be run with other weights."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # of torch._dynamo, which takes a second to import
            model = model._orig_mod
        else:
            return model
