"""Checkpoint files: what is saved is loaded again, a failure changes nothing, and bad input is refused in one line."""

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    change_config,
    change_header,
    files_in,
    refused,
    same,
    with_header,
)
from conftest import GOLDEN, GOLDEN_CASES, VARIANTS, each_variant, official_folder, random_ids, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hymba.convert
from hymba import Hymba, HymbaConfig
from hymba.convert import resolve, stored_parameters, to_official_shape
from hymba.files import atomic_write, write_files

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SHARD_BYTES = 110_000  # three shards of a tiny model
SHARD = "model-00001-of-00003.safetensors"


def load(folder: Path, dtype="auto", device="cpu") -> Hymba:
    return Hymba.from_pretrained(folder, dtype=dtype, device=device)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with a whole checkpoint."""
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ------------------------------------------------------------------------------------------------------ save and load


@each_variant
@pytest.mark.parametrize("shard_bytes", [None, SHARD_BYTES], ids=["one file", "shards"])
def test_a_saved_model_loads_bit_for_bit(changes, shard_bytes, tmp_path):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path, max_shard_bytes=shard_bytes)
    assert (tmp_path / INDEX_FILE).exists() == (shard_bytes is not None)
    loaded = load(tmp_path)
    assert same(loaded, model) and not loaded.training
    assert (loaded.lm_head.weight is loaded.embedding.weight) == model.config.tie_embeddings
    ids = random_ids(2, 20)
    assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept_but_for_A(dtype, tmp_path):
    model = tiny_model().to(dtype)
    for block in model.blocks:  # as after loading
        block.heads.mamba.A_log.data = block.heads.mamba.A_log.data.float()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert same(loaded, model) and torch.equal(loaded(random_ids(1, 9)), model(random_ids(1, 9)))
    kept = {name for name, x in load_file(tmp_path / WEIGHTS_FILE).items() if x.dtype == torch.float32}
    assert kept == {f"model.layers.{i}.mamba.A_log.0" for i in range(model.config.n_layers)}
    for name, x in load(tmp_path, torch.float32).named_parameters():
        assert torch.equal(x, dict(model.named_parameters())[name].float())
    assert load(tmp_path, "bfloat16").embedding.weight.dtype == torch.bfloat16
    refused(lambda: load(tmp_path, "int8"), "int8", "bfloat16")
    refused(lambda: load(tmp_path, torch.float64), "float64")


def test_gradients_flow_into_a_loaded_model(saved):
    """The map is private: training writes to memory, never to the file."""
    before = files_in(saved)
    model = load(saved)
    ids = random_ids(2, 12)
    model(ids, labels=ids).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not same(model, load(saved)) and files_in(saved) == before


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_a_checkpoint_of_the_released_code_is_written_the_same(case, tmp_path):
    load(GOLDEN / case).save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / WEIGHTS_FILE), load_file(GOLDEN / case / WEIGHTS_FILE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_names_shapes_and_dtypes_of_the_released_checkpoint():
    rows = (official_folder() / "parameters.tsv").read_text().splitlines()
    rows = [row.split("\t") for row in rows if row and not row.startswith("#")]
    theirs = {name: tuple(map(int, shape.split(","))) for name, shape, *_ in rows}
    with torch.device("meta"):
        model = Hymba(HymbaConfig.preset("1.5B"))
    ours = {official: tuple(to_official_shape(name, x).shape) for name, official, x in stored_parameters(model)}
    assert theirs.pop("lm_head.weight") == ours["model.embed_tokens.weight"]  # tied
    assert ours == theirs


@pytest.mark.parametrize(("norm", "shapes"), [("rms", [[8], [8]]), ("perhead-rms", [[1, 4, 1, 8], [1, 2, 1, 8]])])
def test_names_of_the_norms_of_queries_and_keys(norm, shapes, tmp_path):
    """Every layer has both, also one that reads another's keys (layer 2 here)."""
    tiny_model(qk_norm=norm).save_pretrained(tmp_path)
    found = {name: list(x.shape) for name, x in load_file(tmp_path / WEIGHTS_FILE).items() if "self_attn" in name}
    names = [f"model.layers.{i}.mamba.self_attn.{kind}_norm.weight" for i in range(5) for kind in "qk"]
    assert found == dict(zip(names, shapes * 5, strict=True))


