"""Checkpoints of the Hugging Face Hub, from a stand-in of its HTTP interface on this machine."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from icl.subjects.language import AttentionOnlyTransformer, LanguageShape

SHAPE = LanguageShape(n_layers=1, d_model=5, n_heads=1, d_head=3, n_ctx=7, d_vocab=11)
REPOSITORY, COMMIT = "someone/L1W5", "a" * 40


def public_file(seed):
    data = io.BytesIO()
    torch.save({"model_state_dict": AttentionOnlyTransformer(**vars(SHAPE), seed=seed).state_dict()}, data)
    return data.getvalue()


class Hub(ThreadingHTTPServer):
    """One repository at one commit; remembers what was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {f"checkpoints/checkpoint_{step:0>7d}.pth": public_file(step) for step in (0, 100, 200)}
        self.files["README.md"] = b"# a model"
        self.asked: list[str] = []


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, body):
        path = self.path.split("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        api = f"/api/models/{REPOSITORY}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._send(json.dumps({"id": REPOSITORY, "_id": "1", "sha": COMMIT, "siblings": siblings}).encode(), body)
        elif path.startswith(f"{api}/revision/"):
            self._refuse("RevisionNotFound")
        elif (name := path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")) in self.server.files:
            self._send(self.server.files[name], body)
        elif path.startswith((f"/{REPOSITORY}/", api)):
            self._refuse("EntryNotFound")
        else:
            self._refuse("RepoNotFound")

    def _send(self, data, body):
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _refuse(self, code):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


LOOK = """
import sys
from icl.subjects.hub import HubCheckpoints
from icl.subjects.language_checkpoints import load_model
try:
    checkpoints = HubCheckpoints(sys.argv[1], sys.argv[2] or None)
    print(checkpoints.steps())
    for step in map(int, sys.argv[3:]):
        print(step, float(load_model(checkpoints.path(step)).state_dict()["embed.W_E"].sum()))
except ValueError as error:
    print("refused:", error)
"""


def look(endpoint, folder, repository=REPOSITORY, revision="", *steps):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-W", "ignore", "-c", LOOK, repository, revision, *map(str, steps)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_repository_is_listed_read_and_downloaded_once(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    expected = float(AttentionOnlyTransformer(**vars(SHAPE), seed=100).state_dict()["embed.W_E"].sum())
    listed, loaded = look(endpoint, tmp_path, REPOSITORY, "", 100)
    assert listed == "[0, 100, 200]"
    assert loaded == f"100 {expected}"
    downloads = [asked for asked in hub.asked if asked.startswith("GET") and asked.endswith("0000100.pth")]
    assert len(downloads) == 1
    assert look(endpoint, tmp_path, REPOSITORY, "main", 100)[1] == loaded
    downloads = [asked for asked in hub.asked if asked.startswith("GET") and asked.endswith("0000100.pth")]
    assert len(downloads) == 1, "what is in the cache is not downloaded again"


def test_what_the_hub_does_not_have(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    (told,) = look(endpoint, tmp_path, "someone/else")
    assert told.startswith("refused: the Hub has no repository someone/else")
    (told,) = look(endpoint, tmp_path, REPOSITORY, "v9")
    assert told == f"refused: the Hub has no revision v9 of {REPOSITORY}"
    told = look(endpoint, tmp_path, REPOSITORY, "", 7)
    assert told[1] == "refused: there is no checkpoint of step 7; there are 0, 100, 200"


def test_a_hub_that_does_not_answer(tmp_path):
    (told,) = look("http://127.0.0.1:9", tmp_path)
    assert told.startswith(f"refused: the Hub does not answer for {REPOSITORY}")
    assert told.endswith("once it was downloaded it will be found in the cache")
