"""A loopback stand-in for the W&B server, for tests that drive the real client (tried with wandb 0.31.0).

It speaks as much of the GraphQL and file-stream protocols as `wandb sweep`, `wandb agent`, `wandb.init` (with resuming),
`log` and `finish` use, hands out the runs of a sweep with W&B's own engine, keeps all it was told in memory, and can
fall ill on purpose.
"""

import gzip
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

from icl.config.sweeps import engine

API_KEY = "local" + "0" * 35
ENTITY = "local"
Json = dict[str, Any]


@dataclass
class RunRecord:
    """What the server knows of one run."""

    name: str
    project: str = "uncategorized"
    sweep: str | None = None
    display_name: str | None = None
    state: str = "running"
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    alerts: list[Json] = field(default_factory=list)
    config: Json = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    """Streamed files: name -> line number -> text; a line sent twice is kept once."""
    uploads: dict[str, bytes] = field(default_factory=dict)

    def stream(self, name: str) -> list[Json]:
        return [json.loads(text) for _, text in sorted(self.lines.get(name, {}).items())]

    @property
    def history(self) -> list[Json]:
        """The logged rows, without the client's own columns except `_step`."""
        rows = self.stream("wandb-history.jsonl")
        return [{key: value for key, value in row.items() if key == "_step" or not key.startswith("_")} for row in rows]

    @property
    def summary(self) -> Json:
        rows = self.stream("wandb-summary.json")
        return rows[-1] if rows else {}

    @property
    def plain_config(self) -> Json:
        return {key: entry["value"] for key, entry in self.config.items() if key != "_wandb"}


@dataclass
class SweepRecord:
    """A sweep: its definition, and the runs handed out so far."""

    config: Json
    project: str
    state: str = "PENDING"
    drawn: list[Any] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    """Names of runs to be handed out again, as W&B does with preempted ones."""


@dataclass
class AgentRecord:
    sweep: str
    run: str | None = None


