"""Products with curvature matrices in plain PyTorch, and the comparison with an operator.

Nothing of the package is used here: the user's own model is evaluated as it is, on all data
at once, and differentiated twice by ``torch.autograd.grad``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchlinop import (
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)

#: relative, in float64
ROUNDING = 1e-12
#: of models that compute in float32 on the way, whatever their parameters' dtype
ROUNDING_INSIDE = 2e-6
#: central differences in float64
TRUNCATION = 1e-7


@dataclass
class Case:
    """A model with its data.

    Attributes
    ----------
    model, loss, data
        What an operator takes.
    params
        Those to differentiate with respect to; by default all that require gradients.
    plain
        What the reference evaluates, where that is not ``model``.
    float32_inside
        Whether the model computes in float32 on the way, even in float64.
    by_differences
        Whether second derivatives of PyTorch itself are missing or wrong, so that central
        differences of gradients and of outputs are the reference.
    options
        Keyword arguments of the operator.
    """

    model: nn.Module
    loss: nn.Module
    data: list[tuple[Any, Tensor]]
    params: list[Tensor] | None = None
    plain: Callable[[Any], Tensor] | None = None
    float32_inside: bool = False
    by_differences: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.params is None:
            self.params = [p for p in self.model.parameters() if p.requires_grad]
        if self.plain is None:
            self.plain = self.model

    @property
    def tolerance(self) -> float:
        """Relative, of a product in float64."""
        if self.by_differences:
            return TRUNCATION
        return ROUNDING_INSIDE if self.float32_inside else ROUNDING

    @property
    def arguments(self) -> tuple:
        """What an operator's constructor takes."""
        return self.model, self.loss, self.params, self.data


#: makes a case whose parameters and data are of a dtype
Build = Callable[[torch.dtype], Case]


def each(builds: list[Build]) -> Any:
    """Run a test for each case."""
    return pytest.mark.parametrize("build", builds, ids=lambda build: build.__name__)


def fresh(build: Build, dtype: torch.dtype) -> Case:
    """Build a case, always with the same values."""
    torch.manual_seed(0)
    return build(dtype)


