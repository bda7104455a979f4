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
        "_memory",
        "_cupy",
        "_watch",
        "_observers",
        "_progress",
        "_files",
        "_interchange",
        "_space",
        "_spread",
        "autodiff",
        "data",
    ],
    ["_door", "_algebra", "_foreign", "_operator", "distributed", "sources"],
    ["structured", "_joining", "_hosting", "_kept", "_checkpoint"],
    ["curvature", "estimate", "solve"],
    ["kronecker"],
    ["gradients"],
    ["posterior", "_influence"],
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
    """All files; of the package itself the stub, which has its imports."""
    paths = sorted({*ROOT.rglob("*.py"), ROOT / "__init__.pyi"} - {ROOT / "__init__.py"})
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


def _printed(code):
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_importing_the_package_alone_is_free():
    """SciPy's solvers take 0.2 s, all of our own files half of that: when they are used."""
    code = """
import sys, torch

before = set(sys.modules)
import torchlinop

print(sorted(set(sys.modules) - before))
assert "eigsh" not in dir(torchlinop)
assert "HessianLinearOperator" in dir(torchlinop)
torchlinop.DiagonalLinearOperator
print("torchlinop.structured" in sys.modules, "torchlinop.curvature" in sys.modules)
"""
    assert _printed(code) == ["['torchlinop']", "True False"]


def test_names_are_imported_by_several_threads_at_once():
    """A package and one of its modules, each of which imports the other."""
    code = """
import sys, threading, torch, torchlinop

sys.setswitchinterval(1e-6)
names, start, failed = torchlinop.__all__, threading.Barrier(8), []

def use(k):
    start.wait()
    try:
        for name in names[k::8] + names:
            getattr(torchlinop, name)
    except BaseException as error:
        failed.append(error)

threads = [threading.Thread(target=use, args=(k,)) for k in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(failed)
"""
    assert _printed(code) == ["[]"]


def test_stub_lists_what_there_is():
    """What type checkers and ``import *`` see is what is imported."""
    stub = ast.parse((ROOT / "__init__.pyi").read_text())
    named = [ast.literal_eval(node.value) for node in stub.body if type(node) is ast.Assign]
    assert named == [torchlinop.__all__]
    with pytest.raises(AttributeError, match="'torchlinop' has no attribute 'Hessian'"):
        torchlinop.Hessian


def test_import_needs_no_optional_package():
    code = (
        "import sys, torchlinop.compat.curvlinops, torchlinop.reference\n"
        "from torchlinop import *\n"
        "found = {m.split('.')[0] for m in sys.modules}\n"
        "found |= {m for m in sys.modules if m == 'torch._dynamo'}  # a second of imports\n"
        "print(sorted(found & {'cupy', 'matplotlib', 'safetensors', 'sklearn',"
        " 'statsmodels', 'pandas', 'sympy', 'torch._dynamo'}))"
    )
    assert _printed(code) == ["[]"]


def test_products_import_nothing():
    """SymPy, torch's compiler and profiler take a second, and nothing here needs them."""
    code = """
import sys, torch, torchlinop
from torch import nn
from torchlinop import *

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
    assert _printed(code) == ["[]"]


def test_all_is_sorted_and_real():
    names = torchlinop.__all__
    assert names == sorted(names)
    for name in names:
        assert getattr(torchlinop, name).__doc__


def test_files_are_one_subject_long():
    """A file beyond 350 lines wants splitting."""
    for path, _ in _modules():
        assert len(path.read_text().splitlines()) <= 350, path
