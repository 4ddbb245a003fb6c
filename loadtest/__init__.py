"""Measurements; each prints ratios against a reference of the same run."""
