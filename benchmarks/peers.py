"""This notebook beside diffusers and denoising-diffusion-pytorch: speed, memory, and how the costs grow.

    python benchmarks/peers.py                     everything, about 20 minutes on two CPU cores
    python benchmarks/peers.py --quick             the same with tiny sizes, a rehearsal: its numbers mean nothing
    python benchmarks/peers.py --only training     one part; the other parts of results/<device>.json are kept
    python benchmarks/peers.py --profile           also where the time of a training step goes
    python benchmarks/peers.py --name cpu-bf16     into results/cpu-bf16.json: another machine beside the first

Every system runs in a process of its own, all take turns, and only one computes at a time. README.md says what is compared.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from systems import COMPARED, CORES, NOTEBOOK, ROOT, SHIPPED, SYSTEMS, serve

QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0", "TQDM_DISABLE": "1"}
SIZES = {  # `part`: how much of a sampling run of the large network is really done; None is all of it
    "cpu": dict(preset="cpu", batch=8, steps=1, part=(16, 2), sampled=64, classified=16, growth_batch=8, drawn=1),
    "cuda": dict(preset="gpu", batch=128, steps=20, part=None, sampled=64, classified=200, growth_batch=64, drawn=16),
}
QUICK = dict(batch=2, steps=1, part=(2, 2), sampled=4, classified=1, growth_batch=2)
GROWTH = {  # axis: (its values, what is measured along it)
    "batch": ([1, 2, 4, 8, 16, 32, 64, 128, 256], ("training", "evaluating")),
    "width": ([1, 2, 4], ("training", "evaluating")),
    "side": ([16, 32, 64], ("training", "evaluating")),
    "steps": ([5, 10, 20, 50, 100, 250, 1000], ("sampling",)),
    "images": ([1, 4, 16], ("classifying",)),
}
TARGETS = {  # (wanted, where the number stands in the results, at least or at most, bound)
    "cpu": [
        ("training, times diffusers", "training/ratios/diffusers/median", "≥", 2.5),
        ("training, times diffusers with the same switches", "training/ratios/diffusers + switches/median", "≥", 1.3),
        ("training, times denoising-diffusion-pytorch", "training/ratios/denoising-diffusion-pytorch/median", "≥", 1.5),
        ("training, share of the convolution peak", f"training/systems/{NOTEBOOK}/share_of_peak", "≥", 0.55),
        ("64 images, 20 steps, shipped weights, seconds", f"sampling/20 steps/{SHIPPED}/seconds/median", "≤", 12),
    ],
    "cuda": [
        ("training, times diffusers", "training/ratios/diffusers/median", "≥", 3),
        ("training, times diffusers with the same switches", "training/ratios/diffusers + switches/median", "≥", 1.3),
    ],
}


class Worker:
    def __init__(self, name: str, device: str, precision: str):
        context = multiprocessing.get_context("spawn")
        self.name, (self.pipe, theirs) = name, context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, device, precision), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, command: str, **options):
        try:
            self.pipe.send((command, options))
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise SystemExit(f"the worker of {self.name} stopped during {command} {options}: see above") from None
        if isinstance(answer, MemoryError):
            raise answer
        return answer


@contextlib.contextmanager
def workers(names, bench):
    """Fresh processes for the systems `names`, ended afterwards."""
    made = {name: Worker(name, bench.device, bench.precision) for name in names}
    try:
        yield made
    finally:
        for worker in made.values():
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
            worker.process.join()


def spread(values) -> dict:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "rounds": list(values)}


def interleave(turns: dict, rounds: int, label: str) -> dict:
    """{name: its result in every round}; the order turns around from round to round."""
    seen = {name: [] for name in turns}
    for number in range(rounds):
        print(f"{label}: round {number + 1} of {rounds}", file=sys.stderr)
        for name in list(turns)[:: -1 if number % 2 else 1]:
            seen[name].append(turns[name]())
    return seen


def ratios(seconds: dict) -> dict:
    """How many times faster the notebook is than each other system: the median over the rounds' own ratios."""
    ours = seconds[NOTEBOOK]
    return {name: spread([b / a for a, b in zip(ours, theirs)]) for name, theirs in seconds.items() if name != NOTEBOOK}