class WandbServer:
    """The server's memory and its answers.

    `fault` is None, "error" (every request gets a 500) or "slow" (an answer takes `delay` seconds).
    """

    def __init__(self) -> None:
        self.sweeps: dict[str, SweepRecord] = {}
        self.runs: dict[str, RunRecord] = {}
        self.arguments: dict[str, Json] = {}
        self.agents: dict[str, AgentRecord] = {}
        self.unknown: list[str] = []
        self.requests = 0
        self.fault: str | None = None
        self.delay = 30.0
        self.alive = True
        self._lock = threading.RLock()
        self._http = _Listener(("127.0.0.1", 0), _Handler)
        self._http.wandb = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def die(self) -> None:
        """Stop listening and cut every open connection at its next request."""
        if self.alive:
            self.alive = False
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()

    def requeue(self, run: str) -> None:
        """Hand a run out again, as after a preemption."""
        sweep = self.runs[run].sweep
        assert sweep is not None
        with self._lock:
            self.sweeps[sweep].waiting.append(run)
            self.sweeps[sweep].state = "RUNNING"

    def environment(self) -> dict[str, str]:
        """The variables that point the W&B client at this server and keep it quiet."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": API_KEY,
            "WANDB_ENTITY": ENTITY,
            "WANDB_ERROR_REPORTING": "false",
        }

    def answer(self, query: str, variables: Json) -> Json:
        """The `data` of a GraphQL request."""
        with self._lock:
            for pattern, method in self._OPERATIONS:
                if re.search(pattern, query):
                    return method(self, variables)
            self.unknown.append(query[:300])
            return {}

    def receive(self, run: str, payload: Json) -> None:
        """One post to a run's file stream."""
        with self._lock:
            record = self.runs.get(run)
            if record is None:
                return
            for name, chunk in (payload.get("files") or {}).items():
                lines = record.lines.setdefault(name, {})
                for number, text in enumerate(chunk["content"], start=chunk.get("offset", 0)):
                    lines[number] = text
            if payload.get("complete"):
                record.state = "finished" if payload.get("exitcode") == 0 else "failed"

    def _upsert_sweep(self, variables: Json) -> Json:
        name = variables.get("id") or uuid.uuid4().hex[:8]
        project = variables.get("projectName") or "icl"
        record = self.sweeps.setdefault(name, SweepRecord({}, project))
        if variables.get("config"):
            record.config = yaml.safe_load(variables["config"])
        record.state = variables.get("state") or record.state
        sweep = {"id": name, "name": name, "project": _project(project)}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def _create_agent(self, variables: Json) -> Json:
        name = uuid.uuid4().hex
        self.agents[name] = AgentRecord(variables["sweep"])
        self.sweeps[variables["sweep"]].state = "RUNNING"
        return {"createAgent": {"agent": {"id": name}}}

    def _heartbeat(self, variables: Json) -> Json:
        agent = self.agents[variables["id"]]
        states = json.loads(variables.get("runState") or "{}")
        commands = [] if agent.run in states else [self._next_command(agent)]
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}

    def _next_command(self, agent: AgentRecord) -> Json:
        sweep = self.sweeps[agent.sweep]
        if sweep.waiting:
            agent.run = sweep.waiting.pop(0)
        else:
            drawn = None if sweep.state in ("FINISHED", "CANCELED") else engine().next_run(sweep.config, sweep.drawn)
            if drawn is None:
                sweep.state = "FINISHED"
                return {"type": "exit"}
            sweep.drawn.append(drawn)
            agent.run = uuid.uuid4().hex[:8]
            self.arguments[agent.run] = drawn.config
            self.runs[agent.run] = RunRecord(agent.run, sweep.project, agent.sweep)
        arguments, program = self.arguments[agent.run], sweep.config.get("program")
        return {
            "type": "run",
            "run_id": agent.run,
            "args": arguments,
            "program": program,
            "logs": [],
            "run_storage_id": agent.run,
        }

    def _upsert_run(self, variables: Json) -> Json:
        name = variables.get("name") or uuid.uuid4().hex[:8]
        inserted = name not in self.runs
        record = self.runs.setdefault(name, RunRecord(name))
        record.config = json.loads(variables["config"]) if variables.get("config") else record.config
        record.display_name = variables.get("displayName") or record.display_name
        record.state = variables.get("state") or record.state
        record.sweep = variables.get("sweep") or record.sweep
        record.project = variables.get("project") or record.project
        record.group = variables.get("groupName") or record.group
        record.job_type = variables.get("jobType") or record.job_type
        record.tags = variables.get("tags") or record.tags
        return {"upsertBucket": {"bucket": _bucket(record), "inserted": inserted}}

    def _alert(self, variables: Json) -> Json:
        self.runs[variables["runName"]].alerts.append(variables)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _resume_status(self, variables: Json) -> Json:
        record = self.runs.get(variables["name"])
        started = record is not None and bool(record.config)
        return {"model": {"bucket": _bucket(record) if record is not None and started else None}}

    def _create_files(self, variables: Json) -> Json:
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{run}/{name}"} for name in variables.get("files", [])]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def _sweep(self, variables: Json) -> Json:
        name = variables.get("sweep") or variables.get("name")
        record = self.sweeps[str(name)]
        nothing = dict.fromkeys(("controller", "description", "displayName", "heartbeatAt", "scheduler", "updatedAt"))
        runs = {"priorRuns": {"edges": []}, "runs": {"edges": []}, "runCount": len(record.drawn)}
        facts = {
            "id": name,
            "name": name,
            "method": record.config.get("method"),
            "state": record.state,
            "earlyStopJobRunning": False,
        }
        dates = {"config": yaml.dump(record.config), "createdAt": "2026-01-01T00:00:00"}
        return {"project": {**_project(record.project), "sweep": {**nothing, **runs, **facts, **dates}}}

    def _viewer(self, variables: Json) -> Json:
        entity = {"id": "e1", "name": ENTITY}
        return {
            "viewer": {
                "id": "u1",
                "entity": ENTITY,
                "username": ENTITY,
                "name": ENTITY,
                "email": "local@example.org",
                "flags": "{}",
                "admin": False,
                "defaultEntity": entity,
                "teams": {"edges": [{"node": entity}]},
                "apiKeys": {"edges": []},
            },
            **self._server_info(variables),
        }

    def _server_info(self, variables: Json) -> Json:
        return {
            "serverInfo": {
                "cliVersionInfo": "{}",
                "latestLocalVersionInfo": None,
                "features": [],
                "exposesExplicitRunsForSweeps": False,
            }
        }

    def _introspection(self, variables: Json) -> Json:
        return {
            "QueryType": {"fields": []},
            "MutationType": {"fields": []},
            "__type": None,
            "ServerInfoType": None,
            "TypeInfo": None,
        }

    def _organization(self, variables: Json) -> Json:
        return {"entity": {"organization": None}}

    def _stopped(self, variables: Json) -> Json:
        return {"project": {"run": {"stopped": False}}}

    _OPERATIONS: tuple[tuple[str, "Callable[[WandbServer, Json], Json]"], ...] = (
        ("upsertSweep", _upsert_sweep),
        ("createAgent", _create_agent),
        ("agentHeartbeat", _heartbeat),
        ("upsertBucket", _upsert_run),
        ("notifyScriptableRunAlert", _alert),
        ("RunResumeStatus", _resume_status),
        ("createRunFiles", _create_files),
        ("viewer", _viewer),
        ("serverInfo", _server_info),
        (r"sweep\(", _sweep),
        ("coreWeaveOrganizationId", _organization),
        ("__schema|__type", _introspection),
        ("RunStoppedStatus|stopped", _stopped),
    )


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that are killed, or that give up waiting, are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the tests read the server's memory."""

    @property
    def wandb(self) -> WandbServer:
        return self.server.wandb  # type: ignore[attr-defined]

    def _ill(self) -> bool:
        """Whether a fault has already dealt with this request."""
        self.wandb.requests += 1
        if self.wandb.fault == "slow":
            end = time.monotonic() + self.wandb.delay
            while self.wandb.alive and time.monotonic() < end:
                time.sleep(0.05)
        if not self.wandb.alive:
            self.close_connection = True
            return True
        if self.wandb.fault == "error":
            self._reply({"error": "ill on purpose"}, 500)
            return True
        return False

    def _reply(self, body: Json, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def do_GET(self) -> None:
        if not self._ill():
            self._reply({})

    def do_PUT(self) -> None:
        data = self._body()
        if not self._ill():
            _, _, run, name = self.path.split("/", 3)
            self.wandb.runs[run].uploads[name] = data
            self._reply({})

    def do_POST(self) -> None:
        payload = json.loads(self._body() or b"{}")
        if self._ill():
            return
        if self.path == "/graphql":
            try:
                self._reply({"data": self.wandb.answer(payload["query"], payload.get("variables") or {})})
            except Exception as error:
                self.wandb.unknown.append(repr(error))
                self._reply({"errors": [{"message": repr(error)}], "data": None})
        else:
            if self.path.endswith("file_stream"):
                self.wandb.receive(self.path.split("/")[-2], payload)
            self._reply({"exitcode": None, "limits": {}})


def _project(name: str) -> Json:
    return {"id": "p1", "name": name, "entity": {"id": "e1", "name": ENTITY}}


def _bucket(record: RunRecord) -> Json:
    counts = {
        key: len(record.lines.get(name, {}))
        for key, name in (
            ("historyLineCount", "wandb-history.jsonl"),
            ("eventsLineCount", "wandb-events.jsonl"),
            ("logLineCount", "output.log"),
        )
    }
    tail = [text for _, text in sorted(record.lines.get("wandb-history.jsonl", {}).items())][-1:]
    texts = {
        "config": json.dumps(record.config),
        "summaryMetrics": json.dumps(record.summary),
        "historyTail": json.dumps(tail),
        "eventsTail": "[]",
        "wandbConfig": json.dumps({"t": {}}),
    }
    facts = {
        "id": record.name,
        "name": record.name,
        "displayName": record.display_name or record.name,
        "sweepName": record.sweep,
        "state": record.state,
        "group": record.group,
        "jobType": record.job_type,
        "tags": record.tags,
    }
    nothing = {
        "description": None,
        "notes": None,
        "stopped": False,
        "fileCount": 0,
        "heartbeatAt": None,
    }
    return {**nothing, **facts, **texts, **counts, "project": _project(record.project), "projectId": "p1"}


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A healthy server for the length of a `with` block."""
    server = WandbServer()
    try:
        yield server
    finally:
        server.die()
