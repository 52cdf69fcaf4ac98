"""Figures: one function for each, from tables to a matplotlib Figure. Importing draws nothing and changes no global state."""
