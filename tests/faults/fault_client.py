"""Uploads small models and submits jobs until it is killed; prints a line for each thing that the server acknowledged.

fault_client.py ADDRESS FOLDER FIRST_SEED
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from modelpress_client import Client
from modelpress_client.errors import ModelpressError

MAX_ATTEMPTS = 10  # the most that there can be
MAX_PAUSE_S = 8.0  # so that the workers keep up


def content_of(seed: int) -> bytes:
    """The model of a seed: 4 to 400 kB of noise behind the first bytes of an ONNX file."""
    source = random.Random(seed)
    return b"\x08\x07" + source.randbytes(source.choice([4_000, 50_000, 400_000]))


def main(address: str, folder: Path, seed: int) -> None:
    """One model and one job after the other; an error of the moment leaves one out."""
    with Client(address) as client:
        while True:
            seed += 1
            path = folder / f"{seed}.onnx"
            path.write_bytes(content_of(seed))
            try:
                model = client.upload(path)
                print(json.dumps({"seed": seed, "model": model.name}), flush=True)
                job = client.compress(model, labels={"seed": str(seed)}, max_attempts=MAX_ATTEMPTS)
                print(json.dumps({"seed": seed, "model": model.name, "job": job.name}), flush=True)
            except ModelpressError as error:
                print(json.dumps({"seed": seed, "error": f"{error.reason}: {error}"}), flush=True)
            finally:
                path.unlink()
            time.sleep(random.random() * MAX_PAUSE_S)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
