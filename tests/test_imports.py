"""Importing the library is cheap and touches nothing."""

import os
import subprocess
import sys

CORE = ["icl", "icl.streams", "icl.tasks", "icl.model", "icl.baselines", "icl.evals", "icl.config.training", "icl.engine.paths",
        "icl.sampling", "icl.checkpoints.run", "icl.storage", "icl.training.loop"]  # fmt: skip
HEAVY = ["wandb", "boto3", "matplotlib", "pandas", "seaborn", "torch_xla", "sweeps", "ray"]


def run(code: str, folder) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "AWS", "LOCAL_ROOT"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout


def test_core_modules_import_no_service_and_write_nothing(tmp_path):
    code = f"import sys, {', '.join(CORE)}; print(sorted(set({HEAVY}) & set(sys.modules)))"
    assert run(code, tmp_path).strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_core_modules_add_little_to_the_import_of_torch(tmp_path):
    # CPU time, not wall time: the machine may be busy. Torch's lazily imported parts are loaded first in both.
    code = "import time, torch; start = time.process_time(); import {}; print(time.process_time() - start)"
    assert float(run(code.format(", ".join(CORE)), tmp_path)) < 1.0


def test_help_is_quick_because_it_imports_no_numerics(tmp_path):
    code = (
        "import sys, time; sys.argv = ['icl', '--help']\n"
        "try:\n    from icl.cli import main; main()\n"
        "finally:\n    print(sorted({'torch', 'numpy', 'pandas', 'wandb'} & set(sys.modules)), time.process_time())"
    )
    heavy, seconds = run(code, tmp_path).splitlines()[-1].rsplit(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 1.0  # of CPU, not of the clock: the machine may be busy
