"""fewbits with `--activations int8`, which is what llama.cpp and OpenVINO do unasked."""

from __future__ import annotations

from functools import partial

import worker
from fewbits_worker import Engine

if __name__ == "__main__":
    worker.main(partial(Engine, activations="int8"))
