"""Conversion keeps every bit, on every path between the three formats, and killed runs resume."""

import itertools
import json
import os
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import convert_tools as tools
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from convert_tools import ANY, DTYPES, STORIES, same, small
from forked import Forked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.checkpoint.arrays import ORBAX
from llama_jax.config import MODELS
from llama_jax.convert import copy, formats, torch_files
from llama_jax.convert import logits as verification
from llama_jax.convert import tensors as weights
from llama_jax.convert.__main__ import main
from llama_jax.convert.job import convert, create_writer, make_plan, open_folder
from llama_jax.convert.sources import SourceCheckpoint


@pytest.fixture(autouse=True)
def bits_alone(request, monkeypatch):
    """Random bits give no finite logits, so most tests verify tensors only."""
    if "logits" not in request.node.name:
        monkeypatch.setattr(verification, "compare_logits", lambda *args: "not in this test")


def restore(folder: Path) -> dict:
    """The weights of a checkpoint, restored by Orbax without our code."""
    tree = json.loads((folder / "manifest.json").read_text())["tensors"]
    abstract: dict = {}
    for path, about in tree.items():
        *parents, name = path.split("/")
        node = abstract
        for parent in parents:
            node = node.setdefault(parent, {})
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shape, dtype = about["shape"], DTYPES[about["dtype"]]
        node[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    with ocp.CheckpointManager(folder / "steps") as manager:
        args = ocp.args.Composite(model=ocp.args.StandardRestore(abstract))
        return jax.tree.map(np.asarray, dict(manager.restore(0, args=args).model))


def read_all(folder: Path) -> dict:
    """Every tensor of the torch files of a folder: {file: {name: array}}."""
    out = {}
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.pth")]):
        reader = torch_files.read if path.suffix == ".pth" else formats.read_safetensors
        mapped = formats.map_file(path)
        out[path.name] = {n: formats.view(r, mapped).copy() for n, r in reader(path).items()}
    return out


def convert_verified(*args, **kwargs) -> Path:
    """convert with --verify."""
    return convert(*args, verify=True, **kwargs)


def round_trip(tmp: Path, cfg, dtype, shards, files, more_shards, by_rows=False) -> None:
    """Meta -> Orbax -> HF -> Meta -> HF -> Orbax, each compared with plain reshapes."""
    state = tools.meta_state(cfg, dtype)
    meta = tools.make_meta(tmp / "meta", state, cfg, shards, by_rows)
    expected = tools.our_tree(state, cfg)
    one = convert_verified(meta, tmp / "one", context=cfg.context)
    assert same(restore(one), expected)
    two = convert_verified(one, tmp / "two", to="hf", shards=files)
    held = read_all(two)
    assert len(held) == files
    assert same(
        {k: v for file in held.values() for k, v in file.items()}, tools.hf_state(state, cfg)
    )
    three = convert_verified(two, tmp / "three", to="meta", shards=more_shards)
    assert all(zipfile.ZipFile(p).testzip() is None for p in three.glob("*.pth"))
    if cfg.tie_embeddings:  # Meta's code needs the output matrix written out
        state = state | {"output.weight": state["tok_embeddings.weight"]}
    assert same(dict(enumerate(read_all(three).values())),
                dict(enumerate(tools.meta_shards(state, more_shards))))  # fmt: skip
    four = convert_verified(three, tmp / "four", to="hf")
    five = convert_verified(four, tmp / "five", to="orbax")
    manifests = [
        json.loads((p / "manifest.json").read_text()) for p in (one, two, three, four, five)
    ]
    assert all(m["tensors"] == manifests[0]["tensors"] for m in manifests)
    assert all(m["model"] == manifests[0]["model"] for m in manifests)
    assert same(restore(five), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kv_heads", "shards", "files", "more"), [(8, 8, 1, 2), (4, 1, 5, 4), (2, 2, 20, 1)]
)
def test_round_trips_keep_every_bit(tmp_path, dtype, tied, kv_heads, shards, files, more):
    cfg = small(num_kv_heads=kv_heads, tie_embeddings=tied)
    round_trip(tmp_path, cfg, DTYPES[dtype], shards, files, more)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_round_trips_of_random_shapes(tmp_path_factory, data):
    draw = lambda *range_: data.draw(st.integers(*range_))
    many = data.draw(st.sampled_from([1, 2, 3, 4]))  # shards
    kv, group, half = many * draw(1, 2), draw(1, 3), draw(1, 5)
    cfg = small(
        num_kv_heads=kv, num_heads=kv * group, head_dim=2 * half, dim=kv * group * 2 * half,
        num_layers=draw(1, 3), ffn_dim=many * draw(1, 9), vocab_size=many * draw(1, 11),
        tie_embeddings=data.draw(st.booleans()),
    )  # fmt: skip
    files = data.draw(st.integers(1, len(weights.layer_tensors(cfg))))
    dtype = DTYPES[data.draw(st.sampled_from(list(DTYPES)))]
    round_trip(tmp_path_factory.mktemp("round"), cfg, dtype, many, files, many, draw(0, 1) == 1)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("files", [1, 4])
def test_safetensors_and_bin_files_are_read(tmp_path, suffix, files):
    cfg = small()
    state = tools.meta_state(cfg, DTYPES["float16"])
    source = tools.make_hf(tmp_path / "hf", state, cfg, files, suffix)
    assert same(restore(convert_verified(source, tmp_path / "out")), tools.our_tree(state, cfg))


def test_small_row_blocks_give_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 100)
    monkeypatch.setattr(weights, "BLOCK", 200)
    monkeypatch.setattr(copy, "_MAX_BLOCK", 100)
    round_trip(tmp_path, small(), DTYPES["float32"], 2, 3, 4)


