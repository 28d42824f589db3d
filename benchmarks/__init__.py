"""Benchmarks of fxquant: run each as ``python -m benchmarks.<name>`` from the checkout; README.md lists them."""
