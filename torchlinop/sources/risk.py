"""The empirical risk: a model's loss on all of the data, however it is cut into batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from torchlinop._typing import Data, Loss, Model, Parameters, Reduction
from torchlinop.autodiff.backward import backward
from torchlinop.autodiff.losses import (
    LikelihoodLoss,
    LossFunction,
    as_loss,
    is_piecewise_linear,
)
from torchlinop.autodiff.recording import EXCLUSIVE
from torchlinop.data import Batch, DataChangedError, DataSource
from torchlinop.sources.model import ModelOnData
from torchlinop.sources.options import Options
from torchlinop.sources.protocol import Result, record_with_rules

#: random numbers that are drawn at once to be left out
_SKIPPED = 1 << 20


class EmpiricalRisk:
    r"""The loss of a model on all of its data, as a function of parameters.

    .. math:: L(\theta) = \frac1Z \sum_n \ell(f_\theta(x_n), y_n)

    with :math:`Z = 1` for ``reduction="sum"`` and, for ``"mean"``, what PyTorch would
    divide by if all data were one batch: uneven batches, class weights and ignored
    targets are accounted for.

    Several operators may share a risk: ``HessianLinearOperator(risk)``.

    Parameters
    ----------
    model
        A module, or a function ``(params, X) -> prediction`` that takes the parameters
        as the list or dict given in ``params``. Of a module that is wrapped
        (``DataParallel``, ``DistributedDataParallel``, ``torch.compile``) the inner one
        is evaluated; one whose parameters are sharded (``fully_shard``, ``DTensor``), with
        whole ones, which needs ``process_group``.
    loss_function
        ``CrossEntropyLoss``, ``MSELoss``, ``BCEWithLogitsLoss`` (closed forms), another
        loss of :mod:`torch.nn` that averages over elements, or any callable
        ``loss(prediction, target)`` together with ``reduction``.
    params
        The model's parameters to differentiate with respect to: a list of tensors
        (``model.parameters()`` or a part of it) or a dict by name.
    data
        A re-iterable of ``(X, y)``: a list or a DataLoader, in any order. ``X`` may be any
        object; the model gets it as it is, in a copy whose tensors are on the parameters'
        device.
    reduction
        For a callable loss: ``"mean"`` (over the batch's samples) or ``"sum"``.
    **options
        The fields of :class:`~torchlinop.Options`.

    Attributes
    ----------
    space : ParameterSpace
    options : Options
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
        reduction: Reduction | None = None,
        **options: Any,
    ) -> None:
        chosen = Options.of(options)
        self._on_data = chosen.ranks.on_each(
            lambda: ModelOnData(
                model,
                params,
                data,
                chosen,
                modules=[loss_function] if isinstance(loss_function, nn.Module) else [],
                facts=[functools.partial(_settings, loss_function)],
            ),
            f"building an EmpiricalRisk of {type(model).__name__}",
        )
        self.space = self._on_data.space
        self.options = self._on_data.options
        self.loss_function = loss_function
        self._reduction = reduction
        self._known = _Known(as_loss(loss_function, reduction), {}, 1.0, False, 0)
        self.survey()

    @property
    def batches(self) -> DataSource:
        """The data."""
        return self._on_data.batches

    @property
    def loss(self) -> LossFunction:
        """The loss with its derivatives."""
        return self._known.loss

    @property
    def normalizer(self) -> float:
        """What the sum over the data is divided by."""
        return self._known.normalizer

    @property
    def flat(self) -> bool:
        """Whether the loss was found to be linear in the prediction, up to kinks."""
        return self._known.flat

    def generator(self, seed: int, mc_samples: int) -> Generator:
        """Return a generator for labels of this process's data, from the first on.

        It goes on where the process before ends: a seed stands for the same numbers however
        the data is spread, in the order of the ranks.
        """
        generator = Generator("cpu").manual_seed(seed)
        left = self._known.draws_before * mc_samples
        while left:
            number = min(left, _SKIPPED)
            torch.rand(number, generator=generator, dtype=torch.float64, device="cpu")
            left -= number
        return generator

    # ------------------------------------------------------------------ evaluation

    def leaves(self) -> list[Tensor]:
        """Return fresh leaves that share the parameters' memory and version counters."""
        return self._on_data.leaves()

    def predict(self, leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        """Evaluate the model with ``leaves`` in place of the parameters."""
        return self._on_data.predict(leaves, batch)

    def draws(self, batch: Batch) -> bool:
        """Whether Python's or NumPy's random numbers may be drawn in an evaluation."""
        return self._on_data.draws(batch)

    def differential(self, leaves: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the prediction and the slope of the batch's share of the risk in it."""
        prediction = self.predict(leaves, batch)
        scale = 1 / self.normalizer
        return prediction, self.loss.gradient(prediction, batch.y, batch.size, scale)

    def require_unchanged(self, batch: Batch) -> None:
        """Refuse a batch of a loader whose weight in the mean is another one now."""
        known = self._known
        unseen = not (batch.joined or self.batches.lasts or self.batches.shuffles)
        if unseen and known.loss.reduction == "mean":
            share = known.loss.normalizer(batch.y, batch.size)
            if share != known.shares[batch.position]:
                raise DataChangedError(
                    f"The weight of batch {batch.position} in the mean was "
                    f"{known.shares[batch.position]} in an earlier pass, now {share}."
                )

    def record(
        self, batch: Batch, build: Callable[[list[Tensor]], Result], *, order: int
    ) -> Result:
        """Run ``build(leaves)``, which evaluates the model on ``batch``, for its graph."""
        self.require_unchanged(batch)
        return record_with_rules(self, batch, build, order)

    def explained(self, error: Exception, batch: Batch, *, order: int) -> Exception:
        """Return an error that names the operation, if a derivative is missing."""

        def loss(prediction: Tensor) -> Tensor:
            return self.loss_function(prediction, batch.y)

        return self._on_data.explained(error, batch, order=order, loss=loss)

    # --------------------------------------------------------------------- changes

    @property
    def looks(self) -> int:
        """How often model and data were looked at."""
        return self._on_data.looks

    def changed(self) -> bool:
        """Whether anything that lasts differs from the last look."""
        return self._on_data.changed()

    def survey(self) -> None:
        """Pass over the data for the normaliser and the checks."""
        ranks = self.options.ranks
        loss = as_loss(self.loss_function, self._reduction)
        shares: dict[int, float] = {}
        draws: dict[int, int] = {}

        def visit(batch: Batch) -> None:
            if loss.reduction == "mean":
                shares[batch.position] = loss.normalizer(batch.y, batch.size)
            if isinstance(loss, LikelihoodLoss) and not ranks.alone:
                draws[batch.position] = loss.num_draws(batch.y)

        flat: bool | None = None  # without data

        def evaluate(batch: Batch) -> dict[str, Tensor]:
            nonlocal flat
            leaves = self.leaves()
            prediction = self.predict(leaves, batch)
            flat = is_piecewise_linear(loss, prediction, batch.y, batch.size)
            slope = loss.gradient(prediction, batch.y, batch.size, 1.0)
            values = {"predictions": prediction.detach(), "losses": slope.detach()}
            return values | _first_gradient(prediction, slope, leaves)

        look, told = self._on_data.look(
            evaluate, visit, lambda: _Share(sum(shares.values()), flat, sum(draws.values()))
        )
        mean = loss.reduction == "mean"
        normalizer = sum(share.weight for share in told) if mean else 1.0
        if normalizer == 0:
            raise ValueError(
                "The loss averages over a total weight of zero: every target is ignored "
                "or has class weight zero. Check ignore_index, weight and the targets."
            )
        with EXCLUSIVE:
            known = [share.flat for share in told if share.flat is not None]
            flat = bool(known) and all(known)
            before = sum(share.draws for share in told[: ranks.rank])
            self._known = _Known(loss, shares, normalizer, flat, before)
            self._on_data.accept(look)


class _Known(NamedTuple):
    """What a survey has found: replaced as a whole."""

    loss: LossFunction
    #: of each batch in the normaliser of a mean
    shares: dict[int, float]
    normalizer: float
    flat: bool
    #: numbers that are drawn for the data of the ranks before this one
    draws_before: int


class _Share(NamedTuple):
    """What a rank tells the others of its data."""

    weight: float
    flat: bool | None
    draws: int


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


def _settings(loss_function: Loss) -> object:
    """Return plain attributes that a product depends on."""
    if not isinstance(loss_function, nn.Module):
        return None
    settings = vars(loss_function)
    return [*map(settings.get, _LOSS_SETTINGS)]


def _first_gradient(
    output: Tensor, slope: Tensor, leaves: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the gradient of a scalar with this slope in ``output``, if there is one."""
    if not output.requires_grad:
        return {}
    try:
        parts = backward([output], leaves, [slope.detach()], retain_graph=False)
    except (RuntimeError, NotImplementedError):  # explained where it is needed
        return {}
    given = [part.reshape(-1) for part in parts if part is not None]
    return {"gradients": torch.cat(given)} if given else {}
