"""What checkpoints tell: one file per analysis, each from arrays, weights or models to tidy tables.

Array in, array out: `gaussian_process`, `smoothing`, `geometry`, `stages`, `covariance`, `essential_dynamics`. A model
in, rows of a table out: `hessian`, `structure`, `attention`, `task_prior`, `ood`. Several models in: `transient_ridge`.
`run.analyse` applies the second kind to every checkpoint of a run and keeps the tables.

This package imports pandas and scipy; `import icl` does not import this package.
"""