def test_what_a_variant_does_not_have_is_not_stored(tmp_path):
    tiny_model(n_meta=0, mlp_activation="relu2").save_pretrained(tmp_path)
    names = load_file(tmp_path / WEIGHTS_FILE).keys()
    assert not any("memory" in name or "gate_proj" in name or "lm_head" in name for name in names)


def test_every_i_th_layer_reuse_is_read_from_the_file(tmp_path):
    model = tiny_model(global_layers=(), kv_groups=((0, 1, 2), (3, 4)))
    model.save_pretrained(tmp_path)
    change_config(tmp_path, kv_reuse_group=None, kv_reuse_every_i_layer=3)
    assert same(load(tmp_path), model)


@settings(max_examples=10)
@given(limit=st.integers(1, 100_000))
def test_shards_are_no_larger_than_asked_for(limit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    model = tiny_model()
    model.save_pretrained(folder, max_shard_bytes=limit)
    index = json.loads((folder / INDEX_FILE).read_text())
    held = {}
    for path in folder.glob("model-*.safetensors"):
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= limit
        held |= dict.fromkeys(tensors, path.name)
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in model.parameters())
    assert same(load(folder), model)


@settings(max_examples=10)
@given(limits=st.lists(st.sampled_from([None, 1, 10_000, 50_000]), min_size=2, max_size=4))
def test_the_last_save_is_the_one_that_is_loaded(limits, tmp_path_factory):
    """One file after shards, shards after one file, fewer shards after more: nothing is left that could be mistaken."""
    folder = tmp_path_factory.mktemp("again")
    bystanders = ["model-notes.safetensors", "model.safetensors.bak", "model_2.safetensors", "tokenizer.json"]
    for name in bystanders:
        (folder / name).write_text("not ours")
    for seed, limit in enumerate(limits):
        model = tiny_model(seed)
        model.save_pretrained(folder, max_shard_bytes=limit)
    assert same(load(folder), model)
    index = folder / INDEX_FILE
    weights = set(json.loads(index.read_text())["weight_map"].values()) | {INDEX_FILE} if limit else {WEIGHTS_FILE}
    assert {path.name for path in folder.iterdir()} == weights | {CONFIG_FILE, *bystanders}


@pytest.mark.parametrize("shard_bytes", [None, SHARD_BYTES], ids=["one file", "shards"])
def test_saving_over_the_files_that_a_model_lives_in(shard_bytes, tmp_path):
    """Its weights are views of the files; a rename leaves them on the old ones."""
    tiny_model().save_pretrained(tmp_path, max_shard_bytes=shard_bytes)
    model, other, ids = load(tmp_path), load(tmp_path), random_ids(1, 12)
    expected = model(ids)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    doubled = model(ids)
    model.save_pretrained(tmp_path, max_shard_bytes=shard_bytes)
    assert torch.equal(model(ids), doubled) and torch.equal(other(ids), expected)
    assert torch.equal(load(tmp_path)(ids), doubled)
    shutil.rmtree(tmp_path)
    assert torch.equal(model(ids), doubled) and torch.equal(other(ids), expected)


@on_linux
def test_loading_copies_nothing(saved):
    """In its own dtype on the CPU, every weight lies in the file's memory map."""
    model = load(saved)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if WEIGHTS_FILE in line]
    ranges = [tuple(int(end, 16) for end in row[0].split("-")) for row in maps]
    for name, parameter in model.named_parameters():
        assert any(first <= parameter.data_ptr() < last for first, last in ranges), name
    assert len(maps) == 1  # the reader's own map is gone


def test_tensors_at_odd_addresses_are_aligned(saved):
    """The format lets them begin anywhere; some writers make use of it."""
    path = saved / WEIGHTS_FILE
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 3).to_bytes(8, "little") + data[8 : 8 + length] + b"   " + data[8 + length :])
    loaded = load(saved)
    assert same(loaded, tiny_model())
    assert all(x.data_ptr() % x.element_size() == 0 for x in loaded.parameters())


