"""Quantized checkpoints hold the same bits as quantization at load."""

import functools
import hashlib
import json
import shutil

import convert_tools as tools
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding

import llama_jax
from llama_jax.checkpoint.arrays import ORBAX
from llama_jax.config import ConfigError, MeshConfig
from llama_jax.convert import logits as verification
from llama_jax.convert import quantize
from llama_jax.convert.__main__ import main
from llama_jax.convert.formats import ConvertError
from llama_jax.convert.job import convert, open_folder
from llama_jax.generate.read_params import read_params
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.params import abstract_params
from llama_jax.model.quantize import is_quantized, pack, unpack
from llama_jax.model.sharding import AXES, PRESETS, make_mesh
from llama_jax.prepare.tokenizer import train_tokenizer

# In int4 groups of 64 and of 32; over two devices of 32 and 16.
CFG = tools.small(vocab_size=300, dim=64, head_dim=16, num_heads=4, num_kv_heads=4, ffn_dim=96)

TEXT = ["the cat sat on a mat", "some animals saw 12 cats", "日本 and é", "def main(argv):"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of the same source: unquantized, int8 and int4.

    In bfloat16 many numbers are exactly between two integers, so the rounding must agree.
    """
    folder = tmp_path_factory.mktemp("weights")
    state = tools.meta_state(CFG, tools.DTYPES["bfloat16"], make=tools.random_values)
    state["layers.1.feed_forward.w1.weight"][5] = 0  # an output that is always zero
    tools.make_meta(folder / "meta", state, CFG)
    train_tokenizer(TEXT * 50, 300, folder / "meta" / "tokenizer.model")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quantize, "BLOCK", 1000)  # a matrix is more than one block
        patched.setattr(verification, "compare_logits", lambda *_: "logits compared")
        for kind in (None, "int8", "int4"):
            convert(folder / "meta", folder / str(kind), verify=kind is not None, quantize=kind)
    return folder


def loaded(folder, kind, tensor=1, stored=True, dtype="float32"):
    mesh = jax.make_mesh(
        (1, 1, tensor, 1), AXES, (AxisType.Explicit,) * 4, devices=jax.devices()[:tensor]
    )
    with jax.set_mesh(mesh):
        compute = ComputeConfig(jnp.dtype(dtype), PRESETS["fsdp_tensor"])
        like = abstract_params(CFG, compute)
        place = lambda x: jax.ShapeDtypeStruct(
            x.shape, dtype, sharding=NamedSharding(mesh, x.sharding.spec)
        )
        folder = folder / kind if stored else folder / "None"
        return read_params(folder, CFG, jax.tree.map(place, like), kind, kind if stored else None)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
    assert jax.tree.map(lambda x: (x.dtype, x.sharding), a) == jax.tree.map(
        lambda x: (x.dtype, x.sharding), b
    )


@pytest.mark.parametrize(
    ("kind", "tensor", "dtype"), [("int8", 2, "float32"), ("int4", 1, "bfloat16")]
)
def test_bits_are_those_of_quantizing_at_load(folders, kind, tensor, dtype):
    same(loaded(folders, kind, tensor, True, dtype), loaded(folders, kind, tensor, False, dtype))


def test_int4_groups_split_over_devices_share_a_scale(folders):
    whole = lambda x: x.astype(jnp.float32) if is_quantized(x) else x
    blocks = (jax.device_get(loaded(folders, "int4", n)["blocks"]) for n in (1, 2))
    one, two = (jax.tree.map(jax.vmap(whole), x, is_leaf=is_quantized) for x in blocks)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(two), jax.device_get(one))


def test_texts_are_those_of_quantizing_at_load(folders):
    stored = llama_jax.load(folders / "int4")
    again = llama_jax.load(folders / "None", quantize="int4")
    ask = lambda llm: llm.generate("the cat", max_new_tokens=12, logprobs=True)
    assert ask(stored) == ask(again)
    same(llama_jax.load(folders / "int4", quantize="int4").params, stored.params)
    with pytest.raises(ValueError, match=r"quantize='int8', but .* holds int4: leave quantize out"):
        llama_jax.load(folders / "int4", quantize="int8")


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
def test_stored_arrays_and_manifest(folders, kind, bits, capsys):
    """Shapes and SHA-256 of what a stock restore reads, and the output of --inspect."""
    folder = folders / kind
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**ORBAX)) as files:
        tree = files.metadata(folder / "steps/0/model").item_metadata.tree
        as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(restore_args=as_arrays)
        tree = files.restore(folder / "steps/0/model", args=args)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["quantize"] == kind
    for path, entry in manifest["tensors"].items():
        array = functools.reduce(dict.__getitem__, path.split("/"), tree)
        assert (list(array.shape), array.dtype.name) == (entry["shape"], entry["dtype"])
        layers = array if path.startswith("blocks/") else [array]
        sums = [hashlib.sha256(np.ascontiguousarray(w).tobytes()).hexdigest() for w in layers]
        assert sums == entry["sha256"], path
    up = tree["blocks"]["mlp"]["up"]
    assert up["q"].nbytes * 8 == CFG.num_layers * CFG.dim * CFG.ffn_dim * bits
    assert up["scale"].shape == (CFG.num_layers, 1, CFG.ffn_dim)
    assert main(["--inspect", str(folder)]) == 0
    assert f"matrices of the layers {kind}, others " in capsys.readouterr().out


def test_quantized_checkpoints_cannot_be_converted(folders, tmp_path, capsys):
    """The original weights cannot be recovered, and the errors say so."""
    out = str(tmp_path / "out")
    for arguments, said in [
        ([str(folders / "int8"), out, "--to", "hf"], "holds matrices in int8, which cannot be"),
        ([str(folders / "int8"), out, "--quantize", "int4"], "holds matrices in int8"),
        ([str(folders / "meta"), out, "--to", "hf", "--quantize", "int4"], "Orbax; Hugging Face"),
    ]:
        assert main(arguments) == 1
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="quantize='int2' must be 'int8' or 'int4'"):
        convert(folders / "meta", tmp_path / "out", quantize="int2")


def test_over_several_devices(folders):
    mesh = lambda devices, **sizes: make_mesh(
        MeshConfig(preset="fsdp_tensor", **sizes), jax.devices()[:devices]
    )
    for name in ("None", "int4"):
        llm = llama_jax.load(folders / name, quantize="int4", mesh=mesh(2, fsdp=1, tensor=2))
        assert llm.params["blocks"][0]["mlp"]["down"].bits == 4
    with pytest.raises(ValueError, match=r"the mesh has fsdp=8: generation shards .* tensor only"):
        llama_jax.load(folders / "int4", mesh=mesh(8))
    message = "tensor=8 does not divide num_kv_heads=4, vocab_size=300 of this model"
    with pytest.raises(ValueError, match=message):
        llama_jax.load(folders / "None", mesh=mesh(8, fsdp=1, tensor=8))


def test_weights_that_are_damaged_or_one_step_of_some(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"one step of a checkpoint: load .*/None, its newest"):
        llama_jax.load(folders / "None/steps/0")
    for name, kind in (("None", None), ("int8", "int8")):
        shutil.copytree(folders / name, tmp_path / name)
        path = f"blocks.mlp.up{'.q' if kind else ''}/c"
        chunk = next(p for p in (tmp_path / name).rglob(f"{path}/1/**/*") if p.is_file())
        chunk.write_bytes(chunk.read_bytes()[:10])
        with pytest.raises(ConfigError, match=f"{chunk} has 10 bytes, not "):
            llama_jax.load(tmp_path / name)
        (tmp_path / name / "manifest.json").unlink()
        with pytest.raises(ConfigError, match=r"the weights in .* cannot be read: .*mlp.up"):
            llama_jax.load(tmp_path / name)


def test_a_stopped_run_continues(folders, tmp_path, monkeypatch):
    read, done = quantize.QuantizedWeights.read, []

    def stops(self, tensor, start, stop):
        done.append(tensor.name)
        if len(done) == 20:
            raise KeyboardInterrupt
        return read(self, tensor, start, stop)

    monkeypatch.setattr(quantize.QuantizedWeights, "read", stops)
    with pytest.raises(KeyboardInterrupt):
        convert(folders / "meta", tmp_path / "out", quantize="int8")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConvertError):
        open_folder(tmp_path / "out.partial")
    monkeypatch.setattr(quantize.QuantizedWeights, "read", read)
    convert(folders / "None", tmp_path / "other", quantize="int8")  # from Orbax as well
    convert(folders / "meta", tmp_path / "out", quantize="int8")
    sums = lambda name: json.loads((name / "manifest.json").read_text())["tensors"]
    assert sums(tmp_path / "out") == sums(folders / "int8") == sums(tmp_path / "other")


def test_numbers_without_a_scale_are_an_error(tmp_path):
    state = tools.meta_state(CFG, tools.DTYPES["float32"], make=tools.random_values)
    state["layers.0.attention.wo.weight"][3, 4] = np.inf
    tools.make_meta(tmp_path / "meta", state, CFG)
    with pytest.raises(ValueError, match="blocks/attention/o/0 holds numbers that are not finite"):
        convert(tmp_path / "meta", tmp_path / "out", quantize="int4")


@pytest.mark.parametrize("rows", [6, 7])
def test_int4_packs_two_rows_per_byte(rows):
    q = np.random.default_rng(0).integers(-8, 8, (rows, 5)).astype(np.int8)
    assert pack(q).shape == (-(-rows // 2), 5)
    np.testing.assert_array_equal(unpack(pack(q), rows), q)
