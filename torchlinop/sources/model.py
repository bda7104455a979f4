"""A model on data as what an operator linearizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from torchlinop._space import ParameterSpace, named_parameters
from torchlinop._typing import Data, Model, Parameters
from torchlinop._watch import Watch
from torchlinop.autodiff.diagnose import explain, is_missing_derivative
from torchlinop.autodiff.functional import Substitution, unwrapped, with_tensors
from torchlinop.autodiff.interruptible import in_force
from torchlinop.autodiff.recording import EXCLUSIVE, recording
from torchlinop.data import Batch, DataSource, Survey, require_batches
from torchlinop.distributed.sameness import Facts, facts_of, require_same
from torchlinop.sources.checks import (
    mode_sensitive,
    renormalizes,
    require_evaluation_mode,
    require_finite,
    require_real,
    require_repeatable,
    require_replaceable,
    require_replaced,
)
from torchlinop.sources.options import Options
from torchlinop.sources.protocol import Result, record_with_rules
from torchlinop.sources.sharded import WholeTensors, require_sharded

Told = TypeVar("Told")


class ModelOnData:
    """A model at its parameters, evaluated on every batch of a data set.

    Parameters
    ----------
    model, params, data
        What :class:`~torchlinop.EmpiricalRisk` describes.
    options
        What the user has asked for.
    modules, facts
        What else the result depends on and is watched: modules, and functions whose values
        are compared.
    """

    def __init__(
        self,
        model: Model,
        params: Parameters,
        data: Data,
        options: Options,
        *,
        modules: Sequence[nn.Module] = (),
        facts: Sequence[Callable[[], object]] = (),
    ) -> None:
        if not callable(model):
            raise TypeError(
                "model has to be a torch.nn.Module or a function (params, X) -> "
                f"prediction, got {type(model).__name__}."
            )
        self.model = model
        self.options = options
        self._as_mapping = isinstance(params, Mapping)
        require_sharded(model)
        self._params = named_parameters(model, params)
        self._whole = WholeTensors(model, self._params, options.ranks)
        require_replaceable(model, self._params)
        self.space = ParameterSpace(self._params)
        self.batches = DataSource(
            data,
            self.space.device,
            batch_size=options.batch_size,
            progressbar=options.progressbar,
        )
        self._modules = [model, *modules] if isinstance(model, nn.Module) else [*modules]
        self._facts = list(facts)
        self._watch: Watch | None = None
        self.looks = 0
        self._draws = True
        #: whether the model writes into its weights
        self._writes = renormalizes(model)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the watch behind: a copy looks anew."""
        return {**vars(self), "_watch": None}

    # ------------------------------------------------------------------ evaluation

    def leaves(self) -> list[Tensor]:
        """Return fresh leaves that share the parameters' memory and version counters.

        Of those that are sharded, the whole ones that were gathered at the last look.
        """
        with torch._C.DisableTorchFunction():  # nothing for a mode to see
            leaves = [self._whole(p).detach() for p in self._params.values()]
            if self._writes:
                leaves = [leaf.clone() for leaf in leaves]
            return [leaf.requires_grad_() for leaf in leaves]

    def predict(self, leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        """Evaluate the model with ``leaves`` in place of the parameters."""
        if isinstance(self.model, nn.Module):
            chosen = self._chosen(leaves)
            copied, alive = self._copy(chosen)
            with in_force(Substitution(chosen)):
                prediction = _call(copied, batch.X)
            del alive  # not before: weak references in the copy need it
        elif self._as_mapping:
            prediction = self.model(dict(zip(self._params, leaves, strict=True)), batch.X)
        else:
            prediction = self.model(list(leaves), batch.X)
        if not isinstance(prediction, Tensor):
            raise TypeError(
                "The model has to return a tensor, got "
                f"{type(prediction).__name__}. Wrap it in a function (params, X) or a "
                "module that returns the tensor, for instance output.logits."
            )
        require_replaced(prediction, self._params)
        return require_real(prediction, "The model")

    def _chosen(self, leaves: Sequence[Tensor]) -> dict[int, Tensor]:
        pairs = list(zip(self._params.values(), leaves, strict=True))
        for p, leaf in pairs:  # what the user has attached to a parameter
            vars(leaf).update(vars(p))
        return {id(p): leaf for p, leaf in pairs}

    def _copy(self, chosen: dict[int, Tensor]) -> tuple[nn.Module, list[Any]]:
        """Return the model with leaves for the chosen parameters, constants for others.

        And what has to be kept while it is used.
        """
        assert isinstance(self.model, nn.Module)
        replacements = dict(chosen)
        with torch._C.DisableTorchFunction():  # nothing for a mode to see
            for module in self.model.modules():
                for p in module._parameters.values():
                    if p is not None and id(p) not in replacements:
                        constant = self._whole(p).detach()
                        replacements[id(p)] = constant.clone() if self._writes else constant
                for b in module._buffers.values():
                    # they may be written to: running statistics, counters
                    if b is not None and id(b) not in replacements:
                        replacements[id(b)] = self._whole(b).clone()
        return with_tensors(self.model, replacements)

    def draws(self, batch: Batch) -> bool:
        """Whether Python's or NumPy's random numbers may be drawn in an evaluation.

        The last look has shown that for the first batch.
        """
        first = batch.position == 0 and not batch.joined and not self.batches.shuffles
        return self._draws or not first

    def require_unchanged(self, batch: Batch) -> None:
        """Without a loss all batches count alike."""

    def record(
        self, batch: Batch, build: Callable[[list[Tensor]], Result], *, order: int
    ) -> Result:
        """Run ``build(leaves)``, which evaluates the model on ``batch``, for its graph."""
        return record_with_rules(self, batch, build, order)

    def explained(
        self,
        error: Exception,
        batch: Batch,
        *,
        order: int,
        loss: Callable[[Tensor], Tensor] | None = None,
    ) -> Exception:
        """Return an error that names the operation, if a derivative is missing."""
        if not is_missing_derivative(error):
            return error
        leaves = self.leaves()
        with recording(self.space.device, rules=False):
            if not isinstance(self.model, nn.Module):
                evaluate = partial(self.predict, leaves, batch)
                return explain(error, self.model, evaluate, order, loss)
            copy, alive = self._copy(self._chosen(leaves))
            try:
                return explain(error, copy, partial(copy, batch.X), order, loss)
            finally:
                del alive

    # --------------------------------------------------------------------- changes

    def changed(self) -> bool:
        """Whether anything that lasts differs from the last look."""
        return self._watch is None or self._watch.changed()

    def survey(self) -> None:
        """Look at model and data anew, and check what was asked for."""
        look, _ = self.look(self._prediction, lambda _: None, lambda: None)
        self.accept(look)

    def look(
        self,
        evaluate: Callable[[Batch], dict[str, Tensor]],
        visit: Callable[[Batch], None],
        find: Callable[[], Told],
    ) -> tuple[Look, list[Told]]:
        """Pass over the data and check what was asked for; nothing is changed by it.

        Every rank does so with its share of the data, and all have to be the same else.

        Parameters
        ----------
        evaluate
            What has to come out twice for the first batch, by name.
        visit
            Called with every batch, where it is.
        find
            What this rank tells the others after that. All are returned, by rank.
        """
        ranks = self.options.ranks
        looks: list[Look] = []
        self._whole.gather()
        self._writes = renormalizes(self.model)

        def here() -> tuple[int, Facts, Told]:
            looks.append(self._look_here(evaluate, visit))
            facts = {} if ranks.alone else self._facts_for_others()
            return len(looks[0].survey.digests), facts, find()

        told = ranks.together(here, f"looking at {type(self.model).__name__} and its data")
        require_batches(sum(number for number, _, _ in told))
        require_same([facts for _, facts, _ in told])
        return looks[0], [own for _, _, own in told]

    def _facts_for_others(self) -> Facts:
        """What has to be the same on every rank."""
        plain = {
            "type of the model": type(self.model).__qualname__,
            "names of the parameters": self.space.names,
            "settings of the loss": [fact() for fact in self._facts],
        }
        tensors: dict[str, Tensor] = {
            f"parameter {n!r}": self._whole(p) for n, p in self._params.items()
        }
        chosen = {id(p) for p in self._params.values()}
        for module in self._modules:
            of = "" if module is self.model else f" of {type(module).__name__}"
            named = [*module.named_parameters(), *module.named_buffers()]
            tensors |= {
                f"tensor {name!r}{of}": self._whole(tensor)
                for name, tensor in named
                if id(tensor) not in chosen
            }
        return facts_of(plain, tensors)

    def _look_here(
        self,
        evaluate: Callable[[Batch], dict[str, Tensor]],
        visit: Callable[[Batch], None],
    ) -> Look:
        options = self.options
        if isinstance(self.model, nn.Module):
            named_parameters(self.model, self._params)  # none has been replaced
        if options.check_deterministic:
            require_evaluation_mode(self.model)
        if options.check_finite:
            for name, p in self._params.items():
                require_finite(self._whole(p), f"parameter {name!r}")
        watch = Watch(  # before the data is read
            [*self._params.values(), *self.batches.lasting_tensors()],
            modules=self._modules,
            flags=mode_sensitive(self.model),
            facts=[self.batches.identity, *self._facts],
        )
        first: list[Batch] = []

        def see(batch: Batch) -> None:
            visit(batch)
            if not first:
                first.append(batch)
            if options.check_finite:
                for tensor in batch.sources:
                    require_finite(tensor, f"batch {batch.position} of the data")

        survey = self.batches.survey(see, check=options.check_deterministic)
        draws = True
        if options.check_deterministic and first:
            batch = first[0].to(self.space.device)
            with recording(self.space.device, rules=False):
                draws = require_repeatable(
                    lambda: evaluate(batch),
                    self.space.device,
                    training=isinstance(self.model, nn.Module)
                    and any(m.training for m in self.model.modules()),
                )
        return Look(survey, watch, draws)

    def accept(self, look: Look) -> None:
        """Make a look the last one; linearizations of earlier ones are stale."""
        with EXCLUSIVE:
            self.batches.accept(look.survey)
            self._watch = look.watch
            self._draws = look.draws
            self.looks += 1

    def _prediction(self, batch: Batch) -> dict[str, Tensor]:
        return {"predictions": self.predict([p.detach() for p in self.leaves()], batch)}


class Look(NamedTuple):
    """What was found in a pass over the data, and a watch over all that it rests on."""

    survey: Survey
    watch: Watch
    #: whether the first batch takes random numbers, or might
    draws: bool


def _call(model: nn.Module, X: Any) -> Any:
    try:
        return model(X)
    except Exception as error:
        inner = unwrapped(model)
        if isinstance(X, Mapping) and _takes_keywords(inner, X):
            raise TypeError(
                f"X is a {type(X).__name__} with the entries {', '.join(map(str, X))}. The "
                f"model is called as model(X), but {type(inner).__name__} takes them as "
                "keyword arguments. Wrap it in a module whose forward(self, X) returns "
                "self.model(**X).logits, or whichever tensor of the output it is."
            ) from error
        raise


def _takes_keywords(model: nn.Module, X: Mapping) -> bool:
    """Whether the model's forward pass has the keys of ``X`` as parameters."""
    parameters = inspect.signature(model.forward).parameters
    return len(X) > 0 and all(key in parameters for key in X)
