"""The predictor against cases that can be checked by hand."""

import pytest

from benchmark import predict


def test_fit_finds_floor_and_work():
    curve = predict.fit({1: 3.0, 2: 2.0, 4: 1.5})
    assert (curve.fixed, curve.work) == pytest.approx((1.0, 2.0))
    assert predict.fit({4: 0.5})(1) == pytest.approx(2.0)  # one point: no floor
    assert predict.fit({1: 1.0, 2: 0.4}).fixed == 0  # better than linear: no negative floor
    assert predict.fit({1: 1.0, 2: 1.2}).work == 0  # worse on more devices: no negative work
    for wrong in ({}, {0: 1.0}, {1: 0.0}, {1: float("nan")}):
        with pytest.raises(ValueError):
            predict.fit(wrong)


def test_without_floors_asynchrony_gains_nothing_over_colocate():
    generation, learning = predict.fit({1: 1.0}), predict.fit({1: 3.0})
    p = predict.predict(generation, learning, 0.0, 8)
    assert p["generators"] == 2 and p["asynchronous"] == pytest.approx(p["colocate"]) == pytest.approx(0.5)
    assert p["split"] == pytest.approx(1.0)


def test_a_floor_of_decoding_makes_asynchrony_pay():
    p = predict.predict(predict.Curve(1.0, 0.0), predict.fit({1: 7.0}), 0.0, 8)
    assert p == {"generators": 1, "asynchronous": 1.0, "split": 2.0, "colocate": pytest.approx(1.875)}


def test_two_cores_as_measured():
    """Seconds of math-tiny with Online DPO, one seed, as all_algorithms.csv had them at commit b467c07."""
    p = predict.predict(predict.fit({1: 1.04, 2: 0.76}), predict.fit({1: 1.01, 2: 0.51}), 0.0, 2)
    assert (p["asynchronous"], p["split"], p["colocate"]) == pytest.approx((1.05, 1.96, 1.28), rel=0.05)


def test_paper_and_table_are_printed():
    assert len(predict.paper()) == 9
    assert len(predict.table(predict.fit({1: 1.0}), predict.fit({1: 1.0}), 0.0, 1024)) == 11