def training(bench) -> dict:
    """A step of the CIFAR-10 network of Ho et al.: forward, backward, optimiser and moving average."""
    with workers([*COMPARED, "device"], bench) as crew:
        device, crew = crew["device"], {name: crew[name] for name in COMPARED}
        facts = {name: worker("prepare", kind="training", batch=bench.batch) for name, worker in crew.items()}
        turns = {name: lambda w=worker: w("time", times=bench.steps) for name, worker in crew.items()}
        for p in ("fp32", "bf16"):
            turns[p] = lambda p=p: device("convolutions", precision=p, batch=bench.batch)
        seconds = interleave(turns, bench.rounds, "training")
        peak = {p: max(seconds.pop(p)) for p in ("fp32", "bf16")}
        memory = {name: worker("memory") for name, worker in crew.items()}
    systems = {}
    for name, taken in seconds.items():
        speed, work = [bench.batch / s for s in taken], 3 * facts[name]["forward_gflop"]
        rate = statistics.median(speed) * work
        systems[name] = {"images_per_s": spread(speed), "training_gflop_per_image": work, "gflop_per_s": rate}
        systems[name] |= {"share_of_peak": rate / max(peak.values()), **memory[name], **facts[name]}
    return {"batch": bench.batch, "peak_gflop_per_s": peak, "systems": systems, "ratios": ratios(seconds)}


def sampling(bench) -> dict:
    """64 images from the CIFAR-10 network: the usual solver of each system, and 20 steps of DPM-Solver++(2M) in all."""
    result = {}
    for title in ("usual", "20 steps"):
        with workers(COMPARED + [SHIPPED] * (title == "20 steps"), bench) as crew:
            how, turns = {}, {}
            for name, worker in crew.items():
                solver, steps = SYSTEMS[name][0].usual if title == "usual" else ("dpm++", 20)
                images, done = (bench.sampled, steps) if name == SHIPPED or not bench.part else bench.part
                scale = bench.sampled * steps / (images * done)
                how[name] = {"solver": solver, "steps": steps, "measured_images": images, "measured_steps": done}
                preset = {"preset": "shipped"} if name == SHIPPED else {}
                worker("prepare", kind="sampling", warm_ups=1, solver=solver, steps=done, images=images, **preset)
                turns[name] = lambda w=worker, k=scale: k * w("time")
            seconds = interleave(turns, bench.rounds, f"sampling, {title}")
        result[title] = {
            name: {"images_per_s": spread([bench.sampled / s for s in taken]), "seconds": spread(taken), **how[name]}
            for name, taken in seconds.items()
        }
        result[title]["ratios"] = ratios({name: seconds[name] for name in COMPARED})
    return {"images": bench.sampled, **result}


def classifying(bench) -> dict:
    """Network evaluations a second while classifying, in networks of one shape; and with the shipped weights."""
    names, n = [*COMPARED[:3], SHIPPED], bench.classified
    with workers(names, bench) as crew:
        shape = crew[NOTEBOOK]("shape", preset=bench.preset)
        jobs = {name: {"shape": shape} for name in names}
        jobs |= {NOTEBOOK: {"preset": bench.preset, "conv_resample": True}, SHIPPED: {"preset": "shipped"}}
        facts = {m: w("prepare", kind="classifying", warm_ups=1, images=n, **jobs[m]) for m, w in crew.items()}
        turns = {m: lambda m=m: crew[m]("time") / facts[m]["evaluations"] for m in names}
        seconds = interleave(turns, bench.rounds, "classifying")
    systems = {}
    for name, taken in seconds.items():
        speed = spread([1 / s for s in taken])
        rate = speed["median"] * facts[name]["forward_gflop"]
        systems[name] = {"evaluations_per_s": speed, "gflop_per_s": rate, **facts[name]}
    return {"images": n, "systems": systems, "ratios": ratios({m: seconds[m] for m in COMPARED[:3]})}


