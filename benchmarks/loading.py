"""Loading many adapters into one model: PEFT's load_adapter against this library's Pool.load and route, in one run.

    python benchmarks/loading.py [--experts 166] [--layers 6] [--work FOLDER] [--out RESULT.json]

The model has SmolLM2-135M's width and `--layers` blocks; the adapters are random ones of rank 16 at all 7 linear layers of every
block, in bfloat16, with gates. Every way runs in a process of its own on the same folders. Wall and CPU seconds, without imports and
without building the base.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path

import torch
from packed import memory, model_of, write_pool


def measure(way: str, folder: Path, layers: int) -> dict[str, float]:
    """Loads all adapters in this process, in one of the ways."""
    import peft

    from phatgoose.experts.pool import Pool
    from phatgoose.models.attach.attach import route

    model, before = model_of(layers), memory()
    places = sorted((folder / "experts").iterdir())
    start, cpu = time.perf_counter(), time.process_time()
    if way == "peft":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.PeftModel.from_pretrained(model, places[0], adapter_name=places[0].name)
            for place in places[1:]:
                wrapped.load_adapter(place, adapter_name=place.name)
        assert len(wrapped.peft_config) == len(places)
    else:
        pool = Pool.load(folder)
        loaded = {"load": time.perf_counter() - start, "load_cpu": time.process_time() - cpu}
        route(model, pool, any_base=True)
        assert len(pool) == len(places)
    found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    after = memory()
    return {**(loaded if way != "peft" else {}), **found, **{k: after[k] - before[k] for k in before}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=166)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--way", choices=["peft", "folders", "packed"], default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.route is not None:
        print(json.dumps(measure(options.route, options.work, options.layers)))
        return
    work = Path(tempfile.mkdtemp(prefix="loading-", dir=options.work))
    try:
        result = compared(work / "pool", options.experts, options.layers)
    finally:
        shutil.rmtree(work)
    print(json.dumps(result, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def compared(folder: Path, experts: int, layers: int) -> dict[str, object]:
    import peft

    from phatgoose.experts.packed.pack import pack

    tensors = write_pool(folder, experts, layers)
    result: dict[str, object] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "peft": peft.__version__,
        "experts": experts,
        "layers": layers,
        "tensor_bytes": tensors,
    }
    for way in ("peft", "folders", "packed"):
        if way == "packed":
            pack(folder)
        command = [sys.executable, __file__, "--way", way, "--work", str(folder), "--layers", str(layers)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result[way] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
