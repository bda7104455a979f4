"""Programs as users of curvlinops write them, by its tutorials' calls.

Each takes the library, this package's names or that library itself, and returns numbers
that are to be the same with both. What the tutorials assert is asserted here.
"""

from __future__ import annotations

import importlib
from collections import UserDict

import numpy as np
import scipy.sparse.linalg
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector


class Library:
    """A library's modules by that library's names."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.top = importlib.import_module(name)

    def __getattr__(self, module: str):
        if module.startswith("__"):  # doctest asks every object for __wrapped__
            raise AttributeError(module)
        return importlib.import_module(f"{self.name}.{module.replace('__', '.')}")


def _regression(n=4, dtype=torch.float64):
    torch.manual_seed(0)
    data = [(torch.rand(n, 7, dtype=dtype), torch.rand(n, 3, dtype=dtype)) for _ in "ab"]
    model = nn.Sequential(
        nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 3)
    ).to(dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    return model, nn.MSELoss(reduction="mean"), params, data


def matrix_vector_products(lib):
    """Products with vectors and matrices, in one tensor and in lists."""
    model, loss, params, data = _regression()
    report = lib.utils.allclose_report
    numbers = []
    for name in ("Hessian", "GGN"):
        A = getattr(lib.top, f"{name}LinearOperator")(model, loss, params, data)
        dense = getattr(lib.examples__functorch, f"functorch_{name.lower()}")
        matrix = dense(model, loss, params, data).detach()
        size = A.shape[0]
        v = torch.linspace(-1, 1, size, dtype=torch.float64, device=A.device)
        assert report(A @ v, matrix @ v)
        assert report(A @ torch.eye(size, dtype=torch.float64), matrix)
        listed = A @ [torch.ones_like(p) for p in params]
        flat = parameters_to_vector(listed)
        assert report(flat, matrix @ torch.ones(size, dtype=torch.float64))
        block = A @ [torch.ones(*p.shape, 2, dtype=torch.float64) for p in params]
        assert [b.shape for b in block] == [(*p.shape, 2) for p in params]
        numbers += [
            matrix,
            flat,
            A.adjoint() @ v,
            (A + A) @ v,
            (A - 0.5 * A) @ v,
            A @ (A @ v),
        ]
        numbers.append((A @ A) @ v)
    return numbers


def eigenvalues(lib):
    """The largest eigenvalues of the Hessian by eigsh, in single precision."""
    arguments = _regression(20, torch.float32)
    H = lib.top.HessianLinearOperator(*arguments).to_scipy()
    values, _ = scipy.sparse.linalg.eigsh(H, k=3, which="LM")
    dense = lib.examples__functorch.functorch_hessian(*arguments).detach()
    expected = torch.linalg.eigh(dense)[0][-3:]
    assert lib.utils.allclose_report(values.astype(float), expected.double(), rtol=1e-4)
    rng = np.random.default_rng(0)
    v = rng.standard_normal(H.shape[0])
    for _ in range(30):  # power iteration
        v = H @ v
        v = v / np.linalg.norm(v)
    return [torch.as_tensor(values).double(), torch.as_tensor(v.dot(H @ v)).double()]


def submatrices(lib):
    """Blocks of the Hessian, by parameters and by indices."""
    model, loss, params, data = _regression()
    H = lib.top.HessianLinearOperator(model, loss, params, data)
    dense = lib.examples__functorch.functorch_hessian(model, loss, params, data)
    first = lib.top.HessianLinearOperator(model, loss, [params[0]], data)
    size = params[0].numel()
    report = lib.utils.allclose_report
    assert report(first @ torch.eye(size).double(), dense[:size, :size])
    submatrix = lib.submatrix.SubmatrixLinearOperator
    wide = submatrix(H, list(range(size)), list(range(size, size + 5)))
    assert report(wide @ torch.eye(5).double(), dense[:size, size : size + 5])
    wide.set_submatrix([0, 13, 42], [1, 2, 3])
    assert report(wide @ torch.eye(3).double(), dense[[0, 13, 42]][:, [1, 2, 3]])
    blocks = lib.top.HessianLinearOperator(model, loss, params, data, block_sizes=[2, 2, 2])
    return [wide @ torch.ones(3).double(), blocks @ torch.ones(H.shape[1]).double()]


class _Wrapped(nn.Module):
    """A model that takes the dict of a data collator."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 2))
        for p in self.inner[0].parameters():
            p.requires_grad = False

    def forward(self, data):
        return self.inner(data["input_ids"])


