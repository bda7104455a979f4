"""What is exact by theory, for every way to use a parameter, against dense GGNs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchlinop import EKFACLinearOperator, GGNDiagonalLinearOperator, KFACLinearOperator
from torchlinop.reference import dense_ggn

from tests.kronecker.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture(params=ZOO, scope="module")
def problem(request):
    torch.manual_seed(0)
    made = ZOO[request.param]()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention has no forward mode
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return made, dense_ggn(*made.arguments)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def dense_blocks(K, G):
    """The dense GGN's blocks in the order of the operator's own blocks."""
    starts = torch.tensor([0, *K.space.sizes]).cumsum(0)
    places = [torch.arange(a, b) for a, b in itertools.pairwise(starts)]
    by_name = {
        name: place.reshape(shape)
        for name, place, shape in zip(K.space.names, places, K.space.shapes, strict=True)
    }
    for names in K.blocks:
        parts = [by_name[name] for name in names]
        sides = len(parts) > 1 and parts[0].ndim > 1 and len(parts[0]) == len(parts[1])
        if sides:  # a bias is one more column
            index = torch.cat(
                [part.flatten(1) if part.ndim > 1 else part.unsqueeze(1) for part in parts],
                dim=1,
            ).reshape(-1)
        else:
            index = torch.cat([part.reshape(-1) for part in parts])
        yield names, index, G[index][:, index]


def test_diagonal(problem):
    made, G = problem
    D = GGNDiagonalLinearOperator(*made.arguments)
    torch.testing.assert_close(D.diagonal(), G.diagonal())
    torch.testing.assert_close(D.to_dense(), G.diagonal().diag())


@pytest.mark.parametrize(
    ("sharing", "joint_bias"), [("expand", True), ("expand", False), ("reduce", True)]
)
def test_ekfac_is_nearer_than_kfac_and_has_the_trace(problem, sharing, joint_bias):
    made, G = problem
    options = {"weight_sharing": sharing, "joint_bias": joint_bias}
    K = KFACLinearOperator(*made.arguments, **options)
    E = EKFACLinearOperator(*made.arguments, **options)
    dense_K, dense_E = K.to_dense(), E.to_dense()
    covered = torch.zeros_like(G, dtype=torch.bool)
    for names, index, block in dense_blocks(K, G):
        pair = index.unsqueeze(1), index
        covered[pair] = True
        torch.testing.assert_close(dense_E[pair].trace(), block.trace(), msg=str(names))
        near, far = (torch.linalg.norm(M[pair] - block) for M in (dense_E, dense_K))
        assert near <= far + 1e-12 * torch.linalg.norm(block), names
    assert (dense_K[~covered] == 0).all()
    assert (dense_E[~covered] == 0).all()
    torch.testing.assert_close(dense_K, dense_K.T)
    assert torch.linalg.eigvalsh(dense_K).min() > -1e-12
