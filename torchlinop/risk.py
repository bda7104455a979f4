"""The empirical risk: a model's loss on all of the data, however it is cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchlinop._space import ParameterSpace, named_parameters
from torchlinop._typing import CachePolicy, Data, Loss, Model, Parameters, Reduction
from torchlinop._watch import Watch
from torchlinop.autodiff.diagnose import explain, is_missing_derivative
from torchlinop.autodiff.linearize import EXCLUSIVE, recording
from torchlinop.autodiff.losses import LossFunction, as_loss
from torchlinop.data import Batch, DataChangedError, DataSource

Result = TypeVar("Result")


class ModelOptions(TypedDict, total=False):
    """Keyword arguments of every operator that is built from a model and data.

    Described at :class:`EmpiricalRisk`.
    """

    batch_size: Callable[[Any], int] | None
    cache: CachePolicy
    memory_budget: int | None
    check_deterministic: bool
    check_finite: bool
    progressbar: bool


class RiskOptions(ModelOptions, total=False):
    """Keyword arguments of every operator that is built from a loss, too."""

    reduction: Reduction | None


class ModelOnData:
    """A model at its parameters, evaluated on every batch of a data set.

    The arguments are those of :class:`EmpiricalRisk`, less the loss.
    """

    def __init__(
        self,
        model: Model,
        params: Parameters,
        data: Data,
        *,
        ordered: bool = False,
        batch_size: Callable[[Any], int] | None = None,
        cache: CachePolicy = "auto",
        memory_budget: int | None = None,
        check_deterministic: bool = True,
        check_finite: bool = False,
        progressbar: bool = False,
    ) -> None:
        if not callable(model):
            raise TypeError(
                "model has to be a torch.nn.Module or a function (params, X) -> "
                f"prediction, got {type(model).__name__}."
            )
        if not (isinstance(cache, bool) or cache == "auto"):
            raise ValueError(f"cache has to be 'auto', True or False, got {cache!r}.")
        if not (memory_budget is None or isinstance(memory_budget, (int, float))):
            raise TypeError(f"memory_budget is a number of bytes, got {memory_budget!r}.")
        self.model = model
        self.cache = cache
        self.memory_budget = memory_budget
        self._as_mapping = isinstance(params, Mapping)
        with EXCLUSIVE:
            self._params = named_parameters(model, params)
        self.space = ParameterSpace(self._params)
        self._check_deterministic = check_deterministic
        self._check_finite = check_finite
        self.batches = DataSource(
            data,
            self.space.device,
            batch_size=batch_size,
            progressbar=progressbar,
        )
        self._ordered = ordered
        self._use_rules = True

    # ------------------------------------------------------------------ evaluation

    def leaves(self) -> list[Tensor]:
        """Return fresh leaves that share the parameters' memory and version counters."""
        leaves = [p.detach() for p in self._params.values()]
        if _renormalizes(self.model):  # the model writes into its weights
            leaves = [leaf.clone() for leaf in leaves]
        return [leaf.requires_grad_() for leaf in leaves]

    def predict(self, leaves: Sequence[Tensor], X: Any) -> Tensor:
        """Evaluate the model with ``leaves`` in place of the parameters."""
        named = dict(zip(self._params, leaves, strict=True))
        if isinstance(self.model, nn.Module):
            prediction = functional_call(self.model, self._state(named), (X,))
        else:
            container = named if self._as_mapping else list(leaves)
            prediction = self.model(container, X)
        if not isinstance(prediction, Tensor):
            raise TypeError(
                "The model has to return a tensor, got "
                f"{type(prediction).__name__}. Wrap it in a function (params, X) or a "
                "module that returns the tensor, for instance output.logits."
            )
        return _require_real(prediction, "The model")

    def _state(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves for the chosen parameters, constants for the others."""
        model = self.model
        assert isinstance(model, nn.Module)
        chosen = {id(p) for p in self._params.values()}
        copy = _renormalizes(model)
        state = {
            name: p.detach().clone() if copy else p.detach()
            for name, p in model.named_parameters(remove_duplicate=False)
            if id(p) not in chosen
        }
        # buffers may be written to: running statistics, counters
        state |= {name: b.clone() for name, b in model.named_buffers()}
        return state | named

    def record(self, batch: Batch, build: Callable[[list[Tensor]], Result]) -> Result:
        """Run ``build(leaves)``, which evaluates the model on ``batch``, for its graph.

        Rules for cheap second derivatives are in force where the model allows it, and a
        missing derivative is explained.
        """
        if self._use_rules:
            try:
                with recording(self.space.device):
                    return build(self.leaves())
            except Exception:  # what is really wrong is raised by the second attempt
                self._use_rules = False
        try:
            with recording(self.space.device, rules=False):
                return build(self.leaves())
        except Exception as error:
            self._use_rules = True
            raise self.explained(error, batch) from error

    def explained(self, error: Exception, batch: Batch, order: int = 2) -> Exception:
        """Return an error that names the operation, if a derivative is missing."""
        if not is_missing_derivative(error):
            return error
        leaves = self.leaves()
        with recording(self.space.device, rules=False):
            return explain(
                error, self.model, lambda: self.predict(leaves, batch.X), order=order
            )

    # --------------------------------------------------------------------- changes

    def watch(self) -> Watch:
        """Return a watch over everything that lasts: all but the batches of a loader."""
        with EXCLUSIVE:
            return self._watch()

    def _watch(self) -> Watch:
        tensors = [*self._params.values(), *self.batches.lasting_tensors()]
        modules = [m for m in self._modules() if isinstance(m, nn.Module)]
        return Watch(
            tensors,
            modules=modules,
            flags=_mode_sensitive(self.model),
            facts=[self.batches.identity, self._settings],
        )

    def _settings(self) -> object:
        """Return plain attributes that a product depends on."""
        return None

    def _modules(self) -> list[Any]:
        return [self.model]

    def survey(self) -> None:
        """Pass over the data, check what was asked for, and record what is there."""
        if isinstance(self.model, nn.Module):
            with EXCLUSIVE:
                named_parameters(self.model, self._params)  # none has been replaced
        if self._check_deterministic:
            _check_evaluation_mode(self.model)
        if self._check_finite:
            for name, p in self._params.items():
                _require_finite(p, f"parameter {name!r}")
        self.batches.accept(
            self.batches.survey(self._look, check=self._check_deterministic)
        )
        if self._ordered:
            self.batches.require_order()
        if self._check_deterministic:
            self._check_repeatable()

    def _look(self, batch: Batch) -> None:
        if self._check_finite:
            for tensor in batch.sources:
                _require_finite(tensor, f"batch {batch.position} of the data")

    def _check_repeatable(self) -> None:
        """Evaluate the first batch twice."""
        batch = next(iter(self.batches))
        leaves = [p.detach() for p in self.leaves()]
        with recording(self.space.device, rules=False):
            first = self.predict(leaves, batch.X).detach()
            second = self.predict(leaves, batch.X).detach()
        tolerance = 1e-3 if first.dtype in (torch.float16, torch.bfloat16) else 1e-5
        if not torch.allclose(first, second, rtol=tolerance, equal_nan=True):
            raise ValueError(
                "The model gave two different predictions for the same batch, so it has "
                "no fixed curvature matrix. Turn off what is random in it (dropout; "
                "model.eval()), or pass check_deterministic=False."
            )


class EmpiricalRisk(ModelOnData):
    r"""The loss of a model on all of its data, as a function of parameters.

    .. math:: L(\theta) = \frac1Z \sum_n \ell(f_\theta(x_n), y_n)

    with :math:`Z = 1` for ``reduction="sum"`` and, for ``"mean"``, what PyTorch would
    divide by if all data were one batch: uneven batches, class weights and ignored
    targets are accounted for.

    Parameters
    ----------
    model
        A module, or a function ``(params, X) -> prediction`` that takes the parameters
        as the list or dict given in ``params``.
    loss_function
        ``CrossEntropyLoss``, ``MSELoss``, ``BCEWithLogitsLoss`` (closed forms), another
        loss of :mod:`torch.nn` that averages over elements, or any callable
        ``loss(prediction, target)`` together with ``reduction``.
    params
        The model's parameters to differentiate with respect to: a list of tensors
        (``model.parameters()`` or a part of it) or a dict by name.
    data
        A re-iterable of ``(X, y)``: a list or a DataLoader. ``X`` goes to the model as
        it is; tensors in it are moved to the parameters' device.
    reduction
        For a callable loss: ``"mean"`` (over the batch's samples) or ``"sum"``.
    batch_size
        Function from an ``X`` to its number of samples. Default: the first dimension of
        the first tensor in ``X``.
    cache
        ``"auto"`` keeps linearizations of batches while they fit the memory budget and
        computes the others anew in each product; ``True`` keeps all, ``False`` none.
    memory_budget
        In bytes. Default: half of the memory that is free on the device.
    check_deterministic
        Refuse modules whose output is random or depends on the rest of the batch
        (dropout and batch norm in training mode), and compare two evaluations of the
        first batch.
    check_finite
        Refuse NaN and infinity in parameters and data.
    progressbar
        Show progress over the batches.

    Attributes
    ----------
    space : ParameterSpace
    normalizer : float
        :math:`Z`.

    Raises
    ------
    TypeError, ValueError, KeyError
        An argument is not what is described above; the message says what to pass.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> data = [(torch.ones(3, 2), torch.ones(3, 1)), (torch.ones(1, 2), torch.ones(1, 1))]
    >>> EmpiricalRisk(model, torch.nn.MSELoss(), model.parameters(), data).normalizer
    4.0
    """

    def __init__(
        self,
        model: Model,
        loss_function: Loss,
        params: Parameters,
        data: Data,
        *,
        ordered: bool = False,
        reduction: Reduction | None = None,
        batch_size: Callable[[Any], int] | None = None,
        cache: CachePolicy = "auto",
        memory_budget: int | None = None,
        check_deterministic: bool = True,
        check_finite: bool = False,
        progressbar: bool = False,
    ) -> None:
        super().__init__(
            model,
            params,
            data,
            ordered=ordered,
            batch_size=batch_size,
            cache=cache,
            memory_budget=memory_budget,
            check_deterministic=check_deterministic,
            check_finite=check_finite,
            progressbar=progressbar,
        )
        self.loss_function = loss_function
        self._reduction = reduction
        self.loss: LossFunction = as_loss(loss_function, reduction)
        self.survey()

    def _modules(self) -> list[Any]:
        return [self.model, self.loss_function]

    def _settings(self) -> object:
        if not isinstance(self.loss_function, nn.Module):
            return None
        settings = vars(self.loss_function)
        return [settings.get(name) for name in _LOSS_SETTINGS]

    def survey(self) -> None:
        """Pass over the data for the normaliser and the checks."""
        self.loss = as_loss(self.loss_function, self._reduction)
        self._shares: dict[int, float] = {}
        super().survey()
        mean = self.loss.reduction == "mean"
        self.normalizer = sum(self._shares.values()) if mean else 1.0
        if self.normalizer == 0:
            raise ValueError(
                "The loss averages over a total weight of zero: every target is ignored "
                "or has class weight zero. Check ignore_index, weight and the targets."
            )

    def _look(self, batch: Batch) -> None:
        if self.loss.reduction == "mean":
            share = self.loss.normalizer(batch.y, batch.size)
            self._shares[batch.position] = share
        super()._look(batch)

    def record(self, batch: Batch, build: Callable[[list[Tensor]], Result]) -> Result:
        """Run ``build(leaves)``, which evaluates the model on ``batch``, for its graph."""
        if self.loss.reduction == "mean" and not self.batches.shuffles:
            share = self.loss.normalizer(batch.y, batch.size)
            if share != self._shares[batch.position]:
                raise DataChangedError(
                    f"The weight of batch {batch.position} in the mean was "
                    f"{self._shares[batch.position]} in an earlier pass, now {share}."
                )
        return super().record(batch, build)


class TorchFunction:
    """A torch function at a point, in the role of a model on one batch of data.

    Parameters
    ----------
    f
        A function of ``x``.
    x
        A tensor, or a dict or list of tensors.
    """

    cache: CachePolicy = True
    memory_budget: int | None = None

    def __init__(self, f: Callable[[Any], Tensor], x: Any) -> None:
        if not callable(f):
            raise TypeError(f"f has to be a function, got {type(f).__name__}.")
        self.f = f
        self._kind: Any
        if isinstance(x, Tensor):
            named, self._kind = {"x": x}, None
        elif isinstance(x, Mapping):
            named, self._kind = dict(x), dict
        elif isinstance(x, (list, tuple)):
            named, self._kind = {str(i): t for i, t in enumerate(x)}, type(x)
        else:
            raise TypeError(
                f"x has to be a tensor, or a dict or list of tensors, got "
                f"{type(x).__name__}."
            )
        self._x = named
        self.space = ParameterSpace(named)
        self.batches = _OneBatch()

    def leaves(self) -> list[Tensor]:
        """Return fresh leaves that share the memory of ``x``."""
        return [t.detach().requires_grad_() for t in self._x.values()]

    def predict(self, leaves: Sequence[Tensor], X: Any = None) -> Tensor:
        """``f`` at the leaves."""
        if self._kind is None:
            value = self.f(leaves[0])
        elif self._kind is dict:
            value = self.f(dict(zip(self._x, leaves, strict=True)))
        else:
            value = self.f(self._kind(leaves))
        if not isinstance(value, Tensor):
            raise TypeError(f"f has to return a tensor, got {type(value).__name__}.")
        return _require_real(value, "f")

    def record(self, batch: Batch, build: Callable[[list[Tensor]], Result]) -> Result:
        """Run ``build(leaves)``, which evaluates ``f``, for its graph."""
        try:
            with recording(self.space.device):
                return build(self.leaves())
        except Exception:
            try:
                with recording(self.space.device, rules=False):
                    return build(self.leaves())
            except Exception as error:
                raise self.explained(error, batch) from error

    def explained(self, error: Exception, batch: Batch, order: int = 2) -> Exception:
        """Return an error that names the operation, if a derivative is missing."""
        if not is_missing_derivative(error):
            return error
        leaves = self.leaves()
        with recording(self.space.device, rules=False):
            return explain(error, self.f, lambda: self.predict(leaves), order=order)

    def watch(self) -> Watch:
        """Return a watch over ``x``."""
        return Watch(self._x.values())

    def survey(self) -> None:
        """Nothing to look at."""


class _OneBatch(list):
    """One batch without data."""

    shuffles = False
    num_batches = 1

    def __init__(self) -> None:
        super().__init__([Batch(0, None, None, 1, ())])

    lasts = True

    def lasting_tensors(self) -> list[Tensor]:
        return []


#: plain attributes of torch's losses
_LOSS_SETTINGS = (
    "reduction",
    "ignore_index",
    "label_smoothing",
    "delta",
    "beta",
    "eps",
    "log_input",
    "full",
)


# -------------------------------------------------------------------------- checks


def _mode_sensitive(model: Any) -> list[nn.Module]:
    """Modules that compute something else in training mode."""
    if not isinstance(model, nn.Module):
        return []
    kinds = (
        nn.modules.batchnorm._NormBase,
        nn.modules.dropout._DropoutNd,
        nn.RReLU,
        nn.RNNBase,
        nn.MultiheadAttention,
    )
    return [
        m
        for m in model.modules()
        if isinstance(m, kinds) or not type(m).__module__.startswith("torch.nn.")
    ]


def _renormalizes(model: Any) -> bool:
    """Whether the model writes into its weights when it is evaluated."""
    return isinstance(model, nn.Module) and any(
        isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None
        for m in model.modules()
    )


def _check_evaluation_mode(model: Any) -> None:
    if not isinstance(model, nn.Module):
        return
    random, coupled = [], []
    for name, module in model.named_modules():
        label = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training or not module.track_running_stats:
                coupled.append(label)
        elif module.training:
            dropout = getattr(module, "dropout", 0.0)
            if (
                (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
                or isinstance(module, nn.RReLU)
                or (isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and dropout > 0)
            ):
                random.append(label)
    if random:
        raise ValueError(
            f"In training mode the output is random because of {', '.join(random)}; the "
            "curvature of a random function is not defined. Call model.eval() first."
        )
    if coupled:
        raise ValueError(
            f"Batch normalization with the statistics of the batch: "
            f"{', '.join(coupled)}. The loss is then no sum over samples. Call "
            "model.eval() (with track_running_stats=True), or pass "
            "check_deterministic=False if the data is one batch and this is meant."
        )


def _require_real(value: Tensor, what: str) -> Tensor:
    if value.is_complex():
        raise TypeError(
            f"{what} returned a complex tensor, for which these real matrices are not "
            "defined. Return torch.view_as_real(...) of it."
        )
    return value


def _require_finite(tensor: Tensor, what: str) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{bad} of {tensor.numel()} entries of {what} are NaN or infinite."
        )
