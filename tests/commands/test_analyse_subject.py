"""`icl analyse SWEEP.yaml`: what any subject has, against closed forms on a quadratic loss."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from icl import cli
from icl.subjects.digest import weights_digest

SUBJECTS = Path(__file__).parents[1] / "subjects"
sys.path.insert(0, str(SUBJECTS))
from quadratic import Quadratic  # noqa: E402

sys.path.remove(str(SUBJECTS))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with the user's modules."""
    for name in ("quadratic.py", "my_module.py"):
        shutil.copy(SUBJECTS / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("LOCAL_ROOT", "checkpoints")
    for name in ("AWS_BUCKET_NAME", "WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def icl(folder, monkeypatch, capsys):
    """The command line: words -> (exit status, all that is printed)."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["icl", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


def write_sweep(subject: str = "quadratic:Quadratic", path: str = "mine.yaml", own=(), **settings) -> None:
    sampler = {
        "num_chains": {"value": 2},
        "num_draws": {"value": 5},
        "epsilon": {"value": 1e-3},
        "nbeta": {"value": 9.0},
    }
    parameters = {"subject": {"value": subject}, "sampler_config": {"parameters": sampler}, **dict(own)}
    if settings:
        parameters["subject_config"] = {
            "parameters": {
                name: {"values" if isinstance(value, list) else "value": value} for name, value in settings.items()
            }
        }
    sweep = {"method": "grid", "command": ["${env}", "icl", "llc"], "parameters": parameters}
    Path(path).write_text(yaml.safe_dump(sweep))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [5, 29])
def test_on_a_quadratic_loss_everything_has_its_closed_form(icl, size, shuffle):
    batch = 59 if shuffle else 11  # a shuffled loader leaves its smaller last batch out
    write_sweep(size=size, batch=batch, shuffle=shuffle)
    assert icl("analyse", "mine.yaml")[0] == 0
    known = Quadratic(size)
    hessian = (known.inputs.T @ known.inputs / len(known.inputs)).numpy()
    values = np.linalg.eigvalsh(hessian)[::-1]
    found = pd.read_csv("data/mine/hessian.csv")
    assert found["step"].tolist() == known.steps()
    for place in range(3):
        np.testing.assert_allclose(found[f"hessian/evals/{place}"], values[place], rtol=1e-3)
    if size <= 16:
        np.testing.assert_allclose(found["hessian/trace"], values.sum(), rtol=1e-6)
        assert (found["hessian/trace_std_error"] == 0).all()
    else:
        assert (found["hessian/trace_std_error"] < 0.1 * values.sum()).all()
        assert (abs(found["hessian/trace"] - values.sum()) < 5 * found["hessian/trace_std_error"]).all()
    weights = torch.stack([known.weights(step) for step in known.steps()])
    table = pd.read_csv("data/mine/evals.csv")
    away = known.inputs @ weights.T - known.outputs
    np.testing.assert_allclose(table["loss/mean"], 0.5 * away.square().mean(dim=0), rtol=1e-6)
    np.testing.assert_allclose(table["weight/norm"], weights.norm(dim=1), rtol=1e-6)
    # The weights lie on a line, so the first component is the distance along it, and has all the variance.
    course = pd.read_csv("data/mine/trajectory.csv")
    along = (weights - weights.mean(dim=0)).norm(dim=1) * torch.sign(torch.tensor(known.steps()) - 7.25)
    np.testing.assert_allclose(course["pc/0"], along, rtol=1e-5)
    np.testing.assert_allclose(course["explained_variance_ratio/0"], 1, rtol=1e-6)
    assert set(course["variant"]) == {"weights"}


def test_the_loss_is_that_of_the_first_samples(icl):
    write_sweep(size=5, batch=11)
    assert icl("analyse", "mine.yaml", "--samples", "20", "--only", "evals", "--steps", "7")[0] == 0
    known = Quadratic()
    away = known.inputs[:22] @ known.weights(7) - known.outputs[:22, 0]  # two batches of 11
    assert pd.read_csv("data/mine/evals.csv")["loss/mean"].tolist() == pytest.approx(
        [0.5 * float(away.square().mean())]
    )


def test_what_is_measured_is_not_measured_again_and_subjects_share_tables(icl, monkeypatch):
    write_sweep(size=[5, 29], batch=59)
    assert icl("analyse", "mine.yaml", "--set", "subject_config.size=5", "--steps", "0,7")[0] == 0
    first = pd.read_csv("data/mine/hessian.csv")
    assert list(first.columns[:3]) == ["subject_config.batch", "subject_config.size", "step"]
    assert icl("analyse", "mine.yaml")[0] == 0
    table = pd.read_csv("data/mine/hessian.csv")
    assert table["step"].tolist() == 2 * [0, 3, 7, 19]
    pd.testing.assert_frame_equal(
        table.loc[table["step"].isin([0, 7])][:2].reset_index(drop=True), first, check_dtype=False
    )
    course = pd.read_csv("data/mine/trajectory.csv")
    assert course.groupby("subject_config.size")["step"].apply(list).tolist() == 2 * [[0, 3, 7, 19]]
    before = {path.name: path.read_bytes() for path in Path("data/mine").glob("*.*")}
    monkeypatch.setattr("icl.analysis.along_subject.LossOnData.of_subject", None)
    assert icl("analyse", "mine.yaml")[0] == 0
    assert {path.name: path.read_bytes() for path in Path("data/mine").glob("*.*")} == before


@pytest.mark.parametrize("only", ["evals", "hessian", "trajectory"])
def test_tables_of_other_weights_are_refused_and_stay(icl, monkeypatch, only):
    write_sweep()
    analyse = ("analyse", "mine.yaml", "--only", only)
    assert icl(*analyse, "--steps", "3,7")[0] == 0
    table = Path(f"data/mine/{only}.csv")
    before, digests = table.read_bytes(), pd.read_csv(table, dtype=str)["weights_digest"]
    assert digests.tolist() == [weights_digest(Quadratic().model(step)) for step in (3, 7)]
    path = Path("quadratic.py")
    path.write_text(path.read_text().replace("+ 0.5", "+ 0.45"))
    monkeypatch.delitem(sys.modules, "quadratic")
    status, said = icl(*analyse, "--steps", "3,7,19")
    assert status == 2
    assert f"{table} has step 3 at other weights than those of now; move the table away" in said
    assert table.read_bytes() == before
    pd.read_csv(table).drop(columns="weights_digest").to_csv(table, index=False)
    assert icl(*analyse, "--steps", "3,7")[0] == 0, "a table of an old version has no digests"


def test_figures_and_the_report_read_the_tables_beside_the_estimates(icl):
    write_sweep(size=5, batch=59)
    assert icl("llc", "mine.yaml", "--tracking", "local")[0] == 0
    assert icl("tabulate", "mine.yaml", "--output", "data/mine")[0] == 0
    assert icl("analyse", "mine.yaml")[0] == 0
    assert icl("figures", "--jobs", "1")[0] == 0
    drawn = {path.stem for path in Path("figures").rglob("*.png")}
    assert {"loss-and-llc", "hessian", "ED-variants"} <= drawn
    assert len(list(Path("figures").rglob("hessian.png"))) == 1
    assert icl("report", "mine.yaml", "--output", "report.html")[0] == 0
    page = Path("report.html").read_text()
    assert "hessian/trace" in page
    assert "weight/norm" in page


def test_the_report_tells_subjects_of_one_class_apart(icl, monkeypatch):
    from icl.commands.report import chosen_runs
    from icl.report import gather

    write_sweep(size=[5, 29], batch=59)
    assert icl("llc", "mine.yaml", "--tracking", "local")[0] == 0
    assert icl("analyse", "mine.yaml", "--only", "evals", "--only", "hessian")[0] == 0
    material = gather(chosen_runs(["mine.yaml"], (), {"LOCAL_ROOT": "checkpoints"}), Path("data"))
    assert len(material.runs) == 1
    assert material.estimates.groupby("way")["step"].apply(list).tolist() == 2 * [[0, 3, 7, 19]]
    traces = material.structure.loc[material.structure["measure"] == "hessian: hessian/trace"]
    known = pd.read_csv("data/mine/hessian.csv").groupby("subject_config.size")["hessian/trace"].mean()
    found = traces.groupby("part")["value"].mean()
    np.testing.assert_allclose(sorted(found), sorted(known))
    assert icl("report", "mine.yaml", "--output", "report.html")[0] == 0


def test_a_subject_without_settings_has_figures_too(icl):
    write_sweep()
    assert icl("analyse", "mine.yaml")[0] == 0
    assert icl("figures", "--jobs", "1")[0] == 0
    assert list(Path("figures").rglob("hessian.png"))


def test_a_folder_of_checkpoints(icl):
    Path("runs").mkdir()
    for step in Quadratic().steps():
        torch.save({"model": Quadratic().model(step).state_dict()}, f"runs/step_{step}.pt")
    Path("of_quadratic.py").write_text(
        "import quadratic\nnetwork = lambda: quadratic.Quadratic().model(0)\nloss = quadratic.Quadratic().loss\n"
        "data = lambda: quadratic.Quadratic().batches(0)\n"
    )
    names = {
        "path": "runs/step_*.pt",
        "key": "model",
        "model": "of_quadratic:network",
        "loss": "of_quadratic:loss",
        "batches": "of_quadratic:data",
    }
    parameters = {
        "subject": {"value": "checkpoints"},
        "subject_config": {"parameters": {k: {"value": v} for k, v in names.items()}},
    }
    Path("of_folder.yaml").write_text(yaml.safe_dump({"method": "grid", "parameters": parameters}))
    write_sweep(size=5)
    for name in ("of_folder.yaml", "mine.yaml"):
        assert icl("analyse", name)[0] == 0
    for table in ("hessian", "evals", "trajectory"):
        of_folder, own = (pd.read_csv(f"data/{name}/{table}.csv") for name in ("of_folder", "mine"))
        start = own.columns.get_loc("step")
        pd.testing.assert_frame_equal(of_folder[own.columns[start:]], own[own.columns[start:]])


def test_the_language_subject(icl):
    from icl.subjects.language import AttentionOnlyTransformer

    Path("public").mkdir()
    for step in (0, 100):
        model = AttentionOnlyTransformer(n_layers=1, d_model=7, n_heads=2, d_head=3, n_ctx=13, d_vocab=11, seed=step)
        torch.save(model.state_dict(), f"public/checkpoint_{step:0>7d}.pth")
    np.save("rows.npy", np.random.default_rng(0).integers(0, 11, (29, 13)))
    parameters = {
        "subject": {"value": "language"},
        "subject_config": {
            "parameters": {"folder": {"value": "public"}, "tokens": {"parameters": {"rows": {"value": "rows.npy"}}}}
        },
    }
    Path("words.yaml").write_text(yaml.safe_dump({"method": "grid", "parameters": parameters}))
    assert icl("analyse", "words.yaml", "--samples", "29")[0] == 0
    tables = {name: pd.read_csv(f"data/words/{name}.csv") for name in ("evals", "hessian", "trajectory")}
    assert all(table["step"].tolist() == [0, 100] for table in tables.values())
    assert tables["evals"]["loss/mean"].between(1.5, 5).all()
    assert np.isfinite(tables["hessian"].filter(like="hessian/").to_numpy()).all()


def test_a_linear_loss_and_fused_attention_have_a_hessian(icl):
    write_sweep(size=5, curved=False)
    assert icl("analyse", "mine.yaml", "--only", "hessian")[0] == 0
    assert not pd.read_csv("data/mine/hessian.csv").filter(like="evals").to_numpy().any()
    write_sweep(size=29, curved=False)
    assert icl("analyse", "mine.yaml", "--only", "hessian", "--output", "flat")[0] == 0
    assert not pd.read_csv("flat/hessian.csv").filter(like="evals").to_numpy().any()
    write_sweep("quadratic:Attends", "attends.yaml", size=5)
    assert icl("analyse", "attends.yaml", "--only", "hessian", "--steps", "0")[0] == 0
    assert pd.read_csv("data/attends/hessian.csv")["hessian/evals/0"].abs().iloc[0] > 0


WRONG = [
    (["--only", "spectra"], {}, "no analysis 'spectra' of any subject; known: evals, hessian, trajectory"),
    (["--steps", "8"], {}, "no checkpoint at step 8; the nearest is 7"),
    (["--steps", "7", "--only", "trajectory"], {}, "a trajectory needs at least two checkpoints"),
    (["--set", "subject_config.sise=3"], {}, "unknown key 'subject_config.sise': did you mean 'size'"),
    (["--tokens", "rows.npy"], {}, "--tokens is for a folder of public files"),
    ([], {"subject": "quadratic:Growing"}, "the model has 5 parameters at step 0 and 6 at step 3"),
    ([], {"subject": "my_module:NotFinite"}, "the loss of w* is not finite"),
    ([], {"subject": "my_module:NoTensor"}, "loss_fn returned a float"),
    ([], {"subject": "my_module:Dropping"}, "call model.eval"),
    ([], {"subject": "my_module:NoBatches"}, "batches is empty"),
    ([], {"subject": "my_module:NoModule"}, "must give a torch.nn.Module"),
    ([], {"subject": "regression"}, "names no subject, so it is about training runs"),
]


@pytest.mark.parametrize(("words", "sweep", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_what_is_wrong_is_one_line(icl, words, sweep, message):
    write_sweep(**sweep)
    status, said = icl("analyse", "mine.yaml", *words)
    assert status == 2
    (line,) = [line for line in said.splitlines() if line.startswith("icl: ")]
    assert message in line
    assert "Traceback" not in said


def test_a_training_sweep_and_other_settings_are_refused(icl):
    Path("training.yaml").write_text("method: grid\nparameters: {num_steps: {value: 3}}\n")
    status, said = icl("analyse", "training.yaml")
    assert status == 2
    assert "icl analyse --family training.yaml" in said
    write_sweep(size=5)
    assert icl("analyse", "mine.yaml", "--only", "evals")[0] == 0
    status, said = icl("analyse", "mine.yaml", "--only", "evals", "--samples", "3")
    assert status == 2
    assert "was made with samples=1024, not 3" in said
    for words in (["--samples", "3"], ["--set", "num_steps=3"]):
        status, said = icl("analyse", "a-run", *words)
        assert status == 2
        assert "are for a sweep file" in said