def dicts_as_inputs(lib):
    """A language model's batches, of which only the head is differentiated."""
    torch.manual_seed(0)
    model = _Wrapped().double()
    batch = UserDict(
        {"input_ids": torch.randint(9, (6, 5)), "labels": torch.randint(2, (6,))}
    )
    params = [p for p in model.parameters() if p.requires_grad]
    G = lib.top.GGNLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        params,
        [(batch, batch["labels"])],
        check_deterministic=False,
        batch_size_fn=lambda x: x["input_ids"].shape[0],
    )
    dense = lib.examples__functorch.functorch_ggn(
        model,
        nn.CrossEntropyLoss(),
        params,
        [(batch, batch["labels"])],
        input_key="input_ids",
    )
    return [G @ torch.eye(G.shape[0]).double(), dense.detach()]


def _by_classes():
    """A small convolutional classifier on a loader."""
    torch.manual_seed(0)
    dataset = torch.utils.data.TensorDataset(
        torch.rand(25, 3, 6, 6).double(), torch.randint(4, (25,))
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=10)
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2, 1, 3, padding=1, stride=2),
        nn.Flatten(),
        nn.Linear(9, 4),
    ).double()
    params = [p for p in model.parameters() if p.requires_grad]
    return model, nn.CrossEntropyLoss(reduction="mean"), params, loader


def visual_tour(lib):
    """All curvature matrices of one model."""
    arguments = _by_classes()
    model, _, params, loader = arguments
    size = sum(p.numel() for p in params)
    identity = torch.eye(size).double()
    matrices = [
        getattr(lib.top, f"{name}LinearOperator")(*arguments) @ identity
        for name in ("Hessian", "GGN", "EF")
    ]
    options = {"fisher_type": lib.top.FisherType.TYPE2}
    for approximation in (lib.top.KFACType.EXPAND, lib.top.KFACType.REDUCE):
        options["kfac_approx"] = approximation
        matrices.append(lib.top.KFACLinearOperator(*arguments, **options) @ identity)
    E = lib.top.EKFACLinearOperator(*arguments, fisher_type=lib.top.FisherType.TYPE2)
    matrices.append(E @ identity)
    J = lib.top.JacobianLinearOperator(model, params, loader)
    T = lib.top.TransposedJacobianLinearOperator(model, params, loader)
    (outputs,) = J @ [torch.ones_like(p) for p in params]
    assert outputs.shape == (25, 4)
    matrices += [outputs, parameters_to_vector(T @ [outputs])]
    matrices += [J @ identity, T @ torch.eye(100).double()]
    return matrices


def model_merging(lib):
    """Parameters of several tasks, averaged with their Fisher matrices as weights."""
    models, fishers = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        dataset = torch.utils.data.TensorDataset(
            torch.rand(20, 7).double(), torch.rand(20, 3).double()
        )
        loader = torch.utils.data.DataLoader(dataset, batch_size=7)
        loss = nn.MSELoss(reduction="mean")
        params = [p for p in model.parameters() if p.requires_grad]
        fishers.append(lib.top.GGNLinearOperator(model, loss, params, loader))
        models.append(model)
    thetas = [parameters_to_vector(m.parameters()).detach() for m in models]
    rhs = sum(fisher @ theta for fisher, theta in zip(fishers, thetas, strict=True))
    shapes = [p.shape for p in models[0].parameters() if p.requires_grad]
    identity = lib.examples.IdentityLinearOperator(shapes, fishers[0].device, rhs.dtype)
    fisher_sum = 1e-3 * identity
    for fisher in fishers:
        fisher_sum += fisher
    inverse = lib.top.CGInverseLinearOperator(
        fisher_sum, tolerance=1e-9, eps=0, max_iter=500
    )
    merged = inverse @ rhs
    assert lib.utils.allclose_report(fisher_sum @ merged, rhs, rtol=1e-5, atol=1e-7)
    series = lib.top.NeumannInverseLinearOperator(fisher_sum, num_terms=4, scale=0.1)
    return [merged, series @ rhs]


