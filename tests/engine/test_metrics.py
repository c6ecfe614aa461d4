"""Histograms."""

from __future__ import annotations

import math

import numpy as np

from engine.metrics import Histogram


def test_counts_values_up_to_each_bound() -> None:
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in (0.5, 1.0, 1.5, 5.0, 6.0):
        histogram.observe(value)
    assert histogram.counts.tolist() == [2, 1, 1, 1]
    assert histogram.count == 5 and histogram.sum == 14.0 and histogram.mean == 2.8


def test_many_values_count_like_each() -> None:
    values = np.random.default_rng(1).exponential(0.05, 500)
    one, many = Histogram(), Histogram()
    for value in values.tolist():
        one.observe(value)
    many.observe_many(values)
    many.observe_many(values[:0])
    assert one.counts.tolist() == many.counts.tolist() and math.isclose(one.sum, many.sum)


def test_quantiles_are_bounds() -> None:
    histogram = Histogram((1.0, 2.0, 5.0))
    assert math.isnan(histogram.quantile(0.5)) and math.isnan(histogram.mean)
    histogram.observe_many(np.array([0.5, 1.5, 1.6, 9.0]))
    assert histogram.quantile(0.25) == 1.0 and histogram.quantile(0.5) == 2.0
    assert histogram.quantile(1.0) == math.inf
