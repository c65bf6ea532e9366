"""Figures and pages of a study; needs neither torch nor Lightning."""
