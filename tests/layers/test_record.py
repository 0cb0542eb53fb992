"""A record names what it wants; a name that nothing goes by is a mistake that is said."""

from __future__ import annotations

import pytest
import torch

from lamina.errors import LaminaError
from lamina.layers import EmbeddingSpec, LearnedPositionSpec, Record
from lamina.layers.parameter import parameter


def test_whole_name_that_nothing_goes_by_is_an_error() -> None:
    record = Record("decoder.layers.0.atention.op.weights")
    record.keep("decoder.layers.0.attention.op.weights", lambda: torch.zeros(()))
    with pytest.raises(LaminaError, match=r"did you mean 'decoder\.layers\.0\.attention\.op\.weights'"):
        record.check()
    assert record.values == {}
    Record("*.nothing").check()


def test_layer_built_alone_has_values() -> None:
    torch.manual_seed(0)
    for weight in (
        EmbeddingSpec(vocabulary=300).build(64).weight,
        LearnedPositionSpec(size=300).build(64).weight,
        parameter(300, 64),
    ):
        values = weight.detach()
        assert 0.019 < float(values.std()) < 0.021 and abs(float(values.mean())) < 0.001
    with torch.device("meta"):
        assert parameter(2, 3).is_meta
