"""The format of a folder or file of weights, recognized by its content."""

from pathlib import Path

from llama_jax.convert import gguf, huggingface, meta, orbax, sources
from llama_jax.convert.formats import ConvertError, first_names
from llama_jax.convert.sources import SourceCheckpoint
from llama_jax.io import open_regular


def open_folder(path: Path, context: int | None = None) -> SourceCheckpoint:
    """Recognize the format of a folder or file by its content, and check it.

    Args:
      path: a Meta or Hugging Face folder, one of our checkpoints, one step of it, or a GGUF file.
      context: context length of a Meta folder, which has none.

    Raises:
      ConvertError: the folder cannot be used; lists every reason.
      OSError: a file cannot be read.
    """
    if context is not None and not 1 <= context < 1 << 31:
        raise ConvertError(f"--context {context} must be at least 1, and a number of tokens")
    path = gguf.locate(path)
    if not path.exists():
        raise ConvertError(f"{path} does not exist")
    if not path.is_dir():
        source = _open_file(path)
        if context is not None:
            raise ConvertError(f"--context is for Meta folders, which have none; {path} has one")
        sources.check_tokenizers(source)
        return source
    names = sorted(p.name for p in path.iterdir())
    pth = [n for n in names if n.startswith("consolidated.") and n.endswith(".pth")]
    safetensors = [n for n in names if n.endswith((".safetensors", ".safetensors.index.json"))]
    bins = [n for n in names if n.startswith("pytorch_model")]
    hf = safetensors or [n for n in bins if n.endswith((".bin", ".bin.index.json"))]
    # One step of a checkpoint, or the model in it, is accepted as well.
    root = orbax.root_of(path)
    if pth and hf and "config.json" in names:
        raise ConvertError(
            f"{path} holds both {pth[0]} and {hf[0]}; move the files of one format elsewhere"
        )
    if pth or "params.json" in names:
        source = meta.open_meta(path, pth, context)
    elif hf or "config.json" in names:
        source = huggingface.open_hf(path, names)
    elif (root / "model.json").exists():
        source = orbax.open_orbax(root, path)
    else:
        raise ConvertError(
            f"{path} is not a folder of weights: expected consolidated.*.pth with params.json, "
            "config.json with model*.safetensors or pytorch_model*.bin, or model.json with "
            f"steps/; found {first_names(names) or 'nothing'}{_gguf_hint(path, names)}"
        )
    if context is not None and source.format != "meta":
        raise ConvertError(f"--context is for Meta folders, which have none; {path} has one")
    sources.check_tokenizers(source)
    return source


def _open_file(path: Path) -> SourceCheckpoint:
    """Open a file of weights: GGUF by its name or content."""
    with open_regular(path) as f:
        is_gguf = f.read(4) == b"GGUF"
    if not is_gguf and path.suffix != ".gguf":
        raise ConvertError(
            f"{path} is a file; give the folder that holds the weights and their settings, or a "
            "GGUF file"
        )
    return gguf.open_gguf(path)


def _gguf_hint(path: Path, names: list[str]) -> str:
    files = [name for name in names if name.endswith(".gguf")]
    return f"; give the file itself, {path / files[0]}" if files else ""
