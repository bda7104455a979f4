"""Checks on every rank: wrapped and sharded models have the matrices of whole ones."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torchlinop import (
    CGInverseLinearOperator,
    EFLinearOperator,
    EKFACLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    gradient_and_loss,
)
from torchlinop.distributed import driver

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
    share,
)

MESHES = {}


def mesh_of(*sizes):
    """Return a mesh of all ranks; made once, since it takes connections."""
    if sizes not in MESHES:
        names = tuple("abc"[: len(sizes)])
        MESHES[sizes] = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    return MESHES[sizes]


def sharded(mesh, **options):
    """Return the model, layer by layer sharded."""
    m = model()
    for layer in (m[0], m[2], m):
        fully_shard(layer, mesh=mesh, **options)
    return m


def world():
    return {"process_group": dist.group.WORLD}


def check_matrices(rank, size):
    m, whole = sharded(mesh_of(size)), model()
    own = share(data(), rank, size)
    for kind, dense in (
        (HessianLinearOperator, dense_hessian),
        (GGNLinearOperator, dense_ggn),
    ):
        expected = dense(whole, loss(), whole.parameters(), data())
        compare(kind(m, loss(), m.parameters(), own, **world()), expected)
        compare(kind(m, loss(), m.parameters(), own, cache=False, **world()), expected)
    J = JacobianLinearOperator(m, m.parameters(), own, **world())
    expected = dense_jacobian(whole, whole.parameters(), data())
    compare(J, expected)
    compare(J.T, expected.T)
    for kind, options in (
        (EFLinearOperator, {}),
        (FisherMCLinearOperator, {"mc_samples": 2, "seed": 5}),
        (KFACLinearOperator, {}),
        (EKFACLinearOperator, {"fisher_type": "empirical"}),
    ):
        A = kind(m, loss(), m.parameters(), own, **options, **world())
        B = kind(whole, loss(), whole.parameters(), data(), **options)
        close(A.to_dense(), B.to_dense())
    gradient, value = gradient_and_loss(m, loss(), m.parameters(), own, **world())
    expected, mean = dense_gradient_and_loss(whole, loss(), whole.parameters(), data())
    close(value, mean)
    for part, its in zip(gradient, expected, strict=True):
        close(part, its)


def check_some_parameters(rank, size):
    m, whole = sharded(mesh_of(size)), model()
    H = HessianLinearOperator(
        m, loss(), {"2.weight": m[2].weight}, share(data(), rank, size), **world()
    )
    compare(H, dense_hessian(whole, loss(), [whole[2].weight], data()))


def check_model_is_left_and_trains_on(rank, size):
    m, whole = sharded(mesh_of(size)), model()
    own = share(data(), rank, size)

    def facts():
        return [
            (name, type(part), [*part._forward_pre_hooks], [*part._forward_hooks])
            for name, part in m.named_modules()
        ], [(id(p), p.to_local()._version, p.placements) for p in m.parameters()]

    before = facts()
    H = HessianLinearOperator(m, loss(), m.parameters(), own, **world())
    K = KFACLinearOperator(m, loss(), m.parameters(), own, **world())
    v = torch.ones(H.shape[1], dtype=torch.float64)
    H @ v
    assert facts() == before
    assert all(p.grad is None for p in m.parameters())
    assert isinstance(m, FSDPModule)
    assert isinstance(m[0], FSDPModule)
    X, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    for net in (m, whole):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        loss()(net(X), y).backward()
        optimizer.step()
    gradient = H.space.to_vector(p.grad for p in m.parameters())
    close(gradient, torch.cat([p.grad.flatten() for p in whole.parameters()]))
    spread = distribute_tensor(gradient, mesh_of(size), [Shard(0)])
    for p, part in zip(whole.parameters(), H.space.to_named(spread).values(), strict=True):
        close(p.grad, part)
    close(m[0].weight.full_tensor(), whole[0].weight)  # trained alike
    expected = dense_hessian(whole, loss(), whole.parameters(), data())
    compare(H, expected)
    one = KFACLinearOperator(whole, loss(), whole.parameters(), data())
    close(K.to_dense(), one.to_dense())
    if rank == 0:  # what one rank alone sees
        m[0].weight.to_local().data.mul_(2)
    moved = copy.deepcopy(whole)
    with torch.no_grad():
        moved[0].weight.copy_(m[0].weight.full_tensor())
    assert not torch.equal(moved[0].weight, whole[0].weight)
    compare(H, dense_hessian(moved, loss(), moved.parameters(), data()))


def check_local_part_replaced(rank, size):
    m, whole = sharded(mesh_of(size)), model()
    H = HessianLinearOperator(
        m, loss(), m.parameters(), share(data(), rank, size), **world()
    )
    H @ torch.ones(H.shape[1], dtype=torch.float64)
    m[2].weight._local_tensor = m[2].weight._local_tensor.detach() * 2
    with torch.no_grad():
        whole[2].weight.mul_(2)
    compare(H, dense_hessian(whole, loss(), whole.parameters(), data()))


def check_evaluated_without_backward(rank, size):
    m = model()
    fully_shard(m[0], mesh=mesh_of(size))
    fully_shard(m, mesh=mesh_of(size))  # with the parameters of the last layer
    own = share(data(), rank, size)
    H = HessianLinearOperator(m, loss(), m.parameters(), own, **world())
    v = torch.ones(H.shape[1], dtype=torch.float64)
    expected = H @ v
    with torch.no_grad():
        m(data()[0][0])  # leaves the last layer whole
    message = r"The model \(FSDPSequential\) has whole parameters at the moment.*reshard"
    with pytest.raises(ValueError, match=message):
        H @ v
    with pytest.raises(ValueError, match=message):
        HessianLinearOperator(m, loss(), m.parameters(), own, **world())
    m.reshard()
    close(H @ v, expected)


def check_hooks_of_the_user(rank, size):
    m, whole = sharded(mesh_of(size)), model()
    for net in (m, whole):
        net[0].register_forward_hook(lambda module, args, output: 2 * output)
    H = HessianLinearOperator(
        m, loss(), m.parameters(), share(data(), rank, size), **world()
    )
    compare(H, dense_hessian(whole, loss(), whole.parameters(), data()))


def check_placements(rank, size):
    """Plain parameters that are placed by hand, and a mesh of two dimensions."""
    whole = model()
    expected = dense_hessian(whole, loss(), whole.parameters(), data())
    own = share(data(), rank, size)
    places = {
        "0.weight": [Shard(1)],
        "0.bias": [Replicate()],
        "2.weight": [Shard(0)],
        "2.bias": [Partial()],
    }
    mesh = mesh_of(size)

    def place(name, module, mesh):
        for key, p in [*module.named_parameters(recurse=False)]:
            placements = places[f"{name}.{key}"]
            placed = nn.Parameter(distribute_tensor(p.detach(), mesh, placements))
            module.register_parameter(key, placed)

    m = distribute_module(model(), mesh, place)
    assert all(isinstance(p, DTensor) for p in m.parameters())
    compare(HessianLinearOperator(m, loss(), m.parameters(), own, **world()), expected)
    m = sharded(mesh_of(size // 2, 2))  # replicas, each of them sharded
    compare(HessianLinearOperator(m, loss(), m.parameters(), own, **world()), expected)


class Recurrent(nn.Module):
    """A weight that two layers share, layers with lists of weights, buffers, a scalar."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.normalization = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, X):
        last = self.recurrent(self.embedding(X))[0][:, -1]
        return self.scale * self.head(self.normalization(last))


