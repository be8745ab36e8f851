"""The process of a fake engine, in NumPy: `fake_engine.py KIND`.

It reads an .npz of a matrix and a vector, and computes with the mean of images.
KIND says how it fails.
"""

import importlib.util
import os
import pathlib
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
WORKER = ROOT / "rigl_keras/experiments/benchmarks/engines/worker.py"


def load(kind):
    calls = 0

    def loaded(path, threads, batch):
        print("this is no answer", flush=True)
        if kind == "fails":
            raise ValueError(f"cannot read {path}\nand more")
        content = np.load(path)

        def compute(images):
            nonlocal calls
            calls += 1
            if kind == "dies" and calls > 3:
                print("out of luck", file=sys.stderr, flush=True)
                os._exit(3)
            if kind == "hangs":
                time.sleep(600)
            if len(images) != batch:
                raise ValueError(f"{len(images)} images, not {batch}")
            outputs = images.mean((1, 2)) @ content["matrix"]
            off = {"wrong": 1.01, "nan": np.nan}.get(kind, 1)
            return (off * outputs + content["vector"]).astype(np.float32)

        return compute

    return loaded


def prepare(path, to, inputs):
    pathlib.Path(to).write_text(f"{pathlib.Path(path).name} and {inputs}")


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    worker.serve(load(sys.argv[1]), lambda: "1.2", prepare)