# ------------------------------------------------------------------------------------------------------ atomic writes


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
        assert temporary.parent == path.parent and not path.exists()
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise error
        assert files_in(path.parent) == {"file": b"old"}
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert files_in(path.parent) == {"file": b"new"}


def test_files_that_belong_together_are_replaced_together(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    write_files({path: lambda temporary: temporary.write_text("old") for path in paths})

    def full(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writers = {path: lambda temporary: temporary.write_text("new") for path in paths}
    refused(lambda: write_files(writers | {paths[2]: full}), str(tmp_path), "No space left on device")
    assert files_in(tmp_path) == dict.fromkeys("abc", b"old")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_permissions_are_those_of_any_new_file(umask, tmp_path):
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_text("")
        tiny_model().save_pretrained(tmp_path, max_shard_bytes=100_000)
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}
    finally:
        os.umask(before)


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "blob").write_text("shared by others")
    (tmp_path / "link").symlink_to("blob")
    write_files({tmp_path / "link": lambda temporary: temporary.write_text("mine")})
    assert files_in(tmp_path) == {"blob": b"shared by others", "link": b"mine"}


# ----------------------------------------------------------------------------------------------------- failing to save


def failing_at(n: int, error: Exception):
    """`save_file` that writes half a file and fails, the n-th time that it is called"""
    calls = 0

    def save(tensors, path, metadata=None):
        nonlocal calls
        calls += 1
        if calls == n:
            Path(path).write_bytes(b"half")
            raise error
        save_file(tensors, path, metadata=metadata)

    return save


def assert_untouched(folder: Path, before: dict[str, bytes], model: Hymba) -> None:
    assert files_in(folder) == before
    assert same(load(folder), model)


