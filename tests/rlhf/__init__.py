"""Preference training: rows, losses, references, whole runs."""