def growth(bench) -> dict:
    """How time and memory of the notebook's own functions grow, one axis at a time."""
    result = {"preset": bench.preset, "compiled": False, "cap_seconds": bench.cap_seconds, "cap_mb": bench.cap_mb}
    fixed = {
        "training": dict(preset=bench.preset, batch=bench.growth_batch, eager=True),
        "evaluating": dict(preset=bench.preset, batch=bench.growth_batch),
        "sampling": dict(preset=bench.preset, solver="dpm++", images=bench.drawn),
        "classifying": dict(preset=bench.preset),
    }
    for axis, (values, kinds) in GROWTH.items():
        for kind in kinds:
            print(f"growth: {kind} by {axis}", file=sys.stderr)
            with workers([NOTEBOOK], bench) as crew:
                points = grow(crew[NOTEBOOK], kind, axis, values[:3] if bench.quick else values, fixed[kind], bench)
            given = {k: v for k, v in fixed[kind].items() if k not in ("preset", "eager", axis)}
            result[f"{kind} by {axis}"] = {"fixed": given, **points}
    return result


def grow(worker, kind, axis, values, fixed, bench) -> dict:
    """Points along one axis, the values beyond a cap left out with the reason, and the exponents fitted to the rest."""
    points, skipped = [], {}
    for value in values:
        ahead = forecast(points, axis, value)
        if ahead["seconds"] > bench.cap_seconds or ahead["mb"] > bench.cap_mb:
            skipped[value] = "about {seconds:.0f} s and {mb:.0f} MB expected, more than the cap".format(**ahead)
            continue
        try:
            worker("prepare", kind=kind, warm_ups=1, **{**fixed, axis: value})
            times = [worker("time")]
            times += [worker("time") for _ in range(4) if times[0] < 1]  # what takes long is measured once
        except MemoryError:
            skipped[value] = "out of memory"
            continue
        memory = worker("memory")
        mb = memory["peak_mb"] - memory["idle_mb"]
        points.append({axis: value, "seconds": statistics.median(times), "mb": mb, "measured": len(times)})
    power = {m: slope(points, axis, m) for m in ("seconds", "mb")}
    at_end = {m: slope(points[-2:], axis, m) for m in ("seconds", "mb")}
    return {"points": points, "skipped": skipped, "exponent": power, "exponent_of_last_two": at_end}


def slope(points, axis, measure):
    """The e of measure ~ axis**e, by least squares in the logarithms; None where it cannot be told."""
    import numpy as np

    if len(points) < 2 or min(p[measure] for p in points) <= 0:
        return None
    return float(np.polyfit(np.log([p[axis] for p in points]), np.log([p[measure] for p in points]), 1)[0])


def forecast(points, axis, value) -> dict:
    """Seconds and MB to expect at `value`, from the last two points, growing at least in proportion."""
    if not points:
        return {"seconds": 0.0, "mb": 0.0}
    last = points[-1]
    return {
        m: last[m] * (value / last[axis]) ** max(1.0, slope(points[-2:], axis, m) or 0.0) for m in ("seconds", "mb")
    }


def profiled(bench) -> dict:
    """Where the time of a training step goes, uncompiled: the large network here and in diffusers, and our small one."""
    jobs = [(NOTEBOOK, "ddpm", bench.batch), (NOTEBOOK, bench.preset, 4 * bench.batch)]
    jobs += [(name, "ddpm", bench.batch) for name in COMPARED[1:3]]
    result = {}
    for name, preset, batch in jobs:
        print(f"profile: {name}, {preset}", file=sys.stderr)
        more = {"preset": preset} if name == NOTEBOOK else {}
        with workers([name], bench) as crew:
            crew[name]("prepare", kind="training", batch=batch, eager=True, **more)
            result[f"{name}, {preset}"] = {"batch": batch, **crew[name]("profile", times=max(2, bench.steps))}
    return result


