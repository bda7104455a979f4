"""The shape of the package: layers, imports, names."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
import torchlinop

ROOT = Path(torchlinop.__file__).parent

#: lower layers first; a module imports from lower layers, or from its own
LAYERS = [
    ["_typing"],
    [
        "_convergence",
        "_dtypes",
        "_cupy",
        "_watch",
        "_observers",
        "_progress",
        "_interchange",
        "_space",
        "_spread",
        "autodiff",
        "data",
    ],
    ["_door", "_algebra", "_foreign", "_operator", "distributed", "sources"],
    ["structured", "_joining", "_kept"],
    ["curvature", "estimate", "solve"],
    ["kronecker"],
    [
        "_blas",
        "reference",
        "verify",
        "_pairs",
        "_runlog",
        "_monitor",
        "_cost",
        "_summary",
        "plot",
    ],
    ["__init__"],
    ["compat", "examples"],
    ["__main__"],
]
#: pairs in one layer that may not import one another either
STRANGERS = [
    ("autodiff", "data"),
    ("autodiff", "_space"),
    ("_operator", "sources"),
    ("structured", "_kept"),
    ("curvature", "solve"),
    ("estimate", "curvature"),
    ("estimate", "solve"),
    ("solve", "kronecker"),
]


def _modules():
    paths = sorted(ROOT.rglob("*.py"))
    return [(path, path.relative_to(ROOT).with_suffix("").parts) for path in paths]


def _layer(name):
    for level, names in enumerate(LAYERS):
        if name in names:
            return level
    raise AssertionError(f"{name} has no place in LAYERS")


def _own_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == (
            "torchlinop"
        ):
            rest = node.module.split(".")[1:]
            yield from (
                [rest[0]]
                if rest
                else [
                    a.name if (ROOT / f"{a.name}.py").exists() else "__init__"
                    for a in node.names
                ]
            )
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torchlinop":
                    yield (alias.name.split(".") + ["__init__"])[1]


@pytest.mark.parametrize(("path", "parts"), _modules(), ids=lambda p: str(p)[-40:])
def test_imports_go_down(path, parts):
    tree = ast.parse(path.read_text())
    for name in _own_imports(tree):
        assert _layer(name) <= _layer(parts[0]), f"{path} imports {name}"
        assert (parts[0], name) not in STRANGERS
        assert (name, parts[0]) not in STRANGERS


def test_no_import_cycles():
    graph = {}
    for path, parts in _modules():
        own = ".".join(("torchlinop", *parts)).removesuffix(".__init__")
        graph[own] = imported = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{a.name}" for a in node.names} | {node.module}
    # the package itself is what everybody imports first
    own_modules = graph.keys() - {"torchlinop"}
    graphlib.TopologicalSorter(
        {name: graph[name] & own_modules for name in own_modules}
    ).prepare()


@pytest.mark.parametrize(("path", "parts"), _modules(), ids=lambda p: str(p)[-40:])
def test_no_delayed_imports_of_our_own(path, parts):
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in top:
            assert "torchlinop" not in ast.unparse(node)


def test_import_needs_no_optional_package():
    code = (
        "import sys, torchlinop, torchlinop.compat.curvlinops, torchlinop.reference\n"
        "found = {m.split('.')[0] for m in sys.modules}\n"
        "found |= {m for m in sys.modules if m == 'torch._dynamo'}  # a second of imports\n"
        "print(sorted(found & {'cupy', 'matplotlib', 'safetensors', 'sklearn',"
        " 'statsmodels', 'pandas', 'sympy', 'torch._dynamo'}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_products_import_nothing():
    """SymPy, torch's compiler and profiler take a second, and nothing here needs them."""
    code = """
import sys, torch, torchlinop
from torch import nn

before = set(sys.modules)
image = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GELU(), nn.Flatten(), nn.Linear(8, 4)
text = nn.Embedding(4, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(8, 4)
for layers, X in ((image, torch.rand(3, 1, 4, 4)), (text, torch.randint(4, (3, 2)))):
    model = nn.Sequential(*layers).eval()
    params, y = list(model.parameters()), torch.randint(4, (3,))
    data, loss = [(X, y)], nn.CrossEntropyLoss()
    callable_loss = lambda prediction, target: (prediction**4).mean()
    for A in (
        torchlinop.HessianLinearOperator(model, loss, params, data),
        torchlinop.GGNLinearOperator(model, loss, params, data),
        torchlinop.GGNLinearOperator(model, callable_loss, params, data, reduction="mean"),
        torchlinop.FisherMCLinearOperator(model, loss, params, data),
        torchlinop.JacobianLinearOperator(model, params, data),
        torchlinop.JacobianLinearOperator(model, params, data).T,
    ):
        for _ in range(5):
            A @ torch.ones(A.shape[1])
        A @ torch.ones(A.shape[1], 8)
print(sorted({".".join(m.split(".")[:2]) for m in set(sys.modules) - before}))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_all_is_sorted_and_real():
    names = torchlinop.__all__
    assert names == sorted(names)
    for name in names:
        assert getattr(torchlinop, name).__doc__


def test_files_are_one_subject_long():
    """A file beyond 350 lines wants splitting."""
    for path, _ in _modules():
        assert len(path.read_text().splitlines()) <= 350, path
