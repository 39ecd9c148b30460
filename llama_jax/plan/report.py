"""From what was compiled to what it costs: time, energy, carbon, money; as text and as JSON."""

import math
from typing import Any

from llama_jax.chips import GIB
from llama_jax.config import Recipe
from llama_jax.plan.budget import PAPER_CARBON, PAPER_PUE, energy
from llama_jax.plan.compile import Compiled


def figures(c: Compiled, watts: float | None, price: float | None) -> dict[str, Any]:
    """Everything that a plan says, as plain values in base units (bytes, seconds, operations).

    ``watts`` and ``price`` (money a chip-hour) replace what is known of the chip.
    """
    recipe, chip, memory = c.recipe, c.machine.chip, c.memory
    out: dict[str, Any] = {
        "machine": c.machine.name,
        "chips": c.machine.chips,
        "mesh": c.mesh,
        "parameters": recipe.model.num_params,
        "batch_size": recipe.train.batch_size,
        "seq_len": recipe.data.seq_len,
        "gradient_accumulation": recipe.train.gradient_accumulation,
        "remat": recipe.train.remat,
        "fits": c.fits,
        "compile_seconds": c.seconds,
        "memory": {
            "available": chip.memory * GIB if math.isfinite(chip.memory) else None,
            "peak": memory.peak,
            "weights": memory.weights,
            "optimizer": memory.optimizer,
            "gradients": memory.gradients,
            "activations": memory.activations,
            "temporary": memory.temporary,
            "code": memory.code,
        },
    }
    if c.cost is None:
        return out
    tokens = recipe.train.batch_size * recipe.data.seq_len
    own = recipe.model.flops_per_token(recipe.data.seq_len) * tokens / c.machine.devices
    out["step"] = {
        "tokens": tokens,
        "operations": operations(c),
        "model_operations": own,
        "recomputed_operations": recomputed(recipe) * tokens / c.machine.devices,
        "memory_bytes": c.cost.bytes,
        "collectives": collectives(c),
        "kernels": {k: int(n) for k, n in c.cost.kernels.items()},
        "kernels_that_declare_nothing": int(c.cost.silent_kernels),
        "compiler_cycles": c.cost.cycles or None,
        "compiler_product_cycles": c.cost.product_cycles or None,
    }
    if chip.platform != "cpu":
        out["time"] = time = _time(c, own)
        hours = recipe.train.steps * time["step"] / 3600 * c.machine.chips
        out["run"] = _run(recipe.train.steps * tokens, hours, c.machine.chips)
        out["run"] |= energy(hours, watts or chip.watts, PAPER_PUE, PAPER_CARBON)
        out["run"] |= {"price_a_chip_hour": price, "money": price and price * hours}
    return out


def recomputed(recipe: Recipe) -> float:
    """Operations of a training token that the backward pass does a second time.

    Attention's scores always (a kernel keeps none): half of its forward pass. Under remat "matmuls"
    all of its forward pass as well; under "full" also the products of a layer but the last, which
    nothing needs again. With train.loss_chunk, the logits.
    """
    cfg, remat, attention = recipe.model, recipe.train.remat, _attention(recipe)
    total = attention / 2 + (attention if remat != "none" else 0.0)
    if remat == "full":
        words = ("DQ", "DE", "DE", "QD", "DF", "DF")
        total += 2.0 * cfg.num_layers * sum(math.prod(cfg.shape(w)) for w in words)
    return total + (2.0 * math.prod(cfg.shape("DV")) if recipe.train.loss_chunk else 0.0)


def operations(c: Compiled) -> float:
    """Operations of a step on one device: what was counted in the program, and those of attention's
    kernels where these declare none (Triton's cannot), from shapes."""
    assert c.cost is not None
    if not c.cost.silent_kernels:
        return c.cost.flops
    recipe = c.recipe
    tokens = recipe.train.batch_size * recipe.data.seq_len / c.machine.devices
    # Forward, backward twice that, and what is computed again: see `recomputed`.
    times = 3.5 + (recipe.train.remat != "none")
    return c.cost.flops + times * _attention(recipe) * tokens


