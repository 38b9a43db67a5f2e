"""Kronecker-factored natural gradient for PyTorch."""
