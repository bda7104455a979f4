"""Functions that were, or could be, dangerous to record. Run as a program: it may crash.

Prints a line of JSON for each: the relative error of its products, and whether they are
replayed. Random programs are counted in roundings, and as a share.
"""

from __future__ import annotations

import json
import warnings

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils import _pytree as pytree
from torchlinop import HessianLinearOperator, JacobianLinearOperator
from torchlinop.autodiff import columns, experience
from torchlinop.autodiff.columns import WARM_UP
from torchlinop.autodiff.experience import Experience
from torchlinop.autodiff.replay import expected

from tests.autodiff.random_programs import KINDS, as_rows, check, is_replayed

DOUBLE = torch.float64
PRODUCTS = WARM_UP + 4
X = torch.rand(5, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
N = 33


def u(p, x):
    """Evaluate a network with parameters ``p`` at one point."""
    hidden = torch.tanh(p[:8].view(4, 2) @ x + p[8:12])
    return torch.tanh(p[12:28].view(4, 4) @ hidden + p[28:32]).sum() * p[32]


def _laplace(p):
    H = vmap(hessian(lambda x: u(p, x)))(X)
    return (H[:, 0, 0] + H[:, 1, 1] - X.sum(1)).square().mean()


def _heat(p):
    def v(t, x):
        return u(p, torch.stack([t, x]))

    t, x = X.unbind(1)
    residual = vmap(grad(v))(t, x) - 0.1 * vmap(grad(grad(v, 1), 1))(t, x)
    initial = vmap(v)(0 * t, x) - torch.sin(x)
    return residual.square().mean() + initial.square().mean()


def _gradient_penalty(p):
    slopes = vmap(grad(u, 1), (None, 0))(p, X)
    return (slopes.norm(dim=1) - 1).square().mean()


def _both(p):
    return lambda x: torch.stack([u(p, x), u(p, 2 * x)])


def _jvp(p):
    value, tangent = jvp(lambda x: u(p, x), (X[0],), (X[1],))
    return value * tangent + tangent**3


def _vjp(p):
    value, pullback = vjp(lambda x: u(p, x), X[0])
    return value * pullback(torch.ones((), dtype=DOUBLE))[0].square().sum()


def _linearize(p):
    value, pushforward = linearize(lambda x: u(p, x), X[0])
    return pushforward(X[1]) ** 2 + value


def _network():
    layers = nn.Linear(2, 3, device="meta"), nn.Tanh(), nn.Linear(3, 1, device="meta")
    return nn.Sequential(*layers)


NETWORKS = [_network(), _network()]
STACKED, _ = stack_module_state(NETWORKS)


def _ensemble(p):
    sizes = [t.numel() for t in STACKED.values()]
    parts = zip(STACKED.items(), p[: sum(sizes)].split(sizes), strict=True)
    params = {name: part.view(t.shape) for (name, t), part in parts}
    outputs = vmap(lambda q, x: functional_call(NETWORKS[0], q, (x,)), (0, None))(params, X)
    slopes = vmap(
        lambda q: vmap(grad(lambda x: functional_call(NETWORKS[0], q, (x,)).sum()))(X)
    )(params)
    return (outputs - 1).square().mean() + slopes.square().mean()


def _forward_mode(p):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, torch.ones_like(X))
        tangent = forward_ad.unpack_dual(vmap(lambda y: u(p, y))(x)).tangent
    return tangent.square().sum()


#: scalar functions, whose Hessians are compared
SCALARS = {
    "Laplace equation": _laplace,
    "heat equation": _heat,
    "gradient penalty": _gradient_penalty,
    "jacrev": lambda p: jacrev(_both(p))(X[0]).square().sum(),
    "jacfwd": lambda p: jacfwd(_both(p))(X[0]).square().sum(),
    "jacrev of jacfwd": lambda p: jacrev(jacfwd(_both(p)))(X[0]).square().sum(),
    "jacfwd of jacfwd": lambda p: jacfwd(jacfwd(_both(p)))(X[0]).square().sum(),
    "jvp": _jvp,
    "vjp": _vjp,
    "jvp of grad": lambda p: jvp(grad(lambda x: u(p, x)), (X[0],), (X[1],))[1].sum() ** 2,
    "linearize": _linearize,
    "nested vmap": lambda p: (
        vmap(lambda a: vmap(lambda b: u(p, a * b))(X))(X).square().mean()
    ),
    "hessian in nested vmap": lambda p: (
        vmap(lambda a: vmap(lambda b: hessian(lambda x: u(p, x))(a * b).trace())(X[:2]))(
            X[:2]
        )
        .square()
        .mean()
    ),
    "ensemble": _ensemble,
    "forward mode": _forward_mode,
    "derivatives that are zero": lambda p: (
        vmap(hessian(lambda x: (p[:2] * x).sum() + x[0] * p[2]))(X).sum() + p.pow(3).sum()
    ),
}

#: vector functions, whose Jacobians and transposes are compared
VECTORS = {
    "Jacobian of Laplace": lambda p: (
        vmap(hessian(lambda x: u(p, x)))(X).diagonal(dim1=1, dim2=2).sum(1)
    ),
    "Jacobian of grad": lambda p: vmap(grad(u, 1), (None, 0))(p, X).reshape(-1),
    "Jacobian of jvp": lambda p: jvp(
        lambda x: vmap(lambda y: u(p, y))(x), (X,), (torch.ones_like(X),)
    )[1],
}


