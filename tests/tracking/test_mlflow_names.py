"""Names in MLflow, against MLflow's own check."""

from __future__ import annotations

import pytest

from clantune_scale.tracking.mlflow_names import allowed

_REFUSED = [
    "gene/dröp,out(1)", "gene/lr:a//b", "gene//lr", "/lr", "lr/", ".", "..", "../lr", "a/../b", "a/./b", "",
    "lr%", "gene/" + "x" * 300, "gene/" + "x" * 301, "lr:a,b", "lr:a;b", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", ["gene/lr", "gene/lr:head", "consensus/weight_decay", "a b/c-d.e", "gene/größe"])
def test_a_name_that_mlflow_takes_stays(name):
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(name)
    assert allowed(name) == name


def test_a_name_that_mlflow_refuses_becomes_one_that_it_takes_and_no_other_gets():
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_metric, _validate_param

    spelt = [allowed(name) for name in _REFUSED]
    assert len({*spelt, *_REFUSED}) == 2 * len(_REFUSED)
    for name, other in zip(_REFUSED, spelt, strict=True):
        _validate_metric(other, 1.0, 0, 0)
        _validate_param(other, "value")
        assert allowed(name) == other == allowed(other)
        with pytest.raises(MlflowException):
            _validate_metric(name, 1.0, 0, 0)
