"""What is public is documented, and what is documented exists."""

from __future__ import annotations

import pkgutil
import re
import runpy
from pathlib import Path

import pytest
import scipy
import torch
import torchlinop
from packaging.version import Version

ROOT = Path(__file__).parent.parent
#: sub-packages whose pages list their names
ROOMS = {"distributed", "estimate", "plot", "verify"}
#: what older versions of SciPy lack
SINCE = {"scipy.sparse.linalg.funm_multiply_krylov": "1.16"}


def reference():
    return "\n".join(p.read_text() for p in sorted((ROOT / "docs/reference").glob("*.rst")))


def test_every_public_name_is_in_the_reference():
    documented = re.findall(r"auto(?:class|function|exception):: (\w+)", reference())
    documented += set(re.findall(r"automodule:: torchlinop\.(\w+)", reference())) & ROOMS
    assert sorted(documented) == torchlinop.__all__


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_every_name_of_a_room_is_in_the_reference(room):
    names = re.search(rf"torchlinop\.{room}\n   :members: (.*)", reference())[1]
    assert names.split(", ") == getattr(torchlinop, room).__all__


@pytest.mark.parametrize("package", ["numpy", "scipy", "torch"])
def test_what_the_pages_link_to_exists(package):
    """No build fetches the names of other packages: they are listed in docs/inventories."""
    text = (ROOT / "docs" / "inventories" / f"{package}.txt").read_text()
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    for name, *_ in lines:
        if name in SINCE and Version(scipy.__version__) < Version(SINCE[name]):
            continue
        assert pkgutil.resolve_name(name) is not None, name


def test_every_operator_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    operators = {n for n in torchlinop.__all__ if n.endswith("LinearOperator")}
    bases = {"TorchLinearOperator", "StructuredLinearOperator"}
    missing = {n for n in operators - bases if f"`{n}`" not in readme}
    assert not missing


# SciPy 1.11 announces a new default of atol
@pytest.mark.filterwarnings("ignore:scipy.sparse.linalg.cg called without specifying")
def test_example_of_the_readme_runs():
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    setup = (
        "import torch\nmodel = torch.nn.Linear(12, 2)\nloss_function = "
        "torch.nn.CrossEntropyLoss()\n"
        "data = [(torch.rand(40, 12), torch.randint(2, (40,)))]\n"
        "from torchlinop import GGNLinearOperator, HessianLinearOperator\n"
        "arguments = model, loss_function, list(model.parameters()), data\n"
        "G, H = GGNLinearOperator(*arguments), HessianLinearOperator(*arguments)\n"
        "gradient, per_sample_gradients = torch.ones(26), torch.eye(26)[:, :5]\n"
    )
    for block in blocks:
        scope: dict = {}
        exec(setup + block, scope)
        if "natural_gradient" in scope:
            x = scope["natural_gradient"]
            y = scope["G"] @ x + 1e-2 * x
            torch.testing.assert_close(y, scope["gradient"], rtol=0, atol=1e-3)
            assert scope["values"].shape == (5,)
        elif "posterior" in scope:
            assert scope["probabilities"].shape == (40, 2)
            assert scope["scores"].shape == (40, 40)
        elif "eigenvalues" in scope:
            assert scope["eigenvalues"].shape == (10,)
        else:
            assert scope["info"] == 0


@pytest.mark.parametrize(
    "script", sorted((ROOT / "docs" / "gallery").glob("*.py")), ids=lambda p: p.stem
)
def test_gallery_runs(script, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    pytest.importorskip("sklearn")
    if "from transformers" in script.read_text():
        pytest.importorskip("transformers")  # the environments docs and models have it
    runpy.run_path(str(script))
    import matplotlib.pyplot as plt

    plt.close("all")
    assert capsys.readouterr().out


def test_page_of_the_estimators_is_what_the_benchmark_prints(monkeypatch):
    """All but the rows, which are measured, and the versions in the last line."""
    folder = ROOT / "docs" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    page = (folder / "estimators.md").read_text()
    tables = re.findall(r"\| ---.*\n((?:\|.*\n)+)", page)
    found = dict(
        zip(
            ("traces", "densities", "eigensolvers"),
            [table.splitlines() for table in tables],
            strict=True,
        )
    )
    printed = runpy.run_path(str(folder / "estimators.py"))["page"](found)
    assert page.splitlines()[:-1] == printed.splitlines()[:-1]