def test_dtype_casts_round_to_nearest_even_and_refuse_overflow(tmp_path):
    cfg = small()
    state = tools.meta_state(cfg, DTYPES["float32"], make=tools.random_values)
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    out = convert_verified(source, tmp_path / "out", dtype="bfloat16")
    cast = {k: v.astype(DTYPES["bfloat16"]) for k, v in state.items()}
    assert same(restore(out), tools.our_tree(cast, cfg))
    state["norm.weight"] = np.full(cfg.dim, 1e6, np.float32)
    source = tools.make_hf(tmp_path / "large", state, cfg)
    with pytest.raises(ValueError, match=r"norm holds 1000000.*overflows in float16"):
        convert(source, tmp_path / "none", dtype="float16")
    assert not (tmp_path / "none").exists()


def test_a_shared_storage_and_strides_are_followed(tmp_path):
    """Norms that are views of a larger tensor's storage, as in Meta's sharded files."""
    torch = pytest.importorskip("torch")
    cfg = small()
    state = tools.meta_state(cfg, DTYPES["float32"], make=tools.random_values)
    tensors = {k: torch.from_numpy(v.copy()) for k, v in state.items()}
    whole = torch.randn(cfg.dim, 7)
    tensors["norm.weight"] = whole[:, 3]
    tensors["output.weight"] = torch.from_numpy(state["output.weight"].T.copy()).T
    tensors["rope.freqs"] = torch.randn(3)
    source = tools.make_meta(tmp_path / "meta", state, cfg)
    torch.save({"model": tensors}, source / "consolidated.00.pth")
    state["norm.weight"] = whole[:, 3].numpy()
    assert same(restore(convert_verified(source, tmp_path / "out")), tools.our_tree(state, cfg))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_reads_what_we_write_and_we_what_torch_writes(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    numpy = lambda t: (
        t.view(torch.int16 if t.itemsize == 2 else torch.int32).numpy().view(DTYPES[dtype])
    )
    tensors = {
        "a": torch.randn(5, 70).to(kind),
        "b": torch.randn(3).to(kind),
        "c": torch.zeros(0, 4, dtype=kind),
    }
    tensors["d"] = torch.nn.Parameter(torch.randn(2, 2).to(kind))
    torch.save(tensors, tmp_path / "theirs.pth")
    mapped = formats.map_file(tmp_path / "theirs.pth")
    read = {
        n: formats.view(r, mapped) for n, r in torch_files.read(tmp_path / "theirs.pth").items()
    }
    assert same(read, {n: numpy(t.detach()) for n, t in tensors.items()})
    tools.save_torch(tmp_path / "ours.pth", read)
    for mmap in (False, True):
        back = torch.load(tmp_path / "ours.pth", weights_only=True, mmap=mmap)
        assert same({n: numpy(t) for n, t in back.items()}, read)
        assert all(t.data_ptr() % 64 == 0 for t in back.values() if mmap and t.numel())


def test_large_records_get_zip64_headers(tmp_path):
    """A storage over 4 GB, in a sparse file."""
    path = tmp_path / "big.pth"
    plan = torch_files.plan(
        path, {"a": ((70000, 70000), np.dtype(np.int8)), "b": ((3,), np.dtype(np.int8))}
    )
    with path.open("wb") as f:
        for offset, data in torch_files.headers(plan, dict.fromkeys(plan.slices, 0)):
            f.seek(offset)
            f.write(data)
        f.seek(plan.slices["b"].offset)
        f.write(b"\1\2\3")
    regions = torch_files.read(path)
    assert regions == plan.slices
    assert regions["b"].offset > 1 << 32
    torch = pytest.importorskip("torch")
    assert torch.load(path, weights_only=True, mmap=True)["b"].tolist() == [1, 2, 3]


def test_safetensors_agrees_with_the_package(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays = {n: tools.random_bits((3, 5), d, rng) for n, d in DTYPES.items()}
    tools.save_safetensors(tmp_path / "ours.safetensors", arrays)
    assert same(safetensors.load_file(tmp_path / "ours.safetensors"), arrays)
    safetensors.save_file(arrays, tmp_path / "theirs.safetensors")
    mapped = formats.map_file(tmp_path / "theirs.safetensors")
    regions = formats.read_safetensors(tmp_path / "theirs.safetensors")
    assert same({n: formats.view(r, mapped) for n, r in regions.items()}, arrays)


def test_a_step_of_a_training_run_is_a_source(tmp_path):
    """In each format that Orbax writes; the newest step is used unless one is given."""
    cfg = small()
    states = [
        tools.meta_state(cfg, DTYPES["float32"], seed, tools.random_values) for seed in (1, 2)
    ]
    made = convert_verified(tools.make_hf(tmp_path / "hf", states[0], cfg), tmp_path / "made")
    num_shards = [
        dict(use_ocdbt=True, use_zarr3=True),
        dict(use_ocdbt=False, use_zarr3=False),
        ORBAX,
    ]
    for i, way in enumerate(num_shards):
        run = tmp_path / f"run{i}"
        run.mkdir()
        (run / "model.json").write_text((made / "model.json").read_text())
        handler = ocp.PyTreeCheckpointHandler(**way)
        with ocp.CheckpointManager(run / "steps", item_handlers={"model": handler}) as manager:
            for step, state in enumerate(states):
                tree = jax.tree.map(jax.numpy.asarray, tools.our_tree(state, cfg))
                args = ocp.args.PyTreeSave(tree)
                manager.save(step * 10, args=ocp.args.Composite(model=args), force=True)
        for source, state in [(run, states[1]), (run / "steps/0", states[0])]:
            out = convert_verified(source, tmp_path / f"out{i}{source.name}")
            assert same(read_all(out)["model.safetensors"], tools.hf_state(state, cfg))


def _tensors_done(partial: Path) -> int:
    record = partial / "progress.jsonl"
    return len(record.read_text().splitlines()) - 1 if record.exists() else 0


def convert_slowly(arguments: list[str]) -> None:
    read = copy._read
    copy._read = lambda *args: time.sleep(0.05) or read(*args)
    sys.exit(main(arguments))


@pytest.mark.parametrize("to", ["orbax", "meta", "hf"])
def test_a_killed_run_resumes_and_rewrites_damaged_tensors(tmp_path, to, monkeypatch, capsys):
    cfg = small(num_layers=8)
    state = tools.meta_state(cfg, DTYPES["bfloat16"])
    source = tools.make_meta(tmp_path / "meta", state, cfg, 2)
    whole = convert_verified(source, tmp_path / "whole", to=to)
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    # The kill: a process that writes slowly gets SIGKILL after a few units.
    process = Forked(convert_slowly, [str(source), str(target), "--to", to])
    while _tensors_done(partial) < 6:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not target.exists()
    with pytest.raises(ValueError, match=r"is missing|not a|cut off|damaged|no finished"):
        open_folder(partial)
    done = [
        json.loads(line)["tensor"]
        for line in (partial / "progress.jsonl").read_text().splitlines()[1:]
    ]
    _damage(partial, to, source, done[0])
    with (partial / "progress.jsonl").open("a") as f:
        f.write('{"tensor": "blocks/mlp/down/7", "sha2')  # cut off in the middle
    read, again = copy._read, []
    monkeypatch.setattr(copy, "_read", lambda p, u, *a: again.append(u.name) or read(p, u, *a))
    convert(source, target, to=to)
    assert "continuing" in capsys.readouterr().out
    assert done[0] in again  # damaged
    assert not set(done[1:]) & set(again)
    assert not partial.exists()
    if to == "orbax":
        assert same(restore(target), tools.our_tree(state, cfg))
    else:
        assert [p.read_bytes() for p in sorted(target.glob("*.*"))] == [
            p.read_bytes() for p in sorted(whole.glob("*.*"))
        ]


def _damage(partial: Path, to, source: Path, tensor: str) -> None:
    """Flip a bit of a tensor that the record lists as finished."""
    row, _, layer = tensor.rpartition("/") if tensor[-1].isdigit() else (tensor, "", "")
    if to == "orbax":
        chunk = partial / "steps/0/model" / row.replace("/", ".") / "c"
        path = next(p for p in (chunk / layer).rglob("*") if p.is_file())
        offset = 3
    else:
        plan = make_plan(open_folder(source), partial.with_suffix(""), to, max_memory=64 << 30)
        location = create_writer(plan).weights.shards[tensor][0].slice
        path, offset = location.path, location.offset
    with path.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)
        f.seek(offset)
        f.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_files_are_synced_before_the_rename(tmp_path, to, monkeypatch):
    """Every file and folder of the result is synced; then the folder is renamed."""
    cfg = small()
    state = tools.meta_state(cfg, DTYPES["float32"], make=tools.random_values)
    synced, fsync, rename, renamed = set(), os.fsync, Path.rename, []

    def note(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(path, target):
        if path.is_dir():
            renamed.append(target)
            assert not [p for p in [path, *path.rglob("*")] if p.stat().st_ino not in synced]
        return rename(path, target)

    source = tools.make_meta(tmp_path / "meta", state, cfg)
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", check)
    convert(source, tmp_path / "made", to=to)
    assert tmp_path / "made" in renamed


def test_another_conversion_does_not_continue_a_partial_one(tmp_path, capsys):
    cfg = small()
    for i in (0, 1):
        tools.make_hf(tmp_path / f"hf{i}", tools.meta_state(cfg, DTYPES["float16"], i), cfg)
    plan_of = lambda i: (tmp_path / f"hf{i}", tmp_path / "out")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "progress.jsonl").write_text(
        '{"from": [], "model": {}, "to": "hf", "shards": null, "dtypes": {}, "format": 1}\n'
    )
    (partial / "model.safetensors").write_bytes(b"left over")
    (partial / "steps").mkdir()
    convert(*plan_of(1))
    assert "starting over" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "model.json",
        "steps",
    ]


