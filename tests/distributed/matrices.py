"""Checks on every rank: operators of shared data are those of all data."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchlinop import (
    EFLinearOperator,
    EKFACLinearOperator,
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    NTKLinearOperator,
    gradient_and_loss,
    laplace,
    per_sample_gradients,
)

from tests.distributed import checking
from tests.distributed.problems import (
    close,
    compare,
    data,
    dense_ggn,
    dense_gradient_and_loss,
    dense_hessian,
    dense_jacobian,
    loss,
    model,
    regression,
    share,
)


def check_hessian_and_ggn(rank, size):
    m = model()
    own = share(data(), rank, size)
    group = dist.group.WORLD
    risk = EmpiricalRisk(m, loss(), m.parameters(), own, process_group=group)
    full = m, loss(), list(m.parameters()), data()
    assert risk.normalizer == EmpiricalRisk(*full).normalizer
    compare(HessianLinearOperator(risk), dense_hessian(*full))
    compare(GGNLinearOperator(risk), dense_ggn(*full))


def check_nothing_kept(rank, size):
    m = model()
    own = share(data(), rank, size)
    group = dist.group.WORLD
    for kind, dense in (
        (HessianLinearOperator, dense_hessian),
        (GGNLinearOperator, dense_ggn),
    ):
        A = kind(m, loss(), m.parameters(), own, cache=False, process_group=group)
        compare(A, dense(m, loss(), m.parameters(), data()))


def check_everything_on_one_rank(rank, size):
    m = model()
    own = data() if rank == size - 1 else []
    H = HessianLinearOperator(
        m, loss(), m.parameters(), own, process_group=dist.group.WORLD
    )
    compare(H, dense_hessian(m, loss(), m.parameters(), data()))


def check_empirical_fisher(rank, size):
    m = model()
    own = share(data(), rank, size)
    E = EFLinearOperator(m, loss(), m.parameters(), own, process_group=dist.group.WORLD)
    compare(E, EFLinearOperator(m, loss(), m.parameters(), data()).to_dense())


def check_sampled_fisher(rank, size):
    m, group = model(), dist.group.WORLD
    smooth = nn.Sequential(*m, nn.Linear(3, 2).double())
    for problem in (
        (m, loss(), list(m.parameters()), data()),
        (smooth, nn.MSELoss(), list(smooth.parameters()), regression()),
    ):
        own = share(problem[-1], rank, size)
        F = FisherMCLinearOperator(
            *problem[:-1], own, mc_samples=3, seed=5, process_group=group
        )
        compare(F, FisherMCLinearOperator(*problem, mc_samples=3, seed=5).to_dense())


def check_sum_reduction_and_loader(rank, size):
    m = model()
    X, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    all_of_it = TensorDataset(X, y)
    indices = range(rank, len(X), size)  # round robin
    own = DataLoader(
        torch.utils.data.Subset(all_of_it, indices), batch_size=4, shuffle=True
    )
    sums = nn.CrossEntropyLoss(reduction="sum")
    H = HessianLinearOperator(m, sums, m.parameters(), own, process_group=dist.group.WORLD)
    compare(H, dense_hessian(m, sums, m.parameters(), [(X, y)]))


def check_jacobian(rank, size):
    m = model()
    own = share(data(), rank, size)
    J = JacobianLinearOperator(m, m.parameters(), own, process_group=dist.group.WORLD)
    dense = dense_jacobian(m, m.parameters(), data())
    compare(J, dense)
    compare(J.T, dense.T)


def check_kronecker(rank, size):
    m = model()
    full = m, loss(), list(m.parameters()), data()
    own = share(data(), rank, size)
    group = dist.group.WORLD
    for kind, options in (
        (KFACLinearOperator, {}),
        (KFACLinearOperator, {"fisher_type": "mc", "mc_samples": 2, "seed": 3}),
        (KFACLinearOperator, {"fisher_type": "forward-only", "joint_bias": False}),
        (EKFACLinearOperator, {"fisher_type": "empirical"}),
        (KFOCLinearOperator, {"max_passes": 3}),
        (GGNDiagonalLinearOperator, {}),
    ):
        K = kind(*full[:3], own, process_group=group, **options)
        one = kind(*full, **options)
        close(K.to_dense(), one.to_dense())
        close(K.inverse(damping=0.1).to_dense(), one.inverse(damping=0.1).to_dense())
    with torch.no_grad():
        m[0].weight.mul_(1.5)
    close(K.to_dense(), one.to_dense())


def check_posterior_and_kernel(rank, size):
    m, group = model(), dist.group.WORLD
    full = m, loss(), list(m.parameters()), data()
    own = share(data(), rank, size)
    risk = EmpiricalRisk(*full[:3], own, process_group=group)
    one = EmpiricalRisk(*full)
    posterior = laplace(risk, KFACLinearOperator(risk))
    expected = laplace(one, KFACLinearOperator(one)).log_marginal_likelihood()
    assert abs(posterior.log_marginal_likelihood() - expected) <= 1e-9 * abs(expected)
    if all(share(data(), r, size) for r in range(size)):
        K = NTKLinearOperator(m, m.parameters(), own, process_group=group)
        compare(K, NTKLinearOperator(m, m.parameters(), data()).to_dense())
    with pytest.raises(ValueError, match="process group"):
        per_sample_gradients(risk)


def check_gradient(rank, size):
    m = model()
    own = share(data(), rank, size)
    gradient, value = gradient_and_loss(
        m, loss(), m.parameters(), own, process_group=dist.group.WORLD
    )
    expected, mean = dense_gradient_and_loss(m, loss(), m.parameters(), data())
    close(value, mean)
    for part, its in zip(gradient, expected, strict=True):
        close(part, its)


def check_follows_the_model(rank, size):
    m = model()
    own = share(data(), rank, size)
    H = HessianLinearOperator(
        m, loss(), m.parameters(), own, process_group=dist.group.WORLD
    )
    v = torch.ones(H.shape[0], dtype=torch.float64)
    H @ v
    with torch.no_grad():
        m[0].weight.mul_(1.5)
    close(H @ v, dense_hessian(m, loss(), m.parameters(), data()) @ v)
    if rank == size - 1:  # alone
        own[0][0].mul_(2)
    changed = data()
    changed[4][0].mul_(2)
    close(H @ v, dense_hessian(m, loss(), m.parameters(), changed) @ v)


def check_same_bits_everywhere(rank, size):
    m = model()
    own = share(data(), rank, size)
    H = HessianLinearOperator(
        m, loss(), m.parameters(), own, process_group=dist.group.WORLD
    )
    product = H @ torch.ones(H.shape[0], dtype=torch.float64)
    first = product.clone()
    dist.broadcast(first, 0)
    assert torch.equal(product, first)
    assert product.data_ptr() != (H @ product).data_ptr()


if __name__ == "__main__":
    checks = vars(sys.modules[__name__]).items()
    checking.run({name: check for name, check in checks if name[:6] == "check_"})