def look_up(results: dict, path: str):
    for key in path.split("/"):
        results = results.get(key, {}) if isinstance(results, dict) else {}
    return results if results != {} else None


def judge(results: dict) -> list[dict]:
    """The targets beside what was measured; a rehearsal reaches nothing."""
    verdicts = []
    for wanted, path, sense, bound in TARGETS[results["device"]]:
        value, verdict = look_up(results, path), "not measured"
        if value is not None:
            verdict = "reached" if (value >= bound if sense == "≥" else value <= bound) else "not reached"
        if results["rehearsal"]:
            verdict = "rehearsal, not judged"
        verdicts.append({"target": f"{wanted} {sense} {bound:g}", "measured": value, "verdict": verdict})
    return verdicts


def table(results: dict) -> str:
    """All of it as one table: what, who, value, lowest to highest round, unit, remarks."""
    rows = []

    def row(what, who, value, unit, remark="", factor=None):
        rounds = f"{value['low']:.4g} to {value['high']:.4g}" if isinstance(value, dict) else ""
        value = value["median"] if isinstance(value, dict) else value
        faster = f"{factor['median']:.2f} ({factor['low']:.2f} to {factor['high']:.2f})" if factor else ""
        rows.append((what, who, f"{value:.4g}", rounds, unit, faster, remark))

    part = results.get("training", {})
    for p, value in part.get("peak_gflop_per_s", {}).items():
        row("convolution peak", p, value, "GFLOP/s")
    for name, s in part.get("systems", {}).items():
        remark = f"{s['gflop_per_s']:.4g} GFLOP/s, {s['share_of_peak']:.0%} of peak, {s['peak_mb']:.0f} MB"
        row(f"training, batch {part['batch']}", name, s["images_per_s"], "images/s", remark, part["ratios"].get(name))
    for title in ("usual", "20 steps"):
        part = results.get("sampling", {}).get(title, {})
        for name, s in part.items():
            if name != "ratios":
                all_of_it = s["measured_images"] == results["sampling"]["images"] and s["measured_steps"] == s["steps"]
                remark = f"{s['solver']}, {s['steps']} steps; {s['seconds']['median']:.4g} s for the "
                remark += f"{results['sampling']['images']} images, " + (
                    "all run"
                    if all_of_it
                    else "scaled from {measured_images} images × {measured_steps} steps".format(**s)
                )
                row(f"sampling, {title}", name, s["images_per_s"], "images/s", remark, part["ratios"].get(name))
    part = results.get("classifying", {})
    for name, s in part.get("systems", {}).items():
        remark = f"{s['forward_gflop']:.3g} GFLOP each, {s['gflop_per_s']:.4g} GFLOP/s"
        row("classifying", name, s["evaluations_per_s"], "evaluations/s", remark, part["ratios"].get(name))
    for name, s in results.get("growth", {}).items():
        if " by " in name and s["exponent"]["seconds"] is not None:
            remark = "last two points {:.2f}".format(s["exponent_of_last_two"]["seconds"])
            remark += f"; memory {s['exponent']['mb']:.2f}" if s["exponent"]["mb"] is not None else ""
            remark += "".join(f"; {value} left out: {why}" for value, why in s["skipped"].items())
            row("growth", name, s["exponent"]["seconds"], "exponent", remark)
    for name, s in results.get("profile", {}).items():
        if name == "measured_on":
            continue
        shares = (f"{group} {ms / s['ms']:.0%}" for group, ms in s["groups"].items())
        row(f"profile, batch {s['batch']}", name, s["ms"], "ms a step", ", ".join(shares))
    rows = [("measure", "system", "median", "rounds", "unit", "notebook × faster", "remarks"), *rows]
    wide = [max(len(r[i]) for r in rows) for i in range(6)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(r, wide)), r[6]]).rstrip() for r in rows]
    for v in results["targets"]:
        value = "" if v["measured"] is None else f", measured {v['measured']:.3g}"
        lines.append(f"target: {v['target']}{value}: {v['verdict']}")
    return "\n".join(lines)


