# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""A stand-in for the Hub's HTTP API on loopback, and processes that talk to it."""

import base64
import hashlib
import json
import re
import subprocess
import textwrap
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import yaml

TOKEN = "hf_token_of_the_tests"
USER = "tester"


class StandInHub:
    """
    The part of the Hub's API that uploads and downloads of models need, with what it stores in memory.

    Like the Hub, it takes large or binary files through LFS, checks their hash, knows commits and branches, and
    refuses who writes without a token. What it does not know is answered with an error and noted in `unknown`.
    """

    token = TOKEN

    def __init__(self):
        self.lock = threading.Lock()
        self.lfs: dict[str, bytes] = {}
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository, commit, path
        self.branches: dict[str, dict[str, str]] = {}  # repository, branch
        self.messages: dict[str, list[str]] = {}
        self.uploads_through_lfs: list[str] = []
        self.unknown: list[str] = []
        # Two, of different names, because the client takes the headers of a redirect only if it leads to another host.
        self.servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})) for _ in range(2)
        ]
        self.url, self.storage_url = (
            f"http://{name}:{server.server_port}"
            for name, server in zip(("127.0.0.1", "localhost"), self.servers, strict=True)
        )
        for server in self.servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository: bytes by path."""
        return self.commits[repo_id][self.branches[repo_id].get(revision, revision)]

    def create(self, repo_id: str) -> None:
        self.commits[repo_id], self.branches[repo_id], self.messages[repo_id] = {}, {}, []
        self.commit(repo_id, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def serve(self, repo_id: str, commit: str, files: dict[str, bytes]) -> None:
        """Makes a repository with these files in a commit of a known hash; its branch main has none of them."""
        self.create(repo_id)
        self.commits[repo_id][commit] = files
        self.lfs |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}

    def commit(self, repo_id: str, branch: str, files: dict[str, bytes], message: str) -> str:
        digest = hashlib.sha1(f"{repo_id} {branch} {len(self.commits[repo_id])}".encode())
        self.commits[repo_id][digest.hexdigest()] = files
        self.branches[repo_id][branch] = digest.hexdigest()
        self.messages[repo_id].append(message)
        return digest.hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if _is_lfs(path, content) else _git_hash(content)


def _is_lfs(path: str, content: bytes) -> bool:
    return path.endswith(".safetensors") or b"\0" in content[:512]  # as much as the client shows before it uploads


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        for method, pattern, function in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                if method in ("POST", "PUT") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    # An address that LFS hands out carries its own permission.
                    if not path.startswith("/lfs/"):
                        return self.reply(401, {"error": "Invalid credentials in Authorization header"})
                with self.hub.lock:
                    return function(self, **match.groupdict())
        self.hub.unknown.append(f"{self.command} {path}")
        self.reply(501, {"error": f"The stand-in does not know {self.command} {path}"})

    def reply(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def not_found(self, code: str) -> None:
        self.reply(404, {"error": code}, {"X-Error-Code": code})

    # Accounts and repositories

    def agent_harnesses(self):
        self.not_found("EntryNotFound")  # the client asks, and lives without an answer

    def whoami(self):
        self.reply(200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self):
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.commits:
            return self.reply(409, {**url, "error": "You already created this model repo"})
        self.hub.create(repo_id)
        self.reply(200, url)

    def create_branch(self, repo, branch):
        if branch in self.hub.branches[repo]:
            return self.reply(409, {"error": f"Reference already exists: {branch}"})
        self.hub.branches[repo][branch] = self.hub.branches[repo]["main"]
        self.reply(200, {})

    def commit_of(self, repo, revision) -> str | None:
        """The commit of a branch or a commit itself; `None` after an error was sent."""
        if repo not in self.hub.commits:
            return self.not_found("RepoNotFound")
        commit = self.hub.branches[repo].get(revision, revision)
        return commit if commit in self.hub.commits[repo] else self.not_found("RevisionNotFound")

    def repo_info(self, repo, revision="main"):
        if commit := self.commit_of(repo, revision):
            siblings = [{"rfilename": path} for path in self.hub.commits[repo][commit]]
            self.reply(200, {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []})

    def tree(self, repo, revision, folder):
        if commit := self.commit_of(repo, revision):
            entries = []
            for path, content in self.hub.commits[repo][commit].items():
                if not path.startswith(folder.lstrip("/")):
                    continue
                entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
                if _is_lfs(path, content):
                    sha256 = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
                entries.append(entry)
            # Like the Hub, an error for a folder that does not exist.
            self.reply(200, entries) if entries else self.not_found("EntryNotFound")

    # Upload

    def validate_yaml(self):
        errors = []
        try:
            metadata = yaml.safe_load(json.loads(self.body)["content"].split("---\n")[1])
            for model in metadata.get("model-index") or []:
                for result in model["results"]:
                    known = (model["name"], result["task"]["type"], result["dataset"]["type"], result["metrics"])
                    if not all(known):
                        errors.append({"message": f'"model-index" lacks something: {result}'})
        except (yaml.YAMLError, KeyError, IndexError, AttributeError) as error:
            errors.append({"message": f"invalid metadata: {error!r}"})
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, repo, revision):
        if commit := self.commit_of(repo, revision):
            stored = self.hub.commits[repo][commit]
            answers = []
            for file in json.loads(self.body)["files"]:
                path = file["path"]
                mode = "lfs" if _is_lfs(path, base64.b64decode(file["sample"])) else "regular"
                answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
                answers.append({**answer, "oid": _oid(path, stored[path])} if path in stored else answer)
            self.reply(200, {"files": answers})

    def lfs_batch(self, repo):
        objects = []
        for file in json.loads(self.body)["objects"]:
            answer = {"oid": file["oid"], "size": file["size"]}
            if file["oid"] not in self.hub.lfs:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.storage_url}/lfs/{file['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs-verify"},
                }
            objects.append(answer)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.reply(400, {"error": "The content does not have the hash that was announced"})
        self.hub.lfs[oid] = self.body
        self.reply(200, {})

    def lfs_verify(self):
        request = json.loads(self.body)
        is_there = len(self.hub.lfs.get(request["oid"], b"")) == request["size"]
        self.reply(200 if is_there else 404, {})

    def commit(self, repo, revision):
        if not (parent := self.commit_of(repo, revision)):
            return
        files, message = dict(self.hub.commits[repo][parent]), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
                self.hub.uploads_through_lfs.append(f"{repo}/{value['path']}")
            else:
                return self.reply(400, {"error": f"Unknown operation {item['key']}"})
        commit = self.hub.commit(repo, revision, files, message)
        self.reply(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    # Download

    def resolve(self, repo, revision, path):
        if not (commit := self.commit_of(repo, revision)):
            return
        headers = {"X-Repo-Commit": commit}
        if path not in self.hub.commits[repo][commit]:
            return self.reply(404, {"error": "EntryNotFound"}, {**headers, "X-Error-Code": "EntryNotFound"})
        content = self.hub.commits[repo][commit][path]
        etag = f'"{_oid(path, content)}"'
        headers |= {"ETag": etag, "Content-Type": "application/octet-stream"}
        if _is_lfs(path, content):
            location = f"{self.hub.storage_url}/storage/{hashlib.sha256(content).hexdigest()}"
            headers |= {"Location": location, "X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
            return self.reply(302, b"", headers)
        self.reply(200, content, headers)

    def storage(self, oid):
        self.reply(200, self.hub.lfs[oid], {"Content-Type": "application/octet-stream"})


_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", r"/api/agent-harnesses", _Handler.agent_harnesses),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.create_branch),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}(?P<folder>.*)", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", _Handler.repo_info),
    ("GET", rf"/api/models/{_REPO}", _Handler.repo_info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.lfs_upload),
    ("POST", r"/lfs-verify", _Handler.lfs_verify),
    ("GET", r"/storage/(?P<oid>\w+)", _Handler.storage),
    ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
    ("HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]


@pytest.fixture(scope="session")
def hub():
    """The stand-in, empty at first; at the end it must have been asked for nothing that it does not know."""
    hub = StandInHub()
    yield hub
    hub.close()
    assert hub.unknown == []


# Processes that talk to it -------------------------------------------------------------------------------------------

# Every import of the package fails as on a machine that does not have it, however it is installed here.
WITHOUT_PACKAGE = """
import sys

