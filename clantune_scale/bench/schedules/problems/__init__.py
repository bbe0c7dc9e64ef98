"""The benchmark's own problems: a noisy quadratic, regression, digits and bytes."""
