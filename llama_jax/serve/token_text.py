"""The text and the bytes of single tokens, for log-probabilities."""

from llama_jax.data.tokenizer import Tokenizer


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token adds to the text; of a control token, its name.

    Args:
      tokenizer: of the model.
      token: an id; those that the tokenizer does not have have no bytes.
    """
    if token >= tokenizer.vocab_size:
        return b""
    return tokenizer.token_bytes[token] or tokenizer.mark(token).encode()


def token_string(data: bytes) -> str:
    """The text of a token; a part of a character is "bytes:" and its bytes, as by OpenAI."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data)