class _Wrapper(torch.Tensor):
    """A tensor that has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(value):
            return value.inner if isinstance(value, cls) else value

        result = func(
            *pytree.tree_map(unwrap, args), **pytree.tree_map(unwrap, kwargs or {})
        )
        return pytree.tree_map_only(torch.Tensor, cls, result)


def _fake(x):
    with torch._subclasses.FakeTensorMode():
        torch.ones(3) * 2
    return 2 * x


def _nested(x):
    return (2 * torch.nested.nested_tensor([x[:3], x[3:]])).to_padded_tensor(0.0).sum(0)


SCALE = torch.linspace(1, 2, N, dtype=DOUBLE)
MATRIX = torch.outer(SCALE, SCALE.sin())
ZERO = torch._efficientzerotensor((N,), dtype=DOUBLE)
COMPLEX = torch.complex(SCALE, SCALE.cos())
_scaled = torch.ops.aten.mul.Scalar

#: linear functions, which are compared with themselves, and whether they can be replayed
LINEAR = {
    "zero, scaled": (lambda x: x + _scaled(ZERO, 2) * x, True),
    "zero, added to a number": (lambda x: x * torch.ops.aten.add.Scalar(ZERO, 1), True),
    "zero and a number": (lambda x: x * (ZERO + 1), False),
    "zero that is made": (
        lambda x: x + torch._efficientzerotensor((N,), dtype=DOUBLE),
        True,
    ),
    "zero, viewed": (lambda x: x + ZERO.view(3, 11).t().reshape(-1), True),
    "zero, concatenated": (lambda x: torch.cat([x, ZERO]), True),
    "zero, multiplied": (lambda x: MATRIX @ x + MATRIX @ ZERO + ZERO * x, True),
    "conjugate": (lambda x: (x * COMPLEX.conj()).real.clone(), True),
    "conjugate, scaled": (lambda x: _scaled((x * COMPLEX).conj(), 2).imag.clone(), True),
    "negative": (lambda x: _scaled((x * COMPLEX).conj().imag, 2), True),
    "meta": (lambda x: x * (x.to("meta") + 1).shape[0], True),
    "fake": (_fake, False),
    "sparse": (lambda x: MATRIX.to_sparse() @ x, False),
    "compressed": (lambda x: MATRIX.to_sparse_csr() @ x, False),
    "nested": (_nested, False),
    "wrapper": (lambda x: (_Wrapper(SCALE) * x).inner, False),
    "wrapped argument": (lambda x: (_Wrapper(x) * SCALE + _Wrapper(x)).inner, False),
    "linear solver": (
        lambda x: torch.linalg.solve(MATRIX + MATRIX.T.diag().diag(), x),
        True,
    ),
    "transform": (lambda x: jvp(torch.sin, (SCALE,), (x,))[1], True),
}

#: random programs: what they are made of, and in which precision
PROGRAMS = {
    f"programs, {kind}, {dtype}": (steps, dtype)
    for kind, steps in KINDS.items()
    for dtype in (torch.float64, torch.float32)
}


def _derivative(kind, function):
    p = torch.randn(N, dtype=DOUBLE)
    operator = kind.from_function(function, p)
    if function in (_linearize, _forward_mode):  # which torch.func cannot transform again
        dense = torch.autograd.functional.hessian(function, p)
    else:
        dense = (hessian if kind is HessianLinearOperator else jacrev)(function)(p)
    errors = []
    for _ in range(PRODUCTS):
        v, w = torch.randn(N, dtype=DOUBLE), torch.randn(len(dense), dtype=DOUBLE)
        errors += [_error(operator @ v, dense @ v), _error(operator.T @ w, dense.T @ w)]
    (linear_map,) = operator._maps._kept.maps.values()
    if kind is HessianLinearOperator:
        return max(errors), is_replayed(linear_map)
    return max(errors), is_replayed(linear_map.forward) and is_replayed(linear_map.backward)


def _linear(function):
    rows, experience, errors = as_rows(function), Experience(), []
    for _ in range(PRODUCTS):
        x = torch.randn(N, dtype=DOUBLE)
        errors.append(_error(rows.row(x, experience), function(x)))
    return max(errors), is_replayed(rows)


def _error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def main() -> None:
    # whatever can be replayed is
    experience._EXPECTED, columns._PAYS, expected._LITTLE = 10**9, float("inf"), 0.0
    warnings.simplefilter("ignore")  # torch warns of some of these tensors
    torch.manual_seed(0)
    for name, function in SCALARS.items():
        report(name, *_derivative(HessianLinearOperator, function))
    for name, function in VECTORS.items():
        report(name, *_derivative(JacobianLinearOperator, function))
    for name, (function, _) in LINEAR.items():
        report(name, *_linear(function))
    for name, (steps, dtype) in PROGRAMS.items():
        checked = [check(seed, dtype, steps) for seed in range(15)]
        report(name, max(e for e, _ in checked), sum(r for _, r in checked) / len(checked))


def report(name: str, error: float, replayed: float) -> None:
    line = {"name": name, "error": error, "replayed": replayed}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