class Returning(nn.Module):
    """Calls a model with the entries of a dict, and picks one tensor of what it returns."""

    def __init__(self, model: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.pick = pick

    def forward(self, X: dict[str, Any]) -> Tensor:
        return self.pick(self.model(**X))


def prepared(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In evaluation mode, at parameters that are no special point.

    Published initializations hold zeros (biases, LoRA, layer scale), where parts of a
    Hessian vanish. The values are those of float32 in both precisions.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval().to(dtype)


class PlainTorch:
    """Products by double backward through the model, with a graph made once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.params = list(case.params)
        self.shapes = [p.shape for p in self.params]
        with sdpa_kernel(SDPBackend.MATH):
            self.output, self.target = self._evaluate()
        self.gradient = self._gradient(create_graph=True)
        self.cotangent = torch.zeros_like(self.output, requires_grad=True)
        self.pullback = grad(
            self.output, self.params, self.cotangent, create_graph=True, allow_unused=True
        )

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        outputs = [self.case.plain(X) for X, _ in self.case.data]
        return torch.cat(outputs), torch.cat([y for _, y in self.case.data])

    def _gradient(self, *, create_graph: bool) -> tuple[Tensor | None, ...]:
        loss = self.case.loss(self.output, self.target)
        return grad(
            loss,
            self.params,
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )

    def split(self, v: Tensor) -> list[Tensor]:
        sizes = [s.numel() for s in self.shapes]
        parts = v.split(sizes)
        return [part.reshape(s) for part, s in zip(parts, self.shapes, strict=True)]

    def join(self, tensors: Any) -> Tensor:
        return torch.cat(
            [
                (torch.zeros_like(p) if t is None else t.detach()).reshape(-1)
                for t, p in zip(tensors, self.params, strict=True)
            ]
        )

    def hessian(self, v: Tensor) -> Tensor:
        if self.case.by_differences:
            return self.hessian_by_differences(v)
        pairs = [
            (g, t)
            for g, t in zip(self.gradient, self.split(v), strict=True)
            if g is not None and g.requires_grad
        ]
        along = sum(((g * t).sum() for g, t in pairs), torch.zeros(()))
        return self.join(grad(along, self.params, retain_graph=True, allow_unused=True))

    def jacobian(self, v: Tensor) -> Tensor:
        """``J v`` as the derivative of the linear map ``u -> J^T u``."""
        if self.case.by_differences:
            return self.jacobian_by_differences(v)
        pairs = [
            (z, t)
            for z, t in zip(self.pullback, self.split(v), strict=True)
            if z is not None
        ]
        along = sum(((z * t).sum() for z, t in pairs), torch.zeros(()))
        return grad(along, self.cotangent, retain_graph=True)[0]

    def transposed_jacobian(self, u: Tensor) -> Tensor:
        u = u.reshape(self.output.shape)
        return self.join(
            grad(self.output, self.params, u, retain_graph=True, allow_unused=True)
        )

    def ggn(self, v: Tensor) -> Tensor:
        z = self.output.detach().requires_grad_()
        (slope,) = grad(self.case.loss(z, self.target), z, create_graph=True)
        (middle,) = grad(slope, z, self.jacobian(v).detach())
        return self.transposed_jacobian(middle)

    def _moved(self, v: Tensor, step: float) -> PlainTorch:
        """At parameters a step further; without graphs of second derivatives."""
        other = copy.copy(self)
        kept = [p.detach().clone() for p in self.params]
        for p, t in zip(self.params, self.split(v), strict=True):
            p.data.add_(t, alpha=step)  # graphs made before are used again after
        try:
            with sdpa_kernel(SDPBackend.MATH):
                other.output, other.target = other._evaluate()
            other.gradient = other._gradient(create_graph=False)
        finally:
            for p, value in zip(self.params, kept, strict=True):
                p.data.copy_(value)
        return other

    def hessian_by_differences(self, v: Tensor) -> Tensor:
        step = 1e-4 / float(v.norm())
        ahead, behind = (self._moved(v, s) for s in (step, -step))
        return (self.join(ahead.gradient) - self.join(behind.gradient)) / (2 * step)

    def jacobian_by_differences(self, v: Tensor) -> Tensor:
        step = 1e-4 / float(v.norm())
        ahead, behind = (self._moved(v, s) for s in (step, -step))
        return (ahead.output - behind.output).detach() / (2 * step)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to ``expected``."""
    found, expected = found.detach().reshape(-1), expected.detach().reshape(-1)
    assert found.shape == expected.shape
    scale = expected.double().norm()
    assert torch.isfinite(expected).all()
    assert scale > 1e-8, "a product that vanishes compares nothing"
    return float((found.double() - expected.double()).norm() / scale)


def agree(operator: Any, expected: list[Tensor], allowed: list[float]) -> None:
    """Six products, the last three of them replayed, and a block of three."""
    columns = vectors(operator.shape[1], operator.torch_dtype)
    for i in range(6):
        error = distance(operator @ columns[:, i % 3], expected[i % 3])
        assert error <= allowed[i % 3], f"product {i + 1} is off by {error:.1e}"
    block = operator @ columns
    for i in range(3):
        error = distance(block[:, i], expected[i])
        assert error <= allowed[i], f"column {i} of a block is off by {error:.1e}"


def vectors(length: int, dtype: torch.dtype) -> Tensor:
    """Three columns, the same in both precisions."""
    generator = torch.Generator().manual_seed(length)
    return torch.randn(length, 3, generator=generator).to(dtype)


def check(matrix: str, build: Build, dtype: torch.dtype = torch.float64) -> None:
    """Compare an operator with plain PyTorch in float64.

    In float32 it may be as far off as eight times what plain PyTorch is in float32.
    """
    case = fresh(build, dtype)
    before = snapshot(case)
    pairs = []
    if matrix == "Jacobian":
        J = JacobianLinearOperator(case.model, case.params, case.data, **case.options)
        pairs = [(J, PlainTorch.jacobian), (J.T, PlainTorch.transposed_jacobian)]
    elif matrix == "GGN":
        pairs = [(GGNLinearOperator(*case.arguments, **case.options), PlainTorch.ggn)]
    else:
        pairs = [
            (HessianLinearOperator(*case.arguments, **case.options), PlainTorch.hessian)
        ]
    exact = PlainTorch(fresh(build, torch.float64))
    for operator, product in pairs:
        columns = vectors(operator.shape[1], torch.float64).T
        expected = [product(exact, v) for v in columns]
        allowed = [exact.case.tolerance] * 3
        if dtype == torch.float32:
            rounded = PlainTorch(fresh(build, dtype))
            errors = [
                distance(product(rounded, v.float()), e)
                for v, e in zip(columns, expected, strict=True)
            ]
            allowed = [8 * max(error, 1e-6) for error in errors]
        agree(operator, expected, allowed)
    assert untouched(case, before), "the operator left a trace in the model"


def snapshot(case: Case) -> list[Any]:
    """Everything of the model that an operator has to leave alone."""
    model = case.model
    state = [t.detach().clone() for t in model.state_dict().values()]
    flags = [m.training for m in model.modules()]
    grads = [(p.requires_grad, p.grad) for p in model.parameters()]
    return [state, flags, grads]


def untouched(case: Case, before: list[Any]) -> bool:
    """Whether the model is as it was."""
    state, flags, grads = snapshot(case)
    same = all(torch.equal(a, b) for a, b in zip(state, before[0], strict=True))
    return same and flags == before[1] and grads == before[2]