def _attention(recipe: Recipe) -> float:
    """Operations of a token in attention's two products, forward; causal: half."""
    return 2.0 * math.prod(recipe.model.shape("LQ")) * recipe.data.seq_len


def _run(tokens: int, hours: float, chips: int) -> dict[str, Any]:
    return {"tokens": tokens, "days": hours / chips / 24, "chip_hours": hours}


def collectives(c: Compiled) -> list[dict[str, Any]]:
    """Each kind of collective over each number of devices: calls, bytes of the whole arrays, bytes
    that come in over the links inside a slice and over the network between slices (of GPUs: between
    hosts), and whether its devices are in several slices."""
    assert c.cost is not None
    rows: dict[tuple[str, int, bool], dict[str, Any]] = {}
    for collective, size in c.cost.collectives.items():
        n = collective.slices or len(collective.group) or c.machine.devices
        ids = collective.group or range(len(c.slices))
        slices = collective.slices or len({c.slices[i] for i in ids})
        far = slices > 1
        row = rows.setdefault(
            (collective.kind, n, far),
            {"kind": collective.kind, "devices": n, "between_slices": far, "calls": 0, "bytes": 0}
            | {"link_bytes": 0.0, "network_bytes": 0.0},
        )
        row["calls"] += c.cost.collective_counts[collective]
        row["bytes"] += size
        # A ring brings each device all but its own part; a sum does so twice.
        inward = size * (1 if n == 2 and "permute" in collective.kind else (n - 1) / n)
        inward *= 2 if collective.kind == "all-reduce" else 1
        network = 0.0
        if far:
            # Each slice brings the part it lacks in once, shared by its devices of the group.
            near = n / slices
            network = inward * (n - near) / (n - 1) / near
        row["network_bytes"] += network
        row["link_bytes"] += inward - network
    return sorted(rows.values(), key=lambda r: -r["bytes"])


def _time(c: Compiled, own: float) -> dict[str, Any]:
    """The least time of a step: nothing else than its slowest term, the others hidden behind it."""
    assert c.cost is not None
    chip, rows = c.machine.chip, collectives(c)
    peak = chip.tflops * 1e12
    terms = {
        "compute": operations(c) / peak,
        "memory": least_traffic(c) / (chip.bandwidth * 1e9),
        "links": sum(r["link_bytes"] for r in rows) / (chip.interconnect * 1e9),
    }
    if chip.dcn and c.machine.slices > 1:
        terms["network"] = sum(r["network_bytes"] for r in rows) / (chip.dcn * 1e9)
    step = max(terms.values())
    tokens = c.recipe.train.batch_size * c.recipe.data.seq_len
    cycles = c.cost.cycles / (chip.clock * 1e9) if chip.clock and c.cost.cycles else None
    return {
        "terms": terms,
        "bound_by": max(terms, key=lambda k: terms[k]),
        "step": step,
        "tokens_per_second": tokens / step,
        "mfu": own / peak / step,
        "compiler_estimate": cycles,
        "compiler_estimate_mfu": own / peak / cycles if cycles else None,
    }


def least_traffic(c: Compiled) -> float:
    """Bytes that must cross the memory bus: what every product and fusion reads and writes would
    count what stays on the chip between two of them, so this is the state, read and written once,
    and what the forward pass keeps, written and read once a part."""
    m = c.memory
    return 2 * (m.weights + m.optimizer) + 2 * m.activations * c.recipe.train.gradient_accumulation


def text(f: dict[str, Any], title: str, rates: str) -> str:
    """The plan for a person."""
    lines = [title, *_memory_lines(f)]
    if "step" in f:
        lines += ["", *_work_lines(f)]
    if "time" in f:
        lines += ["", *_time_lines(f, rates), "", *_run_lines(f["run"])]
    return "\n".join(lines)


