"""`icl doctor`: shows which device, engine, storage and W&B settings are used, and tries each of them."""

import platform
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
from rich.console import Console
from rich.table import Table

from icl import __version__
from icl.devices import resolve_device
from icl.engine import choose_path
from icl.model import TransformerShape
from icl.storage import LocalStore, MirroredStore, S3Store, StorageError, Store, store_from_environment
from icl.tracking.wandb import wandb_is_set_up

PAPER_SHAPE = TransformerShape(task_size=4, max_examples=8, embed_size=64, mlp_size=64, num_heads=4, num_layers=2)
PROBES = "icl/doctor-probes"
PROBE = b"icl doctor was here; this may be deleted"


def report(environ: Mapping[str, str], console: Console | None = None) -> bool:
    """Try each setting and print a table of them; True if all work. Credentials are never shown."""
    checks: dict[str, Callable[[], str]] = {
        "versions": lambda: f"icl {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "device": lambda: _device(environ),
        "engine": lambda: _engine(environ),
        "storage": lambda: _storage(environ),
        "W&B": lambda: _wandb(environ),
    }
    table = Table("", "what", "in force", show_lines=False)
    healthy = True
    for name, check in checks.items():
        try:
            table.add_row("[green]ok", name, check())
        except Exception as error:  # a fault must show as a row and not end the report
            healthy = False
            table.add_row("[red]fails", name, " ".join(str(error).split()) or type(error).__name__)
    (console or Console()).print(table)
    return healthy


def _device(environ: Mapping[str, str]) -> str:
    device = resolve_device(environ.get("DEVICE"))
    torch.ones(2, device=device).sum().item()
    source = f"DEVICE={environ['DEVICE']}" if environ.get("DEVICE") else "the best one present; DEVICE overrides"
    return f"{device} ({source}), {torch.get_num_threads()} CPU threads"


def _engine(environ: Mapping[str, str]) -> str:
    path = choose_path(PAPER_SHAPE, resolve_device(environ.get("DEVICE")))
    return f"{path.name}: {path.reason}"


def _storage(environ: Mapping[str, str]) -> str:
    store = store_from_environment(environ)
    if not isinstance(store, MirroredStore):
        return f"{_tried_out(store)} (AWS_BUCKET_NAME adds a bucket)"
    # Each is tried alone, because the pair would read from the folder and hide a fault of the bucket.
    return f"{_tried_out(store.local)} and {_tried_out(store.remote)}"


def _tried_out(store: Store) -> str:
    """Write, list, read and delete a value, as a run does; returns a description of the store.

    Raises:
        StorageError: one of these does not work.
    """
    key = f"{PROBES}/{secrets.token_hex(4)}"
    store.put(key, PROBE)
    try:
        if store.sizes(PROBES).get(key) != len(PROBE):
            raise StorageError(f"{store} stores a value but does not list it; a run could not continue from there")
        if store.get(key) != PROBE:
            raise StorageError(f"{store} gives back other bytes than were written; use another folder or bucket")
        excludes = not isinstance(store, S3Store) or store.try_conditions(key, PROBE)
    finally:
        store.delete(key)
    if store.exists(key):
        raise StorageError(f"{store} does not delete files; old states would fill it; check its permissions")
    if isinstance(store, LocalStore):
        with suppress(OSError):
            (store.root / PROBES).rmdir()
    return str(store) if excludes else f"{store}, which cannot keep two machines from writing the same run"


def _wandb(environ: Mapping[str, str]) -> str:
    if environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return f"WANDB_MODE={environ['WANDB_MODE']}"
    if not wandb_is_set_up(environ):
        return "not set up: metrics go to local files only (WANDB_API_KEY or `wandb login` adds W&B)"
    import wandb

    entity = environ.get("WANDB_ENTITY") or wandb.Api(timeout=10).default_entity
    return f"logged in, entity {entity}"
