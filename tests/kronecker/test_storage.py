"""Operators in files."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torchlinop import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator
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
    if kind is KFOCLinearOperator:
        assert A.num_passes > B.num_passes == 0


def test_devices_that_safetensors_does_not_know(tmp_path):
    path = tmp_path / "factors"
    KFACLinearOperator(*ZOO["mlp"]().arguments).save(path)
    assert KFACLinearOperator.load(path, device="meta").device == torch.device("meta")


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


def _whole(path, kind):
    """Tensors and description of a good file."""
    import safetensors

    kind(*ZOO["mlp"]().arguments).save(path)
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["torchlinop"])


@pytest.mark.parametrize("kind", FAMILY)
def test_tensors_that_do_not_fit_the_description(tmp_path, kind):
    from safetensors.torch import save_file

    path = tmp_path / "factors"
    tensors, tree = _whole(path, kind)
    metadata = {"torchlinop": json.dumps(tree)}
    for name, tensor in tensors.items():
        for other in (torch.zeros(7, 7), torch.zeros(7), torch.zeros(2, 7), tensor[:-1]):
            save_file({**tensors, name: other.contiguous()}, path, metadata=metadata)
            with pytest.raises(StoredFileError, match="does not hold what its descr"):
                kind.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": [12, 4, 15]},
        {"shapes": [[4, 3], [4], [3, 5]]},
        {"names": ["0.weight"]},
        {"dtype": "float32"},
        {"dtype": "float65"},
        {"settings": {}},
        {"blocks": []},
        {"blocks": 3},
        {"groups": [[["0.weight"], [0], 4], [["2.weight"], [2], 3]]},
        {"groups": [[["0.weight", "0.bias"], [0, 2], 4], [["2.weight"], [1], 3]]},
    ],
)
def test_descriptions_that_do_not_fit_the_tensors(tmp_path, change):
    from safetensors.torch import save_file

    path = tmp_path / "factors"
    tensors, tree = _whole(path, KFACLinearOperator)
    assert all(tree[key] != value for key, value in change.items())
    save_file(tensors, path, metadata={"torchlinop": json.dumps({**tree, **change})})
    with pytest.raises(StoredFileError, match="does not hold what its description says"):
        KFACLinearOperator.load(path)


@pytest.mark.parametrize("text", ["no JSON", "[3]", "3"])
def test_descriptions_that_are_none(tmp_path, text):
    from safetensors.torch import save_file

    path = tmp_path / "factors"
    save_file({"x": torch.ones(2)}, path, metadata={"torchlinop": text})
    with pytest.raises(StoredFileError, match="does not hold what its description says"):
        KFACLinearOperator.load(path)


def test_parameters_of_a_list(tmp_path):
    problem = ZOO["mlp"]()
    path = tmp_path / "factors"
    KFACLinearOperator(*problem.arguments).save(path)
    params = list(problem.model.parameters())
    for given in (params, problem.model.parameters()):
        names = KFACLinearOperator.load(path, params=given).space.names
        assert names == ("0.weight", "0.bias", "2.weight")
    with pytest.raises(StoredFileError, match=r"parameters: 2.weight is in the file only"):
        KFACLinearOperator.load(path, params=params[:-1])
    more = [*params, torch.ones(2, dtype=torch.float64)]
    with pytest.raises(StoredFileError, match=r"params\[3\] is missing in the file"):
        KFACLinearOperator.load(path, params=more)
    with pytest.raises(StoredFileError, match=r"0.weight has shape \(3, 4\), in the file"):
        KFACLinearOperator.load(path, params=params[::-1])
    for odd, match in (
        (problem.model.named_parameters(), "params has to hold tensors, got tuple"),
        (params[0], "params has to be a list of tensors"),
    ):
        with pytest.raises(TypeError, match=match):
            KFACLinearOperator.load(path, params=odd)
