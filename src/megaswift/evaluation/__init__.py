"""Benchmarks: their questions, who scores the answers, and the comparison of models on the same questions."""