def _memory_lines(f: dict[str, Any]) -> list[str]:
    m = {k: (v or 0) / GIB for k, v in f["memory"].items()}
    if not m["available"]:
        verdict = f"needs {m['peak']:.2f} GiB a device"
    elif f["fits"]:
        verdict = f"FITS: {m['peak']:.2f} of {m['available']:.2f} GiB a device"
    else:
        over = m["peak"] - m["available"]
        verdict = (
            f"DOES NOT FIT: {m['peak']:.2f} GiB a device, {over:.2f} more than the "
            f"{m['available']:.2f} there are"
        )
    meaning = {
        "weights": "float32, this device's part",
        "optimizer": "Adam's two averages, float32",
        "gradients": "float32, as the weights",
        "activations": f"kept by the forward pass for the backward pass (remat {f['remat']})",
        "temporary": "the rest of the peak: a layer at work, gathered weights, logits, buffers",
        "code": "the program itself, beside the above",
    }
    rows = [f"  {k:<12}{m[k]:>9.2f} GiB  {what}" for k, what in meaning.items()]
    return [f"{verdict} (compiled in {f['compile_seconds']:.0f} s)", *rows]


def _work_lines(f: dict[str, Any]) -> list[str]:
    step = f["step"]
    ratio = step["operations"] / step["model_operations"]
    again = step["recomputed_operations"] / step["model_operations"]
    lines = [
        f"A step of {step['tokens']:,} tokens, on each device:",
        f"  {step['operations'] / 1e12:,.4g} TFLOP of matrix products and kernels: {ratio:.2f} x "
        f"the model's own, of which the backward pass does {again:.2f} again",
        *(f"  {n:,} calls of kernel {k}" for k, n in step["kernels"].items()),
    ]
    if step["kernels_that_declare_nothing"]:
        lines.append("  (attention's kernels declare no operations here; counted by their shapes)")
    for r in step["collectives"]:
        where = ", between slices" if r["between_slices"] else ""
        lines.append(
            f"  {r['kind']} of {r['bytes'] / 1e9:,.2f} GB in {r['calls']:,} calls over "
            f"{r['devices']} devices{where}"
        )
    return lines


def _time_lines(f: dict[str, Any], rates: str) -> list[str]:
    t = f["time"]
    terms = ", ".join(f"{k} {v:.3g} s" for k, v in t["terms"].items())
    lines = [
        f"The least a step can take, at the chip's stated rates ({rates}): {t['step']:.3g} s",
        f"  {terms}; bound by {t['bound_by']}",
        f"  {t['tokens_per_second']:,.0f} tokens/s, "
        f"{t['tokens_per_second'] / f['chips']:,.0f} a chip, MFU {t['mfu']:.1%} "
        "(causal attention counted half; a real step is slower)",
    ]
    if t["compiler_estimate"]:
        lines.append(
            f"  the compiler's own estimate, summed over the program: {t['compiler_estimate']:.3g} "
            f"s, MFU {t['compiler_estimate_mfu']:.1%} (collectives between chips not counted)"
        )
    return lines


def _run_lines(r: dict[str, Any]) -> list[str]:
    lines = [
        f"The whole run, {r['tokens'] / 1e9:,.1f}B tokens, at that speed: {r['days']:,.1f} days, "
        f"{r['chip_hours']:,.0f} chip-hours"
    ]
    if r["mwh"] is None:
        lines.append("  energy: the maker states no watts of this chip; give --power WATTS")
    else:
        lines.append(
            f"  {r['mwh']:,.0f} MWh, {r['tco2eq']:,.0f} tCO2eq ({r['watts']:g} W a chip x "
            f"PUE {r['pue']} x {r['kg_a_kwh']} kg/kWh, the paper's section 6)"
        )
    if r["money"] is not None:
        lines.append(f"  {r['money']:,.0f} at {r['price_a_chip_hour']:g} a chip-hour")
    return lines
