"""FLOPs, time, energy, carbon and price of a compiled train step, as values and as text."""

import dataclasses
import math
from typing import Any

from llama_jax.chips import GIB
from llama_jax.config import Recipe, TrainConfig
from llama_jax.model.lora import num_adapter_params
from llama_jax.plan.compile import Compiled
from llama_jax.plan.energy import PAPER_CARBON, PAPER_PUE, energy
from llama_jax.train.remat import forward_flops, recomputed
from llama_jax.train.step import flops_per_token


def metrics(c: Compiled, watts: float | None = None, price: float | None = None) -> dict[str, Any]:
    """All values of a plan, in base units: bytes, seconds, FLOPs. Memory and step are per device.

    Args:
      c: the compiled step.
      watts: power of a chip; None: the table's.
      price: price per chip-hour.
    """
    recipe, chip, memory = c.recipe, c.machine.chip, c.memory
    out: dict[str, Any] = {
        "machine": c.machine.name,
        "chips": c.machine.chips,
        "mesh": c.mesh,
        "parameters": recipe.model.num_params,
        "adapter_parameters": num_adapter_params(recipe.model, recipe.lora) if recipe.lora else 0,
        "batch_size": recipe.train.batch_size,
        "seq_len": recipe.data.seq_len,
        "gradient_accumulation": recipe.train.gradient_accumulation,
        "remat": recipe.train.remat,
        "kept": kept_text(recipe.train),
        "param_dtype": recipe.train.param_dtype,
        "moment_dtype": recipe.optim.moment_dtype,
        "frozen": c.frozen,
        "fits": c.fits,
        "compile_seconds": c.seconds,
        "memory": {
            "available": chip.memory * GIB if math.isfinite(chip.memory) else None,
            "temporary": memory.temporary,
            **dataclasses.asdict(memory),
        },
    }
    if c.cost is None:
        return out
    tokens = recipe.tokens_per_step
    model_flops = flops_per_token(recipe) * tokens / c.machine.devices
    out["step"] = {
        "tokens": tokens,
        "flops": step_flops(c),
        "model_flops": model_flops,
        "recomputed_flops": recomputed_flops(recipe) * tokens / c.machine.devices,
        "memory_bytes": c.cost.bytes,
        "collectives": collectives(c),
        "kernels": {k: int(n) for k, n in c.cost.kernels.items()},
        "kernels_without_flops": int(c.cost.kernels_without_flops),
        "compiler_cycles": c.cost.cycles or None,
        "compiler_matmul_cycles": c.cost.matmul_cycles or None,
    }
    if chip.platform != "cpu":
        out["time"] = _time(c, model_flops)
    if recipe.train.steps is None:
        out["epochs"] = recipe.train.epochs
    elif "time" in out:
        days = recipe.train.steps * out["time"]["step"] / 3600 / 24
        hours = days * 24 * c.machine.chips
        out["run"] = {"tokens": recipe.train.steps * tokens, "days": days, "chip_hours": hours}
        out["run"] |= energy(hours, watts or chip.watts, PAPER_PUE, PAPER_CARBON)
        out["run"] |= {"price_per_chip_hour": price, "price": price and price * hours}
    return out


def recomputed_flops(recipe: Recipe) -> float:
    """FLOPs per token that the backward pass repeats.

    Attention's scores are always recomputed (kernels do not store them): half of attention's
    forward pass. The rest are the activations that train.remat does not keep, and the logits with
    train.loss_chunk.
    """
    flops = forward_flops(recipe)
    total = flops["attention"] / 2 + sum(flops[name] for name in recomputed(recipe))
    logits = 2.0 * math.prod(recipe.model.shape("DV"))
    return total + (logits if recipe.train.loss_chunk else 0.0)


def step_flops(c: Compiled) -> float:
    """FLOPs of a step: those counted in the program, and those of attention kernels that do not
    declare any (Triton's cannot), from shapes."""
    assert c.cost is not None
    if not c.cost.kernels_without_flops:
        return c.cost.flops
    tokens = c.recipe.tokens_per_step / c.machine.devices
    # Forward pass 1, backward pass 2, and what `recomputed_flops` counts.
    passes = 3.5 + ("attention" in recomputed(c.recipe))
    return c.cost.flops + passes * forward_flops(c.recipe)["attention"] * tokens


