"""Checkpoints profiled from their config: directories and the hub, what they store, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flopprof import load
from flopprof.cli.main import app
from flopprof.errors import (
    AccessDenied,
    FlopprofError,
    HubUnreachable,
    InvalidCheckpoint,
    MissingPackage,
    UnknownTarget,
    UsageError,
)
from flopprof.models import hf_config

transformers = pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs

D, LAYERS, FF, VOCAB, SEQ = 32, 2, 48, 100, 16
LLAMA = {
    "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": FF, "vocab_size": VOCAB,
}  # fmt: skip
# q, o: D D each; k, v: D D/2 each; gate, up, down: D FF each. Scores and mixing: 2 (2 S S D) a layer.
LLAMA_FORWARD = 2 * SEQ * (LAYERS * (3 * D * D + 3 * D * FF) + D * VOCAB) + LAYERS * 4 * SEQ * SEQ * D


@pytest.fixture(autouse=True)
def quiet() -> Any:
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def llama(**settings: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **settings}))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path)
    return tmp_path


def changed(folder: Path, **facts: Any) -> str:
    """The folder, its config with these facts instead; None takes one out."""
    file = folder / "config.json"
    merged = {**json.loads(file.read_text()), **facts}
    file.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    return str(folder)


# --- directories --------------------------------------------------------------------------------
def test_a_directory_is_counted_without_its_weights(checkpoint: Path) -> None:
    workload = load(str(checkpoint), seq=SEQ)
    assert all(parameter.is_meta for parameter in workload.model.parameters())
    assert not workload.model.training
    profile = workload.count(backward=True)
    assert profile.forward_flops == LLAMA_FORWARD
    assert (profile.tokens, profile.samples, profile.assumptions, profile.uncounted) == (SEQ, 1, (), {})
    real = load(str(checkpoint), seq=SEQ, device="cpu").count(backward=True)
    assert real.model_flops == profile.model_flops == 3 * LLAMA_FORWARD


def test_shards_and_one_file_store_the_same(checkpoint: Path, tmp_path_factory: Any) -> None:
    parts = tmp_path_factory.mktemp("parts")
    llama().save_pretrained(parts, max_shard_size="40KB")
    assert (parts / "model.safetensors.index.json").exists()
    whole, split = (load(str(folder), seq=SEQ).checkpoint for folder in (checkpoint, parts))
    assert whole is not None
    assert split is not None
    wanted = sum(parameter.numel() for parameter in llama().parameters())
    assert whole.elements == split.elements == wanted == whole.model_elements
    assert (whole.n_bytes, whole.by_dtype, whole.mismatch, split.mismatch) == (4 * wanted, {"F32": wanted}, None, None)
    assert split.files == len(list(parts.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("twice", [False, True])
def test_tied_weights_may_be_stored_once_or_twice(twice: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    if twice:
        stored = load_file(tmp_path / "model.safetensors")
        save_file({**stored, "lm_head.weight": torch.zeros(VOCAB, D)}, tmp_path / "model.safetensors")
    found = load(str(tmp_path)).checkpoint
    assert found is not None
    assert found.mismatch is None
    assert found.elements - found.model_elements == (VOCAB * D if twice else 0)


def test_a_config_that_is_not_the_weights_is_told_in_one_line(checkpoint: Path) -> None:
    target = changed(checkpoint, num_hidden_layers=3)
    layer = 3 * D * D + 3 * D * FF + 2 * D
    workload = load(target, seq=SEQ)
    assert f"{layer:,} fewer are stored" in workload.stored()["mismatch"]
    assert "model.layers.2" in workload.stored()["mismatch"]
    printed = CliRunner().invoke(app, ["count", target, "--seq", str(SEQ)])
    assert printed.exit_code == 0
    assert "mismatch" in printed.stdout
    whole = CliRunner().invoke(app, ["count", target, "--seq", str(SEQ), "--json", "-"])
    assert "fewer are stored" in whole.stderr
    json.loads(whole.stdout)


def test_quantised_storage_is_reported(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    stored = load_file(checkpoint / "model.safetensors")
    narrow = {name: tensor.to(torch.float8_e4m3fn) if tensor.dim() == 2 else tensor for name, tensor in stored.items()}
    save_file({**narrow, "model.scale": torch.zeros(3)}, checkpoint / "model.safetensors")
    found = load(changed(checkpoint, quantization_config={"quant_method": "fp8"})).checkpoint
    assert found is not None
    assert (found.quantisation, found.mismatch) == ("fp8, 8 bits", None)
    assert found.by_dtype["F8_E4M3"] == sum(t.numel() for t in stored.values() if t.dim() == 2)
    assert "quantised (fp8, 8 bits)" in found.describe()


def test_pickles_are_never_opened(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"not a pickle, and nobody looks")
    workload = load(str(checkpoint), seq=SEQ)
    assert workload.checkpoint is None
    assert workload.stored() == {}
    assert workload.count().forward_flops == LLAMA_FORWARD


def test_the_configs_dtype_is_the_models(checkpoint: Path) -> None:
    def dtypes(**how: Any) -> set[Any]:
        return {parameter.dtype for parameter in load(str(checkpoint), seq=SEQ, **how).model.parameters()}

    changed(checkpoint, dtype="bfloat16")
    assert dtypes() == {torch.bfloat16}
    assert dtypes(dtype="float64") == {torch.float64}
    changed(checkpoint, dtype=None, torch_dtype="float16")
    assert dtypes() == {torch.float16}
    changed(checkpoint, dtype="auto", torch_dtype=None)
    assert dtypes() == {torch.float32}


def test_without_architectures_the_usual_class_is_taken_and_told(checkpoint: Path) -> None:
    profile = load(changed(checkpoint, architectures=None), seq=SEQ).count()
    assert profile.forward_flops == LLAMA_FORWARD
    assert "LlamaForCausalLM, from AutoModelForCausalLM" in profile.assumptions[0]
    profile = load(changed(checkpoint, architectures=["LLaMAForCausalLM"]), seq=SEQ).count()
    assert "has no LLaMAForCausalLM" in profile.assumptions[0]
    with_head = load(changed(checkpoint, architectures=["LlamaModel"]), seq=SEQ).count()
    assert with_head.forward_flops == LLAMA_FORWARD - 2 * SEQ * D * VOCAB


def test_nothing_is_left_behind(checkpoint: Path) -> None:
    before = hub.constants.HF_HUB_OFFLINE, transformers.logging.get_verbosity(), torch.get_rng_state()
    load(str(checkpoint), seq=SEQ)
    assert (hub.constants.HF_HUB_OFFLINE, transformers.logging.get_verbosity()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


# --- what is refused ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; more than 2,048"),
        ({"num_hidden_layers": -1}, "not negative"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_hidden_layers": []}, "num_hidden_layers"),
        ({"num_hidden_layers": 1e308}, "num_hidden_layers"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"hidden_size": {}}, "hidden_size"),
        ({"vocab_size": 10**20}, "vocab_size is 1e\\+20"),
        ({"vocab_size": 10**400}, "vocab_size is 1e\\+400 or more"),
        ({"num_labels": 10**12}, "num_labels"),
        ({"num_labels": 10**6}, "num_labels is 1000000; more than 50,000"),
        ({"num_local_experts": 10**6}, "num_local_experts is 1000000; more than 8,192"),
        ({"num_local_experts": 8192, "num_hidden_layers": 64}, "8,192 experts in 64 layers; more than 65,536"),
        ({"text_config": {"num_layers": 10**12}}, "text_config.num_layers"),
        ({"depths": [2, 10**12]}, "depths.1"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": 3}, "no model_type"),
        ({"model_type": "zebra"}, "'zebra', which transformers"),
        ({"model_type": "zebra", "auto_map": {"AutoModel": "x.Y"}}, "--trust-remote-code"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": [3]}, "architectures"),
        ({"architectures": ["os.system"]}, "architectures"),
        ({"dtype": "load"}, "dtype is 'load'"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"hidden_act": "nonsense"}, "could not be built"),
        ({"x": [[]] * 1_000_001}, "beyond what any model needs"),
    ],
)
def test_configs_that_cannot_be_right_are_refused_at_once(checkpoint: Path, facts: dict[str, Any], reason: str) -> None:
    load(str(checkpoint), device="meta")  # what is imported first is not timed
    file = checkpoint / "config.json"
    file.write_text(json.dumps({k: v for k, v in {**json.loads(file.read_text()), **facts}.items() if v is not None}))
    start = time.perf_counter()
    with pytest.raises(FlopprofError, match=reason):
        load(str(checkpoint), device="meta")
    assert time.perf_counter() - start < 1


def test_pictures_that_no_tensor_holds_are_refused(tmp_path: Path) -> None:
    facts = {"model_type": "vit", "num_hidden_layers": 1, "image_size": 10**9, "patch_size": 16, "hidden_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(FlopprofError, match="asks for inputs that cannot be made"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "a" * 5000}))
    with pytest.raises(FlopprofError) as caught:
        load(str(tmp_path))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "holds a list"),
        (b"[" * 200_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a":' * 60 + b"1" + b"}" * 60, "beyond what any model needs"),
        (b" " * 10_000_001, "more than 10,000,000"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_files_that_are_no_config_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=reason):
        load(str(tmp_path))


def test_a_class_named_like_a_function_is_not_called(checkpoint: Path) -> None:
    profile = load(changed(checkpoint, architectures=["pipeline"]), seq=SEQ).count()
    assert "has no pipeline" in profile.assumptions[0]


def test_code_that_a_checkpoint_brings_runs_only_when_trusted(checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (checkpoint / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    target = changed(checkpoint, model_type="own", architectures=["Own"], auto_map=auto)
    with pytest.raises(UsageError, match="--trust-remote-code"):
        load(target)
    assert not marker.exists()
    assert load(target, seq=SEQ, trust_remote_code=True).count().forward_flops == LLAMA_FORWARD
    assert marker.exists()


def test_a_folder_without_a_config_and_a_missing_package_say_so(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"has no config\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(hf_config.importlib, "import_module", absent)
    with pytest.raises(MissingPackage, match="flopprof\\[hf\\]"):
        load(str(tmp_path))


def test_sizes_of_text_are_refused_where_they_mean_nothing(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="--seq is for Hugging Face models"):
        load("resnet18", seq=8)
    with pytest.raises(UsageError, match="leave --seq"):
        load(str(checkpoint), seq=8, inputs=["1x8:int64"])
    by_hand = load(str(checkpoint), inputs=[f"1x{SEQ}:int64"]).count()
    assert (by_hand.forward_flops, by_hand.tokens) == (LLAMA_FORWARD, SEQ)


# --- the hub ------------------------------------------------------------------------------------
class FakeHub:
    """What huggingface_hub gives, from a folder; each call is noted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, list[tuple[str, Any]]()

    def model_info(self, name: str, *, revision: str | None, timeout: float, files_metadata: bool) -> Any:
        assert files_metadata
        self.calls.append(("info", revision))
        files = [SimpleNamespace(rfilename=f.name, size=self.size(f)) for f in self.folder.iterdir()]
        return SimpleNamespace(sha="c0ffee", siblings=files)

    def size(self, file: Path) -> int | None:
        return file.stat().st_size

    def hf_hub_download(self, name: str, file: str, *, revision: str | None) -> str:
        self.calls.append((file, revision))
        alone = self.folder.parent / "cache"
        alone.mkdir(exist_ok=True)
        (alone / file).write_bytes((self.folder / file).read_bytes())
        return str(alone / file)

    status = 206

    def get(self, address: str, *, headers: dict[str, str], timeout: float) -> Any:
        """What an HTTP session answers to a range request."""
        _, revision, file = address.rsplit("/", 2)
        start, end = map(int, headers["range"].removeprefix("bytes=").split("-"))
        content = (self.folder / file).read_bytes()[start : end + 1]
        self.calls.append((f"{len(content)} bytes of {file}", revision))
        return SimpleNamespace(content=content, status_code=self.status)


