"""Figures: one function each, tables in, a matplotlib Figure out. Importing draws nothing and touches no global
state."""
