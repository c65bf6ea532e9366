"""Associative memory (arXiv:2603.26554): what one optimizer step stores, simulated and predicted."""