class _Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "stellar_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, _Absent())
try:
    import stellar_hf
except ModuleNotFoundError:
    pass
else:
    sys.exit("stellar_hf is there")


def load_processor(name):
    from transformers import AutoImageProcessor
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
    except ImportError:  # Transformers 5.17 has no AutoImageProcessor without torchvision
        reference = "image_processing_pil_stellar.StellarImageProcessorPil"
        return get_class_from_dynamic_module(reference, name).from_pretrained(name)
"""


@pytest.fixture(scope="session")
def hub_python(hub, make_python, tmp_path_factory):
    """An executable that behaves as Python does, for which the stand-in is the Hub."""
    with make_python(
        HF_HOME=str(tmp_path_factory.mktemp("home")),
        HF_ENDPOINT=hub.url,
        HF_TOKEN=TOKEN,
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        TQDM_DISABLE="1",
    ) as executable:
        yield executable


@pytest.fixture(scope="session")
def run_python(hub_python, tmp_path_factory):
    """Runs code in a process of its own, for which the stand-in is the Hub."""

    def run(code: str, *arguments: object, with_package: bool = True) -> str:
        prelude = "import sys\n" if with_package else WITHOUT_PACKAGE
        command = [hub_python, "-c", prelude + textwrap.dedent(code), *map(str, arguments)]
        process = subprocess.run(command, cwd=tmp_path_factory.mktemp("folder"), capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process.stdout

    return run


@pytest.fixture(scope="session")
def photograph():
    """An image that the processors have to resize and crop."""
    return np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)


# What one process with the package saves and pushes, and one without it loads ----------------------------------------

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.py"
HAND_WRITTEN = "---\nlicense: mit\n---\n\n# A card that a person wrote\n"

# Heads with the Auto class that they are registered for.
HEADS = {
    "StellarForImageClassification": "AutoModelForImageClassification",
    "StellarForSemanticSegmentation": "AutoModelForSemanticSegmentation",
    "StellarForImageReconstruction": "AutoModelForImageToImage",
    "StellarBackbone": "AutoBackbone",
}

# What is on the Hub, and models in folders, with the Auto class that loads them.
ON_HUB = {"features": "AutoModel", "trained": "AutoModelForPreTraining", **HEADS}
IN_FOLDERS = {
    "StellarModel": "AutoModel",
    "StellarForPreTraining": "AutoModelForPreTraining",
    "StellarForImageClassification": "AutoModelForImageClassification",
    "StellarForSemanticSegmentation": "AutoModelForSemanticSegmentation",
}

SAVE_AND_PUSH = """
import json
import runpy
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi

import stellar_hf
from stellar_hf import (
    StellarConfig,
    StellarForImageReconstruction,
    StellarForPreTraining,
    StellarImageProcessorPil,
    StellarModel,
    StellarPipeline,
    StellarTrainer,
    StellarTrainingArguments,
)

folder, config, hand_written = Path(sys.argv[1]), StellarConfig(**json.loads(sys.argv[2])), sys.argv[3].encode()
heads, models, pretrain = json.loads(sys.argv[4]), json.loads(sys.argv[5]), json.loads(sys.argv[6])
processor = StellarImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})

# Without code, into a repository with a card of a person.
plain = StellarModel(config)
HfApi().create_repo("tester/plain")
HfApi().upload_file(path_or_fileobj=hand_written, path_in_repo="README.md", repo_id="tester/plain")
plain.push_to_hub("tester/plain")
plain.save_pretrained(folder / "plain")

# A pipeline, whose model comes without code; the card of the first push is brought up to date by the second.
pipe = StellarPipeline(
    image_processor=StellarImageProcessorPil.from_pretrained(stellar_hf.DEMO_MODEL),
    model=StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL),
)
pipe.push_to_hub("tester/pipeline")
pipe.save_pretrained(folder / "pipeline", push_to_hub=True, tags="second", commit_message="While saving")
pipe.push_to_hub("tester/plain", subfolder="pipeline", commit_message="Beside a model")