def test_concurrent_conversions_to_one_destination_are_refused(tmp_path):
    cfg = small()
    found = open_folder(
        tools.make_hf(tmp_path / "hf", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    )
    plan = copy.Plan(found, tmp_path / "out", "meta", found.dtypes(), None, 2 << 30)
    with copy.open_progress(plan), pytest.raises(ValueError, match="another conversion"):
        copy.open_progress(plan)


def test_verify_finds_one_changed_bit(tmp_path, monkeypatch):
    cfg = small()
    source = tools.make_hf(tmp_path / "hf", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    write = weights.TorchWeights.write

    def flip(self, tensor, start, piece):
        if tensor.name == "blocks/attention/k/1":
            piece = piece.copy()
            piece.view(np.uint8)[0, 0] ^= 1
        write(self, tensor, start, piece)

    monkeypatch.setattr(weights.TorchWeights, "write", flip)
    with pytest.raises(ValueError, match="differ from the source: blocks/attention/k/1"):
        convert(source, tmp_path / "out", to="meta", verify=True)
    assert not (tmp_path / "out").exists()


CAPPED = """
import resource, sys
from pathlib import Path
from llama_jax.convert import copy, tensors as weights
from llama_jax.convert.__main__ import main
copy._WORKERS, copy._MAX_BLOCK = 2, int(sys.argv[1])
weights.CHUNK = copy._MAX_BLOCK
data = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmData")]
limit = (int(data[0].split()[1]) << 10) + (64 << 20)  # two threads, their stacks, their pieces
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(main([*sys.argv[2:], "--to", "meta"]))
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """With 64 MiB a process converts 190 MB in small row blocks, but not in large ones."""
    shape = dict(dim=1024, num_heads=8, num_kv_heads=8, head_dim=128, num_layers=1)
    cfg = small(**shape, ffn_dim=1024, vocab_size=20480)
    ones = lambda shape, dtype, rng: np.ones(shape, dtype)
    state = tools.meta_state(cfg, DTYPES["float32"], make=ones)
    assert sum(w.nbytes for w in state.values()) > 180 << 20
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    for piece, status in [(2 << 20, 0), (1 << 30, 1)]:
        command = [sys.executable, "-c", CAPPED, str(piece), str(source), str(tmp_path / "out")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == status, run.stderr[-2000:]
        if status == 0:
            (tmp_path / "out").rename(tmp_path / "kept")
    assert "memory" in run.stderr
    regions = torch_files.read(tmp_path / "kept/consolidated.00.pth")
    assert len(regions) == len(state)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_row_blocks_of_published_models_fit_the_default_memory(name, dtype):
    """The largest row block of any tensor of the 65B and 405B shapes, times the copies held."""
    cfg = MODELS[name]

    class Any_:
        dtype = lambda self, tensor: DTYPES["float32"]

    found = SourceCheckpoint("hf", Path(), cfg, Any_(), [], {}, [], [], [])
    dtypes = dict.fromkeys((r.path for r in weights.TABLE), DTYPES[dtype])
    plan = copy.Plan(found, Path(), "meta", dtypes, None, 2 << 30)
    for tensor in weights.layer_tensors(cfg):
        rows, columns = tensor.shape(cfg)
        pieces = copy._row_blocks(plan, tensor, copy._MAX_BLOCK)
        assert pieces[0][0] == 0
        assert pieces[-1][1] == rows
        assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
        widest = max(stop - start for start, stop in pieces) * columns * 4
        assert widest <= copy._MAX_BLOCK * 1.1
        assert 2 * copy._COPIES * widest < 1.2 * (1 << 30)


def test_the_command_line(tmp_path, capsys):
    cfg = small()
    source = tools.make_hf(tmp_path / "hf", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    command = [str(source), str(tmp_path / "out"), "--to", "meta", "--shards", "2", "--verify"]
    assert main([*command, *ANY]) == 0
    out = capsys.readouterr().out
    for part in (
        "found:",
        "float16",
        f"{cfg.num_params:,} parameters",
        "disk:",
        "verified",
        "done:",
        "peak memory",
    ):
        assert part in out
    assert main([str(source), str(tmp_path / "out")]) == 1
    assert "exists; remove it" in capsys.readouterr().err
    assert main(["--inspect", str(tmp_path / "out")]) == 0
    assert "Meta format, 2 file(s)" in capsys.readouterr().out
    assert main([str(source), str(tmp_path / "o2"), "--max-memory", "1MB"]) == 1
    assert "too little" in capsys.readouterr().err
    assert not (tmp_path / "o2.partial").exists()


def test_memory_used_before_the_conversion_is_not_counted(tmp_path, monkeypatch, capsys):
    """The memory of a notebook is not counted; the command line limits the whole process."""
    cfg = small()
    source = tools.make_hf(tmp_path / "hf", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    monkeypatch.setattr(copy, "resident_bytes", lambda: 100 << 30)
    convert(source, tmp_path / "out")
    assert main([str(source), str(tmp_path / "o2")]) == 1
    assert "--max-memory 2.1 GB is too little: 10" in capsys.readouterr().err


def test_output_goes_to_the_log_of_the_caller(tmp_path, capsys):
    cfg = small()
    source = tools.make_hf(tmp_path / "hf", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    lines = []
    convert(str(source), str(tmp_path / "one"), to="meta", verify=True, log=lines.append)
    assert [line.split(":")[0] for line in lines[:3]] == ["found", "writing", "disk"]
    assert any(line.startswith("note: params.json cannot hold the context") for line in lines)
    assert lines[-1].startswith("done: ")
    convert(source, tmp_path / "two", log=None)
    assert capsys.readouterr() == ("", "")


def test_only_light_modules_are_imported(tmp_path):
    """Not torch, transformers or safetensors, and not JAX between torch formats."""
    cfg = small()
    source = tools.make_hf(tmp_path / "hf", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    code = (
        "import sys; from llama_jax.convert.job import convert;"
        f"convert({str(source)!r}, {str(tmp_path / 'out')!r}, to='meta');"
        "print(sorted({'torch', 'transformers', 'safetensors', 'jax'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("rope", "to"),
    [
        (dict(type="yarn", factor=4.0), "hf"),
        (dict(type="dynamic", factor=4.0), "hf"),
        (dict(type="dynamic", factor=4.0, original_context=8192), "hf"),
        (dict(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0), "hf"),
        (dict(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0), "meta"),
    ],
)
def test_missing_original_context_is_the_context(tmp_path, rope, to):
    cfg = small(context=8192)
    source = tools.make_hf(tmp_path / "hf", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    run = convert(source, tmp_path / "run")
    settings = json.loads((run / "model.json").read_text())
    settings["model"]["rope"] = {"theta": 1e4, **rope}
    (run / "model.json").write_text(json.dumps(settings))
    (run / "manifest.json").unlink()  # otherwise the changed file is refused
    convert_verified(run, tmp_path / "out", to=to)


# The real model, where it is present.

STORIES_PATHS = [
    ("meta-mha", ["orbax"]), ("meta-mha-mp2", ["orbax"]), ("hf-mha", ["orbax"]),
    ("meta-mha", ["hf", "meta", "orbax"]), ("hf-mha", ["orbax", "meta", "hf", "orbax"]),
]  # fmt: skip
needs_stories = pytest.mark.skipif(
    not STORIES.exists(), reason="the stories260k model is not beside the repository"
)


@needs_stories
@pytest.mark.parametrize(("name", "path"), STORIES_PATHS)
def test_real_model_round_trips(tmp_path, name, path):
    """Every path from each of its three folders gives the same tensors and tokenizer."""
    folder = STORIES / name
    for i, to in enumerate(path):
        shards = 2 if to == "meta" else None
        context = 512 if name.startswith("meta") and i == 0 else None
        folder = convert_verified(folder, tmp_path / str(i), to=to, shards=shards, context=context)
    safetensors = formats.read_safetensors(STORIES / "hf-mha/model.safetensors")
    mapped = formats.map_file(STORIES / "hf-mha/model.safetensors")
    hf = {n: formats.view(r, mapped) for n, r in safetensors.items()}
    ours = restore(folder)
    assert same(ours["embed"], hf["model.embed_tokens.weight"])
    assert same(ours["unembed"], hf["lm_head.weight"].T)
    q = np.stack([hf[f"model.layers.{i}.self_attn.q_proj.weight"].T for i in range(5)])
    assert same(ours["blocks"]["attention"]["q"], q)
    tokenizer = (folder / "tokenizer.model").read_bytes()
    assert tokenizer == (STORIES / "tokenizer.model").read_bytes()
    model = json.loads((folder / "model.json").read_text())
    assert model["token_ids"] == {"bos": 1, "eos": 2}
    assert model["model"]["context"] == 512


def test_zip_records_are_aligned_to_64_bytes(tmp_path):
    """For any sizes of the records before them."""
    shapes = {f"w{n}": ((n, 3), DTYPES["float32"]) for n in range(1, 12)}
    layout = torch_files.plan(tmp_path / "a.pth", shapes)
    assert [offset % 64 for offset in layout.data.values()] == [0] * len(layout.data)


def test_crc_of_a_tensor_larger_than_a_block(tmp_path):
    path, data = tmp_path / "a.pth", np.random.default_rng(0).bytes(9 << 20)
    path.write_bytes(data)
    region = formats.TensorSlice(path, 8, ((9 << 18) - 2,), (1,), DTYPES["float32"])
    files = weights.TorchWeights(small(), {}, interleaved=False)
    assert files.checksum(region) == zlib.crc32(data[8:])
