"""Random JSON schemas, and whether a value is what one of them describes."""

import json
import re

import numpy as np

PATTERNS = ["^[a-c]{1,3}$", "^x+(y|é)?$", "^\\d{2}-\\d$", "^(ab|cd)*$"]
TYPES = {
    "string": str, "boolean": bool, "null": type(None), "array": list, "object": dict,
}  # fmt: skip


def random_schema(rng, depth=0):
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const"]
    kinds += ["array", "object", "object", "any_of"] * (depth < 3)
    kind = str(rng.choice(["object"] if depth == 0 and rng.random() < 0.7 else kinds))
    low = int(rng.integers(-20, 20))
    if kind == "string":
        low = abs(low) % 4
        return {"type": "string", "minLength": low, "maxLength": low + int(rng.integers(0, 9))}
    if kind == "pattern":
        return {"type": "string", "pattern": str(rng.choice(PATTERNS))}
    if kind == "integer":
        return {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(0, 2000))}
    if kind == "number":
        return {"type": "number", "minimum": low - 0.5, "exclusiveMaximum": low + 7}
    if kind == "enum":
        values = ["a", "é\n", 'a"b', 3, -1.5, None, True, [1, 2], {"k": "v"}]
        return {"enum": [values[i] for i in rng.choice(len(values), rng.integers(1, 5), False)]}
    if kind == "const":
        return {"const": ["the", {"other": []}, 0, False][rng.integers(4)]}
    if kind == "array":
        low = int(rng.integers(0, 3))
        size = {"minItems": low, "maxItems": low + int(rng.integers(0, 3))}
        return {"type": "array", "items": random_schema(rng, depth + 1), **size}
    if kind == "any_of":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.integers(1, 4))]}
    if kind == "object":
        names = ["name", "a b", "é", 'q"', "x", "the other"]
        chosen = [names[i] for i in rng.choice(len(names), rng.integers(0, 4), False)]
        more = [False, {"type": "integer", "minimum": 0, "maximum": 9}][rng.integers(2)]
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth + 1) for name in chosen},
            "required": [name for name in chosen if rng.random() < 0.6],
            "additionalProperties": more,
        }
    return {"type": kind}


def satisfies(value, schema):
    """Whether a value is what a schema of :func:`random_schema` describes."""
    if "anyOf" in schema:
        return any(satisfies(value, s) for s in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        # True is not 1, as in JSON.
        texts = [json.dumps(v) for v in schema.get("enum", [schema.get("const")])]
        return json.dumps(value) in texts
    kind = schema["type"]
    if kind in ("integer", "number"):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        below = value < schema.get("exclusiveMaximum", np.inf)
        whole = kind == "number" or value == int(value)
        return schema["minimum"] <= value <= schema.get("maximum", np.inf) and below and whole
    if not isinstance(value, TYPES[kind]):
        return False
    if kind == "string":
        pattern = schema.get("pattern", "").replace("\\d", "[0-9]").replace("$", "\\Z")
        longest = schema.get("maxLength", 999)
        fits = schema.get("minLength", 0) <= len(value) <= longest
        return fits and re.search(pattern, value) is not None
    if kind == "array":
        fits = schema["minItems"] <= len(value) <= schema["maxItems"]
        return fits and all(satisfies(v, schema["items"]) for v in value)
    if kind == "object":
        known, more = schema["properties"], schema["additionalProperties"]
        fits = all(satisfies(v, known.get(k, more)) for k, v in value.items() if k in known or more)
        return fits and set(schema["required"]) <= set(value) and (more or set(value) <= set(known))
    return True