def collectives(c: Compiled) -> list[dict[str, Any]]:
    """A row for each kind of collective and number of devices.

    Each has the number of calls, the bytes of the whole arrays, and the bytes that a device
    receives inside its slice (ICI, NVLink) and from other slices (DCN).
    """
    assert c.cost is not None
    rows: dict[tuple[str, int, bool], dict[str, Any]] = {}
    for collective, size in c.cost.collectives.items():
        n = collective.slices or len(collective.group) or c.machine.devices
        ids = collective.group or range(len(c.slices))
        slices = collective.slices or len({c.slices[i] for i in ids})
        row = rows.setdefault(
            (collective.kind, n, slices > 1),
            {"kind": collective.kind, "devices": n, "between_slices": slices > 1, "calls": 0}
            | {"bytes": 0, "interconnect_bytes": 0.0, "dcn_bytes": 0.0},
        )
        row["calls"] += c.cost.collective_counts[collective]
        row["bytes"] += size
        # In a ring, each device receives all but its own shard; an all-reduce does so twice.
        received = size * (1 if n == 2 and "permute" in collective.kind else (n - 1) / n)
        received *= 2 if collective.kind == "all-reduce" else 1
        dcn = 0.0
        if slices > 1:
            # A slice receives what it lacks once, split among its devices of the group.
            in_slice = n / slices
            dcn = received * (n - in_slice) / (n - 1) / in_slice
        row["dcn_bytes"] += dcn
        row["interconnect_bytes"] += received - dcn
    return sorted(rows.values(), key=lambda r: -r["bytes"])


def _time(c: Compiled, model_flops: float) -> dict[str, Any]:
    """The lower bound of a step's time: its slowest term, which hides all others."""
    assert c.cost is not None
    chip, rows = c.machine.chip, collectives(c)
    peak = chip.tflops * 1e12
    terms = {
        "compute": step_flops(c) / peak,
        "memory": min_memory_traffic(c) / (chip.bandwidth * 1e9),
        chip.interconnect_name: sum(r["interconnect_bytes"] for r in rows)
        / (chip.interconnect * 1e9),
    }
    if chip.dcn and c.machine.slices > 1:
        terms["dcn"] = sum(r["dcn_bytes"] for r in rows) / (chip.dcn * 1e9)
    step = max(terms.values())
    estimate = c.cost.cycles / (chip.clock * 1e9) if chip.clock and c.cost.cycles else None
    return {
        "terms": terms,
        "bound_by": max(terms, key=lambda k: terms[k]),
        "step": step,
        "tokens_per_second": c.recipe.tokens_per_step / step,
        "mfu": model_flops / peak / step,
        "compiler_estimate": estimate,
        "compiler_estimate_mfu": model_flops / peak / estimate if estimate else None,
    }


def min_memory_traffic(c: Compiled) -> float:
    """Bytes that a step must at least move between chip and memory.

    What is trained and its optimizer state are read and written once, frozen weights are read once;
    the forward pass's activations are written and read once per microbatch. The inputs and outputs
    of every op would be too many: some stay on chip.
    """
    m = c.memory
    state = m.weights + m.gradients + 2 * m.optimizer
    return state + 2 * m.activations * c.recipe.train.gradient_accumulation


def to_text(f: dict[str, Any], title: str, rates: str) -> str:
    """Format :func:`metrics` for the terminal.

    Args:
      f: from :func:`metrics`.
      title: first line.
      rates: peak rates of a device, as text.
    """
    lines = [title, *_memory_lines(f)]
    if "step" in f:
        lines += ["", *_step_lines(f)]
    if "time" in f:
        lines += ["", *_time_lines(f, rates), "", *_run_lines(f)]
    return "\n".join(lines)


