"""Loading many adapters into one model: PEFT's load_adapter compared with Pool.load and route.

    python benchmarks/loading.py [--experts 166] [--layers 6] [--work FOLDER] [--out RESULT.json]

The model has SmolLM2-135M's width and `--layers` blocks; the adapters are random ones of rank 16 at all 7
linear layers of every block, in bfloat16, with gates. Every way runs in a process of its own, on the same
folders. Seconds are wall and CPU time, without imports and without building the base.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from datetime import date
from functools import partial
from pathlib import Path

import torch
from bench_machine import in_new_process, in_work_folder, report
from packed import memory, model_of, pool_options, write_pool


def measure(way: str, folder: Path, layers: int) -> dict[str, float]:
    """Loads all adapters in this process, in one of the ways."""
    import peft

    from phatgoose.experts.pool import Pool
    from phatgoose.models.attach.attach import route

    model, before = model_of(layers), memory()
    folders = sorted((folder / "experts").iterdir())
    start, cpu = time.perf_counter(), time.process_time()
    if way == "peft":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.PeftModel.from_pretrained(model, folders[0], adapter_name=folders[0].name)
            for adapter in folders[1:]:
                wrapped.load_adapter(adapter, adapter_name=adapter.name)
        assert len(wrapped.peft_config) == len(folders)
    else:
        pool = Pool.load(folder)
        loaded = {"load": time.perf_counter() - start, "load_cpu": time.process_time() - cpu}
        route(model, pool, any_base=True)
        assert len(pool) == len(folders)
    found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    after = memory()
    return {**(loaded if way != "peft" else {}), **found, **{k: after[k] - before[k] for k in before}}


def main() -> None:
    parser = pool_options(__doc__, layers=6)
    parser.add_argument("--way", choices=["peft", "folders", "packed"], default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(measure(options.way, options.work, options.layers)))
        return
    run = partial(compared, experts=options.experts, layers=options.layers)
    report(in_work_folder("loading", options.work, run), options.out)


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
        result[way] = in_new_process(__file__, "--way", way, "--work", folder, "--layers", layers)
    return result


if __name__ == "__main__":
    main()
