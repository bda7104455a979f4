"""Checkpoints that are refused, disks that are full, and what is in a file."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torchlinop
from torchlinop import (
    CGInverseLinearOperator,
    Checkpoint,
    DiagonalLinearOperator,
    GGNLinearOperator,
    StoredFileError,
    aslinearoperator,
    estimate,
)

from tests.surviving.runs import EIGENVALUES, RUNS, Counted, dense, right_hand_sides

pytest.importorskip("safetensors", reason="safetensors is not installed")


def eigsh(A, path, **options):
    return estimate.eigsh(A, **{"k": 5, "tol": 1e-8, **options}, checkpoint=path)


@pytest.fixture
def path(tmp_path):
    """The checkpoint of ``eigsh`` on the matrix."""
    eigsh(Counted(), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("A", "options", "match"),
    [
        (Counted(shift=1e-8), {}, "another run: A is another: it differs by"),
        (Counted() * 2.0, {}, "A is another: it differs by 1.0e"),
        (aslinearoperator(np.eye(7)), {}, r"shape is \[7, 7\], in the file \[120, 120\]"),
        (
            aslinearoperator(dense().astype(np.float32)),
            {},
            "dtype is 'float32', in the file 'float64'",
        ),
        (Counted(), {"k": 6}, "k is 6, in the file 5"),
        (Counted(), {"which": "SA"}, "which is 'SA', in the file 'LA'"),
        (Counted(), {"tol": 1e-4, "seed": 1}, "tol is 0.0001, in .* 1e-08; seed is 1, in"),
        (Counted(), {"v0": np.ones(120)}, "v0 has another shape, or is not in the file"),
    ],
)
def test_another_matrix_or_call_is_refused(path, A, options, match):
    before = path.read_bytes()
    with pytest.raises(StoredFileError, match=f"{match}.*Delete it to begin anew"):
        eigsh(A, path, **options)
    assert path.read_bytes() == before


def test_the_same_to_rounding_is_not_refused(path):
    A = aslinearoperator(dense() * (1 + 1e-14))
    np.testing.assert_allclose(eigsh(A, path).eigenvalues, EIGENVALUES[-5:], rtol=1e-6)


def test_a_skew_symmetric_part_is_another_matrix(tmp_path):
    """Also where it is within a part of the vector of which there is one number."""
    path, matrix = tmp_path / "run", np.diag(np.arange(1.0, 641.0))
    with torchlinop.monitor(A := aslinearoperator(matrix), checkpoint=path):
        A @ np.ones(640)
    matrix[0, 1], matrix[1, 0] = 5, -5
    monitored = torchlinop.monitor(aslinearoperator(matrix), checkpoint=path)
    with pytest.raises(StoredFileError, match="A is another: it differs by"), monitored:
        pass


def test_another_kind_of_run_is_refused(path):
    match = "run is 'spectral_density', in the file 'eigsh'. Delete"
    with pytest.raises(StoredFileError, match=match):
        estimate.spectral_density(Counted(), checkpoint=path)


def test_another_system_is_refused(tmp_path):
    path, B = tmp_path / "run", right_hand_sides(3)
    M = DiagonalLinearOperator(torch.full((120,), 0.5, dtype=torch.float64))
    CGInverseLinearOperator(Counted(), M=M, checkpoint=path) @ B
    for options, other, match in (
        ({"damping": 1.0}, B, "damping is 1.0, in the file 0.0"),
        ({"rtol": 1e-3}, B, "rtol is 0.001, in the file 1e-05"),
        ({"M": 2 * M}, B, "M is another: it differs by 1.0e"),
        ({"M": None}, B, "M is in the file only"),
        ({"x0": B}, B, "x0 has another shape, or is not in the file"),
        ({}, B[:, :2], "the right-hand side has another shape"),
        ({}, B[:, ::-1], "the right-hand side is another: it differs by"),
    ):
        inverse = CGInverseLinearOperator(Counted(), **{"M": M, **options}, checkpoint=path)
        with pytest.raises(StoredFileError, match=match):
            inverse @ other


def test_truncated_and_foreign_files(path):
    import safetensors.torch

    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StoredFileError, match=r"is truncated .* Delete it to begin"):
            eigsh(Counted(), path)
    path.write_bytes(whole.replace(b"checkpoint-1", b"checkpoint-9"))
    with pytest.raises(StoredFileError, match="has the format 'torchlinop-checkpoint-9'"):
        eigsh(Counted(), path)
    safetensors.torch.save_file({"x": torch.ones(2)}, path)
    with pytest.raises(StoredFileError, match="safetensors file of something else"):
        eigsh(Counted(), path)
    path.write_bytes(whole.replace(b'\\"facts\\"', b'\\"fakts\\"'))
    with pytest.raises(StoredFileError, match="does not hold what its description says"):
        eigsh(Counted(), path)


def test_a_folder_that_is_not_there_is_noticed_at_once(tmp_path):
    A = Counted()
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere to write a checkpoi"):
        eigsh(A, tmp_path / "nowhere" / "run")
    with pytest.raises(IsADirectoryError, match=r"is a folder\. Pass the path of a file"):
        eigsh(A, tmp_path)
    assert A.count == 0


def test_a_missing_library_is_noticed_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    A = Counted()
    with pytest.raises(ImportError, match="pip install safetensors"):
        eigsh(A, tmp_path / "run")
    assert A.count == 0


@pytest.fixture
def full_disk():
    """A function that lets no file grow any more, or lets all grow again."""
    resource = pytest.importorskip("resource", reason="limits of files are POSIX's")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(full):
        limit = 100 if full else before[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    yield fill
    fill(False)


@pytest.mark.parametrize("name", ["eigsh", "density", "block cg", "scipy cg"])
def test_a_full_disk_does_not_end_a_run(tmp_path, name, full_disk):
    path = tmp_path / "run"
    A = Counted(12, lambda: full_disk(True))

    def warned(*args, **kwargs):
        messages.append(str(args[0]))
        assert path.read_bytes()  # what was written before
        full_disk(False)

    messages: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchlinop._checkpoint.warnings.warn", warned)
        answer = RUNS[name](A, Checkpoint(path, seconds=0))
    assert len(messages) == 1  # there was room again
    assert "could not be written" in messages[0]
    assert "what was written before is still there" in messages[0]
    np.testing.assert_allclose(answer, RUNS[name](Counted(), None), rtol=1e-6, atol=1e-8)
    again = RUNS[name](Counted(), Checkpoint(path))
    np.testing.assert_allclose(again, answer, rtol=1e-4, atol=1e-2)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_does_not_damage_what_is_there(tmp_path, full_disk):
    path = tmp_path / "run"
    saved = []

    def fill():
        saved.append(path.read_bytes())
        full_disk(True)

    with pytest.warns(RuntimeWarning, match="could not be written"):
        eigsh(Counted(12, fill), Checkpoint(path, seconds=0))
    full_disk(False)
    assert saved == [path.read_bytes()]  # until the end there was no room
    rest, whole = Counted(), Counted()
    eigsh(whole, None)
    np.testing.assert_allclose(eigsh(rest, path).eigenvalues, EIGENVALUES[-5:], rtol=1e-6)
    assert rest.count == whole.count - 10 + 1


def test_complex_and_single_precision(tmp_path):
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((80, 80)) + 1j * rng.standard_normal((80, 80)))[0]
    values = np.arange(1.0, 81.0)
    for dtype in (np.complex128, np.complex64):
        path = tmp_path / np.dtype(dtype).name
        matrix = aslinearoperator(((Q * values) @ Q.conj().T).astype(dtype))
        b = (Q @ np.ones(80)).astype(dtype)
        for products in (15, 100):
            with torchlinop.monitor(matrix, max_products=products) as log:
                pairs = estimate.eigsh(
                    matrix, k=2, ncv=20, checkpoint=Checkpoint(path, seconds=0)
                )
        assert not log.stopped
        np.testing.assert_allclose(pairs.eigenvalues, values[-2:], rtol=1e-5)
        with pytest.raises(StoredFileError, match="v0 has another shape"):
            estimate.eigsh(matrix, k=2, ncv=20, v0=b, checkpoint=path)


def test_ctrl_c_leaves_the_last_checkpoint(tmp_path):
    path = tmp_path / "run"

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(estimate.Interrupted):
        eigsh(Counted(30, interrupt), Checkpoint(path, seconds=0))
    rest, whole = Counted(), Counted()
    eigsh(whole, None)
    eigsh(rest, path)
    assert rest.count == whole.count - 28 + 1


def test_writing_happens_every_so_many_seconds(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("torchlinop._checkpoint.time.monotonic", lambda: clock[0])
    file = Checkpoint(tmp_path / "run", seconds=10)
    run = file.begin("something", {"A": Counted()}, {}, {})
    states = []
    for second in range(35):
        clock[0] = float(second)
        if run.due():
            run.save({"second": second})
            states.append(second)
    assert states == [10, 20, 30]
    assert file.begin("something", {"A": Counted()}, {}, {}).state == {"second": 30}


def test_arguments():
    with pytest.raises(ValueError, match="seconds has to be at least 0, got -1"):
        Checkpoint("run", seconds=-1)
    assert repr(Checkpoint("run")) == "Checkpoint('run', seconds=60)"
    with pytest.raises(ValueError, match="max_vectors must not be 0"):
        torchlinop.monitor(Counted(), max_vectors=0, checkpoint="run")


def test_a_log_begins_with_what_another_has_seen(tmp_path):
    path = tmp_path / "run"
    A = Counted()
    with torchlinop.monitor(A, checkpoint=path) as log:
        assert log.v0() is None
        assert log.x0(np.ones(120)) is None
        estimate.eigsh(A, k=3, tol=1e-8)
        seen = log.num_products
    with torchlinop.monitor(A, checkpoint=path) as log:
        assert log.num_products == seen
        pairs = log.eigenpairs(3, which="LA")
        start = log.v0(3, which="LA")
        A @ np.ones(120)
        assert log.num_products == seen + 1
    np.testing.assert_allclose(pairs.eigenvalues, EIGENVALUES[-3:], rtol=1e-6)
    # the start is in the span of the eigenvectors
    V = np.linalg.eigh(dense())[1][:, -3:]
    assert np.linalg.norm(V.T @ start) > (1 - 1e-6) * np.linalg.norm(start)
    with pytest.raises(StoredFileError, match="b has another shape, or is not in the file"):
        torchlinop.monitor(A, b=np.ones(120), checkpoint=path).__enter__()


def test_rectangular_operators_are_watched(tmp_path):
    matrix = np.random.default_rng(0).standard_normal((60, 40))
    A, b = aslinearoperator(matrix), np.ones(60)
    for _ in range(2):
        with torchlinop.monitor(A, checkpoint=tmp_path / "run") as log:
            start = log.x0(b)
            for v in np.eye(40):
                A @ v
    np.testing.assert_allclose(start, np.linalg.lstsq(matrix, b, rcond=None)[0], rtol=1e-8)


def test_arguments_that_are_numpy_numbers(tmp_path):
    """Which JSON does not know: not to be found out when there is something to lose."""
    path = tmp_path / "run"
    pairs = eigsh(Counted(), path, k=np.int64(5), ncv=np.int64(40), seed=np.int64(1))
    again = Counted()
    found = eigsh(again, path, ncv=40, seed=1)
    assert torch.equal(found.eigenvalues, pairs.eigenvalues)
    assert again.count == 1
    A = Counted()
    with pytest.raises(TypeError, match="doesn't apply to a 'complex'"):
        estimate.spectral_density(A, seed=1j, checkpoint=tmp_path / "other")


def test_groups_of_layers_have_any_names(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    data = [(torch.rand(8, 4), torch.rand(8, 2))]
    G = GGNLinearOperator(model, torch.nn.MSELoss(), model.parameters(), data)
    groups = {0: ["0.weight"], (1, "all"): ["1.weight", "1.bias"]}
    options = {"groups": groups, "num_probes": 2, "checkpoint": tmp_path / "run"}
    before = estimate.layer_densities(G, **options)
    after = estimate.layer_densities(G, **options)
    assert list(before) == list(after) == list(groups)
    for name in groups:
        np.testing.assert_array_equal(before[name].nodes, after[name].nodes)


def test_no_columns(tmp_path):
    inverse = CGInverseLinearOperator(Counted(), checkpoint=tmp_path / "run")
    for _ in range(2):
        assert (inverse @ np.ones((120, 0))).shape == (120, 0)