@pytest.mark.parametrize("old", [None, SHARD_BYTES], ids=["over one file", "over shards"])
@pytest.mark.parametrize("new", [None, SHARD_BYTES], ids=["one file", "shards"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(old, new, tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_bytes=old)
    before = files_in(tmp_path)
    for n in (1, 2, 3) if new else (1,):
        for error in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("a crash"), KeyboardInterrupt()):
            monkeypatch.setattr(hymba.convert, "save_file", failing_at(n, error))
            if isinstance(error, OSError):
                save = lambda: tiny_model(1).save_pretrained(tmp_path, max_shard_bytes=new)  # noqa: E731
                refused(save, str(tmp_path), "No space left on device")
            else:
                with pytest.raises(type(error)):
                    tiny_model(1).save_pretrained(tmp_path, max_shard_bytes=new)
            assert_untouched(tmp_path, before, model)


@contextmanager
def file_size_limit(size: int):
    """Writing beyond `size` fails, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 1000, 30_000, 150_000])
def test_the_operating_system_stops_the_write(size, saved):
    model, before = load(saved), files_in(saved)
    with file_size_limit(size):
        refused(lambda: tiny_model(1).save_pretrained(saved), str(saved), "File too large")
    assert_untouched(saved, before, model)


FULL_DISK = """
import sys
from pathlib import Path
import torch
from hymba import Hymba, HymbaConfig, UserError
folder = Path(sys.argv[1]) / "model"
model = Hymba(HymbaConfig.preset("tiny"))  # 1.7 MB
model.save_pretrained(folder)
before = {path.name: path.read_bytes() for path in folder.iterdir()}
for shard_bytes in (None, 400_000):
    for mapped in (model, Hymba.from_pretrained(folder)):
        try:
            mapped.save_pretrained(folder, max_shard_bytes=shard_bytes)
        except UserError as error:
            assert "No space left" in str(error) and len(str(error).splitlines()) == 1, error
        else:
            raise SystemExit("a full disk was not noticed")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
loaded = Hymba.from_pretrained(folder)
assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), model.parameters(), strict=True))
"""


@on_linux
def test_a_full_disk(tmp_path):
    """A disk of 3 MB in the namespace of a process of its own: it goes with the process, and root is not needed."""
    mount = 'mount -t tmpfs -o size=3m none "$1"'
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*enter, mount, "sh", tmp_path], capture_output=True).returncode:
        pytest.skip("this system gives no file system to a process of its own")
    command = [*enter, f'{mount} && exec "$2" -c "$3" "$1"', "sh", tmp_path, sys.executable, FULL_DISK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_places_that_cannot_be_written(tmp_path):
    model = tiny_model()
    (tmp_path / "file").write_text("")
    refused(lambda: model.save_pretrained(tmp_path / "file"), "file", "is a file")
    refused(lambda: model.save_pretrained(tmp_path / "file" / "below"), "below")
    refused(lambda: model.save_pretrained(tmp_path / "no\0name"), r"no\x00name", "no file name")
    refused(lambda: model.save_pretrained(tmp_path / ("x" * 300)), "xxx", "too long")
    (tmp_path / "model" / CONFIG_FILE).mkdir(parents=True)  # found out before the weights are replaced
    refused(lambda: model.save_pretrained(tmp_path / "model"), CONFIG_FILE, "is a folder")
    assert [path.name for path in (tmp_path / "model").iterdir()] == [CONFIG_FILE]


def test_what_cannot_be_saved(tmp_path):
    refused(lambda: tiny_model().double().save_pretrained(tmp_path), "float64", "bfloat16")
    for limit in (0, -1):
        refused(lambda limit=limit: tiny_model().save_pretrained(tmp_path, max_shard_bytes=limit), "max_shard_bytes")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ refusals


def test_paths_that_are_no_checkpoint(saved, tmp_path, monkeypatch):
    refused(lambda: load(saved / CONFIG_FILE), CONFIG_FILE, "is a file")
    refused(lambda: load(tmp_path / "nowhere"), "nowhere", "no such folder")
    refused(lambda: load("no\0name"), "no such folder")
    refused(lambda: load("x" * 500), "too long")
    (tmp_path / "empty").mkdir()
    refused(lambda: load(tmp_path / "empty"), "empty", f"{CONFIG_FILE} is missing")

    def offline(*arguments, **options):
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused(lambda: load("owner/name"), "owner/name", "no network")
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **options: asked.update(options) or str(saved))
    assert resolve("owner/name") == saved
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])


def test_a_device_that_is_not_there(saved):
    for device in ("nonsense", "cuda:99"):
        refused(lambda device=device: load(saved, device=device), device)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "hymba.ckpt"])
def test_a_pickle_is_refused_and_never_opened(name, saved):
    (saved / WEIGHTS_FILE).unlink()
    (saved / name).mkdir()  # reading it would fail
    refused(lambda: load(saved), name, "pickle", "convert it to safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (saved / INDEX_FILE).write_text(json.dumps(index))
    refused(lambda: load(saved), name, "safetensors")


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xfe", b"{", b"[1]", b"null", b'"hymba"', b"[" * 100_000, b'{"model_type": "hymba"', b"1" * 5000,
     b'{"vocab_size": ' + b"1" * 5000 + b"}", b"\x00" * 100, b"{}", b'{"model_type": "hymba", "hidden_size": 1e999}'],
)  # fmt: skip
def test_a_config_file_that_is_none(data, saved):
    (saved / CONFIG_FILE).write_bytes(data)
    refused(lambda: load(saved), CONFIG_FILE)


def test_a_config_file_that_is_too_large(saved):
    with open(saved / CONFIG_FILE, "r+b") as file:
        file.truncate(2**40)  # takes no room on the disk
    refused(lambda: load(saved), CONFIG_FILE, "too large")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, SHARD])
def test_things_that_are_no_files(name, tmp_path):
    shards = name in (INDEX_FILE, SHARD)
    tiny_model().save_pretrained(tmp_path, max_shard_bytes=SHARD_BYTES if shards else None)
    path = tmp_path / name
    path.unlink()
    words = (name, "missing") if name in (CONFIG_FILE, SHARD) else ("neither", WEIGHTS_FILE, INDEX_FILE)
    refused(lambda: load(tmp_path), *words)
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        make()
        refused(lambda: load(tmp_path), name, "not a file")
        path.rmdir() if path.is_dir() else path.unlink()
    path.symlink_to("gone")
    refused(lambda: load(tmp_path), name, "missing")
    path.unlink()
    path.write_bytes(b"")
    refused(lambda: load(tmp_path), name)


def test_no_permission(saved, tmp_path):
    if os.geteuid() == 0:
        try:
            os.seteuid(65534)  # root may read everything, so be nobody
        except OSError:
            pytest.skip("cannot stop being root here")
    try:
        os.chmod(saved / WEIGHTS_FILE, 0)
    except PermissionError:  # nobody: not even the folder can be entered
        refused(lambda: load(saved), str(saved), "ermission denied")
        refused(lambda: tiny_model().save_pretrained(saved), str(saved), "ermission denied")
    else:
        try:
            refused(lambda: load(saved), WEIGHTS_FILE, "ermission denied")
        finally:
            os.chmod(saved / WEIGHTS_FILE, 0o600)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


@pytest.mark.parametrize("where", ["start", "length", "header", "brace", "body", "end"])
def test_a_truncated_file(where, saved):
    path = saved / WEIGHTS_FILE
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    cut = {"start": 0, "length": 5, "header": 8 + header // 2, "brace": 7 + header, "body": len(data) // 2, "end": -1}
    path.write_bytes(data[: cut[where]])
    refused(lambda: load(saved), WEIGHTS_FILE, "no intact safetensors file")


EMBEDDING, NORM = "model.embed_tokens.weight", "model.layers.3.pre_moe_layernorm.weight"


def edited(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors = {name: x.clone() for name, x in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), [NORM, "is missing"]),
        (lambda t: [t.pop(NORM), t.pop(EMBEDDING)], [EMBEDDING, "and 1 more", "are missing"]),
        (lambda t: t.update(extra=torch.zeros(1)), ["'extra'", "is not part of this model"]),
        (lambda t: t.update({"a\nb" * 9999: torch.zeros(1)}), [r"a\nb", "is not part of this model"]),
        (lambda t: t.update({NORM: torch.zeros(31)}), [NORM, "[31]", "[32]"]),
        (lambda t: t.update({NORM: torch.zeros(1, 32)}), [NORM, "[1, 32]", "[32]"]),
        (lambda t: t.update({NORM: torch.tensor(1.0)}), [NORM, "[]", "[32]"]),
        (lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)}), [NORM, "I8", "floating point"]),
        (lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int64)}), [NORM, "I64", "floating point"]),
        (lambda t: t.update({NORM: torch.zeros(32, dtype=torch.bool)}), [NORM, "BOOL", "floating point"]),
        (lambda t: t.update({NORM: torch.zeros(32, dtype=torch.float8_e4m3fn)}), [NORM, "F8_E4M3", "floating point"]),
        (lambda t: [t.pop(name) for name in list(t) if ".layers.4." in name], ["num_hidden_layers=5", "of 4"]),
        (lambda t: t.update({"model.layers.5.x": torch.zeros(1)}), ["num_hidden_layers=5", "of 6"]),
        (lambda t: t.clear(), ["num_hidden_layers=5", "of 0"]),
        (lambda t: t.update({f"model.layers.{'9' * 5000}.x": torch.zeros(1)}), ["num_hidden_layers=5", "of 6"]),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_models(change, words, saved):
    edited(saved, change)
    refused(lambda: load(saved), str(saved), *words)


def test_a_copy_of_the_tied_embedding_must_be_one(saved):
    edited(saved, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    assert same(load(saved), tiny_model())
    for other in (lambda x: x + (x == x.max()), lambda x: x[:-1].clone(), lambda x: x.bfloat16(), lambda x: x.long()):
        edited(saved, lambda t, other=other: t.update({"lm_head.weight": other(t[EMBEDDING])}))
        refused(lambda: load(saved), "lm_head.weight", "tie_word_embeddings")
    change_config(saved, tie_word_embeddings=False)
    edited(saved, lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1}))
    loaded = load(saved)
    assert torch.equal(loaded.lm_head.weight, loaded.embedding.weight + 1)
    edited(saved, lambda t: t.pop("lm_head.weight"))
    refused(lambda: load(saved), "lm_head.weight", "missing")


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]", b"null", b'{"a": 1}', b'{"a": {}}', b"[" * 100_000, b'{"a": {"dtype": "F32", "shape": [2]}}',
     b'{"a": {"dtype": "F99", "shape": [], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
     b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e30]}}',
     b'{"a": {"dtype": "F32", "shape": [4611686018427387905], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
     b'{"__metadata__": 3}', b'{"__metadata__": {"a": 1}}', b'\xff\xfe{"a": 1}'],
)  # fmt: skip
def test_a_header_that_lies(header, saved):
    (saved / WEIGHTS_FILE).write_bytes(with_header(header, b"\0" * 64))
    refused(lambda: load(saved), WEIGHTS_FILE)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(length, saved):
    path = saved / WEIGHTS_FILE
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(lambda: load(saved), WEIGHTS_FILE)


@pytest.mark.parametrize("offsets", [[0, 4], [0, 2**40], [2**63, 2**63 + 128], [4, 132], [128, 0]])
def test_offsets_that_lie(offsets, saved):
    change_header(saved / WEIGHTS_FILE, lambda header: header[NORM].update(data_offsets=offsets))
    refused(lambda: load(saved), WEIGHTS_FILE)


@pytest.fixture
def sharded(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model", max_shard_bytes=SHARD_BYTES)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (None, ["weight_map"]),
        ([], ["weight_map"]),
        ("x", ["weight_map"]),
        ({"a": 1}, ["weight_map"]),
        ({"a": None}, ["weight_map"]),
        ({"a": [SHARD]}, ["weight_map"]),
        ({}, ["num_hidden_layers=5", "of 0"]),
        ({"a": "../model/" + SHARD}, ["'../model/", "beside it"]),
        ({"a": "/etc/passwd"}, ["'/etc/passwd'", "beside it"]),
        ({"a": ".."}, ["'..'", "beside it"]),
        ({"a": ""}, ["''", "beside it"]),
        ({"a": "x\0.safetensors"}, ["is missing"]),
        ({"a": "x" * 10_000 + ".safetensors"}, ["xxx"]),
        ({"a": CONFIG_FILE}, [CONFIG_FILE, "safetensors"]),
        ({"a": "other.safetensors"}, ["other.safetensors", "is missing"]),
        ({"a": SHARD}, [SHARD, "'a'", "is missing"]),
    ],
)
def test_an_index_that_lies(weight_map, words, sharded):
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    refused(lambda: load(sharded), *words)


def test_an_index_that_is_none(sharded):
    for data in (b"", b"{", b"[]", b"3", b"{}", b"\xff", b"[" * 100_000):
        (sharded / INDEX_FILE).write_bytes(data)
        refused(lambda: load(sharded), INDEX_FILE)


def test_an_index_that_names_the_wrong_shard(sharded):
    index = json.loads((sharded / INDEX_FILE).read_text())
    name = next(tensor for tensor, shard in index["weight_map"].items() if shard != SHARD)
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": index["weight_map"] | {name: SHARD}}))
    refused(lambda: load(sharded), SHARD, name, "is missing", INDEX_FILE)
    del index["weight_map"][name]
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    refused(lambda: load(sharded), name, "is missing")


def test_the_config_of_another_model(saved):
    change_config(saved, hidden_size=40, conv_dim=None)
    refused(lambda: load(saved), "shape", "config.json asks for")


def test_every_variant_is_here():
    """Save and load are tested with all that a config may say."""
    spoken_of = {name for changes in VARIANTS.values() for name in changes}
    assert {"rope", "qk_norm", "kv_groups", "window", "n_meta", "tie_embeddings", "mlp_activation"} <= spoken_of