def _memory_lines(f: dict[str, Any]) -> list[str]:
    m = {k: (v or 0) / GIB for k, v in f["memory"].items()}
    unit, scale = ("GiB", 1) if m["peak"] > 0.1 else ("MiB", 1024)
    if not m["available"]:
        verdict = f"needs {m['peak'] * scale:.2f} {unit} per device"
    elif f["fits"]:
        verdict = f"FITS: {m['peak']:.2f} of {m['available']:.2f} GiB per device"
    else:
        verdict = (
            f"DOES NOT FIT: {m['peak']:.2f} GiB per device, {m['peak'] - m['available']:.2f} more "
            f"than the {m['available']:.2f} available"
        )
    trained = "weights"
    stored = f["param_dtype"]
    weights = f"{stored}, this device's shard"
    if f["frozen"]:
        trained = "adapters" if f["adapter_parameters"] else "weights that are trained"
        weights = f"those that are not trained in {f['frozen']}, the {trained} in {stored}"
    meaning = {
        "weights": weights,
        "optimizer": f"Adam's two moments, {f['moment_dtype']}",
        "gradients": f"{stored}, same shapes as the {trained}",
        "activations": f"kept by the forward pass for the backward pass ({f['kept']})",
        "temporary": "rest of the peak: one layer's arrays, gathered weights, logits, buffers",
        "code": "the program, not included in the peak",
    }
    rows = [f"  {k:<12}{m[k] * scale:>9.2f} {unit}  {what}" for k, what in meaning.items()]
    return [f"{verdict} (compiled in {f['compile_seconds']:.0f} s)", *rows]


def kept_text(train: TrainConfig) -> str:
    """What the forward pass keeps for the backward pass."""
    text = f"remat {train.remat}"
    if not isinstance(train.remat, str):
        text = "keeps " + (", ".join(train.remat) or "nothing")
    return text + f" (on the host: {', '.join(train.offload)})" * bool(train.offload)


def _step_lines(f: dict[str, Any]) -> list[str]:
    step = f["step"]
    lines = [
        f"A step of {step['tokens']:,} tokens, per device:",
        f"  {step['flops'] / 1e12:,.4g} TFLOP in matmuls and kernels: "
        f"{step['flops'] / step['model_flops']:.2f} x the model FLOPs, of which "
        f"{step['recomputed_flops'] / step['model_flops']:.2f} x are recomputation",
        *(f"  {n:,} calls of kernel {k}" for k, n in step["kernels"].items()),
    ]
    if step["kernels_without_flops"]:
        lines.append("  (these attention kernels declare no FLOPs: counted from their shapes)")
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
        f"Lower bound of a step at peak rates: {t['step']:.3g} s",
        f"  per device: {rates}",
        f"  {terms}; bound by {t['bound_by']}",
        f"  {t['tokens_per_second']:,.0f} tokens/s, "
        f"{t['tokens_per_second'] / f['chips']:,.0f} per chip, MFU {t['mfu']:.1%} "
        "(causal attention counts half; real steps are slower)",
    ]
    if t["compiler_estimate"]:
        lines.append(
            f"  XLA's estimate, summed over the program: {t['compiler_estimate']:.3g} s, "
            f"MFU {t['compiler_estimate_mfu']:.1%} (without collectives between chips)"
        )
    return lines


def _run_lines(f: dict[str, Any]) -> list[str]:
    if "run" not in f:
        return [
            f"The length of the run, train.epochs={f['epochs']:g}, is known once its data is "
            "prepared; give train.steps to plan it"
        ]
    r = f["run"]
    lines = [
        f"The whole run of {r['tokens'] / 1e9:,.1f}B tokens at that speed: {r['days']:,.1f} days, "
        f"{r['chip_hours']:,.0f} chip-hours"
    ]
    if r["mwh"] is None:
        lines.append("  energy unknown: the vendor publishes no watts of this chip; give --power")
    else:
        lines.append(
            f"  {r['mwh']:,.0f} MWh, {r['tco2eq']:,.0f} tCO2eq ({r['watts']:g} W per chip x "
            f"PUE {r['pue']} x {r['kg_per_kwh']} kg/kWh, section 6 of the paper)"
        )
    if r["price"] is not None:
        lines.append(f"  price: {r['price']:,.0f} at {r['price_per_chip_hour']:g} per chip-hour")
    return lines