@pytest.fixture
def online(tmp_path: Path, monkeypatch: Any) -> FakeHub:
    folder = tmp_path / "repo"
    llama().save_pretrained(folder, max_shard_size="40KB")
    fake = FakeHub(folder)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub.utils, "get_session", lambda: fake)
    monkeypatch.setattr(hub.utils, "hf_raise_for_status", lambda _: None)
    return fake


def test_from_the_hub_come_the_config_and_headers_only(online: FakeHub) -> None:
    workload = load("hf:some/llama@v2", seq=SEQ)
    assert workload.count().forward_flops == LLAMA_FORWARD
    assert workload.name == "hf:some/llama@v2"
    assert workload.checkpoint is not None
    assert workload.checkpoint.mismatch is None
    fetched = [what for what, _ in online.calls]
    # These files are shorter than what is first asked for: no weight of a longer one would be.
    shards = [f"{file.stat().st_size} bytes of {file.name}" for file in online.folder.glob("*.safetensors")]
    assert sorted(fetched) == sorted(["info", "config.json", "model.safetensors.index.json", *shards])
    assert {revision for what, revision in online.calls} == {"c0ffee", "v2"}
    assert online.calls[0] == ("info", "v2")


def test_long_headers_are_asked_for_in_two_pieces(online: FakeHub) -> None:
    from safetensors.torch import load_file, save_file

    for file in online.folder.glob("model*"):
        state = load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
        if "model.embed_tokens.weight" in state:
            kept = state
    save_file({"w": kept["model.embed_tokens.weight"]}, online.folder / "model.safetensors", {"note": "x" * 300_000})
    header = int.from_bytes((online.folder / "model.safetensors").read_bytes()[:8], "little")
    stored = load("hf:some/llama", seq=SEQ).checkpoint
    assert stored is not None
    assert stored.elements == VOCAB * D
    asked = [what for what, _ in online.calls if "bytes of" in what]
    assert asked == ["100000 bytes of model.safetensors", f"{header + 8 - 100_000} bytes of model.safetensors"]


