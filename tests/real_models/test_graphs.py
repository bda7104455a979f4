"""Graph networks of torch_geometric, with ``Data`` and ``Batch`` objects as ``X``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchlinop import HessianLinearOperator

from tests.real_models.reference import Case, check, distance, each, fresh, prepared

geometric = pytest.importorskip("torch_geometric", reason="tox -e models installs it")


def graph(dtype, nodes):
    """A ring with chords; both directions of each edge, as torch_geometric wants it."""
    start = torch.arange(nodes)
    pairs = torch.stack([torch.cat([start, start]), torch.cat([start + 1, start + 2])])
    edges = torch.cat([pairs, pairs.flip(0)], dim=1) % nodes
    return geometric.data.Data(
        x=torch.randn(nodes, 4).to(dtype),
        edge_index=edges,
        edge_attr=torch.randn(edges.shape[1], 2).to(dtype),
        z=torch.randint(1, 9, (nodes,)),
        pos=torch.randn(nodes, 3).to(dtype),
    )


class OnNodes(nn.Module):
    """A network of ``(x, edge_index)``, applied to a graph."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, data):
        return self.network(data.x, data.edge_index)


class OnGraphs(OnNodes):
    """One prediction per graph of a batch."""

    def forward(self, data):
        pooled = geometric.nn.global_add_pool(super().forward(data), data.batch)
        return pooled / (1 + pooled.abs())


def node_classifier(network, dtype):
    data = [(graph(dtype, n), torch.randint(3, (n,))) for n in (7, 5)]
    return Case(prepared(OnNodes(network), dtype), nn.CrossEntropyLoss(), data)


def graph_batches(dtype):
    return [
        geometric.data.Batch.from_data_list([graph(dtype, n) for n in sizes])
        for sizes in ((5, 7, 6), (6, 5))
    ]


def graph_classifier(network, dtype):
    data = [(X, torch.randint(3, (X.num_graphs,))) for X in graph_batches(dtype)]
    return Case(prepared(OnGraphs(network), dtype), nn.CrossEntropyLoss(), data)


def gcn(dtype):
    return node_classifier(geometric.nn.GCN(4, 8, 2, 3), dtype)


def gat(dtype):
    return node_classifier(geometric.nn.GAT(4, 8, 2, 3, heads=2), dtype)


def gat_v2(dtype):
    return node_classifier(geometric.nn.GAT(4, 8, 2, 3, heads=2, v2=True), dtype)


def graph_sage(dtype):
    return node_classifier(geometric.nn.GraphSAGE(4, 8, 2, 3, aggr="max"), dtype)


def gin(dtype):
    return graph_classifier(geometric.nn.GIN(4, 8, 2, 3, norm="batch_norm"), dtype)


def principal_neighbourhood(dtype):
    """Means, maxima and standard deviations of neighbours."""
    network = geometric.nn.PNA(
        4,
        8,
        2,
        3,
        aggregators=["mean", "max", "std"],
        scalers=["identity", "amplification"],
        deg=torch.tensor([0, 0, 0, 0, 20]),
        act="silu",
    )
    return graph_classifier(network, dtype)


def all_pairs(pos, batch):
    """Edges of SchNet, for which its own search needs a compiled extension."""
    same = batch[:, None] == batch[None]
    edges = (same & ~torch.eye(len(batch), dtype=torch.bool)).nonzero().T
    return edges, (pos[edges[0]] - pos[edges[1]]).norm(dim=-1)


class Energy(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = geometric.nn.SchNet(
            hidden_channels=8,
            num_filters=8,
            num_interactions=2,
            num_gaussians=6,
            cutoff=4.0,
            interaction_graph=all_pairs,
        )

    def forward(self, data):
        return self.network(data.z, data.pos, data.batch)


class Forces(Energy):
    """Minus the gradient of the energy: a Hessian takes third derivatives."""

    def forward(self, data):
        pos = data.pos.detach().requires_grad_()
        energy = self.network(data.z, pos, data.batch).sum()
        return -torch.autograd.grad(energy, pos, create_graph=True)[0]


def schnet(dtype):
    data = [(X, torch.randn(X.num_graphs, 1).to(dtype)) for X in graph_batches(dtype)]
    return Case(prepared(Energy(), dtype), nn.MSELoss(), data)


def schnet_forces(dtype):
    data = [(X, torch.randn(X.num_nodes, 3).to(dtype)) for X in graph_batches(dtype)]
    return Case(prepared(Forces(), dtype), nn.MSELoss(), data)


CASES = [
    gcn,
    gat,
    gat_v2,
    graph_sage,
    gin,
    principal_neighbourhood,
    schnet,
    schnet_forces,
]


@each(CASES)
def test_hessian(build):
    check("Hessian", build)


@each(CASES)
def test_ggn(build):
    check("GGN", build)


@each([gat, gin])
def test_jacobian(build):
    check("Jacobian", build)


@each([gcn, gin])
def test_float32(build):
    check("Hessian", build, torch.float32)
    check("GGN", build, torch.float32)


def test_a_changed_graph_is_noticed():
    """Features that are written to, or replaced, between two products."""
    case = fresh(gcn, torch.float64)
    H = HessianLinearOperator(*case.arguments)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    first = H @ v
    case.data[0][0].x.mul_(2)
    second = H @ v
    assert distance(second, HessianLinearOperator(*case.arguments) @ v) < 1e-12
    assert distance(second, first) > 1e-3
    case.data[0][0].x = case.data[0][0].x / 4
    third = H @ v
    assert distance(third, HessianLinearOperator(*case.arguments) @ v) < 1e-12
    assert distance(third, second) > 1e-3


def test_a_loader_of_torch_geometric():
    """Its batches are graphs, not pairs; the error tells how to make them pairs."""
    case = fresh(gcn, torch.float64)
    graphs = [graph(torch.float64, 5) for _ in range(4)]
    loader = geometric.loader.DataLoader(graphs, batch_size=2)
    with pytest.raises(TypeError, match=r"pair \(X, y\), item 0 is a \w*Batch"):
        HessianLinearOperator(*replace(case, data=loader).arguments)
