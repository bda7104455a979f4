"""Operators in files."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchlinop import EKFACLinearOperator, KFACLinearOperator
from torchlinop.kronecker import StoredFileError

from tests.kronecker.test_inverse import FAMILY
from tests.kronecker.zoo import ZOO

pytest.importorskip("safetensors", reason="safetensors is not installed")


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("name", ["convolutions", "tokens"])
def test_what_is_saved_is_loaded(tmp_path, kind, name, monkeypatch):
    problem = ZOO[name]()
    A = kind(*problem.arguments, fisher_type="mc", seed=3)
    expected = A.inverse(damping=0.1).to_dense()
    A.save(tmp_path / "factors")
    params = dict(problem.model.named_parameters())
    B = kind.load(tmp_path / "factors", params=params)
    assert B.settings == A.settings
    assert B.space.names == A.space.names
    assert list(B.blocks) == list(A.blocks)
    close = {"rtol": 1e-12, "atol": 1e-14}  # strides may differ, and so rounding
    torch.testing.assert_close(B.to_dense(), A.to_dense(), **close)
    monkeypatch.delattr(torch.linalg, "eigh")  # decompositions are in the file
    inverse = B.inverse(damping=0.1).to_dense()
    torch.testing.assert_close(inverse, expected, **close)
    assert [p.name for p in tmp_path.iterdir()] == ["factors"]
    B.refresh()  # nothing to look at


def test_files_that_do_not_fit(tmp_path):
    problem = ZOO["mlp"]()
    path = tmp_path / "factors"
    KFACLinearOperator(*problem.arguments).save(path)
    with pytest.raises(StoredFileError, match="holds a KFACLinearOperator; use its load"):
        EKFACLinearOperator.load(path)
    other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    match = (
        r"2.bias is missing in the file; 0.weight has shape \(5, 3\), in the file \(4, 3\)"
    )
    with pytest.raises(StoredFileError, match=match):
        KFACLinearOperator.load(path, params=dict(other.named_parameters()))
    params = dict(reversed(list(problem.model.named_parameters())))
    with pytest.raises(StoredFileError, match=r"the order is \['2.weight', "):
        KFACLinearOperator.load(path, params=params)


def test_truncated_and_foreign_files(tmp_path):
    import safetensors.torch

    path = tmp_path / "factors"
    with pytest.raises(FileNotFoundError):
        KFACLinearOperator.load(path)
    KFACLinearOperator(*ZOO["mlp"]().arguments).save(path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 8):
        path.write_bytes(whole[:size])
        with pytest.raises(StoredFileError, match="is truncated"):
            KFACLinearOperator.load(path)
    path.write_bytes(whole.replace(b"torchlinop-kronecker-1", b"torchlinop-kronecker-9"))
    with pytest.raises(StoredFileError, match="has the format 'torchlinop-kronecker-9'"):
        KFACLinearOperator.load(path)
    safetensors.torch.save_file({"x": torch.ones(2)}, path)
    with pytest.raises(StoredFileError, match="file of something else"):
        KFACLinearOperator.load(path)