def lie(file: Path, how: str) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    if how == "shape":
        header[name]["shape"] = [-1, -1]
    if how == "offsets":
        header[name]["data_offsets"] = [0, 2**60]
        header[name]["shape"] = [2**58]
    text = json.dumps(header).encode()
    file.write_bytes((2**62 if how == "length" else len(text)).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("length", "is cut short"),
        ("shape", "not what safetensors writes"),
        ("offsets", "overlap, or bytes of no tensor"),
    ],
)
def test_headers_on_the_hub_that_lie_are_refused(online: FakeHub, how: str, reason: str) -> None:
    lie(next(online.folder.glob("*.safetensors")), how)
    start = time.perf_counter()
    with pytest.raises(InvalidCheckpoint, match=reason):
        load("hf:some/llama")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(("more", "reason"), [(-1, "describes .* bytes of tensors, and holds"), (1, "and holds")])
def test_headers_are_checked_against_the_size_that_the_hub_gives(
    online: FakeHub, more: int, reason: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(online, "size", lambda file: file.stat().st_size + more * (file.suffix == ".safetensors"))
    with pytest.raises(InvalidCheckpoint, match=reason):
        load("hf:some/llama")


def test_a_hub_that_gives_no_sizes_is_believed(online: FakeHub, monkeypatch: Any) -> None:
    monkeypatch.setattr(online, "size", lambda file: None)
    found = load("hf:some/llama", seq=SEQ).checkpoint
    assert found is not None
    assert found.mismatch is None


def test_large_files_are_not_fetched(online: FakeHub, monkeypatch: Any) -> None:
    monkeypatch.setattr(online, "size", lambda file: 10**12)
    with pytest.raises(InvalidCheckpoint, match=r"config\.json has 1,000,000,000,000 bytes; more than 10,000,000"):
        load("hf:some/llama")
    assert [what for what, _ in online.calls] == ["info"]


def test_a_server_that_gives_whole_files_is_not_asked_for_weights(online: FakeHub) -> None:
    online.status = 200
    with pytest.raises(HubUnreachable, match="whole files alone"):
        load("hf:some/llama")


def test_a_shard_that_the_repository_lacks_is_said(online: FakeHub) -> None:
    next(online.folder.glob("*.safetensors")).unlink()
    with pytest.raises(InvalidCheckpoint, match="and the repository has no such file"):
        load("hf:some/llama")


def raised(kind: str) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        error = getattr(errors, kind)
        raise error.__new__(error)

    return fail


@pytest.mark.parametrize(
    ("kind", "expected", "reason"),
    [
        ("GatedRepoError", AccessDenied, "gated: accept its terms"),
        ("RepositoryNotFoundError", UnknownTarget, "has no model 'some/llama'"),
        ("RevisionNotFoundError", UnknownTarget, "no revision 'v2'"),
        ("EntryNotFoundError", UnknownTarget, "has no config.json"),
        ("HfHubHTTPError", HubUnreachable, "could not be fetched"),
        ("LocalEntryNotFoundError", HubUnreachable, "not in the cache"),
    ],
)
def test_each_refusal_of_the_hub_has_its_sentence(
    online: FakeHub, monkeypatch: Any, kind: str, expected: type[FlopprofError], reason: str
) -> None:
    monkeypatch.setattr(hub, "hf_hub_download", raised(kind))
    with pytest.raises(expected, match=reason):
        load("hf:some/llama@v2")


def test_without_network_the_cache_serves_or_the_error_says_so(online: FakeHub, monkeypatch: Any) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Name or service not known")

    online.model_info = unreachable  # type: ignore[method-assign]
    with pytest.raises(HubUnreachable, match="Name or service not known"):
        load("hf:some/llama")
    held = str(online.folder / "config.json")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: held)
    assert load("hf:some/llama", seq=SEQ).count().forward_flops == LLAMA_FORWARD


def test_offline_mode_asks_nobody(online: FakeHub, monkeypatch: Any) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match="offline mode is on"):
        load("hf:some/llama")
    held = str(online.folder / "config.json")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: held)
    assert load("hf:some/llama", seq=SEQ).count().forward_flops == LLAMA_FORWARD
    assert online.calls == []


@pytest.mark.parametrize("name", ["../x", "a/b/c", "a b", "org/name@"])
def test_names_that_are_no_repository_are_refused(name: str, online: FakeHub) -> None:
    with pytest.raises(UsageError):
        load(f"hf:{name}")
    assert online.calls == []


def test_a_shard_outside_the_repository_is_not_asked_for(online: FakeHub) -> None:
    (online.folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../x.safetensors"}}')
    with pytest.raises(InvalidCheckpoint, match="no safetensors file beside it"):
        load("hf:some/llama")
