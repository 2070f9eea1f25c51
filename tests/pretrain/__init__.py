"""Tests of continued pre-training."""