# With code; twice, and the processor first.
for shared_class, auto_class in (
    (StellarModel, "AutoModel"),
    (StellarForPreTraining, "AutoModelForPreTraining"),
    (StellarImageProcessorPil, "AutoImageProcessor"),
):
    shared_class.register_for_auto_class(auto_class)
model = StellarModel(config).eval()
processor.push_to_hub("features")
model.push_to_hub("features", tags=["first"])
model.push_to_hub("features", tags=["second"], commit_message="Second")
model.push_to_hub("features", revision="draft", tags=["third"])
model.save_pretrained(folder / "features")
processor.save_pretrained(folder / "features")

image = np.load(folder / "image.npy")
inputs = processor(image, return_tensors="pt")
with torch.no_grad():
    torch.save(dict(model(**inputs)), folder / "features.pt")

# Heads, while they are saved, in folders that hold more; the second time over a card that a processor's push touched.
for name, auto_class in heads.items():
    model_class = getattr(stellar_hf, name)
    model_class.register_for_auto_class(auto_class)
    (folder / name).mkdir()
    (folder / name / "notes.txt").write_text("of the folder alone")
    processor.save_pretrained(str(folder / name), push_to_hub=True, repo_id=f"tester/{name}")
    model_class(config).save_pretrained(folder / name, push_to_hub=True, tags="first", commit_message="While saving")
    processor.push_to_hub(name)
    model = model_class.from_pretrained(folder / name).eval()
    model.save_pretrained(folder / name, push_to_hub=True, tags="second")
    # From the file, as the other process: where a tensor lies in memory can decide the last bit of a product.
    model = model_class.from_pretrained(folder / name).eval()
    with torch.no_grad():
        torch.save(dict(model(**inputs)), folder / f"{name}.pt")

# A training that pushes its checkpoints.
arguments = StellarTrainingArguments(
    str(folder / "run"),
    push_to_hub=True,
    hub_model_id="tester/trained",
    hub_strategy="checkpoint",
    max_steps=2,
    save_steps=2,
    per_device_train_batch_size=2,
    num_global_views=1,
    num_local_views=0,
    use_cpu=True,
    disable_tqdm=True,
    report_to="none",
)
trainer = StellarTrainer(
    StellarForPreTraining(config), arguments, train_dataset=[{"image": image}] * 4, processing_class=processor
)
trainer.train()
trainer.save_model()
trainer.save_metrics("test", {"test_knn_accuracy": 0.75, "test_runtime": 3.0})
trainer.push_to_hub(dataset="tabletop scenes", blocking=True)
model = trainer.model.eval()
with torch.no_grad():
    torch.save(dict(model(**inputs, return_loss=False)), folder / "trained.pt")

# Models in folders that go on no Hub.
shared = folder / "shared"
processor.save_pretrained(folder)
inputs = processor(image, return_tensors="pt")
torch.save(dict(inputs), shared / "inputs.pt")
for name, auto_class in models.items():
    model_class = getattr(stellar_hf, name)
    model_class.register_for_auto_class(auto_class)
    model_class(config).save_pretrained(shared / name)
    # From the file, as the other process: where a tensor lies in memory can decide the last bit of a product.
    model = model_class.from_pretrained(shared / name).eval()
    processor.save_pretrained(shared / name)
    with torch.no_grad():
        torch.save(dict(model(**inputs)), shared / f"{name}.pt")