def check_kinds_of_layers(rank, size):
    torch.manual_seed(0)
    whole = Recurrent().double().eval()
    whole.normalization.running_mean.normal_()
    m = copy.deepcopy(whole)
    fully_shard([m.recurrent, m.normalization], mesh=mesh_of(size))  # as one group
    fully_shard(m, mesh=mesh_of(size))
    X, y = torch.randint(5, (6, 3)), torch.randint(5, (6,))
    mean = nn.CrossEntropyLoss()
    own = [(X[rank::size], y[rank::size])]
    H = HessianLinearOperator(m, mean, m.parameters(), own, **world())
    compare(H, dense_hessian(whole, mean, whole.parameters(), [(X, y)]))


def check_function_of_sharded_tensors(rank, size):
    tensors = {
        "w": torch.arange(12.0, dtype=torch.float64).view(4, 3) / 10,
        "b": torch.ones(3, dtype=torch.float64),
    }

    def function(params, X):
        return torch.tanh(X @ params["w"]) + params["b"]

    placed = {
        name: distribute_tensor(t, mesh_of(size), [Shard(0)]) for name, t in tensors.items()
    }
    H = HessianLinearOperator(
        function, loss(), placed, share(data(), rank, size), **world()
    )
    one = HessianLinearOperator(function, loss(), tensors, data())
    compare(H, one.to_dense())