def deflated_spectrum(lib):
    """A spectral density without its outliers."""
    torch.manual_seed(0)
    Z = torch.randn(100, 100).double()
    Y = Z @ Z.T / 100
    Y[[0, 1, 2], [0, 1, 2]] += torch.tensor([5.0, 4.0, 3.0]).double()
    values = torch.linalg.eigvalsh(Y)
    operator = lib.examples.TensorLinearOperator(Y)
    top, vectors = scipy.sparse.linalg.eigsh(operator.to_scipy(), k=3, which="LA")
    outer = lib.examples.OuterProductLinearOperator(
        torch.as_tensor(top), torch.as_tensor(vectors.copy())
    )
    deflated = operator - outer
    options = {"boundaries": (values[0].item(), values[-1].item())}
    spectrum = lib.papyan2020traces__spectrum
    for A in (operator, deflated):
        grid, density = spectrum.lanczos_approximate_spectrum(
            A, 30, num_points=256, num_repeats=3, kappa=3, margin=0.05, **options
        )
        assert grid.shape == density.shape == (256,)
        assert abs(torch.trapezoid(density, grid).item() - 1) < 0.1
    cache = spectrum.LanczosApproximateSpectrumCached(operator, 30, **options)
    for kappa in (1.1, 3, 10.0):
        again, _ = cache.approximate_spectrum(num_repeats=3, num_points=256, kappa=kappa)
        torch.testing.assert_close(again, grid)
    cache = lib.top.LanczosApproximateLogSpectrumCached(operator, 30, **options)
    sizes, _ = cache.approximate_log_spectrum(num_repeats=2, num_points=64, epsilon=1e-5)
    return [torch.as_tensor(top), deflated @ torch.ones(100).double(), grid, sizes]


def traces_and_diagonals(lib):
    """Estimates for a matrix with a power law, against its trace and diagonal."""
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(60, 60).double())[0]
    Y = Q @ torch.diag(torch.arange(1, 61).double() ** -2) @ Q.T
    operator = lib.examples.TensorLinearOperator(Y)
    for estimate, exact in (
        (lib.top.hutchinson_trace, Y.trace()),
        (lib.top.hutchpp_trace, Y.trace()),
        (lib.top.xtrace, Y.trace()),
        (lib.top.hutchinson_squared_fro, Y.square().sum()),
    ):
        for A in (operator, Y):
            found = torch.stack([estimate(A, num_matvecs=18) for _ in range(15)])
            assert abs(found.median() - exact) < 0.3 * exact
    for estimate in (lib.top.hutchinson_diag, lib.top.xdiag):
        found = torch.stack([estimate(operator, 18) for _ in range(15)])
        error = torch.linalg.norm(found.mean(0) - Y.diagonal())
        assert error < 0.5 * torch.linalg.norm(Y.diagonal())
    positive = lib.examples.TensorLinearOperator(Y + torch.eye(60).double())
    least = lib.top.LSMRInverseLinearOperator(positive, atol=1e-12, btol=1e-12, maxiter=90)
    return [least @ torch.ones(60).double()]


def damped_kfac(lib):
    """Inverses of KFAC and EKFAC, each damping."""
    arguments = _by_classes()
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    K = lib.top.KFACLinearOperator(*arguments, **options)
    E = lib.top.EKFACLinearOperator(*arguments, **options)
    v = torch.ones(K.shape[1]).double()
    inverse = lib.top.KFACInverseLinearOperator
    return [
        inverse(K, damping=0.1) @ v,
        inverse(K, damping=(0.1, 0.2)) @ v,
        inverse(K, damping=0.1, use_heuristic_damping=True, min_damping=1e-3) @ v,
        inverse(K, damping=0.1, use_exact_damping=True) @ v,
        inverse(E, damping=0.1, use_exact_damping=True) @ v,
        *(inverse(K, 0.1) @ [torch.ones_like(p) for p in arguments[2]]),
    ]


def empirical_risk(lib):
    """Gradient and loss, as a method of 3.0's operators."""
    arguments = _by_classes()
    G = lib.top.GGNLinearOperator(*arguments, num_data=25)
    gradient, loss = G.gradient_and_loss()
    dense, value = lib.examples__functorch.functorch_gradient_and_loss(*arguments)
    assert lib.utils.allclose_report(loss, value)
    flat = parameters_to_vector(gradient)
    assert lib.utils.allclose_report(flat, parameters_to_vector(dense).detach())
    E = lib.examples__functorch.functorch_empirical_fisher(*arguments)
    J = lib.examples__functorch.functorch_jacobian(*arguments[::2], arguments[3])
    return [flat, loss, E.detach(), J.detach()]


#: what 3.0 runs
BOTH = [
    matrix_vector_products,
    eigenvalues,
    submatrices,
    dicts_as_inputs,
    visual_tour,
    model_merging,
    deflated_spectrum,
    traces_and_diagonals,
    damped_kfac,
    empirical_risk,
]
