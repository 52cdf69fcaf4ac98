"""Analyses of checkpoints, one file each, from arrays, weights or models to tidy tables.

- From arrays to arrays: `gaussian_process`, `smoothing`, `geometry`, `stages`, `covariance`, `essential_dynamics`.
- From a model to rows of a table: `hessian`, `structure`, `attention`, `task_prior`, `ood`. `run.analyse` applies these to
  every checkpoint of a run and keeps the tables.
- From several models to tables: `transient_ridge`.

This package imports pandas and scipy. `import icl` does not import this package.
"""