def check_sharded_vectors(rank, size):
    m, whole = sharded(mesh_of(size)), model()
    own = share(data(), rank, size)
    H = HessianLinearOperator(m, loss(), m.parameters(), own, **world())
    J = JacobianLinearOperator(m, m.parameters(), own, **world())
    dense = dense_hessian(whole, loss(), whole.parameters(), data())
    jacobian = dense_jacobian(whole, whole.parameters(), data())
    generator = torch.Generator().manual_seed(3)
    for shape in ((H.shape[1],), (H.shape[1], 3)):
        v = torch.randn(shape, dtype=torch.float64, generator=generator)
        places = [[Shard(0)], [Replicate()]] + ([[Shard(1)]] if len(shape) == 2 else [])
        for placements in places:
            x = distribute_tensor(v, mesh_of(size), placements)
            for A, its in ((H, dense), (J, jacobian)):
                product = A @ x
                assert isinstance(product, DTensor)
                assert product.placements == x.placements
                assert product.shape == (A.shape[0], *shape[1:])
                close(product.full_tensor(), its @ v)
                # no more is kept than what belongs to this rank
                local = product.to_local()
                assert local.untyped_storage().nbytes() == local.nbytes
                like = distribute_tensor(its @ v, mesh_of(size), placements)
                close(local, like.to_local())
            assert (H @ x.to(torch.float32)).dtype == torch.float64
    x = distribute_tensor(v, mesh_of(size), [Shard(0)])
    close((x.T @ H).full_tensor(), v.T @ dense)
    close(H.matmat(x).full_tensor(), dense @ v)
    both = distribute_tensor(v, mesh_of(size // 2, 2), [Shard(0), Shard(0)])
    close((H @ both).full_tensor(), dense @ v)
    complex_ = distribute_tensor(v + 2j * v, mesh_of(size), [Shard(0)])
    close((H @ complex_).full_tensor(), dense @ v + 2j * (dense @ v))
    G = GGNLinearOperator(m, loss(), m.parameters(), own, **world())
    A = CGInverseLinearOperator(G, damping=0.1, rtol=1e-12)
    ggn = dense_ggn(whole, loss(), whole.parameters(), data())
    ggn += 0.1 * torch.eye(len(ggn), dtype=torch.float64)
    solved = A @ x
    assert solved.placements == x.placements
    torch.testing.assert_close(
        solved.full_tensor(), torch.linalg.solve(ggn, v), rtol=1e-8, atol=1e-8
    )
    partial = DTensor.from_local(v, mesh_of(size), [Partial()], run_check=False)
    with pytest.raises(ValueError, match=r"Vectors have to be placed.*redistribute"):
        H @ partial
    with pytest.raises(ValueError, match="expects shape"):
        H @ distribute_tensor(v[:-1], mesh_of(size), [Shard(0)])


def check_conjugate_gradients_on_sharded_vectors(rank, size):
    m, whole = sharded(mesh_of(size)), model()
    own = share(data(), rank, size)
    G = GGNLinearOperator(m, loss(), m.parameters(), own, **world())
    start = torch.ones(G.shape[1], dtype=torch.float64)
    b = distribute_tensor(start, mesh_of(size), [Shard(0)])

    def dot(x, y):
        return torch.dot(x, y).full_tensor()

    x, r, p = torch.zeros_like(b), b, b
    for _ in range(27):
        Ap = G @ p + 0.1 * p
        alpha = dot(r, r) / dot(p, Ap)
        x, old = x + alpha * p, r
        r = r - alpha * Ap
        p = r + dot(r, r) / dot(old, old) * p
    ggn = dense_ggn(whole, loss(), whole.parameters(), data())
    damped = ggn + 0.1 * torch.eye(len(ggn), dtype=torch.float64)
    assert x.to_local().numel() < len(start)
    torch.testing.assert_close(
        x.full_tensor(), torch.linalg.solve(damped, start), rtol=1e-8, atol=1e-8
    )


def check_driven(rank, size):
    m, whole = sharded(mesh_of(size)), model()
    H = HessianLinearOperator(
        m, loss(), m.parameters(), share(data(), rank, size), **world()
    )
    for _ in range(2):
        products = None
        with driver(H) as A:
            if A is not None:
                products = A.to_dense()
        if rank == 0:
            close(products, dense_hessian(whole, loss(), whole.parameters(), data()))
        with torch.no_grad():  # between two drivers, on every rank
            for net in (m, whole):
                net[0].weight.mul_(1.5)


def check_data_parallel(rank, size):
    whole = model()
    m = nn.parallel.DistributedDataParallel(model())
    own = share(data(), rank, size)
    for kind, dense in (
        (HessianLinearOperator, dense_hessian),
        (GGNLinearOperator, dense_ggn),
    ):
        A = kind(m, loss(), m.parameters(), own, **world())
        compare(A, dense(whole, loss(), whole.parameters(), data()))
    K = KFACLinearOperator(m, loss(), m.parameters(), own, **world())
    one = KFACLinearOperator(whole, loss(), whole.parameters(), data())
    close(K.to_dense(), one.to_dense())
    X, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    loss()(m(X), y).backward()
    optimizer.step()
    compare(A, dense_ggn(m.module, loss(), m.module.parameters(), data()))


def check_errors(rank, size):
    mesh = mesh_of(size)
    own = share(data(), rank, size)

    def refused(kind, match, net, **options):
        with pytest.raises(kind, match=match):
            HessianLinearOperator(net, loss(), net.parameters(), own, **options)

    refused(ValueError, r"without process_group.*Pass process_group", sharded(mesh))
    alone = [dist.new_group([r]) for r in range(size)][rank]
    refused(
        ValueError,
        r"a process_group that lacks",
        sharded(mesh),
        process_group=alone,
    )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    refused(
        ValueError,
        r"MixedPrecisionPolicy.*without mp_policy",
        sharded(mesh, mp_policy=policy),
        **world(),
    )
    outermost = fully_shard(model(), mesh=mesh, mp_policy=policy)  # of all its layers
    refused(ValueError, "MixedPrecisionPolicy", outermost, **world())
    parallel = parallelize_module(model(), mesh, {"0": ColwiseParallel()})
    refused(TypeError, r"parallelize_module.*before", parallel, **world())
    first = FullyShardedDataParallel(model(), device_id=torch.device("cpu"))
    refused(TypeError, r"FullyShardedDataParallel.*fully_shard", first, **world())


if __name__ == "__main__":
    checks = vars(sys.modules[__name__]).items()
    wanted = sys.argv[2:]
    checking.run(
        {
            name: check
            for name, check in checks
            if name[:6] == "check_" and (not wanted or name[6:] in wanted)
        }
    )
