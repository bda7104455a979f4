"""What is public is documented, and what is documented exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torchlinop

ROOT = Path(__file__).parent.parent


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "operators.rst").read_text()
    documented = set(re.findall(r"auto(?:class|function|exception):: (\w+)", reference))
    assert documented == set(torchlinop.__all__)


def test_every_operator_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    operators = {n for n in torchlinop.__all__ if n.endswith("LinearOperator")}
    missing = {n for n in operators - {"TorchLinearOperator"} if f"`{n}`" not in readme}
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
    )
    for block in blocks:
        scope: dict = {}
        exec(setup + block, scope)
        if "eigenvalues" in scope:
            assert scope["eigenvalues"].shape == (10,)
        else:
            assert scope["info"] == 0
