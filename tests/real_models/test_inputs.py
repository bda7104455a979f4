"""What tokenizers and models of transformers return, and the errors about it."""

from __future__ import annotations

import pytest
import torch
from torchlinop import GGNLinearOperator, HessianLinearOperator, JacobianLinearOperator

from tests.real_models.reference import (
    PlainTorch,
    Returning,
    agree,
    check,
    distance,
    fresh,
    vectors,
)
from tests.real_models.test_transformers import gpt2

transformers = pytest.importorskip("transformers", reason="tox -e models installs it")


def with_encodings(dtype):
    """What a tokenizer returns."""
    case = gpt2(dtype)
    case.data = [(transformers.BatchEncoding(X), y) for X, y in case.data]
    return case


def with_a_loader(dtype):
    """Samples, put together as transformers does it."""
    case = gpt2(dtype)
    samples = [
        ({name: value[i] for name, value in X.items()}, y[i])
        for X, y in case.data
        for i in range(len(y))
    ]

    def collate(chosen):
        inputs, targets = zip(*chosen, strict=True)
        features = transformers.default_data_collator(list(inputs))
        return transformers.BatchEncoding(features), torch.stack(targets)

    case.data = torch.utils.data.DataLoader(samples, batch_size=2, collate_fn=collate)
    return case


@pytest.mark.parametrize("matrix", ["Hessian", "GGN", "Jacobian"])
@pytest.mark.parametrize("build", [with_encodings, with_a_loader])
def test_encodings(build, matrix):
    check(matrix, build)


def test_a_changed_encoding_is_noticed():
    """An entry that is written to, and one that is replaced."""
    case = fresh(with_encodings, torch.float64)
    H = HessianLinearOperator(*case.arguments)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    products = [H @ v]
    encoding = case.data[0][0]
    encoding["input_ids"][0, 0] += 1
    products.append(H @ v)
    encoding["input_ids"] = encoding["input_ids"].flip(0)
    products.append(H @ v)
    assert distance(products[1], products[0]) > 1e-4
    assert distance(products[2], products[1]) > 1e-4
    assert distance(products[2], HessianLinearOperator(*case.arguments) @ v) < 1e-12


def operators(model, case):
    return [
        lambda: HessianLinearOperator(model, case.loss, model.parameters(), case.data),
        lambda: GGNLinearOperator(model, case.loss, model.parameters(), case.data),
        lambda: JacobianLinearOperator(model, model.parameters(), case.data),
    ]


def test_a_model_that_returns_an_output_object():
    """The error names what is in it."""
    case = fresh(gpt2, torch.float64)
    model = Returning(case.model.model, lambda output: output)
    for build in operators(model, case):
        with pytest.raises(TypeError, match=r"CausalLMOutput.*output\.logits"):
            build()


@pytest.mark.parametrize("encode", [dict, transformers.BatchEncoding])
def test_a_dict_for_a_model_that_takes_keywords(encode):
    """The model fails somewhere inside; the error shows the wrapper to write."""
    case = fresh(gpt2, torch.float64)
    case.data = [(encode(X), y) for X, y in case.data]
    for build in operators(case.model.model, case):
        with pytest.raises((TypeError, ValueError, AttributeError), match=r"\*\*X"):
            build()


def test_a_loss_inside_of_the_model():
    """``labels`` make the model return a loss: a function of the parameters will do."""
    case = fresh(gpt2, torch.float64)
    network = case.model.model
    named = dict(network.named_parameters())
    X, _ = case.data[0]

    def f(params):
        inputs = {**X, "labels": X["input_ids"]}
        return torch.func.functional_call(network, params, kwargs=inputs).loss

    H = HessianLinearOperator.from_function(f, named)
    targets = X["input_ids"].roll(-1, 1)
    targets[:, -1] = -100
    case.data, case.float32_inside = [(X, targets)], True  # it computes its loss in float32
    exact = PlainTorch(case)
    columns = vectors(H.shape[0], torch.float64)
    agree(H, [exact.hessian(v) for v in columns.T], [case.tolerance] * 3)