# The command that trains, which pushes when it ends.
sys.argv = pretrain
runpy.run_path(sys.argv[0], run_name="__main__")
"""

LOAD = """
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download

folder, auto_classes, models = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
image = np.load(folder / "image.npy")
for name, auto_class in auto_classes.items():
    repo_id = f"tester/{name}"
    model = getattr(transformers.models.auto, auto_class).from_pretrained(repo_id, trust_remote_code=True).eval()
    processor = load_processor(repo_id)
    for loaded in (model, processor):
        assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    inputs = processor(image, return_tensors="pt")
    arguments = {"return_loss": False} if name == "trained" else {}
    with torch.no_grad():
        torch.save(dict(model(**inputs, **arguments)), folder / f"{name}_again.pt")
    snapshot_download(repo_id, local_dir=folder / f"{name}_downloaded")

shared = folder / "shared"
for name, auto_class in models.items():
    auto_class = getattr(transformers, auto_class)
    model = auto_class.from_pretrained(shared / name, trust_remote_code=True).eval()
    assert type(model).__name__ == name, type(model)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    processor = load_processor(shared / name)
    assert type(processor).__name__ == "StellarImageProcessorPil", type(processor)
    inputs = processor(image, return_tensors="pt")
    torch.save(dict(inputs), shared / f"{name}_inputs_again.pt")
    with torch.no_grad():
        torch.save(dict(model(**inputs)), shared / f"{name}_again.pt")
    model.save_pretrained(shared / f"{name} again")  # what was loaded as remote code carries it on

kinds = {}
for name in ("AutoConfig", "AutoModel", "AutoModelForPreTraining"):
    loaded = getattr(transformers, name).from_pretrained(shared / "StellarForPreTraining", trust_remote_code=True)
    kinds[name] = type(loaded).__name__
(folder / "kinds.json").write_text(json.dumps(kinds))
assert "stellar_hf" not in sys.modules
"""


@pytest.fixture(scope="session")
def pushed(run_python, tiny_config, photograph, tmp_path_factory):
    """Folder of what one process with the package saved beside pushing it; `shared` in it went on no Hub."""
    folder = tmp_path_factory.mktemp("pushed")
    (folder / "shared").mkdir()
    np.save(folder / "image.npy", photograph)
    config = tiny_config(hidden_size=16, num_hidden_layers=1).to_diff_dict()
    fields = {name: value for name, value in config.items() if name not in ("transformers_version", "model_type")}
    pretrain = [SCRIPT, "--output_dir", folder / "scenes", "--model_config", json.dumps(fields), "--push_to_hub"]
    pretrain += ["--hub_model_id", "tester/scenes", "--max_steps=2", "--num_train_scenes=8", "--num_eval_scenes=16"]
    pretrain += ["--per_device_train_batch_size=4", "--use_cpu", "--disable_tqdm=true"]
    config, tables = tiny_config().to_json_string(), [json.dumps(table) for table in (HEADS, IN_FOLDERS)]
    run_python(SAVE_AND_PUSH, folder, config, HAND_WRITTEN, *tables, json.dumps(list(map(str, pretrain))))
    return folder


@pytest.fixture(scope="session")
def loaded(pushed, run_python):
    """The same folder after a process without the package has loaded what was pushed and saved."""
    run_python(LOAD, pushed, json.dumps(ON_HUB), json.dumps(IN_FOLDERS), with_package=False)
    return pushed


@pytest.fixture
def hand_written():
    """The card that a person wrote for tester/plain."""
    return HAND_WRITTEN


@pytest.fixture(params=HEADS)
def head(request):
    """A class of a head, whose models are on the Hub under its name."""
    return request.param


@pytest.fixture(params=ON_HUB)
def on_hub(request):
    """The name of a model on the Hub."""
    return request.param


@pytest.fixture(params=IN_FOLDERS)
def in_folder(request):
    """The name of a model's folder in `shared`."""
    return request.param
