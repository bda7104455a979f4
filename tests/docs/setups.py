"""What pages take for granted that do not begin with a model of their own."""

from __future__ import annotations

from pathlib import Path

PROBLEM = (Path(__file__).parents[2] / "docs" / "guide" / "problem.py").read_text()

#: by the name of the page; the others start with nothing
SETUPS = {
    "index.md": PROBLEM,
    "migration.md": PROBLEM
    + """
from torchlinop import gradient_and_loss as _gradient
arguments = model, loss_function, list(model.parameters()), data
gradient = H.space.to_vector(_gradient(*arguments)[0]).detach()
""",
    "large_data.md": PROBLEM
    + """
import torchlinop
from scipy.sparse.linalg import cg as _cg, eigsh
from torch.utils.data import DataLoader, TensorDataset
from torchlinop import estimate
dataset = TensorDataset(X, y)
G = G + 0.1 * torchlinop.IdentityLinearOperator([(610,)], "cpu", torch.float64)
b = np.ones(610)
cg = lambda A, b, x0: _cg(A, b, x0=x0, atol=0.0)
""",
    "distributed.md": PROBLEM
    + """
import os
from scipy.sparse.linalg import eigsh
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
loss, batches, v = loss_function, data, np.ones(610)
""",
}
