"""Figures and pages of results; never imports a model."""