def plot(results: dict, path: Path):
    """Time and memory along every axis, both logarithmic, with the fitted exponents."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"batch": "batch size", "width": "width, times the preset's", "side": "image side, pixels"}
    labels |= {"steps": "sampling steps", "images": "images classified"}
    fig, axes = plt.subplots(2, len(GROWTH), figsize=(3.1 * len(GROWTH), 5.8), sharey="row", layout="constrained")
    for column, (axis, (_, kinds)) in zip(axes.T, GROWTH.items()):
        for ax, measure in zip(column, ("seconds", "mb")):
            for kind in kinds:
                line = results["growth"][f"{kind} by {axis}"]
                x, y = ([p[m] for p in line["points"]] for m in (axis, measure))
                power = line["exponent"][measure]
                ax.plot(x, y, "o-", label=kind if power is None else f"{kind}: exponent {power:.2f}")
            ax.set(xscale="log", yscale="log", xlabel=labels[axis])
            ax.set_xticks(x, x, rotation=45 if len(x) > 4 else 0)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("MB above the idle process")
    fig.suptitle(f"Cost of the notebook's {results['growth']['preset']!r} network on {results['machine']['name']}")
    fig.savefig(path, dpi=110)


def significant(value):
    """The same with every float cut to four digits: more was not measured."""
    if isinstance(value, dict):
        return {key: significant(v) for key, v in value.items()}
    if isinstance(value, list):
        return [significant(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def memory_cap(device: str) -> float:
    """MB that a point of the growth curves may take: six tenths of what there is."""
    if device == "cuda":
        return 0.6 * torch.cuda.get_device_properties(0).total_memory / 2**20
    return 0.6 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


def main():
    sections = {f.__name__: f for f in (training, sampling, classifying, growth)} | {"profile": profiled}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=sections, help="these parts, instead of all but the profile")
    parser.add_argument("--profile", action="store_true", help="also where the time of a training step goes")
    parser.add_argument(
        "--quick", action="store_true", help="a rehearsal with tiny sizes, in results/<device>-quick.json"
    )
    parser.add_argument("--batch", type=int, help="images per training step")
    parser.add_argument(
        "--name", help="results/NAME.json, for another machine beside the first; else the device's name"
    )
    parser.add_argument("--cap-seconds", type=float, default=60, help="longest single measurement of the growth curves")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = SIZES[device] | (QUICK if "--quick" in sys.argv else {})
    bench = parser.parse_args(namespace=argparse.Namespace(device=device, precision="fp32", **sizes))
    bench.batch, bench.cap_mb = bench.batch or sizes["batch"], memory_cap(device)
    bench.rounds = min(bench.rounds, 2) if bench.quick else bench.rounds
    wanted = bench.only or [name for name in sections if name != "profile"]
    wanted += ["profile"] * (bench.profile and "profile" not in wanted)

    os.environ.update(QUIET)  # for the workers, which start fresh
    sys.path.insert(0, str(ROOT / "tests"))
    import loader

    with workers([NOTEBOOK], bench) as crew:
        machine = crew[NOTEBOOK]("machine")
    bench.precision = machine["precision"]
    peers = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "denoising-diffusion-pytorch")}
    code = hashlib.sha256("\n".join(loader.code_cells()).encode()).hexdigest()[:16]
    machine |= {"cores": CORES, "python": platform.python_version(), **peers, "notebook_code": code}

    path = ROOT / "benchmarks" / "results" / f"{bench.name or device}{'-quick' * bench.quick}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results |= {"device": device, "machine": machine, "rehearsal": bench.quick}
    for name in wanted:
        began = time.monotonic()
        date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        found = sections[name](bench)
        facts = {"date": date, "minutes": (time.monotonic() - began) / 60, "rounds": bench.rounds, **machine}
        results[name] = significant({**found, "measured_on": facts})
        results["targets"] = judge(results)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    if "growth" in wanted:
        plot(results, path.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
